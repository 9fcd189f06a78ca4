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


# Microseconds of an environment step, for one agent and its share of the world, by algorithm; a planner's on top.
_STEP = {"mappo": 5.0, "ippo": 5.0, "qmix": 20.0, "vdn": 15.0}
_PLANNED = 4.0
# A planner asks about an agent whose choice is open so many times an agent-step; a question costs so much.
_QUESTIONS = 0.05
_TOKENS = 144.0
_QUESTION_SECONDS = 0.065
_EPISODE_QUESTIONS = 9.0
_START = 6.0  # seconds to begin a run


def estimate(run: RunConfig, protocol: Protocol) -> Cost:
    """What a run by the protocol will take on one core of the machine named above; right to about a factor of two."""
    kind, env = method(run.method), run.env
    steps = run.steps if kind.learns else 0
    seconds = _START + steps * env.num_agents * 1e-6 * _STEP.get(kind.algorithm, 5.0)
    if kind.train_planner is not None:
        seconds += steps * env.num_agents * 1e-6 * _PLANNED * (env.size / 20)
    questions = 0.0
    if kind.needs_model(run.planner):
        episodes = 2 * protocol.final_episodes
        if kind.learns:
            episodes += protocol.episodes * (1 + -(-run.steps // protocol.every))
            share = max(1, round(run.llm_share * run.num_envs)) / run.num_envs
            questions += steps * share * env.num_agents * _QUESTIONS
        questions += episodes * _EPISODE_QUESTIONS if kind.eval_planner is not None else 1000
    return Cost(seconds + questions * _QUESTION_SECONDS, questions, questions * _TOKENS, float(steps))
