"""MAReMax: a variant of MAGRPO in CoMLRL that compares with the best of the group.

Its name comes from ReMax (Li et al., arXiv 2310.10505), whose baseline is the return of the greedy reply; the released
code takes the group's maximum instead, and so does this. No advantage is above 0: it learns by what to avoid.
"""

from __future__ import annotations

from dataclasses import dataclass

from echelon.advantages import TeamMode
from echelon.algorithms.teams import GroupConfig, GroupLearner

__all__ = ["MAReMax", "MAReMaxConfig"]


@dataclass(frozen=True)
class MAReMaxConfig(GroupConfig):
    """Hyper-parameters of MAReMax (CoMLRL's, but for normalisation, which would make it MAGRPO)."""

    mode: TeamMode = "max"
    """What a reply's return is compared with: the mean of its group, nothing (raw), the best (max), the mean of the
    others (rloo)."""


class MAReMax(GroupLearner):
    """A team that learns from returns minus their group's best."""
