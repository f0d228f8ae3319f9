"""solar score MODEL_URI --requests IN.parquet --out OUT.parquet: a registered model -> scores and rankings.

    rows of the input --Ray Data actors, each with the model--> one file per part --driver, in input order--> the result

Histories are in the requests, or are found by user_id in stored states (build_states.py) or sequence shards. Candidates
are in the requests, or are the whole catalogue. The result has one row per request, in input order: all columns that
are not read as history, `candidates` best first (equal scores: in the order in which they were given, or of the rows of
the catalogue) and `scores`, float32 logits. An input of one part is scored in this process, without Ray.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from jobs.cluster.actor_pool import map_in_actors
from jobs.cluster.session import ClusterConfig, ray_session
from jobs.host.console import Console, Stage
from jobs.host.errors import UserError
from jobs.serving.build_states import refuse_models_without_states
from jobs.serving.model_rows import ModelRows
from jobs.serving.ranking import Ranking, ScoreConfig, ScoreCounts
from jobs.serving.request_files import Part, RequestFile, Requests, Sources
from jobs.serving.stored_states import StoredUsers, find_states
from jobs.serving.user_histories import UserHistories
from jobs.tracking.registry import RegisteredModel
from jobs.training.item_counting import count_items
from models.item_counters import ItemCounters
from models.prior import PriorModel
from pipeline.prepare.staging import staging_directory
from pipeline.shards.dataset import Shards
from pipeline.shards.leases import lease
from pipeline.storage import absolute
from pipeline.system_errors import storing

OTHER_FORMATS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".xlsx")
"""Endings that promise something else than the result's format."""
ROWS_PER_PART = 4096
"""Most requests of a task: seconds to minutes of work."""
SCORES_PER_TASK = 1 << 23
"""About the most scores of a task that ranks the whole catalogue: some 20 s of SOLAR on one core, then the bar moves.
"""


def score(
    model: RegisteredModel,
    config: ScoreConfig,
    console: Console,
    *,
    cluster: ClusterConfig | None = None,
    parallel: int | None = None,
) -> ScoreCounts:
    """Score every request; the result file appears only when it is complete. UserError, DataError: a mistake in the
    input.

    `parallel`: number of actors, each with the model in memory; None = one per core.
    """
    # Check the options and find the states before any work.
    out = Path(config.out)
    if out.suffix.lower() in OTHER_FORMATS:
        raise UserError(f"--out {out}: the result is Parquet: name it {out.with_suffix('.parquet')}")
    if out.exists() and not config.overwrite:
        raise UserError(f"{out}: exists already: name another --out, or add --overwrite")
    counts = ScoreCounts()
    with contextlib.ExitStack() as stack:
        requests = stack.enter_context(contextlib.closing(Requests(Path(config.requests))))
        stage = stack.enter_context(console.stage("score"))
        requests.refuse_as_result(out)
        _check_options(requests, config)
        states = _states(model, config, console)
        data = stack.enter_context(_shards(model, config, console))
        counters = _counters(model, data)
        parts = requests.parts(_rows_per_part(model, requests))
        # Score one part here, several parts in actors.
        facts = {"model": model.name, "version": model.version, "digest": model.digest}
        if counters is not None and data is not None:
            facts["counters"] = f"manifest {data.manifest.number} ({data.manifest.fingerprint})"
        started = time.monotonic()
        if len(parts) == 1:
            batches = PartScorer(model, config, states, data, counters).batches(parts[0], counts)
        else:
            # Absolute paths: actors may run in another directory.
            elsewhere = dataclasses.replace(model, directory=model.directory.absolute())
            opened = functools.partial(PartScorer, elsewhere, config, states, data, counters)
            batches = _scored_in_actors(
                opened, parts, counts, stage, out=out, cluster=cluster or ClusterConfig(), parallel=parallel
            )
        # Write the result in input order, with the counts in its footer.
        with storing(str(out)), contextlib.closing(batches):
            first = next(batches)
            with ResultFile(out, first.schema.with_metadata(footer(facts))) as result:
                result.write(first)
                for rows in batches:
                    result.write(rows)
                    stage.update(counts.requests, requests.num_rows, f"{counts.candidates:,} candidates")
                result.publish(footer(dataclasses.asdict(counts)))
        seconds = time.monotonic() - started
        stage.result = f"{counts.requests:,} requests, {counts.requests / seconds:,.1f} requests/s -> {out}"
    return counts


def print_counts(counts: ScoreCounts, console: Console) -> None:
    for title, value, note in (
        ("requests", counts.requests, ""),
        ("candidates", counts.candidates, f"{counts.unknown_candidates:,} unknown to the model"),
        ("history", counts.history_events, f"events, {counts.unknown_history_items:,} of unknown items"),
        ("cold", counts.cold, f"requests without a history, {counts.unknown_users:,} of unknown users"),
        ("truncated", counts.truncated, "histories longer than max_history: the latest events were read"),
        ("user values", counts.user_values, f"of user features, {counts.unknown_user_values:,} unknown to the model"),
        *_actions_line(counts),
        *_states_line(counts),
    ):
        console.line(f"{title:<12} {value:>12,}  {note}".rstrip())


def _actions_line(counts: ScoreCounts) -> list[tuple[str, int, str]]:
    if not counts.unknown_actions:
        return []
    return [("actions", counts.unknown_actions, "of events in the requests are unknown to the model: read as none")]


def _states_line(counts: ScoreCounts) -> list[tuple[str, int, str]]:
    if not counts.from_states and not counts.without_state:
        return []
    return [("states", counts.from_states, f"requests from stored states, {counts.without_state:,} without one")]


def _rows_per_part(model: RegisteredModel, requests: Requests) -> int:
    if "candidates" in requests.schema.names:
        return ROWS_PER_PART
    num_items = pq.read_metadata(model.directory / "items.parquet").num_rows
    return min(ROWS_PER_PART, max(1, SCORES_PER_TASK // max(1, num_items)))


def _scored_in_actors(
    opened: Callable[[], PartScorer],
    parts: list[Part],
    counts: ScoreCounts,
    stage: Stage,
    *,
    out: Path,
    cluster: ClusterConfig,
    parallel: int | None,
) -> Generator[pa.RecordBatch, None, None]:
    """The result's rows in input order, from files that actors write. A file is read and removed when all earlier ones
    have been; `counts` includes all finished parts, also those not yet yielded."""
    total = sum(part.num_rows for part in parts)
    with ray_session(cluster), staging_directory(str(out.absolute().parent)) as staging:
        rows = [dataclasses.asdict(part) | {"directory": staging} for part in parts]
        waiting: dict[int, str] = {}
        following = 0
        for answer in map_in_actors(opened, rows, parallel=parallel):
            counts.add(answer["counts"])
            stage.update(counts.requests, total, f"{counts.candidates:,} candidates")
            waiting[answer["number"]] = answer["file"]
            while following in waiting:
                yield from read_part(waiting.pop(following))
                following += 1
        assert following == len(parts)


def _states(model: RegisteredModel, config: ScoreConfig, console: Console) -> StoredUsers | None:
    """The states that the config names. UserError: they are of another model, or neither states nor shards exist."""
    if config.states is None:
        return None
    refuse_models_without_states(model)
    states = find_states(model, absolute(config.states))
    if states is None and config.shards is None:
        raise UserError(
            f"--states {config.states}: has no complete states of {model.uri}: build them with --build-states, "
            "or give --shards to read raw histories"
        )
    if states is None:
        console.line(f"{'states':<12} no complete states at {config.states}: raw histories are read")
    return states


@contextlib.contextmanager
def _shards(model: RegisteredModel, config: ScoreConfig, console: Console) -> Iterator[Shards | None]:
    """The data set that the config names, at the state that is the latest now: all parts read that one, and during the
    block `solar gc` keeps it. None if the config names none."""
    if config.shards is None:
        yield None
        return
    data = Shards.open(absolute(config.shards))
    command = f"scoring of {config.requests} with {model.uri}"
    with lease(data.path, number=data.manifest.number, command=command, tell=console.teller("score")):
        yield data


def _counters(model: RegisteredModel, data: Shards | None) -> dict[str, Tensor] | None:
    """The counters of the data set's items, for a model with a prior. None: those of the model's registration are read,
    or none."""
    if data is None or not model.settings["model"].get("prior"):
        return None
    scorer = model.scorer()
    assert isinstance(scorer.tower, PriorModel)
    counters = count_items(
        data,
        min_label=scorer.settings["min_label"],
        evidence=scorer.tower.counters.training_R.numpy(),
        row_of_item=torch.from_numpy(ModelRows(scorer, data.vocabulary).item),
    )
    return counters.tensors()


def _check_options(requests: Requests, config: ScoreConfig) -> None:
    given = "candidates" in requests.schema.names
    if not given and config.top_k is None:
        raise UserError(
            f"{requests.path}: column 'candidates' is missing: add it, or rank the whole catalogue with --top_k N"
        )
    if not given and config.states is not None and not config.keep_seen:
        raise UserError(
            "--states: states do not record which items a user has seen: rank the whole catalogue with --keep_seen, "
            "give candidates, or omit --states"
        )
    if given and config.keep_seen:
        raise UserError("--keep_seen: is only for a ranking of the whole catalogue, but the requests have candidates")


class PartScorer:
    """Scores parts: `batches` yields the result's rows of a part, a call writes them to a file."""

    def __init__(
        self, model: RegisteredModel, config: ScoreConfig, states: StoredUsers | None, data: Shards | None,
        counters: dict[str, Tensor] | None,
    ) -> None:  # fmt: skip
        """`counters`: those of the data's items, if not those of the model's registration are read."""
        self._config = config
        self._scorer = model.scorer()
        if counters is not None and isinstance(self._scorer.tower, PriorModel):
            evidence_R = self._scorer.tower.counters.training_R
            self._scorer.tower.counters = ItemCounters.from_tensors(counters, training_R=evidence_R)
        # The driver has computed the digest: do not read every byte of the model again.
        self._scorer.digest = model.digest
        self._sources = Sources(
            states=states,
            shards=UserHistories(data, self._scorer) if data else None,
            states_asked=config.states is not None,
        )

    def batches(self, part: Part, counts: ScoreCounts) -> Generator[pa.RecordBatch, None, None]:
        """The result's rows of a part, in order, in at least one batch; `counts` includes the rows yielded so far."""
        path = Path(part.file)
        ranking = Ranking(self._scorer, self._config, path=path)
        with contextlib.closing(RequestFile(path)) as requests:
            for block in requests.blocks(self._scorer, self._sources, part=part):
                yield ranking.of(block, counts)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write a part's rows to DIRECTORY/part-NUMBER.arrow; returns {"number", "file", "counts"}."""
        part = Part(**{name: row[name] for name in Part.__dataclass_fields__})
        file, counts, writer = f"{row['directory']}/part-{part.number:08d}.arrow", ScoreCounts(), None
        try:
            for rows in self.batches(part, counts):
                writer = writer or pa.ipc.new_file(file, rows.schema, options=pa.ipc.IpcWriteOptions(compression="lz4"))
                writer.write_batch(rows)
        finally:
            if writer is not None:
                writer.close()
        return {"number": part.number, "file": file, "counts": dataclasses.asdict(counts)}


def read_part(file: str) -> Iterator[pa.RecordBatch]:
    """The rows of a part's file, which is removed at the end."""
    with pa.OSFile(file) as stream:
        part = pa.ipc.open_file(stream)
        for number in range(part.num_record_batches):
            yield part.get_batch(number)
    Path(file).unlink()


CANDIDATES_PER_ROW_GROUP = 1 << 20
"""Least number of candidates in a row group of the result, except in the last one."""


class ResultFile:
    """A Parquet file that gets its final name when it is complete."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path, self._schema = path, schema
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._waiting: list[pa.RecordBatch] = []
        self._num_waiting = 0

    def __enter__(self) -> ResultFile:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._partial, self._schema, compression="zstd")
        except OSError as error:
            self._partial.unlink(missing_ok=True)
            raise UserError(f"{self._path}: {error.strerror}: name a writable file") from error
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._writer.close()
        finally:
            self._partial.unlink(missing_ok=True)

    def write(self, rows: pa.RecordBatch) -> None:
        self._waiting.append(rows)
        self._num_waiting += len(rows.column("scores").values)
        if self._num_waiting >= CANDIDATES_PER_ROW_GROUP:
            self._flush()

    def publish(self, facts: dict[str, str]) -> None:
        """Close the file with these facts in its footer and rename it to its final name."""
        self._flush()
        self._writer.add_key_value_metadata(facts)
        self._writer.close()
        os.replace(self._partial, self._path)

    def _flush(self) -> None:
        table = pa.Table.from_batches([rows.cast(self._schema) for rows in self._waiting], schema=self._schema)
        if table.num_rows:
            self._writer.write_table(table, row_group_size=table.num_rows)
        self._waiting, self._num_waiting = [], 0


def footer(facts: dict[str, Any]) -> dict[str, str]:
    """The facts as metadata of the result's footer: pq.read_metadata(FILE).metadata."""
    return {f"solar.{key}": str(value) for key, value in facts.items()}
