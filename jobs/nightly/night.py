"""One night, read from top to bottom in `run_night`: the day's log in, a decision out.

Each step leaves its file in the night's journal; a night that was killed goes on after the last one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.cluster.session import ray_session
from jobs.host.errors import UserError
from jobs.host.files import read_json
from jobs.nightly import context
from jobs.nightly.challenger import lacking, measure_champion, night_requests, train_challenger
from jobs.nightly.cleanup import collect_old
from jobs.nightly.context import NightContext
from jobs.nightly.ingest_day import require_input, take_in
from jobs.nightly.journal import END
from jobs.nightly.judge import challenger_export, evaluate_challenger, judge
from jobs.nightly.report import write_report
from jobs.runs.evaluate import Evaluated
from jobs.runs.register import register
from jobs.runs.run_dir import Trained
from jobs.serving.build_states import build_states, refuse_models_without_states
from jobs.serving.stored_states import states_directory
from jobs.tracking.champions import CHAMPION, ChampionChanged, champion, note_night, promote, require_champion
from pipeline.shards.manifest import why_removed
from pipeline.storage import absolute

REASONS, REASON_LENGTH = 4, 500
"""Kept with the registered model, whose tags are short."""


def run_night(night: NightContext) -> dict[str, Any]:
    """Go on to the end of the night; what it came to. TryLater: not tonight."""
    if (ended := night.journal.ended) is not None:
        return ended
    _start_over_where_data_are_gone(night)
    if night.journal.read("prepare") is None:
        # Before anything is started: after a long pause many days may have none.
        require_input(night)
    config = night.config
    with ray_session(config.cluster, num_cpus=config.parallel.num_cpus, verbose=night.verbose):
        prepared = _step(night, "prepare", lambda: take_in(night))
        before = _step(night, "champion", lambda: measure_champion(night, prepared))
        asked = night_requests(night, before)
        if lack := lacking(night, asked):
            trained = evaluated = None
            nothing = {"verdict": "undecided", "reasons": [lack], "comparisons": {}, "guards": [], "metrics": {}}
            decision = _step(night, "decision", lambda: nothing)
        else:
            trained = _step(night, "train", lambda: train_challenger(night, before, asked))
            evaluated = _step(night, "evaluate", lambda: evaluate_challenger(night, before, trained, asked))
            decision = _step(night, "decision", lambda: judge(night, before, evaluated, asked, prepared))
        registered = _step(night, "register", lambda: _register(night, before, trained, evaluated, decision))
        _step(night, "states", lambda: _build_states(night, registered, prepared))
    outcome = {
        "date": night.date.isoformat(),
        "verdict": registered["verdict"],
        "reasons": registered["reasons"],
        "champion_before": before["version"],
        "champion": registered["champion"],
        "run_dir": trained["run_dir"] if trained else None,
        "refused_days": prepared["refused"],
        "left_out_days": prepared["left_out"],
    }
    return _end(night, outcome, trained)


def _step(night: NightContext, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the step left, or leaves now."""
    done = night.journal.read(name)
    if done is not None:
        return done
    night.tell(name)
    started = time.monotonic()
    document = work()
    return night.journal.write(name, {**document, "seconds": time.monotonic() - started})


def _start_over_where_data_are_gone(night: NightContext) -> None:
    """A state of the data that the night began with may hold users who were forgotten since."""
    prepared = night.journal.read("prepare")
    if prepared and (why := why_removed(absolute(night.config.shards_dir), number=prepared["manifest"])):
        night.tell(f"starts over: its data are gone ({why})")
        night.journal.start_over()


def _register(
    night: NightContext, before: dict[str, Any], trained: dict[str, Any] | None, evaluated: dict[str, Any] | None,
    decision: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """A promoted challenger becomes a version and the champion; of any other only the decision is kept."""
    decision, version = _still_valid(night, before, decision), before["version"]
    told = _told_to_registry(night, before, decision)
    tags = {f"solar.night.{key}": value if isinstance(value, str) else json.dumps(value) for key, value in told.items()}
    if trained is not None:
        for key, value in tags.items():
            night.client.set_tag(trained["mlflow_run_id"], key, value)
    if decision["verdict"] == "promoted" and trained is not None and evaluated is not None:
        why = f"night {night.date}: {'; '.join(decision['reasons'])}"

        def set_champion(client: Any, name: str, version: str) -> str:
            promote(client, name, version, expected=before["version"], why=why)
            return CHAMPION

        directory = Path(evaluated["directory"])
        registered = register(
            night.trained_config(trained),
            Trained(Path(trained["run_dir"]), Path(trained["checkpoint"]), trained["mlflow_run_id"], reused=True),
            Evaluated(directory, read_json(directory / "summary.json"), reused=True),
            night.console,
            set_alias=set_champion,
            tags=tags,
            exported=challenger_export(night, trained),
        )
        version = str(registered.version)
    note_night(night.client, night.name, night.date.isoformat(), {**told, "champion": version})
    return {"champion": version, "verdict": decision["verdict"], "reasons": decision["reasons"]}


def _still_valid(night: NightContext, before: dict[str, Any], decision: dict[str, Any]) -> dict[str, Any]:
    """The decision, unless somebody made another version the champion since."""
    done = champion(night.client, night.name)
    if decision["verdict"] != "promoted" or (done and done.tags.get("solar.night.date") == night.date.isoformat()):
        return decision
    try:
        require_champion(night.client, night.name, before["version"])
    except ChampionChanged as error:
        return {**decision, "verdict": "undecided", "reasons": [str(error)]}
    return decision


def _told_to_registry(night: NightContext, before: dict[str, Any], decision: dict[str, Any]) -> dict[str, Any]:
    """A few figures and reasons: what `solar history` shows."""
    told: dict[str, Any] = {
        "date": night.date.isoformat(),
        "verdict": decision["verdict"],
        "reasons": [reason[:REASON_LENGTH] for reason in decision["reasons"][:REASONS]],
        "champion_before": before["version"],
        **decision["comparisons"].get("together", {}),
    }
    metrics = {"challenger": night.config.model["name"], "champion_metric": context.CHAMPION}
    for key, system in metrics.items():
        if system in decision["metrics"]:
            told |= {"metric": decision["primary"], key: decision["metrics"][system][decision["primary"]]}
    return told


def _build_states(night: NightContext, registered: dict[str, Any], prepared: dict[str, Any]) -> dict[str, Any]:
    """What serving needs of the champion's users without their raw histories; a model that reads those has none."""
    if not night.config.nightly.states or registered["champion"] is None:
        return {"built": None}
    model = night.fetch(registered["champion"])
    try:
        refuse_models_without_states(model)
    except UserError as error:
        return {"built": None, "why": str(error)}
    built = build_states(
        model, shards=night.config.shards_dir, manifest=prepared["manifest"],
        out=states_directory(night.config.workspace, model), console=night.console, cluster=night.config.cluster,
    )  # fmt: skip
    return {"built": str(built.directory), "users": built.users, "bytes": built.bytes}


def _end(night: NightContext, outcome: dict[str, Any], trained: dict[str, Any] | None) -> dict[str, Any]:
    """The report, and the file that ends the night; then old nights are cleared away."""
    report = write_report(night.config, night.root, night.journal, outcome)
    if trained is not None:
        for file in (report, night.journal.directory / "decision.json"):
            night.client.log_artifact(trained["mlflow_run_id"], str(file), "night")
    ended = night.journal.write(END, {**outcome, "report": str(report)})
    collect_old(night.config, night.root, night.client, night.console)
    return ended
