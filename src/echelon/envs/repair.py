"""Repair with tools: repair every machine within the time limit.

Each machine needs one type of tool. Racks hold tools without end: a robot takes a tool by entering its rack's
cell, and leaves there the one that it held. It repairs a machine by entering (or standing in) its cell with the
right tool, unless the machine is locked: some can only be repaired once another one is. The world is our
choice; it makes order and roles matter, which the warehouse doesn't.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from echelon.envs.base import Candidates, GridConfig, GridEnv, Scene, Subgoal, SubgoalKind, TaskView, _check
from echelon.envs.kernels import AGENT, POINT, draw_map, keep_three, resolve_moves, take_marked_cell, write_way
from echelon.rng import below

__all__ = ["Repair", "RepairConfig"]

BROKEN, LOCKED, REPAIRED, RACK = 0, 1, 2, 3
_RACK_SHIFT = 4  # a rack's tool is kept in the bits 4 to 6 of its cell's byte: 0 none, 1 to 7
_NO_POINT = 255 - POINT
_REPAIR, _TOOL = int(SubgoalKind.REPAIR), int(SubgoalKind.TOOL)


@dataclass(frozen=True)
class RepairConfig(GridConfig):
    """Settings of `repair`."""

    num_machines: int = 6
    """Broken machines (1 to 64)."""
    num_tools: int = 3
    """Types of tools, each with one rack (1 to 7)."""
    locked: float = 0.4
    """Chance that a machine (never the first) is locked until another one is repaired (0 to 1)."""


class Repair(GridEnv[RepairConfig]):
    """See the module; arrays are described at `GridEnv`. The reward is 1 for each repaired machine.

    The tasks are the machines, then the tools (their racks). `carrying` is the task id of the tool held;
    `task_goal` is the rack of the tool that a machine needs, which lets states show it.

    Attributes beside `GridEnv`'s:
        task_need: int16 `(W, T)`, the task id of the tool that a machine needs, -1 for tools.
        task_lock: int16 `(W, T)`, the machine that must be repaired first, or -1. Locks form a forest.
    """

    name = "repair"
    status_words = ("broken", "locked", "repaired", "rack")
    kind_status = {SubgoalKind.REPAIR: BROKEN, SubgoalKind.TOOL: RACK}  # noqa: RUF012
    # Whether it holds a tool and which (three bits, ±1); for each of the three nearest open machines whether it
    # holds the right tool, and the way to that tool's rack; the ways to the nearest machine that it can repair now
    # and to the nearest rack that is of use; the shares of machines that are repaired and locked.
    extra_scale = (
        *(1.0,) * 4,
        *(1.0, 1.0, 1.0, 1.0, 1 / 16, 1 / 16) * 3,
        *(1.0, 1.0, 1.0, 1 / 16, 1 / 16) * 2,
        1 / 127,
        1 / 127,
    )
    _own_state = ("task_need", "task_lock")

    def _count_tasks(self) -> int:
        return self.config.num_machines + self.config.num_tools

    def _cells_needed(self) -> int:
        return self.num_agents + self.num_tasks + 1

    def _check_config(self) -> None:
        super()._check_config()
        c = self.config
        _check(1 <= c.num_machines <= 64, "num_machines", c.num_machines, "1 to 64")
        _check(1 <= c.num_tools <= 7, "num_tools", c.num_tools, "1 to 7")
        _check(0 <= c.locked <= 1, "locked", c.locked, "0 to 1")

    def _build(self) -> None:
        self.task_need = np.full((self.num_envs, self.num_tasks), -1, np.int16)
        self.task_lock = np.full((self.num_envs, self.num_tasks), -1, np.int16)
        self._lists = np.zeros((4, self.num_tasks), np.int32)  # scratch
        self._layout = self._layout_args()
        self._marks = (self._marked("A"), self._marked("P"), self._marked("Z"))

    def _arrays(self) -> tuple[Any, ...]:
        return (
            self.grid, self.pos, self.carrying, self.last_action, self.steps, self.task_status, self.task_cell,
            self.task_goal, self.task_need, self.task_lock, self.config.num_machines,
        )  # fmt: skip

    def _advance(self, actions: NDArray[np.int8]) -> None:
        _advance(
            actions, self._arrays(), self.offsets, self.limit, self.reward, self.terminated, self.truncated,
            self.collisions, self.bumped, self.task_done_by, self.new_info, self._target,
        )  # fmt: skip
        self._observe(self._every)

    def _reset_worlds(self, which: NDArray[np.bool_]) -> None:
        _reset(
            which, self._arrays(), self._layout, self._marks, float(self.config.locked), self.keys, self.counters,
            self._scratch,
        )  # fmt: skip
        self._observe(which)

    def _observe(self, which: NDArray[np.bool_]) -> None:
        super()._observe(which)
        start = self.obs_size - len(self.extra_scale)
        _observe_tools(
            which, self._arrays(), self.obs_buffer[:, :, start : self.obs_size], self._geometry(), tuple(self._lists)
        )

    def subgoals_open(
        self, kind: NDArray[np.int8], task: NDArray[np.int16], out: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """As `GridEnv.subgoals_open`; a repair also needs the right tool in hand, and a tool is only worth
        fetching while an open machine needs it."""
        super().subgoals_open(kind, task, out)
        _still_open(kind, task, self.carrying, self.task_status, self.task_need, out)
        return out

    def candidate_arrays(self, rows: NDArray[np.int64]) -> Candidates:
        """Repair each open machine for which the agent holds the tool; fetch each other tool in need; or wait."""
        shape = (len(rows), self.num_agents, self.num_tasks + 1)
        out = Candidates(np.full(shape, -1, np.int8), np.zeros(shape, np.int32), np.full(shape, -1, np.int16))
        _candidates(rows, self._arrays(), self._scratch[0], out.kind, out.cell, out.task)
        return out

    @property
    def goals(self) -> int:
        """The machines."""
        return self.config.num_machines

    def outlook(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """As `GridEnv.outlook`; a repair's gain is the machine and those that it unlocks; a tool's is the open machines
        that need it, less the robots that hold it, and behind it comes the way to the nearest such machine."""
        m = self.config.num_machines
        broken = self.task_status[rows, :m] == BROKEN
        tools = np.arange(m, self.num_tasks)
        fits = broken[:, :, None] & (self.task_need[rows, :m, None] == tools)  # (n, machines, tools)
        way = self._straight(self.task_cell[rows, :m, None], self.task_cell[rows, None, m:])
        nearest = np.where(fits, way, np.iinfo(np.int64).max).min(1)
        holders = (self.carrying[rows, :, None] == tools).sum(1)
        unlocks = (self.task_lock[rows, :m, None] == np.arange(m)) & (self.task_status[rows, :m, None] == LOCKED)
        gain = np.concatenate([1 + unlocks.sum(1), np.maximum(fits.sum(1) - holders, 0)], 1)
        after = np.concatenate([np.zeros_like(broken, np.int64), np.where(fits.any(1), nearest, 0)], 1)
        return after, gain.astype(np.int64)

    def scene(self, i: int) -> Scene:
        """The structured view of world `i`; everything is known."""
        tasks = []
        for t in range(self.num_tasks):
            cell, status = self.row_col(self.task_cell[i, t]), self.status_words[self.task_status[i, t]]
            if t < self.config.num_machines:
                need, lock = int(self.task_need[i, t]), int(self.task_lock[i, t])
                tasks.append(
                    TaskView(t, "machine", f"machine {t}", cell, None, status, need, lock if lock >= 0 else None)
                )
            else:
                tasks.append(TaskView(t, "tool", f"tool {t}", cell, None, status))
        return Scene(self.name, int(self.steps[i]), self.limit, self.walls(i), self.agent_views(i), tuple(tasks))

    @classmethod
    def describe(cls, scene: Scene) -> str:
        """The scene in words: one line a robot, one a tool, one a machine that isn't repaired yet."""
        rows, cols = scene.walls.shape
        machines = [t for t in scene.tasks if t.kind == "machine"]
        done = sum(t.status == "repaired" for t in machines)
        lines = [
            f"Workshop of {rows} rows and {cols} columns, step {scene.step} of {scene.limit}. "
            f"{done} of {len(machines)} machines are repaired."
        ]
        for agent in scene.agents:
            tool = "no tool" if agent.carrying is None else f"tool {agent.carrying}"
            lines.append(f"Robot {agent.id} is at {agent.cell} and holds {tool}.")
        lines.extend(f"Tool {t.id} lies in a rack at {t.cell}." for t in scene.tasks if t.kind == "tool")
        for t in machines:
            if t.status == "repaired":
                continue
            line = f"Machine {t.id} at {t.cell} is broken and needs tool {t.needs}"
            if t.status == "locked":
                line += f"; it is locked until machine {t.locked_by} is repaired"
            opens = [str(m.id) for m in machines if m.locked_by == t.id]
            if opens:
                line += f"; its repair unlocks machine {' and '.join(opens)}"
            lines.append(line + ".")
        return "\n".join(lines)

    @classmethod
    def candidates(cls, scene: Scene, agent: int) -> tuple[Subgoal, ...]:
        """The subgoals that make sense now for one agent; agrees with `candidate_arrays`."""
        me = scene.agents[agent]
        broken = [t for t in scene.tasks if t.status == "broken"]
        needed = {t.needs for t in broken} - {me.carrying}
        repair = [
            Subgoal(SubgoalKind.REPAIR, t.cell, t.id, f"repair machine {t.id} at {t.cell}")
            for t in broken
            if t.needs == me.carrying and t.cell is not None
        ]
        fetch = [
            Subgoal(SubgoalKind.TOOL, t.cell, t.id, f"take tool {t.id} at {t.cell}")
            for t in scene.tasks
            if t.id in needed and t.cell is not None
        ]
        return (*repair, *fetch, Subgoal(SubgoalKind.WAIT, me.cell, None, "wait"))


@numba.njit(cache=True)
def _advance(  # type: ignore[no-untyped-def]
    actions, arrays, offsets, limit, reward, terminated, truncated, collisions, bumped, done_by, new_info, target
):
    grid, pos, carrying, last_action, steps, status, task_cell, _goal, need, lock, machines = arrays
    num_agents = pos.shape[1]
    for w in range(pos.shape[0]):
        collisions[w] = resolve_moves(grid[w], pos[w], actions[w], offsets, steps[w] % num_agents, target, bumped[w])
        steps[w] += 1
        for t in range(status.shape[1]):
            done_by[w, t] = -1
        gained = 0
        for a in range(num_agents):
            last_action[w, a] = actions[w, a]
            code = grid[w, pos[w, a]]
            tool = machines + ((code >> _RACK_SHIFT) & 7) - 1
            if tool >= machines:
                if carrying[w, a] != tool:
                    carrying[w, a] = tool
                    done_by[w, tool] = a
            elif code & POINT and carrying[w, a] >= 0:
                for m in range(machines):
                    if task_cell[w, m] == pos[w, a]:
                        if status[w, m] == BROKEN and need[w, m] == carrying[w, a]:
                            status[w, m] = REPAIRED
                            done_by[w, m] = a
                            gained += 1
                            grid[w, pos[w, a]] = code & _NO_POINT
                        break
        left, opened = 0, 0
        # Locks open after everyone has moved, so that the order of the agents doesn't matter.
        for m in range(machines):
            if gained and status[w, m] == LOCKED and status[w, lock[w, m]] == REPAIRED:
                status[w, m] = BROKEN
                opened += 1
            left += status[w, m] != REPAIRED
        reward[w] = gained
        new_info[w] = opened > 0
        terminated[w] = left == 0
        truncated[w] = left > 0 and steps[w] >= limit


@numba.njit(cache=True)
def _reset(which, arrays, layout, marks, locked, keys, counters, scratch):  # type: ignore[no-untyped-def]
    grid, pos, carrying, last_action, steps, status, task_cell, task_goal, need, lock, machines = arrays
    starts, places, stations = marks
    tools = status.shape[1] - machines
    free = scratch[2]
    for w in range(which.shape[0]):
        if not which[w]:
            continue
        key, counter = keys[w], counters[w]
        counter, n = draw_map(grid[w], layout, scratch[0], scratch[1], free, key, counter)
        for k in range(tools):
            cell = take_marked_cell(stations, free, n, key, counter)
            counter += np.uint64(1)
            n -= 1
            t = machines + k
            grid[w, cell] |= (k + 1) << _RACK_SHIFT
            status[w, t] = RACK
            task_cell[w, t] = cell
            task_goal[w, t] = cell
            need[w, t] = -1
            lock[w, t] = -1
        for m in range(machines):
            cell = take_marked_cell(places, free, n, key, counter)
            tool = machines + below(key, counter + np.uint64(1), tools)
            # An earlier machine as the lock: no circle can close, the first one is always open.
            shut = m > 0 and below(key, counter + np.uint64(2), 1 << 24) < locked * (1 << 24)
            lock[w, m] = below(key, counter + np.uint64(3), m) if shut else -1
            counter += np.uint64(4)
            n -= 1
            grid[w, cell] |= POINT
            status[w, m] = LOCKED if shut else BROKEN
            task_cell[w, m] = cell
            need[w, m] = tool
            task_goal[w, m] = task_cell[w, tool]
        for a in range(pos.shape[1]):
            cell = take_marked_cell(starts, free, n, key, counter)
            counter += np.uint64(1)
            n -= 1
            grid[w, cell] |= AGENT
            pos[w, a] = cell
            carrying[w, a] = -1
            last_action[w, a] = 0
        steps[w] = 0
        counters[w] = counter


@numba.njit(cache=True)
def _observe_tools(which, arrays, out, geometry, scratch):  # type: ignore[no-untyped-def]
    _grid, pos, carrying, _last, _steps, status, task_cell, _goal, need, _lock, machines = arrays
    _offsets, row_of, col_of, _view, _stride, _limit = geometry
    # The open machines come first in `listed` and `needs`, then the racks that they need.
    size = status.shape[1]
    rows, cols, listed, needs = scratch
    none = np.int32(1 << 30)
    for w in range(which.shape[0]):
        if not which[w]:
            continue
        done, shut, wanted, num, num_racks = 0, 0, 0, 0, 0
        for t in range(size):
            rows[t] = row_of[task_cell[w, t]]
            cols[t] = col_of[task_cell[w, t]]
            done += status[w, t] == REPAIRED
            shut += status[w, t] == LOCKED
            if status[w, t] == BROKEN:
                wanted |= 1 << (need[w, t] - machines)
                listed[num] = t
                needs[num] = need[w, t]
                num += 1
        for t in range(machines, size):
            if (wanted >> (t - machines)) & 1:
                listed[num + num_racks] = t
                num_racks += 1
        share_done, share_shut = 127 * done // machines, 127 * shut // machines
        for a in range(pos.shape[1]):
            row, col = np.int32(row_of[pos[w, a]]), np.int32(col_of[pos[w, a]])
            held = carrying[w, a]
            own = out[w, a]
            own[0] = held >= 0
            for bit in range(3):
                own[1 + bit] = 2 * (((held - machines) >> bit) & 1) - 1 if held >= 0 else 0
            # As in `observe_tasks`: distance and index in one number.
            first, second, third, ready, rack = none, none, none, none, none
            for j in range(num):
                i = np.uintp(j)
                m = np.uintp(listed[i])
                d = (np.int32(abs(rows[m] - row) + abs(cols[m] - col)) << np.int32(8)) | np.int32(m)
                first, second, third = keep_three(first, second, third, d)
                ready = min(ready, d if needs[i] == held else none)
            for j in range(num, num + num_racks):
                i = np.uintp(j)
                m = np.uintp(listed[i])
                d = (np.int32(abs(rows[m] - row) + abs(cols[m] - col)) << np.int32(8)) | np.int32(m)
                rack = min(rack, d if np.int64(m) != held else none)
            k = 4
            for code in (first, second, third):
                near = own[k : k + 6]
                if code < none:
                    tool = np.uintp(need[w, np.uintp(code & 255)])
                    near[0] = held == np.int64(tool)
                    write_way(near[1:], rows[tool] - row, cols[tool] - col)
                else:
                    near[:] = 0
                k += 6
            for code in (ready, rack):
                way = own[k : k + 5]
                if code < none:
                    near_task = np.uintp(code & 255)
                    write_way(way, rows[near_task] - row, cols[near_task] - col)
                else:
                    way[:] = 0
                k += 5
            own[k] = share_done
            own[k + 1] = share_shut


@numba.njit(cache=True)
def _still_open(kind, task, carrying, status, need, out):  # type: ignore[no-untyped-def]
    for w in range(kind.shape[0]):
        for a in range(kind.shape[1]):
            k, t = kind[w, a], task[w, a]
            if t < 0 or not out[w, a]:
                continue
            if k == _REPAIR:
                out[w, a] = need[w, t] == carrying[w, a]
            elif k == _TOOL:
                of_use = False
                for m in range(status.shape[1]):
                    if status[w, m] == BROKEN and need[w, m] == t:
                        of_use = True
                        break
                out[w, a] = of_use


@numba.njit(cache=True)
def _candidates(rows, arrays, wanted, kind, cell, task):  # type: ignore[no-untyped-def]
    _grid, pos, carrying, _last, _steps, status, task_cell, _goal, need, _lock, machines = arrays
    for i in range(rows.shape[0]):
        w = rows[i]
        wanted[: status.shape[1]] = 0
        for m in range(machines):
            if status[w, m] == BROKEN:
                wanted[need[w, m]] = 1
        for a in range(pos.shape[1]):
            n = 0
            for t in range(status.shape[1]):
                fits = t != carrying[w, a] and wanted[t]
                if t < machines:
                    fits = status[w, t] == BROKEN and need[w, t] == carrying[w, a]
                if fits:
                    kind[i, a, n] = _REPAIR if t < machines else _TOOL
                    cell[i, a, n] = task_cell[w, t]
                    task[i, a, n] = t
                    n += 1
            kind[i, a, n] = 0
            cell[i, a, n] = pos[w, a]
