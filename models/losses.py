"""The loss of a request: calibrated per candidate, ranked within its set."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestLoss:
    """Sums over the local requests. The caller scales by world size / requests of the whole batch."""

    total: Tensor
    """Scalar with gradient: pointwise + set_weight * setwise."""
    pointwise: Tensor
    """Scalar without gradient: per request the mean binary cross-entropy of its candidates."""
    setwise: Tensor
    """Scalar without gradient: per request the softmax cross-entropy over its set, mean over its positives."""


def request_loss(
    logits_M: Tensor,
    *,
    label_M: Tensor,
    candidate_offsets_B1: Tensor,
    set_weight: float,
    log_q_M: Tensor | None = None,
) -> RequestLoss:
    """BCE (calibrated probabilities) + set_weight x softmax cross-entropy over the request's set (the ranking).

    A score that a whole set shares cancels in the second part: our reading of SOLAR's "ranking bias" (inferred).
    A set without a positive has no second part, an empty set no loss at all. Everything runs in float32.

    log_q_M, log of how often a candidate is drawn for its request (n q), corrects both parts for drawn negatives: an
    item is the positive rather than a draw at odds of p / (n q), so logit - log_q is fitted to the labels and the logit
    itself, which is what is served, estimates log p(item | history) whatever the negatives are drawn from.

        pointwise   noise-contrastive estimation (Gutmann and Hyvarinen, 2010); uniform: all candidates share the shift
        set-wise    its ranking form, right for any number of negatives (Ma and Collins, 2018) and with many of them the
                    full softmax (Bengio and Senecal, 2008); uniform: the shift cancels. It overstates an item by n q.

    To leave the positive of the set uncorrected, as it is there without a draw (Khrylchenko et al., 2025), comes closer
    to the full softmax with thousands of negatives and is further from log p with few (16 of 300 items: KL 0.06, not
    0.001).
    """
    logits_M, label_M = logits_M.float(), label_M.float()
    if log_q_M is not None:
        logits_M = logits_M - log_q_M.float()
    size_B = candidate_offsets_B1.diff()
    num_requests = size_B.numel()
    request_M = torch.repeat_interleave(size_B, output_size=logits_M.numel())
    zeros_B = logits_M.new_zeros(num_requests)

    entropy_M = F.binary_cross_entropy_with_logits(logits_M, label_M, reduction="none")
    pointwise = (zeros_B.index_add(0, request_M, entropy_M) / size_B.clamp_min(1)).sum()

    peak_B = zeros_B.scatter_reduce(0, request_M, logits_M.detach(), "amax", include_self=False)
    shifted_M = logits_M - peak_B[request_M]
    mass_B = zeros_B.index_add(0, request_M, shifted_M.exp())
    positives_B = zeros_B.index_add(0, request_M, label_M)
    negative_log_M = torch.where(size_B > 0, mass_B, 1.0).log()[request_M] - shifted_M
    setwise = (label_M * negative_log_M / positives_B.clamp_min(1)[request_M]).sum()

    return RequestLoss(total=pointwise + set_weight * setwise, pointwise=pointwise.detach(), setwise=setwise.detach())
