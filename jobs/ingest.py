"""solar import, solar prepare, solar inspect: raw data -> event log -> sequence shards, and a look at both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.cluster.session import ClusterConfig, ray_session
from jobs.config.run import RunConfig, SourceConfig
from jobs.host.console import Console, Stage
from jobs.host.errors import UserError
from jobs.training.checkpoint import verify_checkpoint
from pipeline.build import PrepareConfig, Prepared, prepare
from pipeline.shards.inspection import digest, verify
from pipeline.shards.manifest import current_manifest
from pipeline.sources.event_log import Imported
from pipeline.sources.files import import_files
from pipeline.sources.git import import_git
from pipeline.sources.movielens import import_movielens_100k
from pipeline.sources.published import PUBLISHED, import_published
from pipeline.sources.synthetic import import_synthetic
from pipeline.storage import absolute


def import_events(source: SourceConfig, out: str, console: Console, *, downloads: Path) -> Imported:
    """Bring a source into an event log; the same source again is a no-op."""
    with console.stage("import") as stage:
        imported = _import(source, out, downloads=downloads, progress=progress_of(stage))
        tables = [f"{n:,} {what}" for what, n in (("items", imported.items), ("users", imported.users)) if n]
        stage.result = f"{_found(imported.reused)}{', '.join([f'{imported.events:,} events', *tables])} in {out}"
    for what, count in imported.left_out.items():
        console.line(f"{'':<12} left out: {count:,} {what}")
    if imported.rejected:
        console.line(f"{'':<12} rejected: {imported.rejected:,} rows, in {Path(out) / 'rejected.parquet'}")
    return imported


def import_missing(config: RunConfig, console: Console) -> None:
    """The event log of a recipe. Where a user has to name the files, a log that is there is taken as it is."""
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
            f"source.path is not set and {out} is not there: name {what} with --source.path {value}, "
            f"or bring them in with `solar import {source.name}`"
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
        return import_published(source.name, path, out, progress=progress)
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
    """Event log -> sequence shards through Ray Data, whose tasks may work in another directory than this one."""
    places = {"items": items and absolute(items), "users": users and absolute(users)}
    with ray_session(cluster, verbose=verbose), console.stage("prepare") as stage:
        prepared = prepare(absolute(events), absolute(out), config=options, **places, progress=progress_of(stage))
        counts, manifest = prepared.manifest.counts, prepared.manifest
        stage.result = (
            f"{_found(prepared.reused)}{_events_line(counts)}; {manifest.users:,} users, "
            f"{manifest.items:,} items in {out}"
        )
    for day in prepared.left_out:
        console.line(f"{'':<12} left out: {day}")
    return prepared


def inspect(path: Path, console: Console, *, check: bool, with_digest: bool) -> int:
    """Print what a shard directory or a checkpoint holds; 1 if `check` finds damage."""
    if (path / "COMMIT").exists():
        problems = verify_checkpoint(path, checksums=check)
        if not problems:
            _print_checkpoint(path, console)
    else:
        manifest = current_manifest(str(path)) if path.exists() else None
        if manifest is None:
            raise UserError(f"{path}: neither sequence shards nor a checkpoint: give a directory that holds one")
        _print_manifest(path, manifest, console)
        if with_digest:
            console.line(f"digest        {digest(str(path))}")
        problems = verify(str(path)) if check else []
    for problem in problems:
        console.line(f"damaged: {problem}")
    if check and not problems:
        console.line("every file has its size and checksum")
    return 1 if problems else 0


def _print_manifest(path: Path, manifest: Any, console: Console) -> None:
    counts = manifest.counts
    rejected = ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts["rejected"].items()) if count)
    console.line(f"shards        {path}, manifest {manifest.number} ({manifest.fingerprint})")
    console.line(f"events        {_events_line(counts)}{f' ({rejected})' if rejected else ''}")
    console.line(f"users, items  {manifest.users:,}, {manifest.items:,}")
    if names := manifest.schema.get("user_features"):
        console.line(f"user features {', '.join(names)}")
    console.line(f"time range    {manifest.time_range if manifest.has_time else 'order only'}")
    buckets = len({file["bucket"] for file in manifest.files})
    console.line(f"files         {len(manifest.files)} for {buckets} buckets")
    for entry in manifest.inputs:
        console.line(f"input         {json.dumps(entry, sort_keys=True)}")


def _print_checkpoint(path: Path, console: Console) -> None:
    document = json.loads((path / "state.json").read_text())
    state = document["train_state"]
    console.line(f"checkpoint    {path}")
    console.line(f"step          {state['step']} (best {state['best_step']}: {state['best_metric']})")
    console.line(f"trained on    {document['world_size']} ranks, manifest {document['manifest']}")
    console.line(f"tables        {', '.join('{name} {capacity} x {width}'.format(**t) for t in document['tables'])}")
    if grown := document.get("grown_from"):
        console.line(f"grown from    {grown['checkpoint']} ({grown['key']}), manifest {grown['manifest']}")
    if document.get("warm_start"):
        path = document["config"]["training"]["warm_start"]
        console.line(f"began from    {path} ({document['warm_start']}), {state['steps_before']} steps before its own")
    for entry in json.loads((path / "COMMIT").read_text())["files"]:
        console.line(f"file          {entry['name']}  {entry['bytes']:,} bytes  {entry['xxh64']}")


def _events_line(counts: Any) -> str:
    rejected = sum(counts["rejected"].values())
    return (
        f"{counts['read']:,} read = {counts['accepted']:,} accepted + {counts['duplicate']:,} duplicate + "
        f"{rejected:,} rejected"
    )


def progress_of(stage: Stage) -> Any:
    """Shows how far the tasks of a stage are."""

    def progress(name: str, done: int, total: int) -> None:
        stage.update(done, total or None, name)

    return progress


def _found(reused: bool) -> str:
    return "already there: " if reused else ""
