"""python tests/benchmarks/whole_command.py -- COMMAND ...: seconds and peak memory of a command and all it starts.

Memory is the largest sum of proportional set sizes (shared pages counted once) over the process tree, sampled
every second; Ray's daemons and workers are part of the tree.
"""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

SAMPLE_SECONDS = 1.0


def main() -> None:
    if "--" not in sys.argv or not sys.argv[sys.argv.index("--") + 1 :]:
        sys.exit("usage: python tests/benchmarks/whole_command.py -- COMMAND [ARGUMENT ...]")
    command = sys.argv[sys.argv.index("--") + 1 :]
    child = psutil.Popen(command)
    seconds, peak = follow(child)
    print(f"\n{'seconds':>10} {'peak memory GiB':>16} {'exit code':>10}  command")
    print(f"{seconds:10.1f} {peak / 2**30:16.2f} {child.returncode:10d}  {' '.join(command)}")
    sys.exit(child.returncode)


def follow(child: psutil.Popen) -> tuple[float, int]:
    """Wait for the end of a command that was just started: its seconds and its peak memory in bytes."""
    started, peak = time.monotonic(), 0
    while child.poll() is None:
        peak = max(peak, tree_bytes(child))
        time.sleep(SAMPLE_SECONDS)
    return time.monotonic() - started, peak


def tree_bytes(root: psutil.Process) -> int:
    """Proportional set size of the process and all its descendants."""
    total = 0
    for process in [root, *descendants(root)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied, subprocess.SubprocessError):
            continue
    return total


def descendants(root: psutil.Process) -> list[psutil.Process]:
    try:
        return root.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


if __name__ == "__main__":
    main()
