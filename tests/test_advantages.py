"""GAE, TD(λ), and advantages within groups: by hand, against their definitions, and what truncation must not do."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from echelon.advantages import gae, gigpo, group_relative, td_lambda
from echelon.advantages_torch import gigpo_torch, group_relative_torch

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


@settings(max_examples=150)
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


@settings(max_examples=60)
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


@settings(max_examples=150)
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


# -- within groups: GRPO, HiMAC, GiGPO ----------------------------------------------------------


def test_group_relative_by_hand() -> None:
    # Groups a: 1, 3 (mean 2, unbiased std √2); b: 5, 5, 5; c alone.
    scores, groups = [1, 5, 3, 5, 5, 7], ["a", "b", "a", "b", "b", "c"]
    assert group_relative(scores, groups, normalize="mean").tolist() == [-1, 0, 1, 0, 0, 7]
    got = group_relative(scores, groups)
    wanted = [-1 / (2**0.5 + 1e-6), 0, 1 / (2**0.5 + 1e-6), 0, 0, 7 / (1 + 1e-6)]
    np.testing.assert_allclose(got, wanted, rtol=1e-12)
    assert got.dtype == np.float64
    assert group_relative([1, 3], [0, 0], eps=1.0)[1] == pytest.approx(1 / (2**0.5 + 1))


Rows = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]


@st.composite
def step_rows(draw: st.DrawFn) -> Rows:
    """Returns, scores, groups and anchors of some step rows; the same anchor occurs in several groups."""
    n = draw(st.integers(1, 14))
    numbers = hnp.arrays(np.float64, n, elements=st.floats(-8, 8, width=16))
    labels = hnp.arrays(np.int64, n, elements=st.integers(-1, 2))
    return draw(numbers), draw(numbers), draw(labels), draw(labels)


@settings(max_examples=120)
@given(step_rows(), st.sampled_from(["std", "mean"]), st.randoms(use_true_random=False))
def test_group_relative_is_each_groups_own(rows: Rows, normalize: str, order: random.Random) -> None:
    _, scores, groups, _ = rows
    got = group_relative(scores, groups, normalize=normalize)  # type: ignore[arg-type]
    for group in np.unique(groups):
        x, y = scores[groups == group], got[groups == group]
        if len(x) == 1:
            assert y[0] == pytest.approx(x[0], rel=1e-5)
            continue
        assert y.mean() == pytest.approx(0, abs=1e-6)
        scale = torch.std(torch.tensor(x)).item() + 1e-6 if normalize == "std" else 1
        np.testing.assert_allclose(y, (x - x.mean()) / scale, rtol=1e-6, atol=1e-9)
    # Neither the rows' order nor the labels' names matter.
    mixed = list(range(len(scores)))
    order.shuffle(mixed)
    named = [("task", int(g)) for g in groups[mixed]]
    moved = group_relative(scores[mixed], named, normalize=normalize)  # type: ignore[arg-type]
    np.testing.assert_allclose(moved, got[mixed], rtol=1e-6, atol=1e-7)


def test_gigpo_golden() -> None:
    """What the released implementation returns for trajectories ABC (score 1) and AB (score 0) of one task."""
    args = [0.81, 0.9, 1.0, 0, 0], [1, 1, 1, 0, 0], [4, 4, 4, 4, 4]
    wanted = [0.805, 0.85, 0.4, -1.005, -1.05]
    assert gigpo(*args, list("ABCAB")) == pytest.approx(wanted, abs=1e-9)
    observations = np.array([[1, 0], [0, 1], [1, 1], [1, 0], [0, 1]], np.float32)
    assert gigpo(*args, observations) == pytest.approx(wanted, abs=1e-9)
    assert gigpo(*args, list("ABCAB"), step_weight=0) == pytest.approx([0.4, 0.4, 0.4, -0.6, -0.6])


@settings(max_examples=120)
@given(step_rows(), st.sampled_from(["mean_norm", "mean_std_norm"]), st.floats(0, 2))
def test_gigpo_is_two_comparisons(rows: Rows, mode: str, weight: float) -> None:
    returns, scores, groups, anchors = rows
    got = gigpo(*rows, mode=mode, step_weight=weight)  # type: ignore[arg-type]
    for i in range(len(returns)):
        group = groups == groups[i]
        same = group & (anchors == anchors[i])  # an equal state of another task is no anchor
        episode, step = scores[i], 0.0
        if group.sum() > 1:
            episode -= scores[group].mean()
            episode /= scores[group].std(ddof=1) + 1e-6 if mode == "mean_std_norm" else 1
        elif mode == "mean_std_norm":
            episode /= 1 + 1e-6
        if same.sum() > 1:
            step = returns[i] - returns[same].mean()
            step /= returns[same].std(ddof=1) + 1e-6 if mode == "mean_std_norm" else 1
        assert got[i] == pytest.approx(episode + weight * step, rel=1e-6, abs=1e-7)


@settings(max_examples=80)
@given(step_rows(), st.booleans())
def test_groups_on_tensors(rows: Rows, by_std: bool) -> None:
    normalize, mode = ("std", "mean_std_norm") if by_std else ("mean", "mean_norm")
    tensors = [torch.tensor(x) for x in rows]
    for x in tensors[:2]:
        x.requires_grad_()
    one = group_relative_torch(tensors[1], tensors[2], normalize=normalize)  # type: ignore[arg-type]
    two = gigpo_torch(*tensors, mode=mode, step_weight=0.5)  # type: ignore[arg-type]
    assert not (one.requires_grad or two.requires_grad)
    np.testing.assert_allclose(one, group_relative(*rows[1:3], normalize=normalize), rtol=1e-6, atol=1e-7)  # type: ignore[arg-type]
    np.testing.assert_allclose(two, gigpo(*rows, mode=mode, step_weight=0.5), rtol=1e-6, atol=1e-7)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_group_that_agrees_has_nothing_to_learn_from(dtype: torch.dtype) -> None:
    """Also in float32, where the mean of seven equal scores is not that score."""
    got = group_relative_torch(torch.full((7,), 12345.1, dtype=dtype), torch.zeros(7, dtype=torch.long))
    assert got.tolist() == [0] * 7
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    np.testing.assert_allclose(group_relative(np.full(7, 12345.1), np.zeros(7)), 0, atol=1e-4)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="'std', 'mean'"):
        group_relative([1.0], [0], normalize="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 groups"):
        group_relative([1.0], [0, 1])
    with pytest.raises(ValueError, match="mean_std_norm"):
        gigpo([1.0], [1.0], [0], [0], mode="std")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="episode_scores"):
        gigpo([1.0], [1.0, 2.0], [0], [0])
    with pytest.raises(ValueError, match="2 anchors"):
        gigpo([1.0], [1.0], [0], [0, 1])
    one, label = torch.ones(1), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="'std', 'mean'"):
        group_relative_torch(one, label, normalize="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="groups"):
        group_relative_torch(one, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="mean_std_norm"):
        gigpo_torch(one, one, label, label, mode="std")  # type: ignore[arg-type]
