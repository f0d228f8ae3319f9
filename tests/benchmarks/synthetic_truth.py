"""python tests/benchmarks/synthetic_truth.py LOG: how well the next click of a log can be told, and from what.

    python tests/benchmarks/synthetic_truth.py workspace/events/moods --test_from 2021-08-07 --clicks 10

NDCG@10 over the whole catalogue of four observers, over `--clicks` clicks a user from `--test_from` on, drawn once:

    the truth         knows what the user wants in this session: no model can do better
    moods, session    knows the user's moods exactly, as from a history without end, and sees this session's clicks
    session           sees this session's clicks alone and knows of users what they have in common (20,000 drawn)
    nobody            sees nothing of the user

What lies between the second and the third is what a long history is worth. All of them know the catalogue's truth and
the click before. For logs of form `events` with `--lasting 1`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

# A script's own directory is on the path, the repository's root is not.
sys.path.insert(0, str(Path(__file__).parents[2]))

from models.metrics import ndcg, rank_of_target
from pipeline.sources.synthetic_model import Block, group_shares, simulate, with_order
from pipeline.sources.synthetic_world import SyntheticConfig, World, build_world

DRAWN_USERS = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("--test_from", required=True, help="a date, UTC")
    parser.add_argument("--clicks", type=int, default=10, help="of a user, at most")
    options = parser.parse_args()
    world = build_world(configuration(options.log))
    test_from = datetime.datetime.fromisoformat(options.test_from).replace(tzinfo=datetime.UTC).timestamp() * 1000
    rng = np.random.default_rng(0)
    anybody = group_shares(world, rng.standard_normal((DRAWN_USERS, world.config.rank)))
    found: dict[str, list[float]] = {"the truth": [], "moods, session": [], "session": [], "nobody": []}
    for number in range(len(world.blocks) - 1):
        block = simulate(world, number)
        for user in np.unique(block.user):
            turns = np.flatnonzero((block.user == user) & (block.time >= test_from))
            interests = block.interest[np.unique(block.session[block.user == user])]
            moods = group_shares(world, np.unique(interests, axis=0))
            for turn in rng.permutation(turns)[: options.clicks]:
                truth = group_shares(world, block.interest[[block.session[turn]]])
                for name, shares in zip(found, (truth, moods, anybody, anybody), strict=True):
                    weight = posterior(world, block, turn, shares, sees_session=name != "nobody")
                    found[name].append(ndcg_at_10(world, block, turn, weight @ shares))
    for name, values in found.items():
        error = statistics.stdev(values) / len(values) ** 0.5
        print(f"{name:<16} {statistics.mean(values):.4f} +- {error:.4f}   {len(values):,} clicks")


def configuration(log: Path) -> SyntheticConfig:
    """What the log was simulated from."""
    source = json.loads((log / "source.json").read_text())
    names = SyntheticConfig.__dataclass_fields__.keys() & source.keys()
    config = SyntheticConfig(**{name: source[name] for name in names})
    if config.form != "events" or config.lasting != 1:
        sys.exit(f"{log}: is of form {config.form} with lasting={config.lasting}: import one with --lasting 1")
    return config


def posterior(world: World, block: Block, turn: int, shares: np.ndarray, *, sees_session: bool) -> np.ndarray:
    """[K] probability of each row of shares [K, G], all alike before the session's clicks."""
    log_likelihood = np.zeros(len(shares))
    session = np.flatnonzero(block.session == block.session[turn]) if sees_session else np.zeros(0, np.int64)
    for earlier in session[session < turn]:
        item = block.clicked[earlier]
        p = shares[:, world.group[item]] * world.within[item]
        log_likelihood += np.log(with_order(world, p, items=item, previous=block.previous[earlier]))
    weight = np.exp(log_likelihood - log_likelihood.max())
    return weight / weight.sum()


def ndcg_at_10(world: World, block: Block, turn: int, share: np.ndarray) -> float:
    """Of the click among all items, for shares of groups [G]."""
    p = share[world.group] * world.within
    score = with_order(world, p, items=np.arange(len(p)), previous=block.previous[turn])
    rank = rank_of_target(torch.from_numpy(score)[None], torch.from_numpy(block.clicked[[turn]]))
    return float(ndcg(rank, k=10)[0])


if __name__ == "__main__":
    main()
