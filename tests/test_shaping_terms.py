"""The potential terms of each world: by hand, against a slow version, and at the end of an episode."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from echelon.envs import make
from echelon.errors import EchelonError
from echelon.shaping import PotentialShaper, ShapingRules, TermSet, mode_table, register, shaped_worlds, term_set
from echelon.shaping.base import _REGISTRY

E, W = 2, 4
PAD = "@" * 12
SMALL = {
    "warehouse": {"num_packages": 5, "num_zones": 2},
    "search": {"num_targets": 3, "sensor": 2, "regions": 3},
    "repair": {"num_machines": 5, "num_tools": 3, "locked": 0.5},
}


@pytest.fixture
def world(tmp_path):
    """A function that builds a world on a map of the given rows."""

    def build(name, rows, **settings):
        path = tmp_path / "hand.map"
        path.write_text(f"type octile\nheight {len(rows)}\nwidth {len(rows[0])}\nmap\n" + "\n".join(rows) + "\n")
        return make(name, map=path, **settings)

    return build


def terms(env: Any) -> dict[str, float]:
    known = term_set(env.name)
    return dict(zip(known.names, known.terms(env)[0].tolist(), strict=True))


def go(env: Any, *moves: int) -> None:
    for move in moves:
        env.advance(np.full((1, env.num_agents), move, np.int8))


# -- by hand --------------------------------------------------------------------------------------------------------


def test_a_delivery_by_hand(world) -> None:
    # Twelve columns and two rows: distances are over 12. The package is 2 away, its zone 9 further on.
    env = world("warehouse", ["A.P........Z", PAD], num_agents=1, num_packages=1, num_zones=1, view=1, limit=40)
    begin = terms(env)
    assert begin == pytest.approx(
        {"approach": 10 / 12, "pickup": 0, "carry": 0, "deliv": 0, "spread": 1, "traffic": 1}, abs=1e-6
    )
    go(env, E, E)
    assert terms(env) == pytest.approx(
        {"approach": 1, "pickup": 1, "carry": 3 / 12, "deliv": 0, "spread": 1, "traffic": 1}, abs=1e-6
    )
    go(env, *[E] * 9)
    assert env.terminated[0]
    assert set(terms(env).values()) == {1}  # of the true last state
    env.autoreset()
    assert terms(env) == begin  # of the first state of the next episode


def test_two_robots_that_want_one_package_and_meet(world) -> None:
    rows = ["AA.P.......P", "Z@@@@@@@@@@@"]
    env = world("warehouse", rows, num_agents=2, num_packages=2, num_zones=1, view=1, limit=40)
    now = terms(env)
    assert now["spread"] == 0.5  # both are nearest to the first one
    assert now["traffic"] == 0.5  # the only pair stands side by side
    cells = {env.row_col(int(cell))[1]: a for a, cell in enumerate(env.pos[0])}
    ahead = np.zeros((1, 2), np.int8)
    ahead[0, cells[0]] = E  # the one behind pushes against the other, which stays
    env.advance(ahead)
    assert env.bumped.sum() == 1
    assert terms(env)["traffic"] == 0.25
    # After a reset the push is about an episode that is over.
    env.truncated[:] = True
    env.autoreset()
    assert terms(env)["traffic"] == 0.5


def test_a_search_by_hand(world) -> None:
    env = world("search", ["A.........PP", PAD], num_agents=1, num_targets=2, sensor=2, regions=2, view=1, limit=40)
    # Seen from the first cell: three of twelve. The left half's unseen cells begin 3 columns on; regions of the lower
    # row are walls only, and so explored. The cell nearest to the middle of columns 0 to 5 is 3.
    assert terms(env) == pytest.approx(
        {"found": 0, "seen": 3 / 12, "explored": 2 / 4, "approach": 9 / 12, "spread": 1, "apart": 1}, abs=1e-6
    )
    go(env, *[E] * 8)
    now = terms(env)
    assert now["found"] == 0.5
    assert now["seen"] == pytest.approx(11 / 12)
    go(env, E)
    assert env.terminated[0]
    assert set(terms(env).values()) == {1}


def test_a_repair_by_hand(world) -> None:
    env = world("repair", [".Z..A......P", PAD], num_agents=1, num_machines=1, num_tools=1, locked=0, view=1, limit=40)
    assert terms(env) == pytest.approx(
        {"fetch": 9 / 12, "equipped": 0, "approach": 0, "unlocked": 1, "repaired": 0, "traffic": 1}, abs=1e-6
    )
    go(env, W, W, W)
    assert terms(env) == pytest.approx(
        {"fetch": 1, "equipped": 1, "approach": 2 / 12, "unlocked": 1, "repaired": 0, "traffic": 1}, abs=1e-6
    )
    go(env, *[E] * 10)
    assert env.terminated[0]
    assert set(terms(env).values()) == {1}


# -- against the slow version ---------------------------------------------------------------------------------------


def far(a: Any, b: Any) -> int:
    return abs(a[0] - b[0]) + abs(a[1] - b[1])


def crowd(scene: Any, reach: int) -> float:
    pairs = list(combinations(scene.agents, 2))
    return sum(far(a.cell, b.cell) <= reach for a, b in pairs) / len(pairs) if pairs else 0.0


def slow(env: Any, w: int) -> dict[str, float]:
    """The terms of one world from its scene."""
    scene = env.scene(w)
    norm = env.height + env.width - 2
    robots = scene.agents
    bumped = env.bumped[w].mean() if scene.step else 0.0
    traffic = 1 - 0.5 * crowd(scene, 1) - 0.5 * bumped
    by_status = Counter(task.status for task in scene.tasks)
    if env.name == "warehouse":
        total, done, hand = len(scene.tasks), by_status["delivered"], by_status["carried"]
        waiting = [task for task in scene.tasks if task.status == "waiting"]
        if done == total:
            return dict.fromkeys(term_set(env.name).names, 1.0)
        free = [r for r in robots if r.carrying is None]
        nearest = [min(waiting, key=lambda task, r=r: far(r.cell, task.cell)) for r in free] if waiting else []
        near = [1 - far(r.cell, task.cell) / norm for r, task in zip(free, nearest, strict=False)]
        way = [1 - far(r.cell, scene.tasks[r.carrying].goal) / norm for r in robots if r.carrying is not None]
        some = min(1, len(waiting) / len(free)) if free else 0
        return {
            "approach": (done + hand + sum(near) * some) / total,
            "pickup": (done + hand) / total,
            "carry": (done + sum(way)) / total,
            "deliv": done / total,
            "spread": (len({task.id for task in nearest}) + hand) / min(len(robots), len(waiting) + hand),
            "traffic": traffic,
        }
    if env.name == "search":
        regions = [task for task in scene.tasks if task.kind == "region"]
        is_open = [task for task in regions if task.status == "open"]
        if by_status["hidden"] == 0:
            return dict.fromkeys(term_set(env.name).names, 1.0)
        nearest = [min(is_open, key=lambda task, r=r: far(r.cell, task.cell)) for r in robots] if is_open else []
        near = [1 - far(r.cell, task.cell) / norm for r, task in zip(robots, nearest, strict=False)]
        free = ~scene.walls
        return {
            "found": by_status["found"] / (by_status["found"] + by_status["hidden"]),
            "seen": (scene.seen & free).sum() / free.sum(),
            "explored": 1 - len(is_open) / len(regions),
            "approach": sum(near) / len(robots) if is_open else 1,
            "spread": len({t.id for t in nearest}) / min(len(robots), len(is_open)) if is_open else 1,
            "apart": 1 - crowd(scene, env.config.sensor),
        }
    machines = [task for task in scene.tasks if task.kind == "machine"]
    total, done = len(machines), by_status["repaired"]
    if done == total:
        return dict.fromkeys(term_set(env.name).names, 1.0)
    fetch = equipped = approach = 0.0
    for machine in machines:
        if machine.status == "broken":
            holders = [far(r.cell, machine.cell) for r in robots if r.carrying == machine.needs]
            equipped += bool(holders)
            approach += 1 - min(holders) / norm if holders else 0
            rack = scene.tasks[machine.needs].cell
            fetch += 1 if holders else 1 - min(far(r.cell, rack) for r in robots) / norm
    return {
        "fetch": (done + fetch) / total,
        "equipped": (done + equipped) / total,
        "approach": (done + approach) / total,
        "unlocked": 1 - by_status["locked"] / total,
        "repaired": done / total,
        "traffic": traffic,
    }


@pytest.mark.parametrize("name", sorted(SMALL))
@pytest.mark.parametrize("agents", [1, 3])
def test_terms_agree_with_the_slow_version(name: str, agents: int) -> None:
    env = make(name, size=7, num_agents=agents, num_envs=6, seed=agents, limit=120, density=0.1, **SMALL[name])
    known, rng = term_set(name), np.random.default_rng(1)
    ended = 0
    for t in range(150):
        env.advance(rng.integers(0, 5, (6, agents), np.int8))
        for _ in range(2):  # true last states, then the first ones of new episodes
            now = known.terms(env)
            assert now.dtype == np.float32
            assert now.min() >= 0
            assert now.max() <= 1
            if t % 7 == 0 or (env.terminated | env.truncated).any():
                for w in range(6):
                    expected = slow(env, w)
                    assert dict(zip(known.names, now[w].tolist(), strict=True)) == pytest.approx(expected, abs=1e-6)
            done = env.autoreset()
            if not done.any():
                break
            ended += int(done.sum())
            env.terminated[done] = env.truncated[done] = False
    assert ended >= 6


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_world_has_the_same_terms_whoever_is_beside_it_and_others_are_left_alone(name: str) -> None:
    many = make(name, size=8, num_agents=2, num_envs=4, seed=3, **SMALL[name])
    one = make(name, size=8, num_agents=2, num_envs=1, seed=3, **SMALL[name])
    rng, known = np.random.default_rng(0), term_set(name)
    for _ in range(20):
        actions = rng.integers(0, 5, (4, 2), np.int8)
        many.step(actions)
        one.step(actions[:1])
        assert known.terms(many)[0].tolist() == known.terms(one)[0].tolist()
    out = np.full((4, len(known.names)), 9, np.float32)
    which = np.array([True, False, True, False])
    assert known.terms(many, which, out) is out
    assert (out[~which] == 9).all()
    assert (out[which] == known.terms(many)[which]).all()


# -- a rollout ------------------------------------------------------------------------------------------------------


def test_a_rollout_pays_each_episode_its_own_potentials() -> None:
    env = make("warehouse", size=6, num_agents=2, num_envs=8, seed=0, limit=40, num_packages=1, layout="open")
    known, rng = term_set("warehouse"), np.random.default_rng(0)
    config = known.mode(known.default)
    shaper = PotentialShaper(config, known.names, 8, ShapingRules(gamma=1.0, scale=known.scale(env)))
    shaper.begin(known.terms(env))
    start, total = shaper.worth.copy(), np.zeros(8)
    terminated = truncated = 0
    for _ in range(200):
        env.advance(rng.integers(0, 5, (8, 2), np.int8))
        phi = known.terms(env)
        total += shaper.step(phi, env.terminated)
        last = config.beta * known.scale(env) * (phi @ config.vector(known.names))
        last[env.terminated] = 0
        done = env.autoreset()
        assert total[done] == pytest.approx(last[done] - start[done], abs=1e-5)
        terminated += int((env.terminated & done).sum())
        truncated += int((env.truncated & done).sum())
        if done.any():
            shaper.begin(known.terms(env, done), done)
            start[done], total[done] = shaper.worth[done], 0
    assert min(terminated, truncated) > 3


# -- what a world's file gives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SMALL))
def test_modes_and_words(name: str) -> None:
    known = term_set(name)
    text = known.vocabulary()
    for word in (*known.names, *known.modes):
        assert f"- {word}" in text
    assert known.mode(known.default).mode == known.default
    assert len({*known.modes.values(), *known.grid.values()}) == len(known.modes) + len(known.grid)
    with pytest.raises(EchelonError, match=f"unknown shaping mode of {name} 'no'"):
        known.mode("no")


def test_a_world_of_ones_own() -> None:
    known = term_set("search")

    def compute(env: Any, which: Any, out: Any) -> None:
        out[which, 0] = env.target_found[which].mean(1)

    with pytest.raises(EchelonError, match="unknown potential term 'apart'"):
        TermSet("own", {"found": "targets found"}, {"m": known.modes["late_stability"]}, "m", {}, compute)
    modes = mode_table(("found",), {"only": (0.5, 1.0)})
    try:
        register(TermSet("own", {"found": "targets found"}, modes, "only", {}, compute))
        assert shaped_worlds() == ("own", "repair", "search", "warehouse")
        assert term_set("own").names == ("found",)
        with pytest.raises(EchelonError, match="terms of own don't fit search"):
            term_set("own").terms(make("search", size=6, num_agents=1, num_targets=1))
    finally:
        _REGISTRY.pop("own", None)
    with pytest.raises(EchelonError, match="'own' has no potential terms"):
        term_set("own")
