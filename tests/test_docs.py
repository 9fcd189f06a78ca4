"""The docs are true: their code runs, their commands parse, their links, flags, fields and defaults exist."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import json
import re
import runpy
import shlex
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from echelon import algorithms, cli, cli_also, cli_teams, envs, methods, planners, shaping, tasks
from echelon.advantages import team_advantages
from echelon.algorithms import (
    AlgorithmConfig,
    GRPOConfig,
    HiMACConfig,
    HiPERConfig,
    IACConfig,
    IPPOConfig,
    MAACConfig,
    MAGRPOConfig,
    MAPPOConfig,
    QMIXConfig,
    TeamConfig,
    VDNConfig,
    team_algorithms,
)
from echelon.algorithms.decisions import LearnerConfig
from echelon.also import ALSO_METHODS, AlsoConfig, AlsoSettings, AlsoTrainer
from echelon.configs import PLAIN_TABLES, GrowthConfig, PlanningConfig, RunConfig, read_toml
from echelon.envs import GridConfig, RepairConfig, SearchConfig, WarehouseConfig
from echelon.evaluation import evaluate_run
from echelon.evaluation.protocol import Protocol
from echelon.flags import run_flags
from echelon.llm import BudgetConfig, GGUFConfig, ServerConfig
from echelon.llm.policy import PolicyConfig
from echelon.planner_training import PlannerConfig, PlannerTrainer
from echelon.planners.distilled import DistilConfig
from echelon.planners.generating import FIELDS
from echelon.planners.replies import FINDINGS
from echelon.reports.account import write_account
from echelon.reports.dialogues import write_dialogues
from echelon.shaping import ShapingSettings
from echelon.studies import Study, presets, read_study, run_study
from echelon.studies.work import execute
from echelon.subgoals import BESIDE, SubgoalConfig
from echelon.tasks import CodingSettings, CodingTask, WritingSettings
from echelon.tasks.coding import coding_reward
from echelon.tasks.writing import ARXIV, TLDR
from echelon.teams.configs import TeamPolicyConfig, TeamRunConfig
from echelon.teams.robots import RobotTeamSettings, SearchTeamSettings, WarehouseTeamSettings
from echelon.teams.rollouts import TeamRolloutConfig
from echelon.teams.training import TeamTrainer
from echelon.training import Trainer
from tiny_model import make_tiny_model

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

BLOCK = re.compile(r"(?:<!-- example: (\S+) -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Code and commands of the docs run as they are, but for their size.
SMALLER = [
    (r"steps=[\d_]+", "steps=1024"),
    (r"episodes=\d+", "episodes=4"),
    (r"--(steps|checkpoint-every) \d+", r"--\1 1024"),
    (r"--(eval-)?episodes \d+", r"--\1episodes 4"),
    (r"(?m)^(final_)?episodes = \d+", r"\1episodes = 4"),
    (r"(?m)^num_envs = \d+", "num_envs = 16"),
    (
        r"imitation=\d+, lessons=\d+, iterations=\d+, scenes=\d+, worlds=\d+",
        "imitation=2, lessons=3, iterations=1, scenes=3, worlds=8, max_size=9, max_agents=3, threads=1",
    ),
    (r"updates=\d+", "updates=1, threads=1"),
]
OWN_COMMANDS = {"train-planner", "study", "reproduce", "report", "replay", "models", "check-env"}
RUN_COMMANDS = {
    "train": cli._TrainFlags,
    "compare": cli._CompareFlags,
    "plan": cli._PlanFlags,
    "bench": cli._BenchFlags,
}
# The files that pages show as TOML.
TOML = {"quickstart.md": "search.toml", "studies.md": "aisles.toml", "shaping.md": "shaped.toml"}
# What these pages tell of other programs, and of an algorithm of one's own.
FOREIGN_FLAGS = {"--no-deps", "--logdir", "--algorithm.fade", "--nproc-per-node", "--algorithm.quantile"}
FOREIGN_FLAGS |= {"--env.largest"}


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    text: str
    example: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(language: str) -> list[Block]:
    return [
        Block(page, text.count("\n", 0, m.start()) + 1, m[3], m[1])
        for page in DOCS
        for text in [page.read_text(encoding="utf-8")]
        for m in BLOCK.finditer(text)
        if m[2] == language
    ]


def small(text: str) -> str:
    for pattern, value in SMALLER:
        text = re.sub(pattern, value, text)
    return text


def commands(page: Path) -> list[list[str]]:
    """The `echelon` commands of a page, in order, as their arguments; comments are left out."""
    lines = [line for b in blocks("console") if b.page == page for line in b.text.splitlines()]
    assert all(line.startswith("$ ") for line in lines), f"{page.name}: a console line doesn't begin with '$ '"
    return [shlex.split(line[2:], comments=True)[1:] for line in lines if line.startswith("$ echelon")]


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test works in a folder of its own, and leaves the registers as they were."""
    monkeypatch.chdir(tmp_path)
    # A study's workers are processes of their own, which must find what this one found.
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).resolve().parents[1]))
    registers: list[dict[str, Any]] = [
        envs._REGISTRY, planners._REGISTRY, methods._REGISTRY, algorithms.base._REGISTRY, tasks._REGISTRY,
        algorithms.teams._TEAMS, shaping.base._REGISTRY,
    ]  # fmt: skip
    before = [dict(register) for register in registers]
    yield
    for register, entries in zip(registers, before, strict=True):
        register.clear()
        register.update(entries)


# -- code ------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [b for b in blocks("python") if b.example is None], ids=str)
def test_code_of_the_docs_runs(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    if "adapters" in block.text:
        pytest.importorskip("pettingzoo")
        pytest.importorskip("gymnasium")
    text = small(block.text)
    if re.search(r'"smollm2-135m"', text):  # loaded there: a tiny model of our own takes its place
        text = text.replace('"smollm2-135m"', f'"hf:{make_tiny_model(Path("model"))}"')
    # A quick run's worlds are few, so that an update is short.
    monkeypatch.setattr(RunConfig, "__init__", _with_defaults(RunConfig.__init__, num_envs=16, threads=1), raising=True)
    monkeypatch.setattr(AlsoConfig, "__init__", _with_defaults(AlsoConfig.__init__, num_envs=4, workers=1))
    exec(compile(text, str(block), "exec"), {"__name__": "__main__"})


def _with_defaults(init: Any, **defaults: Any) -> Any:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{**defaults, **kwargs})

    return wrapped


@pytest.mark.parametrize("block", [b for b in blocks("python") if b.example is not None], ids=str)
def test_shown_examples_are_the_files(block: Block) -> None:
    assert block.example is not None
    assert block.text == (ROOT / "examples" / block.example).read_text(encoding="utf-8")


def test_all_examples_are_shown() -> None:
    assert {b.example for b in blocks("python")} - {None} == {path.name for path in EXAMPLES}


def run_example(name: str, *arguments: str) -> str:
    """Run an example as a program; what it printed."""
    out, argv = io.StringIO(), sys.argv
    sys.argv = [name, *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    finally:
        sys.argv = argv
    return out.getvalue()


TINY = ["--env.size", "8", "--env.num-agents", "2", "--num-envs", "8", "--steps", "512", "--threads", "1"]
TINY += ["--eval-episodes", "2", "--replay-episodes", "1", "--out", "run"]


def test_own_planner_runs() -> None:
    said = run_example("own_planner.py", "plan", "--method", "rule-goals", "--planner", "farthest")
    assert "planner farthest" in said and "accepted" in said


def test_own_text_model_plans_and_trains_with_late_plans() -> None:
    said = run_example("own_text_model.py", "plan", "--method", "rule-goals", "--planner", "first-option")
    assert "planner llm:first-option" in said and "Gladly!" in said and "accepted" in said
    late = ["--planning.timing", "lag"]
    run_example("own_text_model.py", "train", "--method", "rule-goals", "--planner", "first-option", *TINY, *late)
    told = lines_of(Path("run/metrics.jsonl"))[-1]
    assert told["model_questions"] > 0 and told["model_failures"] == told["model_malformed"] == 0
    assert told["subgoals_late"] > 0


def test_own_method_trains() -> None:
    said = run_example("own_method.py", "train", "--method", "random-then-optimal", *TINY)
    assert "random-then-optimal" in said
    assert read_toml(Path("run/config.toml")).method == "random-then-optimal"


def test_own_environment_keeps_the_contract_and_trains() -> None:
    assert run_example("own_environment.py", "check-env", "posts") == "posts: good\n"
    run_example("own_environment.py", "train", "--env", "posts", "--method", "rule-goals", *TINY)
    assert Path("run/replays/evaluation.html").exists()


def test_own_executor_succeeds() -> None:
    main = runpy.run_path(str(ROOT / "examples" / "own_executor.py"))["main"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(episodes=20)
    succeeded = int(out.getvalue().split()[0])
    assert succeeded >= 16


def test_own_algorithm_trains_and_resumes_as_if_it_had_never_stopped() -> None:
    fast = ["--method", "fading-goals", "--algorithm.fade", "0.5", "--algorithm.rollout", "16"]
    run_example("own_algorithm.py", "train", *fast, *TINY)
    run_example("own_algorithm.py", "train", *fast, *TINY, "--steps", "256", "--out", "half")
    run_example("own_algorithm.py", "train", "--resume", "half", "--steps", "512", "--eval-episodes", "0")
    told = lines_of(Path("run/metrics.jsonl"))
    assert [line["bonus"] for line in told] == [0.01 * 0.5**n for n in range(1, 5)]
    assert lines_of(Path("half/metrics.jsonl")) == told
    assert "fade = 0.5" in Path("run/config.toml").read_text(encoding="utf-8")
    assert json.loads(Path("run/evaluation.json").read_text(encoding="utf-8"))["episodes"] == 2


def test_own_shaping_is_tried_in_branches() -> None:
    path = ROOT / "examples" / "own_shaping.py"
    few = "--num-envs 16 --steps 4096 --workers 1 --algorithm.rollout 16 --also.checkpoints 0.125 --also.branch 0.125"
    few += " --also.evaluations 2 --also.episodes 2 --also.behaviour 3 --eval-episodes 2 --replay-episodes 1 --out run"
    world = ["--env", "vigil", "--env.size", "6", "--env.num-agents", "2", "--env.limit", "24"]
    run_example("own_shaping.py", "train", "--method", "also", "--imports", str(path), *world, *few.split())
    account = json_of(Path("run/account.json"))
    branches = account["stages"][0]["branches"]
    assert branches[0]["name"] == "no change" and len(branches) == 1 + AlsoSettings().candidates
    assert all(b["problem"] is None and b["curve"] for b in branches)
    assert {"held", "approach", "spread"} >= {term for b in branches[1:] for term in b["config"]["weights"]}
    assert json_of(Path("run/main/evaluation.json"))["episodes"] == 2
    # What its docstring says of the terms: 0 to 1, and 1 where all is done.
    runpy.run_path(str(path))
    env, terms = envs.make("vigil", num_envs=64, size=6, num_agents=2, seed=0), shaping.term_set("vigil")
    told, done = terms.terms(env), 0
    for k in range(40):
        env.advance(np.random.default_rng(k).integers(0, 5, (64, 2)).astype(np.int8))
        told = terms.terms(env)
        assert (told >= 0).all() and (told <= 1).all()
        assert (told[env.terminated] == 1).all() and (told[~env.terminated, 0] < 1).all()
        done += int(env.terminated.sum())
        env.autoreset()
    assert done > 0


def test_own_learner_learns() -> None:
    odds = ast.literal_eval(run_example("own_learner.py"))
    assert odds["near"] > 0.9 and list(odds) == ["near", "far", "farthest"]


@pytest.fixture(scope="module")
def tiny_team(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a team's training that is over at once."""
    model = make_tiny_model(tmp_path_factory.mktemp("team") / "model")
    few = "--updates 2 --batch 1 --rollout.group 3 --rollout.max-tokens 2 --eval-items 1 --eval-samples 1 --threads 1"
    return ["--model", f"hf:{model}", *few.split()]


def test_own_team_task_trains(tiny_team: list[str]) -> None:
    own = ["--method", "marloo", "--env", "sum", "--env.largest", "9", "--rollout.turns", "2"]
    run_example("own_team_task.py", "train", *own, *tiny_team, "--out", "run")
    assert "largest = 9" in Path("run/config.toml").read_text(encoding="utf-8")
    told = lines_of(Path("run/dialogues.jsonl"))
    assert {line["kind"] for line in told} == {"train", "eval"} and {len(line["path"]) for line in told} == {0, 1}
    example = runpy.run_path(str(ROOT / "examples" / "own_team_task.py"))
    task = example["Sum"](example["SumSettings"](largest=9))
    assert {*task.items("train"), *task.items("eval")} == set(range(2, 10))
    scored = task.score([tasks.Attempt(8, (), said) for said in (("3", "5."), ("3 of them", "1"), ("three", "5"))])
    assert [one.reward for one in scored] == [1.0, 0.5, 0.0] and [one.done for one in scored] == [True, False, False]
    assert "made 8" in task.prompts(8, [tasks.Turn(("3", "5"), scored[0])])[1].text


def test_own_team_algorithm_trains_and_resumes(tiny_team: list[str]) -> None:
    own = ["--method", "maquantile", "--env", "writing", "--algorithm.quantile", "0.75"]
    run_example("own_team_algorithm.py", "train", *own, *tiny_team, "--out", "run")
    half = [*own, *tiny_team, "--out", "half"]
    half[half.index("--updates") + 1] = "1"
    run_example("own_team_algorithm.py", "train", *half)
    run_example("own_team_algorithm.py", "train", "--resume", "half", "--updates", "2")
    told = lines_of(Path("run/metrics.jsonl"))
    assert len(told) == 2 and lines_of(Path("half/metrics.jsonl")) == told
    assert "quantile = 0.75" in Path("run/config.toml").read_text(encoding="utf-8")


def test_own_study_runs_its_own_method(capfd: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "examples" / "own_study.py"))["main"]
    main(Path("study"), steps=2048, episodes=4)
    said = capfd.readouterr().out
    assert said.count(": finished (") == 6 and said.count("TSR {'value'") == 2
    main(Path("study"), steps=2048, episodes=4)
    assert "finished" not in capfd.readouterr().out
    subgoals = {read_toml(path).subgoals.every for path in Path("study/runs").glob("*-hasty-goals-*/config.toml")}
    assert subgoals == {5}


def test_python_api_runs_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunConfig, "__init__", _with_defaults(RunConfig.__init__, num_envs=16, threads=1))
    main = runpy.run_path(str(ROOT / "examples" / "python_api.py"))["main"]
    with contextlib.redirect_stdout(io.StringIO()):
        main(Path("run"), steps=1024, episodes=8)
        main(Path("run"), steps=1024, episodes=8)
    assert "<canvas" in Path("run/replay.html").read_text(encoding="utf-8")


def code_lines(source: str) -> int:
    """Lines that hold code: no comments, docstrings or blank lines."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skip:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_are_short(path: Path) -> None:
    lines = code_lines(path.read_text(encoding="utf-8"))
    assert lines < 40
    if path.name == "own_environment.py":
        said = re.search(r"takes (\d+) lines of code", (ROOT / "docs/extending.md").read_text(encoding="utf-8"))
        assert said is not None and lines == int(said[1])


# -- commands --------------------------------------------------------------------------------


def help_of(*command: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main([*command, "--help"])
    return out.getvalue()


@pytest.fixture(scope="module")
def known_flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The flags in each command's help, with those of every world, algorithm and task."""
    learnt_by = {(m.algorithm, m.learner): m.name for m in methods.methods().values()}
    found = {}
    for command in cli._COMMANDS:
        text = help_of(command)
        if command not in OWN_COMMANDS:
            text += "".join(help_of(command, "--env", world) for world in envs.environments())
            text += "".join(help_of(command, "--method", name) for name in learnt_by.values())
        if command == "train":
            text += help_of(command, "--method", "also")
            for name, task in (("magrpo", "writing"), ("iac", "coding"), ("ma-vdn", "warehouse"), ("iac", "search")):
                text += help_of(command, "--method", name, "--env", task)
        if command == "evaluate":
            team = tmp_path_factory.mktemp("flags")
            (team / "config.toml").write_text('method = "magrpo"', encoding="utf-8")
            text += help_of(command, str(team))
        found[command] = set(re.findall(r"--[a-z][\w.-]*", text))
    return found


def write_toml(change: Callable[[str], str] = lambda text: text) -> None:
    """Put the TOML files that pages show into the working folder."""
    for block in blocks("toml"):
        Path(TOML[block.page.name]).write_text(change(block.text), encoding="utf-8")


def test_shown_toml_says_what_it_should() -> None:
    write_toml()
    assert read_toml(Path("search.toml")).env == SearchConfig(size=30, num_targets=10)
    study = read_study(Path("aisles.toml"))
    runs = study.runs()
    assert study.name == "aisles" and len(runs) == 3 * 2 * 3
    assert {run.config.env.num_packages for run in runs if isinstance(run.config.env, WarehouseConfig)} == {10}
    configs = [run.config for run in runs]
    assert {(c.method, c.num_envs) for c in configs if isinstance(c, RunConfig)} >= {
        ("flat-mappo", 512),
        ("rule-goals", 256),
    }
    shaped = [run.config for run in read_study(Path("shaped.toml")).runs()]
    assert len(shaped) == 5 * 5
    tried = {c.method: c.also.candidates for c in shaped if isinstance(c, AlsoConfig)}
    assert tried == {"also": 3, "sparse": 2, "fixed-pbrs": 2, "also-one-shot": 2}


@pytest.mark.parametrize("page", DOCS, ids=lambda p: p.name)
def test_commands_parse(page: Path, known_flags: dict[str, set[str]]) -> None:
    write_toml()
    for args in commands(page):
        if not args[0].startswith("--"):
            flags = {a.split("=")[0] for a in args if a.startswith("--")}
            assert flags - {"--help"} <= known_flags[args[0]], f"{page.name}: echelon {' '.join(args)}"
        if args[0] == "train" and "--help" not in args and (cli_teams.trains_a_team(args[1:]) or "--updates" in args):
            team, _ = cli_teams.team_flags("train", args[1:], cli_teams._TrainFlags)
            assert team.method in team_algorithms()
        elif args[0] == "train" and cli_also.trains_also(args[1:]):
            grown, _ = cli_also._flags(args[1:])
            assert grown.method in ALSO_METHODS
        elif args[0] in RUN_COMMANDS and "--help" not in args:
            if "--config" in args and "runs/" in args[args.index("--config") + 1]:
                args = [a for i, a in enumerate(args) if "--config" not in (a, args[i - 1])]
            rest = args[2:] if args[1:2] and args[1].startswith("runs/") else args[1:]
            run, _ = run_flags(args[0], rest, RUN_COMMANDS[args[0]])
            assert run.env is not None
        if args[0] in ("study", "reproduce") and "--help" not in args:
            assert cli.main([*args, *(["--dry-run"] if "--dry-run" not in args else [])]) == 0


def runs_here(args: list[str], name: str) -> bool:
    """Whether a command of the page `name` is cheap, and needs no model, network or minutes."""
    if args[0].startswith("--") or "--help" in args:
        return True
    if args[0] == "plan" and args[1:2] and args[1].startswith("runs/"):
        return True
    if args[0] in ("study", "reproduce"):
        return "--dry-run" in args or (name == "docs/studies.md" and args[1:] == ["aisles.toml"])
    if args[0] == "report":
        return Path(args[1]).exists()
    if args[0] in ("train", "plan") and "--resume" not in args and "--config" not in args:
        return "rule-goals" in args or "flat-mappo" in args
    return args[0] in ("evaluate", "replay", "compare", "train")


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md", "docs/cli.md", "docs/studies.md"])
def test_commands_run_in_their_order(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / name
    write_toml(small)
    for args in commands(page):
        if not runs_here(args, name):
            continue
        args = shlex.split(small(shlex.join(args)))
        if args[0] in ("train", "compare") and "--resume" not in args and "--help" not in args:
            defaults = {"--steps": "512", "--num-envs": "8", "--threads": "1", "--eval-episodes": "4"}
            args += [word for flag, value in defaults.items() if flag not in args for word in (flag, value)]
            args += ["--algorithm.rollout", "16", "--env.limit", "40"]
        if args[0] == "study" and "--dry-run" not in args:
            args += ["--steps", "512", "--sizes", "8", "--agents", "2", "--seeds", "0"]
        if "--resume" in args:
            args += ["--eval-episodes", "2"]
            if "--steps" in args:
                args[args.index("--steps") + 1] = "1280"
        if args[0] == "evaluate" and "--episodes" not in args:
            args += ["--episodes", "2", "--env.limit", "20"]
        assert cli.main(args) == 0, f"{name}: echelon {' '.join(args)}\n{capsys.readouterr().err}"
    if name == "docs/studies.md":
        assert Path("studies/aisles/report.html").exists()


def test_a_teams_commands_run_in_their_order(tiny_team: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    model, lead = tiny_team[1], dict(zip(tiny_team[::2], tiny_team[1::2], strict=True))
    for args in commands(ROOT / "docs/teams.md"):
        args = [model if word == "smollm2-135m" or word.startswith("hf:") else word for word in args]
        few = {flag: value for flag, value in lead.items() if flag != "--model" or flag not in args}
        few |= {"--rollout.turns": "2"}
        if "--resume" in args:
            few = {"--updates": "3"}
        elif args[0] == "evaluate":
            few = {"--items": "1", "--samples": "2"}
        elif "--imitation" in args:
            few |= {"--imitation": "1", "--imitation-batch": "2", "--lessons": "2"}
        for flag, value in few.items():
            if flag in args:
                args[args.index(flag) + 1] = value
            else:
                args += [flag, value]
        assert cli.main(args) == 0, f"echelon {' '.join(args)}\n{capsys.readouterr().err}"
    assert len(lines_of(Path("runs/writing/metrics.jsonl"))) == 3
    assert json_of(Path("runs/writing/evaluation.json"))["episodes"] == 2
    assert (Path("runs/writing") / "team" / "agent0").is_dir() and Path("runs/writing/dialogues.html").exists()


def test_commands_of_proposed_shaping_run_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    few = "--steps 2048 --num-envs 16 --workers 1 --env.size 8 --env.num-agents 2 --env.limit 24 --algorithm.rollout 16"
    few += " --also.checkpoints 0.125 --also.branch 0.125 --also.candidates 1 --also.evaluations 1 --also.episodes 2"
    few += " --also.behaviour 3"
    ran = 0
    write_toml(lambda text: text.replace("num_envs = 256", "num_envs = 16"))
    for args in commands(ROOT / "docs/shaping.md"):
        if args[0] == "study":
            args += ["--steps", "2048", "--sizes", "8", "--agents", "2", "--seeds", "0", "--methods", "also", "sparse"]
        if any(word.startswith("openai:") for word in args):
            continue
        if args[0] == "train" and "--resume" not in args:
            lead = dict(zip(few.split()[::2], few.split()[1::2], strict=True))
            args = [*args, *(word for flag in lead if flag not in args for word in (flag, lead[flag]))]
            args = [lead.get(args[i - 1], word) for i, word in enumerate(args)]
        if args[0] == "train":
            args += ["--eval-episodes", "2", "--replay-episodes", "1"]
        if args[0] == "evaluate":
            args[args.index("--episodes") + 1] = "2"
        assert cli.main(args) == 0, f"echelon {' '.join(args)}\n{capsys.readouterr().err}"
        ran += 1
    assert ran == 7
    assert ">account</a>" in Path("studies/shaped/report.html").read_text(encoding="utf-8")
    stages = json_of(Path("runs/also/account.json"))["stages"]
    assert len(stages) == 1 and stages[0]["verdict"] is not None
    assert json_of(Path("runs/sparse/account.json"))["stages"] == []
    assert Path("runs/also/account.html").exists() and Path("runs/also/main/replays/evaluation.html").exists()


def test_flags_of_the_docs_exist(known_flags: dict[str, set[str]]) -> None:
    known = set().union(*known_flags.values()) | {"--env", "--config", "--version", "--help"} | FOREIGN_FLAGS
    for page in DOCS:
        for flag in re.findall(r"(?<![\w-])--[a-z][\w.…-]*", page.read_text(encoding="utf-8")):
            if flag[-1] in ".…-":
                assert any(k.startswith(flag.rstrip(".…")) for k in known), f"{page.name}: {flag}"
            else:
                assert flag in known, f"{page.name}: {flag}"


def test_the_overview_names_what_the_docs_name() -> None:
    text = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(cli._COMMANDS)


# -- links, fields, defaults -----------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", DOCS, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def section(page: str, head: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    start = re.search(rf"^(##+) {re.escape(head)}$", text, re.MULTILINE)
    assert start is not None, f"{page} has no section {head}"
    rest = text[start.end() :]
    end = re.search(rf"^#{{2,{len(start[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start() if end is not None else None]


def rows(text: str) -> list[list[str]]:
    """The rows of a section's tables whose first cell is code."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")
    ]


def names(text: str) -> set[str]:
    return {name for row in rows(text) for name in re.findall(r"`(\w+)`", row[0])}


@pytest.fixture(scope="module")
def model_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of each kind, in the folder of its method's name; `l2m2` has a language model.

    `spared` has one whose plans are spared in every way, `writes` one that writes its plans.
    """
    place = tmp_path_factory.mktemp("runs")
    model = make_tiny_model(place / "model")
    env = WarehouseConfig(size=8, num_agents=2, num_packages=3)
    learns: dict[str, AlgorithmConfig] = {
        "flat-mappo": MAPPOConfig(rollout=16),
        "l2m2": MAPPOConfig(rollout=16),
        "flat-grpo": GRPOConfig(rollout=16),
        "qmix": QMIXConfig(rollout=16, warmup=0, batch=32),
    }
    for name, algorithm in learns.items():
        config = RunConfig(
            method=name, env=env, steps=512, num_envs=8, threads=1, model=f"hf:{model}", algorithm=algorithm
        )
        Trainer(config, place / name).run()
    shaped = RunConfig(
        method="flat-mappo", env=env, steps=512, num_envs=8, threads=1, algorithm=MAPPOConfig(rollout=16),
        shaping=ShapingSettings(mode="balanced_delivery"),
    )  # fmt: skip
    Trainer(shaped, place / "shaped").run()
    base = RunConfig(
        method="l2m2", env=env, steps=512, num_envs=8, threads=1, model=f"hf:{model}", algorithm=MAPPOConfig(rollout=16)
    )
    student = DistilConfig(enabled=True, start=20, agreement=0.2, audit=0.5, every=2, window=64)
    asked = {
        "spared": {"planning": PlanningConfig(cache="memory"), "distil": student, "budget": BudgetConfig(calls=10**6)},
        "writes": {"planning": PlanningConfig(decide="generate", reflect=True, max_tokens=24)},
    }
    for name, tables in asked.items():
        Trainer(dataclasses.replace(base, **tables), place / name).run()
    growth = GrowthConfig(schedule="joint", window=1, warm_updates=2, warm_steps=8)
    for name in ("hiper", "himac"):
        grown = dataclasses.replace(base.with_method(name), env=dataclasses.replace(env, limit=32), growth=growth)
        Trainer(dataclasses.replace(grown, steps=128), place / name).run()
    tiny = {"lessons": 3, "scenes": 3, "worlds": 8, "max_size": 9, "max_agents": 3, "threads": 1}
    alone = PlannerConfig(model=f"hf:{model}", imitation=2, iterations=1, **tiny)
    PlannerTrainer(alone, place / "alone").run()
    return place


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_metrics_fields_are_those_of_the_docs(model_run: Path) -> None:
    written = {f"subgoals_{name}" for name in BESIDE}
    findings = {f"model_{name}" for name in FINDINGS}
    for name in ("flat-mappo", "flat-grpo", "l2m2", "qmix", "shaped", "spared", "writes", "hiper", "himac"):
        written |= {field for line in lines_of(model_run / name / "metrics.jsonl") for field in line}
    assert findings <= written
    assert written - findings == names(section("docs/files.md", "metrics.jsonl"))


def test_fields_of_a_planners_training_are_those_of_the_docs(model_run: Path) -> None:
    imitation, own = tables("docs/files.md", "A planner's training")
    lines, table = lines_of(model_run / "alone" / "metrics.jsonl"), names(section("docs/files.md", "metrics.jsonl"))
    assert [line["stage"] for line in lines] == ["imitation", "imitation", "reinforcement"]
    assert set(lines[0]) == imitation
    more = set(lines[-1]) - own - {"stage", "step"}
    assert more == {
        name.removeprefix("planner_")
        for line in lines_of(model_run / "himac" / "metrics.jsonl")
        for name in line
        if name.startswith("planner_")
    }
    assert {f"planner_{name}" for name in more} <= table


def test_timings_fields_are_those_of_the_docs(model_run: Path) -> None:
    line, other, grown = (lines_of(model_run / name / "timings.jsonl")[-1] for name in ("l2m2", "qmix", "hiper"))
    text, keys = section("docs/files.md", "timings.jsonl").split("Keys of `model_spent`")
    assert set(line) == names(text)
    spent = {key for name in ("l2m2", "spared", "writes")
             for one in lines_of(model_run / name / "timings.jsonl") for key in one["model_spent"]}  # fmt: skip
    assert spent <= set(re.findall(r"`(\w+)`", keys)) and "cache_misses" in spent
    assert {*line["shares"], *other["shares"], *grown["shares"]} <= set(re.findall(r"`(\w+)`", text))


def test_plan_fields_are_those_of_the_docs(model_run: Path) -> None:
    plans = lines_of(model_run / "l2m2" / "plans.jsonl")
    text = section("docs/files.md", "plans.jsonl")
    record, people = text.split("**For people**")
    head, entries = people.split("An entry of `agents`")
    told = [plan for plan in plans if "subgoals" not in plan]
    assert all(set(plan) == names(head) for plan in told)
    assert {field for plan in told for agent in plan["agents"] for field in agent} <= names(entries)
    kept = [plan for plan in plans if "subgoals" in plan]
    assert kept and {field for plan in kept for field in plan} <= names(record)
    about_agents, note = entries.split("In `note`:")
    for name in ("spared", "writes"):
        told = [plan for plan in lines_of(model_run / name / "plans.jsonl") if "subgoals" not in plan]
        assert told and all(set(plan) == names(head) for plan in told)
        assert {field for plan in told for agent in plan["agents"] for field in agent} <= names(about_agents)
        assert {field for plan in told for field in plan["note"]} <= names(note)


def test_a_models_tables_are_those_of_the_docs() -> None:
    assert [row[0].strip("`") for row in rows(section("docs/models.md", "Templates, memory and reflection"))] == [
        *FIELDS
    ]
    told = {row[0].strip("`"): row[1] for row in rows(section("docs/models.md", "Writing"))}
    assert told == dict(FINDINGS)
    heads = [
        re.findall(r"^### `(\w+)`$", section(page, "Settings"), re.MULTILINE)
        for page in ("docs/models.md", "docs/learning.md")
    ]
    assert heads[1] == ["growth", "policy", "learner"]
    assert heads[0] == [name for name in PLAIN_TABLES if name not in {*heads[1], "shaping"}]
    told = set(re.findall(r"^\| `\[(\w+)\]` ", section("docs/files.md", "config.toml"), re.MULTILINE))
    assert told == {"env", "subgoals", "algorithm", "learner", *PLAIN_TABLES}


def test_run_files_are_those_of_the_docs(model_run: Path) -> None:
    text = (ROOT / "docs/files.md").read_text(encoding="utf-8")
    for name in [
        p.name for run in ("l2m2", "spared", "hiper", "alone", "alone/planner") for p in (model_run / run).iterdir()
    ] + [p.name for p in next((model_run / "l2m2" / "checkpoints").iterdir()).iterdir()]:
        assert re.search(rf"`{re.escape(name)}/?`", text), name


def test_evaluation_fields_are_those_of_the_docs(model_run: Path) -> None:
    result = evaluate_run(read_toml(model_run / "flat-mappo" / "config.toml"), model_run / "flat-mappo", episodes=2)
    assert result is not None
    text = section("docs/files.md", "evaluation.json")
    assert set(result) == names(text)
    assert set(result["of"]) <= set(re.findall(r"`(\w+)`", text.split("| `of`")[1]))


class Inline:
    """Does a study's runs in this process, one after the other."""

    slots = 1

    def __init__(self) -> None:
        self._ended: list[tuple[str, dict[str, Any]]] = []

    def start(self, job: dict[str, Any]) -> None:
        self._ended.append((job["id"], execute(job)))

    def wait(self, seconds: float) -> list[tuple[str, dict[str, Any]]]:
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny study with all that is written of it; one method fails, one learns nothing."""
    folder = tmp_path_factory.mktemp("studies") / "tiny"
    study = Study(
        "tiny", methods=("rule-goals", "random-goals", "classical"), sizes=(8,), agents=(2,), seeds=(0, 1), steps=256,
        protocol=Protocol(every=128, episodes=2, final_episodes=2),
        settings={
            "run": {"num_envs": 8, "algorithm": {"rollout": 16}},
            "method": {"random-goals": {"planner": "nobody"}},
        },
    )  # fmt: skip
    run_study(study, folder, Inline())
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(["report", str(folder)]) == 0
    return folder


def json_of(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def tables(page: str, head: str) -> list[set[str]]:
    """The fields of each table of a section, in order."""
    parts = re.split(r"\n\n(?=\|)", section(page, head))
    return [names(part) for part in parts if names(part)]


def test_study_files_are_those_of_the_docs(study_folder: Path) -> None:
    text = section("docs/files.md", "A study's folder")
    everywhere = (ROOT / "docs/files.md").read_text(encoding="utf-8")
    for place, told in ((study_folder, text), (study_folder / "tables", text)):
        for path in place.iterdir():
            assert re.search(rf"`{re.escape(path.name)}/?`", told), path.name
    for run in (study_folder / "runs").iterdir():
        for path in run.iterdir():
            assert re.search(rf"`{re.escape(path.name)}/?`", everywhere), path.name
    told_files = set(re.findall(r"^\| `([\w./]+)` ", text, re.MULTILINE)) - {"progress.json", "workers.log"}
    for name in told_files:
        assert list(study_folder.glob(name)) or list(study_folder.glob(f"runs/*/{name}")), name


def test_result_fields_are_those_of_the_docs(study_folder: Path) -> None:
    results = json_of(study_folder / "results.json")
    head, entry, more = tables("docs/files.md", "results.json")
    judged, evaluation, final = tables("docs/files.md", "protocol.json")
    assert set(results) == head
    assert set(results["study"]) <= set(re.findall(r"`(\w+)`", section("docs/files.md", "results.json")))
    finished = [run for run in results["runs"] if run["status"] == "finished"]
    failed = [run for run in results["runs"] if run["status"] == "failed"]
    assert len(finished) == 4 and len(failed) == 2
    for run in finished:
        assert set(run) == entry | more | (judged - {"of"})
        assert all(set(e) == evaluation for e in run["evaluations"])
        assert set(run["last"]) == set(run["best"]) == final
        folder = study_folder / "runs" / run["id"]
        assert set(json_of(folder / "protocol.json")) == judged
        assert json_of(folder / "result.json") == {"format": 1, **run}
    for run in failed:
        assert set(run) == entry and "nobody" in run["reason"]
        told = json_of(study_folder / "runs" / run["id"] / "failed.json")
        assert set(told) == names(section("docs/files.md", "result.json and failed.json"))


def test_analysis_fields_are_those_of_the_docs(study_folder: Path) -> None:
    analysis = json_of(study_folder / "analysis.json")
    head, cell = tables("docs/files.md", "analysis.json")
    assert set(analysis) == head
    assert all(set(c) == cell for c in analysis["cells"])
    assert {"id", "reason"} == set(analysis["failed"][0])


def test_study_keys_are_those_of_the_docs() -> None:
    told = names(section("docs/studies.md", "A study of your own")) | {"protocol"}
    assert told == {f.name for f in dataclasses.fields(Study)} - {"settings"}
    study, text = Study("any"), section("docs/studies.md", "A study of your own")
    assert f"| `steps` | {study.steps:,} |" in text and f"| `record` | {study.record} |" in text
    p = study.protocol
    assert f"| every {p.every:,} steps, {p.episodes} episodes, {p.final_episodes} at the end |" in text
    for name in ("methods", "environments"):
        assert f"| `{name}` | {', '.join(f'`{m}`' for m in getattr(study, name))} |" in text
    several = "; ".join(", ".join(map(str, getattr(study, name))) for name in ("sizes", "agents", "seeds"))
    assert f"| `sizes`, `agents`, `seeds` | {several} |" in text


def test_presets_are_those_of_the_docs() -> None:
    text = (ROOT / "docs/studies.md").read_text(encoding="utf-8").split("## ")[0]
    table = {row[0].strip("`"): row[1:] for row in rows(text)}
    assert list(table) == list(presets())
    for name, study in presets().items():
        p = study.protocol
        steps = f"{study.steps // 10**6} million" if study.steps >= 10**6 else f"{study.steps:,}"
        assert table[name] == [
            ", ".join(map(str, study.sizes)), " and ".join(map(str, study.agents)), str(len(study.seeds)), steps,
            f"{p.episodes} episodes every {p.every:,} steps, then {p.final_episodes}",
        ]  # fmt: skip
    paper = presets()["paper"]
    places = len(paper.sizes) * len(paper.agents) * len(paper.environments)
    assert places * len(paper.seeds) * paper.protocol.final_episodes == 8200


@pytest.mark.parametrize(
    ("page", "head", "config"),
    [
        ("docs/concepts.md", "When agents are replanned", SubgoalConfig()),
        ("docs/methods.md", "MAPPO", MAPPOConfig()),
        ("docs/methods.md", "GRPO", GRPOConfig()),
        ("docs/methods.md", "QMIX and VDN", QMIXConfig()),
        ("docs/methods.md", "Shaped rewards", ShapingSettings()),
        ("docs/learning.md", "A planner by itself", PlannerConfig()),
        ("docs/learning.md", "`growth`", GrowthConfig()),
        ("docs/learning.md", "`policy`", PolicyConfig()),
        ("docs/learning.md", "`learner`", LearnerConfig()),
        ("docs/learning.md", "`learner` of HiPER", HiPERConfig()),
        ("docs/learning.md", "`learner` of HiMAC", HiMACConfig()),
        ("docs/models.md", "`planning`", PlanningConfig()),
        ("docs/models.md", "`distil`", DistilConfig()),
        ("docs/models.md", "`budget`", BudgetConfig()),
        ("docs/models.md", "`server`", ServerConfig()),
        ("docs/models.md", "`gguf`", GGUFConfig()),
        ("docs/environments.md", "Settings of every world", GridConfig()),
        ("docs/environments.md", "`warehouse`", WarehouseConfig()),
        ("docs/environments.md", "`search`", SearchConfig()),
        ("docs/environments.md", "`repair`", RepairConfig()),
        ("docs/teams.md", "Of the run", TeamRunConfig()),
        ("docs/teams.md", "`rollout`", TeamRolloutConfig()),
        ("docs/teams.md", "`policy`", TeamPolicyConfig()),
        ("docs/teams.md", "`algorithm`", TeamConfig()),
        ("docs/teams.md", "`env` of `writing`", WritingSettings()),
        ("docs/teams.md", "`env` of `coding`", CodingSettings()),
        ("docs/teams.md", "`env` of robots", RobotTeamSettings),  # abstract: the class has its defaults
        ("docs/teams.md", "`env` of `warehouse`", WarehouseTeamSettings()),
        ("docs/teams.md", "`env` of `search`", SearchTeamSettings()),
        ("docs/shaping.md", "Of the run", AlsoConfig()),
        ("docs/shaping.md", "`also`", AlsoSettings()),
    ],
    ids=str,
)
def test_defaults_are_those_of_the_docs(page: str, head: str, config: Any) -> None:
    told = {row[0].strip("`"): row[1].strip("`") for row in rows(section(page, head))}
    own = {f.name for f in dataclasses.fields(config)}
    if isinstance(config, GridConfig) and type(config) is not GridConfig:
        own -= {f.name for f in dataclasses.fields(GridConfig)}
    if isinstance(config, LearnerConfig) and type(config) is not LearnerConfig:
        own -= {f.name for f in dataclasses.fields(LearnerConfig)}
    if isinstance(config, RobotTeamSettings) and type(config) is not RobotTeamSettings:
        own -= {f.name for f in dataclasses.fields(RobotTeamSettings)}
    own -= {name for name in own if dataclasses.is_dataclass(getattr(config, name))}
    told = {name: value for name, value in told.items() if name in {f.name for f in dataclasses.fields(config)}}
    assert set(told) == own
    for name, value in told.items():
        default = getattr(config, name)
        default = ", ".join(map(str, default)) if isinstance(default, tuple) else default
        assert value == (str(default).lower() if isinstance(default, bool) else str(default)), name


def test_ippo_and_vdn_differ_in_the_one_thing_that_the_docs_tell() -> None:
    assert dataclasses.asdict(IPPOConfig()) == {**dataclasses.asdict(MAPPOConfig()), "critic": "local"}
    assert dataclasses.asdict(VDNConfig()) == {**dataclasses.asdict(QMIXConfig()), "mixer": "vdn"}


# -- teams of language models ----------------------------------------------------------------


def test_a_teams_methods_and_tasks_are_those_of_the_docs() -> None:
    told = rows(section("docs/teams.md", "Methods").split("### ")[0])
    assert [row[0].strip("`") for row in told] == list(team_algorithms())
    heads = re.findall(r"^### `env` of `(\w+)`$", (ROOT / "docs/teams.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert heads == [name for name in tasks.tasks() if name != "own"]
    text = " ".join(section("docs/teams.md", "`rollout`").split())
    assert "`coding` brings `turns` 2 and `max_tokens` 256;" in text
    assert "`warehouse` and `search` bring `branch` `first`, `turns` 12 and `max_tokens` 12." in text
    assert CodingSettings.rollout == {"turns": 2, "max_tokens": 256}
    assert WarehouseTeamSettings.rollout == SearchTeamSettings.rollout
    assert WarehouseTeamSettings.rollout == {"branch": "first", "turns": 12, "max_tokens": 12}


@pytest.mark.parametrize("head", ["`algorithm` without a critic", "`algorithm` with critics"])
def test_a_teams_algorithms_defaults_are_those_of_the_docs(head: str) -> None:
    text = section("docs/teams.md", head)
    columns = re.findall(r"`([\w-]+)`", next(line for line in text.splitlines() if line.startswith("| setting")))
    common = TeamConfig()
    for place, name in enumerate(columns, 1):
        config = team_algorithms()[name][1]()
        own = {
            f.name: str(value).lower() if isinstance(value, bool) else str(value)
            for f in dataclasses.fields(config)
            for value in [getattr(config, f.name)]
            if not hasattr(common, f.name) or value != getattr(common, f.name)
        }
        told = {row[0].strip("`"): row[place].strip("`") for row in rows(text)}
        assert {setting: value for setting, value in told.items() if value != "–"} == own, name
    assert {name for name in team_algorithms() if hasattr(team_algorithms()[name][1](), "critic")} in (
        set(columns), set(team_algorithms()) - set(columns)
    )  # fmt: skip


def numbers(cell: str) -> list[float]:
    return [float(number.replace("−", "-")) for number in cell.split(", ")]


def test_numbers_about_teams_are_right() -> None:
    told = rows(section("docs/teams.md", "With normalisation, four methods are one"))
    assert [row[0] for row in told] == ["`mean`", "`max`", "`rloo`", "`raw`"]
    for name, plain, normalised in told:
        mode: Any = name.strip("`")
        assert numbers(plain) == [round(x, 3) for x in team_advantages([1, 2, 2, 5], mode=mode)[0].tolist()]
        same = team_advantages([1, 2, 2, 5], normalize=True)[0].tolist()
        assert numbers(normalised) == [round(x, 3) for x in same]
    counts = re.findall(
        r"^\| (aligned|cross|branch first) \| (.*) \|$", section("docs/teams.md", "Joint actions"), re.MULTILINE
    )
    G, N = 4, 2
    assert {name: [int(n.replace(",", "")) for n in row.split(" | ")] for name, row in counts} == {
        "aligned": [G**t for t in (1, 2, 3)], "cross": [G ** (N * t) for t in (1, 2, 3)], "branch first": [G] * 3
    }  # fmt: skip


def test_rewards_of_the_tasks_are_those_of_the_docs() -> None:
    for own in (TLDR, ARXIV):
        points = [own.length_points, own.ratio_points, own.unique_points, own.transition_points, own.jaccard_points]
        told = rows(section("docs/teams.md", "`writing`"))
        assert [float(row[1]) for row in told] == points and sum(points) == pytest.approx(3.0)
        place = 2 if own is TLDR else 3
        for row, band in ((told[1], own.length_ratio), (told[2], own.unique_ratio)):
            bounds = [float(x) for x in re.findall(r"\d\.\d", row[place])]
            assert sorted(bounds) == sorted({x for x in (band.least, band.low, band.high, band.most) if x < 100})
        assert f"{own.min_tokens} to {own.max_tokens}" in told[0][place]
    known = {"aux_defined": True, "main_defined": True, "parses": True, "uses_aux": True}
    parts = coding_reward(**known, passed=3, tests=3, thin=False, ignored=True)[1]
    told = rows(section("docs/teams.md", "`coding`").split("### ")[0])
    assert {row[0].strip("`"): float(row[1].replace("−", "-")) for row in told} == parts


def test_problems_of_the_docs_can_be_read() -> None:
    (block,) = (b for b in blocks("json") if b.page.name == "teams.md")
    Path("problems.jsonl").write_text(block.text, encoding="utf-8")
    task = CodingTask(CodingSettings(data="problems.jsonl"))
    assert [(p.entry_point, len(p.tests)) for p in task.problems] == [("double_all", 2), ("last", 2)]


@pytest.fixture(scope="module")
def team_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Short runs of teams, which together log all that there is to log."""
    place = tmp_path_factory.mktemp("teams")
    model = f"hf:{make_tiny_model(place / 'model')}"
    env = WarehouseTeamSettings(size=6, num_agents=2, num_packages=2, train_items=4, eval_items=2)
    kinds = {
        "magrpo": MAGRPOConfig(kl=0.1, kl_in="return", loss="clip"), "iac": IACConfig(kl=0.1), "maac": MAACConfig()
    }  # fmt: skip
    for name, algorithm in kinds.items():
        run = TeamRunConfig(
            method=name, env=env, model=(model,), updates=1, batch=1, eval_items=1, eval_samples=1, threads=1,
            imitation=1, imitation_batch=2, lessons=2, algorithm=algorithm,
            rollout=TeamRolloutConfig(group=2, max_tokens=2),
        )  # fmt: skip
        trainer = TeamTrainer(run, place / name)
        assert trainer.run()
        trainer.judge("evaluation", items=1, samples=1)
        write_dialogues(place / name)
    return [place / name for name in kinds]


def fields_of(runs: list[Path], name: str) -> set[str]:
    """The fields of a log, every agent's under the first one's name; the task's own parts are left out."""
    found = {re.sub(r"_\d+$", "_0", field) for run in runs for line in lines_of(run / name) for field in line}
    return {field for field in found if not field.startswith("part_")}


def test_a_teams_logs_are_those_of_the_docs(team_runs: list[Path]) -> None:
    metrics = names(section("docs/files.md", "A team's metrics"))
    assert fields_of(team_runs, "metrics.jsonl") == metrics
    text = section("docs/files.md", "A team's evaluations")
    more = set(re.findall(r"`(\w+)`", text.split("as in the metrics,")[1]))
    assert more <= metrics
    assert fields_of(team_runs, "evaluations.jsonl") == names(text) | more
    assert set(json_of(team_runs[0] / "evaluation.json")) == set(lines_of(team_runs[0] / "evaluations.jsonl")[0])
    said = re.findall(r"`(\w+)`", section("docs/files.md", "A team's metrics").split("A line of `imitation.jsonl`")[1])
    assert fields_of(team_runs, "imitation.jsonl") == set(said)
    text = section("docs/files.md", "A team's dialogues")
    lines = [line for run in team_runs for line in lines_of(run / "dialogues.jsonl")]
    assert {field for line in lines for field in line} == names(text)
    assert {field for line in lines for answer in line["answers"] for field in answer} <= set(
        re.findall(r"`(\w+)`", text)
    )


def test_a_teams_files_are_those_of_the_docs(team_runs: list[Path]) -> None:
    text = section("docs/files.md", "A team's run").split("### ")[0]
    told = {row[0].strip("`").rstrip("/") for row in rows(text)}
    assert {path.name for path in team_runs[0].iterdir()} | {".lock"} == told
    assert {"agent0", "agent1", "team.json"} == {path.name for path in (team_runs[0] / "team").iterdir()}
    assert set(lines_of(team_runs[0] / "timings.jsonl")[0]) <= set(re.findall(r"`(\w+)`", text))


# -- shaping that grows with a run -----------------------------------------------------------


@pytest.fixture(scope="module")
def also_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with branches of two seeds in two rounds: all that an account may hold."""
    folder = tmp_path_factory.mktemp("also") / "run"
    run = AlsoConfig(
        env=WarehouseConfig(size=6, num_agents=2, num_packages=2, limit=16), steps=8192, num_envs=16, workers=1,
        algorithm=MAPPOConfig(rollout=16),
        also=AlsoSettings(
            checkpoints=(0.05,), branch=0.05, candidates=1, rounds=2, seeds=2, evaluations=1, episodes=2, behaviour=3
        ),
    )  # fmt: skip
    assert AlsoTrainer(run, folder).run()
    write_account(folder)
    return folder


def test_methods_of_proposed_shaping_are_those_of_the_docs() -> None:
    told = {row[0].strip("`"): row[1:] for row in rows(section("docs/shaping.md", "Methods"))}
    assert list(told) == list(ALSO_METHODS)
    for name, (diagnosis, proposals, branches, _) in told.items():
        kind = ALSO_METHODS[name]
        assert diagnosis.startswith("yes") == (kind.critic and kind.stages != "none")
        told_stages = "all" if "every checkpoint" in proposals else "first" if "first" in proposals else "none"
        assert told_stages == kind.stages
        assert (branches == "yes") == (kind.branches and kind.stages != "none")


def test_files_of_a_run_with_proposed_shaping_are_those_of_the_docs(also_run: Path) -> None:
    text = section("docs/files.md", "A run with proposed shaping")
    files = text.split("### ")[0]
    told = {name.rstrip("/") for row in rows(files) for name in re.findall(r"`([\w./]+)`", row[0])}
    assert {path.name for path in also_run.iterdir()} - {"work"} | {"work/runs"} == told
    everywhere = (ROOT / "docs/files.md").read_text(encoding="utf-8")
    for folder in (also_run / "main", *(also_run / "work" / "runs").iterdir()):
        for path in folder.iterdir():
            assert re.search(rf"`{re.escape(path.name)}/?`", everywhere), path.name


def test_account_fields_are_those_of_the_docs(also_run: Path) -> None:
    account = json_of(also_run / "account.json")
    head, stage, note, branch, mainline, segment = tables("docs/files.md", "account.json")
    text = set(re.findall(r"`(\w+)`", section("docs/files.md", "account.json")))
    assert set(account) == head and set(account["final"]) <= text
    (one,) = account["stages"]
    assert set(one) == stage and len(one["branches"]) == 6 and len(one["lead"]) == 2
    assert "rules" in note and one["card_note"]["rules"] is one["rounds"][0]["proposed"]["note"]["rules"] is True
    assert all(set(b) == branch for b in one["branches"])
    assert all(set(point) == mainline for point in account["mainline"])
    assert all(set(part) == segment for part in account["segments"])
    for told in (*one["summaries"].values(), *one["rounds"], one["rounds"][0]["proposed"], one["verdict"],
                 one["rounds"][0]["proposed"]["candidates"][0], one["evidence"]):  # fmt: skip
        assert set(told) <= text


def test_methods_are_those_of_the_docs() -> None:
    text = (ROOT / "docs/methods.md").read_text(encoding="utf-8").split("```")[0]
    told = {row[0].strip("`"): row for row in rows(text)}
    assert list(told) == list(methods.methods())
    for name, (_, train, evaluate, *_more) in told.items():
        m = methods.method(name)
        cheap = [m.cheap_planner] if m.train_planner == "llm" and not m.learner else []
        trained_under = [m.train_planner, *cheap] if m.learns else []
        assert re.findall(r"`([\w-]+)`", train) == [planner for planner in trained_under if planner]
        assert re.findall(r"`([\w-]+)`", evaluate) == [planner for planner in [m.eval_planner] if planner]


def test_planners_are_those_of_the_docs() -> None:
    text = (ROOT / "docs/planners.md").read_text(encoding="utf-8").split("```")[0]
    assert {row[0].strip("`") for row in rows(text)} == {
        *planners.rule_planners(),
        "llm:<model>",
        "distilled:<run>",
        "record:<plans.jsonl>",
    }


def test_measured_skill_is_that_of_the_results() -> None:
    result = json.loads((ROOT / "docs/results/planner-skill.json").read_text(encoding="utf-8"))
    raw = (ROOT / "docs/planners.md").read_text(encoding="utf-8")
    text, told = " ".join(raw.split()), dict(re.findall(r"^\| (warehouse|repair|search)(, .*)$", raw, re.MULTILINE))
    assert f"In {result['scenes']} fresh" in text
    for world, cases in result["each by itself"].items():
        case = cases["by id"]
        nearest = case["nearest chosen"]
        figures = f"{nearest['value']:.2f} ({nearest['low']:.2f} to {nearest['high']:.2f}) | {case['chance']:.2f}"
        steps = f"{case['extra steps']['value']:.1f} | {case['extra steps at random']:.1f}"
        assert f"| {figures} | {steps} |" in told[world]
    for control in ("control: long ways are good", "control: A is bad"):
        rates = [f"{cases['by id']['nearest chosen']['value']:.2f}" for cases in result[control].values()]
        assert ", ".join(rates) in text


def test_tables_of_the_study_are_made_of_its_results() -> None:
    """Every table that the README and docs/results/medium.md quote comes out of the committed results again."""
    tool = runpy.run_path(str(ROOT / "benchmarks" / "study_table.py"))
    results = json.loads((ROOT / "docs/results/medium/results.json").read_text(encoding="utf-8"))
    assert {run["status"] for run in results["runs"]} == {"finished"} and len(results["runs"]) == 63
    made = tool["tables"](results)
    text = (ROOT / "docs/results/medium.md").read_text(encoding="utf-8")
    assert len(made) == 4
    for title, table in made.items():
        assert table in text, title
    assert made["Task success rate [95% interval]"] in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_picture_is_whole() -> None:
    ElementTree.parse(ROOT / "docs/images/overview.svg")
