"""Training speed of MAPPO: environment steps a second, and where the time goes.

The shape of the project's speed goal: 256 worlds x 8 agents, 20x20, two hidden layers of 128 in actor and critic,
rollouts of 32 steps, 4 epochs x 4 minibatches. All cases run in one process, in turns, so that their ratios hold on
a noisy machine; each figure is the median of its updates.

    python benchmarks/bench_training.py [--updates 8] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from pathlib import Path

from echelon.algorithms import MAPPOConfig
from echelon.configs import RunConfig
from echelon.envs import WarehouseConfig
from echelon.evaluation.speed import training_speed
from echelon.networks import fast_bfloat16


def cases(agents: int) -> dict[str, RunConfig]:
    """What is measured."""
    env = WarehouseConfig(num_agents=agents)
    precisions = ["float32", "bfloat16"] if fast_bfloat16() else ["float32"]
    found = {}
    for precision in precisions:
        algorithm = MAPPOConfig(precision=precision)  # type: ignore[arg-type]
        found[f"flat-mappo {precision}"] = RunConfig(method="flat-mappo", env=env, algorithm=algorithm)
        found[f"rule-goals {precision}"] = RunConfig(method="rule-goals", env=env, algorithm=algorithm)
    best = MAPPOConfig(recurrent=True)
    found["flat-mappo recurrent"] = RunConfig(method="flat-mappo", env=env, algorithm=best)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=8, help="updates that count, a case and round (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, help="turns through all cases (default: 3)")
    parser.add_argument("--agents", type=int, default=8, help="agents a world (default: 8)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    rates: dict[str, list[float]] = {}
    shares: dict[str, dict[str, float]] = {}
    for _ in range(args.rounds):
        for name, config in cases(args.agents).items():
            rate, shares[name] = training_speed(config, updates=args.updates)
            rates.setdefault(name, []).append(rate)
    base = statistics.median(rates["flat-mappo float32"])
    machine = f"{os.cpu_count()} cores, {platform.machine()}, 256 worlds x {args.agents} agents"
    print(f"{machine}\n{'case':<24}{'steps/s':>10}{'min':>10}{'max':>10}{'ratio':>8}  where the time goes")
    for name, found in rates.items():
        rate = statistics.median(found)
        where = " ".join(f"{stage} {share:.0%}" for stage, share in shares[name].items())
        print(f"{name:<24}{rate:>10,.0f}{min(found):>10,.0f}{max(found):>10,.0f}{rate / base:>8.2f}  {where}")
    if args.json is not None:
        result = {"machine": machine, "steps_per_second": rates, "shares": shares}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
