"""Files that tasks of one prepare hand each other in its staging directory: tables, and rows cut by bucket."""

from __future__ import annotations

import io

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.shards import bucket_of
from pipeline.storage import Store


def write_fragments(store: Store, name: str, rows: pl.DataFrame, *, buckets: int) -> list[list]:
    """One Arrow file, one record batch a bucket of user_id: a bucket's task then reads only its own batches.

    Returns [[file, batch, bucket, rows], ...].
    """
    rows = rows.with_columns(bucket_of(rows["user_id"], buckets=buckets).alias("bucket"))
    fragments, sink = [], io.BytesIO()
    writer = None
    for batch, part in enumerate(rows.sort("bucket", maintain_order=True).partition_by("bucket")):
        table = part.drop("bucket").to_arrow(compat_level=pl.CompatLevel.oldest()).combine_chunks()
        writer = writer or pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd"))
        writer.write_batch(table.to_batches()[0])
        fragments.append([name, batch, int(part["bucket"][0]), part.height])
    assert writer is not None
    writer.close()
    store.write(name, sink.getvalue(), durable=False)
    return fragments


def read_fragments(store: Store, fragments: list[list]) -> list[pl.DataFrame]:
    """The rows of each fragment, in the order of files and batches."""
    return [_read_fragment(store, name, batch) for name, batch, *_ in sorted(fragments)]


def write_table(store: Store, name: str, table: pl.DataFrame) -> None:
    sink = io.BytesIO()
    pq.write_table(table.to_arrow(compat_level=pl.CompatLevel.oldest()), sink, compression="zstd")
    store.write(name, sink.getvalue(), durable=False)


def read_table(store: Store, name: str) -> pl.DataFrame:
    return pl.DataFrame(pq.read_table(io.BytesIO(store.read(name))))


def _read_fragment(store: Store, name: str, batch: int) -> pl.DataFrame:
    with store.open(name) as stream:
        return pl.DataFrame(pa.ipc.open_file(stream).get_batch(batch))
