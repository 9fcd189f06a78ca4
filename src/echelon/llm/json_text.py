"""JSON in what a model wrote: what can be read, and what can't with the reason."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from echelon.llm.prompts import clean

__all__ = ["JsonPiece", "json_pieces", "why_no_json"]

_PIECES = 256  # places where JSON begins that are tried
_INSIDE = 16  # ... behind the first one that is never closed: each may read all that follows
_DIGITS = 300  # of a whole number; one of more is larger than any float
# What prose doesn't begin with by chance: "{x}" and "[see below]" are words.
_BEGINS = {
    "{": re.compile(r"""\{\s*+(?:["'}]|[\w-]{1,64}+\s*+:|\Z)"""),
    "[": re.compile(r"""\[\s*+(?:["'\]\[{]|-?\d|true|false|null|NaN|-?Infinity|\Z)"""),
}
# A string ends with its line at the latest, so that an odd quote spoils one line at most.
_MARKS = {
    "{": re.compile(r'"(?:[^"\\\n]|\\[^\n])*+"?|[{}]'),
    "[": re.compile(r'"(?:[^"\\\n]|\\[^\n])*+"?|[\[\]]'),
}


@dataclass(frozen=True)
class JsonPiece:
    """One outermost object or list.

    Attributes:
        text: as it is written; where `fault` isn't None, what there is of it.
        value: what it says.
        fault: why it can't be read, in a few clean words, or None.
    """

    text: str
    value: Any = None
    fault: str | None = None


def json_pieces(text: str, openings: str = "{[", *, strict: bool = True) -> Iterator[JsonPiece]:
    """The objects and lists in a text, the outermost ones in their order; also those that can't be read.

    Words around them and code fences don't matter, nor does what stands before `</think>`. What is inside of one that
    is closed, but can't be read, is no piece. Where one is never closed, what follows comes after it: another answer,
    or parts of the one that broke off. Work grows with the text's length alone.

    Args:
        text: what a model wrote: anything.
        openings: what is looked for: "{" objects, "[" lists, or both.
        strict: control characters in strings are faults.
    """
    text = text.rpartition("</think>")[2]
    decoder = json.JSONDecoder(parse_constant=_no_constant, parse_int=_int, strict=strict)
    begins = re.compile("|".join(_BEGINS[opening].pattern for opening in openings))
    at, left = 0, _PIECES
    while left > 0:
        left -= 1
        found = begins.search(text, at)
        if found is None:
            return
        start = found.start()
        try:
            value, at = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            end = _end(text, start)
            yield JsonPiece(text[start:end], None, _fault(error, text, end))
            if end is None:
                at, left = start + 1, min(left, _INSIDE)
            else:
                at = end
        else:
            yield JsonPiece(text[start:at], value)


def why_no_json(text: str, openings: str = "{[") -> str:
    """What to tell a model in whose text no piece is whole, in a few words; for the arguments see `json_pieces`."""
    return next((piece.fault for piece in json_pieces(text, openings) if piece.fault is not None), "it holds no JSON")


def _fault(error: ValueError | RecursionError, text: str, end: int | None) -> str:
    if isinstance(error, RecursionError):
        return "brackets nest too deeply"
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    if end is None and (error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")):
        return "the JSON breaks off"
    return f"it is not JSON: {error.msg.removesuffix(' at')} near {clean(text[error.pos : error.pos + 24])!r}"


def _end(text: str, start: int) -> int | None:
    """Where what opens at `start` is closed, or None."""
    opening, depth, at = text[start], 0, start
    while token := _MARKS[opening].search(text, at):
        at, mark = token.end(), token.group()
        if mark[0] != '"':
            depth += 1 if mark == opening else -1
            if depth == 0:
                return at
    return None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON: a number must be finite")


def _int(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError("a number has too many digits")
    return int(digits)
