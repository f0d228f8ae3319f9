"""Attention among the candidates of a request: exact form, low-rank form, and what connects them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.candidate_sets import CandidateSets
from models.set_attention import SetAttention
from models.svd_attention import reference_interests, reference_svd_attention

WIDTH, RANK = 8, 4


def build(*, num_heads: int, exact_up_to: int) -> SetAttention:
    torch.manual_seed(0)
    attention = SetAttention(WIDTH, num_heads=num_heads, rank=RANK, exact_up_to=exact_up_to).double()
    with torch.no_grad():
        attention.log_temperature_2H.add_(0.2 * torch.randn(2, num_heads))
    return attention


def layout(sizes: list[int]) -> CandidateSets:
    return CandidateSets.from_offsets(torch.tensor([0, *sizes]).cumsum(0), device=torch.device("cpu"))


def reference(attention: SetAttention, candidate_TD: Tensor, *, seen_SD: Tensor, form: int) -> Tensor:
    """Softmax over rows seen_SD: the candidates themselves (form 0) or their interests (form 1)."""
    query, key, value, output = attention.weight_4DD.unbind(0)
    mixed = reference_svd_attention(
        candidate_TD @ query.T,
        interest_RD=seen_SD,
        key_DD=key.T,
        value_DD=value.T,
        temperature_H=attention.log_temperature_2H[form].exp(),
    )
    return mixed @ output.T


@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("sizes", [[6, 6, 6], [1, 6, 3, 12, 5]])
def test_exact_form_is_softmax_over_the_set(num_heads: int, sizes: list[int]) -> None:
    attention = build(num_heads=num_heads, exact_up_to=100)
    candidate_MD = torch.randn(sum(sizes), WIDTH).double()
    found = attention(candidate_MD, candidates=layout(sizes))
    expected = torch.cat([reference(attention, part, seen_SD=part, form=0) for part in candidate_MD.split(sizes)])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)  # Float64, other order of sums.


@pytest.mark.parametrize("sizes", [[6, 6, 6], [1, 6, 3, 12, 5], [300, 2]])
def test_low_rank_form_is_softmax_over_the_interests_of_the_set(sizes: list[int]) -> None:
    attention = build(num_heads=2, exact_up_to=0)
    candidate_MD = torch.randn(sum(sizes), WIDTH).double() + 0.3
    found = attention(candidate_MD, candidates=layout(sizes))
    expected = torch.cat(
        [
            reference(attention, part, seen_SD=reference_interests(part, rank=RANK), form=1)
            for part in candidate_MD.split(sizes)
        ]
    )
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)  # Float64 through a decomposition.


def test_size_decides_the_form_in_one_batch() -> None:
    attention, sizes = build(num_heads=2, exact_up_to=5), [3, 20]
    candidate_MD = torch.randn(23, WIDTH).double() + 0.3
    found = attention(candidate_MD, candidates=layout(sizes))
    small, large = candidate_MD.split(sizes)
    torch.testing.assert_close(found[:3], reference(attention, small, seen_SD=small, form=0))
    interest_RD = reference_interests(large, rank=RANK)
    torch.testing.assert_close(found[3:], reference(attention, large, seen_SD=interest_RD, form=1))


def test_both_forms_share_the_bilinear_attention_of_a_low_rank_set() -> None:
    attention = build(num_heads=1, exact_up_to=0)
    set_TD = torch.randn(50, RANK).double() @ torch.randn(RANK, WIDTH).double()
    interest_RD = reference_interests(set_TD, rank=RANK) * math.sqrt(50)
    query, key, value, _ = attention.weight_4DD.unbind(0)
    full = set_TD @ query.T @ (set_TD @ key.T).T @ (set_TD @ value.T)
    compact = set_TD @ query.T @ (interest_RD @ key.T).T @ (interest_RD @ value.T)
    torch.testing.assert_close(compact, full, rtol=1e-9, atol=1e-9)  # The lemma: rounding alone.


@pytest.mark.parametrize("exact_up_to", [0, 100])
def test_padding_of_a_size_group_changes_nothing(exact_up_to: int) -> None:
    attention = build(num_heads=2, exact_up_to=exact_up_to)
    candidate_MD = torch.randn(13, WIDTH).double() + 0.3
    found = attention(candidate_MD, candidates=layout([5, 8]))  # One group: 5 is padded to 8.
    alone = attention(candidate_MD[:5], candidates=layout([5]))
    torch.testing.assert_close(found[:5], alone, rtol=1e-9, atol=1e-11)  # Float64 through a decomposition.


@pytest.mark.parametrize("exact_up_to", [0, 100])
def test_permuting_a_set_permutes_its_result(exact_up_to: int) -> None:
    attention = build(num_heads=2, exact_up_to=exact_up_to)
    set_TD, order = torch.randn(20, WIDTH).double() + 0.3, torch.randperm(20)
    found = attention(set_TD, candidates=layout([20]))[order]
    torch.testing.assert_close(attention(set_TD[order], candidates=layout([20])), found, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("exact_up_to", [0, 6, 100])
@pytest.mark.parametrize("unknown", [[0, 0, 0], [4, 1, 0], [1, 9, 2]])
def test_unknown_candidates_neither_attend_nor_are_attended_to(exact_up_to: int, unknown: list[int]) -> None:
    attention, sizes = build(num_heads=2, exact_up_to=exact_up_to), [6, 6, 7]
    candidate_MD = torch.randn(sum(sizes), WIDTH).double() + 0.3
    # Put unknown candidates into the sets, at random places.
    whole = [size + more for size, more in zip(sizes, unknown, strict=True)]
    member_M = torch.cat([torch.randperm(size) >= more for size, more in zip(whole, unknown, strict=True)])
    with_unknown_MD = 100 * torch.randn(sum(whole), WIDTH).double()
    with_unknown_MD[member_M] = candidate_MD
    offsets_B1 = torch.tensor([0, *whole]).cumsum(0)
    candidates = CandidateSets.from_offsets(
        offsets_B1, device=torch.device("cpu"), member_M=member_M, num_members_B=torch.tensor(sizes)
    )
    found = attention(with_unknown_MD, candidates=candidates)
    expected = attention(candidate_MD, candidates=layout(sizes))
    torch.testing.assert_close(found[member_M], expected, rtol=1e-9, atol=1e-11)  # Float64 through a decomposition.
    assert not found[~member_M].any()


def test_a_set_has_the_form_of_its_own_size_beside_sets_of_other_sizes() -> None:
    attention, sizes = build(num_heads=2, exact_up_to=6), [5, 8, 7, 6]  # One group.
    candidate_MD = torch.randn(sum(sizes), WIDTH).double() + 0.3
    found = attention(candidate_MD, candidates=layout(sizes)).split(sizes)
    for part, alone in zip(found, candidate_MD.split(sizes), strict=True):
        expected = attention(alone, candidates=layout([len(alone)]))
        torch.testing.assert_close(part, expected, rtol=1e-9, atol=1e-11)  # Float64 through a decomposition.
