"""The loop that joins environment, planner, executor and algorithm, and makes it survive anything.

A run is a folder: `config.toml`, `versions.json`, `metrics.jsonl` (bit-identical for a seed), `timings.jsonl`
(how long things took), `plans.jsonl`, TensorBoard events and `checkpoints/`. Work between two checkpoints is
done again after a crash and comes out the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import math
import platform
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
from torch.utils.tensorboard import SummaryWriter

from echelon._files import (
    JsonLines,
    atomic_write_json,
    atomic_write_text,
    explain_os_error,
    lines_of,
    only_writer,
    remove_leftovers,
)
from echelon.building import STUDENT, save_planner, spent_by
from echelon.checkpoints import Checkpoint, newest_checkpoint, save_checkpoint
from echelon.coevolution import GrowingRollouts
from echelon.configs import RunConfig, from_toml, to_toml
from echelon.errors import EchelonError
from echelon.methods import method
from echelon.planners.base import ModelPlanner
from echelon.planners.frugal import FrugalPlanner
from echelon.rollouts import Clock, Rollouts
from echelon.runs import PLANNER, load_policy, processor, read_run, versions
from echelon.subgoals import BESIDE, Counts

__all__ = ["Clock", "Progress", "Rollouts", "Trainer", "identity", "load_policy", "machine"]

# What TensorBoard's writer can meet in a run's folder.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Progress:
    """Where a run is, for whoever shows it.

    Attributes:
        step, steps: environment steps done and wanted.
        metrics: the newest line of `metrics.jsonl`.
        rate: environment steps a second since the last call.
        shares: the share of that time by stage.
        notes: what a person must know of its planners, such as that the model's budget is spent.
        imitating: while a planner that learns imitates another, before the first step: updates done and wanted.
    """

    step: int
    steps: int
    metrics: dict[str, Any]
    rate: float
    shares: dict[str, float]
    notes: tuple[str, ...] = ()
    imitating: tuple[int, int] | None = None


class Trainer:
    """One run: trains, logs, checkpoints, resumes.

    Attributes:
        config: the run's config.
        folder: where it lives.
        step: environment steps done.
        rollouts: worlds and algorithm.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        """Prepare a new run; nothing is written before everything could be built.

        Raises:
            EchelonError: there is a run in `folder`, or a setting, map or model can't be used.
        """
        _require_free(folder)
        self._build(config, folder)
        self._start()
        with only_writer(folder):
            # Once more: another process may have begun a run here meanwhile.
            _require_free(folder)
            atomic_write_json(folder / "versions.json", machine())
            # The config last: a folder that has one is a run.
            atomic_write_text(folder / "config.toml", to_toml(self.config))

    def _build(self, config: RunConfig, folder: Path) -> None:
        self.folder, self.step, self._plans = folder, 0, None
        self._pending: list[dict[str, Any]] = []
        self._sizes = {"metrics.jsonl": 0, "timings.jsonl": 0, "plans.jsonl": 0}
        self._seconds, self._extended, self._started = 0.0, False, False
        build = GrowingRollouts if method(config.method).learner else Rollouts
        self.rollouts = build(config, lambda trace: self._record(vars(trace)), self._record)
        self.config, self.worlds = self.rollouts.config, self.rollouts.worlds
        self._model_start, self._model_base = spent_by(self.config, self.worlds), dict[str, float]()

    _plans: JsonLines | None

    def _start(self) -> None:
        """Plan the first subgoals; a planner that learns has minutes of imitation before it, which the run shows."""
        if not isinstance(self.rollouts, GrowingRollouts):
            self.rollouts.start()
            self._started = True

    @classmethod
    def resume(cls, folder: Path, *, steps: int | None = None) -> Trainer:
        """A run as its newest checkpoint left it.

        Args:
            folder: the run.
            steps: train up to so many steps instead of what the run was started with.

        Raises:
            EchelonError: no run there, damaged files, checkpoints that are gone, or more steps done than asked for.
        """
        config = read_run(folder)
        extended = steps is not None and steps != config.steps
        if steps is not None:
            config = dataclasses.replace(config, steps=steps)
        # Read before anything is built: a damaged one must not cost a model's loading time.
        checkpoint = newest_checkpoint(folder, saved_once=_logged(folder) >= config.checkpoint_every)
        remove_leftovers(folder)
        remove_leftovers(folder / "checkpoints")
        trainer = cls.__new__(cls)
        trainer._build(config, folder)
        if checkpoint is None:
            trainer._start()
        else:
            trainer._load(checkpoint)
        trainer._extended = extended
        return trainer

    # -- the loop ------------------------------------------------------------------------------

    def run(
        self,
        report: Callable[[Progress], None] = lambda progress: None,
        should_stop: Callable[[], bool] = lambda: False,
        *,
        until: int | None = None,
    ) -> bool:
        """Train up to the configured number of steps.

        Args:
            report: called after each update.
            should_stop: asked after each update; the run then saves a checkpoint and returns.
            until: also save and return at the first update that reaches this many steps; called again, it goes on.

        Returns:
            Whether all steps are done.

        Raises:
            EchelonError: the disk is full or can't be written; the newest checkpoint is whole.
        """
        with only_writer(self.folder):
            if self._extended:
                # The next resume, which isn't told the new number of steps, goes on towards it too.
                atomic_write_text(self.folder / "config.toml", to_toml(self.config))
            logs = {name: JsonLines(self.folder / name, size) for name, size in self._sizes.items()}
            self._plans = logs["plans.jsonl"]
            try:
                with _tensorboard(self.folder, self.step) as board:
                    return self._loop(logs, board, report, should_stop, self.config.steps if until is None else until)
            finally:
                self.worlds.close()
                self._plans = None
                for log in logs.values():
                    log.close()

    def _loop(
        self,
        logs: dict[str, JsonLines],
        board: SummaryWriter,
        report: Callable[[Progress], None],
        should_stop: Callable[[], bool],
        until: int,
    ) -> bool:
        c, per_update = self.config, self.rollouts.steps_per_update
        for line in self._pending:
            self._record(line)
        self._pending.clear()
        if not self._started and isinstance(self.rollouts, GrowingRollouts):

            def imitating(done: int, total: int) -> None:
                report(Progress(0, c.steps, {}, 0.0, {}, imitating=(done, total)))

            if not self.rollouts.warm_up(imitating, should_stop):
                self._save(logs)
                return False
            self.rollouts.start()
            self._started = True
        saved = self.step
        while self.step < min(until, c.steps):
            clock, learnt = self.rollouts.update()
            self.step += per_update
            if wrong := [f"{name} is {value}" for name, value in learnt.items() if not math.isfinite(value)]:
                raise EchelonError(f"training diverged at step {self.step} ({wrong[0]}): lower algorithm.lr")
            metrics = self._metrics(learnt)
            logs["metrics.jsonl"].write(metrics)
            for name, value in metrics.items():
                if isinstance(value, int | float) and name != "step":
                    board.add_scalar(name, value, self.step)
            self._seconds += clock.total()
            rate = per_update / clock.total()
            shares = clock.shares()
            model = {p.name: round(t.seconds, 3) for p, _ in self.worlds.planners
                     if (t := self.worlds.plan_time[p.name]).rounds}  # fmt: skip
            model_spent = self._model_spent()
            spent = {f"model_{k.removeprefix('prompt_')}": model_spent[k]
                     for k in ("calls", "prompt_tokens", "seconds") if k in model_spent}  # fmt: skip
            timings = {"step": self.step, "seconds": round(self._seconds, 3), "steps_per_second": round(rate),
                       "shares": shares, "planner_seconds": model, **spent,
                       "model_spent": self._costs(model_spent)}  # fmt: skip
            logs["timings.jsonl"].write(timings)
            for name in ("steps_per_second", *spent):
                board.add_scalar(name, timings[name], self.step)
            notes = tuple(note for p, _ in self.worlds.planners if isinstance(p, ModelPlanner) for note in p.notes())
            if metrics.get("planner_collapsed"):
                notes += ("the planner no longer switches (learner.keep_penalty, learner.switch_rate_floor)",)
            report(Progress(self.step, c.steps, metrics, rate, shares, notes))
            stop = should_stop()
            if self.step - saved >= c.checkpoint_every or self.step >= min(until, c.steps) or stop:
                self._save(logs)
                saved = self.step
            if stop:
                break
        return self.step >= c.steps

    def _metrics(self, learnt: dict[str, float]) -> dict[str, Any]:
        """The line of metrics since the last one; everything in it is bit-identical for a seed."""
        e, worlds = self.worlds.take_episodes(), self.worlds
        metrics: dict[str, Any] = {
            "step": self.step,
            "episodes": e.count,
            "tsr": e.success / e.count if e.count else None,
            "own_episodes": e.own_count,
            "own_tsr": e.own_success / e.own_count if e.own_count else None,
            "steps_to_finish": e.length_of_success / e.success if e.success else None,
            "collisions": e.collisions / e.count if e.count else None,
            "task_return": e.task_return / e.count if e.count else None,
            **{name: float(value) for name, value in learnt.items()},
        }
        if worlds.shaper is not None:
            metrics["shaping_return"] = e.shaping_return / e.count if e.count else None
        if worlds.tracker is not None:
            counts, worlds.tracker.counts = worlds.tracker.counts, Counts()
            metrics["intrinsic_return"] = e.intrinsic_return / e.count if e.count else None
            told = {k: v for k, v in vars(counts).items() if k != "rejected"}
            if self.config.planning.timing == "wait":
                told = {k: v for k, v in told.items() if k not in BESIDE}
            metrics |= {f"subgoals_{k}": v for k, v in told.items()}
            metrics |= {f"rejected_{k}": v for k, v in counts.rejected.items()}
            for planner, _ in worlds.planners:
                if isinstance(planner, ModelPlanner):
                    metrics |= {f"model_{k}": v for k, v in planner.counters().items()}
        return metrics

    def _costs(self, spent: dict[str, float]) -> dict[str, float]:
        """What the model did for this run, and what its planner counted besides: all that isn't 0."""
        told = dict(spent)
        for planner, _ in self.worlds.planners:
            if isinstance(planner, ModelPlanner):
                told |= planner.costs()
        return {name: round(value, 6) for name, value in told.items() if value}

    def _record(self, line: dict[str, Any]) -> None:
        # The first plans are made while the worlds are built, before the log is open.
        if self._plans is None:
            self._pending.append(line)
        else:
            self._plans.write({"at": self.step, **line})

    # -- checkpoints ---------------------------------------------------------------------------

    def _save(self, logs: dict[str, JsonLines]) -> None:
        self._sizes = {name: log.sync() for name, log in logs.items()}
        progress = {
            "step": self.step,
            "seconds": self._seconds,
            "sizes": self._sizes,
            "planners": {p.name: p.state_dict() for p, _ in self.worlds.planners},
            "model": self._model_spent(),
            "config": identity(self.config),
        }
        save_checkpoint(
            self.folder / "checkpoints",
            self.step,
            # Worlds that have not begun have no state: they begin when the run goes on.
            Checkpoint(progress, self.worlds.state_dict() if self._started else {}, self.rollouts.state_dict()),
        )
        if isinstance(self.rollouts, GrowingRollouts):
            # For evaluations, and for others to plan with; this run goes on from its checkpoint.
            save_planner(self.rollouts.policy, self.rollouts.planner, self.folder / PLANNER)
        self.worlds.flush()
        for planner, _ in self.worlds.planners:
            if isinstance(planner, FrugalPlanner) and planner.student is not None:
                # For others to plan with; this run goes on from its checkpoint.
                planner.student.save(self.folder / STUDENT)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What the language model is asked inside the block isn't counted as this training's."""
        before = spent_by(self.config, self.worlds)
        try:
            yield
        finally:
            for name, value in spent_by(self.config, self.worlds).items():
                self._model_start[name] = self._model_start.get(name, 0) + value - before[name]

    def _model_spent(self) -> dict[str, float]:
        """What the language model did for this run, up to now; a process may serve several runs."""
        now = spent_by(self.config, self.worlds)
        return {k: self._model_base.get(k, 0) + v - self._model_start.get(k, 0) for k, v in now.items()}

    def _load(self, checkpoint: Checkpoint) -> None:
        progress = checkpoint.progress
        self.step, self._seconds, self._sizes = progress["step"], progress["seconds"], progress["sizes"]
        # Steps are whole rollouts, so a finished run has done some more than it was asked for.
        if self.step - self.rollouts.steps_per_update >= self.config.steps:
            raise EchelonError(f"run {self.folder} has done {self.step} steps already, more than {self.config.steps}")
        if changed := _differences(_completed(progress.get("config", "")), identity(self.config)):
            raise EchelonError(
                f"{self.folder / 'config.toml'} isn't what its checkpoint was trained with ({changed}): "
                f"put it back, or start a new run with --config"
            )
        self._model_base = progress.get("model", {})
        self.rollouts.load_state_dict(checkpoint.algorithm)
        for planner, _ in self.worlds.planners:
            planner.load_state_dict(progress["planners"][planner.name])
        if checkpoint.worlds:
            self.worlds.load_state_dict(checkpoint.worlds)
            self._started = True


def _logged(folder: Path) -> int:
    """The steps in the last line of `metrics.jsonl` but one; 0 where no run wrote it."""
    try:
        return int(json.loads(lines_of(folder / "metrics.jsonl")[-2])["step"])
    except (IndexError, KeyError, TypeError, ValueError):
        return 0


def _require_free(folder: Path) -> None:
    if (folder / "config.toml").exists():
        raise EchelonError(f"{folder} holds a run already: go on with --resume {folder}, or choose another --out")


def identity(config: RunConfig) -> str:
    """What makes a run this run: all but how long and on how many threads (a recurrent one depends on those)."""
    threads = config.threads if config.algorithm.recurrent else None
    return to_toml(dataclasses.replace(config, steps=1, threads=threads))


def _completed(told: str) -> str:
    """An identity with the settings that came since it was written, at their defaults."""
    return identity(from_toml(tomllib.loads(told))) if told else ""


def _differences(old: str, new: str) -> str:
    """The lines in which two configs differ, in words."""
    was, now = old.splitlines(), new.splitlines()
    gone = [line for line in was if line not in now]
    come = [line for line in now if line not in was]
    return "; ".join(f"{a} became {b}" for a, b in itertools.zip_longest(gone, come, fillvalue="nothing"))


@contextlib.contextmanager
def _tensorboard(folder: Path, step: int) -> Iterator[SummaryWriter]:
    # It writes in a thread of its own, tells of a full disk at a later call or when it is closed, and the thread's
    # end would be told as a traceback.
    tell = threading.excepthook

    def hear(args: threading.ExceptHookArgs) -> None:
        if not isinstance(args.exc_value, OSError):
            tell(args)

    threading.excepthook = hear
    try:
        # On resume, what an interrupted run wrote past its checkpoint is hidden.
        with SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None) as board:
            yield board
    except OSError as error:
        if error.errno not in _DISK:
            raise  # what a user's world or planner met: a file that isn't there, a service that doesn't answer
        raise explain_os_error(error, folder) from error
    finally:
        threading.excepthook = tell


def machine() -> dict[str, str]:
    """What a run's `versions.json` holds: by what it was made, where, and by which command."""
    return {
        **versions(),
        "numba": numba.__version__,
        "system": platform.platform(),
        "processor": processor(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
