"""SOLAR: candidates attend to the interests of a lifelong history, to the latest events, and to each other.

    block:  C += W_O [SVDAttention(norm(C), interests) + RecentAttention(norm(C), latest W events)]
            C += SetAttention(norm(C))
            C += FFN(norm(C))
    head:   logit = <C - item, W item> / sqrt(D) + MLP([C, item]) + popularity(item)  [+ repeats(item, history)]

Request features (request_features.py) shift the first query and the C that the head reads.

The operator and the set-wise view are SOLAR's (arXiv 2603.02561, Kuaishou, 2026), which published no code: block, head
and all sizes are inferred. The recent window is our addition: interests do not keep the order of events.
The letters are those of models/interface.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from models.attention_tower import EncodedItems, HistoryTower, RecentAttention
from models.candidate_sets import CandidateSets, gather_rows, start_as_similarity
from models.interest_checkpoints import checkpoint_interests, history_sums, joined_interests, stored_interests
from models.interface import HistorySums, ModelInput
from models.repeats import WINDOWS
from models.request_blocks import RequestBlocks
from models.set_attention import SetAttention
from models.svd_attention import Interests, SvdAttention
from models.tower_settings import SolarConfig


class Solar(HistoryTower):
    """The tower. `num_features` is F, the number of item features of the tables."""

    def __init__(self, config: SolarConfig, *, num_features: int) -> None:
        super().__init__(config, num_features=num_features)
        self.config = config
        self.blocks: Any = nn.ModuleList(SolarBlock(config) for _ in range(config.num_layers))

    def queries(self, item_ID: Tensor) -> Tensor:
        return self.blocks[0].queries(item_ID)

    def found(
        self,
        items: EncodedItems,
        *,
        history: History,
        query_shift_MD: Tensor | None,
        inputs: ModelInput,
        candidates: CandidateSets,
    ) -> Tensor:
        # The first block reads items, not candidates: their queries are computed once per distinct item.
        query_MD = gather_rows(items.query_ID, inputs.candidate_item_M)
        if query_shift_MD is not None:
            query_MD = query_MD + query_shift_MD
        found_MD = self.blocks[0](query_MD, history=history, candidates=candidates)
        if len(self.blocks) == 1 and not self.blocks[0].refines:
            return found_MD
        item_MD = gather_rows(items.item_ID, inputs.candidate_item_M)
        state_MD = self.blocks[0].refined(item_MD + found_MD, candidates=candidates)
        for block in self.blocks[1:]:
            found_MD = block(block.queries(state_MD), history=history, candidates=candidates)
            state_MD = block.refined(state_MD + found_MD, candidates=candidates)
        return state_MD - item_MD

    @property
    def scores_sets(self) -> bool:
        return self.config.set_attention

    @property
    def kept_events(self) -> int | None:
        """Enough for the recent window and for the events since the checkpoint, plus one event to compute the time gap
        before the first of them; with `repeats`, also enough for their largest window."""
        if not self.config.interests:
            return None
        kept = max(self.config.recent_window, self.config.checkpoint_every) + 1
        return max(kept, *WINDOWS) if self.repeats is not None else kept

    @torch.no_grad()
    def history_sums(self, inputs: ModelInput) -> HistorySums:
        """The sums that a stored history has for the events that are not kept."""
        event_ND = self.events(self.items(inputs.item_IC, inputs.features_IFC), inputs)
        return history_sums(event_ND, inputs=inputs, **self._how())

    @torch.no_grad()
    def interests(self, inputs: ModelInput) -> tuple[Interests, Tensor]:
        """The spectrum of real histories: interests at the checkpoints in use, and checkpoint_B.

        `singular_KR[k] ** 2 / energy_K[k]` is each component's share of the energy of history k.
        """
        item_ID = self.items(inputs.item_IC, inputs.features_IFC)
        history = self.histories(item_ID, inputs)
        if history.interests is None:
            raise ValueError("interests = false: this model has no spectrum; switch interests on")
        assert history.checkpoint_B is not None
        return history.interests, history.checkpoint_B

    def histories(self, item_ID: Tensor, inputs: ModelInput) -> History:
        config, event_ND = self.config, self.events(item_ID, inputs)
        if not config.interests:
            return History(event_ND=event_ND, inputs=inputs, interests=None, checkpoint_B=None)
        position_B, stored = inputs.request_position_B, inputs.stored
        if stored is not None:
            # The given events of a stored request are not its complete history: its interests are computed below.
            position_B = position_B.index_fill(0, stored.request_S, 0)
        interests, checkpoint_B = checkpoint_interests(
            event_ND,
            event_offsets_U1=inputs.event_offsets_U1,
            request_user_B=inputs.request_user_B,
            request_position_B=position_B,
            **self._how(),
        )
        if stored is not None:
            place_S = interests.energy_K.numel() + torch.arange(stored.request_S.numel())
            checkpoint_B = checkpoint_B.index_copy(0, stored.request_S, place_S)
            interests = joined_interests([interests, stored_interests(event_ND, inputs=inputs, **self._how())])
        return History(event_ND=event_ND, inputs=inputs, interests=interests, checkpoint_B=checkpoint_B)

    def _how(self) -> dict[str, Any]:
        config = self.config
        return {"every": config.checkpoint_every, "how": config.decomposition, "half_life": config.half_life}


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """All histories of a batch, in the form that the blocks read."""

    event_ND: Tensor
    """[N, D] normalised event vectors."""
    inputs: ModelInput
    """Which events belong to which request."""
    interests: Interests | None
    """Interests at the checkpoints in use; None if interests are switched off."""
    checkpoint_B: Tensor | None
    """[B] row of `interests` for each request; row 0 is the empty history. None if `interests` is None."""


class SolarBlock(nn.Module):
    """Attention to the history (`forward`), then attention within the set and a feed-forward network (`refined`)."""

    def __init__(self, config: SolarConfig) -> None:
        super().__init__()
        width, heads, self.checkpoint_every = config.width, config.num_heads, config.checkpoint_every
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.lifelong = SvdAttention(width, num_heads=heads, form=config.form) if config.interests else None
        self.recent = RecentAttention(config) if config.recent_window else None
        self.output = nn.Linear(width, width, bias=False)
        start_as_similarity(self.query, self.output)
        self.set_norm = nn.LayerNorm(width) if config.set_attention else None
        self.set = (
            SetAttention(width, num_heads=heads, rank=config.rank, exact_up_to=config.set_attention_exact_up_to)
            if config.set_attention
            else None
        )
        self.ffn_norm = nn.LayerNorm(width) if config.ffn_multiple else None
        self.ffn = (
            nn.Sequential(
                nn.Linear(width, config.ffn_multiple * width), nn.ReLU(), nn.Linear(config.ffn_multiple * width, width)
            )
            if config.ffn_multiple
            else None
        )

    def queries(self, state_XD: Tensor) -> Tensor:
        """query_XD: what each item or candidate asks of a history."""
        return self.query(self.norm(state_XD))

    def forward(self, query_MD: Tensor, *, history: History, candidates: CandidateSets) -> Tensor:
        """found_MD: what the candidates find in the interests and in the recent events."""
        found = []
        if self.lifelong is not None and history.interests is not None and history.checkpoint_B is not None:
            # Requests between two checkpoints read the same interests; those of stored histories have their own.
            span = self.checkpoint_every if history.inputs.stored is None else 1
            found.append(
                self.lifelong(
                    query_MD,
                    interests=history.interests,
                    checkpoint_B=history.checkpoint_B,
                    candidates=candidates,
                    blocks=RequestBlocks.of(history.inputs, span=span, candidates=candidates),
                )
            )
        if self.recent is not None:
            found.append(self.recent(query_MD, event_ND=history.event_ND, inputs=history.inputs, candidates=candidates))
        return self.output(found[0] if len(found) == 1 else found[0] + found[1])

    @property
    def refines(self) -> bool:
        """Whether `refined` changes states."""
        return self.set is not None or self.ffn is not None

    def refined(self, state_MD: Tensor, *, candidates: CandidateSets) -> Tensor:
        """state_MD after attention to the other candidates of the set and the feed-forward network."""
        if self.set is not None and self.set_norm is not None:
            state_MD = state_MD + self.set(self.set_norm(state_MD), candidates=candidates)
        if self.ffn is not None and self.ffn_norm is not None:
            state_MD = state_MD + self.ffn(self.ffn_norm(state_MD))
        return state_MD
