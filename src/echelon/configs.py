"""What a run can be told, as one frozen dataclass, and its way to TOML and back."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import types
import typing
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from echelon.algorithms import AlgorithmConfig, HiMACConfig, HiPERConfig, config_of
from echelon.algorithms.decisions import LearnerConfig
from echelon.envs import GridConfig, WarehouseConfig, env_name, environments
from echelon.errors import EchelonError, unknown_name
from echelon.llm.budget import BudgetConfig
from echelon.llm.gguf import GGUFConfig
from echelon.llm.policy import PolicyConfig
from echelon.llm.server import ServerConfig
from echelon.methods import method
from echelon.planners.distilled import DistilConfig
from echelon.shaping import ShapingSettings
from echelon.subgoals import PAST, SubgoalConfig

__all__ = [
    "PlanningConfig",
    "RunConfig",
    "from_toml",
    "read_toml",
    "read_toml_file",
    "to_toml",
    "toml_document",
    "toml_line",
    "typed",
]


@dataclass(frozen=True)
class PlanningConfig:
    """How a language model plans, and when. All defaults are our choice."""

    decide: Literal["auto", "score", "generate"] = "auto"
    """score: probabilities of the candidates, in this process; generate: the model writes the team's plan as JSON;
    auto: score where the model is in this process, else generate."""
    ask: Literal["team", "agent"] = "team"
    """Generating: one question for the whole team, or one an agent."""
    prompts: str = ""
    """A folder with prompt templates of your own; default: the shipped ones."""
    max_options: int = 8
    """Most candidates that an agent is asked about, the nearest ones."""
    max_tokens: int = 256
    """Generating: the longest reply, in tokens."""
    memory: int = 2
    """Generating: how many of a robot's last subgoals, with their outcomes, the prompt tells (0 to 4)."""
    reflect: bool = False
    """Generating: after a failed subgoal, ask what went wrong, and tell the answer in later prompts."""
    timing: Literal["wait", "lag", "free"] = "wait"
    """wait: the worlds stand still while the model plans; lag: they go on, and a plan is used exactly `lag` steps
    later, or at the end of a rollout (results don't depend on how fast the model is); free: as soon as it is there
    (they do)."""
    lag: int = 8
    """Steps until a plan is used, with the timing `lag`."""
    rounds: int = 1
    """Planning rounds that the model works on side by side, with the timings `lag` and `free`."""
    batch: int = 16
    """Most worlds in a planning round, with the timing `free`: the fewer, the sooner a plan is there."""
    cache: str = ""
    """Plan cache: a file that several runs may share, or memory; default: none."""
    cache_coarse: int = 1
    """Plan cache: path lengths are rounded down to multiples of this, so that more scenes are the same; above 1 the
    model is told the rounded ones."""
    traced: int = 1
    """Worlds whose plans are told in full in plans.jsonl, with prompts; the record holds those of all."""

    def __post_init__(self) -> None:
        for name, good, need in (
            ("max_options", 2 <= self.max_options <= 26, "2 to 26"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("memory", 0 <= self.memory <= PAST, f"0 to {PAST}"),
            ("lag", self.lag >= 0, "at least 0"),
            ("rounds", self.rounds >= 1, "at least 1"),
            ("batch", self.batch >= 1, "at least 1"),
            ("cache_coarse", self.cache_coarse >= 1, "at least 1"),
            ("traced", self.traced >= 0, "at least 0"),
        ):
            if not good:
                raise EchelonError(f"planning.{name} is {getattr(self, name)}: it must be {need}")
        if self.cache and self.reflect:
            raise EchelonError("planning.cache and planning.reflect don't go together: a lesson is of what went before")
        for name, hint in typing.get_type_hints(PlanningConfig).items():
            if typing.get_origin(hint) is Literal and getattr(self, name) not in typing.get_args(hint):
                raise unknown_name(f"planning.{name}", str(getattr(self, name)), typing.get_args(hint))


@dataclass(frozen=True)
class GrowthConfig:
    """How a planner that learns and its executors take turns. All defaults are our choice."""

    schedule: Literal["alternate", "joint", "planner", "executor"] = "alternate"
    """alternate: planner and executors learn in turns, each while the other stands still; joint: both at once, from the
    same steps; planner, executor: the one alone."""
    window: int = 4
    """Rollouts that a planner with critics (hiper) learns from at a time; executors learn after each one."""
    practice: int = 8
    """Rollouts in which executors learn under the best blueprints (himac)."""
    warm_start: str = "auto"
    """Planner that is imitated before anything else is learnt: random-task, nearest or hungarian; off: nobody; auto:
    hungarian, unless the model has learnt to plan already (the shipped one, or another run's)."""
    warm_updates: int = 80
    """Updates by imitation."""
    warm_softness: float = 0.5
    """Steps by which two options may differ and still be nearly as good to learn from hungarian; 0: the best alone."""
    warm_batch: int = 64
    """Decisions of each."""
    warm_steps: int = 200
    """Steps of each world in which that planner is watched, with classical executors."""

    def __post_init__(self) -> None:
        for name, good, need in (
            ("window", self.window >= 1, "at least 1"),
            ("practice", self.practice >= 1, "at least 1"),
            ("warm_updates", self.warm_updates >= 0, "at least 0"),
            ("warm_softness", self.warm_softness >= 0, "at least 0"),
            ("warm_batch", self.warm_batch >= 1, "at least 1"),
            ("warm_steps", self.warm_steps >= 1, "at least 1"),
        ):
            if not good:
                raise EchelonError(f"growth.{name} is {getattr(self, name)}: it must be {need}")
        teachers = ("auto", "off", "random-task", "nearest", "hungarian")
        for name, value, known in (
            ("schedule", self.schedule, typing.get_args(typing.get_type_hints(GrowthConfig)["schedule"])),
            ("warm_start", self.warm_start, teachers),
        ):
            if value not in known:
                raise unknown_name(f"growth.{name}", value, known)


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    method: str = "l2m2"
    """What to train; `echelon train --help` lists the methods."""
    env: GridConfig = field(default_factory=WarehouseConfig)
    """The world."""
    steps: int = 1_000_000
    """Environment steps to train for, counted over all worlds."""
    num_envs: int = 256
    """Worlds that run side by side."""
    seed: int = 0
    """The root seed: it alone decides everything."""
    planner: str | None = None
    """Another planner than the method's own: random, random-task, nearest, hungarian, llm:<model>, distilled:<run>
    or record:<plans.jsonl>."""
    model: str = "smollm2-135m-echelon"
    """The language model of methods that plan with one: a known name, hf:<folder or id>, gguf:<file> or
    openai:<model> (see the table server)."""
    llm_share: float | None = None
    """Share of the worlds (at least one) that the language model plans while executors learn; default: all, or 1/64
    where the model writes its plans, which costs a call each. The other worlds are planned by cheap_planner."""
    cheap_planner: str = ""
    """Who plans the worlds that the language model doesn't."""
    collision_cost: float = 0.05
    """Reward taken from an executor for each move that another agent prevented (a delivered package is worth 1, a
    reached subgoal too)."""
    checkpoint_every: int = 250_000
    """Environment steps between checkpoints."""
    threads: int | None = None
    """Processor threads to compute with; default: all cores. Results don't depend on it (with algorithm.recurrent
    they do)."""
    subgoals: SubgoalConfig = cast(SubgoalConfig, None)  # noqa: RUF009
    """When agents get new subgoals, and what they are worth; default: the method's own."""
    algorithm: AlgorithmConfig = cast(AlgorithmConfig, None)  # noqa: RUF009
    """How executors learn; default: as the method's algorithm does by default."""
    planning: PlanningConfig = field(default_factory=PlanningConfig)
    """How a language model plans, and when."""
    distil: DistilConfig = field(default_factory=DistilConfig)
    """A student that learns the model's choices and takes its place where it is sure."""
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    """How a planner that learns and its executors take turns."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """What of a language model learns, where it does."""
    learner: LearnerConfig | None = None
    """How the planner learns, where it does; default: as the method's learner does by default."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """What may be spent on the model; afterwards the run goes on without it."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """How the server of a model openai:<model> is reached."""
    gguf: GGUFConfig = field(default_factory=GGUFConfig)
    """How a model gguf:<file> is run."""
    shaping: ShapingSettings = field(default_factory=ShapingSettings)
    """Extra reward from potentials, for flat methods, while they learn."""

    def __post_init__(self) -> None:
        classes = _tables(self.method)
        for name, cls in classes.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, cls(**method(self.method).settings.get(name, {})))
        if not self.cheap_planner:
            object.__setattr__(self, "cheap_planner", method(self.method).cheap_planner)
        if type(self.algorithm) is not classes["algorithm"]:
            raise EchelonError(
                f"method {self.method} learns by {method(self.method).algorithm}: its settings are "
                f"{classes['algorithm'].__name__}, not {type(self.algorithm).__name__}"
            )
        wanted = classes.get("learner", type(None))
        if type(self.learner) is not wanted:
            raise EchelonError(
                f"method {self.method} has {'no settings' if self.learner is not None else wanted.__name__} for learner"
            )
        for part, prefix in (
            (self, ""),
            *(((self.learner, "learner."),) if self.learner is not None else ()),
            (self.env, "env."),
            (self.subgoals, "subgoals."),
            (self.algorithm, "algorithm."),
            *((getattr(self, name), f"{name}.") for name in PLAIN_TABLES),
        ):
            for f in dataclasses.fields(part):
                value = getattr(part, f.name)
                if isinstance(value, float) and not math.isfinite(value):
                    raise EchelonError(f"{prefix}{f.name} is {value}: it must be a finite number")
        for name, good, need in (
            ("steps", self.steps >= 1, "at least 1"),
            ("num_envs", self.num_envs >= 1, "at least 1"),
            ("seed", self.seed >= 0, "at least 0"),
            ("llm_share", self.llm_share is None or 0 < self.llm_share <= 1, "above 0, up to 1"),
            ("collision_cost", self.collision_cost >= 0, "at least 0"),
            ("checkpoint_every", self.checkpoint_every >= 1, "at least 1"),
            ("threads", self.threads is None or self.threads >= 1, "at least 1"),
        ):
            if not good:
                raise EchelonError(f"{name} is {getattr(self, name)}: it must be {need}")
        if self.learner is not None:
            self._check_growth()
        if self.budget.money and not (self.server.price_in or self.server.price_out):
            raise EchelonError("budget.money needs server.price_in or server.price_out: else none is reckoned")
        if self.planner is not None and method(self.method).eval_planner is None:
            raise EchelonError(f"method {self.method} has no planner, so --planner can't be {self.planner!r}")
        if self.shaping.on:
            kind = method(self.method)
            if kind.train_planner is not None or not kind.learns:
                what = "has a planner, whose subgoals are its reward" if kind.learns else "learns nothing"
                raise EchelonError(f"method {self.method} {what}: only flat ones (flat-mappo, qmix) have shaping.mode")
            self.shaping.config(env_name(self.env))

    def _check_growth(self) -> None:
        """Refuse what doesn't go with a planner that learns."""
        for good, what in (
            (not self.generates and not self.model_spec.startswith(("openai:", "gguf:")),
             "its model must be in this process and score (planning.decide), not write"),
            (self.planner is None, "its planner can't be another (--planner)"),
            (self.planning.timing == "wait", "planning.timing must be wait"),
            (not (self.distil.enabled or self.planning.cache), "distil.enabled and planning.cache don't go with it"),
            (self.budget == BudgetConfig(), "budget doesn't go with it"),
            (self.subgoals.space == "task", "subgoals.space must be task"),
            (self.model_share == 1.0, "llm_share must be 1"),
        ):  # fmt: skip
            if not good:
                raise EchelonError(f"method {self.method} trains its planner: {what}")
        group = getattr(self.learner, "group", 1)
        if self.num_envs % group:
            raise EchelonError(f"num_envs is {self.num_envs}: it must be a multiple of learner.group ({group})")

    def with_method(self, name: str) -> RunConfig:
        """The same run of another method: settings that this one left at its own defaults get the other's."""
        own, classes = RunConfig(method=self.method), _tables(name)
        planner = "" if self.cheap_planner == own.cheap_planner else self.cheap_planner
        kept: dict[str, Any] = {}
        kept["learner"] = None
        for key, cls in classes.items():
            value, default = getattr(self, key), getattr(own, key)
            if value is None:
                continue
            changed = {k: v for k, v in vars(value).items() if v != getattr(default, k)}
            # Settings of one algorithm mean nothing to another.
            kept[key] = cls(**{**method(name).settings.get(key, {}), **changed}) if type(value) is cls else None
        return dataclasses.replace(self, method=name, cheap_planner=planner, **kept)

    @property
    def generates(self) -> bool:
        """Whether the language model writes its plans, so that each costs a call; else it scores candidates."""
        decide = self.planning.decide
        return decide == "generate" or (decide == "auto" and self.model_spec.startswith(("openai:", "gguf:")))

    @property
    def model_share(self) -> float:
        """The share of the worlds that the language model plans while executors learn."""
        return self.llm_share if self.llm_share is not None else 1 / 64 if self.generates else 1.0

    @property
    def own_worlds(self) -> int:
        """The worlds of a training that the method's own planner plans; the others have a cheap one beside a model."""
        kind = method(self.method)
        spec = kind.train_planner if kind.train_planner is None or self.planner is None else self.planner
        share = self.model_share if kind.learns and spec is not None and spec.startswith("llm") else 1.0
        return max(1, round(share * self.num_envs))

    @property
    def model_spec(self) -> str:
        """The language model that takes part, where one does: the planner's own, else `model`."""
        return self.planner[4:] if self.planner is not None and self.planner.startswith("llm:") else self.model


PLAIN_TABLES: dict[str, type[Any]] = {
    "planning": PlanningConfig,
    "distil": DistilConfig,
    "growth": GrowthConfig,
    "policy": PolicyConfig,
    "budget": BudgetConfig,
    "server": ServerConfig,
    "gguf": GGUFConfig,
    "shaping": ShapingSettings,
}
"""Tables of settings that are the same for every method."""


def _tables(name: str) -> dict[str, type[Any]]:
    """The classes of a method's tables of settings."""
    kind = method(name)
    tables: dict[str, type[Any]] = {"subgoals": SubgoalConfig, "algorithm": config_of(kind.algorithm)}
    return tables | ({"learner": LEARNERS[kind.learner]} if kind.learner else {})


LEARNERS: dict[str, type[LearnerConfig]] = {"hiper": HiPERConfig, "himac": HiMACConfig}
"""The settings of each way in which a planner learns."""


def to_toml(config: RunConfig, *, without: Collection[str] = ()) -> str:
    """The config as TOML that `from_toml` reads back, `without` some tables; settings that are None are left out."""
    return toml_document(config, env_name(config.env), without=without)


def toml_document(config: Any, environment: str, *, without: Collection[str] = ()) -> str:
    """A dataclass of settings and tables of settings (dataclasses) as TOML, with the name of its environment."""
    lines = [f'environment = "{environment}"']
    tables: list[str] = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name in without:
            continue
        if dataclasses.is_dataclass(value):
            tables.append(f"\n[{f.name}]")
            tables.extend(toml_line(g.name, getattr(value, g.name)) for g in dataclasses.fields(value))
        else:
            lines.append(toml_line(f.name, value))
    return "\n".join(line for line in [*lines, *tables] if line) + "\n"


def toml_line(name: str, value: object) -> str:
    """`name = value` in TOML; nothing for None, which TOML can't say."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"{name} = {str(value).lower()}"
    if isinstance(value, int | float):
        return f"{name} = {value!r}"
    if isinstance(value, tuple):
        return f"{name} = [{', '.join(toml_line('', item).removeprefix(' = ') for item in value)}]"
    # A TOML string is escaped as JSON's, but for DEL.
    text = json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"{name} = {text}"


def read_toml(path: Path) -> RunConfig:
    """The config in a TOML file; what it doesn't say has its default.

    Raises:
        EchelonError: no such file, not TOML, an unknown key (names the nearest) or a value of the wrong type.
    """
    return from_toml(read_toml_file(path, "config"), str(path))


def read_toml_file(path: Path, what: str) -> dict[str, Any]:
    """The TOML document in a file; a missing or broken one is one clear line that names `what` it is."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EchelonError(f"{what} {path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise EchelonError(f"{what} {path} isn't TOML: {error}") from None


def from_toml(data: dict[str, Any], source: str = "config") -> RunConfig:
    """The config in a TOML document that was read; see `read_toml`."""
    data = dict(data)
    name = data.pop("environment", "warehouse")
    known = environments()
    if not isinstance(name, str) or name not in known:
        raise unknown_name("environment", str(name), known)
    kind = method(str(data.get("method", RunConfig.method)))
    values: dict[str, Any] = {}
    for key, cls in {"env": known[name], **_tables(kind.name), **PLAIN_TABLES}.items():
        table = data.pop(key, {})
        if not isinstance(table, dict):
            raise EchelonError(f"{source}: {key} must be a table, [{key}]")
        values[key] = cls(**{**kind.settings.get(key, {}), **typed(cls, table, f"{source}: {key}.")})
    return RunConfig(**values, **typed(RunConfig, data, f"{source}: ", ("environment",)))


def typed(cls: type[Any], table: dict[str, Any], where: str, others: Sequence[str] = ()) -> dict[str, Any]:
    """The values of a TOML table as the dataclass `cls` wants them.

    Args:
        cls: a dataclass; its fields are numbers, words, paths, literals, or tuples of them.
        table: what was read.
        where: what an error's line begins with.
        others: keys that are known too, though not to `cls`.

    Raises:
        EchelonError: an unknown key (names the nearest) or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in table.items():
        if key not in hints:
            raise unknown_name(f"key in {where.rstrip('.: ')}", key, [*hints, *others])
        values[key] = _convert(value, hints[key], f"{where}{key}")
    return values


_IN_WORDS = {int: "a whole number", float: "a number", str: "a text", Path: "a path", bool: "true or false"}


def _convert(value: Any, hint: Any, where: str) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        if typing.get_origin(option) is typing.Literal:
            if value in typing.get_args(option):
                return value
            raise unknown_name(where, str(value), [str(a) for a in typing.get_args(option)])
        if typing.get_origin(option) is tuple and isinstance(value, list):
            return tuple(_convert(item, typing.get_args(option)[0], f"{where}[{i}]") for i, item in enumerate(value))
        if option is Path and isinstance(value, str):
            return Path(value)
        if option is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        if option in (int, str, bool) and type(value) is option:
            return value
    names = ["a list" if typing.get_origin(o) is tuple else _IN_WORDS.get(o, str(o)) for o in options]
    wanted = " or ".join(name for name, option in zip(names, options, strict=True) if option is not type(None))
    raise EchelonError(f"{where} is {value!r}: it must be {wanted}")
