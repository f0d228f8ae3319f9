"""python tests/benchmarks/attention_rank.py RUN [--picture FILE]: what modulates the rank of RecGRELA's attention.

RUN is the directory of a trained RecGRELA run, its data set still in place. The latest events of real users go through
the published form with the trained weights (a causal mask makes any map triangular, so of full rank whatever it is
made of) and with the weights of either branch left out. The rank counts singular values above a share of the largest:
means over layers, heads or units, and users, by the number of events. The maps: tests/support/attention_maps.py.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

# A script's own directory is on the path, the repository's root is not.
sys.path.insert(0, str(Path(__file__).parents[2]))

from jobs.config.reader import stored_config
from jobs.runs.run_dir import best_checkpoint, open_shards
from jobs.training.checkpoint import load_dense, read_state, table_files
from jobs.training.model import model_settings
from models.embeddings import ITEM_TABLE
from models.recgrela import RecGrela
from models.zoo import build_tower
from tests.support.attention_maps import attention_maps, attention_rank

LENGTHS = (8, 16, 32, 64, 128, 200)
EVERY = 4
"""Of the units: the ranks of all of them would take four times as long and say the same."""
ROWS = ("attention alone", "with the convolution", "with the gate", "with both")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--tolerance", type=float, default=0.01, help="share of the largest singular value")
    parser.add_argument("--picture", type=Path, default=None, help="a PNG file; default: none is drawn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, history_ULD = trained_model(options.run, users=options.users)
    print(f"singular values above {options.tolerance:g} of the largest, {len(history_ULD)} users")
    print(f"{'events':<24}" + "".join(f"{row:>24}" for row in ROWS), flush=True)
    ranks: dict[str, list[float]] = {row: [] for row in ROWS}
    for length in LENGTHS:
        found = mean_ranks(model, history_ULD[:, -length:], tolerance=options.tolerance)
        print(f"{length:<24}" + "".join(f"{found[row]:>24.1f}" for row in ROWS), flush=True)
        for row, rank in found.items():
            ranks[row].append(rank)
    if options.picture is not None:
        draw(ranks, options.picture, tolerance=options.tolerance)


@torch.no_grad()
def mean_ranks(model: RecGrela, history_UTD: Tensor, *, tolerance: float) -> dict[str, float]:
    found: dict[str, list[Tensor]] = {row: [] for row in ROWS}
    variants = {ROWS[1]: without(model, "gate"), ROWS[2]: without(model, "local"), ROWS[3]: model}
    for history_TD in history_UTD:
        for row, variant in variants.items():
            for maps in attention_maps(variant, history_TD):
                found[row].append(attention_rank(maps.modulated_DTT[::EVERY], tolerance=tolerance))
                if variant is model:
                    found[ROWS[0]].append(attention_rank(maps.attention_HTT, tolerance=tolerance))
    return {row: float(torch.cat(ranks).double().mean()) for row, ranks in found.items()}


def without(model: RecGrela, branch: str) -> RecGrela:
    """The same weights with one branch left out of every layer."""
    model = copy.deepcopy(model)
    for layer in model.layers:
        setattr(layer, branch, None)
    return model


def trained_model(run: Path, *, users: int) -> tuple[RecGrela, Tensor]:
    """The published form of a run's best weights, and the latest events of users who have as many, in float64."""
    checkpoint = best_checkpoint(run)
    document = read_state(checkpoint)
    config = stored_config("evaluate", document["config"], str(checkpoint), [])
    shards = open_shards(config, number=document["manifest"])
    settings = {**config.model, "form": "published", "max_length": max(LENGTHS)}
    model = build_tower(model_settings(settings, shards.vocabulary), num_features=len(shards.vocabulary.features))
    if not isinstance(model, RecGrela):
        sys.exit(f"{run}: a run of {config.model['name']}; give one of recgrela")
    dense = load_dense(checkpoint)
    model.load_state_dict({name: dense[name] for name, _ in model.named_parameters()})
    row_ID = torch.cat([load_file(file)["weight"] for file in table_files(checkpoint, ITEM_TABLE)]).double()
    histories = []
    for group in range(shards.num_groups):
        events = shards.read(group)
        histories += [
            row_ID[torch.tensor(events.item[end - max(LENGTHS) : end])]
            for first, end in zip(events.offsets[:-1], events.offsets[1:], strict=True)
            if end - first >= max(LENGTHS)
        ]
        if len(histories) >= users:
            break
    if not histories:
        sys.exit(f"{shards.path}: no user has {max(LENGTHS)} events; give a run on longer histories")
    return model.double().eval(), torch.stack(histories[:users])


def draw(ranks: dict[str, list[float]], picture: Path, *, tolerance: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="events", ylabel=f"singular values above {tolerance:g} of the largest")
    for row, values in ranks.items():
        axes.plot(LENGTHS, values, "o-", markersize=3, label=row)
    axes.plot(LENGTHS, LENGTHS, ":", color="grey", label="full")
    axes.set_yscale("log", base=2)
    axes.legend()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
