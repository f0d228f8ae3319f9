"""Settings of a model that a recipe may leave open (null): data and task decide them once, when the run begins.

jobs/runs/run_dir.py settles them; a run's record, its checkpoints and registered models hold the settled values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

from jobs.host.errors import UserError
from models.tower_settings import SolarConfig
from models.zoo import MODELS

OPEN_SETTINGS: Mapping[str, str] = {
    "time_features": "Events include hour of day, weekday and gap to the previous event; recency includes the gap to "
    "the request. Unset = on where events have times, off where the log is only an order.",
    "set_attention": "Candidates of a request attend to each other. Unset = on for task impressions, off for "
    "next_item: there training sees a few sampled negatives and evaluation the whole catalogue (MovieLens-100K: no "
    "better, and 30 % slower).",
    "history_labels": "Events include the label that they had: whether what was shown was clicked, liked or skipped. "
    "Unset = on for task impressions, off for next_item and where the log has no labels.",
    "prior": "The score starts at what counting says of a candidate (models/prior.py), and what the model learns is "
    "added to it. Unset = on for task impressions under split temporal; off for next_item, where it pays on some logs "
    "only, for leave_one_out, where nothing says what was known when, and for loss catalogue.",
    "gradient": "Gradient of the decomposition. stop: its directions are constants, so that a step is cheaper and "
    "rounding is not amplified at once; no worse in any measurement (tests/benchmarks/RESULTS.md). stable: through the "
    "eigenvectors, damped where two are nearly equal. exact: without damping; an ablation. Unset = stop; runs of an "
    "earlier version, and what begins from them, go on with stable.",
}
"""{setting: what `--help` says of it}. The models have no open settings: in their configs these have a value."""

LATER: Mapping[str, bool | None] = {"history_labels": False, "prior": False, "initial_logit": None}
"""{a setting that runs of an earlier version lack: its value in such a run}."""


def open_settings_of(model: str) -> list[str]:
    """The settings of a model that a recipe may leave open."""
    fields = {field.name for field in dataclasses.fields(MODELS[model][0])}
    return [name for name in OPEN_SETTINGS if name in fields]


def model_section(model: str) -> type:
    """The class of the section `model`: the model's config with `name` as one more field, and settings that may be left
    open."""
    is_open = open_settings_of(model)
    fields = [("name", str, dataclasses.field(default=model))]
    types = get_type_hints(MODELS[model][0])
    fields += [(name, types[name] | None, dataclasses.field(default=None)) for name in is_open]
    told = {"name": f"One of {', '.join(MODELS)}."} | {name: OPEN_SETTINGS[name] for name in is_open}
    lines = "\n".join(f"    {name}: {text}" for name, text in told.items())
    doc = {"__doc__": f"The model and its own settings.\n\nArgs:\n{lines}"}
    return dataclasses.make_dataclass(
        "Model", fields, bases=(MODELS[model][0],), frozen=True, kw_only=True, namespace=doc
    )


def left_open(model: Mapping[str, Any]) -> list[str]:
    """The settings that a model's section leaves open."""
    return [name for name in open_settings_of(model["name"]) if model[name] is None]


def refuse_other_null(model: Any) -> None:
    """UserError if another switch of a model's section is null, which would be neither on nor off."""
    closed = {field.name for field in dataclasses.fields(MODELS[model.name][0]) if field.type == "bool"}
    for name in sorted(closed - set(OPEN_SETTINGS)):
        if getattr(model, name) is None:
            raise UserError(f"model.{name}=null: must be true or false")


def suited(
    name: str, *, task: str, split: str, has_time: bool, has_labels: bool, loss: str = "candidates"
) -> tuple[Any, str]:
    """(the value of an open setting, the reason), for a task, split and loss on a data set that has times or is
    only an order, and has labels or not."""
    if name == "time_features":
        return has_time, "events have times" if has_time else "the log has an order only, no times"
    if name == "gradient":
        return SolarConfig.gradient, "the model's default"
    if name == "prior":
        reasons = {"task": (task, "impressions"), "split": (split, "temporal"), "loss": (loss, "candidates")}
        against = [f"the {what} is {value}" for what, (value, wanted) in reasons.items() if value != wanted]
        return not against, against[0] if against else "what was shown has rates"
    shown = task == "impressions"
    if name == "history_labels":
        on = shown and has_labels
        return on, "events have labels" if on else f"the task is {task}" if has_labels else "the log has no labels"
    return shown, "candidates were shown together" if shown else "negatives are sampled"
