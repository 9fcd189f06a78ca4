"""Untrusted programs are confined: each barrier alone where it can stand alone, against programs that mean harm."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from echelon.errors import EchelonError
from echelon.tasks.sandbox import BARRIERS, Limits, Program, RunResult, Sandbox, run_many, sandbox_report

QUICK = Limits(wall_seconds=2.0, cpu_seconds=1, memory_bytes=256 << 20)
KERNEL = ("guard",)  # what is left out, so that the kernel's barriers are met and not the interpreter's

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="barriers of the kernel are Linux's")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(QUICK, workers=1) as made:
        try:
            made.report()
        except EchelonError as error:
            pytest.skip(str(error))
        yield made


@pytest.fixture
def sandboxes() -> Iterator[Callable[..., Sandbox]]:
    """Sandboxes without some barriers; skips where this machine has none of those that a test wants."""
    made: list[Sandbox] = []

    def make(
        *without: str, needs: str = "", weak: bool = False, limits: Limits = QUICK, python: str | None = None
    ) -> Sandbox:
        found = Sandbox(limits, workers=1, without=without, weak=weak, python=python)
        made.append(found)
        try:
            report = found.report()
        except EchelonError as error:
            pytest.skip(str(error))
        if needs and report[needs] != "on":
            pytest.skip(f"{needs}: {report[needs]}")
        return found

    yield make
    for found in made:
        found.close()


@pytest.fixture
def own_python(tmp_path: Path) -> str:
    """A name of the interpreter that only this test uses: tests beside it have sandboxes too."""
    path = tmp_path / "python"
    path.symlink_to(sys.executable)
    return str(path)


def of_sandboxes(python: str) -> set[int]:
    """The processes that are a sandbox's server run by `python` or were forked from one (their command tells)."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if command[0] == os.fsencode(python):
            found.add(int(path.parent.name))
    return found


def test_tests_pass_and_fail_one_by_one(sandbox: Sandbox) -> None:
    result = sandbox.run(
        Program(
            "print('hello')\ndef double(x): return 2 * x",
            ("assert double(2) == 4", "assert double(2) == 5", "double()", "assert candidate('a') == 'aa'"),
            ("double",),
            {"candidate": "double"},
        )
    )
    assert result.status == "ok"
    assert result.passed == (True, False, False, True)
    assert result.messages[0] == ""
    assert result.messages[1] == "AssertionError"
    assert result.messages[2].startswith("TypeError: ")
    assert result.output == "hello\n"


def test_the_standard_library_works_and_nothing_else_is_there(sandbox: Sandbox) -> None:
    code = """
from collections import namedtuple, Counter
from dataclasses import dataclass
from enum import Enum
import csv, fractions, json.tool, zoneinfo
assert 'ä'.encode('cp1252') == b'\\xe4'
P = namedtuple('P', 'x y')
Colour = Enum('Colour', 'RED BLUE')
@dataclass
class Point:
    x: int
def total(values):
    return sum(Point(v).x for v in values) + P(1, 2).y
"""
    result = sandbox.run(Program(code, ("assert total([1, 2]) == 5", "import numpy")))
    assert (result.status, result.error) == ("ok", "")
    assert result.passed == (True, False)
    assert "numpy" in result.messages[1]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("def f(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("hog = [0] * 10**9", "MemoryError"),
        ("open('/etc/passwd', 'a')", "PermissionError"),
        ("class E(Exception):\n    def __str__(self): raise self\nraise E", "E"),
    ],
)
def test_a_program_that_fails_says_why(sandbox: Sandbox, code: str, error: str) -> None:
    result = sandbox.run(Program(code, ("assert True",)))
    assert result.status == "error"
    assert result.error.startswith(error)
    assert result.passed == (False,)


def test_an_endless_loop_ends_in_time_and_keeps_what_passed(sandbox: Sandbox) -> None:
    tests = ("assert f(0) == 0", "f(1)", "assert f(0) == 0")
    result = sandbox.run(Program("def f(x):\n    while x: pass\n    return 0", tests, ("f",)))
    assert result.status == "timeout"
    assert result.passed == (True, False, False)
    assert result.messages == ("", "not run", "not run")
    result = sandbox.run(Program("import time\ntime.sleep(60)"))
    assert result.status == "timeout"


def test_bare_excepts_do_not_outlive_the_limits(sandbox: Sandbox) -> None:
    code = "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    assert sandbox.run(Program(code)).status == "timeout"


def test_os_exit_in_the_middle_passes_nothing_more(sandbox: Sandbox) -> None:
    result = sandbox.run(Program("import os", ("assert True", "import os; os._exit(0)", "assert True")))
    assert result.status == "exited"
    assert result.passed == (True, False, False)


def test_sys_exit_in_a_test_fails_that_test_alone(sandbox: Sandbox) -> None:
    result = sandbox.run(Program("", ("import sys; sys.exit(0)", "assert True")))
    assert result.status == "ok"
    assert result.passed == (False, True)


def test_huge_output_is_cut(sandbox: Sandbox) -> None:
    result = sandbox.run(Program("print('x' * 3_000_000)", ("assert True",)))
    assert result.status == "ok"
    assert len(result.output) == QUICK.output_bytes
    assert sandbox.run(Program("while True: print('y' * 1000)")).status == "timeout"


def test_files_are_small_and_gone_afterwards(sandbox: Sandbox) -> None:
    first = sandbox.run(Program("import os\nopen('kept', 'w').write('x')\nprint(os.getcwd())"))
    assert first.status == "ok", first.error
    seen = sandbox.run(Program(f"import os\nprint(os.path.exists({first.output.strip()!r}), os.listdir('.'))"))
    assert seen.output == "False []\n"
    large = sandbox.run(Program("open('a', 'wb').write(b'x' * 2_000_000)"))
    assert large.status == "error"
    assert large.error.startswith("OSError: [Errno 27]")  # EFBIG


def test_many_files_do_not_fill_the_disk(sandboxes: Callable[..., Sandbox]) -> None:
    code = "for i in range(100):\n    open(str(i), 'wb').write(b'x' * 1_000_000)"
    result = sandboxes(needs="mounts").run(Program(code))
    assert result.error.startswith("OSError: [Errno 28]")  # ENOSPC


ATTACK_ON_FILES = """
import os
def attempt(what):
    try:
        what()
    except OSError as error:
        print('refused', type(error).__name__)
    else:
        print('DONE')
def overwrite():
    with open(path, 'w') as file:
        file.write('overwritten')
for what in (overwrite, lambda: os.truncate(path, 0), lambda: os.rename(path, path + 'x'), lambda: os.remove(path)):
    attempt(what)
"""
ALONE = [
    (),
    KERNEL,
    (*KERNEL, "seccomp"),
    (*KERNEL, "landlock", "mounts"),
    (*KERNEL, "seccomp", "mounts"),
    (*KERNEL, "seccomp", "landlock"),
]


@pytest.fixture
def canary() -> Iterator[Path]:
    """A file of this user's that anybody may write: no right of a file's protects it, only the sandbox does."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        path = Path(folder) / "canary"
        path.write_text("alive")
        path.chmod(0o666)
        yield path


@pytest.mark.parametrize("without", ALONE, ids=lambda names: "without " + (" ".join(names) or "none"))
def test_a_file_outside_survives(sandboxes: Callable[..., Sandbox], canary: Path, without: tuple[str, ...]) -> None:
    result = sandboxes(*without).run(Program(f"path = {str(canary)!r}\n{ATTACK_ON_FILES}"))
    assert result.status == "ok", result.error
    assert result.output.split("\n")[:4] == ["refused PermissionError"] * 4 or "DONE" not in result.output
    assert canary.read_text() == "alive"
    assert sorted(path.name for path in canary.parent.iterdir()) == ["canary"]


def test_that_attack_succeeds_with_no_barrier(sandboxes: Callable[..., Sandbox], canary: Path) -> None:
    result = sandboxes(*BARRIERS, weak=True).run(Program(f"path = {str(canary)!r}\n{ATTACK_ON_FILES}"))
    assert "DONE" in result.output
    assert not (canary.exists() and canary.read_text() == "alive")


CONNECT = """
import socket
try:
    socket.create_connection(('127.0.0.1', port), 1.0).sendall(b'hello')
    print('connected')
except OSError as error:
    print('refused')
"""


@pytest.mark.parametrize(
    ("without", "needs"), [(KERNEL, "seccomp"), ((*KERNEL, "seccomp"), "network")], ids=["seccomp", "network"]
)
def test_no_network_not_even_to_this_machine(
    sandboxes: Callable[..., Sandbox], without: tuple[str, ...], needs: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        code = f"port = {listener.getsockname()[1]}\n{CONNECT}"
        assert sandboxes(*without, needs=needs).run(Program(code)).output == "refused\n"
        with pytest.raises(TimeoutError):
            listener.accept()
        # The same program does connect where nothing holds it.
        assert sandboxes(*BARRIERS, weak=True).run(Program(code)).output == "connected\n"
        listener.accept()[0].close()


def test_the_guard_closes_the_network_too(sandbox: Sandbox) -> None:
    assert sandbox.run(Program("import socket")).error == "ImportError: module 'socket' is closed in the sandbox"


BOMB = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"


@pytest.mark.parametrize("without", [KERNEL, (*KERNEL, "seccomp")], ids=["seccomp", "pids"])
def test_a_fork_bomb_leaves_nothing(
    sandboxes: Callable[..., Sandbox], without: tuple[str, ...], own_python: str
) -> None:
    bombed = sandboxes(*without, limits=Limits(wall_seconds=1.0, cpu_seconds=1), python=own_python)
    before = of_sandboxes(own_python)
    assert before
    assert bombed.run(Program(BOMB)).status == "timeout"
    assert bombed.run(Program("", ("assert True",))).passed == (True,)
    assert of_sandboxes(own_python) <= before


def test_seccomp_allows_no_other_process_or_thread(sandboxes: Callable[..., Sandbox]) -> None:
    code = """
import os, threading, signal, subprocess
for what in (os.fork, threading.Thread(target=print).start, lambda: subprocess.run(['true']),
             lambda: os.kill(os.getppid(), 9), lambda: os.execv('/bin/true', ['true']), lambda: os.setsid()):
    try:
        what()
        print('DONE')
    except (OSError, RuntimeError):
        print('refused')
"""
    assert sandboxes(*KERNEL, needs="seccomp").run(Program(code)).output == "refused\n" * 6


ORPHAN = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
print('left behind')
"""


@pytest.mark.parametrize("without", [("seccomp",), ("seccomp", "pids")], ids=["pids", "none"])
def test_grandchildren_die_with_the_program(
    sandboxes: Callable[..., Sandbox], without: tuple[str, ...], own_python: str
) -> None:
    made = sandboxes(*KERNEL, *without, weak=True, python=own_python)
    before = of_sandboxes(own_python)
    assert before
    result = made.run(Program(ORPHAN))
    assert result.output == "left behind\n"
    assert result.status == "ok"
    assert of_sandboxes(own_python) <= before


def test_the_environment_of_this_process_is_out_of_reach(
    sandboxes: Callable[..., Sandbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET", "do-not-tell")
    code = f"""
import os
print(dict(os.environ))
try:
    print(len(open('/proc/{os.getpid()}/environ', 'rb').read()) > 0)
except OSError:
    print('refused')
"""
    for without in ((), KERNEL):
        assert sandboxes(*without).run(Program(code)).output == "{}\nrefused\n"
    assert sandboxes(*BARRIERS, weak=True).run(Program(code)).output == "{}\nTrue\n"


FORGERIES = {
    "prints": "print('[\"test\", 0, \"\"]', flush=True)\nprint('ok', flush=True)",
    "writes to every open file": (
        'import os\nfor fd in range(32):\n    try:\n        os.write(fd, b\'x ["test", 0, ""]\\n\')\n'
        "    except OSError: pass"
    ),
    "asks for frames": (
        "import sys\ndef f():\n    frame = sys._getframe(1)\n    while frame:\n        print(frame.f_locals)\n"
        "        frame = frame.f_back\n    return 1"
    ),
    "walks a traceback": "def f():\n    try: 1 / 0\n    except Exception as e: print(e.__traceback__.tb_frame.f_back)",
    "searches the memory": "import gc\ndef f(): return [o for o in gc.get_objects() if isinstance(o, str)]",
    "always equal": "class Yes:\n    def __eq__(self, other): return True\ndef f(): return Yes()",
    "always equal inside": "class Yes(int):\n    __eq__ = lambda self, other: True\ndef f(): return [Yes(1)]",
    "replaces abs": "import builtins\nbuiltins.abs = lambda x: 1\nabs = lambda x: 1\ndef f(): return 0",
    "replaces exec": "import builtins\nbuiltins.exec = lambda *a: None\nbuiltins.compile = print\ndef f(): return 0",
    "leaves early": "import atexit, os\ndef f(): os._exit(0)",
}


@pytest.mark.parametrize("code", FORGERIES.values(), ids=FORGERIES)
def test_results_are_not_easily_forged(sandbox: Sandbox, code: str) -> None:
    result = sandbox.run(Program(code, ("assert f() == 1 or f() == [1]", "assert abs(f()) == 1"), ("f",)))
    assert result.passed == (False, False), result


def test_plain_results_of_all_common_kinds_count(sandbox: Sandbox) -> None:
    code = (
        "import collections, fractions\n"
        "def f(): return {'a': [1, 2.5, None, True, (b'x', {3}), {'deep': [[]]}], 'b': fractions.Fraction(1, 2)}\n"
        "def g(): return collections.Counter('aab')"
    )
    tests = ("assert f()['a'][4] == (b'x', {3})", "assert g() == {'a': 2, 'b': 1}")
    assert sandbox.run(Program(code, tests, ("f", "g"))).passed == (True, True)


def test_hashes_and_random_numbers_do_not_change(sandbox: Sandbox) -> None:
    program = Program("import random\nprint(hash('word'), random.random(), list({'x', 'y', 'z'}))")
    first, second = (run_many([program], workers=1)[0] for _ in range(2))
    assert first.status == "ok"
    assert first.output == second.output


def test_many_programs_keep_their_order(sandbox: Sandbox) -> None:
    programs = [Program(f"print({i})", (f"assert {i} % 3",)) for i in range(20)]
    results = run_many(programs, workers=3, limits=QUICK)
    assert [result.output for result in results] == [f"{i}\n" for i in range(20)]
    assert [result.passed for result in results] == [(i % 3 != 0,) for i in range(20)]


def test_a_lost_server_loses_one_program(sandbox: Sandbox) -> None:
    with Sandbox(QUICK, workers=1) as made:
        assert made.run(Program("")).status == "ok"
        server = made._servers[0]
        server._process.kill()
        server._process.wait()
        lost = made.run(Program("", ("assert True",)))
        assert (lost.status, lost.passed) == ("lost", (False,))
        assert made.run(Program("", ("assert True",))) == RunResult(
            "ok", (True,), ("",), seconds=pytest.approx(0, abs=60), cpu_seconds=pytest.approx(0, abs=60)
        )
        folder = made._servers[0].folder
        assert folder.is_dir()
    assert not folder.exists()
    assert not server.folder.exists()


def test_without_the_kernels_barriers_it_refuses() -> None:
    weakened = Sandbox(without=("seccomp", "landlock", "mounts", "network", "pids"))
    with pytest.raises(EchelonError, match="can't keep untrusted programs from writing files and from network"):
        weakened.run(Program(""))
    weakened.close()


def test_the_report_names_every_barrier() -> None:
    report = sandbox_report()
    assert set(report) == {*BARRIERS, "limits"}
    assert all(value == "on" or value.startswith("off: ") for value in report.values())
    assert report["limits"] == "on"


def test_bad_settings_are_named() -> None:
    with pytest.raises(EchelonError, match="unknown barrier 'seccom': did you mean 'seccomp'"):
        Sandbox(without=("seccom",))
    with pytest.raises(EchelonError, match="at least 1 worker"):
        Sandbox(workers=0)
    with pytest.raises(EchelonError, match="wall_seconds must be above 0"):
        Limits(wall_seconds=0)
    with pytest.raises(EchelonError, match="could not start"):
        Sandbox(python="/bin/false").run(Program(""))
