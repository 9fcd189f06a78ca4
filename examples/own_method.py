"""A method of one's own: executors learn under random tasks, and are planned for by optimal assignment."""

from echelon.cli import main
from echelon.methods import Method, register

register(Method("random-then-optimal", "trained under random tasks, planned for optimally", "random-task", "hungarian"))

if __name__ == "__main__":
    raise SystemExit(main())
