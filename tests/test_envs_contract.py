"""The contract of `GridEnv`: that the worlds keep it, and that `check_env` sees when one doesn't."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from echelon.envs import SubgoalKind, Warehouse, WarehouseConfig, check_env, environments, make
from echelon.envs.search import Search, SearchConfig
from echelon.errors import EchelonError

NAMES = sorted(environments())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": 9, "num_agents": 1, "density": 0.1},
        {"size": 11, "num_agents": 10, "layout": "random", "density": 0.1, "view": 1},
        {"height": 9, "width": 26, "num_agents": 5, "layout": "open", "view": 4},
        {"size": 33, "num_agents": 2, "layout": "shelves", "aisle": 1, "density": 0.4, "view": 3, "limit": 7},
    ],
)
def test_worlds_keep_the_contract(name, settings):
    assert check_env(name, environments()[name](**settings)) == []


class ShuffledCandidates(Warehouse):
    def candidate_arrays(self, rows):
        out = super().candidate_arrays(rows)
        out.task[out.kind == SubgoalKind.FETCH] = 0
        return out


class CommonDice(Warehouse):
    dice = np.random.default_rng(0)

    def _advance(self, actions):
        super()._advance(actions)
        self.obs[0, 0, -1] = self.dice.integers(100)


class LostLastObservation(Warehouse):
    def autoreset(self):
        done = super().autoreset()
        self.final_obs[done] = self.obs[done]
        return done


class PaidForNothing(Warehouse):
    def _advance(self, actions):
        super()._advance(actions)
        self.reward += 0.5


class ForgetfulState(Warehouse):
    _own_state = ("zone_cell",)


class TimeEndsWell(Warehouse):
    def _advance(self, actions):
        super()._advance(actions)
        self.terminated |= self.truncated


class LyingMask(Warehouse):
    def _observe(self, which):
        super()._observe(which)
        self.action_mask[:, :, 2] = 1


class TellTale(Search):
    def scene(self, i):
        scene = super().scene(i)
        first = self.num_tasks
        tasks = list(scene.tasks)
        tasks[first] = dataclasses.replace(tasks[first], cell=self.row_col(self.target_cell[i, 0]))
        return dataclasses.replace(scene, tasks=tuple(tasks))


class NewArrays(Warehouse):
    def _advance(self, actions):
        super()._advance(actions)
        self.reward = self.reward.astype(np.float64)


class Crash(Warehouse):
    @classmethod
    def describe(cls, scene):
        raise ValueError("no words")


class Far(Warehouse):
    def candidate_arrays(self, rows):
        out = super().candidate_arrays(rows)
        out.cell[:] = 0
        return out


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (ShuffledCandidates, "candidate_arrays and candidates(scene) differ"),
        (CommonDice, "two runs of one seed differ in obs_buffer"),
        (LostLastObservation, "final_obs isn't the last observation"),
        (PaidForNothing, "a reward came without progress"),
        (ForgetfulState, "a restored environment goes on differently"),
        (TimeEndsWell, "both terminated and truncated"),
        (LyingMask, "action_mask isn't 1 exactly where"),
        (NewArrays, "reward is float64(3,), it must be float32(3,)"),
        (Crash, "scenes: raised ValueError: no words"),
        (Far, "a candidate's cell can't be reached"),
    ],
)
def test_check_env_sees_what_is_broken(env, words):
    config = WarehouseConfig(size=12, num_agents=3)
    with_words = [finding for finding in check_env(env, config) if words in finding]
    assert with_words, check_env(env, config)


def test_check_env_sees_a_scene_that_tells_too_much():
    findings = check_env(TellTale, SearchConfig(size=20))
    assert any("a scene tells where target 0 is though nobody has seen that cell" in f for f in findings)


def test_check_env_needs_a_known_world_or_a_config():
    with pytest.raises(EchelonError, match="did you mean 'repair'"):
        check_env("repairs")
    with pytest.raises(EchelonError, match="Far isn't registered: give check_env its config too"):
        check_env(Far)
    assert check_env(Warehouse, WarehouseConfig(size=12)) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_agents": 256}, "env.num_agents is 256: it must be 1 to 64"),
        ({"num_agents": 0}, "env.num_agents is 0"),
        ({"size": 4}, "env.size is 4: it must be 5 to 256"),
        ({"size": 257}, "env.size is 257"),
        ({"height": 0}, "env.height is 0: it must be 5 to 256"),
        ({"width": 300}, "env.width is 300"),
        ({"size": 6, "num_agents": 40}, "env.size: a map of 6x6 has room for about"),
        ({"limit": 0}, "env.limit is 0: it must be at least 1"),
        ({"density": 0.5}, "env.density is 0.5: it must be 0 to 0.4"),
        ({"density": float("nan")}, "env.density is nan"),
        ({"view": 6}, "env.view is 6: it must be 1 to 5"),
        ({"aisle": 0}, "env.aisle is 0"),
        ({"layout": "maze"}, "env.layout is maze: it must be shelves, random or open"),
        ({"agents": 3}, "unknown"),
    ],
)
def test_settings_out_of_range_get_one_line(name, settings, words):
    with pytest.raises(EchelonError) as error:
        make(name, **settings)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("warehouse", {"num_packages": 65}, "env.num_packages is 65: it must be 1 to 64"),
        ("warehouse", {"num_zones": 8}, "env.num_zones is 8: it must be 1 to 7"),
        ("search", {"num_targets": 0}, "env.num_targets is 0: it must be 1 to 64"),
        ("search", {"sensor": 9}, "env.sensor is 9: it must be 1 to 8"),
        ("search", {"regions": 9}, "env.regions is 9: it must be 1 to 8"),
        ("search", {"size": 6, "regions": 7}, "env.regions is 7: it must be 1 to 6"),
        ("repair", {"num_machines": 65}, "env.num_machines is 65: it must be 1 to 64"),
        ("repair", {"num_tools": 8}, "env.num_tools is 8: it must be 1 to 7"),
        ("repair", {"locked": 1.5}, "env.locked is 1.5: it must be 0 to 1"),
    ],
)
def test_each_world_checks_its_own_settings(name, settings, words):
    with pytest.raises(EchelonError) as error:
        make(name, **settings)
    assert words in str(error.value)


def test_the_largest_team_and_the_smallest_batch():
    env = make("warehouse", num_agents=64, size=24)
    for _ in range(5):
        env.step(np.random.default_rng(0).integers(0, 5, (1, 64)))
    ids = env.obs[0, :, 2 * 25 + 6 : 2 * 25 + 12]
    assert len({tuple(bits) for bits in ids.tolist()}) == 64
    with pytest.raises(EchelonError, match="num_envs is 0"):
        make("warehouse", num_envs=0)
    with pytest.raises(EchelonError, match="seed is -1"):
        make("warehouse", seed=-1)


@pytest.mark.parametrize("name", NAMES)
def test_a_misfit_state_changes_nothing(name):
    env = make(name, num_envs=2)
    before, other = env.state_dict(), make(name, num_envs=2, size=21, seed=9).state_dict()
    for bad in (other, {**before, "pos": before["pos"][:1]}, {**before, "obs_buffer": before["obs_buffer"] * 1.0}, {}):
        with pytest.raises(EchelonError, match=f"doesn't fit this {name} environment"):
            env.load_state_dict(bad)
        assert all((array == before[key]).all() for key, array in env.state_dict().items())


def test_open_subgoals_follow_status_and_holder():
    env = make("warehouse", num_agents=2, num_packages=3)
    env.task_status[0] = [0, 1, 2]
    env.carrying[0] = [1, -1]

    def is_open(kind, task):
        kinds, tasks = np.full((1, 2), kind, np.int8), np.full((1, 2), task, np.int16)
        return env.subgoals_open(kinds, tasks, np.zeros((1, 2), bool))[0].tolist()

    # Agent 0 carries package 1 and has no hand free.
    assert is_open(SubgoalKind.FETCH, 0) == [False, True]
    assert is_open(SubgoalKind.FETCH, 1) == is_open(SubgoalKind.FETCH, 2) == [False, False]
    assert is_open(SubgoalKind.DELIVER, 1) == [True, False]
    assert is_open(SubgoalKind.DELIVER, 0) == is_open(SubgoalKind.DELIVER, 2) == [False, False]
    assert is_open(SubgoalKind.WAIT, -1) == is_open(SubgoalKind.CELL, -1) == is_open(-1, -1) == [True, True]
    # A kind that this world has no rule for.
    assert is_open(SubgoalKind.CELL, 2) == [True, True]


def test_the_same_seed_gives_the_same_maps_and_another_seed_others():
    grids = [make("search", num_envs=4, seed=seed).grid for seed in (1, 1, 2)]
    assert (grids[0] == grids[1]).all()
    assert (grids[0] != grids[2]).any(1).all()
    assert len({grid.tobytes() for grid in grids[0]}) == 4
