"""Small helpers for prompts: letters, lines, templates, and text from outside that can't fake structure."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from echelon.errors import EchelonError

__all__ = ["LETTERS", "Block", "PromptTemplate", "clean", "lines", "option_lines"]

LETTERS = string.ascii_uppercase
"""The names of options, in order; a question has at most 26."""

# What chat formats write around messages: <|im_start|>, <s>, [INST], <<SYS>>, <start_of_turn>, …
_MARKERS = re.compile(r"<(?=[|｜<]|/?(?:s|bos|eos|unk|pad|start_of_turn|end_of_turn|think)>)|\[(?=/?INST\])")
_FIELD = re.compile(r"\{\{|\}\}|\{([a-z_][a-z0-9_]*)\}|[{}]")


class Block(str):
    """Text whose lines were laid out by Echelon itself: a template takes it as it is."""

    __slots__ = ()


def clean(value: object) -> str:
    """One line of harmless text: what came from outside keeps its words and loses its structure.

    Line breaks, tabs, control, format and surrogate characters become spaces, runs of white space become
    one, and the opening of a chat format's marker (`<|im_start|>`, `[INST]`, …) gets a space behind it.
    """
    text = "".join(" " if unicodedata.category(c) in _UNSAFE else c for c in str(value))
    return _MARKERS.sub(lambda found: found.group() + " ", " ".join(text.split()))


_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def lines(items: Iterable[object]) -> Block:
    """One line for each item, each one cleaned."""
    return Block("\n".join(clean(item) for item in items))


def option_lines(options: Sequence[str]) -> Block:
    """The options as lines: `A. north`, `B. south`, …

    Raises:
        EchelonError: no option, or more than 26.
    """
    check_options(options)
    return Block("\n".join(f"{LETTERS[i]}. {clean(option)}" for i, option in enumerate(options)))


def check_options(options: Sequence[str]) -> None:
    """Refuse a question that letters can't answer."""
    if not 1 <= len(options) <= len(LETTERS):
        raise EchelonError(f"a question needs 1 to {len(LETTERS)} options, one letter each, not {len(options)}")


@dataclass(frozen=True)
class PromptTemplate:
    """Text with named fields: `{scene}`; `{{` and `}}` stand for braces.

    A field is a plain name: nothing is looked up in a value, formatted or evaluated, and a value's own
    braces mean nothing.

    Args:
        text: the template.
        source: where it came from, for the error's line.

    Raises:
        EchelonError: a brace that opens no field.
    """

    text: str
    source: str = "prompt template"
    fields: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        names = set()
        for found in _FIELD.finditer(self.text):
            if found.group() in "{}":
                line = self.text.count("\n", 0, found.start()) + 1
                raise EchelonError(
                    f"{self.source}, line {line}: a lone {found.group()!r}: a field is written {{name}} "
                    f"in small letters, a brace {found.group() * 2}"
                )
            if found[1]:
                names.add(found[1])
        object.__setattr__(self, "fields", frozenset(names))

    @classmethod
    def from_file(cls, path: Path) -> PromptTemplate:
        """Read a template from a UTF-8 text file; one final line break is dropped."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise EchelonError(f"could not read prompt template {path}: {reason}") from error
        return cls(text.removesuffix("\n"), str(path))

    def render(self, **values: object) -> str:
        """The text with every field filled: a `Block` as it is, anything else as one cleaned line.

        Raises:
            EchelonError: a field without a value, or a value without a field.
        """
        if missing := sorted(self.fields - set(values)):
            raise EchelonError(f"{self.source}: no value for the field {{{missing[0]}}}")
        if unknown := sorted(set(values) - self.fields):
            known = ", ".join(sorted(self.fields)) or "none"
            raise EchelonError(f"{self.source}: no field {{{unknown[0]}}}; its fields are {known}")

        def fill(found: re.Match[str]) -> str:
            if not found[1]:
                return found.group()[0]
            value = values[found[1]]
            return str(value) if isinstance(value, Block) else clean(value)

        return _FIELD.sub(fill, self.text)
