"""SVD-Attention: softmax attention over the few principal components of a history instead of over its events.

    X_ND ~ U_R S_R V_R^T          P_RD = S_R V_R^T = U_R^T X    the interests: U is never needed
    K = P W_K,  V = P W_V         O = softmax(Q K^T / tau) V    over R interests, not over N events

The idea is SOLAR's (arXiv 2603.02561); its code is not public. Inferred and checked here: the Gram form
X^T X = V S^2 V^T, the canonical sign, the division by sqrt(N) with a learned temperature, the mask of degenerate
components and the stable gradient. Lemma (tested): if rank(X) <= R then Q (X W_K)^T (X W_V) = Q K^T V for every Q.
Softmax over R interests is a different function from softmax over N events, even then.

Each function is written twice: first a readable, slow reference form, then the fast form that the models use.
The letters are those of models/interface.py; K counts histories (models/interest_checkpoints.py: one
per checkpoint in use).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.candidate_sets import CandidateSets, attend, gather_rows, mask_bias, start_as_similarity
from models.head_attention import attend_in_heads, head_columns
from models.request_blocks import RequestBlocks
from models.tower_settings import Decomposition, Form

START_TEMPERATURE: Mapping[Form, float] = {"softmax": 6.0, "bilinear": 6.0, "gaussian": 1.0}
"""Softmax: P / sqrt(N) alone gives nearly uniform weights (entropy 3.45 of 3.47 at 32 interests), so it starts at 4 to
8 times that."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interests:
    """The principal components of K histories, strongest first."""

    interest_KRD: Tensor
    """[K, R, D] S_R V_R^T / sqrt(N) with the canonical sign, in the Gram's dtype; zero where not valid."""
    valid_KR: Tensor
    """[K, R] bool: the component is above the rounding noise of the Gram."""
    singular_KR: Tensor
    """[K, R] singular values of the history (not divided by sqrt(N)), without gradient."""
    energy_K: Tensor
    """[K] sum of all squared singular values, without gradient."""
    mean_KD: Tensor | None = None
    """[K, D] weighted mean of the events; None where it is not needed."""


def reference_interests(history_ND: Tensor, *, rank: int, half_life: float = 0.0) -> Tensor:
    """Interests of one history by its singular value decomposition, in float64.

        interest_RD = sign_i s_i v_i / sqrt(sum_n w_n),   sign_i = sign(v_i . sum_n w_n x_n)

    It decomposes the matrix with rows sqrt(w_n) x_n, where w_n = 2^(-age_n / half_life), or 1 if half_life is 0. Zero
    rows stand for components that do not exist, or that a float64 Gram could not tell from rounding noise.
    """
    history_ND = history_ND.double()
    num_events, width = history_ND.shape
    interest_RD = history_ND.new_zeros(rank, width)
    if num_events == 0:
        return interest_RD
    age_N = torch.arange(num_events - 1, -1, -1, dtype=torch.float64)
    weight_N = 2.0 ** (-age_N / half_life) if half_life else torch.ones_like(age_N)
    _, singular, direction = torch.linalg.svd(history_ND * weight_N.sqrt()[:, None], full_matrices=False)
    for i in range(min(rank, singular.numel())):
        if singular[i] > math.sqrt(width * torch.finfo(torch.float64).eps) * singular[0]:
            sign = -1.0 if direction[i] @ (weight_N @ history_ND) < 0 else 1.0
            interest_RD[i] = sign * singular[i] * direction[i] / weight_N.sum().sqrt()
    return interest_RD


def interests_from_gram(
    gram_KDD: Tensor, *, sum_KD: Tensor, weight_K: Tensor, how: Decomposition, single_K: Tensor | None = None
) -> Interests:
    """Interests of K histories from G = X^T X, the sum of the events and the sum of their weights; equal to the
    reference.

    Without decay `weight_K` is the number of events. `sum_KD` needs a gradient only for the mean. Components with
    s_i <= sqrt(D eps) s_1 are masked, because they consist of rounding errors. `single_K` (bool, on the host) says
    which histories are decomposed in float32, with its eps; the others use the Gram's dtype. ValueError: more interests
    than D.
    """
    # Decompose.
    width = gram_KDD.shape[-1]
    if how.rank > width:
        raise ValueError(f"rank = {how.rank} must not exceed the width {width} of the events; lower rank")
    stop = how.gradient == "stop"
    if single_K is None:
        single_K = torch.zeros(gram_KDD.shape[0], dtype=torch.bool)
    value_KD, direction_KRD = _StableEigh.apply(
        gram_KDD.detach() if stop else gram_KDD,
        how.rank,
        how.gradient_eps if how.gradient == "stable" else 0.0,
        single_K,
    )
    # Mask rounding noise.
    value_KR = value_KD[:, : how.rank]
    eps_K = torch.where(single_K, torch.finfo(torch.float32).eps, torch.finfo(gram_KDD.dtype).eps)
    floor_K1 = width * eps_K.to(value_KD, non_blocking=True)[:, None] * value_KD[:, :1].detach()
    valid_KR = value_KR.detach() > floor_K1
    # Never take the square root of a masked value: its gradient is infinite at zero.
    singular_KR = torch.where(valid_KR, value_KR, 1.0).sqrt() * valid_KR
    scale_KR = singular_KR
    if how.divide_by_events:
        scale_KR = scale_KR / torch.where(weight_K > 0, weight_K, 1.0).sqrt()[:, None]
    if how.canonical_sign:
        # A singular vector's sign is arbitrary. This choice depends neither on the order of events nor on the batch.
        negative_KR = (direction_KRD.detach() @ sum_KD.detach()[:, :, None]).squeeze(-1) < 0
        scale_KR = scale_KR * torch.where(negative_KR, -1.0, 1.0)
    if stop:
        # v^T G / s^2 = v^T. The Gram passes its gradient only to its right factor, so this is the gradient of
        # P = (X v / s)^T X.
        safe_KR = torch.where(valid_KR, value_KR, 1.0)
        direction_KRD = (direction_KRD @ gram_KDD) / safe_KR[:, :, None]
    return Interests(
        interest_KRD=scale_KR[:, :, None] * direction_KRD,
        valid_KR=valid_KR,
        singular_KR=singular_KR.detach(),
        energy_K=value_KD.detach().sum(-1),
        mean_KD=sum_KD / torch.where(weight_K > 0, weight_K, 1.0)[:, None] if how.with_mean else None,
    )


def reference_svd_attention(
    query_MD: Tensor,
    *,
    interest_RD: Tensor,
    key_DD: Tensor,
    value_DD: Tensor,
    temperature_H: Tensor,
    form: Form = "softmax",
    mean_D: Tensor | None = None,
) -> Tensor:
    """The candidates of one request read its interests, head by head; zero rows of P are ignored.

        softmax     O = softmax(Q (P W_K)^T / tau) P W_V
        bilinear    O = Q (P W_K)^T P W_V / tau
        gaussian    O = mu W_V + Q W_K^T (P^T P - mu mu^T) W_V / tau      mu: the mean of the events

    tau = sqrt(D / H) / temperature. Without any interest the result is zero.
    """
    interest_RD = interest_RD[interest_RD.abs().sum(1) > 0]
    heads = temperature_H.numel()
    if interest_RD.shape[0] == 0:
        return torch.zeros_like(query_MD)
    outputs = []
    for h, (query, key_DX, value_DX) in enumerate(
        zip(query_MD.chunk(heads, 1), key_DD.chunk(heads, 1), value_DD.chunk(heads, 1), strict=True)
    ):
        query = query * temperature_H[h] / math.sqrt(query.shape[1])
        if form == "gaussian":
            assert mean_D is not None
            covariance_DD = interest_RD.T @ interest_RD - torch.outer(mean_D, mean_D)
            outputs.append(mean_D @ value_DX + query @ key_DX.T @ covariance_DD @ value_DX)
            continue
        score_MR = query @ (interest_RD @ key_DX).T
        outputs.append((torch.softmax(score_MR, -1) if form == "softmax" else score_MR) @ (interest_RD @ value_DX))
    return torch.cat(outputs, 1)


class SvdAttention(nn.Module):
    """Candidates read the interests of their request's history in one of three forms (`reference_svd_attention`).

    W_K and W_V are linear and without bias, as the lemma requires: everything non-linear acts on events before the
    decomposition. One decomposition serves every head, layer and candidate of a request.

    softmax is the published form. It depends on the signs of the interests, which are a convention. bilinear is the
    lemma's: nothing is lost where the history has no more than R components. gaussian is what softmax attention over
    the events themselves gives if their keys are normally distributed and R = D: for x ~ N(mu, C) the mean of x under
    weights proportional to e^(b x) is mu + C b. It needs the mean of the events beside their interests.
    """

    def __init__(self, width: int, *, num_heads: int, form: Form = "softmax") -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width = {width} must be a multiple of num_heads = {num_heads}; change one")
        self.num_heads, self.form = num_heads, form
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        start_as_similarity(self.key, self.value)
        self.log_temperature_H = nn.Parameter(torch.full((num_heads,), math.log(START_TEMPERATURE[form])))

    def forward(
        self,
        query_MD: Tensor,
        *,
        interests: Interests,
        checkpoint_B: Tensor,
        candidates: CandidateSets,
        blocks: RequestBlocks | None = None,
    ) -> Tensor:
        """out_MD; zero for a request whose history has no interest. `blocks`: of requests with the same checkpoint."""
        interest_KRD = interests.interest_KRD.to(query_MD.dtype)
        scale = self.log_temperature_H.exp() / math.sqrt(query_MD.shape[1] / self.num_heads)
        scale_D = scale.repeat_interleave(query_MD.shape[1] // self.num_heads)
        key_KRD, value_KRD = self.key(interest_KRD) * scale_D, self.value(interest_KRD)
        if self.form != "softmax":
            mean_KD = None if interests.mean_KD is None else interests.mean_KD.to(query_MD.dtype)
            return self._without_softmax(
                query_MD, key_KRD=key_KRD, value_KRD=value_KRD, mean_KD=mean_KD, scale_D=scale_D,
                checkpoint_B=checkpoint_B, candidates=candidates, blocks=blocks,
            )  # fmt: skip
        bias_KR = mask_bias(interests.valid_KR, dtype=query_MD.dtype)
        if blocks is not None:
            checkpoint_G = blocks.of_first(checkpoint_B)
            found_GXD = attend_in_heads(
                blocks.spread(query_MD),
                key_GSD=gather_rows(key_KRD, checkpoint_G),
                value_GSD=gather_rows(value_KRD, checkpoint_G),
                bias_GPHS=bias_KR[checkpoint_G][:, None, None],
                num_heads=self.num_heads,
            )
            return blocks.collect(found_GXD)
        return attend(
            query_MD,
            key_BSD=gather_rows(key_KRD, checkpoint_B),
            value_BSD=gather_rows(value_KRD, checkpoint_B),
            bias_BHS=bias_KR[checkpoint_B][:, None],
            num_heads=self.num_heads,
            candidates=candidates,
        )

    def _without_softmax(
        self, query_MD: Tensor, *, key_KRD: Tensor, value_KRD: Tensor, mean_KD: Tensor | None, scale_D: Tensor,
        checkpoint_B: Tensor, candidates: CandidateSets, blocks: RequestBlocks | None,
    ) -> Tensor:  # fmt: skip
        """The other forms: keys and values are multiplied first, so that a candidate costs D^2 / H whatever R is."""
        # One more row of the gaussian form, (-q k) v of the mean, and the value of the mean itself.
        constant_KD = value_KRD.new_zeros(len(value_KRD), value_KRD.shape[2])
        if self.form == "gaussian":
            assert mean_KD is not None
            constant_KD = self.value(mean_KD)
            key_KRD = torch.cat([key_KRD, -(self.key(mean_KD) * scale_D)[:, None]], 1)
            value_KRD = torch.cat([value_KRD, constant_KD[:, None]], 1)
        columns = head_columns(query_MD.shape[1], self.num_heads)
        product_KDd = torch.cat([key_KRD[..., part].mT @ value_KRD[..., part] for part in columns], 1)

        def mixed(query_GXD: Tensor, product_GDd: Tensor, constant_GD: Tensor) -> Tensor:
            found = [query_GXD[..., part] @ product_GDd[:, part] for part in columns]
            return torch.cat(found, -1) + constant_GD[:, None]

        if blocks is not None:
            checkpoint_G = blocks.of_first(checkpoint_B)
            chosen = (gather_rows(each, checkpoint_G) for each in (product_KDd, constant_KD))
            return blocks.collect(mixed(blocks.spread(query_MD), *chosen))
        chosen = (gather_rows(each, checkpoint_B) for each in (product_KDd, constant_KD))
        return candidates.map(lambda query_bTD, _, *of_b: mixed(query_bTD, *of_b), query_MD, *chosen)


class _StableEigh(torch.autograd.Function):
    """Eigenvalues (not negative, largest first) and the R strongest eigenvectors, as rows, of symmetric matrices, with
    a gradient that is always finite.

        Gbar = V [diag(Lbar) + F o (V^T Vbar)] V^T
        F_ij = D_ij / (D_ij^2 + eps (l_i + l_j)^2),   D_ij = l_j - l_i

    Inferred; eps = 0 is the textbook gradient. Eigenvalues are first divided by the largest one, so that squares of
    very large or small ones neither overflow nor vanish. Gbar is not made symmetric: the backward of the operation that
    made the symmetric G adds the transpose. Lbar and Vbar have only their first R columns, so all products except the
    last are D x R.
    """

    @staticmethod
    def forward(ctx: Any, gram_KDD: Tensor, rank: int, eps: float, single_K: Tensor) -> tuple[Tensor, Tensor]:
        ctx.rank, ctx.eps = rank, eps
        ctx.groups = _same_precision(single_K, gram_KDD.device)
        values, vectors = zip(*(_eigh(gram_KDD[place_k], single=single) for place_k, single in ctx.groups), strict=True)
        value_KD = _assembled(ctx.groups, [value.flip(-1).clamp_min(0) for value in values])
        direction_KRD = _assembled(ctx.groups, [vector[:, :, -rank:].flip(-1).mT.to(gram_KDD) for vector in vectors])
        ctx.save_for_backward(value_KD, *vectors)
        return value_KD, direction_KRD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, value_bar_KD: Tensor, direction_bar_KRD: Tensor) -> tuple[Tensor | None, ...]:
        value_KD, *vectors = ctx.saved_tensors
        parts = []
        for (place_k, _), vector_kDD in zip(ctx.groups, vectors, strict=True):
            vector_kDD = vector_kDD.to(value_KD)
            value_kD, vector_bar_kDR = value_KD[place_k], direction_bar_KRD[place_k].mT
            largest_k11 = torch.where(value_kD[:, :1] > 0, value_kD[:, :1], 1.0)[:, :, None]
            # The rows keep LAPACK's order, smallest first; only the R columns are reversed.
            share_kD1 = value_kD.flip(-1)[:, :, None] / largest_k11
            share_k1R = value_kD[:, None, : ctx.rank] / largest_k11
            gap_kDR = share_k1R - share_kD1
            damped_kDR = gap_kDR**2 + ctx.eps * (share_k1R + share_kD1) ** 2
            safe_kDR = damped_kDR > torch.finfo(damped_kDR.dtype).tiny
            factor_kDR = torch.where(safe_kDR, gap_kDR / torch.where(safe_kDR, damped_kDR, 1.0), 0.0)
            # Divide last: for two masked components the factor can be near the largest float, and is multiplied by 0.
            inner_kDR = factor_kDR * (vector_kDD.mT @ vector_bar_kDR) / largest_k11
            # The j-th strongest is the j-th from the end.
            inner_kDR[:, -ctx.rank :] += torch.diag_embed(value_bar_KD[place_k][:, : ctx.rank]).flip(1)
            parts.append(vector_kDD @ inner_kDR @ vector_kDD[:, :, -ctx.rank :].flip(-1).mT)
        return _assembled(ctx.groups, parts), None, None, None


def _same_precision(single_K: Tensor, device: torch.device) -> list[tuple[Any, bool]]:
    """(histories, whether in float32) of each group of histories that are decomposed together."""
    if not bool(single_K.any()) or bool(single_K.all()):
        return [(slice(None), bool(single_K.any()))]
    return [
        (torch.nonzero(chosen_K).squeeze(1).to(device, non_blocking=True), single)
        for chosen_K, single in ((~single_K, False), (single_K, True))
    ]


def _assembled(groups: list[tuple[Any, bool]], parts: list[Tensor]) -> Tensor:
    """The parts put back into the order of all histories."""
    if len(parts) == 1:
        return parts[0]
    whole = parts[0].new_empty(sum(len(part) for part in parts), *parts[0].shape[1:])
    for (place_k, _), part in zip(groups, parts, strict=True):
        whole[place_k] = part
    return whole


def _eigh(gram_kDD: Tensor, *, single: bool) -> tuple[Tensor, Tensor]:
    """torch.linalg.eigh; in float32 190 us instead of 305 at D = 64 (one core), with the values in the Gram's dtype.

    A Gram of any scale fits float32 after division by its trace.
    """
    if not single:
        return torch.linalg.eigh(gram_kDD)
    trace_k = gram_kDD.diagonal(dim1=1, dim2=2).sum(1)
    trace_k = torch.where(trace_k > 0, trace_k, 1.0)
    value_kD, vector_kDD = torch.linalg.eigh((gram_kDD / trace_k[:, None, None]).float())
    return value_kD.to(gram_kDD.dtype) * trace_k[:, None], vector_kDD
