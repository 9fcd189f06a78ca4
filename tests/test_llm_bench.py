"""The benchmark of models: right arithmetic under a clock of its own, the time limit, JSON that fits, plain tables."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echelon.errors import EchelonError
from echelon.llm import CausalChoiceModel, ChoicePrompt, ChoiceScores
from echelon.llm.bench import (
    CHOICE_BATCHES,
    SCHEMA,
    TEXT_BATCHES,
    BenchRow,
    ModelBench,
    bench_model,
    bench_prompts,
    bench_table,
    fits_schema,
    memory_bytes,
)
from echelon.llm.text import TextPrompt, TextReply
from tiny_model import make_tiny_model

GOOD = json.dumps({"robot_1": 1, "robot_2": 8, "robot_3": 3, "robot_4": 2})


class Scorer:
    """0.1 s a call and 0.01 s a new prompt of 150 tokens."""

    name = "fake"
    parameter_bytes = 5_000_000

    def __init__(self) -> None:
        self.now, self.calls, self.known = 0.0, [], set[str]()

    def score(self, prompts: Sequence[ChoicePrompt]) -> list[ChoiceScores]:
        new = [p for p in prompts if p.text not in self.known]
        self.known |= {p.text for p in new}
        self.calls.append((len(prompts), len(new)))
        self.now += 0.1 + 0.01 * len(new)
        return [ChoiceScores(np.zeros(len(p.options), np.float32), 150) for p in prompts]

    def clock(self) -> float:
        return self.now


class Writer:
    """1 s a call; what it writes is given."""

    name = "fake"

    def __init__(self, *replies: TextReply) -> None:
        self.now, self.replies, self.asked = 0.0, replies, list[TextPrompt]()

    def generate(self, prompts: Sequence[TextPrompt]) -> list[TextReply]:
        self.now += 1.0
        self.asked += prompts
        return [self.replies[k % len(self.replies)] for k in range(len(prompts))]

    def state_dict(self) -> dict[str, int | float]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass

    def close(self) -> None:
        pass

    def clock(self) -> float:
        return self.now


def test_what_a_scoring_model_costs() -> None:
    model, seen = Scorer(), []
    found = bench_model(model, seconds=60, clock=model.clock, on_row=seen.append)
    assert [row.batch for row in found.rows] == list(CHOICE_BATCHES)
    assert seen == list(found.rows)
    for row in found.rows:
        per_call = 0.1 + 0.01 * row.batch
        assert row.calls >= 1
        assert row.plans == row.calls * row.batch
        assert row.seconds == pytest.approx(row.calls * per_call)
        assert row.ms_per_plan == pytest.approx(per_call / row.batch * 1e3)
        assert row.plans_per_second == pytest.approx(row.batch / per_call)
        assert row.prompt_tokens_per_second == pytest.approx(150 * row.batch / per_call)
        assert row.memo_seconds == pytest.approx(0.1)
    # Each question is new once and known once.
    assert sum(new for _, new in model.calls) * 2 == sum(count for count, _ in model.calls)
    assert model.now <= 60 + 2 * (0.2 + 2.56)
    assert (found.kind, found.parameter_bytes, found.error) == ("scores", 5_000_000, None)


def test_the_time_limit_leaves_out_what_would_take_too_long() -> None:
    model = Scorer()
    found = bench_model(model, batches=(1, 16, 1000, 2000), seconds=4.0, clock=model.clock)
    assert [row.calls > 0 for row in found.rows] == [True, True, False, False]
    assert model.now < 6
    assert math.isnan(found.rows[2].ms_per_plan)
    assert math.isnan(found.rows[3].plans_per_second)
    assert bench_table(found).splitlines()[-2].startswith("- : not measured, the time was up")
    model = Scorer()
    first = bench_model(model, batches=(4, 8), seconds=1e-9, clock=model.clock).rows
    assert [row.calls for row in first] == [1, 0]  # something is always measured


def test_what_a_writing_model_costs() -> None:
    replies = [
        TextReply(GOOD, prompt_tokens=200, completion_tokens=40),
        TextReply("no", prompt_tokens=200, completion_tokens=20),
        TextReply("", error="HTTP 500 \x1b[2J", prompt_tokens=0),
        TextReply(f"```{GOOD}", prompt_tokens=200, completion_tokens=40),
    ]
    model = Writer(*replies)
    found = bench_model(model, seconds=18.5, clock=model.clock)
    assert [row.batch for row in found.rows] == list(TEXT_BATCHES)
    one, four, _ = found.rows
    assert (one.fitting_share, one.failed) == (1.0, 0)
    assert four.fitting_share == 0.25
    assert four.failed == four.calls
    assert four.seconds == four.calls
    assert four.completion_tokens_per_second == 100
    assert four.prompt_tokens_per_second == 600
    assert four.memo_seconds is None
    assert found.kind == "writes"
    assert found.error is not None
    assert found.error.startswith("HTTP 500")
    assert "\x1b" not in bench_table(found)
    assert all(prompt.schema == SCHEMA for prompt in model.asked)
    assert len({prompt.text for prompt in model.asked}) == len(model.asked)


def test_a_dead_model_ends_the_benchmark() -> None:
    model = Writer(TextReply("", error="no server at this address"))
    found = bench_model(model, clock=model.clock)
    assert len(model.asked) == 1
    assert [row.failed for row in found.rows] == [1, 0, 0]
    assert "first error: no server at this address" in bench_table(found)
    assert "the time was up" not in bench_table(found)


def test_errors_and_interrupts() -> None:
    class Broken(Scorer):
        fault: BaseException = ValueError("two\nlines")

        def score(self, prompts: Sequence[ChoicePrompt]) -> list[ChoiceScores]:
            raise self.fault

    with pytest.raises(EchelonError, match="model fake failed: ValueError: two lines"):
        bench_model(Broken())
    broken = Broken()
    for fault in (EchelonError("as it is"), KeyboardInterrupt("as it is")):
        broken.fault = fault
        with pytest.raises(type(fault), match=str(fault)):
            bench_model(broken)
    for batches in ((), (0, 1), (4, 2), (2, 2)):
        with pytest.raises(EchelonError, match="ascending"):
            bench_model(Scorer(), batches=batches)
    for seconds in (0, -1, float("nan")):
        with pytest.raises(EchelonError, match="more than 0"):
            bench_model(Scorer(), seconds=seconds)


def test_questions_are_of_8_candidates_and_never_the_same() -> None:
    rng = np.random.default_rng(0)
    choices, texts = bench_prompts(500, rng)
    more, _ = bench_prompts(500, rng)
    assert len({p.text for p in choices + more}) == 1000
    assert {len(p.options) for p in choices} == {8}
    assert len({p.shared for p in choices} | {p.system for p in texts}) == 1


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        (GOOD, True),
        (f" \n{GOOD}\n", True),
        (f"```json\n{GOOD}\n```", False),
        (GOOD.replace("8", "9"), False),
        (GOOD.replace("8", "0"), False),
        (GOOD.replace("8", "true"), False),
        (GOOD.replace("8", "1.0"), False),
        (GOOD.replace("8", '"8"'), False),
        (GOOD.replace("robot_4", "robot_5"), False),
        (GOOD[:-1] + ', "robot_5": 1}', False),
        ('{"robot_1": 1}', False),
        ("[]", False),
        ("", False),
        ("[" * 100_000, False),
        (GOOD[:-1], False),
    ],
)
def test_json_of_the_schema(text: str, fits: bool) -> None:
    assert fits_schema(text) is fits


def test_the_tables() -> None:
    rows = (BenchRow(1, 10, 0.5, 1500, memo_seconds=0.0001), BenchRow(256))
    assert bench_table(ModelBench("tiny", "scores", rows, 700_000_000, None, 269_000_000)) == (
        "tiny: scores candidates, 8 a plan\n"
        "batch  ms/plan  plans/s  prompt tokens/s  ms/plan, known\n"
        "    1       50       20            3,000             0.1\n"
        "  256        -        -                -               -\n"
        "- : not measured, the time was up\n"
        "memory: weights 269 MB, process 700 MB"
    )
    rows = (BenchRow(4, 2, 4.0, 1600, 320, failed=1, fitting=6),)
    assert bench_table(ModelBench("m", "writes", rows, None, None, None, "HTTP 500")) == (
        "m: writes JSON plans for 4 robots\n"
        "batch  ms/plan  plans/s  prompt tokens/s  tokens/s  JSON  failed\n"
        "    4      500        2              400        80   75%       1\n"
        "first error: HTTP 500\n"
        "memory: not known"
    )


def test_memory_grows_with_what_is_held() -> None:
    before, _ = memory_bytes()
    # Not of the heap, which may have that much at hand from tests before.
    with mmap.mmap(-1, 50_000_000) as held:
        held.write(b"1" * len(held))
        after, peak = memory_bytes()
    if before is None or after is None:
        pytest.skip("this system does not tell")
    assert after - before > 30_000_000
    assert peak is not None
    assert peak >= after - 5_000_000


def test_real_models_of_both_kinds(tmp_path: Path) -> None:
    model = CausalChoiceModel.load(f"hf:{make_tiny_model(tmp_path / 'tiny')}")
    scored = bench_model(model, batches=(1, 3), seconds=0.5)
    assert all(row.calls and row.prompt_tokens > 100 * row.plans for row in scored.rows)
    assert model.cache_hits > 0
    written = bench_model(model.text(), batches=(2,), seconds=0.5)
    [row] = written.rows
    assert row.completion_tokens > 0
    assert row.failed == 0
    assert written.parameter_bytes == scored.parameter_bytes == model.parameter_bytes > 100_000
