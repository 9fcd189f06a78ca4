"""Mixing networks: a team's value never falls when an agent's rises, and each mixer says what its paper says."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from echelon.mixing import MonotonicMixer, SumMixer


def mixer(num_agents: int = 3, state_size: int = 5, seed: int = 0, spread: float = 1.0) -> MonotonicMixer:
    """A small mixer whose weights are `spread` times the usual."""
    scale = np.linspace(0.1, 1, state_size, dtype=np.float32)
    made = MonotonicMixer(num_agents, scale, embed=4, hidden=6, generator=torch.Generator().manual_seed(seed))
    for p in made.parameters():
        p.data.mul_(spread)
    return made


@settings(max_examples=150)
@given(
    hnp.arrays(np.float32, (7, 3), elements=st.floats(-20, 20, width=16)),
    hnp.arrays(np.int8, (7, 5)),
    st.integers(0, 2**31),
    st.sampled_from([0.1, 1.0, 10.0]),
)
def test_no_agents_value_lowers_the_teams(values: np.ndarray, state: np.ndarray, seed: int, spread: float) -> None:
    leaf = torch.from_numpy(values).requires_grad_()
    (slope,) = torch.autograd.grad(mixer(seed=seed, spread=spread)(leaf, torch.from_numpy(state)).sum(), leaf)
    assert (slope >= 0).all()


@settings(max_examples=50)
@given(st.integers(0, 2**31), hnp.arrays(np.float32, (3, 4), elements=st.floats(-20, 20, width=16)))
def test_the_best_action_of_each_agent_is_the_best_joint_action(seed: int, values: np.ndarray) -> None:
    """QMIX's Eq. 4, by enumeration of all joint actions."""
    state = torch.randint(-100, 100, (1, 5), generator=torch.Generator().manual_seed(seed))
    joint = torch.cartesian_prod(*torch.from_numpy(values))
    best = mixer(seed=seed)(joint, state.expand(len(joint), -1)).max()
    alone = mixer(seed=seed)(torch.from_numpy(values).amax(1)[None], state)[0]
    torch.testing.assert_close(alone, best)


def test_by_hand() -> None:
    """The state decides weights and biases: written out with NumPy for one row."""
    m = mixer()
    values, state = np.array([[1.0, -2.0, 0.5]]), np.array([[3, -1, 4, 1, -5]], np.int8)
    w = {name: p.detach().numpy().astype(np.float64) for name, p in m.named_parameters()}
    first = w["first.weight"] @ (state[0] * np.linspace(0.1, 1, 5)) + w["first.bias"]
    inner, outer, bias, value = np.split(first, [6, 12, 16])
    weights = np.abs(w["inner.weight"] @ np.maximum(inner, 0) + w["inner.bias"]).reshape(3, 4)
    hidden = values[0] @ weights + bias
    hidden = np.where(hidden > 0, hidden, np.expm1(hidden))
    wanted = hidden @ np.abs(w["outer.weight"] @ np.maximum(outer, 0) + w["outer.bias"])
    wanted += w["value.weight"][0] @ np.maximum(value, 0) + w["value.bias"][0]
    got = m(torch.from_numpy(values).float(), torch.from_numpy(state))
    assert got.shape == (1,) and got.dtype == torch.float32
    np.testing.assert_allclose(got.item(), wanted, rtol=1e-5)


def test_the_state_decides_how_agents_are_weighed() -> None:
    values = torch.tensor([[1.0, 0.0, 0.0]]).expand(2, -1)
    states = torch.tensor([[100, 0, 0, 0, 0], [0, 0, 0, 0, 100]], dtype=torch.int8)
    leaf = values.clone().requires_grad_()
    (slope,) = torch.autograd.grad(mixer()(leaf, states).sum(), leaf)
    assert not torch.allclose(slope[0], slope[1])


def test_vdn_is_the_sum_and_has_nothing_to_learn() -> None:
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(SumMixer()(values, torch.zeros(6, 2)), values.sum(1))
    assert not list(SumMixer().parameters())


def test_initial_weights_come_from_the_generator_alone() -> None:
    torch.manual_seed(1)
    one = list(mixer(seed=4).parameters())
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(one, mixer(seed=4).parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, mixer(seed=5).parameters(), strict=True))
