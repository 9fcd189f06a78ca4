"""A multi-robot warehouse: bring every package to its zone within the time limit.

A robot takes up a waiting package by entering its cell, carries one at a time, and sets it down by entering
any cell of the package's zone. The rules are our choice; the task is that of L2M2's Multi-Robot Warehouse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from echelon.envs.base import (
    Candidates,
    GridConfig,
    GridEnv,
    Scene,
    Subgoal,
    SubgoalKind,
    TaskView,
    ZoneView,
    _check,
)
from echelon.envs.kernels import (
    AGENT,
    POINT,
    contains,
    draw_map,
    resolve_moves,
    take_marked_cell,
)
from echelon.rng import below

__all__ = ["Warehouse", "WarehouseConfig"]

WAITING, CARRIED, DELIVERED = 0, 1, 2
_ZONE_SHIFT = 4  # a cell's zone is kept in the bits 4 to 6 of its byte: 0 none, 1 to 7


@dataclass(frozen=True)
class WarehouseConfig(GridConfig):
    """Settings of `warehouse`."""

    num_packages: int = 8
    """Packages to deliver (1 to 64)."""
    num_zones: int = 2
    """Destination zones of up to 2x2 cells (1 to 7)."""


class Warehouse(GridEnv[WarehouseConfig]):
    """See the module; arrays are described at `GridEnv`. The reward is 1 for each delivered package."""

    name = "warehouse"
    status_words = ("waiting", "carried", "delivered")
    kind_status = {SubgoalKind.FETCH: WAITING, SubgoalKind.DELIVER: CARRIED}  # noqa: RUF012
    kind_holder = frozenset({SubgoalKind.DELIVER})
    _own_state = ("task_zone", "zone_cell")

    def _count_tasks(self) -> int:
        return self.config.num_packages

    def _cells_needed(self) -> int:
        return self.num_agents + self.config.num_packages + 4 * self.config.num_zones + 4

    def _check_config(self) -> None:
        super()._check_config()
        _check(1 <= self.config.num_packages <= 64, "num_packages", self.config.num_packages, "1 to 64")
        _check(1 <= self.config.num_zones <= 7, "num_zones", self.config.num_zones, "1 to 7")

    def _build(self) -> None:
        self.task_zone = np.zeros((self.num_envs, self.num_tasks), np.int8)
        self.zone_cell = np.zeros((self.num_envs, self.config.num_zones), np.int32)
        self._layout = self._layout_args()
        self._marks = (self._marked("A"), self._marked("P"), self._marked("Z"))

    def _arrays(self) -> tuple[Any, ...]:
        return (
            self.grid, self.pos, self.carrying, self.last_action, self.steps, self.task_status, self.task_cell,
            self.task_goal, self.task_zone, self.load_goal,
        )  # fmt: skip

    def _advance(self, actions: NDArray[np.int8]) -> None:
        _advance(
            actions, self._arrays(), self._geometry(), self.reward, self.terminated, self.truncated,
            self.collisions, self.bumped, self.task_done_by, self._target,
        )  # fmt: skip
        self._observe(self._every)

    def _reset_worlds(self, which: NDArray[np.bool_]) -> None:
        _reset(
            which, self._arrays(), self._geometry(), self._layout, self._marks, self.zone_cell, self.keys,
            self.counters, self._scratch,
        )  # fmt: skip
        self._observe(which)

    def subgoals_open(
        self, kind: NDArray[np.int8], task: NDArray[np.int16], out: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """As `GridEnv.subgoals_open`; a robot that took up something on its way can't fetch anything else."""
        super().subgoals_open(kind, task, out)
        out &= (kind != SubgoalKind.FETCH) | (self.carrying < 0)
        return out

    def candidate_arrays(self, rows: NDArray[np.int64]) -> Candidates:
        """Carrying: deliver. Else: fetch each waiting package, or wait."""
        shape = (len(rows), self.num_agents, self.num_tasks + 1)
        out = Candidates(np.full(shape, -1, np.int8), np.zeros(shape, np.int32), np.full(shape, -1, np.int16))
        _candidates(
            rows, self.pos, self.carrying, self.task_status, self.task_cell, self.task_goal,
            out.kind, out.cell, out.task,
        )  # fmt: skip
        return out

    def outlook(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """As `GridEnv.outlook`; behind a package comes the way to its zone."""
        after = self._straight(self.task_cell[rows], self.task_goal[rows])
        return after, np.ones_like(after)

    def scene(self, i: int) -> Scene:
        """The structured view of world `i`; everything is known."""
        tasks = []
        for t in range(self.num_tasks):
            status = int(self.task_status[i, t])
            if status == CARRIED:
                holder = int(np.flatnonzero(self.carrying[i] == t)[0])
                cell = self.row_col(self.pos[i, holder])
            else:
                cell = self.row_col(self.task_cell[i, t])
            goal = self.row_col(self.task_goal[i, t])
            tasks.append(TaskView(t, "package", f"package {t}", cell, goal, self.status_words[status]))
        zones = tuple(
            ZoneView(
                z, f"zone {z}", tuple(self.row_col(int(c)) for c in np.flatnonzero(self.grid[i] >> 4 & 7 == z + 1))
            )
            for z in range(self.config.num_zones)
        )
        return Scene(self.name, int(self.steps[i]), self.limit, self.walls(i), self.agent_views(i), tuple(tasks), zones)

    @classmethod
    def describe(cls, scene: Scene) -> str:
        """The scene in words: one line a robot, one a package that isn't delivered yet."""
        rows, cols = scene.walls.shape
        waiting = [t for t in scene.tasks if t.status == "waiting"]
        done = sum(t.status == "delivered" for t in scene.tasks)
        lines = [
            f"Warehouse of {rows} rows and {cols} columns, step {scene.step} of {scene.limit}. "
            f"{done} of {len(scene.tasks)} packages are delivered."
        ]
        for agent in scene.agents:
            load = "carries nothing"
            if agent.carrying is not None:
                goal = scene.tasks[agent.carrying].goal
                load = f"carries package {agent.carrying} for the zone at {goal}"
            lines.append(f"Robot {agent.id} is at {agent.cell} and {load}.")
        lines.extend(f"Package {t.id} waits at {t.cell} for the zone at {t.goal}." for t in waiting)
        return "\n".join(lines)

    @classmethod
    def candidates(cls, scene: Scene, agent: int) -> tuple[Subgoal, ...]:
        """The subgoals that make sense now for one agent; agrees with `candidate_arrays`."""
        me = scene.agents[agent]
        if me.carrying is not None:
            task = scene.tasks[me.carrying]
            assert task.goal is not None
            return (Subgoal(SubgoalKind.DELIVER, task.goal, task.id, f"deliver package {task.id} to {task.goal}"),)
        fetch = [
            cls._subgoal(SubgoalKind.FETCH, t.cell, t.id)
            for t in scene.tasks
            if t.status == "waiting" and t.cell is not None
        ]
        return (*fetch, cls._subgoal(SubgoalKind.WAIT, me.cell))


@numba.njit(cache=True)
def _advance(  # type: ignore[no-untyped-def]
    actions, arrays, geometry, reward, terminated, truncated, collisions, bumped, done_by, target
):
    grid, pos, carrying, last_action, steps, status, task_cell, task_goal, zone, load_goal = arrays
    offsets, _row_of, _col_of, _view, _stride, limit = geometry
    num_agents, num_tasks = pos.shape[1], status.shape[1]
    for w in range(pos.shape[0]):
        collisions[w] = resolve_moves(grid[w], pos[w], actions[w], offsets, steps[w] % num_agents, target, bumped[w])
        steps[w] += 1
        gained = np.float32(0)
        for t in range(num_tasks):
            done_by[w, t] = -1
        for a in range(num_agents):
            last_action[w, a] = actions[w, a]
            cell = pos[w, a]
            code = grid[w, cell]
            load = carrying[w, a]
            if load < 0 and code & POINT:
                for t in range(num_tasks):
                    if status[w, t] == WAITING and task_cell[w, t] == cell:
                        carrying[w, a] = t
                        load_goal[w, a] = task_goal[w, t]
                        status[w, t] = CARRIED
                        done_by[w, t] = a
                        grid[w, cell] = code & (~POINT & 255)
                        break
            elif load >= 0 and (code >> _ZONE_SHIFT) & 7 == zone[w, load] + 1:
                carrying[w, a] = -1
                load_goal[w, a] = -1
                status[w, load] = DELIVERED
                task_cell[w, load] = cell
                done_by[w, load] = a
                gained += np.float32(1)
        left = 0
        for t in range(num_tasks):
            left += status[w, t] != DELIVERED
        reward[w] = gained
        terminated[w] = left == 0
        truncated[w] = left > 0 and steps[w] >= limit


@numba.njit(cache=True)
def _reset(which, arrays, geometry, layout, marks, zone_cell, keys, counters, scratch):  # type: ignore[no-untyped-def]
    grid, pos, carrying, last_action, steps, status, task_cell, task_goal, zone, load_goal = arrays
    _offsets, _row_of, _col_of, _view, stride, _limit = geometry
    starts, places, stations = marks
    free = scratch[2]
    for w in range(which.shape[0]):
        if not which[w]:
            continue
        key, counter = keys[w], counters[w]
        counter, n = draw_map(grid[w], layout, scratch[0], scratch[1], free, key, counter)
        for z in range(zone_cell.shape[1]):
            cell = take_marked_cell(stations, free, n, key, counter)
            counter += np.uint64(1)
            n -= 1
            zone_cell[w, z] = cell
            grid[w, cell] |= (z + 1) << _ZONE_SHIFT
            # The zone spreads over the free cells beside its first one.
            for extra in (cell + 1, cell + stride, cell + stride + 1):
                if contains(starts, extra) or contains(places, extra):
                    continue  # what the map file marks for others stays theirs
                for i in range(n):
                    if free[i] == extra:
                        n -= 1
                        free[i] = free[n]
                        free[n] = extra
                        grid[w, extra] |= (z + 1) << _ZONE_SHIFT
                        break
        for t in range(status.shape[1]):
            cell = take_marked_cell(places, free, n, key, counter)
            z = below(key, counter + np.uint64(1), zone_cell.shape[1])
            counter += np.uint64(2)
            n -= 1
            grid[w, cell] |= POINT
            status[w, t] = WAITING
            task_cell[w, t] = cell
            zone[w, t] = z
            task_goal[w, t] = zone_cell[w, z]
        for a in range(pos.shape[1]):
            cell = take_marked_cell(starts, free, n, key, counter)
            counter += np.uint64(1)
            n -= 1
            grid[w, cell] |= AGENT
            pos[w, a] = cell
            carrying[w, a] = -1
            load_goal[w, a] = -1
            last_action[w, a] = 0
        steps[w] = 0
        counters[w] = counter


@numba.njit(cache=True)
def _candidates(rows, pos, carrying, status, task_cell, task_goal, kind, cell, task):  # type: ignore[no-untyped-def]
    for i in range(rows.shape[0]):
        w = rows[i]
        for a in range(pos.shape[1]):
            load = carrying[w, a]
            if load >= 0:
                kind[i, a, 0] = 5
                cell[i, a, 0] = task_goal[w, load]
                task[i, a, 0] = load
                continue
            n = 0
            for t in range(status.shape[1]):
                if status[w, t] == WAITING:
                    kind[i, a, n] = 4
                    cell[i, a, n] = task_cell[w, t]
                    task[i, a, n] = t
                    n += 1
            kind[i, a, n] = 0
            cell[i, a, n] = pos[w, a]
