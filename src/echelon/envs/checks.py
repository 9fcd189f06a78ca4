"""Does an environment keep the contract? `check_env` says what doesn't hold; for new worlds and for old ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echelon.envs import kernels
from echelon.envs.base import ACTIONS, GridConfig, GridEnv, SubgoalKind
from echelon.errors import EchelonError, unknown_name

__all__ = ["check_env"]

Build = Callable[..., GridEnv[Any]]
_STEPS = 60


def check_env(env: str | type[GridEnv[Any]], config: GridConfig | None = None, *, seed: int = 0) -> list[str]:
    """Check an environment against the contract of `GridEnv`.

    It plays some short episodes (with random moves, and with agents that walk to their candidate subgoals) and
    compares what the contract promises with what happens: arrays keep their place, shape and dtype; worlds don't
    depend on the batch around them; one seed decides; saved states replay; masks are honest; agents never meet;
    truncation isn't termination; final observations are the true last ones; candidates, scenes and arrays agree
    and every candidate can be reached; scenes hide what is hidden; rewards come from progress alone.

    Args:
        env: a registered name, or a class.
        config: its settings; default: those of the registered config class.
        seed: root seed of the worlds.

    Returns:
        What doesn't hold, a line each; empty when all is well.

    Raises:
        EchelonError: unknown name, or no config for a class that isn't registered.
    """
    from echelon.envs import _REGISTRY  # not at the top: that package imports this module

    if isinstance(env, str):
        if env not in _REGISTRY:
            raise unknown_name("environment", env, _REGISTRY)
        config_class, env_class = _REGISTRY[env]
    else:
        env_class = env
        found = _REGISTRY.get(getattr(env, "name", ""))
        if config is None and (found is None or found[1] is not env):
            raise EchelonError(f"{env.__name__} isn't registered: give check_env its config too")
        config_class = found[0] if found is not None else GridConfig
    settings = config if config is not None else config_class()

    def build(num_envs: int = 3, seed: int = seed, config: GridConfig = settings, **more: Any) -> GridEnv[Any]:
        return env_class(config, num_envs, seed, **more)

    # Short episodes, so that their ends are seen too.
    short = dataclasses.replace(settings, limit=min(settings.limit or 25, 25))
    findings: list[str] = []
    for check in (_arrays, _batches, _replay, _rules, _ends, _candidates, _scenes, _sizes, _bad_actions):
        said: set[str] = set()
        try:
            for finding in check(build, short if check in (_batches, _replay, _ends) else settings):
                # One line for each thing that is wrong, not one for each step at which it is.
                if finding.split(" (")[0] not in said:
                    said.add(finding.split(" (")[0])
                    findings.append(f"{check.__name__[1:]}: {finding}")
        except Exception as error:
            findings.append(f"{check.__name__[1:]}: raised {type(error).__name__}: {error}")
    return findings


def _random_moves(env: GridEnv[Any], steps: int, worlds: int) -> NDArray[np.int8]:
    rng = np.random.default_rng(20240229)
    return rng.integers(0, len(ACTIONS), (steps, worlds, env.num_agents)).astype(np.int8)


class _Walker:
    """Moves that mostly walk to a random candidate subgoal, so that tasks get done; some are random."""

    def __init__(self, env: GridEnv[Any]) -> None:
        self.env, self.rng = env, np.random.default_rng(7)
        self.queue = np.zeros(env.num_cells, np.int32)
        self.fields = np.zeros((env.num_envs, env.num_agents, env.num_cells), np.uint16)
        self.left = np.zeros((env.num_envs, env.num_agents), np.int64)

    def moves(self) -> NDArray[np.int8]:
        env, rng = self.env, self.rng
        out = rng.integers(0, len(ACTIONS), (env.num_envs, env.num_agents)).astype(np.int8)
        options = env.candidate_arrays(np.arange(env.num_envs))
        for w in range(env.num_envs):
            for a in range(env.num_agents):
                field, cell = self.fields[w, a], env.pos[w, a]
                if self.left[w, a] <= 0 or field[cell] == 0:
                    kinds = options.kind[w, a]
                    # The first candidate often: that is the one to deliver or to repair.
                    pick = rng.integers((kinds >= 0).sum()) if rng.random() < 0.5 else 0
                    target = options.cell[w, a, pick]
                    kernels.distance_field(field, env.grid[w], target, env.stride, self.queue)
                    self.left[w, a] = 20
                self.left[w, a] -= 1
                if rng.random() < 0.9:
                    ahead = [kernels.first_step(field, env.grid[w], cell, offset) for offset in env.offsets]
                    out[w, a] = int(np.argmax(ahead))
        return out


def _dtypes(env: GridEnv[Any]) -> dict[str, tuple[type, tuple[int, ...]]]:
    W, A, T = env.num_envs, env.num_agents, env.num_tasks
    return {
        "obs": (np.int8, (W, A, env.obs_size)),
        "final_obs": (np.int8, (W, A, env.obs_size)),
        "action_mask": (np.uint8, (W, A, len(ACTIONS))),
        "reward": (np.float32, (W,)),
        "terminated": (np.bool_, (W,)),
        "truncated": (np.bool_, (W,)),
        "collisions": (np.int32, (W,)),
        "pos": (np.int32, (W, A)),
        "carrying": (np.int16, (W, A)),
        "task_status": (np.int8, (W, T)),
        "task_cell": (np.int32, (W, T)),
        "task_goal": (np.int32, (W, T)),
        "task_done_by": (np.int16, (W, T)),
        "new_info": (np.bool_, (W,)),
        "steps": (np.int32, (W,)),
    }


def _arrays(build: Build, config: GridConfig) -> Iterator[str]:
    env = build(config=config, extra_features=3)
    env.obs_buffer[:, :, env.obs_size :] = 7
    expected = _dtypes(env)
    places = {name: getattr(env, name).__array_interface__["data"] for name in expected}
    for moves in _random_moves(env, 5, 3):
        env.step(moves)
    env.reset()
    for name, (dtype, shape) in expected.items():
        array = getattr(env, name)
        if array.dtype != dtype or array.shape != shape:
            yield f"{name} is {array.dtype}{array.shape}, it must be {np.dtype(dtype)}{shape}"
        if array.__array_interface__["data"] != places[name]:
            yield f"{name} moved to another place in memory: arrays are updated in place"
    if (env.obs_buffer[:, :, env.obs_size :] != 7).any():
        yield "the columns kept free behind the observations were overwritten"
    if env.obs_scale.shape != (env.obs_size,) or env.obs_scale.dtype != np.float32:
        yield f"obs_scale is {env.obs_scale.dtype}{env.obs_scale.shape}, it must be float32({env.obs_size},)"
    words = len(env.status_words)
    if env.task_status.min() < 0 or env.task_status.max() >= words:
        yield f"task_status has a value that isn't one of the {words} status words"
    states = env.states(np.full((3, env.state_size), 99, np.int8))
    if (states != env.states(np.full((3, env.state_size), -99, np.int8))).any():
        yield "states doesn't write every column"


def _same(one: GridEnv[Any], other: GridEnv[Any], worlds: int) -> Iterator[str]:
    theirs = other.state_dict()
    for name, array in one.state_dict().items():
        if not np.array_equal(array[:worlds], theirs[name][:worlds]):
            yield name


def _batches(build: Build, config: GridConfig) -> Iterator[str]:
    env = build(8, config=config)
    twin = build(8, config=config)
    parts = {1: build(1, config=config), 3: build(3, config=config)}
    walker = _Walker(env)
    for t in range(_STEPS):
        moves = walker.moves()
        for name in _same(env, twin, 8):
            yield f"two runs of one seed differ in {name} (step {t})"
        for count, part in parts.items():
            for name in _same(part, env, count):
                yield f"a world depends on the worlds beside it: {name} differs in batches of {count} and 8 (step {t})"
            part.step(moves[:count])
        env.step(moves)
        twin.step(moves)
    env.reseed(5)
    for name in _same(env, build(8, seed=5, config=config), 8):
        if name != "final_obs":
            yield f"reseed(5) and building with seed 5 differ in {name}"


def _replay(build: Build, config: GridConfig) -> Iterator[str]:
    env = build(config=config)
    walker = _Walker(env)
    for _ in range(13):
        env.step(walker.moves())
    saved = env.state_dict()
    other = build(config=config, seed=99)
    for moves in _random_moves(env, 7, 3):
        other.step(moves)
    other.load_state_dict(saved)
    if any((array != saved[name]).any() for name, array in other.state_dict().items()):
        yield "load_state_dict doesn't put back what state_dict gave"
    for t in range(13, _STEPS):
        moves = walker.moves()
        env.step(moves)
        other.step(moves)
        for name in _same(env, other, 3):
            yield f"a restored environment goes on differently: {name} (step {t})"
    if any(np.shares_memory(array, getattr(env, name)) for name, array in saved.items()):
        yield "state_dict gives views, not copies"


def _rules(build: Build, config: GridConfig) -> Iterator[str]:
    env = build(config=config)
    walker = _Walker(env)
    for t in range(3 * _STEPS):
        before, mask, load = env.pos.copy(), env.action_mask.copy(), env.carrying.copy()
        moves = walker.moves() if t % 5 else _random_moves(env, t + 1, 3)[t]
        env.advance(moves)
        status = f"(step {t})"
        allowed = np.take_along_axis(mask, moves[:, :, None].astype(np.int64), 2)[:, :, 0].astype(bool)
        goal = before + env.offsets[moves]
        if not mask[:, :, 0].all():
            yield f"staying is masked {status}"
        if (env.pos != before)[~allowed].any():
            yield f"a masked move moved an agent {status}"
        if ((env.pos != before) & (env.pos != goal)).any():
            yield f"an agent went elsewhere than its move says {status}"
        stuck = (env.pos != goal) & allowed
        if stuck[env.collisions == 0].any():
            yield f"a legal move failed though no collision was counted {status}"
        if (stuck.sum(1) != env.collisions).any():
            yield f"collisions isn't the number of prevented moves {status}"
        for w in range(env.num_envs):
            if len(set(env.pos[w].tolist())) < env.num_agents:
                yield f"two agents are in one cell {status}"
            ways = {(int(a), int(b)) for a, b in zip(before[w], env.pos[w], strict=True) if a != b}
            if any((b, a) in ways for a, b in ways):
                yield f"two agents swapped their cells {status}"
            if (env.grid[w, env.pos[w]] & kernels.WALL).any():
                yield f"an agent stands in a wall {status}"
        walls = (env.grid[np.arange(env.num_envs)[:, None, None], env.pos[:, :, None] + env.offsets]) & kernels.WALL
        if ((walls == 0) != (env.action_mask == 1)).any():
            yield f"action_mask isn't 1 exactly where a move isn't into a wall {status}"
        if (env.task_done_by < -1).any() or (env.task_done_by >= env.num_agents).any():
            yield f"task_done_by names an agent that doesn't exist {status}"
        progress = (env.task_done_by >= 0).any(1) | env.new_info
        if ((env.reward != 0) & ~progress).any():
            yield f"a reward came without progress of a task {status}"
        if (env.carrying >= env.num_tasks).any() or (env.carrying < -1).any():
            yield f"carrying names a task that doesn't exist {status}"
        if ((env.carrying != load).any(1) & ~progress).any():
            yield f"a load changed without progress of a task {status}"
        env.autoreset()


def _ends(build: Build, config: GridConfig) -> Iterator[str]:
    env, whole = build(config=config), build(config=config)
    walker = _Walker(env)
    for t in range(3 * _STEPS):
        moves = walker.moves()
        env.advance(moves)
        last, steps = env.obs.copy(), env.steps.copy()
        outcome = (env.reward.copy(), env.terminated.copy(), env.truncated.copy())
        if (env.terminated & env.truncated).any():
            yield f"a world is both terminated and truncated (step {t})"
        done = env.terminated | env.truncated
        if (env.truncated != ((steps >= env.limit) & ~env.terminated)).any():
            yield f"truncated isn't true exactly at the time limit of {env.limit} steps (step {t})"
        env.autoreset()
        if (env.final_obs[done] != last[done]).any():
            yield f"final_obs isn't the last observation before the reset (step {t})"
        if (env.obs[~done] != last[~done]).any() or (env.steps != np.where(done, 0, steps)).any():
            yield f"the reset of a finished world touched another one, or left its step count (step {t})"
        now = (env.reward, env.terminated, env.truncated)
        if any((a != b).any() for a, b in zip(outcome, now, strict=True)):
            yield f"autoreset changed the outcome of the step (step {t})"
        if (whole.step(moves) != done).any() or any(_same(env, whole, 3)):
            yield f"step isn't advance followed by autoreset (step {t})"


def _candidates(build: Build, config: GridConfig) -> Iterator[str]:
    env = build(config=config)
    walker = _Walker(env)
    field, queue = np.zeros(env.num_cells, np.uint16), np.zeros(env.num_cells, np.int32)
    for t in range(_STEPS):
        rows = np.arange(env.num_envs) if t % 2 else np.array([2, 0])
        arrays = env.candidate_arrays(rows)
        good = np.ones((env.num_envs, env.num_agents), bool)
        for n in range(arrays.kind.shape[2]):
            kind, task = np.full(good.shape, -1, np.int8), np.full(good.shape, -1, np.int16)
            kind[rows], task[rows] = arrays.kind[:, :, n], arrays.task[:, :, n]
            if not env.subgoals_open(kind, task, good).all():
                yield f"subgoals_open says that a candidate can't be done (step {t})"
        for i, w in enumerate(rows):
            scene = env.scene(int(w))
            for a in range(env.num_agents):
                subgoals = type(env).candidates(scene, a)
                listed = [(int(s.kind), env.cell_index(*s.target), -1 if s.task is None else s.task) for s in subgoals]
                count = len(listed)
                if not count:
                    yield f"an agent has no candidates (step {t})"
                row = (arrays.kind[i, a], arrays.cell[i, a], arrays.task[i, a])
                if listed != list(zip(*(part[:count].tolist() for part in row), strict=True)):
                    yield f"candidate_arrays and candidates(scene) differ (step {t}, world {w}, agent {a})"
                if (arrays.kind[i, a, count:] != -1).any():
                    yield f"candidate_arrays has more candidates than candidates(scene) (step {t})"
                for wanted, cell, _task in listed:
                    if wanted == SubgoalKind.WAIT and cell != env.pos[w, a]:
                        yield f"to wait is to wait elsewhere (step {t})"
            kernels.distance_field(field, env.grid[w], env.pos[w, 0], env.stride, queue)
            offered = arrays.cell[i][arrays.kind[i] >= 0]
            if (field[offered] == kernels.UNREACHABLE).any():
                yield f"a candidate's cell can't be reached (step {t}, world {w})"
        env.step(walker.moves())


def _scenes(build: Build, config: GridConfig) -> Iterator[str]:
    env = build(config=config)
    walker = _Walker(env)
    for t in range(_STEPS // 2):
        for w in range(env.num_envs):
            scene = env.scene(w)
            if (scene.env, scene.step, scene.limit) != (env.name, env.steps[w], env.limit):
                yield f"a scene's name, step or limit isn't the world's (step {t})"
            if scene.walls.flags.writeable or not np.array_equal(scene.walls, env.walls(w)):
                yield f"a scene's walls can be written or aren't the world's (step {t})"
            if [env.cell_index(*agent.cell) for agent in scene.agents] != env.pos[w].tolist():
                yield f"a scene's agents aren't where they are (step {t})"
            if [task.id for task in scene.tasks] != list(range(len(scene.tasks))):
                yield f"a scene's tasks aren't in the order of their ids (step {t})"
            for task in scene.tasks:
                place = task.cell
                hidden = scene.seen is not None and place is not None and not scene.seen[place]
                # A region's cell is where to look next: unseen, and known to be.
                if hidden and task.kind != "region":
                    yield f"a scene tells where {task.label} is though nobody has seen that cell (step {t})"
            if not type(env).describe(scene).strip():
                yield f"describe gives no words (step {t})"
        scene = env.scene(0)
        words, walls = type(env).describe(scene), scene.walls.copy()
        env.step(walker.moves())
        if type(env).describe(scene) != words or (scene.walls != walls).any():
            yield f"a scene changes when the world goes on (step {t})"


def _sizes(build: Build, config: GridConfig) -> Iterator[str]:
    size = build(1, config=config).obs_size
    for side in (40, 61):
        wide = dataclasses.replace(config, size=side, height=None, width=side + 3, map=None)
        env = build(1, config=wide)
        if env.obs_size != size:
            yield f"observations have {env.obs_size} features on a map of {side} rows, and {size} on this one"
        env.step(np.zeros((1, env.num_agents), np.int8))


def _bad_actions(build: Build, config: GridConfig) -> Iterator[str]:
    env = build(config=config)
    good = np.zeros((3, env.num_agents), np.int8)
    bad: NDArray[Any]
    for bad in (good - 1, good + len(ACTIONS), good[:2], good.astype(np.float64)):
        try:
            env.step(bad)  # type: ignore[arg-type]
        except EchelonError:
            continue
        yield f"step takes actions of {bad.dtype}{bad.shape} from {bad.min()} to {bad.max()} without an error"
