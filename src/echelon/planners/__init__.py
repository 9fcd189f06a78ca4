"""Planners: how subgoals are chosen.

`llm:<model>` is in `planners.llm` (scoring), `planners.generating` (writing) and `planners.frugal` (what spares the
model), `distilled:<run>` in `planners.distilled`, `record:<file>` in `planners.recorded`.
"""

from __future__ import annotations

from collections.abc import Callable

from echelon.errors import unknown_name
from echelon.planners.base import Planner, StatelessPlanner
from echelon.planners.hungarian import Hungarian
from echelon.planners.nearest import Nearest
from echelon.planners.random import RandomCell, RandomTask

__all__ = [
    "Hungarian",
    "Nearest",
    "Planner",
    "RandomCell",
    "RandomTask",
    "StatelessPlanner",
    "make_rule_planner",
    "register",
    "rule_planners",
]

_REGISTRY: dict[str, Callable[[], Planner]] = {}


def register(name: str, build: Callable[[], Planner]) -> None:
    """Make a planner known by name: one line a planner."""
    _REGISTRY[name] = build


def rule_planners() -> tuple[str, ...]:
    """The names of the planners that need no model."""
    return tuple(sorted(_REGISTRY))


def make_rule_planner(name: str) -> Planner:
    """Build a planner that needs no model.

    Raises:
        EchelonError: unknown name.
    """
    if name not in _REGISTRY:
        raise unknown_name("planner", name, [*_REGISTRY, "llm:<model>", "distilled:<run>", "record:<plans.jsonl>"])
    return _REGISTRY[name]()


register("random", RandomCell)
register("random-task", RandomTask)
register("nearest", Nearest)
register("hungarian", Hungarian)
