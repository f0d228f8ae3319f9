"""Linear attention over the whole history: another way to O(events), which gives up the softmax.

    linear   O = phi(Q) (sum_n phi(k_n) v_n^T) / (phi(Q) sum_n phi(k_n)),  phi = elu + 1
    linrec   O = elu(Q)/|elu(Q)| (sum_n (elu(k_n) / c) v_n^T),  c_d = sqrt(sum_n elu(k_n)_d^2)

`linear` is the cross attention of IFA (arXiv 2406.09742) with the feature map of linear transformers (arXiv
2006.16236); `linrec` normalises queries by row and keys by column (arXiv 2411.01537). The state of a history has
D/H x D/H numbers per head and is exact at every request (models/prefixes.py), so there are no checkpoints.
The letters are those of models/interface.py; K counts histories.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention_tower import AttentionTower
from models.candidate_sets import CandidateSets, Members, gather_rows, start_as_similarity
from models.interface import ModelInput
from models.prefixes import Prefixes
from models.tower_settings import LinearAttentionConfig

EPS = 1e-6


class LinearAttention(AttentionTower):
    """The tower. `num_features` is F, the number of item features of the tables."""

    def __init__(self, config: LinearAttentionConfig, *, num_features: int) -> None:
        super().__init__(config, num_features=num_features)
        self.config = config
        self.key_value = nn.Linear(config.width, 2 * config.width, bias=False)
        start_as_similarity(self.key_value)

    def read_history(
        self, query_MD: Tensor, *, event_ND: Tensor, inputs: ModelInput, candidates: CandidateSets
    ) -> Tensor:
        heads, head_width = self.config.num_heads, self.config.width // self.config.num_heads
        key_NHD, value_NHD = (
            side.unflatten(1, (heads, head_width)) for side in self.key_value(event_ND).chunk(2, dim=1)
        )
        # Sum the state of every history.
        prefixes = Prefixes.of_requests(
            inputs.event_offsets_U1, user_B=inputs.request_user_B, length_B=inputs.request_position_B
        )
        if self.config.form == "linear":
            key_NHD, query_MD = F.elu(key_NHD) + 1, F.elu(query_MD) + 1
            ones_NH1 = torch.ones_like(value_NHD[:, :, :1])
            sum_KHDX, _ = prefixes.outer_sums(key_NHD, torch.cat([value_NHD, ones_NH1], 2))
            state_KHDD, mass_KHD = sum_KHDX[..., :-1], sum_KHDX[..., -1]
        else:
            key_NHD = F.elu(key_NHD)
            query_MHD = F.elu(query_MD).unflatten(1, (heads, head_width))
            query_MD = (query_MHD / query_MHD.norm(dim=2, keepdim=True).clamp_min(EPS)).flatten(1)
            state_KHDD, _ = prefixes.outer_sums(key_NHD, value_NHD)
            square_KH1D, _ = prefixes.outer_sums(torch.ones_like(key_NHD[:, :, :1]), key_NHD**2)
            state_KHDD = state_KHDD / (square_KH1D.mT + EPS).sqrt()
            mass_KHD = torch.zeros_like(state_KHDD[..., 0])
        # Read it with the queries of the candidates.
        normalise = self.config.form == "linear"

        def compute(query_bTD: Tensor, _: Members, state_bX: Tensor, mass_bD: Tensor) -> Tensor:
            query_bHTD = query_bTD.unflatten(2, (heads, head_width)).transpose(1, 2)
            mixed = query_bHTD @ state_bX.unflatten(1, (heads, head_width, head_width))
            if normalise:
                mixed = mixed / (query_bHTD @ mass_bD.unflatten(1, (heads, head_width))[..., None] + EPS)
            return mixed.transpose(1, 2).flatten(2)

        # Row 0 is the empty history, which gives 0.
        place_B = prefixes.place_B.to(event_ND.device, non_blocking=True)
        state_BX, mass_BD = (
            gather_rows(F.pad(value.flatten(1), (0, 0, 1, 0)).to(query_MD.dtype), place_B)
            for value in (state_KHDD, mass_KHD)
        )
        return candidates.map(compute, query_MD, state_BX, mass_BD)
