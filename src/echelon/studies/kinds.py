"""The kinds of runs that a study holds: ordinary ones, and those that have a trainer of their own.

A kind reads its runs' settings from a study's tables, does a run by the study's protocol, and says what it costs.
"""

from __future__ import annotations

import importlib
import shutil
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from typing import Protocol as Interface

from echelon.checkpoints import checkpoints_of
from echelon.configs import PLAIN_TABLES, RunConfig, from_toml, to_toml
from echelon.envs import GridConfig
from echelon.errors import unknown_name
from echelon.evaluation.protocol import Protocol, Report, run_by_protocol
from echelon.llm.store import untouched
from echelon.methods import method, methods
from echelon.runs import steps_done
from echelon.studies.costs import Cost, estimate

__all__ = ["Ordinary", "RunKind", "Settings", "kind_of", "register", "run_kinds"]

# Imported when it is asked for kinds: they register theirs, so that a study knows all methods by itself. They are of a
# layer that builds on this one, so they are known here by name alone.
_ELSEWHERE = ("echelon.also.studied",)


class Settings(Interface):
    """What the settings of a run say, of whatever kind."""

    @property
    def method(self) -> str:
        """The method's name."""
        ...

    @property
    def env(self) -> GridConfig:
        """The world."""
        ...

    @property
    def steps(self) -> int:
        """Environment steps to spend."""
        ...


class RunKind(ABC):
    """One kind of runs; what it is given as `config` are settings that its own `read` made."""

    @property
    @abstractmethod
    def methods(self) -> Collection[str]:
        """The methods whose runs are of this kind."""

    @property
    @abstractmethod
    def keys(self) -> frozenset[str]:
        """The names of all settings that its runs may have."""

    @abstractmethod
    def read(self, data: dict[str, Any], source: str, *, protocol: Protocol, imports: tuple[str, ...]) -> Settings:
        """The settings in a table, with `method`, `environment`, `seed`, `steps` and `env` as a study has them.

        Args:
            data: the table.
            source: what to call it in an error.
            protocol: the study's.
            imports: what the study imports.

        Raises:
            EchelonError: an unknown setting, or a value that can't be.
        """

    @abstractmethod
    def write(self, config: Any) -> str:
        """Settings as TOML."""

    @abstractmethod
    def restore(self, text: str, source: str) -> Settings:
        """Settings that `write` gave."""

    @abstractmethod
    def decides(self, config: Any) -> str:
        """What decides a run, for its id: equal where results are."""

    @abstractmethod
    def estimate(self, config: Any, protocol: Protocol) -> Cost:
        """What a run by the protocol will take."""

    @abstractmethod
    def steps_done(self, folder: Path) -> int:
        """Environment steps that the run in a folder has behind it, and would not do again."""

    @abstractmethod
    def execute(
        self, config: Any, folder: Path, protocol: Protocol, *, record: int, report: Report,
        should_stop: Callable[[], bool],
    ) -> dict[str, Any] | None:  # fmt: skip
        """Train a run and judge it, or go on with it; see `run_by_protocol`, whose result this gives too."""

    @abstractmethod
    def tidy(self, folder: Path) -> None:
        """Remove what a finished run no longer needs."""

    def learns(self, name: str) -> bool:
        """Whether runs of this method are trained."""
        return True


class Ordinary(RunKind):
    """Runs that `Trainer` does."""

    @property
    def methods(self) -> Collection[str]:
        """All registered methods."""
        return methods()

    @property
    def keys(self) -> frozenset[str]:
        """The fields of a `RunConfig`."""
        return frozenset(f.name for f in fields(RunConfig))

    def learns(self, name: str) -> bool:
        """Whether there is anything to train."""
        return method(name).learns

    def read(self, data: dict[str, Any], source: str, *, protocol: Protocol, imports: tuple[str, ...]) -> RunConfig:
        """A run on one thread: a study's runs have a core each."""
        return from_toml({**data, "threads": 1}, source)

    def write(self, config: RunConfig) -> str:
        """A run's config.toml."""
        return to_toml(config)

    def restore(self, text: str, source: str) -> RunConfig:
        """A run's config.toml, read."""
        return from_toml(tomllib.loads(text), source)

    def decides(self, config: RunConfig) -> str:
        """Its config, where settings that came later count only if they aren't at their defaults."""
        usual = [name for name, table in PLAIN_TABLES.items() if getattr(config, name) == table()]
        kind = method(config.method)
        if kind.executor == "model" or not kind.needs_model(config.planner):
            # Nobody is planned for by a model: these mean nothing, or the same, and were in every id.
            share = 1 / 64 if config.llm_share is None else config.llm_share
            config = replace(config, llm_share=share, model=untouched(config.model))
        says = to_toml(config, without=usual)
        return says if config.subgoals.review else says.replace("review = 0\n", "", 1)

    def estimate(self, config: RunConfig, protocol: Protocol) -> Cost:
        """See `costs.estimate`."""
        return estimate(config, protocol)

    def steps_done(self, folder: Path) -> int:
        """Those of its newest checkpoint."""
        return steps_done(folder)

    def execute(
        self, config: RunConfig, folder: Path, protocol: Protocol, *, record: int, report: Report,
        should_stop: Callable[[], bool],
    ) -> dict[str, Any] | None:  # fmt: skip
        """See `run_by_protocol`."""
        return run_by_protocol(config, folder, protocol, record=record, report=report, should_stop=should_stop)

    def tidy(self, folder: Path) -> None:
        """Checkpoints but for the last: the others were for a crash; with its replay memory one may take 100 MB."""
        for old in checkpoints_of(folder / "checkpoints")[:-1]:
            shutil.rmtree(old, ignore_errors=True)


_KINDS: list[RunKind] = [Ordinary()]


def register(kind: RunKind) -> None:
    """Make a kind of runs known."""
    _KINDS.append(kind)


def run_kinds() -> tuple[RunKind, ...]:
    """All kinds of runs."""
    for module in _ELSEWHERE:
        importlib.import_module(module)
    return tuple(_KINDS)


def kind_of(name: str, what: str = "method") -> RunKind:
    """The kind of a method's runs.

    Args:
        name: the method.
        what: what to call an unknown one.

    Raises:
        EchelonError: nobody knows the method.
    """
    for kind in run_kinds():
        if name in kind.methods:
            return kind
    raise unknown_name(what, name, [known for kind in run_kinds() for known in kind.methods])
