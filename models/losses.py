"""The loss of a request: over its own candidates (pointwise and set-wise), or over the whole catalogue."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.candidate_sets import gather_rows
from models.repeats import SeenItems

SCORES_PER_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 25}
"""Scores per chunk of the softmax over the catalogue: 1 MiB fits into the cache of a CPU core; a GPU needs few large
products."""
MIN_ROWS_PER_CHUNK = 64
"""With fewer rows, a product spends its time reading the items."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestLoss:
    """Sums over the local requests. The caller scales by world size / requests of the whole batch."""

    total: Tensor
    """Scalar with gradient: the quantity to minimise."""
    pointwise: Tensor
    """Scalar without gradient: each request's mean binary cross-entropy over its candidates, summed over requests."""
    setwise: Tensor
    """Scalar without gradient: each request's softmax cross-entropy over its candidates, as a mean over its positives,
    summed over requests."""


def request_loss(
    logits_M: Tensor,
    *,
    label_M: Tensor,
    candidate_offsets_B1: Tensor,
    set_weight: float,
    pointwise_weight: float = 1.0,
    positive_weight: float = 1.0,
    log_q_M: Tensor | None = None,
) -> RequestLoss:
    """pointwise_weight x BCE (calibrated probabilities) + set_weight x softmax cross-entropy over the set (ranking).

    With pointwise_weight = 0 only the sampled softmax is left; positive_weight is the weight of positives in the BCE.

    A score that a whole set shares cancels in the set-wise part: our interpretation of SOLAR's "ranking bias"
    (inferred). A set without a positive has no set-wise part, an empty set has no loss. Everything is in float32.

    log_q_M, the log of how often a candidate is drawn for its request (n q), corrects both parts for drawn negatives.
    The odds that an item is the positive and not a draw are p / (n q). So logit - log_q is fitted to the labels, and
    the logit itself, which is served, estimates log p(item | history) for any distribution of the negatives.

        pointwise   noise-contrastive estimation (Gutmann and Hyvarinen, 2010); uniform: all candidates share the shift
        set-wise    its ranking form, correct for any number of negatives (Ma and Collins, 2018), and with many of them
                    the full softmax (Bengio and Senecal, 2008); uniform: the shift cancels. It overstates an item by
                    n q.

    An alternative leaves the positive of a set uncorrected, because it is there without a draw (Khrylchenko et al.,
    2025). It is closer to the full softmax with thousands of negatives, but further from log p with few (16 of 300
    items: KL 0.06, not 0.001).
    """
    logits_M, label_M = logits_M.float(), label_M.float()
    if log_q_M is not None:
        logits_M = logits_M - log_q_M.float()
    size_B = candidate_offsets_B1.diff()
    num_requests = size_B.numel()
    request_M = torch.repeat_interleave(size_B, output_size=logits_M.numel())
    zeros_B = logits_M.new_zeros(num_requests)

    # Pointwise: the mean binary cross-entropy of each set.
    entropy_M = F.binary_cross_entropy_with_logits(logits_M, label_M, reduction="none")
    entropy_M = torch.where(label_M > 0, positive_weight, 1.0) * entropy_M
    pointwise = (zeros_B.index_add(0, request_M, entropy_M) / size_B.clamp_min(1)).sum()

    # Set-wise: the softmax cross-entropy of each set, shifted by the largest logit.
    peak_B = zeros_B.scatter_reduce(0, request_M, logits_M.detach(), "amax", include_self=False)
    shifted_M = logits_M - peak_B[request_M]
    mass_B = zeros_B.index_add(0, request_M, shifted_M.exp())
    positives_B = zeros_B.index_add(0, request_M, label_M)
    negative_log_M = torch.where(size_B > 0, mass_B, 1.0).log()[request_M] - shifted_M
    setwise = (label_M * negative_log_M / positives_B.clamp_min(1)[request_M]).sum()

    return RequestLoss(
        total=pointwise_weight * pointwise + set_weight * setwise,
        pointwise=pointwise.detach(),
        setwise=setwise.detach(),
    )


def calibrated_positive_weight(strength: float, *, num_negatives: int, num_items: int) -> float:
    """gBCE's exponent of positives (Petrov and Macdonald, RecSys 2023): 1 - t (1 - n / (I - 1)) with t = strength.

    With uniform negatives and t = 1 the fitted scores equal those with all items as negatives; t = 0 is plain BCE.
    """
    return 1 - strength * (1 - num_negatives / max(1, num_items - 1))


def catalogue_loss(
    state_BD: Tensor,
    vector_ID: Tensor,
    *,
    positive_P: Tensor,
    request_P: Tensor,
    repeat_1: Tensor | None = None,
    seen: SeenItems | None = None,
) -> RequestLoss:
    """Softmax cross-entropy of inner products over all I items, as a mean over the positives of a request.

    positive_P: [P] rows of vector_ID, request_P: [P] their requests; repeat_1 is added to the scores of the items in a
    request's history. Scores are computed in chunks; the P x I scores are never kept.
    """
    state_PD = gather_rows(state_BD.float(), request_P)
    weight_P = state_PD.new_ones(len(request_P))
    count_B = state_PD.new_zeros(len(state_BD)).index_add(0, request_P, weight_P)
    total = _CatalogueSoftmax.apply(
        state_PD, vector_ID.float(), repeat_1, positive_P, weight_P / count_B[request_P], request_P, seen
    )
    return RequestLoss(total=total, pointwise=total.new_zeros(()), setwise=total.detach())


class _CatalogueSoftmax(torch.autograd.Function):
    """The sum of weighted cross-entropies. The forward also computes the gradient, chunk by chunk from the scores."""

    @staticmethod
    def forward(
        ctx: Any,
        state_PD: Tensor,
        vector_ID: Tensor,
        repeat_1: Tensor | None,
        positive_P: Tensor,
        weight_P: Tensor,
        request_P: Tensor,
        seen: SeenItems | None,
    ) -> Tensor:
        total = state_PD.new_zeros(())
        grad_PD, grad_ID, grad_1 = torch.empty_like(state_PD), torch.zeros_like(vector_ID), state_PD.new_zeros(1)
        chunk = max(MIN_ROWS_PER_CHUNK, SCORES_PER_CHUNK[vector_ID.device.type] // max(1, len(vector_ID)))
        for first in range(0, len(state_PD), chunk):
            part = slice(first, first + chunk)
            state_pD, weight_p, positive_p1 = state_PD[part], weight_P[part], positive_P[part, None]
            # Score all items for a chunk of positives.
            score_pI, seen_pI = state_pD @ vector_ID.mT, None
            if repeat_1 is not None:
                assert seen is not None, "repeat_1 needs the seen items"
                seen_pI = seen.before(request_P[part]).to(score_pI.dtype)
                score_pI.addcmul_(seen_pI, repeat_1)
            found_p1, highest_p1 = score_pI.gather(1, positive_p1), score_pI.amax(1, keepdim=True)
            # Add the chunk's loss.
            power_pI = score_pI.sub_(highest_p1).exp_()
            mass_p1, weight_p1 = power_pI.sum(1, keepdim=True), weight_p[:, None]
            total += (weight_p1 * (mass_p1.log() + highest_p1 - found_p1)).sum()
            # Add the chunk's gradients.
            slope_pI = power_pI.mul_(weight_p1 / mass_p1).scatter_add_(1, positive_p1, -weight_p1)
            grad_PD[part] = slope_pI @ vector_ID
            grad_ID.addmm_(slope_pI.mT, state_pD)
            if seen_pI is not None:
                grad_1 += torch.dot(slope_pI.flatten(), seen_pI.flatten())
        ctx.save_for_backward(grad_PD, grad_ID, grad_1)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_PD, grad_ID, grad_1 = ctx.saved_tensors
        found = (grad * grad_PD, grad * grad_ID, grad * grad_1 if ctx.needs_input_grad[2] else None)
        return *found, None, None, None, None
