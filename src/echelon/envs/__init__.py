"""Grid worlds for teams, stepped in batches; `make` builds one by name."""

from __future__ import annotations

from typing import Any

from echelon.envs.base import (
    ACTIONS,
    AgentView,
    Candidates,
    GridConfig,
    GridEnv,
    Scene,
    Subgoal,
    SubgoalKind,
    TaskView,
    ZoneView,
)
from echelon.envs.checks import check_env
from echelon.envs.plain import PlainEnv
from echelon.envs.repair import Repair, RepairConfig
from echelon.envs.search import Search, SearchConfig
from echelon.envs.warehouse import Warehouse, WarehouseConfig
from echelon.errors import EchelonError, unknown_name

__all__ = [
    "ACTIONS",
    "AgentView",
    "Candidates",
    "GridConfig",
    "GridEnv",
    "PlainEnv",
    "Repair",
    "RepairConfig",
    "Scene",
    "Search",
    "SearchConfig",
    "Subgoal",
    "SubgoalKind",
    "TaskView",
    "Warehouse",
    "WarehouseConfig",
    "ZoneView",
    "check_env",
    "env_name",
    "environments",
    "make",
    "register",
]

_REGISTRY: dict[str, tuple[type[GridConfig], type[GridEnv[Any]]]] = {}


def register(config: type[GridConfig], env: type[GridEnv[Any]]) -> None:
    """Make an environment known under its `name`: one line a world."""
    _REGISTRY[env.name] = (config, env)


def environments() -> dict[str, type[GridConfig]]:
    """The config class of each known environment, by name."""
    return {name: config for name, (config, _) in sorted(_REGISTRY.items())}


def env_name(config: GridConfig) -> str:
    """The name of the environment that a config belongs to.

    Raises:
        EchelonError: it belongs to none that is registered.
    """
    for name, (config_class, _) in _REGISTRY.items():
        if type(config) is config_class:
            return name
    raise EchelonError(f"no environment is registered for {type(config).__name__}")


def make(
    name: str, config: GridConfig | None = None, *, num_envs: int = 1, seed: int = 0, extra_features: int = 0,
    **settings: Any,
) -> GridEnv[Any]:  # fmt: skip
    """Build a batch of worlds by name.

    Args:
        name: "warehouse", "search", "repair" or a registered one.
        config: its config; or give settings by keyword (`size=10, num_agents=2`).
        num_envs: worlds in the batch.
        seed: root seed.
        extra_features: see `GridEnv`.

    Raises:
        EchelonError: unknown name or setting, or a setting out of range.
    """
    if name not in _REGISTRY:
        raise unknown_name("environment", name, _REGISTRY)
    config_class, env_class = _REGISTRY[name]
    if config is None:
        known = set(config_class.__dataclass_fields__)
        for setting in settings:
            if setting not in known:
                raise unknown_name(f"{name} setting", setting, known)
        config = config_class(**settings)
    elif settings:
        raise EchelonError("give either a config or settings by keyword, not both")
    return env_class(config, num_envs, seed, extra_features=extra_features)


register(WarehouseConfig, Warehouse)
register(SearchConfig, Search)
register(RepairConfig, Repair)
