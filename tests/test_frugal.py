"""A student, a cache and a budget before the model: sound, counted, resumed bit for bit, and cheaper."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from echelon.envs import WarehouseConfig, make
from echelon.llm.budget import Budget, BudgetConfig, BudgetedChoice
from echelon.llm.choice import ChoicePrompt, ChoiceScores
from echelon.planners.distilled import DistilConfig, Student
from echelon.planners.frugal import FrugalPlanner
from echelon.planners.llm import PROMPTS, LLMPlanner
from echelon.planners.plan_cache import CachedPlans, PlanCache
from echelon.rollout import TeamWorlds
from echelon.subgoals import FEATURES, SubgoalConfig
from test_pending import drive

ENV = WarehouseConfig(size=10, num_agents=3, num_packages=6)
LETTERS = PROMPTS / "letters"


class Near:
    """Likes what is near, by far."""

    name = "near"

    def __init__(self) -> None:
        self.questions = 0

    def score(self, prompts: Sequence[ChoicePrompt]) -> list[ChoiceScores]:
        self.questions += len(prompts)
        out = []
        for prompt in prompts:
            steps = np.array([float(o.split(" steps")[0].split()[-1]) for o in prompt.options])
            x = -steps - 1e-3 * np.arange(len(steps))
            out.append(ChoiceScores((x - np.log(np.exp(x - x.max()).sum()) - x.max()).astype(np.float32), 1))
        return out


def frugal(model: Any, **parts: Any) -> FrugalPlanner:
    return FrugalPlanner(LLMPlanner(model, folder=LETTERS), **parts)


def team(planner: Any, num_envs: int = 8, **more: Any) -> TeamWorlds:
    env = make("warehouse", ENV, num_envs=num_envs, seed=0, extra_features=FEATURES)
    worlds = TeamWorlds(env, [(planner, np.ones(num_envs, bool))], SubgoalConfig(), gamma=0.99, seed=0, **more)
    worlds.start()
    return worlds


def flights(worlds: TeamWorlds, steps: int) -> list[tuple[NDArray[Any], ...]]:
    return drive(worlds, steps)


def cache_of(path: Path | None = None, namespace: str = "test", sees: Any = frozenset({"cells"})) -> CachedPlans:
    return CachedPlans(PlanCache(path, namespace=namespace), sees)


SMALL = DistilConfig(enabled=True, start=100, calls_per_million=20_000, agreement=0.8, audit=0.2)


def test_without_parts_it_is_the_planner() -> None:
    one, other = Near(), Near()
    plain, wrapped = team(LLMPlanner(one, folder=LETTERS)), team(frugal(other))
    for a, b in zip(flights(plain, 40), flights(wrapped, 40), strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)
    assert one.questions == other.questions > 50


def test_what_the_cache_holds_changes_nothing_but_the_cost(tmp_path: Path) -> None:
    """An empty cache, a full one and one of another process's making give the same plans."""
    found, asked = [], []
    for path in (tmp_path / "plans.sqlite", tmp_path / "plans.sqlite", None):
        model, cache = Near(), cache_of(path)
        found.append(flights(team(frugal(model, cache=cache)), 60))
        asked.append(model.questions)
        cache.cache.close()
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            for x, y in zip(a, b, strict=True):
                np.testing.assert_array_equal(x, y)
    assert asked[1] == 0 < asked[0] == asked[2]


def test_the_student_takes_over_where_it_is_sure() -> None:
    model = Near()
    planner = frugal(model, student=Student(SMALL, 0))
    worlds = team(planner, num_envs=16)
    flights(worlds, 400)
    told = planner.counters()
    assert told["student_open"] == 1 and told["student_spared"] > 300
    assert told["student_agreement"] > 0.8 and told["student_sure_agreement"] > 0.8
    assert told["student_audited"] > 0
    # Its budget holds: the questions that the gate let through, and those asked again after a refusal.
    allowed = SMALL.start + SMALL.calls_per_million * 400 * 16 / 1e6
    assert model.questions <= allowed + worlds.tracker.counts.retried  # type: ignore[union-attr]


@pytest.mark.parametrize("lag", [None, 3])
def test_beside_the_simulation_too(lag: int | None) -> None:
    """Cache and student with plans that come late: audits delay nobody, what is in flight is legal, it is learnt."""
    model = Near()
    planner = frugal(model, student=Student(SMALL, 0), cache=cache_of())
    worlds = team(planner, num_envs=16, beside=True, lag=lag)
    flights(worlds, 300)
    worlds.finish_plans()
    told = planner.counters()
    assert told["student_answers"] > 0 and model.questions > 0
    if lag is not None:
        assert told["student_open"] == 1 and told["student_spared"] > 100
        counts = worlds.tracker.counts  # type: ignore[union-attr]
        assert counts.provisional < counts.given / 2
    worlds.close()


def test_put_back_it_goes_on_as_if_it_had_never_stopped() -> None:
    def build() -> TeamWorlds:
        return team(frugal(Near(), student=Student(SMALL, 0), budget=Budget(BudgetConfig(calls=100_000))), num_envs=8)

    first = build()
    flights(first, 70)
    state, planner = first.state_dict(), first.planners[0][0]
    told = json.loads(json.dumps(planner.state_dict(), allow_nan=False))
    second = build()
    second.load_state_dict({k: v.copy() for k, v in state.items()})
    other = second.planners[0][0]
    other.load_state_dict(told)
    # As a trainer does it: the planner's counters, then its arrays with the worlds.
    second.load_state_dict(state)
    a, b = drive_on(first, 80), drive_on(second, 80)
    for x, y in zip(a, b, strict=True):
        for p, q in zip(x, y, strict=True):
            np.testing.assert_array_equal(p, q)
    one, two = planner.arrays(), other.arrays()  # type: ignore[attr-defined]
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def drive_on(worlds: TeamWorlds, steps: int) -> list[Any]:
    return drive(worlds, steps, seed=5)


def test_a_budget_that_is_spent_leaves_the_fallback_and_says_so() -> None:
    model, budget = Near(), Budget(BudgetConfig(calls=40))
    planner = FrugalPlanner(LLMPlanner(BudgetedChoice(model, budget), folder=LETTERS), budget=budget)
    worlds = team(planner)
    assert planner.notes() == []
    flights(worlds, 120)
    assert 40 <= model.questions <= 40 + 64, "a batch that was begun is finished"
    counts = worlds.tracker.counts  # type: ignore[union-attr]
    assert counts.fallback > 20
    told = f"the model's budget is spent (calls ({model.questions} of 40)): the fallback plans from here on"
    assert planner.notes() == [told]
    assert planner.costs()["budget_refused"] > 0


def test_notes_say_who_decided() -> None:
    lines: list[Any] = []
    planner = frugal(Near(), student=Student(SMALL, 0))
    worlds = team(planner, num_envs=16, on_plan=lines.append)
    worlds.traced = 4
    flights(worlds, 300)
    entries = [entry for trace in lines for entry in trace.agents]
    assert any("options" in entry for entry in entries), "the model's choices"
    assert any("audit" in entry for entry in entries)
    assert any("options" not in entry and "audit" not in entry for entry in entries), "the student's"
    json.dumps([vars(t) for t in lines], allow_nan=False)


def test_with_a_lag_too_what_the_cache_holds_changes_nothing(tmp_path: Path) -> None:
    """A plan that is known already is used when it would have come."""
    found = []
    for _ in range(2):
        cache = cache_of(tmp_path / "plans.sqlite")
        worlds = team(frugal(Near(), cache=cache), beside=True, lag=3)
        found.append(flights(worlds, 60))
        worlds.close()
        cache.cache.close()
    for a, b in zip(*found, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)
