"""What a training run is to do: plain values that travel to every worker."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jobs.cluster.parallel import ParallelConfig
from jobs.host.places import Place
from jobs.training.checkpoint import CheckpointConfig
from jobs.training.optimizers import OptimizerConfig
from pipeline.batches.loader import LoaderConfig
from pipeline.batches.requests import RequestConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long to train, on what loss, and how often to look."""

    epochs: int = 10
    """Passes over all training requests."""
    loss: Literal["candidates", "catalogue"] = "candidates"
    """candidates: over each request's positives and negatives, weighed by the next two. catalogue: softmax over all
    items, for next_item and sequence models, whose requests are vectors; without data.requests.num_negatives."""
    pointwise_loss_weight: float = 1.0
    """Weight of the binary cross-entropy; 0 leaves the softmax over the drawn candidates."""
    set_loss_weight: float = 1.0
    """Weight of the set-wise softmax cross-entropy; 0 leaves the binary one."""
    gbce_strength: float = 0.0
    """t of gBCE (Petrov and Macdonald, RecSys 2023), from 0 (plain) to 1: how far positives weigh less in the binary
    cross-entropy to make up for negatives that are few."""
    log_q: bool = False
    """next_item: correct the loss for what negatives are drawn from; logits then estimate log p(item | history)."""
    embedding_std: float = 0.02
    """Standard deviation of an untrained embedding row."""
    eval_every_epochs: int = 1
    """Epochs between validations (and checkpoints); the best one is what is evaluated and registered."""
    valid_requests: int = 2000
    """Validation requests, the same ones each time; 0 = all."""
    patience: int = 0
    """Validations without a better one after which training ends; 0 = it goes on to the last epoch."""
    max_seconds: float = 0.0
    """Seconds of training steps, over all restarts, after which training ends with a validation; 0 = no limit. The
    learning rates end their fall there where this comes before the last step."""
    warm_start: Place | None = None
    """A checkpoint, or a run's directory (its best checkpoint), that a new run begins from instead of from the seed:
    weights and optimizer state; steps, learning rates and data begin anew. Rows it lacks are drawn from the seed."""

    def __post_init__(self) -> None:
        for name in ("epochs", "eval_every_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be 1 or more")
        if not self.embedding_std > 0:
            raise ValueError(f"embedding_std={self.embedding_std}: must be above 0")
        for name in ("pointwise_loss_weight", "set_loss_weight", "valid_requests", "patience", "max_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more")
        if self.loss not in ("candidates", "catalogue"):
            raise ValueError(f"loss={self.loss!r}: must be candidates or catalogue")
        if not self.pointwise_loss_weight + self.set_loss_weight > 0:
            raise ValueError(
                "set_loss_weight=0: must be above 0 where pointwise_loss_weight is 0, or nothing is learned"
            )
        if not 0 <= self.gbce_strength <= 1:
            raise ValueError(f"gbce_strength={self.gbce_strength}: must be from 0 to 1")

    def share_done(self, *, step: int, num_steps: int, seconds: float) -> float:
        """Share of the training that is behind after so many steps and seconds of steps, from 0 to 1."""
        shares = [step / max(1, num_steps), seconds / self.max_seconds if self.max_seconds else 0.0]
        return min(1.0, max(shares))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Everything a worker needs; plain values, so that it travels."""

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
    """The checkpoint that a run without one of its own begins from; None = it begins from the seed."""
