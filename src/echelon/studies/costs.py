"""What a run will cost, before it is begun: seconds, model calls, tokens.

The figures were measured on 2 cores of an AMD EPYC with AVX-512 BF16, one thread a run
(`docs/results/medium.md`); another machine is faster or slower by a factor that a study learns from its first runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from echelon.configs import RunConfig
from echelon.evaluation.protocol import Protocol
from echelon.methods import method

__all__ = ["Cost", "estimate"]


@dataclass(frozen=True)
class Cost:
    """What a run will take: processor seconds, and a language model's calls and tokens; they add up."""

    seconds: float = 0.0
    model_calls: float = 0.0
    model_tokens: float = 0.0
    steps: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self._all(), other._all(), strict=True)))

    def _all(self) -> tuple[float, ...]:
        return self.seconds, self.model_calls, self.model_tokens, self.steps


# Microseconds of an environment step, for one agent and its share of the world, by algorithm; planning on top,
# for each agent and for each cell of the map's side.
_STEP = {"mappo": 4.0, "ippo": 6.0, "qmix": 8.1, "vdn": 7.0}
_PLANNED, _PLANNED_CELL = 2.9, 0.05
# A language model's planner asks about an agent so many times a step, and so often in an episode; most questions have
# been asked before. What is new depends on how far things are: so many calls and tokens for each cell of the side.
_QUESTIONS, _EPISODE_QUESTIONS, _QUESTION_SECONDS = 0.022, 7.2, 0.0004
_CALLS, _TOKENS = 0.85, 100.0
_MOVES, _MOVE_TOKENS, _MOVE_SECONDS = 220.0, 20_000.0, 12.0  # of a model that picks every move
_START, _LOAD = 3.0, 5.0  # seconds to begin a run, and to load a model


def estimate(run: RunConfig, protocol: Protocol) -> Cost:
    """What a run by the protocol will take on one core of the machine named above; right to about a factor of two."""
    kind, env = method(run.method), run.env
    steps = run.steps if kind.learns else 0
    micro = _STEP.get(kind.algorithm, _STEP["mappo"])
    if kind.train_planner is not None:
        micro += _PLANNED + _PLANNED_CELL * env.size
    evaluations = 1 + -(-run.steps // protocol.every) if kind.learns else 1
    episodes = (2 if kind.learns else 1) * protocol.final_episodes + protocol.episodes * evaluations
    seconds = _START + steps * env.num_agents * micro * 1e-6 + episodes * env.size * env.num_agents * 2e-5
    if not kind.needs_model(run.planner):
        return Cost(seconds, steps=float(steps))
    if kind.executor == "model":
        return Cost(seconds + _LOAD + _MOVE_SECONDS, _MOVES, _MOVE_TOKENS)
    share = run.own_worlds / run.num_envs
    questions = steps * share * env.num_agents * _QUESTIONS + episodes * _EPISODE_QUESTIONS
    seconds += _LOAD + questions * _QUESTION_SECONDS
    return Cost(seconds, _CALLS * env.size, _TOKENS * env.size, float(steps))
