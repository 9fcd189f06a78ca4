"""HiPER's learner and its parts: by hand, against their definitions, and on worlds small enough to know."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from echelon.advantages import hae
from echelon.algorithms.decisions import (
    Decisions,
    LearnerConfig,
    clipped_surrogate,
    exact_kl,
    imitate,
    imitation_loss,
    improve,
    learn,
    log_probabilities,
    low_var_kl,
    masked_mean,
)
from echelon.algorithms.hiper import HiPER, HiPERConfig, Turns
from echelon.algorithms.option_tokens import read_reply, token_advantages, token_mask
from echelon.errors import EchelonError
from table_policy import TablePolicy, TokenTablePolicy

Array = NDArray[np.float32]


def generator(*numbers: int) -> np.random.Generator:
    """Draws that depend on the numbers alone."""
    return np.random.Generator(np.random.Philox(key=numbers[0], counter=[0, *numbers[1:], *[0] * (4 - len(numbers))]))


def choices(items: int, options: Any, chosen: Any, logp: Any = None, opened: Any = None) -> Decisions:
    """Choices among options, all of them open if not given."""
    places = np.array(options, np.int64)
    return Decisions(
        list(range(items)),
        places,
        places >= 0 if opened is None else np.array(opened, bool),
        np.array(chosen, np.int64),
        np.zeros(len(places), np.float32) if logp is None else np.array(logp, np.float32),
    )


def random_decisions(rng: np.random.Generator, n: int = 12, items: int = 6, width: int = 4) -> Decisions:
    """Decisions of both sorts, with closed columns and items that many share."""
    options = rng.integers(0, items, (n, width))
    opened = rng.random((n, width)) < 0.7
    opened[:, 0] = True
    binary = rng.random(n) < 0.4
    options[binary, 1:], opened[binary, :2], opened[binary, 2:] = -1, True, False
    options[~opened & (rng.random((n, width)) < 0.5)] = -1
    chosen = np.array([rng.choice(np.flatnonzero(row)) for row in opened])
    return Decisions(
        list(range(items)), options, opened, chosen, rng.normal(-1, 0.3, n).astype(np.float32), binary
    )  # fmt: skip


# -- decisions ---------------------------------------------------------------------------------


def test_probabilities_by_hand() -> None:
    scores = torch.tensor([0.0, math.log(3), 5.0])
    logp, entropy, full = log_probabilities(scores, choices(3, [[0, 1, 2]], [1], opened=[[True, True, False]]))
    np.testing.assert_allclose(logp.exp(), [0.75], rtol=1e-6)
    np.testing.assert_allclose(full.exp(), [[0.25, 0.75, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(entropy, [-(0.25 * math.log(0.25) + 0.75 * math.log(0.75))], rtol=1e-6)

    both = Decisions.reviews([0, 1], np.array([1, 1]), np.array([False, True]), np.zeros(2, np.float32))
    logp, entropy, _ = log_probabilities(torch.tensor([7.0, math.log(4)]), both)
    np.testing.assert_allclose(logp.exp(), [0.8, 0.2], rtol=1e-6)
    np.testing.assert_allclose(entropy, [-(0.8 * math.log(0.8) + 0.2 * math.log(0.2))] * 2, rtol=1e-6)


@given(st.integers(0, 2**32), st.integers(0, 3))
@settings(max_examples=40)
def test_padding_joining_and_taking_change_no_probability(seed: int, extra: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = random_decisions(rng), random_decisions(rng, n=5, width=2)
    scores = torch.from_numpy(rng.normal(size=6).astype(np.float32))
    logp, entropy, full = log_probabilities(scores, one)
    pad = ((0, 0), (0, extra))
    padded = dataclasses.replace(one, options=np.pad(one.options, pad, constant_values=-1), open=np.pad(one.open, pad))
    again = log_probabilities(scores, padded)
    np.testing.assert_allclose(again[0], logp, atol=1e-6)
    np.testing.assert_allclose(again[1], entropy, atol=1e-6)
    assert (again[2][:, 4:] == -torch.inf).all()
    np.testing.assert_allclose(full.exp().sum(1), 1, atol=1e-6)

    joined = Decisions.join([one, dataclasses.replace(other, items=[3, 4, 5, 6, 7, 8])])
    assert list(joined.items) == list(range(9))
    wide = torch.cat([scores, torch.from_numpy(rng.normal(size=3).astype(np.float32))])
    expected = torch.cat([logp, log_probabilities(wide[3:], other)[0]])
    np.testing.assert_allclose(log_probabilities(wide, joined)[0], expected, atol=1e-6)
    rows = rng.permutation(len(joined))[:7]
    part = joined.take(rows)
    np.testing.assert_allclose(log_probabilities(wide[list(part.items)], part)[0], expected[rows], atol=1e-6)


def test_decisions_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="isn't open"):
        choices(2, [[0, 1]], [1], opened=[[True, False]])
    with pytest.raises(ValueError, match="no item"):
        choices(2, [[0, -1]], [0], opened=[[True, True]])
    with pytest.raises(ValueError, match="places in items"):
        choices(2, [[0, 2]], [0])
    with pytest.raises(ValueError, match="two columns"):
        Decisions([0], np.array([[0, 0]]), np.ones((1, 2), bool), np.zeros(1, int), np.zeros(1, np.float32), np.ones(1, bool))  # fmt: skip  # noqa: E501
    assert len(Decisions.join([])) == 0


# -- the mathematics of the loss ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # enough of a good thing
        (0.5, 2.0, -1.0, -1.0),  # a good decision that became rare is helped
        (0.5, -1.0, 0.8, 0.0),  # a bad one that became rare is left alone
        (1.5, -1.0, 1.5, 1.5),  # a bad one that became frequent is not
        (4.0, -1.0, 3.0, 0.0),  # but dual clip says at most 3 times
    ],
)
def test_the_clipped_loss_by_hand(ratio: float, advantage: float, loss: float, slope: float) -> None:
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    value, clipped = clipped_surrogate(logp, torch.zeros(1), torch.tensor([advantage]), 0.2, 0.2, 3.0)
    assert float(value.detach()) == pytest.approx(loss, rel=1e-5)
    (grad,) = torch.autograd.grad(value.sum(), logp)
    assert float(grad) == pytest.approx(slope, rel=1e-5)  # d ratio / d logp = ratio
    assert bool(clipped) == (slope == 0)


def test_clip_higher_leaves_good_decisions_more_room() -> None:
    arguments = (torch.tensor([math.log(1.25)]), torch.zeros(1), torch.ones(1))
    assert float(clipped_surrogate(*arguments, 0.2, 0.3)[0]) == pytest.approx(-1.25)
    assert float(clipped_surrogate(*arguments, 0.2, 0.2)[0]) == pytest.approx(-1.2)


def test_k3_is_an_unbiased_estimate_of_the_exact_divergence() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.2, 0.0]]), torch.tensor([[0.2, 0.2, 0.6, 0.0]])
    exact = exact_kl(p.log(), q.log())
    np.testing.assert_allclose(exact, [0.5 * math.log(2.5) + 0.3 * math.log(1.5) + 0.2 * math.log(1 / 3)], rtol=1e-5)
    k3 = low_var_kl(p.log()[0, :3], q.log()[0, :3])
    assert (k3 >= 0).all()
    np.testing.assert_allclose((p[0, :3] * k3).sum(), exact[0], rtol=1e-5)
    np.testing.assert_allclose(low_var_kl(p.log(), p.log())[0, :3], 0)
    assert torch.isfinite(low_var_kl(torch.tensor(-100.0), torch.tensor(0.0)))


def test_masked_mean() -> None:
    assert float(masked_mean(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1, 1, 0]))) == 1.5
    assert float(masked_mean(torch.ones(3), torch.zeros(3))) == 0


def test_the_loss_and_its_gradient_match_their_definition() -> None:
    """`improve`'s one step against the same loss written out decision by decision, and with every item repeated."""
    rng = np.random.default_rng(3)
    decisions, advantages = random_decisions(rng), rng.normal(size=12).astype(np.float32)
    initial = rng.normal(size=6).astype(np.float32)
    kinds: tuple[Any, ...] = ("k3", "exact")
    for kind in kinds:
        config = LearnerConfig(kl=0.3, entropy=0.2, kl_kind=kind)
        policy = TablePolicy(6, initial=initial)
        policy.start += torch.from_numpy(rng.normal(size=6).astype(np.float32))
        table = torch.from_numpy(initial.copy()).requires_grad_()
        total = torch.zeros(())
        for i in range(12):
            columns = np.flatnonzero(decisions.open[i])

            def of(numbers: torch.Tensor, i: int = i, columns: Any = columns) -> torch.Tensor:
                if decisions.binary[i]:
                    logits = torch.stack([numbers[decisions.options[i, 0]], torch.zeros(())])
                else:
                    logits = numbers[decisions.options[i, columns]]
                return torch.log_softmax(logits, 0)

            now, reference = of(table), of(policy.start)
            k = int(np.flatnonzero(columns == decisions.chosen[i])[0])
            ratio, a = (now[k] - float(decisions.logp[i])).exp(), float(advantages[i])
            gain = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
            gain = torch.maximum(gain, torch.tensor(3.0 * a)) if a < 0 else gain
            r = (reference[k] - now[k]).exp()
            kl = (now.exp() * (now - reference)).sum() if kind == "exact" else r - 1 - r.log()
            total = total - gain + 0.3 * kl + 0.2 * (now.exp() * now).sum()
        (expected,) = torch.autograd.grad(total / 12, table)
        used = np.unique(decisions.options[decisions.options >= 0]).size
        metrics = improve(policy, decisions, advantages, config, key=1, count=0)
        np.testing.assert_allclose(policy.last_grad, expected, atol=1e-6)
        assert policy.passes == len(decisions.items) >= used
        assert metrics["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-5)
        assert 0 < metrics["clipped"] < 1


def test_an_item_asked_once_for_many_decisions_gets_the_sum_of_their_gradients() -> None:
    targets = np.array([0, 1, 1, 0, 0])
    shared = choices(3, [[0, 1], [0, 1], [1, 2], [2, 0], [0, 1]], targets)
    apart = choices(10, np.arange(10).reshape(5, 2), targets)
    initial = np.array([0.3, -0.2, 0.9], np.float32)
    one, many = TablePolicy(3, initial=initial), TablePolicy(10, initial=initial[shared.options.reshape(-1)])
    for policy, decisions in ((one, shared), (many, apart)):

        def loss(leaf: torch.Tensor, decisions: Decisions = decisions) -> tuple[torch.Tensor, dict[str, float]]:
            full = log_probabilities(leaf[:, 0], decisions)[2]
            return imitation_loss(full, torch.from_numpy(targets)).mean(), {}

        learn(policy, decisions.items, loss)
    summed = np.zeros(3, np.float32)
    np.add.at(summed, shared.options.reshape(-1), many.last_grad.numpy())
    np.testing.assert_allclose(one.last_grad, summed, atol=1e-7)


def test_minibatches_cover_the_batch_and_repeat() -> None:
    rng = np.random.default_rng(5)
    decisions, advantages = random_decisions(rng, n=13), rng.normal(size=13).astype(np.float32)
    found = []
    for count in (0, 0, 1):
        policy = TablePolicy(6)
        improve(policy, decisions, advantages, LearnerConfig(epochs=2, minibatches=3), key=9, count=count)
        assert int(policy.optimizer.state[policy.table]["step"]) == 6
        found.append(policy.table.detach().clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_loss_that_is_not_finite_is_told() -> None:
    policy = TablePolicy(2)
    decisions = choices(2, [[0, 1]], [0], logp=[np.nan])
    with pytest.raises(EchelonError, match="lower learning rate"):
        improve(policy, decisions, np.ones(1, np.float32), LearnerConfig(), key=0, count=0)


@pytest.mark.parametrize(
    "wrong",
    [{"clip": 0.0}, {"dual_clip": 1.0}, {"epochs": 0}, {"gamma": 1.1}, {"estimator": "gea"}, {"critic_lr": 0.0}],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(EchelonError, match=f"learner.{next(iter(wrong))} is"):
        HiPERConfig(**wrong)


# -- imitation ------------------------------------------------------------------------------------


def test_imitation_learns_a_teachers_choices_and_goes_on_where_it_stopped() -> None:
    rng = np.random.default_rng(7)
    worth = rng.normal(size=10)
    options = np.array([rng.choice(10, 4, replace=False) for _ in range(60)])
    targets = worth[options].argmax(1)
    decisions = choices(10, options, targets)
    whole, halves = TablePolicy(10), TablePolicy(10)
    history = imitate(whole, decisions, targets, batch=16, epochs=40, key=11)
    assert len(history) == 160
    assert history[0]["loss"] == pytest.approx(math.log(4))
    assert np.mean([step["accuracy"] for step in history[-4:]]) > 0.97
    first = imitate(halves, decisions, targets, batch=16, epochs=40, key=11, last=70)
    rest = imitate(halves, decisions, targets, batch=16, epochs=40, key=11, first=70)
    assert first + rest == history
    assert torch.equal(whole.table, halves.table)


def test_every_epoch_of_imitation_has_its_own_order() -> None:
    decisions, targets = choices(12, np.arange(12).reshape(6, 2), [0] * 6), np.zeros(6, int)
    policy = TablePolicy(12, lr=0.0, initial=np.linspace(-1, 3, 12, dtype=np.float32) ** 2)
    losses = np.array([step["loss"] for step in imitate(policy, decisions, targets, batch=2, epochs=2, key=4)])
    first, second = losses.reshape(2, 3)
    assert first.mean() == pytest.approx(second.mean(), rel=1e-6)
    assert not np.allclose(first, second)


def test_imitation_of_probabilities_ends_at_them() -> None:
    policy, goal = TablePolicy(3, lr=0.05), np.array([[0.7, 0.3, 0.0]], np.float32)
    decisions = choices(3, [[0, 1, 2]], [0], opened=[[True, True, False]])
    imitate(policy, decisions, goal, batch=1, epochs=400, key=0)
    np.testing.assert_allclose(policy.probabilities([0, 1]), [0.7, 0.3], atol=1e-3)


# -- a corridor with a key and a door -----------------------------------------------------------
#
# Cells 0 to 6; the key lies in 0, the door is 6, the start 3. A subgoal is a direction that an executor follows, one
# cell a turn. A turn costs 0.1, a switch 0.2, the door with the key brings 2. So the right thing is to choose left
# first, keep it, switch at the key, choose right, keep it: 9 turns, one switch.

CELLS, LIMIT, BEST = 7, 20, 2 - 0.9 - 0.2
ROWS = CELLS * 2 * 2


def play(policy: TablePolicy, rng: np.random.Generator, episodes: int = 48, greedy: bool = False) -> tuple[
    Turns, Decisions, float
]:  # fmt: skip
    """Episodes of the corridor, their decisions, and their mean return."""
    cell, key = np.full(episodes, 3), np.zeros(episodes, int)
    option, alive = np.full(episodes, -1), np.ones(episodes, bool)
    table = policy.table.detach().double().numpy()
    rows: list[tuple[Any, ...]] = []
    reviews: list[tuple[Any, ...]] = []
    picks: list[tuple[Any, ...]] = []

    def features(e: Any) -> list[float]:
        return [float(cell[e] == c) for c in range(CELLS)] + [float(key[e])] + [float(option[e] == o) for o in (0, 1)]

    for _ in range(LIMIT):
        draws = rng.random((episodes, 2))
        for e in np.flatnonzero(alive):
            before, place, reviewed, chose = features(e), (cell[e] * 2 + key[e]) * 2, -1, -1
            switch = option[e] < 0
            if not switch:
                item = place + option[e]
                keep = 1 / (1 + np.exp(-table[item]))
                switch = (keep < 0.5) if greedy else draws[e, 0] >= keep
                reviewed = len(reviews)
                reviews.append((item, switch, np.log(1 - keep if switch else keep)))
            if switch:
                items = ROWS + place + np.arange(2)
                p = policy.probabilities(items)
                option[e] = p.argmax() if greedy else int(draws[e, 1] >= p[0])
                chose = len(picks)
                picks.append((items, option[e], np.log(p[option[e]])))
            after = features(e)
            cell[e] = min(max(cell[e] + 2 * option[e] - 1, 0), CELLS - 1)
            key[e] |= cell[e] == 0
            done = bool(key[e] and cell[e] == CELLS - 1)
            alive[e] = not done
            reward = -0.1 + 2 * done - 0.2 * bool(switch and reviewed >= 0)
            rows.append((e, reward, switch, done, before, after, chose, reviewed))
    rows.sort(key=lambda row: row[0])
    columns = list(zip(*rows, strict=True))
    choice, review = np.array(columns[6]), np.array(columns[7])
    turns = Turns(
        np.array(columns[0]),
        np.array(columns[1], np.float32),
        np.array(columns[2], bool),
        np.array(columns[3], bool),
        np.array(columns[4], np.float32),
        np.array(columns[5], np.float32),
        np.array([features(e) for e in range(episodes)], np.float32),
        choice,
        np.where(review >= 0, review + len(picks), -1),
    )
    chosen = Decisions(
        list(range(2 * ROWS)), np.array([x[0] for x in picks]), np.ones((len(picks), 2), bool),
        np.array([x[1] for x in picks]), np.array([x[2] for x in picks], np.float32),
    )  # fmt: skip
    # With a policy that never lives to a second turn there would be no review.
    item, switched, logp = (np.array(x) for x in zip(*reviews, strict=True))
    others = Decisions.reviews(list(range(2 * ROWS)), item, switched.astype(bool), logp.astype(np.float32))
    return turns, Decisions.join([chosen, others]), float(turns.reward.sum() / episodes)


def train(seed: int, updates: int, **changes: Any) -> tuple[TablePolicy, HiPER, dict[str, float]]:
    policy = TablePolicy(2 * ROWS, lr=0.1)
    learner = HiPER(HiPERConfig(**{"hidden": 32, "critic_lr": 3e-3, "epochs": 2, **changes}), policy, CELLS + 3, seed)
    metrics: dict[str, float] = {}
    for update in range(updates):
        turns, decisions, _ = play(policy, generator(seed, update))
        metrics = learner.update(turns, decisions)
    return policy, learner, metrics


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("estimator", ["hae", "gae"])
def test_it_learns_which_subgoal_and_when_to_change_it(seed: int, estimator: str) -> None:
    policy, _, metrics = train(seed, 60, estimator=estimator)
    _, _, reached = play(policy, generator(99), episodes=1, greedy=True)
    assert reached == pytest.approx(BEST)
    _, _, sampled = play(policy, generator(98), episodes=200)
    assert sampled > BEST - 0.15
    assert abs(metrics["logp_gap"]) < 1e-5
    assert metrics["explained_variance_high"] > 0.8
    assert metrics["segment_turns"] > 3.5
    assert metrics["collapsed"] == 0


def test_an_interrupted_run_learns_bit_for_bit_the_same() -> None:
    changes: dict[str, Any] = {"critic_minibatches": 3, "minibatches": 2, "collapse_rate": 1.0}
    whole, learner, metrics = train(4, 6, **changes)
    half, before, _ = train(4, 3, **changes)
    policy = TablePolicy(2 * ROWS, lr=0.1)
    after = HiPER(before.config, policy, CELLS + 3, 77)  # another seed's weights, all overwritten
    after._key = learner._key  # the seed is the run's
    policy.load_state_dict(half.state_dict())
    after.load_state_dict(before.state_dict())
    for update in range(3, 6):
        turns, decisions, _ = play(policy, generator(4, update))
        again = after.update(turns, decisions)
    assert again == metrics
    assert metrics["collapsed"] == 1  # six in a row: counted across the interruption
    assert torch.equal(policy.table, whole.table)
    ends, others = learner.state_dict(), after.state_dict()
    assert ends.keys() == others.keys()
    assert all(torch.equal(ends[name], others[name]) for name in ends)
    with pytest.raises(EchelonError, match="don't fit"):
        HiPER(before.config, policy, CELLS + 4, 0).load_state_dict(ends)


@pytest.mark.parametrize("estimator", ["hae", "gae"])
def test_credit_does_not_depend_on_the_order_of_trajectories(estimator: str) -> None:
    policy, learner, _ = train(1, 2, estimator=estimator)
    turns, _, _ = play(policy, generator(5), episodes=9)
    order = generator(6).permutation(9)
    rows = np.concatenate([np.flatnonzero(turns.trajectory == e) for e in order])
    new_place = np.argsort(order)
    changed = {
        field.name: getattr(turns, field.name)[rows]
        for field in dataclasses.fields(turns)
        if field.name not in ("last", "discount_steps", "consistent")
    }
    changed["trajectory"] = new_place[changed["trajectory"]]
    other = dataclasses.replace(turns, **changed, last=turns.last[order])
    one, two = learner.assess(turns), learner.assess(other)
    for name in ("adv_low", "adv_high", "adv_term"):
        np.testing.assert_allclose(getattr(one, name)[rows], getattr(two, name), atol=1e-5)
        assert getattr(one, name).any()


def test_in_a_warm_up_only_the_critics_learn() -> None:
    policy, learner, metrics = train(0, 2, critic_warmup=2)
    assert not policy.table.any()
    assert learner.updates == 2
    assert metrics["value_loss_high"] > 0
    assert metrics["grad_norm"] == 0
    policy, _, _ = train(0, 3, critic_warmup=2)
    assert policy.table.any()


# -- credit, by hand ------------------------------------------------------------------------------


def seven_turns(**changes: Any) -> Turns:
    """A trajectory of four turns that ended, and one of three that was cut off; features tell turns apart.

    The trajectory between the two has no turn.
    """
    given: dict[str, Any] = {
        "trajectory": np.array([0, 0, 0, 0, 2, 2, 2]),
        "reward": np.array([0, 1, 0.5, 3, 1, 0, 2], np.float32),
        "switch": np.array([1, 0, 1, 0, 0, 0, 1], bool),
        "done": np.array([0, 0, 0, 1, 0, 0, 0], bool),
        "before": np.eye(17, dtype=np.float32)[:7],
        "after": np.eye(17, dtype=np.float32)[7:14],
        "last": np.eye(17, dtype=np.float32)[14:],
        "choice": np.array([0, -1, 1, -1, 2, -1, 3]),
        "review": np.array([-1, 4, 5, 6, -1, 7, 8]),
        "discount_steps": np.array([1, 2, 3, 1, 2, 1, 1]),
    }
    return Turns(**{**given, **changes})


def small_learner(**changes: Any) -> HiPER:
    """A learner whose critics have learnt something that isn't nothing."""
    learner = HiPER(HiPERConfig(**{"hidden": 8, "gamma": 0.9, "normalize": False, **changes}), TablePolicy(1), 17, 3)
    for i, net in enumerate(learner.critics.values()):
        net.flat.data += torch.from_numpy(generator(8, i).normal(0, 0.3, net.flat.shape).astype(np.float32))
    return learner


@pytest.mark.parametrize("bootstrap", ["last", "self", "none"])
def test_credit_is_that_of_each_trajectory_alone(bootstrap: Any) -> None:
    learner = small_learner(bootstrap=bootstrap, lam_turn=0.8, lam_seg=0.7, keep_penalty=-0.4)
    turns = seven_turns()
    credit = learner.assess(turns)
    high, low, term = (
        learner.values("high", turns.before), learner.values("low", turns.after), learner.values("term", turns.before)
    )  # fmt: skip
    last = learner.values("high", turns.last[[0, 2]])
    for e, part in enumerate((slice(0, 4), slice(4, 7))):
        alone = hae(
            turns.reward[part], turns.switch[part], turns.done[part], high[part], low[part], term[part],
            gamma=0.9 ** np.array([1, 2, 3, 1, 2, 1, 1])[part], lam_turn=0.8, lam_seg=0.7, keep_penalty=-0.4,
            bootstrap_truncated=bootstrap != "none",
            last_high=float(last[e]) if bootstrap == "last" else None,
            last_low=float(last[e]) if bootstrap == "last" else None,
        )  # fmt: skip
        np.testing.assert_allclose(credit.adv_low[part], alone.adv_low, rtol=1e-5)
        np.testing.assert_allclose(credit.adv_high[part], alone.adv_high, rtol=1e-5)
        np.testing.assert_allclose(credit.adv_term[part], np.where(turns.review[part] >= 0, alone.adv_term, 0))
        np.testing.assert_allclose(credit.returns["high"][part], alone.ret_high, rtol=1e-5)
    assert credit.owned["high"].tolist() == [True, False, True, False, True, False, True]


def test_flat_credit_is_gae_and_the_same_for_both_levels() -> None:
    learner = small_learner(estimator="gae", lam_turn=0.8, keep_penalty=-0.4, keep_penalty_mode="fixed")
    turns = seven_turns()
    credit, value = learner.assess(turns), learner.values("high", turns.before)
    following = np.array([*value[1:4], 0, *value[5:7], learner.values("high", turns.last)[2]])
    discount = 0.9 ** np.array([1, 2, 3, 0, 2, 1, 1])
    delta = turns.reward - 0.4 * ~turns.switch + discount * following - value
    expected = delta.copy()
    for t in (2, 1, 0, 5, 4):
        expected[t] += discount[t] * 0.8 * expected[t + 1]
    np.testing.assert_allclose(credit.adv_low, expected, rtol=1e-5)
    np.testing.assert_allclose(credit.adv_high, np.where(turns.choice >= 0, expected, 0), rtol=1e-5)
    np.testing.assert_allclose(credit.adv_term, np.where(turns.review >= 0, expected, 0), rtol=1e-5)


def test_each_level_is_normalised_over_the_turns_that_decide_at_it() -> None:
    plain, normal = small_learner(), small_learner(normalize=True)
    turns = seven_turns(choice=np.array([0, -1, 1, -1, -1, -1, 2]))
    raw, credit = plain.assess(turns), normal.assess(turns)
    for level, own in (("adv_low", turns.reward < 9), ("adv_high", turns.choice >= 0), ("adv_term", turns.review >= 0)):
        own_raw = getattr(raw, level)[own]
        np.testing.assert_allclose(getattr(credit, level)[own], (own_raw - own_raw.mean()) / own_raw.std(), rtol=1e-4)
        assert not getattr(credit, level)[~own].any()
        assert not getattr(raw, level)[~own].any()
    assert credit.spread["high"] == pytest.approx(raw.adv_high[turns.choice >= 0].std(), rel=1e-5)


def test_the_papers_switch_advantage_compares_choosing_anew_with_going_on() -> None:
    learner, turns = small_learner(switch_estimator="option_critic"), seven_turns()
    beta = np.array([0, 0.2, 0.3, 0.4, 0, 0.5, 0.6], np.float32)
    gain = learner.values("high", turns.before) - learner.values("low", turns.before)
    expected = np.where(turns.review >= 0, (turns.switch - beta) * gain, 0)
    np.testing.assert_allclose(learner.assess(turns, beta).adv_term, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="probabilities"):
        learner.assess(turns)
    policy, _, _ = train(0, 2, switch_estimator="option_critic")
    assert policy.table.isfinite().all()
    assert policy.table[:ROWS].any()


def test_another_subgoal_than_the_kept_one_costs() -> None:
    learner = small_learner(consistency_penalty=-0.5, gamma=0.0)
    agrees = np.array([0, 0, 0, 1, 0, 1, 1], bool)
    plain, punished = learner.assess(seven_turns()), learner.assess(seven_turns(consistent=agrees))
    # First turns have nothing to agree with, and a switch writes what it likes.
    np.testing.assert_allclose(punished.adv_low - plain.adv_low, [0, -0.5, 0, 0, 0, 0, 0], atol=1e-6)


def test_turns_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="ascend"):
        seven_turns(trajectory=np.array([2, 2, 2, 2, 0, 0, 0]))
    with pytest.raises(ValueError, match="keeps one"):
        seven_turns(choice=np.array([0, 1, -1, -1, 2, -1, 3]))
    with pytest.raises(ValueError, match="one entry a turn"):
        seven_turns(reward=np.zeros(3, np.float32))
    decisions = choices(2, [[0, 1]] * 9, [0] * 9)
    with pytest.raises(ValueError, match="keep or switch"):
        small_learner().update(seven_turns(), decisions)
    with pytest.raises(ValueError, match="aren't, or name one twice"):
        small_learner().update(seven_turns(review=np.array([-1, 4, 4, 6, -1, 7, 8])), decisions)


def test_critics_learn_what_they_are_of() -> None:
    """Without a future, a return is a turn's reward: of the states before it, and of those with the subgoal."""
    learner, turns = small_learner(gamma=0.0, critic_lr=1e-2, critic_epochs=20), seven_turns()
    for _ in range(40):
        metrics = learner.fit_critics(turns, learner.assess(turns))
        learner.updates += 1
    np.testing.assert_allclose(learner.values("low", turns.after), turns.reward, atol=0.05)
    np.testing.assert_allclose(learner.values("term", turns.before), turns.reward, atol=0.05)
    np.testing.assert_allclose(learner.values("high", turns.before)[turns.boundary], turns.reward[turns.boundary], atol=0.05)  # fmt: skip  # noqa: E501
    assert metrics["explained_variance_low"] > 0.99


def test_a_critic_moves_only_so_far_in_an_update() -> None:
    moved = {}
    for clip in (0.05, 100.0):
        learner, turns = small_learner(value_clip=clip, critic_lr=2e-3, critic_epochs=100), seven_turns()
        credit = learner.assess(turns)
        learner.fit_critics(turns, credit)
        out = learner.critics["low"].forward(torch.from_numpy(turns.after))[0][:, 0]
        moved[clip] = float((out - credit.outputs["low"]).abs().max())
    assert moved[0.05] < 0.2 < 0.5 < moved[100.0]


def test_the_policy_is_asked_what_switching_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """`update` finds P(SWITCH) of each review from the log-probability of what was decided."""
    policy, learner, _ = train(0, 3)
    turns, decisions, _ = play(policy, generator(3))
    given: list[Array] = []
    assess = learner.assess

    def spy(turns: Turns, switch_probability: Array | None = None) -> Any:
        assert switch_probability is not None
        given.append(switch_probability)
        return assess(turns, switch_probability)

    monkeypatch.setattr(learner, "assess", spy)
    table = policy.table.detach().clone()
    learner.update(turns, decisions)
    on = turns.review >= 0
    items = np.array(decisions.items)[decisions.options[turns.review[on], 0]]
    np.testing.assert_allclose(given[0][on], torch.sigmoid(-table[items]), rtol=1e-4)
    assert not given[0][~on].any()


def test_each_update_has_its_own_minibatches() -> None:
    grads = []
    for updates in (0, 0, 1):
        policy = TablePolicy(2 * ROWS, lr=0.0)
        learner = HiPER(HiPERConfig(hidden=8, minibatches=2), policy, CELLS + 3, 0)
        learner.updates = updates
        learner.update(*play(policy, generator(1))[:2])
        grads.append(policy.last_grad)
    assert torch.equal(grads[0], grads[1])
    assert not torch.equal(grads[0], grads[2])


# -- option collapse ----------------------------------------------------------------------------


def punished_switching(**changes: Any) -> list[dict[str, float]]:
    """Learning where nothing but switching matters: each costs 1, and a turn nothing. Ten turns an episode."""
    policy = TablePolicy(1, lr=0.3)
    learner = HiPER(HiPERConfig(hidden=8, critic_lr=1e-2, **changes), policy, 1, 0)
    E, T, history = 32, 10, []
    trajectory = np.repeat(np.arange(E), T)
    first = np.arange(E * T) % T == 0
    features = np.ones((E * T, 1), np.float32)
    for update in range(40):
        keep = 1 / (1 + math.exp(-float(policy.table.detach())))
        switch = first | (generator(2, update).random(E * T) >= keep)
        decided = switch[~first]
        decisions = Decisions.reviews(
            [0], np.zeros(len(decided), int), decided, np.log(np.where(decided, 1 - keep, keep)).astype(np.float32)
        )
        review = np.full(E * T, -1)
        review[~first] = np.arange(len(decided))
        reward, done = -(switch & ~first).astype(np.float32), np.arange(E * T) % T == T - 1
        turns = Turns(trajectory, reward, switch, done, features, features, np.ones((E, 1), np.float32), np.full(E * T, -1), review)  # fmt: skip  # noqa: E501
        history.append(learner.update(turns, decisions))
    return history


def test_the_collapse_to_never_switching_is_told_and_a_keep_penalty_prevents_it() -> None:
    history = punished_switching()
    assert history[0]["switch_rate"] == pytest.approx(0.5, abs=0.1)
    assert [step["collapsed"] for step in history[:3]] == [0, 0, 0]
    assert history[-1]["switch_rate"] < 0.02
    assert history[-1]["collapsed"] == 1
    low = [step["switch_rate"] < 0.02 for step in history]
    three = next(i for i in range(2, 40) if all(low[i - 2 : i + 1]))
    assert [step["collapsed"] for step in history[: three + 1]] == [0] * three + [1]

    kept = punished_switching(keep_penalty=-1.5, keep_penalty_mode="fixed")
    assert kept[-1]["switch_rate"] > 0.9
    assert not any(step["collapsed"] for step in kept)


def test_a_floor_under_the_switch_rate_holds_it() -> None:
    """The penalty grows with the share of switches that lacks, so the policy settles near the floor, not at 1 or 0."""
    held = punished_switching(switch_rate_floor=0.5, switch_rate_floor_coef=30.0)
    assert 0.2 < np.mean([step["switch_rate"] for step in held[-10:]]) < 0.8
    assert not any(step["collapsed"] for step in held)


# -- one model that plays both levels -------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "switch", "subgoal", "action", "valid"),
    [
        ("<switch>SWITCH</switch><subgoal>find a mug</subgoal><action>Go to Desk 1</action>", True, "find a mug", "go to desk 1", True),  # noqa: E501
        ("<switch> KEEP </switch>\n<subgoal>x</subgoal>\n<action>look</action>", False, "x", "look", True),
        ("<subgoal>x</subgoal><action>look</action>", False, "x", "look", False),
        ("<switch></switch><subgoal>x</subgoal><action>look</action>", False, "x", "look", False),
        ("<switch>MAYBE</switch><subgoal>x</subgoal><action>look</action>", False, "x", "look", False),
        ("<switch>KEEP</switch><action>look</action>", False, None, "look", False),
        ("<switch>SWITCH</switch><subgoal>x</subgoal>look", True, "x", None, False),
        ("<switch>KEEP</switch><subgoal>找</subgoal><action>look</action>", False, "找", "look", False),
        ("", False, None, None, False),
    ],
)  # fmt: skip
def test_replies(text: str, switch: bool, subgoal: str | None, action: str | None, valid: bool) -> None:
    reply = read_reply(text)
    assert (reply.switch, reply.subgoal, reply.action, reply.valid) == (switch, subgoal, action, valid)


def test_tokens_of_a_block_are_those_that_touch_it() -> None:
    reply = read_reply("<switch>KEEP</switch> <subgoal>x</subgoal><action>go</action>")
    assert reply.spans == {"switch": (0, 21), "subgoal": (22, 42), "action": (42, 61)}
    offsets = [(0, 8), (8, 12), (12, 21), (21, 22), (22, 40), (40, 44), (44, 61)]
    assert token_mask(offsets, reply.spans["switch"]).tolist() == [True] * 3 + [False] * 4
    assert token_mask(offsets, reply.spans["subgoal"]).tolist() == [False] * 4 + [True] * 2 + [False]
    assert not token_mask(offsets, reply.spans.get("missing")).any()  # type: ignore[call-overload]


def test_each_levels_advantage_lands_on_its_tokens() -> None:
    """Replies of five tokens: switch, two of the subgoal, the action, padding; the second has no action."""
    on = np.array([[1, 2, 2, 3, 0], [1, 2, 2, 0, 0], [1, 2, 2, 3, 0]])
    advantages, learns = token_advantages(
        [1, 2, 3], [10, 20, 30], [100, 200, 300], [True, True, False],
        action=on == 3, subgoal=on == 2, switch=on == 1,
        response=np.array([[1, 1, 1, 1, 0]] * 3, bool),
    )  # fmt: skip
    assert advantages.tolist() == [[100, 10, 10, 1, 0], [202, 22, 22, 2, 0], [300, 0, 0, 3, 0]]
    assert learns.tolist() == [[True] * 4 + [False], [True] * 4 + [False], [True, False, False, True, False]]


def test_one_token_policy_learns_both_levels() -> None:
    """Replies of three tokens: KEEP/SWITCH, a subgoal, an action. Two landmarks, three turns at each.

    At landmark s, where the episode is for three turns, subgoal s is right (a KEEP repeats the last), and the action
    must be the subgoal. So in the fourth turn the model must switch.
    """
    T, E, rows = 6, 32, 2 * 3
    place = np.repeat([0, 1], 3)
    policy = TokenTablePolicy(rows, 3, 2, lr=0.15)
    learner = HiPER(HiPERConfig(hidden=16, critic_lr=1e-2, lam_turn=0.9), policy, rows + 1, 0)
    switched = []
    reached = 0.0
    for update in range(80):
        rng = generator(13, update)
        probability = torch.softmax(policy.table.detach(), -1).numpy()
        subgoal, reached = np.full(E, 2), 0.0
        said: list[dict[str, NDArray[Any]]] = []
        for t in range(T):
            row = place[t] * 3 + subgoal
            drawn = (rng.random((E, 3)) >= probability[row, :, 0]).astype(int)
            switch = drawn[:, 0].astype(bool) | (t == 0)
            before = np.eye(rows + 1)[row]
            subgoal = np.where(switch, drawn[:, 1], subgoal)
            reward = 1.0 * (subgoal == place[t]) + 0.5 * (drawn[:, 2] == subgoal) - 0.2 * (switch & (t > 0))
            reached += reward.mean()
            after = np.eye(rows + 1)[place[t] * 3 + subgoal]
            said.append({"row": row, "drawn": drawn, "switch": switch, "before": before, "after": after, "reward": reward})  # fmt: skip  # noqa: E501
        # (T, E, …) to one trajectory after another.
        flat = {k: np.stack([x[k] for x in said], 1).reshape(E * T, *said[0][k].shape[1:]) for k in said[0]}
        first, m = np.arange(E * T) % T == 0, E * T
        boundary = flat["switch"]
        turns = Turns(
            np.repeat(np.arange(E), T), flat["reward"].astype(np.float32), boundary, np.arange(m) % T == T - 1,
            flat["before"].astype(np.float32), flat["after"].astype(np.float32), np.zeros((E, rows + 1), np.float32),
            np.where(boundary, 0, -1), np.where(first, -1, 0),
        )  # fmt: skip
        credit = learner.assess(turns)
        blocks = np.eye(3, dtype=bool)[None].repeat(m, 0)
        weights, learns = token_advantages(
            credit.adv_low, credit.adv_high, credit.adv_term, boundary,
            switch=blocks[:, 0] & ~first[:, None], subgoal=blocks[:, 1], action=blocks[:, 2],
            response=np.ones((m, 3), bool),
        )  # fmt: skip
        learner.fit_critics(turns, credit)
        learner.updates += 1
        replies = [(int(r), tuple(map(int, d))) for r, d in zip(flat["row"], flat["drawn"], strict=True)]
        distinct = list(dict.fromkeys(replies))
        place_of = np.array([distinct.index(reply) for reply in replies])
        old = torch.from_numpy(np.stack(policy.evaluate(distinct)))[place_of, :, 0]

        def loss(
            leaf: torch.Tensor, place_of: Any = place_of, old: Any = old, weights: Any = weights, learns: Any = learns
        ) -> tuple[torch.Tensor, dict[str, float]]:
            numbers = leaf.view(-1, 3, 2)[place_of]
            surrogate, _ = clipped_surrogate(numbers[..., 0], old, torch.from_numpy(weights))
            on = torch.from_numpy(learns)
            return masked_mean(surrogate, on) - 0.001 * masked_mean(numbers[..., 1], on), {}

        learn(policy, distinct, loss)
        switched.append(boundary.reshape(E, T)[:, 1:].mean(0))
    assert reached > 0.95 * (T * 1.5 - 0.2)
    late = np.mean(switched[-5:], 0)
    assert late[2] > 0.9  # the turn at which the second landmark comes
    assert np.delete(late, 2).max() < 0.2
