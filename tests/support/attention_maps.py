"""How many independent directions RecGRELA's attention has, with and without what modulates its rank.

    phi_h[n, j] = QR_n . KR_j / (L (Qt_n . mean_j Kt_j + 1e-6))                      rank at most D / H
    A_d = diag(G_d) [phi_h + diag(sigmoid(y_d)) C_d],   y_d = C_d v_d + b_d          per unit d of head h

C_d is the convolution of unit d as a matrix with four diagonals, and SiLU(y) = sigmoid(y) y: with the sigmoids that a
given history has, A_d v_d is exactly what the layer makes of unit d, but for the convolution's bias, which moves
nothing between positions. C_d has full rank wherever its last tap is not 0; G_d scales rows.
The letters are those of models/interface.py; T counts the positions of the one history that is looked at.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from models.recgrela import KERNEL, MASS_EPS, GrelaLayer, RecGrela


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
    """How one layer moves the values of one history between positions: row n is what position n reads."""

    attention_HTT: Tensor
    """phi: what the attention of each head reads. Under a causal mask it is triangular, so of full rank whatever it is
    made of: compare ranks on a published form."""
    modulated_DTT: Tensor
    """A: what the layer does to each unit of the values, convolution and gate included where it has them."""
    value_TD: Tensor
    """V."""
    offset_TD: Tensor
    """The convolution's bias behind SiLU and gate: modulated @ value + offset is what the output map gets."""


@torch.no_grad()
def attention_maps(model: RecGrela, vector_TD: Tensor) -> list[AttentionMaps]:
    """The maps of every layer for the history of these rows, oldest first, without padding. ValueError: in training."""
    if model.training:
        raise ValueError("the model is in training, its dropout would enter the maps: call eval() first")
    maps = []
    state_1TD = model.norm(vector_TD[None])
    for layer in model.layers:
        assert isinstance(layer, GrelaLayer)
        maps.append(_maps_of(layer, state_1TD))
        state_1TD = layer(state_1TD)
    return maps


def attention_rank(map_TT: Tensor, *, tolerance: float = 1e-6) -> Tensor:
    """Singular values above `tolerance` times the largest, of each of the maps [..., T, T], in float64."""
    singular_T = torch.linalg.svdvals(map_TT.double())
    return (singular_T > tolerance * singular_T[..., :1]).sum(-1)


def _maps_of(layer: GrelaLayer, state_1TD: Tensor) -> AttentionMaps:
    num_positions, width = state_1TD.shape[1:]
    parts = layer.parts(state_1TD, torch.arange(num_positions, device=state_1TD.device))
    value_TD = parts.value[0].to(parts.query.dtype)
    query_HTE, key_HTE, turned_query_HTE, turned_key_HTE = (
        part[0].unflatten(1, (layer.num_heads, -1)).transpose(0, 1)
        for part in (parts.query, parts.key, parts.rotated_query, parts.rotated_key)
    )
    seen_TT = torch.ones(num_positions, num_positions, dtype=value_TD.dtype, device=value_TD.device)
    seen_TT = seen_TT.tril() if layer.causal else seen_TT
    count_T1 = seen_TT.sum(1, keepdim=True)
    mass_HT1 = ((query_HTE @ key_HTE.mT) * seen_TT).sum(2, keepdim=True) / count_T1 + MASS_EPS
    attention_HTT = (turned_query_HTE @ turned_key_HTE.mT) * seen_TT / count_T1 / mass_HT1
    modulated_DTT = attention_HTT.repeat_interleave(width // layer.num_heads, 0)
    offset_TD = torch.zeros_like(value_TD)
    if layer.local is not None and layer.local.bias is not None:
        before_TD = layer.local(F.pad(parts.value, (0, 0, KERNEL - 1, 0)).mT)[0].mT.to(value_TD.dtype)
        share_TD = before_TD.sigmoid()
        taps_D4, bias_D = layer.local.weight[:, 0].to(value_TD.dtype), layer.local.bias.to(value_TD.dtype)
        for back in range(min(KERNEL, num_positions)):
            diagonal_DT = (share_TD[back:] * taps_D4[:, KERNEL - 1 - back]).mT
            modulated_DTT = modulated_DTT + torch.diag_embed(diagonal_DT, offset=-back)
        offset_TD = share_TD * bias_D
    if parts.gate is not None:
        gate_TD = parts.gate[0].to(value_TD.dtype)
        modulated_DTT, offset_TD = gate_TD.mT[:, :, None] * modulated_DTT, gate_TD * offset_TD
    return AttentionMaps(attention_HTT, modulated_DTT, value_TD, offset_TD)
