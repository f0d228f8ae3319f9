"""solar compact, forget, gc: maintenance of a data set that grows for years."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.cluster.session import ClusterConfig, ray_session
from jobs.data.prepare import progress_of
from jobs.host.console import Console
from pipeline.build import compact, forget
from pipeline.prepare.forgetting import clean_output, read_users, traces
from pipeline.prepare.garbage import collect
from pipeline.shards.dataset import Shards
from pipeline.storage import absolute


def compact_shards(path: str, console: Console, *, cluster: ClusterConfig, verbose: bool = False) -> None:
    """Merge the files of every bucket into one file."""
    before = Shards.open(path).manifest
    with ray_session(cluster, verbose=verbose), console.stage("compact") as stage:
        after = compact(absolute(path), progress=progress_of(stage))
        found = before.counts["accepted"] - after.counts["accepted"]
        stage.result = f"{len(before.files):,} files -> {len(after.files):,}, manifest {after.number} in {path}"
        if found:
            stage.result += f"; {found:,} events were repetitions of old ones and no longer count as accepted"


def forget_users(
    path: str, users: str, console: Console, *, outputs: Sequence[str], cluster: ClusterConfig, verbose: bool = False
) -> None:
    """Remove the users that a file names from the shards and from results of `solar score`."""
    ids = read_users(users)
    before = Shards.open(path).manifest
    with ray_session(cluster, verbose=verbose), console.stage("forget") as stage:
        after = forget(absolute(path), ids, progress=progress_of(stage))
        removed = sum(clean_output(output, ids) for output in outputs)
        stage.result = (
            f"{before.users - after.users:,} of {len(ids):,} users were found, "
            f"{before.counts['accepted'] - after.counts['accepted']:,} events; manifest {after.number} in {path}"
            + (f"; {removed:,} rows of {len(outputs)} result files" if outputs else "")
        )
    logs = [entry["name"] for entry in after.inputs]
    shown = ", ".join(logs[:3]) + (f" and {len(logs) - 3} more" if len(logs) > 3 else "")
    for what, text in (
        ("not covered", f"the raw logs ({shown}) and their event logs; later ingests drop these users' events"),
        ("", "weights learned from these users, in checkpoints and registered models: train and register again"),
        ("", "results of `solar score` that --outputs did not name, and backups"),
    ):
        console.line(f"{what:<12} {text}")


def check_forgotten(path: str, users: str, console: Console, *, outputs: Sequence[str]) -> int:
    """Search the data set and the results for the users; returns 1 if anything is left, else 0."""
    found = traces(path, read_users(users), outputs=outputs)
    for trace in found:
        console.line(f"still there: {trace}")
    if not found:
        console.line("nothing is left of these users in the data set" + (" and the results" if outputs else ""))
    return 1 if found else 0


def collect_garbage(path: str, console: Console, *, keep: int) -> None:
    """Remove all but the latest `keep` manifests, and the files that only the removed ones name."""
    removed = collect(path, keep=keep)
    numbers = f"manifests {removed.manifests[0]} to {removed.manifests[-1]}" if removed.manifests else "no manifest"
    console.line(f"removed       {numbers}, {removed.files:,} files, {removed.bytes / 2**20:,.1f} MiB in {path}")
