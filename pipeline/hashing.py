"""64-bit hashes that are the same on every machine and in every version: stored files and orders depend on them."""

from __future__ import annotations

import numpy as np
import polars as pl
import polars_hash

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash64(*keys: int | np.ndarray | np.uint64) -> np.ndarray:
    """uint64 hash of the keys, element by element: splitmix64 (Steele et al., 2014) chained over them."""
    state = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            state = mix(state + np.asarray(key).astype(np.uint64) * GOLDEN + GOLDEN)
    return state


def mix(state: np.ndarray) -> np.ndarray:
    """The output function of splitmix64: a bijection of uint64."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def hash_text(values: pl.Series) -> np.ndarray:
    """[n] uint64: xxh64 (seed 0) of each value's decimal or string form; 0 for a null."""
    text = values.rename("text").cast(pl.String).to_frame()
    return text.select(polars_hash.col("text").nchash.xxhash64().fill_null(0)).to_series().to_numpy()
