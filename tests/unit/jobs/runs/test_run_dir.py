"""What settles the settings that a recipe leaves open: the run's record, the checkpoint it begins from, the data."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from jobs.config.open_settings import LATER, left_open
from jobs.config.reader import load_config
from jobs.config.run_config import RunConfig, counted_model
from jobs.host.console import Console
from jobs.host.documents import as_json
from jobs.host.errors import UserError
from jobs.host.json_files import write_json
from jobs.runs.record import previous_run, run_facts
from jobs.runs.run_dir import run_shards, settled
from jobs.runs.train import _tell_few_steps, train
from models.sequence_settings import SasRecConfig
from pipeline import build
from pipeline.events import EventColumns
from pipeline.shards.dataset import Shards
from tests.unit.jobs.training.test_checkpoint_damage import write_checkpoint

LATE: dict[str, Any] = {"split": "temporal", "valid_from": 20_000, "test_from": 30_000}
"""Requests of the temporal split."""


@pytest.fixture
def shards(tmp_path, prepare, write_log):
    """A function: the shards of a log of three users, with times or as an order only, with labels or without."""

    def make(*, timed: bool, labelled: bool = False) -> Shards:
        column, labels = "timestamp" if timed else "order", {"label": [0, 1, 0, 1, 0, 1]} if labelled else {}
        events = {"user_id": [1, 1, 1, 2, 2, 3], "item_id": [7, 8, 9, 7, 9, 8], column: [10, 20, 30, 10, 20, 10]}
        write_log(events | labels)
        columns = EventColumns() if timed else EventColumns(timestamp=None, order="order")
        columns = dataclasses.replace(columns, label="label" if labelled else None)
        prepare(tmp_path / "log", tmp_path / "shards", columns=columns, buckets=1)
        return Shards.open(str(tmp_path / "shards"))

    return make


@pytest.fixture
def config(tmp_path) -> RunConfig:
    recipe = tmp_path / "bare.yaml"
    recipe.write_text("model: {name: solar, width: 16, rank: 4}\n")
    return load_config(
        "train", str(recipe), ["--workspace", str(tmp_path / "ws"), "--data.shards", str(tmp_path / "shards")]
    )


def asking(config: RunConfig, **requests: Any) -> RunConfig:
    """The config with other requests."""
    changed = dataclasses.replace(config.data.requests, **requests)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, requests=changed))


def switches(config: RunConfig) -> tuple[bool, bool]:
    return config.model["time_features"], config.model["set_attention"]


def test_an_order_without_times_switches_time_features_off_and_says_so(shards, config):
    shards(timed=False)
    lines: list[str] = []
    found = settled(config, tell=lines.append)
    assert switches(found) == (False, False)
    assert lines == [
        "train        model.time_features=false: the log has an order only, no times",
        "train        model.set_attention=false: negatives are sampled",
        "train        model.history_labels=false: the log has no labels",
        "train        model.prior=false: the task is next_item",
    ]
    assert left_open(found.model) == []
    assert settled(found, tell=lines.append) is found


def test_times_impressions_and_a_temporal_split_keep_all_on_without_a_word(shards, config):
    shards(timed=True, labelled=True)
    lines: list[str] = []
    found = settled(asking(config, task="impressions", **LATE), tell=lines.append)
    assert switches(found) == (True, True)
    assert found.model["history_labels"] is found.model["prior"] is True
    assert lines == []


def test_settled_settings_have_the_identity_of_explicit_ones(shards, config):
    shards(timed=True)
    closed = {
        "time_features": True,
        "set_attention": False,
        "history_labels": False,
        "prior": False,
        "gradient": "stop",
    }
    explicit = dataclasses.replace(config, model=config.model | closed)
    assert settled(config).fingerprint() == explicit.fingerprint() != config.fingerprint()


def test_a_run_keeps_the_settings_that_it_began_with(shards, config):
    """Runs of earlier versions had set attention on by default, and a gradient through the directions."""
    stored = {"time_features": True, "set_attention": True, "gradient": "stable"}
    began = dataclasses.replace(config, model=config.model | stored)
    config.run_dir.mkdir(parents=True)
    write_json(config.run_dir / "run.json", as_json(run_facts(began, shards(timed=True))))
    assert switches(settled(config)) == (True, True)
    assert settled(config).model["gradient"] == "stable"
    explicit = dataclasses.replace(config, model=config.model | {"set_attention": False})
    assert switches(settled(explicit)) == (True, False)


@pytest.mark.parametrize("name", [name for name, value in LATER.items() if value is False])
@pytest.mark.parametrize("begins", ["the run", "a checkpoint"])
def test_what_was_stored_before_a_setting_existed_keeps_it_out(shards, config, tmp_path, begins, name):
    """Although it suits the data, the task and the split."""
    data = shards(timed=True, labelled=True)
    config = asking(config, task="impressions", **LATE)
    assert settled(config).model[name] is True
    earlier = settled(config).model | {name: False}
    facts = as_json(run_facts(dataclasses.replace(config, model=earlier), data))
    del facts["config"]["model"][name]
    if begins == "the run":
        config.run_dir.mkdir(parents=True)
        write_json(config.run_dir / "run.json", facts)
    else:
        checkpoint = write_checkpoint(tmp_path / "step-00000004", **facts)
        training = dataclasses.replace(config.training, warm_start=str(checkpoint))
        config = dataclasses.replace(config, training=training)
    found = settled(config)
    assert found.model[name] is False
    if begins == "the run":
        assert previous_run(found, data) is not None
        on = dataclasses.replace(found, model=found.model | {name: True})
        with pytest.raises(UserError, match=rf"\(model.{name} is False there, True here\)"):
            previous_run(on, data)


@pytest.mark.parametrize("name", [name for name, value in LATER.items() if value is False])
def test_a_setting_that_came_later_is_part_of_a_runs_identity_only_where_it_is_on(shards, config, name):
    shards(timed=True)
    off = settled(config)
    assert off.model[name] is False
    without = dataclasses.replace(off, model={key: value for key, value in off.model.items() if key != name})
    on = dataclasses.replace(off, model=off.model | {name: True})
    assert without.fingerprint() == off.fingerprint() != on.fingerprint()


@pytest.mark.parametrize(("softmax", "form"), [(True, "softmax"), (False, "bilinear")])
def test_a_run_stored_with_the_switch_softmax_is_found_again_by_its_form(shards, config, softmax, form):
    data = shards(timed=True)
    now = settled(config)
    now = dataclasses.replace(now, model=now.model | {"form": form})
    # What was hashed then.
    earlier = {key: value for key, value in now.model.items() if key not in (*LATER, "form")} | {"softmax": softmax}
    assert counted_model(now.model) == earlier
    facts = as_json(run_facts(now, data))
    del facts["config"]["model"]["form"]
    facts["config"]["model"]["softmax"] = softmax
    config.run_dir.mkdir(parents=True)
    write_json(config.run_dir / "run.json", facts)
    assert previous_run(now, data) is not None
    other = dataclasses.replace(now, model=now.model | {"form": "gaussian"})
    with pytest.raises(UserError, match=rf"\(model.form is {form} there, gaussian here\)"):
        previous_run(other, data)


def test_a_sequence_model_stored_before_its_logits_had_a_number_is_found_again():
    settings = {"name": "sasrec", **dataclasses.asdict(SasRecConfig())}
    assert "initial_logit" not in counted_model(settings)
    assert counted_model(settings | {"initial_logit": 0.0})["initial_logit"] == 0.0


def test_labels_in_histories_that_the_log_does_not_have_are_refused(shards, config):
    shards(timed=True)
    asked = dataclasses.replace(config, model=config.model | {"history_labels": True})
    with pytest.raises(UserError, match=r"model.history_labels=true: .* has no labels: map a label column"):
        train(asked, Said(), resume=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("requests", "training", "words"),
    [
        ({}, {}, "data.requests.split is leave_one_out, under which nothing says what was known when: set --data.requ"),
        (True, {"loss": "catalogue"}, "training.loss=catalogue compares vectors alone: set --training.loss candidates"),
    ],
)
def test_a_prior_that_the_split_or_the_loss_does_not_allow_is_refused(shards, config, requests, training, words):
    shards(timed=True)
    asked = dataclasses.replace(
        asking(config, **(LATE if requests else {})),
        model=config.model | {"prior": True},
        training=dataclasses.replace(config.training, **training),
    )
    with pytest.raises(UserError) as refusal:
        train(asked, Said(), resume=False)  # type: ignore[arg-type]
    assert str(refusal.value).startswith(f"model.prior=true: {words}")
    assert str(refusal.value).endswith("or --model.prior false")
    assert "\n" not in str(refusal.value)


def test_a_run_whose_users_were_forgotten_names_how_to_start_a_new_one(shards, config):
    data = shards(timed=True)
    config.run_dir.mkdir(parents=True)
    write_json(config.run_dir / "run.json", as_json(run_facts(settled(config), data, warm_start=None)))
    build.forget(data.path, ["2"])
    with pytest.raises(UserError) as caught:
        run_shards(config)
    assert str(caught.value).endswith(
        f"it held users who were forgotten with manifest 2; start a new run with --name NEW, or remove {config.run_dir}"
    )


@pytest.mark.parametrize(
    ("steps", "settings", "says"),
    [
        (99, [], "lower data.loader.batch_events (65,536) or raise training.epochs (1), in a run of another --name"),
        (99, ["--training.max_seconds", "60"], "or raise training.max_seconds (60), in a run of another --name"),
        (99, ["--training.warm_start", "elsewhere"], ""),
        (100, [], ""),
    ],
)
def test_few_steps_from_scratch_are_told(config, capsys, steps, settings, says):
    settings = ["--workspace", config.workspace, "--data.loader.batch_events", "65536", *settings]
    config = load_config("train", config.recipe, [*settings, "--training.epochs", "1"])
    write_checkpoint(config.run_dir / f"step-{steps:08d}")
    _tell_few_steps(config, Console())
    told = capsys.readouterr().out
    assert told.startswith(f"train        note: only {steps} steps" if says else "")
    assert told.rstrip("\n").endswith(says)
    assert bool(told) == bool(says)


def test_a_new_run_takes_the_settings_of_the_checkpoint_that_it_begins_from(shards, config, tmp_path):
    began = dataclasses.replace(config, model=config.model | {"time_features": True, "set_attention": True})
    checkpoint = write_checkpoint(tmp_path / "step-00000004", **as_json(run_facts(began, shards(timed=True))))
    training = dataclasses.replace(config.training, warm_start=str(checkpoint))
    assert switches(settled(dataclasses.replace(config, training=training))) == (True, True)
    nowhere = dataclasses.replace(config.training, warm_start="nowhere")
    with pytest.raises(UserError, match=r"training\.warm_start=nowhere: nowhere: no checkpoint there"):
        settled(dataclasses.replace(config, training=nowhere))


def test_time_features_that_were_asked_for_are_still_refused_without_times(shards, config):
    shards(timed=False)
    asked = dataclasses.replace(config, model=config.model | {"time_features": True})
    with pytest.raises(UserError, match=r"model.time_features=true: .* has only an order, no time stamps: remove it"):
        train(asked, Said(), resume=False)  # type: ignore[arg-type]


class Said:
    """The console of a command that ends before it shows more than lines."""

    def line(self, text: str = "") -> None:
        """Take a line."""
