"""Randomness without order: every number is a pure function of a key and a counter.

World *i* draws from its own key, spawned from the root seed, so what it draws doesn't depend on how many
worlds run beside it or in which order they are stepped. The mixing function is SplitMix64's finaliser
(Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014, public domain constants).
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["below", "mix", "spawn_keys", "uniform"]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S32 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(32)


def spawn_keys(seed: int, stream: Sequence[int], count: int) -> NDArray[np.uint64]:
    """One 64-bit key for each of `count` worlds; world i's key depends on `seed`, `stream` and i alone.

    Args:
        seed: the root seed, at least 0.
        stream: what the keys are for (different streams are independent).
        count: number of worlds.

    Returns:
        uint64 `(count,)`.
    """
    return np.array(
        [np.random.SeedSequence(seed, spawn_key=(*stream, i)).generate_state(1, np.uint64)[0] for i in range(count)],
        np.uint64,
    )


@numba.njit(inline="always", cache=True)
def mix(key: np.uint64, counter: np.uint64) -> np.uint64:
    """64 random bits for (key, counter)."""
    z = key + (counter + np.uint64(1)) * _GAMMA
    z = (z ^ (z >> _S30)) * _M1
    z = (z ^ (z >> _S27)) * _M2
    return z ^ (z >> _S31)


@numba.njit(inline="always", cache=True)
def below(key: np.uint64, counter: np.uint64, n: int) -> np.int64:
    """An integer in [0, n), n < 2**32 (multiply-shift; its bias is below n / 2**32)."""
    return np.int64(((mix(key, counter) >> _S32) * np.uint64(n)) >> _S32)


@numba.njit(inline="always", cache=True)
def uniform(key: np.uint64, counter: np.uint64) -> float:
    """A float in [0, 1)."""
    return np.float64(mix(key, counter) >> np.uint64(11)) * (1.0 / 9007199254740992.0)
