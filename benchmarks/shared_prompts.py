"""What it saves that replies to one prompt go through the model behind a prompt that is computed once.

Log-probabilities and gradients of G replies to each of some prompts of the writing task, with the prompts shared and
without, in one process; processor seconds, the least of some rounds.

    OMP_NUM_THREADS=1 python benchmarks/shared_prompts.py --model smollm2-135m
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from echelon.llm.token_policy import TokenPolicy, TokenSample
from echelon.tasks import WritingTask


def spent(policy: TokenPolicy, samples: list[TokenSample]) -> tuple[float, float]:
    """Processor seconds of `evaluate` and of `backward`."""
    start = time.process_time()
    numbers = policy.evaluate(samples)
    middle = time.process_time()
    policy.backward(samples, [np.ones_like(own) for own in numbers])
    end = time.process_time()
    for p in policy.parameters():
        p.grad = None
    return middle - start, end - middle


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    policy, task = TokenPolicy.load(args.model, micro_tokens=2048), WritingTask()
    prompts = [task.prompts(i, ())[0] for i in range(args.prompts)]
    samples = policy.sample(prompts, args.group, max_tokens=args.tokens, keys=range(args.prompts))
    found: dict[bool, tuple[float, ...]] = {}
    for shares in (False, True) * args.rounds:
        policy._shares = shares
        now = spent(policy, samples)
        found[shares] = tuple(map(min, now, found.get(shares, now)))
    lengths = (
        f"prompts {[len(s.prompt_ids) for s in samples[:: args.group]]}, G {args.group}, up to {args.tokens} tokens"
    )
    print(f"{args.model}, {lengths}")
    for name, alone, shared in zip(("evaluate", "backward"), found[False], found[True], strict=True):
        print(f"{name}: {alone:.2f} s alone, {shared:.2f} s shared, {alone / shared:.2f} times as fast")


if __name__ == "__main__":
    main()
