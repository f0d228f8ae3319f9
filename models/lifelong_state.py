"""A state of constant size for a user's lifelong history between two trainings: the Gram matrix of the events.

    G = sum_n w_n x_n x_n^T        s = sum_n w_n x_n        w = sum_n w_n        w_n = 2^(-age_n / half_life)

Events can be added one by one and removed again, and states of several periods or devices can be merged. The interests
equal those of the whole history (svd_attention.py). Adding costs O(D^2) per event, interests cost one decomposition.
The vectors x_n depend on the model, so a state has the model's digest and cannot be combined with another model's.
The letters are those of models/interface.py; n counts the events of one call, P the entries of a triangle.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.svd_attention import Decomposition, Interests, interests_from_gram

REMOVED_SHARE = 0.5
"""Share of the mass (sum of squares) of all added events that may be removed before the state is recomputed. A
difference keeps the rounding error of the larger sum, so with 0.5 the relative error at most doubles."""


class StateError(ValueError):
    """A state cannot be used in this way. The message is one line with the value and the fix."""


@dataclasses.dataclass(frozen=True)
class LifelongState:
    """One user's state; every operation returns a new one. All sums are float64 on the host."""

    gram_DD: Tensor
    """[D, D] symmetric."""
    sum_D: Tensor
    """[D]."""
    weight: float
    """The sum of the weights; without decay the number of events."""
    mass: float
    """The trace that the Gram would have if nothing had been removed since the state was last computed from events."""
    digest: str
    """Digest of the model that made the event vectors."""
    half_life: float = 0.0
    """In events; 0 = no decay."""

    @staticmethod
    def empty(width: int, *, digest: str, half_life: float = 0.0) -> LifelongState:
        """The state of a user without events."""
        if width < 1:
            raise StateError(f"width = {width} must be at least 1")
        if not 0 <= half_life < float("inf"):
            raise StateError(f"half_life = {half_life} must be a number of events, or 0 for no decay")
        zeros = torch.zeros(width, width, dtype=torch.float64)
        return LifelongState(zeros, zeros[0].clone(), 0.0, 0.0, digest, half_life)

    @staticmethod
    def of_events(event_nD: Tensor, *, digest: str, half_life: float = 0.0) -> LifelongState:
        """The state of a whole history, oldest event first."""
        return LifelongState.empty(event_nD.shape[-1], digest=digest, half_life=half_life).add(event_nD)

    def add(self, event_nD: Tensor) -> LifelongState:
        """The state with these events added, oldest first. StateError: another width, or a vector is not finite."""
        event_nD = self._checked(event_nD)
        weight_n = self._weights(torch.arange(event_nD.shape[0] - 1, -1, -1))
        before = self.decay(event_nD.shape[0])
        weighted_nD = event_nD * weight_n[:, None]
        return dataclasses.replace(
            before,
            gram_DD=before.gram_DD + _symmetric(weighted_nD.T @ event_nD),
            sum_D=before.sum_D + weighted_nD.sum(0),
            weight=before.weight + float(weight_n.sum()),
            mass=before.mass + float((weighted_nD * event_nD).sum()),
        )

    def merge(self, later: LifelongState, *, num_events: int = 0) -> LifelongState:
        """The state of both histories; with decay, `num_events` says how many events of `later` came after ours."""
        if later.digest != self.digest:
            raise StateError(f"states of models {later.digest} and {self.digest} cannot be merged; recompute one")
        if later.half_life != self.half_life or later.sum_D.numel() != self.sum_D.numel():
            raise StateError(
                f"states of half_life {self.half_life} and width {self.sum_D.numel()}, and of {later.half_life} and "
                f"{later.sum_D.numel()}, cannot be merged: recompute one of them"
            )
        before = self.decay(num_events)
        return dataclasses.replace(
            before,
            gram_DD=before.gram_DD + later.gram_DD,
            sum_D=before.sum_D + later.sum_D,
            weight=before.weight + later.weight,
            mass=before.mass + later.mass,
        )

    def remove(
        self, event_nD: Tensor, *, remaining: Callable[[], Tensor], age_n: Tensor | None = None
    ) -> LifelongState:
        """The state without these events. With decay, `age_n` is the number of events after each.

        `remaining` returns the vectors of all other events, oldest first. It is called when more than REMOVED_SHARE of
        the mass has been removed: the state is then recomputed from these events, as if their ages were consecutive.
        """
        event_nD = self._checked(event_nD)
        if self.half_life and age_n is None:
            raise StateError(f"half_life = {self.half_life}: removal needs age_n, the number of events after each")
        weight_n = self._weights(torch.zeros(event_nD.shape[0]) if age_n is None else age_n)
        weighted_nD = event_nD * weight_n[:, None]
        gram_DD = self.gram_DD - _symmetric(weighted_nD.T @ event_nD)
        if float(gram_DD.trace()) < (1 - REMOVED_SHARE) * self.mass:
            return LifelongState.of_events(remaining(), digest=self.digest, half_life=self.half_life)
        return dataclasses.replace(
            self,
            gram_DD=gram_DD,
            sum_D=self.sum_D - weighted_nD.sum(0),
            weight=max(self.weight - float(weight_n.sum()), 0.0),
        )

    def decay(self, num_events: int) -> LifelongState:
        """The state `num_events` events later, as if they had left no trace; the same where half_life is 0."""
        factor = 2.0 ** (-num_events / self.half_life) if self.half_life else 1.0
        if factor == 1.0:
            return self
        return dataclasses.replace(
            self,
            gram_DD=self.gram_DD * factor,
            sum_D=self.sum_D * factor,
            weight=self.weight * factor,
            mass=self.mass * factor,
        )

    def interests(self, how: Decomposition) -> Interests:
        """The interests (K = 1) of the events in the state."""
        return interests_from_gram(
            self.gram_DD[None],
            sum_KD=self.sum_D[None],
            weight_K=torch.tensor([self.weight], dtype=torch.float64),
            how=how,
        )

    def serving_interests(self, how: Decomposition) -> Tensor:
        """interest_RD in float16 for a cache: 2 R D bytes per user. The relative error of an entry is at most 2^-11."""
        interest_RD = self.interests(how).interest_KRD[0]
        largest = float(interest_RD.abs().max()) if interest_RD.numel() else 0.0
        if largest > torch.finfo(torch.float16).max:
            raise StateError(f"an interest reaches {largest:.3g}, above float16's 65504: normalise the event vectors")
        return interest_RD.half()

    def save(self, path: Path) -> None:
        """Write the state: 8 P + 8 D bytes and a header, P = D (D + 1) / 2."""
        rows, columns = _triangle(self.sum_D.numel())
        facts = {key: getattr(self, key) for key in ("weight", "mass", "digest", "half_life")}
        temporary = path.with_name(f".{path.name}.tmp")
        save_file(
            {"gram_P": self.gram_DD[rows, columns].contiguous(), "sum_D": self.sum_D.contiguous()},
            temporary,
            metadata={"lifelong_state": json.dumps(facts)},
        )
        temporary.replace(path)

    @staticmethod
    def load(path: Path, *, digest: str) -> LifelongState:
        """The saved state. StateError: the file is not a complete state, or is the state of another model."""
        try:
            with safe_open(path, framework="pt") as tensors:
                facts = json.loads((tensors.metadata() or {})["lifelong_state"])
                packed_P, sum_D = tensors.get_tensor("gram_P"), tensors.get_tensor("sum_D")
        except (OSError, SafetensorError, KeyError) as error:
            raise StateError(f"{path}: not a complete lifelong state; compute it from the user's events") from error
        if facts["digest"] != digest:
            raise StateError(f"{path}: state of model {facts['digest']}, not of {digest}; compute it from the events")
        rows, columns = _triangle(sum_D.numel())
        gram_DD = torch.zeros(sum_D.numel(), sum_D.numel(), dtype=torch.float64)
        gram_DD[rows, columns] = packed_P
        gram_DD[columns, rows] = packed_P
        return LifelongState(gram_DD, sum_D, **facts)

    def _checked(self, event_nD: Tensor) -> Tensor:
        width = self.sum_D.numel()
        if event_nD.dim() != 2 or event_nD.shape[1] != width:
            raise StateError(f"events of shape {list(event_nD.shape)} do not fit a state of width {width}")
        if not torch.isfinite(event_nD).all():
            raise StateError("an event vector is not finite: nothing was changed; check the model's weights")
        return event_nD.detach().double().cpu()

    def _weights(self, age_n: Tensor) -> Tensor:
        return torch.exp2(-age_n.double() / self.half_life) if self.half_life else torch.ones_like(age_n).double()


def _symmetric(value_DD: Tensor) -> Tensor:
    return (value_DD + value_DD.T) / 2


def _triangle(width: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(width, width).unbind(0)
    return rows, columns
