"""RecGRELA: gated rotary-enhanced linear attention with rank modulation (arXiv 2506.13315), in two forms.

    x = LN(dropout(event rows))                                     then, per layer:
    G = SiLU(X Wg + bg), Y = X Win + bin,  X = LN(x)
    [Q, K] = Y Wqk + bqk,  V = Y,  Qt = elu(Q) + 1,  Kt = elu(K) + 1,  QR, KR = rotary(Qt), rotary(Kt)
    O_h[n] = QR_n (1/L sum_j KR_j^T V_j) / (Qt_n . 1/L sum_j Kt_j + 1e-6)       per head h
    S = SiLU(causal depthwise convolution of V, kernel 4)           rank augmentation
    x += DropPath(((O + S) * G) Wo + bo)                            the gate is the rank selector
    x += MLP(LN(x))                                                 4 D, GELU

published  j runs over all L = max_length positions, including padding, and every prefix is a separate sample, read at
           its last event: as in the authors' public code with two or more layers (with one layer, theirs drops x).
causal     j runs over the events up to n, L is their number, and padding is not an event: all prefixes of a window in
           one pass (running_attention.py). This form is ours and differs from the published one in j and in L.

Positions count from the window's start and are applied before the heads are split; an attention score depends only on
their difference. With width 64 and 4 layers the tower has 217,984 parameters: 128 of the first norm, and per layer 256
of two norms, 3 x 4,160 of gate, input and output, 8,320 of queries and keys, 320 of the convolution, 33,088 of the MLP.
With the 3,417 x 64 table of MovieLens-1M (padding is a row of it) that is the published 436,672.
Identifying the abstract's `augmentation` and `selector` with these two branches is our interpretation.
The letters are those of models/interface.py and models/sequence_tower.py.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.interface import ModelInput
from models.running_attention import events_so_far, join_heads, running_attention, split_heads
from models.sequence_settings import RecGrelaConfig
from models.sequence_tower import (
    FeedForward,
    SequenceModel,
    Windows,
    draw_weights,
)

NORM_EPS = 1e-12
MASS_EPS = 1e-6
ROTARY_BASE = 10_000.0
KERNEL = 4
"""Positions that the convolution reads: the event itself and three before it."""


class RecGrela(SequenceModel):
    """The tower. `num_features` is F, the number of item features of the tables."""

    def __init__(self, config: RecGrelaConfig, *, num_features: int = 0) -> None:
        super().__init__(config, num_features=num_features)
        self.config = config
        self.causal = config.causal
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.layers = nn.ModuleList(GrelaLayer(config) for _ in range(config.num_layers))
        self.apply(draw_weights)

    def encode(self, vector_KTD: Tensor, *, windows: Windows, inputs: ModelInput) -> Tensor:
        state_KTD = self.norm(self.dropout(vector_KTD))
        for layer in self.layers:
            state_KTD = layer(state_KTD)
        return state_KTD


@dataclasses.dataclass(frozen=True)
class GrelaParts:
    """The tensors that a layer computes from its input before positions are mixed; the last axis of each is D."""

    query: Tensor
    """Qt. Like all fields except `value` and `gate`, at least float32."""
    key: Tensor
    """Kt."""
    rotated_query: Tensor
    """QR."""
    rotated_key: Tensor
    """KR."""
    value: Tensor
    """V."""
    gate: Tensor | None
    """G; None = no rank selector."""


class GrelaLayer(nn.Module):
    """One layer. `parts`, `local_mix` and `finish` are the whole layer except the sums over positions."""

    def __init__(self, config: RecGrelaConfig) -> None:
        super().__init__()
        width = config.width
        self.causal, self.num_heads, self.drop_path = config.causal, config.num_heads, config.drop_path
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.gate = nn.Linear(width, width) if config.rank_selector else None
        self.input = nn.Linear(width, width)
        self.query_key = nn.Linear(width, 2 * width)
        self.local = nn.Conv1d(width, width, KERNEL, groups=width) if config.rank_augmentation else None
        self.output = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = FeedForward(width, hidden=4 * width, activation=nn.GELU(), dropout=config.dropout)

    def forward(self, state_KTD: Tensor) -> Tensor:
        place_T = torch.arange(state_KTD.shape[1], device=state_KTD.device)
        parts = self.parts(state_KTD, place_T)
        attend = attend_causally if self.causal else attend_to_all
        mixed_KTD = attend(parts, num_heads=self.num_heads).to(state_KTD.dtype)
        if self.local is not None:
            mixed_KTD = mixed_KTD + self.local_mix(F.pad(parts.value, (0, 0, KERNEL - 1, 0)))
        return self.finish(state_KTD, mixed_KTD, gate=parts.gate)

    def parts(self, state: Tensor, place: Tensor) -> GrelaParts:
        """The parts of state [..., D] at positions `place`, whose shape broadcasts to that of state without D."""
        normed = self.norm(state)
        value = self.input(normed)
        # Sums over a history need more precision than bfloat16 has, and so do angles.
        query_key = self.query_key(value).to(torch.promote_types(value.dtype, torch.float32))
        query, key = (F.elu(query_key) + 1).chunk(2, dim=-1)
        return GrelaParts(
            query=query,
            key=key,
            rotated_query=rotate(query, place),
            rotated_key=rotate(key, place),
            value=value,
            gate=F.silu(self.gate(normed)) if self.gate is not None else None,
        )

    def local_mix(self, value_KTD: Tensor) -> Tensor:
        """S [K, T - 3, D] of all positions except the first three, which serve as context of the fourth."""
        assert self.local is not None, "the layer has no rank augmentation"
        return F.silu(self.local(value_KTD.mT)).mT

    def finish(self, state: Tensor, mixed: Tensor, *, gate: Tensor | None) -> Tensor:
        """The layer's output from its input and the mixed positions."""
        if gate is not None:
            mixed = mixed * gate
        state = state + self._drop_paths(self.output(mixed))
        return state + self.mlp(self.mlp_norm(state))

    def _drop_paths(self, value: Tensor) -> Tensor:
        if not self.training or not self.drop_path:
            return value
        shape = (value.shape[0], *[1] * (value.dim() - 1))
        kept = torch.empty(shape, dtype=value.dtype, device=value.device).bernoulli_(1 - self.drop_path)
        return value * kept / (1 - self.drop_path)


def attend_to_all(parts: GrelaParts, *, num_heads: int) -> Tensor:
    """O_KTD of the published form: every position reads every position of its window."""
    query, key, rotated_query, rotated_key, value = _heads(parts, num_heads)
    num_positions = value.shape[1]
    state_XDD = (rotated_key.mT / num_positions) @ value
    mass_XT1 = query @ key.mean(1, keepdim=True).mT + MASS_EPS
    return join_heads(rotated_query @ state_XDD / mass_XT1, num_heads)


def attend_causally(parts: GrelaParts, *, num_heads: int) -> Tensor:
    """O_KTD of the causal form: every position reads the positions up to its own, and L is their number."""
    query, key, rotated_query, rotated_key, value = _heads(parts, num_heads)
    count_T1 = events_so_far(value.shape[1], like=value)
    sum_XTD = running_attention(rotated_query, key_XTD=rotated_key, value_XTV=value) / count_T1
    mass_XT1 = (query * (key.cumsum(1) / count_T1)).sum(2, keepdim=True) + MASS_EPS
    return join_heads(sum_XTD / mass_XT1, num_heads)


def rotate(value: Tensor, place: Tensor) -> Tensor:
    """value [..., D] with each pair of units (2i, 2i + 1) rotated by place * 10000^(-2i/D) radians."""
    num_pairs = value.shape[-1] // 2
    step = ROTARY_BASE ** (-torch.arange(num_pairs, device=value.device, dtype=torch.float64) / num_pairs)
    angle = place[..., None].double() * step
    # Complex numbers take a seventh of the time of sines and cosines of even and odd units.
    turn = torch.polar(torch.ones_like(angle), angle).to(value.dtype.to_complex())
    pairs = torch.view_as_complex(value.unflatten(-1, (num_pairs, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def _heads(parts: GrelaParts, num_heads: int) -> tuple[Tensor, ...]:
    every = (parts.query, parts.key, parts.rotated_query, parts.rotated_key, parts.value.to(parts.query.dtype))
    return tuple(split_heads(part_KTD, num_heads) for part_KTD in every)
