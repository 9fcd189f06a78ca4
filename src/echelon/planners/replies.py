"""What a language model wrote, read as a plan: whatever the text is, it becomes proposals and a list of faults.

Nothing in a reply is executed, formatted or trusted. The work is bounded: only the first 64 Ki characters are looked
at, each of them at most as often as brackets are allowed to nest, and nothing is read by recursion deeper than that.
What may be wrong with a reply, and what is made of it, is our choice.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from echelon.llm.prompts import clean

__all__ = ["FINDINGS", "LOOK", "Proposal", "Reading", "parse_plan"]

LOOK = 1 << 16
"""Characters of a reply that are looked at."""

_DEPTH = 32  # brackets inside brackets
_FRAGMENTS = 1024  # pieces of JSON that are tried
_ENTRIES = 256  # entries of a plan that are read: four for each robot of the largest team
_WHY = 200
_LARGEST = 10**9

FINDINGS: Mapping[str, str] = {
    "too_long": "the text was longer than what is looked at",
    "too_deep": "brackets nest too deeply; what follows was not looked at",
    "no_json": "no JSON object was found",
    "no_plan": "there was JSON, but no plan in it",
    "several": "more than one plan; the first counts",
    "in_pieces": "the plan's own brackets are broken or missing; its whole entries count",
    "too_many": "more entries than any team has robots; the first ones count",
    "duplicate_key": "an object has a key twice; the last counts",
    "bad_entry": "an entry that is no object, or names no robot, or neither an option nor a cell",
    "loose_number": "a whole number written as 2.0 or as text; it counts",
    "unknown_robot": "a robot that doesn't exist",
    "not_asked": "a robot that exists but wasn't asked about",
    "repeated_robot": "a second entry for a robot; the first counts, whatever it says",
    "missing_robot": "a robot that was asked about and isn't in the plan",
    "both": "an option and a cell; the option counts",
    "bad_option": "an option that wasn't offered, or is no whole number",
    "bad_cell": "a cell that isn't a pair of whole numbers",
    "outside": "a cell outside of the grid",
}
"""Kinds of faults in a reply, and what each means."""

# A string ends with its line: JSON has no line breaks in strings, so an odd quote spoils one line at most. One that
# is not closed is a token too: else each of its quotes would be tried as a beginning.
_TOKEN = re.compile(r'"(?:[^"\\\n]|\\[^\n])*+"?|[{}\[\]]')
_NUMBER = re.compile(r"\s{0,8}\+?[0-9]{1,9}\s{0,8}", re.ASCII)


@dataclass(frozen=True)
class Proposal:
    """What a reply says about one robot: an option, or a cell.

    Attributes:
        option: the number of an option, 0 for waiting, or None.
        cell: (row, col) inside of the grid, or None.
        why: the reason it gave, cleaned, at most 200 characters.
    """

    option: int | None = None
    cell: tuple[int, int] | None = None
    why: str = ""


@dataclass(frozen=True)
class Reading:
    """What was made of a reply.

    Attributes:
        proposals: usable proposals by robot.
        findings: a kind of `FINDINGS` for each fault.
    """

    proposals: dict[int, Proposal]
    findings: list[str]


def parse_plan(text: str, options: Mapping[int, int], robots: int, size: tuple[int, int]) -> Reading:
    """Read a reply: `{"plan": [{"robot": 0, "option": 2}, {"robot": 1, "cell": [4, 7]}]}`, or what resembles it.

    Prose and code fences around it don't matter, nor does what stands before `</think>`. Where the plan's own brackets
    are broken (a reply that was cut off), its whole entries count. About a single robot, `{"goal": {"option": 2}}` or
    `{"option": 2}` will do. An entry may have a `why`.

    Args:
        text: what the model wrote: anything.
        options: the robots that were asked about, each with its number of options (1 to that; 0 is waiting).
        robots: how many there are; they are numbered from 0.
        size: rows and columns of the grid.
    """
    findings: list[str] = []
    if len(text) > LOOK:
        findings.append("too_long")
    # Thoughts hold drafts.
    text = text[:LOOK].rpartition("</think>")[2]
    entries = _entries(text, len(options), findings)
    if len(entries) > _ENTRIES:
        findings.append("too_many")
    proposals: dict[int, Proposal] = {}
    seen: set[int] = set()
    for entry in entries[:_ENTRIES]:
        robot = _robot(entry, options, robots, findings)
        if robot is None:
            continue
        if robot in seen:
            findings.append("repeated_robot")
            continue
        seen.add(robot)
        proposal = _proposal(entry, options[robot], size, findings)
        if proposal is not None:
            proposals[robot] = proposal
    if entries:
        findings += ["missing_robot"] * len(set(options) - seen)
    return Reading(proposals, findings)


def _entries(text: str, asked: int, findings: list[str]) -> list[Any]:
    """The entries of the first plan, unread; none with a finding that says why."""
    objects = _json_objects(text, findings)
    plans = [plan for found in objects if isinstance(plan := found.get("plan"), list)]
    if plans:
        findings += ["several"] * (len(plans) > 1)
        return plans[0]
    inner = [goal if isinstance(goal := found.get("goal"), dict) else found for found in objects]
    alone = [found for found in inner if not found.keys().isdisjoint(("robot", "option", "cell"))]
    if not alone:
        findings.append("no_plan" if objects else "no_json")
    elif asked > 1 or "robot" in alone[0]:
        findings.append("in_pieces")
    # One robot's answer is its first: what a model writes behind it is about somebody else's question.
    return alone if asked > 1 else alone[:1]


def _json_objects(text: str, findings: list[str]) -> list[dict[str, Any]]:
    """The JSON objects in a text, the outermost that can be read, in their order: also those inside of what can't be,
    since a plan's whole entries count."""
    spans, deep = _spans(text)
    findings += ["too_deep"] * deep
    objects: list[dict[str, Any]] = []
    end = 0
    for start, stop in spans[:_FRAGMENTS]:
        if start < end:
            continue  # inside of one that was read
        twice: list[str] = []

        def unique(pairs: list[tuple[str, Any]], twice: list[str] = twice) -> dict[str, Any]:
            found = dict(pairs)
            if len(found) < len(pairs):
                twice.append("duplicate_key")
            return found

        try:
            # Not strict: control characters in a reason are no reason to lose a plan.
            found = json.loads(text[start:stop], object_pairs_hook=unique, parse_int=_int, strict=False)
        except (ValueError, RecursionError):
            continue
        objects.append(found)
        findings += twice
        end = stop
    return objects


def _spans(text: str) -> tuple[list[tuple[int, int]], bool]:
    """Where braces open and close, by their beginning; and whether brackets nest too deeply, where it ends.

    A brace that is never closed hides nothing: the pairs inside of it are found.
    """
    spans: list[tuple[int, int]] = []
    stack: list[int] = []  # its bottom is a brace
    at = 0
    while True:
        if not stack:
            # Quotes in prose mean nothing.
            at = text.find("{", at)
            if at < 0:
                break
            stack.append(at)
            at += 1
            continue
        token = _TOKEN.search(text, at)
        if token is None:
            break
        at, mark = token.end(), text[token.start()]
        if mark in "{[":
            if len(stack) == _DEPTH:
                return sorted(spans), True
            stack.append(token.start())
        elif mark == "]":
            if text[stack[-1]] == "[":
                stack.pop()
        elif mark == "}":
            while text[stack[-1]] == "[":
                stack.pop()
            spans.append((stack.pop(), at))
    return sorted(spans), False


def _int(digits: str) -> int | float:
    """A whole number; one of hundreds of digits is none, at no cost."""
    return int(digits) if len(digits) < 12 else math.nan


def _whole(value: object, findings: list[str]) -> int | None:
    """A whole number below a thousand million either way, or None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value if abs(value) < _LARGEST else None
    if isinstance(value, float) and value.is_integer() and abs(value) < _LARGEST:
        findings.append("loose_number")
        return int(value)
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        findings.append("loose_number")
        return int(value)
    return None


def _robot(entry: object, options: Mapping[int, int], robots: int, findings: list[str]) -> int | None:
    """Which of the robots that were asked about an entry is about."""
    if not isinstance(entry, dict) or ("robot" not in entry and len(options) > 1):
        findings.append("bad_entry")
        return None
    if "robot" not in entry:
        return next(iter(options), None)
    robot = _whole(entry["robot"], findings)
    if robot is None or not 0 <= robot < robots:
        findings.append("unknown_robot")
        return None
    if robot not in options:
        findings.append("not_asked")
        return None
    return robot


def _proposal(entry: dict[str, Any], most: int, size: tuple[int, int], findings: list[str]) -> Proposal | None:
    """What an entry proposes, if it is one of `most` options or a cell of the grid."""
    why = entry.get("why")
    why = clean(why[: 4 * _WHY])[:_WHY] if isinstance(why, str) else ""
    option, cell = entry.get("option"), entry.get("cell")
    if option is not None:
        if cell is not None:
            findings.append("both")
        number = _whole(option, findings)
        if number is None or not 0 <= number <= most:
            findings.append("bad_option")
            return None
        return Proposal(option=number, why=why)
    if cell is None:
        findings.append("bad_entry")
        return None
    pair = [_whole(x, findings) for x in cell] if isinstance(cell, list) and len(cell) == 2 else [None, None]
    row, col = pair
    if row is None or col is None:
        findings.append("bad_cell")
        return None
    if not (0 <= row < size[0] and 0 <= col < size[1]):
        findings.append("outside")
        return None
    return Proposal(cell=(row, col), why=why)
