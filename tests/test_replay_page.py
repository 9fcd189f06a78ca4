"""The replay page: what may go in, that hostile text stays text, and the page itself in a real browser."""

from __future__ import annotations

import gzip
import json
import random
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import complaints, emulate, open_page, requests
from echelon.errors import EchelonError
from echelon.reports.replay import Replay, load_replay, parse_replay, render_replay, write_replay

pytest_plugins = ("browser",)

Cell = tuple[int, int]
Document = dict[str, Any]

# ---------------------------------------------------------------- sample replays


def _warehouse_map(size: int) -> list[str]:
    """A walled hall with blocks of shelves and a free cross aisle every few rows."""
    rows = []
    for r in range(size):
        row = ""
        for c in range(size):
            edge = r in (0, size - 1) or c in (0, size - 1)
            shelf = 3 <= r < size - 5 and 2 <= c < size - 2 and r % 4 in (3, 0) and c % 5 not in (1, 2)
            row += "#" if edge or shelf else "."
        rows.append(row)
    return rows


def _towards(walls: list[str], start: Cell, goal: Cell, blocked: set[Cell]) -> Cell:
    """The first cell of a shortest way from `start` to `goal` that avoids `blocked`; `start` if none."""
    before: dict[Cell, Cell] = {start: start}
    queue = deque([start])
    while queue:
        r, c = cell = queue.popleft()
        if cell == goal:
            while before[cell] != start:
                cell = before[cell]
            return cell
        for near in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
            if walls[near[0]][near[1]] == "." and near not in before and near not in blocked:
                before[near] = cell
                queue.append(near)
    return start


def _warehouse_episode(size: int, num_agents: int, num_packages: int, limit: int, seed: int, world: int) -> Document:
    """Agents that fetch packages and bring them to a depot, with a pretended planner and its record."""
    rng = random.Random(seed * 1000 + world)
    walls = _warehouse_map(size)
    free = [(r, c) for r in range(size - 4) for c in range(size) if walls[r][c] == "."]
    depot = [(size - 3 + k // (size // 2 - 2), 2 + k % (size // 2 - 2)) for k in range(2 * (size // 2 - 2))]
    dock = [(r, size - 3 - k) for r in (size - 3, size - 2) for k in range(min(4, num_agents))]
    packages = rng.sample(free, num_packages)
    goals = [depot[k % len(depot)] for k in range(num_packages)]
    status = ["waiting"] * num_packages
    agents: list[Cell] = (dock * num_agents)[:num_agents] if num_agents <= 8 else rng.sample(free, num_agents)
    carrying = [-1] * num_agents
    subgoals: list[Document | None] = [None] * num_agents
    taken: set[int] = set()
    frames: list[Document] = []
    plans: list[Document] = []

    def plan(step: int) -> None:
        idle = [a for a in range(num_agents) if subgoals[a] is None and len(taken) < num_packages]
        choices = []
        for a in idle:
            left = sorted(
                (k for k in range(num_packages) if k not in taken),
                key=lambda k: abs(packages[k][0] - agents[a][0]) + abs(packages[k][1] - agents[a][1]),
            )[:4]
            if not left:
                break
            odds = sorted((rng.random() ** 2 for _ in left), reverse=True)
            roll = rng.random()
            chosen = 0 if roll < 0.75 else min(1, len(left) - 1)
            verdict = "accepted" if roll < 0.8 else "fallback" if roll < 0.93 else "rejected"
            reason = {
                "accepted": None,
                "fallback": "The reply named no option; the nearest free package was assigned.",
                "rejected": "Package is behind a blocked aisle: no way found within the deadline.",
            }[verdict]
            choices.append(
                {
                    "agent": a,
                    "options": [
                        {
                            "text": f"fetch package {k} at {packages[k][0]}, {packages[k][1]}",
                            "probability": p / sum(odds),
                        }
                        for k, p in zip(left, odds, strict=True)
                    ],
                    "chosen": chosen,
                    "verdict": verdict,
                    "reason": reason,
                }
            )
            if verdict != "rejected":
                k = left[chosen]
                taken.add(k)
                subgoals[a] = {"kind": "fetch", "target": list(packages[k]), "task": k, "text": f"fetch package {k}"}
        if choices:
            named = [c["agent"] for c in choices]
            plans.append(
                {
                    "step": step,
                    "planner": "SmolLM2-360M-Instruct",
                    "agents": named,
                    "prompt": f"You lead {num_agents} robots in a {size}×{size} warehouse. Step {step} of {limit}.\n"
                    + "\n".join(f"Robot {a} is at {agents[a]} and carries nothing." for a in named)
                    + "\nAnswer with one letter for each robot.",
                    "reply": "\n".join(f"Robot {c['agent']}: {'ABCD'[c['chosen']]}" for c in choices),
                    "choices": choices,
                    "latency_ms": round(rng.uniform(180, 1900), 1),
                }
            )

    for step in range(limit + 1):
        events: list[str] = []
        collisions = 0
        if step:
            for a in range(num_agents):
                subgoal = subgoals[a]
                if subgoal is None:
                    continue
                target = tuple(subgoal["target"])
                others = {agents[b] for b in range(num_agents) if b != a}
                near = {cell for cell in others if abs(cell[0] - agents[a][0]) + abs(cell[1] - agents[a][1]) == 1}
                next_cell = _towards(walls, agents[a], target, near - {target})
                if next_cell in others:
                    collisions += rng.random() < 0.5
                elif rng.random() < 0.97:
                    agents[a] = next_cell
                if agents[a] != target:
                    continue
                k = subgoal["task"]
                if subgoal["kind"] == "fetch":
                    carrying[a], status[k] = k, "carried"
                    subgoals[a] = {
                        "kind": "deliver",
                        "target": list(goals[k]),
                        "task": k,
                        "text": f"bring package {k} to the depot",
                    }
                    events.append(f"agent {a} picked up package {k}")
                else:
                    carrying[a], status[k], subgoals[a] = -1, "delivered", None
                    events.append(f"agent {a} delivered package {k}")
        if step % 5 == 0:
            plan(step)
        frames.append(
            {
                "agents": [list(cell) for cell in agents],
                "carrying": list(carrying),
                "status": list(status),
                "subgoals": list(subgoals),
                "collisions": collisions,
                "events": events,
            }
        )
        if all(word == "delivered" for word in status):
            break
    return {
        "world": world,
        "success": all(word == "delivered" for word in status),
        "steps": len(frames) - 1,
        "walls": walls,
        "zones": [
            {"id": 0, "label": "Depot", "cells": [list(cell) for cell in depot]},
            {"id": 1, "label": "Dock", "cells": [list(cell) for cell in dock]},
        ],
        "tasks": [
            {"id": k, "kind": "package", "label": f"package {k}", "cell": list(packages[k]), "goal": list(goals[k])}
            for k in range(num_packages)
        ],
        "frames": frames,
        "plans": plans,
    }


def warehouse(
    size: int = 20, num_agents: int = 4, num_packages: int = 8, limit: int = 200, seed: int = 3, episodes: int = 3
) -> Document:
    return {
        "format": "echelon-replay",
        "version": 1,
        "title": "Four robots clear a warehouse" if num_agents == 4 else f"{num_agents} robots clear a warehouse",
        "env": "warehouse",
        "method": "l2m2",
        "planner": "SmolLM2-360M-Instruct",
        "seed": seed,
        "height": size,
        "width": size,
        "num_agents": num_agents,
        "limit": limit,
        "episodes": [_warehouse_episode(size, num_agents, num_packages, limit, seed, w) for w in range(episodes)],
    }


def wanderers(size: int, num_agents: int, steps: int, seed: int = 0) -> Document:
    """A large search without plans: random walkers, hidden targets, and a map that they uncover."""
    rng = random.Random(seed)
    wall = [[rng.random() < 0.06 or r in (0, size - 1) or c in (0, size - 1) for c in range(size)] for r in range(size)]
    for k in range(max(1, size // 16)):  # long walls with doors
        for j in range(size):
            if j % 23:
                wall[(k + 1) * 15 % size][j] = wall[(k + 1) * 15 % size][j] or k % 2 == 0
                wall[j][(k + 1) * 15 % size] = wall[j][(k + 1) * 15 % size] or k % 2 == 1
    free = [(r, c) for r in range(size) for c in range(size) if not wall[r][c]]
    agents, targets = rng.sample(free, num_agents), rng.sample(free, 12)
    headings = [rng.choice(((0, 1), (1, 0), (0, -1), (-1, 0))) for _ in agents]
    seen = bytearray(size * size)
    status = ["hidden"] * len(targets)
    frames: list[Document] = []
    for step in range(steps + 1):
        events = []
        for a, (r, c) in enumerate(agents):
            if step:
                dr, dc = headings[a]
                if wall[r + dr][c + dc] or rng.random() < 0.05:
                    headings[a] = rng.choice(((0, 1), (1, 0), (0, -1), (-1, 0)))
                else:
                    agents[a] = (r + dr, c + dc)
            r, c = agents[a]
            for i in range(max(0, r - 4), min(size, r + 5)):
                low, high = max(0, c - 4), min(size, c + 5)
                seen[i * size + low : i * size + high] = b"\1" * (high - low)
        for k, (r, c) in enumerate(targets):
            if status[k] == "hidden" and seen[r * size + c]:
                status[k] = "found"
                events.append(f"target {k} found")
        frames.append(
            {"agents": [list(x) for x in agents], "status": list(status), "events": events, "seen": _runs(seen)}
        )
    episode = {
        "success": False,
        "steps": steps,
        "walls": ["".join("#" if x else "." for x in row) for row in wall],
        "tasks": [{"id": k, "kind": "target", "cell": list(cell)} for k, cell in enumerate(targets)],
        "frames": frames,
    }
    head = {"format": "echelon-replay", "version": 1, "title": "A search of a large map", "env": "search"}
    shape = {"method": "flat-mappo", "seed": seed, "height": size, "width": size, "num_agents": num_agents}
    return {**head, **shape, "limit": steps, "episodes": [episode]}


def _runs(flags: bytearray) -> str:
    counts, value = [0], 0
    for flag in flags:
        if flag != value:
            counts.append(0)
            value = flag
        counts[-1] += 1
    return ",".join(map(str, counts))


def tiny() -> Document:
    """A 5×5 document with everything known cell by cell."""
    goto = {"kind": "fetch", "target": [1, 3], "task": 0, "text": "fetch the box"}
    frames: list[Document] = [
        {"agents": [[1, 1], [3, 3]], "carrying": [-1, -1], "status": ["waiting"], "subgoals": [goto, None]},
        {
            "agents": [[1, 2], [3, 3]],
            "carrying": [-1, -1],
            "status": ["waiting"],
            "subgoals": [goto, None],
            "collisions": 1,
        },
        {
            "agents": [[1, 3], [3, 2]],
            "carrying": [0, -1],
            "status": ["carried"],
            "subgoals": [None, None],
            "events": ["picked"],
        },
        {"agents": [[2, 3], [3, 1]], "carrying": [0, -1], "status": ["carried"], "subgoals": [None, None]},
        {
            "agents": [[3, 3], [2, 1]],
            "carrying": [-1, -1],
            "status": ["delivered"],
            "subgoals": [None, None],
            "events": ["done"],
        },
    ]

    def record(step: int, verdict: str, reason: str | None) -> Document:
        options = [{"text": "fetch the box", "probability": 0.75}, {"text": "stay", "probability": 0.25}]
        choice = {"agent": 0, "options": options, "chosen": 0, "verdict": verdict, "reason": reason}
        return {
            "step": step,
            "planner": "model-x",
            "agents": [0],
            "prompt": "Where to?",
            "reply": "A",
            "choices": [choice],
            "latency_ms": 812.0,
        }

    return {
        "format": "echelon-replay", "version": 1, "title": "Tiny", "env": "warehouse", "method": "l2m2",
        "planner": "model-x", "seed": 0, "height": 5, "width": 5, "num_agents": 2, "limit": 10,
        "episodes": [
            {
                "success": True, "steps": 4, "walls": ["#####", "#...#", "#.#.#", "#...#", "#####"],
                "tasks": [{"id": 0, "kind": "package", "label": "the box", "cell": [1, 3], "goal": [3, 3]}],
                "frames": frames,
                "plans": [record(0, "accepted", None), record(2, "rejected", "out of reach")],
            }
        ]
        * 2,
    }  # fmt: skip


# ---------------------------------------------------------------- the document


def test_a_good_document_is_accepted_and_the_page_is_one_whole_file(tmp_path: Path) -> None:
    assert parse_replay(tiny()).episodes[0].frames[0].subgoals[0].target == (1, 3)  # type: ignore[union-attr]
    path = tmp_path / "tiny.html"
    write_replay(path, tiny())
    text = path.read_text(encoding="utf-8")
    assert text == render_replay(Replay.model_validate(tiny()))
    assert "http://" not in text and "https://" not in text and "src=" not in text
    assert "default-src 'none'" in text and "__" not in text.split("<body>")[0]
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.html"]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_replay_is_read_from_json_and_from_gzip(tmp_path: Path, name: str) -> None:
    text = json.dumps(tiny()).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert load_replay(tmp_path / name) == parse_replay(tiny())


def _at(document: Document, *path: str | int) -> Any:
    for key in path:
        document = document[key]  # type: ignore[index]
    return document


def _set(*path: Any) -> Callable[[Document], None]:
    """An edit that puts the last argument at the place that the others name."""
    *place, key, value = path
    return lambda document: _at(document, *place).__setitem__(key, value)


_EPISODE = ("episodes", 0)
_FRAME = (*_EPISODE, "frames", 1)


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (_set("format", "other"), 'bad.json: not a replay (its "format" should be "echelon-replay")'),
        (_set("version", 2), "bad.json: is a replay of version 2, and this Echelon reads version 1: upgrade Echelon"),
        (_set("height", 0), "bad.json: height: Input should be greater than or equal to 1"),
        (_set("episodes", []), "bad.json: episodes: List should have at least 1 item"),
        (_set("titel", "x"), "bad.json: titel: Extra inputs are not permitted"),
        (
            _set(*_EPISODE, "walls", 2, "#.?.#"),
            "bad.json: episodes[0].walls[2]: only '#' (wall) and '.' (free) are known",
        ),
        (_set(*_EPISODE, "walls", ["#####"]), "bad.json: episodes[0].walls: has 1 entries, but height is 5"),
        (_set(*_EPISODE, "steps", 3), "bad.json: episodes[0].frames: has 5 entries, but steps + 1"),
        (
            _set(*_FRAME, "agents", [[1, 1]]),
            "bad.json: episodes[0].frames[1].agents: has 1 entries, but num_agents is 2",
        ),
        (
            _set(*_FRAME, "agents", 0, [5, 0]),
            "bad.json: episodes[0].frames[1].agents[0]: cell [5, 0] is outside the 5×5 map",
        ),
        (_set(*_FRAME, "agents", 0, [1]), "bad.json: episodes[0].frames[1].agents[0][1]: Field required"),
        (_set(*_FRAME, "carrying", [7, -1]), "bad.json: episodes[0].frames[1].carrying[0]: no task has the id 7"),
        (
            _set(*_FRAME, "status", []),
            "bad.json: episodes[0].frames[1].status: has 0 entries, but the number of tasks is 1",
        ),
        (_set(*_FRAME, "seen", "20,4"), "bad.json: episodes[0].frames[1].seen: the runs add up to 24, not to 25 cells"),
        (_set(*_FRAME, "seen", "20,-4"), "bad.json: episodes[0].frames[1].seen: a run-length code is whole numbers"),
        (_set(*_FRAME, "subgoals", 0, "target", [9, 9]), "subgoals[0].target: cell [9, 9] is outside the 5×5 map"),
        (_set(*_EPISODE, "plans", 0, "step", 5), "bad.json: episodes[0].plans[0].step: 5 is after the last step, 4"),
        (_set(*_EPISODE, "plans", 0, "agents", [2]), "bad.json: episodes[0].plans[0]: names agent 2"),
        (
            _set(*_EPISODE, "plans", 0, "choices", 0, "chosen", 2),
            "plans[0].choices[0].chosen: 2, but there are 2 options",
        ),
        (
            _set(*_EPISODE, "plans", 0, "choices", 0, "options", 0, "probability", float("nan")),
            "bad.json: episodes[0].plans[0].choices[0].options[0].probability: Input should be",
        ),
    ],
)
def test_a_bad_document_gets_one_line_that_says_where(
    tmp_path: Path, edit: Callable[[Document], None], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = json.loads(json.dumps(tiny()))
    edit(document)
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text(json.dumps(document))
    with pytest.raises(EchelonError) as caught:
        load_replay("bad.json")
    assert complaint in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(EchelonError):
        write_replay("bad.html", document)
    assert not Path("bad.html").exists()


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("a.json", b"{", "not JSON: line 1"),
        ("a.json", b"\xff\xfe\xff", "not UTF-8 text"),
        ("a.json", b"[" * 100_000, "not a replay"),
        ("a.json", b"[]", "not a replay"),
        ("a.json.gz", b"{}", "not a whole gzip file"),
        ("a.json.gz", gzip.compress(b"{}" * 999, mtime=0)[:-12], "not a whole gzip file"),
    ],
)
def test_a_file_that_is_no_replay_gets_one_line(tmp_path: Path, name: str, data: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(EchelonError, match=complaint) as caught:
        load_replay(tmp_path / name)
    assert "\n" not in str(caught.value)
    with pytest.raises(EchelonError, match="No such file"):
        load_replay(tmp_path / "missing.json")


HOSTILE = (
    "</script><script>window.hacked=1</script>",
    "<!--<script>",
    "<img src=x onerror=window.hacked=1>",
    "]]>\u2028\u2029window.hacked=1//",
    "</title></textarea><svg onload=window.hacked=1>",
    "\u202egnp.exe\u0000\ud83d",  # a direction override, a zero byte, half an emoji
    "&lt;b&gt; __REPLAY_DATA__ __SCRIPT_HASH__ javascript:window.hacked=1 " + "w" * 4000,
)


def hostile() -> Document:
    """The tiny document with hostile text in every field that takes text."""
    document = json.loads(json.dumps(tiny()))
    turn = iter(range(10**6))

    def spoil(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: spoil(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(v, key) for v in value]
        if isinstance(value, str) and key not in ("format", "walls", "seen"):
            return HOSTILE[next(turn) % len(HOSTILE)]
        return value

    return dict(spoil(document))


def test_hostile_text_stays_inside_its_element() -> None:
    page = render_replay(hostile())
    page.encode("utf-8")
    assert page.count("</script>") == 2 and page.count("<script") == 2 and page.count("<!--") == 0
    data = page.split('id="replay-data">')[1].split("</script>")[0]
    assert not set("<>&") & set(data) and data.isascii()
    assert json.loads(data)["title"] == HOSTILE[0]
    cut = Replay.model_validate({**tiny(), "title": "half \ud83d, whole \ud83e\udd16"}).title
    assert cut == "half \ufffd, whole \U0001f916"
    assert page.split("<title>")[1].split("</title>")[0] == (
        "&lt;/script&gt;&lt;script&gt;window.hacked=1&lt;/script&gt;"
    )


def test_the_page_keeps_only_what_changes() -> None:
    document = warehouse(episodes=1)
    assert len(render_replay(document)) < 0.5 * len(json.dumps(document)) + 75_000


# ---------------------------------------------------------------- the page in a browser

Open = Callable[..., Any]
browser_test = pytest.mark.browser


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens the page of a document; afterwards nothing may have complained and nothing been asked for."""

    def opens(document: Document, fragment: str = "", width: int = 1280, height: int = 860, **screen: Any) -> Any:
        emulate(browser, width=width, height=height, **screen)
        write_replay(tmp_path / "page.html", document)
        open_page(browser, tmp_path / "page.html", fragment)
        until(browser, "return document.getElementById('app').dataset.ready")
        return browser

    yield opens
    assert complaints(browser) == []
    assert [url for url in requests(browser) if not url.startswith(("file:", "data:"))] == []
    emulate(browser)


def until(driver: Any, script: str) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, 20, poll_frequency=0.03).until(lambda d: d.execute_script(script))


def state(driver: Any) -> dict[str, str]:
    return dict(driver.execute_script("return {...document.getElementById('app').dataset}"))


def press(driver: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).send_keys(*keys).perform()


def text_of(driver: Any, id: str) -> str:
    return str(driver.execute_script("return document.getElementById(arguments[0]).textContent", id))


def shows(driver: Any, id: str) -> bool:
    return bool(driver.execute_script("return document.getElementById(arguments[0]).offsetParent !== null", id))


def pixel(driver: Any, row: float, col: float) -> str:
    """The colour of the map at a point in cells ((0.5, 0.5): the middle of the first cell)."""
    map_at, page_at = "document.getElementById('world').dataset.drawn", "document.getElementById('app').dataset.step"
    until(driver, f"return {map_at} === {page_at}")
    return str(
        driver.execute_script(
            """const c = document.getElementById('world'), k = c.width / c.clientWidth;
            const at = (origin, cells) => (Number(origin) + cells * Number(c.dataset.cell)) * k;
            const x = at(c.dataset.left, arguments[1]), y = at(c.dataset.top, arguments[0]);
            const data = c.getContext('2d').getImageData(Math.floor(x), Math.floor(y), 1, 1).data;
            return '#' + [...data].slice(0, 3).map((v) => v.toString(16).padStart(2, '0')).join('')""",
            row,
            col,
        )
    )


BLUE, ORANGE, WALL = "#0072b2", "#e69f00", "#59636f"


@browser_test
def test_keys_step_play_and_pause(show: Open) -> None:
    from selenium.webdriver.common.keys import Keys

    page = show(tiny())
    assert state(page)["step"] == "0" and state(page)["playing"] == "false"
    press(page, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert state(page)["step"] == "2" and text_of(page, "collisions") == "1"
    press(page, Keys.ARROW_LEFT)
    assert state(page)["step"] == "1"
    press(page, Keys.END, Keys.ARROW_RIGHT)
    assert state(page)["step"] == "4" and text_of(page, "done") == "1"
    press(page, Keys.HOME, Keys.ARROW_LEFT)
    assert state(page)["step"] == "0"
    # A step a second: the 4 steps last longer than a slow browser takes to answer.
    press(page, *"---", " ")
    assert state(page)["playing"] == "true"
    press(page, *"+++")
    until(page, "return document.getElementById('app').dataset.step === '4'")
    until(page, "return document.getElementById('app').dataset.playing === 'false'")
    press(page, *"---", " ")  # at the end, playing starts again
    assert state(page)["playing"] == "true" and int(state(page)["step"]) < 4
    press(page, " ")
    assert state(page)["playing"] == "false"


@browser_test
def test_playing_moves_between_cells_unless_motion_is_unwanted(show: Open) -> None:
    moving = "return !Number.isInteger(Number(document.getElementById('world').dataset.drawn))"
    page = show(warehouse(episodes=1))
    press(page, " ")
    until(page, moving)
    press(page, " ")
    page = show(warehouse(episodes=1), prefers_reduced_motion="reduce")
    press(page, " ")
    drawn = set()
    for _ in range(20_000):  # 2 s of playing, so that a slow browser answers more than once
        if int(state(page)["step"]) >= 8:
            break
        drawn.add(page.execute_script("return document.getElementById('world').dataset.drawn"))
    assert len(drawn) > 1 and all(float(at).is_integer() for at in drawn)


@browser_test
def test_speed_scrubber_buttons_and_episodes(show: Open) -> None:
    page = show(warehouse())
    press(page, "+")
    assert state(page)["speed"] == "8" and text_of(page, "speed") == "8 steps/s"
    press(page, *"-" * 9)
    assert state(page)["speed"] == "1" and not page.find_element("id", "slower").is_enabled()
    page.execute_script("const t = document.getElementById('time'); t.value = 42; t.dispatchEvent(new Event('input'))")
    assert state(page)["step"] == "42" and text_of(page, "step") == "42"
    page.find_element("id", "back").click()
    page.find_element("id", "play").click()
    assert state(page)["playing"] == "true"
    press(page, " ")  # the click left no focus behind, so space pauses
    assert state(page)["playing"] == "false"
    press(page, "]")
    assert state(page)["episode"] == "1" and state(page)["step"] == "0"
    page.find_elements("css selector", "#episodes button")[2].click()
    assert state(page)["episode"] == "2"
    press(page, "[")
    assert state(page)["episode"] == "1"


@browser_test
def test_an_agent_is_selected_by_key_by_row_and_on_the_map(show: Open) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    page = show(tiny())
    press(page, "1")
    assert state(page)["agent"] == "1"
    assert page.find_elements("css selector", "#agents button")[1].get_attribute("aria-pressed") == "true"
    press(page, Keys.ESCAPE)
    assert state(page)["agent"] == "-1"
    page.find_elements("css selector", "#agents button")[0].click()
    assert state(page)["agent"] == "0"
    canvas = page.find_element("id", "world")
    cell = float(canvas.get_attribute("data-cell"))
    ActionChains(page).move_to_element_with_offset(canvas, int(cell), int(cell)).click().perform()  # cell (3, 3)
    assert state(page)["agent"] == "1"
    page = show(warehouse(size=30, num_agents=14, num_packages=20, episodes=1))
    press(page, "1", "2")
    assert state(page)["agent"] == "12"


@browser_test
def test_the_plan_of_the_moment_with_its_verdict(show: Open) -> None:
    page = show(tiny())
    assert text_of(page, "plan-title") == "Plan of step 0"
    card = page.find_element("id", "plans")
    assert "812 ms" in card.text and "accepted" in card.text and "75%" in card.text and "rejected" not in card.text
    press(page, ".")
    assert state(page)["step"] == "2" and text_of(page, "plan-title") == "Plan of step 2"
    assert "rejected" in card.text and "out of reach" in card.text
    assert page.find_element("css selector", "#plans li.chosen").text.startswith("●")
    prompt = page.find_elements("css selector", "#plans details.words")[-1]
    assert "Where to?" not in card.text
    prompt.find_element("css selector", "summary").click()
    assert "Where to?" in card.text
    press(page, "1")
    assert "No plan for agent 1 yet." in card.text


@browser_test
@pytest.mark.parametrize("screen", [{}, {"ratio": 2}, {"ratio": 1.25, "width": 1111}])
def test_the_map_shows_the_agents_where_the_frame_says(show: Open, screen: dict[str, Any]) -> None:
    page = show(tiny(), **screen)
    left_half = -0.28  # beside the number
    for step, frame in enumerate(tiny()["episodes"][0]["frames"]):
        page.execute_script("location.hash = `#step=${arguments[0]}`", step)
        until(page, f"return document.getElementById('app').dataset.step === '{step}'")
        for (row, col), colour in zip(frame["agents"], (BLUE, ORANGE), strict=True):
            assert pixel(page, row + 0.5, col + 0.5 + left_half) == colour
        assert pixel(page, 2.5, 2.5) == WALL and pixel(page, 0.1, 4.5) == WALL
        if step == 0:
            assert pixel(page, 2.5, 1.5) == pixel(page, 3.5, 1.5) == "#ffffff"


@browser_test
def test_what_nobody_has_seen_is_dimmed(show: Open) -> None:
    document = wanderers(16, 2, 3)
    frame = document["episodes"][0]["frames"][0]
    document["episodes"][0]["walls"] = ["." * 16] * 16
    document["episodes"][0]["tasks"], frame["status"] = [], []
    for later in document["episodes"][0]["frames"]:
        later.update(agents=[[0, 0], [0, 0]], status=[], seen=None)
    frame["seen"] = "17,2,237"  # (1, 1) and (1, 2)
    page = show(document)
    assert pixel(page, 1.5, 1.5) == pixel(page, 1.5, 2.5) == "#ffffff"
    assert pixel(page, 1.5, 3.5) == pixel(page, 15.5, 15.5) != "#ffffff"


@browser_test
def test_a_rack_keeps_its_tool_and_what_has_no_place_is_not_drawn(show: Open) -> None:
    document = tiny()
    episode = document["episodes"][0]
    lost = {"id": 1, "kind": "target", "label": "", "cell": None, "goal": None}
    tool = {"id": 0, "kind": "tool", "label": "", "cell": [1, 3], "goal": None}
    places = ([[1, 1], [3, 3]], [[2, 1], [3, 3]], [[3, 1], [3, 3]])
    frames = [{"agents": at, "carrying": [0, -1], "status": ["rack", "hidden"]} for at in places]
    choice = {"agent": 0, "options": [], "chosen": None, "verdict": "unreachable", "reason": "no path leads there"}
    plan = {**episode["plans"][0], "choices": [choice]}
    document["episodes"] = [{**episode, "tasks": [tool, lost], "frames": frames, "steps": 2, "plans": [plan]}]
    page = show(document, "#step=2")
    assert pixel(page, 1.62, 3.38) not in ("#ffffff", WALL)  # the tool, still in its rack
    assert text_of(page, "total") == " / 1"
    assert "no subgoal" in text_of(page, "plans") and "✕ unreachable" in text_of(page, "plans")


@browser_test
def test_hostile_text_does_nothing(show: Open, browser: Any) -> None:
    page = show(hostile())
    for _ in range(4):
        press(page, ".", "0")
    assert page.execute_script("return window.hacked") is None
    assert (
        page.execute_script("return document.querySelectorAll('img, svg[onload], script:not(#replay-data)').length")
        == 1
    )
    assert text_of(page, "title") == HOSTILE[0]
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert complaints(browser) == []
    # Even text that became markup could run nothing: the policy names the page's script by its hash.
    page.execute_script("document.body.insertAdjacentHTML('beforeend', '<svg onload=\"window.hacked=1\"></svg>')")
    page.execute_script(
        "const s = document.createElement('script'); s.text = 'window.hacked=1'; document.body.append(s)"
    )
    assert page.execute_script("return window.hacked") is None
    assert complaints(browser)


@browser_test
def test_a_phone_has_no_sideways_scroll(show: Open) -> None:
    for document in (warehouse(), wanderers(128, 16, 5), tiny(), hostile()):
        page = show(document, width=360, height=740, ratio=2)
        widths = page.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1] == 360
        play = page.find_element("id", "play")
        assert play.size["width"] == play.size["height"] >= 40


@browser_test
def test_dark_and_light_follow_the_system_and_the_button(show: Open) -> None:
    background = "return getComputedStyle(document.body).backgroundColor"
    page = show(tiny())
    light = page.execute_script(background)
    page = show(tiny(), prefers_color_scheme="dark")
    dark = page.execute_script(background)
    assert light != dark and pixel(page, 1.5, 2.5) != "#ffffff"
    page.find_element("id", "theme").click()
    assert page.execute_script(background) == light and pixel(page, 1.5, 2.5) == "#ffffff"
    press(page, "d")
    assert page.execute_script(background) == dark


@browser_test
def test_without_plans_tasks_or_subgoals_there_are_no_empty_boxes(show: Open) -> None:
    document = tiny()
    episode = document["episodes"][0]
    document["episodes"] = [{**episode, "plans": [], "tasks": [], "zones": []}]
    document["episodes"][0]["frames"] = [{"agents": frame["agents"]} for frame in episode["frames"]]
    page = show(document)
    for id in ("plan-card", "log", "tasks-box", "episodes"):
        assert not shows(page, id), id
    assert "at 1, 1" in text_of(page, "agents") and "subgoal" not in text_of(page, "agents")
    still = {
        **document,
        "episodes": [{**document["episodes"][0], "steps": 0, "frames": [{"agents": [[1, 1], [3, 3]]}]}],
    }
    page = show(still)  # an episode that was over before its first step
    press(page, " ", ".")
    assert state(page)["playing"] == "false"


@browser_test
def test_everything_has_a_name_and_a_visible_focus(show: Open) -> None:
    from selenium.webdriver.common.keys import Keys

    page = show(warehouse())
    nameless = """return [...document.querySelectorAll('button, input, canvas')].filter(
        (e) => !(e.getAttribute('aria-label') || e.textContent.trim() || e.ariaHidden === 'true')).length"""
    assert page.execute_script(nameless) == 0
    press(page, Keys.TAB)
    assert page.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.execute_script("document.getElementById('time').focus()")
    press(page, Keys.ARROW_RIGHT)  # the slider and the page both know this key: one step, not two
    assert state(page)["step"] == "1"
    assert page.find_element("id", "time").get_attribute("aria-valuetext").startswith("Step 1 of")
    press(page, "?")
    assert page.find_element("id", "help").is_displayed()
    press(page, Keys.ESCAPE)
    assert not page.find_element("id", "help").is_displayed()


@browser_test
def test_a_link_leads_to_a_moment_and_the_address_follows(show: Open) -> None:
    page = show(warehouse(), "#episode=2&step=17&agent=3")
    assert (state(page)["episode"], state(page)["step"], state(page)["agent"]) == ("1", "17", "3")
    press(page, "[")
    until(page, "return location.hash === '#episode=1&step=0&agent=3'")
    page = show(warehouse(), "#episode=99&step=x&agent=-4")
    assert (state(page)["episode"], state(page)["step"], state(page)["agent"]) == ("0", "0", "-1")
    page = show(tiny(), "#step=999")
    assert state(page)["step"] == "4"


@browser_test
def test_a_large_map_with_many_agents_stays_usable(show: Open) -> None:
    from selenium.webdriver.common.keys import Keys

    page = show(wanderers(256, 64, 300))
    assert float(page.find_element("id", "world").get_attribute("data-cell")) >= 2
    press(page, *"++++", " ")
    until(page, "return Number(document.getElementById('app').dataset.step) > 20")
    press(page, " ", "5", "z", "z", "z")
    page.find_element("id", "zoom-fit").click()
    press(page, Keys.END)
    assert state(page)["step"] == "300"
    steps = page.execute_script(
        "const t = Date.now(); for (let i = 0; i < 300; i += 3) { seek(i); draw(); } return Date.now() - t"
    )
    assert steps < 20_000  # 100 jumps; far under a second where a whole core is free
