"""What each robot sees at a turn, what its reply says, and the planner that does as the replies say."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from echelon.envs.base import SubgoalKind
from echelon.envs.kernels import UNREACHABLE
from echelon.errors import EchelonError
from echelon.llm.prompts import LETTERS, clean
from echelon.planners.base import StatelessPlanner
from echelon.rollout import TeamWorlds
from echelon.subgoals import EXCLUSIVE, Plan, PlanRequest, SubgoalTracker, Verdict
from echelon.teams.robots.settings import RobotTeamSettings

__all__ = ["MESSAGE_CHARS", "Answer", "Course", "Moment", "Option", "RepliesPlanner", "Result", "View", "read_reply"]

MESSAGE_CHARS = 80
"""A message to the team is cut to so many characters."""

_READ = 400  # characters of a reply that are looked at
_REPLY = re.compile(r"\s*([A-Z])(?![\w'’])[.):,]?[ \t]*(.*)")

# What prompts call a robot's options, by kind.
_NAMES = {SubgoalKind.FETCH: "P{}", SubgoalKind.DELIVER: "P{}", SubgoalKind.REGION: "R{}"}
_SHOWN = {SubgoalKind.DELIVER: "bring {}"}


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
class Option:
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
class View:
    """All that one robot is told.

    `load` is the package that it carries, or -1; `options` are in the order of their letters; `heard` is what each
    other robot (by index) told the team; `notice` is what came of this robot's last reply, or "".
    """

    robot: int
    place: tuple[int, int]
    load: int
    options: tuple[Option, ...]
    heard: tuple[tuple[int, str], ...]
    notice: str


@dataclass
class Moment:
    """A turn that begins: what each robot sees, and, as long as it is asked about, the request behind it."""

    views: list[View]
    request: Callable[[], PlanRequest]


@dataclass
class Result:
    """What came of a turn: of the whole task `progress` was done in `steps`, and which robots' replies failed."""

    replies: tuple[str, ...] = ()
    progress: float = 0.0
    steps: int = 0
    invalid: list[int] = field(default_factory=list)
    conflicts: list[tuple[int, str]] = field(default_factory=list)


@dataclass
class Course:
    """An episode as far as it was played: its turns, what was said in the last one, and where it stopped.

    `results` has one entry a turn; `stopped` is the moment at which nobody had a reply, None where the episode ended.
    """

    item: int
    script: tuple[tuple[str, ...], ...] = ()
    results: list[Result] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    stopped: Moment | None = None
    success: bool = False
    steps: int = 0


Answer = Callable[[Course, Moment], Sequence[str] | None]  # replies of all robots; None: stop there


class RepliesPlanner(StatelessPlanner):
    """Plans as the robots' replies say; a round is a turn if somebody in it has a choice."""

    name = "replies"
    needs_distance = True
    worlds: TeamWorlds
    tracker: SubgoalTracker

    def __init__(
        self, name: str, settings: RobotTeamSettings, keys: NDArray[np.uint64], courses: list[Course], answer: Answer
    ) -> None:
        """Ask as the turns come; `worlds` and `tracker` are to be set before.

        Args:
            name: what the task is called.
            settings: how it is set up.
            keys: of each item, what the order of its options is drawn from.
            courses: the episodes, in the order of their worlds; written.
            answer: who replies.
        """
        self.task_name, self.settings, self.keys = name, settings, keys
        self.courses, self.answer = courses, answer

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
                f"item {course.item} of {self.task_name}: {len(replies)} replies of {len(moment.views)} robots"
            )
        result = Result(tuple(replies))
        course.results.append(result)
        course.messages = []
        for view, reply in zip(moment.views, replies, strict=True):
            chosen, message = read_reply(reply, len(view.options))
            course.messages.append(message if self.settings.messages else "")
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
        self, request: PlanRequest, i: int, course: Course, offered: NDArray[np.bool_], free: NDArray[np.bool_]
    ) -> Moment:
        """What each robot sees now."""
        assert request.distance is not None
        world, turn = int(request.rows[i]), len(course.results)
        notices = {a: f"{name} is another robot's." for a, name in (course.results[-1].conflicts if turn else ())}
        shown = np.zeros_like(offered)
        views = []
        for a in range(self.settings.num_agents):
            if request.need[i, a]:
                near = np.argsort(np.where(offered[a], request.distance[i, a], UNREACHABLE), kind="stable")
                near = near[: min(self.settings.options, int(offered[a].sum()))]
                shown[a, near] = True
                options = [_option(request, i, a, int(k)) for k in near]
                if free[a] or not options:
                    options.append(Option(SubgoalKind.WAIT, int(request.pos[i, a]), -1, 0))
                    key = np.random.SeedSequence(int(self.keys[course.item]), spawn_key=(turn, a))
                    order = np.random.Generator(np.random.Philox(key)).permutation(len(options))
                    options = [options[k] for k in order]
            else:
                options = [self._going_on(world, a)]
            load = int(self.worlds.env.carrying[world, a])
            heard = tuple((b, said) for b, said in enumerate(course.messages) if said and b != a)
            views.append(View(a, request.where(i, a), load, tuple(options), heard, notices.get(a, "")))

        def narrowed() -> PlanRequest:
            # Checked once more, so that nothing is drawn; but what planners draw is this round's.
            rows, need = request.rows[i : i + 1], request.need[i : i + 1]
            one = self.tracker.request(rows, distance=True, again=need)
            kinds = np.where((one.candidates.kind > 0) & ~shown[None], -1, one.candidates.kind).astype(np.int8)
            candidates = replace(one.candidates, kind=kinds)
            return replace(one, candidates=candidates, keys=request.keys[i : i + 1])

        return Moment(views, narrowed)

    def _going_on(self, world: int, a: int) -> Option:
        tracker = self.tracker
        kind, cell = SubgoalKind(int(tracker.kind[world, a])), int(tracker.cell[world, a])
        length = int(tracker.field[world, a, self.worlds.env.pos[world, a]])
        return Option(kind, cell, int(tracker.task[world, a]), length)


def _option(request: PlanRequest, i: int, a: int, k: int) -> Option:
    assert request.distance is not None
    kind, cell, task, length = (
        int(x[i, a, k]) for x in (request.candidates.kind, request.candidates.cell, request.candidates.task,
                                  request.distance)
    )  # fmt: skip
    return Option(SubgoalKind(kind), cell, task, length)


def _put(plan: Plan, i: int, a: int, option: Option) -> None:
    plan.kind[i, a], plan.cell[i, a], plan.task[i, a] = option.kind, option.cell, option.task
