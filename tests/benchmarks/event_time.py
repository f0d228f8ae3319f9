"""python tests/benchmarks/event_time.py: what an event costs each model, by the length of the history.

One user's history of random items, on one thread, three ways: a training step (forward and backward of 64 requests
spread over the history, 17 candidates each), one request for 1,000 candidates with its history as it is, and, where
the model keeps a state of fixed size, one more event and the same candidates. The best of some runs, in microseconds
an event; `ms` is the whole. Every model reads the whole history: max_length is its length.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# A script's own directory is on the path, the repository's root is not.
sys.path.insert(0, str(Path(__file__).parents[2]))

from models.interface import ModelInput
from models.recgrela import RecGrela
from models.recgrela_state import RecGrelaState
from models.sequence_settings import SequenceConfig
from models.zoo import MODELS, build_tower

WIDTH, ITEMS = 64, 10_000
TRAINED, TRAINED_SIZE, SCORED_SIZE = 64, 17, 1_000
SECONDS = 2.0
"""A measurement is repeated for so long, and three times at least."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["recgrela", "solar", "sasrec", "hstu"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[200, 2_000, 10_000])
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = ("model", "events", "train ms", "us/event", "score ms", "us/event", "one more ms")
    print("".join(f"{column:>14}" for column in columns))
    for model in options.models:
        for length in options.lengths:
            print("".join(f"{cell:>14}" for cell in measure(model, length)), flush=True)


def measure(model: str, length: int) -> tuple[str, ...]:
    settings: dict[str, Any] = {"name": model, "width": WIDTH}
    if issubclass(MODELS[model][0], SequenceConfig):
        settings["max_length"] = length
    if model == "solar":
        settings |= {"time_features": False, "set_attention": False}
    torch.manual_seed(1)
    tower = build_tower(settings, num_features=0)
    trained = inputs(length, [length * (b + 1) // TRAINED for b in range(TRAINED)], TRAINED_SIZE)
    scored = inputs(length, [length], SCORED_SIZE)

    def train() -> None:
        tower(trained).sum().backward()

    @torch.no_grad()
    def score() -> None:
        tower(scored)

    train_seconds = best_of(train)
    tower.eval()
    score_seconds = best_of(score)
    cells = (model, f"{length:,}")
    for seconds in (train_seconds, score_seconds):
        cells += (f"{1e3 * seconds:.1f}", f"{1e6 * seconds / length:.1f}")
    return (*cells, f"{1e3 * best_of(one_more(tower, scored)):.2f}" if isinstance(tower, RecGrela) else "")


def one_more(tower: RecGrela, scored: ModelInput) -> Callable[[], None]:
    """Another event of a user whose history is a state, and the candidates after it."""
    vector_ID = tower.item_vectors(scored).detach()
    state = RecGrelaState.empty(tower, num_users=1)

    @torch.no_grad()
    def run() -> None:
        after = state.add(tower, vector_ID[:1])
        torch.matmul(after.state_XD, vector_ID[:SCORED_SIZE].mT)

    return run


def best_of(run: Callable[[], None]) -> float:
    """Seconds of the fastest run."""
    run()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < SECONDS:
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def inputs(length: int, positions: list[int], size: int) -> ModelInput:
    """One user with `length` events, asked after each of `positions` of them for `size` candidates."""
    generator = torch.Generator().manual_seed(1)
    num_requests = len(positions)
    return ModelInput(
        item_IC=(torch.randn(ITEMS, WIDTH, generator=generator) * 0.1).requires_grad_(),
        features_IFC=torch.zeros(ITEMS, 0, WIDTH),
        user_features_UGC=torch.zeros(1, 0, WIDTH),
        event_offsets_U1=torch.tensor([0, length]),
        event_item_N=torch.randint(ITEMS, (length,), generator=generator),
        event_time_N=torch.arange(length) * 60_000,
        event_action_N=torch.zeros(length, dtype=torch.long),
        event_label_N=torch.zeros(length, dtype=torch.long),
        request_user_B=torch.zeros(num_requests, dtype=torch.long),
        request_position_B=torch.tensor(positions),
        request_time_B=torch.tensor(positions) * 60_000,
        candidate_offsets_B1=torch.arange(num_requests + 1) * size,
        candidate_item_M=torch.randint(ITEMS, (num_requests * size,), generator=generator),
    )


if __name__ == "__main__":
    main()
