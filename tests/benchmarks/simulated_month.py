"""python tests/benchmarks/simulated_month.py --nights 30 [--out DIR] [--git FILE.parquet]: a month of `solar nightly`.

Thirty days of a drifting synthetic log, a real `solar nightly RECIPE --date D --catch-up` each, and what goes wrong in
a month: a bad, a missing and a late day, files delivered twice, a challenger worse by design, kill -9 in every step,
MLflow away, a full disk, a user who leaves. Prints what every night came to and plots the champion's quality on each
new day beside that of the first version, never retrained. Exit code 1 if something is not as it must be; DIR keeps all.

With --git thirty real days of a git history instead (Parquet with user_id, item_id, timestamp in seconds): all before
as one first folder, no troubles, and whatever the gate says.
"""

from __future__ import annotations

import argparse
import datetime
import signal
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

# A script's own directory is on the path, the repository's root is not.
sys.path.insert(0, str(Path(__file__).parents[2]))

from jobs.plots import new_figure, save_figure
from tests.commands import solar
from tests.daily_log import day_of, write_nightly_recipe
from tests.month_nights import NightProcess
from tests.month_world import FIRST_NIGHT, plan_of
from tests.simulated_month import MODEL, Attempt, Month

GIT_RECIPE = "git-month"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nights", type=int, default=30)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--git", type=Path, default=None)
    parser.add_argument(
        "--frozen-every", type=int, default=3, help="days between two measurements of version 1; 0 = none"
    )
    arguments = parser.parse_args()
    # The server and a night that is under way end with the command.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    place = (arguments.out or Path(tempfile.mkdtemp(prefix="solar-month-"))).absolute()
    place.mkdir(parents=True, exist_ok=True)
    print(f"in {place}", flush=True)
    if arguments.git is not None:
        git_month(arguments.git, place, nights=arguments.nights)
        return
    month = Month(place, plan_of(arguments.nights), tell=lambda text: print(text, flush=True))
    try:
        month.run(frozen_every=arguments.frozen_every)
    except KeyboardInterrupt:
        print_month(month)
        sys.exit(130)
    problems = month.problems()
    print(solar("history", MODEL, "--tracking.uri", f"sqlite:///{place / 'mlflow' / 'mlflow.db'}", cwd=place).stdout)
    print_month(month)
    print("\n".join(f"PROBLEM {problem}" for problem in problems) or "all is as it must be")
    sys.exit(bool(problems))


def print_month(month: Month) -> None:
    """A row a night, then the month in one line; the plot beside it."""
    columns = ("day", "trouble", "verdict", "champion", "difference", "bound", "users", "champion, new day",
               "version 1", "seconds", "starts")  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    curve: dict[int, float] = {}
    verdicts: list[str] = []
    seconds = [sum(each.seconds for each in _starts(month, day)) for day in range(FIRST_NIGHT, month.plan.last + 1)]
    for day, taken in zip(range(FIRST_NIGHT, month.plan.last + 1), seconds, strict=True):
        night, decision = month.document(day, "night") or {}, month.document(day, "decision") or {}
        together = decision.get("comparisons", {}).get("together", {})
        before = month.document(day, "champion") or {}
        found = (before.get("metrics") or {}).get(before.get("primary"))
        if found is not None:
            curve[day] = found
        verdicts.append(night.get("verdict", "never ended"))
        cells = (
            f"{day_of(day):%m-%d}", month.plan.troubles.get(day, ""), verdicts[-1], night.get("champion") or "-",
            _percent(together.get("relative")), _percent(together.get("low")), str(together.get("users", "-")),
            _value(found), _value(month.frozen.get(day)), f"{taken:.0f}", str(len(_starts(month, day))),
        )  # fmt: skip
        print(f"| {' | '.join(cells)} |")
    both = sorted(month.frozen.keys() & curve.keys())
    plain = [taken for day, taken in zip(range(FIRST_NIGHT, month.plan.last + 1), seconds, strict=True)
             if day not in month.plan.troubles]  # fmt: skip
    print(f"\n{len(verdicts)} nights: " + ", ".join(f"{verdicts.count(name)} {name}" for name in sorted(set(verdicts))))
    if plain:
        print(f"seconds a night without trouble: median {statistics.median(plain):.0f}, most {max(plain):.0f}")
    if both:
        retrained, frozen = (
            statistics.mean(curve[day] for day in both),
            statistics.mean(month.frozen[d] for d in both),
        )
        print(
            f"champion on new days {curve[both[0]]:.4f} first, {curve[both[-1]]:.4f} last, mean {retrained:.4f}; "
            f"version 1 {month.frozen[both[0]]:.4f}, {month.frozen[both[-1]]:.4f}, mean {frozen:.4f} ({len(both)} days)"
        )
    plot_curves(curve, month.frozen, month.place / "month.png")


def plot_curves(champion: Mapping[int, float], frozen: Mapping[int, float], path: Path) -> None:
    """What serves, on each day before it trained on it, and what served first."""
    figure, axes = new_figure("quality on a day that nothing was trained on", "day", "NDCG@10, seen kept")
    for name, curve, style in (
        ("the champion of the night before", champion, "o-"),
        ("version 1, frozen", frozen, "s--"),
    ):
        axes.plot(list(curve), list(curve.values()), style, label=name, markersize=4)
    axes.set_ylim(bottom=0)
    axes.legend()
    save_figure(figure, path)


def git_month(source: Path, place: Path, *, nights: int) -> None:
    """Real days, one after the other; nothing is made to go wrong and nothing is checked but that nights end."""
    days = cut_by_day(source, place / "all", nights=nights)
    log = place / "log"
    recipe = write_nightly_recipe(place / f"{GIT_RECIPE}.yaml", workspace=place / "workspace", log=log)
    recipe.write_text(recipe.read_text().replace("name: daily", "name: git"))
    print("| day | exit | seconds | said |\n|---|---|---|---|", flush=True)
    for day in days:
        log.mkdir(exist_ok=True)
        for folder in sorted((place / "all").iterdir()):
            if folder.name <= f"dt={day}":
                folder.rename(log / folder.name)
        arguments = [recipe.name, "--date", str(day), "--catch-up"]
        process = NightProcess(arguments, cwd=place, output=place / "output" / str(day))
        code, seconds = process.finish()
        said = [
            line.split(maxsplit=1)[1] for line in process.said.splitlines() if line.startswith("night") and ": " in line
        ]
        print(f"| {day} | {code} | {seconds:.0f} | {'; '.join([*said, *process.errors[-1:]])} |", flush=True)
    print(solar("history", "solar-git", "--workspace", place / "workspace", cwd=place).stdout)


def cut_by_day(source: Path, out: Path, *, nights: int) -> list[datetime.date]:
    """The busiest of the last months of 2025: a folder for each day, and all before in that of the day before."""
    moment = pl.from_epoch(pl.col("timestamp"), time_unit="s").dt.replace_time_zone("UTC")
    events = pl.read_parquet(source).select("user_id", "item_id", moment.alias("timestamp"))
    day = pl.col("timestamp").dt.date()
    starts = [datetime.date(2025, month, 1) for month in range(8, 13)]
    counts = {
        start: events.filter(day.is_between(start, start + datetime.timedelta(days=nights - 1))).height
        for start in starts
    }
    first = max(starts, key=lambda start: counts[start])
    last = first + datetime.timedelta(days=nights - 1)
    chosen = events.filter(day <= last).with_columns(
        folder=pl.max_horizontal(day, pl.lit(first - datetime.timedelta(days=1)))
    )
    for (folder,), rows in chosen.group_by("folder"):
        directory = out / f"dt={folder}"
        directory.mkdir(parents=True)
        rows.drop("folder").sort("timestamp").write_parquet(directory / "part-0.parquet")
        (directory / "_SUCCESS").touch()
    print(f"{events.height:,} events; {counts[first]:,} of them in the {nights} days from {first} on", flush=True)
    return [first + datetime.timedelta(days=n) for n in range(nights)]


def _starts(month: Month, day: int) -> Sequence[Attempt]:
    return [each for each in month.attempts if each.day == day]


def _percent(value: Any) -> str:
    return "-" if value is None else f"{value:+.1%}"


def _value(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    main()
