"""Synthetic log of long histories -> event log. synthetic_model.py has the equations and the true probabilities.

    form events        user_id, item_id, timestamp
    form impressions   the same, label (1 = clicked) and request_id (equal for candidates shown together)

Items have `topic`. Blocks of users are simulated in parallel, a few at a time, and written in order; the files do not
depend on the number of processes.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import numpy as np
import polars as pl

from pipeline.sources.event_log import EventLogWriter, Imported, find_event_log, write_event_log
from pipeline.sources.synthetic_model import simulate
from pipeline.sources.synthetic_world import SyntheticConfig, World, build_world

MODEL_VERSION = 1
"""Increased when the same configuration gives other events."""
_AHEAD = 2
"""Most blocks per process that are submitted and not yet written."""
_BLOCKS_WORTH_A_PROCESS = 4
"""Fewest blocks for which one more process pays: it takes about 1 s to start, a block takes 0.25 s."""

Columns = dict[str, np.ndarray]


def import_synthetic(
    out: str, *, config: SyntheticConfig = SyntheticConfig(), progress: Callable[[str, int, int], None] | None = None
) -> Imported:
    """Simulate the event log `out`. DataError when `out` has other content."""
    options = {name: value for name, value in dataclasses.asdict(config).items() if name != "processes"}
    source = {"source": "synthetic", "model_version": MODEL_VERSION, **options}
    if existing := find_event_log(out, source=source):
        return existing
    report = progress or (lambda stage, done, total: None)

    def fill(writer: EventLogWriter) -> None:
        world = build_world(config)
        num_blocks = len(world.blocks) - 1
        for done, columns in enumerate(_simulated(world, num_blocks)):
            report("import", done, num_blocks)
            writer.add_events(pl.DataFrame(columns))
        writer.add_items(item_table(world))
        report("import", num_blocks, num_blocks)

    return write_event_log(out, source=source, fill=fill)


def block_columns(world: World, number: int) -> Columns:
    """The log's columns for a block: one row per click, or (form impressions) one row per candidate."""
    block = simulate(world, number)
    if block.shown is None:
        return {"user_id": block.user, "item_id": block.clicked, "timestamp": block.time}
    size = block.shown.shape[1]
    first_request = int(world.turns[: world.blocks[number]].sum())
    requests = first_request + np.arange(len(block.user))
    return {
        "user_id": np.repeat(block.user, size),
        "item_id": block.shown.ravel(),
        "timestamp": np.repeat(block.time, size),
        "label": (block.shown == block.clicked[:, None]).ravel().astype(np.int8),
        "request_id": np.repeat(requests, size),
    }


def item_table(world: World) -> pl.DataFrame:
    """item_id and topic."""
    topics = pl.Series([f"topic {topic}" for topic in range(world.config.topics)])
    return pl.DataFrame({"item_id": np.arange(world.config.items), "topic": topics[world.topic[world.group]]})


def _simulated(world: World, num_blocks: int) -> Iterator[Columns]:
    """Every block's columns, in order."""
    cores = min(len(os.sched_getaffinity(0)), num_blocks // _BLOCKS_WORTH_A_PROCESS)
    processes = min(world.config.processes or max(cores, 1), num_blocks)
    if processes == 1:
        yield from (block_columns(world, number) for number in range(num_blocks))
        return
    # Spawned, not forked: polars and pyarrow run threads in this process.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(world.config,)) as pool:
        waiting: deque[Future[Columns]] = deque()
        try:
            for number in range(num_blocks):
                waiting.append(pool.submit(_work, number))
                if len(waiting) > _AHEAD * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


_world: World | None = None


def _begin(config: SyntheticConfig) -> None:
    global _world
    _world = build_world(config)


def _work(number: int) -> Columns:
    assert _world is not None, "the pool's initializer is _begin"
    return block_columns(_world, number)
