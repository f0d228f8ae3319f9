"""The challenger of a night: its training requests, the weights it begins from, and the champion to compare it with.

Requests by time (the day D ends at the cut-off in the log's own time zone):

    ... the champion was trained on these | new: tonight's training | valid_hours: validation | gate_hours: the gate |
        (a share of them is replayed)                                                                  end of day D
"""

from __future__ import annotations

import dataclasses
import datetime

from jobs.config.run_config import RunConfig
from jobs.host.errors import UserError
from jobs.nightly.context import CHAMPION, NightContext
from jobs.nightly.journal import past_nights
from jobs.nightly.steps import ChampionBefore, Prepared, TrainedChallenger
from jobs.runs.evaluate import evaluate
from jobs.runs.run_dir import open_shards, settled
from jobs.runs.train import train
from jobs.runs.weights import System
from jobs.tracking.champions import champion
from jobs.tracking.registry import RegisteredModel
from jobs.training.checkpoint import CheckpointError, checkpoint_key, read_train_state
from jobs.training.warm_start import begin_from
from pipeline.batches.requests import RequestConfig
from pipeline.events import DataError

HOUR_MILLISECONDS = 3_600_000


def measure_champion(night: NightContext, prepared: Prepared) -> ChampionBefore:
    """Evaluate the champion on the whole day, before anything is trained on that day."""
    found = champion(night.client, night.name)
    if found is None:
        return ChampionBefore(version=None)
    model = night.fetch(str(found.version))
    known = ChampionBefore(
        version=str(found.version),
        checkpoint=model.tags.get("solar.checkpoint"),
        trained_until=trained_until(model),
        events_then=_events_then(night, model),
    )
    day = night.requests(valid_from=night.start, test_from=night.start)
    if not night.counts(day).test.requests.any():
        return known
    measured = evaluate(
        night.config_with(day, name=f"{night.config.name}-champion"),
        [System.served(CHAMPION, model)],
        night.console,
        shards=open_shards(night.config, number=prepared.manifest),
        part="test",
        directory=night.journal.directory / CHAMPION,
        beside=False,
        verbose=night.verbose,
    )
    summary = measured.summary
    return dataclasses.replace(known, metrics=summary.metrics[CHAMPION], primary=summary.primary)


def night_requests(night: NightContext, before: ChampionBefore) -> RequestConfig:
    """The requests to train on, to validate on, and to judge by. `before`: the result of measure_champion."""
    nightly = night.config.nightly
    gate_from = night.end - round(nightly.gate_hours * HOUR_MILLISECONDS)
    valid_from = gate_from - round(nightly.valid_hours * HOUR_MILLISECONDS)
    train_from = before.trained_until
    if train_from is None:
        return night.requests(valid_from=valid_from, test_from=gate_from)
    if train_from >= valid_from:
        moment = datetime.datetime.fromtimestamp(train_from / 1000, datetime.UTC)
        raise UserError(
            f"{night.date}: the champion, version {before.version}, was trained on requests up to "
            f"{moment:%Y-%m-%d %H:%M} UTC: this night has no new requests to train on; choose a later --date"
        )
    # The share of older requests that makes them `replay` of all training requests; events stand in for requests.
    events_now, events_then = open_shards(night.config).manifest.counts["accepted"], before.events_then
    share = nightly.replay / (1 - nightly.replay) * max(events_now - events_then, 0) / max(events_then, 1)
    return night.requests(
        valid_from=valid_from, test_from=gate_from, train_from=train_from, replay_share=round(min(1.0, share), 6)
    )


def lacking(night: NightContext, requests: RequestConfig) -> str | None:
    """Which of the three parts of the requests is empty, as a sentence; None if none is."""
    counts = night.counts(requests)
    if counts.labels is not None and not counts.labels.positives.any():
        return "no event has a positive label: nothing was trained; the data are kept for the next night"
    for part, what in (("train", "to train on"), ("valid", "for validation"), ("test", "to judge by")):
        if not getattr(counts, part).requests.any():
            return f"no request {what}: nothing was trained; the data are kept for the next night"
    return None


def train_challenger(night: NightContext, before: ChampionBefore, requests: RequestConfig) -> TrainedChallenger:
    """Train from the champion's weights if they fit today's data, else from scratch on all requests."""
    training = night.config.training
    warm = dataclasses.replace(training, warm_start=before.checkpoint, epochs=night.config.nightly.epochs)
    why_cold = _why_cold(night, before, night.training_config(requests, warm))
    if why_cold is None:
        training = warm
    else:
        if before.version is not None:
            night.tell(f"trains from scratch: {why_cold}")
        requests = dataclasses.replace(requests, train_from=None, replay_share=0.0)
    config = night.training_config(requests, training)
    trained = train(config, night.console, resume=True, from_previous=True, verbose=night.verbose)
    state = read_train_state(trained.checkpoint)
    return TrainedChallenger(
        run_dir=trained.run_dir,
        checkpoint=trained.checkpoint,
        key=checkpoint_key(trained.checkpoint),
        mlflow_run_id=trained.mlflow_run_id,
        why_cold=why_cold,
        requests=requests,
        training=training,
        steps=state.step,
        events=state.events,
        train_seconds=state.train_seconds,
    )


def trained_until(model: RegisteredModel) -> int:
    """Milliseconds since 1970: the version was trained only on requests before this time."""
    requests = model.config["data"]["requests"]
    if requests["split"] == "temporal":
        return RequestConfig(**{key: requests[key] for key in ("split", "valid_from", "test_from")}).bounds[0]
    return model.settings["time_range"][1] + 1


def _why_cold(night: NightContext, before: ChampionBefore, warm: RunConfig) -> str | None:
    """Why training cannot begin from the champion's weights; None if it can. `warm`: the configuration that would."""
    if before.version is None:
        return "there is no champion"
    if not before.checkpoint:
        return f"version {before.version} has no tag that names its checkpoint"
    try:
        model = settled(warm).model
        begin_from(
            before.checkpoint, model=model, task=warm.data.requests.task, sparse=warm.optimizer.sparse,
            shards=open_shards(night.config),
        )  # fmt: skip
    except CheckpointError as error:
        return str(error)
    return None


def _events_then(night: NightContext, model: RegisteredModel) -> int:
    """Events in the data set that a version was trained on: from its manifest or, if that is gone, from the journal of
    a night that used it."""
    number = model.tags.get("solar.manifest")
    try:
        if number is not None:
            return open_shards(night.config, number=int(number)).manifest.counts["accepted"]
    except DataError:
        for past in reversed(past_nights(night.root)):
            prepared = past.read(Prepared)
            if prepared and str(prepared.manifest) == number:
                return prepared.events
    # Unknown: assume that no event is new, so that nothing is replayed.
    return open_shards(night.config).manifest.counts["accepted"]
