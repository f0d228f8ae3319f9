"""The gradient of the operator: exact where it exists, finite everywhere."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.interest_checkpoints import checkpoint_interests
from models.svd_attention import Decomposition, interests_from_gram, reference_interests


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def interests_of(history_ND: Tensor, *, rank: int, gradient: Literal["stable", "exact", "stop"]) -> Tensor:
    """interest_RD of one history through the fast form."""
    count = history_ND.shape[0]
    interests, _ = checkpoint_interests(
        history_ND,
        event_offsets_U1=torch.tensor([0, count]),
        request_user_B=torch.zeros(1, dtype=torch.long),
        request_position_B=torch.tensor([count]),
        how=Decomposition(rank=rank, gradient=gradient),
        every=count,
    )
    return interests.interest_KRD[1]


@pytest.mark.parametrize(("num_events", "width", "rank"), [(12, 5, 5), (12, 5, 3), (3, 5, 3), (3, 5, 5), (1, 4, 2)])
def test_exact_gradient_passes_gradcheck(num_events: int, width: int, rank: int) -> None:
    history_ND = torch.randn(num_events, width, generator=seeded(0), dtype=torch.float64, requires_grad=True)
    # Finite differences of step 1e-6 in float64 leave about 1e-8 of error, times curvature near small gaps.
    assert torch.autograd.gradcheck(
        lambda x: interests_of(x, rank=rank, gradient="exact"), (history_ND,), eps=1e-6, atol=1e-5, rtol=1e-4
    )


def test_exact_gradient_equals_that_of_the_singular_value_decomposition() -> None:
    history_ND = torch.randn(30, 6, generator=seeded(1), dtype=torch.float64, requires_grad=True)
    weight_RD = torch.randn(4, 6, generator=seeded(2), dtype=torch.float64)
    (found,) = torch.autograd.grad((interests_of(history_ND, rank=4, gradient="exact") * weight_RD).sum(), history_ND)
    (expected,) = torch.autograd.grad((reference_interests(history_ND, rank=4) * weight_RD).sum(), history_ND)
    # Rounding of float64 over relative gaps of 0.1 between eigenvalues.
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("rank", "least_cosine"), [(8, 0.999), (16, 0.99), (32, 0.92)])
def test_stable_gradient_points_along_the_exact_one(rank: int, least_cosine: float) -> None:
    scale = torch.arange(1, 65, dtype=torch.float64) ** -0.5
    history_ND = torch.randn(1000, 64, generator=seeded(3), dtype=torch.float64) * scale
    history_ND.requires_grad_()
    weight_RD = torch.randn(rank, 64, generator=seeded(4), dtype=torch.float64)
    gradients = [
        torch.autograd.grad((interests_of(history_ND, rank=rank, gradient=gradient) * weight_RD).sum(), history_ND)[0]
        for gradient in ("stable", "exact")
    ]
    # Measured on such spectra: 1.000, 0.998, 0.946; damping acts where eigenvalues lie within 0.1 % of each other.
    assert torch.cosine_similarity(gradients[0].flatten(), gradients[1].flatten(), dim=0) > least_cosine


HARD_HISTORIES = {
    "one event": torch.ones(1, 6),
    "zero events": torch.zeros(4, 6),
    "repeated event": torch.arange(6.0).expand(9, 6),
    "equal singular values": torch.eye(6),
    "opposite events, sum zero": torch.cat([torch.eye(6), -torch.eye(6)]),
    "rank one and noise": torch.arange(6.0).expand(9, 6) + 1e-7 * torch.randn(9, 6, generator=seeded(0)),
    "three events": torch.randn(3, 6, generator=seeded(1)),
    "two equal columns": torch.randn(9, 1, generator=seeded(2)).expand(9, 6),
    "nearly equal singular values": torch.eye(6) * (1 + 1e-7 * torch.arange(6.0)),
}


@pytest.mark.parametrize("event_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1.0, 1e6, 1e15])
@pytest.mark.parametrize("name", HARD_HISTORIES)
def test_value_and_gradient_stay_finite(name: str, scale: float, event_dtype: torch.dtype) -> None:
    history_ND = (HARD_HISTORIES[name] * scale).to(event_dtype).requires_grad_()
    count = history_ND.shape[0]
    interests, checkpoint_B = checkpoint_interests(
        history_ND,
        event_offsets_U1=torch.tensor([0, count]),
        request_user_B=torch.zeros(1, dtype=torch.long),
        request_position_B=torch.tensor([count]),
        how=Decomposition(rank=4),
        every=1,
    )
    weight_RD = torch.randn(4, 6, generator=seeded(5), dtype=torch.float64)
    (interests.interest_KRD[checkpoint_B[0]] * weight_RD).sum().backward()
    assert torch.isfinite(interests.interest_KRD).all()
    assert history_ND.grad is not None
    assert torch.isfinite(history_ND.grad).all()


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_events=st.integers(1, 12),
    true_rank=st.integers(0, 6),
    repeats=st.integers(1, 3),
    exponent=st.integers(-12, 12),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_gradient_is_finite_and_bounded_on_generated_histories(
    seed: int, num_events: int, true_rank: int, repeats: int, exponent: int, dtype: torch.dtype
) -> None:
    left = torch.randn(num_events, true_rank, generator=seeded(seed))
    history_ND = (left @ torch.randn(true_rank, 6, generator=seeded(seed + 1))).repeat(repeats, 1) * 10.0**exponent
    history_ND = history_ND.to(dtype).requires_grad_()
    found = interests_from_gram(
        (history_ND.T @ history_ND)[None],
        sum_KD=history_ND.sum(0, keepdim=True),
        weight_K=torch.tensor([history_ND.shape[0]], dtype=dtype),
        how=Decomposition(rank=4),
    ).interest_KRD
    (grad,) = torch.autograd.grad(
        (found * torch.randn(4, 6, generator=seeded(seed + 2), dtype=dtype)).sum(), history_ND
    )
    assert torch.isfinite(grad).all()
    # |dP/dX| <= 1 / (2 sqrt(eps)) = 500 a pair of components, 4 x 6 of them; P has the unit of X, so no scale enters.
    assert grad.norm() <= 500 * 24 * math.sqrt(24)


def test_gradient_does_not_grow_with_the_scale_of_events() -> None:
    history_ND = torch.randn(20, 6, generator=seeded(0), dtype=torch.float64)
    gradients = []
    for scale in (1e-40, 1.0, 1e40):
        leaf = (history_ND * scale).requires_grad_()
        interests_of(leaf, rank=4, gradient="stable").sum().backward()
        gradients.append(leaf.grad)
    for gradient in gradients:
        torch.testing.assert_close(gradient, gradients[1], rtol=1e-9, atol=1e-12)


def test_stop_gradient_is_that_of_a_projection_with_constant_left_vectors() -> None:
    history_ND = torch.randn(30, 6, generator=seeded(1), dtype=torch.float64, requires_grad=True)
    weight_RD = torch.randn(4, 6, generator=seeded(2), dtype=torch.float64)
    stopped, exact = (interests_of(history_ND, rank=4, gradient=gradient) for gradient in ("stop", "exact"))
    torch.testing.assert_close(stopped, exact)
    (found,) = torch.autograd.grad((stopped * weight_RD).sum(), history_ND)
    reference_RD = reference_interests(history_ND, rank=4).detach()
    left_NR = history_ND.detach() @ reference_RD.T / reference_RD.square().sum(1) / math.sqrt(30)
    (expected,) = torch.autograd.grad((left_NR.T @ history_ND / math.sqrt(30) * weight_RD).sum(), history_ND)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ten_thousand_hard_histories_have_finite_interests_and_gradients(dtype: torch.dtype) -> None:
    num_histories, num_events, width = 10_000, 9, 8
    generator = seeded(7)
    kind_K = torch.arange(num_histories) % 5
    event_KND = torch.randn(num_histories, num_events, width, generator=generator, dtype=torch.float64)
    turn_KDD = torch.linalg.qr(torch.randn(num_histories, width, width, generator=generator, dtype=torch.float64))[0]
    # Rank 1 to 3; repeated events; equal singular values; one event; nearly equal singular values.
    low = event_KND[:, :, :3] * (torch.arange(3) <= kind_K[:, None] % 3)[:, None] @ turn_KDD[:, :3]
    near = torch.cat(
        [turn_KDD * (1 + 1e-7 * torch.rand(num_histories, width, 1, generator=generator)), low[:, :1] * 0], 1
    )
    cases = [low, event_KND[:, :1].expand_as(low), torch.cat([turn_KDD, turn_KDD[:, :1] * 0], 1), low.clone(), near]
    cases[3][:, 1:] = 0
    event_KND = torch.stack(cases)[kind_K, torch.arange(num_histories)]
    event_KND = event_KND * 10.0 ** torch.randint(-15, 16, (num_histories, 1, 1), generator=generator)
    event_ND = event_KND.flatten(0, 1).to(dtype).requires_grad_()
    interests, checkpoint_B = checkpoint_interests(
        event_ND,
        event_offsets_U1=torch.arange(num_histories + 1) * num_events,
        request_user_B=torch.arange(num_histories),
        request_position_B=torch.full((num_histories,), num_events),
        how=Decomposition(rank=5),
        every=1,
    )
    weight = torch.randn(interests.interest_KRD.shape, generator=generator, dtype=torch.float64)
    (interests.interest_KRD * weight).sum().backward()
    assert torch.isfinite(interests.interest_KRD).all()
    assert event_ND.grad is not None
    assert torch.isfinite(event_ND.grad).all()
    assert interests.valid_KR[checkpoint_B].any(1).all()
