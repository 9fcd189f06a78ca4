"""The sandbox's own process: forks one confined child a program, watches it, and reports what it did.

Run by `echelon.tasks.sandbox` as a script, with nothing of Echelon in it. It speaks frames (4 bytes of length, big
endian, then JSON): settings in, a report of its barriers out, then a program in, a result out, until its input ends.
This process never runs a program's code; the children do, after every barrier stands. What each barrier holds is told
in `echelon.tasks.sandbox`.
"""

# Plain calls on plain paths: what a child still holds of this process should be little.
# ruff: noqa: PTH101, PTH102, PTH112, PTH118, PTH120, PTH123, SIM115

from __future__ import annotations

import builtins
import contextlib
import ctypes
import errno
import fcntl
import gc
import json
import os
import platform
import resource
import select
import shutil
import signal
import stat
import struct
import sys
import tempfile
import time
import types
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

# Loaded once here, so that no child pays for it. Names that a child must not have are kept out of its reach below.
_LIBRARY = """
abc array base64 binascii bisect calendar cmath collections copy dataclasses datetime decimal enum
fractions functools hashlib heapq inspect io itertools json math numbers operator random re statistics
string textwrap traceback types typing unicodedata
"""
PRELOADED = _LIBRARY.split()

REPORT, RULES = 3, 4
LINUX = sys.platform == "linux"
NOBODY = 65534

# From Linux's headers; the numbers of Landlock, mount_setattr and the flags are the same on all machines.
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
MOUNT_SETATTR, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, 0x8000, 1
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
READ_FILE, READ_DIR = 1 << 2, 1 << 3
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38

# The system calls that a program may use: (x86_64, aarch64); all others are refused with EPERM. No call of these
# makes a process or a socket, signals another process, or changes who may read a file.
CALLS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "pread64": (17, 67), "readv": (19, 65),
    "writev": (20, 66), "access": (21, None), "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233),
    "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "nanosleep": (35, 101), "clock_nanosleep": (230, 115),
    "getpid": (39, 172), "exit": (60, 93), "exit_group": (231, 94), "uname": (63, 160),
    "getdents": (78, None), "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49), "readlink": (89, None),
    "readlinkat": (267, 78), "stat": (4, None), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291),
    "faccessat": (269, 48), "faccessat2": (439, 439), "gettimeofday": (96, 169), "getrusage": (98, 165),
    "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177),
    "getppid": (110, 173), "gettid": (186, 178), "futex": (202, 98), "sched_getaffinity": (204, 123),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "time": (201, None), "getrandom": (318, 278),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "pipe": (22, None),
    "pipe2": (293, 59), "sigaltstack": (131, 132), "getrlimit": (97, 163), "set_robust_list": (273, 99),
    "rseq": (334, 293), "arch_prctl": (158, None), "restart_syscall": (219, 128), "alarm": (37, None),
    "setitimer": (38, 103), "getitimer": (36, 102),
}  # fmt: skip
# Only where something else keeps writes inside the program's folder (Landlock, or mounts that are read-only).
WRITING_CALLS: dict[str, tuple[int | None, int | None]] = {
    "pwrite64": (18, 68), "ftruncate": (77, 46), "fsync": (74, 82), "fdatasync": (75, 83), "mkdir": (83, None),
    "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None),
    "renameat": (264, 38), "renameat2": (316, 276),
}  # fmt: skip
OPEN, OPENAT, IOCTL, FCNTL, PRLIMIT64 = (2, None), (257, 56), (16, 29), (72, 25), (302, 261)
CLONE = (56, 220)
AUDIT_ARCH = (0xC000003E, 0xC00000B7)
# ioctls that ask what kind of terminal something is, and close-on-exec; none can type into one.
HARMLESS_IOCTLS = (0x5401, 0x5413, 0x5450, 0x5451)
# Copies, flags and sizes of open files; not who is signalled about them.
HARMLESS_FCNTLS = (0, 1, 2, 3, 4, 1030, 1031, 1032)

WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | getattr(os, "O_TMPFILE", 0)

libc = ctypes.CDLL(None, use_errno=True)
# Forking must not let go of the interpreter's lock: the child has no other thread that could give it back.
locked_libc = ctypes.PyDLL(None, use_errno=True)


def column() -> int | None:
    """This machine's place in the tables of system calls; None where they don't hold."""
    if not LINUX or sys.byteorder != "little" or struct.calcsize("P") != 8:
        return None
    return {"x86_64": 0, "aarch64": 1}.get(platform.machine())


def check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def syscall(number: int, *arguments: Any) -> int:
    widened = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return check(int(libc.syscall(ctypes.c_long(number), *widened)))


def prctl(option: int, *arguments: Any) -> None:
    widened = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    widened += [ctypes.c_ulong(0)] * (4 - len(widened))
    check(libc.prctl(option, *widened))


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    encoded = (source.encode(), target.encode(), kind.encode() if kind else None, ctypes.c_ulong(flags), data.encode())
    check(libc.mount(*encoded))


# --- Barriers that this process puts up once -------------------------------------------------------------------


class Barriers:
    """What confines the children: put up as far as this machine lets it, with the reason for what it doesn't."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.without = frozenset(settings["without"])
        self.base = str(settings["folder"])
        self.limits: dict[str, Any] = settings["limits"]
        self.state: dict[str, str] = {}
        self.root = os.geteuid() == 0
        self.drops = self.root and "user" not in self.without
        self.pids = False
        self.ruleset = -1
        self.filter: Any = None
        self.task = -1
        if LINUX:
            # Where this process's children are told, also once /proc is covered; closed in each child.
            with contextlib.suppress(OSError):
                self.task = os.open(f"/proc/self/task/{os.getpid()}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.library = os.path.dirname(os.path.realpath(os.__file__))
        self._namespaces()
        self._landlock()
        self._seccomp()
        self._user()

    def _try(self, name: str, build: Callable[[], None]) -> bool:
        if name in self.without:
            self.state[name] = "off: switched off"
            return False
        if not LINUX:
            self.state[name] = "off: needs Linux"
            return False
        try:
            build()
        except (OSError, AttributeError, ValueError) as error:
            self.state[name] = f"off: {error}"
            return False
        self.state[name] = "on"
        return True

    def _namespaces(self) -> None:
        wanted = {"network": CLONE_NEWNET, "mounts": CLONE_NEWNS}
        flags = sum(flag for name, flag in wanted.items() if name not in self.without)
        flags |= CLONE_NEWIPC | CLONE_NEWUTS

        def unshare() -> None:
            if self.root:
                check(libc.unshare(flags))
                return
            uid, gid = os.geteuid(), os.getegid()
            check(libc.unshare(flags | CLONE_NEWUSER))
            for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)

        inside = self._try("namespaces", unshare)
        self._try("network", lambda: self._need(inside))

        def read_only() -> None:
            self._need(inside)
            self._mounts()

        if not self._try("mounts", read_only):
            os.chmod(self.base, 0o711)

        def probe() -> None:
            self._need(inside)
            pid = fork(CLONE_NEWPID)
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)

        self.pids = self._try("pids", probe)

    @staticmethod
    def _need(inside: bool) -> None:
        if not inside:
            raise OSError(errno.EPERM, "needs namespaces")

    def _mounts(self) -> None:
        """All that is mounted becomes read-only, here alone; the programs' folder is a small file system in memory,
        gone with this process; `/proc` is empty (the environments of other processes are read there)."""
        mount("none", "/", None, MS_REC | MS_PRIVATE)
        attributes = struct.pack("=QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0)
        syscall(MOUNT_SETATTR, -100, b"/", AT_RECURSIVE, attributes, len(attributes))
        size = int(self.limits["disk_bytes"])
        plain = MS_NOSUID | MS_NODEV
        mount("none", self.base, "tmpfs", plain | MS_NOEXEC, f"size={size},nr_inodes=4096,mode=711")
        if self.drops:
            # Python may be installed where only root can look (in /root, say).
            library = os.path.join(self.base, "lib")
            os.mkdir(library)
            mount(self.library, library, None, MS_BIND | MS_REC)
            sys.path[:] = [library, os.path.join(library, "lib-dynload")]
            sys.path_importer_cache.clear()
            for module in list(sys.modules.values()):
                # The parts of packages that are loaded already.
                path = getattr(module, "__path__", None)
                if isinstance(path, list):
                    path[:] = [place.replace(os.path.dirname(os.__file__), library, 1) for place in path]
        mount("none", "/proc", "tmpfs", plain | MS_NOEXEC | MS_RDONLY, "size=4096,mode=555")

    def _landlock(self) -> None:
        def build() -> None:
            version = syscall(LANDLOCK_CREATE_RULESET, None, 0, 1)
            writes = sum(1 << bit for bit in (1, 4, 5, 6, 7, 8, 9, 10, 11, 12))
            writes |= (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0)
            everything = writes | READ_FILE | READ_DIR | 1 | (1 << 15 if version >= 5 else 0)
            fields = [everything]
            if version >= 4:
                fields.append(3)  # bind and connect of TCP
            if version >= 6:
                fields.append(3)  # abstract sockets of, and signals to, processes outside
            attributes = struct.pack(f"={len(fields)}Q", *fields)
            ruleset = syscall(LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
            inside = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | READ_FILE | READ_DIR | (writes & 1 << 14)
            allowed = {self.base: inside}
            for folder in {self.library, "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo"}:
                allowed[folder] = READ_FILE | READ_DIR
            for folder, rights in allowed.items():
                if not os.path.isdir(folder):
                    continue
                handle = os.open(folder, os.O_PATH | os.O_CLOEXEC)
                try:
                    syscall(LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, handle), 0)
                finally:
                    os.close(handle)
            self.ruleset = ruleset

        self._try("landlock", build)

    def _seccomp(self) -> None:
        def build() -> None:
            place = column()
            if place is None:
                raise OSError(errno.ENOSYS, f"no table of system calls for {platform.machine()}")
            confined = self.state["landlock"] == "on" or self.state["mounts"] == "on"
            self.filter = seccomp_filter(place, may_write=confined)

        self._try("seccomp", build)

    def _user(self) -> None:
        if "user" in self.without:
            self.state["user"] = "off: switched off"
        else:
            self.state["user"] = "on" if self.root else "off: not root, programs run as this user"

    @property
    def missing(self) -> list[str]:
        """What no barrier of the kernel's keeps a program from."""
        on = {name for name, value in self.state.items() if value == "on"}
        needs = {
            "writing files": {"landlock", "mounts", "seccomp"},
            "network": {"network", "seccomp"},
            "making processes": {"pids", "seccomp"},
        }
        return [what for what, barriers in needs.items() if not on & barriers]

    def confine(self, folder: str) -> None:
        """In the child: every barrier that stands, or an OSError."""
        os.setsid()
        os.chdir(folder)
        os.umask(0o077)
        limits = self.limits
        seconds = int(limits["cpu_seconds"])
        for name, soft, hard in (
            ("RLIMIT_CPU", seconds, seconds + 1),
            ("RLIMIT_AS", limits["memory_bytes"], limits["memory_bytes"]),
            ("RLIMIT_FSIZE", limits["file_bytes"], limits["file_bytes"]),
            ("RLIMIT_NOFILE", limits["open_files"], limits["open_files"]),
            ("RLIMIT_NPROC", limits["processes"], limits["processes"]),
            ("RLIMIT_CORE", 0, 0),
        ):
            kind = getattr(resource, name, None)
            if kind is not None:
                _, most = resource.getrlimit(kind)
                if most != resource.RLIM_INFINITY:
                    soft, hard = min(soft, most), min(hard, most)
                # macOS refuses a limit on address space.
                with contextlib.suppress(ValueError) if not LINUX else contextlib.nullcontext():
                    resource.setrlimit(kind, (soft, hard))
        if self.drops:
            os.setgroups([])
            if hasattr(os, "setresuid"):
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
            else:
                os.setgid(NOBODY)
                os.setuid(NOBODY)
        if not LINUX:
            return
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        prctl(PR_SET_DUMPABLE, 0)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        if "user" not in self.without:
            # No privilege over its own namespaces either.
            check(libc.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24)))
        if self.ruleset >= 0:
            syscall(LANDLOCK_RESTRICT_SELF, self.ruleset, 0)
            os.close(self.ruleset)
        if self.filter is not None:
            prctl(PR_SET_SECCOMP, 2, ctypes.byref(self.filter))


class SockFilter(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint))


class SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.POINTER(SockFilter)))


def seccomp_filter(place: int, *, may_write: bool) -> SockFprog:
    """The filter of system calls, as a program for the kernel's classic BPF machine.

    Args:
        place: the column of the tables.
        may_write: whether files may be opened for writing, made and removed (inside what other barriers leave).
    """
    load, equal, any_bit, give = 0x20, 0x15, 0x45, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
    # seccomp_data: number at 0, architecture at 4, arguments from 16 on, 8 bytes each, the lower half first.
    program = [(load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCH[place]), (give, 0, 0, kill), (load, 0, 0, 0)]

    def argument(index: int) -> int:
        return 16 + 8 * index

    for numbers in [*CALLS.values(), *(WRITING_CALLS.values() if may_write else ())]:
        if (number := numbers[place]) is not None:
            program += [(equal, 0, 1, number), (give, 0, 0, allow)]
    for numbers, flags_at in ((OPEN, 1), (OPENAT, 2)):
        if (number := numbers[place]) is None:
            continue
        if may_write:
            program += [(equal, 0, 1, number), (give, 0, 0, allow)]
        else:
            body = [(load, 0, 0, argument(flags_at)), (any_bit, 0, 1, WRITE_FLAGS), (give, 0, 0, refuse)]
            program += [(equal, 0, len(body) + 1, number), *body, (give, 0, 0, allow)]
    for numbers, harmless in ((IOCTL, HARMLESS_IOCTLS), (FCNTL, HARMLESS_FCNTLS)):
        body = [(load, 0, 0, argument(1))]
        for request in harmless:
            body += [(equal, 0, 1, request), (give, 0, 0, allow)]
        body += [(give, 0, 0, refuse)]
        program += [(equal, 0, len(body), numbers[place]), *body]
    # prlimit64 only of the process itself.
    body = [(load, 0, 0, argument(0)), (equal, 0, 1, 0), (give, 0, 0, allow), (give, 0, 0, refuse)]
    program += [(equal, 0, len(body), PRLIMIT64[place]), *body, (give, 0, 0, refuse)]
    lines = (SockFilter * len(program))(*(SockFilter(*line) for line in program))
    return SockFprog(len(program), lines)


def fork(flags: int = 0) -> int:
    """`os.fork`, in new namespaces."""
    if not flags:
        return os.fork()
    place = column()
    if place is None:
        raise OSError(errno.ENOSYS, "no number of clone known for this machine")
    python = ctypes.pythonapi
    python.PyOS_BeforeFork()
    arguments = (CLONE[place] or 0, flags | signal.SIGCHLD, 0, 0, 0, 0)
    pid = int(locked_libc.syscall(*(ctypes.c_long(a) for a in arguments)))
    number = ctypes.get_errno()
    if pid == 0:
        python.PyOS_AfterFork_Child()
    else:
        python.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(number, os.strerror(number))
    return pid


# --- In the child ----------------------------------------------------------------------------------------------

REFUSED_EVENTS = (
    "socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "os.system",
    "os.kill", "os.putenv", "ctypes.", "gc.get_", "sys._current_", "sys.settrace", "sys.setprofile", "code.__new__",
    "os.chmod", "os.chown", "os.link", "os.symlink", "os.utime", "os.setxattr", "fcntl.", "mmap.", "syslog.",
    "pty.", "shutil.", "sqlite3.", "webbrowser.", "urllib.", "ftplib.", "http.", "smtplib.", "telnetlib.",
)  # fmt: skip
REFUSED_IMPORTS = (
    "_ctypes", "_multiprocessing", "_posixsubprocess", "_socket", "_testcapi", "_testinternalcapi",
    "_xxsubinterpreters", "_interpreters", "ctypes", "faulthandler", "mmap", "multiprocessing", "socket", "subprocess",
)  # fmt: skip
FILE_EVENTS = ("open", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate")
FRAMES = ("tb_frame", "gi_frame", "cr_frame", "ag_frame")


def guard(folder: str) -> None:
    """The second barrier, inside the interpreter: an audit hook, fewer built-ins, and no ready-made dangerous modules.

    It is no wall by itself (an interpreter can be subverted from within); it gives the clearer message, and it keeps
    the frames of the code that reports the results out of ordinary reach.
    """
    inside = os.path.realpath(folder) + os.sep
    realpath, fspath = os.path.realpath, os.fspath

    def outside(path: Any) -> bool:
        if isinstance(path, int):
            return False
        return not (realpath(os.fsdecode(fspath(path))) + os.sep).startswith(inside)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "sys._getframe":
            # The library asks for frames too and takes this for "not deep enough".
            raise ValueError("frames are closed in the sandbox")
        if event == "object.__getattr__" and arguments[1] in FRAMES:
            raise PermissionError("frames are closed in the sandbox")
        if event == "import" and arguments[0].partition(".")[0] in REFUSED_IMPORTS:
            raise ImportError(f"module {arguments[0]!r} is closed in the sandbox")
        if event.startswith(REFUSED_EVENTS):
            raise PermissionError(f"{event} is refused in the sandbox")
        if event in FILE_EVENTS:
            if event == "open" and not ((arguments[2] or 0) & WRITE_FLAGS):
                return
            paths = arguments[:2] if event == "os.rename" else arguments[:1]
            if any(outside(path) for path in paths):
                raise PermissionError(f"{event} outside the sandbox's folder is refused")

    # This file's own names are not the program's.
    sys.modules["__main__"] = types.ModuleType("__main__")
    for name in [name for name in sys.modules if name.partition(".")[0] in REFUSED_IMPORTS]:
        del sys.modules[name]
    for name in ("breakpoint", "help", "input", "exit", "quit"):
        if hasattr(builtins, name):
            delattr(builtins, name)
    sys.addaudithook(hook)


class Dishonest(TypeError):
    """A result that could answer `==` as it likes."""


def plain_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose results must be made of Python's own types: an object of a class that the program defines may
    claim to equal anything."""
    import collections
    import datetime
    import decimal
    import fractions

    kind, refusal, enumerated, mapping = type, Dishonest, enumerate, dict
    counter = collections.Counter
    plain = frozenset((type(None), bool, int, float, complex, str, bytes, bytearray, range))
    plain |= {datetime.date, datetime.datetime, datetime.timedelta, decimal.Decimal, fractions.Fraction}
    listed = frozenset((list, tuple, set, frozenset, collections.deque))
    mapped = frozenset((dict, collections.OrderedDict, collections.defaultdict))

    def look(value: Any) -> None:
        waiting, seen = [value], 0
        for seen, item in enumerated(waiting):  # grows while it is walked
            if seen > 100_000:
                break
            if kind(item) in listed:
                waiting.extend(item)
            elif kind(item) in mapped:
                waiting.extend(item.keys())
                waiting.extend(item.values())
            elif kind(item) not in plain:
                raise refusal(f"the result holds a {kind(item).__name__}; only Python's own plain types count")

    def call(*arguments: Any, **named: Any) -> Any:
        value = function(*arguments, **named)
        if kind(value) is counter:
            value = mapping(value)
        look(value)
        return value

    return call


def play(job: Mapping[str, Any], folder: str, report: int, token: str) -> None:
    """Run the program, then each test, and report each as it ends.

    The token is known to this function alone; a line without it is no report. What the tests see of the built-ins is
    what they were before the program ran.
    """
    write, dumps, run, caught, name_of = os.write, json.dumps, exec, BaseException, type
    text, pristine, is_called = str, dict(vars(builtins)), callable

    def tell(*values: Any) -> None:
        line = f"{token} {dumps(values)}\n".encode()
        while line:
            line = line[write(report, line) :]

    def why(error: BaseException) -> str:
        name = name_of(error).__name__
        try:
            said = text(error)
        except caught:
            said = ""
        return f"{name}: {said}"[:300] if said else name[:300]

    if job["guard"]:
        guard(folder)
    try:
        compiled = [compile(test, f"<test {i}>", "exec") for i, test in enumerate(job["tests"])]
        program = compile(job["code"], "<program>", "exec")
    except caught as error:
        tell("loaded", why(error))
        return
    # A module that is known by its name, as `dataclasses` and `typing` want it.
    sys.modules["program"] = types.ModuleType("program")
    namespace = vars(sys.modules["program"])
    namespace["__builtins__"] = dict(pristine)
    exports, only_plain = tuple(job["exports"]), bool(job["plain_results"])
    wrap, aliases = plain_only, dict(job["aliases"])
    wrap(compile)  # now, before the program can touch what it imports
    random = sys.modules.get("random")
    if random is not None:
        random.seed(0)
    try:
        run(program, namespace)
    except caught as error:
        tell("loaded", why(error))
        return
    tell("loaded", "")
    visible: dict[str, Any] = {}
    for name in exports or [name for name in namespace if name != "__builtins__"]:
        if name in namespace:
            value = namespace[name]
            visible[name] = wrap(value) if only_plain and exports and is_called(value) else value
    for alias, name in aliases.items():
        if name in visible:
            visible[alias] = visible[name]
    for i, test in enumerate(compiled):
        try:
            run(test, {**visible, "__name__": "tests", "__builtins__": dict(pristine)})
        except caught as error:
            tell("test", i, why(error))
        else:
            tell("test", i, "")
    tell("end")


def child(barriers: Barriers, job: Mapping[str, Any], folder: str, pipes: tuple[int, int, int], token: str) -> NoReturn:
    null, output, report = pipes
    try:
        # Out of the way first, then each to its place: 3 for the report, 4 for the rules of Landlock, nothing else.
        spare = fcntl.fcntl(report, fcntl.F_DUPFD, 64)
        rules = fcntl.fcntl(barriers.ruleset, fcntl.F_DUPFD, 64) if barriers.ruleset >= 0 else -1
        os.dup2(null, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.dup2(spare, REPORT)
        if rules >= 0:
            barriers.ruleset = os.dup2(rules, RULES)
        os.closerange(RULES + (rules >= 0), 1024)
        os.environ.clear()
        sys.stdin = open(0, closefd=False)
        sys.stdout = open(1, "w", closefd=False, encoding="utf-8", errors="replace")
        sys.stderr = open(2, "w", closefd=False, encoding="utf-8", errors="replace", buffering=1)
        sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
        barriers.confine(folder)
    except BaseException as error:
        os.write(REPORT, f"{token} {json.dumps(['barrier', repr(error)])}\n".encode())
        os._exit(1)
    del barriers
    try:
        play(job, folder, REPORT, token)
        sys.stdout.flush()
    except BaseException:
        os._exit(1)
    os._exit(0)


# --- In the server ---------------------------------------------------------------------------------------------


def end_of(pid: int, *, block: bool) -> tuple[int, Any] | None:
    """How the child ended, with what it used; None while it runs."""
    done, status, usage = os.wait4(pid, 0 if block else os.WNOHANG)
    return (status, usage) if done else None


def watch(pid: int, readers: Mapping[int, bytearray], caps: Mapping[int, int], until: float) -> tuple[int, Any, bool]:
    """Read the child's pipes until it ends, or kill it when its time is over."""
    poll = select.poll()
    for reader in readers:
        poll.register(reader, select.POLLIN)
    handle = -1
    with contextlib.suppress(AttributeError, OSError):
        handle = os.pidfd_open(pid)
        poll.register(handle, select.POLLIN)
    open_readers = set(readers)
    late = False

    def drain(reader: int) -> None:
        piece = os.read(reader, 65536)
        if piece:
            kept = readers[reader]
            kept += piece[: max(0, caps[reader] - len(kept))]
        else:
            poll.unregister(reader)
            open_readers.discard(reader)

    try:
        while True:
            left = until - time.monotonic()
            if left <= 0:
                late = True
                break
            wait = left if handle >= 0 else min(left, 0.02 if open_readers else 0.002)
            ready = [fd for fd, _ in poll.poll(wait * 1000)]
            for reader in open_readers & set(ready):
                drain(reader)
            if (handle in ready or handle < 0) and (ended := end_of(pid, block=False)):
                status, usage = ended
                break
        if late:
            os.kill(pid, signal.SIGKILL)
            status, usage = end_of(pid, block=True) or (0, None)
        # Without a namespace of processes, what it left behind in its session.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        # What was written before the end is still in the pipes (64 KiB at most; more would be another writer's).
        for _ in range(4):
            for reader in open_readers & {fd for fd, _ in poll.poll(0)}:
                drain(reader)
    finally:
        if handle >= 0:
            os.close(handle)
    return status, usage, late


def reap(task: int) -> None:
    """Kill and bury the children that dead programs left to this process, however often they fork meanwhile.

    Args:
        task: this process's folder in /proc, or -1: then they are buried only once they end by themselves.
    """
    for _ in range(1000):
        try:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return
        if task < 0:
            return
        with contextlib.suppress(OSError, ValueError):
            children = os.open("children", os.O_RDONLY, dir_fd=task)
            try:
                left = [int(pid) for pid in os.read(children, 65536).split()]
            finally:
                os.close(children)
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


def run(barriers: Barriers, job: Mapping[str, Any], null: int) -> dict[str, Any]:
    """One program in a fresh folder and a fresh child."""
    limits = barriers.limits
    token = os.urandom(16).hex()
    folder = tempfile.mkdtemp(prefix="run-", dir=barriers.base)
    if barriers.drops:
        os.chown(folder, NOBODY, NOBODY)
    output, output_end = os.pipe()
    report, report_end = os.pipe()
    began = time.monotonic()
    try:
        pid = fork(CLONE_NEWPID if barriers.pids else 0)
        if pid == 0:
            child(barriers, job, folder, (null, output_end, report_end), token)
    except OSError as error:
        os.close(output_end)
        os.close(report_end)
        os.close(output)
        os.close(report)
        shutil.rmtree(folder, ignore_errors=True)
        return {"status": "lost", "error": f"could not fork: {error}", "passed": [], "messages": [], "output": ""}
    os.close(output_end)
    os.close(report_end)
    readers = {output: bytearray(), report: bytearray()}
    caps = {output: int(limits["output_bytes"]), report: 1 << 20}
    try:
        status, usage, late = watch(pid, readers, caps, began + limits["wall_seconds"])
    finally:
        os.close(output)
        os.close(report)
        if not barriers.pids and LINUX:
            reap(barriers.task)
        clear(folder)
    result = read_report(bytes(readers[report]), token, len(job["tests"]))
    used = (usage.ru_utime + usage.ru_stime) if usage is not None else 0.0
    if result["status"] == "exited":
        out_of_cpu = os.WIFSIGNALED(status) and used >= limits["cpu_seconds"]
        if late or out_of_cpu:
            result["status"], result["error"] = "timeout", "ran longer than it may"
        elif os.WIFSIGNALED(status):
            result["error"] = f"killed by signal {os.WTERMSIG(status)}"
        else:
            result["error"] = "left before its end"
    result["output"] = readers[output].decode("utf-8", errors="replace")
    result["seconds"] = time.monotonic() - began
    result["cpu_seconds"] = used
    return result


def read_report(report: bytes, token: str, tests: int) -> dict[str, Any]:
    """The lines that carry the token, in order; whatever else was written there is nobody's word."""
    passed, messages = [False] * tests, ["not run"] * tests
    result: dict[str, Any] = {"status": "exited", "error": "", "passed": passed, "messages": messages}
    mark = token.encode() + b" "
    for line in report.split(b"\n")[:-1]:
        if not line.startswith(mark):
            continue
        event = json.loads(line[len(mark) :])
        if event[0] == "barrier":
            result["status"], result["error"] = "lost", f"a barrier did not stand: {event[1]}"
        elif event[0] == "loaded" and event[1]:
            result["status"], result["error"] = "error", event[1]
        elif event[0] == "test":
            passed[event[1]], messages[event[1]] = not event[2], event[2]
        elif event[0] == "end":
            result["status"] = "ok"
    return result


def clear(folder: str) -> None:
    """Remove a program's folder, also what it made unreadable."""

    def again(function: Any, path: str, _: Any) -> None:
        with contextlib.suppress(OSError):
            if not stat.S_ISLNK(os.lstat(path).st_mode):
                os.chmod(path, 0o700)
            function(path)

    shutil.rmtree(folder, onerror=again)


def main() -> None:
    for name in PRELOADED:
        __import__(name)
    gc.freeze()  # so that a child's collector doesn't touch, and so copy, all of this memory
    source, sink = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)

    def receive() -> Any:
        head = exactly(4)
        return None if head is None else json.loads(exactly(struct.unpack(">I", head)[0]) or b"null")

    def exactly(count: int) -> bytes | None:
        data = b""
        while len(data) < count:
            piece = os.read(source, count - len(data))
            if not piece:
                return None
            data += piece
        return data

    def send(value: Any) -> None:
        data = json.dumps(value).encode()
        data = struct.pack(">I", len(data)) + data
        while data:
            data = data[os.write(sink, data) :]

    settings = receive()
    if settings is None:
        return
    barriers = Barriers(settings)
    if LINUX:
        with contextlib.suppress(OSError):
            prctl(PR_SET_CHILD_SUBREAPER, 1)
    send({"barriers": barriers.state, "missing": barriers.missing})
    while (job := receive()) is not None:
        send(run(barriers, job, null))


if __name__ == "__main__":
    main()
