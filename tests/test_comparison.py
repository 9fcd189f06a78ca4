"""Runs judged and compared from Python: what is reused, what is repeated, what is left in the folder."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from echelon.algorithms import MAPPOConfig
from echelon.configs import RunConfig, from_toml, to_toml
from echelon.envs import WarehouseConfig
from echelon.errors import EchelonError
from echelon.evaluation import compare, evaluate_run
from echelon.evaluation.comparison import finished_evaluation
from echelon.reports.replay import write_replay
from echelon.runs import run_costs
from echelon.training import Trainer
from tiny_model import make_tiny_model

ENV = WarehouseConfig(size=8, num_agents=2, num_packages=2, limit=20)
# 200 steps are rounded up to 4 rollouts of 64.
RUN = RunConfig(
    method="rule-goals", env=ENV, steps=200, num_envs=8, threads=1,
    algorithm=MAPPOConfig(hidden=16, rollout=8, precision="float32"),
)  # fmt: skip
FLAT = dataclasses.replace(RUN, method="flat-mappo")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random language model's name."""
    return f"hf:{make_tiny_model(tmp_path_factory.mktemp('tiny'))}"


class Watcher:
    """Remembers what a comparison tells."""

    def __init__(self) -> None:
        self.trained: list[tuple[str, int]] = []
        self.evaluated: set[str] = set()
        self.finished: list[str] = []

    def compare(self, runs: list[RunConfig], out: Path, **options: Any) -> dict[str, dict[str, Any]]:
        return compare(
            runs, out, **{"episodes": 4, "record": 1, **options},
            on_training=lambda run, p: self.trained.append((run.method, p.step)),
            on_evaluation=lambda run, done, total: self.evaluated.add(run.method),
            on_result=lambda run, result: self.finished.append(run.method),
        )  # fmt: skip


def test_methods_are_compared_from_python(tmp_path: Path) -> None:
    """One result a method, with what its training took and what was judged; files and pages beside it."""
    watcher = Watcher()
    results = watcher.compare([RUN, FLAT], tmp_path, write_replay=write_replay)
    assert list(results) == watcher.finished == ["rule-goals", "flat-mappo"]
    assert watcher.trained[:4] == [("rule-goals", 64 * i) for i in (1, 2, 3, 4)]
    assert watcher.evaluated == {"rule-goals", "flat-mappo"}
    assert json.loads((tmp_path / "results.json").read_text()) == results
    for name, run in (("rule-goals", RUN), ("flat-mappo", FLAT)):
        assert json.loads((tmp_path / name / "evaluation.json").read_text()) == results[name]
        assert (tmp_path / name / "replays/evaluation.html").exists()
        assert results[name]["training_seconds"] > 0
        of = results[name]["of"]
        assert {k: v for k, v in of.items() if k != "config"} == {
            "episodes": 4, "world_seed": None, "greedy": False, "step": 256,
        }  # fmt: skip
        assert "threads" not in of["config"].split("[")[0]
        assert from_toml(tomllib.loads(of["config"])) == dataclasses.replace(run, threads=None)


def test_success_is_counted_over_as_many_episodes_as_there_are_worlds(tmp_path: Path) -> None:
    """Worlds that begin together end apart, those that succeed first: the first 50 of 100 say nothing yet."""
    folder = tmp_path / "run"
    Trainer(dataclasses.replace(RUN, num_envs=100, steps=800), folder).run()

    def costs(*ended: tuple[int, float]) -> dict[str, float | None]:
        lines = [
            {"step": 800 * (k + 1), "episodes": n, "own_episodes": n, "own_tsr": tsr}
            for k, (n, tsr) in enumerate(ended)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run_costs(folder)

    assert costs((60, 1.0), (40, 0.0), (60, 1.0), (40, 0.0))["steps_to_tsr_90"] is None
    assert costs((60, 1.0), (40, 0.0), (95, 1.0), (5, 0.0))["steps_to_tsr_90"] == 3200
    assert costs((60, 1.0), (40, 0.8))["steps_to_tsr_90"] == 1600
    # A language model's part of the worlds counts for itself, and 50 at least.
    few = dataclasses.replace(RUN, method="l2m2", model="hf:somewhere", num_envs=400, llm_share=1 / 64)
    assert (few.own_worlds, RUN.own_worlds, FLAT.own_worlds) == (6, 8, 8)


def test_nothing_is_done_twice(tmp_path: Path) -> None:
    """A comparison that was finished only reads; on any number of threads."""
    first = Watcher().compare([RUN, FLAT], tmp_path)
    watcher = Watcher()
    assert watcher.compare([dataclasses.replace(r, threads=2) for r in (RUN, FLAT)], tmp_path) == first
    assert not watcher.trained and not watcher.evaluated and watcher.finished == ["rule-goals", "flat-mappo"]


@pytest.mark.parametrize("changed", ["env", "planner", "world_seed", "greedy", "episodes"])
def test_a_result_about_something_else_is_not_reused(changed: str, tmp_path: Path) -> None:
    """Another world, seed, way to act or number under the same name: evaluated again, but not trained again."""
    before = Watcher().compare([RUN], tmp_path)
    folder = tmp_path / "rule-goals"
    runs = {
        "env": dataclasses.replace(RUN, env=dataclasses.replace(ENV, size=12)),
        "planner": dataclasses.replace(RUN, planner="random-task"),
    }
    run = runs.get(changed, RUN)
    others: dict[str, Any] = {"world_seed": 7, "greedy": True, "episodes": 5}
    options: dict[str, Any] = {"episodes": 4} | {k: v for k, v in others.items() if k == changed}
    other = evaluate_run(run, folder, **options)
    assert other is not None and other["of"] != before["rule-goals"]["of"]
    assert finished_evaluation(RUN, folder, episodes=4) is None
    watcher = Watcher()
    after = watcher.compare([RUN], tmp_path)
    assert not watcher.trained and watcher.evaluated == {"rule-goals"}
    assert without_time(after["rule-goals"]) == without_time(before["rule-goals"])


def without_time(result: dict[str, Any]) -> dict[str, Any]:
    plans = {k: v for k, v in result["plans"].items() if not k.endswith("_seconds")}
    return {k: v for k, v in result.items() if k != "seconds"} | {"plans": plans}


@pytest.mark.parametrize("text", ["[]", "3", "null", "{", "", '"of"', '{"of": 1}', '{"episodes": 4}'])
def test_a_broken_evaluation_is_made_again(text: str, tmp_path: Path) -> None:
    """Whatever stands in evaluation.json, it is no traceback."""
    before = Watcher().compare([RUN], tmp_path)
    (tmp_path / "rule-goals/evaluation.json").write_text(text)
    watcher = Watcher()
    after = watcher.compare([RUN], tmp_path)
    assert not watcher.trained and without_time(after["rule-goals"]) == without_time(before["rule-goals"])


def test_training_that_was_finished_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while it evaluates: run again, only the evaluation is made."""
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 5  # four updates, one step of the evaluation

    assert Watcher().compare([RUN], tmp_path, should_stop=stop) == {}
    assert not (tmp_path / "rule-goals/evaluation.json").exists() and not (tmp_path / "results.json").exists()
    monkeypatch.setattr(Trainer, "resume", lambda *args, **kwargs: pytest.fail("resumed"))
    watcher = Watcher()
    assert list(watcher.compare([RUN], tmp_path)) == ["rule-goals"] and not watcher.trained


def test_a_stopped_comparison_gives_what_is_finished(tmp_path: Path) -> None:
    """Results of the methods that were done; called again, it goes on."""
    watcher = Watcher()
    results = watcher.compare([RUN, FLAT], tmp_path, should_stop=lambda: ("flat-mappo", 128) in watcher.trained)
    assert list(results) == ["rule-goals"] and not (tmp_path / "results.json").exists()
    again = Watcher()
    assert list(again.compare([RUN, FLAT], tmp_path)) == ["rule-goals", "flat-mappo"]
    assert again.trained == [("flat-mappo", 192), ("flat-mappo", 256)]


def test_a_setting_that_is_given_leaves_a_method_its_others() -> None:
    run = dataclasses.replace(RUN, subgoals=dataclasses.replace(RUN.subgoals, retries=5))
    other = run.with_method("l2m2-qmix")
    assert (other.subgoals.retries, other.subgoals.space, other.subgoals.every) == (5, "direction", 10)
    assert other.subgoals.task_weight == 1.0
    assert other.algorithm == RunConfig(method="qmix").algorithm
    assert run.with_method("classical").subgoals.scope == "team"
    assert run.with_method("l2m2").algorithm == RUN.algorithm
    # And back: what the other method brought is not taken along.
    assert other.with_method("rule-goals").subgoals == run.subgoals


def test_what_can_not_be_compared_is_told_first(tmp_path: Path) -> None:
    """Other settings, other lengths, twice the same or nothing at all; before anything is trained."""
    Watcher().compare([FLAT], tmp_path)
    for runs, words in (
        ([], "name at least one"),
        ([RUN, RUN], "each method can be compared once"),
        ([RUN, dataclasses.replace(FLAT, seed=1)], "flat-mappo holds a run with other settings"),
        ([RUN, dataclasses.replace(FLAT, steps=192)], "has done 256 steps already, more than 192"),
        ([dataclasses.replace(RUN, env=dataclasses.replace(ENV, size=5, num_packages=60))], "free cells"),
    ):
        with pytest.raises(EchelonError, match=words):
            compare(runs, tmp_path)
    assert not (tmp_path / "rule-goals").exists()
    # More steps go on with the same run.
    watcher = Watcher()
    watcher.compare([dataclasses.replace(FLAT, steps=257)], tmp_path)
    assert watcher.trained == [("flat-mappo", 320)]


@pytest.mark.parametrize(("file", "kind"), [("study.toml", "study"), ("config.toml", "run")])
def test_a_comparison_writes_over_nothing_else(file: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / file).touch()
    with pytest.raises(EchelonError, match=f"holds a {kind}, whose files a comparison would write over"):
        Watcher().compare([RUN], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [file]


def test_a_name_is_no_path(tmp_path: Path) -> None:
    """Results stay in the run's folder."""
    (tmp_path / "run").mkdir()
    for name in ("../x", "a/b", "a\\b", "", ".", "..", "a\n", "versions", "account", "Result"):
        with pytest.raises(EchelonError, match="the evaluation"):
            evaluate_run(RUN, tmp_path / "run", name=name)
    assert [p.name for p in tmp_path.rglob("*")] == ["run"]


def test_a_model_s_plans_are_kept(tiny_model: str, tmp_path: Path) -> None:
    """One line a planning round in every world, anew each time; a stopped evaluation changes none."""
    run = dataclasses.replace(RUN, method="llm-untrained", model=tiny_model)
    folder = tmp_path / "llm-untrained"
    results = compare([run], tmp_path, episodes=3, record=1)
    lines = [json.loads(line) for line in (folder / "evaluation.plans.jsonl").read_text().splitlines()]
    assert {line["world"] for line in lines} == {0, 1, 2}
    assert all(line["planner"].startswith("llm:") and line["agents"] for line in lines)
    assert results["llm-untrained"]["of"]["step"] == 0
    assert sum("prompt" in a for line in lines for a in line["agents"]) == results["llm-untrained"]["plans"]["asked"]
    evaluate_run(run, folder, episodes=2)
    again = [json.loads(line) for line in (folder / "evaluation.plans.jsonl").read_text().splitlines()]
    assert {line["world"] for line in again} == {0, 1}
    assert evaluate_run(run, folder, episodes=2, should_stop=lambda: True) is None
    assert len((folder / "evaluation.plans.jsonl").read_text().splitlines()) == len(again)
    evaluate_run(dataclasses.replace(run, planner="nearest"), folder, episodes=2)
    assert sorted(p.name for p in folder.iterdir() if p.is_file()) == ["config.toml", "evaluation.json"]


def test_the_config_of_a_result_is_settled(tmp_path: Path) -> None:
    """What depends on the machine is decided in it, so that the same text means the same numbers."""
    run = dataclasses.replace(RUN, algorithm=dataclasses.replace(RUN.algorithm, precision="auto"))
    result = compare([run], tmp_path, episodes=2, record=0)["rule-goals"]
    assert "auto" not in result["of"]["config"].split("precision")[1].splitlines()[0]
    assert to_toml(run).split("precision")[1].splitlines()[0] == ' = "auto"'
