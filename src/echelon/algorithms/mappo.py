"""MAPPO: PPO for teams with shared decentralised actors and a centralised critic; IPPO, with a local one.

Yu et al. 2022, "The Surprising Effectiveness of PPO in Cooperative Multi-Agent Games"; the clipped objective is
L2M2's Eq. 2. Parameters are shared, agents are told apart by the id bits in their observation, values are
normalised, and a time limit bootstraps from the true last observation. IPPO (de Witt et al. 2020, "Is Independent
Learning All You Need in the StarCraft Multi-Agent Challenge?") differs in one thing: an agent's value comes from its
own observation alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echelon.advantages import gae
from echelon.algorithms.actor import SharedActor, take
from echelon.algorithms.base import AlgorithmConfig
from echelon.buffers import RolloutBuffer
from echelon.networks import MLP, ValueNorm

__all__ = ["MAPPO", "IPPOConfig", "MAPPOConfig"]


@dataclass(frozen=True)
class MAPPOConfig(AlgorithmConfig):
    """Hyper-parameters of MAPPO (learning rate and clip: L2M2; the rest: our choice near MAPPO's defaults)."""

    lr: float = 3e-4
    """Adam's step size, for actor and critic."""
    lam: float = 0.95
    """Decay of the GAE trace."""
    clip: float = 0.2
    """PPO's clip range ε."""
    entropy: float = 0.01
    """Weight of the entropy bonus."""
    epochs: int = 4
    """Passes over each rollout."""
    minibatches: int = 4
    """Minibatches a pass."""
    max_grad_norm: float = 0.5
    """Gradients are scaled down to this norm."""
    critic: Literal["auto", "team", "agent", "local"] = "auto"
    """One value a team from the state alone, one an agent from its observation and the state, or one an agent from
    its observation alone (local); auto: a team's where the reward is the team's, else an agent's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(
            ("lr", self.lr > 0, "above 0"),
            ("lam", 0 <= self.lam <= 1, "0 to 1"),
            ("clip", self.clip > 0, "above 0"),
            ("entropy", self.entropy >= 0, "at least 0"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("minibatches", self.minibatches >= 1, "at least 1"),
            ("max_grad_norm", self.max_grad_norm > 0, "above 0"),
        )


@dataclass(frozen=True)
class IPPOConfig(MAPPOConfig):
    """Hyper-parameters of IPPO: MAPPO's, with a critic that sees what its agent sees."""

    critic: Literal["auto", "team", "agent", "local"] = "local"
    """What the critic sees: local, an agent's own observation alone; the others as MAPPO's."""


class MAPPO(SharedActor):
    """A team's shared policy and its critic, and how they learn from rollouts.

    Attributes:
        seconds: what the last `update` took: "advantages" (values and GAE), "learn" (forward and backward) and
            "optimise" (clipping and Adam).
    """

    def __init__(
        self,
        config: MAPPOConfig,
        *,
        num_envs: int,
        num_agents: int,
        obs_scale: NDArray[np.float32],
        state_scale: NDArray[np.float32],
        num_actions: int,
        team_reward: bool,
        seed: int,
        threads: int = 1,
    ) -> None:
        """Fresh networks.

        Args:
            config: hyper-parameters.
            num_envs, num_agents: W and A of the arrays.
            obs_scale: float32 `(D,)`, brings int8 observations to about ±1.
            state_scale: float32 `(S,)`, brings the int8 centralised state to about ±1.
            num_actions: primitive moves.
            team_reward: whether all agents of a team get the same reward.
            seed: root seed of initial weights, actions and minibatches.
            threads: how many threads to compute with; they don't change the result.
        """
        super().__init__(
            num_envs=num_envs, num_agents=num_agents, obs_scale=obs_scale, num_actions=num_actions,
            hidden=config.hidden, recurrent=config.recurrent, precision=config.precision, lr=config.lr, seed=seed,
            threads=threads,
        )  # fmt: skip
        self.config = config
        auto = "team" if team_reward else "agent"
        self.critic_kind = auto if config.critic == "auto" else config.critic
        critic_scale = {
            "team": state_scale, "agent": np.concatenate([obs_scale, state_scale]), "local": obs_scale
        }[self.critic_kind]  # fmt: skip
        self.critic = MLP(
            (len(critic_scale), config.hidden, config.hidden, 1), critic_scale, last_gain=1.0, dtype=self.dtype,
            generator=self._generator,
        )  # fmt: skip
        self._learns("critic", self.critic.parameters(), config.lr)
        self.seconds: dict[str, float] = {}
        self.value_norm = ValueNorm()

    def update(self, buffer: RolloutBuffer) -> dict[str, float]:
        """Learn from one rollout; what to log of it."""
        c = self.config
        start = time.perf_counter()
        values, next_values = self._values(buffer)
        advantages, returns = gae(
            buffer.reward, values, next_values, buffer.terminated, buffer.ended, gamma=c.gamma, lam=c.lam
        )
        self.value_norm.update(returns)
        mean, std = self.value_norm.moments()
        targets = torch.from_numpy((returns - mean) / std)
        advantages = (advantages - advantages.mean()) / (advantages.std() + np.float32(1e-8))
        began = time.perf_counter()
        self._optimise = 0.0
        policy, value_loss, steps = np.zeros(4), 0.0, 0
        for rows, worlds in self._minibatches(buffer.steps, c.epochs, c.minibatches):
            policy += self._actor_step(buffer, rows, worlds, advantages, clip=c.clip, entropy=c.entropy,
                                       max_grad_norm=c.max_grad_norm)  # fmt: skip
            value_loss += self._critic_step(buffer, rows, targets)
            steps += 1
        learnt = time.perf_counter() - began - self._optimise
        self.seconds = {"advantages": began - start, "learn": learnt, "optimise": self._optimise}
        spread = float(np.var(returns))
        return {
            "policy_loss": policy[0] / steps,
            "entropy": policy[1] / steps,
            "approx_kl": policy[2] / steps,
            "clipped": policy[3] / steps,
            "value_loss": value_loss / steps,
            "explained_variance": 1 - float(np.var(returns - values)) / spread if spread > 0 else 0.0,
        }

    def _critic_step(self, buffer: RolloutBuffer, rows: Tensor, targets: Tensor) -> float:
        """One step of the critic on the (step, world) pairs `rows`: Huber loss (delta 10) on normalised returns."""
        T = buffer.steps

        def work(lane: int, piece: slice) -> float:
            part = rows[piece]
            inputs = self._critic_input(take(buffer.obs[:T], part), take(buffer.state[:T], part))
            out, kept = self.critic.forward(inputs, lane)
            target = targets.flatten(0, 1)[part]
            target = target.mean(1) if self.critic_kind == "team" else target.view(-1)
            error = out.view(-1) - target
            share = len(part) / len(rows)
            self.critic.backward(kept, (error.clamp(-10, 10) * (share / len(error)))[:, None], lane)
            return share * float(torch.nn.functional.huber_loss(error, torch.zeros_like(error), delta=10.0))

        loss = sum(self.lanes.run(work, self.lanes.cut(len(rows))))
        self.critic.collect()
        self._step("critic", self.config.max_grad_norm)
        return loss

    def _critic_input(self, obs: Tensor, state: Tensor) -> Tensor:
        """The critic's rows: one a team, `(n, S)`, or one an agent, `(n * A, D + S)` or (local) `(n * A, D)`."""
        if self.critic_kind == "team":
            return state
        n, A, _ = obs.shape
        if self.critic_kind == "local":
            return obs.reshape(n * A, -1)
        return torch.cat([obs, state[:, None].expand(n, A, -1)], -1).view(n * A, -1)

    def _value(self, obs: NDArray[np.int8], state: NDArray[np.int8]) -> NDArray[np.float32]:
        """Unnormalised values, float32 `(n, A)`, of obs `(n, A, D)` and state `(n, S)`."""
        mean, std = self.value_norm.moments()

        def work(lane: int, piece: slice) -> Tensor:
            out = []
            # In pieces that stay in the cache.
            for at in range(piece.start, piece.stop, 2048):
                some = slice(at, min(at + 2048, piece.stop))
                inputs = self._critic_input(torch.from_numpy(obs[some]), torch.from_numpy(state[some]))
                value, _ = self.critic.forward(inputs, lane)
                out.append(value.view(some.stop - at, -1).expand(-1, self.shape[1]))
            return torch.cat(out)

        values = torch.cat(self.lanes.run(work, self.lanes.cut(len(obs))))
        return (values * std + mean).numpy()

    def _values(self, buffer: RolloutBuffer) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Values of each state and of each true next state, float32 `(T, W, A)`."""
        T, (W, A) = buffer.steps, self.shape
        flat = self._value(buffer.obs.reshape((T + 1) * W, A, -1), buffer.state.reshape((T + 1) * W, -1))
        values = flat.reshape(T + 1, W, A)
        next_values = values[1:].copy()
        for t, worlds, obs, state, _ in buffer.finals:
            next_values[t, worlds] = self._value(obs, state)
        return values[:-1], next_values

    def state_dict(self, *, policy_only: bool = False) -> dict[str, Tensor]:
        """Everything that decides what is learnt and drawn next, as tensors by name; or only what acting needs."""
        value_norm = {} if policy_only else {"value_norm": self.value_norm.stats.clone()}
        return super().state_dict(policy_only=policy_only) | value_norm

    def load_state_dict(self, state: dict[str, Tensor], *, policy_only: bool = False) -> None:
        """Put back what `state_dict` gave; see `SharedActor.load_state_dict`."""
        super().load_state_dict(state, policy_only=policy_only)
        if not policy_only:
            self.value_norm.stats.copy_(state["value_norm"])
