"""python tests/benchmarks/gradient_eps.py: how much damping the gradient through the decomposition needs, and costs.

For every eps and rank R, on histories of 1,000 events of width 64 with singular values like i^-1/2: the cosine between
the damped and the exact gradient of a random function of the interests, both in float64; the same in float32; and the
largest gradient in float32 over 200 histories whose events lie in two equally strong halves, so that eigenvalues meet.
`stop` is the estimator that holds U constant.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

# A script's own directory is on the path, the repository's root is not.
sys.path.insert(0, str(Path(__file__).parents[2]))

from models.svd_attention import Decomposition, interests_from_gram

EVENTS, WIDTH, HISTORIES = 1000, 64, 8
RANKS = (8, 16, 32)
CHOICES = (*(10.0**-exponent for exponent in range(2, 15, 2)), "stop")


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    strength_D = torch.arange(1, WIDTH + 1, dtype=torch.float64) ** -0.5
    ordinary = torch.randn(HISTORIES, EVENTS, WIDTH, generator=generator, dtype=torch.float64) * strength_D
    half = torch.randn(200, EVENTS // 2, WIDTH // 2, generator=generator, dtype=torch.float64)
    zeros = torch.zeros_like(half)
    meeting = torch.cat([torch.cat([half, zeros], 2), torch.cat([zeros, half], 2)], 1)
    print(f"{'eps':>8} {'R':>3} {'cosine, float64':>16} {'cosine, float32':>16} {'largest where eigenvalues meet':>31}")
    for rank in RANKS:
        exact = gradient(ordinary, Decomposition(rank=rank, gradient="exact"))
        for choice in CHOICES:
            how = (
                Decomposition(rank=rank, gradient="stop")
                if isinstance(choice, str)
                else Decomposition(rank=rank, gradient_eps=choice)
            )
            double, single = (
                cosine(gradient(ordinary.to(dtype), how), exact) for dtype in (torch.float64, torch.float32)
            )
            largest = gradient(meeting.float(), how).flatten(1).norm(dim=1).max()
            name = choice if isinstance(choice, str) else f"{choice:.0e}"
            print(f"{name:>8} {rank:>3} {double:>16.4f} {single:>16.4f} {float(largest):>31.3g}", flush=True)


def gradient(history_KND: Tensor, how: Decomposition) -> Tensor:
    """Of a fixed random function of the interests, by every event."""
    history_KND = history_KND.clone().requires_grad_()
    left = history_KND.detach() if how.gradient == "stop" else history_KND
    interests = interests_from_gram(
        left.mT @ history_KND,
        sum_KD=history_KND.sum(1),
        weight_K=torch.full((len(history_KND),), float(EVENTS), dtype=history_KND.dtype),
        how=how,
    )
    weight_RD = torch.randn(how.rank, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (interests.interest_KRD * weight_RD.to(history_KND.dtype)).sum().backward()
    assert history_KND.grad is not None
    return history_KND.grad


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(one.double().flatten(1), other.flatten(1), dim=1).mean())


if __name__ == "__main__":
    main()
