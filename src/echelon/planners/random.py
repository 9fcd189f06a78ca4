"""Planners that draw: any free cell (the paper's control C), or any open task."""

from __future__ import annotations

import numba
import numpy as np

from echelon.envs.base import SubgoalKind
from echelon.planners.base import StatelessPlanner
from echelon.rng import mix
from echelon.subgoals import EXCLUSIVE, Plan, PlanRequest

__all__ = ["RandomCell", "RandomTask"]

_PICKS = np.uint64(1 << 32)  # far from the counters with which random candidates were drawn from the same keys


class RandomCell(StatelessPlanner):
    """Sends each agent to a random free cell, whatever the tasks are: L2M2's control C."""

    name = "random"

    def plan(self, request: PlanRequest) -> Plan:
        """A uniformly drawn free cell an agent."""
        plan = Plan.empty(request)
        plan.kind[:] = SubgoalKind.CELL
        _free_cells(request.need, request.walls(), request.keys, plan.cell)
        return plan


class RandomTask(StatelessPlanner):
    """Gives each agent a random one of its candidates that nobody else has; waits only if none is left."""

    name = "random-task"

    def plan(self, request: PlanRequest) -> Plan:
        """A uniformly drawn open candidate an agent, agents in order."""
        c = request.candidates
        choice = np.full(request.need.shape, -1, np.int64)
        _open_choice(request.need, c.kind, c.task, request.taken.copy(), request.keys, choice)
        return Plan.chosen(request, choice)


@numba.njit(cache=True)
def _free_cells(need, walls, keys, cell):  # type: ignore[no-untyped-def]
    cells = walls.shape[1]
    for i in range(need.shape[0]):
        for a in range(need.shape[1]):
            # Rejection: at least half of every map is free, so this is short.
            n = np.uint64(0)
            while need[i, a]:
                c = np.int64(mix(keys[i, a], n) % np.uint64(cells))
                n += np.uint64(1)
                if not walls[i, c]:
                    cell[i, a] = c
                    break


@numba.njit(cache=True)
def _open_choice(need, kind, task, taken, keys, choice):  # type: ignore[no-untyped-def]
    for i in range(need.shape[0]):
        for a in range(need.shape[1]):
            if not need[i, a]:
                continue
            n, pick = 0, -1
            for c in range(kind.shape[2]):
                t = task[i, a, c]
                if kind[i, a, c] <= 0 or (t >= 0 and taken[i, t]):
                    continue
                n += 1
                # Reservoir of one: the n-th takes the place with chance 1 / n.
                if mix(keys[i, a], _PICKS + np.uint64(n)) % np.uint64(n) == 0:
                    pick = c
            choice[i, a] = pick
            if pick >= 0 and task[i, a, pick] >= 0 and EXCLUSIVE[kind[i, a, pick]]:
                taken[i, task[i, a, pick]] = True
