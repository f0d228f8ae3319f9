"""Tables that grow, on real ranks: the same rows however they come, training that goes on, capacity that takes no part.

A poisoned checkpoint has other values in every row that stands for nothing: not-a-number, which spreads to whatever
reads it, and numbers a thousand times too large, which would win or lose any ranking.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.config.run_config import RunConfig
from jobs.host.console import Console
from jobs.runs.grow import grow
from jobs.runs.train import train_job
from jobs.training.checkpoint import checkpoint_key, committed_checkpoints, read_state
from jobs.training.job import TrainJob
from jobs.training.loop import build_model
from jobs.training.warm_start import begin_from
from models.embeddings import initial_rows
from pipeline.batches.requests import RequestConfig
from pipeline.shards.dataset import Shards
from tests.distributed.test_training_loop import begin, losses, run_each, weights
from tests.support.growth import commit, facts_of, first_day, second_day, sizes_of, specs_of, tiny_config, whole_table
from tests.support.ranks import run_ranks
from tests.support.serial import without_ray

REQUESTS = {
    "uniform": ["--data.requests.num_negatives", "8"],
    "popularity": [
        "--data.requests.negatives", "popularity", "--training.log_q", "true", "--data.requests.popularity_power", "0",
    ],
    "in_batch": ["--data.requests.negatives", "in_batch", "--training.log_q", "true"],
    "catalogue": [
        "--model.name", "sasrec", "--compare", "[]", "--training.loss", "catalogue", "--optimizer.sparse", "adam",
        "--data.requests.num_negatives", "0", "--optimizer.sparse_lr", "0.01",
    ],
}  # fmt: skip
COMMON = ["--training.epochs", "1", "--optimizer.warmup_steps", "2", "--seed", "5"]
KINDS = list(REQUESTS)
POISONS = {"nan": float("nan"), "huge": 1e3}


def config_of(directory: Path, kind: str, *arguments: str, name: str | None = None) -> RunConfig:
    dropout = ["--model.dropout", "0"]
    return tiny_config(directory, *COMMON, *REQUESTS[kind], *dropout, *arguments, name=name or kind)


def job_of(config: RunConfig, shards: Shards, run_dir: Path, *, warm_start: Path | None = None) -> TrainJob:
    """As the driver makes it, with what it checks."""
    begun = None
    if warm_start is not None:
        begun = begin_from(
            str(warm_start),
            model=config.model,
            task=config.data.requests.task,
            sparse=config.optimizer.sparse,
            shards=shards,
        )
    facts = facts_of(config, shards, warm_start=begun.key if begun else None)
    return dataclasses.replace(train_job(config, shards, facts=facts, begun=begun), run_dir=str(run_dir))


@dataclasses.dataclass(frozen=True)
class Days:
    directory: Path
    first: Shards
    second: Shards
    trained: dict[str, Path]
    """{kind: the checkpoint of two ranks' training on the first day}."""
    grown: dict[str, Path]
    """The same, enlarged for the second day."""


@pytest.fixture(scope="module")
def days(tmp_path_factory) -> Days:
    directory = tmp_path_factory.mktemp("days")
    requests = RequestConfig(min_label=0)
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch.setattr)
        first = first_day(directory, requests)
        configs = {kind: config_of(directory, kind) for kind in KINDS}
        jobs = [(job_of(config, first, directory / "first" / kind), [None]) for kind, config in configs.items()]
        second = second_day(directory, requests)
    run_ranks(run_each, 2, jobs)
    trained = {kind: committed_checkpoints(directory / "first" / kind)[-1] for kind in KINDS}
    grown = {
        kind: grow(str(path), Console(), shards_dir=second.path, out=str(directory / "grown" / kind))
        for kind, path in trained.items()
    }
    return Days(directory, first, second, trained, grown)


def rows_of(loads: list[tuple[TrainJob, Path]]) -> list[list[tuple[str, int, dict[str, torch.Tensor]]]]:
    """This rank's rows of every table after each checkpoint was loaded."""
    found = []
    for job, checkpoint in loads:
        tables, *_ = build_model(job, Shards.open(job.shards), checkpoint=checkpoint)
        parts = [(shard.table, shard.first_row, shard.tensors) for shard in tables.shards()]
        found.append([(*place, {name: part.clone() for name, part in tensors.items()}) for *place, tensors in parts])
    return found


def joined(ranks: list[list[tuple[str, int, dict[str, torch.Tensor]]]]) -> dict[str, dict[str, torch.Tensor]]:
    """{table: its rows over all ranks}."""
    tables: dict[str, list] = {}
    for table, first, tensors in sorted((part for rank in ranks for part in rank), key=lambda part: part[:2]):
        tables.setdefault(table, []).append((first, tensors))
    return {
        table: {name: torch.cat([tensors[name] for _, tensors in parts]) for name in parts[0][1]}
        for table, parts in tables.items()
    }


def test_grown_and_ungrown_checkpoints_give_bit_equal_tables_on_one_two_and_three_ranks(days):
    configs = {kind: config_of(days.directory, kind) for kind in ("uniform", "catalogue")}
    loads = [
        (job_of(config, days.second, days.directory / "unused"), checkpoints[kind])
        for kind, config in configs.items()
        for checkpoints in (days.grown, days.trained)
    ]
    for world_size in (1, 2, 3):
        of_ranks = run_ranks(rows_of, world_size, loads)
        kinds = [kind for kind in configs for _ in ("grown", "ungrown")]
        for kind, *of_load in zip(kinds, *of_ranks, strict=True):
            found = joined(of_load)
            assert sum(len(tensors["weight"]) for tensors in found.values()) == 256 + 32 + (
                16 if kind == "uniform" else 0
            )
            for table, tensors in found.items():
                expected = whole_table(days.grown[kind], table)
                assert tensors.keys() == expected.keys()
                for name, tensor in tensors.items():
                    assert torch.equal(tensor, expected[name]), (world_size, kind, table, name)


def test_unused_rows_of_a_trained_table_are_still_as_they_were_drawn(days):
    for kind in KINDS:
        config = config_of(days.directory, kind)
        sizes = sizes_of(config, days.first)
        for spec in specs_of(config, days.first):
            found = whole_table(days.trained[kind], spec.name)
            drawn = initial_rows(spec.name, seed=5, first=0, num_rows=spec.capacity, width=spec.width, std=0.02)
            assert torch.equal(found["weight"][sizes[spec.name] :], drawn[sizes[spec.name] :])
            assert not any(found[name][sizes[spec.name] :].any() for name in found if name != "weight")
        assert not torch.equal(whole_table(days.trained[kind], "item")["weight"][:62], drawn[:62])


def poisoned(checkpoint: Path, copy: Path, *, sizes: dict[str, int], value: float) -> Path:
    """A copy whose rows from `sizes` on have other weights, of alternating sign."""
    shutil.copytree(checkpoint, copy)
    for table, size in sizes.items():
        for file in copy.glob(f"table-{table}-{'[0-9]' * 12}.safetensors"):
            first, tensors = int(file.stem[-12:]), load_file(file)
            unused = max(0, size - first)
            rows = tensors["weight"][unused:]
            rows.copy_(value * torch.sign(torch.arange(rows.numel()) % 2 - 0.5).view_as(rows))
            file.unlink()
            save_file(tensors, file)
    return commit(copy, json.loads((copy / "state.json").read_text()))


@pytest.fixture(scope="module")
def warm_runs(days, tmp_path_factory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """The second day on two ranks, {name: its rows}: begun from a grown checkpoint or from its poisoned copies, for
    each kind; and `uniform` from the ungrown one, with interruptions, and from scratch."""
    directory = tmp_path_factory.mktemp("second")
    runs: dict[str, tuple[Path | None, list[int | None]]] = {
        "uniform ungrown": (days.trained["uniform"], [None]),
        "uniform resumed": (days.grown["uniform"], [2, 4, None]),
        "uniform cold": (None, [None]),
    }
    for kind in KINDS:
        sizes = sizes_of(config_of(days.directory, kind), days.second)
        runs[f"{kind} grown"] = days.grown[kind], [None]
        for name, value in POISONS.items():
            copy = poisoned(days.grown[kind], directory / "from" / f"{kind} {name}", sizes=sizes, value=value)
            runs[f"{kind} {name}"] = copy, [None]
    jobs = []
    for name, (start, stops) in runs.items():
        config = config_of(days.directory, name.split()[0])
        jobs.append((job_of(config, days.second, directory / name, warm_start=start), stops))
    return directory, dict(zip(runs, run_ranks(run_each, 2, jobs)[0], strict=True))


def test_warm_runs_from_grown_and_ungrown_are_the_same_on_any_ranks_and_after_a_resume(days, warm_runs, tmp_path):
    directory, found = warm_runs
    straight = losses(found["uniform grown"])
    assert len(straight) > 4
    expected = weights(directory / "uniform grown")
    for name in ("uniform ungrown", "uniform resumed"):
        assert losses(found[name]) == straight
        other = weights(directory / name)
        assert other.keys() == expected.keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in expected.items())
    config = config_of(days.directory, "uniform")
    job = job_of(config, days.second, tmp_path / "three", warm_start=days.trained["uniform"])
    # fp32 sums in another order, the bound of the project's contract.
    assert losses(run_ranks(run_each, 3, [(job, [None])])[0][0]) == pytest.approx(straight, rel=1e-4)
    assert straight[0] < losses(found["uniform cold"])[0]


def test_checkpoints_of_a_warm_run_say_what_it_began_from_and_count_its_own_steps(days, warm_runs):
    directory, found = warm_runs
    for name, start in (("uniform resumed", days.grown), ("uniform ungrown", days.trained)):
        document = read_state(committed_checkpoints(directory / name)[-1])
        before = read_state(start["uniform"])["train_state"]["step"]
        assert document["train_state"]["steps_before"] == before > 0
        assert document["train_state"]["step"] == len(losses(found["uniform grown"]))
        assert document["warm_start"] == checkpoint_key(start["uniform"])


def begin_each(jobs: list[TrainJob]) -> list[dict[str, Any]]:
    """What each run is before its first step."""
    found = []
    for job in jobs:
        state, loader, tables, dense = begin(job)
        adamw = getattr(dense.engine.optimizer, "optimizer", dense.engine.optimizer)
        found.append(
            {
                "state": state,
                "loader": loader.state_dict(),
                "dense_steps": {float(each["step"]) for each in adamw.state.values()},
                "sparse_steps": {float(adam.state["step"]) for adam in tables._adams.values()},
                "moment": sum(float(each["exp_avg"].abs().sum()) for each in adamw.state.values()),
            }
        )
    return found


def test_optimizers_go_on_where_they_were_and_everything_else_begins(days, tmp_path):
    kinds = ["uniform", "catalogue"]
    configs = [config_of(days.directory, kind) for kind in kinds]
    steps = [read_state(days.trained[kind])["train_state"]["step"] for kind in kinds]
    cold = [job_of(config, days.second, tmp_path / "cold") for config in configs]
    warm = [
        job_of(config, days.second, tmp_path / kind, warm_start=days.trained[kind])
        for kind, config in zip(kinds, configs, strict=True)
    ]
    for found in run_ranks(begin_each, 2, [*cold, *warm]):
        for number, (fresh, begun) in enumerate(zip(found[:2], found[2:], strict=True)):
            assert begun["dense_steps"] == {float(steps[number])}
            assert begun["sparse_steps"] == ({float(steps[number])} if kinds[number] == "catalogue" else set())
            assert begun["moment"] > 0
            assert begun["state"] == dataclasses.replace(fresh["state"], steps_before=steps[number])
            assert begun["loader"] == fresh["loader"]
    # A second night: what is behind is counted through, for the run itself and for one that begins from it.
    run_ranks(run_each, 2, [(job, [2]) for job in warm])
    again = [
        job_of(config, days.second, tmp_path / "again", warm_start=tmp_path / kind)
        for kind, config in zip(kinds, configs, strict=True)
    ]
    found = run_ranks(begin_each, 1, [*warm, *again])[0]
    assert [each["dense_steps"] for each in found] == [{count + 2.0} for count in [*steps, *steps]]
    assert found[1]["sparse_steps"] == found[3]["sparse_steps"] == {steps[1] + 2.0}
    assert [(each["state"].step, each["state"].steps_before) for each in found] == [
        (2, steps[0]), (2, steps[1]), (0, steps[0] + 2), (0, steps[1] + 2),
    ]  # fmt: skip


@pytest.mark.parametrize("poison", list(POISONS))
@pytest.mark.parametrize("kind", KINDS)
def test_unused_rows_take_no_part_in_losses_rankings_and_updates(days, warm_runs, kind, poison):
    directory, runs = warm_runs
    clean, other = f"{kind} grown", f"{kind} {poison}"
    assert losses(runs[clean]) == losses(runs[other])
    first, second = (
        [{key: each for key, each in row.items() if key != "seconds"} for row in runs[name] if row["kind"] == "valid"]
        for name in (clean, other)
    )
    assert first == second
    assert [row["requests"] for row in first] == [60]
    latest = [committed_checkpoints(directory / name)[-1] for name in (clean, other)]
    for table, size in sizes_of(config_of(days.directory, kind), days.second).items():
        expected, found = (whole_table(path, table) for path in latest)
        begun = whole_table(directory / "from" / other, table)
        for name, tensor in expected.items():
            assert torch.equal(found[name][:size], tensor[:size])
            assert len(begun[name][size:])
            # What stood in the unused rows stands there still: no update came by. (Adam's of a row that is no number is
            # none either.)
            if name == "weight" or poison == "huge":
                assert torch.equal(found[name][size:].nan_to_num(7.0), begun[name][size:].nan_to_num(7.0))
