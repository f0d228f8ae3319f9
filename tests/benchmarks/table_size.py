"""python tests/benchmarks/table_size.py [--rows 1 20] [--ranks 2]: what an item table of millions of rows costs.

Row-wise Adagrad, width 64, a table of that many million rows over the ranks, one thread each. For each size: seconds
and the most memory that a rank held while the table was made and filled, a step (50,000 distinct random rows looked up
by each rank, a small tower, backward with the fused update, both optimizers), a checkpoint written (bytes/s of all
ranks) and read back. "its rows" is what a rank's rows and their optimizer state take: the memory beside it shows
whether anybody holds a whole table. While it is read back the mapped file counts too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A script's own directory is on the path, the repository's root is not.
sys.path.insert(0, str(Path(__file__).parents[2]))

from jobs.cluster.parallel import ParallelConfig
from jobs.training.checkpoint import TrainState, latest_checkpoint, load_tables
from jobs.training.checkpoint_writer import CheckpointWriter
from jobs.training.dense_model import DenseModel
from jobs.training.job import CheckpointConfig
from jobs.training.optimizers import OptimizerConfig
from jobs.training.tables import ShardedTables
from models.embeddings import ITEM_TABLE, TableSpec
from tests.support.ranks import run_ranks

WIDTH, LOOKED_UP, STEPS = 64, 50_000, 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 20], help="millions")
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    columns = ("million rows", "its rows GiB", "phase", "seconds", "a rank's most GiB", "GiB/s")
    print("  ".join(f"{column:>18}" for column in columns))
    for millions in options.rows:
        with tempfile.TemporaryDirectory() as scratch:
            ranks = run_ranks(measure, options.ranks, millions * 1_000_000, scratch)
        own = max(rank["own"] for rank in ranks)
        for phase in ("begin", "make and fill", "step", "write", "read"):
            seconds, peak = (max(rank[phase][place] for rank in ranks) for place in (0, 1))
            speed = f"{sum(rank['own'] for rank in ranks) / seconds:.2f}" if phase in ("write", "read") else ""
            cells = (millions, f"{own:.2f}", phase, f"{seconds:.3f}", f"{peak:.2f}", speed)
            print("  ".join(f"{cell:>18}" for cell in cells), flush=True)


def measure(rows: int, directory: str) -> dict[str, Any]:
    """On a rank: {phase: (seconds, most GiB resident meanwhile)}, and the GiB of its own rows."""
    found: dict[str, Any] = {}
    optimizer = OptimizerConfig(warmup_steps=0)
    with phase(found, "begin"):
        torch.manual_seed(0)
        tower = torch.nn.Linear(WIDTH, 1)
    with phase(found, "make and fill"):
        specs = [TableSpec(name=ITEM_TABLE, capacity=rows, width=WIDTH)]
        tables = ShardedTables(specs, [], optimizer=optimizer, device="cpu")
        tables.initialize(seed=1, std=0.02)
    dense = DenseModel(tower, optimizer=optimizer, parallel=ParallelConfig(num_workers=dist.get_world_size()))
    generator, seconds = torch.Generator().manual_seed(dist.get_rank()), []
    with phase(found, "step"):
        for _ in range(STEPS):
            asked = torch.randint(rows, (LOOKED_UP,), generator=generator).unique()
            started = time.perf_counter()
            tables.begin_step(optimizer.sparse_lr)
            dense.backward(dense.model(tables.look_up(asked)[0]).pow(2).mean())
            dense.end_step()
            tables.end_step()
            seconds.append(time.perf_counter() - started)
    found["step"] = (statistics.median(seconds), found["step"][1])
    with phase(found, "write"):
        config = CheckpointConfig(asynchronous=False)
        CheckpointWriter(Path(directory), tables=tables, dense=dense, facts={}, config=config).begin(
            TrainState(step=STEPS)
        )
    with phase(found, "read"):
        path = latest_checkpoint(Path(directory))
        assert path is not None
        load_tables(path, tables.shards())
    parts = [part for shard in tables.shards() for part in shard.tensors.values()]
    return found | {"own": sum(part.numel() * part.element_size() for part in parts) / 2**30}


@contextmanager
def phase(found: dict[str, Any], name: str) -> Iterator[None]:
    dist.barrier()
    # Resets the kernel's mark of the most memory that was resident.
    Path("/proc/self/clear_refs").write_text("5")
    started = time.perf_counter()
    yield
    dist.barrier()
    found[name] = (time.perf_counter() - started, most_resident_gib())


def most_resident_gib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 2**20


if __name__ == "__main__":
    main()
