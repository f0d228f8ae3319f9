"""NightlyConfig: when a night's requests are held out, how much is trained, and what a challenger must show."""

from __future__ import annotations

import dataclasses

HOURS_A_DAY = 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateConfig:
    """What a challenger must show beside the champion, on the same requests."""

    margin: float = 0.01
    """Relative loss of the primary metric that the one-sided 95 % bound must exclude: 0.01 = one per cent. About
    (2.5 s / margin)^2 users are needed, s the relative spread of a user's difference: .001 takes a hundred times
    as many as .01."""
    min_users: int = 200
    """With fewer users nothing is decided; undecided nights in a row with the same champion are counted together."""
    max_logloss_rise: float = 0.02
    """Relative rise of LogLoss above the champion's."""
    max_calibration_error: float = 0.1
    """impressions: how far the log of (sum of probabilities / positives) may be further from 0 than the champion's."""
    min_coverage: float = 0.7
    """Share of the champion's catalogue coverage."""
    max_latency: float = 1.5
    """Scoring time of a request, times the champion's on this machine."""
    event_range: tuple[float, float] = (0.4, 2.5)
    """Accepted events of the day, times the median of the days before."""
    max_rejected_rise: float = 0.005
    """Rejected share of the day's rows above the median of the days before."""

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
    """Last hours of the day, whose requests no model has trained on when it is judged by them."""
    valid_hours: float = 2.0
    """Hours before those, which choose among the night's checkpoints; the next night trains on both."""
    replay: float = 0.2
    """Share of the night's training requests that are older than the champion's last ones, about."""
    epochs: int = 1
    """Passes over the night's requests from the champion's weights on; from the seed it is training.epochs."""
    reference_every: int = 7
    """Nights after which the challenger must also stand beside the champion of some time ago; 0 = never."""
    reference_days: int = 30
    """How long ago that was: many small losses, each within the margin, must not add up."""
    states: bool = True
    """Build the users' states for the champion each night, so that serving need not read histories."""
    keep: int = 7
    """Nights whose runs and states of the data are kept. Besides, what an alias, the champion before or one of the
    latest three versions needs."""
    gate: GateConfig = dataclasses.field(default_factory=GateConfig)
    """What decides."""

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
