"""A simulated month: a world delivers a day, `solar nightly` runs as cron would start it, troubles come as planned.

`Month.run` does the nights; `Month.problems` says what is not as it must be afterwards. Used by the command
tests/benchmarks/simulated_month.py (which prints the table) and, with four nights, by an integration test.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jobs.tracking.champions import champion, changes, nights
from jobs.tracking.mlflow_runs import mlflow_client
from tests.support.commands import succeeded
from tests.support.daily_log import day_of, events_of, write_nightly_recipe
from tests.support.held import Holds
from tests.support.month_nights import MlflowServer, NightProcess, NightWithoutRay, can_mount, small_disk
from tests.support.month_world import FIRST_NIGHT, Plan, World

MODEL = "solar-daily"
RECIPE = "month"
TRY_LATER = 75
WORSE = ["--optimizer.dense_lr", "3", "--optimizer.sparse_lr", "30", "--optimizer.clip_norm", "0"]
"""Learning rates that no model survives: the champion's weights are where it begins, far from them is where it ends."""
LATER = {"prepare": 2.0, "champion": 5.0, "train": 9.0, "evaluate": 6.0, "register": 1.5}
"""Seconds into a step at which it is killed later."""
FULL_DISK_KILOBYTES = 160
"""Less than the checkpoints that a run asks for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of the command."""

    day: int
    what: str
    """What was done to it."""
    code: int
    seconds: float
    line: str
    """Its last line on stderr."""


class Month:
    """The nights in `place`, one after the other."""

    def __init__(
        self, place: Path, plan: Plan, *, keep: int = 7, states: bool = True, ray: bool = True,
        tell: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        """`ray`: nights are processes that start Ray, as cron starts them."""
        self._ray = ray
        self.place, self.plan, self.tell = place, plan, tell
        self.workspace = place / "workspace"
        self.world = World(place / "log", plan)
        self.server = MlflowServer(place / "mlflow")
        nightly = f"keep: {keep}, states: {str(states).lower()}"
        write_nightly_recipe(place / f"{RECIPE}.yaml", workspace=self.workspace, log=place / "log", nightly=nightly)
        self.attempts: list[Attempt] = []
        self.faults: list[str] = []
        """What was not as it must be while the nights ran."""
        self.frozen: dict[int, float] = {}
        """{day: primary metric of version 1, never retrained}."""

    def run(self, *, frozen_every: int) -> None:
        """All nights; version 1 is measured besides on every so many days (0 = never)."""
        self.server.start()
        try:
            for number in range(FIRST_NIGHT, self.plan.last + 1):
                for said in self.world.deliver(number):
                    self.tell(f"{day_of(number)} world: {said}")
                self._night(number)
                due = frozen_every and (number - FIRST_NIGHT) % frozen_every == 0 and number > FIRST_NIGHT
                if due and self.document(number, "champion"):
                    self._measure_frozen(number)
        finally:
            self.server.stop()

    def document(self, number: int, step: str) -> dict[str, Any] | None:
        """What a step of a night left."""
        return step_document(self.workspace / "nightly" / RECIPE, day_of(number), step)

    def _night(self, number: int) -> None:
        match self.plan.troubles.get(number):
            case "bad day" | "missing day" | "late day":
                attempt = self._attempt(number, "no input")
                self._expect(attempt, TRY_LATER, "no input")
            case "worse by design":
                self._expect(self._attempt(number, "absurd learning rates", *WORSE), 0)
            case "killed at once":
                self._killed_night(number, later=False)
            case "killed later":
                self._killed_night(number, later=True)
            case "MLflow away":
                self.server.stop()
                self._expect(self._attempt(number, "MLflow away"), TRY_LATER, "MLflow")
                self.server.start()
                if number == self.plan.last:
                    self._expect(self._attempt(number, "MLflow is back"), 0)
            case "disk full" if can_mount():
                self._full_disk(number)
            case "forgotten user":
                self._forget()
                self._expect(self._attempt(number, "a user is forgotten"), 0)
            case _:
                self._expect(self._attempt(number, ""), 0)

    def _arguments(self, number: int, *options: str) -> list[str]:
        common = [f"{RECIPE}.yaml", "--date", str(day_of(number)), "--catch-up", "--tracking.uri", self.server.uri]
        return [*common, *options]

    def _start(self, number: int, *options: str, holds: Holds | None = None) -> NightProcess | NightWithoutRay:
        output = self.place / "output" / f"{day_of(number)}-{len(self.attempts)}"
        kind = NightProcess if self._ray else NightWithoutRay
        return kind(self._arguments(number, *options), cwd=self.place, output=output, holds=holds)

    def _attempt(self, number: int, what: str, *options: str) -> Attempt:
        return self._ended(number, what, self._start(number, *options))

    def _ended(self, number: int, what: str, process: NightProcess | NightWithoutRay) -> Attempt:
        code, seconds = process.finish()
        line = process.errors[-1] if process.errors else ""
        attempt = Attempt(day=number, what=what, code=code, seconds=seconds, line=line)
        self.attempts.append(attempt)
        verdicts = [said for said in process.said.splitlines() if said.startswith("night") and ": " in said]
        self.tell(f"{day_of(number)} {what}{': ' if what else ''}exit {code}, {seconds:.0f} s  {line}")
        for verdict in verdicts:
            self.tell(f"    {verdict}")
        if code in (2, TRY_LATER) and len(process.errors) != 1:
            self.faults.append(
                f"{day_of(number)}: exit {code} with {len(process.errors)} lines on stderr instead of one"
            )
        return attempt

    def _expect(self, attempt: Attempt, code: int, word: str = "") -> None:
        if attempt.code != code or word not in attempt.line:
            asked = f"exit {code}{f' and a line with {word!r}' if word else ''}"
            self.faults.append(
                f"{day_of(attempt.day)} {attempt.what}: exit {attempt.code} {attempt.line!r}, not {asked}"
            )

    def _killed_night(self, number: int, *, later: bool) -> None:
        """Killed in one step after the other, then to the end."""
        for step in self.plan.killed_in:
            holds = Holds(self.place / "holds" / f"{number}-{step}", *([] if later else [step]))
            process = self._start(number, holds=holds)
            if not later:
                holds.wait(step, process)
            elif isinstance(process, NightProcess) and process.wait_for(day_of(number), step):
                process.wait_a_little(LATER.get(step, 0.05))
            self._kill(number, step, process, group_alone=not later)
            self._ended(number, f"kill -9 in {step}{', later' if later else ''}", process)
        self._expect(self._ended(number, "after the kills", self._start(number)), 0)

    def _kill(self, number: int, step: str, process: NightProcess | NightWithoutRay, *, group_alone: bool) -> None:
        if isinstance(process, NightWithoutRay):
            process.kill()
        elif left := process.kill(group_alone=group_alone):
            self.faults.append(f"{day_of(number)}: after kill -9 in {step} there still runs {', '.join(left)}")

    def _full_disk(self, number: int) -> None:
        """The night's run gets a disk that is too small for a checkpoint; freed, the same command goes on."""
        run_dir = self.workspace / "runs" / f"{RECIPE}-{day_of(number)}"
        with small_disk(run_dir, kilobytes=FULL_DISK_KILOBYTES) as free:
            self._expect(self._attempt(number, "disk full"), TRY_LATER, "free some disk")
            free()
            self._expect(self._attempt(number, "disk freed"), 0)

    def _forget(self) -> None:
        (self.place / "left.txt").write_text(f"{self.forgotten_user}\n")
        done = self._solar("forget", self.shards, "--users", "left.txt", "--workspace", self.workspace)
        self.tell(f"    {done.strip().splitlines()[-1]}")

    def _measure_frozen(self, number: int) -> None:
        options = ["--workspace", self.workspace, "--tracking.uri", self.server.uri]
        self.frozen[number] = frozen_quality(MODEL, day_of(number), place=self.place, options=options)

    @property
    def shards(self) -> Path:
        return self.workspace / "shards" / "daily"

    @property
    def forgotten_user(self) -> int:
        """Who is there from the first day on and on the last."""
        return int(events_of(FIRST_NIGHT)["user_id"][0])

    def _solar(self, *arguments: str | Path) -> str:
        return succeeded(*arguments, cwd=self.place)

    def problems(self) -> list[str]:
        """What is not as it must be after the nights; they and MLflow's store are asked, no memory of this process."""
        return [*self.faults, *self._data_problems(), *self._registry_problems(), *self._refusal_problems()]

    def _data_problems(self) -> list[str]:
        """The data set is what one `prepare` of all final files gives, without the user who left."""
        whole = self.place / "at-once"
        self._solar(
            "prepare", "--events", self.place / "log", "--out", whole, "--workspace", self.place / "at-once-logs",
            "--buckets", "2", "--daily.folder", "dt=%Y-%m-%d", "--daily.marker", "_SUCCESS",
        )  # fmt: skip
        problems = []
        if self.plan.days("forgotten user"):
            options = ["--users", self.place / "left.txt", "--workspace", self.place / "at-once-logs"]
            self._solar("forget", whole, *options)
            self._solar("forget", self.shards, *options, "--verify")
        digests = [self._digest(self.shards), self._digest(whole)]
        self.tell(f"digest of the nights' data set {digests[0]}, of one prepare {digests[1]}")
        if digests[0] != digests[1]:
            problems.append(f"the data set's digest is {digests[0]}, one prepare of all files has {digests[1]}")
        return problems

    def _digest(self, shards: Path) -> str:
        return self._solar("inspect", shards, "--digest").strip().splitlines()[-1].split()[-1]

    def _registry_problems(self) -> list[str]:
        """A promotion is a version, what a night came to stands in the registry, the last one promoted serves."""
        client = mlflow_client(f"sqlite:///{self.place / 'mlflow' / 'mlflow.db'}")
        problems = []
        decided = {}
        for number in range(FIRST_NIGHT, self.plan.last + 1):
            night = self.document(number, "night")
            if night is None:
                problems.append(f"the night of {day_of(number)} never ended")
            else:
                decided[night["date"]] = night
        known = nights(client, MODEL)
        if {date: told["verdict"] for date, told in known.items()} != {d: n["verdict"] for d, n in decided.items()}:
            problems.append(f"the registry knows of the nights {sorted(known)}, there were {sorted(decided)}")
        promoted = [night["champion"] for night in decided.values() if night["verdict"] == "promoted"]
        versions = sorted(int(version.version) for version in client.search_model_versions(f"name = '{MODEL}'"))
        if [str(version) for version in versions] != promoted:
            problems.append(f"promoted were {promoted}, the registry has the versions {versions}")
        serving = champion(client, MODEL)
        if serving is None or str(serving.version) != promoted[-1]:
            problems.append(f"version {promoted[-1]} was promoted last, and {serving and serving.version} serves")
        if [change.version for change in changes(client, MODEL)] != promoted:
            problems.append(f"promoted were {promoted}, noted are {[each.version for each in changes(client, MODEL)]}")
        return problems

    def _refusal_problems(self) -> list[str]:
        """What was worse by design was refused, and the next night trained from the same champion on that day again."""
        problems = []
        for number in self.plan.days("worse by design"):
            decision = self.document(number, "decision") or {}
            if decision.get("verdict") != "refused":
                problems.append(f"{day_of(number)}: worse by design, and {decision.get('verdict')}")
            before, after = self.document(number, "champion") or {}, self.document(number + 1, "champion") or {}
            trained = (self.document(number + 1, "train") or {}).get("requests", {})
            if after.get("version") != before.get("version") or trained.get("train_from") != before.get(
                "trained_until"
            ):
                problems.append(
                    f"{day_of(number + 1)}: does not train from version {before.get('version')} on both days"
                )
            start = datetime.datetime.combine(day_of(number), datetime.time(), datetime.UTC)
            if (trained.get("train_from") or 0) > start.timestamp() * 1000:
                problems.append(f"{day_of(number + 1)}: does not train on {day_of(number)} again")
        return problems


def step_document(nights_directory: Path, date: datetime.date, step: str) -> dict[str, Any] | None:
    """What a step of a night left in its journal."""
    file = nights_directory / str(date) / f"{step}.json"
    return json.loads(file.read_text()) if file.exists() else None


def frozen_quality(model: str, date: datetime.date, *, place: Path, options: Sequence[str | Path]) -> float:
    """The primary metric of version 1 on the requests from a day on, the last that the data set has."""
    start, out = f"{date}T00:00:00", place / "frozen" / str(date)
    succeeded(
        "evaluate", f"models:/{model}/1", *options, "--data.requests.valid_from", start, "--data.requests.test_from",
        start, "--out", out, cwd=place,
    )  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    return summary["metrics"][summary["systems"][0]][summary["primary"]]
