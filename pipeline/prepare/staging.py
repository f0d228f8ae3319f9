"""The staging directory of one run, and the files its tasks hand each other there: tables, and rows cut by bucket."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import socket
from collections.abc import Iterator

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.shards.dataset import bucket_of
from pipeline.storage import Store

_STAGING = "staging-"


@contextlib.contextmanager
def staging_directory(out: str) -> Iterator[str]:
    """A directory inside `out` for the time of a run; those of processes that died here are removed."""
    store, existed = Store(out), Store(out).exists()
    alive = other_runs(out)
    for name in store.names():
        if name.startswith(_STAGING) and name not in alive:
            store.remove(name)
    name = f"{_STAGING}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        store.write(f"{name}/run", b"", durable=False)
        yield f"{out.rstrip('/')}/{name}"
    finally:
        store.remove(name)
        if not existed and store.exists() and not store.names():
            store.remove("")


def other_runs(out: str) -> list[str]:
    """Staging directories of runs that may still write in `out`: all but those of dead processes of this machine."""
    ours = f"{_STAGING}{socket.gethostname()}-"
    found = [name for name in Store(out).names() if name.startswith(_STAGING)]
    return [name for name in found if not name.startswith(ours) or _is_alive(name.removeprefix(ours).partition("-")[0])]


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


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
