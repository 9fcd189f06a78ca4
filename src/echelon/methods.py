"""Methods: named pairings of planner, executor and algorithm, one registration line each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from echelon.errors import EchelonError, unknown_name

__all__ = ["Method", "method", "methods", "register"]


@dataclass(frozen=True)
class Method:
    """What a method's name stands for.

    Attributes:
        name: how it is called; folders are named by it.
        summary: what it is, in one line.
        train_planner: who sets subgoals while executors learn; None for a flat team. "llm" stands for the
            configured model.
        eval_planner: who sets them afterwards.
        executor: who picks the moves: a learned policy, an untrained one, the language model itself, or PIBT.
        algorithm: how a policy learns.
        cheap_planner: who plans, while executors learn, the worlds that a language model doesn't.
        settings: what of a run's tables (`subgoals`, `algorithm`) this method sets unless the run says otherwise.
    """

    name: str
    summary: str
    train_planner: str | None
    eval_planner: str | None
    executor: Literal["learned", "untrained", "model", "pibt"] = "learned"
    algorithm: str = "mappo"
    cheap_planner: str = "nearest"
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

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
    """Make a method known by its name.

    Raises:
        EchelonError: a name that can't be a folder's.
    """
    if not method.name[:1].isalnum() or not all(c.isalnum() or c in "-_." for c in method.name):
        raise EchelonError(f"method name {method.name!r}: it must be letters, digits, - _ . after a letter or digit")
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
register(Method("flat-ippo", "IPPO: as flat-mappo, each agent's critic seeing what the agent sees", None, None,
                algorithm="ippo"))  # fmt: skip
register(Method("qmix", "QMIX without subgoals, on the task reward", None, None, algorithm="qmix"))
register(Method("vdn", "VDN without subgoals, on the task reward", None, None, algorithm="vdn"))
# L2M2 of IJCAI 2025: one of eight directions an agent, every several steps, for the whole team; the executors'
# reward is the task's plus a little of the subgoal's (with its full weight they follow directions past the packages).
register(Method("l2m2-qmix", "the model gives each agent one of 8 directions, QMIX executors follow them", "llm", "llm",
                algorithm="qmix", settings={"subgoals": {"space": "direction", "every": 10, "scope": "team",
                                                         "task_weight": 1.0, "intrinsic_weight": 0.05}},
                ))  # fmt: skip
# The whole team is assigned afresh whenever one agent is done: the stronger of the two, by 2.7% of the makespan.
register(Method("classical", "optimal assignment and PIBT: full information, nothing learnt",
                None, "hungarian", "pibt", settings={"subgoals": {"scope": "team"}}))  # fmt: skip
register(Method("direct-integration", "executors trained under optimal assignment, then planned for by the model",
                "hungarian", "llm"))  # fmt: skip
