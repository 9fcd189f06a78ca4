"""What a planner is, and the register of those that ship.

A planner sees only a `PlanRequest` and answers with a `Plan`. Adding one is one file with a `plan` function or
class, and one line in `planners/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from echelon.subgoals import Plan, PlanRequest

__all__ = ["Planner", "StatelessPlanner"]


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


class StatelessPlanner:
    """Base of planners that remember nothing: each plan is a function of its request."""

    needs_distance = False
    cost = "cheap"

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to put back."""
