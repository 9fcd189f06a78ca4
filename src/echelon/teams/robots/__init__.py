"""Robots with a language model each, in the grid worlds: the tasks `warehouse` and `search` of teams."""

from echelon.teams.robots.replies import MESSAGE_CHARS, read_reply
from echelon.teams.robots.settings import RobotTeamSettings, SearchTeamSettings, WarehouseTeamSettings
from echelon.teams.robots.task import Episode, RobotTask, lessons, teacher_replies

__all__ = [
    "MESSAGE_CHARS",
    "Episode",
    "RobotTask",
    "RobotTeamSettings",
    "SearchTeamSettings",
    "WarehouseTeamSettings",
    "lessons",
    "read_reply",
    "teacher_replies",
]
