"""python tests/benchmarks/history_length.py: the whole pipeline on histories of 1,000, 10,000 and 100,000 events.

For each length a synthetic log of about equally many events in all is imported, prepared, trained on for one epoch,
evaluated and scored, each by its own `solar` command; the table says how long, how many events a second, and the peak
memory of the command and everything it started. Start-up (imports, Ray, worker group) is part of the seconds; `steps`
is training without it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from whole_command import follow

ITEMS, CANDIDATES, TRAINED, SCORED = 10_000, 1_000, 64, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="events of a user")
    parser.add_argument("--events", type=int, default=2_000_000, help="events of a log")
    parser.add_argument("--directory", type=Path, default=None, help="kept there; default: a temporary directory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = []
        for length in options.lengths:
            rows += measure(length, options.events, (options.directory or Path(scratch)) / f"length-{length}")
    columns = ("events/user", "users", "step", "seconds", "events", "events/s", "peak GiB")
    print("  ".join(f"{column:>11}" for column in columns))
    for row in rows:
        print("  ".join(f"{cell:>11}" for cell in row))


def measure(length: int, events: int, directory: Path) -> list[tuple[str, ...]]:
    directory.mkdir(parents=True, exist_ok=True)
    users = max(4, events // length)
    recipe = write_recipe(directory, length=length, users=users)
    log, shards = directory / "events" / "long", directory / "shards" / "long"
    run = directory / "runs" / "long"
    requests = write_requests(directory, users=users)
    place = ["--workspace", str(directory)]
    size = ["--users", f"{users}", "--items", f"{ITEMS}", "--events_per_user", f"{length}", "--spread", "0"]
    commands = {
        "import": ["import", "synthetic", *size, "--out", str(log), *place],
        "prepare": ["prepare", "--events", str(log), "--out", str(shards), *place],
        "train": ["train", str(recipe)],
        "evaluate": ["evaluate", str(recipe)],
        "register": ["register", str(recipe)],
        "score": [
            "score", "models:/long@champion", "--requests", str(requests), "--out", str(directory / "scores.parquet"),
            "--shards", str(shards), *place,
        ],
    }  # fmt: skip
    rows = []
    for step, command in commands.items():
        seconds, peak = timed(["solar", *command])
        # Training and evaluation carry every history whole; scoring the histories of its requests.
        count = min(users, SCORED) * length if step == "score" else users * length
        if step != "register":
            rows.append(row(length, users, step, seconds, count, peak))
        if step == "train":
            state = json.loads((max(run.glob("step-*")) / "state.json").read_text())["train_state"]
            rows.append(row(length, users, "steps", state["train_seconds"], count, None))
    return rows


def row(length: int, users: int, step: str, seconds: float, count: int, peak: int | None) -> tuple[str, ...]:
    memory = f"{peak / 2**30:.2f}" if peak else ""
    return f"{length:,}", f"{users:,}", step, f"{seconds:.1f}", f"{count:,}", f"{count / seconds:,.0f}", memory


def write_recipe(directory: Path, *, length: int, users: int) -> Path:
    recipe = {
        "workspace": str(directory),
        "data": {
            "name": "long",
            "requests": {"max_history": length, "max_requests": TRAINED, "num_negatives": 16},
            # At least two users a step, so that both workers have one.
            "loader": {"batch_events": max(65_536, 2 * (length + TRAINED * 17))},
        },
        "model": {"name": "solar", "set_attention": False},
        "training": {"epochs": 1, "valid_requests": 50},
        "tracking": {"registered_model": "long"},
    }
    path = directory / "long.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def write_requests(directory: Path, *, users: int) -> Path:
    """Requests of up to SCORED users for CANDIDATES random items each; histories come from the shards."""
    rng = np.random.default_rng(0)
    count = min(users, SCORED)
    candidates = rng.permuted(np.tile(np.arange(ITEMS), (count, 1)), axis=1)[:, :CANDIDATES]
    frame = pl.DataFrame({"user_id": np.arange(count), "candidates": candidates.tolist()})
    path = directory / "requests.parquet"
    frame.write_parquet(path)
    return path


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds and peak memory of a command and its descendants; its output is shown when it fails."""
    program = str(Path(sys.executable).parent / command[0])
    with tempfile.TemporaryFile("w+") as output:
        child = psutil.Popen([program, *command[1:]], stdout=output, stderr=subprocess.STDOUT)
        seconds, peak = follow(child)
        if child.returncode:
            output.seek(0)
            sys.exit(f"{' '.join(command)} ended with {child.returncode}:\n{output.read()}")
    print(f"{seconds:8.1f} s  {' '.join(command)[:150]}", file=sys.stderr, flush=True)
    return seconds, peak


if __name__ == "__main__":
    main()
