"""What it costs to score the choices of 64 worlds of 4 agents, step by step from the plain way to the one used.

256 multiple-choice prompts in one call. Long prompts have about 150 tokens, of which about 90 are shared; short ones
about 45; the planner's own questions ask of each of 8 candidates by itself whether it is good. Each row is timed in
turns with the others, so that whatever else the machine does falls on all of them; the best turn counts. CPU time is
that of all threads together. Rows that take each prompt alone are timed with the first 16 prompts, because their
prompts cost the same each. Run it with

    OMP_NUM_THREADS=2 python benchmarks/bench_scoring.py

Needs the model: `echelon models fetch smollm2-135m`.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

import numpy as np

from echelon.errors import EchelonError
from echelon.llm import CausalChoiceModel, ChoicePrompt, PromptTemplate, option_lines
from echelon.llm._loading import load_causal
from echelon.llm._scoring import Lanes
from echelon.planners.llm import PROMPTS

RULES = (
    "You plan for robots in a warehouse. Each robot carries one package to the dock. Two robots must not "
    "take the same package. A near package costs fewer steps than a far one. A robot that carries a package "
    "goes to the dock first. Packages that wait long are urgent. Robots that stand in a narrow aisle block "
    "the others, so they leave it soon. You are asked about one robot at a time."
)
SHORT = "The nearest package is best."
ALONE = 16  # prompts that a row of single passes is timed with


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        title: what it shows.
        dtype, share, batching: settings of the model.
        kind: "long", "short" or "rated" prompts.
        attention: transformers' name of the implementation.
        threads: of the processor.
        lanes: passes side by side; 1 with more threads is OpenMP inside each product.
        known: whether the same questions were asked before.
    """

    title: str
    dtype: str
    share: bool
    batching: str
    kind: str = "long"
    attention: str = "eager"
    threads: int = 1
    lanes: int = 4
    known: bool = False


CASES = (
    Case("float32, each prompt by itself", "float32", False, "alone", attention="sdpa"),
    Case("+ shared part once", "float32", True, "alone", attention="sdpa"),
    Case("+ batches", "float32", True, "checked", attention="sdpa"),
    Case("bfloat16, each prompt by itself", "bfloat16", False, "alone", attention="sdpa"),
    Case("+ shared part once", "bfloat16", True, "alone", attention="sdpa"),
    Case("+ batches", "bfloat16", True, "checked", attention="sdpa"),
    Case("+ plain attention", "bfloat16", True, "checked"),
    Case("+ 2 threads, OpenMP", "bfloat16", True, "checked", threads=2, lanes=1),
    Case("+ 2 threads, lanes", "bfloat16", True, "checked", threads=2),
    Case("short prompts", "bfloat16", True, "checked", "short"),
    Case("short prompts, 2 threads", "bfloat16", True, "checked", "short", threads=2),
    Case("planner's questions", "bfloat16", True, "checked", "rated"),
    Case("planner's questions, 2 threads", "bfloat16", True, "checked", "rated", threads=2),
    Case("planner's questions, known", "bfloat16", True, "checked", "rated", known=True),
)


def prompts(count: int, rng: np.random.Generator, kind: str = "long") -> list[ChoicePrompt]:
    """Prompts of near-equal length whose numbers are new each time, so that no cache helps."""
    if kind == "rated":
        shared = PromptTemplate.from_file(PROMPTS / "choose_system.txt").render()
        template = PromptTemplate.from_file(PROMPTS / "choose.txt")
        made = []
        for _ in range(count):
            steps = rng.integers(1, 39, size=8)  # path lengths on a map of 20 × 20
            values = [{"what": "fetch package", "steps": int(n), "feedback": ""} for n in steps]
            values = [{k: v for k, v in value.items() if k in template.fields} for value in values]
            each = tuple(template.render(**value) for value in values)
            made.append(ChoicePrompt(shared, "\n".join(each), each, each))
        return made
    made = []
    for _ in range(count):
        x, y, *places = rng.integers(10, 99, size=10)
        if kind == "long":
            options = tuple(f"shelf {p}" for p in places[:5])
            text = f"You stand at {x}, {y}.\n{option_lines(options)}\nAnswer with one letter."
        else:
            options = tuple(str(p) for p in places[:4])
            text = " ".join(option_lines(options).splitlines())
        made.append(ChoicePrompt(RULES if kind == "long" else SHORT, text, options))
    return made


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a model's name or hf:<folder or id>")
    parser.add_argument("--count", type=int, default=256, help="prompts a call")
    parser.add_argument("--turns", type=int, default=3, help="timed turns of each row")
    settings = parser.parse_args()
    rng = np.random.default_rng(0)
    loaded = {dtype: load_causal(settings.model, dtype=dtype, device="cpu") for dtype in ("float32", "bfloat16")}
    models = []
    for case in CASES:
        of_type = loaded[case.dtype]
        model = CausalChoiceModel(
            of_type.model,
            of_type.tokenizer,
            settings.model,
            threads=case.threads,
            share_prefix=case.share,
            batching=case.batching,  # type: ignore[arg-type]
        )
        model._lanes = Lanes(case.threads, case.lanes)  # OpenMP is for comparison only, so it is no setting
        models.append(model)
    size = len(CASES)
    first, best, cpu, tokens = [0.0] * size, [float("inf")] * size, [float("inf")] * size, [0.0] * size
    for turn in range(settings.turns + 1):
        asked = {kind: prompts(settings.count, rng, kind) for kind in ("long", "short", "rated")}
        for index, (case, model) in enumerate(zip(CASES, models, strict=True)):
            some = asked[case.kind][: ALONE if case.batching == "alone" else None]
            loaded[case.dtype].model.set_attn_implementation(case.attention)
            model.forget()
            if case.known:
                model.score(some)
            began, start = time.process_time(), time.perf_counter()
            scores = model.score(some)
            spent = (time.perf_counter() - start) / len(some) * 1e3
            spent_cpu = (time.process_time() - began) / len(some) * 1e3
            if turn == 0:  # kernels are chosen, the shared part is computed, shapes are checked
                first[index], tokens[index] = spent, float(np.mean([s.prompt_tokens for s in scores]))
            else:
                best[index], cpu[index] = min(best[index], spent), min(cpu[index], spent_cpu)
        print(f"turn {turn} of {settings.turns} done", file=sys.stderr, flush=True)
    print(f"{settings.model}, {settings.count} prompts a call")
    print(f"{'':32} {'tokens':>6} {'first':>7} {'ms/prompt':>10} {'CPU ms':>7} {'s/batch':>8} {'speed':>7}")
    for index, case in enumerate(CASES):
        print(
            f"{case.title:32} {tokens[index]:6.0f} {first[index]:7.1f} {best[index]:10.2f} {cpu[index]:7.2f} "
            f"{best[index] * settings.count / 1e3:8.2f} {best[0] / best[index]:7.1f}"
        )


if __name__ == "__main__":
    try:
        main()
    except EchelonError as error:
        sys.exit(f"error: {error}")
