"""Logs from which nothing can be learned are refused before any worker starts; others are told in one line."""

from __future__ import annotations

import polars as pl
import pytest

from jobs.config.reader import load_config
from jobs.host.console import Console
from jobs.host.errors import UserError
from jobs.runs.request_checks import check_requests
from pipeline.batches.request_index import request_counts
from pipeline.events import EventColumns
from pipeline.shards.dataset import Shards
from tests.support.shown import shown_log


@pytest.fixture
def check(prepare, write_log, tmp_path, capsys):
    """The lines that check_requests tells about a log under these settings of data.requests."""

    def run(log: pl.DataFrame, **requests: object) -> list[str]:
        write_log(log)
        columns = EventColumns(timestamp_unit="ms", label="label" if "label" in log.columns else None)
        prepare(tmp_path / "log", tmp_path / "shards", columns=columns, buckets=2)
        recipe = tmp_path / "shop.yaml"
        recipe.write_text("data: {name: shop}\n")
        options = [part for name, value in requests.items() for part in (f"--data.requests.{name}", str(value))]
        config = load_config("train", str(recipe), ["--data.shards", str(tmp_path / "shards"), *options])
        shards = Shards.open(config.shards_dir)
        capsys.readouterr()
        check_requests(config, shards, request_counts(shards, config.data.requests), Console())
        return capsys.readouterr().out.splitlines()

    return run


def labelled(label: int) -> pl.DataFrame:
    return shown_log(users=6).with_columns(label=pl.lit(label))


def test_what_next_item_reads_and_leaves_out_is_told(check):
    log = shown_log()
    positives = int(log["label"].sum())
    told = f"{positives} positives, {len(log) - positives} only shown: not used by next_item"
    assert check(log) == [f"train        {told}"]


def test_a_log_without_labels_has_nothing_to_tell(check):
    assert check(shown_log().drop("label")) == []


def test_labels_that_are_all_positive_are_told(check):
    log = labelled(1)
    assert check(log) == [f"train        {len(log)} positives, none only shown: next_item uses all events"]


@pytest.mark.parametrize(
    ("log", "requests", "words"),
    [
        (
            labelled(0), {},
            r"all \d+ events have label 0, but next_item needs positives: map another label column, or set "
            "data.requests.min_label to 0 to predict every event",
        ),
        (labelled(0), {"task": "impressions"}, r"have label 0, but impressions needs positives: map another label col"),
        (labelled(1), {"task": "impressions"}, r"have label 1, but impressions needs items that were shown and not"),
        (labelled(1).with_columns(item_id=pl.lit("b1")), {}, r"only one item: next_item has nothing to choose from"),
        (
            shown_log().filter(pl.col("label") == 1).group_by("user_id", maintain_order=True).head(2), {},
            r"leaves no valid request in .*: it needs users with 3 requests, or add more events",
        ),
    ],
    ids=["no positive", "impressions without positives", "impressions of positives", "one item", "two events each"],
)  # fmt: skip
def test_a_log_that_teaches_nothing_is_refused(check, log, requests, words):
    with pytest.raises(UserError, match=words):
        check(log, **requests)


def test_a_log_of_zeros_can_be_read_whole(check):
    assert check(labelled(0), min_label=0) == []


def test_a_log_of_one_user_is_told(check):
    told = check(shown_log(users=1).drop("label"))
    assert told == ["train        the log has only one user: intervals over users say nothing"]


def test_impressions_of_one_item_are_told(check):
    told = check(shown_log().with_columns(item_id=pl.lit("b1")), task="impressions", session_gap_seconds=600)
    assert told == ["train        the log has only one item: candidates differ by time and history alone"]
