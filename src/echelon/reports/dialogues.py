"""The dialogues of a team of language models, as one page to read turn by turn beside the reward they earned.

`write_dialogues` makes of a run's folder a single HTML file with no other file, font or address behind it. It reads
files only, so it works on a run that was stopped, is under way or has not begun. A long run has more dialogues than a
browser can hold: the page keeps the newest, the first and evenly spaced updates between, and says what it left out.

What the agents wrote is never trusted: the page inserts it as text only, the embedded JSON can't end its own element,
and the page's content security policy lets no script run but the page's own, named by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from scipy import stats

from echelon._files import atomic_write_text
from echelon.algorithms.teams import team_algorithms
from echelon.configs import read_toml_file
from echelon.errors import EchelonError
from echelon.reports.replay import _script_json

__all__ = ["write_dialogues"]

Kind = Literal["train", "eval"]
_KINDS: tuple[Kind, ...] = ("train", "eval")

_BUDGET = 10_000_000
"""Bytes of dialogue in a page, as escaped JSON."""
_LONGEST = (200_000, 20_000, 2_000)
"""Characters of one text that a page holds: the first of these with which the newest updates have a place."""
_POINTS = 400
"""Points of a curve: more than that many pixels tell nothing more."""

# How the trainer begins a line: the update is known without reading the rest, which may be megabytes.
_HEAD = re.compile(rb'\{"update":\s*(\d{1,15}),\s*"kind":\s*"(train|eval)"')


def write_dialogues(folder: Path) -> Path:
    """Write `<folder>/dialogues.html`, the page of a run's dialogues; the file appears whole or not at all.

    A link to a dialogue works: `dialogues.html#kind=eval&update=20&episode=3&path=1.2` (the third episode on the page
    of that update, its first joint action in turn 1 and the second in turn 2).

    Args:
        folder: of a run of a team of language models, finished or not.

    Returns:
        Where the page is.

    Raises:
        EchelonError: `folder` is no such run, a file can't be read, or the page can't be written.
    """
    folder = Path(folder)
    config = _team_config(folder)
    page = folder / "dialogues.html"
    atomic_write_text(page, _page(config, _payload(folder, config)))
    return page


def _team_config(folder: Path) -> dict[str, Any]:
    """The run's settings; a folder of something else is an error."""
    if not (folder / "config.toml").is_file():
        raise EchelonError(f"{folder} is no run of a team of language models: it has no config.toml")
    config = read_toml_file(folder / "config.toml", "config")
    # A method of one's own may not be registered where the page is made: its dialogues say it all the same.
    if config.get("method") not in team_algorithms() and not (folder / "dialogues.jsonl").is_file():
        method = str(config.get("method", "none"))
        raise EchelonError(f"{folder} is no run of a team of language models: its method is {_line(method)}")
    return config


def _page(config: Mapping[str, Any], payload: Mapping[str, Any]) -> str:
    template = files("echelon.reports").joinpath("dialogues.html").read_text(encoding="utf-8")
    script = template.split("<script>", 1)[1].split("</script>", 1)[0]
    parts = {
        "SCRIPT_HASH": base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        "TITLE": html.escape(f"{payload['title']}: dialogues"),
        "DATA": _script_json(payload),
    }
    # In one pass, so that text from data which looks like a place isn't taken for one.
    return re.sub(r"__([A-Z_]+?)__", lambda match: parts[match.group(1)], template)


def _payload(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """All that the page shows, as JSON values."""
    metrics, evaluations, timings = (_lines(folder / f"{n}.jsonl") for n in ("metrics", "evaluations", "timings"))
    dialogues = _dialogues(folder / "dialogues.jsonl")
    discount = _number(_table(config, "algorithm").get("discount"))
    return {
        "title": f"{_line(config.get('method', 'team'))} on {_line(config.get('environment', 'writing'))}",
        "facts": _facts(folder, config, metrics, timings),
        "discount": 1.0 if discount is None else discount,
        "reward": _series(metrics, "reward"),
        "evaluations": _evaluated(evaluations, config),
        "parts": _small_curves(metrics, dialogues["roles"]),
        **dialogues,
    }


def _facts(
    folder: Path, config: Mapping[str, Any], metrics: Sequence[dict[str, Any]], timings: Sequence[dict[str, Any]]
) -> list[tuple[str, str]]:
    models = config.get("model", ())
    models = [models] if isinstance(models, str) else models if isinstance(models, list) else []
    rollout, last = _table(config, "rollout"), metrics[-1] if metrics else {}
    done, wanted = _whole(last.get("update")) or 0, _whole(config.get("updates"))
    state = "" if done == wanted and (folder / "team").is_dir() else ", not finished"
    seconds = _number(timings[-1].get("seconds")) if timings else None
    facts = [
        ("method", config.get("method")),
        ("task", config.get("environment", "writing")),
        ("models", ", ".join(map(_line, models))),
        ("share", config.get("share")),
        ("joint actions", _table(config, "algorithm").get("joint")),
        ("group", rollout.get("group")),
        ("turns", rollout.get("turns")),
        ("seed", config.get("seed")),
        ("updates", f"{done:,} of {wanted:,}{state}" if wanted is not None else f"{done:,}"),
        ("replies", f"{count:,}" if (count := _whole(last.get("samples"))) else None),
        ("tokens", f"{count:,}" if (count := _whole(last.get("tokens"))) else None),
        ("time", _spent(seconds) if seconds else None),
    ]
    return [(name, _line(value)) for name, value in facts if value not in (None, "")]


def _spent(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------- curves


def _series(lines: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(update, value) of the lines that have the value; of a long run means over stretches."""
    found = [
        (u, value)
        for line in lines
        if (u := _number(line.get("update"))) is not None and (value := _number(line.get(name))) is not None
    ]
    step = max(1, math.ceil(len(found) / _POINTS))
    stretches = [found[k : k + step] for k in range(0, len(found), step)]
    return [(_mean([u for u, _ in some]), float(f"{_mean([y for _, y in some]):.9g}")) for some in stretches]


def _evaluated(lines: Sequence[dict[str, Any]], config: Mapping[str, Any]) -> list[tuple[int, float, float | None]]:
    """(update, mean return, half width of its 95% interval or None) of each evaluation.

    The interval is Student's t over items, of which there are as many as episodes divided by episodes an item.
    """
    samples = max(1, _whole(config.get("eval_samples")) or 1)
    found = []
    for line in lines:
        update, value, spread = _whole(line.get("update")), _number(line.get("return")), _number(line.get("return_se"))
        if update is None or value is None:
            continue
        items = (_whole(line.get("episodes")) or 0) // samples
        half = float(stats.t.ppf(0.975, items - 1)) * spread if spread is not None and items > 1 else None
        found.append((update, value, half))
    if len(found) > _POINTS:
        found = [found[round(k * (len(found) - 1) / (_POINTS - 1))] for k in range(_POINTS)]
    return found


def _small_curves(metrics: Sequence[dict[str, Any]], roles: Sequence[str]) -> list[dict[str, Any]]:
    """The reward's parts over the updates, then how long the agents' replies are, then what went wrong if any did."""
    names = dict.fromkeys(name for line in metrics for name in line)
    wanted = [(name, name.removeprefix("part_")) for name in names if name.startswith("part_")]
    for name in names:
        if match := re.fullmatch(r"length_(\d{1,4})", name):
            agent = int(match[1])
            wanted.append((name, f"tokens a reply, {roles[agent] if agent < len(roles) else f'agent {agent}'}"))
    wanted += [(name, told) for name, told in (("errors", "answers without a score"), ("skipped", "items left out"))
               if any(_number(line.get(name)) for line in metrics)]  # fmt: skip
    curves = [{"name": _line(told), "points": _series(metrics, name)} for name, told in wanted]
    return [curve for curve in curves[:48] if curve["points"]]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# ---------------------------------------------------------------- dialogues


class _Shelf:
    """Texts, each kept once: prompts come again in every update, and cross joint actions share their replies."""

    def __init__(self, longest: int) -> None:
        self.longest, self.size = longest, 0
        self._places: dict[str, int] = {}

    def put(self, text: object) -> int:
        """The place of a text; -1 for what is none or is empty."""
        if not isinstance(text, str) or not text:
            return -1
        if text not in self._places:
            self._places[text] = len(self._places)
            self.size += len(_script_json(self._kept(text))) + 1
        return self._places[text]

    def _kept(self, text: str) -> str | dict[str, Any]:
        return text if len(text) <= self.longest else {"text": text[: self.longest], "of": len(text)}

    def texts(self) -> list[str | dict[str, Any]]:
        """All of them; one that is too long as its beginning and how long it was."""
        return [self._kept(text) for text in self._places]

    def mark(self) -> tuple[int, int]:
        """Where the shelf stands, for `back`."""
        return len(self._places), self.size

    def back(self, mark: tuple[int, int]) -> None:
        """Forget what came after `mark`."""
        while len(self._places) > mark[0]:
            self._places.popitem()
        self.size = mark[1]


def _dialogues(path: Path) -> dict[str, Any]:
    """The part of `dialogues.jsonl` that a page can hold.

    `groups`: by kind and update its episodes (trees of scenes, parents first); `texts`: what they refer to by place.
    """
    index, damaged = _index(path)
    packed: dict[str, Any] = {}
    for longest in _LONGEST:
        packed = _packed(path, index, longest)
        if all(group["episodes"] for group in packed["groups"]):
            break
    updates = {kind: sum(own == kind for _, own in index) for kind in _KINDS}
    packed["damaged"] += damaged
    return {**packed, "updates": updates, "bytes": path.stat().st_size if path.is_file() else 0}


def _index(path: Path) -> tuple[dict[tuple[int, Kind], list[int]], int]:
    """Where the lines of each update and kind begin, in the order of the file; and how many lines are of none."""
    found: dict[tuple[int, Kind], list[int]] = {}
    at = damaged = 0
    for raw in _raw_lines(path):
        if match := _HEAD.match(raw):
            found.setdefault((int(match[1]), "train" if match[2] == b"train" else "eval"), []).append(at)
        elif (line := _parsed(raw)) and line.get("kind") in _KINDS and (u := _whole(line.get("update"))) is not None:
            found.setdefault((u, line["kind"]), []).append(at)
        else:
            damaged += 1
        at += len(raw)
    return found, damaged


def _packed(path: Path, index: Mapping[tuple[int, Kind], Sequence[int]], longest: int) -> dict[str, Any]:
    shelf, structure, damaged = _Shelf(longest), 0, 0
    groups: list[dict[str, Any]] = []
    roles: list[str] = []
    if not index:
        return {"groups": groups, "texts": [], "roles": roles, "damaged": damaged}
    kinds = [sorted(u for u, kind in index if kind == own) for own in _KINDS]
    orders = [[(own[k], kind) for k in _spread(len(own))] for own, kind in zip(kinds, _KINDS, strict=True)]
    newest = [order[0] for order in orders if order]
    queue = [key for pair in zip_longest(*orders) for key in pair if key is not None]
    with path.open("rb") as file:
        for key in queue:
            # The newest updates may be cut to what there is room for; others come whole or not at all.
            room = _BUDGET * (newest.index(key) + 1) // len(newest) if key in newest else _BUDGET
            mark, size, bad, left = shelf.mark(), 0, 0, 0
            episodes: list[list[dict[str, Any]]] = []
            for n, at in enumerate(index[key]):
                file.seek(at)
                before = shelf.mark()
                line = _parsed(file.readline())
                scene = None if line is None else _scene(line, shelf)
                if line is None or scene is None:
                    shelf.back(before)
                    bad += 1
                    continue
                length = len(_script_json(scene)) + 1
                if shelf.size + structure + size + length > room:
                    shelf.back(before)
                    left = len(index[key]) - n
                    break
                size += length
                if not scene["path"] or not episodes:
                    episodes.append([])
                episodes[-1].append(scene)
                if not roles:
                    roles = [_line(role) for role in line["prompts"]]
            if left and key not in newest:
                shelf.back(mark)
                break
            structure, damaged = structure + size, damaged + bad
            groups.append({"update": key[0], "kind": key[1], "left": left, "episodes": episodes})
    groups.sort(key=lambda group: (group["update"], group["kind"]))
    return {"groups": groups, "texts": shelf.texts(), "roles": roles, "damaged": damaged}


def _scene(line: Mapping[str, Any], shelf: _Shelf) -> dict[str, Any] | None:
    """A line of the log as the page wants it, its texts on the shelf; None for a line of another form."""
    item, path, prompts, answers = (line.get(name) for name in ("item", "path", "prompts", "answers"))
    if not isinstance(path, list) or not isinstance(prompts, Mapping) or not isinstance(answers, list):
        return None
    asked = []
    for role, prompt in prompts.items():
        prompt = prompt if isinstance(prompt, Mapping) else {}
        asked.append((shelf.put(role), shelf.put(prompt.get("system")), shelf.put(prompt.get("text"))))
    told = []
    for answer in answers:
        if not isinstance(answer, Mapping):
            return None
        said, parts = answer.get("said"), answer.get("parts")
        said, parts = (value if isinstance(value, Mapping) else {} for value in (said, parts))
        told.append({
            "said": [shelf.put(said.get(role)) for role in prompts],
            "reward": _number(answer.get("reward")),
            "parts": [(shelf.put(name), _number(value)) for name, value in parts.items()],
            **{name: shelf.put(answer[name]) for name in ("feedback", "error") if answer.get(name)},
        })  # fmt: skip
    return {"item": _whole(item), "path": [_whole(j) for j in path], "prompts": asked, "answers": told}


def _spread(count: int) -> Iterator[int]:
    """All of 0 … count - 1, each once: the last, the first, and then ever denser between (van der Corput's order)."""
    bits = max(1, (count - 1).bit_length())
    between = (int(f"{n:0{bits}b}"[::-1], 2) * count >> bits for n in range(1 << bits))
    yield from dict.fromkeys((count - 1, 0, *between) if count else ())


# ---------------------------------------------------------------- files and values that may be anything


def _raw_lines(path: Path) -> Iterator[bytes]:
    """The whole lines of a file; a last one without its end is still being written (or never was finished)."""
    try:
        with path.open("rb") as file:
            for raw in file:
                if raw.endswith(b"\n"):
                    yield raw
    except FileNotFoundError:
        return
    except OSError as error:
        raise EchelonError(f"{path}: {error.strerror or error}") from None


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON objects; others are passed over."""
    return [line for raw in _raw_lines(path) if (line := _parsed(raw)) is not None]


def _parsed(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def _table(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = config.get(name)
    return table if isinstance(table, Mapping) else {}


def _number(value: object) -> float | None:
    """A finite number, or None: JSON of other hands may hold NaN, 1e999 or a word."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53 else None


def _line(value: object) -> str:
    """Any value in one line that isn't long."""
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else text[:199] + "…"
