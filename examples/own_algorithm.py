"""A variant of MAPPO: the entropy bonus fades with the updates. Trained in a loop of one's own."""

import dataclasses

from echelon.algorithms import MAPPO
from echelon.configs import RunConfig
from echelon.envs import WarehouseConfig
from echelon.training import Rollouts


class FadingMAPPO(MAPPO):
    """MAPPO whose entropy weight shrinks by a factor after each update."""

    factor = 0.99

    def update(self, buffer):
        """Learn from one rollout, then fade."""
        learnt = super().update(buffer)
        self.config = dataclasses.replace(self.config, entropy=self.factor * self.config.entropy)
        return learnt


def main(updates=20):
    """Train without files; `Rollouts` joins worlds, planner and algorithm."""
    env = WarehouseConfig(size=8, num_agents=2, num_packages=3)
    rollouts = Rollouts(RunConfig(method="rule-goals", env=env, num_envs=64))
    worlds = rollouts.worlds
    rollouts.algorithm = FadingMAPPO(
        rollouts.config.algorithm,
        num_envs=worlds.env.num_envs,
        num_agents=worlds.env.num_agents,
        obs_scale=worlds.obs_scale,
        state_scale=worlds.env.state_scale,
        num_actions=worlds.env.num_actions,
        team_reward=worlds.team_reward,
        seed=rollouts.config.seed,
    )
    worlds.start()
    for update in range(updates):
        rollouts.collect()
        learnt = rollouts.algorithm.update(rollouts.buffer)
        print(update, worlds.take_episodes().success, round(learnt["entropy"], 3))


if __name__ == "__main__":
    main()
