"""The tasks `warehouse` and `search`: one language model a robot decides what that robot does next.

There is no central planner. A turn is a planning moment of the team: each robot is shown its own scene and what the
others told the team in the turn before, and replies with the letter of an option and, behind it, a short line to the
team. Classical executors (`echelon.pibt`) then carry the choices out up to the next moment at which somebody has a
choice. The reward is the planner's (see `growing`): the share of the task done less the share of the time that went by,
so that an episode's rewards add up to what was done less what it took. How it is asked and told is our choice.

Worlds are deterministic and fast, so nothing is kept between calls: what a joint reply is worth is found by playing its
episode from the start, all joint replies side by side.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from echelon import envs
from echelon.envs import GridConfig, SearchConfig, WarehouseConfig
from echelon.envs.base import SubgoalKind
from echelon.envs.kernels import UNREACHABLE
from echelon.errors import EchelonError, unknown_name
from echelon.executors import PIBTExecutor
from echelon.llm.prompts import LETTERS, clean
from echelon.planners.base import Planner, StatelessPlanner
from echelon.planners.hungarian import Hungarian
from echelon.rng import spawn_keys
from echelon.rollout import TeamWorlds
from echelon.subgoals import EXCLUSIVE, FEATURES, Plan, PlanRequest, SubgoalConfig, SubgoalTracker, Verdict
from echelon.tasks import AgentPrompt, Attempt, Scored, TaskSettings, Turn, register_task

__all__ = [
    "MESSAGE_CHARS",
    "Episode",
    "RobotTask",
    "RobotTeamSettings",
    "SearchTeamSettings",
    "WarehouseTeamSettings",
    "lessons",
    "read_reply",
    "teacher_replies",
]

MESSAGE_CHARS = 80
"""A message to the team is cut to so many characters."""

_READ = 400  # characters of a reply that are looked at
_WORLDS, _CELLS = 256, 1 << 25  # most worlds, and most path lengths of all their robots, that are played at a time
_PROMPTS = 4096  # joint histories whose prompts are remembered
_REPLY = re.compile(r"\s*([A-Z])(?![\w'’])[.):,]?[ \t]*(.*)")

# How a robot's options, its load and what it does are told, by kind: what prompts show, and what a teacher announces.
_NAMES = {SubgoalKind.FETCH: "P{}", SubgoalKind.DELIVER: "P{}", SubgoalKind.REGION: "R{}"}
_SHOWN = {SubgoalKind.DELIVER: "bring {}"}
_SAID = {SubgoalKind.FETCH: "I take {}", SubgoalKind.DELIVER: "I bring {}", SubgoalKind.REGION: "I take {}"}


@dataclass(frozen=True)
class RobotTeamSettings(TaskSettings):
    """What every team of robots can be told. All defaults are our choice."""

    rollout: ClassVar[Mapping[str, Any]] = {"branch": "first", "turns": 12, "max_tokens": 12}

    size: int = 10
    """Side of the square map, in cells (5 to 256)."""
    num_agents: int = 3
    """Robots in the team (1 to 64)."""
    density: float = 0.2
    """Share of the map that is wall (0 to 0.4), about."""
    limit: int | None = None
    """Time limit of an episode, in steps; default: a third more than a good team takes, about."""
    every: int = 0
    """Ask a robot anew every so many steps of a task of its own; 0: only when that is done, lost or too late."""
    options: int = 5
    """Most tasks that a robot is offered, the nearest ones (1 to 25); to wait is one more."""
    messages: bool = True
    """Whether robots hear what the others told the team in the turn before."""
    invalid_cost: float = 0.05
    """Taken from the reward for each reply that names no option: the robot waits, which costs time besides."""
    conflict_cost: float = 0.01
    """Taken from the reward for each robot that names what another has: it waits, which costs time besides."""
    train_items: int = 512
    """Episodes to train on."""
    eval_items: int = 64
    """Episodes kept for evaluation."""
    train_seed: int = 0
    """The root seed of the episodes to train on: the first of each world of an environment with this seed."""
    eval_seed: int = 1_000_003
    """The root seed of those kept for evaluation; not the same."""

    def __post_init__(self) -> None:
        for name, good, need in (
            ("every", self.every >= 0, "at least 0"),
            ("options", 1 <= self.options < len(LETTERS), f"1 to {len(LETTERS) - 1}"),
            ("invalid_cost", 0 <= self.invalid_cost < math.inf, "at least 0"),
            ("conflict_cost", 0 <= self.conflict_cost < math.inf, "at least 0"),
            ("train_items", self.train_items >= 1, "at least 1"),
            ("eval_items", self.eval_items >= 1, "at least 1"),
            ("train_seed", self.train_seed >= 0, "at least 0"),
            ("eval_seed", self.eval_seed >= 0 and self.eval_seed != self.train_seed, "at least 0, not train_seed"),
        ):
            if not good:
                raise EchelonError(f"env.{name} is {getattr(self, name)}: it must be {need}")

    def world(self) -> GridConfig:
        """The settings of the grid world."""
        raise NotImplementedError


@dataclass(frozen=True)
class WarehouseTeamSettings(RobotTeamSettings):
    """Settings of the task `warehouse`."""

    num_packages: int = 6
    """Packages to deliver (1 to 64)."""
    num_zones: int = 2
    """Destination zones (1 to 7)."""
    layout: Literal["shelves", "random", "open"] = "shelves"
    """How maps look: blocks of shelves with aisles, single random walls, or no walls."""

    def world(self) -> WarehouseConfig:
        """The settings of the grid world."""
        limit = self.limit
        if limit is None and self.num_agents > 0:
            limit = -(-2 * self.size * max(self.num_packages, self.num_agents) // self.num_agents)
        return WarehouseConfig(
            size=self.size, num_agents=self.num_agents, limit=limit, layout=self.layout, density=self.density,
            num_packages=self.num_packages, num_zones=self.num_zones,
        )  # fmt: skip


@dataclass(frozen=True)
class SearchTeamSettings(RobotTeamSettings):
    """Settings of the task `search`."""

    num_targets: int = 6
    """Hidden targets (1 to 64)."""
    sensor: int = 2
    """Radius in which a robot sees, in cells (1 to 8), where no wall stands between."""
    regions: int = 3
    """The map is divided into regions x regions rectangles, of which robots choose (1 to 8)."""
    layout: Literal["shelves", "random", "open"] = "random"
    """How maps look: blocks of shelves with aisles, single random walls, or no walls."""

    def world(self) -> SearchConfig:
        """The settings of the grid world."""
        limit = self.limit
        if limit is None and self.num_agents > 0:
            swept = self.num_agents * (2 * max(self.sensor, 1) + 1)
            limit = max(2 * self.size, -(-3 * self.size**2 // swept))
        return SearchConfig(
            size=self.size, num_agents=self.num_agents, limit=limit, layout=self.layout, density=self.density,
            num_targets=self.num_targets, sensor=self.sensor, regions=self.regions,
        )  # fmt: skip


@dataclass(frozen=True)
class Episode:
    """An episode that was played to its end.

    Attributes:
        item: which one; success: whether all was done in time; steps: environment steps that it took.
        reward: the planner's return, what was done less the time that it took, as shares; costs of replies apart.
        turns: what was replied and what that was worth; empty where a planner played.
    """

    item: int
    success: bool
    steps: int
    reward: float
    turns: tuple[Turn, ...] = ()


def read_reply(text: str, options: int) -> tuple[int | None, str]:
    """What a robot's reply says: untrusted text, of which only the first line counts.

    Args:
        text: a capital letter by itself, then what the team is told.
        options: how many there are, named A, B, …

    Returns:
        The option's place, or None where the reply names none; and one clean line of at most `MESSAGE_CHARS`
        characters for the team, "" where the reply names no option.
    """
    found = _REPLY.match(text[:_READ])
    if found is None or LETTERS.index(found[1]) >= options:
        return None, ""
    message = (found[2].splitlines() or [""])[0]
    return LETTERS.index(found[1]), clean(message)[:MESSAGE_CHARS].rstrip()


@dataclass(frozen=True)
class _Option:
    """A candidate as a robot sees it; `name` is what the task is called, `length` the path to it in steps."""

    kind: SubgoalKind
    cell: int
    task: int
    length: int

    @property
    def name(self) -> str:
        return _NAMES[self.kind].format(self.task) if self.kind in _NAMES else "wait"

    @property
    def shown(self) -> str:
        if self.kind not in _NAMES:
            return self.name
        return f"{_SHOWN.get(self.kind, '{}').format(self.name)} {self.length}"


@dataclass(frozen=True)
class _View:
    """All that one robot is told.

    `load` is the package that it carries, or -1; `options` are in the order of their letters; `heard` is what each
    other robot (by index) told the team; `notice` is what came of this robot's last reply, or "".
    """

    robot: int
    place: tuple[int, int]
    load: int
    options: tuple[_Option, ...]
    heard: tuple[tuple[int, str], ...]
    notice: str


@dataclass
class _Moment:
    """A turn that begins: what each robot sees, and, as long as it is asked about, the request behind it."""

    views: list[_View]
    request: Callable[[], PlanRequest]


@dataclass
class _Result:
    """What came of a turn: of the whole task `progress` was done in `steps`, and which robots' replies failed."""

    replies: tuple[str, ...] = ()
    progress: float = 0.0
    steps: int = 0
    invalid: list[int] = field(default_factory=list)
    conflicts: list[tuple[int, str]] = field(default_factory=list)


@dataclass
class _Course:
    """An episode as far as it was played: its turns, what was said in the last one, and where it stopped.

    `results` has one entry a turn; `stopped` is the moment at which nobody had a reply, None where the episode ended.
    """

    item: int
    script: tuple[tuple[str, ...], ...] = ()
    results: list[_Result] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    stopped: _Moment | None = None
    success: bool = False
    steps: int = 0


_Items = Sequence[int] | NDArray[np.int64]
_Key = tuple[int, tuple[tuple[str, ...], ...]]  # an item, and the replies of each of its turns so far
_Answer = Callable[[_Course, _Moment], Sequence[str] | None]  # replies of all robots; None: stop there


class RobotTask:
    """Robots with a language model each, in one of the grid worlds.

    At a moment everybody who needs something to do, or waits, has a choice: the nearest open tasks by path length, or
    to wait, in an order that tells nothing. Robots under way have one option, to go on, and may tell the team
    something. A robot isn't shown where the others are or what they do: what it knows of them they told it. So it may
    name what another has: then it waits for the next moment (4 steps at most); of two that name the same at once the
    first gets it. Who replies without naming an option waits, too. Where nobody has a choice (who carries a package
    brings it) nobody is asked.

    An item is an episode: item i of "train" is the first episode of world i of an environment with `train_seed`. All
    results are functions of the settings, the item and what was replied.

    Attributes:
        name: "warehouse" or "search".
        roles: "robot 0", "robot 1", …
        settings: how it is set up.
        limit: steps of an episode; goals: packages or targets.
    """

    _about: ClassVar[dict[str, str]] = {
        "warehouse": "Your team fetches packages (P, then steps).",
        "search": "Your team searches regions (R, then steps).",
    }

    def __init__(self, settings: RobotTeamSettings) -> None:
        """Set the task up.

        Raises:
            EchelonError: a setting is out of range, or the map has no room for what must be in it.
        """
        self.settings = settings
        self._config = settings.world()
        self.name = envs.env_name(self._config)
        self.roles = tuple(f"robot {a}" for a in range(settings.num_agents))
        world = envs.make(self.name, self._config)
        self.limit, self.goals = world.limit, world.goals
        self._most = max(1, min(_WORLDS, _CELLS // (world.num_agents * world.num_cells)))
        train, kept = settings.train_items, settings.eval_items
        self._split = {"train": np.arange(train), "eval": np.arange(train, train + kept)}
        # Of the world, the tracker and the executor of each item: what environments and `TeamWorlds` spawn themselves.
        seeds = ((settings.train_seed, train), (settings.eval_seed, kept))
        self._keys = [
            np.concatenate([spawn_keys(seed, (stream,), count) for seed, count in seeds]) for stream in (0, 1, 5)
        ]
        self._subgoals = SubgoalConfig(every=settings.every, on_event=False, retries=1)
        ask = "Reply with one letter" + (" and a short message to the team." if settings.messages else ".")
        self._system = f"{self._about[self.name]} {ask}"
        self._known: OrderedDict[_Key, list[AgentPrompt]] = OrderedDict()

    # -- as a team's task ----------------------------------------------------------------------

    def items(self, split: str) -> NDArray[np.int64]:
        """See `TeamTask.items`."""
        if split not in self._split:
            raise unknown_name("split", split, self._split)
        return self._split[split]

    def prompts(self, item: int, history: Sequence[Turn]) -> list[AgentPrompt]:
        """See `TeamTask.prompts`: what each robot sees at the next moment.

        Raises:
            EchelonError: no such item, or its episode is over.
        """
        key = (int(item), tuple(turn.completions for turn in history))
        if key not in self._known:
            (course,) = self._follow([key])
            if course.stopped is None:
                raise EchelonError(f"item {item} of {self.name} is over after {len(course.results)} turns")
            self._remember(key, course.stopped)
        return list(self._known[key])

    def score(self, attempts: Sequence[Attempt]) -> list[Scored]:
        """See `TeamTask.score`: what the robots do up to the next moment, or the end.

        The parts are `progress`, the share of the task done, and, negative, `time`, the share of the time limit that
        went by, `conflicts` and `invalid`, the costs of robots that named what another has and of unreadable replies.

        Raises:
            EchelonError: an attempt at an item that is over, or with too few or too many replies.
        """
        keys = [
            (int(attempt.item), (*(turn.completions for turn in attempt.history), attempt.completions))
            for attempt in attempts
        ]
        scored = []
        for key, course in zip(keys, self._follow(keys), strict=True):
            if len(course.results) < len(key[1]):
                raise EchelonError(f"item {key[0]} of {self.name} is over after {len(course.results)} turns")
            if course.stopped is not None:
                self._remember(key, course.stopped)
            scored.append(self._scored(course.results[-1], done=course.stopped is None))
        return scored

    def _follow(self, keys: Sequence[_Key]) -> list[_Course]:
        """Play each item with these replies of its turns, up to where they are used up."""

        def answer(course: _Course, moment: _Moment) -> Sequence[str] | None:
            turn = len(course.results)
            return course.script[turn] if turn < len(course.script) else None

        courses = [_Course(item, script) for item, script in keys]
        self._run(courses, lambda some: _Replies(self, some, answer))
        return courses

    def _remember(self, key: _Key, moment: _Moment) -> None:
        self._known[key] = self._prompts(moment)
        if len(self._known) > _PROMPTS:
            self._known.popitem(last=False)

    def _scored(self, result: _Result, *, done: bool) -> Scored:
        s = self.settings
        parts = {
            "progress": result.progress,
            "time": -result.steps / self.limit,
            # Not minus zero, which a log would show.
            "conflicts": 0.0 - s.conflict_cost * len(result.conflicts),
            "invalid": 0.0 - s.invalid_cost * len(result.invalid),
        }
        told = [f"Robot {a} named no option." for a in result.invalid]
        told += [f"Robot {a} named {name}, which is another robot's." for a, name in result.conflicts]
        return Scored(sum(parts.values()), parts, " ".join(told), done)

    def solved(self, scored: Sequence[Scored]) -> bool:
        """Whether the turns of an episode, from its first, did the whole task: what success rates count."""
        return math.isclose(sum(one.parts["progress"] for one in scored), 1.0, abs_tol=1e-9)

    def lessons(self, items: _Items) -> list[tuple[int, AgentPrompt, str]]:
        """See `Teaching.lessons`: after optimal assignment (Hungarian), as the function `lessons` has it."""
        return lessons(self, items)

    # -- whole episodes ------------------------------------------------------------------------

    def play(self, items: _Items, answer: Callable[[int, list[AgentPrompt]], Sequence[str]]) -> list[Episode]:
        """Play items to their ends.

        Args:
            items: which ones.
            answer: from an item and the prompts of all robots, their replies.
        """
        return self._episodes(items, lambda course, moment: answer(course.item, self._prompts(moment)))

    def play_planner(self, items: _Items, planner: Planner) -> list[Episode]:
        """Play items to their ends with a central planner, one of `echelon.planners`, which sees everything.

        Robots that need something to do are planned for together, whoever waits with them; all else is as in the task.
        """
        courses = [_Course(int(item), results=[_Result()]) for item in items]
        self._run(courses, lambda _: planner)
        return [self._episode(course) for course in courses]

    def _episodes(self, items: _Items, answer: _Answer) -> list[Episode]:
        courses = [_Course(int(item)) for item in items]
        self._run(courses, lambda some: _Replies(self, some, answer))
        return [self._episode(course) for course in courses]

    def _episode(self, course: _Course) -> Episode:
        turns = tuple(
            Turn(result.replies, self._scored(result, done=k + 1 == len(course.results)))
            for k, result in enumerate(course.results)
            if result.replies
        )
        reward = sum(result.progress - result.steps / self.limit for result in course.results)
        return Episode(course.item, course.success, course.steps, reward, turns)

    def _run(self, courses: list[_Course], planner: Callable[[list[_Course]], Planner]) -> None:
        """Play each course until its planner stops or its episode is over, as many as there is room for side by side.

        Args:
            courses: episodes that begin; written.
            planner: builds the planner of some of them.
        """
        for course in courses:
            if not 0 <= course.item < len(self._keys[0]):
                raise EchelonError(f"{self.name} has the items 0 to {len(self._keys[0]) - 1}, not {course.item}")
        for at in range(0, len(courses), self._most):
            some = courses[at : at + self._most]
            self._run_together(some, planner(some))

    def _run_together(self, courses: list[_Course], planner: Planner) -> None:
        items = [course.item for course in courses]
        env = envs.make(self.name, self._config, num_envs=len(items), extra_features=FEATURES)
        worlds = TeamWorlds(env, [(planner, np.ones(len(items), bool))], self._subgoals, gamma=1.0, seed=0)
        tracker = worlds.tracker
        assert tracker is not None
        if isinstance(planner, _Replies):
            planner.worlds, planner.tracker = worlds, tracker
        executor = PIBTExecutor(worlds)
        # What each item draws is its own, whichever world it is played in.
        for keys, own in zip((env.keys, tracker.keys, executor.keys), self._keys, strict=True):
            keys[:] = own[items]
        env.counters[:] = 0
        worlds.begin_together(1)
        running = worlds.active.copy()
        while running.any():
            worlds.advance(executor.act(worlds))
            for w in np.flatnonzero(running).tolist():
                course = courses[w]
                course.steps += 1
                course.results[-1].steps += 1
                course.results[-1].progress += float(env.reward[w]) / self.goals
                course.success = bool(env.terminated[w])
            worlds.active &= ~(env.terminated | env.truncated)
            # Who waits is asked again as soon as anybody is.
            tracker.need |= (tracker.kind == SubgoalKind.WAIT) & tracker.need.any(1, keepdims=True)
            worlds.settle()
            running &= worlds.active

    # -- what a robot is told ------------------------------------------------------------------

    def _prompts(self, moment: _Moment) -> list[AgentPrompt]:
        return [AgentPrompt(self._system, self._told(view)) for view in moment.views]

    def _told(self, view: _View) -> str:
        place = f"Robot {view.robot} of {len(self.roles)} at {view.place[0]},{view.place[1]}"
        if self.name == "warehouse":
            place += f", carrying P{view.load}" if view.load >= 0 else ", empty"
        lines = [f"{place}."]
        lines += [view.notice] if view.notice else []
        lines += [f"{robot}: {message}" for robot, message in view.heard]
        lines += [f"{LETTERS[k]}. {option.shown}" for k, option in enumerate(view.options)]
        return "\n".join(lines)


class _Replies(StatelessPlanner):
    """Plans as the robots' replies say; a round is a turn if somebody in it has a choice."""

    name = "replies"
    needs_distance = True
    worlds: TeamWorlds
    tracker: SubgoalTracker

    def __init__(self, task: RobotTask, courses: list[_Course], answer: _Answer) -> None:
        self.task, self.courses, self.answer = task, courses, answer

    def plan(self, request: PlanRequest) -> Plan:
        """What was replied; of what was refused, a wait for who named what another has, else nothing usable."""
        plan = Plan.empty(request)
        again = bool(request.rejected.any())
        for i in np.flatnonzero(request.need.any(1)).tolist():
            if again:
                self._refused(request, plan, i)
            else:
                self._round(request, plan, i)
        return plan

    def _round(self, request: PlanRequest, plan: Plan, i: int) -> None:
        assert request.distance is not None
        course, c = self.courses[int(request.rows[i])], request.candidates
        offered = (c.kind[i] > 0) & (request.distance[i] < UNREACHABLE)
        had = EXCLUSIVE[c.kind[i]] & (c.task[i] >= 0) & request.taken[i][c.task[i]]
        # Who isn't offered to wait has a single thing to do.
        free = request.need[i] & (c.kind[i] == SubgoalKind.WAIT).any(1)
        for a in np.flatnonzero(request.need[i] & ~free).tolist():
            _put(plan, i, a, _option(request, i, a, int(np.argmax(offered[a]))))
        # Every episode begins with a turn, whatever there is to choose.
        if course.results and not (offered & ~had)[free].any():
            return
        moment = self._moment(request, i, course, offered, free)
        replies = self.answer(course, moment)
        if replies is None:
            course.stopped = moment
            self.worlds.active[request.rows[i]] = False
            return
        if len(replies) != len(moment.views):
            raise EchelonError(
                f"item {course.item} of {self.task.name}: {len(replies)} replies of {len(moment.views)} robots"
            )
        result = _Result(tuple(replies))
        course.results.append(result)
        course.messages = []
        for view, reply in zip(moment.views, replies, strict=True):
            chosen, message = read_reply(reply, len(view.options))
            course.messages.append(message if self.task.settings.messages else "")
            if chosen is None:
                result.invalid.append(view.robot)
                # Anything better would be done with what the robot doesn't know.
                chosen = next((k for k, o in enumerate(view.options) if o.kind == SubgoalKind.WAIT), 0)
            if free[view.robot]:
                _put(plan, i, view.robot, view.options[chosen])

    def _refused(self, request: PlanRequest, plan: Plan, i: int) -> None:
        result = self.courses[int(request.rows[i])].results[-1]
        for a in np.flatnonzero(request.need[i]).tolist():
            if request.rejected[i, a] == Verdict.DUPLICATE:
                (k,) = np.flatnonzero(request.refused[i, a])[:1]
                result.conflicts.append((a, _option(request, i, a, int(k)).name))
            else:
                plan.kind[i, a] = -1

    def _moment(
        self, request: PlanRequest, i: int, course: _Course, offered: NDArray[np.bool_], free: NDArray[np.bool_]
    ) -> _Moment:
        """What each robot sees now."""
        assert request.distance is not None
        world, turn, settings = int(request.rows[i]), len(course.results), self.task.settings
        notices = {a: f"{name} is another robot's." for a, name in (course.results[-1].conflicts if turn else ())}
        shown = np.zeros_like(offered)
        views = []
        for a in range(len(self.task.roles)):
            if request.need[i, a]:
                near = np.argsort(np.where(offered[a], request.distance[i, a], UNREACHABLE), kind="stable")
                near = near[: min(settings.options, int(offered[a].sum()))]
                shown[a, near] = True
                options = [_option(request, i, a, int(k)) for k in near]
                if free[a] or not options:
                    options.append(_Option(SubgoalKind.WAIT, int(request.pos[i, a]), -1, 0))
                    key = np.random.SeedSequence(int(self.task._keys[0][course.item]), spawn_key=(turn, a))
                    order = np.random.Generator(np.random.Philox(key)).permutation(len(options))
                    options = [options[k] for k in order]
            else:
                options = [self._going_on(world, a)]
            load = int(self.worlds.env.carrying[world, a])
            heard = tuple((b, said) for b, said in enumerate(course.messages) if said and b != a)
            views.append(_View(a, request.where(i, a), load, tuple(options), heard, notices.get(a, "")))

        def narrowed() -> PlanRequest:
            # Checked once more, so that nothing is drawn; but what planners draw is this round's.
            rows, need = request.rows[i : i + 1], request.need[i : i + 1]
            one = self.tracker.request(rows, distance=True, again=need)
            kinds = np.where((one.candidates.kind > 0) & ~shown[None], -1, one.candidates.kind).astype(np.int8)
            candidates = replace(one.candidates, kind=kinds)
            return replace(one, candidates=candidates, keys=request.keys[i : i + 1])

        return _Moment(views, narrowed)

    def _going_on(self, world: int, a: int) -> _Option:
        tracker = self.tracker
        kind, cell = SubgoalKind(int(tracker.kind[world, a])), int(tracker.cell[world, a])
        length = int(tracker.field[world, a, self.worlds.env.pos[world, a]])
        return _Option(kind, cell, int(tracker.task[world, a]), length)


def _option(request: PlanRequest, i: int, a: int, k: int) -> _Option:
    assert request.distance is not None
    kind, cell, task, length = (
        int(x[i, a, k]) for x in (request.candidates.kind, request.candidates.cell, request.candidates.task,
                                  request.distance)
    )  # fmt: skip
    return _Option(SubgoalKind(kind), cell, task, length)


def _put(plan: Plan, i: int, a: int, option: _Option) -> None:
    plan.kind[i, a], plan.cell[i, a], plan.task[i, a] = option.kind, option.cell, option.task


# -- lessons ---------------------------------------------------------------------------------------


def _teach(task: RobotTask, moment: _Moment, teacher: Planner) -> list[str]:
    """What each robot would reply if all did as the teacher, who sees everything, and told the team."""
    request = moment.request()
    plan = teacher.plan(request)
    replies = []
    for view in moment.views:
        a, chosen = view.robot, 0
        if request.need[0, a]:
            wanted = (int(plan.kind[0, a]), int(plan.task[0, a]))
            found = [k for k, option in enumerate(view.options) if (option.kind, option.task) == wanted]
            # A robot that must go on isn't asked, whatever the teacher says.
            if not found and len(view.options) > 1:
                raise EchelonError(f"the planner {teacher.name} gave robot {a} what it isn't offered: it can't teach")
            chosen = found[0] if found else 0
        option = view.options[chosen]
        said = _SAID[option.kind].format(option.name) if option.kind in _SAID else "I wait"
        replies.append(f"{LETTERS[chosen]} {said}" if task.settings.messages else LETTERS[chosen])
    return replies


def teacher_replies(task: RobotTask, item: int, history: Sequence[Turn], teacher: Planner | None = None) -> list[str]:
    """What a teacher would reply for each robot: a letter and, where robots hear each other, what it takes.

    Args:
        task: what the team works on.
        item: which episode; history: its turns so far.
        teacher: who plans for the whole team, of what robots are offered; None: `Hungarian`.

    Raises:
        EchelonError: the episode is over, or the teacher gives robots what they can't name.
    """
    told: list[list[str]] = []

    def answer(course: _Course, moment: _Moment) -> Sequence[str] | None:
        if len(course.results) < len(course.script):
            return course.script[len(course.results)]
        told.append(_teach(task, moment, teacher or Hungarian()))
        return None

    course = _Course(int(item), tuple(turn.completions for turn in history))
    task._run([course], lambda some: _Replies(task, some, answer))
    if not told:
        raise EchelonError(f"item {item} of {task.name} is over after {len(course.results)} turns")
    return told[0]


def lessons(task: RobotTask, items: _Items, teacher: Planner | None = None) -> list[tuple[int, AgentPrompt, str]]:
    """What robots would have seen and replied, had they played these items as a teacher does.

    Args:
        task: what the team works on.
        items: episodes to play.
        teacher: see `teacher_replies`.

    Returns:
        (robot, prompt, reply), turn by turn, all items of a turn side by side.
    """
    found: list[tuple[int, AgentPrompt, str]] = []
    planner = teacher or Hungarian()

    def answer(course: _Course, moment: _Moment) -> Sequence[str]:
        replies = _teach(task, moment, planner)
        found.extend((a, *pair) for a, pair in enumerate(zip(task._prompts(moment), replies, strict=True)))
        return replies

    task._episodes(items, answer)
    return found


def _build(settings: Any) -> RobotTask:
    return RobotTask(settings)


register_task("warehouse", WarehouseTeamSettings, _build)
register_task("search", SearchTeamSettings, _build)
