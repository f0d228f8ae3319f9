"""Event log -> sequence shards, as a Ray Data graph; again with more events: merges them. The only file with Ray.

    row groups --Ray Data--> validated events by bucket --> vocabulary --Ray Data--> one shard per bucket --> commit

Reads the log and writes the directory that shards/dataset.py describes. The steps themselves are in prepare/. Readers
see nothing before the manifest is committed, and a run that fails leaves the earlier data set unchanged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from pipeline.batches import request_index
from pipeline.batches.requests import RequestConfig
from pipeline.events import DataError, EventColumns, NotNow
from pipeline.log.changes import unchanged
from pipeline.log.daily import DailyLog
from pipeline.log.inputs import FileFormat
from pipeline.prepare import compaction, forgetting, garbage, ingest, log_parts
from pipeline.prepare.plan import Plan, make_plan, require_disk
from pipeline.prepare.staging import remove_leftovers, staging_directory
from pipeline.prepare.users import CheckedUsers, StagedUsers, refuse_bad_users
from pipeline.shards import dataset as shards
from pipeline.shards import manifest
from pipeline.shards.manifest import Manifest
from pipeline.shards.tombstones import Tombstones
from pipeline.shards.writer import write_vocabulary
from pipeline.system_errors import as_data_error

Row = TypeVar("Row")
Result = TypeVar("Result")
Progress = Callable[[str, int, int], None]
"""(stage, done, total), called in the driver."""

_TASKS_PER_CORE, _TASK_EVENTS = 8, 1_000_000
_BYTES_PER_EVENT = 250
"""Upper bound of what building a bucket needs beyond an idle worker (measured on 4 M events with string ids)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How a log becomes a data set."""

    columns: EventColumns | None = None
    """Which column of the log is which; None = columns have the canonical names."""
    files: FileFormat = dataclasses.field(default_factory=FileFormat)
    """Format of the event files."""
    daily: DailyLog = dataclasses.field(default_factory=DailyLog)
    """Logs with one folder per day: which days are read."""
    buckets: int | None = None
    """Parts that users are divided into by a hash of their id; None = as many as the data set has; for a new data set
    one per 4 M rows, at least 16."""
    memory_gib: float = 6.0
    """Memory in GiB that all tasks of a machine may use together; if buckets have many new events, fewer tasks run at
    the same time."""
    row_group_events: int = 1_000_000
    """Most events of a row group, the unit that training reads; a longer user has a row group of its own."""
    max_rejected_ratio: float = 0.01
    """Share of rejected rows above which nothing is committed, 0 to 1; duplicates are not rejected rows."""
    max_deltas: int = 8
    """Files of later ingests that a bucket may have beside its first file; with more, they are rewritten as one."""
    late_days: int = 7
    """Days before an ingest's last event within which every repeated event is found at once. Older repetitions, if a
    day gets only few events, are found by the next compaction."""

    def __post_init__(self) -> None:
        if self.buckets is not None and not 1 <= self.buckets <= 99_999:
            raise ValueError(f"buckets is {self.buckets}: it must be between 1 and 99999")
        if self.memory_gib <= 0:
            raise ValueError(f"memory_gib is {self.memory_gib}: it must be above 0")
        if self.row_group_events < 1:
            raise ValueError(f"row_group_events is {self.row_group_events}: it must be at least 1")
        for name in ("max_deltas", "late_days"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 0")
        if not 0 <= self.max_rejected_ratio <= 1:
            raise ValueError(f"max_rejected_ratio is {self.max_rejected_ratio}: it must be between 0 and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """What prepare leaves behind."""

    path: str
    manifest: Manifest
    reused: bool
    """Nothing was new."""
    notes: Sequence[str]
    """What is unusual about the new rows."""
    left_out: Sequence[str]
    """What of the log was not read, and why: days that are not complete yet, and files."""


def prepare(
    events: str, out: str, *, config: PrepareConfig, items: str | None = None, users: str | None = None,
    progress: Progress | None = None,
) -> Prepared:  # fmt: skip
    """Add the event files behind `events` (file, directory, pattern) that `out` does not hold yet.

    `items` is a Parquet table of item_id and features, `users` one of user_id and features; by default the log's own
    items.parquet and users.parquet, if they exist. Ray must be initialised. DataError, with the earlier state
    unchanged: a missing or damaged file, one that changes while it is read or after its ingest, a missing column, too
    many rejected rows, no valid row, a users table that names a user twice or only users that never occur in the log,
    or a configuration other than the data set's.
    """
    _require_ray()
    report = progress or (lambda stage, done, total: None)
    plan = make_plan(
        events, out, columns=config.columns, files=config.files, daily=config.daily, items=items, users_table=users,
        settings={"buckets": config.buckets, "row_group_events": config.row_group_events},
    )  # fmt: skip
    _complete_interrupted(out)
    committed, notes = _ingest(plan, config=config, report=report) if not plan.is_done else (plan.parent, [])
    assert committed is not None
    # Even if nothing is new: an earlier run may have died between its ingest and its compaction.
    if crowded := compaction.crowded(shards.Shards(out, committed), max_deltas=config.max_deltas):
        committed = compact(out, buckets=crowded, progress=progress)
    return Prepared(path=out, manifest=committed, reused=plan.is_done, notes=notes, left_out=plan.left_out)


def _ingest(plan: Plan, *, config: PrepareConfig, report: Progress) -> tuple[Manifest, list[str]]:
    """Stage, build and commit the new inputs of the plan; returns the new manifest, and notes on the new rows."""
    require_disk(plan)
    with staging_directory(plan.out) as staging:
        with unchanged(plan.hashed):
            state, notes = _build(plan, config=config, staging=staging, report=report)
        manifest.commit(plan.out, state)
    return state, notes


def _build(plan: Plan, *, config: PrepareConfig, staging: str, report: Progress) -> tuple[Manifest, list[str]]:
    """The state with the new inputs, of which all files are written; not committed yet. And notes on the new rows."""
    # Validate the new events and divide them by bucket.
    stage = functools.partial(log_parts.stage_part, plan=plan, staging=staging)
    # Starting a task takes as long as staging 200,000 events, so small files share a task.
    staged = _map(stage, plan.parts(), stage="read", report=report, tasks=_TASKS_PER_CORE * _num_cores())
    staged.sort(key=lambda result: result.number)
    counts: dict[str, Any] = {"read": 0, "valid": 0, "rejected": {}}
    notes: list[str] = []
    if plan.inputs:
        counts, notes = log_parts.refuse_bad_log(staged, plan=plan, max_rejected_ratio=config.max_rejected_ratio)
    if any(part.has_fine_times for part in staged):
        if plan.keeps_fine_times:
            plan = plan.with_order_from_times()
        else:
            notes.append(
                "what times have below the millisecond is left out, as in the data set so far, so that repeats within "
                "one millisecond are duplicates; prepare everything into a new directory to keep them apart"
            )
    staged_users = _stage_users(plan, staging=staging, report=report)
    buckets = ingest.by_bucket(staged, staged_users, plan=plan)
    checked: list[CheckedUsers] = []
    if plan.users and plan.users_are_new:
        check = functools.partial(ingest.check_users, plan=plan, staging=staging)
        checked = _map(check, [row for row in buckets if row.users], stage="check users", report=report)
        refuse_bad_users(checked, file=plan.users.file.name)

    # Append new items and values to the vocabulary.
    vocabulary = ingest.grow_vocabulary(staged, staged_users, plan=plan, staging=staging)
    vocabulary_entry = write_vocabulary(vocabulary, path=plan.out)

    # Build one file per bucket.
    time_range = ingest.join_ranges(part.time_range for part in staged)
    build = functools.partial(
        ingest.build_bucket, plan=plan, staging=staging, vocabulary=vocabulary_entry["name"],
        row_group_events=config.row_group_events, late_days=config.late_days,
        latest=max(time_range) if time_range else None,
    )  # fmt: skip
    at_once = _tasks_at_once(buckets, plan=plan, memory_gib=config.memory_gib)
    # One task per bucket of a good size; small buckets of a day share a task.
    tasks = max(_TASKS_PER_CORE * _num_cores(), counts["valid"] // _TASK_EVENTS)
    built = _map(build, buckets, stage="build", report=report, at_once=at_once, tasks=tasks)
    built.sort(key=lambda result: result.bucket)
    state = ingest.finish(
        built, counts, plan=plan, staging=staging, vocabulary=vocabulary_entry, items=vocabulary.size - 2,
        time_range=time_range,
    )  # fmt: skip
    if featureless := vocabulary_entry.get("featureless"):
        why = "the items table has no value for them" if plan.items else "no items table was given"
        notes.append(f"{featureless:,} of {state.items:,} items have no features: {why}")
    users, unlisted = state.users - (plan.parent.users if plan.parent else 0), sum(bucket.unlisted for bucket in built)
    if checked and not (plan.parent and plan.parent.schema.get("user_features")):
        # Users of earlier ingests have no features either.
        users, unlisted = state.users, state.users - sum(result.matched for result in checked)
    if unlisted:
        which = "users" if users == state.users else "new users"
        why = "the users table has no row for them" if plan.users else "no users table was given"
        notes.append(f"{unlisted:,} of {users:,} {which} have no features: {why}")
    return state, notes


def compact(path: str, *, buckets: Sequence[int] | None = None, progress: Progress | None = None) -> Manifest:
    """Rewrite each of these buckets as one file, by default all that have several; returns the new manifest.

    Readers get the same as before. Old manifests stay readable. Ray must be initialised.
    """
    _require_ray()
    report = progress or (lambda stage, done, total: None)
    _complete_interrupted(path)
    data = shards.Shards.open(path)
    wanted = compaction.crowded(data, max_deltas=0) if buckets is None else buckets
    if not wanted:
        return data.manifest
    with staging_directory(path) as staging:
        rewrite = functools.partial(compaction.compact_bucket, data=data, staging=staging)
        built = _map(rewrite, wanted, stage="compact", report=report)
        committed = compaction.finish(built, data=data, staging=staging)
        manifest.commit(path, committed)
    return committed


def forget(
    path: str, users: Sequence[str], *, elsewhere: Callable[[], None] = lambda: None, progress: Progress | None = None
) -> Manifest:
    """Remove every event of these users from the data set, for ever; returns the new manifest.

    If any of them has events, all earlier states are removed, with the files that only they name: a run that reads one
    of them ends and names this reason. Rows of these users in later ingests are counted as rejected and stored nowhere,
    even if the data set does not know them yet. `elsewhere` removes the users from other places, before the commit: a
    forget that is killed earlier is repeated as a whole, and one that is killed later is completed by the next command.
    Ray must be initialised. DataError: nobody else is in the data set. NotNow: another run is writing there.
    """
    _require_ray()
    report = progress or (lambda stage, done, total: None)
    garbage.refuse_other_runs(path)
    _complete_interrupted(path)

    # Find the buckets of the users. The data set's other forgotten users are in none.
    data = shards.Shards.open(path)
    integers = data.manifest.schema["id_types"]["user_id"] == "int64"
    before = Tombstones.of(path, data.manifest) or Tombstones.empty(path)
    stones, ids = before.with_users(users), data.index_table()
    wanted = ids.filter(stones.among(ids["user_id"]))["bucket"].unique().sort().to_list()
    if len(wanted) == len(data.buckets) and stones.among(ids["user_id"]).all():
        raise DataError(f"{path}: these are all users of the data set; delete the directory instead")

    # Rewrite them; remove the users everywhere else; commit; remove the earlier states.
    committed = data.manifest
    with staging_directory(path) as staging:
        rewrite = functools.partial(compaction.compact_bucket, data=data, staging=staging, forgotten=stones)
        built = _map(rewrite, wanted, stage="forget", report=report)
        elsewhere()
        forgetting.clean_rejected(path, users, integers=integers)
        if wanted or stones.hashes != before.hashes:
            committed = compaction.finish(built, data=data, staging=staging)
            oldest = committed.number if wanted else data.manifest.oldest
            committed = dataclasses.replace(committed, tombstones=stones.write(path), oldest=oldest)
            manifest.commit(path, committed)
    garbage.remove_forgotten_states(path)
    # Files of killed ingests may hold their events, too. If another run has started: it cannot commit any more, and its
    # files are left to `solar gc`.
    with contextlib.suppress(NotNow):
        garbage.collect(path, keep=committed.number)
    return committed


def index_requests(
    data: shards.Shards, *, config: RequestConfig, progress: Progress | None = None
) -> request_index.RequestCounts:
    """Count every user's requests, one task per bucket, and store the counts beside the shards for the loaders."""
    _require_ray()
    if (cached := request_index.load(data, config)) is None:
        report = progress or (lambda stage, done, total: None)
        with staging_directory(data.path) as staging:
            count = functools.partial(_count_bucket, data=data, config=config, staging=staging)
            _map(count, data.buckets, stage="requests", report=report)
            cached = request_index.assemble(data, config, staging=staging)
    return cached


def _complete_interrupted(path: str) -> None:
    """Complete a killed forget, and remove the unfinished files of killed runs."""
    remove_leftovers(path)
    garbage.remove_forgotten_states(path)


def _stage_users(plan: Plan, *, staging: str, report: Progress) -> list[StagedUsers]:
    if not plan.users:
        return []
    stage = functools.partial(ingest.stage_users, plan=plan, staging=staging)
    return sorted(_map(stage, plan.user_parts(), stage="users", report=report), key=lambda result: result.number)


def _count_bucket(bucket: int, *, data: shards.Shards, config: RequestConfig, staging: str) -> None:
    request_index.count_bucket(data, bucket, config=config, staging=staging)


def _tasks_at_once(buckets: Sequence[ingest.BucketInput], *, plan: Plan, memory_gib: float) -> int:
    """How many buckets of the largest size may be built at the same time. DataError: not even one fits."""
    largest = max((row.num_events for row in buckets), default=0)
    fitting = int(memory_gib * 2**30 / max(1, largest * _BYTES_PER_EVENT))
    if not fitting:
        needed = largest * _BYTES_PER_EVENT / 2**30
        raise DataError(
            f"{plan.out}: {largest:,} new events of one bucket need about {needed:.1f} GiB, memory_gib is "
            f"{memory_gib}: raise it, ingest the log in several parts, or prepare a new directory with more than "
            f"{plan.config['buckets']} buckets"
        )
    return fitting


def _map(
    function: Callable[[Row], Result], rows: Sequence[Row], *, stage: str, report: Progress,
    at_once: int | None = None, tasks: int = 1_000,
) -> list[Result]:  # fmt: skip
    """Apply a function to every row, in at most `tasks` Ray tasks of which at most `at_once` run at the same time.

    A DataError of a task is raised here as it was, and what the system refused as one.
    """
    import ray.data

    report(stage, 0, len(rows))
    if not rows:
        return []
    results = []
    with quiet_ray_data():
        encoded: list[Any] = [{"row": pickle.dumps(row)} for row in rows]
        dataset: Any = ray.data.from_items(encoded, override_num_blocks=min(len(rows), tasks))
        # Ray warns if the pool is larger than the number of rows.
        pool = ray.data.TaskPoolStrategy(size=at_once if at_once and at_once < len(rows) else None)
        for answer in dataset.map(functools.partial(_run, function), compute=pool).iter_rows():
            if answer["error"]:
                raise (NotNow if answer["later"] else DataError)(answer["error"])
            results.append(pickle.loads(answer["result"]))
            report(stage, len(results), len(rows))
    return results


def _num_cores() -> int:
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1))) if ray.is_initialized() else 1


def _run(function: Callable[[Any], Any], row: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"result": pickle.dumps(function(pickle.loads(row["row"]))), "error": "", "later": False}
    except Exception as error:
        told = error if isinstance(error, DataError) else as_data_error(error)
        if told is None:
            raise
        return {"result": b"", "error": str(told), "later": isinstance(told, NotNow)}


@contextlib.contextmanager
def quiet_ray_data() -> Iterator[None]:
    """Without the progress bars and messages of Ray Data; the settings are restored afterwards."""
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


def _require_ray() -> None:
    import ray

    if not ray.is_initialized():
        raise RuntimeError("Ray is not running: call ray.init() before prepare or index_requests")
