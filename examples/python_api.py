"""Train rule-goals on a small warehouse, judge it on worlds it never saw, and write a replay."""

from pathlib import Path

from echelon.configs import RunConfig
from echelon.envs import WarehouseConfig
from echelon.evaluation import evaluate
from echelon.reports.replay import write_replay
from echelon.training import Trainer, load_policy


def main(folder: Path, steps: int = 500_000, episodes: int = 200) -> None:
    """Train for `steps` environment steps into `folder`; goes on if there is a run already."""
    config = RunConfig(method="rule-goals", env=WarehouseConfig(size=10, num_agents=2, num_packages=4), steps=steps)
    trainer = Trainer.resume(folder) if folder.exists() else Trainer(config, folder)
    trainer.run(lambda p: print(f"{p.step:,} steps, {p.rate:,.0f} steps/s, TSR {p.metrics['tsr']}"))
    result = evaluate(*load_policy(folder), episodes=episodes, record=3)
    print(result.summary()["tsr"])
    write_replay(folder / "replay.html", result.replay)


if __name__ == "__main__":
    main(Path("runs/python-api"))
