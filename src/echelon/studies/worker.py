"""A worker process of the pool: `python -m echelon.studies.worker PID`, a job a line in, an outcome a line out.

PID is the process that gives the jobs; a worker whose parent is another one has been orphaned.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Do jobs until there are no more, or whoever gives them is gone."""
    parent = int(sys.argv[1])
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
