"""An algorithm of one's own: MAPPO whose entropy bonus fades, with a setting for how fast."""

import dataclasses

import torch

from echelon import algorithms, methods
from echelon.algorithms import MAPPO, MAPPOConfig
from echelon.cli import main


@dataclasses.dataclass(frozen=True)
class FadingConfig(MAPPOConfig):
    """MAPPO's settings and one more; on the command line `--algorithm.fade`."""

    fade: float = 0.99
    """What the entropy bonus is multiplied by after each update."""


class FadingMAPPO(MAPPO):
    """What decides how it goes on belongs into `state_dict`: so a resumed run is the same as one that never stopped."""

    def update(self, buffer):
        """Learn from one rollout, then fade."""
        learnt = super().update(buffer)
        self.config = dataclasses.replace(self.config, entropy=self.config.fade * self.config.entropy)
        return learnt | {"bonus": self.config.entropy}

    def state_dict(self, *, policy_only=False):
        """All of it as tensors, or only what acting needs."""
        bonus = {} if policy_only else {"bonus": torch.tensor(self.config.entropy, dtype=torch.float64)}
        return super().state_dict(policy_only=policy_only) | bonus

    def load_state_dict(self, state, *, policy_only=False):
        """Put back what `state_dict` gave."""
        super().load_state_dict(state, policy_only=policy_only)
        if not policy_only:
            self.config = dataclasses.replace(self.config, entropy=state["bonus"].item())


algorithms.register("fading", FadingConfig, FadingMAPPO)
methods.register(
    methods.Method("fading-goals", "rule-goals, learnt by FadingMAPPO", "hungarian", "hungarian", algorithm="fading")
)

if __name__ == "__main__":
    raise SystemExit(main())
