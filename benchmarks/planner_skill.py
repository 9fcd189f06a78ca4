"""How well a language model chooses subgoals before any training, beside chance, and what a question costs.

Each question is one robot of a fresh scene, at most 8 open candidates (the nearest), asked with the planner's own
templates and with those in `prompts/letters`, which show all candidates and want the letter of one. Counted: how
often the most probable candidate is the nearest, how much longer the way of the chosen one is than of the nearest (and
of one drawn at random), and how often the first is chosen (a model that reads nothing has a favourite letter).
Candidates are asked in the order of their ids, which says nothing about distance, and once more in reverse. The
templates were chosen, among some thirty, by scenes of another seed (77).

Controls: the same with the rule turned round, and with the letters' meanings swapped. Who reads the words would
choose the farthest, or call the nearest B; whoever still gives A to the nearest has a habit with small numbers.

Timed on one thread, best of `--repeats`: 64 questions of the warehouse in batches of 1 and of 32, with an empty cache
for each batch, and 640 questions in batches of 32 from an empty cache on, as in a run, once.

    OMP_NUM_THREADS=1 python benchmarks/planner_skill.py [--model smollm2-135m] [--scenes 300] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from echelon.envs import GridConfig, RepairConfig, SearchConfig, WarehouseConfig, env_name, make
from echelon.evaluation import mean_interval, wilson
from echelon.llm import CausalChoiceModel, ChoicePrompt
from echelon.planners.llm import PROMPTS, LLMPlanner
from echelon.subgoals import FEATURES, PlanRequest, SubgoalConfig, SubgoalTracker

SEED = 2024
STYLES = {"each by itself": PROMPTS, "letters": PROMPTS / "letters"}
CONTROLS = {
    "control: long ways are good": ("Short ways", "Long ways"),
    "control: A is bad": ("A: good. B: bad.", "A: bad. B: good."),
}
WORLDS: tuple[GridConfig, ...] = (
    WarehouseConfig(size=20, num_agents=1, num_packages=8),
    RepairConfig(size=20, num_agents=1),
    SearchConfig(size=20, num_agents=1),
)


def questions(
    planner: LLMPlanner, config: GridConfig, scenes: int, *, reverse: bool = False
) -> list[tuple[np.ndarray, ChoicePrompt]]:
    """Path lengths and prompts of the scenes in which robot 0 has a choice."""
    env = make(env_name(config), config, num_envs=scenes, seed=SEED, extra_features=FEATURES)
    tracker = SubgoalTracker(env, SubgoalConfig(), 0.99, SEED)
    request: PlanRequest = tracker.request(np.arange(scenes), distance=True)
    assert request.distance is not None
    asked = []
    for i in range(scenes):
        options = planner.open(request, request.taken, i, 0)
        options = options[::-1] if reverse else options
        if len(options) > 1:
            asked.append((request.distance[i, 0, options].astype(int), planner.prompt(request, i, 0, options)))
    return asked


def skill(planner: LLMPlanner, config: GridConfig, scenes: int, *, reverse: bool) -> dict[str, Any]:
    """How often the nearest is chosen, and how long the detours are."""
    asked = questions(planner, config, scenes, reverse=reverse)
    scores = planner.model.score([prompt for _, prompt in asked])
    chosen = [int(score.logprobs.argmax()) for score in scores]
    extra = [int(lengths[c] - lengths.min()) for (lengths, _), c in zip(asked, chosen, strict=True)]
    return {
        "questions": len(asked),
        "options": float(np.mean([len(lengths) for lengths, _ in asked])),
        "nearest chosen": vars(wilson(extra.count(0), len(asked))),
        "chance": float(np.mean([(lengths == lengths.min()).mean() for lengths, _ in asked])),
        "extra steps": vars(mean_interval(extra)),
        "extra steps at random": float(np.mean([(lengths - lengths.min()).mean() for lengths, _ in asked])),
        "first option chosen": float(np.mean([c == 0 for c in chosen])),
        "prompt tokens": float(np.mean([score.prompt_tokens for score in scores])),
    }


def cost(model: str, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds a question; the styles take turns, so that a busy machine is busy for all."""
    found: dict[str, dict[str, float]] = {style: {} for style in STYLES}
    models = {style: CausalChoiceModel.load(model, threads=1, cache_size=0) for style in STYLES}
    prompts = {
        style: [prompt for _, prompt in questions(LLMPlanner(models[style], folder=folder), WORLDS[0], 640)]
        for style, folder in STYLES.items()
    }
    for _ in range(repeats + 1):  # the first turn also checks new batch shapes: as many again, one by one
        for size in (1, 32):
            for style in STYLES:
                start = time.perf_counter()
                for at in range(0, 64, size):
                    models[style].score(prompts[style][at : at + size])
                spent = (time.perf_counter() - start) / 64 * 1e3
                name = f"ms a question, batches of {size}"
                found[style][name] = min(found[style].get(name, np.inf), spent)
    for style in STYLES:
        fresh = CausalChoiceModel.load(model, threads=1)
        start = time.perf_counter()
        for at in range(0, 640, 32):
            fresh.score(prompts[style][at : at + 32])
        found[style]["ms a question, first 640 of a run"] = (time.perf_counter() - start) / 640 * 1e3
        found[style]["tokens computed a question, first 640 of a run"] = fresh.prompt_tokens / 640
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a model's name or hf:<folder>")
    parser.add_argument("--scenes", type=int, default=300, help="scenes an environment (default: 300)")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns, the best counts; 0: none (default: 3)")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = CausalChoiceModel.load(args.model, threads=1)
    result: dict[str, Any] = {"model": args.model, "dtype": model.dtype, "scenes": args.scenes, "seed": SEED}
    if args.repeats:
        result["cost"] = cost(args.model, args.repeats)
        for style, figures in result["cost"].items():
            print(f"{style}: " + "; ".join(f"{name} {value:.1f}" for name, value in figures.items()), flush=True)
    planners = {style: LLMPlanner(model, folder=folder) for style, folder in STYLES.items()}
    for name, (ours, other) in CONTROLS.items():
        planners[name] = LLMPlanner(model)
        assert ours in planners[name].shared
        planners[name].shared = planners[name].shared.replace(ours, other)
    for style, planner in planners.items():
        result[style] = {}
        for config in WORLDS:
            result[style][env_name(config)] = {}
            for order in ("by id", "reversed"):
                found = skill(planner, config, args.scenes, reverse=order == "reversed")
                result[style][env_name(config)][order] = found
                share = found["nearest chosen"]
                print(
                    f"{style}, {env_name(config)}, {order}: nearest chosen {share['value']:.2f} "
                    f"[{share['low']:.2f}, {share['high']:.2f}], chance {found['chance']:.2f}; "
                    f"{found['extra steps']['value']:.1f} extra steps, at random {found['extra steps at random']:.1f}; "
                    f"first chosen {found['first option chosen']:.2f}; {found['prompt tokens']:.0f} tokens",
                    flush=True,
                )
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
