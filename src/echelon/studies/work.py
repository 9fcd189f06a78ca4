"""One run of a study, done where a backend says: in a worker process or on a node of a cluster.

A job is JSON: the run's id and config, the protocol, folders. `execute` gives back how it went, as JSON; what was
found is in the run's folder, whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
import tomllib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from echelon._files import atomic_write_json, explain_os_error, only_writer, read_json, remove_leftovers
from echelon.building import forget_answers
from echelon.errors import BusyError, EchelonError, StorageError
from echelon.evaluation.protocol import Protocol
from echelon.extensions import import_modules, resolved
from echelon.runs import processor, versions
from echelon.studies.kinds import kind_of
from echelon.studies.spec import Study, StudyRun

__all__ = ["FORMAT", "execute", "forget_progress", "job_of", "read_progress"]

FORMAT = 1
PROGRESS = "progress.json"
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)  # no fault of a run's
# Seconds to wait for a run's folder: an orphan of a killed study leaves it after its next update. A network file
# system keeps the hold of a node that died for longer (90 s is common), so that the run must be begun again.
_BUSY_FOR = 60.0


def job_of(study: Study, run: StudyRun, folder: Path, stop: Path) -> dict[str, Any]:
    """What `execute` needs to know.

    Args:
        study: the study.
        run: one of its runs.
        folder: the study's folder.
        stop: a file; while it exists, workers stop at the next safe point.
    """
    return {
        "id": run.id,
        "config": kind_of(run.config.method).write(run.config),
        "cell": {k: getattr(run, k) for k in ("environment", "size", "agents", "method", "seed")},
        "protocol": study.protocol.to_json(),
        "record": run.record,
        "imports": list(resolved(study.imports)),
        "folder": str((folder / "runs" / run.id).resolve()),
        "stop": str(stop.resolve()),
    }


def execute(job: dict[str, Any], orphaned: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Do a job; how it went: `status` and `reason`.

    "finished": `result.json` is there. "failed": the run itself can't be done, and `failed.json` says why.
    "stopped": it was told to stop, and goes on from its checkpoint next time. "busy": another process holds the run's
    folder still after a while. "storage": the disk or folder can't be written, which is no fault of the run's.

    Args:
        job: see `job_of`.
        orphaned: whether whoever gave the job is gone.
    """
    folder, began = Path(job["folder"]), time.monotonic()
    stop = Path(job["stop"])

    def should_stop() -> bool:
        return stop.exists() or orphaned()

    while True:
        try:
            return _execute(job, folder, should_stop)
        except BusyError as error:
            if should_stop():
                return {"status": "stopped", "reason": None}
            if time.monotonic() - began > _BUSY_FOR:
                return {"status": "busy", "reason": str(error)}
            time.sleep(0.5)
        except StorageError as error:
            return {"status": "storage", "reason": str(error)}
        except EchelonError as error:
            return _failed(job, folder, str(error), None)
        except MemoryError as error:
            return _failed(job, folder, f"out of memory ({error})", None)
        except OSError as error:
            if error.errno in _DISK:
                return {"status": "storage", "reason": str(explain_os_error(error, folder))}
            return _failed(job, folder, f"{type(error).__name__}: {error}", traceback.format_exc())
        except Exception as error:  # a user's environment or planner may raise anything; the study goes on
            return _failed(job, folder, f"{type(error).__name__}: {error}", traceback.format_exc())
        finally:
            with contextlib.suppress(OSError):
                (folder / PROGRESS).unlink(missing_ok=True)


def _execute(job: dict[str, Any], folder: Path, should_stop: Callable[[], bool]) -> dict[str, Any]:
    import_modules(job["imports"])
    kind = kind_of(tomllib.loads(job["config"])["method"])
    run = kind.restore(job["config"], f"run {job['id']}")
    # The trainer holds the run's folder while it trains; this holds it between, too.
    with only_writer(folder / ".job"):
        remove_leftovers(folder)
        start = time.time()
        told = _Progress(folder / PROGRESS)
        protocol = Protocol(**job["protocol"])
        forget_answers()
        found = kind.execute(run, folder, protocol, record=job["record"], report=told, should_stop=should_stop)
        if found is None:
            return {"status": "stopped", "reason": None}
        result = {"format": FORMAT, "id": job["id"], **job["cell"], "steps": run.steps, "status": "finished"}
        made_by = {"versions": versions(), "processor": processor()}
        atomic_write_json(folder / "result.json", {**result, "reason": None, **found, **made_by})
        with contextlib.suppress(OSError):
            (folder / "failed.json").unlink(missing_ok=True)
        kind.tidy(folder)
    return {"status": "finished", "reason": None, "seconds": time.time() - start}


def _failed(job: dict[str, Any], folder: Path, reason: str, trace: str | None) -> dict[str, Any]:
    told = {"format": FORMAT, "id": job["id"], "reason": reason, "traceback": trace}
    try:
        atomic_write_json(folder / "failed.json", told)
    except StorageError as error:
        return {"status": "storage", "reason": str(error)}
    return {"status": "failed", "reason": reason}


class _Progress:
    """Writes where a run is into a file, at most twice a second, for whoever shows the study."""

    def __init__(self, path: Path) -> None:
        self._path, self._next = path, 0.0

    def __call__(self, stage: str, done: float, total: float, info: str) -> None:
        if (now := time.monotonic()) < self._next:
            return
        self._next = now + 0.5
        told = {"stage": stage, "done": done, "total": total, "info": info}
        part = self._path.with_suffix(f".{os.getpid()}.part")
        # Only for show: a full disk is told by what matters.
        with contextlib.suppress(OSError):
            part.write_text(json.dumps(told), encoding="utf-8")
            part.replace(self._path)


def forget_progress(folder: Path) -> None:
    """Remove what an earlier attempt at the run in `folder`, which was killed, said of itself."""
    for pattern in (PROGRESS, "progress.*.part"):
        for old in folder.glob(pattern):
            with contextlib.suppress(OSError):
                old.unlink(missing_ok=True)


def read_progress(folder: Path) -> dict[str, Any] | None:
    """Where the run in `folder` says it is (`stage`, `done`, `total`, `info`), or None."""
    with contextlib.suppress(EchelonError, OSError):
        told = read_json(folder / PROGRESS, "progress")
        if isinstance(told, dict) and {"stage", "done", "total", "info"} <= set(told):
            return told
    return None
