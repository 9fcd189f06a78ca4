"""A model that is asked as little as possible: a student first, then what is known, then the model.

Each decision takes the cheapest way that will do. A distilled student decides for whom it is sure; for the others the
plan cache is looked up, with worlds that mirror, turn or renumber one another folded together; only what is left goes
to the model, while the budget lasts. What the model says, now or in the cache, is what the student learns from.
Which of the three are there is a setting; how they are put together is our choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echelon.llm.budget import Budget
from echelon.planners.base import Asking, ModelPlanner
from echelon.planners.distilled import Student
from echelon.planners.plan_cache import CachedPlans, Unanswered
from echelon.subgoals import EXCLUSIVE, Plan, PlanRequest

__all__ = ["FrugalPlanner"]


@dataclass
class _Memo:
    """A round under way.

    Attributes:
        chosen: the student's plan; wanted: what it left open, for the agents `wanted.need`.
        audits: bool `(n, A)`, agents that the model is asked about although the student has decided.
        left: what the cache didn't know; inner: what the model is asked.
    """

    chosen: Plan
    wanted: PlanRequest
    audits: NDArray[np.bool_]
    left: Unanswered | None
    inner: Asking


class FrugalPlanner(ModelPlanner):
    """Plans like `planner`, for less.

    Attributes:
        planner: who asks the model; student, cache, budget: what spares it, each may be None.
    """

    def __init__(
        self,
        planner: ModelPlanner,
        *,
        student: Student | None = None,
        cache: CachedPlans | None = None,
        budget: Budget | None = None,
    ) -> None:
        """Put them together; the model of `planner` must be one that keeps to `budget` itself."""
        self.planner, self.student, self.cache, self.budget = planner, student, cache, budget
        self.name = planner.name

    @property
    def model(self) -> Any:
        """Who is asked."""
        return self.planner.model

    @property
    def between(self) -> Callable[[int, int], None]:
        """The planner's own."""
        return self.planner.between

    @between.setter
    def between(self, call: Callable[[int, int], None]) -> None:
        self.planner.between = call

    def begin(self, request: PlanRequest, *, split: bool = False, busy: bool = False) -> Asking:
        """Let the student and the cache decide what they can, and prepare what the model is asked."""
        # What is refused later, and taken meanwhile, must not change what was asked.
        request = replace(request, taken=request.taken.copy(), rejected=request.rejected.copy(),
                          refused=request.refused.copy())  # fmt: skip
        chosen, wanted, audits = self._by_student(request, busy)
        left = None if self.cache is None else self.cache.begin(wanted)
        inner = self.planner.begin(wanted if left is None else left.request, split=split, busy=busy)
        memo = _Memo(chosen, wanted, audits, left, inner)
        if not inner.open.any() and (left is None or not split):
            plan = self._whole(memo, inner.plan)
            return Asking(request, plan, np.zeros_like(request.need), inner.work, memo)
        plan, still = Plan(chosen.kind.copy(), chosen.cell.copy(), chosen.task.copy()), wanted.need & ~audits
        if left is None:
            _put(plan, inner.plan, still & ~inner.open)
            still = still & inner.open
        # With a cache all wait, known or not: what it holds must not decide when a plan is used.
        return Asking(request, plan, still, inner.work, memo, asks=True)

    def end(self, asking: Asking, answers: Any) -> Plan:
        """The model's plan for those whom it was asked about, the student's or the cache's for the others."""
        if not asking.asks:
            return asking.plan
        return self._whole(asking.memo, self.planner.end(asking.memo.inner, answers))

    def _by_student(self, request: PlanRequest, busy: bool) -> tuple[Plan, PlanRequest, NDArray[np.bool_]]:
        """The student's plan for whom it is sure; what is left to ask, audits too; and who is audited."""
        audits = np.zeros_like(request.need)
        if self.student is None:
            return Plan.empty(request), request, audits
        # Why something was refused is told to the model alone.
        fresh = request.need & (request.rejected == 0)
        probability, confidence = self.student.decide(request, fresh)
        sure, ask = self.student.gate(request, fresh, confidence, busy=busy)
        # Who is neither sure nor to be asked has learnt nothing yet: without probabilities it gets what is nearest.
        probability[fresh & ~sure] = 0
        choice = self.student.choose(request, fresh & (sure | ~ask), probability, confidence)
        plan = Plan.chosen(request, choice)
        audits = sure & ask
        i, a = np.nonzero((choice >= 0) & ~audits)
        tasks = np.where(EXCLUSIVE[plan.kind[i, a]], plan.task[i, a], -1)
        taken = request.taken.copy()
        taken[i[tasks >= 0], tasks[tasks >= 0]] = True
        return plan, replace(request, need=ask | (request.need & ~fresh), taken=taken), audits

    def _whole(self, memo: _Memo, answer: Plan) -> Plan:
        """The plan for everybody; what is new is learnt and kept."""
        told = answer if memo.left is None or self.cache is None else self.cache.end(memo.left, answer)
        plan = Plan(memo.chosen.kind.copy(), memo.chosen.cell.copy(), memo.chosen.task.copy())
        _put(plan, told, memo.wanted.need & ~memo.audits)
        plan.probability = told.probability
        plan.told = answer.told if memo.left is None or answer.told is None else _of_rows(answer.told, memo.left)
        if self.student is not None and told.probability is not None:
            taught = memo.wanted.need & (memo.wanted.rejected == 0) & told.probability.any(-1)
            if taught.any():
                self.student.learn(memo.wanted, taught, told.probability)
        plan.notes = lambda i: self._note(memo, told, i)
        return plan

    def _note(self, memo: _Memo, told: Plan, i: int) -> dict[str, Any]:
        note = dict(told.notes(i)) if told.notes is not None and memo.wanted.need[i].any() else {}
        agents = dict(note.pop("agents", {}))
        for a in np.flatnonzero(memo.inner.request.need[i] if memo.left is None else memo.wanted.need[i]).tolist():
            if memo.audits[i, a]:
                agents[a] = {"audit": agents.get(a, {})}
        return {"model": self.model.name, **note, "agents": agents}

    # -- what it counted, and its state --------------------------------------------------------

    def counters(self) -> dict[str, float]:
        """The planner's, and the student's as `student_…`."""
        # Behind a cache it counts what the cache lacked, which another run may have put there.
        told = dict(self.planner.counters()) if self.cache is None else {}
        if self.student is not None:
            told |= {f"student_{k}": v for k, v in self.student.report().items()}
        return told

    def costs(self) -> dict[str, float]:
        """The cache's counts since this process began as `cache_…`, the budget's as `budget_…`."""
        told: dict[str, float] = {}
        if self.cache is not None:
            told |= self.planner.counters()
            told |= {f"cache_{k}": v for k, v in self.cache.cache.report().items() if isinstance(v, int | float)}
            told["cache_same"] = self.cache.same
        if self.budget is not None:
            told |= {f"budget_{k}": v for k, v in self.budget.state_dict().items()}
        return told

    def flush(self) -> None:
        """Write the cache's newest plans."""
        if self.cache is not None:
            self.cache.cache.flush()

    def notes(self) -> list[str]:
        """What a person must know: a budget that is spent, a cache that can't be used."""
        spent = None if self.budget is None else self.budget.spent()
        told = [] if spent is None else [f"the model's budget is spent ({spent}): the fallback plans from here on"]
        if self.cache is not None and self.cache.cache.trouble is not None:
            told.append(self.cache.cache.trouble)
        return told

    def state_dict(self) -> dict[str, Any]:
        """The planner's, the student's and the budget's; a cache holds nothing that can't be asked again."""
        state: dict[str, Any] = {"planner": self.planner.state_dict()}
        if self.student is not None:
            state["student"] = self.student.state_dict()
        if self.budget is not None:
            state["budget"] = self.budget.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.planner.load_state_dict(state["planner"])
        if self.student is not None:
            self.student.load_state_dict(state["student"])
        if self.budget is not None:
            self.budget.load_state_dict(state["budget"])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The planner's and the student's."""
        arrays = {f"planner.{k}": v for k, v in self.planner.arrays().items()}
        if self.student is not None:
            arrays |= {f"student.{k}": v for k, v in self.student.arrays().items()}
        return arrays

    def load_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Put back what `arrays` gave."""
        for name, part in (("planner", self.planner), ("student", self.student)):
            own = {k.removeprefix(f"{name}."): v for k, v in arrays.items() if k.startswith(f"{name}.")}
            if own and part is not None:
                part.load_arrays(own)


def _of_rows(told: NDArray[np.bool_], left: Unanswered) -> NDArray[np.bool_]:
    """Which of all rows were asked about, where `told` is about those that the cache didn't know."""
    if not len(told):
        return np.zeros(len(left.answer), bool)
    return np.asarray((left.answer >= 0) & told[np.maximum(left.answer, 0)])


def _put(into: Plan, plan: Plan, which: NDArray[np.bool_]) -> None:
    into.kind[which], into.cell[which], into.task[which] = plan.kind[which], plan.cell[which], plan.task[which]
