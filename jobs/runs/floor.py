"""The floor of an evaluation: the best baseline, in all and in each slice, and whether the model is below it.

A model is below the floor where the 95 % interval of the difference, paired over at least ten users, lies below 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jobs.runs.summary import Floor, Slice, Summary
from jobs.training.baselines import BASELINES
from models.metrics import bootstrap_ratio_interval

UserSums = tuple[np.ndarray, np.ndarray]
"""For every user: (sum of the primary metric times weight, sum of weights)."""


def floor_of(main: UserSums, others: Mapping[str, UserSums], *, seed: int) -> Floor | None:
    """The best of the baselines in `others`, by its mean over the same users; None if there are none."""
    found = {name: sums for name, sums in others.items() if name in BASELINES}
    if not found or not main[1].sum() > 0:
        return None
    best = max(found, key=lambda name: found[name][0].sum())
    difference = bootstrap_ratio_interval(main[0] - found[best][0], main[1], seed=seed)
    return Floor(baseline=best, difference=difference)


def below_floor(summary: Summary) -> list[Slice]:
    """The slices, the one of everything first, in which the main system is below the floor."""
    return [part for part in summary.slices if part.is_below_floor]
