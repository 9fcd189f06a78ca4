"""What a study's results say: intervals, tests, convergence, and verdicts on the paper's claims.

Everything is a function of `results.json` (format 1) and a seed. Success rates are compared between runs, never
between episodes of one run as if each were a run. Failed and pending runs are counted and listed, not analysed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
from scipy import stats

from echelon.errors import EchelonError
from echelon.evaluation.convergence import (
    Convergence,
    area_under_curve,
    convergence_time,
    log_rank,
    restricted_mean,
)
from echelon.evaluation.hypothesis_tests import eta_squared, holm, omega_squared, one_way, pairwise
from echelon.evaluation.statistics import (
    Interval,
    difference_of_means,
    iqm,
    mean_score,
    mean_with_interval,
    median_score,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    resample,
    stratified_bootstrap,
    wider,
    wilson,
)
from echelon.studies.claims import episodes_won, judge_claims, place_of, success_rate

__all__ = ["analyse", "model_part", "planner_ms"]

Run = dict[str, Any]
Json = dict[str, Any]
# What others are measured against in the paper.
BASELINES = ("flat-mappo", "qmix")
# So many runs that agree to the last episode hardly do so by chance.
ENOUGH = 5
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
    common = {e: _common_places(e, runs, study["methods"]) for e in study["environments"]}
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
            "errors, if more) of its final level, the mean of the last 3 evaluations, if that is above 0.5; the time "
            "is the middle between that evaluation and the one before, and never more than the study's steps",
        },
        "counts": {
            "finished": len(runs),
            "failed": sum(r["status"] == "failed" for r in others),
            "pending": sum(r["status"] == "pending" for r in others),
        },
        "failed": [{"id": r["id"], "reason": r["reason"]} for r in others if r["status"] == "failed"],
        "pending": [r["id"] for r in others if r["status"] == "pending"],
        "cells": [_cell(place, m, _of(runs, m, place), boot) for place in _places(study) for m in study["methods"]],
        "common": [{"environment": e} | c for e, c in common.items()],
        "aggregates": [_aggregate(e, m, c, runs, boot) for e, c in common.items() for m in study["methods"]],
        "profiles": [_profile(e, c, runs, boot) for e, c in common.items()],
        "improvement": [p for e in study["environments"] for p in _improvement(e, study["methods"], runs, boot)],
        "tests": tests,
        "survival": survival,
        "claims": judge_claims(runs, {(*place_of(r), r["method"], r["seed"]): _converged(r) for r in runs}),
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
        key = (*place_of(run), run["method"], run["seed"])
        if run["status"] == "finished" and key in seen:
            raise EchelonError(f"two finished runs of {run['method']}, size {run['size']}, seed {run['seed']}")
        if run["status"] == "finished":
            seen.add(key)


def _places(study: Json) -> list[tuple[str, int, int]]:
    return [(e, s, a) for e in study["environments"] for s in study["sizes"] for a in study["agents"]]


def _order(study: Json, run: Run) -> tuple[Any, ...]:
    keys = ("environments", "sizes", "agents", "methods", "seeds")
    values = (*place_of(run), run["method"], run["seed"])
    # What the study doesn't name comes last, in its own order.
    return tuple((study[k].index(v) if v in study[k] else len(study[k]), v) for k, v in zip(keys, values, strict=True))


def _of(runs: Iterable[Run], method: str, place: tuple[str, int, int]) -> list[Run]:
    return [r for r in runs if r["method"] == method and place_of(r) == place]


def _tasks(runs: Iterable[Run], method: str, environment: str) -> dict[tuple[str, int, int], list[Run]]:
    """A method's runs by place: the strata of an aggregate."""
    tasks: dict[tuple[str, int, int], list[Run]] = {}
    for run in runs:
        if run["method"] == method and run["environment"] == environment:
            tasks.setdefault(place_of(run), []).append(run)
    return tasks


def _ids(runs: Iterable[Run]) -> list[str]:
    return [r["id"] for r in runs]


def _tsr(runs: Iterable[Run], which: str = "last") -> list[float]:
    return [float(r[which]["tsr"]) for r in runs]


def _json(interval: Interval | None) -> Json | None:
    return None if interval is None else asdict(interval)


def _over_runs(values: Sequence[float | np.floating[Any]]) -> Json | None:
    """The mean over runs of what can't be negative, with Student's interval; one run has none."""
    told = mean_with_interval([float(v) for v in values])
    if told is not None and told["low"] is not None:
        told["low"] = max(0.0, told["low"])
    return told


# Cells: one method in one place ----------------------------------------------------------------------------------


def _cell(place: tuple[str, int, int], method: str, runs: list[Run], boot: Json) -> Json:
    cell: Json = dict(zip(("environment", "size", "agents"), place, strict=True))
    learners = [c for c in map(_converged, runs) if c is not None]
    steps = _mean_time(learners, max(r["steps"] for r in runs), boot) if learners else None
    areas = [_area(r) for r in runs if len(r["evaluations"]) > 1]
    return cell | {
        "method": method,
        "runs": _ids(runs),
        "seeds": [r["seed"] for r in runs],
        "tsr": _json(_rate(runs, "last", boot)),
        "tsr_pooled": _json(_pooled(runs)),
        "tsr_best": _json(_rate(runs, "best", boot)),
        "steps_to_finish": _over_runs([s for s in map(_finishing, runs) if s is not None]),
        "makespan": _over_runs([np.mean(r["last"]["steps"]) for r in runs]),
        "collisions": _over_runs([np.mean(r["last"]["collisions"]) for r in runs]),
        "curve": _curve(runs, boot),
        "auc": _json(stratified_bootstrap(mean_score, [areas], **boot)) if areas else None,
        "convergence": {"steps": steps, "converged": sum(c.converged for c in learners), "runs": len(learners)},
        "training_seconds": _mean([r["training_seconds"] for r in runs]),
        "steps_per_second": _mean([r["steps_per_second"] for r in runs if r["learns"]]),
        "model_calls": _mean([model_part(r, "calls") for r in runs]),
        "model_seconds": _mean([model_part(r, "seconds") for r in runs]),
        "planner_ms_per_episode": _mean([p for p in map(planner_ms, runs) if p is not None]),
    }


def _rate(runs: list[Run], which: str, boot: Json) -> Interval | None:
    """Mean success rate over runs: of the bootstrap over runs and all episodes' Wilson interval the wider at each end.

    Runs that happen to agree would leave the bootstrap narrower than the noise of their episodes.
    """
    if not runs:
        return None
    drawn, noise = stratified_bootstrap(mean_score, [_tsr(runs, which)], **boot), _pooled(runs, which)
    assert drawn is not None and noise is not None
    return wider(drawn, noise)


def _pooled(runs: list[Run], which: str = "last") -> Interval | None:
    return wilson(*episodes_won(runs, which)) if runs else None


def _finishing(run: Run) -> float | None:
    taken = [s for s, success in zip(run["last"]["steps"], run["last"]["success"], strict=True) if success]
    return float(np.mean(taken)) if taken else None


def _curve(runs: list[Run], boot: Json) -> Json | None:
    """TSR over training, at the steps that all runs were evaluated at.

    Runs that spend steps on branches are evaluated at steps of their own: then at those of the first run as far as all
    of them go, the others' between two evaluations on the line through these.
    """
    by_run = [{e["step"]: e["tsr"] for e in r["evaluations"]} for r in runs]
    steps = sorted(set.intersection(*map(set, by_run))) if by_run else []
    if len(steps) < min(map(len, by_run), default=0):
        steps = [s for s in by_run[0] if s <= min(map(max, by_run))]
    if len(steps) < 2:
        return None
    curves = [np.interp(steps, list(c), list(c.values())) for c in by_run]
    points = [stratified_bootstrap(mean_score, [values], **boot) for values in np.stack(curves, axis=1)]
    return {"steps": steps} | {k: [getattr(p, k) for p in points] for k in ("value", "low", "high")}


def _area(run: Run) -> float:
    return area_under_curve([e["step"] for e in run["evaluations"]], [e["tsr"] for e in run["evaluations"]])


def _converged(run: Run) -> Convergence | None:
    """When a run that learns converged (see `convergence_time`); None for one that doesn't, or was never evaluated.

    A method's last rollout may end a little after the study's steps, one's later than another's: none counts as more.
    """
    curve = run["evaluations"]
    if not run["learns"] or len(curve) < 2:
        return None
    episodes = min(e["episodes"] for e in curve)
    found = convergence_time([e["step"] for e in curve], [e["tsr"] for e in curve], episodes=episodes)
    return replace(found, step=min(found.step, run["steps"]), after=min(found.after, run["steps"]))


def model_part(run: Mapping[str, Any], what: str = "calls") -> float:
    """A language model's "calls" or "seconds" in a run's training and in its last evaluation."""
    return float(run[f"training_model_{what}"] + run["last"]["plans"].get(f"model_{what}", 0))


def planner_ms(run: Mapping[str, Any]) -> float | None:
    """Milliseconds of planning in an episode of a run's last evaluation; None for what doesn't plan."""
    plans = run["last"]["plans"]
    seconds = plans.get("planner_seconds", plans.get("model_seconds"))
    return None if seconds is None else 1000 * seconds / run["last"]["episodes"]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


# Aggregates over the places of an environment --------------------------------------------------------------------


def _common_places(environment: str, runs: list[Run], methods: Sequence[str]) -> Json:
    """The places and methods that aggregates are over: each of the methods has finished runs in each of the places.

    Else a method without runs on the hardest map would look the better for it. What lacks the largest share goes
    first, a place before a method, until nothing is missing.
    """
    have = {m: set(_tasks(runs, m, environment)) for m in methods}
    have = {m: found for m, found in have.items() if found}
    places = list(dict.fromkeys(place_of(r) for r in runs if r["environment"] == environment))
    every, dropped = list(have), []
    while have:
        gaps: dict[Any, float] = {p: float(np.mean([p not in found for found in have.values()])) for p in places}
        gaps |= {m: float(np.mean([p not in found for p in places])) for m, found in have.items()}
        worst = max(gaps, key=lambda key: gaps[key])
        if not gaps[worst]:
            break
        if worst in places:
            places.remove(worst)
            dropped.append(worst)
        else:
            del have[worst]
    # What was lacking may have lain in what was left out later.
    kept = [m for m in every if m in have or (have and all(_of(runs, m, p) for p in places))]
    places += [p for p in dropped if have and all(_of(runs, m, p) for m in kept)]
    dropped = [p for p in dropped if p not in places]
    have = {m: have.get(m, set()) for m in kept}
    words = [
        f"{_label(p)} is left out: {_and([m for m in every if not _of(runs, m, p)])} "
        f"{'has' if sum(not _of(runs, m, p) for m in every) == 1 else 'have'} no finished run there."
        for p in dropped
    ]
    for m in (m for m in every if m not in have):
        lacks = _and([_label(p) for p in places if not _of(runs, m, p)])
        words.append(f"{m} is left out: it has no finished run at {lacks}.")
    return {
        "places": [{"size": size, "agents": agents} for _, size, agents in places if have],
        "methods": list(have),
        "words": words,
    }


def _label(place: tuple[str, int, int]) -> str:
    return f"{place[1]}×{place[1]} with {place[2]} agent{'' if place[2] == 1 else 's'}"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _shared(environment: str, method: str, common: Json, runs: list[Run]) -> list[list[Run]]:
    """A method's runs in the common places; none for a method that is left out."""
    if method not in common["methods"]:
        return []
    return [_of(runs, method, (environment, p["size"], p["agents"])) for p in common["places"]]


def _aggregate(environment: str, method: str, common: Json, runs: list[Run], boot: Json) -> Json:
    tasks = _shared(environment, method, common, runs)
    scores = [_tsr(task) for task in tasks]
    statistics: dict[str, Callable[..., Any]] = {
        "iqm": iqm,
        "mean": mean_score,
        "median": median_score,
        "optimality_gap": optimality_gap,
    }
    intervals = {k: _json(stratified_bootstrap(f, scores, **boot)) if scores else None for k, f in statistics.items()}
    return {"environment": environment, "method": method, **intervals, "runs": [i for t in tasks for i in _ids(t)]}


def _profile(environment: str, common: Json, runs: list[Run], boot: Json) -> Json:
    """Performance profiles with pointwise intervals."""
    lines = {}
    for method in common["methods"]:
        scores = [_tsr(task) for task in _shared(environment, method, common, runs)]
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
            single, p, difference, reason = pair.p_single, pair.p, pair.difference, None
            if p is None:
                # No spread between the runs of either: only their episodes can tell.
                difference = difference_of_means(success_rate([cells[a]]), success_rate([cells[b]]))
                if _poolable(cells[a], cells[b]):
                    single = p = _fisher(cells[a], cells[b])
                else:
                    reason = f"fewer than {ENOUGH} runs of each agree by chance, which says nothing of how runs differ"
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
                    "by": posthoc if pair.p is not None else None if p is None else "fisher",
                    "reason": reason,
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


def _poolable(a: list[Run], b: list[Run]) -> bool:
    """Whether episodes of runs that all agree may stand for themselves: enough runs, or all episodes end alike."""
    return min(len(a), len(b)) >= ENOUGH or {*_tsr(a), *_tsr(b)} <= {0.0, 1.0}


def _fisher(a: list[Run], b: list[Run]) -> float:
    (won_a, all_a), (won_b, all_b) = episodes_won(a), episodes_won(b)
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
        # Groups without spread are in the share of variation, but not in Welch's test.
        tested = [m for m in test["methods"] if m not in test["without_spread"]]
        whom = _and(tested) if test["without_spread"] else "methods"
        verdict = (
            f"Success rates differ between {whom} by more than chance explains"
            if test["p"] < ALPHA
            else f"Chance alone could explain the differences between {whom}"
        )
        # Rounded down: 99.8% is not all.
        share = f"; {int(100 * test['eta_squared'])}% of all variation between runs comes from the method"
        words.append(f"{verdict} ({name}, {_p(test['p'])}{'' if test['without_spread'] else share}).")
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
    if pair["p"] is None:
        return f"{a} is ahead of {b} by {points}; there is no p-value: {pair['reason']}."
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
    here = {m: [(r, c) for r in _of(runs, m, place) if (c := _converged(r)) is not None] for m in methods}
    here = {m: found for m, found in here.items() if found}
    horizon = max((r["steps"] for found in here.values() for r, _ in found), default=None)
    times = {m: [c.time for _, c in found] for m, found in here.items()}
    events = {m: [c.converged for _, c in found] for m, found in here.items()}
    logrank = []
    for i, b in enumerate(b for b in BASELINES if b in here):
        # Each pair of baselines once.
        for a in (a for a in here if a != b and a not in BASELINES[:i]):
            result = log_rank(times[a], events[a], times[b], events[b])
            statistic, p = (None, None) if result is None else result
            logrank.append({"a": a, "b": b, "statistic": statistic, "p": p, "p_holm": None})
    return dict(zip(("environment", "size", "agents"), place, strict=True)) | {
        "horizon": horizon,
        "grid": max((c.step - c.after for found in here.values() for _, c in found), default=0),
        "methods": [
            {
                "method": m,
                "runs": _ids(r for r, _ in found),
                "times": times[m],
                "converged": events[m],
                "restricted_mean": _mean_time([c for _, c in found], float(horizon or 0), boot),
            }
            for m, found in here.items()
        ],
        "logrank": logrank,
    }


def _mean_time(found: Sequence[Convergence], horizon: float, boot: Json) -> Json:
    """The restricted mean time to convergence; its interval is no narrower than the gaps between evaluations."""
    events = [c.converged for c in found]
    early, time, late = (
        restricted_mean(times, events, horizon, **boot)
        for times in ([c.after for c in found], [c.time for c in found], [c.step for c in found])
    )
    return asdict(wider(time, Interval(time.value, early.value, late.value)))


def _adjust_logrank(survival: list[Json]) -> None:
    """Holm's correction over all log-rank tests of the study."""
    tests = [test for place in survival for test in place["logrank"]]
    for test, p in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = p
