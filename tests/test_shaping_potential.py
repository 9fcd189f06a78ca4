"""Shaping configurations, and what a potential must and must not do to rewards and to the best policies."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.errors import EchelonError
from echelon.shaping import PotentialShaper, ShapingConfig, ShapingRules, mixture, relabel

NAMES = ("near", "seen", "done")
few = settings(max_examples=60)
fractions = st.floats(0, 1, width=32)


@st.composite
def configs(draw: Any) -> ShapingConfig:
    weights = draw(st.lists(fractions, min_size=3, max_size=3).filter(lambda w: sum(w) > 0))
    return ShapingConfig("any", draw(st.floats(0, 1)), dict(zip(NAMES, weights, strict=True)))


def column(*rows: tuple[float, ...]) -> np.ndarray:
    return np.array(rows, np.float32)


# -- configurations -------------------------------------------------------------------------------------------------


def test_weights_are_normalised_over_the_active_terms() -> None:
    config = ShapingConfig("m", 0.5, {"near": 1, "seen": 3, "done": 4}, ("near", "seen"))
    assert config.weights == {"near": 0.25, "seen": 0.75}
    assert config.vector(NAMES).tolist() == [0.25, 0.75, 0]
    assert ShapingConfig("m", 0.5, {"near": 2, "done": 0}).active_terms == ("near",)


def test_equality_is_of_what_is_done_and_not_of_words() -> None:
    one = ShapingConfig("one", 0.5, {"near": 1, "seen": 1})
    assert one == ShapingConfig("other", 0.5, {"seen": 7, "near": 7, "done": 0})
    assert len({one, ShapingConfig("other", 0.5, {"seen": 0.5, "near": 0.5 + 1e-9})}) == 1
    assert one != ShapingConfig("one", 0.5, {"near": 1, "seen": 1.001})
    assert one != ShapingConfig("one", 0.51, {"near": 1, "seen": 1})
    assert ShapingConfig("off", 0, {"near": 1}) == ShapingConfig("off", 0, {"seen": 1})
    assert one != "one"


@pytest.mark.parametrize(
    ("beta", "weights", "active", "says"),
    [
        (1.5, {"near": 1}, None, "beta is 1.5"),
        (float("nan"), {"near": 1}, None, "beta is nan"),
        (True, {"near": 1}, None, "beta is True"),
        ("0.5", {"near": 1}, None, "beta is '0.5'"),
        (0.5, {"near": -1}, None, "weight of near is -1"),
        (0.5, {"near": float("inf")}, None, "weight of near is inf"),
        (0.5, {}, None, "no active term"),
        (0.5, {"near": 0}, None, "no active term"),
        (0.5, {"near": 1}, ("seen",), "no active term"),
        (0.5, {"near": 1}, ("near", "near"), "named twice"),
    ],
)
def test_what_is_no_configuration_says_so_in_one_line(beta: Any, weights: Any, active: Any, says: str) -> None:
    with pytest.raises(EchelonError, match=says) as error:
        ShapingConfig("m", beta, weights, active)
    assert "\n" not in str(error.value)


def test_an_unknown_term_is_named() -> None:
    with pytest.raises(EchelonError, match="'neer': did you mean 'near'"):
        ShapingConfig("m", 0.5, {"neer": 1}).vector(NAMES)
    with pytest.raises(EchelonError, match="unknown potential term 'gone'"):
        ShapingConfig("m", 0.5, {"near": 1}, ("near", "gone")).vector(NAMES)
    with pytest.raises(EchelonError, match="not a shaping configuration"):
        ShapingConfig.from_json({"mode": "m", "beta": 0.5})


@few
@given(configs())
def test_a_configuration_comes_back_from_a_file_bit_for_bit(config: ShapingConfig) -> None:
    back = ShapingConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert (back.mode, back.beta, back.weights, back.active_terms) == (
        config.mode, config.beta, config.weights, config.active_terms,
    )  # fmt: skip
    assert sum(config.weights.values()) == pytest.approx(1, abs=1e-12)


# -- rewards by hand ------------------------------------------------------------------------------------------------

HALVES = ShapingConfig("halves", 0.5, {"near": 1, "seen": 1})


def test_a_step_by_hand() -> None:
    # Φ = (0.4 + 0.8)/2 = 0.6, then (1 + 1)/2 = 1: F = 0.5 (0.9 * 1 - 0.6) = 0.15.
    shaper = PotentialShaper(HALVES, NAMES, 1, ShapingRules(gamma=0.9))
    shaper.begin(column((0.4, 0.8, 1)))
    assert shaper.step(column((1, 1, 0)), np.array([False])) == pytest.approx([0.15])
    # The next one ends the task: F = 0.5 (0 - 1).
    assert shaper.step(column((1, 1, 1)), np.array([True])) == pytest.approx([-0.5])


def test_scale_offset_team_and_parity_by_hand() -> None:
    def step(terminated: bool = False, **rules: Any) -> float:
        shaper = PotentialShaper(HALVES, NAMES, 1, ShapingRules(gamma=0.9, **rules))
        shaper.begin(column((0.4, 0.8, 0)))
        return shaper.step(column((1, 1, 0)), np.array([terminated])).item()

    assert step(scale=8) == pytest.approx(8 * 0.15)
    assert step(team="per_agent_sum", num_agents=3) == pytest.approx(3 * 0.15)
    assert step(team="once", num_agents=3) == pytest.approx(0.15)
    assert step(terminated=True) == pytest.approx(0.5 * (0 - 0.6))
    assert step(terminated=True, terminal="state") == pytest.approx(0.15)
    # Worths 0.5 (0.6 - 1) = -0.2, then 0: to get to the goal pays, and ending there costs nothing.
    assert step(offset=1) == step(offset=1, terminated=True) == pytest.approx(0.2)
    assert step(first_step="zero") == 0


def test_the_first_step_only_is_left_out() -> None:
    shaper = PotentialShaper(HALVES, NAMES, 2, ShapingRules(gamma=0.9, first_step="zero"))
    shaper.begin(column((0.4, 0.8, 0), (0.4, 0.8, 0)))
    going = np.zeros(2, bool)
    assert shaper.step(column((1, 1, 0), (1, 1, 0)), going).tolist() == [0, 0]
    shaper.begin(column((0, 0, 0), (0.4, 0.8, 0)), np.array([False, True]))
    # World 0 goes on from Φ = 1; world 1 begins anew.
    assert shaper.step(column((1, 1, 0), (1, 1, 0)), going) == pytest.approx([0.5 * (0.9 - 1), 0])


def test_terms_out_of_range_are_clamped() -> None:
    assert mixture(column((-3, 9, 0)), HALVES.vector(NAMES)).tolist() == [0.5]


def test_rules_out_of_range_say_so() -> None:
    for wrong in (
        {"gamma": 1.1}, {"terminal": "no"}, {"first_step": "no"}, {"team": "no"}, {"num_agents": 0}, {"scale": 0.0},
        {"offset": float("nan")},
    ):  # fmt: skip
        with pytest.raises(EchelonError, match="must be"):
            ShapingRules(**wrong)  # type: ignore[arg-type]


# -- properties -----------------------------------------------------------------------------------------------------


def play(
    shaper: PotentialShaper, phi: np.ndarray, terminated: bool, changes: dict[int, ShapingConfig] | None = None
) -> np.ndarray:
    """F of each step of one world's episode with terms `phi`, `(T + 1, K)`."""
    shaper.begin(phi[:1])
    out = []
    for t in range(len(phi) - 1):
        if changes and t in changes:
            shaper.change(changes[t])
        out.append(shaper.step(phi[t + 1 : t + 2], np.array([terminated and t == len(phi) - 2])).item())
    return np.array(out)


episodes = st.integers(1, 12).flatmap(
    lambda n: st.lists(st.tuples(fractions, fractions, fractions), min_size=n + 1, max_size=n + 1)
)


@few
@given(configs(), episodes, st.floats(0, 1), st.booleans(), st.sampled_from(["zero", "state"]), st.floats(-1, 1))
def test_returns_telescope(config, rows, gamma, terminated, terminal, offset) -> None:
    phi = column(*rows)
    rules = ShapingRules(gamma=gamma, terminal=terminal, scale=3, offset=offset)
    extra = play(PotentialShaper(config, NAMES, 1, rules), phi, terminated)
    worth = 3 * config.beta * (mixture(phi, config.vector(NAMES)) - offset)
    last = 0.0 if terminated and terminal == "zero" else worth[-1]
    steps = len(extra)
    expected = gamma**steps * last - worth[0]
    assert (gamma ** np.arange(steps) * extra).sum() == pytest.approx(expected, abs=1e-4)


@few
@given(st.lists(configs(), min_size=13, max_size=13), episodes)
def test_returns_telescope_when_the_potential_changes_in_mid_episode(several, rows) -> None:
    phi, gamma = column(*rows), 0.97
    steps = len(phi) - 1
    shaper = PotentialShaper(several[0], NAMES, 1, ShapingRules(gamma=gamma))
    extra = play(shaper, phi, False, dict(enumerate(several[1 : steps + 1])))
    start = several[0].beta * mixture(phi[0], several[0].vector(NAMES))
    end = several[steps].beta * mixture(phi[-1], several[steps].vector(NAMES))
    assert (gamma ** np.arange(steps) * extra).sum() == pytest.approx(gamma**steps * end - start, abs=1e-5)
    # What was stored gives the same rewards again, where it is known what was in force.
    at = np.arange(steps)
    again = relabel(
        np.zeros(steps, np.float32), phi[:-1], phi[1:], np.zeros(steps, bool), several, names=NAMES,
        rules=ShapingRules(gamma=gamma), at=at, next_at=at + 1,
    )  # fmt: skip
    assert again.tolist() == extra.astype(np.float32).tolist()


def test_truncation_keeps_the_potential_and_termination_does_not() -> None:
    phi = column((0, 0, 0), (1, 1, 0))
    rules = ShapingRules(gamma=0.9)
    assert play(PotentialShaper(HALVES, NAMES, 1, rules), phi, False) == pytest.approx([0.45])
    assert play(PotentialShaper(HALVES, NAMES, 1, rules), phi, True) == pytest.approx([0])


@few
@given(configs(), configs(), st.integers(0, 2**32 - 1))
def test_relabelled_rewards_bear_no_trace_of_the_mixture_that_made_them(old, new, seed) -> None:
    rng = np.random.default_rng(seed)
    phi, following = (rng.random((4, 5, 3), np.float32) for _ in range(2))
    sparse, over = rng.random((4, 5), np.float32), rng.random((4, 5)) < 0.3
    begins = rng.random((4, 5)) < 0.3
    for rules in (
        ShapingRules(),
        ShapingRules(terminal="state", first_step="zero", team="per_agent_sum", num_agents=4),
    ):
        rewards = relabel(sparse, phi, following, over, new, names=NAMES, rules=rules, begins=begins)
        assert rewards.dtype == np.float32
        shaper = PotentialShaper(old, NAMES, 5, rules)
        shaper.change(new)
        for row in range(4):
            shaper.begin(phi[row])
            shaper.first = begins[row]
            assert (sparse[row] + shaper.step(following[row], over[row])).tolist() == rewards[row].tolist()


def test_relabelling_wants_to_know_the_first_steps_where_they_matter() -> None:
    one = np.zeros(1, np.float32)
    with pytest.raises(ValueError, match="begins"):
        relabel(one, column((0, 0, 0)), column((0, 0, 0)), one > 0, HALVES, names=NAMES,
                rules=ShapingRules(first_step="zero"))  # fmt: skip


def solve(chance: np.ndarray, reward: np.ndarray, extra: np.ndarray, terminal: np.ndarray, gamma: float) -> np.ndarray:
    """Optimal Q `(S, A)` by value iteration; chance `(S, A, S)`, reward `(S, A)`, extra `(S, S)`."""
    q = np.zeros(reward.shape)
    expected = reward + (chance * extra[:, None, :]).sum(2)
    for _ in range(400):
        q = expected + gamma * chance @ np.where(terminal, 0, q.max(1))
    return q


@st.composite
def problems(draw: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    states, actions = draw(st.integers(2, 7)), draw(st.integers(2, 4))
    chance = rng.dirichlet(np.full(states, 0.3), (states, actions))
    terminal = rng.random(states) < 0.3
    return chance, rng.normal(size=(states, actions)), terminal, rng.random((states, 3), np.float32)


@few
@given(problems(), configs(), st.floats(-1, 2))
def test_the_best_policies_stay_the_best_for_any_strength_and_weights(problem, config, offset) -> None:
    chance, reward, terminal, phi = problem
    gamma, states = 0.9, len(phi)
    rules = ShapingRules(gamma=gamma, scale=5, offset=offset)
    here, there = np.repeat(phi[:, None], states, 1), np.repeat(phi[None], states, 0)
    zero = np.zeros((states, states), np.float32)
    extra = relabel(zero, here, there, np.broadcast_to(terminal, zero.shape), config, names=NAMES, rules=rules)
    plain, shaped = (solve(chance, reward, f, terminal, gamma) for f in (zero, extra.astype(np.float64)))
    # More than the policy: each value moves by its state's potential.
    worth = 5 * config.beta * (mixture(phi, config.vector(NAMES)) - offset)
    assert shaped == pytest.approx(plain - worth[:, None], abs=1e-4)
    chosen = np.take_along_axis(plain, shaped.argmax(1)[:, None], 1)[:, 0]
    assert chosen == pytest.approx(plain.max(1), abs=1e-4)


def test_a_potential_that_is_kept_at_the_end_changes_the_best_policy() -> None:
    # From state 0 one action ends the task in state 1 and pays 0.1, the other in state 2 and pays nothing, but state 2
    # has all the potential.
    chance = np.zeros((3, 2, 3))
    chance[0, 0, 1] = chance[0, 1, 2] = 1
    chance[1:, :, 1] = 1
    reward = np.array([[0.1, 0], [0, 0], [0, 0]])
    terminal = np.array([False, True, True])
    phi = column((0, 0, 0), (0, 0, 0), (1, 1, 0))
    here, there = np.repeat(phi[:, None], 3, 1), np.repeat(phi[None], 3, 0)
    best = {}
    for kept in ("zero", "state"):
        extra = relabel(
            np.zeros((3, 3), np.float32), here, there, np.broadcast_to(terminal, (3, 3)), HALVES, names=NAMES,
            rules=ShapingRules(gamma=0.9, terminal=kept),  # type: ignore[arg-type]
        )  # fmt: skip
        best[kept] = int(solve(chance, reward, extra, terminal, 0.9)[0].argmax())
    assert best == {"zero": 0, "state": 1}


# -- state ----------------------------------------------------------------------------------------------------------


def test_a_shaper_that_goes_on_from_a_checkpoint_pays_the_same() -> None:
    rng = np.random.default_rng(0)
    phi, over = rng.random((9, 4, 3), np.float32), rng.random((9, 4)) < 0.2
    rules = ShapingRules(first_step="zero")
    through = PotentialShaper(HALVES, NAMES, 4, rules)
    through.begin(phi[0])
    for t in range(1, 5):
        through.step(phi[t], over[t])
        through.begin(phi[0], over[t])
    other = ShapingConfig("other", 0.3, {"done": 1})
    through.change(other)  # worths of the old mixture are still on the books
    saved = through.state_dict()
    resumed = PotentialShaper(ShapingConfig.from_json(other.to_json()), NAMES, 4, rules)
    resumed.load_state_dict(saved)
    for t in range(5, 9):
        assert through.step(phi[t], over[t]).tolist() == resumed.step(phi[t], over[t]).tolist()
    assert saved["worth"].tolist() != through.state_dict()["worth"].tolist()  # it was a copy
    with pytest.raises(EchelonError, match="isn't that of mode 'halves'"):
        PotentialShaper(HALVES, NAMES, 4, rules).load_state_dict(saved)
    with pytest.raises(EchelonError, match="another number of worlds"):
        PotentialShaper(other, NAMES, 3, rules).load_state_dict(saved)


@few
@given(configs(), st.integers(0, 2**32 - 1))
def test_a_world_is_paid_the_same_whoever_is_beside_it(config, seed) -> None:
    rng = np.random.default_rng(seed)
    start, following = rng.random((8, 3), np.float32), rng.random((8, 3), np.float32)
    together = PotentialShaper(config, NAMES, 8, ShapingRules())
    together.begin(start)
    extra = together.step(following, np.zeros(8, bool))
    for w in range(8):
        alone = PotentialShaper(config, NAMES, 1, ShapingRules())
        alone.begin(start[w : w + 1])
        assert alone.step(following[w : w + 1], np.zeros(1, bool)).item() == extra[w]
