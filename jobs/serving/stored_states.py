"""Finds and reads users' stored states. jobs/serving/build_states.py writes them and describes the files."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.host.errors import UserError
from jobs.tracking.registry import RegisteredModel
from pipeline.events import DataError
from pipeline.shards.dataset import bucket_of
from pipeline.storage import Store

COMMIT = "COMMIT"
COMMIT_FORMAT, EARLIER_FORMATS = 2, (1,)
"""Format of COMMIT and of the states that it names (STATE_FORMAT of jobs/scorer/packed_states.py)."""
FILES_KEPT, ROW_GROUPS_KEPT = 64, 8
_FILE = re.compile(r"bucket-\d{5}\.parquet")
_REQUIRED = ("format", "digest", "manifest", "manifest_fingerprint", "buckets", "user_id", "users", "files", "model")


def states_directory(workspace: str, model: RegisteredModel) -> Path:
    """The default directory of a model's states."""
    return Path(workspace) / "states" / model.name / model.version


def manifest_directory(directory: Path, number: int) -> Path:
    """The directory of the states for one manifest."""
    return directory / f"{number:08d}"


def bucket_file(bucket: int) -> str:
    return f"bucket-{bucket:05d}.parquet"


def find_states(model: RegisteredModel, directory: Path | str) -> StoredUsers | None:
    """The complete states for the latest manifest that has any; None if there are none. UserError: they are of another
    model."""
    numbers = [name for name in Store(str(directory)).names() if re.fullmatch(r"\d{8}", name)]
    for number in sorted(numbers, reverse=True):
        commit = read_commit(f"{directory}/{number}")
        if commit is None:
            continue
        if commit["digest"] != model.digest:
            raise UserError(
                f"{directory}: states of {commit['model']} (digest {commit['digest']}), not of {model.uri} "
                f"({model.digest}): build states of this model with --build-states"
            )
        return StoredUsers(f"{directory}/{number}", commit)
    return None


def read_commit(directory: str, *, earlier: bool = False) -> dict[str, Any] | None:
    """The content of COMMIT; None if there is none: the states are not complete. UserError: COMMIT is damaged, names
    files elsewhere, or is of an earlier format, unless that is asked for with `earlier`."""
    try:
        commit = json.loads(Store(directory).read(COMMIT))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{directory}/{COMMIT}: is damaged: remove it and build the states again") from error
    is_commit = isinstance(commit, dict) and all(key in commit for key in _REQUIRED)
    version = commit["format"] if is_commit else None
    if version in EARLIER_FORMATS and not earlier:
        raise UserError(
            f"{directory}: holds states of format {version}, this version reads {COMMIT_FORMAT}: remove the "
            "directory and build the states again with --build-states"
        )
    if version not in (COMMIT_FORMAT, *EARLIER_FORMATS):
        raise UserError(
            f"{directory}/{COMMIT}: is not a commit of format {COMMIT_FORMAT}: remove it and build the states again"
        )
    for file in commit["files"]:
        if not _FILE.fullmatch(str(file.get("name"))):
            raise UserError(f"{directory}/{COMMIT}: names {file.get('name')!r}, which is not a file of states")
    return commit


class StoredUsers:
    """The states for one manifest, open for reading."""

    def __init__(self, directory: str, commit: dict[str, Any]) -> None:
        self.directory, self.commit = directory, commit
        self.id_type: str = commit["user_id"]
        """int64 or string."""
        self._store = Store(directory)
        self._entries = {entry["bucket"]: entry for entry in commit["files"]}
        self._file = functools.lru_cache(FILES_KEPT)(self._open)
        self._group = functools.lru_cache(ROW_GROUPS_KEPT)(self._read_group)

    def __reduce__(self) -> Any:
        return type(self), (self.directory, self.commit)

    def read(self, user_id: pa.Array) -> list[bytes | None]:
        """The state of each of these users [B], None for users without one. DataError: a file is damaged."""
        found: list[bytes | None] = [None] * len(user_id)
        bucket = bucket_of(pl.Series("user_id", user_id), buckets=self.commit["buckets"]).to_numpy()
        for number in np.unique(bucket).tolist():
            if number not in self._entries:
                continue
            here = np.flatnonzero(bucket == number)
            index, first_row = self._file(number)
            place = index.get_indexer(pd.Index(user_id.take(pa.array(here)).to_numpy(zero_copy_only=False)))
            known = place >= 0
            group = np.searchsorted(first_row, place, side="right") - 1
            for one in np.unique(group[known]).tolist():
                states = self._group(number, one)
                for b in np.flatnonzero(known & (group == one)).tolist():
                    found[here[b]] = states[int(place[b] - first_row[one])].as_py()
        return found

    def _open(self, bucket: int) -> tuple[pd.Index, np.ndarray]:
        """(ids of the file's users, first row of each of its row groups), after its size and checksum were verified."""
        entry = self._entries[bucket]
        name = entry["name"]
        try:
            if self._store.size(name) != entry["bytes"] or self._store.checksum(name) != entry["checksum"]:
                raise DataError(f"{self.directory}: {name} is damaged: build the states again into another directory")
            with self._store.open(name) as stream, pq.ParquetFile(stream) as parquet:
                sizes = [parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)]
                ids = parquet.read(columns=["user_id"])["user_id"].combine_chunks()
        except FileNotFoundError as error:
            raise DataError(f"{self.directory}: {name} is missing: build the states again") from error
        return pd.Index(ids.to_numpy(zero_copy_only=False)), np.cumsum([0, *sizes])[:-1]

    def _read_group(self, bucket: int, group: int) -> pa.Array:
        with self._store.open(self._entries[bucket]["name"]) as stream, pq.ParquetFile(stream) as parquet:
            return parquet.read_row_group(group, columns=["state"])["state"].combine_chunks()
