"""What scoring a multiple-choice prompt costs, with and without its shared part computed once.

Prompts of about 150 tokens, of which about 100 are shared. Each row of the table is timed in turns with the
others, so that whatever else the machine does falls on all of them; the best turn counts. Run it with

    python benchmarks/bench_scoring.py --threads 1

Needs the model: `echelon models fetch smollm2-135m`.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

import numpy as np

from echelon.errors import EchelonError
from echelon.llm import CausalChoiceModel, ChoicePrompt, option_lines

RULES = (
    "You plan for robots in a warehouse. Each robot carries one package to the dock. Two robots must not "
    "take the same package. A near package costs fewer steps than a far one. A robot that carries a package "
    "goes to the dock first. Packages that wait long are urgent. Robots that stand in a narrow aisle block "
    "the others, so they leave it soon. You are asked about one robot at a time."
)


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    dtype: str
    share: bool
    batching: str


CASES = (
    Case("bfloat16", False, "checked"),
    Case("bfloat16", True, "checked"),
    Case("bfloat16", True, "free"),
    Case("bfloat16", True, "alone"),
    Case("float32", False, "checked"),
    Case("float32", True, "checked"),
    Case("float32", True, "alone"),
)


def prompts(count: int, rng: np.random.Generator) -> list[ChoicePrompt]:
    """Prompts of near-equal length whose numbers are new each time, so that no cache helps."""
    made = []
    for _ in range(count):
        x, y, *places = rng.integers(10, 99, size=10)
        options = tuple(f"shelf {p}" for p in places[:5])
        text = f"You stand at {x}, {y}.\n{option_lines(options)}\nAnswer with one letter."
        made.append(ChoicePrompt(RULES, text, options))
    return made


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a model's name or hf:<folder>")
    parser.add_argument("--count", type=int, default=16, help="prompts a call")
    parser.add_argument("--turns", type=int, default=3, help="timed turns of each row")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    settings = parser.parse_args()
    rng = np.random.default_rng(0)
    models = [
        CausalChoiceModel.load(
            settings.model,
            dtype=case.dtype,  # type: ignore[arg-type]
            threads=settings.threads,
            share_prefix=case.share,
            batching=case.batching,  # type: ignore[arg-type]
            cache_size=0,
        )
        for case in CASES
    ]
    first, best, tokens = [0.0] * len(CASES), [float("inf")] * len(CASES), 0
    for turn in range(settings.turns + 1):
        asked = prompts(settings.count, rng)
        for index, model in enumerate(models):
            start = time.perf_counter()
            tokens = max(scores.prompt_tokens for scores in model.score(asked))
            spent = (time.perf_counter() - start) / settings.count * 1e3
            if turn == 0:  # kernels are chosen, the shared part is computed, shapes are checked
                first[index] = spent
            else:
                best[index] = min(best[index], spent)
    print(f"{settings.model}, {settings.count} prompts of up to {tokens} tokens, {settings.threads} thread(s)")
    print(f"{'dtype':9} {'shared part':12} {'batching':9} {'first call':>11} {'ms/prompt':>10} {'ratio':>6}")
    for case, cold, warm in zip(CASES, first, best, strict=True):
        share = "once" if case.share else "each time"
        ratio = best[0] / warm
        print(f"{case.dtype:9} {share:12} {case.batching:9} {cold:11.1f} {warm:10.1f} {ratio:6.2f}")


if __name__ == "__main__":
    try:
        main()
    except EchelonError as error:
        sys.exit(f"error: {error}")
