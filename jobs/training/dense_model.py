"""The dense half of a model in training: the tower in its DeepSpeed engine and, beside it, the prior.

The prior has a few parameters of another scale, so it has its own optimizer, and its gradient is clipped by itself: in
the engine one norm and one rate would tie it to the tower. Every rank has a copy, and its gradient is averaged.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jobs.cluster.parallel import ParallelConfig
from jobs.training.dense_engine import dense_engine
from jobs.training.dense_state import (
    MOMENTS,
    DenseFragment,
    create_moments,
    local_dense_state,
    restore_dense_state,
)
from jobs.training.optimizers import OptimizerConfig
from models.prior import PRIOR_PREFIX, Prior, PriorModel

PRIOR_LR = 0.001
"""Peak learning rate of the prior, which starts at its best fit: so small that it follows the model."""
PRIOR_CLIP = 1.0


class DenseModel:
    """`model` computes logits; a step is `begin_step`, `model`, `backward`, `end_step`, all of them collectives."""

    def __init__(self, model: nn.Module, *, optimizer: OptimizerConfig, parallel: ParallelConfig) -> None:
        """`model`: a tower, or a PriorModel of one. A collective."""
        tower = model.tower if isinstance(model, PriorModel) else model
        self.engine: Any = dense_engine(tower, optimizer=optimizer, parallel=parallel)
        self.model: nn.Module = self.engine
        self._dense_lr = optimizer.dense_lr
        self._prior: Prior | None = None
        self._adamw: torch.optim.AdamW | None = None
        if isinstance(model, PriorModel):
            self.model = PriorModel(self.engine, model.prior, model.counters).to(self.engine.device)
            self._prior = model.prior
            self._adamw = torch.optim.AdamW(model.prior.parameters(), betas=optimizer.betas, weight_decay=0.0)

    @property
    def starts_at_prior(self) -> bool:
        """Whether the model is of use before its first step."""
        return self._prior is not None

    def create_state(self) -> None:
        """Create the optimizers' state, so that it can be stored before the first step. A collective."""
        create_moments(self.engine, num_steps=0)
        named = self._prior.named_parameters() if self._prior is not None else ()
        zeros = {f"{PRIOR_PREFIX}{name}/{moment}": torch.zeros_like(each) for name, each in named for moment in MOMENTS}
        self._restore_prior(zeros, num_steps=0)

    def begin_step(self, lr_share: float) -> None:
        """Set the learning rates of the next step, as a share of their peaks. Not a collective."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self._dense_lr * lr_share
        if self._adamw is not None:
            self._adamw.param_groups[0]["lr"] = PRIOR_LR * lr_share

    def backward(self, loss: Tensor) -> None:
        """Compute all gradients of a loss that the ranks average."""
        self.engine.backward(loss)

    def end_step(self) -> None:
        """Update tower and prior."""
        self.engine.step()
        if self._prior is None or self._adamw is None:
            return
        parameters = list(self._prior.parameters())
        flat = torch.cat([torch.zeros_like(each) if each.grad is None else each.grad for each in parameters])
        dist.all_reduce(flat)
        for parameter, gradient in zip(parameters, flat.split([len(each) for each in parameters]), strict=True):
            parameter.grad = gradient / dist.get_world_size()
        nn.utils.clip_grad_norm_(parameters, PRIOR_CLIP)
        self._adamw.step()
        self._adamw.zero_grad()

    def local_state(self) -> list[DenseFragment]:
        """This rank's part of every parameter and its moments, as dense_state.py describes. Not a collective."""
        return local_dense_state(self.engine) + self._prior_state()

    def _prior_state(self) -> list[DenseFragment]:
        """The prior's fragments: those of rank 0 have all values, those of the others none."""
        if self._prior is None or self._adamw is None:
            return []
        found = []
        for (name, parameter), moment in itertools.product(self._prior.named_parameters(), (None, *MOMENTS)):
            tensor = self._adamw.state[parameter][moment] if moment else parameter
            values = tensor.detach().to("cpu", torch.float32, copy=True) if dist.get_rank() == 0 else torch.zeros(0)
            key = f"{PRIOR_PREFIX}{name}/{moment}" if moment else f"{PRIOR_PREFIX}{name}"
            found.append(DenseFragment(key, parameter.shape, 0, values))
        return found

    def restore_state(self, state: Mapping[str, Tensor], *, num_steps: int) -> None:
        """Restore the optimizers' state after `num_steps` steps; weights were loaded before. A collective."""
        restore_dense_state(self.engine, state, num_steps=num_steps)
        self._restore_prior(state, num_steps=num_steps)

    def _restore_prior(self, state: Mapping[str, Tensor], *, num_steps: int) -> None:
        if self._prior is None or self._adamw is None:
            return
        for name, parameter in self._prior.named_parameters():
            moments = {moment: state[f"{PRIOR_PREFIX}{name}/{moment}"].to(parameter.device) for moment in MOMENTS}
            self._adamw.state[parameter] = {"step": torch.tensor(float(num_steps)), **moments}

    def destroy(self) -> None:
        """Free the engine: its hooks hold it from C++."""
        self.engine.destroy()
