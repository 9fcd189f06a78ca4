"""A study's collected results, made up but of a believable shape: what tests of the analysis and of the report read.

No numbers here were measured. Curves rise to a level that depends on method and size, episodes of one world are
paired over methods, one run failed, one is pending, QMIX and random goals never converge on the largest map.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

METHODS = ("l2m2", "flat-mappo", "qmix", "llm-only", "random-goals", "rule-goals", "classical")
UNTRAINED = ("llm-only", "classical")
ASKS_A_MODEL = ("l2m2", "llm-only")
# The success rate that a method reaches, at sizes 10, 20 and 50 (between them: interpolated).
LEVELS: dict[str, tuple[float, float, float]] = {
    "l2m2": (0.995, 0.97, 0.84),
    "rule-goals": (1.0, 0.99, 0.93),
    "flat-mappo": (0.97, 0.83, 0.35),
    "qmix": (0.88, 0.55, 0.12),
    "llm-only": (0.06, 0.03, 0.0),
    "random-goals": (0.08, 0.02, 0.0),
    "classical": (1.0, 1.0, 1.0),
}
# The share of the training after which about two thirds of that level are reached, and makespan over `classical`.
PACE = {"l2m2": 0.08, "rule-goals": 0.07, "flat-mappo": 0.16, "qmix": 0.25, "random-goals": 0.2}
SLOWNESS = {"l2m2": 1.15, "rule-goals": 1.1, "flat-mappo": 1.3, "qmix": 1.5, "llm-only": 1.8, "random-goals": 2.0}


def synthetic_results(
    *,
    name: str = "made-up",
    methods: Sequence[str] = METHODS,
    environments: Sequence[str] = ("warehouse",),
    sizes: Sequence[int] = (10, 20, 50),
    agents: Sequence[int] = (4,),
    seeds: Sequence[int] = (0, 1, 2, 3),
    steps: int = 2_000_000,
    every: int = 100_000,
    episodes: int = 32,
    final_episodes: int = 320,
    failed: Sequence[tuple[str, int, int]] = (("flat-mappo", 50, 1),),
    pending: Sequence[tuple[str, int, int]] = (("qmix", 50, 3),),
    levels: Mapping[str, float | tuple[float, float, float]] | None = None,
    spread: float = 0.02,
    seed: int = 0,
) -> dict[str, Any]:
    """A results.json document (format 1).

    Args:
        name: the study's name.
        methods, environments, sizes, agents, seeds: the matrix of runs.
        steps: environment steps of a run's training; every: steps between two evaluations.
        episodes, final_episodes: of an evaluation in training, of the last one.
        failed, pending: (method, size, seed) of runs that aren't finished.
        levels: other final success rates than LEVELS, one number or one for each of the sizes 10, 20, 50.
        spread: standard deviation of the level over seeds (0: no difference but chance of episodes).
        seed: of the made-up chance.
    """
    known = {**LEVELS, **(levels or {})}
    runs = []
    for environment in environments:
        for size in sizes:
            for count in agents:
                for method in methods:
                    for run_seed in seeds:
                        run = _head(environment, size, count, method, run_seed, steps)
                        runs.append(run)
                        if (method, size, run_seed) in failed:
                            run["status"] = "failed"
                            run["reason"] = f"training diverged at step {steps // 3:,}: the loss is not a number"
                        elif (method, size, run_seed) in pending:
                            run["status"] = "pending"
                        else:
                            level = _level(known.get(method, 0.5), size)
                            run.update(_measured(run, level, spread, every, episodes, final_episodes, seed))
    return {
        "format": 1,
        "study": {
            "name": name,
            "title": "Made-up numbers for tests",
            "methods": list(methods),
            "environments": list(environments),
            "sizes": list(sizes),
            "agents": list(agents),
            "seeds": list(seeds),
            "steps": steps,
            "protocol": {"every": every, "episodes": episodes, "final_episodes": final_episodes},
        },
        "machine": {
            "processor": "a made-up processor",
            "cores": 2,
            "system": "Linux",
            "versions": {"python": "3.11.7", "echelon": "0.0.0", "torch": "2.6.0", "numpy": "2.0.0"},
        },
        "runs": runs,
    }


def _head(environment: str, size: int, agents: int, method: str, seed: int, steps: int) -> dict[str, Any]:
    label = f"{environment}-s{size}-a{agents}-{method}-seed{seed}"
    return {
        "id": f"{label}-{hashlib.sha256(label.encode()).hexdigest()[:8]}",
        "method": method,
        "environment": environment,
        "size": size,
        "agents": agents,
        "seed": seed,
        "steps": steps,
        "status": "finished",
        "reason": None,
    }


def _level(level: float | tuple[float, float, float], size: int) -> float:
    return float(np.interp(size, (10, 20, 50), level)) if isinstance(level, tuple) else float(level)


def _measured(
    run: dict[str, Any], level: float, spread: float, every: int, episodes: int, final_episodes: int, seed: int
) -> dict[str, Any]:
    method, size, steps = run["method"], run["size"], run["steps"]
    learns = method not in UNTRAINED
    # The worlds belong to environment, size, agents and seed; the luck to the run.
    worlds = _generator(seed, run["environment"], size, run["agents"], run["seed"])
    luck = _generator(seed, run["id"])
    if 0.0 < level < 1.0:
        level = float(np.clip(level + spread * luck.standard_normal(), 0.0, 1.0))
    pace = PACE.get(method, 0.1) * steps * (0.6 + size / 40) * float(np.exp(0.1 * luck.standard_normal()))

    def rate(step: int) -> float:
        if not learns:
            return level
        rise = 1.0 - np.exp(-((step / pace) ** 1.5))
        return float(level * rise / (1.0 - np.exp(-((steps / pace) ** 1.5))))

    evaluations = []
    for step in range(0, steps + 1, every) if learns else (0,):
        success = int((luck.random(episodes) < rate(step)).sum())
        evaluations.append(
            {
                "step": step,
                "episodes": episodes,
                "success": success,
                "tsr": success / episodes,
                "steps_to_finish": round(3.1 * size * SLOWNESS.get(method, 1.0), 2) if success else None,
                "collisions": round(float(luck.gamma(4.0, 0.1 * run["agents"])), 3),
                "task_return": round(4.0 * success / episodes + float(0.1 * luck.standard_normal()), 3),
            }
        )
    hardness, length = worlds.random(final_episodes), 2.0 * size + size * worlds.gamma(4.0, 0.25, final_episodes)
    last = _final(run, level, hardness, length, luck, steps if learns else 0)
    best = last
    if learns and luck.random() < 0.5:
        best = _final(run, min(1.0, 1.02 * level), hardness, length, luck, steps - every)
    calls = 40 * size if method == "l2m2" else 0
    return {
        "evaluations": evaluations,
        "best": best,
        "last": last,
        "training_seconds": round(steps / 20_000 * float(luck.uniform(0.9, 1.1)), 2) if learns else 0.0,
        "steps_per_second": round(20_000 / (size / 10) ** 0.3 * float(luck.uniform(0.9, 1.1)), 1) if learns else 0.0,
        "evaluation_seconds": round(float(luck.uniform(5, 15)), 2),
        "training_model_calls": calls,
        "training_model_tokens": 300 * calls,
        "training_model_seconds": 0.02 * calls,
        "learns": learns,
    }


def _final(
    run: dict[str, Any],
    level: float,
    hardness: np.ndarray,
    length: np.ndarray,
    luck: np.random.Generator,
    step: int,
) -> dict[str, Any]:
    """An absolute metric: a hard world is hard for every method, up to some luck of the run."""
    method, size, count = run["method"], run["size"], len(hardness)
    limit = 10 * size
    success = np.where(luck.random(count) < 0.7, hardness, luck.random(count)) < level
    taken = np.clip(length * SLOWNESS.get(method, 1.0) * luck.uniform(0.95, 1.05, count), 1, limit - 1)
    bumps = 0.4 * run["agents"] * (0.1 if method == "classical" else 1.0)
    return {
        "step": step,
        "episodes": count,
        "tsr": float(success.mean()),
        "success": [int(s) for s in success],
        "steps": [int(t) if s else limit for s, t in zip(success, taken, strict=True)],
        "collisions": [int(c) for c in luck.poisson(bumps, count)],
        "task_return": [round(4.0 * int(s) + float(r), 3) for s, r in zip(success, luck.random(count), strict=True)],
        "seconds": round(float(luck.uniform(2, 6)), 2),
        "plans": _plans(method, count),
    }


def _plans(method: str, episodes: int) -> dict[str, float]:
    """Counts of subgoals, none for those that set none, and of the language model's part where there is one."""
    if method not in ("l2m2", "llm-only", "random-goals", "rule-goals"):
        return {}
    plans: dict[str, float] = {"given": 6 * episodes, "reached": 5 * episodes, "rejected_unreachable": episodes // 20}
    if method in ASKS_A_MODEL:
        calls = 3 * episodes
        plans |= {"model_questions": 2 * calls, "model_calls": calls, "model_prompt_tokens": 300 * calls}
        plans["model_seconds"] = round(0.02 * calls, 3)
    return plans


def _generator(seed: int, *what: object) -> np.random.Generator:
    digest = hashlib.sha256(repr(what).encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])
