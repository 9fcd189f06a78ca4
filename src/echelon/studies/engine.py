"""Runs a study: what is finished is never repeated, what was killed goes on, what fails is kept and told.

A study's folder: `study.toml` (the study as it was last run), `runs/<id>/` (a run's folder; `result.json` when it is
finished, `failed.json` when it can't be), `results.json` (everything, collected), `workers.log`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import echelon
from echelon._files import atomic_write_json, atomic_write_text, only_writer, read_json, remove_leftovers
from echelon.checkpoints import FORMAT as CHECKPOINT_FORMAT
from echelon.checkpoints import checkpoints_of
from echelon.errors import EchelonError, StorageError
from echelon.evaluation.protocol import FORMAT as PROTOCOL_FORMAT
from echelon.studies.backends import Backend, cores
from echelon.studies.costs import estimate
from echelon.studies.spec import Study, StudyRun, study_to_toml
from echelon.studies.work import FORMAT, job_of, read_progress

__all__ = ["Matrix", "collect", "replays_of", "run_study"]

ATTEMPTS = 3  # how often a run whose worker died is begun again before it counts as failed


@dataclass
class Matrix:
    """Where a study is, for whoever shows it.

    Attributes:
        total: its runs; finished: those that are done, with those done earlier; failed: id → reason.
        running: id → what the run says of itself (`stage`, `done`, `total`, `info`), or None before it says anything.
        news: what happened since the last call, in words.
        seconds_left: an estimate, from what finished runs took; None before there is one.
    """

    total: int
    finished: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    running: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    news: list[str] = field(default_factory=list)
    seconds_left: float | None = None


def run_study(
    study: Study,
    folder: Path,
    backend: Backend,
    *,
    retry_failed: bool = False,
    report: Callable[[Matrix], None] = lambda matrix: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Do all runs of a study that aren't done, and collect what there is.

    Args:
        study: the study.
        folder: its folder; called again with the same one, it goes on where it stopped.
        backend: where runs are done; it is not closed.
        retry_failed: begin failed runs again (they go on from their checkpoints).
        report: called about twice a second.
        should_stop: asked as often; runs under way then save a checkpoint and stop.

    Returns:
        What is in `results.json`; see `collect`.

    Raises:
        EchelonError: a run can't be built, or a folder is of a newer format.
        StorageError: the disk is full or can't be written, or another process runs this study. What is done is kept.
    """
    runs = study.runs()
    with only_writer(folder):
        remove_leftovers(folder)
        done = {run.id: _state_of(folder / "runs" / run.id) for run in runs}
        # Files that it imports are found from its folder, too.
        imports = tuple(str(Path(n).resolve()) if n.endswith(".py") else n for n in study.imports)
        atomic_write_text(folder / "study.toml", study_to_toml(replace(study, imports=imports)))
        stop = folder / f".stop-{os.getpid()}"
        for old in folder.glob(".stop-*"):
            old.unlink(missing_ok=True)
        try:
            _Engine(study, runs, folder, backend, stop, report, should_stop).run(done, retry_failed)
        finally:
            # Also after an error: workers under way save what they have.
            stop.unlink(missing_ok=True)
        results = collect(study, folder)
        atomic_write_json(folder / "results.json", results, compact=True)
        return results


class _Engine:
    def __init__(
        self,
        study: Study,
        runs: tuple[StudyRun, ...],
        folder: Path,
        backend: Backend,
        stop: Path,
        report: Callable[[Matrix], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.study, self.runs, self.folder, self.backend = study, {run.id: run for run in runs}, folder, backend
        self.stop, self.report, self.should_stop = stop, report, should_stop
        self.matrix = Matrix(len(runs))
        self.expected = {run.id: estimate(run.config, study.protocol).seconds for run in runs}
        self.spent = self.took = 0.0  # seconds of runs finished here: expected, and real

    def run(self, done: dict[str, str | None], retry_failed: bool) -> None:
        """Do the runs whose state isn't "finished"."""
        m = self.matrix
        waiting: deque[str] = deque()
        for name, state in done.items():
            if state == "finished":
                m.finished += 1
            elif state == "failed" and not retry_failed:
                m.failed[name] = read_json(self.folder / "runs" / name / "failed.json", "failed run")["reason"]
            else:
                # Begun again, it goes on next time if it is stopped now.
                with contextlib.suppress(OSError):
                    (self.folder / "runs" / name / "failed.json").unlink(missing_ok=True)
                waiting.append(name)
        attempts: dict[str, int] = {}
        trouble: str | None = None
        while waiting or m.running:
            stopping = trouble is not None or self.should_stop()
            if stopping:
                waiting.clear()
                if not m.running:
                    break
                self._tell_workers_to_stop()
            while waiting and len(m.running) < self.backend.slots:
                name = waiting.popleft()
                attempts[name] = attempts.get(name, 0) + 1
                m.running[name] = None
                self.backend.start(job_of(self.study, self.runs[name], self.folder, self.stop))
            for name, outcome in self.backend.wait(0.5):
                del m.running[name]
                match outcome["status"]:
                    case "finished":
                        m.finished += 1
                        self.spent += self.expected[name]
                        self.took += outcome["seconds"]
                        m.news.append(f"{name}: finished ({outcome['seconds']:.0f} s)")
                    case "failed":
                        m.failed[name] = outcome["reason"]
                        m.news.append(f"{name}: failed: {outcome['reason']}")
                    case "storage":
                        trouble = trouble or outcome["reason"]
                    case "died" if attempts[name] < ATTEMPTS:
                        m.news.append(f"{name}: {outcome['reason']}; it goes on from its last checkpoint")
                        waiting.append(name)
                    case "died":
                        reason = f"{outcome['reason']}, {attempts[name]} times"
                        told = {"format": FORMAT, "id": name, "reason": reason, "traceback": None}
                        atomic_write_json(self.folder / "runs" / name / "failed.json", told)
                        m.failed[name] = reason
                        m.news.append(f"{name}: failed: {reason}")
            for name in m.running:
                m.running[name] = read_progress(self.folder / "runs" / name) or m.running[name]
            m.seconds_left = self._left([*waiting, *m.running])
            self.report(m)
            m.news.clear()
        if trouble is not None:
            raise StorageError(trouble)

    def _tell_workers_to_stop(self) -> None:
        # On a full disk a file of no bytes can often be made still; else workers meet the trouble themselves.
        with contextlib.suppress(OSError):
            self.stop.touch()

    def _left(self, names: list[str]) -> float | None:
        """Seconds until the runs `names` are done, by what they should take and how runs here compare to that."""
        slower = self.took / self.spent if self.spent else 1.0
        return slower * sum(self.expected[name] for name in names) / max(1, self.backend.slots)


def _state_of(folder: Path) -> str | None:
    """ "finished", "failed" or None, by the files of a run.

    Raises:
        EchelonError: it is of a newer format.
    """
    state = None
    for name, file in (("finished", "result.json"), ("failed", "failed.json")):
        path = folder / file
        if state is None and path.exists():
            told = read_json(path, "run's result")
            _require_format(folder, file, told.get("format") if isinstance(told, dict) else None, FORMAT)
            state = name
    if state is None:
        # Of another format, the study isn't begun; what is damaged is told as the reason of its run alone.
        formats = {folder / "protocol.json": PROTOCOL_FORMAT}
        formats |= {path / "manifest.json": CHECKPOINT_FORMAT for path in checkpoints_of(folder / "checkpoints")[-1:]}
        for path, known in formats.items():
            with contextlib.suppress(OSError, ValueError):
                told = json.loads(path.read_text(encoding="utf-8"))
                of = told.get("of", told) if isinstance(told, dict) else {}
                found = of.get("format") if isinstance(of, dict) else None
                if isinstance(found, int):
                    _require_format(folder, path.name, found, known)
    return state


def _require_format(folder: Path, what: str, found: object, known: int) -> None:
    if not isinstance(found, int) or found > known:
        raise EchelonError(
            f"run {folder}: its {what} has format {found}, this Echelon reads up to {known}: use a newer Echelon, or "
            f"move the folder away to do the run anew"
        )


def collect(study: Study, folder: Path) -> dict[str, Any]:
    """Everything that a study found, in the order of its matrix; also while it goes on.

    Returns:
        JSON-able: `format`, `study` (what was asked), `machine`, and `runs`: for each its `id`, `method`,
        `environment`, `size`, `agents`, `seed`, `steps`, `status` ("finished", "failed" or "pending"), `reason`, and
        of finished ones what `run_by_protocol` returned.
    """
    runs = []
    for run in study.runs():
        where = folder / "runs" / run.id
        state = _state_of(where)
        cell = {k: getattr(run, k) for k in ("id", "method", "environment", "size", "agents", "seed")}
        entry: dict[str, Any] = {**cell, "steps": run.config.steps, "status": state or "pending", "reason": None}
        if state == "finished":
            entry |= read_json(where / "result.json", "run's result")
            del entry["format"]
        elif state == "failed":
            entry["reason"] = read_json(where / "failed.json", "failed run")["reason"]
        runs.append(entry)
    told = {k: v for k, v in asdict(study).items() if k not in ("settings", "imports", "record")}
    # As they are read again from a file: lists, no tuples.
    return dict(json.loads(json.dumps({"format": FORMAT, "study": told, "machine": _machine(), "runs": runs})))


def _machine() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": cores(),
        "system": platform.platform(),
        "versions": {"echelon": echelon.__version__, "python": platform.python_version()},
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def replays_of(study: Study, folder: Path) -> dict[str, Path]:
    """The recorded episodes that there are: a run's id → its replay document."""
    found = {run.id: folder / "runs" / run.id / "replays" / "protocol.json" for run in study.runs()}
    return {name: path for name, path in found.items() if path.exists()}
