"""The views for PettingZoo and Gymnasium, by their own tests and ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from echelon.envs import environments, make
from echelon.errors import EchelonError

pytest.importorskip("gymnasium")
pytest.importorskip("pettingzoo")

from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import DictInfoToList, RecordEpisodeStatistics
from pettingzoo.test import parallel_api_test, parallel_seed_test

from echelon.envs.adapters import ParallelView, VectorView, picture, to_parallel_env, to_vector_env

NAMES = sorted(environments())
SMALL = {"size": 12, "num_agents": 3, "limit": 40}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("error")
def test_pettingzoos_own_tests(name):
    parallel_api_test(to_parallel_env(name, **SMALL), num_cycles=100)
    parallel_seed_test(lambda: to_parallel_env(name, **SMALL), num_cycles=60)


def parallel_episode(env, seed):
    record = []
    obs, _ = env.reset(seed=seed)
    rng = np.random.default_rng(0)
    while env.agents:
        legal = {a: rng.choice(np.flatnonzero(obs[a]["action_mask"])) for a in env.agents}
        obs, reward, terminated, truncated, info = env.step(legal)
        arrays = [array for agent in obs.values() for array in agent.values()] + [env.state()]
        record.append(([a.tobytes() for a in arrays], reward, terminated, truncated, info))
    return record


@pytest.mark.parametrize("name", NAMES)
def test_one_seed_gives_one_whole_episode(name):
    env, other = to_parallel_env(name, **SMALL), to_parallel_env(name, seed=5, **SMALL)
    other.reset()
    first = parallel_episode(env, 7)
    assert parallel_episode(other, 7) == first == parallel_episode(env, 7)
    assert parallel_episode(env, 8) != first
    assert first[-1][3] == {f"robot_{a}": not first[-1][2][f"robot_{a}"] for a in range(3)}


def test_a_parallel_view_is_the_world_behind_it():
    env = to_parallel_env("warehouse", seed=3, **SMALL)
    twin = make("warehouse", seed=3, **SMALL)
    env.reset()
    obs, _ = env.reset()
    twin.reset()
    twin.reset()
    for t in range(40):
        moves = np.random.default_rng(t).integers(0, 5, (1, 3))
        twin.advance(moves.astype(np.int8))
        obs, reward, terminated, truncated, _ = env.step({f"robot_{a}": moves[0, a] for a in range(3)})
        for a in range(3):
            assert (obs[f"robot_{a}"]["observation"] == twin.obs[0, a]).all()
            assert (obs[f"robot_{a}"]["action_mask"] == twin.action_mask[0, a]).all()
        assert set(reward.values()) == {float(twin.reward[0])}
    assert set(truncated.values()) == {True}
    assert set(terminated.values()) == {False}
    assert env.agents == []
    with pytest.raises(EchelonError, match="call reset"):
        env.step({})


def test_bad_actions_get_one_line():
    env = to_parallel_env("warehouse", **SMALL)
    env.reset()
    with pytest.raises(EchelonError, match="no action for robot_1, robot_2"):
        env.step({"robot_0": 0})
    with pytest.raises(EchelonError, match="integers from 0 to 4"):
        env.step({"robot_0": 0, "robot_1": 5, "robot_2": 0})
    with pytest.raises(EchelonError, match="actions must be"):
        to_vector_env("warehouse", num_envs=2, **SMALL).step(np.zeros((2, 2), int))
    with pytest.raises(EchelonError, match="one world, this batch has 2"):
        ParallelView(make("warehouse", num_envs=2))


@pytest.mark.parametrize("name", NAMES)
def test_a_vector_view_keeps_gymnasiums_promises(name):
    envs, twin = to_vector_env(name, num_envs=4, seed=1, **SMALL), make(name, num_envs=4, seed=6, **SMALL)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert envs.single_action_space.nvec.tolist() == [5, 5, 5]
    assert envs.action_space.shape == (4, 3)
    obs, info = envs.reset(seed=6)
    assert info == {}
    envs.action_space.seed(0)
    ends = 0
    for _ in range(100):
        assert obs in envs.observation_space
        actions = envs.action_space.sample()
        done = twin.step(actions)
        obs, reward, terminated, truncated, info = envs.step(actions)
        assert (obs["observation"] == twin.obs).all()
        assert (obs["action_mask"] == twin.action_mask).all()
        assert (reward == twin.reward).all()
        assert reward.dtype == np.float64
        assert (terminated == twin.terminated).all()
        assert (truncated == twin.truncated).all()
        assert ("final_obs" in info) == done.any()
        if done.any():
            assert (info["_final_obs"] == done).all()
            assert (info["final_info"]["success"] == terminated).all()
            assert (info["final_info"]["steps"][truncated] == 40).all()
            for i in range(4):
                assert (info["final_obs"][i] is None) == (not done[i])
                if done[i]:
                    assert info["final_obs"][i] in envs.single_observation_space
                    assert (info["final_obs"][i]["observation"] == twin.final_obs[i]).all()
            ends += int(done.sum())
    assert ends >= 4
    kept = obs["observation"].copy()
    envs.step(actions)
    assert (obs["observation"] == kept).all(), "what was returned isn't overwritten"


def test_gymnasiums_wrappers_work_on_it():
    envs = RecordEpisodeStatistics(to_vector_env("search", num_envs=3, **SMALL))
    envs.reset(seed=0)
    envs.action_space.seed(0)
    for _ in range(40):
        *_, info = envs.step(envs.action_space.sample())
        if "episode" in info:
            break
    assert info["episode"]["l"].max() <= 40
    listed = DictInfoToList(to_vector_env("search", num_envs=3, **SMALL))
    listed.reset(seed=0)
    for _ in range(40):
        *_, infos = listed.step(listed.action_space.sample())
    assert len(infos) == 3
    assert "VectorView" in repr(listed)


@pytest.mark.parametrize("name", NAMES)
def test_pictures(name):
    env = VectorView(make(name, num_envs=2, **SMALL))
    for world, text in enumerate(env.render()):
        rows = text.split("\n")
        assert [len(row) for row in rows] == [12] * 12
        scene = env.env.scene(world)
        assert text == picture(scene)
        assert all(rows[agent.cell[0]][agent.cell[1]] == str(agent.id) for agent in scene.agents)
        assert sum(row.count("#") for row in rows) == scene.walls.sum()
    assert to_parallel_env(name, **SMALL).render().count("\n") == 11


def run_python(script):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1] / "src")}
    return subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=240)


def test_without_the_extra_there_is_one_clear_line():
    script = (
        "import sys; sys.modules['pettingzoo'] = None\n"
        "from echelon.envs.adapters import to_vector_env\n"
        "from echelon.errors import EchelonError\n"
        "try: to_vector_env('warehouse')\n"
        "except EchelonError as error: print(error)\n"
    )
    run = run_python(script)
    assert run.stdout == "pettingzoo isn't installed: pip install 'echelon-marl[adapters]'\n", run.stderr


def test_nothing_else_imports_gymnasium():
    script = "import sys, echelon.envs; print('gymnasium' in sys.modules)"
    run = run_python(script)
    assert run.stdout == "False\n", run.stderr
