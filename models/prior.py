"""The prior: what counting alone says of a candidate, as a logit to which a model adds what it learns.

    next_item    outside the history   sum over windows of w log(1 + events of the item in the latest days)
                 in the history        b + a log(0.01 + sum of 2^(-age / 100) over its events there, age in events)
                                         - r log(1 + age of its latest event there)
    impressions  a logit(like rate of the item) + b logit(like rate of the user), rates shrunk towards the mean
    both         + c

All of it was known when the request was made: an item's counters end with the day before it (item_counters.py), the
user's own counts and labels are those of the history, exactly. jobs/training/prior_fit.py fits the start; training then
moves it with the model. A candidate that neither the counters nor the history know is barred.
The letters are those of models/interface.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.interface import HistorySums, ModelInput, Recommender
from models.item_counters import ItemCounters
from models.own_counts import label_counts, own_counts

PRIOR_PREFIX = "prior."
"""Of the names of the prior's parameters beside those of the tower."""
WINDOW_DAYS = (7, 30, 180, 730, None)
"""Windows in which an item's events are counted; None = all days."""
ITEM_EVENTS, USER_EVENTS = 8.0, 5.0
"""So many events of the mean rate are added to the labels of an item, and of a user. Measured on MovieLens-100K, before
the choice of the days: tests/benchmarks/RESULTS.md."""
LEAST_OWN = 0.01
"""Added to the decayed count of an item in the history, so that a forgotten item is not below an unknown one."""
BARRED = -30.0
"""Added to the logit of an item that was unknown at the time of the request."""
EVIDENCE_EVENTS = 5.0
"""A row with n training positives is scaled by n / (n + this): a row that training never moved says nothing."""


Task = Literal["next_item", "impressions"]


class Prior(nn.Module):
    """The logit of the prior."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        self.bias_1 = nn.Parameter(torch.zeros(1))
        if task == "impressions":
            self.rate_2 = nn.Parameter(torch.zeros(2))
            # The mean rate of training, to which rates are shrunk: a constant of the run, stored like a parameter.
            self.mean_1 = nn.Parameter(torch.full((1,), 0.5), requires_grad=False)
        else:
            self.window_5 = nn.Parameter(torch.zeros(len(WINDOW_DAYS)))
            self.own_3 = nn.Parameter(torch.zeros(3))

    def forward(self, inputs: ModelInput, counters: ItemCounters) -> Tensor:
        """prior_M, float32."""
        features = self.features(inputs, counters)
        logit_M = self.of_features(features)
        return logit_M if self.training else logit_M + BARRED * features["unknown"].float()

    def of_features(self, features: Mapping[str, Tensor]) -> Tensor:
        """prior_M of the features, without bars."""
        if self.task == "impressions":
            return features["rates"] @ self.rate_2 + self.bias_1
        own_M = self.own_3[0] + self.own_3[1] * features["often"] + self.own_3[2] * features["lately"]
        popularity_M = features["windows"] @ self.window_5
        return torch.where(features["seen"], own_M, popularity_M) + self.bias_1

    def features(self, inputs: ModelInput, counters: ItemCounters) -> dict[str, Tensor]:
        """What the prior reads of each candidate; impressions: rates [M, 2]; next_item: windows [M, 5], often, lately
        and seen [M]; both: unknown [M]."""
        assert inputs.item_row_I is not None, "the input of a model with a prior names the rows of its items"
        row_M = inputs.item_row_I[inputs.candidate_item_M]
        request_M = torch.repeat_interleave(inputs.candidate_offsets_B1.diff()).to(row_M.device, non_blocking=True)
        until_B = inputs.request_time_B if inputs.counted_until_B is None else inputs.counted_until_B
        day_M = counters.days(until_B)[request_M]
        if self.task == "impressions":
            events_M, positives_M = counters.before(row_M, day_M)
            known_B, liked_B = label_counts(inputs)
            rates = (
                _log_odds(positives_M, events_M, mean_1=self.mean_1, added=ITEM_EVENTS),
                _log_odds(liked_B, known_B, mean_1=self.mean_1, added=USER_EVENTS)[request_M],
            )
            # Bar nothing: candidates that were shown together are ranked whether they are known or not.
            return {"rates": torch.stack(rates, 1), "unknown": torch.zeros_like(request_M, dtype=torch.bool)}
        own_M, age_M, seen_M = own_counts(inputs, request_M=request_M)
        windows_MW = counters.events_within(row_M, day_M, WINDOW_DAYS)
        return {
            "windows": torch.log1p(windows_MW.float()),
            "often": torch.log(own_M + LEAST_OWN),
            "lately": -torch.log1p(age_M),
            "seen": seen_M,
            "unknown": (windows_MW[:, -1] == 0) & ~seen_M,
        }


class PriorModel(Recommender):
    """A tower, which may be inside a training engine, added to a prior. Rows with little evidence are shrunk, so that
    an untrained row is its features."""

    counters: ItemCounters

    def __init__(self, tower: Any, prior: Prior, counters: ItemCounters) -> None:
        super().__init__()
        self.tower, self.prior, self.counters = tower, prior, counters

    def forward(self, inputs: ModelInput, **options: Any) -> Any:
        """logits_M; with `encode` or `vectors` what the tower returns, without the prior. `options` are the tower's."""
        result = self.tower(self.weighed(inputs), **options)
        if options.get("encode") or options.get("vectors"):
            return result
        return result + self.prior(inputs, self.counters)

    def weighed(self, inputs: ModelInput) -> ModelInput:
        """The input with every item's row scaled by its evidence, n / (n + EVIDENCE_EVENTS)."""
        assert inputs.item_row_I is not None
        training_I = torch.cat([self.counters.training_R, self.counters.training_R.new_zeros(1)])[
            inputs.item_row_I.clamp_max(self.counters.training_R.numel())
        ]
        share_I = (training_I / (training_I + EVIDENCE_EVENTS)).to(inputs.item_IC.dtype)
        return dataclasses.replace(inputs, item_IC=inputs.item_IC * share_I[:, None])

    @property
    def scores_sets(self) -> bool:
        return bare_tower(self).scores_sets

    @property
    def kept_events(self) -> int | None:
        return bare_tower(self).kept_events

    def history_sums(self, inputs: ModelInput) -> HistorySums:
        return bare_tower(self).history_sums(self.weighed(inputs))


class PriorAlone(Recommender):
    """The prior of a model without what the model learned, as a baseline."""

    def __init__(self, model: PriorModel) -> None:
        super().__init__()
        self.prior, self.counters = model.prior, model.counters

    def forward(self, inputs: ModelInput) -> Tensor:
        """logits_M."""
        return self.prior(inputs, self.counters)


def bare_tower(model: nn.Module) -> Any:
    """The tower of a model, without its prior and its training engine."""
    tower: Any = model.tower if isinstance(model, PriorModel) else model
    return getattr(tower, "module", tower)


def _log_odds(positives_X: Tensor, events_X: Tensor, *, mean_1: Tensor, added: float) -> Tensor:
    """Log odds of a rate with `added` events of the mean rate, minus those of the mean."""
    mean_1 = mean_1.double()
    rate_X = (positives_X.double() + added * mean_1) / (events_X.double() + added)
    return (torch.logit(rate_X) - torch.logit(mean_1)).float()
