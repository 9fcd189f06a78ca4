"""The table of `benchmarks/seeds.sh`: each method's means over seeds with Student's 95% interval over seeds.

python benchmarks/seeds_table.py runs/seeds > docs/results/seeds.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from echelon.evaluation import mean_interval

INTRODUCTION = """# Five seeds

Made by `benchmarks/seeds.sh` and `benchmarks/seeds_table.py`: 1,000,000 training steps a run, 200 evaluation episodes
on worlds that training never saw; means over seeds with Student's 95% interval over seeds. "Steps to TSR 0.9" is the
first training step at which 0.9 of the last 50 episodes had succeeded.
"""


def cell(values: Iterable[float | None], digits: int) -> str:
    """Mean ± half the interval of what is there, with how many seeds are missing."""
    found = list(values)
    known = [v for v in found if v is not None]
    interval = mean_interval(known)
    if interval is None:
        return "never"
    text = f"{interval.value:,.{digits}f} ± {interval.high - interval.value:,.{digits}f}"
    return text if len(known) == len(found) else f"{text} ({len(known)} of {len(found)} seeds)"


def row(name: str, results: list[dict[str, Any]]) -> str:
    """One method's line."""
    steps = [r["steps_to_finish"] and r["steps_to_finish"]["value"] for r in results]
    cells = [
        name,
        str(len(results)),
        cell([r["tsr"]["value"] for r in results], 3),
        cell(steps, 1),
        cell([r["collisions"]["value"] for r in results], 1),
        cell([r.get("steps_to_tsr_90") for r in results], 0),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the tables."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/seeds")
    print(INTRODUCTION)
    header = ["method", "seeds", "TSR", "steps to finish", "collisions", "steps to TSR 0.9"]
    for env in ("warehouse", "repair", "search"):
        folders = sorted(root.glob(f"{env}-*"))
        if not folders:
            continue
        print(f"## {env}, 20×20, 4 agents\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
        for method in ("rule-goals", "l2m2", "flat-mappo", "random-goals"):
            files = [f / method / "evaluation.json" for f in folders]
            if found := [json.loads(f.read_text()) for f in files if f.exists()]:
                print(row(method, found))
        print()
    moved = [json.loads(f.read_text()) for f in sorted(root.glob("warehouse-*/rule-goals/transfer.json"))]
    if moved:
        print(f"## Transfer: trained at 20×20 with 4 agents, evaluated at 50×50 with 8\n\n| {' | '.join(header)} |")
        print(f"|{'---|' * len(header)}\n{row('rule-goals', moved)}")


if __name__ == "__main__":
    main()
