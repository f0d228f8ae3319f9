"""The operator against torch.linalg.svd in float64: values, lemma, oracle, invariances, fast form = reference."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.candidate_sets import CandidateSets
from models.interest_checkpoints import checkpoint_interests, reference_checkpoint_interests
from models.svd_attention import (
    Decomposition,
    Interests,
    SvdAttention,
    interests_from_gram,
    reference_interests,
    reference_svd_attention,
)
from models.tower_settings import Form

WIDTH, RANK = 8, 4
FORMS: list[Form] = ["softmax", "bilinear", "gaussian"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_history(num_events: int, *, rank: int = WIDTH, seed: int = 0) -> Tensor:
    """Events of a given rank whose singular values are well apart (ratio 1.5)."""
    left = torch.randn(num_events, rank, generator=seeded(seed), dtype=torch.float64)
    right = torch.randn(rank, WIDTH, generator=seeded(seed + 1), dtype=torch.float64)
    scale = 1.5 ** -torch.arange(rank, dtype=torch.float64)
    return torch.linalg.qr(left)[0][:, :rank] * scale @ torch.linalg.qr(right.T)[0].T * math.sqrt(num_events)


def interests_of(history_ND: Tensor, *, rank: int = RANK, with_mean: bool = False) -> Interests:
    """Gram form of one history."""
    return interests_from_gram(
        (history_ND.T @ history_ND)[None],
        sum_KD=history_ND.sum(0, keepdim=True),
        weight_K=torch.tensor([history_ND.shape[0]], dtype=history_ND.dtype),
        how=Decomposition(rank=rank, with_mean=with_mean),
    )


@pytest.mark.parametrize("num_events", [1, 2, 3, 8, 40, 1000])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_interests_equal_the_singular_value_decomposition(num_events: int, rank: int) -> None:
    history_ND = torch.randn(num_events, WIDTH, generator=seeded(num_events), dtype=torch.float64)
    found = interests_of(history_ND, rank=rank)
    # Float64 rounding 1e-16, times (s_1 / s_i)^2 of a random matrix, which is below 1e4 here.
    torch.testing.assert_close(found.interest_KRD[0], reference_interests(history_ND, rank=rank), rtol=0, atol=1e-11)
    assert found.valid_KR[0].sum() == min(num_events, rank)
    torch.testing.assert_close(found.energy_K[0], history_ND.square().sum())
    expected = torch.linalg.svdvals(history_ND)[:rank]
    torch.testing.assert_close(found.singular_KR[0, : expected.numel()], expected)


def test_float32_gram_keeps_the_strong_components() -> None:
    history_ND = random_history(10_000)
    found = interests_of(history_ND.float(), rank=WIDTH)
    expected = reference_interests(history_ND, rank=WIDTH)
    strong = found.singular_KR[0] >= 0.1 * found.singular_KR[0, 0]
    error = (found.interest_KRD[0] - expected).norm(dim=1) / expected.norm(dim=1)
    # A float32 Gram loses (s_1 / s_i)^2 times 6e-8, times a gap factor of about 2: 1e-5 at 0.1, with a margin of 5.
    assert strong.sum() >= 5
    assert error[strong].max() < 5e-5


def test_lemma_bilinear_attention_over_interests_loses_nothing_of_a_low_rank_history() -> None:
    history_ND = random_history(200, rank=RANK)
    key_DD, value_DD, query_MD = torch.randn(3, WIDTH, WIDTH, generator=seeded(3), dtype=torch.float64).unbind(0)
    interest_RD = interests_of(history_ND).interest_KRD[0] * math.sqrt(200)
    full = query_MD @ (history_ND @ key_DD).T @ (history_ND @ value_DD)
    compact = query_MD @ (interest_RD @ key_DD).T @ (interest_RD @ value_DD)
    # Both are the same sum in another order: rounding alone.
    torch.testing.assert_close(compact, full, rtol=1e-9, atol=1e-9)


def test_lemma_truncation_error_stays_below_the_next_singular_value_squared() -> None:
    history_ND = random_history(200)
    key_DD, value_DD = torch.randn(2, WIDTH, WIDTH, generator=seeded(3), dtype=torch.float64).unbind(0)
    interest_RD = interests_of(history_ND).interest_KRD[0] * math.sqrt(200)
    error = (history_ND @ key_DD).T @ (history_ND @ value_DD) - (interest_RD @ key_DD).T @ (interest_RD @ value_DD)
    next_singular = torch.linalg.svdvals(history_ND)[RANK]
    bound = torch.linalg.matrix_norm(key_DD, 2) * torch.linalg.matrix_norm(value_DD, 2) * next_singular**2
    assert 0 < torch.linalg.matrix_norm(error, 2) <= bound


def test_oracle_softmax_over_events_is_recovered_from_the_interests_of_a_low_rank_history() -> None:
    history_ND = random_history(60, rank=RANK)
    key_DD, value_DD, query_MD = torch.randn(3, WIDTH, WIDTH, generator=seeded(4), dtype=torch.float64).unbind(0)
    interest_RD = interests_of(history_ND).interest_KRD[0] * math.sqrt(60)
    left_NR = history_ND @ interest_RD.T / interest_RD.square().sum(1)
    full = torch.softmax(query_MD @ (history_ND @ key_DD).T, -1) @ (history_ND @ value_DD)
    oracle = torch.softmax(query_MD @ (interest_RD @ key_DD).T @ left_NR.T, -1) @ left_NR @ (interest_RD @ value_DD)
    # Scores reach about 100, where softmax turns a rounding of 1e-14 into 1e-12.
    torch.testing.assert_close(oracle, full, rtol=1e-9, atol=1e-10)


def test_softmax_over_interests_is_not_softmax_over_events() -> None:
    history_ND = random_history(60, rank=RANK)
    interest_RD = reference_interests(history_ND, rank=RANK)
    query_MD, eye = torch.randn(5, WIDTH, generator=seeded(4), dtype=torch.float64), torch.eye(WIDTH).double()
    over_interests = reference_svd_attention(
        query_MD, interest_RD=interest_RD, key_DD=eye, value_DD=eye, temperature_H=torch.ones(1).double()
    )
    over_events = torch.softmax(query_MD @ history_ND.T / math.sqrt(WIDTH), -1) @ history_ND
    assert (over_interests - over_events).norm() > 0.1 * over_events.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_order_of_events_does_not_matter(dtype: torch.dtype) -> None:
    history_ND = random_history(500).to(dtype)
    shuffled_ND = history_ND[torch.randperm(500, generator=seeded(1))]
    gram, shuffled_gram = history_ND.T @ history_ND, shuffled_ND.T @ shuffled_ND
    # What papers promise of every Gram, whatever its dtype.
    assert (gram - shuffled_gram).norm() <= 1e-6 * gram.norm()
    if dtype == torch.float64:
        found, again = interests_of(history_ND), interests_of(shuffled_ND)
        # Rounding of the Gram times (s_1 / s_4)^2 = 11 and a gap factor.
        torch.testing.assert_close(again.interest_KRD, found.interest_KRD, rtol=0, atol=1e-12)


def test_sign_points_along_the_sum_of_events() -> None:
    for seed in range(20):
        history_ND = random_history(30, seed=seed) + 0.1
        assert (interests_of(history_ND).interest_KRD[0] @ history_ND.sum(0) >= 0).all()


def test_seeing_every_event_twice_changes_nothing() -> None:
    history_ND = random_history(30)
    found, twice = interests_of(history_ND), interests_of(history_ND.repeat(2, 1))
    torch.testing.assert_close(twice.interest_KRD, found.interest_KRD, rtol=0, atol=1e-13)


def test_rank_deficient_history_masks_what_does_not_exist() -> None:
    found = interests_of(random_history(50, rank=2))
    assert found.valid_KR.tolist() == [[True, True, False, False]]
    assert (found.interest_KRD[0, 2:] == 0).all()
    in_float32 = interests_of(random_history(50, rank=2).float())
    assert in_float32.valid_KR.tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("scale", [1e-100, 1e-30, 1.0, 1e30, 1e100])
def test_interests_scale_with_the_events(scale: float) -> None:
    history_ND = random_history(50)
    found = interests_of(history_ND * scale)
    torch.testing.assert_close(found.interest_KRD / scale, interests_of(history_ND).interest_KRD, rtol=0, atol=1e-12)


def test_empty_history_gives_no_interest_and_zero_output() -> None:
    offsets_U1 = torch.tensor([0, 0, 3])
    interests, checkpoint_B = checkpoint_interests(
        torch.randn(3, WIDTH, generator=seeded(0)),
        event_offsets_U1=offsets_U1,
        request_user_B=torch.tensor([0, 1, 1]),
        request_position_B=torch.tensor([0, 1, 2]),
        how=Decomposition(rank=RANK),
        every=2,
    )
    assert checkpoint_B.tolist() == [0, 0, 1]
    assert not interests.valid_KR[0].any()
    attention = SvdAttention(WIDTH, num_heads=2)
    sets = CandidateSets.from_offsets(torch.tensor([0, 2, 4, 6]), device=torch.device("cpu"))
    query_MD = torch.randn(6, WIDTH, generator=seeded(1))
    output_MD = attention(query_MD, interests=interests, checkpoint_B=checkpoint_B, candidates=sets)
    assert (output_MD[:4] == 0).all()
    assert (output_MD[4:] != 0).any()


def test_only_checkpoints_in_use_are_decomposed() -> None:
    interests, checkpoint_B = checkpoint_interests(
        torch.randn(1000, WIDTH, generator=seeded(0)),
        event_offsets_U1=torch.tensor([0, 1000]),
        request_user_B=torch.zeros(3, dtype=torch.long),
        request_position_B=torch.tensor([995, 999, 1000]),
        how=Decomposition(rank=RANK),
        every=10,
    )
    assert interests.interest_KRD.shape[0] == 3  # The empty history, 990 events, 1,000 events.
    assert checkpoint_B.tolist() == [1, 1, 2]


@st.composite
def jagged_requests(draw: st.DrawFn) -> dict[str, Any]:
    """Users with 0 to 30 events, each with 0 to 5 requests at any positions in any order."""
    lengths = draw(st.lists(st.integers(0, 30), min_size=0, max_size=5))
    positions = [draw(st.lists(st.integers(0, length), max_size=5)) for length in lengths]
    seed = draw(st.integers(0, 1000))
    users = [user for user, chosen in enumerate(positions) for _ in chosen]
    return {
        "event_ND": torch.randn(sum(lengths), WIDTH, generator=seeded(seed), dtype=torch.float64) + 0.3,
        "event_offsets_U1": torch.tensor([0, *lengths]).cumsum(0),
        "request_user_B": torch.tensor(users, dtype=torch.long),
        "request_position_B": torch.tensor([p for chosen in positions for p in chosen], dtype=torch.long),
        "rank": draw(st.integers(1, WIDTH)),
        "every": draw(st.integers(1, 7)),
        "half_life": draw(st.sampled_from([0.0, 3.0])),
    }


@settings(max_examples=80, deadline=None)
@given(jagged_requests())
def test_fast_checkpoints_equal_the_reference_with_their_gradient(case: dict) -> None:
    event_ND = case.pop("event_ND").requires_grad_()
    expected_BRD = reference_checkpoint_interests(event_ND, **case)
    rank = case.pop("rank")
    interests, checkpoint_B = checkpoint_interests(event_ND, **case, how=Decomposition(rank=rank, gradient="exact"))
    found_BRD = interests.interest_KRD[checkpoint_B]
    # Float64 rounding, amplified by (s_1 / s_i)^2 of short random histories: up to 1e6.
    torch.testing.assert_close(found_BRD, expected_BRD, rtol=0, atol=1e-8)

    # The reference's gradient does not exist where components are missing or close: compare the Grams' of all others.
    weight_BDD = torch.randn(*found_BRD.shape[:1], WIDTH, WIDTH, generator=seeded(1), dtype=torch.float64)
    if found_BRD.numel() and rank == WIDTH:
        found = (found_BRD.mT @ found_BRD * weight_BDD).sum()
        (found_grad,) = torch.autograd.grad(found, event_ND, retain_graph=True)
        (expected_grad,) = torch.autograd.grad(_gram_over_count(event_ND, **case, weight_BDD=weight_BDD), event_ND)
        # P^T P of all components is the Gram over N, which has an exact gradient for every history; near-equal and
        # nearly missing components lose digits on the way through the eigenvectors.
        torch.testing.assert_close(found_grad, expected_grad, rtol=1e-5, atol=1e-6)


def _gram_over_count(event_ND: Tensor, *, weight_BDD: Tensor, **case) -> Tensor:
    total = event_ND.sum() * 0
    for b, (user, position) in enumerate(zip(case["request_user_B"], case["request_position_B"], strict=True)):
        start = int(case["event_offsets_U1"][user])
        history = event_ND[start : start + int(position) // case["every"] * case["every"]]
        if history.shape[0]:
            age_N = torch.arange(history.shape[0] - 1, -1, -1)
            weight_N = 2.0 ** (-age_N / case["half_life"]) if case["half_life"] else torch.ones(history.shape[0])
            gram = history.T * weight_N.double() @ history
            total = total + (gram / weight_N.double().sum() * weight_BDD[b]).sum()
    return total


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_heads", [1, 2, 4])
@pytest.mark.parametrize("half_life", [0.0, 7.0])
def test_attention_module_equals_the_reference_with_its_gradient(num_heads: int, form: Form, half_life: float) -> None:
    torch.manual_seed(0)
    lengths, sizes = [5, 0, 40], [3, 1, 6]
    offsets_U1, candidate_offsets_B1 = torch.tensor([0, *lengths]).cumsum(0), torch.tensor([0, *sizes]).cumsum(0)
    event_ND = (torch.randn(sum(lengths), WIDTH).double() + 0.5).requires_grad_()
    query_MD = torch.randn(sum(sizes), WIDTH).double().requires_grad_()
    attention = SvdAttention(WIDTH, num_heads=num_heads, form=form).double()
    positions = torch.tensor(lengths)
    interests, checkpoint_B = checkpoint_interests(
        event_ND,
        event_offsets_U1=offsets_U1,
        request_user_B=torch.arange(3),
        request_position_B=positions,
        how=Decomposition(rank=RANK, gradient="exact", with_mean=form == "gaussian"),
        every=5,
        half_life=half_life,
    )
    sets = CandidateSets.from_offsets(candidate_offsets_B1, device=torch.device("cpu"))
    found_MD = attention(query_MD, interests=interests, checkpoint_B=checkpoint_B, candidates=sets)
    expected_MD = torch.cat(
        [
            reference_svd_attention(
                query,
                interest_RD=reference_interests(history, rank=RANK, half_life=half_life),
                key_DD=attention.key.weight.T,
                value_DD=attention.value.weight.T,
                temperature_H=attention.log_temperature_H.exp(),
                form=form,
                mean_D=weighted_mean(history, half_life=half_life),
            )
            for query, history in zip(query_MD.split(sizes), event_ND.split(lengths), strict=True)
        ]
    )
    # Float64 rounding through a decomposition whose components differ by less than a factor of 10.
    torch.testing.assert_close(found_MD, expected_MD, rtol=1e-9, atol=1e-11)
    leaves = [event_ND, query_MD, *attention.parameters()]
    weight_MD = torch.randn_like(found_MD)
    found = torch.autograd.grad((found_MD * weight_MD).sum(), leaves)
    expected = torch.autograd.grad((expected_MD * weight_MD).sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def weighted_mean(history_ND: Tensor, *, half_life: float) -> Tensor:
    """mean_D, weighed by age; 0 of no events."""
    age_N = torch.arange(history_ND.shape[0] - 1, -1, -1, dtype=torch.float64)
    weight_N = 2.0 ** (-age_N / half_life) if half_life else torch.ones_like(age_N)
    return weight_N @ history_ND / weight_N.sum().clamp_min(1.0)


@pytest.mark.parametrize("form", FORMS)
def test_only_softmax_reads_a_meaning_into_signs(form: Form) -> None:
    torch.manual_seed(0)
    attention, query_MD = SvdAttention(WIDTH, num_heads=2, form=form).double(), torch.randn(3, WIDTH).double()
    interests = interests_of(random_history(40) + 0.3, with_mean=True)
    signs = torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    flipped = dataclasses.replace(interests, interest_KRD=interests.interest_KRD * signs[:, None])
    sets = CandidateSets.from_offsets(torch.tensor([0, 3]), device=torch.device("cpu"))
    options = {"checkpoint_B": torch.zeros(1, dtype=torch.long), "candidates": sets}
    found, other = (attention(query_MD, interests=each, **options) for each in (interests, flipped))
    if form == "softmax":
        assert (found - other).abs().max() > 0.1
    else:
        # (-q k) (-v) = (q k) v: the same products in the same order.
        assert torch.equal(found, other)


def test_gaussian_form_is_softmax_attention_over_normally_distributed_events() -> None:
    generator = seeded(5)
    mix_DD = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) / math.sqrt(WIDTH)
    mean_D = torch.randn(WIDTH, generator=generator, dtype=torch.float64)
    event_ND = mean_D + torch.randn(400_000, WIDTH, generator=generator, dtype=torch.float64) @ mix_DD
    key_DD, value_DD = (torch.randn(2, WIDTH, WIDTH, generator=generator, dtype=torch.float64) / 3).unbind(0)
    query_MD = torch.randn(20, WIDTH, generator=generator, dtype=torch.float64)
    weight_MN = torch.softmax(query_MD @ (event_ND @ key_DD).T / math.sqrt(WIDTH), -1)
    over_events = weight_MN @ (event_ND @ value_DD)
    found = reference_svd_attention(
        query_MD,
        interest_RD=reference_interests(event_ND, rank=WIDTH),
        key_DD=key_DD,
        value_DD=value_DD,
        temperature_H=torch.ones(1, dtype=torch.float64),
        form="gaussian",
        mean_D=event_ND.mean(0),
    )
    # The sampling error of 400,000 events, of which some weigh a few times as much as others.
    assert (found - over_events).norm() < 0.02 * over_events.norm()
    # What is measured is the effect of the query, not the mean that every query gets.
    assert (over_events - mean_D @ value_DD).norm() > 0.2 * over_events.norm()


def test_other_users_change_nothing() -> None:
    event_ND = torch.randn(40, WIDTH, generator=seeded(0))
    requests = {"request_user_B": torch.tensor([0, 1]), "request_position_B": torch.tensor([18, 20])}
    options = {"event_offsets_U1": torch.tensor([0, 20, 40]), "how": Decomposition(rank=RANK), "every": 3, **requests}
    before, _ = checkpoint_interests(event_ND, **options)
    changed_ND = torch.cat([event_ND[:20], event_ND[20:] * 1e6])
    after, _ = checkpoint_interests(changed_ND, **options)
    # Sums never run across users, so not even rounding differs.
    assert torch.equal(before.interest_KRD[1], after.interest_KRD[1])


def test_events_after_the_checkpoint_change_nothing() -> None:
    event_ND = torch.randn(20, WIDTH, generator=seeded(0))
    options = {
        "event_offsets_U1": torch.tensor([0, 20]),
        "request_user_B": torch.zeros(2, dtype=torch.long),
        "request_position_B": torch.tensor([10, 20]),
        "how": Decomposition(rank=RANK),
        "every": 4,
    }
    before, checkpoint_B = checkpoint_interests(event_ND, **options)
    changed_ND = torch.cat([event_ND[:8], torch.randn(12, WIDTH, generator=seeded(1))])
    after, _ = checkpoint_interests(changed_ND, **options)
    assert torch.equal(before.interest_KRD[checkpoint_B[0]], after.interest_KRD[checkpoint_B[0]])
    assert not torch.equal(before.interest_KRD[checkpoint_B[1]], after.interest_KRD[checkpoint_B[1]])


def test_bfloat16_events_are_decomposed_in_float64_even_under_autocast() -> None:
    event_ND = torch.randn(20, WIDTH, generator=seeded(0)).bfloat16()
    options = {
        "event_offsets_U1": torch.tensor([0, 20]),
        "request_user_B": torch.zeros(1, dtype=torch.long),
        "request_position_B": torch.tensor([20]),
        "how": Decomposition(rank=RANK),
        "every": 4,
    }
    with torch.autocast("cpu", dtype=torch.bfloat16):
        interests, _ = checkpoint_interests(event_ND, **options)
    assert interests.interest_KRD.dtype == torch.float64
    expected = reference_interests(event_ND, rank=RANK)
    torch.testing.assert_close(interests.interest_KRD[1], expected, rtol=0, atol=1e-11)
