"""A planner of one's own: everybody goes to the farthest task, so that one sees what a bad plan costs."""

import numpy as np

from echelon.cli import main
from echelon.envs.kernels import UNREACHABLE
from echelon.planners import StatelessPlanner, register
from echelon.subgoals import Plan


class Farthest(StatelessPlanner):
    """Two agents may well want one task: the safety check sends one back, and `refused` says what was refused."""

    name = "farthest"
    needs_distance = True  # fill in request.distance, path lengths (worlds, agents, candidates)

    def plan(self, request):
        """One candidate an agent, or -1 to wait; read only where `request.need` is true."""
        waits = request.candidates.kind <= 0
        usable = ~waits & ~request.refused & (request.distance != UNREACHABLE)
        length = np.where(usable, request.distance.astype(np.int64), -1)
        return Plan.chosen(request, np.where(usable.any(2), length.argmax(2), -1))


register("farthest", Farthest)

if __name__ == "__main__":
    raise SystemExit(main())
