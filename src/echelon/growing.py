"""What a planner that learns lives through: its decisions, the turns between them, and what came of them.

Between worlds and planners on one side and learners on the other, of which it knows only what they take (`Decisions`,
`Turns`): `TurnRecorder` gives HiPER its turns, `EpisodeRecorder` gives HiMAC its scored blueprints, `Blueprints` lets a
team carry one out again, and `Lessons` notes what a teacher does, for `imitation_update`.

The planner's reward (our choice) is the share of the task done in a step less the share of the time that went by, so an
episode's return is what was done less what it took: teams that succeed sooner get more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

from echelon.algorithms.decisions import Decisions, imitate
from echelon.algorithms.hiper import Turns
from echelon.envs.base import GridEnv
from echelon.llm.policy import LearningChoice
from echelon.planners.base import Planner, StatelessPlanner
from echelon.planners.choosing import Choices, Reviews, unpack
from echelon.planners.hungarian import Hungarian
from echelon.planners.llm import LLMPlanner
from echelon.rollout import TeamWorlds
from echelon.subgoals import EXCLUSIVE, FEATURES, Plan, PlanRequest, SubgoalTracker

__all__ = [
    "FEATURES_OF_A_TURN",
    "Blueprints",
    "EpisodeRecorder",
    "Lessons",
    "TurnRecorder",
    "decisions_of",
    "imitation_update",
    "keeping",
    "targets_of",
    "turn_features",
]

_Made = TypeVar("_Made", Choices, Reviews)
_WORLDS = ("warehouse", "search", "repair")
_OWN = 6
FEATURES_OF_A_TURN = FEATURES + _OWN + len(_WORLDS)
"""What critics of a planner see of an agent's turn; the same in every world, whatever its size."""


def turn_features(worlds: TeamWorlds, rows: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.float32]:
    """What critics see now in the worlds `rows` (n of them; all if not given) of a team with subgoals, float32
    `(n, A, FEATURES_OF_A_TURN)`.

    The subgoal in flight as executors see it; time left, and what is left to do, also for each agent; the share of the
    team that has nothing to do; whether the agent carries something; agents (in sixteenths); and which world it is.
    """
    env, tracker = worlds.env, worlds.tracker
    assert tracker is not None
    kind = tracker.kind[rows]
    out = np.zeros((*kind.shape, FEATURES_OF_A_TURN), np.float32)
    out[..., :FEATURES] = tracker.features[rows] * SubgoalTracker.scale
    left = 1 - env.steps[rows] / env.limit
    undone = 1 - worlds.task_return[rows] / env.goals
    out[..., FEATURES] = left[:, None]
    out[..., FEATURES + 1] = undone[:, None]
    out[..., FEATURES + 2] = (undone * env.goals / env.num_agents / 4)[:, None]
    out[..., FEATURES + 3] = (kind <= 0).mean(1)[:, None]
    out[..., FEATURES + 4] = env.carrying[rows] >= 0
    out[..., FEATURES + 5] = env.num_agents / 16
    if env.name in _WORLDS:
        out[..., FEATURES + _OWN + _WORLDS.index(env.name)] = 1
    return out


def _reward(env: GridEnv[Any]) -> NDArray[np.float32]:
    """The planner's reward of the last step, float32 `(W,)`."""
    return np.asarray(env.reward / env.goals - 1 / env.limit)


def decisions_of(planner: LLMPlanner, choices: Sequence[Choices], reviews: Sequence[Reviews]) -> Decisions:
    """The decisions behind what a planner told: all choices in their order, then all reviews."""
    width = planner.max_options
    places = [np.pad(c.places, ((0, 0), (0, width - c.places.shape[1])), constant_values=-1) for c in choices]
    opens = [np.pad(c.open, ((0, 0), (0, width - c.open.shape[1]))) for c in choices]
    asked = [np.full((len(r.place), width), -1, np.int64) for r in reviews]
    for found, r in zip(asked, reviews, strict=True):
        found[:, 0] = r.place
    if not (choices or reviews):
        return Decisions.join([])
    packed = np.concatenate([*places, *asked])
    both = [np.arange(width)[None].repeat(len(r.place), 0) < 2 for r in reviews]
    distinct, inverse = np.unique(packed, return_inverse=True)
    options = inverse.reshape(packed.shape).astype(np.int64)
    if len(distinct) and distinct[0] < 0:
        distinct, options = distinct[1:], options - 1
    return Decisions(
        [planner.question(*unpack(place)) for place in distinct.tolist()],
        options,
        np.concatenate([*opens, *both]),
        np.concatenate([*(c.column for c in choices), *(r.switch.astype(np.int64) for r in reviews)]),
        np.concatenate([*(c.logp for c in choices), *(r.logp for r in reviews)]).astype(np.float32),
        np.repeat([False, True], [sum(len(c.column) for c in choices), sum(len(r.place) for r in reviews)]),
    )  # fmt: skip


def targets_of(choices: Sequence[Choices], width: int, *, softness: float) -> NDArray[np.int64] | NDArray[np.float32]:
    """What imitation aims at: the chosen columns, int64 `(n,)`, or, where the teacher tells how much it likes each
    option, probabilities float32 `(n, width)`, proportional to exp(liking / softness) among the open ones.

    Candidates that are nearly as good are then nearly as probable: what a model learns of a candidate is its cost, and
    not only that it is the least.
    """
    if not choices or any(c.liking is None for c in choices) or not softness:
        return np.concatenate([np.zeros(0, np.int64), *(c.column for c in choices)])
    parts = []
    for c in choices:
        assert c.liking is not None
        liking = np.where(c.open, c.liking, -np.inf) / softness
        weight = np.exp(liking - liking.max(1, keepdims=True))
        weight /= weight.sum(1, keepdims=True)
        parts.append(np.pad(weight, ((0, 0), (0, width - weight.shape[1]))).astype(np.float32))
    return np.concatenate(parts)


def keeping(planner: LLMPlanner, choices: Sequence[Choices], targets: NDArray[Any]) -> tuple[Decisions, NDArray[Any]]:
    """Lessons with `targets`, and every fourth once more, to keep what was chosen: no teacher takes it back."""
    reviews = []
    for c in choices:
        chosen = np.take_along_axis(c.places, c.column[:, None], 1)[::4, 0]
        n = len(chosen)
        reviews.append(Reviews(c.world[::4], c.agent[::4], planner.going_on(chosen), np.zeros(n, bool), np.zeros(n)))
    count = sum(len(r.place) for r in reviews)
    if targets.ndim == 1:
        more = np.zeros(count, targets.dtype)
    else:
        more = np.zeros((count, targets.shape[1]), targets.dtype)
        more[:, 0] = 1
    return decisions_of(planner, choices, reviews), np.concatenate([targets, more])


class _Listener:
    """Hears what a planner decides, while it explores."""

    def __init__(self, worlds: TeamWorlds, planner: LLMPlanner) -> None:
        self.worlds, self.planner = worlds, planner
        self.choices: list[Choices] = []
        self.reviews: list[Reviews] = []

    def listen(self) -> None:
        """From now on the planner draws its subgoals, and is listened to."""
        self.choices, self.reviews = [], []
        self.planner.explore = True
        self.planner.on_choices, self.planner.on_reviews = self.choices.append, self.reviews.append

    def renew(self) -> None:
        """Let the planner, whose model has learnt, forget its answers and ask again what it was just asked."""
        self.planner.forget([*(c.places for c in self.choices), *(r.place for r in self.reviews)])

    def stop(self) -> None:
        """Let the planner take what it thinks best again."""
        self.planner.explore = False
        self.planner.on_choices = self.planner.on_reviews = None


class TurnRecorder(_Listener):
    """The turns of all agents over some steps: `begin`, then `acted` and `settled` for each step, then `finish`.

    An agent's turn begins where it gets a subgoal or is asked whether to keep it, and lasts up to the next one or the
    end of the episode; turns that were under way when recording began are left out.
    """

    def __init__(self, worlds: TeamWorlds, planner: LLMPlanner, gamma: float = 1.0) -> None:
        """Record what `planner` does in `worlds`; a turn's rewards are discounted to its first step by `gamma`."""
        super().__init__(worlds, planner)
        self.gamma = gamma

    def begin(self) -> None:
        """Record from here on."""
        self.listen()
        W, A = self.worlds.env.num_envs, self.worlds.env.num_agents
        self._before = turn_features(self.worlds)
        self._turn = np.full((W, A), -1, np.int64)  # the number of the turn under way
        self._path = np.full((W, A), -1, np.int64)  # … of the trajectory
        self._told = {"choices": (0, 0), "reviews": (0, 0)}  # how many batches, and decisions, have got their numbers
        self._started: list[tuple[Any, ...]] = []
        self._count = self._paths = 0
        self._size = 1024
        self._gained, self._took = np.zeros(self._size), np.zeros(self._size, np.int64)
        self._done = np.zeros(self._size, bool)
        self._last: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []

    def acted(self) -> None:
        """After `worlds.advance`: what the step brought, and how things stand."""
        env = self.worlds.env
        self._before = turn_features(self.worlds)
        reward = _reward(env)
        w, a = np.nonzero(self._turn >= 0)
        turn = self._turn[w, a]
        self._gained[turn] += self.gamma ** self._took[turn] * reward[w]
        self._took[turn] += 1
        ended = env.terminated | env.truncated
        if ended.any():
            self._close(w[ended[w]], a[ended[w]], self._before, env.terminated)

    def _close(
        self, w: NDArray[np.int64], a: NDArray[np.int64], seen: NDArray[np.float32], done: NDArray[np.bool_]
    ) -> None:
        """The trajectories of these agents end here."""
        self._done[self._turn[w, a]] = done[w]
        self._last.append((self._path[w, a], seen[w, a]))
        self._turn[w, a] = self._path[w, a] = -1

    def settled(self, ended: NDArray[np.bool_]) -> None:
        """After `worlds.settle`: who begins a turn."""
        worlds = self.worlds
        assert worlds.tracker is not None
        choice, review = self._newest("choices"), self._newest("reviews")
        given = (worlds.tracker.age == 0) & (worlds.tracker.kind >= 0) & worlds.active[:, None]
        w, a = np.nonzero(given | (review >= 0))
        if not len(w):
            return
        rows, at = np.unique(w, return_inverse=True)
        after = turn_features(worlds, rows)[at, a]
        before = np.where(ended[w, None], after, self._before[w, a])
        fresh = ended[w] | (self._path[w, a] < 0)
        before[ended[w], :FEATURES] = 0  # a new episode begins without a subgoal
        self._path[w[fresh], a[fresh]] = self._paths + np.arange(int(fresh.sum()))
        self._paths += int(fresh.sum())
        number = self._count + np.arange(len(w))
        self._count += len(w)
        while self._count > self._size:
            self._size *= 2
            for name in ("_gained", "_took", "_done"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
        self._turn[w, a] = number
        self._started.append((self._path[w, a], given[w, a], before, after, choice[w, a], review[w, a]))

    def _newest(self, what: str) -> NDArray[np.int64]:
        """The number of the newest "choices" or "reviews" of each agent since this was last asked; -1 if none."""
        found = np.full(self._turn.shape, -1, np.int64)
        heard: list[Choices] | list[Reviews] = getattr(self, what)
        batches, number = self._told[what]
        for made in heard[batches:]:
            found[made.world, made.agent] = number + np.arange(len(made.world))  # of several tries the last
            number += len(made.world)
        self._told[what] = len(heard), number
        return found

    def finish(self) -> tuple[Turns, Decisions]:
        """Stop recording: the turns, and the decisions that they name."""
        self.stop()
        w, a = np.nonzero(self._turn >= 0)
        now = turn_features(self.worlds)
        # Who was given something just now: the state in which that was decided, as at the end of every other turn.
        fresh = self._took[self._turn[w, a]] == 0
        now[w[fresh], a[fresh]] = self._before[w[fresh], a[fresh]]
        self._close(w, a, now, np.zeros(self._turn.shape[0], bool))
        decisions = decisions_of(self.planner, self.choices, self.reviews)
        chosen = sum(len(c.world) for c in self.choices)
        if not self._started:
            none = np.zeros(0, np.int64)
            empty = np.zeros((0, FEATURES_OF_A_TURN), np.float32)
            flat = none.astype(np.float32)
            return Turns(none, flat, none > 0, none > 0, empty, empty, empty, none, none, none), decisions
        path, given, before, after, choice, review = (np.concatenate(x) for x in zip(*self._started, strict=True))
        n = self._count
        took = self._took[:n]
        last = np.zeros((self._paths, FEATURES_OF_A_TURN), np.float32)
        for paths, seen in self._last:
            last[paths] = seen
        # Turns that nothing happened in: given and taken back within one step.
        order = np.argsort(path, kind="stable")
        order = order[took[order] > 0]
        review = np.where(review >= 0, review + chosen, -1)
        numbers, path = np.unique(path[order], return_inverse=True)
        return Turns(
            path.astype(np.int64), self._gained[:n][order].astype(np.float32), given[order], self._done[:n][order],
            before[order].astype(np.float32), after[order], last[numbers],
            np.where(given[order], choice[order], -1), review[order], took[order],
        ), decisions  # fmt: skip


def _some(made: _Made, which: NDArray[np.bool_]) -> _Made:
    """Some of what was decided."""
    values = (getattr(made, f.name) for f in fields(made))
    some: list[Any] = [None if x is None else x[which] for x in values]
    return type(made)(*some)


class EpisodeRecorder(_Listener):
    """The first episode of each world after `begin`: what was decided, what came of it, and who was given what.

    Attributes:
        scores: float32 `(W,)`, the sum of the planner's rewards.
        running: bool `(W,)`, the worlds whose first episode isn't over.
        blueprint: int16 `(W, A, limit, 2)`, each agent's subgoals in order, as (kind, task), kind -1 past the last.
    """

    def __init__(self, worlds: TeamWorlds, planner: LLMPlanner, *, rest: bool = True) -> None:
        """Record what `planner` does in `worlds`; nobody plans for worlds whose episode is over, if they `rest`."""
        super().__init__(worlds, planner)
        self.rest = rest

    def begin(self) -> None:
        """Record from here on; worlds must begin their episodes now, with `worlds.begin_together`, after this."""
        self.listen()
        W, A = self.worlds.env.num_envs, self.worlds.env.num_agents
        self.scores = np.zeros(W, np.float32)
        self.running = np.ones(W, bool)
        # A subgoal a step at most.
        self.blueprint = np.full((W, A, self.worlds.env.limit, 2), -1, np.int16)
        self._given = np.zeros((W, A), np.int64)
        # Where worlds go on, what is decided in their next episodes isn't this one's.
        self.planner.on_choices = lambda c: self.choices.append(_some(c, self.running[c.world]))
        self.planner.on_reviews = lambda r: self.reviews.append(_some(r, self.running[r.world]))

    def given(self) -> None:
        """Note who was given what just now; after `begin_together` and after each `settle`.

        Waits too: who waited since others had all that was open would else take what was to be theirs.
        """
        tracker = self.worlds.tracker
        assert tracker is not None
        w, a = np.nonzero((tracker.age == 0) & (tracker.kind >= 0) & self.running[:, None])
        self.blueprint[w, a, self._given[w, a]] = np.stack([tracker.kind[w, a], tracker.task[w, a]], 1)
        self._given[w, a] += 1

    def acted(self) -> None:
        """After `worlds.advance`."""
        env = self.worlds.env
        self.scores[self.running] += _reward(env)[self.running]
        self.running &= ~(env.terminated | env.truncated)
        if self.rest:
            self.worlds.active = self.running.copy()

    def settled(self, ended: NDArray[np.bool_]) -> None:
        """After `worlds.settle`."""
        self.given()

    def finish(self) -> tuple[Decisions, NDArray[np.int64]]:
        """Stop recording: the decisions, and the world of each, int64 `(n,)`."""
        self.stop()
        self.worlds.active = np.ones(self.worlds.env.num_envs, bool)
        worlds = np.concatenate(
            [np.zeros(0, np.int64), *(c.world for c in self.choices), *(r.world for r in self.reviews)]
        )
        return decisions_of(self.planner, self.choices, self.reviews), worlds


@dataclass
class Blueprints(StatelessPlanner):
    """Gives each agent of a world the subgoals of its blueprint, one after another; then what `inner` says.

    What can't be done any more is skipped, since executors that explore need not arrive in the order of those that the
    blueprint was made with.

    Attributes:
        inner: who plans where the blueprint has ended.
        plans: int16 `(W, A, L, 2)`, each agent's subgoals as (kind, task), kind -1 past the last.
        worlds: the team that carries them out, again and again.
    """

    inner: Planner
    plans: NDArray[np.int16]
    worlds: TeamWorlds
    name: str = "blueprint"

    def __post_init__(self) -> None:
        self.needs_distance = self.inner.needs_distance
        self._at = np.zeros(self.plans.shape[:2], np.int64)

    def acted(self) -> None:
        """After `worlds.advance`: who is done begins again."""
        self._at[self.worlds.env.terminated | self.worlds.env.truncated] = 0

    def settled(self, ended: NDArray[np.bool_]) -> None:
        """After `worlds.settle`: nothing to do."""

    def plan(self, request: PlanRequest) -> Plan:
        """The next subgoal of each agent's blueprint that can still be done; `inner`'s for the others."""
        c, taken = request.candidates, request.taken.copy()
        choice = np.full(request.need.shape, -1, np.int64)
        _follow(request.need, request.rows, self.plans, self._at, c.kind, c.task, request.refused, taken, choice)
        plan = Plan.chosen(request, choice)
        left = request.need & (choice < 0)
        if left.any():
            more = self.inner.plan(replace(request, need=left, taken=taken))
            for name in ("kind", "cell", "task"):
                getattr(plan, name)[left] = getattr(more, name)[left]
        return plan


@numba.njit(cache=True)
def _follow(need, rows, plans, at, kind, task, refused, taken, choice):  # type: ignore[no-untyped-def]
    """Choose the next subgoal of each agent's list that can still be done, and move on in the list (`at`)."""
    for i in range(need.shape[0]):
        for a in range(need.shape[1]):
            if not need[i, a]:
                continue
            w = rows[i]
            while choice[i, a] < 0 and at[w, a] < plans.shape[2] and plans[w, a, at[w, a], 0] >= 0:
                k, t = plans[w, a, at[w, a]]
                at[w, a] += 1
                for c in range(kind.shape[2]):
                    if kind[i, a, c] == k and task[i, a, c] == t and not refused[i, a, c]:
                        if not EXCLUSIVE[k] or t < 0:
                            choice[i, a] = c
                        elif not taken[i, t]:
                            choice[i, a], taken[i, t] = c, True
                        break


class Lessons(StatelessPlanner):
    """Plans as `teacher` does, and notes what `learner` would have had to choose."""

    needs_distance = True

    def __init__(self, teacher: Planner, learner: LLMPlanner) -> None:
        """Note what `teacher` chooses among the options that `learner` rates."""
        self.name = f"lessons of {teacher.name}"
        self.teacher, self.learner = teacher, learner
        self.choices: list[Choices] = []

    def plan(self, request: PlanRequest) -> Plan:
        """The teacher's plan."""
        plan = self.teacher.plan(request)
        preference = self.teacher.preference(request) if isinstance(self.teacher, Hungarian) else None
        if (lesson := self.learner.lesson(request, plan, preference)) is not None:
            self.choices.append(lesson)
        return plan

    def told(self, *, softness: float, reviews: bool) -> tuple[Decisions, NDArray[Any]]:
        """The lessons so far, and what imitation of each aims at.

        Args:
            softness: see `targets_of`.
            reviews: whether keeping a subgoal is taught, too (see `keeping`).
        """
        targets = targets_of(self.choices, self.learner.max_options, softness=softness)
        if reviews:
            return keeping(self.learner, self.choices, targets)
        return decisions_of(self.learner, self.choices, []), targets


def imitation_update(
    policy: LearningChoice, lessons: Decisions, targets: NDArray[Any], step: int, *, count: int, batch: int, key: int
) -> dict[str, float]:
    """Update `step` of `count` by imitation: a function of these, `key` and the policy; what to log.

    Args:
        policy: who learns; its learning rate follows the schedule of a warm start (`ChoicePolicy.warm_up`).
        lessons, targets: at least one, as `Lessons.told` gives them.
        step: from 0.
        count: updates in all.
        batch: decisions of each.
        key: decides their order.
    """
    policy.warm_up(step, count)
    epochs = -(-count // -(-len(lessons) // batch))
    return imitate(policy, lessons, targets, batch=batch, epochs=epochs, key=key, first=step, last=step + 1)[0]
