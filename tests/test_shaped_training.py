"""Shaped runs and their forks: what they pay, what they remember, and that nothing else changes."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from echelon.algorithms.grpo import GRPOConfig
from echelon.algorithms.mappo import MAPPOConfig
from echelon.algorithms.qmix import QMIX, QMIXConfig
from echelon.buffers import ReplayMemory, RolloutBuffer, team_mean
from echelon.building import build_worlds
from echelon.checkpoints import Checkpoint, checkpoints_of, load_checkpoint
from echelon.configs import RunConfig, from_toml, read_toml, to_toml
from echelon.envs import GridConfig, RepairConfig, SearchConfig, WarehouseConfig
from echelon.errors import EchelonError
from echelon.evaluation import evaluate
from echelon.forking import fork_run
from echelon.rollouts import Rollouts
from echelon.shaping import ShapingConfig, ShapingSettings, relabel, shaped_worlds, term_set
from echelon.training import Trainer

W, T = 8, 8
UPDATE = W * T
ENV = WarehouseConfig(size=8, num_agents=3, num_packages=2, limit=21)
LEARN: dict[str, Any] = {
    "flat-mappo": MAPPOConfig(hidden=16, rollout=T, epochs=2, minibatches=2, precision="float32"),
    "flat-grpo": GRPOConfig(hidden=16, rollout=T, epochs=1, minibatches=2, precision="float32", group=4),
    "qmix": QMIXConfig(
        hidden=16, embed=4, rollout=T, warmup=0, batch=2 * T, replay=0.5, memory=5 * UPDATE, epsilon_steps=500
    ),
}
METHODS = ("flat-mappo", "qmix")
FIRST = ShapingSettings(mode=term_set("warehouse").default)
SECOND = ShapingSettings(mode="mine", beta=0.7, weights=("pickup=1", "deliv=2.5", "traffic=0.25"))
SPARSE = dataclasses.replace(FIRST, beta=0.0)


def run_config(method: str = "qmix", **changes: Any) -> RunConfig:
    """A run of 8 updates of 64 steps."""
    base = RunConfig(method=method, env=ENV, steps=8 * UPDATE, num_envs=W, threads=1, algorithm=LEARN[method])
    return dataclasses.replace(base, **changes)


def straight(config: RunConfig, folder: Path, until: int | None = None) -> Path:
    """The run, never stopped; up to so many updates."""
    assert Trainer(config, folder).run(until=None if until is None else until * UPDATE) == (until is None)
    return folder


def newest(folder: Path) -> Checkpoint:
    return load_checkpoint(checkpoints_of(folder / "checkpoints")[-1])


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(one: Checkpoint, other: Checkpoint, but: Callable[[str], bool] = lambda name: False) -> None:
    """Assert that two checkpoints hold the same, bit for bit, but for names that `but` leaves out."""
    for a, b in ((one.worlds, other.worlds), (one.algorithm, other.algorithm)):
        assert {k for k in a if not but(k)} == {k for k in b if not but(k)}
        for name in a:
            assert but(name) or np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes(), name


def memory_of(checkpoint: Checkpoint) -> dict[str, NDArray[Any]]:
    return {k[7:]: v.numpy() for k, v in checkpoint.algorithm.items() if k.startswith("memory.")}


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four updates of each method under the first mixture."""
    place = tmp_path_factory.mktemp("halves")
    return {name: straight(run_config(name, shaping=FIRST), place / name, 4) for name in METHODS}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same, all eight, never stopped."""
    place = tmp_path_factory.mktemp("wholes")
    return {name: straight(run_config(name, shaping=FIRST), place / name) for name in METHODS}


# -- settings ------------------------------------------------------------------------------------


def test_off_is_the_default_and_says_nothing() -> None:
    assert ShapingSettings().config("warehouse") is None
    assert RunConfig().shaping == ShapingSettings() and not RunConfig().shaping.on
    assert ShapingSettings().config("no such world") is None


def test_a_mode_is_the_worlds_and_parts_of_it_can_be_put_in_its_place() -> None:
    terms = term_set("warehouse")
    for table in (terms.modes, terms.grid):
        for name, config in table.items():
            found = ShapingSettings(mode=name).config("warehouse")
            assert found is not None and found.to_json() == (terms.modes.get(name) or config).to_json()
    ready = terms.mode(terms.default)
    found = ShapingSettings(mode=terms.default, beta=0.25).config("warehouse")
    assert found is not None and (found.beta, found.weights) == (0.25, ready.weights)
    found = ShapingSettings(mode=terms.default, weights=("deliv=3", "carry = 1")).config("warehouse")
    assert found is not None and (found.beta, found.weights) == (ready.beta, {"carry": 0.25, "deliv": 0.75})


NAMES = term_set("warehouse").names
NUMBERS = st.floats(0, 1e6, allow_subnormal=False)


@settings(max_examples=60)
@given(
    st.text(min_size=1, max_size=9).filter(lambda name: name != "off"),
    st.floats(0, 1),
    st.dictionaries(st.sampled_from(NAMES), NUMBERS, min_size=1).filter(lambda w: any(x > 0 for x in w.values())),
    st.booleans(),
)
def test_any_mixture_goes_into_the_settings_and_comes_back_through_a_file(
    mode: str, beta: float, weights: dict[str, float], every: bool
) -> None:
    config = ShapingConfig(mode, beta, weights, tuple(weights) if every else None)
    changed = ShapingSettings(terminal="state", offset=1.0, scale=2.0, buffer="keep").with_config(config)
    assert (changed.terminal, changed.offset, changed.scale, changed.buffer) == ("state", 1.0, 2.0, "keep")
    run = RunConfig(method="qmix", shaping=changed)
    again = from_toml(tomllib.loads(to_toml(run)))
    found = again.shaping.config("warehouse")
    assert again == run and found is not None and found.to_json() == config.to_json()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mode": "balanced", "beta": 1.5}, "shaping.beta is 1.5: it must be 0 to 1"),
        ({"mode": "balanced", "beta": float("nan")}, "shaping.beta is nan: it must be 0 to 1"),
        ({"mode": ""}, "shaping.mode is ''"),
        ({"mode": "balanced", "scale": 0.0}, "shaping.scale is 0.0: it must be a number above 0"),
        ({"mode": "balanced", "offset": float("inf")}, "shaping.offset is inf: it must be a finite number"),
        ({"mode": "balanced", "terminal": "zeros"}, "unknown shaping.terminal 'zeros': did you mean 'zero'?"),
        ({"mode": "balanced", "buffer": "relabl"}, "unknown shaping.buffer 'relabl': did you mean 'relabel'?"),
        ({"mode": "mine", "weights": ("deliv",)}, "shaping.weights has 'deliv': it must be term=weight"),
        ({"mode": "mine", "weights": ("deliv=-1",)}, "shaping.weights has 'deliv=-1': it must be term=weight"),
        ({"mode": "mine", "weights": ("deliv=1", "deliv=2")}, "shaping.weights has 'deliv' twice"),
        ({"mode": "mine", "weights": ("deliv=0",)}, "shaping.weights has no weight above 0"),
        ({"beta": 0.3}, "shaping.beta is given, but shaping.mode is off"),
        ({"weights": ("deliv=1",)}, "shaping.weights is given, but shaping.mode is off"),
    ],
)
def test_settings_out_of_range_are_one_clear_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(EchelonError) as error:
        ShapingSettings(**changes)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_run_refuses_what_its_world_or_method_does_not_know() -> None:
    default = term_set("warehouse").default
    with pytest.raises(EchelonError, match=f"unknown shaping mode of warehouse.*did you mean '{default}'"):
        run_config(shaping=ShapingSettings(mode=default[:-1]))
    with pytest.raises(EchelonError, match="unknown potential term 'delivv': did you mean 'deliv'"):
        run_config(shaping=ShapingSettings(mode="mine", beta=0.1, weights=("delivv=1",)))
    with pytest.raises(EchelonError, match=r"'mine' is none of warehouse's: give shaping.beta too"):
        run_config(shaping=ShapingSettings(mode="mine", weights=("deliv=1",)))
    for name, what in (("rule-goals", "has a planner"), ("l2m2", "has a planner"), ("classical", "learns nothing"),
                       ("llm-only", "learns nothing")):  # fmt: skip
        with pytest.raises(EchelonError, match=f"method {name} {what}.*shaping.mode"):
            RunConfig(method=name, shaping=FIRST)
    with pytest.raises(EchelonError, match="must be called something else"):
        FIRST.with_config(ShapingConfig("off", 0.5, {"deliv": 1.0}))


def test_a_config_from_before_there_was_shaping_is_one_without() -> None:
    text = to_toml(RunConfig(method="qmix"))
    before = text[: text.index("\n[shaping]")]
    assert "shaping" not in before and from_toml(tomllib.loads(before)) == RunConfig(method="qmix")


# -- what a rollout pays -------------------------------------------------------------------------

WORLDS: dict[str, GridConfig] = {
    "warehouse": WarehouseConfig(size=5, num_agents=3, num_packages=1, limit=40, layout="open"),
    "search": SearchConfig(size=8, num_agents=2, num_targets=2, limit=15),
    "repair": RepairConfig(size=5, num_agents=2, num_machines=1, limit=40, layout="open"),
}


def collected(config: RunConfig, rollouts: int) -> tuple[Rollouts, dict[str, NDArray[Any]]]:
    """What so many rollouts held, one behind the other, and the rollouts' owner."""
    made = Rollouts(config)
    made.start()
    parts: dict[str, list[NDArray[Any]]] = {}
    for _ in range(rollouts):
        made.collect()
        for name in ("reward", "unshaped", "phi", "next_phi", "terminated", "ended", "begins"):
            array = getattr(made.buffer, name)
            parts.setdefault(name, []).append(array[: made.buffer.steps].copy())
    return made, {name: np.concatenate(arrays) for name, arrays in parts.items()}


@pytest.mark.parametrize("world", sorted(WORLDS))
def test_extra_rewards_of_an_episode_telescope(world: str) -> None:
    """Discounted, they sum to -Φ(s_0), and to γ^T Φ(s_T) more where a time limit cut the episode (no task ended)."""
    shaping = ShapingSettings(mode=term_set(world).default)
    config = run_config(env=WORLDS[world], shaping=shaping, num_envs=32)
    made, told = collected(config, 12)
    shaper = made.worlds.shaper
    assert shaper is not None and set(WORLDS) <= set(shaped_worlds())
    rules, gamma = shaper.rules, config.algorithm.gamma
    assert rules.gamma == gamma and rules.scale == max(6 * made.worlds.env.goals, 10)
    mixed = shaper.config.vector(shaper.names)
    extra = told["reward"][:, :, 0].astype(float) - told["unshaped"]
    kinds, added = {True: 0, False: 0}, 0.0
    for w in range(32):
        first = 0
        for t in np.flatnonzero(told["ended"][:, w, 0]):
            assert told["begins"][first, w] and not told["begins"][first + 1 : t + 1, w].any()
            total = sum(gamma**i * x for i, x in enumerate(extra[first : t + 1, w]))
            whole = rules.scale * shaper.config.beta
            start, last = (whole * (float(told[k][at, w].astype(float) @ mixed) - rules.offset)
                           for k, at in (("phi", first), ("next_phi", t)))  # fmt: skip
            terminated = bool(told["terminated"][t, w, 0])
            kinds[terminated] += 1
            added += extra[first : t + 1, w].sum()
            assert total == pytest.approx((0 if terminated else gamma ** (t + 1 - first) * last) - start, abs=1e-4)
            first = t + 1
    assert min(kinds.values()) >= 3
    e = made.worlds.take_episodes()
    assert e.count == sum(kinds.values()) and e.shaping_return == pytest.approx(added, abs=1e-3)


@pytest.mark.parametrize("agents", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "rules", [{}, {"terminal": "state"}, {"first_step": "zero", "offset": 1.0}, {"team": "per_agent_sum", "scale": 2.5}]
)
def test_what_is_stored_gives_back_what_was_paid(agents: int, rules: dict[str, Any]) -> None:
    """Bit for bit, in the rollout and in the replay memory, whatever the number of agents."""
    shaping = dataclasses.replace(FIRST, **rules)
    config = run_config(env=dataclasses.replace(ENV, num_agents=agents), shaping=shaping)
    made, told = collected(config, 4)
    shaper, algorithm = made.worlds.shaper, made.algorithm
    assert shaper is not None and isinstance(algorithm, QMIX)
    again = relabel(
        told["unshaped"], told["phi"], told["next_phi"], told["terminated"][:, :, 0], shaper.config,
        names=shaper.names, rules=shaper.rules, begins=told["begins"],
    )  # fmt: skip
    assert (again != told["unshaped"]).any()
    assert np.array_equal(told["reward"], np.repeat(again[:, :, None], agents, 2))
    memory = algorithm.memory
    memory.add(made.buffer, np.zeros((W, agents, 0), np.float32))
    paid = again[-T:].T
    assert np.array_equal(memory.reward[:W], team_mean(np.repeat(paid[..., None], agents, -1)))
    if agents in (1, 2):
        assert np.array_equal(memory.reward[:W], paid)
    assert np.array_equal(memory.unshaped[:W], told["unshaped"][-T:].T)


def test_per_agent_sum_pays_as_often_as_there_are_agents() -> None:
    _, once = collected(run_config(shaping=FIRST), 1)
    _, often = collected(run_config(shaping=dataclasses.replace(FIRST, team="per_agent_sum")), 1)
    assert np.array_equal(once["phi"][0], often["phi"][0])
    first, more = (told["reward"][0, :, 0].astype(float) - told["unshaped"][0] for told in (once, often))
    assert np.abs(first).max() > 0 and more == pytest.approx(ENV.num_agents * first, abs=1e-6)


def test_an_unshaped_run_keeps_nothing_more() -> None:
    made = Rollouts(run_config())
    assert made.worlds.shaper is None and made.buffer.num_terms == 0
    assert made.buffer.unshaped.size == made.buffer.phi.size == made.buffer.next_phi.size == 0
    made.start()
    made.update()
    assert isinstance(made.algorithm, QMIX) and made.algorithm.memory.phi.size == 0
    assert not {"memory.phi", "memory.unshaped"} & set(made.state_dict())
    assert not [name for name in made.worlds.state_dict() if name.startswith("shaping")]


def test_a_memory_takes_no_rollout_with_other_terms() -> None:
    memory = ReplayMemory(2, 4, 3, 2, 5, 6, 5, 0)
    memory.add(RolloutBuffer(4, 3, 2, 5, 6, 5, 2), np.zeros((3, 2, 0), np.float32))
    assert memory.num_terms == 2 and memory.state_dict()["phi"].shape == (3, 4, 2)
    with pytest.raises(ValueError, match="terms"):
        memory.add(RolloutBuffer(4, 3, 2, 5, 6, 5), np.zeros((3, 2, 0), np.float32))


# -- bit-identity --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS, "flat-grpo"])
def test_a_strength_of_zero_changes_nothing(method: str, tmp_path: Path) -> None:
    plain = straight(run_config(method), tmp_path / "plain")
    shaped = straight(run_config(method, shaping=SPARSE), tmp_path / "shaped")
    told = metrics(shaped)
    returns = [line.pop("shaping_return") for line in told]
    assert told == metrics(plain) and set(returns) <= {0.0, None}
    terms = ("shaping.", "memory.unshaped", "memory.phi", "memory.next_phi")
    same(newest(plain), newest(shaped), lambda name: name.startswith(terms))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stops", [(1, 4), (2, 5, 7)])
def test_resumed_is_uninterrupted(method: str, stops: tuple[int, ...], wholes: dict[str, Path], tmp_path: Path) -> None:
    """Also stopped in the midst of episodes, whose limit is no whole number of rollouts."""
    trainer = Trainer(run_config(method, shaping=FIRST), tmp_path / "run")
    for stop in stops:
        trainer.run(until=stop * UPDATE)
        trainer = Trainer.resume(tmp_path / "run")
        assert trainer.worlds.shaper is not None and not trainer.worlds.shaper.first.all()
    assert trainer.run()
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (wholes[method] / "metrics.jsonl").read_bytes()
    same(newest(tmp_path / "run"), newest(wholes[method]))


def test_the_metric_tells_what_potentials_added_and_the_task_return_stays_the_tasks(wholes: dict[str, Path]) -> None:
    told = [line for line in metrics(wholes["qmix"]) if line["episodes"]]
    assert told and all(line["shaping_return"] != 0 for line in told)
    returns = [line["task_return"] * line["episodes"] for line in told]
    # A package is worth something, fractions of which potentials alone could pay.
    assert all(abs(r * 1000 - round(r * 1000)) < 1e-3 for r in returns)


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_is_not_shaped(method: str, halves: dict[str, Path]) -> None:
    policy = {k: v for k, v in newest(halves[method]).algorithm.items() if not k.startswith("memory.")}
    shaped, plain = (evaluate(c, policy, episodes=8) for c in (run_config(method, shaping=SECOND), run_config(method)))
    worlds = build_worlds(run_config(method, shaping=SECOND), num_envs=2, seed=0, training=False)
    assert worlds.shaper is None and worlds.num_terms == 0
    for name in ("success", "steps", "task_return", "collisions"):
        assert np.array_equal(getattr(shaped, name), getattr(plain, name)), name


# -- forks ---------------------------------------------------------------------------------------


def fork(source: Path, folder: Path, shaping: ShapingSettings, **more: Any) -> Checkpoint:
    fork_run(source, folder, shaping, **{"steps": 8 * UPDATE, **more})
    return newest(folder)


@pytest.mark.parametrize("method", METHODS)
def test_a_fork_that_changes_nothing_is_the_run_going_on(
    method: str, halves: dict[str, Path], wholes: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "fork"
    same(fork(halves[method], folder, dataclasses.replace(FIRST, buffer="clear")), newest(halves[method]))
    assert Trainer.resume(folder).run()
    assert metrics(folder) == metrics(wholes[method])[4:]
    same(newest(folder), newest(wholes[method]))
    assert newest(folder).progress["sizes"]["metrics.jsonl"] == (folder / "metrics.jsonl").stat().st_size
    assert newest(folder).progress["seconds"] > newest(halves[method]).progress["seconds"] > 0
    fork_run(halves[method], folder, dataclasses.replace(FIRST, buffer="clear"), steps=8 * UPDATE)  # is there already
    assert len(metrics(folder)) == 4


@pytest.mark.parametrize("method", METHODS)
def test_another_stream_changes_the_random_numbers_and_nothing_else(
    method: str, halves: dict[str, Path], wholes: dict[str, Path], tmp_path: Path
) -> None:
    drawn = {"env.keys", "keys", "draw_key"}
    before, one = newest(halves[method]), fork(halves[method], tmp_path / "one", FIRST, stream=1)
    same(one, before, drawn.__contains__)
    two, again = (fork(halves[method], tmp_path / str(n), FIRST, stream=n) for n in (2, 3))
    for state in ("worlds", "algorithm"):
        for name in drawn & set(getattr(before, state)):
            keys = [np.asarray(getattr(c, state)[name]) for c in (before, one, two, again)]
            assert len({x.tobytes() for x in keys}) == 4 and len(np.unique(np.concatenate(keys))) == sum(map(len, keys))
    trainer = Trainer.resume(tmp_path / "one")
    assert torch.equal(trainer.rollouts.state_dict()["draw_key"], one.algorithm["draw_key"])
    assert trainer.run()
    assert metrics(tmp_path / "one") != metrics(wholes[method])[4:]
    # A fork of a fork by the same number draws others again.
    deep = fork(tmp_path / "one", tmp_path / "deep", FIRST, stream=1, steps=9 * UPDATE)
    assert not np.array_equal(deep.worlds["env.keys"], newest(tmp_path / "one").worlds["env.keys"])


def test_a_fork_under_another_mixture_keeps_what_states_were_worth(halves: dict[str, Path], tmp_path: Path) -> None:
    """The first extra reward is γ Φ_new(s') - Φ_old(s); all that follow are the new potential's alone."""
    source = newest(halves["flat-mappo"])
    made = fork(halves["flat-mappo"], tmp_path / "fork", SECOND)
    changed = {"shaping.beta", "shaping.weights"}
    same(made, source, changed.__contains__)
    trainer = Trainer.resume(tmp_path / "fork")
    shaper, buffer = trainer.worlds.shaper, trainer.rollouts.buffer
    assert shaper is not None and shaper.config == SECOND.config("warehouse")
    trainer.rollouts.collect()
    extra = buffer.reward[:, :, 0].astype(float) - buffer.unshaped
    scale, beta, gamma = shaper.rules.scale, shaper.config.beta, shaper.rules.gamma
    worth, following = (scale * beta * (x.astype(float) @ shaper.config.vector(shaper.names))
                        for x in (buffer.phi, buffer.next_phi))  # fmt: skip
    following[buffer.terminated[:, :, 0]] = 0
    old = np.where(np.arange(T)[:, None] == 0, source.worlds["shaping.worth"], worth)
    assert np.abs(old[0] - worth[0]).max() > 0.01
    assert extra == pytest.approx(gamma * following - old, abs=1e-5)
    assert trainer.rollouts.config.shaping == SECOND


def test_a_relabelled_memory_is_that_of_a_run_which_paid_so_from_the_start(
    halves: dict[str, Path], tmp_path: Path
) -> None:
    """For the same transitions, bit for bit: both mixtures' worlds are played with moves that no reward has changed."""
    config = run_config(steps=8 * UPDATE, shaping=FIRST)
    config = dataclasses.replace(config, algorithm=dataclasses.replace(LEARN["qmix"], warmup=10**6))  # learns nothing
    first = straight(config, tmp_path / "first", 6)  # more than the memory holds
    second = straight(dataclasses.replace(config, shaping=SECOND), tmp_path / "second", 6)
    made = memory_of(fork(first, tmp_path / "fork", SECOND))
    paid = memory_of(newest(second))
    assert set(made) == set(paid) and all(np.array_equal(made[k], paid[k]) for k in made)
    assert not np.array_equal(made["reward"], memory_of(newest(first))["reward"])
    # So does what comes after the fork, its first step included, and nothing of the old mixture comes in.
    for folder in (tmp_path / "fork", second):
        assert Trainer.resume(folder).run()
    made, paid = memory_of(newest(tmp_path / "fork")), memory_of(newest(second))
    assert all(np.array_equal(made[k], paid[k]) for k in made)
    # As the task pays, and back.
    off = memory_of(fork(first, tmp_path / "off", ShapingSettings()))
    plain = memory_of(newest(straight(dataclasses.replace(config, shaping=ShapingSettings()), tmp_path / "plain", 6)))
    assert set(off) == set(plain) and all(np.array_equal(off[k], plain[k]) for k in off)
    forth = fork(first, tmp_path / "forth", SECOND)
    back = fork(tmp_path / "forth", tmp_path / "back", FIRST, steps=9 * UPDATE)
    assert all(np.array_equal(memory_of(back)[k], v) for k, v in memory_of(newest(first)).items())
    assert back.worlds["shaping.worth"] == pytest.approx(newest(first).worlds["shaping.worth"], abs=1e-6)
    assert forth.worlds["shaping.worth"] != pytest.approx(newest(first).worlds["shaping.worth"], abs=1e-2)
    # Other rules are another reward too.
    rules = dataclasses.replace(FIRST, terminal="state", first_step="zero", team="per_agent_sum", offset=0.5, scale=1.5)
    other = straight(dataclasses.replace(config, shaping=rules), tmp_path / "other", 6)
    made = memory_of(fork(first, tmp_path / "rules", rules))
    assert all(np.array_equal(made[k], v) for k, v in memory_of(newest(other)).items())


def test_a_memory_is_kept_or_cleared_if_so_wanted(halves: dict[str, Path], tmp_path: Path) -> None:
    """Kept, it goes on as the run paid, with what states were worth; cleared, nothing of that is left."""
    before = newest(halves["qmix"])
    kept = fork(halves["qmix"], tmp_path / "keep", dataclasses.replace(SECOND, buffer="keep"))
    same(kept, before, {"shaping.beta", "shaping.weights"}.__contains__)
    cleared = fork(halves["qmix"], tmp_path / "clear", dataclasses.replace(SECOND, buffer="clear"))
    same(cleared, before, lambda name: name.startswith(("memory.", "shaping.")))
    assert not len(cleared.algorithm["memory.reward"]) and int(cleared.algorithm["memory.next"]) == 0
    for name in ("keep", "clear"):
        assert Trainer.resume(tmp_path / name).run()
    assert len(newest(tmp_path / "clear").algorithm["memory.reward"]) == 4 * W


def test_an_unshaped_run_can_be_forked_where_nothing_is_to_be_computed_anew(tmp_path: Path) -> None:
    """No state was worth anything to it: the first extra reward is γ Φ(s')."""
    source = straight(run_config("flat-mappo"), tmp_path / "flat", 3)
    fork(source, tmp_path / "fork", SECOND)
    trainer = Trainer.resume(tmp_path / "fork")
    state = newest(source).worlds
    assert trainer.worlds.shaper is not None and not trainer.worlds.shaper.worth.any()
    assert np.array_equal(trainer.worlds.shaper.first, state["begins"])
    assert np.array_equal(trainer.worlds.phi, term_set("warehouse").terms(trainer.worlds.env))
    assert trainer.run() and metrics(tmp_path / "fork")[0]["step"] == 4 * UPDATE
    memory = straight(run_config("qmix"), tmp_path / "qmix", 3)
    for buffer in ("relabel", "keep"):
        with pytest.raises(EchelonError, match=r"holds no potential terms.*shaping.mode was off.*shaping.buffer clear"):
            fork(memory, tmp_path / "no", dataclasses.replace(SECOND, buffer=buffer))
    assert not (tmp_path / "no").exists()
    fork(memory, tmp_path / "cleared", dataclasses.replace(SECOND, buffer="clear"))
    assert Trainer.resume(tmp_path / "cleared").run()


def test_what_cannot_be_forked_is_one_clear_line(halves: dict[str, Path], tmp_path: Path) -> None:
    source = halves["qmix"]
    cases: list[tuple[Path, ShapingSettings, dict[str, Any], str]] = [
        (tmp_path / "nothing", FIRST, {}, "is no run: it has no config.toml"),
        (source, FIRST, {"steps": 4 * UPDATE}, "steps is 256: .* has done 256 already"),
        (source, FIRST, {"stream": -1}, "stream is -1: it must be at least 0"),
        (source, ShapingSettings(mode=term_set("search").default), {}, "unknown shaping mode of warehouse"),
        (source, ShapingSettings(mode="mine", beta=0.1, weights=("explored=1",)), {}, "unknown potential term"),
    ]
    bare = tmp_path / "bare"
    Trainer(run_config(shaping=FIRST), bare)
    cases.append((bare, FIRST, {}, "has no checkpoint yet to fork from"))
    planned = tmp_path / "planned"
    Trainer(dataclasses.replace(run_config("flat-mappo"), method="rule-goals", subgoals=RunConfig().subgoals), planned)
    cases.append((planned, ShapingSettings(), {}, "of rule-goals: only runs of flat methods"))
    for folder, shaping, more, said in cases:
        with pytest.raises(EchelonError, match=said) as error:
            fork(folder, tmp_path / "new", shaping, **more)
        assert "\n" not in str(error.value) and not (tmp_path / "new").exists()


def test_a_folder_that_holds_another_run_stays_as_it_is(halves: dict[str, Path], tmp_path: Path) -> None:
    source, folder = halves["qmix"], tmp_path / "fork"
    fork(source, folder, FIRST, stream=1)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    fork(source, folder, FIRST, stream=1, steps=20 * UPDATE)
    for shaping, stream in ((FIRST, 0), (FIRST, 2), (SECOND, 1)):
        with pytest.raises(EchelonError, match="holds another run"):
            fork(source, folder, shaping, stream=stream)
    with pytest.raises(EchelonError, match="holds another run"):
        fork(source, halves["flat-mappo"], FIRST)
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_interrupted_fork_is_no_run_and_is_made_anew(
    halves: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "fork"

    def stop(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("echelon.forking.atomic_write_text", stop)
        with pytest.raises(KeyboardInterrupt):
            fork(halves["qmix"], folder, FIRST)
    with pytest.raises(EchelonError, match="is no run"):
        Trainer.resume(folder)
    # What it left is of a later checkpoint than that of the next try.
    checkpoints_of(folder / "checkpoints")[-1].rename(folder / "checkpoints" / "step-000000009999")
    same(fork(halves["qmix"], folder, SECOND), fork(halves["qmix"], tmp_path / "straight", SECOND))
    assert [p.name for p in checkpoints_of(folder / "checkpoints")] == ["step-000000000256"]
    assert read_toml(folder / "config.toml").shaping == SECOND


def test_a_checkpoint_from_before_its_draws_had_a_key_goes_on(tmp_path: Path, wholes: dict[str, Path]) -> None:
    for method in METHODS:
        made = Rollouts(run_config(method, shaping=FIRST))
        state = made.state_dict()
        without = {k: v for k, v in state.items() if k != "draw_key"}
        made.load_state_dict(without)
        assert torch.equal(made.state_dict()["draw_key"], state["draw_key"])
