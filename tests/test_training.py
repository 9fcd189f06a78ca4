"""Training runs: stopped anywhere and resumed they are what they would have been, and they learn."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon import _files
from echelon._files import JsonLines, only_writer
from echelon.advantages import gae
from echelon.algorithms.mappo import MAPPOConfig
from echelon.buffers import RolloutBuffer
from echelon.checkpoints import FORMAT, checkpoints_of, load_checkpoint
from echelon.configs import RunConfig, from_toml, read_toml, to_toml
from echelon.envs import GridConfig, WarehouseConfig
from echelon.envs.repair import RepairConfig
from echelon.envs.search import SearchConfig
from echelon.errors import EchelonError
from echelon.evaluation import evaluate
from echelon.subgoals import SubgoalConfig
from echelon.training import Rollouts, Trainer, load_policy
from tiny_model import make_tiny_model

TINY = WarehouseConfig(size=8, num_agents=2, num_packages=2, limit=20)
QUICK = MAPPOConfig(hidden=16, rollout=8, epochs=2, minibatches=2, precision="float32")
UPDATE = 8 * 8


def run_config(**changes: Any) -> RunConfig:
    """A run of 8 updates of 64 steps, with a checkpoint after every third."""
    base = RunConfig(
        method="rule-goals", env=TINY, steps=8 * UPDATE, num_envs=8, threads=1, checkpoint_every=3 * UPDATE,
        algorithm=QUICK,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def finish(folder: Path) -> None:
    """Resume until all is done."""
    assert Trainer.resume(folder).run()


def straight(config: RunConfig, folder: Path) -> Path:
    """The run, never stopped."""
    assert Trainer(config, folder).run()
    return folder


def outcome(folder: Path) -> dict[str, Any]:
    """Everything of a run that must not depend on how often it was stopped."""
    last = checkpoints_of(folder / "checkpoints")[-1]
    progress = json.loads((last / "progress.json").read_text())
    plans = [json.loads(line) for line in (folder / "plans.jsonl").read_text().splitlines()]
    for plan in plans:
        plan.pop("latency_ms", None)  # readable lines have it, the record has not
    return {
        "name": last.name,
        "metrics": (folder / "metrics.jsonl").read_bytes(),
        "plans": plans,
        "step": progress["step"],
        "planners": progress["planners"],
        "worlds": (last / "worlds.safetensors").read_bytes(),
        "algorithm": (last / "algorithm.safetensors").read_bytes(),
    }


def same(one: Path, other: Path) -> None:
    """Assert that two runs came out the same, byte for byte; names what differs."""
    a, b = outcome(one), outcome(other)
    assert [name for name in a if a[name] != b[name]] == []


class After:
    """A `should_stop` that says so after so many updates."""

    def __init__(self, updates: int) -> None:
        self.left = updates

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


# -- resumed = uninterrupted -------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random language model's name."""
    return f"hf:{make_tiny_model(tmp_path_factory.mktemp('tiny'))}"


SEARCH = SearchConfig(size=10, num_agents=2, num_targets=2, limit=20)
REPAIR = RepairConfig(size=10, num_agents=2, num_machines=2, limit=20)
KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"algorithm": dataclasses.replace(QUICK, precision="bfloat16")},
    "recurrent": {"algorithm": dataclasses.replace(QUICK, recurrent=True)},
    "recurrent-bfloat16": {"algorithm": dataclasses.replace(QUICK, recurrent=True, precision="bfloat16")},
    "flat": {"method": "flat-mappo"},
    "flat-agent-critic": {"method": "flat-mappo", "algorithm": dataclasses.replace(QUICK, critic="agent")},
    "random": {"method": "random-goals"},
    "l2m2": {"method": "l2m2", "llm_share": 0.25, "steps": 6 * UPDATE},
    "search": {"env": SEARCH},
    "repair": {"env": REPAIR},
    "search-flat": {"env": SEARCH, "method": "flat-mappo"},
    "distance": {"subgoals": SubgoalConfig(intrinsic="distance", task_weight=0.5, every=5, scope="team")},
    "cells": {"subgoals": SubgoalConfig(space="cell", intrinsic="reached")},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_and_resumed_is_the_run_that_never_stopped(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Weights, optimiser, worlds, metrics and plans are the same bytes, wherever the run was stopped."""
    config = run_config(**KINDS[kind])
    if config.method == "l2m2":
        config = dataclasses.replace(config, model=request.getfixturevalue("tiny_model"))
    whole = straight(config, tmp_path / "whole")
    assert outcome(whole)["step"] == config.steps
    assert (len(outcome(whole)["plans"]) > 0) == (config.method == "l2m2")
    stopped = Trainer(config, tmp_path / "stopped")
    assert not stopped.run(should_stop=After(2))
    # At a stop, at a regular checkpoint, one update after it, and with two stops in a row.
    for updates in (1, 2, 1):
        Trainer.resume(tmp_path / "stopped").run(should_stop=After(updates))
    finish(tmp_path / "stopped")
    same(whole, tmp_path / "stopped")


def test_every_moment_is_good_for_a_stop(tmp_path: Path) -> None:
    """Stopped after every single update, episodes, memory and subgoals in flight go on."""
    config = run_config(algorithm=dataclasses.replace(QUICK, recurrent=True))
    whole = straight(config, tmp_path / "whole")
    Trainer(config, tmp_path / "pieces").run(should_stop=After(1))
    for _ in range(7):
        Trainer.resume(tmp_path / "pieces").run(should_stop=After(1))
    same(whole, tmp_path / "pieces")


def test_what_came_after_the_newest_checkpoint_is_done_again(tmp_path: Path) -> None:
    """A run that fails between checkpoints loses that work, not its place: the logs are cut back."""
    config = run_config()
    whole = straight(config, tmp_path / "whole")

    def fail(progress: Any) -> None:
        if progress.step == 5 * UPDATE:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(config, tmp_path / "failed").run(fail)
    steps = [json.loads(line)["step"] for line in (tmp_path / "failed/metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 5 * UPDATE and checkpoints_of(tmp_path / "failed/checkpoints")[-1].name.endswith("192")
    with (tmp_path / "failed/metrics.jsonl").open("a") as file:
        file.write('{"step": half a line')
    finish(tmp_path / "failed")
    same(whole, tmp_path / "failed")
    timings = [json.loads(line)["step"] for line in (tmp_path / "failed/timings.jsonl").read_text().splitlines()]
    assert timings == [UPDATE * k for k in range(1, 9)]


def test_a_run_stopped_before_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    """With no checkpoint yet, resume starts from the seed and gives the same run."""
    config = run_config()
    whole = straight(config, tmp_path / "whole")
    Trainer(config, tmp_path / "young")
    finish(tmp_path / "young")
    same(whole, tmp_path / "young")


def test_a_run_killed_just_before_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    """Its log goes on to where the checkpoint was due, and half a line may follow."""
    config = run_config()
    whole = straight(config, tmp_path / "whole")
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    for name, log in (("due", "".join(lines[:3])), ("half", "".join(lines[:2]) + lines[2][:9])):
        Trainer(config, tmp_path / name)
        (tmp_path / name / "metrics.jsonl").write_text(log)
        finish(tmp_path / name)
        same(whole, tmp_path / name)


@pytest.mark.parametrize("empty", [False, True])
def test_a_run_whose_checkpoints_are_gone_keeps_its_logs(finished: Path, tmp_path: Path, empty: bool) -> None:
    """Resuming would begin it again over its logs: one line, and nothing is changed until they are moved away."""
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("checkpoints"))
    if empty:
        (run / "checkpoints").mkdir()
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(EchelonError, match=r"the checkpoints of .* are gone.* move its logs \(\*\.jsonl\) away"):
        Trainer.resume(run)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    for log in run.glob("*.jsonl"):
        log.rename(tmp_path / log.name)
    finish(run)
    same(finished, run)


def test_a_finished_run_can_go_on_for_more_steps(tmp_path: Path) -> None:
    """Extended by `steps` it is the longer run, and the next resume knows of it; fewer steps are refused."""
    config = run_config()
    whole = straight(dataclasses.replace(config, steps=12 * UPDATE), tmp_path / "whole")
    straight(config, tmp_path / "run")
    assert not Trainer.resume(tmp_path / "run", steps=12 * UPDATE).run(should_stop=After(2))
    finish(tmp_path / "run")
    same(whole, tmp_path / "run")
    assert read_toml(tmp_path / "run/config.toml").steps == 12 * UPDATE
    with pytest.raises(EchelonError, match="has done 768 steps already, more than 64"):
        Trainer.resume(tmp_path / "run", steps=UPDATE)
    assert read_toml(tmp_path / "run/config.toml").steps == 12 * UPDATE


# -- kill -9 -----------------------------------------------------------------------------------


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_training", "echelon.cli", "echelon.console"])
    return context


def _child(folder: str, hook: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if hook is not None:
        hook(*arguments)
    finish(Path(folder))


def _resume_in_child(folder: Path, hook: Callable[..., None] | None = None, *arguments: Any) -> Any:
    process = _context().Process(target=_child, args=(str(folder), hook, arguments))
    process.start()
    return process


def _die_at_call(module_attribute: str, call: int, where: str) -> None:
    """Kill this process before or after the n-th call of a function of `_files`, `os` or `Path`."""
    owner = {"os.fsync": os, "Path.rename": Path, "Path.replace": Path, "Path.write_bytes": Path}[module_attribute]
    name = module_attribute.split(".")[1]
    original = getattr(owner, name)
    calls = itertools.count(1)

    def deadly(*args: Any, **kwargs: Any) -> Any:
        now = next(calls) == call
        if now and where == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if now and where == "half":
            args[0].open("wb").write(args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


@pytest.mark.parametrize(
    ("function", "call", "where"),
    [
        ("Path.write_bytes", 1, "before"),  # progress.json is there, the arrays aren't
        ("Path.write_bytes", 4, "half"),  # the second checkpoint's algorithm is cut
        ("os.fsync", 9, "before"),
        ("Path.rename", 1, "before"),  # all parts written, not yet in place
        ("Path.rename", 1, "after"),  # in place, its folder not yet synced
    ],
)
def test_a_kill_in_the_middle_of_a_checkpoint_loses_nothing(
    function: str, call: int, where: str, tmp_path: Path
) -> None:
    """`kill -9` between any two writes of a checkpoint: the next resume gives the uninterrupted run."""
    config = run_config()
    whole = straight(config, tmp_path / "whole")
    Trainer(config, tmp_path / "run")
    process = _resume_in_child(tmp_path / "run", _die_at_call, function, call, where)
    process.join(240)
    assert process.exitcode == -signal.SIGKILL
    for checkpoint in checkpoints_of(tmp_path / "run/checkpoints"):
        load_checkpoint(checkpoint)
    finish(tmp_path / "run")
    same(whole, tmp_path / "run")
    assert not list((tmp_path / "run").rglob(".echelon-tmp-*"))


def test_a_run_killed_at_random_moments_is_the_run_that_was_not(tmp_path: Path) -> None:
    """`kill -9` again and again, whatever the run is doing, until it is done."""
    config = run_config(steps=160 * UPDATE, checkpoint_every=4 * UPDATE)
    whole = straight(config, tmp_path / "whole")
    Trainer(config, tmp_path / "run")
    rng = random.Random(3)
    deaths = 0
    for _ in range(40):
        process = _resume_in_child(tmp_path / "run")
        if deaths < 3:
            before = len(_steps_logged(tmp_path / "run"))
            while process.is_alive() and len(_steps_logged(tmp_path / "run")) <= before:
                time.sleep(0.01)
            process.join(rng.uniform(0, 0.1))  # short: a fast machine, too, is to be stopped several times
            process.kill()
        process.join(240)
        deaths += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            break
    assert process.exitcode == 0
    assert deaths >= 2
    same(whole, tmp_path / "run")


def _steps_logged(folder: Path) -> list[str]:
    path = folder / "timings.jsonl"
    return path.read_text().splitlines() if path.exists() else []


# -- one seed decides --------------------------------------------------------------------------


def test_one_seed_decides_and_another_decides_otherwise(tmp_path: Path) -> None:
    """The same seed gives the same bytes, whatever else the process does; another seed another run."""
    config = run_config(algorithm=dataclasses.replace(QUICK, recurrent=True))
    one = straight(config, tmp_path / "one")
    np.random.seed(99)
    torch.manual_seed(99)
    random.seed(99)
    two = Trainer(config, tmp_path / "two")
    other = Trainer(dataclasses.replace(config, seed=1), tmp_path / "other")

    def disturb(progress: Any) -> None:
        np.random.random(3)
        torch.rand(3)
        random.random()

    # Two runs by turns in one process.
    while not (two.run(disturb, After(1)) & other.run(disturb, After(1))):
        pass
    same(one, tmp_path / "two")
    a, b = outcome(one), outcome(tmp_path / "other")
    assert all(a[name] != b[name] for name in ("metrics", "worlds", "algorithm"))


# -- damage ------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def newer(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": FORMAT + 1}))


def emptied(path: Path) -> None:
    path.write_text("[]\n")


DAMAGE = [
    *itertools.product(("worlds.safetensors", "algorithm.safetensors", "progress.json"), (flip, cut, Path.unlink)),
    *(("manifest.json", harm) for harm in (cut, Path.unlink, newer, emptied)),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    return straight(run_config(), tmp_path_factory.mktemp("finished") / "run")


@pytest.mark.parametrize(("part", "harm"), DAMAGE, ids=lambda x: getattr(x, "__name__", x))
def test_a_damaged_checkpoint_is_named_and_the_older_one_goes_on(
    part: str, harm: Callable[[Path], None], finished: Path, tmp_path: Path
) -> None:
    """Every damage is one line with a way out that works; nothing is deleted by it."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    older, newest = checkpoints_of(run / "checkpoints")
    harm(newest / part)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(EchelonError) as caught:
        Trainer.resume(run)
    line = str(caught.value)
    assert "\n" not in line and newest.name in line
    if harm is newer:
        assert f"format {FORMAT + 1}" in line and "use a newer Echelon" in line
    else:
        assert part in line and f"move it away to go on from {older.name}" in line
    with pytest.raises(EchelonError):
        load_policy(run)
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    newest.rename(newest.with_name(newest.name + ".damaged"))
    finish(run)
    same(finished, run)


def test_a_damaged_only_checkpoint_never_starts_the_run_over(finished: Path, tmp_path: Path) -> None:
    """With no older checkpoint the line says so, and the logs stay as they are."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    older, newest = checkpoints_of(run / "checkpoints")
    shutil.rmtree(older)
    (newest / "manifest.json").unlink()
    with pytest.raises(EchelonError, match="there is no older one: train again"):
        Trainer.resume(run)
    assert (run / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_logs_shorter_than_the_checkpoint_knew_are_told(finished: Path, tmp_path: Path) -> None:
    """A log that something else has cut is one clear line, not a run with a hole."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    cut(run / "metrics.jsonl")
    with pytest.raises(EchelonError, match=r"metrics\.jsonl is damaged: it has \d+ bytes, the checkpoint knew of"):
        finish(run)


def test_only_two_checkpoints_are_kept_and_none_is_a_leftover(finished: Path) -> None:
    """The two newest checkpoints, whole, and nothing else."""
    names = [p.name for p in sorted((finished / "checkpoints").iterdir())]
    assert names == [f"step-{6 * UPDATE:012d}", f"step-{8 * UPDATE:012d}"]


def test_json_lines_are_cut_back_to_what_a_checkpoint_knew(tmp_path: Path) -> None:
    """Reopened with a size, a log has that many bytes and goes on from there."""
    log = JsonLines(tmp_path / "log")
    log.write({"a": 1})
    size = log.sync()
    log.write({"a": 2})
    log.close()
    again = JsonLines(tmp_path / "log", size)
    again.write({"a": 3})
    again.close()
    assert (tmp_path / "log").read_text() == '{"a":1}\n{"a":3}\n'


# -- disks, folders, processes -----------------------------------------------------------------


def _train_in_little_room(folder: str, room: int, answer: Any) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try:
        finish(Path(folder))
        answer.put("finished")
    except EchelonError as error:
        answer.put(str(error))


@pytest.mark.parametrize("room", [600, 3000, 30_000])
def test_a_file_that_can_not_be_written_is_one_line_and_the_run_goes_on_later(room: int, tmp_path: Path) -> None:
    """The system refuses to write on: logs or a checkpoint; later, with room, the run is the uninterrupted one."""
    config = run_config()
    whole = straight(config, tmp_path / "whole")
    Trainer(config, tmp_path / "run").run(should_stop=After(1))
    kept = [p.name for p in checkpoints_of(tmp_path / "run/checkpoints")]
    answer = _context().Queue()
    process = _context().Process(target=_train_in_little_room, args=(str(tmp_path / "run"), room, answer))
    process.start()
    line = answer.get(timeout=240)
    process.join(240)
    assert line.startswith("could not write") and "\n" not in line
    assert [p.name for p in checkpoints_of(tmp_path / "run/checkpoints")] == kept
    finish(tmp_path / "run")
    same(whole, tmp_path / "run")


@pytest.mark.parametrize("after", [0, 4])
def test_a_full_disk_is_one_line_and_keeps_the_older_checkpoint(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC at a sync: the line says that the disk is full; the older checkpoint is whole, no half one is left."""
    config = run_config()
    whole = straight(config, tmp_path / "whole")
    Trainer(config, tmp_path / "run").run(should_stop=After(1))
    kept = [p.name for p in checkpoints_of(tmp_path / "run/checkpoints")]
    calls = itertools.count()
    fsync = os.fsync

    def full(handle: int) -> None:
        if next(calls) >= after:
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(_files.os, "fsync", full)
        with pytest.raises(EchelonError, match=r"no space left on the disk while writing .*: free some and try again"):
            finish(tmp_path / "run")
    assert [p.name for p in sorted((tmp_path / "run/checkpoints").iterdir())] == kept
    finish(tmp_path / "run")
    same(whole, tmp_path / "run")


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file", "mine.dat"), TimeoutError("no answer")])
def test_what_a_world_misses_is_not_told_as_the_folders_trouble(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one run's missing file would stop a whole study as if the disk were full."""
    trainer = Trainer(run_config(), tmp_path / "run")

    def fail() -> None:
        raise error

    monkeypatch.setattr(trainer.rollouts, "collect", fail)
    with pytest.raises(type(error)) as caught:
        trainer.run()
    assert caught.value is error


def test_a_folder_belongs_to_one_process_and_one_run(finished: Path, tmp_path: Path) -> None:
    """A second writer and a second run in one folder are refused by one line each, and change nothing."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = (run / "config.toml").read_bytes()
    with only_writer(run), pytest.raises(EchelonError, match="is in use by another process"):
        finish(run)
    with pytest.raises(EchelonError, match="holds a run already: go on with --resume"):
        Trainer(run_config(seed=5), run)
    assert (run / "config.toml").read_bytes() == before
    finish(run)
    same(finished, run)


def test_what_can_not_be_built_leaves_no_folder(tmp_path: Path) -> None:
    """Settings that can't be used are found before anything is written."""
    for bad in (
        {"env": dataclasses.replace(TINY, size=5, num_packages=60)},
        {"planner": "hungarain"},
        {"method": "l2m2", "model": f"hf:{tmp_path / 'nothing'}"},
        {"method": "llm-only"},
    ):
        with pytest.raises(EchelonError):
            Trainer(run_config(**bad), tmp_path / "run")
        assert not (tmp_path / "run").exists()
    with pytest.raises(EchelonError, match="is no run"):
        Trainer.resume(tmp_path / "run")


def test_divergence_is_one_line(tmp_path: Path) -> None:
    """A loss that is no number stops the run with a hint, and no line of the log is spoilt."""
    config = run_config(algorithm=dataclasses.replace(QUICK, lr=1e38))
    with pytest.raises(EchelonError, match=r"training diverged at step \d+ .*lower algorithm.lr"):
        straight(config, tmp_path / "run")
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        json.loads(line)


# -- truncation is not termination -------------------------------------------------------------


@pytest.mark.parametrize("method", ["flat-mappo", "rule-goals"])
def test_a_time_limit_bootstraps_from_the_true_last_observation(method: str) -> None:
    """Where an episode was cut, the next value is that of the last true observation, not of the next episode."""
    rollouts = Rollouts(run_config(method=method, env=dataclasses.replace(TINY, limit=5, num_packages=6)))
    rollouts.worlds.start()
    rollouts.collect()
    buffer, algorithm = rollouts.buffer, rollouts.algorithm
    assert len(buffer.finals) == 1
    t, worlds, obs, state, _ = buffer.finals[0]
    assert t == 4 and list(worlds) == list(range(8))
    assert not np.array_equal(state, buffer.state[t + 1])
    assert buffer.begins[t + 1].all() and buffer.ended[t].all()
    values, next_values = algorithm._values(buffer)
    np.testing.assert_array_equal(next_values[t], algorithm._value(obs, state))
    assert (next_values[t] != values[t + 1]).any()
    others = [k for k in range(buffer.steps - 1) if k != t]
    np.testing.assert_array_equal(next_values[others], values[[k + 1 for k in others]])
    if method == "flat-mappo":
        assert not buffer.terminated[t].any()


def test_a_world_that_always_times_out_is_worth_its_endless_return(tmp_path: Path) -> None:
    """Reward 1 a step, cut every 5 steps: the critic learns 1 / (1 - gamma) = 5, not the 3.4 of an end."""
    config = run_config(
        method="flat-mappo", env=dataclasses.replace(TINY, limit=5, num_packages=6),
        algorithm=dataclasses.replace(QUICK, gamma=0.8, lr=5e-3, epochs=4),
    )  # fmt: skip
    rollouts = Rollouts(config)
    rollouts.worlds.start()
    buffer: RolloutBuffer = rollouts.buffer
    for _ in range(60):
        rollouts.collect()
        buffer.reward[:] = 1
        buffer.terminated[:] = False
        rollouts.algorithm.update(buffer)
    values, next_values = rollouts.algorithm._values(buffer)
    assert abs(float(values.mean()) - 5) < 0.5
    # The same rollout, had the limit been taken for an end: far less is promised just before it.
    _, returns = gae(buffer.reward, values, next_values, buffer.terminated, buffer.ended, gamma=0.8, lam=0.95)
    _, wrong = gae(buffer.reward, values, next_values, buffer.ended, buffer.ended, gamma=0.8, lam=0.95)
    t = buffer.finals[0][0]
    assert abs(float(returns[t].mean()) - 5) < 0.6 and abs(float(wrong[t].mean()) - 1) < 1e-5


# -- learning ----------------------------------------------------------------------------------


def learnt(folder: Path, **algorithm: Any) -> float:
    """The TSR on 100 unseen worlds after 40,960 steps."""
    seed = algorithm.pop("seed", 0)
    config = RunConfig(
        method="rule-goals", env=WarehouseConfig(size=8, num_agents=2, num_packages=2, limit=60), steps=40_960,
        num_envs=64, threads=1, seed=seed, algorithm=MAPPOConfig(hidden=32, rollout=16, lr=2e-3, **algorithm),
    )  # fmt: skip
    straight(config, folder)
    result = evaluate(config, load_policy(folder)[1], episodes=100)
    assert result is not None
    return float(result.success.mean())


def test_a_tiny_warehouse_is_learnt_in_both_precisions(tmp_path: Path) -> None:
    """Three seeds each: float32 and bfloat16 reach 0.9, and one as well as the other; untrained is far below."""
    tsr = {
        precision: [learnt(tmp_path / f"{precision}-{seed}", precision=precision, seed=seed) for seed in range(3)]
        for precision in ("float32", "bfloat16")
    }
    assert min(min(values) for values in tsr.values()) >= 0.9, tsr
    assert abs(np.mean(tsr["float32"]) - np.mean(tsr["bfloat16"])) <= 0.05, tsr
    untrained = RunConfig(
        method="rule-goals", env=WarehouseConfig(size=8, num_agents=2, num_packages=2, limit=60), threads=1,
        algorithm=MAPPOConfig(hidden=32, precision="float32"),
    )  # fmt: skip
    result = evaluate(untrained, None, episodes=100)
    assert result is not None and result.success.mean() < 0.6


def test_a_recurrent_team_learns_too(tmp_path: Path) -> None:
    """An actor with a memory reaches 0.8."""
    assert learnt(tmp_path / "run", recurrent=True, precision="float32") >= 0.8


# -- settings ----------------------------------------------------------------------------------

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
FINITE = st.floats(1e-9, 1e9, allow_nan=False)


@st.composite
def run_configs(draw: st.DrawFn) -> RunConfig:
    """Any settings that a run can have."""
    shared: dict[str, Any] = {
        "size": draw(st.integers(5, 256)),
        "height": draw(st.none() | st.integers(5, 256)),
        "limit": draw(st.none() | st.integers(1, 10**6)),
        "num_agents": draw(st.integers(1, 64)),
        "layout": draw(st.sampled_from(("shelves", "random", "open"))),
        "density": draw(st.floats(0, 0.4)),
        "map": draw(st.none() | WORDS.filter(lambda s: s not in ("", ".") and "\0" not in s).map(Path)),
    }
    env: GridConfig = draw(st.sampled_from((WarehouseConfig, SearchConfig, RepairConfig)))(**shared)
    method = draw(st.sampled_from(("l2m2", "rule-goals", "flat-mappo")))
    return RunConfig(
        method=method, env=env, steps=draw(st.integers(1, 2**63)), seed=draw(st.integers(0, 2**63)),
        planner=None if method == "flat-mappo" else draw(st.none() | WORDS), model=draw(WORDS),
        llm_share=draw(st.floats(0, 1, exclude_min=True)), collision_cost=draw(FINITE),
        threads=draw(st.none() | st.just(2)),
        subgoals=SubgoalConfig(scope=draw(st.sampled_from(("agent", "team"))), on_event=draw(st.booleans())),
        algorithm=MAPPOConfig(lr=draw(FINITE), recurrent=draw(st.booleans()), entropy=draw(st.just(0.0) | FINITE)),
    )  # fmt: skip


@settings(max_examples=150)
@given(run_configs())
def test_settings_survive_their_file(config: RunConfig) -> None:
    """`from_toml(to_toml(config)) == config` for whatever settings, names with odd characters included."""
    assert from_toml(tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("num_env = 8", "unknown key in run.toml 'num_env': did you mean 'num_envs'?"),
        ("[env]\nsise = 8", "unknown key in run.toml: env 'sise': did you mean 'size'?"),
        ("[algorithm]\nlearning_rate = 1", "unknown key in run.toml: algorithm 'learning_rate'"),
        ("steps = 1.5", "run.toml: steps is 1.5: it must be a whole number"),
        ("steps = true", "run.toml: steps is True: it must be a whole number"),
        ('num_envs = "8"', "run.toml: num_envs is '8': it must be a whole number"),
        ("[env]\nsize = [8]", r"run.toml: env.size is \[8\]: it must be a whole number"),
        ("env = 3", r"run.toml: env must be a table, \[env\]"),
        ('[env]\nlayout = "shelfs"', "unknown run.toml: env.layout 'shelfs': did you mean 'shelves'?"),
        ("[algorithm]\nlr = nan", "run.toml: algorithm.lr is nan: it must be a number"),
        ("[env]\nmap = 3", "run.toml: env.map is 3: it must be a path"),
        ("planner = 3", "run.toml: planner is 3: it must be a text"),
        ("[distil]\nenabled = 1", "run.toml: distil.enabled is 1: it must be true or false"),
        ("[algorithm]\nlr = -1", "algorithm.lr is -1.0: it must be above 0"),
        ("steps = 0", "steps is 0: it must be at least 1"),
        ("seed = -1", "seed is -1: it must be at least 0"),
        ('environment = "serach"', "unknown environment 'serach': did you mean 'search'?"),
        ("environment = 5", "unknown environment '5'"),
        ('environment = ["search"]', "unknown environment"),
        ('method = "l2m"', "unknown method 'l2m': did you mean 'l2m2'?"),
        ('method = "flat-mappo"\nplanner = "random"', "method flat-mappo has no planner"),
        ("steps = ", "run.toml isn't TOML"),
    ],
)
def test_wrong_settings_get_one_line(text: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong, where, and what would be right."""
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(text)
    with pytest.raises(EchelonError, match=line) as caught:
        read_toml(Path("run.toml"))
    assert "\n" not in str(caught.value)


def test_a_finished_run_whose_steps_are_no_whole_rollouts_can_be_resumed(tmp_path: Path) -> None:
    """It has done a little more than it was asked for; resuming it is done at once, asking for less is refused."""
    config = run_config(steps=UPDATE + 1)
    Trainer(config, tmp_path / "run").run()
    again = Trainer.resume(tmp_path / "run")
    assert again.step > config.steps and again.run()
    with pytest.raises(EchelonError, match="steps already"):
        Trainer.resume(tmp_path / "run", steps=1)


def test_a_config_that_is_not_its_checkpoints_is_refused(tmp_path: Path) -> None:
    """Editing the config of a run that has begun gives one line that names the change."""
    Trainer(run_config(), tmp_path / "run").run()
    path = tmp_path / "run" / "config.toml"
    path.write_text(path.read_text().replace("gamma = 0.99", "gamma = 0.9"))
    with pytest.raises(EchelonError, match=r"gamma = 0\.99 became gamma = 0\.9"):
        Trainer.resume(tmp_path / "run")


def test_a_run_is_repeated_from_its_record_without_the_model(tiny_model: str, tmp_path: Path) -> None:
    """The same weights, worlds and metrics, stopped and resumed on the way; a record of another run is no answer."""
    config = run_config(method="l2m2", model=tiny_model, llm_share=0.25)
    first = straight(config, tmp_path / "first")
    again = dataclasses.replace(config, model="none", planner=f"record:{first / 'plans.jsonl'}")
    stops = iter([False, False, False, True])
    assert not Trainer(again, tmp_path / "again").run(should_stop=lambda: next(stops))
    finish(tmp_path / "again")

    def plain(folder: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if not k.startswith("model_")} for line in lines]

    assert plain(first) == plain(tmp_path / "again")
    one, two = (load_checkpoint(checkpoints_of(f / "checkpoints")[-1]) for f in (first, tmp_path / "again"))
    assert all(torch.equal(one.algorithm[name], tensor) for name, tensor in two.algorithm.items())
    # What the model said is its planner's own.
    worlds = {name: array for name, array in one.worlds.items() if not name.startswith("planner.")}
    assert worlds.keys() == two.worlds.keys()
    assert all(np.array_equal(array, two.worlds[name]) for name, array in worlds.items())
    other = Trainer(dataclasses.replace(again, seed=5), tmp_path / "other")
    assert other.run()
    assert other.worlds.planners[0][0].state_dict()["missed"] > 0


@pytest.mark.parametrize("text", ["", "nonsense", '{"world": 0}', '{"world": 0, "agents": [{"agent": 1}]}', "[1]"])
def test_a_record_that_is_none_is_one_line(text: str, tmp_path: Path) -> None:
    """A missing, empty or broken record names the file and, where there is one, the line."""
    path = tmp_path / "plans.jsonl"
    with pytest.raises(EchelonError, match=r"record .*plans\.jsonl: No such file"):
        Trainer(run_config(planner=f"record:{path}"), tmp_path / "run")
    path.write_text(text)
    with pytest.raises(EchelonError, match=r"record .*plans\.jsonl"):
        Trainer(run_config(planner=f"record:{path}"), tmp_path / "run")
