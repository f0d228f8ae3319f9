"""The gate: does a challenger stand beside the champion? Pure numpy; what is compared was scored on the same requests.

    relative difference   d = sum_u challenger_u / sum_u champion_u - 1, users resampled together
    promoted              one-sided 95 % bound of d above -margin, and every guard holds
    refused               a guard fails, or d is below 0 at 95 %, or the interval is narrow and the bound is not above
    undecided             too few users, or the interval is wider than the margin: the champion stays, and the night's
                          users count together with those of the next undecided nights against the same champion,
                          behind bounds that are stricter with every look

Per user the metric is summed as the evaluation does it (jobs/training/results.py): NDCG@10 of a request weighs one, AUC
of a user's candidates as many as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np

from jobs.config.nightly import GateConfig
from jobs.training.results import RankedTargets, ScoredImpressions
from models.metrics import bootstrap_ratio_interval
from pipeline.batches.requests import RequestConfig

Verdict = Literal["promoted", "refused", "undecided"]
ERROR = 0.05
"""How often a one-sided bound may miss; at the n-th look at nights that count together an n-th of it. A model that is
worse by the margin then passes within 30 looks in 8.5 % of cases; behind bounds of 95 % each it would in 24 %."""
_RESAMPLES = 2000
_POWER = 0.8


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Users and what each system earned with them, in the metric's own sums."""

    user: np.ndarray
    """[U] distinct user rows of the data set: the same user has the same row every night."""
    challenger: np.ndarray
    """[U]."""
    champion: np.ndarray
    """[U]."""

    @staticmethod
    def joined(nights: Sequence[Pairs]) -> Pairs:
        """Several nights' users, each once, with its sums over the nights."""
        user, place = np.unique(np.concatenate([night.user for night in nights]), return_inverse=True)
        sums = [
            np.bincount(place, weights=np.concatenate([getattr(night, name) for night in nights]), minlength=len(user))
            for name in ("challenger", "champion")
        ]
        return Pairs(user=user, challenger=sums[0], champion=sums[1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is known of the relative difference d."""

    users: int
    relative: float
    """d; infinite where the champion earned nothing."""
    low: float
    """One-sided bound from below."""
    high: float
    """The same from above."""
    error: float = ERROR
    """How often each of the two misses: 0.05 = a bound at 95 %."""
    power: float
    """Probability that a challenger as good as the champion passes, with so many users."""
    users_needed: int | None
    """Users for which that is 80 %; None where the spread is not known."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guard:
    """Something else that must not get worse."""

    name: str
    value: float
    """Of the challenger, or of the day."""
    limit: str
    """What it had to be, in words."""
    holds: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """What the gate says, and why."""

    verdict: Verdict
    reasons: tuple[str, ...]
    """Each a sentence; never empty."""


def pairs(
    challenger: RankedTargets | ScoredImpressions,
    champion: RankedTargets | ScoredImpressions,
    *,
    requests: RequestConfig,
) -> Pairs:
    """The users of two evaluations of the same requests."""
    if isinstance(challenger, RankedTargets) and isinstance(champion, RankedTargets):
        _refuse_other_requests(challenger, champion, ("user", "request"))
        mask = np.ones(len(challenger.user), bool)
        if requests.seen_items == "removed":
            # What a model does not know it does not know as a repeat either: the same targets for both.
            mask = ~(challenger.repeat | champion.repeat)
        users = np.unique(challenger.user[mask])
        sums = [each.per_user(mask, seen_items=requests.seen_items)[0] for each in (challenger, champion)]
        return Pairs(user=users, challenger=sums[0], champion=sums[1])
    assert isinstance(challenger, ScoredImpressions)
    assert isinstance(champion, ScoredImpressions)
    _refuse_other_requests(challenger, champion, ("user", "label"))
    mask = np.ones(len(challenger.user), bool)
    positives = np.bincount(challenger.user, weights=challenger.label)
    both = (positives > 0) & (positives < np.bincount(challenger.user))
    return Pairs(
        user=np.flatnonzero(both), challenger=challenger.per_user(mask)[0], champion=champion.per_user(mask)[0]
    )


def compare(found: Pairs, *, margin: float, seed: int, look: int = 1) -> Comparison:
    """The relative difference with its bounds, from 2,000 resamples of the users; as many more as the bounds are
    stricter at the n-th look."""
    error = ERROR / look
    if not found.champion.any():
        all_gained = math.inf if found.challenger.any() else math.nan
        return Comparison(
            users=len(found.user), relative=all_gained, low=all_gained, high=all_gained, error=error, power=0.0,
            users_needed=None,
        )  # fmt: skip
    ratio = bootstrap_ratio_interval(
        found.challenger, found.champion, seed=seed, num_resamples=_RESAMPLES * look, level=1 - 2 * error
    )
    z = NormalDist().inv_cdf(1 - error)
    spread = (ratio.high - ratio.low) / (2 * z)
    known = math.isfinite(spread) and spread > 0
    needed = None
    if known:
        wanted = margin / (z + NormalDist().inv_cdf(_POWER))
        needed = math.ceil(len(found.user) * (spread / wanted) ** 2)
    return Comparison(
        users=len(found.user),
        relative=ratio.value - 1,
        low=ratio.low - 1,
        high=ratio.high - 1,
        error=error,
        power=NormalDist().cdf(margin / spread - z) if known else float(spread == 0),
        users_needed=needed,
    )


def compare_together(nights: Sequence[Pairs], *, gate: GateConfig, seed: int) -> Comparison:
    """The users of this night, the last one of `nights`, and of the undecided ones before it; every time that they were
    enough for a decision was a look."""
    enough = (len(Pairs.joined(nights[:count]).user) >= gate.min_users for count in range(1, len(nights) + 1))
    return compare(Pairs.joined(nights), margin=gate.margin, seed=seed, look=max(1, sum(enough)))


def without_champion(guards: Sequence[Guard]) -> Decision:
    """The first model has nobody to meet."""
    failed = _failed(guards)
    return Decision(verdict="refused" if failed else "promoted", reasons=failed or ("there is no champion yet",))


def decide(
    tonight: Comparison,
    together: Comparison,
    guards: Sequence[Guard],
    *,
    reference: Comparison | None,
    gate: GateConfig,
) -> Decision:
    """`together`: this night's users with those of the undecided nights before; `reference`: the same against the
    champion of some time ago, where it was asked for."""
    failed = _failed(guards)
    if together.users < gate.min_users:
        # With so few users guards fail by chance.
        return Decision(verdict="undecided", reasons=(_too_few(together, "the champion", gate=gate), *failed))
    if failed:
        return Decision(verdict="refused", reasons=failed)
    against = [("the champion", together), *([("the reference", reference)] if reference else [])]
    if tonight.users >= gate.min_users and tonight.high < 0:
        against.insert(0, ("the champion tonight", tonight))
    judged = [_judged(found, name, gate=gate) for name, found in against]
    for verdict in ("refused", "undecided"):
        reasons = tuple(reason for each, reason in judged if each == verdict)
        if reasons:
            return Decision(verdict=verdict, reasons=reasons)
    return Decision(verdict="promoted", reasons=tuple(reason for _, reason in judged))


def _failed(guards: Sequence[Guard]) -> tuple[str, ...]:
    return tuple(f"{guard.name} is {guard.value:.4g}, it must be {guard.limit}" for guard in guards if not guard.holds)


def _too_few(found: Comparison, name: str, *, gate: GateConfig) -> str:
    return f"against {name}: {found.users:,} users, fewer than {gate.min_users:,} (gate.min_users)"


def _judged(found: Comparison, name: str, *, gate: GateConfig) -> tuple[Verdict, str]:
    if found.users < gate.min_users:
        return "undecided", _too_few(found, name, gate=gate)
    if math.isnan(found.low):
        return "undecided", f"against {name}: the difference cannot be told"
    bounds = f"{100 * (1 - found.error):.4g} % bounds {found.low:+.2%} and {found.high:+.2%}"
    said = f"against {name}: {found.relative:+.2%} ({bounds}, {found.users:,} users)"
    if found.low > -gate.margin:
        return "promoted", f"{said}: a loss of {gate.margin:.2%} is excluded"
    if found.high < 0:
        return "refused", f"{said}: worse"
    if found.high - found.low > gate.margin:
        needed = f", {found.users_needed:,} users would do" if found.users_needed else ""
        return "undecided", f"{said}: wider than the margin of {gate.margin:.2%}{needed}"
    return "refused", f"{said}: a loss of {gate.margin:.2%} is not excluded"


def _refuse_other_requests(
    left: RankedTargets | ScoredImpressions, right: RankedTargets | ScoredImpressions, columns: Sequence[str]
) -> None:
    for name in columns:
        if not np.array_equal(getattr(left, name), getattr(right, name)):
            raise ValueError(
                f"the two systems were evaluated on other requests (column {name}): evaluate them together"
            )
