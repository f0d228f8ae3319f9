"""The description of a training run: plain values that are sent to every worker."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jobs.cluster.parallel import ParallelConfig
from jobs.host.places import Place
from jobs.training.optimizers import OptimizerConfig
from pipeline.batches.loader_config import LoaderConfig
from pipeline.batches.requests import RequestConfig

MOST_EPOCHS = 1_000_000
"""All epochs are planned before the first step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long to train, with which loss, and how often to validate."""

    epochs: int = 10
    """Passes over all training requests, from 1 to 1,000,000."""
    loss: Literal["candidates", "catalogue"] = "candidates"
    """candidates: over each request's positives and negatives, with the two weights below. catalogue: softmax over all
    items; only for task next_item, sequence models (their requests are vectors) and data.requests.num_negatives 0."""
    pointwise_loss_weight: float = 1.0
    """loss=candidates: weight of the binary cross-entropy, 0 or more; 0 = only the softmax over the candidates."""
    set_loss_weight: float = 1.0
    """loss=candidates: weight of the softmax cross-entropy over the candidates of a request, 0 or more; 0 = only the
    binary cross-entropy."""
    gbce_strength: float = 0.0
    """t of gBCE (Petrov and Macdonald, RecSys 2023), from 0 (plain cross-entropy) to 1: how much less positives weigh
    in the binary cross-entropy, to compensate for a small number of negatives."""
    log_q: bool = False
    """next_item: correct the loss for the distribution from which negatives are drawn; logits then estimate
    log p(item | history)."""
    embedding_std: float = 0.02
    """Standard deviation of the weights of an untrained embedding row, above 0."""
    eval_every_epochs: int = 1
    """Epochs between validations (each with a checkpoint), 1 or more; the best checkpoint is evaluated and registered.
    """
    valid_requests: int | None = None
    """Number of validation requests, the same ones in all validations of a run; 0 = all. Unset = 2000, or for task
    next_item fewer (200 or more) if these, ranked among all items, would cost more than a tenth of the training between
    two validations."""
    patience: int = 0
    """Training ends after this many validations in sequence without a new best one; 0 = after the last epoch."""
    max_seconds: float = 0.0
    """Seconds of training steps, over all restarts, after which training ends with a validation; 0 = no limit. The
    decay of the learning rates then ends at this time, unless the last step comes first."""
    warm_start: Place | None = None
    """A checkpoint, or a run's directory (its best checkpoint), from which a new run takes its initial weights and
    optimizer state; steps, learning rates and data start from the beginning. Rows that the checkpoint lacks are drawn
    with `seed`. Unset = the run starts from scratch."""

    def __post_init__(self) -> None:
        if not 1 <= self.epochs <= MOST_EPOCHS:
            raise ValueError(f"epochs={self.epochs}: must be from 1 to {MOST_EPOCHS:,}")
        if self.eval_every_epochs < 1:
            raise ValueError(f"eval_every_epochs={self.eval_every_epochs}: must be 1 or more")
        if not self.embedding_std > 0:
            raise ValueError(f"embedding_std={self.embedding_std}: must be above 0")
        for name in ("pointwise_loss_weight", "set_loss_weight", "valid_requests", "patience", "max_seconds"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more")
        if self.loss not in ("candidates", "catalogue"):
            raise ValueError(f"loss={self.loss!r}: must be candidates or catalogue")
        if not self.pointwise_loss_weight + self.set_loss_weight > 0:
            raise ValueError("set_loss_weight=0: must be above 0 if pointwise_loss_weight is 0, or nothing is learned")
        if not 0 <= self.gbce_strength <= 1:
            raise ValueError(f"gbce_strength={self.gbce_strength}: must be from 0 to 1")

    def share_done(self, *, step: int, num_steps: int, seconds: float) -> float:
        """Share of the training, from 0 to 1, that is done after `step` steps that took `seconds`."""
        shares = [step / max(1, num_steps), seconds / self.max_seconds if self.max_seconds else 0.0]
        return min(1.0, max(shares))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    every_steps: int = 0
    """Number of steps between checkpoints, in addition to those at every validation and at the end; 0 = no additional
    ones."""
    every_minutes: float = 10.0
    """Minutes from the latest checkpoint to the next one, in addition to those at every validation; 0 = no additional
    ones. May be a fraction."""
    keep: int = 2
    """Number of latest checkpoints to keep, 1 or more; the best one is always kept."""
    asynchronous: bool = True
    """true: each worker copies its tables in memory, and training continues while the copy is written (needs memory for
    the copy). false: steps wait until the checkpoint is written."""

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise ValueError(f"every_steps={self.every_steps}: must be 0 or more")
        if not self.every_minutes >= 0:
            raise ValueError(f"every_minutes={self.every_minutes}: must be 0 or more")
        if self.keep < 1:
            raise ValueError(f"keep={self.keep}: must be 1 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Everything that a worker needs; plain values, because it is sent between processes."""

    run_dir: str
    shards: str
    manifest: int
    seed: int
    model: dict[str, Any]
    training: TrainingConfig
    requests: RequestConfig
    loader: LoaderConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig
    checkpoint: CheckpointConfig
    facts: dict[str, Any]
    """Stored with every checkpoint: the resolved config and the fingerprints."""
    warm_start: str | None = None
    """The checkpoint from which a run without a checkpoint of its own starts; None = it starts from scratch."""
