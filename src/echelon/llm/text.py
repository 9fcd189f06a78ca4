"""Models that write text: what they are asked, what they answer, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["TextModel", "TextPrompt", "TextReply"]


@dataclass(frozen=True)
class TextPrompt:
    """One request for text.

    Args:
        system: the system message; what many prompts have in common.
        text: the user's message.
        schema: a JSON schema that the reply must fit, or None for free text. A model that can be held to it is; the
            caller checks the reply all the same.
        max_tokens: the longest reply, in tokens.
    """

    system: str
    text: str
    schema: Mapping[str, Any] | None = None
    max_tokens: int = 256


@dataclass(frozen=True)
class TextReply:
    """What came back.

    Args:
        text: what the model wrote, untrusted; "" after an error.
        error: None, or in one clean line why there is no text.
        prompt_tokens, completion_tokens: as the server counts them; 0 where it doesn't say.
        attempts: requests that it took, retries and repairs included; 0 if none was sent (budget spent, circuit open).
        seconds: from the first request to the last byte, waiting included.
        money: what it cost, in the currency of the configured prices.
        written: all that the model wrote where `text` is the JSON found in it, in order, untrusted: words around the
            JSON, what it was asked for again since there was none, and what is left after an error. Else empty.
    """

    text: str
    error: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    attempts: int = 0
    seconds: float = 0.0
    money: float = 0.0
    written: tuple[str, ...] = ()


class TextModel(Protocol):
    """Anything that writes text.

    Attributes:
        name: what the model is called in runs and reports; it holds no secret.
    """

    name: str

    def generate(self, prompts: Sequence[TextPrompt]) -> list[TextReply]:
        """A reply for each prompt, in their order.

        A fault of the model or its server is a reply's `error`, never an exception. Safe to call from a thread that is
        not the main one.
        """
        ...

    def state_dict(self) -> dict[str, int | float]:
        """Counters, fit for JSON: `prompts` asked, `calls` (requests sent), `failures` (replies with an error),
        `prompt_tokens`, `completion_tokens`, `seconds`, `money`, and whatever else it counts."""
        ...

    def load_state_dict(self, state: Mapping[str, int | float]) -> None:
        """Take over counters that `state_dict` gave; what they lack is 0."""
        ...

    def close(self) -> None:
        """End its threads and connections."""
        ...
