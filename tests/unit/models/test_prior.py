"""Counters by day, the user's own counts and the prior, against computations event by event."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import numpy as np
import pytest
import torch

from models.interface import DECAY_EVENTS
from models.item_counters import MS_PER_DAY, ItemCounters
from models.own_counts import label_counts, own_counts
from models.prior import BARRED, WINDOW_DAYS, Prior, PriorAlone, PriorModel
from models.solar import Solar
from tests.support.model_inputs import (
    BASE,
    FIRST_ROW,
    NUM_FEATURES,
    NUM_ITEMS,
    empty_inputs,
    on_meta,
    random_inputs,
    randomise,
)

FIRST_DAY, NUM_DAYS = 19_600, 1000
NUM_ROWS = NUM_ITEMS + FIRST_ROW


def random_log(*, rows=range(FIRST_ROW, NUM_ROWS - 5), events=4000, seed=1) -> list[tuple[int, int, int]]:
    """(row, time in ms, label) of events within NUM_DAYS."""
    rng = np.random.default_rng(seed)
    time = rng.integers(FIRST_DAY * MS_PER_DAY, (FIRST_DAY + NUM_DAYS) * MS_PER_DAY, events)
    return list(zip(rng.choice(list(rows), events), time, rng.integers(0, 2, events), strict=True))


def counted(log, *, day_ms: int = MS_PER_DAY, num_rows: int = NUM_ROWS, training: int = 9) -> ItemCounters:
    found: dict[tuple[int, int], list[int]] = {}
    for row, time, label in log:
        cell = found.setdefault((int(row), int(time) // day_ms), [0, 0])
        cell[0] += 1
        cell[1] += int(label)
    pairs = sorted(found)
    columns = torch.tensor([[*pair, *found[pair]] for pair in pairs], dtype=torch.int64).reshape(-1, 4)
    row, day, events, positives = columns.unbind(1)
    return ItemCounters(
        row_K=row, day_K=day, events_K=events, positives_K=positives,
        training_R=torch.full((num_rows,), training), day_ms=day_ms,
    )  # fmt: skip


@pytest.mark.parametrize("day_ms", [MS_PER_DAY, 1])
def test_counters_are_those_of_the_events_before_the_day(day_ms: int) -> None:
    log = random_log(events=500)
    counters = counted(log, day_ms=day_ms)
    rng = np.random.default_rng(2)
    rows = torch.from_numpy(rng.integers(0, NUM_ROWS, 60))
    times = torch.from_numpy(rng.integers(FIRST_DAY * MS_PER_DAY, (FIRST_DAY + NUM_DAYS) * MS_PER_DAY, 60))
    day = counters.days(times)
    events, positives = counters.before(rows, day)
    within = counters.events_within(rows, day, WINDOW_DAYS)
    for x, (row, time) in enumerate(zip(rows.tolist(), times.tolist(), strict=True)):
        before = [(t, label) for r, t, label in log if r == row and t // day_ms < time // day_ms]
        assert (int(events[x]), int(positives[x])) == (len(before), sum(label for _, label in before))
        for w, days in enumerate(WINDOW_DAYS):
            first = -math.inf if days is None else time // day_ms - days * MS_PER_DAY // day_ms
            assert int(within[x, w]) == sum(t // day_ms >= first for t, _ in before)


def test_the_day_of_an_event_does_not_count_and_times_outside_are_read_at_the_ends() -> None:
    noon = FIRST_DAY * MS_PER_DAY + MS_PER_DAY // 2
    counters = counted([(5, noon, 1), (5, noon + MS_PER_DAY, 0), (6, noon, 0)])
    times = torch.tensor([noon - 9 * MS_PER_DAY, noon + 1, noon + MS_PER_DAY, noon + 99 * MS_PER_DAY])
    row = torch.full((4,), 5)
    events, positives = counters.before(row, counters.days(times))
    assert events.tolist() == [0, 0, 1, 2]
    assert positives.tolist() == [0, 0, 1, 1]
    # Later than the last day that is known: read as the day after it, so that windows do not run empty.
    assert counters.events_within(row, counters.days(times), (7,)).flatten().tolist() == [0, 0, 1, 2]
    # A row that the counters do not know, because the catalogue grew.
    assert counters.before(torch.tensor([NUM_ROWS + 7]), torch.tensor([1]))[0].tolist() == [0]


def test_counters_are_the_same_after_they_were_stored() -> None:
    counters = counted(random_log(events=300))
    again = ItemCounters.from_tensors(counters.tensors(), training_R=counters.training_R)
    for name, buffer in counters.named_buffers():
        assert torch.equal(buffer, getattr(again, name)), name
    assert again.first_day == counters.first_day


def test_counters_of_an_empty_log() -> None:
    counters = counted([])
    assert counters.before(torch.tensor([4]), counters.days(torch.tensor([5])))[0].tolist() == [0]
    assert torch.equal(
        ItemCounters.from_tensors(counters.tensors(), training_R=counters.training_R).key_K, counters.key_K
    )


def test_own_counts_are_those_of_a_loop_over_the_history() -> None:
    inputs = random_inputs(
        lengths=(0, 7, 400, 23),
        sizes=(20, 20, 20, 20, 20, 20),
        requests=((0, 0), (1, 7), (1, 0), (2, 400), (2, 333), (3, 5)),
    )
    request_M = torch.repeat_interleave(inputs.candidate_offsets_B1.diff())
    own_M, age_M, seen_M = own_counts(inputs, request_M=request_M)
    for m, b in enumerate(request_M.tolist()):
        start = int(inputs.event_offsets_U1[inputs.request_user_B[b]])
        length = int(inputs.request_position_B[b])
        places = [k for k in range(length) if inputs.event_item_N[start + k] == inputs.candidate_item_M[m]]
        assert bool(seen_M[m]) == bool(places)
        wanted = sum((2.0 ** (-(length - 1 - k) / DECAY_EVENTS) for k in places), 0.0)
        torch.testing.assert_close(own_M[m].item(), wanted, rtol=1e-6, atol=0)
        assert age_M[m] == (length - 1 - places[-1] if places else 0)


def test_own_counts_of_a_hundred_thousand_events_lose_nothing_to_age() -> None:
    """An early request of a long history: a difference of two cumulated sums would have lost it."""
    length = 100_000
    inputs = random_inputs(lengths=(length,), requests=((0, 3), (0, length)), sizes=(1, 1))
    item_N = torch.zeros(length, dtype=torch.int64)
    item_N[[0, 2, length - 1]] = 4
    inputs = dataclasses.replace(inputs, event_item_N=item_N, candidate_item_M=torch.tensor([4, 4]))
    own_M, age_M, _ = own_counts(inputs, request_M=torch.tensor([0, 1]))
    torch.testing.assert_close(own_M, torch.tensor([2 ** (-2 / DECAY_EVENTS) + 1, 1.0]))
    assert age_M.tolist() == [0, 0]


def test_labels_are_counted_in_the_history_alone() -> None:
    inputs = random_inputs()
    known_B, positive_B = label_counts(inputs)
    for b, (user, position) in enumerate(zip(inputs.request_user_B, inputs.request_position_B, strict=True)):
        start = int(inputs.event_offsets_U1[user])
        labels = inputs.event_label_N[start : start + int(position)]
        assert (int(known_B[b]), int(positive_B[b])) == (int((labels > 0).sum()), int((labels == 2).sum()))


def with_prior(task: str = "next_item", *, seed: int = 0) -> PriorModel:
    torch.manual_seed(seed)
    tower = Solar(dataclasses.replace(BASE, prior=True), num_features=NUM_FEATURES)
    prior = Prior(task)  # type: ignore[arg-type]
    for parameter in prior.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    return PriorModel(tower, prior, counted(random_log())).eval()


@pytest.mark.parametrize("task", ["next_item", "impressions"])
def test_an_untrained_model_is_its_prior(task: str) -> None:
    model, inputs = with_prior(task), random_inputs()
    torch.testing.assert_close(model(inputs), PriorAlone(model)(inputs), rtol=0, atol=0)


def test_what_is_learned_adds_nothing_to_an_empty_history() -> None:
    model, inputs = with_prior(), random_inputs()
    # Without features of the request: those may say something without a history.
    config = dataclasses.replace(BASE, prior=True, user_features=False, context_features=False, absolute_time=False)
    model.tower = randomise(Solar(config, num_features=NUM_FEATURES)).eval()
    added_M = (model(inputs) - PriorAlone(model)(inputs)).detach()
    request_M = torch.repeat_interleave(inputs.candidate_offsets_B1.diff())
    is_empty_M = (inputs.request_position_B == 0)[request_M]
    torch.testing.assert_close(added_M[is_empty_M], torch.zeros(int(is_empty_M.sum())), rtol=0, atol=1e-5)
    assert added_M[~is_empty_M].abs().max() > 0.01


def test_an_untrained_row_is_its_features() -> None:
    model, inputs = with_prior(), random_inputs()
    none = torch.zeros_like(model.counters.training_R)
    model.counters.training_R = none
    other = dataclasses.replace(inputs, item_IC=torch.randn_like(inputs.item_IC))
    model.tower = randomise(model.tower).eval()
    torch.testing.assert_close(model(inputs), model(other), rtol=0, atol=0)
    model.counters.training_R = none + 100
    assert not torch.allclose(model(inputs), model(other))


def test_an_item_that_nothing_knows_is_barred_in_evaluation_alone() -> None:
    model, inputs = with_prior(), random_inputs()
    features = model.prior.features(inputs, model.counters)
    unknown_M = features["unknown"]
    assert 0 < int(unknown_M.sum()) < len(unknown_M)
    in_evaluation = PriorAlone(model).eval()(inputs)
    in_training = PriorAlone(model).train()(inputs)
    torch.testing.assert_close(in_evaluation - in_training, BARRED * unknown_M.float(), rtol=1e-5, atol=1e-5)


def test_rates_are_shrunk_towards_the_mean() -> None:
    counters = counted([(FIRST_ROW, FIRST_DAY * MS_PER_DAY, 1)] * 4 + [(FIRST_ROW + 1, FIRST_DAY * MS_PER_DAY, 0)] * 6)
    inputs = dataclasses.replace(
        random_inputs(lengths=(3,), requests=((0, 3),), sizes=(3,)),
        candidate_item_M=torch.tensor([0, 1, 2]),
        event_label_N=torch.tensor([2, 2, 0]),
    )
    prior = Prior("impressions")
    prior.mean_1.data.fill_(5 / 12)
    rates = prior.features(inputs, counters)["rates"]
    mean, odds = 5 / 12, lambda rate: math.log(rate / (1 - rate))
    wanted = [odds((4 + 8 * mean) / 12) - odds(mean), odds(8 * mean / 14) - odds(mean), 0.0]
    torch.testing.assert_close(rates[:, 0].tolist(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rates[:, 1].tolist(), [odds((2 + 5 * mean) / 7) - odds(mean)] * 3, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("task", ["next_item", "impressions"])
def test_a_rank_without_work_runs_the_prior_with_a_gradient(task: str) -> None:
    model = with_prior(task).train()
    model(empty_inputs()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.prior.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("task", ["next_item", "impressions"])
def test_nothing_is_read_back_from_the_device(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    model = with_prior(task).to("meta")
    logits_M = model(on_meta(random_inputs()))
    assert logits_M.device.type == "meta"
