"""What a curve and recorded episodes say: by hand, and against a slow version that walks through each episode."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.envs import make
from echelon.shaping import Behaviour, Recording, behaviour, curve_features, evidence, flags

few = settings(max_examples=60)
STRIDE = 10


def record(cells: Any, targets: Any = None, reward: Any = None, begins: Any = None, **more: Any) -> Recording:
    """One world's recording; cells `(T, A)`."""
    at = np.array(cells)[:, None]
    T, _, _ = at.shape
    return Recording(
        at,
        np.full_like(at, -1) if targets is None else np.array(targets)[:, None],
        np.zeros((T, 1), np.float32) if reward is None else np.array(reward, np.float32)[:, None],
        np.zeros((T, 1), bool) if begins is None else np.array(begins, bool)[:, None],
        STRIDE,
        more.pop("free_cells", 100),
        **more,
    )


# -- behaviour by hand ----------------------------------------------------------------------------------------------


def test_moves_by_hand() -> None:
    # East, back, east, back, stay, south: five cells would have been possible at least, three were walked on.
    stats = behaviour(record([[11], [12], [11], [12], [11], [11], [21]]))
    assert stats.episodes == 1
    assert stats.steps == 7
    assert stats.coverage == pytest.approx(3 / 7)
    assert stats.idle == pytest.approx(1 / 6)
    assert stats.backtrack == pytest.approx(3 / 6)
    assert stats.oscillation == pytest.approx(2 / 6)
    assert stats.repeated == pytest.approx(3 / 6)
    assert behaviour(record([[11], [12], [11], [12], [11], [11], [21]], free_cells=4)).coverage == 3 / 4


def test_a_round_trip_repeats_without_going_straight_back() -> None:
    stats = behaviour(record([[11], [12], [22], [21], [11]]))
    assert (stats.backtrack, stats.repeated) == (0, 1 / 4)
    # Seven steps later it isn't remembered any more.
    assert behaviour(record([[11], [12], [13], [14], [24], [23], [22], [21], [11]])).repeated == 0


def test_nothing_reaches_across_episodes() -> None:
    stats = behaviour(record([[11], [12], [11], [12]], begins=[1, 0, 1, 0]))
    assert (stats.episodes, stats.steps) == (2, 2)
    assert (stats.backtrack, stats.repeated, stats.idle) == (0, 0, 0)
    assert stats.coverage == 1


def test_goals_by_hand() -> None:
    # Two agents; goals 3 and 1 away, then 2 and 0 for a common goal, then one has none.
    stats = behaviour(
        record([[11, 44], [12, 45], [13, 45]], [[14, 45], [34, 34], [34, -1]], [0, 1, 1]),
    )
    ways = [3, 1, 2 + 2, 1 + 1, 2 + 1]
    assert stats.goal_distance == pytest.approx(np.mean(ways))
    assert stats.near_steps == pytest.approx(2 / 6)
    assert (stats.near_episodes, stats.failed_near) == (1, 0)
    assert stats.same_target == 1 / 2
    assert stats.target_switches == pytest.approx(2 / 4)
    shares = np.array([1, 1, 3]) / 5
    assert stats.target_entropy == pytest.approx(-(shares * np.log(shares)).sum() / math.log(3))
    assert (stats.events, stats.task_return) == (2, 2)


def test_steps_that_do_not_count_do_not_count() -> None:
    full = record([[11], [12], [12], [12]], [[12], [12], [-1], [12]], [0, 1, 5, 5])
    part = behaviour(replace(full, live=np.array([[True], [True], [False], [False]])))
    assert part == behaviour(record([[11], [12]], [[12], [12]], [0, 1]))
    nothing = behaviour(replace(full, live=np.zeros((4, 1), bool)))
    assert nothing.episodes == 0
    assert flags(nothing) == ("insufficient_evidence",)


# -- against the slow version ---------------------------------------------------------------------------------------


def slow(r: Recording) -> dict[str, float]:
    T, W, A = r.cells.shape
    episodes: list[tuple[int, list[int]]] = []
    for w in range(W):
        for t in range(T):
            if t == 0 or r.begins[t, w]:
                episodes.append((w, []))
            if r.live is None or r.live[t, w]:
                episodes[-1][1].append(t)
    episodes = [e for e in episodes if e[1]]
    count = dict.fromkeys(
        ("moves", "idle", "back", "swing", "again", "near", "steps", "pairs", "same", "switch", "bump"), 0
    )
    ways: list[int] = []
    cover, near_some, failed, entropy, events, total = [], [], [], [], [], []
    for w, rows in episodes:
        goals: dict[int, int] = {}
        close = False
        for a in range(A):
            path = [int(r.cells[t, w, a]) for t in rows]
            aims = [int(r.targets[t, w, a]) for t in rows]
            for i, (cell, aim) in enumerate(zip(path, aims, strict=True)):
                count["steps"] += 1
                count["bump"] += bool(r.bumped is not None and r.bumped[rows[i], w, a])
                if aim >= 0:
                    way = abs(cell // STRIDE - aim // STRIDE) + abs(cell % STRIDE - aim % STRIDE)
                    ways.append(way)
                    count["near"] += way <= 2
                    close |= way <= 2
                    goals[aim] = goals.get(aim, 0) + 1
                if i == 0:
                    continue
                count["moves"] += 1
                count["switch"] += aims[i - 1] >= 0 and aim >= 0 and aims[i - 1] != aim
                moved = path[i - 1] != cell
                count["idle"] += not moved
                back = moved and i > 1 and path[i - 2] == cell
                count["back"] += back
                count["swing"] += back and i > 2 and path[i - 3] == path[i - 1] != path[i - 2]
                count["again"] += moved and cell in path[max(0, i - 6) : i - 1]
        for t in rows:
            aims = [int(x) for x in r.targets[t, w] if x >= 0]
            count["pairs"] += len(aims) * (len(aims) - 1) // 2
            count["same"] += sum(x == y for x, y in combinations(aims, 2))
        free = int(np.broadcast_to(r.free_cells, (W,))[w])
        cover.append(len({int(c) for t in rows for c in r.cells[t, w]}) / min(free, len(rows) * A))
        gained = sum(r.reward[t, w] > 0 for t in rows)
        near_some.append(close)
        if close:
            failed.append(gained == 0)
        if goals:
            shares = np.array(list(goals.values())) / sum(goals.values())
            entropy.append(-(shares * np.log(shares)).sum() / math.log(max(len(goals), 2)))
        else:
            entropy.append(0.0)
        events.append(gained)
        total.append(sum(float(r.reward[t, w]) for t in rows))

    def share(of: str, whole: str) -> float:
        return count[of] / count[whole] if count[whole] else 0.0

    return {
        "episodes": len(episodes), "steps": np.mean([len(rows) for _, rows in episodes]), "coverage": np.mean(cover),
        "idle": share("idle", "moves"), "backtrack": share("back", "moves"), "oscillation": share("swing", "moves"),
        "repeated": share("again", "moves"), "goal_distance": np.mean(ways) if ways else -1,
        "near_steps": share("near", "steps"), "near_episodes": np.mean(near_some),
        "failed_near": np.mean(failed) if failed else 0, "same_target": share("same", "pairs"),
        "target_entropy": np.mean(entropy) if ways else 0, "target_switches": share("switch", "moves"),
        "bumped": share("bump", "steps"), "events": np.mean(events), "task_return": np.mean(total),
    }  # fmt: skip


@few
@given(st.integers(0, 2**32 - 1), st.integers(1, 14), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_statistics_agree_with_a_walk_through_each_episode(seed, T, W, A, cut) -> None:
    rng = np.random.default_rng(seed)
    live = None
    if cut:
        live = np.arange(T)[:, None] < rng.integers(1, T + 1, W)
    r = Recording(
        rng.choice([11, 12, 21, 22], (T, W, A)), rng.choice([-1, 11, 15, 33], (T, W, A)),
        rng.choice([0.0, 0.0, 1.0], (T, W)), rng.random((T, W)) < 0.2, STRIDE, rng.integers(4, 9, W),
        rng.random((T, W, A)) < 0.3, live,
    )  # fmt: skip
    assert asdict(behaviour(r)) == pytest.approx(slow(r))


def test_a_recording_of_a_real_world() -> None:
    env = make("warehouse", size=8, num_agents=3, num_envs=4, seed=0, limit=25, num_packages=3)
    rng = np.random.default_rng(0)
    rows: list[list[Any]] = [[], [], [], [], []]
    begins = np.ones(4, bool)
    for _ in range(60):
        before = (env.pos.copy(), env.nearest_goal(), begins)
        begins = env.step(rng.integers(0, 5, (4, 3), np.int8))
        for row, value in zip(rows, (*before, env.reward.copy(), env.bumped.copy()), strict=True):
            row.append(value)
    cells, targets, starts, reward, bumped = (np.stack(row) for row in rows)
    free = ((env.grid & 1) == 0).sum(1)
    r = Recording(cells, targets, reward, starts, env.stride, free, bumped)
    stats = behaviour(r)
    assert stats.episodes >= 12
    assert 0 < stats.coverage < 1
    assert stats.steps <= 25
    text = json.dumps(evidence([0, 0.5, 1], stats, best_return=3))
    assert json.loads(text)["behaviour"]["episodes"] == stats.episodes


# -- flags and curves -----------------------------------------------------------------------------------------------

FINE = Behaviour(10, 50.0, 0.5, 0.1, 0.1, 0.05, 0.2, 4.0, 0.2, 1.0, 0.1, 0.3, 0.8, 0.1, 0.05, 3.0, 3.0)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"episodes": 2}, "insufficient_evidence"),
        ({"coverage": 0.24}, "low_coverage"),
        ({"near_episodes": 0.5}, "goal_discovery_failure"),
        ({"failed_near": 0.5}, "near_goal_failure"),
        ({"same_target": 0.71, "events": 1.0}, "over_concentration"),
        ({"backtrack": 0.36}, "unstable_behavior"),
        ({"repeated": 0.46}, "unstable_behavior"),
        ({"idle": 0.51}, "idle_team"),
        ({"bumped": 0.21}, "blocked_traffic"),
    ],
)
def test_each_flag_by_itself(change: dict[str, Any], flag: str) -> None:
    assert flags(FINE) == ()
    assert flags(replace(FINE, **change)) == (flag,)


def test_teams_that_crowd_and_succeed_are_not_blamed() -> None:
    assert flags(replace(FINE, same_target=0.9, events=1.1)) == ()


@pytest.mark.parametrize(
    ("curve", "stage"),
    [
        ([0.1, 0.2], "uncertain"),
        ([], "uncertain"),
        ([0, 0, 0, 0, 0.01, 0], "exploration"),
        ([0, 0.1, 0.2, 0.3, 0.4, 0.5], "acceleration"),
        ([0.1, 0.5, 0.5, 0.5, 0.5, 0.5], "plateau"),
        ([0.1, 0.8, 0.6, 0.4, 0.4, 0.3], "regression"),
        ([0.4, 0.0, 0.0, 0.0, 0.0, 0.0], "regression"),
    ],
)
def test_where_a_curve_stands(curve: list[float], stage: str) -> None:
    assert curve_features(curve).stage == stage
    assert curve_features([8 * x for x in curve], best_return=8).stage == stage


def test_features_by_hand() -> None:
    f = curve_features([0, 0, 2, math.nan, 4, 6], best_return=10)
    assert (f.points, f.final, f.best) == (5, 0.6, 0.6)
    assert f.auc == f.last_k == pytest.approx(0.24)
    assert f.zeros == pytest.approx(0.4)
    assert f.first_success == pytest.approx(0.4)
    assert f.slope == pytest.approx(0.2)  # of the last half, .4 and .6
    assert curve_features([0, 0]).first_success == 1


def test_evidence_without_recordings() -> None:
    said = evidence([0.0, 1 / 3])
    assert said["behaviour"] is None
    assert said["flags"] == ["insufficient_evidence"]
    assert said["curve"]["final"] == 0.3333
