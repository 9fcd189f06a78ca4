"""Judging teams: episodes on worlds that training never saw, and the statistics of what came of them."""

from __future__ import annotations

from echelon.evaluation.comparison import compare, evaluate_run
from echelon.evaluation.episodes import EpisodeResults, evaluate
from echelon.evaluation.statistics import Interval, mean_interval, wilson

__all__ = ["EpisodeResults", "Interval", "compare", "evaluate", "evaluate_run", "mean_interval", "wilson"]
