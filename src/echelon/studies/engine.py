"""Runs a study: what is finished is never repeated, what was killed goes on, what fails is kept and told.

A study's folder: `study.toml` (the study as it was last run), `runs/<id>/` (a run's folder; `result.json` when it is
finished, `failed.json` when it can't be), `results.json` (everything, collected), `workers.log`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import echelon
from echelon._files import atomic_write_json, atomic_write_text, only_writer, remove_leftovers
from echelon.checkpoints import FORMAT as CHECKPOINT_FORMAT
from echelon.checkpoints import checkpoints_of
from echelon.errors import EchelonError, StorageError
from echelon.evaluation.protocol import FORMAT as PROTOCOL_FORMAT
from echelon.extensions import resolved
from echelon.runs import processor, versions
from echelon.studies.backends import Backend, cores
from echelon.studies.kinds import kind_of
from echelon.studies.spec import Study, StudyRun, study_to_toml
from echelon.studies.work import FORMAT, forget_progress, job_of, read_progress

__all__ = ["Matrix", "collect", "do_runs", "files_of", "kept_result", "replays_of", "run_study"]

# How often a run is begun whose worker dies or finds its folder held, before it counts as failed or is left pending.
ATTEMPTS = 3
_DRAIN = 20.0  # seconds that runs under way have to save what they have when the study meets an error


@dataclass
class Matrix:
    """Where a study is, for whoever shows it.

    Attributes:
        total: its runs; finished: those that are done, with those done earlier; failed: id → reason.
        running: id → what the run says of itself (`stage`, `done`, `total`, `info`), or None before it says anything.
        news: what happened since the last call, in words.
        seconds_left: an estimate: what runs should take less what they have trained, times what runs that were done
            here from their beginning took longer than they should; None before there was one of these.
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

    After an error runs under way have 20 seconds to save a checkpoint; after a `KeyboardInterrupt` they haven't.
    """
    if (folder / "config.toml").exists():
        raise EchelonError(f"{folder} holds a run: choose another folder for the study")
    runs = study.runs()
    with only_writer(folder):
        remove_leftovers(folder)
        for run in runs:
            kept_result(folder / "runs" / run.id)  # of another format, nothing is begun
        # Files that it imports are found from its folder, too.
        atomic_write_text(folder / "study.toml", study_to_toml(replace(study, imports=resolved(study.imports))))
        do_runs(study, runs, folder, backend, retry_failed=retry_failed, report=report, should_stop=should_stop)
        results = collect(study, folder)
        atomic_write_json(folder / "results.json", results, compact=True)
        return results


def do_runs(
    study: Study,
    runs: Sequence[StudyRun],
    folder: Path,
    backend: Backend,
    *,
    retry_failed: bool = False,
    report: Callable[[Matrix], None] = lambda matrix: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Do those of some runs that aren't done; what came of each is in its folder, `runs/<id>`: see `kept_result`.

    Args:
        study: says by which protocol runs are judged and what is imported first.
        runs: the runs; their folders may hold a beginning already, from which they go on.
        folder, backend, retry_failed, report, should_stop: see `run_study`; the caller holds the folder.

    Raises:
        EchelonError, StorageError: as `run_study`.
    """
    kept = {run.id: kept_result(folder / "runs" / run.id) for run in runs}
    stop = folder / f".stop-{os.getpid()}"
    for old in folder.glob(".stop-*"):
        old.unlink(missing_ok=True)
    engine = _Engine(study, runs, folder, backend, stop, report, should_stop)
    try:
        engine.run(kept, retry_failed)
    except Exception:
        engine.drain()
        raise
    finally:
        # Who is still at work shall find it; the next call removes it.
        if not engine.matrix.running:
            with contextlib.suppress(OSError):
                stop.unlink(missing_ok=True)


class _Engine:
    def __init__(
        self,
        study: Study,
        runs: Sequence[StudyRun],
        folder: Path,
        backend: Backend,
        stop: Path,
        report: Callable[[Matrix], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.study, self.runs, self.folder, self.backend = study, {run.id: run for run in runs}, folder, backend
        self.stop, self.report, self.should_stop = stop, report, should_stop
        self.matrix = Matrix(len(runs))
        self.expected = {
            run.id: kind_of(run.config.method).estimate(run.config, study.protocol).seconds for run in runs
        }
        self.spent = self.took = 0.0  # seconds of runs done here from their beginning: expected, and real
        self.trained: dict[str, float] = {}  # the share of its training that a run has done
        self.began: dict[str, float] = {}  # ... and had when it was begun here

    def run(self, kept: dict[str, tuple[str | None, dict[str, Any]]], retry_failed: bool) -> None:
        """Do the runs whose state isn't "finished"."""
        m = self.matrix
        waiting: deque[str] = deque()
        others: Counter[str] = Counter()
        for name, (state, told) in kept.items():
            if state == "finished":
                m.finished += 1
                others[told.get("versions", {}).get("echelon", echelon.__version__)] += 1
            elif state == "failed" and not retry_failed:
                m.failed[name] = _reason(told)
            else:
                # Begun again, it goes on next time if it is stopped now.
                with contextlib.suppress(OSError):
                    (self.folder / "runs" / name / "failed.json").unlink(missing_ok=True)
                self.trained[name] = self._saved(name)
                waiting.append(name)
        del others[echelon.__version__]
        for version, count in others.items():
            were = "1 run was" if count == 1 else f"{count} runs were"
            m.news.append(
                f"{were} made by echelon {version}, this is {echelon.__version__}: move them away to do them anew"
            )
        if m.news:
            self.report(m)
            m.news.clear()
        attempts: dict[str, int] = {}
        trouble: str | None = None
        stopping = False
        while waiting or m.running:
            stopping = stopping or trouble is not None or self.should_stop()
            if stopping:
                waiting.clear()
                if not m.running:
                    break
                self._tell_workers_to_stop()
            while waiting and len(m.running) < self.backend.slots:
                name = waiting.popleft()
                attempts[name] = attempts.get(name, 0) + 1
                forget_progress(self.folder / "runs" / name)
                self.trained[name] = self.began[name] = self._saved(name)
                self.backend.start(job_of(self.study, self.runs[name], self.folder, self.stop))
                m.running[name] = None
            for name, outcome in self.backend.wait(0.5):
                del m.running[name]
                status, reason = outcome["status"], outcome["reason"]
                if status == "stopped" and not stopping:
                    status, reason = "died", "its worker stopped unasked"
                match status:
                    case "finished":
                        m.finished += 1
                        if not self.began[name]:
                            self.spent += self.expected[name]
                            self.took += outcome["seconds"]
                        m.news.append(f"{name}: finished ({outcome['seconds']:.0f} s)")
                    case "failed":
                        m.failed[name] = reason
                        m.news.append(f"{name}: failed: {reason}")
                    case "storage":
                        trouble = trouble or reason
                    case "died" | "busy" if attempts[name] < ATTEMPTS:
                        then = "goes on from its last checkpoint" if status == "died" else "is tried again"
                        m.news.append(f"{name}: {reason}; it {then}")
                        self.trained[name] = self._saved(name)
                        waiting.append(name)
                    case "died":
                        reason = f"{reason}, {attempts[name]} times"
                        told = {"format": FORMAT, "id": name, "reason": reason, "traceback": None}
                        try:
                            atomic_write_json(self.folder / "runs" / name / "failed.json", told)
                        except StorageError as error:
                            trouble = trouble or str(error)
                            continue
                        m.failed[name] = reason
                        m.news.append(f"{name}: failed: {reason}")
                    case "busy":
                        # Who holds it may well finish it: not to be called failed.
                        m.news.append(f"{name}: not done: {reason}")
            for name in m.running:
                m.running[name] = said = read_progress(self.folder / "runs" / name) or m.running[name]
                if said is not None and said["stage"] == "training":
                    self.trained[name] = min(1.0, said["done"] / said["total"])
            m.seconds_left = self._left([*waiting, *m.running])
            self.report(m)
            m.news.clear()
        if trouble is not None:
            raise StorageError(trouble)

    def drain(self) -> None:
        """After an error: runs under way save what they have, if they do so soon."""
        self._tell_workers_to_stop()
        end = time.monotonic() + _DRAIN
        with contextlib.suppress(Exception):  # the backend may be what failed
            while self.matrix.running and time.monotonic() < end:
                for name, _ in self.backend.wait(0.5):
                    del self.matrix.running[name]

    def _tell_workers_to_stop(self) -> None:
        # On a full disk a file of no bytes can often be made still; else workers meet the trouble themselves.
        with contextlib.suppress(OSError):
            self.stop.touch()

    def _saved(self, name: str) -> float:
        """The share of its training that a run has in its newest checkpoint."""
        config = self.runs[name].config
        return min(1.0, kind_of(config.method).steps_done(self.folder / "runs" / name) / config.steps)

    def _left(self, names: list[str]) -> float | None:
        """Seconds until the runs `names` are done, by what they should take and how runs here compare to that."""
        if not self.spent:
            return None
        left = [self.expected[name] * (1 - self.trained[name]) for name in names]
        return self.took / self.spent * max(sum(left) / max(1, self.backend.slots), *left, 0.0)


def kept_result(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """ "finished", "failed" or None, by the files of a run, and what its result or its `failed.json` says.

    Raises:
        EchelonError: it is of a newer format, or damaged.
    """
    for state, file, needed in (
        ("finished", "result.json", {"evaluations", "best", "last"}),
        ("failed", "failed.json", set[str]()),
    ):
        path = folder / file
        if not path.exists():
            continue
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _damaged(folder, file, error) from None
        if not isinstance(told, dict) or not isinstance(told.get("format"), int):
            raise _damaged(folder, file, "it says no format")
        _require_format(folder, file, told["format"], FORMAT)
        if missing := needed - set(told):
            raise _damaged(folder, file, f"{sorted(missing)[0]} is missing")
        return state, told
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
    return None, {}


def _damaged(folder: Path, file: str, why: object) -> EchelonError:
    return EchelonError(f"run {folder}: its {file} is damaged ({why}): remove that file, and the run is done again")


def _reason(told: dict[str, Any]) -> str:
    return str(told.get("reason") or "its failed.json gives no reason")


def _require_format(folder: Path, what: str, found: int, known: int) -> None:
    if found > known:
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
        state, kept = kept_result(where)
        cell = {k: getattr(run, k) for k in ("id", "method", "environment", "size", "agents", "seed")}
        entry: dict[str, Any] = {**cell, "steps": run.config.steps, "status": state or "pending", "reason": None}
        if state == "finished":
            entry |= {k: v for k, v in kept.items() if k != "format"}
        elif state == "failed":
            entry["reason"] = _reason(kept)
        runs.append(entry)
    told = {k: v for k, v in asdict(study).items() if k not in ("imports", "record")}
    told["protocol"] = study.protocol.to_json()
    results = {"format": FORMAT, "study": told, "machine": _machine(), "runs": runs}
    # As they are read again from a file: lists, no tuples; a Python program's settings may hold paths.
    return dict(json.loads(json.dumps(results, default=str)))


def _machine() -> dict[str, Any]:
    return {
        "processor": processor(),
        "cores": cores(),
        "system": platform.platform(),
        "versions": versions(),
    }


def files_of(study: Study, folder: Path, name: str) -> dict[str, Path]:
    """Where runs have a file of this name in their folders: a run's id → the file."""
    found = {run.id: folder / "runs" / run.id / name for run in study.runs()}
    return {run: path for run, path in found.items() if path.exists()}


def replays_of(study: Study, folder: Path) -> dict[str, Path]:
    """The recorded episodes that there are: a run's id → its replay document."""
    return files_of(study, folder, "replays/protocol.json")
