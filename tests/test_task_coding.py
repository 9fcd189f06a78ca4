"""The coding task: its reward's levels by hand, how replies are read, its rules, its problems and its feedback."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.errors import EchelonError
from echelon.tasks import Attempt, CodingSettings, CodingTask, Scored, Turn
from echelon.tasks.coding import coding_reward, extract_code, ignores_result, thin_wrapper, uses_function
from echelon.tasks.sandbox import Limits, sandbox_report

GOOD: dict[str, bool | int] = {
    "aux_defined": True, "main_defined": True, "parses": True, "passed": 4, "tests": 4, "uses_aux": True, "thin": False,
    "ignored": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "reward"),
    [
        ({}, 4.0),  # 0.4 + 0.6 + 0.5 + 1 + 0.5 + 1
        ({"aux_defined": False, "uses_aux": False}, 2.1),  # 0.6 + 0.5 + 1
        ({"main_defined": False}, 0.4),
        ({"aux_defined": False, "main_defined": False}, 0.0),
        ({"parses": False}, 1.0),
        ({"passed": 0}, 1.5),
        ({"passed": 1}, 3.25),  # 1.5 + 0.25 + 0.5 + 1
        ({"uses_aux": False}, 2.5),
        ({"thin": True}, 3.0),
        ({"ignored": True}, 3.5),
        ({"ignored": True, "thin": True, "passed": 2}, 2.0),  # 1.5 + 0.5 + 0.5 − 0.5
        ({"ignored": True, "passed": 0}, 1.5),
    ],
)
def test_golden_rewards(changed: dict[str, bool | int], reward: float) -> None:
    total, parts = coding_reward(**{**GOOD, **changed})  # type: ignore[arg-type]
    assert total == pytest.approx(reward)
    assert sum(parts.values()) == pytest.approx(reward)


CODE = "def aux(x):\n    return x"


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (f"```python\n{CODE}\n```", CODE),
        (f"Sure!\n```py\n{CODE}\n```\nThat's it.", CODE),
        (f"```\n{CODE}\n```", CODE),
        (f"```python\n{CODE}", CODE),  # cut off
        (f"```python\n{CODE}\n```\nRun:\n```bash\npython a.py\n```", CODE),
        (f"```python\n{CODE}\n```\nUse:\n```python\nprint(aux(1))\n```", CODE),
        (f"```python\ndef aux(y): 1\n```\nBetter:\n```python\n{CODE}\n```", CODE),
        (CODE, CODE),
        (f"Here is the function.\n{CODE}\nThis returns what it gets.", CODE),
        ("def aux(x):\n    return (x", "def aux(x):\n    return (x"),  # not mended
        ("I can't do that.", ""),
        ("", ""),
    ],
)
def test_code_is_found_in_replies(reply: str, code: str) -> None:
    assert extract_code(reply, "aux").strip() == code


def function(body: str, parameters: str = "x, y") -> ast.FunctionDef:
    node = ast.parse(f"def main({parameters}):\n" + "\n".join(f"    {line}" for line in body.split("\n"))).body[0]
    assert isinstance(node, ast.FunctionDef)
    return node


@pytest.mark.parametrize(
    ("body", "thin"),
    [
        ("return aux(x)", True),
        ("'''Says what it does.'''\nreturn aux(x, y=y, *x)", True),
        ("result = aux(x, 3)\nreturn result", True),
        ("import math\nresult: int = aux(x)\nreturn result", True),
        ("result = aux(x)\nreturn y", False),
        ("return aux(x) + 1", False),
        ("return aux(sorted(x))", False),
        ("if not x:\n    return 0\nreturn aux(x)", False),
        ("return sum(aux(v) for v in x)", False),
        ("return x", False),
        ("return other(x)", False),
    ],
)
def test_a_thin_wrapper_hands_over_and_nothing_else(body: str, thin: bool) -> None:
    assert thin_wrapper(function(body)) is thin


@pytest.mark.parametrize(
    ("body", "ignored"),
    [
        ("aux(x)\nreturn y", True),
        ("unused = aux(x)\nreturn y", True),
        ("a, b = aux(x)\nreturn y", True),
        ("unused: int = aux(x)\nreturn y", True),
        ("used = aux(x)\nreturn used", False),
        ("a, b = aux(x)\nreturn b", False),
        ("aux(x)\nreturn aux(y)", False),
        ("if aux(x):\n    return 1\nreturn 2", False),
        ("x[0] = aux(x)\nreturn x", False),
        ("return y", False),  # not called at all
    ],
)
def test_a_result_is_ignored_if_nothing_reads_it(body: str, ignored: bool) -> None:
    assert ignores_result(function(body)) is ignored


def test_a_name_of_its_own_is_no_use_of_the_helper() -> None:
    assert uses_function(function("return aux(x)"))
    assert not uses_function(function("return aux(x)", "x, aux"))
    assert not uses_function(function("aux = len\nreturn aux(x)"))
    assert not uses_function(function("def aux(v):\n    return v\nreturn aux(x)"))
    assert not uses_function(function("return aux"))


# --- With the sandbox ------------------------------------------------------------------------------------------

PROBLEM = {
    "entry_point": "total",
    "signature": "(values: list[int]) -> int",
    "description": "Return the sum of the squares.",
    "aux_hint": "`aux(v)` returns the square of v.",
    "tests": [
        "assert total([1, 2]) == 5",
        "assert total([]) == 0",
        "assert total([-3]) == 9",
        "assert total([0]) == 0",
    ],
}
AUX, MAIN = "def aux(v):\n    return v * v", "def total(values):\n    return sum(aux(v) for v in values)"


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("coding") / "problems.jsonl"
    path.write_text("\n".join(json.dumps({**PROBLEM, "name": f"p{i}"}) for i in range(2)))
    return path


@pytest.fixture(scope="module")
def coding(problems: Path) -> Iterator[CodingTask]:
    if sandbox_report()["seccomp"] != "on":
        pytest.skip("needs seccomp")
    made = CodingTask(
        CodingSettings(data=str(problems), shift=0.0, workers=1), limits=Limits(wall_seconds=2.0, cpu_seconds=1)
    )
    yield made
    made.close()


@pytest.mark.parametrize(
    ("aux", "main", "reward"),
    [
        (AUX, MAIN, 4.0),
        (f"```python\n{AUX}\nprint(aux(2))\nassert False\n```", f"```python\n{MAIN}\n```", 4.0),  # examples don't run
        ("", "def total(values):\n    return sum(v * v for v in values)", 2.1),
        ("I will square it.", f"{AUX}\n{MAIN}", 2.1),  # a helper of its own is no teamwork
        (AUX, f"def aux(v):\n    return 0\n{MAIN}", 4.0),  # nor does it replace the other's
        (f"{AUX}\ndef total(values):\n    return 0", MAIN, 4.0),
        (f"{AUX}\n{MAIN}", "", 0.4),
        (AUX, "def other(): pass", 0.4),
        (AUX, "def total(values):\n    return (", 1.0),
        ("def aux(v:", MAIN, 1.0),
        ("def aux(v):\n    return v", MAIN, 3.5),  # 1.5 + 2/4 + 1.5: [] and [0] pass
        ("def aux(values):\n    return sum(v * v for v in values)", "def total(values):\n    return aux(values)", 3.0),
        (AUX, "def total(values):\n    aux(1)\n    return sum(v * v for v in values)", 3.5),
        (AUX, "def total(values):\n    while True: pass", 1.5),
        ("import sys\ndef aux(v):\n    sys.exit(0)", MAIN, 3.25),  # [] alone passes
        (AUX, "class Yes:\n    def __eq__(self, o): return True\ndef total(values):\n    return Yes()", 1.5),
        ("import nowhere\n" + AUX, MAIN, 1.5),
        ("x" * 30_000, MAIN, 1.35),  # 0.6 + 0.5 + 0.25 for []: no code at all in the first
        ("", "", 0.0),
        ("\0", "```python\n\0\n```", 0.0),
    ],
)
def test_golden_attempts(coding: CodingTask, aux: str, main: str, reward: float) -> None:
    scored = coding.score([Attempt(0, (), (aux, main))])[0]
    assert scored.reward == pytest.approx(reward), scored
    assert scored.error is None
    assert sum(scored.parts.values()) == pytest.approx(reward)
    assert scored.done is (reward == 4.0)


def test_equal_programs_run_once_and_keep_their_places(coding: CodingTask) -> None:
    pairs = [(AUX, MAIN), (AUX, "no"), (AUX, MAIN), ("", MAIN)]
    scored = coding.score([Attempt(i % 2, (), pair) for i, pair in enumerate(pairs)])
    # Without a helper, [] alone passes: 0.6 + 0.5 + 0.25.
    assert [s.reward for s in scored] == pytest.approx([4.0, 0.4, 4.0, 1.35])
    assert coding.score([]) == []


@given(
    st.lists(
        st.sampled_from(["def aux(", "def total(", "x):", "\n", "    return ", "aux(x)", "```", "python", "(", "é"])
    )
)
@settings(max_examples=60)
def test_any_reply_has_a_reward(coding: CodingTask, pieces: list[str]) -> None:
    text = "".join(pieces)
    scored = coding.score([Attempt(0, (), (text, text))])[0]
    assert 0.0 <= scored.reward <= 4.0
    assert scored.error is None


def test_the_set_that_comes_along_is_solved_by_its_references(coding: CodingTask) -> None:
    made = CodingTask(CodingSettings(workers=2))
    assert isinstance(made, CodingTask)
    assert len(made.problems) == 24
    solved = made.score([Attempt(i, (), problem.reference) for i, problem in enumerate(made.problems)])
    assert [(p.name, s.reward, s.done) for p, s in zip(made.problems, solved, strict=True)] == [
        (p.name, 0.0, True) for p in made.problems
    ]
    # Each needs its helper: no test set passes with the helper's part missing.
    alone = made.score([Attempt(i, (), ("", problem.reference[1])) for i, problem in enumerate(made.problems)])
    assert all(s.parts["tests"] < 1.0 for s in alone)
    assert (len(made.items("train")), len(made.items("eval"))) == (18, 6)
    np.testing.assert_array_equal(made.items("eval"), [0, 2, 10, 11, 14, 16])
    made.close()


def test_prompts_tell_each_agent_its_part_and_later_what_happened(problems: Path) -> None:
    made = CodingTask(CodingSettings(data=str(problems)))
    helper, main = made.prompts(0, ())
    for prompt in (helper, main):
        assert "def total(values: list[int]) -> int:" in prompt.text
        assert PROBLEM["aux_hint"] in prompt.text
    assert "Write only the helper function `aux`" in helper.text
    assert "Write the function `total`" in main.text
    turn = Turn((f"```python\n{AUX}\n```", MAIN), Scored(0.0, feedback="2 of 4 tests passed."))
    for prompt in made.prompts(0, (turn,)):
        assert AUX in prompt.text
        assert MAIN in prompt.text
        assert "2 of 4 tests passed." in prompt.text


@pytest.mark.parametrize(
    ("mode", "good", "wrong"),
    [
        (
            "level_feedback",
            "4 of 4 tests passed.",
            "2 of 4 tests passed.\nThe first that failed (AssertionError): assert total([1, 2]) == 5",
        ),
        (
            "level_passed",
            "Both functions are defined: yes.\nThe program parses: yes.\nAll tests pass: yes.\n"
            "`total` makes good use of `aux`: yes.",
            "Both functions are defined: yes.\nThe program parses: yes.\nAll tests pass: no.\n"
            "`total` makes good use of `aux`: yes.",
        ),
        ("passed", "All checks passed.", "Not all checks passed."),
        ("plain", "", ""),
    ],
)
def test_feedback(coding: CodingTask, problems: Path, mode: str, good: str, wrong: str) -> None:
    made = CodingTask(CodingSettings(data=str(problems), feedback=mode, workers=1))  # type: ignore[arg-type]
    scored = made.score([Attempt(0, (), (AUX, MAIN)), Attempt(0, (), ("def aux(v):\n    return v", MAIN))])
    assert [s.feedback for s in scored] == [good, wrong]
    assert [s.reward for s in scored] == pytest.approx([0.0, -0.5])
    made.close()


def test_level_feedback_names_what_is_wrong(coding: CodingTask) -> None:
    cases = {
        ("", "x = 1"): "No function `aux` was found.\nNo function `total` was found.",
        (AUX, "def total(:"): "The program is not valid Python.",
        (f"```\ny = 1 / 0\n{AUX}\n```", MAIN): "0 of 4 tests passed.\n"
        "The program failed before the tests: ZeroDivisionError: division by zero",
        (AUX, "def total(values):\n    return aux(values)"): "0 of 4 tests passed.\n"
        "The first that failed (TypeError: can't multiply sequence by non-int of type 'list'): "
        "assert total([1, 2]) == 5\n`total` only hands its work to `aux`; it should do a part of its own.",
        (AUX, "def total(values):\n    return sum(v * v for v in values)"): "4 of 4 tests passed.\n"
        "`total` does not call `aux`.",
        (AUX, "def total(values):\n    aux(1)\n    return sum(v * v for v in values)"): "4 of 4 tests passed.\n"
        "`total` does not use what `aux` returns.",
    }
    scored = coding.score([Attempt(0, (), pair) for pair in cases])
    assert [s.feedback for s in scored] == list(cases.values())


def test_problems_in_the_form_of_humaneval(coding: CodingTask, tmp_path: Path) -> None:
    line = {
        "task_id": "Made/0",
        "prompt": "import math\n\ndef base(v):\n    return v + 1\n\n\n"
        'def grow(v: int) -> int:\n    """ Two more. """\n',
        "entry_point": "grow",
        "test": (
            "METADATA = {'author': 'x'}\n\ndef check(candidate):\n    assert True, 'always'\n    start = 3\n"
            "    assert candidate(start) == 5\n    for i in range(3):\n        assert candidate(i) == base(i) + 1\n"
            "    assert math.isclose(candidate(0), 3)\n"
        ),
    }
    path = tmp_path / "human.jsonl"
    path.write_text(f"{json.dumps(line)}\n{json.dumps(line)}\n")
    made = CodingTask(CodingSettings(data=str(path), shift=0.0, workers=1))
    problem = made.problems[0]
    assert problem.name == "Made/0"
    assert len(problem.tests) == 3  # the assert of a constant is none
    assert '""" Two more. """' in made.prompts(0, ())[1].text
    main = "def grow(v):\n    return base(aux(v))"
    scored = made.score([Attempt(0, (), ("def aux(v):\n    return v + 1", main))])[0]
    assert scored.parts["tests"] == pytest.approx(2 / 3)
    assert scored.feedback.endswith("assert math.isclose(candidate(0), 3)")
    made.close()


def test_bad_files_and_settings_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    for changed, message in (
        ({"entry_point": None}, "problem 1: needs a text 'entry_point'"),
        ({"entry_point": "aux"}, "entry_point 'aux' is no name for a main function"),
        ({"entry_point": "a b"}, "entry_point 'a b' is no name"),
        ({"signature": "(:"}, r"the signature '\(:' is not Python"),
        ({"tests": []}, "has no tests"),
        ({"tests": "x = 1"}, "has no tests"),
        ({"tests": ["assert ("]}, "'tests' must be Python asserts"),
        ({"tests": 3}, "'tests' must be Python asserts"),
        ({"preamble": "def"}, "the preamble is not Python"),
        ({"prompt": "def other():\n", "test": "assert 1 < 2"}, "the prompt does not begin the function 'total'"),
        ({"prompt": "def total():\n", "test": "assert ("}, "the tests are not Python"),
    ):
        path.write_text(json.dumps({**PROBLEM, **changed}))
        with pytest.raises(EchelonError, match=message) as caught:
            CodingTask(CodingSettings(data=str(path)))
        assert "\n" not in str(caught.value)
    path.write_text(json.dumps(PROBLEM))
    with pytest.raises(EchelonError, match="has 1 item; at least 2"):
        CodingTask(CodingSettings(data=str(path)))
    with pytest.raises(EchelonError, match="no problem file at"):
        CodingTask(CodingSettings(data=str(tmp_path / "none.jsonl")))
    with pytest.raises(EchelonError, match="unknown feedback mode 'plane': did you mean 'plain'"):
        CodingSettings(feedback="plane")  # type: ignore[arg-type]
    with pytest.raises(EchelonError, match="shift is nan: it must be finite"):
        CodingSettings(shift=float("nan"))
