"""What a planner is, and the register of those that ship.

A planner sees only a `PlanRequest` and answers with a `Plan`. Adding one is one file with a `plan` function or
class, and one line in `planners/__init__.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from echelon.subgoals import Plan, PlanRequest, Sight

__all__ = ["Asking", "ModelPlanner", "Planner", "StatelessPlanner"]


class Planner(Protocol):
    """Scenes in, subgoals out.

    Attributes:
        name: how it is called on the command line and in records.
        needs_distance: whether `PlanRequest.distance` must be filled in.
        cost: "cheap" if it may plan every world at every step; "model" if each plan costs model time.
    """

    name: str
    needs_distance: bool
    cost: str

    def plan(self, request: PlanRequest) -> Plan:
        """Subgoals for the agents in `request.need`. Called again with `rejected` set where one was refused."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What it remembers between plans, JSON-able."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        ...

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What it remembers in arrays, by name."""
        ...

    def load_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Put back what `arrays` gave, behind `load_state_dict`."""
        ...


class StatelessPlanner:
    """Base of planners that remember nothing: each plan is a function of its request."""

    needs_distance = False
    cost = "cheap"

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to put back."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Nothing."""
        return {}

    def load_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Nothing to put back."""


@dataclass
class Asking:
    """A plan under way: what is settled already, and what the model has yet to say.

    Attributes:
        request: what was asked.
        plan: subgoals of the agents that need no answer from the model.
        open: bool `(n, A)`, the agents that wait for it.
        asks: whether the model is asked at all; it may be of what nobody waits for.
        work: asks the model. It may run in another thread: it touches nothing of the planner but its model, and what
            goes wrong there is part of the answers.
        memo: the planner's own.
    """

    request: PlanRequest
    plan: Plan
    open: NDArray[np.bool_]
    work: Callable[[], Any]
    memo: Any
    asks: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        self.asks |= bool(self.open.any())


class ModelPlanner(ABC):
    """Base of planners that ask a model: a plan in three parts, so that the middle one can be done elsewhere.

    Attributes:
        model: who is asked.
        sees: what of a scene its prompts tell, as `subgoals.Sight` has it; None if its plans depend on more than that.
        depends_on: what else decides its plans: templates, settings.
        between: called as (questions answered, questions) before each batch of a plan; what it raises gets through,
            so that a long plan can be stopped.
    """

    name: str
    model: Any
    needs_distance = True
    cost = "model"
    sees: frozenset[Sight] | None = None
    depends_on: tuple[str, ...] = ()
    between: Callable[[int, int], None] = staticmethod(lambda answered, questions: None)

    @abstractmethod
    def begin(self, request: PlanRequest, *, split: bool = False, busy: bool = False) -> Asking:
        """Decide what needs no model, and prepare what the model is asked.

        Args:
            request: what is asked.
            split: whether agents that need no answer are decided now, without waiting for those of their team that
                do. Unless it is set, a team decides together.
            busy: the model won't be asked now, whatever is prepared: who can't be decided without it stays open.
        """

    @abstractmethod
    def end(self, asking: Asking, answers: Any) -> Plan:
        """The whole plan, made of what `asking.work` gave; of interest are the agents `asking.open`."""

    def plan(self, request: PlanRequest) -> Plan:
        """All at once."""
        asking = self.begin(request)
        return self.end(asking, asking.work())

    def counters(self) -> dict[str, float]:
        """What it counted since the run began, for logs: `questions` and whatever else it knows."""
        return {}

    def costs(self) -> dict[str, float]:
        """What else it counted, which may differ where a run is repeated or resumed."""
        return {}

    def flush(self) -> None:  # noqa: B027 - most keep nothing
        """Write what it keeps on the disk."""

    def notes(self) -> list[str]:
        """What a person must know, a line each: a budget that is spent, a cache that can't be used."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """What it remembers between plans, JSON-able."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most have nothing to put back
        """Put back what `state_dict` gave."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What it remembers in arrays, by name."""
        return {}

    def load_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> None:  # noqa: B027
        """Put back what `arrays` gave, behind `load_state_dict`."""
