"""python tests/benchmarks/large_log.py: every step that touches all users or items, on a log of millions of users.

Writes a log whose items are popular as 1 / rank and whose users have as few events as users of a web shop have (a
geometric number), then runs the commands one after the other, each with its seconds and its peak memory. The training
has a time limit; everything else is as it comes. `--only` runs some of the steps again: what others wrote stays.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import psutil

# A script's own directory is on the path, the repository's root is not.
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.whole_command import follow

SOLAR = Path(sys.executable).parent / "solar"
FIRST_MS, DAYS = 1_770_000_000_000, 28
ROWS_PER_FILE = 5_000_000
NAME = "large"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=20_000_000)
    parser.add_argument("--users", type=int, default=8_600_000)
    parser.add_argument("--items", type=int, default=197_000)
    parser.add_argument("--seconds", type=int, default=60, help="of training")
    parser.add_argument("--out", type=Path, required=True, help="directory for everything; kept")
    parser.add_argument("--only", nargs="+", help="steps to run, by their first words in the table")
    options = parser.parse_args()
    out: Path = options.out.absolute()
    if not (out / "log").exists():
        write_log(out / "log", events=options.events, users=options.users, items=options.items)
    recipe = write_recipe(out, seconds=options.seconds)
    workspace, users = out / "workspace", write_users(out)
    shards, champion = workspace / "shards" / NAME, f"models:/solar-{NAME}@champion"
    steps = {
        "import": f"import files {out / 'log'} --out {workspace / 'events' / NAME} --columns.timestamp_unit ms",
        "prepare": f"prepare --events {workspace / 'events' / NAME} --out {shards}",
        "inspect --verify": f"inspect {shards} --verify",
        "inspect --digest": f"inspect {shards} --digest",
        "run": f"run {recipe}",
        "score 10,000 users, top 10": f"score {champion} --requests {users} --out {out / 'top.parquet'} "
        f"--shards {shards} --top_k 10 --workspace {workspace}",
        "states": f"score {champion} --build-states --shards {shards} --workspace {workspace}",
        "forget 1,000 users": f"forget {shards} --users {out / 'left.txt'} --workspace {workspace}",
    }
    print("| step | seconds | peak memory, GiB | exit code |\n|---|---|---|---|", flush=True)
    for step, arguments in steps.items():
        if options.only and not any(step.startswith(name) for name in options.only):
            continue
        with (out / f"{step.split()[0]}.log").open("w") as log:
            child = psutil.Popen([str(SOLAR), *arguments.split()], cwd=out, stdout=log, stderr=subprocess.STDOUT)
            seconds, peak = follow(child)
        print(f"| {step} | {seconds:.0f} | {peak / 2**30:.2f} | {child.returncode} |", flush=True)
        if child.returncode:
            sys.exit(f"{step}: {log.name} says why")


def write_log(log: Path, *, events: int, users: int, items: int) -> None:
    """Parquet files of user_id, item_id, timestamp; a user's events lie within some days."""
    log.mkdir(parents=True)
    rng = np.random.default_rng(1)
    weight = 1 / np.arange(1, items + 1)
    upto = np.cumsum(weight / weight.sum())
    activity = np.cumsum(rng.exponential(size=users))
    for number, first in enumerate(range(0, events, ROWS_PER_FILE)):
        rows = min(ROWS_PER_FILE, events - first)
        frame = pl.DataFrame(
            {
                "user_id": np.searchsorted(activity, rng.random(rows) * activity[-1]),
                "item_id": np.searchsorted(upto, rng.random(rows)).clip(max=items - 1),
                "timestamp": FIRST_MS + rng.integers(0, DAYS * 86_400_000, rows),
            }
        )
        frame.write_parquet(log / f"part-{number}.parquet")


def write_recipe(out: Path, *, seconds: int) -> Path:
    path = out / "large.yaml"
    path.write_text(
        f"workspace: {out / 'workspace'}\n"
        "source: {name: files}\n"
        f"data: {{name: {NAME}}}\n"
        "model: {name: solar}\n"
        f"training: {{epochs: 1, max_seconds: {seconds}}}\n"
    )
    return path


def write_users(out: Path) -> Path:
    """10,000 users to score, and the first 1,000 of them as a list of users to forget."""
    users = pl.scan_parquet(out / "log" / "part-0.parquet").select("user_id").head(50_000).unique(maintain_order=True)
    chosen = users.head(10_000).collect()
    chosen.write_parquet(out / "users.parquet")
    (out / "left.txt").write_text("".join(f"{user}\n" for user in chosen["user_id"].head(1_000)))
    return out / "users.parquet"


if __name__ == "__main__":
    main()
