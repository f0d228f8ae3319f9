"""python tests/benchmarks/whole_command.py [--runs DIR ...] -- COMMAND ...: where the seconds of a command go.

Its seconds and peak memory, the CPU seconds of each process that it starts, and of the named run directories how long
their steps and validations took. Memory is the largest sum of proportional set sizes (shared pages counted once) over
the process tree, sampled every second; Ray's daemons and workers are part of the tree.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import psutil

from jobs.host.json_files import read_rows

SAMPLE_SECONDS = 1.0
SHOWN = 12


@dataclasses.dataclass
class Seen:
    """A process of the tree, as of the last sample."""

    title: str
    first: float
    """Seconds after the start of the command."""
    last: float
    cpu: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", default=[], help="run directories that the command trains")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    command = [word for word in arguments.command if word != "--"]
    if not command:
        sys.exit("usage: python tests/benchmarks/whole_command.py [--runs DIR ...] -- COMMAND [ARGUMENT ...]")
    child = psutil.Popen(command)
    seen: dict[int, Seen] = {}
    seconds, peak = follow(child, seen)
    has_avx512 = "avx512f" in Path("/proc/cpuinfo").read_text()
    print(f"\n{'seconds':>10} {'peak memory GiB':>16} {'exit code':>10}  command ({psutil.cpu_count()} cores, ", end="")
    print(f"{'with' if has_avx512 else 'without'} AVX-512)")
    print(f"{seconds:10.1f} {peak / 2**30:16.2f} {child.returncode:10d}  {' '.join(command)}")
    print(f"\n{'CPU s':>10} {'from s':>8} {'to s':>8}  process")
    largest = sorted(seen.values(), key=lambda process: -process.cpu)
    for process in largest[:SHOWN]:
        print(f"{process.cpu:10.1f} {process.first:8.0f} {process.last:8.0f}  {process.title[:80]}")
    print(f"{sum(process.cpu for process in largest[SHOWN:]):10.1f} {'':8} {'':8}  {len(largest[SHOWN:])} others")
    print(f"{sum(process.cpu for process in largest):10.1f} {'':8} {'':8}  all")
    for run in arguments.runs:
        rows = read_rows(run / "telemetry.jsonl")
        told = {kind: [row["seconds"] for row in rows if row["kind"] == kind] for kind in ("step", "valid")}
        print(f"\n{run.name}: {len(told['step'])} steps {sum(told['step']):.1f} s, ", end="")
        print(f"{len(told['valid'])} validations {sum(told['valid']):.1f} s")
    sys.exit(child.returncode)


def follow(child: psutil.Popen, seen: dict[int, Seen] | None = None) -> tuple[float, int]:
    """Wait for the end of a command that was just started: its seconds and its peak memory in bytes. `seen` is filled
    with its processes, by their ids."""
    started, peak = time.monotonic(), 0
    while child.poll() is None:
        tree = [child, *descendants(child)]
        peak = max(peak, tree_bytes(tree))
        if seen is not None:
            for process in tree:
                note(process, seen, now=time.monotonic() - started)
        time.sleep(SAMPLE_SECONDS)
    return time.monotonic() - started, peak


def note(process: psutil.Process, seen: dict[int, Seen], *, now: float) -> None:
    try:
        times, title = process.cpu_times(), " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return
    before = seen.setdefault(process.pid, Seen(title, now, now, 0.0))
    before.last, before.cpu = now, times.user + times.system
    # Workers of Ray take other titles later.
    before.title = title if "RayTrainWorker" not in before.title else before.title


def tree_bytes(tree: list[psutil.Process]) -> int:
    """Proportional set size of all processes."""
    total = 0
    for process in tree:
        try:
            total += process.memory_full_info().pss
        except (psutil.Error, subprocess.SubprocessError):
            continue
    return total


def descendants(root: psutil.Process) -> list[psutil.Process]:
    try:
        return root.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


if __name__ == "__main__":
    main()
