"""Everything that decides a run whose shaping grows with it: frozen dataclasses, to and from TOML."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from echelon.algorithms import AlgorithmConfig, config_of
from echelon.configs import RunConfig, read_toml_file, toml_document, typed
from echelon.envs import GridConfig, WarehouseConfig, env_name, environments, make
from echelon.errors import EchelonError, unknown_name
from echelon.extensions import import_modules
from echelon.llm.gguf import GGUFConfig
from echelon.llm.server import ServerConfig
from echelon.llm.store import KNOWN_MODELS, SHIPPED_PLANNERS
from echelon.methods import Method, method, methods
from echelon.shaping import ShapingConfig, ShapingSettings, term_set

__all__ = ["ALSO_METHODS", "AlsoConfig", "AlsoMethod", "AlsoSettings", "also_from_toml", "also_to_toml",
           "read_also_toml", "resolved_proposer"]  # fmt: skip


@dataclass(frozen=True)
class AlsoMethod:
    """What a method's name stands for.

    Attributes:
        summary: what it is, in one line.
        critic: a Critic diagnoses, and the Generator sees only its card; else it sees the evidence itself.
        branches: proposals are tried in branches and judged by the gate; else the first one is taken as it is.
        stages: at every checkpoint, at the first one only, or never.
        start: the shaping that the run begins with: none, the world's default mixture, or, each for a branch's
            length, all mixtures of the world's grid, of which the best one is kept.
    """

    summary: str
    critic: bool = True
    branches: bool = True
    stages: Literal["all", "first", "none"] = "all"
    start: Literal["none", "default", "grid"] = "none"


ALSO_METHODS = {
    "also": AlsoMethod("a model diagnoses and proposes shaping, branches try it, a gate promotes what is better"),
    "also-one-shot": AlsoMethod("one proposal, without diagnosis or trial (ablation)", critic=False, branches=False,
                                stages="first"),
    "also-no-branch": AlsoMethod("diagnosis and proposal at every checkpoint, taken untried (ablation)",
                                 branches=False),
    "also-no-critic": AlsoMethod("as also, without a diagnosis (ablation)", critic=False),
    "fixed-pbrs": AlsoMethod("the world's default shaping from beginning to end", stages="none", start="default"),
    "pbrs-grid": AlsoMethod("the best of a fixed grid of shapings, each tried from the beginning", stages="none",
                            start="grid"),
    "sparse": AlsoMethod("the task reward alone", stages="none"),
}  # fmt: skip
"""The methods by name."""


@dataclass(frozen=True)
class AlsoSettings:
    """When shaping is proposed, and how proposals are tried. Defaults are our choice, but for what the gate asks."""

    checkpoints: tuple[float, ...] = (0.03, 0.6)
    """When the run is diagnosed and proposals are tried, as shares of the steps spent: those of branches count."""
    branch: float = 0.1
    """Steps of each branch, as a share of all steps."""
    candidates: int = 2
    """Proposals a round."""
    rounds: int = 1
    """Rounds of proposals at a checkpoint; the second one knows what came of the first."""
    fresh: bool = True
    """The first proposals are tried from the beginning, as LLM-ALSO does, beside the run on the task reward alone, and
    for as many steps as it has then done; off: from the checkpoint, as all later ones are."""
    seeds: int = 1
    """Branches of each proposal and of the control, which differ in their random numbers alone. Above 1, a proposal
    must also lead with the lower end of a bootstrap interval over them; the first one's endpoint is promoted."""
    evaluations: int = 6
    """Evaluations of a branch; the run itself is evaluated as often."""
    every: int | None = None
    """Environment steps between evaluations; default: as many as make those `evaluations` of a branch."""
    episodes: int = 32
    """Episodes of each."""
    world_seed: int | None = None
    """Root seed of the worlds of these episodes; default: the run's own."""
    behaviour: int = 16
    """Episodes that the Critic's statistics are of."""
    reference: bool = False
    """Train the first promoted shaping on beside the run, and ask more of proposals where it leads."""
    low_return: bool = True
    """Margins of the gate grow with the returns, and are small where those are."""
    rising: bool = True
    """A branch that rises steeply at its end isn't called spiky for it; off: the gate's numbers as published."""
    soft: bool = False
    """Judge by a proposal's score alone, not by all of the gate's rules."""

    def __post_init__(self) -> None:
        for name, good, need in (
            ("checkpoints", all(0 < c < 1 for c in self.checkpoints), "shares above 0 and below 1"),
            ("checkpoints", list(self.checkpoints) == sorted(set(self.checkpoints)), "in rising order"),
            ("branch", 0 < self.branch < 1, "above 0, below 1"),
            ("candidates", 1 <= self.candidates <= 8, "1 to 8"),
            ("rounds", self.rounds >= 1, "at least 1"),
            ("seeds", self.seeds >= 1, "at least 1"),
            ("evaluations", self.evaluations >= 1, "at least 1"),
            ("every", self.every is None or self.every >= 1, "at least 1"),
            ("episodes", self.episodes >= 1, "at least 1"),
            ("behaviour", self.behaviour >= 1, "at least 1"),
            ("world_seed", self.world_seed is None or self.world_seed >= 0, "at least 0"),
        ):
            if not good:
                raise EchelonError(f"also.{name} is {getattr(self, name)}: it must be {need}")


@dataclass(frozen=True)
class AlsoConfig:
    """One training whose shaping is proposed, tried and promoted while it runs."""

    method: str = "also"
    """How shaping comes about."""
    base: str = "flat-mappo"
    """What learns under it: flat-mappo, flat-ippo, flat-grpo, qmix or vdn."""
    env: GridConfig = field(default_factory=WarehouseConfig)
    """The world."""
    steps: int = 2_000_000
    """Environment steps to spend, counted over all worlds and all branches."""
    num_envs: int = 256
    """Worlds that run side by side, in the run and in each branch."""
    seed: int = 0
    """The root seed: it alone decides everything, a proposing model's words apart."""
    proposer: str = "heuristic"
    """Who diagnoses and proposes: heuristic (rules over the same evidence, no model), recorded:<account.json>, or a
    language model: a known name, hf:<folder or id>, gguf:<file> or openai:<model> (see the table server)."""
    collision_cost: float = 0.05
    """Reward taken from the team for each move that another agent prevented, as a mean over agents."""
    workers: int | None = None
    """Branches that run at once, each in a process of its own; default: as many as there are cores. Results don't
    depend on it."""
    imports: tuple[str, ...] = ()
    """Python files or modules to import first: where own environments and their potential terms are registered."""
    algorithm: AlgorithmConfig = cast(AlgorithmConfig, None)  # noqa: RUF009
    """How agents learn; default: as the base method does by default."""
    shaping: ShapingSettings = field(default_factory=ShapingSettings)
    """How potentials become rewards. Its mode, with beta and weights, is what fixed-pbrs begins with."""
    also: AlsoSettings = field(default_factory=AlsoSettings)
    """When shaping is proposed, and how proposals are tried."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """How the server of a proposer openai:<model> is reached."""
    gguf: GGUFConfig = field(default_factory=GGUFConfig)
    """How a proposer gguf:<file> is run."""

    def __post_init__(self) -> None:
        if self.method not in ALSO_METHODS:
            raise unknown_name("method", self.method, ALSO_METHODS)
        if cast(Any, self.algorithm) is None:
            object.__setattr__(self, "algorithm", config_of(_base(self.base))())
        names = ("heuristic", *KNOWN_MODELS, *SHIPPED_PLANNERS)
        if ":" not in self.proposer and self.proposer not in names:
            others = ("recorded:<account.json>", "hf:<folder or id>", "gguf:<file>", "openai:<model>")
            raise unknown_name("proposer", self.proposer, (*names, *others))
        if self.workers is not None and self.workers < 1:
            raise EchelonError(f"workers is {self.workers}: it must be at least 1")
        if self.shaping.on and self.kind.start != "default":
            raise EchelonError(f"shaping.mode is for fixed-pbrs: {self.method} chooses its shaping itself")
        terms = term_set(env_name(self.env))
        if self.kind.start == "grid" and len(terms.grid) * self.also.branch > 1:
            raise EchelonError(
                f"also.branch is {self.also.branch}: {len(terms.grid)} mixtures of the grid don't fit into the steps"
            )
        if self.tries and self.evaluated_every > self.branch_steps:
            raise EchelonError(f"also.every is {self.also.every}: a branch has only {self.branch_steps:,} steps")
        self.run(self.start)  # what it says of the base method's settings

    @property
    def kind(self) -> AlsoMethod:
        """What the method's name stands for."""
        return ALSO_METHODS[self.method]

    @property
    def start(self) -> ShapingConfig | None:
        """The shaping that the run begins with; None: the task reward alone."""
        if self.kind.start != "default":
            return None
        terms = term_set(env_name(self.env))
        return self.shaping.config(terms.world) or terms.mode(terms.default)

    @property
    def tries(self) -> bool:
        """Whether anything is tried in branches."""
        return self.kind.start == "grid" or (self.kind.branches and self.kind.stages != "none")

    @property
    def branch_steps(self) -> int:
        """Environment steps of each branch."""
        return max(1, round(self.also.branch * self.steps))

    @property
    def evaluated_every(self) -> int:
        """Environment steps between two evaluations, of branches and of the mainline alike."""
        return self.also.every or max(1, self.branch_steps // self.also.evaluations)

    @property
    def evaluations(self) -> int:
        """Evaluations of each branch."""
        return self.also.evaluations if self.also.every is None else max(1, self.branch_steps // self.also.every)

    @property
    def branch_rollouts(self) -> int:
        """Rollouts of each branch; it can't be evaluated more often."""
        rollout = self.algorithm.rollout
        if getattr(self.algorithm, "group", 0):  # it learns from whole episodes
            rollout = min(rollout, make(env_name(self.env), self.env, num_envs=1).limit)
        return -(-self.branch_steps // (rollout * self.num_envs))

    def run(self, shaping: ShapingConfig | None, *, steps: int | None = None, threads: int = 1) -> RunConfig:
        """The base method's run under a shaping (None: the task reward alone), up to so many steps."""
        return RunConfig(
            method=self.base, env=self.env, steps=self.steps if steps is None else steps, num_envs=self.num_envs,
            seed=self.seed, collision_cost=self.collision_cost, threads=threads, algorithm=self.algorithm,
            shaping=self.shaped(shaping), checkpoint_every=max(self.steps // 10, 1),
        )  # fmt: skip

    def shaped(self, shaping: ShapingConfig | None) -> ShapingSettings:
        """The table `[shaping]` of a run under a shaping.

        Under the task reward alone too, terms are recorded: what a replay memory holds can then be relabelled.
        """
        if shaping is not None:
            return self.shaping.with_config(shaping)
        if self.kind.stages == "none":
            return dataclasses.replace(self.shaping, mode="off", beta=None, weights=())
        terms = term_set(env_name(self.env))
        return self.shaping.with_config(dataclasses.replace(terms.mode(terms.default), mode="task reward", beta=0.0))


def _base(name: str) -> str:
    """The algorithm of a base method.

    Raises:
        EchelonError: there is no such method, or it isn't flat.
    """
    if name not in methods():
        raise unknown_name("base", name, [kind.name for kind in methods().values() if _is_base(kind)])
    if not _is_base(method(name)):
        raise EchelonError(f"base is {name}: it must be a flat method that learns, such as flat-mappo or qmix")
    return method(name).algorithm


def _is_base(kind: Method) -> bool:
    return kind.learns and kind.train_planner is None


def resolved_proposer(proposer: str) -> str:
    """A proposer's name that means the same in every folder: with a record's whole path."""
    kind, _, path = proposer.partition(":")
    return f"{kind}:{Path(path).resolve()}" if kind == "recorded" else proposer


_TABLES: dict[str, type[Any]] = {
    "shaping": ShapingSettings,
    "also": AlsoSettings,
    "server": ServerConfig,
    "gguf": GGUFConfig,
}


def also_to_toml(config: AlsoConfig) -> str:
    """The config as TOML that `also_from_toml` reads back; settings that are None are left out."""
    return toml_document(config, env_name(config.env))


def read_also_toml(path: Path, *, imports: tuple[str, ...] | None = None) -> AlsoConfig:
    """The config in a TOML file; what it doesn't say has its default.

    Args:
        path: the file.
        imports: what to import instead of what the file says.

    Raises:
        EchelonError: no such file, not TOML, an unknown key (names the nearest) or a value of the wrong type.
    """
    data = read_toml_file(path, "config")
    return also_from_toml(data if imports is None else {**data, "imports": list(imports)}, str(path))


def also_from_toml(data: dict[str, Any], source: str = "config") -> AlsoConfig:
    """The config in a TOML document that was read; see `read_also_toml`."""
    data = dict(data)
    import_modules(
        typed(AlsoConfig, {k: v for k, v in data.items() if k == "imports"}, f"{source}: ").get("imports", ())
    )
    name, known = str(data.pop("environment", "warehouse")), environments()
    if name not in known:
        raise unknown_name("environment", name, known)
    algorithm = config_of(_base(str(data.get("base", AlsoConfig.base))))
    values: dict[str, Any] = {}
    for key, cls in {"env": known[name], "algorithm": algorithm, **_TABLES}.items():
        table = data.pop(key, {})
        if not isinstance(table, dict):
            raise EchelonError(f"{source}: {key} must be a table, [{key}]")
        values[key] = cls(**typed(cls, table, f"{source}: {key}."))
    return AlsoConfig(**values, **typed(AlsoConfig, data, f"{source}: ", ("environment",)))
