"""Which checkpoint a run begins from, and what is refused to begin from, each by name."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.host.documents import as_json
from jobs.host.errors import UserError
from jobs.host.json_files import write_json
from jobs.runs.record import previous_run, run_facts
from jobs.training.checkpoint import CheckpointError, checkpoint_key
from jobs.training.warm_start import begin_from, find_checkpoint
from pipeline.shards.dataset import Shards
from tests.support.growth import first_day, rewrite, second_day, specs_of, tiny_config, write_model_checkpoint
from tests.support.serial import without_ray


@pytest.fixture(scope="module")
def days(tmp_path_factory) -> tuple[Path, Shards, Shards]:
    """(directory, shards of the first day, of the second)."""
    directory = tmp_path_factory.mktemp("days")
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch.setattr)
        return directory, first_day(directory), second_day(directory)


@pytest.fixture
def checkpoint(days, tmp_path) -> Path:
    directory, first, _ = days
    return write_model_checkpoint(tmp_path / "run" / "step-00000008", tiny_config(directory), first)


def begin(checkpoint: Path, days, *arguments: str, shards: Shards | None = None):
    directory, _, second = days
    config = tiny_config(directory, *arguments)
    return begin_from(
        str(checkpoint),
        model=config.model,
        task=config.data.requests.task,
        sparse=config.optimizer.sparse,
        shards=shards or second,
    )


def test_every_table_of_the_second_day_is_larger(days):
    directory, first, second = days
    config = tiny_config(directory)
    pairs = zip(specs_of(config, first), specs_of(config, second), strict=True)
    assert [(old.name, old.capacity, new.capacity) for old, new in pairs] == [
        ("item", 128, 256), ("genres", 16, 32), ("user-taste", 8, 16),
    ]  # fmt: skip


def test_checkpoint_of_a_vocabulary_that_grew_fits_and_is_known_by_its_content(checkpoint, days):
    begun = begin(checkpoint, days)
    assert (begun.path, begun.key) == (checkpoint, checkpoint_key(checkpoint))
    # Of the run's directory it is the best one.
    assert begin(checkpoint.parent, days) == begun


def test_run_directory_stands_for_its_best_checkpoint(checkpoint):
    later = checkpoint.with_name("step-00000012")
    shutil.copytree(checkpoint, later)
    rewrite(later, train_state={"step": 12, "best_step": 8})
    assert find_checkpoint(str(checkpoint.parent)) == checkpoint
    rewrite(later, train_state={"step": 12, "best_step": 12})
    assert find_checkpoint(str(checkpoint.parent)) == later
    # The best one is gone.
    rewrite(later, train_state={"step": 12, "best_step": 4})
    assert find_checkpoint(str(checkpoint.parent)) == later


def test_what_is_no_checkpoint_is_refused(checkpoint, tmp_path, days):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "absent", tmp_path / "empty"):
        with pytest.raises(CheckpointError, match=f"{path}: no checkpoint there: give a committed"):
            find_checkpoint(str(path))
    raw = bytearray((checkpoint / "dense.safetensors").read_bytes())
    raw[-1] ^= 1
    (checkpoint / "dense.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match="checksum differs"):
        begin(checkpoint, days)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model.width", "32"], "table item has width 16, this model's has 32: set --model.width back"),
        (["--model.name", "din"], "is of model solar, not of din: choose a checkpoint of that model"),
        (["--optimizer.sparse", "adam"], "000.safetensors has accumulator, not the state of optimizer.sparse=adam"),
        (["--model.user_features", "false"], "has a table user-taste that this model lacks: a run on these shards"),
        (
            ["--model.recent_window", "4"],
            "parameter blocks.0.recent.position_WH is [8, 2] in the checkpoint and [4, 2] in this model",
        ),
        (["--model.form", "gaussian"], "has form softmax, whose weights mean something else: set --model.form softmax"),
        (["--model.prior", "true"], "parameter prior.bias_1 is absent in the checkpoint and [1] in this model"),
    ],
)  # fmt: skip
def test_another_model_is_refused_by_what_differs(checkpoint, days, arguments, told):
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(checkpoint))}: ") as refused:
        begin(checkpoint, days, *arguments)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_smaller_and_missing_tables_are_refused(days, checkpoint):
    directory, first, second = days
    grown = write_model_checkpoint(checkpoint.parent / "step-00000016", tiny_config(directory), second)
    with pytest.raises(CheckpointError, match="table item has 256 rows, more than the 128 of these shards"):
        begin(grown, days, shards=first)
    tables = json.loads((checkpoint / "state.json").read_text())["tables"]
    rewrite(checkpoint, tables=[table for table in tables if table["name"] != "genres"])
    with pytest.raises(CheckpointError, match="has no table genres, which came with later data or settings: a run on"):
        begin(checkpoint, days)


def test_vocabulary_that_is_not_the_beginning_is_refused(checkpoint, days):
    vocabulary = json.loads((checkpoint / "state.json").read_text())["vocabulary"]
    vocabulary["item"]["digest"] = "0" * 32
    rewrite(checkpoint, vocabulary=vocabulary)
    with pytest.raises(CheckpointError, match=r"its vocabulary is not the beginning of that of .*the first 60 items"):
        begin(checkpoint, days)


def test_checkpoint_without_digests_is_told_by_its_manifest_or_refused(checkpoint, days):
    rewrite(checkpoint, vocabulary=None)
    begin(checkpoint, days)
    rewrite(checkpoint, manifest_fingerprint="of other shards")
    with pytest.raises(CheckpointError, match=r"its manifest 1 \(of other shards\) is not among those of"):
        begin(checkpoint, days)
    rewrite(checkpoint, manifest=7)
    with pytest.raises(CheckpointError, match="its manifest 7 "):
        begin(checkpoint, days)


def test_run_belongs_to_the_content_that_it_began_from(checkpoint, days, tmp_path):
    directory, _, second = days
    config = tiny_config(directory, "--training.warm_start", str(checkpoint), "--workspace", str(tmp_path), name="warm")
    config.run_dir.mkdir(parents=True)
    facts = run_facts(config, second, warm_start=checkpoint_key(checkpoint))
    write_json(config.run_dir / "run.json", as_json(facts))
    assert previous_run(config, second) == facts
    # Not to the path: the run's directory stands for the same checkpoint here.
    same = dataclasses.replace(config, training=dataclasses.replace(config.training, warm_start=str(checkpoint.parent)))
    assert previous_run(same, second) == facts
    assert same.fingerprint() == config.fingerprint()
    cold = dataclasses.replace(config, training=dataclasses.replace(config.training, warm_start=None))
    with pytest.raises(UserError, match=r"\(training.warm_start is .* with content \w+ there, null here\): choose"):
        previous_run(cold, second)
    dense = load_file(checkpoint / "dense.safetensors")
    save_file({name: torch.ones_like(tensor) for name, tensor in dense.items()}, checkpoint / "dense.safetensors")
    rewrite(checkpoint)
    with pytest.raises(UserError, match=rf"content {checkpoint_key(checkpoint)} here\): choose another --name"):
        previous_run(config, second)
    # A run has its own checkpoints: what it began from may go.
    shutil.rmtree(checkpoint)
    assert previous_run(config, second) == facts
    write_json(config.run_dir / "run.json", {**as_json(facts), "warm_start": None})
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        previous_run(config, second)


def test_comparisons_of_a_warm_run_begin_from_the_seed(days):
    config = tiny_config(days[0], "--training.warm_start", "somewhere")
    assert config.with_model("mean_pooling").training.warm_start is None
