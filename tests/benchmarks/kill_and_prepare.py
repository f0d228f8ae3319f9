"""python tests/benchmarks/kill_and_prepare.py [--kills 50] [--seed 1]: is a data set whole, whenever its ingest dies?

A log of a day is prepared, and a second day comes, whose ingest ends with a compaction. That is done once undisturbed,
then again and again from the same start, ended at a random moment (kill -9 of the command or of everything that it
started, SIGINT, SIGTERM). After each the data set must be the old or the new one, with every checksum right, and the
same command again must leave the very bytes of the undisturbed run, and nothing of the runs that died. Exit code 1
otherwise.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

# A script's own directory is on the path, the repository's root is not.
sys.path.insert(0, str(Path(__file__).parents[2]))

from prepare_scale import write_day

from pipeline.shards.inspection import verify
from pipeline.shards.manifest import current_manifest
from tests.support.interruptions import Command, orphans

VICTIMS = ("command", "everything", "SIGINT", "SIGTERM")
DAY_EVENTS = 1_000_000
STATES = ("none", "old", "new", "compacted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="solar-kills-"))
    print(f"in {place} (kept if something fails)", flush=True)
    if failed := compare(place, kills=arguments.kills, seed=arguments.seed):
        sys.exit(failed)
    shutil.rmtree(place)


def compare(place: Path, *, kills: int, seed: int) -> int:
    """Run everything inside `place` and print the table; 1 if a data set is not whole or differs."""
    log, chance, failures = place / "log", random.Random(seed), 0
    log.mkdir()
    write_day(log, 0, DAY_EVENTS, total=DAY_EVENTS, strings=False)
    finish(ingest(place, "old"))
    write_day(log, 1, DAY_EVENTS, total=DAY_EVENTS, strings=False)
    shutil.copytree(place / "old", place / "undisturbed")
    started = time.monotonic()
    finish(ingest(place, "undisturbed"))
    seconds, expected = time.monotonic() - started, content(place / "undisturbed")
    print(f"undisturbed {seconds:.1f} s", flush=True)
    print(f"{'run':>3}  {'ended':<12} {'after s':>8} {'exit':>5} {'state':<10} problems", flush=True)
    for number in range(1, kills + 1):
        out, victim = f"kill-{number}", VICTIMS[(number - 1) % len(VICTIMS)]
        shutil.copytree(place / "old", place / out)
        after = chance.uniform(0.2, 1.0) * seconds
        command = ingest(place, out)
        code = end(command, victim, after=after)
        state, problems = check(place, out, expected=expected)
        failures += bool(problems)
        print(f"{number:>3}  {victim:<12} {after:>8.1f} {code:>5} {state:<10} {'; '.join(problems)[:200]}", flush=True)
        if not problems:
            shutil.rmtree(place / out)
    print(f"{kills - failures} of {kills} data sets were whole, and after a second run those of the undisturbed one")
    return 1 if failures else 0


def ingest(place: Path, out: str) -> Command:
    return Command(
        "prepare", "--events", "log", "--out", out, "--max_deltas", "0", "--workspace", "workspace", cwd=place
    )


def finish(command: Command) -> None:
    code, _, errors = command.finish()
    assert code == 0, errors


def end(command: Command, victim: str, *, after: float) -> int:
    """End the command so many seconds from now; its exit code."""
    deadline = time.monotonic() + after
    while time.monotonic() < deadline and not command.ended():
        time.sleep(0.01)
    family = command.family()
    if not command.ended():
        command.end(victim)
    code = command.finish()[0]
    assert not orphans(family, within=60), orphans(family)
    return code


def check(place: Path, out: str, *, expected: dict[str, bytes]) -> tuple[str, list[str]]:
    """Which state an ended run left, and what is wrong with it or with what a second run makes of it."""
    manifest = current_manifest(str(place / out))
    state = STATES[manifest.number if manifest else 0]
    problems = verify(str(place / out)) if manifest else ["the data set is gone"]
    code, _, errors = ingest(place, out).finish()
    if code != 0:
        return state, [*problems, f"the second run ended with {code}: {errors.strip()}"]
    found = content(place / out)
    problems += [f"{name} differs" for name in sorted(expected) if found.get(name) != expected[name]]
    problems += [f"{name} is left" for name in sorted(found.keys() - expected.keys())]
    return state, problems


def content(out: Path) -> dict[str, bytes]:
    """Every file of a data set."""
    return {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}


if __name__ == "__main__":
    main()
