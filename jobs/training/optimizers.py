"""The settings of the optimizers of both halves: AdamW for the tower, row-wise Adagrad or Adam for the tables. Without
torch: a command line reads and checks them."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Learning rates, decay and clipping."""

    dense_lr: float = 1e-3
    """Peak learning rate of AdamW, the tower's optimizer; above 0."""
    sparse: Literal["rowwise_adagrad", "adam"] = "rowwise_adagrad"
    """Optimizer of the tables. rowwise_adagrad: keeps one number per row, for tables of any size. adam: keeps two
    numbers per weight and computes a gradient of the whole table, as published sequence models do."""
    sparse_lr: float = 0.1
    """Peak learning rate of the tables, above 0; for adam use about 0.001."""
    warmup_steps: int = 100
    """Number of steps over which both learning rates rise linearly from 0; 0 = no warm-up."""
    final_lr_ratio: float = 0.02
    """Both learning rates fall linearly to this share of their peak at the end of training; from 0 to 1."""
    weight_decay: float = 0.01
    """AdamW's weight decay of the tower's matrices, 0 or more; vectors (biases, norms, temperatures) have none."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of the two moments: of AdamW, and of adam for the tables."""
    dense_eps: float = 1e-8
    """Epsilon in the denominator of AdamW."""
    sparse_eps: float = 1e-8
    """Epsilon in the denominator of the tables' optimizer."""
    clip_norm: float = 1.0
    """Largest global norm of the tower's gradient, to which it is clipped; 0 = no clipping. The gradients of tables are
    not clipped."""

    def __post_init__(self) -> None:
        if self.sparse not in ("rowwise_adagrad", "adam"):
            raise ValueError(f"sparse={self.sparse!r}: must be rowwise_adagrad or adam")
        for name in ("dense_lr", "sparse_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number above 0")
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number of 0 or more")
        if not 0 <= self.final_lr_ratio <= 1:
            raise ValueError(f"final_lr_ratio={self.final_lr_ratio}: must be between 0 and 1")

    def lr_share_at(self, step: int, *, share_done: float) -> float:
        """The learning rates in step `step` (from 0), as a share of their peaks, when `share_done` of the training is
        done. A pure function: schedules have no state to restore."""
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warmup * (1 - (1 - self.final_lr_ratio) * share_done)
