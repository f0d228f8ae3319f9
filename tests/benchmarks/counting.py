"""What counting alone says of a recipe's requests, without training: counters as of the last complete day before a
request beside counters exact to the millisecond.

    python tests/benchmarks/counting.py movielens-100k-impressions [--workspace DIR] [--parts valid test]

Needs the recipe's shards: run `solar run RECIPE` once. Prints the primary metric, LogLoss and the fitted prior of each.
"""

from __future__ import annotations

import argparse
import time

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from jobs.config.reader import load_config
from jobs.runs.run_dir import open_shards
from jobs.training.baselines import baselines
from jobs.training.catalogue import catalogue_of, training_counts
from jobs.training.evaluation import evaluate, evaluate_baseline, evaluation_loader
from jobs.training.item_counting import count_items
from jobs.training.prior_fit import fit_prior
from jobs.training.results import primary_metric
from models.embeddings import UserCodes
from models.interface import Recommender
from models.item_counters import MS_PER_DAY
from models.prior import Prior, PriorAlone, PriorModel
from pipeline.batches.loader import TrainLoader

RESOLUTIONS = {"last complete day": MS_PER_DAY, "exact": 1}


class NoRows:
    """Item rows of width 0: the prior reads none."""

    def look_up(self, item_rows_I, /):
        return item_rows_I.new_zeros(len(item_rows_I), 0).float(), item_rows_I.new_zeros(len(item_rows_I), 0, 0).float()

    def look_up_with_users(self, item_rows_I, users: UserCodes, /):
        return *self.look_up(item_rows_I), item_rows_I.new_zeros(users.lengths_UG.shape[0], 0, 0).float()


def main() -> None:
    parser = argparse.ArgumentParser(description="What counting alone says of a recipe's requests.")
    parser.add_argument("recipe")
    parser.add_argument("--workspace", default="workspace")
    parser.add_argument("--parts", nargs="+", default=["valid", "test"])
    options = parser.parse_args()
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    config = load_config("train", options.recipe, ["--workspace", options.workspace])
    shards, requests = open_shards(config), config.data.requests
    counts = training_counts(shards, requests=requests)
    catalogue = catalogue_of(shards, requests=requests, training_count=counts)
    loader = TrainLoader(shards, requests=requests, loader=config.data.loader, seed=config.seed, item_counts=counts)

    def tell(name: str, part: str, metrics: dict[str, float], beside: str = "") -> None:
        names = [name for name in (primary_metric(requests), "auc", "logloss") if name in metrics]
        print(
            f"{name:<18} {part:<6} " + "  ".join(f"{each} {metrics[each]:.4f}" for each in names) + beside, flush=True
        )

    for part in options.parts:
        asked = evaluation_loader(shards, requests=requests, part=part)
        for name in baselines(requests):
            tell(name, part, evaluate_baseline(name, asked, catalogue=catalogue, shards=shards).metrics())
    for name, day_ms in RESOLUTIONS.items():
        started = time.perf_counter()
        counters = count_items(shards, min_label=requests.least_label, evidence=counts, day_ms=day_ms)
        counted, prior = time.perf_counter() - started, Prior(requests.task)
        fit_prior(prior, counters, loader, requests=requests, num_items=shards.vocabulary.size, seed=config.seed)
        seconds = time.perf_counter() - started - counted
        fitted = {key: [round(x, 3) for x in value.tolist()] for key, value in prior.state_dict().items()}
        print(
            f"{name}: {counters.key_K.numel():,} pairs counted in {counted:.1f} s, fitted in {seconds:.1f} s: {fitted}"
        )
        model = PriorAlone(PriorModel(Recommender(), prior, counters))
        for part in options.parts:
            asked = evaluation_loader(shards, requests=requests, part=part)
            tell(f"prior, {name}", part, evaluate(model, NoRows(), asked, catalogue=catalogue).metrics())


if __name__ == "__main__":
    main()
