"""Real logs through import and prepare. They are not part of the project: SOLAR_TEST_DATA names their directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.build import PrepareConfig, prepare
from pipeline.events import EventColumns
from pipeline.log.inputs import FileFormat
from pipeline.shards.inspection import verify
from pipeline.sources.files import ImportConfig, ItemColumns, import_files

DATA = Path(os.environ.get("SOLAR_TEST_DATA", "no-test-data"))


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not (DATA / name).is_dir(), reason=f"{name} is not there: set SOLAR_TEST_DATA to a directory that has it"
    )


@needs("ml-1m")
def test_movielens_1m_has_its_published_counts(tmp_path, local_ray):
    config = ImportConfig(
        columns=EventColumns(timestamp=None, order="position"),
        items=ItemColumns(
            list_features=("genres",),
            files=FileFormat(format="csv", separator="::", encoding="latin-1", header=("item_id", "title", "genres")),
        ),
    )
    log, shards = str(tmp_path / "log"), str(tmp_path / "shards")
    import_files(str(DATA / "ml-1m/ml-1m.order.parquet"), log, config=config, items=str(DATA / "ml-1m/movies.dat"))
    manifest = prepare(log, shards, config=PrepareConfig()).manifest
    assert (manifest.counts["accepted"], manifest.users, manifest.items) == (1_000_209, 6_040, 3_706)
    assert not manifest.has_time
    assert verify(shards) == []


@needs("buildroot-git")
def test_a_git_history_keeps_its_longest_users_whole(tmp_path, local_ray):
    config = ImportConfig(
        columns=EventColumns(action="action"),
        items=ItemColumns(features=("unit", "top")),
    )
    log, shards = str(tmp_path / "log"), str(tmp_path / "shards")
    events, items = DATA / "buildroot-git/interactions.parquet", DATA / "buildroot-git/items.csv.gz"
    import_files(str(events), log, config=config, items=str(items))
    manifest = prepare(log, shards, config=PrepareConfig()).manifest
    counts = manifest.counts
    assert counts["read"] == 213_032
    assert counts["accepted"] + counts["duplicate"] + sum(counts["rejected"].values()) == counts["read"]
    assert manifest.users == 1_758
    assert verify(shards) == []
