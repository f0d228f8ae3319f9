"""Which user is in which global batch on which rank: pure arithmetic over (index, seed, epoch, config).

    row groups        A  B  C  D  E                permuted by (seed, epoch)
    windows of 2      [D  A] [C  E] [B]            users permuted within a window
    users             d1 a3 a1 d2 | e1 c2 ...
    global batches    [d1 a3 a1] [d2 e1] [c2 ...   longest runs whose cost fits batch_events
    dealt to 2 ranks   d1|a3 a1   ...              balanced cost

Every rank computes the whole order, so ranks agree without a collective; only `deal` depends on the number of ranks.
"""

from __future__ import annotations

import heapq

import numpy as np

from pipeline.shards.sequences import offsets_of


def epoch_order(group: np.ndarray, *, wanted: np.ndarray, window_row_groups: int, seed: int, epoch: int) -> np.ndarray:
    """User rows in the order of an epoch.

    group: [users] int64, the row group of each user. wanted: [users] bool, users that have requests.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
    num_groups = int(group.max(initial=-1)) + 1
    place_of_group = np.empty(num_groups, np.int64)
    place_of_group[generator.permutation(num_groups)] = np.arange(num_groups)
    # Draw for every user, wanted or not, so that a user's place does not depend on which other users are wanted.
    draw = generator.random(len(group))
    window = place_of_group[group] // window_row_groups
    order = np.lexsort((draw, window))
    return order[wanted[order]]


def cut_batches(cost: np.ndarray, *, batch_events: int) -> np.ndarray:
    """[batches + 1] offsets into the order: the longest runs with cost up to batch_events; a larger user is one run."""
    ends = np.cumsum(cost, dtype=np.int64)
    offsets = [0]
    while offsets[-1] < len(cost):
        done = ends[offsets[-1] - 1] if offsets[-1] else 0
        fitting = int(np.searchsorted(ends, done + batch_events, side="right"))
        offsets.append(max(offsets[-1] + 1, fitting))
    return np.array(offsets, np.int64)


def deal(cost: np.ndarray, *, world_size: int) -> np.ndarray:
    """[n] int64 rank of each user of a batch: by falling cost, each to the rank with the least cost so far (LPT)."""
    ranks = np.zeros(len(cost), np.int64)
    if world_size == 1:
        return ranks
    loads = [(0, rank) for rank in range(world_size)]
    for place in np.argsort(-cost, kind="stable"):
        load, rank = heapq.heappop(loads)
        ranks[place] = rank
        heapq.heappush(loads, (load + int(cost[place]), rank))
    return ranks


def batch_totals(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """[batches] the sum of the values in each batch."""
    return np.diff(offsets_of(values)[offsets])
