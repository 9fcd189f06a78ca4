"""MAREINFORCE: REINFORCE (Williams 1992) for a team, with the joint return itself; a variant of MAGRPO in CoMLRL."""

from __future__ import annotations

from dataclasses import dataclass

from echelon.advantages import TeamMode
from echelon.algorithms.teams import GroupConfig, GroupLearner

__all__ = ["MAREINFORCE", "MAREINFORCEConfig"]


@dataclass(frozen=True)
class MAREINFORCEConfig(GroupConfig):
    """Hyper-parameters of MAREINFORCE (CoMLRL's, but for normalisation, which would make it MAGRPO)."""

    mode: TeamMode = "raw"
    """What a reply's return is compared with: the mean of its group, nothing (raw), the best (max), the mean of the
    others (rloo)."""


class MAREINFORCE(GroupLearner):
    """A team that learns from returns as they are: unbiased, and noisy."""
