"""The commands for studies: `echelon study`, `reproduce` and `report`."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import quote

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from echelon.also.configs import AlsoConfig
from echelon.configs import RunConfig
from echelon.errors import EchelonError, StorageError
from echelon.fetching import ensure_model, ensure_proposer
from echelon.flags import parse, refuse_teams
from echelon.runs import ACCOUNT

if TYPE_CHECKING:
    from echelon.studies.backends import Backend
    from echelon.studies.engine import Matrix
    from echelon.studies.spec import Study

__all__ = ["report", "reproduce", "study"]


def _list_of(kind: Callable[[str], Any], metavar: str) -> PrimitiveConstructorSpec[Any]:
    """How a list that may be left out is read; tyro's own words for what it can't read name its types."""
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"{metavar} [{metavar} ...]",
        instance_from_str=lambda words: tuple(kind(word) for word in words),
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: [str(item) for item in value or ("None",)],
    )


def _number(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise ValueError(f"{word!r} is no whole number") from None


_Names = Annotated[tuple[str, ...] | None, _list_of(str, "NAME")]
_Numbers = Annotated[tuple[int, ...] | None, _list_of(_number, "INT")]


@dataclass(frozen=True)
class _StudyFlags:
    """What both ways to run a study can be told."""

    out: Path | None = None
    """The study's folder; default: studies/<name>. Called again, it goes on where it stopped."""
    methods: _Names = None
    """These methods instead of the study's."""
    environments: _Names = None
    """These environments instead of the study's."""
    sizes: _Numbers = None
    """These sizes instead of the study's."""
    agents: _Numbers = None
    """These numbers of agents instead of the study's."""
    seeds: _Numbers = None
    """These seeds instead of the study's."""
    steps: int | None = None
    """So many environment steps a training instead of the study's."""
    model: str | None = None
    """The language model of the methods that ask one, instead of the study's."""
    backend: Literal["pool", "ray"] = "pool"
    """Where runs are done: processes on this machine, or a Ray cluster."""
    workers: int | None = None
    """Runs at a time; default: one a core (of the cluster)."""
    address: str | None = None
    """The Ray cluster: host:port, or auto; default: this machine alone."""
    retry_failed: bool = False
    """Begin runs again that failed before."""
    dry_run: bool = False
    """Only print what the study would cost: runs, steps, core-hours, model calls and their price."""
    price: float = 0.0
    """Price of the language model, in USD per million prompt tokens, for --dry-run."""


def study(args: list[str]) -> int:
    """`echelon study FILE [OPTIONS]`."""
    from echelon.studies.spec import read_study

    @dataclass(frozen=True)
    class Flags(_StudyFlags):
        """Run a study (methods x environments x sizes x agents x seeds) and write its report.

        FILE is TOML: name, methods, environments, sizes, agents, seeds, steps; [protocol]; settings of all runs in
        [run], of one method's in [method.NAME], of an environment in [env.NAME]. See docs/studies.md.
        """

        file: tyro.conf.Positional[Path] = Path("study.toml")
        """The study."""

    flags = parse("study", Flags, args)
    return _run(read_study(flags.file), flags, shlex.join(["echelon", "study", *args]))


def reproduce(args: list[str]) -> int:
    """`echelon reproduce --preset NAME [OPTIONS]`."""
    from echelon.studies.presets import preset

    @dataclass(frozen=True)
    class Flags(_StudyFlags):
        """Run the L2M2 experiment and write its report: claims of the paper beside what was measured.

        quick: 2 sizes, 2 seeds, minutes. medium: 3 sizes, 3 seeds, 2 million steps, about an hour on 2 cores.
        paper: 5 sizes, 4 and 8 agents, 5 seeds, 5 million steps. Each goes on where it stopped.
        """

        preset: str = "quick"
        """quick, medium or paper."""

    flags = parse("reproduce", Flags, args)
    return _run(preset(flags.preset), flags, shlex.join(["echelon", "reproduce", *args]))


def report(args: list[str]) -> int:
    """`echelon report STUDY`."""
    from echelon._files import read_json
    from echelon.studies.analysis import analyse
    from echelon.studies.engine import collect, replays_of
    from echelon.studies.spec import read_study

    @dataclass(frozen=True)
    class Flags:
        """Write a study's report, tables and figures anew from what its folder holds, also while it runs.

        STUDY is the study's folder, or a results.json that was kept of one.
        """

        source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="STUDY")]
        """The study."""
        out: Path | None = None
        """The folder to write into; default: the study's own."""

    flags = parse("report", Flags, args)
    source: Path = flags.source
    if source.is_file():
        results = read_json(source, "study's results")
        if not isinstance(results, dict) or "runs" not in results:
            raise EchelonError(f"{source} holds no study's results")
        print(_write(results, analyse(results), flags.out or source.parent))
        return 0
    if not (source / "study.toml").exists():
        raise EchelonError(f"{source} is no study: it has no study.toml")
    study = read_study(source / "study.toml")
    results = collect(study, source)
    out = flags.out or source
    accounts = _accounts(study, source, out)
    print(_write(results, analyse(results), out, replays=replays_of(study, source), accounts=accounts))
    return 0


def _run(study: Study, flags: _StudyFlags, command: str) -> int:
    from echelon.console import Stopper, Watch, console
    from echelon.studies.analysis import analyse
    from echelon.studies.backends import cores
    from echelon.studies.engine import replays_of, run_study

    narrowed = {
        name: getattr(flags, name)
        for name in ("methods", "environments", "sizes", "agents", "seeds", "steps")
        if getattr(flags, name) is not None
    }
    study = dataclasses.replace(study, **narrowed)
    refuse_teams(study.methods)
    if flags.model is not None:
        study = _with_model(study, flags.model)
    if flags.workers is not None and flags.workers < 1:
        raise EchelonError(f"--workers is {flags.workers}: it must be at least 1")
    if flags.price < 0:
        raise EchelonError(f"--price is {flags.price}: it must be at least 0")
    folder = flags.out or Path("studies") / study.name
    if flags.dry_run:
        print(_costs(study, flags.workers or cores(), flags.price))
        return 0
    _ensure_models(study)
    if ignored := study.ignored():
        console.print(f"[run] of study {study.name}: none of its methods has {', '.join(ignored)}: ignored")
    backend = _backend(flags, folder)
    stopper = Stopper()
    try:
        with stopper.listening(), Watch() as watch:
            shown: set[str] = set()

            def show(matrix: Matrix) -> None:
                nonlocal shown
                for line in matrix.news:
                    console.print(line)
                for name in shown - set(matrix.running):
                    watch.end(_short(name))
                done = matrix.finished + len(matrix.failed)
                watch.show(study.name, done, matrix.total, _words(matrix), counted=True)
                for name, told in matrix.running.items():
                    if told is not None:
                        watch.show(_short(name), told["done"], told["total"], f"{told['stage']} {told['info']}")
                shown = set(matrix.running)

            results = run_study(
                study, folder, backend, retry_failed=flags.retry_failed, report=show, should_stop=stopper
            )
    finally:
        backend.close()
    states = [run["status"] for run in results["runs"]]
    if stopper() and "pending" in states:
        done = states.count("finished")
        left = f"stopped with {done} of {len(states)} runs finished"
        console.print(f"{left}; the same command goes on: {command}")
        return 128 + stopper.signal
    analysis = analyse(results)
    _summary(analysis, results)
    accounts = _accounts(study, folder, folder)
    print(_write(results, analysis, folder, replays=replays_of(study, folder), accounts=accounts))
    if "pending" in states:
        left = f"{states.count('pending')} of {len(states)} runs are not done"
        console.print(f"{left}; the same command goes on: {command}")
    return 0 if set(states) == {"finished"} else 1


def _ensure_models(study: Study) -> None:
    """Make sure that the language models which the study's runs need are there."""
    from echelon.methods import method

    asked: dict[str, RunConfig | AlsoConfig] = {}
    for config in (run.config for run in study.runs()):
        if isinstance(config, RunConfig) and method(config.method).needs_model(config.planner):
            asked.setdefault(config.model_spec, config)
        elif isinstance(config, AlsoConfig) and config.kind.stages != "none":
            asked.setdefault(f"proposer {config.proposer}", config)
    for config in asked.values():
        if isinstance(config, RunConfig):
            ensure_model(config)
        else:
            ensure_proposer(config)


def _with_model(study: Study, model: str) -> Study:
    """The study with another language model, to plan and to propose; runs that ask none stay the same runs."""
    from echelon.extensions import import_modules
    from echelon.methods import method, methods
    from echelon.shaping import needs_model

    import_modules(study.imports)
    asking = {name: "model" for name in study.methods if name in methods() and method(name).needs_model()}
    for config in (run.config for run in study.runs()):
        if isinstance(config, AlsoConfig) and config.kind.stages != "none" and needs_model(config.proposer):
            asking[config.method] = "proposer"
    own = study.settings.get("method", {})
    asked = {name: {**own.get(name, {}), key: model} for name, key in asking.items()}
    return dataclasses.replace(study, settings={**study.settings, "method": {**own, **asked}})


def _backend(flags: _StudyFlags, folder: Path) -> Backend:
    from echelon._files import explain_os_error
    from echelon.studies.backends import PoolBackend

    if flags.backend == "ray":
        from echelon.studies.ray_backend import RayBackend

        return RayBackend(flags.address, flags.workers)
    if flags.address is not None:
        raise EchelonError("--address is a Ray cluster's: give --backend ray with it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain_os_error(error, folder) from error
    return PoolBackend(flags.workers, folder / "workers.log")


def _short(name: str) -> str:
    """A run's id without its hash."""
    return name.rsplit("-", 1)[0]


def _words(matrix: Matrix) -> str:
    """What a progress line says after the number of runs that are done."""
    left = f", about {_time(matrix.seconds_left)} left" if matrix.seconds_left else ""
    return f"runs, {len(matrix.running)} running, {len(matrix.failed)} failed{left}"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"


def _costs(study: Study, workers: int, price: float) -> str:
    """What a study would cost, as a table of its methods."""
    from echelon.studies.costs import Cost
    from echelon.studies.kinds import kind_of

    runs = study.runs()
    header = ("method", "runs", "steps", "core-hours", "model calls", "model tokens", "price in USD")
    rows, cost = [], Cost()
    for name in (*study.methods, "all"):
        mine = [run for run in runs if name in (run.method, "all")]
        cost = sum((kind_of(run.method).estimate(run.config, study.protocol) for run in mine), Cost())
        rows.append(
            (name, f"{len(mine):,}", f"{cost.steps:,.0f}", f"{cost.seconds / 3600:.2f}", f"{cost.model_calls:,.0f}",
             f"{cost.model_tokens:,.0f}", f"{cost.model_tokens * price / 1e6:.2f}")
        )  # fmt: skip
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
             for row in [header, *rows]]  # fmt: skip
    lines.append(f"about {_time(cost.seconds / workers)} with {workers} workers; estimates, right to a factor of two")
    return "\n".join(lines)


def _write(
    results: dict[str, Any],
    analysis: dict[str, Any],
    folder: Path,
    *,
    replays: Mapping[str, Path] | None = None,
    accounts: Mapping[str, str] | None = None,
) -> Path:
    """Everything that is made from a study's results; the report's path."""
    from echelon._files import atomic_write_json
    from echelon.evaluation.exports import marl_eval, write_csv, write_latex
    from echelon.reports.study import write_report

    atomic_write_json(folder / "analysis.json", analysis)
    atomic_write_json(folder / "marl_eval.json", marl_eval(results), compact=True)
    write_csv(results, analysis, folder / "tables")
    write_latex(analysis, folder / "tables")
    return write_report(folder, results, analysis, replays=replays, accounts=accounts)


def _accounts(study: Study, folder: Path, out: Path) -> dict[str, str]:
    """The runs' account pages, as addresses seen from `out`; with the study's own report they are written anew."""
    from echelon.reports.account import write_account
    from echelon.studies.engine import files_of

    found = {}
    for run, path in files_of(study, folder, ACCOUNT).items():
        page = path.with_suffix(".html")
        if out == folder:
            try:
                write_account(path.parent)
            except StorageError:
                raise
            except EchelonError:
                continue  # a damaged one says so when it is asked for
        if page.exists():
            found[run] = quote(Path(os.path.relpath(page, out)).as_posix())
    return found


def _summary(analysis: dict[str, Any], results: dict[str, Any]) -> None:
    """The TSR of each method at each size, on standard output."""
    from rich.console import Console
    from rich.table import Table

    cells = analysis["cells"]
    places = list(dict.fromkeys((c["environment"], c["size"], c["agents"]) for c in cells))
    table = Table(title=f"{results['study']['name']}: TSR [95% interval]", title_justify="left")
    table.add_column("method")
    for environment, size, agents in places:
        table.add_column(f"{environment} {size}x{size}, {agents} agents", justify="right")
    for name in results["study"]["methods"]:
        row = [_interval(cells, place, name) for place in places]
        table.add_row(name, *row)
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160).print(table)
    for claim in analysis["claims"]:
        # A study of other methods says nothing of the paper's.
        if claim["runs"]:
            print(f"{claim['verdict']}: {claim['claim']}: {claim['ours']}")


def _interval(cells: Sequence[dict[str, Any]], place: tuple[str, int, int], name: str) -> str:
    for c in cells:
        if (c["environment"], c["size"], c["agents"], c["method"]) == (*place, name) and c["tsr"] is not None:
            return f"{c['tsr']['value']:.3f} [{c['tsr']['low']:.3f}, {c['tsr']['high']:.3f}]"
    return "-"
