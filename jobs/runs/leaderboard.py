"""solar leaderboard BOARD: many models on one data set, under one protocol -> one table.

A board (jobs/recipes/leaderboards/) is a recipe without a model, and a section `models` with the settings that each row
adds to it. Each pair of a row and a seed is one run, WORKSPACE/runs/BOARD-ROW-SEED: an unfinished run is continued, a
finished one is reused. Table, figures and plot are in WORKSPACE/leaderboards/BOARD and are rewritten after each run.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jobs.cluster.session import ray_session
from jobs.config.run_config import RunConfig
from jobs.data.prepare import import_missing, prepare_shards
from jobs.host.console import Console
from jobs.host.documents import as_json, stored_with
from jobs.host.json_files import read_json, read_rows, write_json
from jobs.runs.evaluate import Evaluated, evaluate_run
from jobs.runs.plots import plot_curves
from jobs.runs.run_dir import Trained, open_shards, settled
from jobs.runs.train import train
from jobs.tracking.mlflow_runs import TrackedRun, open_run
from jobs.training.baselines import POPULARITY
from jobs.training.checkpoint import latest_checkpoint, read_train_state
from jobs.training.model import model_settings
from models.zoo import build_tower
from pipeline.shards.vocabulary import NUM_RESERVED

METRICS = ("hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr@10")
COSTS = ("parameters", "epochs", "steps", "train_seconds", "peak_gib", "events_per_second")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoardResult:
    """The results of one run; of popularity, which is not trained, only the metrics."""

    row: str
    seed: int
    metrics: Mapping[str, float]
    tables: str | None = None
    """The optimizer of the tables."""
    parameters: int | None = None
    """Number of weights in the tower and in the rows of items."""
    epochs: int | None = None
    steps: int | None = None
    best_step: int | None = stored_with("best_step")
    """The step with the best validation metric."""
    train_seconds: float | None = None
    peak_gib: float | None = None
    """Sum of all ranks' peak memory."""
    events_per_second: float | None = None
    curve: list[tuple[float, float]] | None = None
    """(seconds spent in training steps so far, validation metric) of every validation."""
    mlflow_run_id: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Board:
    """The runs of a leaderboard."""

    name: str
    rows: Mapping[str, RunConfig]
    """{row name: configuration, except for the seed}; data, split and workspace are the same in all of them."""
    seeds: Sequence[int]
    part: str = "test"
    """Which part the metrics are of: test once per setting, valid while choosing settings."""

    @property
    def protocol(self) -> RunConfig:
        """The configuration of any row, for settings that all rows share."""
        return next(iter(self.rows.values()))

    @property
    def directory(self) -> Path:
        return Path(self.protocol.workspace) / "leaderboards" / self.name

    def run(self, row: str, seed: int) -> RunConfig:
        config = self.rows[row]
        return dataclasses.replace(config, name=f"{config.name}-{seed}", seed=seed)


def leaderboard(board: Board, console: Console, *, verbose: bool = False) -> Path:
    """Train and evaluate the runs that are not done yet; returns the path of the table, in Markdown."""
    protocol = board.protocol
    import_missing(protocol, console)
    parent = _parent_run(board)
    results: list[BoardResult] = []
    with ray_session(protocol.cluster, num_cpus=protocol.parallel.num_cpus, verbose=verbose):
        prepare_shards(protocol.events_dir, protocol.shards_dir, protocol.data.prepare, console)
        # All rows with the first seed first: so a table with every row exists early.
        for number, (seed, row) in enumerate(itertools.product(board.seeds, board.rows), 1):
            console.line(f"{f'{number}/{len(board.seeds) * len(board.rows)}':<12} {row}, seed {seed}")
            config = settled(board.run(row, seed), tell=console.line)
            trained = train(config, console, resume=True, verbose=verbose)
            evaluated = evaluate_run(config, {config.model["name"]: trained}, console, part=board.part, verbose=verbose)
            parent.adopt(trained.mlflow_run_id)
            results += _results(row, config, trained, evaluated, with_popularity=not results)
            write_board(board, results)
    parent.metrics(_means(results), step=0)
    for file in sorted(board.directory.glob("leaderboard.*")):
        parent.artifact(file)
    parent.close()
    table = board.directory / "leaderboard.md"
    console.line()
    console.line(table.read_text())
    console.line(f"leaderboard  {board.directory}")
    return table


def write_board(board: Board, results: Sequence[BoardResult]) -> None:
    """Write leaderboard.json, .md and .png from the results so far, one per row and seed."""
    board.directory.mkdir(parents=True, exist_ok=True)
    write_json(
        board.directory / "leaderboard.json", {"board": board.name, "part": board.part, "results": as_json(results)}
    )
    (board.directory / "leaderboard.md").write_text(markdown(results, part=board.part))
    plot_curves(
        {row: [result.curve or [] for result in found] for row, found in _by_row(results).items() if found[0].curve},
        board.directory / "leaderboard.png",
        title=f"{board.name}, validation",
    )


def markdown(results: Sequence[BoardResult], *, part: str) -> str:
    """A table with one line per row, the best NDCG@10 with seen items kept first: means and standard deviations over
    seeds."""
    metrics = [f"{metric}{suffix}" for suffix in ("_seen_kept", "") for metric in METRICS]
    heads = [_head(metric, results[0].metrics) for metric in metrics]
    rows = _by_row(results)
    costs = [cost.replace("_per_second", "/s").replace("_", " ") for cost in COSTS]
    lines = [
        f"{part} part, each target among the whole catalogue; kept: seen items compete; means over seeds",
        "",
        "| " + " | ".join(["model", "seeds", *heads, "tables", *costs]) + " |",
        "|" + "---|" * (3 + len(metrics) + len(COSTS)),
    ]
    for row in sorted(rows, key=lambda name: -_mean(rows[name], "ndcg@10_seen_kept")):
        found = rows[row]
        cells = [
            row,
            str(len(found)),
            *(_spread([result.metrics[metric] for result in found]) for metric in metrics),
        ]
        cells += [str(found[0].tables or "")]
        cells += [_cost([getattr(result, cost) for result in found]) for cost in COSTS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _head(metric: str, metrics: Mapping[str, float]) -> str:
    """The head of a metric's column, with the number of users that count in it (unknown in earlier versions)."""
    kept = metric.endswith("_seen_kept")
    users = metrics.get("users" if kept else "users_new")
    name = f"{metric.removesuffix('_seen_kept').upper()}{', kept' if kept else ''}"
    return name if users is None else f"{name} (users: {users:,.0f})"


def _results(
    row: str, config: RunConfig, trained: Trained, evaluated: Evaluated, *, with_popularity: bool
) -> list[BoardResult]:
    """The results of one run, and with the first run also those of popularity."""
    summary = evaluated.summary
    latest = latest_checkpoint(trained.run_dir)
    assert latest is not None
    state = read_train_state(latest)
    found = [
        BoardResult(
            row=row,
            seed=config.seed,
            metrics=summary.metrics[config.model["name"]],
            tables=config.optimizer.sparse,
            parameters=_parameters(config),
            epochs=state.loader["epoch"],
            steps=state.step,
            best_step=state.best_step,
            train_seconds=state.train_seconds,
            peak_gib=state.peak_gib,
            events_per_second=state.events / max(1e-9, state.train_seconds),
            curve=_curve(trained.run_dir, summary.primary),
            mlflow_run_id=trained.mlflow_run_id,
        )
    ]
    if with_popularity:
        found.append(BoardResult(row=POPULARITY, seed=config.seed, metrics=summary.metrics[POPULARITY]))
    return found


def _parameters(config: RunConfig) -> int:
    """Number of weights in the tower and in the rows of items."""
    vocabulary = open_shards(config).vocabulary
    tower = build_tower(model_settings(config.model, vocabulary), num_features=len(vocabulary.features))
    rows = (vocabulary.size - NUM_RESERVED) * config.model["width"]
    return rows + sum(parameter.numel() for parameter in tower.parameters())


def _curve(run_dir: Path, metric: str) -> list[tuple[float, float]]:
    """(seconds spent in training steps so far, validation metric) of every validation."""
    seconds, curve = 0.0, []
    for row in read_rows(run_dir / "telemetry.jsonl"):
        seconds += row["seconds"] if row["kind"] == "step" else 0.0
        if row["kind"] == "valid":
            curve.append((seconds, row[metric]))
    return curve


def _parent_run(board: Board) -> TrackedRun:
    """The MLflow run above the runs of all rows; a board that is continued keeps it."""
    record = board.directory / "run.json"
    previous = read_json(record)["mlflow_run_id"] if record.exists() else None
    protocol = board.protocol
    run = open_run(protocol.tracking, protocol.workspace, name=f"leaderboard-{board.name}", run_id=previous)
    board.directory.mkdir(parents=True, exist_ok=True)
    write_json(record, {"mlflow_run_id": run.run_id})
    return run


def _by_row(results: Iterable[BoardResult]) -> dict[str, list[BoardResult]]:
    rows: dict[str, list[BoardResult]] = {}
    for result in results:
        rows.setdefault(result.row, []).append(result)
    return rows


def _means(results: Sequence[BoardResult]) -> dict[str, float]:
    return {
        f"{row}/{metric}".replace(",", ""): _mean(found, metric)
        for row, found in _by_row(results).items()
        for metric in ("ndcg@10", "ndcg@10_seen_kept", "hr@10_seen_kept")
    }


def _mean(found: Sequence[BoardResult], metric: str) -> float:
    return statistics.mean(result.metrics[metric] for result in found)


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.4f}".removeprefix("0")
    return mean if len(values) == 1 else f"{mean} +- {statistics.stdev(values):.4f}".replace("+- 0", "+- ")


def _cost(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = statistics.mean(known)
    return f"{mean:.2f}" if mean < 10 else f"{mean:,.0f}"
