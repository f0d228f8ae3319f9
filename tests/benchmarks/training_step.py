"""python tests/benchmarks/training_step.py: one training step of SOLAR on long histories, and where its time goes.

A step as training runs it (TorchRec tables, DeepSpeed tower, loss, both optimizers) on one rank and one thread, on
random users of so many events with so many requests each. The parts are measured by clocks around the functions that
compute them, forward and backward; "rest of backward" holds the dense tower's and the fused update of the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# A script's own directory is on the path, the repository's root is not.
sys.path.insert(0, str(Path(__file__).parents[2]))

from jobs.cluster.parallel import ParallelConfig
from jobs.cluster.worker import quiet_libraries
from jobs.training.clock import StepClock
from jobs.training.dense_model import DenseModel
from jobs.training.job import TrainingConfig, TrainJob
from jobs.training.optimizers import OptimizerConfig
from jobs.training.step import ask, train_step
from jobs.training.tables import ShardedTables
from models import prefixes, svd_attention
from models.embeddings import ITEM_TABLE, TableSpec
from models.zoo import build_tower, tower_class
from pipeline.batches.batch import Batch
from pipeline.batches.loader_config import LoaderConfig
from pipeline.batches.requests import RequestConfig

ITEMS, CANDIDATES = 10_000, 17


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--users", type=int, default=8, help="of a step")
    parser.add_argument("--requests", type=int, default=64, help="of a user")
    parser.add_argument("--every", type=int, nargs="+", default=[16], help="checkpoint_every of the model")
    parser.add_argument("--model", default="solar")
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    torch.set_num_threads(1)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as store:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}/store", rank=0, world_size=1)
        for events in options.events:
            for every in options.every if options.model == "solar" else [None]:
                report(events, every, options)
        torch.distributed.destroy_process_group()


def report(events: int, every: int | None, options: argparse.Namespace) -> None:
    settings: dict[str, Any] = {"name": options.model, "time_features": False}
    if options.model == "solar":
        settings |= {"set_attention": False, "checkpoint_every": every}
    job = TrainJob(
        run_dir="",
        shards="",
        manifest=0,
        seed=1,
        model=settings,
        training=TrainingConfig(),
        requests=RequestConfig(),
        loader=LoaderConfig(),
        optimizer=OptimizerConfig(),
        parallel=ParallelConfig(num_workers=1),
        checkpoint=None,  # type: ignore[arg-type]
        facts={},
    )
    tables = ShardedTables(
        [TableSpec(name=ITEM_TABLE, capacity=ITEMS, width=64)], [], optimizer=job.optimizer, device="cpu"
    )
    tables.initialize(seed=1, std=0.02)
    torch.manual_seed(1)
    dense = DenseModel(build_tower(settings, num_features=0), optimizer=job.optimizer, parallel=job.parallel)
    batches = [batch(events, options, seed=seed) for seed in range(options.steps)]
    one_step(job, batches[0], tables, dense, step=0)
    clocks: dict[str, float] = defaultdict(float)
    with contextlib.ExitStack() as stack:
        for name, owner, function in parts(options.model):
            stack.enter_context(clocked(clocks, name, owner, function))
        stack.enter_context(clocked(clocks, "backward", dense, "backward"))
        stack.enter_context(clocked(clocks, "optimizer of the tower", dense, "end_step"))
        started = time.perf_counter()
        for step, each in enumerate(batches):
            one_step(job, each, tables, dense, step=step)
        seconds = (time.perf_counter() - started) / len(batches)
    clocks = {name: total / len(batches) for name, total in clocks.items()}
    inside = sum(clocks.get(name, 0.0) for name in ("Gram, backward", "running sums, backward", "eigh, backward"))
    clocks["rest of backward"] = clocks.pop("backward") - inside
    clocks["running sums, forward"] = clocks.get("running sums, forward", 0.0)
    clocks["Gram, forward"] = clocks.get("Gram, forward", 0.0) - clocks["running sums, forward"]
    clocks["rest of the tower, forward"] = clocks.pop("tower", 0.0) - sum(
        clocks.get(name, 0.0) for name in ("Gram, forward", "running sums, forward", "eigh, forward")
    )
    clocks["loss and everything else"] = seconds - sum(clocks.values())
    rate = options.users * events / seconds
    title = options.model if every is None else f"{options.model}, decomposed every {every}"
    print(
        f"\n{title}: {options.users} users x {events:,} events, {options.requests} requests of {CANDIDATES} each: "
        f"{1e3 * seconds:.0f} ms a step, {rate:,.0f} events/s"
    )
    for name, spent in sorted(clocks.items(), key=lambda item: -item[1]):
        if spent > 0:
            print(f"  {name:<28} {1e3 * spent:>8.1f} ms {spent / seconds:>6.1%}")


def one_step(job: TrainJob, batch: Batch, tables: ShardedTables, dense: DenseModel, *, step: int) -> None:
    asked = ask(job, batch, tables, num_items=ITEMS)
    train_step(job, asked, tables, dense, num_items=ITEMS, step=step, share=0.0, clock=StepClock())


def parts(model: str) -> Iterator[tuple[str, Any, str]]:
    yield "look-up, ids", ShardedTables, "ask"
    yield "look-up, rows", ShardedTables, "answer"
    yield "tower", tower_class(model), "forward"
    yield "Gram, forward", prefixes.Prefixes, "outer_sums"
    yield "Gram, backward", prefixes._LongProducts, "backward"
    yield "running sums, forward", prefixes._RunningSum, "forward"
    yield "running sums, backward", prefixes._RunningSum, "backward"
    yield "eigh, forward", svd_attention, "_eigh"
    yield "eigh, backward", svd_attention._StableEigh, "backward"


@contextlib.contextmanager
def clocked(clocks: dict[str, float], name: str, owner: Any, function: str) -> Iterator[None]:
    """Count the seconds inside `owner.function` while this context lasts."""
    original = owner.__dict__.get(function, getattr(owner, function))
    bare = original.__func__ if isinstance(original, staticmethod) else original

    def timed(*arguments: Any, **keywords: Any) -> Any:
        started = time.perf_counter()
        try:
            return bare(*arguments, **keywords)
        finally:
            clocks[name] += time.perf_counter() - started

    setattr(owner, function, staticmethod(timed) if isinstance(original, staticmethod) else timed)
    try:
        yield
    finally:
        setattr(owner, function, original)


def batch(events: int, options: argparse.Namespace, *, seed: int) -> Batch:
    """Users with random items, asked at every position if there are as many requests as events, else at random ones."""
    generator = torch.Generator().manual_seed(seed)
    users, asked = options.users, options.requests
    requests, candidates = users * asked, users * asked * CANDIDATES
    position = torch.randint(1, events + 1, (users, asked), generator=generator).sort(1).values
    if asked == events:
        position = torch.arange(events).expand(users, events)
    label = torch.zeros(requests, CANDIDATES)
    label[:, 0] = 1
    times = torch.arange(events).repeat(users)
    return Batch(
        user=torch.arange(users),
        event_offsets=torch.arange(users + 1) * events,
        event_item=torch.randint(2, ITEMS, (users * events,), generator=generator),
        event_time=times,
        event_action=torch.zeros(users * events, dtype=torch.long),
        event_label=torch.zeros(users * events, dtype=torch.long),
        request_user=torch.arange(users).repeat_interleave(asked),
        request_position=position.flatten(),
        request_time=torch.full((requests,), events),
        request_key=torch.arange(requests),
        user_feature_lengths=torch.zeros(users, 0, dtype=torch.long),
        user_feature_values=torch.zeros(0, dtype=torch.long),
        candidate_offsets=torch.arange(requests + 1) * CANDIDATES,
        candidate_item=torch.randint(2, ITEMS, (candidates,), generator=generator),
        candidate_label=label.flatten(),
        num_global_requests=requests,
    )


if __name__ == "__main__":
    main()
