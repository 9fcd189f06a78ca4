"""Potential terms of `search`; our own. They use what the team has seen: no term knows where a hidden target is."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from echelon.envs.search import OPEN, Search
from echelon.shaping._kernels import close_pairs, manhattan
from echelon.shaping.base import TermSet, mode_table

__all__ = ["SEARCH"]

_MEANING = {
    "found": "share of the targets that are found",
    "seen": "share of the free cells that were seen",
    "explored": "share of the regions without an unseen cell",
    "approach": "how near each robot is to the nearest region that has unseen cells",
    "spread": "whether robots stand near different open regions rather than all near one",
    "apart": "whether robots are further from each other than they can see",
}


def _compute(env: Search, which: NDArray[np.bool_], out: NDArray[np.float32]) -> None:
    _terms(
        which, env.pos, env.task_status, env.task_cell, env.unseen_left, env.num_free, env.target_found,
        env.config.sensor, env.row_of, env.col_of, max(env.height + env.width - 2, 1), out,
    )  # fmt: skip


@numba.njit(cache=True)
def _terms(  # type: ignore[no-untyped-def]
    which, pos, status, task_cell, unseen_left, num_free, found, sensor, row_of, col_of, norm, out
):
    agents, regions, targets = pos.shape[1], status.shape[1], found.shape[1]
    for w in range(which.shape[0]):
        if not which[w]:
            continue
        num_found, unseen, num_open = 0, 0, 0
        for n in range(targets):
            num_found += found[w, n]
        if num_found == targets:
            out[w, :] = 1
            continue
        for t in range(regions):
            num_open += status[w, t] == OPEN
            unseen += unseen_left[w, t]
        distinct, near = 0, 0.0
        sought = np.uint64(0)  # regions that some robot is nearest to; there are at most 64
        for a in range(agents):
            best, nearest = norm + 1, -1
            for t in range(regions):
                if status[w, t] == OPEN:
                    d = manhattan(pos[w, a], task_cell[w, t], row_of, col_of)
                    if d < best:
                        best, nearest = d, t
            if nearest >= 0:
                near += 1 - best / norm
                bit = np.uint64(1) << np.uint64(nearest)
                distinct += (sought & bit) == np.uint64(0)
                sought |= bit
        out[w, 0] = num_found / targets
        out[w, 1] = 1 - unseen / num_free[w]
        out[w, 2] = (regions - num_open) / regions
        out[w, 3] = near / agents if num_open else 1
        out[w, 4] = distinct / min(agents, num_open) if num_open else 1
        out[w, 5] = 1 - close_pairs(pos[w], row_of, col_of, sensor)


SEARCH = TermSet(
    world="search",
    meaning=_MEANING,
    modes=mode_table(
        tuple(_MEANING),
        {
            #                            β    found  seen explored approach spread apart
            "balanced_coverage":       (0.50, 0.20, 0.35, 0.15, 0.15, 0.10, 0.05),
            "exploration_push":        (0.55, 0.10, 0.55, 0.10, 0.15, 0.05, 0.05),
            "frontier_approach":       (0.50, 0.15, 0.25, 0.10, 0.35, 0.10, 0.05),
            "spread_out":              (0.40, 0.15, 0.30, 0.10, 0.10, 0.20, 0.15),
            "finish_regions":          (0.40, 0.20, 0.25, 0.35, 0.15, 0.05, 0.00),
            "late_stability":          (0.20, 0.40, 0.25, 0.15, 0.05, 0.10, 0.05),
        },
    ),
    default="balanced_coverage",
    grid=mode_table(
        tuple(_MEANING),
        {
            "balanced_progress":       (0.30, 0.25, 0.25, 0.25, 0.25, 0.00, 0.00),
            "early_discovery":         (0.40, 0.00, 0.60, 0.15, 0.25, 0.00, 0.00),
            "completion":              (0.50, 0.40, 0.40, 0.20, 0.00, 0.00, 0.00),
        },
    ),
    compute=_compute,
)  # fmt: skip
