"""python tests/benchmarks/restart_time.py [--times 3]: how long until a killed run learns something new again.

A tiny data set, two workers, a checkpoint every 5 steps. kill -9 of one worker, which Ray replaces, or of the command
and everything that it started, after which the same command runs with --resume. Seconds from the kill (from the second
command's start) until the workers have restored the checkpoint, until they make a step, and until a step that the run
had not made before; the median of so many. What tables of millions of rows add is in table_size.py ("read").
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# A script's own directory is on the path, the repository's root is not.
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.kill_and_resume import prepare
from tests.support.interruptions import Command, latest_step, telemetry
from tests.support.tiny import write_tiny_log, write_tiny_recipe

KILLED_AT = 23
PHASES = ("restored", "a step", "a new step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3)
    options = parser.parse_args()
    print("  ".join(f"{column:>22}" for column in ("killed", *PHASES)), flush=True)
    with tempfile.TemporaryDirectory(prefix="solar-restart-", ignore_cleanup_errors=True) as directory:
        place = Path(directory)
        write_tiny_recipe(place / "tiny.yaml", workspace=place / "workspace", events=write_tiny_log(place / "raw"))
        prepare(place)
        for victim in ("a worker", "everything"):
            found = [seconds_after(victim, place, f"{victim.split()[-1]}-{time}") for time in range(options.times)]
            cells = [f"{statistics.median(each[phase] for each in found):.1f}" for phase in PHASES]
            print("  ".join(f"{cell:>22}" for cell in (victim, *cells)), flush=True)


def seconds_after(victim: str, place: Path, name: str) -> dict[str, float]:
    options = ["--training.epochs", "40", "--checkpoint.every_steps", "5", "--parallel.num_workers", "2"]
    arguments = ["train", "tiny.yaml", "--name", name, *options]
    run_dir = place / "workspace" / "runs" / name
    command = Command(*arguments, "--cluster.max_failures", "2", cwd=place)
    command.wait_for_step(run_dir, KILLED_AT)
    if victim == "a worker":
        command.workers()[0].kill()
    else:
        command.end("everything")
        command.finish()
    made, killed_at = latest_step(run_dir), time.time()
    if victim == "everything":
        command = Command(*arguments, "--resume", cwd=place)
    command.wait_for_step(run_dir, made + 5)
    rows = [row for row in telemetry(run_dir) if row["time"] > killed_at]
    start = next(row for row in rows if row["kind"] == "start" and row["step"] > 0)
    later = [row for row in rows if row["kind"] == "step" and row["time"] > start["time"]]
    command.end("everything")
    command.finish()
    moments: list[Any] = [start, later[0], next(row for row in later if row["step"] > made)]
    return dict(zip(PHASES, (row["time"] - killed_at for row in moments), strict=True))


if __name__ == "__main__":
    main()
