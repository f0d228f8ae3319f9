"""The one file that `solar score` leaves: whole, with what it says about itself in its footer, or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.host.errors import UserError

CANDIDATES_PER_ROW_GROUP = 1 << 20


class ResultFile:
    """A Parquet file that appears under its name when it is complete."""

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
            raise UserError(f"{self._path}: {error.strerror}: name a file that can be written") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        self._partial.unlink(missing_ok=True)

    def write(self, rows: pa.RecordBatch) -> None:
        self._waiting.append(rows)
        self._num_waiting += len(rows.column("scores").values)
        if self._num_waiting >= CANDIDATES_PER_ROW_GROUP:
            self._flush()

    def publish(self, facts: dict[str, str]) -> None:
        """Close the file with these facts in its footer and give it its name."""
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
    """What the result says about itself: pq.read_metadata(FILE).metadata."""
    return {f"solar.{key}": str(value) for key, value in facts.items()}
