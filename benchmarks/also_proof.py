"""Whether shaping that is proposed, tried and promoted beats the task reward alone, at equal cost.

Sparse `warehouse` (100x100) with flat MAPPO and sparse `search` (40x40, 1 target, sensors of 3 cells) with QMIX:
`sparse`, `also`, `fixed-pbrs`, `also-one-shot`, and `also` with a poisonous proposer, 5 seeds each; `search-easy` is a
search in which the task reward alone does well, too. Curves are over all environment steps spent, those of branches
counted. What is finished is not done again. `warehouse-easy` (40x40, twice two proposals) is for the poison: its task
reward alone leads to nearly full success well before the end.

    python benchmarks/also_proof.py warehouse search --out DIR --json docs/results/also.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from echelon._files import atomic_write_json
from echelon.also import AlsoConfig, AlsoTrainer, also_from_toml
from echelon.runs import processor, versions
from echelon.shaping import Candidate, Proposed, ShapingConfig, Situation

WORLDS: dict[str, dict[str, Any]] = {
    "warehouse": {"base": "flat-mappo", "environment": "warehouse", "steps": 1_500_000,
                  "env": {"size": 100, "num_agents": 4},
                  "also": {"checkpoints": [0.02], "branch": 0.18, "candidates": 1, "evaluations": 5, "episodes": 32}},
    "search": {"base": "qmix", "environment": "search", "steps": 800_000,
               "env": {"size": 40, "num_agents": 3, "num_targets": 1, "sensor": 3},
               "algorithm": {"epsilon_steps": 30_000},
               "also": {"checkpoints": [0.02], "branch": 0.12, "candidates": 1, "evaluations": 6, "episodes": 128}},
    "search-easy": {"base": "qmix", "environment": "search", "steps": 1_000_000,
                    "env": {"size": 40, "num_agents": 3, "num_targets": 1},
                    "also": {"checkpoints": [0.02], "branch": 0.17, "candidates": 1, "evaluations": 5,
                             "episodes": 64}},
    "warehouse-easy": {"base": "flat-mappo", "environment": "warehouse", "steps": 2_000_000,
                       "env": {"size": 40, "num_agents": 4}, "also": {"episodes": 64}},
}  # fmt: skip
METHODS = ("sparse", "also", "fixed-pbrs", "also-one-shot", "poison", "sparse-explore")
# What helps least: to stand apart is all that pays, as much as it can.
POISON = {"warehouse": ("traffic",), "search": ("apart",)}
# Whether the task reward alone would do better with a learner that explores for longer, as it does by default.
EXPLORE: dict[str, dict[str, Any]] = {"search": {"algorithm": {}}}


class Poison:
    """Suggests the worst shaping that there is, each time at another strength."""

    name = "poison"

    def diagnose(self, situation: Situation) -> tuple[None, dict[str, Any]]:
        return None, {}

    def propose(self, situation: Situation, card: Any) -> Proposed:
        terms = dict.fromkeys(POISON[situation.terms.world], 1.0)
        past = len(situation.trials)
        configs = [ShapingConfig(f"poison-{past + k}", 1 - 0.1 * (past + k), terms) for k in range(situation.count)]
        return Proposed(tuple(Candidate(c.mode, "balanced", c) for c in configs), "uncertain", "moderate")

    def review(self, situation: Situation) -> tuple[None, dict[str, Any]]:
        return None, {}


def config_of(world: str, method: str, seed: int) -> AlsoConfig:
    """One run of the proof."""
    name = {"poison": "also", "sparse-explore": "sparse"}.get(method, method)
    changed = EXPLORE[world] if method == "sparse-explore" else {}
    return also_from_toml({**WORLDS[world], **changed, "method": name, "seed": seed, "workers": 1})


def one(world: str, method: str, seed: int, out: Path) -> dict[str, Any]:
    """Train a run, or take up what was trained; what came of it."""
    folder, began = out / f"{world}-{method}-{seed}", time.time()
    proposer = Poison() if method == "poison" else None
    if (folder / "config.toml").exists():
        trainer = AlsoTrainer.resume(folder, proposer=proposer)
        if trainer.config != config_of(world, method, seed):
            raise SystemExit(f"{folder} holds a run with other settings: move it away")
    else:
        trainer = AlsoTrainer(config_of(world, method, seed), folder, proposer=proposer)
    trainer.run()
    account = trainer.account
    promoted = [s["verdict"]["winner"] for s in account["stages"] if s["verdict"] and s["verdict"]["accepted"]]
    line = [
        (p["spent"], p["step"], round(p["tsr"], 4), round(p["task_return"] / account["best_return"], 4))
        for p in account["mainline"]
    ]
    spent = sum(stage["cost"] for stage in account["stages"])
    print(world, method, seed, f"{area(line, account['steps']):.3f}", account["final"], promoted,
          f"{time.time() - began:.0f} s", flush=True)  # fmt: skip
    return {"seed": seed, "curve": line, "in_branches": spent, "promoted": promoted, "steps": account["steps"]}


def methods_of(world: str, wanted: Sequence[str]) -> list[str]:
    """Those of the methods that are for a world."""
    return [name for name in wanted if name != "sparse-explore" or world in EXPLORE]


def area(line: list[tuple[int, int, float, float]], steps: int) -> float:
    """The mean return over the steps spent: at each moment that of the newest evaluation (best: 1)."""
    spent, value = np.array([p[0] for p in line]), np.array([p[3] for p in line])
    at = np.linspace(0, steps, 2001)
    newest = np.searchsorted(spent, at, side="right") - 1
    return float(np.where(newest >= 0, value[np.maximum(newest, 0)], value[0]).mean())


def last(line: list[tuple[int, int, float, float]], column: int) -> float:
    """The mean of the last five evaluations: `column` 2: success, 3: return."""
    return float(np.mean([p[column] for p in line[-5:]]))


def interval(values: list[float]) -> str:
    """Mean and half of the 95% interval (Student) over seeds."""
    x = np.array(values)
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else float("nan")
    return f"{x.mean():.3f} ± {half:.3f}"


def tables(told: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines: list[str] = []
    for world in WORLDS:
        if world not in told:
            continue
        cells = told[world]
        lines += [f"## {world}, {WORLDS[world]['base']}", "",
                  "| method | area under the curve | last return | last TSR | in branches | p of the area |",
                  "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
        base = [area(r["curve"], r["steps"]) for r in cells.get("sparse", [])]
        for method, runs in cells.items():
            areas = [area(r["curve"], r["steps"]) for r in runs]
            p = "" if method == "sparse" or len(base) != len(areas) else f"{stats.ttest_rel(areas, base).pvalue:.4f}"
            share = np.mean([r["in_branches"] / r["steps"] for r in runs])
            lines += [
                f"| {method} | {interval(areas)} | {interval([last(r['curve'], 3) for r in runs])} | "
                f"{interval([last(r['curve'], 2) for r in runs])} | {share:.0%} | {p} |"
            ]
        lines += [""]
    return "\n".join(lines)


def main() -> None:
    """Do the worlds that are asked for, and write what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("worlds", nargs="+", choices=tuple(WORLDS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--at-once", type=int, default=2, help="runs at once, each on one core")
    args = parser.parse_args()
    told = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    made_by = {"processor": processor(), "versions": versions()}
    told.setdefault("worlds", {}).update({world: WORLDS[world] | made_by for world in args.worlds})
    with ProcessPoolExecutor(args.at_once) as pool:
        # The first seed of everything comes first: what is interrupted has whole seeds.
        jobs = {
            (world, method, seed): pool.submit(one, world, method, seed, args.out)
            for seed in range(args.seeds) for world in args.worlds for method in methods_of(world, args.methods)
        }  # fmt: skip
        for world in args.worlds:
            for method in methods_of(world, args.methods):
                runs = [jobs[world, method, seed].result() for seed in range(args.seeds)]
                told.setdefault(world, {})[method] = runs
                if args.json:
                    atomic_write_json(args.json, told, compact=True)
    print(tables(told))


if __name__ == "__main__":
    main()
