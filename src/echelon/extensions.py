"""A user's own environments, terms and methods: importing what registers them."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from echelon.errors import EchelonError

__all__ = ["import_modules", "resolved"]


def import_modules(names: Sequence[str]) -> None:
    """Import what registers a user's own environments and methods: modules by name, or files (`….py`).

    Raises:
        EchelonError: there is none, or it fails.
    """
    for name in names:
        try:
            if not name.endswith(".py"):
                importlib.import_module(name)
                continue
            path = Path(name).resolve()
            module = f"_echelon_study_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
            if module in sys.modules:
                continue
            spec = importlib.util.spec_from_file_location(module, path)
            if spec is None or spec.loader is None or not path.exists():
                raise EchelonError(f"imports: there is no file {name}")
            sys.modules[module] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(sys.modules[module])
            except BaseException:
                # Or the next import would take it for done.
                del sys.modules[module]
                raise
        except EchelonError:
            raise
        except (Exception, SystemExit) as error:  # whatever a user's file may raise, or do without a __main__ guard
            raise EchelonError(f"imports: {name} fails: {type(error).__name__}: {error}") from error


def resolved(names: Sequence[str], beside: Path = Path()) -> tuple[str, ...]:
    """The same names with files as absolute paths, so that they are found from anywhere.

    Args:
        names: of modules, or of files.
        beside: the folder that relative files are in.
    """
    return tuple(str((beside / name).resolve()) if name.endswith(".py") else name for name in names)
