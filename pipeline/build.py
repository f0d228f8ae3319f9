"""Event log -> sequence shards, as a Ray Data graph; again with more events: merges them. The only file with Ray.

    row groups --Ray Data--> validated events by bucket --> vocabulary --Ray Data--> one shard a bucket --> commit

Reads the log, writes the directory that shards.py describes. The steps themselves are in ingest.py. Nothing exists
for a reader before the manifest is committed, and a run that fails leaves the earlier data set as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from pipeline import ingest, manifest, readers, request_index, shards
from pipeline.events import DataError, EventColumns
from pipeline.manifest import Manifest
from pipeline.readers import FileFormat
from pipeline.requests import RequestConfig
from pipeline.storage import Store
from pipeline.users import refuse_bad_users

if TYPE_CHECKING:
    import ray.data

Progress = Callable[[str, int, int], None]
"""(stage, done, total), called in the driver."""

_OWN_NAMES = {"manifests", "shards", "index", "vocabulary", "rejected", "requests"}
_DISK_FACTOR = 3
"""Staging and shards together stay below this multiple of the input's bytes (gzipped CSV comes closest)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How a log becomes a data set."""

    columns: EventColumns | None = None
    """Which column plays which part; None = those with the canonical names."""
    files: FileFormat = dataclasses.field(default_factory=FileFormat)
    """How the event files are written."""
    buckets: int = 16
    """Shard files; a task holds one of them in memory (about 250 bytes an event: measured on 3 M events)."""
    row_group_events: int = 1_000_000
    """Most events of a row group, the unit that training reads; a longer single user stands alone."""
    max_rejected_ratio: float = 0.01
    """Share of rejected rows above which nothing is committed; duplicates do not count."""

    def __post_init__(self) -> None:
        if not 1 <= self.buckets <= 99_999:
            raise ValueError(f"buckets is {self.buckets}: it must be between 1 and 99999")
        if self.row_group_events < 1:
            raise ValueError(f"row_group_events is {self.row_group_events}: it must be at least 1")
        if not 0 <= self.max_rejected_ratio <= 1:
            raise ValueError(f"max_rejected_ratio is {self.max_rejected_ratio}: it must be between 0 and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """What prepare leaves behind."""

    path: str
    manifest: Manifest
    reused: bool
    """Everything was there already."""


def prepare(
    events: str, out: str, *, config: PrepareConfig, items: str | None = None, users: str | None = None,
    progress: Progress | None = None,
) -> Prepared:  # fmt: skip
    """Add the event files behind `events` (file, directory, pattern) that `out` does not hold yet.

    `items` is a Parquet table of item_id and features, `users` one of user_id and features; by default the log's own
    items.parquet and users.parquet, where they are. Ray must be initialised. DataError, with the earlier state
    untouched: a missing or damaged file, a missing column, too many rejected rows, nothing valid, users that stand
    twice or are all strangers, a configuration other than the data set's, an ingested file that changed.
    """
    _require_ray()
    report = progress or (lambda stage, done, total: None)
    plan = _plan(events, out, config=config, items=items, users=users)
    if plan.is_done:
        assert plan.parent is not None
        return Prepared(path=out, manifest=plan.parent, reused=True)
    _require_disk(plan)
    with _staging(out) as staging:
        stage = functools.partial(ingest.stage_part, plan=plan, staging=staging)
        staged = _map(stage, plan.parts(), stage="read", report=report) if plan.inputs else []
        staged.sort(key=lambda result: result["part"])
        counts: dict[str, Any] = {"read": 0, "valid": 0, "rejected": {}}
        if plan.inputs:
            counts = ingest.refuse_bad_log(staged, plan=plan, max_rejected_ratio=config.max_rejected_ratio)
        staged_users = _stage_users(plan, staging=staging, report=report)
        buckets = ingest.by_bucket(staged, staged_users, plan=plan)
        if plan.users and plan.users_are_new:
            check = functools.partial(ingest.check_users, plan=plan, staging=staging)
            checked = _map(check, [b for b in buckets if b["users"]], stage="check users", report=report)
            refuse_bad_users(checked, file=plan.users[0].name)

        vocabulary = ingest.grow_vocabulary(staged, staged_users, plan=plan, staging=staging)
        vocabulary_entry = shards.write_vocabulary(vocabulary, path=out)

        build = functools.partial(
            ingest.build_bucket, plan=plan, staging=staging, vocabulary=vocabulary_entry["name"],
            row_group_events=config.row_group_events,
        )  # fmt: skip
        built = _map(build, buckets, stage="build", report=report)
        built.sort(key=lambda result: result["bucket"])

        ranges = [s["time_range"] for s in staged if s["time_range"]]
        committed = ingest.finish(
            built, counts, plan=plan, staging=staging, vocabulary=vocabulary_entry, items=vocabulary.size - 2,
            time_range=[min(r[0] for r in ranges), max(r[1] for r in ranges)] if ranges else None,
        )  # fmt: skip
        manifest.commit(out, committed)
    return Prepared(path=out, manifest=committed, reused=False)


def index_requests(
    data: shards.Shards, *, config: RequestConfig, progress: Progress | None = None
) -> request_index.RequestCounts:
    """Count every user's requests, a task a shard file, and keep the counts beside the shards for the loaders."""
    _require_ray()
    if (cached := request_index.load(data, config)) is None:
        report = progress or (lambda stage, done, total: None)
        with _staging(data.path) as staging:
            count = functools.partial(_count_file, data=data, config=config, staging=staging)
            _map(count, [{"file": f} for f in range(len(data.manifest.files))], stage="requests", report=report)
            cached = request_index.assemble(data, config, staging=staging)
    return cached


def _stage_users(plan: ingest.Plan, *, staging: str, report: Progress) -> list[dict[str, Any]]:
    if not plan.users:
        return []
    stage = functools.partial(ingest.stage_users, plan=plan, staging=staging)
    return sorted(_map(stage, plan.user_parts(), stage="users", report=report), key=lambda result: result["part"])


def _count_file(row: dict[str, Any], *, data: shards.Shards, config: RequestConfig, staging: str) -> dict[str, Any]:
    request_index.count_file(data, row["file"], config=config, staging=staging)
    return row


def _plan(events: str, out: str, *, config: PrepareConfig, items: str | None, users: str | None) -> ingest.Plan:
    found = readers.find_inputs(events, options=config.files)
    _refuse_foreign(out)
    parent = manifest.current_manifest(out)
    columns = config.columns
    if columns is None and parent is not None:
        columns = EventColumns(**parent.config["columns"])
    if columns is None:
        columns = _canonical_columns(found[0], config.files)
    tables = []
    for given, name in ((items, "items.parquet"), (users, "users.parquet")):
        if given is None and Store(events).exists(name):
            given = f"{events.rstrip('/')}/{name}"
        tables.append(readers.find_inputs(given, options=FileFormat(format="parquet"))[0] if given else None)
    return ingest.plan(
        found, out, parent=parent, columns=columns, files=config.files, items=tables[0], users_file=tables[1],
        settings={"buckets": config.buckets, "row_group_events": config.row_group_events},
    )  # fmt: skip


def _canonical_columns(file: readers.Input, files: FileFormat) -> EventColumns:
    there = readers.read_schema(file, options=files)
    if "timestamp" not in there and "order" not in there:
        raise DataError(
            f"{file.name}: no column 'timestamp' or 'order'; it has {', '.join(there) or 'no columns'}; "
            "set columns.timestamp"
        )
    names = ("timestamp", "order", "action", "label", "request_id")
    found: dict[str, Any] = {name: name if name in there else None for name in names}
    return EventColumns(**found)


def _map(function: Callable[[dict], dict], rows: list[dict], *, stage: str, report: Progress) -> list[dict]:
    """Apply a function to every row in Ray tasks. A DataError of a task is raised here as it was."""
    import ray.data

    report(stage, 0, len(rows))
    if not rows:
        return []
    results = []
    with _quiet_ray_data():
        encoded: list[Any] = [{"row": json.dumps(row)} for row in rows]
        dataset = ray.data.from_items(encoded, override_num_blocks=min(len(rows), 1_000))
        for answer in _rows(dataset.map(functools.partial(_run, function))):
            if answer["error"]:
                raise DataError(answer["error"])
            results.append(json.loads(answer["result"]))
            report(stage, len(results), len(rows))
    return results


def _run(function: Callable[[dict], dict], row: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"result": json.dumps(function(json.loads(row["row"]))), "error": ""}
    except DataError as error:
        return {"result": "", "error": str(error)}


def _rows(dataset: ray.data.Dataset) -> Iterable[dict[str, Any]]:
    return dataset.iter_rows()


@contextlib.contextmanager
def _quiet_ray_data() -> Iterator[None]:
    import ray.data

    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    bars, level = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        logger.setLevel(level)


@contextlib.contextmanager
def _staging(out: str) -> Iterator[str]:
    """A directory inside `out` for the time of a run; those of processes that died here are removed."""
    store, existed = Store(out), Store(out).exists()
    prefix = f"staging-{socket.gethostname()}-"
    for name in store.names():
        if name.startswith(prefix) and not _is_alive(name.removeprefix(prefix).partition("-")[0]):
            store.remove(name)
    name = f"{prefix}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        yield f"{out.rstrip('/')}/{name}"
    finally:
        store.remove(name)
        if not existed and store.exists() and not store.names():
            store.remove("")


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _require_ray() -> None:
    import ray

    if not ray.is_initialized():
        raise RuntimeError("Ray is not running: call ray.init() before prepare or index_requests")


def _refuse_foreign(out: str) -> None:
    store = Store(out)
    if store.is_local and os.path.isfile(store.path):
        raise DataError(f"{out}: is a file; name a directory for the prepared data")
    for name in store.names():
        if name not in _OWN_NAMES and not name.startswith(("staging-", ".")):
            raise DataError(f"{out}: holds {name!r}, which is no prepared data; name an empty or new directory")


def _require_disk(plan: ingest.Plan) -> None:
    free = Store(plan.out).free_bytes()
    read = [*plan.inputs, *([plan.users] if plan.users else [])]
    needed = _DISK_FACTOR * sum(file.bytes for file, _ in read) + (64 << 20)
    if free is not None and free < needed:
        raise DataError(f"{plan.out}: {free >> 20} MiB free, preparing needs about {needed >> 20} MiB; free some disk")
