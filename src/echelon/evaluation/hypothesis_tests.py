"""Do methods differ by more than chance explains? One-way tests, pairs after them, effect sizes, families of tests.

Groups are lists of one score a run. Where a test can't be made (no spread, too few runs) there is no number but a
plain reason. SciPy's own functions are used where they give all that a reader needs; Welch's test is here for its
degrees of freedom, the pairs for groups without spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from echelon.evaluation.statistics import Interval

__all__ = [
    "OneWay",
    "Pair",
    "anova",
    "brown_forsythe",
    "eta_squared",
    "hedges_g",
    "holm",
    "omega_squared",
    "one_way",
    "pairwise",
    "shapiro_wilk",
    "welch_anova",
]

Floats = NDArray[np.float64]
Groups = Sequence[ArrayLike]


@dataclass(frozen=True)
class OneWay:
    """A test of equal means, or why there is none.

    Attributes:
        test: "anova", "welch" or None.
        reason: one sentence: why this test, or why none.
        statistic, df, p: F, its degrees of freedom (numerator, denominator), the p-value; None without a test.
        without_spread: indices of groups whose values are all equal and that Welch's test had to leave out.
        normality: Shapiro-Wilk's p of each group, None where it can't be computed.
        equal_variances: p of Brown and Forsythe's form of Levene's test, None where it can't be computed.
    """

    test: Literal["anova", "welch"] | None
    reason: str
    statistic: float | None = None
    df: tuple[float, float] | None = None
    p: float | None = None
    without_spread: tuple[int, ...] = ()
    normality: tuple[float | None, ...] = ()
    equal_variances: float | None = None


@dataclass(frozen=True)
class Pair:
    """Two groups compared: indices a < b, mean of a minus mean of b.

    Attributes:
        difference: with the simultaneous interval of all pairs of the call; of zero width without spread.
        p: adjusted for all pairs of the call (studentized range); p_single: of this pair alone (Student's or
            Welch's t). Both None where neither group has spread.
        hedges_g: the standardised difference; None without spread.
    """

    a: int
    b: int
    difference: Interval
    p: float | None
    p_single: float | None
    hedges_g: float | None


def shapiro_wilk(values: ArrayLike) -> float | None:
    """The p-value of Shapiro and Wilk's test of normality; None for fewer than 3 different values.

    (Two different values show no shape: of 3 runs of which two agree, the test would always say p = 0.)
    """
    x = np.asarray(values, np.float64)
    return None if len(np.unique(x)) < 3 else float(stats.shapiro(x).pvalue)


def brown_forsythe(groups: Groups) -> float | None:
    """The p-value of Levene's test of equal variances about the medians (Brown and Forsythe 1974).

    None for fewer than two groups, a group of fewer than 3 (of two values, both are equally far from their median)
    or where no group has spread.
    """
    arrays = _arrays(groups)
    if len(arrays) < 2 or min(map(len, arrays)) < 3 or all(map(_constant, arrays)):
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        p = float(stats.levene(*arrays, center="median").pvalue)
    return p if np.isfinite(p) else None


def anova(groups: Groups) -> tuple[float, tuple[float, float], float]:
    """One-way ANOVA: F, degrees of freedom, p.

    Raises:
        ValueError: fewer than two groups, an empty one, or no spread inside the groups.
    """
    arrays = _arrays(groups)
    if len(arrays) < 2 or min(map(len, arrays)) < 1 or all(map(_constant, arrays)):
        raise ValueError("ANOVA needs two groups and spread inside them")
    result = stats.f_oneway(*arrays)
    df = (float(len(arrays) - 1), float(sum(map(len, arrays)) - len(arrays)))
    if result.statistic < 0:  # equal means, but for rounding: F is 0, and nothing could be less telling
        return 0.0, df, 1.0
    return float(result.statistic), df, float(result.pvalue)


def welch_anova(groups: Groups) -> tuple[float, tuple[float, float], float]:
    """Welch's (1951) test of equal means under unequal variances: F, degrees of freedom, p.

    Raises:
        ValueError: fewer than two groups, or a group of one value or without spread.
    """
    arrays = _arrays(groups)
    if len(arrays) < 2 or min(map(len, arrays)) < 2 or any(map(_constant, arrays)):
        raise ValueError("Welch's test needs two groups, each with spread")
    k, n, means, variances = len(arrays), _sizes(arrays), _means(arrays), _variances(arrays)
    weights = n / variances
    centre = (weights * means).sum() / weights.sum()
    between = (weights * (means - centre) ** 2).sum() / (k - 1)
    spare = ((1 - weights / weights.sum()) ** 2 / (n - 1)).sum()
    statistic = float(between / (1 + 2 * (k - 2) / (k**2 - 1) * spare))
    df = (float(k - 1), float((k**2 - 1) / (3 * spare)))
    return statistic, df, float(stats.f.sf(statistic, *df))


def one_way(groups: Groups, *, alpha: float = 0.05) -> OneWay:
    """Test whether all groups have the same mean: ANOVA where its assumptions hold, else Welch's test.

    Assumptions: no group's Shapiro-Wilk p below `alpha` over the number of groups tested, Brown-Forsythe's p at
    least `alpha`, and spread in every group. Groups without spread are left out of Welch's test, which would give
    them infinite weight; compare them with `pairwise`.

    Args:
        groups: `(runs,)` each; those of one value count in no test, so leave them out.
        alpha: the level of the checks.
    """
    arrays = _arrays(groups)
    if len(arrays) < 2 or min(map(len, arrays)) < 2:
        return OneWay(None, "A test needs at least two methods with at least two finished runs each.")
    normality = tuple(shapiro_wilk(x) for x in arrays)
    spread = brown_forsythe(arrays)
    flat = tuple(i for i, x in enumerate(arrays) if _constant(x))
    if len(flat) == len(arrays):
        same = _constant(np.concatenate(arrays))
        why = "all runs of all methods have the same score" if same else "no method's runs differ among themselves"
        return OneWay(
            None, f"No test between methods: {why}.", without_spread=flat, normality=normality, equal_variances=spread
        )
    checked = [p for p in normality if p is not None]
    reasons = []
    if flat:
        reasons.append("not every method's runs differ among themselves")
    if checked and min(checked) < alpha / len(checked):
        reasons.append(f"some scores aren't normally distributed (Shapiro-Wilk, p = {min(checked):.2g})")
    if spread is None:
        reasons.append("there are too few runs to check that all methods scatter alike")
    elif spread < alpha:
        reasons.append(f"methods scatter unequally (Levene's test, p = {spread:.2g})")
    if not reasons:
        statistic, df, p = anova(arrays)
        reason = f"Nothing speaks against normal scores and equal scatter (Levene's test, p = {spread:.2g})."
        return OneWay("anova", reason, statistic, df, p, (), normality, spread)
    why = "; ".join(reasons)
    tested = [x for i, x in enumerate(arrays) if i not in flat]
    if len(tested) < 2:
        reason = f"No test over all methods, because {why}, and only one's do."
        return OneWay(None, reason, without_spread=flat, normality=normality, equal_variances=spread)
    reason = f"Welch's test, because {why}."
    if flat:
        reason += " It is over the methods whose runs differ; the others are compared pair by pair."
    statistic, df, p = welch_anova(tested)
    return OneWay("welch", reason, statistic, df, p, flat, normality, spread)


def pairwise(groups: Groups, *, equal_variances: bool, confidence: float = 0.95) -> list[Pair]:
    """All pairs of groups: Tukey's HSD (Tukey-Kramer for unequal sizes), or Games and Howell's (1976) test.

    Args:
        groups: `(runs,)` each, at least 2 runs in each.
        equal_variances: True: Tukey's, with the scatter of all groups pooled; False: Games-Howell, with that of the
            two compared.
        confidence: of the simultaneous intervals.

    Raises:
        ValueError: fewer than two groups, or a group of fewer than two runs.
    """
    arrays = _arrays(groups)
    if len(arrays) < 2 or min(map(len, arrays)) < 2:
        raise ValueError("pairs need two groups of two runs at least")
    k, n, means, variances = len(arrays), _sizes(arrays), _means(arrays), _variances(arrays)
    # Rounding in the mean of equal values must not look like spread.
    variances[[_constant(x) for x in arrays]] = 0.0
    pooled = float(((n - 1) * variances).sum() / (n - 1).sum())
    pairs = []
    for a, b in combinations(range(k), 2):
        gap = float(means[a] - means[b])
        if equal_variances:
            error, df = pooled * (1 / n[a] + 1 / n[b]), float((n - 1).sum())
        else:
            error, df = _welch_error(variances[a] / n[a], variances[b] / n[b], n[a], n[b])
        if error == 0:
            pairs.append(Pair(a, b, Interval(gap, gap, gap), None, None, None))
            continue
        scale = float(np.sqrt(error))
        half = _range_quantile(confidence, k, df) / np.sqrt(2) * scale
        p = float(np.clip(stats.studentized_range.sf(abs(gap) / scale * np.sqrt(2), k, df), 0, 1))
        single = float(2 * stats.t.sf(abs(gap) / scale, df))
        # The one can't be below the other; numerical integration of far tails can make it so.
        p = max(p, single)
        pairs.append(Pair(a, b, Interval(gap, gap - half, gap + half), p, single, hedges_g(arrays[a], arrays[b])))
    return pairs


def eta_squared(groups: Groups) -> float | None:
    """The share of all variance that lies between groups; None where there is no variance at all."""
    between, within = _sums_of_squares(groups)
    return None if between + within == 0 else between / (between + within)


def omega_squared(groups: Groups) -> float | None:
    """Like `eta_squared`, corrected for what chance alone puts between groups; None where that can't be told.

    (SSB - (k-1) MSW) / (SST + MSW), not below 0.
    """
    arrays = _arrays(groups)
    between, within = _sums_of_squares(arrays)
    k, total = len(arrays), sum(map(len, arrays))
    if between + within == 0 or total <= k:
        return None
    noise = within / (total - k)
    return max(0.0, (between - (k - 1) * noise) / (between + within + noise))


def hedges_g(a: ArrayLike, b: ArrayLike) -> float | None:
    """The difference of means in pooled standard deviations, with Hedges' (1981) exact small-sample correction.

    None for a group of one value, or without spread.
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if min(len(x), len(y)) < 2 or (_constant(x) and _constant(y)):
        return None
    df = len(x) + len(y) - 2
    pooled = ((len(x) - 1) * x.var(ddof=1) + (len(y) - 1) * y.var(ddof=1)) / df
    correction = np.exp(special.gammaln(df / 2) - special.gammaln((df - 1) / 2)) / np.sqrt(df / 2)
    return float((x.mean() - y.mean()) / np.sqrt(pooled) * correction)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's (1979) adjusted p-values of a family of tests; None stays None and isn't counted."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = highest
    return adjusted


def _welch_error(va: float, vb: float, na: float, nb: float) -> tuple[float, float]:
    """The squared standard error of a difference of means, and Welch and Satterthwaite's degrees of freedom."""
    error = float(va + vb)
    if error == 0:
        return 0.0, 1.0
    return error, float(error**2 / (va**2 / (na - 1) + vb**2 / (nb - 1)))


@lru_cache(maxsize=4096)
def _range_quantile(confidence: float, groups: int, df: float) -> float:
    # Its inversion takes most of the time of an analysis.
    return float(stats.studentized_range.ppf(confidence, groups, df))


def _sums_of_squares(groups: Groups) -> tuple[float, float]:
    arrays = _arrays(groups)
    everything = np.concatenate(arrays)
    if _constant(everything):
        return 0.0, 0.0
    between = float((_sizes(arrays) * (_means(arrays) - everything.mean()) ** 2).sum())
    return between, float(sum(0.0 if _constant(x) else ((x - x.mean()) ** 2).sum() for x in arrays))


def _constant(x: Floats) -> bool:
    return bool((x == x[0]).all())


def _arrays(groups: Groups) -> list[Floats]:
    return [np.asarray(g, np.float64) for g in groups]


def _sizes(arrays: list[Floats]) -> Floats:
    return np.array([len(x) for x in arrays], np.float64)


def _means(arrays: list[Floats]) -> Floats:
    return np.array([x.mean() for x in arrays])


def _variances(arrays: list[Floats]) -> Floats:
    return np.array([x.var(ddof=1) for x in arrays])
