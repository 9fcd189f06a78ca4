"""Runs whose shaping grows with them, as runs of a study beside others."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from echelon import _files, cli_studies, fetching
from echelon.also import AlsoConfig, AlsoTrainer, judging, segments, training
from echelon.also.studied import ShapedRuns
from echelon.checkpoints import checkpoints_of
from echelon.cli import main
from echelon.errors import EchelonError
from echelon.evaluation.episodes import evaluate
from echelon.evaluation.protocol import Protocol
from echelon.llm import TextReply
from echelon.methods import methods
from echelon.runs import read_run
from echelon.studies import Study, collect, kinds, run_study, work
from echelon.studies.engine import kept_result
from echelon.studies.kinds import kind_of
from echelon.studies.spec import study_from_toml, study_to_toml
from echelon.studies.work import execute, job_of
from studies_tools import Here
from test_also import Halting, first_wins

UPDATE = 16 * 16  # environment steps of one update
STEPS = 40 * UPDATE
RUN = {
    "num_envs": 16,
    "algorithm": {"hidden": 16, "rollout": 16, "epochs": 1, "minibatches": 1, "precision": "float32", "lr": 0.02},
    "env": {"num_packages": 2, "limit": 40, "layout": "open"},
    # Two checkpoints with three branches of four updates each.
    "also": {"checkpoints": [0.1, 0.6], "branch": 0.1, "evaluations": 4, "behaviour": 4, "fresh": False},
}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Segments are trained in this process; and nothing here is about power cuts."""
    monkeypatch.setattr(segments, "PoolBackend", lambda slots, log: Here())
    monkeypatch.setattr(_files.os, "fsync", lambda handle: None)
    yield


def tiny(*names: str, run: dict[str, Any] | None = None, **changes: Any) -> Study:
    """A study of one small world and one seed."""
    values: dict[str, Any] = {
        "methods": names, "sizes": (6,), "agents": (2,), "seeds": (0,), "steps": STEPS, "record": 1,
        "protocol": Protocol(every=8 * UPDATE, episodes=8, final_episodes=12),
    }  # fmt: skip
    settings = {"run": {**RUN, **(run or {})}, **changes.pop("settings", {})}
    return Study("tiny", **values | changes, settings=settings)


def results_of(study: Study, folder: Path) -> dict[str, dict[str, Any]]:
    """What came of each method."""
    return {run["method"]: run for run in run_study(study, folder, Here())["runs"]}


def begun(study: Study, folder: Path, asks: int) -> str:
    """Do the study's first run until it has asked so often whether to stop; how it ended."""
    left = iter(range(asks))
    job = job_of(study, study.runs()[0], folder, folder / "never")
    return str(execute(job, orphaned=lambda: next(left, None) is None)["status"])


def without_times(run: dict[str, Any]) -> dict[str, Any]:
    """A result without what the clock decides."""
    text = json.dumps({k: v for k, v in run.items() if "seconds" not in k and "per_second" not in k})
    return dict(json.loads(re.sub(r'"seconds": [\d.e-]+', '"seconds": 0', text)))


def test_a_control_is_the_base_method_to_the_last_digit(tmp_path: Path) -> None:
    """Also where evaluations fall between updates, and whatever the branches would be that it doesn't have."""
    run = {"also": {"branch": 0.3, "evaluations": 7}}
    study = tiny("sparse", "flat-mappo", run=run, protocol=Protocol(every=1000, episodes=8, final_episodes=12))
    found = results_of(study, tmp_path)
    sparse, flat = found["sparse"], found["flat-mappo"]
    assert sparse["status"] == flat["status"] == "finished"
    assert 0 < sum(flat["last"]["success"]) < 12, "what all or none of them do shows nothing"
    assert sparse["evaluations"] == flat["evaluations"] and len(flat["evaluations"]) == 11
    sparse, flat = without_times(sparse), without_times(flat)
    for key in ("last", "best", "learns", "precision", "steps", "training_model_calls", "training_model_tokens"):
        assert sparse[key] == flat[key]
    assert found["sparse"]["training_seconds"] > 0 and found["sparse"]["steps_per_second"] > 0


def test_steps_of_branches_count(tmp_path: Path) -> None:
    study = tiny("also")
    run = results_of(study, tmp_path)["also"]
    folder = tmp_path / "runs" / run["id"]
    account = json.loads((folder / "account.json").read_text())
    assert [len(stage["branches"]) for stage in account["stages"]] == [3, 3], "nothing was tried"
    final = account["final"]
    assert run["last"]["step"] == run["evaluations"][-1]["step"] == final["spent"] >= STEPS > final["steps"]
    assert run["evaluations"][-1]["tsr"] == account["mainline"][-1]["tsr"]
    assert run["shaping"] == final["config"] and len(run["last"]["success"]) == 12
    # Training of all branches is paid for, each once.
    parts = {p.parent.name: json.loads(p.read_text()) for p in (folder / "work/runs").glob("*/result.json")}
    assert len(parts) == 3 + 6
    own = sum(p["training_seconds"] for p in parts.values())
    for name in parts:
        fork = folder / "work/runs" / name / "fork.json"
        own -= parts[Path(json.loads(fork.read_text())["source"]).name]["training_seconds"] if fork.exists() else 0
    assert run["training_seconds"] == pytest.approx(own) and own > 0
    assert run["steps_per_second"] == pytest.approx(final["spent"] / own)
    # What is left: the account, the episodes for a replay, and the policy; nothing of branches that takes room.
    assert (folder / "replays/protocol.json").exists()
    assert len(checkpoints_of(folder / "main/checkpoints")) == 1
    assert not [*(folder / "work/runs").glob("*/checkpoints"), *(folder / "work/runs").glob("*/policies")]


@pytest.mark.parametrize(
    ("name", "also"),
    [
        ("also", {}),
        ("also", {"fresh": True}),
        ("also", {"seeds": 2, "candidates": 1}),
        ("also", {"reference": True, "checkpoints": [0.1, 0.4, 0.7], "candidates": 1}),
        ("also-one-shot", {}),
        ("also-no-branch", {}),
        ("pbrs-grid", {}),
        ("fixed-pbrs", {}),
    ],
)
def test_evaluations_are_of_the_mainline_of_then(
    name: str, also: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each at the first step that is due and was evaluated; the best of them is judged again by its own policy."""
    monkeypatch.setattr(ShapedRuns, "tidy", lambda self, folder: None)
    # Whatever was tried is taken, so that a branch takes the control's place.
    monkeypatch.setattr(judging, "gate", first_wins)
    every = 1000
    study = tiny(
        name, run={"also": {**RUN["also"], **also}}, protocol=Protocol(every=every, episodes=8, final_episodes=12)
    )
    run = results_of(study, tmp_path)[name]
    assert run["status"] == "finished", run["reason"]
    folder = tmp_path / "runs" / run["id"]
    account = json.loads((folder / "account.json").read_text())
    promoted = [stage["verdict"]["winner"] for stage in account["stages"]]
    assert all(promoted) and (bool(promoted) == (name != "fixed-pbrs"))
    steps = [e["step"] for e in run["evaluations"]]
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == account["final"]["spent"]
    later = {p["spent"]: p for p in account["mainline"]}  # where a branch took over, it comes after the control
    for entry in run["evaluations"]:
        point = later[entry["step"]]
        assert (entry["tsr"], entry["task_return"]) == (point["tsr"], point["task_return"])
        assert entry["episodes"] == 8
    for bucket in {spent // every for spent in later}:
        assert min(spent for spent in later if spent // every == bucket) in steps
    best = max(run["evaluations"], key=lambda e: (e["success"], e["step"]))
    assert run["best"]["step"] == best["step"]
    point = later[best["step"]]
    policy = safetensors.torch.load_file(folder / point["segment"] / "policies" / f"{point['step']}.safetensors")
    config = read_run(folder / "main")
    judged, then = evaluate(config, policy, episodes=12, stream=1), evaluate(config, policy, episodes=8)
    assert judged is not None and run["best"]["success"] == [int(x) for x in judged.success]
    assert then is not None and int(then.success.sum()) == best["success"]
    # Policies of what never was the mainline are gone by then.
    was = {point["segment"] for point in account["mainline"]}
    kept = {f"work/runs/{p.parent.name}" for p in (folder / "work/runs").glob("*/policies")}
    assert kept <= was | {s["run"] for s in account["segments"]}


def test_a_study_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    study = tiny("also")
    whole = results_of(study, tmp_path / "whole")["also"]
    (run,) = study.runs()
    outcomes: list[str] = []
    done: list[int] = []
    while not outcomes or outcomes[-1] == "stopped":
        assert len(outcomes) < 100
        # Later each time: an evaluation that is stopped begins anew.
        outcomes.append(begun(study, tmp_path / "part", 8 * (1 + len(outcomes))))
        done.append(kind_of("also").steps_done(tmp_path / "part/runs" / run.id))
    assert outcomes[-1] == "finished" and len(outcomes) > 4
    assert done == sorted(done) and done[0] < done[-2] and done[-1] >= STEPS
    part = kept_result(tmp_path / "part/runs" / run.id)[1]
    for told in (whole, part):
        told.pop("format", None)
    assert without_times(part) == without_times({k: v for k, v in whole.items() if k in part})
    # Done is done.
    (tmp_path / "part/runs" / run.id / "main").rename(tmp_path / "gone")
    assert results_of(study, tmp_path / "part")["also"]["last"] == part["last"]


def test_settings_reach_the_kinds_that_know_them(tmp_path: Path) -> None:
    """What `[run]` says to all, and what each method's own table says."""
    own = {"also": {"base": "flat-ippo", "also": {"candidates": 3}}, "rule-goals": {"subgoals": {"every": 9}}}
    study = tiny(
        "also", "sparse", "rule-goals", run={"collision_cost": 0.25}, settings={"method": own}, imports=("json",),
    )  # fmt: skip
    also, sparse, rule = (run.config for run in study.runs())
    assert isinstance(also, AlsoConfig) and isinstance(sparse, AlsoConfig)
    assert (also.base, sparse.base, rule.method) == ("flat-ippo", "flat-mappo", "rule-goals")
    assert (also.also.candidates, sparse.also.candidates) == (3, 2)
    assert {x.collision_cost for x in (also, sparse, rule)} == {0.25}  # type: ignore[attr-defined]
    assert {x.num_envs for x in (also, sparse, rule)} == {16}  # type: ignore[attr-defined]
    # As the study's other runs are: judged on as many episodes; one core each.
    assert (also.also.episodes, also.also.world_seed, also.workers, also.imports) == (8, None, 1, ("json",))
    (fixed,) = tiny("sparse", protocol=Protocol(world_seed=7)).runs()
    assert isinstance(fixed.config, AlsoConfig) and fixed.config.also.world_seed == 7
    (given,) = tiny("sparse", settings={"method": {"sparse": {"also": {"episodes": 5}}}}).runs()
    assert isinstance(given.config, AlsoConfig) and given.config.also.episodes == 5
    # Fewer methods of the same file are the same runs.
    for some in (("also",), ("rule-goals",)):
        few = replace(study, methods=some, settings={**study.settings, "run": {**RUN, "collision_cost": 0.25}})
        assert {r.id for r in few.runs()} < {r.id for r in study.runs()}
    assert study.ignored() == [] and replace(study, methods=("rule-goals",)).ignored() == ["also"]
    # As it is written, it is read.
    again = study_from_toml(tomllib.loads(study_to_toml(study)))
    assert [run.id for run in again.runs()] == [run.id for run in study.runs()]
    for run in study.runs():
        kind = kind_of(run.method)
        assert kind.restore(kind.write(run.config), "") == run.config


@pytest.mark.parametrize(
    ("names", "settings", "words"),
    [
        (("also", "rule-goals"), {"run": {"num_env": 3}}, "unknown key in study tiny, also 'num_env'"),
        (("rule-goals", "also"), {"run": {"num_env": 3}}, "unknown key in study tiny, rule-goals 'num_env'"),
        (("rule-goals",), {"method": {"rule-goals": {"base": "qmix"}}}, "unknown key in study tiny, rule-goals 'base'"),
        (("also",), {"method": {"also": {"subgoals": {}}}}, "unknown key in study tiny, also 'subgoals'"),
        (("also",), {"method": {"also": {"also": {"branch": 2}}}}, "also.branch is 2.0: it must be above 0, below 1"),
        (("also",), {"method": {"also": {"also": 3}}}, "also must be a table"),
        (("also",), {"method": {"also": {"imports": ["json"]}}}, "imports is the study's own"),
        (("also",), {"method": {"also": {"threads": 2}}}, "threads is the study's own"),
        (("also",), {"run": {"threads": 2}}, "threads is the study's own"),
        (("rule-goals",), {"run": {"imports": ["json"]}}, "imports is the study's own"),
        (("also",), {"run": {"also": {"every": 500_000}}}, "also.every is 500000: a branch has only 100,000 steps"),
        (("pbrs-grid",), {"run": {"also": {"every": 500_000}}}, "a branch has only 100,000 steps"),
        (("also",), {"method": {"alsoo": {}}}, "unknown name in [method] of study tiny 'alsoo': did you mean 'also'?"),
        (("also-no-brunch",), {}, "unknown method 'also-no-brunch': did you mean 'also-no-branch'?"),
        (("sparse",), {"method": {"sparse": {"base": "rule-goals"}}}, "base is rule-goals"),
    ],
)
def test_settings_that_cannot_be(names: tuple[str, ...], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(EchelonError, match=re.escape(words)):
        Study("tiny", methods=names, sizes=(8,), agents=(2,), settings=settings).runs()


def test_ids_say_what_decides_results() -> None:
    def name(method: str = "also", **own: Any) -> str:
        return tiny(method, settings={"method": {method: own}}).runs()[0].id

    assert name() == name(workers=3) == name(server={"timeout": 9.0}) == name(gguf={"threads": 2})
    assert tiny("also", imports=("json",)).runs()[0].id == name()
    asked = {"proposer": "openai:x"}
    others = [
        name(base="flat-ippo"),
        name(also={"candidates": 1}),
        name(**asked),
        name(**asked, server={"timeout": 9.0}),
    ]
    assert len({name(), *others}) == 5
    assert tiny("also", seeds=(1,)).runs()[0].id != name()
    # What a control doesn't have doesn't train it anew; what it has does.
    for control in ("sparse", "fixed-pbrs"):
        assert (name(control, shaping={"scale": 5.0}) == name(control)) == (control == "sparse")
        same = [asked, {"also": {"candidates": 3}}, {"also": {"checkpoints": [0.5]}}, {"also": {"branch": 0.3}}]
        assert {name(control, **own) for own in same} == {name(control)}
        assert len({name(control), name(control, also={"episodes": 5}), name(control, also={"every": 300})}) == 3
    grid = {name("pbrs-grid", also=own) for own in ({}, {"branch": 0.2}, {"rising": False}, {"evaluations": 2})}
    assert len(grid) == 4 and name("pbrs-grid", also={"candidates": 3}) == name("pbrs-grid")


def test_a_record_is_the_same_run_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reported on from another folder, it is still found; and nobody is billed for what a model once said."""
    monkeypatch.chdir(tmp_path)
    whole = results_of(tiny("also"), tmp_path / "whole")["also"]
    account = json.loads((tmp_path / "whole/runs" / whole["id"] / "account.json").read_text())
    for stage in account["stages"]:
        stage["card_note"] = {"tries": [{"prompt": "?", "reply": "!", "prompt_tokens": 1000}]}
    Path("said.json").write_text(json.dumps(account))
    study = tiny("also", run={"proposer": "recorded:said.json"})
    run = results_of(study, tmp_path / "again")["also"]
    assert run["status"] == "finished" and run["evaluations"] == whole["evaluations"]
    assert (run["training_model_calls"], run["training_model_tokens"]) == (0, 0)
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    assert [r["status"] for r in collect(study, tmp_path / "again")["runs"]] == ["finished"]


def test_a_models_words_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Writer:
        """Says nothing of use."""

        name = "writer"

        def generate(self, prompts: list[Any]) -> list[TextReply]:
            return [TextReply("no", prompt_tokens=7, completion_tokens=1) for _ in prompts]

    monkeypatch.setattr(training, "writer_of", lambda spec, server, gguf: Writer())
    run = results_of(tiny("also", run={"proposer": "openai:x"}), tmp_path)["also"]
    assert run["status"] == "finished", run["reason"]
    assert run["training_model_calls"] >= 4 and run["training_model_tokens"] == 7 * run["training_model_calls"]


@pytest.mark.parametrize("account", ["", "[]", '{"mainline": 3}', '{"format": 1, "mainline": [{"step": 1}]}'])
def test_a_damaged_account_is_its_own_runs_trouble(account: str, tmp_path: Path) -> None:
    study = tiny("also", "flat-mappo", steps=4 * UPDATE)
    also = study.runs()[0]
    assert begun(study, tmp_path, 9) == "stopped"
    (tmp_path / "runs" / also.id / "account.json").write_text(account)
    found = results_of(study, tmp_path)
    assert found["flat-mappo"]["status"] == "finished"
    assert found["also"]["status"] == "failed" and "account" in found["also"]["reason"]


def test_what_failed_once_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = tiny("pbrs-grid")

    def fail(*some: Any, **others: Any) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(kinds, "run_by_protocol", fail)
        assert "no room" in results_of(study, tmp_path)["pbrs-grid"]["reason"]
    assert results_of(study, tmp_path)["pbrs-grid"]["status"] == "failed"
    again = run_study(study, tmp_path, Here(), retry_failed=True)["runs"]
    assert [run["status"] for run in again] == ["finished"]


def test_what_fails_now_is_not_tried_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def fail(run: Any, folder: Path, *some: Any, **others: Any) -> None:
        tried.append(folder.name)
        raise ValueError("it diverged")

    monkeypatch.setattr(kinds, "run_by_protocol", fail)
    assert "it diverged" in results_of(tiny("pbrs-grid"), tmp_path)["pbrs-grid"]["reason"]
    assert tried and len(tried) == len(set(tried))


def test_a_run_whose_result_is_removed_is_done_again(tmp_path: Path) -> None:
    """What was tidied away isn't needed: the best policy, which isn't the last, is in the run's folder."""
    study = tiny("also", seeds=(0, 1, 2, 3))
    runs = [run for run in run_study(study, tmp_path, Here())["runs"] if run["best"]["step"] < run["last"]["step"]]
    assert runs, "in each of them the last policy is the best"
    for run in runs:
        folder = tmp_path / "runs" / run["id"]
        policy = safetensors.torch.load_file(folder / "best.safetensors")
        judged = evaluate(read_run(folder / "main"), policy, episodes=12, stream=1)
        assert judged is not None and run["best"]["success"] == [int(x) for x in judged.success]
        (folder / "result.json").unlink()
        (folder / "protocol.json").unlink()
    again = {run["id"]: run for run in run_study(study, tmp_path, Here())["runs"]}
    for run in runs:
        assert without_times(again[run["id"]]) == without_times(run)


def test_policies_of_all_evaluations_are_kept_on_demand(tmp_path: Path) -> None:
    protocol = Protocol(every=8 * UPDATE, episodes=8, final_episodes=2, keep_policies=True)
    run = results_of(tiny("also", protocol=protocol), tmp_path)["also"]
    folder = tmp_path / "runs" / run["id"]
    kept = {int(path.stem): path for path in (folder / "policies").iterdir()}
    assert sorted(kept) == [e["step"] for e in run["evaluations"]]
    assert kept[run["best"]["step"]].read_bytes() == (folder / "best.safetensors").read_bytes()
    for entry in run["evaluations"]:
        then = evaluate(read_run(folder / "main"), safetensors.torch.load_file(kept[entry["step"]]), episodes=8)
        assert then is not None and int(then.success.sum()) == entry["success"]


def test_a_run_that_ends_in_branches_that_fail_is_judged_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control's failure leaves the mainline where it was, with the steps spent."""
    real = kinds.run_by_protocol

    def fail(run: Any, folder: Path, *some: Any, **others: Any) -> Any:
        if folder.name.startswith("C1"):
            raise ValueError("no")
        return real(run, folder, *some, **others)

    monkeypatch.setattr(kinds, "run_by_protocol", fail)
    run = results_of(tiny("also", run={"also": {**RUN["also"], "checkpoints": [0.1, 0.7]}}), tmp_path)["also"]
    assert run["status"] == "finished", run["reason"]
    assert run["evaluations"][-1]["step"] == run["last"]["step"] >= STEPS
    folder = tmp_path / "runs" / run["id"]
    account = json.loads((folder / "account.json").read_text())
    assert account["mainline"][-1]["spent"] < account["final"]["spent"], "it went on after all"
    assert run["evaluations"][-1]["tsr"] == account["mainline"][-1]["tsr"]
    done = [p for p in (folder / "work/runs").iterdir() if (p / "result.json").exists()]
    assert not [p for p in done if p.name.startswith("C1")]
    steps = run["steps_per_second"] * run["training_seconds"]
    assert 0 < steps < account["final"]["spent"] - 4 * UPDATE, "steps that nobody did were counted"


def test_what_another_process_holds_is_not_called_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "_BUSY_FOR", 0.0)
    study = tiny("sparse", steps=2 * UPDATE)
    (run,) = study.runs()
    with _files.only_writer(tmp_path / "runs" / run.id / "work/runs/main-0/.job"):
        assert results_of(study, tmp_path)["sparse"]["status"] == "pending"
    assert results_of(study, tmp_path)["sparse"]["status"] == "finished"


def test_a_study_that_moved_finds_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job says where they are now, not the run's old config."""
    module = tmp_path / "own.py"
    module.write_text("HERE = True\n")
    said = results_of(tiny("also", steps=12 * UPDATE), tmp_path / "said")["also"]
    record = tmp_path / "said/runs" / said["id"]
    study = tiny("also", imports=(str(module),), steps=12 * UPDATE, run={"proposer": f"recorded:{record.name}"})
    monkeypatch.chdir(record.parent)
    (run,) = study.runs()
    stop = iter([*[False] * 20, *[True] * 1000])
    assert (
        execute(job_of(study, run, tmp_path / "old", tmp_path / "never"), orphaned=stop.__next__)["status"] == "stopped"
    )
    (tmp_path / "old").rename(tmp_path / "new")
    module.rename(tmp_path / "moved.py")
    (tmp_path / "said").rename(tmp_path / "told")
    monkeypatch.chdir(tmp_path / "told/runs")
    study = replace(study, imports=(str(tmp_path / "moved.py"),))
    found = results_of(study, tmp_path / "new")["also"]
    assert found["status"] == "finished" and found["id"] == run.id, found["reason"]


def test_steps_done_are_those_of_all_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of those under way: the time left is reckoned by them."""
    study = tiny("also")
    (run,) = study.runs()
    kind, folder = kind_of("also"), tmp_path / "runs" / run.id
    job, done, status = job_of(study, run, tmp_path, tmp_path / "never"), [kind.steps_done(folder)], "stopped"
    while status == "stopped":
        backend = Halting(150 + 61 * len(done))
        monkeypatch.setattr(segments, "PoolBackend", lambda slots, log: backend)  # noqa: B023
        status = execute(job, orphaned=lambda: backend.stopped)["status"]  # noqa: B023
        done.append(kind.steps_done(folder))
    assert status == "finished" and done[0] == 0 and done == sorted(done)
    account = json.loads((folder / "account.json").read_text())
    assert done[-1] == account["final"]["spent"] and len(done) > 4
    assert set(done[1:-1]) - {entry["spent"][1] for entry in account["segments"]}, "never stopped in a segment"


def test_another_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    study = tiny("sparse")
    (run,) = study.runs()
    assert isinstance(run.config, AlsoConfig)
    AlsoTrainer(replace(run.config, collision_cost=0.5), tmp_path / "runs" / run.id)
    results = results_of(study, tmp_path)
    assert "holds a run with other settings" in results["sparse"]["reason"]


def test_a_cost_is_told_before() -> None:
    """As much as the base method's, since its steps are all that are spent; no model is asked by rules."""
    also, flat = tiny("also", "flat-mappo", steps=4_000_000).runs()
    costs = [kind_of(run.method).estimate(run.config, Protocol(every=400_000, episodes=8)) for run in (also, flat)]
    assert costs[0].steps == costs[1].steps == 4_000_000
    assert costs[1].seconds < costs[0].seconds < 2 * costs[1].seconds
    assert costs[0].model_calls == 0
    asked = tiny("also", run={"proposer": "openai:x"}).runs()[0].config
    cost = kind_of("also").estimate(asked, Protocol())
    assert cost.model_calls == 2 * (1 + 2) and 500 < cost.model_tokens / cost.model_calls < 5000


def test_the_command_line_studies_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real workers, whose branches have workers of their own; and the report leads to the account's page."""
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    study = tiny("also", "flat-mappo", steps=10 * UPDATE)
    Path("shaped.toml").write_text(study_to_toml(study))
    assert main(["study", "shaped.toml", "--out", "out"]) == 0
    assert "also" in capsys.readouterr().out
    also = next(run.id for run in study.runs() if run.method == "also")
    page = Path("out/report.html").read_text()
    (link,) = re.findall(r'<a href="([^"]+)">account</a>', page)
    assert link == f"runs/{also}/account.html"
    assert "also over flat-mappo on warehouse" in (Path("out") / link).read_text()
    (Path("out") / link).unlink()
    Path("out").rename("#1 out")
    assert main(["report", "#1 out", "--out", "elsewhere"]) == 0
    assert ">account</a>" not in Path("elsewhere/report.html").read_text()
    assert not (Path("#1 out") / link).exists(), "a report elsewhere writes nothing here"
    assert main(["report", "#1 out"]) == 0
    assert main(["report", "#1 out", "--out", "elsewhere"]) == 0
    assert f'href="../%231%20out/{link}"' in Path("elsewhere/report.html").read_text()
    assert main(["study", "shaped.toml", "--methods", "magrpo"]) == 2
    assert "magrpo has a trainer of its own" in capsys.readouterr().err


def test_the_command_line_asks_for_models_and_records_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr(fetching, "ensure_spec", lambda spec, server, gguf: asked.append(spec))
    cli_studies._ensure_models(tiny("sparse", "also", "also-no-critic", run={"proposer": "openai:x"}))
    assert asked == ["openai:x"]
    study = tiny("sparse", "also", "also-one-shot", settings={"method": {"also": {"proposer": "openai:x"}}})
    other = cli_studies._with_model(study, "hf:other")
    proposers = {r.method: r.config.proposer for r in other.runs() if isinstance(r.config, AlsoConfig)}
    assert proposers == {"sparse": "heuristic", "also": "hf:other", "also-one-shot": "heuristic"}
    Path("study.toml").write_text(study_to_toml(tiny("also", run={"proposer": "recorded:nowhere.json"})))
    assert main(["study", "study.toml"]) == 2
    said = capsys.readouterr()
    assert "nowhere.json" in said.err and said.err.count("\n") == 1 and not Path("studies").exists()


def test_every_method_is_of_one_kind() -> None:
    kinds = {name: kind_of(name) for name in (*methods(), "also", "sparse", "pbrs-grid")}
    assert len(set(map(id, kinds.values()))) == 2
    assert all(name in kind.methods for name, kind in kinds.items())
