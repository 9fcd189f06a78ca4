"""Plans that were made once: a cache in memory, and in an SQLite file that several processes may share.

What it holds never decides what a run does, only how fast: plans are kept by a digest of the whole folded question
(`symmetry.fold`), so that a planner whose answer depends on the question alone would have said the same again. No
fault of the file stops a run either: it is told in one line, counted, and the cache goes on in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echelon.errors import EchelonError
from echelon.planners.symmetry import Folded, fold
from echelon.subgoals import Plan, PlanRequest, Sight, SubgoalKind

__all__ = ["CachedPlans", "PlanCache", "Unanswered"]

_MAGIC = b"SQLite format 3\0"
_APPLICATION = 0x4563686F  # "Echo", in the file's header: whose file it is
_VERSION = 1
_TABLE = "CREATE TABLE plans (key BLOB NOT NULL UNIQUE, value BLOB NOT NULL)"
_WAIT = 0.25  # seconds for another process's lock: a run must not stand still for a cache
_PAUSE = 5.0  # seconds in which a file that others held isn't tried again
_WRITE = 256  # plans written at a time
_ASK = 500  # keys looked up at a time
_KEPT = 4096  # plans that wait for a file that others hold
_LONGEST = 1 << 17  # bytes of a value: 64 agents with 72 candidates each have 19 kB
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_NO_ROOM = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY}


class PlanCache:
    """Small binary values by key: the most recently used in memory, all that were kept in a file.

    Several processes may use one file, and a thread may use the cache of another. In a forked child it opens the file
    anew. What is read from the file is held against its checksum, which covers namespace and key.

    Attributes:
        path: the file, or None; namespace: what answers depend on; most: values kept at most, in memory and in the
            file (the oldest go first).
        trouble: why the file isn't read or written any more, in one line, or None.
        hits, misses: keys asked for. stored: values put in. faults: errors of the file and values that were damaged.
        busy: times that another process held the file too long; what was to be read or written then wasn't.
    """

    def __init__(self, path: Path | None, *, namespace: str, most: int = 200_000) -> None:
        """A cache in `path`, which is opened when it is first needed; None: in memory only.

        Args:
            path: an SQLite file; it and its folder are made if they don't exist.
            namespace: whatever the answers depend on beside the question: model and weights, templates, version.
                Caches of different namespaces may share a file and never see each other's values.
            most: values kept, at least 1.

        Raises:
            EchelonError: `most` is out of range.
        """
        if most < 1:
            raise EchelonError(f"the plan cache's size is {most}: it must be at least 1")
        self.path, self.namespace, self.most = path, namespace, most
        self.trouble: str | None = None
        self.hits = self.misses = self.stored = self.faults = self.busy = 0
        self._prefix = hashlib.blake2b(namespace.encode(errors="backslashreplace"), digest_size=16).digest()
        self._memory: OrderedDict[bytes, bytes] = OrderedDict()
        self._pending: dict[bytes, bytes] = {}
        self._file: sqlite3.Connection | None = None
        self._identity = (0, 0)
        self._paused = -math.inf
        self._reads = self._writes = path is not None
        self._forked: list[Any] = []
        self._pid = os.getpid()
        self._lock = threading.RLock()

    # -- values --------------------------------------------------------------------------------

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values of keys, None where there is none."""
        with self._mine():
            found = [self._memory.get(key) for key in keys]
            missing = {key for key, value in zip(keys, found, strict=True) if value is None}
            if missing and self._reads and not self._pauses():
                read = self._read(sorted(missing))
                for key, value in read.items():
                    self._remember(key, value)
                found = [read.get(key) if value is None else value for key, value in zip(keys, found, strict=True)]
            for key in keys:
                if key in self._memory:
                    self._memory.move_to_end(key)
            hits = sum(value is not None for value in found)
            self.hits += hits
            self.misses += len(keys) - hits
            return found

    def put(self, items: Iterable[tuple[bytes, bytes]]) -> None:
        """Keep values; the file gets them some hundred at a time, or by `flush`."""
        with self._mine():
            for key, value in items:
                self._remember(key, value)
                self.stored += 1
                if self._writes:
                    self._pending[key] = value
            if len(self._pending) >= _WRITE and not self._pauses():
                self.flush()
            while len(self._pending) > _KEPT:
                del self._pending[next(iter(self._pending))]

    def reject(self, key: bytes) -> None:
        """Forget a value that `get` gave and that turned out to be none: a fault and a miss."""
        with self._mine():
            self._memory.pop(key, None)
            self._pending.pop(key, None)
            self.faults += 1
            self.hits -= 1
            self.misses += 1

    def flush(self) -> None:
        """Write what waits to be written."""
        with self._mine():
            if self._pending and self._writes and (file := self._open()) is not None:
                rows = [(full := self._full(k), _sum(full, v) + v) for k, v in self._pending.items()]
                if self._guarded(lambda: self._write(file, rows)):
                    self._pending.clear()

    def close(self) -> None:
        """Write what waits and close the file; a later use opens it again."""
        with self._mine():
            self.flush()
            self._drop()

    def report(self) -> dict[str, int | str | None]:
        """The counters, how many values are in memory, and `trouble`."""
        return {
            "hits": self.hits, "misses": self.misses, "stored": self.stored, "faults": self.faults,
            "busy": self.busy, "in_memory": len(self._memory), "trouble": self.trouble,
        }  # fmt: skip

    def _remember(self, key: bytes, value: bytes) -> None:
        self._memory[key] = value
        self._memory.move_to_end(key)
        if len(self._memory) > self.most:
            self._memory.popitem(last=False)

    def _mine(self) -> threading.RLock:
        if self._pid != os.getpid():
            # Forked: the parent's connection is neither used nor closed here, and its lock may be held for good.
            self._pid, self._lock = os.getpid(), threading.RLock()
            self._forked.append(self._file)
            self._file = None
            self._pending.clear()
        return self._lock

    def _pauses(self) -> bool:
        return time.monotonic() < self._paused + _PAUSE

    def _full(self, key: bytes) -> bytes:
        return hashlib.blake2b(key, key=self._prefix, digest_size=16).digest()

    # -- the file ------------------------------------------------------------------------------

    def _read(self, keys: list[bytes]) -> dict[bytes, bytes]:
        by_full = {self._full(key): key for key in keys}
        found: dict[bytes, bytes] = {}
        if (file := self._open()) is None:
            return found

        def read() -> None:
            asked = list(by_full)
            for at in range(0, len(asked), _ASK):
                some = asked[at : at + _ASK]
                marks = ",".join("?" * len(some))
                query = f"SELECT key, value FROM plans WHERE key IN ({marks}) AND length(value) <= {_LONGEST}"
                for full, value in file.execute(query, some):
                    if full in by_full and type(value) is bytes and value[:8] == _sum(full, value[8:]):
                        found[by_full[full]] = value[8:]
                    else:
                        self.faults += 1

        self._guarded(read)
        return found

    def _write(self, file: sqlite3.Connection, rows: list[tuple[bytes, bytes]]) -> None:
        assert self.path is not None
        at = self.path.stat()
        if (at.st_dev, at.st_ino) != self._identity:
            raise FileNotFoundError(2, "another file took its place")
        with file:
            file.execute("BEGIN IMMEDIATE")
            file.executemany("REPLACE INTO plans VALUES (?, ?)", rows)
            file.execute("DELETE FROM plans WHERE rowid <= (SELECT max(rowid) FROM plans) - ?", (self.most,))

    def _open(self) -> sqlite3.Connection | None:
        if self._file is None and self._reads:
            self._guarded(self._connect)
        return self._file

    def _connect(self) -> None:
        path = self.path
        assert path is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise _NotOurs("it is not a file")
        if path.is_file():
            with path.open("rb") as start:
                head = start.read(len(_MAGIC))
            if head and head != _MAGIC:
                raise _NotOurs("it is not an SQLite file")
        file = sqlite3.connect(path, timeout=_WAIT, isolation_level=None, check_same_thread=False)
        try:
            file.text_factory = bytes
            for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "temp_store = MEMORY"):
                file.execute(f"PRAGMA {pragma}")
            self._check(file)
            # A power cut may cost the last plans, never the file.
            file.execute("PRAGMA journal_mode = WAL")
            file.execute("PRAGMA synchronous = NORMAL")
            at = path.stat()
        except BaseException:
            file.close()
            raise
        self._file, self._identity = file, (at.st_dev, at.st_ino)

    def _check(self, file: sqlite3.Connection) -> None:
        """Make the table of a new file; refuse any other file than a plan cache of this version."""
        if not file.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            with file:
                file.execute("BEGIN IMMEDIATE")
                # Another process may have been faster.
                if not file.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    file.execute(f"PRAGMA application_id = {_APPLICATION}")
                    file.execute(f"PRAGMA user_version = {_VERSION}")
                    file.execute(_TABLE)
        if file.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION:
            raise _NotOurs("it belongs to another program")
        if (version := file.execute("PRAGMA user_version").fetchone()[0]) != _VERSION:
            raise _NotOurs(f"it has version {version}, this is version {_VERSION}")
        tables = file.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
        if tables != [(_TABLE.encode(),)]:
            raise _NotOurs("its tables are not a plan cache's")

    def _guarded(self, work: Callable[[], None]) -> bool:
        """Do something with the file; what goes wrong there is noted. Whether it went well."""
        try:
            work()
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in _BUSY:
                self.busy += 1
                self._paused = time.monotonic()
                return False
            # A file that can't be written may still be read.
            self._give_up(str(error), reading=code in _NO_ROOM and self._file is not None)
        except Exception as error:  # whatever befalls a cache must not stop a run
            reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
            self._give_up(reason, reading=False)
        else:
            return True
        return False

    def _give_up(self, reason: str, *, reading: bool) -> None:
        self.faults += 1
        does = "only read from now on" if reading else "left alone"
        line = f"the plan cache {self.path} is {does}: {reason}"
        self.trouble = " ".join("".join(c if c.isprintable() else " " for c in line).split())
        self._writes, self._reads = False, reading
        self._pending.clear()
        if not reading:
            self._drop()

    def _drop(self) -> None:
        if self._file is not None:
            with contextlib.suppress(sqlite3.Error):
                self._file.close()
            self._file = None


class _NotOurs(Exception):
    """The file is none that this version of the cache may touch."""


def _sum(full: bytes, value: bytes) -> bytes:
    return hashlib.blake2b(value, key=full, digest_size=8).digest()


@dataclass(frozen=True)
class Unanswered:
    """A request of which some rows are known already; what is left is `request`.

    Attributes:
        folded: the whole request in its frame.
        plan: the plan for `folded.request`, as far as it is known.
        found: bool `(n,)`, the rows that are.
        rows: int64 `(m,)`, the rows to ask about, each question once.
        answer: int64 `(n,)`, for each row that wasn't found, which of `rows` asks its question.
        request: what is to be asked: `folded.request` for `rows` alone.
    """

    folded: Folded
    plan: Plan
    found: NDArray[np.bool_]
    rows: NDArray[np.int64]
    answer: NDArray[np.int64]
    request: PlanRequest


class CachedPlans:
    """A planner's plans, folded and kept: what was asked of one world is known for all that are like it.

    A cached plan is that of a whole row. Rows that are asked again after a rejection are neither looked up nor kept,
    nor are plans in which an agent's answer failed.

    Attributes:
        cache: where plans are kept; sees: what the planner looks at, see `Sight`; coarse:
            path lengths are rounded down to multiples of it, see `symmetry.fold`.
        same: rows that cost nothing since another row of the same request asked the same.
    """

    def __init__(self, cache: PlanCache, sees: Iterable[Sight], *, coarse: int = 1) -> None:
        """Keep plans in `cache`, whose namespace must say all that answers depend on beside the request."""
        self.cache, self.sees, self.coarse, self.same = cache, frozenset(sees), coarse, 0

    def plan(self, request: PlanRequest, ask: Callable[[PlanRequest], Plan]) -> Plan:
        """Plan with what is known, and `ask` at most once for all that isn't."""
        left = self.begin(request)
        return self.end(left, ask(left.request) if len(left.rows) else None)

    def begin(self, request: PlanRequest) -> Unanswered:
        """Fold a request and look it up."""
        folded = fold(request, sees=self.sees, coarse=self.coarse)
        plan, found = self.lookup(folded)
        place: dict[bytes, int] = {}
        rows: list[int] = []
        answer = np.full(len(found), -1, np.int64)
        for i in np.flatnonzero(~found & request.need.any(1)).tolist():
            answer[i] = place.setdefault(folded.keys[i], len(place))
            if answer[i] == len(rows):
                rows.append(i)
        some = np.array(rows, np.int64)
        self.same += int((answer >= 0).sum()) - len(rows)
        return Unanswered(folded, plan, found, some, answer, folded.some(some))

    def end(self, left: Unanswered, answer: Plan | None) -> Plan:
        """The whole plan for the original request.

        Args:
            left: what `begin` gave.
            answer: the plan for `left.request`; None if there was nothing to ask.

        Raises:
            EchelonError: the answer isn't made of integer arrays `(m, A)`.
        """
        folded, known = left.folded, left.plan
        fields = {name: getattr(known, name).astype(np.int64) for name in ("kind", "cell", "task")}
        plan, told = Plan(**fields, probability=known.probability), None
        if answer is not None:
            _check_shape(answer, left.request)
            i = np.flatnonzero(left.answer >= 0)
            for name, x in fields.items():
                x[i] = getattr(answer, name)[left.answer[i]]
            if answer.probability is not None:
                if plan.probability is None:
                    plan.probability = np.zeros(folded.options.shape, np.float32)
                plan.probability[i] = answer.probability[left.answer[i]]
            told = answer.notes
            self.store(folded, plan, left.rows)

        def notes(i: int) -> dict[str, Any]:
            if left.answer[i] < 0:
                return {"cached": bool(left.found[i])}
            return {} if told is None else told(int(left.answer[i]))

        plan.notes = notes
        return folded.unfold(plan)

    def lookup(self, folded: Folded) -> tuple[Plan, NDArray[np.bool_]]:
        """The plans that are known.

        Returns:
            The plan for `folded.request` (not for the original: see `Folded.unfold`), with everybody waiting where none
            is known; and where one is known, bool `(n,)`.
        """
        request = folded.request
        plan, found = Plan.empty(request), np.zeros(len(request.rows), bool)
        rows = np.flatnonzero(_is_first(request))
        keys = [folded.keys[i] for i in rows.tolist()]
        values = self.cache.get(keys)
        for chances in (True, False):
            form = _form(*request.refused.shape[1:], chances)
            at = [j for j, value in enumerate(values) if value is not None and len(value) == form.itemsize]
            read = np.frombuffer(b"".join(values[j] or b"" for j in at), form)
            which = rows[at]
            fits = (read["agents"] == form["kind"].shape[0]) & (read["candidates"] == request.refused.shape[2])
            some = Plan(read["kind"], read["cell"], read["task"], read["probability"] if chances else None)
            fits &= self._plausible(request, some, which)
            which, i, a = which[fits], *np.nonzero(request.need[which[fits]])
            for name in ("kind", "cell", "task"):
                getattr(plan, name)[which[i], a] = getattr(some, name)[fits][i, a]
            if some.probability is not None and len(which):
                plan.probability = np.zeros(request.refused.shape, np.float32)
                plan.probability[which] = some.probability[fits]
            found[which] = True
        for j, value in enumerate(values):
            if value is not None and not found[rows[j]]:
                self.cache.reject(keys[j])
        return plan, found

    def store(self, folded: Folded, plan: Plan, rows: NDArray[np.int64]) -> None:
        """Keep plans, as far as they are fit for it.

        Args:
            folded: what was asked.
            plan: the planner's answer to `folded.request`, arrays `(n, A)`.
            rows: int64 `(m,)`, the rows whose plans are new.
        """
        request = folded.request
        rows = rows[_is_first(request)[rows]]
        chances = None if plan.probability is None else plan.probability[rows]
        some = Plan(plan.kind[rows], plan.cell[rows], plan.task[rows], chances)
        fits = self._plausible(request, some, rows)
        records = np.zeros(len(rows), _form(*request.refused.shape[1:], chances is not None))
        records["agents"], records["candidates"] = request.refused.shape[1:]
        for name in ("kind", "cell", "task"):
            records[name] = np.where(request.need[rows] & fits[:, None], getattr(some, name), 0)
        if chances is not None:
            records["probability"] = chances
        self.cache.put((folded.keys[i], records[j].tobytes()) for j, i in enumerate(rows.tolist()) if fits[j])

    def _plausible(self, request: PlanRequest, plan: Plan, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the plans for `rows` have an answer for each agent that needs one, bool `(m,)`."""
        good: NDArray[np.bool_] = np.asarray(plan.kind >= 0)
        good &= (plan.kind < len(SubgoalKind)) & (plan.cell >= 0) & (plan.task >= -1)
        good &= plan.cell < max(request.grid.num_cells, request.refused.shape[2] + 1)
        good &= plan.task < request.taken.shape[1]
        fits: NDArray[np.bool_] = np.all(good | ~request.need[rows], axis=1)
        if plan.probability is not None:
            # NaN is not at least 0 either; a sum in float32 may be a little more than 1.
            fits &= ((plan.probability >= 0) & (plan.probability <= 1.001)).all((1, 2))
        return fits


def _is_first(request: PlanRequest) -> NDArray[np.bool_]:
    """Rows that somebody needs a plan for and that weren't rejected in this round, bool `(n,)`."""
    return np.asarray(request.need.any(1) & ~(request.rejected.any(1) | request.refused.any((1, 2))))


def _check_shape(plan: Plan, request: PlanRequest) -> None:
    for name in ("kind", "cell", "task"):
        x = getattr(plan, name)
        if x.shape != request.need.shape or x.dtype.kind not in "iu":
            shape = request.need.shape
            raise EchelonError(f"a planner's {name} is {x.dtype} {x.shape}: it must be integers {shape}")


@lru_cache(maxsize=64)
def _form(agents: int, candidates: int, chances: bool) -> np.dtype[Any]:
    """The layout of a row's plan: little-endian, no gaps; only what concerns agents that need one means anything."""
    fields: list[tuple[Any, ...]] = [
        ("agents", "<u2"), ("candidates", "<u2"), ("kind", "<i1", (agents,)), ("cell", "<i4", (agents,)),
        ("task", "<i2", (agents,)),
    ]  # fmt: skip
    if chances:
        fields.append(("probability", "<f4", (agents, candidates)))
    return np.dtype(fields)
