"""Part of the requests of `solar score`, scored: the work of one process, which opens model and histories once."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.ranking import Ranking, ScoreConfig, ScoreCounts
from jobs.score_input import Part, RequestFile, Sources, UserHistories
from jobs.stored_users import StoredUsers
from jobs.tracking.registry import RegisteredModel
from pipeline.shards.dataset import Shards


class PartScorer:
    """Scores parts: `batches` hands their rows out, a call writes them to a file."""

    def __init__(self, model: RegisteredModel, config: ScoreConfig, states: StoredUsers | None) -> None:
        self._config = config
        self._scorer = model.scorer()
        # The driver has read every byte for it.
        self._scorer.digest = model.digest
        self._sources = Sources(
            states=states,
            shards=UserHistories(Shards.open(config.shards), self._scorer) if config.shards else None,
            states_asked=config.states is not None,
        )

    def batches(self, part: Part, counts: ScoreCounts) -> Generator[pa.RecordBatch, None, None]:
        """The result's rows of a part, in order, at least one batch; `counts` follow them."""
        path = Path(part.file)
        ranking = Ranking(self._scorer, self._config, path=path)
        with contextlib.closing(RequestFile(path)) as requests:
            for block in requests.blocks(self._scorer, self._sources, part=part):
                yield ranking.of(block, counts)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write the part to DIRECTORY/part-NUMBER.arrow; {"number", "file", "counts"}."""
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
    """The rows of a part's file, which is gone afterwards."""
    with pa.OSFile(file) as stream:
        part = pa.ipc.open_file(stream)
        for number in range(part.num_record_batches):
            yield part.get_batch(number)
    Path(file).unlink()
