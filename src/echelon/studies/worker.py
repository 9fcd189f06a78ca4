"""A worker process of the pool: `python -m echelon.studies.worker`, one job a line in, one outcome a line out."""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Do jobs until there are no more, or whoever gives them is gone."""
    parent = os.getppid()
    # What a job prints must not get between the outcomes.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from echelon.studies.work import execute

    for line in sys.stdin:
        outcome = execute(json.loads(line), orphaned=lambda: os.getppid() != parent)
        try:
            print(json.dumps(outcome), file=out, flush=True)
        except BrokenPipeError:
            return


if __name__ == "__main__":
    main()
