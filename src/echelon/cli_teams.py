"""`echelon train` and `evaluate` for teams of language models: flags and words."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from echelon.algorithms.teams import team_algorithms
from echelon.configs import read_toml_file
from echelon.envs import environments
from echelon.errors import EchelonError, unknown_name
from echelon.fetching import ensure_local
from echelon.flags import given_flags, parse, peek, refuse_beside_resume, run_and_own, take
from echelon.tasks import TaskSettings, task_name, tasks
from echelon.teams.configs import TeamRunConfig, read_team_toml, team_from_toml

if TYPE_CHECKING:
    from echelon.teams.training import TeamProgress

__all__ = ["evaluate_team", "is_team_run", "train_team", "trains_a_team"]

T = TypeVar("T")


def trains_a_team(args: list[str]) -> bool:
    """Whether these flags of `echelon train` are about a team of language models."""
    resumed, file, wanted = peek(args, "--resume"), peek(args, "--config"), peek(args, "--method")
    if resumed is not None:
        return is_team_run(Path(resumed))
    if wanted in team_algorithms():
        return True
    if file is not None:
        return wanted is None and _is_team_config(Path(file))
    return peek(args, "--env") in _tasks().keys() - environments().keys()


def _tasks() -> dict[str, type[TaskSettings]]:
    """The tasks that a command can train on: all but the one that stands for an object of Python's."""
    return {name: settings for name, settings in tasks().items() if name != "own"}


def is_team_run(folder: Path) -> bool:
    """Whether this is the folder of a run of a team of language models."""
    return _is_team_config(folder / "config.toml")


def _is_team_config(file: Path) -> bool:
    return file.is_file() and str(read_toml_file(file, "config").get("method")) in team_algorithms()


def team_flags(
    command: str, args: list[str], extra: type[T], *, base: TeamRunConfig | None = None
) -> tuple[TeamRunConfig, T]:
    """The run that the flags describe, over --config's file or `base`, and the command's own flags (`extra`)."""
    file, name, known = take(args, "--config"), take(args, "--env"), _tasks()
    if name is not None and name not in known:
        raise unknown_name("environment of a team of language models", name, known)
    if file is not None:
        base = read_team_toml(Path(file))
    elif base is None:
        base = team_from_toml({} if name is None else {"environment": name})
    env = base.env
    if name is not None and type(env) is not known[name]:
        # Another task brings its own ways of sampling.
        env = known[name]()
        base = dataclasses.replace(base, env=env, rollout=cast(Any, None))
    if (wanted := peek(args, "--method")) is not None and wanted != base.method:
        if wanted not in team_algorithms():
            raise unknown_name("method of a team of language models", wanted, team_algorithms())
        base = dataclasses.replace(base, method=wanted, algorithm=cast(Any, None))
    note = (
        f"--env NAME picks the task ({', '.join(known)}), --config FILE reads a run's "
        f"config.toml first; other flags go over it. Methods: {', '.join(team_algorithms())}."
    )
    tables = {"env": type(env), "algorithm": type(base.algorithm)}
    return run_and_own(command, args, base, {"env": env}, tables, extra, note)


@dataclass(frozen=True)
class _TrainFlags:
    """Train a team of language models on one joint reward, and leave a run folder with its dialogues."""

    out: Path | None = None
    """The run's folder; default: runs/<method>-<task>-seed<seed>-<time>."""
    resume: Path | None = None
    """Go on with the run in this folder, bit-identical; of its settings only --updates may be given with it."""


def train_team(args: list[str]) -> int:
    """`echelon train --method magrpo --env writing …`."""
    from echelon.console import Stopper, Watch, console, resuming
    from echelon.reports.dialogues import write_dialogues
    from echelon.teams.training import TeamTrainer

    given = given_flags(args)
    resumed = peek(args, "--resume")
    base = read_team_toml(Path(resumed) / "config.toml") if resumed is not None else None
    run, flags = team_flags("train", args, _TrainFlags, base=base)
    if flags.resume is not None:
        refuse_beside_resume(given, "--updates")
        trainer = TeamTrainer.resume(flags.resume, updates=run.updates if "--updates" in given else None)
    else:
        for model in run.model:
            ensure_local(model)
        trainer = TeamTrainer(run, flags.out or _default_folder(run))
    folder = trainer.folder
    console.print(f"{run.method} in {folder}, {trainer.update} of {run.updates} updates done")
    stopper = Stopper()
    with stopper.listening(), Watch() as watch:

        def told(p: TeamProgress) -> None:
            for note in p.notes:
                watch.note(f"{run.method}: {note}")
            if p.imitating:
                done, total = p.imitating
                watch.show("imitation", done, total, f"updates, loss {p.metrics['loss']:.3f}")
                return
            watch.end("imitation")
            watch.show(run.method, p.update, p.updates, _words(p))

        finished = trainer.run(told, stopper)
        watch.end(run.method)
    page = write_dialogues(folder)
    if not finished:
        console.print(f"stopped at update {trainer.update}; go on with: {resuming(folder)}")
        return 128 + stopper.signal
    if trainer.evaluation is not None and "return" in trainer.evaluation:
        console.print(f"return on items kept for evaluation: {trainer.evaluation['return']:.3f}")
    console.print(f"dialogues: {page}")
    console.print(f"run folder: {folder}")
    return 0


def _words(p: TeamProgress) -> str:
    """What a progress line says after the number of updates: before the first one there is no reward yet."""
    parts = ["updates"]
    if "reward" in p.metrics:
        parts.append(f"reward {p.metrics['reward']:.3f}")
    if p.evaluation is not None:
        parts.append(f"evaluated {p.evaluation.get('return', float('nan')):.3f}")
    where = " ".join(f"{stage} {share:.0%}" for stage, share in p.shares.items())
    return ", ".join(parts) + (f" [{where}]" if where else "")


def _default_folder(run: TeamRunConfig) -> Path:
    return Path("runs") / f"{run.method}-{task_name(run.env)}-seed{run.seed}-{time.strftime('%Y%m%d-%H%M%S')}"


@dataclass(frozen=True)
class _EvaluateFlags:
    """Let a trained team play items that training never saw."""

    items: int = 0
    """How many of them; 0: all."""
    samples: int = 4
    """Episodes of each item."""
    name: str = "evaluation"
    """Results go to <run>/<name>.json, dialogues to <run>/<name>.dialogues.jsonl."""


def evaluate_team(args: list[str]) -> int:
    """`echelon evaluate RUN …` where RUN is a team's."""
    from echelon.console import console
    from echelon.evaluation.comparison import check_name
    from echelon.teams.training import TeamTrainer

    folder = Path(args[0])
    flags = parse("evaluate RUN", _EvaluateFlags, args[1:])
    check_name(flags.name)
    if flags.items < 0 or flags.samples < 1:
        raise EchelonError(f"--items {flags.items} must be at least 0, --samples {flags.samples} at least 1")
    trainer = TeamTrainer.resume(folder)
    result = trainer.judge(flags.name, items=flags.items, samples=flags.samples)
    console.print(f"return {result['return']:.3f} over {result['episodes']} episodes, {trainer.update} updates done")
    for name, value in result.items():
        if name.startswith("part_"):
            console.print(f"  {name.removeprefix('part_')}: {value:.3f}")
    console.print(f"written to {folder / (flags.name + '.json')}")
    return 0
