"""Potential terms of `warehouse`; our own, in the spirit of LLM-ALSO's table for robots that fetch shelves."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from echelon.envs.warehouse import DELIVERED, WAITING, Warehouse
from echelon.shaping._kernels import manhattan, traffic
from echelon.shaping.base import TermSet, mode_table

__all__ = ["WAREHOUSE"]

_MEANING = {
    "approach": "packages taken up so far, and how near the free robots are to the next waiting ones",
    "pickup": "share of the packages that were taken up",
    "carry": "packages delivered so far, and how near the carried ones are to their zones",
    "deliv": "share of the packages that are delivered",
    "spread": "whether free robots stand near different packages rather than all near one",
    "traffic": "whether robots keep apart and don't block each other",
}


def _compute(env: Warehouse, which: NDArray[np.bool_], out: NDArray[np.float32]) -> None:
    _terms(
        which, env.pos, env.carrying, env.bumped, env.steps, env.task_status, env.task_cell, env.task_goal,
        env.row_of, env.col_of, max(env.height + env.width - 2, 1), out,
    )  # fmt: skip


@numba.njit(cache=True)
def _terms(  # type: ignore[no-untyped-def]
    which, pos, carrying, bumped, steps, status, task_cell, task_goal, row_of, col_of, norm, out
):
    agents, tasks = pos.shape[1], status.shape[1]
    for w in range(which.shape[0]):
        if not which[w]:
            continue
        waiting, delivered = 0, 0
        for t in range(tasks):
            waiting += status[w, t] == WAITING
            delivered += status[w, t] == DELIVERED
        if delivered == tasks:
            out[w, :] = 1
            continue
        taken = tasks - waiting
        carried = taken - delivered
        free, distinct = 0, 0
        to_package, to_zone = 0.0, 0.0
        sought = np.uint64(0)  # packages that some free robot is nearest to; there are at most 64
        for a in range(agents):
            load = carrying[w, a]
            if load >= 0:
                to_zone += 1 - manhattan(pos[w, a], task_goal[w, load], row_of, col_of) / norm
                continue
            free += 1
            best, nearest = norm + 1, -1
            for t in range(tasks):
                if status[w, t] == WAITING:
                    d = manhattan(pos[w, a], task_cell[w, t], row_of, col_of)
                    if d < best:
                        best, nearest = d, t
            if nearest >= 0:
                to_package += 1 - best / norm
                bit = np.uint64(1) << np.uint64(nearest)
                distinct += (sought & bit) == np.uint64(0)
                sought |= bit
        # A package in hand counts 1, one that is approached less: to take it up never costs. Where there are more
        # free robots than packages, only as many count.
        if free > waiting:
            to_package *= waiting / free
        out[w, 0] = (taken + to_package) / tasks
        out[w, 1] = taken / tasks
        out[w, 2] = (delivered + to_zone) / tasks
        out[w, 3] = delivered / tasks
        out[w, 4] = (distinct + carried) / min(agents, waiting + carried)
        out[w, 5] = traffic(pos[w], bumped[w], steps[w], row_of, col_of)


WAREHOUSE = TermSet(
    world="warehouse",
    meaning=_MEANING,
    modes=mode_table(
        tuple(_MEANING),
        {
            #                            β   approach pickup carry deliv spread traffic
            "package_acquisition":     (0.30, 0.45, 0.20, 0.10, 0.05, 0.10, 0.10),
            "balanced_delivery":       (0.30, 0.25, 0.15, 0.30, 0.15, 0.05, 0.10),
            "carry_to_zone":           (0.30, 0.10, 0.15, 0.50, 0.15, 0.00, 0.10),
            "spread_out":              (0.30, 0.20, 0.15, 0.25, 0.10, 0.20, 0.10),
            "traffic_conservative":    (0.20, 0.15, 0.10, 0.25, 0.10, 0.05, 0.35),
            "late_stability":          (0.20, 0.05, 0.10, 0.30, 0.30, 0.10, 0.15),
        },
    ),
    default="balanced_delivery",
    grid=mode_table(
        tuple(_MEANING),
        {
            "balanced_progress":       (0.30, 0.25, 0.25, 0.25, 0.25, 0.00, 0.00),
            "early_discovery":         (0.40, 0.60, 0.25, 0.15, 0.00, 0.00, 0.00),
            "completion":              (0.50, 0.20, 0.00, 0.40, 0.40, 0.00, 0.00),
        },
    ),
    compute=_compute,
)  # fmt: skip
