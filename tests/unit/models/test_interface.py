"""What a tower is never asked: refused at the edge of the batch, in one line with the value, the rule and the fix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from models.interface import ModelInput, refuse_bad_rows
from tests.support.model_inputs import empty_inputs, random_inputs


def checked(inputs: ModelInput) -> ModelInput:
    """As training and evaluation check: the rows once a look-up, the layout of every input."""
    refuse_bad_rows(inputs.item_IC, inputs.features_IFC)
    return inputs.refuse_bad_layout()


def test_right_inputs_pass() -> None:
    for inputs in (random_inputs(), empty_inputs(), random_inputs(sizes=(0,) * 6)):
        assert checked(inputs) is inputs


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[ModelInput], ModelInput]:
    return lambda inputs: dataclasses.replace(inputs, **{name: change(getattr(inputs, name).detach().clone())})


def put(place: int, value: float) -> Callable[[Any], Any]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[place] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (changed("event_offsets_U1", put(-1, 69)), "event_offsets end at 69 of 70 events"),
        (changed("event_offsets_U1", put(1, 9)), "event_offsets end at .*: they must rise to the number of events"),
        (changed("candidate_offsets_B1", put(-1, 22)), "candidate_offsets end at 22 of 21 candidates"),
        (changed("request_user_B", put(0, 3)), "request_user runs from 3 to 3: it must rise"),
        (changed("request_user_B", put(-1, 4)), "runs from 0 to 4: it must rise within 4 users"),
        (changed("request_position_B", put(0, 1)), r"request_position \[1\] is outside its user's events"),
        (changed("request_position_B", put(2, -1)), r"request_position \[-1\] is outside"),
        (changed("item_IC", lambda rows: rows.double()), "item rows are torch.float64, feature rows torch.float32"),
        (changed("item_IC", put(4, float("nan"))), r"item row \[4\] of the batch is not finite: training diverged"),
        (changed("features_IFC", put(2, float("inf"))), r"feature row \[2\] of the batch is not finite"),
        (changed("event_time_N", put(9, 5)), r"event \[9\] is earlier than the one before it: sort a user's events"),
        (changed("request_time_B", put(3, 5)), r"request \[3\] is earlier than the last event of its history"),
    ],
)
def test_mistakes_are_refused_in_one_line(mistake: Callable[[ModelInput], ModelInput], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        checked(mistake(random_inputs()))
    assert "\n" not in str(refusal.value)
