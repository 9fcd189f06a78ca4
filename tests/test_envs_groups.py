"""Worlds in groups play the same episodes, each in its own time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from echelon.envs import GridConfig, PlainEnv, SubgoalKind, WarehouseConfig
from echelon.envs.base import GridEnv
from echelon.envs.repair import Repair, RepairConfig
from echelon.envs.search import Search, SearchConfig
from echelon.envs.warehouse import Warehouse
from echelon.errors import EchelonError

W, GROUP, LIMIT = 12, 4, 60


class Visits(PlainEnv[GridConfig]):
    """A task is done by whoever steps on it."""

    name = "visits"
    task_kind = "place"
    status_words = ("open", "visited")
    subgoal_kind = SubgoalKind.REPAIR

    def _count_tasks(self) -> int:
        return 1

    def rules(self) -> None:
        new = self.at_tasks().any(2) & (self.task_status == 0)
        self.task_status[new] = 1
        self.reward[:] = new.sum(1)
        self.terminated[:] = (self.task_status == 1).all(1)


SMALL: dict[str, Any] = {"size": 6, "num_agents": 3, "limit": LIMIT}
KINDS: dict[str, tuple[type[GridEnv[Any]], GridConfig]] = {
    "warehouse": (Warehouse, WarehouseConfig(**SMALL, num_packages=1)),
    "search": (Search, SearchConfig(**{**SMALL, "size": 12}, num_targets=3)),
    "repair": (Repair, RepairConfig(**SMALL, num_machines=1)),
    "plain": (Visits, GridConfig(**SMALL)),
}


def build(kind: str, num_envs: int = W, seed: int = 0) -> GridEnv[Any]:
    env, config = KINDS[kind]
    return env(config, num_envs, seed)


def start_of(env: GridEnv[Any], world: int) -> dict[str, bytes]:
    """Everything of a world that isn't how the episode before it went."""
    state = env.state_dict()
    for name in ("keys", "counters", "reward", "terminated", "truncated", "collisions", "task_done_by", "new_info",
                 "bumped", "final_obs"):  # fmt: skip
        state.pop(name)
    return {name: array[world].tobytes() for name, array in state.items() if array.shape[:1] == (env.num_envs,)}


def play(env: GridEnv[Any], steps: int, seed: int) -> tuple[list[list[dict[str, bytes]]], NDArray[np.int64]]:
    """Random moves, some episodes cut short; each world's starts in order, and when its first episode ended."""
    rng = np.random.default_rng(seed)
    starts = [[start_of(env, w)] for w in range(env.num_envs)]
    first_end = np.full(env.num_envs, -1)
    for t in range(steps):
        env.advance(rng.integers(0, 5, (env.num_envs, env.num_agents)).astype(np.int8))
        env.truncated |= ~env.terminated & (rng.random(env.num_envs) < 0.03)
        done = env.autoreset()
        for w in np.flatnonzero(done).tolist():
            starts[w].append(start_of(env, w))
        first_end[done & (first_end < 0)] = t
    return starts, first_end


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_plays_the_same_episodes_though_they_end_at_different_times(kind: str) -> None:
    """The k-th start is the same in all worlds of a group (map, tasks, places, observations), and another elsewhere."""
    env = build(kind)
    env.share_episodes(GROUP)
    starts, first_end = play(env, 4 * LIMIT, 1)
    assert all(len(set(ends)) > 1 for ends in first_end.reshape(-1, GROUP).tolist())
    for world in range(W):
        leader = starts[world // GROUP * GROUP]
        both = min(len(leader), len(starts[world]))
        assert both >= 4 and starts[world][:both] == leader[:both]
    told = [starts[g][k]["grid"] for g in range(0, W, GROUP) for k in range(4)]
    assert len(set(told)) == len(told)


@pytest.mark.parametrize("kind", KINDS)
def test_they_begin_together_again_with_an_episode_that_is_new_to_all(kind: str) -> None:
    """After worlds of a group have played different numbers of episodes, none starts one that any has played."""
    env = build(kind)
    env.share_episodes(GROUP)
    starts, _ = play(env, 2 * LIMIT + 7, 2)
    counts = np.array([len(s) for s in starts]).reshape(-1, GROUP)
    assert (counts.max(1) > counts.min(1)).any()
    seen = {s["grid"] for world in starts for s in world}
    obs = env.share_episodes(GROUP)
    assert obs is env.obs and not env.steps.any() and not (env.terminated | env.truncated | (env.reward != 0)).any()
    again = [start_of(env, w) for w in range(W)]
    assert all(again[w] == again[w // GROUP * GROUP] for w in range(W))
    assert not seen & {s["grid"] for s in again}
    starts, _ = play(env, LIMIT + 1, 3)
    assert all(s[1] == starts[w // GROUP * GROUP][1] for w, s in enumerate(starts))


def test_a_group_plays_what_its_first_world_would_have_played() -> None:
    """Its start doesn't depend on how many groups there are, nor on their size; groups of one are plain worlds."""
    alone = build("warehouse", 3 * GROUP)
    alone.reset()
    shared = build("warehouse", 3 * GROUP)
    shared.share_episodes(GROUP)
    assert start_of(shared, 2 * GROUP + 1) == start_of(alone, 2 * GROUP)
    one = build("warehouse", 3 * GROUP)
    one.share_episodes(1)
    assert [start_of(one, w) for w in range(W)] == [start_of(alone, w) for w in range(W)]


def test_a_group_survives_its_state_dict() -> None:
    """A copy that took the state over goes on with the same shared episodes."""
    env = build("search")
    env.share_episodes(GROUP)
    play(env, LIMIT + 5, 4)
    copy = build("search", seed=9)
    copy.load_state_dict(env.state_dict())
    env.share_episodes(GROUP)
    copy.share_episodes(GROUP)
    assert [start_of(copy, w) for w in range(W)] == [start_of(env, w) for w in range(W)]


@pytest.mark.parametrize("group", [0, -4, 5, 24])
def test_worlds_that_are_no_whole_groups_are_refused(group: int) -> None:
    env = build("warehouse")
    before = env.state_dict()
    with pytest.raises(EchelonError, match=f"num_envs is 12: it must be a multiple of the group's {group} worlds"):
        env.share_episodes(group)
    assert all(np.array_equal(array, before[name]) for name, array in env.state_dict().items())
