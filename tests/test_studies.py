"""Studies: stable ids, nothing done twice, nothing lost, failures told, and policies judged by the field's protocol."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from hypothesis import given, settings
from hypothesis import strategies as st

import echelon
from echelon import _files, building, cli, cli_studies, methods
from echelon.building import build_worlds
from echelon.checkpoints import checkpoints_of
from echelon.configs import RunConfig
from echelon.envs import WarehouseConfig
from echelon.errors import BusyError, EchelonError, StorageError
from echelon.evaluation import protocol as protocol_module
from echelon.evaluation.episodes import evaluate, evaluation_seed
from echelon.evaluation.protocol import Protocol, run_by_protocol, same_run
from echelon.extensions import import_modules
from echelon.llm.choice import CausalChoiceModel
from echelon.runs import load_policy, run_costs
from echelon.studies import backends, engine, kinds, work
from echelon.studies.backends import PoolBackend, _how_it_died
from echelon.studies.engine import ATTEMPTS, Matrix, run_study
from echelon.studies.presets import preset
from echelon.studies.spec import Study, read_study, study_from_toml, study_to_toml
from echelon.training import Trainer
from studies_tools import UPDATE, Here, make_yard, outcome, same, tiny_study
from tiny_model import make_tiny_model

PATH = os.pathsep.join((str(Path(echelon.__file__).parents[1]), str(Path(__file__).parent)))


def wait_for(what: Callable[[], Any], seconds: float = 240) -> None:
    """Wait until it is so."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.02)


def checkpointed(folder: Path) -> list[str]:
    """The runs of a study that have a checkpoint."""
    return [run.name for run in (folder / "runs").glob("*") if checkpoints_of(run / "checkpoints")]


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file but locks and what running runs say of themselves, which they replace meanwhile."""
    found = {}
    for path in folder.rglob("*"):
        progress = (
            path.name == work.PROGRESS and path.parent.parent.name == "runs"
        )  # checkpoints have a file of that name
        if path.name == ".lock" or path.suffix == ".part" or progress or not path.is_file():
            continue
        with contextlib.suppress(FileNotFoundError):
            found[path] = path.read_bytes()
    return found


def statuses(results: dict[str, Any]) -> list[str]:
    return [run["status"] for run in results["runs"]]


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's file of environments and methods."""
    return make_yard(tmp_path_factory.mktemp("user"))


@pytest.fixture
def mood(yard: Path) -> Iterator[Path]:
    """What the environment is told to do; gone afterwards."""
    path = yard.with_name("mood")
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def whole(yard: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study, done in this process without any trouble."""
    folder = tmp_path_factory.mktemp("whole")
    assert statuses(run_study(tiny_study(yard), folder, Here())) == ["finished"] * 4
    return folder


@pytest.fixture(scope="module")
def pool() -> Iterator[PoolBackend]:
    """Two worker processes, which go from one study to the next."""
    pool = PoolBackend(2)
    yield pool
    processes = [worker.process for worker in pool._workers]
    pool.close()
    assert all(process.returncode is not None for process in processes)


# -- what a study is ---------------------------------------------------------------------------


def ids(study: Study) -> list[str]:
    return [run.id for run in study.runs()]


def test_a_study_expands_to_its_matrix_whole_seeds_first() -> None:
    """Every combination once, in the order of seeds, environments, sizes, agents, methods."""
    study = Study(
        name="matrix", methods=("rule-goals", "classical"), environments=("warehouse", "search"), sizes=(10, 12),
        agents=(2, 3), seeds=(5, 3), steps=1000,
    )  # fmt: skip
    runs = study.runs()
    cells = [(r.seed, r.environment, r.size, r.agents, r.method) for r in runs]
    assert cells == list(
        itertools.product((5, 3), ("warehouse", "search"), (10, 12), (2, 3), ("rule-goals", "classical"))
    )
    for run in runs:
        c = run.config
        assert (c.seed, c.env.size, c.env.num_agents, c.method) == (run.seed, run.size, run.agents, run.method)
        assert c.threads == 1 and run.record == (2 if run.seed == 5 else 0)
        assert c.steps == (1 if run.method == "classical" else 1000)


def test_a_study_is_not_mixed_into_a_run(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    with pytest.raises(EchelonError, match="holds a run: choose another folder for the study"):
        run_study(tiny_study(make_yard(tmp_path.parent)), tmp_path, Here())
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


def test_ids_of_the_committed_results_are_what_they_were() -> None:
    """The medium preset is the study under docs/results, whatever has become the default since."""
    path = Path(__file__).parents[1] / "docs/results/medium/results.json"
    committed = {run["id"] for run in json.loads(path.read_text(encoding="utf-8"))["runs"]}
    assert set(ids(preset("medium"))) == committed


def test_ids_are_what_they_were() -> None:
    """A change here makes every study that was begun before do its runs again."""
    study = Study(name="golden", methods=("rule-goals", "classical"), sizes=(10,), seeds=(0,), steps=1000)
    assert [name.rsplit("-", 1)[0] for name in ids(study)] == [
        "warehouse-s10-a4-rule-goals-seed0", "warehouse-s10-a4-classical-seed0",
    ]  # fmt: skip
    hashes = [name.rsplit("-", 1)[1] for name in ids(study)]
    assert hashes == ["e4e9bb56", "e38d236c"]


def test_a_run_keeps_its_id_whatever_else_is_in_the_study() -> None:
    """More of anything, other names and replays: the same ids; what changes a run's result changes its id."""
    base = Study(name="base", methods=("rule-goals", "classical"), sizes=(10,), seeds=(0, 1), steps=1000)
    for more in (
        {"name": "other", "title": "Another"}, {"record": 5}, {"methods": ("qmix", "classical", "rule-goals")},
        {"sizes": (20, 10)}, {"seeds": (2, 1, 0)}, {"agents": (2, 4)}, {"environments": ("search", "warehouse")},
        {"settings": {"method": {"qmix": {"num_envs": 8}}}}, {"settings": {"env": {"search": {"num_targets": 3}}}},
    ):  # fmt: skip
        assert set(ids(base)) <= set(ids(dataclasses.replace(base, **more))), more
    for other in (
        {"settings": {"run": {"num_envs": 8}}}, {"settings": {"env": {"warehouse": {"num_packages": 3}}}},
        {"protocol": Protocol(episodes=33)}, {"settings": {"run": {"algorithm": {"gamma": 0.9}}}},
    ):  # fmt: skip
        assert not set(ids(base)) & set(ids(dataclasses.replace(base, **other))), other
    # What learns nothing doesn't depend on how long the others learn.
    longer = dataclasses.replace(base, steps=2000)
    assert {name.split("-")[3] for name in set(ids(base)) & set(ids(longer))} == {"classical"}


def test_settings_go_over_one_another() -> None:
    """[run] is for all, [method] goes over it, table by table; [env] is for one environment, under [run.env]."""
    study = Study(
        name="s", methods=("rule-goals", "flat-mappo"), environments=("warehouse", "search"), sizes=(10,), seeds=(0,),
        settings={
            "run": {"num_envs": 8, "algorithm": {"gamma": 0.9, "hidden": 16}, "env": {"limit": 33}},
            "method": {"flat-mappo": {"algorithm": {"gamma": 0.8}}},
            "env": {"search": {"num_targets": 3, "limit": 44}},
        },
    )  # fmt: skip
    a, b, c, d = [run.config for run in study.runs()]
    assert (a.num_envs, a.algorithm.gamma, a.algorithm.hidden, a.env.limit) == (8, 0.9, 16, 33)
    assert (b.num_envs, b.algorithm.gamma, b.algorithm.hidden) == (8, 0.8, 16)
    assert a.env == b.env and c.env == d.env and c.env.num_targets == 3 and c.env.limit == 33


WRONG = [
    ("sizse = [10]", "unknown key in .*study.toml 'sizse': did you mean 'sizes'?"),
    ("sizes = [10, 10]", "study study: sizes lists 10 twice: two runs would have one id"),
    ('methods = ["qmix", "vdn", "qmix"]', "methods lists 'qmix' twice: two runs would have one id"),
    ("seeds = []", "seeds is empty: name at least one"),
    ("seeds = [-1]", "seeds is .*: it must be at least 0"),
    ('seeds = "0"', r"study.toml: seeds is '0': it must be"),
    ("sizes = 8", "study.toml: sizes is 8: it must be a list"),
    ("sizes = [10.5]", r"study.toml: sizes\[0\] is 10.5: it must be a whole number"),
    ("steps = 0", "steps is 0: it must be at least 1"),
    ("steps = true", "study.toml: steps is True: it must be a whole number"),
    ('name = "a/b"', "study name 'a/b': it must be letters, digits, - and _"),
    ('methods = ["qmx"]', "unknown method 'qmx': did you mean 'qmix'?"),
    ('environments = ["warehose"]', "unknown environment 'warehose': did you mean 'warehouse'?"),
    ("[protocol]\nepisode = 3", r"unknown key in .*study.toml: protocol 'episode': did you mean 'episodes'?"),
    ("[protocol]\nepisodes = 0", "protocol.episodes is 0: it must be at least 1"),
    ("[protocol]\nworld_seed = -1", "protocol.world_seed is -1: it must be at least 0"),
    ("[run]\nnum_env = 3", "unknown key in study study, rule-goals 'num_env': did you mean 'num_envs'?"),
    ("[run]\nseed = 3", r"study study: seed is the study's own; it can't be in \[run\]"),
    ("[run]\nthreads = 3", r"study study: threads is the study's own"),
    ("[run.algorithm]\nlr = -1", "algorithm.lr is -1.0: it must be above 0"),
    ("[method.rule-goal]\nnum_envs = 3", r"unknown name in \[method\] of study study 'rule-goal': did you mean"),
    ("[method.rule-goals]\nnum_env = 3", "rule-goals 'num_env': did you mean 'num_envs'?"),
    ("[method.rule-goals.algorithm]\ngama = 1", "unknown key in study study, rule-goals: algorithm 'gama': did you"),
    ("[method.rule-goals.env]\nlimit = 9", r"study study: env can't be in \[method.rule-goals\]: methods are compared"),
    ("[method.qmix.env]\nlimit = 9", r"env can't be in \[method.qmix\]"),
    ("[env.warehose]\nlimit = 3", r"unknown name in \[env\] of study study 'warehose': did you mean 'warehouse'?"),
    ("[env.warehouse]\nlimt = 3", "unknown key in study study, rule-goals: env 'limt': did you mean 'limit'?"),
    ("[env.warehouse]\nsize = 3", r"study study: size can't be in \[env\]: the study's sizes say it"),
    ("env = 3", r"study.toml: env must be a table, \[env.<name>\]"),
    ("[env]\nwarehouse = 3", r"study.toml: env must be a table, \[env.<name>\]"),
    ("settings = 3", "unknown key in .*study.toml 'settings'"),
    ("sizes = [5]\nagents = [64]", ".*"),
    ('imports = ["nothing.py"]', r"imports: there is no file .*nothing\.py"),
    ('imports = ["no_such_module"]', "imports: no_such_module fails: ModuleNotFoundError"),
    ("steps = ", "study .*study.toml isn't TOML"),
]


@pytest.mark.parametrize(("text", "line"), WRONG)
def test_a_wrong_study_gets_one_line_and_writes_nothing(text: str, line: str, tmp_path: Path) -> None:
    """What is wrong, where, and what would be right."""
    path = tmp_path / "study.toml"
    path.write_text(text)
    with pytest.raises(EchelonError, match=line) as caught:
        run_study(read_study(path), tmp_path / "out", Here())
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALARS = st.integers(-(2**63), 2**63) | st.booleans() | NAMES | st.floats(allow_nan=False)
TABLES = st.dictionaries(st.from_regex(r"[a-z][a-z_]{0,7}", fullmatch=True), SCALARS | st.lists(SCALARS), max_size=3)
DEEP = st.builds(lambda a, b: {**a, "algorithm": b}, TABLES, TABLES.filter(bool))


def some(values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(values, min_size=1, max_size=3, unique=True).map(tuple)


STUDIES = st.builds(
    Study,
    name=st.from_regex(r"[A-Za-z0-9_-]{1,9}", fullmatch=True), title=NAMES, methods=some(NAMES),
    environments=some(NAMES), sizes=some(st.integers()), agents=some(st.integers()), seeds=some(st.integers(0)),
    steps=st.integers(1), record=st.integers(0), imports=st.lists(NAMES, max_size=2).map(tuple),
    protocol=st.builds(Protocol, st.integers(1), st.integers(1), st.integers(1), st.none() | st.integers(0)),
    settings=st.fixed_dictionaries(
        {},
        optional={
            "run": TABLES.filter(bool),
            "env": st.dictionaries(NAMES, TABLES.filter(bool), min_size=1, max_size=2),
            "method": st.dictionaries(NAMES, DEEP, min_size=1, max_size=2),
        },
    ),
)  # fmt: skip


@settings(max_examples=150)
@given(STUDIES)
def test_a_study_survives_its_file(study: Study) -> None:
    """`study_from_toml(study_to_toml(study)) == study`, for whatever names and settings."""
    assert study_from_toml(tomllib.loads(study_to_toml(study)), name="other") == study


def test_files_that_a_study_imports_are_found_beside_it(
    yard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative to the study's file, from wherever it is run; the copy in the study's folder knows the place too."""
    study = tiny_study(Path("yard.py"), seeds=(0,), methods=("classical",))
    (yard.parent / "mine.toml").write_text(study_to_toml(study))
    monkeypatch.chdir(yard.parent)
    read = read_study(Path("mine.toml"))
    assert dataclasses.replace(read, imports=study.imports) == study
    monkeypatch.chdir(tmp_path)
    assert statuses(run_study(read, tmp_path / "study", Here())) == ["finished"]
    assert read_study(tmp_path / "study" / "study.toml") == read


def test_an_import_that_fails_fails_each_time(tmp_path: Path) -> None:
    """Half-done it isn't taken for done: the second time says what the first said."""
    (tmp_path / "mine.py").write_text("x = 1\nraise ValueError('no')\n")
    for _ in range(2):
        with pytest.raises(EchelonError, match=r"imports: .*mine\.py fails: ValueError: no"):
            import_modules([str(tmp_path / "mine.py")])


# -- the engine --------------------------------------------------------------------------------


def test_what_is_finished_is_never_done_again(yard: Path, whole: Path, tmp_path: Path) -> None:
    """Called again nothing runs and nothing is touched; a new seed or method runs alone."""
    folder, study = tmp_path / "study", tiny_study(yard, seeds=(0,))
    run_study(study, folder, Here())
    before = {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("*") if p.is_file()}
    idle = Here()
    results = run_study(study, folder, idle)
    assert idle.done == [] and statuses(results) == ["finished"] * 2
    more = Here()
    results = run_study(tiny_study(yard), folder, more)
    assert more.done == ids(tiny_study(yard))[2:] and statuses(results) == ["finished"] * 4
    assert json.loads((folder / "results.json").read_text()) == results
    assert {p: p.stat().st_mtime_ns for p in before} == before
    same(whole, folder, runs=4)


def test_results_hold_everything_in_the_order_of_the_matrix(yard: Path, whole: Path) -> None:
    """Each run with its place, the whole evaluations, and the same worlds for all methods of a seed."""
    results = json.loads((whole / "results.json").read_text())
    assert results["format"] == 1 and results["study"]["protocol"]["episodes"] == 4
    assert results["machine"]["versions"]["echelon"] == echelon.__version__
    assert results["study"]["settings"] == tiny_study(yard).settings and "imports" not in results["study"]
    assert [run["id"] for run in results["runs"]] == ids(tiny_study(yard))
    for run in results["runs"]:
        learns = run["method"] == "my-goals"
        assert run["learns"] == learns and run["reason"] is None and run["status"] == "finished"
        assert (run["versions"], run["processor"]) == tuple(results["machine"][k] for k in ("versions", "processor"))
        assert run["precision"] == "float32" and set(run["versions"]) == {"echelon", "python", "torch", "numpy"}
        assert [e["step"] for e in run["evaluations"]] == ([0, 192, 384, 512] if learns else [0])
        for judged in (run["best"], run["last"]):
            assert judged["episodes"] == 6 == len(judged["success"]) == len(judged["steps"])
            assert judged["tsr"] == sum(judged["success"]) / 6


def test_the_pool_gives_the_results_of_one_process_and_tells_where_it_is(
    pool: PoolBackend, yard: Path, whole: Path, tmp_path: Path
) -> None:
    """Two workers, a user's own environment and method in them; counts add up at every moment."""
    seen: list[Matrix] = []
    news: list[str] = []

    def see(m: Matrix) -> None:
        news.extend(m.news)
        seen.append(dataclasses.replace(m, running=dict(m.running), failed=dict(m.failed)))

    results = run_study(tiny_study(yard), tmp_path / "study", pool, report=see)
    assert statuses(results) == ["finished"] * 4
    same(whole, tmp_path / "study", runs=4)
    assert max(len(m.running) for m in seen) == 2
    assert [m.finished for m in seen] == sorted(m.finished for m in seen) and seen[-1].finished == 4
    assert all(m.total == 4 and m.finished + len(m.running) <= 4 and not m.failed for m in seen)
    assert all(m.finished for m in seen if m.seconds_left is not None) and seen[-1].seconds_left == 0
    assert sorted(line.split(":")[0] for line in news) == sorted(ids(tiny_study(yard)))
    assert not list((tmp_path / "study").glob("runs/*/progress.json")) and not list(tmp_path.rglob(".stop-*"))


def test_a_run_says_where_it_is(pool: PoolBackend, yard: Path, mood: Path, tmp_path: Path) -> None:
    """While it trains: the stage, what is done of how much; and a stop leaves a checkpoint that goes on."""
    study = tiny_study(yard, steps=5000 * UPDATE, methods=("my-goals",), seeds=(0,))
    told: list[dict[str, Any]] = []

    def see(m: Matrix) -> None:
        told.extend(t for t in m.running.values() if t is not None)

    results = run_study(
        study, tmp_path / "study", pool, report=see,
        should_stop=lambda: any(t["stage"] == "training" for t in told),
    )  # fmt: skip
    last = next(t for t in reversed(told) if t["stage"] == "training")
    assert 0 < last["done"] <= last["total"] == 5000 * UPDATE and last["info"].endswith("steps/s")
    assert statuses(results) == ["pending"] and len(checkpointed(tmp_path / "study")) == 1


def test_a_study_told_to_stop_goes_on_where_it_was(
    pool: PoolBackend, yard: Path, mood: Path, whole: Path, tmp_path: Path
) -> None:
    """Runs under way save a checkpoint; what waited isn't begun; later everything comes out the same."""
    mood.write_text("hold")
    folder, stopped = tmp_path / "study", False

    def should_stop() -> bool:
        nonlocal stopped
        stopped = stopped or len(checkpointed(folder)) == 2
        return stopped

    def let_go(matrix: Matrix) -> None:
        if list(folder.glob(".stop-*")):
            mood.unlink(missing_ok=True)

    study = tiny_study(yard, methods=("my-goals", "random-goals"))
    results = run_study(study, folder, pool, report=let_go, should_stop=should_stop)
    assert statuses(results) == ["pending"] * 4
    # Stopped after the update in which they were: one more than the checkpoint before.
    for name in ids(study)[:2]:
        assert checkpoints_of(folder / "runs" / name / "checkpoints")[-1].name == f"step-{3 * UPDATE:012d}"
        assert not (folder / "runs" / name / "failed.json").exists()
    assert not (folder / "runs" / ids(study)[2]).exists()
    run_study(tiny_study(yard), folder, pool)
    for name in ids(tiny_study(yard)):
        assert outcome(folder / "runs" / name) == outcome(whole / "runs" / name)


def test_a_killed_worker_costs_only_the_work_since_its_checkpoint(
    pool: PoolBackend, yard: Path, mood: Path, whole: Path, tmp_path: Path
) -> None:
    """SIGKILL, as the kernel does it when memory runs out: the run goes on in another worker and comes out the same."""
    mood.write_text("die once")
    news: list[str] = []
    run_study(tiny_study(yard), tmp_path / "study", pool, report=lambda m: news.extend(m.news))
    deaths = [line for line in news if "killed" in line]
    assert len(deaths) == 1
    assert deaths[0].endswith("its worker was killed by SIGKILL (out of memory?); it goes on from its last checkpoint")
    same(whole, tmp_path / "study", runs=4)


def test_a_run_that_kills_its_worker_each_time_is_a_failed_run(
    pool: PoolBackend, yard: Path, mood: Path, tmp_path: Path
) -> None:
    """After so many attempts it counts as failed, with its reason; the others are done."""
    mood.write_text("die")
    study = tiny_study(yard, seeds=(0,))
    news: list[str] = []
    results = run_study(study, tmp_path / "study", pool, report=lambda m: news.extend(m.news))
    assert statuses(results) == ["failed", "finished"]
    assert results["runs"][0]["reason"] == f"its worker was killed by SIGKILL (out of memory?), {ATTEMPTS} times"
    assert len([line for line in news if "it goes on from its last checkpoint" in line]) == ATTEMPTS - 1


def test_a_worker_that_closed_its_output_is_ended(
    yard: Path, mood: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alive but never to be heard again, it isn't waited for: its run goes on in another."""
    monkeypatch.setattr(backends, "_LAST_WORDS", 0.2)
    mood.write_text("deaf")
    news: list[str] = []
    pool = PoolBackend(1)
    study = tiny_study(yard, seeds=(0,), methods=("my-goals",))
    run_study(study, tmp_path / "study", pool, report=lambda m: news.extend(m.news))
    pool.close()
    assert "its worker closed its output, and was ended; it goes on from its last checkpoint" in news[0]
    name = ids(study)[0]
    assert outcome(tmp_path / "study" / "runs" / name) == outcome(whole / "runs" / name)


class Scripted:
    """A backend that does nothing and gives made-up outcomes, one a call.

    Attributes:
        begun: ids of the jobs that it was given.
    """

    slots = 1

    def __init__(self, *outcomes: dict[str, Any]) -> None:
        self.begun: list[str] = []
        self._script = iter(outcomes)
        self.job: dict[str, Any] = {}

    def start(self, job: dict[str, Any]) -> None:
        self.begun.append(job["id"])
        self.job = job

    def wait(self, seconds: float) -> list[tuple[str, dict[str, Any]]]:
        return [(self.job["id"], {"reason": None, **next(self._script)})]

    def close(self) -> None:
        pass


def one_run(yard: Path) -> Study:
    return tiny_study(yard, seeds=(0,), methods=("my-goals",))


def test_a_run_that_stops_unasked_is_begun_again(yard: Path, tmp_path: Path) -> None:
    """It isn't dropped: after so many attempts it counts as failed."""
    news: list[str] = []
    backend = Scripted(*[{"status": "stopped"}] * ATTEMPTS)
    results = run_study(one_run(yard), tmp_path / "study", backend, report=lambda m: news.extend(m.news))
    assert len(backend.begun) == ATTEMPTS
    assert results["runs"][0]["reason"] == f"its worker stopped unasked, {ATTEMPTS} times"
    assert news[0] == f"{backend.begun[0]}: its worker stopped unasked; it goes on from its last checkpoint"


def test_a_run_that_another_process_holds_is_tried_again_and_then_left(yard: Path, tmp_path: Path) -> None:
    """A hold that outlives its node goes in time; whoever really does the run may finish it: it isn't failed."""
    busy = {"status": "busy", "reason": "it is in use"}
    backend = Scripted(busy, {"status": "died", "reason": "it died"}, busy)
    news: list[str] = []
    results = run_study(one_run(yard), tmp_path / "study", backend, report=lambda m: news.extend(m.news))
    assert len(backend.begun) == ATTEMPTS == len(news) and statuses(results) == ["pending"]
    assert news[2] == f"{backend.begun[0]}: not done: it is in use" and not list(tmp_path.rglob("failed.json"))


def test_a_dead_runs_reason_that_can_not_be_written_stops_the_study(
    yard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As any full disk does: one line, and no run counts as failed."""

    def full(path: Path, value: Any) -> None:
        raise StorageError(f"no space left for {path.name}")

    monkeypatch.setattr(engine, "atomic_write_json", full)
    seen: list[dict[str, str]] = []
    backend = Scripted(*[{"status": "died", "reason": "it died"}] * ATTEMPTS)
    with pytest.raises(StorageError, match=r"no space left for failed\.json"):
        run_study(one_run(yard), tmp_path / "study", backend, report=lambda m: seen.append(dict(m.failed)))
    assert len(backend.begun) == ATTEMPTS and not any(seen)


def test_an_error_lets_runs_under_way_save_what_they_have(yard: Path, tmp_path: Path) -> None:
    """They find the stop file and are waited for; the error comes out as it was."""
    stops: list[bool] = []

    class Fails(Scripted):
        def wait(self, seconds: float) -> list[tuple[str, dict[str, Any]]]:
            stops.append(Path(self.job["stop"]).exists())
            return super().wait(seconds) if len(stops) == 3 else []

    def fail(matrix: Matrix) -> None:
        raise RuntimeError("no terminal")

    with pytest.raises(RuntimeError, match="no terminal"):
        run_study(one_run(yard), tmp_path / "study", Fails({"status": "stopped"}), report=fail)
    assert stops == [False, True, True] and not list(tmp_path.rglob(".stop-*"))


@pytest.mark.parametrize("raises", [False, True])
def test_after_an_error_nobody_is_waited_for_for_ever(
    raises: bool, yard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that is gone, or a run that doesn't stop: the stop file stays for it until the next call."""
    monkeypatch.setattr(engine, "_DRAIN", 0.05)
    calls = itertools.count()

    class Gone(Scripted):
        def wait(self, seconds: float) -> list[tuple[str, dict[str, Any]]]:
            if raises or not next(calls):
                raise StorageError("the cluster is gone")
            time.sleep(0.01)
            return []

    with pytest.raises(StorageError, match="the cluster is gone"):
        run_study(one_run(yard), tmp_path / "study", Gone())
    assert len(list((tmp_path / "study").glob(".stop-*"))) == 1
    run_study(one_run(yard), tmp_path / "study", Scripted(*[{"status": "died", "reason": "so"}] * ATTEMPTS))
    assert not list((tmp_path / "study").glob(".stop-*"))


def test_a_job_that_can_not_be_begun_is_not_waited_for(yard: Path, tmp_path: Path) -> None:
    """Where no process can be started, there is nobody to stop."""

    class Refuses(Scripted):
        def start(self, job: dict[str, Any]) -> None:
            raise StorageError("no more processes")

        def wait(self, seconds: float) -> list[tuple[str, dict[str, Any]]]:
            raise AssertionError

    with pytest.raises(StorageError, match="no more processes"):
        run_study(one_run(yard), tmp_path / "study", Refuses())
    assert not list(tmp_path.rglob(".stop-*"))


def test_the_time_left_is_what_is_left(yard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unknown until a whole run was done here; then by what is trained, and what the whole run took."""
    folder, study = tmp_path / "study", tiny_study(yard, methods=("my-goals",), seeds=(0, 1, 2))
    runs = [folder / "runs" / name for name in ids(study)]
    monkeypatch.setattr(kinds, "estimate", lambda run, protocol: type("Cost", (), {"seconds": 10.0}))
    # Half of the first run was done before; it tells nothing of how long a whole one takes.
    (runs[0] / "checkpoints" / f"step-{4 * UPDATE:012d}").mkdir(parents=True)
    left: list[float | None] = []

    class Slow(Scripted):
        def wait(self, seconds: float) -> list[tuple[str, dict[str, Any]]]:
            outcome = next(self._script)
            if outcome["status"] == "working":
                told = {"stage": "training", "total": 8 * UPDATE, "info": "", **outcome}
                (Path(self.job["folder"]) / "progress.json").write_text(json.dumps(told))
                return []
            (Path(self.job["folder"]) / "progress.json").unlink(missing_ok=True)
            return [(self.job["id"], {"reason": None, **outcome})]

    for run in runs[1:]:
        run.mkdir()
    backend = Slow(
        {"status": "finished", "seconds": 1.0}, {"status": "working", "done": 6 * UPDATE},
        {"status": "finished", "seconds": 30.0}, {"status": "working", "done": 2 * UPDATE},
        {"status": "died", "reason": "so"}, {"status": "finished", "seconds": 5.0},
    )  # fmt: skip
    run_study(study, folder, backend, report=lambda m: left.append(m.seconds_left))
    assert left == [None, None, 30.0, 22.5, 30.0, 0.0]


def test_nothing_is_shown_that_an_earlier_attempt_said(yard: Path, tmp_path: Path) -> None:
    """A killed worker's progress file and its half-written one are gone before the next begins."""
    run = tmp_path / "study" / "runs" / ids(one_run(yard))[0]
    run.mkdir(parents=True)
    old = {"stage": "training", "done": 1, "total": 2, "info": "old"}
    seen: list[Any] = []

    class Looks(Scripted):
        def wait(self, seconds: float) -> list[tuple[str, dict[str, Any]]]:
            seen.append(sorted(p.name for p in run.iterdir()))
            for name in ("progress.json", "progress.123.part"):
                (run / name).write_text(json.dumps(old))
            return super().wait(seconds)

    run_study(one_run(yard), tmp_path / "study", Looks(*[{"status": "died", "reason": "so"}] * ATTEMPTS))
    assert seen == [[]] * ATTEMPTS


@pytest.mark.parametrize(
    ("code", "words"),
    [(7, "ended with status 7"), (-11, "was killed by SIGSEGV"), (-40, "was killed by signal 40")],
)
def test_how_a_worker_died_is_told(code: int, words: str) -> None:
    """By its status, or by the signal's name where it has one."""
    assert _how_it_died(code) == f"its worker {words}"


def start_study(yard: Path, folder: Path) -> subprocess.Popen[bytes]:
    """A process of its own that runs the study with two workers."""
    code = (
        "import sys; from pathlib import Path; from studies_tools import tiny_study\n"
        "from echelon.studies.engine import run_study; from echelon.studies.backends import PoolBackend\n"
        "folder = Path(sys.argv[2])\n"
        "run_study(tiny_study(Path(sys.argv[1])), folder, PoolBackend(2, folder / 'workers.log'))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(yard), str(folder)], env={**os.environ, "PYTHONPATH": PATH}
    )


def children(pid: int) -> list[int]:
    """The processes whose parent is `pid`."""
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def lives(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_study_leaves_no_worker_and_goes_on(
    yard: Path, mood: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kill -9` of the study: its workers save what they have and end; called again it comes out the same."""
    mood.write_text("hold")
    folder = tmp_path / "study"
    process = start_study(yard, folder)
    wait_for(lambda: len(checkpointed(folder)) == 2)
    workers = children(process.pid)
    assert len(workers) == 2
    # Meanwhile nobody else may write the study, or one of its runs.
    before = contents(folder)
    with pytest.raises(BusyError, match="is in use by another process: wait for it or stop it"):
        run_study(tiny_study(yard), folder, Here())
    assert contents(folder) == before
    process.kill()
    process.wait()
    assert all(lives(pid) for pid in workers)  # held by their mood
    with monkeypatch.context() as patch:
        patch.setattr(work, "_BUSY_FOR", 0.1)
        news: list[str] = []
        held = tiny_study(yard, seeds=(0,), methods=("my-goals",))
        results = run_study(held, folder, Here(), report=lambda m: news.extend(m.news))
        assert statuses(results) == ["pending"] and all("in use by another process" in line for line in news)
    assert not list(folder.glob("runs/*/failed.json"))
    mood.unlink()
    wait_for(lambda: not any(lives(pid) for pid in workers))
    for name in checkpointed(folder):
        assert checkpoints_of(folder / "runs" / name / "checkpoints")[-1].name == f"step-{3 * UPDATE:012d}"
    assert not list(folder.glob("runs/*my-goals*/result.json"))
    run_study(tiny_study(yard), folder, Here())
    same(whole, folder, runs=4)
    assert not list(folder.rglob(".echelon-tmp-*")) and not list(folder.glob(".stop-*"))


# -- failed runs -------------------------------------------------------------------------------


def test_a_run_that_diverges_is_kept_told_and_left_out(yard: Path, whole: Path, tmp_path: Path) -> None:
    """The others are done; it isn't repeated unless asked for, and keeps its reason."""
    settings = tiny_study(yard).settings
    study = tiny_study(
        yard, seeds=(0,), methods=("my-goals", "flat-mappo", "classical"),
        settings={**settings, "method": {"flat-mappo": {"algorithm": {"lr": 1e38}}}},
    )  # fmt: skip
    folder, seen = tmp_path / "study", []
    results = run_study(study, folder, Here(), report=lambda m: seen.append((m.finished, dict(m.failed), list(m.news))))
    assert statuses(results) == ["finished", "failed", "finished"]
    failed = results["runs"][1]
    assert failed["reason"].startswith("training diverged at step ") and "best" not in failed
    assert seen[-1][:2] == (2, {failed["id"]: failed["reason"]})
    assert f"{failed['id']}: failed: {failed['reason']}" in [line for _, _, news in seen for line in news]
    again = Here()
    assert run_study(study, folder, again)["runs"][1] == failed and again.done == []
    retried = Here()
    results = run_study(study, folder, retried, retry_failed=True)
    assert retried.done == [failed["id"]] and results["runs"][1] == failed


def test_a_users_environment_that_raises_fails_its_runs_alone(
    yard: Path, mood: Path, whole: Path, tmp_path: Path
) -> None:
    """The reason and the traceback are kept; mended and asked for again, it goes on from its checkpoint."""
    mood.write_text("raise")
    folder = tmp_path / "study"
    results = run_study(tiny_study(yard), folder, Here())
    assert statuses(results) == ["failed", "finished"] * 2
    assert results["runs"][0]["reason"] == "ValueError: the conveyor is jammed"
    failed = json.loads((folder / "runs" / results["runs"][0]["id"] / "failed.json").read_text())
    assert 'yard.py", line' in failed["traceback"]
    mood.unlink()
    # Asked for again and stopped before it was done, it is no longer failed: it goes on next time.
    calls = itertools.count()
    results = run_study(tiny_study(yard), folder, Here(), retry_failed=True, should_stop=lambda: next(calls) >= 1)
    assert sorted(statuses(results)) == ["finished", "finished", "finished", "pending"]
    assert statuses(run_study(tiny_study(yard), folder, Here())) == ["finished"] * 4
    assert not list(folder.glob("runs/*/failed.json"))
    same(whole, folder, runs=4)


# -- folders and disks -------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["result.json", "failed.json", "protocol.json", "checkpoint"])
def test_a_run_of_another_version_is_one_line_and_nothing_is_lost(file: str, yard: Path, tmp_path: Path) -> None:
    """Of a newer Echelon: told before anything is begun."""
    folder, study = tmp_path / "study", tiny_study(yard, seeds=(0,))
    if file in ("result.json", "failed.json"):
        run = folder / "runs" / ids(study)[0]
        run.mkdir(parents=True)
        (run / file).write_text(json.dumps({"format": 99, "reason": "?"}))
    else:
        run_study(study, folder, Here())
        run = folder / "runs" / ids(study)[0]
        (run / "result.json").unlink()
        path = run / file if file != "checkpoint" else checkpoints_of(run / "checkpoints")[-1] / "manifest.json"
        told = json.loads(path.read_text())
        told.get("of", told)["format"] = 99
        path.write_text(json.dumps(told))
    before = contents(folder)
    backend = Here()
    with pytest.raises(EchelonError, match=r"has format 99, this Echelon reads up to 1: use a newer Echelon") as caught:
        run_study(study, folder, backend)
    assert "\n" not in str(caught.value) and str(run) in str(caught.value)
    assert contents(folder) == before and backend.done == []


@pytest.mark.parametrize("harm", ["", "[]", "{", "\udcff", '{"format": "1"}', '{"format": 1, "best": {}}'])
@pytest.mark.parametrize("file", ["result.json", "failed.json"])
def test_a_damaged_file_of_a_run_is_one_line_that_says_what_to_do(
    file: str, harm: str, yard: Path, tmp_path: Path
) -> None:
    """Which run, and what to remove; a failed run without a reason is failed all the same."""
    folder, study = tmp_path / "study", tiny_study(yard, seeds=(0,), methods=("classical",))
    run = folder / "runs" / ids(study)[0]
    run.mkdir(parents=True)
    (run / file).write_bytes(harm.encode(errors="surrogateescape"))
    if file == "failed.json" and harm.endswith("}}"):
        results = run_study(study, folder, Here())
        assert results["runs"][0]["reason"] == "its failed.json gives no reason"
        return
    with pytest.raises(
        EchelonError, match=f"{file} is damaged .*: remove that file, and the run is done again"
    ) as caught:
        run_study(study, folder, Here())
    assert "\n" not in str(caught.value) and str(run) in str(caught.value)
    (run / file).unlink()
    assert statuses(run_study(study, folder, Here())) == ["finished"]


def test_results_of_another_echelon_are_kept_and_told(yard: Path, whole: Path, tmp_path: Path) -> None:
    """By the ids they are the same runs: a line says by whom they were made."""
    folder, study = tmp_path / "study", tiny_study(yard)
    shutil.copytree(whole, folder)
    for name, version in zip(ids(study), ("0.0.9", "0.0.9", "0.0.8"), strict=False):
        path = folder / "runs" / name / "result.json"
        told = json.loads(path.read_text())
        told["versions"]["echelon"] = version
        path.write_text(json.dumps(told))
    idle, news = Here(), list[str]()
    results = run_study(study, folder, idle, report=lambda m: news.extend(m.news))
    this = echelon.__version__
    assert news == [
        f"2 runs were made by echelon 0.0.9, this is {this}: move them away to do them anew",
        f"1 run was made by echelon 0.0.8, this is {this}: move them away to do them anew",
    ]
    assert idle.done == [] and [r["versions"]["echelon"] for r in results["runs"]] == ["0.0.9", "0.0.9", "0.0.8", this]


def test_of_a_finished_run_the_newest_checkpoint_is_kept(yard: Path, whole: Path, tmp_path: Path) -> None:
    """It is judged from it, and trained on from it as if it had never ended."""
    run = tiny_study(yard).runs()[0]
    folder = tmp_path / "run"
    shutil.copytree(whole / "runs" / run.id, folder)
    assert [p.name for p in checkpoints_of(folder / "checkpoints")] == [f"step-{8 * UPDATE:012d}"]
    config, policy = load_policy(folder)
    result = evaluate(config, policy, episodes=6, stream=1)
    last = json.loads((folder / "result.json").read_text())["last"]
    assert result is not None and result.steps.tolist() == last["steps"]
    assert Trainer.resume(folder, steps=10 * UPDATE).run()
    assert Trainer(dataclasses.replace(run.config, steps=10 * UPDATE), tmp_path / "whole").run()
    assert trained(folder) == trained(tmp_path / "whole")


@pytest.mark.parametrize("harm", ["[]", "{", '{"format": 1}'])
def test_a_damaged_checkpoint_fails_its_own_run(harm: str, yard: Path, whole: Path, tmp_path: Path) -> None:
    """The line of the run says what to do; done, and asked for again, it comes out the same."""
    folder, study = tmp_path / "study", tiny_study(yard, seeds=(0,))
    run = folder / "runs" / ids(study)[0]

    def has_two() -> bool:
        return len(checkpoints_of(run / "checkpoints")) == 2

    assert run_by_protocol(study.runs()[0].config, run, study.protocol, should_stop=has_two) is None
    newest = checkpoints_of(run / "checkpoints")[-1]
    (newest / "manifest.json").write_text(harm)
    results = run_study(study, folder, Here())
    assert statuses(results) == ["failed", "finished"]
    assert "is damaged" in results["runs"][0]["reason"] and "move it away to go on from" in results["runs"][0]["reason"]
    newest.rename(tmp_path / "away")
    assert statuses(run_study(study, folder, Here(), retry_failed=True)) == ["finished"] * 2
    assert outcome(run) == outcome(whole / "runs" / run.name)


@pytest.mark.parametrize("after", [0, 2, 9, 20, 40])
def test_a_full_disk_fails_no_run(
    after: int, yard: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is being written: one line, no run counts as failed, and with room again the study goes on."""
    folder, calls, fsync = tmp_path / "study", itertools.count(), os.fsync

    def full(handle: int) -> None:
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(_files.os, "fsync", full)
        with pytest.raises(StorageError, match=r"no space left on the disk while writing .*: free some and try again"):
            run_study(tiny_study(yard), folder, Here())
    assert not list(folder.rglob("failed.json")) and not list(folder.glob(".stop-*"))
    assert statuses(run_study(tiny_study(yard), folder, Here())) == ["finished"] * 4
    same(whole, folder, runs=4)


def test_a_file_that_the_system_refuses_to_write_fails_no_run(
    yard: Path, mood: Path, whole: Path, tmp_path: Path
) -> None:
    """A worker that really may write no more: the same."""
    mood.write_text("no room")
    pool = PoolBackend(1, tmp_path / "workers.log")
    with pytest.raises(StorageError, match=r"could not write .*: File too large"):
        run_study(tiny_study(yard), tmp_path / "study", pool)
    pool.close()
    assert not list(tmp_path.rglob("failed.json"))
    run_study(tiny_study(yard), tmp_path / "study", Here())
    same(whole, tmp_path / "study", runs=4)


def test_an_environment_that_meets_a_full_disk_fails_no_run(
    yard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a user's code raises about the disk isn't the run's fault; a file that it misses is."""
    study = tiny_study(yard, seeds=(0,), methods=("classical",))

    def raising(number: int) -> Callable[..., Any]:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise OSError(number, os.strerror(number), "mine.dat")

        return fail

    with monkeypatch.context() as patch:
        patch.setattr(kinds, "run_by_protocol", raising(errno.ENOSPC))
        with pytest.raises(StorageError, match="no space left on the disk"):
            run_study(study, tmp_path / "study", Here())
        patch.setattr(kinds, "run_by_protocol", raising(errno.ENOENT))
        results = run_study(study, tmp_path / "study", Here())
    assert results["runs"][0]["reason"] == "FileNotFoundError: [Errno 2] No such file or directory: 'mine.dat'"


def test_a_folder_that_may_not_be_written_is_one_line(yard: Path, tmp_path: Path) -> None:
    """A file stands where the folder should be."""
    (tmp_path / "study").write_text("")
    with pytest.raises(StorageError, match="could not write"):
        run_study(tiny_study(yard), tmp_path / "study", Here())


@pytest.mark.parametrize("slots", [0, -1])
def test_less_than_one_worker_is_refused(slots: int) -> None:
    """One line."""
    with pytest.raises(EchelonError, match=f"{slots} workers: it must be at least 1"):
        PoolBackend(slots)


@pytest.mark.parametrize("name", ["", "a/b", "../up", ".", "-x", "a b", "a\n"])
def test_a_method_whose_name_is_no_folders_is_refused(name: str) -> None:
    """Folders of runs are named by it."""
    with pytest.raises(EchelonError, match=r"method name .*: it must be letters, digits, - _ \. after a letter"):
        methods.register(methods.Method(name, "wrong", "nearest", "nearest"))
    assert name not in methods.methods()


# -- the commands ------------------------------------------------------------------------------


def test_another_model_makes_other_runs_only_of_methods_that_ask_one() -> None:
    """`--model` goes to those methods, over what else the study sets for them."""
    study = Study("asked", methods=("l2m2", "rule-goals"), settings={"method": {"l2m2": {"llm_share": 0.5}}})
    other = cli_studies._with_model(study, "hf:other")
    assert [r.config.model for r in other.runs()[:2]] == ["hf:other", "smollm2-135m-echelon"]
    assert other.runs()[0].config.llm_share == 0.5
    same = [a.id == b.id for a, b in zip(study.runs(), other.runs(), strict=True)]
    assert same == [False, True] * 3
    assert study.settings == {"method": {"l2m2": {"llm_share": 0.5}}}


REPRODUCE = [
    ("--sizess 3", "Unrecognized options: --sizess, 3; did you mean --sizes?"),
    ("--seeds a", "--seeds: 'a' is no whole number"),
    ("--sizes 10 1.5", "--sizes: '1.5' is no whole number"),
    ("--seeds", "seeds is empty: name at least one"),
    ("--seeds -1", "seeds is (-1,): it must be at least 0"),
    ("--seeds 0 0", "seeds lists 0 twice"),
    ("--sizes 1 --dry-run", "env.size is 1: it must be 5 to 256"),
    ("--methods qmx", "unknown method 'qmx': did you mean 'qmix'?"),
    ("--methods magrpo", "magrpo has a trainer of its own, echelon train --method magrpo: it can't be compared"),
    ("--preset pape", "unknown preset 'pape': did you mean 'paper'? known are medium, paper, quick"),
    ("--workers 0", "--workers is 0: it must be at least 1"),
    ("--workers a", "--workers: "),
    ("--steps 0", "steps is 0: it must be at least 1"),
    ("--price -1", "--price is -1.0: it must be at least 0"),
    ("--backend rayy", "invalid choice 'rayy' for argument '--backend'. Expected one of ('pool', 'ray')"),
    ("--methods classical --address auto", "--address is a Ray cluster's: give --backend ray with it"),
]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        *((["reproduce", *args.split()], line) for args, line in REPRODUCE),
        (["study", "."], "study .: Is a directory"),
        (["study", "missing.toml"], "study missing.toml: No such file or directory"),
        (["report", "missing"], "missing is no study: it has no study.toml"),
        (["report"], "STUDY"),
    ],
)
def test_a_wrong_command_is_one_line_and_writes_nothing(
    args: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is wrong and what would be right."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(args) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("echelon: ") and line in said.err
    assert not list(tmp_path.iterdir())


def test_a_study_that_is_not_done_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody stopped it, another process holds one of its runs: status 1 and a line; later the rest is done."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(work, "_BUSY_FOR", 0.0)
    monkeypatch.setattr(cli_studies, "_backend", lambda flags, folder: Here())
    study = Study(
        "held", methods=("classical",), sizes=(8,), agents=(2,), seeds=(0, 1), record=0, protocol=Protocol(9, 2, 2)
    )
    Path("held.toml").write_text(study_to_toml(study))
    with _files.only_writer(Path("studies/held/runs") / ids(study)[1] / ".job"):
        assert cli.main(["study", "held.toml"]) == 1
    said = capsys.readouterr()
    assert "1 of 2 runs are not done; the same command goes on: echelon study held.toml" in " ".join(said.err.split())
    assert Path("studies/held/report.html").exists()
    assert cli.main(["study", "held.toml"]) == 0


# -- the protocol ------------------------------------------------------------------------------

ENV = WarehouseConfig(size=8, num_agents=2, num_packages=2, limit=40)


def run_config(**changes: Any) -> RunConfig:
    """A run of 8 updates with a checkpoint after every second."""
    base = RunConfig(method="rule-goals", env=ENV, steps=8 * UPDATE, num_envs=8, threads=1,
                     checkpoint_every=2 * UPDATE)  # fmt: skip
    quick = dataclasses.replace(base.algorithm, hidden=16, rollout=8, epochs=1, minibatches=1, precision="float32")
    return dataclasses.replace(base, **{"algorithm": quick, **changes})


JUDGE = Protocol(every=3 * UPDATE, episodes=4, final_episodes=6)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run by the protocol: its folder and what was found."""
    folder = tmp_path_factory.mktemp("judged") / "run"
    found = run_by_protocol(run_config(), folder, JUDGE, record=2)
    assert found is not None
    return folder, found


def trained(folder: Path) -> dict[str, bytes]:
    """What training left."""
    last = checkpoints_of(folder / "checkpoints")[-1]
    parts = {name: (last / name).read_bytes() for name in ("worlds.safetensors", "algorithm.safetensors")}
    return {**parts, "metrics": (folder / "metrics.jsonl").read_bytes(), "step": last.name.encode()}


def test_evaluations_change_no_bit_of_the_training(judged: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """The run with evaluations is the run without."""
    assert Trainer(run_config(), tmp_path / "run").run()
    assert trained(judged[0]) == trained(tmp_path / "run")


def test_policies_are_judged_when_the_protocol_says(judged: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """At step 0, at whole rollouts after each multiple, at the end; the numbers are those of the policies there."""
    folder, found = judged
    assert [e["step"] for e in found["evaluations"]] == [0, 192, 384, 512]
    told = json.loads((folder / "protocol.json").read_text())
    assert {k: told[k] for k in ("evaluations", "best", "last")} == {
        k: found[k] for k in ("evaluations", "best", "last")
    }
    for entry in found["evaluations"]:
        until = tmp_path / str(entry["step"])
        if entry["step"]:
            Trainer(run_config(), until).run(until=entry["step"])
            policy = load_policy(until)[1]
        else:
            policy = Trainer(run_config(), until).rollouts.algorithm.state_dict(policy_only=True)
        result = evaluate(run_config(), policy, episodes=4)
        assert result is not None
        assert entry["success"] == result.success.sum() and entry["tsr"] == result.success.mean()
        assert entry["collisions"] == result.collisions.mean() and entry["task_return"] == result.task_return.mean()
        finished = result.steps[result.success]
        assert entry["steps_to_finish"] == (pytest.approx(finished.mean()) if len(finished) else None)
    # Rounded up to whole rollouts.
    odd = run_by_protocol(run_config(steps=300), tmp_path / "odd", Protocol(every=100, episodes=2, final_episodes=2))
    assert odd is not None and [e["step"] for e in odd["evaluations"]] == [0, 128, 256, 320]


def test_best_and_last_are_the_policies_that_they_say(judged: tuple[Path, dict[str, Any]]) -> None:
    """The best of the evaluations, of equals the later; each judged on worlds of the absolute metric."""
    folder, found = judged
    most = max(e["success"] for e in found["evaluations"])
    assert found["best"]["step"] == max(e["step"] for e in found["evaluations"] if e["success"] == most)
    assert found["last"]["step"] == 512
    best = safetensors.torch.load_file(folder / "best.safetensors")
    for policy, said in ((best, found["best"]), (load_policy(folder)[1], found["last"])):
        result = evaluate(run_config(), policy, episodes=6, stream=1)
        assert result is not None
        assert said["success"] == result.success.tolist() and said["steps"] == result.steps.tolist()
        assert said["collisions"] == result.collisions.tolist() and said["tsr"] == result.success.mean()
    replay = json.loads((folder / "replays" / "protocol.json").read_text())
    assert len(replay["episodes"]) == 2


def test_policies_of_all_evaluations_are_kept_on_demand(tmp_path: Path, judged: tuple[Path, dict[str, Any]]) -> None:
    found = run_by_protocol(run_config(), tmp_path, dataclasses.replace(JUDGE, keep_policies=True))
    assert found is not None and not (judged[0] / "policies").exists()
    assert found["evaluations"] == judged[1]["evaluations"]
    kept = {int(path.stem): path for path in (tmp_path / "policies").iterdir()}
    assert sorted(kept) == [e["step"] for e in found["evaluations"]]
    assert kept[found["best"]["step"]].read_bytes() == (judged[0] / "best.safetensors").read_bytes()
    assert len({path.read_bytes() for path in kept.values()}) == len(kept)
    assert "keep_policies" not in JUDGE.to_json() and Protocol(keep_policies=True).to_json()["keep_policies"] is True


@pytest.mark.parametrize("scores", [(1, 3, 3, 2), (4, 3, 3, 2), (0, 0, 0, 0), (0, 1, 2, 3)])
def test_the_best_policy_is_kept_while_training_goes_on(
    scores: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With made-up scores: the file of the best is that policy, and it is the one that is judged in the end."""
    script = iter(scores)
    policies: list[Any] = []
    real = protocol_module.evaluate

    def scripted(run: RunConfig, policy: Any, **options: Any) -> Any:
        result = real(run, policy, **options)
        assert result is not None
        if not options["stream"]:
            policies.append({k: v.clone() for k, v in policy.items()})
            success = np.arange(4) < next(script)
            return dataclasses.replace(result, success=success)
        policies.append(policy)
        return result

    monkeypatch.setattr(protocol_module, "evaluate", scripted)
    found = run_by_protocol(run_config(), tmp_path / "run", JUDGE)
    assert found is not None
    at = max(range(4), key=lambda i: (scores[i], i))
    assert found["best"]["step"] == found["evaluations"][at]["step"]
    if at == 3:
        assert found["best"] == found["last"] and len(policies) == 5  # judged once
    else:
        assert len(policies) == 6
        assert all((policies[at][k] == policies[5][k]).all() for k in policies[5])


def test_worlds_of_training_of_evaluations_and_of_the_absolute_metric_differ() -> None:
    """No world is in two of them, nor in those of another seed."""
    starts: dict[bytes, tuple[Any, ...]] = {}
    for seed in (0, 1):
        for kind, root in (("train", seed), ("judge", evaluation_seed(seed)), ("absolute", evaluation_seed(seed, 1))):
            worlds = build_worlds(run_config(), num_envs=50, seed=root, training=False)
            worlds.start()
            env = worlds.env
            for world in env.states(np.empty((50, env.state_size), np.int8)):
                assert starts.setdefault(world.tobytes(), (seed, kind)) == (seed, kind)
    assert len(starts) > 280


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_run_killed_before_it_was_judged_goes_on_the_same(
    at: int, judged: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a checkpoint and its evaluation, and between an evaluation and its file."""
    folder = tmp_path / "run"
    for place, name in (("evaluate", "evaluate"), ("save", "atomic_write_json")):
        calls = itertools.count(1)
        real = getattr(protocol_module, name)

        def dies(*args: Any, calls: Any = calls, real: Any = real, **kwargs: Any) -> Any:
            if next(calls) == at:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(protocol_module, name, dies)
            with pytest.raises(KeyboardInterrupt):
                run_by_protocol(run_config(), folder / place, JUDGE, record=2)
        found = run_by_protocol(run_config(), folder / place, JUDGE, record=2)
        assert found is not None
        assert trained(folder / place) == trained(judged[0])
        times = ("training_seconds", "steps_per_second", "evaluation_seconds")
        for part in ("best", "last"):
            for run in (found, judged[1]):
                run[part] = {k: v for k, v in run[part].items() if k not in ("seconds", "plans")}
        assert {k: v for k, v in found.items() if k not in times} == {
            k: v for k, v in judged[1].items() if k not in times
        }
        assert (folder / place / "best.safetensors").read_bytes() == (judged[0] / "best.safetensors").read_bytes()


def test_a_run_can_be_stopped_anywhere(judged: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Stopped again and again, in training and in evaluations, it is the run that never stopped."""
    stops = 0
    while True:
        # Some work more is done each time, so that it ends.
        left = itertools.count(3 + 2 * stops)
        limit = 12 + 14 * stops
        found = run_by_protocol(run_config(), tmp_path / "run", JUDGE, should_stop=lambda: next(left) > limit)  # noqa: B023
        if found is not None:
            break
        stops += 1
    assert stops >= 3
    assert trained(tmp_path / "run") == trained(judged[0])
    assert found["evaluations"] == judged[1]["evaluations"]
    assert found["last"]["success"] == judged[1]["last"]["success"]


def test_a_method_that_learns_nothing_is_judged_once(tmp_path: Path) -> None:
    """One evaluation at step 0; the best is the last; again, it is there already."""
    run = run_config(method="classical", steps=1)
    found = run_by_protocol(run, tmp_path / "run", JUDGE)
    assert found is not None and not found["learns"]
    assert [e["step"] for e in found["evaluations"]] == [0] and found["best"] == found["last"]
    assert (found["training_seconds"], found["steps_per_second"]) == (0.0, None)
    again = run_by_protocol(run, tmp_path / "run", JUDGE)
    assert again == found
    with pytest.raises(EchelonError, match="holds a run with other settings"):
        run_by_protocol(dataclasses.replace(run, seed=1), tmp_path / "run", JUDGE)


def test_another_protocol_judges_anew(judged: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """What was judged by other rules isn't mixed in."""
    run = run_config(method="classical", steps=1)
    run_by_protocol(run, tmp_path / "run", JUDGE)
    found = run_by_protocol(run, tmp_path / "run", dataclasses.replace(JUDGE, episodes=5))
    assert found is not None and [e["episodes"] for e in found["evaluations"]] == [5]


def test_a_run_goes_on_in_the_precision_that_it_began_in() -> None:
    """ "auto" depends on the processor; a run that began elsewhere is still the same run."""
    auto = dataclasses.replace(run_config().algorithm, precision="auto")
    new = run_config(algorithm=auto)
    for precision in ("float32", "bfloat16"):
        old = run_config(algorithm=dataclasses.replace(auto, precision=precision))
        assert same_run(old, new)
    assert not same_run(old, run_config())
    assert not same_run(run_config(seed=1), new)


def test_the_models_part_in_evaluations_is_not_counted_as_trainings(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls and tokens of training are those of a training without evaluations; evaluations have their own."""
    model = f"hf:{make_tiny_model(tmp_path_factory.mktemp('tiny'))}"
    # One that remembers nothing: each question costs a call, whoever asked it before.
    monkeypatch.setitem(building._models, model, CausalChoiceModel.load(model, threads=1, cache_size=0))
    run = run_config(method="l2m2", model=model, llm_share=0.25, steps=4 * UPDATE)
    assert Trainer(run, tmp_path / "plain").run()
    plain = run_costs(tmp_path / "plain")
    judge = Protocol(every=UPDATE, episodes=2, final_episodes=2)
    found = run_by_protocol(run, tmp_path / "run", judge)
    assert found is not None
    assert trained(tmp_path / "plain") == trained(tmp_path / "run")
    assert plain["training_model_calls"]
    assert found["training_model_calls"] == plain["training_model_calls"]
    assert found["training_model_tokens"] == plain["training_model_tokens"]
    assert found["last"]["plans"]["model_calls"] > 0
