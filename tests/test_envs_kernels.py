"""The shared kernels against plain Python: moves, distances, nearest tasks, maps."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.envs import kernels, make
from echelon.envs.kernels import AGENT, WALL

N, E, S, W = 1, 2, 3, 4
STEP = {0: (0, 0), N: (-1, 0), E: (0, 1), S: (1, 0), W: (0, -1)}


def move(height, width, walls, agents, actions, first=0):
    """Run `resolve_moves` on a small map; the new cells and the number of prevented moves."""
    stride = width + 2
    grid = np.full((height + 2) * stride, WALL, np.uint8)
    grid.reshape(-1, stride)[1:-1, 1:-1] = 0
    for r, c in walls:
        grid[(r + 1) * stride + c + 1] = WALL
    pos = np.array([(r + 1) * stride + c + 1 for r, c in agents], np.int32)
    grid[pos] |= AGENT
    offsets = np.array([0, -stride, 1, stride, -1], np.int32)
    target = np.zeros(len(agents), np.int32)
    count = kernels.resolve_moves(
        grid, pos, np.array(actions, np.int8), offsets, first, target, np.zeros(len(pos), np.uint8)
    )
    assert sorted(np.flatnonzero(grid & AGENT)) == sorted(pos), "the AGENT bits are where the agents are"
    assert not (grid & 128).any()
    return [(int(p) // stride - 1, int(p) % stride - 1) for p in pos], count


def reference(height, width, walls, agents, actions, first):
    """The documented rule, in plain Python on (row, col)."""

    def free(cell):
        return 0 <= cell[0] < height and 0 <= cell[1] < width and cell not in walls

    want = []
    for (r, c), action in zip(agents, actions, strict=True):
        goal = (r + STEP[action][0], c + STEP[action][1])
        want.append(goal if free(goal) else (r, c))
    order = [(first + i) % len(agents) for i in range(len(agents))]
    prevented, again = 0, True
    while again:
        again = False
        for place, a in enumerate(order):
            if want[a] == agents[a]:
                continue
            rivals = [b for b in order if b != a and want[b] == want[a]]
            beaten = any(want[b] == agents[b] or b in order[:place] for b in rivals)
            swap = any(want[b] == agents[a] and want[a] == agents[b] for b in order if b != a)
            if beaten or swap:
                want[a], prevented, again = agents[a], prevented + 1, True
    return want, prevented


@st.composite
def crowds(draw):
    height, width = draw(st.integers(1, 5)), draw(st.integers(2, 5))
    cells = draw(st.permutations([(r, c) for r in range(height) for c in range(width)]))
    agents = cells[: draw(st.integers(1, min(9, len(cells))))]
    walls = set(cells[len(agents) : len(agents) + draw(st.integers(0, 4))])
    actions = draw(st.lists(st.integers(0, 4), min_size=len(agents), max_size=len(agents)))
    return height, width, walls, agents, actions, draw(st.integers(0, len(agents) - 1))


@settings(max_examples=400)
@given(crowds())
def test_moves_are_those_of_the_plain_rule(crowd):
    height, width, walls, agents, actions, first = crowd
    cells, count = move(height, width, walls, agents, actions, first)
    assert (cells, count) == reference(height, width, walls, agents, actions, first)
    assert len(set(cells)) == len(cells)
    went = {(a, b) for a, b in zip(agents, cells, strict=True) if a != b}
    assert not any((b, a) in went for a, b in went)


def test_two_agents_may_not_swap():
    assert move(1, 4, [], [(0, 1), (0, 2)], [E, W]) == ([(0, 1), (0, 2)], 2)


@pytest.mark.parametrize("first", [0, 1])
def test_who_goes_first_gets_the_cell(first):
    cells, count = move(1, 3, [], [(0, 0), (0, 2)], [E, W], first)
    assert cells == ([(0, 1), (0, 2)] if first == 0 else [(0, 0), (0, 1)])
    assert count == 1


def test_an_agent_that_stays_keeps_its_cell_and_stops_the_chain_behind_it():
    assert move(1, 4, [], [(0, 0), (0, 1), (0, 2)], [E, E, 0]) == ([(0, 0), (0, 1), (0, 2)], 2)
    # So does one that runs into a wall.
    assert move(1, 3, [], [(0, 0), (0, 1), (0, 2)], [E, E, E]) == ([(0, 0), (0, 1), (0, 2)], 2)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_a_chain_follows(order):
    agents = [[(0, 0), (0, 1), (0, 2)][i] for i in order]
    cells, count = move(1, 4, [], agents, [E, E, E])
    assert cells == [(r, c + 1) for r, c in agents]
    assert count == 0


def test_four_agents_may_rotate_but_not_a_swap_within_a_crowd():
    ring = [(0, 0), (0, 1), (1, 1), (1, 0)]
    assert move(2, 2, [], ring, [E, S, W, N]) == ([(0, 1), (1, 1), (1, 0), (0, 0)], 0)
    # A rotation of three with a fourth that wants in: the fourth stays.
    cells, count = move(2, 3, [], [*ring, (0, 2)], [E, S, W, N, W])
    assert cells == [(0, 1), (1, 1), (1, 0), (0, 0), (0, 2)]
    assert count == 1


def test_six_agents_rotate_on_a_ring_around_a_wall_less_middle():
    ring = [(0, 0), (0, 1), (0, 2), (1, 2), (1, 1), (1, 0)]
    cells, count = move(2, 3, [], ring, [E, E, S, W, W, N])
    assert cells == [*ring[1:], ring[0]]
    assert count == 0


def test_a_move_into_a_wall_is_no_collision():
    assert move(2, 2, [(0, 1)], [(0, 0)], [E]) == ([(0, 0)], 0)
    assert move(1, 1, [], [(0, 0)], [N]) == ([(0, 0)], 0)


def bfs(walls, source):
    far = {source: 0}
    queue = deque([source])
    while queue:
        r, c = queue.popleft()
        for n in ((r - 1, c), (r, c + 1), (r + 1, c), (r, c - 1)):
            if 0 <= n[0] < walls.shape[0] and 0 <= n[1] < walls.shape[1] and not walls[n] and n not in far:
                far[n] = far[r, c] + 1
                queue.append(n)
    return far


@settings(max_examples=60)
@given(
    st.sampled_from(["shelves", "random", "open"]),
    st.integers(9, 30), st.integers(9, 30), st.floats(0, 0.4), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99),
)  # fmt: skip
def test_every_generated_map_is_connected(layout, height, width, density, aisle, view, seed):
    env = make(
        "warehouse", num_envs=2, seed=seed, height=height, width=width, layout=layout, density=density, aisle=aisle,
        view=view, num_packages=2, num_zones=1, num_agents=2,
    )  # fmt: skip
    queue, field = np.zeros(env.num_cells, np.int32), np.zeros(env.num_cells, np.uint16)
    for w in range(2):
        walls = env.walls(w)
        start = env.row_col(env.pos[w, 0])
        far = bfs(walls, start)
        assert len(far) == (~walls).sum()
        kernels.distance_field(field, env.grid[w], env.pos[w, 0], env.stride, queue)
        inside = field.reshape(-1, env.stride)[view:-view, view:-view]
        assert {(int(r), int(c)): int(inside[r, c]) for r, c in np.argwhere(inside != kernels.UNREACHABLE)} == far
        assert (np.delete(field, [env.cell_index(*cell) for cell in far]) == kernels.UNREACHABLE).all()


def test_a_distance_field_from_a_wall_reaches_nothing():
    env = make("warehouse", size=12)
    field = np.zeros(env.num_cells, np.uint16)
    kernels.distance_field(field, env.grid[0], 0, env.stride, np.zeros(env.num_cells, np.int32))
    assert (field == kernels.UNREACHABLE).all()


@given(st.lists(st.integers(0, 50), max_size=12))
def test_keep_three_keeps_the_three_least(numbers):
    best = (99, 99, 99)
    for number in numbers:
        best = kernels.keep_three(*best, number)
    assert list(best) == sorted([*numbers, 99, 99, 99])[:3]
