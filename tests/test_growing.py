"""What is recorded of a planner that learns: turns, episodes and blueprints, in worlds that are really played."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from echelon.algorithms.decisions import Decisions, log_probabilities
from echelon.algorithms.hiper import Turns
from echelon.envs import make
from echelon.executors import PIBTExecutor
from echelon.growing import FEATURES_OF_A_TURN, Blueprints, EpisodeRecorder, Lessons, TurnRecorder, decisions_of
from echelon.llm.choice import ChoicePrompt, ChoiceScores
from echelon.planners import Hungarian
from echelon.planners.llm import LEARNED_PROMPTS, PROMPTS, LLMPlanner
from echelon.rollout import Reviewer, TeamWorlds, first_episodes
from echelon.subgoals import FEATURES, SubgoalConfig


class Hashed:
    """A model whose log-odds of a question are a number made of its letters, within ±`reach`."""

    name = "hashed"

    def __init__(self, reach: float = 2.0, keep: float | None = None) -> None:
        self.reach, self.keep = reach, keep

    def odds(self, text: str) -> float:
        if self.keep is not None and text.startswith("go on"):
            return self.keep
        return (zlib.crc32(text.encode()) % 1000 / 500 - 1) * self.reach

    def score(self, prompts: Sequence[ChoicePrompt]) -> list[ChoiceScores]:
        odds = np.array([self.odds(p.text) for p in prompts])
        good, bad = -np.log1p(np.exp(-odds)), -np.log1p(np.exp(odds))
        return [ChoiceScores(np.array(x, np.float32), 1) for x in zip(good, bad, strict=True)]


WORLDS: dict[str, dict[str, Any]] = {
    "warehouse": {"size": 9, "num_agents": 3, "num_packages": 4},
    "search": {"size": 12, "num_agents": 3, "num_targets": 4, "regions": 3, "sensor": 2},
    "repair": {"size": 9, "num_agents": 3, "num_machines": 5, "num_tools": 2},
}


def team_of(
    name: str = "warehouse", num_envs: int = 6, model: Hashed | None = None, seed: int = 0, *,
    subgoals: dict[str, Any] | None = None, **env: Any,
) -> tuple[TeamWorlds, LLMPlanner]:  # fmt: skip
    world = make(name, num_envs=num_envs, seed=seed, extra_features=FEATURES, **{**WORLDS[name], **env})
    planner = LLMPlanner(model or Hashed(), folder=LEARNED_PROMPTS)
    everywhere = [(planner, np.ones(num_envs, bool))]
    return TeamWorlds(world, everywhere, SubgoalConfig(**(subgoals or {})), gamma=0.99, seed=seed), planner


# -- turns -------------------------------------------------------------------------------------


@dataclass
class Played:
    """What a test saw of some steps: by step, reward (W,), and which worlds terminated or were truncated."""

    turns: Turns
    decisions: Decisions
    reward: NDArray[np.float64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    tells: list[NDArray[np.float64]]  # by step what was done of each world's episode, behind the step
    begun: list[NDArray[np.bool_]]  # by settling (one before the first step) who was given something
    reviewed: int


def play(worlds: TeamWorlds, planner: LLMPlanner, steps: int, *, gamma: float = 1.0, settle: bool = True) -> Played:
    """Record some steps of worlds that begin now, or, without `settle`, that are under way."""
    env, tracker = worlds.env, worlds.tracker
    assert tracker is not None
    executor, watch = PIBTExecutor(worlds), TurnRecorder(worlds, planner, gamma)
    watch.begin()
    begun = []
    if settle:
        worlds.start()
        watch.settled(np.ones(env.num_envs, bool))
        begun.append((tracker.age == 0) & (tracker.kind >= 0))
    reward, terminated, truncated, tells = [], [], [], []
    done = worlds.task_return.copy()
    for _ in range(steps):
        worlds.advance(executor.act(worlds))
        done += env.reward
        np.testing.assert_allclose(worlds.task_return, done)
        watch.acted()
        reward.append(env.reward / env.goals - 1 / env.limit)
        terminated.append(env.terminated.copy())
        truncated.append(env.truncated & ~env.terminated)
        tells.append(done.copy())
        ended = worlds.settle()
        done[ended] = 0
        watch.settled(ended)
        begun.append((tracker.age == 0) & (tracker.kind >= 0))
    turns, decisions = watch.finish()
    return Played(turns, decisions, np.array(reward), np.array(terminated), np.array(truncated), tells, begun,
                  sum(len(r.place) for r in watch.reviews))  # fmt: skip


@pytest.mark.parametrize("name", WORLDS)
def test_turns_tile_the_time_of_each_agent(name: str) -> None:
    """From its first turn to the end nothing is left out and nothing counted twice: steps, rewards, episodes."""
    worlds, planner = team_of(name)
    steps = 150
    seen = play(worlds, planner, steps)
    turns, env = seen.turns, worlds.env
    W, A = env.num_envs, env.num_agents
    assert turns.discount_steps is not None and (turns.discount_steps > 0).all()
    over = seen.terminated | seen.truncated
    assert over.any(), "an episode ends, or the test shows nothing"
    assert turns.discount_steps.sum() == steps * W * A
    np.testing.assert_allclose(turns.reward.sum(), A * seen.reward.sum(), rtol=1e-5)
    # A trajectory an agent and episode, that of those cut off at the end too.
    unfinished = ~over[-1]
    lengths, rewards = [], []
    for w in range(W):
        bounds = [0, *(np.flatnonzero(over[:, w]) + 1), *([steps] if unfinished[w] else [])]
        lengths += [b - a for a, b in itertools.pairwise(bounds)] * A
        rewards += [seen.reward[a:b, w].sum() for a, b in itertools.pairwise(bounds)] * A
    paths = np.unique(turns.trajectory)
    assert len(turns.last) == len(paths) == len(lengths)
    of = [turns.trajectory == p for p in paths]
    assert sorted(int(turns.discount_steps[own].sum()) for own in of) == sorted(lengths)
    np.testing.assert_allclose(sorted(turns.reward[own].sum() for own in of), sorted(rewards), atol=1e-4)
    # Done where it really ended, and only at a trajectory's last turn.
    assert turns.done.sum() == A * seen.terminated.sum()
    assert not turns.done[np.flatnonzero(np.diff(turns.trajectory) == 0)].any()
    # Those given at the last settling have no step yet.
    assert len(turns) == sum(int(given.sum()) for given in seen.begun[:-1])


def test_an_episode_of_a_turn_is_what_was_done_less_what_it_took() -> None:
    worlds, planner = team_of(num_envs=8, limit=400)
    seen = play(worlds, planner, 120)
    first = np.array([np.flatnonzero(x)[0] if x.any() else -1 for x in seen.terminated.T])
    assert (first >= 0).any()
    for w in np.flatnonzero(first >= 0):
        took = first[w] + 1
        np.testing.assert_allclose(seen.reward[:took, w].sum(), 1 - took / 400, atol=1e-5)


def test_a_truncated_episode_keeps_its_true_last_observation() -> None:
    """Nothing is left of the time, what was done is counted, and it isn't done; the next one begins afresh."""
    worlds, planner = team_of(num_envs=4, limit=25, num_packages=9)
    seen = play(worlds, planner, 60)
    turns = seen.turns
    assert seen.truncated[24].all() and seen.truncated[49].all() and not turns.done.any()
    left = turns.last[:, FEATURES]
    assert ((left == 0).sum(), len(left)) == (2 * 4 * 3, 3 * 4 * 3)
    undone = 1 - np.concatenate([seen.tells[24], seen.tells[49], seen.tells[59]]) / 9
    assert undone.min() < 1
    np.testing.assert_allclose(np.sort(turns.last[:, FEATURES + 1]), np.sort(undone.repeat(3)), atol=1e-6)
    first = turns.before[turns.first]
    assert not first[:, :FEATURES].any(), "a new episode begins without a subgoal"
    assert (first[:, FEATURES : FEATURES + 2] == 1).all() and (turns.after[turns.first][:, :FEATURES].any(1)).all()


def test_what_critics_see_goes_on_from_window_to_window() -> None:
    """A recording that begins in the middle of an episode knows what was done before, and leaves out what was begun."""
    worlds, planner = team_of("repair", num_envs=8, num_machines=8, size=14, limit=600)
    seen = play(worlds, planner, 30)
    assert (worlds.task_return > 0).any() and not (seen.terminated | seen.truncated).any()
    busy = worlds.tracker.kind > 0  # type: ignore[union-attr]
    later = play(worlds, planner, 12, settle=False)
    done = later.tells[-1]
    assert (done > 0).any()
    assert later.turns.last[:, FEATURES + 1] == pytest.approx(
        [1 - done[w] / 8 for w in started(later)], abs=1e-6
    )  # fmt: skip
    assert busy.any() and later.turns.discount_steps is not None
    assert later.turns.discount_steps.sum() < 12 * 8 * 3, "turns under way when it began are left out"
    assert (later.turns.before[later.turns.first][:, :FEATURES].any(1)).any(), "their first sees the subgoal that ended"


def started(seen: Played) -> list[int]:
    """The world of each trajectory of a recording in which no episode ended, in the order in which they began."""
    begun: dict[tuple[int, int], None] = {}
    for given in seen.begun[:-1]:
        for w, a in zip(*(x.tolist() for x in np.nonzero(given)), strict=True):
            begun.setdefault((w, a))
    return [w for w, _ in begun]


def test_rewards_are_discounted_to_the_turns_first_step() -> None:
    worlds, planner = team_of(num_envs=3, num_agents=1, limit=50)
    seen = play(worlds, planner, 40, gamma=0.9)
    turns = seen.turns
    assert turns.discount_steps is not None
    for w in range(3):
        own = turns.trajectory == w  # one agent a world: the first trajectories begin in the worlds' order
        at = 0
        for reward, took in zip(turns.reward[own], turns.discount_steps[own], strict=True):
            want = sum(0.9**k * seen.reward[at + k, w] for k in range(took))
            assert reward == pytest.approx(want, abs=1e-6)
            at += took


@pytest.mark.parametrize("name", WORLDS)
def test_the_decisions_of_turns_are_the_planners(name: str) -> None:
    """Each is named by one turn at most, and was as probable as the model's numbers say."""
    model = Hashed()
    worlds, planner = team_of(name, model=model, subgoals={"review": 4})
    seen = play(worlds, planner, 80)
    turns, decisions = seen.turns, seen.decisions
    scores = torch.tensor([model.odds(item) for item in decisions.items], dtype=torch.float32)
    np.testing.assert_allclose(log_probabilities(scores, decisions)[0], decisions.logp, atol=1e-5)
    assert len(set(decisions.items)) == len(decisions.items)
    chose, reviewed = turns.choice >= 0, turns.review >= 0
    named = np.concatenate([turns.choice[chose], turns.review[reviewed]])
    assert len(np.unique(named)) == len(named)
    # Those of the last settling alone have no turn yet, or tries that came to nothing.
    assert len(decisions) - len(named) <= 3 * worlds.env.num_envs
    assert not decisions.binary[turns.choice[chose]].any() and decisions.binary[turns.review[reviewed]].all()
    # What was reviewed and kept is a turn without a choice; what was taken back one with a new subgoal.
    switched = decisions.chosen[turns.review[reviewed]] == 1
    np.testing.assert_array_equal(turns.switch[reviewed], switched)
    assert switched.any() and not switched.all()
    assert turns.switch[~reviewed].all() and not (chose & ~turns.switch).any()
    # Somebody had only one subgoal to choose: a turn without a decision.
    assert (turns.switch & ~chose).any()
    assert (decisions.open[turns.choice[chose]].sum(1) > 1).all()
    for item in {decisions.items[i] for i in decisions.options[turns.review[reviewed], 0]}:
        assert item.startswith("go on: ")


def test_who_keeps_always_has_turns_of_the_reviews_length() -> None:
    worlds, planner = team_of(model=Hashed(keep=50.0), subgoals={"review": 3}, size=16)
    seen = play(worlds, planner, 40)
    reviewed = seen.turns.review >= 0
    assert seen.reviewed > 0 and not seen.turns.switch[reviewed].any()
    assert seen.turns.discount_steps is not None and seen.turns.discount_steps.max() <= 4
    worlds, planner = team_of(model=Hashed(keep=-50.0), subgoals={"review": 3}, size=16)
    seen = play(worlds, planner, 40)
    assert seen.turns.switch.all() and seen.reviewed > 0


def test_a_recording_of_nothing_is_empty() -> None:
    worlds, planner = team_of()
    worlds.start()
    watch = TurnRecorder(worlds, planner)
    watch.begin()
    turns, decisions = watch.finish()
    assert len(turns) == len(decisions) == 0 and turns.last.shape == (0, FEATURES_OF_A_TURN)
    assert turns.discount_steps is not None
    assert not planner.explore and planner.on_choices is None and planner.on_reviews is None


def test_a_planner_that_has_learnt_is_asked_again_what_it_was_asked() -> None:
    worlds, planner = team_of()
    watch = TurnRecorder(worlds, planner)
    watch.begin()
    worlds.start()
    watch.settled(np.ones(6, bool))
    watch.finish()
    planner.model.reach = -2.0  # type: ignore[attr-defined]
    before = planner.fresh
    watch.renew()
    places = np.unique(np.concatenate([c.places.ravel() for c in watch.choices]))
    assert planner.fresh - before == (places >= 0).sum()


# -- episodes and blueprints -------------------------------------------------------------------


def record(
    worlds: TeamWorlds, planner: LLMPlanner, group: int, **options: Any
) -> tuple[EpisodeRecorder, Any, Any, Any]:
    """Play the first episode of each world: recorder, what of it came by step, decisions and their worlds."""
    watch = EpisodeRecorder(worlds, planner)
    watch.begin()
    worlds.begin_together(group)
    watch.given()
    env, executor, seen = worlds.env, PIBTExecutor(worlds), []
    while watch.running.any():
        worlds.advance(executor.act(worlds))
        seen.append((env.pos.copy(), env.task_status.copy(), env.reward.copy(), watch.running.copy()))
        watch.acted()
        watch.settled(worlds.settle())
    return watch, seen, *watch.finish()


@pytest.mark.parametrize("name", WORLDS)
def test_an_episodes_score_is_what_was_done_less_what_it_took(name: str) -> None:
    worlds, planner = team_of(name, num_envs=6)
    env = worlds.env
    watch, seen, decisions, of = record(worlds, planner, 3)
    score = np.zeros(6)
    for _, _, reward, running in seen:
        score += np.where(running, reward / env.goals - 1 / env.limit, 0)
    np.testing.assert_allclose(watch.scores, score, atol=1e-5)
    assert len(np.unique(watch.scores.round(4))) > 2, "plans that are drawn differ"
    assert len(of) == len(decisions) > 0 and set(of.tolist()) <= set(range(6))
    assert worlds.active.all() and not planner.explore and planner.on_choices is None
    # What was chosen when there was a choice is in the blueprint; and what was forced.
    assert (watch.blueprint[..., 0] >= 0).sum() >= len(decisions)
    assert worlds.episodes.count == 6, "each world's first counts, and no other"


def test_worlds_of_a_group_play_the_same_episode() -> None:
    worlds, planner = team_of(num_envs=8)
    env = worlds.env
    watch = EpisodeRecorder(worlds, planner)
    watch.begin()
    worlds.begin_together(4)
    for x in (env.pos, env.task_cell, env.grid):
        np.testing.assert_array_equal(x, x[::4].repeat(4, 0))
    assert (env.pos[0] != env.pos[4]).any() or (env.task_cell[0] != env.task_cell[4]).any()


@pytest.mark.parametrize("rest", [True, False])
def test_nobody_plans_for_a_world_whose_episode_is_over(rest: bool) -> None:
    """… or, where the executors learn from those steps too, somebody does, but it isn't recorded."""
    worlds, planner = team_of(num_envs=6, num_packages=3)
    tracker = worlds.tracker
    assert tracker is not None
    watch = EpisodeRecorder(worlds, planner, rest=rest)
    watch.begin()
    worlds.begin_together(3)
    watch.given()
    executor, idle, of = PIBTExecutor(worlds), [], []
    while watch.running.any():
        worlds.advance(executor.act(worlds))
        watch.acted()
        heard = len(watch.choices)
        watch.settled(worlds.settle())
        of += [int(w) for c in watch.choices[heard:] for w in c.world if not watch.running[w]]
        idle += (tracker.kind[~watch.running] < 0).all(1).tolist()
    assert idle and (all(idle) if rest else not any(idle))
    assert not of, "what is decided after its first episode is none of a world's blueprint"
    _, worlds_of = watch.finish()
    assert len(worlds_of) == sum(len(c.world) for c in watch.choices)


PLANS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("warehouse", {}, {}),
    ("warehouse", {"num_agents": 4, "num_packages": 3}, {"scope": "team"}),
    ("warehouse", {}, {"on_reached": False, "on_timeout": False, "every": 20}),
    ("search", {"num_agents": 4, "regions": 2}, {}),
    ("repair", {"num_agents": 4, "num_machines": 4}, {}),
]


@pytest.mark.parametrize(("name", "env", "subgoals"), PLANS)
def test_a_blueprint_carried_out_again_is_the_same_episode(
    name: str, env: dict[str, Any], subgoals: dict[str, Any]
) -> None:
    """Same task, same executor, same plan: every step comes out the same; also where robots had to wait for others."""
    worlds, planner = team_of(name, num_envs=16, subgoals=subgoals, **env)
    world = worlds.env
    first = world.counters.reshape(-1, 4).max(1).repeat(4)
    watch, seen, _, _ = record(worlds, planner, 4)
    planner.model.reach = -7.0  # type: ignore[attr-defined]  # it would plan otherwise now
    planner.forget()
    again = Blueprints(planner, watch.blueprint, worlds)
    worlds.planners[0] = (again, worlds.planners[0][1])
    worlds.plan_time[again.name] = worlds.plan_time[planner.name]
    world.counters[:] = first
    worlds.begin_together(4)
    executor = PIBTExecutor(worlds)
    for pos, status, reward, running in seen:
        worlds.advance(executor.act(worlds))
        for now, then in ((world.pos, pos), (world.task_status, status), (world.reward, reward)):
            np.testing.assert_array_equal(now[running], then[running])
        again.acted()
        again.settled(worlds.settle())


def test_what_a_blueprint_can_not_do_is_skipped_and_then_another_plans() -> None:
    worlds, planner = team_of(num_envs=2, num_agents=2, num_packages=3)
    tracker = worlds.tracker
    assert tracker is not None
    fetch = 4
    # Both want package 0; a package that doesn't exist; the second agent of the second world has no plan at all.
    plans = np.full((2, 2, 2, 2), -1, np.int16)
    plans[0] = [[(fetch, 0), (fetch, 1)], [(fetch, 0), (fetch, 2)]]
    plans[1, 0] = [(fetch, 9), (fetch, 2)]
    blueprints = Blueprints(planner, plans, worlds)
    request = tracker.request(np.arange(2), distance=True)
    plan = blueprints.plan(request)
    assert plan.task[0].tolist() == [0, 2]
    assert plan.task[1, 0] == 2 and plan.kind[1, 1] == fetch and plan.task[1, 1] in (0, 1)
    assert not tracker.check(request, plan, request.need).any()
    refused = tracker.request(np.arange(2), distance=True)
    refused.refused[:] = refused.candidates.task == 2
    blueprints._at[:] = 0
    again = blueprints.plan(refused)
    assert again.task[0].tolist() == [0, 1] and again.task[1, 0] in (0, 1), "what was refused is skipped, too"
    # Each goes on in its own list, and begins again with an episode.
    worlds.env.truncated[0] = True
    blueprints.acted()
    again = blueprints.plan(tracker.request(np.arange(2), distance=True))
    assert again.task[0].tolist() == [0, 2]


def test_a_world_repeats_its_episode() -> None:
    """Again and again the same beginning, whenever it ends; without it another."""
    worlds, _ = team_of(num_envs=4, limit=20)
    env = worlds.env
    first = env.counters.copy()
    worlds.begin_together(2)
    start = env.pos.copy(), env.task_cell.copy(), env.grid.copy()
    worlds.repeat = first
    executor, ended = PIBTExecutor(worlds), 0
    for _ in range(70):
        worlds.advance(executor.act(worlds))
        done = worlds.settle()
        ended += int(done.sum())
        for now, then in zip((env.pos, env.task_cell, env.grid), start, strict=True):
            np.testing.assert_array_equal(now[done], then[done])
    assert ended >= 8
    worlds.repeat = None
    ended = 0
    for _ in range(20):
        worlds.advance(executor.act(worlds))
        for w in np.flatnonzero(worlds.settle()):
            ended += 1
            assert (env.pos[w] != start[0][w]).any() or (env.task_cell[w] != start[1][w]).any()
    assert ended >= 4


@pytest.mark.parametrize("name", WORLDS)
def test_first_episodes_are_each_worlds_first(name: str) -> None:
    """Success and length are those of an independent count, and nobody plans for who is done."""
    worlds, _ = team_of(name, num_envs=8, limit=60)
    twin, _ = team_of(name, num_envs=8, limit=60)
    executor, other = PIBTExecutor(worlds), PIBTExecutor(twin)
    active: list[list[int]] = []

    def acted() -> None:
        assert worlds.active.sum() == (active[-1][1] if active else 8), "those that took this step"
        active.append([int(worlds.active.sum())])

    def settled(ended: NDArray[np.bool_]) -> None:
        assert not (worlds.active & ended).any()
        assert worlds.tracker is not None and (worlds.tracker.kind[~worlds.active] < 0).all()
        active[-1].append(int(worlds.active.sum()))

    worlds.start()
    success, steps = first_episodes(worlds, executor.act, acted, settled)
    twin.start()
    over: dict[int, tuple[bool, int]] = {}
    for step in range(1, 61):
        twin.advance(other.act(twin))
        for w in range(8):
            if twin.env.terminated[w] or twin.env.truncated[w]:
                over.setdefault(w, (bool(twin.env.terminated[w]), step))
        twin.settle()
    assert [over[w] for w in range(8)] == list(zip(success.tolist(), steps.tolist(), strict=True))
    assert len(active) == steps.max() and active[-1] == [(steps == steps.max()).sum(), 0]


def test_who_can_be_asked_to_keep_a_subgoal_is_no_matter_of_its_class() -> None:
    _, planner = team_of()
    assert isinstance(planner, Reviewer) and planner.reviews
    letters = LLMPlanner(Hashed(), folder=PROMPTS / "letters")
    assert isinstance(letters, Reviewer) and not letters.reviews
    assert not isinstance(Hungarian(), Reviewer)


# -- lessons -----------------------------------------------------------------------------------


def test_lessons_are_the_teachers_choices() -> None:
    worlds, planner = team_of("repair", num_envs=4)
    lessons = Lessons(Hungarian(), planner)
    worlds.planners[0] = (lessons, worlds.planners[0][1])
    worlds.plan_time[lessons.name] = worlds.plan_time[planner.name]
    twin, _ = team_of("repair", num_envs=4)
    twin.planners[0] = (Hungarian(), twin.planners[0][1])
    twin.plan_time["hungarian"] = worlds.plan_time[planner.name]
    executor, other = PIBTExecutor(worlds), PIBTExecutor(twin)
    worlds.start()
    twin.start()
    for _ in range(40):
        worlds.advance(executor.act(worlds))
        twin.advance(other.act(twin))
        worlds.settle()
        twin.settle()
    np.testing.assert_array_equal(worlds.env.pos, twin.env.pos)
    decisions = decisions_of(planner, lessons.choices, [])
    assert len(decisions) == sum(len(c.world) for c in lessons.choices) > 20
    assert not decisions.binary.any() and (decisions.open.sum(1) >= 2).all()
    assert all(not item.startswith("go on") for item in decisions.items)
