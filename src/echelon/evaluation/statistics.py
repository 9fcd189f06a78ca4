"""Estimates with their intervals: pure functions.

Scores of several tasks are a list with one array a task, `(runs,)` or `(..., runs)`; tasks may have different
numbers of runs. Aggregates over tasks are those of Agarwal et al. 2021, "Deep reinforcement learning at the edge of
the statistical precipice": each is a function of such a list that leaves the leading axes alone, so that
`stratified_bootstrap` evaluates all its resamples at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

__all__ = [
    "Interval",
    "RunMean",
    "difference_of_means",
    "difference_of_rates",
    "episode_noise",
    "interval_of_mean",
    "iqm",
    "mean_interval",
    "mean_score",
    "mean_with_interval",
    "median_score",
    "optimality_gap",
    "performance_profile",
    "probability_of_improvement",
    "ratio_of_means",
    "resample",
    "run_mean",
    "stratified_bootstrap",
    "wider",
    "wilson",
]

Scores = Sequence[ArrayLike]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval: `low <= value <= high`."""

    value: float
    low: float
    high: float


def wilson(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a success rate (Wilson 1927); honest also at 0 and 1.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes of {trials} trials")
    result = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return Interval(successes / trials, float(result.low), float(result.high))


def difference_of_rates(
    successes_a: int, trials_a: int, successes_b: int, trials_b: int, *, confidence: float = 0.95
) -> Interval:
    """The difference of two independent success rates, a - b (Newcombe 1998, method 10: from Wilson's intervals).

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    a, b = wilson(successes_a, trials_a, confidence=confidence), wilson(successes_b, trials_b, confidence=confidence)
    value = a.value - b.value
    return Interval(
        value,
        value - float(np.hypot(a.value - a.low, b.high - b.value)),
        value + float(np.hypot(a.high - a.value, b.value - b.low)),
    )


def mean_interval(values: ArrayLike | Sequence[float], *, confidence: float = 0.95) -> Interval | None:
    """The mean with Student's t interval; None for fewer than two values, which have none."""
    x = np.asarray(values, np.float64)
    if x.size < 2:
        return None
    mean = float(x.mean())
    half = float(stats.t.ppf((1 + confidence) / 2, x.size - 1) * x.std(ddof=1) / np.sqrt(x.size))
    return Interval(mean, mean - half, mean + half)


def mean_with_interval(values: ArrayLike | Sequence[float]) -> dict[str, float | None] | None:
    """`value`, `low` and `high` of `mean_interval`, for a file: a single value has null ends. None without values."""
    x = np.asarray(values, np.float64)
    if x.size == 0:
        return None
    found = mean_interval(x)
    return {"value": float(x.mean()), "low": None, "high": None} if found is None else dict(vars(found))


def wider(a: Interval, b: Interval) -> Interval:
    """The value of `a`, and of the two intervals the end that is farther out on each side."""
    return Interval(a.value, min(a.low, b.low), max(a.high, b.high))


# Few runs: Student's t over runs, never narrower than the noise inside a run --------------------------------------


@dataclass(frozen=True)
class RunMean:
    """The mean over tasks of the means of their runs, with what is known of its error.

    Attributes:
        value: the mean, each task counting the same.
        variance: the square of its standard error.
        spare: Satterthwaite's sum of squared variances over their degrees of freedom; 0 where tasks have one run.
    """

    value: float
    variance: float
    spare: float


def run_mean(scores: Scores, noise: Sequence[float] | None = None) -> RunMean:
    """The mean of runs for `interval_of_mean`, `difference_of_means` and `ratio_of_means`.

    Those three judge a study's few runs by Welch's t with Satterthwaite's degrees of freedom over all tasks (Welch
    1947), the ratio on a logarithmic scale. How often the 95% held the truth in 20,000 simulated comparisons of runs
    of 320 episodes, whose true rates have a beta distribution of mean 0.3 to 0.98 and standard deviation 0 to 0.1:

        3 runs a side, 1 task:  93.8% to 100%, and 88% where one side's rates crowd below 1 (0.9 +- 0.1)
        3 runs a side, 3 tasks: 96.0% to 99.5%, and 93%
        3 runs alone, 1 or 3 tasks: 92.9% to 100%

    (a percentile bootstrap of the same differences: 71% to 84% of 1 task, 78% to 87% of 3; a smaller set of such
    comparisons is `benchmarks/interval_coverage.py`). No interval knows of what
    no run showed: a failure that befalls one training in five is in none of 3 runs half the time.

    Args:
        scores: `(runs,)` of each task.
        noise: for each task the variance of its mean that there would be if its runs differed by chance alone
            (`episode_noise`): no task's variance is taken to be less, so that runs that agree give no interval of zero
            width. Default: 0.

    Raises:
        ValueError: no tasks, or a task without runs.
    """
    tasks = _arrays(scores)
    if not tasks or any(not t.size for t in tasks):
        raise ValueError("a mean needs at least one task, and each task at least one run")
    errors = [
        max(floor, float(t.var(ddof=1)) / len(t) if len(t) > 1 else 0.0) / len(tasks) ** 2
        for t, floor in zip(tasks, noise or [0.0] * len(tasks), strict=True)
    ]
    spare = sum(e**2 / (len(t) - 1) for t, e in zip(tasks, errors, strict=True) if len(t) > 1)
    return RunMean(float(mean_score(tasks)), sum(errors), spare)


def episode_noise(successes: int, trials: int) -> float:
    """The variance of a success rate by the chance of its episodes alone, from Wilson's interval.

    Its farther end counts, so that there is some noise also at 0 and 1.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    rate = wilson(successes, trials)
    return float((max(rate.high - rate.value, rate.value - rate.low) / stats.norm.ppf(0.975)) ** 2)


def interval_of_mean(a: RunMean, *, confidence: float = 0.95) -> Interval:
    """A mean of runs with Student's interval; see `run_mean`."""
    half = _half(a.variance, a.spare, confidence)
    return Interval(a.value, a.value - half, a.value + half)


def difference_of_means(a: RunMean, b: RunMean, *, confidence: float = 0.95) -> Interval:
    """The difference a - b of two means of runs with Welch's interval; see `run_mean`."""
    half, value = _half(a.variance + b.variance, a.spare + b.spare, confidence), a.value - b.value
    return Interval(value, value - half, value + half)


def ratio_of_means(a: RunMean, b: RunMean, *, confidence: float = 0.95) -> Interval | None:
    """The ratio a / b of two means of runs with Welch's interval of its logarithm; see `run_mean`.

    None where one of the means isn't positive.
    """
    if a.value <= 0 or b.value <= 0:
        return None
    variance = a.variance / a.value**2 + b.variance / b.value**2
    half, value = _half(variance, a.spare / a.value**4 + b.spare / b.value**4, confidence), a.value / b.value
    return Interval(value, value * float(np.exp(-half)), value * float(np.exp(half)))


def _half(variance: float, spare: float, confidence: float) -> float:
    """Half the width of a t interval with Satterthwaite's degrees of freedom (none known: the normal one)."""
    df = variance**2 / spare if spare else np.inf
    return float(stats.t.ppf((1 + confidence) / 2, df) * np.sqrt(variance))


def mean_score(scores: Scores) -> Floats:
    """The mean over tasks of each task's mean score: `(...)`."""
    return np.asarray(np.mean([np.mean(s, axis=-1) for s in _arrays(scores)], axis=0))


def median_score(scores: Scores) -> Floats:
    """The median over tasks of each task's mean score: `(...)`."""
    return np.asarray(np.median([np.mean(s, axis=-1) for s in _arrays(scores)], axis=0))


def iqm(scores: Scores) -> Floats:
    """Interquartile mean: the mean of the middle half of all runs of all tasks (a 25% trimmed mean): `(...)`."""
    return np.asarray(stats.trim_mean(np.concatenate(_arrays(scores), axis=-1), 0.25, axis=-1))


def optimality_gap(scores: Scores, *, target: float = 1.0) -> Floats:
    """How far runs fall short of `target` on average, each task counting the same: `(...)`.

    Scores above the target count as the target.
    """
    return target - mean_score([np.minimum(s, target) for s in _arrays(scores)])


def probability_of_improvement(a: Scores, b: Scores) -> Floats:
    """The probability that a run of `a` scores higher than one of `b`, ties counting half, averaged over tasks.

    In each task this is Mann-Whitney's U over the number of pairs.

    Args:
        a, b: scores of the same tasks, `(..., runs)` each; numbers of runs may differ.

    Raises:
        ValueError: different numbers of tasks.
    """
    per_task = []
    for x, y in zip(_arrays(a), _arrays(b), strict=True):
        left, right = x[..., :, None], y[..., None, :]
        per_task.append(np.mean((left > right) + 0.5 * (left == right), axis=(-2, -1)))
    return np.asarray(np.mean(per_task, axis=0))


def performance_profile(scores: Scores, thresholds: ArrayLike) -> Floats:
    """The share of runs that score above each threshold (run-score distribution), each task counting the same.

    Args:
        scores: `(..., runs)` of each task.
        thresholds: `(thresholds,)`.

    Returns:
        `(..., thresholds)`.
    """
    taus = np.asarray(thresholds, np.float64)
    return np.asarray(np.mean([np.mean(s[..., None] > taus, axis=-2) for s in _arrays(scores)], axis=0))


def resample(scores: Scores, generator: np.random.Generator, resamples: int) -> list[Floats]:
    """Runs drawn with replacement, in each task from its own: `(resamples, runs)` a task.

    Runs are sorted first, so that their order doesn't matter.
    """
    drawn = []
    for task in _arrays(scores):
        ordered = np.sort(task)
        drawn.append(ordered[generator.integers(0, len(ordered), (resamples, len(ordered)))])
    return drawn


def stratified_bootstrap(
    statistic: Callable[..., Floats],
    *samples: Scores,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval | None:
    """A statistic of run scores with its percentile interval; strata are tasks (Agarwal et al. 2021).

    With few runs such an interval is too narrow: from 3 runs, expect to miss the truth about one time in four (see
    `tests/test_statistics.py`), and from runs that all agree it has no width at all.

    Args:
        statistic: of one list of arrays `(..., runs)` for each sample; returns `(...)`.
        samples: scores that are resampled apart from each other, one list of `(runs,)` arrays each.
        resamples: how many; confidence: the interval's level; seed: of the draws.

    Returns:
        The interval, widened to hold the estimate where a skewed distribution would leave it out; None where the
        statistic isn't finite.

    Raises:
        ValueError: a sample without tasks, or a task without runs.
    """
    lists = [_arrays(scores) for scores in samples]
    if not lists or any(not tasks or any(t.ndim != 1 or not t.size for t in tasks) for tasks in lists):
        raise ValueError("each sample needs at least one task, and each task at least one run")
    generator = np.random.default_rng(seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(*lists))
        draws = statistic(*(resample(tasks, generator, resamples) for tasks in lists))
    if not np.isfinite(value) or not np.isfinite(draws).all():
        return None
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, min(float(low), value), max(float(high), value))


def _arrays(scores: Scores) -> list[Floats]:
    return [np.asarray(s, np.float64) for s in scores]
