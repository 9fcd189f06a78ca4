"""A language model that learns to rate options: log-odds of "good" against "bad", and the gradient through them.

What makes it affordable on a processor (our choice): questions are short and come again, so thousands of decisions
need a few hundred numbers; only the top layers learn, so that what the layers below make of a question is computed
once and kept; and what all questions begin with goes through once between two steps, for all of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echelon.errors import EchelonError, unknown_name
from echelon.llm._chat import ChatEncoder
from echelon.llm._loading import Device, Dtype
from echelon.llm._optional import require
from echelon.llm._scoring import Lanes
from echelon.llm._trainable import Trainable, compute_again
from echelon.llm.choice import ChoiceModel, ChoicePrompt, ChoiceScores
from echelon.llm.store import ModelStore

__all__ = ["ChoicePolicy", "LearningChoice", "PolicyConfig", "PolicyModel"]

_ALL = 10**6  # more layers than any model has
_KEPT = 1 << 30  # bytes of what the layers below made of questions


class PolicyModel(Protocol):
    """A language model that learns. An item is a question (choice policies) or a sampled reply (token policies)."""

    def evaluate(self, items: Sequence[Any]) -> list[NDArray[np.float32]]:
        """By item the numbers that decisions are made of, float32 `(k, c)`, without a gradient.

        A choice policy's log-odds of its question, `(1, 1)`; a token policy's log-probability and entropy of each
        sampled token, `(L, 2)`.
        """
        ...

    def reference(self, items: Sequence[Any]) -> list[NDArray[np.float32]]:
        """The same by the model as it was when learning began."""
        ...

    def backward(self, items: Sequence[Any], grads: Sequence[NDArray[np.float32]]) -> None:
        """Add the gradient of the sum of `grads` times the numbers to the parameters' gradients."""
        ...

    def step(self) -> float:
        """Clip the gradients, take one optimiser step, clear them; the norm before clipping."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """All that decides what is learnt next, by name."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave."""
        ...


@runtime_checkable
class LearningChoice(PolicyModel, ChoiceModel, Protocol):
    """A choice policy as those who train a planner use it: a `ChoicePolicy`, or one that several processes share."""

    def anchor(self) -> None:
        """From now on the reference is the model as it is now."""
        ...

    def warm_up(self, update: int, updates: int) -> None:
        """Set the step size of that update of so many by imitation; behind the last one, of reinforcement."""
        ...

    def spent(self) -> dict[str, float]:
        """What it was asked by `score`: prompts, calls, prompt_tokens, seconds."""
        ...

    def save(self, folder: Path, files: Mapping[str, str] | None = None, *, base: str | None = None) -> None:
        """Write what has been learnt into `folder`, fit for `hf:<folder>`."""
        ...


@dataclass(frozen=True)
class PolicyConfig:
    """What of a language model learns, and how. All defaults are our choice."""

    adapt: Literal["lora", "full"] = "lora"
    """lora: small matrices beside the weights; full: the weights themselves, in float32."""
    layers: int = 4
    """How many of the top layers learn; 0: all of them."""
    rank: int = 16
    """LoRA's rank."""
    alpha: int = 32
    """LoRA's scale: its matrices' product is multiplied by alpha / rank."""
    lr: float = 3e-4
    """Adam's step size; for full weights 1e-5 is a place to start."""
    warm_lr: float = 1e-3
    """Adam's largest step size in imitation; it rises in the first updates and falls to a twentieth."""
    temperature: float = 4.0
    """Odds are divided by it while plans are drawn and learnt from (not in imitation): above 1 it tries more."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    micro_tokens: int = 512
    """Most tokens that go through at a time with a gradient; it changes memory, not results (but for rounding)."""
    checkpointing: bool = False
    """Compute layers again in the backward pass instead of keeping what they need: less memory, a third more time."""

    def __post_init__(self) -> None:
        if self.adapt not in get_args(Literal["lora", "full"]):
            raise unknown_name("policy.adapt", self.adapt, ("lora", "full"))
        for name, good, need in (
            ("layers", self.layers >= 0, "at least 0"),
            ("rank", self.rank >= 1, "at least 1"),
            ("alpha", self.alpha >= 1, "at least 1"),
            ("lr", self.lr > 0, "above 0"),
            ("warm_lr", self.warm_lr > 0, "above 0"),
            ("temperature", self.temperature > 0, "above 0"),
            ("max_grad_norm", self.max_grad_norm > 0, "above 0"),
            ("micro_tokens", self.micro_tokens >= 1, "at least 1"),
        ):
            if not good:
                raise EchelonError(f"policy.{name} is {getattr(self, name)}: it must be {need}")


class ChoicePolicy:
    """A transformers model whose log-odds of A (good) against B (bad) behind a question can be trained.

    It is a `PolicyModel` over questions (strings), and a `ChoiceModel` for prompts whose `each` is asked by itself, so
    the planner that learns is the planner that plans. See `_trainable.Trainable` for LoRA, full weights, the reference
    and files.

    Only the top layers run again and again, behind what the frozen ones below made of a question, which is kept up to
    1 GiB. A number is a function of the weights, the question and, in its last bits, the questions that went through
    beside it; all of it repeats with the same calls on the same machine, also over `state_dict`.

    Attributes:
        name: what the model is called.
        shared: the system message of all questions.
        config: what learns; of an adapter that goes on learning, its own rank, alpha and layers do.
        prompts, calls, prompt_tokens, seconds: what `score` was asked, how often something went through the model,
            tokens in it, and what that took.
    """

    def __init__(self, trainable: Trainable, shared: str, config: PolicyConfig, *, threads: int | None = None) -> None:
        """Wrap a model that learns; `load` explains the settings."""
        self.name, self.shared, self.config = trainable.spec, shared, config
        self._trainable = trainable
        model = trainable.model
        self._chat = ChatEncoder(trainable.tokenizer, self.name)
        self._lanes = Lanes(threads, 1 if trainable.device.type == "cuda" else 4)
        self._cache_module = require("transformers.cache_utils")
        self._body = model.base_model
        self._low, self._top = self._split()
        head = model.get_output_embeddings()
        good, bad = self._chat.letter_ids[:2]
        self._head = (head.weight[good].float() - head.weight[bad].float()).detach()
        bias = getattr(head, "bias", None)
        self._bias = 0.0 if bias is None else float(bias[good]) - float(bias[bad])
        self._prefix = self._chat.prefix(shared)
        # Tokens behind the prefix, and what the frozen layers made of them, (length, H), by question.
        self._ids: dict[str, list[int]] = {}
        self._base: dict[str, Tensor] = {}
        self._met: list[list[str]] = []  # questions in the company in which they were met: a resumed run does the same
        # The same of the prefix: its states, and by layer its keys and values; those of the top until the next step.
        self._base_prefix: Tensor | None = None
        self._low_past: list[tuple[Tensor, Tensor]] = []
        self._top_past: list[tuple[Tensor, Tensor]] | None = None
        # Log-odds by question: until the next step, and of the reference.
        self._now: dict[str, float] = {}
        self.temperature = 1.0
        self._anchored: dict[str, float] = {}
        self._asked: set[str] = set()  # by `score`, since the last step
        self.prompts = self.calls = self.prompt_tokens = 0
        self.seconds = 0.0
        self._check()

    @classmethod
    def load(
        cls, spec: str, shared: str, config: PolicyConfig, *, store: ModelStore | None = None, dtype: Dtype = "auto",
        device: Device = "auto", threads: int | None = None, seed: int = 0,
    ) -> ChoicePolicy:  # fmt: skip
        """Load a model as `CausalChoiceModel.load` does, and make it learn; a LoRA adapter itself goes on learning.

        Args:
            spec: a known model's name or `hf:<folder or id>`.
            shared: the system message of all questions.
            config: what learns. With an adapter and `lora`, its rank, alpha and layers are the adapter's.
            store: where fetched models are; the default store if None.
            dtype: what products are computed in; "auto" is bfloat16 where the device computes in it, else float32.
            device: "auto" is a GPU where torch finds one, else the processor.
            threads: of the processor, shared out among up to 4 passes that run side by side; None takes as many as
                torch has in the thread that asks.
            seed: of LoRA's first matrices, at least 0.

        Raises:
            EchelonError: an unknown, absent or damaged model, a missing library, a model that can't learn.
        """
        trainable = Trainable.load(
            # All layers, but not the embeddings and the last norm.
            spec, store=store, dtype=dtype, device=device, adapt=config.adapt, layers=config.layers or _ALL,
            rank=config.rank, alpha=config.alpha, targets=None, freeze_embeddings=True, lr=config.lr,
            max_grad_norm=config.max_grad_norm, checkpointing=False, seed=seed,
        )  # fmt: skip
        return cls(trainable, shared, config, threads=threads)

    @property
    def updates(self) -> int:
        """Optimiser steps taken."""
        return self._trainable.updates

    def parameters(self) -> list[Tensor]:
        """What learns, in a fixed order."""
        return list(self._trainable.named.values())

    # -- numbers and gradients -----------------------------------------------------------------

    def evaluate(self, items: Sequence[str]) -> list[NDArray[np.float32]]:
        """The log-odds of each question, float32 `(1, 1)` each."""
        return [np.full((1, 1), x, np.float32) for x in self.odds(items)]

    def odds(self, items: Sequence[str]) -> NDArray[np.float32]:
        """The log-odds of each question, float32 `(n,)`; each is computed once between two optimiser steps.

        Raises:
            EchelonError: the model's numbers are not finite.
        """
        if fresh := [text for text in dict.fromkeys(items) if text not in self._now]:
            with self._lanes.share() as lanes:
                parts = self._cut(fresh, lanes)
                if self._top_past is None:
                    self._top_past = self._prefix_past()
                found = self._compute(fresh, parts, self._top_past, lanes)
            self._now.update(zip(fresh, found, strict=True))
        return np.array([self._now[text] for text in items], np.float32) / np.float32(self.temperature)

    def reference(self, items: Sequence[str]) -> list[NDArray[np.float32]]:
        """The log-odds by the model as it was when learning began, or at the last `anchor`, float32 `(1, 1)` each."""
        if fresh := [text for text in dict.fromkeys(items) if text not in self._anchored]:
            with self._lanes.share() as lanes:
                parts = self._cut(fresh, lanes)
                with self._trainable.as_reference():
                    found = self._compute(fresh, parts, self._prefix_past(), lanes)
            self._anchored.update(zip(fresh, found, strict=True))
        return [np.full((1, 1), self._anchored[text] / self.temperature, np.float32) for text in items]

    def anchor(self) -> None:
        """From now on the reference is the model as it is now; costs a copy of what learns."""
        self._trainable.anchor()
        self._anchored = dict(self._now)

    def warm_up(self, update: int, updates: int) -> None:
        """Set step size and temperature of that update of so many by imitation; behind the last, of reinforcement.

        They are no part of the state: a resumed run sets them again.
        """
        config = self.config
        warm = config.warm_lr * min(1.0, (update + 1) / 10) * max(0.05, 1 - update / max(updates, 1))
        self._trainable.lr = warm if update < updates else config.lr
        self.temperature = 1.0 if update < updates else config.temperature

    def backward(self, items: Sequence[str], grads: Sequence[NDArray[np.float32]]) -> None:
        """Add the gradient of the sum of `grads` times the log-odds to the parameters' gradients.

        Args:
            items: questions, each as often as wanted.
            grads: one number each, float32 `(1, 1)`.

        Raises:
            ValueError: a gradient of another shape.
        """
        if len(items) != len(grads) or any(np.size(grad) != 1 for grad in grads):
            raise ValueError("each question has one number, and so takes one gradient")
        weights = torch.tensor([float(np.reshape(grad, ())) for grad in grads], device=self._head.device)
        weights /= self.temperature
        params = self.parameters()
        with self._lanes.share() as lanes:
            parts = self._cut(items, lanes)
            if not parts:
                return
            # The prefix goes through once, forth and back; what its keys and values cause is gathered in between.
            past = self._prefix_past(grad=True)
            leaves = [(keys.detach().requires_grad_(), values.detach().requires_grad_()) for keys, values in past]
            sources = [*params, *(tensor for pair in leaves for tensor in pair)]

            def work(part: list[int]) -> tuple[Tensor | None, ...]:
                numbers = self._numbers([items[i] for i in part], leaves)
                return torch.autograd.grad((numbers * weights[part]).sum(), sources, allow_unused=True)

            # Each part gives its own gradients, added up in order: lanes don't change the result. No more parts at a
            # time than there are lanes, because each holds a gradient of all that learns.
            total: list[Tensor | None] = [None] * len(sources)
            for start in range(0, len(parts), lanes):
                for found in self._run(work, parts[start : start + lanes], lanes, grad=True):
                    total = [_sum(own, more) for own, more in zip(total, found, strict=True)]
            caused = zip((tensor for pair in past for tensor in pair), total[len(params) :], strict=True)
            back = [(tensor, grad) for tensor, grad in caused if tensor.requires_grad and grad is not None]
            if back:
                tensors, their_grads = zip(*back, strict=True)
                more = torch.autograd.grad(tensors, params, their_grads, allow_unused=True)
                total[: len(params)] = [_sum(*pair) for pair in zip(total[: len(params)], more, strict=True)]
        for p, own in zip(params, total[: len(params)], strict=True):
            p.grad = _sum(p.grad, own)

    def step(self) -> float:
        """Clip the gradients, take one step of AdamW, clear them; their norm before clipping.

        Raises:
            EchelonError: the gradients are not finite; the weights are as they were.
        """
        norm = self._trainable.step()
        self._forget_numbers()
        return norm

    # -- the model as a planner asks it ----------------------------------------------------------

    def score(self, prompts: Sequence[ChoicePrompt]) -> list[ChoiceScores]:
        """As `ChoiceModel.score`, for prompts of which each option is asked by itself behind this policy's `shared`.

        Raises:
            EchelonError: another sort of prompt.
        """
        return self.rate(prompts, self.odds)

    def rate(
        self, prompts: Sequence[ChoicePrompt], odds_of: Callable[[Sequence[str]], NDArray[np.float32]]
    ) -> list[ChoiceScores]:
        """`score` with the log-odds that `odds_of` gives of distinct questions."""
        for prompt in prompts:
            fits = len(prompt.each) == len(prompt.options) if prompt.each else len(prompt.options) == 2
            if prompt.shared != self.shared or not fits:
                raise EchelonError(f"policy {self.name} rates options one by one, with the prompt that it learns with")
        start = time.perf_counter()
        texts = [list(prompt.each) or [prompt.text] for prompt in prompts]
        distinct = list(dict.fromkeys(text for some in texts for text in some))
        odds = dict(zip(distinct, odds_of(distinct).astype(np.float64).tolist(), strict=True))
        self._encode(distinct)
        lengths = {text: len(self._prefix) + len(self._ids[text]) for text in distinct}
        fresh = [text for text in distinct if text not in self._asked]
        self._asked.update(fresh)
        self.prompts += len(prompts)
        self.calls += bool(fresh)
        self.prompt_tokens += sum(lengths[text] for text in fresh)
        found = []
        for prompt, some in zip(prompts, texts, strict=True):
            values = np.array([odds[text] for text in some] if prompt.each else [odds[some[0]], 0.0])
            values -= values.max()
            logprobs = (values - np.log(np.exp(values).sum())).astype(np.float32)
            logprobs.flags.writeable = False
            found.append(ChoiceScores(logprobs, sum(lengths[text] for text in some)))
        self.seconds += time.perf_counter() - start
        return found

    def spent(self) -> dict[str, float]:
        """What it was asked by `score`: prompts, calls, prompt_tokens, seconds."""
        return {"prompts": self.prompts, "calls": self.calls, "prompt_tokens": self.prompt_tokens,
                "seconds": self.seconds}  # fmt: skip

    # -- state and files -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """All that decides what is learnt next, but for the step size, as copies; not gradients between two steps."""
        # Numbers depend in their last bits on what went through beside them: a resumed run meets the same company.
        met = json.dumps({"met": self._met, "anchored": self._anchored, "now": self._now}).encode()
        return {**self._trainable.state_dict(), "met": torch.from_numpy(np.frombuffer(met, np.uint8).copy())}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave.

        Raises:
            EchelonError: it belongs to another model or other settings.
        """
        try:
            told = json.loads(state["met"].cpu().numpy().tobytes())
            met, now, anchored = (told[name] for name in ("met", "now", "anchored"))
        except (KeyError, ValueError, TypeError) as error:
            raise EchelonError(f"the saved state does not fit policy {self.name}: {error!r}") from error
        self._trainable.load_state_dict({name: tensor for name, tensor in state.items() if name != "met"})
        self._forget_questions()
        self._forget_numbers()
        with self._lanes.share() as lanes:
            for texts in met:
                self._prepare(texts, lanes)
        self._now, self._anchored = dict(now), dict(anchored)

    def save(self, folder: Path, files: Mapping[str, str] | None = None, *, base: str | None = None) -> None:
        """Write a LoRA adapter in PEFT's format, or the whole model, whole or not at all, fit for `hf:<folder>`.

        Args:
            folder: what stands there is replaced.
            files: more text files for it, by name.
            base: what the adapter calls its base model; default: what was loaded, or an adapter's own base.
        """
        self._trainable.save(folder, files, base=base)

    # -- passes ----------------------------------------------------------------------------------

    def _split(self) -> tuple[range, range]:
        """The layers below the lowest one that learns, and those from there on.

        Raises:
            EchelonError: a model whose layers can't be told apart, or of which other parts learn too.
        """
        body, learning = self._body, {id(p) for p in self.parameters()}
        if all(hasattr(body, part) for part in ("layers", "norm", "rotary_emb", "embed_tokens")):
            inside = [learning & {id(p) for p in layer.parameters()} for layer in body.layers]
            cache = self._cache_module.DynamicCache(config=body.config).layers
            # Sliding windows and recurrent states can't be prolonged from a view of keys and values.
            plain = len(cache) == len(inside) and all(type(own) is self._cache_module.DynamicLayer for own in cache)
            if plain and set().union(*inside) == learning:
                lowest = next(i for i, own in enumerate(inside) if own)
                return range(lowest), range(lowest, len(inside))
        kind = type(self._trainable.model).__name__
        raise EchelonError(f"model {self.name} is built in a way that Echelon can't train to rate ({kind})")

    def _encode(self, texts: Sequence[str]) -> None:
        """Have the tokens of questions behind the prefix ready."""
        fresh = [text for text in texts if text not in self._ids]
        for text, ids in zip(fresh, self._chat.encode(self.shared, fresh) if fresh else [], strict=True):
            if self._chat.prefix(self.shared, ids) != self._prefix:
                raise EchelonError(f"model {self.name}: a question changes the tokens of the system message: {text!r}")
            self._ids[text] = ids[len(self._prefix) :]

    def _cut(self, items: Sequence[str], lanes: int) -> list[list[int]]:
        """Indices of the questions of each pass; what the frozen layers make of them is computed where it lacks."""
        self._prepare(items, lanes)
        return self._parts([len(self._base[text]) for text in items])

    def _parts(self, lengths: Sequence[int]) -> list[list[int]]:
        """Rows of about one length together, at most `micro_tokens` with their padding."""
        parts: list[list[int]] = []
        for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
            if parts and (len(parts[-1]) + 1) * lengths[i] <= self.config.micro_tokens:
                parts[-1].append(i)
            else:
                parts.append([i])
        return parts

    def _prepare(self, items: Sequence[str], lanes: int) -> None:
        """The states of questions that are new below the lowest layer that learns (their tokens' where all learn)."""
        items = list(dict.fromkeys(items))
        fresh = [text for text in items if text not in self._base]
        if fresh and sum(states.nbytes for states in self._base.values()) > _KEPT:
            self._forget_questions()
            fresh = items
        self._encode(fresh)
        device = self._head.device
        if self._base_prefix is None:
            with self._trainable.computing():
                states = self._body.embed_tokens(torch.tensor([self._prefix], device=device))
                self._base_prefix, self._low_past = self._layers(states, 0, self._low)
        if not fresh:
            return
        rows = [torch.tensor(self._ids[text], device=device) for text in fresh]

        def work(part: list[int]) -> Tensor:
            states = self._body.embed_tokens(_padded([rows[i] for i in part]))
            return self._layers(states, len(self._prefix), self._low, self._low_past)[0]

        parts = self._parts([len(row) for row in rows])
        for part, states in zip(parts, self._run(work, parts, lanes), strict=True):
            for i, own in zip(part, states, strict=True):
                self._base[fresh[i]] = own[: len(rows[i])].clone()
        self._met.append(fresh)

    def _prefix_past(self, *, grad: bool = False) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the prefix in the layers that learn, as these are now."""
        assert self._base_prefix is not None
        with self._trainable.computing(grad):
            return self._layers(self._base_prefix, 0, self._top)[1]

    def _compute(
        self, items: Sequence[str], parts: list[list[int]], past: list[tuple[Tensor, Tensor]], lanes: int
    ) -> list[float]:
        found = np.empty(len(items), np.float32)

        def work(part: list[int]) -> Tensor:
            return self._numbers([items[i] for i in part], past)

        for part, numbers in zip(parts, self._run(work, parts, lanes), strict=True):
            found[part] = numbers.cpu().numpy()
        if not np.isfinite(found).all():
            raise EchelonError(f"model {self.name} gave numbers that are not finite: lower policy.lr")
        return [float(x) for x in found]

    def _numbers(self, texts: Sequence[str], past: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The log-odds of questions that `_prepare` knows, behind the prefix, float32 `(n,)`."""
        states = _padded([self._base[text] for text in texts])
        states = self._layers(states, len(self._prefix), self._top, past)[0]
        ends = torch.tensor([len(self._base[text]) - 1 for text in texts], device=states.device)
        states = self._body.norm(states[torch.arange(len(texts), device=states.device), ends])
        # Not a product of matrices: it would be one of bfloat16 where those are.
        odds: Tensor = (states.float() * self._head).sum(-1) + self._bias
        return odds

    def _layers(
        self, states: Tensor, start: int, layers: range, past: Sequence[tuple[Tensor, Tensor]] = ()
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Run some layers over rows of tokens.

        Args:
            states: `(rows, length, H)`, of tokens at the places from `start` on.
            start: how many tokens stand before them.
            layers: which ones.
            past: by layer the keys and values of those tokens, of one row for all.

        Returns:
            The states behind the last layer; without a past, by layer the keys and values.
        """
        place = torch.arange(start, start + states.shape[1], device=states.device)
        # No mask on padding: it is on the right, where no real token looks.
        sees = torch.arange(start + states.shape[1], device=states.device)[None] <= place[:, None]
        mask = torch.zeros(sees.shape, dtype=states.dtype, device=states.device)
        mask = mask.masked_fill_(~sees, torch.finfo(states.dtype).min)[None, None]
        rotary = self._body.rotary_emb(states, position_ids=place[None])

        def run(layer: int, states: Tensor, *behind: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            # A cache of its own for each call: it grows, and with checkpointing a layer is called twice.
            cache = self._cache_module.DynamicCache(config=self._body.config)
            own = cache.layers[layer]
            if behind:
                own.lazy_initialization(*behind)
                own.keys, own.values = (tensor.expand(len(states), -1, -1, -1) for tensor in behind)
            states = self._body.layers[layer](
                states, attention_mask=mask, position_ids=place[None], position_embeddings=rotary,
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            return states, own.keys, own.values

        again = self.config.checkpointing and torch.is_grad_enabled()
        kept = []
        for i, layer in enumerate(layers):
            args = (layer, states, *(past[i] if past else ()))
            states, *own = compute_again(run, *args) if again else run(*args)
            if not past:
                kept.append((own[0], own[1]))
        return states, kept

    def _run(
        self, work: Callable[[list[int]], Any], parts: Sequence[list[int]], lanes: int, *, grad: bool = False
    ) -> list[Any]:
        """`work` on each part, in lanes, in the mode that this takes; the results in order."""

        def labour(part: list[int]) -> Any:
            with torch.inference_mode(False), self._trainable.computing(grad):
                return work(part)

        return Lanes.run(labour, parts, lanes)

    def _forget_numbers(self) -> None:
        """What was true of the weights before a step."""
        self._top_past = None
        self._now.clear()
        self._asked.clear()

    def _forget_questions(self) -> None:
        """What the frozen layers made of the questions so far."""
        for kept in (self._base, self._ids, self._met):
            kept.clear()

    def _check(self) -> None:
        """Refuse a model that does more than we know: its numbers would be wrong without a word."""
        texts = ["Which? A or B?", "3 steps. A or B?"]
        letters = self._chat.letter_ids[:2]
        wholes = []
        with self._lanes.share(), self._trainable.running() as model:
            for ids in self._chat.encode(self.shared, texts):
                logits = model(input_ids=torch.tensor([ids], device=self._head.device)).logits[0, -1, letters].float()
                wholes.append(logits.cpu().numpy())
        if not np.isfinite(wholes).all():
            raise EchelonError(f"model {self.name} gave numbers that are not finite: its weights may be damaged")
        try:
            ours = self.odds(texts)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            line = (str(error).strip().splitlines() or [""])[0][:200]
            raise EchelonError(f"model {self.name} has layers of a kind that Echelon can't train ({line})") from error
        whole = np.array([logits[0] - logits[1] for logits in wholes])
        # Of two bfloat16 letters, and of what rounding on the way makes of them.
        if (np.abs(ours - whole) > 0.2 + 0.05 * np.abs(whole) + 0.02 * np.abs(wholes).max()).any():
            raise EchelonError(f"model {self.name} has layers of a kind that Echelon can't train ({ours} for {whole})")
        self._forget_questions()
        self._forget_numbers()


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows of `(length, …)` as one tensor, padded with zeros on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two gradients that may be absent."""
    return b if a is None else a if b is None else a + b
