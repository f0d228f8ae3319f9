"""The settings of the sequence models. Without torch: a command line reads and checks them before any model is
imported."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """Fields of every sequence model."""

    width: int = 64
    """D, width of the model, of the embedding tables and of a request's vector."""
    num_layers: int = 2
    """Number of layers; each reads the whole window."""
    dropout: float = 0.1
    """Probability that a unit is zeroed in training, wherever the model has a dropout."""
    max_length: int = 200
    """L, the number of latest events of a history that are read."""
    item_features: bool = False
    """Add the vectors of an item's features to its row. Off, as published: an item is only its row."""
    shift_windows: bool = False
    """In training the windows of a history longer than max_length end at a random place, drawn again each time, so that
    no event is always at the start of a window. (The published forms have no windows shared by requests.)"""
    prior: bool = False
    """The score starts at what counting says (models/prior.py), and what the model learns is added to it."""
    repeats: bool = False
    """Add a learned number to the logits of the items in the complete history. It excludes seen items where nobody
    comes back to them, so that a state need not remember every item, and it raises them where people come back."""
    initial_logit: float | None = None
    """Add a learned number to all logits, which begins here; null = none, as published. A loss that compares logits
    with 0, as gBCE does, otherwise lowers all of them through the rows of the items, which the events are made of. Set
    it to about the log odds of a candidate being the positive: -5.5 with 256 negatives."""

    def __post_init__(self) -> None:
        for name in ("width", "num_layers", "max_length"):
            self._refuse_below(name, 1)
        self._refuse_no_share("dropout")
        if self.initial_logit is not None and not math.isfinite(self.initial_logit):
            raise ValueError(f"initial_logit = {self.initial_logit} must be a number, or null for none")

    def _refuse_below(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise ValueError(f"{name} = {getattr(self, name)} must be at least {least}; raise it")

    def _refuse_no_share(self, name: str) -> None:
        if not 0 <= getattr(self, name) < 1:
            raise ValueError(f"{name} = {getattr(self, name)} must be at least 0 and below 1; 0 switches it off")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfAttentionConfig(SequenceConfig):
    """Fields of every sequence model with attention."""

    num_heads: int = 2
    """H, number of heads of every attention; divides `width`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_below("num_heads", 1)
        if self.width % self.num_heads:
            raise ValueError(f"width = {self.width} must be a multiple of num_heads = {self.num_heads}; change one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoFormConfig(SelfAttentionConfig):
    """Fields of every sequence model whose published attention reads all positions of a window."""

    form: Literal["published", "causal"] = "causal"
    """published: every prefix is a separate sample; causal: all prefixes of a window are computed in one pass."""

    @property
    def causal(self) -> bool:
        """Whether a state depends only on the events up to its own."""
        return self.form == "causal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("published", "causal"):
            raise ValueError(
                f"form = {self.form!r} must be published (one sample per prefix) or causal (all prefixes in one pass)"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecGrelaConfig(TwoFormConfig):
    """Sizes and parts of RecGRELA; the defaults are the published ones except for the form."""

    num_heads: int = 4
    """H, number of heads of the attention; divides `width`."""
    num_layers: int = 4
    """Number of layers; each reads the whole window."""
    drop_path: float = 0.1
    """Probability that a layer's attention is skipped for a window in training."""
    rank_augmentation: bool = True
    """Add the convolution of the values to the output of the attention."""
    rank_selector: bool = True
    """Multiply this sum by a gate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_no_share("drop_path")
        if self.width % 2:
            raise ValueError(f"width = {self.width} must be even: rotary positions rotate pairs of units; change it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SasRecConfig(SelfAttentionConfig):
    """Size of SASRec."""

    num_heads: int = 1
    """H, number of heads of every attention; divides `width`."""
    dropout: float = 0.2
    """Probability that a unit is zeroed in training, in event vectors, attention weights and feed-forward network."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HstuConfig(SelfAttentionConfig):
    """Sizes and parts of HSTU."""

    dropout: float = 0.2
    """Probability that a unit is zeroed in training, in event vectors and in the output of a layer."""
    time_bias: bool = True
    """Attention depends on how long ago an event was, not only on how many events ago."""
    absolute_positions: bool = True
    """Add to each event a learned vector for its position from the window's start."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gru4RecConfig(SequenceConfig):
    """Size of GRU4Rec."""

    num_layers: int = 1
    """Number of stacked recurrent layers."""
    hidden_width: int = 128
    """Units of the recurrent state."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_below("hidden_width", 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinRecConfig(TwoFormConfig):
    """Size and form of LinRec."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LightSansSequenceConfig(TwoFormConfig):
    """Sizes and form of LightSANs."""

    num_interests: int = 5
    """R, number of interests into which a history is pooled, for keys and for values."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_below("num_interests", 1)
