"""python tests/benchmarks/loader_balance.py [SHARDS]: how evenly work falls on ranks, and how well users are shuffled.

Without SHARDS: 20,000 synthetic users, lengths log-normal (median 50, some of 50,000 events), 200 row groups. Balance:
the largest rank's events over the mean rank's in a global batch, over the batches of an epoch, as the loader deals them
and dealt in turn. Shuffling: the share of neighbours in the order of an epoch that come from the same row group, and
how many groups a batch has users of, for windows of so many row groups; the last line is a perfect shuffle.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np

# A script's own directory is on the path, the repository's root is not.
sys.path.insert(0, str(Path(__file__).parents[2]))

from pipeline.batches import order
from pipeline.shards.dataset import Shards

USERS, GROUPS, MAX_HISTORY = 20_000, 200, 1024
BATCH_EVENTS = 65_536
WORLD_SIZES = (2, 4, 8, 16)
WINDOWS = (1, 8, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="?", help="sequence shards; default: synthetic users")
    parser.add_argument("--batch_events", type=int, default=BATCH_EVENTS)
    options = parser.parse_args()
    if options.shards:
        index = Shards.open(options.shards).index
        group, events = index.group, index.events
    else:
        rng = np.random.default_rng(0)
        group = np.sort(rng.integers(0, GROUPS, USERS))
        events = np.clip(np.exp(rng.normal(np.log(50), 1.8, USERS)), 1, 50_000).astype(np.int64)
    cost = np.minimum(events, MAX_HISTORY)
    print(f"{len(events):,} users, {events.sum():,} events, longest {events.max():,}, {group.max() + 1} row groups\n")
    show_balance(group, cost, batch_events=options.batch_events)
    show_shuffling(group, cost, batch_events=options.batch_events)


def show_balance(group: np.ndarray, cost: np.ndarray, *, batch_events: int) -> None:
    users = epoch_order(group, window=8)
    offsets = order.cut_batches(cost[users], batch_events=batch_events)
    # The last batch of an epoch has what is left.
    runs = [cost[users[first:last]] for first, last in itertools.pairwise(offsets[:-1])]
    print(f"{'ranks':>8}  {'mean':>8} {'99 %':>8} {'worst':>8}   {'in turn: mean':>14} {'worst':>8}   largest / mean")
    for world_size in WORLD_SIZES:
        dealt = np.array([uneven(run, order.deal(run, world_size=world_size), world_size) for run in runs])
        in_turn = np.array([uneven(run, np.arange(len(run)) % world_size, world_size) for run in runs])
        cells = (dealt.mean(), np.quantile(dealt, 0.99), dealt.max())
        print(f"{world_size:>8}  " + " ".join(f"{cell:>8.4f}" for cell in cells), end="   ")
        print(f"{in_turn.mean():>14.4f} {in_turn.max():>8.4f}")
    print()


def show_shuffling(group: np.ndarray, cost: np.ndarray, *, batch_events: int) -> None:
    print(f"{'window':>8}  {'same group':>10} {'groups a batch':>14}")
    rows = {str(window): epoch_order(group, window=window) for window in WINDOWS}
    rows["all"] = epoch_order(group, window=int(group.max()) + 1)
    rows["perfect"] = np.random.default_rng(1).permutation(len(group))
    for name, users in rows.items():
        of_user = group[users]
        offsets = order.cut_batches(cost[users], batch_events=batch_events)
        groups = [len(np.unique(of_user[first:last])) for first, last in itertools.pairwise(offsets)]
        print(f"{name:>8}  {np.mean(of_user[1:] == of_user[:-1]):>10.4f} {np.mean(groups):>14.1f}")


def epoch_order(group: np.ndarray, *, window: int) -> np.ndarray:
    return order.epoch_order(group, wanted=np.ones(len(group), bool), window_row_groups=window, seed=0, epoch=0)


def uneven(cost: np.ndarray, rank: np.ndarray, world_size: int) -> float:
    loads = np.bincount(rank, weights=cost, minlength=world_size)
    return float(loads.max() / loads.mean())


if __name__ == "__main__":
    main()
