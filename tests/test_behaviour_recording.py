"""Behaviour of real policies: whole episodes on worlds of their own, counted as by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echelon.algorithms.mappo import MAPPOConfig
from echelon.algorithms.qmix import QMIXConfig
from echelon.building import build_algorithm, build_worlds
from echelon.configs import RunConfig
from echelon.envs import WarehouseConfig
from echelon.envs.repair import RepairConfig
from echelon.envs.search import SearchConfig
from echelon.evaluation import behaviour as module
from echelon.evaluation import evaluate
from echelon.evaluation.behaviour import record_behaviour
from echelon.shaping import Behaviour, ShapingSettings, flags

QUICK = MAPPOConfig(hidden=16, rollout=8, precision="float32")
ROOM = "type octile\nheight 2\nwidth 6\nmap\nA.P..Z\n......\n"


def config(env: Any) -> RunConfig:
    return RunConfig(method="flat-mappo", env=env, num_envs=4, threads=1, algorithm=QUICK)


class Fixed:
    """Moves from a list: each for all agents of all worlds; at the list's end it begins again."""

    def __init__(self, moves: list[int]) -> None:
        self.moves, self.at = moves, 0

    def act(self, worlds: Any, *, greedy: bool = False) -> Any:
        move = self.moves[self.at % len(self.moves)]
        self.at += 1
        return np.full((worlds.env.num_envs, worlds.env.num_agents), move, np.int8)


def fixed(monkeypatch: pytest.MonkeyPatch, moves: list[int]) -> None:
    monkeypatch.setattr(module, "build_executor", lambda *_: Fixed(moves))


def test_a_delivery_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One robot goes west (a wall), then east five times: it takes up the package on its way and delivers it."""
    (tmp_path / "room.map").write_text(ROOM, encoding="utf-8")
    env = WarehouseConfig(map=str(tmp_path / "room.map"), num_agents=1, num_packages=1, num_zones=1, limit=20)
    fixed(monkeypatch, [4, 2, 2, 2, 2, 2])
    stats = record_behaviour(config(env), None, episodes=3, stream=1)
    assert stats == Behaviour(
        episodes=3,
        steps=6,
        coverage=5 / 6,  # cells 0, 0, 1, 2, 3, 4 before the six steps; at most one a step
        idle=1 / 5,
        backtrack=0,
        oscillation=0,
        repeated=0,
        goal_distance=(2 + 2 + 1 + 3 + 2 + 1) / 6,  # to the package, then, with it, to the zone
        near_steps=5 / 6,
        near_episodes=1,
        failed_near=0,
        same_target=0,
        target_entropy=1,
        target_switches=1 / 5,
        bumped=0,
        events=1,
        task_return=1,
    )


def test_a_failure_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To and fro in front of the package until the time is up."""
    (tmp_path / "room.map").write_text(ROOM, encoding="utf-8")
    env = WarehouseConfig(map=str(tmp_path / "room.map"), num_agents=1, num_packages=1, num_zones=1, limit=8)
    fixed(monkeypatch, [2, 4])
    stats = record_behaviour(config(env), None, episodes=2, stream=1)
    assert (stats.episodes, stats.steps, stats.task_return, stats.failed_near) == (2, 8, 0, 1)
    assert (stats.idle, stats.backtrack, stats.coverage) == (0, 6 / 7, 2 / 8)
    assert flags(dataclasses.replace(stats, episodes=3)) == ("near_goal_failure", "unstable_behavior")


WORLDS = {
    "warehouse": WarehouseConfig(size=8, num_agents=2, num_packages=2, limit=30),
    "search": SearchConfig(size=8, num_agents=2, num_targets=2, limit=20),
    "repair": RepairConfig(size=10, num_agents=2, num_machines=2, limit=20),
}


@pytest.mark.parametrize("name", sorted(WORLDS))
@pytest.mark.parametrize("method", ["flat-mappo", "qmix", "rule-goals"])
def test_episodes_are_those_of_an_evaluation(name: str, method: str) -> None:
    """Return, length and bumps are those that `evaluate` counts on the same stream; another stream has others."""
    learns = QMIXConfig(hidden=16, precision="float32") if method == "qmix" else QUICK
    run = RunConfig(method=method, env=WORLDS[name], num_envs=4, threads=1, algorithm=learns)
    stats = record_behaviour(run, None, episodes=6, stream=3)
    judged = evaluate(run, None, episodes=6, stream=3)
    assert judged is not None
    assert stats.episodes == 6
    assert stats.steps == pytest.approx(judged.steps.mean())
    assert stats.task_return == pytest.approx(judged.task_return.mean())
    assert stats.bumped == pytest.approx(judged.collisions.sum() / (2 * judged.steps.sum()))
    assert 0 < stats.coverage <= 1 and stats.goal_distance > 0
    assert stats == record_behaviour(run, None, episodes=6, stream=3)
    assert stats != record_behaviour(run, None, episodes=6, stream=4)


def test_a_given_policy_is_the_one_that_acts() -> None:
    """Tensors of another seed act differently, and greedily differently again."""
    run = config(WORLDS["warehouse"])
    worlds = build_worlds(run, num_envs=4, seed=0, training=True)
    policy = build_algorithm(dataclasses.replace(run, seed=5), worlds).state_dict()
    worlds.close()
    own, other, greedy = (
        record_behaviour(run, tensors, episodes=4, stream=1, greedy=still)
        for tensors, still in ((None, False), (policy, False), (policy, True))
    )
    assert own != other != greedy


def test_shaping_is_not_in_it() -> None:
    """Only the task's own reward counts, however training shapes it."""
    run = config(WORLDS["search"])
    shaped = dataclasses.replace(run, shaping=ShapingSettings(mode="exploration_push"))
    assert record_behaviour(shaped, None, episodes=4, stream=1) == record_behaviour(run, None, episodes=4, stream=1)
