"""Plans made beside the simulation: deterministic with a lag, safe and bounded without one, repeated from a record."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echelon.checkpoints import checkpoints_of, load_checkpoint
from echelon.envs import SubgoalKind, WarehouseConfig, make
from echelon.envs.kernels import UNREACHABLE, WALL
from echelon.llm.choice import ChoicePrompt, ChoiceScores
from echelon.planners.base import ModelPlanner
from echelon.planners.llm import PROMPTS, LLMPlanner
from echelon.planners.nearest import Nearest
from echelon.rollout import TeamWorlds
from echelon.subgoals import EXCLUSIVE, FEATURES, SubgoalConfig

ENV = WarehouseConfig(size=10, num_agents=3, num_packages=5)


class Slow:
    """Likes what is about nine steps away; takes its time."""

    name = "slow"

    def __init__(self, seconds: Callable[[int], float] = lambda k: 0.0) -> None:
        self.seconds, self.calls = seconds, 0
        self.threads: set[str] = set()

    def score(self, prompts: Sequence[ChoicePrompt]) -> list[ChoiceScores]:
        self.calls += 1
        self.threads.add(threading.current_thread().name)
        time.sleep(self.seconds(self.calls))
        out = []
        for prompt in prompts:
            steps = np.array([float(o.split(" steps")[0].split()[-1]) for o in prompt.options])
            x = -np.abs(steps - 9)
            out.append(ChoiceScores((x - np.log(np.exp(x).sum())).astype(np.float32), len(prompt.text)))
        return out


def worlds_of(
    planner: ModelPlanner, *, num_envs: int = 8, seed: int = 0, lag: int | None = 4, record: list[Any] | None = None
) -> TeamWorlds:
    env = make("warehouse", ENV, num_envs=num_envs, seed=seed, extra_features=FEATURES)
    return TeamWorlds(
        env, [(planner, np.ones(num_envs, bool))], SubgoalConfig(), gamma=0.99, seed=seed, beside=True, lag=lag,
        on_subgoals=None if record is None else record.append,
    )  # fmt: skip


def drive(worlds: TeamWorlds, steps: int, seed: int = 1, check: bool = True) -> list[Any]:
    """Executors that follow their path field three times in four; what was in flight after each step."""
    rng, seen, tracker, env = np.random.default_rng(seed), [], worlds.tracker, worlds.env
    assert tracker is not None
    for _ in range(steps):
        actions = rng.integers(0, 5, tracker.kind.shape).astype(np.int8)
        near = tracker.field[np.arange(len(tracker.kind))[:, None, None], np.arange(tracker.kind.shape[1])[:, None],
                             env.pos[..., None] + env.offsets]  # fmt: skip
        best = near.argmin(-1).astype(np.int8)
        actions = np.where(rng.random(actions.shape) < 0.75, best, actions)
        legal = np.take_along_axis(worlds.mask, actions[..., None].astype(np.int64), 2)[..., 0] != 0
        worlds.advance(np.where(legal, actions, 0).astype(np.int8))
        worlds.settle()
        seen.append((tracker.kind.copy(), tracker.cell.copy(), tracker.task.copy()))
        if check:
            sound(worlds)
    return seen


def sound(worlds: TeamWorlds) -> None:
    """What is in flight is legal: its path field leads there, and no task is done by two."""
    tracker, env = worlds.tracker, worlds.env
    assert tracker is not None
    assert (tracker.kind >= 0).all() and not tracker.need.any()
    world, agent = np.indices(tracker.kind.shape)
    assert not (env.grid[world, tracker.cell] & WALL).any()
    assert (tracker.field[world, agent, tracker.cell] == 0).all(), "the path fields are those of the targets"
    assert (tracker.field[world, agent, env.pos] != UNREACHABLE).all()
    for w in range(len(tracker.kind)):
        tasks = tracker.task[w][EXCLUSIVE[tracker.kind[w]] & (tracker.task[w] >= 0)]
        # A carrier's own package is no longer to be fetched by another.
        assert len(set(tasks.tolist())) == len(tasks)


def lettered(model: Slow) -> LLMPlanner:
    return LLMPlanner(model, folder=PROMPTS / "letters")


def test_with_a_lag_nothing_depends_on_how_fast_the_model_is() -> None:
    found = []
    for seconds in (lambda k: 0.0, lambda k: 0.004 * (k % 3)):
        model = Slow(seconds)
        worlds = worlds_of(lettered(model))
        worlds.start()
        found.append((drive(worlds, 60), dataclasses.asdict(worlds.tracker.counts)))  # type: ignore[union-attr]
        worlds.close()
        assert all(name.startswith("planner") for name in model.threads), "the model works beside the simulation"
    for one, other in zip(found[0][0], found[1][0], strict=True):
        for x, y in zip(one, other, strict=True):
            np.testing.assert_array_equal(x, y)
    assert found[0][1] == found[1][1]
    assert found[0][1]["late"] > 20 and found[0][1]["late_outdated"] > 0 and found[0][1]["skipped"] == 0


def test_a_plan_is_used_exactly_the_lag_later() -> None:
    worlds = worlds_of(lettered(Slow()), lag=5)
    worlds.start()
    tracker = worlds.tracker
    assert tracker is not None
    first = tracker.task.copy()
    nearest = worlds_of(lettered(Slow()), lag=5)
    assert tracker.counts.provisional == tracker.kind.size
    idle = np.zeros(tracker.kind.shape, np.int8)
    for step in range(1, 6):
        worlds.advance(idle)
        worlds.settle()
        assert (tracker.counts.late > 0) == (step == 5)
    used = tracker.counts.late
    assert tracker.counts.late_steps == 5 * used and (tracker.task != first).any()
    assert used + tracker.counts.late_refused + tracker.counts.late_outdated == tracker.kind.size
    nearest.close()
    worlds.close()


def test_a_busy_model_is_not_asked_and_the_worlds_go_on() -> None:
    hold = threading.Event()

    class Held(Slow):
        def score(self, prompts: Sequence[ChoicePrompt]) -> list[ChoiceScores]:
            hold.wait(20)
            return super().score(prompts)

    model = Held()
    worlds = worlds_of(lettered(model), lag=None)
    worlds.start()
    tracker = worlds.tracker
    assert tracker is not None
    drive(worlds, 40)
    assert model.calls == 0 and tracker.counts.skipped > 0 and tracker.counts.late == 0
    assert tracker.counts.given > tracker.kind.size
    hold.set()
    for _ in range(200):
        drive(worlds, 1)
        if tracker.counts.late + tracker.counts.late_outdated:
            break
        time.sleep(0.01)
    assert tracker.counts.late + tracker.counts.late_outdated + tracker.counts.late_refused > 0
    worlds.close()


def test_whatever_late_plans_say_what_is_in_flight_is_legal() -> None:
    """Late plans that are nonsense: every one is refused, and who was given something meanwhile keeps it."""
    rng = np.random.default_rng(0)

    class Wild(LLMPlanner):
        def end(self, asking: Any, answers: Any) -> Any:
            plan = super().end(asking, answers)
            shape, cells = plan.kind.shape, 400
            plan.kind = rng.integers(-3, 12, shape).astype(np.int8)
            plan.cell = rng.integers(-50, cells, shape).astype(np.int32)
            plan.task = rng.integers(-3, 9, shape).astype(np.int16)
            return plan

    worlds = worlds_of(Wild(Slow(), folder=PROMPTS / "letters"), lag=2)
    worlds.start()
    drive(worlds, 150)
    counts = worlds.tracker.counts  # type: ignore[union-attr]
    assert counts.late_refused > 100 and sum(counts.rejected.values()) >= counts.late_refused
    worlds.close()


def test_a_model_that_raises_costs_its_plans_only() -> None:
    class Dead(Slow):
        def score(self, prompts: Sequence[ChoicePrompt]) -> list[ChoiceScores]:
            raise RuntimeError("gone")

    worlds = worlds_of(lettered(Dead()), lag=3)
    worlds.start()
    drive(worlds, 30)
    counts = worlds.tracker.counts  # type: ignore[union-attr]
    assert counts.late == 0 and counts.late_refused > 0
    assert worlds.planners[0][0].failures > 0  # type: ignore[attr-defined]
    worlds.close()


def test_a_late_plan_is_not_for_the_next_episode() -> None:
    """A plan for a world whose episode ended meanwhile is dropped."""
    env = dataclasses.replace(ENV, limit=6)
    batch = make("warehouse", env, num_envs=4, seed=0, extra_features=FEATURES)
    worlds = TeamWorlds(batch, [(lettered(Slow()), np.ones(4, bool))], SubgoalConfig(), gamma=0.99, seed=0,
                        beside=True, lag=7)  # fmt: skip
    worlds.start()
    drive(worlds, 60)
    counts = worlds.tracker.counts  # type: ignore[union-attr]
    assert counts.late == 0 and counts.late_outdated > 0
    worlds.close()


def test_who_does_it_already_goes_on_with_the_time_that_is_left() -> None:
    """A late plan that says what the provisional one did changes nothing."""

    class Near(Slow):
        def score(self, prompts: Sequence[ChoicePrompt]) -> list[ChoiceScores]:
            out = []
            for prompt in prompts:
                steps = np.array([float(o.split(" steps")[0].split()[-1]) for o in prompt.options])
                x = -steps - 1e-3 * np.arange(len(steps))
                out.append(ChoiceScores((x - np.log(np.exp(x).sum())).astype(np.float32), 1))
            return out

    env = make("warehouse", dataclasses.replace(ENV, num_agents=1), num_envs=6, seed=0, extra_features=FEATURES)
    worlds = TeamWorlds(env, [(lettered(Near()), np.ones(6, bool))], SubgoalConfig(), gamma=0.99, seed=0, beside=True,
                        lag=3)  # fmt: skip
    worlds.start()
    tracker = worlds.tracker
    assert tracker is not None
    for _ in range(3):
        worlds.advance(np.zeros((6, 1), np.int8))
        worlds.settle()
    assert tracker.counts.late == 6 and (tracker.age == 3).all() and tracker.counts.given == 6
    worlds.close()


@pytest.mark.parametrize("lag", [4, None])
def test_the_record_of_late_plans_repeats_them(lag: int | None, tmp_path: Path) -> None:
    """Also where their timing was the machine's: what was used when is in the record."""
    from echelon.planners.recorded import RecordedPlanner

    record: list[dict[str, Any]] = []
    worlds = worlds_of(lettered(Slow(lambda k: 0.002)), lag=lag, record=record)
    worlds.start()
    first = drive(worlds, 80)
    worlds.close()
    path = tmp_path / "plans.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in record))
    assert any(line.get("late") for line in record)
    again = TeamWorlds(
        make("warehouse", ENV, num_envs=8, seed=0, extra_features=FEATURES),
        [(RecordedPlanner(path), np.ones(8, bool))], SubgoalConfig(), gamma=0.99, seed=0,
    )  # fmt: skip
    again.start()
    for one, other in zip(first, drive(again, 80), strict=True):
        for x, y in zip(one, other, strict=True):
            np.testing.assert_array_equal(x, y)
    assert worlds.tracker is not None and again.tracker is not None
    assert dataclasses.asdict(worlds.tracker.counts) == dataclasses.asdict(again.tracker.counts)
    assert again.planners[0][0].state_dict() == {"missed": 0}


def test_provisional_subgoals_are_the_nearest() -> None:
    worlds = worlds_of(lettered(Slow(lambda k: 0.05)), lag=None)
    worlds.start()
    tracker = worlds.tracker
    assert tracker is not None
    other = make("warehouse", ENV, num_envs=8, seed=0, extra_features=FEATURES)
    plain = TeamWorlds(other, [(Nearest(), np.ones(8, bool))], SubgoalConfig(), gamma=0.99, seed=0)
    plain.start()
    assert plain.tracker is not None
    np.testing.assert_array_equal(tracker.task, plain.tracker.task)
    assert (tracker.kind == SubgoalKind.FETCH).any()
    worlds.close()


# -- whole runs ---------------------------------------------------------------------------------------------------


def test_a_run_with_a_lag_stopped_and_resumed_is_the_run_that_never_stopped(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from echelon.algorithms.mappo import MAPPOConfig
    from echelon.configs import PlanningConfig, RunConfig
    from echelon.training import Trainer
    from tiny_model import make_tiny_model

    config = RunConfig(
        method="l2m2", model=f"hf:{make_tiny_model(tmp_path_factory.mktemp('tiny'))}", env=ENV, steps=1024, num_envs=8,
        threads=1, llm_share=1.0, checkpoint_every=256, algorithm=MAPPOConfig(rollout=16),
        planning=PlanningConfig(timing="lag", lag=3, prompts=str(PROMPTS / "letters")),
    )  # fmt: skip
    assert Trainer(config, tmp_path / "one").run()
    stops = iter([False, True, False, True, True])
    Trainer(config, tmp_path / "two").run(should_stop=lambda: next(stops))
    while not Trainer.resume(tmp_path / "two").run(should_stop=lambda: next(stops, False)):
        pass
    one, two = (load_checkpoint(checkpoints_of(tmp_path / n / "checkpoints")[-1]) for n in ("one", "two"))
    assert (tmp_path / "one" / "metrics.jsonl").read_bytes() == (tmp_path / "two" / "metrics.jsonl").read_bytes()
    assert one.worlds.keys() == two.worlds.keys()
    for name, array in one.worlds.items():
        np.testing.assert_array_equal(array, two.worlds[name], err_msg=name)
    lines = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["subgoals_late"] for line in lines) > 0


@pytest.mark.parametrize("timing", ["lag", "free"])
def test_the_record_of_a_whole_run_repeats_it(
    timing: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Plans that are used at a rollout's end come behind that step's own planning, in the record too."""
    from echelon.algorithms.mappo import MAPPOConfig
    from echelon.configs import PlanningConfig, RunConfig
    from echelon.training import Trainer
    from tiny_model import make_tiny_model

    config = RunConfig(
        method="l2m2", model=f"hf:{make_tiny_model(tmp_path_factory.mktemp('tiny'))}", env=ENV, steps=960, num_envs=8,
        threads=1, algorithm=MAPPOConfig(rollout=10), subgoals=SubgoalConfig(scope="team"),
        planning=PlanningConfig(timing=timing, lag=8, prompts=str(PROMPTS / "letters")),  # type: ignore[arg-type]
    )  # fmt: skip
    assert Trainer(config, tmp_path / "one").run()
    again = dataclasses.replace(config, model="none", planner=f"record:{tmp_path / 'one'}")
    assert Trainer(again, tmp_path / "two").run()
    one, two = (
        [{k: v for k, v in json.loads(line).items() if not k.startswith("model_")}
         for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )  # fmt: skip
    assert one == two
    assert timing == "free" or sum(line["subgoals_late"] for line in one) > 0
