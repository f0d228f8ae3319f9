"""solar import, solar prepare: raw data -> event log -> sequence shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from jobs.cluster.session import ClusterConfig, ray_session
from jobs.cluster.worker_group import make_room_for_tasks
from jobs.config.run_config import RunConfig, SourceConfig
from jobs.host.console import Console, Stage
from jobs.host.errors import UserError
from pipeline.build import PrepareConfig, Prepared, prepare
from pipeline.sources.event_log import Imported
from pipeline.sources.files import import_files
from pipeline.sources.git import import_git
from pipeline.sources.movielens import import_movielens_100k
from pipeline.sources.published import PUBLISHED, import_published
from pipeline.sources.synthetic import import_synthetic
from pipeline.storage import absolute


def import_events(source: SourceConfig, out: str, console: Console, *, downloads: Path) -> Imported:
    """Import a source into an event log; does nothing if the log already has the same source."""
    with console.stage("import") as stage:
        imported = _import(source, out, downloads=downloads, progress=progress_of(stage))
        tables = [f"{n:,} {what}" for what, n in (("items", imported.items), ("users", imported.users)) if n]
        stage.result = f"{_found(imported.reused)}{', '.join([f'{imported.events:,} events', *tables])} in {out}"
    for table in ("items", "users"):
        if (file := Path(out) / f"{table}.parquet").is_file():
            features = [name for name in pq.read_schema(file).names if not name.endswith("_id")]
            unread = "; other columns of the table are not read" if source.name == "files" else ""
            console.line(f"{'':<12} features of {table}: {', '.join(features) or 'none'}{unread}")
    for what, count in imported.left_out.items():
        console.line(f"{'':<12} left out: {count:,} {what}")
    for note in imported.notes:
        console.line(f"{'':<12} note: {note}")
    if imported.rejected:
        console.line(f"{'':<12} rejected: {imported.rejected:,} rows, in {Path(out) / 'rejected.parquet'}")
    return imported


def import_missing(config: RunConfig, console: Console) -> None:
    """Import the event log of a recipe. If the recipe does not name the files (source.path), an existing log is used
    as it is."""
    there = "://" in config.events_dir or Path(config.events_dir).exists()
    if config.source.needs_path and there:
        console.line(f"{'import':<12} already there: {config.events_dir}")
    else:
        import_events(config.source, config.events_dir, console, downloads=Path(config.workspace) / "downloads")


def _import(source: SourceConfig, out: str, *, downloads: Path, progress: Any) -> Imported:
    if source.needs_path:
        what = {"git": "the repository", "files": "the events"}.get(source.name, "the unpacked data set")
        value = "FILE" if source.name == "files" else "DIRECTORY"
        raise UserError(
            f"source.path is not set and {out} does not exist: name {what} with --source.path {value}, "
            f"or import the events with `solar import {source.name}`"
        )
    if source.name == "git":
        return import_git(source.paths, out, config=source.git, progress=progress)
    if source.name == "synthetic":
        return import_synthetic(out, config=source.synthetic, progress=progress)
    path = source.paths[0] if source.paths else None
    if source.name == "movielens-100k":
        return import_movielens_100k(out, from_file=path, downloads=str(downloads), progress=progress)
    assert path is not None, "needs_path says otherwise"
    if source.name in PUBLISHED:
        return import_published(
            source.name, path, out, atomic=source.recbole, max_rejected_ratio=source.files.max_rejected_ratio,
            progress=progress,
        )  # fmt: skip
    return import_files(
        path, out, config=source.files, items=source.items_path, users=source.users_path, progress=progress
    )


def prepare_shards(
    events: str,
    out: str,
    options: PrepareConfig,
    console: Console,
    *,
    items: str | None = None,
    users: str | None = None,
    cluster: ClusterConfig = ClusterConfig(),
    verbose: bool = False,
) -> Prepared:
    """Event log -> sequence shards, with Ray Data. Paths become absolute: its tasks may run in another directory."""
    places = {"items": items and absolute(items), "users": users and absolute(users)}
    with ray_session(cluster, verbose=verbose), console.stage("prepare") as stage:
        make_room_for_tasks()
        prepared = prepare(absolute(events), absolute(out), config=options, **places, progress=progress_of(stage))
        counts, manifest = prepared.manifest.counts, prepared.manifest
        stage.result = (
            f"{_found(prepared.reused)}{events_line(counts)}; {manifest.users:,} users, "
            f"{manifest.items:,} items in {out}"
        )
    for note in prepared.notes:
        console.line(f"{'':<12} note: {note}")
    for what in prepared.left_out:
        console.line(f"{'':<12} left out: {what}")
    return prepared


def events_line(counts: Any) -> str:
    """A manifest's counts of rows as one line of text."""
    parts = [f"{counts[name]:,} {name}" for name in ("accepted", "duplicate", "conflicting") if name in counts]
    parts.append(f"{sum(counts['rejected'].values()):,} rejected")
    return f"{counts['read']:,} read = {' + '.join(parts)}"


def progress_of(stage: Stage) -> Any:
    """A function that shows the progress of a stage's tasks: (name, done, total)."""

    def progress(name: str, done: int, total: int) -> None:
        stage.update(done, total or None, name)

    return progress


def _found(reused: bool) -> str:
    return "already there: " if reused else ""
