"""HiMAC's macro phase: the best of a group is learnt, equals teach nothing, and picks are what was asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from echelon.advantages import gigpo, group_relative
from echelon.algorithms.decisions import Decisions
from echelon.algorithms.himac import HiMAC, HiMACConfig
from echelon.errors import EchelonError
from table_policy import TablePolicy

TASKS, STEPS, OPTIONS = 3, 3, 4
ITEMS = TASKS * STEPS * OPTIONS
GOOD = np.array([[2, 0, 3], [1, 1, 0], [3, 2, 1]])  # the right option of each task's step


def blueprints(policy: TablePolicy, rng: np.random.Generator, group: int = 8) -> tuple[
    Decisions, NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]
]:  # fmt: skip
    """`group` sampled blueprints a task, one option a step; a blueprint scores the share of its right options."""
    options = np.arange(ITEMS).reshape(TASKS, STEPS, OPTIONS)
    p = torch.softmax(policy.table.detach().double()[torch.from_numpy(options)], -1).numpy()
    chosen = (rng.random((TASKS, group, STEPS))[..., None] >= p.cumsum(-1)[:, None]).sum(-1).clip(0, OPTIONS - 1)
    logp = np.log(np.take_along_axis(p[:, None].repeat(group, 1), chosen[..., None], -1))
    n = chosen.size
    decisions = Decisions(
        list(range(ITEMS)),
        options[:, None].repeat(group, 1).reshape(n, OPTIONS),
        np.ones((n, OPTIONS), bool),
        chosen.reshape(n),
        logp.reshape(n).astype(np.float32),
    )
    scores = (chosen == GOOD[:, None]).mean(-1).reshape(-1).astype(np.float32)
    return decisions, np.repeat(np.arange(TASKS * group), STEPS), scores, np.repeat(np.arange(TASKS), group)


def train(policy: TablePolicy, learner: HiMAC, seed: int, updates: range) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for update in updates:
        rng = np.random.Generator(np.random.Philox(key=seed, counter=[0, update, 0, 0]))
        metrics = learner.macro(*blueprints(policy, rng))
    return metrics


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("normalize", ["std", "mean"])
def test_the_best_blueprint_is_found(seed: int, normalize: Any) -> None:
    policy = TablePolicy(ITEMS)
    learner = HiMAC(HiMACConfig(normalize=normalize), policy, seed)
    metrics = train(policy, learner, seed, range(120))
    found = policy.table.detach().reshape(TASKS, STEPS, OPTIONS).argmax(-1).numpy()
    assert (found == GOOD).all()
    assert metrics["score"] > 0.9
    assert metrics["score_best"] == 1
    assert metrics["logp_gap"] < 1e-5


def test_groups_of_equal_scores_teach_nothing() -> None:
    policy = TablePolicy(ITEMS, initial=np.linspace(-1, 1, ITEMS, dtype=np.float32))
    learner = HiMAC(HiMACConfig(kl=0.0, entropy=0.0), policy, 0)
    decisions, episode, scores, groups = blueprints(policy, np.random.default_rng(0))
    scores = np.where(groups == 1, scores, groups + np.float32(0.1)).astype(np.float32)
    metrics = learner.macro(decisions, episode, scores, groups)
    grad = policy.last_grad.reshape(TASKS, -1)
    assert not grad[[0, 2]].any()
    assert grad[1].any()
    assert metrics["informative"] == pytest.approx(1 / 3)
    learner.macro(decisions, episode, np.ones_like(scores), groups)
    assert not policy.last_grad.any()


def test_a_blueprints_decisions_all_have_its_advantage() -> None:
    learner = HiMAC(HiMACConfig(), TablePolicy(1), 0)
    scores, groups = np.array([1, 0, 3, 5], np.float32), np.array([7, 7, 2, 2])
    episode = np.array([3, 0, 0, 1, 2])
    expected = group_relative(scores, groups)[episode]
    np.testing.assert_allclose(learner.advantages(episode, scores, groups), expected, rtol=1e-6)
    np.testing.assert_allclose(np.abs(expected), np.sqrt(0.5), rtol=1e-5)  # two apart: ±1 of their unbiased std


def test_decisions_in_the_same_state_are_compared_with_each_other() -> None:
    """The released GiGPO's numbers: see `gigpo`."""
    learner = HiMAC(HiMACConfig(normalize="mean"), TablePolicy(1), 0)
    returns = np.array([0.81, 0.9, 1.0, 0, 0], np.float32)
    found = learner.advantages(
        np.array([0, 0, 0, 1, 1]), np.array([1, 0], np.float32), np.array([0, 0]), returns, list("ABCAB")
    )
    np.testing.assert_allclose(found, [0.805, 0.85, 0.4, -1.005, -1.05], rtol=1e-5)

    policy = TablePolicy(ITEMS)
    learner = HiMAC(HiMACConfig(kl=0.0, entropy=0.0), policy, 0)
    decisions, episode, scores, groups = blueprints(policy, np.random.default_rng(1))
    anchors = np.tile(np.arange(STEPS), len(scores))
    came = np.random.default_rng(2).random(len(episode)).astype(np.float32)
    learner.macro(decisions, episode, scores, groups, step_returns=came, anchors=anchors)
    weights = gigpo(came, scores[episode], groups[episode], anchors, mode="mean_std_norm")
    p = np.exp(decisions.logp)
    assert p == pytest.approx(1 / OPTIONS)
    expected = np.zeros(ITEMS)
    for i, a in enumerate(weights):  # at ratio 1 the gradient of -A log p, softmax of equals
        own = decisions.options[i]
        expected[own] += a / OPTIONS / len(weights)
        expected[own[decisions.chosen[i]]] -= a / len(weights)
    np.testing.assert_allclose(policy.last_grad, expected, atol=1e-6)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-2, 2)), min_size=1, max_size=12))
@settings(max_examples=60)
def test_the_best_of_each_group_is_picked(pairs: list[tuple[int, int]]) -> None:
    groups, scores = np.array([g for g, _ in pairs]), np.array([s for _, s in pairs], np.float32)
    picked = HiMAC(HiMACConfig(), TablePolicy(1), 0).pick(scores, groups)
    assert groups[picked].tolist() == sorted(set(groups.tolist()))
    for episode in picked:
        rivals = np.flatnonzero(groups == groups[episode])
        assert scores[episode] == scores[rivals].max()
        assert episode == rivals[scores[rivals] == scores[episode]][0]


def test_random_blueprints_are_any_of_their_group_and_repeat_from_the_seed() -> None:
    scores, groups = np.arange(12, dtype=np.float32), np.repeat([0, 1, 2], 4)
    one, same, other = (HiMAC(HiMACConfig(blueprint="random"), TablePolicy(1), seed) for seed in (5, 5, 6))
    picks = np.array([one.pick(scores, groups) for _ in range(200)])
    assert (picks // 4 == [0, 1, 2]).all()
    assert np.bincount(picks.reshape(-1), minlength=12).min() > 20
    first = [same.pick(scores, groups) for _ in range(50)]
    assert (np.array(first) == picks[:50]).all()
    assert not (np.array([other.pick(scores, groups) for _ in range(200)]) == picks).all()
    resumed = HiMAC(HiMACConfig(blueprint="random"), TablePolicy(1), 5)
    resumed.load_state_dict(same.state_dict())
    assert (np.array([resumed.pick(scores, groups) for _ in range(150)]) == picks[50:]).all()


def test_an_interrupted_run_learns_bit_for_bit_the_same() -> None:
    config = HiMACConfig(epochs=2, minibatches=3)
    whole, half, rest = TablePolicy(ITEMS), TablePolicy(ITEMS), TablePolicy(ITEMS)
    metrics = train(whole, HiMAC(config, whole, 4), 4, range(6))
    before, after = HiMAC(config, half, 4), HiMAC(config, rest, 4)
    train(half, before, 4, range(3))
    rest.load_state_dict(half.state_dict())
    after.load_state_dict(before.state_dict())
    assert train(rest, after, 4, range(3, 6)) == metrics
    assert torch.equal(whole.table, rest.table)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(EchelonError, match=r"learner.group is 1: it must be at least 2"):
        HiMACConfig(group=1)
    with pytest.raises(EchelonError, match=r"learner.kl is -1"):
        HiMACConfig(kl=-1.0)
    policy = TablePolicy(ITEMS)
    decisions, episode, scores, groups = blueprints(policy, np.random.default_rng(0))
    with pytest.raises(ValueError, match="one entry a decision"):
        HiMAC(HiMACConfig(), policy, 0).macro(decisions, episode[1:], scores, groups)
