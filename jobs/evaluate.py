"""solar evaluate RECIPE: the best checkpoint of a run -> metrics, beside its baselines, on the same requests.

Systems: the model, the model with its history emptied, the models of `compare` and popularity. Results per request go
to RUN/evaluation/SYSTEM.parquet, the summary to RUN/evaluation/summary.json.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.cluster import ray_session
from jobs.config import RunConfig
from jobs.console import Console
from jobs.train import Trained, open_shards, read_json, train_job, write_json
from jobs.training.checkpoint import checkpoint_key
from jobs.workers import run_workers
from models.metrics import bootstrap_interval, bootstrap_ratio_interval, ndcg
from pipeline.shards import Shards

PRIMARY_CUTOFF = 10
EMPTIED = "history emptied"


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """Where the results are and what they say."""

    directory: Path
    summary: dict[str, Any]
    reused: bool


def evaluate(
    config: RunConfig, trained: dict[str, Trained], console: Console, *, part: str = "test", verbose: bool = False
) -> Evaluated:
    """Evaluate `trained` (model name -> its run; the main model first) on one part. Same checkpoints: reused."""
    directory = config.run_dir / "evaluation"
    shards = open_shards(config)
    subject = {
        "part": part,
        "checkpoints": {name: checkpoint_key(run.checkpoint) for name, run in trained.items()},
        "manifest_fingerprint": shards.manifest.fingerprint,
    }
    if (directory / "summary.json").exists():
        summary = read_json(directory / "summary.json")
        if all(summary.get(key) == value for key, value in subject.items()):
            return Evaluated(directory, summary, reused=True)
    directory.mkdir(parents=True, exist_ok=True)

    jobs = []
    for name, run in trained.items():
        part_config = config if name == config.model["name"] else config.with_model(name)
        jobs.append((name, train_job(part_config, shards), str(run.checkpoint.absolute())))
    longer = int((shards.index.events > config.data.requests.max_history).sum())
    if longer:
        console.line(
            f"{'evaluate':<12} {longer:,} users have more than data.requests.max_history="
            f"{config.data.requests.max_history} events: their older ones count as unseen"
        )
    arguments = {"jobs": jobs, "part": part, "directory": str(directory.absolute())}
    with (
        ray_session(config.cluster, num_cpus=config.parallel.num_cpus, verbose=verbose),
        console.stage("evaluate") as stage,
    ):
        num_systems = len(jobs) + 2

        def follow(rows: list[dict[str, Any]]) -> None:
            for row in rows:
                stage.update(row["done"], num_systems, row["system"])

        run_workers(_evaluate_worker, arguments, config=config, name="evaluate", on_rows=follow)
        stage.result = f"{num_systems} systems on the {part} part"
    summary = subject | _summarise(directory, config, list(trained))
    write_json(directory / "summary.json", summary)
    return Evaluated(directory, summary, reused=False)


def _evaluate_worker(arguments: dict[str, Any]) -> None:
    """On every worker: each system in turn; rank 0 writes."""
    import torch
    import torch.distributed as dist

    from jobs.training.evaluation import evaluate as evaluate_part
    from jobs.training.evaluation import evaluate_counts
    from jobs.training.loop import build_model
    from jobs.training.parallel import PRECISIONS
    from jobs.training.spectrum import energy_by_rank
    from pipeline.batch import Batch
    from pipeline.loader import training_item_counts

    directory, part, done = Path(arguments["directory"]), arguments["part"], 0

    def record(system: str, result: Any) -> None:
        nonlocal done
        done += 1
        arguments["reporter"].row("evaluated", system=system, done=done)
        if dist.get_rank() == 0:
            _write_result(directory, system, result)

    for index, (name, job, checkpoint) in enumerate(arguments["jobs"]):
        shards = Shards.open(job.shards, number=job.manifest)
        tables, tower = build_model(job, shards, checkpoint=Path(checkpoint))
        tower.to(tables.device, PRECISIONS[job.parallel.precision])
        record(name, evaluate_part(tower, tables, shards, requests=job.requests, part=part))
        if index == 0:
            emptied = evaluate_part(
                tower, tables, shards, requests=job.requests, part=part, transform=Batch.without_history
            )
            record(f"{name}, {EMPTIED}", emptied)
            counts = training_item_counts(shards, requests=job.requests)
            record("popularity", evaluate_counts(shards, counts, requests=job.requests, part=part))
            spectrum = energy_by_rank(tower, tables, shards, requests=job.requests, part=part)
            if spectrum is not None and dist.get_rank() == 0:
                write_json(directory / "spectrum.json", spectrum)
        del tables, tower
        torch.distributed.barrier()


def _write_result(directory: Path, system: str, result: Any) -> None:
    columns = {
        field.name: getattr(result, field.name)
        for field in dataclasses.fields(result)
        if isinstance(getattr(result, field.name), np.ndarray)
    }
    pq.write_table(pa.table(columns), directory / f"{_file_name(system)}.parquet")
    write_json(directory / f"{_file_name(system)}.json", {"system": system, "metrics": result.metrics()})


def _summarise(directory: Path, config: RunConfig, trained: list[str]) -> dict[str, Any]:
    main = config.model["name"]
    systems = [main, f"{main}, {EMPTIED}", *trained[1:], "popularity"]
    metrics = {
        system: json.loads((directory / f"{_file_name(system)}.json").read_text())["metrics"] for system in systems
    }
    summary: dict[str, Any] = {
        "task": config.data.requests.task,
        "split": config.data.requests.split,
        "systems": systems,
        "metrics": metrics,
    }
    if config.data.requests.task == "next_item":
        per_user = {system: _ndcg_per_user(directory, system) for system in systems}
        summary["intervals"] = {
            system: dataclasses.asdict(bootstrap_interval(values, seed=config.seed))
            for system, values in per_user.items()
        }
        summary["ratios"] = {
            system: dataclasses.asdict(bootstrap_ratio_interval(per_user[main], values, seed=config.seed))
            for system, values in per_user.items()
            if system != main
        }
    return summary


def _ndcg_per_user(directory: Path, system: str) -> np.ndarray:
    """Mean NDCG@10 (seen items removed) of every user, in the order of the users."""
    table = pq.read_table(directory / f"{_file_name(system)}.parquet", columns=["user", "rank_removed"])
    _, index = np.unique(table["user"].to_numpy(), return_inverse=True)
    values = ndcg(table["rank_removed"].to_numpy(), k=PRIMARY_CUTOFF)
    return np.bincount(index, weights=values) / np.bincount(index)


def _file_name(system: str) -> str:
    return system.replace(", ", "-").replace(" ", "-")
