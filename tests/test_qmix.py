"""QMIX and VDN: what each can represent, what is never chosen, what a time limit is worth, and exact resumption."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from echelon.advantages import td_lambda
from echelon.algorithms import QMIX, QMIXConfig, VDNConfig, config_of, create
from echelon.buffers import ReplayMemory, RolloutBuffer
from echelon.checkpoints import checkpoints_of, load_checkpoint
from echelon.configs import RunConfig
from echelon.envs import WarehouseConfig
from echelon.errors import EchelonError
from echelon.networks import MLP, epsilon_greedy
from echelon.rng import spawn_keys
from echelon.training import Rollouts, Trainer

W, A, D, S, K, T = 6, 3, 7, 5, 4, 8
QUICK: dict[str, Any] = {
    "hidden": 16, "embed": 4, "rollout": T, "warmup": 0, "batch": 2 * W * T, "replay": 4.0, "memory": 3 * W * T,
    "epsilon_start": 0.5, "epsilon_end": 0.1, "epsilon_steps": 500, "tau": 0.2, "lr": 2e-3,
}  # fmt: skip


def build(name: str = "qmix", *, seed: int = 0, threads: int = 1, worlds: int = W, **changes: Any) -> QMIX:
    """A small algorithm."""
    config = config_of(name)(**{**QUICK, **changes})
    made = create(
        name, config, num_envs=worlds, num_agents=A, obs_scale=np.full(D, 0.05, np.float32),
        state_scale=np.full(S, 0.05, np.float32), num_actions=K, team_reward=True, seed=seed, threads=threads,
    )  # fmt: skip
    assert isinstance(made, QMIX)
    return made


def random_mask(rng: np.random.Generator, *shape: int) -> NDArray[np.uint8]:
    """Masks with at least one legal action a row."""
    mask = (rng.random((*shape, K)) < 0.5).astype(np.uint8)
    np.put_along_axis(mask, rng.integers(0, K, (*shape, 1)), 1, -1)
    return mask


def random_rollout(algorithm: QMIX, rng: np.random.Generator, *, cuts: float = 0.15) -> RolloutBuffer:
    """A rollout of a world without sense, in which `algorithm` acts; episodes terminate and are truncated."""
    worlds, steps = algorithm.shape[0], algorithm.config.rollout
    buffer = RolloutBuffer(steps, worlds, A, D, S, K)
    algorithm.begin_rollout()
    for t in range(steps + 1):
        buffer.obs[t] = rng.integers(-20, 21, buffer.obs[t].shape)
        buffer.state[t] = rng.integers(-20, 21, buffer.state[t].shape)
        buffer.mask[t] = random_mask(rng, worlds, A)
        if t == steps:
            break
        buffer.actions[t], buffer.logp[t] = algorithm.act(buffer.obs[t], buffer.mask[t], buffer.begins[t])
        buffer.reward[t] = rng.normal(size=(worlds, A))
        terminated, truncated = rng.random((2, worlds)) < cuts
        truncated &= ~terminated
        buffer.terminated[t], buffer.ended[t] = terminated[:, None], (terminated | truncated)[:, None]
        buffer.begins[t + 1] = terminated | truncated
        if truncated.any():
            n = int(truncated.sum())
            buffer.finals.append((
                t, np.flatnonzero(truncated), rng.integers(-20, 21, (n, A, D)).astype(np.int8),
                rng.integers(-20, 21, (n, S)).astype(np.int8), random_mask(rng, n, A),
            ))  # fmt: skip
    return buffer


# -- what each mixing network can represent -----------------------------------------------------

COMMON, COORDINATED = np.full((2, 2), 7.0), np.array([[0.0, 1.0], [1.0, 8.0]])


def two_step_game(name: str, seed: int) -> float:
    """The payoff of the greedy team after learning QMIX's two-step game (Rashid et al. 2018, section 5) at random.

    In state 0 the first agent's action chooses between the games of states 1 and 2, whose payoffs are `COMMON` and
    `COORDINATED`. Exploration is full and targets look one step ahead, as in the paper.
    """
    worlds, agents = 16, 2
    config = config_of(name)(
        gamma=0.99, rollout=4, hidden=32, epsilon_start=1.0, epsilon_end=1.0, lam=0.0, lr=2e-3, memory=4096, warmup=0,
        batch=128, replay=8.0, tau=0.05,
    )  # fmt: skip
    team = create(
        name, config, num_envs=worlds, num_agents=agents, obs_scale=np.ones(5, np.float32),
        state_scale=np.ones(3, np.float32), num_actions=2, team_reward=True, seed=seed,
    )  # fmt: skip
    at = np.zeros(worlds, np.int64)
    mask = np.ones((worlds, agents, 2), np.uint8)
    buffer = RolloutBuffer(4, worlds, agents, 5, 3, 2)
    buffer.mask[:] = 1

    def look(t: int) -> None:
        buffer.state[t] = np.eye(3, dtype=np.int8)[at]
        buffer.obs[t, :, :, :3] = buffer.state[t][:, None]
        buffer.obs[t, :, :, 3:] = np.eye(2, dtype=np.int8)
        buffer.begins[t] = at == 0

    def step(actions: NDArray[np.int8]) -> NDArray[np.float64]:
        first, second = actions.T.astype(np.int64)
        payoff = np.where(at == 1, COMMON[first, second], np.where(at == 2, COORDINATED[first, second], 0.0))
        at[:] = np.where(at == 0, 1 + first, 0)
        return payoff

    for _ in range(250):
        team.begin_rollout()
        for t in range(4):
            look(t)
            over = at > 0
            buffer.actions[t], _ = team.act(buffer.obs[t], mask, buffer.begins[t])
            buffer.reward[t] = step(buffer.actions[t])[:, None]
            buffer.terminated[t] = buffer.ended[t] = over[:, None]
        look(4)
        team.update(buffer)
    payoff = np.zeros(worlds)
    for _ in range(2):
        look(0)
        payoff += step(team.act(buffer.obs[0], mask, buffer.begins[0], greedy=True)[0])
    assert len(set(payoff)) == 1
    return float(payoff[0])


@pytest.mark.parametrize("seed", range(4))
def test_qmix_solves_the_two_step_game_and_vdn_can_not(seed: int) -> None:
    assert two_step_game("qmix", seed) == 8
    assert two_step_game("vdn", seed) == 7


# -- what is chosen -----------------------------------------------------------------------------


@settings(max_examples=150)
@given(st.data(), st.sampled_from([0.0, 0.3, 1.0]))
def test_illegal_actions_are_never_chosen(data: st.DataObject, epsilon: float) -> None:
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)))
    values = data.draw(hnp.arrays(np.float32, shape, elements=st.floats(-50, 50, width=16)))
    mask = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 1)))
    mask[..., data.draw(st.integers(0, shape[2] - 1))] = 1
    keys, counters = data.draw(hnp.arrays(np.uint64, shape[0])), np.arange(shape[0], dtype=np.uint64)
    actions = np.full(shape[:2], -1, np.int8)
    epsilon_greedy(values, mask, keys, counters, epsilon, actions)
    assert (np.take_along_axis(mask, actions[..., None].astype(np.int64), -1) == 1).all()
    assert counters.tolist() == list(range(1, shape[0] + 1))
    if epsilon == 0:
        assert (actions == np.where(mask == 1, values, -np.inf).argmax(-1)).all(), "of equals the first"


def test_random_actions_are_as_many_as_epsilon_says_and_even() -> None:
    worlds = 20_000
    values = np.tile(np.array([5, 1, 9, 0, 3], np.float32), (worlds, 2, 1))
    mask = np.ones(values.shape, np.uint8)
    mask[..., 2] = 0
    actions = np.zeros((worlds, 2), np.int8)
    epsilon_greedy(values, mask, spawn_keys(3, (1,), worlds), np.zeros(worlds, np.uint64), 0.4, actions)
    shares = np.bincount(actions.ravel(), minlength=5) / actions.size
    np.testing.assert_allclose(shares, [0.7, 0.1, 0, 0.1, 0.1], atol=0.008)
    assert abs(np.mean((actions[:, 0] == 0) & (actions[:, 1] == 0)) - 0.49) < 0.015, "agents explore apart"


def test_epsilon_falls_evenly_and_a_loaded_policy_acts_greedily() -> None:
    rng = np.random.default_rng(0)
    learner = build(epsilon_start=1.0, epsilon_end=0.2, epsilon_steps=4 * W * T)
    seen = []
    for _ in range(6):
        seen.append(learner.epsilon)
        learner.update(random_rollout(learner, rng))
    np.testing.assert_allclose(seen, [1.0, 0.8, 0.6, 0.4, 0.2, 0.2])
    actor = build(seed=9, worlds=40, epsilon_eval=0.0)
    actor.load_state_dict(learner.state_dict(), policy_only=True)
    assert actor.epsilon == 0
    obs, mask = rng.integers(-20, 21, (40, A, D)).astype(np.int8), random_mask(rng, 40, A)
    agent = learner.agents[0]
    assert isinstance(agent, MLP)
    values = agent.forward(torch.from_numpy(obs).view(-1, D))[0].view(40, A, K).numpy()
    actions, logp = actor.act(obs, mask, np.zeros(40, bool))
    np.testing.assert_array_equal(actions, np.where(mask == 1, values, -np.inf).argmax(-1))
    assert not logp.any()
    trembling = build(worlds=40, epsilon_eval=1.0)
    trembling.load_state_dict(learner.state_dict(), policy_only=True)
    assert (trembling.act(obs, mask, np.zeros(40, bool))[0] != actions).any()
    assert (trembling.act(obs, mask, np.zeros(40, bool), greedy=True)[0] == actions).all()


# -- what is learnt from ------------------------------------------------------------------------


def by_hand(team: QMIX, buffer: RolloutBuffer, *, mask_targets: bool = True) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients over all segments of `buffer`, by plain autograd, one step of one world at a time."""
    c, T = team.config, buffer.steps
    finals = {(t, int(w)): (obs[i], state[i], mask[i]) for t, ws, obs, state, mask in buffer.finals
              for i, w in enumerate(ws)}  # fmt: skip
    nets = []
    for agent in team.agents:
        assert isinstance(agent, MLP)
        nets.append(
            [p.clone().requires_grad_() for pair in zip(agent.weights, agent.biases, strict=True) for p in pair]
        )
    scale = torch.full((D,), 0.05)

    def q(net: list[torch.Tensor], obs: NDArray[np.int8]) -> torch.Tensor:
        x = torch.from_numpy(obs).float() * scale
        for i in range(0, len(net), 2):
            x = x @ net[i].T + net[i + 1]
            x = x.relu() if i < len(net) - 2 else x
        return x

    losses = []
    for w in range(buffer.obs.shape[1]):
        ahead = np.zeros(T, np.float32)
        for t in range(T):
            obs, state, mask = finals.get((t, w), (buffer.obs[t + 1, w], buffer.state[t + 1, w], buffer.mask[t + 1, w]))
            with torch.no_grad():
                legal = torch.from_numpy(mask) == 1 if mask_targets else torch.ones(A, K, dtype=torch.bool)
                best = torch.where(legal, q(nets[0], obs), -torch.inf).argmax(-1)
                worth = q(nets[1], obs)[torch.arange(A), best]
                ahead[t] = team.mixers[1](worth[None], torch.from_numpy(state)[None]).item()
        reward = buffer.reward[:, w].mean(1)
        terminated, ended = buffer.terminated[:, w].all(1), buffer.ended[:, w].all(1)
        targets = td_lambda(reward, ahead, terminated, ended, gamma=c.gamma, lam=c.lam)
        for t in range(T):
            taken = q(nets[0], buffer.obs[t, w])[torch.arange(A), torch.from_numpy(buffer.actions[t, w]).long()]
            got = team.mixers[0](taken[None], torch.from_numpy(buffer.state[t, w])[None])[0]
            losses.append(torch.nn.functional.huber_loss(got, torch.tensor(float(targets[t])), delta=10.0))
    loss = torch.stack(losses).mean()
    mixer = list(team.mixers[0].parameters())
    grads = torch.autograd.grad(loss, [*mixer, *nets[0]])
    flat = torch.cat([g.flatten() for g in grads[len(mixer) :]])
    # The first layer's weights are kept unscaled.
    return loss.item(), [*grads[: len(mixer)], flat]


@pytest.mark.parametrize("name", ["qmix", "vdn"])
def test_gradients_are_those_of_the_definition(name: str) -> None:
    """Double Q, masks, finals, TD(λ), the mixer and the hand-written backward pass, against a loop with autograd."""
    rng = np.random.default_rng(1)
    team = build(name, batch=W * T)
    team.update(random_rollout(team, rng))  # so that the targets differ from what learns
    for agent in team.agents:
        assert isinstance(agent, MLP)
        agent.weights[-1].mul_(100)  # and actions from each other: the last layer begins near 0
    team.memory.segments = team.memory._next = 0
    buffer = random_rollout(team, rng)
    assert buffer.finals
    team.memory.add(buffer, np.zeros((W, A, 0), np.float32))
    loss, value, target = team._gradient(np.arange(W))
    wanted, grads = by_hand(team, buffer)
    assert loss == pytest.approx(wanted, rel=1e-4)
    for p, grad in zip(team.params, grads, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, grad.view_as(p), rtol=2e-3, atol=1e-5)
    assert np.isfinite([value, target]).all()
    assert by_hand(team, buffer, mask_targets=False)[0] != pytest.approx(loss, rel=1e-3), "masks decide targets"


def targets_of(team: QMIX, buffer: RolloutBuffer) -> float:
    """The mean target of a rollout."""
    team.memory.segments = team.memory._next = 0
    team.memory.add(buffer, team._hidden_start.view(*team.shape, team.hidden.shape[1]).numpy())
    return float(team._gradient(np.arange(W))[2])


@pytest.mark.parametrize("recurrent", [False, True])
def test_a_time_limit_bootstraps_from_the_true_last_state_and_an_end_does_not(recurrent: bool) -> None:
    rng = np.random.default_rng(2)
    team = build(lam=0.5, recurrent=recurrent)
    buffer = random_rollout(team, rng, cuts=0.0)
    buffer.ended[3] = buffer.begins[4] = True
    last = rng.integers(-20, 21, (W, A, D)).astype(np.int8), rng.integers(-20, 21, (W, S)).astype(np.int8)
    legal = random_mask(rng, W, A)
    buffer.finals = [(3, np.arange(W), *last, legal)]
    cut = targets_of(team, buffer)
    # What the next episode begins with doesn't matter to the steps before it, nor to the target of step 3.
    before = buffer.obs[4].copy()
    buffer.finals = [(3, np.arange(W), -last[0], last[1], legal)]
    assert targets_of(team, buffer) != cut, "the true last state counts"
    buffer.terminated[3] = True
    over = targets_of(team, buffer)
    assert over != cut
    buffer.finals = [(3, np.arange(W), *last, legal)]
    assert targets_of(team, buffer) == over, "what follows an end is never looked at"
    assert (buffer.obs[4] == before).all()


def test_a_time_limit_is_worth_what_it_cut_off() -> None:
    """Reward 1 a step, cut every 4 steps: the learnt value is 1 / (1 - gamma) = 5; taken for an end, below 3."""
    rng = np.random.default_rng(3)
    values = []
    for truncated in (True, False):
        team = build(gamma=0.8, lam=0.6, lr=5e-3, replay=16.0)
        for _ in range(60):
            buffer = random_rollout(team, rng, cuts=0.0)
            buffer.obs[:], buffer.state[:], buffer.reward[:] = 1, 1, 1
            for t in (3, 7):
                buffer.ended[t] = buffer.begins[t + 1] = True
                if truncated:
                    same = np.ones((W, A, D), np.int8), np.ones((W, S), np.int8), np.ones((W, A, K), np.uint8)
                    buffer.finals.append((t, np.arange(W), *same))
                else:
                    buffer.terminated[t] = True
            log = team.update(buffer)
        values.append(log["value"])
    assert abs(values[0] - 5) < 0.5
    assert values[1] < 3.2


def test_one_agents_end_does_not_end_the_team() -> None:
    """A reached subgoal cuts its agent; the team's value goes on until all have ended. Rewards are averaged."""
    rng = np.random.default_rng(4)
    memory = ReplayMemory(1, T, W, A, D, S, K, 0)
    buffer = random_rollout(build(), rng, cuts=0.0)
    buffer.terminated[2, 0, 1] = buffer.ended[2, 0, 1] = True
    buffer.terminated[5, 0] = buffer.ended[5, 0] = True
    memory.add(buffer, np.zeros((W, A, 0), np.float32))
    taken = memory.take(np.array([0]))
    assert np.flatnonzero(taken.terminated[0]).tolist() == np.flatnonzero(taken.ended[0]).tolist() == [5]
    np.testing.assert_allclose(taken.reward[0], buffer.reward[:, 0].mean(-1))


def test_the_memory_is_a_ring_of_whole_rollouts() -> None:
    rng = np.random.default_rng(5)
    team = build()
    memory = ReplayMemory(2, T, W, A, D, S, K, 0)
    kept = []
    for n in range(5):
        kept = [*kept[-1:], random_rollout(team, rng)]
        memory.add(kept[-1], np.zeros((W, A, 0), np.float32))
        assert memory.segments == min(n + 1, 2) * W
        assert len(memory._finals) == sum(len(f[1]) for b in kept for f in b.finals) == memory._cut.sum()
    newest = slice(0, W)  # the fifth rollout took the place of the third
    taken = memory.take(np.arange(W))
    for name in ("obs", "state", "mask", "begins", "actions"):
        np.testing.assert_array_equal(getattr(taken, name), getattr(kept[1], name).swapaxes(0, 1)[newest])
    wanted = {(int(w), t): (obs[i], state[i], mask[i]) for t, ws, obs, state, mask in kept[1].finals
              for i, w in enumerate(ws)}  # fmt: skip
    assert {(int(b), int(t)) for b, t in taken.final_at.T} == set(wanted)
    for i, (b, t) in enumerate(taken.final_at.T):
        for got, want in zip((taken.final_obs, taken.final_state, taken.final_mask), wanted[b, t], strict=True):
            np.testing.assert_array_equal(got[i], want)


def test_nothing_is_learnt_before_the_warm_up_and_a_single_world_will_do() -> None:
    rng = np.random.default_rng(6)
    team = build(worlds=1, warmup=T, batch=1)
    before = [p.clone() for p in team.params]
    assert set(team.update(random_rollout(team, rng))) == {"epsilon"}
    assert all(torch.equal(a, b) for a, b in zip(before, team.params, strict=True))
    log = team.update(random_rollout(team, rng))
    assert team.gradient_steps == 4
    assert set(log) == {"td_loss", "value", "target", "grad_norm", "epsilon"}
    assert not any(torch.equal(a, b) for a, b in zip(before, team.params, strict=True))


def test_targets_follow_softly_or_are_copied() -> None:
    rng = np.random.default_rng(7)
    soft = build(replay=2.0, tau=0.25)
    old = [t.clone() for t in soft.targets]
    soft.update(random_rollout(soft, rng))
    for target, before, p in zip(soft.targets, old, soft.params, strict=True):
        torch.testing.assert_close(target.data, before + 0.25 * (p.data - before))
    hard = build(replay=2.0, tau=1.0, target_every=3)
    for n in range(1, 7):
        hard.update(random_rollout(hard, rng))
        equal = all(torch.equal(t.data, p.data) for t, p in zip(hard.targets, hard.params, strict=True))
        assert equal == (n % 3 == 0)


# -- exact ---------------------------------------------------------------------------------------


def trail(team: QMIX, updates: int, seed: int) -> list[dict[str, float]]:
    """What a number of updates on random rollouts log."""
    rng = np.random.default_rng(seed)
    return [team.update(random_rollout(team, rng)) for _ in range(updates)]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("name", ["qmix", "vdn"])
@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("before", [0, 2, 4])
def test_resumed_is_uninterrupted(name: str, recurrent: bool, before: int) -> None:
    """Also with a memory that is empty, half full or has gone round; the state survives a file."""
    import safetensors.torch

    whole = build(name, recurrent=recurrent, warmup=0)
    trail(whole, before, 1)
    saved = safetensors.torch.load(safetensors.torch.save(whole.state_dict()))
    resumed = build(name, recurrent=recurrent, warmup=0, seed=5)
    resumed._replay_key = whole._replay_key  # comes from the seed of the run, which a resumed run has too
    trail(resumed, 1, 9)  # whatever it did before is forgotten
    resumed.load_state_dict(saved)
    same(resumed.state_dict(), whole.state_dict())
    assert trail(resumed, 3, 2) == trail(whole, 3, 2)
    same(resumed.state_dict(), whole.state_dict())


def test_a_saved_state_does_not_change_with_what_is_learnt_later() -> None:
    team = build()
    trail(team, 2, 0)
    state = team.state_dict()
    copy = {name: value.clone() for name, value in state.items()}
    trail(team, 3, 1)
    same(state, copy)


@pytest.mark.parametrize("recurrent", [False, True])
def test_threads_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, recurrent: bool) -> None:
    monkeypatch.setattr("echelon.networks.Lanes.LEAST", 8)
    torch.set_num_threads(1)
    states = []
    for threads in (1, 2, 4):
        team = build(threads=threads, recurrent=recurrent)
        trail(team, 3, 0)
        states.append(team.state_dict())
    same(states[0], states[1])
    same(states[0], states[2])


def test_one_seed_decides() -> None:
    logs = [trail(build(seed=seed), 3, 0) for seed in (1, 1, 2)]
    assert logs[0] == logs[1] != logs[2]


def test_a_policy_of_another_shape_is_one_line() -> None:
    with pytest.raises(EchelonError, match=r"the saved agent doesn't fit: .*algorithm.hidden"):
        build(hidden=8).load_state_dict(build().state_dict(), policy_only=True)
    with pytest.raises(EchelonError, match=r"the saved mixer doesn't fit: .*algorithm.mixer"):
        build("qmix").load_state_dict(build("vdn").state_dict())


@pytest.mark.parametrize("changes", [
    {"lam": 1.5}, {"lr": 0.0}, {"epsilon_end": -0.1}, {"epsilon_steps": 0}, {"memory": 0}, {"batch": 0}, {"tau": 0.0},
    {"warmup": -1}, {"target_every": 0}, {"rollout": 0}, {"epsilon_eval": 2.0}, {"replay": 0.0}, {"embed": 0},
])  # fmt: skip
def test_settings_that_make_no_sense_are_one_line(changes: dict[str, Any]) -> None:
    name = next(iter(changes))
    with pytest.raises(EchelonError, match=f"algorithm.{name} is"):
        QMIXConfig(**changes)
    assert dataclasses.replace(VDNConfig(), lr=1e-3).mixer == "vdn"


# -- memory that is needed -----------------------------------------------------------------------


def remembered(recurrent: bool, seed: int) -> float:
    """The share of worlds whose agent repeats, two steps later, a bit that it saw only at first."""
    worlds = 32
    config = QMIXConfig(
        recurrent=recurrent, hidden=16, rollout=6, lam=0.0, lr=3e-3, epsilon_steps=4000, memory=worlds * 6 * 16,
        warmup=0, batch=384, replay=8.0, tau=0.1, gamma=0.9,
    )  # fmt: skip
    team = create(
        "qmix", config, num_envs=worlds, num_agents=1, obs_scale=np.ones(4, np.float32),
        state_scale=np.ones(3, np.float32), num_actions=2, team_reward=True, seed=seed,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    buffer = RolloutBuffer(6, worlds, 1, 4, 3, 2)
    buffer.mask[:] = 1
    bit = np.zeros(worlds, np.int64)

    def look(t: int) -> None:
        phase = t % 3
        if phase == 0:
            bit[:] = rng.integers(0, 2, worlds)
        buffer.obs[t] = 0
        buffer.obs[t, :, 0, 1 + phase] = 1
        buffer.obs[t, :, 0, 0] = np.where(phase == 0, 2 * bit - 1, 0)
        buffer.state[t], buffer.begins[t] = np.eye(3, dtype=np.int8)[phase], phase == 0

    greedy = 0.0
    for n in range(121):
        team.begin_rollout()
        for t in range(6):
            look(t)
            buffer.actions[t], _ = team.act(buffer.obs[t], buffer.mask[t], buffer.begins[t], greedy=n == 120)
            buffer.reward[t] = ((buffer.actions[t, :, 0] == bit) & (t % 3 == 2))[:, None]
            buffer.terminated[t] = buffer.ended[t] = t % 3 == 2
            greedy = float(buffer.reward[t].mean()) if n == 120 else 0.0
        look(6)
        if n < 120:
            team.update(buffer)
    return greedy


def test_a_recurrent_team_learns_what_needs_memory() -> None:
    assert min(remembered(True, seed) for seed in range(2)) == 1.0
    assert max(remembered(False, seed) for seed in range(2)) < 0.9


# -- in the real loop ----------------------------------------------------------------------------


def loop(method: str, **changes: Any) -> Rollouts:
    """The training loop on tiny worlds whose episodes are cut in every rollout."""
    algorithm = config_of({"flat-ippo": "ippo"}.get(method, method))(hidden=16, rollout=8, **changes)
    made = Rollouts(RunConfig(
        method=method, env=WarehouseConfig(size=8, num_agents=2, num_packages=6, limit=5), num_envs=8, threads=1,
        algorithm=algorithm,
    ))  # fmt: skip
    made.worlds.start()
    return made


@pytest.mark.parametrize("recurrent", [False, True])
def test_a_run_stopped_after_every_update_is_the_one_that_never_was(tmp_path: Path, recurrent: bool) -> None:
    config = dataclasses.replace(loop("qmix", warmup=0, batch=64, memory=192, recurrent=recurrent).config, steps=384)
    assert Trainer(config, tmp_path / "whole").run()
    Trainer(config, tmp_path / "halting").run(should_stop=lambda: True)
    while not Trainer.resume(tmp_path / "halting").run(should_stop=lambda: True):
        pass
    whole, halting = (load_checkpoint(checkpoints_of(tmp_path / name / "checkpoints")[-1]).algorithm
                      for name in ("whole", "halting"))  # fmt: skip
    same(whole, halting)
    assert len(whole["memory.obs"]) == 24 and len(whole["memory.final_at"])
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "halting")]
    assert logs[0] == logs[1]


def test_rollouts_carry_the_true_last_masks() -> None:
    """The mask of a cut episode's last state is that of where its agents stood, not of where the next begins."""
    rollouts = loop("qmix", warmup=0, batch=64)
    env = rollouts.worlds.env
    seen: list[NDArray[np.uint8]] = []
    settle: Callable[[], NDArray[np.bool_]] = rollouts.worlds.settle

    def watch() -> NDArray[np.bool_]:
        walls = (env.grid[np.arange(8)[:, None, None], env.pos[:, :, None] + env.offsets] & 1) == 0
        seen.append(walls.astype(np.uint8))
        return settle()

    rollouts.worlds.settle = watch  # type: ignore[method-assign]
    rollouts.collect()
    buffer = rollouts.buffer
    t, worlds, _, _, mask = buffer.finals[0]
    assert t == 4 and len(worlds) == 8
    np.testing.assert_array_equal(mask, seen[4])
    assert (mask != buffer.mask[5]).any()
    for k in itertools.chain(range(4), range(5, 8)):
        np.testing.assert_array_equal(buffer.mask[k + 1], seen[k])
    assert np.take_along_axis(buffer.mask[:8], buffer.actions[..., None].astype(np.int64), -1).all()
    assert rollouts.algorithm.update(buffer)["td_loss"] > 0


def test_an_ippo_critic_sees_nothing_but_its_agents_own_observation() -> None:
    """Neither the state nor a teammate's observation changes a value, and nothing is learnt from the state."""
    buffers, params = [], []
    for noise in (False, True):
        rollouts = loop("flat-ippo", precision="float32")
        rollouts.collect()
        buffer, algorithm = rollouts.buffer, rollouts.algorithm
        if noise:
            rng = np.random.default_rng(0)
            buffer.state[:] = rng.integers(-100, 100, buffer.state.shape)
            buffer.finals = [(t, w, obs, -state, mask) for t, w, obs, state, mask in buffer.finals]
        algorithm.update(buffer)
        buffers.append(buffer)
        params.append(algorithm.state_dict())
    same(*params)
    values, _ = algorithm._values(buffers[1])
    buffers[1].obs[:, :, 1] = 7
    changed, _ = algorithm._values(buffers[1])
    np.testing.assert_array_equal(changed[:, :, 0], values[:, :, 0])
    assert (changed[:, :, 1] != values[:, :, 1]).any()
