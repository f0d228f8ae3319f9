"""Read and write the tower's weights and AdamW moments through a DeepSpeed engine, at any ZeRO stage.

ZeRO keeps fp32 weights and moments in flat partitions. The functions here read and write whole named parameters
instead, so that a checkpoint written at one stage and world size loads at any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclasses.dataclass(frozen=True)
class DenseFragment:
    """This rank's part of one tensor."""

    key: str
    """`NAME` of a parameter, or `NAME/exp_avg`."""
    shape: torch.Size
    """Shape of the whole tensor."""
    start: int
    """Index of the first of `values` in the flattened tensor."""
    values: Tensor
    """[number of values, may be 0] fp32 on the CPU, a copy."""


def local_dense_state(engine: Any) -> list[DenseFragment]:
    """This rank's part of every parameter and its moments, in the same order on all ranks. Not a collective.

    At least one optimizer step must have been made before, or `create_moments`.
    """
    _link_moments(engine)
    return [
        DenseFragment(key, getattr(parameter, "ds_shape", parameter.shape), start, _copied(values))
        for name, parameter in engine.module.named_parameters()
        for key, start, values in _parts(engine, name, parameter)
    ]


def gather_dense_state(
    fragments: Iterable[DenseFragment], *, group: dist.ProcessGroup | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(key, whole fp32 tensor) from the parts of all ranks, one at a time, on every rank. A collective of `group`."""
    for fragment in fragments:
        whole = torch.zeros(fragment.shape.numel())
        whole[fragment.start : fragment.start + fragment.values.numel()] = fragment.values
        dist.all_reduce(whole, group=group)
        yield fragment.key, whole.reshape(fragment.shape)


def _parts(engine: Any, name: str, parameter: Tensor) -> Iterator[tuple[str, int, Tensor]]:
    """(key, start, values) of a parameter and its moments on this rank."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    stage = engine.zero_optimization_stage() if engine.zero_optimization() else 0
    for moment in (None, *MOMENTS):
        key = f"{name}/{moment}" if moment else name
        if stage == 3:
            values = (
                safe_get_local_optimizer_state(parameter, moment) if moment else safe_get_local_fp32_param(parameter)
            ).flatten()
            start = values.numel() * dist.get_rank()
            # The last ranks' partitions are padded.
            yield key, start, values[: max(0, parameter.ds_numel - start)]  # type: ignore[attr-defined]
        elif stage in (1, 2):
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                yield key, 0, torch.zeros(0)
            else:
                yield key, mapping.lp_fragment_address.start, mapping.get_hp_fragment(moment)
        elif dist.get_rank() == 0:
            yield key, 0, (engine.optimizer.state[parameter][moment] if moment else parameter).flatten()
        else:
            yield key, 0, torch.zeros(0)


def _copied(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float32, copy=True)


def restore_dense_state(engine: Any, state: Mapping[str, Tensor], *, num_steps: int) -> None:
    """Restore the state that `gather_dense_state` yielded after `num_steps` optimizer steps. A collective.

    The module's own (possibly bf16) weights must be loaded before `deepspeed.initialize`.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    create_moments(engine, num_steps=num_steps)
    stage = engine.zero_optimization_stage() if engine.zero_optimization() else 0
    for name, parameter in engine.module.named_parameters():
        if stage == 3:
            _restore_partition(parameter, name, state)
        elif stage in (1, 2):
            safe_set_full_fp32_param(parameter, state[name])
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, state[f"{name}/{moment}"], moment)
        else:
            for moment in MOMENTS:
                engine.optimizer.state[parameter][moment].copy_(state[f"{name}/{moment}"])


def create_moments(engine: Any, *, num_steps: int) -> None:
    """Create the tensors of AdamW's state, all zero, which AdamW itself creates only in its first step."""
    zero = engine.optimizer
    adamw = getattr(zero, "optimizer", zero)
    stage3_partitions = getattr(zero, "fp32_partitioned_groups_flat", None)
    partitions = stage3_partitions or [tensor for group in adamw.param_groups for tensor in group["params"]]
    for partition in partitions:
        adamw.state[partition] = {"step": torch.tensor(float(num_steps))}
        for moment in MOMENTS:
            adamw.state[partition][moment] = torch.zeros_like(partition, memory_format=torch.preserve_format)
    _link_moments(engine)


def _link_moments(engine: Any) -> None:
    """Point ZeRO-1/2's per-parameter views at the moments.

    DeepSpeed itself links all parameter groups after the step of the first one, when the others have no moments yet.
    """
    zero = engine.optimizer
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _restore_partition(parameter: Tensor, name: str, state: Mapping[str, Tensor]) -> None:
    """Restore this rank's ZeRO-3 partition of a parameter and its moments.

    DeepSpeed's own setter slices past the end of a parameter whose size is not a multiple of the world size.
    """
    from deepspeed.utils import (
        safe_get_local_fp32_param,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    size = safe_get_local_fp32_param(parameter).numel()
    first = size * dist.get_rank()

    def partition(key: str) -> Tensor:
        whole = state[key].flatten()
        padded = torch.zeros(size * dist.get_world_size())
        padded[: whole.numel()] = whole
        return padded[first : first + size]

    safe_set_local_fp32_param(parameter, partition(name))
    for moment in MOMENTS:
        safe_set_local_optimizer_state(parameter, partition(f"{name}/{moment}"), moment)
