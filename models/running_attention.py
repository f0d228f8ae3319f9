"""Linear attention over all events so far, at every position of a window in one pass.

    out[t] = sum_{j <= t} (query[t] . key[j]) value[j]

Within a chunk of E positions the E x E scores are computed; all earlier positions enter as one D x V matrix. Time and
memory are linear in the length of the window: E + D V / E numbers per position.
The letters are those of models/interface.py; X counts windows times heads, T positions, V is a value's width, Z counts
chunks of E positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_CHUNK_POSITIONS = 16


def running_attention(query_XTD: Tensor, *, key_XTD: Tensor, value_XTV: Tensor, chunk: int | None = None) -> Tensor:
    """out_XTV, in the dtype of the arguments; bfloat16 is not precise enough for sums over many events.

    chunk: E; None = D, where scores and sums cost the same (48 x 200 positions of width 16, forward and backward on one
    core: 6 ms with chunks of 16, 11 with 64, 22 with one of 200).
    """
    num_positions, width = query_XTD.shape[1:]
    chunk = min(chunk or max(width, MIN_CHUNK_POSITIONS), num_positions)
    missing = -num_positions % chunk

    def chunks(value: Tensor) -> Tensor:
        return F.pad(value, (0, 0, 0, missing)).unflatten(1, (-1, chunk))

    query_XZED, key_XZED, value_XZEV = chunks(query_XTD), chunks(key_XTD), chunks(value_XTV)
    within_XZEV = (query_XZED @ key_XZED.mT).tril() @ value_XZEV
    through_XZDV = (key_XZED.mT @ value_XZEV).cumsum(1)
    before_XZDV = F.pad(through_XZDV[:, :-1], (0, 0, 0, 0, 1, 0))
    return (within_XZEV + query_XZED @ before_XZDV).flatten(1, 2)[:, :num_positions]


def split_heads(value_KTD: Tensor, num_heads: int) -> Tensor:
    """[K, T, D] -> [K * H, T, D / H]: head h is the h-th run of columns."""
    return value_KTD.unflatten(2, (num_heads, -1)).transpose(1, 2).flatten(0, 1)


def join_heads(value_XTV: Tensor, num_heads: int) -> Tensor:
    """[K * H, T, V] -> [K, T, H * V]: the inverse of `split_heads`."""
    return value_XTV.unflatten(0, (-1, num_heads)).transpose(1, 2).flatten(2)


def events_so_far(num_positions: int, like: Tensor) -> Tensor:
    """[T, 1]: 1, 2, 3, ... in the dtype and on the device of `like`."""
    return torch.arange(1, num_positions + 1, device=like.device, dtype=like.dtype)[:, None]
