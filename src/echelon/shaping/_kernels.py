"""What the terms of several worlds share, for their numba kernels."""

from __future__ import annotations

import numba
import numpy as np

__all__ = ["close_pairs", "manhattan", "traffic"]


@numba.njit(inline="always", cache=True)
def manhattan(a, b, row_of, col_of):  # type: ignore[no-untyped-def]
    """Rows and columns between two cells, as if there were no walls."""
    return abs(np.int64(row_of[a]) - row_of[b]) + abs(np.int64(col_of[a]) - col_of[b])


@numba.njit(cache=True)
def close_pairs(pos, row_of, col_of, reach):  # type: ignore[no-untyped-def]
    """The share of pairs of agents that are at most `reach` apart; 0 where there is one agent."""
    agents = pos.shape[0]
    if agents < 2:
        return 0.0
    close = 0
    for a in range(agents):
        for b in range(a + 1, agents):
            close += manhattan(pos[a], pos[b], row_of, col_of) <= reach
    return 2.0 * close / (agents * (agents - 1))


@numba.njit(cache=True)
def traffic(pos, bumped, step, row_of, col_of):  # type: ignore[no-untyped-def]
    """1 - (half the share of pairs side by side + half the share of agents that the last step blocked).

    Args:
        bumped: uint8 `(A,)`; what it says of an episode's first state (`step` 0) is about the episode before.
    """
    blocked = 0
    if step > 0:
        for a in range(pos.shape[0]):
            blocked += bumped[a] != 0
    return 1.0 - 0.5 * close_pairs(pos, row_of, col_of, 1) - 0.5 * blocked / pos.shape[0]
