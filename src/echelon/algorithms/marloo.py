"""MARLOO: REINFORCE leave-one-out (Ahmadian et al., arXiv 2402.14740) for a team; a variant of MAGRPO in CoMLRL."""

from __future__ import annotations

from dataclasses import dataclass

from echelon.advantages import TeamMode
from echelon.algorithms.teams import GroupConfig, GroupLearner

__all__ = ["MARLOO", "MARLOOConfig"]


@dataclass(frozen=True)
class MARLOOConfig(GroupConfig):
    """Hyper-parameters of MARLOO (CoMLRL's, but for normalisation, which would make it MAGRPO)."""

    mode: TeamMode = "rloo"
    """What a reply's return is compared with: the mean of its group, nothing (raw), the best (max), the mean of the
    others (rloo)."""


class MARLOO(GroupLearner):
    """A team that learns from returns minus the mean of the others in their group: unbiased."""
