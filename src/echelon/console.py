"""What the command line shows while long work goes on, and how it is stopped."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from echelon.configs import RunConfig
from echelon.llm.server import hurry
from echelon.training import Progress as TrainingProgress

__all__ = ["Stopper", "Watch", "console", "evaluate_trained", "results_rows", "results_table", "resuming"]


class _Console(Console):
    """Leaves it to the terminal to wrap a plain line: a path or a command in it must not be broken in a log."""

    def print(self, *objects: Any, **options: Any) -> None:
        options.setdefault("soft_wrap", True if all(isinstance(o, str) for o in objects) else None)
        super().print(*objects, **options)


console = _Console(stderr=True, highlight=False, markup=False)
_PLAIN_EVERY = 60.0
_SAME = 0.5  # seconds within which a second signal is the first once more: on a terminal torchrun passes Ctrl-C on


def resuming(folder: Path) -> str:
    """The command, fit for a shell, that goes on with the run in `folder`."""
    return shlex.join(["echelon", "train", "--resume", str(folder)])


class Stopper:
    """Turns the first Ctrl-C (or SIGTERM) into a request to stop at the next safe point.

    Attributes:
        signal: the number of the signal that came, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._at = 0.0

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.signal != 0

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            if time.monotonic() - self._at < _SAME:
                return
            raise KeyboardInterrupt
        self.signal, self._at = number, time.monotonic()
        # A server that hangs must not keep a run that is to stop.
        hurry(2.0)
        console.print("stopping at the next safe point (again: at once)")

    @contextlib.contextmanager
    def listening(self) -> Iterator[Stopper]:
        """Listen while the block runs."""
        before = {s: signal.signal(s, self._heard) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            hurry(None)
            for number, handler in before.items():
                signal.signal(number, handler)


class Watch:
    """A live progress display on a terminal; without one, a plain line a minute."""

    def __init__(self) -> None:
        self._live = console.is_terminal
        self._told = time.monotonic()
        self._bars = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=24 if console.width >= 100 else 12),
            TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.fields[info]}", markup=False),
            TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        self._notes: set[str] = set()

    def __enter__(self) -> Watch:
        if self._live:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._bars.stop()

    def show(self, what: str, done: float, total: float, info: str = "", *, counted: bool = False) -> None:
        """Show that `done` of `total` of `what` is done; `counted`: with these numbers beside the bar, too."""
        if self._live:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what, total=total, info=info)
            words = f"{done:,.0f} of {total:,.0f} {info}" if counted else info
            self._bars.update(self._tasks[what], completed=done, total=total, info=words)
        elif done < total and time.monotonic() - self._told >= _PLAIN_EVERY:
            self._told = time.monotonic()
            console.print(f"{what}: {done:,.0f} of {total:,.0f} {info}".rstrip())

    def end(self, what: str) -> None:
        """Take `what` away."""
        if what in self._tasks:
            self._bars.remove_task(self._tasks.pop(what))

    def note(self, text: str) -> None:
        """Print a line that a person must read, once."""
        if text not in self._notes:
            self._notes.add(text)
            console.print(text, markup=False)

    def training(self, what: str, progress: TrainingProgress) -> None:
        """Show a training run's progress: speed, success, where the time goes; each of its notes once."""
        for note in progress.notes:
            self.note(f"{what}: {note}")
        if progress.imitating is not None:
            self.show(f"{what}: imitation", *progress.imitating, "updates")
            return
        self.end(f"{what}: imitation")
        tsr = progress.metrics["tsr"]
        success = "TSR -" if tsr is None else f"TSR {tsr:.2f}"
        where = " ".join(f"{stage} {share:.0%}" for stage, share in progress.shares.items() if share >= 0.01)
        if self._live and console.width < 160:
            # A narrow terminal has room for how the time splits between the levels, not between all stages.
            where = f"plan {progress.shares.get('plan', 0.0):.0%}"
        self.show(what, progress.step, progress.steps, f"{progress.rate:,.0f} steps/s {success} [{where}]")


def evaluate_trained(
    name: str, run: RunConfig, folder: Path, watch: Watch, stopper: Stopper, title: str, *, episodes: int, record: int
) -> None:
    """Evaluate a run that was trained, record a replay, and show a table; nothing if it is stopped or wants none.

    Args:
        name: what was trained, in the table.
        run, folder: the same as a config, and its folder.
        watch, stopper: of the command.
        title: of the table.
        episodes: how many; 0: no evaluation.
        record: how many of them to record.
    """
    from echelon.evaluation.comparison import evaluate_run, finished_evaluation
    from echelon.reports.replay import write_replay

    if not episodes or stopper():
        return
    label = f"evaluating {name}"
    # A run that was finished before has often been evaluated too.
    result = finished_evaluation(run, folder, episodes=episodes) or evaluate_run(
        run, folder, episodes=episodes, record=record, should_stop=stopper, write_replay=write_replay,
        report=lambda done, total: watch.show(label, done, total, "episodes"),
    )  # fmt: skip
    watch.end(label)
    if result is not None:
        results_table({name: result}, title)


def results_rows(results: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The header and rows of the table that compares methods."""
    header = [
        "method", "TSR [95% interval]", "steps to finish", "collisions", "steps to TSR 0.9", "training", "evaluation",
        "model calls", "model tokens",
    ]  # fmt: skip
    rows = []
    for name, result in results.items():
        tsr, steps, collisions = result["tsr"], result["steps_to_finish"], result["collisions"]
        plans = result["plans"]
        rows.append(
            [
                name,
                f"{tsr['value']:.3f} [{tsr['low']:.3f}, {tsr['high']:.3f}]",
                "-" if steps is None else _mean(steps),
                _mean(collisions),
                "-"
                if not result.get("steps_to_tsr_90")
                else f"{'≤ ' * bool(result.get('steps_to_tsr_90_is_bound'))}{result['steps_to_tsr_90']:,.0f}",
                "-" if not result.get("training_seconds") else f"{result['training_seconds']:.0f} s",
                f"{result['seconds']:.0f} s",
                f"{plans.get('model_calls', 0) + result.get('training_model_calls', 0):,.0f}",
                f"{plans.get('model_prompt_tokens', 0) + result.get('training_model_tokens', 0):,.0f}",
            ]
        )
    return header, rows


def _mean(told: Mapping[str, float | None]) -> str:
    """A mean and half the width of its interval, which that of a single episode doesn't have."""
    value, high = told["value"], told["high"]
    assert value is not None
    return f"{value:.1f}" if high is None else f"{value:.1f} ± {high - value:.1f}"


def results_table(results: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Print the table that compares methods to standard output."""
    header, rows = results_rows(results)
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=i < 2)
    for row in rows:
        table.add_row(*row)
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160).print(table)
