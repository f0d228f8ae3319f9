"""A log with one folder per day whose world drifts: items are born every day, age and are forgotten, and users move on.

A model of last week knows neither this week's items nor what its users turned to. The same day is always the same rows.
"""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import polars as pl

FIRST_DAY = datetime.date(2026, 3, 1)
SECONDS_A_DAY = 86_400


def day_of(number: int) -> datetime.date:
    return FIRST_DAY + datetime.timedelta(days=number)


def events_of(number: int, *, users: int = 300, topics: int = 6, items_a_day: int = 12, seed: int = 1) -> pl.DataFrame:
    """The events of one day: user_id, item_id, timestamp.

    A user has a topic and leaves it about once in ten days; clicks go to items of the topic, the younger the likelier,
    and four times in ten to the item that follows the last one.
    """
    topic = _topics(number, users=users, topics=topics, seed=seed)
    rng = np.random.default_rng([seed, 2, number])
    num_items = items_a_day * (number + 5)
    item_topic = np.random.default_rng([seed, 3]).integers(topics, size=10_000)[:num_items]
    age = number + 4 - np.arange(num_items) // items_a_day
    start = int(datetime.datetime.combine(day_of(number), datetime.time(), datetime.UTC).timestamp() * 1000)
    rows = []
    for user in np.flatnonzero(rng.random(users) < 0.8):
        of_topic = np.flatnonzero(item_topic == topic[user])
        weight = np.exp(-age[of_topic] / 4)
        seconds = np.sort(rng.choice(SECONDS_A_DAY, size=int(rng.integers(4, 14)), replace=False))
        last = -1
        for second in seconds.tolist():
            follows = last >= 0 and rng.random() < 0.4
            drawn = rng.choice(len(of_topic), p=weight / weight.sum())
            last = (last + 1) % len(of_topic) if follows else int(drawn)
            rows.append((int(user), int(of_topic[last]), start + 1000 * second))
    events = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    return events.with_columns(pl.col("timestamp").cast(pl.Datetime("ms", "UTC")))


def write_day(
    log: Path, number: int, *, events: pl.DataFrame | None = None, name: str = "part-0", **world: int
) -> Path:
    """The day's folder with its events, or with these instead, whole; where it is."""
    folder = log / f"dt={day_of(number)}"
    folder.mkdir(parents=True, exist_ok=True)
    (events_of(number, **world) if events is None else events).write_parquet(folder / f"{name}.parquet")
    (folder / "_SUCCESS").touch()
    return folder


def write_nightly_recipe(path: Path, *, workspace: Path, log: Path, nightly: str = "", more: str = "") -> Path:
    """A recipe of a small SOLAR whose nights take seconds of training; `nightly` and `more` are YAML to be added to
    that section and at the end."""
    path.write_text(
        f"""
workspace: {workspace}
data:
  name: daily
  events: {log}
  prepare: {{buckets: 2, daily: {{folder: dt=%Y-%m-%d, marker: _SUCCESS}}}}
  requests: {{num_negatives: 16, max_history: 256, seen_items: kept}}
  loader: {{batch_events: 4000}}
model: {{name: solar, width: 16, rank: 4, recent_window: 16, checkpoint_every: 8, set_attention: false, gradient: stop}}
optimizer: {{warmup_steps: 5}}
training: {{epochs: 3}}
parallel: {{num_workers: 1}}
nightly: {{valid_hours: 2, gate_hours: 6, gate: {{min_users: 50}}{nightly and f", {nightly}"}}}
{more}
"""
    )
    return path


def _topics(number: int, *, users: int, topics: int, seed: int) -> np.ndarray:
    """[users] each user's topic that day."""
    topic = np.random.default_rng([seed, 1]).integers(topics, size=users)
    for day in range(1, number + 1):
        rng = np.random.default_rng([seed, 4, day])
        moves = rng.random(users) < 0.1
        topic = np.where(moves, rng.integers(topics, size=users), topic)
    return topic
