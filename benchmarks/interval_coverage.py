"""How often the 95% intervals that verdicts are made by hold the truth, with three runs a side.

python benchmarks/interval_coverage.py > docs/results/coverage.md

Runs of 320 episodes whose true success rates have a beta distribution; the difference of two methods over one or three
tasks, by `difference_of_means` and by a percentile bootstrap over runs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from echelon.evaluation.statistics import difference_of_means, episode_noise, run_mean

EPISODES, RUNS, DRAWS, RESAMPLES = 320, 3, 2000, 500
SIDES = [(0.9, 0.0), (0.9, 0.05), (0.9, 0.1), (0.98, 0.02), (0.6, 0.1), (0.3, 0.1)]


def play(mean: float, spread: float, tasks: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Successes, `(tasks, RUNS)`."""
    if spread == 0:
        rates = np.full((tasks, RUNS), mean)
    else:
        weight = mean * (1 - mean) / spread**2 - 1
        rates = rng.beta(mean * weight, (1 - mean) * weight, (tasks, RUNS))
    return rng.binomial(EPISODES, rates)


def covered(a: tuple[float, float], b: tuple[float, float], tasks: int) -> tuple[float, float]:
    """The share of intervals that held the true difference: ours, and the bootstrap's."""
    rng = np.random.default_rng(0)
    ours = bootstrap = 0
    for _ in range(DRAWS):
        sides = [play(*side, tasks, rng) for side in (a, b)]
        means = [
            run_mean(list(won / EPISODES), [episode_noise(int(t.sum()), EPISODES * RUNS) for t in won]) for won in sides
        ]
        interval = difference_of_means(*means)
        ours += interval.low <= a[0] - b[0] <= interval.high
        drawn = [
            np.take_along_axis(won[None] / EPISODES, rng.integers(RUNS, size=(RESAMPLES, tasks, RUNS)), 2).mean((1, 2))
            for won in sides
        ]
        low, high = np.quantile(drawn[0] - drawn[1], (0.025, 0.975))
        bootstrap += low <= a[0] - b[0] <= high
    return ours / DRAWS, bootstrap / DRAWS


def main() -> None:
    """Print the table."""
    print("# Do 95% intervals hold the truth in 95%?\n")
    print(
        f"`python benchmarks/interval_coverage.py`: two methods' difference, {RUNS} runs of {EPISODES} episodes each,"
    )
    print(f"{DRAWS:,} simulated comparisons a row. True rates: mean ± deviation of a beta distribution.\n")
    print("| one method | the other | tasks | Welch over runs | percentile bootstrap |\n|---|---|---|---|---|")
    for other in SIDES:
        for tasks in (1, 3):
            ours, bootstrap = covered(other, (0.7, 0.1), tasks)
            print(f"| {other[0]} ± {other[1]} | 0.7 ± 0.1 | {tasks} | {ours:.1%} | {bootstrap:.1%} |", flush=True)
    for same in ((0.9, 0.05), (0.98, 0.02)):
        for tasks in (1, 3):
            ours, bootstrap = covered(same, same, tasks)
            print(f"| {same[0]} ± {same[1]} | the same | {tasks} | {ours:.1%} | {bootstrap:.1%} |", flush=True)


if __name__ == "__main__":
    main()
