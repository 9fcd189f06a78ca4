"""Credit assignment: pure functions on arrays.

`gae` and `td_lambda` for steps of many worlds at once; `hae` (HiPER) for the turns of a planner that keeps or changes
its subgoal; `group_relative` and `gigpo` (GRPO, HiMAC, GiGPO) for scores compared within a group, with no critic.
`team_tree_returns` and `team_advantages` (MAGRPO's family) for teams of language models. `advantages_torch` has some
of it for tensors.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray

from echelon.advantages_teams import Joint, TeamMode, team_advantages, team_tree_returns

__all__ = [
    "HAE",
    "GiGPOMode",
    "GroupNorm",
    "Joint",
    "KeepPenaltyMode",
    "TeamMode",
    "gae",
    "gigpo",
    "group_relative",
    "hae",
    "hae_many",
    "hae_switch_option_critic",
    "keep_consistency_penalty",
    "td_lambda",
    "team_advantages",
    "team_tree_returns",
]

KeepPenaltyMode = Literal["normalized", "fixed"]
GroupNorm = Literal["std", "mean"]
GiGPOMode = Literal["mean_norm", "mean_std_norm"]


def gae(
    rewards: NDArray[np.float32],
    values: NDArray[np.float32],
    next_values: NDArray[np.float32],
    terminated: NDArray[np.bool_],
    ended: NDArray[np.bool_],
    *,
    gamma: float,
    lam: float,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Generalised advantage estimation (Schulman et al. 2016) with truncation kept apart from termination.

    `delta_t = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t)`, where `s_{t+1}` is the true next state, also
    where a time limit cut the episode; `A_t = delta_t + gamma lam (1 - ended_t) A_{t+1}`.

    Args:
        rewards, values: float32 `(T, …)`.
        next_values: float32 `(T, …)`, the value of the true next state of each step.
        terminated: bool `(T, …)`, true where nothing of worth follows.
        ended: bool `(T, …)`, true where the next row belongs to another episode (terminated or truncated).
        gamma: discount; lam: the trace's decay.

    Returns:
        advantages and returns (advantages + values), float32 `(T, …)`.
    """
    shape = rewards.shape
    flat = [np.ascontiguousarray(x).reshape(shape[0], -1) for x in (rewards, values, next_values, terminated, ended)]
    out = np.empty(flat[0].shape, np.float32)
    _gae(*flat, np.float32(gamma), np.float32(lam), out)
    advantages = out.reshape(shape)
    return advantages, advantages + values


@numba.njit(cache=True)
def _gae(rewards, values, next_values, terminated, ended, gamma, lam, out):  # type: ignore[no-untyped-def]
    steps, width = rewards.shape
    trace = np.zeros(width, np.float32)
    zero, one = np.float32(0), np.float32(1)
    for t in range(steps - 1, -1, -1):
        for i in range(width):
            on = zero if terminated[t, i] else one
            delta = rewards[t, i] + gamma * on * next_values[t, i] - values[t, i]
            trace[i] = delta + (zero if ended[t, i] else gamma * lam * trace[i])
            out[t, i] = trace[i]


def td_lambda(
    rewards: NDArray[np.float32],
    next_values: NDArray[np.float32],
    terminated: NDArray[np.bool_],
    ended: NDArray[np.bool_],
    *,
    gamma: float,
    lam: float,
) -> NDArray[np.float32]:
    """λ-returns (Sutton and Barto 2018, section 12.1, in their recursive form), truncation apart from termination.

    `G_t = r_t + gamma (1 - terminated_t) ((1 - lam) V(s_{t+1}) + lam G_{t+1})`; where `ended_t`, and in the last
    row, V stands for G too: nothing is known of what followed. With greedy values this is Peng's Q(λ).

    Args:
        rewards: float32 `(T, …)`.
        next_values: float32 `(T, …)`, the value of the true next state of each step, also of one that a time limit
            cut off.
        terminated: bool `(T, …)`, true where nothing of worth follows.
        ended: bool `(T, …)`, true where the next row belongs to another episode (terminated or truncated).
        gamma: discount; lam: 0 looks one step ahead, 1 to the end.

    Returns:
        float32 `(T, …)`.
    """
    shape = rewards.shape
    flat = [np.ascontiguousarray(x).reshape(shape[0], -1) for x in (rewards, next_values, terminated, ended)]
    out = np.empty(flat[0].shape, np.float32)
    _td_lambda(*flat, np.float32(gamma), np.float32(lam), out)
    return out.reshape(shape)


@numba.njit(cache=True, nogil=True)
def _td_lambda(rewards, next_values, terminated, ended, gamma, lam, out):  # type: ignore[no-untyped-def]
    steps, width = rewards.shape
    zero, one = np.float32(0), np.float32(1)
    for t in range(steps - 1, -1, -1):
        for i in range(width):
            ahead = next_values[t, i]
            if t < steps - 1 and not ended[t, i]:
                ahead += lam * (out[t + 1, i] - ahead)
            out[t, i] = rewards[t, i] + gamma * (zero if terminated[t, i] else one) * ahead


class HAE(NamedTuple):
    """What `hae` gives, each float64 `(T,)`: by turn, an advantage and the return that its critic learns.

    `adv_low`, `ret_low`: of the action, every turn (critic V^L). `adv_high`, `ret_high`: of the chosen subgoal, at
    boundary turns, 0 elsewhere (V^H). `adv_term`, `ret_term`: of KEEP or SWITCH, every turn (V^T); both all 0 if no
    `v_term` was given.
    """

    adv_low: NDArray[np.float64]
    ret_low: NDArray[np.float64]
    adv_high: NDArray[np.float64]
    ret_high: NDArray[np.float64]
    adv_term: NDArray[np.float64]
    ret_term: NDArray[np.float64]


def hae(
    rewards: ArrayLike,
    switches: ArrayLike,
    dones: ArrayLike,
    v_high: ArrayLike,
    v_low: ArrayLike,
    v_term: ArrayLike | None = None,
    *,
    gamma: float | ArrayLike,
    lam_turn: float,
    lam_seg: float,
    bootstrap_truncated: bool = False,
    keep_penalty: float = 0.0,
    keep_penalty_mode: KeepPenaltyMode = "normalized",
    normalize: bool = False,
    switch_rate_floor: float = 0.0,
    switch_rate_floor_coef: float = 0.0,
    last_high: float | None = None,
    last_low: float | None = None,
) -> HAE:
    """Hierarchical advantage estimation of one trajectory (HiPER, arXiv 2602.16165), with the released code's results.

    A segment begins at turn 0 and wherever the planner switches (a boundary turn), and ends before the next one. With
    `g_t = gamma_t (1 - done_t)`, s and e a segment's first and last turn, and n = e + 1 the next boundary:

        low    A_t = r_t + g_t V_next + g_t lam_turn A_{t+1} - V^L_t    V_next = V^L_{t+1}; V^H_n and A_{e+1} = 0 at e
        high   A_s = r_s + g_s (r_{s+1} + g_{s+1} (… r_e + g_e (V^H_n + lam_seg A_n))) - V^H_s
        term   A_t = r_t + g_t (r_{t+1} + … r_e + g_e V^H_n) - V^T_t    Monte Carlo inside the segment

    A return is its advantage plus its value. After the last segment nothing follows (0), unless it was cut off
    (`bootstrap_truncated`). A segment tells the one before it V^H_n and, in the high level, A_n; nothing else
    crosses a boundary. `v_high` is read at boundary turns only.

    Args:
        rewards: `(T,)`, T at least 1, of each turn. A turn that lasted several steps: its rewards, discounted to its
            start (and `gamma` as below).
        switches: `(T,)`, true (1) where the planner chose SWITCH. A KEEP at turn 0 begins a segment like any other,
            but counts as KEEP in the penalties.
        dones: `(T,)`, true where the episode really ended (not: was cut off by a time limit). Nothing that comes
            after such a turn enters what comes before it (our choice where it isn't a segment's last turn; the
            released code looks at the last turn only).
        v_high: `(T,)`, V^H, before the subgoal is chosen. v_low: `(T,)`, V^L, given the subgoal. v_term: `(T,)`,
            V^T, before KEEP or SWITCH; None: there is no such critic, and `adv_term` and `ret_term` are 0 (as
            released).
        gamma: discount of a turn; or `(T,)`, the discount from each turn to the next, for turns of unequal length
            (`gamma ** steps`; semi-Markov, our choice: gamma^d becomes the product).
        lam_turn: decay of the low level's trace, a turn. lam_seg: of the high level's, a segment.
        bootstrap_truncated: a last turn that isn't done was cut off: the value of what came next is `last_low` (low
            level), `last_high` (high level, term), the true last observation's values; where one is None, that of
            the same state stands in (as released): V^L of the last turn, V^H of its segment's start. False: 0.
        keep_penalty: added to the rewards before all else (usually negative), in `keep_penalty_mode`: "fixed", to
            each KEEP turn; "normalized", c/T to each KEEP turn, so that a trajectory's total is c times its share of
            KEEP turns (none if T is 1).
        normalize: each level's advantages, over the turns that have one (high: boundary turns), minus their mean,
            over their population standard deviation + 1e-8. Returns stay. For a batch, see `hae_many`.
        switch_rate_floor, switch_rate_floor_coef: where the share of SWITCH turns is below the floor, `coef *
            (floor - share)` is taken from the rewards, in equal parts from the KEEP turns (none if T is 1). The
            released settings name these two without code; how they work is our choice. HiPER's runs: 0.25 and 5.

    Returns:
        an `HAE` of float64 `(T,)`, computed in float64.

    Raises:
        ValueError: shapes that differ, no turn, or an unknown mode.
    """
    return hae_many(
        [np.size(np.asarray(rewards))], rewards, switches, dones, v_high, v_low, v_term,
        gamma=gamma, lam_turn=lam_turn, lam_seg=lam_seg, bootstrap_truncated=bootstrap_truncated,
        keep_penalty=keep_penalty, keep_penalty_mode=keep_penalty_mode, normalize=normalize,
        switch_rate_floor=switch_rate_floor, switch_rate_floor_coef=switch_rate_floor_coef,
        last_high=None if last_high is None else [last_high], last_low=None if last_low is None else [last_low],
    )  # fmt: skip


def hae_many(
    lengths: ArrayLike,
    rewards: ArrayLike,
    switches: ArrayLike,
    dones: ArrayLike,
    v_high: ArrayLike,
    v_low: ArrayLike,
    v_term: ArrayLike | None = None,
    *,
    gamma: float | ArrayLike,
    lam_turn: float,
    lam_seg: float,
    bootstrap_truncated: bool = False,
    keep_penalty: float = 0.0,
    keep_penalty_mode: KeepPenaltyMode = "normalized",
    normalize: bool = False,
    switch_rate_floor: float = 0.0,
    switch_rate_floor_coef: float = 0.0,
    last_high: ArrayLike | None = None,
    last_low: ArrayLike | None = None,
) -> HAE:
    """`hae` of many trajectories in one pass; they lie one behind the other.

    Args:
        lengths: int `(n,)`, each at least 1: how many turns each trajectory has; they add up to N.
        rewards, switches, dones, v_high, v_low, v_term, gamma: as `hae`'s, `(N,)`.
        last_high, last_low: None or `(n,)`, one a trajectory.
        normalize: over the turns of all trajectories together, as released.
        The rest: as `hae`'s.

    Returns:
        an `HAE` of float64 `(N,)`.

    Raises:
        ValueError: as `hae`.
    """
    r = np.array(rewards, np.float64)
    size = np.asarray(lengths, np.int64)
    if size.ndim != 1 or (size < 1).any() or r.shape != (size.sum(),) or not size.size:
        raise ValueError(f"rewards must be (T,) with at least one turn a trajectory; got {r.shape} of {size.tolist()}")
    q, done = (_like(x, np.bool_, r, name) for x, name in ((switches, "switches"), (dones, "dones")))
    vh, vl = (_like(x, np.float64, r, name) for x, name in ((v_high, "v_high"), (v_low, "v_low")))
    vt = None if v_term is None else _like(v_term, np.float64, r, "v_term")
    discount = _like(np.full(r.shape, gamma) if np.ndim(gamma) == 0 else gamma, np.float64, r, "gamma")

    r += _keep_penalties(~q, size, keep_penalty, keep_penalty_mode, switch_rate_floor, switch_rate_floor_coef)

    ends = np.cumsum(size)
    boundary = q.copy()
    boundary[ends - size] = True
    after_high, after_low = np.zeros(len(size)), np.zeros(len(size))
    if bootstrap_truncated:
        start = np.maximum.accumulate(np.where(boundary, np.arange(len(r)), 0))  # of each turn's segment
        after_high = vh[start[ends - 1]] if last_high is None else _like(last_high, np.float64, size, "last_high")
        after_low = vl[ends - 1] if last_low is None else _like(last_low, np.float64, size, "last_low")
        after_high, after_low = (np.where(done[ends - 1], 0.0, x) for x in (after_high, after_low))

    g = np.where(done, 0.0, discount)
    adv_low, adv_high, ret_term = np.zeros(len(r)), np.zeros(len(r)), np.zeros(len(r))
    _hae(ends, r, boundary, g, vh, vl, after_high, after_low, lam_turn, lam_seg, adv_low, adv_high, ret_term)
    ret_low = adv_low + vl
    ret_high = np.where(boundary, adv_high + np.where(boundary, vh, 0.0), 0.0)
    if vt is None:
        ret_term[:] = 0.0
    adv_term = np.zeros(len(r)) if vt is None else ret_term - vt
    if normalize:
        everywhere = np.ones(len(r), np.bool_)
        adv_low, adv_high = _standardise(adv_low, everywhere), _standardise(adv_high, boundary)
        adv_term = adv_term if vt is None else _standardise(adv_term, everywhere)
    return HAE(adv_low, ret_low, adv_high, ret_high, adv_term, ret_term)


@numba.njit(cache=True, nogil=True)
def _hae(ends, r, boundary, g, vh, vl, after_high, after_low, lam_turn, lam_seg, adv_low, adv_high, ret_term):  # type: ignore[no-untyped-def]
    first = 0
    for i in range(len(ends)):
        # What a turn is told of what comes after it: the low level's value and trace, the high level's and the
        # switch's return. At a boundary all four are set anew for the segment before it.
        value, trace, high, term = after_low[i], 0.0, after_high[i], after_high[i]
        for t in range(ends[i] - 1, first - 1, -1):
            trace = r[t] + g[t] * (value + lam_turn * trace) - vl[t]
            high = r[t] + g[t] * high
            term = r[t] + g[t] * term
            adv_low[t], ret_term[t], value = trace, term, vl[t]
            if boundary[t]:
                adv_high[t] = high - vh[t]
                value, trace, high, term = vh[t], 0.0, vh[t] + lam_seg * adv_high[t], vh[t]
        first = ends[i]


def _keep_penalties(
    keep: NDArray[np.bool_],
    size: NDArray[np.int64],
    penalty: float,
    mode: KeepPenaltyMode,
    floor: float,
    floor_coef: float,
) -> NDArray[np.float64]:
    """What is added to the rewards of KEEP turns, float64 `(N,)`: see `hae`."""
    if mode not in get_args(KeepPenaltyMode):
        raise ValueError(f"keep_penalty_mode must be one of {get_args(KeepPenaltyMode)}, got {mode!r}")
    row = np.repeat(np.arange(len(size)), size)
    kept = np.bincount(row, keep, len(size))
    several = size > 1
    each = np.full(len(size), penalty) if mode == "fixed" else np.where(several, penalty / size, 0.0)
    missing = np.maximum(floor - (1 - kept / size), 0.0) * several
    each = each - floor_coef * missing / np.maximum(kept, 1)
    return np.where(keep, each[row], 0.0)


def _standardise(values: NDArray[np.float64], where: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Zero mean and population standard deviation 1 over `where`; 0 elsewhere."""
    chosen = values[where]
    chosen = chosen - chosen[0]  # so that equal ones are 0 exactly, and rounding isn't blown up below
    out = np.zeros_like(values)
    out[where] = (chosen - chosen.mean()) / (chosen.std() + 1e-8)
    return out


def _like(x: ArrayLike, dtype: type, shaped: NDArray[Any], name: str) -> NDArray[Any]:
    """As an array of a type, one entry for each of `shaped`."""
    array: NDArray[Any] = np.asarray(x).astype(dtype)
    if array.shape != shaped.shape:
        raise ValueError(f"{name} must be {shaped.shape}, got {array.shape}")
    return array


def keep_consistency_penalty(
    switches: ArrayLike, subgoals: Sequence[Any], penalty: float, *, requires_both: bool = True
) -> NDArray[np.float64]:
    """What to add to one trajectory's rewards where the planner said KEEP but wrote another subgoal (HiPER).

    Args:
        switches: `(T,)`, true where the planner chose SWITCH.
        subgoals: T subgoals as written, texts or tuples of tokens; None or empty: none was written.
        penalty: added at each such turn (usually negative); turn 0 has nothing to agree with.
        requires_both: only where this turn and the one before both wrote a subgoal; False: a KEEP with no subgoal
            is inconsistent, too.

    Returns:
        float64 `(T,)`, the penalty or 0.

    Raises:
        ValueError: lengths that differ.
    """
    q = np.asarray(switches).astype(np.bool_)
    if q.shape != (len(subgoals),):
        raise ValueError(f"{len(subgoals)} subgoals for switches of shape {q.shape}")
    written = [x is not None and len(x) > 0 for x in subgoals]
    out = np.zeros(len(q))
    for t in range(1, len(q)):
        if q[t] or (requires_both and not (written[t] and written[t - 1])):
            continue
        if not written[t] or subgoals[t] != subgoals[t - 1]:
            out[t] = penalty
    return out


def hae_switch_option_critic(
    v_high_now: ArrayLike, v_low_prev: ArrayLike, switches: ArrayLike, beta: ArrayLike
) -> NDArray[np.float64]:
    """The advantage of KEEP or SWITCH in the form of HiPER's paper; its released code uses `hae`'s `adv_term`.

    `A_t = (q_t - beta_t) (V^H(s_t) - V^L(s_t, o_{t-1}))`: a switch is worth what choosing anew is worth above going
    on. Its mean over q ~ Bernoulli(beta) is 0; it is the exact advantage where both values are (option-critic's
    termination gradient, Bacon et al. 2017, for a decision made by sampling).

    Args:
        v_high_now: any shape, V^H(s_t), of choosing a subgoal now.
        v_low_prev: the same, V^L(s_t, o_{t-1}), of going on with the subgoal of the turn before. No subgoal runs at
            an episode's first turn: give `v_high_now` there, and the advantage is 0.
        switches: the same, q_t, true (1) where the planner chose SWITCH.
        beta: the same, its probability of SWITCH.

    Returns:
        float64, of the same shape.

    Raises:
        ValueError: shapes that differ.
    """
    high = np.asarray(v_high_now, np.float64)
    low = _like(v_low_prev, np.float64, high, "v_low_prev")
    q = _like(switches, np.bool_, high, "switches")
    out: NDArray[np.float64] = (q - _like(beta, np.float64, high, "beta")) * (high - low)
    return out


def group_relative(
    scores: ArrayLike, groups: ArrayLike | Sequence[Hashable], *, normalize: GroupNorm = "std", eps: float = 1e-6
) -> NDArray[np.float64]:
    """Advantages relative to the other samples of one task: GRPO's (arXiv 2402.03300), HiMAC's at both levels.

    `(x - mean) / (std + eps)`, or `x - mean` (Dr. GRPO, arXiv 2503.20783), over the scores of x's group, with the
    unbiased standard deviation (as GRPO's usual implementations). So a group of two or more has mean 0, and one whose
    scores are all equal has 0 everywhere. In a group of one there is nothing to compare with: mean 0 and std 1, the
    advantage is the score itself (as verl-agent's released GRPO and GiGPO; leave such rows out if you don't want
    that).

    Args:
        scores: `(N,)`, one a trajectory.
        groups: N labels (ints, strings, …); rows with equal labels are one group, in whatever order.
        normalize: "std", or "mean" for the mean alone.
        eps: added to the standard deviation.

    Returns:
        float64 `(N,)`.

    Raises:
        ValueError: lengths that differ, or an unknown `normalize`.
    """
    if normalize not in get_args(GroupNorm):
        raise ValueError(f"normalize must be one of {get_args(GroupNorm)}, got {normalize!r}")
    x = np.asarray(scores, np.float64)
    return _relative(x, _codes(groups, x, "groups"), by_std=normalize == "std", eps=eps, alone="score")


def gigpo(
    step_returns: ArrayLike,
    episode_scores: ArrayLike,
    groups: ArrayLike | Sequence[Hashable],
    anchors: ArrayLike | Sequence[Hashable],
    *,
    mode: GiGPOMode = "mean_norm",
    step_weight: float = 1.0,
    eps: float = 1e-6,
) -> NDArray[np.float64]:
    """GiGPO's advantage (arXiv 2505.10978, Eqs. 3, 6 to 8): relative to the group, and to equal states in it.

    `A = A^E + step_weight A^S`. `A^E` is the episode's score minus its group's mean; the mean runs over all step rows
    of the group, so a long trajectory weighs more (as verl-agent). `A^S` is the step's return minus the mean over the
    rows of the same group with the same observation; 0 for an observation seen once. "mean_std_norm" divides each by
    the (unbiased) standard deviation + eps of the rows that its mean is of. A group of one row: `A^E` is its score.

    Args: every argument has one entry a step row.
        step_returns: `(N,)`, discounted return from the step on.
        episode_scores: `(N,)`, the score of the step's trajectory.
        groups: N labels: which task the trajectory was sampled for.
        anchors: N labels that are equal where the observations are; or the observations themselves, `(N, …)`.
        mode: "mean_norm" or "mean_std_norm".
        step_weight: ω.
        eps: added to standard deviations.

    Returns:
        float64 `(N,)`.

    Raises:
        ValueError: lengths that differ, or an unknown `mode`.
    """
    if mode not in get_args(GiGPOMode):
        raise ValueError(f"mode must be one of {get_args(GiGPOMode)}, got {mode!r}")
    returns = np.asarray(step_returns, np.float64)
    scores = _like(episode_scores, np.float64, returns, "episode_scores")
    group, anchor = _codes(groups, returns, "groups"), _codes(anchors, returns, "anchors")
    by_std = mode == "mean_std_norm"
    episode = _relative(scores, group, by_std=by_std, eps=eps, alone="score")
    _, same_state = np.unique(group * max(len(anchor), 1) + anchor, return_inverse=True)
    return episode + step_weight * _relative(returns, same_state, by_std=by_std, eps=eps, alone="zero")


def _relative(
    x: NDArray[np.float64], group: NDArray[np.int64], *, by_std: bool, eps: float, alone: Literal["score", "zero"]
) -> NDArray[np.float64]:
    """x minus its group's mean, over its unbiased standard deviation or not; what a group of one gets is `alone`."""
    count = np.maximum(np.bincount(group), 1)
    mean = np.bincount(group, x) / count
    if alone == "score":
        mean[count == 1] = 0.0
    out: NDArray[np.float64] = x - mean[group]
    if by_std:
        std = np.sqrt(np.bincount(group, out**2) / np.maximum(count - 1, 1))
        std[count == 1] = 1.0
        out /= std[group] + eps
    return out


def _codes(labels: ArrayLike | Sequence[Hashable], rows: NDArray[np.float64], name: str) -> NDArray[np.int64]:
    """0, 1, … for the labels, in the order in which they first appear; an array's further axes belong to the label."""
    if isinstance(labels, np.ndarray) and labels.ndim > 1:
        names: list[Hashable] = [np.ascontiguousarray(row).tobytes() for row in labels]
    else:
        names = labels.tolist() if isinstance(labels, np.ndarray) else list(labels)  # type: ignore[arg-type]
    if rows.shape != (len(names),):
        raise ValueError(f"{len(names)} {name} for rows of shape {rows.shape}")
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(x, len(known)) for x in names], np.int64)
