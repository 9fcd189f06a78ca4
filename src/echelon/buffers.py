"""Preallocated storage between worlds and learners."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ReplayMemory", "Replayed", "RolloutBuffer", "team_mean"]


Final = tuple[int, NDArray[np.int64], NDArray[np.int8], NDArray[np.int8], NDArray[np.uint8]]


class RolloutBuffer:
    """One rollout of T steps of W worlds with A agents, written in place.

    Row t holds what was seen before step t and what the step brought; row T of `obs`, `state` and `mask` is where
    the rollout stopped. `terminated` and `ended` are as `advantages.gae` wants them, one an agent, since an agent's
    subgoal may end before its world's episode does. The true last observations of episodes that ended inside
    the rollout are kept in `finals`, so that a time limit can bootstrap from them.

    Attributes:
        obs: int8 `(T + 1, W, A, D)`; state: int8 `(T + 1, W, S)`; mask: uint8
            `(T + 1, W, A, actions)`, 1 where legal.
        actions: int8, logp, reward: float32, terminated, ended: bool, all `(T, W, A)`.
        begins: bool `(T + 1, W)`, where an episode begins at that row.
        finals: a list of (t, worlds int64 `(n,)`, obs int8 `(n, A, D)`, state int8 `(n, S)`, mask uint8
            `(n, A, actions)`), all of the true last state.
        num_terms: K, the potential terms of a run whose rewards are shaped; 0: of one whose rewards aren't.
        unshaped: float32 `(T, W)`, the team's reward without what potentials added; phi, next_phi: float32
            `(T, W, K)`, the terms before the step and of the true next state. All of size 0 where K is 0.
    """

    def __init__(
        self,
        steps: int,
        num_envs: int,
        num_agents: int,
        obs_size: int,
        state_size: int,
        actions: int,
        num_terms: int = 0,
    ):
        """All sizes at least 1, but for `num_terms`."""
        T, W, A = steps, num_envs, num_agents
        self.steps = steps
        self.obs = np.zeros((T + 1, W, A, obs_size), np.int8)
        self.state = np.zeros((T + 1, W, state_size), np.int8)
        self.mask = np.zeros((T + 1, W, A, actions), np.uint8)
        self.actions = np.zeros((T, W, A), np.int8)
        self.logp = np.zeros((T, W, A), np.float32)
        self.reward = np.zeros((T, W, A), np.float32)
        self.terminated = np.zeros((T, W, A), bool)
        self.ended = np.zeros((T, W, A), bool)
        self.begins = np.zeros((T + 1, W), bool)
        self.finals: list[Final] = []
        self.num_terms = num_terms
        self.unshaped = np.zeros((T, W if num_terms else 0), np.float32)
        self.phi, self.next_phi = np.zeros((2, T, W if num_terms else 0, num_terms), np.float32)


def team_mean(reward: NDArray[np.float32]) -> NDArray[np.float32]:
    """The team's reward of its agents' `(…, A)`: their mean, float32 `(…,)`."""
    return np.asarray(reward.mean(-1))


@dataclass(frozen=True)
class Replayed:
    """B segments from a `ReplayMemory`, each T steps of one world, in a row.

    Attributes:
        obs: int8 `(B, T + 1, A, D)`; state: int8 `(B, T + 1, S)`; mask: uint8 `(B, T + 1, A, actions)`.
        begins: bool `(B, T + 1)`; actions: int8 `(B, T, A)`.
        reward: float32, terminated, ended: bool, all `(B, T)`: the team's.
        memory: float32 `(B, A, H)`, what a recurrent policy remembered before the first step.
        final_at: int64 `(2, n)`, the (segment, step) pairs that a time limit cut; final_obs: int8 `(n, A, D)`,
            final_state: int8 `(n, S)`, final_mask: uint8 `(n, A, actions)`, their true next states.
    """

    obs: NDArray[np.int8]
    state: NDArray[np.int8]
    mask: NDArray[np.uint8]
    begins: NDArray[np.bool_]
    actions: NDArray[np.int8]
    reward: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    ended: NDArray[np.bool_]
    memory: NDArray[np.float32]
    final_at: NDArray[np.int64]
    final_obs: NDArray[np.int8]
    final_state: NDArray[np.int8]
    final_mask: NDArray[np.uint8]


class ReplayMemory:
    """The newest rollouts, in a ring, kept as segments: what one world did in one rollout.

    A team learns as one, so what was an agent's in the rollout becomes the team's: its reward is the mean of its
    agents', and its task ends with the last of theirs. One agent's reached subgoal doesn't cut the team's value.
    Whole segments are kept, and with them what a recurrent policy remembered when they began (the stored state of
    Kapturowski et al. 2019, R2D2), so that traces and recurrence have something to run over.

    Attributes:
        segments: how many are held now.
        capacity: how many fit.
        num_terms: K, the potential terms kept with each step, as the first rollout had them (0: rewards aren't
            shaped). With them are kept, for whoever computes `reward` anew, `unshaped`, float32 `(segments, T)`, and
            `phi` and `next_phi`, float32 `(segments, T, K)`.
    """

    _ARRAYS = ("obs", "state", "mask", "begins", "actions", "reward", "terminated", "ended", "memory")
    _TERMS = ("unshaped", "phi", "next_phi")

    def __init__(
        self, rollouts: int, steps: int, num_envs: int, num_agents: int, obs_size: int, state_size: int, actions: int,
        memory_size: int,
    ):  # fmt: skip
        """Room for `rollouts` rollouts of `steps` steps of `num_envs` worlds; `memory_size`: H, may be 0."""
        n, T, A = rollouts * num_envs, steps, num_agents
        self.capacity, self.segments, self._next, self._width = n, 0, 0, num_envs
        self.obs = np.zeros((n, T + 1, A, obs_size), np.int8)
        self.state = np.zeros((n, T + 1, state_size), np.int8)
        self.mask = np.zeros((n, T + 1, A, actions), np.uint8)
        self.begins = np.zeros((n, T + 1), bool)
        self.actions = np.zeros((n, T, A), np.int8)
        self.reward = np.zeros((n, T), np.float32)
        self.terminated = np.zeros((n, T), bool)
        self.ended = np.zeros((n, T), bool)
        self.memory = np.zeros((n, A, memory_size), np.float32)
        # True last states are rare: they are kept beside the arrays, by (segment, step).
        self._cut = np.zeros((n, T), bool)
        self._finals: dict[tuple[int, int], tuple[NDArray[np.int8], NDArray[np.int8], NDArray[np.uint8]]] = {}
        self._make_room(0)

    def _make_room(self, num_terms: int) -> None:
        """For `num_terms` potential terms, in an empty memory."""
        n, T = self.reward.shape if num_terms else (0, 0)
        self.num_terms = num_terms
        self.unshaped = np.zeros((n, T), np.float32)
        self.phi, self.next_phi = np.zeros((2, n, T, num_terms), np.float32)

    def add(self, buffer: RolloutBuffer, memory: NDArray[np.float32]) -> None:
        """Keep a rollout, in the place of the oldest one where there is no room.

        Args:
            buffer: the rollout.
            memory: float32 `(W, A, H)`, what the policy remembered before its first step.

        Raises:
            ValueError: the rollout has other potential terms than what is kept already.
        """
        if buffer.num_terms != self.num_terms:
            if self.segments:
                raise ValueError(f"a rollout of {buffer.num_terms} terms among some of {self.num_terms}")
            self._make_room(buffer.num_terms)
        begin = self._next
        here = slice(begin, begin + self._width)
        for i, t in np.argwhere(self._cut[here]).tolist():
            del self._finals[begin + i, t]
        for name in ("obs", "state", "mask", "begins", "actions"):
            getattr(self, name)[here] = getattr(buffer, name).swapaxes(0, 1)
        for name in self._TERMS if self.num_terms else ():
            getattr(self, name)[here] = getattr(buffer, name).swapaxes(0, 1)
        self.reward[here] = team_mean(buffer.reward).T
        self.terminated[here] = buffer.terminated.all(2).T
        self.ended[here] = buffer.ended.all(2).T
        self.memory[here] = memory
        self._cut[here] = False
        for t, worlds, obs, state, mask in buffer.finals:
            self._cut[begin + worlds, t] = True
            for i, w in enumerate(worlds.tolist()):
                self._finals[begin + w, t] = (obs[i], state[i], mask[i])
        self.segments = max(self.segments, here.stop)
        self._next = here.stop % self.capacity

    def take(self, which: NDArray[np.int64]) -> Replayed:
        """The segments `which`, int64 `(B,)`, each below `segments`."""
        parts = {name: getattr(self, name)[which] for name in self._ARRAYS}
        at = np.argwhere(self._cut[which])
        finals = [self._finals[int(which[b]), int(t)] for b, t in at]
        return Replayed(**parts, final_at=at.T, **self._stacked(finals))

    def _stacked(
        self, finals: list[tuple[NDArray[np.int8], NDArray[np.int8], NDArray[np.uint8]]]
    ) -> dict[str, NDArray[Any]]:
        return {
            f"final_{name}": np.stack([f[i] for f in finals]) if finals else np.zeros((0, *like.shape[2:]), like.dtype)
            for i, (name, like) in enumerate((("obs", self.obs), ("state", self.state), ("mask", self.mask)))
        }

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """All that is held, as arrays by name (some may be of size 0)."""
        keys = sorted(self._finals)
        return {
            **{name: getattr(self, name)[: self.segments].copy() for name in self._ARRAYS},
            **{name: getattr(self, name)[: self.segments].copy() for name in self._TERMS if self.num_terms},
            "next": np.array(self._next),
            "final_at": np.array(keys, np.int64).reshape(-1, 2),
            **self._stacked([self._finals[key] for key in keys]),
        }

    def load_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Put back what `state_dict` gave."""
        self.segments, self._next = len(state["obs"]), int(state["next"])
        self._make_room(state["phi"].shape[2] if "phi" in state else 0)
        for name in (*self._ARRAYS, *(self._TERMS if self.num_terms else ())):
            getattr(self, name)[: self.segments] = state[name]
        self._cut[:] = False
        self._finals = {}
        finals = zip(state["final_at"].tolist(), state["final_obs"], state["final_state"], state["final_mask"],
                     strict=True)  # fmt: skip
        for (segment, t), obs, last, mask in finals:
            self._cut[segment, t] = True
            self._finals[segment, t] = (obs, last, mask)
