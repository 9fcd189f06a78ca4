"""The kernels of `subgoals`: judging, checking and showing the subgoals of all agents of all worlds at once."""

from __future__ import annotations

import numba
import numpy as np

from echelon.envs.kernels import UNREACHABLE, WALL, clip8, distance_field, first_step, write_way
from echelon.rng import mix

_DIR_ROW = np.array([-1, -1, 0, 1, 1, 1, 0, -1])
_DIR_COL = np.array([0, 1, 1, 1, 0, -1, -1, -1])


@numba.njit(cache=True)
def draw(rows, keys, counters, out):  # type: ignore[no-untyped-def]
    for i in range(rows.shape[0]):
        w = rows[i]
        for a in range(out.shape[1]):
            out[i, a] = mix(keys[w], counters[w])
            counters[w] += np.uint64(1)


@numba.njit(cache=True)
def fill_fields(field, kind, cell, grid, stride, queue):  # type: ignore[no-untyped-def]
    for w in range(kind.shape[0]):
        for a in range(kind.shape[1]):
            if kind[w, a] >= 0:
                distance_field(field[w, a], grid[w], cell[w, a], stride, queue)


@numba.njit(cache=True)
def judge(  # type: ignore[no-untyped-def]
    kind, cell, task, age, deadline, field, outcome, reward, need, is_open, ended, pos, done_by, row_of, col_of,
    before, mode, beta, gamma, triggers, every,
):  # fmt: skip
    on_reached, on_failed, on_timeout = triggers
    for w in range(kind.shape[0]):
        for a in range(kind.shape[1]):
            outcome[w, a] = 0
            ended[w, a] = False
            reward[w, a] = 0
            if kind[w, a] < 0:
                continue
            age[w, a] += 1
            here, goal, t = pos[w, a], cell[w, a], task[w, a]
            k = kind[w, a]
            wait = k == 0
            # Standing on a package's cell is not having it: what must be done counts once it is done.
            deed = k == 4 or k == 5 or k == 6
            reached = (not wait and not deed and here == goal) or (t >= 0 and done_by[w, t] == a)
            if reached:
                outcome[w, a] = 1
            elif not is_open[w, a]:
                outcome[w, a] = 2
            elif age[w, a] >= deadline[w, a]:
                outcome[w, a] = 3
            if mode == 0:
                dr, dc = row_of[here] - row_of[goal], col_of[here] - col_of[goal]
                reward[w, a] = -beta * np.sqrt(np.float64(dr * dr + dc * dc)) + reached
            elif mode == 1:
                # F = beta (gamma Phi(s') - Phi(s)), Phi = -path length; zero where the subgoal was reached.
                after = 0.0 if reached else np.float64(field[w, a, here])
                reward[w, a] = beta * (np.float64(field[w, a, before[w, a]]) - gamma * after) + reached
            else:
                reward[w, a] = reached
            o = outcome[w, a]
            late = age[w, a] >= deadline[w, a] and (on_timeout or wait)
            over = (o == 1 and on_reached) or (o == 2 and on_failed) or late
            ended[w, a] = over and o != 0
            if over or (every > 0 and age[w, a] % every == 0):
                need[w, a] = True


@numba.njit(cache=True)
def write_features(  # type: ignore[no-untyped-def]
    which, out, kind, cell, age, deadline, field, grid, pos, row_of, col_of, offsets, route
):
    for w in range(which.shape[0]):
        if not which[w]:
            continue
        for a in range(kind.shape[1]):
            f = out[w, a]
            f[:] = 0
            k = kind[w, a]
            if k < 0:
                continue
            here, goal = pos[w, a], cell[w, a]
            f[k] = 1
            write_way(f[8:13], row_of[goal] - row_of[here], col_of[goal] - col_of[here])
            f[13] = clip8(np.int64(field[w, a, here]))
            f[14] = max(127 * (deadline[w, a] - age[w, a]) // deadline[w, a], 0)
            if route:
                for m in range(1, 5):
                    f[14 + m] = first_step(field[w, a], grid[w], here, offsets[m])


@numba.njit(cache=True)
def measure(rows, need, kind, cell, grid, pos, stride, lengths, field, queue):  # type: ignore[no-untyped-def]
    for i in range(rows.shape[0]):
        w = rows[i]
        for a in range(need.shape[1]):
            if not need[i, a]:
                continue
            distance_field(field, grid[w], pos[w, a], stride, queue)
            for c in range(kind.shape[2]):
                if kind[i, a, c] >= 0:
                    lengths[i, a, c] = field[cell[i, a, c]]


@numba.njit(cache=True)
def measure_onwards(rows, need, kind, cell, goal, grid, stride, lengths, field, queue):  # type: ignore[no-untyped-def]
    """Add to `lengths` the way on from each candidate to its agent's `goal` (-1: none)."""
    for i in range(rows.shape[0]):
        w = rows[i]
        for a in range(need.shape[1]):
            if not need[i, a] or goal[w, a] < 0:
                continue
            distance_field(field, grid[w], goal[w, a], stride, queue)
            for c in range(kind.shape[2]):
                if kind[i, a, c] >= 0 and lengths[i, a, c] != UNREACHABLE:
                    on = np.uint32(lengths[i, a, c]) + np.uint32(field[cell[i, a, c]])
                    lengths[i, a, c] = np.uint16(min(on, np.uint32(UNREACHABLE)))


@numba.njit(cache=True)
def check(  # type: ignore[no-untyped-def]
    rows, todo, kind, cell, task, c_kind, c_cell, c_task, taken, grid, pos, stride, field, verdict, queue, exclusive
):
    cells, tasks = grid.shape[1], taken.shape[1]
    for i in range(rows.shape[0]):
        w = rows[i]
        for a in range(todo.shape[1]):
            if not todo[i, a]:
                continue
            k, c, t = kind[i, a], cell[i, a], task[i, a]
            known = 0 <= k < exclusive.shape[0] and 0 <= c < cells and -1 <= t < tasks
            if not known or (k >= 4 and t < 0) or (k == 0 and t >= 0):
                verdict[i, a] = 1
                continue
            legal = not grid[w, c] & WALL
            if k == 0:
                legal = c == pos[w, a]
            elif t >= 0:
                # What is about a task must be a candidate of this agent; anyone may be sent to a free cell.
                legal = False
                for j in range(c_kind.shape[2]):
                    if c_kind[i, a, j] == k and c_task[i, a, j] == t and c_cell[i, a, j] == c:
                        legal = True
            if not legal:
                verdict[i, a] = 2
                continue
            distance_field(field[w, a], grid[w], c, stride, queue)
            if field[w, a, pos[w, a]] == UNREACHABLE:
                verdict[i, a] = 3
                continue
            if t >= 0 and exclusive[k]:
                if taken[i, t]:
                    verdict[i, a] = 4
                    continue
                taken[i, t] = True


@numba.njit(cache=True)
def cell_candidates(rows, grid, keys, kind, cell, free):  # type: ignore[no-untyped-def]
    for i in range(rows.shape[0]):
        w = rows[i]
        n = 0
        for c in range(grid.shape[1]):
            if not grid[w, c] & WALL:
                free[n] = c
                n += 1
        for a in range(kind.shape[1]):
            for j in range(kind.shape[2]):
                r = mix(keys[i, a], np.uint64(j + 1))
                kind[i, a, j] = 1
                cell[i, a, j] = free[r % np.uint64(n)]


@numba.njit(cache=True)
def region_candidates(rows, grid, height, width, view, stride, kind, cell):  # type: ignore[no-untyped-def]
    for i in range(rows.shape[0]):
        w = rows[i]
        for j in range(16):
            top, bottom = height * (j // 4) // 4, height * (j // 4 + 1) // 4
            left, right = width * (j % 4) // 4, width * (j % 4 + 1) // 4
            best, best_d = -1, 1 << 30
            for r in range(top, bottom):
                for c in range(left, right):
                    flat = (r + view) * stride + c + view
                    d = abs(2 * r - top - bottom + 1) + abs(2 * c - left - right + 1)
                    if not grid[w, flat] & WALL and d < best_d:
                        best, best_d = flat, d
            for a in range(kind.shape[1]):
                if best >= 0:
                    kind[i, a, j] = 2
                    cell[i, a, j] = best


@numba.njit(cache=True)
def direction_candidates(  # type: ignore[no-untyped-def]
    rows, grid, pos, row_of, col_of, height, width, view, stride, kind, cell
):
    for i in range(rows.shape[0]):
        w = rows[i]
        for a in range(kind.shape[1]):
            for j in range(8):
                target = -1
                for step in range(1, 7):
                    r = row_of[pos[w, a]] + step * _DIR_ROW[j]
                    c = col_of[pos[w, a]] + step * _DIR_COL[j]
                    flat = (r + view) * stride + c + view
                    if 0 <= r < height and 0 <= c < width and not grid[w, flat] & WALL:
                        target = flat
                if target >= 0:
                    kind[i, a, j] = 3
                    cell[i, a, j] = target
