"""Credit assignment: pure functions on arrays."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["gae", "td_lambda"]


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
