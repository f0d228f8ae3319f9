"""Removes what old nights left and nothing needs: runs with their checkpoints, evaluations, states of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.config.run_config import RunConfig
from jobs.host.console import Console
from jobs.nightly.journal import past_nights
from jobs.nightly.steps import TrainedChallenger
from jobs.tracking.champions import needed_versions
from jobs.training.checkpoint import remove_committed
from pipeline.events import DataError
from pipeline.prepare.garbage import collect
from pipeline.shards.manifest import current_manifest
from pipeline.storage import absolute

_STATES_PER_NIGHT = 3
"""States of the data that a night may add: by the ingest of its day, of a late day, and by a compaction."""


def collect_old(config: RunConfig, root: Path, client: Any, console: Console) -> None:
    """Remove what is older than `nightly.keep` nights, except what the registry refers to."""
    keep = config.nightly.keep
    # Files that Ray wrote during the evaluation of the champion.
    remove_committed(Path(config.workspace) / "runs" / f"{config.name}-champion")
    versions = needed_versions(client, config.registered_model)
    checkpoints = (version.tags.get("solar.checkpoint") for version in versions.values())
    needed = {Path(path).parent.resolve() for path in checkpoints if path}
    for night in past_nights(root)[:-keep]:
        for folder in ("export", "champion"):
            remove_committed(night.directory / folder)
        trained = night.read(TrainedChallenger)
        if trained is not None and trained.run_dir.resolve() not in needed:
            remove_committed(trained.run_dir)
    try:
        collected = collect(absolute(config.shards_dir), keep=keep * _STATES_PER_NIGHT, command="solar nightly")
        for lease in collected.held:
            console.line(f"{'night':<12} kept: {lease}")
    except DataError as error:
        console.line(f"{'night':<12} old states of the data are kept this time: {error}")

    _collect_states(config, set(versions))


def _collect_states(config: RunConfig, versions: set[str]) -> None:
    """Keep only the latest user states of each needed version, and only if none of their users can have been forgotten
    since."""
    manifest = current_manifest(absolute(config.shards_dir))
    oldest = manifest.oldest if manifest else 1
    for directory in (Path(config.workspace) / "states" / config.registered_model).glob("*"):
        by_age = sorted(found for found in directory.glob("????????") if (found / "COMMIT").exists())
        for found in by_age if directory.name not in versions else by_age[:-1]:
            remove_committed(found)
        if by_age and int(by_age[-1].name) < oldest:
            remove_committed(by_age[-1])
