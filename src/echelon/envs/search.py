"""Cooperative search: find every hidden target within the time limit.

The team shares one map of what it has seen. Every step each agent sees the free cells within its sensor's
radius (Euclidean) to which a Bresenham line meets no wall; a target is found when its cell is seen. The task is
that of L2M2's Cooperative Search Grid. Our choices: the floor plan is known from the start (walls, and so the
regions), what stands in a cell that nobody has seen isn't; agents don't block sight; they look around
before the first step, and no target is found by that first look.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

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
    UNSEEN,
    WALL,
    draw_map,
    resolve_moves,
    sign8,
    take_free_cell,
    take_marked_cell,
)

__all__ = ["Search", "SearchConfig"]

OPEN, EXPLORED = 0, 1
_OTHER_FEATURES = 10
_SEE = 255 - UNSEEN
_TAKE = 255 - POINT


@dataclass(frozen=True)
class SearchConfig(GridConfig):
    """Settings of `search`."""

    layout: Literal["shelves", "random", "open"] = "random"
    """How generated maps look: blocks of shelves with aisles, single random walls, or no walls."""
    num_targets: int = 6
    """Hidden targets (1 to 64)."""
    sensor: int = 4
    """Radius in which an agent sees, in cells (1 to 8), where no wall stands between."""
    regions: int = 4
    """The map is divided into regions x regions rectangles, of which a planner may speak (1 to 8)."""


class Search(GridEnv[SearchConfig]):
    """See the module; arrays are described at `GridEnv`. The reward is 1 for each target found.

    The tasks are the regions: open while a free cell of theirs is unseen, then explored. `task_cell` is the
    unseen cell nearest to the region's middle; `task_done_by` names the agent that saw the region's last cell.

    Attributes beside `GridEnv`'s (N = num_targets):
        target_cell: int32 `(W, N)`, hidden from scenes and observations until found.
        target_found: bool `(W, N)`.
        unseen_left: int32 `(W, T)`, unseen free cells of each region.
        num_free: int32 `(W,)`, free cells of the map.
    """

    name = "search"
    status_words = ("open", "explored")
    kind_status = {SubgoalKind.REGION: OPEN}  # noqa: RUF012
    _own_state = ("target_cell", "target_found", "unseen_left", "num_free", "_next", "_looked")

    def _count_tasks(self) -> int:
        return self.config.regions**2

    def _cells_needed(self) -> int:
        return self.num_agents + self.config.num_targets + 1

    def _check_config(self) -> None:
        super()._check_config()
        c = self.config
        _check(1 <= c.num_targets <= 64, "num_targets", c.num_targets, "1 to 64")
        _check(1 <= c.sensor <= 8, "sensor", c.sensor, "1 to 8")
        most = min(8, self.height, self.width)
        _check(1 <= c.regions <= most, "regions", c.regions, f"1 to {most}")

    def _obs_scale(self) -> NDArray[np.float32]:
        """Beside what every world has: the window's plane of unseen cells; the share of the unseen cells in
        each of eight directions (NW, N, NE, W, E, SW, S, SE), by regions; the shares unseen and found."""
        plane = np.ones((2 * self.view + 1) ** 2, np.float32)
        shares = np.full(_OTHER_FEATURES, 1 / 127, np.float32)
        return np.concatenate([super()._obs_scale(), plane, shares])

    def _build(self) -> None:
        W, A, T, N = self.num_envs, self.num_agents, self.num_tasks, self.config.num_targets
        self.target_cell = np.zeros((W, N), np.int32)
        self.target_found = np.zeros((W, N), bool)
        self.unseen_left = np.zeros((W, T), np.int32)
        self.num_free = np.zeros(W, np.int32)
        self._next = np.zeros((W, T), np.int32)  # where in `_order` each region's task_cell stands
        self._looked = np.zeros((W, A), np.int32)  # the cell from which each agent last looked
        self._lists = np.zeros((4, max(T, 9)), np.int32)  # scratch
        self._layout = self._layout_args()
        self._marks = (self._marked("A"), self._marked("P"))
        self._sight = self._rays()
        self._bounds = [
            (r * self.height // n, (r + 1) * self.height // n, c * self.width // n, (c + 1) * self.width // n)
            for n in (self.config.regions,)
            for r in range(n)
            for c in range(n)
        ]
        self._region_of = np.full(self.num_cells, -1, np.int16)
        inside = self._region_of.reshape(-1, self.stride)[self.view :, self.view :]
        for t, (top, bottom, left, right) in enumerate(self._bounds):
            inside[top:bottom, left:right] = t
        # Each region's cells from its middle outwards: cells are only ever seen, never forgotten, so the nearest
        # unseen one is found by moving on in this list.
        self._order = np.zeros((T, int(np.bincount(self._region_of[self._region_of >= 0]).max())), np.int32)
        for t, (top, bottom, left, right) in enumerate(self._bounds):
            cells = np.flatnonzero(self._region_of == t)
            far = (2 * self.row_of[cells] - (top + bottom - 1)) ** 2
            far = far + (2 * self.col_of[cells] - (left + right - 1)) ** 2
            self._order[t, : len(cells)] = cells[np.argsort(far, kind="stable")]
        self._zones = tuple(
            ZoneView(t, f"region {t}", tuple((r, c) for r in range(b[0], b[1]) for c in range(b[2], b[3])))
            for t, b in enumerate(self._bounds)
        )

    def _rays(self) -> tuple[Any, ...]:
        """How far a sensor sees to the side in each row, and the cells between it and each cell that it covers."""
        reach = self.config.sensor
        spans = np.array([int((reach**2 - dr**2) ** 0.5) for dr in range(-reach, reach + 1)], np.int32)
        rays = np.zeros((2 * reach + 1, 2 * reach + 1, reach), np.int32)
        for dr in range(-reach, reach + 1):
            for dc in range(-reach, reach + 1):
                for i, (r, c) in enumerate(bresenham(dr, dc)):
                    rays[dr + reach, dc + reach, i] = r * self.stride + c
        return (reach, spans, rays, self.height, self.width, self.view, self.stride, self.row_of, self.col_of)

    def _arrays(self) -> tuple[Any, ...]:
        return (
            self.grid, self.pos, self.last_action, self.steps, self.task_status, self.task_cell,
            self.target_cell, self.target_found, self.unseen_left, self._next, self._looked,
        )  # fmt: skip

    def _advance(self, actions: NDArray[np.int8]) -> None:
        _advance(
            actions, self._arrays(), self.offsets, self.limit, self._sight, self._region_of, self._order,
            self.reward, self.terminated, self.truncated, self.collisions, self.bumped, self.task_done_by,
            self.new_info, self._target,
        )  # fmt: skip
        self._observe(self._every)

    def _reset_worlds(self, which: NDArray[np.bool_]) -> None:
        _reset(
            which, self._arrays(), self._layout, self._marks, self._sight, self._region_of, self._order,
            self.num_free, self.keys, self.counters, self._scratch,
        )  # fmt: skip
        self._observe(which)

    def _observe(self, which: NDArray[np.bool_]) -> None:
        super()._observe(which)
        start = self.obs_size - _OTHER_FEATURES - (2 * self.view + 1) ** 2
        _observe_unseen(
            which, self.grid, self.pos, self.task_cell, self.unseen_left, self.num_free, self.target_found,
            self.obs_buffer[:, :, start : self.obs_size], self._geometry(), tuple(self._lists),
        )  # fmt: skip

    def candidate_arrays(self, rows: NDArray[np.int64]) -> Candidates:
        """Explore each open region, or wait."""
        shape = (len(rows), self.num_agents, self.num_tasks + 1)
        out = Candidates(np.full(shape, -1, np.int8), np.zeros(shape, np.int32), np.full(shape, -1, np.int16))
        _candidates(rows, self.pos, self.task_status, self.task_cell, out.kind, out.cell, out.task)
        return out

    @property
    def goals(self) -> int:
        """The targets."""
        return self.config.num_targets

    def outlook(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """As `GridEnv.outlook`; the gain is how much of a region is unseen, in quarters (0 to 4, rounded up)."""
        cells = np.array([(bottom - top) * (right - left) for top, bottom, left, right in self._bounds])
        gain = -(-4 * self.unseen_left[rows].astype(np.int64) // cells)
        return np.zeros_like(gain), gain

    def scene(self, i: int) -> Scene:
        """The structured view of world `i`: regions as tasks and zones, then targets, hidden ones without a cell."""
        tasks = [
            TaskView(
                t, "region", f"region {t}", self.row_col(self.task_cell[i, t]), None,
                self.status_words[self.task_status[i, t]],
            )
            for t in range(self.num_tasks)
        ]  # fmt: skip
        for n, (cell, found) in enumerate(zip(self.target_cell[i], self.target_found[i], strict=True)):
            place = self.row_col(cell) if found else None
            status = "found" if found else "hidden"
            tasks.append(TaskView(self.num_tasks + n, "target", f"target {n}", place, None, status))
        inside = self.grid[i].reshape(-1, self.stride)[self.view :, self.view :][: self.height, : self.width]
        seen = (inside & UNSEEN) == 0
        seen.flags.writeable = False
        return Scene(
            self.name, int(self.steps[i]), self.limit, self.walls(i), self.agent_views(i), tuple(tasks),
            self._zones, seen,
        )  # fmt: skip

    @classmethod
    def describe(cls, scene: Scene) -> str:
        """The scene in words: one line a robot, one a found target, one an open region."""
        assert scene.seen is not None
        rows, cols = scene.walls.shape
        targets = [t for t in scene.tasks if t.kind == "target"]
        found = [t for t in targets if t.cell is not None]
        lines = [
            f"Search area of {rows} rows and {cols} columns, step {scene.step} of {scene.limit}. "
            f"{len(found)} of {len(targets)} targets are found."
        ]
        lines.extend(f"Robot {agent.id} is at {agent.cell}." for agent in scene.agents)
        lines.extend(f"A target was found at {t.cell}." for t in found)
        for t in scene.tasks:
            if t.kind == "region" and t.status == "open":
                cells = scene.zones[t.id].cells
                left = sum(not scene.seen[cell] for cell in cells)
                (top, west), (bottom, east) = cells[0], cells[-1]
                lines.append(
                    f"Region {t.id} (rows {top} to {bottom}, columns {west} to {east}) has {left} unseen cells; "
                    f"the one nearest to its middle is {t.cell}."
                )
        return "\n".join(lines)

    @classmethod
    def candidates(cls, scene: Scene, agent: int) -> tuple[Subgoal, ...]:
        """The subgoals that make sense now for one agent; agrees with `candidate_arrays`."""
        explore = [
            Subgoal(SubgoalKind.REGION, t.cell, t.id, f"explore region {t.id} at {t.cell}")
            for t in scene.tasks
            if t.kind == "region" and t.status == "open" and t.cell is not None
        ]
        return (*explore, Subgoal(SubgoalKind.WAIT, scene.agents[agent].cell, None, "wait"))


def bresenham(dr: int, dc: int) -> list[tuple[int, int]]:
    """The cells strictly between (0, 0) and (dr, dc) on Bresenham's line, from the first on."""
    cells: list[tuple[int, int]] = []
    r = c = 0
    rows, cols = abs(dr), abs(dc)
    error = cols - rows
    while True:
        twice = 2 * error
        if twice > -rows:
            error -= rows
            c += 1 if dc > 0 else -1
        if twice < cols:
            error += cols
            r += 1 if dr > 0 else -1
        if abs(r) >= rows and abs(c) >= cols:
            return cells
        cells.append((r, c))


@numba.njit(cache=True)
def _look(grid, cell, agent, sight, region_of, left, done_by, target_cell, found):  # type: ignore[no-untyped-def]
    """See from `cell`; the number of targets found. Only cells that are still unseen cost a ray."""
    reach, spans, rays, height, width, view, stride, row_of, col_of = sight
    row, col = row_of[cell], col_of[cell]
    gained = 0
    for r in range(max(row - reach, 0), min(row + reach + 1, height)):
        span = spans[r - row + reach]
        start = (r + view) * stride + view
        for c in range(max(col - span, 0), min(col + span + 1, width)):
            to = np.uintp(start + c)
            code = grid[to]
            if not code & UNSEEN:
                continue
            dr, dc = r - row, c - col
            ray = rays[dr + reach, dc + reach]
            blocked = False
            for i in range(max(abs(dr), abs(dc)) - 1):
                if grid[np.uintp(cell + ray[i])] & WALL:
                    blocked = True
                    break
            if blocked:
                continue
            t = region_of[to]
            left[t] -= 1
            if left[t] == 0:
                done_by[t] = agent
            if code & POINT:
                gained += 1
                for n in range(target_cell.shape[0]):
                    if target_cell[n] == np.int64(to):
                        found[n] = True
            grid[to] = code & _SEE & _TAKE
    return gained


@numba.njit(inline="always", cache=True)
def _update_regions(grid, status, task_cell, left, nearest, order):  # type: ignore[no-untyped-def]
    for t in range(status.shape[0]):
        if status[t] != OPEN:
            continue
        if left[t] == 0:
            status[t] = EXPLORED
            continue
        k = nearest[t]
        while not grid[order[t, k]] & UNSEEN:
            k += 1
        nearest[t] = k
        task_cell[t] = order[t, k]


@numba.njit(cache=True)
def _advance(  # type: ignore[no-untyped-def]
    actions, arrays, offsets, limit, sight, region_of, order, reward, terminated, truncated, collisions, bumped,
    done_by, new_info, target,
):  # fmt: skip
    grid, pos, last_action, steps, status, task_cell, target_cell, found, left, nearest, looked = arrays
    num_agents = pos.shape[1]
    for w in range(pos.shape[0]):
        collisions[w] = resolve_moves(grid[w], pos[w], actions[w], offsets, steps[w] % num_agents, target, bumped[w])
        steps[w] += 1
        done_by[w, :] = -1
        gained, looks = 0, 0
        for a in range(num_agents):
            last_action[w, a] = actions[w, a]
            cell = pos[w, a]
            # Walls stand still: who hasn't moved sees nothing new.
            if cell != looked[w, a]:
                looked[w, a] = cell
                looks += 1
                gained += _look(grid[w], cell, a, sight, region_of, left[w], done_by[w], target_cell[w], found[w])
        if looks:
            _update_regions(grid[w], status[w], task_cell[w], left[w], nearest[w], order)
        done = 0
        for n in range(found.shape[1]):
            done += found[w, n]
        reward[w] = gained
        new_info[w] = gained > 0
        terminated[w] = done == found.shape[1]
        truncated[w] = done < found.shape[1] and steps[w] >= limit


@numba.njit(cache=True)
def _reset(  # type: ignore[no-untyped-def]
    which, arrays, layout, marks, sight, region_of, order, num_free, keys, counters, scratch
):
    grid, pos, last_action, steps, status, task_cell, target_cell, found, left, nearest, looked = arrays
    starts, places = marks
    num_targets = target_cell.shape[1]
    nobody = np.zeros(status.shape[1], np.int16)
    for w in range(which.shape[0]):
        if not which[w]:
            continue
        free = scratch[2]
        key, counter = keys[w], counters[w]
        counter, n = draw_map(grid[w], layout, scratch[0], scratch[1], free, key, counter)
        num_free[w] = n
        left[w, :] = 0
        for i in range(n):
            grid[w, free[i]] |= UNSEEN
            left[w, region_of[free[i]]] += 1
        if places.shape[0]:
            for t in range(num_targets):
                target_cell[w, t] = take_marked_cell(places, free, n, key, counter)
                counter += np.uint64(1)
                n -= 1
        for a in range(pos.shape[1]):
            cell = take_marked_cell(starts, free, n, key, counter)
            counter += np.uint64(1)
            n -= 1
            pos[w, a] = cell
            grid[w, cell] |= AGENT
            last_action[w, a] = 0
            # All look again after their first move, also those that stay.
            looked[w, a] = -1
        for a in range(pos.shape[1]):
            _look(grid[w], pos[w, a], a, sight, region_of, left[w], nobody, target_cell[w], found[w])
        if not places.shape[0]:
            # Among the unseen cells as long as there are any (they are moved to the front), then among the seen.
            unseen = 0
            for i in range(n):
                if grid[w, free[i]] & UNSEEN:
                    free[i], free[unseen] = free[unseen], free[i]
                    unseen += 1
            for t in range(num_targets):
                if unseen == 0:
                    free = scratch[2][t:]
                    unseen = n - t
                target_cell[w, t] = take_free_cell(free, unseen, key, counter)
                counter += np.uint64(1)
                unseen -= 1
        for t in range(num_targets):
            cell = target_cell[w, t]
            found[w, t] = False
            # A target in sight of a start is found in the first step, so that every target brings its reward.
            if not grid[w, cell] & UNSEEN:
                left[w, region_of[cell]] += 1
            grid[w, cell] |= POINT | UNSEEN
        for t in range(status.shape[1]):
            status[w, t] = OPEN
            nearest[w, t] = 0
            task_cell[w, t] = order[t, 0]
        _update_regions(grid[w], status[w], task_cell[w], left[w], nearest[w], order)
        steps[w] = 0
        counters[w] = counter


@numba.njit(inline="always", cache=True)
def _unseen_window(out, grid, corner, width, stride):  # type: ignore[no-untyped-def]
    start, k = np.uintp(corner), np.uintp(0)
    for _ in range(width):
        for i in range(width):
            out[k] = (grid[start + np.uintp(i)] >> 3) & 1
            k += np.uintp(1)
        start += np.uintp(stride)


@numba.njit(cache=True)
def _observe_unseen(  # type: ignore[no-untyped-def]
    which, grid, pos, task_cell, left, num_free, found, out, geometry, scratch
):
    rows, cols, open_left, sums = scratch
    _offsets, row_of, col_of, view, stride, _limit = geometry
    plane = (2 * view + 1) ** 2
    for w in range(which.shape[0]):
        if not which[w]:
            continue
        unseen, done, num = 0, 0, 0
        for t in range(left.shape[1]):
            if left[w, t]:
                unseen += left[w, t]
                rows[num] = row_of[task_cell[w, t]]
                cols[num] = col_of[task_cell[w, t]]
                open_left[num] = left[w, t]
                num += 1
        for n in range(found.shape[1]):
            done += found[w, n]
        # In 2**20ths, rounded up: a division for each world, not for each share.
        share = (127 << 20) // max(unseen, 1) + 1
        share_unseen, share_found = 127 * unseen // num_free[w], 127 * done // found.shape[1]
        for a in range(pos.shape[1]):
            cell = pos[w, a]
            corner = cell - view * stride - view
            if view == 2:
                _unseen_window(out[w, a], grid[w], corner, 5, stride)
            else:
                _unseen_window(out[w, a], grid[w], corner, 2 * view + 1, stride)
            row, col = np.int32(row_of[cell]), np.int32(col_of[cell])
            for d in range(9):
                sums[d] = 0
            for j in range(num):
                i = np.uintp(j)
                down, right = rows[i] - row, cols[i] - col
                # An eighth of the circle each, about: 2/5 is nearly the tangent of 22.5 degrees.
                north = (5 * abs(down) >= 2 * abs(right)) * sign8(down)
                east = (5 * abs(right) >= 2 * abs(down)) * sign8(right)
                sums[np.uintp(3 * north + east + 4)] += open_left[i]
            shares = out[w, a, plane:]
            for d in range(9):
                if d != 4:
                    shares[d - (d > 4)] = (np.int64(sums[d]) * share) >> 20
            shares[8] = share_unseen
            shares[9] = share_found


@numba.njit(cache=True)
def _candidates(rows, pos, status, task_cell, kind, cell, task):  # type: ignore[no-untyped-def]
    for i in range(rows.shape[0]):
        w = rows[i]
        for a in range(pos.shape[1]):
            n = 0
            for t in range(status.shape[1]):
                if status[w, t] == OPEN:
                    kind[i, a, n] = 2
                    cell[i, a, n] = task_cell[w, t]
                    task[i, a, n] = t
                    n += 1
            kind[i, a, n] = 0
            cell[i, a, n] = pos[w, a]
