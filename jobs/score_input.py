"""The requests of `solar score`, block by block: a Parquet file, with histories out of it or of sequence shards."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.config import ConfigError
from jobs.registry import RegisteredTables
from jobs.scorer import Scorer
from jobs.scorer_input import NO_TIME, Histories, RequestError, cast_values, flat_offsets, required_column, time_column
from pipeline.events import LATEST_TIME
from pipeline.shards import Shards
from pipeline.user_reader import UserReader

ROWS_PER_BLOCK = 256
"""Requests in memory together where each brings its history (10,000 events and 1,000 candidates: 50 MB)."""
ROWS_PER_READ = 4096
"""The same where the histories are in shards: more, because a block reads every row group that its users are in."""
EVENTS_PER_BLOCK = 1 << 22
"""Events that shards give to one block (100 MB)."""
ROW_GROUPS_KEPT = 4


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Some requests in a row of the file."""

    first_row: int
    rows: pa.RecordBatch
    histories: Histories
    """Every known event of each request, also those after its time."""
    time: np.ndarray
    """[B] int64 as asked, NO_TIME where none is."""
    unknown_users: int
    """Requests of users that the shards do not hold; 0 where histories are given."""


class RequestFile:
    """A Parquet file with one row a request."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._explained():
            self._file = pq.ParquetFile(path)
            self.num_rows, self.schema = self._file.metadata.num_rows, self._file.schema_arrow
        if not self.num_rows:
            raise ConfigError(f"{path}: it holds no request")
        if "scores" in self.schema.names:
            raise ConfigError(f"{path}: column 'scores' is what the result is called: rename it")

    def blocks(self, scorer: Scorer, shards: UserHistories | None) -> Iterator[Block]:
        """The requests in order. ConfigError that names the file for whatever cannot be read or is no request."""
        with self._explained():
            # No row has the types already: a mistake in them shows before any work.
            empty = pa.RecordBatch.from_pylist([], schema=self.schema)
            yield from _with_histories([empty], scorer, shards)
            if "candidates" in self.schema.names:
                scorer.candidates(empty)
            rows = ROWS_PER_READ if shards else ROWS_PER_BLOCK
            yield from _with_histories(self._file.iter_batches(batch_size=rows), scorer, shards)

    def close(self) -> None:
        self._file.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RequestError as error:
            raise ConfigError(f"{self.path}: {error}") from error
        except FileNotFoundError as error:
            raise ConfigError(f"{self.path}: no such file: give the Parquet file of the requests") from error
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"{self.path}: no whole Parquet file: {' '.join(str(error).split())[:160]}") from error


class UserHistories:
    """Histories of users by raw id, out of sequence shards: as training reads them."""

    def __init__(self, path: str, scorer: Scorer) -> None:
        self._data = Shards.open(path)
        if scorer.uses_time and not self._data.manifest.has_time:
            raise ConfigError(
                f"{path}: the events have no times, which this model needs: prepare a log with timestamps"
            )
        self._reader = UserReader(self._data, keep=ROW_GROUPS_KEPT)
        self._tables = RegisteredTables(scorer, self._data.vocabulary)
        user_id = self._data.index.user_id
        self._id_type = "int64" if pa.types.is_integer(user_id.type) else "string"
        self._users = pd.Index(user_id.to_numpy(zero_copy_only=False))
        self.has_time = self._data.manifest.has_time

    def users(self, rows: pa.RecordBatch, *, first_row: int) -> np.ndarray:
        """[B] int64 user rows, -1 for users that are not there."""
        raw = cast_values(required_column(rows, "user_id"), "user_id", self._id_type)
        if raw.null_count:
            missing = first_row + int(np.flatnonzero(np.asarray(raw.is_null()))[0])
            raise RequestError(f"row {missing}: user_id is null: name the user, or leave the request out")
        return self._users.get_indexer(pd.Index(raw.to_numpy(zero_copy_only=False)))

    def num_events(self, users: np.ndarray) -> np.ndarray:
        """[B] length of each user's whole sequence, 0 for those that are not there."""
        return np.where(users < 0, 0, self._data.index.events[users])

    def read(self, users: np.ndarray) -> Histories:
        """Every event of these users, in total order, as rows and codes of the model."""
        known = users >= 0
        events = self._reader.read(users[known])
        lengths = np.zeros(len(users), np.int64)
        lengths[known] = np.diff(events.offsets)
        return Histories(
            offsets=flat_offsets(lengths),
            row=self._tables.row_R.numpy()[events.item],
            time=events.time,
            action=self._tables.code_A.numpy()[events.action],
            users=self._tables.users(events.codes, known=known),
        )


def refuse_wrong_unit(time: np.ndarray, name: str, *, time_range: list[int] | None) -> None:
    """RequestError where times [n] cannot be milliseconds: past 2100, or all before the model's first event."""
    asked = time[time < NO_TIME]
    if not len(asked) or time_range is None:
        return
    latest = int(asked.max())
    if latest >= LATEST_TIME or int(asked.min()) < 0:
        raise RequestError(f"column {name!r} has {latest}: it must be milliseconds since 1970 UTC, before 2100")
    if latest < time_range[0]:
        raise RequestError(
            f"column {name!r} ends {_date(latest)}, before the first event the model knows, {_date(time_range[0])}: "
            "integers must be milliseconds since 1970 UTC"
        )


def _with_histories(batches: Iterable[pa.RecordBatch], scorer: Scorer, shards: UserHistories | None) -> Iterator[Block]:
    first_row = 0
    for batch in batches:
        if shards is None:
            histories = scorer.histories(batch, first_row=first_row)
            time = scorer.request_times(batch)
            refuse_wrong_unit(histories.time, "history_time", time_range=_range(scorer, "history_time", batch))
            refuse_wrong_unit(time, "time", time_range=_range(scorer, "time", batch))
            yield Block(first_row=first_row, rows=batch, histories=histories, time=time, unknown_users=0)
        else:
            yield from _from_shards(batch, scorer, shards, first_row=first_row)
        first_row += batch.num_rows


def _from_shards(batch: pa.RecordBatch, scorer: Scorer, shards: UserHistories, *, first_row: int) -> Iterator[Block]:
    if "history" in batch.schema.names:
        raise RequestError("column 'history' beside --shards: leave one of them out")
    users, time = shards.users(batch, first_row=first_row), np.full(batch.num_rows, NO_TIME)
    if "time" in batch.schema.names:
        time = time_column(batch, "time")
        if not shards.has_time and (time < NO_TIME).any():
            raise RequestError("column 'time' cannot cut these shards: their log has an order only; leave it out")
    refuse_wrong_unit(time, "time", time_range=_range(scorer, "time", batch))
    ends = np.cumsum(shards.num_events(users))
    bounds = [0]
    while bounds[-1] < len(users):
        done = ends[bounds[-1] - 1] if bounds[-1] else 0
        bounds.append(max(bounds[-1] + 1, int(np.searchsorted(ends, done + EVENTS_PER_BLOCK, side="right"))))
    for first, last in itertools.pairwise(bounds):
        part, rows = users[first:last], batch.slice(first, last - first)
        histories = shards.read(part)
        yield Block(
            first_row=first_row + first,
            rows=rows,
            histories=dataclasses.replace(histories, users=scorer.users(rows, known=histories.users)),
            time=time[first:last],
            unknown_users=int((part < 0).sum()),
        )


def _range(scorer: Scorer, name: str, batch: pa.RecordBatch) -> list[int] | None:
    return scorer.settings["time_range"] if name in batch.schema.names else None


def _date(milliseconds: int) -> str:
    return datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC).date().isoformat()
