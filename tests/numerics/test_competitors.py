"""What each competitor reads from a history against its formula, one request and one head at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.candidate_sets import CandidateSets
from models.din import Din, DinConfig
from models.interface import ModelInput
from models.light_sans import LightSans, LightSansConfig
from models.linear_attention import EPS, LinearAttention, LinearAttentionConfig
from tests.support.model_inputs import NUM_FEATURES, WIDTH, random_inputs, randomise

COMMON: dict[str, Any] = {"width": WIDTH, "num_heads": 2, "recent_window": 0, "num_actions": 3}
HEAD = WIDTH // 2


def check(model: Any, plain: Callable[[Tensor, Tensor, int], Tensor]) -> None:
    """`plain(query_TD, event_nD, head)` gives [T, D / H]; an empty history gives zero."""
    randomise(model).double().eval()
    inputs = random_inputs()
    event_ND = torch.randn(inputs.event_item_N.numel(), WIDTH, generator=torch.Generator().manual_seed(3)).double()
    query_MD = torch.randn(inputs.candidate_item_M.numel(), WIDTH, generator=torch.Generator().manual_seed(4)).double()
    event_ND.requires_grad_()
    sets = CandidateSets.from_offsets(inputs.candidate_offsets_B1, device=torch.device("cpu"))
    found_MD = model.read_history(query_MD, event_ND=event_ND, inputs=inputs, candidates=sets)
    expected_MD = _one_by_one(inputs, query_MD, event_ND, plain)
    # The same sums in float64 in another order, through one exponential.
    torch.testing.assert_close(found_MD, expected_MD, rtol=1e-8, atol=1e-10)
    weight_MD = torch.randn(found_MD.shape, generator=torch.Generator().manual_seed(5)).double()
    (found,) = torch.autograd.grad((found_MD * weight_MD).sum(), event_ND)
    (expected,) = torch.autograd.grad((expected_MD * weight_MD).sum(), event_ND)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def _one_by_one(inputs: ModelInput, query_MD: Tensor, event_ND: Tensor, plain: Any) -> Tensor:
    outputs = []
    for b, (user, position) in enumerate(zip(inputs.request_user_B, inputs.request_position_B, strict=True)):
        start = int(inputs.event_offsets_U1[user])
        first, stop = inputs.candidate_offsets_B1[b : b + 2].tolist()
        query_TD, event_nD = query_MD[first:stop], event_ND[start : start + int(position)]
        empty = query_TD[:, :HEAD] * 0
        outputs.append(torch.cat([plain(query_TD, event_nD, h) if position else empty for h in range(2)], 1))
    return torch.cat(outputs)


def of_head(value: Tensor, head: int) -> Tensor:
    return value.chunk(2, dim=1)[head]


@pytest.mark.parametrize("decay", [True, False])
def test_din_is_softmax_over_every_event_with_a_decay(decay: bool) -> None:
    model = Din(DinConfig(**COMMON, decay=decay), num_features=NUM_FEATURES)

    def plain(query_TD: Tensor, event_nD: Tensor, head: int) -> Tensor:
        key, value = (of_head(side, head) for side in model.key_value(event_nD).chunk(2, dim=1))
        score_Tn = of_head(query_TD, head) @ key.T / math.sqrt(HEAD)
        if decay:
            score_Tn = score_Tn - model.log_slope_H[head].exp() * torch.arange(len(event_nD) - 1, -1, -1)
        return torch.softmax(score_Tn, 1) @ value

    check(model, plain)


def test_linear_attention_is_the_normalised_kernel() -> None:
    model = LinearAttention(LinearAttentionConfig(**COMMON), num_features=NUM_FEATURES)

    def plain(query_TD: Tensor, event_nD: Tensor, head: int) -> Tensor:
        key, value = (of_head(side, head) for side in model.key_value(event_nD).chunk(2, dim=1))
        weight_Tn = (F.elu(of_head(query_TD, head)) + 1) @ (F.elu(key) + 1).T
        return weight_Tn @ value / (weight_Tn.sum(1, keepdim=True) + EPS)

    check(model, plain)


def test_linrec_normalises_queries_by_row_and_keys_by_column() -> None:
    model = LinearAttention(LinearAttentionConfig(**COMMON, form="linrec"), num_features=NUM_FEATURES)

    def plain(query_TD: Tensor, event_nD: Tensor, head: int) -> Tensor:
        key, value = (of_head(side, head) for side in model.key_value(event_nD).chunk(2, dim=1))
        key = F.elu(key) / (F.elu(key).square().sum(0) + EPS).sqrt()
        return F.normalize(F.elu(of_head(query_TD, head)), dim=1, eps=EPS) @ (key.T @ value)

    check(model, plain)


def test_learned_pooling_attends_to_mixtures_of_events() -> None:
    model = LightSans(LightSansConfig(**COMMON, rank=5), num_features=NUM_FEATURES)

    def plain(query_TD: Tensor, event_nD: Tensor, head: int) -> Tensor:
        interest_RD = torch.softmax(model.pool(event_nD), 0).T @ event_nD
        key, value = of_head(model.lifelong.key(interest_RD), head), of_head(model.lifelong.value(interest_RD), head)
        scale = model.lifelong.log_temperature_H[head].exp() / math.sqrt(HEAD)
        return torch.softmax(of_head(query_TD, head) @ key.T * scale, 1) @ value

    check(model, plain)


def test_pooling_survives_scores_far_apart() -> None:
    model = LightSans(LightSansConfig(**COMMON, rank=5), num_features=NUM_FEATURES).double()
    inputs = random_inputs()
    event_ND = torch.randn(inputs.event_item_N.numel(), WIDTH).double()
    event_ND[20:] *= 100
    sets = CandidateSets.from_offsets(inputs.candidate_offsets_B1, device=torch.device("cpu"))
    query_MD = torch.randn(inputs.candidate_item_M.numel(), WIDTH).double()
    assert torch.isfinite(model.read_history(query_MD, event_ND=event_ND, inputs=inputs, candidates=sets)).all()
