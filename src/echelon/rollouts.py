"""Rollouts: worlds, the algorithm that learns in them, and what lies between the two; writes no file."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from echelon.buffers import RolloutBuffer
from echelon.building import build_algorithm, build_worlds, settled, use_threads
from echelon.configs import RunConfig
from echelon.errors import EchelonError
from echelon.methods import method
from echelon.rollout import PlanTrace

__all__ = ["Clock", "Rollouts", "Watch"]


class Watch(Protocol):
    """Who looks on at each step of a rollout."""

    def acted(self) -> None:
        """After `worlds.advance`."""
        ...

    def settled(self, ended: NDArray[np.bool_]) -> None:
        """After `worlds.settle`; which worlds were finished, bool `(W,)`."""
        ...


class Clock:
    """Where the time of one update goes."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """Book the time since the last lap on `stage`."""
        now = time.perf_counter()
        self._laps[stage] = self._laps.get(stage, 0.0) + now - self._last
        self._last = now

    def book(self, seconds: Mapping[str, float]) -> None:
        """Book what happened since the last lap as these stages, which measured themselves."""
        for stage, spent in seconds.items():
            self._laps[stage] = self._laps.get(stage, 0.0) + spent
        self._last = time.perf_counter()

    def total(self) -> float:
        """Seconds up to the last lap."""
        return self._last - self._start

    def shares(self) -> dict[str, float]:
        """The share of the time by stage."""
        return {stage: round(seconds / self.total(), 4) for stage, seconds in self._laps.items()}


class Rollouts:
    """Worlds, the algorithm that learns in them, and the rollouts between the two; writes no file.

    Attributes:
        config: the run's config, its threads settled.
        worlds, algorithm, buffer: what is trained in what, and the newest rollout.
        group: so many neighbouring worlds begin each rollout with the same episode; 0: worlds go on, each its own way.
        steps_per_update: environment steps of a rollout.
    """

    def __init__(
        self,
        config: RunConfig,
        on_plan: Callable[[PlanTrace], None] | None = None,
        on_subgoals: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Build everything.

        Raises:
            EchelonError: a setting, map or model can't be used.
        """
        if not method(config.method).learns:
            raise EchelonError(f"method {config.method} has nothing to train: use echelon evaluate or compare")
        self.config = config = settled(config)
        use_threads(config)
        self.worlds = build_worlds(config, num_envs=config.num_envs, seed=config.seed, training=True, on_plan=on_plan,
                                   on_subgoals=on_subgoals)  # fmt: skip
        self.worlds.traced = config.planning.traced
        self.algorithm = build_algorithm(config, self.worlds)
        env, steps = self.worlds.env, config.algorithm.rollout
        # An algorithm that compares worlds says so by an attribute: how many play the same episodes side by side.
        self.group: int = getattr(self.algorithm, "group", 0)
        if self.group:
            if config.num_envs % self.group:
                raise EchelonError(
                    f"num_envs is {config.num_envs}: it must be a multiple of algorithm.group ({self.group})"
                )
            steps = min(steps, env.limit)  # it learns from whole episodes, which all begin with the rollout
        self.buffer = RolloutBuffer(
            steps, env.num_envs, env.num_agents, len(self.worlds.obs_scale), env.state_size, env.num_actions,
            self.worlds.num_terms,
        )  # fmt: skip
        self.steps_per_update = steps * config.num_envs
        self._watch: Watch | None = None

    def start(self) -> None:
        """Plan the first subgoals: once, before the first update of a new run."""
        self.worlds.start()

    def update(self) -> tuple[Clock, dict[str, float]]:
        """One update, of `steps_per_update` environment steps: where its time went, and what to log."""
        clock = self.collect()
        return clock, self.learn(clock)

    def collect(self, clock: Clock | None = None, *, greedy: bool = False) -> Clock:
        """One rollout into the buffer; where its time went.

        Args:
            clock: goes on with this one.
            greedy: executors take their most probable moves.
        """
        worlds, buffer, env = self.worlds, self.buffer, self.worlds.env
        clock = Clock() if clock is None else clock
        buffer.finals.clear()
        if self.group:
            worlds.begin_together(self.group)
        self.algorithm.begin_rollout()
        for t in range(buffer.steps):
            self._see(t)
            clock.lap("store")
            buffer.actions[t], buffer.logp[t] = self.algorithm.act(
                worlds.obs, worlds.mask, worlds.begins, greedy=greedy
            )
            clock.lap("act")
            worlds.advance(buffer.actions[t])
            buffer.reward[t] = worlds.reward
            if buffer.num_terms:
                buffer.unshaped[t], buffer.phi[t], buffer.next_phi[t] = worlds.unshaped, worlds.phi, worlds.next_phi
            np.logical_or(env.terminated[:, None], worlds.cut, out=buffer.terminated[t])
            if env.truncated.any():
                cut = np.flatnonzero(env.truncated)
                state = env.states(np.empty((len(cut), env.state_size), np.int8), cut)
                buffer.finals.append((t, cut, worlds.obs[cut], state, worlds.mask[cut]))
            if self._watch is not None:
                self._watch.acted()
            clock.lap("step")
            done = worlds.settle()
            if self._watch is not None:
                self._watch.settled(done)
            np.logical_or(done[:, None], worlds.cut, out=buffer.ended[t])
            clock.lap("plan")
        self.worlds.finish_plans()
        clock.lap("plan")
        self._see(buffer.steps)
        clock.lap("store")
        return clock

    def learn(self, clock: Clock) -> dict[str, float]:
        """Let the algorithm learn from the rollout; what to log of it."""
        learnt = self.algorithm.update(self.buffer)
        clock.book(self.algorithm.seconds)
        return learnt

    def _see(self, t: int) -> None:
        self.buffer.obs[t] = self.worlds.obs
        self.buffer.mask[t] = self.worlds.mask
        self.worlds.env.states(self.buffer.state[t])
        self.buffer.begins[t] = self.worlds.begins

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything that learns, as tensors by name."""
        return self.algorithm.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what `state_dict` gave."""
        self.algorithm.load_state_dict(state)
