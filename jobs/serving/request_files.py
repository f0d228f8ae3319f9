"""Reads the requests of `solar score` from Parquet files, block by block, with histories from these files, from stored
states or from shards."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.host.console import one_line
from jobs.host.errors import UserError
from jobs.scorer.histories import NO_TIME, Histories, RequestError
from jobs.scorer.scorer import Scorer
from jobs.scorer.user_states import both_known, stored_too_late
from jobs.serving.stored_states import StoredUsers
from jobs.serving.user_histories import UserHistories, user_ids
from pipeline.log.inputs import some_of
from pipeline.log.listing import list_files

ROWS_PER_BLOCK = 256
"""Requests in memory at a time if they contain their histories (10,000 events and 1,000 candidates: 50 MB)."""
ROWS_PER_READ = 4096
"""The same if histories come from shards: more, because each block reads every row group with some of its users."""
ROWS_PER_READ_OF_STATES = 1024
"""The same if histories come from states (20 KB each, as a tower reads them, and 44 bytes per distinct older item)."""

EVENTS_PER_BLOCK = 1 << 22
"""Most events that one block reads from shards (100 MB)."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Consecutive requests of a file."""

    first_row: int
    rows: pa.RecordBatch
    histories: Histories
    """All known events of each request's user, also those after the request's time."""
    time: np.ndarray
    """[B] int64 time of the request, NO_TIME if it has none."""
    unknown_users: int
    """Number of requests whose users are neither in the states nor in the shards; 0 if requests contain histories."""
    from_states: int = 0
    """Number of requests whose history is a state."""
    without_state: int = 0
    """Number of requests without a usable state, if states were requested."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sources:
    """Where the histories of users are read from; without states and shards, requests contain their histories."""

    states: StoredUsers | None = None
    shards: UserHistories | None = None
    """With states: used for users without a state."""
    states_asked: bool = False
    """Whether states were requested, even if none were found."""

    @property
    def rows_per_read(self) -> int:
        """Number of requests in memory at a time."""
        if self.states is not None:
            return ROWS_PER_READ_OF_STATES
        return ROWS_PER_READ if self.shards is not None else ROWS_PER_BLOCK


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive rows of one file."""

    number: int
    """Its number in the order of all parts, from 0."""
    file: str
    first_row: int
    num_rows: int


class Requests:
    """The requests in a Parquet file, or in all files below a directory, read in the order of their names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        names = _parquet_files(path) if path.is_dir() else [path]
        self.files = [RequestFile(name) for name in names]
        self.num_rows, self.schema = sum(file.num_rows for file in self.files), self.files[0].schema
        if not self.num_rows:
            raise UserError(f"{path}: has no requests")
        for file in self.files[1:]:
            if not file.schema.equals(self.schema):
                raise UserError(f"{file.path}: its columns differ from those of {names[0]}: give all the same columns")

    def parts(self, most: int) -> list[Part]:
        """All rows, in parts of at most `most` rows."""
        found: list[Part] = []
        for file in self.files:
            name = str(file.path.absolute())
            for first in range(0, file.num_rows, most):
                rows = min(most, file.num_rows - first)
                found.append(Part(number=len(found), file=name, first_row=first, num_rows=rows))
        return found

    def refuse_as_result(self, out: Path) -> None:
        """UserError if the result would be one of the requests' files, or be in their directory."""
        if out.exists() and any(out.samefile(file.path) for file in self.files):
            raise UserError(f"{out}: is the file of the requests: name another --out")
        if self.path.is_dir() and out.resolve().is_relative_to(self.path.resolve()):
            raise UserError(f"{out}: is in the directory of the requests: name another --out")

    def close(self) -> None:
        for file in self.files:
            file.close()


def _parquet_files(directory: Path) -> list[Path]:
    """The Parquet files below a directory; hidden ones and marker files apart. UserError: there are other files, or
    none."""
    files = list_files(str(directory)).files
    others = []
    for file in files:
        ending = None if file.name.lower().endswith(".parquet") else "not *.parquet"
        if problem := file.problem or ("there already" if file.is_again else ending):
            others.append(f"{file.name} ({problem})")
    if others:
        raise UserError(
            f"{directory}: {len(others):,} files are not read: {some_of(others)}; move them to another directory"
        )
    if not files:
        raise UserError(f"{directory}: no Parquet files there: give a file of requests, or a directory of them")
    return [Path(file.url) for file in files]


class RequestFile:
    """A Parquet file with one row per request."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._explained():
            self._file = pq.ParquetFile(path)
            self.num_rows, self.schema = self._file.metadata.num_rows, self._file.schema_arrow
        if twice := [name for name, count in Counter(self.schema.names).items() if count > 1]:
            raise UserError(f"{path}: column {twice[0]!r} is there twice: keep one of them")
        if "scores" in self.schema.names:
            raise UserError(f"{path}: column 'scores' has the name of the result's column: rename it")

    def blocks(self, scorer: Scorer, sources: Sources, *, part: Part) -> Iterator[Block]:
        """The requests of a part in order, after a first block without rows. UserError names the file: it cannot be
        read, or has an invalid request."""
        with self._explained():
            # A block without rows has the columns' types already: a mistake in them is reported before any work.
            empty = pa.RecordBatch.from_pylist([], schema=self.schema)
            yield from _with_histories([empty], scorer, sources, first_row=0)
            if "candidates" in self.schema.names:
                scorer.candidates(empty)
            rows = self._rows(part, batch_size=sources.rows_per_read)
            yield from _with_histories(rows, scorer, sources, first_row=part.first_row)

    def close(self) -> None:
        self._file.close()

    def _rows(self, part: Part, *, batch_size: int) -> Iterator[pa.RecordBatch]:
        """The part's rows; reads only the row groups that have some of them."""
        metadata = self._file.metadata
        ends = np.cumsum([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
        first_group = int(np.searchsorted(ends, part.first_row, side="right"))
        last_group = int(np.searchsorted(ends, part.first_row + part.num_rows, side="left"))
        place = int(ends[first_group - 1]) if first_group else 0
        groups = list(range(first_group, last_group + 1))
        for batch in self._file.iter_batches(batch_size=batch_size, row_groups=groups):
            start, stop = part.first_row - place, part.first_row + part.num_rows - place
            place += batch.num_rows
            wanted = batch.slice(max(0, start), max(0, min(stop, batch.num_rows) - max(0, start)))
            if wanted.num_rows:
                yield wanted

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RequestError as error:
            raise UserError(f"{self.path}: {error}") from error
        except FileNotFoundError as error:
            raise UserError(f"{self.path}: no such file: give the Parquet file of the requests") from error
        except (pa.ArrowException, OSError) as error:
            if not _is_parquet(self.path):
                raise UserError(
                    f"{self.path}: requests must be Parquet, which this file is not: write the table as Parquet "
                    "(jobs/serving/README.md)"
                ) from error
            raise UserError(f"{self.path}: not a complete Parquet file: {one_line(error)[:160]}") from error


def _is_parquet(path: Path) -> bool:
    """Whether a file begins as Parquet does; also true where it cannot be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(4) in (b"PAR1", b"PARE")
    except OSError:
        return True


def _with_histories(
    batches: Iterable[pa.RecordBatch], scorer: Scorer, sources: Sources, *, first_row: int
) -> Iterator[Block]:
    """Blocks of requests with their histories, from the requests themselves or from `sources`."""
    for batch in batches:
        if sources.states is None and sources.shards is None:
            if "user_id" in batch.schema.names and not {"history", "state"} & set(batch.schema.names):
                raise RequestError("column 'history' is missing: with user_id, give --shards DIR, or --states auto")
            histories = scorer.histories(batch, first_row=first_row)
            time = scorer.request_times(batch, first_row=first_row)
            yield Block(first_row=first_row, rows=batch, histories=histories, time=time, unknown_users=0)
        else:
            yield from _of_users(batch, scorer, sources, first_row=first_row)
        first_row += batch.num_rows


def _of_users(batch: pa.RecordBatch, scorer: Scorer, sources: Sources, *, first_row: int) -> Iterator[Block]:
    """Blocks of requests whose users' histories come from states or shards."""
    # Check the columns, and read the requests' times.
    shards = sources.shards
    for name in ("history", "state"):
        if name in batch.schema.names:
            option = "--states" if sources.states is not None else "--shards"
            raise RequestError(f"column {name!r} is given together with {option}: omit one of them")
    time = scorer.request_times(batch, first_row=first_row)
    if shards is not None and not shards.has_time and (time < NO_TIME).any():
        raise RequestError("column 'time' cannot be used with these shards, whose events have no times: omit it")
    # Find each user's state, else the user's row in the shards; then cut the batch into blocks of limited size.
    stored, has_state = _stored(batch, time, scorer, sources, first_row=first_row)
    users = np.full(batch.num_rows, -1)
    if shards is not None:
        users = np.where(has_state, -1, shards.users(batch, first_row=first_row))
    ends = np.cumsum(users * 0 if shards is None else shards.num_events(users))
    bounds = [0]
    while bounds[-1] < len(users):
        done = ends[bounds[-1] - 1] if bounds[-1] else 0
        bounds.append(max(bounds[-1] + 1, int(np.searchsorted(ends, done + EVENTS_PER_BLOCK, side="right"))))
    # Read each block's histories, and add the events of the column latest.
    for first, last in itertools.pairwise(bounds):
        part, rows = users[first:last], batch.slice(first, last - first)
        histories = None if stored is None else stored.take(np.arange(first, last))
        if shards is not None:
            raw = shards.read(part)
            histories = raw if histories is None else both_known(histories, raw)
        assert histories is not None
        histories = dataclasses.replace(histories, users=scorer.users(rows, known=histories.users))
        if "latest" in rows.schema.names:
            histories = scorer.with_latest(histories, rows, first_row=first_row + first)
        yield Block(
            first_row=first_row + first,
            rows=rows,
            histories=histories,
            time=time[first:last],
            unknown_users=int(((part < 0) & ~has_state[first:last]).sum()),
            from_states=int(has_state[first:last].sum()),
            without_state=int((~has_state[first:last]).sum()) if sources.states_asked else 0,
        )


def _stored(
    batch: pa.RecordBatch, time: np.ndarray, scorer: Scorer, sources: Sources, *, first_row: int
) -> tuple[Histories | None, np.ndarray]:
    """(the histories of the users' states, None without states; [B] bool: whether the request has a usable state)."""
    states = sources.states
    if states is None:
        return None, np.zeros(batch.num_rows, bool)
    found = states.read(user_ids(batch, states.id_type, first_row=first_row))
    stored = scorer.states(pa.array(found, pa.large_binary()))
    late = stored_too_late(stored, time)
    if late.any() and sources.shards is None:
        raise RequestError(
            f"row {first_row + int(np.flatnonzero(late)[0])}: the user's state has events at or after column 'time': "
            "give --shards, where earlier events can be selected, or omit the time"
        )
    if late.any():
        found = [None if is_late else state for state, is_late in zip(found, late, strict=True)]
        stored = scorer.states(pa.array(found, pa.large_binary()))
    return stored, np.array([state is not None for state in found], bool)
