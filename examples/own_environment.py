"""An environment of one's own: there is a post for each robot, and all posts must be held at the same time."""

import numpy as np

from echelon.cli import main
from echelon.envs import GridConfig, PlainEnv, register


class Posts(PlainEnv[GridConfig]):
    """A post is a task: free (status 0) or held (1). The team's reward is 1 when all are held."""

    name = "posts"
    task_kind = "post"
    status_words = ("free", "held")
    subgoal_status = None  # going to a post makes sense at any time: who holds one shall stay there

    def _count_tasks(self):
        return self.num_agents

    def rules(self):
        """What a step does in all worlds, agents having moved; arrays are written in place."""
        here = self.at_tasks()  # (worlds, posts, agents)
        held = here.any(2)
        self.task_done_by[:] = np.where(held & (self.task_status == 0), here.argmax(2), -1)
        self.task_status[:] = held
        self.reward[:] = self.terminated[:] = held.all(1)


register(GridConfig, Posts)

if __name__ == "__main__":
    raise SystemExit(main())
