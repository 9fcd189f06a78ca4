"""IAC: independent actor-critics (Foerster et al. 2018, section 4; in CoMLRL for language models).

Each agent has a critic of its own, which sees what the agent sees: its prompt (V), or its prompt and reply (Q). The
reward is the team's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from echelon.algorithms.team_critics import ActorCritic, CriticConfig
from echelon.algorithms.teams import TeamNode

__all__ = ["IAC", "IACConfig"]


@dataclass(frozen=True)
class IACConfig(CriticConfig):
    """Hyper-parameters of IAC."""


class IAC(ActorCritic):
    """A team whose agents have a critic each."""

    def update(self, roots: Sequence[TeamNode]) -> dict[str, float]:
        """Learn from some rollout trees; what to log of it: `improve`'s numbers, and of each agent's critic
        `value_loss` and `explained_variance` (before it learnt)."""
        batch = self.flatten(roots)
        seen = self.prompts(batch) if self.config.critic == "v" else self.replies(batch)
        self.build([x.shape[1] for x in seen])
        advantages = []
        stats: dict[str, float] = {}
        for i, (critic, x) in enumerate(zip(self.critics, seen, strict=True)):
            own, loss, known = self.assess(critic, x, batch, partial(batch.own, agent=i))
            advantages.append(own)
            stats |= {f"value_loss_{i}": loss, f"explained_variance_{i}": known}
        return self.improve(batch, advantages) | stats
