"""How close to low rank users' histories are under a trained model: the share of energy in the first r interests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from jobs.training.catalogue import Catalogue
from jobs.training.evaluation import evaluation_loader
from jobs.training.model import ItemRows, training_input
from models.prior import PriorModel, bare_tower
from models.solar import Solar
from pipeline.batches.requests import RequestConfig
from pipeline.shards.dataset import Shards

QUANTILES = (0.1, 0.5, 0.9)
MAX_REQUESTS = 2000


def energy_by_rank(
    tower: nn.Module, tables: ItemRows, shards: Shards, *, catalogue: Catalogue, requests: RequestConfig, part: str
) -> dict[str, Any] | None:
    """Quantiles over histories of the cumulative share of energy at ranks 1..R; None if the model has no decomposition.

    A collective: all ranks take part and get the same result.
    """
    bare = bare_tower(tower)
    if not isinstance(bare, Solar) or not bare.config.interests:
        return None
    loader = evaluation_loader(shards, requests=requests, part=part, limit=MAX_REQUESTS)
    tower.eval()
    local = []
    for batch in loader:
        with torch.no_grad():
            inputs = training_input(catalogue.translate(batch), tables)
            interests, _ = bare.interests(tower.weighed(inputs) if isinstance(tower, PriorModel) else inputs)
        energy_K = interests.energy_K[1:].double()
        share_KR = (interests.singular_KR[1:].double() ** 2).cumsum(1) / energy_K[:, None].clamp_min(1e-30)
        local.append(share_KR[energy_K > 0].cpu().numpy())
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, local)
    parts = [share for shares in gathered for share in shares if len(share)]
    if not parts:
        return None
    share_KR = np.concatenate(parts)
    return {
        "histories": len(share_KR),
        "rank": list(range(1, share_KR.shape[1] + 1)),
        "quantiles": {str(q): np.quantile(share_KR, q, axis=0).tolist() for q in QUANTILES},
    }
