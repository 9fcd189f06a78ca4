"""What teams of language models learn: a game with a known optimum, the writing task, robots that plan for themselves.

Parts, each of which takes up what an earlier call has finished:

- `game`: two agents with tiny transformers (2 layers, made here); one must copy a letter, the other write its
  complement. Every algorithm, 5 seeds, to the optimum;
- `writing`: SmolLM2-135M with one adapter an agent, MAGRPO, 3 seeds: the return on texts kept for evaluation as it
  rises from where the untouched model is;
- `robots`: one planner a robot that sees its own scene and hears messages, by imitation and by MAGRPO after it, beside
  optimal assignment, `nearest`, random letters and one central model: success, and tokens a decision (10 minutes of
  one core a seed; see `_team_robots.py`).

    python benchmarks/team_proof.py game writing robots --out DIR --json docs/results/teams.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from _team_robots import robots, robots_table
from echelon._files import atomic_write_json
from echelon.algorithms.teams import team_algorithms
from echelon.runs import processor
from echelon.tasks import FunctionTask, WritingSettings
from echelon.teams.configs import TeamPolicyConfig, TeamRunConfig
from echelon.teams.rollouts import TeamRolloutConfig
from echelon.teams.training import TeamTrainer

LETTERS = "abcd"
# Step size, and how many times the updates: a step is large and noisy without a baseline, slow where no reply is ever
# better than expected, and misled until value heads know anything.
PACES = {"mareinforce": (1.5e-3, 2), "maremax": (7e-4, 5), "ma-vdn": (1.5e-3, 2), "ma-qmix": (1.5e-3, 2)}


def tiny_model(folder: Path) -> str:
    """A random Llama of 2 layers that knows a few letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<pad>", "<unk>", *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}<s>"
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        LlamaForCausalLM(config).save_pretrained(folder)
    return f"hf:{folder}"


def copy_game(first: list[str], second: list[str], batch_items: list[str]) -> list[dict[str, float]]:
    """Half a point for each agent that is right, and one for the team."""
    found = []
    for a, b, letter in zip(first, second, batch_items, strict=True):
        copied, turned = a.strip() == letter, b.strip() == LETTERS[-1 - LETTERS.index(letter)]
        found.append({"copy": copied / 2, "complement": turned / 2, "both": float(copied and turned)})
    return found


def game(out: Path, seeds: int, updates: int) -> dict[str, Any]:
    """Every algorithm in the game: the return of sampled replies, whose optimum is 2, every 10 updates."""
    model = tiny_model(out / "tiny")
    found: dict[str, Any] = {"updates": updates, "optimum": 2.0}
    for name in team_algorithms():
        lr, times = PACES.get(name, (3e-3, 1))
        cell: dict[str, Any] = {"curve": [], "updates_to_0.95": [], "seconds": []}
        for seed in range(seeds):
            task = FunctionTask(list(LETTERS), copy_game, [str, str], eval_dataset=list(LETTERS))
            config = TeamRunConfig(
                method=name, model=(model,), share="separate", updates=updates * times, batch=4, seed=seed,
                eval_every=10, eval_samples=32, checkpoint_every=10**6, threads=1,
                policy=TeamPolicyConfig(adapt="full", lr=lr),
                rollout=TeamRolloutConfig(group=8, max_tokens=1, temperature=1.0),
            )  # fmt: skip
            cell["curve"].append(curve(config, out / f"game-{name}-{seed}", task, cell["seconds"]))
            good = [update for update, value, _ in cell["curve"][-1] if value >= 1.9]
            cell["updates_to_0.95"].append(good[0] if good else None)
        print(name, cell["updates_to_0.95"], [round(c[-1][1], 3) for c in cell["curve"]], flush=True)
        found[name] = cell
    return found


def curve(config: TeamRunConfig, folder: Path, task: Any, seconds: list[float]) -> list[tuple[int, float, float]]:
    """Train, or take up what was trained: (update, return, its standard error over items) of each evaluation."""
    start = time.time()
    if not (folder / "config.toml").exists():
        TeamTrainer(config, folder, task=task).run()
    elif not (folder / "team").exists():
        TeamTrainer.resume(folder, task=task).run()
    seconds.append(time.time() - start)
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    return [(line["update"], line["return"], line["return_se"] or 0.0) for line in lines]


def writing(out: Path, seeds: int, updates: int) -> dict[str, Any]:
    """SmolLM2-135M on the writing task."""
    cell: dict[str, Any] = {"updates": updates, "curve": [], "seconds": []}
    for seed in range(seeds):
        config = TeamRunConfig(
            method="magrpo", env=WritingSettings(), updates=updates, batch=2, seed=seed, eval_every=5, eval_items=6,
            eval_samples=4, checkpoint_every=5, threads=1, policy=TeamPolicyConfig(lr=5e-4),
            rollout=TeamRolloutConfig(group=4, max_tokens=48, temperature=1.0),
        )  # fmt: skip
        cell["curve"].append(curve(config, out / f"writing-{seed}", None, cell["seconds"]))
        print("writing", seed, cell["curve"][-1], round(cell["seconds"][-1]), flush=True)
    return cell


def interval(values: list[float]) -> str:
    """Mean and half of the 95% interval (Student) over seeds."""
    x = np.array(values)
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else 0.0
    return f"{x.mean():.3f} ± {half:.3f}"


def tables(told: dict[str, Any]) -> str:
    """The figures as Markdown tables."""
    lines: list[str] = []
    if "game" in told:
        lines += ["## A game with a known optimum", "", "| algorithm | return at first | at the end | updates to 95% |",
                  "| --- | --- | --- | --- |"]  # fmt: skip
        for name, cell in told["game"].items():
            if isinstance(cell, dict):
                ends = [interval([c[k][1] for c in cell["curve"]]) for k in (0, -1)]
                needed = ", ".join("-" if n is None else str(n) for n in cell["updates_to_0.95"])
                lines += [f"| {name} | {ends[0]} | {ends[1]} | {needed} |"]
        lines += [""]
    if "writing" in told:
        cell = told["writing"]
        lines += ["## Writing", "", "| update | return |", "| --- | --- |"]
        for k, (update, _, _) in enumerate(cell["curve"][0]):
            lines += [f"| {update} | {interval([c[k][1] for c in cell['curve']])} |"]
        lines += [""]
    if "robots" in told:
        lines += robots_table(told["robots"], interval)
    return "\n".join(lines)


def main() -> None:
    """Do the parts that are asked for, and write what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=("game", "writing", "robots"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, help="default: game 5, writing 3, robots 2")
    parser.add_argument("--updates", type=int, help="default: game 100, writing 15, robots 4 (after 40 of imitation)")
    args = parser.parse_args()
    told = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    told |= {"processor": processor()}
    if "game" in args.parts:
        told["game"] = game(args.out, args.seeds or 5, args.updates or 100)
    if "writing" in args.parts:
        told["writing"] = writing(args.out, args.seeds or 3, args.updates or 15)
    if "robots" in args.parts:
        told["robots"] = robots(args.out, args.seeds or 2, args.updates or 4)
    if args.json:
        atomic_write_json(args.json, told)
    print(tables(told))


if __name__ == "__main__":
    main()
