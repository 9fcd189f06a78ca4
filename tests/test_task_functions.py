"""A user's own functions as a task: their calls, and each way in which they can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from echelon.errors import EchelonError
from echelon.tasks import AgentPrompt, Attempt, FunctionTask, Scored, Turn

ITEMS = [{"prompt": "one", "n": 1}, {"prompt": "two", "n": 2}]
FORMATTERS = [lambda item: f"short: {item['prompt']}", lambda item: AgentPrompt("be long", item["prompt"])]


def lengths(first: list[str], second: list[str], batch_items: list[dict[str, Any]]) -> list[float]:
    return [len(a) + 10 * len(b) + 100 * item["n"] for a, b, item in zip(first, second, batch_items, strict=True)]


def attempts(*texts: tuple[str, str], item: int = 0) -> list[Attempt]:
    return [Attempt(item, (), text) for text in texts]


def test_rewards_come_from_one_call_with_lists_by_agent() -> None:
    calls: list[tuple[Any, ...]] = []

    def reward(*completions: list[str], batch_items: list[Any]) -> list[float]:
        calls.append((completions, batch_items))
        return lengths(*completions, batch_items=batch_items)

    made = FunctionTask(ITEMS, reward, FORMATTERS)
    scored = made.score([Attempt(1, (), ("a", "bb")), Attempt(0, (), ("", ""))])
    assert scored == [Scored(221.0), Scored(100.0)]
    assert calls == [((["a", ""], ["bb", ""]), [ITEMS[1], ITEMS[0]])]
    assert made.score([]) == []
    assert len(calls) == 1


def test_prompts_come_from_the_formatters() -> None:
    made = FunctionTask(ITEMS, lengths, FORMATTERS, eval_dataset=[{"prompt": "three", "n": 3}])
    assert made.roles == ("agent_0", "agent_1")
    assert made.prompts(0, ()) == [AgentPrompt("", "short: one"), AgentPrompt("be long", "one")]
    assert made.prompts(2, ())[1].text == "three"
    np.testing.assert_array_equal(made.items("train"), [0, 1])
    np.testing.assert_array_equal(made.items("eval"), [2])
    assert FunctionTask(ITEMS, lengths, FORMATTERS).items("eval").size == 0


def test_parts_and_kinds_of_numbers() -> None:
    kinds: list[Any] = [[{"a": 1, "b": 0.5}], (2,), np.array([2.5]), torch.tensor([3.0]), [np.float32(0.5)], [True]]
    found = [FunctionTask(ITEMS, lambda a, b, k=kind: k, FORMATTERS).score(attempts(("", "")))[0] for kind in kinds]
    assert [scored.reward for scored in found] == [1.5, 2.0, 2.5, 3.0, 0.5, 1.0]
    assert found[0].parts == {"a": 1.0, "b": 0.5}


def test_the_next_turn_comes_from_the_transition_with_all_that_was_said() -> None:
    calls: list[dict[str, Any]] = []

    def transition(**named: Any) -> list[str]:
        calls.append(named)
        return [f"next {text}" for text in named["agent_completions"]]

    made = FunctionTask(ITEMS, lengths, FORMATTERS, transition)
    turns = (Turn(("a", "b"), Scored(0.0)), Turn(("c", ""), Scored(1.0)))
    assert made.prompts(0, turns) == [AgentPrompt("", "next c"), AgentPrompt("be long", "next ")]
    assert calls[-1] == {
        "prompt": "one",
        "agent_completions": ["c", ""],
        "num_agents": 2,
        "prompt_history_per_agent": [["short: one", "next a"], ["one", "next b"]],
        "response_history_per_agent": [["a", "c"], ["b", ""]],
    }
    made.prompts(0, turns)
    assert len(calls) == 2  # each history once
    with pytest.raises(EchelonError, match="needs an external_transition"):
        FunctionTask(ITEMS, lengths, FORMATTERS).prompts(0, turns)


def raises(*_: Any, **__: Any) -> Any:
    raise ValueError("no\nway")


BAD: list[tuple[Callable[..., Any], str]] = [
    (raises, "it raised ValueError: no way"),
    (lambda a, b: [float("nan")] * len(a), "the reward is nan"),
    (lambda a, b: [float("-inf")] * len(a), "the reward is -inf"),
    (lambda a, b: [{"good": 1.0, "bad": float("nan")}] * len(a), "the reward's part 'bad' is nan"),
    (lambda a, b: [{}] * len(a), "the reward has no parts"),
    (lambda a, b: [0.0] * (len(a) + 1), "it must return a list of 1 reward, got 2"),
    (lambda a, b: [], "it must return a list of 1 reward, got 0"),
    (lambda a, b: 1.0, "it must return a list of 1 reward, got float 1.0"),
    (lambda a, b: None, "it must return a list of 1 reward, got NoneType None"),
    (lambda a, b: "1", "it must return a list of 1 reward, got str '1'"),
    (lambda a, b: ["1"] * len(a), "the reward must be a number, got str '1'"),
    (lambda a, b: [None] * len(a), "the reward must be a number, got NoneType None"),
    (lambda a, b: [[1.0, 2.0]] * len(a), "the reward must be a number, got list"),
]


@pytest.mark.parametrize(("function", "why"), BAD, ids=[why for _, why in BAD])
def test_a_bad_reward_is_named_with_its_sample(function: Callable[..., Any], why: str) -> None:
    given = attempts(("first " * 50, ""), item=1)
    with pytest.raises(EchelonError) as caught:
        FunctionTask(ITEMS, function, FORMATTERS).score(given)
    line = str(caught.value)
    assert line.startswith("reward_func, item 1, completions 'first first")
    assert why in line
    assert "…, '': " in line
    assert "\n" not in line
    assert len(line) < 300
    scored = FunctionTask(ITEMS, function, FORMATTERS, on_error="skip").score(given)[0]
    assert scored.reward == 0.0
    assert scored.error is not None
    assert why in scored.error


def test_skipping_keeps_the_good_samples_and_gives_the_bad_the_least_of_them() -> None:
    def picky(first: list[str], second: list[str]) -> list[float]:
        if "bad" in first:
            raise RuntimeError("bad one")
        return [float("nan") if text == "nan" else -1.0 - len(text) for text in first]

    given = attempts(("a", ""), ("bad", ""), ("ccc", ""), ("nan", ""))
    scored = FunctionTask(ITEMS, picky, FORMATTERS, on_error="skip").score(given)
    assert [s.reward for s in scored] == [-2.0, -4.0, -4.0, -4.0]
    assert [s.error for s in scored] == [
        None,
        "item 0, completions 'bad', '': it raised RuntimeError: bad one",
        None,
        "item 0, completions 'nan', '': the reward is nan",
    ]
    fixed = FunctionTask(ITEMS, picky, FORMATTERS, on_error="skip", error_reward=-9.0).score(given)
    assert [s.reward for s in fixed] == [-2.0, -9.0, -4.0, -9.0]
    with pytest.raises(EchelonError, match="item 0, completions 'bad', '': it raised RuntimeError: bad one"):
        FunctionTask(ITEMS, picky, FORMATTERS).score(given)


def test_a_wrong_length_for_many_is_no_single_samples_fault() -> None:
    def first_only(first: list[str], second: list[str]) -> list[float]:
        return [1.0]

    given = attempts(("a", "b"), ("c", "d"))
    why = "of 2 samples together: it must return a list of 2 rewards, got 1"
    with pytest.raises(EchelonError) as caught:
        FunctionTask(ITEMS, first_only, FORMATTERS).score(given)
    assert str(caught.value) == f"reward_func, item 0, completions 'a', 'b': {why}"
    scored = FunctionTask(ITEMS, first_only, FORMATTERS, on_error="skip", error_reward=-1.0).score(given)
    assert [s.reward for s in scored] == [-1.0, -1.0]
    assert [s.error for s in scored] == [f"item 0, completions {c}: {why}" for c in ("'a', 'b'", "'c', 'd'")]


def test_bad_formatters_and_transitions_are_named() -> None:
    with pytest.raises(EchelonError, match=r"the formatter of agent_0 failed at item 0: KeyError\('x'\)"):
        FunctionTask(ITEMS, lengths, [lambda item: item["x"]]).prompts(0, ())
    with pytest.raises(EchelonError, match="formatter of writer at item 0 must give a text or an AgentPrompt, got int"):
        FunctionTask(ITEMS, lengths, [lambda item: 3], roles=["writer"]).prompts(0, ())  # type: ignore[list-item]
    turns = (Turn(("a", "b"), Scored(0.0)),)
    for given, message in (
        (lambda **_: ["only one"], "must give a list of 2 prompts, got"),
        (lambda **_: "ab", "must give a list of 2 prompts, got 'ab'"),
        (lambda **_: [1, 2], "must give a text or an AgentPrompt, got int"),
        (raises, "failed: ValueError"),
    ):
        with pytest.raises(EchelonError, match="external_transition at item 0, turn 1") as caught:
            FunctionTask(ITEMS, lengths, FORMATTERS, given).prompts(0, turns)
        assert message in str(caught.value)


def test_bad_settings_are_named() -> None:
    with pytest.raises(EchelonError, match="one formatter for each agent"):
        FunctionTask(ITEMS, lengths, [])
    with pytest.raises(EchelonError, match="2 formatters but 1 roles"):
        FunctionTask(ITEMS, lengths, FORMATTERS, roles=["one"])
    with pytest.raises(EchelonError, match="has no items"):
        FunctionTask([], lengths, FORMATTERS)
    with pytest.raises(EchelonError, match="unknown on_error 'skipp': did you mean 'skip'"):
        FunctionTask(ITEMS, lengths, FORMATTERS, on_error="skipp")  # type: ignore[arg-type]
    with pytest.raises(EchelonError, match="error_reward must be finite"):
        FunctionTask(ITEMS, lengths, FORMATTERS, error_reward=float("nan"))
