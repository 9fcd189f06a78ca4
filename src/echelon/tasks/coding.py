"""The `coding` task: one agent writes a helper `aux`, the other the main function, and tests run in a sandbox.

The reward is that of MAGRPO's coding experiments (arXiv 2508.04652 and the code released with it), as in
`coding_reward`. Replies are parsed with `ast` and never run in this process; see `echelon.tasks.sandbox` for where
they are run. The rules by which a main function is a thin wrapper or ignores its helper are ours: see `thin_wrapper`
and `ignores_result`.
"""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from echelon.errors import EchelonError, unknown_name
from echelon.tasks._data import read_json_lines, read_text, shipped, split_items
from echelon.tasks.base import AgentPrompt, Attempt, Scored, TaskSettings, Turn
from echelon.tasks.sandbox import Limits, Program, RunResult, Sandbox

__all__ = [
    "BEST_CODING_REWARD",
    "CodingTask",
    "FeedbackMode",
    "Problem",
    "coding_reward",
    "extract_code",
    "ignores_result",
    "thin_wrapper",
    "uses_function",
]

FeedbackMode = Literal["level_feedback", "level_passed", "passed", "plain"]

HELPER = "aux"
BEST_CODING_REWARD = 4.0
_MOST_CODE = 20_000  # characters; a longer reply is no program of this task
_FENCE = re.compile(r"```[ \t]*(\w*)[^\n]*\n(.*?)(?:\n?[ \t]*```|\Z)", re.DOTALL)
_STARTS = ("def ", "async def ", "import ", "from ", "class ", "@")
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Problem:
    """What the two agents are to program.

    Args:
        name: what it is called in logs.
        entry_point: the main function's name.
        statement: what both are shown: the function's head and what it does.
        aux_hint: what the helper may do; may be empty.
        tests: Python sources, each one test; they see the main function by its name and as `candidate`.
        preamble: trusted code that stands before the agents' (imports, given functions).
        reference: a helper and a main function that pass, or empty strings.
    """

    name: str
    entry_point: str
    statement: str
    aux_hint: str
    tests: tuple[str, ...]
    preamble: str = ""
    reference: tuple[str, str] = ("", "")


def coding_reward(
    *,
    aux_defined: bool,
    main_defined: bool,
    parses: bool,
    passed: int,
    tests: int,
    uses_aux: bool,
    thin: bool,
    ignored: bool,
) -> tuple[float, dict[str, float]]:
    """What a helper and a main function are worth, at most 4.0: levels, each open only when the one before was reached.

    1. The helper is defined: 0.4. The main function is defined: 0.6, else stop.
    2. Both together parse: 0.5, else stop.
    3. The share of tests that pass: up to 1.0.
    4. Where the main function calls the helper and at least one test passes: 0.5; 1.0 more if it is no thin wrapper
       around the helper; 0.5 less if it ignores what the helper returns.

    (arXiv 2508.04652's released code. That the last 1.0 needs a call of the helper is how we read it: a main function
    that does without would otherwise earn it for working alone.)

    Args:
        passed: tests passed, of `tests`, at least 1.

    Returns:
        The reward, and what it is the sum of: "aux", "main", "parses", "tests", "uses_aux", "own_work", "ignored".
    """
    parts = dict.fromkeys(("aux", "main", "parses", "tests", "uses_aux", "own_work", "ignored"), 0.0)
    parts["aux"] = 0.4 if aux_defined else 0.0
    if main_defined:
        parts["main"] = 0.6
        if parses:
            parts["parses"] = 0.5
            parts["tests"] = passed / max(tests, 1)
            if uses_aux and passed:
                parts["uses_aux"] = 0.5
                parts["own_work"] = 0.0 if thin else 1.0
                parts["ignored"] = -0.5 if ignored else 0.0
    return math.fsum(parts.values()), parts


# --- Reading what the agents wrote -----------------------------------------------------------------------------


def _parse(code: str) -> ast.Module | None:
    """The syntax tree, or None. Nothing of it is run."""
    if len(code) > _MOST_CODE:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _functions(tree: ast.Module) -> dict[str, _Function]:
    """The functions defined at its top level; of two with one name the last."""
    return {node.name: node for node in tree.body if isinstance(node, _Function)}


def extract_code(reply: str, name: str) -> str:
    """The Python in a model's reply.

    Of its fenced blocks (also one that the end of the reply cut off), the last that has a line `def name(`, else the
    last that is marked as Python or not marked. Without a fence: from the first line that begins a function, a class,
    a decorator or an import, as many whole top-level statements as parse; all of the rest if none does.

    Args:
        reply: untrusted text; name: the function that it should define.
    """
    fenced: list[tuple[str, str]] = _FENCE.findall(reply)
    blocks = [code for language, code in fenced if language.lower() in ("", "python", "py", "python3")]
    if blocks:
        return next((block for block in reversed(blocks) if _has_head(block, name)), blocks[-1])
    lines = reply.split("\n")
    first = next((i for i, line in enumerate(lines) if line.startswith(_STARTS)), None)
    if first is None:
        return "" if _parse(reply) is None else reply.strip()
    lines = lines[first:]
    # Prose behind the code starts at the margin, as a statement does; a broken function is not mended.
    ends = [i for i, line in enumerate(lines) if i and line and not line[0].isspace()]
    for end in [len(lines), *reversed(ends[-64:])]:
        code = "\n".join(lines[:end])
        if _parse(code) is not None:
            return code
    return "\n".join(lines)


def _has_head(code: str, name: str) -> bool:
    return re.search(rf"^(?:async +)?def +{re.escape(name)} *\(", code, re.MULTILINE) is not None


def _defines(code: str, name: str) -> bool:
    """Whether a top-level function has that name; where the code doesn't parse, whether a line begins one."""
    tree = _parse(code)
    return _has_head(code, name) if tree is None else name in _functions(tree)


def _calls(node: ast.AST, name: str) -> list[ast.Call]:
    return [n for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == name]


def _body(function: _Function) -> list[ast.stmt]:
    """Its statements without docstring, `pass` and imports."""
    skipped = (ast.Pass, ast.Import, ast.ImportFrom)
    statements = [s for s in function.body if not isinstance(s, skipped)]
    return [s for s in statements if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]


def uses_function(main: _Function, name: str = HELPER) -> bool:
    """Whether `main` calls the function of that name, and no parameter or variable of `main`'s own has its name."""
    own = {argument.arg for argument in ast.walk(main) if isinstance(argument, ast.arg)}
    own |= {n.id for n in ast.walk(main) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    own |= {n.name for n in ast.walk(main) if isinstance(n, _Function) and n is not main}
    return name not in own and bool(_calls(main, name))


def thin_wrapper(main: _Function, name: str = HELPER) -> bool:
    """Whether `main` does nothing but hand its work to the helper.

    It is one if, apart from docstring, `pass` and imports, its body is `return aux(…)`, or `x = aux(…)` and then
    `return x`, where every argument is a plain name, constant, attribute or `*name`. Any other statement, and any
    computation on the arguments or on the result, is work of its own.
    """

    def hands_over(value: ast.expr | None) -> bool:
        if not (isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == name):
            return False
        arguments = [a.value if isinstance(a, ast.Starred) else a for a in value.args]
        arguments += [keyword.value for keyword in value.keywords]
        return all(isinstance(a, ast.Name | ast.Constant | ast.Attribute) for a in arguments)

    match _body(main):
        case [ast.Return(value=value)]:
            return hands_over(value)
        case [
            ast.Assign(targets=[ast.Name(id=kept)], value=value) | ast.AnnAssign(target=ast.Name(id=kept), value=value),
            ast.Return(value=ast.Name(id=given)),
        ]:
            return kept == given and hands_over(value)
    return False


def ignores_result(main: _Function, name: str = HELPER) -> bool:
    """Whether `main` calls the helper and uses no call's result.

    A result is unused if the call stands alone as a statement, or is assigned as it is to names that `main` never
    reads. Any other place of a call counts as use.
    """
    calls = _calls(main, name)
    read = {n.id for n in ast.walk(main) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    unused: set[int] = set()
    for node in ast.walk(main):
        match node:
            case ast.Expr(value=ast.Call() as call):
                unused.add(id(call))
            case ast.Assign(targets=targets, value=ast.Call() as call):
                inner = [n for target in targets for n in ast.walk(target) if isinstance(n, ast.expr)]
                places = [n for n in inner if not isinstance(n, ast.Tuple | ast.List | ast.Starred)]
                if all(isinstance(n, ast.Name) and n.id not in read for n in places):
                    unused.add(id(call))
            case ast.AnnAssign(target=ast.Name(id=kept), value=ast.Call() as call):
                if kept not in read:
                    unused.add(id(call))
    return bool(calls) and all(id(call) in unused for call in calls)


def _own_part(tree: ast.Module, foreign: str) -> str:
    """Its definitions: imports, functions, classes and assignments. Left out are statements that only run something
    (examples, prints) and the function that is the other agent's to write."""
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    body: list[ast.stmt] = [
        node
        for node in tree.body
        if isinstance(node, kept)
        and not (isinstance(node, _Function) and node.name == foreign)
        and not (isinstance(node, ast.ImportFrom) and node.module == "__future__")
    ]
    return ast.unparse(ast.Module(body, []))


@dataclass(frozen=True)
class _Draft:
    """Two replies, read."""

    codes: tuple[str, str]
    aux_defined: bool
    main_defined: bool
    parses: bool
    program: Program | None = None
    uses_aux: bool = False
    thin: bool = False
    ignored: bool = False


def _read(problem: Problem, completions: Sequence[str]) -> _Draft:
    aux, main = (
        extract_code(text, name) for text, name in zip(completions, (HELPER, problem.entry_point), strict=True)
    )
    aux_defined, main_defined = _defines(aux, HELPER), _defines(main, problem.entry_point)
    trees = [_parse(aux), _parse(main)]
    draft = _Draft((aux, main), aux_defined, main_defined, trees[0] is not None and trees[1] is not None)
    if trees[0] is None or trees[1] is None or not main_defined:
        return draft
    try:
        # A helper that only the main agent wrote is still its helper to call, but earns no mark as `aux`.
        foreign = HELPER if aux_defined else ""
        parts = [problem.preamble, _own_part(trees[0], problem.entry_point), _own_part(trees[1], foreign)]
        function = _functions(trees[1])[problem.entry_point]
        return _Draft(
            draft.codes,
            aux_defined,
            main_defined,
            True,
            Program(
                "\n\n".join(part for part in parts if part),
                problem.tests,
                (problem.entry_point,),
                {"candidate": problem.entry_point},
            ),
            aux_defined and uses_function(function),
            thin_wrapper(function),
            ignores_result(function),
        )
    except RecursionError:
        return _Draft(draft.codes, aux_defined, main_defined, False)


# --- The task --------------------------------------------------------------------------------------------------

_SYSTEM = "You are one of two programmers who write one Python program together. Answer with one ```python block."


@dataclass(frozen=True)
class CodingSettings(TaskSettings):
    """Settings of the task `coding`."""

    rollout: ClassVar[Mapping[str, Any]] = {"turns": 2, "max_tokens": 256}

    data: str = ""
    """A .jsonl, one problem a line: entry_point, signature, description, tests (a list of asserts), and if wanted name,
    aux_hint, preamble; or with HumanEval's names: prompt, entry_point, test. Default: 24 problems that come with
    Echelon."""
    feedback: FeedbackMode = "level_feedback"
    """What the agents are told between turns: level_feedback (each level, with the first test that failed),
    level_passed (of each level whether it was reached), passed (whether all were), plain (both codes alone)."""
    shift: float = -4.0
    """Added to each reward. With -4, as in the published runs, all is well at 0."""
    eval_fraction: float = 0.25
    """Share of the problems kept for evaluation."""
    split_seed: int = 0
    """Which ones those are."""
    workers: int | None = None
    """Programs that run at the same time; default: as many as there are cores."""
    weak_sandbox: bool = False
    """Run programs also where the kernel offers too little to keep them in."""

    def __post_init__(self) -> None:
        if self.feedback not in get_args(FeedbackMode):
            raise unknown_name("feedback mode", self.feedback, get_args(FeedbackMode))
        if not math.isfinite(self.shift):
            raise EchelonError(f"env.shift is {self.shift}: it must be finite")


class CodingTask:
    """Two agents program together; neither sees what the other writes in the same turn. See `coding_reward`.

    The function of an agent counts only from its own reply: a second `aux` in the main agent's reply is left out where
    the helper agent wrote one, and so is a main function in the helper agent's reply. Programs may import the standard
    library only.

    Attributes:
        name: "coding".
        roles: ("helper", "main").
        problems: by item.
        sandbox: where the tests run.
        settings: how it is set up.
    """

    name = "coding"
    roles: tuple[str, ...] = ("helper", "main")

    def __init__(self, settings: CodingSettings | None = None, *, limits: Limits | None = None) -> None:
        """Read the problems.

        Args:
            settings: which problems, split, feedback and sandbox.
            limits: of a program's run.

        Raises:
            EchelonError: the file can't be read or a line of it is no problem, or a setting is out of range.
        """
        self.settings = c = settings or CodingSettings()
        self.problems = _problems(Path(c.data) if c.data else None)
        self._split = split_items(len(self.problems), c.eval_fraction, c.split_seed, c.data or "the coding set")
        self.sandbox = Sandbox(limits, workers=c.workers, weak=c.weak_sandbox)

    def close(self) -> None:
        """End the sandbox's processes; a later `score` starts new ones."""
        self.sandbox.close()

    def items(self, split: str) -> NDArray[np.int64]:
        """See `TeamTask.items`."""
        if split not in self._split:
            raise unknown_name("split", split, self._split)
        return self._split[split]

    def prompts(self, item: int, history: Sequence[Turn]) -> list[AgentPrompt]:
        """See `TeamTask.prompts`. After a turn, both see both codes of it, and the feedback."""
        problem = self.problems[item]
        shown = f"```python\n{problem.statement}\n```"
        hint = f" {problem.aux_hint}" if problem.aux_hint else " It should do a useful part of the work."
        texts = [
            f"The program is to solve this:\n{shown}\nWrite only the helper function `{HELPER}`.{hint} The other "
            f"programmer writes `{problem.entry_point}` and calls `{HELPER}`.",
            f"Write the function `{problem.entry_point}`:\n{shown}\nThe other programmer writes a helper function "
            f"`{HELPER}`.{hint} Call it and use what it returns; don't define it.",
        ]
        if history:
            last = history[-1]
            names = (HELPER, problem.entry_point)
            codes = [extract_code(text, name) for text, name in zip(last.completions, names, strict=True)]
            review = "".join(f"\n\nThe last `{n}`:\n```python\n{c}\n```" for n, c in zip(names, codes, strict=True))
            if last.scored.feedback:
                review += f"\n\n{last.scored.feedback}"
            texts = [f"{text}{review}\n\nWrite your function anew." for text in texts]
        return [AgentPrompt(_SYSTEM, text) for text in texts]

    def score(self, attempts: Sequence[Attempt]) -> list[Scored]:
        """See `TeamTask.score`. The programs run in parallel, equal ones once."""
        drafts = [_read(self.problems[attempt.item], attempt.completions) for attempt in attempts]
        programs = {(d.program.code, d.program.tests): d.program for d in drafts if d.program is not None}
        results = dict(zip(programs, self.sandbox.run_many(list(programs.values())), strict=True))
        found = []
        for attempt, draft in zip(attempts, drafts, strict=True):
            result = None if draft.program is None else results[(draft.program.code, draft.program.tests)]
            found.append(self._judge(self.problems[attempt.item], draft, result))
        return found

    def _judge(self, problem: Problem, draft: _Draft, result: RunResult | None) -> Scored:
        if result is not None and result.status == "lost":
            return Scored(
                self.settings.shift, {"shift": self.settings.shift}, error=f"the tests could not be run: {result.error}"
            )
        reward, parts = coding_reward(
            aux_defined=draft.aux_defined,
            main_defined=draft.main_defined,
            parses=draft.parses,
            passed=0 if result is None else sum(result.passed),
            tests=len(problem.tests),
            uses_aux=draft.uses_aux,
            thin=draft.thin,
            ignored=draft.ignored,
        )
        done = math.isclose(reward, BEST_CODING_REWARD, abs_tol=1e-9)
        if self.settings.shift:
            parts["shift"] = self.settings.shift
        return Scored(reward + self.settings.shift, parts, self._tell(problem, draft, result, done), done)

    def _tell(self, problem: Problem, draft: _Draft, result: RunResult | None, done: bool) -> str:
        if self.settings.feedback == "plain":
            return ""
        if self.settings.feedback == "passed":
            return "All checks passed." if done else "Not all checks passed."
        total, passed = len(problem.tests), 0 if result is None else sum(result.passed)
        main = problem.entry_point
        defined = draft.aux_defined and draft.main_defined
        well_used = draft.uses_aux and passed > 0 and not draft.thin and not draft.ignored
        levels = {
            "Both functions are defined": defined,
            "The program parses": draft.parses,
            "All tests pass": passed == total,
            f"`{main}` makes good use of `{HELPER}`": well_used,
        }
        if self.settings.feedback == "level_passed":
            return "\n".join(f"{name}: {'yes' if reached else 'no'}." for name, reached in levels.items())
        lines = []
        for name, is_defined in ((HELPER, draft.aux_defined), (main, draft.main_defined)):
            if not is_defined:
                lines.append(f"No function `{name}` was found.")
        if not draft.parses:
            lines.append("The program is not valid Python.")
        if result is not None:
            lines.append(f"{passed} of {total} tests passed.")
            if result.status == "error":
                lines.append(f"The program failed before the tests: {result.error}")
            elif passed < total:
                test, why = next(
                    (t, m) for t, m, ok in zip(problem.tests, result.messages, result.passed, strict=True) if not ok
                )
                why = result.error if why == "not run" and result.error else why
                lines.append(f"The first that failed ({why}): {_short(test)}")
            if draft.aux_defined and not draft.uses_aux:
                lines.append(f"`{main}` does not call `{HELPER}`.")
            elif draft.thin:
                lines.append(f"`{main}` only hands its work to `{HELPER}`; it should do a part of its own.")
            elif draft.ignored:
                lines.append(f"`{main}` does not use what `{HELPER}` returns.")
        return "\n".join(lines) or "All checks passed."


def _short(test: str) -> str:
    """The test's last statement, in one line."""
    line = " ".join(test.strip().rsplit("\n", 1)[-1].split())
    return line if len(line) <= 200 else line[:199] + "…"


# --- Problems --------------------------------------------------------------------------------------------------


def _problems(path: Path | None) -> list[Problem]:
    if path is None:
        where, text = "coding.jsonl", shipped("coding.jsonl")
    else:
        where, text = str(path), read_text(path, "problem file")
    return [_problem(line, f"{where}, problem {n}") for n, line in enumerate(read_json_lines(text, where), 1)]


def _problem(line: dict[str, Any], where: str) -> Problem:
    def text(name: str, default: str | None = None) -> str:
        value = line.get(name, default)
        if not isinstance(value, str):
            raise EchelonError(f"{where}: needs a text {name!r}")
        return value

    entry = text("entry_point")
    if not entry.isidentifier() or entry == HELPER:
        raise EchelonError(f"{where}: entry_point {entry!r} is no name for a main function")
    if "prompt" in line:
        statement = text("prompt").strip("\n")
        tree = _parse(statement + "\n    pass\n") or _parse(statement)
        if tree is None or entry not in _functions(tree):
            raise EchelonError(f"{where}: the prompt does not begin the function {entry!r}")
        before = [node for node in tree.body if not (isinstance(node, _Function) and node.name == entry)]
        preamble = ast.unparse(ast.Module(before, []))
        tests = _split_tests(text("test"), preamble, where)
        name, hint = text("task_id", entry), ""
    else:
        described = text("description").replace('"""', "'''")
        statement = f'def {entry}{text("signature")}:\n    """{described}"""'
        if _parse(statement) is None:
            raise EchelonError(f"{where}: the signature {line['signature']!r} is not Python")
        preamble, name, hint = text("preamble", ""), text("name", entry), text("aux_hint", "")
        given = line.get("tests")
        if isinstance(given, str):
            tests = _split_tests(given, preamble, where)
        elif isinstance(given, list) and all(isinstance(test, str) and _parse(test) is not None for test in given):
            tests = tuple(given)
        else:
            raise EchelonError(f"{where}: 'tests' must be Python asserts, in one text or a list of texts")
        if _parse(preamble) is None:
            raise EchelonError(f"{where}: the preamble is not Python")
    if not tests:
        raise EchelonError(f"{where}: has no tests")
    reference = (text("reference_aux", ""), text("reference_main", ""))
    return Problem(name, entry, statement, text("aux_hint", hint), tests, preamble, reference)


def _split_tests(source: str, preamble: str, where: str) -> tuple[str, ...]:
    """A test a statement that asserts something, each behind all statements before it that don't.

    Of HumanEval's form, the statements are those of `check(candidate)`. Asserts of a constant test nothing and are left
    out: they would pass with any program.
    """
    tree = _parse(source)
    if tree is None:
        raise EchelonError(f"{where}: the tests are not Python")
    body = tree.body
    check = _functions(tree).get("check")
    if check is not None:
        body = [node for node in body if not (isinstance(node, _Function) and node.name == "check")] + check.body
    before: list[ast.stmt] = []
    tests = []
    for node in body:
        if isinstance(node, ast.Assert) and isinstance(node.test, ast.Constant):
            continue
        defines = isinstance(node, _Function | ast.ClassDef)
        if not defines and any(isinstance(n, ast.Assert) for n in ast.walk(node)):
            code = ast.unparse(ast.Module([*before, node], []))
            tests.append(f"{preamble}\n{code}" if preamble else code)
        else:
            before.append(node)
    return tuple(tests)
