"""Sums over growing histories: one for every prefix that some request reads; each event is processed once.

    user 0    a b c | d e | f        prefixes in use: abc, abcde, abcdef
              span    span  span     sum of a prefix = decayed sum of the previous prefix + sum over its own span

    sum_KHLD[k] = sum over the events n of prefix k of 2^(-age_n / half_life) left_NHL[n] (x) right_NHD[n]

SVD-Attention's Gram (left = right = the events), linear attention's state (left = features of the keys, right = values)
and learned pooling (left = weights) are such sums. No tensor has size events x candidates, no history is padded to the
longest one, and memory grows with events plus prefixes.
The letters are those of models/interface.py; K counts prefixes, L and D are widths of the two sides, S counts segments
(a span, or its part on one side of EXACT_EVENTS), G chunks of E events. Indices and lengths are on the host.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_EVENTS = 128
"""Events per product where spans are short: the products of a batch take CHUNK_EVENTS / L times less memory than its
events."""
LONG_SPAN = 64
"""Mean span length from which, on a CPU, one product per span without copies is faster than a batched product: forward
and backward of 80,000 events of width 64 take 185 ms against 244 at 64 events per span, 46 against 89 at 512 (1 core).
"""
RUN_EVENTS = 1024
"""Events per product where spans are long. The error of a Gram of 10,000 events is then 3e-8 of its norm, and 1.1e-7 as
one float32 product."""
EXACT_EVENTS = 128
"""A history's first EXACT_EVENTS events are multiplied in float64; later ones in float32, in short runs that are summed
in float64. So short histories, whose Gram may not have full rank, are exact, and long ones cost a third."""


def weight_of(length_K: Tensor, half_life: float) -> Tensor:
    """[K] float64: the sum of the weights of length_K events; without decay their number."""
    count_K = length_K.double()
    if not half_life:
        return count_K
    step = 2.0 ** (-1.0 / half_life)
    return (1 - step**count_K) / (1 - step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefixes:
    """The K distinct non-empty prefixes that some request uses, by user, then by length. All on the host."""

    start_K: Tensor
    """[K] int64: row in N of the user's first event."""
    length_K: Tensor
    """[K] int64: number of events of the prefix, at least 1."""
    previous_K: Tensor
    """[K] int64: number of events of the user's previous prefix, or 0; the span is what follows them."""
    rank_K: Tensor
    """[K] int64: number of shorter prefixes of the same user."""
    place_B: Tensor
    """[B] int64: 1 + index in K of each request's prefix; 0 for the empty history."""

    @staticmethod
    def of_requests(event_offsets_U1: Tensor, *, user_B: Tensor, length_B: Tensor) -> Prefixes:
        """Request b reads the first length_B[b] events of user_B[b]."""
        stride = int(length_B.max()) + 1 if length_B.numel() else 1
        key_K, inverse = torch.unique((user_B * stride + length_B)[length_B > 0], return_inverse=True)
        user_K, length_K = key_K // stride, key_K % stride
        place_K = torch.arange(key_K.numel())
        joins_K = torch.zeros_like(place_K, dtype=torch.bool)
        joins_K[1:] = user_K[1:] == user_K[:-1]
        first_K = torch.where(joins_K, 0, place_K)
        return Prefixes(
            start_K=event_offsets_U1[user_K],
            length_K=length_K,
            previous_K=torch.where(joins_K, length_K.roll(1), 0),
            rank_K=place_K - (first_K.cummax(0).values if key_K.numel() else first_K),
            place_B=torch.zeros_like(length_B).masked_scatter(length_B > 0, inverse + 1),
        )

    def weight_K(self, half_life: float) -> Tensor:
        """[K] float64: the sum of the weights of a prefix's events; without decay their number."""
        return weight_of(self.length_K, half_life)

    def outer_sums(self, left_NHL: Tensor, right_NHD: Tensor, *, half_life: float = 0.0) -> tuple[Tensor, Tensor]:
        """(sum_KHLD, right_KHD) in float64; right_KHD is the same weighted sum of right_NHD, without gradient.

        `half_life` in events; 0 = every event weighs 1. The latest event of a prefix always weighs 1.
        """
        # Scale both sides by the root of the events' weights at the end of their span.
        device, num_prefixes = right_NHD.device, self.length_K.numel()
        root_N = torch.ones(right_NHD.shape[0], dtype=right_NHD.dtype, device=device)
        decay_K = torch.ones(num_prefixes, dtype=torch.float64)
        if half_life:
            root_N = self._weight_N(half_life, root_N.numel()).sqrt().to(root_N, non_blocking=True)
            decay_K = torch.exp2(-(self.length_K - self.previous_K).double() / half_life)
            same, right_NHD = left_NHL is right_NHD, right_NHD * root_N[:, None, None]
            left_NHL = right_NHD if same else left_NHL * root_N[:, None, None]
        # Sum over each span, then add the previous prefix of the same user.
        spans = self._spans(exact=right_NHD.dtype == torch.float64)
        long = int((self.length_K - self.previous_K).sum()) >= LONG_SPAN * num_prefixes
        if long and device.type == "cpu":
            found = _LongProducts.apply(left_NHL, right_NHD, root_N, spans, left_NHL is right_NHD)
        else:
            found = _batched_products(left_NHL, right_NHD, root_N, spans)
        running = _Running.of(self.rank_K, decay_K=decay_K, device=device)
        return _RunningSum.apply(found[0], running), _RunningSum.apply(found[1], running)

    def _weight_N(self, half_life: float, num_events: int) -> Tensor:
        """[N] float64: 2^(-age / half_life) at the end of the event's span; 0 for an event in no prefix."""
        span_K = self.length_K - self.previous_K
        age_n = (span_K.cumsum(0) - 1).repeat_interleave(span_K) - torch.arange(int(span_K.sum()))
        row_n = (self.start_K + self.length_K - 1).repeat_interleave(span_K) - age_n
        return torch.zeros(num_events, dtype=torch.float64).index_put((row_n,), torch.exp2(-age_n.double() / half_life))

    def _spans(self, *, exact: bool) -> _Spans:
        cut_K = self.length_K if exact else self.length_K.clamp(max=EXACT_EVENTS)
        segments = []
        for dtype, first_K, last_K in (
            (torch.float64, torch.minimum(self.previous_K, cut_K), cut_K),
            (torch.float32, torch.maximum(self.previous_K, cut_K), self.length_K),
        ):
            prefix_S = torch.nonzero(last_K > first_K).squeeze(1)
            if prefix_S.numel():
                first_S, length_S = (self.start_K + first_K)[prefix_S], (last_K - first_K)[prefix_S]
                segments.append(_Segments(prefix_S=prefix_S, first_S=first_S, length_S=length_S, dtype=dtype))
        return _Spans(num_prefixes=self.length_K.numel(), segments=segments)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Segments:
    """Runs of rows, each within one prefix, whose products are computed in one dtype. On the host."""

    prefix_S: Tensor
    first_S: Tensor
    length_S: Tensor
    dtype: torch.dtype

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """(first row, last row + 1) of each segment."""
        return list(zip(self.first_S.tolist(), (self.first_S + self.length_S).tolist(), strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Spans:
    """The spans of all prefixes, split where the dtype of the products changes."""

    num_prefixes: int
    segments: list[_Segments]


def _batched_products(left_NHL: Tensor, right_NHD: Tensor, root_N: Tensor, spans: _Spans) -> tuple[Tensor, Tensor]:
    """Per prefix, in float64: the sum of left (x) right over its span, and the sum of root_n right_n.

    Segments are cut into chunks of equally many events; only the last chunk of a segment is padded.
    """
    widths = (right_NHD.shape[1], left_NHL.shape[2], right_NHD.shape[2])
    product_KHLD = right_NHD.new_zeros(spans.num_prefixes, *widths, dtype=torch.float64)
    sum_KHD = right_NHD.new_zeros(spans.num_prefixes, widths[0], widths[2], dtype=torch.float64)
    for segments in spans.segments:
        row_GE, absent_GE, prefix_G = (
            index.to(right_NHD.device, non_blocking=True) for index in _chunks_of(segments, most=CHUNK_EVENTS)
        )

        def chunks(value: Tensor, row_GE=row_GE, absent_GE=absent_GE, dtype=segments.dtype) -> Tensor:
            """[G, H, E, width]; rows after the end of a segment are zero."""
            found = F.embedding(row_GE, value.flatten(1)).to(dtype).masked_fill(absent_GE[:, :, None], 0.0)
            return found.unflatten(2, value.shape[1:]).transpose(1, 2)

        right = chunks(right_NHD)
        left = right if left_NHL is right_NHD else chunks(left_NHL)
        product_KHLD = product_KHLD.index_add(0, prefix_G, torch.matmul(left.mT, right).double())
        root_G11E = root_N[row_GE].to(segments.dtype)[:, None, None, :]
        sum_KHD.index_add_(0, prefix_G, torch.matmul(root_G11E, right.detach()).squeeze(2).double())
    return product_KHLD, sum_KHD


def _chunks_of(segments: _Segments, *, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row_GE, absent_GE, prefix_G): chunks as long as the mean segment allows, up to `most` events."""
    chunk = max(1, min(int(segments.length_S.sum()) // segments.length_S.numel(), most))
    count_S = (segments.length_S + chunk - 1) // chunk
    segment_G = torch.repeat_interleave(count_S)
    chunk_G = torch.arange(segment_G.numel()) - (count_S.cumsum(0) - count_S)[segment_G]
    place_GE = (chunk_G * chunk)[:, None] + torch.arange(chunk)
    absent_GE = place_GE >= segments.length_S[segment_G][:, None]
    row_GE = segments.first_S[segment_G][:, None] + place_GE.masked_fill(absent_GE, 0)
    return row_GE, absent_GE, segments.prefix_S[segment_G]


class _LongProducts(torch.autograd.Function):
    """`_batched_products` for long spans on a CPU: views of the rows, no gather, nothing saved except the two sides."""

    @staticmethod
    def forward(
        ctx: Any, left_NHL: Tensor, right_NHD: Tensor, root_N: Tensor, spans: _Spans, same: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(left_NHL, right_NHD)
        ctx.same, ctx.spans = same, spans
        widths = (right_NHD.shape[1], left_NHL.shape[2], right_NHD.shape[2])
        product_KHLD = torch.zeros(spans.num_prefixes, *widths, dtype=torch.float64)
        sum_KHD = torch.zeros(spans.num_prefixes, widths[0], widths[2], dtype=torch.float64)
        for segments in spans.segments:
            root_N1 = root_N.to(segments.dtype)[:, None]
            for h in range(widths[0]):
                products, sums = [], []
                for first, stop in segments.bounds:
                    right_nD = right_NHD[first:stop, h].to(segments.dtype)
                    left_nL = right_nD if same else left_NHL[first:stop, h].to(segments.dtype)
                    products.append(_in_runs(left_nL, right_nD))
                    sums.append(_in_runs(root_N1[first:stop], right_nD)[0])
                # A prefix has at most one segment of each dtype.
                product_KHLD[segments.prefix_S, h] += torch.stack(products)
                sum_KHD[segments.prefix_S, h] += torch.stack(sums)
        ctx.mark_non_differentiable(sum_KHD)
        return product_KHLD, sum_KHD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, product_bar: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        left_NHL, right_NHD = ctx.saved_tensors
        if ctx.same:
            product_bar = product_bar + product_bar.mT
        left_bar = _gradient_of(left_NHL, ctx.spans) if ctx.needs_input_grad[0] else None
        right_bar = _gradient_of(right_NHD, ctx.spans) if ctx.needs_input_grad[1] and not ctx.same else None
        for segments in ctx.spans.segments:
            bar_SHLD = product_bar[segments.prefix_S].to(segments.dtype)
            for s, (first, stop) in enumerate(segments.bounds):
                for h in range(right_NHD.shape[1]):
                    if left_bar is not None:
                        left_bar[first:stop, h] = right_NHD[first:stop, h].to(segments.dtype) @ bar_SHLD[s, h].T
                    if right_bar is not None:
                        right_bar[first:stop, h] = left_NHL[first:stop, h].to(segments.dtype) @ bar_SHLD[s, h]
        return left_bar, right_bar, None, None, None


def _in_runs(left_nL: Tensor, right_nD: Tensor) -> Tensor:
    """left^T right as a float64 sum of products of at most RUN_EVENTS rows."""
    whole = right_nD.shape[0] // RUN_EVENTS
    if not whole:
        return left_nL.T @ right_nD
    cut = whole * RUN_EVENTS
    left, right = (side[:cut].unflatten(0, (whole, RUN_EVENTS)) for side in (left_nL, right_nD))
    return torch.bmm(left.mT, right).sum(0, dtype=torch.float64) + left_nL[cut:].T @ right_nD[cut:]


def _gradient_of(value: Tensor, spans: _Spans) -> Tensor:
    """A gradient buffer: zeros for rows that no prefix reads; left uninitialised if all rows will be written."""
    read = sum(int(segments.length_S.sum()) for segments in spans.segments)
    return torch.empty_like(value) if read == value.shape[0] else torch.zeros_like(value)


@dataclasses.dataclass(frozen=True)
class _Running:
    """The steps of the running sum: step i has the prefixes with rank i and their decays."""

    steps: tuple[tuple[Tensor, Tensor], ...]

    @staticmethod
    def of(rank_K: Tensor, *, decay_K: Tensor, device: torch.device) -> _Running:
        by_rank = torch.argsort(rank_K, stable=True)
        sizes = torch.bincount(rank_K).tolist() if rank_K.numel() else []
        rows = by_rank.to(device, non_blocking=True).split(sizes)
        decays = decay_K[by_rank].to(device, non_blocking=True).split(sizes)
        return _Running(tuple(zip(rows[1:], decays[1:], strict=True)))


class _RunningSum(torch.autograd.Function):
    """In place, value[k] += decay[k] * value[k - 1] within each user, shortest prefix first; the number of steps is the
    largest number of prefixes of a user. A user's sum never contains another user's rounding errors."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, running: _Running) -> Tensor:
        ctx.running = running
        ctx.mark_dirty(value)
        for row_k, decay_k in running.steps:
            value.index_add_(0, row_k, value[row_k - 1] * decay_k.view(-1, *[1] * (value.dim() - 1)))
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, result_bar: Tensor) -> tuple[Tensor, None]:
        value_bar = result_bar.clone()
        for row_k, decay_k in reversed(ctx.running.steps):
            value_bar.index_add_(0, row_k - 1, value_bar[row_k] * decay_k.view(-1, *[1] * (value_bar.dim() - 1)))
        return value_bar, None
