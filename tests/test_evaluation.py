"""Evaluations: honest intervals, unseen worlds, numbers that a replay confirms, and plans laid open."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon.algorithms.mappo import MAPPOConfig
from echelon.building import build_worlds, model_of
from echelon.configs import RunConfig
from echelon.console import results_rows
from echelon.envs import WarehouseConfig
from echelon.envs.repair import RepairConfig
from echelon.envs.search import SearchConfig
from echelon.errors import EchelonError
from echelon.evaluation import EpisodeResults, evaluate, mean_interval, mean_with_interval, wilson
from echelon.evaluation.episodes import evaluation_seed
from echelon.evaluation.explain import explain_plan
from echelon.evaluation.speed import env_speed, training_speed
from echelon.executors import ModelExecutor
from echelon.llm.choice import ChoicePrompt, ChoiceScores
from echelon.reports.replay import parse_replay, render_replay
from echelon.rollout import PlanTrace
from echelon.training import Rollouts, Trainer, load_policy
from tiny_model import make_tiny_model

WAREHOUSE = WarehouseConfig(size=8, num_agents=2, num_packages=2, limit=40)
SEARCH = SearchConfig(size=10, num_agents=2, num_targets=2, limit=30)
REPAIR = RepairConfig(size=10, num_agents=2, num_machines=2, limit=30)
WORLDS = {"warehouse": WAREHOUSE, "search": SEARCH, "repair": REPAIR}
QUICK = MAPPOConfig(hidden=16, rollout=8, precision="float32")
RULES = RunConfig(method="rule-goals", env=WAREHOUSE, num_envs=8, threads=1, algorithm=QUICK)


def judged(config: RunConfig, policy: Any = None, **options: Any) -> EpisodeResults:
    """What `evaluate` gives when nobody stops it."""
    result = evaluate(config, policy, **options)
    assert result is not None
    return result


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random language model's name."""
    return f"hf:{make_tiny_model(tmp_path_factory.mktemp('tiny'))}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 10x10 that has learnt."""
    config = RunConfig(
        method="rule-goals", env=WarehouseConfig(size=10, num_agents=2, num_packages=2), steps=40_960, num_envs=64,
        threads=1, algorithm=MAPPOConfig(hidden=32, rollout=16, lr=2e-3, precision="float32"),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert Trainer(config, folder).run()
    return folder


# -- statistics --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # (p + z²/2n ± z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n) by hand, z = 1.959964
        (8, 10, 0.490162, 0.943318),
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (1, 1, 0.206549, 1.0),
        (150, 200, 0.685659, 0.804918),
    ],
)
def test_wilson_is_the_textbook_s(successes: int, trials: int, low: float, high: float) -> None:
    """Golden values of Wilson's interval."""
    interval = wilson(successes, trials)
    z = 1.959963984540054
    p, n = successes / trials, trials
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert interval.value == p
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=2e-6)
    assert (interval.low, interval.high) == pytest.approx(
        ((middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)), abs=1e-12
    )


def test_wilson_refuses_what_is_no_count() -> None:
    """No trials, and more successes than trials, are the caller's mistake."""
    for successes, trials in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="successes of"):
            wilson(successes, trials)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_its_estimate(counts: tuple[int, int]) -> None:
    """The interval lies in [0, 1] around the rate, and a lower confidence makes it narrower."""
    wide, narrow = wilson(*counts), wilson(*counts, confidence=0.5)
    assert -1e-12 <= wide.low <= narrow.low <= narrow.high <= wide.high <= 1 + 1e-12
    assert wide.low - 1e-12 <= wide.value <= wide.high + 1e-12


def test_mean_interval_is_student_s() -> None:
    """1 to 5: mean 3, t(0.975, 4) = 2.776445, standard error sqrt(2.5 / 5)."""
    interval = mean_interval([1, 2, 3, 4, 5])
    assert interval is not None
    half = 2.7764451 * math.sqrt(0.5)
    assert (interval.value, interval.low, interval.high) == pytest.approx((3, 3 - half, 3 + half), abs=1e-6)
    assert mean_with_interval([1, 2, 3, 4, 5]) == {"value": 3, "low": interval.low, "high": interval.high}


def test_a_single_episode_has_no_interval() -> None:
    assert mean_interval([7]) is None and mean_interval([]) is None
    assert mean_with_interval([7]) == {"value": 7, "low": None, "high": None} and mean_with_interval([]) is None
    one = EpisodeResults(np.array([True]), np.array([30]), np.array([2]), np.array([1.0]), 0.5, {})
    summary = json.loads(json.dumps(one.summary(), allow_nan=False))
    assert summary["steps_to_finish"] == {"value": 30, "low": None, "high": None}
    assert results_rows({"flat": summary})[1][0][2:4] == ["30.0", "2.0"]


# -- episodes ----------------------------------------------------------------------------------


def test_evaluation_worlds_are_none_of_the_training_worlds() -> None:
    """No evaluation world begins as a training world does; the default seed is the run's, moved."""
    training = build_worlds(RULES, num_envs=64, seed=RULES.seed, training=True).env
    unseen = build_worlds(RULES, num_envs=64, seed=evaluation_seed(RULES.seed), training=False).env

    def starts(env: Any) -> set[bytes]:
        return {env.grid[i].tobytes() + env.pos[i].tobytes() + env.task_cell[i].tobytes() for i in range(64)}

    assert not starts(training) & starts(unseen)
    default = judged(RULES, episodes=6, record=6)
    moved = judged(RULES, episodes=6, record=6, seed=RULES.seed)
    other = judged(RULES, episodes=6, record=6, seed=RULES.seed + 1)
    assert default.replay is not None and moved.replay is not None and other.replay is not None
    assert frames(default) == frames(moved) != frames(other)


def frames(result: EpisodeResults) -> list[Any]:
    """The recorded frames of each episode."""
    assert result.replay is not None
    return [episode["frames"] for episode in result.replay["episodes"]]


@pytest.mark.parametrize("method", ["rule-goals", "random-goals", "flat-mappo", "l2m2"])
def test_an_episode_does_not_depend_on_how_many_are_judged(method: str, request: pytest.FixtureRequest) -> None:
    """Episode i of 4 is episode i of 12, step for step; the same seed gives the same results again."""
    config = dataclasses.replace(RULES, method=method)
    if method == "l2m2":
        config = dataclasses.replace(config, model=request.getfixturevalue("tiny_model"))
    few, many, again = (judged(config, episodes=n, record=n) for n in (4, 12, 4))
    assert frames(few) == frames(many)[:4] == frames(again)
    for name in ("success", "steps", "collisions", "task_return"):
        np.testing.assert_array_equal(getattr(few, name), getattr(many, name)[:4])
        np.testing.assert_array_equal(getattr(few, name), getattr(again, name))


def test_the_numbers_are_those_of_the_recorded_frames(trained: Path) -> None:
    """Success, steps, collisions and return, counted again from the frames of every episode."""
    config, policy = load_policy(trained)
    config = dataclasses.replace(config, env=dataclasses.replace(config.env, num_agents=3, limit=40))
    result = judged(config, policy, episodes=40, record=40)
    assert result.replay is not None
    assert 0 < result.success.sum() < 40 and result.collisions.sum() > 0
    for i, episode in enumerate(result.replay["episodes"]):
        assert len(episode["frames"]) - 1 == episode["steps"] == result.steps[i]
        assert sum(frame["collisions"] for frame in episode["frames"]) == result.collisions[i]
        delivered = episode["frames"][-1]["status"].count("delivered")
        assert delivered == result.task_return[i]
        assert bool(result.success[i]) == episode["success"] == (delivered == 2)
        assert result.success[i] or result.steps[i] == 40
        walls = episode["walls"]
        for before, after in zip(episode["frames"], episode["frames"][1:], strict=False):
            cells = [tuple(cell) for cell in after["agents"]]
            assert len(set(cells)) == 3 and all(walls[r][c] == "." for r, c in cells)
            for old, new in zip(before["agents"], after["agents"], strict=True):
                assert abs(old[0] - new[0]) + abs(old[1] - new[1]) <= 1
    summary = result.summary()
    assert summary["tsr"]["value"] == result.success.mean()
    assert summary["steps_to_finish"]["value"] == pytest.approx(result.steps[result.success].mean())
    json.dumps(summary, allow_nan=False)


def test_a_summary_without_success_has_no_steps_to_finish() -> None:
    """Where nobody finished there is no mean of steps, and nothing that JSON can't say."""
    config = dataclasses.replace(RULES, env=dataclasses.replace(WAREHOUSE, limit=1))
    summary = judged(config, episodes=3).summary()
    assert summary["steps_to_finish"] is None and summary["tsr"]["value"] == 0
    json.dumps(summary, allow_nan=False)


def test_an_evaluation_can_be_stopped() -> None:
    """Asked to stop, it gives nothing rather than half a result; until then it reports."""
    told: list[tuple[int, int]] = []
    stopped = evaluate(RULES, None, episodes=3, report=lambda *a: told.append(a), should_stop=lambda: len(told) > 4)
    assert stopped is None
    assert len(told) == 5 and told[-1][1] == 3


def test_greedy_is_another_way_to_act_and_draws_nothing(trained: Path) -> None:
    """The most probable moves: the same whatever the seed of the draws."""
    config, policy = load_policy(trained)
    drawn = judged(config, policy, episodes=8, record=8, seed=5)
    greedy = judged(config, policy, episodes=8, record=8, seed=5, greedy=True)
    again = judged(dataclasses.replace(config, seed=9), policy, episodes=8, record=8, seed=5, greedy=True)
    assert frames(greedy) == frames(again) != frames(drawn)


# -- replays -----------------------------------------------------------------------------------


@pytest.mark.parametrize("planner", ["rules", "model", "none"])
@pytest.mark.parametrize("world", WORLDS)
def test_a_recorded_evaluation_is_a_valid_replay(world: str, planner: str, request: pytest.FixtureRequest) -> None:
    """The document passes the replay's own check and becomes a page; a model's plans carry their options."""
    method = {"rules": "rule-goals", "model": "l2m2", "none": "flat-mappo"}[planner]
    config = dataclasses.replace(RULES, env=WORLDS[world], method=method)
    if planner == "model":
        config = dataclasses.replace(config, model=request.getfixturevalue("tiny_model"))
    result = judged(config, episodes=3, record=2)
    assert result.replay is not None
    replay = parse_replay(json.loads(json.dumps(result.replay, allow_nan=False)))
    assert [e.world for e in replay.episodes] == [0, 1] and replay.env == world
    assert "<html" in render_replay(replay)[:200]
    plans = [plan for episode in replay.episodes for plan in episode.plans]
    assert bool(plans) == (planner != "none")
    if planner == "none":
        return
    for plan in plans:
        assert [c.agent for c in plan.choices] == plan.agents != []
        assert all(c.verdict in ("accepted", "fallback") for c in plan.choices)
    asked = [choice for plan in plans for choice in plan.choices if choice.options]
    assert bool(asked) == (planner == "model")
    for choice in asked:
        chances = [option.probability for option in choice.options]
        assert sum(p for p in chances if p is not None) == pytest.approx(1, abs=1e-3) and None not in chances
        assert choice.chosen is None or 0 <= choice.chosen < len(chances)
    if planner == "model":
        assert any(plan.prompt and "[robot" in plan.prompt for plan in plans)
        assert result.plans["model_prompts"] == result.plans["questions"] > 0
        assert result.plans["asked"] >= len(asked) > 0


def test_plans_of_a_model_are_heard_in_every_world(tiny_model: str) -> None:
    """`on_plan` hears the planning rounds that cost model time, of all worlds, recorded or not."""
    traces: list[PlanTrace] = []
    config = dataclasses.replace(RULES, method="l2m2", model=tiny_model)
    judged(config, episodes=4, record=1, on_plan=traces.append)
    assert {t.world for t in traces} == {0, 1, 2, 3}
    assert {t.planner for t in traces} == {f"llm:{model_of(tiny_model).name}"}
    json.dumps([dataclasses.asdict(t) for t in traces], allow_nan=False)


def test_a_planner_s_own_model_is_the_one_that_is_counted(tiny_model: str) -> None:
    """With `planner=llm:…` the configured model isn't touched: it need not even be there."""
    config = dataclasses.replace(RULES, method="l2m2", planner=f"llm:{tiny_model}", model="hf:/nowhere")
    assert judged(config, episodes=2).plans["model_prompts"] > 0


# -- other maps and teams ----------------------------------------------------------------------


def test_a_trained_team_moves_house(trained: Path) -> None:
    """Learnt on 10x10 with 2 robots, it works on 20x20, with other numbers of robots and packages."""
    config, policy = load_policy(trained)
    at_home = judged(config, policy, episodes=60)
    assert at_home.success.mean() >= 0.9
    for change in ({"size": 20}, {"size": 20, "num_agents": 4, "num_packages": 5}, {"height": 9, "width": 14}):
        moved = dataclasses.replace(config, env=dataclasses.replace(config.env, **change))
        away = judged(moved, policy, episodes=40)
        untrained = judged(moved, None, episodes=40)
        assert away.success.mean() >= 0.6 > untrained.success.mean() + 0.2, (change, away.success.mean())


def test_a_policy_that_does_not_fit_is_one_line(trained: Path) -> None:
    """Another view or network than it was trained with is named."""
    config, policy = load_policy(trained)
    for other in (
        dataclasses.replace(config, env=dataclasses.replace(config.env, view=3)),
        dataclasses.replace(config, algorithm=dataclasses.replace(config.algorithm, hidden=16)),
        dataclasses.replace(config, algorithm=dataclasses.replace(config.algorithm, recurrent=True)),
    ):
        with pytest.raises(EchelonError, match="the saved actor doesn't fit"):
            evaluate(other, policy, episodes=2)


# -- the model moves ---------------------------------------------------------------------------


class Compass:
    """Scores moves by their letter, and remembers what it was asked."""

    name = "compass"

    def __init__(self) -> None:
        self.asked: list[ChoicePrompt] = []

    def score(self, prompts: Any) -> list[ChoiceScores]:
        self.asked.extend(prompts)
        out = []
        for p in prompts:
            logits = np.arange(len(p.options), dtype=np.float32)
            out.append(ChoiceScores((logits - np.log(np.exp(logits).sum())).astype(np.float32), 1))
        return out


@pytest.mark.parametrize("world", WORLDS)
def test_a_model_that_moves_is_asked_each_question_once(world: str) -> None:
    """Only legal moves are offered and made; a prompt that was answered is never asked again."""
    config = dataclasses.replace(RULES, method="llm-only", env=WORLDS[world])
    worlds = build_worlds(config, num_envs=16, seed=3, training=False)
    model = Compass()
    executor = ModelExecutor(model, 16, seed=3)
    rows, agents = np.indices((16, 2))
    for _ in range(60):
        mask = worlds.mask.copy()
        actions = executor.act(worlds)
        assert mask[rows, agents, actions].all()
        worlds.advance(actions)
        worlds.settle()
    texts = [prompt.text for prompt in model.asked]
    assert len(texts) == len(set(texts)) < 60 * 16 * 2 / 4
    words = {"stay", "go north", "go east", "go south", "go west"}
    assert all(set(prompt.options) <= words and "stay" in prompt.options for prompt in model.asked)
    assert any(len(prompt.options) < 5 for prompt in model.asked)


def test_the_model_only_method_runs_with_a_real_model(tiny_model: str) -> None:
    """llm-only: whole episodes, a replay, few calls, and the same again."""
    env = dataclasses.replace(WAREHOUSE, limit=15)
    config = dataclasses.replace(RULES, method="llm-only", env=env, model=tiny_model)
    result = judged(config, episodes=4, record=2)
    assert result.replay is not None and result.replay["planner"] == "the model moves"
    parse_replay(result.replay)
    assert 0 < result.plans["model_prompts"] < result.steps.sum() * 2 / 2
    assert frames(result) == frames(judged(config, episodes=4, record=2))


# -- plans laid open ---------------------------------------------------------------------------


def test_a_plan_is_laid_open(tiny_model: str) -> None:
    """Scene, candidates with probabilities that sum to 1, the choice, verdicts and the prompt, in words."""
    env = dataclasses.replace(WAREHOUSE, num_packages=4)
    config = dataclasses.replace(RULES, method="l2m2", model=tiny_model, env=env)
    text = explain_plan(config)
    assert text.split("planner llm")[0] == explain_plan(config).split("planner llm")[0]
    assert all(len(line) == 8 and set(line) <= set("#.+p01") for line in text.splitlines()[:8])
    for robot in (0, 1):
        part = text.split(f"\nRobot {robot}: ")[1].split("\nRobot ")[0].split("\nplanner ")[0]
        assert ": accepted" in part.splitlines()[0]
        shown = [line.split() for line in part.splitlines()[1:] if line[4:5] in "01" and line[5:6] == "."]
        assert len(shown) >= 2 and part.count("→") == 1
        chances = [float(next(w for w in words if w[:2] in ("0.", "1."))) for words in shown]
        assert sum(chances) == pytest.approx(1, abs=0.01)
        assert "  prompt:\n" in part and "fetch package" in part
    assert "refused: nothing; sent back: 0; fallback: 0" in text
    assert "prompt:" not in explain_plan(config, prompts=False)


@pytest.mark.parametrize("world", WORLDS)
def test_a_rule_s_plan_shows_its_candidates_and_path_lengths(world: str) -> None:
    """A planner without probabilities: every candidate with the steps to it."""
    text = explain_plan(dataclasses.replace(RULES, env=WORLDS[world]))
    assert " steps" in text and "Robot 1: " in text and "planner hungarian" in text


# -- speed -------------------------------------------------------------------------------------


def test_speeds_are_measured() -> None:
    """Rates above zero, and shares of the time that sum to about one; nothing is written."""
    assert env_speed("warehouse", num_envs=4, seconds=0.01, rounds=2, size=8, num_agents=2, num_packages=2) > 0
    updates: list[int] = []
    rate, shares = training_speed(RULES, updates=2, warm_up=1, report=updates.append)
    assert rate > 0 and updates == [0, 1, 2]
    assert sum(shares.values()) == pytest.approx(1, abs=0.2) and {
        "act",
        "step",
        "plan",
        "advantages",
        "learn",
        "optimise",
    } <= set(shares)


def test_rollouts_refuse_a_method_that_does_not_learn() -> None:
    """There is nothing to roll out for."""
    with pytest.raises(EchelonError):
        Rollouts(dataclasses.replace(RULES, method="llm-only"))


def test_a_long_plan_can_be_stopped_between_two_batches(tiny_model: str) -> None:
    """A model that plans for many worlds is asked in batches, and stopping doesn't wait for the last of them."""
    config = dataclasses.replace(RULES, method="l2m2", model=tiny_model, planner=None)
    asked = model_of(tiny_model).prompts
    calls = iter([False, True, True, True])
    assert evaluate(config, None, episodes=90, should_stop=lambda: next(calls)) is None
    assert 0 < model_of(tiny_model).prompts - asked <= 64
