"""Real gloo ranks for tests: `run_ranks(function, world_size, ...)` runs a function in that many processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import start_processes

# Ranks are forks of one process, which has imported what takes seconds.
multiprocessing.set_forkserver_preload(["tests.support.preload"])


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returned on each rank, in rank order; an exception on a rank fails the test."""
    with tempfile.TemporaryDirectory() as directory:
        passed = (dict(os.environ), world_size, directory, function, arguments)
        start_processes(_enter, args=passed, nprocs=world_size, start_method="forkserver")
        return [pickle.loads((Path(directory) / f"{rank}.pkl").read_bytes()) for rank in range(world_size)]


def take_environment(environment: dict[str, str]) -> None:
    """The test's, in a fork: the server's own is as old as the server."""
    os.environ.clear()
    os.environ.update(environment)


def server_address() -> str:
    """Of the process that is forked; it is started where it is not there yet."""
    server: Any = forkserver._forkserver
    server.ensure_running()
    return server._forkserver_address


def share_server(address: str) -> None:
    """In a fork: ranks that it starts are forks of the same process; by itself Python would start another one."""
    server: Any = forkserver._forkserver
    server._forkserver_address = address
    server.ensure_running = lambda: None


def _enter(
    rank: int,
    environment: dict[str, str],
    world_size: int,
    directory: str,
    function: Callable[..., Any],
    arguments: Any,
) -> None:
    import torch.distributed as dist

    from jobs.cluster.worker import quiet_libraries

    take_environment(environment)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    torch.set_num_threads(1)
    quiet_libraries()
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world_size)
    result = function(*arguments)
    (Path(directory) / f"{rank}.pkl").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()
    # Not the interpreter's own end: threads of the libraries may still run then, and C++ aborts one process in some
    # hundred ("terminate called without an active exception").
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
