"""How policies learn: one file an algorithm, and one line here."""

from __future__ import annotations

from echelon.algorithms.base import Algorithm, AlgorithmConfig, algorithms, config_of, create, register
from echelon.algorithms.mappo import MAPPO, IPPOConfig, MAPPOConfig
from echelon.algorithms.qmix import QMIX, QMIXConfig, VDNConfig

__all__ = [
    "MAPPO",
    "QMIX",
    "Algorithm",
    "AlgorithmConfig",
    "IPPOConfig",
    "MAPPOConfig",
    "QMIXConfig",
    "VDNConfig",
    "algorithms",
    "config_of",
    "create",
    "register",
]

register("mappo", MAPPOConfig, MAPPO)
register("ippo", IPPOConfig, MAPPO)
register("qmix", QMIXConfig, QMIX)
register("vdn", VDNConfig, QMIX)
