"""QMIX and VDN: a team's value is mixed from its agents' values, learnt from a replay memory.

Rashid et al. 2018, "QMIX: Monotonic Value Function Factorisation"; Sunehag et al. 2018, "Value-Decomposition Networks".
Parameters are shared, agents are told apart by the id bits in their observation. As in later practice (EPyMARL,
pymarl2): double Q-learning (van Hasselt et al. 2016), TD(λ) targets, slowly following target networks, Adam. A time
limit bootstraps from the true last observation.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echelon.advantages import td_lambda
from echelon.algorithms.base import AlgorithmConfig
from echelon.buffers import Replayed, ReplayMemory, RolloutBuffer
from echelon.errors import EchelonError
from echelon.mixing import MonotonicMixer, SumMixer
from echelon.networks import MLP, Lanes, Precision, RecurrentMLP, epsilon_greedy, resolve_precision
from echelon.rng import spawn_keys

__all__ = ["QMIX", "QMIXConfig", "VDNConfig"]


@dataclass(frozen=True)
class QMIXConfig(AlgorithmConfig):
    """Hyper-parameters of QMIX (our choice, tuned on the flat team as `docs/results/tuning.md` tells)."""

    rollout: int = 16
    """Steps of each world between updates; also the length of what is replayed in one piece."""
    precision: Precision = "float32"
    """What networks compute in; bfloat16 is too coarse for the small differences between actions' values."""
    mixer: Literal["qmix", "vdn"] = "qmix"
    """How agents' values become the team's: by a monotonic network that sees the state, or as their sum."""
    embed: int = 32
    """Units of the mixing network's hidden layer."""
    lr: float = 1e-3
    """Adam's step size."""
    lam: float = 0.9
    """Decay of the TD(λ) trace; 0: one-step targets."""
    epsilon_start: float = 1.0
    """Share of random actions at first."""
    epsilon_end: float = 0.05
    """Share of random actions at last."""
    epsilon_steps: int = 100_000
    """Environment steps in which that share falls, evenly."""
    epsilon_eval: float = 0.05
    """Share of random actions of a trained policy."""
    memory: int = 200_000
    """Environment steps that are remembered."""
    warmup: int = 10_000
    """Environment steps before anything is learnt."""
    batch: int = 512
    """Environment steps a gradient step learns from, in whole rollouts of a world (at least one)."""
    replay: float = 2.0
    """How often each step is learnt from, on average: it decides how many gradient steps follow a rollout."""
    tau: float = 0.02
    """How far the target networks move to the learnt ones at a time; 1: they are copied."""
    target_every: int = 1
    """Gradient steps between two such moves."""
    max_grad_norm: float = 10.0
    """Gradients are scaled down to this norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(
            ("embed", self.embed >= 1, "at least 1"),
            ("lr", self.lr > 0, "above 0"),
            ("lam", 0 <= self.lam <= 1, "0 to 1"),
            ("epsilon_start", 0 <= self.epsilon_start <= 1, "0 to 1"),
            ("epsilon_end", 0 <= self.epsilon_end <= 1, "0 to 1"),
            ("epsilon_steps", self.epsilon_steps >= 1, "at least 1"),
            ("epsilon_eval", 0 <= self.epsilon_eval <= 1, "0 to 1"),
            ("memory", self.memory >= 1, "at least 1"),
            ("warmup", self.warmup >= 0, "at least 0"),
            ("batch", self.batch >= 1, "at least 1"),
            ("replay", self.replay > 0, "above 0"),
            ("tau", 0 < self.tau <= 1, "above 0, up to 1"),
            ("target_every", self.target_every >= 1, "at least 1"),
            ("max_grad_norm", self.max_grad_norm > 0, "above 0"),
        )


@dataclass(frozen=True)
class VDNConfig(QMIXConfig):
    """Hyper-parameters of VDN: QMIX's, with a sum for the mixing network."""

    mixer: Literal["qmix", "vdn"] = "vdn"
    """How agents' values become the team's: by a monotonic network that sees the state, or as their sum."""


class QMIX:
    """A team's shared value network and its mixer, and how they learn from what is remembered.

    Attributes:
        seconds: what the last `update` took: "memory" (keeping the rollout), "learn" (drawing, forward and backward)
            and "optimise" (clipping, Adam and the target networks).
    """

    def __init__(
        self,
        config: QMIXConfig,
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
        """Fresh networks and an empty memory; the arguments are those of `algorithms.create`.

        `team_reward` changes nothing: a team learns from the mean of its agents' rewards.
        """
        self.config = c = config
        self.shape = (num_envs, num_agents)
        dtype = resolve_precision(c.precision)
        generator = torch.Generator().manual_seed(int(spawn_keys(seed, (2,), 1)[0] >> np.uint64(1)))
        make = RecurrentMLP if c.recurrent else MLP
        sizes = (len(obs_scale), c.hidden, c.hidden, num_actions)
        # Of each two networks the first learns, the second is its target.
        self.agents: list[MLP | RecurrentMLP] = [
            make(sizes, obs_scale, last_gain=0.01, dtype=dtype, generator=generator) for _ in range(2)
        ]
        self.mixers: list[torch.nn.Module] = [
            SumMixer() if c.mixer == "vdn"
            else MonotonicMixer(num_agents, state_scale, embed=c.embed, generator=generator)
            for _ in range(2)
        ]  # fmt: skip
        # The mixer's come first: what autograd gives ends with the agents' part.
        self.params, self.targets = (
            [*mixer.parameters(), *agent.parameters()] for mixer, agent in zip(self.mixers, self.agents, strict=True)
        )
        for target, p in zip(self.targets, self.params, strict=True):
            target.data.copy_(p.data)
            p.grad = torch.zeros_like(p)
        self.optimizer = torch.optim.Adam(self.params, lr=c.lr, eps=1e-5, fused=True)
        self.lanes = Lanes(threads)
        self.seconds: dict[str, float] = {}
        self.keys, self.counters = spawn_keys(seed, (3,), num_envs), np.zeros(num_envs, np.uint64)
        self._replay_key = int(spawn_keys(seed, (4,), 1)[0])
        self.exploring = True
        self.steps = self.updates = self.gradient_steps = 0
        self.memory = ReplayMemory(
            max(1, c.memory // (c.rollout * num_envs)), c.rollout, num_envs, num_agents, len(obs_scale),
            len(state_scale), num_actions, c.hidden if c.recurrent else 0,
        )  # fmt: skip
        self.hidden = torch.zeros(num_envs * num_agents, c.hidden if c.recurrent else 0)
        self._hidden_start = self.hidden

    # -- acting --------------------------------------------------------------------------------

    @property
    def epsilon(self) -> float:
        """The present share of random actions."""
        c = self.config
        if not self.exploring:
            return c.epsilon_eval
        return c.epsilon_start + (c.epsilon_end - c.epsilon_start) * min(1.0, self.steps / c.epsilon_steps)

    def act(
        self, obs: NDArray[np.int8], mask: NDArray[np.uint8], begins: NDArray[np.bool_], *, greedy: bool = False
    ) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Actions int8 `(W, A)`, each the best or with probability `epsilon` any legal one; zeros float32 `(W, A)`.

        Args:
            obs: int8 `(W, A, D)`; mask: uint8 `(W, A, actions)`.
            begins: bool `(W,)`, worlds whose episode begins now (memory is cleared).
            greedy: never a random action.
        """
        W, A = self.shape
        agent = self.agents[0]
        x = torch.from_numpy(obs).view(W * A, -1)
        if isinstance(agent, RecurrentMLP):
            with torch.no_grad():
                out, self.hidden = agent.forward(x[None], self.hidden, torch.from_numpy(np.repeat(begins, A))[None])
            values = out[0]
        else:
            run = self.lanes.run(lambda lane, piece: agent.forward(x[piece], lane)[0], self.lanes.cut(len(x)))
            values = torch.cat(run)
        actions = np.empty((W, A), np.int8)
        epsilon = 0.0 if greedy else self.epsilon
        epsilon_greedy(values.view(W, A, -1).numpy(), mask, self.keys, self.counters, epsilon, actions)
        self.steps += W
        return actions, np.zeros((W, A), np.float32)

    def begin_rollout(self) -> None:
        """Remember the memory with which a rollout begins."""
        self._hidden_start = self.hidden.clone()

    # -- learning ------------------------------------------------------------------------------

    def update(self, buffer: RolloutBuffer) -> dict[str, float]:
        """Keep one rollout, then learn from what is remembered; what to log of it."""
        c = self.config
        start = time.perf_counter()
        self.memory.add(buffer, self._hidden_start.view(*self.shape, self.hidden.shape[1]).numpy())
        draw = np.random.Generator(np.random.Philox(key=self._replay_key, counter=[0, self.updates, 0, 0]))
        self.updates += 1
        stored = time.perf_counter()
        self.seconds = {"memory": stored - start, "learn": 0.0, "optimise": 0.0}
        size = max(1, c.batch // c.rollout)
        due = max(0, int((self.steps - c.warmup) * c.replay / (size * c.rollout)) - self.gradient_steps)
        stats = np.zeros(4)
        for _ in range(due):
            began = time.perf_counter()
            which = draw.integers(self.memory.segments, size=size)
            stats[:3] += self._gradient(which)
            learnt = time.perf_counter()
            stats[3] += float(torch.nn.utils.clip_grad_norm_(self.params, c.max_grad_norm))
            self.optimizer.step()
            self.gradient_steps += 1
            if self.gradient_steps % c.target_every == 0:
                for target, p in zip(self.targets, self.params, strict=True):
                    target.data.lerp_(p.data, c.tau)
            self.seconds["learn"] += learnt - began
            self.seconds["optimise"] += time.perf_counter() - learnt
        if not due:
            return {"epsilon": self.epsilon}
        log = dict(zip(("td_loss", "value", "target", "grad_norm"), (stats / due).tolist(), strict=True))
        return {**log, "epsilon": self.epsilon}

    def _gradient(self, which: NDArray[np.int64]) -> NDArray[np.float64]:
        """Set the gradient of the loss over the segments `which`; loss, mean team value and mean target."""
        T, A = self.config.rollout, self.shape[1]
        rows = T * A
        cut = (slice(p.start // rows, p.stop // rows) for p in self.lanes.cut(len(which) * rows))
        pieces = [p for p in cut if p.start < p.stop]
        share = 1 / (len(which) * T)
        done = self.lanes.run(lambda lane, p: self._lane(lane, self.memory.take(which[p]), share), pieces)
        for p, *grads in zip(self.params, *(grads for _, grads in done), strict=False):
            assert p.grad is not None
            torch.sum(torch.stack(grads), 0, out=p.grad)
        if isinstance(self.agents[0], MLP):
            self.agents[0].collect()
        return np.array(sum(stats for stats, _ in done))

    def _lane(self, lane: int, s: Replayed, share: float) -> tuple[NDArray[np.float64], list[Tensor]]:
        """The share of a gradient that comes from `s`: statistics, and gradients of the first of `params`.

        Of all of them, or, where the agents' network is an `MLP`, which keeps its own, of the mixer's.
        """
        c, agent = self.config, self.agents[0]
        b, f = torch.from_numpy(s.final_at)
        values, next_values, kept = self._values(0, s, lane)
        _, target_values, _ = self._values(1, s, lane)
        next_mask, next_state = torch.from_numpy(s.mask[:, 1:].copy()), torch.from_numpy(s.state[:, 1:].copy())
        next_mask[b, f], next_state[b, f] = torch.from_numpy(s.final_mask), torch.from_numpy(s.final_state)
        with torch.no_grad():
            # Double Q: the learnt network chooses among the legal actions, its target says what that is worth.
            best = next_values.masked_fill_(next_mask == 0, -torch.inf).argmax(-1, keepdim=True)
            chosen = target_values.gather(-1, best).squeeze(-1)
            ahead = self.mixers[1](chosen.flatten(0, 1), next_state.flatten(0, 1)).view(s.reward.shape)
        targets = td_lambda(s.reward.T, ahead.numpy().T, s.terminated.T, s.ended.T, gamma=c.gamma, lam=c.lam).T
        actions = torch.from_numpy(s.actions).long()[..., None]
        taken = values[:, :-1].gather(-1, actions).squeeze(-1)
        if isinstance(agent, MLP):
            taken.requires_grad_()
        state = torch.from_numpy(s.state[:, :-1]).flatten(0, 1)
        team = self.mixers[0](taken.flatten(0, 1), state)
        error = team - torch.from_numpy(targets.copy()).view(-1)
        loss = torch.nn.functional.huber_loss(error, torch.zeros_like(error), reduction="sum", delta=10.0) * share
        mixer = list(self.mixers[0].parameters())
        inputs = [*mixer, taken] if isinstance(agent, MLP) else self.params
        grads = list(torch.autograd.grad(loss, inputs))
        if isinstance(agent, MLP):
            back = torch.zeros_like(values)
            back[:, :-1].scatter_(-1, actions, grads.pop()[..., None])
            rows = back.flatten(0, 2)
            agent.backward([k[: len(rows)] for k in kept], rows, lane)
        stats = np.array([loss.item(), team.sum().item() * share, float(targets.sum()) * share])
        return stats, grads

    def _values(self, which: int, s: Replayed, lane: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """What the learnt network (`which` 0) or its target (1) thinks of all actions.

        Returns:
            float32 `(B, T + 1, A, actions)`, of the states in the rows of `s`; float32 `(B, T, A, actions)`, a copy,
            of the true next states; and what `MLP.backward` needs.
        """
        B, rows, A, D = s.obs.shape
        b, f = torch.from_numpy(s.final_at)
        n = len(b)
        obs, last = torch.from_numpy(s.obs), torch.from_numpy(s.final_obs)
        agent = self.agents[which]
        if isinstance(agent, MLP):
            out, kept = agent.forward(torch.cat([obs.view(-1, D), last.view(-1, D)]), lane)
            values = out[: B * rows * A].view(B, rows, A, -1)
            final = out[B * rows * A :]
        else:
            kept = []
            with torch.set_grad_enabled(which == 0):
                x = obs.transpose(0, 1).reshape(rows, B * A, D)
                begins = torch.from_numpy(s.begins).T.repeat_interleave(A, 1)
                out, states = agent.unroll(x, torch.from_numpy(s.memory).view(B * A, -1), begins)
                values = out.view(rows, B, A, -1).transpose(0, 1)
            with torch.no_grad():
                before = states.view(rows, B, A, -1)[f, b].flatten(0, 1)
                final, _ = agent.forward(last.view(1, n * A, D), before, torch.zeros(1, n * A, dtype=torch.bool))
        next_values = values[:, 1:].detach().clone()
        next_values[b, f] = final.view(n, A, values.shape[-1])
        return values, next_values, kept

    # -- the whole state, for checkpoints --------------------------------------------------------

    def state_dict(self, *, policy_only: bool = False) -> dict[str, Tensor]:
        """Everything that decides what is learnt and drawn next, the whole memory too; or only what acting needs."""
        if policy_only:
            return {name: p.data.clone() for name, p, _ in self._named() if name.startswith("agent.")}
        state = {f"memory.{name}": torch.from_numpy(array) for name, array in self.memory.state_dict().items()}
        more = {
            "hidden": self.hidden,
            "keys": torch.from_numpy(self.keys.view(np.int64)),
            "counters": torch.from_numpy(self.counters.view(np.int64)),
            "draw_key": torch.from_numpy(np.array([self._replay_key], np.uint64).view(np.int64)),
            "counts": torch.tensor([self.steps, self.updates, self.gradient_steps]),
        }
        for name, p, target in self._named():
            more |= {name: p.data, f"{name}.target": target.data}
            more |= {f"{name}.{key}": value for key, value in self.optimizer.state.get(p, {}).items()}
        return state | {name: value.detach().clone() for name, value in more.items()}

    def load_state_dict(self, state: dict[str, Tensor], *, policy_only: bool = False) -> None:
        """Put back what `state_dict` gave.

        Args:
            state: the tensors.
            policy_only: only the agents' network, for a team elsewhere, which acts with `epsilon_eval` from now on.

        Raises:
            EchelonError: the networks have other shapes.
        """
        for name, p, target in self._named():
            if policy_only and not name.startswith("agent."):
                continue
            if name not in state or state[name].shape != p.shape:
                raise EchelonError(
                    f"the saved {name.split('.')[0]} doesn't fit: it was trained on other observations (env.view) or "
                    f"with other algorithm.hidden, algorithm.recurrent or algorithm.mixer"
                )
            p.data.copy_(state[name])
            if not policy_only:
                target.data.copy_(state[f"{name}.target"])
                self.optimizer.state.pop(p, None)
                if f"{name}.step" in state:
                    kept = {k: state[f"{name}.{k}"].clone() for k in ("step", "exp_avg", "exp_avg_sq")}
                    self.optimizer.state[p] = kept
        if policy_only:
            self.exploring = False
            return
        self.hidden = state["hidden"].clone()
        self.keys[:] = state["keys"].numpy().view(np.uint64)
        self.counters[:] = state["counters"].numpy().view(np.uint64)
        self.steps, self.updates, self.gradient_steps = state["counts"].tolist()
        if "draw_key" in state:  # else of a checkpoint from before, whose key is its seed's
            self._replay_key = int(state["draw_key"].numpy().view(np.uint64)[0])
        self.memory.load_state_dict({k[7:]: v.numpy() for k, v in state.items() if k.startswith("memory.")})

    def _named(self) -> list[tuple[str, torch.nn.Parameter, torch.nn.Parameter]]:
        """The parameters by name, and their targets."""
        first = len(list(self.mixers[0].parameters()))
        names = itertools.chain(
            (f"mixer.{i}" for i in range(first)), (f"agent.{i}" for i in range(len(self.params) - first))
        )
        return list(zip(names, self.params, self.targets, strict=True))
