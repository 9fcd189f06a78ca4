"""How a team behaves: recorded episodes on worlds of their own, and the statistics that a Critic is told."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from echelon.building import build_executor, build_worlds, use_threads
from echelon.configs import RunConfig
from echelon.envs.kernels import WALL
from echelon.evaluation.episodes import evaluation_seed
from echelon.rollout import TeamWorlds, first_episodes
from echelon.shaping import Behaviour, Recording, behaviour

__all__ = ["record_behaviour"]


def record_behaviour(
    config: RunConfig, policy: dict[str, torch.Tensor] | None, *, episodes: int, stream: int, greedy: bool = False
) -> Behaviour:
    """Statistics of a policy's behaviour; nothing of the episodes themselves is kept.

    Each of `episodes` worlds is played for its first episode, as `evaluate` does it; the reward is the task's own,
    however training shapes it. Made for methods without a planner; others work too.

    Args:
        config: the run whose method and world are looked at.
        policy: the executor's tensors (`training.load_policy`), or None where there are none.
        episodes: how many, at least 1.
        stream: which evaluation worlds of the run's seed; another one than the evaluations' gives others than theirs.
        greedy: executors take their most probable move instead of drawing.
    """
    use_threads(config)
    seed = evaluation_seed(config.seed, stream)
    worlds = build_worlds(config, num_envs=episodes, seed=seed, training=False)
    executor = build_executor(config, worlds, policy)
    try:
        worlds.start()
        return behaviour(_record(worlds, greedy, executor.act))
    finally:
        worlds.close()


def _record(worlds: TeamWorlds, greedy: bool, act: Callable[..., NDArray[np.int8]]) -> Recording:
    """Each world's first episode; rows behind its end don't count."""
    env = worlds.env
    free = ((env.grid & WALL) == 0).sum(1)  # before a world is drawn anew
    before: list[tuple[NDArray[np.int32], NDArray[np.int32]]] = []
    after: list[tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.bool_]]] = []

    def moved(worlds: TeamWorlds) -> NDArray[np.int8]:
        before.append((env.pos.copy(), env.nearest_goal()))
        return act(worlds, greedy=greedy)

    def acted() -> None:
        after.append((env.reward.copy(), env.bumped.copy(), worlds.active.copy()))

    first_episodes(worlds, moved, acted)
    cells, targets = (np.stack(rows) for rows in zip(*before, strict=True))
    reward, bumped, live = (np.stack(rows) for rows in zip(*after, strict=True))
    begins = np.zeros(reward.shape, bool)
    begins[0] = True
    return Recording(cells, targets, reward, begins, env.stride, free, bumped, live)
