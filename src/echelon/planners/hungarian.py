"""Optimal assignment of open tasks to agents, over true path lengths: the upper reference for planners.

Kuhn's Hungarian method in the shortest-augmenting-path form with dual prices (Jonker and Volgenant 1987),
O(agents² · tasks) a world, for all worlds of a request in one kernel.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from echelon.envs.base import SubgoalKind
from echelon.envs.kernels import UNREACHABLE
from echelon.planners.base import StatelessPlanner
from echelon.subgoals import EXCLUSIVE, Plan, PlanRequest

__all__ = ["Hungarian", "assign"]

_TOOL = int(SubgoalKind.TOOL)
# A tool is fetched for a task of its own: whoever can finish one now does, else agents run from rack to rack.
_LATER = 1 << 20
_NEVER = 1 << 40  # the cost of what can't be: an unreachable task, or waiting when there is something to do


class Hungarian(StatelessPlanner):
    """Gives the agents that need a subgoal the set of distinct tasks with the least total path length.

    As many agents as possible get a task; one that can be finished now goes before fetching a tool.
    """

    name = "hungarian"
    needs_distance = True

    def plan(self, request: PlanRequest) -> Plan:
        """The assignment of least total path length; agents for whom no task is left wait."""
        assert request.distance is not None
        c = request.candidates
        choice = np.full(request.need.shape, -1, np.int64)
        _assign_all(request.need, c.kind, c.task, request.distance, request.taken, choice)
        return Plan.chosen(request, choice)

    def preference(self, request: PlanRequest) -> NDArray[np.float64]:
        """How much it likes each candidate by itself, float64 `(n, A, C)`: minus its cost in steps, -inf if it's none.

        For those who imitate it: of two candidates that are as near, it likes both.
        """
        assert request.distance is not None
        c = request.candidates
        cost = request.distance.astype(np.float64) + _LATER * (c.kind == _TOOL)
        return np.where((c.kind > 0) & (request.distance < UNREACHABLE), -cost, -np.inf)


@numba.njit(cache=True)
def assign(cost):  # type: ignore[no-untyped-def]
    """The column of each row in an assignment of least total cost.

    Args:
        cost: int64 `(n, m)`, n <= m.

    Returns:
        int64 `(n,)`, distinct columns.
    """
    n, m = cost.shape
    inf = np.int64(1) << 60
    u, v = np.zeros(n + 1, np.int64), np.zeros(m + 1, np.int64)
    row_of = np.zeros(m + 1, np.int64)  # the row (from 1) that a column (from 1) is matched to
    way = np.zeros(m + 1, np.int64)
    for i in range(1, n + 1):
        row_of[0] = i
        j0 = 0
        least = np.full(m + 1, inf, np.int64)
        used = np.zeros(m + 1, np.bool_)
        while True:
            used[j0] = True
            i0, delta, j1 = row_of[j0], inf, 0
            for j in range(1, m + 1):
                if used[j]:
                    continue
                slack = cost[i0 - 1, j - 1] - u[i0] - v[j]
                if slack < least[j]:
                    least[j], way[j] = slack, j0
                if least[j] < delta:
                    delta, j1 = least[j], j
            for j in range(m + 1):
                if used[j]:
                    u[row_of[j]] += delta
                    v[j] -= delta
                else:
                    least[j] -= delta
            j0 = j1
            if row_of[j0] == 0:
                break
        while j0:
            row_of[j0] = row_of[way[j0]]
            j0 = way[j0]
    column = np.zeros(n, np.int64)
    for j in range(1, m + 1):
        if row_of[j]:
            column[row_of[j] - 1] = j - 1
    return column


@numba.njit(cache=True)
def _assign_all(need, kind, task, distance, taken, choice):  # type: ignore[no-untyped-def]
    agents, per = need.shape[1], kind.shape[2]
    tasks = taken.shape[1]
    for i in range(need.shape[0]):
        asking = np.flatnonzero(need[i])
        n = asking.shape[0]
        # Columns: one a task; then, for each agent, its shared candidates (cells, tools) and its wait.
        cost = np.full((n, tasks + agents), _NEVER, np.int64)
        pick = np.full((n, tasks + agents), -1, np.int64)
        for r in range(n):
            a = asking[r]
            cost[r, tasks + r] = _NEVER // 2
            for c in range(per):
                k, t, d = kind[i, a, c], task[i, a, c], np.int64(distance[i, a, c])
                if k <= 0 or d >= UNREACHABLE or (t >= 0 and taken[i, t]):
                    continue
                column = t if t >= 0 and EXCLUSIVE[k] else tasks + r
                if k == _TOOL:
                    d += _LATER
                if d < cost[r, column]:
                    cost[r, column], pick[r, column] = d, c
        column = assign(cost)
        for r in range(n):
            choice[i, asking[r]] = pick[r, column[r]]
