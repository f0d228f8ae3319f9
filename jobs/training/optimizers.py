"""The optimizers of both halves: AdamW for the tower, row-wise Adagrad or Adam for the tables."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from torch import nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Learning rates, decay and clipping."""

    dense_lr: float = 1e-3
    """Peak learning rate of AdamW (tower)."""
    sparse: Literal["rowwise_adagrad", "adam"] = "rowwise_adagrad"
    """Of the tables. rowwise_adagrad: one number a row, for any size; adam: two a weight, and a gradient of the whole
    table, as published sequence models have it."""
    sparse_lr: float = 0.1
    """Peak learning rate of the tables; for adam about 0.001."""
    warmup_steps: int = 100
    """Steps over which both rates rise linearly from 0."""
    final_lr_ratio: float = 0.02
    """Both rates fall linearly to this share of their peak at the end of training."""
    weight_decay: float = 0.01
    """AdamW's decay of the tower's matrices; vectors (biases, norms, temperatures) are not decayed."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Moment decays of AdamW, and of adam for the tables."""
    dense_eps: float = 1e-8
    """AdamW's denominator offset."""
    sparse_eps: float = 1e-8
    """Denominator offset of the tables' optimizer."""
    clip_norm: float = 1.0
    """Global norm to which the tower's gradient is clipped; 0 = off. Tables are not clipped."""

    def __post_init__(self) -> None:
        if self.sparse not in ("rowwise_adagrad", "adam"):
            raise ValueError(f"sparse={self.sparse!r}: must be rowwise_adagrad or adam")
        for name in ("dense_lr", "sparse_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more")
        if not 0 <= self.final_lr_ratio <= 1:
            raise ValueError(f"final_lr_ratio={self.final_lr_ratio}: must be between 0 and 1")

    def parameter_groups(self, tower: nn.Module) -> list[dict[str, Any]]:
        """Two AdamW groups: matrices with weight decay, everything else without."""
        matrices = [parameter for parameter in tower.parameters() if parameter.ndim >= 2]
        vectors = [parameter for parameter in tower.parameters() if parameter.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def lr_share_at(self, step: int, *, share_done: float) -> float:
        """The share of the peak rates in step `step` (from 0), that share of the training behind it: no state."""
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warmup * (1 - (1 - self.final_lr_ratio) * share_done)
