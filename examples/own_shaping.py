"""Potential terms of a world of one's own: all posts must be held at once, and until then nothing pays."""

import numpy as np

from echelon import envs, shaping
from echelon.cli import main


class Vigil(envs.PlainEnv[envs.GridConfig]):
    """There is a post for each robot: free (status 0) or held (1)."""

    name = "vigil"
    task_kind = "post"
    status_words = ("free", "held")
    subgoal_status = None
    goals = 1  # the most reward of an episode: shaping is measured by it

    def _count_tasks(self):
        return self.num_agents

    def rules(self):
        """What a step does in all worlds."""
        self.task_status[:] = self.at_tasks().any(2)
        self.reward[:] = self.terminated[:] = self.task_status.all(1)


def compute(env, which, out):
    """Writes the terms of the worlds `which` into `out`, float32 `(worlds, terms)`: 0 to 1, and 1 when all is done."""
    posts, robots = np.divmod(env.task_cell, env.stride), np.divmod(env.pos, env.stride)
    way = sum(abs(r[:, :, None] - p[:, None]) for r, p in zip(robots, posts, strict=True))  # (W, robots, posts)
    held = env.task_status.mean(1)
    approach = 1 - way.min(1).mean(1) / (env.height + env.width - 2)
    spread = (way.argmin(2)[:, :, None] == np.arange(env.num_tasks)).any(1).mean(1)
    out[which] = np.stack([held, approach, spread], 1)[which]


MEANING = {
    "held": "share of the posts that are held",
    "approach": "how near the posts' nearest robots are to them",
    "spread": "share of the posts that are the nearest one of some robot",
}
MODES = {"balanced": (0.5, 0.4, 0.4, 0.2), "go_there": (0.5, 0.1, 0.7, 0.2), "spread_out": (0.5, 0.2, 0.3, 0.5)}
modes = shaping.mode_table(tuple(MEANING), MODES)  # a row: strength, then the terms' weights

envs.register(envs.GridConfig, Vigil)
shaping.register(shaping.TermSet("vigil", MEANING, modes, default="balanced", grid=modes, compute=compute))

if __name__ == "__main__":
    raise SystemExit(main())
