"""A language model that learns to rate options: log-odds of "good" against "bad", and the gradient through them.

What makes it affordable on a processor (our choice): questions are short and come again, so thousands of decisions
need a few hundred numbers; only the top layers learn, so that what the layers below make of a question is computed
once and kept; and many questions go through in one row behind one copy of what they share, each blind to the others.
"""

from __future__ import annotations

import contextlib
import copy
import json
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echelon._files import atomic_directory, atomic_write_text
from echelon.errors import EchelonError, unknown_name
from echelon.llm._chat import ChatEncoder
from echelon.llm._loading import Device, Dtype, base_of, load_causal, locate
from echelon.llm._optional import quiet_transformers, require
from echelon.llm._scoring import Lanes
from echelon.llm.choice import ChoicePrompt, ChoiceScores
from echelon.llm.store import ModelStore

__all__ = ["ChoicePolicy", "PolicyConfig", "PolicyModel"]

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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
            ("max_grad_norm", self.max_grad_norm > 0, "above 0"),
            ("micro_tokens", self.micro_tokens >= 1, "at least 1"),
        ):
            if not good:
                raise EchelonError(f"policy.{name} is {getattr(self, name)}: it must be {need}")


class ChoicePolicy:
    """A transformers model whose log-odds of A (good) against B (bad) behind a question can be trained.

    It is a `PolicyModel` over questions (strings), and a `ChoiceModel` for prompts whose `each` is asked by itself, so
    the planner that learns is the planner that plans. With LoRA the reference is the adapter as it was when learning
    began (`anchor`), a copy of a few hundred thousand numbers beside one copy of the model.

    A number is a function of the weights, the question and the questions that go through beside it (in the last bits
    only); all of it repeats with the same calls on the same machine.

    Attributes:
        name: what the model is called.
        updates: optimiser steps taken.
        prompts, calls, prompt_tokens, seconds: what `score` was asked, how often something went through the model,
            tokens in it, and what that took.
    """

    def __init__(
        self, model: Any, tokenizer: Any, name: str, shared: str, config: PolicyConfig, *, threads: int | None = None,
        seed: int = 0,
    ) -> None:  # fmt: skip
        """Make `model` (in evaluation mode, frozen) learn.

        Args:
            model, tokenizer: of transformers.
            name: for errors and records.
            shared: the system message of all questions.
            config: what learns.
            threads: of the processor; None takes as many as torch has.
            seed: of LoRA's first matrices.

        Raises:
            EchelonError: a model whose layers can't be told apart, or that peft can't adapt.
        """
        self.name, self.shared, self.config = name, shared, config
        self._chat = ChatEncoder(tokenizer, name)
        self._lanes = Lanes(threads, 1 if model.device.type == "cuda" else 4)
        count = int(model.config.num_hidden_layers)
        body = model.base_model
        if not all(hasattr(body, part) for part in ("layers", "norm", "rotary_emb", "embed_tokens")):
            raise EchelonError(f"model {name} is built in a way that Echelon can't train ({type(model).__name__})")
        self._bottom = count - min(config.layers or count, count)
        head = model.get_output_embeddings()
        letters = self._chat.letter_ids[:2]
        self._head = (head.weight[letters[0]].float() - head.weight[letters[1]].float()).detach()
        self._bias = (
            0.0 if getattr(head, "bias", None) is None else float(head.bias[letters[0]] - head.bias[letters[1]])
        )
        self._peft: Any = None
        if config.adapt == "lora":
            peft = require("peft")
            settings = peft.LoraConfig(
                r=config.rank, lora_alpha=config.alpha, target_modules=list(TARGETS), task_type="CAUSAL_LM",
                layers_to_transform=list(range(self._bottom, count)),
            )  # fmt: skip
            with _quiet(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                try:
                    self._peft = peft.get_peft_model(model, settings)
                except ValueError as error:
                    raise EchelonError(
                        f"model {name} has none of the layers that LoRA is put beside: {error}"
                    ) from error
            named = [(n, p) for n, p in self._peft.named_parameters() if p.requires_grad]
        else:
            model.float()
            for layer in body.layers[self._bottom :]:
                layer.requires_grad_(True)
            named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self._body, self._named = body, named
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=config.lr, weight_decay=0.0)
        self._prefix = self._chat.prefix(shared)
        self._base: OrderedDict[str, Tensor] = OrderedDict()  # what the layers below made of a question
        self._base_prefix: Tensor | None = None
        self._low: Any = None
        self._met: list[list[str]] = []  # questions in the company in which they were met: a resumed run does the same
        self._anchor = {n: p.detach().clone() for n, p in named}
        self._anchored: dict[str, float] = {}
        self._now: dict[str, float] = {}
        self.updates = self.prompts = self.calls = self.prompt_tokens = 0
        self.seconds = 0.0
        self._check()

    @classmethod
    def load(
        cls, spec: str, shared: str, config: PolicyConfig, *, store: ModelStore | None = None, dtype: Dtype = "auto",
        device: Device = "auto", threads: int | None = None, seed: int = 0,
    ) -> ChoicePolicy:  # fmt: skip
        """Load a model as `CausalChoiceModel.load` does; of a LoRA adapter the same matrices go on learning.

        Raises:
            EchelonError: an unknown, absent or damaged model, a missing library, a model that can't learn.
        """
        adapter = locate(spec, store)
        if config.adapt == "full" or not (adapter / "adapter_config.json").is_file():
            loaded = load_causal(spec, store=store, dtype=dtype, device=device)
            return cls(loaded.model, loaded.tokenizer, spec, shared, config, threads=threads, seed=seed)
        base, settings = base_of(adapter, spec, store)
        loaded = load_causal(base, store=store, dtype=dtype, device=device)
        count = int(loaded.model.config.num_hidden_layers)
        layers = settings.get("layers_to_transform") or range(count)
        config = replace(config, layers=count - min(layers), rank=settings["r"], alpha=settings["lora_alpha"])
        policy = cls(loaded.model, loaded.tokenizer, base, shared, config, threads=threads, seed=seed)
        policy._take_over(adapter, spec)
        return policy

    def _take_over(self, adapter: Path, spec: str) -> None:
        """Go on from the weights of an adapter."""
        try:
            tensors = require("safetensors.torch").load_file(adapter / "adapter_model.safetensors")
        except Exception as error:  # a damaged file, in the words of a third party
            raise EchelonError(f"model {spec}: adapter_model.safetensors can't be read ({error})") from error
        with torch.no_grad():
            for name, p in self._named:
                saved = tensors.get(name.replace(".default.", "."))
                if saved is None or saved.shape != p.shape:
                    raise EchelonError(f"model {spec}: its adapter isn't one that Echelon can go on training ({name})")
                p.copy_(saved)
        self._now.clear()
        self.anchor()

    def parameters(self) -> list[Tensor]:
        """What learns, in a fixed order."""
        return [p for _, p in self._named]

    # -- numbers and gradients -----------------------------------------------------------------

    def evaluate(self, items: Sequence[str]) -> list[NDArray[np.float32]]:
        """The log-odds of each question, float32 `(1, 1)` each."""
        return [np.full((1, 1), x, np.float32) for x in self.odds(items)]

    def odds(self, items: Sequence[str]) -> NDArray[np.float32]:
        """The log-odds of each question, float32 `(n,)`; each is computed once between two optimiser steps."""
        fresh = [text for text in dict.fromkeys(items) if text not in self._now]
        if fresh:
            self._now.update(zip(fresh, self._odds_of(fresh).tolist(), strict=True))
        return np.array([self._now[text] for text in items], np.float32)

    def _odds_of(self, items: Sequence[str]) -> NDArray[np.float32]:
        parts = self._cut(items)

        def work(part: list[int]) -> NDArray[np.float32]:
            with torch.inference_mode():
                return np.asarray(self._forward([items[i] for i in part]).cpu().numpy())

        found = np.empty(len(items), np.float32)
        for part, values in zip(parts, self._run(work, parts), strict=True):
            found[part] = values
        if not np.isfinite(found).all():
            raise EchelonError(f"model {self.name} gave numbers that are not finite: lower policy.lr")
        return found

    def reference(self, items: Sequence[str]) -> list[NDArray[np.float32]]:
        """The log-odds by the model as it was at the last `anchor`, float32 `(1, 1)` each."""
        fresh = [text for text in dict.fromkeys(items) if text not in self._anchored]
        if fresh:
            with self._as_anchored():
                self._anchored.update(zip(fresh, self._odds_of(fresh).tolist(), strict=True))
        return [np.full((1, 1), self._anchored[text], np.float32) for text in items]

    def warm_up(self, update: int, updates: int) -> None:
        """Set the step size of that update of so many by imitation; behind the last one, of reinforcement."""
        lr = self.config.lr
        if update < updates:
            lr = self.config.warm_lr * min(1.0, (update + 1) / 10) * max(0.05, 1 - update / updates)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def anchor(self) -> None:
        """From now on the reference is the model as it is now."""
        self._anchor = {n: p.detach().clone() for n, p in self._named}
        self._anchored = dict(self._now)

    def backward(self, items: Sequence[str], grads: Sequence[NDArray[np.float32]]) -> None:
        """Add the gradient of the sum of `grads` times the log-odds to the parameters' gradients."""
        weights = np.array([float(np.asarray(g).reshape(-1)[0]) for g in grads], np.float32)
        parts = self._cut(items)
        params = self.parameters()

        def work(part: list[int]) -> list[Tensor | None]:
            numbers = self._forward([items[i] for i in part])
            total = (numbers * torch.from_numpy(weights[part]).to(numbers.device)).sum()
            return list(torch.autograd.grad(total, params, allow_unused=True))

        # Each part gives its own gradients, added up in order: lanes don't change the result.
        for found in self._run(work, parts):
            for p, g in zip(params, found, strict=True):
                if g is not None:
                    p.grad = g.clone() if p.grad is None else p.grad.add_(g)

    def step(self) -> float:
        """One step of Adam with the gradients so far, clipped; their norm before that."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters(), self.config.max_grad_norm))
        if not np.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise EchelonError(f"training model {self.name} diverged at update {self.updates}: lower policy.lr")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._now.clear()
        self.updates += 1
        return norm

    # -- the model as a planner asks it ----------------------------------------------------------

    def score(self, prompts: Sequence[ChoicePrompt]) -> list[ChoiceScores]:
        """As `ChoiceModel.score`, for prompts of which each option is asked by itself behind this policy's `shared`.

        Raises:
            EchelonError: another sort of prompt.
        """
        for prompt in prompts:
            if prompt.shared != self.shared or (not prompt.each and len(prompt.options) != 2):
                raise EchelonError(f"policy {self.name} rates options one by one, with the prompt that it learns with")
        start = time.perf_counter()
        texts = [list(prompt.each) or [prompt.text] for prompt in prompts]
        distinct = list(dict.fromkeys(text for some in texts for text in some))
        odds = dict(zip(distinct, self.odds(distinct).astype(np.float64).tolist(), strict=True))
        self.prompts += len(prompts)
        self.calls += bool(distinct)
        lengths = {text: len(self._suffix(text)) for text in distinct}
        self.prompt_tokens += sum(lengths.values()) + len(self._prefix)
        found = []
        for prompt, some in zip(prompts, texts, strict=True):
            values = np.array([odds[text] for text in some] if prompt.each else [odds[some[0]], 0.0])
            values -= values.max()
            logprobs = (values - np.log(np.exp(values).sum())).astype(np.float32)
            found.append(ChoiceScores(logprobs, sum(lengths[text] for text in some) + len(self._prefix)))
        self.seconds += time.perf_counter() - start
        return found

    def spent(self) -> dict[str, float]:
        """What it was asked by `score`: prompts, calls, prompt_tokens, seconds."""
        return {"prompts": self.prompts, "calls": self.calls, "prompt_tokens": self.prompt_tokens,
                "seconds": self.seconds}  # fmt: skip

    # -- state and files -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """What learns, the optimiser's moments, the reference and the count of updates, as copies."""
        state = {f"weight.{n}": p.detach().clone() for n, p in self._named}
        state |= {f"anchor.{n}": t.clone() for n, t in self._anchor.items()}
        state["updates"] = torch.tensor(self.updates)
        # Numbers depend in their last bits on what went through beside them: a resumed run meets the same company.
        met = json.dumps({"met": self._met, "anchored": self._anchored, "now": self._now}).encode()
        state["met"] = torch.from_numpy(np.frombuffer(met, np.uint8).copy())
        for n, p in self._named:
            for key, value in self.optimizer.state.get(p, {}).items():
                state[f"adam.{key}.{n}"] = value.detach().clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave.

        Raises:
            EchelonError: it belongs to another model or other settings.
        """
        for n, p in self._named:
            if f"weight.{n}" not in state or state[f"weight.{n}"].shape != p.shape:
                raise EchelonError(f"the saved state of policy {self.name} doesn't fit it ({n})")
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=self.config.lr, weight_decay=0.0)
        with torch.no_grad():
            for n, p in self._named:
                p.copy_(state[f"weight.{n}"])
                moments = {k.split(".", 2)[1]: v.clone() for k, v in state.items()
                           if k.startswith("adam.") and k.split(".", 2)[2] == n}  # fmt: skip
                if moments:
                    self.optimizer.state[p] = moments
        self._anchor = {n: state[f"anchor.{n}"].clone() for n, _ in self._named}
        met = json.loads(state["met"].numpy().tobytes())
        self._anchored = {str(text): float(odds) for text, odds in met["anchored"].items()}
        self._now = {str(text): float(odds) for text, odds in met["now"].items()}
        self._base.clear()
        self._met.clear()
        for texts in met["met"]:
            self._prepare(texts)
        self.updates = int(state["updates"])

    def save(self, folder: Path, files: Mapping[str, str] | None = None, *, base: str | None = None) -> None:
        """Write what has been learnt into `folder`, whole or not at all, fit for `hf:<folder>`.

        Args:
            folder: a LoRA adapter in PEFT's format, or the whole model.
            files: more text files for it, by name.
            base: what the adapter calls its base model; default: the model that this one was loaded as.
        """
        with atomic_directory(folder) as temp, _quiet():
            if self._peft is not None:
                self._peft.peft_config["default"].base_model_name_or_path = base or self.name
                self._peft.save_pretrained(temp, safe_serialization=True)
                (temp / "README.md").unlink(missing_ok=True)
            else:
                raise EchelonError("full weights are saved by a checkpoint only")
            for name, text in (files or {}).items():
                atomic_write_text(temp / name, text)

    # -- passes ----------------------------------------------------------------------------------

    def _suffix(self, text: str) -> list[int]:
        ids = self._chat.encode(self.shared, [text])[0]
        prefix = self._chat.prefix(self.shared, ids)
        if len(prefix) != len(self._prefix):
            raise EchelonError(f"model {self.name}: a question changes the tokens of the system message: {text!r}")
        return ids[len(prefix) :]

    def _cut(self, items: Sequence[str]) -> list[list[int]]:
        """Indices of the questions of each pass; what the frozen layers make of them is computed where it lacks."""
        self._prepare(items)
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

    def _prepare(self, items: Sequence[str]) -> None:
        """The states of questions that are new below the lowest layer that learns (their tokens' where all learn)."""
        fresh = [text for text in dict.fromkeys(items) if text not in self._base]
        if self._base_prefix is None:
            with torch.no_grad():
                states = self._body.embed_tokens(torch.tensor([self._prefix], device=self._head.device))
                self._low = self._cache()
                self._base_prefix = self._layers(states, 0, 0, self._bottom, self._low)
        if not fresh:
            return
        suffixes = [self._suffix(text) for text in fresh]
        parts = self._parts([len(suffix) for suffix in suffixes])

        def work(part: list[int]) -> Tensor:
            with torch.no_grad():
                ids = _padded([torch.tensor(suffixes[i], device=self._head.device) for i in part])
                states = self._body.embed_tokens(ids)
                return self._layers(states, len(self._prefix), 0, self._bottom, self._widened(self._low, len(part)))

        for part, states in zip(parts, self._run(work, parts), strict=True):
            for i, row in zip(part, states, strict=True):
                self._base[fresh[i]] = row[: len(suffixes[i])].clone()
        self._met.append(fresh)

    def _forward(self, texts: Sequence[str]) -> Tensor:
        """The log-odds of questions that `_prepare` knows, behind one copy of what they share, float32 `(n,)`."""
        assert self._base_prefix is not None
        top, last = self._cache(), len(self._body.layers)
        self._layers(self._base_prefix, 0, self._bottom, last, top)
        states = _padded([self._base[text] for text in texts])
        states = self._layers(states, len(self._prefix), self._bottom, last, self._widened(top, len(texts)))
        ends = torch.tensor([len(self._base[text]) - 1 for text in texts], device=states.device)
        odds: Tensor = self._body.norm(states[torch.arange(len(texts)), ends]).float() @ self._head + self._bias
        return odds

    def _layers(self, states: Tensor, start: int, first: int, last: int, cache: Any) -> Tensor:
        """Layers `first` up to `last` over rows of tokens from place `start` on, behind what `cache` holds."""
        length = states.shape[1]
        position = torch.arange(start, start + length, device=states.device)[None]
        sees = torch.arange(start + length, device=states.device)[None] <= position[0][:, None]
        mask = torch.zeros(sees.shape, dtype=states.dtype, device=states.device)
        mask = mask.masked_fill_(~sees, torch.finfo(states.dtype).min)[None, None]
        rotary = self._body.rotary_emb(states, position_ids=position)
        for layer in self._body.layers[first:last]:
            # No mask on padding: it is on the right, where no real token looks.
            args = {"attention_mask": mask, "position_ids": position, "position_embeddings": rotary,
                    "past_key_values": cache, "use_cache": True}  # fmt: skip
            if start and self.config.checkpointing and torch.is_grad_enabled() and first == self._bottom:
                states = torch.utils.checkpoint.checkpoint(_again, layer, states, args, use_reentrant=False)
            else:
                states = layer(states, **args)
        return states

    def _cache(self) -> Any:
        return require("transformers.cache_utils").DynamicCache(config=self._body.config)

    def _widened(self, cache: Any, rows: int) -> Any:
        """A cache that holds for `rows` sequences what `cache` holds for one: a view, not a copy."""
        wide = self._cache()
        for own, layer in zip(cache.layers, wide.layers, strict=True):
            if own.is_initialized:
                layer.lazy_initialization(own.keys, own.values)
                layer.keys, layer.values = own.keys.expand(rows, -1, -1, -1), own.values.expand(rows, -1, -1, -1)
        return wide

    def _run(self, work: Callable[[list[int]], Any], parts: Sequence[list[int]]) -> list[Any]:
        with self._lanes.share() as lanes:
            threads = torch.get_num_threads()

            def labour(part: list[int]) -> Any:
                if torch.get_num_threads() != threads:
                    torch.set_num_threads(threads)
                return work(part)

            if min(lanes, len(parts)) < 2:
                return [labour(part) for part in parts]
            with ThreadPoolExecutor(min(lanes, len(parts)), "policy") as pool:
                return list(pool.map(labour, parts))

    @contextlib.contextmanager
    def _as_anchored(self) -> Iterator[None]:
        """The model as it was at the last anchor, inside the block."""
        now = [p.detach().clone() for p in self.parameters()]
        with torch.no_grad():
            for n, p in self._named:
                p.copy_(self._anchor[n])
        try:
            yield
        finally:
            with torch.no_grad():
                for p, own in zip(self.parameters(), now, strict=True):
                    p.copy_(own)

    def _check(self) -> None:
        """Refuse a model whose layers do more than we know: its numbers would be wrong without a word."""
        texts = ["Which? A or B?", "3 steps. A or B?"]
        ours = self.odds(texts)
        letters = self._chat.letter_ids[:2]
        model = self._peft.base_model.model if self._peft is not None else None
        for text, own in zip(texts, ours.tolist(), strict=True):
            with torch.no_grad():
                ids = torch.tensor(self._chat.encode(self.shared, [text]), device=self._head.device)
                states = self._body(input_ids=ids).last_hidden_state[0, -1].float()
                whole = float(states @ self._head + self._bias)
            if abs(whole - own) > 0.05 * max(1.0, abs(whole)) + 0.2:
                raise EchelonError(
                    f"model {self.name} has layers of a kind that Echelon can't train ({own} for {whole})"
                )
        del letters, model
        self._base.clear()
        self._now.clear()
        self._met.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings in which one third party tells of another's plans."""
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows of `(length, …)` as one tensor, padded with zeros on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def _again(layer: Any, states: Tensor, args: Mapping[str, Any]) -> Tensor:
    # The cache grows with each call, and checkpointing calls twice: each call gets one of its own.
    out: Tensor = layer(states, **{**args, "past_key_values": copy.copy(args["past_key_values"])})
    return out
