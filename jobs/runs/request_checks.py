"""What a command says about its requests before any worker starts, and what it refuses: a log from which nothing can be
learned, and a split with an empty part."""

from __future__ import annotations

from jobs.cluster.worker_group import make_room_for_tasks
from jobs.config.run_config import RunConfig
from jobs.host.console import Console
from jobs.host.errors import UserError
from pipeline.batches.request_index import RequestCounts
from pipeline.batches.requests import PARTS, RequestConfig
from pipeline.build import index_requests
from pipeline.shards.dataset import Shards
from pipeline.shards.vocabulary import NUM_RESERVED


def count_requests(shards: Shards, requests: RequestConfig) -> RequestCounts:
    """The number of every user's requests: stored beside the shards, or counted now by Ray tasks."""

    def before_tasks(_stage: str, done: int, _total: int) -> None:
        if done == 0:
            make_room_for_tasks()

    return index_requests(shards, config=requests, progress=before_tasks)


def check_requests(config: RunConfig, shards: Shards, counts: RequestCounts, console: Console) -> None:
    """Tell what distorts training on these requests. UserError: it would mean nothing, or fail at an empty part."""
    requests = config.data.requests
    tell_labels(requests, counts, console, command="train")
    _refuse_equal_labels(config, counts)
    if shards.vocabulary.size - NUM_RESERVED == 1:
        if requests.task == "next_item":
            raise UserError(
                f"{config.shards_dir}: has only one item: next_item has nothing to choose from; add events of other "
                "items"
            )
        console.line(f"{'train':<12} the log has only one item: candidates differ by time and history alone")
    if shards.manifest.users == 1:
        console.line(f"{'train':<12} the log has only one user: intervals over users say nothing")
    _refuse_empty_parts(config, counts)


def tell_labels(requests: RequestConfig, counts: RequestCounts, console: Console, *, command: str) -> None:
    """Tell how many events next_item reads of a log with labels, and how many it leaves out."""
    if requests.task != "next_item" or counts.labels is None:
        return
    positives, shown = int(counts.labels.positives.sum()), int(counts.labels.only_shown.sum())
    left_out = f"{shown:,} only shown: not used by next_item" if shown else "none only shown: next_item uses all events"
    console.line(f"{command:<12} {positives:,} positives, {left_out}")


def _refuse_equal_labels(config: RunConfig, counts: RequestCounts) -> None:
    """UserError if no event has a positive label, or if impressions have no other label."""
    if counts.labels is None:
        return
    positives, shown = int(counts.labels.positives.sum()), int(counts.labels.only_shown.sum())
    task = config.data.requests.task
    if not positives:
        fix = "" if task == "impressions" else ", or set data.requests.min_label to 0 to predict every event"
        raise UserError(
            f"{config.shards_dir}: all {shown:,} events have label 0, but {task} needs positives: map another label "
            f"column{fix}"
        )
    if task == "impressions" and not shown:
        raise UserError(
            f"{config.shards_dir}: all {positives:,} events have label 1, but impressions needs items that were shown "
            "and not chosen: map another label column, or set data.requests.task to next_item"
        )


def _refuse_empty_parts(config: RunConfig, counts: RequestCounts) -> None:
    requests = config.data.requests
    split, fix = requests.split, "it needs users with 3 requests"
    if split == "temporal":
        split += f" (valid_from {requests.valid_from}, test_from {requests.test_from})"
        fix = "move valid_from and test_from"
    if requests.task == "impressions":
        fix += ", lower min_history"
    for part in PARTS:
        if not getattr(counts, part).requests.any():
            raise UserError(
                f"data.requests: task {requests.task} with split {split} leaves no {part} request in "
                f"{config.shards_dir}: {fix}, or add more events"
            )
