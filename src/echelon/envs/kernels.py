"""What every grid world's kernels share: moves without collisions, windows, distance fields, maps.

Cells are flat indices into a padded grid (`GridLayout`): the map stands inside a border of walls as wide as
the view, so that neither a move nor a window ever needs a bounds check. Each cell is one byte of flags.
"""

from __future__ import annotations

import numba
import numpy as np

from echelon.rng import below

__all__ = [
    "AGENT",
    "POINT",
    "UNREACHABLE",
    "UNSEEN",
    "WALL",
    "clip8",
    "contains",
    "distance_field",
    "draw_layout",
    "draw_map",
    "first_step",
    "keep_largest_component",
    "keep_three",
    "observe_agents",
    "observe_tasks",
    "open_subgoals",
    "resolve_moves",
    "sign8",
    "take_free_cell",
    "take_marked_cell",
    "write_masks",
    "write_own",
    "write_states",
    "write_way",
    "write_window",
]

WALL, AGENT, POINT, UNSEEN = 1, 2, 4, 8
_CLAIM = 128
UNREACHABLE = np.uint16(65535)


@numba.njit(inline="always", cache=True)
def clip8(x: int) -> int:
    """`x` as it fits into a signed byte."""
    return min(max(x, -127), 127)


@numba.njit(inline="always", cache=True)
def sign8(x: int) -> int:
    """-1, 0 or 1."""
    return int(x > 0) - int(x < 0)


@numba.njit(cache=True)
def _resolve_conflicts(pos, target, first, bumped):  # type: ignore[no-untyped-def]
    """Cancel moves until no two agents share a cell or swap; the number of cancelled moves.

    Of several agents that want one cell, the first in the rotating order that begins with agent `first`
    wins. Following into a cell that is being vacated is allowed, and so are rotations of three or more.
    """
    num = pos.shape[0]
    cancelled = 0
    changed = True
    while changed:
        changed = False
        for i in range(num):
            a = (first + i) % num
            if target[a] == pos[a]:
                continue
            for b in range(num):
                if b == a:
                    continue
                if target[b] == target[a] and (target[b] == pos[b] or (b - first) % num < i):
                    break
                if target[b] == pos[a] and target[a] == pos[b]:
                    break
            else:
                continue
            target[a] = pos[a]
            bumped[a] = 1
            cancelled += 1
            changed = True
    return cancelled


@numba.njit(cache=True)
def resolve_moves(grid, pos, actions, offsets, first, target, bumped):  # type: ignore[no-untyped-def]
    """Move the agents of one world at once; the number of moves that another agent prevented.

    Args:
        grid: uint8 `(cells,)`, its AGENT bits are kept up to date.
        pos: int32 `(agents,)`, updated.
        actions: int8 `(agents,)` in [0, 5); a move into a wall is a stay.
        offsets: int32 `(5,)`, a move as a difference of cells.
        first: the agent that goes first where several want one cell.
        target: int32 `(agents,)` scratch.
        bumped: uint8 `(agents,)`, written: 1 where another agent prevented the move.
    """
    num = pos.shape[0]
    contact = False
    for a in range(num):
        cell = pos[a] + offsets[actions[a]]
        code = grid[cell]
        if code & WALL:
            cell = pos[a]
            code = grid[cell]
        if cell != pos[a] and code & (AGENT | _CLAIM):
            contact = True
        grid[cell] = code | _CLAIM
        target[a] = cell
    for a in range(num):
        grid[target[a]] &= ~_CLAIM & 255
    # An agent that stays where another wants to go is seen through its AGENT bit, so no contact: no conflict.
    bumped[:] = 0
    cancelled = _resolve_conflicts(pos, target, first, bumped) if contact else 0
    for a in range(num):
        grid[pos[a]] &= ~AGENT & 255
    for a in range(num):
        pos[a] = target[a]
        grid[target[a]] |= AGENT
    return cancelled


@numba.njit(inline="always", cache=True)
def _window(out, grid, corner, width, stride):  # type: ignore[no-untyped-def]
    # Unsigned indices spare numba's test for negative ones, which would keep the loops from being vectorised.
    plane = np.uintp(width * width)
    start, k = np.uintp(corner), np.uintp(0)
    for _ in range(width):
        for i in range(width):
            code = grid[start + np.uintp(i)]
            out[k] = code & 1
            out[k + plane] = (code >> 1) & 1
            k += np.uintp(1)
        start += np.uintp(stride)


@numba.njit(inline="always", cache=True)
def write_window(out, grid, cell, view, stride):  # type: ignore[no-untyped-def]
    """The egocentric window: a plane of walls, then a plane of agents; int8 `(2·(2·view+1)²,)`."""
    corner = cell - view * stride - view
    # A width known to the compiler unrolls: 5 times as fast.
    if view == 2:
        _window(out, grid, corner, 5, stride)
    elif view == 3:
        _window(out, grid, corner, 7, stride)
    else:
        _window(out, grid, corner, 2 * view + 1, stride)


@numba.njit(inline="always", cache=True)
def write_masks(mask, grid, cell, stride):  # type: ignore[no-untyped-def]
    """Which of the five moves don't run into a wall; uint8 `(5,)`."""
    mask[0] = 1
    mask[1] = (grid[cell - stride] & WALL) ^ WALL
    mask[2] = (grid[cell + 1] & WALL) ^ WALL
    mask[3] = (grid[cell + stride] & WALL) ^ WALL
    mask[4] = (grid[cell - 1] & WALL) ^ WALL


@numba.njit(inline="always", cache=True)
def write_own(out, agent, last_action, time, bumped):  # type: ignore[no-untyped-def]
    """The part of an agent's own state that every world has: int8 `(13,)`.

    Time left (127 at the start, 0 at the limit), the last move (one-hot), the agent's id (six bits, ±1),
    whether another agent prevented the last move (without it two that meet head-on push for ever).
    """
    out[0] = time
    for i in range(5):
        out[1 + i] = 0
    out[1 + last_action] = 1
    for i in range(6):
        out[6 + i] = 2 * ((agent >> i) & 1) - 1
    out[12] = bumped


@numba.njit(inline="always", cache=True)
def write_way(out, rows, cols):  # type: ignore[no-untyped-def]
    """A way of so many rows and columns as present, sign and size; int8 `(5,)`."""
    out[0] = 1
    out[1] = sign8(rows)
    out[2] = sign8(cols)
    out[3] = clip8(rows)
    out[4] = clip8(cols)


@numba.njit(cache=True)
def observe_agents(which, grid, pos, last_action, bumped, steps, load_goal, obs, mask, geometry):  # type: ignore[no-untyped-def]
    """What every world's agents see: window, own state, the way to where the load must go, and the masks.

    Args:
        which: bool `(W,)`, the worlds to write.
        load_goal: int32 `(W, A)`, the cell an agent's load must be brought to, or -1.
        obs: int8 `(W, A, features)`, written from its first feature on.
        mask: uint8 `(W, A, 5)`, written.
        geometry: `GridEnv._geometry()`.
    """
    _offsets, row_of, col_of, view, stride, limit = geometry
    own = 2 * (2 * view + 1) ** 2
    for w in range(which.shape[0]):
        if not which[w]:
            continue
        time = 127 * (limit - steps[w]) // limit
        began = steps[w] > 0
        for a in range(pos.shape[1]):
            cell = pos[w, a]
            out = obs[w, a]
            write_window(out, grid[w], cell, view, stride)
            write_own(out[own:], a, last_action[w, a], time, began and bumped[w, a])
            goal = load_goal[w, a]
            way = out[own + 13 : own + 18]
            if goal >= 0:
                write_way(way, row_of[goal] - row_of[cell], col_of[goal] - col_of[cell])
            else:
                way[:] = 0
            write_masks(mask[w, a], grid[w], cell, stride)


@numba.njit(inline="always", cache=True)
def keep_three(first, second, third, new):  # type: ignore[no-untyped-def]
    """The three least of four numbers, in order; the first three are in order already."""
    # Without branches, for the processor can't foretell them.
    rest = max(first, new)
    return min(first, new), min(second, rest), min(third, max(second, rest))


@numba.njit(cache=True)
def observe_tasks(which, pos, seen_tasks, task_cell, out, geometry, scratch):  # type: ignore[no-untyped-def]
    """Each agent's three nearest tasks (Manhattan; of equals the first) as ways; zeros where there are fewer.

    Args:
        which: bool `(W,)`, the worlds to write.
        seen_tasks: bool `(W, T)`, the tasks that count.
        task_cell: int32 `(W, T)`.
        out: int8 `(W, A, 15)`, written.
        geometry: `GridEnv._geometry()`.
        scratch: int32 `(2, at least T)`.
    """
    _offsets, row_of, col_of, _view, _stride, _limit = geometry
    rows, cols = scratch[0], scratch[1]
    none = np.int32(1 << 30)
    for w in range(which.shape[0]):
        if not which[w]:
            continue
        num = 0
        for t in range(seen_tasks.shape[1]):
            if seen_tasks[w, t]:
                rows[num] = row_of[task_cell[w, t]]
                cols[num] = col_of[task_cell[w, t]]
                num += 1
        for a in range(pos.shape[1]):
            row, col = np.int32(row_of[pos[w, a]]), np.int32(col_of[pos[w, a]])
            # Distance and index in one number, so that comparisons keep the order.
            first, second, third = none, none, none
            for t in range(num):
                i = np.uintp(t)
                d = (np.int32(abs(rows[i] - row) + abs(cols[i] - col)) << np.int32(8)) | np.int32(t)
                first, second, third = keep_three(first, second, third, d)
            k = 0
            for code in (first, second, third):
                way = out[w, a, k : k + 5]
                if code < none:
                    i = np.uintp(code & 255)
                    write_way(way, rows[i] - row, cols[i] - col)
                else:
                    way[:] = 0
                k += 5


@numba.njit(cache=True)
def open_subgoals(kind, task, status, carrying, kind_status, kind_holder, out):  # type: ignore[no-untyped-def]
    """Which subgoals can still be done, by status and holder; see `GridEnv.subgoals_open`.

    Args:
        kind_status: int8 `(kinds,)`, the status that a kind needs, or -1.
        kind_holder: bool `(kinds,)`, whether the agent must carry the task.
    """
    for w in range(kind.shape[0]):
        for a in range(kind.shape[1]):
            k, t = kind[w, a], task[w, a]
            still = True
            if k >= 0 and t >= 0:
                need = kind_status[k]
                still = (need < 0 or status[w, t] == need) and (not kind_holder[k] or carrying[w, a] == t)
            out[w, a] = still


@numba.njit(cache=True)
def distance_field(field, grid, source, stride, queue):  # type: ignore[no-untyped-def]
    """Breadth-first path lengths from `source` to every cell of one world, walls respected, agents ignored.

    Args:
        field: uint16 `(cells,)`, written; `UNREACHABLE` where no path leads.
        grid: uint8 `(cells,)`.
        source: a cell; where it is a wall, everything is unreachable.
        stride: the padded grid's row length.
        queue: int32 `(cells,)` scratch.
    """
    field[:] = UNREACHABLE
    if grid[source] & WALL:
        return
    field[source] = 0
    queue[0] = source
    head, tail = 0, 1
    while head < tail:
        cell = queue[head]
        head += 1
        d = field[cell] + 1
        for n in (cell - stride, cell + 1, cell + stride, cell - 1):
            if field[n] == UNREACHABLE and not grid[n] & WALL:
                field[n] = d
                queue[tail] = n
                tail += 1


@numba.njit(inline="always", cache=True)
def first_step(field, grid, cell, offset):  # type: ignore[no-untyped-def]
    """1 if the move by `offset` shortens the way of `field`, -1 if it is a wall or lengthens it, else 0."""
    n = cell + offset
    if grid[n] & WALL:
        return -1
    return sign8(np.int64(field[cell]) - np.int64(field[n]))


@numba.njit(cache=True)
def keep_largest_component(grid, stride, label, queue):  # type: ignore[no-untyped-def]
    """Turn every free cell outside the largest connected region into a wall; the region's size.

    Args:
        grid: uint8 `(cells,)` with a border of walls.
        label: int32 `(cells,)` scratch; queue: int32 `(cells,)` scratch.
    """
    label[:] = 0
    best, best_size, count = 0, 0, 0
    for start in range(grid.shape[0]):
        if grid[start] & WALL or label[start]:
            continue
        count += 1
        label[start] = count
        queue[0] = start
        head, tail = 0, 1
        while head < tail:
            cell = queue[head]
            head += 1
            for n in (cell - stride, cell + 1, cell + stride, cell - 1):
                if not grid[n] & WALL and label[n] == 0:
                    label[n] = count
                    queue[tail] = n
                    tail += 1
        if tail > best_size:
            best, best_size = count, tail
    for cell in range(grid.shape[0]):
        if not grid[cell] & WALL and label[cell] != best:
            grid[cell] = WALL
    return best_size


OPEN, SHELVES, RANDOM = 0, 1, 2


@numba.njit(cache=True)
def draw_layout(grid, height, width, view, stride, layout, density, aisle, key, counter):  # type: ignore[no-untyped-def]
    """Draw one map's walls into `grid` (uint8 `(cells,)`); the next unused counter.

    `SHELVES` sets blocks of 2 by 4 cells with aisles between and around them, each kept with a chance that
    gives walls on about `density` of the map; `RANDOM` sets each cell independently. Connectedness is the
    caller's (`keep_largest_component`).
    """
    grid[:] = WALL
    for row in range(height):
        start = (row + view) * stride + view
        for col in range(width):
            grid[start + col] = 0
    if layout == RANDOM:
        for row in range(height):
            for col in range(width):
                if below(key, counter, 1 << 24) < density * (1 << 24):
                    grid[(row + view) * stride + view + col] = WALL
                counter += np.uint64(1)
    elif layout == SHELVES:
        rows, cols = 2 + aisle, 4 + aisle
        keep = min(1.0, density * rows * cols / 8.0)
        top = aisle + below(key, counter, 2)
        left = aisle + below(key, counter + np.uint64(1), 2)
        counter += np.uint64(2)
        for row in range(top, height - aisle - 1, rows):
            for col in range(left, width - aisle - 3, cols):
                if below(key, counter, 1 << 24) < keep * (1 << 24):
                    for i in range(2):
                        for j in range(4):
                            grid[(row + i + view) * stride + view + col + j] = WALL
                counter += np.uint64(1)
    return counter


@numba.njit(inline="always", cache=True)
def take_free_cell(free, num_free, key, counter):  # type: ignore[no-untyped-def]
    """A random one of the first `num_free` entries of `free`, moved behind them (draw without return)."""
    i = below(key, counter, num_free)
    cell = free[i]
    free[i] = free[num_free - 1]
    free[num_free - 1] = cell
    return cell


@numba.njit(cache=True)
def draw_map(grid, args, label, queue, free, key, counter):  # type: ignore[no-untyped-def]
    """Draw one connected map and list its free cells: (next counter, number of free cells).

    A drawn map that leaves too little room is drawn again, after some tries with no walls at all, so that
    this always ends. Every free cell can be reached from every other.

    Args:
        grid: uint8 `(cells,)`, written.
        args: `GridEnv._layout_args()`.
        label, queue: int32 `(cells,)` scratch.
        free: int32 `(cells,)`, its first entries are written.
    """
    template, from_file, height, width, view, stride, layout, density, aisle, need = args
    size = 0
    tries = 0
    while size < need:
        if from_file:
            grid[:] = template
        else:
            counter = draw_layout(
                grid,
                height,
                width,
                view,
                stride,
                layout if tries < 20 else OPEN,
                density,
                aisle,
                key,
                counter,
            )
        size = keep_largest_component(grid, stride, label, queue)
        tries += 1
    n = 0
    for cell in range(grid.shape[0]):
        if not grid[cell] & WALL:
            free[n] = cell
            n += 1
    return counter, n


@numba.njit(inline="always", cache=True)
def contains(cells, cell):  # type: ignore[no-untyped-def]
    """Whether `cell` is one of `cells`."""
    for i in range(cells.shape[0]):  # noqa: SIM110 (no generators in numba)
        if cells[i] == cell:
            return True
    return False


@numba.njit(inline="always", cache=True)
def take_marked_cell(marked, free, num_free, key, counter):  # type: ignore[no-untyped-def]
    """As `take_free_cell`, but among the cells of `marked` that are still free, where any are marked.

    Falls back to any free cell once all marked ones are taken.
    """
    left = 0
    for m in range(marked.shape[0]):
        for i in range(num_free):
            if free[i] == marked[m]:
                left += 1
                break
    if left == 0:
        return take_free_cell(free, num_free, key, counter)
    pick = below(key, counter, left)
    for m in range(marked.shape[0]):
        for i in range(num_free):
            if free[i] == marked[m]:
                if pick == 0:
                    cell = free[i]
                    free[i] = free[num_free - 1]
                    free[num_free - 1] = cell
                    return cell
                pick -= 1
                break
    return -1


@numba.njit(cache=True)
def write_states(  # type: ignore[no-untyped-def]
    out,
    rows,
    pos,
    carrying,
    status,
    task_cell,
    task_goal,
    steps,
    limit,
    row_of,
    col_of,
    mid_row,
    mid_col,
    words,
):
    """The centralised state; see `GridEnv.states`."""
    num_agents, num_tasks = pos.shape[1], status.shape[1]
    for i in range(rows.shape[0]):
        w = rows[i]
        out[i, 0] = 127 * (limit - steps[w]) // limit
        k = 1
        for a in range(num_agents):
            cell = pos[w, a]
            row, col = row_of[cell], col_of[cell]
            out[i, k] = clip8(row - mid_row)
            out[i, k + 1] = clip8(col - mid_col)
            load = carrying[w, a]
            out[i, k + 2] = load >= 0
            out[i, k + 3] = 0
            out[i, k + 4] = 0
            if 0 <= load < num_tasks and task_goal[w, load] > 0:
                out[i, k + 3] = clip8(row_of[task_goal[w, load]] - row)
                out[i, k + 4] = clip8(col_of[task_goal[w, load]] - col)
            k += 5
        for t in range(num_tasks):
            for s in range(words):
                out[i, k + s] = status[w, t] == s
            k += words
            out[i, k] = clip8(row_of[task_cell[w, t]] - mid_row)
            out[i, k + 1] = clip8(col_of[task_cell[w, t]] - mid_col)
            goal = task_goal[w, t] if task_goal[w, t] > 0 else task_cell[w, t]
            out[i, k + 2] = clip8(row_of[goal] - mid_row)
            out[i, k + 3] = clip8(col_of[goal] - mid_col)
            k += 4
