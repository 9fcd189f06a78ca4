"""HAE: golden vectors, its formulas by definition, what must not leak, the twin on tensors, HiPER's variance claim."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from echelon.advantages import HAE, gae, hae, hae_many, hae_switch_option_critic, keep_consistency_penalty
from echelon.advantages_torch import HAETensors, hae_torch

Array = NDArray[np.float64]
REWARDS = [0, 0.5, 0, 1, 0, 10]
SWITCHES = [1, 0, 1, 0, 0, 1]
NEVER = [0, 0, 0, 0, 0, 0]
DONES = [0, 0, 0, 0, 0, 1]
V_HIGH = [3, 9, 4, 9, 9, 6]  # 9: never to be used
V_LOW = [2, 2.5, 3, 3.5, 4, 7]
V_TERM = [1, 1.5, 2, 2.5, 3, 5]
SETTING: dict[str, Any] = {"gamma": 0.9, "lam_turn": 0.8, "lam_seg": 0.95}
GOLDEN = HAE(
    np.array([1.402, 1.6, 1.66776, 2.108, 1.4, 3.0]),
    np.array([3.402, 4.1, 4.66776, 5.608, 5.4, 10.0]),
    np.array([3.802012, 0, 4.0442, 0, 0, 4.0]),
    np.array([6.802012, 0, 8.0442, 0, 0, 10.0]),
    np.array([2.69, 2.6, 3.274, 3.36, 2.4, 5.0]),
    np.array([3.69, 4.1, 5.274, 5.86, 5.4, 10.0]),
)


def assert_same(got: HAE | HAETensors, wanted: HAE | HAETensors, tolerance: float = 1e-9) -> None:
    for name, a, b in zip(HAE._fields, got, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance, err_msg=name)


# -- what the released implementation returns ---------------------------------------------------


def test_golden() -> None:
    got = hae(REWARDS, SWITCHES, DONES, V_HIGH, V_LOW, V_TERM, **SETTING)
    assert_same(got, GOLDEN, 1e-6)
    assert all(x.dtype == np.float64 and x.shape == (6,) for x in got)


def test_golden_of_a_truncated_trajectory() -> None:
    got = hae(REWARDS, SWITCHES, NEVER, V_HIGH, V_LOW, V_TERM, **SETTING, bootstrap_truncated=True)
    wanted = [x.copy() for x in GOLDEN]
    wanted[0][5], wanted[1][5] = 9.3, 16.3
    wanted[2][:] = [6.679765, 0, 7.78397, 0, 0, 9.4]
    wanted[3][:] = [9.679765, 0, 11.78397, 0, 0, 15.4]
    wanted[4][5], wanted[5][5] = 10.4, 15.4
    assert_same(got, HAE(*wanted), 1e-6)


def test_golden_of_a_truncation_that_is_taken_for_an_end() -> None:
    assert_same(hae(REWARDS, SWITCHES, NEVER, V_HIGH, V_LOW, V_TERM, **SETTING), GOLDEN, 1e-6)


def test_golden_of_the_batch_on_tensors() -> None:
    twice = [torch.tensor([x, x], dtype=torch.float32) for x in (REWARDS, SWITCHES, DONES, V_HIGH, V_LOW, V_TERM)]
    got = hae_torch(*twice, **SETTING)
    for row in range(2):
        assert_same(HAE(*(x[row].numpy() for x in got)), GOLDEN, 1e-5)
    assert all(x.dtype == torch.float32 for x in got)


# -- the formulas, by their definition -------------------------------------------------------------


class Trajectory(NamedTuple):
    rewards: Array
    switches: NDArray[np.bool_]
    dones: NDArray[np.bool_]
    v_high: Array
    v_low: Array
    v_term: Array

    @property
    def segments(self) -> list[tuple[int, int]]:
        """First turn and the turn behind the last, of each."""
        starts = [0, *(t for t in range(1, len(self.rewards)) if self.switches[t])]
        return list(zip(starts, [*starts[1:], len(self.rewards)], strict=True))


@st.composite
def trajectories(draw: st.DrawFn, max_turns: int = 12) -> Trajectory:
    turns = draw(st.integers(1, max_turns))
    numbers = hnp.arrays(np.float64, turns, elements=st.floats(-8, 8, width=16))
    dones = np.zeros(turns, bool)
    dones[-1] = draw(st.booleans())
    return Trajectory(
        draw(numbers), draw(hnp.arrays(np.bool_, turns)), dones, draw(numbers), draw(numbers), draw(numbers)
    )


def definition(
    x: Trajectory, gamma: float, lam_turn: float, lam_seg: float, after_low: float, after_high: float
) -> HAE:
    """HiPER's formulas segment by segment, as sums; `after_…`: what stands behind the last turn, if not done."""
    adv_low, adv_high, ret_term = (np.zeros(len(x.rewards)) for _ in range(3))
    next_adv = 0.0
    for k, (s, n) in reversed(list(enumerate(x.segments))):
        last = k == len(x.segments) - 1
        end_low, end_high = (after_low, after_high) if last else (x.v_high[n], x.v_high[n])
        if x.dones[n - 1]:
            end_low = end_high = next_adv = 0.0
        values = [*x.v_low[s:n], end_low]
        delta = [x.rewards[s + j] + gamma * values[j + 1] - values[j] for j in range(n - s)]
        for t in range(s, n):
            adv_low[t] = sum((gamma * lam_turn) ** (j - t) * delta[j - s] for j in range(t, n))
            rest = sum(gamma ** (j - t) * x.rewards[j] for j in range(t, n))
            ret_term[t] = rest + gamma ** (n - t) * end_high
        next_adv = ret_term[s] - x.v_high[s] + gamma ** (n - s) * lam_seg * next_adv
        adv_high[s] = next_adv
    boundary = np.isin(np.arange(len(x.rewards)), [s for s, _ in x.segments])
    ret_high = np.where(boundary, adv_high + x.v_high, 0)
    return HAE(adv_low, adv_low + x.v_low, adv_high, ret_high, ret_term - x.v_term, ret_term)


unit = st.floats(0, 1)


@settings(max_examples=150)
@given(trajectories(), unit, unit, unit, st.sampled_from(["none", "self", "last"]))
def test_agrees_with_the_definition(x: Trajectory, gamma: float, lam_turn: float, lam_seg: float, after: str) -> None:
    low, high = {"none": (0, 0), "self": (x.v_low[-1], x.v_high[x.segments[-1][0]]), "last": (3.5, -2.5)}[after]
    last = {"last_low": 3.5, "last_high": -2.5} if after == "last" else {}
    got = hae(
        *x, gamma=gamma, lam_turn=lam_turn, lam_seg=lam_seg, bootstrap_truncated=after != "none", **last
    )  # fmt: skip
    assert_same(got, definition(x, gamma, lam_turn, lam_seg, low, high))


@settings(max_examples=60)
@given(trajectories())
def test_without_discount_a_segment_telescopes(x: Trajectory) -> None:
    """γ = λ_turn = 1: the first turn's advantage is the segment's rewards + V^H of the next boundary − V^L."""
    got = hae(*x, gamma=1, lam_turn=1, lam_seg=0.9)
    for s, n in x.segments:
        after = x.v_high[n] if n < len(x.rewards) else 0
        assert got.adv_low[s] == pytest.approx(x.rewards[s:n].sum() + after - x.v_low[s])


@settings(max_examples=60)
@given(trajectories(), unit, unit)
def test_where_every_turn_is_a_segment_the_high_level_is_gae(x: Trajectory, gamma: float, lam: float) -> None:
    x = x._replace(switches=np.ones_like(x.switches))
    got = hae(*x, gamma=gamma, lam_turn=0.3, lam_seg=lam)
    wanted, returns = flat(x, x.v_high, gamma, lam)
    np.testing.assert_allclose(got.adv_high, wanted, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(got.ret_high, returns, rtol=1e-4, atol=1e-3)


@settings(max_examples=60)
@given(trajectories(), unit, unit)
def test_in_a_single_segment_the_low_level_is_gae(x: Trajectory, gamma: float, lam: float) -> None:
    x = x._replace(switches=np.zeros_like(x.switches))
    got = hae(*x, gamma=gamma, lam_turn=lam, lam_seg=0.3)
    wanted, returns = flat(x, x.v_low, gamma, lam)
    np.testing.assert_allclose(got.adv_low, wanted, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(got.ret_low, returns, rtol=1e-4, atol=1e-3)


def flat(x: Trajectory, values: Array, gamma: float, lam: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Plain GAE over the turns, nothing of worth behind them."""
    r, v, n = (y.astype(np.float32) for y in (x.rewards, values, np.append(values[1:], 0)))
    end = np.arange(len(r)) == len(r) - 1
    advantages, returns = gae(r[:, None], v[:, None], n[:, None], end[:, None], end[:, None], gamma=gamma, lam=lam)
    return advantages[:, 0], returns[:, 0]


@settings(max_examples=60)
@given(trajectories(), unit)
def test_a_discount_for_each_turn(x: Trajectory, gamma: float) -> None:
    """Equal discounts are one discount; a turn of two steps is two turns of one, to the high level and the switch."""
    kwargs: dict[str, Any] = {"lam_turn": 0.8, "lam_seg": 0.9, "bootstrap_truncated": True, "last_high": 2.0}
    turns = len(x.rewards)
    one = hae(*x, gamma=gamma, **kwargs)
    assert_same(hae(*x, gamma=np.full(turns, gamma), **kwargs), one, 0)

    whole = x._replace(switches=np.zeros(turns, bool))
    merged = [np.array([y[0]]) for y in whole]
    merged[0] = np.array([(gamma ** np.arange(turns) * x.rewards).sum()])
    merged[2] = x.dones[-1:]
    got, wanted = hae(*merged, gamma=[gamma**turns], **kwargs), hae(*whole, gamma=gamma, **kwargs)
    for name in ("adv_high", "ret_high", "adv_term", "ret_term"):
        assert getattr(got, name)[0] == pytest.approx(getattr(wanted, name)[0], abs=1e-9)


# -- what must not leak --------------------------------------------------------------------------


@settings(max_examples=100)
@given(trajectories(), st.data())
def test_nothing_leaks_across_segments(x: Trajectory, data: st.DataObject) -> None:
    """Of what comes later, the low level and the switch see V^H of the next boundary; the high level sees more only
    through its trace. Of what came before, nobody sees anything."""
    s, n = data.draw(st.sampled_from(x.segments))
    inside = np.zeros(len(x.rewards), bool)
    inside[s:n] = True
    bootstrap = np.arange(len(x.rewards)) == n
    rng = np.random.default_rng(0)
    noise = 100 * rng.normal(size=(4, len(x.rewards)))
    other = x._replace(
        rewards=np.where(inside, x.rewards, noise[0]),
        v_high=np.where(inside | bootstrap, x.v_high, noise[1]),
        v_low=np.where(inside, x.v_low, noise[2]),
        v_term=np.where(inside, x.v_term, noise[3]),
    )
    # Segments of the other kinds, too: those before and behind may be cut as they like, if these two boundaries stay.
    cuts = data.draw(hnp.arrays(np.bool_, len(x.rewards)))
    cuts[s : n + 1] = x.switches[s : n + 1]
    other = other._replace(switches=cuts)
    no_trace: dict[str, Any] = {"gamma": 0.9, "lam_turn": 0.8, "lam_seg": 0.0}
    a, b = hae(*x, **no_trace), hae(*other, **no_trace)
    assert_same(HAE(*(y[s:n] for y in a)), HAE(*(y[s:n] for y in b)), 0)

    a, b = hae(*x, **SETTING), hae(*other, **SETTING)
    for name in ("adv_low", "ret_low", "adv_term", "ret_term"):
        np.testing.assert_array_equal(getattr(a, name)[s:n], getattr(b, name)[s:n])


@settings(max_examples=60)
@given(trajectories(), st.data())
def test_a_later_segment_is_as_if_it_were_alone(x: Trajectory, data: st.DataObject) -> None:
    s, _ = data.draw(st.sampled_from(x.segments))
    whole = hae(*x, **SETTING, bootstrap_truncated=True)
    assert_same(HAE(*(y[s:] for y in whole)), hae(*(y[s:] for y in x), **SETTING, bootstrap_truncated=True), 0)


@settings(max_examples=60)
@given(trajectories(), st.booleans(), st.booleans())
def test_v_high_is_read_at_boundaries_only(x: Trajectory, truncated: bool, normalize: bool) -> None:
    boundary = x.switches.copy()
    boundary[0] = True
    decoys = x._replace(v_high=np.where(boundary, x.v_high, np.nan))
    kwargs: dict[str, Any] = {**SETTING, "bootstrap_truncated": truncated, "normalize": normalize}
    assert_same(hae(*decoys, **kwargs), hae(*x, **kwargs), 0)
    tensors = hae_torch(*(torch.tensor(y)[None] for y in decoys), **kwargs)
    assert_same(HAE(*(y[0].numpy() for y in tensors)), hae(*x, **kwargs))


@settings(max_examples=60)
@given(trajectories(), trajectories())
def test_what_follows_an_end_changes_nothing_before_it(x: Trajectory, y: Trajectory) -> None:
    """Also where the rows behind the end say KEEP, so that they would belong to its segment."""
    x.dones[-1] = True
    both = hae(*(np.concatenate(z) for z in zip(x, y, strict=True)), **SETTING)
    assert_same(HAE(*(z[: len(x.rewards)] for z in both)), hae(*x, **SETTING), 0)


def test_the_true_last_observation_is_the_better_bootstrap() -> None:
    kwargs: dict[str, Any] = {**SETTING, "last_high": 20.0, "last_low": 30.0}
    args = REWARDS, SWITCHES, NEVER, V_HIGH, V_LOW, V_TERM
    got = hae(*args, **kwargs, bootstrap_truncated=True)
    assert got.ret_low[5] == pytest.approx(10 + 0.9 * 30)
    assert got.ret_high[5] == got.ret_term[5] == pytest.approx(10 + 0.9 * 20)
    assert_same(hae(*args, **kwargs), GOLDEN, 1e-6)  # not asked for
    over = (REWARDS, SWITCHES, DONES, V_HIGH, V_LOW, V_TERM)  # an end is an end, whatever was written there
    assert_same(hae(*over, **SETTING, last_high=np.nan, last_low=np.nan, bootstrap_truncated=True), GOLDEN, 1e-6)
    # Each falls back to the same state's value by itself.
    half = hae(*args, **SETTING, last_high=20.0, bootstrap_truncated=True)
    assert half.ret_low[5] == pytest.approx(16.3) and half.ret_high[5] == pytest.approx(28)


# -- penalties, normalisation ------------------------------------------------------------------------


def spent(switches: list[int], **kwargs: Any) -> list[float]:
    """What the penalties put into the rewards (without a future and with nothing expected, A is the reward)."""
    none = np.zeros(len(switches))
    out = hae(none, switches, none, none, none, gamma=0, lam_turn=0, lam_seg=0, **kwargs)
    return [round(float(x), 9) for x in out.adv_low]


def test_keep_penalty() -> None:
    # A KEEP at turn 0 begins a segment, and is a KEEP still.
    assert spent([0, 1, 0, 0], keep_penalty=-0.4, keep_penalty_mode="fixed") == [-0.4, 0, -0.4, -0.4]
    assert spent([0, 1, 0, 0], keep_penalty=-0.4) == [-0.1, 0, -0.1, -0.1]  # -0.4 times its share of KEEP, 3/4
    assert spent([0], keep_penalty=-0.4) == [0]
    assert spent([0], keep_penalty=-0.4, keep_penalty_mode="fixed") == [-0.4]
    assert spent([1, 1], keep_penalty=-0.4) == [0, 0]


def test_switch_rate_floor() -> None:
    floor = {"switch_rate_floor": 0.5, "switch_rate_floor_coef": 6.0}
    assert spent([1, 0, 0, 0], **floor) == [0, -0.5, -0.5, -0.5]  # 6 (0.5 - 0.25) = 1.5 over three KEEPs
    assert spent([1, 0, 1, 0], **floor) == [0, 0, 0, 0]
    assert spent([0], **floor) == [0]
    assert spent([0, 0], **floor, keep_penalty=-1.0, keep_penalty_mode="fixed") == [-2.5, -2.5]


def test_keep_consistency() -> None:
    texts = ["go", "go", "stay", None, "stay", "", "rest"]
    keep = [0] * 7
    assert keep_consistency_penalty(keep, texts, -0.3).tolist() == [0, 0, -0.3, 0, 0, 0, 0]
    loose = keep_consistency_penalty(keep, texts, -0.3, requires_both=False)
    assert loose.tolist() == [0, 0, -0.3, -0.3, -0.3, -0.3, -0.3]
    assert not keep_consistency_penalty([1] * 7, texts, -0.3).any()
    assert keep_consistency_penalty([1, 0, 0], [(1, 2), (1, 2), (1, 3)], -0.3).tolist() == [0, 0, -0.3]
    with pytest.raises(ValueError, match="2 subgoals"):
        keep_consistency_penalty([1], ["a", "b"], -0.3)


@settings(max_examples=80)
@given(trajectories())
def test_normalised_levels_have_mean_0_each_over_its_own_turns(x: Trajectory) -> None:
    raw, got = hae(*x, **SETTING), hae(*x, **SETTING, normalize=True)
    boundary = x.switches.copy()
    boundary[0] = True
    everywhere = np.ones_like(boundary)
    for name, own in (("adv_low", everywhere), ("adv_high", boundary), ("adv_term", everywhere)):
        before, after = getattr(raw, name), getattr(got, name)
        assert after[own].mean() == pytest.approx(0, abs=1e-6)
        assert not after[~own].any()
        if before[own].std() > 1e-3:
            assert after[own].std() == pytest.approx(1, abs=1e-4)
            np.testing.assert_allclose(after[own], (before[own] - before[own].mean()) / before[own].std(), rtol=1e-4)
    for name in ("ret_low", "ret_high", "ret_term"):
        np.testing.assert_array_equal(getattr(got, name), getattr(raw, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_advantages_normalise_to_0_not_to_rounding_errors(dtype: torch.dtype) -> None:
    turns = 7
    nothing, on = np.zeros(turns), np.ones(turns)
    kwargs: dict[str, Any] = {"gamma": 0, "lam_turn": 0, "lam_seg": 0, "normalize": True}
    args = [on * 12345.1, on, nothing, nothing, nothing, nothing]
    assert not any(getattr(hae(*args, **kwargs), name).any() for name in ("adv_low", "adv_high", "adv_term"))
    got = hae_torch(*(torch.tensor(y, dtype=dtype)[None] for y in args), **kwargs)
    assert not (got.adv_low.any() or got.adv_high.any() or got.adv_term.any())


# -- many at once, and on tensors -----------------------------------------------------------------------


KNOBS = st.fixed_dictionaries(
    {
        "gamma": unit,
        "lam_turn": unit,
        "lam_seg": unit,
        "bootstrap_truncated": st.booleans(),
        "keep_penalty": st.sampled_from([0.0, -0.3]),
        "keep_penalty_mode": st.sampled_from(["fixed", "normalized"]),
        "switch_rate_floor": st.sampled_from([0.0, 0.5]),
        "switch_rate_floor_coef": st.just(5.0),
    }
)
BATCHES = st.lists(trajectories(7), min_size=1, max_size=5)


@settings(max_examples=100)
@given(BATCHES, KNOBS, st.integers(0, 3), st.booleans(), st.booleans())
def test_a_batch_is_its_trajectories_whatever_stands_in_the_padding(
    batch: list[Trajectory], knobs: dict[str, Any], padding: int, last: bool, head: bool
) -> None:
    lengths = np.array([len(x.rewards) for x in batch])
    columns: list[Any] = [np.concatenate(column) for column in zip(*batch, strict=True)]
    padded: list[Any] = []
    mask = np.arange(lengths.max() + padding) < lengths[:, None]
    for column in columns:
        filled = np.full(mask.shape, True) if column.dtype == bool else np.full(mask.shape, np.nan)
        filled[mask] = column
        padded.append(torch.tensor(filled))
    if not head:
        columns[5] = padded[5] = None
    ends = {k: np.arange(len(batch)) * 1.5 - 1 for k in ("last_high", "last_low")} if last else {}
    many = hae_many(lengths, *columns, **knobs, **ends)
    tensors = hae_torch(*padded, torch.tensor(mask), **knobs, **{k: torch.tensor(v) for k, v in ends.items()})
    start = 0
    for i, x in enumerate(batch):
        row = [*x[:5], x.v_term if head else None]
        one = hae(*row, **knobs, **{k: float(v[i]) for k, v in ends.items()})  # type: ignore[arg-type]
        assert_same(HAE(*(y[start : start + lengths[i]] for y in many)), one, 0)
        assert_same(HAE(*(y[i, : lengths[i]].numpy() for y in tensors)), one)
        assert not any(y[i, lengths[i] :].any() for y in tensors)
        start += lengths[i]
    assert head or not (many.adv_term.any() or many.ret_term.any())


@settings(max_examples=40)
@given(BATCHES)
def test_a_batch_is_normalised_as_a_whole(batch: list[Trajectory]) -> None:
    lengths = np.array([len(x.rewards) for x in batch])
    columns = [np.concatenate(column) for column in zip(*batch, strict=True)]
    mask = np.arange(lengths.max()) < lengths[:, None]
    padded = []
    for column in columns:
        filled = np.zeros(mask.shape, column.dtype)
        filled[mask] = column
        padded.append(torch.tensor(filled))
    many = hae_many(lengths, *columns, **SETTING, normalize=True)
    assert many.adv_low.mean() == pytest.approx(0, abs=1e-6)
    tensors = hae_torch(*padded, torch.tensor(mask), **SETTING, normalize=True)
    assert_same(HAE(*(y.numpy()[mask] for y in tensors)), many, 1e-5)
    assert not any(y[~torch.tensor(mask)].any() for y in tensors)


def test_discounts_of_each_turn_on_tensors() -> None:
    args = [np.array(x, np.float64) for x in (REWARDS, SWITCHES, NEVER, V_HIGH, V_LOW, V_TERM)]
    gamma = np.array([0.9, 0.5, 1.0, 0.7, 0.8, 0.3])
    kwargs: dict[str, Any] = {"lam_turn": 0.8, "lam_seg": 0.95, "bootstrap_truncated": True}
    got = hae_torch(*(torch.tensor(x)[None] for x in args), gamma=torch.tensor(gamma)[None], **kwargs)
    assert_same(HAE(*(x[0].numpy() for x in got)), hae(*args, gamma=gamma, **kwargs))


def test_no_gradient_flows_and_values_may_be_bfloat16() -> None:
    r = torch.tensor([REWARDS], dtype=torch.float32)
    flags = torch.tensor([SWITCHES]), torch.tensor([DONES])
    values = [torch.tensor([v], dtype=torch.bfloat16, requires_grad=True) for v in (V_HIGH, V_LOW, V_TERM)]
    got = hae_torch(r, *flags, *values, **SETTING)
    assert all(x.dtype == torch.float32 and not x.requires_grad for x in got)
    assert_same(HAE(*(x[0].numpy() for x in got)), GOLDEN, 1e-5)


def test_what_does_not_fit_is_said() -> None:
    good: list[Any] = [REWARDS, SWITCHES, DONES, V_HIGH, V_LOW, V_TERM]
    for i, name in enumerate(("rewards", "switches", "dones", "v_high", "v_low", "v_term")):
        bad = [*good]
        bad[i] = [1.0, 2.0]
        with pytest.raises(ValueError, match="switches" if i == 0 else name):
            hae(*bad, **SETTING)
    with pytest.raises(ValueError, match="gamma"):
        hae(*good, gamma=[0.9], lam_turn=1, lam_seg=1)
    with pytest.raises(ValueError, match="normalized"):
        hae(*good, **SETTING, keep_penalty_mode="linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one turn"):
        hae([], [], [], [], [], [], **SETTING)
    with pytest.raises(ValueError, match="at least one turn"):
        hae_many([4, 1], *good, **SETTING)
    tensors = [torch.tensor([x]) for x in good]
    with pytest.raises(ValueError, match="v_low"):
        hae_torch(*tensors[:4], tensors[4][:, :3], **SETTING)
    for mask in ([1, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]):
        with pytest.raises(ValueError, match="padding"):
            hae_torch(*tensors, torch.tensor([mask]), **SETTING)
    with pytest.raises(ValueError, match="normalized"):
        hae_torch(*tensors, **SETTING, keep_penalty_mode="linear")  # type: ignore[arg-type]


# -- the paper's switch advantage ------------------------------------------------------------------------


def test_option_critic_by_hand() -> None:
    # Choosing anew is worth 2 more: a switch that had 0.25 to come gets 0.75 * 2, a KEEP -0.25 * 2.
    got = hae_switch_option_critic([3, 3, 3], [1, 1, 3], [1, 0, 1], [0.25, 0.25, 0.25])
    assert got.tolist() == [1.5, -0.5, 0]
    with pytest.raises(ValueError, match="beta"):
        hae_switch_option_critic([3.0], [1.0], [1], [0.5, 0.5])


@settings(max_examples=40)
@given(st.floats(-8, 8, width=16), st.floats(-8, 8, width=16), unit)
def test_option_critic_is_the_advantage_of_a_sampled_decision(high: float, low: float, beta: float) -> None:
    """Value of the decision minus the mean over decisions; so its own mean is 0."""
    switch, keep = hae_switch_option_critic([high, high], [low, low], [1, 0], [beta, beta])
    mean = beta * high + (1 - beta) * low
    assert switch == pytest.approx(high - mean, abs=1e-9)
    assert keep == pytest.approx(low - mean, abs=1e-9)


# -- HiPER's claim: less variance than flat GAE ---------------------------------------------------------------

SEGMENTS, LENGTH, EPISODES = 5, 8, 4000
GAIN, SKILL = 1.0, 0.5


class Sample(NamedTuple):
    """Per episode the policy gradient's two parts: for the subgoals' log-odds, and for the actions'."""

    high: Array
    low: Array

    @property
    def variance(self) -> float:
        return float(self.high.var() + self.low.var())


class Chain:
    """Episodes of 5 segments of 8 turns. A subgoal (0 or 1) is drawn at each segment's start and adds itself to every
    reward in it; each turn's action (0 or 1) adds half of itself; on top comes noise N(0, 1). All is drawn evenly
    (log-odds 0), so all values, and the gradient, are known exactly."""

    def __init__(self) -> None:
        turns = SEGMENTS * LENGTH
        shape = EPISODES, turns
        rng = np.random.Generator(np.random.Philox(key=[16165, 0]))
        subgoals, actions = rng.integers(0, 2, (EPISODES, SEGMENTS)), rng.integers(0, 2, shape)
        running, at = np.repeat(subgoals, LENGTH, 1), np.arange(turns)
        self.rewards = GAIN * running + SKILL * actions + rng.normal(size=shape)
        rest, behind, mean = LENGTH - at % LENGTH, turns - at // LENGTH * LENGTH - LENGTH, (GAIN + SKILL) / 2
        self.v_high = np.broadcast_to((rest + behind) * mean, shape).astype(np.float64)
        self.v_low = rest * (GAIN * running + SKILL / 2) + behind * mean
        self.start = np.broadcast_to(at % LENGTH == 0, shape)
        self.done = np.broadcast_to(at == turns - 1, shape)
        # d log pi / d log-odds of what was drawn.
        self.subgoal_score, self.action_score = subgoals - 0.5, actions - 0.5
        self.exact = turns * GAIN / 4, turns * SKILL / 4

    def gradient(self, of_subgoals: Array, of_actions: Array) -> Sample:
        high = (of_subgoals[self.start].reshape(EPISODES, -1) * self.subgoal_score).sum(1)
        return Sample(high, (of_actions * self.action_score).sum(1))

    def flat(self, lam: float) -> Sample:
        """Every choice of a turn gets the turn's GAE. Its critic is exact and knows the subgoal that runs: it is
        the best that a critic of turns can be."""
        value = np.where(self.start, self.v_high, self.v_low)
        after = np.concatenate([value[:, 1:], np.zeros((EPISODES, 1))], 1)
        r, v, n = (x.T.astype(np.float32) for x in (self.rewards, value, after))
        advantages = gae(r, v, n, self.done.T, self.done.T, gamma=1.0, lam=lam)[0].T.astype(np.float64)
        return self.gradient(advantages, advantages)

    def hae(self, lam_turn: float, lam_seg: float) -> Sample:
        arrays = (x.ravel() for x in (self.rewards, self.start, self.done, self.v_high, self.v_low))
        lengths = np.full(EPISODES, SEGMENTS * LENGTH)
        out = hae_many(lengths, *arrays, gamma=1.0, lam_turn=lam_turn, lam_seg=lam_seg)
        return self.gradient(out.adv_high.reshape(EPISODES, -1), out.adv_low.reshape(EPISODES, -1))


@pytest.fixture(scope="module")
def chain() -> Chain:
    return Chain()


def assert_unbiased(sample: Sample, chain: Chain) -> None:
    for part, exact in zip(sample, chain.exact, strict=True):
        assert part.mean() == pytest.approx(exact, abs=4 * part.std() / EPISODES**0.5)


def test_hae_has_less_variance_than_flat_gae(chain: Chain) -> None:
    """At λ = 1 everywhere, where flat GAE has no bias whatever its critic is worth, HAE's gradient has a fifth of its
    variance here, and the same mean. All that is gained is the actions': their advantage ends with the segment, so
    what later segments bring is no noise to it. The subgoals' part is the same number.

    Exact values are assumed. Where V^H errs, HAE's low level inherits the error, as every bootstrap does; that HAE
    wins then, too, isn't claimed."""
    flat, hier = chain.flat(1.0), chain.hae(1.0, 1.0)
    assert_unbiased(flat, chain)
    assert_unbiased(hier, chain)
    np.testing.assert_allclose(hier.high, flat.high, rtol=1e-4, atol=1e-3)
    assert hier.low.var() < 0.15 * flat.low.var()
    assert hier.variance < 0.3 * flat.variance


def test_hae_with_hipers_traces_has_less_variance_at_both_levels(chain: Chain) -> None:
    """HiPER's settings against those of the flat PPO beside it: λ_turn = 1 and λ_seg = 0.95 against λ = 1."""
    flat, hier = chain.flat(1.0), chain.hae(1.0, 0.95)
    assert_unbiased(hier, chain)
    assert hier.high.var() < 0.9 * flat.high.var()
    assert hier.low.var() < 0.15 * flat.low.var()


def test_what_is_not_claimed_of_the_subgoals_part(chain: Chain) -> None:
    """One λ < 1 for both says less than it seems to: a trace that decays by 0.95 a segment is longer than one that
    decays by 0.95 a turn, and with exact values a longer trace is only noise. Then the subgoals' part has *more*
    variance in HAE. The actions' part, and the sum, still have less."""
    flat, hier = chain.flat(0.95), chain.hae(0.95, 0.95)
    assert hier.high.var() > 2 * flat.high.var()
    assert hier.low.var() < 0.3 * flat.low.var()
    assert hier.variance < 0.6 * flat.variance
