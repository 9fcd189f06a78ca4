"""Whole random episodes of each world, bit for bit against slow simulators in plain Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from echelon.envs import ACTIONS, SubgoalKind, kernels, make
from echelon.envs.search import bresenham

STEP = ((0, 0), (-1, 0), (0, 1), (1, 0), (0, -1))


def sign(x):
    return (x > 0) - (x < 0)


class Plain:
    """One world in plain Python: the rules that all worlds share, and the observations."""

    def __init__(self, env, w):
        self.env, self.w, self.view = env, w, env.view
        self.walls = env.walls(w)
        self.height, self.width = self.walls.shape
        self.pos = [env.row_col(p) for p in env.pos[w]]
        self.carrying = [-1] * env.num_agents
        self.last, self.bumped = [0] * env.num_agents, set()
        self.step_count = 0
        self.cells = [env.row_col(c) for c in env.task_cell[w]]
        self.goals = [env.row_col(c) for c in env.task_goal[w]]
        self.status = env.task_status[w].tolist()

    def free(self, cell):
        return 0 <= cell[0] < self.height and 0 <= cell[1] < self.width and not self.walls[cell]

    def step(self, actions):
        n = len(self.pos)
        first = self.step_count % n
        want = []
        for (r, c), action in zip(self.pos, actions, strict=True):
            goal = (r + STEP[action][0], c + STEP[action][1])
            want.append(goal if self.free(goal) else (r, c))
        order = [(first + i) % n for i in range(n)]
        self.collisions, self.bumped, again = 0, set(), True
        while again:
            again = False
            for place, a in enumerate(order):
                if want[a] == self.pos[a]:
                    continue
                if any(
                    b != a
                    and (
                        (want[b] == want[a] and (want[b] == self.pos[b] or b in order[:place]))
                        or (want[b] == self.pos[a] and want[a] == self.pos[b])
                    )
                    for b in range(n)
                ):
                    want[a], again = self.pos[a], True
                    self.collisions += 1
                    self.bumped.add(a)
        self.pos, self.last = want, list(actions)
        self.step_count += 1
        self.done_by = [-1] * len(self.status)
        self.reward, self.news = 0, False
        success = self.rules()
        self.terminated = success
        self.truncated = not success and self.step_count >= self.env.limit

    def way(self, a, to):
        if to is None:
            return [0] * 5
        r, c = to[0] - self.pos[a][0], to[1] - self.pos[a][1]
        return [1, sign(r), sign(c), max(-127, min(127, r)), max(-127, min(127, c))]

    def near(self, a, tasks):
        """Of `tasks` the nearest (Manhattan), of equals the first."""
        (r, c) = self.pos[a]
        return sorted(tasks, key=lambda t: (abs(self.cells[t][0] - r) + abs(self.cells[t][1] - c), t))

    def window(self, a, test):
        r, c = self.pos[a]
        near = range(-self.view, self.view + 1)
        return [int(test((r + i, c + j))) for i in near for j in near]

    def load_goal(self, a):
        return None

    def extras(self, a):
        return []

    def observation(self, a):
        limit = self.env.limit
        out = self.window(a, lambda cell: not self.free(cell)) + self.window(a, lambda cell: cell in self.pos)
        out.append(127 * (limit - self.step_count) // limit)
        out += [int(self.last[a] == i) for i in range(len(ACTIONS))]
        out += [1 if a >> i & 1 else -1 for i in range(6)]
        out.append(int(a in self.bumped))
        out += self.way(a, self.load_goal(a))
        open_tasks = self.near(a, [t for t in range(len(self.status)) if self.status[t] == 0])
        for i in range(3):
            out += self.way(a, self.cells[open_tasks[i]] if i < len(open_tasks) else None)
        return out + self.extras(a)

    def mask(self, a):
        return [int(self.free((self.pos[a][0] + r, self.pos[a][1] + c))) for r, c in STEP]

    def compare(self):
        env, w = self.env, self.w
        assert [env.row_col(p) for p in env.pos[w]] == self.pos
        assert env.carrying[w].tolist() == self.carrying
        assert env.task_status[w].tolist() == self.status
        assert [env.row_col(c) for c in env.task_cell[w]] == self.cells
        assert env.task_done_by[w].tolist() == self.done_by
        assert env.steps[w] == self.step_count
        assert (env.reward[w], env.new_info[w]) == (self.reward, self.news)
        assert (env.terminated[w], env.truncated[w]) == (self.terminated, self.truncated)
        assert env.collisions[w] == self.collisions
        for a in range(env.num_agents):
            assert env.obs[w, a].tolist() == self.observation(a)
            assert env.action_mask[w, a].tolist() == self.mask(a)


class PlainWarehouse(Plain):
    def __init__(self, env, w):
        super().__init__(env, w)
        zones = env.scene(w).zones
        self.zone = [next(set(z.cells) for z in zones if goal in z.cells) for goal in self.goals]

    def load_goal(self, a):
        return self.goals[self.carrying[a]] if self.carrying[a] >= 0 else None

    def rules(self):
        for a, cell in enumerate(self.pos):
            load = self.carrying[a]
            if load < 0:
                here = [t for t in range(len(self.cells)) if self.status[t] == 0 and self.cells[t] == cell]
                if here:
                    self.carrying[a], self.status[here[0]], self.done_by[here[0]] = here[0], 1, a
            elif cell in self.zone[load]:
                self.carrying[a], self.status[load], self.done_by[load] = -1, 2, a
                self.cells[load] = cell
                self.reward += 1
        return all(status == 2 for status in self.status)


class PlainRepair(Plain):
    def __init__(self, env, w):
        super().__init__(env, w)
        self.machines = env.config.num_machines
        self.need, self.lock = env.task_need[w].tolist(), env.task_lock[w].tolist()

    def open_machines(self):
        return [m for m in range(self.machines) if self.status[m] == 0]

    def rules(self):
        for a, cell in enumerate(self.pos):
            for t in range(len(self.cells)):
                if self.cells[t] != cell:
                    continue
                if t >= self.machines:
                    self.done_by[t] = a if self.carrying[a] != t else -1
                    self.carrying[a] = t
                elif self.status[t] == 0 and self.carrying[a] == self.need[t]:
                    self.status[t], self.done_by[t] = 2, a
                    self.reward += 1
        for m in range(self.machines):
            if self.status[m] == 1 and self.status[self.lock[m]] == 2:
                self.status[m], self.news = 0, True
        return self.status[: self.machines] == [2] * self.machines

    def extras(self, a):
        held = self.carrying[a]
        bits = [(1 if (held - self.machines) >> i & 1 else -1) if held >= 0 else 0 for i in range(3)]
        out = [int(held >= 0), *bits]
        broken = self.open_machines()
        for i in range(3):
            near = self.near(a, broken)[i : i + 1]
            out += [int(self.need[near[0]] == held), *self.way(a, self.cells[self.need[near[0]]])] if near else [0] * 6
        ready = self.near(a, [m for m in broken if self.need[m] == held])
        racks = self.near(a, {self.need[m] for m in broken} - {held})
        out += self.way(a, self.cells[ready[0]] if ready else None)
        out += self.way(a, self.cells[racks[0]] if racks else None)
        shares = [127 * self.status[: self.machines].count(s) // self.machines for s in (2, 1)]
        return out + shares


class PlainSearch(Plain):
    def __init__(self, env, w):
        super().__init__(env, w)
        self.seen = env.scene(w).seen.copy()
        self.targets = [env.row_col(c) for c in env.target_cell[w]]
        self.found = set()
        n = env.config.regions
        rows = [(i * self.height // n, (i + 1) * self.height // n) for i in range(n)]
        cols = [(i * self.width // n, (i + 1) * self.width // n) for i in range(n)]
        self.regions = [
            [(r, c) for r in range(*row) for c in range(*col) if not self.walls[r, c]] for row in rows for col in cols
        ]
        self.middles = [(sum(row) - 1, sum(col) - 1) for row in rows for col in cols]  # doubled

    def left(self, t):
        return [cell for cell in self.regions[t] if not self.seen[cell]]

    def rules(self):
        reach = self.env.config.sensor
        for a, (row, col) in enumerate(self.pos):
            for r, c in np.argwhere(~self.seen):
                dr, dc = int(r) - row, int(c) - col
                if dr**2 + dc**2 > reach**2 or any(self.walls[row + i, col + j] for i, j in bresenham(dr, dc)):
                    continue
                self.seen[r, c] = True
                region = next(t for t in range(len(self.regions)) if (r, c) in self.regions[t])
                if not self.left(region):
                    self.done_by[region] = a
        found = {n for n, cell in enumerate(self.targets) if self.seen[cell]}
        self.reward, self.found = len(found - self.found), found
        self.news = self.reward > 0
        for t in range(len(self.regions)):
            left = self.left(t)
            self.status[t] = int(not left)
            if left:
                mr, mc = self.middles[t]
                self.cells[t] = min(left, key=lambda x: ((2 * x[0] - mr) ** 2 + (2 * x[1] - mc) ** 2, x))
        return len(self.found) == len(self.targets)

    def extras(self, a):
        out = self.window(a, lambda cell: self.free(cell) and not self.seen[cell])
        total = int((~self.seen).sum())
        shares = {}
        for t in range(len(self.regions)):
            if self.left(t):
                r, c = self.cells[t][0] - self.pos[a][0], self.cells[t][1] - self.pos[a][1]
                where = (0 if 5 * abs(r) < 2 * abs(c) else sign(r), 0 if 5 * abs(c) < 2 * abs(r) else sign(c))
                shares[where] = shares.get(where, 0) + len(self.left(t))
        scale = (127 << 20) // max(total, 1) + 1
        for where in [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]:
            out.append(shares.get(where, 0) * scale >> 20)
        out.append(127 * total // int((~self.walls).sum()))
        out.append(127 * len(self.found) // len(self.targets))
        return out

    def compare(self):
        super().compare()
        scene = self.env.scene(self.w)
        assert (scene.seen == self.seen).all()
        shown = [t.cell for t in scene.tasks if t.kind == "target"]
        assert shown == [cell if n in self.found else None for n, cell in enumerate(self.targets)]


PLAIN = {"warehouse": PlainWarehouse, "search": PlainSearch, "repair": PlainRepair}


def towards_subgoals(env, rng):
    """Moves along shortest ways to random candidates, a third of them random."""
    out = rng.integers(0, 5, (env.num_envs, env.num_agents)).astype(np.int8)
    options = env.candidate_arrays(np.arange(env.num_envs))
    field, queue = np.zeros(env.num_cells, np.uint16), np.zeros(env.num_cells, np.int32)
    for w, a in np.argwhere(rng.random(out.shape) < 0.7):
        # The same candidate for some steps, so that agents arrive.
        count = int((options.kind[w, a] >= 0).sum()) - 1
        target = options.cell[w, a, (env.steps[w] // 15 * 7 + a) % count if count else 0]
        kernels.distance_field(field, env.grid[w], target, env.stride, queue)
        out[w, a] = np.argmax([kernels.first_step(field, env.grid[w], env.pos[w, a], d) for d in env.offsets])
    return out


@pytest.mark.parametrize("name", sorted(PLAIN))
@pytest.mark.parametrize(
    "settings",
    [
        {"size": 10, "num_agents": 3},
        {"height": 9, "width": 14, "num_agents": 7, "layout": "random", "view": 1},
        {"size": 12, "num_agents": 5, "layout": "open", "view": 3, "limit": 70},
    ],
)
def test_episodes_are_those_of_the_plain_simulator(name, settings):
    env = make(name, num_envs=4, seed=11, **settings)
    rng = np.random.default_rng(1)
    worlds = [PLAIN[name](env, w) for w in range(4)]
    gained, ends = 0.0, 0
    for _ in range(180):
        moves = towards_subgoals(env, rng)
        env.advance(moves)
        for w, world in enumerate(worlds):
            world.step(moves[w].tolist())
            world.compare()
        gained += env.reward.sum()
        done = env.autoreset()
        ends += int(done.sum())
        worlds = [PLAIN[name](env, w) if done[w] else world for w, world in enumerate(worlds)]
    assert gained > 8, "the episodes must do something for this test to mean something"
    assert ends > 3


SCRIPT = """
import hashlib, sys
import numpy as np
from echelon.envs import make
np.seterr(over="ignore")  # 64-bit products wrap, as they should
for name in ("warehouse", "search", "repair"):
    env = make(name, num_envs=2, seed=4, size=9, num_agents=3, limit=11, density=0.15)
    moves = np.random.default_rng(0).integers(0, 5, (25, 2, 3)).astype(np.int8)
    digest = hashlib.sha256()
    for t in range(25):
        env.step(moves[t])
        found = env.candidate_arrays(np.arange(2))
        is_open = env.subgoals_open(found.kind[:, :, 0], found.task[:, :, 0], np.zeros((2, 3), bool))
        states = env.states(np.zeros((2, env.state_size), np.int8))
        for array in (*env.state_dict().values(), found.kind, found.cell, found.task, is_open, states):
            digest.update(np.ascontiguousarray(array).tobytes())
    print(name, digest.hexdigest())
"""


def test_compiled_kernels_do_what_their_source_does():
    """The same episodes with numba switched off give the same bytes."""
    root = Path(__file__).resolve().parents[1] / "src"
    outputs = []
    for switch in ("0", "1"):
        env = {**os.environ, "NUMBA_DISABLE_JIT": switch, "PYTHONPATH": str(root)}
        run = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=240)
        assert run.returncode == 0, run.stderr
        outputs.append(run.stdout)
    assert outputs[0] == outputs[1]
    assert len(outputs[0].split()) == 6


def test_lines_of_sight_are_bresenhams():
    assert bresenham(0, 0) == bresenham(1, 1) == bresenham(0, -1) == []
    assert bresenham(0, 3) == [(0, 1), (0, 2)]
    assert bresenham(-3, 3) == [(-1, 1), (-2, 2)]
    assert bresenham(1, 3) == [(0, 1), (1, 2)]
    for dr in range(-8, 9):
        for dc in range(-8, 9):
            n = max(abs(dr), abs(dc))
            line = [(0, 0), *bresenham(dr, dc), (dr, dc)]
            assert len(line) == n + 1 or n == 0
            for i, (r, c) in enumerate(line[: n + 1]):
                # Never more than half a cell beside the straight line.
                assert 2 * abs(r * n - i * dr) <= n
                assert 2 * abs(c * n - i * dc) <= n
            assert [(-r, c) for r, c in bresenham(dr, dc)] == bresenham(-dr, dc)


def test_the_kinds_are_numbered_as_the_kernels_have_them():
    assert [int(k) for k in (SubgoalKind.WAIT, SubgoalKind.REGION, SubgoalKind.FETCH, SubgoalKind.DELIVER)] == [
        0,
        2,
        4,
        5,
    ]
