"""One night, from the day's log to a decision: read `run_night` from top to bottom.

Each step stores a document in the night's journal; a killed night continues after the last stored one.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

from jobs.cluster.session import ray_session
from jobs.host.documents import as_json
from jobs.host.errors import UserError
from jobs.nightly import context, steps
from jobs.nightly.challenger import lacking, measure_champion, night_requests, train_challenger
from jobs.nightly.cleanup import collect_old
from jobs.nightly.context import NightContext
from jobs.nightly.ingest_day import require_input, take_in
from jobs.nightly.judge import challenger_export, evaluate_challenger, judge
from jobs.nightly.report import write_report
from jobs.runs.evaluate import Evaluated
from jobs.runs.register import register
from jobs.runs.run_dir import Trained
from jobs.runs.summary import read_summary
from jobs.serving.build_states import build_states, refuse_models_without_states
from jobs.serving.stored_states import states_directory
from jobs.tracking.champions import CHAMPION, ChampionChanged, champion, note_night, promote, require_champion
from pipeline.shards.manifest import why_removed
from pipeline.storage import absolute

S = TypeVar("S", bound=steps.Step)
REASONS, REASON_LENGTH = 4, 500
"""Reasons that are stored with the registered model, and characters of each: its tags are short."""


def run_night(night: NightContext) -> steps.Outcome:
    """Do the steps of the night that are not done yet; returns its outcome. TryLater: the night cannot run now."""
    if (ended := night.journal.ended) is not None:
        return ended
    _start_over_if_data_were_removed(night)
    # Check the input before Ray is started: after a long pause, many days may have none.
    if night.journal.read(steps.Prepared) is None:
        require_input(night)
    config = night.config
    with ray_session(config.cluster, num_cpus=config.parallel.num_cpus, verbose=night.verbose):
        # Ingest the day, and measure the champion on it before anything is trained on it.
        prepared = _step(night, steps.Prepared, lambda: take_in(night))
        before = _step(night, steps.ChampionBefore, lambda: measure_champion(night, prepared))

        # Train, evaluate and judge the challenger, if there are requests for all three.
        requests = night_requests(night, before)
        if missing := lacking(night, requests):
            trained = evaluated = None
            decision = _step(night, steps.Judgement, lambda: steps.Judgement(verdict="undecided", reasons=(missing,)))
        else:
            trained = _step(night, steps.TrainedChallenger, lambda: train_challenger(night, before, requests))
            evaluated = _step(
                night, steps.EvaluatedChallenger, lambda: evaluate_challenger(night, before, trained, requests)
            )
            decision = _step(night, steps.Judgement, lambda: judge(night, before, evaluated, requests, prepared))

        # Carry out the decision, and build the states for whichever version serves from now on.
        registered = _step(night, steps.Registered, lambda: _register(night, before, trained, evaluated, decision))
        _step(night, steps.BuiltStates, lambda: _build_states(night, registered, prepared))

    # End the night.
    outcome = steps.Outcome(
        date=night.date,
        verdict=registered.verdict,
        reasons=registered.reasons,
        champion_before=before.version,
        champion=registered.champion,
        run_dir=trained.run_dir if trained else None,
        refused_days=prepared.refused,
        left_out_days=prepared.left_out,
    )
    return _end(night, outcome, trained)


def _step(night: NightContext, kind: type[S], work: Callable[[], S]) -> S:
    """The document of a step: the stored one if the step is done, else do the step and store it."""
    stored = night.journal.read(kind)
    if stored is not None:
        return stored
    night.tell(kind.STEP)
    started = time.monotonic()
    document = work()
    return night.journal.write(dataclasses.replace(document, seconds=time.monotonic() - started))


def _start_over_if_data_were_removed(night: NightContext) -> None:
    """Start the night over if the state of the data that it began with was removed because users in it were
    forgotten."""
    prepared = night.journal.read(steps.Prepared)
    if prepared and (why := why_removed(absolute(night.config.shards_dir), number=prepared.manifest)):
        night.tell(f"starts over: the state of the data that it began with was removed ({why})")
        night.journal.start_over()


def _register(
    night: NightContext, before: steps.ChampionBefore, trained: steps.TrainedChallenger | None,
    evaluated: steps.EvaluatedChallenger | None, decision: steps.Judgement,
) -> steps.Registered:  # fmt: skip
    """Register a promoted challenger as the champion; of any other challenger store only the decision."""
    decision, version = _still_valid(night, before, decision), before.version
    summary = _registry_summary(night, before, decision)
    tags = {
        f"solar.night.{key}": value if isinstance(value, str) else json.dumps(value) for key, value in summary.items()
    }
    if trained is not None:
        for key, value in tags.items():
            night.client.set_tag(trained.mlflow_run_id, key, value)
    if decision.verdict == "promoted" and trained is not None and evaluated is not None:
        why = f"night {night.date}: {'; '.join(decision.reasons)}"

        def set_champion(client: Any, name: str, version: str) -> str:
            change = promote(client, name, version, expected=before.version, why=why)
            if change.before != before.version:
                night.tell(f"version {version} replaced version {change.before}, which was promoted at the same moment")
            return CHAMPION

        registered = register(
            night.trained_config(trained),
            Trained(trained.run_dir, trained.checkpoint, trained.mlflow_run_id, reused=True),
            Evaluated(evaluated.directory, read_summary(evaluated.directory), reused=True),
            night.console,
            set_alias=set_champion,
            tags=tags,
            exported=challenger_export(night, trained),
        )
        version = str(registered.version)
    note_night(night.client, night.name, night.date.isoformat(), {**summary, "champion": version})
    return steps.Registered(champion=version, verdict=decision.verdict, reasons=decision.reasons)


def _still_valid(night: NightContext, before: steps.ChampionBefore, decision: steps.Judgement) -> steps.Judgement:
    """The decision; undecided if somebody has made another version the champion in the meantime."""
    current = champion(night.client, night.name)
    # The champion may be from this very night: the night was killed after the promotion.
    if decision.verdict != "promoted" or (current and current.tags.get("solar.night.date") == night.date.isoformat()):
        return decision
    try:
        require_champion(night.client, night.name, before.version)
    except ChampionChanged as error:
        return dataclasses.replace(decision, verdict="undecided", reasons=(str(error),))
    return decision


def _registry_summary(night: NightContext, before: steps.ChampionBefore, decision: steps.Judgement) -> dict[str, Any]:
    """A few figures and reasons, which `solar history` shows."""
    summary: dict[str, Any] = {
        "date": night.date.isoformat(),
        "verdict": decision.verdict,
        "reasons": [reason[:REASON_LENGTH] for reason in decision.reasons[:REASONS]],
        "champion_before": before.version,
        **as_json(decision.comparisons.get("together", {}), finite=True),
    }
    metrics = {"challenger": night.config.model["name"], "champion_metric": context.CHAMPION}
    for key, system in metrics.items():
        if decision.primary and system in decision.metrics:
            value = as_json(decision.metrics[system][decision.primary], finite=True)
            summary |= {"metric": decision.primary, key: value}
    return summary


def _build_states(night: NightContext, registered: steps.Registered, prepared: steps.Prepared) -> steps.BuiltStates:
    """Build the states from which the champion can be served without raw histories; some models cannot have any."""
    if not night.config.nightly.states or registered.champion is None:
        return steps.BuiltStates(built=None)
    model = night.fetch(registered.champion)
    try:
        refuse_models_without_states(model)
    except UserError as error:
        return steps.BuiltStates(built=None, why=str(error))
    built = build_states(
        model, shards=night.config.shards_dir, manifest=prepared.manifest,
        out=states_directory(night.config.workspace, model), console=night.console, cluster=night.config.cluster,
    )  # fmt: skip
    return steps.BuiltStates(built=built.directory, users=built.users, bytes=built.bytes)


def _end(night: NightContext, outcome: steps.Outcome, trained: steps.TrainedChallenger | None) -> steps.Outcome:
    """Write the report and the document that ends the night; then remove what old nights left."""
    report = write_report(night.config, night.root, night.journal, outcome)
    if trained is not None:
        for file in (report, night.journal.file(steps.Judgement)):
            night.client.log_artifact(trained.mlflow_run_id, str(file), "night")
    ended = night.journal.write(dataclasses.replace(outcome, report=report))
    collect_old(night.config, night.root, night.client, night.console)
    return ended
