"""The rules of each world by hand, on small maps."""

from __future__ import annotations

import numpy as np
import pytest

from echelon.envs import SubgoalKind, make

N, E, S, W = 1, 2, 3, 4
PAD = "@" * 12


@pytest.fixture
def world(tmp_path):
    """A function that builds a world on a map of the given rows."""

    def build(name, rows, **settings):
        path = tmp_path / "hand.map"
        path.write_text(f"type octile\nheight {len(rows)}\nwidth {len(rows[0])}\nmap\n" + "\n".join(rows) + "\n")
        return make(name, map=path, **settings)

    return build


def go(env, *moves):
    """Step world 0 with one list of moves a step; the rewards."""
    rewards = []
    for move in moves:
        env.advance(np.array([[move] if isinstance(move, int) else move], np.int8))
        rewards.append(float(env.reward[0]))
    return rewards


# -- warehouse ------------------------------------------------------------------------------------------------------


def test_warehouse_fetch_and_deliver(world):
    env = world("warehouse", ["A.P........Z", PAD], num_agents=1, num_packages=1, num_zones=1, view=1, limit=40)
    assert go(env, E) == [0]
    assert (env.carrying[0, 0], env.task_status[0, 0], env.task_done_by[0, 0]) == (-1, 0, -1)
    go(env, E)
    assert (env.carrying[0, 0], env.task_status[0, 0], env.task_done_by[0, 0]) == (0, 1, 0)
    assert env.load_goal[0, 0] == env.task_goal[0, 0] == env.cell_index(0, 11)
    assert env.scene(0).agents[0].carrying == 0
    assert [s.kind for s in env.candidates(env.scene(0), 0)] == [SubgoalKind.DELIVER]
    rewards = go(env, *[E] * 9)
    assert rewards == [0] * 8 + [1]
    assert (env.carrying[0, 0], env.task_status[0, 0], env.task_done_by[0, 0]) == (-1, 2, 0)
    assert env.terminated[0]
    assert not env.truncated[0]
    assert "1 of 1 packages are delivered" in env.describe(env.scene(0))


def test_warehouse_one_package_at_a_time_and_time_runs_out(world):
    env = world("warehouse", ["A.PP.......Z", PAD], num_agents=1, num_packages=2, num_zones=1, view=1, limit=4)
    go(env, E, E)
    first = int(env.carrying[0, 0])
    go(env, E)
    assert env.carrying[0, 0] == first
    assert sorted(env.task_status[0]) == [0, 1]
    assert not env.truncated[0]
    go(env, 0)
    assert env.truncated[0]
    assert not env.terminated[0]


def test_warehouse_zones_leave_marked_cells_to_others(world):
    rows = ["ZA..........", "PP.........."]
    env = world("warehouse", rows, num_agents=1, num_packages=2, num_zones=1, num_envs=5)
    assert (env.pos == env.cell_index(0, 1)).all()
    assert all(sorted(cells) == [env.cell_index(1, 0), env.cell_index(1, 1)] for cells in env.task_cell)


# -- search ---------------------------------------------------------------------------------------------------------


def test_search_sees_what_no_wall_hides(world):
    rows = ["A..@........", "............", "............", "............"]
    env = world("search", rows, num_agents=1, num_targets=1, sensor=4, regions=2, view=1)
    seen = env.scene(0).seen
    assert seen[0, :4].all()
    assert not seen[0, 4]  # behind the wall
    assert seen[1, 2]
    assert seen[1, 3]  # 1 + 9 is less than 16
    assert not seen[3, 3]  # 9 + 9 isn't
    assert not seen[1, 4]  # nor is 1 + 16
    assert seen[3, 2]
    env = world("search", rows, num_agents=1, num_targets=1, sensor=1, regions=2, view=1)
    assert env.scene(0).seen.sum() == 1 + 3  # the wall is known; the agent's cell and two beside it


def test_search_finds_a_target_when_its_cell_is_seen(world):
    rows = ["A..........P", PAD]
    env = world("search", rows, num_agents=1, num_targets=1, sensor=3, regions=2, view=2, limit=30)
    scene = env.scene(0)
    target = scene.tasks[-1]
    assert (target.kind, target.status, target.cell) == ("target", "hidden", None)
    assert [task.status for task in scene.tasks[:4]] == ["open", "open", "explored", "explored"]
    assert env.task_cell[0, 0] == env.cell_index(0, 4)
    assert env.obs[0, 0, -1] == 0
    assert go(env, *[E] * 7) == [0] * 7
    assert not env.new_info[0]
    assert go(env, E) == [1]
    assert env.new_info[0]
    assert env.terminated[0]
    assert env.task_done_by[0].tolist() == [-1, 0, -1, -1]
    assert env.scene(0).tasks[-1].cell == (0, 11)
    assert env.obs[0, 0, -1] == 127
    assert "1 of 1 targets are found" in env.describe(env.scene(0))


def test_search_a_target_in_sight_of_the_start_is_found_by_the_first_step(world):
    env = world("search", ["AP..", "...."], num_agents=1, num_targets=1, sensor=8, regions=1, view=1)
    assert env.scene(0).seen.sum() == 7
    assert not env.terminated[0]
    assert go(env, 0) == [1]
    assert env.terminated[0]


@pytest.mark.parametrize("size", [5, 7, 12, 20])
def test_search_every_target_brings_its_reward(size):
    env = make("search", num_envs=30, size=size, num_agents=2, num_targets=4, sensor=8, density=0.1, layout="open")
    assert not env.target_found.any()
    assert not env.reward.any()
    gained = np.zeros(30)
    finished = np.zeros(30, bool)
    rng = np.random.default_rng(0)
    for _ in range(10 * size):
        env.advance(rng.integers(0, 5, (30, 2)).astype(np.int8))
        gained += np.where(finished, 0, env.reward)
        finished |= env.terminated
    assert (gained == env.target_found.sum(1)).all()
    assert (finished == (gained == 4)).all()
    assert finished.mean() > 0.3


def test_search_nothing_shows_where_hidden_targets_are():
    env = make("search", num_envs=6, seed=2)
    before = env.state_dict()
    free = [np.flatnonzero((env.grid[w] & 8 > 0) & (env.grid[w] & 4 == 0)) for w in range(6)]
    moved = {name: array.copy() for name, array in before.items()}
    for w in range(6):
        moved["grid"][w, env.target_cell[w]] &= 255 - 4
        moved["target_cell"][w] = free[w][:6]
        moved["grid"][w, free[w][:6]] |= 4
    shown = [(repr(env.scene(w)), env.describe(env.scene(w))) for w in range(6)]
    env.load_state_dict(moved)
    env._observe(np.ones(6, bool))
    assert shown == [(repr(env.scene(w)), env.describe(env.scene(w))) for w in range(6)]
    assert (env.obs == before["obs_buffer"]).all()
    states = [np.zeros((6, env.state_size), np.int8) for _ in range(2)]
    env.states(states[0])
    env.load_state_dict(before)
    env.states(states[1])
    assert (states[0] == states[1]).all()


def test_search_targets_hide_from_the_first_look():
    env = make("search", num_envs=50, num_agents=8)
    # Walls aside, a cell of a target lies outside of what was seen at the start; no start is beside a target.
    for w in range(50):
        rows, cols = env.row_of[env.pos[w]], env.col_of[env.pos[w]]
        for cell in env.target_cell[w]:
            assert (abs(rows - env.row_of[cell]) + abs(cols - env.col_of[cell])).min() > 1


# -- repair ---------------------------------------------------------------------------------------------------------


def test_repair_needs_the_tool_in_hand(world):
    rows = ["A.Z..P......", PAD]
    env = world("repair", rows, num_agents=1, num_machines=1, num_tools=1, view=1)
    machine, tool = env.scene(0).tasks
    assert (machine.kind, machine.status, machine.needs, machine.locked_by) == ("machine", "broken", 1, None)
    assert (tool.kind, tool.status, tool.cell) == ("tool", "rack", (0, 2))
    assert [s.kind for s in env.candidates(env.scene(0), 0)] == [SubgoalKind.TOOL, SubgoalKind.WAIT]
    go(env, E, E)
    assert (env.carrying[0, 0], env.load_goal[0, 0]) == (1, -1)
    assert env.task_done_by[0].tolist() == [-1, 0]
    go(env, 0)
    assert env.task_done_by[0].tolist() == [-1, -1]
    assert [s.kind for s in env.candidates(env.scene(0), 0)] == [SubgoalKind.REPAIR, SubgoalKind.WAIT]
    assert go(env, E, E, E) == [0, 0, 1]
    assert env.task_done_by[0].tolist() == [0, -1]
    assert env.terminated[0]


def test_repair_without_the_tool_nothing_happens(world):
    env = world("repair", ["AP..Z.......", PAD], num_agents=1, num_machines=1, num_tools=1, view=1)
    assert go(env, E, E) == [0, 0]
    assert env.task_status[0, 0] == 0


def lock_world(world):
    """Machines 0 and 1 both at hand, 1 locked by 0; two tools: 0 needs task 2, 1 needs task 3."""
    env = world("repair", [".ZPPZA......", PAD], num_agents=1, num_machines=2, num_tools=2, view=1, locked=1.0)
    for seed in range(200):
        env.reseed(seed)
        places = [env.row_col(c)[1] for c in env.task_cell[0]]
        if places == [2, 3, 1, 4] and env.task_need[0].tolist() == [2, 3, -1, -1]:
            return env
    raise AssertionError("no seed gives the world that the test is about")


def test_repair_locks_open_in_order(world):
    env = lock_world(world)
    assert env.task_status[0].tolist() == [0, 1, 3, 3]
    assert env.task_lock[0].tolist() == [-1, 0, -1, -1]
    words = env.describe(env.scene(0))
    assert "Machine 0 at (0, 2) is broken and needs tool 2; its repair unlocks machine 1." in words
    assert "Machine 1 at (0, 3) is broken and needs tool 3; it is locked until machine 0 is repaired." in words
    # Through the rack of tool 3, over machine 1 (locked: nothing), over machine 0 (wrong tool: nothing).
    assert go(env, W, W, W) == [0, 0, 0]
    assert env.carrying[0, 0] == 3
    assert env.task_status[0].tolist() == [0, 1, 3, 3]
    # Tool 2 takes the place of tool 3.
    assert go(env, W, E) == [0, 1]
    assert env.carrying[0, 0] == 2
    assert env.task_status[0].tolist() == [2, 0, 3, 3]
    assert env.new_info[0]
    assert go(env, E, E, W) == [0, 0, 1]
    assert env.terminated[0]


def is_open(env, kind, task):
    out = np.zeros((1, env.num_agents), bool)
    shape = (1, env.num_agents)
    return env.subgoals_open(np.full(shape, kind, np.int8), np.full(shape, task, np.int16), out)[0].tolist()


def test_repair_subgoals_fail_when_the_tool_is_lost_or_of_no_use(world):
    env = lock_world(world)
    assert is_open(env, SubgoalKind.REPAIR, 0) == [False]  # no tool
    assert is_open(env, SubgoalKind.TOOL, 2) == [True]
    assert is_open(env, SubgoalKind.TOOL, 3) == [False]  # its only machine is locked
    assert is_open(env, SubgoalKind.WAIT, -1) == [True]
    go(env, W, W, W, W)
    assert is_open(env, SubgoalKind.REPAIR, 0) == [True]
    assert is_open(env, SubgoalKind.REPAIR, 1) == [False]
    go(env, E)
    assert is_open(env, SubgoalKind.REPAIR, 0) == [False]  # done
    assert is_open(env, SubgoalKind.TOOL, 2) == [False]
    assert is_open(env, SubgoalKind.TOOL, 3) == [True]
    go(env, E, E)
    assert is_open(env, SubgoalKind.REPAIR, 1) == [True]
    go(env, W, W, W)
    assert env.carrying[0, 0] == 2
    assert env.task_status[0, 1] == 2  # repaired on the way


@pytest.mark.parametrize("locked", [0.0, 0.4, 1.0])
def test_repair_locks_are_a_forest(locked):
    env = make("repair", num_envs=200, num_machines=8, locked=locked)
    shut = env.task_lock[:, :8] >= 0
    assert (env.task_lock[:, :8] < np.arange(8)).all(), "a machine's lock comes before it: no circle"
    assert (shut == (env.task_status[:, :8] == 1)).all()
    assert abs(shut[:, 1:].mean() - locked) < 0.05
    assert not shut[:, 0].any()
    assert (env.task_goal[:, :8] == np.take_along_axis(env.task_cell, env.task_need[:, :8].astype(int), 1)).all()


# -- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["warehouse", "search", "repair"])
def test_descriptions_name_every_agent_and_are_plain_numbers(name):
    env = make(name, num_agents=5, seed=3)
    words = env.describe(env.scene(0))
    for a, cell in enumerate(env.scene(0).agents):
        assert f"Robot {a} is at {cell.cell}" in words
    assert "np." not in words
    assert "np." not in repr([env.candidates(env.scene(0), a) for a in range(5)])
