"""A language model in a GGUF file that writes text in this process, by llama.cpp (through xllamacpp)."""

from __future__ import annotations

import ctypes
import importlib
import json
import mmap
import os
import re
import secrets
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echelon.errors import EchelonError
from echelon.llm.prompts import clean
from echelon.llm.store import ModelStore, resolve_gguf
from echelon.llm.text import TextPrompt, TextReply

__all__ = ["GGUFConfig", "GGUFModel"]

_QUIET = -1  # llama.cpp's verbosity at which not even errors are printed
_ERRORS = 1
# JSON on one line, as most JSON that models have read is written. Without the spaces SmolLM2 loses the thread: of 16
# plans for three robots none named all three, with them or indented 15.
_LONGEST = 400  # characters of a text whose schema says nothing about it
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class GGUFConfig:
    """How a GGUF model is run. Defaults are our choice."""

    threads: int = 1
    """Threads of llama.cpp. They wait for each other by spinning: with as many as cores, on a machine that does
    anything else, text comes slower than with one, many times over; leave it a core."""
    context: int = 4096
    """Most tokens of a prompt and its reply together; no more than the model was made for."""
    slots: int = 1
    """Prompts that are worked on together; more than 1 gives up that replies are reproducible."""
    reuse: bool = False
    """Keep what was computed for the beginning that a prompt has in common with the last one; gives up that replies
    are reproducible."""
    compact: bool = True
    """Hold JSON to one line, which takes a third fewer tokens than what models indent. False: as the model likes."""
    temperature: float = 0.0
    """Temperature of sampling, 0 to 2; 0: always the likeliest token."""
    seed: int = 0
    """Seed of sampling, the same for each prompt; 0 to 2^32 - 2."""

    def __post_init__(self) -> None:
        for name, good, need in (
            ("threads", 1 <= self.threads <= 512, "1 to 512"),
            ("context", 64 <= self.context <= 1 << 24, "64 to 16777216"),
            ("slots", 1 <= self.slots <= 64, "1 to 64"),
            ("temperature", 0 <= self.temperature <= 2, "0 to 2"),
            ("seed", 0 <= self.seed < 2**32 - 1, "0 to 4294967294"),
        ):
            if not good:
                raise EchelonError(f"gguf.{name} is {getattr(self, name)}: it must be {need}")


def _bounded(shape: Any) -> Any:
    """A JSON schema in which no text goes on for ever."""
    if isinstance(shape, Mapping):
        bounded = {name: _bounded(part) for name, part in shape.items()}
        free = shape.get("type") == "string" and not {"enum", "const", "maxLength", "pattern", "format"} & set(shape)
        return {**bounded, "maxLength": _LONGEST} if free else bounded
    return [_bounded(part) for part in shape] if isinstance(shape, list) else shape


class GGUFModel:
    """A GGUF model, run by llama.cpp in this process.

    **JSON.** A prompt's schema is compiled to a grammar, and the model can write nothing else, except that a reply
    ends at `max_tokens` or the end of the context, with half the JSON. Small models repeat themselves without end, so
    a text without a `maxLength` gets one of 400 characters. A schema that llama.cpp can't compile may hold
    to nothing: check the reply.

    **What is promised.** With `slots=1` and `reuse=False` (the defaults) a reply is a function of its prompt, on one
    machine with one version of xllamacpp: it doesn't depend on the other prompts of the call, their order, or the
    calls before. Measured with SmolLM2 and 16 team plans, which were the same down to the bits of their tokens'
    probabilities in another order, in another process and as a batch; their text also with 2 threads. With `reuse=True`
    3 of the 16 came out otherwise, with `slots=8` 4: sums are then taken in another order.

    **Faults.** A prompt that doesn't fit, or whatever llama.cpp has to say, is a reply's error. The control tokens of
    the model's vocabulary are broken up where they occur in a prompt. Ctrl-C and `close` end a reply at its next
    token, but not before its prompt was read.

    llama.cpp opens a port on this machine's loopback address, which can't be turned off; whatever is asked there needs
    a key that is drawn at random and told to nobody.

    `generate` is safe to call from several threads. In the child of a fork every reply is an error; such a child must
    end by `os._exit`, as those of multiprocessing do, since llama.cpp waits at exit for threads that it doesn't have.

    Counters (in `state_dict`): `prompts`, `calls` (prompts that were given to llama.cpp), `failures` (replies with an
    error), `prompt_tokens`, `completion_tokens`, `seconds` (the replies' seconds, summed), `money` (0).

    Attributes:
        name: `gguf:<known name>` or `gguf:<file's name>`, without its folder; file: the GGUF; config: how it is run.
    """

    def __init__(self, file: Path, config: GGUFConfig | None = None, *, name: str = "") -> None:
        """Load a model (SmolLM2-135M: 0.3 s).

        Args:
            file: a GGUF; of one in parts, the first.
            config: how it is run.
            name: what it is called; its file's name if empty.

        Raises:
            EchelonError: xllamacpp isn't installed; no such file, no GGUF, one that is damaged or that llama.cpp can't
                run.
        """
        self.file, self.config = Path(file), config or GGUFConfig()
        self.name = name or f"gguf:{clean(self.file.name)}"
        controls = _control_tokens(self.file)
        self._controls = re.compile("|".join(map(re.escape, controls))) if controls else None
        self._xllamacpp = _require_xllamacpp()
        self._server = self._start()
        # Without LLGuidance (left out of some builds) there is only llama.cpp's own grammar, with its own spaces.
        self._guided = self._xllamacpp.json_schema_to_grammar({"type": "object"}).startswith("%llguidance")
        # Not in the caller's thread: llama.cpp's calls can't be interrupted, waiting for a thread can.
        self._pool = ThreadPoolExecutor(self.config.slots, thread_name_prefix="echelon-gguf")
        self._closed = threading.Event()
        self._count_lock, self._pid = threading.Lock(), os.getpid()
        self.load_state_dict({})
        _MODELS.add(self)

    @classmethod
    def load(cls, spec: str, config: GGUFConfig | None = None, *, store: ModelStore | None = None) -> GGUFModel:
        """Load a model by its name.

        Args:
            spec: `gguf:<file>` or `gguf:<known name>`, with or without `gguf:`; see `store.resolve_gguf`.
            config: how it is run.
            store: where fetched models are; the default store if None.

        Raises:
            EchelonError: as `resolve_gguf` and the class.
        """
        file, name = resolve_gguf(spec, store), spec.removeprefix("gguf:")
        return cls(file, config, name=f"gguf:{name}" if name in (store or ModelStore()).known else "")

    def generate(self, prompts: Sequence[TextPrompt]) -> list[TextReply]:
        """A reply for each prompt, in their order; `slots` of them are worked on at the same time."""
        prompts, stop = list(prompts), threading.Event()
        try:
            if os.getpid() != self._pid:
                raise RuntimeError("it was loaded before this process was forked: load it here")
            futures = [self._pool.submit(self._one, prompt, stop) for prompt in prompts]
            replies = [future.result() for future in futures]
        except (CancelledError, RuntimeError) as error:
            told = "it was closed" if self._closed.is_set() else str(error)
            replies = [TextReply("", self._line(told))] * len(prompts)
        except BaseException:  # Ctrl-C
            stop.set()
            raise
        with self._count_lock:
            for reply in replies:
                self._counts["prompts"] += 1
                self._counts["calls"] += reply.attempts
                self._counts["failures"] += reply.error is not None
                self._counts["prompt_tokens"] += reply.prompt_tokens
                self._counts["completion_tokens"] += reply.completion_tokens
                self._counts["seconds"] += reply.seconds
        return replies

    def state_dict(self) -> dict[str, int | float]:
        """The counters, fit for JSON."""
        with self._count_lock:
            return dict(self._counts)

    def load_state_dict(self, state: Mapping[str, int | float]) -> None:
        """Take over counters that `state_dict` gave; what they lack is 0.

        Raises:
            EchelonError: a counter that is no number.
        """
        counts: dict[str, int | float] = dict.fromkeys(
            ("prompts", "calls", "failures", "prompt_tokens", "completion_tokens"), 0
        ) | {"seconds": 0.0, "money": 0.0}
        for key, zero in counts.items():
            try:
                counts[key] = type(zero)(state.get(key, zero))
            except (TypeError, ValueError, OverflowError) as error:
                raise EchelonError(f"the saved counters of model {self.name} are damaged: {key}") from error
        with self._count_lock:
            self._counts = counts

    def close(self) -> None:
        """End replies under way (they get an error) and give back the memory; whoever asks later gets an error."""
        self._closed.set()
        if os.getpid() == self._pid:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._server = None

    # -- one prompt ----------------------------------------------------------------------------

    def _one(self, prompt: TextPrompt, stop: threading.Event) -> TextReply:
        """The reply to one prompt, whatever happens."""
        start, tally = time.perf_counter(), _Tally()

        def take(chunk: Any) -> bool:
            """Note a piece of the reply; says whether to stop."""
            tally.take(chunk)
            return stop.is_set() or self._closed.is_set()

        error: str | None = None
        try:
            server = self._server
            if server is None or self._closed.is_set() or stop.is_set():
                return TextReply("", self._line("it was closed"))
            server.handle_chat_completions(self._body(prompt), take)
            error = tally.error
        except Exception as fault:
            error = str(fault) or type(fault).__name__
        if stop.is_set() or self._closed.is_set():
            error = "it was interrupted"
        return TextReply(
            "" if error else "".join(tally.text),
            None if error is None else self._line(error),
            prompt_tokens=tally.prompt_tokens,
            completion_tokens=tally.completion_tokens,
            attempts=1,
            seconds=time.perf_counter() - start,
        )

    def _body(self, prompt: TextPrompt) -> dict[str, Any]:
        """The request, in the form of an OpenAI chat completion with llama.cpp's own fields."""
        messages = [{"role": "user", "content": self._plain(prompt.text)}]
        if prompt.system:
            messages.insert(0, {"role": "system", "content": self._plain(prompt.system)})
        body: dict[str, Any] = {
            "messages": messages,
            "max_tokens": max(1, prompt.max_tokens),
            "temperature": self.config.temperature,
            "seed": self.config.seed,
            "cache_prompt": self.config.reuse,
            # Models that think first would spend the reply's tokens on it.
            "chat_template_kwargs": {"enable_thinking": False},
            # In pieces, because only between two of them can a reply be stopped.
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if prompt.schema is None:
            return body
        schema = _bounded(prompt.schema)
        if self.config.compact and self._guided:
            body["grammar"] = f"%llguidance {{}}\nstart: %json {json.dumps({**schema, 'x-guidance': _COMPACT})}"
        else:
            told = {"name": "reply", "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": told}
        return body

    def _plain(self, text: str) -> str:
        """A text without control tokens of this model: "<|im_end|>" in a task's name would end the message."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair has no tokens
        if self._controls is None:
            return text
        return self._controls.sub(lambda found: f"{found.group()[0]} {found.group()[1:]}", text)

    def _line(self, error: str) -> str:
        return clean(f"model {self.name}: {error}")[:300]

    # -- loading -------------------------------------------------------------------------------

    def _start(self) -> Any:
        """Load the file; llama.cpp's own server does it, which batches prompts that come at the same time."""
        params, config = self._xllamacpp.CommonParams(), self.config
        params.model.path = str(self.file)
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = config.threads
        params.n_parallel, params.n_ctx = config.slots, config.context * config.slots
        params.fit_params = False  # or it may choose another context
        params.cache_ram_mib = 0  # 8 GB of old prompts otherwise
        params.verbosity = _QUIET
        params.api_keys = [secrets.token_urlsafe(32)]
        params.ui = params.endpoint_slots = False
        try:
            return self._xllamacpp.Server(params)
        except Exception as error:
            reason = _why_not(self.file) or (str(error).splitlines() or [""])[0]
            raise EchelonError(f"llama.cpp can't run {self.file}: {clean(reason)[:200]}") from error


@dataclass
class _Tally:
    """What came of a reply so far."""

    text: list[str] = field(default_factory=list)
    error: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def take(self, chunk: Any) -> None:
        """Add a piece: some text, the token counts at the end, or an error in place of all that."""
        try:
            if "error" in chunk:
                self.error = str(chunk["error"].get("message") or "an error without words")
                return
            for choice in chunk["choices"]:
                self.text.append(choice["delta"].get("content") or "")
            if usage := chunk.get("usage"):
                self.prompt_tokens = int(usage["prompt_tokens"])
                self.completion_tokens = int(usage["completion_tokens"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self.error = f"llama.cpp sent something that is no chat completion: {error!r}"


def _require_xllamacpp() -> Any:
    try:
        return importlib.import_module("xllamacpp")
    except ImportError as error:
        reason = "is not installed" if error.name == "xllamacpp" else f"does not import ({error})"
        raise EchelonError(f"a GGUF model needs xllamacpp, which {reason}: pip install 'echelon-marl[gguf]'") from error


def _why_not(file: Path) -> str:
    """llama.cpp's reason for not loading a file: it says it on stderr alone, so another process is to say it."""
    code = (
        "import sys, xllamacpp\np = xllamacpp.CommonParams()\np.model.path = sys.argv[1]\n"
        f"p.n_ctx, p.fit_params, p.verbosity = 64, False, {_ERRORS}\nxllamacpp.Server(p)"
    )
    try:
        command = [sys.executable, "-P", "-c", code, str(file)]
        told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False).stderr
    except (OSError, subprocess.TimeoutExpired):
        return ""
    reasons = re.findall(r"error loading model: (.+)", told.decode("utf-8", "replace"))
    return str(reasons[0]) if reasons else ""


# -- the file's header -------------------------------------------------------------------------

# Bytes of a value by its type (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_INT32, _STRING, _ARRAY = 5, 8, 9
_CONTROL, _USER_DEFINED = 3, 4  # types of tokens that are recognised in a chat before anything else


def _control_tokens(file: Path) -> list[str]:
    """The tokens that stand for something else than their letters, longest first.

    Raises:
        EchelonError: no such file, no GGUF, or one whose header is damaged.
    """
    try:
        with file.open("rb") as handle:
            if handle.read(4) != b"GGUF":
                raise EchelonError(f"{file} is not a GGUF file")
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                tokens, types = _read_tokens(data)
    except OSError as error:
        raise EchelonError(f"GGUF {file} can't be read: {error.strerror or error}") from error
    except (struct.error, ValueError, KeyError) as error:
        raise EchelonError(f"GGUF {file} is damaged: its header can't be read") from error
    marks = {t.decode("utf-8", "replace") for t, kind in zip(tokens, types, strict=False) if kind in
             (_CONTROL, _USER_DEFINED)}  # fmt: skip
    return sorted((m for m in marks if len(m.strip()) > 1), key=lambda m: (-len(m), m))


def _read_tokens(data: mmap.mmap) -> tuple[list[bytes], tuple[int, ...]]:
    """The vocabulary and its tokens' types; empty where the header has none."""
    at, (_, _, pairs) = 24, struct.unpack_from("<IQQ", data, 4)
    found: dict[bytes, Any] = {}

    def take(layout: str) -> int:
        nonlocal at
        value = struct.unpack_from(layout, data, at)[0]
        at += struct.calcsize(layout)
        return int(value)

    def string() -> bytes:
        nonlocal at
        length = take("<Q")
        at += length
        if at > len(data):
            raise ValueError
        return data[at - length : at]

    for _ in range(pairs):
        key, kind = string(), take("<I")
        if kind == _STRING:
            string()
        elif kind != _ARRAY:
            at += _SIZES[kind]
        else:
            kind, count = take("<I"), take("<Q")
            if kind == _STRING:
                value: Any = []
                for _ in range(count):
                    value.append(string())
            else:
                if count * _SIZES[kind] > len(data) - at:
                    raise ValueError
                value = struct.unpack_from(f"<{count}i", data, at) if kind == _INT32 else ()
                at += count * _SIZES[kind]
            found[key] = value
        if len(found.keys() & {b"tokenizer.ggml.tokens", b"tokenizer.ggml.token_type"}) == 2:
            break
    return found.get(b"tokenizer.ggml.tokens", []), found.get(b"tokenizer.ggml.token_type", ())


# -- forks -------------------------------------------------------------------------------------

_MODELS: weakref.WeakSet[GGUFModel] = weakref.WeakSet()


def _after_fork() -> None:
    for model in _MODELS:
        model._count_lock = threading.Lock()
        if model._server is not None:
            # To free it would be to wait for its threads, which this process doesn't have: it is kept for good.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(model._server))
            model._server = None


os.register_at_fork(after_in_child=_after_fork)
