"""Teams of language models: how they answer in turns, how they are trained, and the robots that plan for themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echelon._lazy import lazily
from echelon.teams.configs import TeamPolicyConfig, TeamRunConfig, read_team_toml, team_from_toml, team_to_toml
from echelon.teams.rollouts import TeamRolloutConfig

if TYPE_CHECKING:
    from echelon.teams.training import TeamProgress, TeamTrainer

__all__ = [
    "TeamPolicyConfig",
    "TeamProgress",
    "TeamRolloutConfig",
    "TeamRunConfig",
    "TeamTrainer",
    "read_team_toml",
    "team_from_toml",
    "team_to_toml",
]

# What has flags needn't wait for what trains.
__getattr__ = lazily(__name__, "training")
