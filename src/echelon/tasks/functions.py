"""A user's own Python functions as a task, in the shape that users of TRL and CoMLRL know."""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from echelon.errors import EchelonError, unknown_name
from echelon.tasks.base import AgentPrompt, Attempt, Scored, Turn

__all__ = ["ExternalTransition", "Formatter", "FunctionTask", "RewardFunction"]

OnError = Literal["stop", "skip"]
RewardFunction = Callable[..., Sequence[float | Mapping[str, float]]]
Formatter = Callable[[Any], str | AgentPrompt]
ExternalTransition = Callable[..., Sequence[str | AgentPrompt]]

_REMEMBERED = 4096  # transitions; more than one update's


def _short(value: object, most: int = 60) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= most else text[: most - 1] + "…"


class _BadReward(Exception):
    """What was wrong with a reward, in a few words."""


class FunctionTask:
    """A task made of functions.

    Items are the places in `dataset`, and behind them those in `eval_dataset`. Completions are passed on as they are,
    empty ones too. The functions run in this process, with all of its rights: code that a model wrote belongs into
    `echelon.tasks.sandbox`.

    Attributes:
        name: "functions", or what was given.
        roles: what each agent is called.
    """

    def __init__(
        self,
        dataset: Sequence[Any],
        reward_func: RewardFunction,
        formatters: Sequence[Formatter],
        external_transition: ExternalTransition | None = None,
        eval_dataset: Sequence[Any] | None = None,
        *,
        roles: Sequence[str] | None = None,
        on_error: OnError = "stop",
        error_reward: float | None = None,
        name: str = "functions",
    ) -> None:
        """Put the functions together.

        Args:
            dataset: items of any kind, by place (a list, or a dataset that has a length and can be indexed).
            reward_func: `reward_func(*completions_per_agent, batch_items=items)`: a list of texts an agent, all of one
                length B, and the B items that they belong to; returns B rewards, each a finite number, or a mapping of
                named parts whose sum is the reward. It is called with as many attempts at once as there are. One
                without a parameter `batch_items` gets the texts alone.
            formatters: one function an agent, from an item to that agent's first prompt (a text, or an `AgentPrompt`).
            external_transition: `external_transition(prompt, agent_completions, num_agents, prompt_history_per_agent,
                response_history_per_agent)`: the prompts of the next turn, one an agent. `prompt` is the item's
                "prompt" where it has one, else the first agent's first prompt; the completions are of the turn before;
                the histories are of each agent, oldest first, that turn included. Needed for more than one turn.
                Called once for each history while it is remembered.
            eval_dataset: items for evaluation; None: none.
            roles: the agents' names; default "agent_0", "agent_1", ….
            on_error: what happens where `reward_func` raises or gives something that is no finite reward: "stop"
                raises; "skip" gives a `Scored` with its `error` and `error_reward`. Where the call with all attempts
                fails as a whole, each is tried by itself to find which are to blame; if none is, all are.
            error_reward: a fixed value for those; None: the least reward of all attempts in the same call of `score`
                (0 where none has one). The memory of that call alone is used so that a resumed run learns the same.
            name: what the task is called in runs.

        Raises:
            EchelonError: no item, no formatter, or roles that aren't as many.
        """
        if on_error not in get_args(OnError):
            raise unknown_name("on_error", on_error, get_args(OnError))
        if not formatters:
            raise EchelonError("a task of functions needs one formatter for each agent, got none")
        self.roles = tuple(roles) if roles is not None else tuple(f"agent_{i}" for i in range(len(formatters)))
        if len(self.roles) != len(formatters):
            raise EchelonError(f"{len(formatters)} formatters but {len(self.roles)} roles: give one of each an agent")
        if len(dataset) == 0:
            raise EchelonError("the dataset has no items")
        if error_reward is not None and not math.isfinite(error_reward):
            raise EchelonError(f"error_reward must be finite, got {error_reward}")
        self.name, self.on_error, self.error_reward = name, on_error, error_reward
        self._dataset, self._eval = dataset, eval_dataset if eval_dataset is not None else ()
        self._reward_func, self._formatters, self._transition = reward_func, tuple(formatters), external_transition
        self._takes_items = _accepts(reward_func, "batch_items")
        self._next_prompts: OrderedDict[tuple[Any, ...], list[AgentPrompt]] = OrderedDict()

    def items(self, split: str) -> NDArray[np.int64]:
        """See `TeamTask.items`; "eval" may be empty."""
        if split not in ("train", "eval"):
            raise unknown_name("split", split, ("train", "eval"))
        count = len(self._dataset)
        return np.arange(*((0, count) if split == "train" else (count, count + len(self._eval))), dtype=np.int64)

    def item(self, index: int) -> Any:
        """The item of that number."""
        count = len(self._dataset)
        return self._dataset[index] if index < count else self._eval[index - count]

    def prompts(self, item: int, history: Sequence[Turn]) -> list[AgentPrompt]:
        """See `TeamTask.prompts`: by the formatters, later by `external_transition`.

        Raises:
            EchelonError: one of them raises or gives something else, or there is a history and no transition.
        """
        return self._prompts(item, tuple(turn.completions for turn in history))

    def _prompts(self, item: int, replies: tuple[tuple[str, ...], ...]) -> list[AgentPrompt]:
        # By number and replies alone: the same history must lead to the same prompts, whoever asks.
        key = (item, replies)
        if key not in self._next_prompts:
            self._next_prompts[key] = self._follow(item, replies) if replies else self._first(item)
            while len(self._next_prompts) > _REMEMBERED:
                self._next_prompts.popitem(last=False)
        return list(self._next_prompts[key])

    def _first(self, item: int) -> list[AgentPrompt]:
        value = self.item(item)
        prompts = []
        for role, formatter in zip(self.roles, self._formatters, strict=True):
            try:
                given = formatter(value)
            except Exception as error:
                raise EchelonError(f"the formatter of {role} failed at item {item}: {_short(error, 200)}") from error
            prompts.append(_prompt(given, f"the formatter of {role} at item {item}"))
        return prompts

    def _follow(self, item: int, replies: tuple[tuple[str, ...], ...]) -> list[AgentPrompt]:
        if self._transition is None:
            raise EchelonError("more than one turn needs an external_transition, which gives the next turn's prompts")
        turns = [self._prompts(item, replies[:t]) for t in range(len(replies))]
        value = self.item(item)
        whole = value["prompt"] if isinstance(value, Mapping) and "prompt" in value else turns[0][0].text
        agents = range(len(self.roles))
        where = f"external_transition at item {item}, turn {len(replies)}"
        try:
            given = self._transition(
                prompt=whole,
                agent_completions=list(replies[-1]),
                num_agents=len(self.roles),
                prompt_history_per_agent=[[turn[i].text for turn in turns] for i in agents],
                response_history_per_agent=[[turn[i] for turn in replies] for i in agents],
            )
        except Exception as error:
            raise EchelonError(f"{where} failed: {_short(error, 200)}") from error
        if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != len(self.roles):
            raise EchelonError(f"{where} must give a list of {len(self.roles)} prompts, got {_short(given)}")
        return [
            AgentPrompt(turns[0][i].system, prompt) if isinstance(prompt, str) else _prompt(prompt, where)
            for i, prompt in enumerate(given)
        ]

    def score(self, attempts: Sequence[Attempt]) -> list[Scored]:
        """See `TeamTask.score`: by `reward_func`, all at once; where that fails, one by one to find which.

        Raises:
            EchelonError: with `on_error="stop"`, naming the item and its completions.
        """
        if not attempts:
            return []
        found: list[Scored | None] = [None] * len(attempts)
        errors: dict[int, str] = {}
        given: list[Any] = []
        try:
            given = self._rewards(attempts)
        except _BadReward as error:
            together = str(error)
            for place, attempt in enumerate(attempts):
                try:
                    given += self._rewards([attempt])
                except _BadReward as own:
                    errors[place] = str(own)
                    given.append(None)
                    self._stop(attempt, str(own))
            if not errors:
                # Each by itself passes, so what it gives one by one is not to be trusted either.
                errors = dict.fromkeys(range(len(attempts)), f"of {len(attempts)} samples together: {together}")
                self._stop(attempts[0], errors[0])
        for place, (attempt, value) in enumerate(zip(attempts, given, strict=True)):
            if place in errors:
                continue
            try:
                found[place] = _scored(value)
            except _BadReward as error:
                errors[place] = str(error)
                self._stop(attempt, str(error))
        known = [scored.reward for scored in found if scored is not None]
        least = min(known, default=0.0) if self.error_reward is None else self.error_reward
        return [
            Scored(least, error=f"{self._name(attempts[place])}: {errors[place]}") if scored is None else scored
            for place, scored in enumerate(found)
        ]

    def _name(self, attempt: Attempt) -> str:
        return f"item {attempt.item}, completions {', '.join(_short(text) for text in attempt.completions)}"

    def _stop(self, attempt: Attempt, error: str) -> None:
        if self.on_error == "stop":
            raise EchelonError(f"reward_func, {self._name(attempt)}: {error}")

    def _rewards(self, attempts: Sequence[Attempt]) -> list[Any]:
        """What the function gives, as many as there are attempts; what each is, is looked at later."""
        texts = [[attempt.completions[i] for attempt in attempts] for i in range(len(self.roles))]
        named = {"batch_items": [self.item(attempt.item) for attempt in attempts]} if self._takes_items else {}
        try:
            given: Any = self._reward_func(*texts, **named)
        except Exception as error:
            raise _BadReward(f"it raised {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
        wanted = f"a list of {len(attempts)} reward{'s' * (len(attempts) != 1)}"
        if isinstance(given, str | bytes | Mapping) or not hasattr(given, "__len__") or not hasattr(given, "__iter__"):
            raise _BadReward(f"it must return {wanted}, got {type(given).__name__} {_short(given)}")
        try:
            values = list(given)
        except Exception as error:
            raise _BadReward(f"it must return {wanted}, got {_short(given)}") from error
        if len(values) != len(attempts):
            raise _BadReward(f"it must return {wanted}, got {len(values)}")
        return values


def _accepts(function: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return True
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _prompt(given: object, where: str) -> AgentPrompt:
    if isinstance(given, AgentPrompt):
        return given
    if isinstance(given, str):
        return AgentPrompt("", given)
    raise EchelonError(f"{where} must give a text or an AgentPrompt, got {type(given).__name__}")


def _number(value: Any, what: str) -> float:
    if isinstance(value, str | bytes) or value is None:
        raise _BadReward(f"{what} must be a number, got {type(value).__name__} {_short(value)}")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise _BadReward(f"{what} must be a number, got {type(value).__name__} {_short(value)}") from None
    if not math.isfinite(number):
        raise _BadReward(f"{what} is {number}")
    return number


def _scored(value: Any) -> Scored:
    if isinstance(value, Mapping):
        parts = {str(name): _number(part, f"the reward's part {str(name)!r}") for name, part in value.items()}
        if not parts:
            raise _BadReward("the reward has no parts")
        total = math.fsum(parts.values())
        return Scored(_number(total, "the reward"), parts)
    return Scored(_number(value, "the reward"))
