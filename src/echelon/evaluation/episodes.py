"""Whole episodes of a team on worlds that training never saw."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from echelon.building import build_executor, build_worlds, spent_by, use_threads
from echelon.configs import RunConfig
from echelon.evaluation.recording import Recorder
from echelon.evaluation.statistics import mean_with_interval, wilson
from echelon.planners.base import ModelPlanner
from echelon.rng import spawn_keys
from echelon.rollout import PlanTrace, TeamWorlds, first_episodes
from echelon.subgoals import BESIDE

__all__ = ["EpisodeResults", "evaluate", "evaluation_seed"]


def evaluation_seed(seed: int, stream: int = 0) -> int:
    """The root seed of evaluation worlds: of streams of their own, so that no run's training worlds are among them."""
    return int(spawn_keys(seed, (9, stream) if stream else (9,), 1)[0] >> np.uint64(1))


@dataclass(frozen=True)
class EpisodeResults:
    """What came of some episodes; arrays of one entry an episode.

    Attributes:
        success: bool, every task done in time.
        steps: int, steps taken (the limit where it failed).
        collisions: int, moves that another agent prevented.
        task_return: float, sum of the task reward.
        seconds: wall time of all episodes, planning included.
        plans: counts of subgoals and verdicts, seconds of planning, and of a model questions, calls, cache hits,
            tokens, seconds.
        replay: a replay document of the recorded episodes, or None.
    """

    success: NDArray[np.bool_]
    steps: NDArray[np.int64]
    collisions: NDArray[np.int64]
    task_return: NDArray[np.float64]
    seconds: float
    plans: dict[str, float]
    replay: dict[str, Any] | None = None

    def summary(self) -> dict[str, Any]:
        """The numbers that a table shows: TSR with Wilson's 95% interval, means with Student's; JSON-able."""
        tsr = wilson(int(self.success.sum()), len(self.success))
        return {
            "episodes": len(self.success),
            "tsr": asdict(tsr),
            "steps_to_finish": mean_with_interval(self.steps[self.success]),
            "collisions": mean_with_interval(self.collisions),
            "task_return": float(self.task_return.mean()),
            "seconds": round(self.seconds, 3),
            "plans": self.plans,
        }


def evaluate(
    config: RunConfig,
    policy: dict[str, torch.Tensor] | None,
    *,
    episodes: int = 200,
    seed: int | None = None,
    stream: int = 0,
    greedy: bool = False,
    record: int = 0,
    on_plan: Callable[[PlanTrace], None] | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> EpisodeResults | None:
    """Run each of `episodes` worlds for its first episode.

    One episode a world: the first `n` to finish of a longer stream would favour short ones.

    Args:
        config: the run whose method, world and planner are judged.
        policy: the executor's tensors (`training.load_policy`), or None where there are none.
        episodes: how many.
        seed: which worlds (`evaluation_seed` of it is their root seed); default: the run's seed.
        stream: another one gives other worlds for the same seed.
        greedy: executors take their most probable move instead of drawing.
        record: how many episodes to record for a replay.
        on_plan: called with each planning round that costs model time.
        report: called with (episodes finished, episodes) after each step.
        should_stop: asked after each step and between a model's batches; stops with no result.
    """
    start = time.perf_counter()
    seed = evaluation_seed(config.seed if seed is None else seed, stream)
    recorder = Recorder(config, record) if record else None

    def heard(trace: PlanTrace) -> None:
        if recorder is not None:
            recorder.plan(trace)
        if on_plan is not None and trace.note.get("model"):
            on_plan(trace)

    use_threads(config)
    worlds = build_worlds(
        config, num_envs=episodes, seed=seed, training=False,
        on_plan=heard if recorder is not None or on_plan is not None else None, trace_all=recorder is not None,
    )  # fmt: skip
    worlds.traced = record if on_plan is None else None
    executor = build_executor(config, worlds, policy)
    before = spent_by(config, worlds)
    for planner, _ in worlds.planners:
        if isinstance(planner, ModelPlanner):
            planner.between = lambda answered, questions: _stop_if(should_stop)
    try:
        worlds.start()
        results = _play(worlds, executor.act, greedy, recorder, report, should_stop)
    except _StoppedError:
        return None
    finally:
        worlds.close()
    plans: dict[str, float] = {}
    if worlds.tracker is not None:
        counts = asdict(worlds.tracker.counts)
        plans |= {f"rejected_{k}": v for k, v in counts.pop("rejected").items()}
        plans |= {k: v for k, v in counts.items() if worlds.pending is not None or k not in BESIDE}
        plans["planner_seconds"] = round(sum(spent.seconds for spent in worlds.plan_time.values()), 3)
        for planner, _ in worlds.planners:
            told = planner.counters() | planner.costs() if isinstance(planner, ModelPlanner) else planner.state_dict()
            plans |= {k: v for k, v in told.items() if isinstance(v, int | float)}
    plans |= {f"model_{k}": v - before[k] for k, v in spent_by(config, worlds).items()}
    replay = recorder.document(worlds, results[0]) if recorder is not None else None
    return EpisodeResults(*results, time.perf_counter() - start, plans, replay)


class _StoppedError(Exception):
    """The caller wants no more."""


def _stop_if(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise _StoppedError


def _play(
    worlds: TeamWorlds,
    act: Callable[..., NDArray[np.int8]],
    greedy: bool,
    recorder: Recorder | None,
    report: Callable[[int, int], None],
    should_stop: Callable[[], bool],
) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    env, n = worlds.env, worlds.env.num_envs
    collisions, task_return = np.zeros(n, np.int64), np.zeros(n)

    def acted() -> None:
        running = worlds.active
        collisions[running] += env.collisions[running]
        task_return[running] += env.reward[running]
        if recorder is not None:
            recorder.frame(worlds, running & (env.terminated | env.truncated))

    def settled(ended: NDArray[np.bool_]) -> None:
        if recorder is not None:
            recorder.frame(worlds, worlds.active)
        report(n - int(worlds.active.sum()), n)
        _stop_if(should_stop)

    if recorder is not None:
        recorder.frame(worlds, np.ones(n, bool))
    success, steps = first_episodes(worlds, lambda worlds: act(worlds, greedy=greedy), acted, settled)
    return success, steps, collisions, task_return
