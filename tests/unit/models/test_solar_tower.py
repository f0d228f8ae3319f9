"""SOLAR as a function: what it may depend on, what it must not, and that every part of it learns."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.solar import Solar, SolarConfig
from tests.support.model_inputs import BASE, LABELLED, NUM_FEATURES, WIDTH, random_inputs, randomise


def build(config: SolarConfig, dtype: torch.dtype = torch.float64) -> Solar:
    torch.manual_seed(0)
    model = randomise(Solar(config, num_features=NUM_FEATURES)).to(dtype).eval()
    assert isinstance(model, Solar)
    return model


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation returns, backward included."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_nothing_of_size_events_times_candidates_exists() -> None:
    config = dataclasses.replace(BASE, set_attention_exact_up_to=20, ffn_multiple=1, head_width=4)
    num_events, num_candidates = 3000, 3000
    inputs = random_inputs(lengths=(num_events, 5), requests=((0, num_events), (1, 5)), sizes=(num_candidates, 2))
    with LargestTensor() as seen:
        build(config)(inputs).sum().backward()
    # Largest allowed: 2 heads x candidates x 8 recent events, events x width, events x 32 waves of time.
    assert seen.largest <= 33 * max(num_events, num_candidates)
    assert seen.largest < num_events * num_candidates / 90


@pytest.mark.parametrize(
    "field",
    ["features_IFC", "user_features_UGC", "event_time_N", "event_action_N", "event_label_N", "request_time_B"],
)
def test_side_information_reaches_the_logits(field: str) -> None:
    model, inputs = build(LABELLED), random_inputs()
    value = getattr(inputs, field)
    changed = value.flip(0) if field not in ("event_action_N", "event_label_N") else (value + 1) % 3
    if field == "request_time_B":
        changed = value + 3_600_000
    assert not torch.allclose(model(dataclasses.replace(inputs, **{field: changed})), model(inputs))


def test_time_and_actions_are_ignored_when_switched_off() -> None:
    model, inputs = build(dataclasses.replace(BASE, time_features=False, num_actions=1)), random_inputs()
    zeros = torch.zeros_like(inputs.event_time_N)
    blind = dataclasses.replace(
        inputs, event_time_N=zeros, event_action_N=zeros, request_time_B=torch.zeros_like(inputs.request_time_B)
    )
    assert torch.equal(model(blind), model(inputs))


def test_labels_are_ignored_when_switched_off_and_change_no_other_weight() -> None:
    model, inputs = build(BASE), random_inputs()
    none = torch.zeros_like(inputs.event_label_N)
    assert torch.equal(model(dataclasses.replace(inputs, event_label_N=none)), model(inputs))
    encoders = []
    for config in (BASE, LABELLED):
        torch.manual_seed(7)
        encoders.append(Solar(config, num_features=NUM_FEATURES).events.state_dict())
    without, weights = encoders
    label = weights.pop("label.weight")
    assert label.shape == (3, WIDTH)
    assert 0.05 < label.std() < 0.2
    assert without.keys() == weights.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in without.items())


def test_spectrum_shares_sum_to_one_at_full_rank() -> None:
    model, inputs = build(dataclasses.replace(BASE, rank=WIDTH)), random_inputs()
    interests, checkpoint_B = model.interests(inputs)
    assert checkpoint_B.tolist() == [0, 1, 0, 3, 2, 4]
    share = interests.singular_KR.square().sum(1)[1:] / interests.energy_K[1:]
    # What the mask drops is below 1e-14 of the energy.
    torch.testing.assert_close(share, torch.ones_like(share), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 17}, "rank = 17 must not exceed width = 16"),
        ({"num_heads": 3}, "width = 16 must be a multiple of num_heads = 3"),
        ({"num_layers": 3}, "num_layers = 3 must be 1 or 2"),
        ({"num_layers": 0}, "num_layers = 0 must be 1 or 2"),
        ({"rank": 0}, "rank = 0 must be at least 1"),
        ({"checkpoint_every": 9}, "recent_window = 8 must be at least checkpoint_every = 9"),
        ({"dropout": 1.0}, "dropout = 1.0 must be at least 0 and below 1"),
        ({"ffn_multiple": -1}, "ffn_multiple = -1 must not be negative"),
        ({"initial_agreement": -1.0}, "initial_agreement = -1.0 must be a number of at least 0"),
        ({"interests": False, "recent_window": 0}, "leave no history"),
    ],
)
def test_config_refuses_in_one_line(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        dataclasses.replace(BASE, **change)
    assert "\n" not in str(refusal.value)
