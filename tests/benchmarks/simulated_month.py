"""python tests/benchmarks/simulated_month.py --nights 30 [--out DIR] [--git FILE.parquet]: a month of `solar nightly`.

Thirty days of a drifting synthetic log, a real `solar nightly RECIPE --date D --catch-up` each, and what goes wrong in
a month: a bad, a missing and a late day, files delivered twice, a challenger worse by design, kill -9 in every step,
MLflow away, a full disk, a user who leaves. Prints what every night came to and plots the champion's quality on each
new day beside that of the first version, never retrained. Exit code 1 if something is not as it must be; DIR keeps all.

With --git a real git history instead (Parquet with user_id, item_id, timestamp in seconds) whose clock runs faster: all
before --first as one first folder, then --pace days in one, no troubles, and whatever the gate says.
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

from jobs.runs.plots import new_figure, save_figure
from tests.support.commands import solar
from tests.support.daily_log import day_of, write_nightly_recipe
from tests.support.month_nights import NightProcess
from tests.support.month_world import FIRST_NIGHT, plan_of
from tests.support.simulated_month import MODEL, Attempt, Month, frozen_quality, step_document

GIT_RECIPE = "git-month"
GIT_GATE = (
    "nightly: {valid_hours: 2, gate_hours: 6, gate: {min_users: 50}}",
    "nightly: {valid_hours: 4, gate_hours: 12, gate: {min_users: 30}}",
)
"""Few people commit in a day, or in a month: half of it judges."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nights", type=int, default=30)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument(
        "--frozen-every", type=int, default=3, help="days between two measurements of version 1; 0 = none"
    )
    parser.add_argument("--git", type=Path, default=None, help="interactions of a git history instead")
    parser.add_argument(
        "--first", type=datetime.date.fromisoformat, default=datetime.date(2024, 1, 1), help="of it; default 2024-01-01"
    )
    parser.add_argument("--pace", type=int, default=30, help="days of it that pass in one; default: 30, about a month")
    arguments = parser.parse_args()
    # The server and a night that is under way end with the command.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    place = (arguments.out or Path(tempfile.mkdtemp(prefix="solar-month-"))).absolute()
    place.mkdir(parents=True, exist_ok=True)
    print(f"in {place}", flush=True)
    if arguments.git is not None:
        cut = {"first": arguments.first, "nights": arguments.nights, "pace": arguments.pace}
        git_month(cut_by_day(arguments.git, place / "all", **cut), place, frozen_every=arguments.frozen_every)
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


def git_month(days: Sequence[datetime.date], place: Path, *, frozen_every: int) -> None:
    """Real days, one after the other; nothing is made to go wrong and nothing is checked but that nights end."""
    log, workspace = place / "log", place / "workspace"
    recipe = write_nightly_recipe(place / f"{GIT_RECIPE}.yaml", workspace=workspace, log=log)
    recipe.write_text(recipe.read_text().replace("name: daily", "name: git").replace(*GIT_GATE))
    curve: dict[int, float] = {}
    frozen: dict[int, float] = {}
    print("| day | exit | seconds | champion, new day | version 1 | said |\n|---|---|---|---|---|---|", flush=True)
    log.mkdir()
    for number, day in enumerate(days):
        for folder in sorted((place / "all").iterdir()):
            if folder.name <= f"dt={day}":
                folder.rename(log / folder.name)
        arguments = [recipe.name, "--date", str(day), "--catch-up"]
        process = NightProcess(arguments, cwd=place, output=place / "output" / str(day))
        code, seconds = process.finish()
        before = step_document(workspace / "nightly" / GIT_RECIPE, day, "champion") or {}
        if before.get("metrics"):
            curve[number] = before["metrics"][before["primary"]]
            if frozen_every and number % frozen_every == 0:
                frozen[number] = frozen_quality("solar-git", day, place=place, options=["--workspace", workspace])
        said = [
            line.split(maxsplit=1)[1] for line in process.said.splitlines() if line.startswith("night") and ": " in line
        ]
        figures = (f"{seconds:.0f}", _value(curve.get(number)), _value(frozen.get(number)))
        print(f"| {day} | {code} | {' | '.join(figures)} | {'; '.join([*said, *process.errors[-1:]])} |", flush=True)
    print(solar("history", "solar-git", "--workspace", workspace, cwd=place).stdout)
    if both := sorted(frozen.keys() & curve.keys()):
        retrained, first = (statistics.mean(found[number] for number in both) for found in (curve, frozen))
        print(f"champion on new days, mean {retrained:.4f}; version 1 {first:.4f} ({len(both)} days)")
    plot_curves(curve, frozen, place / "month.png")


def cut_by_day(source: Path, out: Path, *, first: datetime.date, nights: int, pace: int) -> list[datetime.date]:
    """From `first` on `pace` days of the log pass in one: a folder for each of `nights` days, and all that was before
    in that of the day before."""
    start = int(datetime.datetime.combine(first, datetime.time(), datetime.UTC).timestamp() * 1000)
    moment = pl.from_epoch(start + (1000 * pl.col("timestamp") - start) // pace, time_unit="ms")
    events = pl.read_parquet(source).select("user_id", "item_id", timestamp=moment.dt.replace_time_zone("UTC"))
    last = first + datetime.timedelta(days=nights - 1)
    day = pl.col("timestamp").dt.date()
    chosen = events.filter(day <= last).with_columns(
        folder=pl.max_horizontal(day, pl.lit(first - datetime.timedelta(days=1)))
    )
    for (folder,), rows in chosen.group_by("folder"):
        directory = out / f"dt={folder}"
        directory.mkdir(parents=True)
        rows.drop("folder").sort("timestamp").write_parquet(directory / "part-0.parquet")
        (directory / "_SUCCESS").touch()
    new = chosen.filter(day >= first)
    users = new.group_by(day).agg(pl.col("user_id").n_unique())["user_id"].mean()
    print(f"{chosen.height:,} events, {new.height:,} of them from {first} on; {users:.1f} users a day", flush=True)
    return [first + datetime.timedelta(days=n) for n in range(nights)]


def _starts(month: Month, day: int) -> Sequence[Attempt]:
    return [each for each in month.attempts if each.day == day]


def _percent(value: Any) -> str:
    return "-" if value is None else f"{value:+.1%}"


def _value(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    main()
