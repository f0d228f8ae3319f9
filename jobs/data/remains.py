"""What a workspace holds of users beside the data set: stored states, and results of `solar score`.

WORKSPACE/states/MODEL/VERSION/00000003/bucket-00000.parquet    a row per user (jobs/serving/build_states.py)
any Parquet file with the footer of `solar score` and a column user_id
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.serving.build_states import USERS_PER_ROW_GROUP
from jobs.serving.stored_states import COMMIT
from jobs.training.checkpoint import remove_committed
from pipeline.prepare.staging import STAGING
from pipeline.shards.manifest import manifest_numbers, read_manifest
from pipeline.shards.removals import removals
from pipeline.storage import Store

_SIGNED, _RESULT = b"solar.states", b"solar.digest"
_PARQUET = b"PAR1"


def clean_states(workspace: str, users: Collection[str], *, data: str) -> int:
    """Remove these users from the stored states of this data set; returns how many states were removed.

    COMMIT goes first and comes back last: readers never see states without their right checksums. States that another
    command left unfinished are removed whole.
    """
    wanted, own, removed = set(users), _fingerprints(data), 0
    for directory, files in _states(workspace):
        theirs = {file: num for file in files if _fingerprint(file) in own and (num := _count(file, wanted))}
        if not theirs:
            continue
        removed += sum(theirs.values())
        commit = directory / COMMIT
        if not commit.exists():
            remove_committed(directory)
            continue
        document = json.loads(commit.read_text())
        commit.unlink()
        for file in theirs:
            _drop_rows(file, wanted)
        store = Store(str(directory))
        for entry in document["files"]:
            if directory / entry["name"] in theirs:
                entry["users"] -= theirs[directory / entry["name"]]
                entry |= {"bytes": store.size(entry["name"]), "checksum": store.checksum(entry["name"])}
        document["users"] = sum(entry["users"] for entry in document["files"])
        store.create(COMMIT, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())
    return removed


def remains(workspace: str, ids: Collection[str], *, data: str, users: str) -> list[str]:
    """What a workspace still holds of these users, one line per place; whichever data set it is from.

    `data` and `users`: the data set and the list as the command names them.
    """
    wanted, found = set(ids), []
    for directory, files in _states(workspace):
        if left := sum(_count(file, wanted) for file in files):
            advice = _advice(directory, files, workspace=workspace, data=data, users=users)
            found.append(f"{directory}: states of {left} of them{advice}")
    for path in _files(Path(workspace)):
        if path.name.endswith(".partial") or path.parent.name.startswith(STAGING):
            found.append(f"{path}: left by a killed `solar score`; remove it if no command is running")
        elif _is_result(path) and (left := _count(path, wanted)):
            found.append(f"{path}: {left} rows of them; clean it with --outputs")
    return found


def _advice(directory: Path, files: list[Path], *, workspace: str, data: str, users: str) -> str:
    """From which data set states were built, and how users go from them; `forget` cleans those of its own alone."""
    built_from = {_fingerprint(file) for file in files}
    if built_from & _fingerprints(data):
        return "; remove it, and build states again"
    for other in sorted(Path(workspace).glob("shards/*")):
        if built_from & _fingerprints(str(other)):
            command = shlex.join(["solar", "forget", str(other), "--users", users])
            return f", built from {other}: remove them with `{command}`"
    return (
        f", built from another data set, which is not in {workspace}/shards: remove them with `solar forget` on that, "
        f"or remove {directory}"
    )


def _states(workspace: str) -> Iterator[tuple[Path, list[Path]]]:
    """(directory of the states for one manifest, its files with states)."""
    for directory in sorted(Path(workspace).glob("states/*/*/????????")):
        yield directory, sorted(directory.rglob("bucket-*.parquet"))


def _files(workspace: Path) -> Iterator[Path]:
    """All files of a workspace, without its data sets and stored states, which are read in their own ways."""
    for folder, folders, names in os.walk(workspace):
        if "manifests" in folders or Path(folder) == workspace / "states":
            folders.clear()
            continue
        folders.sort()
        yield from (Path(folder) / name for name in sorted(names))


def _is_result(path: Path) -> bool:
    """Whether a file is a result of `solar score` with a column user_id."""
    try:
        with path.open("rb") as stream:
            if stream.read(4) != _PARQUET:
                return False
        with pq.ParquetFile(path) as parquet:
            return _RESULT in (parquet.metadata.metadata or {}) and "user_id" in parquet.schema_arrow.names
    except (OSError, pa.ArrowInvalid):
        return False


def _count(file: Path, wanted: set[str]) -> int:
    """How many rows of a Parquet file are about these users."""
    with pq.ParquetFile(file) as parquet:
        batches = parquet.iter_batches(columns=["user_id"])
        return sum(str(user) in wanted for batch in batches for user in batch.column(0).to_pylist())


def _fingerprints(data: str) -> set[str]:
    """Fingerprints of the data set's states, of those that are there and of those whose removal is recorded."""
    known: set[str | None] = set()
    for number in manifest_numbers(Store(data)):
        manifest = read_manifest(data, number=number)
        known |= {manifest.fingerprint, manifest.parent}
    known |= {fingerprint for removal in removals(data) for fingerprint in removal.manifests.values()}
    return {fingerprint for fingerprint in known if fingerprint}


def _fingerprint(file: Path) -> str | None:
    """Fingerprint of the manifest for which a file of states was built."""
    signed: Any = (pq.read_metadata(file).metadata or {}).get(_SIGNED)
    return json.loads(signed)["manifest_fingerprint"] if signed else None


def _drop_rows(file: Path, wanted: set[str]) -> None:
    """Rewrite a file of states without these users."""
    unfinished = file.with_suffix(".partial")
    with (
        pq.ParquetFile(file) as parquet,
        pq.ParquetWriter(unfinished, parquet.schema_arrow, compression="none") as writer,
    ):
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group)
            stays = [str(user) not in wanted for user in table["user_id"].to_pylist()]
            writer.write_table(table.filter(pa.array(stays)), row_group_size=USERS_PER_ROW_GROUP)
    unfinished.replace(file)
