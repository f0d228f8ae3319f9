"""solar inspect DIR: shows the contents of sequence shards or of a checkpoint, and whether they are undamaged."""

from __future__ import annotations

import datetime
import json
import shlex
from pathlib import Path
from typing import Any

from jobs.data.prepare import events_line
from jobs.host.console import Console
from jobs.host.errors import UserError
from pipeline.batches.requests import RequestConfig
from pipeline.shards.inspection import digest, verify
from pipeline.shards.leases import lease
from pipeline.shards.manifest import current_manifest
from pipeline.storage import Store


def inspect(place: str, console: Console, *, check: bool, with_digest: bool) -> int:
    """Print the contents of a shard directory, of a checkpoint or of a run's latest one; returns 1 if `check` finds
    damage, else 0."""
    path = Path(place)
    if (path / "run.json").exists():
        path = _latest_of_run(path, console)
    if (path / "COMMIT").exists():
        # Imports torch, which shards do not need.
        from jobs.training.checkpoint import verify_checkpoint

        problems = verify_checkpoint(path, checksums=check)
        if not problems:
            _print_checkpoint(path, console)
    else:
        # Shards may be in an object store.
        problems = _inspect_shards(place, console, check=check, with_digest=with_digest)
    for problem in problems:
        console.line(f"damaged: {problem}")
    if check and not problems:
        console.line("every file has its size and checksum")
    return 1 if problems else 0


def _inspect_shards(place: str, console: Console, *, check: bool, with_digest: bool) -> list[str]:
    """Print what they hold; returns the damage that `check` finds."""
    store = Store(place)
    manifest = current_manifest(place) if store.exists() else None
    if manifest is None and store.exists("source.json"):
        raise UserError(
            f"{place}: an event log: prepare it first: solar prepare --events {shlex.quote(place)} --out DIR, and "
            "inspect that DIR"
        )
    if manifest is None:
        raise UserError(f"{place}: neither sequence shards nor a checkpoint or a run: give a directory that holds one")
    _print_manifest(place, manifest, console)
    if not (check or with_digest):
        return []
    # Reads every file: `solar gc` keeps them meanwhile.
    with lease(place, number=manifest.number, command="solar inspect", tell=console.teller("shards ")):
        if with_digest:
            console.line(f"digest        {digest(place, number=manifest.number)}")
        return verify(place, number=manifest.number) if check else []


def _latest_of_run(path: Path, console: Console) -> Path:
    from jobs.training.checkpoint import committed_checkpoints

    checkpoints = committed_checkpoints(path)
    if not checkpoints:
        raise UserError(f"{path}: a run without a checkpoint yet")
    console.line(f"run           {path}, with {', '.join(each.name for each in checkpoints)}; the latest one:")
    return checkpoints[-1]


def _print_manifest(place: str, manifest: Any, console: Console) -> None:
    counts = manifest.counts
    rejected = ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts["rejected"].items()) if count)
    console.line(f"shards        {place}, manifest {manifest.number} ({manifest.fingerprint})")
    console.line(f"events        {events_line(counts)}{f' ({rejected})' if rejected else ''}")
    if manifest.conflicting:
        console.line(f"conflicting   {manifest.conflicting:,} events were read with labels 0 and 1: they have label 1")
    if manifest.num_unsettled:
        console.line(
            f"labels        an earlier version began this data set: of an event that was read with labels 0 and 1 it "
            f"kept 0 and counted a duplicate ({manifest.num_unsettled:,} in all); prepare into a new directory to get 1"
        )
    console.line(f"users, items  {manifest.users:,}, {manifest.items:,}")
    if names := manifest.vocabulary.get("features"):
        lacking = manifest.vocabulary["featureless"]
        told = f" ({lacking:,} of {manifest.items:,} items have none)" if lacking else ""
        console.line(f"item features {', '.join(names)}{told}")
    if names := manifest.schema.get("user_features"):
        console.line(f"user features {', '.join(names)}")
    console.line(f"time range    {_times(manifest.time_range) if manifest.has_time else 'order only'}")
    buckets = len({file["bucket"] for file in manifest.files})
    console.line(f"files         {len(manifest.files)} for {buckets} buckets")
    for entry in manifest.inputs:
        console.line(f"input         {json.dumps(entry, sort_keys=True)}")
    for name, why in sorted(manifest.left_out.items()):
        console.line(f"left out      {name}: {why}")


def _times(time_range: list[int] | None) -> str:
    """The first and the last time, which are stored in milliseconds; Python's dates end with year 9999."""
    if not time_range:
        return "no events"
    try:
        ends = [datetime.datetime.fromtimestamp(time / 1000, datetime.UTC) for time in time_range]
    except (ValueError, OverflowError, OSError):
        return f"{time_range[0]} to {time_range[1]} ms since 1970 UTC"
    return " to ".join(f"{end:%Y-%m-%dT%H:%M:%S}Z" for end in ends)


def _print_checkpoint(path: Path, console: Console) -> None:
    from jobs.training.results import primary_metric

    document = json.loads((path / "state.json").read_text())
    state = document["train_state"]
    console.line(f"checkpoint    {path}")
    stored = document["config"]["data"]["requests"]
    metric = primary_metric(RequestConfig(**{key: stored[key] for key in ("task", "seen_items") if key in stored}))
    best = "not validated yet"
    if state["best_metric"] is not None:
        best = f"best: step {state['best_step']}, validation {metric} {state['best_metric']:.4f}"
    console.line(f"step          {state['step']} ({best})")
    console.line(f"trained on    {document['world_size']} ranks, manifest {document['manifest']}")
    console.line(f"tables        {', '.join('{name} {capacity} x {width}'.format(**t) for t in document['tables'])}")
    if grown := document.get("grown_from"):
        console.line(f"grown from    {grown['checkpoint']} ({grown['key']}), manifest {grown['manifest']}")
    if document.get("warm_start"):
        path = document["config"]["training"]["warm_start"]
        console.line(f"began from    {path} ({document['warm_start']}), {state['steps_before']} steps before its own")
    for entry in json.loads((path / "COMMIT").read_text())["files"]:
        console.line(f"file          {entry['name']}  {entry['bytes']:,} bytes  {entry['xxh64']}")
