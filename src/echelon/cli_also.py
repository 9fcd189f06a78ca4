"""`echelon train` and `replay` for runs whose shaping grows with them: flags and words."""

from __future__ import annotations

import dataclasses
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from echelon.algorithms.teams import team_algorithms
from echelon.also.configs import ALSO_METHODS, AlsoConfig, also_from_toml, read_also_toml
from echelon.configs import read_toml_file
from echelon.envs import env_name, environments
from echelon.errors import unknown_name
from echelon.extensions import import_modules
from echelon.fetching import ensure_proposer
from echelon.flags import AfterTraining, at_least, given_flags, peek, refuse_beside_resume, run_and_own, take
from echelon.methods import methods

if TYPE_CHECKING:
    from echelon.also import AlsoProgress

__all__ = ["is_also_run", "train_also", "trains_also"]

T = TypeVar("T")


def trains_also(args: list[str]) -> bool:
    """Whether these flags of `echelon train` are about a run whose shaping grows."""
    resumed, file, wanted = peek(args, "--resume"), peek(args, "--config"), peek(args, "--method")
    if resumed is not None:
        return is_also_run(Path(resumed))
    if wanted is not None:
        if wanted not in ALSO_METHODS and wanted not in methods():
            raise unknown_name("method", wanted, [*methods(), *ALSO_METHODS, *team_algorithms()])
        return wanted in ALSO_METHODS
    return file is not None and _is_also_config(Path(file))


def is_also_run(folder: Path) -> bool:
    """Whether this is the folder of such a run."""
    return _is_also_config(folder / "config.toml")


def _is_also_config(file: Path) -> bool:
    return file.is_file() and str(read_toml_file(file, "config").get("method")) in ALSO_METHODS


@dataclass(frozen=True)
class _TrainFlags(AfterTraining):
    """Train under shaped rewards that are diagnosed, proposed, tried in branches and promoted by evidence."""

    out: Path | None = None
    """The run's folder; default: runs/<method>-<base>-<environment>-<size>-seed<seed>-<time>."""
    resume: Path | None = None
    """Go on with the run in this folder, also in the middle of its branches; no settings may be given with it."""


def _flags(args: list[str]) -> tuple[AlsoConfig, _TrainFlags]:
    """The run that the flags describe, over --config's file, and the command's own."""
    file, name, learner = take(args, "--config"), take(args, "--env"), peek(args, "--base")
    import_modules(_values(args, "--imports"))  # they may register the environment that is named
    known = environments()
    if name is not None and name not in known:
        raise unknown_name("environment", name, known)
    if file is not None:
        base = read_also_toml(Path(file))
        if learner is not None and learner != base.base:
            base = dataclasses.replace(base, base=learner, algorithm=cast(Any, None))
    else:
        given = {"base": learner, "environment": name}
        base = also_from_toml({key: value for key, value in given.items() if value is not None})
    env = base.env if name is None or type(base.env) is known[name] else known[name]()
    note = (
        f"--env NAME picks the environment ({', '.join(known)}), --base NAME what learns, --config FILE reads a run's "
        f"config.toml first; other flags go over it. Methods: {', '.join(ALSO_METHODS)}."
    )
    tables = {"env": type(env), "algorithm": type(base.algorithm)}
    return run_and_own("train", args, base, {"env": env}, tables, _TrainFlags, note)


def _values(args: list[str], flag: str) -> list[str]:
    """What follows a flag that takes several values; `args` stay as they are."""
    joined = [arg.partition("=")[2] for arg in args if arg.startswith(f"{flag}=")]
    found = itertools.dropwhile(lambda arg: arg != flag, args)
    return joined + list(itertools.takewhile(lambda arg: not arg.startswith("--"), itertools.islice(found, 1, None)))


def train_also(args: list[str]) -> int:
    """`echelon train --method also --base qmix --env search …`."""
    from echelon.also import AlsoTrainer
    from echelon.console import Stopper, Watch, console, evaluate_trained, resuming
    from echelon.reports.account import write_account
    from echelon.runs import read_run

    given = given_flags(args)
    resumed = peek(args, "--resume")
    run, flags = _flags([*args, "--config", f"{resumed}/config.toml"] if resumed is not None else args)
    at_least(0, eval_episodes=flags.eval_episodes, replay_episodes=flags.replay_episodes)
    if flags.resume is not None:
        refuse_beside_resume(given, "--eval-episodes", "--replay-episodes")
        trainer = AlsoTrainer.resume(flags.resume)
    else:
        ensure_proposer(run)
        trainer = AlsoTrainer(run, flags.out or _default_folder(run))
    folder, run = trainer.folder, trainer.config
    label = f"{run.method} ({run.base})"
    who = f", {trainer.proposer.name} proposes" if trainer.proposer is not None else ""
    console.print(f"{label} in {folder}{who}")
    stopper = Stopper()
    with stopper.listening(), Watch() as watch:

        def told(p: AlsoProgress) -> None:
            for news in p.news:
                watch.note(news)
            newest = "" if p.evaluation is None else f", TSR {p.evaluation['tsr']:.2f}"
            watch.show(label, p.spent, p.steps, f"steps with branches: {p.stage}{newest}")

        finished = trainer.run(told, stopper)
        watch.end(label)
        page = write_account(folder)
        if finished:
            main = folder / "main"
            title = f"{label}, seed {run.seed}, {run.steps:,} steps with branches"
            evaluate_trained(
                run.method, read_run(main), main, watch, stopper, title, episodes=flags.eval_episodes,
                record=flags.replay_episodes,
            )  # fmt: skip
    if stopper():
        console.print(f"stopped; go on with: {resuming(folder)}")
        return 128 + stopper.signal
    console.print(f"account of diagnoses, proposals, branches and verdicts: {page}")
    console.print(f"run folder: {folder} (what was trained: {folder / 'main'})")
    return 0


def _default_folder(run: AlsoConfig) -> Path:
    name = f"{run.method}-{run.base}-{env_name(run.env)}-{run.env.size}-seed{run.seed}"
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
