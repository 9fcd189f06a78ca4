"""GAE: by hand, against its definition, and what truncation must not do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from echelon.advantages import gae, td_lambda

Array = NDArray[np.float32]


def column(*numbers: float) -> Array:
    """One world's numbers over time, float32 `(T, 1)`."""
    return np.array(numbers, np.float32)[:, None]


def flags(*on: int) -> NDArray[np.bool_]:
    """The same for flags."""
    return np.array(on, bool)[:, None]


def definition(
    rewards: Array, values: Array, next_values: Array, terminated: NDArray[np.bool_], ended: NDArray[np.bool_],
    gamma: float, lam: float,
) -> NDArray[np.float64]:  # fmt: skip
    """The sum of discounted deltas up to the end of each step's episode, O(T²), for one world `(T,)`."""
    r, v, n = (x.astype(np.float64) for x in (rewards, values, next_values))
    delta = r + gamma * np.where(terminated, 0, n) - v
    out = np.zeros(len(r))
    for t in range(len(r)):
        for k in range(t, len(r)):
            out[t] += (gamma * lam) ** (k - t) * delta[k]
            if ended[k]:
                break
    return out


def test_by_hand_with_a_termination() -> None:
    # gamma = lam = 1/2. Deltas: 1 + 0.5*4 - 2 = 1; 2 + 0 - 4 = -2 (terminated: the 100 is never looked at);
    # 3 + 0.5*8 - 6 = 1. Traces from behind: 1; -2 (cut); 1 + 0.25*(-2) = 0.5.
    advantages, returns = gae(
        column(1, 2, 3), column(2, 4, 6), column(4, 100, 8), flags(0, 1, 0), flags(0, 1, 0), gamma=0.5, lam=0.5
    )
    assert advantages[:, 0].tolist() == [0.5, -2, 1]
    assert returns[:, 0].tolist() == [2.5, 2, 7]
    assert advantages.dtype == returns.dtype == np.float32


def test_by_hand_with_a_truncation() -> None:
    # As above, but the time limit cut step 1, whose true last state is worth 10: delta 2 + 0.5*10 - 4 = 3. The
    # trace still doesn't come across from the next episode.
    advantages, _ = gae(
        column(1, 2, 3), column(2, 4, 6), column(4, 10, 8), flags(0, 0, 0), flags(0, 1, 0), gamma=0.5, lam=0.5
    )
    assert advantages[:, 0].tolist() == [1.75, 3, 1]


def test_a_rollout_that_stops_in_mid_episode_bootstraps_from_the_next_state() -> None:
    advantages, returns = gae(column(1), column(2), column(4), flags(0), flags(0), gamma=0.5, lam=0.9)
    assert advantages.item() == 1
    assert returns.item() == 3


def test_truncation_is_not_termination() -> None:
    args = column(0, 0), column(0, 0), column(0, 5)
    cut, _ = gae(*args, flags(0, 0), flags(0, 1), gamma=0.9, lam=1.0)
    over, _ = gae(*args, flags(0, 1), flags(0, 1), gamma=0.9, lam=1.0)
    assert cut[:, 0] == pytest.approx([0.9 * 0.9 * 5, 0.9 * 5])
    assert over[:, 0].tolist() == [0, 0]


def test_an_agent_whose_own_task_ended_is_cut_alone() -> None:
    """Flags are one an agent: agent 0 reached its subgoal at step 0, its teammate goes on."""
    ones, zeros = np.ones((2, 1, 2), np.float32), np.zeros((2, 1, 2), np.float32)
    stop = np.array([[[True, False]], [[False, False]]])
    advantages, _ = gae(ones, zeros, ones, stop, stop, gamma=0.5, lam=1.0)
    assert advantages[:, 0, 0].tolist() == [1, 1.5]
    assert advantages[:, 0, 1].tolist() == [1 + 0.5 + 0.5 * 1.5, 1.5]


@st.composite
def rollouts(draw: st.DrawFn) -> tuple[Array, Array, Array, NDArray[np.bool_], NDArray[np.bool_]]:
    """A rollout `(T, W, A)` whose terminations are ends."""
    shape = (draw(st.integers(1, 9)), draw(st.integers(1, 3)), draw(st.integers(1, 2)))
    numbers = hnp.arrays(np.float32, shape, elements=st.floats(-8, 8, width=16))
    truth = hnp.arrays(np.bool_, shape)
    terminated = draw(truth)
    return draw(numbers), draw(numbers), draw(numbers), terminated, terminated | draw(truth)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(rollouts(), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_agrees_with_the_definition(
    rollout: tuple[Array, Array, Array, NDArray[np.bool_], NDArray[np.bool_]], gamma: float, lam: float, flat: bool
) -> None:
    if flat:
        rollout = tuple(x[:, :, 0] for x in rollout)  # type: ignore[assignment]
    advantages, returns = gae(*rollout, gamma=gamma, lam=lam)
    assert advantages.shape == returns.shape == rollout[0].shape
    for index in np.ndindex(*rollout[0].shape[1:]):
        r, v, n, terminated, ended = (x[(slice(None), *index)] for x in rollout)
        wanted = definition(r, v, n, terminated, ended, gamma, lam)
        np.testing.assert_allclose(advantages[(slice(None), *index)], wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(returns, advantages + rollout[1])


@settings(deadline=None, max_examples=60, derandomize=True)
@given(hnp.arrays(np.float32, 12, elements=st.floats(-8, 8, width=16)), st.floats(0.5, 1))
def test_with_a_full_trace_values_telescope(rewards: Array, gamma: float) -> None:
    """With λ = 1 and consistent values, the return is the discounted reward to the end plus the last value."""
    rng = np.random.default_rng(5)
    v = rng.normal(size=13).astype(np.float32)
    none = np.zeros((12, 1), bool)
    _, returns = gae(rewards[:, None], v[:-1, None], v[1:, None], none, none, gamma=gamma, lam=1.0)
    wanted = float(v[-1])
    for t in range(11, -1, -1):
        wanted = float(rewards[t]) + gamma * wanted
        assert returns[t, 0] == pytest.approx(wanted, rel=1e-4, abs=1e-3)


def test_without_a_trace_it_is_the_one_step_error() -> None:
    rng = np.random.default_rng(0)
    r, v, n = (rng.normal(size=(6, 4)).astype(np.float32) for _ in range(3))
    none = np.zeros((6, 4), bool)
    advantages, _ = gae(r, v, n, none, none, gamma=0.9, lam=0.0)
    np.testing.assert_allclose(advantages, r + np.float32(0.9) * n - v, rtol=1e-5, atol=1e-6)


def test_worlds_do_not_touch_each_other_and_inputs_may_be_views() -> None:
    rng = np.random.default_rng(1)
    r, v, n = (rng.normal(size=(7, 5, 3)).astype(np.float32) for _ in range(3))
    terminated = rng.random((7, 5, 3)) < 0.2
    ended = terminated | (rng.random((7, 5, 3)) < 0.2)
    whole, _ = gae(r, v, n, terminated, ended, gamma=0.97, lam=0.9)
    part, _ = gae(*(x[:, 2:3, ::2] for x in (r, v, n, terminated, ended)), gamma=0.97, lam=0.9)
    np.testing.assert_array_equal(part, whole[:, 2:3, ::2])


# -- TD(lambda) --------------------------------------------------------------------------------


def n_step_mixture(
    r: Array, v: Array, terminated: NDArray[np.bool_], ended: NDArray[np.bool_], gamma: float, lam: float, t: int
) -> float:
    """The λ-return by its definition: n-step returns weighed by (1 - λ) λ^(n-1), the last by what is left."""
    total, reward, weight = 0.0, 0.0, 1.0
    for k in range(t, len(r)):
        reward += gamma ** (k - t) * float(r[k])
        n_step = reward + (0.0 if terminated[k] else gamma ** (k - t + 1) * float(v[k]))
        if ended[k] or k == len(r) - 1:
            return total + weight * n_step
        total += weight * (1 - lam) * n_step
        weight *= lam
    raise AssertionError


@settings(deadline=None, max_examples=150, derandomize=True)
@given(rollouts(), st.floats(0, 1), st.floats(0, 1))
def test_td_lambda_is_the_mixture_of_n_step_returns(
    rollout: tuple[Array, Array, Array, NDArray[np.bool_], NDArray[np.bool_]], gamma: float, lam: float
) -> None:
    r, v, _, terminated, ended = rollout
    got = td_lambda(r, v, terminated, ended, gamma=gamma, lam=lam)
    assert got.shape == r.shape and got.dtype == np.float32
    for index in np.ndindex(*r.shape[1:]):
        one = [x[(slice(None), *index)] for x in (r, v, terminated, ended)]
        wanted = [n_step_mixture(*one, gamma, lam, t) for t in range(len(r))]
        np.testing.assert_allclose(got[(slice(None), *index)], wanted, rtol=1e-4, atol=1e-4)


def test_td_lambda_by_hand() -> None:
    # gamma = lam = 1/2. From behind: 3 + 0.5*8 = 7 (the rollout stops: bootstrap); 2 (terminated: the 100 is never
    # looked at); 1 + 0.5*(0.5*4 + 0.5*2) = 2.5.
    r, v = column(1, 2, 3), column(4, 100, 8)
    over = td_lambda(r, v, flags(0, 1, 0), flags(0, 1, 0), gamma=0.5, lam=0.5)
    assert over[:, 0].tolist() == [2.5, 2, 7]
    # Cut by a time limit instead, with a true last state worth 10: 2 + 0.5*10 = 7; 1 + 0.5*(0.5*4 + 0.5*7) = 3.75.
    cut = td_lambda(r, column(4, 10, 8), flags(0, 0, 0), flags(0, 1, 0), gamma=0.5, lam=0.5)
    assert cut[:, 0].tolist() == [3.75, 7, 7]


def test_td_lambda_of_0_looks_one_step_ahead_and_of_1_to_the_end() -> None:
    rng = np.random.default_rng(2)
    r, v = (rng.normal(size=(6, 3)).astype(np.float32) for _ in range(2))
    terminated = np.zeros((6, 3), bool)
    terminated[3, 1] = True
    one = td_lambda(r, v, terminated, terminated, gamma=0.9, lam=0.0)
    np.testing.assert_allclose(one, r + 0.9 * np.where(terminated, 0, v), rtol=1e-5, atol=1e-6)
    end = td_lambda(r, v, terminated, terminated, gamma=0.9, lam=1.0)
    powers = 0.9 ** np.arange(7)
    assert end[0, 0] == pytest.approx(float((powers[:6] * r[:, 0]).sum() + powers[6] * v[5, 0]), rel=1e-4)
    assert end[0, 1] == pytest.approx(float((powers[:4] * r[:4, 1]).sum()), rel=1e-4)


def test_td_lambda_agrees_with_gae() -> None:
    """With values that are consistent in time, the λ-return is the advantage plus the value."""
    rng = np.random.default_rng(4)
    r, values = rng.normal(size=(8, 5)).astype(np.float32), rng.normal(size=(9, 5)).astype(np.float32)
    terminated = rng.random((8, 5)) < 0.2
    _, returns = gae(r, values[:-1], values[1:], terminated, terminated, gamma=0.95, lam=0.7)
    got = td_lambda(r, values[1:], terminated, terminated, gamma=0.95, lam=0.7)
    np.testing.assert_allclose(got, returns, rtol=1e-4, atol=1e-5)
