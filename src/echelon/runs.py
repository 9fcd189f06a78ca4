"""What a run's folder says: its config, its newest policy, what its training cost."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
from collections import deque
from pathlib import Path

import numpy as np
import torch

import echelon
from echelon._files import read_json
from echelon.checkpoints import checkpoints_of, load_checkpoint
from echelon.configs import RunConfig, read_toml
from echelon.errors import EchelonError
from echelon.methods import method

__all__ = ["ACCOUNT", "FORK", "PLANNER", "SEGMENTS", "load_policy", "processor", "read_run", "run_costs",
           "segments_seconds", "steps_done", "trained_folder", "versions"]  # fmt: skip


ACCOUNT = "account.json"
"""The file with every diagnosis, proposal, branch and verdict of a run whose shaping grew with it."""
FORK = "fork.json"
"""The file of a run's folder that says which run it goes on from."""
PLANNER = "planner"
"""The folder of a run's folder that holds its planner, where that learns."""
SEGMENTS = Path("work", "runs")
"""Where, in the folder of a run whose shaping grew with it, all stretches of its training are."""


def load_policy(folder: Path) -> tuple[RunConfig, dict[str, torch.Tensor] | None]:
    """A run's config and its newest policy (None where its method has nothing to learn).

    Raises:
        EchelonError: no run there, nothing trained yet, or damaged files.
    """
    config = read_run(folder)
    if (folder / PLANNER).is_dir():
        # The run's own planner, as it has learnt to plan up to now.
        config = dataclasses.replace(config, model=f"hf:{(folder / PLANNER).resolve()}")
    if not method(config.method).learns:
        return config, None
    saved = checkpoints_of(folder / "checkpoints")
    if not saved:
        raise EchelonError(f"run {folder} has no checkpoint yet: train it with echelon train --resume {folder}")
    return config, load_checkpoint(saved[-1]).algorithm


def steps_done(folder: Path) -> int:
    """The environment steps of a run's newest checkpoint, 0 without one."""
    saved = checkpoints_of(folder / "checkpoints")
    return int(saved[-1].name.removeprefix("step-")) if saved else 0


def run_costs(folder: Path) -> dict[str, float | None]:
    """What a run's training took: seconds, the language model's calls and tokens, and steps until it succeeded.

    Of what a mainline has become, branches count: steps are steps spent, seconds those of all segments. What a missing
    or damaged log would say is None.
    """
    saved = checkpoints_of(folder / "checkpoints")
    if not saved:
        return {}
    # What a mainline has become has only its last segment's metrics beside it.
    shaped = (folder.parent / ACCOUNT).exists()
    logged = folder.parent if shaped else folder
    progress = load_checkpoint(saved[-1]).progress
    model = progress.get("model", {})
    reached: dict[str, float | None] = {"steps_to_tsr_90": None, "steps_to_tsr_90_is_bound": False}
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        found = _steps_to_success(logged / "metrics.jsonl", 0.9, max(50, read_run(folder).own_worlds))
        step = found["steps_to_tsr_90"]
        reached = _spent(logged / ACCOUNT, step) if shaped and step is not None else found
    return {
        "training_seconds": segments_seconds(logged) if shaped else progress["seconds"],
        "training_model_calls": model.get("calls", 0),
        "training_model_tokens": model.get("prompt_tokens", 0),
        "training_model_seconds": model.get("seconds", 0.0),
        **reached,
    }


def segments_seconds(folder: Path) -> float:
    """Seconds of training of all segments that are done in a folder whose shaping grew with the run."""
    runs = folder / SEGMENTS
    done = {path.parent.name: read_json(path, "result")["training_seconds"] for path in runs.glob("*/result.json")}
    # A fork's seconds go on from its source's.
    forks = [read_json(runs / name / FORK, "fork")["source"] for name in done if (runs / name / FORK).exists()]
    return float(sum(done.values()) - sum(done[Path(source).name] for source in forks))


def _spent(account: Path, step: float) -> dict[str, float | None]:
    """The steps spent when a mainline had done so many; an upper bound where branches were tried meanwhile."""
    for segment in reversed(read_json(account, "account")["segments"]):
        if segment["from"] < step <= segment["to"]:
            begin, end = segment["spent"]
            alone = end - begin == segment["to"] - segment["from"]
            spent = begin + step - segment["from"] if alone else end
            return {"steps_to_tsr_90": float(spent), "steps_to_tsr_90_is_bound": not alone}
    return {"steps_to_tsr_90": None, "steps_to_tsr_90_is_bound": False}


def _steps_to_success(metrics: Path, level: float, episodes: int) -> dict[str, float | None]:
    """The first step at which `level` of the last (at least) `episodes` training episodes had succeeded.

    With fewer episodes than worlds it would come too early: what succeeds ends sooner than what fails. Only those that
    the method's own planner planned count, not those of the cheap planner beside a model. Where there are such, the
    number is an upper bound: few worlds take long to finish that many episodes.
    """
    window: deque[tuple[int, float]] = deque()
    shared = False
    for line in metrics.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        shared |= entry["own_episodes"] != entry["episodes"]
        if not entry["own_episodes"]:
            continue
        window.append((entry["own_episodes"], entry["own_episodes"] * entry["own_tsr"]))
        while sum(n for n, _ in window) - window[0][0] >= episodes:
            window.popleft()
        count = sum(n for n, _ in window)
        if count >= episodes and sum(won for _, won in window) >= level * count:
            return {"steps_to_tsr_90": float(entry["step"]), "steps_to_tsr_90_is_bound": shared}
    return {"steps_to_tsr_90": None, "steps_to_tsr_90_is_bound": shared}


def trained_folder(folder: Path) -> Path:
    """The ordinary run's folder in `folder`: where shaping grew with the run, what became of its mainline."""
    return folder / "main" if (folder / ACCOUNT).exists() else folder


def read_run(folder: Path) -> RunConfig:
    """The config of the run in `folder`.

    Raises:
        EchelonError: there is no run, or its config is damaged.
    """
    if not (folder / "config.toml").exists():
        raise EchelonError(f"{folder} is no run: it has no config.toml")
    return read_toml(folder / "config.toml")


def versions() -> dict[str, str]:
    """By what results are made here: Echelon, Python, torch and numpy."""
    return {
        "echelon": echelon.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


def processor() -> str:
    """This machine's processor, in its maker's words."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
