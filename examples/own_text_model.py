"""A text model of one's own: whatever turns a prompt into text can plan. This one always takes the first option."""

import re

from echelon.cli import main
from echelon.llm import TextReply
from echelon.planners import register
from echelon.planners.generating import GeneratingPlanner


class FirstOption:
    """Stands for a client of any service. Two robots may well want one task: the safety check sends one back."""

    name = "first-option"

    def __init__(self):
        self.calls = 0

    def generate(self, prompts):
        """A reply for each prompt; what goes wrong is a reply's error, never an exception."""
        self.calls += len(prompts)
        return [self.reply(prompt) for prompt in prompts]

    def reply(self, prompt):
        """`prompt` has `system`, `text`, a JSON `schema` (or None) and `max_tokens`."""
        robots = re.findall(r"^Robot (\d+) at", prompt.text, re.MULTILINE)
        if not robots:
            return TextReply("", error="no robot in the prompt")
        plan = ", ".join(f'{{"robot": {robot}, "option": 1}}' for robot in robots)
        return TextReply(f'Gladly! {{"plan": [{plan}]}}', attempts=1)

    def state_dict(self):
        """Its counters, for logs and checkpoints."""
        return {"calls": self.calls}

    def load_state_dict(self, state):
        """Take them over again."""
        self.calls = int(state.get("calls", 0))

    def close(self):
        """Nothing to end."""


register("first-option", lambda: GeneratingPlanner(FirstOption()))

if __name__ == "__main__":
    raise SystemExit(main())
