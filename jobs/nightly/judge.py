"""The judgement of a night: challenger and champion are evaluated on the held-out requests, both from the files that
serve them, and the gate decides."""

from __future__ import annotations

import dataclasses
import datetime
import math
from pathlib import Path

import numpy as np

from jobs.nightly.context import CHAMPION, REFERENCE, NightContext
from jobs.nightly.gate import (
    Comparison,
    Decision,
    Guard,
    Pairs,
    compare,
    compare_together,
    decide,
    pairs,
    without_champion,
)
from jobs.nightly.guards import day_guards, floor_guards, model_guards
from jobs.nightly.journal import past_nights
from jobs.nightly.latency import model_latency
from jobs.nightly.steps import ChampionBefore, EvaluatedChallenger, Judgement, Prepared, TrainedChallenger
from jobs.runs.evaluate import evaluate, read_result
from jobs.runs.export import export_model
from jobs.runs.record import read_record
from jobs.runs.result_tables import floor_lines
from jobs.runs.run_dir import open_shards
from jobs.runs.summary import Summary, read_summary
from jobs.runs.weights import System
from jobs.scorer.checksums import CHECKSUMS
from jobs.tracking.champions import champion_at_night
from jobs.tracking.export_settings import read_settings
from jobs.tracking.registry import EXPORT
from jobs.training.checkpoint import remove_committed
from models.zoo import current_settings
from pipeline.batches.requests import RequestConfig

PAIRS = "pairs.npz"


def evaluate_challenger(
    night: NightContext, before: ChampionBefore, trained: TrainedChallenger, requests: RequestConfig
) -> EvaluatedChallenger:
    """Evaluate the challenger, the champion and, on some nights, the reference on the held-out requests."""
    # The systems, the challenger first.
    config = night.trained_config(trained)
    export = challenger_export(night, trained)
    systems = [System(name=config.model["name"], key=trained.key, weights=str(export.absolute()), job=None)]
    reference = None
    if before.version is not None:
        systems.append(System.served(CHAMPION, night.fetch(before.version)))
        reference = _reference(night, before.version)
    if reference is not None:
        systems.append(System.served(REFERENCE, night.fetch(reference)))

    # Their metrics, on the data set that the challenger was trained on.
    record = read_record(trained.run_dir)
    assert record is not None, "training wrote it"
    shards = open_shards(config, number=record.manifest)
    evaluated = evaluate(
        dataclasses.replace(config, data=dataclasses.replace(config.data, requests=requests)),
        systems,
        night.console,
        shards=shards,
        part="test",
        directory=config.run_dir / "evaluation",
        enough=_enough_requests(night),
        verbose=night.verbose,
    )

    # Their scoring times, for users of the evaluation.
    times = None
    if before.version is not None:
        users = np.unique(read_result(evaluated.directory, systems[0].name, task=requests.task).user)
        times = model_latency(export, Path(systems[1].weights), shards=shards, users=users)
    return EvaluatedChallenger(
        directory=evaluated.directory,
        reference=reference,
        latencies=times.seconds if times else None,
        latency_ratio=times.ratio if times else None,
    )


def _enough_requests(night: NightContext) -> int | None:
    """Requests of which the gate decides almost surely, by the latest comparison of a night; None = there is none.

    They are of twice as many users as would let an equal challenger pass in 80 % of nights: it then passes in 97 %.
    """
    main, gate = night.config.model["name"], night.config.nightly.gate
    for past in reversed(past_nights(night.root)):
        found = past.read(Judgement)
        tonight = found.comparisons.get("tonight") if found else None
        if found and tonight and tonight.users_needed and past.date < night.date:
            requests_per_user = found.metrics[main]["requests"] / tonight.users
            return math.ceil(2 * max(tonight.users_needed, gate.min_users) * requests_per_user)
    return None


def judge(
    night: NightContext, before: ChampionBefore, evaluated: EvaluatedChallenger, requests: RequestConfig,
    prepared: Prepared,
) -> Judgement:  # fmt: skip
    """Compare the evaluated systems, check the guards and decide."""
    directory, main = evaluated.directory, night.config.model["name"]
    summary, gate = read_summary(directory), night.config.nightly.gate
    guards = _guards_of_day(night, prepared) + floor_guards(summary, gate=gate)
    if before.version is None:
        found = without_champion(guards, primary=summary.primary, value=summary.metrics[main][summary.primary])
        return _judgement(found, {}, guards, summary)
    results = {name: read_result(directory, name, task=requests.task) for name in (main, CHAMPION)}
    both = pairs(results[main], results[CHAMPION], requests=requests)
    np.savez(night.journal.directory / PAIRS, **dataclasses.asdict(both))
    seed, nights = night.config.seed, [*_undecided_before(night, before.version), both]
    comparisons = {
        "tonight": compare(both, margin=gate.margin, seed=seed),
        "together": compare_together(nights, gate=gate, seed=seed),
    }
    if evaluated.reference is not None:
        other = pairs(results[main], read_result(directory, REFERENCE, task=requests.task), requests=requests)
        comparisons[REFERENCE] = compare(other, margin=gate.margin, seed=seed)
    metrics = summary.metrics
    guards += model_guards(metrics[main], metrics[CHAMPION], latency=evaluated.latency, gate=gate)
    decision = decide(
        comparisons["tonight"], comparisons["together"], guards, reference=comparisons.get(REFERENCE), gate=gate
    )
    return _judgement(decision, comparisons, guards, summary)


def challenger_export(night: NightContext, trained: TrainedChallenger) -> Path:
    """Directory of the challenger's export, as it would be served; written once per night."""
    directory = night.journal.directory / "export" / EXPORT
    # The checksums are written last: an export without them was cut short by a kill. The code that reads an export is
    # today's, so one with settings of an earlier version is written again.
    if not (directory / CHECKSUMS).exists() or not _has_current_settings(directory):
        remove_committed(directory)
        export_model(night.trained_config(trained), trained.checkpoint, directory, tell=night.tell)
    return directory


def _has_current_settings(export: Path) -> bool:
    settings = read_settings(export, uri=str(export))["model"]
    return settings == current_settings(settings)


def _reference(night: NightContext, version: str) -> str | None:
    """Version of the champion of `reference_days` ago, on the nights that compare with it; None if it still serves."""
    nightly = night.config.nightly
    if not nightly.reference_every or night.date.toordinal() % nightly.reference_every:
        return None
    long_ago = night.date - datetime.timedelta(days=nightly.reference_days)
    found = champion_at_night(night.client, night.name, long_ago.isoformat())
    return found if found != version else None


def _guards_of_day(night: NightContext, prepared: Prepared) -> list[Guard]:
    days, today = prepared.days, night.date.isoformat()
    if today not in days:
        return []
    before = [days[day] for day in sorted(days) if day < today]
    return day_guards(days[today], before, gate=night.config.nightly.gate)


def _undecided_before(night: NightContext, version: str) -> list[Pairs]:
    """The pairs of the undecided nights directly before this one, against the same champion, oldest first."""
    found = []
    for past in reversed(past_nights(night.root)):
        if past.date >= night.date:
            continue
        ended = past.ended
        assert ended is not None, "past nights have ended"
        if ended.verdict in ("no_input", "failed"):
            continue
        if ended.verdict != "undecided" or ended.champion != version:
            break
        file = past.directory / PAIRS
        if file.exists():
            with np.load(file) as arrays:
                found.append(Pairs(**{name: arrays[name] for name in arrays.files}))
    return found[::-1]


def _judgement(
    decision: Decision, comparisons: dict[str, Comparison], guards: list[Guard], summary: Summary
) -> Judgement:
    return Judgement(
        verdict=decision.verdict, reasons=decision.reasons, comparisons=comparisons, guards=tuple(guards),
        primary=summary.primary, metrics=summary.metrics,
        below_floor=tuple(floor_lines(summary)) or None,
    )  # fmt: skip
