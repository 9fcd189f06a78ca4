"""Judging teams: episodes on worlds that training never saw, and the statistics of what came of them."""

from __future__ import annotations

from echelon.evaluation.comparison import compare, evaluate_run
from echelon.evaluation.convergence import (
    Convergence,
    area_under_curve,
    convergence_time,
    kaplan_meier,
    log_rank,
    restricted_mean,
)
from echelon.evaluation.episodes import EpisodeResults, evaluate
from echelon.evaluation.hypothesis_tests import hedges_g, holm, one_way, pairwise
from echelon.evaluation.statistics import (
    Interval,
    iqm,
    mean_interval,
    mean_score,
    mean_with_interval,
    median_score,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap,
    wilson,
)

__all__ = [
    "Convergence",
    "EpisodeResults",
    "Interval",
    "area_under_curve",
    "compare",
    "convergence_time",
    "evaluate",
    "evaluate_run",
    "hedges_g",
    "holm",
    "iqm",
    "kaplan_meier",
    "log_rank",
    "mean_interval",
    "mean_score",
    "mean_with_interval",
    "median_score",
    "one_way",
    "optimality_gap",
    "pairwise",
    "performance_profile",
    "probability_of_improvement",
    "restricted_mean",
    "stratified_bootstrap",
    "wilson",
]
