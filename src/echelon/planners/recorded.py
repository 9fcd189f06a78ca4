"""Plans read back from a record (`plans.jsonl`): a run is repeated without the model that planned it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echelon.envs.base import SubgoalKind
from echelon.errors import EchelonError
from echelon.subgoals import Plan, PlanRequest

__all__ = ["RecordedPlanner"]


class RecordedPlanner:
    """Gives each world the plans that the record holds for it, in their order.

    A run with the same config, seed and worlds as the recorded one comes out the same. Where the record has no plan
    that fits (another run, a longer one), that counts as a proposal of bad form, and the fallback decides.

    Attributes:
        worlds: int64, the worlds that the record has plans for.
        missed: agents for whom the record had no fitting plan.
    """

    needs_distance = False
    cost = "cheap"

    def __init__(self, path: Path) -> None:
        """Read a record.

        Raises:
            EchelonError: no such file, or a line that is no plan; the line says which.
        """
        self.name = f"record:{path}"
        self._plans: dict[int, list[dict[int, tuple[int, tuple[int, int], int]]]] = {}
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise EchelonError(f"record {path}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
        for number, line in enumerate(lines, 1):
            try:
                trace = json.loads(line)
                plan = {int(a["agent"]): self._subgoal(a) for a in trace["agents"]}
                self._plans.setdefault(int(trace["world"]), []).append(plan)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise EchelonError(f"record {path}, line {number}: it is no plan of plans.jsonl") from None
        if not self._plans:
            raise EchelonError(f"record {path} holds no plan")
        self.worlds: NDArray[np.int64] = np.array(sorted(self._plans), np.int64)
        self.missed = 0
        self._next = dict.fromkeys(self._plans, 0)

    @staticmethod
    def _subgoal(entry: Mapping[str, Any]) -> tuple[int, tuple[int, int], int]:
        row, col = entry["target"]
        task = entry["task"]
        return int(SubgoalKind[entry["kind"].upper()]), (int(row), int(col)), -1 if task is None else int(task)

    def plan(self, request: PlanRequest) -> Plan:
        """The next recorded plan of each world; what was refused once is not offered again."""
        plan = Plan.empty(request)
        again = np.asarray((request.rejected > 0).any(axis=1))
        for i, world in enumerate(request.rows.tolist()):
            recorded = {} if again[i] else self._take(world)
            for a in np.flatnonzero(request.need[i]).tolist():
                if a not in recorded:
                    self.missed += not again[i]
                    plan.kind[i, a] = -1
                    continue
                kind, cell, task = recorded[a]
                plan.kind[i, a], plan.cell[i, a], plan.task[i, a] = kind, request.cell_index(*cell), task
        return plan

    def _take(self, world: int) -> dict[int, tuple[int, tuple[int, int], int]]:
        at = self._next.get(world, 0)
        plans = self._plans.get(world, [])
        if at >= len(plans):
            return {}
        self._next[world] = at + 1
        return plans[at]

    def state_dict(self) -> dict[str, Any]:
        """How far it has read in each world."""
        return {"next": {str(w): n for w, n in self._next.items()}, "missed": self.missed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._next |= {int(w): int(n) for w, n in state["next"].items()}
        self.missed = int(state["missed"])
