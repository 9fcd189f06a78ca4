"""The paper's claims, and two of our own, judged by a study's runs.

A claim is reproduced if its whole 95% interval satisfies it, not reproduced if the whole interval contradicts it,
and inconclusive otherwise. Intervals are Student's or Welch's t over runs, never narrower than the noise of episodes
(`evaluation.statistics.run_mean`): from three runs a bootstrap would call chance a finding. One run of a method that
learns decides nothing. Paper: "Hierarchical Integration of LLMs and MARL" (preprints202602.0689).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from echelon.evaluation.convergence import Convergence
from echelon.evaluation.statistics import (
    Interval,
    RunMean,
    difference_of_means,
    episode_noise,
    interval_of_mean,
    ratio_of_means,
    run_mean,
    wilson,
)

__all__ = ["episodes_won", "judge_claims", "place_of", "success_rate", "verdict"]

Run = dict[str, Any]
Key = tuple[Any, ...]
Verdict = Literal["reproduced", "not reproduced", "inconclusive"]
ABSENT = "not in this study"
ONE_RUN = "one run can't tell how much a method's runs differ: add seeds"
PAPERS_SIZE = 50  # the largest map that the paper has numbers of


@dataclass
class _Finding:
    """What a study says of one claim."""

    ours: str
    why: str
    value: Interval | None = None
    verdict: Verdict = "inconclusive"
    runs: list[Run] = field(default_factory=list)


def verdict(interval: Interval | None, *, above: float | None = None, below: float | None = None) -> Verdict:
    """What an interval says of the claim that a quantity is above a threshold, or at most at one (`below`)."""
    if interval is None:
        return "inconclusive"
    if above is not None:
        return "reproduced" if interval.low > above else "not reproduced" if interval.high <= above else "inconclusive"
    assert below is not None
    return "reproduced" if interval.high <= below else "not reproduced" if interval.low > below else "inconclusive"


def judge_claims(runs: Sequence[Run], convergence: Mapping[Key, Convergence | None]) -> list[dict[str, Any]]:
    """Every claim with a verdict.

    Args:
        runs: the finished runs, in the study's order.
        convergence: of each run, by (environment, size, agents, method, seed); None for what doesn't learn.
    """
    not_theirs = "not in the paper"
    judged: list[tuple[str, str, str, Callable[[], _Finding]]] = [
        ("tsr-gain", "L2M2's success rate is 20.5% above flat MAPPO's", "+20.5%", lambda: _gain(runs)),
        (
            "convergence-speed",
            "L2M2 converges 1.6 times as fast as flat MAPPO",
            "×1.6",
            lambda: _speed(runs, convergence),
        ),
        (
            "large-maps",
            "L2M2's success rate is above 60% on the largest map",
            "> 60% at 50×50",
            lambda: _largest(runs, "l2m2", above=0.60),
        ),
        (
            "qmix-large-maps",
            "QMIX's success rate is below 30% on the largest map",
            "< 30% at 50×50",
            lambda: _largest(runs, "qmix", below=0.30),
        ),
        (
            "random-fails",
            "The hierarchy with random goals fails everywhere: below 10%",
            "failed to solve",
            lambda: _fails(runs, "random-goals"),
        ),
        (
            "llm-only-fails",
            "A language model alone, without training, fails everywhere: below 10%",
            "control B, no number given",
            lambda: _fails(runs, "llm-only"),
        ),
        (
            "hierarchy",
            "Subgoals from a rule already beat flat MAPPO",
            not_theirs,
            lambda: _hierarchy(runs),
        ),
        (
            "classical-gap",
            "Rule-based subgoals take at most 1.25 times the classical planner's makespan at 20×20",
            not_theirs,
            lambda: _classical(runs),
        ),
    ]
    return [_claim(name, claim, paper, judge()) for name, claim, paper, judge in judged]


def _claim(name: str, claim: str, paper: str, found: _Finding) -> dict[str, Any]:
    return {
        "id": name,
        "claim": claim,
        "paper": paper,
        "ours": found.ours,
        "value": None if found.value is None else asdict(found.value),
        "verdict": found.verdict,
        "why": found.why,
        "runs": [r["id"] for r in found.runs],
    }


def _absent() -> _Finding:
    return _Finding("—", ABSENT)


# Which runs ------------------------------------------------------------------------------------------------------


def place_of(run: Run) -> tuple[str, int, int]:
    """Where a run belongs: environment, size, agents."""
    return run["environment"], run["size"], run["agents"]


def episodes_won(runs: Iterable[Run], which: str = "last") -> tuple[int, int]:
    """Successes of all runs' episodes together, and how many episodes those are."""
    outcomes = [bool(outcome) for run in runs for outcome in run[which]["success"]]
    return sum(outcomes), len(outcomes)


def success_rate(strata: Iterable[Sequence[Run]]) -> RunMean:
    """The success rate of a method's runs, with at least the noise of their episodes."""
    strata = list(strata)
    rates = [[float(r["last"]["tsr"]) for r in stratum] for stratum in strata]
    return run_mean(rates, [episode_noise(*episodes_won(stratum)) for stratum in strata])


def _strata(runs: Iterable[Run], method: str) -> dict[Key, list[Run]]:
    found: dict[Key, list[Run]] = {}
    for run in runs:
        if run["method"] == method:
            found.setdefault(place_of(run), []).append(run)
    return found


def _common(runs: Sequence[Run], a: str, b: str) -> tuple[list[list[Run]], list[list[Run]]]:
    """Runs of two methods in the places where both have some."""
    left, right = _strata(runs, a), _strata(runs, b)
    places = [p for p in left if p in right]
    return [left[p] for p in places], [right[p] for p in places]


def _flat(*strata: list[list[Run]]) -> list[Run]:
    return [run for side in strata for stratum in side for run in stratum]


def _single(*strata: list[list[Run]]) -> bool:
    """Whether one run stands for a method that learns."""
    return any(len(stratum) < 2 and stratum[0]["learns"] for side in strata for stratum in side)


# The claims ------------------------------------------------------------------------------------------------------


def _gain(runs: Sequence[Run]) -> _Finding:
    ours, flat = _common(runs, "l2m2", "flat-mappo")
    if not ours:
        return _absent()
    points, ratio = _difference(ours, flat), ratio_of_means(success_rate(ours), success_rate(flat))
    used = _flat(ours, flat)
    words = f"{_points(points)} over {_count(len(ours), 'place')}"
    if ratio is None:
        if _single(ours, flat):
            return _Finding(words, ONE_RUN, points, runs=used)
        return _judged(points, words, used, "the gain in points (one never succeeded: no ratio)", above=0.205)
    relative = Interval(ratio.value - 1, ratio.low - 1, ratio.high - 1)
    words = f"{_percent(relative, sign=True)}, {words}"
    if _single(ours, flat):
        return _Finding(words, ONE_RUN, relative, runs=used)
    # Points can't exceed the relative gain: the paper, which doesn't say which it means, gets the larger.
    return _judged(relative, words, used, "the relative gain", above=0.205)


def _speed(runs: Sequence[Run], convergence: Mapping[Key, Convergence | None]) -> _Finding:
    found = {r["id"]: c for r in runs if (c := convergence[(*place_of(r), r["method"], r["seed"])]) is not None}
    ours, flat = _common([r for r in runs if r["id"] in found], "l2m2", "flat-mappo")
    if not ours:
        return _absent()

    def time(strata: list[list[Run]]) -> RunMean:
        # Where in the gap between two evaluations is unknown, and as like as not the same for all runs.
        gaps = [np.mean([(found[r["id"]].step - found[r["id"]].after) ** 2 for r in stratum]) for stratum in strata]
        return run_mean([[found[r["id"]].time for r in stratum] for stratum in strata], [float(g) / 12 for g in gaps])

    used = _flat(ours, flat)
    ratio = ratio_of_means(time(flat), time(ours))
    if ratio is None:
        return _Finding("—", "a method needed no training at all to converge: no ratio", runs=used)
    if _single(ours, flat):
        return _Finding(f"×{_spread(ratio)}", ONE_RUN, ratio, runs=used)
    judged = _judged(ratio, f"×{_spread(ratio)}", used, "the ratio of mean convergence times", above=1.6)
    # A censored time is too small: in the numerator the ratio comes out too low, in the denominator too high.
    for name, side, spoilt, bound in (
        ("flat-mappo", flat, "not reproduced", "a lower"), ("l2m2", ours, "reproduced", "an upper"),
    ):  # fmt: skip
        late = sum(not found[r["id"]].converged for r in _flat(side))
        if late and judged.verdict == spoilt:
            judged.verdict = "inconclusive"
            judged.why = (
                f"{late} of {len(_flat(side))} runs of {name} hadn't converged when training ended, so that the ratio "
                f"is only {bound} bound"
            )
    gap = max(found[r["id"]].step - found[r["id"]].after for r in used)
    if gap:
        judged.why += f". Runs are judged every {gap:,.0f} steps: a time is known to that, and counted from the middle"
    return judged


def _largest(runs: Sequence[Run], method: str, **threshold: float) -> _Finding:
    sizes = {r["size"] for r in runs if r["method"] == method}
    if not sizes:
        return _absent()
    size = PAPERS_SIZE if PAPERS_SIZE in sizes else max(sizes)
    strata = list(_strata([r for r in runs if r["size"] == size], method).values())
    rate, used = _rate(strata), _flat(strata)
    words = f"{_percent(rate)} at {size}×{size}"
    if size != PAPERS_SIZE:
        why = f"the paper's number is of {PAPERS_SIZE}×{PAPERS_SIZE}; the largest finished here is {size}×{size}"
        return _Finding(words, why, rate, runs=used)
    if _single(strata):
        return _Finding(words, ONE_RUN, rate, runs=used)
    return _judged(rate, words, used, "the success rate", **threshold)


def _fails(runs: Sequence[Run], method: str) -> _Finding:
    strata = _strata(runs, method)
    if not strata:
        return _absent()
    rates = {place: _rate([stratum]) for place, stratum in strata.items()}
    worst = max(rates, key=lambda place: (rates[place].high, rates[place].value))
    judgeable = [place for place in rates if not _single([strata[place]])]
    broken = [place for place in judgeable if verdict(rates[place], below=0.10) == "not reproduced"]
    if broken:
        worst = max(broken, key=lambda place: rates[place].low)
    words = f"at most {_percent(rates[worst])}, in {worst[0]} at {worst[1]}×{worst[1]} with {worst[2]} agents"
    used = _flat(list(strata.values()))
    if not broken and len(judgeable) < len(strata):
        return _Finding(words, ONE_RUN, rates[worst], runs=used)
    return _judged(rates[worst], words, used, "the highest success rate", below=0.10)


def _hierarchy(runs: Sequence[Run]) -> _Finding:
    rule, flat = _common(runs, "rule-goals", "flat-mappo")
    if not rule:
        return _absent()
    points, used = _difference(rule, flat), _flat(rule, flat)
    words = f"{_points(points)} over {_count(len(rule), 'place')}"
    if _single(rule, flat):
        return _Finding(words, ONE_RUN, points, runs=used)
    if {r["last"]["tsr"] for r in used} in ({0.0}, {1.0}):
        return _Finding(
            words, "all runs of both succeed equally often: these maps can't tell them apart", points, runs=used
        )
    return _judged(points, words, used, "the difference", above=0.0)


def _classical(runs: Sequence[Run]) -> _Finding:
    at_20 = [r for r in runs if r["size"] == 20]
    ceiling = {(*place_of(r), r["seed"]): r for r in at_20 if r["method"] == "classical"}
    strata: dict[Key, list[tuple[float, float]]] = {}
    used = []
    for run in (r for r in at_20 if r["method"] == "rule-goals"):
        # The same seed means the same worlds, so that the ratio is of like with like.
        twin = ceiling.get((*place_of(run), run["seed"]))
        if twin is not None:
            taken, best = (np.asarray(r["last"]["steps"], np.float64) for r in (run, twin))
            ratio = float(taken.mean() / best.mean())
            # The noise of a ratio of means of pairs (delta method).
            noise = float(np.var(taken - ratio * best) / len(best) / best.mean() ** 2)
            strata.setdefault(place_of(run), []).append((ratio, noise))
            used += [run, twin]
    if not strata:
        return _absent()
    noises = [sum(noise for _, noise in stratum) / len(stratum) ** 2 for stratum in strata.values()]
    interval = interval_of_mean(run_mean([[ratio for ratio, _ in s] for s in strata.values()], noises))
    if any(len(stratum) < 2 for stratum in strata.values()):
        return _Finding(f"×{_spread(interval)}", ONE_RUN, interval, runs=used)
    return _judged(interval, f"×{_spread(interval)}", used, "the ratio of makespans", below=1.25)


def _difference(a: list[list[Run]], b: list[list[Run]]) -> Interval:
    return _clipped(difference_of_means(success_rate(a), success_rate(b)), -1.0)


def _rate(strata: list[list[Run]]) -> Interval:
    """A success rate over runs; of a method that learns nothing, or has one run, over their episodes (Wilson)."""
    if _single(strata) or not any(r["learns"] for r in _flat(strata)):
        return wilson(*episodes_won(_flat(strata)))
    return _clipped(interval_of_mean(success_rate(strata)), 0.0)


def _clipped(x: Interval, least: float) -> Interval:
    """An interval of what lies between `least` and 1."""
    return replace(x, low=max(least, x.low), high=min(1.0, x.high))


# Words -----------------------------------------------------------------------------------------------------------


def _judged(interval: Interval, ours: str, runs: list[Run], what: str, **threshold: float) -> _Finding:
    found = verdict(interval, **threshold)
    ((side, bound),) = threshold.items()
    limit = f"{bound:.3g}"
    why = {
        "reproduced": f"the whole interval of {what} is {side} {limit}",
        "not reproduced": f"the whole interval of {what} is {'below' if side == 'above' else 'above'} {limit}",
        "inconclusive": f"the interval of {what} holds {limit}: more runs would tell",
    }[found]
    return _Finding(ours, why, interval, found, runs)


def _spread(x: Interval) -> str:
    return f"{x.value:.2f} [{x.low:.2f} to {x.high:.2f}]"


def _percent(x: Interval, *, sign: bool = False) -> str:
    mark = "+" if sign else ""
    return f"{x.value:{mark}.1%} [{x.low:{mark}.1%} to {x.high:{mark}.1%}]"


def _points(x: Interval) -> str:
    return f"{100 * x.value:+.1f} points [{100 * x.low:+.1f} to {100 * x.high:+.1f}]"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")
