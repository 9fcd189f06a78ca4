"""What the evaluations of branches say of them: the gate's numbers, its verdicts, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from echelon.also.configs import AlsoConfig
from echelon.also.segments import Grown
from echelon.shaping import ShapingConfig, Summary, Verdict, gate, hopeless, reference_leads, score_lead, summarise
from echelon.shaping.gate import SHOWN

__all__ = ["Judge", "Lead", "known_numbers", "numbers"]

Lead = tuple[float, float, float]
"""By how much a candidate's score leads the control's, and the ends of the bootstrap interval over seeds."""


class Judge:
    """Judges by one run's settings; a branch is given as its seeds, each as what it has grown to."""

    def __init__(self, config: AlsoConfig, best_return: float) -> None:
        """Take the rules.

        Args:
            config: the run's; says how strict the gate is.
            best_return: the most task reward that an episode can bring.
        """
        self._settings, self._best_return = config.also, best_return
        self._evaluations = config.evaluations

    def newest(self, mainline: Sequence[Mapping[str, Any]]) -> Summary:
        """The gate's numbers of a mainline's newest evaluations, as many as a branch has."""
        returns = [point["task_return"] for point in mainline[-self._evaluations :]]
        return summarise(returns, best_return=self._best_return, rising=self._settings.rising)

    def summary(self, some: Sequence[Grown], after: int, config: ShapingConfig | None = None) -> Summary:
        """The gate's numbers of a branch, its seeds taken together.

        Args:
            some: the branch.
            after: the step at which the control began.
            config: its shaping.
        """
        if problem := next((grown.problem for grown in some if grown.problem is not None), None):
            return Summary(math.nan, math.nan, math.nan, math.nan, math.nan, problem, config)
        rising = self._settings.rising
        return summarise(_curves(some, after), best_return=self._best_return, config=config, rising=rising)

    def leads(self, control: Sequence[Grown], candidates: Mapping[str, Sequence[Grown]], after: int) -> dict[str, Lead]:
        """`score_lead` of each candidate that can be judged; of one seed there is none."""
        if self._settings.seeds == 1 or self.summary(control, after).fault:
            return {}
        rules: dict[str, Any] = {"best_return": self._best_return, "rising": self._settings.rising}
        begun = _curves(control, after)
        fit = {name: some for name, some in candidates.items() if not self.summary(some, after).fault}
        return {name: score_lead(begun, _curves(some, after), **rules) for name, some in fit.items()}

    def verdict(
        self, control: Summary, candidates: Mapping[str, Summary], reference: Summary | None,
        leads: Mapping[str, Lead], *, first_replacement: bool,
    ) -> Verdict:  # fmt: skip
        """What the gate says; with several seeds a candidate must lead with the lower end of its interval, too."""
        lows = {name: low for name, (_, low, _) in leads.items()} or None
        return gate(control, candidates, reference, lead=lows, **self._strictness(first_replacement))

    def hopeless(self, mainline: Sequence[Mapping[str, Any]], *, first_replacement: bool) -> bool:
        """Whether the gate would refuse even a perfect branch of a mainline that is as good as this one."""
        return hopeless(self.newest(mainline), **self._strictness(first_replacement))

    def underperforms(self, mainline: Sequence[Mapping[str, Any]], reference: Grown | None) -> bool:
        """Whether the reference, as of the last checkpoint, clearly leads the mainline's newest evaluations."""
        if reference is None:
            return False
        theirs = [point["task_return"] for point in reference.curve]
        return reference_leads(self.newest(mainline), summarise(theirs, best_return=self._best_return))

    def _strictness(self, first_replacement: bool) -> dict[str, bool]:
        s = self._settings
        return {"low_return": s.low_return, "soft": s.soft, "first_replacement": first_replacement}


def numbers(summary: Summary) -> dict[str, float | None]:
    """The gate's numbers of a branch for an account; None where one can't be had."""
    found = {name: float(getattr(summary, name)) for name in SHOWN}
    return {name: round(value, 6) if math.isfinite(value) else None for name, value in found.items()}


def known_numbers(summary: Summary) -> dict[str, float]:
    """Those of them that can be had."""
    return {name: value for name, value in numbers(summary).items() if value is not None}


def _curves(some: Sequence[Grown], after: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Task returns of a branch's evaluations after so many steps, float64 `(seeds, n)`.

    One that began from scratch is compared over the steps that the control did, too.
    """
    curves = [[point["task_return"] for point in grown.curve if point["step"] > after] for grown in some]
    length = min(map(len, curves))
    return np.array([curve[len(curve) - length :] for curve in curves])
