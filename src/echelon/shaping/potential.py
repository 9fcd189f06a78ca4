"""Potential-based rewards: `F = γ Φ'(s') - Φ(s)`, in rollouts and for transitions that were stored.

Ng, Harada and Russell (1999) for one potential; Devlin and Kudenko (2012) for one that changes with time; Grześ (2017)
for the potential of states where an episode ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from echelon.errors import EchelonError
from echelon.shaping.base import ShapingConfig

__all__ = ["PotentialShaper", "ShapingRules", "mixture", "relabel"]


@dataclass(frozen=True)
class ShapingRules:
    """How a mixture of terms becomes a reward: everything that a proposer has no say in.

    The potential is `worth = β · scale · (Φ - offset)`, and a step's extra reward `F = γ worth' - worth`.
    """

    gamma: float = 0.99
    """Discount γ; it must be the learner's, else the best policies change (0 to 1)."""
    terminal: Literal["zero", "state"] = "zero"
    """Worth of a state where the task ended: 0, which keeps the best policies; or the state's own, as the reference
    implementation has it. A time limit ends no task: its last state always keeps its worth."""
    first_step: Literal["shaped", "zero"] = "shaped"
    """The first step of an episode: shaped like any other, or without extra reward (the reference for RWARE)."""
    team: Literal["once", "per_agent_sum"] = "once"
    """The team's reward gets F once; or once an agent, as where a scalar is copied to each and then summed."""
    num_agents: int = 1
    """Agents of the team; only `per_agent_sum` asks."""
    scale: float = 1.0
    """What β is a share of (above 0); see `TermSet.scale`."""
    offset: float = 0.0
    """Taken from Φ. With 1, where all terms are 1 at the goal, a success costs no potential: an agent that has little
    experience isn't put off by it. The best policies are the same with any offset."""

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise EchelonError(f"gamma is {self.gamma}: it must be 0 to 1")
        if self.terminal not in ("zero", "state"):
            raise EchelonError(f"terminal potential is {self.terminal!r}: it must be zero or state")
        if self.first_step not in ("shaped", "zero"):
            raise EchelonError(f"first_step is {self.first_step!r}: it must be shaped or zero")
        if self.team not in ("once", "per_agent_sum"):
            raise EchelonError(f"team is {self.team!r}: it must be once or per_agent_sum")
        if self.num_agents < 1:
            raise EchelonError(f"num_agents is {self.num_agents}: it must be at least 1")
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise EchelonError(f"scale is {self.scale}: it must be above 0")
        if not np.isfinite(self.offset):
            raise EchelonError(f"offset is {self.offset}: it must be a number")

    @property
    def factor(self) -> int:
        """How often the team gets F."""
        return self.num_agents if self.team == "per_agent_sum" else 1


def mixture(phi: NDArray[np.float32], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """`Φ = Σ w_k φ_k`, kept within [0, 1].

    Term by term, not as a matrix product: a world's number must not depend on how many worlds are beside it.

    Args:
        phi: float32 `(…, K)`.
        weights: float64 `(K,)`, or `(…, K)` where they differ by entry.

    Returns:
        float64 `(…,)`.
    """
    total = np.zeros(phi.shape[:-1])
    for k in range(phi.shape[-1]):
        total += weights[..., k] * np.clip(phi[..., k].astype(np.float64), 0, 1)
    return np.clip(total, 0, 1)


def _worth(
    phi: NDArray[np.float32],
    beta: float | NDArray[np.float64],
    weights: NDArray[np.float64],
    rules: ShapingRules,
) -> NDArray[np.float64]:
    return np.asarray(beta * (rules.scale * (mixture(phi, weights) - rules.offset)))


def _extra(
    worth: NDArray[np.float64],
    following: NDArray[np.float64],
    terminated: NDArray[np.bool_],
    first: NDArray[np.bool_] | None,
    rules: ShapingRules,
) -> NDArray[np.float32]:
    if rules.terminal == "zero":
        following = np.where(terminated, 0, following)
    extra = rules.factor * (rules.gamma * following - worth)
    if rules.first_step == "zero" and first is not None:
        extra = np.where(first, 0, extra)
    return extra.astype(np.float32)


class PotentialShaper:
    """The extra reward of a batch of worlds, step by step.

        shaper.begin(terms.terms(env))
        env.advance(actions)
        extra = shaper.step(terms.terms(env), env.terminated)     # of the true next states
        done = env.autoreset()
        if done.any():
            shaper.begin(terms.terms(env, done), done)

    What a state was worth is kept from the step that led to it: when the configuration changes in mid-episode, the
    next step's F is the new potential of where it leads less the old one of where it began, so that returns still
    telescope (Devlin and Kudenko 2012).

    Attributes:
        config: the mixture in force; see `change`.
        worth: float64 `(W,)`, the potential of each world's present state, β included.
        first: bool `(W,)`, worlds that made no step of their episode yet.
    """

    def __init__(self, config: ShapingConfig, names: Sequence[str], num_envs: int, rules: ShapingRules):
        """Nothing is worth anything until `begin`.

        Args:
            config: the mixture.
            names: the terms in the order of the columns (`TermSet.names`).
            num_envs: worlds W.
            rules: what doesn't change.

        Raises:
            EchelonError: the mixture speaks of another term.
        """
        self.names, self.rules = tuple(names), rules
        self.worth = np.zeros(num_envs)
        self.first = np.ones(num_envs, bool)
        self.change(config)

    def change(self, config: ShapingConfig) -> None:
        """Shape by another mixture from the next step on.

        Raises:
            EchelonError: the mixture speaks of a term that there isn't.
        """
        self._weights = config.vector(self.names)
        self.config = config

    def begin(self, phi: NDArray[np.float32], which: NDArray[np.bool_] | None = None) -> None:
        """New episodes begin in the worlds `which` (bool `(W,)`; default: all) with terms `phi`, float32 `(W, K)`."""
        worth = _worth(phi, self.config.beta, self._weights, self.rules)
        every = np.ones(len(self.worth), bool) if which is None else which
        self.worth = np.where(every, worth, self.worth)
        self.first = self.first | every

    def step(self, phi: NDArray[np.float32], terminated: NDArray[np.bool_]) -> NDArray[np.float32]:
        """The extra reward of a step.

        Args:
            phi: float32 `(W, K)`, the terms of the true next states, also where the episode ended.
            terminated: bool `(W,)`, where the task ended with it; not where a time limit cut it.

        Returns:
            float32 `(W,)`, F for the team; with `per_agent_sum` times the number of agents.
        """
        following = _worth(phi, self.config.beta, self._weights, self.rules)
        extra = _extra(self.worth, following, terminated, self.first, self.rules)
        self.worth, self.first = following, np.zeros_like(self.first)
        return extra

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Where each world stands, and the mixture in force, as arrays."""
        return {
            "worth": self.worth.copy(),
            "first": self.first.copy(),
            "beta": np.array(self.config.beta),
            "weights": self._weights.copy(),
        }

    def load_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Put back what `state_dict` gave, to a shaper with the same mixture.

        Raises:
            EchelonError: it belongs to another mixture or to another number of worlds.
        """
        if state["worth"].shape != self.worth.shape or state["weights"].shape != self._weights.shape:
            raise EchelonError("the saved shaping belongs to another number of worlds or terms")
        if float(state["beta"]) != self.config.beta or not np.array_equal(state["weights"], self._weights):
            raise EchelonError(f"the saved shaping isn't that of mode {self.config.mode!r}")
        self.worth = np.array(state["worth"], np.float64)
        self.first = np.array(state["first"], bool)


def relabel(
    sparse: NDArray[np.float32],
    phi: NDArray[np.float32],
    next_phi: NDArray[np.float32],
    terminated: NDArray[np.bool_],
    configs: ShapingConfig | Sequence[ShapingConfig],
    *,
    names: Sequence[str],
    rules: ShapingRules,
    at: NDArray[np.integer[Any]] | None = None,
    next_at: NDArray[np.integer[Any]] | None = None,
    begins: NDArray[np.bool_] | None = None,
) -> NDArray[np.float32]:
    """The rewards of stored transitions as another mixture would have shaped them: task reward and F.

    With one configuration every transition is shaped by it, whichever was in force when it was made: no trace of
    earlier mixtures stays in a replay buffer. With several, `at` and `next_at` say which was in force at each
    transition's state and at its next state; those of the rollout give back what the rollout paid.

    Args:
        sparse: float32 `(…,)`, the task reward alone.
        phi: float32 `(…, K)`, the terms of each state; next_phi: the same of the true next states (of the last
            state of an episode, not of the first of the next one).
        terminated: bool `(…,)`, where the task ended, time limits apart.
        configs: the mixture, or several.
        names: the terms in the order of the columns.
        rules: how rewards come of it.
        at, next_at: int `(…,)`, indices into `configs`; default: the first.
        begins: bool `(…,)`, the first steps of episodes; only `first_step="zero"` asks.

    Returns:
        float32 `(…,)`.

    Raises:
        EchelonError: a mixture speaks of another term.
        ValueError: `first_step="zero"` without `begins`.
    """
    if rules.first_step == "zero" and begins is None:
        raise ValueError("first_step='zero' needs begins: which steps are the first of an episode")
    several = (configs,) if isinstance(configs, ShapingConfig) else tuple(configs)
    betas = np.array([config.beta for config in several])
    weights = np.stack([config.vector(names) for config in several])
    here = np.zeros((), np.int64) if at is None else at
    there = np.zeros((), np.int64) if next_at is None else next_at
    worth = _worth(phi, betas[here], weights[here], rules)
    following = _worth(next_phi, betas[there], weights[there], rules)
    return sparse + _extra(worth, following, terminated, begins, rules)
