"""What every algorithm is told, what the training loop wants of one, and the register of those that ship."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from echelon.buffers import RolloutBuffer
from echelon.errors import EchelonError, unknown_name
from echelon.networks import Precision

__all__ = ["Algorithm", "AlgorithmConfig", "algorithms", "config_of", "create", "register"]


@dataclass(frozen=True)
class AlgorithmConfig:
    """Hyper-parameters that every algorithm has."""

    gamma: float = 0.99
    """Discount a step."""
    rollout: int = 32
    """Steps of each world between updates."""
    hidden: int = 128
    """Units of each hidden layer."""
    recurrent: bool = False
    """Give agents a memory (GRU)."""
    precision: Precision = "auto"
    """What networks compute in; auto: bfloat16 where the processor multiplies it fast."""

    def __post_init__(self) -> None:
        self._check(
            ("gamma", 0 <= self.gamma <= 1, "0 to 1"),
            ("rollout", self.rollout >= 1, "at least 1"),
            ("hidden", self.hidden >= 1, "at least 1"),
        )

    def _check(self, *rules: tuple[str, bool, str]) -> None:
        for name, good, need in rules:
            if not good:
                raise EchelonError(f"algorithm.{name} is {getattr(self, name)}: it must be {need}")


class Algorithm(Protocol):
    """How a team acts, and learns from rollouts; built as `create` says.

    Attributes:
        seconds: what the last `update` took, by stage.

    One that compares worlds has an attribute `group` too: each rollout then begins with an episode in every world, the
    same in each group of so many neighbours (`num_envs` is a multiple of it), and isn't longer than the time limit.
    """

    seconds: dict[str, float]

    def act(
        self, obs: NDArray[np.int8], mask: NDArray[np.uint8], begins: NDArray[np.bool_], *, greedy: bool = False
    ) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Actions int8 `(W, A)` and their log-probabilities float32 `(W, A)` (0 where it has none).

        Args:
            obs: int8 `(W, A, D)`; mask: uint8 `(W, A, actions)`, 1 where legal.
            begins: bool `(W,)`, worlds whose episode begins now.
            greedy: the best action instead of drawing one.
        """
        ...

    def begin_rollout(self) -> None:
        """Called before the first step of a rollout."""
        ...

    def update(self, buffer: RolloutBuffer) -> dict[str, float]:
        """Learn from one rollout; what to log of it."""
        ...

    def state_dict(self, *, policy_only: bool = False) -> dict[str, Tensor]:
        """Everything that decides what is learnt and drawn next, as tensors by name; or only what acting needs."""
        ...

    def load_state_dict(self, state: dict[str, Tensor], *, policy_only: bool = False) -> None:
        """Put back what `state_dict` gave; `policy_only`: only what acting needs, to act without exploring."""
        ...


_REGISTRY: dict[str, tuple[type[AlgorithmConfig], Any]] = {}


def register(name: str, config: type[AlgorithmConfig], build: Any) -> None:
    """Make an algorithm known by its name: the class of its settings, and what builds it (see `create`)."""
    _REGISTRY[name] = (config, build)


def algorithms() -> tuple[str, ...]:
    """The names of all known algorithms."""
    return tuple(_REGISTRY)


def config_of(name: str) -> type[AlgorithmConfig]:
    """The class of an algorithm's settings.

    Raises:
        EchelonError: there is no such algorithm.
    """
    if name not in _REGISTRY:
        raise unknown_name("algorithm", name, _REGISTRY)
    return _REGISTRY[name][0]


def create(
    name: str,
    config: AlgorithmConfig,
    *,
    num_envs: int,
    num_agents: int,
    obs_scale: NDArray[np.float32],
    state_scale: NDArray[np.float32],
    num_actions: int,
    team_reward: bool,
    seed: int,
    threads: int = 1,
) -> Algorithm:
    """Fresh networks of the algorithm `name`.

    Args:
        name: as it was registered.
        config: its settings.
        num_envs, num_agents: W and A of the arrays.
        obs_scale: float32 `(D,)`, brings int8 observations to about ±1.
        state_scale: float32 `(S,)`, brings the int8 centralised state to about ±1.
        num_actions: primitive moves.
        team_reward: whether all agents of a team get the same reward.
        seed: root seed of initial weights, actions and minibatches.
        threads: how many threads to compute with; they don't change the result.
    """
    config_of(name)
    build: Algorithm = _REGISTRY[name][1](
        config, num_envs=num_envs, num_agents=num_agents, obs_scale=obs_scale, state_scale=state_scale,
        num_actions=num_actions, team_reward=team_reward, seed=seed, threads=threads,
    )  # fmt: skip
    return build
