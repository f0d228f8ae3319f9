"""python tests/benchmarks/serving_latency.py: one request of a registered SOLAR, from data frame to scores.

Each request has one user, so many candidates, and the raw history, or a stored state (what `solar score
--build-states` keeps: interests, Gram, recent window), or a state and the events that came since. What is timed is
`predict`, as MLflow's server calls it after parsing: ids, look-ups, tower. Scores of the stored forms are compared with
those of the whole history. Weights are random; time does not depend on them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

# A script's own directory is on the path, the repository's root is not.
sys.path.insert(0, str(Path(__file__).parents[2]))

from jobs.scorer.checksums import write_checksums
from jobs.scorer.scorer import Scorer
from models.solar import SolarConfig
from models.zoo import build_tower

MINUTE = 60_000
START = 1_600_000_000_000
USERS = 8
WARM_UP = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--candidates", type=int, default=4_000)
    parser.add_argument("--latest", type=int, default=50)
    parser.add_argument("--rank", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=240)
    parser.add_argument("--repeats", action="store_true", help="also with the model option of this name")
    options = parser.parse_args()
    torch.set_num_threads(2)
    print(f"{options.candidates:,} candidates x {options.events:,} events, {options.requests} requests each, 2 threads")
    print("| rank | repeats | form | p50, ms | p99, ms | bytes a user | p99 of the difference in score |")
    print("|---|---|---|---|---|---|---|")
    for rank in options.rank:
        for repeats in [False, True] if options.repeats else [False]:
            report(rank, repeats, options)


def report(rank: int, repeats: bool, options: argparse.Namespace) -> None:
    config = SolarConfig(rank=rank, repeats=repeats)
    with tempfile.TemporaryDirectory() as directory:
        export(Path(directory), config, options.items)
        scorer = Scorer()
        scorer.load(Path(directory))
        forms = requests(scorer, options)
        whole = np.concatenate([scores(scorer, request) for request in forms["raw history"][0]])
        earlier = np.concatenate([scores(scorer, request) for request in forms["raw history, before"][0]])
    del forms["raw history, before"]
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    # By turns: whatever else the machine does hits all forms alike.
    for k in range(WARM_UP + options.requests):
        for form, (asked, _) in forms.items():
            started = time.perf_counter()
            scorer.predict(None, asked[k % USERS])
            seconds[form].append(time.perf_counter() - started)
    for form, (asked, size) in forms.items():
        found = np.concatenate([scores(scorer, request) for request in asked])
        off = np.quantile(np.abs(found - (earlier if form == "state" else whole)), 0.99)
        middle, worst = np.quantile(np.array(seconds[form][WARM_UP:]) * 1000, [0.5, 0.99])
        print(
            f"| {rank} | {'yes' if repeats else 'no'} | {form} | {middle:.1f} | {worst:.1f} | {size:,.0f} | {off:.1e} |"
        )


def requests(scorer: Scorer, options: argparse.Namespace) -> dict[str, tuple[list[pd.DataFrame], float]]:
    """{form: (a request of each user, bytes of a user)}; `before` is the history without the latest events."""
    rng, num_events = np.random.default_rng(1), options.events
    forms: dict[str, Any] = {name: [] for name in ("raw history", "raw history, before", "state", "with latest")}
    sizes = []
    for _ in range(USERS):
        # Half of what a user does is done with a few hundred items.
        own = rng.integers(0, options.items, 300)
        items = np.where(
            rng.random(num_events) < 0.5, rng.choice(own, num_events), rng.integers(0, options.items, num_events)
        )
        times = START + np.cumsum(rng.integers(1, 30, num_events)) * MINUTE
        candidates = {"candidates": [rng.integers(0, options.items, options.candidates)]}
        cut = num_events - options.latest
        before = {"history": [items[:cut]], "history_time": [times[:cut]]}
        batch = pa.RecordBatch.from_pydict({name: pa.array([value[0].tolist()]) for name, value in before.items()})
        state = scorer.build_states(scorer.histories(batch))
        sizes.append(len(state[0]))
        latest = {"latest": [items[cut:]], "latest_time": [times[cut:]]}
        forms["raw history"].append({"history": [items], "history_time": [times], **candidates})
        forms["raw history, before"].append({**before, **candidates})
        forms["state"].append({"state": state, **candidates})
        forms["with latest"].append({"state": state, **latest, **candidates})
    raw = num_events * 16.0
    return {
        ("state and latest events" if form == "with latest" else form): (
            [pd.DataFrame(request) for request in asked],
            raw if form.startswith("raw") else float(np.mean(sizes)),
        )
        for form, asked in forms.items()
    }


def scores(scorer: Scorer, request: pd.DataFrame) -> np.ndarray:
    return np.array(scorer.predict(None, request)["scores"][0])


def export(directory: Path, config: SolarConfig, num_items: int) -> None:
    """A model with random weights, as jobs/runs/register.py writes it."""
    torch.manual_seed(1)
    settings = {"name": "solar", **dataclasses.asdict(config)}
    tower = build_tower(settings, num_features=0)
    save_file({"weight": torch.randn(num_items + 2, config.width)}, directory / "table-item.safetensors")
    save_file(tower.state_dict(), directory / "model.safetensors")
    pq.write_table(pa.table({"item_id": np.arange(num_items)}), directory / "items.parquet")
    facts = {
        "model": settings, "features": [], "user_features": [], "actions": [""], "first_item_row": 2,
        "max_history": 1_000_000, "log_columns": ["user_id", "item_id", "timestamp"], "time_range": None,
    }  # fmt: skip
    (directory / "scorer.json").write_text(json.dumps(facts))
    write_checksums(directory)


if __name__ == "__main__":
    main()
