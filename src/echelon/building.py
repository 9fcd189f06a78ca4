"""From a run's config to what it names: model, planners, worlds, algorithm, executor."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from echelon.algorithms import Algorithm, create
from echelon.configs import PlanningConfig, RunConfig
from echelon.envs import env_name, make
from echelon.executors import Executor, LearnedExecutor, ModelExecutor, PIBTExecutor
from echelon.llm.choice import CausalChoiceModel
from echelon.methods import method
from echelon.networks import Precision, resolve_precision
from echelon.planners import Planner, make_rule_planner
from echelon.planners.base import ModelPlanner
from echelon.planners.llm import PROMPTS, LLMPlanner
from echelon.planners.recorded import RecordedPlanner
from echelon.rollout import PlanTrace, TeamWorlds
from echelon.subgoals import FEATURES

__all__ = [
    "build_algorithm",
    "build_executor",
    "build_planner",
    "build_worlds",
    "forget_answers",
    "model_of",
    "settled",
    "use_threads",
]

_models: dict[str, CausalChoiceModel] = {}


def model_of(spec: str) -> CausalChoiceModel:
    """The language model of that name, loaded once a process.

    Raises:
        EchelonError: it isn't known, isn't fetched or is damaged.
    """
    if spec not in _models:
        # One thread: two that wait for each other lose several times over where another program wants a core.
        _models[spec] = CausalChoiceModel.load(spec, threads=1)
    return _models[spec]


def forget_answers() -> None:
    """Let the language models loaded here forget what they were asked, so that a run's cost is its own."""
    for model in _models.values():
        model.forget()


def settled(config: RunConfig) -> RunConfig:
    """The config with everything decided that depends on the machine and on which the results depend."""
    precision = str(resolve_precision(config.algorithm.precision)).removeprefix("torch.")
    algorithm = dataclasses.replace(config.algorithm, precision=cast(Precision, precision))
    # The recurrent actor's sums in parallel depend on the number of threads; all others' don't.
    threads = (config.threads or os.cpu_count() or 1) if algorithm.recurrent else config.threads
    return dataclasses.replace(config, algorithm=algorithm, threads=threads)


def use_threads(config: RunConfig) -> None:
    """Let torch use one thread of its own, since networks are computed in lanes; a recurrent actor needs them."""
    torch.set_num_threads((config.threads or os.cpu_count() or 1) if config.algorithm.recurrent else 1)


def build_planner(spec: str, config: RunConfig) -> Planner:
    """The planner of that name; "llm" alone stands for the configured model."""
    if spec == "llm" or spec.startswith("llm:"):
        return _model_planner(config.model if spec == "llm" else spec[4:], config.planning)
    if spec.startswith("record:"):
        return RecordedPlanner(Path(spec.removeprefix("record:")))
    return make_rule_planner(spec)


def _model_planner(spec: str, planning: PlanningConfig) -> ModelPlanner:
    folder = Path(planning.prompts) if planning.prompts else PROMPTS
    return LLMPlanner(model_of(spec), max_options=planning.max_options, folder=folder)


def build_worlds(
    config: RunConfig,
    *,
    num_envs: int,
    seed: int,
    training: bool,
    on_plan: Callable[[PlanTrace], None] | None = None,
    trace_all: bool = False,
    on_subgoals: Callable[[dict[str, Any]], None] | None = None,
) -> TeamWorlds:
    """The worlds of a run with its planners.

    Args:
        config: the run.
        num_envs: worlds in the batch.
        seed: root seed of the worlds and of what planners draw.
        training: while training, a language model plans only its share of the worlds.
        on_plan, trace_all, on_subgoals: see `TeamWorlds`.
    """
    kind = method(config.method)
    spec = kind.train_planner if training else kind.eval_planner
    if spec is not None and config.planner is not None:
        spec = config.planner
    planners: list[tuple[Planner, NDArray[np.bool_]]] = []
    if spec is not None:
        mine = np.ones(num_envs, bool)
        if training and spec.startswith("llm") and kind.learns:
            mine[:] = np.arange(num_envs) < max(1, round(config.llm_share * num_envs))
        planner = build_planner(spec, config)
        if isinstance(planner, RecordedPlanner):
            mine[:] = np.isin(np.arange(num_envs), planner.worlds)
        planners.append((planner, mine))
        if not mine.all():
            planners.append((make_rule_planner(config.cheap_planner), ~mine))
    env = make(
        env_name(config.env), config.env, num_envs=num_envs, seed=seed, extra_features=FEATURES if planners else 0
    )
    return TeamWorlds(
        env,
        planners,
        config.subgoals,
        gamma=config.algorithm.gamma,
        seed=seed,
        collision_cost=config.collision_cost,
        on_plan=on_plan,
        trace_all=trace_all,
        on_subgoals=on_subgoals,
        # An evaluation is of the plans, not of the machine's speed: only a lag that is a setting is kept.
        beside=config.planning.timing == "lag" or (training and config.planning.timing == "free"),
        lag=config.planning.lag if config.planning.timing == "lag" else None,
        threads=config.planning.rounds,
    )


def build_algorithm(config: RunConfig, worlds: TeamWorlds) -> Algorithm:
    """Fresh networks for a run's worlds."""
    env = worlds.env
    return create(
        method(config.method).algorithm,
        config.algorithm,
        num_envs=env.num_envs,
        num_agents=env.num_agents,
        obs_scale=worlds.obs_scale,
        state_scale=env.state_scale,
        num_actions=env.num_actions,
        team_reward=worlds.team_reward,
        seed=config.seed,
        threads=config.threads or os.cpu_count() or 1,
    )


def build_executor(config: RunConfig, worlds: TeamWorlds, policy: dict[str, torch.Tensor] | None) -> Executor:
    """Who acts in `worlds`, as the method says: a policy with these tensors, an untrained one, the model, or PIBT."""
    kind = method(config.method)
    if kind.executor == "pibt":
        return PIBTExecutor(worlds)
    if kind.executor == "model":
        return ModelExecutor(model_of(config.model), worlds.env.num_envs, config.seed)
    algorithm = build_algorithm(config, worlds)
    if policy is not None:
        algorithm.load_state_dict(policy, policy_only=True)
    return LearnedExecutor(algorithm)
