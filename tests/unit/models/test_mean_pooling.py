"""Mean pooling against a loop over requests."""

from __future__ import annotations

import math

import pytest
import torch

from models.mean_pooling import MeanPooling, MeanPoolingConfig, history_mean
from tests.support.model_inputs import NUM_FEATURES, WIDTH, empty_inputs, gradients, random_inputs, randomise


def build(dtype: torch.dtype = torch.float64) -> MeanPooling:
    torch.manual_seed(0)
    model = randomise(MeanPooling(MeanPoolingConfig(width=WIDTH), num_features=NUM_FEATURES)).to(dtype).eval()
    assert isinstance(model, MeanPooling)
    return model


def test_logits_equal_a_loop_over_requests() -> None:
    model, inputs = build(), random_inputs()
    rows_IC = torch.cat([inputs.item_IC[:, None], inputs.features_IFC], 1).flatten(1).double()
    item_IC = model.norm(model.item(rows_IC))
    assert model.popularity is not None
    expected = []
    for b, (user, position) in enumerate(zip(inputs.request_user_B, inputs.request_position_B, strict=True)):
        start = int(inputs.event_offsets_U1[user])
        history = item_IC[inputs.event_item_N[start : start + int(position)]]
        user_C = model.user(history.mean(0) if len(history) else torch.zeros(WIDTH).double())
        first, stop = inputs.candidate_offsets_B1[b : b + 2].tolist()
        candidates = item_IC[inputs.candidate_item_M[first:stop]]
        expected.append(candidates @ user_C / math.sqrt(WIDTH) + model.popularity(candidates).squeeze(-1))
    # Float32 logits of a float64 model.
    torch.testing.assert_close(model(inputs), torch.cat(expected).float(), rtol=1e-6, atol=1e-6)


def test_mean_of_a_short_history_behind_a_long_one_keeps_its_digits() -> None:
    inputs = random_inputs(lengths=(50_000, 2), requests=((1, 2),), sizes=(1,))
    item_IC = inputs.item_IC.detach() + 100
    expected = item_IC[inputs.event_item_N[-2:]].mean(0, keepdim=True)
    # The running sum reaches 5e6; float64 leaves 1e-9 of it, float32 rounding of the result is what remains.
    torch.testing.assert_close(history_mean(item_IC, inputs), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_batch_returns_empty_logits_with_a_gradient_for_every_parameter(dtype: torch.dtype) -> None:
    model, inputs = build(dtype), empty_inputs()
    logits_M = model(inputs)
    assert logits_M.shape == (0,)
    assert logits_M.dtype == torch.float32
    logits_M.sum().backward()
    assert all(gradient is not None and (gradient == 0).all() for gradient in gradients(model).values())


def test_config_refuses_what_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="width = 0 must be at least 1"):
        MeanPoolingConfig(width=0)
    with pytest.raises(ValueError, match="dropout = 1 must be at least 0 and below 1"):
        MeanPoolingConfig(dropout=1)
