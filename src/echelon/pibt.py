"""Priority inheritance with backtracking (PIBT): collision-free moves for all agents of all worlds, one step at a time.

Okumura, Machida, Défago and Tamura: "Priority inheritance with backtracking for iterative multi-agent path finding",
Artificial Intelligence 310 (2022), 103752; first at IJCAI 2019. Agents choose in the order of their priorities. One
that wants an occupied cell lends its priority to whoever stands there, who must then move away first; if that one
can't, the wish is refused and the next best cell is tried. An agent's priority grows until it arrives, so everybody
is the first in turn. On a map where every two neighbouring cells lie on a common cycle, the first can always move,
hence every agent visits its goal within (agents · longest path) steps.

In dead ends there is no such promise: who must get out and who wants in may stand before each other for ever. Two
rules of our own help there, and change nothing where the promise holds: agents that have nothing to do leave dead
ends, and the first of all agents, if it can't come nearer to its goal, goes last in the next step.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from echelon.rng import mix

__all__ = ["Scratch", "parking_fields", "pibt_moves", "pibt_scratch"]

_MOVES = 5
_FAR = np.uint16(65535)

Scratch = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.int8]]


def pibt_scratch(num_agents: int, num_cells: int) -> Scratch:
    """The working memory of `pibt_moves`, to be kept between calls."""
    return (
        np.full((2, num_cells), -1, np.int32),
        np.empty((4, num_agents), np.int32),
        np.empty(_MOVES, np.int32),
        np.empty((num_agents, _MOVES), np.int8),
    )


@numba.njit(cache=True)
def parking_fields(which, walls, offsets, fields):  # type: ignore[no-untyped-def]
    """The steps out of dead ends: path lengths to the nearest cell that isn't part of one.

    Cells with one free neighbour or none are taken away until there are no more; what is left is no dead end. Where
    nothing is left, every cell is as good as any other.

    Args:
        which: bool `(W,)`, the worlds to write.
        walls: bool `(W, cells)`, walled all round.
        offsets: int32 `(5,)`, the moves as differences of cells, the first one 0.
        fields: uint16 `(W, cells)`, written; 0 on walls, and where no cell outside of dead ends can be reached.
    """
    num = walls.shape[1]
    queue, ways = np.empty(num, np.int32), np.empty(num, np.int8)
    for w in np.flatnonzero(which):
        wall, field = walls[w], fields[w]
        tail = 0
        for cell in range(num):
            field[cell], ways[cell] = 0, 0
            if not wall[cell]:
                for k in range(1, _MOVES):
                    ways[cell] += not wall[cell + offsets[k]]
                if ways[cell] <= 1:
                    field[cell] = _FAR
                    queue[tail] = cell
                    tail += 1
        head = 0
        while head < tail:
            cell = queue[head]
            head += 1
            for k in range(1, _MOVES):
                v = cell + offsets[k]
                if not wall[v] and field[v] == 0:
                    ways[v] -= 1
                    if ways[v] <= 1:
                        field[v] = _FAR
                        queue[tail] = v
                        tail += 1
        # From the last one taken away back to the twigs, each cell's way out is known before the cell's own length.
        for i in range(tail - 1, -1, -1):
            cell = queue[i]
            nearest = _FAR
            for k in range(1, _MOVES):
                v = cell + offsets[k]
                if not wall[v]:
                    nearest = min(nearest, field[v])
            field[cell] = nearest if nearest == _FAR else nearest + 1
        for i in range(tail):
            if field[queue[i]] == _FAR:
                field[queue[i]] = 0


@numba.njit(inline="always", cache=True)
def _rank_moves(order, key, cell, legal, field, busy, here, offsets, bits):  # type: ignore[no-untyped-def]
    """Put one agent's legal moves into `order` (int8 `(5,)`), the best first; how many there are.

    Nearest to the goal first, of equals the unoccupied ones (our choice), then by chance. An agent with nowhere to
    go would rather stay than move to a cell that is as good.
    """
    count = 0
    for k in range(_MOVES):
        if not legal[k]:
            continue
        v = cell + offsets[k]
        length = 2 * np.int64(field[v]) + (not busy and k > 0)
        value = np.int32(length << 11) | np.int32((bits >> np.uint64(10 * k)) & np.uint64(1023))
        if k and here[v] >= 0:
            value |= np.int32(1024)
        i = count
        while i > 0 and key[i - 1] > value:
            key[i], order[i] = key[i - 1], order[i - 1]
            i -= 1
        key[i], order[i] = value, k
        count += 1
    return count


@numba.njit(cache=True)
def pibt_moves(  # type: ignore[no-untyped-def]
    pos, legal, field, parking, busy, fresh, waited, offsets, keys, counters, moves, scratch
):
    """The next moves of all agents: no two end in one cell, no two swap; following and rotations may happen.

    Args:
        pos: int32 `(W, A)`, each agent's cell, a flat index; agents of a world stand in different cells.
        legal: bool or uint8 `(W, A, 5)`, the moves that don't run into a wall; the first, staying, always is legal.
        field: uint16 `(W, A, cells)`, path lengths to each agent's goal; read only where `busy`.
        parking: uint16 `(W, cells)`, the same for agents without a goal: `parking_fields`, or zeros.
        busy: bool `(W, A)`, agents that have a goal. The others park: there they stay, and make way for everybody.
        fresh: bool `(W, A)`, agents whose goal is new since the last step, or whose episode begins.
        waited: int32 `(W, A)`, the priorities, updated: steps since an agent was at its goal, was `fresh` or was the
            first in vain, -1 while it parks; of equals the agent with the lower index goes first.
        offsets: int32 `(5,)`, the moves as differences of cells, the first one 0.
        keys, counters: uint64 `(W,)`, what decides between equally good cells (`rng.mix`); counters are advanced.
        moves: int8 `(W, A)`, written: indices into `offsets`.
        scratch: `pibt_scratch(A, cells)`.
    """
    cells, agents, key, order = scratch
    here, reserved = cells  # the agent that stands in a cell, and the one that will: -1 for nobody
    first, parent, left, tried = agents
    num = pos.shape[1]
    for w in range(pos.shape[0]):
        for a in range(num):
            if not busy[w, a] and parking[w, pos[w, a]] == 0:
                waited[w, a] = -1
            elif fresh[w, a] or waited[w, a] < 0 or (busy[w, a] and field[w, a, pos[w, a]] == 0):
                waited[w, a] = 0
            else:
                waited[w, a] += 1
            here[pos[w, a]] = a
            moves[w, a] = -1
            i = a
            while i > 0 and waited[w, first[i - 1]] < waited[w, a]:
                first[i] = first[i - 1]
                i -= 1
            first[i] = a
        for i in range(num):
            if moves[w, first[i]] >= 0:
                continue
            # The chain of those who inherit the priority of the first: each agent's parent wants its cell.
            a, asked = first[i], True
            parent[a] = -1
            while a >= 0:
                cell = pos[w, a]
                if asked:
                    bits = mix(keys[w], counters[w] + np.uint64(a))
                    goal = field[w, a] if busy[w, a] else parking[w]
                    left[a] = _rank_moves(order[a], key, cell, legal[w, a], goal, busy[w, a], here, offsets, bits)
                    tried[a] = 0
                    asked = False
                if tried[a] == left[a]:
                    # Nowhere to go: it stays, and its parent must look for another cell.
                    moves[w, a] = 0
                    reserved[cell] = a
                    a = parent[a]
                    continue
                k = order[a, tried[a]]
                tried[a] += 1
                v = cell + offsets[k]
                if reserved[v] >= 0 or (parent[a] >= 0 and v == pos[w, parent[a]]):
                    continue
                moves[w, a] = k
                reserved[v] = a
                b = here[v]
                if b < 0 or moves[w, b] >= 0:
                    break  # free or already to be vacated: the whole chain can move
                parent[b] = a
                a, asked = b, True
        a = first[0]
        goal = field[w, a] if busy[w, a] else parking[w]
        if 0 < goal[pos[w, a]] <= goal[pos[w, a] + offsets[moves[w, a]]]:
            waited[w, a] = -1
        for a in range(num):
            here[pos[w, a]] = -1
            reserved[pos[w, a] + offsets[moves[w, a]]] = -1
        counters[w] += np.uint64(num)
