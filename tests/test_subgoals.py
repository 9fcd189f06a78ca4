"""Subgoals in flight: rewards, outcomes, triggers, the feasibility chain, what executors and planners see."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from echelon.envs import GridEnv, SubgoalKind, make
from echelon.envs.kernels import UNREACHABLE, WALL
from echelon.errors import EchelonError
from echelon.subgoals import (
    DIRECTIONS,
    FEATURES,
    Outcome,
    Plan,
    PlanRequest,
    SubgoalConfig,
    SubgoalTracker,
    Verdict,
)

STAY, N, E, S, W = 0, 1, 2, 3, 4
CELL, WAIT, FETCH, DELIVER = SubgoalKind.CELL, SubgoalKind.WAIT, SubgoalKind.FETCH, SubgoalKind.DELIVER
GAMMA = 0.9
Cell = tuple[int, int]
Build = Callable[..., SubgoalTracker]

OPEN = ["........", "........", "........", "........", ".......Z"]
# One way round: the wall leaves only the last column.
DETOUR = ["........", "@@@@@@@.", "........", "........", "Z......."]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Warehouse on hand-drawn rows with agents and packages, by index, on given cells, and its tracker."""

    def make_it(
        rows: Sequence[str] = OPEN, agents: Sequence[Cell] = ((0, 0),), packages: Sequence[Cell] = ((4, 0),),
        **config: Any,
    ) -> SubgoalTracker:  # fmt: skip
        drawn = [list(row) for row in rows]
        for mark, cells in (("A", agents), ("P", packages)):
            for r, c in cells:
                drawn[r][c] = mark
        path = tmp_path / "hand.map"
        text = "\n".join("".join(row) for row in drawn)
        path.write_text(f"type octile\nheight {len(rows)}\nwidth {len(rows[0])}\nmap\n{text}\n")
        for seed in range(500):
            world = make(
                "warehouse", map=path, num_agents=len(agents), num_packages=len(packages), num_zones=1, view=1,
                seed=seed, extra_features=FEATURES,
            )  # fmt: skip
            if [world.row_col(p) for p in world.pos[0]] == list(agents) and [
                world.row_col(c) for c in world.task_cell[0]
            ] == list(packages):
                return SubgoalTracker(world, SubgoalConfig(**config), GAMMA, 0)
        raise AssertionError("no seed puts agents and packages in this order")

    return make_it


def ask(tracker: SubgoalTracker) -> PlanRequest:
    """A request for all worlds."""
    return tracker.request(np.arange(tracker.env.num_envs), distance=False)


def propose(tracker: SubgoalTracker, *subgoals: tuple[int, Cell | int, int] | None) -> list[Verdict]:
    """Check subgoals (kind, cell, task) for the agents of world 0, put the accepted ones into flight; verdicts."""
    request = ask(tracker)
    plan, todo = Plan.empty(request), np.zeros(request.need.shape, bool)
    for a, subgoal in enumerate(subgoals):
        if subgoal is not None:
            kind, cell, task = subgoal
            todo[0, a] = True
            plan.kind[0, a], plan.task[0, a] = kind, task
            plan.cell[0, a] = cell if isinstance(cell, int) else tracker.env.cell_index(*cell)
    verdict = tracker.check(request, plan, todo)
    tracker.assign(request, plan, todo & (verdict == Verdict.ACCEPTED))
    return [Verdict(int(verdict[0, a])) for a, s in enumerate(subgoals) if s is not None]


def step(tracker: SubgoalTracker, *actions: int) -> float:
    """Step world 0, without reset; agent 0's intrinsic reward."""
    tracker.before()
    tracker.env.advance(np.array([actions], np.int8))
    tracker.advance()
    return float(tracker.reward[0, 0])


def bfs(env: GridEnv[Any], w: int, source: int) -> dict[int, int]:
    """Path lengths from a cell of world `w`, in plain Python."""
    far, queue = {source: 0}, deque([source])
    while queue:
        cell = queue.popleft()
        for n in (cell + int(o) for o in env.offsets[1:]):
            if n not in far and not env.grid[w, n] & WALL:
                far[n] = far[cell] + 1
                queue.append(n)
    return far


# -- intrinsic rewards ----------------------------------------------------------------------------------------------


def test_equation_1_by_hand(build: Build) -> None:
    """r = -β ‖p - g‖₂ + 1[reached], at the position after the step, walls or not."""
    tracker = build(DETOUR, intrinsic="distance", beta=0.1)
    assert propose(tracker, (CELL, (2, 4), -1)) == [Verdict.ACCEPTED]
    assert step(tracker, STAY) == pytest.approx(-0.1 * 20**0.5)
    assert step(tracker, E) == pytest.approx(-0.1 * 13**0.5)
    assert step(tracker, S) == pytest.approx(-0.1 * 13**0.5), "a wall: it stays"
    rewards = [step(tracker, action) for action in [E] * 6 + [S, S, W, W, W]]
    assert rewards[2] == pytest.approx(-0.1 * 2), "right above the target, though the path is long"
    assert rewards[-2] == pytest.approx(-0.1)
    assert rewards[-1] == 1
    assert tracker.outcome[0, 0] == Outcome.REACHED


def test_potential_reward_by_hand(build: Build) -> None:
    """F = β (γ Φ(s') - Φ(s)), Φ = -path length, zero at the end, and 1 on top where the subgoal is reached."""
    tracker = build(DETOUR, intrinsic="potential", beta=0.1)
    propose(tracker, (CELL, (2, 6), -1))  # 7 east, 2 south, 1 west
    assert step(tracker, E) == pytest.approx(0.1 * (10 - GAMMA * 9))
    assert step(tracker, STAY) == pytest.approx(0.1 * (9 - GAMMA * 9))
    assert step(tracker, W) == pytest.approx(0.1 * (9 - GAMMA * 10))
    for _ in range(7):
        step(tracker, E)
    step(tracker, S)
    assert step(tracker, S) == pytest.approx(0.1 * (2 - GAMMA * 1))
    assert step(tracker, W) == pytest.approx(0.1 * 1 + 1)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(0, 999))
def test_the_discounted_potential_rewards_of_a_subgoal_telescope(actions: list[int], seed: int) -> None:
    """Whatever the agent does, they add up to what its first distance was worth, less what is left."""
    beta = 0.3
    env = make("warehouse", size=8, num_agents=1, num_packages=1, num_zones=1, density=0.2, layout="random",
               seed=seed, extra_features=FEATURES)  # fmt: skip
    tracker = SubgoalTracker(env, SubgoalConfig(intrinsic="potential", beta=beta, on_timeout=False), GAMMA, 0)
    free = np.flatnonzero(env.grid[0] & WALL == 0)
    goal = int(free[seed % len(free)])
    first = int(env.pos[0, 0])
    far = bfs(env, 0, goal)
    propose(tracker, (CELL, goal, -1))
    total, discount = 0.0, 1.0
    for action in actions:
        total += discount * step(tracker, action)
        discount *= GAMMA
        if tracker.outcome[0, 0] == Outcome.REACHED:
            assert env.pos[0, 0] == goal
            total -= discount / GAMMA  # the bonus of its last step
            break
    left = far[int(env.pos[0, 0])]
    assert total == pytest.approx(beta * (far[first] - discount * left), abs=1e-4)


def test_the_potential_is_zero_at_the_end_even_away_from_the_target(build: Build) -> None:
    """Any cell of a zone takes a package: the subgoal ends there, a step before its own target."""
    rows = ["........", "........", "...Z....", "........", "........"]
    tracker = build(rows, [(2, 0)], [(2, 1)], intrinsic="potential", beta=0.1)
    env = tracker.env
    step(tracker, E)
    env.task_goal[0, 0] = env.load_goal[0, 0] = goal = env.cell_index(3, 4)  # another cell of the zone
    assert env.grid[0, goal] >> 4 & 7 == 1
    propose(tracker, (DELIVER, goal, 0))
    assert step(tracker, E) == pytest.approx(0.1 * (4 - GAMMA * 3))
    assert step(tracker, E) == pytest.approx(0.1 * 3 + 1)
    assert tracker.outcome[0, 0] == Outcome.REACHED


def test_reached_alone(build: Build) -> None:
    tracker = build(intrinsic="reached", beta=5.0)
    propose(tracker, (CELL, (0, 2), -1))
    assert [step(tracker, a) for a in (S, N, E, E)] == [0, 0, 0, 1]


def test_no_subgoal_no_reward(build: Build) -> None:
    for intrinsic in ("distance", "potential", "reached"):
        tracker = build(intrinsic=intrinsic)
        assert step(tracker, E) == 0
        assert tracker.outcome[0, 0] == Outcome.ACTIVE


# -- outcomes, deadlines, triggers ----------------------------------------------------------------------------------


def test_fetching_is_reached_when_the_package_is_taken_and_failed_when_another_took_it(build: Build) -> None:
    tracker = build(agents=[(0, 0), (0, 4)], packages=[(0, 1), (0, 3)])
    assert propose(tracker, (FETCH, (0, 1), 0), (FETCH, (0, 3), 1)) == [Verdict.ACCEPTED] * 2
    assert not tracker.need.any()
    step(tracker, E, STAY)
    assert tracker.outcome[0].tolist() == [Outcome.REACHED, Outcome.ACTIVE]
    assert tracker.need[0].tolist() == [True, False]
    tracker = build(agents=[(0, 0), (0, 2)], packages=[(0, 1), (0, 7)])
    propose(tracker, (FETCH, (0, 1), 0), (CELL, (4, 4), -1))
    step(tracker, STAY, W)
    assert tracker.outcome[0].tolist() == [Outcome.FAILED, Outcome.ACTIVE]
    assert tracker.need[0].tolist() == [True, False]
    assert tracker.reward[0, 0] < 1
    assert (tracker.counts.given, tracker.counts.failed, tracker.counts.reached) == (2, 1, 0)


@pytest.mark.parametrize("slack", [1.0, 2.5])
def test_a_deadline_is_so_many_path_lengths_and_8_steps(build: Build, slack: float) -> None:
    tracker = build(DETOUR, slack=slack)
    propose(tracker, (CELL, (2, 6), -1))
    steps = int(slack * 10) + 8
    subgoal = tracker.subgoal(0, 0)
    assert subgoal is not None
    assert (subgoal.kind, subgoal.target, subgoal.task, subgoal.deadline) == (CELL, (2, 6), None, steps)
    for _ in range(steps - 1):
        step(tracker, STAY)
        assert tracker.outcome[0, 0] == Outcome.ACTIVE
    assert not tracker.need.any()
    step(tracker, STAY)
    assert tracker.outcome[0, 0] == Outcome.TIMED_OUT
    assert tracker.need.all()
    assert tracker.counts.timed_out == 1


def test_the_last_step_before_the_deadline_still_counts_as_reached(build: Build) -> None:
    tracker = build(slack=1.0)
    propose(tracker, (CELL, (0, 1), -1))
    for _ in range(8):
        step(tracker, STAY)
    step(tracker, E)
    assert tracker.outcome[0, 0] == Outcome.REACHED


def test_a_wait_lasts_its_steps_and_is_no_failure(build: Build) -> None:
    tracker = build(wait=3, on_timeout=False, on_reached=False, on_failed=False)
    assert propose(tracker, (WAIT, (0, 0), -1)) == [Verdict.ACCEPTED]
    for _ in range(2):
        step(tracker, STAY)
        assert not tracker.need.any()
        assert tracker.outcome[0, 0] == Outcome.ACTIVE, "to be where it waits is no success"
    step(tracker, STAY)
    assert tracker.need.all()
    assert (tracker.counts.given, tracker.counts.reached, tracker.counts.timed_out) == (1, 0, 0)


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("trigger", ["on_reached", "on_failed", "on_timeout"])
def test_each_trigger_can_be_switched_off(build: Build, trigger: str, on: bool) -> None:
    """What is left in flight then counts once, not at every step."""
    tracker = build(agents=[(0, 0), (0, 2)], packages=[(0, 1), (4, 0)], slack=1.0, **{trigger: on})
    if trigger == "on_reached":
        propose(tracker, (CELL, (1, 0), -1), None)
        step(tracker, S, STAY)
    elif trigger == "on_failed":
        propose(tracker, (FETCH, (0, 1), 0), None)
        step(tracker, STAY, W)
    else:
        propose(tracker, (CELL, (1, 0), -1), None)
        for _ in range(9):
            step(tracker, STAY, STAY)
    outcome = {"on_reached": Outcome.REACHED, "on_failed": Outcome.FAILED, "on_timeout": Outcome.TIMED_OUT}[trigger]
    assert tracker.outcome[0, 0] == outcome
    assert tracker.need[0].tolist() == [on, True]
    for _ in range(3):
        step(tracker, STAY, STAY)
    counts = tracker.counts
    assert [counts.reached, counts.failed, counts.timed_out] == [int(outcome == k) for k in (1, 2, 3)]
    assert tracker.features[0, 0, 14] >= 0, "no time is left, but not less than none"


def test_every_so_many_steps(build: Build) -> None:
    tracker = build(every=3)
    propose(tracker, (CELL, (4, 6), -1))
    for k in range(1, 7):
        step(tracker, STAY)
        assert tracker.need[0, 0] == (k % 3 == 0)
        tracker.need[:] = False


@pytest.mark.parametrize(("scope", "who"), [("agent", [True, False, False]), ("team", [True, True, True])])
def test_the_scope_of_a_replan(build: Build, scope: str, who: list[bool]) -> None:
    tracker = build(agents=[(0, 0), (1, 0), (2, 0)], scope=scope)
    propose(tracker, (CELL, (0, 1), -1), (CELL, (4, 4), -1), (CELL, (4, 5), -1))
    step(tracker, STAY, STAY, STAY)
    assert not tracker.need.any()
    step(tracker, E, STAY, STAY)
    assert tracker.need[0].tolist() == who


@pytest.mark.parametrize("on", [True, False])
def test_what_the_world_shows_is_news_for_its_whole_team(tmp_path: Path, on: bool) -> None:
    path = tmp_path / "search.map"
    path.write_text("type octile\nheight 2\nwidth 14\nmap\nAA.....P.....P\n@@@@@@@@@@@@@@\n")
    env = make("search", map=path, num_agents=2, num_targets=2, sensor=2, regions=1, view=1, num_envs=2,
               extra_features=FEATURES)  # fmt: skip
    tracker = SubgoalTracker(env, SubgoalConfig(on_event=on), GAMMA, 0)
    request = ask(tracker)
    plan = Plan.empty(request)
    plan.kind[:], plan.cell[:] = CELL, env.cell_index(0, 12)
    assert not tracker.check(request, plan, request.need).any()
    tracker.assign(request, plan, request.need)
    # In world 0 a scout goes east from column 1 and sees the first target from column 5; in world 1 nobody moves.
    east = np.where(env.pos == env.cell_index(0, 1), E, STAY).astype(np.int8)
    east[1] = STAY
    for k in range(1, 5):
        tracker.before()
        env.advance(east)
        tracker.advance()
        assert tracker.need[0].tolist() == [on and k == 4] * 2
        assert not tracker.need[1].any()


def test_a_new_episode_needs_new_subgoals(build: Build) -> None:
    tracker = build()
    propose(tracker, (CELL, (4, 6), -1))
    assert not tracker.need.any()
    tracker.forget(np.array([True]))
    assert tracker.need.all()
    assert tracker.subgoal(0, 0) is None


# -- the feasibility chain ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "subgoal",
    [
        (-1, (0, 1), -1), (8, (0, 1), -1), (127, (0, 1), -1), (-128, (0, 1), -1),  # no such kind
        (CELL, -1, -1), (CELL, 10_000, -1), (CELL, 2**31 - 1, -1), (CELL, -(2**31), -1),  # no such cell
        (FETCH, (0, 1), 2), (FETCH, (0, 1), -2), (FETCH, (0, 1), 2**15 - 1), (CELL, (0, 1), -(2**15)),  # no such task
        (FETCH, (0, 1), -1), (DELIVER, (0, 1), -1),  # about no task, but it must be
        (WAIT, (0, 0), 0),  # about a task, but it can't be
    ],
)  # fmt: skip
def test_what_is_no_subgoal_of_the_scene(build: Build, subgoal: tuple[int, Cell | int, int]) -> None:
    tracker = build(packages=[(0, 1), (4, 0)])
    assert propose(tracker, subgoal) == [Verdict.FORM]
    assert tracker.subgoal(0, 0) is None
    assert tracker.counts.rejected == {"form": 1, "illegal": 0, "unreachable": 0, "duplicate": 0}


@pytest.mark.parametrize(
    "subgoal",
    [
        (CELL, (1, 0), -1),  # a wall
        (CELL, 0, -1),  # the border
        (WAIT, (0, 1), -1),  # a wait elsewhere
        (FETCH, (0, 2), 0),  # the package lies elsewhere
        (DELIVER, (4, 0), 0),  # carries nothing
        (CELL, (0, 1), 0),  # a walk isn't about a task
        (SubgoalKind.REPAIR, (0, 1), 0),  # not in this world
        (SubgoalKind.TOOL, (0, 1), 0),
    ],
)
def test_what_the_robot_can_not_do_now(build: Build, subgoal: tuple[int, Cell | int, int]) -> None:
    tracker = build(DETOUR, packages=[(0, 1), (2, 0)])
    assert propose(tracker, subgoal) == [Verdict.ILLEGAL]
    assert tracker.counts.rejected["illegal"] == 1


def test_only_the_carrier_may_deliver_and_only_its_own(build: Build) -> None:
    tracker = build(agents=[(0, 0), (2, 0)], packages=[(0, 1), (4, 0)])
    step(tracker, E, STAY)
    zone = tracker.env.row_col(tracker.env.task_goal[0, 0])
    assert propose(tracker, (FETCH, (4, 0), 1), (DELIVER, zone, 0)) == [Verdict.ILLEGAL] * 2
    assert propose(tracker, (FETCH, (0, 1), 0), (FETCH, (0, 1), 0)) == [Verdict.ILLEGAL] * 2
    assert propose(tracker, (DELIVER, zone, 0), (FETCH, (4, 0), 1)) == [Verdict.ACCEPTED] * 2
    assert propose(tracker, (DELIVER, zone, 1), None) == [Verdict.ILLEGAL]


def test_where_no_path_leads(build: Build) -> None:
    tracker = build(packages=[(2, 4)])
    for r, c in ((1, 4), (3, 4), (2, 3), (2, 5)):
        tracker.env.grid[0, tracker.env.cell_index(r, c)] |= WALL
    assert propose(tracker, (FETCH, (2, 4), 0)) == [Verdict.UNREACHABLE]
    assert propose(tracker, (CELL, (2, 4), -1)) == [Verdict.UNREACHABLE]
    request = tracker.request(np.arange(1), distance=True)
    assert request.distance is not None
    assert request.distance[0, 0, 0] == UNREACHABLE


def test_a_task_is_given_to_one_agent(build: Build) -> None:
    tracker = build(agents=[(0, 0), (2, 0)], packages=[(0, 4), (4, 0)])
    fetch = (FETCH, (0, 4), 0)
    assert propose(tracker, fetch, fetch) == [Verdict.ACCEPTED, Verdict.DUPLICATE], "within one plan"
    assert ask(tracker).taken.tolist() == [[True, False]]
    assert propose(tracker, None, fetch) == [Verdict.DUPLICATE], "in flight"
    tracker.need[0, 0] = True
    assert propose(tracker, None, fetch) == [Verdict.ACCEPTED], "agent 0 wants another, so its task is free"
    both = (CELL, (3, 3), -1)
    assert propose(tracker, both, both) == [Verdict.ACCEPTED] * 2, "two may walk to one cell"


def test_who_still_goes_for_a_package_that_is_gone_does_not_keep_its_carrier_from_it(build: Build) -> None:
    tracker = build(agents=[(0, 0), (0, 2)], packages=[(0, 1), (4, 0)], on_failed=False)
    propose(tracker, (FETCH, (0, 1), 0), (CELL, (0, 1), -1))
    step(tracker, STAY, W)
    assert tracker.need[0].tolist() == [False, True]
    assert tracker.subgoal(0, 0) is not None
    assert not ask(tracker).taken.any()


def test_a_rejected_proposal_takes_nothing(build: Build) -> None:
    tracker = build(agents=[(0, 0), (2, 0)], packages=[(0, 4), (4, 0)])
    assert propose(tracker, (FETCH, (0, 5), 0), (FETCH, (0, 4), 0)) == [Verdict.ILLEGAL, Verdict.ACCEPTED]


def test_a_plan_of_the_wrong_shape_or_type_is_an_error(build: Build) -> None:
    tracker = build(agents=[(0, 0), (2, 0)])
    request = ask(tracker)
    plan = Plan.empty(request)
    plan.cell = plan.cell[:, :1]
    with pytest.raises(EchelonError, match=r"planner's cell is int32 \(1, 1\): it must be integers \(1, 2\)"):
        tracker.check(request, plan, request.need)
    plan = Plan.empty(request)
    plan.kind = plan.kind.astype(np.float32)
    with pytest.raises(EchelonError, match="planner's kind is float32"):
        tracker.check(request, plan, request.need)


def island_worlds() -> SubgoalTracker:
    """Three worlds, four agents, each world with a free cell that is walled in; one agent a world is busy."""
    env = make("warehouse", num_envs=3, size=9, num_agents=4, num_packages=5, num_zones=1, layout="random",
               density=0.1, seed=4, extra_features=FEATURES)  # fmt: skip
    for w in range(3):
        taken = {*env.pos[w].tolist(), *env.task_cell[w].tolist(), *env.task_goal[w].tolist()}
        for cell in np.flatnonzero(env.grid[w] & WALL == 0):
            if not taken & {int(cell), *(int(cell + o) for o in env.offsets[1:])}:
                env.grid[w, [cell + o for o in env.offsets[1:]]] |= WALL
                break
    tracker = SubgoalTracker(env, SubgoalConfig(), GAMMA, 0)
    request = ask(tracker)
    plan = Plan.chosen(request, np.array([[-1, -1, 1, -1]] * 3))
    busy = np.zeros((3, 4), bool)
    busy[:, 2] = True
    assert not tracker.check(request, plan, busy).any()
    tracker.assign(request, plan, busy)
    return tracker


@settings(max_examples=200)
@given(st.data())
def test_whatever_a_planner_says_only_sound_subgoals_are_accepted(data: st.DataObject) -> None:
    tracker = ISLANDS
    env, request = tracker.env, ask(ISLANDS)
    c, before = request.candidates, request.taken.copy()
    shape = request.need.shape
    cells = st.one_of(
        st.sampled_from(np.unique(c.cell).tolist()),
        st.integers(-2, env.num_cells + 1),
        st.integers(-(2**31), 2**31 - 1),
    )
    kinds = st.one_of(st.just(4), st.integers(-2, 9), st.integers(-128, 127))
    tasks = st.one_of(st.integers(-2, 6), st.integers(-(2**15), 2**15 - 1))
    plan = Plan(
        data.draw(hnp.arrays(np.int8, shape, elements=kinds)),
        data.draw(hnp.arrays(np.int32, shape, elements=cells)),
        data.draw(hnp.arrays(np.int16, shape, elements=tasks)),
    )
    if data.draw(st.booleans()):  # a planner that is right about some
        some = data.draw(hnp.arrays(np.int64, shape, elements=st.integers(-1, c.kind.shape[2] - 2)))
        right, mine = Plan.chosen(request, some), data.draw(hnp.arrays(np.bool_, shape))
        for own, good in ((plan.kind, right.kind), (plan.cell, right.cell), (plan.task, right.task)):
            own[mine] = good[mine]
    todo = request.need & data.draw(hnp.arrays(np.bool_, shape))
    fields = tracker.field.copy()
    verdict = tracker.check(request, plan, todo)
    assert not verdict[~todo].any()
    assert (tracker.field[~todo] == fields[~todo]).all(), "who isn't asked keeps what it has"
    given = before.copy()
    for w, a in np.argwhere(todo):
        kind, cell, task, v = (int(x[w, a]) for x in (plan.kind, plan.cell, plan.task, verdict))
        formed = 0 <= kind < 8 and 0 <= cell < env.num_cells and -1 <= task < env.num_tasks
        if v == Verdict.FORM:
            assert not formed or (kind >= 4) == (task < 0)
            continue
        assert formed
        free = not env.grid[w, cell] & WALL
        far = bfs(env, int(w), cell) if free else {}
        listed = any(
            (int(c.kind[w, a, j]), int(c.cell[w, a, j]), int(c.task[w, a, j])) == (kind, cell, task)
            for j in range(c.kind.shape[2])
        )
        own = int(env.pos[w, a])
        if v == Verdict.ILLEGAL:
            assert not free or (kind == 0 and cell != own) or (task >= 0 and not listed)
        elif v == Verdict.UNREACHABLE:
            assert free
            assert own not in far
        elif v == Verdict.DUPLICATE:
            assert given[w, task]
        else:
            assert free
            assert own in far
            assert kind != 0 or cell == own
            assert task < 0 or listed
            inside = tracker.field[w, a] != UNREACHABLE
            assert {int(k): int(tracker.field[w, a, k]) for k in np.flatnonzero(inside)} == far
            if task >= 0:
                assert not given[w, task], "no task is held twice"
                given[w, task] = True
    np.testing.assert_array_equal(request.taken, given)


ISLANDS = island_worlds()


def test_integers_of_other_widths_are_judged_by_their_value(build: Build) -> None:
    """What would wrap round to a sound subgoal in a narrower type isn't one."""
    tracker = build(packages=[(0, 1), (4, 0)])
    request = ask(tracker)
    good = Plan.chosen(request, np.zeros((1, 1), np.int64))
    for name, shift in (("kind", 2**8), ("cell", 2**32), ("task", 2**16)):
        wide = {f: getattr(good, f).astype(np.int64) for f in ("kind", "cell", "task")}
        wide[name] = wide[name] + shift
        assert tracker.check(request, Plan(**wide), request.need).tolist() == [[Verdict.FORM]]
    assert tracker.check(request, good, request.need).tolist() == [[Verdict.ACCEPTED]]


# -- what executors see ---------------------------------------------------------------------------------------------


def test_features_are_written_as_documented(build: Build) -> None:
    tracker = build(DETOUR, guidance="route", slack=2.0)
    env = tracker.env
    assert not tracker.features.any()
    propose(tracker, (CELL, (3, 4), -1))  # 7 east, 3 south, 3 west: 13 steps; deadline 2 * 13 + 8 = 34
    step(tracker, E)
    f = tracker.features[0, 0]
    assert len(f) == FEATURES == len(SubgoalTracker.scale)
    assert f[:8].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert f[8:13].tolist() == [1, 1, 1, 3, 3]
    assert f[13] == 12
    assert f[14] == 127 * 33 // 34
    # North and south are walls, east is the way, west leads back.
    assert f[15:19].tolist() == [-1, 1, -1, -1]
    assert f[19] == 0
    assert np.shares_memory(tracker.features, env.obs_buffer)
    assert (env.obs_buffer[0, 0, env.obs_size :] == f).all()
    for action in [E] * 6 + [S, S]:
        step(tracker, action)
    assert f[8:13].tolist() == [1, 1, -1, 1, -3]
    assert f[15:19].tolist() == [-1, -1, 1, 1], "both south and west shorten the way"
    assert np.abs(tracker.scale * f).max() <= 1.0


def test_features_need_a_subgoal_and_leave_other_worlds_alone() -> None:
    env = make("warehouse", num_envs=3, size=10, num_agents=2, seed=1, extra_features=FEATURES)
    tracker = SubgoalTracker(env, SubgoalConfig(guidance="vector"), GAMMA, 0)
    tracker.features[:] = 77
    tracker.write_features(np.array([False, True, False]))
    assert (tracker.features[[0, 2]] == 77).all()
    assert not tracker.features[1].any()
    request = ask(tracker)
    plan = Plan.chosen(request, np.tile(np.arange(2), (3, 1)))
    assert not tracker.check(request, plan, request.need).any()
    tracker.assign(request, plan, request.need)
    tracker.write_features(np.ones(3, bool))
    assert (tracker.features[:, :, 4] == 1).all()
    assert not tracker.features[:, :, 15:].any(), "no route unless asked for"
    assert (tracker.features[:, :, 14] == 127).all()


def test_an_environment_without_room_for_them_is_an_error() -> None:
    env = make("warehouse", num_envs=1, size=10)
    with pytest.raises(EchelonError, match="extra_features"):
        SubgoalTracker(env, SubgoalConfig(), GAMMA, 0)


# -- what planners see ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["cell", "region", "direction"])
def test_candidates_of_every_space_are_free_reachable_cells(space: str) -> None:
    env = make("warehouse", num_envs=6, height=11, width=14, layout="random", density=0.3, num_agents=3, num_packages=2,
               seed=2, extra_features=FEATURES)  # fmt: skip
    tracker = SubgoalTracker(env, SubgoalConfig(space=space), GAMMA, 0)  # type: ignore[arg-type]
    rows = np.array([4, 1, 5])
    request = tracker.request(rows, distance=True)
    c = request.candidates
    there = c.kind >= 0
    assert there.any(2).all()
    assert set(c.kind[there].tolist()) == {SubgoalKind[space.upper()].value}
    assert (c.task == -1).all()
    assert request.distance is not None
    goals = env.nearest_goal()
    assert (goals >= 0).all()
    for i, a, j in np.ndindex(*c.kind.shape):
        if there[i, a, j]:
            w, cell = int(rows[i]), int(c.cell[i, a, j])
            assert not env.grid[w, cell] & WALL
            lengths = bfs(env, w, cell)
            # A direction is measured by the whole way that begins with it.
            on = lengths[int(goals[w, a])] if space == "direction" else 0
            assert request.distance[i, a, j] == lengths[int(env.pos[w, a])] + on
        else:
            assert request.distance[i, a, j] == UNREACHABLE
    verdict = tracker.check(request, Plan.chosen(request, there.argmax(2)), request.need)
    assert not verdict.any()


def test_random_cells_differ_between_agents_and_requests() -> None:
    env = make("warehouse", num_envs=4, size=20, layout="open", num_agents=3, seed=0, extra_features=FEATURES)
    tracker = SubgoalTracker(env, SubgoalConfig(space="cell"), GAMMA, 0)
    first, second = ask(tracker), ask(tracker)
    assert len({tuple(row) for r in (first, second) for row in r.candidates.cell.reshape(12, -1).tolist()}) == 24
    again = SubgoalTracker(env, SubgoalConfig(space="cell"), GAMMA, 0)
    np.testing.assert_array_equal(ask(again).candidates.cell, first.candidates.cell)


def test_a_direction_lies_in_its_direction() -> None:
    """Straight or diagonal, up to 6 cells away, the farthest free one; none where the map ends or all is wall."""
    way = dict(zip(DIRECTIONS, [(-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1)], strict=True))
    env = make("warehouse", num_envs=8, size=12, layout="random", density=0.3, num_agents=3, num_packages=2, seed=1,
               extra_features=FEATURES)  # fmt: skip
    tracker = SubgoalTracker(env, SubgoalConfig(space="direction"), GAMMA, 0)
    c = ask(tracker).candidates
    for w, a in np.ndindex(8, 3):
        r, col = env.row_col(env.pos[w, a])
        for j, (dr, dc) in enumerate(way.values()):
            on = [(r + k * dr, col + k * dc) for k in range(1, 7)]
            free = [(y, x) for y, x in on if 0 <= y < 12 and 0 <= x < 12 and not env.walls(w)[y, x]]
            assert (c.kind[w, a, j] == SubgoalKind.DIRECTION) == bool(free)
            if free:
                assert env.row_col(c.cell[w, a, j]) == free[-1]


def test_a_region_is_named_by_the_free_cell_nearest_to_its_middle() -> None:
    env = make("warehouse", height=8, width=12, layout="open", num_agents=1, num_packages=1, extra_features=FEATURES)
    tracker = SubgoalTracker(env, SubgoalConfig(space="region"), GAMMA, 0)
    env.grid[0, env.cell_index(0, 1)] |= WALL  # the middle of the first region (rows 0, 1; columns 0 to 2)
    cells = [env.row_col(x) for x in ask(tracker).candidates.cell[0, 0]]
    assert cells[0] == (1, 1)
    assert cells[1] == (0, 4)
    for j, (r, c) in enumerate(cells):
        assert (r // 2, c // 3) == divmod(j, 4)


def test_a_request_says_who_needs_what_and_what_is_taken(build: Build) -> None:
    tracker = build(agents=[(0, 0), (2, 0), (2, 2)], packages=[(0, 4), (4, 0)])
    propose(tracker, (FETCH, (4, 0), 1), (CELL, (1, 1), -1), None)
    request = tracker.request(np.arange(1), distance=True)
    assert request.need.tolist() == [[False, False, True]]
    assert request.taken.tolist() == [[False, True]]
    assert request.candidates.task[0, 2].tolist() == [0, 1, -1]
    assert request.distance is not None
    assert request.distance[0, 2].tolist() == [4, 4, 0]
    assert (request.distance[0, :2] == UNREACHABLE).all(), "paths are only measured for who asks"
    assert request.where(0, 2) == (2, 2)
    assert "package 1" in request.text(0, 2, 1)
    assert request.scene(0).agents[2].cell == (2, 2)
    assert not request.rejected.any()
    assert not request.refused.any()
    tracker.need[:] = False
    assert not tracker.request(np.arange(1), distance=False).need.any()


def test_random_bits_of_a_world_do_not_depend_on_the_batch() -> None:
    def keys(num: int, rows: list[int]) -> NDArray[np.uint64]:
        env = make("warehouse", num_envs=num, size=10, num_agents=3, seed=3, extra_features=FEATURES)
        tracker = SubgoalTracker(env, SubgoalConfig(), GAMMA, 9)
        tracker.request(np.array(rows), distance=False)
        return tracker.request(np.array(rows), distance=False).keys

    many = keys(8, [0, 3, 5])
    np.testing.assert_array_equal(keys(1, [0])[0], many[0])
    np.testing.assert_array_equal(keys(6, [5])[0], many[2])
    assert len(set(many.ravel().tolist())) == 9


# -- checkpoints, settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("intrinsic", ["distance", "potential", "reached"])
def test_a_tracker_that_was_put_back_goes_on_as_if_nothing_had_been(intrinsic: str) -> None:
    config = SubgoalConfig(intrinsic=intrinsic, guidance="route", every=7)  # type: ignore[arg-type]

    def fresh(seed: int) -> SubgoalTracker:
        env = make("warehouse", num_envs=3, size=10, num_agents=2, num_packages=3, seed=seed, limit=60,
                   extra_features=FEATURES)  # fmt: skip
        return SubgoalTracker(env, config, GAMMA, seed)

    def walk(tracker: SubgoalTracker, actions: NDArray[np.int8]) -> list[NDArray[Any]]:
        out = []
        for action in actions:
            tracker.before()
            tracker.env.advance(action)
            tracker.advance()
            done = tracker.env.autoreset()
            tracker.forget(done)
            request = ask(tracker)
            plan = Plan.chosen(request, np.array(request.keys % np.uint64(2), np.int64))
            verdict = tracker.check(request, plan, request.need)
            tracker.assign(request, plan, request.need & (verdict == 0))
            tracker.write_features(np.ones(3, bool))
            out += [tracker.reward.copy(), tracker.outcome.copy(), tracker.env.obs_buffer.copy(), verdict]
        return out

    actions = np.random.default_rng(0).integers(0, 5, (100, 3, 2)).astype(np.int8)
    first, second = fresh(0), fresh(1)
    walk(first, actions[:40])
    second.env.load_state_dict(first.env.state_dict())
    saved = first.state_dict()
    second.load_state_dict(saved)
    flying = first.kind >= 0
    assert flying.any()
    np.testing.assert_array_equal(second.field[flying], first.field[flying])
    for x, y in zip(walk(first, actions[40:]), walk(second, actions[40:]), strict=True):
        np.testing.assert_array_equal(x, y)
    third = fresh(0)
    walk(third, actions[:40])
    for name, value in third.state_dict().items():
        np.testing.assert_array_equal(value, saved[name], err_msg="what was saved is a copy")


def test_what_was_counted_before_a_checkpoint_is_not_counted_again(build: Build) -> None:
    tracker = build(slack=1.0, on_timeout=False)
    propose(tracker, (CELL, (0, 1), -1))
    for _ in range(9):
        step(tracker, STAY)
    assert tracker.counts.timed_out == 1
    again = SubgoalTracker(tracker.env, tracker.config, GAMMA, 0)
    again.load_state_dict(tracker.state_dict())
    step(again, STAY)
    assert again.outcome[0, 0] == Outcome.TIMED_OUT
    assert again.counts.timed_out == 0


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("every", -1, "subgoals.every is -1: it must be at least 0"),
        ("slack", 0.5, "subgoals.slack is 0.5: it must be 1 to 10000"),
        ("slack", float("inf"), "subgoals.slack is inf"),
        ("slack", float("nan"), "subgoals.slack is nan"),
        ("wait", 0, "subgoals.wait is 0: it must be at least 1"),
        ("retries", -1, "subgoals.retries is -1: it must be at least 0"),
        ("beta", -0.1, "subgoals.beta is -0.1: it must be at least 0"),
        ("scope", "agents", "unknown subgoals.scope 'agents': did you mean 'agent'"),
        ("space", "cells", "did you mean 'cell'"),
        ("intrinsic", "none", "unknown subgoals.intrinsic 'none'"),
        ("guidance", "routes", "did you mean 'route'"),
    ],
)
def test_settings_out_of_range_get_one_clear_line(setting: str, value: object, message: str) -> None:
    with pytest.raises(EchelonError) as error:
        dataclasses.replace(SubgoalConfig(), **{setting: value})  # type: ignore[arg-type]
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_verdict_has_its_reason() -> None:
    assert len({v.reason for v in Verdict}) == len(Verdict) == 5
