"""python tests/benchmarks/prepare_scale.py [--events 50 200] [--strings]: solar prepare on logs of millions of events.

A synthetic log (200 days, 100 events per user, half of them of popular items, one file per day) is prepared by one
command, start-up, vocabulary and manifest included; then a day of a million events is added, then the same day again,
in another order. Beside it, on the same log and machine, only what sorts events into sequences: Ray Data's repartition
by user, and polars in one process (without validation, deduplication, vocabulary, keys and checksums; polars holds the
log in memory). Seconds, events/s, the peak memory of the command and all it started, and bytes on disk an event.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import polars as pl
import psutil

sys.path.insert(0, str(Path(__file__).parent))
from whole_command import follow

ROOT = Path(__file__).parents[2]
SOLAR = Path(sys.executable).parent / "solar"
DAYS, EVENTS_A_USER, EVENTS_AN_ITEM, FIRST_DAY = 200, 100, 200, 19_000
NEW_DAY_EVENTS = 1_000_000

RAY_DATA = """
import sys
import pandas as pd
import ray
ray.init(address="local", log_to_driver=False)
ray.data.DataContext.get_current().enable_progress_bars = False
def sequences(rows):
    return rows.sort_values(["user_id", "timestamp"]).groupby("user_id").agg(list).reset_index()
log = ray.data.read_parquet(sys.argv[1]).repartition(int(sys.argv[3]), keys=["user_id"])
log.map_batches(sequences, batch_size=None, batch_format="pandas").write_parquet(sys.argv[2])
"""
RAY_DATA_ARROW = RAY_DATA.replace(
    'return rows.sort_values(["user_id", "timestamp"]).groupby("user_id").agg(list).reset_index()',
    'import polars as pl; return pl.DataFrame(rows).sort("user_id", "timestamp")'
    '.group_by("user_id", maintain_order=True).agg(pl.all()).to_arrow(compat_level=pl.CompatLevel.oldest())',
).replace('"pandas"', '"pyarrow"')
POLARS = """
import sys
import polars as pl
log = pl.scan_parquet(sys.argv[1] + "/*.parquet").sort("user_id", "timestamp")
log.group_by("user_id", maintain_order=True).agg(pl.all()).collect().write_parquet(sys.argv[2])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, nargs="+", default=[50, 200], help="millions")
    parser.add_argument("--strings", action="store_true", help="string ids")
    parser.add_argument("--others", action="store_true", help="Ray Data and polars as well")
    parser.add_argument("--directory", type=Path, default=None, help="default: a temporary directory")
    options = parser.parse_args()
    columns = ("events", "step", "seconds", "events/s", "peak GiB", "bytes/event")
    print("  ".join(f"{column:>22}" for column in columns))
    for millions in options.events:
        with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
            measure(Path(scratch), millions * 1_000_000, strings=options.strings, others=options.others)


def measure(root: Path, events: int, *, strings: bool, others: bool) -> None:
    log, shards = root / "log", root / "shards"
    log.mkdir()
    for day in range(DAYS):
        write_day(log, day, events // DAYS, total=events, strings=strings)
    size = f"{events // 1_000_000} M {'strings' if strings else 'integers'}"
    prepare = [str(SOLAR), "prepare", "--events", str(log), "--out", str(shards), "--workspace", str(root)]
    show(size, "solar prepare", prepare, events, written=shards)
    if others:
        for name, code in (("repartition, pandas", RAY_DATA), ("repartition, polars", RAY_DATA_ARROW)):
            show(size, name, python(code, log, root / "others", str(max(16, events // 4_000_000))), events,
                 written=root / "others")  # fmt: skip
            shutil.rmtree(root / "others", ignore_errors=True)
        (root / "others").mkdir()
        show(size, "polars", python(POLARS, log, root / "others/all.parquet"), events, written=root / "others")
        shutil.rmtree(root / "others")
    write_day(log, DAYS, NEW_DAY_EVENTS, total=events, strings=strings)
    show(size, "a day of 1 M", prepare, NEW_DAY_EVENTS)
    shutil.copy(log / f"day-{DAYS:04d}.parquet", log / "again.parquet")
    pl.read_parquet(log / "again.parquet").sample(fraction=1.0, shuffle=True, seed=0).write_parquet(
        log / "again.parquet"
    )
    show(size, "the same day again", prepare, NEW_DAY_EVENTS)
    compact = [str(SOLAR), "compact", str(shards), "--workspace", str(root)]
    show(size, "solar compact", compact, events + NEW_DAY_EVENTS)


def write_day(log: Path, day: int, events: int, *, total: int, strings: bool) -> None:
    rng = np.random.default_rng(day)
    users, items = total // EVENTS_A_USER, total // EVENTS_AN_ITEM
    popular = rng.integers(0, 1 + items // 100, events)
    table = pl.DataFrame(
        {
            "user_id": rng.integers(0, users, events),
            "item_id": np.where(rng.random(events) < 0.5, popular, rng.integers(0, items, events)),
            "timestamp": (FIRST_DAY + day) * 86_400 + rng.integers(0, 86_400, events),
        }
    )
    if strings:
        table = table.with_columns(
            pl.format("user-{}", "user_id").alias("user_id"), pl.format("item-{}", "item_id").alias("item_id")
        )
    table.write_parquet(log / f"day-{day:04d}.parquet", row_group_size=1_000_000)


def python(code: str, *arguments: Path | str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]


def show(size: str, step: str, command: list[str], events: int, *, written: Path | None = None) -> None:
    child = psutil.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seconds, peak = follow(child)
    output = child.communicate()[0]
    peak_gib = f"{peak / 2**30:.2f}"
    if child.returncode:
        cells = (size, step, "failed", "".join(output.strip().splitlines()[-1:])[:60], peak_gib, "")
    else:
        stored = sum(file.stat().st_size for file in written.rglob("*.parquet")) if written else 0
        a_row = f"{stored / events:.1f}" if written else ""
        cells = (size, step, f"{seconds:.1f}", f"{events / seconds:,.0f}", peak_gib, a_row)
    print("  ".join(f"{cell:>22}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
