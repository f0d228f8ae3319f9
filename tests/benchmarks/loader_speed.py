"""python tests/benchmarks/loader_speed.py [--events 5] [--streaming PYTHON]: the loader beside plain reading.

A synthetic log (200 events a user, 50,000 items) is prepared in this process. Then, each in a process of its own with
one thread and warm files, the best of three epochs: pyarrow reads every column of the shard files (the limit); the
loader builds the batches of an epoch, without negatives, with 16 uniform ones, and after a tenth of the log came in a
second ingest; and, where PYTHON has mosaicml-streaming (https://github.com/mosaicml/streaming), its StreamingDataset
reads the same sequences and joins as many users to a batch. Events/s, and the share of the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# A script's own directory is on the path, the repository's root is not.
sys.path.insert(0, str(Path(__file__).parents[2]))

USERS_A_BATCH = 64
EPOCHS = 3

STREAMING = """
import json, sys
import time
import numpy as np
import pyarrow.parquet as pq
from pathlib import Path
from streaming import MDSWriter, StreamingDataset
shards, out, users, epochs = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
with MDSWriter(out=out, columns={"item": "ndarray:int64", "timestamp": "ndarray:int64"}) as writer:
    for file in sorted(Path(shards, "shards").glob("*.parquet")):
        for group in range(pq.ParquetFile(file).num_row_groups):
            table = pq.ParquetFile(file).read_row_group(group)
            lists = {name: table[name].combine_chunks() for name in ("item", "timestamp")}
            offsets = np.asarray(lists["item"].offsets)
            flat = {name: np.asarray(values.values) for name, values in lists.items()}
            for first, last in zip(offsets[:-1], offsets[1:]):
                writer.write({name: values[first:last] for name, values in flat.items()})
best = 0.0
dataset = StreamingDataset(local=out, shuffle=True, batch_size=users)
for _ in range(epochs):
    started, events, batch = time.perf_counter(), 0, []
    for sample in dataset:
        batch.append(sample)
        if len(batch) == users:
            events += len(np.concatenate([s["item"] for s in batch]))
            np.concatenate([s["timestamp"] for s in batch])
            batch = []
    best = max(best, events / (time.perf_counter() - started))
print(json.dumps(best))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=float, default=5, help="millions")
    parser.add_argument("--streaming", default=None, help="an interpreter that has mosaicml-streaming")
    parser.add_argument("--step", nargs=3, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(step(*options.step)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        prepare_shards(root, int(options.events * 1e6))
        rows = {"pyarrow, every column": run("limit", root / "whole", 0)}
        rows["loader, no negatives"] = run("loader", root / "whole", 0)
        rows["loader, 16 negatives"] = run("loader", root / "whole", 16)
        rows["loader, no negatives, two ingests"] = run("loader", root / "grown", 0)
        if options.streaming:
            arguments = [root / "whole", root / "mds", USERS_A_BATCH, EPOCHS]
            rows["mosaicml-streaming"] = output([options.streaming, "-W", "ignore", "-c", STREAMING, *arguments])
    limit = rows["pyarrow, every column"]
    print(f"{'':<36} {'events/s':>14} {'of the limit':>14}")
    for name, speed in rows.items():
        print(f"{name:<36} {speed:>14,.0f} {speed / limit:>14.2f}")


def prepare_shards(root: Path, events: int) -> None:
    import numpy as np
    import polars as pl

    from pipeline import build
    from tests.support.serial import without_ray

    without_ray(setattr)
    rng = np.random.default_rng(0)
    table = {
        "user_id": rng.integers(0, events // 200, events),
        "item_id": rng.integers(0, 50_000, events),
        "timestamp": np.sort(rng.integers(1_600_000_000, 1_640_000_000, events)),
    }
    (root / "log").mkdir()
    log, first = pl.DataFrame(table), events * 9 // 10
    for number, part in enumerate((log[:first], log[first:])):
        part.write_parquet(root / f"log/{number}.parquet", row_group_size=1_000_000)
        build.prepare(str(root / "log"), str(root / "grown"), config=build.PrepareConfig())
    build.prepare(str(root / "log"), str(root / "whole"), config=build.PrepareConfig())


def run(kind: str, shards: Path, negatives: int) -> float:
    return output([sys.executable, __file__, "--step", kind, shards, negatives])


def output(command: list) -> float:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "POLARS_MAX_THREADS", "MKL_NUM_THREADS", "ARROW_NUM_THREADS"), "1")
    done = subprocess.run(
        [str(part) for part in command], env=os.environ | threads, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def step(kind: str, path: str, negatives: str) -> float:
    """Events a second in the best epoch."""
    import pyarrow
    import pyarrow.parquet as pq
    import torch

    from pipeline.batches.loader import TrainLoader
    from pipeline.batches.loader_config import LoaderConfig
    from pipeline.batches.requests import RequestConfig
    from pipeline.shards.dataset import Shards

    pyarrow.set_cpu_count(1)
    torch.set_num_threads(1)
    shards = Shards.open(path)
    for entry in shards.manifest.entries():
        shards.check(entry)
    requests = RequestConfig(max_history=4096, max_requests=4096, num_negatives=int(negatives))
    loader = TrainLoader(shards, requests=requests, loader=LoaderConfig(batch_events=USERS_A_BATCH * 500), seed=0)
    best = 0.0
    for epoch in range(EPOCHS):
        started, events = time.perf_counter(), 0
        if kind == "limit":
            for entry in shards.manifest.files:
                table = pq.read_table(f"{path}/{entry['name']}", use_threads=False)
                events += len(table["item"].combine_chunks().values)
        else:
            for batch in loader.epoch(epoch):
                events += len(batch.event_item)
        best = max(best, events / (time.perf_counter() - started))
    return best


if __name__ == "__main__":
    main()
