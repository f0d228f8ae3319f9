"""All models by name: the values of `model.name`, and the settings and tower of each. A tower, and torch, are imported
when a model is built."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from models.sequence_settings import (
    Gru4RecConfig,
    HstuConfig,
    LightSansSequenceConfig,
    LinRecConfig,
    RecGrelaConfig,
    SasRecConfig,
)
from models.tower_settings import (
    DinConfig,
    LightSansConfig,
    LinearAttentionConfig,
    MeanPoolingConfig,
    SolarConfig,
)

if TYPE_CHECKING:
    from models.interface import Recommender

MODELS: Mapping[str, tuple[type, str]] = {
    "solar": (SolarConfig, "Solar"),
    "din": (DinConfig, "Din"),
    "linear_attention": (LinearAttentionConfig, "LinearAttention"),
    "light_sans": (LightSansConfig, "LightSans"),
    "mean_pooling": (MeanPoolingConfig, "MeanPooling"),
    "recgrela": (RecGrelaConfig, "RecGrela"),
    "sasrec": (SasRecConfig, "SasRec"),
    "hstu": (HstuConfig, "Hstu"),
    "gru4rec": (Gru4RecConfig, "Gru4Rec"),
    "linrec": (LinRecConfig, "LinRec"),
    "light_sans_sequence": (LightSansSequenceConfig, "LightSansSequence"),
}
"""{`model.name`, which is also its file in models/: (config class, name of the tower's class)}."""


def tower_class(name: str) -> type[Recommender]:
    """The tower of a model; imports its file."""
    return getattr(importlib.import_module(f"models.{name}"), MODELS[name][1])


def current_settings(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a model, which an earlier version may have stored, in today's names: `softmax` of SOLAR is
    `form`."""
    if "softmax" not in settings:
        return settings
    kept = {key: value for key, value in settings.items() if key != "softmax"}
    return kept | {"form": "softmax" if settings["softmax"] else "bilinear"}


def build_tower(settings: Mapping[str, Any], *, num_features: int) -> Recommender:
    """A tower with weights drawn from torch's current random state; `settings`: `name` and the config's fields."""
    config_class = MODELS[settings["name"]][0]
    values = {key: value for key, value in current_settings(settings).items() if key != "name"}
    config: Any = config_class(**values)
    switches = [field.name for field in dataclasses.fields(config_class) if field.type == "bool"]
    assert all(getattr(config, name) is not None for name in switches), "a switch is left open: settle it first"
    tower: Any = tower_class(settings["name"])
    return tower(config, num_features=num_features)
