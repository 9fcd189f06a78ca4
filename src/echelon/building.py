"""From a run's config to what it names: model, planners, worlds, algorithm, executor."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

import echelon
from echelon.algorithms import Algorithm, create
from echelon.configs import RunConfig
from echelon.envs import env_name, make
from echelon.errors import EchelonError
from echelon.executors import Executor, LearnedExecutor, ModelExecutor, PIBTExecutor
from echelon.llm import distributed, locate
from echelon.llm.budget import Budget, BudgetConfig, BudgetedChoice, BudgetedText
from echelon.llm.choice import CausalChoiceModel, ChoiceModel
from echelon.llm.gguf import GGUFConfig, GGUFModel
from echelon.llm.policy import ChoicePolicy, LearningChoice
from echelon.llm.prompts import PromptTemplate
from echelon.llm.server import ServerConfig, ServerModel
from echelon.llm.store import resolve_gguf, untouched
from echelon.llm.text import TextModel
from echelon.methods import method
from echelon.networks import Precision, resolve_precision
from echelon.planners import Planner, make_rule_planner
from echelon.planners.base import ModelPlanner
from echelon.planners.distilled import DistilledPlanner, Student
from echelon.planners.frugal import FrugalPlanner
from echelon.planners.generating import GeneratingPlanner
from echelon.planners.llm import LEARNED_PROMPTS, PROMPTS, TEMPLATES, LLMPlanner
from echelon.planners.plan_cache import CachedPlans, PlanCache
from echelon.planners.recorded import RecordedPlanner
from echelon.rollout import PlanTrace, TeamWorlds
from echelon.runs import processor
from echelon.shaping import PotentialShaper, term_set
from echelon.subgoals import FEATURES

__all__ = [
    "STUDENT",
    "build_algorithm",
    "build_executor",
    "build_planner",
    "build_worlds",
    "forget_answers",
    "model_of",
    "prompts_of",
    "save_planner",
    "settled",
    "spent_by",
    "use_threads",
    "writer_of",
]

STUDENT = "student.npz"
"""The file of a run's folder that holds its student."""

_models: dict[str, CausalChoiceModel] = {}
_writers: dict[tuple[str, ServerConfig | GGUFConfig | None], TextModel] = {}


def model_of(spec: str) -> CausalChoiceModel:
    """The language model of that name, loaded into this process once.

    Raises:
        EchelonError: it isn't known, isn't fetched or is damaged, or isn't one that is loaded here.
    """
    if spec.startswith(("openai:", "gguf:")):
        raise EchelonError(f"model {spec} writes text, and its probabilities aren't known: use a local one (hf:…)")
    if spec not in _models:
        # Lanes, each with its own prompts: none waits for another, and answers don't depend on how many there are.
        _models[spec] = CausalChoiceModel.load(spec, threads=os.cpu_count() or 1)
    return _models[spec]


def writer_of(spec: str, server: ServerConfig, gguf: GGUFConfig) -> TextModel:
    """The model of that name as one that writes text: behind a server, or in this process.

    Raises:
        EchelonError: as `model_of`, or settings or a key that can't be used.
    """
    kind, _, name = spec.partition(":")
    settings: dict[str, ServerConfig | GGUFConfig] = {"openai": server, "gguf": gguf}
    key = (spec, settings.get(kind))
    if key not in _writers:
        if kind == "openai":
            _writers[key] = ServerModel(name, server)
        elif kind == "gguf":
            _writers[key] = GGUFModel.load(spec, gguf)
        else:
            # A shipped planner was trained to rate, not to write.
            _writers[key] = model_of(untouched(spec)).text()
    return _writers[key]


def prompts_of(spec: str, *, learns: bool = False) -> Path:
    """The templates that a model that rates is asked with: those that lie beside its weights, else the shipped ones."""
    own = locate(spec)
    if all((own / name).is_file() for name in TEMPLATES):
        return own
    return LEARNED_PROMPTS if learns else PROMPTS


def save_planner(policy: LearningChoice, planner: LLMPlanner, folder: Path) -> None:
    """Write what a planner has learnt, with its templates, into `folder`, fit for `--model hf:<folder>`."""
    policy.save(folder, {name: t.text + "\n" for name, t in zip(TEMPLATES, planner.templates, strict=True)})


def spent_by(config: RunConfig, worlds: TeamWorlds) -> dict[str, float]:
    """What the language model of a run has done so far, in this process: its counters, or nothing without one."""
    for planner, _ in worlds.planners:
        if isinstance(planner, ModelPlanner):
            if isinstance(planner.model, LearningChoice):
                return planner.model.spent()
            return dict(planner.model.state_dict()) if hasattr(planner.model, "state_dict") else {}
    return dict(model_of(untouched(config.model)).state_dict()) if method(config.method).executor == "model" else {}


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
    share = config.model_share if method(config.method).needs_model(config.planner) else config.llm_share
    return dataclasses.replace(config, algorithm=algorithm, threads=threads, llm_share=share)


def use_threads(config: RunConfig) -> None:
    """Let torch use one thread of its own, since networks are computed in lanes; a recurrent actor needs them."""
    torch.set_num_threads((config.threads or os.cpu_count() or 1) if config.algorithm.recurrent else 1)


def build_planner(spec: str, config: RunConfig, *, training: bool = False) -> Planner:
    """The planner of that name; "llm" alone stands for the configured model.

    While training a student may take the model's place; an evaluation is of the model itself, at every decision.
    """
    if spec == "llm" or spec.startswith("llm:"):
        return _model_planner(config.model if spec == "llm" else spec[4:], config, training=training)
    if spec.startswith("distilled:"):
        path = Path(spec.removeprefix("distilled:"))
        return DistilledPlanner(Student.load(path / STUDENT if path.is_dir() else path))
    if spec.startswith("record:"):
        return RecordedPlanner(Path(spec.removeprefix("record:")))
    return make_rule_planner(spec)


def _model_planner(spec: str, config: RunConfig, *, training: bool) -> ModelPlanner:
    """Who plans with the model, and what spares it, as the config says."""
    p = config.planning
    folder = Path(p.prompts) if p.prompts else None
    budget = Budget(config.budget) if config.budget != BudgetConfig() else None
    planner: ModelPlanner
    if config.subgoals.space != "task":
        spec = untouched(spec)  # the shipped planner knows the worlds' own tasks
    if config.generates:
        writer = writer_of(spec, config.server, config.gguf)
        planner = GeneratingPlanner(
            writer if budget is None else BudgetedText(writer, budget), ask=p.ask, folder=folder, memory=p.memory,
            reflect=p.reflect, max_options=p.max_options, max_tokens=p.max_tokens,
        )  # fmt: skip
    else:
        learns = training and bool(method(config.method).learner)
        folder = folder or prompts_of(spec, learns=learns)
        model: ChoiceModel
        if learns:
            shared = PromptTemplate.from_file(folder / TEMPLATES[0]).render()
            # Under torchrun only the leader comes back from here.
            model = distributed.shared_policy(
                lambda: ChoicePolicy.load(
                    spec, shared, config.policy, threads=config.threads or distributed.cores(), seed=config.seed
                )
            )
        else:
            model = model_of(spec)
        planner = LLMPlanner(
            model if budget is None else BudgetedChoice(model, budget), max_options=p.max_options,
            folder=folder,
        )  # fmt: skip
    student = Student(config.distil, config.seed) if config.distil.enabled and training else None
    cache = None
    if p.cache:
        if planner.sees is None:  # reflections, which depend on more too, are refused beside a cache
            raise EchelonError(
                f"planning.cache doesn't know what {planner.name} is told of its surroundings: leave it out, or use a "
                f"model that is told less (--model smollm2-135m)"
            )
        path = None if p.cache == "memory" else Path(p.cache)
        kept = PlanCache(path, namespace=_namespace(spec, config, planner))
        cache = CachedPlans(kept, planner.sees, coarse=p.cache_coarse)
    if student is None and cache is None and budget is None:
        return planner
    return FrugalPlanner(planner, student=student, cache=cache, budget=budget)


def _namespace(spec: str, config: RunConfig, planner: ModelPlanner) -> str:
    """All that a plan depends on beside the scene: the model itself, the way it is asked, and this code."""
    told: list[str] = [spec, *planner.depends_on, echelon.__version__]
    if spec.startswith("openai:"):
        told += [writer_of(spec, config.server, config.gguf).url, str(config.server.temperature)]  # type: ignore[attr-defined]
    else:
        told.append(repr(config.gguf) if spec.startswith("gguf:") else "")
        path = resolve_gguf(spec) if spec.startswith("gguf:") else locate(spec)
        files = [path] if path.is_file() else sorted(path.iterdir())
        told += [f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]
        told += [torch.__version__, processor()]  # other bits in the last place may tip a choice
    return hashlib.blake2b("\0".join(told).encode(), digest_size=16).hexdigest()


def build_worlds(
    config: RunConfig,
    *,
    num_envs: int,
    seed: int,
    training: bool,
    on_plan: Callable[[PlanTrace], None] | None = None,
    trace_all: bool = False,
    on_subgoals: Callable[[dict[str, Any]], None] | None = None,
    planner: Planner | None = None,
) -> TeamWorlds:
    """The worlds of a run with its planners.

    Args:
        config: the run.
        num_envs: worlds in the batch.
        seed: root seed of the worlds and of what planners draw.
        training: while training, a language model plans only its share of the worlds, and rewards may be shaped.
        on_plan, trace_all, on_subgoals: see `TeamWorlds`.
        planner: plans all worlds in the place of the run's own.
    """
    kind = method(config.method)
    spec = kind.train_planner if training else kind.eval_planner
    if spec is not None and config.planner is not None:
        spec = config.planner
    mine = np.ones(num_envs, bool)
    env = make(
        env_name(config.env), config.env, num_envs=num_envs, seed=seed,
        extra_features=0 if spec is None else FEATURES,
    )  # fmt: skip
    planners: list[tuple[Planner, NDArray[np.bool_]]] = []
    if spec is not None:
        if training:
            mine[:] = np.arange(num_envs) < config.own_worlds
        planner = planner or build_planner(spec, config, training=training)
        if isinstance(planner, RecordedPlanner):
            mine[:] = np.isin(np.arange(num_envs), planner.worlds)
        planners.append((planner, mine))
        if not mine.all():
            planners.append((make_rule_planner(config.cheap_planner), ~mine))
    shaping = None
    if training and (mixture := config.shaping.config(env.name)) is not None:
        replays = getattr(config.algorithm, "memory", 0) > 0
        terms, rules = term_set(env.name), config.shaping.rules(env, config.algorithm.gamma, replays=replays)
        shaping = (terms, PotentialShaper(mixture, terms.names, num_envs, rules))
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
        batch=config.planning.batch,
        shaping=shaping,
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
        # A shipped planner was trained to rate subgoals, not moves.
        return ModelExecutor(model_of(untouched(config.model)), worlds.env.num_envs, config.seed)
    algorithm = build_algorithm(config, worlds)
    if policy is not None:
        algorithm.load_state_dict(policy, policy_only=True)
    return LearnedExecutor(algorithm)
