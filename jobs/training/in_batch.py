"""In-batch negatives: drawn from the positives of the whole global batch, of all ranks.

The ranks exchange their positives in every step. The draw depends only on the pool (a set of items with counts) and on
(seed, epoch, user, request), so it is the same at every world size. Negatives add no item to the batch's look-up.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.batches.batch import Batch
from pipeline.batches.negatives import Weighted, draw_keys, log_expected_draws, with_negatives
from pipeline.batches.requests import RequestConfig


class InBatchNegatives:
    """Adds negatives to the batches of a loader if `requests.negatives` is in_batch; else returns them unchanged."""

    def __init__(self, requests: RequestConfig, *, item_counts: np.ndarray, seed: int) -> None:
        """item_counts: the result of `training_item_counts`, about how often an item is in the pools of an epoch."""
        enabled = requests.negatives == "in_batch"
        self._number, self._seed = requests.num_negatives, seed
        self._expected_proposal = Weighted.popularity(item_counts, power=1.0) if enabled else None

    def __call__(self, batch: Batch) -> Batch:
        """The batch with negatives after the positives. A collective: all ranks take part, also with an empty batch.

        A request gets no negatives if the pool holds only its own positives (a batch of one request).
        """
        if self._expected_proposal is None:
            return batch
        drawn = with_negatives(
            batch.candidate_item.numpy(),
            batch.candidate_offsets.numpy(),
            keys=draw_keys(
                seed=self._seed,
                epoch=batch.epoch,
                user=batch.user[batch.request_user].numpy(),
                request=batch.request_key.numpy(),
            ),
            proposal=Weighted.pool(gather_rows(batch.candidate_item).numpy()),
            num_negatives=self._number,
        )
        log_q = log_expected_draws(drawn, proposal=self._expected_proposal, num_negatives=self._number)
        return dataclasses.replace(
            batch,
            candidate_item=torch.from_numpy(drawn.item),
            candidate_label=torch.from_numpy(drawn.label),
            candidate_offsets=torch.from_numpy(drawn.offsets),
            candidate_log_q=torch.from_numpy(log_q),
        )


def gather_rows(rows: Tensor) -> Tensor:
    """The int64 vectors of all ranks, concatenated in the order of ranks. A collective."""
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([rows.numel()]))
    longest = max(int(size) for size in sizes)
    padded = [torch.zeros(longest, dtype=torch.int64) for _ in sizes]
    dist.all_gather(padded, torch.nn.functional.pad(rows, (0, longest - rows.numel())))
    return torch.cat([part[: int(size)] for part, size in zip(padded, sizes, strict=True)])
