"""Softmax attention in heads, over keys that many queries share, without copies of the heads.

    out_GXD = softmax_S(Q_h K_h^T + bias) V_h, heads side by side

G groups have X queries and S keys each. The X queries of a group are those of P requests, equally many of each, and the
bias belongs to a request: it is repeated for that request's queries. Heads are read and written as columns of [.., D]:
layouts with an axis of heads would copy queries, keys, values and every gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def attend_in_heads(
    query_GXD: Tensor, *, key_GSD: Tensor, value_GSD: Tensor, bias_GPHS: Tensor, num_heads: int
) -> Tensor:
    """out_GXD; keys are already scaled. The first two axes of the bias and its heads may be 1: then it is shared."""
    groups, queries, _ = query_GXD.shape
    requests, heads = bias_GPHS.shape[1:3]
    bias_GPHS = bias_GPHS.expand(groups, requests, heads, key_GSD.shape[1])
    assert heads in (1, num_heads)
    assert queries % max(1, requests) == 0
    return _HeadAttention.apply(query_GXD, key_GSD, value_GSD, bias_GPHS, num_heads)


class _HeadAttention(torch.autograd.Function):
    """Keeps the weights of every head for the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, num_heads: int) -> Tensor:
        out, weights = torch.empty_like(query, memory_format=torch.contiguous_format), []
        for h, part in enumerate(head_columns(query.shape[2], num_heads)):
            score_GXS = torch.bmm(query[..., part], key[..., part].mT)
            score_GXS.unflatten(1, _by_request(bias, query)).add_(bias[:, :, h % bias.shape[2], None])
            weights.append(torch.softmax(score_GXS, -1))
            out[..., part] = torch.bmm(weights[h], value[..., part])
        ctx.num_heads = num_heads
        ctx.save_for_backward(query, key, value, bias, *weights)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, out_bar: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, *weights = ctx.saved_tensors
        query_bar, key_bar, value_bar = (
            torch.empty_like(side, memory_format=torch.contiguous_format) for side in (query, key, value)
        )
        bias_bar = torch.zeros_like(bias, memory_format=torch.contiguous_format) if ctx.needs_input_grad[3] else None
        for h, part in enumerate(head_columns(query.shape[2], ctx.num_heads)):
            value_bar[..., part] = torch.bmm(weights[h].mT, out_bar[..., part])
            weight_bar_GXS = torch.bmm(out_bar[..., part], value[..., part].mT)
            score_bar_GXS = torch.ops.aten._softmax_backward_data(weight_bar_GXS, weights[h], -1, weights[h].dtype)
            query_bar[..., part] = torch.bmm(score_bar_GXS, key[..., part])
            key_bar[..., part] = torch.bmm(score_bar_GXS.mT, query[..., part])
            if bias_bar is not None:
                bias_bar[:, :, h % bias.shape[2]] += score_bar_GXS.unflatten(1, _by_request(bias, query)).sum(2)
        return query_bar, key_bar, value_bar, bias_bar, None


def head_columns(width: int, num_heads: int) -> list[slice]:
    """The columns of each head."""
    head_width = width // num_heads
    return [slice(first, first + head_width) for first in range(0, width, head_width)]


def _by_request(bias_GPHS: Tensor, query_GXD: Tensor) -> tuple[int, int]:
    """(P, queries of each request)."""
    requests = bias_GPHS.shape[1]
    return requests, query_GXD.shape[1] // max(1, requests)


def bucket_scores(score_GH: Tensor, bucket_GPL: Tensor) -> Tensor:
    """[G, P, H, L]: the learned score of each head for the bucket of each key."""
    return _BucketScores.apply(score_GH, bucket_GPL)


class _BucketScores(torch.autograd.Function):
    """An embedding look-up of a few narrow rows. On a CPU the gradient is counted: for 52,000 keys and two heads that
    takes 0.8 ms forward and backward, an embedding 3.6 (one core)."""

    @staticmethod
    def forward(ctx: Any, score_GH: Tensor, bucket_GPL: Tensor) -> Tensor:
        ctx.save_for_backward(bucket_GPL)
        ctx.num_buckets = score_GH.shape[0]
        return torch.stack([score_G[bucket_GPL] for score_G in score_GH.mT.contiguous()], 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, bar_GPHL: Tensor) -> tuple[Tensor, None]:
        (bucket_GPL,) = ctx.saved_tensors
        bucket, heads = bucket_GPL.flatten(), bar_GPHL.unbind(2)
        if bar_GPHL.device.type == "cpu":
            counted = [torch.bincount(bucket, bar.flatten().double(), ctx.num_buckets) for bar in heads]
        else:
            none = bar_GPHL.new_zeros(ctx.num_buckets, dtype=torch.float32)
            counted = [none.index_add(0, bucket, bar.flatten().float()) for bar in heads]
        return torch.stack(counted, 1).to(bar_GPHL.dtype), None
