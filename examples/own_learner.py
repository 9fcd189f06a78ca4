"""A model of one's own that learns to plan: whatever gives numbers and takes their gradient. This one is a table."""

import numpy as np
import torch

from echelon.algorithms import HiMAC, HiMACConfig
from echelon.algorithms.decisions import Decisions

STEPS = {"near": 3, "far": 9, "farthest": 20}


class Table:
    """A number for each item; a language model gives the log-odds of a question in the same way."""

    def __init__(self, items):
        self.place = {item: i for i, item in enumerate(items)}
        self.numbers = torch.zeros(len(items), requires_grad=True)
        self.optimizer = torch.optim.Adam([self.numbers], lr=0.3)

    def evaluate(self, items):
        """By item its numbers, float32 (1, 1)."""
        return [self.numbers.detach().numpy()[[[self.place[item]]]] for item in items]

    def reference(self, items):
        """The same as it was when learning began."""
        return [np.zeros((1, 1), np.float32) for _ in items]

    def backward(self, items, grads):
        """Add the gradient of sum(grads * numbers)."""
        sum(float(g.sum()) * self.numbers[self.place[item]] for item, g in zip(items, grads, strict=True)).backward()

    def step(self):
        """One step of the optimiser; the gradient's norm."""
        norm = float(self.numbers.grad.norm())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


def main(updates=30):
    """Eight robots at a time choose among three ways, whose lengths nobody told them."""
    policy, draws = Table(STEPS), np.random.default_rng(0)
    learner = HiMAC(HiMACConfig(), policy, seed=0)
    for _ in range(updates):
        odds = np.exp(np.concatenate(policy.evaluate(STEPS))[:, 0])
        chosen = draws.choice(3, 8, p=odds / odds.sum())
        logp = np.log(odds / odds.sum())[chosen].astype(np.float32)
        decisions = Decisions(list(STEPS), np.tile(np.arange(3), (8, 1)), np.ones((8, 3), bool), chosen, logp)
        scores = -np.array(list(STEPS.values()), np.float32)[chosen]
        learner.macro(decisions, np.arange(8), scores, np.zeros(8, np.int64))
    print({way: round(float(p), 2) for way, p in zip(STEPS, odds / odds.sum(), strict=True)})


if __name__ == "__main__":
    main()
