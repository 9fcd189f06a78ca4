"""Runs Python programs that a model wrote, with tests, where they can do no harm.

Each program runs in a process of its own, forked from a small server that has loaded nothing but the standard library,
in a fresh folder that is deleted afterwards, with an empty environment, no standard input, and its output capped. The
server kills it when its time is over. These barriers stand between it and the machine, as far as the machine has them
(`sandbox_report` tells which):

====================  ==================================================================================================
`limits`              Resource limits on CPU time, address space, size of a file, open files, processes (everywhere),
                      and the wall clock, by the server.
`seccomp`             Linux on x86_64 and aarch64, no privilege needed. A list of the system calls that a program may
                      use; all others are refused: no new process or thread, no socket, no signal to another process,
                      no change of rights. Where neither of the next two stands, also no write to any file. (The numbers
                      for aarch64 are from the kernel's headers; the tests were run on x86_64.)
`landlock`            Linux 5.13 and later where it is switched on, no privilege needed. Files are written only in the
                      program's folder, and read only there and in the system's and Python's libraries; other processes'
                      environment and memory can't be read.
`mounts`              Linux, as root or with user namespaces. Everything is mounted read-only but the program's folder,
                      a small file system in memory (so its whole size is limited); `/proc` is empty.
`network`, `pids`     Linux, as root or with user namespaces. A network with no way out, not even to this machine; and a
                      numbering of processes that dies with the program, its grandchildren included.
`user`                Root only: the program runs as `nobody`, without privileges. (Root's own limit on the number of
                      processes doesn't bind root.)
`guard`               Everywhere: an audit hook and fewer built-ins inside the interpreter. A second barrier with
                      clearer messages; an interpreter can be subverted from within, so nothing rests on it alone.
====================  ==================================================================================================

Running programs needs barriers of the kernel's against writing files, the network and making processes; `seccomp`
alone is enough. Where one of the three is missing (macOS, or a container that forbids all of these), `Sandbox` refuses,
unless `weak=True` accepts what is left. None of this holds against a hole in the kernel; for programs of someone who
means harm, run the whole in a virtual machine. A program's reading of the system's libraries is not prevented, and
without `landlock` it can read whatever this user (as root: everybody) can.

What a program's tests say is reported over a pipe of its own, in lines that carry a random token, which the program
would have to find in the memory of the interpreter that it shares with its tests; a frame or a garbage collector's list
that would show it is refused by `guard`. The tests see the built-ins as they were before the program ran, and results
of exported functions must be made of Python's own types, for an object may claim to equal anything. A program that
rewrites a library module that its tests use, or the interpreter's memory, can still lie: look at what earns full marks.

Programs may import the standard library only. Hash seeds and `random` start equal in each; clocks don't. Parallel
programs share nothing but the machine's time: a program near its limit of wall time may fail on a busy machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from echelon.errors import EchelonError, unknown_name

__all__ = ["BARRIERS", "Limits", "Program", "RunResult", "Sandbox", "run_many", "sandbox_report"]

BARRIERS = ("namespaces", "network", "mounts", "pids", "landlock", "seccomp", "user", "guard")
"""The barriers by name; `namespaces` is what `network`, `mounts` and `pids` are made of."""

Status = Literal["ok", "error", "timeout", "exited", "lost"]

_SERVER = Path(__file__).with_name("_sandbox_server.py")
_PATIENCE = 15.0  # seconds beyond a program's own time after which its server counts as dead


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Args:
        wall_seconds: time by the clock, for the program and all of its tests.
        cpu_seconds: whole seconds of CPU time.
        memory_bytes: address space, Python itself included (about 30 MB).
        file_bytes: size of one file.
        disk_bytes: size of its folder in all; holds where `mounts` stands.
        open_files: open files at a time, 6 of which are the sandbox's.
        processes: processes of the user that it runs as; `seccomp` allows none but itself.
        output_bytes: how much of what it prints is kept; the rest is read and dropped.
    """

    wall_seconds: float = 3.0
    cpu_seconds: int = 2
    memory_bytes: int = 512 << 20
    file_bytes: int = 1 << 20
    disk_bytes: int = 16 << 20
    open_files: int = 32
    processes: int = 16
    output_bytes: int = 16 << 10

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise EchelonError(f"sandbox limit {name} must be above 0, got {value}")


@dataclass(frozen=True)
class Program:
    """Untrusted code and the tests that it is put to.

    Args:
        code: Python source, untrusted.
        tests: Python sources, each run by itself after the code; one passes unless it raises.
        exports: the names of the code that the tests see; empty: all of them.
        aliases: other names under which the tests see an exported one (`{"candidate": "main"}`).
        plain_results: what an exported function returns must be made of Python's own types (numbers, strings, lists,
            dicts, dates, …), or the test fails; only with `exports`.
    """

    code: str
    tests: tuple[str, ...] = ()
    exports: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    plain_results: bool = True


@dataclass(frozen=True)
class RunResult:
    """What became of a program.

    Args:
        status: "ok": it ran to its end (its tests may have failed); "error": its code raised or isn't Python;
            "timeout"; "exited": it ended its process before the end (`os._exit`, out of memory in C); "lost": the
            sandbox itself failed, which says nothing about the program.
        passed: of each test, whether it passed; those that it never came to did not.
        messages: of each test, "" or why it failed ("AssertionError", "ValueError: …", "not run"); untrusted.
        output: the first part of what it printed, standard output and error together; untrusted.
        error: why the status isn't "ok", or ""; untrusted.
        seconds: by the clock.
        cpu_seconds: CPU time.
    """

    status: Status
    passed: tuple[bool, ...] = ()
    messages: tuple[str, ...] = ()
    output: str = ""
    error: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0


class _ServerLost(Exception):
    """The server process ended or fell silent."""


class _Server:
    """One server process and the folder that its programs write in."""

    def __init__(self, python: str, limits: Limits, without: Sequence[str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="echelon-sandbox-"))
        # Some Pythons find their own library only so.
        kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ}
        # Not -I, which would ignore the hash seed; the rest of what it does is in these options.
        self._process = subprocess.Popen(
            [python, "-s", "-S", "-P", "-B", str(_SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            env={**kept, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"},
            start_new_session=True,  # Ctrl-C is for this process; it closes its servers
        )
        settings = {"limits": asdict(limits), "without": list(without), "folder": str(self.folder)}
        try:
            self.report: dict[str, Any] = self.ask(settings, 30.0)
        except _ServerLost as error:
            self.close()
            raise EchelonError(f"the sandbox could not start: {error}") from None

    def ask(self, value: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Send one frame and await the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        data = json.dumps(value).encode()
        until = time.monotonic() + seconds
        try:
            rest = memoryview(struct.pack(">I", len(data)) + data)
            while rest:
                rest = rest[self._process.stdin.write(rest) or 0 :]
            size = struct.unpack(">I", self._read(4, until))[0]
            answer: dict[str, Any] = json.loads(self._read(size, until))
        except (OSError, ValueError) as error:
            raise _ServerLost(str(error)) from None
        return answer

    def _read(self, count: int, until: float) -> bytes:
        assert self._process.stdout is not None
        waiter = select.poll()
        waiter.register(self._process.stdout, select.POLLIN)
        data = b""
        while len(data) < count:
            if not waiter.poll(max(0.0, until - time.monotonic()) * 1000):
                raise _ServerLost("it does not answer")
            piece = self._process.stdout.read(count - len(data))
            if not piece:
                raise _ServerLost(f"it ended with status {self._process.poll()}")
            data += piece
        return data

    def close(self) -> None:
        """End the process and remove its folder; nothing that it started is left."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its child dies with it
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _close_all(servers: list[_Server]) -> None:
    while servers:
        servers.pop().close()


class Sandbox:
    """Runs untrusted programs, several at a time; see the module's text for what holds where.

    Its servers start with the first program and stay until `close` (or until this object or the process ends). Safe to
    use from several threads; not across a fork.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        workers: int | None = None,
        without: Iterable[str] = (),
        weak: bool = False,
        python: str | None = None,
    ) -> None:
        """Set up; no process is started yet.

        Args:
            limits: of each program.
            workers: programs at a time; default: the CPUs that this process may use, at most 8.
            without: barriers (see `BARRIERS`) to leave out: for tests of one barrier at a time.
            weak: run also where the kernel keeps programs from too little.
            python: the interpreter, 3.11 or later; default: this one.

        Raises:
            EchelonError: an unknown barrier, or no worker.
        """
        self.limits = limits or Limits()
        self.without = tuple(without)
        for name in self.without:
            if name not in BARRIERS:
                raise unknown_name("barrier", name, BARRIERS)
        if workers is not None and workers < 1:
            raise EchelonError(f"a sandbox needs at least 1 worker, got {workers}")
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.workers = workers or min(8, cpus)
        self._weak = weak
        self._python = python or sys.executable
        self._idle: queue.LifoQueue[_Server | None] = queue.LifoQueue()
        for _ in range(self.workers):
            self._idle.put(None)  # a place for a server not started yet
        self._servers: list[_Server] = []
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _close_all, self._servers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the servers; none of the programs may be running. A later run starts new ones."""
        with self._lock:
            for _ in range(self.workers):
                self._idle.get()
            _close_all(self._servers)
            for _ in range(self.workers):
                self._idle.put(None)

    def _start(self) -> _Server:
        server = _Server(self._python, self.limits, self.without)
        missing = server.report["missing"]
        if missing and not self._weak:
            server.close()
            raise EchelonError(
                f"this machine can't keep untrusted programs from {' and from '.join(missing)}: run on Linux with "
                "seccomp, or accept the risk with weak=True"
            )
        self._servers.append(server)
        return server

    def report(self) -> dict[str, str]:
        """Of each barrier, "on", or "off: " and why."""
        server = self._idle.get()
        try:
            server = server or self._start()
            state = dict(server.report["barriers"])
        finally:
            self._idle.put(server)
        state["guard"] = "off: switched off" if "guard" in self.without else "on"
        state["limits"] = "on"
        return state

    def run(self, program: Program) -> RunResult:
        """Run one program; it never raises for what the program does.

        Raises:
            EchelonError: the sandbox can't start, or this machine's barriers are too few.
        """
        job = {**asdict(program), "guard": "guard" not in self.without}
        server = self._idle.get()
        try:
            server = server or self._start()
            answer = server.ask(job, self.limits.wall_seconds + _PATIENCE)
        except _ServerLost as error:
            assert server is not None
            with contextlib.suppress(ValueError):
                self._servers.remove(server)
            server.close()
            server = None
            answer = {"status": "lost", "error": f"the sandbox's server was lost: {error}"}
        finally:
            self._idle.put(server)
        answer["passed"] = tuple(answer.get("passed", ())) or (False,) * len(program.tests)
        answer["messages"] = tuple(answer.get("messages", ())) or ("not run",) * len(program.tests)
        return RunResult(**answer)

    def run_many(self, programs: Sequence[Program]) -> list[RunResult]:
        """Run programs, `workers` at a time; their results in their order."""
        if len(programs) < 2 or self.workers == 1:
            return [self.run(program) for program in programs]
        with ThreadPoolExecutor(min(self.workers, len(programs))) as pool:
            return list(pool.map(self.run, programs))


def run_many(
    programs: Sequence[Program], *, workers: int | None = None, limits: Limits | None = None
) -> list[RunResult]:
    """`Sandbox.run_many` in a sandbox for this once."""
    with Sandbox(limits, workers=workers) as sandbox:
        return sandbox.run_many(programs)


def sandbox_report() -> dict[str, str]:
    """Which barriers hold on this machine: of each, "on", or "off: " and why."""
    with Sandbox(workers=1, weak=True) as sandbox:
        return sandbox.report()
