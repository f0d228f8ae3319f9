"""The start of a prior: the best of what counting can say, chosen on training requests before the first step.

    impressions  logistic regression of the two rates on the candidates of the first batches (damped Newton steps)
    next_item    the start with the best NDCG@10 among a sample of the catalogue: how much an item of the history
                 counts, whether by how often or by how recently it occurred, and in which window popularity is
                 counted; then the scale and the bias that fit best, which change no ranking

Everything follows from the data and the seed. All ranks take part in every call.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from jobs.training.model import WantedItems, model_input, select_requests
from models.interface import ModelInput
from models.item_counters import ItemCounters
from models.prior import WINDOW_DAYS, Prior
from pipeline.batches.batch import Batch
from pipeline.batches.loader import TrainLoader
from pipeline.batches.requests import RequestConfig
from pipeline.hashing import hash64
from pipeline.shards.vocabulary import NUM_RESERVED

FIT_REQUESTS = {"next_item": 512, "impressions": 1 << 14}
"""So many requests, rounded up to whole batches, are read."""
SAMPLED_ITEMS = 1 << 13
"""Items of the catalogue among which a target is ranked, besides those of the histories."""
OWN_STARTS = (0.0, 2.0, 4.0, 6.0, 9.0)
"""How much an item of the history is worth; at 9 it is above every popular item."""
OWN_FORMS = ((1.0, 0.0), (0.0, 1.0))
"""Weights of how often and of how recently: the baselines `own items` and `latest items`."""
POPULARITY_STARTS = (0.5, 1.0)
SCALES = (0.125, 0.177, 0.25, 0.354, 0.5, 0.707, 1.0, 1.414, 2.0)
NEWTON_STEPS, NEWTON_HALVINGS = 20, 10
RIDGE = 1e-5
"""Penalty per candidate on half the squared distance from a constant prediction."""


@dataclasses.dataclass(frozen=True)
class Start:
    """A point of the grid."""

    worth: float
    form: tuple[float, float]
    window: int
    """Index in WINDOW_DAYS."""
    popularity: float


@torch.no_grad()
def fit_prior(
    prior: Prior, counters: ItemCounters, loader: TrainLoader, *, requests: RequestConfig, num_items: int, seed: int
) -> None:
    """Set the prior's parameters. `num_items`: rows of the vocabulary in use, the reserved ones included."""
    if requests.task == "impressions":
        _fit_rates(prior, counters, loader)
    else:
        _fit_ranking(prior, counters, loader, requests=requests, num_items=num_items, seed=seed)


def _first_batches(loader: TrainLoader, task: str) -> Iterator[Batch]:
    """The batches of the first epoch, until they have enough requests over all ranks."""
    done = 0
    for batch in loader.epoch(0):
        yield batch
        done += batch.num_global_requests
        if done >= FIT_REQUESTS[task]:
            return


def _fit_rates(prior: Prior, counters: ItemCounters, loader: TrainLoader) -> None:
    batches = list(_first_batches(loader, prior.task))
    labels = [torch.zeros(0, dtype=torch.float64), *(batch.candidate_label.double() for batch in batches)]
    y_M = torch.cat(labels)
    sums = _over_ranks([float(y_M.sum()) + 1, len(y_M) + 2.0])
    prior.mean_1.fill_(float(sums[0] / sums[1]))
    rates = [torch.zeros(0, 2, dtype=torch.float64)]
    for batch in batches:
        found = prior.features(_input(batch), counters)
        rates.append(found["rates"].double())
    rate_2, bias = fit_logistic(torch.cat(rates), y_M, mean=float(prior.mean_1))
    prior.rate_2.copy_(rate_2)
    prior.bias_1.fill_(bias)


def fit_logistic(rates_M2: Tensor, label_M: Tensor, *, mean: float) -> tuple[Tensor, float]:
    """(weight_2, bias) of the logistic regression of labels on rates, over the candidates of all ranks.

    Damped Newton steps from the constant `mean`, with a light penalty on the distance from it: so the fit is finite
    where the labels are all alike or separable, and never worse than the constant. A collective.
    """
    x_M3 = torch.nn.functional.pad(rates_M2, (0, 1), value=1.0)
    start_3 = torch.tensor([0.0, 0.0, math.log(mean / (1 - mean))], dtype=torch.float64)

    def loss_at(weight_3: Tensor) -> float:
        loss = torch.nn.functional.binary_cross_entropy_with_logits(x_M3 @ weight_3, label_M, reduction="sum")
        total, count = _over_ranks([float(loss), float(len(label_M))])
        return float(total / count + RIDGE / 2 * (weight_3 - start_3).square().sum())

    weight_3, loss = start_3, loss_at(start_3)
    for _ in range(NEWTON_STEPS):
        p_M = torch.sigmoid(x_M3 @ weight_3)
        curve_33 = (x_M3 * (p_M * (1 - p_M))[:, None]).mT @ x_M3
        slope_3 = x_M3.mT @ (label_M - p_M)
        sums = _over_ranks([*slope_3.tolist(), *curve_33.flatten().tolist(), float(len(label_M))])
        slope_3 = sums[:3] / sums[12] - RIDGE * (weight_3 - start_3)
        step_3 = torch.linalg.solve(sums[3:12].view(3, 3) / sums[12] + RIDGE * torch.eye(3), slope_3)
        shares = (0.5**k for k in range(NEWTON_HALVINGS))
        better = next(
            (weight_3 + share * step_3 for share in shares if loss_at(weight_3 + share * step_3) < loss), None
        )
        if better is None:
            break
        weight_3, loss = better, loss_at(better)
    return weight_3[:2], float(weight_3[2])


@dataclasses.dataclass(frozen=True)
class _Ranked:
    """The targets of a request, and the items among which they are ranked. C items, of which some stand for others."""

    windows_CW: Tensor
    often_C: Tensor
    lately_C: Tensor
    seen_C: Tensor
    log_weight_C: Tensor
    """Log of how many items of the catalogue an item stands for."""
    is_target_C: Tensor


def _fit_ranking(
    prior: Prior, counters: ItemCounters, loader: TrainLoader, *, requests: RequestConfig, num_items: int, seed: int
) -> None:
    ranked = [
        one
        for batch in _first_batches(loader, prior.task)
        for one in _ranked(prior, counters, batch, num_items=num_items, seed=seed, seen=requests.seen_items == "kept")
        if bool(one.is_target_C.any())
    ]
    # All ranks: the best window, with the history's items above all others, then how much those are worth.
    own = OWN_STARTS if requests.seen_items == "kept" else (0.0,)
    windows, first = range(len(WINDOW_DAYS)), POPULARITY_STARTS[0]
    best = _best(ranked, [Start(own[-1], OWN_FORMS[0], window, first) for window in windows])
    grid = itertools.product(own, OWN_FORMS, POPULARITY_STARTS)
    best = _best(ranked, [Start(worth, form, best.window, weight) for worth, form, weight in grid])
    # Then the likelihood of the best one at every scale.
    likelihood = [sum((_log_share(one, scale * _logit(one, best)) for one in ranked), 0.0) for scale in SCALES]
    scale = SCALES[int(_over_ranks(likelihood).argmax())]
    # The bias makes logits probabilities: it is the mean of what normalises a request's softmax.
    shifts = [torch.logsumexp(scale * _logit(one, best) + one.log_weight_C, 0).item() for one in ranked]
    shift, count = _over_ranks([sum(shifts, 0.0), float(len(ranked))])
    prior.bias_1.fill_(-float(shift / count.clamp_min(1)))
    prior.own_3.copy_(scale * torch.tensor([best.worth, *(best.form if best.worth else (0.0, 0.0))]))
    prior.window_5.zero_()
    prior.window_5[best.window] = scale * best.popularity


def _ranked(
    prior: Prior, counters: ItemCounters, batch: Batch, *, num_items: int, seed: int, seen: bool
) -> Iterator[_Ranked]:
    """Requests of the batch, each with a sample of the catalogue and (if `seen`) its history's items as candidates."""
    num_sampled = min(SAMPLED_ITEMS, num_items - NUM_RESERVED)
    drawn = hash64(seed, torch.arange(NUM_RESERVED, num_items).numpy())
    sample = torch.from_numpy(drawn.argpartition(num_sampled - 1)[:num_sampled]) + NUM_RESERVED
    stands_for = (num_items - NUM_RESERVED) / num_sampled
    # Of a large batch only some requests, the same ones on any number of ranks.
    drawn_B = hash64(seed, batch.user[batch.request_user].numpy(), batch.request_key.numpy(), np.uint64(5))
    share = min(1.0, FIT_REQUESTS[prior.task] / max(1, batch.num_global_requests))
    for b in np.flatnonzero(drawn_B < np.uint64(share * (2**64 - 2**11))).tolist():
        one = select_requests(batch, b, b + 1)
        targets = one.candidate_item[one.candidate_label > 0].unique()
        targets = targets[targets >= NUM_RESERVED]
        history = one.event_item[one.event_item >= NUM_RESERVED] if seen else targets[:0]
        sure = torch.cat([targets, history]).unique()
        others = sample[~torch.isin(sample, sure)]
        if not seen:
            others = others[~torch.isin(others, one.event_item)]
        items = torch.cat([sure, others])
        found = prior.features(_of_items(one, items), counters)
        known = ~found["unknown"]
        yield _Ranked(
            found["windows"][known],
            found["often"][known],
            found["lately"][known],
            found["seen"][known],
            torch.cat([torch.zeros(len(sure)), torch.full((len(others),), stands_for).log()])[known],
            torch.isin(items, targets)[known],
        )


def _best(ranked: list[_Ranked], starts: list[Start]) -> Start:
    """The start with the best NDCG@10; of equal ones the first."""
    quality = [sum((_ndcg(one, _logit(one, start)) for one in ranked), 0.0) for start in starts]
    return starts[int(_over_ranks(quality).argmax())]


def _logit(one: _Ranked, start: Start) -> Tensor:
    often, lately = start.form if start.worth else (0.0, 0.0)
    own_C = start.worth + often * one.often_C + lately * one.lately_C
    return torch.where(one.seen_C, own_C, start.popularity * one.windows_CW[:, start.window])


def _ndcg(one: _Ranked, logit_C: Tensor) -> float:
    """Sum over the targets of their gain at rank 10, with expected ranks."""
    target_P, other_O = logit_C[one.is_target_C], logit_C[~one.is_target_C]
    weight_O = one.log_weight_C[~one.is_target_C].exp()
    better_P = ((other_O > target_P[:, None]) + 0.5 * (other_O == target_P[:, None])) @ weight_O
    gain_P = 1 / torch.log2(2 + better_P)
    return float(gain_P[better_P < 10].sum()) / len(target_P)


def _log_share(one: _Ranked, logit_C: Tensor) -> float:
    """Mean over the targets of the log of their share in the softmax."""
    share_C = torch.log_softmax(logit_C + one.log_weight_C, 0)
    return float(share_C[one.is_target_C].mean())


def _over_ranks(values: list[float]) -> Tensor:
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums


def _input(batch: Batch) -> ModelInput:
    """The batch as the prior reads it: without rows."""
    wanted = WantedItems.of(batch)
    return model_input(
        batch,
        item_IC=torch.zeros(len(wanted.rows_I), 0),
        features_IFC=torch.zeros(len(wanted.rows_I), 0, 0),
        user_features_UGC=torch.zeros(batch.num_users, 0, 0),
        event_item_N=wanted.event_item_N,
        candidate_item_M=wanted.candidate_item_M,
        item_row_I=wanted.rows_I,
        num_reserved=int((wanted.rows_I < NUM_RESERVED).sum()),
    )


def _of_items(one: Batch, items: Tensor) -> ModelInput:
    """A batch of one request with these items as its candidates."""
    return _input(
        dataclasses.replace(
            one,
            candidate_offsets=torch.tensor([0, len(items)]),
            candidate_item=items,
            candidate_label=torch.zeros(len(items)),
        )
    )
