"""solar score MODEL_URI --build-states --shards DIR: stores a state of every user, so that serving needs no raw
histories.

    WORKSPACE/states/NAME/VERSION/00000003/    states for manifest 3 of the shards
        bucket-00000.parquet                   user_id, last_time, events, state (jobs/scorer/user_states.py)
        COMMIT                                 model's digest, manifest; name, size and checksum of each file

One task per bucket of users, in this process if there are few events; memory does not grow with the number of users.
Readers ignore the states until COMMIT exists, which is created atomically; after a crash the next run continues.
jobs/serving/stored_states.py reads them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.cluster.actor_pool import map_in_actors
from jobs.cluster.session import ClusterConfig, ray_session
from jobs.host.console import Console
from jobs.host.errors import UserError
from jobs.scorer.scorer import build_scorer_tower
from jobs.serving.stored_states import COMMIT, COMMIT_FORMAT, bucket_file, manifest_directory, read_commit
from jobs.serving.user_histories import UserHistories
from jobs.tracking.registry import RegisteredModel
from pipeline.prepare.staging import staging_directory
from pipeline.shards.dataset import Shards
from pipeline.shards.leases import lease
from pipeline.shards.sequences import UserEvents
from pipeline.storage import Store, absolute
from pipeline.system_errors import storing

EVENTS_PER_CHUNK = 1 << 18
"""Events of the users whose states are computed together (16 M float32 at width 64)."""
FEW_EVENTS = EVENTS_PER_CHUNK
"""Of no more events the states are built in this process: an actor's imports would take longer."""
USERS_PER_ROW_GROUP = 512
"""Reading the state of one user reads one row group: about 6 MB."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StatesBuilt:
    """The result of `build_states`."""

    directory: Path
    """Directory with the states for all manifests."""
    manifest: int
    """Manifest of the shards for which the states were built."""
    users: int
    bytes: int
    """Size of all files."""
    reused: bool
    """Whether the states existed already."""


def build_states(
    model: RegisteredModel,
    *,
    shards: str,
    manifest: int | None,
    out: Path,
    console: Console,
    cluster: ClusterConfig,
    parallel: int | None = None,
) -> StatesBuilt:
    """Store the state of every user of these shards, at a manifest (None = the latest); complete states are reused.

    UserError: the model needs raw histories, or the directory has states of another model or of other shards.
    """
    # Check that states of this model may be stored there.
    data = Shards.open(absolute(shards), number=manifest)
    refuse_models_without_states(model)
    _refuse_other_owner(out, model)
    identity = {
        "format": COMMIT_FORMAT,
        "digest": model.digest,
        "manifest": data.manifest.number,
        "manifest_fingerprint": data.manifest.fingerprint,
    }
    directory = str(manifest_directory(Path(absolute(str(out))), data.manifest.number))
    held = lease(
        data.path, number=data.manifest.number, command=f"building of states of {model.uri}",
        tell=console.teller("states"),
    )  # fmt: skip
    # Build them, one task per bucket, unless they are complete already.
    few = parallel is None and sum(file["events"] for file in data.manifest.files) <= FEW_EVENTS
    with held, console.stage("states") as stage:
        commit, reused = read_commit(directory), True
        if commit is None:
            built, elsewhere = [], dataclasses.replace(model, directory=model.directory.absolute())
            with contextlib.nullcontext() if few else ray_session(cluster), storing(directory):
                with staging_directory(directory) as staging:
                    opened = functools.partial(_opened, elsewhere, data, identity, directory, staging)
                    tasks = [{"bucket": bucket} for bucket in data.buckets]
                    for answer in map(opened(), tasks) if few else map_in_actors(opened, tasks, parallel=parallel):
                        built.append(answer)
                        stage.update(len(built), len(data.buckets), f"{sum(file['users'] for file in built):,} users")
                commit, reused = _commit(directory, built, identity=identity, data=data, model=model), False
        # Check the commit that is there now: another process may have been faster.
        _refuse_others(commit, identity, directory)
        users, size = commit["users"], sum(file["bytes"] for file in commit["files"])
        stage.result = f"{users:,} users, {size / max(1, users):,.0f} bytes each -> {directory}"
        if reused:
            stage.result = f"already there: {stage.result}"
    return StatesBuilt(directory=out, manifest=data.manifest.number, users=users, bytes=size, reused=reused)


def refuse_models_without_states(model: RegisteredModel) -> None:
    """UserError if the model needs raw histories, so that it has no states."""
    settings = model.settings
    if build_scorer_tower(settings["model"], num_features=len(settings["features"])).kept_events is None:
        raise UserError(
            f"{model.uri}: {settings['model']['name']} needs raw histories, it has no interests to store: score it "
            "with --shards alone"
        )


def _commit(
    directory: str, built: list[dict[str, Any]], *, identity: dict[str, Any], data: Shards, model: RegisteredModel
) -> dict[str, Any]:
    """Create COMMIT; returns its content, or that of another process that created it first."""
    commit = {
        **identity,
        "model": model.name,
        "version": model.version,
        "buckets": data.manifest.config["buckets"],
        "user_id": data.manifest.schema["id_types"]["user_id"],
        "users": sum(file["users"] for file in built),
        "files": sorted(built, key=lambda file: file["name"]),
    }
    content = (json.dumps(commit, indent=1, sort_keys=True) + "\n").encode()
    if not Store(directory).create(COMMIT, content):
        found = read_commit(directory)
        assert found is not None
        return found
    return commit


def _refuse_other_owner(out: Path, model: RegisteredModel) -> None:
    """UserError if the directory has states of another model: readers take the latest states, of whichever model."""
    for number in Store(str(out)).names():
        commit = read_commit(f"{out}/{number}", earlier=True) if number.isdigit() else None
        if commit is not None and commit["digest"] != model.digest:
            raise UserError(
                f"{out}: holds states of {commit['model']} version {commit['version']} (digest {commit['digest']}), "
                f"not of {model.uri}: name another --out"
            )


def _refuse_others(commit: dict[str, Any], identity: dict[str, Any], directory: str) -> None:
    """UserError if the commit has another model or other shards."""
    for key, value in identity.items():
        if commit[key] != value:
            raise UserError(f"{directory}: holds states of {key} {commit[key]}, not of {value}: name another --out")


def _opened(
    model: RegisteredModel, data: Shards, identity: dict[str, Any], directory: str, staging: str
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The function that builds the file of {"bucket": B} and returns its entry in COMMIT; called in each actor."""
    scorer = model.scorer()
    # The driver has computed the digest: the actor need not read every byte of the model again.
    scorer.digest = identity["digest"]
    histories = UserHistories(data, scorer)

    def answer(row: dict[str, Any]) -> dict[str, Any]:
        store, name = Store(directory), bucket_file(row["bucket"])
        users = _users_of(store, name, identity)
        if users is None:
            scratch = staging if store.is_local else None
            with storing(directory), tempfile.TemporaryDirectory(dir=scratch) as local:
                users = _write_bucket(f"{local}/{name}", row["bucket"], data, histories, scorer, identity)
                store.adopt(f"{local}/{name}", name)
        return {
            "name": name,
            "bucket": row["bucket"],
            "users": users,
            "bytes": store.size(name),
            "checksum": store.checksum(name),
        }

    return answer


def _users_of(store: Store, name: str, identity: dict[str, Any]) -> int | None:
    """Number of users in a complete file of an earlier run; None if there is none, or if it has other states."""
    if not store.exists(name):
        return None
    with store.open(name) as stream, pq.ParquetFile(stream) as parquet:
        metadata = parquet.metadata.metadata or {}
        same = metadata.get(b"solar.states") == _signed(identity)
        return parquet.metadata.num_rows if same else None


def _signed(identity: dict[str, Any]) -> bytes:
    return json.dumps(identity, sort_keys=True).encode()


def _write_bucket(
    file: str, bucket: int, data: Shards, histories: UserHistories, scorer: Any, identity: dict[str, Any]
) -> int:
    """Write the states of a bucket's users; returns the number of users."""
    user_type = pa.int64() if data.manifest.schema["id_types"]["user_id"] == "int64" else pa.large_string()
    schema = pa.schema(
        [
            pa.field("user_id", user_type),
            pa.field("last_time", pa.int64()),
            pa.field("events", pa.int64()),
            pa.field("state", pa.large_binary()),
        ]
    )
    num_users = 0
    # No compression: states look like random bits.
    with pq.ParquetWriter(file, schema.with_metadata({"solar.states": _signed(identity)}), compression="none") as out:
        for user_id, events in _chunks(data, bucket, min_label=histories.min_label):
            found = histories.of_events(events, known=np.ones(events.num_users, bool))
            lengths = found.lengths
            last = np.append(found.time, 0)[np.where(lengths > 0, found.offsets[1:] - 1, len(found.time))]
            states = pa.array(scorer.build_states(found), pa.large_binary())
            table = pa.table([user_id.cast(user_type), last, lengths, states], schema=schema)
            out.write_table(table, row_group_size=USERS_PER_ROW_GROUP)
            num_users += events.num_users
    return num_users


def _chunks(data: Shards, bucket: int, *, min_label: int) -> Iterator[tuple[pa.Array, UserEvents]]:
    """(ids, sequences) of the bucket's users, in chunks of limited size."""
    groups, users = data.groups_of(bucket), data.users_of(bucket).sort("group", "row")
    for group in groups:
        here = users.filter(users["group"] == group - groups.start)
        ids, events = here["user_id"].to_arrow(), data.read(group, min_label=min_label)
        row = here["row"].to_numpy()
        ends = np.cumsum(np.diff(events.offsets)[row])
        bounds = [0]
        while bounds[-1] < len(row):
            done = ends[bounds[-1] - 1] if bounds[-1] else 0
            fitting = int(np.searchsorted(ends, done + EVENTS_PER_CHUNK, side="right"))
            bounds.append(max(bounds[-1] + 1, min(fitting, bounds[-1] + USERS_PER_ROW_GROUP)))
        for first, last in itertools.pairwise(bounds):
            yield ids.slice(first, last - first), events.take(row[first:last])
