"""All models by name: the values of `model.name`, and the config and tower of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.din import Din, DinConfig
from models.gru4rec import Gru4Rec, Gru4RecConfig
from models.hstu import Hstu, HstuConfig
from models.interface import Recommender
from models.light_sans import LightSans, LightSansConfig
from models.light_sans_sequence import LightSansSequence, LightSansSequenceConfig
from models.linear_attention import LinearAttention, LinearAttentionConfig
from models.linrec import LinRec, LinRecConfig
from models.mean_pooling import MeanPooling, MeanPoolingConfig
from models.recgrela import RecGrela, RecGrelaConfig
from models.sasrec import SasRec, SasRecConfig
from models.solar import Solar, SolarConfig

MODELS: Mapping[str, tuple[type, type[Recommender]]] = {
    "solar": (SolarConfig, Solar),
    "din": (DinConfig, Din),
    "linear_attention": (LinearAttentionConfig, LinearAttention),
    "light_sans": (LightSansConfig, LightSans),
    "mean_pooling": (MeanPoolingConfig, MeanPooling),
    "recgrela": (RecGrelaConfig, RecGrela),
    "sasrec": (SasRecConfig, SasRec),
    "hstu": (HstuConfig, Hstu),
    "gru4rec": (Gru4RecConfig, Gru4Rec),
    "linrec": (LinRecConfig, LinRec),
    "light_sans_sequence": (LightSansSequenceConfig, LightSansSequence),
}
"""{`model.name`: (config class, tower class)}."""


def build_tower(settings: Mapping[str, Any], *, num_features: int) -> Recommender:
    """A tower with weights drawn from torch's current random state; `settings`: `name` and the config's fields."""
    config_class, tower_class = MODELS[settings["name"]]
    config = config_class(**{key: value for key, value in settings.items() if key != "name"})
    switches = [field.name for field in dataclasses.fields(config_class) if field.type == "bool"]
    assert all(getattr(config, name) is not None for name in switches), "a switch is left open: settle it first"
    return tower_class(config, num_features=num_features)
