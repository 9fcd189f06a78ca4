"""Views of the worlds for other libraries: PettingZoo's `ParallelEnv` and Gymnasium's `VectorEnv`.

    env = to_parallel_env("warehouse", size=10, num_agents=2)
    envs = to_vector_env("search", num_envs=64, seed=1)

Both need the extra `adapters` (`pip install "echelon-marl[adapters]"`); nothing else in Echelon does.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from echelon.envs.base import ACTIONS, GridConfig, GridEnv
from echelon.envs.scenes import picture
from echelon.errors import EchelonError

try:
    from gymnasium import spaces
    from gymnasium.vector import AutoresetMode, VectorEnv
    from gymnasium.vector.utils import batch_space
    from pettingzoo import ParallelEnv
except ImportError as error:  # the functions below say what to do
    _MISSING: str | None = error.name
    ParallelEnv = VectorEnv = object
    _SAME_STEP: Any = None
else:
    _MISSING = None
    _SAME_STEP = AutoresetMode.SAME_STEP

__all__ = ["ParallelView", "VectorView", "picture", "to_parallel_env", "to_vector_env"]

Obs = dict[str, NDArray[np.int8]]


def to_parallel_env(name: str, config: GridConfig | None = None, *, seed: int = 0, **settings: Any) -> ParallelView:
    """One world as a PettingZoo `ParallelEnv`.

    Args:
        name, config, settings: as for `echelon.envs.make`.
        seed: what the first episodes come from, until `reset(seed=…)` gives another.

    Raises:
        EchelonError: PettingZoo or Gymnasium isn't installed; or as `make`.
    """
    return ParallelView(_make(name, config, 1, seed, settings))


def to_vector_env(
    name: str, config: GridConfig | None = None, *, num_envs: int = 1, seed: int = 0, **settings: Any
) -> VectorView:
    """A batch of worlds as a Gymnasium `VectorEnv`, the whole team being one player.

    Args:
        name, config, settings, num_envs: as for `echelon.envs.make`.
        seed: what the first episodes come from, until `reset(seed=…)` gives another.

    Raises:
        EchelonError: PettingZoo or Gymnasium isn't installed; or as `make`.
    """
    return VectorView(_make(name, config, num_envs, seed, settings))


def _make(name: str, config: GridConfig | None, num_envs: int, seed: int, settings: dict[str, Any]) -> GridEnv[Any]:
    if _MISSING is not None:
        raise EchelonError(f"{_MISSING} isn't installed: pip install 'echelon-marl[adapters]'")
    from echelon.envs import make  # not at the top: that package may import this module

    return make(name, config, num_envs=num_envs, seed=seed, **settings)


class ParallelView(ParallelEnv):  # type: ignore[misc]
    """One world as a PettingZoo `ParallelEnv`; agents are "robot_0", "robot_1", ….

    Each agent's observation is a dict of `observation` (int8 `(obs_size,)`) and `action_mask` (int8 `(5,)`);
    every agent gets the team's reward. All agents leave when the episode ends; there is no autoreset.

    Attributes:
        env: the batch of one world behind it.
    """

    metadata: ClassVar[dict[str, Any]] = {
        "name": "echelon",
        "render_modes": ["ansi"],
        "is_parallelizable": True,
    }
    render_mode = "ansi"

    def __init__(self, env: GridEnv[Any]) -> None:
        """View `env`, a batch of one world."""
        if env.num_envs != 1:
            raise EchelonError(f"a ParallelEnv is one world, this batch has {env.num_envs}")
        self.env = env
        self.metadata = {**type(self).metadata, "name": f"echelon_{env.name}_v0"}  # type: ignore[misc]
        self.possible_agents = [f"robot_{a}" for a in range(env.num_agents)]
        self.agents: list[str] = []
        self.observation_spaces = {agent: _agent_space(env) for agent in self.possible_agents}
        self.action_spaces = {agent: spaces.Discrete(len(ACTIONS)) for agent in self.possible_agents}
        self.state_space = spaces.Box(-128, 127, (env.state_size,), np.int8)

    def observation_space(self, agent: str) -> Any:
        """The observation space of `agent`, always the same object."""
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> Any:
        """The action space of `agent`, always the same object."""
        return self.action_spaces[agent]

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Obs], dict[str, dict[str, Any]]]:
        """Begin an episode: the next one, or the first one of `seed`. There are no options."""
        if seed is None:
            self.env.reset()
        else:
            self.env.reseed(seed)
        self.agents = list(self.possible_agents)
        return self._observations(), {agent: {} for agent in self.agents}

    def step(
        self, actions: dict[str, int]
    ) -> tuple[dict[str, Obs], dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, Any]]]:
        """Step with an action for every agent.

        Raises:
            EchelonError: the episode has ended, or an agent's action is missing or no move.
        """
        if not self.agents:
            raise EchelonError("the episode has ended: call reset() before step()")
        missing = [agent for agent in self.agents if agent not in actions]
        if missing:
            raise EchelonError(f"no action for {', '.join(missing)}: every agent acts at every step")
        env = self.env
        env.advance(env._checked(np.array([[int(actions[agent]) for agent in self.agents]])))
        terminated, truncated = bool(env.terminated[0]), bool(env.truncated[0])
        info = {"collisions": int(env.collisions[0]), "success": terminated}
        agents = self.agents
        result = (
            self._observations(),
            dict.fromkeys(agents, float(env.reward[0])),
            dict.fromkeys(agents, terminated),
            dict.fromkeys(agents, truncated),
            {agent: dict(info) for agent in agents},
        )
        if terminated or truncated:
            self.agents = []
        return result

    def state(self) -> NDArray[np.int8]:
        """The centralised state, int8 `(state_size,)`."""
        out = np.zeros((1, self.env.state_size), np.int8)
        self.env.states(out)
        return out.reshape(-1)

    def render(self) -> str:
        """The world as text (`picture`)."""
        return picture(self.env.scene(0))

    def _observations(self) -> dict[str, Obs]:
        obs, mask = self.env.obs[0].copy(), self.env.action_mask[0].astype(np.int8)
        return {agent: {"observation": obs[a], "action_mask": mask[a]} for a, agent in enumerate(self.possible_agents)}


class VectorView(VectorEnv):  # type: ignore[misc]
    """A batch of worlds as a Gymnasium `VectorEnv`: one player moves the whole team.

    Observations are a dict of `observation` (int8 `(W, A, obs_size)`) and `action_mask` (int8 `(W, A, 5)`),
    actions `(W, A)`. Finished worlds are reset in the same step (`SAME_STEP`); their last observations are in
    `info["final_obs"]`, and `info["final_info"]` says `success`, and `steps`, the episode's length.

    Attributes:
        env: the batch behind it.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi"], "autoreset_mode": _SAME_STEP}
    render_mode = "ansi"

    def __init__(self, env: GridEnv[Any]) -> None:
        """View `env`."""
        self.env = env
        self.num_envs = env.num_envs
        self.single_observation_space = _agent_space(env, (env.num_agents,))
        self.single_action_space = spaces.MultiDiscrete([len(ACTIONS)] * env.num_agents)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)
        self.action_space = batch_space(self.single_action_space, env.num_envs)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, dict[str, Any]]:
        """Begin an episode in every world: the next ones, or the first ones of `seed`. There are no options."""
        super().reset(seed=seed)
        if seed is None:
            self.env.reset()
        else:
            self.env.reseed(seed)
        return self._observations(), {}

    def step(
        self, actions: NDArray[Any]
    ) -> tuple[Obs, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Step all worlds; actions are integers `(W, A)`.

        Raises:
            EchelonError: the actions have another shape or are no moves.
        """
        env = self.env
        env.advance(env._checked(actions))
        info: dict[str, Any] = {"collisions": env.collisions.copy(), "_collisions": np.ones(self.num_envs, bool)}
        done = env.terminated | env.truncated
        if done.any():
            last = self._observations()
            final = np.full(self.num_envs, None, object)
            for i in np.flatnonzero(done):
                final[i] = {key: value[i] for key, value in last.items()}
            success, steps = env.terminated & done, np.where(done, env.steps, 0)
            info["final_obs"], info["_final_obs"] = final, done.copy()
            info["final_info"] = {
                "success": success, "_success": done.copy(), "steps": steps, "_steps": done.copy(),
            }  # fmt: skip
            info["_final_info"] = done.copy()
            env.autoreset()
        return (
            self._observations(),
            env.reward.astype(np.float64),
            env.terminated.copy(),
            env.truncated.copy(),
            info,
        )

    def render(self) -> tuple[str, ...]:
        """Each world as text (`picture`)."""
        return tuple(picture(self.env.scene(i)) for i in range(self.num_envs))

    def _observations(self) -> Obs:
        return {"observation": self.env.obs.copy(), "action_mask": self.env.action_mask.astype(np.int8)}


def _agent_space(env: GridEnv[Any], lead: tuple[int, ...] = ()) -> Any:
    return spaces.Dict(
        {
            "observation": spaces.Box(-128, 127, (*lead, env.obs_size), np.int8),
            "action_mask": spaces.Box(0, 1, (*lead, len(ACTIONS)), np.int8),
        }
    )
