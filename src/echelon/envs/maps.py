"""Maps from files: MovingAI's `.map` format, with optional marks for where things begin."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from echelon.errors import EchelonError

__all__ = ["MapFile", "read_map"]

_FREE = frozenset(".GS")
_WALLS = frozenset("@OTW")
_MAX_SIDE = 256


@dataclass(frozen=True)
class MapFile:
    """A map read from a file.

    Attributes:
        walls: bool `(height, width)`, true where nobody can go.
        marks: cells (row, col) by mark: `A` where agents may start, `P` where tasks may lie (packages,
            machines, targets), `Z` where zones (or tool racks) may be. A mark that isn't in the file leaves
            the choice to the world's seed. The marks are our extension of the format.
    """

    walls: NDArray[np.bool_]
    marks: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    @property
    def height(self) -> int:
        """Rows."""
        return int(self.walls.shape[0])

    @property
    def width(self) -> int:
        """Columns."""
        return int(self.walls.shape[1])


def _header(lines: list[str], name: str, path: Path) -> int:
    for line in lines[:4]:
        words = line.split()
        if len(words) == 2 and words[0] == name and words[1].isdecimal():
            value = int(words[1])
            if not 2 <= value <= _MAX_SIDE:
                raise EchelonError(f"map {path}: {name} is {value}, must be 2 to {_MAX_SIDE}")
            return value
    raise EchelonError(f"map {path}: its first lines must hold '{name} N' (MovingAI format)")


def read_map(path: Path) -> MapFile:
    """Read a MovingAI `.map` file (https://movingai.com/benchmarks/formats.html).

    `.`, `G` and `S` are free, `@`, `O`, `T` and `W` are walls, and our marks `A`, `P`, `Z` are free cells with
    a meaning (`MapFile.marks`).

    Raises:
        EchelonError: no such file, not this format, or marked cells that no path joins.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise EchelonError(f"map {path}: {reason}") from None
    height, width = _header(lines, "height", path), _header(lines, "width", path)
    try:
        start = lines.index("map") + 1
    except ValueError:
        raise EchelonError(f"map {path}: no line 'map' before the rows") from None
    rows = lines[start:]
    while rows and not rows[-1].strip():
        rows.pop()
    if len(rows) != height:
        raise EchelonError(f"map {path}: {len(rows)} rows, but its header says height {height}")
    walls = np.zeros((height, width), bool)
    marks: dict[str, list[tuple[int, int]]] = {}
    for r, row in enumerate(rows):
        if len(row) != width:
            raise EchelonError(f"map {path}: row {r + 1} has {len(row)} cells, its header says width {width}")
        for c, char in enumerate(row):
            if char in _WALLS:
                walls[r, c] = True
            elif char in "APZ":
                marks.setdefault(char, []).append((r, c))
            elif char not in _FREE:
                raise EchelonError(f"map {path}: row {r + 1}, column {c + 1}: unknown cell {char!r}")
    _check_joined(walls, marks, path)
    return MapFile(walls, marks)


def _check_joined(walls: NDArray[np.bool_], marks: dict[str, list[tuple[int, int]]], path: Path) -> None:
    cells = [cell for mark in sorted(marks) for cell in marks[mark]]
    if not cells:
        return
    seen = {cells[0]}
    stack = [cells[0]]
    while stack:
        r, c = stack.pop()
        for n in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
            if 0 <= n[0] < walls.shape[0] and 0 <= n[1] < walls.shape[1] and not walls[n] and n not in seen:
                seen.add(n)
                stack.append(n)
    for mark in sorted(marks):
        for r, c in marks[mark]:
            if (r, c) not in seen:
                first = cells[0]
                raise EchelonError(
                    f"map {path}: the cell {mark!r} at row {r + 1}, column {c + 1} can't be reached from "
                    f"row {first[0] + 1}, column {first[1] + 1}: every task must be reachable"
                )
