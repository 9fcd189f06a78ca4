"""Worlds, planners and subgoals joined: planners that lie, rewards, episodes, batches, traces, checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from echelon.envs import SubgoalKind, make
from echelon.envs.kernels import UNREACHABLE, WALL
from echelon.llm.choice import ChoicePrompt, ChoiceScores
from echelon.planners import Planner, StatelessPlanner, make_rule_planner
from echelon.planners.llm import LLMPlanner
from echelon.rollout import PlanTrace, TeamWorlds
from echelon.subgoals import FEATURES, Counts, Plan, PlanRequest, SubgoalConfig, SubgoalTracker

SMALL: dict[str, Any] = {"size": 9, "num_agents": 3, "num_packages": 4, "num_zones": 1, "limit": 60}


class Guess:
    """A model whose preferences are a function of the prompt alone."""

    name = "guess"

    def score(self, prompts: Sequence[ChoicePrompt]) -> list[ChoiceScores]:
        out = []
        for prompt in prompts:
            rng = np.random.default_rng(sum(prompt.text.encode()))
            w = rng.random(len(prompt.options)) + 0.01
            out.append(ChoiceScores(np.log(w / w.sum()).astype(np.float32), 1))
        return out


def planner_of(name: str) -> Planner:
    return LLMPlanner(Guess()) if name == "llm" else make_rule_planner(name)


def worlds_of(
    planner: Planner | str | None = "nearest", num_envs: int = 4, seed: int = 0, *, world: str = "warehouse",
    env: dict[str, Any] = SMALL, on_plan: Callable[[PlanTrace], None] | None = None, trace_all: bool = False,
    collision_cost: float = 0.0, **config: Any,
) -> TeamWorlds:  # fmt: skip
    """Worlds that one planner (None: nobody) plans, not started yet."""
    if isinstance(planner, str):
        planner = planner_of(planner)
    batch = make(world, num_envs=num_envs, seed=seed, extra_features=FEATURES if planner else 0, **env)
    planners = [(planner, np.ones(num_envs, bool))] if planner else []
    return TeamWorlds(
        batch, planners, SubgoalConfig(**config), gamma=0.99, seed=seed, on_plan=on_plan, trace_all=trace_all,
        collision_cost=collision_cost,
    )  # fmt: skip


def tracker_in(worlds: TeamWorlds) -> SubgoalTracker:
    assert worlds.tracker is not None
    return worlds.tracker


def walk(worlds: TeamWorlds, rng: np.random.Generator, careless: float = 0.2) -> NDArray[np.int8]:
    """Moves that follow the subgoals' shortest paths, some of them random, so that episodes end both ways."""
    env = worlds.env
    actions = rng.integers(0, 5, worlds.reward.shape).astype(np.int8)
    if worlds.tracker is not None:
        on = worlds.tracker.field[np.arange(env.num_envs)[:, None, None], np.arange(env.num_agents)[None, :, None],
                                  env.pos[..., None] + env.offsets]  # fmt: skip
        own = rng.random(actions.shape) >= careless
        actions[own] = on.argmin(-1)[own]
    return actions


def only_legal_in_flight(worlds: TeamWorlds) -> None:
    """Every agent has a subgoal on a free cell that it can reach, and no open task is held twice."""
    tracker, env = tracker_in(worlds), worlds.env
    assert not tracker.need.any()
    assert ((tracker.kind >= 0) & (tracker.kind < len(SubgoalKind))).all()
    assert ((tracker.task >= -1) & (tracker.task < env.num_tasks)).all()
    assert not (np.take_along_axis(env.grid, tracker.cell, 1) & WALL).any()
    here = np.take_along_axis(tracker.field, env.pos[..., None].astype(np.int64), 2)[..., 0]
    assert (here != UNREACHABLE).all()
    for w in range(env.num_envs):
        held = [int(t) for k, t in zip(tracker.kind[w], tracker.task[w], strict=True) if k == SubgoalKind.FETCH]
        assert len(set(held)) == len(held)
        for a in np.flatnonzero(tracker.kind[w] == SubgoalKind.DELIVER):
            assert env.carrying[w, a] == tracker.task[w, a]


# -- planners that lie ----------------------------------------------------------------------------------------------


class Liar(StatelessPlanner):
    """Says whatever `say` makes of a plan in which all wait."""

    name = "liar"

    def __init__(self, say: Callable[[PlanRequest, Plan], Plan | None]) -> None:
        self.say, self.calls = say, 0
        self.needs: list[NDArray[np.bool_]] = []
        self.rejected: list[NDArray[np.int8]] = []

    def plan(self, request: PlanRequest) -> Plan:
        self.calls += 1
        self.needs.append(request.need.copy())
        self.rejected.append(request.rejected.copy())
        plan = Plan.empty(request)
        return self.say(request, plan) or plan


def into_walls(request: PlanRequest, plan: Plan) -> None:
    plan.kind[:], plan.cell[:] = SubgoalKind.CELL, 0


def nonsense(request: PlanRequest, plan: Plan) -> None:
    plan.kind[:], plan.cell[:], plan.task[:] = -128, -(2**31), -(2**15)


def all_the_first_task(request: PlanRequest, plan: Plan) -> None:
    for name in ("kind", "cell", "task"):
        getattr(plan, name)[:] = getattr(request.candidates, name)[:, :, 0]


def extremes(rng: np.random.Generator) -> Callable[[PlanRequest, Plan], Plan]:
    def say(request: PlanRequest, plan: Plan) -> Plan:
        for x in (plan.kind, plan.cell, plan.task):
            info = np.iinfo(x.dtype)
            x[:] = rng.choice([info.min, info.max, -1, 0, 1, 4, 5, *rng.integers(0, 200, 4) % 128], x.shape)
        return plan

    return say


@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize(("say", "verdict"), [(into_walls, "illegal"), (nonsense, "form")])
def test_who_always_lies_is_asked_again_then_the_nearest_task_is_given(
    say: Callable[[PlanRequest, Plan], None], verdict: str, retries: int
) -> None:
    """Worlds that a liar plans go exactly as worlds that the nearest planner plans."""
    liar = Liar(lambda request, plan: say(request, plan))
    lied, honest = worlds_of(liar, retries=retries), worlds_of("nearest", retries=retries)
    rng, rounds, given = np.random.default_rng(0), 0, 0
    lied.start()
    honest.start()
    for _ in range(150):
        only_legal_in_flight(lied)
        actions = walk(lied, rng)
        for worlds in (lied, honest):
            worlds.advance(actions)
            worlds.settle()
        np.testing.assert_array_equal(lied.obs, honest.obs)
        np.testing.assert_array_equal(tracker_in(lied).cell, tracker_in(honest).cell)
        np.testing.assert_array_equal(lied.reward, honest.reward)
    assert lied.episodes.count > 0
    counts = tracker_in(lied).counts
    rounds, given = len(liar.needs), counts.given
    assert liar.calls == rounds
    assert rounds % (retries + 1) == 0
    assert counts.given == tracker_in(honest).counts.given
    assert counts.retried == retries * given
    assert counts.fallback == given
    assert counts.rejected == {"form": 0, "illegal": 0, "unreachable": 0, "duplicate": 0} | {
        verdict: (retries + 1) * given
    }
    for k, (need, rejected) in enumerate(zip(liar.needs, liar.rejected, strict=True)):
        again = k % (retries + 1) > 0
        assert (rejected[need] != 0).all() == again, "it is told what was wrong"
        if again:
            np.testing.assert_array_equal(need, liar.needs[k - 1])


def test_who_gives_all_one_task_is_asked_again_only_about_the_others() -> None:
    liar = Liar(all_the_first_task)
    worlds = worlds_of(liar, num_envs=1, retries=1)
    worlds.start()
    assert liar.needs[0].tolist() == [[True, True, True]]
    assert liar.needs[1].tolist() == [[False, True, True]]
    tracker = tracker_in(worlds)
    assert tracker.counts.rejected["duplicate"] == 4
    assert (tracker.counts.retried, tracker.counts.fallback, tracker.counts.given) == (2, 2, 3)
    assert tracker.task[0, 0] == 0
    assert sorted(tracker.task[0]) == sorted(set(tracker.task[0]))
    rng = np.random.default_rng(1)
    for _ in range(120):
        worlds.advance(walk(worlds, rng))
        worlds.settle()
        only_legal_in_flight(worlds)
    assert worlds.episodes.success > 0, "it gets done all the same"


@pytest.mark.parametrize("retries", [0, 3])
def test_garbage_never_gets_into_flight(retries: int) -> None:
    liar = Liar(extremes(np.random.default_rng(2)))
    worlds = worlds_of(liar, num_envs=6, retries=retries)
    worlds.start()
    rng = np.random.default_rng(3)
    for _ in range(150):
        only_legal_in_flight(worlds)
        before, needing = liar.calls, None
        worlds.advance(walk(worlds, rng))
        needing = tracker_in(worlds).need.any() or (worlds.env.terminated | worlds.env.truncated).any()
        worlds.settle()
        assert int(needing) <= liar.calls - before <= (retries + 1) * int(needing)
    counts = tracker_in(worlds).counts
    assert counts.fallback > 0
    assert counts.rejected["form"] > 0
    assert counts.retried + counts.fallback == sum(counts.rejected.values())
    assert worlds.episodes.count > 0


def test_a_good_second_answer_needs_no_fallback() -> None:
    def say(request: PlanRequest, plan: Plan) -> Plan:
        if not request.rejected.any():
            into_walls(request, plan)
            return plan
        return make_rule_planner("random").plan(request)

    worlds = worlds_of(Liar(say))
    worlds.start()
    counts = tracker_in(worlds).counts
    assert (counts.retried, counts.fallback, counts.given) == (12, 0, 12)
    assert (tracker_in(worlds).kind == SubgoalKind.CELL).all()


def test_a_fallback_with_nothing_to_do_is_a_wait() -> None:
    worlds = worlds_of(Liar(into_walls), num_envs=2, env=SMALL | {"num_packages": 1})
    worlds.start()
    assert sorted(tracker_in(worlds).kind[0]) == [SubgoalKind.WAIT, SubgoalKind.WAIT, SubgoalKind.FETCH]


# -- rewards, cuts, flat teams --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task_weight", "intrinsic_weight", "cost"), [(0.0, 1.0, 0.0), (0.5, 2.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.3)]
)
def test_an_executors_reward_is_the_stated_mix(task_weight: float, intrinsic_weight: float, cost: float) -> None:
    worlds = worlds_of(num_envs=6, task_weight=task_weight, intrinsic_weight=intrinsic_weight, collision_cost=cost)
    worlds.start()
    rng, tracker, env = np.random.default_rng(0), tracker_in(worlds), worlds.env
    reached = delivered = bumped = 0
    for _ in range(150):
        worlds.advance(walk(worlds, rng))
        own = intrinsic_weight * tracker.reward + task_weight * env.reward[:, None] - cost * env.bumped
        np.testing.assert_allclose(worlds.reward, own, rtol=1e-5, atol=1e-6)
        now = tracker.outcome == 1
        # A subgoal that is over ends an executor's task, unless the task reward goes on beyond it.
        np.testing.assert_array_equal(worlds.cut, (tracker.outcome != 0) & (task_weight == 0))
        reached, delivered, bumped = reached + now.sum(), delivered + env.reward.sum(), bumped + env.bumped.sum()
        worlds.settle()
    assert reached > 20
    assert delivered > 10
    assert bumped > 0
    assert tracker.counts.reached == reached


def test_a_flat_team_has_no_tracker_and_shares_its_reward() -> None:
    worlds = worlds_of(None, num_envs=6)
    worlds.start()
    env = worlds.env
    assert worlds.tracker is None
    assert worlds.team_reward
    assert worlds.obs.shape[2] == len(worlds.obs_scale) == env.obs_size
    rng, total = np.random.default_rng(0), 0.0
    for _ in range(300):
        worlds.advance(walk(worlds, rng))
        assert (worlds.reward == env.reward[:, None]).all()
        assert not worlds.cut.any()
        total += float(env.reward.sum())
        np.testing.assert_array_equal(worlds.settle(), worlds.begins)
    assert total > 0
    assert set(worlds.state_dict()) == {f"env.{k}" for k in env.state_dict()} | {"begins", "sums"}


def test_executors_see_their_subgoals_behind_the_worlds_own_features() -> None:
    worlds = worlds_of("hungarian")
    assert not worlds.team_reward
    assert worlds.obs.shape[2] == len(worlds.obs_scale) == worlds.env.obs_size + FEATURES
    worlds.start()
    rng = np.random.default_rng(0)
    for _ in range(80):
        worlds.advance(walk(worlds, rng))
        worlds.settle()
        # Also right after a reset and a replan: what is seen is what is in flight.
        kinds = worlds.obs[:, :, worlds.env.obs_size : worlds.env.obs_size + 8]
        np.testing.assert_array_equal(kinds.argmax(-1), tracker_in(worlds).kind)
        assert (kinds.sum(-1) == 1).all()
        here = np.take_along_axis(tracker_in(worlds).field, worlds.env.pos[..., None].astype(np.int64), 2)[..., 0]
        np.testing.assert_array_equal(worlds.obs[:, :, worlds.env.obs_size + 13], np.minimum(here, 127))


# -- episodes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planner", ["hungarian", None])
def test_sums_over_episodes_agree_with_an_independent_tally(planner: str | None) -> None:
    worlds = worlds_of(planner, num_envs=5, env=SMALL | {"num_packages": 2, "limit": 40})
    worlds.start()
    env, rng = worlds.env, np.random.default_rng(4)
    lengths, task, own, hits = (np.zeros(5) for _ in range(4))
    tally = {"count": 0, "success": 0, "length_of_success": 0.0, "task_return": 0.0, "intrinsic_return": 0.0,
             "collisions": 0.0}  # fmt: skip
    taken = dict.fromkeys(tally, 0.0)
    for step in range(400):
        worlds.advance(walk(worlds, rng, 0.5))
        lengths += 1
        task += env.reward
        hits += env.collisions
        if worlds.tracker is not None:
            own += worlds.tracker.reward.mean(1)
        np.testing.assert_array_equal(env.steps, lengths)
        success, over = env.terminated.copy(), env.truncated.copy()
        assert not (success & over).any()
        assert (over == (~success & (lengths == 40))).all()
        done = worlds.settle()
        np.testing.assert_array_equal(done, success | over)
        np.testing.assert_array_equal(worlds.begins, done)
        for w in np.flatnonzero(done):
            assert task[w] == 2 or not success[w]
            news = (1, success[w], lengths[w] * success[w], task[w], own[w], hits[w])
            for name, x in zip(tally, news, strict=True):
                tally[name] += x
        for x in (lengths, task, own, hits):
            x[done] = 0
        if step % 90 == 0:
            for name in taken:
                taken[name] += getattr(worlds.episodes, name)
            worlds.take_episodes()
    last = worlds.take_episodes()
    for name, wanted in tally.items():
        assert taken[name] + getattr(last, name) == pytest.approx(wanted, rel=1e-6), name
    assert worlds.take_episodes().count == 0
    assert tally["success"] < tally["count"]
    assert planner is None or tally["success"] > 0


@pytest.mark.parametrize("limit", [12, 400])
def test_the_true_last_observation_is_seen_before_the_reset(limit: int) -> None:
    worlds = worlds_of("nearest", num_envs=4, env=SMALL | {"num_packages": 1, "limit": limit})
    worlds.start()
    env, rng, ends = worlds.env, np.random.default_rng(0), 0
    time = env._own_start
    for _ in range(150):
        worlds.advance(walk(worlds, rng, 0.0))
        seen, done = worlds.obs.copy(), env.terminated | env.truncated
        state = env.states(np.empty((4, env.state_size), np.int8))
        left = 127 * (limit - env.steps) // limit
        np.testing.assert_array_equal(seen[:, :, time], np.repeat(left[:, None], 3, 1))
        np.testing.assert_array_equal(state[:, 0], left)
        assert (env.task_status[env.terminated] == 2).all()
        assert (env.steps[env.truncated] == limit).all()
        worlds.settle()
        np.testing.assert_array_equal(env.final_obs[done], seen[done][:, :, : env.obs_size])
        assert (worlds.obs[done][:, :, time] == 127).all(), "after it, the new episode's first"
        np.testing.assert_array_equal(worlds.obs[~done][:, :, : env.obs_size], seen[~done][:, :, : env.obs_size])
        ends += int(done.sum())
    assert ends > 10


# -- batches --------------------------------------------------------------------------------------------------------


def history(worlds: TeamWorlds, steps: int, seed: int, world: int | None = None) -> list[dict[str, NDArray[Any]]]:
    """Copies of all that a step leaves behind, for all worlds or one; actions are drawn for each world apart."""
    env = worlds.env
    rngs = [np.random.default_rng([seed, w]) for w in range(env.num_envs)]
    rows = slice(None) if world is None else slice(world, world + 1)
    out = []
    for _ in range(steps):
        actions = np.stack([rng.integers(0, 5, env.num_agents) for rng in rngs]).astype(np.int8)
        if worlds.tracker is not None:
            on = worlds.tracker.field[np.arange(env.num_envs)[:, None, None], np.arange(env.num_agents)[None, :, None],
                                      env.pos[..., None] + env.offsets]  # fmt: skip
            own = np.stack([rng.random(env.num_agents) < 0.8 for rng in rngs])
            actions[own] = on.argmin(-1)[own]
        worlds.advance(actions)
        now = {"seen": worlds.obs, "reward": worlds.reward, "cut": worlds.cut, "actions": actions}
        kept = {k: v[rows].copy() for k, v in now.items()}
        now = {"done": worlds.settle(), "obs": worlds.obs, "mask": worlds.mask, "begins": worlds.begins}
        if worlds.tracker is not None:
            now |= worlds.tracker.state_dict()
        out.append(kept | {k: v[rows].copy() for k, v in now.items()})
    return out


def same(first: list[dict[str, NDArray[Any]]], second: list[dict[str, NDArray[Any]]]) -> None:
    for t, (x, y) in enumerate(zip(first, second, strict=True)):
        assert x.keys() == y.keys()
        for name, array in x.items():
            np.testing.assert_array_equal(array, y[name], err_msg=f"{name} at step {t}")


@pytest.mark.parametrize(
    ("planner", "config"),
    [
        ("hungarian", {}), ("random", {}), ("random-task", {"space": "cell", "every": 5}), ("llm", {"scope": "team"}),
        (None, {}),
    ],
)  # fmt: skip
def test_a_world_does_not_depend_on_the_batch(planner: str | None, config: dict[str, Any]) -> None:
    alone, batch = worlds_of(planner, 1, seed=5, **config), worlds_of(planner, 8, seed=5, **config)
    alone.start()
    batch.start()
    first = history(alone, 300, 0)
    same(first, history(batch, 300, 0, world=0))
    assert sum(step["done"].any() for step in first) > 3
    more = worlds_of(planner, 5, seed=5, **config)
    more.start()
    again = worlds_of(planner, 8, seed=5, **config)
    again.start()
    same(history(more, 60, 0, world=4), history(again, 60, 0, world=4))


def test_each_planner_plans_its_own_worlds() -> None:
    """Half by one, half by the other: each half goes as if its planner had all."""
    mine = np.array([True, False, True, False])
    env = make("warehouse", num_envs=4, seed=2, extra_features=FEATURES, **SMALL)
    planners = [(planner_of("hungarian"), mine), (planner_of("random"), ~mine)]
    mixed = TeamWorlds(env, planners, SubgoalConfig(), gamma=0.99, seed=2)
    mixed.start()
    both = history(mixed, 100, 0)
    for name, half in (("hungarian", mine), ("random", ~mine)):
        worlds = worlds_of(name, 4, seed=2)
        worlds.start()
        whole = history(worlds, 100, 0)
        same([{k: v[half] for k, v in step.items()} for step in both],
             [{k: v[half] for k, v in step.items()} for step in whole])  # fmt: skip
        assert mixed.plan_time[name].rounds > 4


def test_worlds_that_are_not_active_are_not_planned() -> None:
    liar = Liar(lambda request, plan: None)
    worlds = worlds_of(liar, num_envs=3)
    worlds.active[1] = False
    worlds.start()
    assert len(liar.needs[0]) == 2
    assert tracker_in(worlds).need.any(1).tolist() == [False, True, False]
    assert (tracker_in(worlds).kind[1] == -1).all()
    worlds.active[:] = True
    worlds.replan()
    assert not tracker_in(worlds).need.any()


# -- traces ---------------------------------------------------------------------------------------------------------


def test_a_trace_says_who_planned_for_whom_and_what_came_of_it() -> None:
    traces: list[PlanTrace] = []
    worlds = worlds_of("llm", num_envs=2, on_plan=traces.append)
    worlds.start()
    assert [trace.world for trace in traces] == [0, 1]
    tracker = tracker_in(worlds)
    for trace in traces:
        json.dumps(trace.agents), json.dumps(trace.note)
        assert (trace.step, trace.planner) == (0, "llm:guess")
        assert trace.latency_ms >= 0
        assert trace.note == {"model": "guess"}
        assert [entry["agent"] for entry in trace.agents] == [0, 1, 2]
        for entry in trace.agents:
            subgoal = tracker.subgoal(trace.world, entry["agent"])
            assert subgoal is not None
            assert entry["subgoal"] == subgoal.text
            assert entry["kind"] == subgoal.kind.name.lower()
            assert tuple(entry["target"]) == subgoal.target
            assert entry["task"] == subgoal.task
            assert (entry["verdict"], entry["reason"], entry["tries"]) == ("accepted", None, 0)
            assert sum(o["probability"] for o in entry["options"]) == pytest.approx(1, abs=1e-3)
            assert f"package {subgoal.task}" in entry["options"][entry["chosen"]]["text"]
    rng = np.random.default_rng(0)
    while len(traces) == 2:
        worlds.advance(walk(worlds, rng))
        asked = tracker.need.copy()
        steps = worlds.env.steps.copy()
        worlds.settle()
    trace = traces[2]
    assert trace.step == steps[trace.world]
    assert [entry["agent"] for entry in trace.agents] == np.flatnonzero(asked[trace.world]).tolist()


def test_a_trace_of_lies_tells_of_tries_reasons_and_the_fallback() -> None:
    traces: list[PlanTrace] = []
    worlds = worlds_of(Liar(all_the_first_task), num_envs=1, on_plan=traces.append, trace_all=True, retries=2)
    worlds.start()
    first, second, third = traces[0].agents
    assert (first["verdict"], first["reason"], first["tries"]) == ("accepted", None, 0)
    assert "refused" not in first
    for entry in (second, third):
        assert (entry["verdict"], entry["refused"], entry["tries"]) == ("fallback", "duplicate", 3)
        assert entry["reason"] == "another robot already has this task"
        assert entry["task"] not in (0, None)
        assert "fetch package" in entry["subgoal"]


def test_only_model_planners_are_traced_unless_all_are_wanted_and_only_the_wanted_worlds() -> None:
    for planner, everything, traced, wanted in (
        ("nearest", False, None, []), ("nearest", True, None, [0, 1, 2, 3]), ("llm", False, 2, [0, 1]),
        ("nearest", True, 0, []),
    ):  # fmt: skip
        traces: list[PlanTrace] = []
        worlds = worlds_of(planner, on_plan=traces.append, trace_all=everything)
        worlds.traced = traced
        worlds.start()
        assert [trace.world for trace in traces] == wanted
        assert all(entry["agent"] == a for trace in traces for a, entry in enumerate(trace.agents))


# -- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("planner", "world", "config"),
    [
        ("random", "warehouse", {}), ("random-task", "warehouse", {"space": "cell"}), ("nearest", "repair", {}),
        ("hungarian", "warehouse", {"every": 9, "scope": "team", "intrinsic": "distance"}), ("hungarian", "search", {}),
        ("nearest", "warehouse", {"on_failed": False, "on_timeout": False, "guidance": "route"}),
        ("llm", "warehouse", {}), (None, "warehouse", {}),
    ],
)  # fmt: skip
def test_put_back_into_fresh_worlds_it_goes_on_identically(
    planner: str | None, world: str, config: dict[str, Any]
) -> None:
    env = SMALL if world == "warehouse" else {"size": 10, "num_agents": 3, "limit": 60}
    first = worlds_of(planner, 3, world=world, env=env, **config)
    first.start()
    history(first, 130, 0)
    saved = {name: array.copy() for name, array in first.state_dict().items()}
    second = worlds_of(planner, 3, seed=77, world=world, env=env, **config)
    second.load_state_dict(saved)
    np.testing.assert_array_equal(second.begins, first.begins)
    np.testing.assert_array_equal(second.obs, first.obs)
    first.take_episodes()
    if first.tracker is not None:
        first.tracker.counts = Counts()
    same(history(first, 200, 1), history(second, 200, 1))
    assert first.take_episodes() == second.take_episodes()
    if first.tracker is not None:
        assert first.tracker.counts == tracker_in(second).counts
    for name, array in first.state_dict().items():
        np.testing.assert_array_equal(array, second.state_dict()[name], err_msg=name)
    assert any((first.state_dict()[name] != array).any() for name, array in saved.items())
