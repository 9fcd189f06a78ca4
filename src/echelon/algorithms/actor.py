"""The policy that a team shares, and PPO's step on it: what algorithms with a policy gradient have in common."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echelon.buffers import RolloutBuffer
from echelon.errors import EchelonError
from echelon.networks import (
    MLP,
    Lanes,
    Precision,
    RecurrentMLP,
    ppo_policy_gradient,
    resolve_precision,
    sample_actions,
)
from echelon.rng import spawn_keys

__all__ = ["SharedActor", "take"]


class SharedActor:
    """One decentralised policy for all agents of a team, told apart by the id bits in their observation.

    Attributes:
        shape: W and A.
        dtype: what the network computes in.
        actor: the network; actor_params: its parameters.
        hidden: float32 `(W * A, H)`, what a recurrent policy remembers.
        updates: how often it has learnt.
    """

    def __init__(
        self,
        *,
        num_envs: int,
        num_agents: int,
        obs_scale: NDArray[np.float32],
        num_actions: int,
        hidden: int,
        recurrent: bool,
        precision: Precision,
        lr: float,
        seed: int,
        threads: int,
    ) -> None:
        """A fresh network, its optimiser (Adam) and its draws.

        Args:
            num_envs, num_agents: W and A of the arrays.
            obs_scale: float32 `(D,)`, brings int8 observations to about ±1.
            num_actions: primitive moves.
            hidden: units of each hidden layer; recurrent: a memory (GRU); precision: what it computes in.
            lr: Adam's step size.
            seed: root seed of initial weights, actions and minibatches.
            threads: how many threads to compute with; they don't change the result.
        """
        self.shape = (num_envs, num_agents)
        self.dtype = resolve_precision(precision)
        # Also a critic's initial weights come from it, after the actor's.
        self._generator = torch.Generator().manual_seed(int(spawn_keys(seed, (2,), 1)[0] >> np.uint64(1)))
        network = RecurrentMLP if recurrent else MLP
        self.actor: MLP | RecurrentMLP = network(
            (len(obs_scale), hidden, hidden, num_actions), obs_scale, last_gain=0.01, dtype=self.dtype,
            generator=self._generator,
        )  # fmt: skip
        self.actor_params = list(self.actor.parameters())
        self.lanes = Lanes(threads)
        self.keys, self.counters = spawn_keys(seed, (3,), num_envs), np.zeros(num_envs, np.uint64)
        self._shuffle_key = int(spawn_keys(seed, (4,), 1)[0])
        self.updates = 0
        self.hidden = torch.zeros(num_envs * num_agents, hidden)
        self._hidden_start = self.hidden
        self.nets: dict[str, list[torch.nn.Parameter]] = {}
        self.optimizers: dict[str, torch.optim.Adam] = {}
        self._learns("actor", self.actor_params, lr)
        self._optimise = 0.0

    def _learns(self, net: str, params: list[torch.nn.Parameter], lr: float) -> None:
        """Give a network its optimiser, and both their place in checkpoints."""
        self.nets[net] = params
        self.optimizers[net] = torch.optim.Adam(params, lr=lr, eps=1e-5, fused=True)

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
            actor, pieces = self.actor, self.lanes.cut(W * A)
            logits = torch.cat(self.lanes.run(lambda lane, piece: actor.forward(x[piece], lane)[0], pieces))
        actions, logp = np.empty((W, A), np.int8), np.empty((W, A), np.float32)
        sample_actions(logits.view(W, A, -1).numpy(), mask, self.keys, self.counters, greedy, actions, logp)
        return actions, logp

    def begin_rollout(self) -> None:
        """Remember the memory with which a rollout begins."""
        self._hidden_start = self.hidden.clone()

    # -- learning ------------------------------------------------------------------------------

    def _minibatches(
        self, steps: int, epochs: int, count: int, learnt: NDArray[np.bool_] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What each step of one update learns from, in a new order each epoch; a minibatch holds whole teams.

        Args:
            steps: T.
            epochs: passes; count: minibatches a pass.
            learnt: bool `(T, W)`, the (step, world) pairs to learn from; None: all.

        Yields:
            pairs as int64 (t * W + w) and, of a recurrent actor, the worlds that they are from: it learns from whole
            sequences, so its minibatches are sets of worlds (else the pairs once more).
        """
        W = self.shape[0]
        shuffle = np.random.Generator(np.random.Philox(key=self._shuffle_key, counter=[0, self.updates, 0, 0]))
        self.updates += 1
        pairs = torch.arange(steps * W) if learnt is None else torch.from_numpy(np.flatnonzero(learnt))
        for _ in range(epochs):
            if not isinstance(self.actor, RecurrentMLP):
                for part in pairs[torch.from_numpy(shuffle.permutation(len(pairs)))].chunk(count):
                    yield part, part
                continue
            for worlds in torch.from_numpy(shuffle.permutation(W)).chunk(count):
                rows = (torch.arange(steps)[:, None] * W + worlds).view(-1)
                yield rows if learnt is None else rows[torch.from_numpy(learnt).flatten()[rows]], worlds

    def _actor_step(
        self,
        buffer: RolloutBuffer,
        rows: Tensor,
        worlds: Tensor,
        advantages: NDArray[np.float32],
        *,
        clip: float,
        entropy: float,
        max_grad_norm: float,
    ) -> NDArray[np.float64]:
        """One step of the actor on the (step, world) pairs `rows`; loss, entropy, KL, clipped share.

        Args:
            buffer: the rollout.
            rows, worlds: as `_minibatches` gives them.
            advantages: float32 `(T, W, A)`.
            clip: ε; entropy: the bonus's weight; max_grad_norm: gradients are scaled down to it.
        """
        T, (W, A) = buffer.steps, self.shape
        actor = self.actor

        def push(out: Tensor, part: Tensor) -> tuple[Tensor, NDArray[np.float64]]:
            """The gradient in the logits `out` of the pairs `part`, and the statistics, both as shares of the whole."""
            mask, actions, logp, weights = (
                take(x, part).flatten(0, 1).numpy() for x in (buffer.mask[:T], buffer.actions, buffer.logp, advantages)
            )
            logits = out.detach().numpy()
            grad = np.empty_like(logits)
            stats = ppo_policy_gradient(logits, mask, actions, logp, weights, clip, entropy, grad)
            share = len(part) / len(rows)
            return torch.from_numpy(grad).mul_(share), np.array(stats) * share

        if isinstance(actor, RecurrentMLP):
            n = len(worlds)
            obs = torch.from_numpy(buffer.obs[:T])[:, worlds].reshape(T, n * A, -1)
            start = self._hidden_start.view(W, A, -1)[worlds].flatten(0, 1)
            begins = torch.from_numpy(buffer.begins[:T])[:, worlds].repeat_interleave(A, 1)
            out, _ = actor.forward(obs, start, begins)
            out = out.view(T * n, A, -1)
            if len(rows) < len(out):
                place = torch.zeros(W, dtype=torch.int64)
                place[worlds] = torch.arange(n)
                out = out[rows // W * n + place[rows % W]]
            out = out.flatten(0, 1)
            grad, total = push(out, rows)
            self.optimizers["actor"].zero_grad(set_to_none=False)
            out.backward(grad)  # type: ignore[no-untyped-call]
        else:

            def work(lane: int, piece: slice) -> NDArray[np.float64]:
                part = rows[piece]
                out, kept = actor.forward(take(buffer.obs[:T], part).view(len(part) * A, -1), lane)
                grad, stats = push(out, part)
                actor.backward(kept, grad, lane)
                return stats

            total = sum(self.lanes.run(work, self.lanes.cut(len(rows))), np.zeros(4))
            actor.collect()
        self._step("actor", max_grad_norm)
        return total

    def _step(self, net: str, max_grad_norm: float) -> None:
        start = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(self.nets[net], max_grad_norm)
        self.optimizers[net].step()
        self._optimise += time.perf_counter() - start

    # -- the whole state, for checkpoints --------------------------------------------------------

    def state_dict(self, *, policy_only: bool = False) -> dict[str, Tensor]:
        """Everything that decides what is learnt and drawn next, as tensors by name; or only what acting needs."""
        if policy_only:
            return {f"actor.{i}": p.detach().clone() for i, p in enumerate(self.actor_params)}
        state = {
            "hidden": self.hidden,
            "keys": torch.from_numpy(self.keys.view(np.int64)),
            "counters": torch.from_numpy(self.counters.view(np.int64)),
            "updates": torch.tensor(self.updates),
            "draw_key": torch.from_numpy(np.array([self._shuffle_key], np.uint64).view(np.int64)),
        }
        for net, params in self.nets.items():
            for i, p in enumerate(params):
                state[f"{net}.{i}"] = p.data
                for name, value in self.optimizers[net].state.get(p, {}).items():
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
        for net, params in self.nets.items():
            if policy_only and net != "actor":
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
                    kept = {k: state[f"{name}.{k}"].clone() for k in ("step", "exp_avg", "exp_avg_sq")}
                    self.optimizers[net].state[p] = kept
        if policy_only:
            return
        self.hidden = state["hidden"].clone()
        self.keys[:] = state["keys"].numpy().view(np.uint64)
        self.counters[:] = state["counters"].numpy().view(np.uint64)
        self.updates = int(state["updates"])
        if "draw_key" in state:  # else of a checkpoint from before, whose key is its seed's
            self._shuffle_key = int(state["draw_key"].numpy().view(np.uint64)[0])


def take(array: NDArray[np.generic], rows: Tensor) -> Tensor:
    """The (step, world) pairs `rows` of an array `(T, W, …)`, as a tensor `(len(rows), …)`."""
    flat = torch.from_numpy(array).flatten(0, 1)
    return flat.index_select(0, rows)
