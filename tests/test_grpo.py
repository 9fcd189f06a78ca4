"""Flat GRPO: what its advantages are, what it learns from and what not, that it learns, and exact resumption."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from echelon.advantages import group_relative
from echelon.algorithms import GRPO, GRPOConfig, create
from echelon.algorithms.grpo import first_episodes
from echelon.buffers import RolloutBuffer
from echelon.checkpoints import checkpoints_of, load_checkpoint
from echelon.configs import RunConfig
from echelon.envs import WarehouseConfig
from echelon.errors import EchelonError
from echelon.evaluation import evaluate
from echelon.methods import Method, methods, register
from echelon.training import Rollouts, Trainer, load_policy

W, A, D, S, K, T, GROUP = 8, 2, 6, 3, 4, 5, 4
ONES = np.ones(D, np.float32)


def build(**changes: Any) -> GRPO:
    """A small algorithm."""
    kept: dict[str, Any] = {"group": GROUP, "rollout": T, "hidden": 16, "precision": "float32", **changes}
    worlds, threads = kept.pop("worlds", W), kept.pop("threads", 1)
    made = create(
        "grpo", GRPOConfig(**kept), num_envs=worlds, num_agents=A, obs_scale=ONES, num_actions=K,
        state_scale=np.ones(S, np.float32), team_reward=True, seed=0, threads=threads,
    )  # fmt: skip
    assert isinstance(made, GRPO)
    return made


def empty(worlds: int = W, steps: int = T) -> RolloutBuffer:
    """A rollout of zeros in which each world plays one episode that nothing ends; every action is legal."""
    buffer = RolloutBuffer(steps, worlds, A, D, S, K)
    buffer.mask[:] = 1
    buffer.begins[0] = True
    return buffer


def random_rollout(algorithm: GRPO, rng: np.random.Generator, cuts: float = 0.3) -> RolloutBuffer:
    """A rollout of a world without sense, in which `algorithm` acts."""
    worlds, steps = algorithm.shape[0], algorithm.config.rollout
    buffer = empty(worlds, steps)
    algorithm.begin_rollout()
    for t in range(steps):
        buffer.obs[t] = rng.integers(-3, 4, buffer.obs[t].shape)
        buffer.actions[t], buffer.logp[t] = algorithm.act(buffer.obs[t], buffer.mask[t], buffer.begins[t])
        buffer.reward[t] = rng.normal(size=(worlds, 1))
        buffer.begins[t + 1] = rng.random(worlds) < cuts
    return buffer


def weights(algorithm: GRPO) -> list[Tensor]:
    return [p.detach().clone() for p in algorithm.actor_params]


# -- the arithmetic ----------------------------------------------------------------------------


def test_scores_are_those_of_a_calculation_by_hand() -> None:
    """Gamma 1/2; world 0 plays on to the end, world 1 ends after two steps, world 2 after one, world 3 after each."""
    buffer = empty(4)
    buffer.reward[:] = 1
    buffer.reward[1, 0] = (3, 5)  # of two agents: 4 is the team's
    buffer.reward[0, 2] = -2
    buffer.begins[2, 1] = buffer.begins[1, 2] = True
    buffer.begins[:, 3] = True
    scores, played = first_episodes(buffer, 0.5)
    np.testing.assert_allclose(scores, [1 + 2 + 0.25 + 0.125 + 0.0625, 1.5, -2, 1], rtol=1e-15)
    np.testing.assert_array_equal(played.sum(0), [5, 2, 1, 1])
    assert played[0].all() and played.dtype == bool


def test_a_rollout_that_begins_in_the_midst_of_an_episode_is_refused() -> None:
    """Its score would be that of half an episode, and its group's others would be in another state."""
    buffer = empty()
    buffer.begins[0, 3] = False
    with pytest.raises(ValueError, match="must begin an episode with the rollout"):
        build().update(buffer)
    with pytest.raises(ValueError, match="reshape"):
        build(worlds=6).update(empty(6))


def test_faster_teams_score_higher_unless_gamma_is_one() -> None:
    buffer = empty()
    for w in range(W):
        buffer.reward[w % T, w] = 1
    scores, _ = first_episodes(buffer, 0.9)
    assert (np.diff(scores[:T]) < 0).all()
    np.testing.assert_array_equal(first_episodes(buffer, 1.0)[0], np.ones(W))


@pytest.mark.parametrize("normalize", ["std", "mean"])
@pytest.mark.parametrize("recurrent", [False, True])
def test_every_step_of_an_episode_gets_its_groups_relative_score(
    normalize: Any, recurrent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the actor learns from: the played pairs, each once an epoch, with the advantage of their world's episode."""
    team = build(normalize=normalize, recurrent=recurrent, epochs=2, minibatches=2, gamma=1.0)
    buffer = random_rollout(team, np.random.default_rng(0))
    told: list[tuple[Tensor, NDArray[np.float32]]] = []

    def spy(buffer: Any, rows: Tensor, worlds: Tensor, advantages: NDArray[np.float32], **_: float) -> Any:
        assert not recurrent or set((rows % W).tolist()) <= set(worlds.tolist())
        told.append((rows, advantages))
        return np.zeros(4)

    monkeypatch.setattr(team, "_actor_step", spy)
    learnt = team.update(buffer)
    scores, played = first_episodes(buffer, 1.0)
    by_group = scores.reshape(-1, GROUP)
    centred = by_group - by_group.mean(1, keepdims=True)
    spread = by_group.std(1, ddof=1, keepdims=True) + 1e-6 if normalize == "std" else 1
    for _, advantages in told:
        assert advantages.shape == (T, W, A)
        np.testing.assert_allclose(advantages, np.broadcast_to((centred / spread).reshape(1, W, 1), (T, W, A)), 1e-5)
    assert len(told) == 4
    for epoch in (told[:2], told[2:]):
        rows = torch.cat([rows for rows, _ in epoch]).numpy()
        np.testing.assert_array_equal(np.sort(rows), np.flatnonzero(played))
    assert 0 < played.mean() < 1 and learnt["played"] == played.mean()
    assert learnt["informative"] == 1 and learnt["score_best"] == by_group.max(1).mean() > learnt["score"]


def test_groups_whose_teams_are_all_equal_are_told_and_teach_nothing() -> None:
    """Without an entropy bonus the weights stay, bit for bit, though both groups score."""
    team = build(entropy=0.0)
    buffer = random_rollout(team, np.random.default_rng(1), cuts=0)
    buffer.reward[:] = np.arange(T)[:, None, None]
    buffer.reward[:, GROUP:] += 0.1
    before = weights(team)
    learnt = team.update(buffer)
    assert learnt["informative"] == learnt["score_spread"] == 0 and learnt["score"] > 1
    assert all(torch.equal(a, b) for a, b in zip(before, weights(team), strict=True))


@pytest.mark.parametrize("recurrent", [False, True])
def test_what_comes_after_the_first_episode_teaches_nothing(recurrent: bool) -> None:
    """Other moves, rewards and probabilities there: the same weights; elsewhere: others."""
    one, other, third = (build(recurrent=recurrent) for _ in range(3))
    buffers = [random_rollout(team, np.random.default_rng(2)) for team in (one, other, third)]
    assert np.array_equal(buffers[0].actions, buffers[1].actions)
    _, played = first_episodes(buffers[0], 0.9)
    rest = ~played
    assert rest.any()
    rng = np.random.default_rng(3)
    for buffer, where in zip(buffers[1:], (rest, played), strict=True):
        shape = (int(where.sum()), A)
        buffer.actions[where] = rng.integers(0, K, shape)
        buffer.logp[where] = -rng.random(shape)
        buffer.reward[where] = rng.normal(size=shape)
        buffer.obs[:T][where] = rng.integers(-3, 4, (*shape, D))
    for team, buffer in zip((one, other, third), buffers, strict=True):
        team.update(buffer)
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(one), weights(third), strict=True))


@settings(max_examples=30)
@given(st.lists(st.floats(-50, 50), min_size=2, max_size=2), st.integers(0, 2**32))
def test_what_a_whole_group_gets_alike_changes_no_advantage(offsets: list[float], seed: int) -> None:
    """Easy and hard episodes count the same: only the differences inside a group teach."""
    buffer = random_rollout(build(), np.random.default_rng(seed))
    groups = np.arange(W) // GROUP
    plain = group_relative(first_episodes(buffer, 0.9)[0], groups)
    buffer.reward[0] += np.repeat(offsets, GROUP)[:, None].astype(np.float32)
    np.testing.assert_allclose(group_relative(first_episodes(buffer, 0.9)[0], groups), plain, atol=2e-3)


# -- learning ----------------------------------------------------------------------------------


def right_moves(team: GRPO, updates: int) -> float:
    """The share of right moves after learning a game in which an agent's observation names the move to make.

    The team's reward is its share of right moves, plus something that depends on the episode alone and is far larger:
    only the comparison inside a group tells what was good.
    """
    rng = np.random.default_rng(5)
    worlds, steps = team.shape[0], team.config.rollout
    buffer = empty(worlds, steps)
    for _ in range(updates):
        team.begin_rollout()
        luck = rng.normal(0, 10, worlds // team.group).repeat(team.group)
        for t in range(steps):
            right = rng.integers(0, K, (worlds // team.group, A)).repeat(team.group, 0)
            buffer.obs[t] = np.eye(K, D, dtype=np.int8)[right]
            buffer.actions[t], buffer.logp[t] = team.act(buffer.obs[t], buffer.mask[t], buffer.begins[t])
            buffer.reward[t] = ((buffer.actions[t] == right).mean(1) + luck)[:, None]
        team.update(buffer)
    right = rng.integers(0, K, (worlds, A))
    obs = np.eye(K, D, dtype=np.int8)[right]
    actions, _ = team.act(obs, buffer.mask[0], np.ones(worlds, bool), greedy=True)
    return float((actions == right).mean())


@pytest.mark.parametrize("recurrent", [False, True])
def test_a_game_is_learnt_by_comparing_teams_alone(recurrent: bool) -> None:
    """With advantages of the wrong sign none would be right, with shuffled ones or no groups a quarter."""
    team = build(worlds=64, rollout=4, gamma=1.0, lr=5e-3, recurrent=recurrent)
    assert right_moves(team, 60) >= 0.95


@pytest.mark.parametrize("change", [lambda a: -a, lambda a: np.roll(a, 1)], ids=["wrong-sign", "shuffled"])
def test_that_game_is_not_learnt_with_other_advantages(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above would fail were they wrong."""
    monkeypatch.setattr(
        "echelon.algorithms.grpo.group_relative", lambda *args, **kwargs: change(group_relative(*args, **kwargs))
    )
    assert right_moves(build(worlds=64, rollout=4, gamma=1.0, lr=5e-3), 60) < 0.6


# -- state -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recurrent", [False, True])
def test_a_state_that_is_put_back_goes_on_the_same(recurrent: bool) -> None:
    """All that decides what is learnt and drawn next, and nothing of a critic."""
    team = build(recurrent=recurrent)
    team.update(random_rollout(team, np.random.default_rng(6)))
    state = team.state_dict()
    assert not [name for name in state if "critic" in name or "value" in name]
    copy = build(recurrent=recurrent)
    copy.load_state_dict(state)
    for one in (team, copy):
        one.update(random_rollout(one, np.random.default_rng(7)))
    ours, theirs = team.state_dict(), copy.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    elsewhere = build(recurrent=recurrent, worlds=3)
    elsewhere.load_state_dict(team.state_dict(policy_only=True), policy_only=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(team), weights(elsewhere), strict=True))
    with pytest.raises(EchelonError, match="the saved actor doesn't fit"):
        build(hidden=8).load_state_dict(state)


def test_threads_change_no_bit() -> None:
    """On batches that are large enough to be cut."""
    teams = [build(worlds=512, rollout=8, threads=threads) for threads in (1, 3)]
    for team in teams:
        team.update(random_rollout(team, np.random.default_rng(8)))
    one, three = (team.state_dict() for team in teams)
    assert all(torch.equal(one[name], three[name]) for name in one)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"group": 1}, "algorithm.group is 1: it must be at least 2"),
        ({"normalize": "max"}, "algorithm.normalize is max: it must be std or mean"),
        ({"lr": 0.0}, "algorithm.lr is 0.0: it must be above 0"),
        ({"clip": 0.0}, "algorithm.clip is 0.0: it must be above 0"),
        ({"entropy": -0.1}, "algorithm.entropy is -0.1: it must be at least 0"),
        ({"epochs": 0}, "algorithm.epochs is 0: it must be at least 1"),
        ({"minibatches": 0}, "algorithm.minibatches is 0: it must be at least 1"),
        ({"max_grad_norm": 0.0}, "algorithm.max_grad_norm is 0.0: it must be above 0"),
        ({"gamma": 1.1}, "algorithm.gamma is 1.1: it must be 0 to 1"),
    ],
)
def test_wrong_settings_get_one_line(change: dict[str, Any], line: str) -> None:
    with pytest.raises(EchelonError) as caught:
        GRPOConfig(**change)
    assert str(caught.value) == line


# -- in worlds ---------------------------------------------------------------------------------

TINY = WarehouseConfig(size=8, num_agents=2, num_packages=1, limit=20)
QUICK = GRPOConfig(hidden=16, rollout=32, group=4, epochs=2, minibatches=2, precision="float32")
UPDATE = 20 * 8


def run_config(**changes: Any) -> RunConfig:
    """A run of 5 updates of 160 steps, with a checkpoint after every second."""
    base = RunConfig(
        method="flat-grpo", env=TINY, steps=5 * UPDATE, num_envs=8, threads=1, checkpoint_every=2 * UPDATE,
        algorithm=QUICK,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def outcome(folder: Path) -> dict[str, bytes]:
    last = checkpoints_of(folder / "checkpoints")[-1]
    files = (folder / "metrics.jsonl", last / "worlds.safetensors", last / "algorithm.safetensors")
    return {file.name: file.read_bytes() for file in files}


def test_rollouts_begin_together_and_only_first_episodes_are_counted() -> None:
    """No longer than the time limit, so that each world's first episode ends in it; those that follow tell nothing."""
    env = WarehouseConfig(size=6, num_agents=3, num_packages=1, limit=50)
    algorithm = dataclasses.replace(QUICK, rollout=1000)
    rollouts = Rollouts(run_config(env=env, num_envs=64, algorithm=algorithm, collision_cost=0.0))
    rollouts.worlds.start()
    assert rollouts.steps_per_update == 50 * 64 and rollouts.buffer.steps == 50
    maps = set()
    for _ in range(3):
        rollouts.learn(rollouts.collect())
        buffer, told = rollouts.buffer, rollouts.worlds.take_episodes()
        starts = buffer.obs[0].reshape(16, 4, -1)
        assert buffer.begins[0].all() and (starts == starts[:, :1]).all()
        maps |= {start.tobytes() for start in starts[:, 0]}
        _, played = first_episodes(buffer, 1.0)
        assert told.count == 64 < buffer.begins[1:].sum()
        last = played.sum(0) - 1
        success = buffer.terminated[last, np.arange(64), 0]
        assert 0 < told.success == success.sum() < 64
        assert told.length_of_success == (last[success] + 1).sum()
        assert told.task_return == pytest.approx((buffer.reward[..., 0] * played).sum())
    assert len(maps) == 3 * 16


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("rollout", [32, 7])
def test_a_run_stopped_after_each_update_is_the_run_that_never_stopped(
    recurrent: bool, rollout: int, tmp_path: Path
) -> None:
    """Weights, optimiser, worlds and metrics are the same bytes, with whole episodes and with cut ones."""
    config = run_config(algorithm=dataclasses.replace(QUICK, recurrent=recurrent, rollout=rollout))
    assert Trainer(config, tmp_path / "whole").run()
    Trainer(config, tmp_path / "pieces").run(should_stop=lambda: True)
    while not Trainer.resume(tmp_path / "pieces").run(should_stop=lambda: True):
        pass
    whole, pieces = outcome(tmp_path / "whole"), outcome(tmp_path / "pieces")
    assert [name for name in whole if whole[name] != pieces[name]] == []
    saved = load_checkpoint(checkpoints_of(tmp_path / "whole/checkpoints")[-1]).algorithm
    assert not [name for name in saved if "critic" in name]
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert all({"score", "score_best", "score_spread", "informative", "played"} <= line.keys() for line in lines)


def test_a_number_of_worlds_that_is_no_whole_number_of_groups_is_one_line(tmp_path: Path) -> None:
    """Before anything is written."""
    with pytest.raises(EchelonError, match=r"num_envs is 6: it must be a multiple of algorithm.group \(4\)"):
        Trainer(run_config(num_envs=6), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tiny_warehouse_is_learnt_without_a_critic(tmp_path: Path) -> None:
    """On 100 unseen worlds; untrained it is far below."""
    config = RunConfig(
        method="flat-grpo", env=WarehouseConfig(size=8, num_agents=2, num_packages=2, limit=60), steps=76_800,
        num_envs=64, threads=1, algorithm=GRPOConfig(hidden=32, precision="float32"),
    )  # fmt: skip
    assert Trainer(config, tmp_path / "run").run()
    trained = evaluate(config, load_policy(tmp_path / "run")[1], episodes=100)
    untrained = evaluate(config, None, episodes=100)
    assert trained is not None and untrained is not None
    # How well depends on the seed and, by rounding, on the CPU's vector instructions: most often 0.9, at worst 0.7.
    assert trained.success.mean() >= 0.5 and untrained.success.mean() < 0.3


def test_executors_under_a_planner_learn_by_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollout begins with fresh subgoals: they too are the same in a group, whatever each world's were before."""
    monkeypatch.setattr("echelon.methods._REGISTRY", methods())
    register(Method("goals-grpo", "subgoals and GRPO", "hungarian", "hungarian", algorithm="grpo"))
    rollouts = Rollouts(run_config(method="goals-grpo", env=dataclasses.replace(TINY, limit=200)))
    rollouts.worlds.start()
    for _ in range(2):
        rollouts.learn(rollouts.collect())
        starts = rollouts.buffer.obs[0].reshape(2, 4, -1)
        assert (starts == starts[:, :1]).all()
