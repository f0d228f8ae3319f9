"""The staging directory of one run, in which its tasks exchange files: tables, and rows divided by bucket."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import secrets
from collections.abc import Iterable, Iterator

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.shards.dataset import bucket_of
from pipeline.storage import SCRATCH, Store, is_of_dead_process, owner

STAGING = "staging-"
"""Prefix of a staging directory; `owner` of its run follows."""


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Fragment:
    """The rows of one user bucket in a file of the staging directory."""

    file: str
    """Name of the Arrow file in the staging directory."""
    batch: int
    """Which record batch of the file holds them."""
    bucket: int
    rows: int
    """Number of rows."""


@contextlib.contextmanager
def staging_directory(out: str) -> Iterator[str]:
    """A directory inside `out` that exists during the run; what dead processes of this machine left is removed."""
    store, existed = Store(out), Store(out).exists()
    remove_leftovers(out)
    name = f"{STAGING}{owner()}-{secrets.token_hex(4)}"
    try:
        store.write(f"{name}/run", b"", durable=False)
        yield f"{out.rstrip('/')}/{name}"
    finally:
        store.remove(name)
        if not existed and store.exists() and not store.names() and not store.unfinished():
            store.remove("")


def other_runs(out: str) -> list[str]:
    """Staging directories of runs that may still write in `out`: all but those of dead processes of this machine."""
    found = [name for name in Store(out).names() if name.startswith(STAGING)]
    return [name for name in found if not is_of_dead_process(name, prefix=STAGING)]


def remove_leftovers(out: str) -> None:
    """Remove the folders with unfinished files that dead processes of this machine left in `out`."""
    store = Store(out)
    for name in store.names() + store.unfinished():
        if any(is_of_dead_process(name, prefix=prefix) for prefix in (STAGING, SCRATCH)):
            store.remove(name)


def write_fragments(store: Store, name: str, rows: pl.DataFrame, *, buckets: int) -> list[Fragment]:
    """Write one Arrow file with one record batch per user bucket: a bucket's task then reads only its own batches."""
    rows = rows.with_columns(bucket_of(rows["user_id"], buckets=buckets).alias("bucket"))
    fragments, sink = [], io.BytesIO()
    writer = None
    for batch, part in enumerate(rows.sort("bucket", maintain_order=True).partition_by("bucket")):
        table = part.drop("bucket").to_arrow(compat_level=pl.CompatLevel.oldest()).combine_chunks()
        writer = writer or pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd"))
        writer.write_batch(table.to_batches()[0])
        fragments.append(Fragment(file=name, batch=batch, bucket=part["bucket"].item(0), rows=part.height))
    assert writer is not None
    writer.close()
    store.write(name, sink.getvalue(), durable=False)
    return fragments


def read_fragments(store: Store, fragments: Iterable[Fragment]) -> list[pl.DataFrame]:
    """The rows of each fragment, in the order of files and batches."""
    return [_read_fragment(store, fragment) for fragment in sorted(fragments)]


def write_table(store: Store, name: str, table: pl.DataFrame) -> None:
    sink = io.BytesIO()
    pq.write_table(table.to_arrow(compat_level=pl.CompatLevel.oldest()), sink, compression="zstd")
    store.write(name, sink.getvalue(), durable=False)


def read_table(store: Store, name: str) -> pl.DataFrame:
    return pl.DataFrame(pq.read_table(io.BytesIO(store.read(name))))


def _read_fragment(store: Store, fragment: Fragment) -> pl.DataFrame:
    with store.open(fragment.file) as stream:
        return pl.DataFrame(pa.ipc.open_file(stream).get_batch(fragment.batch))
