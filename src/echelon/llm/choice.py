"""A language model in this process that answers multiple-choice questions with the probability of each option."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from echelon.errors import EchelonError, unknown_name
from echelon.llm._chat import ChatEncoder
from echelon.llm._loading import Device, Dtype, load_causal
from echelon.llm._scoring import Batching, Lanes, PrefixScorer, PrefixStates
from echelon.llm.causal_text import CausalTextModel, TextBatching
from echelon.llm.prompts import check_options
from echelon.llm.store import ModelStore

__all__ = ["CausalChoiceModel", "ChoiceModel", "ChoicePrompt", "ChoiceScores"]


@dataclass(frozen=True)
class ChoicePrompt:
    """One multiple-choice question, to be answered with a letter.

    Args:
        shared: what many prompts have in common (role, rules, examples); sent as the system message, and
            computed once for all of them.
        text: the rest. It already shows the options as lettered lines (see `prompts.option_lines`) and
            ends such that the letter comes next ("Answer with one letter.").
        options: what the letters A, B, … stand for, in words; 1 to 26. Only their number is used for
            scoring.
        each: empty, or one text an option, in their order: then `text` is not sent. Each of these is asked by
            itself behind `shared`, to be answered with A (good) or B (bad), and an option's probability is
            proportional to its odds P(A) / P(B). So no option has a letter or a place that a model could
            favour, and a text that many prompts have in common is computed once.
    """

    shared: str
    text: str
    options: tuple[str, ...]
    each: tuple[str, ...] = ()

    @property
    def questions(self) -> list[ChoicePrompt]:
        """What is sent for it: itself, or a question of two letters an option."""
        return [ChoicePrompt(self.shared, text, ("good", "bad")) for text in self.each] or [self]


@dataclass(frozen=True, eq=False)
class ChoiceScores:
    """What a model thinks of each option.

    Args:
        logprobs: natural logarithms of the options' probabilities, shape (num_options,), float32,
            normalised over the options; read-only.
        prompt_tokens: the prompt's length in tokens, the shared part included; of all its questions together where
            each option is asked by itself.
    """

    logprobs: NDArray[np.float32]
    prompt_tokens: int


class ChoiceModel(Protocol):
    """Anything that can answer multiple-choice questions."""

    @property
    def name(self) -> str:
        """What the model is called in runs and reports."""
        ...

    def score(self, prompts: Sequence[ChoicePrompt]) -> list[ChoiceScores]:
        """The scores of each prompt, in the order of the prompts."""
        ...


class CausalChoiceModel:
    """A transformers model that scores options by the probability of their letters as its first token.

    **What is promised.** On one machine with one set of libraries and one dtype, the scores of a prompt are
    a function of that prompt, bit for bit: they do not depend on the other prompts of the call, their order,
    the calls before, or the state of the caches. So a run that resumes with empty caches gets the same
    numbers. This holds by construction, see `_scoring.PrefixScorer`; it is given up with `batching="free"`.
    Another dtype, processor, version of torch or setting of `share_prefix` gives other last bits: record them
    with a run. Measured with SmolLM2 on one AVX-512-BF16 processor, largest difference of a log-probability:
    batched against alone 0, 1 against 2 or 3 threads 0; shared prefix against one whole pass 0.18 (bfloat16),
    1.3e-5 (float32); bfloat16 against float32 0.15.

    `score` is safe to call from several threads; it uses no gradient and leaves torch's random numbers and
    thread count as they were.

    Counters (in `state_dict`): `prompts` asked; `calls`, those of which anything went through the model;
    `cache_hits`, those of which nothing did; `prompt_tokens` of what went through, shared part included; `seconds`
    spent in `score`.
    Of these only `prompts` is the same in a resumed run: the others say what the work cost, and a resumed
    run starts with an empty cache.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        *,
        threads: int | None = None,
        batch_tokens: int = 512,
        cache_size: int = 100_000,
        batching: Batching = "checked",
        share_prefix: bool = True,
    ) -> None:
        """Wrap a transformers causal model and its tokenizer; `load` explains the settings."""
        if batch_tokens < 1 or cache_size < 0 or (threads is not None and threads < 1):
            raise EchelonError("batch_tokens and threads must be at least 1, cache_size at least 0")
        if batching not in get_args(Batching):
            raise unknown_name("batching", batching, get_args(Batching))
        self.name = name
        self._model, self._cache_size = model.eval().requires_grad_(False), cache_size
        self._chat = ChatEncoder(tokenizer, name)
        self._states = PrefixStates(model.base_model)
        self._lanes = Lanes(threads, 1 if self.device == "cuda" else 4)
        self._scorer = PrefixScorer(
            model.base_model, self._states, batch_tokens=batch_tokens, batching=batching, share_prefix=share_prefix
        )
        self._cache: OrderedDict[bytes, ChoiceScores] = OrderedDict()
        self._lock = threading.Lock()
        self._most_tokens = int(getattr(model.config, "max_position_embeddings", 0) or 0)
        head = model.get_output_embeddings()
        # In float32 and always all 26 rows: one shape, so one order of the sums, for every prompt. On the processor:
        # 26 products aren't worth a way to the GPU and back.
        self._head = head.weight[self._chat.letter_ids].float().cpu().contiguous()
        bias = getattr(head, "bias", None)
        self._bias = None if bias is None else bias[self._chat.letter_ids].float().cpu()
        self.load_state_dict({"prompts": 0, "calls": 0, "cache_hits": 0, "prompt_tokens": 0, "seconds": 0.0})
        self._check_head()

    @classmethod
    def load(
        cls,
        spec: str,
        *,
        store: ModelStore | None = None,
        dtype: Dtype = "auto",
        device: Device = "auto",
        threads: int | None = None,
        batch_tokens: int = 512,
        cache_size: int = 100_000,
        batching: Batching = "checked",
        share_prefix: bool = True,
    ) -> CausalChoiceModel:
        """Load a model from the store, a folder or the hub.

        Args:
            spec: a known model's name or `hf:<folder or id>`, also of a LoRA adapter, see `llm.locate`.
            store: where fetched models are; the default store if None.
            dtype: "auto" is bfloat16 where the device computes in it, else float32.
            device: "auto" is a GPU where torch finds one, else the processor. A GPU seldom gives a row of a batch
                the bits that it has alone, so "checked" ends in single rows there; "free" is fast.
            threads: of the processor, shared out among up to 4 passes that run side by side; None takes as many as
                torch has in the thread that asks.
            batch_tokens: at most so many tokens (rows × length, the shared part not counted) in one pass.
            cache_size: how many scores are kept, about 300 bytes each; 0 keeps none.
            batching: "checked" (exact, the default), "alone" (exact, never batches), "free" (unchecked).
            share_prefix: compute the shared part once; False is for comparison.

        Raises:
            EchelonError: an unknown, absent or damaged model, a missing library, no GPU, an adapter that doesn't fit,
                a model that can't be used.
        """
        loaded = load_causal(spec, store=store, dtype=dtype, device=device)
        return cls(
            loaded.model,
            loaded.tokenizer,
            spec,
            threads=threads,
            batch_tokens=batch_tokens,
            cache_size=cache_size,
            batching=batching,
            share_prefix=share_prefix,
        )

    @property
    def dtype(self) -> str:
        """What the model computes in: "bfloat16" or "float32"."""
        return str(self._model.dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        """Where the model is: "cpu" or "cuda"."""
        return str(self._states.device.type)

    @property
    def parameter_bytes(self) -> int:
        """What the model's weights take, in bytes; tied ones count once."""
        return sum(p.numel() * p.element_size() for p in self._model.parameters())

    def text(
        self, *, threads: int | None = 1, batching: TextBatching = "alone", batch_rows: int = 16
    ) -> CausalTextModel:
        """The same model as one that writes text; it shares the weights and the tokenizer, and the two take turns.

        The settings are those of `CausalTextModel.load`.
        """
        return CausalTextModel(
            self._model,
            self._chat,
            self.name,
            threads=threads,
            lock=self._lock,
            batching=batching,
            batch_rows=batch_rows,
        )

    @property
    def batch_shapes(self) -> dict[tuple[int, int, int], bool]:
        """For each batch shape met (shared tokens, rows, padded tokens): did it agree with single rows?"""
        return self._scorer.shapes

    def score(self, prompts: Sequence[ChoicePrompt]) -> list[ChoiceScores]:
        """The log-probabilities of each prompt's options, in the order of the prompts.

        Raises:
            EchelonError: a prompt with no option or more than 26, or longer than the model's context, or whose
                `each` doesn't fit its options; the model's numbers are not finite.
        """
        for prompt in prompts:
            check_options(prompt.options)
            if prompt.each and len(prompt.each) != len(prompt.options):
                raise EchelonError(f"a prompt has {len(prompt.options)} options and {len(prompt.each)} texts for them")
        with self._lock, self._lanes.share() as lanes, torch.inference_mode():
            start = time.perf_counter()
            keys = [[_key(question) for question in prompt.questions] for prompt in prompts]
            found: dict[bytes, ChoiceScores] = {}
            fresh: dict[bytes, ChoicePrompt] = {}
            calls = 0
            for prompt, its_keys in zip(prompts, keys, strict=True):
                before = len(fresh)
                for key, question in zip(its_keys, prompt.questions, strict=True):
                    if key in self._cache:
                        found[key] = self._cache[key]
                    else:
                        fresh[key] = question
                calls += len(fresh) > before
            for key, scores in zip(fresh, self._compute(list(fresh.values()), lanes), strict=True):
                found[key] = scores
                self.prompt_tokens += scores.prompt_tokens
            for key in found:
                self._cache[key] = found[key]
                self._cache.move_to_end(key)
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
            self.prompts += len(prompts)
            self.calls += calls
            self.cache_hits += len(prompts) - calls
            result = [
                self._rated([found[key] for key in its_keys]) if prompt.each else found[its_keys[0]]
                for prompt, its_keys in zip(prompts, keys, strict=True)
            ]
            self.seconds += time.perf_counter() - start
        return result

    def forget(self) -> None:
        """Forget every answer: the next questions cost what they would in a process of their own."""
        with self._lock:
            self._cache.clear()

    def state_dict(self) -> dict[str, int | float]:
        """The counters, fit for JSON. The caches hold nothing that can't be computed again."""
        return {
            "prompts": self.prompts,
            "calls": self.calls,
            "cache_hits": self.cache_hits,
            "prompt_tokens": self.prompt_tokens,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: Mapping[str, int | float]) -> None:
        """Take over counters that `state_dict` gave."""
        try:
            self.prompts, self.calls = int(state["prompts"]), int(state["calls"])
            self.cache_hits, self.prompt_tokens = int(state["cache_hits"]), int(state["prompt_tokens"])
            self.seconds = float(state["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise EchelonError(f"the saved counters of model {self.name} are damaged: {error!r}") from error

    def _compute(self, prompts: Sequence[ChoicePrompt], lanes: int) -> list[ChoiceScores]:
        groups: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        by_shared: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            by_shared.setdefault(prompt.shared, []).append(index)
        for shared, indices in by_shared.items():
            for index, ids in zip(indices, self._chat.encode(shared, [prompts[i].text for i in indices]), strict=True):
                if self._most_tokens and len(ids) > self._most_tokens:
                    raise EchelonError(
                        f"a prompt of {len(ids)} tokens is longer than the {self._most_tokens} that model "
                        f"{self.name} takes"
                    )
                groups.setdefault(self._chat.prefix(shared, ids), []).append((index, ids))
        scores: dict[int, ChoiceScores] = {}
        for prefix, members in groups.items():
            hidden = self._scorer.last_hidden(prefix, [ids[len(prefix) :] for _, ids in members], lanes)
            for (index, ids), state in zip(members, hidden, strict=True):
                logits = self._letter_logits(state)[: len(prompts[index].options)]
                scores[index] = ChoiceScores(self._normalise(logits.double().numpy()), len(ids))
        return [scores[index] for index in range(len(prompts))]

    def _letter_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits of the 26 letters for one hidden state of shape (hidden_size,)."""
        logits = torch.mv(self._head, hidden.float())
        return logits if self._bias is None else logits + self._bias

    def _rated(self, answers: Sequence[ChoiceScores]) -> ChoiceScores:
        """One score of the answers, A or B, about each option by itself."""
        odds = np.array([float(answer.logprobs[0]) - float(answer.logprobs[1]) for answer in answers])
        return ChoiceScores(self._normalise(odds), sum(answer.prompt_tokens for answer in answers))

    def _normalise(self, values: NDArray[np.float64]) -> NDArray[np.float32]:
        if not np.isfinite(values).all():
            raise self._not_finite()
        shifted = values - values.max()
        logprobs: NDArray[np.float32] = (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)
        logprobs.flags.writeable = False  # the cache hands the same array to many
        return logprobs

    def _not_finite(self) -> EchelonError:
        return EchelonError(f"model {self.name} gave numbers that are not finite: its weights may be damaged")

    def _check_head(self) -> None:
        """Refuse a model whose output layer does more than multiply: its letters would be scored wrongly."""
        with torch.inference_mode(), self._lanes.share():
            ids = torch.tensor(self._chat.encode("Answer.", ["Which?"]), device=self._states.device)
            whole = self._model(input_ids=ids).logits[0, -1, self._chat.letter_ids].float().cpu()
            ours = self._letter_logits(self._model.base_model(input_ids=ids).last_hidden_state[0, -1].cpu())
        if not bool(whole.isfinite().all()):
            raise self._not_finite()
        if not torch.allclose(whole, ours, rtol=0.02, atol=0.02 * float(whole.abs().max())):
            raise EchelonError(f"model {self.name} has an output layer of a kind that Echelon does not know")


def _key(prompt: ChoicePrompt) -> bytes:
    # A digest, because prompts are long and a hundred thousand are kept. Lengths keep the parts apart.
    head = f"{len(prompt.options)} {len(prompt.shared)} {len(prompt.text)} "
    text = (head + prompt.shared + prompt.text).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()
