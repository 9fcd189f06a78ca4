"""Preallocated storage between worlds and learners."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["RolloutBuffer"]


class RolloutBuffer:
    """One rollout of T steps of W worlds with A agents, written in place.

    Row t holds what was seen before step t and what the step brought; row T of `obs` and `state` is where the
    rollout stopped. `terminated` and `ended` are as `advantages.gae` wants them, one an agent, since an agent's
    subgoal may end before its world's episode does. The true last observations of episodes that ended inside
    the rollout are kept in `finals`, so that a time limit can bootstrap from them.

    Attributes:
        obs: int8 `(T + 1, W, A, D)`; state: int8 `(T + 1, W, S)`; mask: uint8 `(T, W, A, actions)`.
        actions: int8, logp, reward: float32, terminated, ended: bool, all `(T, W, A)`.
        begins: bool `(T + 1, W)`, where an episode begins at that row.
        finals: a list of (t, worlds int64 `(n,)`, obs int8 `(n, A, D)`, state int8 `(n, S)`).
    """

    def __init__(self, steps: int, num_envs: int, num_agents: int, obs_size: int, state_size: int, actions: int):
        """All sizes at least 1."""
        T, W, A = steps, num_envs, num_agents
        self.steps = steps
        self.obs = np.zeros((T + 1, W, A, obs_size), np.int8)
        self.state = np.zeros((T + 1, W, state_size), np.int8)
        self.mask = np.zeros((T, W, A, actions), np.uint8)
        self.actions = np.zeros((T, W, A), np.int8)
        self.logp = np.zeros((T, W, A), np.float32)
        self.reward = np.zeros((T, W, A), np.float32)
        self.terminated = np.zeros((T, W, A), bool)
        self.ended = np.zeros((T, W, A), bool)
        self.begins = np.zeros((T + 1, W), bool)
        self.finals: list[tuple[int, NDArray[np.int64], NDArray[np.int8], NDArray[np.int8]]] = []
