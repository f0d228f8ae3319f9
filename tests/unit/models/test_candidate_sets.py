"""Jagged sets computed by size groups equal sets computed one by one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.candidate_sets import CandidateSets, attend, gather_rows, mask_bias


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 2, 3, 5, 8, 40]), max_size=7),
    num_keys=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_attend_equals_one_request_at_a_time(sizes: list[int], num_keys: int, seed: int) -> None:
    torch.manual_seed(seed)
    query_MD = torch.randn(sum(sizes), 4).double().requires_grad_()
    key_BSD, value_BSD = torch.randn(2, len(sizes), num_keys, 4).double().unbind(0)
    valid_BS = torch.rand(len(sizes), num_keys) < 0.7
    value_BSD = value_BSD * valid_BS[:, :, None]
    found = attend(
        query_MD,
        key_BSD=key_BSD,
        value_BSD=value_BSD,
        bias_BHS=mask_bias(valid_BS, dtype=torch.float64)[:, None],
        num_heads=2,
        candidates=CandidateSets.from_offsets(torch.tensor([0, *sizes]).cumsum(0), device=torch.device("cpu")),
    )
    rows = []
    for b, query in enumerate(query_MD.split(sizes) if sizes else []):
        key, value = key_BSD[b, valid_BS[b]], value_BSD[b, valid_BS[b]]
        if not valid_BS[b].any():
            rows.append(torch.zeros_like(query))
            continue
        heads = [torch.softmax(query[:, h] @ key[:, h].T, -1) @ value[:, h] for h in (slice(0, 2), slice(2, 4))]
        rows.append(torch.cat(heads, 1))
    expected = torch.cat(rows) if rows else torch.zeros(0, 4).double()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # Float64, other order of sums.


def test_groups_pad_to_at_most_twice_the_smallest_set() -> None:
    sizes = [1, 2, 3, 4, 5, 8, 9, 1000, 20, 17, 4000]
    sets = CandidateSets.from_offsets(torch.tensor([0, *sizes]).cumsum(0), device=torch.device("cpu"))
    for row_bT, member_bT in zip(sets.group_row, sets.group_member, strict=True):
        assert row_bT.shape[1] <= 2 * int(member_bT.sum(1).min())
    assert sum(int(member.sum()) for member in sets.group_member) == sum(sizes)
    assert len(sets.group_row) <= math.ceil(math.log2(4000)) + 1


def test_gather_rows_equals_indexing_with_its_gradient() -> None:
    table = torch.randn(5, 2, 3).requires_grad_()
    index = torch.tensor([[0, 4], [4, 4]])
    found = gather_rows(table, index)
    assert torch.equal(found, table[index])
    weight = torch.randn_like(found)
    (one,) = torch.autograd.grad((found * weight).sum(), table)
    (other,) = torch.autograd.grad((table[index] * weight).sum(), table)
    torch.testing.assert_close(one, other)


def test_gradient_of_a_bfloat16_row_gathered_often_is_not_lost() -> None:
    table = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    gather_rows(table, torch.zeros(5000, dtype=torch.long)).sum().backward()
    # A running bfloat16 sum of ones would stop at 256; 5,000 itself rounds to 4,992.
    assert table.grad is not None
    assert table.grad[0].item() == pytest.approx(5000, rel=0.005)
