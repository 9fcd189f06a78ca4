"""Planner and executors that grow together: methods, schedules, and runs that go on as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from echelon.algorithms import HiMAC, HiPER
from echelon.building import build_worlds
from echelon.checkpoints import checkpoints_of, load_checkpoint
from echelon.cli import main
from echelon.coevolution import GrowingRollouts
from echelon.configs import RunConfig, from_toml
from echelon.errors import EchelonError
from echelon.llm.choice import ChoicePrompt
from echelon.llm.policy import ChoicePolicy
from echelon.planners.llm import PROMPTS, LLMPlanner
from echelon.runs import PLANNER, load_policy
from echelon.training import Trainer
from tiny_model import make_tiny_model

HIPER = ("hiper", "hiper-gae")
HIMAC = ("himac", "joint-update", "fixed-budget", "random-blueprint")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"hf:{make_tiny_model(tmp_path_factory.mktemp('model'))}"


def config_of(method: str, model: str, /, **settings: Any) -> RunConfig:
    """A small run; `settings` are top-level ones and tables, which are added to these."""
    tables: dict[str, dict[str, Any]] = {
        "env": {"size": 8, "num_agents": 2, "num_packages": 3, "limit": 40},
        "algorithm": {"rollout": 16, "epochs": 1},
        "growth": {"warm_updates": 2, "warm_steps": 12, "window": 2, "practice": 2},
        "learner": {"group": 2} if method in HIMAC else {},
    }
    plain: dict[str, Any] = {"num_envs": 4, "steps": 10_000, "threads": 1, "checkpoint_every": 10_000, "model": model}
    for name, value in settings.items():
        if isinstance(value, dict):
            tables[name] = {**tables.get(name, {}), **value}
        else:
            plain[name] = value
    return from_toml({"method": method, "environment": "warehouse", **plain, **tables})


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(rollouts: GrowingRollouts) -> tuple[list[Tensor], list[Tensor]]:
    """What the planner's model and the executors have learnt so far, as copies."""
    planner = [p.detach().clone() for p in rollouts.policy.parameters()]
    executors = [t.clone() for k, t in rollouts.algorithm.state_dict().items() if t.is_floating_point()]
    return planner, executors


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- every method ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", HIPER + HIMAC)
def test_every_method_trains_and_is_evaluated(
    method: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(method, model, steps=1200)
    trainer = Trainer(config, tmp_path / "run")
    rollouts = trainer.rollouts
    assert isinstance(rollouts, GrowingRollouts)
    assert isinstance(rollouts.learner, HiPER if method in HIPER else HiMAC)
    before = weights(rollouts)
    assert trainer.run()
    after = weights(rollouts)
    assert not same(before[0], after[0]) and not same(before[1], after[1])
    told = lines(tmp_path / "run")
    assert told[-1]["step"] >= 1200 and len(told) == rollouts.updates
    learnt = [line for line in told if "planner_policy_loss" in line]
    assert learnt and all(np.isfinite([v for v in line.values() if isinstance(v, float)]).all() for line in told)
    assert max(line["planner_logp_gap"] for line in learnt) < 1e-4, "the decisions were this policy's"
    assert sum(line["episodes"] for line in told) > 0
    assert all("policy_loss" in line for line in told if line not in learnt)
    for file in ("adapter_model.safetensors", "adapter_config.json", "choose.txt", "choose_system.txt"):
        assert (tmp_path / "run" / PLANNER / file).is_file()
    # What evaluates is what has been learnt.
    own, _ = load_policy(tmp_path / "run")
    assert own.model == f"hf:{tmp_path / 'run' / PLANNER}"
    planner = build_worlds(own, num_envs=1, seed=0, training=False).planners[0][0]
    assert isinstance(planner, LLMPlanner) and planner.reviews
    questions = ["fetch package:3/0/8/1", "go on: deliver package:12/0/0/1"]
    prompts = [ChoicePrompt(planner.shared, text, ("good", "bad")) for text in questions]
    odds = [float(s.logprobs[0] - s.logprobs[1]) for s in planner.model.score(prompts)]
    again = ChoicePolicy.load(own.model, planner.shared, config.policy)
    rollouts.policy.temperature = 1.0  # a scale of what it tries, and no part of what it knows
    np.testing.assert_array_equal(again.odds(questions), rollouts.policy.odds(questions))
    # For planning, the adapter is worked into weights of half the precision.
    np.testing.assert_allclose(odds, rollouts.policy.odds(questions), atol=0.4)
    if method in ("hiper", "himac"):
        assert main(["evaluate", str(tmp_path / "run"), "--episodes", "4"]) == 0
        capsys.readouterr()
        assert (tmp_path / "run" / "evaluation.json").is_file()


def test_hiper_gae_is_the_control(model: str) -> None:
    """The same turns from the same seed, other credit."""
    one, other = (GrowingRollouts(config_of(m, model, growth={"schedule": "planner"})) for m in HIPER)
    told = []
    for rollouts in (one, other):
        rollouts.start()
        told.append(rollouts.update()[1])
    assert told[0]["planner_segment_turns"] == told[1]["planner_segment_turns"]
    assert "planner_value_loss_low" in told[0] and "planner_value_loss_low" not in told[1]
    assert not same(weights(one)[0], weights(other)[0])


# -- schedules ---------------------------------------------------------------------------------


def test_hiper_takes_turns(model: str) -> None:
    """One level stands still, to the bit, while the other learns."""
    rollouts = GrowingRollouts(config_of("hiper", model))
    rollouts.start()
    state = weights(rollouts)
    for k in range(4):
        rollouts.update()
        now = weights(rollouts)
        assert same(state[0], now[0]) == (k % 2 == 0)
        assert same(state[1], now[1]) == (k % 2 == 1)
        state = now


@pytest.mark.parametrize("method", ["hiper", "himac"])
@pytest.mark.parametrize("schedule", ["planner", "executor", "joint"])
def test_who_learns_is_who_the_schedule_says(method: str, schedule: str, model: str) -> None:
    settings = {"size": 8, "num_packages": 2, "layout": "open"}
    rollouts = GrowingRollouts(config_of(method, model, growth={"schedule": schedule}, env=settings))
    rollouts.start()
    before = weights(rollouts)
    for _ in range(3):
        _, told = rollouts.update()
        assert ("policy_loss" in told) == (schedule != "planner")
        assert ("planner_policy_loss" in told) == (schedule != "executor")
    after = weights(rollouts)
    assert same(before[1], after[1]) == (schedule == "planner")
    if schedule == "executor":
        assert same(before[0], after[0])
    elif method == "hiper":
        assert not same(before[0], after[0])


def test_himac_plays_macro_with_executors_that_stand_still_then_practises_the_best(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy and unchanged in the macro phase; in the micro phase all worlds of a group play the same episode again."""
    rollouts = GrowingRollouts(config_of("himac", model))
    rollouts.start()
    env, worlds = rollouts.worlds.env, rollouts.worlds
    seen: list[tuple[bool, str, float]] = []
    tasks: list[Any] = []
    act = rollouts.algorithm.act

    def watched(*args: Any, greedy: bool = False) -> Any:
        norm = float(sum(t.double().sum() for t in weights(rollouts)[1]))
        seen.append((greedy, worlds.planners[0][0].name, norm))
        begins = np.flatnonzero(worlds.begins)
        tasks.extend((greedy, int(w), env.task_cell[w].tolist(), env.pos[w].tolist()) for w in begins)
        return act(*args, greedy=greedy)

    monkeypatch.setattr(rollouts.algorithm, "act", watched)
    rollouts.update()
    macro = -(-40 // 16) * 16
    assert [g for g, _, _ in seen] == [True] * macro + [False] * 32
    assert {name for _, name, _ in seen[:macro]} == {rollouts.planner.name}
    assert {name for _, name, _ in seen[macro:]} == {"blueprint"}
    assert len({norm for _, _, norm in seen[:macro]}) == 1, "nobody learns"
    assert len({norm for _, _, norm in seen[macro:]}) == 2, "two rollouts, the first with what was there"
    assert worlds.planners[0][0] is rollouts.planner and worlds.repeat is None
    first = {w: rest for g, w, *rest in reversed(tasks) if g}  # the first episode of each world in the macro phase
    for g, w, *rest in tasks:
        if not g:
            assert rest == first[w - w % 2] == first[w]
    assert first[0] != first[2]


def test_the_executor_alone_learns_under_the_planners_own_plans(model: str) -> None:
    rollouts = GrowingRollouts(config_of("himac", model, growth={"schedule": "executor"}))
    rollouts.start()
    rollouts.update()
    assert rollouts.planner.on_choices is None and not rollouts.planner.explore and rollouts.worlds.active.all()
    assert rollouts.steps_per_update == 2 * 16 * 4


# -- warm start --------------------------------------------------------------------------------


def test_a_warm_start_leaves_the_worlds_alone_and_is_what_the_planner_is_held_to(model: str) -> None:
    warm = GrowingRollouts(config_of("hiper", model))
    cold = GrowingRollouts(config_of("hiper", model, growth={"warm_start": "off"}))
    fresh = weights(cold)[0]
    for rollouts in (warm, cold):
        rollouts.start()
    np.testing.assert_array_equal(warm.worlds.env.pos, cold.worlds.env.pos)
    assert same(weights(warm)[1], weights(cold)[1]) and same(weights(cold)[0], fresh)
    assert not same(weights(warm)[0], fresh) and warm.policy.updates == 2
    question = ["fetch package:3/0/8/1"]
    np.testing.assert_array_equal(warm.policy.reference(question)[0], warm.policy.evaluate(question)[0])
    assert warm.planner.counters()["asked"] == cold.planner.counters()["asked"], "lessons ask nobody anything"


# -- resumed is uninterrupted ------------------------------------------------------------------


@pytest.mark.parametrize("method", ["hiper", "himac", "random-blueprint"])
def test_resumed_is_uninterrupted(method: str, model: str, tmp_path: Path) -> None:
    """Weights, critics, optimiser, metrics, subgoals and the adapter's file, to the bit."""
    config = config_of(method, model, steps=3 * (128 if method == "hiper" else 320))
    whole = Trainer(config, tmp_path / "whole")
    assert whole.run()
    trainer = Trainer(config, tmp_path / "parts")
    assert (tmp_path / "parts" / "config.toml").exists()
    shown: list[tuple[int, int] | None] = []
    assert not trainer.run(lambda progress: shown.append(progress.imitating), should_stop=lambda: True)
    assert (shown, trainer.step) == ([(1, 2)], 0)  # stopped in the middle of its imitation
    trainer = Trainer.resume(tmp_path / "parts")
    stops = 0
    while not trainer.run(should_stop=lambda: True):
        trainer = Trainer.resume(tmp_path / "parts")
        stops += 1
    assert stops >= 2
    for file in ("metrics.jsonl", "planner/adapter_model.safetensors", "planner/adapter_config.json"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    one, other = (load_checkpoint(checkpoints_of(tmp_path / x / "checkpoints")[-1]) for x in ("whole", "parts"))
    for name in ("worlds", "algorithm"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.keys() == b.keys()
        for key in a:
            assert np.asarray(a[key]).tobytes() == np.asarray(b[key]).tobytes(), key
    assert one.progress["planners"] == other.progress["planners"]


# -- what doesn't go together ------------------------------------------------------------------

WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "lag": ("hiper", {"planning": {"timing": "lag"}}, "planning.timing must be wait"),
    "distil": ("himac", {"distil": {"enabled": True}}, "distil.enabled and planning.cache don't go with it"),
    "cache": ("himac", {"planning": {"cache": "memory"}}, "distil.enabled and planning.cache don't go with it"),
    "gguf": ("hiper", {"model": "gguf:some.gguf"}, "its model must be in this process"),
    "server": ("hiper", {"model": "openai:some"}, "its model must be in this process"),
    "writes": ("hiper", {"planning": {"decide": "generate"}}, "its model must be in this process"),
    "group": ("himac", {"num_envs": 5}, "num_envs is 5: it must be a multiple of learner.group (2)"),
    "planner": ("hiper", {"planner": "hungarian"}, "its planner can't be another (--planner)"),
    "space": ("hiper", {"subgoals": {"space": "cell"}}, "subgoals.space must be task"),
    "budget": ("hiper", {"budget": {"calls": 10}}, "budget doesn't go with it"),
    "share": ("hiper", {"llm_share": 0.5}, "llm_share must be 1"),
    "schedule": ("hiper", {"growth": {"schedule": "both"}}, "schedule"),
    "teacher": ("hiper", {"growth": {"warm_start": "hungarion"}}, "did you mean 'hungarian'"),
    "other learner": ("hiper", {"learner": {"group": 4}}, "group"),
    "no learner": ("l2m2", {"learner": {"clip": 0.1}}, "learner"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_what_does_not_go_together_is_one_line(mistake: str, model: str) -> None:
    method, settings, words = WRONG[mistake]
    with pytest.raises(EchelonError) as error:
        config_of(method, model, **{"learner": {}, **settings} if method == "l2m2" else settings)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("prompts", ["", "letters"])
def test_prompts_that_tell_no_context_are_refused(prompts: str, model: str, tmp_path: Path) -> None:
    config = config_of("hiper", model, planning={"prompts": str(PROMPTS / prompts)})
    with pytest.raises(EchelonError, match=r"must be about one option, and tell \{nearer\}, \{after\} or \{gain\}"):
        Trainer(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
