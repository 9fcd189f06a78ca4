"""What learning still lacks to the classical planner: the makespan of `rule-goals` against that of `classical`.

Both get their subgoals from the same optimal assignment and play the same worlds (20x20, 4 robots, 8 packages); one
moves by what it has learnt from what it sees, the other by PIBT over the whole map. The makespan is the steps until
every package is delivered, the time limit where that fails. A ratio is of mean makespans over the same worlds; its
interval is a 95% bootstrap over pairs of episodes, drawn within each seed, and, over seeds, Student's.

Both are measured with subgoals for the agents that need one, with the whole team assigned afresh whenever one agent
needs a subgoal, and with the whole team assigned afresh before every step. How high the classical ceiling is shows in
the least makespan of all plans: packages shared out and ordered at best, robots that can pass through each other
(exact, by dynamic programming over sets of packages).

    python benchmarks/classical_gap.py [--seeds 3] [--steps 1000000] [--episodes 320] [--runs DIR] [--out FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from echelon.configs import RunConfig
from echelon.envs import make
from echelon.envs.kernels import distance_field
from echelon.evaluation import mean_interval
from echelon.evaluation.episodes import EpisodeResults, evaluate, evaluation_seed
from echelon.runs import load_policy, steps_done
from echelon.subgoals import SubgoalConfig
from echelon.training import Trainer

TARGET = 1.25
SCOPES = {
    "": SubgoalConfig(),
    ", whole team": SubgoalConfig(scope="team"),
    ", whole team at every step": SubgoalConfig(scope="team", every=1),
}


def trained(seed: int, steps: int, folder: Path) -> RunConfig:
    """`rule-goals` trained with that seed in `folder`, now or earlier."""
    run = RunConfig(method="rule-goals", seed=seed, steps=steps)
    if not (folder / "config.toml").exists():
        Trainer(run, folder).run()
    elif steps_done(folder) < steps:
        Trainer.resume(folder, steps=steps).run()
    return run


def makespan_ratio(top: Sequence[NDArray[np.int64]], base: Sequence[NDArray[np.int64]]) -> dict[str, Any]:
    """The ratio of mean makespans; int arrays `(episodes,)` a seed, entry i of both from the same world."""
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(t), (10_000, len(t))) for t in top]
    means = [sum(x[draw].mean(1) for x, draw in zip(side, draws, strict=True)) for side in (top, base)]
    low, high = np.quantile(means[0] / means[1], [0.025, 0.975])
    of_seeds = [float(t.mean() / b.mean()) for t, b in zip(top, base, strict=True)]
    over_seeds = mean_interval(of_seeds)
    assert over_seeds is not None
    return {
        "value": float(np.concatenate(top).mean() / np.concatenate(base).mean()),
        "low": float(low),
        "high": float(high),
        "by_seed": of_seeds,
        "over_seeds": vars(over_seeds),
    }


def least_makespans(seed: int, episodes: int) -> NDArray[np.int64]:
    """A lower bound on the makespan in each evaluation world of a seed, int `(episodes,)`."""
    env = make("warehouse", RunConfig().env, num_envs=episodes, seed=evaluation_seed(seed))
    queue = np.zeros(env.num_cells, np.int32)

    def lengths(world: int, source: int) -> NDArray[np.int64]:
        field = np.zeros(env.num_cells, np.uint16)
        distance_field(field, env.grid[world], source, env.stride, queue)
        return field.astype(np.int64)

    found = []
    for w in range(episodes):
        packages = env.task_cell[w]
        zones = [np.array([env.cell_index(*cell) for cell in zone.cells]) for zone in env.scene(w).zones]
        of_package = [next(cells for cells in zones if goal in cells) for goal in env.task_goal[w]]
        fields = np.stack([lengths(w, int(cell)) for cell in packages])
        start = fields[:, env.pos[w]].T
        home = np.array([fields[p, cells].min() for p, cells in enumerate(of_package)])
        # From package p by way of the best cell of its zone to package q.
        way = np.stack([(fields[p, cells] + fields[:, cells]).min(1) for p, cells in enumerate(of_package)])
        found.append(_share_out(start, home, way))
    return np.array(found)


@numba.njit
def _share_out(start, home, way):  # type: ignore[no-untyped-def]
    """The least time in which agents deliver all tasks, one at a time each: int64 arrays (A, T), (T,), (T, T)."""
    agents, tasks = start.shape
    never = np.int64(1) << 40
    sets = 1 << tasks
    best = np.full(sets, never)  # by the agents so far, for each set of tasks
    best[0] = 0
    for a in range(agents):
        last = np.full((sets, tasks), never)  # this agent has taken up all of a set, the last one just now
        alone = np.full(sets, never)
        alone[0] = 0
        for s in range(1, sets):
            for t in range(tasks):
                if not s >> t & 1:
                    continue
                rest = s ^ (1 << t)
                if rest == 0:
                    last[s, t] = start[a, t]
                for u in range(tasks):
                    if rest >> u & 1:
                        last[s, t] = min(last[s, t], last[rest, u] + way[u, t])
                alone[s] = min(alone[s], last[s, t] + home[t])
        together = np.full(sets, never)
        for s in range(sets):
            mine = s
            while True:
                together[s] = min(together[s], max(alone[mine], best[s ^ mine]))
                if mine == 0:
                    break
                mine = (mine - 1) & s
        best = together
    return best[sets - 1]


def told(results: Sequence[EpisodeResults]) -> dict[str, Any]:
    """What came of one case over all seeds."""
    makespan = mean_interval([float(r.steps.mean()) for r in results])
    assert makespan is not None
    return {
        "makespan": vars(makespan),
        "makespan_by_seed": [float(r.steps.mean()) for r in results],
        "tsr": float(np.mean([r.success.mean() for r in results])),
        "collisions": float(np.mean([r.collisions.mean() for r in results])),
        "subgoals_timed_out": float(np.mean([r.plans["timed_out"] / len(r.steps) for r in results])),
    }


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds, from 0 (default: 3)")
    parser.add_argument("--steps", type=int, default=1_000_000, help="training steps a seed (default: 1000000)")
    parser.add_argument("--episodes", type=int, default=320, help="episodes a seed (default: 320)")
    parser.add_argument("--runs", type=Path, help="keep the trained runs here, and use those that are there")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    results: dict[str, list[EpisodeResults]] = {}

    def play(name: str, run: RunConfig, policy: Any = None, greedy: bool = False) -> None:
        result = evaluate(run, policy, episodes=args.episodes, greedy=greedy)
        assert result is not None
        results.setdefault(name, []).append(result)

    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(args.seeds):
            folder = (args.runs or Path(temporary)) / f"rule-goals-{seed}"
            run = trained(seed, args.steps, folder)
            policy = load_policy(folder)[1]
            for scope, subgoals in SCOPES.items():
                play(f"rule-goals{scope}", dataclasses.replace(run, subgoals=subgoals), policy)
                play(f"rule-goals{scope}, greedy", dataclasses.replace(run, subgoals=subgoals), policy, greedy=True)
                play(f"classical{scope}", RunConfig(method="classical", seed=seed, subgoals=subgoals))
    steps = {name: [r.steps for r in found] for name, found in results.items()}
    least = [least_makespans(seed, args.episodes) for seed in range(args.seeds)]
    assert all((s >= bound).all() for found in steps.values() for s, bound in zip(found, least, strict=True))
    pairs = [(f"rule-goals{scope}{how}", f"classical{scope}") for how in ("", ", greedy") for scope in SCOPES]
    pairs += [("rule-goals", f"classical{scope}") for scope in SCOPES if scope]
    pairs += [(f"classical{scope}", "classical") for scope in SCOPES if scope]
    ratios = {f"{top} / {base}": makespan_ratio(steps[top], steps[base]) for top, base in pairs}
    for name in ("rule-goals", *(f"classical{scope}" for scope in SCOPES)):
        ratios[f"{name} / least possible"] = makespan_ratio(steps[name], least)
    print(f"{'case':<52}{'makespan':>10}{'TSR':>8}{'collisions':>12}")
    cases = {name: told(found) for name, found in results.items()}
    for name, case in cases.items():
        print(f"{name:<52}{case['makespan']['value']:>10.1f}{case['tsr']:>8.3f}{case['collisions']:>12.1f}")
    print(f"{'least possible':<52}{np.mean(least):>10.1f}\n")
    for name, ratio in ratios.items():
        print(f"{name:<80}{ratio['value']:>7.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]")
    if args.out is not None:
        command = " ".join(["python", "benchmarks/classical_gap.py", *sys.argv[1:]])
        result = {
            "command": command,
            "environment": "warehouse, 20x20, 4 agents, 8 packages",
            "seeds": args.seeds,
            "training_steps": args.steps,
            "episodes_per_seed": args.episodes,
            "target": TARGET,
            "cases": cases,
            "least possible makespan": float(np.mean(least)),
            "ratios": ratios,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
