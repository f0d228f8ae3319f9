"""A stored history with what came since scores as the whole history does."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from models.interface import DECAY_EVENTS, ModelInput, StoredHistories
from models.solar import Solar
from tests.support.model_inputs import BASE, NUM_FEATURES, random_inputs, randomise

EVENTS = 1503
"""Longer than the longest window in which repeats are counted."""


def cut(inputs: ModelInput, length: int, tower: Solar) -> ModelInput:
    """The same requests, whose first user's events before `length` are stored, but for those that are kept."""
    kept = tower.kept_events
    assert kept is not None
    assert length > kept
    first = length - kept
    earlier = dataclasses.replace(inputs, request_position_B=torch.tensor([length, *inputs.request_position_B[1:]]))
    sums = tower.history_sums(earlier)
    items, inverse = torch.unique(inputs.event_item_N[:first], return_inverse=True)
    older_label, age = inputs.event_label_N[:first], length - 1 - torch.arange(first)
    place_E = torch.zeros_like(items).scatter_reduce(0, inverse, torch.arange(first), "amax")
    offsets = inputs.event_offsets_U1.clone()
    offsets[1:] -= first
    position_B = inputs.request_position_B.clone()
    position_B[0] -= first
    return dataclasses.replace(
        inputs,
        event_offsets_U1=offsets,
        event_item_N=inputs.event_item_N[first:],
        event_time_N=inputs.event_time_N[first:],
        event_action_N=inputs.event_action_N[first:],
        event_label_N=inputs.event_label_N[first:],
        request_position_B=position_B,
        stored=StoredHistories(
            request_S=torch.tensor([0]),
            length_S=torch.tensor([length]),
            kept_S=torch.tensor([kept]),
            interest_SRD=sums.interest_BRD[:1].float(),
            gram_SDD=sums.gram_BDD[:1].float(),
            sum_SD=sums.sum_BD[:1].float(),
            older_offsets_S1=torch.tensor([0, len(items)]),
            older_item_E=items,
            older_count_E=torch.bincount(inverse),
            older_place_E=place_E,
            older_time_E=inputs.event_time_N[place_E],
            older_label_E=torch.bincount(inverse, older_label == 2, minlength=len(items)).long(),
            older_decayed_E=torch.bincount(inverse, 0.5 ** (age / DECAY_EVENTS), minlength=len(items)).float(),
            known_labels_S=(older_label > 0).sum()[None],
            positive_labels_S=(older_label == 2).sum()[None],
        ),
    )


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"half_life": 300.0},
        {"repeats": False, "set_attention": False},
        {"recent_window": 0, "repeats": False},
        {"num_layers": 2},
        {"history_labels": True},
        {"form": "bilinear"},
        {"form": "gaussian"},
        {"form": "gaussian", "half_life": 300.0, "num_layers": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [EVENTS, EVENTS - 2, EVENTS - 77])
def test_scores_are_those_of_the_whole_history(change: dict[str, Any], length):
    """With nothing since, with less than a checkpoint since, and with many checkpoints since; beside other requests."""
    torch.manual_seed(1)
    config = dataclasses.replace(BASE, **change)
    tower = randomise(Solar(config, num_features=NUM_FEATURES)).eval()
    assert isinstance(tower, Solar)
    inputs = random_inputs(
        lengths=(EVENTS, 0, 40), requests=((0, EVENTS), (1, 0), (2, 40), (2, 33)), sizes=(20, 3, 0, 9)
    )
    with torch.no_grad():
        whole, stored = tower(inputs), tower(cut(inputs, length, tower))
    assert whole.abs().max() > 0.5
    # Measured: 3e-5 of logits up to 38 (the Gram is kept in float32); interests in float16 would be off by up to 9e-3.
    assert (whole - stored).abs().max() < 1e-3
    assert torch.equal(whole[20:], stored[20:])


def test_what_is_not_stored_would_be_missed():
    tower = randomise(Solar(BASE, num_features=NUM_FEATURES)).eval()
    assert isinstance(tower, Solar)
    inputs = random_inputs(lengths=(EVENTS,), requests=((0, EVENTS),), sizes=(20,))
    short = cut(inputs, EVENTS - 77, tower)
    assert short.stored is not None
    with torch.no_grad():
        whole = tower(inputs)
        for missed in (
            dataclasses.replace(short.stored, gram_SDD=0.5 * short.stored.gram_SDD),
            dataclasses.replace(short.stored, older_count_E=0 * short.stored.older_count_E),
            dataclasses.replace(short.stored, sum_SD=-short.stored.sum_SD),
        ):
            assert (tower(dataclasses.replace(short, stored=missed)) - whole).abs().max() > 1e-2
