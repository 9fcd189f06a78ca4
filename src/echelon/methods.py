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
        learner: how the language model that plans learns beside the executors; "" if it doesn't.
        settings: what of a run's tables (`subgoals`, `algorithm`, `learner`, `growth`) this method sets unless the run
            says otherwise.
    """

    name: str
    summary: str
    train_planner: str | None
    eval_planner: str | None
    executor: Literal["learned", "untrained", "model", "pibt"] = "learned"
    algorithm: str = "mappo"
    cheap_planner: str = "nearest"
    learner: Literal["", "hiper", "himac"] = ""
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
register(Method("flat-grpo", "GRPO without subgoals: no critic, worlds that play the same episode are compared", None,
                None, algorithm="grpo"))  # fmt: skip
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
# Planners that learn, together with their executors. HiPER: critics, and subgoals that can be taken back.
_REVIEWED: dict[str, dict[str, Any]] = {"subgoals": {"review": 10}, "learner": {"keep_penalty": -0.3}}
register(Method("hiper", "the model that sets subgoals learns by hierarchical advantages (HAE), executors by MAPPO",
                "llm", "llm", learner="hiper", settings=_REVIEWED))  # fmt: skip
# The control over the same turns: flat GAE instead of HAE.
register(Method("hiper-gae", "as hiper, with flat GAE over the planner's turns (its control)", "llm", "llm",
                learner="hiper",
                settings={**_REVIEWED, "learner": {**_REVIEWED["learner"], "estimator": "gae"}}))  # fmt: skip
# HiMAC: no critic, plans of one task are compared. The others are its ablations; flat-grpo, above, is the one without
# a hierarchy.
register(Method("himac", "the model that sets subgoals learns from comparing its plans, in turns with its executors",
                "llm", "llm", learner="himac"))  # fmt: skip
register(Method("joint-update", "as himac, both levels learn from the same episodes at once (ablation)", "llm", "llm",
                learner="himac", settings={"growth": {"schedule": "joint"}}))  # fmt: skip
register(Method("fixed-budget", "as himac, a subgoal lasts 20 steps, reached or not (ablation)", "llm", "llm",
                learner="himac",
                settings={"subgoals": {"on_reached": False, "on_timeout": False, "every": 20}}))  # fmt: skip
register(Method("random-blueprint", "as himac, executors learn under any blueprint, not the best (ablation)", "llm",
                "llm", learner="himac", settings={"learner": {"blueprint": "random"}}))  # fmt: skip
