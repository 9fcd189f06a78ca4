"""A team's task of one's own: each agent names a number, unseen by the other; together they should make the sum."""

import dataclasses
import re

import numpy as np

from echelon.cli import main
from echelon.tasks import AgentPrompt, Scored, TaskSettings, register_task


@dataclasses.dataclass(frozen=True)
class SumSettings(TaskSettings):
    """Its settings; on the command line `--env.largest`."""

    largest: int = 40
    """The largest sum that is asked for."""


class Sum:
    """Items are sums, of which every fourth is kept for evaluation."""

    name = "sum"
    roles = ("first", "second")

    def __init__(self, settings):
        self.numbers = np.arange(2, settings.largest + 1)

    def items(self, split):
        """The items of "train" or "eval"."""
        return self.numbers[(self.numbers % 4 == 0) == (split == "eval")]

    def prompts(self, item, history):
        """What each agent is asked; `history` tells the turns before, with all that was written and its feedback."""
        told = f" Last time you made {history[-1].scored.feedback}." if history else ""
        ask = f"You and a partner, who can't hear you, each name a number. Together: {item}.{told} Your number:"
        return [AgentPrompt("", ask) for _ in self.roles]

    def score(self, attempts):
        """One `Scored` for each joint answer; what the agents wrote is untrusted text."""
        return [self._one(attempt) for attempt in attempts]

    def _one(self, attempt):
        read = [re.match(r"\s*(\d{1,3})\b", text) for text in attempt.completions]
        if not all(read):
            return Scored(0.0, {"close": 0.0}, "no sum: a number was missing")
        total = sum(int(match[1]) for match in read)
        close = max(0.0, 1 - abs(total - attempt.item) / attempt.item)
        return Scored(close, {"close": close}, str(total), done=total == attempt.item)


register_task("sum", SumSettings, Sum)

if __name__ == "__main__":
    raise SystemExit(main())
