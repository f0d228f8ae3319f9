"""Builds a RunConfig from a recipe, further YAML files and dotted overrides, in that order.

    solar train movielens-100k --config mine.yaml --model.rank 16

A mistake is a UserError: one line with the origin (file or command line), the key, the value and the fix.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from jobs.config.mistakes import REFUSALS, empty_setting, explain, section_without_keys, shortened
from jobs.config.open_settings import model_section, refuse_other_null
from jobs.config.run_config import SECTIONS, RunConfig, stored_requests
from jobs.host.console import one_line
from jobs.host.errors import UserError
from jobs.host.places import NAME, Place, new_parser
from jobs.host.yaml_text import parse_yaml
from jobs.recipes import RECIPES, board_names, recipe_names
from jobs.training.job import TrainingConfig
from models.sequence_settings import SequenceConfig
from models.zoo import MODELS, current_settings
from pipeline.batches.requests import RequestConfig

_NAMELESS = "recipe"
"""The name of a file that says nothing about its run: recipe.yaml."""


def recipe_path(recipe: str) -> Path:
    """The file of a recipe: a name from `recipe_names()` or a path that ends in .yaml."""
    if recipe.endswith((".yaml", ".yml")):
        if not Path(recipe).is_file():
            raise UserError(f"{recipe}: no such file: give a recipe ({', '.join(recipe_names())}) or a YAML file")
        return Path(recipe)
    if recipe not in recipe_names():
        raise UserError(f"unknown recipe {recipe!r}: one of {', '.join(recipe_names())}, or the path of a YAML file")
    return RECIPES / f"{recipe}.yaml"


def config_parser(command: str, *, model: str) -> ArgumentParser:
    """The parser of every command that takes a recipe; `model` decides the fields of `--model.*`."""
    parser = new_parser(command)
    parser.add_argument("--config", action="config", help="a further YAML file; may be given several times")
    parser.add_argument(
        "--name",
        type=str | None,
        default=None,
        help="name of the run: letters, digits, '.', '_', '-'; default: recipe, or of a recipe.yaml its data.name",
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of weights, order, negatives and dropout, from 0 to 2147483647"
    )
    parser.add_argument("--workspace", type=Place, default="workspace", help="directory for all output; not a URI")
    parser.add_argument(
        "--compare", type=tuple[str, ...], default=(), help="other models that `solar run` trains for comparison"
    )
    parser.add_class_arguments(model_section(model), "model")
    for section, section_class in SECTIONS.items():
        parser.add_class_arguments(section_class, section)
    return parser


def load_config(command: str, recipe: str, arguments: Sequence[str]) -> RunConfig:
    """The resolved config of `solar COMMAND RECIPE ARGUMENTS`."""
    path = recipe_path(recipe)
    default_name = None if path.stem == _NAMELESS else path.stem
    return _resolve(command, _read_yaml(path), str(path), arguments, recipe=recipe, default_name=default_name)


def stored_config(command: str, stored: Mapping[str, Any], origin: str, arguments: Sequence[str]) -> RunConfig:
    """A config that `as_dict` stored (with a checkpoint or in the registry), overridden by further arguments."""
    values = {key: value for key, value in stored.items() if key != "recipe"}
    values["data"] = {**stored["data"], "requests": stored_requests(stored)}
    values["model"] = current_settings(stored["model"])
    return _resolve(command, values, origin, arguments, recipe=stored["recipe"], default_name=stored["name"])


def load_board(board: str, arguments: Sequence[str], *, only: Sequence[str] = ()) -> tuple[str, dict[str, RunConfig]]:
    """(name of the board, {row: its run}) of `solar leaderboard BOARD ARGUMENTS`; `only`: the rows to take, () = all.

    The arguments apply to every row taken.
    """
    path = Path(board) if board.endswith((".yaml", ".yml")) else RECIPES / "leaderboards" / f"{board}.yaml"
    if not path.is_file():
        raise UserError(f"unknown leaderboard {board!r}: one of {', '.join(board_names())}, or the path of a YAML file")
    values = _read_yaml(path)
    rows = values.pop("models", None)
    if rows in board_names():
        # `models` names another board: take its rows, for the data of this one.
        rows = _read_yaml(RECIPES / "leaderboards" / f"{rows}.yaml")["models"]
    if not isinstance(rows, dict) or not rows or not all(isinstance(row, dict) for row in rows.values()):
        raise UserError(
            f"{path}: models must hold sections `ROW NAME: settings of the row`, or the name of a board with such "
            f"sections ({', '.join(board_names())}), holds {shortened(rows)}"
        )
    if unknown := [row for row in only if row not in rows]:
        raise UserError(f"leaderboard: --only {unknown[0]!r}: must be one of {', '.join(map(str, rows))}")
    found, names = {}, {}
    for row, added in rows.items():
        origin = f"{path}: models.{row}"
        name = f"{path.stem}-{re.sub(r'[^a-z0-9]+', '-', str(row).lower()).strip('-')}"
        if name in names:
            raise UserError(f"{origin}: its runs would have the names of those of {names[name]}; rename the row")
        names[name] = row
        if row in only or not only:
            found[str(row)] = _resolve(
                "leaderboard", _merged(values, added), origin, arguments, recipe=board, default_name=name
            )
    return path.stem, found


def _merged(base: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    """`base`, overridden by `added` key by key, also inside sections."""
    merged = dict(base)
    for key, value in added.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _resolve(
    command: str, first: dict[str, Any], origin: str, arguments: Sequence[str], *, recipe: str, default_name: str | None
) -> RunConfig:
    """`default_name`: the run's name if the settings name none; None = the name of its data."""
    # Read the files and find the model, which determines the fields of `--model.*`.
    files = [(file, _read_yaml(Path(file))) for file in _config_files(arguments)]
    model = _model_name([(origin, first), *files], arguments)
    if not isinstance(model, str) or model not in MODELS:
        raise UserError(f"model.name={shortened(repr(model))}: must be one of {', '.join(MODELS)}")
    parser = _reading_parser(command, model=model)
    suffix = ""
    if (written_for := _model_name([(origin, first)], [])) != model and written_for in MODELS:
        first, suffix = _for_model(first, model, written_for=written_for), f"-{model}"
    # Parse each file alone, so that an error names its file; then all together with the command line.
    layers = [(origin, first), *files]
    read = []
    for layer, values in layers:
        if told := section_without_keys(values, parser):
            raise UserError(f"{layer}: {told}")
        try:
            read.append(parser.parse_object(values))
        except REFUSALS as error:
            raise UserError(f"{layer}: {explain(error, parser)}") from error
        if told := empty_setting(read[-1], parser):
            raise UserError(f"{layer}: {told}")
    try:
        parsed = parser.parse_args(list(arguments), namespace=read[0])
    except REFUSALS as error:
        raise UserError(f"command line: {explain(error, parser)}") from error
    if told := empty_setting(parsed, parser):
        raise UserError(f"command line: {told}")

    # Build the sections, whose own rules are checked then; rules across sections follow.
    try:
        built = parser.instantiate(parsed)
    except ValueError as error:
        raise UserError(_locate(error, parser, layers, arguments)) from error
    refuse_other_null(built.model)
    _check_run(parsed, model)
    _check_log_q(built.training, built.data.requests)
    _check_loss(built.training, built.data.requests, models=(model, *parsed.compare))
    _check_level(built.training, getattr(built.model, "initial_logit", None))
    return RunConfig(
        recipe=recipe,
        name=parsed.name or (default_name or _name_by_data(parsed)) + suffix,
        seed=parsed.seed,
        workspace=str(parsed.workspace),
        compare=tuple(parsed.compare),
        model=dataclasses.asdict(built.model),
        **{section: built[section] for section in SECTIONS},
    )


@functools.cache
def _reading_parser(command: str, *, model: str) -> ArgumentParser:
    """`config_parser`, made once: a board has many rows of a model. Parsing adds the options of shells' completion."""
    return config_parser(command, model=model)


def _name_by_data(parsed: Any) -> str:
    """The name of a run whose recipe is called recipe.yaml: its data's, or `recipe` where the workspace has runs or
    nights of that name, which go on."""
    taken = any((Path(parsed.workspace) / room / _NAMELESS).exists() for room in ("runs", "nightly"))
    return _NAMELESS if taken else parsed.data.name


def _check_run(parsed: Any, model: str) -> None:
    """Check the fields outside of sections."""
    others = [name for name in MODELS if name != model]
    if set(parsed.compare) - set(others) or len(set(parsed.compare)) < len(parsed.compare):
        raise UserError(f"compare={list(parsed.compare)}: must be different models other than {model}, of {others}")
    if not 0 <= parsed.seed < 1 << 31:
        raise UserError(f"seed={parsed.seed}: must be from 0 to 2147483647")
    if "://" in parsed.workspace:
        raise UserError(f"workspace={parsed.workspace}: must be a local or shared directory, not a URI")
    if parsed.name is not None and not NAME.fullmatch(parsed.name):
        raise UserError(f"name={parsed.name!r}: must be letters, digits, '.', '_' and '-'")


def _check_log_q(training: TrainingConfig, requests: RequestConfig) -> None:
    """Check the rules of training.log_q: it needs drawn negatives, and history_negatives need it."""
    if requests.history_negatives and not training.log_q:
        raise UserError(
            f"data.requests.history_negatives={requests.history_negatives}: set training.log_q=true, otherwise the "
            "model learns to avoid items of the history"
        )
    if training.log_q and (requests.task != "next_item" or not requests.num_negatives):
        reason = f"task {requests.task}" if requests.task != "next_item" else "data.requests.num_negatives=0"
        raise UserError(f"training.log_q=true: must be false, {reason} draws no negatives to correct for")


def _check_loss(training: TrainingConfig, requests: RequestConfig, *, models: Sequence[str]) -> None:
    """Check the rules of training.loss=catalogue: models whose requests are vectors, next_item, no drawn negatives."""
    if training.loss != "catalogue":
        return
    by_vectors = [name for name, (config, _) in MODELS.items() if issubclass(config, SequenceConfig)]
    if others := [name for name in models if name not in by_vectors]:
        raise UserError(
            f"training.loss=catalogue: model {others[0]} does not represent requests as vectors; train "
            f"{' or '.join(by_vectors)}, or set it to candidates"
        )
    if requests.task != "next_item":
        raise UserError(f"training.loss=catalogue: task {requests.task} ranks its own candidates; set it to candidates")
    if requests.num_negatives or requests.history_negatives:
        raise UserError(
            f"data.requests.num_negatives={requests.num_negatives}: must be 0 (history_negatives too) with "
            "training.loss=catalogue, where every item is a negative"
        )


def _check_level(training: TrainingConfig, initial_logit: float | None) -> None:
    """Check that the loss can learn a number that all logits share."""
    invariant = training.loss == "catalogue" or training.pointwise_loss_weight == 0
    if initial_logit is not None and invariant:
        key = "training.loss=catalogue" if training.loss == "catalogue" else "training.pointwise_loss_weight=0"
        raise UserError(
            f"model.initial_logit={initial_logit}: {key} is the same for any number that all logits share: set "
            "--model.initial_logit null"
        )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = parse_yaml(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: give a readable YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold `key: value` sections, holds {type(values).__name__}")
    for section in ("model", *SECTIONS):
        if not isinstance(values.get(section, {}), dict):
            raise UserError(f"{path}: {section} must hold `key: value` lines, holds {shortened(values[section])}")
    return values


def _config_files(arguments: Sequence[str]) -> list[str]:
    return values_of("--config", arguments)


def _model_name(layers: Sequence[tuple[str, dict[str, Any]]], arguments: Sequence[str]) -> str:
    named = [(values.get("model") or {}).get("name") for _, values in layers]
    named += values_of("--model.name", arguments)
    return next((name for name in reversed(named) if name), "solar")


def _for_model(values: Mapping[str, Any], model: str, *, written_for: str) -> dict[str, Any]:
    """A recipe that was written for another model, without the settings that only that model has, or that have other
    values there (`form`)."""
    ours, theirs = (
        {(field.name, str(field.type)) for field in dataclasses.fields(MODELS[name][0])}
        for name in (model, written_for)
    )
    others = {name for name, _ in theirs - ours}
    section = {key: value for key, value in (values.get("model") or {}).items() if key not in others}
    return {**values, "model": {**section, "name": model}}


def values_of(option: str, arguments: Sequence[str]) -> list[str]:
    """The values of `--option VALUE` and `--option=VALUE`, in order."""
    values = []
    for index, argument in enumerate(arguments):
        if argument == option and index + 1 < len(arguments):
            values.append(arguments[index + 1])
        elif argument.startswith(f"{option}="):
            values.append(argument.split("=", 1)[1])
    return values


def _locate(error: ValueError, parser: ArgumentParser, layers: Any, arguments: Sequence[str]) -> str:
    """Put the origin and the section's name before a section's message `field=value: rule`."""
    text = one_line(error)
    named = re.match(r"[\w.]+", text)
    field = named[0].split(".")[-1] if named else ""
    known = [action.dest for action in parser._actions]
    keys = [key for key in known if named and f".{key}".endswith(f".{named[0]}")]
    keys = keys or [key for key in known if key.split(".")[-1] == field]
    if named:
        text = text.removeprefix(named[0].removesuffix(field))
    for key in keys:
        if any(argument.split("=")[0] == f"--{key}" for argument in arguments):
            return f"command line: {key.rsplit('.', 1)[0]}.{text}"
    for origin, values in reversed(layers):
        for key in keys:
            node: Any = values
            for part in key.split("."):
                node = node.get(part) if isinstance(node, dict) else None
            if node is not None:
                return f"{origin}: {key.rsplit('.', 1)[0]}.{text}"
    return text
