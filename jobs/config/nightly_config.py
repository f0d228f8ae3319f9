"""NightlyConfig: which requests a night holds out, how much it trains, and what a challenger must show."""

from __future__ import annotations

import dataclasses

HOURS_A_DAY = 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateConfig:
    """The conditions for a promotion; challenger and champion are compared on the same requests."""

    margin: float = 0.01
    """Largest accepted relative loss of the primary metric, above 0 and below 1; 0.01 = one per cent. The one-sided
    95 % bound must exclude a larger loss, which needs about (2.5 s / margin)^2 users, where s is the relative spread of
    a user's difference: .001 needs a hundred times as many users as .01."""
    min_users: int = 200
    """With fewer users the night is undecided, 2 or more; consecutive undecided nights with the same champion are
    counted together."""
    max_logloss_rise: float = 0.02
    """Largest relative rise of LogLoss above the champion's; 0 or more."""
    max_calibration_error: float = 0.1
    """impressions: the distance of log(sum of probabilities / positives) from 0 may exceed the champion's distance by
    at most this much; 0 or more."""
    min_coverage: float = 0.7
    """Smallest catalogue coverage, as a share of the champion's; 0 or more."""
    max_latency: float = 1.5
    """Largest scoring time per request, as a multiple of the champion's on the same machine; 1 or more. Refused is only
    what alternating pairs of scorings show to take longer, with 95 % confidence."""
    floor: bool = True
    """Refuse a challenger whose primary metric is below that of the best baseline of the evaluation, by the
    95 % interval of the difference over users; also on a night without a champion."""
    event_range: tuple[float, float] = (0.4, 2.5)
    """Smallest and largest number of accepted events of the day, as multiples of the median of the days before: one
    number below 1 and one above."""
    max_rejected_rise: float = 0.005
    """The rejected share of the day's rows may exceed the median of the days before by at most this much; 0 or more."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "event_range", tuple(self.event_range))
        if not 0 < self.margin < 1:
            raise ValueError(f"margin={self.margin}: must be above 0 and below 1")
        if self.min_users < 2:
            raise ValueError(f"min_users={self.min_users}: must be 2 or more")
        for name in ("max_logloss_rise", "max_calibration_error", "max_rejected_rise", "min_coverage"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more")
        if not self.max_latency >= 1:
            raise ValueError(f"max_latency={self.max_latency}: must be 1 or more")
        low, high = self.event_range
        if not 0 <= low < 1 < high:
            raise ValueError(f"event_range={list(self.event_range)}: must be one number below 1 and one above")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NightlyConfig:
    """One night of retraining."""

    gate_hours: float = 6.0
    """Last hours of the day, above 0: the gate compares the models on their requests, on which neither has trained."""
    valid_hours: float = 2.0
    """Hours before the gate's, above 0: their requests choose the best of the night's checkpoints. The next night
    trains on both."""
    replay: float = 0.2
    """Approximate share, from 0 to below 1, of the night's training requests that are older than those on which the
    champion trained last."""
    epochs: int = 1
    """Passes over the night's requests, 1 or more, if training starts from the champion's weights; from scratch,
    training.epochs applies."""
    reference_every: int = 7
    """Every so many nights the challenger must also pass against the champion of `reference_days` ago; 0 = never."""
    reference_days: int = 30
    """Age of that champion in days, 1 or more: many small losses, each within the margin, must not add up."""
    states: bool = True
    """Build the users' states for the champion each night, so that serving does not need to read histories."""
    keep: int = 7
    """Number of nights, 1 or more, whose runs and data manifests are kept. Also kept is everything that an alias, the
    previous champion or one of the latest three versions needs."""
    gate: GateConfig = dataclasses.field(default_factory=GateConfig)
    """The conditions for a promotion."""

    def __post_init__(self) -> None:
        for name in ("gate_hours", "valid_hours"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")
        if self.gate_hours + self.valid_hours > HOURS_A_DAY:
            raise ValueError(
                f"gate_hours={self.gate_hours}: must leave room for valid_hours={self.valid_hours} in a day of 24"
            )
        if not 0 <= self.replay < 1:
            raise ValueError(f"replay={self.replay}: must be from 0 to below 1")
        for name, least in (("epochs", 1), ("reference_every", 0), ("reference_days", 1), ("keep", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be {least} or more")
