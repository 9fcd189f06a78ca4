"""A study of one's own, of a method of one's own: does it help to plan for the whole team anew every 5 steps?"""

from pathlib import Path

from echelon.evaluation.protocol import Protocol
from echelon.methods import Method, register
from echelon.studies import PoolBackend, Study, run_study
from echelon.studies.analysis import analyse

EVERY_5 = {"subgoals": {"every": 5, "scope": "team"}}
register(Method("hasty-goals", "rule-goals, planned anew all the time", "hungarian", "hungarian", settings=EVERY_5))


def main(folder: Path, steps: int = 300_000, episodes: int = 320) -> None:
    """Do the runs that aren't done yet, two at a time; print each method's success rate over runs."""
    study = Study(
        "hasty",
        methods=("rule-goals", "hasty-goals"),
        steps=steps,
        imports=(__file__,),  # runs are done by other processes: they must know the method, too
        protocol=Protocol(every=max(1, steps // 20), episodes=32, final_episodes=episodes),
        settings={"run": {"num_envs": 64}},
    )
    backend = PoolBackend(2)
    try:
        results = run_study(study, folder, backend, report=lambda matrix: [print(line) for line in matrix.news])
    finally:
        backend.close()
    for cell in analyse(results)["cells"]:
        print(f"{cell['method']}: TSR {cell['tsr']}, makespan {cell['makespan']}")


if __name__ == "__main__":
    main(Path("studies/hasty"))
