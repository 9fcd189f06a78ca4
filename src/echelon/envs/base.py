"""The contract of a batched grid world, and what a planner may see of one: scenes and subgoals.

An environment is a batch of worlds: arrays are `(num_envs, num_agents, …)`, stepped in place by numba kernels.
One file a world: its config, its kernels, its words. See `docs/extending.md` for one in under 40 lines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from echelon.envs import kernels
from echelon.envs.maps import MapFile, read_map
from echelon.envs.scenes import (
    AgentView,
    Candidates,
    Scene,
    Subgoal,
    SubgoalKind,
    TaskView,
    ZoneView,
    subgoal_text,
)
from echelon.errors import EchelonError
from echelon.rng import spawn_keys

__all__ = [
    "ACTIONS",
    "AgentView",
    "Candidates",
    "GridConfig",
    "GridEnv",
    "Scene",
    "Subgoal",
    "SubgoalKind",
    "TaskView",
    "ZoneView",
    "subgoal_text",
]

ACTIONS = ("stay", "north", "east", "south", "west")
"""The primitive moves, by index."""

MAX_SIDE = 256
MAX_AGENTS = 64
NEAREST_TASKS = 3
OWN_FEATURES = 13
WAY_FEATURES = 5


@dataclass(frozen=True)
class GridConfig:
    """What every grid world can be told."""

    size: int = 20
    """Side of the square map, in cells (5 to 256)."""
    height: int | None = None
    """Rows, where the map isn't square; default: size."""
    width: int | None = None
    """Columns, where the map isn't square; default: size."""
    num_agents: int = 4
    """Robots in the team (1 to 64)."""
    limit: int | None = None
    """Time limit of an episode, in steps; default: ten for each cell of the map's longer side."""
    layout: Literal["shelves", "random", "open"] = "shelves"
    """How generated maps look: blocks of shelves with aisles, single random walls, or no walls."""
    density: float = 0.2
    """Share of the map that is wall in generated maps (0 to 0.4), about."""
    aisle: int = 2
    """Width of the aisles between shelves, in cells."""
    map: Path | None = None
    """A MovingAI .map file, instead of generated maps; size, height, width, layout are then unused."""
    view: int = 2
    """Radius of an agent's window, in cells (1 to 5): the window is a square of 2 * view + 1."""


C = TypeVar("C", bound=GridConfig)


def _check(good: bool, name: str, value: object, need: str) -> None:
    if not good:
        raise EchelonError(f"env.{name} is {value}: it must be {need}")


class GridEnv(ABC, Generic[C]):
    """A batch of grid worlds stepped in place.

    One step is `step(actions)`, which resets finished worlds at once (Gymnasium's `SAME_STEP`) and keeps
    their last observations in `final_obs`. Code that must look at the true last state before the reset
    (the hierarchy does) calls its two halves, `advance(actions)` and `autoreset()`.

    Attributes (all preallocated, updated in place; W = num_envs, A = num_agents):
        obs: int8 `(W, A, obs_size)`; multiplied by `obs_scale` (float32 `(obs_size,)`) it is about ±1.
        action_mask: uint8 `(W, A, 5)`, 1 where a move isn't into a wall.
        reward: float32 `(W,)`, the team's task reward of the last step.
        terminated, truncated: bool `(W,)`; success is the only termination, the time limit truncates.
        final_obs: int8 `(W, A, obs_size)`, valid where the last step ended an episode.
        collisions: int32 `(W,)`, moves of the last step that another agent prevented; bumped: uint8 `(W, A)`,
            1 for the agents whose move it was.
        pos: int32 `(W, A)`, cells as flat indices of the padded grid.
        carrying: int16 `(W, A)`, task id or -1.
        task_status: int8 `(W, T)`; task_cell, task_goal: int32 `(W, T)`.
        task_done_by: int16 `(W, T)`, the agent that advanced the task in the last step, or -1.
        new_info: bool `(W,)`, something a planner would want to know happened in the last step.
        steps: int32 `(W,)`, steps of the present episode.
    """

    name: ClassVar[str]
    extra_scale: ClassVar[tuple[float, ...]] = ()
    """Scales of the features that only this world has, one a feature; they come last."""
    status_words: ClassVar[tuple[str, ...]]
    kind_status: ClassVar[Mapping[SubgoalKind, int]]
    """The status that a task must have for a subgoal of this kind to be open."""
    kind_holder: ClassVar[frozenset[SubgoalKind]] = frozenset()
    """Kinds that only the agent that carries the task (`carrying`) may be given."""

    def __init__(self, config: C, num_envs: int, seed: int = 0, *, extra_features: int = 0) -> None:
        """Build the worlds and reset them.

        Args:
            config: the world's settings.
            num_envs: worlds in the batch, at least 1.
            seed: root seed; world i depends on (seed, i) alone.
            extra_features: columns kept free behind each observation (`obs_buffer`), for subgoals.

        Raises:
            EchelonError: a setting is out of range, or the map has no room for what must be in it.
        """
        if num_envs < 1:
            raise EchelonError(f"num_envs is {num_envs}: it must be at least 1")
        if seed < 0:
            raise EchelonError(f"seed is {seed}: it must be at least 0")
        self.config = config
        self.num_envs, self.num_agents, self.num_actions = num_envs, config.num_agents, len(ACTIONS)
        self.map_file: MapFile | None = read_map(Path(config.map)) if config.map is not None else None
        self.height, self.width = self._sides()
        self._check_config()
        self.view = config.view
        self.stride = self.width + 2 * self.view
        self.num_cells = (self.height + 2 * self.view) * self.stride
        cells = np.arange(self.num_cells, dtype=np.int32)
        self.row_of = (cells // self.stride - self.view).astype(np.int16)
        self.col_of = (cells % self.stride - self.view).astype(np.int16)
        self.offsets = np.array([0, -self.stride, 1, self.stride, -1], np.int32)
        self.limit = config.limit if config.limit is not None else 10 * max(self.height, self.width)
        self.num_tasks = self._count_tasks()
        self._check_room()
        W, A, T = num_envs, config.num_agents, self.num_tasks
        self.keys = spawn_keys(seed, (0,), W)
        self.counters = np.zeros(W, np.uint64)
        self.grid = np.zeros((W, self.num_cells), np.uint8)
        self.pos = np.zeros((W, A), np.int32)
        self.carrying = np.full((W, A), -1, np.int16)
        self.load_goal = np.full((W, A), -1, np.int32)
        self.bumped = np.zeros((W, A), np.uint8)
        self.last_action = np.zeros((W, A), np.int8)
        self.steps = np.zeros(W, np.int32)
        self.task_status = np.zeros((W, T), np.int8)
        self.task_cell = np.zeros((W, T), np.int32)
        self.task_goal = np.zeros((W, T), np.int32)
        self.task_done_by = np.full((W, T), -1, np.int16)
        self.new_info = np.zeros(W, bool)
        self.reward = np.zeros(W, np.float32)
        self.terminated = np.zeros(W, bool)
        self.truncated = np.zeros(W, bool)
        self.collisions = np.zeros(W, np.int32)
        self.action_mask = np.zeros((W, A, 5), np.uint8)
        self.obs_scale = self._obs_scale()
        self.obs_size = len(self.obs_scale)
        self._own_start = 2 * (2 * self.view + 1) ** 2
        self.obs_buffer = np.zeros((W, A, self.obs_size + extra_features), np.int8)
        self.obs = self.obs_buffer[:, :, : self.obs_size]
        self.final_obs = np.zeros((W, A, self.obs_size), np.int8)
        self.state_scale = self._state_scale()
        self.state_size = len(self.state_scale)
        self._scratch = np.zeros((3, self.num_cells), np.int32)
        self._target = np.zeros(A, np.int32)
        self._every = np.ones(W, bool)
        self._kind_status = np.array([self.kind_status.get(kind, -1) for kind in SubgoalKind], np.int8)
        self._kind_holder = np.array([kind in self.kind_holder for kind in SubgoalKind], bool)
        self._build()
        self.reset()

    # -- for worlds to fill in -----------------------------------------------------------------

    @abstractmethod
    def _count_tasks(self) -> int:
        """Tasks of a world (the `T` of the arrays)."""

    @abstractmethod
    def _cells_needed(self) -> int:
        """Free cells that a map must at least have."""

    @abstractmethod
    def _build(self) -> None:
        """Allocate what this world has beyond the shared arrays; name those in `_own_state`."""

    @abstractmethod
    def _advance(self, actions: NDArray[np.int8]) -> None:
        """Run the step kernel over all worlds (everything but the reset), observations included."""

    @abstractmethod
    def _reset_worlds(self, which: NDArray[np.bool_]) -> None:
        """Begin new episodes in the worlds of the mask `which` (bool `(W,)`), observations included."""

    @abstractmethod
    def candidate_arrays(self, rows: NDArray[np.int64]) -> Candidates:
        """The subgoals that make sense now in the worlds `rows`; agrees with `candidates`."""

    @abstractmethod
    def scene(self, i: int) -> Scene:
        """The structured view of world `i`."""

    @classmethod
    @abstractmethod
    def describe(cls, scene: Scene) -> str:
        """The scene in words."""

    @classmethod
    @abstractmethod
    def candidates(cls, scene: Scene, agent: int) -> tuple[Subgoal, ...]:
        """The subgoals that make sense now for one agent, never empty."""

    @staticmethod
    def _subgoal(kind: SubgoalKind, target: tuple[int, int], task: int | None = None) -> Subgoal:
        return Subgoal(kind, target, task, subgoal_text(kind, target, -1 if task is None else task))

    _own_state: tuple[str, ...] = ()

    # -- the step ------------------------------------------------------------------------------

    def reset(self) -> NDArray[np.int8]:
        """Begin a new episode in every world; returns `obs`."""
        self._reset_worlds(self._every)
        self._clear_outcomes()
        return self.obs

    def reseed(self, seed: int) -> NDArray[np.int8]:
        """Start over from another root seed; returns `obs`."""
        self.keys[:] = spawn_keys(seed, (0,), self.num_envs)
        self.counters[:] = 0
        return self.reset()

    def share_episodes(self, group: int) -> NDArray[np.int8]:
        """Begin a new episode in every world, the same one in each group of `group` neighbours; returns `obs`.

        The episodes that follow are the same ones too, each world reaching them in its own time: the k-th after
        this call begins alike in all worlds of a group. Called again, all begin together with one that is new to the
        whole group. Group g holds the worlds from g * group on and has the key of its first.

        Args:
            group: worlds a group, 1 or more.

        Raises:
            EchelonError: the worlds are no whole number of groups.
        """
        if group < 1 or self.num_envs % group:
            raise EchelonError(f"num_envs is {self.num_envs}: it must be a multiple of the group's {group} worlds")
        self.keys[:] = self.keys[::group].repeat(group)
        # The furthest of a group has used up most draws; those that are behind skip the rest of theirs.
        self.counters[:] = self.counters.reshape(-1, group).max(1).repeat(group)
        return self.reset()

    def _clear_outcomes(self) -> None:
        self.reward[:] = 0
        self.terminated[:] = self.truncated[:] = False
        self.collisions[:] = 0
        self.bumped[:] = 0
        self.task_done_by[:] = -1
        self.new_info[:] = False

    def advance(self, actions: NDArray[np.int8]) -> None:
        """Step all worlds without resetting the finished ones.

        Args:
            actions: int8 `(W, A)` in [0, 5).
        """
        self._advance(actions)

    def autoreset(self) -> NDArray[np.bool_]:
        """Keep the last observations of finished worlds in `final_obs` and reset them; which, bool `(W,)`."""
        done = self.terminated | self.truncated
        if done.any():
            self.final_obs[done] = self.obs[done]
            self._reset_worlds(done)
        return done

    def step(self, actions: NDArray[np.int8]) -> NDArray[np.bool_]:
        """`advance`, then `autoreset`; which worlds ended an episode, bool `(W,)`.

        Raises:
            EchelonError: the actions have another shape or are no moves.
        """
        self.advance(self._checked(actions))
        return self.autoreset()

    def _checked(self, actions: NDArray[Any]) -> NDArray[np.int8]:
        actions = np.asarray(actions)
        shape = (self.num_envs, self.num_agents)
        if actions.shape != shape or actions.dtype.kind not in "iu" or actions.min() < 0 or actions.max() > 4:
            raise EchelonError(f"actions must be ({self.num_envs}, {self.num_agents}) integers from 0 to 4")
        return actions.astype(np.int8, copy=False)

    def states(self, out: NDArray[np.int8], rows: NDArray[np.int64] | None = None) -> NDArray[np.int8]:
        """Write the centralised state of the worlds `rows` (default: all) into `out`.

        Args:
            out: int8 `(len(rows), state_size)`: time left; each agent's row and column from the map's centre,
                load flag and way to the load's goal; each task's status (one-hot), cell and goal. Multiplied
                by `state_scale` (float32 `(state_size,)`) it is about ±1.
        """
        which = np.arange(self.num_envs) if rows is None else rows
        kernels.write_states(
            out, which, self.pos, self.carrying, self.task_status, self.task_cell, self.task_goal,
            self.steps, self.limit, self.row_of, self.col_of, self.height // 2, self.width // 2,
            len(self.status_words),
        )  # fmt: skip
        return out

    def subgoals_open(
        self, kind: NDArray[np.int8], task: NDArray[np.int16], out: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Where a subgoal can still be done by the agent that has it; a world may add rules of its own.

        It can while its task has the status that its kind needs (`kind_status`) and, for the kinds of
        `kind_holder`, while the agent carries the task. A subgoal without a task is always open.

        Args:
            kind: int8 `(W, A)`, a `SubgoalKind`, or negative for none.
            task: int16 `(W, A)`, task id or -1.
            out: bool `(W, A)`, written.
        """
        kernels.open_subgoals(kind, task, self.task_status, self.carrying, self._kind_status, self._kind_holder, out)
        return out

    @property
    def goals(self) -> int:
        """The most task reward that an episode can bring."""
        return self.num_tasks

    def outlook(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What doing each task brings, as far as the world's planners may know it; a world may say more than this.

        Args:
            rows: int64 `(n,)`, the worlds.

        Returns:
            after: int64 `(n, T)`, steps of work that come with a task once an agent is there, on the straight way
                (0 here); gain: int64 `(n, T)`, how much there is to be had (1 here), by the world's own measure.
        """
        shape = (len(rows), self.num_tasks)
        return np.zeros(shape, np.int64), np.ones(shape, np.int64)

    def _straight(self, here: NDArray[Any], there: NDArray[Any]) -> NDArray[np.int64]:
        """Manhattan distances between cells, of arrays that go together."""
        rows, cols = self.row_of.astype(np.int64), self.col_of.astype(np.int64)
        return np.asarray(np.abs(rows[here] - rows[there]) + np.abs(cols[here] - cols[there]))

    def _geometry(self) -> tuple[Any, ...]:
        return (self.offsets, self.row_of, self.col_of, self.view, self.stride, self.limit)

    def _known_tasks(self) -> NDArray[np.bool_]:
        """The tasks that agents see as things to go to, bool `(W, T)`."""
        return np.asarray(self.task_status == 0)

    def nearest_goal(self) -> NDArray[np.int32]:
        """Where each agent would go by what it sees: its load's goal, else the nearest known task (Manhattan).

        Returns:
            int32 `(W, A)`, cells, or -1 where there is nothing to go to.
        """
        way = self._straight(self.pos[:, :, None], self.task_cell[:, None])
        way = np.where(self._known_tasks()[:, None], way, np.iinfo(np.int32).max)
        nearest = np.take_along_axis(self.task_cell, way.argmin(2), 1)
        nearest[way.min(2) == np.iinfo(np.int32).max] = -1
        return np.where(self.load_goal >= 0, self.load_goal, nearest)

    def _observe(self, which: NDArray[np.bool_]) -> None:
        """Write the observations and masks of the worlds `which`, all but the world's own features."""
        kernels.observe_agents(
            which, self.grid, self.pos, self.last_action, self.bumped, self.steps, self.load_goal, self.obs_buffer,
            self.action_mask, self._geometry(),
        )  # fmt: skip
        start = self._own_start + OWN_FEATURES + WAY_FEATURES
        kernels.observe_tasks(
            which, self.pos, self._known_tasks(), self.task_cell,
            self.obs_buffer[:, :, start : start + WAY_FEATURES * NEAREST_TASKS], self._geometry(), self._scratch,
        )  # fmt: skip

    # -- cells ---------------------------------------------------------------------------------

    def cell_index(self, row: int, col: int) -> int:
        """(row, col) as a flat index of the padded grid."""
        return (row + self.view) * self.stride + col + self.view

    def row_col(self, cell: int) -> tuple[int, int]:
        """A flat index of the padded grid as (row, col)."""
        return int(self.row_of[cell]), int(self.col_of[cell])

    def walls(self, i: int) -> NDArray[np.bool_]:
        """The walls of world `i`, bool `(height, width)`, a read-only copy."""
        grid = self.grid[i].reshape(-1, self.stride)
        inside = grid[self.view : self.view + self.height, self.view : self.view + self.width]
        walls: NDArray[np.bool_] = (inside & kernels.WALL).astype(bool)
        walls.flags.writeable = False
        return walls

    def agent_views(self, i: int) -> tuple[AgentView, ...]:
        """The agents of world `i`."""
        return tuple(
            AgentView(a, self.row_col(self.pos[i, a]), int(load) if (load := self.carrying[i, a]) >= 0 else None)
            for a in range(self.num_agents)
        )

    # -- the whole state, for checkpoints --------------------------------------------------------

    _shared_state: ClassVar[tuple[str, ...]] = (
        "keys", "counters", "grid", "pos", "carrying", "load_goal", "last_action", "bumped", "steps",
        "task_status", "task_cell", "task_goal", "task_done_by", "new_info", "reward", "terminated", "truncated",
        "collisions", "action_mask", "obs_buffer", "final_obs",
    )  # fmt: skip

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Everything that decides what happens next, as copies."""
        return {name: getattr(self, name).copy() for name in (*self._shared_state, *self._own_state)}

    def load_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Put back what `state_dict` gave.

        Raises:
            EchelonError: the state belongs to an environment of another shape.
        """
        names = (*self._shared_state, *self._own_state)
        # All are looked at before the first is written, so that a misfit leaves the worlds as they were.
        for name in names:
            own = getattr(self, name)
            if name not in state or state[name].shape != own.shape or state[name].dtype != own.dtype:
                raise EchelonError(f"the saved state of {name!r} doesn't fit this {self.name} environment")
        for name in names:
            getattr(self, name)[...] = state[name]

    # -- checks --------------------------------------------------------------------------------

    def _sides(self) -> tuple[int, int]:
        if self.map_file is not None:
            return self.map_file.height, self.map_file.width
        config = self.config
        return (
            config.size if config.height is None else config.height,
            config.size if config.width is None else config.width,
        )

    def _check_config(self) -> None:
        c = self.config
        if self.map_file is None:
            for name, side in (("height", self.height), ("width", self.width)):
                what = "size" if getattr(c, name) is None else name
                _check(5 <= side <= MAX_SIDE, what, side, f"5 to {MAX_SIDE}")
        _check(1 <= c.num_agents <= MAX_AGENTS, "num_agents", c.num_agents, f"1 to {MAX_AGENTS}")
        _check(c.limit is None or c.limit >= 1, "limit", c.limit, "at least 1")
        _check(0 <= c.density <= 0.4, "density", c.density, "0 to 0.4")
        _check(1 <= c.aisle <= 16, "aisle", c.aisle, "1 to 16")
        _check(1 <= c.view <= 5, "view", c.view, "1 to 5")
        _check(c.layout in ("shelves", "random", "open"), "layout", c.layout, "shelves, random or open")

    def _check_room(self) -> None:
        need = self._cells_needed()
        if self.map_file is None:
            density = 0.0 if self.config.layout == "open" else self.config.density
            have = int(self.height * self.width * (1 - density)) * 3 // 4
            if have < need:
                raise EchelonError(
                    f"env.size: a map of {self.height}x{self.width} has room for about {have} things, but "
                    f"{self.num_agents} agents and {self.num_tasks} tasks need {need} free cells: "
                    f"take a larger map or fewer of them"
                )
            return
        template = self._template()
        size = kernels.keep_largest_component(
            template, self.stride, np.zeros(self.num_cells, np.int32), np.zeros(self.num_cells, np.int32)
        )
        if size < need:
            raise EchelonError(
                f"map {self.config.map}: its largest connected region has {size} cells, but {self.num_agents} "
                f"agents and {self.num_tasks} tasks need {need}"
            )

    def _template(self) -> NDArray[np.uint8]:
        """The map file as a padded grid (all walls where there is no file).

        What no path joins to the marked cells is wall: the marks choose the region that is played in.
        """
        grid = np.full((self.height + 2 * self.view, self.stride), kernels.WALL, np.uint8)
        if self.map_file is not None:
            inside = grid[self.view : self.view + self.height, self.view : self.view + self.width]
            inside[~self.map_file.walls] = 0
        cells = grid.reshape(-1)
        marked = [cell for mark in "APZ" for cell in self._marked(mark)]
        if marked:
            field = np.zeros(self.num_cells, np.uint16)
            queue = np.zeros(self.num_cells, np.int32)
            kernels.distance_field(field, cells, marked[0], self.stride, queue)
            cells[field == kernels.UNREACHABLE] = kernels.WALL
        return cells

    def _marked(self, mark: str) -> NDArray[np.int32]:
        cells = self.map_file.marks.get(mark, []) if self.map_file is not None else []
        return np.array([self.cell_index(r, c) for r, c in cells], np.int32)

    def _layout_args(self) -> tuple[Any, ...]:
        """What `draw_map` needs to know of the config."""
        code = {"open": kernels.OPEN, "shelves": kernels.SHELVES, "random": kernels.RANDOM}[self.config.layout]
        return (
            self._template(), self.map_file is not None, self.height, self.width, self.view, self.stride, code,
            float(self.config.density), self.config.aisle, self._cells_needed(),
        )  # fmt: skip

    def _state_scale(self) -> NDArray[np.float32]:
        agent = [1 / 16, 1 / 16, 1.0, 1 / 16, 1 / 16]
        task = [*[1.0] * len(self.status_words), *[1 / 16] * 4]
        return np.array([1 / 127, *agent * self.num_agents, *task * self.num_tasks], np.float32)

    def _obs_scale(self) -> NDArray[np.float32]:
        window = [1.0] * (2 * (2 * self.view + 1) ** 2)
        own = [1 / 127, *[1.0] * (OWN_FEATURES - 1)]
        way = [1.0, 1.0, 1.0, 1 / 16, 1 / 16]
        return np.array([*window, *own, *way, *way * NEAREST_TASKS, *self.extra_scale], np.float32)
