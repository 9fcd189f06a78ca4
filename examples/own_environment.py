"""An environment of one's own: there is a post for each robot, and all posts must be held at the same time."""

import numba
import numpy as np

from echelon.envs import Candidates, GridConfig, GridEnv, Scene, SubgoalKind, TaskView, check_env, register
from echelon.envs.kernels import AGENT, draw_map, resolve_moves, take_free_cell


@numba.njit
def move(grid, pos, actions, offsets, steps, target, collisions, bumped):
    """Move the agents of all worlds; conflicts are resolved and counted."""
    for w in range(len(pos)):
        first = steps[w] % pos.shape[1]
        collisions[w] = resolve_moves(grid[w], pos[w], actions[w], offsets, first, target, bumped[w])


class Posts(GridEnv[GridConfig]):
    """A post is a task: free (status 0) or held (1). The team's reward is 1 when all are held."""

    name = "posts"
    status_words = ("free", "held")
    kind_status = {}  # noqa: RUF012  going to a post makes sense at any time

    def _count_tasks(self):
        return self.num_agents

    def _cells_needed(self):
        return 2 * self.num_agents

    def _build(self):
        self._layout = self._layout_args()

    def _reset_worlds(self, which):
        for w in np.flatnonzero(which):
            label, queue, free = self._scratch
            counter, n = draw_map(self.grid[w], self._layout, label, queue, free, self.keys[w], self.counters[w])
            for i in range(self._cells_needed()):
                take_free_cell(free, n - i, self.keys[w], np.uint64(counter + i))
            self.counters[w] = counter + self._cells_needed()
            # The cells that were drawn stand behind those that are left.
            self.pos[w], self.task_cell[w] = free[n - 2 * self.num_agents : n].reshape(2, -1)
            self.grid[w, self.pos[w]] |= AGENT
        self.steps[which] = self.task_status[which] = self.last_action[which] = 0
        self._observe(which)

    def _advance(self, actions):
        move(self.grid, self.pos, actions, self.offsets, self.steps, self._target, self.collisions, self.bumped)
        self.last_action[:] = actions
        self.steps += 1
        here = self.pos[:, None] == self.task_cell[:, :, None]  # (worlds, posts, agents)
        held = here.any(2)
        self.task_done_by[:] = np.where(held & (self.task_status == 0), here.argmax(2), -1)
        self.task_status[:] = held
        self.reward[:] = self.terminated[:] = held.all(1)
        self.truncated[:] = ~self.terminated & (self.steps >= self.limit)
        self._observe(self._every)

    def candidate_arrays(self, rows):
        """Each agent may go to each post, or wait: the same as `candidates`, as arrays."""
        n, agents = len(rows), self.num_agents
        kind = np.array([*[SubgoalKind.REGION] * agents, SubgoalKind.WAIT], np.int8)
        cells = np.repeat(self.task_cell[rows, None], agents, 1)
        task = np.array([*range(agents), -1], np.int16)
        shape = (n, agents, agents + 1)
        cell = np.concatenate([cells, self.pos[rows, :, None]], 2)
        return Candidates(np.broadcast_to(kind, shape), cell, np.broadcast_to(task, shape))

    def scene(self, i):
        """World `i` as a planner may see it."""
        posts = enumerate(zip(map(self.row_col, self.task_cell[i]), self.task_status[i], strict=True))
        tasks = tuple(TaskView(t, "post", f"post {t}", at, None, self.status_words[s]) for t, (at, s) in posts)
        return Scene(self.name, int(self.steps[i]), self.limit, self.walls(i), self.agent_views(i), tasks)

    @classmethod
    def describe(cls, scene):
        """The scene in words."""
        return "\n".join(f"{task.label} at {task.cell} is {task.status}" for task in scene.tasks)

    @classmethod
    def candidates(cls, scene, agent):
        """The subgoals that make sense for one agent of a scene."""
        posts = [cls._subgoal(SubgoalKind.REGION, task.cell, task.id) for task in scene.tasks]
        return (*posts, cls._subgoal(SubgoalKind.WAIT, scene.agents[agent].cell))


register(GridConfig, Posts)

if __name__ == "__main__":
    findings = check_env("posts", GridConfig(size=10, num_agents=3))
    print("\n".join(findings) or "posts keeps the contract")
