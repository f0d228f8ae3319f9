"""Settings of a model that a recipe leaves open, and what settles them."""

from __future__ import annotations

import pytest

from jobs.config.open_settings import left_open, suited
from jobs.config.reader import load_config
from jobs.host.errors import UserError
from jobs.recipes import RECIPES


def test_a_recipe_that_says_nothing_leaves_the_switches_open_and_an_explicit_value_closes_them(tmp_path):
    recipe = tmp_path / "bare.yaml"
    recipe.write_text("model: {name: solar, rank: 8}\n")
    opened = load_config("train", str(recipe), []).model
    assert left_open(opened) == ["time_features", "set_attention", "history_labels", "prior", "gradient"]
    values = {
        "time_features": True, "set_attention": False, "history_labels": True, "prior": False, "gradient": "exact",
    }  # fmt: skip
    options = [part for name, value in values.items() for part in (f"--model.{name}", str(value).lower())]
    closed = load_config("train", str(recipe), options)
    assert left_open(closed.model) == []
    assert {name: closed.model[name] for name in values} == values
    with pytest.raises(
        UserError, match=r"model\.gradient=exakt: must be stable or exact or stop or null: did you mean"
    ):
        load_config("train", str(recipe), ["--model.gradient", "exakt"])


def test_null_leaves_a_switch_open_again(tmp_path):
    recipe = tmp_path / "set.yaml"
    recipe.write_text("model: {name: solar, set_attention: true, time_features: false}\n")
    opened = load_config("train", str(recipe), ["--model.set_attention", "null"]).model
    assert (opened["set_attention"], opened["time_features"]) == (None, False)


def test_no_other_switch_may_be_left_open(tmp_path):
    recipe = tmp_path / "odd.yaml"
    recipe.write_text("model: {name: solar, interests: null}\n")
    with pytest.raises(UserError, match=r"model\.interests"):
        load_config("train", str(recipe), [])


@pytest.mark.parametrize(
    ("name", "task", "split", "has_time", "has_labels", "value"),
    [
        ("time_features", "next_item", "leave_one_out", True, False, True),
        ("time_features", "impressions", "temporal", False, True, False),
        ("set_attention", "impressions", "leave_one_out", False, True, True),
        ("set_attention", "next_item", "temporal", True, True, False),
        ("history_labels", "impressions", "leave_one_out", False, True, True),
        ("history_labels", "impressions", "temporal", True, False, False),
        ("history_labels", "next_item", "temporal", True, True, False),
        ("prior", "impressions", "temporal", True, True, True),
        ("prior", "next_item", "temporal", True, False, False),
        ("prior", "impressions", "leave_one_out", True, True, False),
        ("prior", "next_item", "leave_one_out", True, False, False),
    ],
)
def test_times_labels_task_and_split_decide(name, task, split, has_time, has_labels, value):
    assert suited(name, task=task, split=split, has_time=has_time, has_labels=has_labels)[0] is value


def test_a_loss_that_compares_vectors_alone_has_no_prior():
    found = suited("prior", task="impressions", split="temporal", has_time=True, has_labels=False, loss="catalogue")
    assert found == (False, "the loss is catalogue")


def test_the_reason_for_no_labels_in_histories_names_the_log_or_the_task():
    def reason(**facts):
        return suited("history_labels", split="temporal", has_time=True, **facts)[1]

    assert reason(task="next_item", has_labels=True) == "the task is next_item"
    assert reason(task="impressions", has_labels=False) == "the log has no labels"


def test_models_have_only_the_open_settings_that_are_theirs():
    models = {name: load_config("train", "movielens-100k", ["--model.name", name]).model for name in ("din", "sasrec")}
    found = {name: left_open(model) for name, model in models.items()}
    assert found == {"din": ["time_features", "history_labels", "prior"], "sasrec": ["prior"]}


def test_a_comparison_takes_what_the_run_has_settled_and_leaves_its_own_open():
    config = load_config("train", "movielens-100k", ["--model.name", "din", "--model.time_features", "false"])
    compared = config.with_model("solar").model
    assert (compared["time_features"], compared["set_attention"]) == (False, None)


@pytest.mark.parametrize("name", [path.stem for path in sorted(RECIPES.glob("*.yaml"))])
def test_no_recipe_of_the_package_changes_with_the_defaults(name):
    """Recipes of next_item say themselves that sets do not attend; their figures do not hang on what is left open."""
    config = load_config("train", name, [])
    if config.data.requests.task == "next_item":
        assert config.model["set_attention"] is False
    else:
        split = config.data.requests.split
        assert suited("set_attention", task="impressions", split=split, has_time=True, has_labels=True)[0] is True
