"""Networks, policies and random numbers: hand-written gradients against autograd, draws against their chances."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from echelon import networks
from echelon.networks import MLP, Lanes, RecurrentMLP, ValueNorm, ppo_policy_gradient, resolve_precision, sample_actions
from echelon.rng import below, mix, spawn_keys, uniform

Array = NDArray[np.float32]


def mlp(sizes: tuple[int, ...] = (6, 9, 7, 3), dtype: torch.dtype = torch.float32, *, plain: bool = False) -> MLP:
    """A small network with an uneven input scale (ones if `plain`) and biases that aren't zero."""
    scale = np.ones(sizes[0], np.float32) if plain else np.linspace(0.05, 1.5, sizes[0], dtype=np.float32)
    net = MLP(sizes, scale, last_gain=0.7, dtype=dtype, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    for bias in net.biases:
        bias.copy_(torch.randn(bias.shape, generator=generator) * 0.3)
    return net


def reference(net: MLP, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The same function by autograd in float32: its outputs and its parameters, in the order of `flat`."""
    params = [p.clone().requires_grad_() for pair in zip(net.weights, net.biases, strict=True) for p in pair]
    h = x.float() * net._scale
    for i in range(0, len(params), 2):
        h = torch.nn.functional.linear(h, params[i], params[i + 1])
        if i < len(params) - 2:
            h = torch.relu(h)
    return h, params


def flat_grad(params: list[Tensor]) -> Tensor:
    return torch.cat([p.grad.view(-1) for p in params if p.grad is not None])


@pytest.mark.parametrize("sizes", [(6, 9, 7, 3), (4, 1), (5, 8, 1)])
def test_forward_and_backward_are_those_of_autograd(sizes: tuple[int, ...]) -> None:
    net = mlp(sizes)
    x = torch.randint(-20, 21, (33, sizes[0]), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    weights = torch.randn(33, sizes[-1], generator=torch.Generator().manual_seed(2))
    out, kept = net.forward(x)
    wanted, params = reference(net, x)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    (wanted * weights).sum().backward()  # type: ignore[no-untyped-call]
    net.backward(kept, weights)
    net.collect()
    assert net.flat.grad is not None
    torch.testing.assert_close(net.flat.grad, flat_grad(params), rtol=1e-4, atol=1e-4)
    assert net.flat.grad.abs().sum() > 1


def test_bfloat16_is_close() -> None:
    net = mlp((16, 64, 64, 5), torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-3, 4, (256, 16), generator=generator).to(torch.int8)
    weights = torch.randn(256, 5, generator=generator) / 256
    out, kept = net.forward(x)
    assert out.dtype == torch.float32
    assert all(h.dtype == torch.bfloat16 for h in kept)
    wanted, params = reference(net, x)
    torch.testing.assert_close(out, wanted, rtol=0.05, atol=0.05)
    (wanted * weights).sum().backward()  # type: ignore[no-untyped-call]
    net.backward(kept, weights)
    net.collect()
    assert net.flat.grad is not None
    assert net.flat.grad.dtype == torch.float32
    exact = flat_grad(params)
    assert torch.nn.functional.cosine_similarity(net.flat.grad, exact, dim=0) > 0.999
    assert (net.flat.grad - exact).norm() < 0.03 * exact.norm()


def test_the_gradients_of_all_lanes_are_collected_once() -> None:
    net = mlp()
    x = torch.randn(11, 6, generator=torch.Generator().manual_seed(5))
    g = torch.randn(11, 3, generator=torch.Generator().manual_seed(6))
    _, kept = net.forward(x)
    net.backward(kept, g)
    net.collect()
    assert net.flat.grad is not None
    once = net.flat.grad.clone()
    for lane in range(Lanes.COUNT):
        _, kept = net.forward(x, lane)
        net.backward(kept, g, lane)
    net.backward(kept, g, Lanes.COUNT - 1)
    net.collect()
    torch.testing.assert_close(net.flat.grad, (Lanes.COUNT + 1) * once)
    net.collect()
    assert not net.flat.grad.any()


@pytest.mark.parametrize("threads", [2, 3, 4, 9])
def test_threads_do_not_change_one_bit(threads: int) -> None:
    x = torch.randn(5000, 6, generator=torch.Generator().manual_seed(5))
    g = torch.randn(5000, 3, generator=torch.Generator().manual_seed(6))
    found = []
    for lanes in (Lanes(1), Lanes(threads)):
        net = mlp()

        def work(lane: int, piece: slice, net: MLP = net) -> Tensor:
            out, kept = net.forward(x[piece], lane)
            net.backward(kept, g[piece], lane)
            return out

        pieces = lanes.cut(len(x))
        assert len(pieces) == Lanes.COUNT
        outs = torch.cat(lanes.run(work, pieces))
        net.collect()
        found.append((outs, net.flat.grad.clone()))  # type: ignore[union-attr]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_lanes_cut_every_row_once_and_pass_errors_on() -> None:
    for rows in (1, 7, 1024, 2048, 5001):
        assert [i for s in Lanes(2).cut(rows) for i in range(rows)[s]] == list(range(rows))

    def fail(lane: int, piece: slice) -> None:
        raise ValueError(f"lane {lane}")

    with pytest.raises(ValueError, match="lane"):
        Lanes(2).run(fail, Lanes(2).cut(5000))


def test_the_flat_parameter_is_the_weights() -> None:
    """An optimiser that moves `flat` moves the network, along the gradient that `backward` left."""
    net = mlp(plain=True)
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(7))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    losses = []
    for _ in range(30):
        out, kept = net.forward(x)
        losses.append(float((out**2).mean()))
        net.backward(kept, 2 * out / out.numel())
        net.collect()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]


def test_the_input_scale_is_folded_in() -> None:
    """A scaled network fed x is the plain network fed scale * x, and its weights are those of the scaled input."""
    scaled, plain = mlp(), mlp(plain=True)
    torch.testing.assert_close(scaled.flat, plain.flat)
    x = torch.randint(-9, 10, (8, 6), generator=torch.Generator().manual_seed(8)).float()
    out, kept = scaled.forward(x)
    wanted, wanted_kept = plain.forward(x * scaled._scale)
    torch.testing.assert_close(out, wanted)
    g = torch.ones(8, 3)
    scaled.backward(kept, g)
    plain.backward(wanted_kept, g)
    scaled.collect()
    plain.collect()
    torch.testing.assert_close(scaled.flat.grad, plain.flat.grad, rtol=1e-4, atol=1e-4)


def test_initial_weights_are_orthogonal_with_the_documented_gains() -> None:
    net = MLP(
        (8, 16, 4), np.ones(8, np.float32), last_gain=0.01, dtype=torch.float32,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    torch.testing.assert_close(net.weights[0].T @ net.weights[0], 2 * torch.eye(8), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.weights[1] @ net.weights[1].T, 1e-4 * torch.eye(4), rtol=1e-4, atol=1e-8)
    assert not any(bias.any() for bias in net.biases)


# -- policies -------------------------------------------------------------------------------------------------------


def surrogate(
    logits: Tensor, mask: Tensor, actions: Tensor, old_logp: Tensor, advantages: Tensor, clip: float, entropy: float
) -> Tensor:
    """PPO's loss as it is written down, for autograd, in float64."""
    log_p = torch.log_softmax(logits.masked_fill(~mask, -torch.inf), -1)
    ratio = torch.exp(log_p.gather(1, actions[:, None])[:, 0] - old_logp)
    policy = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    spread = -(log_p.exp() * log_p.masked_fill(~mask, 0)).sum(-1)
    return -policy.mean() - entropy * spread.mean()


@st.composite
def batches(draw: st.DrawFn) -> tuple[Array, NDArray[np.uint8], NDArray[np.int8], Array, Array]:
    """Logits, masks with at least one legal action, legal actions, old log-probabilities, advantages."""
    rows, num = draw(st.integers(1, 6)), draw(st.integers(2, 5))
    logits = draw(hnp.arrays(np.float32, (rows, num), elements=st.floats(-6, 6, width=16)))
    mask = draw(hnp.arrays(np.uint8, (rows, num), elements=st.integers(0, 1)))
    actions = draw(hnp.arrays(np.int8, rows, elements=st.integers(0, num - 1)))
    mask[np.arange(rows), actions] = 1
    change = draw(hnp.arrays(np.float32, rows, elements=st.floats(-1.5, 1.5, width=16)))
    advantages = draw(hnp.arrays(np.float32, rows, elements=st.floats(-3, 3, width=16)))
    log_p = np.where(mask, logits, -np.inf)
    log_p = log_p - np.log(np.exp(log_p).sum(-1, keepdims=True))
    old = (log_p[np.arange(rows), actions] - change).astype(np.float32)
    return logits, mask, actions, old, advantages


@settings(max_examples=200)
@given(batches(), st.sampled_from([0.1, 0.2, 0.5]), st.sampled_from([0.0, 0.01, 1.0]))
def test_policy_gradient_is_that_of_the_stated_loss(
    batch: tuple[Array, NDArray[np.uint8], NDArray[np.int8], Array, Array], clip: float, entropy: float
) -> None:
    logits, mask, actions, old, advantages = batch
    x = torch.from_numpy(logits).double().requires_grad_()
    args = [torch.from_numpy(a) for a in (mask.astype(bool), actions.astype(np.int64), old, advantages)]
    args[2:] = [a.double() for a in args[2:]]
    legal = args[0]
    log_p = torch.log_softmax(x.detach().masked_fill(~legal, -torch.inf), -1)
    change = log_p.gather(1, args[1][:, None])[:, 0] - args[2]
    # At the very corners of the clip the gradient isn't defined.
    assume(bool(((change.exp() - 1).abs() - clip).abs().min() > 1e-4))
    loss = surrogate(x, *args, clip, entropy)
    loss.backward()  # type: ignore[no-untyped-call]
    grad = np.full_like(logits, np.nan)
    policy_loss, mean_entropy, kl, clipped = ppo_policy_gradient(
        logits, mask, actions, old, advantages, clip, entropy, grad
    )
    assert (grad[mask == 0] == 0).all(), "masked actions get exactly nothing"
    np.testing.assert_allclose(grad, x.grad, rtol=1e-3, atol=2e-5)
    spread = float(-(log_p.exp() * log_p.masked_fill(~legal, 0)).sum(-1).mean())
    assert mean_entropy == pytest.approx(spread, abs=1e-4)
    assert policy_loss - entropy * mean_entropy == pytest.approx(loss.item(), rel=1e-3, abs=1e-3)
    assert kl == pytest.approx(float((change.exp() - 1 - change).mean()), rel=1e-3, abs=1e-4)
    outside = ((change.exp() > 1 + clip) & (args[3] > 0)) | ((change.exp() < 1 - clip) & (args[3] < 0))
    assert clipped == pytest.approx(float(outside.double().mean()))


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"), [(1.3, 1, False), (1.3, -1, True), (0.7, 1, True), (0.7, -1, False)]
)
def test_the_clip_stops_only_what_goes_too_far(ratio: float, advantage: float, moves: bool) -> None:
    logits, mask = np.zeros((1, 2), np.float32), np.ones((1, 2), np.uint8)
    old = np.array([np.log(0.5) - np.log(ratio)], np.float32)
    grad = np.empty_like(logits)
    loss, _, _, clipped = ppo_policy_gradient(
        logits, mask, np.zeros(1, np.int8), old, np.array([advantage], np.float32), 0.2, 0.0, grad
    )
    assert bool(grad.any()) is moves
    assert clipped == (not moves)
    bounded = float(np.clip(ratio, 0.8, 1.2))
    assert loss == pytest.approx(-min(ratio * advantage, bounded * advantage), abs=1e-5)
    if moves:
        assert grad[0] == pytest.approx([-ratio * advantage * 0.5, ratio * advantage * 0.5], abs=1e-5)


def draw(
    logits: Array, mask: NDArray[np.uint8], keys: NDArray[np.uint64], counters: NDArray[np.uint64], *, greedy: bool
) -> tuple[NDArray[np.int8], Array]:
    """`sample_actions` with fresh outputs."""
    actions, logp = np.full(mask.shape[:2], -1, np.int8), np.full(mask.shape[:2], np.nan, np.float32)
    sample_actions(logits, mask, keys, counters, greedy, actions, logp)
    return actions, logp


def test_draws_have_the_frequencies_of_the_softmax() -> None:
    worlds, agents = 400, 3
    logits = np.tile(np.array([0.3, -1.2, 2.0, 0.0, 0.9], np.float32), (worlds, agents, 1))
    mask = np.ones(logits.shape, np.uint8)
    mask[:, :, 2] = 0
    keys, counters = spawn_keys(11, (1,), worlds), np.zeros(worlds, np.uint64)
    seen = np.zeros((agents, 5))
    for _ in range(25):
        actions, _ = draw(logits, mask, keys, counters, greedy=False)
        for a in range(agents):
            seen[a] += np.bincount(actions[:, a], minlength=5)
    chances = np.exp([0.3, -1.2, 0.0, 0.9])
    chances /= chances.sum()
    assert not seen[:, 2].any()
    for a in range(agents):
        assert stats.chisquare(seen[a, [0, 1, 3, 4]], chances * seen[a].sum()).pvalue > 1e-3
    # Different agents and different steps draw independently of each other.
    first, _ = draw(logits, mask, keys, counters, greedy=False)
    second, _ = draw(logits, mask, keys, counters, greedy=False)
    for x, y in ((first[:, 0], first[:, 1]), (first[:, 0], second[:, 0]), (first[:, 1], second[:, 0])):
        same = (x == y).mean()
        assert abs(same - (chances**2).sum()) < 5 * (0.25 / worlds) ** 0.5


@settings(max_examples=150)
@given(st.data(), st.booleans())
def test_no_masked_action_is_ever_taken_and_log_probabilities_are_right(data: st.DataObject, greedy: bool) -> None:
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)))
    logits = data.draw(hnp.arrays(np.float32, shape, elements=st.floats(-50, 50, width=16)))
    mask = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 1)))
    mask[..., data.draw(st.integers(0, shape[2] - 1))] = 1
    keys = data.draw(hnp.arrays(np.uint64, shape[0]))
    counters = data.draw(hnp.arrays(np.uint64, shape[0], elements=st.integers(0, 2**58 - 2)))
    before = counters.copy()
    actions, logp = draw(logits, mask, keys, counters, greedy=greedy)
    assert (np.take_along_axis(mask, actions[..., None].astype(np.int64), -1) == 1).all()
    assert (counters == before + np.uint64(1)).all()
    log_p = np.where(mask == 1, logits.astype(np.float64), -np.inf)
    log_p -= np.logaddexp.reduce(log_p, -1, keepdims=True)
    np.testing.assert_allclose(logp, np.take_along_axis(log_p, actions[..., None].astype(np.int64), -1)[..., 0],
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    if greedy:
        assert (actions == log_p.argmax(-1)).all(), "of equals the first"


def test_a_worlds_draws_do_not_depend_on_the_batch() -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(8, 4, 5)).astype(np.float32)
    mask = np.ones((8, 4, 5), np.uint8)
    keys, counters = spawn_keys(5, (3,), 8), np.arange(8, dtype=np.uint64)
    alone = [draw(logits[w : w + 1], mask[w : w + 1], keys[w : w + 1], counters[w : w + 1].copy(), greedy=False)
             for w in range(8)]  # fmt: skip
    actions, logp = draw(logits, mask, keys, counters, greedy=False)
    np.testing.assert_array_equal(actions, np.concatenate([a for a, _ in alone]))
    np.testing.assert_array_equal(logp, np.concatenate([p for _, p in alone]))
    assert counters.tolist() == list(range(1, 9))


# -- normaliser -----------------------------------------------------------------------------------------------------


def test_value_norm_is_the_weighted_mean_and_deviation() -> None:
    norm = ValueNorm(decay=0.9)
    assert norm.moments() == (0.0, 1.0)
    rng = np.random.default_rng(3)
    batches = [rng.normal(100 + i, 3, (8, 4, 2)).astype(np.float32) for i in range(20)]
    for batch in batches:
        norm.update(batch)
    weights = 0.9 ** np.arange(len(batches) - 1, -1, -1)
    means = np.array([b.astype(np.float64).mean() for b in batches])
    squares = np.array([(b.astype(np.float64) ** 2).mean() for b in batches])
    mean = (weights * means).sum() / weights.sum()
    square = (weights * squares).sum() / weights.sum()
    assert norm.moments() == pytest.approx((mean, (square - mean**2) ** 0.5), rel=1e-9)


def test_value_norm_of_one_batch_is_exact_and_never_divides_by_nothing() -> None:
    norm = ValueNorm()
    batch = np.array([[1.0, 2.0], [4.0, 9.0]], np.float32)
    norm.update(batch)
    assert norm.moments() == pytest.approx((4.0, float(batch.std())))
    constant = ValueNorm()
    constant.update(np.full((4, 4), 7.0, np.float32))
    assert constant.moments() == pytest.approx((7.0, 0.01))


def test_value_norm_keeps_a_small_deviation_beside_a_large_mean() -> None:
    norm = ValueNorm()
    norm.update(np.random.default_rng(0).normal(3000, 1, 4096).astype(np.float32))
    assert norm.moments()[1] == pytest.approx(1, rel=0.05)


# -- recurrence -----------------------------------------------------------------------------------------------------


def recurrent(dtype: torch.dtype = torch.float32) -> RecurrentMLP:
    scale = np.linspace(0.1, 1, 5, dtype=np.float32)
    return RecurrentMLP((5, 8, 3), scale, last_gain=1.0, dtype=dtype, generator=torch.Generator().manual_seed(0))


def test_an_episode_that_begins_forgets_all_before() -> None:
    net = recurrent()
    x = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(1))
    begins = torch.zeros(6, 2, dtype=torch.bool)
    begins[3, 0] = True
    hidden = torch.randn(2, 8, generator=torch.Generator().manual_seed(2))
    out, last = net.forward(x, hidden, begins)
    fresh, fresh_last = net.forward(x[3:], torch.zeros(2, 8), begins[3:])
    torch.testing.assert_close(out[3:, 0], fresh[:, 0])
    torch.testing.assert_close(last[0], fresh_last[0])
    assert not torch.allclose(out[3:, 1], fresh[:, 1]), "the other sequence remembers"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_at_once_is_the_sequence_step_by_step(dtype: torch.dtype) -> None:
    net = recurrent(dtype)
    x = torch.randint(-5, 6, (7, 3, 5), generator=torch.Generator().manual_seed(3)).to(torch.int8)
    begins = torch.rand(7, 3, generator=torch.Generator().manual_seed(4)) < 0.3
    hidden = torch.zeros(3, 8)
    whole, last = net.forward(x, hidden, begins)
    steps = []
    for t in range(7):
        out, hidden = net.forward(x[t : t + 1], hidden, begins[t : t + 1])
        steps.append(out[0])
    torch.testing.assert_close(whole, torch.stack(steps), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, hidden, rtol=1e-5, atol=1e-5)
    assert whole.dtype == last.dtype == torch.float32


def test_gradients_stop_where_an_episode_begins() -> None:
    net = recurrent()
    x = torch.randn(4, 1, 5, generator=torch.Generator().manual_seed(5)).requires_grad_()
    begins = torch.tensor([[False], [False], [True], [False]])
    out, _ = net.forward(x, torch.zeros(1, 8), begins)
    out[3].sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert not x.grad[:2].any()
    assert x.grad[2].any()


# -- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [False, True])
def test_auto_takes_bfloat16_only_where_it_is_fast(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(networks, "fast_bfloat16", lambda: fast)
    assert resolve_precision("auto") is (torch.bfloat16 if fast else torch.float32)
    assert resolve_precision("float32") is torch.float32
    assert resolve_precision("bfloat16") is torch.bfloat16


# -- random numbers -------------------------------------------------------------------------------------------------


def test_mix_is_splitmix64() -> None:
    """The first numbers of the generator's reference implementation, seeded with 1234567."""
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [int(mix(np.uint64(1234567), np.uint64(i))) for i in range(4)] == wanted


def test_below_and_uniform_are_the_high_bits_of_mix() -> None:
    key = np.uint64(1234567)
    assert [int(below(key, np.uint64(i), 100)) for i in range(4)] == [
        (int(mix(key, np.uint64(i))) >> 32) * 100 >> 32 for i in range(4)
    ] == [35, 17, 53, 24]  # fmt: skip
    assert float(uniform(key, np.uint64(0))) == (6457827717110365317 >> 11) / 2**53


@pytest.mark.parametrize("n", [1, 2, 7, 100, 2**31 + 1, 2**32 - 1])
def test_below_stays_below(n: int) -> None:
    numbers = [int(below(np.uint64(9), np.uint64(i), n)) for i in range(500)]
    assert min(numbers) >= 0
    assert max(numbers) < n
    assert n == 1 or max(numbers) >= n // 2


def test_numbers_are_uniform_over_counters_and_over_keys() -> None:
    keys = spawn_keys(0, (9,), 4000)
    makers: list[Callable[[int], tuple[np.uint64, np.uint64]]] = [
        lambda i: (keys[0], np.uint64(i)), lambda i: (keys[i], np.uint64(0)), lambda i: (np.uint64(i), np.uint64(0)),
    ]  # fmt: skip
    for of in makers:
        u = [float(uniform(*of(i))) for i in range(4000)]
        assert 0 <= min(u) <= max(u) < 1
        assert stats.kstest(u, "uniform").pvalue > 1e-3
        counts = np.bincount([int(below(*of(i), 10)) for i in range(4000)], minlength=10)
        assert stats.chisquare(counts).pvalue > 1e-3


def test_a_worlds_key_depends_on_seed_stream_and_index_alone() -> None:
    many = spawn_keys(7, (1,), 64)
    assert many.dtype == np.uint64
    for count in (1, 2, 33):
        np.testing.assert_array_equal(spawn_keys(7, (1,), count), many[:count])
    sets = [set(spawn_keys(seed, stream, 64).tolist()) for seed in (7, 8) for stream in ((0,), (1,), (1, 0))]
    assert all(len(s) == 64 for s in sets)
    assert not any(x & y for x, y in itertools.combinations(sets, 2))
