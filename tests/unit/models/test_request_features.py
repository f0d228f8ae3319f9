"""What is known of a request: absent values are zero, and what is known tells candidates apart."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from models.history import WAVE_DAYS, time_waves
from models.interface import ModelInput
from models.request_features import RequestEncoder
from models.solar import Solar, SolarConfig
from tests.support.model_inputs import MS_PER_MINUTE, NUM_FEATURES, NUM_USER_FEATURES, WIDTH, random_inputs, randomise

HOUR, DAY = 60 * MS_PER_MINUTE, 24 * 60 * MS_PER_MINUTE
SMALL = SolarConfig(width=WIDTH, rank=4, recent_window=4, checkpoint_every=4, head_width=0, set_attention=False)


def at(times: list[int], inputs: ModelInput) -> ModelInput:
    return dataclasses.replace(inputs, request_time_B=torch.tensor(times))


def vectors(
    inputs: ModelInput, *, users: bool = True, context: bool = True, absolute_time: bool = False
) -> torch.Tensor:
    torch.manual_seed(0)
    num_user_features = NUM_USER_FEATURES if users else 0
    encoder = RequestEncoder(WIDTH, num_user_features=num_user_features, context=context, absolute_time=absolute_time)
    return encoder(inputs)


def test_the_hour_and_the_weekday_are_those_of_utc_and_a_request_without_a_time_has_none():
    inputs = random_inputs(lengths=(1, 1), requests=((0, 1),) * 4 + ((1, 1),) * 2, sizes=(1,) * 6)
    monday = 1_704_067_200_000
    times = [monday, monday + 59 * MS_PER_MINUTE, monday + HOUR, monday + 7 * DAY, monday + DAY, 0]
    found = vectors(at(times, inputs), users=False)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[3])
    for other in (2, 4):
        assert not torch.allclose(found[0], found[other], atol=1e-2)
    assert torch.equal(found[5], torch.zeros(WIDTH))


def test_absolute_time_tells_years_apart_and_a_request_without_a_time_has_none():
    inputs = random_inputs(lengths=(1,), requests=((0, 1),) * 3, sizes=(1,) * 3)
    now = 1_704_067_200_000
    # 2,912 days: a whole number of weeks, at the same hour.
    found = vectors(at([now, now + 2912 * DAY, 0], inputs), users=False, context=False, absolute_time=True)
    assert not torch.allclose(found[0], found[1], atol=1e-2)
    assert torch.equal(found[2], torch.zeros(WIDTH))


def test_waves_keep_their_digits_decades_after_1970():
    time_ms = 1_704_067_201_234
    found = time_waves(torch.tensor([0, time_ms]))
    waves = len(WAVE_DAYS)
    assert found[0].tolist() == [0.0] * waves + [1.0] * waves
    for w, days in enumerate(WAVE_DAYS):
        phase = 2 * math.pi * math.fmod(time_ms / DAY, days) / days
        # A phase below 2 pi in float32.
        assert found[1, w].item() == pytest.approx(math.sin(phase), abs=1e-6)
        assert found[1, waves + w].item() == pytest.approx(math.cos(phase), abs=1e-6)


def test_a_user_without_values_is_a_request_of_which_nothing_is_known():
    inputs = random_inputs()
    features_UGC = inputs.user_features_UGC.clone()
    features_UGC[2] = 0
    found = vectors(dataclasses.replace(inputs, user_features_UGC=features_UGC), context=False)
    assert torch.equal(found[inputs.request_user_B == 2], torch.zeros(2, WIDTH))
    # Requests 1 and 2 are of user 1: without a context they are the same.
    assert torch.equal(found[1], found[2])
    assert (found[[0, 1, 5]].square().sum(1) > 1).all()


@pytest.mark.parametrize("what", ["user", "context", "absolute time"])
def test_what_is_known_of_a_request_changes_the_ranking_and_not_only_all_scores_alike(what):
    waves = what == "absolute time"
    config = dataclasses.replace(
        SMALL, num_user_features=NUM_USER_FEATURES, context_features=not waves, absolute_time=waves
    )
    torch.manual_seed(0)
    model = randomise(Solar(config, num_features=NUM_FEATURES)).eval()
    inputs = random_inputs(lengths=(5,), requests=((0, 5),), sizes=(30,))
    # Many events ago: no bucket of the gap to an event tells these times apart.
    late = at([int(inputs.event_time_N[-1]) // DAY * DAY + 900 * DAY], inputs)
    changed = at([int(late.request_time_B[0]) + 5 * HOUR], late)
    if what == "user":
        changed = dataclasses.replace(late, user_features_UGC=late.user_features_UGC.flip(1))
    difference = model(changed) - model(late)
    assert difference.std() > 1e-2
    assert model(changed).argsort().tolist() != model(late).argsort().tolist()


def test_a_new_model_starts_as_one_without_request_features():
    inputs = random_inputs()
    torch.manual_seed(0)
    without = Solar(SMALL, num_features=NUM_FEATURES).eval()
    config = dataclasses.replace(SMALL, num_user_features=NUM_USER_FEATURES, context_features=True)
    model = Solar(config, num_features=NUM_FEATURES).eval()
    missing = model.load_state_dict(without.state_dict(), strict=False).missing_keys
    assert {name.split(".")[0] for name in missing} == {"request", "shift"}
    assert torch.equal(model(inputs), without(inputs))


def test_without_times_there_is_no_context():
    config = dataclasses.replace(SMALL, time_features=False, context_features=True)
    assert Solar(config, num_features=NUM_FEATURES).request is None
    assert Solar(dataclasses.replace(config, num_user_features=2), num_features=NUM_FEATURES).request is not None
