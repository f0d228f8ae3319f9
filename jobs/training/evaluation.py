"""Distributed, exact evaluation: every rank scores its requests, every rank gets all results, nothing is sampled.

    next_item    each request's target is ranked among the whole catalogue, seen items kept and removed
    impressions  each request's own candidate set is scored

Every rank joins every call: look-ups are collectives, and under ZeRO-3 so is each forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from jobs.training.model import model_input, select_requests, training_input
from jobs.training.parallel import ShardedTables
from models.metrics import auc, calibration, gauc, hit_rate, log_loss, ndcg, rank_of_target, reciprocal_rank
from pipeline.batch import Batch
from pipeline.loader import EvaluationLoader
from pipeline.requests import RequestConfig
from pipeline.shards import Shards
from pipeline.vocabulary import NUM_RESERVED

CUTOFFS = (5, 10, 20)
CANDIDATES_PER_FORWARD = 1 << 16
"""Bounds the memory of one forward: about 1 KB a candidate at width 64."""
EVENTS_PER_BATCH = 1 << 14
LOOK_UP_ROWS = 1 << 16

Transform = Callable[[Batch], Batch]


@dataclasses.dataclass(frozen=True)
class RankedTargets:
    """Results of `next_item`, one entry a request, in the order of the users."""

    user: np.ndarray
    history_length: np.ndarray
    rank_kept: np.ndarray
    """1 = best; seen items stay in the ranking."""
    rank_removed: np.ndarray
    """Seen items (other than the target) are taken out."""
    tied: np.ndarray
    """The target shares its time stamp with the event before it: only the log's tie-break says which came first."""

    def metrics(self) -> dict[str, float]:
        values: dict[str, float] = {"requests": float(len(self.user))}
        for suffix, ranks in (("", self.rank_removed), ("_seen_kept", self.rank_kept)):
            for cutoff in CUTOFFS:
                values[f"hr@{cutoff}{suffix}"] = _mean(hit_rate(ranks, k=cutoff))
                values[f"ndcg@{cutoff}{suffix}"] = _mean(ndcg(ranks, k=cutoff))
                values[f"mrr@{cutoff}{suffix}"] = _mean(reciprocal_rank(ranks, k=cutoff))
        values["requests_untied"] = float((~self.tied).sum())
        values["ndcg@10_untied"] = _mean(ndcg(self.rank_removed[~self.tied], k=10))
        return values


@dataclasses.dataclass(frozen=True)
class ScoredImpressions:
    """Results of `impressions`, one entry a candidate."""

    user: np.ndarray
    history_length: np.ndarray
    logit: np.ndarray
    label: np.ndarray
    skipped_requests: int
    """Requests left out because their history was shorter than `min_history`."""
    requests: int

    def metrics(self) -> dict[str, float]:
        by_user = gauc(self.logit, self.label, self.user)
        return {
            "requests": float(self.requests),
            "requests_skipped": float(self.skipped_requests),
            "candidates": float(len(self.label)),
            "auc": auc(self.logit, self.label),
            "gauc": by_user.value,
            "gauc_users": float(by_user.num_users),
            "gauc_users_skipped": float(by_user.num_users_skipped),
            "logloss": log_loss(self.logit, self.label),
            "calibration": calibration(self.logit, self.label),
        }


def evaluate(
    model: nn.Module,
    tables: ShardedTables,
    shards: Shards,
    *,
    requests: RequestConfig,
    part: str,
    limit: int | None = None,
    transform: Transform = lambda batch: batch,
) -> RankedTargets | ScoredImpressions:
    """Score one part (valid, test) with the current weights; `limit` = the first so many requests' users only."""
    loader = evaluation_loader(shards, requests=requests, part=part, limit=limit)
    model.eval()
    with torch.no_grad():
        if requests.task == "next_item":
            result = _rank_targets(model, tables, loader, num_items=shards.vocabulary.size, transform=transform)
        else:
            result = _score_impressions(model, tables, loader, transform=transform)
    model.train()
    return result


def evaluation_loader(
    shards: Shards, *, requests: RequestConfig, part: str, limit: int | None = None
) -> EvaluationLoader:
    """This rank's share of a part."""
    return EvaluationLoader(
        shards,
        requests=requests,
        part=part,
        batch_events=EVENTS_PER_BATCH,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        limit=limit,
    )


def evaluate_counts(
    shards: Shards, counts: np.ndarray, *, requests: RequestConfig, part: str
) -> RankedTargets | ScoredImpressions:
    """Popularity: an item's score is its count among training events, whoever asks."""
    loader = evaluation_loader(shards, requests=requests, part=part)
    scores_I = torch.from_numpy(counts[: shards.vocabulary.size].astype(np.float32))
    if requests.task == "next_item":
        return _collect_ranks([_ranks(batch, scores_I.expand(batch.num_requests, -1)) for batch in loader])
    return _collect_impressions([_impressions(batch, scores_I[batch.candidate_item]) for batch in loader], loader)


def _rank_targets(
    model: nn.Module, tables: ShardedTables, loader: EvaluationLoader, *, num_items: int, transform: Transform
) -> RankedTargets:
    item_IC, features_IFC = _look_up_catalogue(tables, num_items)
    per_forward = max(1, CANDIDATES_PER_FORWARD // num_items)
    results = []
    for batch in loader:
        for first in range(0, _max_over_ranks(batch.num_requests), per_forward):
            last = min(first + per_forward, batch.num_requests)
            part = select_requests(batch, min(first, last), last)
            seen = transform(part)
            logits_M = model(_catalogue_input(seen, item_IC, features_IFC))
            results.append(_ranks(part, logits_M.cpu().view(part.num_requests, num_items)))
    return _collect_ranks(results)


def _score_impressions(
    model: nn.Module, tables: ShardedTables, loader: EvaluationLoader, *, transform: Transform
) -> ScoredImpressions:
    results = [_impressions(batch, model(training_input(transform(batch), tables))) for batch in loader]
    return _collect_impressions(results, loader)


def _impressions(batch: Batch, logits_M: Tensor) -> tuple[np.ndarray, ...]:
    """(user, history length, logit, label) of every candidate."""
    size_B = batch.candidate_offsets.diff()
    return (
        torch.repeat_interleave(batch.user[batch.request_user], size_B).numpy(),
        torch.repeat_interleave(batch.request_position, size_B).numpy(),
        logits_M.cpu().numpy(),
        batch.candidate_label.numpy(),
    )


def _collect_impressions(results: list[tuple[np.ndarray, ...]], loader: EvaluationLoader) -> ScoredImpressions:
    user, history, logit, label = _gather_columns(results)
    return ScoredImpressions(
        user, history, logit, label, skipped_requests=loader.num_skipped, requests=loader.num_requests
    )


def _look_up_catalogue(tables: ShardedTables, num_items: int) -> tuple[Tensor, Tensor]:
    parts = [
        tables.look_up(torch.arange(first, min(first + LOOK_UP_ROWS, num_items)))
        for first in range(0, num_items, LOOK_UP_ROWS)
    ]
    return torch.cat([item for item, _ in parts]), torch.cat([features for _, features in parts])


def _catalogue_input(batch: Batch, item_IC: Tensor, features_IFC: Tensor) -> Any:
    num_items = item_IC.shape[0]
    ranked = dataclasses.replace(batch, candidate_offsets=torch.arange(batch.num_requests + 1) * num_items)
    return model_input(
        ranked,
        item_IC=item_IC,
        features_IFC=features_IFC,
        event_item_N=batch.event_item,
        candidate_item_M=torch.arange(num_items).repeat(batch.num_requests),
    )


def _ranks(batch: Batch, scores_BI: Tensor) -> tuple[np.ndarray, ...]:
    """(user, history length, rank kept, rank removed, tied) of a batch whose only candidates are the targets."""
    scores_BI = scores_BI.clone()
    scores_BI[:, :NUM_RESERVED] = -torch.inf
    seen_BI = torch.zeros(scores_BI.shape, dtype=torch.bool)
    lengths_B = batch.request_position
    owner = torch.repeat_interleave(torch.arange(batch.num_requests), lengths_B)
    within = torch.arange(int(lengths_B.sum())) - torch.repeat_interleave(lengths_B.cumsum(0) - lengths_B, lengths_B)
    event = batch.event_offsets[batch.request_user][owner] + within
    seen_BI[owner, batch.event_item[event]] = True
    previous = (batch.event_offsets[batch.request_user] + lengths_B - 1).clamp(min=0)
    tied_B = (lengths_B > 0) & (batch.request_time > 0)
    if batch.num_events:
        tied_B = tied_B & (batch.event_time[previous] == batch.request_time)
    target_B = batch.candidate_item
    seen_BI[torch.arange(batch.num_requests), target_B] = False
    return (
        batch.user[batch.request_user].numpy(),
        lengths_B.numpy(),
        rank_of_target(scores_BI, target_B).numpy(),
        rank_of_target(scores_BI, target_B, excluded_BI=seen_BI).numpy(),
        tied_B.numpy(),
    )


def _collect_ranks(results: list[tuple[np.ndarray, ...]]) -> RankedTargets:
    columns = _gather_columns(results)
    order = np.lexsort((columns[1], columns[0]))
    return RankedTargets(*(column[order] for column in columns))


def _gather_columns(rows: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    """Concatenate columns over batches and ranks; every rank gets the same arrays."""
    local = tuple(np.concatenate(column) for column in zip(*rows, strict=True)) if rows else None
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, local)
    parts = [part for part in gathered if part is not None]
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def _max_over_ranks(count: int) -> int:
    """The largest count, at least 1, so that every rank runs equally many forwards."""
    largest = torch.tensor([max(1, count)])
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
