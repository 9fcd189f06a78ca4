"""What a study's results say: intervals, tests, convergence, and verdicts on the paper's claims.

Everything is a function of `results.json` (format 1) and a seed. Success rates are compared between runs, never
between episodes of one run as if each were a run. Failed and pending runs are counted and listed, not analysed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from scipy import stats

from echelon.errors import EchelonError
from echelon.evaluation.convergence import area_under_curve, convergence_time, log_rank, restricted_mean
from echelon.evaluation.hypothesis_tests import eta_squared, holm, omega_squared, one_way, pairwise
from echelon.evaluation.statistics import (
    Interval,
    difference_of_rates,
    iqm,
    mean_interval,
    mean_score,
    median_score,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    resample,
    stratified_bootstrap,
    wilson,
)
from echelon.studies.claims import judge_claims

__all__ = ["analyse"]

Run = dict[str, Any]
Json = dict[str, Any]
# What others are measured against in the paper.
BASELINES = ("flat-mappo", "qmix")
TAUS = np.linspace(0.0, 1.0, 51)
ALPHA = 0.05


def analyse(results: Json, *, seed: int = 0, resamples: int = 2000) -> Json:
    """The content of analysis.json (format 1) for the content of results.json.

    Args:
        results: the collected results; runs in any order.
        seed: of all bootstraps.
        resamples: of each bootstrap.

    Returns:
        JSON-able values without NaN: where a number can't be computed there is None. All intervals are 95%.

    Raises:
        EchelonError: results of another format, two runs with one id, or two finished runs of one cell and seed.
    """
    _check(results)
    study = results["study"]
    runs = sorted((r for r in results["runs"] if r["status"] == "finished"), key=partial(_order, study))
    others = sorted((r for r in results["runs"] if r["status"] != "finished"), key=partial(_order, study))
    boot: Json = {"seed": seed, "resamples": resamples}
    tests = [_test(place, runs, study["methods"], boot) for place in _places(study)]
    _adjust(tests)
    survival = [_survival(place, runs, study["methods"], boot) for place in _places(study)]
    _adjust_logrank(survival)
    return {
        "format": 1,
        "study": study["name"],
        "primary": "last",
        "settings": {
            "seed": seed,
            "resamples": resamples,
            "confidence": 0.95,
            "convergence": "first evaluation after which the smoothed success rate stays within 0.05 (or two standard "
            "errors, if more) of its final level, the mean of the last 3 evaluations, if that is above 0.5",
        },
        "counts": {
            "finished": len(runs),
            "failed": sum(r["status"] == "failed" for r in others),
            "pending": sum(r["status"] == "pending" for r in others),
        },
        "failed": [{"id": r["id"], "reason": r["reason"]} for r in others if r["status"] == "failed"],
        "pending": [r["id"] for r in others if r["status"] == "pending"],
        "cells": [_cell(place, m, _of(runs, m, place), boot) for place in _places(study) for m in study["methods"]],
        "aggregates": [_aggregate(e, m, runs, boot) for e in study["environments"] for m in study["methods"]],
        "profiles": [_profile(e, study["methods"], runs, boot) for e in study["environments"]],
        "improvement": [p for e in study["environments"] for p in _improvement(e, study["methods"], runs, boot)],
        "tests": tests,
        "survival": survival,
        "claims": judge_claims(runs, {(*_place(r), r["method"], r["seed"]): _converged(r) for r in runs}, boot),
    }


# Runs and where they belong --------------------------------------------------------------------------------------


def _check(results: Json) -> None:
    if results.get("format") != 1:
        raise EchelonError(f"results of format {results.get('format')!r}: this version reads format 1")
    seen: set[Any] = set()
    for run in results["runs"]:
        if run["id"] in seen:
            raise EchelonError(f"two runs have the id {run['id']}")
        seen.add(run["id"])
        key = (*_place(run), run["method"], run["seed"])
        if run["status"] == "finished" and key in seen:
            raise EchelonError(f"two finished runs of {run['method']}, size {run['size']}, seed {run['seed']}")
        if run["status"] == "finished":
            seen.add(key)


def _place(run: Run) -> tuple[str, int, int]:
    return run["environment"], run["size"], run["agents"]


def _places(study: Json) -> list[tuple[str, int, int]]:
    return [(e, s, a) for e in study["environments"] for s in study["sizes"] for a in study["agents"]]


def _order(study: Json, run: Run) -> tuple[Any, ...]:
    keys = ("environments", "sizes", "agents", "methods", "seeds")
    values = (*_place(run), run["method"], run["seed"])
    # What the study doesn't name comes last, in its own order.
    return tuple((study[k].index(v) if v in study[k] else len(study[k]), v) for k, v in zip(keys, values, strict=True))


def _of(runs: Iterable[Run], method: str, place: tuple[str, int, int]) -> list[Run]:
    return [r for r in runs if r["method"] == method and _place(r) == place]


def _tasks(runs: Iterable[Run], method: str, environment: str) -> dict[tuple[str, int, int], list[Run]]:
    """A method's runs by place: the strata of an aggregate."""
    tasks: dict[tuple[str, int, int], list[Run]] = {}
    for run in runs:
        if run["method"] == method and run["environment"] == environment:
            tasks.setdefault(_place(run), []).append(run)
    return tasks


def _ids(runs: Iterable[Run]) -> list[str]:
    return [r["id"] for r in runs]


def _tsr(runs: Iterable[Run], which: str = "last") -> list[float]:
    return [float(r[which]["tsr"]) for r in runs]


def _json(interval: Interval | None) -> Json | None:
    return None if interval is None else asdict(interval)


def _positive(interval: Interval | None) -> Json | None:
    """Student's interval of a quantity that can't be negative."""
    return None if interval is None else {**asdict(interval), "low": max(0.0, interval.low)}


# Cells: one method in one place ----------------------------------------------------------------------------------


def _cell(place: tuple[str, int, int], method: str, runs: list[Run], boot: Json) -> Json:
    cell: Json = dict(zip(("environment", "size", "agents"), place, strict=True))
    learners = [c for c in map(_converged, runs) if c is not None]
    steps = None
    if learners:
        horizon = max(r["steps"] for r in runs)
        steps = restricted_mean([c.step for c in learners], [c.converged for c in learners], horizon, **boot)
    areas = [_area(r) for r in runs if len(r["evaluations"]) > 1]
    return cell | {
        "method": method,
        "runs": _ids(runs),
        "seeds": [r["seed"] for r in runs],
        "tsr": _json(_rate(runs, "last", boot)),
        "tsr_pooled": _json(_pooled(runs)),
        "tsr_best": _json(_rate(runs, "best", boot)),
        "steps_to_finish": _positive(mean_interval([s for s in map(_finishing, runs) if s is not None])),
        "makespan": _positive(mean_interval([np.mean(r["last"]["steps"]) for r in runs])),
        "collisions": _positive(mean_interval([np.mean(r["last"]["collisions"]) for r in runs])),
        "curve": _curve(runs, boot),
        "auc": _json(stratified_bootstrap(mean_score, [areas], **boot)) if areas else None,
        "convergence": {"steps": _json(steps), "converged": sum(c.converged for c in learners), "runs": len(learners)},
        "training_seconds": _mean([r["training_seconds"] for r in runs]),
        "steps_per_second": _mean([r["steps_per_second"] for r in runs if r["learns"]]),
        "model_calls": _mean([_model(r, "calls") for r in runs]),
        "model_seconds": _mean([_model(r, "seconds") for r in runs]),
        "planner_ms_per_episode": _mean([p for p in map(_planner_ms, runs) if p is not None]),
    }


def _rate(runs: list[Run], which: str, boot: Json) -> Interval | None:
    """Mean success rate over runs; where runs show no spread (or there is one), all their episodes tell how sure."""
    rates = _tsr(runs, which)
    if len(set(rates)) > 1:
        return stratified_bootstrap(mean_score, [rates], **boot)
    return _pooled(runs, which)


def _pooled(runs: list[Run], which: str = "last") -> Interval | None:
    return wilson(*_episodes(runs, which)) if runs else None


def _episodes(runs: list[Run], which: str = "last") -> tuple[int, int]:
    outcomes = [outcome for r in runs for outcome in r[which]["success"]]
    return sum(map(bool, outcomes)), len(outcomes)


def _finishing(run: Run) -> float | None:
    taken = [s for s, success in zip(run["last"]["steps"], run["last"]["success"], strict=True) if success]
    return float(np.mean(taken)) if taken else None


def _curve(runs: list[Run], boot: Json) -> Json | None:
    """TSR over training, at the steps that all runs were evaluated at."""
    by_run = [{e["step"]: e["tsr"] for e in r["evaluations"]} for r in runs]
    steps = sorted(set.intersection(*map(set, by_run))) if by_run else []
    if len(steps) < 2:
        return None
    points = [stratified_bootstrap(mean_score, [[c[s] for c in by_run]], **boot) for s in steps]
    return {"steps": steps} | {k: [getattr(p, k) for p in points] for k in ("value", "low", "high")}


def _area(run: Run) -> float:
    return area_under_curve([e["step"] for e in run["evaluations"]], [e["tsr"] for e in run["evaluations"]])


def _converged(run: Run) -> Any:
    """When a run that learns converged (see `convergence_time`); None for one that doesn't, or was never evaluated."""
    curve = run["evaluations"]
    if not run["learns"] or len(curve) < 2:
        return None
    episodes = min(e["episodes"] for e in curve)
    return convergence_time([e["step"] for e in curve], [e["tsr"] for e in curve], episodes=episodes)


def _model(run: Run, what: str) -> float:
    """A language model's part in training and in the last evaluation."""
    return float(run[f"training_model_{what}"] + run["last"]["plans"].get(f"model_{what}", 0))


def _planner_ms(run: Run) -> float | None:
    plans = run["last"]["plans"]
    seconds = plans.get("planner_seconds", plans.get("model_seconds"))
    return None if seconds is None else 1000 * seconds / run["last"]["episodes"]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


# Aggregates over the places of an environment --------------------------------------------------------------------


def _aggregate(environment: str, method: str, runs: list[Run], boot: Json) -> Json:
    tasks = list(_tasks(runs, method, environment).values())
    scores = [_tsr(task) for task in tasks]
    statistics: dict[str, Callable[..., Any]] = {
        "iqm": iqm,
        "mean": mean_score,
        "median": median_score,
        "optimality_gap": optimality_gap,
    }
    intervals = {k: _json(stratified_bootstrap(f, scores, **boot)) if scores else None for k, f in statistics.items()}
    return {"environment": environment, "method": method, **intervals, "runs": [i for t in tasks for i in _ids(t)]}


def _profile(environment: str, methods: Sequence[str], runs: list[Run], boot: Json) -> Json:
    """Performance profiles with pointwise intervals."""
    lines = {}
    for method in methods:
        scores = [_tsr(task) for task in _tasks(runs, method, environment).values()]
        if scores:
            value = performance_profile(scores, TAUS)
            drawn = resample(scores, np.random.default_rng(boot["seed"]), boot["resamples"])
            low, high = np.quantile(performance_profile(drawn, TAUS), (0.025, 0.975), axis=0)
            lines[method] = {
                "value": value.tolist(),
                "low": np.minimum(low, value).tolist(),
                "high": np.maximum(high, value).tolist(),
            }
    return {"environment": environment, "taus": TAUS.tolist(), "methods": lines}


def _improvement(environment: str, methods: Sequence[str], runs: list[Run], boot: Json) -> list[Json]:
    """P(a > b) of every method over each baseline, over the places where both have runs."""
    found = []
    for b in (b for b in BASELINES if b in methods):
        for a in (a for a in methods if a != b):
            left, right = _tasks(runs, a, environment), _tasks(runs, b, environment)
            common = [p for p in left if p in right]
            if common:
                scores = [[_tsr(side[p]) for p in common] for side in (left, right)]
                interval = stratified_bootstrap(probability_of_improvement, *scores, **boot)
                used = [i for side in (left, right) for p in common for i in _ids(side[p])]
                found.append({"environment": environment, "a": a, "b": b, "probability": _json(interval), "runs": used})
    return found


# Tests between methods in one place ------------------------------------------------------------------------------


def _test(place: tuple[str, int, int], runs: list[Run], methods: Sequence[str], boot: Json) -> Json:
    cells = {m: _of(runs, m, place) for m in methods}
    cells = {m: cell for m, cell in cells.items() if len(cell) > 1}
    names, groups = list(cells), [_tsr(cell) for cell in cells.values()]
    result = one_way(groups)
    posthoc = None
    pairs = []
    if len(groups) > 1:
        posthoc = "tukey" if result.test == "anova" else "games-howell"
        for pair in pairwise(groups, equal_variances=posthoc == "tukey"):
            a, b = names[pair.a], names[pair.b]
            single, p, difference = pair.p_single, pair.p, pair.difference
            if p is None:
                # No spread between the runs of either: all episodes of each are alike, and may be pooled.
                single = p = _fisher(cells[a], cells[b])
                difference = difference_of_rates(*_episodes(cells[a]), *_episodes(cells[b]))
            pairs.append(
                {
                    "a": a,
                    "b": b,
                    "difference": {k: min(1.0, max(-1.0, v)) for k, v in asdict(difference).items()},
                    "p": p,
                    "p_single": single,
                    "p_holm": None,
                    "hedges_g": pair.hedges_g,
                    "significant": False,
                    "by": "fisher" if pair.p is None else posthoc,
                }
            )
    return dict(zip(("environment", "size", "agents"), place, strict=True)) | {
        "metric": "tsr",
        "methods": names,
        "normality": [{"method": m, "p": p} for m, p in zip(names, result.normality, strict=False)],
        "equal_variances": {"test": "levene", "p": result.equal_variances},
        "test": result.test,
        "reason": result.reason,
        "without_spread": [names[i] for i in result.without_spread],
        "statistic": result.statistic,
        "df": None if result.df is None else list(result.df),
        "p": result.p,
        "eta_squared": eta_squared(groups) if len(groups) > 1 else None,
        "omega_squared": omega_squared(groups) if len(groups) > 1 else None,
        "posthoc": posthoc,
        "pairs": pairs,
        "runs": [i for cell in cells.values() for i in _ids(cell)],
        "words": [],
    }


def _fisher(a: list[Run], b: list[Run]) -> float:
    (won_a, all_a), (won_b, all_b) = _episodes(a), _episodes(b)
    return float(stats.fisher_exact([[won_a, all_a - won_a], [won_b, all_b - won_b]]).pvalue)


def _adjust(tests: list[Json]) -> None:
    """Holm's correction over all pairs of the study, on what each pair says by itself; then put it into words.

    A pair's `p` allows for the other pairs of its place already. `p_holm` is never below it.
    """
    pairs = [pair for test in tests for pair in test["pairs"]]
    for pair, p in zip(pairs, holm([pair["p_single"] for pair in pairs]), strict=True):
        pair["p_holm"] = None if p is None else max(p, pair["p"])
        pair["significant"] = pair["p_holm"] is not None and pair["p_holm"] < ALPHA
    for test in tests:
        test["words"] = _words(test, len(pairs))


def _words(test: Json, family: int) -> list[str]:
    """The test in sentences for a reader without statistics."""
    words = []
    if test["test"] is not None:
        name = {"anova": "analysis of variance", "welch": "Welch's test"}[test["test"]]
        verdict = (
            "Success rates differ between methods by more than chance explains"
            if test["p"] < ALPHA
            else "Chance alone could explain the differences between methods"
        )
        # Rounded down: 99.8% is not all.
        share = f"; {int(100 * test['eta_squared'])}% of all variation between runs comes from the method"
        words.append(f"{verdict} ({name}, {_p(test['p'])}{share}).")
    words.append(test["reason"])
    return words + [_pair_words(pair, family) for pair in test["pairs"]]


def _pair_words(pair: Json, family: int) -> str:
    gap = pair["difference"]
    a, b, value, low, high = pair["a"], pair["b"], gap["value"], gap["low"], gap["high"]
    if value < 0:
        a, b, value, low, high = b, a, -value, -high, -low
    if value == 0:
        return f"{a} and {b} succeeded equally often."
    points = f"{100 * value:.1f} points ({100 * low:.1f} to {100 * high:.1f})"
    if pair["significant"]:
        return f"{a} and {b} differ: {points} in favour of {a}, more than chance explains ({_p(pair['p_holm'])})."
    if pair["p"] < ALPHA:
        return (
            f"{a} is ahead of {b} by {points}; alone that would be more than chance explains ({_p(pair['p'])}), but "
            f"not among the {family} comparisons of this study ({_p(pair['p_holm'])})."
        )
    return f"{a} is ahead of {b} by {points}, which chance could explain ({_p(pair['p_holm'])})."


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


# Convergence -----------------------------------------------------------------------------------------------------


def _survival(place: tuple[str, int, int], runs: list[Run], methods: Sequence[str], boot: Json) -> Json:
    here = {m: [r for r in _of(runs, m, place) if _converged(r) is not None] for m in methods}
    here = {m: found for m, found in here.items() if found}
    horizon = max((r["steps"] for found in here.values() for r in found), default=None)
    times = {m: [_converged(r).step for r in found] for m, found in here.items()}
    events = {m: [_converged(r).converged for r in found] for m, found in here.items()}
    logrank = []
    for i, b in enumerate(b for b in BASELINES if b in here):
        # Each pair of baselines once.
        for a in (a for a in here if a != b and a not in BASELINES[:i]):
            result = log_rank(times[a], events[a], times[b], events[b])
            statistic, p = (None, None) if result is None else result
            logrank.append({"a": a, "b": b, "statistic": statistic, "p": p, "p_holm": None})
    return dict(zip(("environment", "size", "agents"), place, strict=True)) | {
        "horizon": horizon,
        "methods": [
            {
                "method": m,
                "runs": _ids(found),
                "times": times[m],
                "converged": events[m],
                "restricted_mean": asdict(restricted_mean(times[m], events[m], float(horizon or 0), **boot)),
            }
            for m, found in here.items()
        ],
        "logrank": logrank,
    }


def _adjust_logrank(survival: list[Json]) -> None:
    """Holm's correction over all log-rank tests of the study."""
    tests = [test for place in survival for test in place["logrank"]]
    for test, p in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = p
