"""A language model in this process that writes text: greedy, and the same words for the same prompt."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from echelon.errors import EchelonError, unknown_name
from echelon.llm._chat import ChatEncoder
from echelon.llm._loading import Device, Dtype, load_causal
from echelon.llm._scoring import Lanes, PrefixStates
from echelon.llm.store import ModelStore
from echelon.llm.text import TextPrompt, TextReply

__all__ = ["CausalTextModel", "TextBatching"]

TextBatching = Literal["alone", "free"]

_INT_COUNTERS = ("prompts", "calls", "failures", "prompt_tokens", "completion_tokens")
_SCHEMA = "Reply with one JSON value that fits this JSON schema, and with nothing else:\n"


@dataclass(frozen=True)
class _Job:
    """One prompt as tokens: the prefix that its system message gives, what follows, and the longest reply."""

    prefix: tuple[int, ...]
    rest: tuple[int, ...]
    most: int

    @property
    def tokens(self) -> int:
        return len(self.prefix) + len(self.rest)


class CausalTextModel:
    """A transformers model that writes the most probable token, again and again (greedy decoding).

    **What is promised.** With `batching="alone"` each reply is computed by itself, so on one machine, with one set of
    libraries, one dtype and one number of threads, it is a function of its prompt, bit for bit: not of the other
    prompts of the call or of those before. So a run that resumes gets the same words. With `batching="free"` up to
    `batch_rows` prompts go through together, padded on the left; then the last bits, and with them a word now and
    then, depend on the company. Measured with SmolLM2, bfloat16, one thread, 16 prompts of 40 tokens each: 27 tokens
    a second alone, 123 in a batch; 13 of the 16 replies were the same.

    A JSON schema is **not enforced**: it is written behind the prompt's text, and the reply is what the model made of
    it. Whoever needs JSON checks it, or uses a model that can be held to a schema (`gguf:`, `openai:`).

    Control tokens that stand in a prompt as text are defused as in scoring. A reply ends at the end of the turn, after
    `max_tokens`, or where the model's context ends. A fault is a reply's `error`; `generate` raises nothing of its own.
    The system message's keys and values are computed once for all prompts that have it.

    Counters (in `state_dict`): `prompts` asked; `calls`, those that went through the model; `failures`;
    `prompt_tokens` and `completion_tokens`; `seconds` spent in `generate`; `money`, always 0.
    """

    def __init__(
        self,
        model: Any,
        chat: ChatEncoder,
        name: str,
        *,
        threads: int | None = 1,
        lock: threading.Lock | None = None,
        batching: TextBatching = "alone",
        batch_rows: int = 16,
    ) -> None:
        """Wrap a transformers causal model; `load` and `CausalChoiceModel.text` explain the settings."""
        if batching not in get_args(TextBatching):
            raise unknown_name("batching", batching, get_args(TextBatching))
        if batch_rows < 1 or (threads is not None and threads < 1):
            raise EchelonError("batch_rows and threads must be at least 1")
        self.name = name
        self._model, self._chat = model.eval().requires_grad_(False), chat
        # Not those of a scoring model: with another number of threads they may have other last bits.
        self._states = PrefixStates(model.base_model)
        # One pass at a time: a step of one token is mostly Python, which two threads would take turns at.
        self._lanes = Lanes(threads, 1)
        self._lock = lock or threading.Lock()
        self._rows = batch_rows if batching == "free" else 1
        self._context = int(getattr(model.config, "max_position_embeddings", 0) or 0)
        ends = model.generation_config.eos_token_id
        more = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self._ends = chat.end_ids | {int(token) for token in more}
        self.load_state_dict({})

    @classmethod
    def load(
        cls,
        spec: str,
        *,
        store: ModelStore | None = None,
        dtype: Dtype = "auto",
        device: Device = "auto",
        threads: int | None = 1,
        batching: TextBatching = "alone",
        batch_rows: int = 16,
    ) -> CausalTextModel:
        """Load a model from the store, a folder or the hub. To score with it as well, use `CausalChoiceModel.text`.

        Args:
            spec, store, dtype, device: as for `CausalChoiceModel.load`.
            threads: of the processor; None takes as many as torch has in the thread that asks. More than 1 pays for
                models of some billion weights on an idle machine: a small one's steps are too short to share (2
                threads beside another program: 6 tokens a second instead of 27).
            batching: "alone" (the default) or "free", see the class.
            batch_rows: prompts that go through together if "free".

        Raises:
            EchelonError: as `CausalChoiceModel.load`.
        """
        loaded = load_causal(spec, store=store, dtype=dtype, device=device)
        chat = ChatEncoder(loaded.tokenizer, spec)
        return cls(loaded.model, chat, spec, threads=threads, batching=batching, batch_rows=batch_rows)

    @property
    def parameter_bytes(self) -> int:
        """What the model's weights take, in bytes; tied ones count once."""
        return sum(p.numel() * p.element_size() for p in self._model.parameters())

    def generate(self, prompts: Sequence[TextPrompt]) -> list[TextReply]:
        """A reply for each prompt, in their order. Safe to call from several threads."""
        start = time.perf_counter()
        replies: list[TextReply | None] = [None] * len(prompts)
        # One and the same prompt has one and the same reply.
        jobs: dict[_Job, list[int]] = {}
        for index, prompt in enumerate(prompts):
            job = self._job(prompt)
            if isinstance(job, str):
                replies[index] = TextReply("", error=job)
            else:
                jobs.setdefault(job, []).append(index)
        # Neighbours in length, and of one system message, go through together.
        todo = sorted(jobs, key=lambda job: (job.prefix, len(job.rest), job.rest, job.most))
        groups: list[list[_Job]] = []
        for job in todo:
            if groups and len(groups[-1]) < self._rows and groups[-1][0].prefix == job.prefix:
                groups[-1].append(job)
            else:
                groups.append([job])
        made: list[TextReply] = []
        for group in groups:
            # Held for one reply, not for all: they take seconds each, and others may want to score meanwhile.
            with self._lock, self._lanes.share(), torch.inference_mode():
                written = self._write(group)
            made += written
            for job, reply in zip(group, written, strict=True):
                for index in jobs[job]:
                    replies[index] = reply
        result = [reply for reply in replies if reply is not None]
        with self._lock:
            self.prompts += len(prompts)
            self.calls += len(made)
            self.failures += sum(reply.error is not None for reply in result)
            self.prompt_tokens += sum(reply.prompt_tokens for reply in made)
            self.completion_tokens += sum(reply.completion_tokens for reply in made)
            self.seconds += time.perf_counter() - start
        return result

    def state_dict(self) -> dict[str, int | float]:
        """The counters, fit for JSON."""
        counts: dict[str, int | float] = {name: getattr(self, name) for name in _INT_COUNTERS}
        return {**counts, "seconds": self.seconds, "money": 0.0}

    def load_state_dict(self, state: Mapping[str, int | float]) -> None:
        """Take over counters that `state_dict` gave; what they lack is 0."""
        try:
            self.prompts, self.calls = int(state.get("prompts", 0)), int(state.get("calls", 0))
            self.failures = int(state.get("failures", 0))
            self.prompt_tokens = int(state.get("prompt_tokens", 0))
            self.completion_tokens = int(state.get("completion_tokens", 0))
            self.seconds = float(state.get("seconds", 0.0))
        except (TypeError, ValueError, AttributeError) as error:
            raise EchelonError(f"the saved counters of model {self.name} are damaged: {error!r}") from error

    def close(self) -> None:
        """Nothing to end: the model goes with its last user."""

    def _job(self, prompt: TextPrompt) -> _Job | str:
        """The prompt as tokens, or why it can't be asked."""
        if prompt.max_tokens < 1:
            return f"max_tokens is {prompt.max_tokens}: a reply has at least 1"
        try:
            text = prompt.text
            if prompt.schema is not None:
                schema = json.dumps(prompt.schema, ensure_ascii=False, separators=(",", ":"))
                text = f"{text}\n\n{_SCHEMA}{schema}"
            with self._lock:  # a tokenizer is not to be used by two threads at a time
                [ids] = self._chat.encode(prompt.system, [text])
                prefix = self._chat.prefix(prompt.system, ids) if self._states.can_share else ()
        except Exception as error:  # a template's own words of refusal, a schema that is no JSON
            return f"the prompt could not be written for model {self.name}: {_line(error)}"
        if self._context and len(ids) >= self._context:
            return f"a prompt of {len(ids)} tokens leaves no room for a reply in the {self._context} of {self.name}"
        room = self._context - len(ids) if self._context else prompt.max_tokens
        return _Job(prefix, tuple(ids[len(prefix) :]), min(prompt.max_tokens, room))

    def _write(self, jobs: list[_Job]) -> list[TextReply]:
        start = time.perf_counter()
        try:
            self._states.prepare(jobs[0].prefix)
            tokens = self._decode(jobs)
        except Exception as error:  # no memory, numbers that are not finite: the caller goes on without this plan
            failed = f"model {self.name} could not write: {_line(error)}"
            return [TextReply("", error=failed, attempts=1, seconds=time.perf_counter() - start) for _ in jobs]
        seconds = time.perf_counter() - start
        return [
            TextReply(
                self._chat.decode([t for t in ids if t not in self._ends]),
                prompt_tokens=job.tokens,
                completion_tokens=len(ids),
                attempts=1,
                seconds=seconds,
            )
            for job, ids in zip(jobs, tokens, strict=True)
        ]

    def _decode(self, jobs: list[_Job]) -> list[list[int]]:
        """The tokens of each reply, the one that ends it included; all jobs have one prefix."""
        device, prefix = self._states.device, jobs[0].prefix
        longest = max(len(job.rest) for job in jobs)
        gaps = [longest - len(job.rest) for job in jobs]
        # The rows end together, so that the next token of all is at the end; what fills them on the left is hidden.
        tokens = torch.tensor([[*[0] * gap, *job.rest] for gap, job in zip(gaps, jobs, strict=True)], device=device)
        seen = torch.ones(len(jobs), len(prefix) + longest, dtype=torch.long, device=device)
        place = torch.arange(len(prefix), len(prefix) + longest, device=device).repeat(len(jobs), 1)
        for row, gap in enumerate(gaps):
            seen[row, len(prefix) : len(prefix) + gap] = 0
            place[row] = (place[row] - gap).clamp(min=0)
        cache = self._states.cache(prefix, len(jobs))
        written: list[list[int]] = [[] for _ in jobs]
        going = set(range(len(jobs)))
        head = self._model.get_output_embeddings()
        while going:
            state = self._model.base_model(
                input_ids=tokens,
                # One row has nothing to hide, and without a mask takes the same way as scoring.
                attention_mask=seen if len(jobs) > 1 else None,
                position_ids=place,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            logits = head(state[:, -1])
            if not bool(logits.isfinite().all()):
                raise ValueError("it gave numbers that are not finite: its weights may be damaged")
            best = logits.argmax(-1)
            for row, token in enumerate(best.tolist()):
                if row in going:
                    written[row].append(token)
                    if token in self._ends or len(written[row]) == jobs[row].most:
                        going.remove(row)
            tokens, place = best[:, None], place[:, -1:] + 1
            seen = torch.cat([seen, seen.new_ones(len(jobs), 1)], 1)
        return written


def _line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {line}"
