"""What was known of items when: the number of their events, and of those with a positive label, by day.

    item   day   events   positive          before day 3:   item 5 has 3 events, 1 positive
    5      0     2        1                                 item 7 has none
    5      2     1        0
    7      3     4        4

A request reads the days before its own, so that its own day says nothing about it; later days than the last one that is
known are read as the day after it. Times are never compared within a day: the counters of a log of any size are one row
for each item and day that has events.
The letters are those of models/interface.py; K counts (item, day) pairs, X whatever is asked for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MS_PER_DAY = 86_400_000


class ItemCounters(nn.Module):
    """Counters by item and day; a module without parameters, so that it moves to a device with its model."""

    key_K: Tensor
    events_K1: Tensor
    positives_K1: Tensor
    start_R1: Tensor
    training_R: Tensor

    def __init__(
        self, *, row_K: Tensor, day_K: Tensor, events_K: Tensor, positives_K: Tensor, training_R: Tensor,
        day_ms: int = MS_PER_DAY,
    ) -> None:  # fmt: skip
        """row_K, day_K: int64, distinct pairs in ascending order of (row of the item table, day), where a day is the
        time in milliseconds since 1970 UTC divided by `day_ms`; events_K, positives_K: int64, events of the pair and
        those with a positive label; training_R: [R] int64, how often training moved each row: the
        positives of all training requests, also of those that earlier runs trained on."""
        super().__init__()
        self.day_ms = day_ms
        self.first_day = int(day_K.min()) if day_K.numel() else 0
        self.num_days = int(day_K.max()) - self.first_day + 2 if day_K.numel() else 1
        key_K = row_K * self.num_days + day_K - self.first_day
        assert bool((key_K.diff() > 0).all()), "pairs must be distinct and in order"
        kept = {
            "key_K": key_K,
            "events_K1": F.pad(events_K.cumsum(0), (1, 0)),
            "positives_K1": F.pad(positives_K.cumsum(0), (1, 0)),
            "start_R1": torch.searchsorted(key_K, torch.arange(training_R.numel() + 1) * self.num_days),
            "training_R": training_R,
        }
        for name, tensor in kept.items():
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], *, training_R: Tensor) -> ItemCounters:
        """The counters that `tensors` gave."""
        day_ms, pairs = int(tensors["day_ms"]), {name: value.long() for name, value in tensors.items() if value.ndim}
        return cls(**pairs, training_R=training_R, day_ms=day_ms)

    def tensors(self) -> dict[str, Tensor]:
        """The arguments of the constructor that are of the data, to store them; `training_R` is of the model."""
        return {
            "row_K": torch.div(self.key_K, self.num_days, rounding_mode="floor").int(),
            "day_K": (self.key_K % self.num_days + self.first_day),
            "events_K": self.events_K1.diff().int(),
            "positives_K": self.positives_K1.diff().int(),
            "day_ms": torch.tensor(self.day_ms),
        }

    def days(self, time_X: Tensor) -> Tensor:
        """day_X: the day of a time, from the first day of the counters on; the day after the last one for later
        times."""
        day_X = torch.div(time_X, self.day_ms, rounding_mode="floor") - self.first_day
        return day_X.clamp(0, self.num_days - 1)

    def place(self, row_X: Tensor, day_X: Tensor) -> Tensor:
        """place_X in K of the row's first pair on this day or later; rows beyond R have no pairs."""
        row_X = row_X.clamp_max(self.training_R.numel())
        return torch.searchsorted(self.key_K, row_X * self.num_days + day_X.clamp_min(0))

    def before(self, row_X: Tensor, day_X: Tensor) -> tuple[Tensor, Tensor]:
        """(events_X, positives_X) of the rows before these days, int64."""
        first_X = self.start_R1[row_X.clamp_max(self.training_R.numel())]
        until_X = self.place(row_X, day_X)
        return (
            self.events_K1[until_X] - self.events_K1[first_X],
            self.positives_K1[until_X] - self.positives_K1[first_X],
        )

    def events_within(self, row_X: Tensor, day_X: Tensor, windows: tuple[int | None, ...]) -> Tensor:
        """[X, len(windows)] int64: events in the last `window` days before the day; None = all days before it."""
        until_X = self.events_K1[self.place(row_X, day_X)]
        first_X = self.start_R1[row_X.clamp_max(self.training_R.numel())]
        found = []
        for window in windows:
            span = None if window is None else window * MS_PER_DAY // self.day_ms
            from_X = first_X if span is None else self.place(row_X, day_X - span)
            found.append(until_X - self.events_K1[from_X])
        return torch.stack(found, -1)
