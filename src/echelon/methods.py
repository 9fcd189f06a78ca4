"""Methods: named pairings of planner, executor and algorithm, one registration line each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from echelon.errors import unknown_name

__all__ = ["Method", "method", "methods", "register"]


@dataclass(frozen=True)
class Method:
    """What a method's name stands for.

    Attributes:
        name: how it is called.
        summary: what it is, in one line.
        train_planner: who sets subgoals while executors learn; None for a flat team. "llm" stands for the
            configured model.
        eval_planner: who sets them afterwards.
        executor: who picks the moves: a learned policy, an untrained one, or the language model itself.
    """

    name: str
    summary: str
    train_planner: str | None
    eval_planner: str | None
    executor: Literal["learned", "untrained", "model"] = "learned"

    @property
    def learns(self) -> bool:
        """Whether there is anything to train."""
        return self.executor == "learned"

    def needs_model(self, planner: str | None = None) -> bool:
        """Whether a language model takes part, with `planner` in the place of the method's own."""
        planners = (planner,) if planner else (self.train_planner, self.eval_planner)
        return self.executor == "model" or any(p is not None and p.startswith("llm") for p in planners)


_REGISTRY: dict[str, Method] = {}


def register(method: Method) -> None:
    """Make a method known by its name."""
    _REGISTRY[method.name] = method


def methods() -> dict[str, Method]:
    """All known methods by name."""
    return dict(_REGISTRY)


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        EchelonError: there is none.
    """
    if name not in _REGISTRY:
        raise unknown_name("method", name, _REGISTRY)
    return _REGISTRY[name]


register(Method("l2m2", "a language model sets subgoals, MAPPO executors reach them", "llm", "llm"))
register(Method("flat-mappo", "MAPPO without subgoals, on the task reward (the paper's control A)", None, None))
register(Method("llm-only", "the language model picks every move (control B)", None, None, "model"))
register(Method("llm-untrained", "the language model sets subgoals for untrained executors (control B)",
                "llm", "llm", "untrained"))  # fmt: skip
register(Method("random-goals", "random cells as subgoals, MAPPO executors (control C)", "random", "random"))
register(Method("rule-goals", "optimal assignment sets subgoals, MAPPO executors", "hungarian", "hungarian"))
register(Method("direct-integration", "executors trained under optimal assignment, then planned for by the model",
                "hungarian", "llm"))  # fmt: skip
