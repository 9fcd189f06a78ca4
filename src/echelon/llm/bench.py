"""How fast a model plans on this machine: milliseconds a plan and tokens a second by batch, and memory."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from echelon.errors import EchelonError
from echelon.llm.choice import ChoiceModel, ChoicePrompt
from echelon.llm.prompts import clean, option_lines
from echelon.llm.text import TextModel, TextPrompt, TextReply

__all__ = ["BenchRow", "ModelBench", "bench_model", "bench_prompts", "bench_table", "memory_bytes"]

CHOICE_BATCHES = (1, 4, 16, 64, 256)
TEXT_BATCHES = (1, 4, 16)

_CANDIDATES, _ROBOTS, _MOST_TOKENS = 8, 4, 64
_RULES = (
    "You plan for a team of robots in a warehouse. Each carries one package to the dock. A near package costs fewer "
    "steps than a far one, and two robots must not take the same package. Places are told as row, column."
)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        f"robot_{r}": {"type": "integer", "minimum": 1, "maximum": _CANDIDATES} for r in range(1, _ROBOTS + 1)
    },
    "required": [f"robot_{r}" for r in range(1, _ROBOTS + 1)],
    "additionalProperties": False,
}
"""What a written plan of the benchmark must be: the number of a package for each of four robots."""


@dataclass(frozen=True)
class BenchRow:
    """What one batch size cost.

    Args:
        batch: plans asked for in one call.
        calls: calls timed; 0 if the time limit left none.
        seconds: that they took together.
        prompt_tokens, completion_tokens: of these calls together, as the model counts them.
        failed: replies with an error.
        fitting: replies that were JSON of the schema.
        memo_seconds: what a call costs whose questions the model has answered before (scoring only), else None.
    """

    batch: int
    calls: int = 0
    seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failed: int = 0
    fitting: int = 0
    memo_seconds: float | None = None

    @property
    def plans(self) -> int:
        """Plans asked for in the timed calls."""
        return self.batch * self.calls

    @property
    def ms_per_plan(self) -> float:
        """Milliseconds of a call by its plans; NaN if none was timed."""
        return self.seconds / self.plans * 1e3 if self.calls else float("nan")

    @property
    def plans_per_second(self) -> float:
        """Plans a second, or NaN."""
        return self._rate(self.plans)

    @property
    def prompt_tokens_per_second(self) -> float:
        """Tokens read a second, shared parts included, or NaN."""
        return self._rate(self.prompt_tokens)

    @property
    def completion_tokens_per_second(self) -> float:
        """Tokens written a second, or NaN."""
        return self._rate(self.completion_tokens)

    @property
    def fitting_share(self) -> float:
        """The share of replies that were JSON of the schema, or NaN."""
        return self.fitting / self.plans if self.calls else float("nan")

    def _rate(self, count: int) -> float:
        return count / self.seconds if self.calls and self.seconds > 0 else float("nan")


@dataclass(frozen=True)
class ModelBench:
    """What `bench_model` found.

    Args:
        model: its name.
        kind: "scores" candidates or "writes" text.
        rows: one a batch size.
        resident_bytes, peak_bytes: this process's memory now, and the most it had; None where the system doesn't tell.
            A model behind a server is not in it.
        parameter_bytes: what the model's weights take; None if it doesn't say.
        error: the first error of a model that writes; the benchmark ends there if no reply of a call was free of one.
    """

    model: str
    kind: Literal["scores", "writes"]
    rows: tuple[BenchRow, ...]
    resident_bytes: int | None
    peak_bytes: int | None
    parameter_bytes: int | None
    error: str | None = None


def bench_model(
    model: ChoiceModel | TextModel,
    *,
    batches: Sequence[int] | None = None,
    seconds: float = 20.0,
    on_row: Callable[[BenchRow], None] = lambda row: None,
    clock: Callable[[], float] = time.perf_counter,
) -> ModelBench:
    """Time a model on questions made up here, which are new in every call, so that no memory of answers helps.

    A model that scores is asked for the best of 8 packages, one robot a plan; one that writes for the JSON plan of
    four robots. Each batch size has one call that isn't timed (kernels are chosen, a shared part is computed) and at
    least one that is, until its share of the time is spent.

    Args:
        model: what has `score` scores, anything else writes.
        batches: plans a call, ascending; 1 to 256 for scoring and 1 to 16 for writing if None.
        seconds: for all batch sizes together. A call that has begun is never cut off, and a batch size that by the
            one before would take longer than what is left is left out (a row with no calls).
        on_row: called with each row as it is ready.
        clock: seconds from anywhere; for tests.

    Raises:
        EchelonError: bad settings, or a model that scores failed.
    """
    scores = callable(getattr(model, "score", None))
    sizes = tuple(batches) if batches is not None else CHOICE_BATCHES if scores else TEXT_BATCHES
    if not sizes or any(a < 1 for a in sizes) or list(sizes) != sorted(set(sizes)):
        raise EchelonError("batches must be one or more ascending whole numbers from 1")
    if not seconds > 0:
        raise EchelonError(f"seconds is {seconds}: it must be more than 0")
    ask = _ask_scores if scores else _ask_text
    rng, end = np.random.default_rng(0), clock() + seconds
    rows: list[BenchRow] = []
    errors: list[str] = []
    per_plan, dead = 0.0, False
    for at, batch in enumerate(sizes):
        row, left = BenchRow(batch), end - clock()
        if not dead and left > 0 and per_plan * batch <= left:
            # More for larger batches, whose calls take longer, but not so much more that small ones get one call.
            share = left * math.sqrt(batch) / sum(math.sqrt(size) for size in sizes[at:])
            row = _time(lambda n: ask(model, n, rng, clock, errors), batch, share, per_plan, clock)
            dead, per_plan = row.failed == row.plans, row.seconds / row.plans
        rows.append(row)
        on_row(row)
    resident, peak = memory_bytes()
    weights = getattr(model, "parameter_bytes", None)
    return ModelBench(
        model.name,
        "scores" if scores else "writes",
        tuple(rows),
        resident,
        peak,
        weights,
        errors[0] if errors else None,
    )


def bench_prompts(batch: int, rng: np.random.Generator) -> tuple[list[ChoicePrompt], list[TextPrompt]]:
    """Questions of near-equal length with new numbers: `batch` to score, and the same number to answer in JSON."""
    choices, texts = [], []
    for _ in range(batch):
        places = rng.integers(10, 100, (_CANDIDATES + _ROBOTS, 2))
        packages = [f"package at {row}, {column}" for row, column in places[:_CANDIDATES]]
        robots = [f"{row}, {column}" for row, column in places[_CANDIDATES:]]
        number = int(rng.integers(10**8, 10**9))  # so many that hardly two questions are the same
        text = f"Order {number}. You stand at {robots[0]}.\n{option_lines(packages)}\nAnswer with one letter."
        choices.append(ChoicePrompt(_RULES, text, tuple(packages)))
        scene = [f"Order {number}.", *(f"robot_{r}: {place}" for r, place in enumerate(robots, 1))]
        scene += [f"{k}. {package}" for k, package in enumerate(packages, 1)]
        question = 'Which package for which robot? Answer like {"robot_1": 3, "robot_2": 8, …}, for every robot.'
        texts.append(TextPrompt(_RULES, "\n".join([*scene, question]), SCHEMA, _MOST_TOKENS))
    return choices, texts


def fits_schema(text: str) -> bool:
    """Whether a reply is JSON of `SCHEMA`, white space around it apart."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    names = SCHEMA["properties"].keys()
    return (
        isinstance(value, dict)
        and value.keys() == names
        and all(type(number) is int and 1 <= number <= _CANDIDATES for number in value.values())
    )


def bench_table(bench: ModelBench) -> str:
    """The findings as lines of text."""
    scores = bench.kind == "scores"
    titles = ["batch", "ms/plan", "plans/s", "prompt tokens/s"]
    titles += ["ms/plan, known"] if scores else ["tokens/s", "JSON", "failed"]
    lines = [titles]
    for row in bench.rows:
        cells = [row.ms_per_plan, row.plans_per_second, row.prompt_tokens_per_second]
        line = [str(row.batch), *map(_number, cells)]
        if scores:
            known = float("nan") if row.memo_seconds is None else row.memo_seconds / row.batch * 1e3
            line.append(_number(known))
        else:
            share = f"{row.fitting_share:.0%}" if row.calls else "-"
            line += [_number(row.completion_tokens_per_second), share, str(row.failed) if row.calls else "-"]
        lines.append(line)
    widths = [max(len(line[k]) for line in lines) for k in range(len(titles))]
    out = [f"{bench.model}: {'scores candidates, 8 a plan' if scores else f'writes JSON plans for {_ROBOTS} robots'}"]
    out += ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    if any(not row.calls for row in bench.rows):
        out.append("- : not measured, the time was up" if bench.error is None else "- : not measured")
    if bench.error is not None:
        out.append(f"first error: {bench.error}")
    sizes = (("weights", bench.parameter_bytes), ("process", bench.resident_bytes), ("at most", bench.peak_bytes))
    told = [f"{name} {size / 1e6:,.0f} MB" for name, size in sizes if size is not None]
    return "\n".join([*out, f"memory: {', '.join(told) or 'not known'}"])


def memory_bytes() -> tuple[int | None, int | None]:
    """This process's memory in bytes: resident now, and the most there was; None where the system doesn't tell."""
    try:
        entries = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return tuple(int(entries[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[return-value]
    except (OSError, KeyError, ValueError):
        pass  # no Linux
    try:
        import resource
    except ImportError:
        return None, None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None, peak if sys.platform == "darwin" else peak * 1024


def _time(
    ask: Callable[[int], BenchRow], batch: int, share: float, per_plan: float, clock: Callable[[], float]
) -> BenchRow:
    """The calls of one batch size: one that isn't timed if there is room, then as many as fit into `share` seconds."""
    start = clock()
    if 2 * per_plan * batch <= share and (first := ask(batch)).failed == batch:
        return first
    total = ask(batch)
    longest = clock() - start
    while total.failed < total.plans and clock() - start + longest <= share:
        before, row = clock(), ask(batch)
        longest = clock() - before
        total = replace(
            row,
            calls=total.calls + 1,
            seconds=total.seconds + row.seconds,
            prompt_tokens=total.prompt_tokens + row.prompt_tokens,
            completion_tokens=total.completion_tokens + row.completion_tokens,
            failed=total.failed + row.failed,
            fitting=total.fitting + row.fitting,
        )
    return total


def _ask_scores(
    model: Any, batch: int, rng: np.random.Generator, clock: Callable[[], float], errors: list[str]
) -> BenchRow:
    prompts, _ = bench_prompts(batch, rng)
    try:
        start = clock()
        tokens = sum(int(scores.prompt_tokens) for scores in model.score(prompts))
        fresh = clock()
        model.score(prompts)
        return BenchRow(batch, 1, fresh - start, tokens, memo_seconds=clock() - fresh)
    except EchelonError:
        raise
    except Exception as error:  # whatever a user's own model may raise
        raise EchelonError(f"model {model.name} failed: {type(error).__name__}: {clean(error)[:200]}") from error


def _ask_text(
    model: Any, batch: int, rng: np.random.Generator, clock: Callable[[], float], errors: list[str]
) -> BenchRow:
    _, prompts = bench_prompts(batch, rng)
    start = clock()
    replies: list[TextReply] = model.generate(prompts)
    spent = clock() - start
    wrong = [clean(reply.error)[:200] for reply in replies if reply.error is not None]
    errors += wrong
    return BenchRow(
        batch,
        1,
        spent,
        sum(reply.prompt_tokens for reply in replies),
        sum(reply.completion_tokens for reply in replies),
        len(wrong),
        sum(reply.error is None and fits_schema(reply.text) for reply in replies),
    )


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 10 else f"{value:.2g}"
