"""How policies learn: one file an algorithm, and one line here."""

from __future__ import annotations

from echelon.algorithms.base import Algorithm, AlgorithmConfig, algorithms, config_of, create, register
from echelon.algorithms.decisions import Decisions, LearnerConfig
from echelon.algorithms.grpo import GRPO, GRPOConfig
from echelon.algorithms.himac import HiMAC, HiMACConfig
from echelon.algorithms.hiper import HiPER, HiPERConfig, Turns
from echelon.algorithms.iac import IAC, IACConfig
from echelon.algorithms.maac import MAAC, MAACConfig
from echelon.algorithms.magrpo import MAGRPO, MAGRPOConfig
from echelon.algorithms.mappo import MAPPO, IPPOConfig, MAPPOConfig
from echelon.algorithms.mareinforce import MAREINFORCE, MAREINFORCEConfig
from echelon.algorithms.maremax import MAReMax, MAReMaxConfig
from echelon.algorithms.marloo import MARLOO, MARLOOConfig
from echelon.algorithms.qmix import QMIX, QMIXConfig, VDNConfig
from echelon.algorithms.team_mixing import MAMixing, MAQMIXConfig, MAVDNConfig
from echelon.algorithms.teams import TeamAlgorithm, TeamConfig, TeamNode, register_team, team_algorithms

__all__ = [
    "GRPO",
    "IAC",
    "MAAC",
    "MAGRPO",
    "MAPPO",
    "MAREINFORCE",
    "MARLOO",
    "QMIX",
    "Algorithm",
    "AlgorithmConfig",
    "Decisions",
    "GRPOConfig",
    "HiMAC",
    "HiMACConfig",
    "HiPER",
    "HiPERConfig",
    "IACConfig",
    "IPPOConfig",
    "LearnerConfig",
    "MAACConfig",
    "MAGRPOConfig",
    "MAMixing",
    "MAPPOConfig",
    "MAQMIXConfig",
    "MAREINFORCEConfig",
    "MARLOOConfig",
    "MAReMax",
    "MAReMaxConfig",
    "MAVDNConfig",
    "QMIXConfig",
    "TeamAlgorithm",
    "TeamConfig",
    "TeamNode",
    "Turns",
    "VDNConfig",
    "algorithms",
    "config_of",
    "create",
    "register",
    "register_team",
    "team_algorithms",
]

register("mappo", MAPPOConfig, MAPPO)
register("ippo", IPPOConfig, MAPPO)
register("grpo", GRPOConfig, GRPO)
register("qmix", QMIXConfig, QMIX)
register("vdn", VDNConfig, QMIX)

register_team("magrpo", MAGRPO, MAGRPOConfig)
register_team("mareinforce", MAREINFORCE, MAREINFORCEConfig)
register_team("marloo", MARLOO, MARLOOConfig)
register_team("maremax", MAReMax, MAReMaxConfig)
register_team("iac", IAC, IACConfig)
register_team("maac", MAAC, MAACConfig)
register_team("ma-vdn", MAMixing, MAVDNConfig)
register_team("ma-qmix", MAMixing, MAQMIXConfig)
