"""A state of constant size for RecGRELA's causal form, updated with one event per step.

    outer += KR_n^T V_n        key += Kt_n        O_n = QR_n (outer / n) / (Qt_n . key / n + 1e-6)     per layer, head

The state after n events equals what the causal form (recgrela.py) computes from a window of the same n events. A window
holds at most max_length events and forgets earlier ones, whereas a state reads the complete history and its positions
keep counting: scores depend on differences of positions, and differences beyond max_length never occur in training.
To forget as a window does, build a new state from the latest max_length events.
The letters are those of models/interface.py; X counts users, L layers, E = D / H the width of a head.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from models.recgrela import KERNEL, MASS_EPS, GrelaLayer, RecGrela


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecGrelaState:
    """The state of X users; `add` returns a new one. Plain tensors, at least float32 except tail and state."""

    count_X: Tensor
    """[X] int64: number of events so far."""
    outer_XLHEE: Tensor
    """The sum of KR^T V over the events."""
    key_XLD: Tensor
    """The sum of Kt over the events."""
    tail_XL3D: Tensor
    """The values V of the last three events, oldest first, for the convolution. Zero for missing events."""
    state_XD: Tensor
    """The result of `request_states` for a request at this point of the history."""

    @staticmethod
    def empty(model: RecGrela, num_users: int) -> RecGrelaState:
        """The state of users without events. ValueError: the model is not causal, or is in training mode."""
        config = model.config
        if not model.causal:
            raise ValueError("form = published reads later positions too: a state needs form = causal")
        if model.training:
            raise ValueError("the model is in training mode, so dropout would enter the state: call eval() first")
        padding_D = model.padding_D
        sums = {"dtype": torch.promote_types(padding_D.dtype, torch.float32), "device": padding_D.device}
        users, layers, width = num_users, config.num_layers, config.width
        head = width // config.num_heads
        nothing = RecGrelaState(
            count_X=torch.zeros(users, dtype=torch.int64, device=padding_D.device),
            outer_XLHEE=torch.zeros(users, layers, config.num_heads, head, head, **sums),
            key_XLD=torch.zeros(users, layers, width, **sums),
            tail_XL3D=padding_D.new_zeros(users, layers, KERNEL - 1, width),
            state_XD=padding_D.expand(users, width),
        )
        # Without events a request reads one padding vector, which later events do not see.
        return dataclasses.replace(nothing, state_XD=nothing.add(model, nothing.state_XD).state_XD)

    @torch.no_grad()
    def add(self, model: RecGrela, vector_XD: Tensor) -> RecGrelaState:
        """The state after one more event of each user; `vector_XD` are the item vectors of the events."""
        state_XD = model.norm(vector_XD)
        outers, keys, tails = [], [], []
        for i, layer in enumerate(model.layers):
            assert isinstance(layer, GrelaLayer)
            parts = layer.parts(state_XD, self.count_X)
            num_heads = layer.num_heads
            query_XHE, key_XHE, turned_query_XHE, turned_key_XHE, value_XHE = (
                part_XD.to(parts.query.dtype).unflatten(1, (num_heads, -1))
                for part_XD in (parts.query, parts.key, parts.rotated_query, parts.rotated_key, parts.value)
            )
            outer_XHEE = self.outer_XLHEE[:, i] + turned_key_XHE[..., :, None] * value_XHE[..., None, :]
            key_XD = self.key_XLD[:, i] + key_XHE.flatten(1)
            count_X11 = (self.count_X + 1)[:, None, None].to(key_XD.dtype)
            mass_XH1 = (query_XHE * key_XD.unflatten(1, (num_heads, -1)) / count_X11).sum(2, keepdim=True) + MASS_EPS
            found_XHE = (turned_query_XHE[..., None, :] @ outer_XHEE).squeeze(2) / count_X11 / mass_XH1
            mixed_XD = found_XHE.flatten(1).to(state_XD.dtype)
            context_X4D = torch.cat([self.tail_XL3D[:, i], parts.value[:, None]], 1)
            if layer.local is not None:
                mixed_XD = mixed_XD + layer.local_mix(context_X4D)[:, 0]
            state_XD = layer.finish(state_XD, mixed_XD, gate=parts.gate)
            outers.append(outer_XHEE)
            keys.append(key_XD)
            tails.append(context_X4D[:, 1:])
        return RecGrelaState(
            count_X=self.count_X + 1,
            outer_XLHEE=torch.stack(outers, 1),
            key_XLD=torch.stack(keys, 1),
            tail_XL3D=torch.stack(tails, 1),
            state_XD=state_XD,
        )

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, contiguous, for saving; `RecGrelaState(**tensors)` restores the state."""
        return {field.name: getattr(self, field.name).contiguous() for field in dataclasses.fields(self)}
