"""MAGRPO: multi-agent group relative policy optimisation (Liu et al., arXiv 2508.04652).

Each agent's replies at a joint history are compared by the return of the joint action that they were part of. On
policy, without ratio, clip or critic; a team of one is GRPO (arXiv 2402.03300) without its clip.
"""

from __future__ import annotations

from dataclasses import dataclass

from echelon.advantages import TeamMode
from echelon.algorithms.teams import GroupConfig, GroupLearner

__all__ = ["MAGRPO", "MAGRPOConfig"]


@dataclass(frozen=True)
class MAGRPOConfig(GroupConfig):
    """Hyper-parameters of MAGRPO (as released)."""

    mode: TeamMode = "mean"
    """What a reply's return is compared with: the mean of its group, nothing (raw), the best (max), the mean of the
    others (rloo)."""
    normalize: bool = True
    """Divide by the standard deviation in the group. All modes are the same then."""


class MAGRPO(GroupLearner):
    """A team that learns from returns minus their group's mean."""
