"""`PlainEnv`: worlds whose rules are a few lines of NumPy keep the whole contract."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from echelon.envs import GridConfig, PlainEnv, SubgoalKind, check_env
from echelon.envs.kernels import AGENT, WALL
from echelon.errors import EchelonError

STAY, NORTH, EAST, SOUTH, WEST = range(5)


@dataclass(frozen=True)
class FiresConfig(GridConfig):
    num_fires: int = 3


class Fires(PlainEnv[FiresConfig]):
    """An agent that stays two steps on end at a fire puts it out."""

    name = "fires"
    task_kind = "fire"
    status_words = ("burning", "out")
    subgoal_kind = SubgoalKind.REPAIR
    _own_state = ("water",)

    def _count_tasks(self):
        return self.config.num_fires

    def _build(self):
        super()._build()
        self.water = np.zeros((self.num_envs, self.num_agents), np.int32)

    def begin(self, which):
        self.water[which] = 100

    def rules(self):
        busy = self.at_tasks() & (self.pos == self.last_pos)[:, None]
        out = busy.any(2) & (self.task_status == 0)
        self.task_status[out] = 1
        self.task_done_by[out] = busy.argmax(2)[out]
        self.water -= (busy & out[:, :, None]).any(1)
        self.reward[:] = out.sum(1)
        self.terminated[:] = (self.task_status == 1).all(1)


class Posts(PlainEnv[GridConfig]):
    """There is a post for each agent; all must be held at once, and may be left again."""

    name = "posts"
    task_kind = "post"
    status_words = ("free", "held")
    subgoal_status = None

    def _count_tasks(self):
        return self.num_agents

    def rules(self):
        here = self.at_tasks()
        held = here.any(2)
        self.task_done_by[:] = np.where(held & (self.task_status == 0), here.argmax(2), -1)
        self.task_status[:] = held
        self.reward[:] = self.terminated[:] = held.all(1)


class Reversed(Fires):
    """A task must be watched (status 1) before it is done: agents are sent to those with status 1 alone."""

    name = "reversed"
    status_words = ("out", "burning")
    subgoal_status = 1

    def begin(self, which):
        super().begin(which)
        self.task_status[which] = 1

    def rules(self):
        self.task_status[:] = 1 - self.task_status
        super().rules()
        self.task_status[:] = 1 - self.task_status


SETTINGS = [
    {},
    {"size": 9, "num_agents": 1, "density": 0.1},
    {"size": 11, "num_agents": 10, "layout": "random", "density": 0.1, "view": 1},
    {"height": 9, "width": 26, "num_agents": 5, "layout": "open", "view": 4},
    {"size": 33, "num_agents": 2, "layout": "shelves", "aisle": 1, "density": 0.4, "view": 3, "limit": 7},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("env", [Fires, Posts, Reversed])
def test_plain_worlds_keep_the_contract(env, settings):
    config = GridConfig(**settings) if env is Posts else FiresConfig(**settings)
    assert check_env(env, config) == []


def map_file(tmp_path, *rows):
    path = tmp_path / "small.map"
    path.write_text(f"type octile\nheight {len(rows)}\nwidth {len(rows[0])}\nmap\n" + "\n".join(rows) + "\n")
    return path


def step(env, *moves):
    """One step of a single world without its reset."""
    env.advance(np.array([moves], np.int8))


def test_an_episode_by_hand(tmp_path):
    config = FiresConfig(map=map_file(tmp_path, "A.P", "..."), num_agents=1, num_fires=1, limit=4)
    env = Fires(config, 1)
    assert [env.row_col(cell) for cell in (env.pos[0, 0], env.last_pos[0, 0], env.task_cell[0, 0])] == [
        (0, 0), (0, 0), (0, 2),
    ]  # fmt: skip
    assert env.describe(env.scene(0)) == (
        "Fires of 2 rows and 3 columns, step 0 of 4.\nRobot 0 is at (0, 0).\nFire 0 at (0, 2) is burning."
    )
    assert [(s.kind, s.target, s.task, s.text) for s in env.candidates(env.scene(0), 0)] == [
        (SubgoalKind.REPAIR, (0, 2), 0, "repair machine 0 at (0, 2)"),
        (SubgoalKind.WAIT, (0, 0), None, "wait"),
    ]
    assert env.action_mask[0, 0].tolist() == [1, 0, 1, 1, 0]

    step(env, EAST)
    assert env.row_col(env.pos[0, 0]) == (0, 1) and env.row_col(env.last_pos[0, 0]) == (0, 0)
    assert env.last_action[0, 0] == EAST and env.steps[0] == 1
    step(env, EAST)
    # There, but it has not stayed: nothing happened yet.
    assert env.at_tasks().tolist() == [[[True]]]
    assert (env.reward[0], env.terminated[0], env.truncated[0]) == (0, False, False)
    assert env.task_status[0, 0] == 0 and env.task_done_by[0, 0] == -1
    step(env, EAST)  # into the map's border: it stays
    assert (env.reward[0], env.terminated[0], env.truncated[0]) == (1, True, False)
    assert env.task_status[0, 0] == 1 and env.task_done_by[0, 0] == 0 and env.water[0, 0] == 99
    assert [s.kind for s in env.candidates(env.scene(0), 0)] == [SubgoalKind.WAIT]
    assert env.describe(env.scene(0)).endswith("is out.")

    last = env.obs.copy()
    assert env.autoreset().tolist() == [True]
    assert (env.final_obs == last).all()
    assert env.steps[0] == 0 and env.task_status[0, 0] == 0 and env.water[0, 0] == 100
    assert env.last_pos[0, 0] == env.pos[0, 0] == env.cell_index(0, 0)
    for t in range(4):
        assert env.steps[0] == t
        step(env, STAY)
        assert env.truncated[0] == (t == 3)
    assert (env.reward[0], env.terminated[0], env.truncated[0]) == (0, False, True)


def test_success_at_the_time_limit_is_no_truncation(tmp_path):
    path = map_file(tmp_path, "AP", "..")
    env = Fires(FiresConfig(map=path, num_agents=1, num_fires=1, limit=2), 1)
    step(env, EAST)
    step(env, STAY)
    assert env.terminated[0] and not env.truncated[0]


def test_agents_collide_as_everywhere(tmp_path):
    env = Posts(GridConfig(map=map_file(tmp_path, "A.A", "P.P"), num_agents=2), 1)
    left, right = np.argsort(env.pos[0])
    moves = [STAY, STAY]
    moves[left], moves[right] = EAST, WEST
    step(env, *moves)
    # Agent 0 goes first in the first step.
    assert env.collisions[0] == 1 and env.bumped[0].tolist() == [0, 1]
    assert env.row_col(env.pos[0, 0]) == (0, 1)
    assert (env.grid[0] & AGENT).sum() == 2 * AGENT


def test_marks_say_where_agents_and_tasks_may_be(tmp_path):
    path = map_file(tmp_path, "AA....", "..@@..", "P..P.P")
    env = Fires(FiresConfig(map=path, num_agents=2, num_fires=2), 40, seed=3)
    starts = {env.cell_index(0, 0), env.cell_index(0, 1)}
    places = {env.cell_index(2, c) for c in (0, 3, 5)}
    assert all(set(row) == starts for row in env.pos.tolist())
    assert all(set(row) < places for row in env.task_cell.tolist())
    assert {cell for row in env.task_cell.tolist() for cell in row} == places


def test_cells_are_free_distinct_and_all_used_when_there_are_no_more(tmp_path):
    path = map_file(tmp_path, "..", "@.", "..")
    env = Fires(FiresConfig(map=path, num_agents=2, num_fires=3), 8)
    for w in range(8):
        cells = [*env.pos[w].tolist(), *env.task_cell[w].tolist()]
        assert len(set(cells)) == 5
        assert not (env.grid[w, cells] & WALL).any()
    with pytest.raises(EchelonError, match="2 agents and 4 tasks need 6"):
        Fires(FiresConfig(map=path, num_agents=2, num_fires=4), 1)


@pytest.mark.parametrize("count", [-1, 0, 257])
def test_a_number_of_tasks_that_can_not_be_is_refused(count):
    with pytest.raises(EchelonError, match=f"fires has {count} tasks: there must be 1 to 256"):
        Fires(FiresConfig(num_fires=count), 1)


def random_moves(steps, worlds, agents):
    return np.random.default_rng(1).integers(0, 5, (steps, worlds, agents)).astype(np.int8)


def test_a_world_does_not_depend_on_the_batch():
    config = FiresConfig(size=7, num_agents=3, num_fires=2, limit=30)
    together = Fires(config, 8, seed=4)
    alone = [Fires(config, n, seed=4) for n in (1, 5)]
    for moves in random_moves(120, 8, 3):
        together.step(moves)
        whole = together.state_dict()
        for env in alone:
            env.step(moves[: env.num_envs])
            for name, array in env.state_dict().items():
                assert (array == whole[name][: env.num_envs]).all(), name


def test_a_saved_world_goes_on_as_if_it_had_not_stopped():
    config = FiresConfig(size=7, num_agents=3, num_fires=2, limit=30)
    env, other = Fires(config, 4, seed=4), Fires(config, 4, seed=5)
    moves = random_moves(120, 4, 3)
    for move in moves[:50]:
        env.step(move)
    saved = env.state_dict()
    assert {"last_pos", "water"} <= set(saved)
    other.load_state_dict(saved)
    for move in moves[50:]:
        env.step(move)
        other.step(move)
        assert all((array == env.state_dict()[name]).all() for name, array in other.state_dict().items())


@pytest.mark.parametrize("env_class", [Fires, Posts, Reversed])
def test_candidates_of_arrays_and_scenes_agree(env_class):
    config = (GridConfig if env_class is Posts else FiresConfig)(size=6, num_agents=3, limit=40)
    env = env_class(config, 5)
    counts = set()
    for moves in random_moves(80, 5, 3):
        rows = np.array([4, 0, 3])
        arrays = env.candidate_arrays(rows)
        assert (arrays.kind.dtype, arrays.cell.dtype, arrays.task.dtype) == (np.int8, np.int32, np.int16)
        for i, w in enumerate(rows):
            for a in range(3):
                told = [
                    (int(s.kind), env.cell_index(*s.target), -1 if s.task is None else s.task)
                    for s in env.candidates(env.scene(w), a)
                ]
                counts.add(len(told))
                told += [(-1, 0, -1)] * (4 - len(told))
                assert told == list(zip(*(part[i, a].tolist() for part in vars(arrays).values()), strict=True))
        env.step(moves)
    assert counts == {4} if env_class is Posts else {3, 4} <= counts


def test_subgoals_follow_the_status_that_they_need():
    assert Fires.kind_status == {SubgoalKind.REPAIR: 0}
    assert Reversed.kind_status == {SubgoalKind.REPAIR: 1}
    assert Posts.kind_status == {}
    assert type("Late", (Fires,), {}).kind_status is Fires.kind_status
    assert type("Own", (Fires,), {"kind_status": {SubgoalKind.REPAIR: 1}}).kind_status == {SubgoalKind.REPAIR: 1}
    both = {"kind_status": {SubgoalKind.FETCH: 1}, "subgoal_kind": SubgoalKind.FETCH}
    assert type("Both", (Fires,), both).kind_status == {SubgoalKind.FETCH: 1}
    env = Reversed(FiresConfig(num_fires=2, num_agents=2), 1)
    env.task_status[0] = [0, 1]
    task = np.array([[0, 1]], np.int16)
    assert env.subgoals_open(np.full((1, 2), SubgoalKind.REPAIR, np.int8), task, np.zeros((1, 2), bool)).tolist() == [
        [False, True]
    ]
    # What is seen as a thing to go to is the same.
    assert env.nearest_goal().tolist() == [[env.task_cell[0, 1]] * 2]


def test_scenes_tell_of_goals_and_loads():
    env = Fires(FiresConfig(num_agents=2, num_fires=2), 1)
    scene = env.scene(0)
    assert [task.goal for task in scene.tasks] == [None, None]
    env.task_goal[0, 1] = env.cell_index(2, 3)
    env.carrying[0, 0] = 1
    words = env.describe(env.scene(0)).splitlines()
    assert env.scene(0).tasks[1].goal == (2, 3)
    assert words[1].endswith("and carries fire 1.") and words[4].endswith("is burning and belongs at (2, 3).")
    env.reset()
    assert env.scene(0).tasks[1].goal is None and env.scene(0).agents[0].carrying is None
