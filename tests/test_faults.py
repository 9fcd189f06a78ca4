"""What must never stop a run: replies of every wrong kind, servers of every bad kind, a full disk, kill -9, Ctrl-C."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import echelon  # noqa: E402
import fault_storm  # noqa: E402
from echelon.algorithms import MAPPOConfig  # noqa: E402
from echelon.checkpoints import checkpoints_of, load_checkpoint  # noqa: E402
from echelon.configs import PlanningConfig, RunConfig  # noqa: E402
from echelon.envs import WarehouseConfig, make  # noqa: E402
from echelon.llm.server import ServerConfig, ServerModel, hurry  # noqa: E402
from echelon.llm.text import TextPrompt, TextReply  # noqa: E402
from echelon.pending import PendingPlans  # noqa: E402
from echelon.planners.generating import GeneratingPlanner  # noqa: E402
from echelon.planners.nearest import Nearest  # noqa: E402
from echelon.planners.plan_cache import PlanCache  # noqa: E402
from echelon.rollout import TeamWorlds  # noqa: E402
from echelon.subgoals import FEATURES, SubgoalConfig  # noqa: E402
from echelon.training import Progress, Trainer  # noqa: E402
from misbehaving_server import FAULTS, Fault, MisbehavingServer, completion, http  # noqa: E402
from test_pending import drive, sound  # noqa: E402

ENV = WarehouseConfig(size=8, num_agents=3, num_packages=4, num_zones=1, limit=40)
BESIDE = {
    "wait": PlanningConfig(),
    "lag": PlanningConfig(timing="lag", lag=2, rounds=2),
    "free": PlanningConfig(timing="free", rounds=2),
}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echelon.llm.server._FIRST_WAIT", 0.01)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def run_config(url: str, **more: Any) -> RunConfig:
    """A short run whose model is behind a server."""
    server = {"url": url, "timeout": 5.0, "attempts": 2, "breaker_failures": 3, "breaker_seconds": 600.0}
    server |= more.pop("server", {})
    base: dict[str, Any] = {
        "method": "l2m2", "model": "openai:test", "llm_share": 1.0, "env": ENV, "num_envs": 4, "steps": 256,
        "threads": 1, "checkpoint_every": 64, "algorithm": MAPPOConfig(rollout=8, hidden=16),
    }  # fmt: skip
    return RunConfig(**{**base, **more}, server=ServerConfig(**server))


def scripted(request: dict[str, Any]) -> Fault | str:
    """What a model says that is a function of its prompt: often a good plan, else one of any wrong kind."""
    messages = request["json"]["messages"]
    rng = random.Random("".join(str(m["content"]) for m in messages))
    question = fault_storm.question_in(request, rng)
    made = None
    if rng.random() < 0.4:
        made = fault_storm.KINDS[rng.choice(sorted(fault_storm.KINDS))](question)
    return (made or fault_storm.plan(question.entries()))[0]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def total(folder: Path, name: str) -> int:
    return sum(line[name] for line in metrics(folder))


# -- a storm in small ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timing", BESIDE)
def test_every_fault_is_counted_and_nothing_illegal_is_executed(timing: str, tmp_path: Path) -> None:
    """Every kind of faulty reply and server fault in a training run that is stopped and resumed."""
    weather = fault_storm.Weather(every=60, length=20, share=0.8, deaths=(150,), dead=0.3, huge=150)
    run = fault_storm.storm(
        tmp_path, weather, replies=330, faults=90, apart=False, num_envs=48, planning=BESIDE[timing],
        timeout=0.5, attempts=2, breaker_seconds=0.1,
    )  # fmt: skip
    assert run["crashes"] == [] and run["illegal"] == [] and run["disagreements"] == []
    assert run["metrics are finite"] and run["updates"] * run["steps of an update"] == run["steps"] == run["checkpoint"]
    assert run["stopped and resumed at"][0] < run["steps"]
    assert run["breaker opened"] > 0 and run["subgoals looked at"] >= 3 * run["steps"]
    kinds = run["by kind"]
    # The last cards of a deck may not have been dealt, and some kinds fit few questions.
    assert len(kinds["faulty replies"]) >= len(fault_storm.FAULTY_KINDS) - 3
    assert len(kinds["server faults"]) >= len(fault_storm.SERVER_FAULTS) - 3
    assert (run["by the fallback"] > 0) == (timing == "wait") and len(kinds["counters"]) > 30


def test_each_kind_of_faulty_reply_is_one() -> None:
    """Whatever the question, something must be counted for it; a good reply has nothing."""
    rng = random.Random(0)
    for case in range(200):
        robots = sorted(rng.sample(range(3), 1 + case % 3))
        words = [f"fetch package {n}" for n in range(5)]
        question = fault_storm.Question({a: rng.sample(words, rng.randrange(2, 6)) for a in robots}, rng)
        for name, kind in fault_storm.KINDS.items():
            if (made := kind(question)) is not None:
                counts = {k for k, n in made[1].items() if n and k not in ("model_waits", "model_cells")}
                assert counts, name
    assert not set(fault_storm.FAULTY_KINDS) & set(fault_storm.SERVER_FAULTS)
    assert set(fault_storm.SERVER_FAULTS) <= set(FAULTS)


def test_illegal_subgoals_are_seen(tmp_path: Path) -> None:
    """The look from outside finds whatever the library would have let through."""
    config = fault_storm.run_config("http://127.0.0.1:9/v1", tmp_path, steps=1)
    env = make("warehouse", config.env, num_envs=1, seed=0, extra_features=FEATURES)
    worlds = TeamWorlds(env, [(Nearest(), np.ones(1, bool))], SubgoalConfig(), gamma=0.99, seed=0)
    worlds.start()
    tracker = worlds.tracker
    assert tracker is not None
    fine = fault_storm.Watch()
    fault_storm.look(worlds, fine)
    assert fine.illegal == [] and fine.subgoals == 3
    good = tracker.kind.copy(), tracker.cell.copy(), tracker.task.copy()
    fetch, cell, wait = 4, 1, 0
    assert (good[0] == fetch).all()
    other = int(good[2][0, 1])
    for kind, where, task in (
        (cell, env.cell_index(2, 1), -1),  # a wall
        (cell, env.cell_index(1, 9), -1),  # the sealed room
        (cell, 0, -1),  # beside the map
        (cell, 10**6, -1),
        (cell, int(env.pos[0, 0]), 2),  # a cell for a package
        (wait, int(good[1][0, 0]), -1),  # a wait elsewhere
        (fetch, int(good[1][0, 1]), other),  # the other's package
        (fetch, int(env.pos[0, 0]), int(good[2][0, 0])),  # not where it lies
        (fetch, int(good[1][0, 0]), 77),
        (5, int(env.task_goal[0, 0]), 0),  # to deliver what it doesn't carry
        (2, int(env.pos[0, 0]), -1),
        (-1, int(env.pos[0, 0]), -1),
    ):
        tracker.kind[0, 0], tracker.cell[0, 0], tracker.task[0, 0] = kind, where, task
        seen = fault_storm.Watch()
        fault_storm.look(worlds, seen)
        assert len(seen.illegal) == 1, (kind, where, task)
        tracker.kind[:], tracker.cell[:], tracker.task[:] = good


# -- servers that go and don't come back ---------------------------------------------------------------------------


@pytest.mark.parametrize("timing", BESIDE)
def test_a_server_that_dies_for_good_costs_its_plans_only(timing: str, tmp_path: Path) -> None:
    with MisbehavingServer(scripted) as server:

        def report(progress: Progress) -> None:
            if progress.step == 96:
                server.kill()

        trainer = Trainer(run_config(server.url, planning=BESIDE[timing]), tmp_path / "run")
        assert trainer.run(report), "the run goes on to its end"
        model = trainer.worlds.planners[0][0].model  # type: ignore[attr-defined]
    state = model.state_dict()
    assert state["fault_connect"] + state["fault_dropped"] > 0
    assert state["breaker_opened"] == 1 and state["breaker_refused"] > 0
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(32, 257, 32))
    after = lines[4:]
    assert all(line["subgoals_given"] > 0 for line in after)
    if timing == "wait":
        assert sum(line["subgoals_fallback"] for line in after) > 0
    else:
        assert (
            sum(line["subgoals_late"] for line in after[1:]) == 0 < sum(line["subgoals_provisional"] for line in after)
        )
    # And it can be resumed, though nobody listens.
    assert Trainer.resume(tmp_path / "run", steps=320).run()
    assert load_checkpoint(checkpoints_of(tmp_path / "run/checkpoints")[-1]).progress["step"] == 320


def test_a_server_that_answers_after_a_minute_is_not_waited_for(tmp_path: Path) -> None:
    with MisbehavingServer(lambda request: "late") as server:
        trainer = Trainer(run_config(server.url, server={"timeout": 0.1}), tmp_path / "run")
        assert trainer.run()
        state = trainer.worlds.planners[0][0].model.state_dict()  # type: ignore[attr-defined]
        assert server.counts.keys() == {"late"} and server.counts["late"] == state["calls"]
    # Each that was sent ran out of time; from then on the breaker spared the run the waiting.
    assert state["fault_timeout"] == state["calls"] and state["breaker_opened"] == 1
    assert state["failures"] == state["prompts"] > state["calls"]
    run = tmp_path / "run"
    assert total(run, "rejected_form") == 3 * total(run, "subgoals_fallback") > 0


# -- a full disk ---------------------------------------------------------------------------------------------------


def test_a_full_disk_under_the_plan_cache_changes_nothing_but_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system refuses to let the cache's file grow: it is told once, and the cache goes on in memory."""
    write, limits, tried = PlanCache._write, resource.getrlimit(resource.RLIMIT_FSIZE), []

    def in_little_room(self: PlanCache, *args: Any) -> None:
        tried.append(self.trouble)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
        try:
            write(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr("echelon.planners.plan_cache._WRITE", 16)
    notes: dict[str, list[str]] = {"full": [], "free": []}
    reports: dict[str, dict[str, Any]] = {}
    small = WarehouseConfig(size=6, layout="open", num_agents=1, num_packages=2, num_zones=1, limit=20)
    with MisbehavingServer(scripted) as server:
        for name, told in notes.items():
            monkeypatch.setattr(PlanCache, "_write", in_little_room if name == "full" else write)
            planning = PlanningConfig(cache=str(tmp_path / f"{name}.sqlite"), memory=0)
            trainer = Trainer(run_config(server.url, planning=planning, steps=768, env=small), tmp_path / name)
            assert trainer.run(lambda progress, told=told: told.extend(progress.notes))  # type: ignore[misc]
            reports[name] = trainer.worlds.planners[0][0].cache.cache.report()  # type: ignore[attr-defined]
    assert set(tried) == {None}, "and is not tried again"
    assert set(notes["full"]) == {notes["full"][0]} and notes["free"] == []
    assert notes["full"][0].startswith(f"the plan cache {tmp_path / 'full.sqlite'} is ")

    def plain(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if not k.startswith("model_cache")} for line in lines]

    assert plain(metrics(tmp_path / "full")) == plain(metrics(tmp_path / "free"))
    assert reports["full"]["hits"] > 0 and (reports["full"]["faults"], reports["free"]["faults"]) == (1, 0)


# -- kill -9 and Ctrl-C --------------------------------------------------------------------------------------------

DIES = """
import os, signal, sys
from pathlib import Path
from echelon.pending import PendingPlans
from echelon.training import Trainer
ask, left = PendingPlans.ask, [int(sys.argv[2])]
def deadly(self, asking, tick):
    ask(self, asking, tick)
    left[0] -= 1
    if left[0] == 0:
        assert self.waits.max() >= 0
        os.kill(os.getpid(), signal.SIGKILL)
PendingPlans.ask = deadly
Trainer.resume(Path(sys.argv[1])).run()
"""


def surroundings() -> dict[str, str]:
    own = {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": str(Path(echelon.__file__).parents[1])}
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | own


def test_kill_9_while_plans_are_pending_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed, the run is the one that never stopped."""
    ask, asked = PendingPlans.ask, []
    monkeypatch.setattr(PendingPlans, "ask", lambda self, *rest: (asked.append(rest), ask(self, *rest))[1])
    with MisbehavingServer(scripted) as server:
        config = run_config(server.url, planning=BESIDE["lag"])
        assert Trainer(config, tmp_path / "whole").run()
        dies = len(asked) * 2 // 3
        Trainer(config, tmp_path / "run")
        command = [sys.executable, "-c", DIES, str(tmp_path / "run"), str(dies)]
        child = subprocess.run(command, env=surroundings(), capture_output=True, text=True, timeout=240, check=False)
        assert child.returncode == -signal.SIGKILL, child.stderr
        saved = [p.name for p in checkpoints_of(tmp_path / "run/checkpoints")]
        assert saved and saved[-1] != "step-000000000256", "it died in the middle"
        assert Trainer.resume(tmp_path / "run").run()
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "run/metrics.jsonl").read_bytes()
    one, two = (load_checkpoint(checkpoints_of(tmp_path / n / "checkpoints")[-1]) for n in ("whole", "run"))
    for name, array in one.worlds.items():
        np.testing.assert_array_equal(array, two.worlds[name], err_msg=name)
    assert total(tmp_path / "run", "subgoals_late") > 0 and total(tmp_path / "run", "rejected_form") > 0


def test_ctrl_c_while_the_server_hangs(tmp_path: Path) -> None:
    """A run ends soon, with a checkpoint, though its server never answers again and might be waited for for hours."""
    hangs: set[str] = set()

    def behave(request: dict[str, Any]) -> Fault | str:
        # The name of the model is that of the timing: it hangs for good once its run has a checkpoint.
        timing = request["json"]["model"]
        if checkpoints_of(tmp_path / timing / "checkpoints"):
            hangs.add(timing)
        return Fault("late", seconds=600.0) if timing in hangs else scripted(request)

    with MisbehavingServer(behave) as server:
        server.models = list(BESIDE)
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "echelon", "train", "--method", "l2m2", "--model", f"openai:{timing}",
                 "--llm-share", "1", "--env.size", "8", "--env.num-agents", "3", "--env.num-packages", "4",
                 "--num-envs", "4", "--threads", "1", "--steps", "1000000", "--algorithm.rollout", "8",
                 "--checkpoint-every", "64", "--planning.timing", timing, "--server.url", server.url,
                 "--server.timeout", "900", "--out", str(tmp_path / timing)],
                env=surroundings(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for timing in BESIDE
        ]  # fmt: skip
        end = time.monotonic() + 240
        while len(hangs) < len(BESIDE) and time.monotonic() < end:
            time.sleep(0.01)
        assert hangs == set(BESIDE)
        for process in processes:
            process.send_signal(signal.SIGINT)
        told = [process.communicate(timeout=240)[1] for process in processes]
    for timing, process, err in zip(BESIDE, processes, told, strict=True):
        assert process.returncode == 130, err
        assert "Traceback" not in err and "stopped at step" in err, err
        step = load_checkpoint(checkpoints_of(tmp_path / timing / "checkpoints")[-1]).progress["step"]
        assert metrics(tmp_path / timing)[-1]["step"] == step >= 64


def test_in_a_hurry_nobody_waits_for_a_server_that_hangs() -> None:
    with MisbehavingServer(lambda request: "late") as server:
        model = ServerModel("test", ServerConfig(url=server.url, timeout=900.0, breaker_failures=5, key_variable=""))
        replies: list[TextReply] = []
        asking = threading.Thread(target=lambda: replies.extend(model.generate([TextPrompt("", "x")] * 20)))
        asking.start()
        while server.requests < 16:  # the others wait for their turn
            time.sleep(0.01)
        hurry(0.05)
        asking.join(60)
        hurry(None)
        assert len(replies) == 20 and {reply.error.partition(": ")[2] for reply in replies if reply.error} == {
            "given up: the run is to stop"
        }
        # Those that were under way; no other was sent.
        assert server.requests == model.state_dict()["fault_timeout"] == 16
        server.behave = lambda request: Fault("late", seconds=0.2, text="there")
        assert model.generate([TextPrompt("", "x")])[0].text == "there", "waited for again; the breaker is closed"
        model.close()
        hurry(0.05)
        hurry(None)


# -- random bytes through the whole chain --------------------------------------------------------------------------

_JSON: Any = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-3, 12), st.integers(), st.floats(), st.text(max_size=12),
        st.sampled_from(["plan", "robot", "option", "cell", "goal", "\x1b[2J", "\u202e", "NaN", "0"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["plan", "robot", "option", "cell", "goal", "why", "choices", ""]), inner),
    ),
    max_leaves=12,
)  # fmt: skip
_ENTRY = st.fixed_dictionaries(
    {"robot": st.one_of(st.integers(-1, 4), _JSON)},
    optional={
        "option": st.one_of(st.integers(-1, 6), _JSON),
        "cell": st.one_of(st.lists(st.integers(-2, 12), min_size=2, max_size=2), _JSON),
        "why": _JSON,
    },
)
_PLAN = st.builds(lambda entries: json.dumps({"plan": entries}), st.lists(_ENTRY, max_size=4))


@st.composite
def spoilt(draw: st.DrawFn) -> str:
    """A plan in which some characters were replaced, cut out or put in."""
    text = draw(_PLAN)
    for _ in range(draw(st.integers(0, 3))):
        at, gone = draw(st.integers(0, len(text))), draw(st.integers(0, 5))
        text = text[:at] + draw(st.text(max_size=4)) + text[at + gone :]
    return text


_TEXT = st.one_of(_PLAN, spoilt(), st.text(max_size=80), st.binary(max_size=80).map(lambda b: b.decode("latin-1")),
                  _JSON.map(json.dumps))  # fmt: skip
_REPLY = st.one_of(
    _TEXT.map(lambda text: Fault("data", data=json.dumps(completion(text)).encode())),
    _JSON.map(lambda value: Fault("data", data=json.dumps(completion(value)).encode())),
    _JSON.map(lambda value: Fault("data", data=json.dumps(value).encode())),
    st.binary(max_size=200).map(lambda body: Fault("data", data=body)),
    st.builds(
        lambda text, at: Fault("data", data=json.dumps(completion(text)).encode()[:at]), _TEXT, st.integers(0, 200)
    ),
    st.binary(max_size=120).map(lambda whole: Fault("raw", data=whole)),
    st.builds(
        lambda body, status, kind: Fault("raw", data=http(body, status, {"Content-Encoding": kind})),
        st.binary(max_size=80), st.sampled_from([200, 204, 301, 400, 404, 429, 500, 599]),
        st.sampled_from(["identity", "gzip", "deflate", "br", "x"]),
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def chain() -> Iterator[Callable[[list[Fault], str, int | None], TeamWorlds]]:
    """Worlds whose planner's model gets these replies, one after the other."""
    replies: list[Fault] = []
    with MisbehavingServer(lambda request: replies[request["n"] % len(replies)]) as server:
        config = ServerConfig(
            url=server.url, timeout=2.0, attempts=1, breaker_failures=0, key_variable="", max_reply_bytes=10_000
        )
        model = ServerModel("test", config)

        def worlds_of(told: list[Fault], ask: str, lag: int | None) -> TeamWorlds:
            replies[:] = told
            env = make("warehouse", ENV, num_envs=2, seed=len(told), extra_features=FEATURES)
            planner = GeneratingPlanner(model, ask=ask, reflect=ask == "agent")  # type: ignore[arg-type]
            return TeamWorlds(
                env, [(planner, np.ones(2, bool))], SubgoalConfig(every=2), gamma=0.99, seed=0,
                on_plan=lambda trace: json.dumps(vars(trace), allow_nan=False), beside=lag is not None, lag=lag,
            )  # fmt: skip

        yield worlds_of
        assert not server.errors
        model.close()


@settings(max_examples=90)
@given(
    told=st.lists(_REPLY, min_size=1, max_size=6), ask=st.sampled_from(["team", "agent"]),
    lag=st.sampled_from([None, None, 1]),
)  # fmt: skip
def test_whatever_bytes_a_server_sends_only_legal_subgoals_are_executed(
    chain: Callable[[list[Fault], str, int | None], TeamWorlds], told: list[Fault], ask: str, lag: int | None
) -> None:
    """Body, model, planner, worlds: nothing is raised, all is legal, and who got no usable answer is counted."""
    worlds = chain(told, ask, lag)
    worlds.start()
    sound(worlds)
    drive(worlds, 4)
    worlds.finish_plans()
    sound(worlds)
    worlds.close()
    planner: Any = worlds.planners[0][0]
    tracker = worlds.tracker
    assert tracker is not None
    asked, counts = planner.counters(), tracker.counts
    assert asked["failures"] <= asked["questions"] + asked["reflections"]
    if lag is None:
        assert sum(counts.rejected.values()) == counts.retried + counts.fallback
    else:
        assert counts.provisional == asked["asked"] == counts.late + counts.late_refused + counts.late_outdated
    assert counts.fallback <= counts.given
    # What it remembers is fit for a checkpoint.
    json.dumps(planner.state_dict(), allow_nan=False)


# -- what the documents say ----------------------------------------------------------------------------------------


def test_the_table_of_the_storm_is_made_of_its_result() -> None:
    result = json.loads((ROOT / "docs/results/faults.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs/results/faults.md").read_text(encoding="utf-8")
    assert fault_storm.table(result) in text
    assert f"`{result['command']}`" in text
    run = result["run"]
    assert run["crashes"] == [] and run["illegal"] == [] and run["disagreements"] == []
    assert run["faulty replies"] >= 100_000 and run["server faults"] >= 1000 and run["breaker opened"] > 0
