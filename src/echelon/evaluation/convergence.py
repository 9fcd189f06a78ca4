"""How fast a run learns: convergence time with censoring, and the area under the evaluation curve.

Papers speak of "steps to stable performance" without saying what that is; the definition here is our choice:

    A run converges at the first evaluation from which on its smoothed success rate stays within a tolerance of its
    final level, provided that the final level is above a floor and that it has stayed for some evaluations already.

A run that doesn't is right-censored at its horizon: it would have converged later or never. It is never dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from echelon.evaluation.statistics import Interval

__all__ = [
    "Convergence",
    "area_under_curve",
    "convergence_time",
    "kaplan_meier",
    "log_rank",
    "restricted_mean",
    "smoothing_window",
]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Convergence:
    """When a run converged.

    Attributes:
        step: environment steps of the evaluation at which the run had converged, or the horizon where it didn't.
        converged: False where `step` is a censoring time.
        level: the final success rate, mean of the last evaluations.
        after: steps of the evaluation before, at which it had not: it converged somewhere between the two. 0 where it
            had converged at the first one; the horizon where it didn't converge.
    """

    step: float
    converged: bool
    level: float
    after: float

    @property
    def time(self) -> float:
        """The middle between the two evaluations; or the horizon, where the run didn't converge."""
        return (self.after + self.step) / 2


def smoothing_window(evaluations: int) -> int:
    """How many evaluations a moving average takes by default: about an eighth of the curve, odd, at most 5."""
    return 1 if evaluations < 8 else 3 if evaluations < 32 else 5


def convergence_time(
    steps: ArrayLike,
    tsr: ArrayLike,
    *,
    episodes: int | None = None,
    window: int | None = None,
    last: int = 3,
    tolerance: float = 0.05,
    floor: float = 0.5,
) -> Convergence:
    """The convergence time of one evaluation curve, as this module defines it.

    Args:
        steps: environment steps of the evaluations, `(n,)`, ascending; the last is the horizon.
        tsr: task success rate at each, `(n,)`.
        episodes: of one evaluation. If given, the tolerance is at least two standard errors of the difference
            between the moving average and the final level: else a method whose level is near 1, where success rates
            hardly scatter, would seem to settle sooner than one at 0.7 that learns just as fast.
        window: evaluations in the centred moving average, odd; at the ends it holds fewer. Default:
            `smoothing_window`.
        last: how many evaluations make the final level, and must at least have been within the tolerance.
        tolerance: how far from its final level the smoothed rate may be.
        floor: a final level at or below it is no convergence.

    Raises:
        ValueError: no evaluations, steps that don't ascend, shapes that differ, or an even window.
    """
    x, y = _curve(steps, tsr)
    window = smoothing_window(len(x)) if window is None else window
    if window < 1 or window % 2 == 0 or last < 1:
        raise ValueError(f"window {window} must be odd and positive, last {last} positive")
    level = float(y[-last:].mean())
    if episodes is not None:
        tolerance = max(tolerance, 2 * float(np.sqrt(level * (1 - level) / episodes * (1 / window + 1 / last))))
    # The smallest margin keeps rounding from deciding.
    outside = np.flatnonzero(np.abs(_moving_average(y, window) - level) > tolerance + 1e-12)
    first = int(outside[-1]) + 1 if outside.size else 0
    if level <= floor or first > max(0, len(x) - last):
        return Convergence(float(x[-1]), False, level, float(x[-1]))
    return Convergence(float(x[first]), True, level, float(x[first - 1]) if first else 0.0)


def area_under_curve(steps: ArrayLike, tsr: ArrayLike) -> float:
    """Sample efficiency: the area under an evaluation curve (trapezoids) over its length; in the unit of `tsr`.

    Raises:
        ValueError: fewer than two evaluations, steps that don't ascend, or shapes that differ.
    """
    x, y = _curve(steps, tsr)
    if len(x) < 2:
        raise ValueError("an area needs two evaluations at least")
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def kaplan_meier(times: ArrayLike, converged: ArrayLike) -> tuple[Floats, Floats]:
    """Kaplan and Meier's (1958) estimate of the share of runs that haven't converged yet.

    Args:
        times: steps to convergence, or to censoring, `(runs,)`.
        converged: bool `(runs,)`, False where censored.

    Returns:
        Times `(k,)`, ascending, and the share still learning just after each, `(k,)`.
    """
    t, event = _survival(times, converged)
    function = stats.ecdf(stats.CensoredData(uncensored=t[event], right=t[~event])).sf
    return np.asarray(function.quantiles, np.float64), np.asarray(function.probabilities, np.float64)


def restricted_mean(
    times: ArrayLike,
    converged: ArrayLike,
    horizon: float,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The restricted mean time to convergence: the area under Kaplan and Meier's curve up to `horizon`.

    Where runs are censored at the horizon alone, it is the mean with censored runs counted as the horizon; the
    true mean is larger. The interval is a percentile bootstrap over runs.

    Raises:
        ValueError: no runs, negative times, or shapes that differ.
    """
    t, event = _survival(times, converged)
    # In an order of their own, so that the order of runs doesn't matter; at equal times events come first.
    order = np.lexsort((~event, t))
    t, event = t[order], event[order]
    draws = np.sort(np.random.default_rng(seed).integers(0, len(t), (resamples, len(t))), axis=-1)
    value = float(_area(t, event, horizon))
    low, high = np.quantile(_area(t[draws], event[draws], horizon), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, min(float(low), value), max(float(high), value))


def log_rank(
    times_a: ArrayLike, converged_a: ArrayLike, times_b: ArrayLike, converged_b: ArrayLike
) -> tuple[float, float] | None:
    """The log-rank test of equal convergence times: statistic and two-sided p; None where nothing can be compared.

    The statistic is signed: negative where runs of a converge later than those of b (SciPy's convention).
    Nothing can be compared where no run converged, or all runs at the same time. The p-value is that of the normal
    approximation: with fewer than about ten runs a group it is somewhat too small.
    """
    (a, event_a), (b, event_b) = _survival(times_a, converged_a), _survival(times_b, converged_b)
    if not (event_a.any() or event_b.any()):
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        result = stats.logrank(
            stats.CensoredData(uncensored=a[event_a], right=a[~event_a]),
            stats.CensoredData(uncensored=b[event_b], right=b[~event_b]),
        )
    statistic, p = float(result.statistic), float(result.pvalue)
    return (statistic, p) if np.isfinite(statistic) and np.isfinite(p) else None


def _moving_average(y: Floats, window: int) -> Floats:
    kernel = np.ones(min(window, 2 * len(y) - 1))
    return (
        np.convolve(y, kernel, "full")[len(kernel) // 2 :][: len(y)]
        / (np.convolve(np.ones(len(y)), kernel, "full")[len(kernel) // 2 :][: len(y)])
    )


def _area(times: Floats, converged: NDArray[np.bool_], horizon: float) -> Floats:
    """Area under Kaplan and Meier's curve of runs `(..., runs)` that are sorted by time, events first: `(...)`."""
    n = times.shape[-1]
    at_risk = n - np.arange(n)
    survival = np.cumprod(1 - converged / at_risk, axis=-1)
    capped = np.minimum(times, horizon)
    widths = np.diff(capped, axis=-1, prepend=0.0, append=horizon)
    heights = np.concatenate([np.ones_like(survival[..., :1]), survival], axis=-1)
    return np.asarray((widths * heights).sum(axis=-1))


def _curve(steps: ArrayLike, tsr: ArrayLike) -> tuple[Floats, Floats]:
    x, y = np.asarray(steps, np.float64), np.asarray(tsr, np.float64)
    if x.ndim != 1 or x.shape != y.shape or not x.size or (np.diff(x) <= 0).any():
        raise ValueError("a curve needs ascending steps and one success rate for each")
    return x, y


def _survival(times: ArrayLike, converged: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    t, event = np.asarray(times, np.float64), np.asarray(converged, bool)
    if t.ndim != 1 or t.shape != event.shape or not t.size or (t < 0).any():
        raise ValueError("each run needs a time, none negative, and whether it converged")
    return t, event
