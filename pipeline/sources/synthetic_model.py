"""The model behind synthetic logs: low-rank interests that drift, and an order that can be learned. Pure numpy.

Letters: n items, G groups of items, T topics, R rank; user u, session s, event t; N(0, 1) is standard normal.

Catalogue (synthetic_world.py). Item i belongs to group g(i) and so to topic k(g). The log does not contain groups; the
topic is the item's feature. Vectors of topics a_k and of groups b_g are N(0, 1)^R, and

    c_g      = sqrt(1/2) a_k(g) + sqrt(1/2) b_g                                           the vector of the group
    q(i | g) ~ place(i) ^ -popularity                       place = 1, 2, ...: rank of the item within its group
    next(i)  = the item after i on one closed walk through all items, drawn once

User. Sessions have `session_events` events, and each is in one of the user's K = `moods` moods. The share `lasting` of
the interest belongs to the mood and never changes; the rest drifts:

    x_u,s = (1 - drift) x_u,s-1 + sqrt(1 - (1 - drift)^2) N(0, 1)^R                        x_u,0 in N(0, 1)^R
    z_u,s = sqrt(lasting) base_u,m(s) + sqrt(1 - lasting) x_u,s       base_u,m in N(0, 1)^R, m(s) uniform in 1 .. K
    p_s(i) = softmax_g(sharpness <z_u,s, c_g> / sqrt(R)) at g(i), times q(i | g(i))

Clicks. The first is drawn from p; each later one follows the order with probability w = order_strength, else p:

    P(click t = i | click t-1 = j, s) = w [i = next(j)] + (1 - w) p_s(i)                                         (1)

Form `events`: every event is a click. Form `impressions`: a request shows m = `candidates` different items. With
probability r = click_rate one of them is the next click by (1) and the others are drawn uniformly from the other items;
otherwise all m are drawn uniformly and there is no click. By Bayes' rule, with P from (1),

    P(click on i | shown S) = (r n / m) P(i) / ((r n / m) sum over S of P + 1 - r)                               (2)

All numbers of a block of users come from a Philox generator keyed by (seed, block), so they do not depend on which
process computes the block.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from pipeline.sources.synthetic_world import BLOCK, DAY_MILLISECONDS, SyntheticConfig, World, generator

_SLICE_NUMBERS = 4_000_000
_SESSION_PAUSE = 10
"""Mean pause between sessions, in multiples of a session's mean length."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """The simulated turns of some users, with the hidden interests: N turns by user and then time, S sessions."""

    number: int
    user: np.ndarray
    """[N] int64."""
    time: np.ndarray
    """[N] int64 milliseconds since 1970 UTC; the times of one user are all different."""
    session: np.ndarray
    """[N] the turn's row of `interest`."""
    interest: np.ndarray
    """[S, R] z_u,s."""
    previous: np.ndarray
    """[N] the user's last clicked item before the turn, -1 before the first click."""
    clicked: np.ndarray
    """[N] the clicked item, -1 for a request without a click."""
    shown: np.ndarray | None
    """[N, m] impressions: the candidates, sorted by item id."""


def simulate(world: World, number: int) -> Block:
    """Simulate one block of users with its own generator."""
    config = world.config
    rng = generator(config.seed, BLOCK, number)
    users = np.arange(world.blocks[number], world.blocks[number + 1])
    turns = world.turns[users]
    starts = np.cumsum(turns) - turns
    user = np.repeat(np.arange(len(users)), turns)
    turn = np.arange(len(user)) - starts[user]
    size = config.candidates if config.form == "impressions" else 1
    sessions = (turns - 1) * size // config.session_events + 1
    session = (np.cumsum(sessions) - sessions)[user] + turn * size // config.session_events
    interest = _interests(rng, sessions, config)

    clicks = np.ones(len(user), bool) if size == 1 else rng.random(len(user)) < config.click_rate
    clicked, previous = np.full(len(user), -1), np.full(len(user), -1)
    clicked[clicks] = _clicks(rng, world, interest, session[clicks], user[clicks])
    _carry_forward(clicked, previous, user)
    return Block(
        number=number,
        user=users[user],
        time=_times(rng, starts, user, turn, session, config),
        session=session,
        interest=interest,
        previous=previous,
        clicked=clicked,
        shown=_shown(rng, clicked, config) if size > 1 else None,
    )


def item_probability(world: World, block: Block, turns: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Equation (1): probabilities [B, ...] of items [B, ...] in turns [B] of the block."""
    shares = group_shares(world, block.interest[block.session[turns]])
    spread = (slice(None),) + (None,) * (items.ndim - 1)
    p = shares[np.arange(len(turns))[spread], world.group[items]] * world.within[items]
    return with_order(world, p, items=items, previous=block.previous[turns][spread])


def with_order(world: World, p: np.ndarray, *, items: np.ndarray, previous: np.ndarray) -> np.ndarray:
    """Equation (1) from p(items) after the clicks `previous`, -1 for none; the three arrays broadcast."""
    strength = world.config.order_strength
    follows = items == world.next_item(previous)
    return np.where(previous >= 0, strength * follows + (1 - strength) * p, p)


def click_probability(world: World, block: Block, turns: np.ndarray) -> np.ndarray:
    """Equation (2): probabilities [B, m] of the candidates in turns [B] of a block of impressions."""
    assert block.shown is not None, "a block of form impressions"
    config = world.config
    p = item_probability(world, block, turns, block.shown[turns]) * config.click_rate * config.items / config.candidates
    return p / (p.sum(axis=1, keepdims=True) + 1 - config.click_rate)


def _interests(rng: np.random.Generator, sessions: np.ndarray, config: SyntheticConfig) -> np.ndarray:
    """[S, R] interests z, sessions by user. All users are advanced by one session at a time."""
    base = rng.standard_normal((len(sessions), config.moods, config.rank))
    noise = rng.standard_normal((int(sessions.sum()), config.rank))
    starts = np.cumsum(sessions) - sessions
    keep, fresh = 1 - config.drift, np.sqrt(1 - (1 - config.drift) ** 2)
    longest_first = np.argsort(-sessions, kind="stable")
    alive = np.searchsorted(-sessions[longest_first], -np.arange(1, sessions.max()), side="left")
    for step, count in enumerate(alive, start=1):
        rows = starts[longest_first[:count]] + step
        noise[rows] = keep * noise[rows - 1] + fresh * noise[rows]
    mood = rng.integers(config.moods, size=len(noise)) if config.moods > 1 else np.zeros(len(noise), np.int64)
    owner = np.repeat(np.arange(len(sessions)), sessions)
    return np.sqrt(config.lasting) * base[owner, mood] + np.sqrt(1 - config.lasting) * noise


def group_shares(world: World, interest: np.ndarray) -> np.ndarray:
    """[S, G] probability of each group in each session: the softmax in p."""
    logits = (world.config.sharpness / np.sqrt(world.config.rank)) * (interest @ world.vectors.T)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def _clicks(
    rng: np.random.Generator, world: World, interest: np.ndarray, session: np.ndarray, user: np.ndarray
) -> np.ndarray:
    """[C] items of the clicks in sessions [C] of users [C]: some are drawn by interest, the others follow the walk."""
    drawn = _draw_items(rng, world, interest, session)
    first = np.ones(len(user), bool)
    first[1:] = user[1:] != user[:-1]
    anchors = first | (rng.random(len(user)) >= world.config.order_strength)
    clicks = np.arange(len(user))
    anchor = np.maximum.accumulate(np.where(anchors, clicks, 0))
    # A click k clicks after its anchor (a drawn item) is k positions further on the walk.
    return world.walk[(world.place[drawn[anchor]] + clicks - anchor) % len(world.walk)]


def _draw_items(rng: np.random.Generator, world: World, interest: np.ndarray, session: np.ndarray) -> np.ndarray:
    """[C] items drawn from p of sessions [C], which ascend: first a group by inversion, then an item of the group."""
    group_draw, item_draw = rng.random(len(session)), rng.random(len(session))
    num_groups = world.config.groups
    group = np.empty(len(session), np.int64)
    step = max(1, _SLICE_NUMBERS // num_groups)
    for start in range(0, len(interest), step):
        shares = group_shares(world, interest[start : start + step])
        low, high = np.searchsorted(session, (start, start + len(shares)))
        group[low:high] = _invert(shares.ravel(), num_groups, session[low:high] - start, group_draw[low:high])
    by_group = np.argsort(world.group, kind="stable")
    sizes = np.bincount(world.group, minlength=num_groups)
    # Concatenate the groups' cumulative distributions: group g covers the numbers from g to g + 1.
    total = np.cumsum(world.within[by_group])
    place = np.searchsorted(total, group + item_draw, side="right")
    ends = np.cumsum(sizes)
    return by_group[np.clip(place, (ends - sizes)[group], ends[group] - 1)]


def _invert(shares: np.ndarray, width: int, row: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """Columns drawn from rows [len / width, width] of shares by inversion: row r covers the numbers r to r + 1."""
    total = np.cumsum(shares.reshape(-1, width), axis=1)
    total += np.arange(len(total))[:, None]
    place = np.searchsorted(total.ravel(), row + draw, side="right")
    return np.clip(place - row * width, 0, width - 1)


def _carry_forward(clicked: np.ndarray, previous: np.ndarray, user: np.ndarray) -> None:
    """Fill `previous` with the last click of the same user before each turn."""
    turns = np.arange(len(user))
    latest = np.maximum.accumulate(np.where(clicked >= 0, turns, -1))
    before = np.concatenate([[-1], latest[:-1]])
    known = (before >= 0) & (user[before] == user)
    previous[known] = clicked[before[known]]


def _times(
    rng: np.random.Generator,
    starts: np.ndarray,
    user: np.ndarray,
    turn: np.ndarray,
    session: np.ndarray,
    config: SyntheticConfig,
) -> np.ndarray:
    """[N] milliseconds: exponential pauses, longer between sessions, scaled to the whole span of days."""
    pause = rng.exponential(size=len(user))
    begins = np.ones(len(user), bool)
    begins[1:] = session[1:] != session[:-1]
    pause[begins] *= _SESSION_PAUSE * config.session_events
    passed = np.cumsum(pause)
    origin = (passed - pause)[starts][user]
    # The pause after the last event is drawn too, so that users do not all end at the same time.
    after = _SESSION_PAUSE * config.session_events * rng.exponential(size=len(starts))
    total = np.add.reduceat(pause, starts) + after
    share = (passed - origin) / total[user]
    # One extra millisecond per turn keeps a user's times different and in order.
    return config.start + (share * config.days * DAY_MILLISECONDS).astype(np.int64) + turn


def _shown(rng: np.random.Generator, clicked: np.ndarray, config: SyntheticConfig) -> np.ndarray:
    """[N, m] different items: the click, if any, and uniform draws; sorted, so that positions reveal nothing."""
    shown = rng.integers(config.items, size=(len(clicked), config.candidates))
    shown[clicked >= 0, 0] = clicked[clicked >= 0]
    open_rows = np.arange(len(clicked))
    while len(open_rows):
        rows = shown[open_rows]
        order = np.argsort(rows, axis=1, kind="stable")
        ordered = np.take_along_axis(rows, order, axis=1)
        again = np.zeros(rows.shape, bool)
        # The sort is stable: among equal items the first is kept, and the click is first.
        np.put_along_axis(again[:, :], order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
        rows[again] = rng.integers(config.items, size=int(again.sum()))
        shown[open_rows] = rows
        open_rows = open_rows[again.any(axis=1)]
    return np.sort(shown, axis=1)
