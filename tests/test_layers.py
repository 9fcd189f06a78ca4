"""Who may import whom: the layers of the design, held against the code's own import statements."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import echelon

ROOT = Path(echelon.__file__).parent

# What makes runs: one layer of modules that know each other.
RUNS = {
    "methods",
    "configs",
    "extensions",
    "pending",
    "rollout",
    "executors",
    "checkpoints",
    "building",
    "runs",
    "training",
    "growing",
    "planner_training",
    "rollouts",
    "coevolution",
    "forking",
}

# From the top of the house to its ground. A module imports only from layers above it; inside one layer, a
# package's files may use their package's `base`-like shared parts, named in SHARED.
LAYERS = [
    {"errors", "rng", "_files", "_lazy"},
    {"envs", "tasks"},
    {"subgoals", "_subgoal_kernels"},
    {"llm"},
    {"planners"},
    {"advantages", "advantages_teams", "advantages_torch", "networks", "buffers", "mixing", "pibt"},
    {"algorithms"},
    {"shaping"},
    RUNS,
    {"teams"},
    {"evaluation"},
    {"studies"},
    {"also"},
    {"reports"},
    {"cli", "cli_also", "cli_planner", "cli_studies", "cli_teams", "console", "fetching", "flags"},
    {"__main__"},
]
SHARED = {
    "envs": {"base", "kernels", "maps", "scenes"},
    "tasks": {"_data", "base", "sandbox"},
    # Parts that planners are put together from; `frugal` is the one that does it.
    "planners": {"base", "choosing", "hungarian", "replies", "student", "symmetry", "plan_cache", "distilled"},
    "algorithms": {"actor", "base", "decisions", "team_critics", "teams"},
    "shaping": {"_kernels", "base", "candidates", "gate", "heuristic", "model_proposer", "potential", "situation"},
}
ALLOWED_INSIDE_A_LAYER = RUNS | {"errors", "rng", "subgoals", "_subgoal_kernels", "advantages", "advantages_teams"}
FORBIDDEN = {
    "envs": {"torch", "transformers"},
    "tasks": {"torch", "transformers"},
    "subgoals": {"torch"},
    "advantages": {"torch"},
    "advantages_teams": {"torch"},
    "algorithms": {"rich", "tyro"},
    "training": {"rich", "tyro"},
    "coevolution": {"rich", "tyro"},
    "forking": {"rich", "tyro"},
    "planner_training": {"rich", "tyro"},
    "teams": {"rich", "tyro"},
}


def modules() -> list[Path]:
    return sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def top(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def layer_of(name: str) -> int:
    found = [i for i, layer in enumerate(LAYERS) if name in layer]
    assert found, f"{name} belongs to no layer: name it in LAYERS"
    return found[0]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative imports hide the layers"
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_from_layers_above_it(path: Path) -> None:
    own = top(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "echelon":
            assert parts[0] not in FORBIDDEN.get(own, set()), f"{own} must never know {parts[0]}"
            continue
        if len(parts) == 1:
            continue
        other = parts[1]
        if other == own:
            continue
        assert not any(part.startswith("_") for part in parts[2:]), f"{path} imports another package's own part: {name}"
        if layer_of(other) == layer_of(own):
            inside = {other, own} <= ALLOWED_INSIDE_A_LAYER or {other, own} <= LAYERS[-2]
            assert inside or own == other or layer_of(own) == 0, f"{path} imports sideways: {name}"
        assert layer_of(other) <= layer_of(own), f"{path} imports from below: {name}"


@pytest.mark.parametrize("package", sorted(SHARED))
def test_the_leaves_of_a_layer_do_not_know_each_other(package: str) -> None:
    for path in (ROOT / package).glob("*.py"):
        if path.stem in {"__init__", "checks", "adapters"}:
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[:2] == ["echelon", package] and len(parts) > 2:
                assert parts[2] in SHARED[package], f"{path} knows its sibling {name}"


def test_contributors_are_told_of_the_same_layers() -> None:
    """The table in CONTRIBUTING.md; modules that begin with one underscore may stay out of it."""
    text = (ROOT.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [line.split("|")[2] for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    told = [set(re.findall(r"`(\w+)/?`", row)) for row in rows]
    own = [{name for name in layer if not name.startswith("_")} for layer in LAYERS]
    assert [{name for name in row if not name.startswith("_")} for row in told] == own[:-1]


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


def test_the_package_imports_lightly() -> None:
    """`import echelon` must not load torch, nor may what answers --version."""
    assert not loaded_after("import echelon.__main__") & {"torch", "transformers", "numba", "echelon.cli"}


def test_the_command_line_loads_no_more_than_its_flags_need() -> None:
    """What only some commands use would cost every start, each typo and each --help, a second or more."""
    heavy = {"scipy.stats", "pandas", "pydantic", "transformers", "echelon.also.training", "echelon.studies.engine"}
    assert not loaded_after("import echelon.cli") & heavy
