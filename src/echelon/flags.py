"""From words to settings: flags, `--config` files, and errors of one line."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from echelon.algorithms.teams import team_algorithms
from echelon.also.configs import ALSO_METHODS
from echelon.configs import PLAIN_TABLES, RunConfig, from_toml, read_toml, read_toml_file
from echelon.envs import GridConfig, environments
from echelon.errors import EchelonError, unknown_name
from echelon.methods import methods
from echelon.runs import ACCOUNT, trained_folder
from echelon.subgoals import SubgoalConfig

__all__ = [
    "AfterTraining",
    "at_least",
    "env_flags",
    "given_flags",
    "parse",
    "peek",
    "refuse_beside_resume",
    "refuse_teams",
    "run_and_own",
    "run_flags",
    "run_folder",
    "take",
]

T = TypeVar("T")
C = TypeVar("C")


def parse(command: str, cls: type[T], args: Sequence[str], default: T | None = None) -> T:
    """Parse flags into a dataclass; what tyro has to say against them becomes one line."""
    if peek(args, "--out") == "":
        raise EchelonError("--out is empty: it must name a folder or file to write")
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return cast(T, tyro.cli(cls, prog=f"echelon {command}", args=list(args), default=default, registry=_RULES))
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise EchelonError(_one_line(told.getvalue(), command)) from None


_RULES = ConstructorRegistry()


@_RULES.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """`INT` in the help instead of `{None}|INT` for what is None unless given."""
    options = [t for t in typing.get_args(info.type) if t is not type(None)]
    if info.type_origin not in (types.UnionType, typing.Union) or len(options) != 1:
        return None
    kind = options[0]
    if kind not in (int, float, str, Path):
        return None

    def convert(words: list[str]) -> Any:
        return None if words == ["None"] else kind(words[0])

    return PrimitiveConstructorSpec(
        nargs=1, metavar=kind.__name__.upper(), instance_from_str=convert,
        is_instance=lambda x: x is None or isinstance(x, kind), str_from_instance=lambda x: [str(x)],
    )  # fmt: skip


@_RULES.struct_rule
def _dataclass(info: StructTypeInfo) -> StructConstructorSpec | None:
    """A dataclass with its fields' docstrings as help, unwrapped: tyro keeps the source's line breaks."""
    if not dataclasses.is_dataclass(info.type):
        return None
    hints, words = typing.get_type_hints(info.type, include_extras=True), _docstrings(info.type)
    fields = []
    for f in dataclasses.fields(info.type):
        default: Any = tyro.constructors.MISSING_NONPROP
        if hasattr(info.default, f.name):
            default = getattr(info.default, f.name)
        elif f.default is not dataclasses.MISSING:
            default = f.default
        elif callable(f.default_factory):
            default = f.default_factory()
        fields.append(StructFieldSpec(f.name, hints[f.name], default, words.get(f.name)))
    return StructConstructorSpec(info.type, tuple(fields))


@functools.cache
def _docstrings(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass and its bases, in one line each."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # built in, or made by a program
            continue
        for field, text in itertools.pairwise(cast(ast.ClassDef, tree.body[0]).body):
            if (
                isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):  # fmt: skip
                found[field.target.id] = " ".join(text.value.value.split())
    return found


_NEAR = "Perhaps you meant:"


def _one_line(text: str, command: str) -> str:
    """What a box of tyro's says is wrong: the words between its title and the next rule, and the nearest flag."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│| \t") for line in text.splitlines()]
    lines = [line for line in lines if line]
    # The title is the first line; without Unicode it has a rule of its own below it.
    rest = lines[2:] if lines[1:] and _is_rule(lines[1]) else lines[1:]
    body = " ".join(itertools.takewhile(lambda line: not _is_rule(line), rest))
    # Of the flags that it names the one most like what was typed: it may name a longer one first.
    named = itertools.takewhile(lambda line: not _is_rule(line), itertools.dropwhile(lambda x: x != _NEAR, lines))
    known = [line.split()[0].rstrip(",") for line in named if line.startswith("--")]
    typed = re.search(r"--[\w.-]+", body)
    near = difflib.get_close_matches(typed.group() if typed else "", known, n=1, cutoff=0) or known[:1]
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{body or 'the flags can not be read'}{hint} (echelon {command} --help)"


def _is_rule(line: str) -> bool:
    return not line.strip("╭╰╮╯─+-")


def take(args: list[str], flag: str) -> str | None:
    """Take `flag VALUE` (or `flag=VALUE`) out of `args`."""
    for i, arg in enumerate(args):
        if arg == flag:
            if i + 1 == len(args) or args[i + 1].startswith("--"):
                raise EchelonError(f"{flag} needs a value")
            value = args[i + 1]
            del args[i : i + 2]
            return value
        if arg.startswith(f"{flag}="):
            del args[i]
            return arg[len(flag) + 1 :]
    return None


def peek(args: Sequence[str], flag: str) -> str | None:
    """What `flag VALUE` (or `flag=VALUE`) says last; `args` stay as they are."""
    found = None
    for i, arg in enumerate(args):
        if arg == flag and i + 1 < len(args):
            found = args[i + 1]
        elif arg.startswith(f"{flag}="):
            found = arg[len(flag) + 1 :]
    return found


def given_flags(args: Sequence[str]) -> set[str]:
    """The flags among `args`, with hyphens."""
    return {arg.split("=")[0].replace("_", "-") for arg in args if arg.startswith("--")}


def refuse_beside_resume(given: set[str], *allowed: str) -> None:
    """Refuse all flags but some beside --resume: a run goes on as it began."""
    if other := sorted(given - {"--resume", *allowed}):
        raise EchelonError(f"--resume goes on with the run's own settings: {', '.join(other)} can't be given with it")


def refuse_teams(names: Iterable[object]) -> None:
    """Refuse teams of language models: only `echelon train` knows them."""
    for name in map(str, names):
        if name in team_algorithms():
            raise EchelonError(
                f"{name} has a trainer of its own, echelon train --method {name}: it can't be compared or studied"
            )


def _refuse_own_trainer(command: str, name: object) -> None:
    """Refuse a method whose settings are not those of an ordinary run, rather than call it unknown."""
    if str(name) in (*team_algorithms(), *ALSO_METHODS):
        raise EchelonError(
            f"{name} has a trainer of its own, echelon train --method {name}: "
            f"echelon {command.split()[0]} is for other methods"
        )


def at_least(least: int, **values: int) -> None:
    """Refuse a flag's value below `least`; flags are named as Python does."""
    for name, value in values.items():
        if value < least:
            raise EchelonError(f"--{name.replace('_', '-')} is {value}: it must be at least {least}")


@dataclasses.dataclass(frozen=True)
class AfterTraining:
    """What a command that trains does when it is done."""

    eval_episodes: int = 200
    """Episodes to evaluate on after training (0: none)."""
    replay_episodes: int = 3
    """Of those, how many to record for the replay page."""


def run_flags(
    command: str,
    args: list[str],
    extra: type[T],
    *,
    base: RunConfig | None = None,
    preset: dict[str, Any] | None = None,
) -> tuple[RunConfig, T]:
    """The run that the flags describe, over --config's file or `base`, and the command's own flags (`extra`).

    `--env NAME` picks the environment and `--method NAME` the algorithm, whose settings are then flags.
    """
    file, name = take(args, "--config"), take(args, "--env")
    if file is not None:
        _refuse_own_trainer(command, read_toml_file(Path(file), "config").get("method"))
        base = read_toml(Path(file))
    elif base is None:
        base = from_toml({**(preset or {}), "environment": name or "warehouse"})
    known = environments()
    if name is not None and name not in known:
        raise unknown_name("environment", name, known)
    env = base.env if name is None or type(base.env) is known[name] else known[name]()
    if (wanted := peek(args, "--method")) is not None:
        _refuse_own_trainer(command, wanted)
        # A method brings the settings of its algorithm, which are then flags.
        base = base.with_method(wanted)
    tables = {"env": type(env), "subgoals": SubgoalConfig, "algorithm": type(base.algorithm), **PLAIN_TABLES}
    note = (
        f"--env NAME picks the environment ({', '.join(known)}), --config FILE reads a run's config.toml first; other "
        f"flags go over it. Methods: {', '.join(methods())}."
    )
    return run_and_own(command, args, base, {"env": env}, tables, extra, note, [("learner", *_learner(base))])


def run_and_own(
    command: str,
    args: list[str],
    base: C,
    changed: dict[str, Any],
    tables: dict[str, type[Any]],
    extra: type[T],
    note: str,
    fields: Sequence[tuple[str, Any, Any]] = (),
) -> tuple[C, T]:
    """A run's config and a command's own flags (`extra`), parsed together.

    Args:
        command, args: see `parse`.
        base: the config that the flags go over, with `changed` in it.
        tables: the classes of those of its tables that depend on the run, which are then flags.
        extra: the command's own flags; its docstring begins the help.
        note: what the help says after that.
        fields: more fields, as `make_dataclass` takes them.
    """
    cls = type(base)
    own_tables = [(name, kind, dataclasses.field(default_factory=kind)) for name, kind in tables.items()]
    flags = dataclasses.make_dataclass("Flags", [*own_tables, *fields], bases=(extra, cls), frozen=True)
    flags.__doc__ = f"{extra.__doc__}\n\n{note}"
    names = [f.name for f in dataclasses.fields(cast(Any, cls))]
    parsed = parse(command, flags, args, flags(**({name: getattr(base, name) for name in names} | changed)))
    own = extra(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(cast(Any, extra))})
    return cls(**{name: getattr(parsed, name) for name in names}), own


def _learner(base: RunConfig) -> tuple[Any, Any]:
    """The type and default of the flags of a planner's learner: none where nothing of the kind learns."""
    if base.learner is None:
        return typing.Annotated[None, tyro.conf.SuppressFixed, tyro.conf.Fixed], dataclasses.field(default=None)
    return type(base.learner), dataclasses.field(default_factory=type(base.learner))


def env_flags(command: str, args: list[str], extra: type, env: type[GridConfig]) -> GridConfig:
    """The settings that the flags describe of an environment of that config class; `extra` has the help's words."""
    fields = [("env", env, dataclasses.field(default_factory=env))]
    flags = dataclasses.make_dataclass("Flags", fields, bases=(extra,), frozen=True)
    flags.__doc__ = extra.__doc__
    return cast(GridConfig, cast(Any, parse(command, flags, args)).env)


def run_folder(args: list[str], command: str) -> tuple[Path, RunConfig | None]:
    """Take the run's folder, the first argument; its config, unless only help is wanted."""
    if {"-h", "--help"} & set(args):
        return Path(), None
    if not args or args[0].startswith("-"):
        raise EchelonError(f"echelon {command} needs a run's folder first: echelon {command} RUN [OPTIONS]")
    folder = Path(args.pop(0))
    if folder.is_file():
        raise EchelonError(f"{folder} is a file: echelon {command} wants the run's folder, such as {folder.parent}")
    folder = trained_folder(folder)
    if not (folder / "config.toml").exists():
        raise EchelonError(f"{folder} is no run: it has no config.toml")
    kind = str(read_toml_file(folder / "config.toml", "config").get("method"))
    if kind in team_algorithms():
        raise EchelonError(f"{folder} is a run of a team of language models ({kind}), which has no planner")
    if kind in ALSO_METHODS:
        raise EchelonError(f"{folder} is a run of {kind}, but its {ACCOUNT} is missing: without that it can't be used")
    return folder, read_toml(folder / "config.toml")
