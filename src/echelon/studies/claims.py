"""The paper's claims, and two of our own, judged by a study's runs.

A claim is reproduced if its whole 95% interval satisfies it, not reproduced if the whole interval contradicts it,
and inconclusive otherwise. Paper: "Hierarchical Integration of LLMs and MARL" (preprints202602.0689).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from echelon.evaluation.convergence import Convergence
from echelon.evaluation.statistics import Interval, mean_score, stratified_bootstrap, wilson

__all__ = ["judge_claims", "verdict"]

Run = dict[str, Any]
Key = tuple[Any, ...]
Verdict = Literal["reproduced", "not reproduced", "inconclusive"]
ABSENT = "not in this study"
ONE_RUN = "one run of each method can't tell how much runs differ: add seeds"


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


def judge_claims(
    runs: Sequence[Run], convergence: Mapping[Key, Convergence | None], boot: dict[str, Any]
) -> list[dict[str, Any]]:
    """Every claim with a verdict.

    Args:
        runs: the finished runs, in the study's order.
        convergence: of each run, by (environment, size, agents, method, seed); None for what doesn't learn.
        boot: `seed` and `resamples` of the bootstraps.
    """
    not_theirs = "not in the paper"
    judged: list[tuple[str, str, str, Callable[[], _Finding]]] = [
        ("tsr-gain", "L2M2's success rate is 20.5% above flat MAPPO's", "+20.5%", lambda: _gain(runs, boot)),
        (
            "convergence-speed",
            "L2M2 converges 1.6 times as fast as flat MAPPO",
            "×1.6",
            lambda: _speed(runs, convergence, boot),
        ),
        (
            "large-maps",
            "L2M2's success rate is above 60% on the largest map",
            "> 60% at 50×50",
            lambda: _largest(runs, "l2m2", boot, above=0.60),
        ),
        (
            "qmix-large-maps",
            "QMIX's success rate is below 30% on the largest map",
            "< 30% at 50×50",
            lambda: _largest(runs, "qmix", boot, below=0.30),
        ),
        (
            "random-fails",
            "The hierarchy with random goals fails everywhere: below 10%",
            "failed to solve",
            lambda: _fails(runs, "random-goals", boot),
        ),
        (
            "llm-only-fails",
            "A language model alone, without training, fails everywhere: below 10%",
            "control B, no number given",
            lambda: _fails(runs, "llm-only", boot),
        ),
        (
            "hierarchy",
            "Subgoals from a rule already beat flat MAPPO",
            not_theirs,
            lambda: _hierarchy(runs, boot),
        ),
        (
            "classical-gap",
            "Rule-based subgoals take at most 1.25 times the classical planner's makespan at 20×20",
            not_theirs,
            lambda: _classical(runs, boot),
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


def _place(run: Run) -> Key:
    return run["environment"], run["size"], run["agents"]


def _strata(runs: Iterable[Run], method: str) -> dict[Key, list[Run]]:
    found: dict[Key, list[Run]] = {}
    for run in runs:
        if run["method"] == method:
            found.setdefault(_place(run), []).append(run)
    return found


def _common(runs: Sequence[Run], a: str, b: str) -> tuple[list[list[Run]], list[list[Run]]]:
    """Runs of two methods in the places where both have some."""
    left, right = _strata(runs, a), _strata(runs, b)
    places = [p for p in left if p in right]
    return [left[p] for p in places], [right[p] for p in places]


def _flat(*strata: list[list[Run]]) -> list[Run]:
    return [run for side in strata for stratum in side for run in stratum]


def _tsr(strata: list[list[Run]]) -> list[list[float]]:
    return [[float(r["last"]["tsr"]) for r in stratum] for stratum in strata]


def _single(*strata: list[list[Run]]) -> bool:
    return any(len(stratum) < 2 for side in strata for stratum in side)


# The claims ------------------------------------------------------------------------------------------------------


def _gain(runs: Sequence[Run], boot: dict[str, Any]) -> _Finding:
    ours, flat = _common(runs, "l2m2", "flat-mappo")
    if not ours:
        return _absent()
    scores = _tsr(ours), _tsr(flat)
    points = stratified_bootstrap(lambda a, b: mean_score(a) - mean_score(b), *scores, **boot)
    relative = stratified_bootstrap(lambda a, b: mean_score(a) / mean_score(b) - 1, *scores, **boot)
    assert points is not None
    used = _flat(ours, flat)
    words = f"{_points(points)} over {_count(len(ours), 'place')}"
    if relative is not None:
        words = f"{_percent(relative, sign=True)}, {words}"
    if _single(ours, flat):
        return _Finding(words, ONE_RUN, relative or points, runs=used)
    if relative is None:
        return _judged(points, words, used, "the gain in points (flat MAPPO's rate is 0 in places)", above=0.205)
    # Points can't exceed the relative gain: the paper, which doesn't say which it means, gets the larger.
    return _judged(relative, words, used, "the relative gain", above=0.205)


def _speed(runs: Sequence[Run], convergence: Mapping[Key, Convergence | None], boot: dict[str, Any]) -> _Finding:
    def of(run: Run) -> Convergence | None:
        return convergence[(*_place(run), run["method"], run["seed"])]

    ours, flat = _common([r for r in runs if of(r) is not None], "l2m2", "flat-mappo")
    if not ours:
        return _absent()
    times = [[[found.step for r in stratum if (found := of(r))] for stratum in side] for side in (flat, ours)]
    late = {
        name: [r for r in _flat(side) if (found := of(r)) and not found.converged]
        for name, side in (("flat-mappo", flat), ("l2m2", ours))
    }
    ratio = stratified_bootstrap(lambda a, b: mean_score(a) / mean_score(b), *times, **boot)
    used = _flat(ours, flat)
    if ratio is None:
        return _Finding("—", "a run of l2m2 needed no training at all to converge: no ratio", runs=used)
    if _single(ours, flat):
        return _Finding(f"×{_spread(ratio)}", ONE_RUN, ratio, runs=used)
    judged = _judged(ratio, f"×{_spread(ratio)}", used, "the ratio of mean convergence times", above=1.6)
    total = {"flat-mappo": len(_flat(flat)), "l2m2": len(_flat(ours))}
    # A censored time is too small: in the numerator the ratio comes out too low, in the denominator too high.
    for name, spoilt, bound in (("flat-mappo", "not reproduced", "lower"), ("l2m2", "reproduced", "upper")):
        if late[name] and judged.verdict == spoilt:
            judged.verdict = "inconclusive"
            judged.why = (
                f"{len(late[name])} of {total[name]} runs of {name} hadn't converged when training ended, so that "
                f"the ratio is only a{'n' if bound == 'upper' else ''} {bound} bound"
            )
    return judged


def _largest(runs: Sequence[Run], method: str, boot: dict[str, Any], **threshold: float) -> _Finding:
    sizes = [r["size"] for r in runs if r["method"] == method]
    if not sizes:
        return _absent()
    size = max(sizes)
    strata = list(_strata([r for r in runs if r["size"] == size], method).values())
    rate = _rate(strata, boot)
    return _judged(rate, f"{_percent(rate)} at {size}×{size}", _flat(strata), "the success rate", **threshold)


def _fails(runs: Sequence[Run], method: str, boot: dict[str, Any]) -> _Finding:
    strata = _strata(runs, method)
    if not strata:
        return _absent()
    rates = {place: _rate([stratum], boot) for place, stratum in strata.items()}
    worst = max(rates, key=lambda place: (rates[place].high, rates[place].value))
    broken = [place for place in rates if verdict(rates[place], below=0.10) == "not reproduced"]
    if broken:
        worst = max(broken, key=lambda place: rates[place].low)
    words = f"at most {_percent(rates[worst])}, in {worst[0]} at {worst[1]}×{worst[1]} with {worst[2]} agents"
    return _judged(rates[worst], words, _flat(list(strata.values())), "the highest success rate", below=0.10)


def _hierarchy(runs: Sequence[Run], boot: dict[str, Any]) -> _Finding:
    rule, flat = _common(runs, "rule-goals", "flat-mappo")
    if not rule:
        return _absent()
    points = stratified_bootstrap(lambda a, b: mean_score(a) - mean_score(b), _tsr(rule), _tsr(flat), **boot)
    assert points is not None
    words, used = f"{_points(points)} over {_count(len(rule), 'place')}", _flat(rule, flat)
    if _single(rule, flat):
        return _Finding(words, ONE_RUN, points, runs=used)
    if points.low == points.value == points.high == 0:
        return _Finding(
            words, "all runs of both succeed equally often: these maps can't tell them apart", points, runs=used
        )
    return _judged(points, words, used, "the difference", above=0.0)


def _classical(runs: Sequence[Run], boot: dict[str, Any]) -> _Finding:
    at_20 = [r for r in runs if r["size"] == 20]
    ceiling = {(*_place(r), r["seed"]): r for r in at_20 if r["method"] == "classical"}
    strata: dict[Key, list[float]] = {}
    used = []
    for run in (r for r in at_20 if r["method"] == "rule-goals"):
        # The same seed means the same worlds, so that the ratio is of like with like.
        twin = ceiling.get((*_place(run), run["seed"]))
        if twin is not None:
            ratio = float(np.mean(run["last"]["steps"]) / np.mean(twin["last"]["steps"]))
            strata.setdefault(_place(run), []).append(ratio)
            used += [run, twin]
    if not strata:
        return _absent()
    interval = stratified_bootstrap(mean_score, list(strata.values()), **boot)
    assert interval is not None
    if any(len(ratios) < 2 for ratios in strata.values()):
        return _Finding(f"×{_spread(interval)}", ONE_RUN, interval, runs=used)
    return _judged(interval, f"×{_spread(interval)}", used, "the ratio of makespans", below=1.25)


def _rate(strata: list[list[Run]], boot: dict[str, Any]) -> Interval:
    """Mean success rate over runs; where no runs differ, or there is one each, all their episodes tell how sure."""
    rates = _tsr(strata)
    if any(len(set(stratum)) > 1 for stratum in rates):
        interval = stratified_bootstrap(mean_score, rates, **boot)
        assert interval is not None
        return interval
    outcomes = [bool(outcome) for r in _flat(strata) for outcome in r["last"]["success"]]
    return wilson(sum(outcomes), len(outcomes))


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
