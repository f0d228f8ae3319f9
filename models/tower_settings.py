"""The settings of the models that give each candidate a score of its own. Without torch: a command line reads and
checks them before any model is imported."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

GRADIENT_EPS = 1e-6
"""Damping of the eigenvector gradient, relative to the pair of eigenvalues. Cosine to the exact gradient: 1.000, 0.998,
0.946 at rank 8, 16, 32; finite for every input. With damping relative to the largest eigenvalue the cosine is 0.62."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """Fields of every attention tower. Every part can be switched off."""

    width: int = 64
    """D, width of the model and of the embedding tables."""
    feature_width: int | dict[str, int] | None = None
    """Width of the tables of item and user features, a multiple of 4 up to `width`: one number for all, or {feature:
    width} with `width` for the other features; null = `width`. Narrower rows are padded with zeros."""
    num_heads: int = 2
    """Number of heads of every attention; divides `width`."""
    recent_window: int = 50
    """W, number of latest events with exact attention; 0 switches it off."""
    head_width: int = 32
    """Hidden units of the head's network; 0 leaves only the inner product."""
    initial_agreement: float = 1.0
    """Weight, before training, of the similarity of a candidate to what it found. 1 suits next_item, where similar
    items are likely next. Where candidates were shown, similarity does not mean a positive label: use 0.125
    (MovieLens-100K, impressions, 3 seeds: validation LogLoss .636 +- .006 instead of .678 +- .007, GAUC .676 +- .002
    instead of .660 +- .017)."""
    dropout: float = 0.1
    """Probability that a unit of an event vector is zeroed in training."""
    num_actions: int = 1
    """Action codes are below this; 1 = the log has no actions."""
    time_features: bool = True
    """Events include hour of day, weekday and gap to the previous event; recency includes the gap to the request."""
    user_features: bool = True
    """Features of the request's user shift the query and the state of every candidate (with them, the measurement under
    context_features is AUC .7067, LogLoss .6316)."""
    num_user_features: int = 0
    """G, number of user features of the data; 0 = none."""
    context_features: bool = False
    """Hour of day and weekday of the request shift them too, if time_features is on. Off by default: neither better nor
    worse on MovieLens-100K (impressions, 3 epochs, 3 seeds: validation AUC .6994 against .6987, LogLoss .6351 against
    .6357)."""
    prior: bool = False
    """The score starts at what counting says (models/prior.py), and what the model learns is added to it."""
    repeats: bool = False
    """The score includes how often and how recently the candidate itself occurs in the history: for data where people
    come back to items."""
    absolute_time: bool = False
    """Events and requests include waves of absolute time, if time_features is on: attention to the whole history can
    then depend on age, and a candidate's score can follow the season."""
    history_labels: bool = False
    """Events include the label that they had: whether what was shown was clicked, liked or skipped."""

    @property
    def reads_context(self) -> bool:
        """Whether hour and weekday of the request are read."""
        return self.context_features and self.time_features

    @property
    def reads_waves(self) -> bool:
        """Whether absolute time is read."""
        return self.absolute_time and self.time_features

    @property
    def reads_request(self) -> bool:
        """Whether any request feature is read."""
        return bool(self.user_features and self.num_user_features) or self.reads_context or self.reads_waves

    @property
    def latest(self) -> int | None:
        """Number of latest events of a history that the tower reads; None = all events."""
        return None

    def __post_init__(self) -> None:
        for name in ("width", "num_heads", "num_actions"):
            self._refuse_below(name, 1)
        refuse_feature_width(self.feature_width, width=self.width)
        for name in ("recent_window", "head_width", "num_user_features"):
            self._refuse_below(name, 0)
        if self.width % self.num_heads:
            raise ValueError(f"width = {self.width} must be a multiple of num_heads = {self.num_heads}; change one")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout} must be at least 0 and below 1")
        if not 0 <= self.initial_agreement < math.inf:
            raise ValueError(f"initial_agreement = {self.initial_agreement} must be a number of at least 0")

    def _refuse_below(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            rule = "must not be negative; 0 switches it off" if least == 0 else f"must be at least {least}"
            raise ValueError(f"{name} = {getattr(self, name)} {rule}")


Form = Literal["softmax", "bilinear", "gaussian"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decomposition:
    """How interests are computed from a Gram."""

    rank: int
    """R, at least 1 and at most D."""
    gradient: Literal["stable", "exact", "stop"] = "stable"
    """stable: damped by `gradient_eps`; exact: explodes where two eigenvalues are nearly equal; stop: U is treated as a
    constant, which is another estimator (P = U^T X with a gradient only to X)."""
    gradient_eps: float = GRADIENT_EPS
    """Damping of the stable gradient."""
    canonical_sign: bool = True
    """Interests point along the sum of the events; off (signs as LAPACK returns them) is an ablation."""
    divide_by_events: bool = True
    """Interests are divided by sqrt(N), so that attention does not sharpen as a history grows; off is an ablation."""
    with_mean: bool = False
    """The mean of the events is computed beside the interests, with its gradient."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank = {self.rank} must be at least 1")
        if self.gradient not in ("stable", "exact", "stop"):
            raise ValueError(f"gradient = {self.gradient!r} must be stable, exact or stop")
        if not 0 < self.gradient_eps < 1:
            raise ValueError(f"gradient_eps = {self.gradient_eps} must be above 0 and below 1; 1e-6 was measured best")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolarConfig(TowerConfig):
    """Sizes and parts of SOLAR. Every part can be switched off."""

    num_layers: int = 1
    """Number of blocks, 1 or 2. All blocks read the same decomposition."""
    interests: bool = True
    """Attend to the principal components of the history before the request's checkpoint."""
    rank: int = 16
    """R, number of interests of a history; at most `width`."""
    checkpoint_every: int = 16
    """Events between two decompositions of a user's growing history."""
    half_life: float = 0.0
    """Age in events at which an event's weight in the interests is one half; 0 = all events weigh the same."""
    gradient: Literal["stable", "exact", "stop"] = "stop"
    """Gradient of the decomposition: as in Decomposition."""
    canonical_sign: bool = True
    """Interests point along the sum of their events; off is an ablation."""
    divide_by_events: bool = True
    """Interests are divided by the square root of the history's length; off is an ablation."""
    form: Form = "softmax"
    """How candidates read the interests: softmax over them, as published; bilinear, without the softmax; gaussian,
    softmax attention over all events as if their keys were normally distributed. The signs of the interests matter to
    softmax alone."""
    set_attention: bool = True
    """Candidates of a request attend to each other. Switch it off where negatives are sampled: training then sees sets
    of 17 and evaluation the whole catalogue (MovieLens-100K, next item: no better, and 30 % slower)."""
    set_attention_exact_up_to: int = 2048
    """Largest set for exact set attention; in larger sets candidates attend to the set's principal components."""
    ffn_multiple: int = 0
    """Hidden width of a block's feed-forward network, as a multiple of `width`; 0 switches it off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "checkpoint_every"):
            self._refuse_below(name, 1)
        for name in ("set_attention_exact_up_to", "ffn_multiple"):
            self._refuse_below(name, 0)
        if self.rank > self.width:
            raise ValueError(f"rank = {self.rank} must not exceed width = {self.width}; lower rank or raise width")
        if self.num_layers not in (1, 2):
            raise ValueError(f"num_layers = {self.num_layers} must be 1 or 2")
        if not 0 <= self.half_life < math.inf:
            raise ValueError(f"half_life = {self.half_life} must be a number of events, or 0 for no decay")
        if self.interests and 0 < self.recent_window < self.checkpoint_every:
            raise ValueError(
                f"recent_window = {self.recent_window} must be at least checkpoint_every = {self.checkpoint_every}, or "
                "some events after a checkpoint would be in neither; raise recent_window or lower checkpoint_every"
            )
        if not self.interests and self.recent_window == 0:
            raise ValueError("interests = false and recent_window = 0 leave no history; switch one of them on")
        if self.form not in get_args(Form):
            raise ValueError(f"form = {self.form!r} must be one of {', '.join(get_args(Form))}")
        if self.form == "gaussian" and not self.divide_by_events:
            raise ValueError("form = 'gaussian' reads a covariance: switch divide_by_events on")
        self.decomposition  # noqa: B018 (raises ValueError for invalid settings)

    @property
    def decomposition(self) -> Decomposition:
        """The settings of the decomposition."""
        return Decomposition(
            rank=self.rank,
            gradient=self.gradient or SolarConfig.gradient,  # None where a recipe leaves it open
            canonical_sign=self.canonical_sign,
            divide_by_events=self.divide_by_events,
            with_mean=self.form == "gaussian",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DinConfig(TowerConfig):
    """Sizes and parts of target attention."""

    whole_history: bool = True
    """Attend to every event; if off, only the latest `recent_window` events are read, also by `repeats`."""
    decay: bool = True
    """The whole history's weights decay with age at a learned rate."""

    @property
    def latest(self) -> int | None:
        return None if self.whole_history else self.recent_window

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.whole_history and self.recent_window == 0:
            raise ValueError("whole_history = false and recent_window = 0 leave no history; switch one of them on")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig(TowerConfig):
    """Sizes and parts of linear attention."""

    form: Literal["linear", "linrec"] = "linear"
    """How queries and keys are mapped and normalised."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("linear", "linrec"):
            raise ValueError(f"form = {self.form!r} must be linear or linrec")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LightSansConfig(TowerConfig):
    """Sizes and parts of learned pooling."""

    rank: int = 16
    """R, number of interests of a history."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_below("rank", 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanPoolingConfig:
    """Size of the baseline."""

    width: int = 64
    """C, width of the embedding tables and of the pooled vector."""
    feature_width: int | dict[str, int] | None = None
    """Width of the tables of item features, as in attention towers (models/attention_tower.py)."""
    dropout: float = 0.1
    """Probability that a unit of the pooled vector is zeroed in training."""
    prior: bool = False
    """The score starts at what counting says (models/prior.py), and what the model learns is added to it."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width = {self.width} must be at least 1")
        refuse_feature_width(self.feature_width, width=self.width)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout} must be at least 0 and below 1")


def refuse_feature_width(feature_width: int | dict[str, int] | None, *, width: int) -> None:
    """ValueError for a feature width above `width`, or one for which fbgemm has no tables."""
    of_feature = feature_width if isinstance(feature_width, dict) else {"": feature_width}
    for name, value in of_feature.items():
        if value is not None and (not 4 <= value <= width or value % 4):
            where = f" of {name}" if name else ""
            raise ValueError(
                f"feature_width = {feature_width}: the width{where} must be a multiple of 4, from 4 to width = {width}"
            )
