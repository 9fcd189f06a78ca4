"""Budgets: no more is asked than may be spent, and what was spent is known."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon.errors import EchelonError
from echelon.llm.budget import Budget, BudgetConfig, BudgetedChoice, BudgetedText
from echelon.llm.choice import ChoicePrompt, ChoiceScores
from echelon.llm.server import ServerConfig, ServerModel
from echelon.llm.text import TextPrompt, TextReply
from misbehaving_server import MisbehavingServer


class Writer:
    """A text model whose replies all cost the same."""

    name = "writer"
    connections = 4

    def __init__(self, attempts: int = 1, tokens: int = 10, money: float = 0.5, seconds: float = 2.0) -> None:
        self.reply = TextReply("yes", None, tokens - tokens // 2, tokens // 2, attempts, seconds, money)
        self.batches: list[int] = []
        self.closed = False

    def generate(self, prompts: Sequence[TextPrompt]) -> list[TextReply]:
        self.batches.append(len(prompts))
        return [self.reply] * len(prompts)

    def state_dict(self) -> dict[str, int | float]:
        return {"prompts": sum(self.batches)}

    def load_state_dict(self, state: Mapping[str, int | float]) -> None:
        self.batches = [int(state["prompts"])]

    def close(self) -> None:
        self.closed = True


class Scorer:
    """A scoring model without counters."""

    name = "scorer"

    def score(self, prompts: Sequence[ChoicePrompt]) -> list[ChoiceScores]:
        return [ChoiceScores(np.zeros(2, np.float32), 30) for _ in prompts]


class CountingScorer(Scorer):
    """One that answers every second prompt from its cache."""

    def __init__(self) -> None:
        self.counts = {"calls": 100, "prompt_tokens": 1000, "seconds": 50.0, "cache_hits": 3}
        self.forgotten = 0

    def score(self, prompts: Sequence[ChoicePrompt]) -> list[ChoiceScores]:
        self.counts["calls"] += len(prompts) // 2
        self.counts["prompt_tokens"] += 7 * (len(prompts) // 2)
        self.counts["seconds"] += 0.25
        return super().score(prompts)

    def state_dict(self) -> dict[str, int | float]:
        return dict(self.counts)

    def forget(self) -> None:
        self.forgotten += 1


PROMPT = TextPrompt("", "hello")
QUESTION = ChoicePrompt("", "A or B?", ("a", "b"))


def outcomes(replies: list[TextReply]) -> list[str]:
    return [reply.error or reply.text for reply in replies]


# --- the budget itself ---


def test_without_limits_nothing_is_ever_spent() -> None:
    budget = Budget()
    budget.charge(calls=10**9, tokens=10**12, money=1e9, seconds=1e9)
    assert budget.spent() is None
    assert budget.state_dict() == {"calls": 10**9, "tokens": 10**12, "money": 1e9, "seconds": 1e9, "refused": 0}


@pytest.mark.parametrize(
    ("limit", "almost", "rest", "words"),
    [
        ({"calls": 1000}, {"calls": 999}, {"calls": 1}, "calls (1000 of 1000)"),
        ({"tokens": 50}, {"tokens": 49}, {"tokens": 3}, "tokens (52 of 50)"),
        ({"money": 2.5}, {"money": 2.25}, {"money": 0.25}, "money (2.5 of 2.5)"),
        ({"seconds": 60.0}, {"seconds": 59.5}, {"seconds": 1.0}, "seconds (60.5 of 60)"),
    ],
)
def test_each_limit(limit: dict[str, Any], almost: dict[str, Any], rest: dict[str, Any], words: str) -> None:
    budget = Budget(BudgetConfig(**limit))
    assert budget.spent() is None
    budget.charge(**almost)
    assert budget.spent() is None
    budget.charge(**rest)
    assert budget.spent() == words


def test_a_reservation_is_never_more_than_is_left() -> None:
    budget = Budget(BudgetConfig(calls=10))
    assert [budget.reserve(4), budget.reserve(4), budget.reserve(4), budget.reserve(4)] == [4, 4, 2, 0]
    budget.release(3)
    assert budget.reserve(9) == 3
    assert Budget(BudgetConfig(tokens=5)).reserve(1000) == 1000


def test_threads_share_one_budget() -> None:
    budget = Budget(BudgetConfig(calls=1000))
    granted: list[int] = []

    def take() -> None:
        while (got := budget.reserve(3)) > 0:
            granted.append(got)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(granted) == 1000


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "calls": st.integers(-5, 100),
                "tokens": st.integers(-5, 10**9),
                "money": st.floats(),
                "seconds": st.floats(),
            }
        ),
        max_size=8,
    )
)
def test_what_was_spent_never_shrinks_and_comes_back(charges: list[dict[str, Any]]) -> None:
    budget = Budget(BudgetConfig(calls=100, tokens=1000, money=1.0, seconds=10.0))
    for charge in charges:
        before = budget.state_dict()
        budget.charge(**charge)
        after = budget.state_dict()
        assert all(after[name] >= before[name] for name in after)
    state = json.loads(json.dumps(budget.state_dict()))
    other = Budget(budget.config)
    other.load_state_dict(state)
    assert (other.state_dict(), other.spent()) == (budget.state_dict(), budget.spent())


def test_a_damaged_state_is_one_line() -> None:
    budget = Budget()
    budget.charge(calls=3)
    budget.load_state_dict({"tokens": 4})
    assert budget.state_dict() == {"calls": 0, "tokens": 4, "money": 0.0, "seconds": 0.0, "refused": 0}
    for bad in (-1, "3", None, True, math.nan, math.inf):
        with pytest.raises(EchelonError, match="saved budget is damaged: money"):
            budget.load_state_dict({"money": bad})  # type: ignore[dict-item]
    assert budget.state_dict()["tokens"] == 4


@pytest.mark.parametrize("name", ["calls", "tokens", "money", "seconds"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_a_wrong_limit_is_one_line(name: str, value: float) -> None:
    with pytest.raises(EchelonError, match=f"budget.{name} is {value}"):
        BudgetConfig(**{name: value})


# --- text ---


def test_no_more_prompts_are_sent_than_calls_are_left() -> None:
    model, budget = Writer(), Budget(BudgetConfig(calls=10))
    replies = BudgetedText(model, budget).generate([PROMPT] * 1000)
    assert model.batches == [10]
    assert outcomes(replies) == ["yes"] * 10 + ["budget spent: calls (10 of 10)"] * 990
    assert all(reply.attempts == 0 and reply.text == "" for reply in replies[10:])
    assert budget.state_dict() == {"calls": 10, "tokens": 100, "money": 5.0, "seconds": 20.0, "refused": 990}
    assert BudgetedText(model, budget).generate([PROMPT])[0].error == "budget spent: calls (10 of 10)"
    assert model.batches == [10]
    assert BudgetedText(model, budget).generate([]) == []


def test_retries_are_charged() -> None:
    # 10 calls: 10 prompts are sent, each takes 3.
    model, budget = Writer(attempts=3), Budget(BudgetConfig(calls=10))
    replies = BudgetedText(model, budget).generate([PROMPT] * 12)
    assert outcomes(replies) == ["yes"] * 10 + ["budget spent: calls (30 of 10)"] * 2
    # In chunks of 4 (tokens are limited too): 4 prompts take 12.
    model, budget = Writer(attempts=3), Budget(BudgetConfig(calls=10, tokens=10**6))
    BudgetedText(model, budget).generate([PROMPT] * 12)
    assert model.batches == [4] and budget.state_dict()["calls"] == 12


def test_prompts_that_were_never_sent_cost_no_call() -> None:
    model, budget = Writer(attempts=0, tokens=0, money=0.0, seconds=0.0), Budget(BudgetConfig(calls=3))
    replies = BudgetedText(model, budget).generate([PROMPT] * 8)
    assert model.batches == [3, 3, 2] and len(replies) == 8
    assert budget.state_dict()["calls"] == 0


@pytest.mark.parametrize(
    ("limit", "batches"),
    [
        # 10 tokens, 0.5 money and 2 s a reply; chunks of 4.
        ({"tokens": 95}, [4, 4, 4]),
        ({"money": 2.0}, [4]),
        ({"seconds": 8.5}, [4, 4]),
        ({"tokens": 1000}, [4, 4, 4, 4, 4]),
        ({"calls": 6, "seconds": 1000.0}, [4, 2]),
        ({}, [20]),
    ],
)
def test_tokens_money_and_seconds_are_checked_between_chunks(limit: dict[str, Any], batches: list[int]) -> None:
    model = Writer()
    replies = BudgetedText(model, Budget(BudgetConfig(**limit))).generate([PROMPT] * 20)
    assert model.batches == batches
    assert [reply.error is None for reply in replies] == [i < sum(batches) for i in range(20)]


def test_a_model_that_loses_replies_shifts_none() -> None:
    class Loser(Writer):
        def generate(self, prompts: Sequence[TextPrompt]) -> list[TextReply]:
            return super().generate(prompts)[:-1]

    budget = Budget(BudgetConfig(calls=5))
    replies = BudgetedText(Loser(), budget).generate([PROMPT] * 3)
    assert outcomes(replies) == ["writer gave 2 replies to 3 prompts"] * 3
    assert budget.state_dict()["calls"] == 2


def test_a_text_model_is_passed_through() -> None:
    model = Writer()
    budgeted = BudgetedText(model, Budget())
    budgeted.generate([PROMPT] * 3)
    assert (budgeted.name, budgeted.state_dict()) == ("writer", {"prompts": 3})
    budgeted.load_state_dict({"prompts": 7})
    assert model.batches == [7]
    budgeted.close()
    assert model.closed


def test_a_budget_over_a_server_that_fails() -> None:
    """30 calls for prompts of two attempts each: the server sees what was charged, and never many more."""

    async def nap(seconds: float) -> None:
        pass

    with MisbehavingServer(lambda request: "http_500" if request["n"] % 2 == 0 else "yes") as server:
        config = ServerConfig(url=server.url, connections=1, key_variable="")
        model, budget = ServerModel("test", config, sleep=nap), Budget(BudgetConfig(calls=30, tokens=10**6))
        replies = BudgetedText(model, budget).generate([PROMPT] * 100)
        model.close()
    assert outcomes(replies) == ["yes"] * 15 + ["budget spent: calls (30 of 30)"] * 85
    assert server.requests == budget.state_dict()["calls"] == 30
    assert budget.state_dict()["tokens"] == 15 * 18


# --- choices ---


def test_a_scoring_model_without_counters_costs_a_call_a_prompt() -> None:
    budget = Budget(BudgetConfig(calls=5))
    model = BudgetedChoice(Scorer(), budget)
    assert len(model.score([QUESTION] * 3)) == 3
    assert budget.state_dict() == {"calls": 3, "tokens": 90, "money": 0.0, "seconds": 0.0, "refused": 0}
    assert len(model.score([QUESTION] * 4)) == 4  # a batch that was begun is scored whole
    with pytest.raises(EchelonError, match=r"budget spent: calls \(7 of 5\)"):
        model.score([QUESTION] * 2)
    assert budget.state_dict()["refused"] == 2
    assert not hasattr(model, "state_dict")


def test_a_scoring_model_with_counters_is_charged_by_them() -> None:
    inner, budget = CountingScorer(), Budget(BudgetConfig(calls=5))
    model = BudgetedChoice(inner, budget)
    model.score([QUESTION] * 8)
    assert budget.state_dict() == {"calls": 4, "tokens": 28, "money": 0.0, "seconds": 0.25, "refused": 0}
    model.score([QUESTION] * 2)
    with pytest.raises(EchelonError, match="budget spent"):
        model.score([QUESTION])
    assert (model.name, model.state_dict()) == ("scorer", inner.state_dict())
    model.forget()
    assert inner.forgotten == 1


def test_a_scoring_model_that_raises_is_charged_what_it_took() -> None:
    class Broken(CountingScorer):
        def score(self, prompts: Sequence[ChoicePrompt]) -> list[ChoiceScores]:
            super().score(prompts)
            raise RuntimeError("broken")

    budget = Budget(BudgetConfig(calls=50))
    with pytest.raises(RuntimeError, match="broken"):
        BudgetedChoice(Broken(), budget).score([QUESTION] * 6)
    assert budget.state_dict()["calls"] == 3
