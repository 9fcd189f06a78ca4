"""How policies learn: one file an algorithm."""

from __future__ import annotations

from echelon.algorithms.mappo import MAPPO, MAPPOConfig

__all__ = ["MAPPO", "MAPPOConfig"]
