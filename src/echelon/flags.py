"""From words to settings: flags, `--config` files, and errors of one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import tyro

from echelon.configs import RunConfig, from_toml, read_toml
from echelon.envs import GridConfig, environments
from echelon.errors import EchelonError, unknown_name
from echelon.methods import methods

__all__ = ["env_flags", "parse", "run_flags", "run_folder"]

T = TypeVar("T")


def parse(command: str, cls: type[T], args: Sequence[str], default: T | None = None) -> T:
    """Parse flags into a dataclass; what tyro has to say against them becomes one line."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return cast(T, tyro.cli(cls, prog=f"echelon {command}", args=list(args), default=default))
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise EchelonError(_one_line(told.getvalue(), command)) from None


def _one_line(text: str, command: str) -> str:
    """What a box of tyro's says is wrong: the words between its title and the next rule, and the nearest flag."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│| \t") for line in text.splitlines()]
    lines = [line for line in lines if line]
    # The title is the first line; without Unicode it has a rule of its own below it.
    rest = lines[2:] if lines[1:] and _is_rule(lines[1]) else lines[1:]
    body = " ".join(itertools.takewhile(lambda line: not _is_rule(line), rest))
    near = next((b.split()[0].rstrip(",") for a, b in itertools.pairwise(lines) if a == "Perhaps you meant:"), "")
    hint = f"; did you mean {near}?" if near else ""
    return f"{body or 'the flags can not be read'}{hint} (echelon {command} --help)"


def _is_rule(line: str) -> bool:
    return not line.strip("╭╰╮╯─+-")


def _take(args: list[str], flag: str) -> str | None:
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


def run_flags(
    command: str,
    args: list[str],
    extra: type[T],
    *,
    base: RunConfig | None = None,
    preset: dict[str, Any] | None = None,
) -> tuple[RunConfig, T]:
    """The run that the flags describe, over --config's file or `base`, and the command's own flags (`extra`).

    `--env NAME` picks the environment, whose settings are then flags.
    """
    file, name = _take(args, "--config"), _take(args, "--env")
    if file is not None:
        base = read_toml(Path(file))
    elif base is None:
        base = from_toml({**(preset or {}), "environment": name or "warehouse"})
    known = environments()
    if name is not None and name not in known:
        raise unknown_name("environment", name, known)
    env = base.env if name is None or type(base.env) is known[name] else known[name]()
    flags = dataclasses.make_dataclass(
        "Flags",
        [("env", type(env), dataclasses.field(default_factory=type(env)))],
        bases=(extra, RunConfig),
        frozen=True,
    )
    flags.__doc__ = (
        f"{extra.__doc__}\n\n--env NAME picks the environment ({', '.join(known)}), --config FILE reads a run's "
        f"config.toml first; other flags go over it. Methods: {', '.join(methods())}."
    )
    values = {f.name: getattr(base, f.name) for f in dataclasses.fields(RunConfig)} | {"env": env}
    parsed = parse(command, flags, args, flags(**values))
    run = RunConfig(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(RunConfig)})
    own = extra(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(cast(Any, extra))})
    return run, own


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
    if not (folder / "config.toml").exists():
        raise EchelonError(f"{folder} is no run: it has no config.toml")
    return folder, read_toml(folder / "config.toml")
