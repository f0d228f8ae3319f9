"""The gradient of the operator: exact where it exists, finite everywhere."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.checkpoints import checkpoint_interests
from models.svd_attention import interests_from_gram, reference_interests


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def interests_of(history_ND: Tensor, *, rank: int, gradient_eps: float) -> Tensor:
    """interest_RD of one history through the fast form."""
    count = history_ND.shape[0]
    interests, _ = checkpoint_interests(
        history_ND,
        event_offsets_U1=torch.tensor([0, count]),
        request_user_B=torch.zeros(1, dtype=torch.long),
        request_position_B=torch.tensor([count]),
        rank=rank,
        every=count,
        gradient_eps=gradient_eps,
    )
    return interests.interest_KRD[1]


@pytest.mark.parametrize(("num_events", "width", "rank"), [(12, 5, 5), (12, 5, 3), (3, 5, 3), (3, 5, 5), (1, 4, 2)])
def test_exact_gradient_passes_gradcheck(num_events: int, width: int, rank: int) -> None:
    history_ND = torch.randn(num_events, width, generator=seeded(0), dtype=torch.float64, requires_grad=True)
    # Finite differences of step 1e-6 in float64 leave about 1e-8 of error, times curvature near small gaps.
    assert torch.autograd.gradcheck(
        lambda x: interests_of(x, rank=rank, gradient_eps=0.0), (history_ND,), eps=1e-6, atol=1e-5, rtol=1e-4
    )


def test_exact_gradient_equals_that_of_the_singular_value_decomposition() -> None:
    history_ND = torch.randn(30, 6, generator=seeded(1), dtype=torch.float64, requires_grad=True)
    weight_RD = torch.randn(4, 6, generator=seeded(2), dtype=torch.float64)
    (found,) = torch.autograd.grad((interests_of(history_ND, rank=4, gradient_eps=0.0) * weight_RD).sum(), history_ND)
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
        torch.autograd.grad((interests_of(history_ND, rank=rank, gradient_eps=eps) * weight_RD).sum(), history_ND)[0]
        for eps in (1e-6, 0.0)
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


@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("event_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1.0, 1e6, 1e15])
@pytest.mark.parametrize("name", HARD_HISTORIES)
def test_value_and_gradient_stay_finite(
    name: str, scale: float, event_dtype: torch.dtype, gram_dtype: torch.dtype
) -> None:
    history_ND = (HARD_HISTORIES[name] * scale).to(event_dtype).requires_grad_()
    count = history_ND.shape[0]
    interests, checkpoint_B = checkpoint_interests(
        history_ND,
        event_offsets_U1=torch.tensor([0, count]),
        request_user_B=torch.zeros(1, dtype=torch.long),
        request_position_B=torch.tensor([count]),
        rank=4,
        every=1,
        gram_dtype=gram_dtype,
    )
    weight_RD = torch.randn(4, 6, generator=seeded(5), dtype=gram_dtype)
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
        count_K=torch.tensor([history_ND.shape[0]], dtype=dtype),
        rank=4,
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
        interests_of(leaf, rank=4, gradient_eps=1e-6).sum().backward()
        gradients.append(leaf.grad)
    for gradient in gradients:
        torch.testing.assert_close(gradient, gradients[1], rtol=1e-9, atol=1e-12)
