"""python tests/benchmarks/training_scale.py [--events 1000 10000] [--ranks 2] [--rows 1 5]: what more ranks bring.

SOLAR of width 64 with a table of 100,000 items, random users with 64 requests of 17 candidates each, real gloo ranks of
one thread in the environment of a job's workers, ZeRO stage 1. Beside each other, in one run:

    joint   Solar's step: rows over the ranks (TorchRec), the tower's optimizer too (DeepSpeed), the next batch's ids
            sent while the tower computes; "without overlap" asks for each batch just before its step
    DDP     plain PyTorch (plain_pytorch.py): DistributedDataParallel, the whole table on every rank

1. Steps. weak: each rank has 8 users; strong: all ranks together have 8. Efficiency is the rate over that of as many
   single ranks. The variants take turns of 4 batches, the first turn is not measured; of a batch's turns the median
   counts, of batches the mean. "core ms" is what all ranks took of their cores. The parts are StepClock's, the mean
   rank's; "other" is above all waiting for the slowest rank's loss. DDP's "dense" holds its look-up and the exchange of
   all gradients. Then how far losses of the same global batches are apart: only where they agree in the first steps the
   times are of the same work. Later steps amplify rounding: DDP started with rows 6e-8 larger leaves itself as far.
2. Length balancing. Users of 100 to 10,000 events (log-normal) in global batches of 65,536 events and candidates, dealt
   by work as pipeline/batches/order.py does it, and in turn; "uneven" is the work of the fullest rank over the mean.
3. Memory. The most that a rank held before TorchRec and DeepSpeed were loaded, while a table of so many million rows
   was made and filled, and in steps with it.

Not measured: reading shards (batches are made before; see loader_speed.py), validation, checkpoints, Ray, and networks:
all ranks are on this machine. With more ranks than cores the efficiency says nothing.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

# A script's own directory is on the path, the repository's root is not.
sys.path.insert(0, str(Path(__file__).parents[2]))

from jobs.cluster.parallel import ParallelConfig
from jobs.cluster.session import quiet_environment
from jobs.training.clock import PARTS, StepClock
from jobs.training.dense_model import DenseModel
from jobs.training.job import TrainingConfig, TrainJob
from jobs.training.optimizers import OptimizerConfig
from jobs.training.step import AskedBatch, ask, train_step
from jobs.training.tables import ShardedTables
from models.embeddings import ITEM_TABLE, TableSpec
from models.zoo import build_tower
from pipeline.batches import order
from pipeline.batches.batch import Batch
from pipeline.batches.loader_config import LoaderConfig
from pipeline.batches.requests import RequestConfig
from pipeline.shards.sequences import offsets_of
from tests.benchmarks.plain_pytorch import Replicated
from tests.benchmarks.table_size import phase
from tests.support.ranks import run_ranks

ITEMS, WIDTH, STD, CANDIDATES, MAX_REQUESTS = 100_000, 64, 0.02, 17, 64
MODEL = {"name": "solar", "time_features": False, "set_attention": False, "dropout": 0.0}
USERS, BATCHES = 8, 4
COMPARED = 3 * BATCHES
"""Steps whose losses are compared."""
MEMORY_PHASES = ("before", "made, filled", "steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, nargs="+", default=[1_000, 10_000], help="of a user")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5, help=f"of {BATCHES} steps, for each variant")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 5], help="millions, of the tables of part 3")
    options = parser.parse_args()
    # What workers of a job get: above all malloc's settings, which ranks read at their start.
    quiet_environment()
    for events in options.events:
        show_steps(events, ranks=options.ranks, turns=options.turns)
    show_balance(ranks=options.ranks, turns=options.turns)
    show_memory(options.rows, ranks=options.ranks)


def show_steps(events: int, *, ranks: int, turns: int) -> None:
    print(f"\nSteps: users of {events:,} events")
    show("", "ranks", "users", "ms", "events/s", "efficiency", "core ms", *PARTS, "other")
    losses: dict[int, dict[str, np.ndarray]] = {}
    single: dict[str, float] = {}
    for world_size in (1, ranks):
        of_ranks = run_ranks(steps_of_rank, world_size, events, turns)
        for (name, users), first in of_ranks[0].items():
            found = [rank[name, users] for rank in of_ranks]
            seconds = seconds_of_step([rank["seconds"] for rank in found])
            parts = np.mean([np.median(rank["parts"], axis=0).mean(0) for rank in found], axis=0)
            rate = users * events / seconds
            efficiency = rate / world_size / single.setdefault(name.split(",")[0], rate)
            core_seconds = sum(seconds_of_step([rank["core_seconds"]]) for rank in found)
            cells = [f"{1e3 * each:.1f}" for each in (core_seconds, *parts, seconds - parts.sum())]
            scaling = "" if world_size == 1 else ": strong" if users == USERS else ": weak"
            label = f"{name}{scaling}"
            show(label, world_size, users, f"{1e3 * seconds:.1f}", f"{rate:,.0f}", f"{efficiency:.2f}", *cells)
            losses.setdefault(users, {})[f"{name} on {world_size}"] = np.array(first["losses"])
    print(f"  Losses: the largest relative difference in {BATCHES} and in {COMPARED} steps")
    for users, of_variant in losses.items():
        (first, expected), *others = of_variant.items()
        print(f"  {users} users, {first}: the loss falls from {expected[0]:.3f} to {expected[-1]:.3f}")
        for name, found in others:
            apart = np.abs(found / expected - 1)
            show(f"    {name}", f"{apart[:BATCHES].max():.1e}", f"{apart.max():.1e}")


def show_balance(*, ranks: int, turns: int) -> None:
    print("\nLength balancing: users of 100 to 10,000 events")
    show("dealt", "ranks", "ms", "events/s", "uneven", "worst")
    of_ranks = run_ranks(balance_of_rank, ranks, turns)
    for name in of_ranks[0]:
        seconds = seconds_of_step([rank[name]["seconds"] for rank in of_ranks])
        events = sum(rank[name]["events"] for rank in of_ranks) / BATCHES
        work = np.array([rank[name]["work"] for rank in of_ranks])
        uneven = work.max(0) / work.mean(0)
        cells = (f"{1e3 * seconds:.1f}", f"{events / seconds:,.0f}", f"{uneven.mean():.3f}", f"{uneven.max():.3f}")
        show(name, ranks, *cells)


def show_memory(millions: Sequence[int], *, ranks: int) -> None:
    print("\nMemory: the most GiB of a rank")
    show("", "ranks", "million rows", *MEMORY_PHASES)
    for rows, (name, variant) in itertools.product(millions, (("joint", Joint), ("DDP", replicated))):
        of_ranks = run_ranks(memory_of_rank, ranks, variant, rows * 1_000_000)
        show(name, ranks, rows, *(f"{max(rank[each][1] for rank in of_ranks):.2f}" for each in MEMORY_PHASES))


def show(name: str, *cells: object) -> None:
    print(f"  {name:<34}" + "".join(f"{cell!s:>12}" for cell in cells), flush=True)


def seconds_of_step(of_ranks: Sequence[np.ndarray]) -> float:
    """From the seconds [turns, batches] of each rank."""
    return float(np.median(np.max(of_ranks, axis=0), axis=0).mean())


def steps_of_rank(events: int, turns: int) -> dict[tuple[str, int], dict[str, Any]]:
    """By variant and users of a global batch: what `take_turns` tells."""
    world_size = dist.get_world_size()
    variants: dict[tuple[str, int], Joint | Replicated] = {}
    for users in sorted({USERS, USERS * world_size}, reverse=True):
        lengths = np.full(users, events)
        batches = [part_of(lengths, order.deal(lengths, world_size=world_size), seed=seed) for seed in range(BATCHES)]
        variants["joint", users] = Joint(batches)
        if world_size > 1:
            variants["joint, without overlap", users] = Joint(batches, overlap=False)
        variants["DDP", users] = replicated(batches)
    return take_turns(variants, turns)


def balance_of_rank(turns: int) -> dict[str, dict[str, Any]]:
    """By way of dealing: what `take_turns` tells, this rank's events in all batches, and its work in each."""
    rng, world_size = np.random.default_rng(0), dist.get_world_size()
    lengths = np.clip(np.exp(rng.normal(np.log(1000), 1.0, 1000)), 100, 10_000).astype(np.int64)
    offsets = order.cut_batches(work_of(lengths), batch_events=LoaderConfig().batch_events)[: BATCHES + 1]
    runs = [lengths[first:last] for first, last in itertools.pairwise(offsets)]
    ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "by work": lambda run: order.deal(work_of(run), world_size=world_size),
        "in turn": lambda run: np.arange(len(run)) % world_size,
    }
    batches = {
        name: [part_of(run, deal(run), seed=seed) for seed, run in enumerate(runs)] for name, deal in ways.items()
    }
    found = take_turns({name: Joint(each) for name, each in batches.items()}, turns)
    for name, each in batches.items():
        work = [batch.num_events + batch.num_candidates for batch in each]
        found[name] |= {"work": work, "events": sum(batch.num_events for batch in each)}
    return found


def memory_of_rank(variant: Callable[..., Joint | Replicated], rows: int) -> dict[str, tuple[float, float]]:
    """{phase: (seconds, most GiB resident meanwhile)}."""
    found: dict[str, tuple[float, float]] = {}
    lengths = np.full(USERS, 1000)
    before, made, steps = MEMORY_PHASES
    with phase(found, before):
        mine = order.deal(lengths, world_size=dist.get_world_size())
        batches = [part_of(lengths, mine, seed=seed, rows=rows) for seed in range(BATCHES)]
    with phase(found, made):
        training = variant(batches, rows=rows)
    with phase(found, steps):
        for _ in batches:
            training.step()
    return found


def take_turns(variants: Mapping[Any, Joint | Replicated], turns: int) -> dict[Any, dict[str, Any]]:
    """seconds and core_seconds [turns, batches], and parts [turns, batches, PARTS] of this rank; the first losses."""
    found = {name: {"seconds": [], "core_seconds": [], "parts": [], "losses": []} for name in variants}
    for turn in range(1 + turns):
        for name, training in variants.items():
            for _ in range(BATCHES):
                dist.barrier()
                training.clock.take()
                started, cost = time.perf_counter(), time.process_time()
                loss = training.step()
                if turn:
                    found[name]["seconds"].append(time.perf_counter() - started)
                    found[name]["core_seconds"].append(time.process_time() - cost)
                    found[name]["parts"].append(list(training.clock.take().values()))
                found[name]["losses"].append(loss)
    for training in variants.values():
        training.end()
    return {
        name: {
            "seconds": np.reshape(each["seconds"], (turns, BATCHES)),
            "core_seconds": np.reshape(each["core_seconds"], (turns, BATCHES)),
            "parts": np.reshape(each["parts"], (turns, BATCHES, len(PARTS))),
            "losses": each["losses"][:COMPARED],
        }
        for name, each in found.items()
    }


def work_of(lengths: np.ndarray) -> np.ndarray:
    """Events and candidates of each user, as the loader counts them."""
    return lengths + CANDIDATES * requests_of(lengths)


def requests_of(lengths: np.ndarray) -> np.ndarray:
    return np.minimum(lengths // 8, MAX_REQUESTS)


def part_of(lengths: np.ndarray, rank_of: np.ndarray, *, seed: int, rows: int = ITEMS) -> Batch:
    """This rank's users of a global batch: random items, asked at random moments. A user is the same on any rank."""
    mine = np.flatnonzero(rank_of == dist.get_rank())
    length, asked = lengths[mine], requests_of(lengths[mine])
    item, position, candidate = [], [], []
    for user in mine.tolist():
        rng = np.random.default_rng([seed, user])
        item.append(rng.integers(2, rows, lengths[user]))
        position.append(np.sort(rng.integers(1, lengths[user] + 1, requests_of(lengths[user]))))
        candidate.append(rng.integers(2, rows, CANDIDATES * requests_of(lengths[user])))
    events, requests = int(length.sum()), int(asked.sum())
    label = torch.zeros(requests, CANDIDATES)
    label[:, 0] = 1
    none = np.zeros(0, np.int64)
    return Batch(
        user=torch.from_numpy(mine),
        event_offsets=torch.from_numpy(offsets_of(length)),
        event_item=torch.from_numpy(np.concatenate([none, *item])),
        event_time=torch.zeros(events, dtype=torch.long),
        event_action=torch.zeros(events, dtype=torch.long),
        event_label=torch.zeros(events, dtype=torch.long),
        request_user=torch.arange(len(mine)).repeat_interleave(torch.from_numpy(asked)),
        request_position=torch.from_numpy(np.concatenate([none, *position])),
        request_time=torch.zeros(requests, dtype=torch.long),
        request_key=torch.arange(requests),
        user_feature_lengths=torch.zeros(len(mine), 0, dtype=torch.long),
        user_feature_values=torch.zeros(0, dtype=torch.long),
        candidate_offsets=torch.arange(requests + 1) * CANDIDATES,
        candidate_item=torch.from_numpy(np.concatenate([none, *candidate])),
        candidate_label=label.flatten(),
        num_global_requests=int(requests_of(lengths).sum()),
    )


def replicated(batches: Sequence[Batch], *, rows: int = ITEMS) -> Replicated:
    torch.manual_seed(1)
    tower = build_tower(MODEL, num_features=0)
    spec = TableSpec(name=ITEM_TABLE, capacity=rows, width=WIDTH)
    return Replicated(
        batches, tower=tower, table=spec, seed=1, std=STD, optimizer=OptimizerConfig(), training=TrainingConfig()
    )


class Joint:
    """Solar's training of these batches, again and again."""

    def __init__(self, batches: Sequence[Batch], *, rows: int = ITEMS, overlap: bool = True) -> None:
        self._job = TrainJob(
            run_dir="",
            shards="",
            manifest=0,
            seed=1,
            model=MODEL,
            training=TrainingConfig(),
            requests=RequestConfig(),
            loader=LoaderConfig(),
            optimizer=OptimizerConfig(),
            parallel=ParallelConfig(num_workers=dist.get_world_size(), zero_stage=1, overlap=overlap),
            checkpoint=None,  # type: ignore[arg-type]
            facts={},
        )
        self._batches, self._rows, self._done, self.clock = batches, rows, 0, StepClock()
        spec = TableSpec(name=ITEM_TABLE, capacity=rows, width=WIDTH)
        self._tables = ShardedTables([spec], [], optimizer=self._job.optimizer, device="cpu")
        self._tables.initialize(seed=1, std=STD)
        torch.manual_seed(1)
        tower = build_tower(MODEL, num_features=0)
        self._dense = DenseModel(tower, optimizer=self._job.optimizer, parallel=self._job.parallel)
        self._asked: AskedBatch | None = None

    def step(self) -> float:
        """Its loss. All ranks join."""
        asked = self._asked or self._ask(self._done)
        figures, self._asked = train_step(
            self._job, asked, self._tables, self._dense,
            num_items=self._rows, step=self._done, share=0.0, clock=self.clock, ask_next=self._ask_next,
        )  # fmt: skip
        self._done += 1
        return figures["loss"]

    def end(self) -> None:
        """What is under way arrives. All ranks join."""
        if self._asked is not None:
            self._asked.rows.receive()

    def _ask_next(self) -> AskedBatch | None:
        return self._ask(self._done + 1) if self._job.parallel.overlap else None

    def _ask(self, step: int) -> AskedBatch:
        with self.clock.part("data"):
            batch = self._batches[step % len(self._batches)]
        with self.clock.part("look_up"):
            return ask(self._job, batch, self._tables, num_items=self._rows)


if __name__ == "__main__":
    main()
