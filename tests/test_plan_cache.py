"""The plan cache: what it holds never changes a plan, and nothing that befalls its file stops a run."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.errors import EchelonError
from echelon.planners import Hungarian, Nearest, RandomTask
from echelon.planners import plan_cache as module
from echelon.planners.plan_cache import CachedPlans, PlanCache
from echelon.subgoals import Plan, PlanRequest, Sight, SubgoalTracker, Verdict
from test_planners import ask, tracker_of, used

SIGHTS: list[tuple[Sight, ...]] = [(), ("cells",), ("walls", "others", "past"), ("scene",)]
WORLDS: list[tuple[str, dict[str, Any]]] = [
    ("warehouse", {"size": 9, "num_agents": 4, "num_packages": 5, "num_zones": 2}),
    ("warehouse", {"height": 7, "width": 15, "num_agents": 12, "num_packages": 9, "num_zones": 1}),
    ("repair", {"size": 9, "num_agents": 4, "num_machines": 4, "num_tools": 3}),
    ("search", {"size": 12, "num_agents": 3, "num_targets": 3, "regions": 2, "sensor": 2}),
]


def key(n: int) -> bytes:
    return n.to_bytes(16, "big")


def cache_of(path: Path | None = None, namespace: str = "n", **more: Any) -> PlanCache:
    return PlanCache(path, namespace=namespace, **more)


def report(cache: PlanCache) -> tuple[int, ...]:
    return cache.hits, cache.misses, cache.stored, cache.faults, cache.busy


# -- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_was_put_is_found(tmp_path: Path, on_disk: bool) -> None:
    path = tmp_path / "deep" / "plans.sqlite" if on_disk else None
    cache = cache_of(path)
    assert cache.get([key(1), key(2)]) == [None, None]
    cache.put([(key(1), b"one"), (key(2), b"")])
    assert cache.get([key(2), key(3), key(1), key(1)]) == [b"", None, b"one", b"one"]
    cache.put([(key(1), b"uno")])
    assert cache.get([key(1)]) == [b"uno"]
    assert report(cache) == (4, 3, 3, 0, 0)
    assert cache.report() == {"hits": 4, "misses": 3, "stored": 3, "faults": 0, "busy": 0, "in_memory": 2,
                              "trouble": None}  # fmt: skip
    cache.close()
    again = cache_of(path)
    assert again.get([key(1), key(2)]) == ([b"uno", b""] if on_disk else [None, None])
    assert again.get([]) == []


def test_a_file_that_is_never_needed_is_never_made(tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "plans.sqlite")
    cache.flush()
    cache.close()
    assert not list(tmp_path.iterdir())


def test_namespaces_share_a_file_and_nothing_else(tmp_path: Path) -> None:
    a, b = (cache_of(tmp_path / "p", f"model {n}") for n in "ab")
    a.put([(key(1), b"a")])
    a.flush()
    assert b.get([key(1)]) == [None]
    b.put([(key(1), b"b")])
    b.close()
    a.close()
    assert [cache_of(tmp_path / "p", f"model {n}").get([key(1)]) for n in "abc"] == [[b"a"], [b"b"], [None]]


def test_memory_keeps_the_most_recently_used() -> None:
    cache = cache_of(most=3)
    cache.put((key(n), b"x") for n in range(3))
    cache.get([key(0)])
    cache.put([(key(3), b"x")])
    assert [v is not None for v in cache.get([key(n) for n in range(4)])] == [True, False, True, True]
    with pytest.raises(EchelonError, match="the plan cache's size is 0: it must be at least 1"):
        cache_of(most=0)


def test_the_file_keeps_the_newest(tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "p", most=100)
    for n in range(1000):
        cache.put([(key(n), b"x")])
    cache.close()
    file = sqlite3.connect(tmp_path / "p")
    assert file.execute("SELECT count(*) FROM plans").fetchone() == (100,)
    file.close()
    found = cache_of(tmp_path / "p", most=100).get([key(n) for n in range(1000)])
    assert [v is not None for v in found] == [False] * 900 + [True] * 100


def test_what_is_put_reaches_the_file_some_hundred_at_a_time(tmp_path: Path) -> None:
    cache, other = cache_of(tmp_path / "p"), cache_of(tmp_path / "p")
    cache.put((key(n), b"x") for n in range(100))
    assert other.get([key(0)]) == [None]
    cache.put((key(n), b"x") for n in range(100, 300))
    assert other.get([key(0), key(299)]) == [b"x", b"x"]


def test_threads_may_share_a_cache(tmp_path: Path) -> None:
    cache, wrong = cache_of(tmp_path / "p", most=500), []

    def work(t: int) -> None:
        rng = np.random.default_rng(t)
        for _ in range(60):
            some = rng.integers(0, 800, 8).tolist()
            cache.put((key(n), key(n) * 3) for n in some)
            wrong.extend(n for n, v in zip(some, cache.get([key(n) for n in some]), strict=True)
                         if v not in (None, key(n) * 3))  # fmt: skip

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert cache.trouble is None
    assert cache.hits + cache.misses == 4 * 60 * 8
    assert cache.stored == 4 * 60 * 8


# -- other processes ------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
from echelon.planners.plan_cache import PlanCache
cache = PlanCache(Path(sys.argv[1]), namespace="n")
start = int(sys.argv[2])
for n in range(start, start + 600):
    cache.put([(n.to_bytes(16, "big"), b"%d" % n)])
    cache.get([(n ^ 1).to_bytes(16, "big")])
while cache._pending:
    cache.flush()
print(cache.trouble, cache.faults)
"""


def python(script: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", script, *map(str, args)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "src"})  # fmt: skip


def test_two_processes_share_a_file(tmp_path: Path) -> None:
    both = [python(SCRIPT, tmp_path / "p", start) for start in (0, 300)]
    for process in both:
        out, err = process.communicate(timeout=240)
        assert (process.returncode, out) == (0, "None 0\n"), err
    found = cache_of(tmp_path / "p").get([key(n) for n in range(901)])
    assert found == [b"%d" % n for n in range(900)] + [None]


def _child(cache: PlanCache, queue: Any) -> None:
    cache.put([(key(2), b"child")])
    found = cache.get([key(1)])
    cache.close()
    queue.put((found, cache.trouble))


def test_a_forked_child_opens_the_file_anew(tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "p")
    cache.put([(key(1), b"parent")])
    cache.flush()
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        """Another thread of the parent that has the lock at that moment; in the child nobody ever lets go of it."""
        with cache._lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    process = fork.Process(target=_child, args=(cache, queue), daemon=True)
    process.start()
    try:
        assert queue.get(timeout=240) == ([b"parent"], None)
    finally:
        done.set()
        thread.join()
        process.kill()
        process.join()
    assert cache.get([key(2)]) == [b"child"]
    cache.put([(key(3), b"parent")])
    cache.close()
    assert cache_of(tmp_path / "p").get([key(3)]) == [b"parent"]


def test_a_locked_file_is_waited_for_a_moment_and_then_gone_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WAIT", 0.01)
    first = cache_of(tmp_path / "p")
    first.put([(key(1), b"x")])
    first.close()
    lock = sqlite3.connect(tmp_path / "p", isolation_level=None)
    lock.execute("PRAGMA locking_mode = EXCLUSIVE")
    lock.execute("BEGIN EXCLUSIVE")
    cache = cache_of(tmp_path / "p")
    assert cache.get([key(1)]) == [None]
    assert (cache.busy, cache.faults, cache.trouble) == (1, 0, None)
    cache.get([key(1)])
    assert cache.busy == 1, "it isn't tried again at once"
    cache.put([(key(2), b"y")])
    cache.flush()
    assert cache.get([key(2)]) == [b"y"], "memory goes on"
    lock.execute("ROLLBACK")
    lock.close()
    monkeypatch.setattr(module, "_PAUSE", 0.0)
    assert cache.get([key(1)]) == [b"x"]
    cache.close()
    assert cache_of(tmp_path / "p").get([key(2)]) == [b"y"], "what waited was written in the end"


def test_what_waits_for_a_locked_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WAIT", 0.01)
    first = cache_of(tmp_path / "p")
    first.put([(key(1), b"x")])
    first.flush()
    lock = sqlite3.connect(tmp_path / "p", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    for n in range(3 * module._KEPT):
        first.put([(key(n), b"y")])
    assert len(first._pending) == module._KEPT
    assert (first.busy, first.trouble) == (1, None)
    lock.close()
    first.close()
    assert cache_of(tmp_path / "p").get([key(3 * module._KEPT - 1)]) == [b"y"]


# -- faults ---------------------------------------------------------------------------------------------------------


def goes_on(cache: PlanCache, trouble: str) -> None:
    """The cache says so in one line, counts it once, and works in memory."""
    cache.put([(key(77), b"memory")])
    cache.flush()
    assert cache.get([key(77), key(78)]) == [b"memory", None]
    assert cache.trouble is not None
    assert trouble in cache.trouble
    assert len(cache.trouble.splitlines()) == 1
    faults = cache.faults
    assert faults >= 1
    cache.put([(key(79), b"more")])
    cache.flush()
    cache.close()
    assert cache.faults == faults, "it isn't tried again"
    assert cache.get([key(79)]) == [b"more"]


def filled(path: Path) -> None:
    cache = cache_of(path)
    cache.put((key(n), bytes(50) + key(n)) for n in range(400))
    cache.close()


def sql(*statements: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        file = sqlite3.connect(path)
        for statement in statements:
            file.execute(statement)
        file.commit()
        file.close()

    return damage


FOREIGN: list[tuple[Callable[[Path], Any], str]] = [
    (lambda p: p.write_bytes(b"not a database, " * 100), "it is not an SQLite file"),
    (lambda p: p.write_bytes(b"x"), "it is not an SQLite file"),
    (lambda p: p.write_bytes(b"SQLite format 3\0" + bytes(200)), "not a database"),
    (sql("PRAGMA user_version = 2"), "it has version 2, this is version 1"),
    (sql("PRAGMA application_id = 5"), "it belongs to another program"),
    (sql("CREATE TABLE more (x)"), "its tables are not a plan cache's"),
    (sql("DROP TABLE plans", "CREATE TABLE plans (key BLOB, value BLOB)"), "its tables are not a plan cache's"),
    (sql("CREATE TRIGGER t AFTER INSERT ON plans BEGIN DELETE FROM plans; END"), "its tables are not"),
]


@pytest.mark.parametrize(("damage", "trouble"), FOREIGN, ids=[t for _, t in FOREIGN])
@pytest.mark.parametrize("first", ["read", "write"])
def test_a_file_that_is_no_plan_cache_is_left_as_it_is(
    tmp_path: Path, damage: Callable[[Path], Any], trouble: str, first: str
) -> None:
    path = tmp_path / "p"
    filled(path)
    damage(path)
    before = path.read_bytes()
    cache = cache_of(path)
    if first == "read":
        assert cache.get([key(5)]) == [None]
    goes_on(cache, trouble)
    assert path.read_bytes() == before


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    file = sqlite3.connect(tmp_path / "p")
    file.execute("CREATE TABLE mine (x)")
    file.commit()
    file.close()
    before = (tmp_path / "p").read_bytes()
    goes_on(cache_of(tmp_path / "p"), "it belongs to another program")
    assert (tmp_path / "p").read_bytes() == before


def test_places_where_no_file_can_be(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    goes_on(cache_of(tmp_path / "folder"), "it is not a file")
    goes_on(cache_of(tmp_path / "file" / "p"), "left alone")
    goes_on(cache_of(Path("/dev/full")), "it is not a file")
    goes_on(cache_of(tmp_path / ("x" * 300)), "File name too long")
    goes_on(cache_of(tmp_path / "a\0b"), "embedded null byte")
    (tmp_path / "\x1b[2J\nfolder").mkdir()
    goes_on(cache_of(tmp_path / "\x1b[2J\nfolder"), "/ [2J folder is left alone: it is not a file")


@pytest.mark.parametrize("gone", ["deleted", "replaced"])
def test_a_file_that_vanishes(tmp_path: Path, gone: str) -> None:
    cache = cache_of(tmp_path / "p")
    cache.put([(key(1), b"x")])
    cache.flush()
    (tmp_path / "p").unlink()
    if gone == "replaced":
        (tmp_path / "p").write_bytes(b"someone else's")
    goes_on(cache, "No such file" if gone == "deleted" else "another file took its place")
    assert cache.get([key(1)]) == [b"x"]
    if gone == "replaced":
        assert (tmp_path / "p").read_bytes() == b"someone else's"


def test_a_file_that_may_not_be_written_is_still_read(tmp_path: Path) -> None:
    filled(tmp_path / "p")
    cache = cache_of(tmp_path / "p")
    cache.get([key(0)])
    assert cache._file is not None
    cache._file.execute("PRAGMA query_only = ON")
    cache.put([(key(1000), b"x")])
    cache.flush()
    assert cache.trouble is not None
    assert "only read from now on: attempt to write a readonly database" in cache.trouble
    assert cache.get([key(3), key(1000)]) == [bytes(50) + key(3), b"x"]
    assert cache.faults == 1


def test_a_database_without_room_is_still_read(tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "p")
    cache.put((key(n), bytes(200)) for n in range(300))
    assert cache._file is not None
    pages = cache._file.execute("PRAGMA page_count").fetchone()[0]
    cache._file.execute(f"PRAGMA max_page_count = {pages}")
    cache.put((key(n), bytes(200)) for n in range(300, 3000))
    assert cache.trouble is not None
    assert "full" in cache.trouble
    assert (cache.faults, cache.stored) == (1, 3000)
    cache._memory.clear()
    assert cache.get([key(0), key(2999)]) == [bytes(200), None]


FULL = """
import resource, sys
from pathlib import Path
from echelon.planners.plan_cache import PlanCache
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
cache = PlanCache(Path(sys.argv[1]), namespace="n")
for n in range(4000):
    cache.put([(n.to_bytes(16, "big"), bytes(200))])
    cache.get([n.to_bytes(16, "big"), (n + 9).to_bytes(16, "big")])
cache.close()
print(cache.trouble)
print(cache.hits, cache.misses, cache.stored, cache.faults > 0)
"""


@pytest.mark.parametrize("room", [0, 3000, 100_000])
def test_a_disk_that_is_full(tmp_path: Path, room: int) -> None:
    """The kernel refuses to let files grow beyond a few bytes: in a process of its own, as the limit stays."""
    process = python(FULL, tmp_path / "p", room)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    trouble, numbers = out.splitlines()
    assert trouble.startswith(f"the plan cache {tmp_path / 'p'} is ")
    assert numbers == "4000 4000 4000 True"
    after = cache_of(tmp_path / "p")
    after.put([(key(9999), b"later")])
    after.close()
    assert after.trouble is None, "with room again, the file is as good as ever"
    assert cache_of(tmp_path / "p").get([key(9999)]) == [b"later"]


@settings(max_examples=120)
@given(st.data())
def test_random_bytes_as_the_file(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Garbage, a cut file or flipped bytes: no error, and never a value that was not put."""
    folder = tmp_path_factory.mktemp("cache")
    path = folder / "p"
    how = data.draw(st.sampled_from(["garbage", "head", "cut", "flip"]))
    if how in ("garbage", "head"):
        start = b"SQLite format 3\0" if how == "head" else b""
        path.write_bytes(start + data.draw(st.binary(min_size=1, max_size=3000)))
    else:
        filled(path)
        whole = bytearray(path.read_bytes())
        if how == "cut":
            whole = whole[: data.draw(st.integers(1, len(whole) - 1))]
        for _ in range(data.draw(st.integers(1, 40)) if how == "flip" else 0):
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(bytes(whole))
    before = path.read_bytes()
    cache = cache_of(path)
    for n, value in enumerate(cache.get([key(n) for n in range(420)])):
        assert value in (None, bytes(50) + key(n))
    if how in ("garbage", "head"):
        assert cache.trouble is not None
        assert path.read_bytes() == before
    cache.put([(key(n), b"new") for n in range(600, 900)])
    cache.flush()
    assert cache.get([key(600)]) == [b"new"]
    cache.close()
    assert path.exists(), "it is never deleted"


@pytest.mark.parametrize(
    "value", ["x'00'", "x''", "'text'", "17", "1.5", "zeroblob(200000)", "(SELECT value FROM plans WHERE rowid = 9)"]
)
def test_damaged_values_are_misses(tmp_path: Path, value: str) -> None:
    filled(tmp_path / "p")
    sql(f"UPDATE plans SET value = {value} WHERE rowid = 7")(tmp_path / "p")
    cache = cache_of(tmp_path / "p")
    assert cache.get([key(5), key(6), key(7)]) == [bytes(50) + key(5), None, bytes(50) + key(7)]
    assert (cache.misses, cache.trouble) == (1, None)
    assert cache.faults == (value != "zeroblob(200000)"), "one that is too long to be a plan isn't even read"
    cache.put([(key(6), b"new")])
    cache.close()
    assert cache_of(tmp_path / "p").get([key(6)]) == [b"new"], "the next one takes its place"


# -- plans ----------------------------------------------------------------------------------------------------------


class Asked:
    """A planner that draws its choices from the request's bits, says how sure it is, and counts its questions."""

    def __init__(self) -> None:
        self.rows = 0
        self.calls = 0

    def __call__(self, request: PlanRequest) -> Plan:
        self.rows += len(request.rows)
        self.calls += 1
        plan = RandomTask().plan(request)
        c = request.candidates
        mine = (c.kind == plan.kind[..., None]) & (c.task == plan.task[..., None]) & request.need[..., None]
        plan.probability = np.where(mine, np.float32(0.7), np.float32(0.1) * (c.kind > 0))
        plan.notes = lambda i: {"world": int(request.rows[i]), "agents": {0: {"first": True}}}
        return plan


def plans_of(tracker: SubgoalTracker, sees: tuple[Sight, ...] = ("walls",), path: Path | None = None) -> CachedPlans:
    return CachedPlans(cache_of(path), sees)


def same(a: Plan, b: Plan) -> None:
    for name in ("kind", "cell", "task", "probability"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == y.dtype
            assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("sees", SIGHTS, ids=lambda s: "+".join(s) or "lengths")
@pytest.mark.parametrize(("name", "env"), WORLDS)
def test_a_hit_is_what_asking_gives(tmp_path: Path, name: str, env: dict[str, Any], sees: tuple[Sight, ...]) -> None:
    """Bit for bit, from memory and from the file, whatever the cache holds and whoever else is asked for."""
    tracker = used(name, 8, **env)
    tracker.need[::2] = True
    request, asked = ask(tracker), Asked()
    fresh = plans_of(tracker, sees).plan(request, asked)
    plans = plans_of(tracker, sees, tmp_path / "p")
    part = dataclasses.replace(request, need=request.need & (np.arange(8) % 3 > 0)[:, None])
    plans.plan(part, asked)
    asked.rows = 0
    same(plans.plan(request, asked), fresh)
    assert asked.rows == 3
    same(plans.plan(request, asked), fresh)
    plans.cache.close()
    again = plans_of(tracker, sees, tmp_path / "p")
    same(again.plan(request, asked), fresh)
    assert asked.rows == 3, "nothing was asked"
    assert (again.cache.hits, again.cache.misses, again.cache.faults) == (8, 0, 0)
    todo = dataclasses.replace(request, taken=request.taken.copy())
    assert not tracker.check(todo, fresh, request.need).any()


def test_by_hand_what_is_asked_and_what_is_told(tmp_path: Path) -> None:
    tracker = tracker_of(size=9, num_agents=2, num_packages=3, num_envs=3)
    env = tracker.env
    # World 2 becomes world 0.
    for x in (env.grid, env.pos, env.task_cell, env.task_goal):
        x[2] = x[0]
    plans, asked = plans_of(tracker), Asked()
    request = ask(tracker)
    plan = plans.plan(request, asked)
    assert (asked.calls, asked.rows, plans.same) == (1, 2, 1), "the same question is asked once"
    assert plan.task[2].tolist() == plan.task[0].tolist()
    assert plan.notes is not None
    assert [plan.notes(i)["world"] for i in range(3)] == [0, 1, 0]
    assert report(plans.cache) == (0, 3, 2, 0, 0)
    plan = plans.plan(request, asked)
    assert asked.calls == 1
    assert plan.notes is not None
    assert plan.notes(1)["cached"] is True
    assert report(plans.cache) == (3, 3, 2, 0, 0)
    # Nobody asked for: nothing to look up, nothing to ask, everybody where they are.
    nobody = dataclasses.replace(request, need=np.zeros_like(request.need))
    plan = plans.plan(nobody, asked)
    assert asked.calls == 1
    assert plan.kind.tolist() == [[0, 0]] * 3
    assert report(plans.cache) == (3, 3, 2, 0, 0)


def test_begin_and_end_are_plan_in_two_parts() -> None:
    tracker = tracker_of(size=9, num_agents=3, num_packages=4, num_envs=4)
    request, asked = ask(tracker), Asked()
    whole = plans_of(tracker).plan(request, asked)
    plans = plans_of(tracker)
    left = plans.begin(request)
    assert left.rows.tolist() == [0, 1, 2, 3]
    assert left.request.need.shape == (4, 3)
    same(plans.end(left, asked(left.request)), whole)
    left = plans.begin(request)
    assert len(left.rows) == 0
    same(plans.end(left, None), whole)
    # What is known already can be had before the rest is answered: the others wait.
    half = plans_of(tracker)
    half.plan(dataclasses.replace(request, need=request.need & (np.arange(4) < 2)[:, None]), asked)
    left = half.begin(request)
    early = half.end(left, None)
    assert left.rows.tolist() == [2, 3]
    assert early.kind[:2].tolist() == whole.kind[:2].tolist()
    assert (early.kind[2:] == 0).all()
    assert half.cache.stored == 2
    same(half.end(left, asked(left.request)), whole)
    assert half.cache.stored == 4
    bad = Plan.empty(plans_of(tracker).begin(request).request)
    bad.kind = bad.kind.astype(np.float32)  # type: ignore[assignment]
    with pytest.raises(EchelonError, match=r"a planner's kind is float32 \(4, 3\): it must be integers \(4, 3\)"):
        plans.end(plans_of(tracker).begin(request), bad)


def test_rows_that_are_asked_again_are_not_looked_up_and_not_kept() -> None:
    tracker = tracker_of(size=9, num_agents=2, num_packages=3, num_envs=2)
    plans, asked, request = plans_of(tracker), Asked(), ask(tracker)
    request.rejected[0, 1] = Verdict.UNREACHABLE
    request.refused[1, 0, 0] = True
    for calls in (1, 2):
        plans.plan(request, asked)
        assert asked.calls == calls
    assert report(plans.cache) == (0, 0, 0, 0, 0)


UNFIT: list[tuple[str, Any]] = [
    ("kind", -1), ("kind", 8), ("kind", 260), ("cell", -1), ("cell", 10**6), ("cell", 2**33), ("task", -2),
    ("task", 3), ("task", 2**16), ("probability", np.nan), ("probability", 1.5), ("probability", -0.5),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), UNFIT)
def test_a_plan_in_which_something_failed_is_not_kept(field: str, value: Any) -> None:
    tracker = tracker_of(size=9, num_agents=2, num_packages=3, num_envs=3)
    request, asked = ask(tracker), Asked()

    def broken(r: PlanRequest) -> Plan:
        plan = asked(r)
        if field != "probability":
            setattr(plan, field, getattr(plan, field).astype(np.int64))
        getattr(plan, field)[1, 0] = value
        return plan

    plans = plans_of(tracker)
    first = plans.plan(request, broken)
    assert plans.cache.stored == 2
    if field != "probability":
        fresh = dataclasses.replace(request, taken=request.taken.copy())
        assert tracker.check(fresh, first, request.need)[1].any()
    plans.plan(request, asked)
    assert plans.cache.report()["hits"] == 2
    assert plans.cache.stored == 3


def test_who_is_not_asked_for_keeps_no_plan_from_being_kept() -> None:
    tracker = tracker_of(size=9, num_agents=2, num_packages=3)
    request = dataclasses.replace(ask(tracker), need=np.array([[True, False]]))

    def plan(r: PlanRequest) -> Plan:
        answer = Nearest().plan(r)
        answer.kind[0, 1] = -1
        return answer

    plans = plans_of(tracker)
    plans.plan(request, plan)
    assert plans.cache.stored == 1


@settings(max_examples=80)
@given(st.data())
def test_whatever_the_cache_gives_is_a_plan_or_a_miss(data: st.DataObject) -> None:
    """Values of the right checksum and any content: what can't be a plan is a miss and a fault."""
    tracker = TRACKER
    plans, asked = plans_of(tracker), Asked()
    request = ask(tracker)
    plan = plans.plan(request, asked)
    folded = plans.begin(request).folded
    good = [plans.cache._memory[k] for k in folded.keys]
    bad = bytearray(good[0])
    for _ in range(data.draw(st.integers(0, 6))):
        bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(bad)[: data.draw(st.integers(0, len(bad)))] if data.draw(st.booleans()) else bytes(bad)
    plans.cache.put([(folded.keys[0], cut)])
    got, found = plans.lookup(folded)
    assert found[1:].all()
    assert plans.cache.faults == int(not found[0])
    if found[0]:
        assert ((got.kind[0] >= 0) & (got.kind[0] < 8)).all()
        assert ((got.cell[0] >= 0) & (got.cell[0] < tracker.env.num_cells)).all()
        assert ((got.task[0] >= -1) & (got.task[0] < tracker.env.num_tasks)).all()
        assert got.probability is not None
        assert ((got.probability >= 0) & (got.probability <= 1.001)).all()
        assert len(cut) == len(good[0])
        folded.unfold(got)
    else:
        same(plans.plan(request, asked), plan)
        assert plans.cache._memory[folded.keys[0]] == good[0], "a good one has taken its place"


TRACKER = tracker_of(size=7, num_agents=3, num_packages=3, num_envs=2, num_zones=1)


def test_a_value_of_another_team_is_none() -> None:
    """Its length might be that of another shape: the numbers in front tell them apart."""
    form, other = module._form(2, 3, True), module._form(2, 3, False)
    assert form.itemsize == 4 + 2 * (1 + 4 + 2) + 2 * 3 * 4
    assert other.itemsize == 4 + 2 * (1 + 4 + 2)
    plans, request = plans_of(TRACKER), ask(TRACKER)
    folded = plans.begin(request).folded
    record = np.zeros(1, module._form(*request.refused.shape[1:], True))
    record["agents"], record["candidates"] = 4, request.refused.shape[2]
    plans.cache.put([(folded.keys[0], record.tobytes())])
    assert plans.lookup(folded)[1].tolist() == [False, False]
    record["agents"] = 3
    plans.cache.put([(folded.keys[0], record.tobytes())])
    assert plans.lookup(folded)[1].tolist() == [True, False]


def test_planners_that_say_no_probabilities() -> None:
    tracker = tracker_of(size=9, num_agents=3, num_packages=4, num_envs=4)
    plans, request = plans_of(tracker), ask(tracker)
    first = plans.plan(request, Hungarian().plan)
    second = plans.plan(request, Hungarian().plan)
    assert second.probability is None
    same(first, second)


def test_a_file_in_trouble_changes_no_plan(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"garbage" * 999)
    tracker = tracker_of(size=9, num_agents=3, num_packages=4, num_envs=4)
    request, asked = ask(tracker), Asked()
    broken = plans_of(tracker, path=tmp_path / "p")
    for _ in range(2):
        same(broken.plan(request, asked), plans_of(tracker).plan(request, Asked()))
    assert asked.calls == 1, "memory serves"
    assert broken.cache.faults == 1
