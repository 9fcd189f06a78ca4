"""Training a planner by itself: it learns what its teacher does, and goes on as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from echelon.algorithms.decisions import Decisions, log_probabilities
from echelon.algorithms.himac import HiMACConfig
from echelon.algorithms.hiper import HiPERConfig, Turns
from echelon.building import build_planner
from echelon.configs import RunConfig
from echelon.envs import WarehouseConfig, env_name, make
from echelon.errors import EchelonError
from echelon.growing import FEATURES_OF_A_TURN
from echelon.llm.policy import ChoicePolicy, PolicyConfig
from echelon.planner_training import PRESETS, PlannerConfig, PlannerTrainer, join_turns, random_scene
from echelon.planners.llm import LEARNED_PROMPTS, TEMPLATES, LLMPlanner
from tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"hf:{make_tiny_model(tmp_path_factory.mktemp('model'))}"


def config_of(model: str, algorithm: str = "himac", **settings: Any) -> PlannerConfig:
    """A recipe of seconds."""
    small: dict[str, Any] = {
        "imitation": 3, "lessons": 3, "iterations": 2, "scenes": 3, "worlds": 4, "max_size": 9, "max_agents": 3,
        "batch": 16, "checkpoint_every": 2, "threads": 1, "himac": HiMACConfig(group=2),
        "hiper": HiPERConfig(critic_warmup=0, hidden=16, gamma=0.99), "review": 5 if algorithm == "hiper" else 0,
    }  # fmt: skip
    return PlannerConfig(model=model, algorithm=algorithm, **{**small, **settings})  # type: ignore[arg-type]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    """What a training leaves, but for its checkpoints, which tell seconds."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and "checkpoints" not in p.parts and not p.name.startswith(".")}  # fmt: skip


# -- scenes and turns --------------------------------------------------------------------------


def test_scenes_are_of_all_sorts_and_can_be_built() -> None:
    config, kinds, sizes, agents = PlannerConfig(), set(), set(), set()
    for number in range(60):
        scene = random_scene(number, config, np.random.default_rng(number))
        kinds.add((number % 3, env_name(scene)))
        sizes.add(scene.size)
        agents.add(scene.num_agents)
        assert 8 <= scene.size <= 32 and 2 <= scene.num_agents <= 16
        if number < 24:
            make(env_name(scene), scene, num_envs=1, seed=number)
    assert kinds == {(0, "warehouse"), (1, "search"), (2, "repair")}
    assert {min(sizes), max(sizes)} == {8, 32} and {min(agents), max(agents)} == {2, 16}


def test_turns_of_several_scenes_keep_their_decisions() -> None:
    def turns(paths: list[int], choice: list[int], review: list[int]) -> Turns:
        m = len(paths)
        states = np.zeros((m, 2), np.float32)
        return Turns(np.array(paths), np.zeros(m, np.float32), np.ones(m, bool), np.zeros(m, bool), states, states,
                     np.zeros((max(paths, default=-1) + 1, 2), np.float32), np.array(choice), np.array(review),
                     np.ones(m, np.int64))  # fmt: skip

    none = Turns(*(np.zeros(0, t) for t in (np.int64, np.float32, bool, bool)), *(np.zeros((0, 2), np.float32),) * 3,  # type: ignore[arg-type]
                 *(np.zeros(0, np.int64),) * 3)  # fmt: skip
    joined = join_turns([turns([0, 0, 1], [0, -1, 3], [-1, 2, 1]), none, turns([0, 1], [-1, 0], [1, -1])], [4, 0, 2])
    assert joined.trajectory.tolist() == [0, 0, 1, 2, 3] and len(joined.last) == 4
    assert joined.choice.tolist() == [0, -1, 3, -1, 4] and joined.review.tolist() == [-1, 2, 1, 5, -1]
    assert joined.discount_steps is not None and joined.discount_steps.tolist() == [1] * 5


# -- imitation ---------------------------------------------------------------------------------


def accuracy(policy: ChoicePolicy, decisions: Decisions) -> float:
    """How often the most probable option is the teacher's."""
    scores = torch.from_numpy(policy.odds(decisions.items))
    best = log_probabilities(scores, decisions)[2].argmax(1).numpy()
    return float((best == decisions.chosen).mean())


def test_imitation_comes_to_agree_with_the_teacher_on_scenes_that_it_never_saw(model: str, tmp_path: Path) -> None:
    """The nearest task is the short way's: even a random model can learn that, and it holds elsewhere."""
    config = config_of(
        model, "none", teacher="nearest", imitation=25, lessons=6, batch=32, iterations=0, checkpoint_every=1000,
        policy=PolicyConfig(layers=1, warm_lr=1e-2),
    )  # fmt: skip
    other = PlannerTrainer(dataclasses.replace(config, seed=1), tmp_path / "other")
    unseen = other._watch_teacher()[0]
    chance = float((1 / unseen.open.sum(1)).mean())
    before = accuracy(other.policy, unseen)
    trainer = PlannerTrainer(config, tmp_path / "trained")
    assert trainer.run()
    after = accuracy(trainer.policy, unseen)
    told = lines(tmp_path / "trained")
    assert np.mean([line["loss"] for line in told[-5:]]) < 0.8 * np.mean([line["loss"] for line in told[:5]])
    assert len(unseen) > 200 and after > max(before, chance) + 0.15, (chance, before, after)
    assert (tmp_path / "trained" / "imitated" / "adapter_model.safetensors").is_file()


def test_a_teacher_that_never_has_a_choice_is_one_line(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = WarehouseConfig(size=8, num_agents=1, num_packages=1)
    monkeypatch.setattr("echelon.planner_training.random_scene", lambda *args: scene)
    trainer = PlannerTrainer(config_of(model, "none", iterations=0, lessons=1), tmp_path)
    with pytest.raises(EchelonError, match="lessons is 1: hungarian never had a choice in these scenes"):
        trainer.run()


# -- the whole recipe --------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["himac", "hiper"])
def test_stopped_anywhere_and_resumed_is_uninterrupted_on_any_number_of_threads(
    algorithm: str, model: str, tmp_path: Path
) -> None:
    """The same files to the bit: metrics, adapters, settings."""
    config = config_of(model, algorithm)
    seen: list[dict[str, Any]] = []
    whole = PlannerTrainer(config, tmp_path / "whole")
    start = [p.detach().clone() for p in whole.policy.parameters()]
    assert whole.run(seen.append)
    told = lines(tmp_path / "whole")
    assert [(line["stage"], line["step"]) for line in told] == [
        ("imitation", 1), ("imitation", 2), ("imitation", 3), ("reinforcement", 1), ("reinforcement", 2),
    ]  # fmt: skip
    assert [{k: v for k, v in line.items() if k != "seconds"} for line in seen] == told
    assert told[3]["logp_gap"] < 1e-5 and told[4]["env_steps"] > told[3]["env_steps"] > 0
    assert told[4]["decisions"] > told[3]["decisions"] > 0 and 0 <= told[3]["tsr"] <= 1
    kept = files(tmp_path / "whole")
    assert kept["planner/adapter_model.safetensors"] != kept["imitated/adapter_model.safetensors"], (
        "it went on learning"
    )
    assert any(not torch.equal(a, b) for a, b in zip(start, whole.policy.parameters(), strict=True))
    stops = 0
    while not PlannerTrainer(dataclasses.replace(config, threads=1 + stops % 2), tmp_path / "parts").run(
        should_stop=lambda: True
    ):
        stops += 1
    assert stops >= 5
    assert files(tmp_path / "parts") == kept
    # A training that is done stays as it is.
    assert PlannerTrainer(config, tmp_path / "parts").run() and files(tmp_path / "parts") == kept


def test_a_crash_between_checkpoints_costs_what_came_after_the_last(model: str, tmp_path: Path) -> None:
    config = config_of(model, lessons=2)
    assert PlannerTrainer(config, tmp_path / "whole").run()

    class Lightning(Exception):
        pass

    def strike(line: dict[str, Any]) -> None:
        if (line["stage"], line["step"]) == ("reinforcement", 1):
            raise Lightning

    with pytest.raises(Lightning):
        PlannerTrainer(config, tmp_path / "parts").run(strike)
    assert PlannerTrainer(config, tmp_path / "parts").run()
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_a_training_whose_checkpoints_are_gone_keeps_its_log(model: str, tmp_path: Path) -> None:
    config = config_of(model, "none", imitation=3, lessons=1, iterations=0, checkpoint_every=2)
    assert PlannerTrainer(config, tmp_path).run()
    shutil.rmtree(tmp_path / "checkpoints")
    log = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(EchelonError, match=r"the checkpoints of .* are gone"):
        PlannerTrainer(config, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == log
    # Killed before its first one was saved, it begins again.
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(log.splitlines(keepends=True)[:2]))
    assert PlannerTrainer(config, tmp_path).run()
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


def test_other_settings_in_the_same_folder_are_refused(model: str, tmp_path: Path) -> None:
    config = config_of(model, "none", imitation=1, lessons=1, iterations=0)
    assert PlannerTrainer(config, tmp_path).run()
    before = files(tmp_path)
    for change in ({"seed": 1}, {"imitation": 2}, {"policy": PolicyConfig(rank=4)}):
        with pytest.raises(EchelonError, match="holds a training with other settings: choose another --out"):
            PlannerTrainer(dataclasses.replace(config, **change), tmp_path)  # type: ignore[arg-type]
    assert files(tmp_path) == before
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(EchelonError, match=r"training\.json"):
        PlannerTrainer(config, tmp_path)


def test_what_it_leaves_is_a_planner(model: str, tmp_path: Path) -> None:
    """`hf:<folder>` plans with the adapter and the templates that it learnt with, and can go on learning."""
    config = config_of(model, "none", imitation=2, lessons=1, iterations=0)
    trainer = PlannerTrainer(config, tmp_path / "out")
    assert trainer.run()
    spec = f"hf:{tmp_path / 'out' / 'planner'}"
    for name in TEMPLATES:
        own = (tmp_path / "out" / "planner" / name).read_text()
        assert own.strip() == (LEARNED_PROMPTS / name).read_text().strip()
    planner = build_planner("llm", RunConfig(model=spec))
    assert isinstance(planner, LLMPlanner) and planner.reviews
    assert planner.templates[1].text == trainer.planner.templates[1].text
    question = ["fetch package:3/0/8/1", "take tool:10/1/4/2"]
    policy = ChoicePolicy.load(spec, planner.shared, PolicyConfig())
    trainer.policy.temperature = 1.0  # a scale of what it tries, and no part of what it knows
    np.testing.assert_array_equal(policy.odds(question), trainer.policy.odds(question))
    more = PlannerTrainer(dataclasses.replace(config, model=spec), tmp_path / "more")
    np.testing.assert_array_equal(more.policy.odds(question), trainer.policy.odds(question))
    assert more.run()
    assert (
        files(tmp_path / "more")["planner/adapter_model.safetensors"]
        != (files(tmp_path / "out")["planner/adapter_model.safetensors"])
    )


def test_reinforcement_alone(model: str, tmp_path: Path) -> None:
    trainer = PlannerTrainer(config_of(model, imitation=0, iterations=1), tmp_path)
    assert trainer.run() and trainer.stage == "done"
    assert [line["stage"] for line in lines(tmp_path)] == ["reinforcement"]
    assert not (tmp_path / "imitated").exists() and (tmp_path / "planner").is_dir()


def test_hiper_sees_what_the_recorder_tells(model: str, tmp_path: Path) -> None:
    trainer = PlannerTrainer(config_of(model, "hiper", imitation=0, iterations=1), tmp_path)
    assert trainer.run()
    line = lines(tmp_path)[0]
    assert {"switch_rate", "value_loss_high", "segment_turns", "advantage_std_term"} <= line.keys()
    assert 0 < line["switch_rate"] < 1 and trainer.learner is not None
    state = trainer.learner.state_dict()
    assert any(tuple(t.shape)[-1:] == (1,) or t.numel() > FEATURES_OF_A_TURN for t in state.values())


# -- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "words"), [
    ({"worlds": 12}, "worlds is 12: it must be a multiple of himac.group (8)"),
    ({"min_size": 4}, "min_size is 4: it must be at least 8"),
    ({"max_size": 7}, "max_size is 7: it must be at least min_size"),
    ({"max_agents": 1}, "max_agents is 1: it must be at least min_agents"),
    ({"batch": 0}, "batch is 0"),
    ({"threads": 0}, "threads is 0"),
    ({"teacher": "hungarion"}, "did you mean 'hungarian'"),
    ({"iterations": -1}, "iterations is -1: it must be at least 0"),
])  # fmt: skip
def test_wrong_settings_are_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(EchelonError) as error:
        PlannerConfig(**settings)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_presets_are_settings() -> None:
    for name, preset in PRESETS.items():
        assert dataclasses.asdict(PlannerConfig(**preset)) != {} and name
    assert PlannerConfig(worlds=12, algorithm="hiper").worlds == 12, "groups are himac's"
