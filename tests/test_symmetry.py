"""Folded requests: worlds that are one and the same ask the same, others don't, and plans find their way back."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from echelon.envs import SubgoalKind, make
from echelon.envs.base import Candidates, Scene, subgoal_text
from echelon.envs.kernels import UNREACHABLE, WALL
from echelon.errors import EchelonError
from echelon.planners import Hungarian, Nearest, RandomTask
from echelon.planners.symmetry import TURNS, Folded, fold, tables
from echelon.subgoals import (
    FEATURES,
    GridShape,
    Outcome,
    Past,
    Plan,
    PlanRequest,
    Sight,
    SubgoalConfig,
    SubgoalTracker,
    Verdict,
)
from test_planners import ask, tracker_of, used

WORLDS: list[tuple[str, dict[str, Any]]] = [
    ("warehouse", {"size": 9, "num_agents": 4, "num_packages": 5, "num_zones": 2}),
    ("warehouse", {"height": 8, "width": 13, "num_agents": 3, "num_packages": 6, "num_zones": 1}),
    ("warehouse", {"size": 14, "num_agents": 12, "num_packages": 9, "num_zones": 2}),
    ("repair", {"size": 9, "num_agents": 4, "num_machines": 4, "num_tools": 3}),
    ("search", {"size": 12, "num_agents": 4, "num_targets": 3, "regions": 2, "sensor": 2}),
    ("search", {"height": 8, "width": 12, "num_agents": 3, "num_targets": 5, "regions": 3, "sensor": 3}),
]
SIGHTS: list[tuple[Sight, ...]] = [
    ("cells",), ("cells", "others", "past"), ("walls", "closed"), ("scene", "past"), ("walls", "keys"),
]  # fmt: skip


def shape_of(tracker: SubgoalTracker) -> GridShape:
    return GridShape(tracker.env.height, tracker.env.width, tracker.env.view)


def busy(name: str, num_envs: int = 6, seed: int = 0, everybody: bool = False, **env: Any) -> SubgoalTracker:
    """`used` worlds in which agents remember earlier subgoals, a wall or two more than the map had included."""
    tracker = used(name, num_envs, seed, **env)
    rng = np.random.default_rng(seed + 1)
    for k in range(3):
        tracker.outcome[:] = rng.integers(0, 4, tracker.outcome.shape)
        tracker.age[:] = rng.integers(1, 30, tracker.age.shape)
        request = dataclasses.replace(ask(tracker), need=rng.random(tracker.need.shape) < 0.6)
        plan = RandomTask().plan(request)
        good = request.need & (tracker.check(request, plan, request.need) == 0)
        tracker.assign(request, plan, good)
        assert k or (tracker.past[..., 0] >= 0).any()
    tracker.need[:] = everybody | (rng.random(tracker.need.shape) < 0.7)
    return tracker


# -- another world that is the same: written by hand, cell by cell --------------------------------------------------


def turn_cell(shape: GridShape, turn: int, row: int, col: int) -> tuple[int, int]:
    if turn & 4:
        row, col = col, row
    if turn & 2:
        row = shape.height - 1 - row
    if turn & 1:
        col = shape.width - 1 - col
    return row, col


class Same:
    """One row of a request as another world would have it: turned, with other numbers and orders."""

    def __init__(self, request: PlanRequest, shape: GridShape, i: int, turn: int, seed: int, sort: list[str]) -> None:
        rng = np.random.default_rng(seed)
        self.shape, self.turn, self.scene_of = shape, turn, request.scene(int(request.rows[i]))
        agents, tasks = request.need.shape[1], request.taken.shape[1]
        self.agents = rng.permutation(agents)  # the old agent that has each new number
        self.number = np.arange(tasks)  # the new number of each old task, among those of its sort
        for kind in set(sort):
            ids = np.array([t for t in range(tasks) if sort[t] == kind])
            self.number[ids] = rng.permutation(ids)
        row, col = np.divmod(np.arange(shape.num_cells), shape.stride)
        self.cells = np.array([shape.cell_index(*turn_cell(shape, turn, r - shape.view, c - shape.view))
                               for r, c in zip(row, col, strict=True)])  # fmt: skip
        c, a = request.candidates, self.agents
        order = np.stack([self._order(c.kind[i, b], rng) for b in a])
        at = (a[:, None], order)
        task = c.task[i][at]
        self.past_of = {p: [self._past(x) for x in request.past(i, int(b))] for p, b in enumerate(a)}
        walls = np.zeros(shape.num_cells, bool)
        walls[self.cells] = request.walls()[i]
        taken = np.zeros(tasks, bool)
        taken[self.number] = request.taken[i]
        kind = c.kind[i][at]
        self.request = dataclasses.replace(
            request, rows=request.rows[[i]], need=request.need[[i]][:, a],
            candidates=Candidates(
                kind[None], np.where(kind >= 0, self.cells[c.cell[i][at]], 0).astype(np.int32)[None],
                np.where(task >= 0, self.number[task], -1).astype(np.int16)[None],
            ),
            distance=None if request.distance is None else request.distance[i][at][None],
            taken=taken[None], pos=self.cells[request.pos[i, a]].astype(np.int32)[None], keys=request.keys[[i]][:, a],
            rejected=request.rejected[[i]][:, a], refused=request.refused[i][at][None],
            walls=lambda: walls[None], scene=lambda world: self._scene(), past=lambda i, p: self.past_of[p],
            episode=request.episode[[i]],
        )  # fmt: skip

    @staticmethod
    def _order(kind: NDArray[np.int8], rng: np.random.Generator) -> NDArray[np.int64]:
        """Another order of the candidates, those that are none still last."""
        count = int((kind >= 0).sum())
        return np.concatenate([rng.permutation(count), np.arange(count, len(kind))])

    def cell(self, cell: tuple[int, int]) -> tuple[int, int]:
        return turn_cell(self.shape, self.turn, *cell)

    def task(self, task: int | None) -> int | None:
        return int(self.number[task]) if task is not None else None

    def _past(self, past: Past) -> Past:
        target, task = self.cell(past.target), self.task(past.task)
        text = subgoal_text(past.kind, target, -1 if task is None else task)
        return dataclasses.replace(past, target=target, task=task, text=text)

    def _scene(self) -> Scene:
        scene, tasks = self.scene_of, len(self.number)

        def view(t: Any) -> Any:
            new = int(self.number[t.id]) if t.id < tasks else t.id
            label = f"{t.label.split()[0]} {int(t.label.split()[1]) + new - t.id}"
            return dataclasses.replace(
                t, id=new, label=label, cell=t.cell and self.cell(t.cell), goal=t.goal and self.cell(t.goal),
                needs=self.task(t.needs), locked_by=self.task(t.locked_by),
            )  # fmt: skip

        def turned(old: Any) -> Any:
            new = np.zeros_like(old)
            for cell in np.ndindex(old.shape):
                new[self.cell(cell)] = old[cell]
            return new

        zones = []
        for z in scene.zones:
            new = int(self.number[z.id]) if z.label.startswith("region") else z.id
            cells = tuple(sorted(self.cell(cell) for cell in z.cells))
            zones.append(dataclasses.replace(z, id=new, label=f"{z.label.split()[0]} {new}", cells=cells))
        return dataclasses.replace(
            scene, walls=turned(scene.walls), seen=None if scene.seen is None else turned(scene.seen),
            agents=tuple(
                dataclasses.replace(scene.agents[a], id=p, cell=self.cell(scene.agents[a].cell),
                                    carrying=self.task(scene.agents[a].carrying))
                for p, a in enumerate(self.agents.tolist())
            ),
            tasks=tuple(sorted(map(view, scene.tasks), key=lambda t: t.id)),
            zones=tuple(sorted(zones, key=lambda z: z.id)),
        )  # fmt: skip

    def plan(self, plan: Plan, i: int) -> dict[str, list[int]]:
        """What a plan for row `i` of the first world is in this one."""
        a = self.agents
        task = np.where(plan.task[i, a] >= 0, self.number[plan.task[i, a]], -1)
        return {"kind": plan.kind[i, a].tolist(), "cell": self.cells[plan.cell[i, a]].tolist(), "task": task.tolist()}


def sorts(tracker: SubgoalTracker, i: int) -> list[str]:
    return [t.kind for t in tracker.env.scene(i).tasks[: tracker.env.num_tasks]]


def turns(shape: GridShape) -> range:
    return range(8 if shape.height == shape.width else 4)


# -- the grid -------------------------------------------------------------------------------------------------------


def test_cells_are_numbered_as_in_the_worlds() -> None:
    tracker = tracker_of(height=6, width=9, num_agents=1, num_packages=1, num_zones=1, layout="open", view=3)
    env, shape = tracker.env, shape_of(tracker)
    assert (shape.stride, shape.num_cells) == (env.stride, env.num_cells)
    for cell in range(env.num_cells):
        assert shape.row_col(cell) == env.row_col(cell)
        assert shape.cell_index(*shape.row_col(cell)) == cell


def test_symmetries_by_hand() -> None:
    """A 3x3 map with a border of 1: where the corner (0, 0) and the edge (0, 1) come to lie."""
    shape = GridShape(3, 3, 1)
    forth, back = tables(shape)
    where = {"as it is": ((0, 0), (0, 1)), "left and right swapped": ((0, 2), (0, 1)),
             "top and bottom swapped": ((2, 0), (2, 1)), "turned by 180 degrees": ((2, 2), (2, 1)),
             "rows and columns swapped": ((0, 0), (1, 0)), "turned right": ((0, 2), (1, 2)),
             "turned left": ((2, 0), (1, 0)), "mirrored at the other diagonal": ((2, 2), (1, 2))}  # fmt: skip
    assert list(where) == list(TURNS)
    for g, (corner, edge) in enumerate(where.values()):
        assert shape.row_col(int(forth[g, shape.cell_index(0, 0)])) == corner
        assert shape.row_col(int(forth[g, shape.cell_index(0, 1)])) == edge
        assert (back[g][forth[g]] == np.arange(25)).all()
        assert (np.sort(forth[g]) == np.arange(25)).all()
    assert len(tables(GridShape(3, 4, 2))[0]) == 4


@pytest.mark.parametrize("shape", [GridShape(5, 5, 2), GridShape(4, 7, 1)])
def test_tables_agree_with_the_formula(shape: GridShape) -> None:
    forth, _ = tables(shape)
    for g in turns(shape):
        for cell in range(shape.num_cells):
            assert shape.row_col(int(forth[g, cell])) == turn_cell(shape, g, *shape.row_col(cell))


# -- the same world asks the same -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sees", SIGHTS, ids="+".join)
@pytest.mark.parametrize(("name", "env"), WORLDS)
def test_a_world_and_its_likes_ask_one_question_and_get_one_plan(
    name: str, env: dict[str, Any], sees: tuple[Sight, ...]
) -> None:
    tracker = busy(name, **env)
    request, shape = ask(tracker), shape_of(tracker)
    if "keys" in sees:
        request.keys[:] = 7  # the bits of a world go with its agents' places, which nothing tells apart
    folded = fold(request, sees=sees)
    plan = folded.unfold(Hungarian().plan(folded.request))
    assert len(set(folded.keys)) == len(folded.keys), "different worlds ask different questions"
    for i in range(len(request.rows)):
        asks = request.need[i]
        for turn in turns(shape):
            same = Same(request, shape, i, turn, seed=8 * i + turn, sort=sorts(tracker, i))
            other = fold(same.request, sees=sees)
            assert other.keys == [folded.keys[i]]
            for x, y in zip(shown(folded, i, sees), shown(other, 0, sees), strict=True):
                assert repr(x) == repr(y)
            answer = other.unfold(Hungarian().plan(other.request))
            expected = same.plan(plan, i)
            for field, values in expected.items():
                got = getattr(answer, field)[0]
                need = asks[same.agents]
                assert got[need].tolist() == np.array(values)[need].tolist()


def shown(folded: Folded, i: int, sees: tuple[Sight, ...]) -> list[Any]:
    """All that a planner can find in a row of a folded request."""
    r = folded.request
    c = r.candidates
    agents, options = r.need.shape[1], range(c.kind.shape[2])
    out = [x[i].tolist() for x in (r.need, c.kind, c.cell, c.task, r.taken, r.pos, r.keys, r.rejected, r.refused)]
    out.append(r.distance[i].tolist() if r.distance is not None else None)
    out.append([r.past(i, a) for a in range(agents)])
    out.append([r.where(i, a) for a in range(agents)])
    out.append([r.text(i, a, k) for a in range(agents) for k in options if c.kind[i, a, k] >= 0])
    if "walls" in sees or "scene" in sees:
        out.append(r.walls()[i].tolist())
    if "scene" in sees:
        s = r.scene(int(r.rows[i]))
        out += [s.agents, s.tasks, s.zones, s.walls.tolist(), s.seen is not None and s.seen.tolist(), s.step]
    return out


@pytest.mark.parametrize(("name", "env"), WORLDS)
def test_without_cells_only_lengths_and_shared_tasks_matter(name: str, env: dict[str, Any]) -> None:
    tracker = busy(name, **env)
    request, shape = ask(tracker), shape_of(tracker)
    assert request.distance is not None
    folded = fold(request, sees=())
    plan = folded.unfold(Hungarian().plan(folded.request))
    for i in range(len(request.rows)):
        same = Same(request, shape, i, 0, seed=i, sort=sorts(tracker, i))
        # Everything may lie anywhere.
        rng, c = np.random.default_rng(i), same.request.candidates
        free = np.flatnonzero(~same.request.walls()[0])
        c.cell[:] = rng.choice(free, c.cell.shape)
        same.request.pos[:] = rng.choice(free, same.request.pos.shape)
        other = fold(same.request, sees=())
        assert other.keys == [folded.keys[i]]
        answer = other.unfold(Hungarian().plan(other.request))
        total = length(same.request, answer)
        assert total == length(request, plan, i)
        waits = same.request.need[0] & (answer.kind[0] == 0)
        assert (answer.cell[0][waits] == same.request.pos[0][waits]).all()
    assert len(set(folded.keys)) == len(folded.keys)


def length(request: PlanRequest, plan: Plan, i: int | None = None) -> tuple[int, int]:
    """Total path length and number of waits of a plan."""
    assert request.distance is not None
    total = waits = 0
    c = request.candidates
    for r in range(len(request.rows)) if i is None else [i]:
        for a in np.flatnonzero(request.need[r]):
            if plan.kind[r, a] == SubgoalKind.WAIT:
                waits += 1
                continue
            is_it = (c.kind[r, a] == plan.kind[r, a]) & (c.cell[r, a] == plan.cell[r, a])
            is_it &= c.task[r, a] == plan.task[r, a]
            total += int(request.distance[r, a][is_it].min())
    return total, waits


def test_by_hand_two_robots_that_swap_their_tasks_are_the_same_team() -> None:
    """Robot 0: 3 steps to x, 5 to y; robot 1: 5 to x, 3 to y. Or the other way round; but not both the same."""
    tracker = tracker_of(size=9, layout="open", num_agents=2, num_packages=2, num_zones=1, num_envs=3)
    request = ask(tracker)
    assert request.distance is not None
    request.distance[:, :, :2] = [[[3, 5], [5, 3]], [[5, 3], [3, 5]], [[3, 5], [3, 5]]]
    a, b, c = fold(request, sees=()).keys
    assert a == b != c
    folded = fold(request, sees=())
    plan = folded.unfold(Hungarian().plan(folded.request))
    assert plan.task[:2].tolist() == [[0, 1], [1, 0]]
    # Four at the corners of a square, each by one package: nothing tells them apart, and still they are one team.
    square = np.array([[0, 2, 4, 2], [2, 0, 2, 4], [4, 2, 0, 2], [2, 4, 2, 0]], np.uint16)
    tracker = tracker_of(size=9, layout="open", num_agents=4, num_packages=4, num_zones=1)
    request = ask(tracker)
    assert request.distance is not None
    request.distance[0, :, :4] = square
    folded = fold(request, sees=())
    assert length(request, folded.unfold(Hungarian().plan(folded.request))) == (0, 0)


def test_by_hand_robots_that_only_their_tasks_tell_apart() -> None:
    """A chain: robots 0 to 3 each share a package with the next, all at 3 steps but the very last, which is at 4."""
    tracker = tracker_of(size=9, layout="open", num_agents=4, num_packages=5, num_zones=1)
    chain = np.full((4, 5), UNREACHABLE)
    chain[[0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 1, 2, 2, 3, 3, 4]] = [3, 3, 3, 3, 3, 3, 3, 4]
    broken = chain.copy()
    broken[1, [0, 1, 2]] = [3, 3, UNREACHABLE]
    rng = np.random.default_rng(0)
    keys: list[set[bytes]] = []
    for lengths in (chain, broken):
        keys.append(set())
        for agents in itertools.permutations(range(4)):
            request = ask(tracker)
            assert request.distance is not None
            request.distance[0, :, :5] = lengths[np.ix_(agents, rng.permutation(5))]
            keys[-1] |= set(fold(request, sees=()).keys)
    assert len(keys[0]) == 1
    assert not keys[0] & keys[1], "each robot alone sees the same lengths, but not the same team"


# -- plans find their way back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sees", [(), *SIGHTS], ids=lambda s: "+".join(s) or "lengths")
@pytest.mark.parametrize(("name", "env"), WORLDS)
def test_rules_plan_as_well_in_the_frame(name: str, env: dict[str, Any], sees: tuple[Sight, ...]) -> None:
    tracker = busy(name, everybody=True, **env)
    request = ask(tracker)
    folded = fold(request, sees=sees)
    best = Hungarian().plan(request)
    plan = folded.unfold(Hungarian().plan(folded.request))
    assert length(request, plan) == length(request, best)
    for p in (plan, folded.unfold(Nearest().plan(folded.request)), folded.unfold(RandomTask().plan(folded.request))):
        fresh = dataclasses.replace(request, taken=request.taken.copy())
        assert not tracker.check(fresh, p, request.need).any()


@pytest.mark.parametrize("space", ["cell", "region", "direction"])
def test_all_spaces(space: str) -> None:
    tracker = tracker_of(size=10, num_agents=3, num_packages=4, num_envs=4, space=space)
    request, shape = ask(tracker), shape_of(tracker)
    folded = fold(request, sees=("walls",))
    plan = folded.unfold(Nearest().plan(folded.request))
    assert not tracker.check(request, plan, request.need).any()
    assert length(request, plan) == length(request, Nearest().plan(request))
    for i in range(4):
        same = Same(request, shape, i, 5, seed=i, sort=sorts(tracker, i))
        assert fold(same.request, sees=("walls",)).keys == [folded.keys[i]]


@pytest.mark.parametrize("sees", [(), ("cells",)], ids=["lengths", "cells"])
def test_without_path_lengths(sees: tuple[Sight, ...]) -> None:
    tracker = busy("repair", size=9, num_agents=3, num_machines=3, num_tools=2, everybody=True)
    request = tracker.request(np.arange(6), distance=False)
    folded = fold(request, sees=sees)
    assert folded.request.distance is None
    plan = folded.unfold(RandomTask().plan(folded.request))
    assert not tracker.check(request, plan, request.need).any()
    assert folded.keys[0] != fold(ask(tracker, [0]), sees=sees).keys[0]


TRACKER = busy("warehouse", num_envs=3, size=9, num_agents=3, num_packages=5, everybody=True)
REQUEST, SHAPE = ask(TRACKER), shape_of(TRACKER)
FOLDED = fold(REQUEST, sees=("walls", "closed"))


def numbers(*likely: int) -> st.SearchStrategy[int]:
    return st.one_of(st.sampled_from(likely), st.integers(-(2**31), 2**31 - 1))


@settings(max_examples=150)
@given(st.data())
def test_whatever_a_planner_says_in_the_frame_is_judged_as_there(data: st.DataObject) -> None:
    """The verdicts on a plan, unfolded, are those that a tracker of the turned world would give."""
    c = FOLDED.request.candidates
    plan = Plan.empty(FOLDED.request)
    plan = Plan(*(getattr(plan, f).astype(np.int64) for f in ("kind", "cell", "task")))
    for i, a in np.ndindex(*plan.kind.shape):
        k = data.draw(st.integers(0, c.kind.shape[2] - 1))
        own = (int(x[i, a, k]) for x in (c.kind, c.cell, c.task))
        kind, cell, task = own
        if data.draw(st.booleans()):
            kind = data.draw(numbers(kind, -1, 0, 1, 4, 7, 8, 260))
            cell = data.draw(numbers(cell, -1, 0, 40, 60, SHAPE.num_cells - 1, SHAPE.num_cells))
            task = data.draw(numbers(task, -2, -1, 0, 4, 5, 65535))
        plan.kind[i, a], plan.cell[i, a], plan.task[i, a] = kind, cell, task
    back = FOLDED.unfold(plan)
    fresh = dataclasses.replace(REQUEST, taken=REQUEST.taken.copy())
    verdict = TRACKER.check(fresh, back, REQUEST.need)
    for i, p in np.ndindex(*plan.kind.shape):
        kind, cell, task = (int(x[i, p]) for x in (plan.kind, plan.cell, plan.task))
        a = FOLDED.agents[i, p]
        form = 0 <= kind <= 7 and 0 <= cell < SHAPE.num_cells and -1 <= task < 5
        form = form and not (kind >= 4 and task < 0) and not (kind == 0 and task >= 0)
        assert (verdict[i, a] == Verdict.FORM) == (not form)
        if not form:
            continue
        open_ = not FOLDED.request.walls()[i, cell]
        if kind == 0:
            legal = cell == FOLDED.request.pos[i, p]
        elif task >= 0:
            legal = any(
                (c.kind[i, p, k], c.cell[i, p, k], c.task[i, p, k]) == (kind, cell, task)
                for k in range(c.kind.shape[2])
            )
        else:
            legal = open_
        assert (verdict[i, a] == Verdict.ILLEGAL) == (not legal)


def test_without_cells_what_is_no_candidate_is_nothing() -> None:
    folded = fold(REQUEST, sees=())
    plan = Plan.empty(folded.request)
    plan.kind[0] = SubgoalKind.CELL
    plan.cell[0] = [0, 50, 1]
    plan.kind[1] = folded.request.candidates.kind[1, :, 0]
    plan.cell[1] = folded.request.candidates.cell[1, :, 0]
    plan.task[1] = folded.request.candidates.task[1, :, 0] + 1
    back = folded.unfold(plan)
    assert (back.kind[:2] == -1).all()
    assert (back.kind[2] == SubgoalKind.WAIT).all()
    assert (back.cell[2] == REQUEST.pos[2]).all()


def test_a_plan_of_another_shape_is_refused_in_one_line() -> None:
    plan = Plan.empty(FOLDED.request)
    plan.task = plan.task[:, :1]
    with pytest.raises(EchelonError, match=r"a planner's task is int16 \(3, 1\): it must be integers \(3, 3\)"):
        FOLDED.unfold(plan)


def test_probabilities_and_notes_go_back_to_their_owners() -> None:
    c = FOLDED.request.candidates
    plan = Hungarian().plan(FOLDED.request)
    there = c.kind >= 0
    # Each candidate's probability says which one it is.
    plan.probability = np.where(there, c.cell + c.kind / 8, 0).astype(np.float32)
    plan.notes = lambda i: {"model": "m", "agents": {p: {"place": p} for p in range(3)}}
    back = FOLDED.unfold(plan)
    own = REQUEST.candidates
    assert back.probability is not None and back.probability.dtype == np.float32
    for i, a, k in np.argwhere(own.kind >= 0):
        cell = int(tables(SHAPE)[0][FOLDED.turn[i], own.cell[i, a, k]])
        assert back.probability[i, a, k] == np.float32(cell + own.kind[i, a, k] / 8)
    assert not back.probability[own.kind < 0].any()
    assert back.notes is not None
    for i in range(3):
        told = back.notes(i)
        assert told["model"] == "m"
        assert told["frame"]["turn"] == TURNS[FOLDED.turn[i]]
        for a in range(3):
            assert told["frame"]["robots"][told["agents"][a]["place"]] == a
        for t in range(5):
            assert told["frame"]["tasks"][FOLDED.number[i, t]] == t


def test_some_rows_are_those_rows() -> None:
    folded = fold(ask(busy("search", size=9, num_agents=3, regions=2)), sees=("scene", "past"))
    some = folded.some(np.array([4, 1]))
    part = dataclasses.replace(folded, request=some)
    for j, i in enumerate((4, 1)):
        assert repr(shown(part, j, ("scene",))) == repr(shown(folded, i, ("scene",)))
    assert folded.some(np.array([], np.int64)).need.shape == (0, 3)


def test_nothing_in_the_request_changes() -> None:
    request = ask(TRACKER)
    before = {f.name: np.copy(x) for f in dataclasses.fields(request)
              if isinstance(x := getattr(request, f.name), np.ndarray)}  # fmt: skip
    folded = fold(request, sees=("scene", "past"))
    folded.unfold(Nearest().plan(folded.request))
    for field, x in before.items():
        np.testing.assert_array_equal(getattr(request, field), x)


# -- other worlds ask something else --------------------------------------------------------------------------------

KEYS: list[tuple[tuple[Sight, ...], str]] = [
    ((), "0a912bad3434ee7bb7acccc61c03aaf4"),
    (("walls", "past"), "67aaebaaad82db6000c638c95f355787"),
]
EVERYTHING: tuple[Sight, ...] = ("scene", "time", "past", "keys")


def changed(request: PlanRequest, what: str, data: st.DataObject) -> PlanRequest:
    """The request with one thing about row 0 changed."""
    c = Candidates(*(x.copy() for x in (request.candidates.kind, request.candidates.cell, request.candidates.task)))
    assert request.distance is not None
    copy = dataclasses.replace(
        request, candidates=c, distance=request.distance.copy(), need=request.need.copy(), pos=request.pos.copy(),
        taken=request.taken.copy(), rejected=request.rejected.copy(), refused=request.refused.copy(),
        keys=request.keys.copy(),
    )  # fmt: skip
    assert copy.distance is not None
    agents = np.flatnonzero(request.need[0])
    a = int(data.draw(st.sampled_from(agents.tolist())))
    k = data.draw(st.integers(0, int((c.kind[0, a] > 0).sum()) - 1))
    free = np.flatnonzero(~request.walls()[0])
    cell = int(data.draw(st.sampled_from(free.tolist())))
    if what == "need":
        copy.need[0, a] = False
    elif what == "kind":
        c.kind[0, a, k] = {4: 6, 5: 6}[int(c.kind[0, a, k])]
    elif what == "cell":
        c.cell[0, a, k] = cell if cell != c.cell[0, a, k] else free[0]
    elif what == "task":
        # The candidate is about nothing, or about a task of its own.
        c.task[0, a, k] = -1
    elif what == "length":
        copy.distance[0, a, k] += data.draw(st.integers(1, 9))
    elif what == "fewer":
        c.kind[0, a, k], c.task[0, a, k] = -1, -1
    elif what == "pos":
        copy.pos[0, a] = cell if cell not in copy.pos[0] else next(x for x in free if x not in copy.pos[0])
    elif what == "taken":
        t = int(c.task[0, a, k])
        copy.taken[0, t] = ~copy.taken[0, t]
    elif what == "rejected":
        copy.rejected[0, a] = data.draw(st.integers(1, 4))
    elif what == "refused":
        copy.refused[0, a, k] = True
    elif what == "keys":
        copy.keys[0, a] += np.uint64(1)
    elif what == "walls":
        walls = request.walls().copy()
        walls[0, cell] = True
        copy = dataclasses.replace(copy, walls=lambda: walls)
    elif what == "past":
        old = request.past
        told = Past(SubgoalKind.FETCH, SHAPE.row_col(cell), 1, data.draw(st.sampled_from(list(Outcome))), 5, "")
        copy = dataclasses.replace(copy, past=lambda i, b: [*old(i, b), told] if (i, b) == (0, a) else old(i, b))
    elif what == "step":
        copy = dataclasses.replace(
            copy, scene=lambda w: dataclasses.replace(request.scene(w), step=request.scene(w).step + (w == 0))
        )
    elif what == "carrying":

        def scene(w: int) -> Scene:
            s = request.scene(w)
            if w:
                return s
            load = None if s.agents[a].carrying is not None else 0
            return dataclasses.replace(
                s, agents=tuple(dataclasses.replace(v, carrying=load) if v.id == a else v for v in s.agents)
            )

        copy = dataclasses.replace(copy, scene=scene)
    else:

        def status(w: int) -> Scene:
            s = request.scene(w)
            if w:
                return s
            return dataclasses.replace(s, tasks=(dataclasses.replace(s.tasks[0], status="lost"), *s.tasks[1:]))

        assert what == "status"
        copy = dataclasses.replace(copy, scene=status)
    return copy


SEEN_BY: dict[str, Sight | None] = {
    "need": None, "kind": None, "cell": "cells", "task": None, "length": None, "fewer": None, "pos": "cells",
    "taken": "closed", "rejected": None, "refused": None, "keys": "keys", "walls": "walls", "past": "past",
    "step": "time", "carrying": "scene", "status": "scene",
}  # fmt: skip


@pytest.mark.parametrize("what", SEEN_BY)
def test_whatever_changes_that_is_seen_changes_the_key_and_nothing_else_does(what: str) -> None:
    first = fold(REQUEST, sees=EVERYTHING).keys
    alone: tuple[Sight, ...] = () if SEEN_BY[what] is None else (SEEN_BY[what],)  # type: ignore[assignment]
    rest: tuple[Sight, ...] = () if what in ("cell", "pos") else ("cells", "others")
    with_it: tuple[Sight, ...] = ("time", "scene") if what == "step" else alone
    blind = fold(REQUEST, sees=rest).keys
    seeing = fold(REQUEST, sees=with_it).keys

    @settings(max_examples=12)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        other = changed(REQUEST, what, data)
        keys = fold(other, sees=EVERYTHING).keys
        assert keys[0] != first[0]
        assert keys[1:] == first[1:], "the other rows are as they were"
        assert fold(other, sees=with_it).keys[0] != seeing[0]
        if SEEN_BY[what] is not None and what != "taken":
            assert fold(other, sees=rest).keys == blind

    check()


def test_what_a_planner_does_not_see_is_not_there() -> None:
    folded = fold(REQUEST, sees=("cells",))
    assert folded.request.walls().shape == (3, SHAPE.num_cells)
    assert REQUEST.walls().any() and not folded.request.walls().any()
    with pytest.raises(RuntimeError, match="asked for a scene, but didn't say"):
        folded.request.scene(0)
    assert not any(folded.request.past(i, a) for i in range(3) for a in range(3))
    assert any(REQUEST.past(i, a) for i in range(3) for a in range(3))
    with pytest.raises(EchelonError, match="unknown sight 'wall': did you mean 'walls'"):
        fold(REQUEST, sees=["wall"])  # type: ignore[list-item]


def test_others_are_seen_only_by_who_looks_at_them() -> None:
    request = dataclasses.replace(REQUEST, need=np.tile([True, False, False], (3, 1)))
    moved = dataclasses.replace(request, pos=request.pos.copy())
    moved.pos[:, 1:] = moved.pos[:, 2:0:-1] + 1
    for sees, same in ((("cells",), True), (("cells", "others"), False)):
        a, b = (fold(r, sees=sees) for r in (request, moved))  # type: ignore[arg-type]
        assert (a.keys == b.keys) is same
        assert (a.request.candidates.kind[:, 1:] == -1).all(), "who isn't asked for has no candidates"
        assert (a.request.need == [True, False, False]).all(), "who is asked for comes first"


def test_what_can_not_be_given_makes_no_difference_unless_it_is_seen() -> None:
    request = ask(TRACKER)
    assert request.distance is not None
    request.distance[0, 0, 0] = UNREACHABLE
    other = Candidates(*(x.copy() for x in (request.candidates.kind, request.candidates.cell, request.candidates.task)))
    other.cell[0, 0, 0] = next(x for x in np.flatnonzero(~request.walls()[0]) if x not in other.cell[0, 0])
    lost = dataclasses.replace(request, candidates=other)
    for sees, same in ((("cells",), True), (("cells", "closed"), False)):
        a, b = (fold(r, sees=sees).keys for r in (request, lost))  # type: ignore[arg-type]
        assert (a[0] == b[0]) is same


def test_rounded_path_lengths_make_more_worlds_the_same() -> None:
    request = ask(TRACKER)
    assert request.distance is not None
    lengths = request.distance
    keys = []
    for x in (8, 11, 12, UNREACHABLE, 65533):
        lengths[0, 0, 0] = x
        folded = fold(request, sees=(), coarse=4)
        keys.append(folded.keys[0])
        assert folded.original is request
        shown_lengths = folded.request.distance
        assert shown_lengths is not None and shown_lengths.dtype == np.uint16
        assert (shown_lengths[shown_lengths != UNREACHABLE] % 4 == 0).all()
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4, "no rounding makes a candidate reachable, or a far one unreachable"
    lengths[0, 0, 0] = 11
    folded = fold(request, sees=("walls",), coarse=4)
    assert not TRACKER.check(request, folded.unfold(Hungarian().plan(folded.request)), request.need).any()
    with pytest.raises(EchelonError, match="can't be rounded to multiples of 0: it must be at least 1"):
        fold(request, sees=(), coarse=0)


def test_random_bits_follow_from_the_question() -> None:
    """A planner that draws answers the same question with the same plan, in whatever world it is asked."""
    folded = fold(REQUEST, sees=("walls",))
    again = fold(ask(TRACKER, [2, 1]), sees=("walls",))
    assert again.keys == [folded.keys[2], folded.keys[1]]
    assert (again.request.keys == folded.request.keys[[2, 1]]).all()
    assert len(np.unique(folded.request.keys)) == 9


def test_the_frame_does_not_depend_on_the_batch() -> None:
    whole = fold(REQUEST, sees=("walls", "past"))
    for i in range(3):
        assert fold(ask(TRACKER, [i]), sees=("walls", "past")).keys == [whole.keys[i]]
    assert fold(TRACKER.request(np.array([], np.int64), distance=True), sees=("walls", "past")).keys == []


def test_keys_are_the_same_everywhere() -> None:
    """A shared file outlives processes and machines: two numbers, written down."""
    env = make("warehouse", num_envs=1, seed=3, extra_features=FEATURES, size=7, num_agents=2, num_packages=2)
    tracker = SubgoalTracker(env, SubgoalConfig(), 0.99, 3)
    for sees, key in KEYS:
        assert fold(ask(tracker), sees=sees).keys[0].hex() == key


@pytest.mark.parametrize(("name", "env"), [WORLDS[0], WORLDS[3], WORLDS[5]])
def test_a_scene_in_the_frame_is_a_scene(name: str, env: dict[str, Any]) -> None:
    """It agrees with the arrays, its ids are places in it, and its world can put it in words."""
    tracker = busy(name, everybody=True, **env)
    request = ask(tracker)
    folded = fold(request, sees=("scene",))
    r = folded.request
    for i, world in enumerate(request.rows):
        scene, plain = r.scene(int(world)), request.scene(int(world))
        assert [v.cell for v in scene.agents] == [r.where(i, a) for a in range(len(scene.agents))]
        for views in (scene.agents, scene.tasks, scene.zones):
            assert [v.id for v in views] == list(range(len(views)))
        assert [t.kind for t in scene.tasks] == [t.kind for t in plain.tasks]
        assert sorted(t.label for t in scene.tasks) == sorted(t.label for t in plain.tasks)
        assert [t.label for t in scene.tasks] == [t.label for t in plain.tasks], "a label goes with its number"
        assert sorted(t.status for t in scene.tasks) == sorted(t.status for t in plain.tasks)
        np.testing.assert_array_equal(np.sort(scene.walls, axis=None), np.sort(plain.walls, axis=None))
        for a, cell in enumerate(v.cell for v in scene.agents):
            assert not scene.walls[cell], a
        open_ = {(s.kind, s.target, s.task) for a in range(len(scene.agents)) for s in tracker.env.candidates(scene, a)}
        for a in range(len(scene.agents)):
            for k in np.flatnonzero(r.candidates.kind[i, a] > 0):
                kind, cell, task = (int(x[i, a, k]) for x in (r.candidates.kind, r.candidates.cell, r.candidates.task))
                assert (SubgoalKind(kind), r.row_col(cell), task) in open_
        first, second = (tracker.env.describe(s).splitlines() for s in (scene, plain))
        assert len(first) == len(second)
        assert scene.step == 0
        assert fold(request, sees=("scene", "time")).request.scene(int(world)).step == plain.step


def test_walls_in_the_frame_are_the_turned_walls() -> None:
    walls = REQUEST.walls()
    assert (walls == ((TRACKER.env.grid & WALL) != 0)).all()
    for i in range(3):
        moved = tables(SHAPE)[0][FOLDED.turn[i]]
        assert (FOLDED.request.walls()[i][moved] == walls[i]).all()
