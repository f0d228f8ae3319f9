"""The tables of an evaluation say how many users stand behind each column."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jobs.config.reader import load_config
from jobs.host.console import Console
from jobs.runs.evaluate import Evaluated
from jobs.runs.leaderboard import BoardResult, markdown
from jobs.runs.result_tables import mostly_repeats, print_results, unbeaten
from jobs.runs.summary import Summary
from jobs.training.results import RankedTargets, ScoredImpressions
from models.metrics import Interval


def ranked() -> RankedTargets:
    """User 4 meets a new item at a time of its own, user 5 one that ties with the event before it, user 9 one seen
    before."""
    ones = np.ones(3)
    return RankedTargets(
        user=np.array([4, 5, 9]), request=np.arange(3), history_length=np.full(3, 2), rank_kept=ones,
        rank_removed=ones, tied=np.array([False, True, False]), repeat=np.array([False, False, True]),
        training_count=np.ones(3, int), log_loss=ones, recommended_items=1, catalogue_items=1,
    )  # fmt: skip


def printed(metrics: dict[str, float], capsys: pytest.CaptureFixture[str], *, recipe: str) -> list[str]:
    """The lines of the table of one system."""
    config = load_config("evaluate", recipe, [])
    summary = Summary(
        task=config.data.requests.task, split="leave_one_out", primary="gauc" if "gauc" in metrics else "ndcg@10",
        part="test", systems=["solar"], metrics={"solar": metrics}, slices=[], intervals={}, ratios={},
    )  # fmt: skip
    print_results(config, Console(), Evaluated(Path("evaluation"), summary, reused=False))
    return capsys.readouterr().out.splitlines()


def shown(metrics: dict[str, float], capsys: pytest.CaptureFixture[str], *, recipe: str) -> list[str]:
    """The heads of that table."""
    lines = [line for line in printed(metrics, capsys, recipe=recipe) if "┃" in line]
    cells = [[cell.strip() for cell in line.strip("┃").split("┃")] for line in lines]
    return [" ".join(filter(None, column)) for column in zip(*cells, strict=True)]


def test_ranking_columns_count_users_with_new_with_any_and_with_untied_targets(capsys):
    assert shown(ranked().metrics(), capsys, recipe="movielens-100k") == [
        "model",
        "HR@10 users: 2",
        "NDCG@10 users: 2",
        "MRR@10 users: 2",
        "HR@10, seen kept users: 3",
        "NDCG@10, seen kept users: 3",
        "NDCG@10, no ties users: 1",
        "NDCG@10, seen removed: solar / this",
    ]


def test_repeats_that_count_in_some_columns_alone_are_told(capsys):
    told = "seen items removed unless kept: 1 repeats of such items count there alone; in brackets"
    assert told in " ".join(" ".join(printed(ranked().metrics(), capsys, recipe="movielens-100k")).split())


def test_gauc_counts_users_with_both_labels(capsys):
    label = np.array([1.0, 0.0, 1.0, 1.0])
    scored = ScoredImpressions(
        user=np.array([0, 0, 1, 1]), history_length=np.ones(4), logit=np.arange(4.0), label=label,
        skipped_requests=0, requests=2, recommended_items=1, catalogue_items=4,
    )  # fmt: skip
    assert shown(scored.metrics(), capsys, recipe="movielens-100k-impressions") == [
        "model", "AUC users: 2", "GAUC users: 1", "LogLoss users: 2", "calibration users: 2",
    ]  # fmt: skip


def test_evaluations_of_earlier_versions_are_shown_without_counts(capsys):
    metrics = {name: value for name, value in ranked().metrics().items() if not name.startswith("users")}
    assert shown(metrics, capsys, recipe="movielens-100k")[:2] == ["model", "HR@10"]


def between(value: float, low: float, high: float) -> Interval:
    return Interval(value=value, low=low, high=high)


def test_a_system_that_the_main_one_does_not_beat_is_told():
    ratios = {"popularity": between(2.0, 1.5, 2.5), "own items": between(1.1, 0.9, 1.3),
              "mean_pooling": between(0.5, 0.4, 0.6), "emptied": between(np.nan, np.nan, np.nan)}  # fmt: skip
    summary = Summary(
        task="next_item", split="leave_one_out", primary="ndcg@10", systems=["solar", *ratios], metrics={}, slices=[],
        intervals={}, ratios=ratios,
    )  # fmt: skip
    assert unbeaten(summary) == [
        "solar is not clearly better than own items: 1.10 times its NDCG@10, seen removed, 95 % interval 0.90 to 1.30",
        "solar is worse than mean_pooling: 0.50 times its NDCG@10, seen removed, 95 % interval 0.40 to 0.60",
    ]


@pytest.mark.parametrize(
    ("share", "primary", "told"), [(0.8, "ndcg@10", True), (0.4, "ndcg@10", False), (0.8, "ndcg@10_seen_kept", False)]
)
def test_a_metric_that_leaves_most_targets_out_says_so(share, primary, told):
    summary = Summary(
        task="next_item", split="temporal", primary=primary, systems=["solar"], slices=[], intervals={}, ratios={},
        metrics={"solar": {"share_repeats": share}},
    )  # fmt: skip
    lines = mostly_repeats(summary)
    assert bool(lines) is told
    assert all(line.startswith("80% of the targets are items that the user has seen, which NDCG@10") for line in lines)


def test_a_leaderboard_heads_its_columns_in_the_same_way():
    result = BoardResult(row="SOLAR", seed=1, metrics=ranked().metrics())
    head = markdown([result], part="test").splitlines()[2]
    assert "| NDCG@10, kept (users: 3) |" in head
    assert "| NDCG@10 (users: 2) |" in head
