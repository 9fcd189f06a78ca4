"""Cooperative tasks for teams of language models, each known by its name and settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from echelon.errors import EchelonError
from echelon.tasks.base import AgentPrompt, Attempt, Scored, Solvable, TaskSettings, Teaching, TeamTask, Turn
from echelon.tasks.coding import CodingSettings, CodingTask
from echelon.tasks.functions import FunctionTask
from echelon.tasks.writing import WritingSettings, WritingTask

__all__ = [
    "AgentPrompt",
    "Attempt",
    "CodingSettings",
    "CodingTask",
    "FunctionTask",
    "OwnTask",
    "Scored",
    "Solvable",
    "TaskSettings",
    "Teaching",
    "TeamTask",
    "Turn",
    "WritingSettings",
    "WritingTask",
    "build_task",
    "register_task",
    "task_name",
    "tasks",
]

_REGISTRY: dict[str, tuple[type[TaskSettings], Callable[[Any], TeamTask]]] = {}


def register_task(name: str, settings: type[TaskSettings], build: Callable[[Any], TeamTask]) -> None:
    """Make a task known by name: the class of its settings, and what builds it from them."""
    _REGISTRY[name] = settings, build


def tasks() -> dict[str, type[TaskSettings]]:
    """The class of settings of each known task, by name."""
    return {name: settings for name, (settings, _) in _REGISTRY.items()}


def task_name(settings: TaskSettings) -> str:
    """The name of the task that has these settings.

    Raises:
        EchelonError: no known one has.
    """
    for name, (kind, _) in _REGISTRY.items():
        if type(settings) is kind:
            return name
    raise EchelonError(f"{type(settings).__name__} are the settings of no known task: see tasks.register_task")


def build_task(settings: TaskSettings) -> TeamTask:
    """The task with these settings.

    Raises:
        EchelonError: a file can't be used, a setting is out of range.
    """
    return _REGISTRY[task_name(settings)][1](settings)


@dataclass(frozen=True)
class OwnTask(TaskSettings):
    """Stands in a run's config for a task that is given as an object."""


def _own(settings: OwnTask) -> TeamTask:
    raise EchelonError("this run has a task of its own: go on with it by TeamTrainer.resume(folder, task=...)")


register_task(WritingTask.name, WritingSettings, WritingTask)
register_task(CodingTask.name, CodingSettings, CodingTask)
register_task("own", OwnTask, _own)
