"""A base for worlds whose rules are written in plain NumPy, over all worlds at once; no kernel of one's own.

`PlainEnv` draws maps, moves agents, counts time, and writes observations, scenes, words and candidates; a world
says what its tasks are and what a step does to them. `docs/extending.md` shows one.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numba
import numpy as np
from numpy.typing import NDArray

from echelon.envs.base import C, Candidates, GridEnv, Scene, Subgoal, SubgoalKind, TaskView
from echelon.envs.kernels import AGENT, draw_map, resolve_moves, take_marked_cell
from echelon.errors import EchelonError

__all__ = ["PlainEnv"]

_MAX_TASKS = 256  # `observe_tasks` keeps a task's index in eight bits


class PlainEnv(GridEnv[C]):
    """A batch of grid worlds of which only the rules are missing; arrays are described at `GridEnv`.

    A world gives `name`, `status_words`, `_count_tasks` and `rules`, and the class variables below where it wants
    others. Arrays of its own are allocated in `_build` (after `super()._build()`), filled in `begin` and named in
    `_own_state`. What it draws at random comes from `echelon.rng` with each world's own `keys` and `counters`.

    Attributes:
        last_pos: int32 `(W, A)`, where the agents were before the last step; at its start where an episode began.
    """

    task_kind: ClassVar[str] = "task"
    """What a task is called in scenes and texts."""
    subgoal_kind: ClassVar[SubgoalKind] = SubgoalKind.REGION
    """What agents are asked to do about a task. A `REGION` is reached by being at the task's cell, a `FETCH` or a
    `REPAIR` once `task_done_by` names the agent. Each of the three is given to one agent at a time."""
    subgoal_status: ClassVar[int | None] = 0
    """The status that a task must have for that to make sense; None: any."""
    _shared_state = (*GridEnv._shared_state, "last_pos")

    def __init_subclass__(cls, **more: Any) -> None:
        """Derive `kind_status`, by which subgoals in flight are judged, where the class doesn't say its own."""
        super().__init_subclass__(**more)
        said = {"kind_status", "subgoal_kind", "subgoal_status"} & vars(cls).keys()
        if "kind_status" not in said and (said or not hasattr(cls, "kind_status")):
            cls.kind_status = {} if cls.subgoal_status is None else {cls.subgoal_kind: cls.subgoal_status}

    # -- for worlds to fill in -----------------------------------------------------------------

    @abstractmethod
    def rules(self) -> None:
        """What the step that was just made does, in all W worlds at once; agents have moved, steps are counted.

        It may read all arrays: `pos` and `last_pos` int32 `(W, A)`, `last_action` int8 `(W, A)`, `steps` int32
        `(W,)`, `task_cell` int32 and `task_status` int8 `(W, T)`, what `at_tasks` gives. It writes in place
        (`self.reward[:] = …`):

        - `task_status`, and where it wants `task_cell`, `task_goal`, `carrying`, `load_goal`;
        - `task_done_by` int16 `(W, T)`, -1 so far: the agent that advanced a task in this step;
        - `reward` float32 `(W,)`, 0 so far: not without an advanced task or `new_info`;
        - `terminated` bool `(W,)`, False so far: success. The time limit is not its business;
        - `new_info` bool `(W,)`, False so far: something that the whole team should be replanned for.

        It must not write `pos`, `grid` or `steps`.
        """

    def begin(self, which: NDArray[np.bool_]) -> None:
        """New episodes begin in the worlds `which` (bool `(W,)`): set what should begin otherwise there.

        Maps and cells are drawn; every task has status 0 and no goal, nobody carries anything. Other worlds must
        stay as they are. Default: nothing.
        """

    def at_tasks(self) -> NDArray[np.bool_]:
        """Which agents stand at which tasks, bool `(W, T, A)`."""
        return np.asarray(self.pos[:, None, :] == self.task_cell[:, :, None])

    # -- the step ------------------------------------------------------------------------------

    def _cells_needed(self) -> int:
        return self.num_agents + self.num_tasks

    def _check_room(self) -> None:
        if not 1 <= self.num_tasks <= _MAX_TASKS:
            raise EchelonError(f"{self.name} has {self.num_tasks} tasks: there must be 1 to {_MAX_TASKS}")
        super()._check_room()

    def _build(self) -> None:
        self.last_pos = np.zeros_like(self.pos)
        self._layout = self._layout_args()
        self._marks = (self._marked("A"), self._marked("P"))

    def _advance(self, actions: NDArray[np.int8]) -> None:
        self._clear_outcomes()
        self.last_pos[:] = self.pos
        _move(self.grid, self.pos, actions, self.offsets, self.steps, self.collisions, self.bumped, self._target)
        self.last_action[:] = actions
        self.steps += 1
        self.rules()
        self.truncated[:] = ~self.terminated & (self.steps >= self.limit)
        self._observe(self._every)

    def _reset_worlds(self, which: NDArray[np.bool_]) -> None:
        _place(
            which, self.grid, self.pos, self.task_cell, self._layout, self._marks, self.keys, self.counters,
            self._scratch,
        )  # fmt: skip
        self.last_pos[which] = self.pos[which]
        for array in (self.steps, self.last_action, self.task_status, self.task_goal):
            array[which] = 0
        self.carrying[which] = self.load_goal[which] = -1
        self.begin(which)
        self._observe(which)

    def _known_tasks(self) -> NDArray[np.bool_]:
        return np.asarray(self.task_status == (self.subgoal_status or 0))

    # -- what planners see ---------------------------------------------------------------------

    def candidate_arrays(self, rows: NDArray[np.int64]) -> Candidates:
        """For each agent: each task that has `subgoal_status`, in the order of ids, then to wait."""
        status = self.task_status[rows]
        possible = np.ones(status.shape, bool) if self.subgoal_status is None else status == self.subgoal_status
        shape = (len(rows), self.num_agents, self.num_tasks + 1)
        out = Candidates(np.full(shape, -1, np.int8), np.zeros(shape, np.int32), np.full(shape, -1, np.int16))
        i, t = np.nonzero(possible)
        at = (possible.cumsum(1) - 1)[i, t]
        out.kind[i, :, at] = self.subgoal_kind
        out.cell[i, :, at] = self.task_cell[rows][i, t][:, None]
        out.task[i, :, at] = t[:, None]
        each, last = np.arange(len(rows)), possible.sum(1)
        out.kind[each, :, last] = SubgoalKind.WAIT
        out.cell[each, :, last] = self.pos[rows]
        return out

    def scene(self, i: int) -> Scene:
        """The structured view of world `i`; everything is known."""
        tasks = []
        for t in range(self.num_tasks):
            goal = self.row_col(self.task_goal[i, t]) if self.task_goal[i, t] > 0 else None  # 0 is border
            cell, word = self.row_col(self.task_cell[i, t]), self.status_words[self.task_status[i, t]]
            tasks.append(TaskView(t, self.task_kind, f"{self.task_kind} {t}", cell, goal, word))
        return Scene(self.name, int(self.steps[i]), self.limit, self.walls(i), self.agent_views(i), tuple(tasks))

    @classmethod
    def describe(cls, scene: Scene) -> str:
        """The scene in words: one line a robot, one a task."""
        rows, cols = scene.walls.shape
        lines = [f"{scene.env.capitalize()} of {rows} rows and {cols} columns, step {scene.step} of {scene.limit}."]
        for agent in scene.agents:
            load = "" if agent.carrying is None else f" and carries {scene.tasks[agent.carrying].label}"
            lines.append(f"Robot {agent.id} is at {agent.cell}{load}.")
        for task in scene.tasks:
            goal = "" if task.goal is None else f" and belongs at {task.goal}"
            lines.append(f"{task.label.capitalize()} at {task.cell} is {task.status}{goal}.")
        return "\n".join(lines)

    @classmethod
    def candidates(cls, scene: Scene, agent: int) -> tuple[Subgoal, ...]:
        """The subgoals that make sense now for one agent; agrees with `candidate_arrays`."""
        word = None if cls.subgoal_status is None else cls.status_words[cls.subgoal_status]
        tasks = [
            cls._subgoal(cls.subgoal_kind, task.cell, task.id)
            for task in scene.tasks
            if task.cell is not None and word in (None, task.status)
        ]
        return (*tasks, cls._subgoal(SubgoalKind.WAIT, scene.agents[agent].cell))


@numba.njit(cache=True)
def _move(grid, pos, actions, offsets, steps, collisions, bumped, target):  # type: ignore[no-untyped-def]
    for w in range(pos.shape[0]):
        first = steps[w] % pos.shape[1]
        collisions[w] = resolve_moves(grid[w], pos[w], actions[w], offsets, first, target, bumped[w])


@numba.njit(cache=True)
def _place(which, grid, pos, task_cell, layout, marks, keys, counters, scratch):  # type: ignore[no-untyped-def]
    starts, places = marks
    free = scratch[2]
    for w in range(which.shape[0]):
        if not which[w]:
            continue
        key = keys[w]
        counter, n = draw_map(grid[w], layout, scratch[0], scratch[1], free, key, counters[w])
        for t in range(task_cell.shape[1]):
            task_cell[w, t] = take_marked_cell(places, free, n, key, counter)
            counter += np.uint64(1)
            n -= 1
        for a in range(pos.shape[1]):
            pos[w, a] = take_marked_cell(starts, free, n, key, counter)
            grid[w, pos[w, a]] |= AGENT
            counter += np.uint64(1)
            n -= 1
        counters[w] = counter
