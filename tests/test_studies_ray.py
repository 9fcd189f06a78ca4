"""Studies on Ray: a real cluster of two nodes on this machine gives the pool's results, whatever dies on the way."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import echelon
from echelon._files import only_writer
from echelon.checkpoints import checkpoints_of
from echelon.errors import BusyError, EchelonError
from echelon.studies import ray_backend
from echelon.studies.backends import PoolBackend
from echelon.studies.engine import Matrix, run_study
from echelon.studies.ray_backend import RayBackend
from echelon.studies.work import job_of
from studies_tools import Here, make_yard, same, tiny_study

# Not by importing it: that is for the backend to do, which keeps it quiet.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray isn't installed")
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
PATH = os.pathsep.join((str(Path(echelon.__file__).parents[1]), str(Path(__file__).parent)))


def wait_for(what: Callable[[], Any], seconds: float = 240) -> None:
    """Wait until it is so."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.05)


def ray_processes(of: str = "raylet/raylet") -> set[str]:
    """The processes whose command line has these words."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if of.encode() in command:
                found.add(folder.name)
    return found


def checkpointed(folder: Path) -> list[str]:
    """The runs of a study that have a checkpoint."""
    return [run.name for run in (folder / "runs").glob("*") if checkpoints_of(run / "checkpoints")]


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's file of environments."""
    return make_yard(tmp_path_factory.mktemp("user"))


@pytest.fixture(scope="module")
def whole(yard: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study, done by the pool without any trouble."""
    folder = tmp_path_factory.mktemp("whole")
    pool = PoolBackend(2)
    run_study(tiny_study(yard), folder, pool)
    pool.close()
    return folder


@pytest.fixture
def mood(yard: Path) -> Iterator[Path]:
    """What the environment is told to do; gone afterwards."""
    path = yard.with_name("mood")
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster of two nodes with one CPU each; at the end no process of it is left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PATH)
        ray_backend._import_ray()
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        session = Path(cluster.head_node.get_session_dir_path()).name
        try:
            cluster.add_node(**NODE)
            yield cluster
        finally:
            cluster.shutdown()
        wait_for(lambda: not ray_processes(session), 120)


@pytest.fixture(scope="module")
def backend(cluster: Any) -> Iterator[RayBackend]:
    """A connection to the cluster."""
    backend = RayBackend(cluster.address)
    yield backend
    backend.close()
    import ray

    assert not ray.is_initialized()


def test_ray_gives_the_results_of_the_pool(
    backend: RayBackend, yard: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit, with a user's own environment and method; both nodes work, and nothing is printed."""
    study = tiny_study(yard)
    assert backend.slots == 2
    most = 0

    def see(matrix: Matrix) -> None:
        nonlocal most
        most = max(most, len(matrix.running))

    results = run_study(study, tmp_path / "ray", backend, report=see)
    assert [run["status"] for run in results["runs"]] == ["finished"] * 4
    assert most == 2
    same(whole, tmp_path / "ray", runs=4)
    assert capfd.readouterr() == ("", "")


def test_a_worker_that_is_killed_takes_only_its_own_attempt(
    backend: RayBackend, yard: Path, mood: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Begun again from its checkpoint, the run comes out the same; Ray's own words stay in its logs."""
    mood.write_text("die once")
    news: list[str] = []
    run_study(tiny_study(yard), tmp_path / "study", backend, report=lambda m: news.extend(m.news))
    assert len([line for line in news if "was killed (out of memory?) or crashed; it goes on" in line]) == 1
    same(whole, tmp_path / "study", runs=4)
    time.sleep(1)  # Ray tells of it later, were it to
    assert capfd.readouterr() == ("", "")


def test_a_node_that_dies_in_the_middle_changes_no_result(
    cluster: Any, backend: RayBackend, yard: Path, mood: Path, whole: Path, tmp_path: Path
) -> None:
    """A run on each node, one node is killed: its run goes on elsewhere; a node that comes is used."""
    methods = ("my-goals",)
    mood.write_text("hold")
    news: list[str] = []
    fewest = backend.slots

    def kill_a_node(matrix: Matrix) -> None:
        nonlocal fewest
        news.extend(matrix.news)
        fewest = min(fewest, backend.slots)
        if mood.exists() and len(checkpointed(tmp_path / "study")) == 2:
            cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
            wait_for(lambda: backend.slots == 1, 120)
            mood.unlink()

    results = run_study(tiny_study(yard, methods=methods), tmp_path / "study", backend, report=kill_a_node)
    assert [run["status"] for run in results["runs"]] == ["finished"] * 2
    assert len([line for line in news if "its node of the Ray cluster died; it goes on" in line]) == 1
    assert fewest == 1
    run_study(tiny_study(yard), tmp_path / "study", backend)
    same(whole, tmp_path / "study", runs=4)
    cluster.add_node(**NODE)
    wait_for(lambda: backend.slots == 2, 120)


def start_driver(study_of: Path, folder: Path, address: str | None, said: Path) -> subprocess.Popen[bytes]:
    """A process of its own that runs the study on Ray; what it prints goes into the file `said`."""
    code = (
        "import sys; from pathlib import Path; from studies_tools import tiny_study\n"
        "from echelon.errors import EchelonError\n"
        "from echelon.studies.engine import run_study; from echelon.studies.ray_backend import RayBackend\n"
        "assert 'ray' not in sys.modules  # imported only where it is used\n"
        "backend = RayBackend(sys.argv[3] or None, 2)\n"
        "try:\n"
        "    results = run_study(tiny_study(Path(sys.argv[1])), Path(sys.argv[2]), backend)\n"
        "    print([run['status'] for run in results['runs']])\n"
        "except EchelonError as error: print(type(error).__name__, error)\n"
        "backend.close()\n"
    )
    with said.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-c", code, str(study_of), str(folder), address or ""], stdout=out, stderr=out,
            env={**os.environ, "PYTHONPATH": PATH}, start_new_session=True,
        )  # fmt: skip


def is_free(run: Path) -> bool:
    """Whether no process holds a run."""
    try:
        with only_writer(run / ".job"):
            return True
    except BusyError:
        return False


def test_a_study_that_is_killed_leaves_no_task_behind_and_goes_on(
    cluster: Any, yard: Path, mood: Path, whole: Path, tmp_path: Path
) -> None:
    """`kill -9` of the study: Ray ends its tasks, which would have held their runs for ever; then the pool goes on."""
    mood.write_text("hold")
    folder = tmp_path / "study"
    driver = start_driver(yard, folder, cluster.address, tmp_path / "said")
    wait_for(lambda: len(checkpointed(folder)) == 2)
    runs = [folder / "runs" / name for name in checkpointed(folder)]
    assert not any(is_free(run) for run in runs)
    driver.kill()
    driver.wait()
    wait_for(lambda: all(is_free(run) for run in runs), 120)
    mood.unlink()
    run_study(tiny_study(yard), folder, Here())
    same(whole, folder, runs=4)


def test_without_a_cluster_ray_is_started_here_and_ended(yard: Path, whole: Path, tmp_path: Path) -> None:
    """The study alone is printed, and no Ray is left when it is done."""
    before = ray_processes()
    driver = start_driver(yard, tmp_path / "study", None, tmp_path / "said")
    wait_for(lambda: driver.poll() is not None or ray_processes() - before)
    assert driver.wait(240) == 0
    assert (tmp_path / "said").read_text() == f"{['finished'] * 4}\n"
    same(whole, tmp_path / "study", runs=4)
    wait_for(lambda: not ray_processes() - before, 120)


def test_a_node_must_see_the_folder_and_have_the_same_echelon(
    backend: RayBackend, yard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that says what is missing where; no run is begun or counts as failed."""
    study = tiny_study(yard)
    run = study.runs()[1]
    job = job_of(study, run, tmp_path, tmp_path / "stop")

    def outcome(job: dict[str, Any]) -> dict[str, Any]:
        backend.start(job)
        while not (ended := backend.wait(1)):
            pass
        assert ended[0][0] == run.id and not list(tmp_path.glob("runs/*/*.json"))
        return ended[0][1]

    said = outcome(job)
    assert said["status"] == "storage"
    assert said["reason"].startswith(f"node {socket.gethostname()} can't see {tmp_path / 'study.toml'}: ")
    (tmp_path / "study.toml").touch()
    said = outcome({**job, "imports": [str(tmp_path / "mine.py")]})
    assert said["status"] == "storage" and "mine.py: the study's folder must be on a file system" in said["reason"]
    with monkeypatch.context() as patch:
        patch.setattr(ray_backend.echelon, "__version__", "0.0.1")
        said = outcome(job)
        assert said["status"] == "storage"
        assert f"has Echelon {echelon.__version__}" not in said["reason"] and "runs with 0.0.1" in said["reason"]
    with monkeypatch.context() as patch:
        patch.setattr(ray_backend, "_holds", lambda folder, name: False)
        backend.start(job)
        while not (ended := backend.wait(1)):
            pass
        assert ended[0][1]["status"] == "storage" and "its result isn't in" in ended[0][1]["reason"]


def test_addresses_where_no_cluster_is_get_one_line_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, silent, unknown or no address at all: Ray itself would wait for minutes."""
    monkeypatch.setattr(ray_backend, "_ANSWER_WITHIN", 0.5)
    ray = ray_backend._import_ray()
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        for address in (f"127.0.0.1:{port}", "no-such-host.invalid:6379", "127.0.0.1:99999"):
            with pytest.raises(EchelonError, match=f"no Ray cluster answers at {address}: give the host:port"):
                RayBackend(address)
        silent.listen()
        with pytest.raises(EchelonError, match="no Ray cluster answers"):
            RayBackend(f"127.0.0.1:{port}")
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        with pytest.raises(EchelonError, match=f"no Ray cluster answers at 127.0.0.1:{port}"):
            RayBackend("auto")
    for address in ("nonsense", "ray://127.0.0.1:10001", "127.0.0.1:", ""):
        with pytest.raises(EchelonError, match=f"Ray address '{address}': it must be auto, local or the host:port"):
            RayBackend(address)
    with pytest.raises(EchelonError, match="0 workers: it must be at least 1"):
        RayBackend(None, 0)


def test_a_head_that_goes_between_its_answer_and_a_question_is_gone_soon() -> None:
    """Asked of a head that isn't there, Ray waits a minute and then ends the process without a word of ours."""
    before = ray_processes()
    code = (
        "import os, signal\n"
        "from echelon.errors import StorageError\n"
        "from echelon.studies import ray_backend\n"
        "from test_studies_ray import ray_processes\n"
        "ray_backend._GONE_AFTER = 3\n"
        "before = ray_processes('gcs/gcs_server')\n"
        "backend = ray_backend.RayBackend(None, 1)\n"
        "asked = backend._ray.cluster_resources\n"
        "def late():\n"
        "    for head in ray_processes('gcs/gcs_server') - before: os.kill(int(head), signal.SIGKILL)\n"
        "    while ray_backend._answers(backend._head): pass\n"
        "    return asked()\n"
        "assert backend.slots == 1\n"
        "backend._ray.cluster_resources, backend._look_at = late, 0\n"
        "try: backend.slots\n"
        "except StorageError as error: print('gone' if str(error) == backend._gone() else error)\n"
        "backend.close()\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": PATH},
        timeout=240, check=False,
    )  # fmt: skip
    assert (out.returncode, out.stdout, out.stderr) == (0, "gone\n", "")
    wait_for(lambda: not ray_processes() - before, 120)


def test_without_ray_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """No traceback of an import."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EchelonError, match=r"needs Ray: pip install 'echelon-marl\[ray\]'"):
        RayBackend()


def test_a_cluster_that_goes_away_is_one_line_and_fails_no_run(
    cluster: Any, backend: RayBackend, yard: Path, mood: Path, whole: Path, tmp_path: Path
) -> None:
    """The whole cluster is stopped under a study: it says so and ends; the pool finishes it. (The last test.)"""
    mood.write_text("hold")
    folder = tmp_path / "study"
    driver = start_driver(yard, folder, cluster.address, tmp_path / "said")
    wait_for(lambda: len(checkpointed(folder)) == 2)
    address = cluster.address
    backend.close()
    cluster.shutdown()
    driver.wait(240)
    line = f"StorageError the Ray cluster at {address} is gone: start it and the study again\n"
    assert (tmp_path / "said").read_text() == line
    assert not list(folder.glob("runs/*/failed.json"))
    mood.unlink()
    run_study(tiny_study(yard), folder, Here())
    same(whole, folder, runs=4)
