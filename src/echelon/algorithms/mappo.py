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
from echelon.algorithms.base import AlgorithmConfig
from echelon.buffers import RolloutBuffer
from echelon.errors import EchelonError
from echelon.networks import (
    MLP,
    Lanes,
    RecurrentMLP,
    ValueNorm,
    ppo_policy_gradient,
    resolve_precision,
    sample_actions,
)
from echelon.rng import spawn_keys

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


class MAPPO:
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
        self.config = config
        self.shape = (num_envs, num_agents)
        self.dtype = resolve_precision(config.precision)
        auto = "team" if team_reward else "agent"
        self.critic_kind = auto if config.critic == "auto" else config.critic
        critic_scale = {
            "team": state_scale, "agent": np.concatenate([obs_scale, state_scale]), "local": obs_scale
        }[self.critic_kind]  # fmt: skip
        h = config.hidden
        generator = torch.Generator().manual_seed(int(spawn_keys(seed, (2,), 1)[0] >> np.uint64(1)))
        actor = RecurrentMLP if config.recurrent else MLP
        sizes = (len(obs_scale), h, h, num_actions)
        self.actor: MLP | RecurrentMLP = actor(sizes, obs_scale, last_gain=0.01, dtype=self.dtype, generator=generator)
        self.critic = MLP(
            (len(critic_scale), h, h, 1), critic_scale, last_gain=1.0, dtype=self.dtype, generator=generator
        )
        self.actor_params = list(self.actor.parameters())
        self.optimizers = [
            torch.optim.Adam(params, lr=config.lr, eps=1e-5, fused=True)
            for params in (self.actor_params, self.critic.parameters())
        ]
        self.lanes = Lanes(threads)
        self.seconds: dict[str, float] = {}
        self._optimise = 0.0
        self.value_norm = ValueNorm()
        self.keys, self.counters = spawn_keys(seed, (3,), num_envs), np.zeros(num_envs, np.uint64)
        self._shuffle_key = int(spawn_keys(seed, (4,), 1)[0])
        self.updates = 0
        self.hidden = torch.zeros(num_envs * num_agents, h)
        self._hidden_start = self.hidden

    # -- acting --------------------------------------------------------------------------------

    def act(
        self, obs: NDArray[np.int8], mask: NDArray[np.uint8], begins: NDArray[np.bool_], *, greedy: bool = False
    ) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Actions for all agents of all worlds.

        Args:
            obs: int8 `(W, A, D)`; mask: uint8 `(W, A, actions)`.
            begins: bool `(W,)`, worlds whose episode begins now (memory is cleared).
            greedy: take the most probable action instead of drawing one.

        Returns:
            actions int8 `(W, A)` and their log-probabilities float32 `(W, A)`.
        """
        W, A = self.shape
        x = torch.from_numpy(obs).view(W * A, -1)
        if isinstance(self.actor, RecurrentMLP):
            with torch.no_grad():
                first = torch.from_numpy(np.repeat(begins, A))
                out, self.hidden = self.actor.forward(x[None], self.hidden, first[None])
            logits = out[0]
        else:
            logits = self._forward(self.actor, x)
        actions, logp = np.empty((W, A), np.int8), np.empty((W, A), np.float32)
        sample_actions(logits.view(W, A, -1).numpy(), mask, self.keys, self.counters, greedy, actions, logp)
        return actions, logp

    def begin_rollout(self) -> None:
        """Remember the memory with which a rollout begins."""
        self._hidden_start = self.hidden.clone()

    # -- learning ------------------------------------------------------------------------------

    def update(self, buffer: RolloutBuffer) -> dict[str, float]:
        """Learn from one rollout; what to log of it."""
        c, T = self.config, buffer.steps
        W, _ = self.shape
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
        shuffle = np.random.Generator(np.random.Philox(key=self._shuffle_key, counter=[0, self.updates, 0, 0]))
        self.updates += 1
        policy, value_loss, steps = np.zeros(4), 0.0, 0
        for _ in range(c.epochs):
            # A recurrent actor learns from whole sequences, so its minibatches are sets of worlds; else of
            # (step, world) pairs. Either way a minibatch holds whole teams.
            order = torch.from_numpy(shuffle.permutation(W if c.recurrent else T * W))
            for part in order.chunk(c.minibatches):
                rows = (torch.arange(T)[:, None] * W + part).view(-1) if c.recurrent else part
                policy += self._actor_step(buffer, rows, part, advantages)
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

    def _actor_step(
        self, buffer: RolloutBuffer, rows: Tensor, worlds: Tensor, advantages: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        """One step of the actor on the (step, world) pairs `rows`; loss, entropy, KL, clipped share."""
        T, A, c = buffer.steps, self.shape[1], self.config
        actor = self.actor

        def push(out: Tensor, part: Tensor) -> tuple[Tensor, NDArray[np.float64]]:
            """The gradient in the logits `out` of the pairs `part`, and the statistics, both as shares of the whole."""
            mask, actions, logp, weights = (
                _take(x, part).flatten(0, 1).numpy() for x in (buffer.mask[:T], buffer.actions, buffer.logp, advantages)
            )
            logits = out.detach().numpy()
            grad = np.empty_like(logits)
            stats = ppo_policy_gradient(logits, mask, actions, logp, weights, c.clip, c.entropy, grad)
            share = len(part) / len(rows)
            return torch.from_numpy(grad).mul_(share), np.array(stats) * share

        if isinstance(actor, RecurrentMLP):
            obs = _take(buffer.obs[:T], rows).view(T, len(worlds) * A, -1)
            start = self._hidden_start.view(*self.shape, -1)[worlds].flatten(0, 1)
            begins = torch.from_numpy(buffer.begins[:T])[:, worlds].repeat_interleave(A, 1)
            out, _ = actor.forward(obs, start, begins)
            out = out.flatten(0, 1)
            grad, total = push(out, rows)
            self.optimizers[0].zero_grad(set_to_none=False)
            out.backward(grad)  # type: ignore[no-untyped-call]
        else:

            def work(lane: int, piece: slice) -> NDArray[np.float64]:
                part = rows[piece]
                out, kept = actor.forward(_take(buffer.obs[:T], part).view(len(part) * A, -1), lane)
                grad, stats = push(out, part)
                actor.backward(kept, grad, lane)
                return stats

            total = sum(self.lanes.run(work, self.lanes.cut(len(rows))), np.zeros(4))
            actor.collect()
        self._step(0, self.actor_params)
        return total

    def _critic_step(self, buffer: RolloutBuffer, rows: Tensor, targets: Tensor) -> float:
        """One step of the critic on the (step, world) pairs `rows`: Huber loss (delta 10) on normalised returns."""
        T = buffer.steps

        def work(lane: int, piece: slice) -> float:
            part = rows[piece]
            inputs = self._critic_input(_take(buffer.obs[:T], part), _take(buffer.state[:T], part))
            out, kept = self.critic.forward(inputs, lane)
            target = targets.flatten(0, 1)[part]
            target = target.mean(1) if self.critic_kind == "team" else target.view(-1)
            error = out.view(-1) - target
            share = len(part) / len(rows)
            self.critic.backward(kept, (error.clamp(-10, 10) * (share / len(error)))[:, None], lane)
            return share * float(torch.nn.functional.huber_loss(error, torch.zeros_like(error), delta=10.0))

        loss = sum(self.lanes.run(work, self.lanes.cut(len(rows))))
        self.critic.collect()
        self._step(1, self.critic.parameters())
        return loss

    def _forward(self, net: MLP, x: Tensor) -> Tensor:
        """The outputs of `net` for the rows of `x`, computed in lanes."""
        return torch.cat(self.lanes.run(lambda lane, piece: net.forward(x[piece], lane)[0], self.lanes.cut(len(x))))

    def _step(self, which: int, params: list[torch.nn.Parameter]) -> None:
        start = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(params, self.config.max_grad_norm)
        self.optimizers[which].step()
        self._optimise += time.perf_counter() - start

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

    # -- the whole state, for checkpoints --------------------------------------------------------

    def state_dict(self, *, policy_only: bool = False) -> dict[str, Tensor]:
        """Everything that decides what is learnt and drawn next, as tensors by name; or only what acting needs."""
        if policy_only:
            return {f"actor.{i}": p.detach().clone() for i, p in enumerate(self.actor_params)}
        state = {
            "value_norm": self.value_norm.stats,
            "hidden": self.hidden,
            "keys": torch.from_numpy(self.keys.view(np.int64)),
            "counters": torch.from_numpy(self.counters.view(np.int64)),
            "updates": torch.tensor(self.updates),
        }
        for net, params, optimizer in zip(("actor", "critic"), self._params(), self.optimizers, strict=True):
            for i, p in enumerate(params):
                state[f"{net}.{i}"] = p.data
                for name, value in optimizer.state.get(p, {}).items():
                    state[f"{net}.{i}.{name}"] = value
        return {name: value.detach().clone() for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor], *, policy_only: bool = False) -> None:
        """Put back what `state_dict` gave.

        Args:
            state: the tensors.
            policy_only: only the actor's weights, for a team elsewhere (another map, another number of worlds).

        Raises:
            EchelonError: the networks have other shapes.
        """
        for net, params, optimizer in zip(("actor", "critic"), self._params(), self.optimizers, strict=True):
            if net == "critic" and policy_only:
                continue
            for i, p in enumerate(params):
                name = f"{net}.{i}"
                if name not in state or state[name].shape != p.shape:
                    raise EchelonError(
                        f"the saved {net} doesn't fit: it was trained on other observations (env.view) or with "
                        f"other algorithm.hidden or algorithm.recurrent"
                    )
                p.data.copy_(state[name])
                if not policy_only and f"{name}.step" in state:
                    optimizer.state[p] = {k: state[f"{name}.{k}"].clone() for k in ("step", "exp_avg", "exp_avg_sq")}
        if policy_only:
            return
        self.value_norm.stats.copy_(state["value_norm"])
        self.hidden = state["hidden"].clone()
        self.keys[:] = state["keys"].numpy().view(np.uint64)
        self.counters[:] = state["counters"].numpy().view(np.uint64)
        self.updates = int(state["updates"])

    def _params(self) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
        return self.actor_params, self.critic.parameters()


def _take(array: NDArray[np.generic], rows: Tensor) -> Tensor:
    """The (step, world) pairs `rows` of an array `(T, W, …)`, as a tensor `(len(rows), …)`."""
    flat = torch.from_numpy(array).flatten(0, 1)
    return flat.index_select(0, rows)
