"""MAAC: decentralised actors with one critic for the team (CoMLRL's; the idea is Lowe et al. 2017, section 4).

The critic sees what all agents see together: their prompts (V), or their prompts and the replies of a joint action
(Q). Only learning needs it: each agent still acts on its own prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from echelon.algorithms.team_critics import ActorCritic, CriticConfig
from echelon.algorithms.teams import TeamNode

__all__ = ["MAAC", "MAACConfig"]


@dataclass(frozen=True)
class MAACConfig(CriticConfig):
    """Hyper-parameters of MAAC."""


class MAAC(ActorCritic):
    """A team with one critic."""

    def update(self, roots: Sequence[TeamNode]) -> dict[str, float]:
        """Learn from some rollout trees; what to log of it: `improve`'s numbers, and `value_loss` and
        `explained_variance` (before it learnt) of the critic."""
        batch = self.flatten(roots)
        if self.config.critic == "v":
            seen = np.concatenate(self.prompts(batch), 1)
        else:
            seen = np.concatenate([batch.by_action(x, i) for i, x in enumerate(self.replies(batch))], 1)
        self.build([seen.shape[1]])
        joint, loss, known = self.assess(self.critics[0], seen, batch, lambda values: values)
        advantages = [batch.own(joint, i) for i in range(len(self.policies))]
        return self.improve(batch, advantages) | {"value_loss": loss, "explained_variance": known}
