"""Writes an event log: a directory that appears completely or not at all.

    events-00000.parquet ...   canonical columns (pipeline/events.py), possibly more; times in milliseconds, or in
                               nanoseconds from the first file on in which one has a part below the millisecond
    items.parquet              item_id and features, if the source has any
    users.parquet              user_id and features, if the source has any
    rejected.parquet           rows that are not valid events, with the reason, if there are any
    source.json                the source, its options and the resulting counts; written last

The directory is built next to its final path, as .OUT-HOST-PID-..., and then renamed; what killed imports left there is
removed by the next one. Importing the same source again reuses it; importing another source into it is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pyarrow.parquet as pq

from pipeline.events import DataError, NotNow, flatten, quoted
from pipeline.log.inputs import summary
from pipeline.log.parquet_rows import bounded
from pipeline.storage import Store, is_of_dead_process, owner
from pipeline.system_errors import storing

FORMAT_VERSION = 1
_FILE_EVENTS = 10_000_000
_ROW_GROUP_EVENTS = 1_000_000
_FINE_TIME = pl.Datetime("ns", "UTC")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imported:
    """An event log on disk."""

    path: str
    events: int
    items: int
    """Rows of the items table."""
    users: int
    """Rows of the users table."""
    rejected: int
    """Rows of the source that are not valid events."""
    left_out: dict[str, int]
    """{description: count} of what the import left out by its rules: valid data, files."""
    notes: tuple[str, ...] = ()
    """What is unusual about the rows."""
    reused: bool
    """True if an earlier import had written this log already."""


class EventLogWriter:
    """Collects tables into Parquet files of bounded row groups inside one directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_events = self.num_items = self.num_users = self.num_rejected = 0
        self.left_out: dict[str, int] = {}
        self.notes: list[str] = []
        self._time_unit: Literal["ms", "ns"] = "ms"
        self._more_files = 0
        self.files_left_out: dict[str, str] = {}
        self._pending: list[pl.DataFrame] = []
        self._writers: dict[str, pq.ParquetWriter] = {}

    def add_events(self, events: pl.DataFrame) -> None:
        """Canonical columns; an int64 `timestamp` is milliseconds since 1970 UTC, a finer one is Datetime("ns")."""
        if events.schema.get("timestamp") == pl.Int64:
            events = events.with_columns(pl.col("timestamp").cast(pl.Datetime("ms", "UTC")))
        self._pending.append(events)
        if sum(table.height for table in self._pending) >= _ROW_GROUP_EVENTS:
            self._flush()

    def add_rejected(self, rejected: pl.DataFrame) -> None:
        if rejected.height:
            self.num_rejected += rejected.height
            self._write("rejected.parquet", rejected)

    def add_items(self, items: pl.DataFrame) -> None:
        self.num_items += items.height
        self._write("items.parquet", items)

    def add_users(self, users: pl.DataFrame) -> None:
        self.num_users += users.height
        self._write("users.parquet", users)

    def leave_out(self, counts: Mapping[str, int]) -> None:
        """Record what a rule of the import left out, as {description: count}."""
        self.left_out |= counts

    def leave_out_files(self, names: Mapping[str, str]) -> None:
        """Record which files of the source were not read, as {name: why}."""
        self.files_left_out |= names
        self.leave_out(summary(names))

    def close(self) -> None:
        self._flush()
        for writer in self._writers.values():
            writer.close()

    def abandon(self) -> None:
        """Close the files of a log that will not be; what could not be written stays unwritten."""
        for writer in self._writers.values():
            with contextlib.suppress(OSError):
                writer.close()

    def _flush(self) -> None:
        if self._pending:
            if self._time_unit == "ms" and any(t.schema.get("timestamp") == _FINE_TIME for t in self._pending):
                # The files from here on have nanoseconds: the type of a file's column cannot change.
                self._time_unit, self._more_files = "ns", int(self.num_events > 0)
            if self._time_unit == "ns":
                self._pending = [table.with_columns(pl.col("timestamp").cast(_FINE_TIME)) for table in self._pending]
            table = pl.concat(self._pending)
            self._write(f"events-{self.num_events // _FILE_EVENTS + self._more_files:05d}.parquet", table)
            self.num_events += table.height
            self._pending = []

    def _write(self, name: str, table: pl.DataFrame) -> None:
        # In parts, because Arrow's own form has a copy of a string for each of its uses.
        for part in bounded(table):
            self._write_part(name, part)

    def _write_part(self, name: str, table: pl.DataFrame) -> None:
        arrow = table.to_arrow(compat_level=pl.CompatLevel.oldest())
        if name not in self._writers:
            self._writers[name] = pq.ParquetWriter(self.folder / name, arrow.schema, compression="zstd")
        self._writers[name].write_table(arrow.cast(self._writers[name].schema), row_group_size=_ROW_GROUP_EVENTS)


def find_event_log(out: str, *, source: dict[str, Any]) -> Imported | None:
    """The log that an earlier import of the same source wrote to `out`; None when `out` is absent or empty. What killed
    imports to `out` left beside it is removed: it holds raw events.

    DataError when the directory has other content.
    """
    folder = _local(out)
    _remove_leftovers(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        found = json.loads((folder / "source.json").read_text())
    except (OSError, ValueError):
        raise DataError(f"{out}: exists and is not an event log; name a new directory") from None
    theirs = flatten(found)
    for key, value in flatten(_plain({"format_version": FORMAT_VERSION, **source})).items():
        if theirs.get(key) != value:
            raise DataError(f"{out}: {_other(key, theirs.get(key), value)}; name a new directory or remove this one")
    for name, size in found["files"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise DataError(f"{out}: {name} is missing or changed; remove the directory and import again")
    counts = {name: found[name] for name in ("events", "items", "rejected")}
    # Absent in logs from versions that had no users table.
    users = found.get("user_rows", 0)
    return Imported(path=out, reused=True, users=users, left_out=found.get("left_out", {}), **counts)


def _other(key: str, there: Any, here: Any) -> str:
    """In what an earlier import differs from the one that is asked for: in its input files, or in a setting."""
    if not key.endswith("inputs"):
        return f"was imported with {key}={there!r}, asked is {here!r}"
    names, asked = [entry["name"] for entry in there or ()], [entry["name"] for entry in here]
    if names == asked:
        return f"was imported before {quoted(entry['name'] for entry in here if entry not in there)} changed"
    kind = {"item_inputs": "items ", "user_inputs": "users "}.get(key, "")
    was, now = (quoted(files) if files else "no file" for files in (names, asked))
    return f"was imported from {kind}{was}, asked is {now}"


def write_event_log(out: str, *, source: dict[str, Any], fill: Callable[[EventLogWriter], None]) -> Imported:
    """Let `fill` write the log, then publish it as `out`. When `fill` raises, all its files are removed. DataError: the
    system refuses to store it. NotNow: the disk is full, or another import to `out` finished first."""
    with storing(out):
        return _write_event_log(_local(out), source=source, fill=fill, out=out)


def _write_event_log(
    folder: Path, *, source: dict[str, Any], fill: Callable[[EventLogWriter], None], out: str
) -> Imported:
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f"{_staged_prefix(folder)}{owner()}-", dir=folder.parent))
    try:
        writer = EventLogWriter(staged)
        try:
            fill(writer)
            writer.close()
        except BaseException:
            writer.abandon()
            raise
        if not writer.num_events:
            raise DataError(f"{out}: the source holds no valid event; nothing was written")
        counts = {"events": writer.num_events, "items": writer.num_items, "rejected": writer.num_rejected}
        files = {file.name: file.stat().st_size for file in sorted(staged.iterdir())}
        description = {
            "format_version": FORMAT_VERSION,
            **source,
            **counts,
            "user_rows": writer.num_users,
            "left_out": writer.left_out,
            **({"files_left_out": writer.files_left_out} if writer.files_left_out else {}),
            "files": files,
        }
        Store(str(staged)).write("source.json", (json.dumps(description, indent=1) + "\n").encode())
        staged.chmod(0o755)
        try:
            os.rename(staged, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise NotNow(f"{out}: another import finished first; run again to reuse its log") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return Imported(
        path=out, reused=False, users=writer.num_users, left_out=writer.left_out, notes=tuple(writer.notes), **counts
    )


def _remove_leftovers(folder: Path) -> None:
    """Remove what dead processes of this machine left unfinished of a log."""
    prefix = _staged_prefix(folder)
    with contextlib.suppress(OSError):
        for other in folder.parent.iterdir():
            if is_of_dead_process(other.name, prefix=prefix):
                shutil.rmtree(other, ignore_errors=True)


def _staged_prefix(folder: Path) -> str:
    """How the names of unfinished logs begin; `owner` of the import follows."""
    return f".{folder.name}-"


def _local(out: str) -> Path:
    store = Store(out)
    if not store.is_local:
        raise DataError(f"{out}: an event log can only be written locally; import to a local directory and copy it")
    return Path(store.path)


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(fields))
