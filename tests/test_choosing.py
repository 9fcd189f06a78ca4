"""What a planner that rates options is told of them, and how a team's choices are joined and drawn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import linear_sum_assignment

from echelon.envs import SubgoalKind, make
from echelon.envs.kernels import UNREACHABLE
from echelon.llm.choice import ChoicePrompt, ChoiceScores
from echelon.planners import Hungarian
from echelon.planners.choosing import (
    ABOUT,
    AFTER,
    CONTEXTS,
    Choices,
    agree,
    contexts,
    draw,
    list_open,
    pack,
    unpack,
    words_of_context,
)
from echelon.planners.llm import LEARNED_PROMPTS, LLMPlanner
from echelon.subgoals import EXCLUSIVE, FEATURES, Plan, PlanRequest, SubgoalConfig, SubgoalTracker
from test_envs_plain import Fires, FiresConfig

FETCH, TOOL, WAIT = int(SubgoalKind.FETCH), int(SubgoalKind.TOOL), int(SubgoalKind.WAIT)
ALL = np.ones(3, bool)


class Even:
    """A model to which everything is as good as bad."""

    name = "even"

    def score(self, prompts: list[ChoicePrompt]) -> list[ChoiceScores]:
        return [ChoiceScores(np.log(np.array([0.5, 0.5], np.float32)), 1) for _ in prompts]


# -- numbers that are told ---------------------------------------------------------------------


def test_path_lengths_are_told_to_about_a_tenth() -> None:
    assert ABOUT[:14].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 12, 12]
    told = {19: 20, 20: 20, 21: 20, 22: 24, 23: 24, 30: 32, 40: 40, 45: 48, 79: 80, 100: 96, 300: 288}
    assert {x: int(ABOUT[x]) for x in told} == told
    steps = np.arange(1, 4096)
    assert (np.abs(ABOUT[steps] - steps) <= np.maximum(0.1 * steps, 0)).all()
    assert (np.diff(ABOUT[:4096]) >= 0).all()
    assert len(np.unique(ABOUT[:1000])) < 60, "few lengths, few questions"


@given(st.integers(0, 2**20), st.integers(0, 4), st.integers(0, 2**16 - 1), st.integers(0, CONTEXTS - 1))
def test_a_place_is_one_number_and_back(row: int, verdict: int, steps: int, context: int) -> None:
    place = pack(*(np.array([x]) for x in (row, verdict, steps, context)))
    assert unpack(int(place[0])) == (row, verdict, steps, context)


def test_every_context_has_words_of_its_own() -> None:
    words = [tuple(words_of_context(c).values()) for c in range(CONTEXTS)]
    assert len(set(words)) == CONTEXTS == 3 * len(AFTER) * 5
    assert words_of_context((1 * len(AFTER) + 2) * 5 + 4) == {"nearer": 1, "after": 8, "gain": 4}


# -- contexts ----------------------------------------------------------------------------------


def scene(
    need: Any, kind: Any, task: Any, distance: Any, after: Any, gain: Any, asked: Any = None, told: Any = ALL
) -> list[list[dict[str, int]]]:
    """The contexts of one world's options, all of them, in words."""
    need, kind, task = np.array([need], bool), np.array([kind], np.int8), np.array([task], np.int16)
    distance = np.array([distance], np.uint16)
    asked = need if asked is None else np.array([asked], bool)
    count = np.full(need.shape, kind.shape[2], np.int64)
    options = np.broadcast_to(np.arange(kind.shape[2]), kind.shape).copy()
    out = np.full(kind.shape, -1, np.int64)
    contexts(asked, options, count, need, kind, task, distance, np.array([after]), np.array([gain]), told, out)
    return [[words_of_context(int(c)) if c >= 0 else {} for c in row] for row in out[0]]


def test_nearer_counts_the_robots_that_ask_too() -> None:
    kind, task = [[FETCH, FETCH]] * 4, [[0, 1]] * 4
    distance = [[5, 9], [3, 9], [4, 2], [1, 1]]
    said = scene([1, 1, 1, 1], kind, task, distance, [0, 0], [1, 1])
    assert [[c["nearer"] for c in row] for row in said] == [[2, 2], [1, 2], [2, 1], [0, 0]], "2: or more"
    said = scene([1, 1, 1, 0], kind, task, distance, [0, 0], [1, 1])
    assert [[c["nearer"] for c in row] for row in said[:3]] == [[2, 1], [0, 2], [1, 0]], "who doesn't ask is none"
    assert said[3] == [{}, {}]


def test_nearer_is_about_tasks_for_one_only() -> None:
    said = scene([1, 1], [[TOOL], [TOOL]], [[0], [0]], [[5], [3]], [4], [2])
    assert said == [[{"nearer": 0, "after": 4, "gain": 2}]] * 2


def test_after_is_rounded_up_and_gain_cut_off() -> None:
    tasks = len(AFTER) + 2
    work = [0, 1, 4, 5, 9, 17, 32, 33, 500]
    said = scene([1], [[FETCH] * tasks], [range(tasks)], [[1] * tasks], work, [0, 1, 2, 3, 4, 5, 90, -1, 1])[0]
    assert [c["after"] for c in said] == [0, 4, 4, 8, 16, 24, 32, 48, 48]
    assert [c["gain"] for c in said] == [0, 1, 2, 3, 4, 4, 4, 0, 1]


def test_what_a_template_does_not_ask_for_counts_nothing() -> None:
    for which, name in enumerate(("nearer", "after", "gain")):
        told = np.arange(3) == which
        said = scene([1, 1], [[FETCH]] * 2, [[0]] * 2, [[5], [3]], [9], [2], told=told)[0][0]
        assert said == {"nearer": 0, "after": 0, "gain": 0} | {name: {"nearer": 1, "after": 16, "gain": 2}[name]}


@settings(max_examples=80)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 4))
def test_contexts_are_those_of_a_plain_program(seed: int, agents: int, tasks: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (2, agents, tasks + 1)
    kind = rng.choice(np.array([FETCH, TOOL, -1, WAIT], np.int8), shape)
    # Each agent has a candidate once, in an order of its own.
    task = np.array([[rng.permutation(tasks + 1) - 1 for _ in range(agents)] for _ in range(2)], np.int16)
    distance = rng.integers(0, 6, shape).astype(np.uint16)
    distance[rng.random(shape) < 0.2] = UNREACHABLE
    need = rng.random(shape[:2]) < 0.7
    asked = need & (rng.random(shape[:2]) < 0.8)
    after, gain = rng.integers(0, 60, (2, tasks)), rng.integers(0, 7, (2, tasks))
    told = rng.random(3) < 0.8
    count = rng.integers(0, tasks + 2, shape[:2])
    options = np.array([[rng.permutation(tasks + 1) for _ in range(agents)] for _ in range(2)])
    out = np.full(shape, -1, np.int64)
    contexts(asked, options, count, need, kind, task, distance, after, gain, told, out)

    def way(i: int, a: int, t: int) -> int:
        """How far the agent is from the task, if that is among what it could do."""
        found = [int(distance[i, a, c]) for c in range(tasks + 1) if task[i, a, c] == t and kind[i, a, c] > 0]
        return found[0] if found else int(UNREACHABLE)

    for i, a in np.ndindex(2, agents):
        for k in range(tasks + 1):
            if not asked[i, a] or k >= count[i, a]:
                assert out[i, a, k] == -1
                continue
            c = options[i, a, k]
            t = int(task[i, a, c])
            want = {"nearer": 0, "after": 0, "gain": 1 if told[2] else 0}
            if t >= 0:
                others = [b for b in range(agents) if b != a and need[i, b]]
                if told[0] and EXCLUSIVE[kind[i, a, c]]:
                    want["nearer"] = min(2, sum((way(i, b, t), b) < (way(i, a, t), a) for b in others))
                if told[1]:
                    want["after"] = next((int(x) for x in AFTER if x >= after[i, t]), int(AFTER[-1]))
                if told[2]:
                    want["gain"] = min(4, int(gain[i, t]))
            assert words_of_context(int(out[i, a, k])) == want


# -- joint choices -----------------------------------------------------------------------------


class Team:
    """One world's agents before options that all of them share, as `draw` and `agree` want it."""

    def __init__(self, logits: NDArray[np.float64], kind: int = FETCH, worlds: int = 1) -> None:
        agents, tasks = logits.shape
        shape = (worlds, agents, tasks)
        self.who = np.ones(shape[:2], bool)
        self.options = np.broadcast_to(np.arange(tasks), shape).copy()
        self.count = np.full(shape[:2], tasks)
        logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        self.logprobs = np.broadcast_to(logprobs, shape).copy()
        self.kind = np.full(shape, kind, np.int8)
        self.task = np.broadcast_to(np.arange(tasks), shape).astype(np.int16)
        self.distance = np.ones(shape, np.uint16)
        self.taken = np.zeros((worlds, tasks), bool)
        self.choice = np.full(shape[:2], -1)

    def arguments(self) -> tuple[Any, ...]:
        return (self.who, self.options, self.count, self.logprobs, self.kind, self.task, self.distance,
                np.zeros(self.kind.shape, bool), self.taken, False)  # fmt: skip

    def agree(self) -> NDArray[np.int64]:
        agree(*self.arguments(), self.choice)
        return self.choice

    def draw(self, *, explore: bool = True, seed: int = 0) -> tuple[NDArray[Any], ...]:
        """Choice, column, which were open, logp."""
        keys = np.random.default_rng(seed).integers(0, 2**63, self.who.shape, np.uint64)
        column, still = np.full(self.who.shape, -1), np.zeros(self.options.shape, bool)
        logp = np.zeros(self.who.shape)
        draw(*self.arguments(), keys, explore, self.choice, column, still, logp)
        return self.choice, column, still, logp


def test_draws_are_as_probable_as_the_model_says() -> None:
    logits = np.array([[0.3, -1.0, 0.8], [2.0, 0.5, 0.0]])
    n = 6000
    choice, column, still, logp = Team(logits, worlds=n).draw()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    # The second is surer, so it goes first, and the other chooses among what is left.
    assert stats.chisquare(np.bincount(choice[:, 1], minlength=3), n * p[1]).pvalue > 1e-3
    for first in range(3):
        rows = choice[:, 1] == first
        left = np.arange(3) != first
        counts = np.bincount(choice[rows, 0], minlength=3)
        assert counts[first] == 0, "no task twice"
        rest = p[0, left] / p[0, left].sum()
        assert stats.chisquare(counts[left], rows.sum() * rest).pvalue > 1e-3
        np.testing.assert_array_equal(still[rows, 0], np.broadcast_to(left, (rows.sum(), 3)))
        got = np.log(p[0] / p[0, left].sum())[column[rows, 0]]
        np.testing.assert_allclose(logp[rows, 0], got, atol=1e-9)
    np.testing.assert_allclose(logp[:, 1], np.log(p[1])[column[:, 1]], atol=1e-9)
    assert still[:, 1].all()
    np.testing.assert_array_equal(choice, column)


def test_without_exploring_the_best_that_is_open_is_taken() -> None:
    logits = np.array([[0.0, 1.0, 0.5], [0.0, 3.0, 0.5]])
    choice, column, _, logp = Team(logits).draw(explore=False)
    assert choice.tolist() == [[2, 1]] == column.tolist()
    np.testing.assert_allclose(np.exp(logp[0, 0]), np.exp(0.5) / (1 + np.exp(0.5)))


def test_a_choice_of_one_is_none() -> None:
    choice, column, still, logp = Team(np.array([[0.0, 1.0], [0.0, 3.0]])).draw()
    assert sorted(choice[0].tolist()) == [0, 1]
    assert column[0, 1] >= 0
    assert column[0, 0] == -1 and still[0, 0].sum() == 1 and logp[0, 0] == 0


def test_who_is_left_with_nothing_waits_and_shared_tasks_go_to_all() -> None:
    logits = np.zeros((3, 2)) + np.array([[1.0, 0.0]])
    choice, column, _, _ = Team(logits).draw()
    assert sorted(choice[0].tolist()) == [-1, 0, 1] and (column[0] >= 0).sum() == 1
    assert Team(logits, kind=TOOL).draw(explore=False)[0].tolist() == [[0, 0, 0]]
    assert Team(logits, kind=TOOL).agree().tolist() == [[0, 0, 0]]


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 6))
def test_a_team_agrees_on_its_most_probable_plan(seed: int, agents: int, tasks: int) -> None:
    rng = np.random.default_rng(seed)
    team = Team(rng.normal(0, 2, (agents, tasks)))
    team.taken[0] = rng.random(tasks) < 0.2
    closed = team.taken[0].copy()
    choice = team.agree()[0]
    got = choice[choice >= 0]
    assert len(set(got.tolist())) == len(got) and not closed[got].any()
    cost = -team.logprobs[0][:, ~closed]
    rows, columns = linear_sum_assignment(cost)
    assert len(got) == len(rows), "as many agents as can be"
    np.testing.assert_allclose(-team.logprobs[0][np.arange(agents), choice][choice >= 0].sum(),
                               cost[rows, columns].sum(), atol=1e-4)  # fmt: skip


def test_to_agree_is_more_than_to_ask_the_surest_first() -> None:
    """The surest takes its second best where that helps the team more."""
    p = np.array([[0.60, 0.38, 0.02], [0.55, 0.01, 0.44]])
    assert Team(np.log(p)).agree().tolist() == [[0, 2]]
    p = np.array([[0.60, 0.38, 0.02], [0.59, 0.01, 0.40]])
    assert Team(np.log(p)).agree().tolist() == [[0, 2]] and Team(np.log(p)).draw(explore=False)[0].tolist() == [[0, 2]]
    p = np.array([[0.60, 0.38, 0.02], [0.58, 0.21, 0.21]])
    assert Team(np.log(p)).agree().tolist() == [[1, 0]] and Team(np.log(p)).draw(explore=False)[0].tolist() == [[0, 1]]


# -- lessons -----------------------------------------------------------------------------------


def request_of(name: str, num_envs: int = 6, seed: int = 0, **env: Any) -> tuple[SubgoalTracker, PlanRequest]:
    world = make(name, num_envs=num_envs, seed=seed, extra_features=FEATURES, **env)
    tracker = SubgoalTracker(world, SubgoalConfig(), 0.99, seed)
    return tracker, tracker.request(np.arange(num_envs), distance=True)


def test_a_lesson_closes_what_the_teacher_gave_to_others() -> None:
    _, request = request_of("warehouse", size=10, num_agents=3, num_packages=5)
    learner = LLMPlanner(Even(), folder=LEARNED_PROMPTS)
    plan = Hungarian().plan(request)
    lesson = learner.lesson(request, plan)
    assert lesson is not None
    asked = list(zip(lesson.world.tolist(), lesson.agent.tolist(), strict=True))
    assert asked == [(i, a) for i in range(6) for a in range(3)], "five tasks for three: all have a choice"
    tasks = request.candidates.task
    for row, (i, a) in enumerate(asked):
        options = np.flatnonzero(request.candidates.kind[i, a] == FETCH)
        others = {int(t) for b, t in enumerate(plan.task[i]) if b != a}
        still = [int(tasks[i, a, c]) not in others for c in options]
        assert lesson.open[row, : len(options)].tolist() == still and not lesson.open[row, len(options) :].any()
        assert tasks[i, a, options[lesson.column[row]]] == plan.task[i, a], "the teacher's own stays open"
        assert (lesson.places[row, : len(options)] >= 0).all() and (lesson.places[row, len(options) :] == -1).all()
    assert learner.counters() == {"asked": 0, "forced": 0, "questions": 0, "failures": 0}, "nobody was asked anything"
    assert not request.taken.any(), "the request is as it was"


def test_a_lesson_without_a_choice_teaches_nothing() -> None:
    _, request = request_of("warehouse", size=10, num_agents=2, num_packages=2)
    learner = LLMPlanner(Even(), folder=LEARNED_PROMPTS)
    # Each could only have what the other left.
    assert learner.lesson(request, Hungarian().plan(request)) is None
    assert learner.lesson(request, Plan.empty(request)) is None, "to wait isn't among the options"


# -- what there is around a candidate, in each world -------------------------------------------


@pytest.mark.parametrize("played", [0, 40])
def test_the_outlook_of_a_warehouse_is_the_way_to_the_zone(played: int) -> None:
    tracker, _ = request_of("warehouse", size=10, num_agents=3, num_packages=5)
    env, rows = tracker.env, np.array([4, 1])
    walk(env, played)
    after, gain = env.outlook(rows)
    for i, w in enumerate(rows):
        for t in env.scene(int(w)).tasks:
            assert t.goal is not None
            here = env.row_col(int(env.task_cell[w, t.id]))
            assert after[i, t.id] == abs(here[0] - t.goal[0]) + abs(here[1] - t.goal[1])
    assert (gain == 1).all() and env.goals == 5


def walk(env: Any, steps: int) -> None:
    """A crowd moves about."""
    rng = np.random.default_rng(1)
    for _ in range(steps):
        env.advance(rng.integers(0, 5, env.pos.shape).astype(np.int8))
        env.autoreset()


@pytest.mark.parametrize("played", [0, 40])
def test_the_outlook_of_a_workshop_is_what_it_unlocks_and_what_needs_a_tool(played: int) -> None:
    tracker, _ = request_of("repair", size=10, num_agents=3, num_machines=6, num_tools=2, locked=0.6)
    env, rows = tracker.env, np.arange(6)
    walk(env, played)
    after, gain = env.outlook(rows)
    assert env.goals == 6
    seen = set()
    for w in rows.tolist():
        view = env.scene(w)
        machines = [t for t in view.tasks if t.kind == "machine"]
        for t in view.tasks:
            if t.kind == "machine":
                opens = sum(m.status == "locked" and m.locked_by == t.id for m in machines)
                assert (after[w, t.id], gain[w, t.id]) == (0, 1 + opens)
                seen.add(opens)
                continue
            users = [m.cell for m in machines if m.status == "broken" and m.needs == t.id]
            held = sum(a.carrying == t.id for a in view.agents)
            assert gain[w, t.id] == max(0, len(users) - held)
            assert t.cell is not None
            way = [abs(t.cell[0] - c[0]) + abs(t.cell[1] - c[1]) for c in users if c is not None]
            assert after[w, t.id] == min(way, default=0)
    assert {0, 1} <= seen


def test_robots_on_their_way_to_a_tool_lessen_what_it_brings() -> None:
    tracker, request = request_of("repair", size=10, num_agents=3, num_machines=6, num_tools=2, locked=0.0)
    before = request.outlook()[1]
    plan = Plan.empty(request)
    plan.kind[:, 0], plan.task[:, 0] = TOOL, 6
    plan.cell[:, 0] = tracker.env.task_cell[:, 6]
    one = np.zeros(request.need.shape, bool)
    one[:, 0] = True
    useful = before[:, 6] > 0
    assert useful.any()
    tracker.assign(request, plan, one)
    after = tracker.request(np.arange(6), distance=True).outlook()[1]
    assert (after[useful, 6] == before[useful, 6] - 1).all(), "who goes for it is one robot less that it needs"
    np.testing.assert_array_equal(np.delete(after, 6, 1), np.delete(before, 6, 1))
    assert (after >= 0).all()


@pytest.mark.parametrize("played", [0, 30])
def test_the_outlook_of_a_search_is_the_unseen_share_in_quarters(played: int) -> None:
    tracker, _ = request_of("search", size=13, num_agents=3, num_targets=4, regions=3)
    env, rows = tracker.env, np.array([5, 2, 0])
    walk(env, played)
    after, gain = env.outlook(rows)
    assert env.goals == 4 and not after.any() and gain.shape == after.shape == (3, env.num_tasks)
    for i, w in enumerate(rows.tolist()):
        view = env.scene(w)
        assert view.seen is not None
        for zone in view.zones:
            hidden = sum(not view.seen[r, c] for r, c in zone.cells)
            assert hidden >= env.unseen_left[w, zone.id]
            assert gain[i, zone.id] == int(np.ceil(4 * env.unseen_left[w, zone.id] / len(zone.cells)))
            assert 0 <= gain[i, zone.id] <= 4 and (gain[i, zone.id] > 0) == (env.unseen_left[w, zone.id] > 0)


def test_a_world_of_ones_own_says_nothing_more() -> None:
    env = Fires(FiresConfig(size=7, num_agents=2, num_fires=3, limit=30), num_envs=3, seed=0)
    after, gain = env.outlook(np.array([2, 0]))
    assert after.shape == gain.shape == (2, env.num_tasks)
    assert not after.any() and (gain == 1).all() and env.goals == env.num_tasks
    assert after.dtype == gain.dtype == np.int64


# -- the table ---------------------------------------------------------------------------------


def test_a_changed_model_is_asked_anew_and_at_once() -> None:
    """What it was asked before goes through in one call; what it wasn't, when it comes up."""

    class Counting(Even):
        calls: list[int]

        def __init__(self) -> None:
            self.calls = []

        def score(self, prompts: list[ChoicePrompt]) -> list[ChoiceScores]:
            self.calls.append(len(prompts))
            return super().score(prompts)

    _, request = request_of("warehouse", size=10, num_agents=3, num_packages=5)
    model = Counting()
    planner = LLMPlanner(model, folder=LEARNED_PROMPTS)
    heard: list[Choices] = []
    planner.explore, planner.on_choices = True, heard.append
    planner.plan(request)
    asked = sum(model.calls)
    assert asked > 5
    model.calls.clear()
    planner.plan(replace(request, taken=np.zeros_like(request.taken)))
    assert not model.calls, "the answers are known"
    met = np.concatenate([c.places for c in heard])
    places = np.unique(met[met >= 0])
    assert len(places) == asked
    planner.forget([met])
    assert model.calls == [len(places)]
    planner.plan(replace(request, taken=np.zeros_like(request.taken)))
    assert model.calls == [len(places)], "nothing is left to ask"
    model.calls.clear()
    planner.forget()
    assert not model.calls
    planner.plan(replace(request, taken=np.zeros_like(request.taken)))
    assert sum(model.calls) == asked


def test_options_are_the_nearest_in_their_own_order() -> None:
    rng = np.random.default_rng(3)
    distance = rng.integers(1, 30, (1, 1, 12)).astype(np.uint16)
    options, count, choice = np.full((1, 1, 4), -1), np.zeros((1, 1), np.int64), np.full((1, 1), -1)
    list_open(np.ones((1, 1), bool), np.full((1, 1, 12), FETCH, np.int8), np.arange(12, dtype=np.int16)[None, None],
              distance, np.zeros((1, 1, 12), bool), np.zeros((1, 12), bool), False, options, count, choice)  # fmt: skip
    nearest = np.sort(np.argsort(distance[0, 0], kind="stable")[:4])
    np.testing.assert_array_equal(options[0, 0], nearest)
    assert count[0, 0] == 4 and choice[0, 0] == -1
