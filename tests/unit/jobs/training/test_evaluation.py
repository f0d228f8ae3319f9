"""Evaluation and the exported scorer give equal logits, also where candidates attend to each other."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from jobs.training.catalogue import ALWAYS, catalogue_of
from jobs.training.evaluation import EVEN_SHARE, evaluate, evaluation_loader
from jobs.training.exported import LoadedRows
from jobs.training.results import RankedTargets
from pipeline.batches.requests import RequestConfig
from pipeline.build import index_requests
from pipeline.events import EventColumns
from pipeline.shards.dataset import Shards
from pipeline.shards.vocabulary import NUM_RESERVED
from tests.unit.jobs.serving.test_score import run

MAX_HISTORY = 50
SPLITS = {
    "last items": RequestConfig(max_history=MAX_HISTORY),
    "temporal": RequestConfig(
        split="temporal", valid_from="1970-01-01T01:40", test_from="1970-01-01T03:20", max_history=MAX_HISTORY
    ),
}


@pytest.fixture
def one_rank():
    """A process group of this process alone: evaluation consists of collectives."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def plain(prepare, write_log, random_log, tmp_path):
    """Users with actions, no two events at one time, and items that appear late."""
    log = random_log().drop("label", "request_id")
    late = pl.col("item_id") + 30 * (pl.col("timestamp") > 15_000)
    write_log(log.with_columns(item_id=late, timestamp=pl.col("timestamp") + pl.int_range(pl.len())))
    prepare(tmp_path / "log", tmp_path / "shards", columns=EventColumns(action="action"), buckets=3)
    data = Shards.open(str(tmp_path / "shards"))
    for config in SPLITS.values():
        index_requests(data, config=config)
    return data


def asked_again(result, catalogue, data):
    """The requests of an evaluation as those of `solar score`, with the items that were ranked as candidates."""
    events = {user[0]: part for user, part in data.raw_events(range(data.num_groups)).group_by("user_id")}
    users, items = data.user_ids.to_pylist(), data.vocabulary.items.to_pylist()
    first = [ALWAYS] * len(items) if catalogue.first_time is None else catalogue.first_time[NUM_RESERVED:].tolist()
    rows = []
    for user, length in zip(result.user, result.history_length, strict=True):
        part = events[users[user]]
        time = part["timestamp"][int(length)]
        rows.append(
            {
                **{name: part[column][: int(length)] for name, column in COLUMNS.items()},
                "target": part["item_id"][int(length)],
                "time": time,
                "candidates": [item for item, start in zip(items, first, strict=True) if start <= time],
            }
        )
    return rows


COLUMNS = {"history": "item_id", "history_time": "timestamp", "history_action": "action"}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    "settings",
    [{"set_attention": False}, {"set_attention": True}, {"set_attention": True, "set_attention_exact_up_to": 20}],
)
def test_log_loss_of_evaluation_is_that_of_solar_score(plain, export, tmp_path, split, settings):
    model, requests = export(plain, max_history=MAX_HISTORY, **settings), SPLITS[split]
    scorer = model.scorer()
    catalogue = catalogue_of(plain, requests=requests, training_count=np.zeros(plain.vocabulary.capacity, np.int64))
    loader = evaluation_loader(plain, requests=requests, part="test")
    result = evaluate(scorer.tower, LoadedRows(scorer), loader, catalogue=catalogue)
    assert isinstance(result, RankedTargets)
    asked = asked_again(result, catalogue, plain)
    assert len(asked) > 10
    assert len({len(row["candidates"]) for row in asked}) > (split == "temporal")
    schema = {"target": pl.Int64, "time": pl.Int64, "history_action": pl.List(pl.String)}
    scored, _ = run(model, tmp_path, pl.DataFrame(asked, schema_overrides=schema).to_arrow())
    shares = []
    for row in scored:
        share = np.exp(np.array(row["scores"], np.float64) - max(row["scores"]))
        shares.append(share[row["candidates"].index(row["target"])] / share.sum())
    losses = -np.log((1 - EVEN_SHARE) * np.array(shares) + EVEN_SHARE / catalogue.num_data_items)
    # Float32 sums in another order. The unknown row in a set, or a later item, changes a loss by 1e-2 and more.
    assert np.mean(losses) == pytest.approx(np.mean(result.log_loss), abs=1e-6)
    np.testing.assert_allclose(losses, result.log_loss, atol=1e-5)


@pytest.mark.usefixtures("one_rank")
def test_seen_items_belong_to_the_set_although_they_are_not_ranked(plain, export, tmp_path):
    model = export(plain, max_history=MAX_HISTORY, set_attention=True)
    users = pl.DataFrame({"user_id": plain.user_ids.to_pylist()}).to_arrow()
    every, _ = run(model, tmp_path, users, shards=plain.path, top_k=1000, keep_seen=True)
    ranked, counts = run(model, tmp_path, users, shards=plain.path, top_k=1000)
    assert counts.candidates < sum(len(row["candidates"]) for row in every)
    for row, whole in zip(ranked, every, strict=True):
        score = dict(zip(whole["candidates"], whole["scores"], strict=True))
        assert row["scores"] == pytest.approx([score[item] for item in row["candidates"]], abs=1e-6)
