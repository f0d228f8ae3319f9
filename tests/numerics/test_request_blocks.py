"""Requests that share their keys get the scores and gradients of requests that are computed one by one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import request_blocks
from models.candidate_sets import CandidateSets
from models.head_attention import attend_in_heads, bucket_scores
from models.interface import ModelInput
from models.request_blocks import RequestBlocks
from models.solar import Solar
from tests.support.model_inputs import BASE, NUM_FEATURES, random_inputs, randomise

LENGTHS = (0, 45, 30)


def dense_requests(lengths: tuple[int, ...], skipped: set[int]) -> tuple[tuple[int, int], ...]:
    """A request at each position of each user, apart from the `skipped` ones of all requests."""
    every = [(user, position) for user, length in enumerate(lengths) for position in range(length + 1)]
    return tuple(request for place, request in enumerate(every) if place not in skipped)


def scores_and_gradients(tower: torch.nn.Module, inputs: ModelInput) -> list[torch.Tensor | None]:
    rows = inputs.item_IC.detach().double().requires_grad_()
    inputs = dataclasses.replace(
        inputs,
        item_IC=rows,
        features_IFC=inputs.features_IFC.double(),
        user_features_UGC=inputs.user_features_UGC.double(),
    )
    tower.zero_grad()
    logits_M = tower(inputs)
    weight_M = torch.linspace(-1, 1, logits_M.numel())
    (logits_M * weight_M).sum().backward()
    return [logits_M, rows.grad, *(parameter.grad for parameter in tower.parameters())]


@settings(max_examples=25, deadline=None)
@given(
    skipped=st.sets(st.integers(0, sum(LENGTHS) + len(LENGTHS) - 1), max_size=50),
    size=st.sampled_from([1, 3]),
    every=st.sampled_from([1, 5, 8]),
    window=st.sampled_from([0, 8, 60]),
    layers=st.sampled_from([1, 2]),
    time_features=st.booleans(),
    form=st.sampled_from(["softmax", "bilinear", "gaussian"]),
    seed=st.integers(0, 99),
)
def test_blocks_of_requests_change_neither_scores_nor_gradients(
    skipped, size, every, window, layers, time_features, form, seed
) -> None:
    requests = dense_requests(LENGTHS, skipped)
    inputs = random_inputs(lengths=LENGTHS, requests=requests, sizes=(size,) * len(requests), seed=seed)
    config = dataclasses.replace(
        BASE, checkpoint_every=every, recent_window=window, num_layers=layers, time_features=time_features, form=form,
        dropout=0.0,
    )  # fmt: skip
    tower = randomise(Solar(config, num_features=NUM_FEATURES)).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request_blocks, "LEAST_FILLED", 2.0)
        one_by_one = scores_and_gradients(tower, inputs)
        # Blocks also where most places of a block are empty.
        patch.setattr(request_blocks, "LEAST_FILLED", 0.0)
        by_block = scores_and_gradients(tower, inputs)
    for one, other in zip(one_by_one, by_block, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            # Float64 in another order of sums; the gradient of a decomposition amplifies rounding.
            torch.testing.assert_close(other.double(), one.double(), rtol=1e-6, atol=1e-6)


def blocks_of(positions: list[int], *, sizes: list[int], span: int) -> RequestBlocks | None:
    requests = tuple((0, position) for position in positions)
    inputs = random_inputs(lengths=(200,), requests=requests, sizes=tuple(sizes))
    sets = CandidateSets.from_offsets(inputs.candidate_offsets_B1, device=torch.device("cpu"))
    return RequestBlocks.of(inputs, span=span, candidates=sets)


def test_blocks_are_used_where_neighbours_share_keys_and_sets_have_one_size() -> None:
    near, far = list(range(40)), list(range(0, 200, 10))
    assert blocks_of(near, sizes=[2] * 40, span=8) is not None
    assert blocks_of(near, sizes=[2] * 39 + [3], span=8) is None
    assert blocks_of(near, sizes=[0] * 40, span=8) is None
    assert blocks_of(near, sizes=[2] * 40, span=1) is None
    assert blocks_of(far, sizes=[2] * 20, span=8) is None
    # One full block would pad all others to its size.
    assert blocks_of([*far, *range(101, 108)], sizes=[2] * 27, span=8) is None


def test_every_request_has_one_place_and_comes_back_from_it() -> None:
    blocks = blocks_of([*range(13), 64, 65, 65, 66, 70], sizes=[2] * 18, span=8)
    assert blocks is not None
    assert torch.equal(blocks.request_GP.flatten()[blocks.place_B], torch.arange(18))
    assert blocks.first_G.tolist() == [0, 8, 64]
    value_MD = torch.randn(36, 4)
    assert torch.equal(blocks.collect(blocks.spread(value_MD)), value_MD)


@pytest.mark.parametrize("bias_heads", [1, 2])
def test_attention_in_heads_has_the_gradient_of_its_formula(bias_heads: int) -> None:
    torch.manual_seed(1)
    query_GXD, key_GSD, value_GSD = torch.randn(3, 6, 4), torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    bias_GPHS = torch.randn(3, 2, bias_heads, 5)
    sides = [side.double().requires_grad_() for side in (query_GXD, key_GSD, value_GSD, bias_GPHS)]

    def attend(query, key, value, bias):
        return attend_in_heads(query, key_GSD=key, value_GSD=value, bias_GPHS=bias, num_heads=2)

    def plain(query, key, value, bias):
        rows = bias.expand(3, 2, 2, 5).repeat_interleave(3, 1)
        heads = [slice(0, 2), slice(2, 4)]
        weights = [torch.softmax(query[..., h] @ key[..., h].mT + rows[:, :, i], -1) for i, h in enumerate(heads)]
        return torch.cat([weight @ value[..., h] for weight, h in zip(weights, heads, strict=True)], -1)

    torch.testing.assert_close(attend(*sides), plain(*sides))
    torch.autograd.gradcheck(attend, sides)


def test_bucket_scores_are_a_look_up_with_its_gradient() -> None:
    score_GH = torch.randn(7, 2).double().requires_grad_()
    bucket_GPL = torch.randint(0, 7, (3, 2, 5))
    assert torch.equal(bucket_scores(score_GH, bucket_GPL), score_GH[bucket_GPL].permute(0, 1, 3, 2))
    torch.autograd.gradcheck(lambda score: bucket_scores(score, bucket_GPL), [score_GH])
