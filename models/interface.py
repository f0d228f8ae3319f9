"""The interface of a recommender: the tensors it reads, the scores it returns, and the letters of all shapes.

    U users of the batch           N history events of all users (jagged)    B requests of all users
    M candidates of all requests   I distinct items of the batch             C width of an embedding table
    D model width                  H heads                                   R rank: interests of a history
    W recent events (exact)        K checkpoints of a history                F item features, G user features
    T requests or events of one user, where a tensor is dense over them
    S requests whose older events are stored, E distinct items of those

A tensor's name ends with its shape: `query_MHD` is [M, H, D]; `1` means "plus one" (`event_offsets_U1` is [U + 1]).
Tables (models/embeddings.py) turn ids into rows; a tower (solar.py and its competitors) turns rows into scores. A tower
imports only torch, so that it also runs where TorchRec does not.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

NUM_LABEL_CODES = 3
"""Codes of an event's label: 0 = none known, 1 = label 0, 2 = label above 0."""
DECAY_EVENTS = 100.0
"""Half-life of the counts of a user's own items, in events."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredHistories:
    """A stored summary of the older events of S requests, all of different users. The events given in the ModelInput
    are the latest events that were kept beside the summary, then the events since it was stored.

        history   a b c d e f g h | i j        length 8, kept 3        given: f g h i j

    request_S, length_S, kept_S and older_offsets_S1 are on the host.
    """

    request_S: Tensor
    """[S] int64 index into B, ascending."""
    length_S: Tensor
    """[S] int64: number of events of the history when it was stored."""
    kept_S: Tensor
    """[S] int64: how many of these are given again, the latest ones; less than `length_S`."""
    interest_SRD: Tensor
    """[S, R, D]: interests at the last checkpoint at or before `length_S`; zero rows where not valid."""
    gram_SDD: Tensor
    """[S, D, D]: Gram of the events before that checkpoint."""
    sum_SD: Tensor
    """[S, D]: sum of the events before that checkpoint."""
    older_offsets_S1: Tensor
    """[S + 1] int64: entries older_offsets[s] : older_offsets[s + 1] below are the distinct items of request s in the
    events that are not given."""
    older_item_E: Tensor
    """[E] int64 index into I; each item occurs once per request."""
    older_count_E: Tensor
    """[E] int64: how often the item occurs in the events that are not given."""
    older_place_E: Tensor
    """[E] int64: position of its last occurrence in the history, from 0."""
    older_time_E: Tensor
    """[E] int64: time of its last occurrence."""
    older_label_E: Tensor
    """[E] int64: how many of these occurrences have a label above 0."""
    older_decayed_E: Tensor
    """[E] float32: sum over these occurrences of 2^(-age / DECAY_EVENTS); when the history was stored, its latest event
    had age 0, the one before it age 1."""
    known_labels_S: Tensor
    """[S] int64: number of events that are not given and have a known label."""
    positive_labels_S: Tensor
    """[S] int64: number of these whose label is above 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelInput:
    """The input of a tower. Each distinct item is looked up once; events and candidates refer to items by index.

    The layout (event_offsets, request_user, request_position, candidate_offsets) is on the host, all other tensors are
    on the device: a tower plans on the host and never waits for the device to learn a size.
    """

    item_IC: Tensor
    """[I, C] embedding rows of the distinct items of this batch, with the gradient of the look-up."""
    features_IFC: Tensor
    """[I, F, C] one vector per item feature: the mean of its values' rows, zero for an item without values. If the
    feature's table is narrower than C, the last columns are zero."""
    user_features_UGC: Tensor
    """[U, G, C] one vector per user feature, made like features_IFC; G may be 0."""
    event_offsets_U1: Tensor
    """[U + 1] int64, host: user u owns events event_offsets[u] : event_offsets[u + 1], in total order."""
    event_item_N: Tensor
    """[N] int64 index into I."""
    event_time_N: Tensor
    """[N] int64 milliseconds since 1970 UTC, zero where the log has no times."""
    event_action_N: Tensor
    """[N] int64 action code, below `num_actions` of the model's config; 0 = none."""
    event_label_N: Tensor
    """[N] int64 code of the event's label, known from the event's time: 0 = none known, 1 = label 0, 2 = above 0."""
    request_user_B: Tensor
    """[B] int64, host, not decreasing."""
    request_position_B: Tensor
    """[B] int64, host: length of the history, which is the user's first events."""
    request_time_B: Tensor
    """[B] int64 milliseconds since 1970 UTC, zero where the log has no times."""
    candidate_offsets_B1: Tensor
    """[B + 1] int64, host."""
    candidate_item_M: Tensor
    """[M] int64 index into I."""
    item_row_I: Tensor | None = None
    """[I] int64 rows of the items in the model's item table; read by models with a prior."""
    counted_until_B: Tensor | None = None
    """[B] int64 milliseconds since 1970 UTC, as of which counters of items are read; None = the request's times. Later
    where a request is of no time but now."""
    num_reserved: int = 0
    """The first `num_reserved` of I are not real items: padding, and the row shared by all unknown items."""
    known_candidates_B: Tensor | None = None
    """[B] int64, host: number of candidates of each request that are real items (`known_candidates`); None = all."""
    stored: StoredHistories | None = None
    """Summaries for requests whose older events are not given again (serving); None = every history is complete."""

    def refuse_bad_layout(self) -> ModelInput:
        """Returns this input; ValueError with the value, the rule and the fix where scores would be meaningless.

        Checks only values on the host, so it never waits for an accelerator; times on an accelerator are not checked.
        Rows are checked by `refuse_bad_rows`, once per look-up, because one look-up serves many inputs.
        """
        num_users, num_events = self.event_offsets_U1.numel() - 1, self.event_item_N.numel()
        length_U = self.event_offsets_U1.diff()
        _refuse(
            bool((length_U < 0).any()) or int(self.event_offsets_U1[-1]) != num_events,
            f"event_offsets end at {int(self.event_offsets_U1[-1])} of {num_events} events: they must rise to "
            "the number of events",
        )
        size_B, user_B = self.candidate_offsets_B1.diff(), self.request_user_B
        _refuse(
            bool((size_B < 0).any()) or int(self.candidate_offsets_B1[-1]) != self.candidate_item_M.numel(),
            f"candidate_offsets end at {int(self.candidate_offsets_B1[-1])} of {self.candidate_item_M.numel()} "
            "candidates: they must rise to the number of candidates",
        )
        if user_B.numel():
            _refuse(
                bool((user_B.diff() < 0).any()) or not 0 <= int(user_B[0]) <= int(user_B[-1]) < num_users,
                f"request_user runs from {int(user_B[0])} to {int(user_B[-1])}: it must rise within {num_users} users",
            )
            beyond_B = (self.request_position_B < 0) | (self.request_position_B > length_U[user_B])
            _refuse(
                bool(beyond_B.any()),
                f"request_position {self.request_position_B[beyond_B][:1].tolist()} is outside its user's events: "
                "it must be the number of the user's events that are the history",
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
            "history: set the time of the request",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HistorySums:
    """The sums to store for B histories, each at its last checkpoint; zero for a history without a checkpoint."""

    interest_BRD: Tensor
    """[B, R, D] float64."""
    gram_BDD: Tensor
    """[B, D, D] float64."""
    sum_BD: Tensor
    """[B, D] float64."""


def known_candidates(candidate_item_M: Tensor, *, candidate_offsets_B1: Tensor, num_reserved: int) -> Tensor | None:
    """ModelInput.known_candidates_B, from tensors on the host."""
    if not num_reserved:
        return None
    size_B = candidate_offsets_B1.diff()
    return torch.zeros_like(size_B).index_add(
        0, torch.repeat_interleave(size_B), (candidate_item_M >= num_reserved).to(size_B)
    )


def refuse_bad_rows(item_IC: Tensor, features_IFC: Tensor) -> None:
    """ValueError for looked-up rows of two different types, or (checked on the host only) rows that are not finite."""
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


def _refuse(mistake: bool, line: str) -> None:
    if mistake:
        raise ValueError(line)


class Recommender(nn.Module):
    """A tower. U, N, B, I or M may be 0: it then runs on empty tensors and returns an empty result with a gradient."""

    @property
    def scores_sets(self) -> bool:
        """Whether a candidate's logit depends on the other candidates of its request."""
        return False

    @property
    def kept_events(self) -> int | None:
        """Number of latest events to keep beside a stored history; None: this tower needs complete histories."""
        return None

    def history_sums(self, inputs: ModelInput) -> HistorySums:
        """The sums to store for each request's history. Only for towers whose `kept_events` is not None."""
        raise NotImplementedError

    def forward(self, inputs: ModelInput) -> Tensor:
        """logits_M: one calibrated logit per candidate, float32 (sigmoid = probability of a positive label)."""
        raise NotImplementedError
