"""What a planner that learns is worth: imitation, HiPER and HiMAC against the untouched model and rules.

Three parts, each of which takes up what an earlier call has finished:

- `planners`: for each seed, a planner by imitation of `hungarian`, and from it one by HiMAC and one by HiPER, on random
  scenes of three worlds, many sizes and teams (`echelon train-planner`);
- `proof`: warehouse, search and repair at 20x20 with 4 robots, the same learned executors (trained under `hungarian`)
  for every planner of a seed: success rate and makespan (steps until all is done, the time limit where that fails);
- `unseen`: scenes with other seeds, sizes up to 40x40 and teams from 2 to 16, classical executors.

    python benchmarks/planner_proof.py planners proof unseen --out DIR --json docs/results/learned-planners.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from echelon._files import atomic_write_json
from echelon.building import build_planner
from echelon.configs import RunConfig
from echelon.envs import GridConfig, RepairConfig, SearchConfig, WarehouseConfig, env_name, make
from echelon.evaluation.episodes import evaluate
from echelon.executors import PIBTExecutor
from echelon.planner_training import PlannerConfig, PlannerTrainer, random_scene
from echelon.planners import make_rule_planner
from echelon.planners.base import Planner
from echelon.rollout import TeamWorlds
from echelon.runs import load_policy, processor, steps_done
from echelon.subgoals import FEATURES, SubgoalConfig
from echelon.training import Trainer

ENVS: dict[str, GridConfig] = {
    "warehouse": WarehouseConfig(size=20, num_agents=4, num_packages=8),
    "search": SearchConfig(size=20, num_agents=4),
    "repair": RepairConfig(size=20, num_agents=4),
}
RULES = ("random-task", "nearest", "hungarian")
MODELS = ("untouched", "imitation", "himac", "hiper")


def planners(out: Path, seeds: int, iterations: int, imitation: int) -> None:
    """Train what isn't trained yet."""
    for seed in range(seeds):
        first = PlannerConfig(seed=seed, imitation=imitation, algorithm="none", iterations=0, threads=2)
        train(first, out / f"imitation-{seed}")
        model = f"hf:{out / f'imitation-{seed}' / 'planner'}"
        for algorithm, review in (("himac", 0), ("hiper", 10)):
            config = PlannerConfig(seed=seed, model=model, imitation=0, algorithm=algorithm, iterations=iterations,
                                   review=review, threads=2)  # type: ignore[arg-type]  # fmt: skip
            train(config, out / f"{algorithm}-{seed}")


def train(config: PlannerConfig, folder: Path) -> None:
    """Train one planner, or go on with it."""
    start = time.time()
    PlannerTrainer(config, folder).run()
    print(f"{folder.name}: {time.time() - start:.0f} s", flush=True)


def planner_spec(name: str, seed: int, out: Path) -> str:
    """What `--planner` calls a planner of the proof."""
    if name in RULES:
        return name
    return "llm:smollm2-135m" if name == "untouched" else f"llm:hf:{out / f'{name}-{seed}' / 'planner'}"


def proof(out: Path, seeds: int, steps: int, episodes: int) -> dict[str, Any]:
    """Success and makespan of each planner, world and seed, with one team of executors a world and seed."""
    found: dict[str, Any] = {}
    for world, env in ENVS.items():
        for seed in range(seeds):
            folder = out / f"executors-{world}-{seed}"
            run = RunConfig(method="rule-goals", env=env, seed=seed, steps=steps)
            if not (folder / "config.toml").exists():
                Trainer(run, folder).run()
            elif steps_done(folder) < steps:
                Trainer.resume(folder, steps=steps).run()
            policy = load_policy(folder)[1]
            for name in (*RULES, *MODELS):
                config = dataclasses.replace(run, method="l2m2", planner=planner_spec(name, seed, out))
                if name == "hiper":
                    config = dataclasses.replace(config, subgoals=SubgoalConfig(review=10))
                results = evaluate(config, policy, episodes=episodes)
                assert results is not None
                makespan = np.where(results.success, results.steps, env.limit or 10 * env.size)
                cell = found.setdefault(world, {}).setdefault(name, {"tsr": [], "makespan": []})
                cell["tsr"].append(float(results.success.mean()))
                cell["makespan"].append(float(makespan.mean()))
                print(world, seed, name, round(cell["tsr"][-1], 3), round(cell["makespan"][-1], 2), flush=True)
    return found


def unseen(out: Path, seeds: int, scenes: int, worlds: int, shipped: str | None = None) -> dict[str, Any]:
    """Every planner in scenes that training never saw; `hungarian` in the same."""
    wide = PlannerConfig(min_size=8, max_size=40)
    found: dict[str, Any] = {}
    names = [(name, seed) for name in MODELS for seed in range(seeds if name != "untouched" else 1)]
    specs = {f"{name}-{seed}": (planner_spec(name, seed, out), 10 if name == "hiper" else 0) for name, seed in names}
    specs |= {name: (name, 0) for name in RULES}
    if shipped is not None:
        specs["shipped"] = (f"llm:{shipped}", 0)
    for label, (spec, review) in specs.items():
        planner = make_rule_planner(spec) if spec in RULES else build_planner(spec, RunConfig(planner=spec))
        for k in range(scenes):
            rng = np.random.Generator(np.random.Philox(key=424242, counter=[0, k, 0, 0]))
            env = random_scene(k, wide, rng)
            won, took = play(env, worlds, int(rng.integers(1 << 31)), planner, review)
            cell = found.setdefault(env_name(env), {}).setdefault(label, {"tsr": [], "makespan": []})
            cell["tsr"].append(float(won.mean()))
            cell["makespan"].append(float(took.mean()))
        print(label, {w: (round(np.mean(c[label]["tsr"]), 3), round(np.mean(c[label]["makespan"]), 1))
                      for w, c in found.items()}, flush=True)  # fmt: skip
    return found


def play(env: GridConfig, count: int, seed: int, planner: Planner, review: int) -> tuple[Any, Any]:
    """Every world's first episode under classical executors: success and makespan."""
    worlds = TeamWorlds(make(env_name(env), env, num_envs=count, seed=seed, extra_features=FEATURES),
                        [(planner, np.ones(count, bool))], SubgoalConfig(review=review), gamma=0.99, seed=seed)  # fmt: skip
    executor, e = PIBTExecutor(worlds), worlds.env
    worlds.start()
    running, won, took = np.ones(count, bool), np.zeros(count, bool), np.full(count, e.limit)
    while running.any():
        worlds.advance(executor.act(worlds))
        ended = running & (e.terminated | e.truncated)
        won[ended], took[ended] = e.terminated[ended], e.steps[ended]
        running &= ~ended
        worlds.active = running.copy()
        worlds.settle()
    return won, took


def compare(a: list[float], b: list[float]) -> dict[str, float]:
    """Paired over seeds: the mean difference, its 95% interval (Student) and the two-sided p."""
    d = np.array(a) - np.array(b)
    half = stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / len(d) ** 0.5 if len(d) > 1 else float("nan")
    p = float(stats.ttest_rel(a, b).pvalue) if len(d) > 1 and d.std() > 0 else 1.0
    return {"difference": float(d.mean()), "low": float(d.mean() - half), "high": float(d.mean() + half), "p": p}


def main() -> None:
    """Do the parts that are asked for, and write what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=("planners", "proof", "unseen"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--imitation", type=int, default=100)
    parser.add_argument("--steps", type=int, default=600_000)
    parser.add_argument("--episodes", type=int, default=400)
    parser.add_argument("--scenes", type=int, default=36)
    parser.add_argument("--worlds", type=int, default=64)
    parser.add_argument("--shipped")
    args = parser.parse_args()
    torch.set_num_threads(1)
    told = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    told |= {"processor": processor(), "seeds": args.seeds, "iterations": args.iterations, "imitation": args.imitation}
    if "planners" in args.parts:
        planners(args.out, args.seeds, args.iterations, args.imitation)
    if "proof" in args.parts:
        told["proof"] = proof(args.out, args.seeds, args.steps, args.episodes)
        told["against_imitation"] = {
            world: {name: {m: compare(cells[name][m], cells["imitation"][m]) for m in ("tsr", "makespan")}
                    for name in ("himac", "hiper")}
            for world, cells in told["proof"].items()
        }  # fmt: skip
    if "unseen" in args.parts:
        told["unseen"] = unseen(args.out, args.seeds, args.scenes, args.worlds, args.shipped)
    if args.json:
        atomic_write_json(args.json, told)


if __name__ == "__main__":
    main()
