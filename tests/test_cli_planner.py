"""`echelon train-planner`: what it writes and says, how it stops and goes on, and mistakes of one line."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import echelon
from echelon.cli import main
from echelon.console import Stopper
from echelon.methods import methods
from echelon.planner_training import PRESETS, PlannerConfig
from tiny_model import make_tiny_model

SMALL = [
    "--imitation", "4", "--lessons", "3", "--batch", "16", "--iterations", "2", "--scenes", "3", "--worlds", "8",
    "--max-size", "9", "--max-agents", "3", "--himac.group", "4", "--checkpoint-every", "3", "--threads", "1",
]  # fmt: skip


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
def trained(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that ended well."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    assert main(["train-planner", "--model", tiny_model, *SMALL, "--out", str(folder)]) == 0
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def stages(folder: Path) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["stage"], line["step"]) for line in lines]


def test_it_imitates_then_reinforces_and_tells_how_to_use_the_planner(
    tiny_model: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The planner's folder is all of standard output; its commands are those that a user can paste."""
    assert main(["train-planner", "--model", tiny_model, *SMALL, "--out", "my out"]) == 0
    told = capsys.readouterr()
    assert told.out == "my out/planner\n"
    assert stages(Path("my out")) == [*(("imitation", n) for n in range(1, 5)), *(("reinforcement", n) for n in (1, 2))]
    commands = [shlex.split(line) for line in told.err.splitlines() if line.startswith("  echelon")]
    assert commands == [["echelon", name, "--model", "hf:my out/planner"] for name in ("plan", "train")]
    world = ["--env.size", "8", "--env.num-agents", "2", "--env.num-packages", "2", "--threads", "1"]
    assert main([*commands[0][1:], *world]) == 0
    assert "fetch package:" in capsys.readouterr().out
    for folder in ("planner", "imitated"):
        assert set(files(Path("my out", folder))) == {
            "adapter_config.json", "adapter_model.safetensors", "choose.txt", "choose_system.txt"
        }  # fmt: skip


def test_a_finished_training_is_left_as_it_is(trained: Path, tiny_model: str) -> None:
    """The same command does nothing, unless the planner itself is missing."""
    before = {name: (trained / name).read_bytes() for name in files(trained)}
    for name in files(trained / "planner"):
        (trained / "planner" / name).unlink()
    (trained / "planner").rmdir()
    assert main(["train-planner", "--model", tiny_model, *SMALL, "--out", str(trained)]) == 0
    assert {name: (trained / name).read_bytes() for name in files(trained)} == before


def test_ctrl_c_saves_and_the_told_command_goes_on(trained: Path, tiny_model: str, place: Path) -> None:
    """Stopped in the middle and gone on with: the same metrics and the same adapter, bit for bit."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(echelon.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-m", "echelon", "train-planner", "--model", tiny_model, *SMALL, "--out", "run"],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    metrics, end = Path("run/metrics.jsonl"), time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count("\n")):
        assert time.monotonic() < end and process.poll() is None, "it never came"
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert (process.returncode, out) == (130, "") and "Traceback" not in err
    found = re.search(r"^stopped in \w+ at \d; go on with:\n  (echelon train-planner .*)$", err, re.MULTILINE)
    assert found is not None and len(stages(Path("run"))) < 6 and not Path("run/planner").exists()
    assert main(shlex.split(found[1])[1:]) == 0
    for name in ("metrics.jsonl", "planner/adapter_model.safetensors"):
        assert Path("run", name).read_bytes() == (trained / name).read_bytes(), name


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_a_default_and_flags_go_over_it(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given wins; the folder is named by preset and seed."""
    made: list[tuple[PlannerConfig, Path]] = []

    def stop(config: PlannerConfig, folder: Path) -> None:
        made.append((config, folder))
        raise KeyboardInterrupt

    monkeypatch.setattr("echelon.planner_training.PlannerTrainer", stop)
    assert main(["train-planner", f"--preset={preset}", "--seed", "3", "--worlds", "8", "--model", "hf:x"]) == 130
    wanted = PlannerConfig(**{**PRESETS[preset], "seed": 3, "worlds": 8, "model": "hf:x"})
    assert made == [(wanted, Path(f"runs/planner-{preset}-seed3"))]


def test_help_tells_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    """The preset's defaults, where one is named."""
    assert main(["train-planner", "--preset", "small", "--help"]) == 0
    out = " ".join(re.sub(r"[│╭╰╮╯─\x1b]", " ", capsys.readouterr().out).split())
    for flag, default in (
        ("--imitation INT", 20),
        ("--lessons INT", 12),
        ("--himac.group INT", 8),
        ("--out PATH", None),
    ):
        assert f"(default: {default})" in out.split(flag, 1)[1][:200], flag


MISTAKES = {
    "flag": (["--iteration", "3"], "did you mean --iterations?"),
    "nested": (["--policy.rnk", "3"], "did you mean --policy.rank?"),
    "preset": (["--preset", "defalt"], "unknown preset 'defalt': did you mean 'default'?"),
    "value": (["--scenes", "0"], "scenes is 0: it must be at least 1"),
    "group": (["--worlds", "12"], "worlds is 12: it must be a multiple of himac.group (8)"),
    "himac": (["--himac.group", "1"], "himac.group is 1: it must be at least 2"),
    "hiper": (["--hiper.kl=-1"], "hiper.kl is -1.0: it must be at least 0"),
    "teacher": (["--teacher", "hungarain"], "did you mean 'hungarian'?"),
    "model": (["--model", "smollm"], "unknown model 'smollm'"),
    "folder": (["--model", "hf:nowhere"], "no folder nowhere"),
    "server": (["--model", "openai:x"], "model openai:x can't learn here"),
    "gguf": (["--model", "gguf:smollm2-135m"], "can't learn here"),
    "stray": (["small"], "Unrecognized options: small (echelon train-planner --help)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(
    mistake: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 2, one line that says what would be right, nothing written."""
    arguments, words = MISTAKES[mistake]
    assert main(["train-planner", *arguments]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and told.err.startswith("echelon: ") and words in told.err
    assert files(place) == []


def test_other_settings_want_another_folder(trained: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A training isn't mixed with another."""
    assert main(["train-planner", "--model", tiny_model, *SMALL, "--seed", "1", "--out", str(trained)]) == 2
    assert "holds a training with other settings: choose another --out" in capsys.readouterr().err


# -- several processes -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [m.name for m in methods().values() if m.learns and not m.learner])
def test_torchrun_is_for_planners_that_learn(
    name: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others would train the same run in each process, in one folder: one line, nothing written."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "--method", name, "--out", "run"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"method {name} trains in one process, and torchrun started 2" in told
    assert files(place) == []


def test_torchrun_goes_on_with_no_run_of_one_process(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's own method counts."""
    world = ["--env.size", "6", "--env.num-agents", "2", "--env.num-packages", "2", "--num-envs", "4"]
    small = ["--algorithm.rollout", "8", "--steps", "32", "--threads", "1", "--eval-episodes", "0"]
    assert main(["train", "--method", "flat-mappo", *world, *small, "--out", "run"]) == 0
    before = {name: (place / name).read_bytes() for name in files(place)}
    capsys.readouterr()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "--resume", "run", "--steps", "64"]) == 2
    assert "method flat-mappo trains in one process" in capsys.readouterr().err
    assert {name: (place / name).read_bytes() for name in files(place)} == before


def test_one_ctrl_c_that_comes_twice_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun passes on what the terminal sent already; a second one that is meant comes later, and ends at once."""
    now = [10.0]
    monkeypatch.setattr("echelon.console.time.monotonic", lambda: now[0])
    stopper = Stopper()
    with stopper.listening():
        assert not stopper()
        signal.raise_signal(signal.SIGINT)
        now[0] += 0.4
        signal.raise_signal(signal.SIGTERM)
        assert stopper() and stopper.signal == signal.SIGINT
        assert capsys.readouterr().err.count("stopping at the next safe point") == 1
        now[0] += 0.2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
