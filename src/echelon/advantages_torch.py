"""Credit assignment on tensors: the batched twins of `advantages.hae`, `group_relative` and `gigpo`.

They give the same numbers; their docstrings say only what differs. No gradient flows through any of them. Types are
the arguments' own, but at least float32: values may come from a model in bfloat16.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

__all__ = ["HAETensors", "gigpo_torch", "group_relative_torch", "hae_torch"]

# As `advantages` has them; modules of one layer don't know each other.
KeepPenaltyMode = Literal["normalized", "fixed"]
GroupNorm = Literal["std", "mean"]
GiGPOMode = Literal["mean_norm", "mean_std_norm"]


class HAETensors(NamedTuple):
    """As `advantages.HAE`, each `(B, T)`, 0 in the padding."""

    adv_low: Tensor
    ret_low: Tensor
    adv_high: Tensor
    ret_high: Tensor
    adv_term: Tensor
    ret_term: Tensor


@torch.no_grad()
def hae_torch(
    rewards: Tensor,
    switches: Tensor,
    dones: Tensor,
    v_high: Tensor,
    v_low: Tensor,
    v_term: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    gamma: float | Tensor,
    lam_turn: float,
    lam_seg: float,
    bootstrap_truncated: bool = False,
    keep_penalty: float = 0.0,
    keep_penalty_mode: KeepPenaltyMode = "normalized",
    normalize: bool = False,
    switch_rate_floor: float = 0.0,
    switch_rate_floor_coef: float = 0.0,
    last_high: Tensor | None = None,
    last_low: Tensor | None = None,
) -> HAETensors:
    """`advantages.hae` of B trajectories, padded on the right; see there for the formulas.

    Args:
        rewards, switches, dones, v_high, v_low, v_term: `(B, T)`; what stands in the padding has no influence.
        mask: bool `(B, T)`, true for turns, false for the padding behind them; None: there is none.
        gamma: discount of a turn, or `(B, T)`.
        normalize: over the turns of all trajectories together, as released (and as `advantages.hae_many`).
        last_high, last_low: None or `(B,)`.
        The rest: as `advantages.hae`'s.

    Returns:
        `HAETensors` of `(B, T)`, float32, or float64 if any of rewards and values is.

    Raises:
        ValueError: shapes that differ, a row that isn't padded on the right or has no turn, or an unknown mode.
    """
    if keep_penalty_mode not in get_args(KeepPenaltyMode):
        raise ValueError(f"keep_penalty_mode must be one of {get_args(KeepPenaltyMode)}, got {keep_penalty_mode!r}")
    valid = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.bool()
    named = {"switches": switches, "dones": dones, "v_high": v_high, "v_low": v_low, "v_term": v_term, "mask": valid}
    for name, x in named.items():
        if rewards.ndim != 2 or (x is not None and x.shape != rewards.shape):
            raise ValueError(f"{name} and rewards must be of one shape (B, T), got {tuple(rewards.shape)}")
    if not rewards.numel() or not valid[:, 0].all() or (valid[:, 1:] & ~valid[:, :-1]).any():
        raise ValueError("each row of mask must have at least one turn, and padding only behind its turns")
    turns = valid.sum(1)
    rows, end = torch.arange(len(rewards), device=rewards.device), turns - 1

    dtype = torch.float32
    for x in (rewards, v_high, v_low, v_term):
        dtype = dtype if x is None else torch.promote_types(dtype, x.dtype)
    q = switches.bool() & valid
    boundary = q.clone()
    boundary[:, 0] = True
    # where, not times: whatever stands in the padding and in unused places of v_high, NaN too, must not get in.
    zero = torch.zeros((), dtype=dtype, device=rewards.device)
    r, vl = (torch.where(valid, x.to(dtype), zero) for x in (rewards, v_low))
    vh = torch.where(boundary, v_high.to(dtype), zero)
    discount = gamma if isinstance(gamma, Tensor) else torch.full_like(r, gamma)
    g = torch.where(valid & ~dones.bool(), discount.to(dtype), zero)

    keep = valid & ~q
    kept, several = keep.sum(1), (turns > 1).to(dtype)
    share = penalty = torch.full_like(several, keep_penalty)
    if keep_penalty_mode == "normalized":
        share = penalty / turns * several
    missing = (switch_rate_floor - (1 - kept.to(dtype) / turns)).clamp_min(0) * several
    share = share - switch_rate_floor_coef * missing / kept.clamp_min(1)
    r = r + keep * share[:, None]

    after_high = after_low = torch.zeros_like(several)
    if bootstrap_truncated:
        index = torch.arange(rewards.shape[1], device=rewards.device).expand_as(rewards)
        start = torch.where(boundary, index, 0).amax(1)  # of the last segment
        after_high = vh[rows, start] if last_high is None else last_high.to(dtype)
        after_low = vl[rows, end] if last_low is None else last_low.to(dtype)
        over = dones.bool()[rows, end]
        after_high, after_low = (torch.where(over, zero, x) for x in (after_high, after_low))

    adv_low, adv_high, ret_term = torch.zeros_like(r), torch.zeros_like(r), torch.zeros_like(r)
    value, trace, high, term = after_low, torch.zeros_like(after_low), after_high, after_high
    for t in range(rewards.shape[1] - 1, -1, -1):
        on, new = valid[:, t], boundary[:, t]
        trace = torch.where(on, r[:, t] + g[:, t] * (value + lam_turn * trace) - vl[:, t], trace)
        high = torch.where(on, r[:, t] + g[:, t] * high, high)
        term = torch.where(on, r[:, t] + g[:, t] * term, term)
        adv_low[:, t], ret_term[:, t] = trace * on, term * on
        adv_high[:, t] = torch.where(new, high - vh[:, t], zero)
        value = torch.where(on, vl[:, t], value)
        # A boundary: what the segment before it is told.
        value, trace = torch.where(new, vh[:, t], value), torch.where(new, zero, trace)
        high = torch.where(new, vh[:, t] + lam_seg * adv_high[:, t], high)
        term = torch.where(new, vh[:, t], term)

    ret_low, ret_high = adv_low + vl, adv_high + vh
    if v_term is None:
        adv_term = ret_term = torch.zeros_like(r)
    else:
        adv_term = torch.where(valid, ret_term - v_term.to(dtype), zero)
    if normalize:
        adv_low, adv_high = _standardise(adv_low, valid), _standardise(adv_high, boundary)
        adv_term = adv_term if v_term is None else _standardise(adv_term, valid)
    return HAETensors(adv_low, ret_low, adv_high, ret_high, adv_term, ret_term)


def _standardise(values: Tensor, where: Tensor) -> Tensor:
    """Zero mean and population standard deviation 1 over `where`; 0 elsewhere."""
    chosen = values[where]
    chosen = chosen - chosen[0]  # so that equal ones are 0 exactly, and rounding isn't blown up below
    out = torch.zeros_like(values)
    out[where] = (chosen - chosen.mean()) / (chosen.std(correction=0) + 1e-8)
    return out


@torch.no_grad()
def group_relative_torch(scores: Tensor, groups: Tensor, *, normalize: GroupNorm = "std", eps: float = 1e-6) -> Tensor:
    """`advantages.group_relative` on tensors.

    Args:
        scores: `(N,)`. groups: integer `(N,)`.
        The rest: as there.

    Returns:
        `(N,)`, float32 or float64 as the scores.

    Raises:
        ValueError: shapes that differ, or an unknown `normalize`.
    """
    if normalize not in get_args(GroupNorm):
        raise ValueError(f"normalize must be one of {get_args(GroupNorm)}, got {normalize!r}")
    _check_rows(scores, groups=groups)
    return _relative(scores, groups, by_std=normalize == "std", eps=eps, alone_is_score=True)


@torch.no_grad()
def gigpo_torch(
    step_returns: Tensor,
    episode_scores: Tensor,
    groups: Tensor,
    anchors: Tensor,
    *,
    mode: GiGPOMode = "mean_norm",
    step_weight: float = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    """`advantages.gigpo` on tensors.

    Args:
        step_returns, episode_scores: `(N,)`, one entry a step row. groups, anchors: integer `(N,)`.
        The rest: as there.

    Returns:
        `(N,)`, float32 or float64 as the returns and scores.

    Raises:
        ValueError: shapes that differ, or an unknown `mode`.
    """
    if mode not in get_args(GiGPOMode):
        raise ValueError(f"mode must be one of {get_args(GiGPOMode)}, got {mode!r}")
    _check_rows(step_returns, episode_scores=episode_scores, groups=groups, anchors=anchors)
    by_std = mode == "mean_std_norm"
    episode = _relative(episode_scores, groups, by_std=by_std, eps=eps, alone_is_score=True)
    _, same_state = torch.unique(torch.stack([groups, anchors]), dim=1, return_inverse=True)
    return episode + step_weight * _relative(step_returns, same_state, by_std=by_std, eps=eps, alone_is_score=False)


def _check_rows(rows: Tensor, **others: Tensor) -> None:
    for name, x in others.items():
        if rows.ndim != 1 or x.shape != rows.shape:
            raise ValueError(f"{name} must be one entry a row, got {tuple(x.shape)} for {tuple(rows.shape)}")


def _relative(scores: Tensor, groups: Tensor, *, by_std: bool, eps: float, alone_is_score: bool) -> Tensor:
    """A score minus its group's mean, over its unbiased standard deviation or not."""
    x = scores.to(torch.promote_types(torch.float32, scores.dtype))
    _, group, count = torch.unique(groups, return_inverse=True, return_counts=True)

    def mean(values: Tensor, degrees: Tensor) -> Tensor:
        total = torch.zeros(len(count), dtype=x.dtype, device=x.device).index_add_(0, group, values)
        return (total / degrees)[group]

    # Above the group's least, so that equal scores are 0 exactly: float32's rounding over eps would be no small thing.
    least = torch.zeros(len(count), dtype=x.dtype, device=x.device)
    above = x - least.scatter_reduce(0, group, x, "amin", include_self=False)[group]
    out = above - mean(above, count)
    alone = (count == 1)[group]
    if alone_is_score:
        out = torch.where(alone, x, out)
    if by_std:
        std = mean(out**2, (count - 1).clamp_min(1)).sqrt()
        out = out / (torch.where(alone, 1.0, std) + eps)
    return out
