"""How much of a part an evaluation measures: all requests, or those of users that are drawn. Without torch.

jobs/training/trial.py decides it, before the evaluation begins.
"""

from __future__ import annotations

import dataclasses

from pipeline.batches.requests import RequestConfig

STEPS = (200, 500, 1_000, 2_000, 5_000, 10_000, 20_000)
"""Numbers of requests to choose from, so that machines of about the same speed choose the same one."""
SPREAD = 0.25
"""Standard deviation of NDCG@10 over requests, about that of the public data sets of the recipes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How much of a part an evaluation measures."""

    requests: int | None = None
    """Most requests to evaluate; 0 = all. Users are drawn by their place in the data set, every time and for every
    system the same ones, until they have so many. Unset = as many as `minutes` allow, at most 20000."""
    minutes: float = 2.0
    """If `requests` is unset: minutes that the evaluation of the first model may take, estimated from its first
    requests. Other models get the same requests."""

    def __post_init__(self) -> None:
        if self.requests is not None and self.requests < 0:
            raise ValueError(f"requests is {self.requests}: it must be 0 (all) or more")
        if self.minutes <= 0:
            raise ValueError(f"minutes is {self.minutes}: it must be above 0")

    @property
    def asked(self) -> str | None:
        """The bound in words; None = all requests."""
        if self.requests is None:
            return f"{self.minutes:g} minutes"
        return f"{self.requests} requests" if self.requests else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extent:
    """What an evaluation measures."""

    limit: int | None
    """Draw users until they have so many requests; None = all requests of the part."""
    requests: int
    """Requests of the part."""
    seconds: float | None
    """About how long the main model takes; None = not measured."""

    @property
    def drawn_from(self) -> int | None:
        """Requests of the part, if users are drawn."""
        return self.requests if self.limit is not None else None

    def told(self, requests: RequestConfig) -> str:
        """One sentence for the user."""
        text = f"{self.requests:,} requests" if self.limit is None else f"{self.limit:,} of {self.requests:,} requests"
        if self.seconds is not None:
            text += f", about {duration(self.seconds)} for the first model"
        if self.limit is not None:
            text += "; users are drawn, the same ones for every model (evaluation.requests, 0 = all)"
            if requests.task == "next_item":
                text += f"; intervals of NDCG@10 will be about +-{1.96 * SPREAD / self.limit**0.5:.3f}"
        return text


def duration(seconds: float) -> str:
    """40 s, 12 min or 3 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6_000 else f"{seconds / 3_600:.0f} h"


def fitting(seconds: float, each: float) -> int:
    """The largest of STEPS that takes no more than so many seconds, `each` for a request; at least the first one."""
    return max((step for step in STEPS if step * each <= seconds), default=STEPS[0])
