"""Runs whose shaping grows with them: the tree of segments, its account, and what must not change what comes out."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import echelon
import echelon.envs
from echelon import _files
from echelon.also import (
    ALSO_METHODS,
    AlsoConfig,
    AlsoProgress,
    AlsoTrainer,
    also_from_toml,
    also_to_toml,
    judging,
    segments,
    training,
)
from echelon.checkpoints import checkpoints_of
from echelon.cli import main
from echelon.envs import Warehouse, WarehouseConfig
from echelon.errors import BusyError, EchelonError, StorageError
from echelon.evaluation import protocol
from echelon.evaluation.episodes import evaluate
from echelon.reports.account import write_account
from echelon.runs import read_run, run_costs
from echelon.shaping import (
    Candidate,
    CriticCard,
    Proposed,
    ShapingConfig,
    Situation,
    Summary,
    Verdict,
    gate,
    score_lead,
    summarise,
    term_set,
)
from echelon.shaping.proposers import RecordedProposer
from echelon.studies import kinds, work
from echelon.training import Trainer, load_policy
from misbehaving_server import MisbehavingServer
from studies_tools import Here

UPDATE = 16 * 16  # environment steps of one update
TERMS = term_set("warehouse")


@pytest.fixture(scope="module", autouse=True)
def unsynced() -> Iterator[None]:
    """Nothing here is about power cuts, and syncing is most of what a tiny run does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_files.os, "fsync", lambda handle: None)
        yield


def tiny(**changes: Any) -> AlsoConfig:
    """40 updates: two checkpoints with three branches of four updates each."""
    also = {"checkpoints": [0.1, 0.6], "branch": 0.1, "candidates": 2, "evaluations": 4, "episodes": 8, "behaviour": 4,
            "fresh": False}  # fmt: skip
    algorithm = {"hidden": 16, "rollout": 16, "epochs": 1, "minibatches": 1, "precision": "float32", "lr": 0.02}
    env = {"size": 6, "num_agents": 2, "num_packages": 4, "limit": 60, "layout": "open"}
    data = {"steps": 40 * UPDATE, "num_envs": 16, "workers": 1, "env": env, **changes}
    data["also"] = {**also, **changes.get("also", {})}
    data["algorithm"] = {**algorithm, **changes.get("algorithm", {})}
    return also_from_toml(data)


def grow(
    config: AlsoConfig, folder: Path, *, proposer: Any = None, backend: Any = None, finished: bool = True,
    report: Callable[[AlsoProgress], None] = lambda progress: None, should_stop: Callable[[], bool] = lambda: False,
) -> AlsoTrainer:  # fmt: skip
    """Begin a run, or go on with it; its segments are trained in this process, one after the other."""
    if (folder / "config.toml").exists():
        trainer = AlsoTrainer.resume(folder, proposer=proposer)
    else:
        trainer = AlsoTrainer(config, folder, proposer=proposer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "PoolBackend", lambda slots, log: backend or Here())
        assert trainer.run(report, should_stop) == finished
    return trainer


def read(folder: Path) -> dict[str, Any]:
    """A run's account, as anybody reads it."""
    found = json.loads((folder / "account.json").read_text())
    assert isinstance(found, dict)
    return found


def lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def same(one: Path, other: Path) -> None:
    """Assert that two runs came out alike, account, metrics and policy."""
    assert read(one) == read(other)
    assert lines(one) == lines(other)
    a, b = (load_policy(folder / "main")[1] for folder in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def first_wins(control: Summary, candidates: Mapping[str, Summary], *more: Any, **others: Any) -> Verdict:
    """A gate that takes the first candidate that could be trained."""
    fit = [name for name in sorted(candidates) if candidates[name].fault is None]
    if control.fault is not None or not fit:
        return Verdict(False, None, ("nothing to take",))
    return Verdict(True, fit[0], ("the first one",), fit[0])


class Asked:
    """A proposer that gives other shapings each time that it is asked, whatever it is told."""

    name = "asked"

    def __init__(self, *names: str) -> None:
        self.names = names
        self.calls: list[str] = []
        self.situations: list[Situation] = []

    def diagnose(self, situation: Situation) -> tuple[CriticCard | None, dict[str, Any]]:
        self.calls.append("diagnose")
        return None, {"call": len(self.calls)}

    def propose(self, situation: Situation, card: CriticCard | None) -> Proposed:
        self.calls.append("propose")
        self.situations.append(situation)
        names = self.names or [f"try-{len(self.calls)}-{k}" for k in range(situation.count)]
        candidates = []
        for k, name in enumerate(names):
            weights = {"approach": 1.0, "deliv": 0.1 * (len(self.calls) + k)}
            candidates.append(Candidate(name, "balanced", ShapingConfig(f"mine-{k}", 0.4 + 0.05 * k, weights)))
        return Proposed(tuple(candidates), "uncertain", "moderate", {"call": len(self.calls)})

    def review(self, situation: Situation) -> tuple[None, dict[str, Any]]:
        self.calls.append("review")
        return None, {}


class Nothing(Asked):
    """A proposer that never has an idea."""

    def propose(self, situation: Situation, card: CriticCard | None) -> Proposed:
        self.calls.append("propose")
        return Proposed((), "uncertain", "conservative")


class Poison(Asked):
    """What helps least: to stand apart is all that pays, as much as it can."""

    name = "poison"

    def propose(self, situation: Situation, card: CriticCard | None) -> Proposed:
        past = len(situation.trials)
        configs = [ShapingConfig(f"poison-{past + k}", 1 - 0.1 * (past + k), {"traffic": 1.0}) for k in range(2)]
        return Proposed(tuple(Candidate(c.mode, "balanced", c) for c in configs), "uncertain", "moderate")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("also") / "whole"
    grow(tiny(), folder)
    return folder


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on the task reward alone."""
    folder = tmp_path_factory.mktemp("also") / "sparse"
    grow(tiny(method="sparse"), folder)
    return folder


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which the first proposal of each checkpoint is promoted."""
    folder = tmp_path_factory.mktemp("also") / "asked"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "gate", first_wins)
        grow(tiny(), folder, proposer=Asked())
    return folder


# -- a whole run -------------------------------------------------------------------------------


def spent(account: dict[str, Any]) -> int:
    """Steps of all segments and branches."""
    tried = {branch["run"] for stage in account["stages"] for branch in stage["branches"]}
    own = sum(s["to"] - s["from"] for s in account["segments"] if s["run"] not in tried)
    return int(own + sum(stage["cost"] for stage in account["stages"]))


def test_the_account_of_a_run(whole: Path) -> None:
    """Its parts are there and agree with each other."""
    a = read(whole)
    assert set(a) == {"format", "method", "base", "environment", "seed", "steps", "proposer", "best_return",
                      "vocabulary", "notes", "stages", "skipped", "mainline", "segments", "final"}  # fmt: skip
    assert (a["format"], a["method"], a["base"], a["environment"]) == (1, "also", "flat-mappo", "warehouse")
    assert (a["proposer"], a["best_return"], a["steps"]) == ("heuristic", 4.0, 40 * UPDATE)
    assert "approach" in a["vocabulary"]
    assert [stage["name"] for stage in a["stages"]] == ["C0", "C1"]
    for stage in a["stages"]:
        assert set(stage) == {"name", "at", "spent", "current", "evidence", "card", "card_note", "rounds", "branches",
                              "summaries", "lead", "verdict", "cost"}  # fmt: skip
        assert set(stage["evidence"]) >= {"curve", "behaviour", "flags"}
        CriticCard.model_validate(stage["card"])
        proposed = [c["id"] for c in stage["rounds"][0]["proposed"]["candidates"]]
        assert [b["name"] for b in stage["branches"]] == ["no change", *proposed] and len(proposed) == 2
        assert set(stage["summaries"]) == {"no change", *proposed}
        assert all((b["round"], b["seed"], b["problem"]) == (1, 0, None) for b in stage["branches"])
        assert all(len(b["curve"]) == 4 and b["curve"][0]["step"] > stage["at"] for b in stage["branches"])
        assert stage["cost"] == 3 * 4 * UPDATE
        assert stage["current"] is None or stage["name"] == "C1"
    line = a["mainline"]
    assert line[0]["spent"] == line[0]["step"] == 0
    assert all(x["spent"] <= y["spent"] and x["step"] <= y["step"] for x, y in itertools.pairwise(line))
    assert line[-1]["spent"] == a["final"]["spent"] == spent(a) >= a["steps"]
    assert line[-1]["step"] == a["final"]["steps"] == a["segments"][-1]["to"]
    assert len({p["task_return"] for p in line}) > 3  # something was learnt or forgotten
    # The mainline is a path: each segment begins where the one before ended.
    assert [s["from"] for s in a["segments"]] == [0, *(s["to"] for s in a["segments"][:-1])]


def test_the_verdict_is_the_gates(whole: Path) -> None:
    """Recomputed from the curves that the account holds; the mainline follows it."""
    a, first = read(whole), None
    for stage in a["stages"]:
        summaries = {}
        for branch in stage["branches"]:
            returns = [point["task_return"] for point in branch["curve"] if point["step"] > stage["at"]]
            config = None if branch["config"] is None else ShapingConfig.from_json(branch["config"])
            summary = summarise(returns, best_return=a["best_return"], config=config, rising=True)
            summaries[branch["name"]] = summary
            told = stage["summaries"][branch["name"]]
            assert told["score"] == pytest.approx(summary.score, abs=1e-6)
            assert told["last_k"] == pytest.approx(np.mean(returns[-5:]) / 4, abs=1e-6)
        control = summaries.pop("no change")
        verdict = gate(control, summaries, first_replacement=first is not None and stage["current"] == first)
        assert stage["verdict"]["accepted"] == verdict.accepted
        assert stage["verdict"]["winner"] == verdict.winner
        assert stage["verdict"]["reasons"] == list(verdict.reasons)
        taken = next(s for s in a["segments"] if s["from"] == stage["at"] and s["run"].split("/")[-1][:2] == "C" + stage["name"][1])  # fmt: skip  # noqa: E501
        name = verdict.winner or "no change"
        first = first or (taken["config"] if verdict.accepted else None)
        assert taken["run"] == next(b["run"] for b in stage["branches"] if b["name"] == name)


def test_what_is_left_is_an_ordinary_run(whole: Path) -> None:
    """`main/` loads, plays and is evaluated; the metrics are the mainline's, in steps without a gap."""
    run, policy = load_policy(whole / "main")
    assert run == read_run(whole / "main") and run.method == "flat-mappo"
    result = evaluate(run, policy, episodes=3)
    assert result is not None and len(result.success) == 3
    steps = [json.loads(line)["step"] for line in lines(whole)]
    assert steps == list(range(UPDATE, read(whole)["final"]["steps"] + 1, UPDATE))
    page = write_account(whole)
    assert page == whole / "account.html" and "C1" in page.read_text()
    kept = [p for p in (whole / "work/runs").iterdir() if checkpoints_of(p / "checkpoints")]
    assert [p.name for p in kept] == [read(whole)["segments"][-1]["run"].split("/")[-1]]
    assert also_from_toml({**_toml(whole), "workers": 1}) == tiny()


def _toml(folder: Path) -> dict[str, Any]:
    import tomllib

    return tomllib.loads((folder / "config.toml").read_text())


def test_a_finished_run_stays_as_it_is(whole: Path) -> None:
    """Resumed it trains nothing; what `main/` was evaluated on is kept. A new run can't begin in its folder."""
    (whole / "main" / "evaluation.json").write_text("{}")
    before = (whole / "account.json").read_bytes()
    backend = Here()
    grow(tiny(), whole, backend=backend)
    assert backend.done == [] and (whole / "account.json").read_bytes() == before
    assert (whole / "main" / "evaluation.json").exists()
    with pytest.raises(EchelonError, match="holds a run already"):
        AlsoTrainer(tiny(), whole)


# -- bit-identity ------------------------------------------------------------------------------


def test_a_branch_without_a_change_goes_on_as_if_nothing_were(whole: Path, sparse: Path, tmp_path: Path) -> None:
    """Mainline and control branch are, line by line, one straight run; that of the task reward alone, too."""
    runs = whole / "work" / "runs"
    together = [*lines(runs / "main-0"), *lines(runs / "C0-no-change-0")]
    straight = Trainer(tiny().run(None, steps=8 * UPDATE), tmp_path / "straight")
    straight.run()
    assert len(together) == 8 and lines(tmp_path / "straight") == together

    def learnt(line: str) -> dict[str, Any]:
        return {k: v for k, v in json.loads(line).items() if "shap" not in k}

    assert [learnt(line) for line in together] == [learnt(line) for line in lines(sparse)[:8]]
    assert lines(runs / "C0-no-change-0") != lines(runs / next(_others(runs)))


def _others(runs: Path) -> Iterator[str]:
    return (p.name for p in sorted(runs.glob("C0-1-*")))


def test_a_promoted_branch_is_where_the_mainline_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next segment forks from the winner's last checkpoint; the losers' are gone; its shaping is the run's."""
    monkeypatch.setattr(judging, "gate", first_wins)
    real, ends, left = segments.fork_run, {}, {}

    def noted(source: Path, folder: Path, *more: Any, **others: Any) -> None:
        newest = checkpoints_of(source / "checkpoints")
        if newest:
            ends[folder.name] = (source.name, json.loads((newest[-1] / "manifest.json").read_text())["sha256"])
            runs = source.parent
            left[folder.name] = sorted(p.name for p in runs.iterdir() if checkpoints_of(p / "checkpoints"))
        real(source, folder, *more, **others)

    monkeypatch.setattr(segments, "fork_run", noted)
    proposer, folder = Asked(), tmp_path / "run"
    grow(tiny(), folder, proposer=proposer)
    a = read(folder)
    assert [s["run"].split("/")[-1] for s in a["segments"]] == [
        "main-0", "C0-1-try-2-0-0", "main-1", "C1-1-try-5-0-0", "main-2"
    ]  # fmt: skip
    source, hashes = ends["main-1"]
    fork = json.loads((folder / "work/runs/main-1/fork.json").read_text())
    assert (source, left["main-1"]) == ("C0-1-try-2-0-0", ["C0-1-try-2-0-0"])
    assert fork["of"] == {k: hashes[k] for k in ("worlds.safetensors", "algorithm.safetensors")}
    winner = a["stages"][1]["rounds"][0]["proposed"]["candidates"][0]["config"]
    assert a["stages"][1]["current"] == a["stages"][0]["rounds"][0]["proposed"]["candidates"][0]["config"]
    assert a["final"]["config"] == winner
    assert read_run(folder / "main").shaping.config("warehouse") == ShapingConfig.from_json(winner)
    assert a["mainline"][-1]["config"] == winner["mode"]
    # What the proposer was told at the second checkpoint.
    later = proposer.situations[1]
    assert not later.initial and later.current == ShapingConfig.from_json(a["stages"][1]["current"])
    assert [(t.candidate.id, t.accepted) for t in later.trials] == [("try-2-0", True), ("try-2-1", False)]
    assert later.earlier == 2 and proposer.situations[0].initial


def test_first_proposals_from_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are trained from scratch for as long as the control has been; all that counts, and the winner's are the
    run's metrics. Later ones are forks."""
    monkeypatch.setattr(judging, "gate", first_wins)
    folder = tmp_path / "run"
    a = grow(tiny(also={"fresh": True}), folder, proposer=Asked()).account
    one, two = a["stages"]
    at = one["at"]
    assert at == 4 * UPDATE and one["cost"] == 4 * UPDATE + 2 * (at + 4 * UPDATE) and two["cost"] == 3 * 4 * UPDATE
    for stage in a["stages"]:
        for branch in stage["branches"]:
            fresh = stage is one and branch["name"] != "no change"
            assert (folder / branch["run"] / "fork.json").exists() != fresh
            begin = json.loads(lines(folder / branch["run"])[0])["step"]
            assert begin == UPDATE if fresh else begin == stage["at"] + UPDATE
    winner = one["branches"][1]
    assert a["segments"][1]["run"] == winner["run"] and (a["segments"][1]["from"], a["segments"][1]["to"]) == (
        0, at + 4 * UPDATE
    )  # fmt: skip
    # The first is what a run with this shaping from its beginning is.
    straight = Trainer(tiny().run(ShapingConfig.from_json(winner["config"]), steps=at + 4 * UPDATE), tmp_path / "two")
    straight.run()
    assert lines(folder)[:8] == lines(tmp_path / "two") == lines(folder / winner["run"])
    assert [json.loads(line)["step"] for line in lines(folder)] == list(
        range(UPDATE, a["final"]["steps"] + 1, UPDATE)
    )  # fmt: skip
    assert a["final"]["spent"] == spent(a) >= a["steps"]
    line = a["mainline"]
    assert all(x["spent"] <= y["spent"] for x, y in itertools.pairwise(line)) and line[-1]["spent"] == spent(a)
    write_account(folder)


def test_branches_that_do_not_fit_the_budget_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the beginning they cost more the later it is: then they go on from the checkpoint, if that fits."""
    monkeypatch.setattr(judging, "gate", lambda *some, **others: Verdict(False, None, ("no",)))
    config, told = tiny(also={"fresh": True, "checkpoints": [0.1, 0.6, 0.95]}), list[str]()
    a = grow(config, tmp_path / "run", proposer=Poison(), report=lambda p: told.extend(p.news)).account
    assert [stage["name"] for stage in a["stages"]] == ["C0", "C1"]
    tried = [[b["curve"][0]["step"] > stage["at"] for b in stage["branches"]] for stage in a["stages"]]
    assert tried == [[True, False, False], [True, True, True]]
    assert "C2: not enough steps are left for its branches" in told
    assert a["final"]["spent"] == spent(a) == config.steps


def test_branches_that_could_come_to_nothing_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Summary, dict[str, bool]]] = []

    def noted(newest: Summary, **strict: bool) -> bool:
        seen.append((newest, strict))
        return len(seen) == 2

    monkeypatch.setattr(judging, "hopeless", noted)
    config, told = tiny(also={"checkpoints": [0.1, 0.5, 0.6], "soft": True}), list[str]()
    a = grow(config, tmp_path / "run", report=lambda p: told.extend(p.news)).account
    why = "the mainline is so good that the gate would refuse a perfect branch, too"
    assert [stage["name"] for stage in a["stages"]] == ["C0", "C2"] and f"C1: {why}" in told
    (skipped,) = a["skipped"]
    assert skipped | {"at": 0, "spent": 0} == {"name": "C1", "at": 0, "spent": 0, "why": why}
    assert a["stages"][0]["spent"] < skipped["spent"] < a["stages"][1]["spent"] and a["final"]["spent"] == spent(a)
    for (newest, strict), spent_then in zip(seen, [s["spent"] for s in (a["stages"][0], skipped)], strict=False):
        line = [p["task_return"] for p in a["mainline"] if p["spent"] <= spent_then]
        returns = line[-config.also.evaluations :]
        assert newest == summarise(returns, best_return=a["best_return"], rising=True)
        assert strict == {"low_return": True, "soft": True, "first_replacement": False}
    assert "C1</b> at" in write_account(tmp_path / "run").read_text()


# -- stops and deaths --------------------------------------------------------------------------


class Crash(BaseException):
    """What no code expects."""


def test_a_run_that_dies_after_each_decision_is_the_run_that_did_not(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proposer that would say something else is never asked again, also if a run dies while it catches up."""
    monkeypatch.setattr(judging, "gate", first_wins)
    real, folder, deaths = training.atomic_write_json, tmp_path / "run", 0
    proposer = Asked()
    for fatal in itertools.count(1):
        writes = itertools.count(1)

        def write(path: Path, *more: Any, **others: Any) -> None:
            real(path, *more, **others)
            if path.name == "account.json" and next(writes) == fatal:  # noqa: B023
                raise Crash

        with monkeypatch.context() as patch:
            patch.setattr(training, "atomic_write_json", write)
            try:
                grow(tiny(), folder, proposer=proposer)
                break
            except Crash:
                deaths += 1
        # And once more at the first thing that is written when it catches up.
        with monkeypatch.context() as patch:
            patch.setattr(training, "atomic_write_json", lambda path, *more: (real(path, *more), _die())[0])
            with pytest.raises(Crash):
                grow(tiny(), folder, proposer=proposer)
    assert deaths >= 8 and proposer.calls == ["diagnose", "propose", "review"] * 2
    same(asked, folder)


def _die() -> None:
    raise Crash


class Halting(Here):
    """A backend whose jobs are asked to stop after a while, wherever they are."""

    def __init__(self, patience: int) -> None:
        super().__init__()
        self.patience, self.stopped = patience, False

    def wait(self, seconds: float) -> list[tuple[str, dict[str, Any]]]:
        job = self._waiting.popleft()
        return [(job["id"], work.execute(job, self._asked))]

    def _asked(self) -> bool:
        self.patience -= 1
        self.stopped = self.stopped or self.patience < 0
        return self.stopped


def test_a_run_that_is_stopped_again_and_again_comes_out_the_same(whole: Path, tmp_path: Path) -> None:
    """In the middle of an update, of an evaluation, of a branch: it returns, and goes on the next time."""
    folder, stops = tmp_path / "run", 0
    while not (folder / "account.json").exists() or read(folder)["final"] is None:
        backend = Halting(300 + 61 * stops)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(segments, "PoolBackend", lambda slots, log: backend)  # noqa: B023
            trainer = AlsoTrainer.resume(folder) if folder.exists() else AlsoTrainer(tiny(), folder)
            done = trainer.run(should_stop=lambda: backend.stopped)  # noqa: B023
        assert done == (not backend.stopped)
        stops += not done
    assert stops >= 4
    same(whole, folder)


def test_one_trainer_that_goes_on_asks_nothing_twice(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "gate", first_wins)
    monkeypatch.setattr(segments, "PoolBackend", lambda slots, log: Here())
    proposer, stop = Asked(), [False]
    trainer = AlsoTrainer(tiny(), tmp_path / "run", proposer=proposer)

    def told(p: AlsoProgress) -> None:
        stop[0] = stop[0] or "round 1" in p.stage

    assert not trainer.run(told, lambda: stop[0])
    assert proposer.calls == ["diagnose", "propose"]
    assert trainer.run()
    assert proposer.calls == ["diagnose", "propose", "review"] * 2
    same(asked, tmp_path / "run")


@pytest.mark.parametrize("what", ["diagnose", "propose", "review"])
def test_a_stop_while_the_model_is_asked_leaves_no_answer(
    what: str, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop breaks a model's call off; what comes of that isn't kept, and the run that goes on asks anew."""
    monkeypatch.setattr(judging, "gate", first_wins)

    class Slow(Asked):
        stopped = False

        def __getattribute__(self, name: str) -> Any:
            if name != what or self.stopped:
                return super().__getattribute__(name)

            def broken_off(*situation: Any) -> Any:
                self.stopped = True
                return Proposed((), "uncertain", "moderate") if what == "propose" else (None, {"error": "given up"})

            return broken_off

    proposer = Slow()
    grow(tiny(), tmp_path / "run", proposer=proposer, should_stop=lambda: proposer.stopped, finished=False)
    assert "given up" not in (tmp_path / "run" / "account.json").read_text()
    grow(tiny(), tmp_path / "run", proposer=proposer)
    same(asked, tmp_path / "run")


def surroundings() -> dict[str, str]:
    source = str(Path(echelon.__file__).parents[1])
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": f"{source}:{Path(__file__).parent}"}


def test_kill_9_while_two_workers_train_branches(whole: Path, tmp_path: Path) -> None:
    """The whole process group, for real; resumed on one worker it is the run that nothing happened to."""
    folder = tmp_path / "run"

    def told(p: AlsoProgress) -> None:
        if p.stage.startswith("C1, round 1") and p.running:
            os.killpg(0, signal.SIGKILL)

    if not (child := os.fork()):
        try:
            os.setsid()
            AlsoTrainer(dataclasses.replace(tiny(), workers=2), folder).run(told)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    a = read(folder)
    assert [stage["verdict"] is None for stage in a["stages"]] == [False, True] and a["final"] is None
    assert (folder / "work/runs/C1-no-change-0/config.toml").exists()
    assert a["stages"][0] == read(whole)["stages"][0] and not (folder / "main").exists()
    write_account(folder)  # the page of a run that isn't done
    grow(tiny(), folder)
    same(whole, folder)


def test_two_processes_do_not_write_one_run(whole: Path) -> None:
    with _files.only_writer(whole), pytest.raises(BusyError, match="in use by another process"):
        grow(tiny(), whole)


# -- what results depend on --------------------------------------------------------------------


def test_another_seed_is_another_run(whole: Path, tmp_path: Path) -> None:
    other = grow(tiny(seed=1), tmp_path / "other").account
    assert [p["task_return"] for p in other["mainline"]] != [p["task_return"] for p in read(whole)["mainline"]]


# -- ablations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(ALSO_METHODS) - {"also", "sparse"}))
def test_each_ablation(name: str, tmp_path: Path) -> None:
    config = tiny(method=name, steps=24 * UPDATE)
    a = grow(config, tmp_path / "run").account
    kind, default = ALSO_METHODS[name], TERMS.mode(TERMS.default)
    assert a == read(tmp_path / "run") and a["method"] == name
    assert a["final"]["spent"] == spent(a) >= a["steps"]
    names = [stage["name"] for stage in a["stages"]]
    assert (
        names == {"all": ["C0", "C1"], "first": ["C0"], "none": ["grid"] if kind.start == "grid" else []}[kind.stages]
    )
    assert (a["proposer"] == "") == (kind.stages == "none")
    final = None if a["final"]["config"] is None else ShapingConfig.from_json(a["final"]["config"])
    if name == "fixed-pbrs":
        assert final == default and {p["config"] for p in a["mainline"]} == {default.mode}
        assert a["final"]["steps"] == a["final"]["spent"]
    elif name == "pbrs-grid":
        (stage,) = a["stages"]
        assert [b["name"] for b in stage["branches"]] == list(TERMS.grid)
        assert final == TERMS.grid[stage["verdict"]["winner"]]
        scores = stage["verdict"]["scores"]
        assert scores[stage["verdict"]["winner"]] == max(scores.values())
        assert stage["cost"] == len(TERMS.grid) * a["segments"][0]["to"]
    for stage in a["stages"]:
        assert (stage["card"] is not None) == (kind.critic and kind.stages != "none")
        if not kind.branches:
            assert (stage["branches"], stage["cost"], stage["verdict"]["accepted"]) == ([], 0, True)
            assert stage["verdict"]["reasons"] == [f"{stage['verdict']['winner']}: taken untried"]
    if not kind.branches:
        first = a["stages"][-1]["rounds"][0]["proposed"]["candidates"][0]
        assert final == ShapingConfig.from_json(first["config"])
        assert a["final"]["steps"] == a["final"]["spent"]
    write_account(tmp_path / "run")


def test_the_task_reward_alone(sparse: Path) -> None:
    a = read(sparse)
    assert (a["stages"], a["proposer"], a["final"]["config"]) == ([], "", None)
    assert [s["to"] for s in a["segments"]] == [a["steps"]]
    assert a["final"]["steps"] == a["final"]["spent"] == a["steps"]
    assert {p["config"] for p in a["mainline"]} == {"task reward"}
    write_account(sparse)


@pytest.mark.parametrize(("base", "world"), [("qmix", "search"), ("vdn", "repair")])
def test_another_learner_in_another_world(base: str, world: str, tmp_path: Path) -> None:
    """With a replay memory, which each branch takes along."""
    things = {"search": {"num_targets": 2}, "repair": {"num_machines": 2, "num_tools": 1}}[world]
    data = {
        "base": base, "environment": world, "steps": 24 * UPDATE, "num_envs": 16, "workers": 1,
        "env": {"size": 6, "num_agents": 2, "limit": 16, "layout": "open", **things},
        "also": {"checkpoints": [0.2], "branch": 0.1, "candidates": 1, "evaluations": 2, "episodes": 4, "behaviour": 2},
        "algorithm": {"hidden": 16, "precision": "float32"},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "gate", first_wins)
        a = grow(also_from_toml(data), tmp_path / "run").account
    assert a["stages"][0]["verdict"]["accepted"] and a["final"]["spent"] == spent(a)
    assert a["final"]["config"] is not None


# -- what fails --------------------------------------------------------------------------------


def jam(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Let all segments fail in whose names one of these is."""
    real = kinds.run_by_protocol

    def fail(run: Any, folder: Path, *more: Any, **others: Any) -> Any:
        if any(word in folder.name for word in words):
            raise ValueError("the conveyor is jammed")
        return real(run, folder, *more, **others)

    monkeypatch.setattr(kinds, "run_by_protocol", fail)


def test_shapings_under_which_training_diverges_are_rejected(whole: Path, tmp_path: Path) -> None:
    """Rewards of 1e300: each branch says so, the control is promoted, and the run goes on."""
    config = tiny(shaping={"scale": 1e300}, also={"checkpoints": [0.1]}, steps=24 * UPDATE)
    with np.errstate(all="ignore"):
        a = grow(config, tmp_path / "run").account
    (stage,) = a["stages"]
    assert stage["branches"][0]["problem"] is None
    for branch in stage["branches"][1:]:
        assert branch["problem"].startswith("training diverged at step ")
        assert stage["verdict"]["rejected"][branch["name"]] == branch["problem"]
        assert stage["summaries"][branch["name"]]["score"] is None
    assert not stage["verdict"]["accepted"] and stage["verdict"]["best"] is None
    assert a["final"]["config"] is None and a["final"]["spent"] == spent(a) >= a["steps"]
    write_account(tmp_path / "run")


def test_a_branch_that_fails_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "gate", first_wins)
    jam(monkeypatch, "C0-1-a-0")
    a = grow(tiny(also={"checkpoints": [0.1]}, steps=24 * UPDATE), tmp_path / "run", proposer=Asked("a", "b")).account
    told = {b["name"]: b["problem"] for b in a["stages"][0]["branches"]}
    assert told == {"no change": None, "a": "ValueError: the conveyor is jammed", "b": None}
    assert a["stages"][0]["verdict"]["winner"] == "b" and a["final"]["config"]["mode"] == "mine-1"


def test_without_a_control_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mainline goes on from where it stood, at its next checkpoint with branches again; all steps count."""
    jam(monkeypatch, "C0-no-change")
    a = grow(tiny(), tmp_path / "run").account
    one, two = a["stages"]
    assert one["verdict"]["reasons"] == ["no change can't be judged: ValueError: the conveyor is jammed"]
    assert not one["verdict"]["accepted"] and two["branches"][0]["problem"] is None
    assert [s["run"].split("/")[-1] for s in a["segments"]][:2] == ["main-0", "main-1"]
    assert a["segments"][1]["from"] == a["segments"][0]["to"]
    assert a["final"]["spent"] == spent(a) >= a["steps"]
    write_account(tmp_path / "run")


def test_a_mainline_that_fails_ends_the_run_with_one_line(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done stays done; with the fault mended the run goes on as if it hadn't been."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        jam(patch, "main-1")
        for _ in range(2):
            with pytest.raises(EchelonError, match=r"segment main-1 of .*/run failed: ValueError: the conveyor is jam"):
                grow(tiny(), folder)
    assert len(read(folder)["stages"]) == 1 and read(folder)["final"] is None
    load_policy(folder / "main")
    grow(tiny(), folder)
    same(whole, folder)


def test_a_proposer_without_ideas_costs_only_controls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the second round, where there is nothing left to train at all."""
    a = grow(tiny(also={"rounds": 2}), tmp_path / "run", proposer=Nothing()).account
    for stage in a["stages"]:
        assert [b["name"] for b in stage["branches"]] == ["no change"] and len(stage["rounds"]) == 2
        assert stage["verdict"]["reasons"] == ["there is no candidate"]
    assert a["final"]["spent"] == spent(a) >= a["steps"]
    write_account(tmp_path / "run")
    # A record of it can be repeated, too: no card was given, but one was asked for.
    again = grow(tiny(also={"rounds": 2}, proposer=f"recorded:{tmp_path / 'run'}"), tmp_path / "again").account
    assert {**again, "proposer": "asked"} == {**a, "proposer": "asked"}


@pytest.mark.parametrize(
    ("what", "said", "line"),
    [
        ("diagnose", RuntimeError("no idea\nat all"), "its diagnose failed: RuntimeError: no idea at all"),
        ("diagnose", None, "its diagnose failed: TypeError: cannot unpack"),
        ("diagnose", ("lost", {}), "its diagnose failed: TypeError: it returned 'lost', no CriticCard"),
        ("diagnose", (None, {"x": np.float32(1)}), "its diagnose failed: TypeError: .* not JSON serializable"),
        ("propose", [], r"its propose failed: TypeError: it returned \[\], no Proposed"),
        ("diagnose", (None, {"x": float("nan")}), "its diagnose failed: ValueError: Out of range float"),
        ("diagnose", (None, {"x": 1, 2: 3}), "its diagnose failed: TypeError: '<' not supported"),
        ("diagnose", (None, [("x", 1)]), r"its diagnose failed: TypeError: its note is \[.*, no dict"),
        ("propose", Proposed((), "plateau", "moderate", None), "its propose failed: TypeError: its note is None"),  # type: ignore[arg-type]
        ("propose", Proposed((), 5, "moderate"), "its propose failed: TypeError: 5 isn't a text"),  # type: ignore[arg-type]
        (
            "propose",
            Proposed((Candidate(5, "x", ShapingConfig("x", 0.5, {"deliv": 1.0})),), "x", "y"),  # type: ignore[arg-type]
            "its propose failed: TypeError: 5 isn't a text",
        ),
        ("review", ("fine", {}), "its review failed: TypeError: it returned 'fine', no ResultDiagnosis"),
    ],
)
def test_a_broken_proposer_is_one_line_and_a_mended_one_goes_on(
    what: str, said: Any, line: str, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody's own code: what it raises or returns is told, and nothing is lost."""
    monkeypatch.setattr(judging, "gate", first_wins)
    proposer = Asked()

    def broken(*situation: Any) -> Any:
        if isinstance(said, Exception):
            raise said
        return said

    with monkeypatch.context() as patch:
        patch.setattr(proposer, what, broken)
        with pytest.raises(EchelonError, match=f"^the proposer asked is broken: {line}"):
            grow(tiny(), tmp_path / "run", proposer=proposer)
    grow(tiny(), tmp_path / "run", proposer=proposer)
    same(asked, tmp_path / "run")


def test_a_record_of_another_world_is_refused_before_anything_is_trained(whole: Path, tmp_path: Path) -> None:
    config = AlsoConfig(env=echelon.envs.SearchConfig(size=6, num_agents=2), proposer=f"recorded:{whole}")
    with pytest.raises(EchelonError, match=r"account .* is of warehouse, not of search"):
        AlsoTrainer(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_branch_has_no_more_evaluations_than_rollouts(tmp_path: Path) -> None:
    """Of fewer than were asked for a verdict rests on little: the run says so, and so does its account."""
    news: list[str] = []
    config = tiny(also={"checkpoints": [0.1], "branch": 0.05}, steps=32 * UPDATE)
    a = grow(config, tmp_path / "run", report=lambda p: news.extend(p.news), proposer=Nothing()).account
    assert news[0].startswith(
        "a branch of 410 steps has 2 rollouts, so it is evaluated 2, not 4 times, and its verdict"
    )
    assert a["notes"] == news[:1] and len(a["stages"][0]["branches"][0]["curve"]) == 2
    assert f"Note: {news[0]}.".replace("'", "&#x27;") in write_account(tmp_path / "run").read_text()
    one = AlsoTrainer(tiny(also={"branch": 1 / 40}), tmp_path / "one").account["notes"]
    assert "has 1 rollout, so it is evaluated 1, not 4 times" in one[0]
    for k, enough in enumerate(({"also": {"branch": 1 / 40, "evaluations": 1}}, {"method": "fixed-pbrs"}, {})):
        assert not AlsoTrainer(tiny(**enough), tmp_path / f"enough-{k}").account["notes"]
    # What learns from whole episodes has rollouts of an episode at most.
    short = {"base": "flat-grpo", "env": {"size": 8, "num_agents": 2, "limit": 4}}
    assert also_from_toml({**short, "num_envs": 16, "steps": 40 * 64, "also": {"branch": 0.1}}).branch_rollouts == 4


def test_names_of_candidates_cannot_be_those_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of one name, the reference's, a path's: all are tried, each under a name of its own."""
    monkeypatch.setattr(judging, "gate", first_wins)
    config = tiny(also={"checkpoints": [0.1], "candidates": 4, "branch": 0.05}, steps=32 * UPDATE)
    a = grow(config, tmp_path / "run", proposer=Asked("reference", "a", "a", "../../b")).account
    (stage,) = a["stages"]
    names = [b["name"] for b in stage["branches"]]
    assert len(set(names)) == 5 and "reference" not in names
    assert [c["id"] for c in stage["rounds"][0]["proposed"]["candidates"]] == names[1:]
    assert all(re.fullmatch(r"work/runs/[A-Za-z0-9_.-]+", b["run"]) for b in stage["branches"])
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    grow(config, tmp_path / "run", proposer=Asked())
    assert read(tmp_path / "run") == a


def test_what_was_tried_costs_no_second_branch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate would refuse it when it is trained: what is in force, what this stage tried, and one of two twins."""
    monkeypatch.setattr(judging, "gate", first_wins)

    class Twins(Asked):
        def propose(self, situation: Situation, card: CriticCard | None) -> Proposed:
            new = ShapingConfig("new", 0.3, {"approach": 1.0, "deliv": 0.5 + len(self.calls)})
            configs = [ShapingConfig("idle", 0.0, {"deliv": 1.0}), new, new, ShapingConfig("old", 0.2, {"deliv": 1.0})]
            self.calls.append("propose")
            ids = zip("abcd", configs if situation.current is None else [situation.current, *configs[1:]], strict=True)
            return Proposed(tuple(Candidate(i, "balanced", c) for i, c in ids), "uncertain", "moderate")

    config = tiny(also={"rounds": 2, "branch": 0.05, "evaluations": 2, "candidates": 3})
    stages = grow(config, tmp_path / "run", proposer=Twins()).account["stages"]
    tried = [[b["name"] for b in stage["branches"]] for stage in stages]
    assert tried == [["no change", "b", "d", "b-2"]] * 2
    left = [[turn["proposed"]["note"]["left_out"] for turn in stage["rounds"]] for stage in stages]
    words = ["a: the same as the configuration in force", "c: the same as candidate b"]
    assert left[0][0] == left[1][0] == words
    assert left[0][1][-1] == left[1][1][-1] == "d-2: the same as one that was tried before"


def test_poison_that_is_rejected_costs_only_steps(sparse: Path, tmp_path: Path) -> None:
    """What was trained is what the task reward alone makes of them. By the real gate; that it rejects here is of this
    seed: of 8 episodes an evaluation it now and then lets poison through."""
    a = grow(tiny(), tmp_path / "run", proposer=Poison()).account
    assert [stage["verdict"]["accepted"] for stage in a["stages"]] == [False, False]
    assert a["final"]["config"] is None

    def learnt(folder: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in json.loads(line).items() if "shap" not in k} for line in lines(folder)]

    ours = learnt(tmp_path / "run")
    assert len(ours) == a["final"]["steps"] // UPDATE and ours == learnt(sparse)[: len(ours)]
    returns = {p["step"]: p["task_return"] for p in read(sparse)["mainline"]}
    assert all(returns[p["step"]] == p["task_return"] for p in a["mainline"])


# -- several seeds, rounds, a reference --------------------------------------------------------


def test_seeds_rounds_and_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are in the account and before the gate, and its record gives the same account without the proposer."""
    seen: list[tuple[Summary, Mapping[str, Summary], Summary | None, dict[str, Any]]] = []

    def noted(control: Summary, candidates: Mapping[str, Summary], reference: Any = None, **others: Any) -> Verdict:
        seen.append((control, candidates, reference, others))
        return first_wins(control, candidates)

    monkeypatch.setattr(judging, "gate", noted)
    also = {"checkpoints": [0.05, 0.35, 0.65], "branch": 0.025, "evaluations": 1, "episodes": 2, "behaviour": 2,
            "candidates": 1, "seeds": 2, "rounds": 2, "reference": True}  # fmt: skip
    config = tiny(also=also, steps=64 * UPDATE)
    proposer = Asked()
    a = grow(config, tmp_path / "run", proposer=proposer).account
    assert [stage["name"] for stage in a["stages"]] == ["C0", "C1", "C2"]
    # Each round's proposal by itself, for the proposer's eyes; then all of them.
    assert len(seen) == 9
    for k, stage in enumerate(a["stages"]):
        ours, theirs, reference, others = seen[3 * k + 2]
        curves = {
            name: [
                [p["task_return"] for p in b["curve"] if p["step"] > stage["at"]]
                for b in stage["branches"]
                if b["name"] == name
            ]
            for name in stage["summaries"]
        }  # fmt: skip
        summaries = {name: summarise(c, best_return=a["best_return"], rising=True) for name, c in curves.items()}
        for name, summary in {"no change": ours, **theirs, **({"reference": reference} if k == 2 else {})}.items():
            assert dataclasses.replace(summary, config=None) == summaries[name]
        leads = {
            n: score_lead(curves["no change"], curves[n], best_return=a["best_return"], rising=True) for n in theirs
        }
        assert stage["lead"] == {name: list(lead) for name, lead in leads.items()}
        assert others == {"lead": {name: low for name, (_, low, _) in leads.items()}, "low_return": True, "soft": False,
                          "first_replacement": k == 1}  # fmt: skip
        assert (reference is not None) == (k == 2)
        for (control, alone, ref, more), name in zip(seen[3 * k : 3 * k + 2], theirs, strict=True):
            assert (control.last_k, list(alone), ref) == (ours.last_k, [name], reference)
            assert more["lead"][name] == leads[name][1]
    for k, stage in enumerate(a["stages"]):
        assert len(stage["rounds"]) == 2 and stage["verdict"]["accepted"]
        (one,), (two,) = ([c["id"] for c in r["proposed"]["candidates"]] for r in stage["rounds"])
        cells = [(b["name"], b["round"], b["seed"]) for b in stage["branches"]]
        third = [("reference", 1, 0)] if k == 2 else []
        assert cells == [("no change", 1, 0), ("no change", 1, 1), *third, (one, 1, 0), (one, 1, 1), (two, 2, 0),
                         (two, 2, 1)]  # fmt: skip
        assert set(stage["lead"]) == {one, two}
        assert all(low <= lead <= high for lead, low, high in stage["lead"].values())
        # Seeds differ; the first one's endpoint is promoted.
        runs = tmp_path / "run"
        names = [b["run"] for b in stage["branches"][:2]]
        assert lines(runs / names[0]) != lines(runs / names[1])
    assert a["final"]["spent"] == spent(a) >= a["steps"]
    # The reference is the first promoted shaping, trained on beside the run.
    first = a["stages"][0]["rounds"][0]["proposed"]["candidates"][0]["config"]
    reference = a["stages"][2]["branches"][2]
    assert reference["config"] == a["stages"][1]["current"] == first
    assert (
        proposer.situations[1].trials[-1].candidate.id == a["stages"][0]["rounds"][0]["proposed"]["candidates"][0]["id"]
    )
    assert proposer.situations[1].control is not None and proposer.situations[0].control is None
    write_account(tmp_path / "run")

    again = grow(dataclasses.replace(config, proposer=f"recorded:{tmp_path / 'run'}"), tmp_path / "again")
    assert isinstance(again.proposer, RecordedProposer)
    assert {**read(tmp_path / "again"), "proposer": "asked"} == a
    assert lines(tmp_path / "again") == lines(tmp_path / "run")


def test_the_gate_is_as_the_settings_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    told: list[bool] = []

    def noted(*some: Any, **others: Any) -> Verdict:
        asked.append(others)
        return Verdict(False, None, ("no",))

    real = judging.summarise
    monkeypatch.setattr(judging, "gate", noted)
    monkeypatch.setattr(judging, "summarise", lambda *some, **more: told.append(more["rising"]) or real(*some, **more))
    also = {"checkpoints": [0.1], "soft": True, "low_return": False, "rising": False, "candidates": 1, "evaluations": 2}
    grow(tiny(also=also, steps=24 * UPDATE), tmp_path / "run", proposer=Asked())
    assert told and not any(told)
    assert [(x["soft"], x["low_return"], x["lead"]) for x in asked] == [(True, False, None)] * 2


def test_all_branches_are_judged_in_the_same_worlds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that begin from scratch, which need another seed to be another branch."""
    real, judged = protocol.evaluate, []

    def noted(run: Any, *some: Any, **more: Any) -> Any:
        judged.append((run.seed, more["seed"]))
        return real(run, *some, **more)

    monkeypatch.setattr(protocol, "evaluate", noted)
    also = {"checkpoints": [0.1], "fresh": True, "seeds": 2, "candidates": 1, "evaluations": 1, "episodes": 2}
    grow(tiny(also=also, steps=24 * UPDATE, seed=5), tmp_path / "run", proposer=Asked())
    assert len({own for own, _ in judged}) == 2 and {worlds for _, worlds in judged} == {5}


def test_no_more_is_tried_than_the_budget_was_reckoned_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    also = {"checkpoints": [0.7], "candidates": 1, "evaluations": 1, "episodes": 2}
    config = tiny(also=also, steps=24 * UPDATE)
    a = grow(config, tmp_path / "run", proposer=Asked("a", "b", "c")).account
    (stage,) = a["stages"]
    assert [b["name"] for b in stage["branches"]] == ["no change", "a"]
    assert stage["rounds"][0]["proposed"]["note"]["left_out"] == ["b: only 1 are tried", "c: only 1 are tried"]
    assert a["steps"] <= a["final"]["spent"] <= a["steps"] + UPDATE


def test_a_record_that_is_resumed_gives_the_same_account(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(whole.parent)  # a path that is told from here means the same from anywhere
    config = tiny(proposer=f"recorded:{whole.name}")
    grow(config, tmp_path / "one")

    def halfway(p: AlsoProgress) -> None:
        stop[0] = stop[0] or "C1" in p.stage

    stop = [False]
    grow(config, tmp_path / "two", report=halfway, should_stop=lambda: stop[0], finished=False)
    monkeypatch.chdir(tmp_path)
    grow(config, tmp_path / "two")
    same(tmp_path / "one", tmp_path / "two")


def test_a_run_that_is_stopped_among_branches_leaves_the_control(tmp_path: Path) -> None:
    """Until there is a verdict, it is what the mainline has become: in `main/`, with its metrics."""
    folder, stop = tmp_path / "run", [False]
    config = tiny(also={"checkpoints": [0.1]}, steps=24 * UPDATE)

    def told(p: AlsoProgress) -> None:
        control = folder / "work/runs/C0-no-change-0/result.json"
        stop[0] = stop[0] or (p.stage.startswith("C0, round 1") and control.exists())

    trainer = grow(config, folder, report=told, should_stop=lambda: stop[0], finished=False)
    a, (left,) = trainer.account, checkpoints_of(folder / "main/checkpoints")[-1:]
    begun = a["segments"][-1]["to"]
    end = begun + -(-trainer.branch // UPDATE) * UPDATE
    assert int(left.name.removeprefix("step-")) == end
    assert [json.loads(line)["step"] for line in lines(folder)] == list(range(UPDATE, end + 1, UPDATE))
    write_account(folder)
    grow(config, folder)
    grow(config, tmp_path / "whole")
    same(folder, tmp_path / "whole")


def test_a_reference_that_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "gate", first_wins)
    jam(monkeypatch, "C2-reference")
    also = {"checkpoints": [0.05, 0.3, 0.55, 0.8], "branch": 0.025, "evaluations": 1, "episodes": 2, "behaviour": 2,
            "candidates": 1, "reference": True}  # fmt: skip
    a = grow(tiny(also=also), tmp_path / "run", proposer=Asked()).account
    problems = [{b["name"]: b["problem"] for b in s["branches"] if b["name"] == "reference"} for s in a["stages"]]
    jammed = {"reference": "ValueError: the conveyor is jammed"}
    assert problems == [{}, {}, jammed, {}]  # no other shaping takes its place: it was the first one
    assert a["final"]["spent"] == spent(a)


# -- a language model --------------------------------------------------------------------------

CARD = CriticCard(
    analysis_summary="Nobody gets anywhere.", failure_modes=["robots are lost"], reward_design_needs=["look around"],
    initial_search_priors=[], risky_directions=[], objective_interpretation="all packages",
)  # fmt: skip


def good(request: dict[str, Any]) -> str:
    """What a capable model writes."""
    system = request["json"]["messages"][0]["content"]
    if "candidate_type" in system:
        one = {"candidate_type": "balanced", "pbrs_version": "v2", "mode": "pickup_first", "beta": 0.5,
               "active_terms": ["approach", "pickup"], "weights": {"approach": 0.5, "pickup": 0.5}, "rationale": "go",
               "expected_effect": "", "risk_notes": "", "evidence_keys_used": []}  # fmt: skip
        one["mode"] = TERMS.default
        two = {**one, "candidate_type": "conservative", "beta": 0.2}
        return json.dumps({"stage_diagnosis": "exploration", "search_policy": "moderate",
                           "candidates": [{"candidate_id": "x", **one}, {"candidate_id": "y", **two}]})  # fmt: skip
    if "ranking" in system:
        return json.dumps({"ranking": ["x", "y"], "recommended_candidate_id": "x", "decision": "update",
                           "confidence": 0.9, "metric_basis": [], "short_reason": "x", "risk_notes": []})  # fmt: skip
    return CARD.model_dump_json()


@pytest.mark.parametrize("kind", ["good", "garbage", "dies"])
def test_a_model_behind_a_server(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it does the run comes to its end, and the account says what was answered."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)

    def behave(request: dict[str, Any]) -> str:
        return "I am sorry, Dave." if kind == "garbage" else good(request)

    with MisbehavingServer(behave) as server:
        config = tiny(
            proposer="openai:test", server={"url": server.url, "timeout": 5.0, "attempts": 1}, steps=24 * UPDATE,
            also={"checkpoints": [0.1], "evaluations": 2, "episodes": 4},
        )  # fmt: skip

        def told(p: AlsoProgress) -> None:
            if kind == "dies" and "round 1" in p.stage:
                server.kill()

        a = grow(config, tmp_path / "run", report=told).account
        assert not server.errors
    (stage,) = a["stages"]
    (turn,) = stage["rounds"]
    assert a["proposer"] == "openai:test" and a["final"]["spent"] == spent(a) >= a["steps"]
    ids = [c["id"] for c in turn["proposed"]["candidates"]]
    if kind == "garbage":
        assert stage["card"] is None and turn["review"] is None and turn["proposed"]["note"]["filled"] == ids
        assert "no JSON in what the model wrote" in stage["card_note"]["tries"][0]["error"]
    else:
        assert stage["card"] == CARD.model_dump() and ids == ["x", "y"]
        assert turn["proposed"]["note"]["filled"] == []
    if kind == "good":
        assert turn["review"]["recommended_candidate_id"] == "x"
    if kind == "dies":
        assert turn["review"] is None and "error" in turn["review_note"]["tries"][0]
    assert len(stage["branches"]) == 3 and not any(b["problem"] for b in stage["branches"])
    page = write_account(tmp_path / "run").read_text(encoding="utf-8")
    assert ("2 of 2 candidates by rules, no model" in page) == (kind == "garbage")


# -- the command line --------------------------------------------------------------------------


def flags(**changes: str) -> list[str]:
    """`tiny()` as flags."""
    given = {
        "method": "also", "steps": str(24 * UPDATE), "num-envs": "16", "workers": "1", "env.size": "6",
        "env.num-agents": "2", "env.num-packages": "4", "env.limit": "60", "env.layout": "open",
        "algorithm.hidden": "16", "algorithm.rollout": "16", "algorithm.epochs": "1", "algorithm.minibatches": "1",
        "algorithm.precision": "float32", "algorithm.lr": "0.02", "also.branch": "0.1", "also.candidates": "1",
        "also.evaluations": "2", "also.episodes": "4", "also.behaviour": "2", "eval-episodes": "4",
    }  # fmt: skip
    changed = {name.replace("_", "-"): value for name, value in changes.items()}
    return [word for name, value in {**given, **changed}.items() for word in (f"--{name}", value)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with segments trained in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(segments, "PoolBackend", lambda slots, log: Here())
    return tmp_path


def test_the_command_trains_evaluates_and_goes_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *flags(), "--out", "run"]) == 0
    said = capsys.readouterr()
    told = said.out + said.err
    assert "heuristic proposes" in told and "C0: " in told and "account.html" in told
    assert "Traceback" not in told and Path("run/account.html").exists()
    a = read(Path("run"))
    assert a["final"]["spent"] >= a["steps"]
    evaluation = Path("run/main/evaluation.json").read_bytes()
    # Training costs what all segments took, each once; a fork's seconds go on from its source's.
    parts = {
        p.parent.name: json.loads(p.read_text())["training_seconds"]
        for p in Path("run").glob("work/runs/*/result.json")
    }
    costs = json.loads(evaluation)
    assert 0 < costs["training_seconds"] < sum(parts.values()) and costs["training_seconds"] > max(parts.values())
    assert main(["train", "--resume", "run", "--eval-episodes", "4"]) == 0
    assert Path("run/main/evaluation.json").read_bytes() == evaluation and read(Path("run")) == a
    assert main(["evaluate", "run", "--episodes", "3", "--replay-episodes", "1", "--name", "mine"]) == 0
    assert json.loads(Path("run/main/mine.json").read_text())["episodes"] == 3
    assert main(["replay", "run"]) == 0
    pages = capsys.readouterr().out.splitlines()[-2:]
    assert all(Path(page).is_file() for page in pages) and pages[0] == "run/account.html"
    # From its own config, with another seed.
    assert main(["train", "--config", "run/config.toml", "--seed", "3", "--out", "two", "--eval-episodes", "0"]) == 0
    assert read(Path("two"))["seed"] == 3


def test_a_config_of_another_kind_is_told_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its method isn't unknown, it is of those that other settings belong to."""
    for name in ("also", "flat-mappo", "magrpo"):
        Path(f"{name}.toml").write_text(f'method = "{name}"\n')
    for name, wanted in (("also", "flat-mappo"), ("flat-mappo", "sparse"), ("magrpo", "also"), ("also", "magrpo")):
        assert main(["train", "--config", f"{name}.toml", "--method", wanted]) == 2
        line = f"{name}.toml is a config of {name}, {wanted} has other settings: leave one of the two out\n"
        assert capsys.readouterr().err.endswith(line)


def test_steps_to_success_are_steps_spent(whole: Path, tmp_path: Path) -> None:
    """Where branches were tried meanwhile, the steps when they were done; without its log a run is evaluated still."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    good = {"episodes": 900, "own_episodes": 900, "own_tsr": 1.0}
    for segment in read(folder)["segments"]:
        begin, end = segment["spent"]
        for step in (segment["from"] + UPDATE, segment["to"]):
            (folder / "metrics.jsonl").write_text(json.dumps({"step": step, **good}))
            alone = end - begin == segment["to"] - segment["from"]
            costs = run_costs(folder / "main")
            assert costs["steps_to_tsr_90"] == (begin + step - segment["from"] if alone else end)
            assert costs["steps_to_tsr_90_is_bound"] == (not alone)
    for log in ("", "{", '{"step": 5}', None):
        (folder / "metrics.jsonl").unlink()
        if log is not None:
            (folder / "metrics.jsonl").write_text(log)
        assert run_costs(folder / "main")["steps_to_tsr_90"] is None


def test_flags_go_over_a_file_before_anything_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = flags(**{"shaping.mode": TERMS.default, "method": "fixed-pbrs", "eval-episodes": "0"})
    assert main(["train", *given, "--out", "fixed"]) == 0
    again = ["train", "--config", "fixed/config.toml", "--method", "sparse", "--eval-episodes", "0", "--out", "sparse"]
    assert main(again) == 2
    assert "shaping.mode is for fixed-pbrs" in capsys.readouterr().err
    assert main([*again, "--shaping.mode", "off"]) == 0
    assert read(Path("sparse"))["method"] == "sparse"


def test_a_file_that_registers_is_imported_however_it_is_given(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(echelon.envs, "_REGISTRY", dict(echelon.envs._REGISTRY))
    Path("own.py").write_text(
        "from echelon.envs import Warehouse, WarehouseConfig, register\n"
        "class OwnConfig(WarehouseConfig):\n    pass\n"
        "class Own(Warehouse):\n    name = 'own'\n"
        "register(OwnConfig, Own)\n"
    )
    assert main(["train", "--method", "also", "--imports=own.py", "--env", "own"]) == 2
    err = capsys.readouterr().err
    assert "environment 'own' has no potential terms" in err  # it is known
    Path("ends.py").write_text("import sys\nsys.exit(3)\n")
    assert main(["train", "--method", "also", "--imports", "ends.py"]) == 2
    assert "imports: ends.py fails: SystemExit: 3" in capsys.readouterr().err
    Path("odd.toml").write_text("method = ['also']\n")
    assert main(["train", "--config", "odd.toml"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "method" in said


def test_the_command_asks_a_model_behind_a_server(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MisbehavingServer(good) as server:
        given = {"proposer": "openai:test", "server.url": server.url, "also.checkpoints": "0.1", "eval-episodes": "0"}
        assert main(["train", *flags(**given), "--out", "run"]) == 0
        assert "openai:test proposes" in capsys.readouterr().err
    (stage,) = read(Path("run"))["stages"]
    assert stage["card"] == CARD.model_dump()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--method", "alsoo"], r"'alsoo'.*did you mean 'also'"),
        (["--method", "also", "--also.brunch", "0.1"], r"--also\.brunch.*did you mean --also\.branch"),
        (["--method", "also", "--base", "l2m2"], r"base is l2m2|'l2m2'"),
        (["--method", "also", "--base", "himac"], r"base is himac: it must be a flat method|'himac'"),
        (["--method", "also", "--base", "flat-mapo"], r"unknown base 'flat-mapo': did you mean 'flat-mappo'"),
        (["--method", "also", "--env", "wharehouse"], r"'wharehouse'.*warehouse"),
        (["--method", "also", "--env", "meadow"], r"'meadow' has no potential terms"),
        (["--method", "also", "--also.branch", "2"], r"also\.branch is 2\.0: it must be above 0, below 1"),
        (["--method", "also", "--also.checkpoints", "0.5", "0.1"], r"also\.checkpoints .* in rising order"),
        (["--method", "also", "--shaping.mode", "x"], r"shaping\.mode is for fixed-pbrs"),
        (["--method", "fixed-pbrs", "--shaping.mode", "balanced_delivry"], r"'balanced_delivry'.*balanced_delivery"),
        (["--method", "also", "--proposer", "recorded:nowhere"], r"account .*nowhere: No such file"),
        (["--method", "also", "--proposer", "heuristics"], r"unknown proposer 'heuristics': did you mean 'heuristic'"),
        (["--method", "also", "--proposer", "gguf:nowhere.gguf"], r"'gguf:nowhere\.gguf': no file nowhere\.gguf"),
        (["--method", "also", "--proposer", "hf:nowhere"], r"'hf:nowhere': no folder nowhere"),
        (["--method", "also", "--proposer", "openai:x", "--server.url", "http://127.0.0.1:9/v1", "--server.attempts",
          "1"], r"127\.0\.0\.1:9: can't be reached"),
        (["--method", "also", "--workers", "0"], r"workers is 0: it must be at least 1"),
        (["--method", "also", "--eval-episodes", "-1"], r"--eval-episodes is -1: it must be at least 0"),
        (["--method", "also", "--env.size", "2"], r"size"),
        (["--method", "also", "--out"], r"--out"),
        (["--method"], r"--method"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(
    arguments: list[str], line: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    meadow = dataclasses.make_dataclass("MeadowConfig", [], bases=(WarehouseConfig,), frozen=True)
    monkeypatch.setitem(echelon.envs._REGISTRY, "meadow", (meadow, type("Meadow", (Warehouse,), {"name": "meadow"})))
    assert main(["train", *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.err.startswith("echelon: ") and re.search(line, said.err), said.err
    assert not list(place.rglob("config.toml"))


def test_a_resume_takes_no_settings(whole: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, line in (
        (["--resume", str(whole), "--seed", "3"], "--seed can't be given with it"),
        (["--resume", "nowhere"], "nowhere"),
    ):
        assert main(["train", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and line in said
    assert main(["train", *flags(), "--out", str(whole)]) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_damaged_accounts_are_one_line(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for text in (
        "{", "[]", '{"format": 2}', '{"format": 1}', '{"format": 1, "stages": [1]}',
        '{"format": 1, "stages": [{"name": "C0", "card": {"x": 1}, "card_note": {}, "evidence": {}, "rounds": []}]}',
        '{"format": 1, "stages": [{"name": "C0", "rounds": [{"proposed": {}, "review": null, "review_note": {}}]}]}',
        '{"format": 1, "stages": [{"name": "C0", "rounds": [{"review_note": {}}]}]}', '{"format": "1"}', "{}",
    ):  # fmt: skip
        (folder / "account.json").write_text(text)
        with pytest.raises(EchelonError, match=r"account"):
            AlsoTrainer.resume(folder)
    (folder / "account.json").write_text('{"format": 2}')
    with pytest.raises(EchelonError, match=r"is of format 2, this Echelon reads format 1: use a newer Echelon"):
        AlsoTrainer.resume(folder)
    (folder / "account.json").unlink()
    with pytest.raises(EchelonError, match=r"account\.json doesn't say what was decided at step .*: begin anew"):
        grow(tiny(), folder)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    """The real process and its real worker, in the middle of training: exit 130; resumed it is as never stopped."""
    steps = {"steps": str(4000 * UPDATE), "also.checkpoints": "0.5", "algorithm.epochs": "2"}
    process = subprocess.Popen(
        [sys.executable, "-m", "echelon", "train", *flags(**steps), "--out", "run"], cwd=tmp_path, text=True,
        env=surroundings(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    log = tmp_path / "run/work/runs/main-0/metrics.jsonl"
    end = time.monotonic() + 240
    while not (log.exists() and log.stat().st_size) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "stopped; go on with: echelon train --resume run" in out + err
    done = checkpoints_of(log.parent / "checkpoints")
    assert done and (tmp_path / "run/account.html").exists()
    assert int(done[-1].name[5:]) >= UPDATE
    assert AlsoTrainer.resume(tmp_path / "run").config.steps == 4000 * UPDATE


# -- disks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [1, 40, 150])
def test_a_full_disk_is_one_line_and_nothing_is_lost(
    after: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calls = tmp_path / "run", itertools.count()

    def full(handle: int) -> None:
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_files.os, "fsync", full)
        with pytest.raises(StorageError, match=r"no space left on the disk while writing .*: free some and try again"):
            grow(tiny(), folder)
    assert not list(folder.rglob("failed.json"))
    grow(tiny(), folder)
    same(whole, folder)


def test_a_place_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(StorageError, match="could not write"):
        AlsoTrainer(tiny(), tmp_path / "run")


def test_settings_come_back_from_their_file() -> None:
    import tomllib

    config = tiny(base="flat-ippo", algorithm={"hidden": 8}, also={"rounds": 3, "low_return": False}, workers=3)
    assert also_from_toml(tomllib.loads(also_to_toml(config))) == config
