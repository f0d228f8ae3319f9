"""The fixed part of a synthetic log: its configuration, the catalogue, and how many events each user has.

The letters and equations are those of synthetic_model.py.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from pipeline.times import LATEST_TIME

DAY_MILLISECONDS = 86_400_000
CATALOGUE, USERS, BLOCK = 0, 1, 2
"""The purpose of a generator, part of its key."""
_BLOCK_EVENTS = 500_000
_BLOCK_USERS = 4_096


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Parameters of the simulation; the letters are those of synthetic_model.py."""

    form: Literal["events", "impressions"] = "events"
    """events: every event is a click; impressions: every event is a shown candidate, with label 1 if clicked."""
    users: int = 1_000
    """Number of users."""
    items: int = 10_000
    """Number of items of the catalogue."""
    topics: int = 20
    """Number of values of the items' feature `topic`."""
    groups: int = 200
    """Number of groups of items; users' interests distinguish groups, not the items within one."""
    events_per_user: int = 1_000
    """Mean over users; in impressions, every shown candidate is an event."""
    max_events_per_user: int = 100_000
    """Longest history."""
    spread: float = 1.0
    """Standard deviation of the logarithm of a user's number of events; 0 = all users have the mean number."""
    rank: int = 8
    """Dimension of the interest vectors."""
    moods: int = 1
    """Number of lasting interests per user. One is drawn for each session, so the interest of the present session may
    have been absent from the history for a long time."""
    sharpness: float = 3.0
    """0 = no interests; at 3 a user's favourite tenth of the groups takes most clicks."""
    popularity: float = 0.5
    """Exponent of the items' popularity within their group; 0 = all items equally popular."""
    drift: float = 0.05
    """Share of the changing interest that is forgotten from one session to the next."""
    lasting: float = 0.5
    """Share of the interest, as variance, that never changes."""
    session_events: int = 50
    """Events per session; the interest drifts from one session to the next."""
    order_strength: float = 0.3
    """Probability that a click follows the order instead of the interest."""
    candidates: int = 10
    """impressions: candidates per request."""
    click_rate: float = 0.8
    """impressions: share of requests with exactly one click; the others have none."""
    start: int = 1_600_000_000_000
    """First time of the log in milliseconds since 1970."""
    days: int = 365
    """Number of days over which every user's events are spread."""
    seed: int = 1
    """Seed of all random numbers."""
    processes: int | None = None
    """Unset = one process per core, where that pays. The log is the same, byte for byte, for every number."""

    def __post_init__(self) -> None:
        if self.form not in ("events", "impressions"):
            raise ValueError(f"form={self.form!r}: must be events or impressions")
        least = {"items": 2, "candidates": 2, "seed": 0, "start": 0}
        counts = ("users", "items", "topics", "groups", "events_per_user", "max_events_per_user", "rank", "moods")
        for name in (*counts, "session_events", "candidates", "days", "seed", "start"):
            if getattr(self, name) < least.get(name, 1):
                raise ValueError(f"{name}={getattr(self, name)}: must be {least.get(name, 1)} or more")
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"processes={self.processes}: must be 1 or more")
        for name in ("spread", "sharpness", "popularity"):
            if not 0 <= getattr(self, name) <= 20:
                raise ValueError(f"{name}={getattr(self, name)}: must be from 0 to 20")
        for name in ("drift", "lasting", "order_strength", "click_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be from 0 to 1")
        if self.click_rate == 0:
            raise ValueError("click_rate=0.0: must be above 0, else nobody clicks")
        for lower, upper in (("topics", "groups"), ("groups", "items"), ("events_per_user", "max_events_per_user")):
            if getattr(self, lower) > getattr(self, upper):
                raise ValueError(f"{lower}={getattr(self, lower)}: must not exceed {upper}={getattr(self, upper)}")
        if self.form == "impressions" and self.candidates > min(self.items, self.events_per_user):
            raise ValueError(f"candidates={self.candidates}: must not exceed items nor events_per_user")
        if self.start + self.days * DAY_MILLISECONDS + self.max_events_per_user >= LATEST_TIME:
            raise ValueError(f"days={self.days}: must end before the year 2100")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """The catalogue, and how many clicks or requests each user has."""

    config: SyntheticConfig
    group: np.ndarray
    """[n] g(i)."""
    topic: np.ndarray
    """[G] k(g)."""
    vectors: np.ndarray
    """[G, R] c_g."""
    within: np.ndarray
    """[n] q(i | g(i))."""
    walk: np.ndarray
    """[n] the items in the order of the closed walk."""
    place: np.ndarray
    """[n] the position of each item on the walk."""
    turns: np.ndarray
    """[users] number of turns of each user: events, or requests in form impressions."""
    blocks: np.ndarray
    """[blocks + 1]: block b has users blocks[b] : blocks[b + 1]."""

    def next_item(self, item: np.ndarray) -> np.ndarray:
        """next(i); any shape."""
        return self.walk[(self.place[item] + 1) % len(self.walk)]


def build_world(config: SyntheticConfig) -> World:
    """The catalogue and the users of a configuration."""
    # Draw the catalogue: groups, topics, vectors, popularity and the walk.
    rng = generator(config.seed, CATALOGUE, 0)
    group = rng.permutation(config.items) % config.groups
    topic = np.arange(config.groups) % config.topics
    vectors = np.sqrt(0.5) * rng.standard_normal((config.topics, config.rank))[topic]
    vectors = vectors + np.sqrt(0.5) * rng.standard_normal((config.groups, config.rank))
    by_group = np.lexsort((rng.random(config.items), group))
    sizes = np.bincount(group, minlength=config.groups)
    rank_in_group = np.arange(config.items) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    weight = np.empty(config.items)
    weight[by_group] = (1.0 + rank_in_group) ** -config.popularity
    walk = rng.permutation(config.items)
    place = np.empty(config.items, np.int64)
    place[walk] = np.arange(config.items)

    # Draw each user's number of turns. The mean of exp(spread N(0, 1)) is exp(spread^2 / 2).
    normal = generator(config.seed, USERS, 0).standard_normal(config.users)
    events = config.events_per_user * np.exp(config.spread * normal - config.spread**2 / 2)
    size = config.candidates if config.form == "impressions" else 1
    turns = np.clip(np.rint(events), size, config.max_events_per_user).astype(np.int64) // size
    return World(
        config=config,
        group=group,
        topic=topic,
        vectors=vectors,
        within=weight / np.bincount(group, weights=weight)[group],
        walk=walk,
        place=place,
        turns=turns,
        blocks=_blocks(turns * size),
    )


def generator(seed: int, purpose: int, number: int) -> np.random.Generator:
    """A random generator whose numbers depend only on (seed, purpose, number)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, (purpose << 56) | number], np.uint64)))


def _blocks(events: np.ndarray) -> np.ndarray:
    """[blocks + 1] first user of each block, and the end: about _BLOCK_EVENTS events, at most _BLOCK_USERS users."""
    before = np.cumsum(events) - events
    edges, start = [0], 0
    while start < len(events):
        end = int(np.searchsorted(before, before[start] + _BLOCK_EVENTS))
        start = min(max(end, start + 1), start + _BLOCK_USERS, len(events))
        edges.append(start)
    return np.array(edges)
