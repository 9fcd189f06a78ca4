"""Subgoals in flight: the feasibility chain, intrinsic rewards, replan triggers and what executors see.

Knows grid worlds only by their contract (`envs.base`), and no planner: planners are handed a `PlanRequest` and
answer with a `Plan`; nothing that a planner says is trusted before `SubgoalTracker.check` has passed it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from echelon import _subgoal_kernels as kernels
from echelon.envs.base import Candidates, GridEnv, Scene, Subgoal, SubgoalKind, subgoal_text
from echelon.envs.kernels import UNREACHABLE, WALL
from echelon.errors import EchelonError, unknown_name
from echelon.rng import spawn_keys

__all__ = [
    "BESIDE",
    "DIRECTIONS",
    "EXCLUSIVE",
    "FEATURES",
    "PAST",
    "Counts",
    "GridShape",
    "Outcome",
    "Past",
    "Plan",
    "PlanRequest",
    "Sight",
    "Subgoal",
    "SubgoalConfig",
    "SubgoalKind",
    "SubgoalTracker",
    "Verdict",
]

PAST = 4
"""How many of an agent's last subgoals are remembered."""

FEATURES = 20
"""What an executor sees of its subgoal, appended to its observation; see `SubgoalTracker`."""

DIRECTIONS = ("north", "north-east", "east", "south-east", "south", "south-west", "west", "north-west")
"""The eight directions of the candidate space `direction`, in the order of its candidates."""
Sight = Literal["cells", "others", "walls", "closed", "past", "scene", "time", "keys"]
"""What a planner looks at, beside the kinds and path lengths of candidates and which of them are one task:

- `cells`: where its robots are and where candidates lie;
- `others`: where the robots are that aren't asked for (with `cells`);
- `walls`: the map; includes `cells`;
- `closed`: candidates that can't be given now, because another has the task or no path leads there;
- `past`: the last subgoals and their outcomes;
- `scene`: the structured view; includes all of the above but `past`, and shows step 0 unless `time` is seen too;
- `time`: the step in the scene;
- `keys`: the request's random bits (no two questions are then ever the same).
"""

# A task of these kinds is done by one agent; two with the same one would get in each other's way.
EXCLUSIVE = np.array([k in (SubgoalKind.REGION, SubgoalKind.FETCH, SubgoalKind.REPAIR) for k in SubgoalKind])
"""Kinds whose task may be given to one agent only, bool, by kind."""


class Outcome(IntEnum):
    """What became of an agent's subgoal in the last step."""

    ACTIVE = 0
    REACHED = 1
    FAILED = 2
    TIMED_OUT = 3


class Verdict(IntEnum):
    """What the feasibility chain says of a proposed subgoal, in the order in which it asks."""

    ACCEPTED = 0
    FORM = 1
    ILLEGAL = 2
    UNREACHABLE = 3
    DUPLICATE = 4

    @property
    def reason(self) -> str:
        """The reason, as it is told back to a planner."""
        return (
            "accepted",
            "it names no subgoal of this scene",
            "the robot can't do that now",
            "no path leads there",
            "another robot already has this task",
        )[self]


@dataclass(frozen=True)
class SubgoalConfig:
    """When agents get new subgoals, and what reaching them is worth. All defaults are our choice."""

    space: Literal["task", "cell", "region", "direction"] = "task"
    """Candidates offered to planners: the world's tasks, random free cells, a 4x4 grid of regions, 8 directions."""
    every: int = 0
    """Replan every so many steps, besides the triggers below; 0: never by time alone."""
    scope: Literal["agent", "team"] = "agent"
    """Who is replanned when one agent needs it: that agent alone, or the whole team."""
    on_reached: bool = True
    """Replan when the subgoal is reached."""
    on_failed: bool = True
    """Replan when the subgoal can no longer be done (another took the task)."""
    on_timeout: bool = True
    """Replan when the deadline has passed."""
    on_event: bool = True
    """Replan the team when the world shows something new (a target comes into sight)."""
    review: int = 0
    """Ask a planner that can tell, every so many steps of a subgoal, whether to keep it or choose anew; 0: never."""
    slack: float = 3.0
    """A subgoal's deadline, in path lengths to its target, plus 8 steps."""
    wait: int = 4
    """Steps that a wait lasts."""
    retries: int = 2
    """How often a rejected subgoal is sent back to the planner with the reason before the fallback decides."""
    intrinsic: Literal["distance", "potential", "reached"] = "potential"
    """Intrinsic reward: the paper's Eq. 1, -beta * distance + 1[reached]; potential-based on path lengths; or
    1[reached] alone."""
    beta: float = 0.05
    """Weight of the distance (per cell) in the intrinsic reward."""
    task_weight: float = 0.0
    """Weight of the environment's task reward in an executor's reward."""
    intrinsic_weight: float = 1.0
    """Weight of the intrinsic reward in an executor's reward."""
    guidance: Literal["vector", "route"] = "vector"
    """What an executor is told of the way: direction and distance, or also which moves shorten the path."""

    def __post_init__(self) -> None:
        for name, good, need in (
            ("every", self.every >= 0, "at least 0"),
            ("review", self.review >= 0, "at least 0"),
            ("slack", 1 <= self.slack <= 10_000, "1 to 10000"),
            ("wait", self.wait >= 1, "at least 1"),
            ("retries", self.retries >= 0, "at least 0"),
            ("beta", self.beta >= 0, "at least 0"),
        ):
            if not good:
                raise EchelonError(f"subgoals.{name} is {getattr(self, name)}: it must be {need}")
        for name, hint in get_type_hints(SubgoalConfig).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                raise unknown_name(f"subgoals.{name}", str(getattr(self, name)), get_args(hint))


@dataclass(frozen=True)
class Past:
    """One of an agent's earlier subgoals in this episode.

    Attributes:
        kind: what was asked; target: (row, col); task: its id or None.
        outcome: what became of it; `ACTIVE` if another took its place while it was under way.
        steps: how long it was in flight.
        text: the subgoal in words.
    """

    kind: SubgoalKind
    target: tuple[int, int]
    task: int | None
    outcome: Outcome
    steps: int
    text: str


@dataclass(frozen=True)
class GridShape:
    """How cells of a padded grid are numbered: a map of `height` rows and `width` columns in a border of `view`."""

    height: int
    width: int
    view: int

    @property
    def stride(self) -> int:
        """Cells in a row of the padded grid."""
        return self.width + 2 * self.view

    @property
    def num_cells(self) -> int:
        """Cells of the padded grid."""
        return (self.height + 2 * self.view) * self.stride

    def row_col(self, cell: int) -> tuple[int, int]:
        """A flat index of the padded grid as (row, col)."""
        row, col = divmod(int(cell), self.stride)
        return row - self.view, col - self.view

    def cell_index(self, row: int, col: int) -> int:
        """(row, col) as a flat index of the padded grid."""
        return (row + self.view) * self.stride + col + self.view


@dataclass(frozen=True)
class PlanRequest:
    """What a planner is asked: some worlds, as arrays of n rows, one a world.

    Attributes:
        rows: int64 `(n,)`, the worlds' indices.
        need: bool `(n, A)`, the agents that want a subgoal.
        candidates: what makes sense for each agent, arrays `(n, A, C)`.
        distance: uint16 `(n, A, C)`, path lengths from agent to candidate, `UNREACHABLE` where none leads or
            where there is no candidate; in the space `direction` with the way on to the agent's nearest goal. None
            unless the planner's `needs_distance` is true.
        taken: bool `(n, T)`, tasks that agents who aren't asked are busy with.
        pos: int32 `(n, A)`, cells.
        keys: uint64 `(n, A)`, fresh random bits for each agent, independent of the batch.
        rejected: int8 `(n, A)`, the `Verdict` on this agent's last proposal in this round, 0 at first.
        refused: bool `(n, A, C)`, candidates that were proposed in this round and rejected.
        walls: gives bool `(n, cells)`, true where nobody can go.
        scene: the structured view of a world, built when asked for.
        text: a candidate in words: (row, agent, candidate, *, brief=False) -> str.
        grid: how cells are numbered.
        outlook: gives `(after, gain)`, int64 `(n, T)` each: what comes with a task, and what there is to be had, as
            `GridEnv.outlook`; a gain that agents who aren't asked are after already is taken off.
        past: (row, agent) -> the agent's last subgoals of this episode, the newest last, at most `PAST`.
        episode: int64 `(n,)`, how many episodes each world had before this one.
        tick: steps that every world has made so far; steps: environment steps so far, counted over all worlds.
    """

    rows: NDArray[np.int64]
    need: NDArray[np.bool_]
    candidates: Candidates
    distance: NDArray[np.uint16] | None
    taken: NDArray[np.bool_]
    pos: NDArray[np.int32]
    keys: NDArray[np.uint64]
    rejected: NDArray[np.int8]
    refused: NDArray[np.bool_]
    walls: Callable[[], NDArray[np.bool_]]
    scene: Callable[[int], Scene]
    text: Callable[..., str]
    grid: GridShape
    outlook: Callable[[], tuple[NDArray[np.int64], NDArray[np.int64]]]
    past: Callable[[int, int], list[Past]]
    episode: NDArray[np.int64]
    tick: int = 0
    steps: int = 0

    def row_col(self, cell: int) -> tuple[int, int]:
        """A flat cell as (row, col)."""
        return self.grid.row_col(cell)

    def cell_index(self, row: int, col: int) -> int:
        """(row, col) as a flat cell."""
        return self.grid.cell_index(row, col)

    def where(self, i: int, a: int) -> tuple[int, int]:
        """The cell (row, col) of agent `a` in row `i`."""
        return self.row_col(int(self.pos[i, a]))

    @staticmethod
    def is_exclusive(kind: int) -> bool:
        """Whether a task of this kind may be given to one agent only."""
        return bool(EXCLUSIVE[kind])


@dataclass
class Plan:
    """A planner's answer: subgoals as arrays `(n, A)`, read only where `PlanRequest.need` is true.

    Attributes:
        kind: int8, a `SubgoalKind`; anything else is a rejected form.
        cell: int32, the target as a flat index of the padded grid.
        task: int16, task id or -1.
        probability: float32 `(n, A, C)`, the planner's probability of each candidate, where it has any: 0 for
            candidates that it wasn't asked about, all 0 for agents that it wasn't asked about.
        told: bool `(n,)`, rows that the model was asked about in words worth keeping, or None.
        counts: what of `Counts` a record tells of how its plans came about; empty for everybody else.
        notes: what a person wants to know of how a row's plan came about, as a JSON-able mapping, or None. Called at
            once or never, and only for rows that are recorded: it may be slow.
    """

    kind: NDArray[np.int8]
    cell: NDArray[np.int32]
    task: NDArray[np.int16]
    probability: NDArray[np.float32] | None = None
    told: NDArray[np.bool_] | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    notes: Callable[[int], dict[str, Any]] | None = None

    @classmethod
    def empty(cls, request: PlanRequest) -> Plan:
        """A plan in which everybody waits where they are."""
        shape = request.need.shape
        return cls(np.zeros(shape, np.int8), request.pos.copy(), np.full(shape, -1, np.int16))

    @classmethod
    def chosen(cls, request: PlanRequest, choice: NDArray[np.int64]) -> Plan:
        """The plan that gives each agent the candidate `choice` (int64 `(n, A)`; -1: wait)."""
        plan = cls.empty(request)
        i, a = np.nonzero(choice >= 0)
        c = choice[i, a]
        plan.kind[i, a] = request.candidates.kind[i, a, c]
        plan.cell[i, a] = request.candidates.cell[i, a, c]
        plan.task[i, a] = request.candidates.task[i, a, c]
        return plan


@dataclass
class Counts:
    """What happened to subgoals since the counts were last taken.

    The last ones are of plans made elsewhere: `provisional` subgoals were given until the model's answer comes; of the
    answers, `late` were used (the same subgoal, or one in its place), `late_outdated` came for agents that had moved
    on, `late_refused` no longer fitted the scene; `late_steps` went by between question and use, together; `skipped`
    are agents for whom the model wasn't asked, since it was busy.
    """

    given: int = 0
    reached: int = 0
    failed: int = 0
    timed_out: int = 0
    retried: int = 0
    fallback: int = 0
    provisional: int = 0
    skipped: int = 0
    late: int = 0
    late_outdated: int = 0
    late_refused: int = 0
    late_steps: int = 0
    rejected: dict[str, int] = field(default_factory=lambda: {v.name.lower(): 0 for v in Verdict if v})

    def add(self, told: Mapping[str, int]) -> None:
        """Add counts by name; `rejected_<verdict>` for those of rejections. Unknown names are left out."""
        for name, count in told.items():
            verdict = name.removeprefix("rejected_")
            if verdict != name and verdict in self.rejected:
                self.rejected[verdict] += count
            elif isinstance(vars(self).get(name), int):
                setattr(self, name, getattr(self, name) + count)


BESIDE = ("provisional", "skipped", "late", "late_outdated", "late_refused", "late_steps")
"""Counts that only plans made beside the simulation have."""


class SubgoalTracker:
    """The subgoals in flight of a batch of worlds.

    Writes what executors see of their subgoals into the last `FEATURES` columns of `env.obs_buffer`, int8: kind
    (one-hot, 8); present, sign and size of the straight way (5); path length; time left (127 to 0); whether
    north, east, south, west shorten the path (±1, 0; all 0 unless `guidance` is "route"); one spare zero.
    `scale` (float32 `(FEATURES,)`) brings them to about ±1.

    Attributes (W worlds, A agents):
        kind: int8 `(W, A)`, -1 where an agent has no subgoal; cell: int32, task: int16, age, deadline: int32.
        field: uint16 `(W, A, cells)`, path lengths to each agent's target.
        outcome: int8 `(W, A)`, an `Outcome`, of the last step.
        reward: float32 `(W, A)`, the intrinsic reward of the last step.
        ended: bool `(W, A)`, whose subgoal ended with the last step: reached, failed or too late, and to be
            replaced.
        need: bool `(W, A)`, who wants a new subgoal.
        past: int32 `(W, A, PAST, 5)`, kind (-1: none), cell, task, outcome and steps of the last subgoals, newest
            last.
        tick: int64 `(W,)`, steps made; episode: int64 `(W,)`, episodes before the present one.
    """

    scale = np.array([1] * 8 + [1, 1, 1, 1 / 16, 1 / 16] + [1 / 32, 1 / 127] + [1] * 4 + [1], np.float32)

    def __init__(self, env: GridEnv[Any], config: SubgoalConfig, gamma: float, seed: int) -> None:
        """Track subgoals in `env`, which must have been built with `extra_features=FEATURES`.

        Args:
            env: the worlds.
            config: triggers and rewards.
            gamma: the executor's discount, used by the potential-based reward.
            seed: root seed of what planners draw.

        Raises:
            EchelonError: the environment has no room for the features.
        """
        W, A = env.num_envs, env.num_agents
        if env.obs_buffer.shape[2] != env.obs_size + FEATURES:
            raise EchelonError("the environment must be built with extra_features=subgoals.FEATURES")
        self.env, self.config, self.gamma = env, config, gamma
        self.kind = np.full((W, A), -1, np.int8)
        self.cell = np.zeros((W, A), np.int32)
        self.task = np.full((W, A), -1, np.int16)
        self.age = np.zeros((W, A), np.int32)
        self.deadline = np.ones((W, A), np.int32)
        self.field = np.zeros((W, A, env.num_cells), np.uint16)
        self.outcome = np.zeros((W, A), np.int8)
        self.reward = np.zeros((W, A), np.float32)
        self.need = np.ones((W, A), bool)
        self.keys = spawn_keys(seed, (1,), W)
        self.counters = np.zeros(W, np.uint64)
        self.past = np.full((W, A, PAST, 5), -1, np.int32)
        self.tick = np.zeros(W, np.int64)
        self.episode = np.zeros(W, np.int64)
        self.features = env.obs_buffer[:, :, env.obs_size :]
        self.counts = Counts()
        self.ended = np.zeros((W, A), bool)
        self._open = np.ones((W, A), bool)
        self._queue = np.zeros(env.num_cells, np.int32)
        self._every = np.ones(W, bool)
        self._before = env.pos.copy()

    # -- time passes ---------------------------------------------------------------------------

    def advance(self) -> None:
        """Judge the subgoals after `env.advance` (before `env.autoreset`): outcomes, rewards, features, needs."""
        env, c = self.env, self.config
        self.tick += 1
        env.subgoals_open(self.kind, self.task, self._open)
        last = self.outcome.copy()
        mode = {"distance": 0, "potential": 1, "reached": 2}[c.intrinsic]
        kernels.judge(
            self.kind, self.cell, self.task, self.age, self.deadline, self.field, self.outcome, self.reward,
            self.need, self._open, self.ended, env.pos, env.task_done_by, env.row_of, env.col_of, self._before, mode,
            c.beta, self.gamma, (c.on_reached, c.on_failed, c.on_timeout), c.every,
        )  # fmt: skip
        if c.on_event and env.new_info.any():
            self.need |= (env.new_info & ~(env.terminated | env.truncated))[:, None]
        if c.scope == "team":
            self.need |= self.need.any(1, keepdims=True)
        # A wait that is over has not failed at anything; what a switched-off trigger leaves in flight counts once.
        news = (self.kind > 0) & ((self.outcome != last) | (self.age == 1))
        counted = np.bincount(self.outcome[news], minlength=4)
        self.counts.reached += int(counted[Outcome.REACHED])
        self.counts.failed += int(counted[Outcome.FAILED])
        self.counts.timed_out += int(counted[Outcome.TIMED_OUT])
        self.write_features(self._every)

    def before(self) -> None:
        """Remember where everybody is: call before `env.advance`."""
        self._before[:] = self.env.pos

    def forget(self, which: NDArray[np.bool_]) -> None:
        """Drop the subgoals of worlds that begin a new episode (bool `(W,)`); everybody there needs one."""
        self.kind[which] = -1
        self.task[which] = -1
        self.need[which] = True
        self.past[which] = -1
        self.episode[which] += 1

    def write_features(self, which: NDArray[np.bool_]) -> None:
        """Write what executors see of their subgoals in the worlds `which` (bool `(W,)`)."""
        env = self.env
        kernels.write_features(
            which, self.features, self.kind, self.cell, self.age, self.deadline, self.field, env.grid, env.pos,
            env.row_of, env.col_of, env.offsets, self.config.guidance == "route",
        )  # fmt: skip

    # -- planning ------------------------------------------------------------------------------

    def request(
        self, rows: NDArray[np.int64], *, distance: bool, again: NDArray[np.bool_] | None = None
    ) -> PlanRequest:
        """What a planner is asked for the worlds `rows` (int64 `(n,)`), fresh random bits included.

        Args:
            rows: the worlds.
            distance: whether to measure the candidates' path lengths.
            again: bool `(n, A)`, for these agents instead of those that want a new subgoal, to check once more what
                was planned before: nothing is drawn, so that it changes nothing.
        """
        env = self.env
        need = self.need[rows] if again is None else again
        keys = np.zeros(need.shape, np.uint64)
        if again is None:
            kernels.draw(rows, self.keys, self.counters, keys)
        candidates = self.candidates(rows, keys)
        lengths = self._lengths(rows, need, candidates) if distance else None
        taken = np.zeros((len(rows), env.num_tasks), bool)
        # Who still goes for what is done already (`on_failed` off) keeps nobody from it: a carrier must deliver.
        env.subgoals_open(self.kind, self.task, self._open)
        i, a = np.nonzero(~need & (self.task[rows] >= 0) & self._open[rows])
        busy = EXCLUSIVE[self.kind[rows[i], a]]
        taken[i[busy], self.task[rows[i], a][busy]] = True
        shared = (rows, i[~busy], self.task[rows[i], a][~busy])
        return PlanRequest(
            rows, need, candidates, lengths, taken, env.pos[rows], keys, np.zeros(need.shape, np.int8),
            np.zeros(candidates.kind.shape, bool), lambda: (env.grid[rows] & WALL) != 0, env.scene,
            lambda i, a, c, brief=False: self.text(candidates, i, a, c, brief=brief),
            GridShape(env.height, env.width, env.view), lambda: self._outlook(*shared),
            lambda i, a: self.past_of(int(rows[i]), a),
            self.episode[rows], int(self.tick[0]), int(self.tick[0]) * env.num_envs,
        )  # fmt: skip

    def _outlook(
        self, rows: NDArray[np.int64], i: NDArray[np.int64], tasks: NDArray[np.int16]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The world's outlook; others are after the tasks (row, task) that several may share."""
        after, gain = self.env.outlook(rows)
        np.subtract.at(gain, (i, tasks), 1)
        return after, np.maximum(gain, 0)

    def past_of(self, world: int, agent: int) -> list[Past]:
        """The agent's last subgoals in this episode, the newest last."""
        found, entries = [], self.past[world, agent].tolist()
        if self.need[world, agent] and self.kind[world, agent] > SubgoalKind.WAIT:
            # What has just ended is put behind the others only when something takes its place.
            last = (self.kind, self.cell, self.task, self.outcome, self.age)
            entries = [*entries, [int(x[world, agent]) for x in last]][-PAST:]
        for kind, cell, task, outcome, steps in entries:
            if kind >= 0:
                k, target = SubgoalKind(kind), self.env.row_col(cell)
                text = subgoal_text(k, target, task)
                found.append(Past(k, target, task if task >= 0 else None, Outcome(outcome), steps, text))
        return found

    def distances(self, request: PlanRequest, which: NDArray[np.bool_]) -> NDArray[np.uint16]:
        """As `PlanRequest.distance`, for the agents `which` (bool `(n, A)`)."""
        return self._lengths(request.rows, which, request.candidates)

    def _lengths(self, rows: NDArray[np.int64], which: NDArray[np.bool_], candidates: Candidates) -> NDArray[np.uint16]:
        env = self.env
        lengths = np.full(candidates.kind.shape, UNREACHABLE, np.uint16)
        scratch = np.empty(env.num_cells, np.uint16)
        kernels.measure(
            rows, which, candidates.kind, candidates.cell, env.grid, env.pos, env.stride, lengths, scratch, self._queue
        )
        if self.config.space == "direction":
            # A direction is no end in itself: what counts is the way that begins with it.
            kernels.measure_onwards(
                rows, which, candidates.kind, candidates.cell, env.nearest_goal(), env.grid, env.stride, lengths,
                scratch, self._queue,
            )  # fmt: skip
        return lengths

    def candidates(self, rows: NDArray[np.int64], keys: NDArray[np.uint64]) -> Candidates:
        """The candidates of the configured space for the worlds `rows`; `keys` decide what is random."""
        env, space = self.env, self.config.space
        if space == "task":
            return env.candidate_arrays(rows)
        count = {"cell": 8, "region": 16, "direction": 8}[space]
        shape = (len(rows), env.num_agents, count)
        kind, cell = np.full(shape, -1, np.int8), np.zeros(shape, np.int32)
        scratch = np.empty(env.num_cells, np.int32)
        if space == "cell":
            kernels.cell_candidates(rows, env.grid, keys, kind, cell, scratch)
        elif space == "region":
            kernels.region_candidates(rows, env.grid, env.height, env.width, env.view, env.stride, kind, cell)
        else:
            kernels.direction_candidates(
                rows, env.grid, env.pos, env.row_of, env.col_of, env.height, env.width, env.view, env.stride, kind, cell
            )
        return Candidates(kind, cell, np.full(shape, -1, np.int16))

    def text(self, candidates: Candidates, i: int, a: int, c: int, *, brief: bool = False) -> str:
        """A candidate in words."""
        kind, cell, task = (int(x[i, a, c]) for x in (candidates.kind, candidates.cell, candidates.task))
        return subgoal_text(SubgoalKind(kind), self.env.row_col(cell), task, brief=brief)

    def check(self, request: PlanRequest, plan: Plan, todo: NDArray[np.bool_]) -> NDArray[np.int8]:
        """The feasibility chain: form, legality, reachability, no two agents with one task.

        Args:
            request: what was asked.
            plan: what the planner answered.
            todo: bool `(n, A)`, the agents whose proposals are looked at; tasks of agents already settled in
                this round must be marked in `request.taken`.

        Returns:
            int8 `(n, A)`, a `Verdict` where `todo`; accepted agents' path fields are ready, and their tasks are
            marked as taken in `request.taken`.

        Raises:
            EchelonError: the plan isn't made of integer arrays `(n, A)`.
        """
        env = self.env
        for name in ("kind", "cell", "task"):
            x = getattr(plan, name)
            if x.shape != todo.shape or x.dtype.kind not in "iu":
                raise EchelonError(f"a planner's {name} is {x.dtype} {x.shape}: it must be integers {todo.shape}")
        verdict = np.zeros(todo.shape, np.int8)
        kernels.check(
            request.rows, todo, plan.kind, plan.cell, plan.task, request.candidates.kind, request.candidates.cell,
            request.candidates.task, request.taken, env.grid, env.pos, env.stride, self.field, verdict, self._queue,
            EXCLUSIVE,
        )  # fmt: skip
        for v, n in enumerate(np.bincount(verdict[todo], minlength=len(Verdict))):
            if v:
                self.counts.rejected[Verdict(v).name.lower()] += int(n)
        return verdict

    def assign(self, request: PlanRequest, plan: Plan, which: NDArray[np.bool_]) -> None:
        """Put accepted subgoals into flight for the agents `which` (bool `(n, A)`)."""
        i, a = np.nonzero(which)
        w = request.rows[i]
        self._remember(w, a)
        self.kind[w, a] = plan.kind[i, a]
        self.cell[w, a] = plan.cell[i, a]
        self.task[w, a] = plan.task[i, a]
        self.age[w, a] = 0
        length = self.field[w, a, self.env.pos[w, a]].astype(np.int32)
        wait = plan.kind[i, a] == SubgoalKind.WAIT
        self.deadline[w, a] = np.where(wait, self.config.wait, (self.config.slack * length).astype(np.int32) + 8)
        self.need[w, a] = False
        self.counts.given += len(i)

    def _remember(self, w: NDArray[np.int64], a: NDArray[np.int64]) -> None:
        """Put the subgoals of agents `a` of worlds `w`, which are about to be replaced, behind the earlier ones."""
        # A wait tells nobody anything.
        told = self.kind[w, a] > SubgoalKind.WAIT
        w, a = w[told], a[told]
        self.past[w, a, :-1] = self.past[w, a, 1:]
        last = (self.kind, self.cell, self.task, self.outcome, self.age)
        self.past[w, a, -1] = np.stack([x[w, a].astype(np.int32) for x in last], 1)

    def subgoal(self, world: int, agent: int) -> Subgoal | None:
        """The subgoal in flight of one agent, as an object."""
        kind = int(self.kind[world, agent])
        if kind < 0:
            return None
        target, task = self.env.row_col(int(self.cell[world, agent])), int(self.task[world, agent])
        text = subgoal_text(SubgoalKind(kind), target, task)
        left = int(self.deadline[world, agent] - self.age[world, agent])
        return Subgoal(SubgoalKind(kind), target, task if task >= 0 else None, text, left)

    # -- the whole state, for checkpoints --------------------------------------------------------

    _state = ("kind", "cell", "task", "age", "deadline", "outcome", "reward", "need", "keys", "counters",
              "past", "tick", "episode")  # fmt: skip

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Everything that decides what happens next, as copies."""
        return {name: getattr(self, name).copy() for name in self._state}

    def load_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Put back what `state_dict` gave; call it after the environment's own."""
        for name in self._state:
            if name in state:  # checkpoints of earlier versions know no `past`
                getattr(self, name)[...] = state[name]
        # The path fields follow from the targets and the walls: megabytes that no checkpoint has to hold.
        kernels.fill_fields(self.field, self.kind, self.cell, self.env.grid, self.env.stride, self._queue)
