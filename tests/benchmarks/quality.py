"""python tests/benchmarks/quality.py RECIPE SUITE: the same data, loss and budget for many models, side by side.

    python tests/benchmarks/quality.py ml-1m models --seeds 1 2 3
    python tests/benchmarks/quality.py ml-1m ablations --users 1000 --epochs 3

The event log must have been imported (WORKSPACE/events/NAME, see pipeline/README.md); `--users` takes a sample of its
users into a data set of its own, `--source` and further `--set KEY VALUE` reach the recipe. Every variant and seed is
one process on one core, `--jobs` of them at once; what has a result in DIRECTORY is not run again. Ablations are
measured on the validation part, models on the test part; the table gives the mean over seeds and their standard
deviation, and the mean ratio to the first variant of the same seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import polars as pl

# A script's own directory is on the path, the repository's root is not.
sys.path.insert(0, str(Path(__file__).parents[2]))

from jobs.cluster.session import quiet_environment, ray_session
from jobs.config.reader import load_config
from jobs.config.run_config import RunConfig
from jobs.training.baselines import BASELINES, baselines

Options = dict[str, Any]

MODELS: dict[str, Options] = {
    "SOLAR": {},
    "SOLAR, interests alone": {"recent_window": 0},
    "DIN, whole history": {"name": "din"},
    "DIN, last 50": {"name": "din", "whole_history": False},
    "linear attention": {"name": "linear_attention"},
    "LightSANs pooling": {"name": "light_sans"},
    "mean pooling": {"name": "mean_pooling"},
    # What counts and learns nothing, where it is a baseline of the recipe.
    **{name: {} for name in BASELINES},
}
ABLATIONS: dict[str, Options] = {
    "SOLAR": {},
    **{f"rank {rank}": {"rank": rank} for rank in (2, 4, 8, 32, 64)},
    "sign rule off": {"canonical_sign": False, "form": "softmax"},
    "scale rule off": {"divide_by_events": False, "form": "softmax"},
    "gradient through the directions": {"gradient": "stable"},
    "softmax": {"form": "softmax"},
    "bilinear": {"form": "bilinear"},
    "gaussian": {"form": "gaussian"},
    "set attention": {"set_attention": True},
    **{f"half-life {events}": {"half_life": float(events)} for events in (25, 100, 400)},
    **{f"window {events}": {"recent_window": events} for events in (16, 100)},
    "interests off": {"interests": False},
    **{f"decomposed every {events}": {"checkpoint_every": events} for events in (4, 50)},
    "two layers": {"num_layers": 2},
    "feed-forward": {"ffn_multiple": 2},
    "4 heads": {"num_heads": 4},
    "user features off": {"user_features": False},
    "absolute time": {"absolute_time": True},
    "interests alone": {"recent_window": 0},
    "interests alone, softmax": {"recent_window": 0, "form": "softmax"},
    "interests alone, bilinear": {"recent_window": 0, "form": "bilinear"},
    "interests alone, gaussian": {"recent_window": 0, "form": "gaussian"},
    "interests alone, gaussian, rank 64": {"recent_window": 0, "form": "gaussian", "rank": 64},
    "interests alone, absolute time": {"recent_window": 0, "absolute_time": True},
    "interests alone, half-life 50": {"recent_window": 0, "half_life": 50.0},
}
HISTORIES: dict[str, Options] = {
    "SOLAR": {},
    **{f"history cut at {events}": {"max_history": events} for events in (50, 200, 1000)},
}
NO_HISTORY_NEGATIVES: Options = {"history_negatives": 0, "log_q": False}
RETURNING: dict[str, Options] = {
    "SOLAR": {},
    "repeats off": {"repeats": False},
    "history negatives off": NO_HISTORY_NEGATIVES,
    "both off": {"repeats": False, **NO_HISTORY_NEGATIVES},
    "uniform negatives": {"negatives": "uniform", "popularity_power": 0.75},
    "interests off": {"interests": False},
    "interests off, repeats off": {"interests": False, "repeats": False},
}
"""For recipes of data where people come back to items."""
SUITES = {"models": MODELS, "ablations": ABLATIONS, "histories": HISTORIES, "returning": RETURNING}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--only", nargs="+", help="names of variants; the first one is always run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--users", type=int, help="a sample of so many users")
    parser.add_argument("--workspace", default="workspace", help="where the event log is")
    parser.add_argument("--directory", type=Path, default=Path("workspace/quality"), help="results, kept")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"))
    options = parser.parse_args()
    # Read when a process starts: what allocates as a worker does must do so in the processes of the variants too.
    quiet_environment()
    suite = SUITES[options.suite]
    first = next(iter(suite))
    chosen = {name: suite[name] for name in suite if not options.only or name in [first, *options.only]}
    config = prepared(options, chosen)
    there = baselines(config.data.requests)
    chosen = {name: chosen[name] for name in chosen if name not in BASELINES or name in there}
    epochs = f"-{options.epochs}-epochs" if options.epochs else ""
    place = options.directory / f"{config.data.name}-{options.suite}{epochs}"
    part = "test" if options.suite == "models" else "valid"
    # Seed by seed: a table of all variants is there early.
    tasks = [
        (config, name, chosen[name], seed, part, place)
        for seed, name in itertools.product(options.seeds, chosen)
        if not result_path(place, name, seed).exists()
    ]
    run_all(tasks, jobs=options.jobs)
    print(table(place, chosen, options.seeds, config))


def prepared(options: argparse.Namespace, chosen: dict[str, Options]) -> RunConfig:
    """The config of the recipe on prepared shards: of the whole log, or of a sample of its users."""
    from pipeline.build import index_requests, prepare
    from pipeline.shards.dataset import Shards

    overrides = ["--workspace", options.workspace, "--parallel.num_workers", "1"]
    overrides += [word for key, value in options.set for word in (f"--{key}", value)]
    if options.epochs:
        overrides += ["--training.epochs", str(options.epochs)]
    config = load_config("train", options.recipe, overrides)
    log, name = Path(config.events_dir), config.data.name
    if not log.is_dir():
        sys.exit(f"{log}: no event log there: import it first, see README.md")
    if options.users:
        name = f"{name}-{options.users}-users"
        log = sampled(log, options.directory / "events" / name, users=options.users)
    shards = (options.directory / "shards" / name).absolute()
    overrides += ["--data.name", name, "--data.shards", str(shards), "--data.events", str(log.absolute())]
    config = load_config("train", options.recipe, overrides)
    with ray_session(config.cluster, num_cpus=2, verbose=False):
        if not (shards / "manifests").exists():
            prepare(str(log), str(shards), config=config.data.prepare)
        for changes in chosen.values():
            index_requests(Shards.open(str(shards)), config=with_changes(config, changes).data.requests)
    return config


def sampled(log: Path, out: Path, *, users: int) -> Path:
    """A log with `users` of the users, the same ones each time, and the same tables beside it."""
    if out.exists():
        return out
    out.mkdir(parents=True)
    files = sorted(log.glob("events-*.parquet"))
    kept = pl.scan_parquet(files).select(pl.col("user_id").unique().sort()).collect()["user_id"].sample(users, seed=0)
    pl.scan_parquet(files).filter(pl.col("user_id").is_in(kept.implode())).sink_parquet(out / "events-00000.parquet")
    for table in (file for file in log.iterdir() if not file.name.startswith("events-")):
        (out / table.name).write_bytes(table.read_bytes())
    return out


def run_all(tasks: list[tuple], *, jobs: int) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, maxtasksperchild=1) as pool:
        for done, line in enumerate(pool.imap_unordered(run_one, tasks, chunksize=1), 1):
            print(f"{done:>4}/{len(tasks)}  {line}", file=sys.stderr, flush=True)


def run_one(task: tuple) -> str:
    """Evaluate one variant with one seed as a group of one rank, trained if it learns; write its result."""
    config, name, changes, seed, part, place = task
    import torch
    import torch.distributed as dist

    from jobs.cluster.worker import quiet_libraries
    from jobs.runs.run_dir import open_shards, settled
    from jobs.runs.train import train_job
    from jobs.training.catalogue import catalogue_of, training_counts
    from jobs.training.evaluation import evaluate_baseline, evaluation_loader

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    quiet_libraries()
    run = f"{file_name(name)}-{seed}"
    changed = dataclasses.replace(with_changes(config, changes), name=run, seed=seed, workspace=str(place.absolute()))
    changed, shards = settled(changed), open_shards(changed)
    job = train_job(changed, shards)
    with tempfile.TemporaryDirectory() as store:
        dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=0, world_size=1)
        started = time.monotonic()
        counts = training_counts(shards, requests=job.requests)
        catalogue = catalogue_of(shards, requests=job.requests, training_count=counts)
        if name in BASELINES:
            trained: Options = {"steps": 0, "train_seconds": 0.0}
            loader = evaluation_loader(shards, requests=job.requests, part=part)
            result = evaluate_baseline(name, loader, catalogue=catalogue, shards=shards)
        else:
            result, trained = trained_and_evaluated(job, shards, catalogue=catalogue, part=part)
        dist.destroy_process_group()
    found = {
        "variant": name,
        "seed": seed,
        "model": changed.model,
        "part": part,
        "metrics": result.metrics(),
        "slices": {
            label: sum_and_count(result, mask, seen_items=job.requests.seen_items)
            for label, mask in result.slices().items()
        },
        "whole_seconds": time.monotonic() - started,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        **trained,
    }
    path = result_path(place, name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(found, indent=1))
    path.with_suffix(".tmp").rename(path)
    return f"{name}, seed {seed}: {primary(found):.4f} in {found['train_seconds']:.0f} s of training"


def trained_and_evaluated(job: Any, shards: Any, *, catalogue: Any, part: str) -> tuple[Any, Options]:
    """(what its best checkpoint gives on the part, how the training went)."""
    from jobs.cluster.telemetry import Reporter
    from jobs.runs.run_dir import best_checkpoint
    from jobs.training.evaluation import evaluate, evaluation_loader
    from jobs.training.item_counting import with_prior
    from jobs.training.loop import build_model, train

    class Curve(Reporter):
        """Keeps the validations and prints nothing."""

        def __init__(self) -> None:
            super().__init__(None)
            self.rows: list[dict[str, Any]] = []
            self.seconds = 0.0

        def row(self, kind: str, **values: Any) -> None:
            self.seconds += values["seconds"] if kind == "step" else 0
            if kind == "valid":
                self.rows.append({**values, "train_seconds": self.seconds})

    Path(job.run_dir).mkdir(parents=True, exist_ok=True)
    curve = Curve()
    state = train(job, reporter=curve)
    tables, tower, prior = build_model(job, shards, checkpoint=best_checkpoint(Path(job.run_dir)))
    loader = evaluation_loader(shards, requests=job.requests, part=part)
    model = with_prior(
        tower, prior, shards, requests=job.requests, catalogue=catalogue, evidence=catalogue.training_count
    )
    result = evaluate(model, tables, loader, catalogue=catalogue)
    return result, {
        "steps": state.step,
        "best_step": state.best_step,
        "train_seconds": state.train_seconds,
        "parameters": sum(parameter.numel() for parameter in tower.parameters()),
        "curve": curve.rows,
    }


def with_changes(config: RunConfig, changes: Options) -> RunConfig:
    """The config with another model, or other fields of it, of its training or of its requests."""
    changes = dict(changes)

    def replaced(section: Any) -> Any:
        names = {field.name for field in dataclasses.fields(section)} & set(changes)
        return dataclasses.replace(section, **{name: changes.pop(name) for name in names})

    data = dataclasses.replace(config.data, requests=replaced(config.data.requests))
    config = dataclasses.replace(config, data=data, training=replaced(config.training))
    if (model := changes.pop("name", config.model["name"])) != config.model["name"]:
        config = config.with_model(model)
    return dataclasses.replace(config, model={**config.model, **changes}, compare=())


def sum_and_count(result: Any, mask: Any, *, seen_items: str) -> tuple[float, float]:
    """(sum, weight) of the primary metric's parts over a slice."""
    arguments = {"seen_items": seen_items} if hasattr(result, "rank_kept") else {}
    sums, weights = result.per_user(mask, **arguments)
    return float(sums.sum()), float(weights.sum())


def table(place: Path, chosen: Iterable[str], seeds: list[int], config: RunConfig) -> str:
    """Markdown: one row a variant."""
    found = {name: [json.loads(result_path(place, name, seed).read_text()) for seed in seeds] for name in chosen}
    first = next(iter(found))
    suffix = "_seen_kept" if config.data.requests.seen_items == "kept" else ""
    known = (f"hr@10{suffix}", f"ndcg@10{suffix}", f"mrr@10{suffix}", "gauc", "logloss", "calibration")
    metrics = [metric for metric in known if metric in found[first][0]["metrics"]]
    slices = list(found[first][0]["slices"])
    lines = [
        f"{config.data.name}, {found[first][0]['part']} part, seeds {seeds}, {found[first][0]['steps']} steps",
        "| " + " | ".join(["variant", *metrics, "ratio to the first", "steps", "train s", "peak GiB", *slices]) + " |",
        "|" + "---|" * (len(metrics) + 5 + len(slices)),
    ]
    for name, runs in found.items():
        ratios = [primary(run) / primary(base) for run, base in zip(runs, found[first], strict=True)]
        cells = [
            name,
            *(spread([run["metrics"][metric] for run in runs]) for metric in metrics),
            spread(ratios, digits=3),
        ]
        cells += [f"{runs[0]['steps']}", spread([run["train_seconds"] for run in runs], digits=0)]
        cells += [f"{max(run['peak_gib'] for run in runs):.2f}"]
        cells += [spread([ratio(run["slices"].get(label)) for run in runs]) for label in slices]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def primary(run: dict[str, Any]) -> float:
    """The metric over the slice of everything."""
    return ratio(next(iter(run["slices"].values())))


def ratio(pair: tuple[float, float] | None) -> float:
    return pair[0] / pair[1] if pair and pair[1] else math.nan


def spread(values: list[float], *, digits: int = 4) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1 or any(map(math.isnan, values)):
        return mean
    return f"{mean} +- {statistics.stdev(values):.{digits}f}"


def result_path(place: Path, name: str, seed: int) -> Path:
    return place / "results" / f"{file_name(name)}-{seed}.json"


def file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


if __name__ == "__main__":
    main()
