"""The common parts of SOLAR and its competitors, so that they differ only in how they read the long history.

    item_ID = items(item rows, item features)          event_ND = events(items of the history, action, time)
    found_MD = W_O [whole history read by Q = W_Q norm(item) + request shift  +  RecentAttention(Q, latest W events)]
    logit = head(found + request shift, item)  [+ repeats(item, history)]

A competitor is a subclass that defines how the whole history is read: one file each, with the same encoders, recent
window, head and sizes. Solar repeats the middle line in blocks.
The letters are those of models/interface.py.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.candidate_sets import MASKED_SCORE, CandidateSets, attend, gather_rows, mask_bias, start_as_similarity
from models.head_attention import attend_in_heads, bucket_scores
from models.history import NUM_GAP_BUCKETS, EventEncoder, ItemEncoder, recent_events
from models.interface import ModelInput, Recommender
from models.repeats import RepeatScore
from models.request_blocks import RequestBlocks
from models.request_features import RequestEncoder, RequestShift
from models.tower_settings import TowerConfig

BLOCK_POSITIONS = 8
"""Positions of a user whose requests share the keys of the recent window: more would be masked for each request."""
SHRUNK_NORM_EPS = 0.05
"""Epsilon of the norm of items in a model with a prior: a row that was shrunk to nearly nothing stays small."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedItems:
    """What a tower computes of each of I items, whatever the request."""

    item_ID: Tensor
    """[I, D] vectors of the items."""
    query_ID: Tensor
    """[I, D] their queries to a history."""
    head_IY: Tensor
    """[I, D + head_width + 1]: what the head reads of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """What a forward computes before it looks at any candidate: further forwards for the same items, or the same
    requests, can be given it."""

    items: EncodedItems
    history: Any
    """What the tower reads of the requests' histories."""


class HistoryTower(Recommender):
    """Encoders, head and request features. `num_features` is F, the number of item features of the tables."""

    def __init__(self, config: TowerConfig, *, num_features: int) -> None:
        super().__init__()
        norm_eps = SHRUNK_NORM_EPS if config.prior else 1e-5
        self.items = ItemEncoder(config.width, num_features=num_features, norm_eps=norm_eps)
        self.events = EventEncoder(
            config.width,
            num_actions=config.num_actions,
            time_features=config.time_features,
            absolute_time=config.reads_waves,
            labels=config.history_labels,
            dropout=config.dropout,
        )
        self.head = Head(
            config.width, hidden=config.head_width, initial_agreement=config.initial_agreement, adds=config.prior
        )
        self.request = request_encoder(config)
        self.shift = RequestShift(config.width) if config.reads_request else None
        self.repeats = None
        if config.repeats:
            self.repeats = RepeatScore(time_features=config.time_features, latest=config.latest, adds=config.prior)

    def queries(self, item_ID: Tensor) -> Tensor:
        """query_ID: every item's query to a history."""
        raise NotImplementedError

    def histories(self, item_ID: Tensor, inputs: ModelInput) -> Any:
        """What candidates read of the histories, whatever the candidate: here the vectors of all events."""
        return self.events(item_ID, inputs)

    def found(
        self,
        items: EncodedItems,
        *,
        history: Any,
        query_shift_MD: Tensor | None,
        inputs: ModelInput,
        candidates: CandidateSets,
    ) -> Tensor:
        """found_MD: what every candidate found in its request's history; its state is the sum of its item and this."""
        raise NotImplementedError

    def forward(
        self, inputs: ModelInput, *, items: EncodedItems | None = None, history: Any = None, encode: bool = False
    ) -> Any:
        """logits_M, or with `encode` what is computed before any candidate. `items` and `history`: from a forward that
        encoded these items and these requests; None = computed here."""
        if items is None:
            item_ID = self.items(inputs.item_IC, inputs.features_IFC)
            items = EncodedItems(item_ID=item_ID, query_ID=self.queries(item_ID), head_IY=self.head.of_items(item_ID))
        if history is None:
            history = self.histories(items.item_ID, inputs)
        if encode:
            return Encoded(items=items, history=history)
        candidates = CandidateSets.from_offsets(
            inputs.candidate_offsets_B1,
            device=inputs.candidate_item_M.device,
            member_M=inputs.candidate_item_M >= inputs.num_reserved if inputs.num_reserved else None,
            num_members_B=inputs.known_candidates_B,
        )
        query_shift_MD = state_shift_MD = None
        if self.request is not None and self.shift is not None:
            query_shift_MD, state_shift_MD = self.shift(self.request(inputs), request_M=candidates.request_M)
        found_MD = self.found(
            items, history=history, query_shift_MD=query_shift_MD, inputs=inputs, candidates=candidates
        )
        if self.head.adds:
            # Without a history nothing was found: the prior stands, and what the request's features say.
            empty_B = (inputs.request_position_B == 0).to(found_MD.device, non_blocking=True)
            found_MD = found_MD.masked_fill(empty_B[candidates.request_M][:, None], 0.0)
        if state_shift_MD is not None:
            found_MD = found_MD + state_shift_MD
        logit_M = self.head(found_MD, head_IY=items.head_IY, item_M=inputs.candidate_item_M)
        if self.repeats is not None:
            logit_M = logit_M + self.repeats(inputs, candidates=candidates)
        return logit_M.float()


class AttentionTower(HistoryTower):
    """A tower whose candidates read the history once."""

    def __init__(self, config: TowerConfig, *, num_features: int) -> None:
        super().__init__(config, num_features=num_features)
        self.norm = nn.LayerNorm(config.width)
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.recent = RecentAttention(config) if config.recent_window else None
        self.output = nn.Linear(config.width, config.width, bias=False)
        start_as_similarity(self.query, self.output)

    def read_history(
        self, query_MD: Tensor, *, event_ND: Tensor, inputs: ModelInput, candidates: CandidateSets
    ) -> Tensor | None:
        """out_MD: the result of reading the whole history for each candidate; None = only the recent window is read."""
        raise NotImplementedError

    def queries(self, item_ID: Tensor) -> Tensor:
        return self.query(self.norm(item_ID))

    def found(
        self,
        items: EncodedItems,
        *,
        history: Tensor,
        query_shift_MD: Tensor | None,
        inputs: ModelInput,
        candidates: CandidateSets,
    ) -> Tensor:
        query_MD = gather_rows(items.query_ID, inputs.candidate_item_M)
        if query_shift_MD is not None:
            query_MD = query_MD + query_shift_MD
        found_MD = self.read_history(query_MD, event_ND=history, inputs=inputs, candidates=candidates)
        if self.recent is not None:
            recent_MD = self.recent(query_MD, event_ND=history, inputs=inputs, candidates=candidates)
            found_MD = recent_MD if found_MD is None else found_MD + recent_MD
        assert found_MD is not None, "the config must keep the whole history or the recent window"
        return self.output(found_MD)


def request_encoder(config: TowerConfig) -> RequestEncoder | None:
    """The encoder of request features; None if the config reads none."""
    if not config.reads_request:
        return None
    return RequestEncoder(
        config.width,
        num_user_features=config.num_user_features if config.user_features else 0,
        context=config.reads_context,
        absolute_time=config.reads_waves,
    )


class RecentAttention(nn.Module):
    """Candidates attend to the latest W events themselves. Recency enters as a learned score per head: by how many
    events ago, and by how long ago (buckets of the gap to the request)."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.num_heads, self.window = config.num_heads, config.recent_window
        self.key = nn.Linear(config.width, config.width, bias=False)
        self.value = nn.Linear(config.width, config.width, bias=False)
        start_as_similarity(self.key, self.value)
        self.position_WH = nn.Parameter(torch.zeros(config.recent_window, config.num_heads))
        self.gap_GH = nn.Parameter(torch.zeros(NUM_GAP_BUCKETS, config.num_heads)) if config.time_features else None

    def forward(self, query_MD: Tensor, *, event_ND: Tensor, inputs: ModelInput, candidates: CandidateSets) -> Tensor:
        query_MD = query_MD / math.sqrt(query_MD.shape[1] // self.num_heads)
        # No wider than the longest history of the batch: where all are short, most of the window would be masked.
        longest = int(inputs.request_position_B.max()) if inputs.request_position_B.numel() else 0
        window = max(1, min(self.window, longest))
        blocks = RequestBlocks.of(inputs, span=BLOCK_POSITIONS, candidates=candidates)
        if blocks is not None:
            return self._by_block(query_MD, event_ND=event_ND, inputs=inputs, blocks=blocks, window=window)
        event_BW, gap_BW = recent_events(inputs, window=window)
        key_BWD, value_BWD = self._keys(event_ND, event_BW)
        bias_BWH = self.position_WH[-window:].expand(event_BW.shape[0], -1, -1)
        if self.gap_GH is not None:
            bias_BWH = bias_BWH + gather_rows(self.gap_GH, gap_BW)
        bias_BWH = bias_BWH.masked_fill((event_BW == 0)[:, :, None], MASKED_SCORE)
        return attend(
            query_MD,
            key_BSD=key_BWD,
            value_BSD=value_BWD,
            bias_BHS=bias_BWH.mT,
            num_heads=self.num_heads,
            candidates=candidates,
        )

    def _keys(self, event_ND: Tensor, event_BW: Tensor) -> tuple[Tensor, Tensor]:
        """(key_BWD, value_BWD) of events by 1 + their index; the value of a missing event, 0, is 0."""
        if event_BW.numel() < event_ND.shape[0]:
            # Long histories and few requests: project only the events that some request sees.
            seen_BWD = gather_rows(event_ND, (event_BW - 1).clamp_min(0))
            return self.key(seen_BWD), self.value(seen_BWD).masked_fill((event_BW == 0)[:, :, None], 0.0)
        # Project once per event, not once per request that sees it. Row 0 stands for a missing event and is 0.
        key_BWD, value_BWD = (
            gather_rows(F.pad(project(event_ND), (0, 0, 1, 0)), event_BW) for project in (self.key, self.value)
        )
        return key_BWD, value_BWD

    def _by_block(
        self, query_MD: Tensor, *, event_ND: Tensor, inputs: ModelInput, blocks: RequestBlocks, window: int
    ) -> Tensor:
        """`forward` where the requests of a block share their keys: the events that some of them see. Of these L events
        the request at the block's place s sees s .. s + window - 1."""
        device = event_ND.device
        event_GL, gap_GPL, place_GP = blocks.recent_events(inputs, window=window)
        key_GLD, value_GLD = self._keys(event_ND, event_GL)
        seen_SL = torch.arange(event_GL.shape[1]) - torch.arange(BLOCK_POSITIONS)[:, None]
        outside_SL = ((seen_SL < 0) | (seen_SL >= window)).to(device)
        bias_SLH = gather_rows(self.position_WH[-window:], seen_SL.clamp(0, window - 1).to(device))
        bias_SHL = bias_SLH.masked_fill(outside_SL[:, :, None], MASKED_SCORE).mT
        bias_GPHL = gather_rows(bias_SHL, place_GP) + mask_bias(event_GL > 0, dtype=bias_SHL.dtype)[:, None, None]
        if self.gap_GH is not None:
            bias_GPHL = bias_GPHL + bucket_scores(self.gap_GH, gap_GPL)
        found_GXD = attend_in_heads(
            blocks.spread(query_MD),
            key_GSD=key_GLD,
            value_GSD=value_GLD,
            bias_GPHS=bias_GPHL,
            num_heads=self.num_heads,
        )
        found_MD = blocks.collect(found_GXD)
        # A request without a history sees none of the block's events.
        empty_B = inputs.request_position_B == 0
        if bool(empty_B.any()):
            by_request = found_MD.unflatten(0, (empty_B.numel(), -1))
            found_MD = by_request.masked_fill(empty_B.to(device)[:, None, None], 0.0).flatten(0, 1)
        return found_MD


class Head(nn.Module):
    """One logit per candidate: the agreement of what it found with its item, a small network over its state, which is
    item + found, and a score that depends only on the item, which learns popularity.

    An item's inner product with itself would say nothing about the history: the agreement is with what was found alone.
    With `adds` the logit is added to a prior: it starts at 0, and it is 0 where nothing was found.
    """

    def __init__(self, width: int, *, hidden: int, initial_agreement: float, adds: bool = False) -> None:
        super().__init__()
        self.width, self.hidden, self.adds = width, hidden, adds
        self.item = nn.Linear(width, width + hidden + 1)
        # At the start, agreement is similarity.
        nn.init.eye_(self.item.weight.data[:width]).mul_(initial_agreement)
        self.state = nn.Linear(width, hidden, bias=False) if hidden else None
        self.last = nn.Linear(hidden, 1, bias=False) if hidden else None
        if adds:
            nn.init.zeros_(self.item.weight.data[:width])
            nn.init.zeros_(self.item.bias.data[:width])
            if self.last is not None:
                nn.init.zeros_(self.last.weight)

    def of_items(self, item_ID: Tensor) -> Tensor:
        """head_IY: of each item the direction in which `found` raises its logit, its part of the hidden layer, and its
        popularity."""
        head_IY = self.item(item_ID)
        return head_IY if self.state is None else head_IY + F.pad(self.state(item_ID), (self.width, 1))

    def forward(self, found_MD: Tensor, *, head_IY: Tensor, item_M: Tensor) -> Tensor:
        """logit_M."""
        target_MD, hidden_MX, popularity_M1 = gather_rows(head_IY, item_M).split([self.width, self.hidden, 1], -1)
        logit_M = (found_MD * target_MD).sum(-1) / math.sqrt(self.width)
        if not self.adds:
            logit_M = logit_M + popularity_M1.squeeze(-1)
        if self.state is not None and self.last is not None:
            active_MX = F.relu(self.state(found_MD) + hidden_MX)
            logit_M = logit_M + self.last(active_MX - F.relu(hidden_MX) if self.adds else active_MX).squeeze(-1)
        return logit_M
