"""The gate: may a challenger replace the champion? Pure numpy; both have scored the same requests.

    relative difference   d = sum_u challenger_u / sum_u champion_u - 1; the bootstrap resamples users u, with both sums
    promoted              the one-sided 95 % lower bound of d is above -margin, and every guard holds
    refused               a guard fails; or the lower bound is not above -margin, and d is below 0 at 95 % or the
                          interval is no wider than the margin
    undecided             too few users, or the interval is wider than the margin: the champion stays, and the night's
                          users count together with those of the next undecided nights against the same champion, with
                          bounds that become stricter at every look

The metric sums of a user are those of the evaluation (jobs/training/results.py): NDCG@10 has weight 1 per request, AUC
is per user and weighted by the number of the user's candidates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np

from jobs.config.nightly_config import GateConfig
from jobs.host.documents import stored_with
from jobs.training.results import RankedTargets, ScoredImpressions
from models.metrics import bootstrap_ratio_interval
from pipeline.batches.requests import RequestConfig

Verdict = Literal["promoted", "refused", "undecided"]
ERROR = 0.05
"""Error probability of a one-sided bound; divided by n at the n-th look at nights that count together. A model that is
worse by the margin then passes within 30 looks in 8.5 % of cases; with a 95 % bound at each look it would in 24 %."""
_RESAMPLES = 2000
_POWER = 0.8


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Users, and the metric sums of both systems for each user."""

    user: np.ndarray
    """[U] distinct user rows of the data set: the same user has the same row every night."""
    challenger: np.ndarray
    """[U] metric sum of each user."""
    champion: np.ndarray
    """[U] metric sum of each user."""

    @staticmethod
    def joined(nights: Sequence[Pairs]) -> Pairs:
        """The users of several nights, each user once, with its sums over the nights."""
        user, place = np.unique(np.concatenate([night.user for night in nights]), return_inverse=True)
        sums = [
            np.bincount(place, weights=np.concatenate([getattr(night, name) for night in nights]), minlength=len(user))
            for name in ("challenger", "champion")
        ]
        return Pairs(user=user, challenger=sums[0], champion=sums[1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The relative difference d with its bounds."""

    users: int
    relative: float
    """d; infinite if only the champion's sums are all 0, nan if both systems' are."""
    low: float
    """One-sided lower bound of d."""
    high: float
    """One-sided upper bound of d."""
    error: float = ERROR
    """Error probability of each of the two bounds: 0.05 = 95 % bounds."""
    power: float
    """Probability that a challenger as good as the champion passes, with this number of users."""
    users_needed: int | None
    """Users for a power of 80 %; None if the spread is not known."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guard:
    """Another condition for a promotion."""

    name: str
    value: float
    """The challenger's value, or the day's."""
    limit: str
    """What the value must be, in words."""
    holds: bool
    undecided: bool | None = stored_with("undecided")
    """True: the value was measured too coarsely to tell whether it is within the limit; the guard holds then."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """The gate's verdict, and why."""

    verdict: Verdict
    reasons: tuple[str, ...]
    """Each is a sentence; there is at least one."""


def pairs(
    challenger: RankedTargets | ScoredImpressions,
    champion: RankedTargets | ScoredImpressions,
    *,
    requests: RequestConfig,
) -> Pairs:
    """The users and metric sums of two evaluations of the same requests."""
    if isinstance(challenger, RankedTargets) and isinstance(champion, RankedTargets):
        _refuse_other_requests(challenger, champion, ("user", "request"))
        mask = np.ones(len(challenger.user), bool)
        if requests.seen_items == "removed":
            # A model cannot tell repeats of an item that it does not know. Leave out what is a repeat for either model,
            # so that both have the same targets.
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
    """The relative difference with its bounds, at look number `look`.

    2,000 bootstrap resamples of the users at the first look; n times as many at the n-th, whose bounds are stricter.
    """
    error = ERROR / look
    if not found.champion.any():
        relative = math.inf if found.challenger.any() else math.nan
        return Comparison(
            users=len(found.user), relative=relative, low=relative, high=relative, error=error, power=0.0,
            users_needed=None,
        )  # fmt: skip
    ratio = bootstrap_ratio_interval(
        found.challenger, found.champion, seed=seed, num_resamples=_RESAMPLES * look, level=1 - 2 * error
    )
    # Power and users needed: the spread shrinks with the square root of the number of users.
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
    """Compare over the users of this night, the last of `nights`, and of the undecided nights before it. Every night
    after which there were enough users for a decision counts as a look."""
    enough = (len(Pairs.joined(nights[:count]).user) >= gate.min_users for count in range(1, len(nights) + 1))
    return compare(Pairs.joined(nights), margin=gate.margin, seed=seed, look=max(1, sum(enough)))


def without_champion(guards: Sequence[Guard], *, primary: str, value: float) -> Decision:
    """The decision where there is no champion to compare with: only the guards count, and that the metric `primary`,
    the one that decides, has a `value`."""
    failed = _failed(guards)
    if math.isnan(value):
        failed = (f"{primary} is nan: no held-out request counts for it", *failed)
    if failed:
        return Decision(verdict="refused", reasons=failed)
    return Decision(verdict="promoted", reasons=("there is no champion yet", *_undecided(guards)))


def decide(
    tonight: Comparison,
    together: Comparison,
    guards: Sequence[Guard],
    *,
    reference: Comparison | None,
    gate: GateConfig,
) -> Decision:
    """Promote, refuse or leave undecided.

    `tonight` has this night's users; `together` also those of the undecided nights before; `reference` compares with an
    earlier champion, on the nights that do so.
    """
    failed = _failed(guards)
    if together.users < gate.min_users:
        # With so few users, guards fail by chance.
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
    return Decision(verdict="promoted", reasons=(*(reason for _, reason in judged), *_undecided(guards)))


def _failed(guards: Sequence[Guard]) -> tuple[str, ...]:
    return tuple(f"{guard.name} is {guard.value:.4g}, it must be {guard.limit}" for guard in guards if not guard.holds)


def _undecided(guards: Sequence[Guard]) -> tuple[str, ...]:
    unclear = (guard for guard in guards if guard.undecided)
    return tuple(f"{guard.name} is {guard.value:.4g}, undecided whether {guard.limit}" for guard in unclear)


def _too_few(found: Comparison, name: str, *, gate: GateConfig) -> str:
    return f"against {name}: {found.users:,} users, fewer than {gate.min_users:,} (gate.min_users)"


def _judged(found: Comparison, name: str, *, gate: GateConfig) -> tuple[Verdict, str]:
    if found.users < gate.min_users:
        return "undecided", _too_few(found, name, gate=gate)
    if math.isnan(found.low):
        return "undecided", f"against {name}: the difference cannot be computed"
    bounds = f"{100 * (1 - found.error):.4g} % bounds {found.low:+.2%} and {found.high:+.2%}"
    result = f"against {name}: {found.relative:+.2%} ({bounds}, {found.users:,} users)"
    if found.low > -gate.margin:
        return "promoted", f"{result}: a loss of {gate.margin:.2%} is excluded"
    if found.high < 0:
        return "refused", f"{result}: worse"
    if found.high - found.low > gate.margin:
        needed = f", {found.users_needed:,} users would suffice" if found.users_needed else ""
        return "undecided", f"{result}: the interval is wider than the margin of {gate.margin:.2%}{needed}"
    return "refused", f"{result}: a loss of {gate.margin:.2%} is not excluded"


def _refuse_other_requests(
    left: RankedTargets | ScoredImpressions, right: RankedTargets | ScoredImpressions, columns: Sequence[str]
) -> None:
    for name in columns:
        if not np.array_equal(getattr(left, name), getattr(right, name)):
            raise ValueError(
                f"the two systems were evaluated on different requests (column {name}): evaluate them together"
            )
