"""Replays: recorded episodes of a robot-team grid world, as one page that plays them.

A replay is a JSON document (`Replay` states its form) written by an evaluation. `render_replay` turns it
into a single HTML file with no other file, font or address behind it, so that it can be mailed, put in a
paper's supplement or opened from a disk without a network.

Text in a replay may come from a language model and is never trusted: the page inserts it as text only, the
embedded JSON can't end its own element, and the page's content security policy lets no script run but the
page's own, named by its hash.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import zlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from echelon._files import atomic_write_text
from echelon.errors import EchelonError

__all__ = [
    "DONE_STATUSES",
    "Choice",
    "Episode",
    "Frame",
    "Option",
    "PlanRecord",
    "Replay",
    "ReplaySubgoal",
    "Task",
    "Zone",
    "load_replay",
    "parse_replay",
    "render_replay",
    "replay_data",
    "replay_shell",
    "write_replay",
]

FORMAT = "echelon-replay"
VERSION = 1

DONE_STATUSES = (
    "delivered",
    "found",
    "repaired",
    "done",
    "complete",
    "completed",
    "explored",
    "cleared",
    "rescued",
)
"""The statuses that count as finished in "tasks done"; every other word is an open task."""

# A replay far above this isn't something a browser can hold either; the limit stops a small .gz that
# unpacks without end.
_MAX_BYTES = 1 << 30


def _whole_text(value: object) -> object:
    """A model's reply may be cut inside a character; a lone surrogate can't be written to any file."""
    if not isinstance(value, str):
        return value
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


Text = Annotated[str, BeforeValidator(_whole_text)]
Index = Annotated[int, Field(ge=0)]
Cell = tuple[Index, Index]


class _Part(BaseModel):
    # A misspelt optional field would vanish from the page without a word: refuse it.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Zone(_Part):
    """A named area of the floor, such as a depot; `cells` are (row, column)."""

    id: int
    label: Text = ""
    cells: list[Cell] = []


class Task(_Part):
    """Something to carry, find or mend: where it starts and, if it has one, where it belongs.

    `cell` is where it is at first; None where that isn't known (such a task isn't drawn until it is carried or
    brought to its goal). What an agent carries leaves the floor, unless its status is "rack": a rack has more.
    `kind` is "package", "target", "machine", "tool", "region" or a word of the environment's own; the page
    has a shape for each of the five and one for the rest.
    """

    id: Index
    kind: Text
    label: Text = ""
    cell: Cell | None = None
    goal: Cell | None = None


class ReplaySubgoal(_Part):
    """What the planner has asked of one agent: drawn as a line from the agent to `target`."""

    kind: Text
    target: Cell
    task: int | None = None
    text: Text = ""


class Frame(_Part):
    """The world after one step; frame 0 is the initial state.

    `agents` has a cell and `carrying` a task id (-1: nothing) for each agent, `status` a word for each task.
    `carrying` and `subgoals` may be left empty where no agent carries or is told anything. `seen` is the
    run-length code of the height × width flags that say what the team has seen ("12,3,385": 12 unseen,
    3 seen, 385 unseen), and stands only in frames where it changes.
    """

    agents: list[Cell]
    carrying: list[int] = []
    status: list[Text] = []
    subgoals: list[ReplaySubgoal | None] = []
    collisions: Index = 0
    events: list[Text] = []
    seen: str | None = None


class Option(_Part):
    """One candidate that the planner could choose, and the probability it gave it (if it gives any)."""

    text: Text
    probability: Annotated[float, Field(ge=0, le=1)] | None = None


class Choice(_Part):
    """What was chosen for one agent, and what the checks said of it.

    `verdict` is "accepted", "fallback", or "rejected" or a rejection's own name.
    """

    agent: Index
    options: list[Option] = []
    chosen: Index | None = None
    verdict: Text
    reason: Text | None = None


class PlanRecord(_Part):
    """One call of the planner: at which step, for whom, what was asked and answered, and the verdicts."""

    step: Index
    planner: Text
    agents: list[Index] = []
    prompt: Text | None = None
    reply: Text | None = None
    choices: list[Choice] = []
    latency_ms: Annotated[float, Field(ge=0)] | None = None


class Episode(_Part):
    """One episode: the map ('#' wall, '.' free), its tasks, a frame a step and the plans."""

    world: int = 0
    success: bool
    steps: Index
    walls: list[str]
    zones: list[Zone] = []
    tasks: list[Task] = []
    frames: Annotated[list[Frame], Field(min_length=1)]
    plans: list[PlanRecord] = []


class Replay(_Part):
    """A whole replay document, version 1. Cells are (row, column) from the top left; ids count from 0."""

    format: Literal["echelon-replay"] = "echelon-replay"
    version: Literal[1] = 1
    title: Text
    env: Text
    method: Text
    planner: Text = ""
    seed: int
    height: Annotated[int, Field(ge=1, le=1024)]
    width: Annotated[int, Field(ge=1, le=1024)]
    num_agents: Annotated[int, Field(ge=1, le=1024)]
    limit: Index
    episodes: Annotated[list[Episode], Field(min_length=1)]

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Replay:
        """The parts must fit each other; each complaint names its place, as pydantic's own do."""
        for e, episode in enumerate(self.episodes):
            _check_episode(self, episode, f"episodes[{e}]")
        return self


def _check_episode(replay: Replay, episode: Episode, where: str) -> None:
    """Raise ValueError at the first thing in `episode` that the rest of the document contradicts."""
    height, width, agents = replay.height, replay.width, replay.num_agents

    def inside(cell: Cell, place: str) -> None:
        if cell[0] >= height or cell[1] >= width:
            raise ValueError(f"{where}.{place}: cell {list(cell)} is outside the {height}×{width} map")

    def length(what: Sequence[object], right: int, place: str, of: str) -> None:
        if len(what) != right:
            raise ValueError(f"{where}.{place}: has {len(what)} entries, but {of} is {right}")

    length(episode.walls, height, "walls", "height")
    for r, row in enumerate(episode.walls):
        length(row, width, f"walls[{r}]", "width")
        if set(row) - set("#."):
            raise ValueError(f"{where}.walls[{r}]: only '#' (wall) and '.' (free) are known")
    for z, zone in enumerate(episode.zones):
        for c, cell in enumerate(zone.cells):
            inside(cell, f"zones[{z}].cells[{c}]")

    ids: set[int] = set()
    for k, task in enumerate(episode.tasks):
        if task.id in ids:
            raise ValueError(f"{where}.tasks[{k}].id: {task.id} is taken by an earlier task")
        ids.add(task.id)
        if task.cell is not None:
            inside(task.cell, f"tasks[{k}].cell")
        if task.goal is not None:
            inside(task.goal, f"tasks[{k}].goal")

    length(episode.frames, episode.steps + 1, "frames", "steps + 1 (frame 0 is the initial state)")
    for t, frame in enumerate(episode.frames):
        at = f"frames[{t}]"
        length(frame.agents, agents, f"{at}.agents", "num_agents")
        for a, cell in enumerate(frame.agents):
            inside(cell, f"{at}.agents[{a}]")
        if frame.carrying:
            length(frame.carrying, agents, f"{at}.carrying", "num_agents")
        for a, held in enumerate(frame.carrying):
            if held != -1 and held not in ids:
                raise ValueError(f"{where}.{at}.carrying[{a}]: no task has the id {held} (-1 is nothing)")
        length(frame.status, len(episode.tasks), f"{at}.status", "the number of tasks")
        if frame.subgoals:
            length(frame.subgoals, agents, f"{at}.subgoals", "num_agents")
        for a, subgoal in enumerate(frame.subgoals):
            if subgoal is not None:
                inside(subgoal.target, f"{at}.subgoals[{a}].target")
        if frame.seen is not None:
            _check_runs(frame.seen, height * width, f"{where}.{at}.seen")

    for p, plan in enumerate(episode.plans):
        at = f"{where}.plans[{p}]"
        if plan.step > episode.steps:
            raise ValueError(f"{at}.step: {plan.step} is after the last step, {episode.steps}")
        for agent in (*plan.agents, *(choice.agent for choice in plan.choices)):
            if agent >= agents:
                raise ValueError(f"{at}: names agent {agent}, but the last agent is {agents - 1}")
        for c, choice in enumerate(plan.choices):
            if choice.chosen is not None and choice.chosen >= len(choice.options):
                raise ValueError(
                    f"{at}.choices[{c}].chosen: {choice.chosen}, but there are {len(choice.options)} options"
                )


def _check_runs(code: str, cells: int, where: str) -> None:
    counts = code.split(",")
    if not all(count.isascii() and count.isdigit() and len(count) < 10 for count in counts):
        raise ValueError(f"{where}: a run-length code is whole numbers with commas between")
    if sum(map(int, counts)) != cells:
        raise ValueError(f"{where}: the runs add up to {sum(map(int, counts))}, not to {cells} cells")


def parse_replay(document: Mapping[str, Any] | Replay, where: str = "replay") -> Replay:
    """Check a replay document.

    Args:
        document: the document as a mapping (from JSON), or one that was checked before.
        where: what to call it in an error, such as its file name.

    Raises:
        EchelonError: in one line, which field is wrong and what it should be.
    """
    if isinstance(document, Replay):
        return document
    if not isinstance(document, Mapping) or document.get("format") != FORMAT:
        raise EchelonError(f'{where}: not a replay (its "format" should be "{FORMAT}")')
    version = document.get("version")
    if isinstance(version, int) and version > VERSION:
        raise EchelonError(
            f"{where}: is a replay of version {version}, and this Echelon reads version {VERSION}: upgrade Echelon"
        )
    try:
        return Replay.model_validate(dict(document))
    except ValidationError as error:
        raise EchelonError(f"{where}: {_first_complaint(error)}") from None


def _first_complaint(error: ValidationError) -> str:
    """Pydantic's report, cut to the first complaint in one line (`episodes[0].frames[3].agents: …`)."""
    complaints = error.errors(include_url=False, include_context=False, include_input=False)
    first = complaints[0]
    place = ""
    for key in first["loc"]:
        place += f"[{key}]" if isinstance(key, int) else f".{key}"
    message = " ".join(first["msg"].removeprefix("Value error, ").split())
    # The loc holds the document's own keys where they are unknown, and those may be anything.
    place = " ".join(place.lstrip(".").split())[:120]
    rest = f" (and {len(complaints) - 1} more)" if len(complaints) > 1 else ""
    return f"{place}: {message}{rest}" if place else f"{message}{rest}"


def load_replay(path: str | Path) -> Replay:
    """Read and check a replay from `path`, a JSON file, gzipped if its name ends in `.gz`.

    Raises:
        EchelonError: the file can't be read, isn't JSON, or isn't a replay.
    """
    path = Path(path)
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as file:
                data = file.read(_MAX_BYTES + 1)
        else:
            with path.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise EchelonError(f"{path}: not a whole gzip file") from None
    except OSError as error:
        raise EchelonError(f"{path}: {error.strerror or error}") from None
    if len(data) > _MAX_BYTES:
        raise EchelonError(f"{path}: is larger than {_MAX_BYTES >> 20} MiB, too large for one replay")
    try:
        document = json.loads(data)
    except UnicodeDecodeError:
        raise EchelonError(f"{path}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise EchelonError(f"{path}: not JSON: line {error.lineno}: {error.msg}") from None
    except (RecursionError, ValueError):  # nested without end, or a number of thousands of digits
        raise EchelonError(f"{path}: not a replay") from None
    return parse_replay(document, str(path))


_T = TypeVar("_T")


def _changes(before: Sequence[_T], after: Sequence[_T]) -> list[tuple[int, _T]]:
    """(index, new value) of each entry that differs; `before` shorter than `after` counts as all new."""
    return [(i, new) for i, new in enumerate(after) if i >= len(before) or before[i] != new]


def _payload(replay: Replay) -> dict[str, Any]:
    """The document as the page wants it: whole positions, and of the rest only what changes in a frame.

    Subgoals last tens of steps and statuses hundreds, so this is several times smaller than the document.
    """
    payload = replay.model_dump(exclude={"episodes"})
    payload["done"] = list(DONE_STATUSES)
    payload["episodes"] = episodes = []
    for episode in replay.episodes:
        packed = episode.model_dump(exclude={"frames"})
        frames: list[dict[str, Any]] = []
        held: list[int] = [-1] * replay.num_agents
        status: list[str] = []
        subgoals: list[ReplaySubgoal | None] = [None] * replay.num_agents
        seen = ""
        for frame in episode.frames:
            now_held = frame.carrying or [-1] * replay.num_agents
            now_subgoals = frame.subgoals or [None] * replay.num_agents
            entry: dict[str, Any] = {"a": [x for cell in frame.agents for x in cell]}
            entry["c"] = _changes(held, now_held)
            entry["s"] = _changes(status, frame.status)
            entry["g"] = [(i, g and g.model_dump()) for i, g in _changes(subgoals, now_subgoals)]
            entry["n"] = frame.collisions
            entry["e"] = frame.events
            entry["v"] = frame.seen if frame.seen != seen else None
            frames.append({key: value for key, value in entry.items() if value})
            held, status, subgoals, seen = now_held, frame.status, now_subgoals, frame.seen or seen
        packed["frames"] = frames
        episodes.append(packed)
    return payload


def _script_json(value: object) -> str:
    """JSON that can stand inside a `<script>` element whatever its strings hold.

    Without `<` neither `</script>` nor `<!--` can be formed; ASCII-only output takes care of U+2028.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def replay_shell(title: str) -> tuple[str, str, str]:
    """The replay page without a replay: (what comes before its data, what comes after, its script's SHA-256).

    `before + replay_data(replay) + after` is a whole page. The digest is in base64, as a content security policy
    wants it: a page that holds this one in a frame has to allow its script too.
    """
    template = files("echelon.reports").joinpath("replay.html").read_text(encoding="utf-8")
    head, tail = template.split("__REPLAY_DATA__")
    script = template.split("<script>", 1)[1].split("</script>", 1)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return head.replace("__SCRIPT_HASH__", digest).replace("__TITLE__", html.escape(title)), tail, digest


def replay_data(replay: Replay) -> str:
    """The data of a replay as the page reads them: JSON that no string in it can end."""
    return _script_json(_payload(replay))


def render_replay(replay: Mapping[str, Any] | Replay) -> str:
    """The page that plays `replay`: one whole HTML file as text, which needs no network and no other file.

    A link to a moment works: `page.html#episode=2&step=40&agent=1` (episodes count from 1, agents from 0).

    Raises:
        EchelonError: `replay` is not a valid document.
    """
    replay = parse_replay(replay)
    head, tail, _ = replay_shell(replay.title)
    return head + replay_data(replay) + tail


def write_replay(path: str | Path, replay: Mapping[str, Any] | Replay) -> None:
    """Write the page that plays `replay` to `path`; the file appears whole or not at all.

    Raises:
        EchelonError: `replay` is not a valid document.
    """
    atomic_write_text(Path(path), render_replay(replay))
