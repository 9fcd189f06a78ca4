"""An executor of one's own: it follows the shortest path, so that one sees what a perfect walker would reach."""

import numpy as np

from echelon.building import build_worlds
from echelon.configs import RunConfig
from echelon.envs import WarehouseConfig
from echelon.subgoals import FEATURES, SubgoalConfig


class PathFollower:
    """Takes the first move that shortens its path, or now and then any legal one, lest two block each other."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)

    def act(self, worlds, *, greedy=False):
        """Moves for all agents of all worlds, int8 `(W, A)`."""
        route = worlds.obs[:, :, -FEATURES + 15 : -1]  # north, east, south, west: 1 where it shortens the path
        good = np.concatenate([np.zeros_like(route[:, :, :1]), route > 0], 2)
        chance = self.rng.random(good.shape) * worlds.mask
        stuck = self.rng.random(good.shape[:2]) < 0.1
        return np.where(stuck, chance.argmax(2), good.argmax(2)).astype(np.int8)


def main(episodes=100):
    """Play each world's first episode under optimal assignment; print the share of successes."""
    config = RunConfig(method="rule-goals", env=WarehouseConfig(size=20), subgoals=SubgoalConfig(guidance="route"))
    worlds = build_worlds(config, num_envs=episodes, seed=1, training=False)
    worlds.start()
    executor, success, running = PathFollower(), 0, np.ones(episodes, bool)
    while running.any():
        worlds.advance(executor.act(worlds))
        success += int((worlds.env.terminated & running).sum())
        running &= ~worlds.settle()
        worlds.active = running
    print(f"{success} of {episodes} episodes succeeded")


if __name__ == "__main__":
    main()
