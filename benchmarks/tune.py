"""The trials by which learning methods were tuned, one line of a table each; every method had as many.

python benchmarks/tune.py qmix          # those of QMIX and VDN, on one thread; OMP_NUM_THREADS=1 for numbers like ours
python benchmarks/tune.py flat-mappo    # those of MAPPO, whose settings the hierarchies share

Each trains a flat team in the default warehouse (20x20, 4 agents, 8 packages) from one seed, and is judged on 200
episodes that training never saw, at half of its steps and at the end, by its most probable actions (a value network's
best) and as it acts by default (drawn; a value network with 0.05 of its actions random): the TSR, and the packages
delivered of 8. Steps a second are those of training alone.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Any

from echelon.configs import RunConfig
from echelon.evaluation import evaluate
from echelon.training import Rollouts


def settings(batch: int, replay: float, lr: float, lam: float, tau: float, **more: Any) -> dict[str, Any]:
    """Settings by name; what isn't told is as the trials had it."""
    usual = {"hidden": 128, "rollout": 16, "epsilon_steps": 100_000, "epsilon_end": 0.05, "memory": 200_000}
    return {"batch": batch, "replay": replay, "lr": lr, "lam": lam, "tau": tau, **usual, **more}


QMIX: list[tuple[str, int, int, int, dict[str, Any]]] = [
    # method, steps, worlds, seed, settings of the algorithm
    ("qmix", 1_000_000, 128, 0, settings(2048, 2.0, 5e-4, 0.6, 0.01, epsilon_steps=200_000)),
    ("vdn", 400_000, 128, 0, settings(2048, 2.0, 5e-4, 0.6, 0.01)),
    ("vdn", 400_000, 128, 0, settings(2048, 2.0, 5e-4, 0.0, 0.01)),
    # From here on the last layer begins near 0 (gain 0.01; 1 before).
    ("vdn", 300_000, 128, 0, settings(256, 2.0, 5e-4, 0.8, 0.02)),
    ("qmix", 300_000, 128, 0, settings(256, 2.0, 5e-4, 0.8, 0.02)),
    ("qmix", 1_000_000, 128, 0, settings(256, 2.0, 5e-4, 0.8, 0.01, hidden=64, epsilon_end=0.1)),
    ("qmix", 1_000_000, 128, 0, settings(256, 1.0, 5e-4, 0.6, 0.01)),
    ("qmix", 1_000_000, 128, 0, settings(256, 1.0, 1e-3, 0.8, 0.02)),
    ("qmix", 1_000_000, 128, 0, settings(512, 2.0, 5e-4, 0.8, 0.02)),
    ("qmix", 1_000_000, 256, 0, settings(512, 2.0, 1e-3, 0.9, 0.02)),
    ("vdn", 1_000_000, 256, 0, settings(256, 1.0, 1e-3, 0.8, 0.02)),
    ("vdn", 1_000_000, 256, 0, settings(512, 2.0, 1e-3, 0.9, 0.02)),
    # Other seeds, longer.
    ("qmix", 2_000_000, 256, 1, settings(512, 2.0, 1e-3, 0.9, 0.02)),
    ("vdn", 2_000_000, 256, 1, settings(512, 2.0, 1e-3, 0.9, 0.02)),
    ("vdn", 2_000_000, 256, 1, settings(256, 1.0, 1e-3, 0.8, 0.02)),
    ("qmix", 2_000_000, 256, 1, settings(256, 1.0, 1e-3, 0.8, 0.02)),
]

M = 1_000_000
MAPPO: list[tuple[str, int, int, int, dict[str, Any]]] = [
    ("flat-mappo", M, 256, 0, {}),
    ("flat-mappo", M, 256, 0, {"lr": 1e-4}),
    ("flat-mappo", M, 256, 0, {"lr": 6e-4}),
    ("flat-mappo", M, 256, 0, {"lr": 1e-3}),
    ("flat-mappo", M, 256, 0, {"entropy": 0.003}),
    ("flat-mappo", M, 256, 0, {"entropy": 0.03}),
    ("flat-mappo", M, 256, 0, {"rollout": 16}),
    ("flat-mappo", M, 256, 0, {"rollout": 64}),
    ("flat-mappo", M, 256, 0, {"epochs": 8}),
    ("flat-mappo", M, 128, 0, {}),
    ("flat-mappo", M, 64, 0, {}),
    ("flat-mappo", M, 128, 0, {"lr": 6e-4, "rollout": 64}),
    # Another seed, longer.
    ("flat-mappo", 2 * M, 256, 1, {}),
    ("flat-mappo", 2 * M, 128, 1, {}),
    ("flat-mappo", 2 * M, 256, 1, {"lr": 6e-4}),
    ("flat-mappo", 2 * M, 64, 1, {}),
]


def trial(method: str, steps: int, num_envs: int, seed: int, changes: dict[str, Any]) -> str:
    """Train and judge; a line of the table."""
    algorithm = dataclasses.replace(RunConfig(method=method).algorithm, **changes)
    config = RunConfig(method=method, algorithm=algorithm, steps=steps, num_envs=num_envs, seed=seed, threads=1)
    rollouts = Rollouts(config)
    rollouts.worlds.start()
    done, seconds, tsr = 0, 0.0, []
    for goal in (steps // 2, steps):
        start = time.perf_counter()
        while done < goal:
            rollouts.learn(rollouts.collect())
            done += rollouts.steps_per_update
        seconds += time.perf_counter() - start
        policy = rollouts.algorithm.state_dict(policy_only=True)
        for greedy in (True, False):
            result = evaluate(config, policy, episodes=200, seed=seed, greedy=greedy)
            assert result is not None
            tsr.append(f"{result.success.mean():.3f} ({result.task_return.mean():.2f})")
    told = ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in changes.items()) or "the defaults"  # fmt: skip
    return f"| {method} | {told} | {num_envs} | {steps:,} | {seed} | {' | '.join(tsr)} | {done / seconds:,.0f} |"


def main() -> None:
    """Run the trials that were asked for: of which method, and perhaps from which to which."""
    trials = {"qmix": QMIX, "flat-mappo": MAPPO}[sys.argv[1]]
    first, last = (int(x) for x in sys.argv[2:4]) if len(sys.argv) > 3 else (0, len(trials))
    print("| method | settings | worlds | steps | seed | half, best | half, drawn | end, best | end, drawn | steps/s |")
    print(f"|{'---|' * 10}")
    for each in trials[first:last]:
        print(trial(*each), flush=True)


if __name__ == "__main__":
    main()
