"""solar compact, forget, gc: maintenance of a data set that grows for years."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.cluster.session import ClusterConfig, ray_session
from jobs.data.prepare import progress_of
from jobs.data.remains import clean_states, remains
from jobs.host.console import Console
from jobs.host.errors import NOT_FOUND
from pipeline.build import compact, forget
from pipeline.prepare.forgetting import clean_output, rows_of_users
from pipeline.prepare.garbage import collect
from pipeline.prepare.traces import listed_users, traces
from pipeline.prepare.user_list import few_of, is_table, read_users, sort_out
from pipeline.shards.dataset import Shards
from pipeline.shards.leases import current_leases
from pipeline.shards.manifest import Manifest
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
    path: str, users: str, console: Console, *, column: str | None, workspace: str, outputs: Sequence[str],
    missing_ok: bool, cluster: ClusterConfig, verbose: bool = False,
) -> int:  # fmt: skip
    """Remove the users that a file names from the shards, from stored states and from results of `solar score`.

    Returns 0, or NOT_FOUND if the data set has never had some of them and this is not `missing_ok`; the others are
    removed nonetheless.
    """
    # Check the list and the results before any work.
    data = Shards.open(path)
    listed = read_users(users, column=column, integers=has_integer_users(data))
    known, readers = sort_out(listed.ids, data=data), current_leases(path)
    for output in outputs:
        rows_of_users(output, listed.ids)

    # Remove the users; the commit of the data set comes last.
    cleaned = {"rows of results": 0, "stored states": 0}

    def clean_elsewhere() -> None:
        cleaned["rows of results"] = sum(clean_output(output, listed.ids) for output in outputs)
        cleaned["stored states"] = clean_states(workspace, listed.ids, data=path)

    with ray_session(cluster, verbose=verbose), console.stage("forget") as stage:
        after = forget(absolute(path), listed.ids, elsewhere=clean_elsewhere, progress=progress_of(stage))
        events = data.manifest.counts["accepted"] - after.counts["accepted"]
        also = "".join(f", {count:,} {what}" for what, count in cleaned.items() if count)
        stage.result = (
            f"{len(known.found):,} of {len(listed.ids):,} users were found, {events:,} events{also}; "
            f"manifest {after.number} in {path}"
        )

    # Tell what else is to be known.
    for lease in readers if known.found else ():
        console.line(f"{'ends':<12} {lease}, which was removed")
    if listed.empty:
        what = "cells without an id (unquoted NULL, NaN, None and \\N are no id)" if is_table(users) else "empty lines"
        console.line(f"{'ignored':<12} {listed.empty:,} {what} of {users}")
    if known.forgotten:
        console.line(f"{'before':<12} {len(known.forgotten):,} of them were named to an earlier `solar forget`")
    _tell_what_is_left(after, console)
    if known.unknown:
        console.line(
            f"{'not found':<12} {len(known.unknown):,} of the ids were never in the data set: {few_of(known.unknown)}; "
            "later logs cannot bring them"
        )
    return NOT_FOUND if known.unknown and not missing_ok else 0


def check_forgotten(
    path: str, users: str, console: Console, *, column: str | None, workspace: str, outputs: Sequence[str]
) -> int:
    """Search the data set, the workspace and the results for the users; returns 1 if anything is left, else 0.

    The list is read twice, by the code of the removal and by other code: a difference is told, too.
    """
    integers = has_integer_users(Shards.open(path))
    removal = read_users(users, column=column, integers=integers).ids
    ids = listed_users(users, column=column, integers=integers)
    found = [*traces(path, ids), *remains(workspace, ids, data=path, users=users)]
    found += [f"{output}: some rows" for output in outputs if rows_of_users(output, ids).any()]
    if others := sorted(ids.symmetric_difference(removal)):
        found.append(f"{users}: the removal reads other ids there: {few_of(others)}")
    for trace in found:
        console.line(f"still there: {trace}")
    if not found:
        where = f"the data set and in {workspace}" + (" and the results" if outputs else "")
        console.line(f"nothing is left of these {len(ids):,} users in {where}")
    return 1 if found else 0


def collect_garbage(path: str, console: Console, *, keep: int) -> None:
    """Remove all but the latest `keep` manifests, and the files that only the removed ones name."""
    removed = collect(path, keep=keep)
    for lease in removed.held:
        console.line(f"kept          {lease}: it stays until that ends, {lease.expires} at the latest")
    numbers = f"manifests {removed.manifests[0]} to {removed.manifests[-1]}" if removed.manifests else "no manifest"
    console.line(f"removed       {numbers}, {removed.files:,} files, {removed.bytes / 2**20:,.1f} MiB in {path}")


def has_integer_users(data: Shards) -> bool:
    return data.manifest.schema["id_types"]["user_id"] == "int64"


def _tell_what_is_left(manifest: Manifest, console: Console) -> None:
    logs = [entry["name"] for entry in manifest.inputs]
    shown = ", ".join(logs[:3]) + (f" and {len(logs) - 3} more" if len(logs) > 3 else "")
    for what, text in (
        (
            "not covered",
            f"the log from which the shards were prepared ({shown}), and what it was imported from; later ingests drop "
            "these users' events",
        ),
        (
            "",
            "weights learned from these users, in checkpoints and registered models: `solar run RECIPE --name NEW`, "
            "then `solar promote MODEL --version N --why TEXT`, or the next nights",
        ),
        (
            "",
            "results of `solar score` that --outputs did not name (--verify finds those in the workspace), and backups",
        ),
    ):
        console.line(f"{what:<12} {text}")
