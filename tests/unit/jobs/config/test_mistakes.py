"""A value that a field cannot hold is one plain line: the key, the value, what is allowed."""

from __future__ import annotations

import sys

import pytest
from jsonargparse import ArgumentError

from jobs.commands.arguments import parse
from jobs.commands.data import import_parsers
from jobs.config.mistakes import explain
from jobs.config.reader import config_parser, load_board, load_config
from jobs.host.errors import UserError


@pytest.fixture(scope="module")
def parser():
    return config_parser("train", model="solar")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"seed": "x"}, "seed=x: must be a whole number"),
        ({"seed": [1]}, "seed=[1]: must be a whole number"),
        ({"seed": ""}, "seed=: must be a whole number"),
        ({"seed": "9" * 200 + "x"}, f"seed={'9' * 80}...: must be a whole number"),
        ({"source": {"files": {"max_rejected_ratio": "nan"}}}, "source.files.max_rejected_ratio=nan: must be a number"),
        ({"data": {"requests": {"min_label": "nan"}}}, "data.requests.min_label=nan: must be a whole number or null"),
        ({"training": {"log_q": "maybe"}}, "training.log_q=maybe: must be true or false"),
        ({"model": {"time_features": 5}}, "model.time_features=5: must be true or false or null"),
        ({"data": {"name": 7}}, "data.name=7: must be text: write it in quotes"),
        ({"data": {"name": False}}, "data.name=False: must be text: write it in quotes"),
        ({"data": {"name": ["x"]}}, "data.name=['x']: must be text"),
        ({"workspace": 5}, "workspace=5: must be a path or URI"),
        ({"source": {"path": [5]}}, "source.path=[5]: must be a list of paths or a path or URI or null"),
        (
            {"data": {"requests": {"task": "impresions"}}},
            "data.requests.task=impresions: must be next_item or impressions: did you mean impressions?",
        ),
        ({"data": {"requests": {"task": "z"}}}, "data.requests.task=z: must be next_item or impressions"),
        ({"compare": "mean_pooling"}, "compare=mean_pooling: must be a list of texts: write [mean_pooling]"),
        ({"compare": 5}, "compare=5: must be a list of texts"),
        ({"datta": {"name": "x"}}, "unknown key datta.name: did you mean data.name?"),
        ({"x": 3}, "unknown key x: see --print_config for the keys"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas=[0.9]: must be a list of 2 numbers"),
        (
            {"parallel": {"num_workers": "two"}},
            "parallel.num_workers=two: must be a whole number or a list of whole numbers",
        ),
        (
            {"model": {"feature_width": "x"}},
            "model.feature_width=x: must be a whole number or `key: value` lines or null",
        ),
        (
            {"data": {"prepare": {"columns": {"user": "x"}}}},
            "data.prepare.columns={'user': 'x'}: must be `key: value` lines of user_id, item_id, timestamp, order, "
            "action, label, request_id, timestamp_unit, integer_ids or null",
        ),
    ],
)
def test_a_value_of_the_wrong_type_is_told_with_what_is_allowed(parser, values, told):
    with pytest.raises(ArgumentError) as error:
        parser.parse_object(values)
    assert explain(error.value, parser) == told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--data.requests.task", "impresions"],
            "data.requests.task=impresions: must be next_item or impressions: did",
        ),
        (["--compare", "mean_pooling"], "compare=mean_pooling: must be a list of texts: write [mean_pooling]"),
        (["--seed", "[" * 3000 + "]" * 3000], "a value is nested too deep" if sys.version_info < (3, 13) else "seed=["),
        (["--training", "5"], "training=5: must hold `key: value` lines"),
        (["--model.rnak", "4"], "unknown key model.rnak: did you mean model.rank?"),
        (
            ["--model.name", "din", "--model.rank", "4"],
            "unknown key model.rank: a setting of solar, light_sans alone: set model.name, or remove it",
        ),
        (
            ["--model.max_length", "4"],
            "unknown key model.max_length: a setting of recgrela, sasrec, hstu, gru4rec, linrec, light_sans_sequence",
        ),
    ],
)
def test_on_the_command_line_too(arguments, told):
    with pytest.raises(UserError) as error:
        load_config("train", "ml-1m", arguments)
    assert str(error.value).startswith(f"command line: {told}")


def test_of_commands_without_a_recipe_too():
    [parser] = import_parsers(["files"])
    with pytest.raises(UserError, match=r"^import files: max_rejected_ratio=nan: must be a number$"):
        parse(parser, ["x.csv", "--out", "y", "--max_rejected_ratio", "nan"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data: {prepare: 5}", "data.prepare must hold `key: value` lines, holds 5"),
        ("data: {requests: [1]}", "data.requests must hold `key: value` lines, holds [1]"),
        ("source: {files: {columns: }}", "source.files.columns must hold `key: value` lines, holds None"),
        ("model: " + "[" * 45 + "]" * 45, "model must hold `key: value` lines, holds " + "[" * 45 + "]" * 35 + "..."),
        ("model: " + "[" * 3000 + "]" * 3000, "not valid YAML: nested more than 50 levels deep"),
        ("model: &m {name: solar, x: *m}", "not valid YAML: line 1: nested more than 50 levels deep, or an alias "),
    ],
)
def test_a_section_that_holds_no_settings_is_told(tmp_path, text, told):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load_config("train", str(tmp_path / "mine.yaml"), [])
    assert str(error.value).startswith(f"{tmp_path}/mine.yaml: {told}")


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("seed", "a whole number"),
        ("workspace", "a path or URI"),
        ("compare", "a list of texts"),
        ("data.name", "text"),
        ("data.requests.task", "next_item or impressions"),
        ("training.log_q", "true or false"),
        ("optimizer.betas", "a list of 2 numbers"),
    ],
)
def test_a_setting_that_is_left_empty_is_told_unless_it_may_be_null(tmp_path, key, allowed):
    *sections, last = key.split(".")
    opened, closed = "".join(f"{section}: {{" for section in sections), "}" * len(sections)
    (tmp_path / "mine.yaml").write_text(f"{opened}{last}: {closed}\nname:\n")
    with pytest.raises(UserError) as error:
        load_config("train", str(tmp_path / "mine.yaml"), [])
    expected = f"{tmp_path}/mine.yaml: {key} must be {allowed}, is empty: give it a value, or remove it"
    assert str(error.value) == expected


@pytest.mark.parametrize("name", [["solar"], {"solar": 1}, 5])
def test_a_model_whose_name_is_no_text_is_told(tmp_path, name):
    (tmp_path / "mine.yaml").write_text(f"model: {{name: {name}}}")
    with pytest.raises(UserError) as error:
        load_config("train", str(tmp_path / "mine.yaml"), [])
    assert str(error.value).startswith(f"model.name={name}: must be one of solar, din, ")


def test_rows_of_a_board_that_are_none_are_shown_in_short(tmp_path):
    (tmp_path / "mine.yaml").write_text(f"models: [{', '.join('x' * 50)}]")
    with pytest.raises(UserError) as error:
        load_board(str(tmp_path / "mine.yaml"), [])
    assert len(str(error.value)) < len(str(tmp_path)) + 300
