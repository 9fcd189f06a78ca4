"""Steps a second of each world on one core: random legal moves, observations and resets included.

python benchmarks/bench_envs.py [--worlds 256 1] [--sizes 20 50] [--agents 8] [--seconds 2]
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np

from echelon.envs import environments, make


def legal_moves(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random legal move for each agent, int8 `(W, A)`."""
    return np.argmax(mask * rng.random(mask.shape, np.float32), axis=2).astype(np.int8)


def measure(name: str, worlds: int, size: int, agents: int, seconds: float) -> float:
    """World steps a second, the best of some rounds; drawing the moves isn't counted."""
    env = make(name, num_envs=worlds, size=size, num_agents=agents)
    rng = np.random.default_rng(0)
    for _ in range(20):  # compile, and spread the agents
        env.step(legal_moves(env.action_mask, rng))
    best, stop = 0.0, time.perf_counter() + seconds
    rounds = max(1, 20_000 // worlds)
    while time.perf_counter() < stop:
        spent = 0.0
        for _ in range(rounds):
            moves = legal_moves(env.action_mask, rng)
            start = time.perf_counter()
            env.step(moves)
            spent += time.perf_counter() - start
        best = max(best, rounds * worlds / spent)
    return best


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[256, 1])
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--agents", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each line")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(f"{args.agents} agents, one core, random legal moves, observations and resets included")
    print(f"{'world':<12}{'size':>8}{'worlds':>8}{'steps/s':>14}{'agent steps/s':>16}")
    for name in environments():
        for size in args.sizes:
            for worlds in args.worlds:
                rate = measure(name, worlds, size, args.agents, args.seconds)
                print(f"{name:<12}{f'{size}x{size}':>8}{worlds:>8}{rate:>14,.0f}{rate * args.agents:>16,.0f}")


if __name__ == "__main__":
    main()
