"""Plans read back from a record (`plans.jsonl`): a run is repeated without the model that planned it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echelon.errors import EchelonError
from echelon.planners.base import StatelessPlanner
from echelon.subgoals import Plan, PlanRequest

__all__ = ["RecordedPlanner"]

_COLUMNS = 5  # world, agent, kind, cell, task


@dataclass(frozen=True)
class _Event:
    """What was put into flight at one step: rows (world, agent, kind, cell, task), and what was counted."""

    subgoals: NDArray[np.int32]
    counts: dict[str, int]


class RecordedPlanner(StatelessPlanner):
    """Gives each agent the subgoal that it got at the same step of the recorded run, also those that came late.

    A run with the same config, seed and worlds as the recorded one comes out the same. Where the record has no
    subgoal that fits (another run, a longer one), that counts as a proposal of bad form, and the fallback decides.

    Attributes:
        worlds: int64, the worlds that the record has plans for.
        missed: agents for whom the record had no fitting plan.
    """

    def __init__(self, path: Path) -> None:
        """Read a record.

        Args:
            path: a `plans.jsonl`, or the folder of its run.

        Raises:
            EchelonError: no such file, or a line that is no plan; the line says which.
        """
        self.name = f"record:{path}"
        self._now: dict[int, _Event] = {}
        # By step, and whether they were used behind that step's planning, as at the end of a rollout.
        self._late: dict[tuple[int, bool], list[_Event]] = {}
        file = path / "plans.jsonl" if path.is_dir() else path
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise EchelonError(f"record {file}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
        for number, line in enumerate(lines, 1):
            try:
                told = json.loads(line)
                if "subgoals" in told:  # the other lines are for people
                    self._read(told)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise EchelonError(f"record {file}, line {number}: it is no plan of plans.jsonl") from None
        events = [*self._now.values(), *(event for some in self._late.values() for event in some)]
        if not events:
            raise EchelonError(f"record {file} holds no plan that can be repeated: it must be a training's plans.jsonl")
        self.worlds: NDArray[np.int64] = np.unique(np.concatenate([e.subgoals[:, 0] for e in events])).astype(np.int64)
        self.missed = 0

    def _read(self, told: Mapping[str, Any]) -> None:
        packed = np.frombuffer(base64.b64decode(told["subgoals"], validate=True), "<i4").reshape(-1, _COLUMNS)
        if packed[:, :2].min(initial=0) < 0:
            raise ValueError
        event = _Event(packed, {str(k): int(v) for k, v in told.get("counts", {}).items()})
        tick = int(told["tick"])
        if told.get("late"):
            self._late.setdefault((tick, tick in self._now), []).append(event)
        elif (first := self._now.setdefault(tick, event)) is not event:
            # Worlds were planned for in two rounds.
            counts = {k: first.counts.get(k, 0) + event.counts.get(k, 0) for k in first.counts | event.counts}
            self._now[tick] = _Event(np.concatenate([first.subgoals, event.subgoals]), counts)

    def plan(self, request: PlanRequest) -> Plan:
        """What was planned at this step; what was refused once is not offered again."""
        plan = Plan.empty(request)
        plan.kind[request.need] = -1
        again = (request.rejected > 0).any()
        event = None if again else self._now.get(request.tick)
        if event is not None:
            self._fill(plan, event, request.rows)
            plan.counts = event.counts
        if not again:
            self.missed += int((request.need & (plan.kind < 0)).sum())
        return plan

    def late(
        self, tick: int, agents: int, *, after: bool = False
    ) -> list[tuple[NDArray[np.int64], Plan, NDArray[np.bool_]]]:
        """The plans that were used late at this step: their worlds' rows, the plan, and for whom it is.

        Args:
            tick: the step.
            agents: in each world.
            after: those used behind the step's own planning instead of before it.
        """
        found = []
        for event in self._late.get((tick, after), ()):
            rows = np.unique(event.subgoals[:, 0]).astype(np.int64)
            shape = (len(rows), agents)
            plan = Plan(np.full(shape, -1, np.int8), np.zeros(shape, np.int32), np.full(shape, -1, np.int16))
            which = self._fill(plan, event, rows)
            # Each of them counts itself as used when it is put in its place.
            plan.counts = event.counts | {"late": event.counts.get("late", 0) - int(which.sum())}
            found.append((rows, plan, which))
        return found

    @staticmethod
    def _fill(plan: Plan, event: _Event, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Write an event's subgoals into a plan of the worlds `rows` (ascending); whose they are, bool `(n, A)`."""
        world, agent, kind, cell, task = event.subgoals.T
        at = np.minimum(np.searchsorted(rows, world), len(rows) - 1) if len(rows) else np.zeros(0, np.int64)
        fits = (rows[at] == world) & (agent < plan.kind.shape[1]) if len(rows) else np.zeros(len(world), bool)
        i, a = at[fits], agent[fits]
        # Numbers of another world's size are refused by the safety check, and must not wrap around before it.
        plan.kind[i, a] = np.where((kind[fits] >= 0) & (kind[fits] < 128), kind[fits], -1)
        plan.cell[i, a] = cell[fits]
        plan.task[i, a] = np.where(np.abs(task[fits]) < 1 << 15, task[fits], -2)
        which = np.zeros(plan.kind.shape, bool)
        which[i, a] = True
        return which

    def state_dict(self) -> dict[str, Any]:
        """What it missed."""
        return {"missed": self.missed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.missed = int(state["missed"])
