"""Runs judged and compared, with the files that are left of it: `<name>.json`, recorded plans and replays."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from echelon._files import JsonLines, atomic_write_json, atomic_write_text, explain_os_error, read_json
from echelon.building import settled
from echelon.configs import RunConfig, read_toml, to_toml
from echelon.envs import env_name, make
from echelon.errors import EchelonError
from echelon.evaluation.episodes import evaluate
from echelon.evaluation.protocol import same_run
from echelon.methods import method
from echelon.rollout import PlanTrace
from echelon.runs import load_policy, run_costs, steps_done
from echelon.training import Progress, Trainer

__all__ = ["check_comparison", "check_name", "compare", "evaluate_run", "finished_evaluation"]

# Files of runs that end in .json, also of those in studies.
_TAKEN = {"account", "failed", "fork", "manifest", "progress", "protocol", "result", "results", "training", "versions"}

WriteReplay = Callable[[Path, dict[str, Any]], object]


def evaluate_run(
    run: RunConfig,
    folder: Path,
    *,
    episodes: int = 200,
    record: int = 3,
    world_seed: int | None = None,
    greedy: bool = False,
    name: str = "evaluation",
    report: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
    write_replay: WriteReplay | None = None,
) -> dict[str, Any] | None:
    """Evaluate what was trained in a run's folder, and leave the result there.

    Writes `<name>.json`; with recorded episodes `replays/<name>.json`; where a language model plans
    `<name>.plans.jsonl`. A result that is stopped or fails leaves what was there.

    Args:
        run: the run as it is to be judged: the folder's config, or one with another world or planner.
        folder: the run's folder.
        episodes: how many, one world each.
        record: how many of them to record for a replay.
        world_seed: root seed of the worlds; default: the run's own.
        greedy: executors take their most probable move instead of drawing.
        name: what the files are called; no path.
        report, should_stop: see `evaluate`.
        write_replay: given the page's path and the replay document, such as `reports.replay.write_replay`.

    Returns:
        What is in `<name>.json`: `EpisodeResults.summary`, what the training took, and under "of" what was judged;
        None if it was stopped.

    Raises:
        EchelonError: nothing trained there, a policy that doesn't fit, or files that can't be written.
    """
    check_name(name)
    kind = method(run.method)
    policy = load_policy(folder)[1] if kind.learns else None
    of = _of(run, folder, episodes, world_seed, greedy)
    plans = folder / f"{name}.plans.jsonl"
    part = folder / f".{name}.plans.part"
    log = JsonLines(part) if kind.needs_model(run.planner) and kind.eval_planner is not None else None

    def heard(trace: PlanTrace) -> None:
        assert log is not None
        log.write(vars(trace))

    try:
        result = evaluate(
            run, policy, episodes=episodes, seed=world_seed, greedy=greedy, record=min(record, episodes),
            on_plan=None if log is None else heard, report=report, should_stop=should_stop,
        )  # fmt: skip
        if result is None:
            return None
        costs = run_costs(folder) if kind.learns else {}
        summary: dict[str, Any] = {**result.summary(), **costs, "of": of}
        if result.replay is not None:
            if write_replay is not None:
                write_replay(folder / "replays" / f"{name}.html", result.replay)
            atomic_write_json(folder / "replays" / f"{name}.json", result.replay)
        try:
            if log is not None:
                log.sync()
                part.replace(plans)
            else:
                plans.unlink(missing_ok=True)
        except OSError as error:
            raise explain_os_error(error, plans) from error
        atomic_write_json(folder / f"{name}.json", summary)
        # As a reader of the file sees it.
        return dict(json.loads(json.dumps(summary)))
    finally:
        if log is not None:
            log.close()
            part.unlink(missing_ok=True)


def finished_evaluation(
    run: RunConfig,
    folder: Path,
    *,
    episodes: int = 200,
    world_seed: int | None = None,
    greedy: bool = False,
    name: str = "evaluation",
) -> dict[str, Any] | None:
    """The result that `evaluate_run` has left for just this question; None if there is none."""
    try:
        result = read_json(folder / f"{name}.json", "evaluation")
    except EchelonError:
        return None
    if isinstance(result, dict) and result.get("of") == _of(run, folder, episodes, world_seed, greedy):
        return result
    return None


def check_name(name: str) -> None:
    """Hold that an evaluation's name is a name, not a path.

    Raises:
        EchelonError: it isn't, or it belongs to another file of a run.
    """
    if not name.strip(".") or not name.isprintable() or set(name) & set("/\\"):
        raise EchelonError(f"the evaluation's name is {name!r}: it must be a file's name without folders")
    if name.lower() in _TAKEN:
        raise EchelonError(f"the evaluation can't be called {name!r}: that is a file of the run's own")


def check_comparison(runs: Sequence[RunConfig], out: Path) -> None:
    """Say what can't be used before anything is trained or written.

    Raises:
        EchelonError: no runs, two of one method, worlds that can't be built, or runs in `out` that are others or
            have trained for longer.
    """
    if not runs:
        raise EchelonError("no method to compare: name at least one")
    for file, kind in (("study.toml", "study"), ("config.toml", "run")):
        if (out / file).exists():
            raise EchelonError(f"{out} holds a {kind}, whose files a comparison would write over: choose another --out")
    names = [run.method for run in runs]
    if len(set(names)) < len(names):
        raise EchelonError(f"each method can be compared once: {', '.join(names)}")
    for run in runs:
        make(env_name(run.env), run.env, num_envs=1)
        folder = out / run.method
        if not (folder / "config.toml").exists():
            continue
        if not same_run(read_toml(folder / "config.toml"), run):
            raise EchelonError(f"{folder} holds a run with other settings: choose another --out, or remove it")
        rollout = run.algorithm.rollout * run.num_envs
        if method(run.method).learns and (done := steps_done(folder)) >= run.steps + rollout:
            raise EchelonError(
                f"{folder} has done {done:,} steps already, more than {run.steps:,}: choose another --out or more steps"
            )


def compare(
    runs: Sequence[RunConfig],
    out: Path,
    *,
    episodes: int = 200,
    record: int = 3,
    on_training: Callable[[RunConfig, Progress], None] = lambda run, progress: None,
    on_evaluation: Callable[[RunConfig, int, int], None] = lambda run, done, total: None,
    on_result: Callable[[RunConfig, dict[str, Any]], None] = lambda run, result: None,
    should_stop: Callable[[], bool] = lambda: False,
    write_replay: WriteReplay | None = None,
) -> dict[str, dict[str, Any]]:
    """Train and evaluate runs of several methods; called again, it goes on where it stopped.

    Args:
        runs: one a method, with the same world, budget and seed if the comparison is to be fair.
        out: each run is the folder `out/<method>`; `out/results.json` holds all results.
        episodes, record, write_replay: see `evaluate_run`.
        on_training: called with the run and its progress after each update.
        on_evaluation: called with the run, episodes finished and episodes.
        on_result: called with each run's result when it is there.
        should_stop: asked after each update and each step of an evaluation.

    Returns:
        The result of each method by its name (see `evaluate_run`): of those that were finished, where
        `should_stop` said so.

    Raises:
        EchelonError: see `check_comparison`, `Trainer` and `evaluate_run`.
    """
    check_comparison(runs, out)
    results: dict[str, dict[str, Any]] = {}
    for run in runs:
        folder = out / run.method
        if not _train(run, folder, lambda p, run=run: on_training(run, p), should_stop):  # type: ignore[misc]
            return results
        result = finished_evaluation(run, folder, episodes=episodes)
        if result is None:
            result = evaluate_run(
                run, folder, episodes=episodes, record=record, should_stop=should_stop, write_replay=write_replay,
                report=lambda done, total, run=run: on_evaluation(run, done, total),  # type: ignore[misc]
            )  # fmt: skip
        if result is None:
            return results
        results[run.method] = result
        on_result(run, result)
    atomic_write_json(out / "results.json", results)
    return results


def _train(
    run: RunConfig, folder: Path, report: Callable[[Progress], None], should_stop: Callable[[], bool]
) -> bool:  # fmt: skip
    """Do what is left of a run's training; whether all is done."""
    config = folder / "config.toml"
    if not method(run.method).learns:
        if not config.exists():
            atomic_write_text(config, to_toml(run))
        return True
    # Steps are rounded up to whole rollouts, so that a finished run has often done more than it was asked for.
    if config.exists() and steps_done(folder) >= run.steps:
        return True
    trainer = Trainer.resume(folder, steps=run.steps) if config.exists() else Trainer(run, folder)
    return trainer.run(report, should_stop)


def _of(run: RunConfig, folder: Path, episodes: int, world_seed: int | None, greedy: bool) -> dict[str, Any]:
    """What a result is about: equal for equal questions to the same training."""
    return {
        "config": to_toml(dataclasses.replace(settled(run), threads=None)),
        "episodes": episodes,
        "world_seed": world_seed,
        "greedy": greedy,
        "step": steps_done(folder) if method(run.method).learns else 0,
    }
