"""Requests brought into one frame: worlds that mirror, turn or renumber one another ask one and the same thing.

The frame is our choice. Of the grid's symmetries (8 of a square, 4 of another rectangle) the one is taken under which
a hash of what the planner sees, blind to all numbering, is least. Robots, tasks and candidates are then put into an
order of their own; where cells don't say it, colour refinement does (Weisfeiler and Leman 1968). The key of a row is a
digest of the folded row itself, not of how it came about: equal keys mean equal questions, and two worlds that a tie
leaves in different frames only miss each other.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, get_args

import numba
import numpy as np
from numpy.typing import NDArray

from echelon.envs.base import Candidates, Scene, SubgoalKind, subgoal_text
from echelon.envs.kernels import UNREACHABLE
from echelon.errors import EchelonError, unknown_name
from echelon.rng import mix
from echelon.subgoals import PAST, GridShape, Outcome, Past, Plan, PlanRequest, Sight

__all__ = ["TURNS", "Folded", "fold", "tables"]

TURNS = (
    "as it is",
    "left and right swapped",
    "top and bottom swapped",
    "turned by 180 degrees",
    "rows and columns swapped",
    "turned right",
    "turned left",
    "mirrored at the other diagonal",
)
"""The symmetries: bit 0 swaps left and right, bit 1 top and bottom, bit 2, before them, rows and columns."""

_FORMAT = 1  # raise it whenever the same world gets another frame: keys of before then fit nothing
_EVERY: frozenset[Sight] = frozenset(get_args(Sight))
_INCLUDES: dict[Sight, frozenset[Sight]] = {
    "walls": frozenset({"cells"}),
    "scene": frozenset({"cells", "others", "walls", "closed"}),
}
_NUMBER = re.compile(r"\d+$")
_ODD = np.uint64(0x9E3779B97F4A7C15)


@lru_cache(maxsize=32)
def tables(grid: GridShape) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Where each cell of the padded grid comes to lie under each symmetry, and where it came from.

    Returns:
        Two int32 `(S, cells)`, read-only, each the inverse of the other; S is 8 for a square, else 4; see `TURNS`.
    """
    rows = grid.height + 2 * grid.view
    cells = np.arange(grid.num_cells, dtype=np.int32).reshape(rows, grid.stride)
    count = 8 if grid.height == grid.width else 4
    back = np.stack([_turned(cells, g).reshape(-1) for g in range(count)])
    forth = np.argsort(back, axis=1).astype(np.int32)
    forth.flags.writeable = back.flags.writeable = False
    return forth, back


def _turned(x: NDArray[Any], turn: int) -> NDArray[Any]:
    """A map under a symmetry: what stood at a cell stands where `tables` moves that cell."""
    x = x.T if turn & 4 else x
    x = x[::-1] if turn & 2 else x
    return np.ascontiguousarray(x[:, ::-1] if turn & 1 else x)


@dataclass(frozen=True)
class Folded:
    """A request in its frame, and the way back.

    Attributes:
        original: what was asked.
        request: the same in the frame. What the planner doesn't look at isn't in it: agents that aren't asked for have
            no candidates; without `cells`, cells are mere labels of candidates; `walls` shows none, `scene` raises
            RuntimeError; random bits follow from the key. `rows`, `episode`, `tick` and `steps` are as they were and
            not part of the key: for a planner's books, not for its answer.
        keys: 16 bytes for each row, a digest of all of `request` that the planner sees.
        grid: how cells are numbered; sees: what the planner looks at.
        turn: int64 `(n,)`, the symmetry, an index of `TURNS`.
        agents: int64 `(n, A)`, the agent that stands at each place.
        options: int64 `(n, A, C)`, by place, the candidates in their order, -1 past the last.
        number: int64 `(n, T)`, the new number of each task.
    """

    original: PlanRequest
    request: PlanRequest
    keys: list[bytes]
    grid: GridShape
    sees: frozenset[Sight]
    turn: NDArray[np.int64]
    agents: NDArray[np.int64]
    options: NDArray[np.int64]
    number: NDArray[np.int64]

    def some(self, rows: NDArray[np.int64]) -> PlanRequest:
        """`request` for some of its rows (int64 `(m,)`) alone."""
        r = self.request
        c = r.candidates
        at = rows.tolist()
        return replace(
            r, rows=r.rows[rows], need=r.need[rows], candidates=Candidates(c.kind[rows], c.cell[rows], c.task[rows]),
            distance=None if r.distance is None else r.distance[rows], taken=r.taken[rows], pos=r.pos[rows],
            keys=r.keys[rows], rejected=r.rejected[rows], refused=r.refused[rows], walls=lambda: r.walls()[rows],
            text=lambda i, a, c, brief=False: r.text(at[i], a, c, brief=brief), past=lambda i, a: r.past(at[i], a),
            episode=r.episode[rows],
        )  # fmt: skip

    def unfold(self, plan: Plan) -> Plan:
        """The plan for `original` that `plan`, made for `request`, stands for.

        What names no subgoal of this scene names none afterwards either, so that `SubgoalTracker.check` says of the
        plan what it would have said of it in the frame.

        Raises:
            EchelonError: the plan isn't made of integer arrays `(n, A)`.
        """
        need = self.request.need
        for name in ("kind", "cell", "task"):
            x = getattr(plan, name)
            if x.shape != need.shape or x.dtype.kind not in "iu":
                raise EchelonError(f"a planner's {name} is {x.dtype} {x.shape}: it must be integers {need.shape}")
        kind, cell, task = (np.asarray(x).astype(np.int64) for x in (plan.kind, plan.cell, plan.task))
        kind = np.where((kind >= 0) & (kind < len(SubgoalKind)), kind, -1)
        if "cells" in self.sees:
            cell, task = self._cells_back(cell), self._tasks_back(task)
        else:
            kind, cell, task = self._candidates_back(kind, cell, task)
        out = Plan.empty(self.original)
        i, p = np.nonzero(need)
        a = self.agents[i, p]
        out.kind[i, a], out.cell[i, a], out.task[i, a] = kind[i, p], cell[i, p], task[i, p]
        if plan.probability is not None:
            out.probability = np.zeros(self.options.shape, np.float32)
            i, p, j = np.nonzero(self.options >= 0)
            out.probability[i, self.agents[i, p], self.options[i, p, j]] = plan.probability[i, p, j]
        if (notes := plan.notes) is not None:
            out.notes = lambda i: self._told(i, notes(i))
        return out

    def _cells_back(self, cell: NDArray[np.int64]) -> NDArray[np.int64]:
        inside = (cell >= 0) & (cell < self.grid.num_cells)
        back = tables(self.grid)[1][self.turn[:, None], np.where(inside, cell, 0)]
        return np.where(inside, back, -1)

    def _tasks_back(self, task: NDArray[np.int64]) -> NDArray[np.int64]:
        known = (task >= -1) & (task < self.number.shape[1])
        back = _renumbered(np.where(known, task, -1), np.argsort(self.number, axis=1))
        # -2 is no task's number and not "none" either: a form that the tracker rejects, as it would the wrong number.
        return np.where(known, back, -2)

    def _candidates_back(
        self, kind: NDArray[np.int64], cell: NDArray[np.int64], task: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Without cells only candidates, and waiting, mean anything."""
        c, own = self.request.candidates, self.original.candidates
        same = (c.kind == kind[..., None]) & (c.cell == cell[..., None]) & (c.task == task[..., None])
        same &= self.options >= 0
        waits = (kind == 0) & (cell == self.request.pos) & (task == -1)
        i, p = np.nonzero(same.any(2) & ~waits)
        a, j = self.agents[i, p], self.options[i, p, same[i, p].argmax(1)]
        kind, cell, task = np.where(waits, 0, -1), np.full(kind.shape, -1), np.full(kind.shape, -1)
        kind[i, p], cell[i, p], task[i, p] = own.kind[i, a, j], own.cell[i, a, j], own.task[i, a, j]
        where = np.take_along_axis(self.original.pos, self.agents, 1)
        return kind, np.where(waits, where, cell), task

    def _told(self, i: int, notes: dict[str, Any]) -> dict[str, Any]:
        """A row's notes, by the agents' own numbers, and what the planner saw them as."""
        own = self.agents[i].tolist()
        frame = {"turn": TURNS[int(self.turn[i])], "robots": own, "tasks": np.argsort(self.number[i]).tolist()}
        told = {**notes, "frame": frame}
        if isinstance(agents := notes.get("agents"), dict):
            told["agents"] = {own[p]: x for p, x in agents.items() if isinstance(p, int) and 0 <= p < len(own)}
        return told


def fold(request: PlanRequest, *, sees: Iterable[Sight], coarse: int = 1) -> Folded:
    """Bring each row of a request into its frame.

    Args:
        request: what is asked.
        sees: what the planner looks at. The less it is, the more worlds are the same.
        coarse: path lengths are shown rounded down to multiples of it, so that yet more worlds are the same. Above 1 it
            changes what a planner says (our choice, for planners that cost much).

    Raises:
        EchelonError: `sees` has a word that means nothing, or `coarse` is below 1.
    """
    if coarse < 1:
        raise EchelonError(f"path lengths can't be rounded to multiples of {coarse}: it must be at least 1")
    original, grid = request, request.grid
    if coarse > 1 and (exact := request.distance) is not None:
        rounded = np.where(exact == UNREACHABLE, exact, exact // coarse * coarse).astype(np.uint16)
        request = replace(request, distance=rounded)
    seen = _everything_seen(sees)
    c, (n, agents), per = request.candidates, request.need.shape, request.refused.shape[2]
    shown = _shown(request, seen)
    who = np.ones_like(request.need) if "others" in seen else request.need
    if "past" in seen:
        past = _past_array(request, who)
    else:
        past = np.zeros((n, agents, 0, 5), np.int32)
    forth, back = tables(grid)
    walls = request.walls() if "walls" in seen else np.zeros((n, 0), bool)
    scenes = [request.scene(int(w)) for w in request.rows] if "scene" in seen else None
    robot_code, task_code, sort, spots = _scene_codes(scenes, grid, n, agents, request.taken.shape[1])
    distance = np.zeros((n, agents, per), np.uint16) if request.distance is None else request.distance
    rejected = np.where(request.need, request.rejected, 0).astype(np.int8)
    turn, places = np.zeros(n, np.int64), np.zeros((n, agents), np.int64)
    options = np.full((n, agents, per), -1, np.int64)
    number = np.full(request.taken.shape, -1, np.int64)
    _arrange(
        request.need, who, shown, c.kind, c.cell, c.task, distance, request.taken, request.pos, rejected,
        request.refused, past, walls, robot_code, task_code, sort, spots, forth, "cells" in seen, turn, places,
        options, number,
    )  # fmt: skip
    row = np.arange(n)[:, None]
    new = _rearranged(request, shown, who, seen, turn, places, options, number, forth)
    past = past[row, places]
    past[..., 2] = _renumbered(past[..., 2], number)
    past[..., 1] = forth[turn[:, None, None], past[..., 1]] if "cells" in seen else 0
    past[..., 1][past[..., 0] < 0] = 0
    walls = np.take_along_axis(walls, back[turn], 1) if "walls" in seen else walls
    folded_scenes = None if scenes is None else [
        _fold_scene(s, grid, int(turn[i]), places[i], number[i], "time" in seen) for i, s in enumerate(scenes)
    ]  # fmt: skip
    keys = _digests(new, past, walls, folded_scenes, grid, seen)
    if "keys" not in seen:
        first = np.frombuffer(b"".join(keys), "<u8").reshape(n, 2)[:, :1].astype(np.uint64)
        new = replace(new, keys=first + np.arange(agents, dtype=np.uint64) * _ODD)
    new = replace(new, **_views(new, past, walls, folded_scenes, grid, seen))
    return Folded(original, new, keys, grid, seen, turn, places, options, number)


def _everything_seen(sees: Iterable[Sight]) -> frozenset[Sight]:
    seen = set(sees)
    for name in seen:
        if name not in _EVERY:
            raise unknown_name("sight", str(name), sorted(_EVERY))
    for name in tuple(seen):
        seen |= _INCLUDES.get(name, frozenset())
    return frozenset(seen)


def _shown(request: PlanRequest, seen: frozenset[Sight]) -> NDArray[np.bool_]:
    """The candidates that a planner sees, bool `(n, A, C)`."""
    c = request.candidates
    shown = request.need[..., None] & (c.kind >= 0)
    if "closed" in seen:
        return shown
    if request.distance is not None:
        shown &= request.distance != UNREACHABLE
    if request.taken.any():
        i, a, j = np.nonzero(shown & (c.task >= 0))
        shown[i, a, j] = ~request.taken[i, c.task[i, a, j]]
    return shown


def _renumbered(task: NDArray[Any], number: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tasks `(n, ...)` under the numbers `(n, T)`; -1 stays -1."""
    none = np.full((len(number), 1), -1, np.int64)
    row = np.arange(len(number)).reshape(-1, *(1,) * (task.ndim - 1))
    return np.asarray(np.concatenate([number, none], 1)[row, task])


def _past_array(request: PlanRequest, who: NDArray[np.bool_]) -> NDArray[np.int32]:
    """The last subgoals of the agents `who` as numbers, int32 `(n, A, PAST, 5)`, as in `SubgoalTracker.past`."""
    past = np.full((*request.need.shape, PAST, 5), -1, np.int32)
    for i, a in np.argwhere(who).tolist():
        told = request.past(i, a)[-PAST:]
        for j, p in enumerate(told, PAST - len(told)):
            task = -1 if p.task is None else p.task
            past[i, a, j] = (p.kind, request.cell_index(*p.target), task, p.outcome, p.steps)
    return past


def _rearranged(
    request: PlanRequest,
    shown: NDArray[np.bool_],
    who: NDArray[np.bool_],
    seen: frozenset[Sight],
    turn: NDArray[np.int64],
    places: NDArray[np.int64],
    options: NDArray[np.int64],
    number: NDArray[np.int64],
    forth: NDArray[np.int32],
) -> PlanRequest:
    """The request with its arrays in the frame, and what isn't seen left out of them."""
    c, (n, _, per) = request.candidates, options.shape
    row, flat = np.arange(n)[:, None], np.arange(n)[:, None, None]
    there = options >= 0
    at = (flat, places[..., None], np.maximum(options, 0))
    kind = np.where(there, c.kind[at], np.int8(-1))
    task = _renumbered(np.where(there, c.task[at], -1), number)
    if "cells" in seen:
        cell = np.where(there, forth[turn[:, None, None], c.cell[at]], 0)
        pos = np.where(who[row, places], forth[turn[:, None], request.pos[row, places]], 0)
    else:
        # Labels that tell an agent's candidates apart; nobody is anywhere.
        cell = np.where(there & (kind > 0), np.arange(1, per + 1), 0)
        pos = np.zeros_like(request.pos)
    told = np.zeros_like(request.taken)
    if "scene" in seen:
        told[:] = request.taken
    elif "closed" in seen:
        i, a, j = np.nonzero(shown & (c.task >= 0))
        told[i, c.task[i, a, j]] = request.taken[i, c.task[i, a, j]]
    taken = np.zeros_like(told)
    np.put_along_axis(taken, number, told, 1)
    need = request.need[row, places]
    return replace(
        request, need=need, candidates=Candidates(kind, cell.astype(np.int32), task.astype(np.int16)),
        distance=None if request.distance is None else np.where(there, request.distance[at], UNREACHABLE),
        taken=taken, pos=pos.astype(np.int32), keys=request.keys[row, places],
        rejected=np.where(need, request.rejected[row, places], 0).astype(np.int8), refused=request.refused[at] & there,
    )  # fmt: skip


def _digests(
    new: PlanRequest,
    past: NDArray[np.int32],
    walls: NDArray[np.bool_],
    scenes: list[Scene] | None,
    grid: GridShape,
    seen: frozenset[Sight],
) -> list[bytes]:
    c, n = new.candidates, len(new.rows)
    parts: list[NDArray[Any]] = [new.need, new.rejected, new.refused, c.kind, c.task, new.taken, past]
    parts.append(np.packbits(walls, axis=1))
    if new.distance is not None:
        parts.append(new.distance)
    if "cells" in seen:
        parts += [c.cell, new.pos]
    if "keys" in seen:
        parts.append(new.keys)
    flat = [np.ascontiguousarray(x.astype(x.dtype.newbyteorder("<"), copy=False)) for x in parts]
    data = np.concatenate([x.reshape(n, int(np.prod(x.shape[1:]))).view(np.uint8) for x in flat], 1)
    shape = (_FORMAT, grid.height, grid.width, grid.view, *c.kind.shape[1:], new.taken.shape[1], past.shape[2])
    head = hashlib.blake2b(repr((shape, sorted(seen), new.distance is not None)).encode(), digest_size=16)
    keys = []
    for i in range(n):
        digest = head.copy()
        digest.update(data[i])
        if scenes is not None:
            digest.update(_scene_bytes(scenes[i]))
        keys.append(digest.digest())
    return keys


def _views(
    new: PlanRequest,
    past: NDArray[np.int32],
    walls: NDArray[np.bool_],
    scenes: list[Scene] | None,
    grid: GridShape,
    seen: frozenset[Sight],
) -> dict[str, Any]:
    """What a folded request has beside its arrays."""
    c = new.candidates
    by_world: dict[int, Scene] | None = None if scenes is None else dict(zip(new.rows.tolist(), scenes, strict=True))

    def see_walls() -> NDArray[np.bool_]:
        # Who doesn't look at walls may still take the map's size from them, which is part of every key.
        return walls if "walls" in seen else np.zeros((len(new.rows), grid.num_cells), bool)

    def see_scene(world: int) -> Scene:
        if by_world is None:
            raise RuntimeError("a planner asked for a scene, but didn't say that it sees it")
        return by_world[world]

    def text(i: int, a: int, option: int, *, brief: bool = False) -> str:
        kind, cell, task = (int(x[i, a, option]) for x in (c.kind, c.cell, c.task))
        return subgoal_text(SubgoalKind(kind), grid.row_col(cell), task, brief=brief)

    def told(i: int, a: int) -> list[Past]:
        found = []
        for kind, cell, task, outcome, steps in past[i, a].tolist():
            if kind >= 0:
                k, target = SubgoalKind(kind), grid.row_col(cell)
                words = subgoal_text(k, target, task, brief="cells" not in seen)
                found.append(Past(k, target, task if task >= 0 else None, Outcome(outcome), steps, words))
        return found

    return {
        "walls": see_walls, "scene": see_scene, "text": text, "past": told, "grid": grid,
    }  # fmt: skip


# -- scenes ---------------------------------------------------------------------------------------------------------


def _scene_codes(
    scenes: list[Scene] | None, grid: GridShape, n: int, agents: int, tasks: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int64], NDArray[np.int32]]:
    """What only a scene says of agents and tasks, without any numbers.

    Returns:
        Hashes of agents, uint64 `(n, A)`, and of tasks, uint64 `(n, T)`; the sort of each task, int64 `(n, T)`: numbers
        are only exchanged among tasks of one sort; where it is and must be brought, int32 `(n, T, 2)`, cells or -1.
    """
    robots, codes = np.zeros((n, agents), np.uint64), np.zeros((n, tasks), np.uint64)
    sort, spots = np.zeros((n, tasks), np.int64), np.full((n, tasks, 2), -1, np.int32)
    for i, scene in enumerate(scenes or ()):
        what = {t.id: (t.kind, t.status) for t in scene.tasks}
        kinds = {kind: k for k, kind in enumerate(sorted({t.kind for t in scene.tasks}))}
        for agent in scene.agents:
            robots[i, agent.id] = _code(what.get(-1 if agent.carrying is None else agent.carrying))
        for t in scene.tasks[:tasks]:
            codes[i, t.id], sort[i, t.id] = _code(what[t.id]), kinds[t.kind]
            for k, cell in enumerate((t.cell, t.goal)):
                if cell is not None:
                    spots[i, t.id, k] = grid.cell_index(*cell)
    return robots, codes, sort, spots


def _code(x: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(x).encode(), digest_size=8).digest(), "little")


def _fold_scene(
    scene: Scene, grid: GridShape, turn: int, places: NDArray[np.int64], number: NDArray[np.int64], time: bool
) -> Scene:
    """A scene in the frame: agents and tasks moved and renumbered, in the order of their new numbers."""
    forth = tables(grid)[0][turn]

    def moved(cell: tuple[int, int] | None) -> Any:
        return None if cell is None else grid.row_col(int(forth[grid.cell_index(*cell)]))

    def renamed(label: str, change: int) -> str:
        return _NUMBER.sub(lambda m: str(int(m[0]) + change), label)

    tasks = len(number)
    renumber = dict(enumerate(number.tolist()))
    # What is beyond the request's tasks (targets of a search) has no candidates: ordered by what is known of it.
    beyond = scene.tasks[tasks:]
    for new, t in enumerate(sorted(beyond, key=lambda t: (t.kind, t.status, moved(t.cell) or (-1, -1), t.id)), tasks):
        renumber[t.id] = new
    views = [
        replace(t, id=new, label=renamed(t.label, new - t.id), cell=moved(t.cell), goal=moved(t.goal),
                needs=renumber.get(t.needs) if t.needs is not None else None,
                locked_by=renumber.get(t.locked_by) if t.locked_by is not None else None)
        for t in scene.tasks
        for new in (renumber[t.id],)
    ]  # fmt: skip
    agents = [
        replace(scene.agents[a], id=p, cell=moved(scene.agents[a].cell),
                carrying=renumber.get(load) if (load := scene.agents[a].carrying) is not None else None)
        for p, a in enumerate(places.tolist())
    ]  # fmt: skip
    # A region is task and zone under one name, and keeps one number; zones of their own are ordered by their cells.
    label_of = {t.label: t.id for t in scene.tasks[:tasks]}
    zones = [(z, tuple(sorted(moved(cell) for cell in z.cells))) for z in scene.zones]
    if all(label_of.get(z.label) == z.id for z in scene.zones):
        numbers = {z.id: renumber[z.id] for z in scene.zones}
    else:
        numbers = {z.id: new for new, (z, _) in enumerate(sorted(zones, key=lambda x: (x[1], x[0].id)))}
    shown = [replace(z, id=numbers[z.id], label=renamed(z.label, numbers[z.id] - z.id), cells=cells)
             for z, cells in zones]  # fmt: skip
    maps = [None if x is None else _turned(x, turn) for x in (scene.walls, scene.seen)]
    for x in maps:
        if x is not None:
            x.flags.writeable = False
    assert maps[0] is not None
    return replace(
        scene, step=scene.step if time else 0, walls=maps[0], seen=maps[1], agents=tuple(agents),
        tasks=tuple(sorted(views, key=lambda t: t.id)), zones=tuple(sorted(shown, key=lambda z: z.id)),
    )  # fmt: skip


def _scene_bytes(scene: Scene) -> bytes:
    maps = [b"" if x is None else np.packbits(x).tobytes() for x in (scene.walls, scene.seen)]
    text = repr((scene.env, scene.step, scene.limit, scene.agents, scene.tasks, scene.zones, scene.walls.shape))
    return b"\0".join([text.encode(), *maps])


# -- the frame ------------------------------------------------------------------------------------------------------


@numba.njit(inline="always", cache=True)
def _add(code, x):  # type: ignore[no-untyped-def]
    """The hash `code` with one number more."""
    return mix(code, np.uint64(np.int64(x)))


@numba.njit(cache=True)
def _arrange(  # type: ignore[no-untyped-def]
    need, who, shown, kind, cell, task, distance, taken, pos, rejected, refused, past, walls, robot_code, task_code,
    sort, spots, forth, see_cells, turn, places, options, number,
):  # fmt: skip
    """Choose each row's symmetry and orders; see `Folded` for what is written.

    who: bool `(n, A)`, agents of whom cell and past are seen; past is `(n, A, 0, 5)` and walls `(n, 0)` if unseen.
    """
    n, agents, per = kind.shape
    tasks, olds, cells = taken.shape[1], past.shape[2], forth.shape[1]
    own = np.zeros(agents, np.uint64)
    colour, next_colour = np.zeros(agents, np.uint64), np.zeros(agents, np.uint64)
    task_colour, next_task = np.zeros(tasks, np.uint64), np.zeros(tasks, np.uint64)
    body = np.zeros((agents, per), np.uint64)
    memory = np.zeros((agents, olds), np.uint64)
    wall_code = np.zeros(cells, np.uint64)
    for c in range(cells):
        wall_code[c] = _add(np.uint64(1), c)
    for i in range(n):
        for a in range(agents):
            own[a] = _add(_add(_add(robot_code[i, a], need[i, a]), who[i, a]), rejected[i, a])
            for c in range(per):
                if shown[i, a, c]:
                    t = task[i, a, c]
                    code = _add(_add(_add(np.uint64(2), kind[i, a, c]), distance[i, a, c]), refused[i, a, c])
                    body[a, c] = _add(code, 2 * taken[i, t] + 1 if t >= 0 else 0)
            for j in range(olds):
                p = past[i, a, j]
                code = _add(_add(_add(np.uint64(3), p[0]), p[3]), p[4])
                memory[a, j] = _add(_add(code, p[2] >= 0), j)

        # The symmetry under which everything that is seen, added up without regard to numbers, is least.
        best = np.uint64(0)
        for g in range(forth.shape[0] if see_cells else 0):
            total = np.uint64(0)
            for a in range(agents):
                if not who[i, a]:
                    continue
                code = _add(own[a], forth[g, pos[i, a]])
                for j in range(olds):
                    if past[i, a, j, 0] >= 0:
                        code = _add(_add(code, memory[a, j]), forth[g, past[i, a, j, 1]])
                total += _add(code, 0)
                for c in range(per):
                    if shown[i, a, c]:
                        total += mix(_add(body[a, c], forth[g, cell[i, a, c]]), code)
            for c in range(walls.shape[1]):
                if walls[i, c]:
                    total += wall_code[forth[g, c]]
            if g == 0 or total < best:
                best, turn[i] = total, g
        move = forth[turn[i]]

        # Colours of agents and tasks, each round by those of what they hang together with.
        for a in range(agents):
            colour[a] = own[a]
            if see_cells and who[i, a]:
                colour[a] = _add(colour[a], move[pos[i, a]])
            for c in range(per):
                if see_cells and shown[i, a, c]:
                    body[a, c] = _add(body[a, c], move[cell[i, a, c]])
            for j in range(olds):
                if see_cells and past[i, a, j, 0] >= 0:
                    memory[a, j] = _add(memory[a, j], move[past[i, a, j, 1]])
        for t in range(tasks):
            task_colour[t] = task_code[i, t]
            for k in range(2):
                task_colour[t] = _add(task_colour[t], move[spots[i, t, k]] if spots[i, t, k] >= 0 else -1)
        for _ in range(3):
            for t in range(tasks):
                next_task[t] = _add(task_colour[t], 0)
            for a in range(agents):
                next_colour[a] = _add(colour[a], 0)
                for c in range(per):
                    if shown[i, a, c]:
                        t = task[i, a, c]
                        if t >= 0:
                            next_task[t] += mix(body[a, c], colour[a])
                            next_colour[a] += mix(body[a, c], task_colour[t])
                        else:
                            next_colour[a] += _add(body[a, c], 0)
                for j in range(olds):
                    t = past[i, a, j, 2]
                    if past[i, a, j, 0] >= 0:
                        if t >= 0:
                            next_task[t] += mix(memory[a, j], colour[a])
                            next_colour[a] += mix(memory[a, j], task_colour[t])
                        else:
                            next_colour[a] += _add(memory[a, j], 0)
            colour[:] = next_colour
            task_colour[:] = next_task

        # Agents: those that are asked for first, then by cell, then by colour.
        for a in range(agents):
            at = a
            while at > 0:
                b = places[i, at - 1]
                here = move[pos[i, a]] if see_cells and who[i, a] else 0
                there = move[pos[i, b]] if see_cells and who[i, b] else 0
                if need[i, a] != need[i, b]:
                    earlier = need[i, a]
                elif here != there:
                    earlier = here < there
                else:
                    earlier = colour[a] < colour[b]
                if not earlier:
                    break
                places[i, at] = b
                at -= 1
            places[i, at] = a

        # Candidates: waiting last, then by kind, path length, cell and colour; tasks by when they first come up.
        for p in range(agents):
            a = places[i, p]
            count = 0
            for c in range(per):
                if not shown[i, a, c]:
                    continue
                at = count
                while at > 0:
                    d = options[i, p, at - 1]
                    here = move[cell[i, a, c]] if see_cells else 0
                    there = move[cell[i, a, d]] if see_cells else 0
                    mine = task_colour[task[i, a, c]] if task[i, a, c] >= 0 else np.uint64(0)
                    theirs = task_colour[task[i, a, d]] if task[i, a, d] >= 0 else np.uint64(0)
                    if (kind[i, a, c] == 0) != (kind[i, a, d] == 0):
                        earlier = kind[i, a, d] == 0
                    elif kind[i, a, c] != kind[i, a, d]:
                        earlier = kind[i, a, c] < kind[i, a, d]
                    elif distance[i, a, c] != distance[i, a, d]:
                        earlier = distance[i, a, c] < distance[i, a, d]
                    elif here != there:
                        earlier = here < there
                    else:
                        earlier = mine < theirs
                    if not earlier:
                        break
                    options[i, p, at] = d
                    at -= 1
                options[i, p, at] = c
                count += 1
            for j in range(count):
                t = task[i, a, options[i, p, j]]
                if t >= 0 and number[i, t] < 0:
                    number[i, t] = _next_number(sort[i], number[i], t)
        for p in range(agents):
            for j in range(olds):
                t = past[i, places[i, p], j, 2]
                if t >= 0 and number[i, t] < 0:
                    number[i, t] = _next_number(sort[i], number[i], t)
        while True:
            first = -1
            for t in range(tasks):
                if number[i, t] < 0 and (first < 0 or task_colour[t] < task_colour[first]):
                    first = t
            if first < 0:
                break
            number[i, first] = _next_number(sort[i], number[i], first)


@numba.njit(cache=True)
def _next_number(sort, number, task):  # type: ignore[no-untyped-def]
    """The least number of the task's sort that none has yet."""
    given = 0
    for t in range(number.shape[0]):
        given += number[t] >= 0 and sort[t] == sort[task]
    for t in range(number.shape[0]):
        if sort[t] == sort[task]:
            if given == 0:
                return t
            given -= 1
    return -1
