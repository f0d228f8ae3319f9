"""Feature tables narrower than the item table, on real ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from jobs.host.console import Console
from jobs.host.errors import UserError
from jobs.runs.grow import grow
from jobs.runs.train import _check_model
from jobs.training.checkpoint import committed_checkpoints, read_state
from jobs.training.optimizers import OptimizerConfig
from jobs.training.tables import ShardedTables
from models.embeddings import ItemFeature, TableSpec, UserCodes, initial_rows
from pipeline.batches.requests import RequestConfig
from pipeline.shards.dataset import Shards
from tests.distributed.test_growth import job_of
from tests.distributed.test_training_loop import losses, run_each, weights
from tests.support.growth import first_day, second_day, tiny_config, whole_table
from tests.support.ranks import run_ranks
from tests.support.serial import without_ray

WIDTHS = {"item": 16, "genres": 4, "year": 16, "user-sex": 8}
ROWS = 12
GENRES = ItemFeature(name="genres", offsets=torch.tensor([0, 0, 0, *range(0, ROWS - 2)]), values=torch.arange(ROWS) % 5)
YEAR = ItemFeature(name="year", offsets=torch.arange(ROWS + 1), values=torch.arange(ROWS) % 7)
SPARSE = {
    "rowwise_adagrad": OptimizerConfig(sparse_lr=0.1, sparse_eps=1e-8),
    "adam": OptimizerConfig(sparse="adam", sparse_lr=0.1),
}


def drawn(table: str) -> Tensor:
    return initial_rows(table, seed=1, first=0, num_rows=ROWS, width=WIDTHS[table], std=0.1)


def look_up_narrow(asked: list[tuple[list[int], list[int]]], sparse: str) -> dict[str, Any]:
    """What this rank finds for its (items, one value of sex a user), and its rows before and after one step."""
    specs = [TableSpec(name=name, capacity=ROWS, width=width) for name, width in WIDTHS.items()]
    tables = ShardedTables(specs, [GENRES, YEAR], user_tables=["user-sex"], optimizer=SPARSE[sparse], device="cpu")
    tables.initialize(seed=1, std=0.1)
    items, sex = asked[dist.get_rank()]
    users = UserCodes(lengths_UG=torch.ones(len(sex), 1, dtype=torch.int64), values=torch.tensor(sex).long())
    before = {(s.table, s.first_row): s.weight.clone() for s in tables.shards()}
    tables.begin_step(0.1)
    found = tables.look_up_with_users(torch.tensor(items).long(), users)
    torch.cat([part.flatten() for part in found]).sum().backward()
    tables.end_step()
    moved = {
        (s.table, s.first_row + int(row)) for s in tables.shards()
        for row in torch.nonzero((s.weight != before[s.table, s.first_row]).any(1)).flatten()
    }  # fmt: skip
    state = {s.table: sorted((name, tuple(part.shape[1:])) for name, part in s.state.items()) for s in tables.shards()}
    return {"found": [part.detach() for part in found], "moved": moved, "state": state}


CASES = {
    "both": [([3, 7], [2]), ([4], [3, 2])],
    # No narrow row on a rank, on any rank; nothing at all on a rank.
    "no features on a rank": [([3], [2]), ([2], [])],
    "no features": [([2], []), ([2], [])],
    "nothing on a rank": [([3], [2]), ([], [])],
}


def look_up_each(cases: list[list[tuple[list[int], list[int]]]], sparse: str) -> list[dict[str, Any]]:
    return [look_up_narrow(asked, sparse) for asked in cases]


@pytest.mark.parametrize("sparse", list(SPARSE))
def test_narrow_rows_end_in_zeros_and_are_updated_in_their_own_columns(sparse):
    of_ranks = run_ranks(look_up_each, 2, list(CASES.values()), sparse)
    for number, (name, asked) in enumerate(CASES.items()):
        moved = set()
        for rank, (items, sex) in enumerate(asked):
            item_IC, features_IFC, users_UGC = of_ranks[rank][number]["found"]
            assert torch.equal(item_IC, drawn("item")[items]), name
            narrow = torch.zeros(len(items), 16)
            for place, item in enumerate(items):
                values, _ = GENRES.of(torch.tensor([item]))
                if len(values):
                    narrow[place, :4] = drawn("genres")[values].mean(0)
                moved |= {("genres", int(value)) for value in values} | {("year", item % 7), ("item", item)}
            torch.testing.assert_close(features_IFC[:, 0], narrow)
            torch.testing.assert_close(features_IFC[:, 1], drawn("year")[[item % 7 for item in items]])
            assert torch.equal(users_UGC[:, 0, :8], drawn("user-sex")[sex])
            assert not users_UGC[:, :, 8:].any()
            moved |= {("user-sex", value) for value in sex}
        assert of_ranks[0][number]["moved"] | of_ranks[1][number]["moved"] == moved, name
    state = of_ranks[0][0]["state"]
    assert state["genres"] == (
        [("accumulator", ())] if sparse == "rowwise_adagrad" else [("exp_avg", (4,)), ("exp_avg_sq", (4,))]
    )


ARGUMENTS = [
    "--model.feature_width", '{"genres": 8, "taste": 4}', "--model.dropout", "0", "--training.epochs", "1",
    "--seed", "5",
]  # fmt: skip


@pytest.fixture(scope="module")
def days(tmp_path_factory) -> tuple[Path, Shards]:
    directory = tmp_path_factory.mktemp("days")
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch.setattr)
        first = first_day(directory, RequestConfig(min_label=0))
    return directory, first


def test_run_with_narrow_tables_is_the_same_on_any_ranks_after_a_resume_and_grows(days, tmp_path, monkeypatch):
    directory, first = days
    config = tiny_config(directory, *ARGUMENTS)
    runs = [
        (job_of(config, first, tmp_path / "two"), [None]),
        (job_of(config, first, tmp_path / "resumed"), [2, None]),
    ]
    two, resumed = run_ranks(run_each, 2, runs)[0]
    assert losses(resumed) == losses(two)
    expected, found = weights(tmp_path / "two"), weights(tmp_path / "resumed")
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    one = run_ranks(run_each, 1, [(job_of(config, first, tmp_path / "one"), [None])])[0][0]
    # fp32 sums in another order, the bound of the project's contract.
    assert losses(one) == pytest.approx(losses(two), rel=1e-4)
    checkpoint = committed_checkpoints(tmp_path / "two")[-1]
    widths = {table["name"]: table["width"] for table in read_state(checkpoint)["tables"]}
    assert widths == {"item": 16, "genres": 8, "user-taste": 4}
    assert {name: whole_table(checkpoint, name)["weight"].shape[1] for name in widths} == widths

    without_ray(monkeypatch.setattr)
    second = second_day(directory, RequestConfig(min_label=0))
    grown = grow(str(checkpoint), Console(), shards_dir=second.path, out=str(tmp_path / "grown"))
    starts = [(job_of(config, second, tmp_path / name, warm_start=path), [None]) for name, path in
              (("from-grown", grown), ("from-ungrown", checkpoint))]  # fmt: skip
    of_grown, of_ungrown = run_ranks(run_each, 2, starts)[0]
    assert losses(of_grown) == losses(of_ungrown)
    with pytest.raises(ValueError, match=r"table genres has width 8, this model's has 16: set --model.feature_width"):
        job_of(tiny_config(directory, *ARGUMENTS[2:]), second, tmp_path / "wide", warm_start=checkpoint)


def test_widths_that_cannot_be_are_refused_by_name(days):
    directory, first = days
    for value, told in (
        ("20", "feature_width = 20: the width must be a multiple of 4, from 4 to width = 16"),
        ("6", "feature_width = 6: the width must be a multiple of 4"),
        ('{"taste": 0}', "the width of taste must be a multiple of 4, from 4 to width = 16"),
    ):
        with pytest.raises(UserError) as refused:
            tiny_config(directory, "--model.feature_width", value)
        assert told in str(refused.value)
    with pytest.raises(UserError, match=r"unknown key model.feature_width"):
        tiny_config(directory, "--model.name", "sasrec", "--compare", "[]", "--model.feature_width", "4")
    config = tiny_config(directory, "--model.feature_width", json.dumps({"genre": 4}))
    with pytest.raises(UserError, match="has no feature 'genre': it has genres, taste; remove 'genre'"):
        _check_model(config, first)
