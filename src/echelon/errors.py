"""The errors that a user can mend: one clear line, exit status 2, never a traceback."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["BusyError", "EchelonError", "StorageError", "unknown_name"]


class EchelonError(Exception):
    """Something the user can mend: what is wrong, where, and what would be right, in one line."""


class StorageError(EchelonError):
    """A file or folder that can't be written: the disk's trouble, not that of the run that met it."""


class BusyError(StorageError):
    """A folder that another process is writing."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> EchelonError:
    """The error for a name that isn't registered; it names the nearest known one.

    Args:
        what: what kind of thing it is ("method", "planner", …).
        name: what was asked for.
        known: every name that would have been right.
    """
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return EchelonError(f"unknown {what} {name!r}: {hint}known are {', '.join(names)}")
