"""What the tests of studies share: an environment that stops, fails or dies when told, and what must come out alike."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echelon.checkpoints import checkpoints_of
from echelon.evaluation.protocol import Protocol
from echelon.studies.spec import Study
from echelon.studies.work import execute

UPDATE = 8 * 8  # environment steps of one update

# A user's file. Once training has made its first checkpoint (after 16 steps of its worlds), the file `mood` beside it
# says what happens.
YARD = '''
"""A warehouse of a user's own."""
import os, resource, signal, time
from dataclasses import dataclass
from pathlib import Path
from echelon.envs import Warehouse, WarehouseConfig, register
from echelon.methods import Method, register as register_method

MOOD = Path(__file__).with_name("mood")
ONCE = ("die once", "no room", "deaf")


@dataclass(frozen=True)
class YardConfig(WarehouseConfig):
    """Settings of `yard`."""


class Yard(Warehouse):
    """A warehouse that does as its mood is."""

    name = "yard"
    calls = 0

    def advance(self, actions):
        self.calls += 1
        while self.num_envs == 8 and self.calls > 18:
            try:
                mood = MOOD.read_text()
                if mood in ONCE:
                    MOOD.unlink()  # of several workers that have read it, the one whose unlink succeeds acts
            except FileNotFoundError:
                break
            if mood == "raise":
                raise ValueError("the conveyor is jammed")
            if mood.startswith("die"):
                os.kill(os.getpid(), signal.SIGKILL)
            if mood == "no room":
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            if mood == "deaf":
                os.closerange(3, 256)
                time.sleep(600)
            if mood == "hold":
                time.sleep(0.01)
        super().advance(actions)


register(YardConfig, Yard)
register_method(Method("my-goals", "nearest tasks", "nearest", "nearest"))
'''


def make_yard(folder: Path) -> Path:
    """Write the user's file; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "yard.py").write_text(YARD)
    return folder / "yard.py"


def tiny_study(yard: Path, **changes: Any) -> Study:
    """Runs of 8 updates, a checkpoint after every second, judged after 0, 3, 6 and 8 of them."""
    settings: dict[str, Any] = {
        "run": {
            "num_envs": 8,
            "checkpoint_every": 2 * UPDATE,
            "algorithm": {"hidden": 16, "rollout": 8, "epochs": 1, "minibatches": 1, "precision": "float32"},
        },
        "env": {"yard": {"num_packages": 2, "limit": 40}},
    }
    values: dict[str, Any] = {
        "name": "tiny",
        "methods": ("my-goals", "classical"),
        "environments": ("yard",),
        "sizes": (8,),
        "agents": (2,),
        "seeds": (0, 1),
        "steps": 8 * UPDATE,
        "record": 0,
        "imports": (str(yard),),
        "protocol": Protocol(every=3 * UPDATE, episodes=4, final_episodes=6),
        "settings": settings,
    }
    return Study(**{**values, **changes})


class Here:
    """A backend in this process: one job after the other.

    Attributes:
        done: ids of the jobs that it was given.
    """

    slots = 1

    def __init__(self) -> None:
        self.done: list[str] = []
        self._waiting: deque[dict[str, Any]] = deque()

    def start(self, job: dict[str, Any]) -> None:
        self.done.append(job["id"])
        self._waiting.append(job)

    def wait(self, seconds: float) -> list[tuple[str, dict[str, Any]]]:
        if not self._waiting:
            return []
        job = self._waiting.popleft()
        return [(job["id"], execute(json.loads(json.dumps(job))))]

    def close(self) -> None:
        pass


def _plain(value: Any) -> Any:
    """Without what time it took."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if not k.endswith(("seconds", "per_second"))}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def outcome(folder: Path) -> dict[str, Any]:
    """Everything of a run that must not depend on where it was done and how often it was stopped."""
    found: dict[str, Any] = {"result": _plain(json.loads((folder / "result.json").read_text()))}
    for name in ("config.toml", "metrics.jsonl", "best.safetensors"):
        if (folder / name).exists():
            found[name] = (folder / name).read_bytes()
    for checkpoint in checkpoints_of(folder / "checkpoints")[-1:]:
        found["last"] = checkpoint.name
        for name in ("worlds.safetensors", "algorithm.safetensors"):
            found[name] = (checkpoint / name).read_bytes()
    return found


def same(one: Path, other: Path, runs: int) -> None:
    """Assert that two studies' folders hold the same `runs` runs, all finished; names what differs."""
    names = sorted(p.name for p in (one / "runs").iterdir())
    assert len(names) == runs
    for name in names:
        a, b = outcome(one / "runs" / name), outcome(other / "runs" / name)
        assert (name, [key for key in {**a, **b} if a.get(key) != b.get(key)]) == (name, [])
    assert names == sorted(p.name for p in (other / "runs").iterdir())
