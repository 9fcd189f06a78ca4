"""Forks: a run that goes on from another one's newest checkpoint, its rewards shaped another way.

A fork differs from what the other run would have become in nothing but the mixture of potentials and, if that is
wanted, the random numbers from there on. So forks of one checkpoint can be compared with each other and with one that
changes nothing.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from echelon._files import atomic_write_json, atomic_write_text, only_writer, read_json
from echelon.buffers import team_mean
from echelon.building import build_worlds
from echelon.checkpoints import Checkpoint, checkpoints_of, load_checkpoint, save_checkpoint
from echelon.configs import RunConfig, to_toml
from echelon.envs import env_name
from echelon.errors import EchelonError
from echelon.methods import method
from echelon.rng import spawn_keys
from echelon.rollout import TeamWorlds
from echelon.runs import FORK, read_run
from echelon.shaping import ShapingSettings, relabel, term_set
from echelon.training import identity, machine

__all__ = ["fork_run"]

_MEMORY = "memory."
_RANDOM = ("keys", "draw_key")  # what an algorithm's state calls the keys that it draws by
_Arrays = dict[str, NDArray[Any]]


def fork_run(
    source: Path, folder: Path, shaping: ShapingSettings, *, steps: int, stream: int = 0, threads: int | None = None
) -> None:
    """Make `folder` a run that goes on from another run's newest checkpoint; `Trainer.resume` trains it.

    With the source's own shaping and `stream` 0 it becomes, bit for bit, what the source becomes by going on. Where
    the shaping is another, what a state was worth when it was reached stays as it was, so that returns still
    telescope (Devlin and Kudenko 2012): the first extra reward of an episode under way is `γΦ_new(s') - Φ_old(s)`. Not
    so with a replay memory, which would learn from that step again and again: it is treated as `shaping.buffer` says,
    and unless that is `keep`, states under way are worth what the new mixture says, as all those in the memory are.
    The fork's logs begin with it; its steps and seconds go on from the source's.

    A folder that is this fork already stays as it is, however far it has trained since; else the run is there whole
    or not at all.

    Args:
        source: a run of a flat method; only read.
        folder: the new run's; new, or what an interrupted call left.
        shaping: how its rewards are shaped.
        steps: environment steps up to which it is to train, those before the fork counted.
        threads: processor threads to compute with; default: as many as the source.
        stream: 0: the random numbers are those that the source would go on with; above 0: others, by this number.

    Raises:
        EchelonError: no run or checkpoint, damaged files, no more steps than are done; a method that can't be forked;
            another run in `folder`; a mixture of another world; a replay memory without the terms to compute its
            rewards anew.
    """
    if stream < 0:
        raise EchelonError(f"stream is {stream}: it must be at least 0")
    old = read_run(source)
    kind = method(old.method)
    if kind.train_planner is not None or not kind.learns:
        raise EchelonError(f"run {source} is of {old.method}: only runs of flat methods that learn can be forked")
    threads = old.threads if threads is None else threads
    new = dataclasses.replace(old, shaping=shaping, steps=steps, threads=threads)
    saved = checkpoints_of(source / "checkpoints")
    if (folder / "config.toml").exists():
        _require_fork(folder, new, saved[-1] if saved else None, stream)
        return
    if not saved:
        raise EchelonError(f"run {source} has no checkpoint yet to fork from: train it with --resume {source}")
    checkpoint = load_checkpoint(saved[-1])
    step = checkpoint.progress["step"]
    if steps <= step:
        raise EchelonError(f"steps is {steps}: run {source} has done {step} already, a fork of it must go on to more")
    forked = _forked(checkpoint, old, new, stream, source)
    with only_writer(folder):
        # What an interrupted call left may be of another checkpoint.
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        atomic_write_json(folder / "versions.json", machine())
        atomic_write_json(folder / FORK, {"source": str(source), "step": step, "stream": stream, "of": _of(saved[-1])})
        save_checkpoint(folder / "checkpoints", step, forked)
        # The config last: a folder that has one is a run.
        atomic_write_text(folder / "config.toml", to_toml(new))


def _of(checkpoint: Path) -> dict[str, str]:
    """What tells a checkpoint from any other: the hashes of what it holds, apart from how long it took."""
    parts = read_json(checkpoint / "manifest.json", "checkpoint manifest")["sha256"]
    return {name: parts[name] for name in ("worlds.safetensors", "algorithm.safetensors")}


def _require_fork(folder: Path, new: RunConfig, checkpoint: Path | None, stream: int) -> None:
    """Refuse a folder that holds another run than this fork.

    A source that has gone on since, or whose checkpoints are gone, can't be asked any more: its config has to do.
    """
    made = read_json(folder / FORK, "fork") if (folder / FORK).exists() else {}
    same = identity(read_run(folder)) == identity(new) and made.get("stream") == stream
    # One that is being removed, or was when the process died, can't be asked either.
    if same and checkpoint is not None and (checkpoint / "manifest.json").exists():
        step = int(checkpoint.name.removeprefix("step-"))
        same = step > made["step"] or (step == made["step"] and made["of"] == _of(checkpoint))
    if not same:
        raise EchelonError(f"{folder} holds another run: choose another folder, or move it away")


def _forked(checkpoint: Checkpoint, old: RunConfig, new: RunConfig, stream: int, source: Path) -> Checkpoint:
    """The checkpoint with which the fork begins."""
    progress = {
        **checkpoint.progress,
        "config": identity(new),
        "sizes": dict.fromkeys(checkpoint.progress["sizes"], 0),
        "model": {},
    }
    worlds, algorithm = dict(checkpoint.worlds), dict(checkpoint.algorithm)
    if _shapes(old) != _shapes(new):
        # Built as the fork will be: its rules and its world's terms come with them.
        team = build_worlds(new, num_envs=new.num_envs, seed=new.seed, training=True)
        memory = {k[len(_MEMORY) :]: v.numpy() for k, v in algorithm.items() if k.startswith(_MEMORY)}
        if memory:
            treated = _treated(memory, team, new.shaping, source)
            algorithm = {k: v for k, v in algorithm.items() if not k.startswith(_MEMORY)}
            algorithm |= {f"{_MEMORY}{k}": torch.from_numpy(np.array(v)) for k, v in treated.items()}
        worlds = _reshaped(worlds, team, anew=bool(memory) and new.shaping.buffer != "keep")
    if stream:
        worlds["env.keys"] = _others(worlds["env.keys"], stream)
        for name in _RANDOM:
            if name in algorithm:
                keys = algorithm[name].numpy().view(np.uint64)
                algorithm[name] = torch.from_numpy(_others(keys, stream).view(np.int64))
    return Checkpoint(progress, worlds, algorithm)


def _shapes(config: RunConfig) -> Any:
    """All that rewards depend on, to the last bit; None where they aren't shaped."""
    mixture, s = config.shaping.config(env_name(config.env)), config.shaping
    if mixture is None:
        return None
    return mixture.beta, mixture.weights, s.terminal, s.first_step, s.team, s.offset, s.scale


def _reshaped(worlds: _Arrays, team: TeamWorlds, *, anew: bool) -> _Arrays:
    """The state of the worlds as `team` can take it: the mixture is the new one.

    What each state was worth stays, or is computed `anew`, by that mixture.
    """
    plain = {k: v for k, v in worlds.items() if not k.startswith("shaping.")}
    if team.shaper is None:
        return plain
    phi = worlds.get("shaping.phi")
    if phi is None:
        team.env.load_state_dict({k.removeprefix("env."): v for k, v in worlds.items() if k.startswith("env.")})
        phi = term_set(team.env.name).terms(team.env)
    # In an unshaped run no state was worth anything.
    own = {"first": worlds["begins"], "added": np.zeros(team.env.num_envs), "phi": phi}
    new = ["beta", "weights"]
    if anew:
        team.shaper.begin(phi)
        new.append("worth")
    own = team.shaper.state_dict() | own
    kept = {k: v for k, v in worlds.items() if k not in {f"shaping.{name}" for name in new}}
    return {f"shaping.{k}": v for k, v in own.items()} | kept


def _treated(memory: _Arrays, team: TeamWorlds, settings: ShapingSettings, source: Path) -> _Arrays:
    """A replay memory's state, with what `shaping.buffer` wants done to it."""
    if settings.buffer == "clear" or not len(memory["reward"]):
        return {k: np.zeros_like(v) if k == "next" else v[:0] for k, v in memory.items()}
    terms = ("unshaped", "phi", "next_phi")
    if team.shaper is not None and "phi" not in memory:
        raise EchelonError(
            f"the replay memory of run {source} holds no potential terms, since its shaping.mode was off: fork it with "
            f"shaping.buffer clear, or train it with a mode and shaping.beta 0"
        )
    if settings.buffer == "relabel":
        reward = memory["unshaped"]
        if team.shaper is not None:
            reward = relabel(
                reward, memory["phi"], memory["next_phi"], memory["terminated"], team.shaper.config,
                names=team.shaper.names, rules=team.shaper.rules, begins=memory["begins"][:, :-1],
            )  # fmt: skip
        # As a rollout's comes into the memory: every agent has the team's, and their mean is kept.
        memory = memory | {"reward": team_mean(reward[..., None].repeat(team.env.num_agents, -1))}
    return memory if team.shaper is not None else {k: v for k, v in memory.items() if k not in terms}


def _others(keys: NDArray[np.uint64], stream: int) -> NDArray[np.uint64]:
    """Other keys, each made of the old one and `stream` alone: forks of forks differ too."""
    return np.array([spawn_keys(key, (5, stream), 1)[0] for key in keys.tolist()], np.uint64)
