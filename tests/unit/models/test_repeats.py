"""Repeats: what a history says of the candidate itself, counted exactly."""

from __future__ import annotations

import dataclasses

import torch

from models.candidate_sets import CandidateSets
from models.repeats import WINDOWS, RepeatScore, repeats
from tests.support.model_inputs import empty_inputs, random_inputs

MS_PER_HOUR = 3_600_000
WHOLE = (*WINDOWS, None)


def found_in(inputs, *, windows=WHOLE, time_features: bool = True) -> torch.Tensor:
    request_M = torch.repeat_interleave(inputs.candidate_offsets_B1.diff())
    return repeats(inputs, request_M=request_M, windows=windows, time_features=time_features)


def by_hand(inputs, *, windows=WHOLE) -> torch.Tensor:
    rows = []
    request_M = torch.repeat_interleave(inputs.candidate_offsets_B1.diff()).tolist()
    for b, item in zip(request_M, inputs.candidate_item_M.tolist(), strict=True):
        start, length = int(inputs.event_offsets_U1[inputs.request_user_B[b]]), int(inputs.request_position_B[b])
        history = inputs.event_item_N[start : start + length].tolist()
        history = history[-(windows[-1] or len(history)) :] if history else []
        row = [float(history[-(window or len(history)) :].count(item)) if history else 0.0 for window in windows]
        if item < inputs.num_reserved or item not in history:
            rows.append([0.0] * (len(windows) + 2))
            continue
        age = history[::-1].index(item)
        since = inputs.request_time_B[b] - inputs.event_time_N[start + length - 1 - age]
        rows.append([*row, float(age), float(since) / MS_PER_HOUR])
    return torch.tensor(rows).log1p()


def test_counts_and_ages_equal_those_by_hand():
    lengths = (0, 7, 400, 1500)
    inputs = random_inputs(
        lengths=lengths, requests=((0, 0), (1, 7), (2, 400), (2, 33), (3, 1500), (3, 0)), sizes=(30,) * 6
    )
    assert found_in(inputs)[:, 0].max() > 0
    torch.testing.assert_close(found_in(inputs), by_hand(inputs))
    torch.testing.assert_close(found_in(inputs, time_features=False), by_hand(inputs)[:, :-1])


def test_what_lies_before_the_latest_events_is_not_read():
    inputs = random_inputs(lengths=(0, 7, 400), requests=((0, 0), (1, 7), (2, 400), (2, 33)), sizes=(30,) * 4)
    cut = found_in(inputs, windows=(16, 50))
    assert not torch.equal(cut[:, -2:], found_in(inputs)[:, -2:])
    torch.testing.assert_close(cut, by_hand(inputs, windows=(16, 50)))
    assert RepeatScore(time_features=True, latest=50).windows == (16, 50)
    assert RepeatScore(time_features=True, latest=16).windows == (16,)


def test_unknown_items_are_no_repeats_of_each_other():
    inputs = dataclasses.replace(random_inputs(lengths=(0, 7, 400, 23)), num_reserved=10)
    assert (inputs.candidate_item_M < 10).any()
    assert (found_in(inputs) > 0).any()
    torch.testing.assert_close(found_in(inputs), by_hand(inputs))


def test_a_new_score_is_zero_and_learns():
    score = RepeatScore(time_features=True)
    inputs = random_inputs()
    candidates = CandidateSets.from_offsets(inputs.candidate_offsets_B1, device=torch.device("cpu"))
    found_M = score(inputs, candidates=candidates)
    assert (found_M == 0).all()
    found_M.sum().backward()
    assert score.last.weight.grad is not None
    assert (score.last.weight.grad != 0).any()


def test_nothing_to_score():
    assert found_in(empty_inputs()).shape == (0, len(WHOLE) + 2)
