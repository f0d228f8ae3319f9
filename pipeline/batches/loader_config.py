"""The settings of the loader. Without torch: a command line reads and checks them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How users become batches."""

    batch_events: int = 65_536
    """Most events plus candidates of a global batch; a user with more is a batch of its own."""
    window_row_groups: int = 8
    """Row groups that are shuffled together and held in memory."""
    prefetch: int = 2
    """Batches built ahead in a thread; 0 builds each one on demand."""

    def __post_init__(self) -> None:
        for name, least in (("batch_events", 1), ("window_row_groups", 1), ("prefetch", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"loader.{name} is {getattr(self, name)}: it must be at least {least}")
