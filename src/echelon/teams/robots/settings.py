"""Settings of the tasks of robots that plan for themselves."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from echelon.envs import GridConfig, SearchConfig, WarehouseConfig
from echelon.errors import EchelonError
from echelon.llm.prompts import LETTERS
from echelon.tasks import TaskSettings

__all__ = ["RobotTeamSettings", "SearchTeamSettings", "WarehouseTeamSettings"]


@dataclass(frozen=True)
class RobotTeamSettings(TaskSettings, ABC):
    """What every team of robots can be told. All defaults are our choice."""

    rollout: ClassVar[Mapping[str, Any]] = {"branch": "first", "turns": 12, "max_tokens": 12}

    size: int = 10
    """Side of the square map, in cells (5 to 256)."""
    num_agents: int = 3
    """Robots in the team (1 to 64)."""
    density: float = 0.2
    """Share of the map that is wall (0 to 0.4), about."""
    limit: int | None = None
    """Time limit of an episode, in steps; default: a third more than a good team takes, about."""
    every: int = 0
    """Ask a robot anew every so many steps of a task of its own; 0: only when that is done, lost or too late."""
    options: int = 5
    """Most tasks that a robot is offered, the nearest ones (1 to 25); to wait is one more."""
    messages: bool = True
    """Whether robots hear what the others told the team in the turn before."""
    invalid_cost: float = 0.05
    """Taken from the reward for each reply that names no option: the robot waits, which costs time besides."""
    conflict_cost: float = 0.01
    """Taken from the reward for each robot that names what another has: it waits, which costs time besides."""
    train_items: int = 512
    """Episodes to train on."""
    eval_items: int = 64
    """Episodes kept for evaluation."""
    train_seed: int = 0
    """The root seed of the episodes to train on: the first of each world of an environment with this seed."""
    eval_seed: int = 1_000_003
    """The root seed of those kept for evaluation; not the same."""

    def __post_init__(self) -> None:
        for name, good, need in (
            ("every", self.every >= 0, "at least 0"),
            ("options", 1 <= self.options < len(LETTERS), f"1 to {len(LETTERS) - 1}"),
            ("invalid_cost", 0 <= self.invalid_cost < math.inf, "at least 0"),
            ("conflict_cost", 0 <= self.conflict_cost < math.inf, "at least 0"),
            ("train_items", self.train_items >= 1, "at least 1"),
            ("eval_items", self.eval_items >= 1, "at least 1"),
            ("train_seed", self.train_seed >= 0, "at least 0"),
            ("eval_seed", self.eval_seed >= 0 and self.eval_seed != self.train_seed, "at least 0, not train_seed"),
        ):
            if not good:
                raise EchelonError(f"env.{name} is {getattr(self, name)}: it must be {need}")

    @abstractmethod
    def world(self) -> GridConfig:
        """The settings of the grid world."""


@dataclass(frozen=True)
class WarehouseTeamSettings(RobotTeamSettings):
    """Settings of the task `warehouse`."""

    num_packages: int = 6
    """Packages to deliver (1 to 64)."""
    num_zones: int = 2
    """Destination zones (1 to 7)."""
    layout: Literal["shelves", "random", "open"] = "shelves"
    """How maps look: blocks of shelves with aisles, single random walls, or no walls."""

    def world(self) -> WarehouseConfig:
        """The settings of the grid world."""
        limit = self.limit
        if limit is None and self.num_agents > 0:
            limit = -(-2 * self.size * max(self.num_packages, self.num_agents) // self.num_agents)
        return WarehouseConfig(
            size=self.size, num_agents=self.num_agents, limit=limit, layout=self.layout, density=self.density,
            num_packages=self.num_packages, num_zones=self.num_zones,
        )  # fmt: skip


@dataclass(frozen=True)
class SearchTeamSettings(RobotTeamSettings):
    """Settings of the task `search`."""

    num_targets: int = 6
    """Hidden targets (1 to 64)."""
    sensor: int = 2
    """Radius in which a robot sees, in cells (1 to 8), where no wall stands between."""
    regions: int = 3
    """The map is divided into regions x regions rectangles, of which robots choose (1 to 8)."""
    layout: Literal["shelves", "random", "open"] = "random"
    """How maps look: blocks of shelves with aisles, single random walls, or no walls."""

    def world(self) -> SearchConfig:
        """The settings of the grid world."""
        limit = self.limit
        if limit is None and self.num_agents > 0:
            swept = self.num_agents * (2 * max(self.sensor, 1) + 1)
            limit = max(2 * self.size, -(-3 * self.size**2 // swept))
        return SearchConfig(
            size=self.size, num_agents=self.num_agents, limit=limit, layout=self.layout, density=self.density,
            num_targets=self.num_targets, sensor=self.sensor, regions=self.regions,
        )  # fmt: skip
