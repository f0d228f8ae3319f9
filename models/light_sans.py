"""Item-to-interest pooling: a history's R interests are learned mixtures of its events instead of singular vectors.

    A = softmax_n(X Theta)        P = A^T X        O = softmax(Q (P W_K)^T / tau) P W_V

LightSANs' low-rank decomposition of the sequence axis (SIGIR 2021), read by candidates like SOLAR's interests. It is
the learned analogue of U^T X: a comparison with it shows whether the decomposition is worth its cost. The softmax over
the events of growing prefixes is computed with two running sums (models/prefixes.py), exact at every request.
The letters are those of models/interface.py; K counts histories.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.attention_tower import AttentionTower
from models.candidate_sets import CandidateSets
from models.interface import ModelInput
from models.prefixes import Prefixes
from models.svd_attention import Interests, SvdAttention
from models.tower_settings import LightSansConfig


class LightSans(AttentionTower):
    """The tower. `num_features` is F, the number of item features of the tables."""

    def __init__(self, config: LightSansConfig, *, num_features: int) -> None:
        super().__init__(config, num_features=num_features)
        self.pool = nn.Linear(config.width, config.rank, bias=False)
        self.lifelong = SvdAttention(config.width, num_heads=config.num_heads)

    def read_history(
        self, query_MD: Tensor, *, event_ND: Tensor, inputs: ModelInput, candidates: CandidateSets
    ) -> Tensor:
        prefixes = Prefixes.of_requests(
            inputs.event_offsets_U1, user_B=inputs.request_user_B, length_B=inputs.request_position_B
        )
        interest_KRD = pooled(self.pool(event_ND), event_ND=event_ND, inputs=inputs, prefixes=prefixes)
        # Row 0 is the empty history.
        interest_KRD = torch.cat([interest_KRD.new_zeros(1, *interest_KRD.shape[1:]), interest_KRD])
        valid_KR = torch.ones(interest_KRD.shape[:2], dtype=torch.bool, device=event_ND.device)
        valid_KR[0] = False
        interests = Interests(
            interest_KRD=interest_KRD,
            valid_KR=valid_KR,
            singular_KR=interest_KRD.detach().norm(dim=2),
            energy_K=interest_KRD.detach().square().sum((1, 2)),
        )
        place_B = prefixes.place_B.to(event_ND.device, non_blocking=True)
        return self.lifelong(query_MD, interests=interests, checkpoint_B=place_B, candidates=candidates)


def pooled(score_NR: Tensor, *, event_ND: Tensor, inputs: ModelInput, prefixes: Prefixes) -> Tensor:
    """interest_KRD in float64: per prefix, the mean of its events weighted by the softmax of each column of scores.

    Scores are taken relative to the user's largest. If all scores of a prefix are 700 below it, float64 underflows.
    """
    score_NR = score_NR.double()
    length_U = inputs.event_offsets_U1.diff()
    user_N = torch.repeat_interleave(length_U).to(score_NR.device, non_blocking=True)
    peak_UR = score_NR.new_zeros(length_U.numel(), score_NR.shape[1])
    user_NR = user_N[:, None].expand_as(score_NR)
    peak_UR = peak_UR.scatter_reduce(0, user_NR, score_NR.detach(), "amax", include_self=False)
    weight_NR = (score_NR - peak_UR[user_N]).exp()
    ones_N1 = torch.ones_like(event_ND[:, :1])
    sum_KRX, _ = prefixes.outer_sums(weight_NR[:, None], torch.cat([event_ND, ones_N1], 1).double()[:, None])
    return sum_KRX[:, 0, :, :-1] / sum_KRX[:, 0, :, -1:].clamp_min(torch.finfo(torch.float64).tiny)
