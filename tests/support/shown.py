"""A log of impressions: what users were shown, and what they chose of it. A user's events have different times."""

from __future__ import annotations

import numpy as np
import polars as pl

SECOND = 1_000


def shown_log(*, users: int = 14, seed: int = 3) -> pl.DataFrame:
    """user_id, item_id, timestamp (ms), label, request_id. Items a* are only ever shown; some users chose nothing."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        time = 1_700_000_000 * SECOND + int(rng.integers(1_000)) * SECOND
        for place in range(int(rng.integers(8, 40))):
            time += int(rng.integers(1, 900)) * SECOND
            chosen = user % 5 != 4 and rng.random() < 0.4
            item = f"b{rng.integers(12)}" if chosen or rng.random() < 0.5 else f"a{rng.integers(6)}"
            rows.append((f"u{user}", item, time, int(chosen), place // 3))
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "label", "request_id"], orient="row")
