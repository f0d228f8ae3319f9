import dataclasses
import json
from pathlib import Path

import polars as pl
import pytest

from pipeline.events import EventColumns
from pipeline.shards.dataset import Shards
from pipeline.shards.inspection import digest, verify

FULL = EventColumns(action="action", label="label", request_id="request_id")


@pytest.fixture
def prepared(prepare, write_log, random_log, tmp_path):
    def make(name="out", log=None, **config):
        write_log(random_log() if log is None else log, f"{name}-log/events.parquet")
        prepare(tmp_path / f"{name}-log", tmp_path / name, columns=FULL, **config)
        return str(tmp_path / name)

    return make


def test_a_whole_data_set_has_no_problems(prepared):
    assert verify(prepared(buckets=3, row_group_events=50)) == []


def test_the_digest_ignores_layout_and_follows_content(prepared, random_log):
    base = digest(prepared("a"))
    assert digest(prepared("b", buckets=2, row_group_events=30)) == base
    log = random_log()
    assert digest(prepared("c", log=log.sample(fraction=1, shuffle=True, seed=1))) == base
    for name, column in enumerate(["item_id", "timestamp", "label", "request_id"]):
        value = log[column].to_list()
        value[5] = 1 - value[5] if column == "label" else value[5] + 1
        assert digest(prepared(f"d{name}", log=log.with_columns(pl.Series(column, value)))) != base
    assert digest(prepared("e", log=log.with_columns(user_id=log["user_id"] + 1))) != base
    assert digest(prepared("f", log=log[1:])) != base


@pytest.mark.parametrize("harm", ["remove", "cut", "flip"])
def test_damaged_files_are_named(prepared, harm):
    path = prepared()
    entry = Shards.open(path).manifest.files[2]
    file = Path(path, entry["name"])
    content = bytearray(file.read_bytes())
    file.unlink()
    if harm != "remove":
        content[20] ^= 1
        file.write_bytes(content if harm == "flip" else content[:-1])
    (problem,) = verify(path)
    assert problem.startswith(entry["name"])


def test_a_manifest_that_does_not_add_up_is_named(prepared, tmp_path):
    path = prepared()
    manifest = Shards.open(path).manifest
    counts = manifest.counts | {"accepted": manifest.counts["accepted"] + 1}
    changed = dataclasses.asdict(dataclasses.replace(manifest, number=2, counts=counts, users=3))
    (tmp_path / "out/manifests/00000002.json").write_text(json.dumps(changed))
    problems = " ".join(verify(path))
    assert "accepted + duplicate + conflicting + rejected does not equal read" in problems
    assert "users instead of 3" in problems
