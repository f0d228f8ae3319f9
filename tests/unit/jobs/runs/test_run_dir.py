"""What settles the settings that a recipe leaves open: the run's record, the checkpoint it begins from, the data."""

from __future__ import annotations

import dataclasses

import pytest

from jobs.config.open_settings import left_open
from jobs.config.reader import load_config
from jobs.config.run_config import RunConfig
from jobs.host.console import Console
from jobs.host.documents import as_json
from jobs.host.errors import UserError
from jobs.host.json_files import write_json
from jobs.runs.record import previous_run, run_facts
from jobs.runs.run_dir import run_shards, settled
from jobs.runs.train import _tell_few_steps, train
from pipeline import build
from pipeline.events import EventColumns
from pipeline.shards.dataset import Shards
from tests.unit.jobs.training.test_checkpoint_damage import write_checkpoint


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
    ]
    assert left_open(found.model) == []
    assert settled(found, tell=lines.append) is found


def test_times_and_impressions_keep_all_on_without_a_word(shards, config):
    shards(timed=True, labelled=True)
    requests = dataclasses.replace(config.data.requests, task="impressions")
    shown = dataclasses.replace(config, data=dataclasses.replace(config.data, requests=requests))
    lines: list[str] = []
    found = settled(shown, tell=lines.append)
    assert switches(found) == (True, True)
    assert found.model["history_labels"] is True
    assert lines == []


def test_settled_settings_have_the_identity_of_explicit_ones(shards, config):
    shards(timed=True)
    switched = {"time_features": True, "set_attention": False, "history_labels": False}
    explicit = dataclasses.replace(config, model=config.model | switched)
    assert settled(config).fingerprint() == explicit.fingerprint() != config.fingerprint()


def test_a_run_keeps_the_settings_that_it_began_with(shards, config):
    """Runs of earlier versions had set attention on by default."""
    began = dataclasses.replace(config, model=config.model | {"time_features": True, "set_attention": True})
    config.run_dir.mkdir(parents=True)
    write_json(config.run_dir / "run.json", as_json(run_facts(began, shards(timed=True))))
    assert switches(settled(config)) == (True, True)
    explicit = dataclasses.replace(config, model=config.model | {"set_attention": False})
    assert switches(settled(explicit)) == (True, False)


@pytest.mark.parametrize("begins", ["the run", "a checkpoint"])
def test_what_was_stored_before_events_had_labels_keeps_them_out(shards, config, tmp_path, begins):
    """Although labels suit the data and the task."""
    data = shards(timed=True, labelled=True)
    requests = dataclasses.replace(config.data.requests, task="impressions")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, requests=requests))
    earlier = settled(config).model | {"history_labels": False}
    facts = as_json(run_facts(dataclasses.replace(config, model=earlier), data))
    del facts["config"]["model"]["history_labels"]
    if begins == "the run":
        config.run_dir.mkdir(parents=True)
        write_json(config.run_dir / "run.json", facts)
    else:
        checkpoint = write_checkpoint(tmp_path / "step-00000004", **facts)
        training = dataclasses.replace(config.training, warm_start=str(checkpoint))
        config = dataclasses.replace(config, training=training)
    found = settled(config)
    assert found.model["history_labels"] is False
    if begins == "the run":
        assert previous_run(found, data) is not None
        on = dataclasses.replace(found, model=found.model | {"history_labels": True})
        with pytest.raises(UserError, match=r"\(model.history_labels is False there, True here\)"):
            previous_run(on, data)


def test_labels_in_histories_that_the_log_does_not_have_are_refused(shards, config):
    shards(timed=True)
    asked = dataclasses.replace(config, model=config.model | {"history_labels": True})
    with pytest.raises(UserError, match=r"model.history_labels=true: .* has no labels: map a label column"):
        train(asked, Said(), resume=False)  # type: ignore[arg-type]


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
