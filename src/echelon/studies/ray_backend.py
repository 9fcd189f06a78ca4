"""Runs of a study on a Ray cluster (Moritz et al. 2018): one CPU and one thread a run, the results those of the pool.

The study's folder must be on a file system that all nodes see at the same path, and Echelon of the same version must
be installed on each. A run whose node or worker dies goes on elsewhere from its newest checkpoint. If the machine that
runs the study dies, Ray ends its tasks, and with each process the hold that it had on its run's folder is gone: the
study, called again, goes on.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar

import echelon
from echelon.errors import EchelonError, StorageError
from echelon.studies.backends import ONE_THREAD, cores

__all__ = ["RayBackend"]

_ANSWER_WITHIN = 5.0  # seconds in which the head of a cluster must answer
_GONE_AFTER = 20.0  # seconds without an answer; after a minute Ray would end this process without a word
_LOOK_EVERY = 2.0  # seconds
_LEAVE_WITHIN = 15.0  # seconds for leaving a cluster; from one that is gone it takes about 5
_STORE = 100 * 2**20  # bytes of the object store where Ray is started here: jobs and outcomes are small

Answer = TypeVar("Answer")


class RayBackend:
    """Tasks of a Ray cluster; see `backends.Backend` for what its methods promise.

    Attributes:
        slots: how many runs are done at once: the CPUs that the cluster has now, nodes that come and go included,
            or the number given.
    """

    def __init__(self, address: str | None = None, slots: int | None = None) -> None:
        """Connect to a cluster, or start Ray on this machine.

        Args:
            address: "auto" (the cluster that this machine is part of), or its head's host:port; None or "local":
                start Ray on this machine alone, until `close`. A program that has called `ray.init` keeps its own.
            slots: at most so many runs at once; default: as many as there are CPUs.

        Raises:
            EchelonError: Ray isn't installed, no cluster is there, it can't be used from here, or less than one slot.
        """
        if slots is not None and slots < 1:
            raise EchelonError(f"{slots} workers: it must be at least 1")
        self._ray = ray = _import_ray()
        self._ours = not ray.is_initialized()
        if self._ours:
            _connect(ray, address, slots)
        self._head = ray.get_runtime_context().gcs_address
        self._asker = _Asker()
        self._slots, self._cpus, self._look_at, self._heard_at = slots, 1, 0.0, time.monotonic()
        self._do = ray.remote(
            num_cpus=1, max_retries=0, scheduling_strategy="SPREAD", runtime_env={"env_vars": ONE_THREAD}
        )(_do)
        self._jobs: dict[Any, dict[str, Any]] = {}

    @property
    def slots(self) -> int:
        """How many runs are done at once."""
        self._look()
        return self._cpus if self._slots is None else self._slots

    def _look(self) -> None:
        """See whether the cluster is there, and how large it is now."""
        if time.monotonic() >= self._look_at and self._hear():
            self._cpus = max(1, int(self._ask(self._ray.cluster_resources).get("CPU", 0)))

    def _hear(self) -> bool:
        """Whether the head answers.

        Raises:
            StorageError: it hasn't for long.
        """
        answers = _answers(self._head)
        now = time.monotonic()
        self._look_at = now + _LOOK_EVERY
        if answers:
            self._heard_at = now
        elif now - self._heard_at > _GONE_AFTER:
            raise StorageError(self._gone())
        return answers

    def _ask(self, call: Callable[..., Answer], *args: Any, **more: Any) -> Answer:
        """What a call of Ray returns: asked of a head that has just gone, it would never return.

        Raises:
            StorageError: the cluster is gone.
        """
        asked = self._asker.ask(call, *args, **more)
        while not wait([asked], _LOOK_EVERY).done:
            self._hear()
        return asked.result()

    def _gone(self) -> str:
        return f"the Ray cluster at {self._head} is gone: start it and the study again"

    def start(self, job: dict[str, Any]) -> None:
        """Begin a job; without a free CPU it waits for one."""
        self._jobs[self._ask(self._do.remote, job, str(Path.cwd()), echelon.__version__)] = job

    def wait(self, seconds: float) -> list[tuple[str, dict[str, Any]]]:
        """Jobs that ended, as (id, outcome).

        Raises:
            StorageError: the cluster is gone.
        """
        self._look()
        if not self._jobs:
            time.sleep(seconds)
            return []
        ready, _ = self._ask(self._ray.wait, list(self._jobs), num_returns=1, timeout=seconds)
        return [self._outcome(ref, self._jobs.pop(ref)) for ref in ready]

    def _outcome(self, ref: Any, job: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        ray = self._ray
        try:
            node, outcome = self._ask(ray.get, ref)
        except ray.exceptions.RayTaskError as error:
            reason = f"a node of the Ray cluster can't run Echelon: {_line(error.cause or error)}"
            return job["id"], {"status": "storage", "reason": reason}
        except ray.exceptions.RuntimeEnvSetupError as error:
            return job["id"], {"status": "storage", "reason": f"a node of the Ray cluster fails: {_line(error)}"}
        except ray.exceptions.RayError as error:
            # Without this machine's part of the cluster, or its head, every run would die until it counts as failed.
            if isinstance(error, ray.exceptions.LocalRayletDiedError) or not _answers(self._head):
                return job["id"], {"status": "storage", "reason": self._gone()}
            return job["id"], {"status": "died", "reason": _how_it_died(ray, error)}
        folder = Path(job["folder"])
        if outcome["status"] == "finished" and not _holds(folder, "result.json"):
            reason = f"node {node} finished {job['id']}, but its result isn't in {folder} here: {_SHARED}"
            outcome = {"status": "storage", "reason": reason}
        return job["id"], outcome

    def close(self) -> None:
        """Give up jobs under way, and leave the cluster; end Ray where it was started here."""
        jobs, self._jobs = list(self._jobs), {}

        def leave() -> None:
            for ref in jobs:
                with contextlib.suppress(self._ray.exceptions.RayError):
                    self._ray.cancel(ref, force=True)
            if self._ours:
                self._ray.shutdown()

        # Of another thread, since a call that never returned keeps the first.
        self._asker.end()
        self._asker = _Asker()
        left = wait([self._asker.ask(leave)], _LEAVE_WITHIN).done
        self._asker.end()
        if self._ours and not left:
            atexit.unregister(self._ray.shutdown)  # which would wait as long when this process ends


class _Asker:
    """A thread that calls what may never return; it holds no process back from its end."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="echelon-ray", daemon=True).start()

    def ask(self, call: Callable[..., Answer], *args: Any, **more: Any) -> Future[Answer]:
        asked: Future[Answer] = Future()
        self._calls.put((asked, lambda: call(*args, **more)))
        return asked

    def end(self) -> None:
        """Once it has done what it was asked."""
        self._calls.put(None)

    def _serve(self) -> None:
        while (task := self._calls.get()) is not None:
            asked, call = task
            try:
                asked.set_result(call())
            except BaseException as error:  # of whatever kind: it is the caller's
                asked.set_exception(error)
            del task, asked, call  # what came of it is the caller's alone


_SHARED = "the study's folder must be on a file system that all nodes see"


def _do(job: dict[str, Any], where: str, version: str) -> tuple[str, dict[str, Any]]:
    """On a node: the node's name and how the job went."""
    node = socket.gethostname()
    if echelon.__version__ != version:
        reason = f"node {node} has Echelon {echelon.__version__}, this study runs with {version}: install the same"
        return node, {"status": "storage", "reason": reason}
    study = Path(job["folder"]).parents[1]
    files = [study / "study.toml", *(Path(name) for name in job["imports"] if name.endswith(".py"))]
    for file in files:
        if not file.exists():
            return node, {"status": "storage", "reason": f"node {node} can't see {file}: {_SHARED}"}
    # Paths in a run's settings may be relative, as they may with the pool.
    with contextlib.suppress(OSError):
        os.chdir(where)
    from echelon.studies.work import execute

    return node, execute(job)


def _import_ray() -> Any:
    # Read when Ray is imported: nothing is sent about its use, and what it would tell of workers that died stays in
    # its own logs, since the study tells it.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    try:
        import ray
    except ImportError:
        raise EchelonError("a study on a Ray cluster needs Ray: pip install 'echelon-marl[ray]'") from None
    return ray


def _connect(ray: Any, address: str | None, slots: int | None) -> None:
    quiet = {"logging_level": logging.CRITICAL, "log_to_driver": False, "include_dashboard": False}
    if address is None or address == "local":
        found, more = "local", {"num_cpus": cores() if slots is None else slots, "object_store_memory": _STORE}
    else:
        found, more = _find(address), {}
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=found, **quiet, **more)
    except (Exception, SystemExit) as error:  # whatever Ray raises: of too many kinds to name
        what = f"can't use the Ray cluster at {found}" if found != "local" else "can't start Ray on this machine"
        raise EchelonError(f"{what}: {_line(error)}") from error
    finally:
        # Ray takes the signal for itself.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminate)


def _find(address: str) -> str:
    """The host:port of a cluster's head that answers; Ray itself would wait for minutes."""
    if address == "auto":
        from ray._private.services import get_ray_address_from_environment

        try:
            address = get_ray_address_from_environment("auto", None)
        except ConnectionError:
            raise EchelonError(
                "there is no Ray cluster on this machine: start one with ray start --head, or give its host:port"
            ) from None
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise EchelonError(f"Ray address {address!r}: it must be auto, local or the host:port of the cluster's head")
    if not _answers(address):
        raise EchelonError(f"no Ray cluster answers at {address}: give the host:port that ray start --head printed")
    return address


def _answers(address: str) -> bool:
    """Whether a server of HTTP/2, which Ray's heads speak, answers at host:port."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_WITHIN) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return True
            # The client's preface with empty settings; the server's first frame is its settings (RFC 9113, 3.4).
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
            frame = connection.recv(9, socket.MSG_WAITALL)
            return len(frame) == 9 and frame[3] == 4
    except (OSError, UnicodeError, OverflowError):
        return False


def _how_it_died(ray: Any, error: Exception) -> str:
    kinds = ray.exceptions
    for kind, words in (
        (kinds.NodeDiedError, "its node of the Ray cluster died"),
        (kinds.OutOfMemoryError, "its worker was ended: its node was out of memory"),
        (kinds.WorkerCrashedError, "its worker on the Ray cluster was killed (out of memory?) or crashed"),
        (kinds.TaskCancelledError, "its task on the Ray cluster was cancelled"),
    ):
        if isinstance(error, kind):
            return words
    return f"its task on the Ray cluster was lost ({_line(error)})"


def _holds(folder: Path, name: str) -> bool:
    # Listing a folder makes a network file system look again.
    with contextlib.suppress(OSError):
        return name in os.listdir(folder)  # noqa: PTH208
    return False


def _line(error: BaseException) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
