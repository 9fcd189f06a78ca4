"""What a team of language models works on: items, a prompt for each agent, and one joint reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = ["AgentPrompt", "Attempt", "Scored", "Solvable", "TaskSettings", "Teaching", "TeamTask", "Turn"]


@dataclass(frozen=True)
class AgentPrompt:
    """What one agent is asked in one turn.

    Args:
        system: the system message; may be empty.
        text: the user's message.
    """

    system: str
    text: str


@dataclass(frozen=True)
class Scored:
    """What one joint answer is worth.

    Args:
        reward: the team's reward in this turn, finite.
        parts: what it is the sum of, by name; for the log and the reader.
        feedback: what the task tells the agents about it before the next turn (test results, say); may be empty.
        done: nothing is left to do: the episode ends here, whatever turns remain.
        error: None, or in one line why it could not be scored; the reward is then the least that the task knows.
    """

    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)
    feedback: str = ""
    done: bool = False
    error: str | None = None


@dataclass(frozen=True)
class Turn:
    """A turn that is over: what each agent wrote, untrusted, and what that was worth."""

    completions: tuple[str, ...]
    scored: Scored


@dataclass(frozen=True)
class Attempt:
    """A joint answer to score.

    Args:
        item: which item it is about.
        history: the turns before, oldest first.
        completions: what each agent wrote, in the order of the task's roles, untrusted.
    """

    item: int
    history: tuple[Turn, ...]
    completions: tuple[str, ...]


@dataclass(frozen=True)
class TaskSettings:
    """Base of a task's settings: numbers, words, paths and literals, with a docstring below each.

    Attributes:
        rollout: how replies are sampled in this task unless a run says otherwise, by name (turns, max_tokens, …).
    """

    rollout: ClassVar[Mapping[str, Any]] = {}


class TeamTask(Protocol):
    """A cooperative task of N agents that answer in turns.

    Attributes:
        name: what it is called in runs.
        roles: what each of the N agents is called.
    """

    name: str
    roles: tuple[str, ...]

    def items(self, split: str) -> NDArray[np.int64]:
        """The items of "train" or "eval", ascending; the two have none in common."""
        ...

    def prompts(self, item: int, history: Sequence[Turn]) -> list[AgentPrompt]:
        """What each agent is asked, after the turns so far (none: the first). An agent's prompt may tell what others
        wrote before, never what they write now."""
        ...

    def score(self, attempts: Sequence[Attempt]) -> list[Scored]:
        """What each joint answer is worth, in their order. What can't be scored gets a `Scored.error`; an exception
        means that the task itself is broken."""
        ...


@runtime_checkable
class Teaching(Protocol):
    """What else a task has that knows good answers, so that a team can begin by imitation."""

    def lessons(self, items: Sequence[int] | NDArray[np.int64]) -> list[tuple[int, AgentPrompt, str]]:
        """(agent, prompt, reply) of a teacher that plays these items."""
        ...


@runtime_checkable
class Solvable(Protocol):
    """What else a task has whose episodes succeed or fail."""

    def solved(self, scored: Sequence[Scored]) -> bool:
        """Whether the turns of an episode, from its first, did what was to be done."""
        ...
