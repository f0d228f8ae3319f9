"""python tests/benchmarks/kill_and_resume.py --kills 10 --seed 1: does what dies and goes on learn the same bits?

One undisturbed run of a tiny data set with dropout, then as many that are ended at a random moment (kill -9 of the
command, of a worker with and without restarts by Ray, of everything; SIGINT, SIGTERM) and resumed until they finish.
Exit code 1 if tables, dense weights, optimizer state or metrics of one of them differ.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# A script's own directory is on the path, the repository's root is not.
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.commands import SOLAR
from tests.support.interruptions import Command, differences, latest_step, learned, orphans
from tests.support.tiny import write_tiny_log, write_tiny_recipe

VICTIMS = ("command", "worker", "worker, restarted", "everything", "SIGINT", "SIGTERM")
STARTING_SHARE = 0.15
"""Of the kills: while the workers are still starting."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=40)
    arguments = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="solar-kills-"))
    print(f"in {place} (kept if something fails)", flush=True)
    failed = compare(place, kills=arguments.kills, seed=arguments.seed, epochs=arguments.epochs)
    if not failed:
        shutil.rmtree(place)
    sys.exit(failed)


def compare(place: Path, *, kills: int, seed: int, epochs: int) -> int:
    """Run everything inside `place` and print the table; 1 if a run differs."""
    recipe = write_tiny_recipe(place / "tiny.yaml", workspace=place / "workspace", events=write_tiny_log(place / "raw"))
    prepare(place)
    options = ["--training.epochs", str(epochs), "--checkpoint.every_steps", "10", "--parallel.num_workers", "2"]
    runs = place / "workspace" / "runs"
    started = time.monotonic()
    code, _, errors = Command("train", recipe, "--name", "undisturbed", *options, cwd=place).finish()
    assert code == 0, errors
    expected = learned(runs / "undisturbed")
    print(f"{expected['step']} steps, undisturbed {time.monotonic() - started:.0f} s", flush=True)
    print(
        f"{'run':>3}  {'ended':<18} {'at step':>8} {'exit':>5} {'end s':>6} {'resumes':>7} {'s':>6}  equal", flush=True
    )

    chance, different = random.Random(seed), 0
    for number in range(1, kills + 1):
        victim = VICTIMS[(number - 1) % len(VICTIMS)]
        step = 0 if chance.random() < STARTING_SHARE else chance.randrange(1, int(0.9 * expected["step"]))
        started = time.monotonic()
        command = ["train", recipe, "--name", f"kill-{number}", *options]
        at, code, ending, resumes = disturb(command, runs / f"kill-{number}", victim, step, chance=chance, cwd=place)
        found = differences(expected, learned(runs / f"kill-{number}"))
        different += bool(found)
        seconds = time.monotonic() - started
        equal = "yes" if not found else f"NO: {', '.join(found[:3])}"
        print(
            f"{number:>3}  {victim:<18} {at:>8} {code:>5} {ending:>6.1f} {resumes:>7} {seconds:>6.0f}  {equal}",
            flush=True,
        )
    print(f"{kills - different} of {kills} runs equal the undisturbed one bit by bit")
    return 1 if different else 0


def disturb(
    arguments: list, run_dir: Path, victim: str, step: int, *, chance: random.Random, cwd: Path
) -> tuple[str, int, float, int]:
    """End the command at about this step, resume it to the end: (moment, exit code, seconds to end, resumes)."""
    more = ["--cluster.max_failures", "2"] if victim == "worker, restarted" else []
    command = Command(*arguments, *more, cwd=cwd)
    if step == 0 and not victim.startswith("worker"):
        time.sleep(chance.uniform(3, 20))
        at = f"{latest_step(run_dir)} start"
    else:
        at = str(command.wait_for_step(run_dir, max(1, step)))
    assert not command.ended(), f"{victim} at {at}: ended by itself: {command.finish()}"
    family, ended_at = command.family(), time.monotonic()
    if victim.startswith("worker"):
        chance.choice(command.workers()).kill()
    else:
        command.end(victim)
    code, _, errors = command.finish()
    ending = time.monotonic() - ended_at
    wanted = {"command": -9, "worker": 1, "worker, restarted": 0, "everything": -9}.get(victim, 130)
    assert code == wanted, f"{victim} at {at}: exit code {code} instead of {wanted}: {errors}"
    assert victim in ("command", "everything") or not orphans(family), f"{victim}: {orphans(family)} still run"
    resumes = 0
    while code != 0:
        resumes += 1
        code, _, errors = Command(*arguments, "--resume", cwd=cwd).finish()
        assert code == 0, errors
    return at, {"command": -9, "everything": -9}.get(victim, wanted), ending, resumes


def prepare(place: Path) -> None:
    """Event log and shards, as the recipe names them."""
    workspace = place / "workspace"
    steps = [
        ["import", "files", place / "raw/events-00000.parquet", "--items_path", place / "raw/items.parquet",
         "--out", workspace / "events/tiny", "--items.list_features", "[genres]"],
        ["prepare", "--events", workspace / "events/tiny", "--out", workspace / "shards/tiny", "--buckets", "3",
         "--row_group_events", "200"],
    ]  # fmt: skip
    for step in steps:
        subprocess.run([SOLAR, *map(str, step), "--workspace", workspace], cwd=place, check=True, capture_output=True)


if __name__ == "__main__":
    main()
