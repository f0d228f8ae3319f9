"""run.json of a run that was killed at a bad moment, or that somebody damaged."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.config.reader import load_config
from jobs.config.run_config import RunConfig
from jobs.host.documents import as_json
from jobs.host.errors import UserError
from jobs.host.json_files import write_json
from jobs.runs.record import previous_run, run_facts
from tests.unit.jobs.training.test_checkpoint_damage import write_checkpoint

SHARDS: Any = SimpleNamespace(manifest=SimpleNamespace(number=3, fingerprint="abc", has_labels=False))


@pytest.fixture
def config(tmp_path) -> RunConfig:
    return load_config("train", "ml-1m", ["--workspace", str(tmp_path), "--name", "mine"])


@pytest.fixture
def run_dir(config) -> Path:
    config.run_dir.mkdir(parents=True)
    return config.run_dir


def test_run_killed_before_its_record_was_in_place_starts_anew(config, run_dir):
    for name in ("lock", "workers.lock", "run.tmp"):
        (run_dir / name).write_text("{")
    assert previous_run(config, SHARDS) is None


def test_directory_of_something_else_is_refused(config, run_dir):
    (run_dir / "notes.txt").touch()
    with pytest.raises(UserError, match="not empty and not a run"):
        previous_run(config, SHARDS)


def test_damaged_record_is_named_and_removing_it_falls_back_on_the_checkpoint(config, run_dir):
    record = run_dir / "run.json"
    record.write_text('{"fingerp')
    with pytest.raises(UserError, match=rf"run.json: not valid JSON .*: remove {run_dir}, there is no checkpoint"):
        previous_run(config, SHARDS)
    write_checkpoint(run_dir / "step-00000004", **as_json(run_facts(config, SHARDS)))
    with pytest.raises(
        UserError, match=r"run.json: not valid JSON .*: remove it; the checkpoints hold the same record"
    ):
        previous_run(config, SHARDS)
    record.unlink()
    assert previous_run(config, SHARDS) == run_facts(config, SHARDS)
    other = dataclasses.replace(config, seed=config.seed + 1)
    with pytest.raises(UserError, match="belongs to another configuration \\(seed is"):
        previous_run(other, SHARDS)


def test_shards_that_changed_are_refused_by_manifest(config, run_dir):
    facts = dataclasses.replace(run_facts(config, SHARDS), manifest=2, manifest_fingerprint="old")
    write_json(run_dir / "run.json", as_json(facts))
    with pytest.raises(UserError, match="was trained on manifest 2 \\(old\\), the shards are now at manifest 3"):
        previous_run(config, SHARDS)


@pytest.mark.parametrize("has_labels", [False, True])
def test_a_run_from_before_labels_mattered_read_every_event(config, run_dir, has_labels):
    shards: Any = SimpleNamespace(manifest=SimpleNamespace(number=3, fingerprint="abc", has_labels=has_labels))
    stored = as_json(run_facts(config, shards))
    del stored["config"]["data"]["requests"]["min_label"]
    write_json(run_dir / "run.json", stored)
    requests = dataclasses.replace(config.data.requests, min_label=0)
    every = dataclasses.replace(config, data=dataclasses.replace(config.data, requests=requests))
    assert previous_run(every, shards) is not None
    if not has_labels:
        assert previous_run(config, shards) is not None
        return
    with pytest.raises(UserError, match=r"another configuration \(data.requests.min_label is 0 there, 1 here\)"):
        previous_run(config, shards)
    # A run of today is recorded with what it read.
    write_json(run_dir / "run.json", as_json(run_facts(config, shards)))
    assert previous_run(config, shards) is not None
    with pytest.raises(UserError, match=r"\(data.requests.min_label is 1 there, 0 here\)"):
        previous_run(every, shards)
