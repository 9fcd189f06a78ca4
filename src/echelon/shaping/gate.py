"""What a branch's evaluation curve says in five numbers, and whether its change may reach the main run.

The rules and numbers are those of LLM-ALSO's promotion gate. They are for returns whose best is about 1: give a curve
in shares of the best return (`summarise(curve, best_return=…)`). No model has a say here.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from echelon.errors import EchelonError, unknown_name
from echelon.shaping.base import ShapingConfig

__all__ = [
    "LAST",
    "NO_CHANGE",
    "NUMBERS",
    "SHOWN",
    "Stage",
    "Summary",
    "Verdict",
    "gate",
    "hopeless",
    "reference_leads",
    "score_lead",
    "summarise",
]

LAST = 5
"""Evaluations at a curve's end that count as its last ones."""

NO_CHANGE = "no change"
"""What the control is called, in verdicts and in accounts."""
NUMBERS = ("last_k", "auc", "final", "best", "std")
"""What a summary must hold."""
SHOWN = (*NUMBERS, "score", "spike_gap")
"""What prompts and accounts tell of one."""

Stage = Literal["exploration", "acceleration", "plateau", "regression", "uncertain"]
"""Where a curve stands: as its features say it, and as a Generator names it."""

_SLACK = 1e-9  # 0.4 + 0.04 is to be reached by 0.44, as it is on paper


@dataclass(frozen=True)
class Summary:
    """One branch's evaluation curve of the task reward.

    Attributes:
        last_k: mean of the last five evaluations.
        auc: area under the curve: the mean of all of them.
        final: the last one; best: the best one.
        std: standard deviation of the last five.
        gap: see `spike_gap`; None: `best - last_k`.
        problem: why the branch can't be judged (unfinished, its checkpoint missing, …), or None.
        config: what the branch changed to, or None; of branches with equal ones only one counts.
    """

    last_k: float
    auc: float
    final: float
    best: float
    std: float
    problem: str | None = None
    config: Hashable = None
    gap: float | None = None

    @property
    def fault(self) -> str | None:
        """`problem`, or that a number isn't finite, or None."""
        if self.problem is not None:
            return self.problem
        wrong = [name for name in NUMBERS if not math.isfinite(getattr(self, name))]
        wrong += ["spike_gap"] if self.gap is not None and not math.isfinite(self.gap) else []
        return f"{' and '.join(wrong)} not finite" if wrong else None

    @property
    def spike_gap(self) -> float:
        """How far the last evaluations are below the best one."""
        return self.best - self.last_k if self.gap is None else self.gap

    @property
    def score(self) -> float:
        """`0.35 last_k + 0.35 auc + 0.20 final + 0.10 best - 0.10 (best - last_k + std)`.

        Written out, `best` falls out of it: a single peak is worth nothing.
        """
        return 0.45 * self.last_k + 0.35 * self.auc + 0.20 * self.final - 0.10 * self.std


SummaryLike = Summary | Mapping[str, Any] | Sequence[float] | None


@dataclass(frozen=True)
class Verdict:
    """What the gate decided.

    Attributes:
        accepted: whether a candidate replaces the configuration in force.
        winner: its name; None where nothing changes.
        reasons: why, a line each: what spoke against the best candidate, or what it fulfilled.
        best: the name of the candidate with the best score, accepted or not; None where none could be judged.
        rejected: candidates that weren't judged at all, each with the reason.
        scores: the score of each that was, and of the control as "no change" where it has one.
    """

    accepted: bool
    winner: str | None
    reasons: tuple[str, ...]
    best: str | None = None
    rejected: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)


def summarise(curve: ArrayLike, *, best_return: float = 1.0, config: Hashable = None, rising: bool = False) -> Summary:
    """The summary of an evaluation curve; one without evaluations, or with one that isn't finite, has a `problem`.

    Args:
        curve: float `(n,)`, mean task return of each evaluation in order; or `(seeds, n)`, of which the mean over
            seeds is taken first.
        best_return: what the curve is divided by: the most that an episode can bring (above 0).
        config: see `Summary`.
        rising: a rise is no spike (our choice): what `std` is of has its upward trend taken away, and `spike_gap` is
            how far the evaluations from the best one on, at most the last five, lie below it. By
            the published numbers a branch that still learns fast at its end is as unsteady as one that fell from a
            peak, and is rejected for it. Scores but for the part of `std` stay the same.

    Raises:
        ValueError: the curve has another shape, or `best_return` isn't above 0.
    """
    points = np.asarray(curve, np.float64)
    if points.ndim not in (1, 2):
        raise ValueError(f"a curve is (n,) or (seeds, n), not {points.shape}")
    if not best_return > 0:
        raise ValueError(f"best_return is {best_return}: it must be above 0")
    if points.size == 0:
        return Summary(math.nan, math.nan, math.nan, math.nan, math.nan, "no evaluation was made", config)
    if not np.isfinite(points).all():
        return Summary(math.nan, math.nan, math.nan, math.nan, math.nan, "an evaluation isn't finite", config)
    points = (points.mean(0) if points.ndim == 2 else points) / best_return
    last = points[-LAST:]
    best, steady, gap = float(points.max()), last, None
    if rising:
        peak = len(points) - 1 - int(points[::-1].argmax())  # of equals the last one
        lowered = best - float(points[peak:][-LAST:].mean())
        gap = lowered if lowered != best - float(last.mean()) else None
        at = np.arange(len(last)) - (len(last) - 1) / 2
        slope = float(at @ last) / max(float(at @ at), 0.5)
        steady = last - max(slope, 0.0) * at
    return Summary(
        last_k=float(last.mean()),
        auc=float(points.mean()),
        final=float(points[-1]),
        best=best,
        std=float(steady.std()),
        config=config,
        gap=gap,
    )


def score_lead(
    control: ArrayLike,
    candidate: ArrayLike,
    *,
    best_return: float = 1.0,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    rising: bool = False,
) -> tuple[float, float, float]:
    """By how much a candidate's score leads the control's, where each has several seeds: estimate and interval.

    The percentile bootstrap over seeds (Efron and Tibshirani 1993); from few seeds it is too narrow.

    Args:
        control, candidate: float `(seeds, n)` each, evaluation curves; the numbers of seeds may differ.
        best_return: see `summarise`.
        resamples: draws; confidence: the interval's level; seed: of the draws.
        rising: see `summarise`.

    Returns:
        lead, low, high.

    Raises:
        ValueError: a curve isn't finite or has another shape.
    """
    scores = []
    generator = np.random.Generator(np.random.Philox(key=[seed, 0xA150]))
    for curves in (control, candidate):
        points = np.asarray(curves, np.float64)
        if points.ndim != 2 or not points.size or not np.isfinite(points).all():
            raise ValueError("curves must be finite and (seeds, n)")
        own = _scores(points / best_return, rising)
        # Sorted, so that the seeds' order doesn't matter. The score of a mean curve is nearly the mean of scores.
        drawn = np.sort(own)[generator.integers(0, len(own), (resamples, len(own)))].mean(1)
        scores.append((own.mean(), drawn))
    (base, base_drawn), (mean, drawn) = scores
    low, high = np.quantile(drawn - base_drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(mean - base), float(low), float(high)


def _scores(points: NDArray[np.float64], rising: bool) -> NDArray[np.float64]:
    return np.array([summarise(curve, rising=rising).score for curve in points])


def reference_leads(control: SummaryLike, reference: SummaryLike) -> bool:
    """Whether a fixed dense reward does clearly better than the run: `last_k` ahead by min(.05, max(.02, .1 |it|))."""
    ours, theirs = _read(NO_CHANGE, control), _read("reference", reference)
    if ours.fault or theirs.fault:
        return False
    clear = min(0.05, max(0.02, 0.10 * abs(ours.last_k)))
    return theirs.last_k - ours.last_k >= clear - _SLACK


def gate(
    control: SummaryLike,
    candidates: Mapping[str, SummaryLike],
    reference: SummaryLike = None,
    *,
    first_replacement: bool = False,
    low_return: bool = True,
    soft: bool = False,
    lead: Mapping[str, float] | None = None,
) -> Verdict:
    """Whether the best of some candidates replaces the configuration in force.

    The candidate with the best score is accepted if, against the control branch that changed nothing (nc):

    1. `last_k >= nc.last_k + m`, m = .03; with `low_return` m = max(.01, .10 |nc.last_k|);
    2. `auc >= nc.auc + m`, m = .02; with `low_return` m = max(.005, .10 |nc.auc|);
    3. `final >= nc.final - .02`;
    4. `spike_gap <= .10`;
    5. `std <= nc.std + .05`;
    6. where the reference leads (`reference_leads`): `last_k >= reference.last_k - .03`, and both m grow by .02;
    7. with `first_replacement` both m grow by .02 (again);
    8. its score is above `nc.score + .01`.

    Candidates that can't be judged (a `problem`, a number that isn't finite, the configuration of the control or of a
    candidate whose name sorts before) are out of it. If the control can't be judged, nothing changes. The order of the
    candidates doesn't matter; of equal scores the smaller spike gap wins, then the name that sorts first (our choice).

    Args:
        control: summary of the branch without a change: a `Summary`, a dict, or a tuple (last_k, auc, final, best,
            std). A dict may also have `spike_gap`, `valid` (bool), `problem` and `config` (and `score`, which is worked
            out anew): one of an account's `summaries` will do, and a `config` as an account holds it, too. None: it
            can't be judged.
        candidates: the same by name; "no change" is the control's.
        reference: the same of a run with a fixed dense reward, or None; one that can't be judged is left out.
        first_replacement: the configuration in force is still the first one.
        low_return: margins grow with the returns, and are small where those are.
        soft: instead of all rules: accept if `score - (nc.score + .03) > 0`; where the reference leads and the
            candidate's `last_k` is below the reference's, its score counts .005 less (our reading).
        lead: lower ends of `score_lead` by candidate; one that is named must be above 0 as well.

    Raises:
        EchelonError: a summary or a lead that can't be read, whoever's it is; a candidate without a name of its own.
    """
    nc = _read(NO_CHANGE, control)
    _check_names(candidates)
    read = {name: _read(name, candidates[name]) for name in sorted(candidates)}
    ref = _read("reference", reference)
    _check_leads(lead)
    rejected = _rejected(nc, read)
    judged = {name: summary for name, summary in read.items() if name not in rejected}
    scores = {name: summary.score for name, summary in judged.items()}
    if not nc.fault:
        scores[NO_CHANGE] = nc.score
    best = min(judged, key=lambda name: (-judged[name].score, judged[name].spike_gap, name), default=None)
    if nc.fault:
        return Verdict(False, None, (f"no change can't be judged: {nc.fault}",), best, rejected, scores)
    if best is None:
        why = tuple(f"{name}: {reason}" for name, reason in rejected.items())
        return Verdict(False, None, why or ("there is no candidate",), None, rejected, scores)
    leads = reference_leads(nc, ref)
    if soft:
        checks = _soft_rule(nc, judged[best], ref, leads)
    else:
        checks = _rules(nc, judged[best], ref, leads, first_replacement, low_return)
    if lead is not None and best in lead:
        checks.append((lead[best] > 0, f"lead: the interval begins at {lead[best]:.4f}, above 0 is needed"))
    against = tuple(f"{best}: {text}" for good, text in checks if not good)
    if against:
        return Verdict(False, None, against, best, rejected, scores)
    return Verdict(True, best, tuple(f"{best}: {text}" for _, text in checks), best, rejected, scores)


def hopeless(
    control: SummaryLike, *, first_replacement: bool = False, low_return: bool = True, soft: bool = False
) -> bool:
    """Whether the gate would refuse a perfect branch, too, beside a control like this one: margins end above 1.

    With `low_return` that is so from `last_k` 0.91 on: branches would only cost their steps.

    Args:
        control, first_replacement, low_return, soft: see `gate`.
    """
    perfect = {"perfect": Summary(1.0, 1.0, 1.0, 1.0, 0.0)}
    return not gate(control, perfect, first_replacement=first_replacement, low_return=low_return, soft=soft).accepted


def _rules(
    nc: Summary, it: Summary, ref: Summary, leads: bool, first_replacement: bool, low_return: bool
) -> list[tuple[bool, str]]:
    """Whether each rule is fulfilled, and what it says."""
    extra = 0.02 * leads + 0.02 * first_replacement
    last_k = nc.last_k + (max(0.01, 0.10 * abs(nc.last_k)) if low_return else 0.03) + extra
    auc = nc.auc + (max(0.005, 0.10 * abs(nc.auc)) if low_return else 0.02) + extra
    checks = [
        _at_least("last_k", it.last_k, last_k),
        _at_least("auc", it.auc, auc),
        _at_least("final", it.final, nc.final - 0.02),
        _at_most("spike_gap", it.spike_gap, 0.10),
        _at_most("std", it.std, nc.std + 0.05),
    ]
    if leads:
        checks.append(_at_least("reference: last_k", it.last_k, ref.last_k - 0.03))
    ahead = it.score - nc.score
    checks.append((ahead > 0.01 + _SLACK, f"score is {ahead:+.4f} from no change's, above 0.0100 is no tie"))
    return checks


def _soft_rule(nc: Summary, it: Summary, ref: Summary, leads: bool) -> list[tuple[bool, str]]:
    penalty = 0.005 if leads and it.last_k < ref.last_k else 0.0
    ahead = it.score - penalty - (nc.score + 0.03)
    return [(ahead > _SLACK, f"score is {ahead:+.4f} from no change's plus 0.03, above 0 is needed")]


def _at_least(what: str, value: float, least: float) -> tuple[bool, str]:
    return value >= least - _SLACK, f"{what} is {value:.4f}, at least {least:.4f} is needed"


def _at_most(what: str, value: float, most: float) -> tuple[bool, str]:
    return value <= most + _SLACK, f"{what} is {value:.4f}, at most {most:.4f} is allowed"


def _rejected(nc: Summary, candidates: Mapping[str, Summary]) -> dict[str, str]:
    rejected: dict[str, str] = {}
    seen: dict[Hashable, str] = {} if nc.config is None else {nc.config: NO_CHANGE}
    for name, summary in candidates.items():
        if summary.fault:
            rejected[name] = summary.fault
        elif summary.config is not None and summary.config in seen:
            rejected[name] = f"the same configuration as {seen[summary.config]}"
        elif summary.config is not None:
            seen[summary.config] = name
    return rejected


def _check_names(candidates: Mapping[str, SummaryLike]) -> None:
    if not isinstance(candidates, Mapping):
        raise EchelonError(f"candidates are summaries by name, not {_shown(candidates)}")
    for name in candidates:
        if not isinstance(name, str):
            raise EchelonError(f"a candidate is called {_shown(name)}: a name is a text")
        if name == NO_CHANGE:
            raise EchelonError(f"a candidate is called {name!r}, as the control is: give it another name")


def _check_leads(lead: Mapping[str, float] | None) -> None:
    if lead is not None and not isinstance(lead, Mapping):
        raise EchelonError(f"lead is the lower end of an interval by candidate, not {_shown(lead)}")
    for name, low in (lead or {}).items():
        _floats(f"the lead of {name}", [low])


def _read(name: str, given: SummaryLike) -> Summary:
    values: list[Any]
    problem, config, gap = None, None, None
    if given is None:
        return Summary(math.nan, math.nan, math.nan, math.nan, math.nan, "there is no summary")
    if isinstance(given, Summary):
        problem, config, gap = given.problem, given.config, given.gap
        # Of a branch with a problem no number counts.
        values = [math.nan if problem is not None else getattr(given, key) for key in NUMBERS]
    elif isinstance(given, Mapping):
        known = {*NUMBERS, "spike_gap", "score", "valid", "problem", "config"}
        for key in given:
            if key not in known:
                raise unknown_name(f"part of the summary of {name}", str(key), known)
        lacks = [key for key in NUMBERS if key not in given]
        if lacks:
            raise EchelonError(f"the summary of {name} lacks {', '.join(lacks)}")
        # An account holds null where a number couldn't be had.
        values = [math.nan if given[key] is None else given[key] for key in NUMBERS]
        problem = given.get("problem") or (None if given.get("valid", True) else "the branch isn't valid")
        config, gap = given.get("config"), given.get("spike_gap")
    else:
        try:
            values = [] if isinstance(given, str | bytes | Set) else list(given)
        except TypeError:
            values = []
        if not values:
            raise EchelonError(f"the summary of {name} is {_shown(given)}: it must hold {', '.join(NUMBERS)}")
        if len(values) != len(NUMBERS):
            raise EchelonError(f"the summary of {name} has {len(values)} numbers, not {', '.join(NUMBERS)}")
    last_k, auc, final, best, std = _floats(f"the summary of {name}", values)
    (gap,) = [None] if gap is None else _floats(f"the summary of {name}", [gap])
    problem = None if problem is None else str(problem)
    return Summary(last_k, auc, final, best, std, problem, _config(name, config), gap)


def _floats(what: str, values: Sequence[Any]) -> list[float]:
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        raise EchelonError(f"{what} holds something that is no number") from None


def _config(name: str, config: Any) -> Hashable:
    """What a branch changed to, as something that can be compared; a file's plain values become what they stand for."""
    try:
        if isinstance(config, Mapping):
            return ShapingConfig.from_json(config)
        hash(config)
    except EchelonError as error:
        raise EchelonError(f"the config of {name}: {error}") from None
    except TypeError:
        raise EchelonError(f"the config of {name} is {_shown(config)}: give a ShapingConfig") from None
    return config  # type: ignore[no-any-return]


def _shown(value: object) -> str:
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= 60 else f"{shown[:59]}…"
