"""Potential terms of `repair`; our own, after the order of a repair: unlock, fetch the tool, go there, repair."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from echelon.envs.repair import LOCKED, REPAIRED, Repair
from echelon.shaping._kernels import manhattan, traffic
from echelon.shaping.base import TermSet, mode_table

__all__ = ["REPAIR"]

_MEANING = {
    "fetch": "for each machine that can be repaired: how near some robot is to the tool, or whether one holds it",
    "equipped": "share of the machines that are repaired or for which some robot holds the tool",
    "approach": "machines repaired so far, and how near robots with the right tools are to the others",
    "unlocked": "share of the machines that aren't locked",
    "repaired": "share of the machines that are repaired",
    "traffic": "whether robots keep apart and don't block each other",
}


def _compute(env: Repair, which: NDArray[np.bool_], out: NDArray[np.float32]) -> None:
    _terms(
        which, env.pos, env.carrying, env.bumped, env.steps, env.task_status, env.task_cell, env.task_goal,
        env.task_need, env.config.num_machines, env.row_of, env.col_of, max(env.height + env.width - 2, 1), out,
    )  # fmt: skip


@numba.njit(cache=True)
def _terms(  # type: ignore[no-untyped-def]
    which, pos, carrying, bumped, steps, status, task_cell, task_goal, need, machines, row_of, col_of, norm, out
):
    for w in range(which.shape[0]):
        if not which[w]:
            continue
        repaired, unlocked, equipped = 0, 0, 0
        to_rack, to_machine = 0.0, 0.0
        for m in range(machines):
            if status[w, m] == REPAIRED:
                repaired += 1
            if status[w, m] == REPAIRED or status[w, m] == LOCKED:
                continue
            unlocked += 1
            rack, machine = norm, norm + 1
            for a in range(pos.shape[1]):
                if carrying[w, a] == need[w, m]:
                    machine = min(machine, manhattan(pos[w, a], task_cell[w, m], row_of, col_of))
                rack = min(rack, manhattan(pos[w, a], task_goal[w, m], row_of, col_of))
            if machine <= norm:
                equipped += 1
                to_machine += 1 - machine / norm
            else:
                to_rack += 1 - rack / norm
        if repaired == machines:
            out[w, :] = 1
            continue
        out[w, 0] = (repaired + equipped + to_rack) / machines
        out[w, 1] = (repaired + equipped) / machines
        out[w, 2] = (repaired + to_machine) / machines
        out[w, 3] = (repaired + unlocked) / machines
        out[w, 4] = repaired / machines
        out[w, 5] = traffic(pos[w], bumped[w], steps[w], row_of, col_of)


REPAIR = TermSet(
    world="repair",
    meaning=_MEANING,
    modes=mode_table(
        tuple(_MEANING),
        {
            #                            β    fetch equipped approach unlocked repaired traffic
            "tool_acquisition":        (0.40, 0.45, 0.20, 0.15, 0.05, 0.10, 0.05),
            "balanced_repair":         (0.40, 0.20, 0.15, 0.30, 0.10, 0.20, 0.05),
            "tool_to_machine":         (0.40, 0.10, 0.15, 0.50, 0.05, 0.15, 0.05),
            "unlock_first":            (0.40, 0.15, 0.10, 0.25, 0.30, 0.15, 0.05),
            "traffic_conservative":    (0.25, 0.15, 0.10, 0.25, 0.05, 0.10, 0.35),
            "late_stability":          (0.20, 0.05, 0.10, 0.25, 0.10, 0.40, 0.10),
        },
    ),
    default="balanced_repair",
    grid=mode_table(
        tuple(_MEANING),
        {
            "balanced_progress":       (0.30, 0.25, 0.25, 0.25, 0.00, 0.25, 0.00),
            "early_discovery":         (0.40, 0.60, 0.25, 0.15, 0.00, 0.00, 0.00),
            "completion":              (0.50, 0.20, 0.00, 0.40, 0.00, 0.40, 0.00),
        },
    ),
    compute=_compute,
)  # fmt: skip
