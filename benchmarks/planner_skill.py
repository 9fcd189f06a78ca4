"""How well a language model chooses subgoals before any training: its accuracy beside chance.

Each question is one robot of a fresh warehouse scene with its open packages as options. Counted: how often the most
probable option is the nearest package, how much longer the way of the chosen one is than of the nearest, and how
often the first option is chosen (a model that reads nothing has a favourite letter). Options are asked in the order
of the packages' ids, which says nothing about distance, and once more in reverse.

    python benchmarks/planner_skill.py [--model smollm2-135m] [--scenes 100] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from echelon.building import build_worlds, model_of
from echelon.configs import RunConfig
from echelon.envs import WarehouseConfig
from echelon.evaluation import mean_interval, wilson
from echelon.llm import ChoicePrompt, option_lines
from echelon.planners.llm import LLMPlanner


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a model's name or hf:<folder>")
    parser.add_argument("--scenes", type=int, default=100, help="scenes, each with one question (default: 100)")
    parser.add_argument("--packages", type=int, default=6, help="packages a scene (default: 6)")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    config = RunConfig(method="rule-goals", env=WarehouseConfig(num_packages=args.packages, num_agents=1))
    worlds = build_worlds(config, num_envs=args.scenes, seed=77, training=False)
    assert worlds.tracker is not None
    planner = LLMPlanner(model_of(args.model), max_options=args.packages)
    request = worlds.tracker.request(np.arange(args.scenes), distance=True)
    assert request.distance is not None
    result: dict[str, object] = {"model": args.model, "scenes": args.scenes, "packages": args.packages, "seed": 77}
    for order in ("by id", "reversed"):
        nearest = first = 0
        regret, chance = [], []
        questions = []
        for i in range(args.scenes):
            options = np.flatnonzero(request.candidates.kind[i, 0] > 0)
            options = options if order == "by id" else options[::-1]
            prompt = planner.prompt(request, i, 0, options)
            questions.append((options, ChoicePrompt(prompt.shared, prompt.text, prompt.options)))
            assert str(option_lines(prompt.options)) in prompt.text
        scores = planner.model.score([prompt for _, prompt in questions])
        for i, ((options, _), score) in enumerate(zip(questions, scores, strict=True)):
            lengths = request.distance[i, 0, options].astype(int)
            chosen = int(score.logprobs.argmax())
            nearest += lengths[chosen] == lengths.min()
            first += chosen == 0
            regret.append(lengths[chosen] - lengths.min())
            chance.append((lengths == lengths.min()).mean())
        found = {
            "nearest chosen": vars(wilson(int(nearest), args.scenes)),
            "chance": float(np.mean(chance)),
            "first option chosen": first / args.scenes,
            "extra steps": vars(mean_interval(regret)),
        }
        result[order] = found
        share = wilson(int(nearest), args.scenes)
        print(
            f"{args.model}, {args.packages} packages, options {order}: nearest chosen {share.value:.2f} "
            f"[{share.low:.2f}, {share.high:.2f}], chance {np.mean(chance):.2f}; first option chosen "
            f"{first / args.scenes:.2f}; {np.mean(regret):.1f} steps longer than the nearest"
        )
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
