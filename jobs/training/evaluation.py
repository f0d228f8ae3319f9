"""Distributed, exact evaluation: each rank scores its share of the requests, all ranks get all results; no candidates
are sampled.

    next_item    each target is ranked among all items known at the time of the request, once with the items that the
                 user has seen and once without them
    impressions  the candidates of each request are scored

All ranks take part in every call: look-ups are collectives, and under ZeRO-3 each forward is one, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from jobs.training.baselines import candidate_scores, ranking_scores
from jobs.training.catalogue import Catalogue
from jobs.training.catalogue_scorer import CatalogueScorer
from jobs.training.model import ItemRows, select_requests, training_input
from jobs.training.results import RankedTargets, ScoredImpressions
from models.metrics import rank_of_target
from models.repeats import SeenItems, first_places
from pipeline.batches.batch import Batch
from pipeline.batches.loader import EvaluationLoader
from pipeline.batches.requests import RequestConfig
from pipeline.shards.dataset import Shards
from pipeline.shards.vocabulary import NUM_RESERVED

BASELINE_SCORES = 1 << 17
"""Limits the memory of a baseline's scores."""
EVENTS_PER_BATCH = 1 << 14
TARGETS_PER_RANKING = 64
EVEN_SHARE = 0.01
"""Share of a model's probability that is spread evenly over all items of the data when its log loss is computed: models
that know more or fewer of the items are then compared as predictions over the same set of items."""
RECOMMENDED = 10
"""Number of best items of a request that count as recommended."""

_Ranked = tuple[tuple[np.ndarray, ...], np.ndarray]
"""(the columns of some targets, the recommended items of their requests)."""
Transform = Callable[[Batch], Batch]
Progress = Callable[[int, int], None]
"""Called with (requests done, requests of the part), both approximate sums over all ranks."""


def evaluate(
    model: nn.Module,
    tables: ItemRows,
    loader: EvaluationLoader,
    *,
    catalogue: Catalogue,
    transform: Transform = lambda batch: batch,
    progress: Progress = lambda done, total: None,
) -> RankedTargets | ScoredImpressions:
    """Score the loader's requests with the current weights. A collective: all ranks take part, and call `progress`
    together, which may end it by an exception."""
    batches = _translated(loader, catalogue)
    with torch.no_grad(), _evaluating(model):
        if loader.requests.task == "next_item":
            result = _rank_targets(
                model, tables, batches, loader, catalogue=catalogue, transform=transform, progress=progress
            )
        else:
            result = _score_impressions(model, tables, batches, loader, transform=transform, progress=progress)
    return result


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    model.eval()
    try:
        yield
    finally:
        model.train()


def evaluation_loader(
    shards: Shards, *, requests: RequestConfig, part: str, limit: int | None = None
) -> EvaluationLoader:
    """This rank's share of the requests of a part (valid, test). `limit`: only about so many requests, always the same
    ones."""
    return EvaluationLoader(
        shards,
        requests=requests,
        part=part,
        batch_events=EVENTS_PER_BATCH,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        limit=limit,
    )


def evaluate_baseline(
    baseline: str, loader: EvaluationLoader, *, catalogue: Catalogue, shards: Shards
) -> RankedTargets | ScoredImpressions:
    """The results of one of jobs/training/baselines.py. A collective: all ranks take part."""
    requests, results = loader.requests, []
    if requests.task == "impressions":
        logits = candidate_scores(baseline, catalogue, shards, requests)
        return _collect_impressions(
            [_impressions(catalogue.translate(batch), logits(batch)) for batch in loader], loader
        )
    scores = ranking_scores(baseline, catalogue)
    per_chunk = max(1, BASELINE_SCORES // catalogue.num_items)
    for batch in _translated(loader, catalogue):
        for first in range(0, batch.num_requests, per_chunk):
            chunk = select_requests(batch, first, min(first + per_chunk, batch.num_requests))
            results.append(_ranks(chunk, scores(chunk).expand(chunk.num_requests, -1), catalogue, requests))
    # Counts rank items, but they are not logits: there is no log loss.
    return dataclasses.replace(ranked := _collect_ranks(results, catalogue), log_loss=np.full(len(ranked.user), np.nan))


def _translated(loader: EvaluationLoader, catalogue: Catalogue) -> Iterator[Batch]:
    """The loader's batches with the model's rows."""
    for batch in loader:
        yield catalogue.translate(batch)


def _rank_targets(
    model: nn.Module, tables: ItemRows, batches: Iterator[Batch], loader: EvaluationLoader, *, catalogue: Catalogue,
    transform: Transform, progress: Progress,
) -> RankedTargets:  # fmt: skip
    """Score the whole catalogue for every request and rank its targets. A collective: all ranks take part."""
    scorer = CatalogueScorer(model, tables, catalogue)
    results, before = [], 0
    for batch in batches:
        # All ranks run the same number of forwards; a rank without requests left joins with an empty chunk.
        for first in range(0, _max_over_ranks(batch.num_requests), scorer.requests_at_once):
            # Keep only the users of these requests: a batch may hold a user with thousands of requests and events.
            last = min(first + scorer.requests_at_once, batch.num_requests)
            chunk = select_requests(batch, min(first, last), last)
            results.append(_ranks(chunk, scorer.scores(transform(chunk)), catalogue, loader.requests))
            done = before + batch.num_global_requests * last // max(1, batch.num_requests)
            progress(done, loader.num_requests)
        before += batch.num_global_requests
    return _collect_ranks(results, catalogue)


def _score_impressions(
    model: nn.Module, tables: ItemRows, batches: Iterator[Batch], loader: EvaluationLoader, *, transform: Transform,
    progress: Progress,
) -> ScoredImpressions:  # fmt: skip
    results, done = [], 0
    for batch in batches:
        results.append(_impressions(batch, model(training_input(transform(batch), tables))))
        done += batch.num_global_requests
        progress(done, loader.num_requests)
    return _collect_impressions(results, loader)


def _impressions(batch: Batch, logits_M: Tensor) -> tuple[np.ndarray, ...]:
    """(user, history length, logit, label, item, whether it has the best logit of its request) of every candidate."""
    size_B = batch.candidate_offsets.diff()
    owner_M, logits_M = torch.repeat_interleave(size_B), logits_M.detach().float().cpu()
    best_B = torch.full((len(size_B),), -torch.inf).scatter_reduce(0, owner_M, logits_M, "amax")
    return (
        torch.repeat_interleave(batch.user[batch.request_user], size_B).numpy(),
        torch.repeat_interleave(batch.request_position, size_B).numpy(),
        logits_M.numpy(),
        batch.candidate_label.numpy(),
        batch.candidate_item.numpy(),
        (logits_M == best_B[owner_M]).numpy(),
    )


def _collect_impressions(results: list[tuple[np.ndarray, ...]], loader: EvaluationLoader) -> ScoredImpressions:
    user, history, logit, label, item, first = _gather_columns(results)
    return ScoredImpressions(
        user, history, logit, label, skipped_requests=loader.num_skipped, requests=loader.num_requests,
        recommended_items=_num_items(item[first]), catalogue_items=_num_items(item),
    )  # fmt: skip


def _ranks(batch: Batch, scores_BI: Tensor, catalogue: Catalogue, requests: RequestConfig) -> _Ranked:
    """The columns of RankedTargets for a batch whose candidates are the targets, and the best items. Local."""
    # Mask what is not ranked.
    request_T = torch.repeat_interleave(batch.candidate_offsets.diff())
    target_T = batch.candidate_item
    scores_BI = scores_BI.masked_fill(~catalogue.ranked(batch.request_time), -torch.inf)
    # [B, I]: the items that each request's user has seen, and the request's targets.
    first_UI = first_places(batch.event_item, batch.event_offsets, num_items=scores_BI.shape[1])
    seen = SeenItems(first_UI=first_UI, user_B=batch.request_user, position_B=batch.request_position)
    seen_BI = seen.before(slice(None))
    targets_BI = torch.zeros_like(seen_BI)
    targets_BI[request_T, target_T] = True

    # Take the recommended items, and rank each target; other targets of its request do not compete with it.
    competing_BI = scores_BI if requests.seen_items == "kept" else scores_BI.masked_fill(seen_BI, -torch.inf)
    best_BK, item_BK = competing_BI.topk(min(RECOMMENDED, scores_BI.shape[1]), dim=1)
    share_BI = scores_BI.double().softmax(1)
    kept, removed = [], []
    for request_t, target_t in zip(
        request_T.split(TARGETS_PER_RANKING), target_T.split(TARGETS_PER_RANKING), strict=True
    ):
        others_tI = targets_BI[request_t]
        kept.append(rank_of_target(scores_BI[request_t], target_t, excluded_BI=others_tI))
        removed.append(rank_of_target(scores_BI[request_t], target_t, excluded_BI=others_tI | seen_BI[request_t]))
    # Targets that the model does not know have rank infinity and probability 0.
    unknown_T = target_T < NUM_RESERVED
    rank_T2 = torch.stack([torch.cat(kept), torch.cat(removed)], 1) if kept else torch.zeros(0, 2)
    rank_T2 = rank_T2.masked_fill(unknown_T[:, None], torch.inf)
    count_T = torch.from_numpy(catalogue.training_count)[target_T].masked_fill(unknown_T, -1)
    share_T = share_BI[request_T, target_T].masked_fill(unknown_T, 0.0)
    columns = (
        batch.user[batch.request_user][request_T].numpy(),
        batch.request_key[request_T].numpy(),
        batch.request_position[request_T].numpy(),
        rank_T2[:, 0].double().numpy(),
        rank_T2[:, 1].double().numpy(),
        _tied(batch)[request_T].numpy(),
        seen_BI[request_T, target_T].numpy() & ~unknown_T.numpy(),
        count_T.numpy(),
        -np.log((1 - EVEN_SHARE) * share_T.numpy() + EVEN_SHARE / catalogue.num_data_items),
    )
    return columns, item_BK[best_BK > -torch.inf].numpy()


def _tied(batch: Batch) -> Tensor:
    """[B] whether the last event before the request has the same time as the request."""
    if not batch.num_events:
        return torch.zeros(batch.num_requests, dtype=torch.bool)
    previous = (batch.event_offsets[batch.request_user] + batch.request_position - 1).clamp(min=0)
    has_time = (batch.request_position > 0) & (batch.request_time > 0)
    return has_time & (batch.event_time[previous] == batch.request_time)


def _collect_ranks(results: list[_Ranked], catalogue: Catalogue) -> RankedTargets:
    """The results of all ranks, sorted by user and request. A collective."""
    columns = _gather_columns([columns for columns, _ in results])
    best = _gather_columns([(np.unique(np.concatenate([items for _, items in results])),)] if results else [])
    order = np.lexsort((columns[1], columns[0]))
    return RankedTargets(
        *(column[order] for column in columns),
        recommended_items=_num_items(best[0]), catalogue_items=catalogue.num_items - NUM_RESERVED,
    )  # fmt: skip


def _num_items(rows: np.ndarray) -> int:
    """The number of distinct items that the model knows."""
    return int((np.unique(rows) >= NUM_RESERVED).sum())


def _gather_columns(rows: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    """Concatenate columns over batches and ranks; every rank gets the same arrays. A collective."""
    local = tuple(np.concatenate(column) for column in zip(*rows, strict=True)) if rows else None
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, local)
    parts = [part for part in gathered if part is not None]
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def _max_over_ranks(count: int) -> int:
    """The largest count of all ranks, at least 1, so that every rank runs the same number of forwards. A collective."""
    largest = torch.tensor([max(1, count)])
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)
