"""Algorithms for teams of language models: losses and gradients by hand, critics, resumption, and a game learnt."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from echelon.algorithms import MAAC, IACConfig, MAACConfig, MAGRPOConfig, MAVDNConfig, TeamNode, team_algorithms
from echelon.algorithms.iac import IAC
from echelon.algorithms.magrpo import MAGRPO
from echelon.algorithms.mareinforce import MAREINFORCE, MAREINFORCEConfig
from echelon.algorithms.maremax import MAReMaxConfig
from echelon.algorithms.marloo import MARLOOConfig
from echelon.algorithms.team_critics import Critic, CriticConfig, unit
from echelon.algorithms.team_mixing import MAMixing, MAQMIXConfig
from echelon.algorithms.teams import GroupConfig, GroupLearner, TeamBatch, TeamConfig, TeamLearner, team_loss
from echelon.errors import EchelonError
from team_game import CopyGame, TablePolicy

PLAIN = GroupConfig(mode="mean")
RAW = GroupConfig(mode="raw")


def table(*rows: list[list[float]], lr: float = 0.1) -> TablePolicy:
    """A policy with these probabilities, by prompt, place and token."""
    made = TablePolicy(len(rows), len(rows[0]), len(rows[0][0]), lr=lr)
    made.table.data = torch.tensor(rows).log()
    made.start = made.table.detach().clone()
    return made


def coin(rows: int = 1, **options: float) -> TablePolicy:
    """One token, of two equally probable ones."""
    return table(*[[[0.5, 0.5]]] * rows, **options)


def node(replies: list[Any], rewards: Any, children: Any = (), turn: int = 0) -> TeamNode:
    return TeamNode(replies, np.array(rewards, np.float64), list(children), turn)


def golden(agents: int = 1) -> TeamNode:
    """The golden tree: the root's prompt is 0, its children's 1 and 2; reply g is token g."""
    samples = [[[(row, (0,)), (row, (1,))] for _ in range(agents)] for row in range(3)]
    below = [node(samples[1], [2, 4], turn=1), node(samples[2], [0, 1], turn=1)]
    return node(samples[0], [1, 3], below)


# -- the loss by hand --------------------------------------------------------------------------------


def test_loss_and_gradient_of_two_tokens_by_hand() -> None:
    """Replies ab and ba with returns 3 and 1: advantages 1 and -1.

    Loss: -(log .75 + log .5 - log .25 - log .5) / 2 = -log(3) / 2. With logits l, d(log p_k) = e_k - p, so at each
    place the gradient is -(e_one - e_other) / 2.
    """
    policy = table([[0.75, 0.25], [0.5, 0.5]])
    replies = [(0, (0, 1)), (0, (1, 0))]
    stats = GroupLearner(PLAIN, [policy], 0).update([node([replies], [3, 1])])
    assert stats["loss_0"] == stats["policy_loss_0"] == pytest.approx(-math.log(3) / 2, rel=1e-6)
    np.testing.assert_allclose(policy.last_grad, [[[-0.5, 0.5], [0.5, -0.5]]], atol=1e-6)
    entropy = (-0.75 * math.log(0.75) - 0.25 * math.log(0.25) + math.log(2)) / 2
    assert stats["entropy_0"] == pytest.approx(entropy, rel=1e-6)
    assert stats["return"] == 2 and stats["advantage_std_0"] == 1
    assert stats["grad_norm_0"] == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize(("mode", "weights"), [("mean", (1, -1)), ("raw", (3, 1)), ("max", (0, -2)), ("rloo", (2, -2))])
def test_each_mode_weighs_the_same_tokens_its_own_way(mode: Any, weights: tuple[float, float]) -> None:
    policy = coin()
    GroupLearner(GroupConfig(mode=mode), [policy], 0).update([node([[(0, (0,)), (0, (1,))]], [3, 1])])
    # -(w0 (e0 - p) + w1 (e1 - p)) / 2 with p = (1/2, 1/2)
    push = -(weights[0] - weights[1]) / 4
    np.testing.assert_allclose(policy.last_grad[0, 0], [push, -push], atol=1e-6)


@pytest.mark.parametrize(("discount", "first"), [(1.0, 0.25), (0.5, -0.375), (0.0, -1.0)])
def test_a_turn_is_credited_with_what_followed_discounted(discount: float, first: float) -> None:
    """Golden returns of the root: [4, 3.5], [2.5, 3.25] and [1, 3]; its advantages ±first, of 6 samples in all."""
    policy = coin(3)
    GroupLearner(GroupConfig(discount=discount), [policy], 0).update([golden()])
    np.testing.assert_allclose(policy.last_grad[0, 0], [-first / 6, first / 6], atol=1e-7)
    np.testing.assert_allclose(policy.last_grad[1:, 0, 0], [1 / 6, 0.5 / 6], atol=1e-7)


def test_cross_scores_are_summed_over_what_the_others_wrote() -> None:
    """Returns [[1, 2], [3, 5]]: agent 0's replies are worth 3 and 8, agent 1's 4 and 7."""
    policies = [coin(), coin()]
    replies = [(0, (0,)), (0, (1,))]
    root = node([replies, replies], [[1, 2], [3, 5]])
    GroupLearner(GroupConfig(mode="raw", joint="cross"), policies, 0).update([root])
    for policy, (a, b) in zip(policies, ((3, 8), (4, 7)), strict=True):
        np.testing.assert_allclose(policy.last_grad[0, 0], [(b - a) / 4, (a - b) / 4], atol=1e-6)


def test_shared_weights_get_the_sum_of_their_agents_gradients_in_one_step() -> None:
    replies = [[(0, (0,)), (0, (1,))], [(1, (1,)), (1, (1,))], [(0, (1,)), (1, (0,))]]
    root = node(replies, [3, 1])
    apart = [coin(2) for _ in replies]
    GroupLearner(RAW, apart, 0).update([root])
    one, other = coin(2), coin(2)
    stats = GroupLearner(RAW, [one, other, one], 0).update([root])
    np.testing.assert_allclose(one.last_grad, apart[0].last_grad + apart[2].last_grad, atol=1e-6)
    np.testing.assert_allclose(other.last_grad, apart[1].last_grad, atol=1e-6)
    assert one.steps == other.steps == 1
    assert stats["grad_norm_0"] == stats["grad_norm_2"] == pytest.approx(float(one.last_grad.norm()))
    assert {"loss_0", "loss_1", "loss_2"} <= stats.keys()


def test_clip_begins_as_reinforce_and_stops_where_the_ratio_has_left() -> None:
    plain, clipped = coin(lr=0.5), coin(lr=0.5)
    root = node([[(0, (0,)), (0, (1,))]], [3, 1])
    GroupLearner(PLAIN, [plain], 0).update([root])
    stats = GroupLearner(GroupConfig(loss="clip", epochs=3), [clipped], 0).update([root])
    # Adam's first step is lr: the logits are ±0.5 apart from 0, the ratios 1.46 and 0.54. Then nothing moves.
    assert torch.equal(plain.last_grad, clipped.last_grad) and torch.equal(plain.table, clipped.table)
    assert clipped.steps == 1 and stats["clipped_0"] == pytest.approx(2 / 3)
    free = coin(lr=0.05)
    GroupLearner(GroupConfig(loss="clip", epochs=3), [free], 0).update([root])
    assert free.steps == 3


def test_clipped_loss_by_hand() -> None:
    """Ratios 1.5, 1.5, 1.1: bounded to 1.2 where that is a gain, never where it is a loss."""
    logp, old = (torch.tensor(x).log() for x in ([0.6, 0.6, 0.55], [0.4, 0.4, 0.5]))
    loss, stats = team_loss(logp, torch.zeros(3), [1, 2], np.array([1.0, -1.0]), TeamConfig(loss="clip"), old=old)
    assert float(loss) == pytest.approx((-1.2 + (1.5 + 1.1)) / 2, rel=1e-6)
    assert stats["clipped"] == pytest.approx(1 / 3)


def test_divergence_and_entropy_by_hand() -> None:
    """k3 with r = 1/2: -1/2 + log 2; both count a token, are summed in a sample and averaged over samples."""
    logp, reference = torch.tensor([0.5, 0.5, 0.5]).log(), torch.tensor([0.25, 0.25, 0.5]).log()
    k3 = math.log(2) - 0.5
    args = logp, torch.tensor([1.0, 2, 3]), [2, 1], np.zeros(2)
    loss, stats = team_loss(*args, TeamConfig(kl=0.1), reference=reference)
    assert float(loss) == pytest.approx(0.1 * 2 * k3 / 2, rel=1e-5) and stats["policy_loss"] == 0
    assert stats["kl"] == pytest.approx(2 * k3 / 3, rel=1e-5) and stats["entropy"] == 2
    loss, _ = team_loss(*args, TeamConfig(entropy=0.1))
    assert float(loss) == pytest.approx(-0.1 * (3 + 3) / 2, rel=1e-6)


def test_length_norm_takes_a_mean_over_tokens_and_empty_replies_count() -> None:
    logp = torch.tensor([-1.0, -3.0, -5.0])
    args = logp, torch.zeros(3), [2, 0, 1], np.array([1.0, 7.0, 2.0])
    assert float(team_loss(*args, TeamConfig())[0]) == pytest.approx((4 + 0 + 10) / 3)
    assert float(team_loss(*args, TeamConfig(length_norm=True))[0]) == pytest.approx((2 + 0 + 10) / 3)
    policy = coin()
    stats = GroupLearner(PLAIN, [policy], 0).update([node([[(0, ()), (0, ())]], [3, 1])])
    assert stats["loss_0"] == 0 and policy.steps == 0
    GroupLearner(PLAIN, [policy], 0).update([node([[(0, ()), (0, (1,))]], [3, 1])])
    np.testing.assert_allclose(policy.last_grad[0, 0], [-0.25, 0.25])


@pytest.mark.parametrize("joint", ["aligned", "cross"])
def test_divergence_may_be_taken_from_returns_instead(joint: Any) -> None:
    """A coin that has become (.75, .25), without reward: each reply's score is -kl * k3, times the joint actions that
    it is in (2 in cross)."""
    policies = [coin(), coin()]
    policies[0].table.data = torch.tensor([[[0.75, 0.25]]]).log()
    replies = [(0, (0,)), (0, (1,))]
    root = node([replies, replies], np.zeros((2, 2) if joint == "cross" else 2))
    config = GroupConfig(mode="raw", kl=0.1, kl_in="return", joint=joint)
    stats = GroupLearner(config, policies, 0).update([root])
    k3 = [r - 1 - math.log(r) for r in (0.5 / 0.75, 0.5 / 0.25)]
    a, b = (-0.1 * x * (2 if joint == "cross" else 1) for x in k3)
    # -(a (e0 - p) + b (e1 - p)) / 2
    wanted = -(a * np.array([0.25, -0.25]) + b * np.array([-0.75, 0.75])) / 2
    np.testing.assert_allclose(policies[0].last_grad[0, 0], wanted, rtol=1e-5)
    assert policies[1].steps == 0 and stats["kl_return_1"] == 0
    assert stats["kl_return_0"] == pytest.approx(sum(k3) / 2, rel=1e-5)


def test_divergence_in_the_loss_draws_back_to_the_start() -> None:
    policy = coin(lr=0.02)
    policy.table.data = torch.tensor([[[0.9, 0.1]]]).log()
    learner = GroupLearner(GroupConfig(kl=1.0), [policy], 0)
    for _ in range(200):
        learner.update([node([[(0, (0,)), (0, (1,))]], [1, 1])])
    assert float(policy.table.detach().softmax(-1)[0, 0, 0]) == pytest.approx(0.5, abs=0.02)


def test_each_agents_advantages_are_brought_to_one_scale() -> None:
    """Dr. MAS: the same as normalised advantages to begin with; of the whole batch, not of a node."""
    roots = [node([[(0, (0,)), (0, (1,))], [(0, (1,)), (0, (1,))]], rewards) for rewards in ([3, 1], [100, 40], [0, 0])]
    advantages = [np.array([[1.0, -1], [30, -30], [0, 0]]), np.array([[5.0, 5], [5, 5], [5, 5]])]
    normed, plain = [coin(), coin()], [coin(), coin()]
    learner = TeamLearner(TeamConfig(per_agent_norm=True), normed, 0)
    stats = learner.improve(learner.flatten(roots), advantages)
    learner = TeamLearner(TeamConfig(), plain, 0)
    std = math.sqrt((2 + 2 * 900) / 6)
    learner.improve(learner.flatten(roots), [advantages[0] / std, np.zeros((3, 2))])
    np.testing.assert_allclose(normed[0].last_grad, plain[0].last_grad, rtol=1e-6)
    assert normed[1].steps == 0  # all equal: nothing to tell apart
    assert stats["advantage_std_0"] == pytest.approx(std) and stats["advantage_std_1"] == 0


def test_a_team_of_one_is_grpo() -> None:
    """MAGRPO's own settings: minus the mean, over the standard deviation of the group."""
    policy = coin()
    replies = [(0, (0,)), (0, (0,)), (0, (1,)), (0, (1,))]
    MAGRPO(MAGRPOConfig(), [policy], 0).update([node([replies], [1, 2, 2, 5])])
    weights = np.array([-1, -1 / 3, -1 / 3, 5 / 3])
    wanted = -sum(w * (np.eye(2)[t] - 0.5) for w, (_, (t,)) in zip(weights, replies, strict=True)) / 4
    np.testing.assert_allclose(policy.last_grad[0, 0], wanted, atol=1e-6)


# -- trees as arrays -----------------------------------------------------------------------------------


def test_targets_look_one_turn_ahead() -> None:
    batch = TeamBatch([golden(), golden()], 1, "aligned", 0.5)
    assert batch.roots.tolist() == [0, 3] and len(batch) == 6
    assert batch.rewards.tolist() == [[1, 3], [2, 4], [0, 1]] * 2
    assert batch.returns.tolist() == [[2.5, 3.25], [2, 4], [0, 1]] * 2
    values = np.array([10.0, 20, 30, 40, 50, 60])
    wanted = [[11, 18], [2, 4], [0, 1], [26, 33], [2, 4], [0, 1]]
    assert batch.targets(values, 0.5).tolist() == wanted
    assert batch.items[0][:3] == [(0, (0,)), (0, (1,)), (1, (0,))]


def test_joint_actions_are_told_apart_by_what_each_agent_wrote() -> None:
    replies = [(0, (0,)), (0, (1,))]
    cross = TeamBatch([node([replies, replies], [[1, 2], [3, 5]])], 2, "cross", 1.0)
    assert cross.replies.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert cross.own(cross.returns, 0).tolist() == [[1.5, 4]] and cross.own(cross.returns, 1).tolist() == [[2, 3.5]]
    rows = np.array([[1.0], [2]], np.float32)
    assert cross.by_action(rows, 0)[:, 0].tolist() == [1, 1, 2, 2]
    assert cross.by_action(rows, 1)[:, 0].tolist() == [1, 2, 1, 2]
    aligned = TeamBatch([node([replies, replies], [1, 5])], 2, "aligned", 1.0)
    assert aligned.own(aligned.returns, 1).tolist() == [[1, 5]]
    assert aligned.by_action(rows, 1)[:, 0].tolist() == [1, 2]


def test_trees_of_the_wrong_shape_are_named() -> None:
    two, three = [(0, (0,))] * 2, [(0, (0,))] * 3
    for roots, line in (
        ([], "no rollout tree"),
        ([node([two, three], [1, 2])], r"must have 2 samples of each of 2 agents, got \[2, 3\]"),
        ([node([two], [1, 2])], r"of each of 2 agents, got \[2\]"),
        ([node([two, two], [1, 2, 3])], r"rewards must be \(2,\), got \(3,\)"),
        ([node([two, two], [1, 2]), node([three, three], [1, 2, 3])], "must have 2 samples"),
        ([node([two, two], [1, math.nan])], "aren't finite"),
        ([node([two, two], [1, 2], [None])], "1 children for 2 joint actions"),
    ):
        with pytest.raises(ValueError, match=line):
            GroupLearner(PLAIN, [coin(), coin()], 0).update(roots)


# -- what goes wrong -----------------------------------------------------------------------------------


class Astray(TablePolicy):
    """A policy that has lost its numbers."""

    def evaluate(self, items: Any) -> list[NDArray[np.float32]]:
        return [np.full_like(x, np.nan) for x in super().evaluate(items)]


def test_a_loss_that_is_not_finite_names_its_agent() -> None:
    replies = [(0, (0,)), (0, (1,))]
    learner = GroupLearner(PLAIN, [coin(), Astray(1, 1, 2)], 0)
    with pytest.raises(EchelonError, match="the loss of agent 1 isn't finite"):
        learner.update([node([replies, replies], [3, 1])])


@pytest.mark.parametrize("config", [MAREINFORCEConfig, MARLOOConfig, MAReMaxConfig])
def test_modes_that_normalisation_makes_meaningless_are_warned_of(config: Any) -> None:
    with pytest.warns(UserWarning, match="are the same"):
        learner = GroupLearner(config(normalize=True), [coin()], 0)
    policies = [learner.policies[0], coin()]
    root = node([[(0, (0,)), (0, (1,))]], [3, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.update([root])
        MAGRPO(MAGRPOConfig(), policies[1:], 0).update([root])
    assert torch.equal(policies[0].last_grad, policies[1].last_grad)  # type: ignore[attr-defined]


def test_one_reply_has_nothing_to_be_compared_with() -> None:
    root = node([[(0, (0,))]], [3])
    for mode in ("mean", "max", "rloo"):
        with pytest.raises(EchelonError, match=f"mode {mode} compares an agent's replies"):
            GroupLearner(GroupConfig(mode=mode), [coin()], 0).update([root])
    policy = coin()
    GroupLearner(RAW, [policy], 0).update([root])
    np.testing.assert_allclose(policy.last_grad[0, 0], [-1.5, 1.5])


@pytest.mark.parametrize(
    ("config", "change", "line"),
    [
        (TeamConfig, {"discount": 1.1}, "algorithm.discount is 1.1: it must be 0 to 1"),
        (TeamConfig, {"joint": "crossed"}, "algorithm.joint is crossed: it must be aligned or cross"),
        (TeamConfig, {"loss": "ppo"}, "algorithm.loss is ppo: it must be reinforce or clip"),
        (TeamConfig, {"clip": 1.0}, "algorithm.clip is 1.0: it must be above 0 and below 1"),
        (TeamConfig, {"epochs": 2}, "algorithm.epochs is 2: it must be 1, or loss be clip"),
        (TeamConfig, {"epochs": 0}, "algorithm.epochs is 0: it must be at least 1"),
        (TeamConfig, {"kl": -1.0}, "algorithm.kl is -1.0: it must be at least 0"),
        (TeamConfig, {"entropy": -1.0}, "algorithm.entropy is -1.0: it must be at least 0"),
        (GroupConfig, {"mode": "best"}, "algorithm.mode is best: it must be mean, raw, max or rloo"),
        (GroupConfig, {"kl_in": "reward"}, "algorithm.kl_in is reward: it must be loss or return"),
        (IACConfig, {"critic": "a"}, "algorithm.critic is a: it must be v or q"),
        (IACConfig, {"hidden": 0}, "algorithm.hidden is 0: it must be at least 1"),
        (IACConfig, {"critic_lr": 0.0}, "algorithm.critic_lr is 0.0: it must be above 0"),
        (IACConfig, {"critic_epochs": 0}, "algorithm.critic_epochs is 0: it must be at least 1"),
        (IACConfig, {"value_coef": 0.0}, "algorithm.value_coef is 0.0: it must be above 0"),
        (IACConfig, {"max_grad_norm": 0.0}, "algorithm.max_grad_norm is 0.0: it must be above 0"),
        (MAVDNConfig, {"mixer": "sum"}, "algorithm.mixer is sum: it must be vdn or qmix"),
        (MAVDNConfig, {"embed": 0}, "algorithm.embed is 0: it must be at least 1"),
    ],
)
def test_wrong_settings_get_one_line(config: Any, change: dict[str, Any], line: str) -> None:
    with pytest.raises(EchelonError) as caught:
        config(**change)
    assert str(caught.value) == line


def test_teams_that_cannot_be_are_refused() -> None:
    with pytest.raises(EchelonError, match="at least one agent"):
        MAGRPO(MAGRPOConfig(), [], 0)
    blind: Any = object()
    with pytest.raises(EchelonError, match="the model of agent 1 shows no features"):
        IAC(IACConfig(), [coin(), blind], 0)


# -- critics ---------------------------------------------------------------------------------------------


def spied(algorithm: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[NDArray[np.float64]]]:
    """The advantages that an algorithm learns from, by update and agent; its policies stay as they are."""
    told: list[list[NDArray[np.float64]]] = []

    def improve(batch: TeamBatch, advantages: list[NDArray[np.float64]], **_: Any) -> dict[str, float]:
        told.append(list(advantages))
        return {}

    monkeypatch.setattr(algorithm, "improve", improve)
    return told


@pytest.mark.parametrize("kind", ["iac", "maac"])
def test_v_advantages_are_one_step_targets_minus_values(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the golden tree with γ = 1/2 and values 10, 20, 30: targets [11, 18], [2, 4], [0, 1]."""
    cls, config = team_algorithms()[kind]
    algorithm: Any = cls(config(discount=0.5), [coin(3), coin(3)], 0)
    told = spied(algorithm, monkeypatch)
    fitted: list[list[float]] = []
    monkeypatch.setattr(Critic, "values", lambda self, x: np.array([10.0, 20, 30]))
    monkeypatch.setattr(Critic, "fit", lambda self, x, targets: fitted.append(targets.tolist()) or 0.0)
    algorithm.update([golden(2)])
    for own in told[0]:
        assert own.tolist() == [[1, 8], [-18, -16], [-30, -29]]
    assert fitted == [[14.5, 3, 0.5]] * (2 if kind == "iac" else 1)


def test_q_advantages_compare_replies_by_what_they_are_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross: an own critic's targets are means over the other's replies; the central one knows all four."""
    replies = [(0, (0,)), (0, (1,))]
    root = node([replies, replies], [[1, 2], [3, 5]])
    for cls, config, wanted in (
        (IAC, IACConfig, [[1.5, 4], [2, 3.5]]),
        (MAAC, MAACConfig, [[1, 2, 3, 5]]),
    ):
        algorithm: Any = cls(config(critic="q", joint="cross"), [coin(), coin()], 0)
        told = spied(algorithm, monkeypatch)
        known: dict[int, Any] = {}

        def fit(self: Critic, x: Any, targets: Any, known: dict[int, Any] = known) -> float:
            known[id(self)] = targets
            return 0.0

        def values(self: Critic, x: Any, known: dict[int, Any] = known) -> Any:
            return known.get(id(self), np.zeros(len(x)))

        monkeypatch.setattr(Critic, "fit", fit)
        monkeypatch.setattr(Critic, "values", values)
        algorithm.update([root])
        assert [x.tolist() for x in known.values()] == wanted
        assert [own.tolist() for own in told[0]] == [[[-1.25, 1.25]], [[-0.75, 0.75]]]


def test_a_critic_learns_values_in_units_of_returns() -> None:
    x = np.eye(4, dtype=np.float32)
    targets = np.array([-100.0, 50, 300, 1000])
    critic = Critic(4, CriticConfig(hidden=16, critic_lr=1e-2, critic_epochs=300), 3)
    assert abs(critic.values(x)).max() < 1
    critic.fit(x, targets)
    np.testing.assert_allclose(critic.values(x), targets, atol=10)


@pytest.mark.parametrize("config", [MAVDNConfig, MAQMIXConfig])
def test_value_factors_credit_each_agent_for_its_own_part(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six agents draw tokens that are worth 1 or 0 to the team, which only learns the sum: the joint return says
    little of an agent's own token (its share of the variance is 1/6), the factors tell it."""
    N, G = 6, 8
    algorithm = MAMixing(config(hidden=32), [coin() for _ in range(N)], 0)
    told = spied(algorithm, monkeypatch)
    rng = np.random.default_rng(0)
    tokens = np.zeros((N, G), int)
    for _ in range(40):
        tokens = rng.integers(0, 2, (N, G))
        algorithm.update([node([[(0, (int(t),)) for t in own] for own in tokens], tokens.sum(0))])
    returns = tokens.sum(0) - tokens.sum(0).mean()
    for own, written in zip(told[-1], tokens, strict=True):
        assert np.corrcoef(own[0], written)[0, 1] > 0.99
        np.testing.assert_allclose(own[0], written - written.mean(), atol=0.25)
    shares = [np.corrcoef(returns, written)[0, 1] for written in tokens]
    assert min(shares) < 0.5


def test_the_mixed_value_of_prompts_is_a_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    """VDAC: what the joint return is above what was expected of these prompts."""
    algorithm = MAMixing(MAVDNConfig(critic="v", critic_lr=1e-2), [coin(2), coin(2)], 0)
    told = spied(algorithm, monkeypatch)
    roots = [node([[(x, (0,)), (x, (1,))]] * 2, [10 * x, 10 * x + 2]) for x in (0, 1)]
    for _ in range(40):
        stats = algorithm.update(roots)
    for own in told[-1]:
        np.testing.assert_allclose(own, [[-1, 1], [-1, 1]], atol=0.2)
    assert stats["explained_variance"] > 0.99


def test_features_are_brought_to_unit_size_and_nothing_stays_nothing() -> None:
    x = np.array([[3.0, 4], [0, 0], [3e4, 4e4]], np.float32)
    found = unit(x)
    np.testing.assert_allclose(np.square(found).mean(1), [1, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(found[0], found[2])
    assert found.dtype == np.float32


# -- learning ------------------------------------------------------------------------------------------------

# Those without a baseline that is 0 on average move the model whatever it writes: they need smaller steps.
SLOW = {"lr": 0.05, "updates": 110}
FAST = {"lr": 0.1, "updates": 50}


def play(
    name: str, seed: int, game: CopyGame, *, lr: float, updates: int, shared: bool = False, **settings: Any
) -> bool:
    """Whether a team learns a game in so many updates: its most probable replies are the best ones everywhere, and
    what it draws isn't far from it."""
    cls, config = team_algorithms()[name]
    policies = game.policies(seed, lr=lr, shared=shared)
    if issubclass(config, CriticConfig):
        settings = {"hidden": 32, **settings}
    algorithm = cls(config(**settings), policies, seed)
    for update in range(updates):
        roots = game.grow(policies, 4, settings.get("joint", "aligned"), update, seed)
        if np.mean([root.rewards.mean() for root in roots]) > 1.5 and game.best(policies) == 2:
            return True
        algorithm.update(roots)
    return False


def test_all_algorithms_are_known_by_name() -> None:
    assert list(team_algorithms()) == [
        "magrpo", "mareinforce", "marloo", "maremax", "iac", "maac", "ma-vdn", "ma-qmix"
    ]  # fmt: skip
    for cls, config in team_algorithms().values():
        assert isinstance(cls(config(), [coin()], 0), TeamLearner)


@pytest.mark.parametrize("name", team_algorithms())
def test_a_team_learns_to_copy_and_complement(name: str) -> None:
    """To the optimum, which a fresh team's replies get by chance once in 81 times; with 5 seeds."""
    pace = SLOW if name in ("mareinforce", "maremax") else FAST
    assert [play(name, seed, CopyGame(), **pace) for seed in range(5)] == [True] * 5


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("magrpo", {"joint": "cross"}),
        ("magrpo", {"loss": "clip", "epochs": 2}),
        ("magrpo", {"per_agent_norm": True, "kl": 0.001, "entropy": 0.001, "length_norm": True}),
        ("magrpo", {"shared": True}),
        ("iac", {"critic": "q", "joint": "cross"}),
        ("maac", {"critic": "q"}),
        ("ma-vdn", {"critic": "v"}),
        ("ma-qmix", {"joint": "cross"}),
    ],
)
def test_so_it_does_with_other_settings(name: str, settings: dict[str, Any]) -> None:
    assert play(name, 1, CopyGame(), **FAST, **settings)


@pytest.mark.parametrize("name", ["magrpo", "iac", "ma-vdn"])
def test_a_game_of_two_turns_is_learnt(name: str) -> None:
    assert play(name, 0, CopyGame(turns=2), lr=0.1, updates=80)


def test_that_game_is_not_learnt_from_advantages_of_the_wrong_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = TeamLearner.improve

    def flipped(self: Any, batch: Any, advantages: Any, **options: Any) -> dict[str, float]:
        return plain(self, batch, [-x for x in advantages], **options)

    monkeypatch.setattr(TeamLearner, "improve", flipped)
    assert not play("magrpo", 0, CopyGame(), **FAST)


# -- state -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", ["v", "q"])
@pytest.mark.parametrize("name", team_algorithms())
def test_a_state_that_is_put_back_goes_on_the_same(name: str, critic: Any) -> None:
    """Bit for bit: what is learnt, and what is logged."""
    cls, kind = team_algorithms()[name]
    options: dict[str, Any] = {"loss": "clip", "epochs": 2, "kl": 0.01}
    if issubclass(kind, CriticConfig):
        options |= {"critic": critic, "hidden": 16}
    game = CopyGame()

    def fresh(seed: int) -> tuple[Any, list[TablePolicy]]:
        policies = game.policies(seed)
        return cls(kind(**options), policies, seed), policies

    def go_on(algorithm: Any, policies: list[TablePolicy], first: int) -> list[dict[str, float]]:
        return [algorithm.update(game.grow(policies, 4, "aligned", u, 0)) for u in range(first, first + 3)]

    whole, own = fresh(0)
    go_on(whole, own, 0)
    state, states = whole.state_dict(), [p.state_dict() for p in own]
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert bool(state) == issubclass(kind, CriticConfig)
    copy, others = fresh(7)
    copy.load_state_dict(state)
    for policy, saved in zip(others, states, strict=True):
        policy.load_state_dict(saved)
    assert go_on(copy, others, 3) == go_on(whole, own, 3)
    assert all(torch.equal(a.table, b.table) for a, b in zip(own, others, strict=True))
    ours, theirs = whole.state_dict(), copy.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not ours or any(not torch.equal(ours[key], state[key]) for key in ours)


@pytest.mark.parametrize("name", ["iac", "maac", "ma-vdn", "ma-qmix"])
def test_states_of_other_shapes_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls, kind = team_algorithms()[name]
    game = CopyGame()
    policies = game.policies(0)
    algorithm = cls(kind(hidden=16), policies, 0)  # type: ignore[call-arg]
    fresh = algorithm.state_dict()
    algorithm.update(game.grow(policies, 2, "aligned", 0, 0))
    with pytest.raises(EchelonError, match=r"don't fit: they had other algorithm\.hidden"):
        cls(kind(hidden=8), policies, 0).load_state_dict(algorithm.state_dict())  # type: ignore[call-arg]
    larger = TablePolicy.features
    monkeypatch.setattr(TablePolicy, "features", lambda *a, **b: np.pad(larger(*a, **b), ((0, 0), (0, 1))))
    with pytest.raises(EchelonError, match="saw features of other models"):
        algorithm.update(game.grow(policies, 2, "aligned", 0, 0))
    algorithm.load_state_dict(fresh)
    assert algorithm.state_dict() == {}


def test_reinforce_uses_the_return_as_it_is() -> None:
    """So all rewards above 0 make all that was written more probable, as REINFORCE does."""
    policy = coin()
    MAREINFORCE(MAREINFORCEConfig(), [policy], 0).update([node([[(0, (0,)), (0, (0,))]], [1, 2])])
    np.testing.assert_allclose(policy.last_grad[0, 0], [-0.75, 0.75])


@pytest.mark.parametrize("name", ["iac", "maac", "ma-vdn", "ma-qmix"])
def test_where_all_went_alike_nothing_is_learnt(name: str) -> None:
    game = CopyGame()
    policies = game.policies(0)
    build, config = team_algorithms()[name]
    learner = build(config(), policies, 0)
    roots = game.grow(policies, 4, "aligned", 0, 0)
    for root in roots:
        root.rewards = np.full_like(root.rewards, 2.5)
    told = learner.update(roots)
    assert (told["grad_norm_0"], told["grad_norm_1"]) == (0.0, 0.0)


@pytest.mark.parametrize("name", ["iac", "maac", "ma-vdn", "ma-qmix"])
def test_a_critic_of_replies_needs_replies_to_compare(name: str) -> None:
    game = CopyGame()
    policies = game.policies(0)
    build, config = team_algorithms()[name]
    roots = game.grow(policies, 1, "aligned", 0, 0)
    with pytest.raises(EchelonError, match="at least 2 to a prompt"):
        build(config(critic="q"), policies, 0).update(roots)
    build(config(critic="v"), policies, 0).update(roots)
