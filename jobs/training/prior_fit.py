"""The start of a prior: the best of what counting can say, chosen on training requests before the first step.

    impressions  logistic regression of the two rates on the candidates of the first batches
    next_item    the best NDCG@10 of: own items, latest items, and the fit by likelihood of all weights together, each
                 with every window of popularity; then the bias, which changes no ranking

A ranking is fitted on a few requests of every user that is read: those of the first batches alone would be requests of
the few whose histories fill a batch. Its likelihood is that of the targets among the items that compete for the first
places: over the whole catalogue the many targets that nothing points to would decide, and popularity would outweigh a
user's own items. Everything follows from the data and the seed. All ranks take part in every call.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

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

FIT_REQUESTS = {"next_item": 1 << 11, "impressions": 1 << 14}
"""So many requests, rounded up to whole batches, are read."""
USER_REQUESTS = 4
"""Requests of one user in a batch that a ranking is fitted on, at most."""
POPULAR_ITEMS, HEAD_ITEMS = 1 << 11, 100
"""Of so many items with the most events, those with the most in some window before a request compete for its first
places, with the items of its history: all others are below a hundred items."""
SAMPLED_ITEMS = 1 << 10
"""Of the whole catalogue: they say what all other items add to the sum of a softmax."""
OWN_ITEMS, LATEST_ITEMS = (9.0, 1.0, 0.0, 0.5), (9.0, 0.0, 1.0, 0.5)
"""Weights of the baselines of these names; 9 puts every item of the history before every popular one."""
LEAST_POPULARITY = 0.05
"""So that of two items of which nothing else is known the more popular one is first."""
NEWTON_STEPS, NEWTON_HALVINGS = 30, 10
RIDGE = 1e-5
"""Penalty per example on half the squared distance from the weights that a fit begins with."""


class Start(NamedTuple):
    """Weights with which the prior of a ranking can begin."""

    weight_4: Tensor
    """float64: of an item of the history, of how often and of how recently it occurs there; of an item's popularity
    outside the history."""
    window: int
    """Of popularity: an index in WINDOW_DAYS."""


class Loss(NamedTuple):
    """A loss and its derivatives at some weights, summed over examples."""

    value: Tensor
    slope_W: Tensor
    curve_WW: Tensor


@torch.no_grad()
def fit_prior(
    prior: Prior, counters: ItemCounters, loader: TrainLoader, *, requests: RequestConfig, num_items: int, seed: int
) -> None:
    """Set the prior's parameters. `num_items`: rows of the vocabulary in use, the reserved ones included."""
    if requests.task == "impressions":
        _fit_rates(prior, counters, loader)
    else:
        _fit_ranking(prior, counters, loader, requests=requests, num_items=num_items, seed=seed)


def _first_batches(loader: TrainLoader) -> Iterator[Batch]:
    """The batches of the first epoch, until they have enough requests over all ranks."""
    done = 0
    for batch in loader.epoch(0):
        yield batch
        done += batch.num_global_requests
        if done >= FIT_REQUESTS["impressions"]:
            return


def _fit_rates(prior: Prior, counters: ItemCounters, loader: TrainLoader) -> None:
    batches = list(_first_batches(loader))
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

    It begins with the constant `mean`, with a light penalty on the distance from it: so the fit is finite where the
    labels are all alike or separable, and never worse than the constant. A collective.
    """
    x_M3 = torch.nn.functional.pad(rates_M2, (0, 1), value=1.0)

    def loss_at(weight_3: Tensor) -> Loss:
        logit_M = x_M3 @ weight_3
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logit_M, label_M, reduction="sum")
        p_M = torch.sigmoid(logit_M)
        return Loss(loss, x_M3.mT @ (p_M - label_M), (x_M3 * (p_M * (1 - p_M))[:, None]).mT @ x_M3)

    start_3 = torch.tensor([0.0, 0.0, math.log(mean / (1 - mean))], dtype=torch.float64)
    weight_3 = _minimum(loss_at, start_3, num_examples=len(label_M))
    return weight_3[:2], float(weight_3[2])


def _minimum(loss_at: Callable[[Tensor], Loss], start_W: Tensor, *, num_examples: int) -> Tensor:
    """The weights with the least mean loss over the examples of all ranks, by damped Newton steps from `start_W`. A
    collective: `loss_at` is of the `num_examples` examples of this rank."""
    size = len(start_W)

    def mean_at(weight_W: Tensor) -> Loss:
        here = loss_at(weight_W)
        sums = _over_ranks(
            [float(num_examples), float(here.value), *here.slope_W.tolist(), *here.curve_WW.flatten().tolist()]
        )
        mean, moved_W = sums[1:] / sums[0].clamp_min(1), weight_W - start_W
        return Loss(
            mean[0] + RIDGE / 2 * moved_W.square().sum(),
            mean[1 : 1 + size] + RIDGE * moved_W,
            mean[1 + size :].view(size, size) + RIDGE * torch.eye(size),
        )

    weight_W, here = start_W, mean_at(start_W)
    for _ in range(NEWTON_STEPS):
        step_W = torch.linalg.solve(here.curve_WW, here.slope_W)
        tries = (weight_W - 0.5**k * step_W for k in range(NEWTON_HALVINGS))
        better = next(((tried_W, there) for tried_W in tries if (there := mean_at(tried_W)).value < here.value), None)
        if better is None:
            break
        weight_W, here = better
    return weight_W


@dataclasses.dataclass(frozen=True)
class _Ranked:
    """The targets of a request and what competes with them: the C items that can be among the first, and O items drawn
    of all others. P windows."""

    own_C3: Tensor
    """float64. In the history: 1, how often, how recently; zeros outside it."""
    popular_CP: Tensor
    """float64. Outside the history: log(1 + events) in each window; zeros in it."""
    is_target_C: Tensor
    num_targets: int
    popular_OP: Tensor
    stands_for: float
    """How many items of the catalogue each of the O items stands for."""

    def features_C4(self, window: int) -> Tensor:
        """What the weights of a start weigh."""
        return torch.cat([self.own_C3, self.popular_CP[:, window, None]], 1)


def _fit_ranking(
    prior: Prior, counters: ItemCounters, loader: TrainLoader, *, requests: RequestConfig, num_items: int, seed: int
) -> None:
    own = requests.seen_items == "kept"
    rows_R = torch.arange(NUM_RESERVED, num_items)
    until = counters.num_days
    if requests.split == "temporal":
        # What is popular later is not known in training.
        until = int(counters.days(torch.tensor(requests.bounds[0])))
    events_R, _ = counters.before(rows_R, torch.full_like(rows_R, until))
    popular = rows_R[torch.argsort(events_R, descending=True, stable=True)[:POPULAR_ITEMS]]
    sample = rows_R[torch.from_numpy(hash64(seed, rows_R.numpy()).argsort(kind="stable"))[:SAMPLED_ITEMS]]
    ranked = [
        _ranked(prior, counters, one, popular=popular, sample=sample, num_items=num_items, own=own)
        for one in _some_requests(loader, seed=seed)
    ]
    # The first requests of a log find nothing.
    ranked = [one for one in ranked if len(one.is_target_C)]
    starts: list[Start] = []
    quality: list[float] = []
    for window in range(len(WINDOW_DAYS)):
        features = [one.features_C4(window) for one in ranked]
        for weight_4 in _weights(ranked, features, own=own):
            starts.append(Start(weight_4, window))
            quality.append(sum((_ndcg(one, x_C4 @ weight_4) for one, x_C4 in zip(ranked, features, strict=True)), 0.0))
    weight_4, window = starts[int(_over_ranks(quality).argmax())]
    # The bias makes logits probabilities: it is the mean of what normalises a request's softmax over the catalogue.
    shifts = []
    for one in ranked:
        rest_O = weight_4[3] * one.popular_OP[:, window] + torch.tensor(one.stands_for).log()
        shifts.append(float(torch.logsumexp(torch.cat([one.features_C4(window) @ weight_4, rest_O]), 0)))
    shift, count = _over_ranks([sum(shifts, 0.0), float(len(shifts))])
    prior.bias_1.fill_(-float(shift / count.clamp_min(1)))
    prior.own_3.copy_(weight_4[:3])
    prior.window_5.zero_()
    prior.window_5[window] = weight_4[3]


def _some_requests(loader: TrainLoader, *, seed: int) -> Iterator[Batch]:
    """Batches of one request each, at most USER_REQUESTS of a user in a batch of the loader: the same ones on any
    number of ranks."""
    done, enough = 0, FIT_REQUESTS["next_item"]
    for batch in loader.epoch(0):
        user_B, salt = batch.user[batch.request_user].numpy(), np.uint64(5)
        drawn_B = hash64(seed, user_B, batch.request_key.numpy(), salt)
        order = np.lexsort((drawn_B, user_B))
        first = np.flatnonzero(np.append(True, np.diff(user_B[order]) != 0)[: len(order)])
        place = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
        chosen = np.sort(order[place < USER_REQUESTS])
        # Of a large batch only a share.
        num_chosen = int(_over_ranks([float(len(chosen))]))
        share = min(1.0, enough / max(1, num_chosen))
        for b in chosen[hash64(drawn_B[chosen], salt) < np.uint64(share * (2**64 - 2**11))].tolist():
            one = select_requests(batch, b, b + 1)
            if bool((one.candidate_item[one.candidate_label > 0] >= NUM_RESERVED).any()):
                yield one
        done += num_chosen
        if done >= enough:
            return


def _ranked(
    prior: Prior, counters: ItemCounters, one: Batch, *, popular: Tensor, sample: Tensor, num_items: int, own: bool
) -> _Ranked:
    """A request with its competing items: the first ones of `popular` (rows) in each window, and those of its history
    if it may ask for `own` items. `sample`: rows that stand for the whole catalogue."""
    targets = one.candidate_item[one.candidate_label > 0].unique()
    history = one.event_item[one.event_item >= NUM_RESERVED].unique()
    outside = torch.cat([popular, sample[~torch.isin(sample, popular)]])
    items = torch.cat([history if own else history[:0], outside[~torch.isin(outside, history)]])
    found = prior.features(_of_items(one, items), counters)
    seen_X, windows_XP = found["seen"].double(), found["windows"].double() * ~found["seen"][:, None]
    # What nobody had touched before the request is barred.
    is_popular_X = torch.isin(items, popular) & ~found["unknown"]
    first_X = torch.zeros_like(is_popular_X)
    places = is_popular_X.nonzero().squeeze(1)
    for window_X in windows_XP.T:
        first_X[places[window_X[places].topk(min(HEAD_ITEMS, len(places))).indices]] = True
    competes_X = first_X | found["seen"]
    rest_X = torch.isin(items, sample) & ~competes_X
    num_rest = max(1, int(rest_X.sum()))
    own_X3 = torch.stack([seen_X, seen_X * found["often"], seen_X * found["lately"]], 1)
    return _Ranked(
        own_X3[competes_X],
        windows_XP[competes_X],
        torch.isin(items, targets)[competes_X],
        int((targets >= NUM_RESERVED).sum()),
        windows_XP[rest_X & ~found["unknown"]].float(),
        (num_items - NUM_RESERVED - int(competes_X.sum())) / num_rest,
    )


def _weights(ranked: list[_Ranked], features: list[Tensor], *, own: bool) -> list[Tensor]:
    """weight_4 of each way to start with one window, whose `features` are x_C4 of each request: the baselines at their
    most likely scale, and all weights fitted together."""
    pairs = zip(ranked, features, strict=True)
    competing = [(one.is_target_C, x_C4) for one, x_C4 in pairs if bool(one.is_target_C.any())]
    x_C4 = torch.cat([torch.zeros(0, 4).double(), *(x_C4 for _, x_C4 in competing)])
    request_C = torch.repeat_interleave(torch.tensor([len(x_C4) for _, x_C4 in competing], dtype=torch.int64))
    goals = (is_target_C.double() / is_target_C.sum() for is_target_C, _ in competing)
    goal_C = torch.cat([torch.zeros(0).double(), *goals])

    def minimum(x_CF: Tensor, start_F: Tensor) -> Tensor:
        def loss_at(weight_F: Tensor) -> Loss:
            return _softmax_loss(x_CF, goal_C, request_C, weight_F)

        return _minimum(loss_at, start_F, num_examples=len(competing))

    baselines = (OWN_ITEMS, LATEST_ITEMS) if own else ((0.0, 0.0, 0.0, 1.0),)
    found = []
    for direction_4 in torch.tensor(baselines).double():
        scale_1 = minimum((x_C4 @ direction_4)[:, None], torch.ones(1).double())
        found.append(scale_1 * direction_4)
    if own:
        found.append(minimum(x_C4, found[0]))
    return [torch.cat([weight_4[:3], weight_4[3:].clamp_min(LEAST_POPULARITY)]) for weight_4 in found]


def _softmax_loss(x_CF: Tensor, goal_C: Tensor, request_C: Tensor, weight_F: Tensor) -> Loss:
    """Cross entropy of the softmax over each request's items with the shares `goal_C`, summed over the requests."""
    logit_C, num_requests = x_CF @ weight_F, int(request_C[-1]) + 1 if len(request_C) else 0

    def sums(value_C: Tensor) -> Tensor:
        return value_C.new_zeros(num_requests, *value_C.shape[1:]).index_add_(0, request_C, value_C)

    largest_Q = logit_C.new_zeros(num_requests).scatter_reduce(0, request_C, logit_C, "amax", include_self=False)
    power_C = (logit_C - largest_Q[request_C]).exp()
    total_Q = sums(power_C)
    share_C = power_C / total_Q[request_C]
    mean_QF = sums(share_C[:, None] * x_CF)
    return Loss(
        (total_Q.log() + largest_Q).sum() - goal_C @ logit_C,
        x_CF.mT @ (share_C - goal_C),
        (x_CF * share_C[:, None]).mT @ x_CF - mean_QF.mT @ mean_QF,
    )


def _ndcg(one: _Ranked, logit_C: Tensor) -> float:
    """Mean over the targets of their gain at rank 10, with expected ranks."""
    target_P, other_O = logit_C[one.is_target_C], logit_C[~one.is_target_C]
    better_P = ((other_O > target_P[:, None]) + 0.5 * (other_O == target_P[:, None])).sum(1)
    gain_P = 1 / torch.log2(2 + better_P)
    return float(gain_P[better_P < 10].sum()) / one.num_targets


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
