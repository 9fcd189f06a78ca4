"""The tables of a study that the README and docs/results quote, in Markdown.

python benchmarks/study_table.py docs/results/medium/results.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from echelon.studies.analysis import analyse

Cell = dict[str, Any]


def success(cell: Cell) -> str:
    """The TSR with its interval."""
    t = cell["tsr"]
    return "-" if t is None else f"{t['value']:.3f} [{t['low']:.3f}, {t['high']:.3f}]"


def makespan(cell: Cell) -> str:
    """Steps until an episode ends, failures at the limit."""
    m = cell["makespan"]
    if m is None:
        return "-"
    # One run has no interval.
    return f"{m['value']:.1f}" + ("" if m["high"] is None else f" ± {m['high'] - m['value']:.1f}")


def convergence(cell: Cell) -> str:
    """Steps of training to convergence, and how many of the runs got there."""
    c = cell["convergence"]
    if c is None or c["steps"] is None:
        return "-"
    if c["converged"] == 0:
        return "never"
    return f"{c['steps']['value']:,.0f} ({c['converged']} of {c['runs']})"


def table(analysis: dict[str, Any], show: Any) -> str:
    """Methods by places."""
    cells = analysis["cells"]
    places = list(dict.fromkeys((c["environment"], c["size"], c["agents"]) for c in cells))
    header = [f"{e} {s}×{s}, {a} agents" for e, s, a in places]
    lines = [f"| method | {' | '.join(header)} |", f"|---|{'---|' * len(places)}"]
    for name in dict.fromkeys(c["method"] for c in cells):
        found = {(c["environment"], c["size"], c["agents"]): show(c) for c in cells if c["method"] == name}
        lines.append(f"| {name} | {' | '.join(found.get(place, '-') for place in places)} |")
    return "\n".join(lines)


def claims(analysis: dict[str, Any]) -> str:
    """The claims with their verdicts."""
    lines = ["| claim | paper | here | verdict |", "|---|---|---|---|"]
    lines += [
        f"| {c['claim']} | {c['paper']} | {c['ours']} | **{c['verdict']}** |" for c in analysis["claims"] if c["runs"]
    ]
    return "\n".join(lines)


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Every table of a study by its title."""
    analysis = analyse(results)
    return {
        "Claims": claims(analysis),
        "Task success rate [95% interval]": table(analysis, success),
        "Steps until an episode ends ± 95% over runs": table(analysis, makespan),
        "Training steps to convergence (runs that got there)": table(analysis, convergence),
    }


def main() -> None:
    """Print every table of the study in the file that was named."""
    for title, text in tables(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))).items():
        print(f"## {title}\n\n{text}\n")


if __name__ == "__main__":
    main()
