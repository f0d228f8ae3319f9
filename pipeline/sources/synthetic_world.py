"""What stands before any event of a synthetic log: its configuration, the catalogue, and who acts how often.

The letters and equations are those of synthetic_model.py.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from pipeline.events import LATEST_TIME

DAY_MILLISECONDS = 86_400_000
CATALOGUE, USERS, BLOCK = 0, 1, 2
"""What a generator is for."""
_BLOCK_EVENTS = 500_000
_BLOCK_USERS = 4_096


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """What is simulated; the letters are those of synthetic_model.py."""

    form: Literal["events", "impressions"] = "events"
    """events: every event is a click; impressions: candidates shown together, labelled 1 where clicked."""
    users: int = 1_000
    items: int = 10_000
    topics: int = 20
    """Values of the items' feature."""
    groups: int = 200
    """Kinds of items that users tell apart."""
    events_per_user: int = 1_000
    """Mean over users; in impressions, every shown candidate is an event."""
    max_events_per_user: int = 100_000
    spread: float = 1.0
    """Standard deviation of the logarithm of a user's number of events; 0 = all users have the mean."""
    rank: int = 8
    """Numbers that describe an interest."""
    moods: int = 1
    """Lasting interests of a user. Each session is in one of them, drawn anew: what a user wants today may have shown
    itself last long ago."""
    sharpness: float = 3.0
    """0 = no interests; at 3 a user's favourite tenth of the groups takes most clicks."""
    popularity: float = 0.5
    """Exponent of the items' popularity within their group; 0 = all alike."""
    drift: float = 0.05
    """Share of the changing interest that a session forgets."""
    lasting: float = 0.5
    """Share of the interest, as variance, that never changes."""
    session_events: int = 50
    """Events between two steps of the drift."""
    order_strength: float = 0.3
    """Probability that a click follows the order instead of the interest."""
    candidates: int = 10
    """impressions: items of a request."""
    click_rate: float = 0.8
    """impressions: share of requests with a click (one); the others have none."""
    start: int = 1_600_000_000_000
    """First time of the log in milliseconds since 1970."""
    days: int = 365
    """Every user's events are spread over these."""
    seed: int = 1
    """Of everything."""
    processes: int | None = None
    """Unset = one a core, where that pays. The log is the same, byte for byte."""

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
    """[n] where an item stands on the walk."""
    turns: np.ndarray
    """[users] how often the user was asked: events, or requests of form impressions."""
    blocks: np.ndarray
    """[blocks + 1]: block b has users blocks[b] : blocks[b + 1]."""

    def next_item(self, item: np.ndarray) -> np.ndarray:
        """next(i); any shape."""
        return self.walk[(self.place[item] + 1) % len(self.walk)]


def build_world(config: SyntheticConfig) -> World:
    """The catalogue and the users of a configuration."""
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

    normal = generator(config.seed, USERS, 0).standard_normal(config.users)
    # The mean of exp(spread N(0, 1)) is exp(spread^2 / 2).
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
    """Its numbers follow from the key alone."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, (purpose << 56) | number], np.uint64)))


def _blocks(events: np.ndarray) -> np.ndarray:
    """Edges of blocks of about _BLOCK_EVENTS events and at most _BLOCK_USERS users."""
    before = np.cumsum(events) - events
    edges, start = [0], 0
    while start < len(events):
        end = int(np.searchsorted(before, before[start] + _BLOCK_EVENTS))
        start = min(max(end, start + 1), start + _BLOCK_USERS, len(events))
        edges.append(start)
    return np.array(edges)
