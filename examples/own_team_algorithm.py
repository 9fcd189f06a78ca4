"""A team's algorithm of one's own: replies are compared with a quantile of their group, which no fluke moves far."""

import dataclasses

import numpy as np

from echelon.algorithms import TeamConfig, register_team
from echelon.algorithms.teams import TeamLearner
from echelon.cli import main


@dataclasses.dataclass(frozen=True)
class QuantileConfig(TeamConfig):
    """What all algorithms for teams can be told, and one thing more: `--algorithm.quantile`."""

    quantile: float = 0.5
    """Which quantile of its group a reply is compared with; 0.5: the median."""


class Quantile(TeamLearner):
    """It says how good replies were; how that changes the models is the same for all (`improve`)."""

    def update(self, roots):
        """Learn from some rollout trees; what to log of it."""
        batch = self.flatten(roots)
        advantages = []
        for agent in range(len(self.policies)):
            own = batch.own(batch.returns, agent)  # (nodes, replies): over all that the others did beside it
            advantages.append(own - np.quantile(own, self.config.quantile, axis=1, keepdims=True))
        return self.improve(batch, advantages)


register_team("maquantile", Quantile, QuantileConfig)

if __name__ == "__main__":
    raise SystemExit(main())
