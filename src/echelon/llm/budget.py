"""What a run may spend on its language model: calls, tokens, money, seconds."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from echelon.errors import EchelonError
from echelon.llm.choice import ChoiceModel, ChoicePrompt, ChoiceScores
from echelon.llm.text import TextModel, TextPrompt, TextReply

__all__ = ["Budget", "BudgetConfig", "BudgetedChoice", "BudgetedText"]

_MOST = 10**15  # of anything in one charge, so that sums stay finite


@dataclass(frozen=True)
class BudgetConfig:
    """What may be spent on the language model; when any of it is spent, planning goes on without the model."""

    calls: int = 0
    """Most requests to the model, retries included; 0: no limit. Requests under way when it is reached are finished,
    so their retries may go above it."""
    tokens: int = 0
    """Most tokens, prompts and replies together, as the model counts them; 0: no limit."""
    money: float = 0.0
    """Most money, in the currency of server.price_in and server.price_out; 0: no limit."""
    seconds: float = 0.0
    """Most seconds that the model works on requests, summed over requests, also those under way at the same time;
    0: no limit."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if not math.isfinite(value) or value < 0:
                raise EchelonError(f"budget.{f.name} is {value}: it must be at least 0 (0: no limit)")


class Budget:
    """What was spent so far, against a limit. Safe to use from several threads.

    Attributes:
        config: the limits.
    """

    def __init__(self, config: BudgetConfig | None = None) -> None:
        """Nothing is spent yet."""
        self.config = BudgetConfig() if config is None else config
        self._lock = threading.Lock()
        self._spent: dict[str, int | float] = {"calls": 0, "tokens": 0, "money": 0.0, "seconds": 0.0, "refused": 0}

    def spent(self) -> str | None:
        """None, or what is spent, in words: "calls (1000 of 1000)"."""
        with self._lock:
            return self._words()

    def charge(self, *, calls: int = 0, tokens: int = 0, money: float = 0.0, seconds: float = 0.0) -> None:
        """Add what something cost. Numbers that can't be a cost (negative, not finite) count as 0."""
        with self._lock:
            for name, value in (("calls", calls), ("tokens", tokens), ("money", money), ("seconds", seconds)):
                if value > 0 and math.isfinite(value):
                    self._spent[name] += min(value, _MOST)

    def reserve(self, calls: int) -> int:
        """Charge up to `calls` calls before they are made, so that two threads don't spend the same ones.

        Returns:
            How many were granted: 0 if anything is spent. Give those not made back with `release`.
        """
        with self._lock:
            if self._words() is not None:
                return 0
            if self.config.calls:
                calls = min(calls, self.config.calls - int(self._spent["calls"]))
            self._spent["calls"] += calls
            return calls

    def release(self, calls: int) -> None:
        """Give back calls that were reserved and not made."""
        with self._lock:
            self._spent["calls"] = max(0, self._spent["calls"] - calls)

    def refuse(self, prompts: int) -> str:
        """Count prompts that weren't sent because the budget is spent; the error's line for them."""
        with self._lock:
            self._spent["refused"] += prompts
            return f"budget spent: {self._words() or 'calls'}"

    def state_dict(self) -> dict[str, int | float]:
        """What was spent (`calls`, `tokens`, `money`, `seconds`) and `refused`, the prompts not sent; fit for JSON."""
        with self._lock:
            return dict(self._spent)

    def load_state_dict(self, state: Mapping[str, int | float]) -> None:
        """Take over what `state_dict` gave; what it lacks is 0.

        Raises:
            EchelonError: what it says can't have been spent.
        """
        fresh: dict[str, int | float] = {}
        for name, zero in (("calls", 0), ("tokens", 0), ("money", 0.0), ("seconds", 0.0), ("refused", 0)):
            value = state.get(name, zero)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise EchelonError(f"the saved budget is damaged: {name} is {value!r}")
            fresh[name] = type(zero)(value)
        with self._lock:
            self._spent = fresh

    def _words(self) -> str | None:
        for f in dataclasses.fields(self.config):
            limit, value = getattr(self.config, f.name), self._spent[f.name]
            if limit and value >= limit:
                return f"{f.name} ({_number(value)} of {_number(limit)})"
        return None


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


class BudgetedText:
    """A text model that is no longer asked once a budget is spent: the rest gets replies with an error.

    No more prompts are sent than calls are left. Where tokens, money or seconds are limited, prompts go out in chunks,
    and what the last chunk cost is charged before the next one goes.

    Attributes:
        name: the model's; model: what is asked; budget: what pays for it.
    """

    def __init__(self, model: TextModel, budget: Budget, chunk: int | None = None) -> None:
        """Ask `model` on `budget`, `chunk` prompts at a time; None: the model's `connections`, or 16 without any."""
        self.model, self.budget, self.name = model, budget, model.name
        self._chunk = max(1, int(getattr(model, "connections", 16) if chunk is None else chunk))

    def generate(self, prompts: Sequence[TextPrompt]) -> list[TextReply]:
        """A reply for each prompt, in their order; those not sent have the error "budget spent: …" and 0 attempts."""
        limits, replies = self.budget.config, list[TextReply]()
        chunk = self._chunk if limits.tokens or limits.money or limits.seconds else len(prompts)
        while len(replies) < len(prompts):
            rest = len(prompts) - len(replies)
            granted = self.budget.reserve(min(chunk, rest))
            if not granted:
                replies += [TextReply("", self.budget.refuse(rest))] * rest
                break
            replies += self._ask(prompts[len(replies) : len(replies) + granted])
        return replies

    def _ask(self, prompts: Sequence[TextPrompt]) -> list[TextReply]:
        attempts = 0
        try:
            replies = self.model.generate(prompts)
            for reply in replies:
                attempts += max(0, reply.attempts)
                tokens = max(0, reply.prompt_tokens) + max(0, reply.completion_tokens)
                self.budget.charge(tokens=tokens, money=reply.money, seconds=reply.seconds)
        finally:
            # What was reserved is replaced by what was needed: none where a breaker was open, more with retries.
            self.budget.charge(calls=attempts - len(prompts))
            self.budget.release(len(prompts) - min(attempts, len(prompts)))
        if len(replies) != len(prompts):
            # A count that doesn't fit would shift every later reply to another's prompt.
            return [TextReply("", f"{self.name} gave {len(replies)} replies to {len(prompts)} prompts")] * len(prompts)
        return replies

    def state_dict(self) -> dict[str, int | float]:
        """The model's own counters; the budget keeps its own."""
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, int | float]) -> None:
        """Give the model its counters back."""
        self.model.load_state_dict(state)

    def hurry(self, seconds: float | None) -> None:
        """As `ServerModel.hurry`, if the model knows that."""
        if callable(hurry := getattr(self.model, "hurry", None)):
            hurry(seconds)

    def close(self) -> None:
        """Close the model."""
        self.model.close()


class BudgetedChoice:
    """A scoring model that raises once a budget is spent.

    What a call cost is what the model's counters `calls`, `prompt_tokens` and `seconds` grew by, where its `state_dict`
    has them; else a call a prompt and the scores' tokens. A batch that was begun is scored whole. Whatever else the
    model has (`state_dict`, `load_state_dict`, `forget`, …) is reached through this one.

    Attributes:
        model: what is asked; budget: what pays for it.
    """

    def __init__(self, model: ChoiceModel, budget: Budget) -> None:
        """Ask `model` on `budget`."""
        self.model, self.budget = model, budget

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.name

    def __getattr__(self, name: str) -> Any:
        # Only what isn't found here comes this way. Copying asks before there is a model.
        if name.startswith("__") or name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)

    def score(self, prompts: Sequence[ChoicePrompt]) -> list[ChoiceScores]:
        """The model's scores.

        Raises:
            EchelonError: "budget spent: …", or what the model raises.
        """
        if self.budget.spent() is not None:
            raise EchelonError(self.budget.refuse(len(prompts)))
        before = self._counters()
        scores: list[ChoiceScores] = []
        try:
            scores = self.model.score(prompts)
        finally:
            grown = {name: value - before.get(name, 0) for name, value in self._counters().items()}
            self.budget.charge(
                calls=int(grown.get("calls", len(prompts))),
                tokens=int(grown.get("prompt_tokens", sum(s.prompt_tokens for s in scores))),
                seconds=grown.get("seconds", 0.0),
            )
        return scores

    def _counters(self) -> dict[str, float]:
        state = self.model.state_dict() if hasattr(self.model, "state_dict") else {}
        return {name: state[name] for name in ("calls", "prompt_tokens", "seconds") if name in state}
