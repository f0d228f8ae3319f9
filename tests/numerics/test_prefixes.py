"""Sums over growing prefixes against a loop over requests, with their gradients, on both ways of computing them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import models.prefixes
from models.prefixes import EXACT_EVENTS, Prefixes

HEADS, LEFT, RIGHT = 2, 3, 4


def random_sides(num_events: int, *, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(num_events, HEADS, LEFT, generator=generator, dtype=torch.float64)
    right = torch.randn(num_events, HEADS, RIGHT, generator=generator, dtype=torch.float64)
    return left.to(dtype).requires_grad_(), right.to(dtype).requires_grad_()


def plain_sums(
    left_NHL: Tensor, right_NHD: Tensor, offsets: list[int], requests: list[tuple[int, int]], half_life: float
) -> tuple[Tensor, Tensor]:
    """One request after the other; an empty history is zero."""
    sums, rights = [], []
    for user, length in requests:
        rows = slice(offsets[user], offsets[user] + length)
        age = torch.arange(length - 1, -1, -1).double()
        weight = torch.exp2(-age / half_life) if half_life else torch.ones_like(age)
        sums.append(torch.einsum("n,nhl,nhd->hld", weight, left_NHL[rows].double(), right_NHD[rows].double()))
        rights.append(torch.einsum("n,nhd->hd", weight, right_NHD[rows].double()))
    return torch.stack(sums), torch.stack(rights)


def prefixes_of(offsets: list[int], requests: list[tuple[int, int]]) -> Prefixes:
    user_B, length_B = torch.tensor(requests).view(-1, 2).unbind(1)
    return Prefixes.of_requests(torch.tensor(offsets), user_B=user_B, length_B=length_B)


def with_empty(value: Tensor) -> Tensor:
    return torch.cat([value.new_zeros(1, *value.shape[1:]), value])


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    data=st.data(),
    half_life=st.sampled_from([0.0, 2.5]),
    long_span=st.sampled_from([0, 10**9]),
    exact_events=st.sampled_from([5, 10**6]),
)
def test_both_ways_equal_a_loop_over_requests_with_their_gradient(
    lengths: list[int], data: st.DataObject, half_life: float, long_span: int, exact_events: int
) -> None:
    offsets = torch.tensor([0, *lengths]).cumsum(0).tolist()
    requests = data.draw(
        st.lists(
            st.integers(0, len(lengths) - 1).flatmap(lambda u: st.tuples(st.just(u), st.integers(0, lengths[u]))),
            min_size=1,
            max_size=8,
        )
    )
    requests.sort(key=lambda request: request[0])
    left_NHL, right_NHD = random_sides(offsets[-1], seed=0)
    prefixes = prefixes_of(offsets, requests)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.prefixes, "LONG_SPAN", long_span)
        patch.setattr(models.prefixes, "EXACT_EVENTS", exact_events)
        patch.setattr(models.prefixes, "RUN_EVENTS", 7)
        patch.setattr(models.prefixes, "CHUNK_EVENTS", 4)
        found, found_right = (with_empty(x)[prefixes.place_B] for x in prefixes.outer_sums(
            left_NHL, right_NHD, half_life=half_life
        ))  # fmt: skip
        expected, expected_right = plain_sums(left_NHL, right_NHD, offsets, requests, half_life)
        # Sums of at most 40 products in float64, in another order.
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found_right, expected_right, rtol=1e-12, atol=1e-12)
        weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        leaves = (left_NHL, right_NHD)
        gradients = torch.autograd.grad((found * weight).sum(), leaves)
    for one, other in zip(gradients, torch.autograd.grad((expected * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("long_span", [0, 10**9])
def test_gram_of_one_tensor_has_the_gradient_of_both_its_factors(
    long_span: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.prefixes, "LONG_SPAN", long_span)
    _, event_NHD = random_sides(30, seed=2)
    prefixes = prefixes_of([0, 30], [(0, 12), (0, 30)])
    found, _ = prefixes.outer_sums(event_NHD, event_NHD)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected, _ = plain_sums(event_NHD, event_NHD, [0, 30], [(0, 12), (0, 30)], 0.0)
    (one,) = torch.autograd.grad((found * weight).sum(), event_NHD)
    (other,) = torch.autograd.grad((expected * weight).sum(), event_NHD)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("long_span", [0, 10**9])
def test_a_short_history_is_summed_in_float64_and_a_long_one_nearly(
    long_span: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.prefixes, "LONG_SPAN", long_span)
    num_events = 8 * EXACT_EVENTS
    left_NHL, right_NHD = (side.detach() for side in random_sides(num_events, seed=3, dtype=dtype))
    requests = [(0, EXACT_EVENTS), (0, num_events)]
    found, found_right = prefixes_of([0, num_events], requests).outer_sums(left_NHL, right_NHD)
    expected, expected_right = plain_sums(left_NHL, right_NHD, [0, num_events], requests, 0.0)
    error = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error[0] < 1e-13
    # A product of 1,024 float32 terms of random sign has a relative error of about 1e-6, and eight of them average.
    assert error[1] < 2e-6
    assert (found_right - expected_right).norm() < 1e-5 * expected_right.norm()


def test_a_sum_does_not_depend_on_the_other_requests() -> None:
    left_NHL, right_NHD = (side.detach() for side in random_sides(60, seed=4))
    alone, _ = prefixes_of([0, 20, 60], [(1, 40)]).outer_sums(left_NHL, right_NHD)
    left_NHL[:20] *= 1e30
    beside, _ = prefixes_of([0, 20, 60], [(0, 3), (0, 20), (1, 40)]).outer_sums(left_NHL, right_NHD)
    # Chunks are cut by the mean length of all spans: rounding of float64, and nothing of the other user's 1e60.
    torch.testing.assert_close(beside[2], alone[0], rtol=1e-13, atol=1e-13)


def test_weights_of_a_prefix_are_the_sum_of_its_events_weights() -> None:
    prefixes = prefixes_of([0, 9], [(0, 4), (0, 9)])
    assert prefixes.weight_K(0.0).tolist() == [4, 9]
    expected = [sum(2 ** (-age / 3) for age in range(length)) for length in (4, 9)]
    torch.testing.assert_close(prefixes.weight_K(3.0), torch.tensor(expected, dtype=torch.float64))
