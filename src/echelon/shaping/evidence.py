"""What the Critic is told about a run: features of its evaluation curve, compact statistics of behaviour, flags.

The statistics and thresholds are LLM-ALSO's, generalised from food to whatever a grid world's agents go to
(`GridEnv.nearest_goal`). All of it is computed from arrays of recorded episodes; no trajectory is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from echelon.shaping.gate import LAST, Stage, summarise

__all__ = ["Behaviour", "CurveFeatures", "Recording", "behaviour", "curve_features", "evidence", "flags"]

WINDOW = 6
"""Steps back in which a cell that is entered again counts as repeated."""
NEAR = 2
"""Cells to a goal, at most, that are near it."""
ENOUGH = 3
"""Episodes that there must be for statistics to say anything."""


@dataclass(frozen=True)
class CurveFeatures:
    """A curve of the task return over evaluations, in shares of the best return.

    Attributes:
        points: how many evaluations.
        final, best, last_k, auc, std, spike_gap: as in `Summary`.
        slope: gain from one evaluation to the next, by least squares over the last half (at least two).
        zeros: share of evaluations that brought nothing.
        first_success: share of the curve that had passed at the first evaluation that brought something; 1: none did.
        stage: "exploration" (nearly nothing yet), "regression" (the last are clearly below the best), "acceleration",
            "plateau", or "uncertain" (fewer than four evaluations). The thresholds are our choice.
    """

    points: int
    final: float
    best: float
    last_k: float
    auc: float
    std: float
    spike_gap: float
    slope: float
    zeros: float
    first_success: float
    stage: Stage


def curve_features(curve: ArrayLike, *, best_return: float = 1.0) -> CurveFeatures:
    """Features of an evaluation curve.

    Args:
        curve: float `(n,)`, mean task return of each evaluation in order; those that aren't finite are left out.
        best_return: the most that an episode can bring.
    """
    points = np.asarray(curve, np.float64).reshape(-1)
    points = points[np.isfinite(points)]
    if not len(points):
        return CurveFeatures(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, "uncertain")
    summary = summarise(points, best_return=best_return)
    points = points / best_return
    half = points[-max(2, len(points) // 2) :]
    at = np.arange(len(half)) - (len(half) - 1) / 2
    slope = float(at @ half / (at @ at)) if len(half) > 1 else 0.0
    some = np.flatnonzero(points > 0)
    return CurveFeatures(
        points=len(points),
        final=summary.final,
        best=summary.best,
        last_k=summary.last_k,
        auc=summary.auc,
        std=summary.std,
        spike_gap=summary.spike_gap,
        slope=slope,
        zeros=float((points <= 0).mean()),
        first_success=float(some[0] / len(points)) if len(some) else 1.0,
        stage=_stage(len(points), summary.last_k, summary.spike_gap, slope * len(half)),
    )


def _stage(points: int, last_k: float, spike_gap: float, gain: float) -> Stage:
    if points < LAST - 1:
        return "uncertain"
    if last_k < 0.05:
        return "regression" if spike_gap > 0.10 else "exploration"
    if gain > 0.05:
        return "acceleration"
    return "regression" if spike_gap > 0.10 else "plateau"


@dataclass(frozen=True)
class Recording:
    """What some worlds did for T steps; W worlds of A agents.

    Attributes:
        cells: int `(T, W, A)`, flat cells where agents stand before each step (`GridEnv.pos`).
        targets: int `(T, W, A)`, the cell that each would go to then (`GridEnv.nearest_goal()`), or -1.
        reward: float `(T, W)`, the task reward of each step.
        begins: bool `(T, W)`, where an episode begins; row 0 always counts as one.
        stride: cells of a row of the flat grid (`GridEnv.stride`).
        free_cells: int `(W,)` or one number: cells that can be walked on.
        bumped: bool `(T, W, A)`, the step's moves that another agent prevented, or None.
        live: bool `(T, W)`, the steps that count, or None for all: what lies behind an evaluation's last episode
            doesn't.
    """

    cells: NDArray[np.integer[Any]]
    targets: NDArray[np.integer[Any]]
    reward: NDArray[np.floating[Any]]
    begins: NDArray[np.bool_]
    stride: int
    free_cells: int | NDArray[np.integer[Any]]
    bumped: NDArray[Any] | None = None
    live: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Behaviour:
    """Compact statistics of recorded episodes; shares are 0 to 1.

    Attributes:
        episodes: how many, also those cut off by the recording's end; steps: mean length.
        coverage: share of the cells that a team could have walked on (all, or one a step and agent where that is less)
            that it did; mean over episodes.
        idle: share of an agent's steps that left it where it was.
        backtrack: share that went back to where it had been one step before.
        oscillation: share that was the third of such a to and fro (A-B-A-B).
        repeated: share that entered a cell in which it had been within the last six steps.
        goal_distance: mean distance to its nearest goal, in cells; -1 where there never was one.
        near_steps: share of its steps within two cells of it.
        near_episodes: share of episodes in which some agent ever was.
        failed_near: share of the episodes with somebody near a goal that brought no reward.
        same_target: share of pairs of agents with a goal that had the same one.
        target_entropy: entropy of an episode's goals over its highest possible value, mean over episodes.
        target_switches: share of an agent's steps at which its goal became another one.
        bumped: share of an agent's moves that another prevented.
        events: steps with reward, an episode.
        task_return: task reward, an episode.
    """

    episodes: int
    steps: float
    coverage: float
    idle: float
    backtrack: float
    oscillation: float
    repeated: float
    goal_distance: float
    near_steps: float
    near_episodes: float
    failed_near: float
    same_target: float
    target_entropy: float
    target_switches: float
    bumped: float
    events: float
    task_return: float


def behaviour(record: Recording) -> Behaviour:
    """Statistics of a recording, episode by episode, without a loop over steps or worlds."""
    cells, targets = np.asarray(record.cells, np.int64), np.asarray(record.targets, np.int64)
    T, W, A = cells.shape
    live = np.ones((T, W), bool) if record.live is None else record.live
    begins = record.begins.copy()
    begins[:1] = True
    number = np.cumsum(begins, 0) + np.arange(W) * T  # of the episode, unlike in all worlds
    _, episode = np.unique(np.where(live, number, -1), return_inverse=True)
    # Steps that don't count come first, as episode -1.
    episode = episode.reshape(T, W) - (not live.all())
    num = int(episode.max(initial=-1)) + 1
    if num == 0:
        return Behaviour(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    at = episode[live]
    length = np.bincount(at, minlength=num)
    world = np.zeros(num, np.int64)
    world[at] = np.broadcast_to(np.arange(W), (T, W))[live]

    # Moves: step t leads from row t to row t + 1 of the same episode.
    def back(k: int) -> NDArray[np.bool_]:
        """Whether row t + 1 is where the agent was at row t + 1 - k; bool (T - 1, W, A)."""
        same = np.zeros((max(T - 1, 0), W, A), bool)
        if k < T:
            within = (episode[k:] == episode[:-k])[:, :, None]
            same[k - 1 :] = (cells[k:] == cells[:-k]) & within
        return same

    inside = (live[1:] & live[:-1] & (episode[1:] == episode[:-1]))[:, :, None]
    moves = int(inside.sum()) * A
    stayed = back(1)
    moved = inside & ~stayed
    returned = moved & back(2)
    again = np.zeros_like(returned)
    again[1:] = returned[1:] & returned[:-1]
    known = np.zeros_like(returned)
    for k in range(2, WINDOW + 1):
        known |= back(k)

    # Goals.
    has = (targets >= 0) & live[:, :, None]
    way = np.abs(cells // record.stride - targets // record.stride)
    way = way + np.abs(cells % record.stride - targets % record.stride)
    near = has & (way <= NEAR)
    near_episode = np.bincount(at, near.any(2)[live], num) > 0
    total = np.bincount(at, np.asarray(record.reward, np.float64)[live], num)
    events = np.bincount(at, (record.reward > 0)[live], num)
    order = np.sort(np.where(has, targets, -1), 2)
    # In a sorted row the agents with one goal stand together: the j-th of them closes j - 1 pairs.
    _, run = _runs(order)
    with_goal = has.sum(2)
    pairs = int((with_goal * (with_goal - 1) // 2).sum())
    same = int((run * (order >= 0)).sum())
    both = inside & has[1:] & has[:-1]
    walked = np.unique(np.stack([np.repeat(at, A), cells[live].reshape(-1)]), axis=1)[0]
    possible = np.minimum(np.broadcast_to(record.free_cells, (W,))[world], length * A)
    bumped = np.zeros((), np.float64) if record.bumped is None else np.asarray(record.bumped)[live].astype(np.float64)
    return Behaviour(
        episodes=num,
        steps=float(length.mean()),
        coverage=float((np.bincount(walked, minlength=num) / np.maximum(possible, 1)).mean()),
        idle=_share(stayed & inside, moves),
        backtrack=_share(returned, moves),
        oscillation=_share(again, moves),
        repeated=_share(moved & known, moves),
        goal_distance=float(way[has].mean()) if has.any() else -1.0,
        near_steps=_share(near, int(live.sum()) * A),
        near_episodes=float(near_episode.mean()),
        failed_near=_share(near_episode & (events == 0), int(near_episode.sum())),
        same_target=same / pairs if pairs else 0.0,
        target_entropy=_entropy(np.broadcast_to(episode[:, :, None], has.shape)[has], targets[has], num),
        target_switches=_share(both & (targets[1:] != targets[:-1]), moves),
        bumped=float(bumped.mean()),
        events=float(events.mean()),
        task_return=float(total.mean()),
    )


def _share(flags: NDArray[np.bool_], of: int) -> float:
    return int(flags.sum()) / of if of else 0.0


def _runs(ordered: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For rows sorted along the last axis: where each entry's run of equals begins, and its place in the run."""
    place = np.broadcast_to(np.arange(ordered.shape[-1]), ordered.shape)
    fresh = np.ones(ordered.shape, bool)
    fresh[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    start = np.maximum.accumulate(np.where(fresh, place, 0), -1)
    return start, place - start


def _entropy(episode: NDArray[np.int64], targets: NDArray[np.int64], num: int) -> float:
    """Entropy of each episode's goals over the logarithm of how many there were; mean over episodes."""
    if not len(targets):
        return 0.0
    pairs, counts = np.unique(np.stack([episode, targets]), axis=1, return_counts=True)
    share = counts / np.bincount(pairs[0], counts, num)[pairs[0]]
    entropy = np.bincount(pairs[0], -share * np.log(share), num)
    kinds = np.bincount(pairs[0], minlength=num)
    return float((entropy / np.log(np.maximum(kinds, 2))).mean())


def flags(stats: Behaviour) -> tuple[str, ...]:
    """What stands out, by name; the thresholds are LLM-ALSO's except where it says so.

    - insufficient_evidence: fewer than three episodes (our number); then nothing else is said.
    - low_coverage: coverage below .25.
    - goal_discovery_failure: in half of the episodes or more nobody was ever near a goal.
    - near_goal_failure: in half of those with somebody near one (our number) nothing came of it.
    - over_concentration: same_target above .7, and at most one rewarded step an episode.
    - unstable_behavior: backtrack above .35 or repeated above .45.
    - idle_team: idle above .5 (ours). blocked_traffic: bumped above .2 (ours).
    """
    if stats.episodes < ENOUGH:
        return ("insufficient_evidence",)
    found = {
        "low_coverage": stats.coverage < 0.25,
        "goal_discovery_failure": stats.near_episodes <= 0.5,
        "near_goal_failure": stats.near_episodes > 0 and stats.failed_near >= 0.5,
        "over_concentration": stats.same_target > 0.7 and stats.events <= 1,
        "unstable_behavior": stats.backtrack > 0.35 or stats.repeated > 0.45,
        "idle_team": stats.idle > 0.5,
        "blocked_traffic": stats.bumped > 0.2,
    }
    return tuple(name for name, so in found.items() if so)


def evidence(
    curve: ArrayLike, stats: Behaviour | None = None, *, best_return: float = 1.0, digits: int = 4
) -> dict[str, Any]:
    """All of it as plain values for a prompt or a file: `curve`, `behaviour` (or None) and `flags`, rounded."""
    features = asdict(curve_features(curve, best_return=best_return))
    shown: Sequence[str] = ("insufficient_evidence",) if stats is None else flags(stats)
    return {
        "curve": _rounded(features, digits),
        "behaviour": None if stats is None else _rounded(asdict(stats), digits),
        "flags": list(shown),
    }


def _rounded(values: dict[str, Any], digits: int) -> dict[str, Any]:
    return {name: round(value, digits) if isinstance(value, float) else value for name, value in values.items()}
