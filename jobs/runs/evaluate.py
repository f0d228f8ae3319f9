"""solar evaluate SUBJECT: the metrics of a model and of its baselines on the same requests.

The subject is a run (named by its recipe), a checkpoint or a registered model; data set, split and part may differ from
those of its training. Systems: the model, the model with emptied histories, the models of `compare` and the baselines
(jobs/training/baselines.py). Results per target go to DIR/SYSTEM.parquet, the summary to
DIR/summary.json (jobs/runs/result_tables.py prints it).
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.cluster.session import ray_session
from jobs.cluster.worker_group import run_workers
from jobs.config.run_config import RunConfig
from jobs.host.console import Console
from jobs.host.errors import UserError
from jobs.host.json_files import read_json, write_json
from jobs.runs.floor import floor_of
from jobs.runs.request_checks import count_requests, tell_labels
from jobs.runs.run_dir import Trained, run_shards, settled
from jobs.runs.summary import SUMMARY, EvaluationKey, Slice, Summary, read_summary
from jobs.runs.train import train_job
from jobs.runs.weights import System
from jobs.training.baselines import PRIOR, baselines
from jobs.training.checkpoint import checkpoint_key
from jobs.training.extent import Extent
from jobs.training.results import RankedTargets, ScoredImpressions, primary_metric, primary_per_user
from models.metrics import bootstrap_ratio_interval
from pipeline.batches.request_index import RequestCounts, leaves_out, settings_on
from pipeline.shards.dataset import Shards
from pipeline.shards.leases import lease

EMPTIED = "history emptied"


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """The directory of an evaluation and its summary."""

    directory: Path
    summary: Summary
    reused: bool


def evaluate_run(
    config: RunConfig, trained: dict[str, Trained], console: Console, *, part: str = "test", verbose: bool = False
) -> Evaluated:
    """Evaluate `trained` (model name -> its run; the main model first) on one part of the data that they were trained
    on."""
    shards = run_shards(config)
    systems = []
    for name, run in trained.items():
        job = train_job(settled(config if name == config.model["name"] else config.with_model(name)), shards)
        weights = run.checkpoint
        systems.append(System(name=name, key=checkpoint_key(weights), weights=str(weights.absolute()), job=job))
    directory = config.run_dir / ("evaluation" if part == "test" else f"evaluation-{part}")
    return evaluate(config, systems, console, shards=shards, part=part, directory=directory, verbose=verbose)


def evaluate(
    config: RunConfig, systems: list[System], console: Console, *, shards: Shards, part: str, directory: Path,
    beside: bool = True, enough: int | None = None, verbose: bool = False,
) -> Evaluated:  # fmt: skip
    """Evaluate the systems (the main one first) on one part of the shards, or reuse the same evaluation made before.

    `beside`: also evaluate the main system with emptied histories, its spectrum, and the baselines. `enough`: where
    evaluation.requests is unset, so many requests are enough, even if more fit its minutes.
    """
    # Reuse the results if the same was evaluated before.
    key = EvaluationKey(
        part=part,
        systems_evaluated={system.name: system.key for system in systems},
        manifest_fingerprint=shards.manifest.fingerprint,
        requests_config=settings_on(shards, config.data.requests),
        asked=config.evaluation.asked,
    )
    if (directory / SUMMARY).exists():
        summary = read_summary(directory)
        if summary.is_of(key):
            return Evaluated(directory, summary, reused=True)

    # Write into a staging directory: what a killed command leaves there is ignored, then replaced.
    staging = directory.absolute().with_name(f".{directory.name}.unfinished")
    if not staging.exists() and not (directory / SUMMARY).exists() and directory.exists() and any(directory.iterdir()):
        raise UserError(f"{directory}: not empty and not an evaluation: choose another --out")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)

    # Count the requests; then the workers measure every system.
    main_model = systems[0].job.model if systems[0].job else config.model
    own_baselines = [PRIOR] if main_model.get("prior") else []
    arguments = {
        "systems": systems,
        "baselines": [*own_baselines, *baselines(config.data.requests)] if beside else [],
        "beside": beside,
        "shards": shards.path,
        "manifest": shards.manifest.number,
        "requests": config.data.requests,
        "parallel": config.parallel,
        "part": part,
        "evaluation": config.evaluation,
        "enough": enough,
        "directory": str(staging),
    }
    with (
        _leases(config, systems, shards, console),
        ray_session(config.cluster, num_cpus=config.parallel.num_cpus, verbose=verbose),
    ):
        _warn(config, shards, count_requests(shards, config.data.requests), systems[0], console)
        drawn_from = _measure(config, arguments, console)

    # Summarise, and move the files into place, the summary last: it marks a complete evaluation.
    names = [system.name for system in systems]
    if beside:
        names[1:1] = [f"{names[0]}, {EMPTIED}"]
    summary = _summarise(key, staging, config, [*names, *arguments["baselines"]], drawn_from=drawn_from)
    summary.write(staging)
    directory.mkdir(exist_ok=True)
    for file in sorted(staging.iterdir(), key=lambda file: file.name == SUMMARY):
        file.replace(directory / file.name)
    staging.rmdir()
    return Evaluated(directory, summary, reused=False)


@contextlib.contextmanager
def _leases(config: RunConfig, systems: list[System], shards: Shards, console: Console) -> Iterator[None]:
    """Hold a lease on the state that is evaluated, and on those on which the systems were trained."""
    states = [(shards.path, shards.manifest.number)]
    states += [(system.job.shards, system.job.manifest) for system in systems if system.job]
    with contextlib.ExitStack() as stack:
        for path, number in dict.fromkeys(states):
            command = f"evaluation of {config.name}"
            stack.enter_context(lease(path, number=number, command=command, tell=console.teller("evaluate")))
        yield


def _measure(config: RunConfig, arguments: dict[str, Any], console: Console) -> int | None:
    """Start the workers and follow them until they have measured every system. The requests of the whole part, if only
    those of drawn users were evaluated."""
    drawn_from = None
    with console.stage("evaluate") as stage:
        num_systems = len(arguments["systems"]) + arguments["beside"] + len(arguments["baselines"])
        finished = 0

        def follow(rows: list[dict[str, Any]]) -> None:
            nonlocal finished, drawn_from
            for row in rows:
                if row["kind"] == "extent":
                    extent = Extent(**row["extent"])
                    drawn_from = extent.drawn_from
                    stage.tell(extent.told(arguments["requests"]))
                elif row["kind"] == "progress":
                    stage.update(finished + row["done"] / max(1, row["total"]), num_systems, row["stage"])
                elif row["kind"] == "failure":
                    stage.tell(row["text"])
                else:
                    finished = row["done"]
                    stage.update(finished, num_systems, row["system"])

        run_workers(
            _evaluate_worker, arguments, parallel=config.parallel, cluster=config.cluster, run_dir=config.run_dir,
            name="evaluate", on_rows=follow,
        )  # fmt: skip
        stage.result = f"{num_systems} systems on the {arguments['part']} part"
    return drawn_from


def _warn(config: RunConfig, shards: Shards, counts: RequestCounts, main: System, console: Console) -> None:
    """Tell which events the task leaves out, and what distorts the figures: histories that are cut off, and requests
    that the model may have trained on."""
    requests = config.data.requests
    tell_labels(requests, counts, console, command="evaluate")
    lengths = counts.labels.positives if leaves_out(shards, requests) and counts.labels else shards.index.events
    longer = int((lengths > requests.max_history).sum())
    if longer:
        console.line(
            f"{'evaluate':<12} {longer:,} users have more than data.requests.max_history={requests.max_history} "
            "events: their older events are not read, and the items in them count as unseen"
        )
    trained_on = main.job.requests if main.job else None
    if trained_on is not None and (trained_on.split, trained_on.valid_from, trained_on.test_from) != (
        requests.split, requests.valid_from, requests.test_from,
    ):  # fmt: skip
        console.line(
            f"{'evaluate':<12} {main.name} was trained under split {trained_on.split} (test_from "
            f"{trained_on.test_from}): it may have been trained on requests of this part"
        )


def _evaluate_worker(arguments: dict[str, Any]) -> None:
    """Runs on every worker: measures one system after another; rank 0 writes the results."""
    import torch
    import torch.distributed as dist

    from jobs.training.evaluation import evaluate as evaluate_part
    from jobs.training.evaluation import evaluate_baseline, evaluation_loader
    from jobs.training.spectrum import energy_by_rank
    from jobs.training.trial import extent_of
    from models.prior import PriorAlone
    from pipeline.batches.batch import Batch

    directory, reporter, done = Path(arguments["directory"]), arguments["reporter"], 0
    data = Shards.open(arguments["shards"], number=arguments["manifest"])
    selection, loader = {"requests": arguments["requests"], "part": arguments["part"]}, None

    def progress(system: str) -> Any:
        return lambda count, total: reporter.row("progress", stage=system, done=count, total=total)

    def record(system: str, result: Any) -> None:
        nonlocal done
        done += 1
        reporter.row("evaluated", system=system, done=done)
        if dist.get_rank() == 0:
            _write_result(directory, system, result)

    for system in arguments["systems"]:
        tower, rows, catalogue = _load_system(system, data, arguments)
        main = loader is None
        if loader is None:
            extent = extent_of(
                tower, rows, data, config=arguments["evaluation"], enough=arguments["enough"], catalogue=catalogue,
                **selection,
            )  # fmt: skip
            reporter.row("extent", extent=dataclasses.asdict(extent))
            loader = evaluation_loader(data, limit=extent.limit, **selection)
        record(system.name, evaluate_part(tower, rows, loader, catalogue=catalogue, progress=progress(system.name)))
        if main and arguments["beside"]:
            name = f"{system.name}, {EMPTIED}"
            emptied = evaluate_part(
                tower, rows, loader, catalogue=catalogue, transform=Batch.without_history, progress=progress(name)
            )
            record(name, emptied)
            for baseline in arguments["baselines"]:
                if baseline == PRIOR:
                    record(PRIOR, evaluate_part(PriorAlone(tower), rows, loader, catalogue=catalogue))
                else:
                    record(baseline, evaluate_baseline(baseline, loader, catalogue=catalogue, shards=data))
            spectrum = energy_by_rank(tower, rows, data, catalogue=catalogue, **selection)
            if spectrum is not None and dist.get_rank() == 0:
                write_json(directory / "spectrum.json", spectrum)
        # All ranks: free this system's memory before the next one is loaded.
        del tower, rows
        torch.distributed.barrier()


def _load_system(system: System, data: Shards, arguments: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(tower, item rows, catalogue) of a system, for the data that it is evaluated on. All ranks take part."""
    from jobs.training.catalogue import catalogue_of, evidence_counts, training_counts
    from jobs.training.dense_engine import PRECISIONS
    from jobs.training.exported import load_export
    from jobs.training.item_counting import with_prior
    from jobs.training.loop import build_model
    from models.prior import PriorModel, bare_tower

    if system.job is None:
        tower, rows, vocabulary, counts = load_export(Path(system.weights))
        prior, evidence = None, counts
        if isinstance(tower, PriorModel):
            prior, evidence = tower.prior, tower.counters.training_R.numpy()
    else:
        shards = Shards.open(system.job.shards, number=system.job.manifest)
        rows, tower, prior = build_model(system.job, shards, checkpoint=Path(system.weights))
        tower.to(rows.device, PRECISIONS[system.job.parallel.precision])
        vocabulary, counts = shards.vocabulary, training_counts(shards, requests=system.job.requests)
        evidence = counts
        if prior is not None:
            evidence = evidence_counts(shards, requests=system.job.requests, training_count=counts)
    catalogue = catalogue_of(data, requests=arguments["requests"], training_count=counts, vocabulary=vocabulary)
    tower = with_prior(
        bare_tower(tower), prior, data, requests=arguments["requests"], catalogue=catalogue, evidence=evidence
    )
    return tower, rows, catalogue


def _write_result(directory: Path, system: str, result: RankedTargets | ScoredImpressions) -> None:
    columns = {
        field.name: getattr(result, field.name)
        for field in dataclasses.fields(result)
        if isinstance(getattr(result, field.name), np.ndarray)
    }
    pq.write_table(pa.table(columns), directory / f"{_file_name(system)}.parquet")
    counts = {
        field.name: getattr(result, field.name) for field in dataclasses.fields(result) if field.name not in columns
    }
    write_json(directory / f"{_file_name(system)}.json", {"system": system, "counts": counts})


def read_result(directory: Path, system: str, *, task: str) -> RankedTargets | ScoredImpressions:
    """The results of one system of an evaluation."""
    table = pq.read_table(directory / f"{_file_name(system)}.parquet")
    columns = {name: table[name].to_numpy() for name in table.column_names}
    counts = read_json(directory / f"{_file_name(system)}.json")["counts"]
    return (ScoredImpressions if task == "impressions" else RankedTargets)(**columns, **counts)


def _summarise(
    key: EvaluationKey, directory: Path, config: RunConfig, systems: list[str], *, drawn_from: int | None
) -> Summary:
    """Every system's metrics, and its primary metric with intervals over users: in all, by slice, and as a ratio."""
    main, requests = systems[0], config.data.requests
    results = {system: read_result(directory, system, task=requests.task) for system in systems}

    slices = []
    for name, mask in results[main].slices().items():
        sums = {system: primary_per_user(results[system], requests=requests, mask=mask) for system in systems}
        users = len(sums[main][1])
        if not users:
            continue
        intervals = {system: bootstrap_ratio_interval(*values, seed=config.seed) for system, values in sums.items()}
        floor = floor_of(sums[main], sums, seed=config.seed)
        weight = float(sums[main][1].sum())
        slices.append(Slice(name=name, users=users, weight=weight, systems=intervals, floor=floor))
    sums_of_all = {system: primary_per_user(results[system], requests=requests)[0] for system in systems}
    return Summary(
        **vars(key),
        task=requests.task,
        split=requests.split,
        primary=primary_metric(requests),
        systems=systems,
        metrics={system: results[system].metrics() for system in systems},
        slices=slices,
        intervals=slices[0].systems if slices else {},
        ratios={
            system: bootstrap_ratio_interval(sums_of_all[main], values, seed=config.seed)
            for system, values in sums_of_all.items()
            if system != main and len(values)
        },
        drawn_from=drawn_from,
    )


def _file_name(system: str) -> str:
    return system.replace(", ", "-").replace(" ", "-")
