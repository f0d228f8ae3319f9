"""Scoring times in pairs, on machines made up for it: only a clock, which runs as a busy machine would let it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jobs.config.nightly_config import GateConfig
from jobs.host.documents import as_json, from_json
from jobs.nightly.guards import model_guards
from jobs.nightly.latency import REQUESTS, ROUNDS, Latency, median_interval, model_latency, paired_latency
from jobs.nightly.steps import EvaluatedChallenger


class Machine:
    """A clock and two models: champion's work takes 1, challenger's `ratio`, both longer by load and by chance.

    The load drifts by a factor of ten up and down, and bursts of other programs slow some calls twentyfold.
    """

    def __init__(self, *, ratio: float, seed: int) -> None:
        self.now, self.ratio, self.order = 0.0, ratio, []
        self._random = np.random.default_rng(seed)
        self._phase = self._random.uniform(0, 2 * math.pi)

    def clock(self) -> float:
        return self.now

    def challenger(self, place: int) -> None:
        self._work("challenger", place, self.ratio)

    def champion(self, place: int) -> None:
        self._work("champion", place, 1.0)

    def _work(self, name: str, place: int, amount: float) -> None:
        self.order.append((name, place))
        load = 10 ** math.sin(self._phase + len(self.order) / 40)
        burst = 20.0 if self._random.random() < 0.1 else 1.0
        self.now += amount * (1 + place) * load * burst * math.exp(0.3 * self._random.standard_normal())

    def measured(self) -> Latency:
        return paired_latency(self.challenger, self.champion, requests=REQUESTS, clock=self.clock)


def refused(latency: Latency, *, most: float) -> bool:
    (guard,) = model_guards({}, {}, latency=latency, gate=GateConfig(max_latency=most))
    return not guard.holds


def share_refused(*, ratio: float, most: float, machines: int = 200) -> float:
    found = [refused(Machine(ratio=ratio, seed=seed).measured(), most=most) for seed in range(machines)]
    return float(np.mean(found))


def test_equal_models_are_not_refused_however_busy_the_machine():
    assert share_refused(ratio=1.0, most=1.5) == 0.0
    # At a limit of 1 an equal model is at the limit itself: five in a hundred, and what 200 machines differ by.
    assert share_refused(ratio=1.0, most=1.0) <= 0.09


def test_a_model_at_the_limit_is_refused_no_more_often_than_the_level_says():
    assert share_refused(ratio=1.5, most=1.5) <= 0.09


def test_a_model_that_takes_half_as_long_again_is_refused_where_less_is_allowed():
    assert share_refused(ratio=1.5, most=1.1) >= 0.9
    assert share_refused(ratio=2.5, most=1.5) >= 0.95


def test_the_times_of_single_calls_would_have_refused_equal_models():
    """What the pairs take out: on the same machines the two medians alone differ by more."""
    latencies = [Machine(ratio=1.0, seed=seed).measured() for seed in range(100)]
    apart = [abs(math.log(latency.seconds[0] / latency.seconds[1])) for latency in latencies]
    paired = [abs(math.log(latency.ratio.value)) for latency in latencies]
    assert np.mean(paired) < 0.6 * np.mean(apart)


def test_both_models_score_every_request_in_turns():
    machine = Machine(ratio=1.0, seed=1)
    machine.measured()
    pairs = list(zip(machine.order[::2], machine.order[1::2], strict=True))
    assert len(pairs) == (1 + ROUNDS) * REQUESTS
    assert all(first[1] == second[1] and first[0] != second[0] for first, second in pairs)
    firsts = [first[0] for first, _ in pairs]
    assert firsts.count("challenger") == firsts.count("champion")
    assert {place for (_, place), _ in pairs} == set(range(REQUESTS))


def test_steady_times_give_the_exact_ratio():
    now = [0.0]

    def work(seconds: float):
        def score(place: int) -> None:
            now[0] += seconds

        return score

    found = paired_latency(work(0.3), work(0.2), requests=3, clock=lambda: now[0])
    assert found.seconds == pytest.approx((0.3, 0.2))
    assert (found.ratio.low, found.ratio.value, found.ratio.high) == pytest.approx((1.5, 1.5, 1.5))


@pytest.mark.parametrize(
    ("count", "low", "high"),
    # By the table of Binomial(n, 1/2): P(X < 1) = .031 for 5, P(X < 2) = .035 for 8, P(X < 6) = .021 for 20, all <= .05
    # with the next one above.
    [(4, -math.inf, math.inf), (5, 1, 5), (8, 2, 7), (20, 6, 15)],
)
def test_bounds_of_the_median_are_those_of_the_sign_test(count, low, high):
    found = median_interval(np.random.default_rng(0).permutation(np.arange(1, count + 1)))
    assert (found.low, found.high) == (low, high)
    assert found.value == (count + 1) / 2


def test_a_journal_keeps_the_pairs_and_one_of_an_earlier_version_has_none(tmp_path):
    latency = Machine(ratio=1.0, seed=3).measured()
    step = EvaluatedChallenger(
        directory=tmp_path, reference=None, latencies=latency.seconds, latency_ratio=latency.ratio
    )
    read = from_json(EvaluatedChallenger, as_json(step))
    assert read.latency == latency
    older = {"directory": str(tmp_path), "reference": None, "latencies": [0.04, 0.06]}
    assert from_json(EvaluatedChallenger, older).latency is None
    assert as_json(from_json(EvaluatedChallenger, older)).keys() == older.keys()


def test_exported_models_are_timed_on_the_same_histories(data, export):
    exports = [export(data, name=name).directory for name in ("challenger", "champion")]
    found = model_latency(*exports, shards=data, users=np.arange(3))
    assert all(seconds > 0 for seconds in found.seconds)
    assert 0 < found.ratio.low <= found.ratio.value <= found.ratio.high
