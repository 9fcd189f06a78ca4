"""How policies learn: one file an algorithm, and one line here."""

from __future__ import annotations

from echelon.algorithms.base import Algorithm, AlgorithmConfig, algorithms, config_of, create, register
from echelon.algorithms.decisions import Decisions, LearnerConfig
from echelon.algorithms.grpo import GRPO, GRPOConfig
from echelon.algorithms.himac import HiMAC, HiMACConfig
from echelon.algorithms.hiper import HiPER, HiPERConfig, Turns
from echelon.algorithms.mappo import MAPPO, IPPOConfig, MAPPOConfig
from echelon.algorithms.qmix import QMIX, QMIXConfig, VDNConfig

__all__ = [
    "GRPO",
    "MAPPO",
    "QMIX",
    "Algorithm",
    "AlgorithmConfig",
    "Decisions",
    "GRPOConfig",
    "HiMAC",
    "HiMACConfig",
    "HiPER",
    "HiPERConfig",
    "IPPOConfig",
    "LearnerConfig",
    "MAPPOConfig",
    "QMIXConfig",
    "Turns",
    "VDNConfig",
    "algorithms",
    "config_of",
    "create",
    "register",
]

register("mappo", MAPPOConfig, MAPPO)
register("ippo", IPPOConfig, MAPPO)
register("grpo", GRPOConfig, GRPO)
register("qmix", QMIXConfig, QMIX)
register("vdn", VDNConfig, QMIX)
