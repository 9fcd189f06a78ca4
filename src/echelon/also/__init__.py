"""LLM-ALSO: rewards whose shaping is diagnosed, proposed, tried in branches, and promoted by evidence alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echelon._lazy import lazily
from echelon.also.configs import ALSO_METHODS, AlsoConfig, AlsoSettings, also_from_toml, also_to_toml, read_also_toml

if TYPE_CHECKING:
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


# Who only wants to know the methods' names, as the command line does, needn't wait for the study engine.
__getattr__ = lazily(__name__, "training")
