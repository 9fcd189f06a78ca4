r"""What a planner that learns is worth: imitation, HiPER and HiMAC against the untouched model and rules.

Five parts, each of which takes up what an earlier call has finished:

- `planners`: for each seed, a planner by imitation of `hungarian`, and from it one by HiMAC and one by HiPER, on random
  scenes of three worlds, many sizes and teams (`echelon train-planner`);
- `proof`: warehouse, search and repair at 20x20 with 4 robots, the same learned executors (trained under `hungarian`)
  for every planner of a seed: success rate and makespan (steps until all is done, the time limit where that fails);
- `confirm`: what reinforcement adds to imitation, once more in 2,000 worlds that `proof` did not use;
- `unseen`: scenes with other seeds, sizes up to 40x40 and teams from 2 to 16, classical executors.

    python benchmarks/planner_proof.py planners proof confirm unseen curves --out DIR \
        --json docs/results/learned-planners.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from echelon._files import atomic_write_json
from echelon.algorithms.hiper import HiPERConfig
from echelon.building import build_planner
from echelon.configs import RunConfig
from echelon.envs import GridConfig, RepairConfig, SearchConfig, WarehouseConfig, env_name, make
from echelon.evaluation.episodes import evaluate
from echelon.executors import PIBTExecutor
from echelon.planner_training import PlannerConfig, PlannerTrainer, random_scene
from echelon.planners import make_rule_planner
from echelon.planners.base import Planner
from echelon.rollout import TeamWorlds, first_episodes
from echelon.runs import load_policy, processor, steps_done
from echelon.subgoals import FEATURES, SubgoalConfig
from echelon.training import Trainer

ENVS: dict[str, GridConfig] = {
    "warehouse": WarehouseConfig(size=20, num_agents=4, num_packages=8),
    "search": SearchConfig(size=20, num_agents=4),
    "repair": RepairConfig(size=20, num_agents=4),
}
RULES = ("random-task", "nearest", "hungarian")
LEARNERS = ("himac", "hiper")
MODELS = ("untouched", "untrained", "imitation", *LEARNERS)


def planners(out: Path, seeds: list[int], threads: int | None) -> None:
    """Train what isn't trained yet."""
    for seed in seeds:
        # The control: asked and joined as the others are, and taught nothing.
        train(PlannerConfig(seed=seed, imitation=0, algorithm="none", threads=threads), out / f"untrained-{seed}")
        first = PlannerConfig(seed=seed, algorithm="none", iterations=0, threads=threads)
        train(first, out / f"imitation-{seed}")
        model = f"hf:{out / f'imitation-{seed}' / 'planner'}"
        common: dict[str, Any] = {"seed": seed, "model": model, "imitation": 0, "threads": threads}
        train(PlannerConfig(algorithm="himac", **common), out / f"himac-{seed}")
        # Critics learn from every turn, which takes longer than comparing episodes: about the same time in all.
        hiper = HiPERConfig(critic_warmup=1, critic_epochs=4)
        train(
            PlannerConfig(algorithm="hiper", iterations=15, worlds=96, review=10, hiper=hiper, **common),
            out / f"hiper-{seed}",
        )


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


def proof(
    out: Path, seeds: int, steps: int, episodes: int, names: Sequence[str] = (*RULES, *MODELS), stream: int = 0
) -> dict[str, Any]:
    """Success and makespan of each planner, world and seed, with one team of executors a world and seed; another
    `stream` takes other worlds."""
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
            for name in names:
                config = dataclasses.replace(run, method="l2m2", planner=planner_spec(name, seed, out))
                if name == "hiper":
                    config = dataclasses.replace(config, subgoals=SubgoalConfig(review=10))
                results = evaluate(config, policy, episodes=episodes, stream=stream)
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
    names = [(name, seed) for name in MODELS for seed in range(1 if name.startswith("un") else seeds)]
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
                        [(planner, np.ones(count, bool))], SubgoalConfig(review=review), gamma=0.99,
                        seed=seed)  # fmt: skip
    executor = PIBTExecutor(worlds)
    worlds.start()
    return first_episodes(worlds, executor.act)


def curves(out: Path, seeds: int, steps: int, model: str) -> dict[str, Any]:
    """Hierarchies that learn at both levels against flat teams: success while they train, and afterwards."""
    found: dict[str, Any] = {"env": "warehouse 10x10, 2 robots, 3 packages", "steps": steps, "model": model}
    env = WarehouseConfig(size=10, num_agents=2, num_packages=3)
    for name in ("flat-mappo", "hiper", "hiper-gae", "flat-grpo", "himac", "l2m2"):
        cell: dict[str, Any] = {"curve": [], "tsr": [], "makespan": [], "seconds": []}
        for seed in range(seeds):
            folder = out / f"curve-{name}-{seed}"
            run = RunConfig(method=name, env=env, seed=seed, steps=steps, num_envs=64, model=model)
            if run.learner is not None:
                run = dataclasses.replace(run, growth=dataclasses.replace(run.growth, warm_start="off"))
            if not (folder / "config.toml").exists():
                Trainer(run, folder).run()
            elif steps_done(folder) < steps:
                Trainer.resume(folder).run()
            last = (folder / "timings.jsonl").read_text().splitlines()[-1]
            cell["seconds"].append(json.loads(last)["seconds"])
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            cell["curve"].append([(line["step"], line["tsr"]) for line in lines if line["tsr"] is not None])
            config, policy = load_policy(folder)
            results = evaluate(config, policy, episodes=400)
            assert results is not None
            cell["tsr"].append(float(results.success.mean()))
            cell["makespan"].append(float(np.where(results.success, results.steps, 10 * env.size).mean()))
            print(name, seed, cell["tsr"][-1], round(cell["makespan"][-1], 2), round(cell["seconds"][-1]), flush=True)
        found[name] = cell
    return found


def against(cells: dict[str, Any]) -> dict[str, Any]:
    """What reinforcement adds to imitation, by world, learner and measure."""
    return {
        world: {name: {m: compare(own[name][m], own["imitation"][m]) for m in ("tsr", "makespan")} for name in LEARNERS}
        for world, own in cells.items()
    }


def compare(a: list[float], b: list[float]) -> dict[str, float]:
    """Paired over seeds: the mean difference, its 95% interval (Student) and the two-sided p."""
    d = np.array(a) - np.array(b)
    half = stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / len(d) ** 0.5 if len(d) > 1 else float("nan")
    p = float(stats.ttest_rel(a, b).pvalue) if len(d) > 1 and d.std() > 0 else 1.0
    return {"difference": float(d.mean()), "low": float(d.mean() - half), "high": float(d.mean() + half), "p": p}


def interval(values: list[float]) -> str:
    """Mean and half of the 95% interval (Student) over seeds."""
    x = np.array(values)
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else 0.0
    return f"{x.mean():.3f} ± {half:.3f}" if x.mean() < 2 else f"{x.mean():.1f} ± {half:.1f}"


def differences(cells: dict[str, Any]) -> list[str]:
    """A Markdown table of what reinforcement adds to imitation."""
    lines = ["| world | learner | TSR | p | makespan | p |", "| --- | --- | --- | --- | --- | --- |"]
    for world, learners in against(cells).items():
        for name, found in learners.items():
            parts = [
                f"{x['difference']:+.3f} ({x['low']:+.3f} to {x['high']:+.3f}) | {x['p']:.3f}"
                for x in (found["tsr"], found["makespan"])
            ]
            lines += [f"| {world} | {name} | {parts[0]} | {parts[1]} |"]
    return [*lines, ""]


def tables(told: dict[str, Any]) -> str:
    """The figures as Markdown tables."""
    lines: list[str] = []
    if "proof" in told:
        lines += ["## The proof", ""]
        for world, cells in told["proof"].items():
            lines += [f"{world}, 20x20, 4 robots:", "", "| planner | TSR | makespan | against `hungarian` |",
                      "| --- | --- | --- | --- |"]  # fmt: skip
            best = np.mean(cells["hungarian"]["makespan"])
            for name, c in cells.items():
                ratio = np.mean(c["makespan"]) / best
                lines += [f"| {name} | {interval(c['tsr'])} | {interval(c['makespan'])} | {ratio:.3f} |"]
            lines += [""]
        lines += ["Against imitation, paired over seeds (makespan: less is better):", "", *differences(told["proof"])]
    if "confirm" in told:
        lines += ["The same in 2,000 other worlds a seed:", "", *differences(told["confirm"])]
    if "unseen" in told:
        lines += ["## Unseen maps, sizes and teams", ""]
        lines += ["| world | planner | TSR | of hungarian's | makespan | of hungarian's |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        for world, cells in told["unseen"].items():
            base = cells["hungarian"]
            names = dict.fromkeys(label.rsplit("-", 1)[0] if label[-1].isdigit() else label for label in cells)
            for name in names:
                own = [c for label, c in cells.items() if label == name or label.rsplit("-", 1)[0] == name]
                t, m = (float(np.mean([np.mean(c[k]) for c in own])) for k in ("tsr", "makespan"))
                lines += [f"| {world} | {name} | {t:.3f} | {t / np.mean(base['tsr']):.3f} | {m:.1f} "
                          f"| {m / np.mean(base['makespan']):.3f} |"]  # fmt: skip
        lines += [""]
    if "curves" in told:
        c = told["curves"]
        lines += ["## Two levels against one", "", f"{c['env']}, {c['steps']:,} steps, 64 worlds:", ""]
        lines += ["| method | TSR at 1/4 of the steps | at 1/2 | afterwards, 400 episodes | makespan | training |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        for name, cell in c.items():
            if not isinstance(cell, dict):
                continue
            parts = [[float(np.mean([t for step, t in curve if abs(step / c["steps"] - at) < 0.13] or [0]))
                      for curve in cell["curve"]] for at in (0.25, 0.5)]  # fmt: skip
            lines += [f"| {name} | {interval(parts[0])} | {interval(parts[1])} | {interval(cell['tsr'])} "
                      f"| {interval(cell['makespan'])} | {np.mean(cell['seconds']):.0f} s |"]  # fmt: skip
        lines += [""]
    return "\n".join(lines)


def main() -> None:
    """Do the parts that are asked for, and write what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=("planners", "proof", "confirm", "unseen", "curves"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--unseen-seeds", type=int, default=5, help="of the planners in unseen scenes")
    parser.add_argument("--steps", type=int, default=400_000)
    parser.add_argument("--episodes", type=int, default=400)
    parser.add_argument("--scenes", type=int, default=36)
    parser.add_argument("--worlds", type=int, default=64)
    parser.add_argument("--shipped")
    parser.add_argument("--train", type=int, nargs="*", help="seeds of the planners to train now; default: all")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    told = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    told |= {"processor": processor(), "seeds": args.seeds}
    if "planners" in args.parts:
        planners(args.out, args.train or list(range(args.seeds)), args.threads)
    if "proof" in args.parts:
        told["proof"] = proof(args.out, args.seeds, args.steps, args.episodes)
    if "confirm" in args.parts:
        names = ("imitation", *LEARNERS)
        told["confirm"] = proof(args.out, args.seeds, args.steps, 2000, names, stream=1)
    if "unseen" in args.parts:
        told["unseen"] = unseen(args.out, args.unseen_seeds, args.scenes, args.worlds, args.shipped)
    if "curves" in args.parts:
        told["curves"] = curves(args.out, args.seeds, 200_000, args.shipped or "smollm2-135m-echelon")
    if args.json:
        atomic_write_json(args.json, told)
    print(tables(told))


if __name__ == "__main__":
    main()
