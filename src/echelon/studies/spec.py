"""What a study is: methods × environments × sizes × agents × seeds, and the runs that it expands to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echelon.configs import read_toml_file, toml_line, typed
from echelon.envs import environments, make
from echelon.errors import EchelonError, unknown_name
from echelon.evaluation.protocol import Protocol
from echelon.extensions import import_modules, resolved
from echelon.studies.kinds import RunKind, Settings, kind_of, run_kinds

__all__ = ["Study", "StudyRun", "read_study", "study_from_toml", "study_to_toml"]

_TABLES = ("protocol", "run", "env", "method")
_OWN = ("method", "environment", "seed", "steps", "threads", "imports")  # settings of runs that a study makes itself


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        id: its name and its folder's: `<environment>-s<size>-a<agents>-<method>-seed<seed>-<hash>`, where the hash is
            of all its settings and the protocol. The same run has the same id in every study. Code (Echelon's, that of
            imported files) and a language model's weights aren't in it: its result says by what it was made.
        config: the run.
        environment, size, agents, method, seed: where it stands in the matrix.
        record: how many episodes to record for a replay.
    """

    id: str
    config: Settings
    environment: str
    size: int
    agents: int
    method: str
    seed: int
    record: int = 0


@dataclass(frozen=True)
class Study:
    """A matrix of runs; as a file, these fields and the tables below as TOML."""

    name: str
    """What the study is called (letters, digits, - and _)."""
    title: str = ""
    """What it is about, in a line, for the report."""
    methods: tuple[str, ...] = ("rule-goals", "flat-mappo")
    """Which methods."""
    environments: tuple[str, ...] = ("warehouse",)
    """In which worlds."""
    sizes: tuple[int, ...] = (20,)
    """Sides of their maps, in cells."""
    agents: tuple[int, ...] = (4,)
    """Numbers of agents."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Root seeds."""
    steps: int = 1_000_000
    """Environment steps of each training."""
    record: int = 2
    """Episodes recorded for replays, of the first seed's runs."""
    imports: tuple[str, ...] = ()
    """Python files or modules to import first: where own environments, planners, algorithms, methods are registered."""
    protocol: Protocol = field(default_factory=Protocol)
    """When runs are judged, and on how many episodes."""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The tables `run` (settings of every run, as in a run's config), `env` (of an environment, by its name) and
    `method` (settings of one method's runs, by its name; they go over those of `run`)."""

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in "-_" for c in self.name):
            raise EchelonError(f"study name {self.name!r}: it must be letters, digits, - and _")
        for name in ("methods", "environments", "sizes", "agents", "seeds"):
            values = getattr(self, name)
            if not values:
                raise EchelonError(f"study {self.name}: {name} is empty: name at least one")
            twice = [value for value, count in Counter(values).items() if count > 1]
            if twice:
                raise EchelonError(f"study {self.name}: {name} lists {twice[0]!r} twice: two runs would have one id")
        for name, good, need in (
            ("steps", self.steps >= 1, "at least 1"),
            ("record", self.record >= 0, "at least 0"),
            ("seeds", min(self.seeds) >= 0, "at least 0"),
        ):
            if not good:
                raise EchelonError(f"study {self.name}: {name} is {getattr(self, name)}: it must be {need}")
        if unknown := set(self.settings) - set(_TABLES[1:]):
            raise unknown_name(f"table in study {self.name}", sorted(unknown)[0], _TABLES[1:])

    def runs(self) -> tuple[StudyRun, ...]:
        """All runs, the first seed's first: a study that is interrupted has whole seeds.

        Raises:
            EchelonError: an unknown method, environment or setting, a world that can't be built, or two runs with
                one id.
        """
        import_modules(self.imports)
        kinds = {name: kind_of(name) for name in self.methods}
        known = environments()
        for name in self.environments:
            if name not in known:
                raise unknown_name("environment", name, known)
        for name in self.settings.get("env", {}):
            if name not in known:
                raise unknown_name(f"name in [env] of study {self.name}", name, known)
        for name in self.settings.get("method", {}):
            kind_of(name, f"name in [method] of study {self.name}")
        for name, table_of in self.settings.get("method", {}).items():
            if "env" in table_of:
                raise EchelonError(
                    f"study {self.name}: env can't be in [method.{name}]: methods are compared in the same worlds, "
                    f"which [run.env] and [env.<name>] describe"
                )
        runs = [
            self._run(environment, size, agents, name, seed, kinds)
            for seed in self.seeds
            for environment in self.environments
            for size in self.sizes
            for agents in self.agents
            for name in self.methods
        ]
        ids = Counter(run.id for run in runs)
        if twice := [i for i, count in ids.items() if count > 1]:
            raise EchelonError(f"study {self.name}: two runs have the id {twice[0]}")
        for environment in self.environments:
            for size in self.sizes:
                for agents in self.agents:
                    config = next(r for r in runs if (r.environment, r.size, r.agents) == (environment, size, agents))
                    make(environment, config.config.env, num_envs=1)
        return tuple(runs)

    def ignored(self) -> list[str]:
        """What the table `run` says that none of the methods knows; those of another kind would."""
        known = frozenset[str]().union(*(kind_of(name).keys for name in self.methods))
        return [key for key in self.settings.get("run", {}) if key not in known]

    def _run(
        self, environment: str, size: int, agents: int, name: str, seed: int, kinds: Mapping[str, RunKind]
    ) -> StudyRun:
        kind = kinds[name]
        # What every run is told is told to those that know of it, also where the study's methods are fewer today.
        foreign = frozenset[str]().union(*(other.keys for other in run_kinds())) - kind.keys - set(_OWN)
        every = {key: value for key, value in self.settings.get("run", {}).items() if key not in foreign}
        data = _merged(every, self.settings.get("method", {}).get(name, {}))
        own = data.pop("env", {})
        if not _is_table(own):
            raise EchelonError(f"study {self.name}: env must be a table, [run.env]")
        env = {**self.settings.get("env", {}).get(environment, {}), **own}
        for key in _OWN:
            if key in data:
                raise EchelonError(f"study {self.name}: {key} is the study's own; it can't be in [run] or [method]")
        for key, own in (("size", "sizes"), ("num_agents", "agents")):
            if key in env:
                raise EchelonError(f"study {self.name}: {key} can't be in [env]: the study's {own} say it")
        data |= {
            "method": name,
            "environment": environment,
            "seed": seed,
            # What learns nothing has no steps: its runs stay the same when the study trains for longer.
            "steps": self.steps if kind.learns(name) else 1,
            "env": {**env, "size": size, "num_agents": agents},
        }
        source = f"study {self.name}, {name}"
        config = kind.read(data, source, protocol=self.protocol, imports=self.imports)
        says = kind.decides(config) + json.dumps(self.protocol.to_json(), sort_keys=True)
        short = hashlib.sha256(says.encode()).hexdigest()[:8]
        where = f"{environment}-s{size}-a{agents}-{name}-seed{seed}"
        record = self.record if seed == self.seeds[0] else 0
        return StudyRun(f"{where}-{short}", config, environment, size, agents, name, seed, record)


def read_study(path: Path) -> Study:
    """The study in a TOML file.

    Raises:
        EchelonError: no such file, not TOML, an unknown key (names the nearest) or a value that can't be.
    """
    study = study_from_toml(read_toml_file(path, "study"), str(path), name=path.stem)
    # Files that it imports lie beside it.
    return dataclasses.replace(study, imports=resolved(study.imports, path.parent))


def study_from_toml(data: dict[str, Any], source: str = "study", *, name: str = "study") -> Study:
    """The study in a TOML document that was read; see `read_study`."""
    data = dict(data)
    tables = {key: data.pop(key, {}) for key in _TABLES}
    for key, table in tables.items():
        by_name = key in ("env", "method")
        nested = table.values() if isinstance(table, dict) and by_name else ()
        if not isinstance(table, dict) or not all(isinstance(t, dict) for t in nested):
            raise EchelonError(f"{source}: {key} must be a table, [{key}{'.<name>' * by_name}]")
    known = {f.name for f in dataclasses.fields(Study)} - {"settings"} | set(_TABLES)
    if unknown := [key for key in data if key not in known]:
        raise unknown_name(f"key in {source}", unknown[0], known)
    values = {"name": name, **typed(Study, data, f"{source}: ")}
    protocol = Protocol(**typed(Protocol, tables.pop("protocol"), f"{source}: protocol."))
    return Study(**values, protocol=protocol, settings={k: t for k, t in tables.items() if t})


def study_to_toml(study: Study) -> str:
    """The study as TOML that `study_from_toml` reads back."""
    lines, tables = [], []
    for f in dataclasses.fields(study):
        value = getattr(study, f.name)
        if f.name == "protocol":
            tables += ["\n[protocol]", *(toml_line(k, v) for k, v in value.to_json().items())]
        elif f.name == "settings":
            for name, table in value.items():
                tables += _table_lines(name, table)
        else:
            lines.append(toml_line(f.name, value))
    return "\n".join([*lines, *tables]) + "\n"


def _table_lines(name: str, table: Mapping[str, Any]) -> list[str]:
    lines = [toml_line(k, tuple(v) if isinstance(v, list) else v) for k, v in table.items() if not _is_table(v)]
    found = [f"\n[{name}]", *lines] if lines else []
    for key, value in table.items():
        if _is_table(value):
            # Names of a user's own environments may be anything.
            bare = key.isascii() and key.replace("-", "").replace("_", "").isalnum()
            found += _table_lines(f"{name}.{key if bare else toml_line('', key).removeprefix(' = ')}", value)
    return found


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Both tables as one, `over` winning, tables in them merged alike."""
    merged = {k: _merged(v, {}) if _is_table(v) else v for k, v in under.items()}
    for key, value in over.items():
        below = merged.get(key, {})
        merged[key] = _merged(below if _is_table(below) else {}, value) if _is_table(value) else value
    return merged
