"""The nearest open task, by true path length, agents in order."""

from __future__ import annotations

import numba
import numpy as np

from echelon.envs.kernels import UNREACHABLE
from echelon.planners.base import StatelessPlanner
from echelon.subgoals import EXCLUSIVE, Plan, PlanRequest

__all__ = ["Nearest", "nearest_choice"]


class Nearest(StatelessPlanner):
    """Gives each agent the nearest of its candidates that nobody else has; waits only if none is left."""

    name = "nearest"
    needs_distance = True

    def plan(self, request: PlanRequest) -> Plan:
        """Greedy: agents in order, each the shortest path; of equals the first candidate."""
        assert request.distance is not None
        c = request.candidates
        choice = np.full(request.need.shape, -1, np.int64)
        nearest_choice(request.need, c.kind, c.task, request.distance, request.taken.copy(), choice)
        return Plan.chosen(request, choice)


@numba.njit(cache=True)
def nearest_choice(need, kind, task, distance, taken, choice):  # type: ignore[no-untyped-def]
    """Write each needing agent's nearest open candidate into `choice` (int64 `(n, A)`), -1 if none."""
    for i in range(need.shape[0]):
        for a in range(need.shape[1]):
            if not need[i, a]:
                continue
            best, best_d = -1, np.int64(UNREACHABLE)
            for c in range(kind.shape[2]):
                t = task[i, a, c]
                if kind[i, a, c] <= 0 or (t >= 0 and taken[i, t]):
                    continue
                if distance[i, a, c] < best_d:
                    best, best_d = c, np.int64(distance[i, a, c])
            choice[i, a] = best
            if best >= 0 and task[i, a, best] >= 0 and EXCLUSIVE[kind[i, a, best]]:
                taken[i, task[i, a, best]] = True
