"""Everything that decides how a team of language models is trained: frozen dataclasses, to and from TOML."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from echelon.algorithms.teams import TeamConfig, team_algorithms
from echelon.configs import read_toml_file, toml_document, typed
from echelon.errors import EchelonError, unknown_name
from echelon.llm.teams import Share
from echelon.llm.token_policy import Adapt
from echelon.tasks import TaskSettings, WritingSettings, task_name, tasks
from echelon.teams.robots import RobotTeamSettings as RobotTeamSettings  # registers warehouse and search
from echelon.teams.rollouts import TeamRolloutConfig

__all__ = ["TeamPolicyConfig", "TeamRunConfig", "read_team_toml", "team_from_toml", "team_to_toml"]


@dataclass(frozen=True)
class TeamPolicyConfig:
    """What of each language model learns, and how; see `TokenPolicy.load`."""

    adapt: Adapt = "lora"
    """lora: small matrices beside the weights; full: the weights themselves, in float32."""
    layers: int = 0
    """How many of the top layers learn; 0: all of them."""
    rank: int = 16
    """LoRA's rank."""
    alpha: int = 32
    """LoRA's scale: its matrices' product is multiplied by alpha / rank."""
    lr: float = 1e-4
    """AdamW's step size; for full weights 5e-6 (CoMLRL's) is a place to start."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    micro_tokens: int = 2048
    """Most tokens that go through at a time with a gradient; it changes memory, not results (but for rounding)."""
    sample_rows: int = 32
    """Most replies that are written at a time."""
    checkpointing: bool = False
    """Compute layers again in the backward pass instead of keeping what they need: less memory, a third more time."""


@dataclass(frozen=True)
class TeamRunConfig:
    """One training of a team of language models."""

    method: str = "magrpo"
    """How the team learns: magrpo, mareinforce, marloo, maremax, iac, maac, ma-vdn, ma-qmix."""
    env: TaskSettings = field(default_factory=WritingSettings)
    """What it works on."""
    model: tuple[str, ...] = ("smollm2-135m",)
    """The agents' language model, or one for each: a known name or hf:<folder or id>, an adapter too."""
    share: Share = "adapters"
    """adapters: one base in memory, an adapter an agent; weights: one model plays all; separate: a model for each."""
    updates: int = 50
    """Updates to train for."""
    batch: int = 4
    """Items an update."""
    seed: int = 0
    """The root seed: it alone decides everything."""
    eval_every: int = 10
    """Updates between evaluations; there is one before the first update and one after the last. 0: none."""
    eval_items: int = 8
    """Items to evaluate on, of those kept for it; 0: all."""
    eval_samples: int = 4
    """Episodes of each item in an evaluation, each on a path of its own."""
    checkpoint_every: int = 10
    """Updates between checkpoints."""
    threads: int | None = None
    """Processor threads to compute with; default: all cores. The last bits of results depend on it."""
    imitation: int = 0
    """Updates by imitation before all others, in tasks that have a teacher (warehouse, search: optimal assignment)."""
    imitation_batch: int = 32
    """Replies of each agent in each of these."""
    lessons: int = 256
    """Items in which the teacher is watched."""
    rollout: TeamRolloutConfig = cast(TeamRolloutConfig, None)  # noqa: RUF009
    """How replies are sampled; default: as suits the task."""
    policy: TeamPolicyConfig = field(default_factory=TeamPolicyConfig)
    """What of the models learns."""
    algorithm: TeamConfig = cast(TeamConfig, None)  # noqa: RUF009
    """How the team learns; default: as the method does by default."""

    def __post_init__(self) -> None:
        known = team_algorithms()
        if self.method not in known:
            raise unknown_name("method", self.method, known)
        if cast(Any, self.rollout) is None:
            object.__setattr__(self, "rollout", TeamRolloutConfig(**self.env.rollout))
        if cast(Any, self.algorithm) is None:
            object.__setattr__(self, "algorithm", known[self.method][1]())
        if type(self.algorithm) is not known[self.method][1]:
            wanted = known[self.method][1].__name__
            raise EchelonError(f"method {self.method} takes a {wanted}, not a {type(self.algorithm).__name__}")
        if not self.model:
            raise EchelonError("model names no model")
        for name, good, need in (
            ("updates", self.updates >= 1, "at least 1"),
            ("batch", self.batch >= 1, "at least 1"),
            ("seed", self.seed >= 0, "at least 0"),
            ("eval_every", self.eval_every >= 0, "at least 0"),
            ("eval_items", self.eval_items >= 0, "at least 0"),
            ("eval_samples", self.eval_samples >= 1, "at least 1"),
            ("imitation", self.imitation >= 0, "at least 0"),
            ("imitation_batch", self.imitation_batch >= 1, "at least 1"),
            ("lessons", self.lessons >= 1, "at least 1"),
            ("checkpoint_every", self.checkpoint_every >= 1, "at least 1"),
            ("algorithm.joint", self.rollout.branch == "every" or self.algorithm.joint == "aligned",
             "aligned where rollout.branch is first"),
            ("threads", self.threads is None or self.threads >= 1, "at least 1"),
        ):  # fmt: skip
            if not good:
                raise EchelonError(f"{name} is {operator.attrgetter(name)(self)}: it must be {need}")
        self.algorithm.check_group(self.rollout.group)


def team_to_toml(config: TeamRunConfig) -> str:
    """The config as TOML that `team_from_toml` reads back; settings that are None are left out."""
    return toml_document(config, task_name(config.env))


def read_team_toml(path: Path) -> TeamRunConfig:
    """The config in a TOML file; what it doesn't say has its default.

    Raises:
        EchelonError: no such file, not TOML, an unknown key (names the nearest) or a value of the wrong type.
    """
    return team_from_toml(read_toml_file(path, "config"), str(path))


def team_from_toml(data: dict[str, Any], source: str = "config") -> TeamRunConfig:
    """The config in a TOML document that was read; see `read_team_toml`."""
    data = dict(data)
    name, kind = str(data.pop("environment", "writing")), str(data.get("method", TeamRunConfig.method))
    known, algorithms = tasks(), team_algorithms()
    if name not in known:
        told = [name for name in known if name != "own"]  # that one is for Python
        raise unknown_name("environment of a team of language models", name, told)
    if kind not in algorithms:
        raise unknown_name("method of a team of language models", kind, algorithms)
    values: dict[str, Any] = {}
    tables = {"env": known[name], "rollout": TeamRolloutConfig, "policy": TeamPolicyConfig,
              "algorithm": algorithms[kind][1]}  # fmt: skip
    for key, cls in tables.items():
        table = data.pop(key, {})
        if not isinstance(table, dict):
            raise EchelonError(f"{source}: {key} must be a table, [{key}]")
        own = known[name].rollout if key == "rollout" else {}
        values[key] = cls(**{**own, **typed(cls, table, f"{source}: {key}.")})
    return TeamRunConfig(**values, **typed(TeamRunConfig, data, f"{source}: ", ("environment",)))
