"""Files that appear whole or not at all, and the hashes that say what belongs together."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from echelon.errors import BusyError, EchelonError, StorageError

__all__ = [
    "JsonLines",
    "atomic_directory",
    "atomic_write_bytes",
    "atomic_write_json",
    "atomic_write_text",
    "explain_os_error",
    "lines_of",
    "only_writer",
    "read_json",
    "remove_leftovers",
    "sha256_file",
]

_TEMP_MARK = ".echelon-tmp-"


def explain_os_error(error: OSError, path: Path) -> StorageError:
    """One clear line for the common ways in which a file can't be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"no space left on the disk while writing {path}: free some and try again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"may not write {path}: {error.strerror or error}")
    return StorageError(f"could not write {path}: {error.strerror or error}")


def _temp_sibling(path: Path) -> Path:
    return path.with_name(f"{_TEMP_MARK}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


def _sync_folder(folder: Path) -> None:
    # The rename itself is durable only once the folder is.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all, and durable when this returns.

    Raises:
        EchelonError: the disk is full or the place can't be written; whatever stood at `path` still does.
    """
    temp = _temp_sibling(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temp.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise explain_os_error(error, path) from error
    finally:
        # After the rename there is nothing left to remove; after a failure or Ctrl-C there is.
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """`atomic_write_bytes` of UTF-8 text."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: Path, value: Any, *, compact: bool = False) -> None:
    """`atomic_write_bytes` of JSON with sorted keys, `compact` in one line; NaN and infinity are refused."""
    layout: dict[str, Any] = {"separators": (",", ":")} if compact else {"indent": 1}
    atomic_write_text(path, json.dumps(value, sort_keys=True, allow_nan=False, **layout) + "\n")


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` whole when the block ends well.

    A folder that stood at `path` is replaced (it is moved aside first, so a crash between the two
    renames leaves it findable as a leftover rather than lost).

    Raises:
        EchelonError: the disk is full or the place can't be written; nothing stands at `path` that didn't.
    """
    temp = _temp_sibling(path)
    try:
        temp.mkdir(parents=True)
        yield temp
        for file in sorted(temp.rglob("*")):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        _sync_folder(temp)
        if path.exists():
            old = _temp_sibling(path)
            path.rename(old)
            temp.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            temp.rename(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise explain_os_error(error, path) from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # asks only
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that died (kill -9) left in `folder`; those of living processes stay."""
    for item in folder.glob(f"{_TEMP_MARK}*"):
        pid = item.name[len(_TEMP_MARK) :].split("-", 1)[0]
        if pid.isdigit() and int(pid) != os.getpid() and _lives(int(pid)):
            continue
        if item.is_dir():
            shutil.rmtree(item, ignore_errors=True)
        else:
            item.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, what: str) -> Any:
    """The JSON value in `path`; a missing or broken file is one clear line that names `what` it is."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EchelonError(f"no {what} at {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EchelonError(f"{what} {path} is damaged: {error}") from None


class JsonLines:
    """A file of JSON values, one a line, that a resumed run cuts back to where its checkpoint stood."""

    def __init__(self, path: Path, size: int = 0) -> None:
        """Open `path`, keeping its first `size` bytes.

        Raises:
            EchelonError: the file can't be written, or is shorter than `size` (something else cut it).
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            have = self._file.tell()
            if have < size:
                raise EchelonError(f"{path} is damaged: it has {have} bytes, the checkpoint knew of {size}")
            self._file.truncate(size)
        except OSError as error:
            raise explain_os_error(error, path) from error
        self._size = size

    def write(self, value: Any) -> None:
        """Append one value; a line is in the file whole or, after a crash, cut off by the next resume."""
        line = json.dumps(value, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise explain_os_error(error, self.path) from error
        self._size += len(line)

    def sync(self) -> int:
        """Make what was written durable; the file's size in bytes, to be kept in a checkpoint."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise explain_os_error(error, self.path) from error
        return self._size

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            self._file.close()


def lines_of(path: Path) -> list[bytes]:
    """The lines of a `JsonLines` file, the last one whole or not; none if there is no such file."""
    try:
        return path.read_bytes().splitlines()
    except FileNotFoundError:
        return []


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process alone.

    Raises:
        EchelonError: another living process holds it. (A dead one's hold is gone with it.)
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise explain_os_error(error, folder) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BusyError(f"{folder} is in use by another process: wait for it or stop it") from None
        yield
