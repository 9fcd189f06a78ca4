"""Where the runs of a study are done: the contract, and a pool of processes on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from echelon._files import explain_os_error
from echelon.errors import EchelonError

__all__ = ["ONE_THREAD", "Backend", "PoolBackend", "cores"]

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
_LAST_WORDS = 5.0  # seconds that a worker without pipes has to end by itself
_DEAF = "its worker closed its output, and was ended"


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


class Backend(Protocol):
    """Does jobs somewhere; see `work.execute`."""

    @property
    def slots(self) -> int:
        """How many jobs it does at once; it may change."""
        ...

    def start(self, job: dict[str, Any]) -> None:
        """Begin a job; never more than `slots` at once."""
        ...

    def wait(self, seconds: float) -> list[tuple[str, dict[str, Any]]]:
        """Jobs that ended, as (id, outcome), waiting for one at most so long.

        An outcome is what `execute` gave, or `{"status": "died", "reason": …}` where its process or machine is gone.
        """
        ...

    def close(self) -> None:
        """Leave nothing behind; jobs under way are given up."""
        ...


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    job: str | None = None
    heard: bytes = field(default=b"")


class PoolBackend:
    """Processes on this machine, one thread each, started when first needed.

    Each run has a core to itself: runs side by side use the cores better than one run over all of them, and don't
    wait for each other. A worker that dies (the kernel kills the largest when memory runs out) takes only its own run
    with it.
    """

    def __init__(self, slots: int | None = None, log: Path | None = None) -> None:
        """Use `slots` processes (default: as many as there are cores), which print into the file `log`.

        Raises:
            EchelonError: less than one process.
        """
        self.slots = cores() if slots is None else slots
        if self.slots < 1:
            raise EchelonError(f"{self.slots} workers: it must be at least 1")
        self._log_path, self._workers = log, list[_Worker]()
        self._selector = selectors.DefaultSelector()

    def start(self, job: dict[str, Any]) -> None:
        """Begin a job."""
        worker = next((w for w in self._workers if w.job is None), None) or self._spawn()
        worker.job = job["id"]
        assert worker.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: `wait` tells
            worker.process.stdin.write(json.dumps(job).encode() + b"\n")
            worker.process.stdin.flush()

    def _spawn(self) -> _Worker:
        # A session of its own: Ctrl-C is for the study, which tells the workers.
        try:
            log = self._log_path.open("ab") if self._log_path is not None else None
        except OSError as error:
            raise explain_os_error(error, self._log_path or Path()) from error
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "echelon.studies.worker", str(os.getpid())], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, env={**os.environ, **ONE_THREAD}, start_new_session=True,
            )  # fmt: skip
        finally:
            if log is not None:
                log.close()
        worker = _Worker(process)
        self._workers.append(worker)
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)
        return worker

    def wait(self, seconds: float) -> list[tuple[str, dict[str, Any]]]:
        """Jobs that ended, as (id, outcome)."""
        readable = [key.data for key, _ in self._selector.select(seconds)]
        # A worker's own children may hold its pipe open after its death.
        dead = [worker for worker in self._workers if worker.process.poll() is not None]
        ended = []
        for worker in readable + [worker for worker in dead if worker not in readable]:
            assert worker.process.stdout is not None
            data = worker.process.stdout.read(1 << 16)
            if data:
                worker.heard += data
                if b"\n" in worker.heard and worker.job is not None:
                    ended.append((worker.job, json.loads(worker.heard)))
                    worker.heard, worker.job = b"", None
            elif data == b"" or worker in dead:
                self._forget(worker)
                reason = _how_it_died(worker.process.returncode) if _ends(worker.process) else _DEAF
                if worker.job is not None:
                    ended.append((worker.job, {"status": "died", "reason": reason}))
        return ended

    def _forget(self, worker: _Worker) -> None:
        for pipe in (worker.process.stdout, worker.process.stdin):
            assert pipe is not None
            if pipe is worker.process.stdout:
                self._selector.unregister(pipe)
            with contextlib.suppress(OSError):
                pipe.close()
        self._workers.remove(worker)

    def close(self) -> None:
        """End all workers; a run under way goes on from its checkpoint next time."""
        for worker in list(self._workers):
            if worker.job is not None:
                worker.process.kill()
            self._forget(worker)
            _ends(worker.process)
        self._selector.close()


def _ends(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process whose pipes are closed ends by itself; one that doesn't is ended."""
    try:
        process.wait(_LAST_WORDS)
    except subprocess.TimeoutExpired:  # a thread of a user's module, say
        process.kill()
        process.wait()
        return False
    return True


def _how_it_died(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"its worker was killed by {name}{hint}"
    return f"its worker ended with status {code}"
