"""Packages whose heavy parts are imported when they are first asked for (PEP 562).

The command line imports whatever a flag may name; what only some commands use must not cost every start its second.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["lazily"]


def lazily(package: str, *modules: str) -> Callable[[str], Any]:
    """A package's `__getattr__`: what its `__all__` names and it doesn't have yet, some of its modules have.

    Args:
        package: its `__name__`.
        modules: those modules, by name.
    """

    def get(name: str) -> Any:
        if name in sys.modules[package].__all__:
            for module in (importlib.import_module(f"{package}.{one}") for one in modules):
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
