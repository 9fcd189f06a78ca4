"""How fast this machine steps worlds and trains: what `echelon bench` and `benchmarks/` measure."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from echelon.configs import RunConfig
from echelon.envs import make
from echelon.training import Rollouts

__all__ = ["env_speed", "training_speed"]


def env_speed(name: str, *, num_envs: int = 256, seconds: float = 1.0, rounds: int = 5, **settings: Any) -> float:
    """Environment steps a second on one core, observations and resets included; the median of `rounds`.

    Args:
        name: the environment; `settings` are its config.
        num_envs: worlds side by side.
        seconds: how long a round lasts.
        rounds: how many rounds.
    """
    env = make(name, num_envs=num_envs, **settings)
    rng = np.random.default_rng(0)
    actions = rng.integers(0, env.num_actions, (64, num_envs, env.num_agents)).astype(np.int8)
    for a in actions:
        env.step(a)
    rates = []
    for _ in range(rounds):
        steps, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            for a in actions:
                env.advance(a)
                env.autoreset()
            steps += len(actions) * num_envs
        rates.append(steps / (time.perf_counter() - start))
    return statistics.median(rates)


def training_speed(
    config: RunConfig, *, updates: int = 8, warm_up: int = 2, report: Callable[[int], None] = lambda update: None
) -> tuple[float, dict[str, float]]:
    """Environment steps a second while training, and the share of the time by stage; the median update.

    Args:
        config: the run that would be trained (nothing is written).
        updates: updates that count, after `warm_up` that don't.
        report: called with the number of each update.
    """
    rollouts = Rollouts(config)
    rollouts.worlds.start()
    rates: list[float] = []
    stages: dict[str, list[float]] = {}
    for update in range(warm_up + updates):
        clock = rollouts.collect()
        rollouts.learn(clock)
        report(update)
        if update >= warm_up:
            rates.append(rollouts.steps_per_update / clock.total())
            for stage, share in clock.shares().items():
                stages.setdefault(stage, []).append(share)
    return statistics.median(rates), {stage: statistics.median(s) for stage, s in stages.items()}
