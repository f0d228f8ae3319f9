"""What the gate decides, on users made up for it."""

from __future__ import annotations

import dataclasses
import math
from statistics import NormalDist

import numpy as np
import pytest

from jobs.config.nightly_config import GateConfig, NightlyConfig
from jobs.nightly.gate import (
    ERROR,
    Comparison,
    Guard,
    Pairs,
    compare,
    compare_together,
    decide,
    pairs,
    without_champion,
)
from jobs.nightly.guards import day_guards, model_guards
from jobs.nightly.latency import Latency
from jobs.training.results import RankedTargets, ScoredImpressions
from models.metrics import Interval
from pipeline.batches.requests import RequestConfig
from pipeline.prepare.ingested_days import DayCounts

GATE = GateConfig(min_users=100)
NOBODY = np.zeros(0)


def users(count: int, *, better: float, noise: float, first: int = 0, seed: int = 0) -> Pairs:
    """So many users whose challenger earns `better` more than the champion, about."""
    rng = np.random.default_rng(seed)
    champion = rng.uniform(0.2, 0.4, count)
    challenger = champion * (1 + better + noise * rng.standard_normal(count))
    return Pairs(user=np.arange(first, first + count), challenger=challenger, champion=champion)


def decided(found: Pairs, *before: Pairs, guards: tuple[Guard, ...] = (), reference: Pairs | None = None, gate=GATE):
    tonight = compare(found, margin=gate.margin, seed=1)
    together = compare_together([*before, found], gate=gate, seed=1)
    against = compare(reference, margin=gate.margin, seed=1) if reference else None
    return decide(tonight, together, guards, reference=against, gate=gate)


@pytest.mark.parametrize(
    ("found", "verdict", "reason"),
    [
        (users(5_000, better=0.05, noise=0.3), "promoted", "a loss of 1.00% is excluded"),
        (users(5_000, better=0.0, noise=0.1), "promoted", "a loss of 1.00% is excluded"),
        (users(5_000, better=-0.05, noise=0.3), "refused", "worse"),
        (users(5_000, better=-0.011, noise=0.05), "refused", "worse"),
        (users(400, better=0.0, noise=0.5), "undecided", "wider than the margin of 1.00%"),
        (users(99, better=0.5, noise=0.1), "undecided", "99 users, fewer than 100 (gate.min_users)"),
    ],
)
def test_verdict_follows_the_bound(found, verdict, reason):
    decision = decided(found)
    assert decision.verdict == verdict
    assert reason in decision.reasons[0]


def test_challenger_as_good_as_the_champion_passes_as_often_as_the_power_says():
    trials = [compare(users(800, better=0.0, noise=0.12, seed=seed), margin=0.01, seed=1) for seed in range(200)]
    passed = np.mean([trial.low > -0.01 for trial in trials])
    # 200 draws of about .8: a standard deviation is .03, and the power of a single trial is an estimate too.
    assert abs(passed - np.mean([trial.power for trial in trials])) < 0.09


def test_challenger_that_is_worse_by_the_margin_passes_one_time_in_twenty():
    trials = [compare(users(800, better=-0.01, noise=0.1, seed=seed), margin=0.01, seed=1) for seed in range(400)]
    assert 0.01 < np.mean([trial.low > -0.01 for trial in trials]) < 0.10


def test_users_needed_shrink_with_the_square_of_the_margin():
    found = users(1_000, better=0.0, noise=0.3)
    wide, narrow = (compare(found, margin=margin, seed=1).users_needed for margin in (0.01, 0.001))
    assert wide is not None
    assert narrow == pytest.approx(100 * wide, rel=0.01)


def test_undecided_nights_count_together_until_they_are_enough():
    nights = [users(400, better=0.06, noise=1.0, first=400 * n, seed=n) for n in range(12)]
    assert decided(nights[0]).verdict == "undecided"
    assert decided(nights[-1], *nights[:-1]).verdict == "promoted"


def test_bounds_are_stricter_with_every_look_at_nights_that_count_together():
    nights = [users(60, better=0.0, noise=0.1, first=60 * n, seed=n) for n in range(8)]
    # Sixty users are too few for a decision: the second night is the first look.
    errors = [compare_together(nights[:count], gate=GATE, seed=1).error for count in range(1, 9)]
    assert errors == pytest.approx([0.05, 0.05, *(0.05 / look for look in range(2, 8))])
    one, seven = (compare(Pairs.joined(nights), margin=0.01, seed=1, look=look) for look in (1, 7))
    assert seven.low < one.low < one.relative == seven.relative < one.high < seven.high
    assert "99.29 % bounds" in decided(nights[-1], *nights[:-1]).reasons[0]


def test_looks_together_pass_a_challenger_at_the_margin_seldom():
    nights = np.random.default_rng(0).standard_normal((100_000, 30))
    sums = nights.cumsum(axis=1) / np.sqrt(np.arange(1, 31))
    bounds = [NormalDist().inv_cdf(1 - ERROR / look) for look in range(1, 31)]
    assert (sums > bounds).any(axis=1).mean() == pytest.approx(0.085, abs=0.005)
    assert (sums > NormalDist().inv_cdf(1 - ERROR)).any(axis=1).mean() == pytest.approx(0.24, abs=0.01)


def test_a_user_of_two_nights_is_one_user_with_both_sums():
    joined = Pairs.joined([
        Pairs(user=np.array([3, 5]), challenger=np.array([1.0, 2.0]), champion=np.array([1.0, 1.0])),
        Pairs(user=np.array([5, 9]), challenger=np.array([0.5, 0.1]), champion=np.array([0.0, 0.2])),
    ])  # fmt: skip
    assert joined.user.tolist() == [3, 5, 9]
    assert joined.challenger.tolist() == [1.0, 2.5, 0.1]
    assert joined.champion.tolist() == [1.0, 1.0, 0.2]


def test_a_night_that_is_worse_by_itself_is_refused_whatever_nights_before_gained():
    worse = users(5_000, better=-0.04, noise=0.1)
    gained = [users(5_000, better=0.1, noise=0.1, first=5_000, seed=2)]
    decision = decided(worse, *gained)
    assert decision.verdict == "refused"
    assert decision.reasons[0].startswith("against the champion tonight: -")


def test_challenger_must_also_stand_beside_the_reference():
    as_good = users(5_000, better=0.0, noise=0.1)
    decision = decided(as_good, reference=users(5_000, better=-0.03, noise=0.1))
    assert decision.verdict == "refused"
    assert decision.reasons[0].startswith("against the reference: -")
    assert decided(as_good, reference=users(5_000, better=0.02, noise=0.1)).verdict == "promoted"


def test_a_guard_that_fails_refuses_with_its_figures():
    guard = Guard(name="LogLoss", value=0.7, limit="at most 0.6", holds=False)
    decision = decided(users(5_000, better=0.1, noise=0.1), guards=(guard,))
    assert (decision.verdict, decision.reasons) == ("refused", ("LogLoss is 0.7, it must be at most 0.6",))
    few = decided(users(20, better=0.1, noise=0.1), guards=(guard,))
    assert few.verdict == "undecided"
    assert few.reasons[1] == "LogLoss is 0.7, it must be at most 0.6"
    assert without_champion([guard], primary="ndcg@10", value=0.1).verdict == "refused"
    assert without_champion([], primary="ndcg@10", value=0.1).reasons == ("there is no champion yet",)


def test_first_challenger_without_a_value_of_the_metric_is_refused():
    decision = without_champion([], primary="ndcg@10", value=math.nan)
    assert decision.verdict == "refused"
    assert decision.reasons == ("ndcg@10 is nan: no held-out request counts for it",)


@pytest.mark.parametrize("nobody", [NOBODY, np.zeros(200)])
def test_where_neither_finds_anything_nothing_is_decided(nobody):
    found = Pairs(user=np.arange(len(nobody)), challenger=nobody, champion=nobody)
    assert decided(found).verdict == "undecided"


def test_champion_that_finds_nothing_is_beaten():
    found = Pairs(user=np.arange(200), challenger=np.ones(200), champion=np.zeros(200))
    assert decided(found).verdict == "promoted"


def ranked(rank: list[float], *, repeat: list[bool]) -> RankedTargets:
    count = len(rank)
    return RankedTargets(
        user=np.array([0, 0, 1, 2]), request=np.array([0, 1, 0, 0]), history_length=np.zeros(count, int),
        rank_kept=np.array(rank), rank_removed=np.array(rank), tied=np.zeros(count, bool), repeat=np.array(repeat),
        training_count=np.ones(count, int), log_loss=np.ones(count), recommended_items=1, catalogue_items=1,
    )  # fmt: skip


def test_ranked_targets_pair_by_user_and_leave_out_what_either_knows_as_a_repeat():
    challenger = ranked([1, 1, 3, 1], repeat=[False, True, False, True])
    champion = ranked([1, 1, 1, np.inf], repeat=[False, True, False, False])
    found = pairs(challenger, champion, requests=RequestConfig())
    assert found.user.tolist() == [0, 1]
    assert found.challenger.tolist() == [1.0, 0.5]
    assert found.champion.tolist() == [1.0, 1.0]
    kept = pairs(challenger, champion, requests=RequestConfig(seen_items="kept"))
    assert kept.challenger.tolist() == [2.0, 0.5, 1.0]
    assert kept.champion.tolist() == [2.0, 1.0, 0.0]


def test_impressions_pair_users_that_have_both_labels():
    rng = np.random.default_rng(0)
    user = np.repeat([0, 1, 4], 10)
    label = np.concatenate([rng.permutation(np.repeat([0, 1], 5)), np.zeros(10), rng.permutation(np.repeat([0, 1], 5))])
    results = [
        ScoredImpressions(
            user, user * 0, logit, label, skipped_requests=0, requests=3, recommended_items=1, catalogue_items=1
        )
        for logit in (label + 0.0, -label)
    ]
    found = pairs(*results, requests=RequestConfig(task="impressions"))
    assert found.user.tolist() == [0, 4]
    assert found.challenger.tolist() == [10.0, 10.0]
    assert found.champion.tolist() == [0.0, 0.0]
    other = dataclasses.replace(results[1], user=user + 1)
    with pytest.raises(ValueError, match="evaluated on different requests"):
        pairs(results[0], other, requests=RequestConfig(task="impressions"))


def latency(ratio: float, low: float, high: float) -> Latency:
    return Latency(seconds=(0.01 * ratio, 0.01), ratio=Interval(value=ratio, low=low, high=high))


def guard_named(guards: list[Guard], name: str) -> Guard:
    return next(guard for guard in guards if name in guard.name)


def test_guards_of_the_model():
    champion = {"logloss": 0.5, "calibration": 1.0, "coverage": 0.4}
    good = {"logloss": 0.505, "calibration": 1.05, "coverage": 0.3}
    guards = model_guards(good, champion, latency=latency(1.1, 0.9, 1.3), gate=GATE)
    assert [guard.holds for guard in guards] == [True] * 4
    bad = {"logloss": 0.52, "calibration": 0.85, "coverage": 0.2}
    guards = model_guards(bad, champion, latency=latency(2.2, 1.6, 2.9), gate=GATE)
    assert [guard.holds for guard in guards] == [False] * 4
    assert guard_named(guards, "LogLoss").limit == "at most 0.51 (1.02 times the champion's)"
    only_known = model_guards({"logloss": float("nan")}, champion, latency=latency(1.0, 0.9, 1.1), gate=GATE)
    assert [guard.name for guard in only_known] == ["scoring time, as a multiple of the champion's"]
    assert model_guards({}, champion, latency=None, gate=GATE) == []


def test_scoring_time_that_nothing_shows_to_be_too_long_holds_and_is_said_to_be_undecided():
    (guard,) = model_guards({}, {}, latency=latency(1.4, 0.8, 2.5), gate=GATE)
    assert (guard.holds, guard.undecided) == (True, True)
    decision = decided(users(5_000, better=0.05, noise=0.3), guards=(guard,))
    assert decision.verdict == "promoted"
    assert decision.reasons[1] == (
        "scoring time, as a multiple of the champion's is 1.4, undecided whether at most 1.5 "
        "(95 % bounds 0.8 and 2.5; 14 ms and 10 ms)"
    )
    (clear,) = model_guards({}, {}, latency=latency(1.0, 0.9, 1.1), gate=GATE)
    assert clear.undecided is None
    assert len(decided(users(5_000, better=0.05, noise=0.3), guards=(clear,)).reasons) == 1


def test_guards_of_the_day_compare_with_the_last_days_that_were_whole():
    usual = [DayCounts(read=1_000, accepted=1_000, rejected=0)] * 6 + [DayCounts(read=10, accepted=10, rejected=0)]
    assert day_guards(usual[0], [], gate=GATE) == []
    assert all(guard.holds for guard in day_guards(usual[0], usual, gate=GATE))
    few = day_guards(DayCounts(read=300, accepted=290, rejected=10), usual, gate=GATE)
    assert [guard.holds for guard in few] == [False, False]
    assert guard_named(few, "events").limit.startswith("from 400 to 2,500")
    many = day_guards(DayCounts(read=3_000, accepted=3_000, rejected=0), usual, gate=GATE)
    assert [guard.holds for guard in many] == [False, True]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: GateConfig(margin=0), "margin=0: must be above 0"),
        (lambda: GateConfig(min_users=1), "min_users=1: must be 2 or more"),
        (lambda: GateConfig(event_range=(2.0, 3.0)), "event_range=.2.0, 3.0.: must be one number below 1"),
        (lambda: NightlyConfig(gate_hours=20, valid_hours=5), "must leave room for valid_hours=5"),
        (lambda: NightlyConfig(replay=1.0), "replay=1.0: must be from 0 to below 1"),
        (lambda: NightlyConfig(keep=0), "keep=0: must be 1 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_comparison_of_equal_users_has_no_spread_and_passes():
    same = np.full(200, 0.3)
    found = compare(Pairs(user=np.arange(200), challenger=same, champion=same), margin=0.01, seed=1)
    assert found == Comparison(users=200, relative=0.0, low=0.0, high=0.0, error=0.05, power=1.0, users_needed=None)
