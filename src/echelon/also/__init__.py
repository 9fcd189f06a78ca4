"""LLM-ALSO: rewards whose shaping is diagnosed, proposed, tried in branches, and promoted by evidence alone."""

from __future__ import annotations

from echelon.also.configs import ALSO_METHODS, AlsoConfig, AlsoSettings, also_from_toml, also_to_toml, read_also_toml
from echelon.also.training import AlsoProgress, AlsoTrainer

__all__ = [
    "ALSO_METHODS",
    "AlsoConfig",
    "AlsoProgress",
    "AlsoSettings",
    "AlsoTrainer",
    "also_from_toml",
    "also_to_toml",
    "read_also_toml",
]
