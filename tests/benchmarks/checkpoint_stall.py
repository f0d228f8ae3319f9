"""python tests/benchmarks/checkpoint_stall.py [--rows 1 20] [--ranks 2]: how long training waits for a checkpoint.

SOLAR's tower with an item table of that many million rows (width 64, row-wise Adagrad) over the ranks, one thread
each; a step looks 50,000 random rows up on each rank. For each size, the slowest rank's seconds:

    copy     the same bytes copied into memory that is there already: what a step has to wait for at least
    waiting  checkpoint.asynchronous false: the step waits until everything is written and synced
    first    asynchronous
    later    asynchronous, each of the later ones (the median of so many)
    write    from there to COMMIT, beside training, and GiB/s of all ranks
    steps    the median step alone, and while a checkpoint is written
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A script's own directory is on the path, the repository's root is not.
sys.path.insert(0, str(Path(__file__).parents[2]))

from jobs.cluster.parallel import ParallelConfig
from jobs.training.checkpoint import TrainState
from jobs.training.checkpoint_writer import CheckpointWriter
from jobs.training.dense_model import DenseModel
from jobs.training.job import CheckpointConfig
from jobs.training.optimizers import OptimizerConfig
from jobs.training.tables import ShardedTables
from models.embeddings import ITEM_TABLE, TableSpec
from models.zoo import build_tower
from tests.support.ranks import run_ranks

WIDTH, LOOKED_UP, LATER = 64, 50_000, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 20], help="millions")
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    columns = ("million rows", "GiB", "copy", "waiting", "first", "later", "write", "GiB/s", "step", "step meanwhile")
    print("  ".join(f"{column:>14}" for column in columns))
    for millions in options.rows:
        with tempfile.TemporaryDirectory() as scratch:
            ranks = run_ranks(measure, options.ranks, millions * 1_000_000, scratch)
        found = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
        gib = found["bytes"] / 2**30
        seconds = [found[name] for name in ("copy", "waiting", "first", "later", "write")]
        steps = [found[name] for name in ("step", "step meanwhile")]
        cells = [f"{millions}", f"{gib:.2f}", *(f"{each:.3f}" for each in seconds), f"{gib / found['write']:.2f}"]
        print("  ".join(f"{cell:>14}" for cell in [*cells, *(f"{each:.3f}" for each in steps)]), flush=True)


def measure(rows: int, directory: str) -> dict[str, float]:
    optimizer = OptimizerConfig(warmup_steps=0)
    torch.manual_seed(0)
    tower = build_tower({"name": "solar"}, num_features=0)
    specs = [TableSpec(name=ITEM_TABLE, capacity=rows, width=WIDTH)]
    tables = ShardedTables(specs, [], optimizer=optimizer, device="cpu")
    tables.initialize(seed=1, std=0.02)
    dense = DenseModel(tower, optimizer=optimizer, parallel=ParallelConfig(num_workers=dist.get_world_size()))
    generator, state = torch.Generator().manual_seed(dist.get_rank()), TrainState()

    def step() -> float:
        asked = torch.randint(rows, (LOOKED_UP,), generator=generator).unique()
        started = time.perf_counter()
        tables.begin_step(optimizer.sparse_lr)
        moved = sum(parameter.sum() for parameter in tower.parameters() if parameter.requires_grad)
        dense.backward(tables.look_up(asked)[0].pow(2).mean() + 0 * moved)
        dense.end_step()
        tables.end_step()
        state.step += 1
        return time.perf_counter() - started

    told: list[dict[str, Any]] = []

    def writer(*, asynchronous: bool) -> CheckpointWriter:
        config = CheckpointConfig(keep=1, asynchronous=asynchronous)
        return CheckpointWriter(
            Path(directory), tables=tables, dense=dense, facts={}, config=config,
            tell=lambda **figures: told.append(figures),
        )  # fmt: skip

    found = {"copy": copy_seconds(tables), "step": statistics.median(step() for _ in range(20))}
    with writer(asynchronous=False) as waiting:
        waiting.begin(state)
    meanwhile = []
    with writer(asynchronous=True) as beside:
        for _ in range(1 + LATER):
            step()
            dist.barrier()
            beside.begin(state)
            count = len(told)
            while len(told) == count:
                meanwhile.append(step())
                beside.settle()
    stalls = [figures["stall_seconds"] for figures in told]
    found |= {"waiting": stalls[0], "first": stalls[1], "later": statistics.median(stalls[2:])}
    found |= {"write": statistics.median(figures["write_seconds"] for figures in told[2:])}
    return found | {"bytes": told[0]["bytes"], "step meanwhile": statistics.median(meanwhile)}


def copy_seconds(tables: ShardedTables) -> float:
    """All ranks at once, the median of five, into memory that is there already."""
    parts = [part for shard in tables.shards() for part in shard.tensors.values()]
    buffers, seconds = [torch.zeros_like(part) for part in parts], []
    for _ in range(5):
        dist.barrier()
        started = time.perf_counter()
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.copy_(part)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
