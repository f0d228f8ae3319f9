"""A state against the batch form: whatever was done to it, it is what the remaining events give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.interest_checkpoints import checkpoint_interests
from models.lifelong_state import LifelongState, StateError
from models.svd_attention import Decomposition

WIDTH, HOW = 12, Decomposition(rank=4)


def events(count: int, *, seed: int) -> Tensor:
    # Layer-normalised vectors with a common direction, as event vectors are.
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.layer_norm(torch.randn(count, WIDTH, generator=generator).double() + 0.5, (WIDTH,))


def state_of(event_nD: Tensor, half_life: float = 0.0) -> LifelongState:
    return LifelongState.of_events(event_nD, digest="m1", half_life=half_life)


def assert_equal(found: LifelongState, expected: LifelongState, *, tolerance: float) -> None:
    scale = float(expected.gram_DD.norm()) or 1.0
    assert float((found.gram_DD - expected.gram_DD).norm()) <= tolerance * scale
    assert float((found.sum_D - expected.sum_D).norm()) <= tolerance * scale
    assert found.weight == pytest.approx(expected.weight, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("seed", range(3))
def test_ten_thousand_random_operations_leave_the_gram_of_the_remaining_events(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    stored, alive, state, reloads = events(40_000, seed=seed), [], LifelongState.empty(WIDTH, digest="m1"), 0
    # Some events are a thousand times larger, so that removing them leaves a small difference of large sums.
    stored = stored * torch.where(torch.rand(len(stored), 1, generator=generator) < 0.01, 1000.0, 1.0)
    used = 0

    def reload() -> Tensor:
        nonlocal reloads
        reloads += 1
        return stored[alive]

    for step in torch.randint(0, 10, (10_000,), generator=generator).tolist():
        count = 1 + int(torch.randint(0, 3, (1,), generator=generator))
        if step < 4:
            alive += range(used, used + count)
            state = state.add(stored[used : used + count])
            used += count
        elif step < 5:
            alive += range(used, used + count)
            state = state.merge(state_of(stored[used : used + count]))
            used += count
        elif alive:
            chosen = torch.randperm(len(alive), generator=generator)[:count].tolist()
            gone = [alive[place] for place in chosen]
            alive = [event for event in alive if event not in gone]
            state = state.remove(stored[gone], remaining=reload)
    assert 0 < reloads < 2_000
    # Asked for: 1e-5. Float64 sums with at most half of their mass removed lose far less.
    assert_equal(state, state_of(stored[alive]), tolerance=1e-9)


def test_decay_merge_and_removal_equal_the_weighted_batch() -> None:
    event_nD = events(90, seed=1)
    parts = state_of(event_nD[:50], half_life=20).merge(state_of(event_nD[50:], half_life=20), num_events=40)
    assert_equal(parts, state_of(event_nD, half_life=20), tolerance=1e-12)
    # Without event 70, whose age is 19, the others keep their weights.
    without = parts.remove(event_nD[70:71], age_n=torch.tensor([19]), remaining=lambda: event_nD)
    weight_n = torch.exp2(-torch.arange(89, -1, -1).double() / 20)
    weight_n[70] = 0
    assert (without.gram_DD - (event_nD.T * weight_n) @ event_nD).norm() < 1e-12 * without.gram_DD.norm()
    assert without.weight == pytest.approx(float(weight_n.sum()))


@pytest.mark.parametrize("half_life", [0.0, 15.0])
def test_interests_of_a_state_are_those_of_training(half_life: float) -> None:
    event_nD = events(64, seed=2)
    state = state_of(event_nD[:30], half_life).add(event_nD[30:31]).add(event_nD[31:])
    trained, _ = checkpoint_interests(
        event_nD,
        event_offsets_U1=torch.tensor([0, 64]),
        request_user_B=torch.tensor([0]),
        request_position_B=torch.tensor([64]),
        every=16,
        how=HOW,
        half_life=half_life,
    )
    torch.testing.assert_close(state.interests(HOW).interest_KRD[0], trained.interest_KRD[1], rtol=0, atol=1e-12)


def test_float16_interests_are_off_by_half_a_unit_in_the_last_place() -> None:
    state = state_of(events(500, seed=3))
    exact = state.interests(HOW).interest_KRD[0]
    served = state.serving_interests(HOW)
    assert served.dtype == torch.float16
    # Below 2^-14 float16 has fewer digits: an absolute error of 2^-25.
    assert ((served.double() - exact).abs() <= exact.abs() * 2**-11 + 2**-25).all()
    with pytest.raises(StateError, match="above float16's 65504"):
        state_of(events(3, seed=4) * 1e6).serving_interests(HOW)


def test_a_saved_state_is_the_same_and_belongs_to_its_model(tmp_path: Path) -> None:
    state, path = state_of(events(20, seed=5), half_life=7.0), tmp_path / "state.safetensors"
    state.save(path)
    loaded = LifelongState.load(path, digest="m1")
    assert torch.equal(loaded.gram_DD, state.gram_DD)
    assert torch.equal(loaded.sum_D, state.sum_D)
    assert (loaded.weight, loaded.mass, loaded.half_life) == (state.weight, state.mass, 7.0)
    with pytest.raises(StateError, match="state of model m1, not of m2"):
        LifelongState.load(path, digest="m2")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StateError, match="not a complete lifelong state"):
        LifelongState.load(path, digest="m1")


def test_mistakes_are_refused_and_change_nothing() -> None:
    state = state_of(events(5, seed=6))
    with pytest.raises(StateError, match=r"shape \[3, 4\] do not fit a state of width 12"):
        state.add(torch.zeros(3, 4))
    with pytest.raises(StateError, match="not finite"):
        state.add(torch.full((1, WIDTH), float("nan")))
    with pytest.raises(StateError, match="states of models m2 and m1 cannot be merged"):
        state.merge(LifelongState.empty(WIDTH, digest="m2"))
    with pytest.raises(StateError, match="cannot be merged"):
        state.merge(LifelongState.empty(WIDTH, digest="m1", half_life=3.0))
    decaying = state_of(events(5, seed=6), half_life=3.0)
    with pytest.raises(StateError, match="needs age_n"):
        decaying.remove(events(1, seed=7), remaining=lambda: events(4, seed=6))
    assert_equal(state, state_of(events(5, seed=6)), tolerance=0)


def test_a_user_without_events_has_no_interests() -> None:
    interests = LifelongState.empty(WIDTH, digest="m1").interests(HOW)
    assert not interests.valid_KR.any()
    assert (interests.interest_KRD == 0).all()
