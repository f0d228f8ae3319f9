"""The floor: which baseline is the best, whether the model is below it, and who is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from jobs.config.reader import load_config
from jobs.host.console import Console
from jobs.nightly.gate import Guard, without_champion
from jobs.nightly.guards import floor_guards
from jobs.runs.evaluate import Evaluated
from jobs.runs.floor import below_floor, floor_of
from jobs.runs.result_tables import floor_lines, print_results, unbeaten
from jobs.runs.summary import Floor, Slice, Summary
from models.metrics import Interval


def sums(*means: float) -> tuple[np.ndarray, np.ndarray]:
    """Two users of each mean, with two requests and with one."""
    weight = np.tile([2.0, 1.0], len(means))
    return np.repeat(means, 2) * weight, weight


def test_the_floor_is_the_best_baseline_and_its_difference_is_paired_by_user():
    main = sums(0.1, 0.5, 0.9)
    baselines = {"popularity": sums(0.1, 0.1, 0.1), "own items": sums(0.2, 0.6, 1.0)}
    found = floor_of(main, {"solar": main, "din": sums(2.0, 2.0, 2.0), **baselines}, seed=1)
    assert found is not None
    # Users differ among themselves by far more than both systems do at each user.
    assert found.baseline == "own items"
    assert found.difference.value == pytest.approx(-0.1)
    assert found.difference.low == pytest.approx(-0.1)
    assert found.difference.high == pytest.approx(-0.1)


def test_a_difference_that_may_be_chance_is_not_below_and_without_baselines_there_is_no_floor():
    found = floor_of(sums(0.1, 0.5, 0.2), {"popularity": sums(0.2, 0.4, 0.25)}, seed=1)
    assert found is not None
    assert found.difference.low < 0 < found.difference.high
    assert floor_of(sums(0.1), {"din": sums(0.2)}, seed=1) is None
    nobody = (np.zeros(0), np.zeros(0))
    assert floor_of(nobody, {"popularity": nobody}, seed=1) is None


def part(name: str, difference: Interval | None) -> Slice:
    systems = {
        "solar": Interval(value=0.1, low=0.08, high=0.12),
        "own items": Interval(value=0.15, low=0.13, high=0.17),
    }
    floor = Floor(baseline="own items", difference=difference) if difference else None
    return Slice(name=name, users=1_200, weight=3_000.0, systems=systems, floor=floor)


def summary_of(*slices: Slice) -> Summary:
    metrics: dict[str, float] = dict.fromkeys(
        ("requests", "targets", "users", "users_new", "users_untied", "requests_untied", "hr@10", "ndcg@10", "mrr@10",
         "hr@10_seen_kept", "ndcg@10_seen_kept", "ndcg@10_untied"), 1.0,
    )  # fmt: skip
    return Summary(
        task="next_item", split="temporal", primary="ndcg@10_seen_kept", part="test", systems=["solar", "own items"],
        metrics={"solar": metrics, "own items": metrics}, slices=list(slices), intervals={},
        ratios={"own items": Interval(value=0.67, low=0.6, high=0.7)},
    )  # fmt: skip


BELOW, UNCLEAR = Interval(value=-0.05, low=-0.06, high=-0.04), Interval(value=-0.01, low=-0.03, high=0.01)


def test_tables_mark_each_slice_below_the_floor_and_say_it_once(capsys):
    summary = summary_of(part("all targets", BELOW), part("repeats", UNCLEAR), part("no history", BELOW))
    assert [each.name for each in below_floor(summary)] == ["all targets", "no history"]
    assert floor_lines(summary)[0] == (
        "solar is below the floor, all targets: its NDCG@10, seen kept is 0.1000, own items has 0.1500; "
        "difference -0.0500, 95 % interval -0.0600 to -0.0400 over 1,200 users"
    )
    assert unbeaten(summary) == []
    config = load_config("evaluate", "git", [])
    print_results(config, Console(), Evaluated(Path("evaluation"), summary, reused=False))
    shown = capsys.readouterr().out
    assert shown.count("BELOW -0.0500") == 2
    assert "-0.0100 (-0.0300 to" in shown
    assert shown.count("is below the floor") == 2


def test_an_interval_of_few_users_marks_nothing():
    few = dataclasses.replace(part("no history", BELOW), users=9)
    assert below_floor(summary_of(few, dataclasses.replace(few, users=10))) == [dataclasses.replace(few, users=10)]


def test_a_summary_of_before_has_no_floor():
    summary = summary_of(part("all targets", None))
    assert below_floor(summary) == []
    assert len(unbeaten(summary)) == 1


def test_the_gate_refuses_what_is_below_the_floor_also_where_nothing_serves_yet():
    gate = load_config("nightly", "movielens-100k", []).nightly.gate
    assert gate.floor

    def guard(difference: Interval, *, users: int = gate.min_users) -> Guard:
        held_out = dataclasses.replace(part("all targets", difference), users=users)
        (found,) = floor_guards(summary_of(held_out), gate=gate)
        return found

    below = guard(BELOW)
    assert (below.holds, below.undecided) == (False, None)
    refused = without_champion([below], primary="ndcg@10", value=0.1)
    assert refused.verdict == "refused"
    assert "not below own items, 0.15 (difference -0.05" in refused.reasons[0]
    for unclear in (guard(UNCLEAR), guard(BELOW, users=gate.min_users - 1)):
        assert (unclear.holds, unclear.undecided) == (True, True)
        promoted = without_champion([unclear], primary="ndcg@10", value=0.1)
        assert promoted.verdict == "promoted"
        assert "undecided whether not below own items" in promoted.reasons[1]
    above = guard(Interval(value=0.02, low=0.01, high=0.03))
    assert (above.holds, above.undecided) == (True, None)
    assert floor_guards(summary_of(part("all targets", None)), gate=gate) == []
    assert floor_guards(summary_of(part("all targets", BELOW)), gate=dataclasses.replace(gate, floor=False)) == []
