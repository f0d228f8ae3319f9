"""What a recommender is: the tensors it reads, the scores it returns, the letters of every shape.

    U users of the batch           N history events of all users (jagged)    B requests of all users
    M candidates of all requests   I distinct items of the batch             C width of an embedding table
    D model width                  H heads                                   R rank: interests of a history
    W recent events seen exactly   K checkpoints of a history                F item features, G user features
    T requests or events of one user, where a tensor is dense over them
    S requests whose older events are stored, E distinct items of those

A tensor's name ends with its shape: `query_MHD` is [M, H, D]; `1` means "plus one" (`event_offsets_U1` is [U + 1]).
Tables (models/embeddings.py) turn ids into rows; a tower (solar.py and its competitors) turns rows into scores and
imports torch alone, so that it runs where TorchRec does not.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredHistories:
    """What stands for the older events of S requests, each of a user of its own. Given are the latest events that were
    kept beside it, then those that came since.

        history   a b c d e f g h | i j        length 8, kept 3        given: f g h i j

    request_S, length_S, kept_S and older_offsets_S1 are on the host.
    """

    request_S: Tensor
    """[S] int64 index into B, rising."""
    length_S: Tensor
    """[S] int64: events when it was stored."""
    kept_S: Tensor
    """[S] int64: of these, how many are given again; fewer than `length_S`."""
    interest_SRD: Tensor
    """[S, R, D]: at the last checkpoint at or before `length_S`; zero rows where not valid."""
    gram_SDD: Tensor
    """[S, D, D]: of the events before that checkpoint."""
    sum_SD: Tensor
    """[S, D]: their sum."""
    older_offsets_S1: Tensor
    """[S + 1] int64: request s has the distinct items older_offsets[s] : older_offsets[s + 1] of what is not given."""
    older_item_E: Tensor
    """[E] int64 index into I; for one request each item once."""
    older_count_E: Tensor
    """[E] int64: how often it occurs in them."""
    older_place_E: Tensor
    """[E] int64: where it stands last, from 0."""
    older_time_E: Tensor
    """[E] int64: when that was."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelInput:
    """What a tower reads. Items are looked up once each; events and candidates point into them by index.

    What says where things are (event_offsets, request_user, request_position, candidate_offsets) is on the host, all
    else on the device: a tower plans on the host and never waits for the device to tell it a size.
    """

    item_IC: Tensor
    """[I, C] embedding rows of the distinct items of this batch, with the gradient of the look-up."""
    features_IFC: Tensor
    """[I, F, C] one vector per item feature: the mean of its values' rows, zero where an item has none, and in the
    last columns where the feature's table is narrower than C."""
    user_features_UGC: Tensor
    """[U, G, C] one vector per user feature, as features_IFC has it of items; G may be 0."""
    event_offsets_U1: Tensor
    """[U + 1] int64, host: user u owns events event_offsets[u] : event_offsets[u + 1], in total order."""
    event_item_N: Tensor
    """[N] int64 index into I."""
    event_time_N: Tensor
    """[N] int64 milliseconds since 1970 UTC, zero where the log has an order only."""
    event_action_N: Tensor
    """[N] int64 action code, below `num_actions` of the model's config; 0 = none."""
    request_user_B: Tensor
    """[B] int64, host, not decreasing."""
    request_position_B: Tensor
    """[B] int64, host: the first so many events of the user are the history."""
    request_time_B: Tensor
    """[B] int64 milliseconds since 1970 UTC, zero where the log has an order only."""
    candidate_offsets_B1: Tensor
    """[B + 1] int64, host."""
    candidate_item_M: Tensor
    """[M] int64 index into I."""
    num_reserved: int = 0
    """The first so many of I are no items of their own: padding, and the one that stands for all unknown items."""
    stored: StoredHistories | None = None
    """Of requests whose older events are not given again (serving); None = every history is given whole."""

    def refuse_bad_layout(self) -> ModelInput:
        """This input; ValueError with the value, the rule and the fix where a tower could only return nonsense.

        Looks at values on the host alone: on an accelerator nothing waits, and times are taken as they are. Rows have
        their own check, `refuse_bad_rows`, once a look-up: a catalogue serves many inputs.
        """
        num_users, num_events = self.event_offsets_U1.numel() - 1, self.event_item_N.numel()
        length_U = self.event_offsets_U1.diff()
        _refuse(
            bool((length_U < 0).any()) or int(self.event_offsets_U1[-1]) != num_events,
            f"event_offsets end at {int(self.event_offsets_U1[-1])} of {num_events} events: let them rise to it",
        )
        size_B, user_B = self.candidate_offsets_B1.diff(), self.request_user_B
        _refuse(
            bool((size_B < 0).any()) or int(self.candidate_offsets_B1[-1]) != self.candidate_item_M.numel(),
            f"candidate_offsets end at {int(self.candidate_offsets_B1[-1])} of {self.candidate_item_M.numel()} "
            "candidates: let them rise to it",
        )
        if user_B.numel():
            _refuse(
                bool((user_B.diff() < 0).any()) or not 0 <= int(user_B[0]) <= int(user_B[-1]) < num_users,
                f"request_user runs from {int(user_B[0])} to {int(user_B[-1])}: it must rise within {num_users} users",
            )
            beyond_B = (self.request_position_B < 0) | (self.request_position_B > length_U[user_B])
            _refuse(
                bool(beyond_B.any()),
                f"request_position {self.request_position_B[beyond_B][:1].tolist()} lies outside its user's events: "
                "a history is a number of the user's first events",
            )
        if self.event_time_N.device.type == "cpu":
            self._refuse_bad_times()
        return self

    def _refuse_bad_times(self) -> None:
        falls_N = torch.diff(self.event_time_N, prepend=self.event_time_N[:1]) < 0
        starts = self.event_offsets_U1[:-1]
        falls_N[starts[starts < falls_N.numel()]] = False
        _refuse(
            bool(falls_N.any()),
            f"event {torch.nonzero(falls_N)[:1].flatten().tolist()} is earlier than the one before it: sort a user's "
            "events by time",
        )
        seen_B = self.request_position_B > 0
        last_B = (self.event_offsets_U1[self.request_user_B] + self.request_position_B - 1)[seen_B]
        early_B = self.request_time_B[seen_B] < self.event_time_N[last_B]
        _refuse(
            bool(early_B.any()),
            f"request {torch.nonzero(seen_B).flatten()[early_B][:1].tolist()} is earlier than the last event of its "
            "history: give it its own time",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HistorySums:
    """What is stored of B histories, each at its last checkpoint; zero for one that has not come to any."""

    interest_BRD: Tensor
    """[B, R, D] float64."""
    gram_BDD: Tensor
    """[B, D, D] float64."""
    sum_BD: Tensor
    """[B, D] float64."""


def refuse_bad_rows(item_IC: Tensor, features_IFC: Tensor) -> None:
    """ValueError for looked-up rows of two types or, on the host, that are not finite."""
    _refuse(
        item_IC.dtype != features_IFC.dtype or not item_IC.is_floating_point(),
        f"item rows are {item_IC.dtype}, feature rows {features_IFC.dtype}: look both up in one type",
    )
    if item_IC.device.type != "cpu":
        return
    for name, rows in (("item", item_IC), ("feature", features_IFC)):
        finite_I = torch.isfinite(rows.detach()).flatten(1).all(1)
        _refuse(
            not bool(finite_I.all()),
            f"{name} row {torch.nonzero(~finite_I)[:1].flatten().tolist()} of the batch is not finite: training "
            "diverged; go back to an earlier checkpoint and lower the learning rate",
        )


def refuse_feature_width(feature_width: int | dict[str, int] | None, *, width: int) -> None:
    """ValueError for a width above `width`, or for one that fbgemm has no tables of."""
    of_feature = feature_width if isinstance(feature_width, dict) else {"": feature_width}
    for name, value in of_feature.items():
        if value is not None and (not 4 <= value <= width or value % 4):
            where = f" of {name}" if name else ""
            raise ValueError(
                f"feature_width = {feature_width}: the width{where} must be a multiple of 4, from 4 to width = {width}"
            )


def _refuse(mistake: bool, line: str) -> None:
    if mistake:
        raise ValueError(line)


class Recommender(nn.Module):
    """A tower. U, N, B, I or M may be 0: it then runs on empty tensors and returns an empty result with a gradient."""

    @property
    def kept_events(self) -> int | None:
        """Latest events that are kept beside a stored history; None: this tower reads whole histories alone."""
        return None

    def history_sums(self, inputs: ModelInput) -> HistorySums:
        """What is stored of each request's history, where `kept_events` is a number."""
        raise NotImplementedError

    def forward(self, inputs: ModelInput) -> Tensor:
        """logits_M: one calibrated logit per candidate, float32 (sigmoid = probability of a positive label)."""
        raise NotImplementedError
