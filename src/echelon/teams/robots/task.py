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
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from echelon import envs
from echelon.envs.base import SubgoalKind
from echelon.errors import EchelonError, unknown_name
from echelon.executors import PIBTExecutor
from echelon.llm.prompts import LETTERS
from echelon.planners.base import Planner
from echelon.planners.hungarian import Hungarian
from echelon.rng import spawn_keys
from echelon.rollout import TeamWorlds
from echelon.subgoals import FEATURES, SubgoalConfig
from echelon.tasks import AgentPrompt, Attempt, Scored, Turn, register_task
from echelon.teams.robots.replies import Answer, Course, Moment, RepliesPlanner, Result, View
from echelon.teams.robots.settings import RobotTeamSettings, SearchTeamSettings, WarehouseTeamSettings

__all__ = ["Episode", "RobotTask", "lessons", "teacher_replies"]

_WORLDS, _CELLS = 256, 1 << 25  # most worlds, and most path lengths of all their robots, that are played at a time
_PROMPTS = 4096  # joint histories whose prompts are remembered
# What a teacher has robots announce, by the kind of what they take.
_SAID = {SubgoalKind.FETCH: "I take {}", SubgoalKind.DELIVER: "I bring {}", SubgoalKind.REGION: "I take {}"}


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


_Items = Sequence[int] | NDArray[np.int64]
_Key = tuple[int, tuple[tuple[str, ...], ...]]  # an item, and the replies of each of its turns so far


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

    def _follow(self, keys: Sequence[_Key]) -> list[Course]:
        """Play each item with these replies of its turns, up to where they are used up."""

        def answer(course: Course, moment: Moment) -> Sequence[str] | None:
            turn = len(course.results)
            return course.script[turn] if turn < len(course.script) else None

        courses = [Course(item, script) for item, script in keys]
        self._run(courses, lambda some: self._replies(some, answer))
        return courses

    def _replies(self, courses: list[Course], answer: Answer) -> RepliesPlanner:
        return RepliesPlanner(self.name, self.settings, self._keys[0], courses, answer)

    def _remember(self, key: _Key, moment: Moment) -> None:
        self._known[key] = self._prompts(moment)
        if len(self._known) > _PROMPTS:
            self._known.popitem(last=False)

    def _scored(self, result: Result, *, done: bool) -> Scored:
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
        courses = [Course(int(item), results=[Result()]) for item in items]
        self._run(courses, lambda _: planner)
        return [self._episode(course) for course in courses]

    def _episodes(self, items: _Items, answer: Answer) -> list[Episode]:
        courses = [Course(int(item)) for item in items]
        self._run(courses, lambda some: self._replies(some, answer))
        return [self._episode(course) for course in courses]

    def _episode(self, course: Course) -> Episode:
        turns = tuple(
            Turn(result.replies, self._scored(result, done=k + 1 == len(course.results)))
            for k, result in enumerate(course.results)
            if result.replies
        )
        reward = sum(result.progress - result.steps / self.limit for result in course.results)
        return Episode(course.item, course.success, course.steps, reward, turns)

    def _run(self, courses: list[Course], planner: Callable[[list[Course]], Planner]) -> None:
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

    def _run_together(self, courses: list[Course], planner: Planner) -> None:
        items = [course.item for course in courses]
        env = envs.make(self.name, self._config, num_envs=len(items), extra_features=FEATURES)
        worlds = TeamWorlds(env, [(planner, np.ones(len(items), bool))], self._subgoals, gamma=1.0, seed=0)
        tracker = worlds.tracker
        assert tracker is not None
        if isinstance(planner, RepliesPlanner):
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

    def _prompts(self, moment: Moment) -> list[AgentPrompt]:
        return [AgentPrompt(self._system, self._told(view)) for view in moment.views]

    def _told(self, view: View) -> str:
        place = f"Robot {view.robot} of {len(self.roles)} at {view.place[0]},{view.place[1]}"
        if self.name == "warehouse":
            place += f", carrying P{view.load}" if view.load >= 0 else ", empty"
        lines = [f"{place}."]
        lines += [view.notice] if view.notice else []
        lines += [f"{robot}: {message}" for robot, message in view.heard]
        lines += [f"{LETTERS[k]}. {option.shown}" for k, option in enumerate(view.options)]
        return "\n".join(lines)


# -- lessons ---------------------------------------------------------------------------------------


def _teach(task: RobotTask, moment: Moment, teacher: Planner) -> list[str]:
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

    def answer(course: Course, moment: Moment) -> Sequence[str] | None:
        if len(course.results) < len(course.script):
            return course.script[len(course.results)]
        told.append(_teach(task, moment, teacher or Hungarian()))
        return None

    course = Course(int(item), tuple(turn.completions for turn in history))
    task._run([course], lambda some: task._replies(some, answer))
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

    def answer(course: Course, moment: Moment) -> Sequence[str]:
        replies = _teach(task, moment, planner)
        found.extend((a, *pair) for a, pair in enumerate(zip(task._prompts(moment), replies, strict=True)))
        return replies

    task._episodes(items, answer)
    return found


def _build(settings: Any) -> RobotTask:
    return RobotTask(settings)


register_task("warehouse", WarehouseTeamSettings, _build)
register_task("search", SearchTeamSettings, _build)
