"""A language model behind an OpenAI-compatible HTTP server: hosted, vLLM, SGLang, Ollama, llama.cpp.

Nothing that the server sends is trusted, and no fault of it raises out of `ServerModel.generate`: every fault is
counted, what can heal is tried again, and the rest is a reply's error in one clean line.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ipaddress
import json
import logging
import math
import os
import random
import re
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import httpx
import tenacity

from echelon.errors import EchelonError, unknown_name
from echelon.llm._breaker import Breaker
from echelon.llm._http import KINDS, Answer, Fault, completion, content, find_json, hide, one_line, send, status_fault
from echelon.llm.json_text import why_no_json
from echelon.llm.prompts import clean
from echelon.llm.text import TextPrompt, TextReply

__all__ = ["ServerConfig", "ServerModel", "hurry"]

Structured = Literal["auto", "schema", "tool", "prompt"]
_RUNGS: tuple[str, ...] = ("schema", "tool", "prompt")
_REFUSED = (400, 404, 422, 501)  # what servers say to a field that they don't know
_IGNORED = 3  # answers in a row that aren't JSON, until a way to ask for it counts as ignored
_FIRST_WAIT, _MOST_WAIT = 0.5, 8.0  # seconds between attempts: doubled each time, then drawn from 50% to 100%
_GIVEN_UP = "given up: the run is to stop"
_OFFICIAL = "https://api.openai.com/v1"


@dataclass(frozen=True)
class ServerConfig:
    """How a language model's server is reached. Defaults are our choice."""

    url: str = ""
    """Base address of an OpenAI-compatible API, often ending in /v1; empty: the environment variable OPENAI_BASE_URL,
    else OpenAI's own."""
    key_variable: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the API key, never the key itself; if the variable is empty or not
    set, no key is sent."""
    timeout: float = 30.0
    """Most seconds for one request, from connecting to the reply's last byte. A prompt with its retries and the waits
    between them ends after at most attempts times that."""
    attempts: int = 4
    """Most requests until one is answered, where trying again can help; 1: no retries."""
    connections: int = 16
    """Most prompts under way at the same time."""
    structured: Literal["auto", "schema", "tool", "prompt"] = "auto"
    """How JSON is asked for: by response_format with a JSON schema, by a tool call, or in the prompt's words; auto: the
    first of these that the server takes."""
    temperature: float = 0.0
    """Temperature of sampling, 0 to 2; 0: always the likeliest token."""
    max_reply_bytes: int = 1_000_000
    """Most bytes of a reply; a longer one is cut off and counts as a fault."""
    price_in: float = 0.0
    """Money per million tokens of prompts; 0: nothing is reckoned."""
    price_out: float = 0.0
    """Money per million tokens of replies; 0: nothing is reckoned."""
    breaker_failures: int = 5
    """Prompts that fail in a row, retries included, until the server is left alone for a while; 0: never."""
    breaker_seconds: float = 30.0
    """Seconds that a failing server is left alone for at first; each trial that fails doubles them, up to 600."""

    def __post_init__(self) -> None:
        for name, good, need in (
            ("timeout", 0 < self.timeout <= 86_400, "above 0, up to 86400"),
            ("attempts", 1 <= self.attempts <= 100, "1 to 100"),
            ("connections", 1 <= self.connections <= 1000, "1 to 1000"),
            ("temperature", 0 <= self.temperature <= 2, "0 to 2"),
            ("max_reply_bytes", self.max_reply_bytes >= 1000, "at least 1000"),
            ("price_in", 0 <= self.price_in < math.inf, "at least 0"),
            ("price_out", 0 <= self.price_out < math.inf, "at least 0"),
            ("breaker_failures", self.breaker_failures >= 0, "at least 0"),
            ("breaker_seconds", 0 < self.breaker_seconds < math.inf, "above 0"),
        ):
            if not good:
                raise EchelonError(f"server.{name} is {getattr(self, name)}: it must be {need}")
        if self.structured not in get_args(Structured):
            raise unknown_name("server.structured", str(self.structured), get_args(Structured))
        if self.url:
            _check_url(self.url, "server.url")
        _check_variable(self.key_variable)


def _check_url(url: str, where: str) -> httpx.URL:
    """Refuse what is no base address, or might hold a secret: that is never repeated."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError, TypeError):
        raise EchelonError(f"{where} is no address: it must look like http://127.0.0.1:8000/v1") from None
    if parsed.userinfo or "@" in url:
        raise EchelonError(
            f"{where} holds a user name or password, which would be written into the run's config: leave it out; a key "
            "belongs in the environment variable that server.key_variable names"
        )
    if parsed.query or parsed.fragment or "?" in url or "#" in url:
        raise EchelonError(f"{where} must end with its path: what follows a ? or # may be a secret and isn't sent")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise EchelonError(f"{where} is {clean(url)[:100]!r}: it must begin with http:// or https:// and a host")
    return parsed


def _check_variable(name: str) -> None:
    """Refuse what is no variable's name or looks like a key: it isn't repeated, for it may be one."""
    looks = name.lower().startswith(("sk-", "sk_", "gsk_", "hf_", "xai-", "aiza", "bearer"))
    mixed = len(name) >= 20 and any(c.isdigit() for c in name) and any(c.islower() for c in name)
    if looks or mixed or (name and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)):
        raise EchelonError(
            "server.key_variable must be the name of an environment variable, such as OPENAI_API_KEY; what was given "
            "looks like a key: put that into the environment"
        )


class _Key(str):
    """An API key that doesn't show itself where an object is printed."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'[key]'"


class _HideKeys(logging.Filter):
    """Takes keys out of what the HTTP libraries log: a server may send one back in a header."""

    keys: set[str]

    def __init__(self) -> None:
        super().__init__()
        self.keys = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if any(key in text for key in self.keys):
            for key in self.keys:
                text = hide(text, key)
            record.msg, record.args = text, ()
        return True


_HIDE_KEYS = _HideKeys()
for _name in ("httpx", "httpcore.connection", "httpcore.http11", "httpcore.proxy"):
    logging.getLogger(_name).addFilter(_HIDE_KEYS)


@dataclass(frozen=True, eq=False)
class _Link:
    """A thread with an event loop, and the connections that live in it."""

    client: httpx.AsyncClient
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread
    slots: asyncio.Semaphore
    pid: int


@dataclass
class _Tally:
    """What one prompt took so far."""

    deadline: float
    trial: bool
    attempts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    written: list[str] = field(default_factory=list)


class ServerModel:
    """A model behind an OpenAI-compatible server, asked over HTTP (`POST /chat/completions`).

    **JSON.** A prompt with a schema is asked by `response_format` first; if the server refuses that, by a forced tool
    call; else with the schema written into the prompt. What worked is remembered. A reply without any JSON is sent back
    once with the reason. The reply's text is the JSON as the model wrote it: only its form is checked here.

    **Faults.** What can heal (timeouts, 408, 429, 5xx, dropped connections, broken replies) is tried again with
    exponential backoff and jitter, or after what Retry-After says. When too many prompts in a row fail, a circuit
    breaker answers at once for a while. `generate` doesn't raise.

    **Secrets.** The key comes from the environment and goes nowhere but into the Authorization header.

    Counters (in `state_dict`): `prompts`, `calls` (requests sent), `failures` (replies with an error), `retries`,
    `prompt_tokens`, `completion_tokens`, `seconds` (the replies' seconds, summed), `money`, `breaker_opened`,
    `breaker_refused`, and `fault_<kind>` for each kind in `_http.KINDS`.

    Safe to use from several threads, and in a forked child, which gets connections of its own.

    Attributes:
        name: `openai:<model>`; model: what the server calls it; config: how it is reached; url: the base address.
    """

    def __init__(
        self,
        model: str,
        config: ServerConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Nothing is sent yet; see `check`.

        Args:
            model: the model's name at the server, with or without `openai:` before it.
            config: how the server is reached.
            clock: seconds that never run back; for tests.
            sleep: waits between attempts; for tests.

        Raises:
            EchelonError: a name that is none, an address or a key in the environment that can't be used.
        """
        self.model = model.removeprefix("openai:")
        if not self.model or clean(self.model) != self.model or len(self.model) > 200:
            raise EchelonError("openai:<model> needs the name of a model at the server, in one line")
        self.config = ServerConfig() if config is None else config
        self.name = f"openai:{self.model}"
        url, where = self.config.url, "server.url"
        if not url:
            url, where = os.environ.get("OPENAI_BASE_URL", "").strip() or _OFFICIAL, "the variable OPENAI_BASE_URL"
        parsed = _check_url(url, where)
        self._host, self._place = parsed.host, parsed.netloc.decode()
        self.url = url.rstrip("/")
        variable = self.config.key_variable
        self._key = _Key(os.environ.get(variable, "").strip() if variable else "")
        if not self._key.isascii() or not self._key.isprintable() or " " in self._key:
            raise EchelonError(f"the environment variable {variable} holds characters that no API key has")
        if self._key:
            _HIDE_KEYS.keys.add(self._key)
        self._clock, self._sleep = clock, sleep
        self._breaker = Breaker(self.config.breaker_failures, self.config.breaker_seconds, clock)
        self._rung = _RUNGS[0] if self.config.structured == "auto" else self.config.structured
        self._ignored = 0
        self._dropped: set[str] = set()  # fields of a request that the server refuses
        # Its own, and not seeded: jitter is there so that two processes don't do the same; it moves nothing but waits.
        self._random = random.Random()
        self._link: _Link | None = None
        self._patience: float | None = None
        self._given_up = False
        self._limits: set[asyncio.Timeout] = set()  # of prompts under way; touched in the loop's thread only
        self._closed = False
        self.load_state_dict({})
        self._unlock()
        _MODELS.add(self)

    def _unlock(self) -> None:
        """Begin with new locks and without connections: in the child of a fork the loop's thread is gone."""
        self._lock, self._count_lock = threading.Lock(), threading.Lock()
        self._breaker.unlock()
        self._limits = set()
        if self._link is not None:
            _ORPHANS.append(self._link)  # kept: to end it would end the parent's connections
            self._link = None

    @property
    def connections(self) -> int:
        """Most prompts under way at the same time."""
        return self.config.connections

    def generate(self, prompts: Sequence[TextPrompt]) -> list[TextReply]:
        """A reply for each prompt, in their order; up to `connections` are under way at the same time."""
        prompts = list(prompts)
        if not prompts:
            return []
        try:
            replies: list[TextReply] = self._submit(self._all(prompts))
        except Exception as error:  # closed, or no thread or connection can be set up
            replies = [TextReply("", self._line(str(error)))] * len(prompts)
        with self._count_lock:
            self._counts["prompts"] += len(replies)
            for reply in replies:
                self._counts["failures"] += reply.error is not None
                self._counts["seconds"] += reply.seconds
                self._counts["money"] += reply.money
        return replies

    def check(self) -> None:
        """Ask the server for its models (`GET /models`), so that a mistake shows before a run begins.

        A server that has no such list, or one that can't be read, passes; so does llama.cpp's, which answers for its
        one model whatever name is asked for.

        Raises:
            EchelonError: it can't be reached, is in trouble, refuses the key, or has no such model.
        """
        try:
            known: list[str] = self._submit(self._models())
        except Fault as fault:
            if fault.kind in ("http_404", "http_4xx", "encoding", "too_large") or fault.status == 501:
                return
            if fault.status == 403 and "scope" in fault.body:  # a key that may chat, but not list the models
                return
            raise EchelonError(self._line(fault.line)) from None
        except Exception as error:
            raise EchelonError(self._line(str(error))) from None
        if known and not any(self.model in _spellings(name) for name in known):
            names = [one_line(name, self._key, 60) for name in known[:1000]]
            raise EchelonError(one_line(f"{self._place}: {unknown_name('model', self.model, names)}", self._key, 500))

    def state_dict(self) -> dict[str, int | float]:
        """The counters, fit for JSON."""
        with self._count_lock:
            counts = dict(self._counts)
        counts["breaker_opened"] += self._breaker.opened
        counts["breaker_refused"] += self._breaker.refused
        return counts

    def load_state_dict(self, state: Mapping[str, int | float]) -> None:
        """Take over counters that `state_dict` gave; what they lack is 0.

        Raises:
            EchelonError: a counter that is no number.
        """
        zeros: dict[str, int | float] = dict.fromkeys(
            ("prompts", "calls", "failures", "retries", "prompt_tokens", "completion_tokens"), 0
        )
        zeros |= {"seconds": 0.0, "money": 0.0, "breaker_opened": 0, "breaker_refused": 0}
        zeros |= {f"fault_{kind}": 0 for kind in KINDS}
        for name, zero in zeros.items():
            value = state.get(name, zero)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise EchelonError(f"the saved counters of model {self.name} are damaged: {name}")
            zeros[name] = type(zero)(value)
        self._counts = zeros
        self._breaker.opened = self._breaker.refused = 0

    def hurry(self, seconds: float | None) -> None:
        """Give each prompt at most so many seconds, those under way from now on; None: no such limit any more.

        For a run that is to stop: a server that hangs must not keep it. Once a prompt took longer, no other is sent.
        May be called in the handler of a signal.
        """
        self._patience, self._given_up, link = seconds, False, self._link
        if seconds is not None and link is not None:
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                link.loop.call_soon_threadsafe(self._shorten, link.loop, seconds)

    def _shorten(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        when = loop.time() + seconds
        for limit in self._limits:
            if not limit.expired() and (limit.when() or math.inf) > when:
                limit.reschedule(when)

    def close(self) -> None:
        """End its thread and connections; prompts under way get an error, and so does whoever asks later."""
        with self._lock:
            self._closed = True
            link, self._link = self._link, None
        if link is not None:
            _end(link)

    # --- the thread ---

    def _submit(self, work: Any) -> Any:
        """Run a coroutine in the loop's thread and wait for what it gives."""
        try:
            with self._lock:
                if self._closed:
                    raise Fault("other", "the model was closed")
                if self._link is None:
                    self._link = self._open()
                # Under the lock, so that `close` comes before it or after it: a task is either refused or ended.
                future = asyncio.run_coroutine_threadsafe(work, self._link.loop)
        except Exception:
            work.close()
            raise
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise Fault("other", "closed while it was asked") from None
        except Exception:
            raise
        except BaseException:  # Ctrl-C in the thread that waits
            future.cancel()
            raise

    def _open(self) -> _Link:
        most = self.config.connections
        # Whatever proxy the environment names, it can't reach this machine's own loopback.
        direct: dict[str, None] = {f"all://{_bracket(self._host)}": None} if _is_loopback(self._host) else {}
        try:
            client = httpx.AsyncClient(
                limits=httpx.Limits(max_connections=most, max_keepalive_connections=most),
                timeout=self.config.timeout,
                follow_redirects=False,
                mounts=direct,
            )
        except Exception as error:  # a proxy or certificate in the environment that can't be used
            raise Fault("connect", f"no connection can be set up: {error}") from None
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=_run, args=(loop, client), name=f"echelon-{self.name[:40]}", daemon=True)
        link = _Link(client, loop, thread, asyncio.Semaphore(most), os.getpid())
        thread.start()
        weakref.finalize(self, _end, link)  # also at the interpreter's exit
        return link

    async def _all(self, prompts: Sequence[TextPrompt]) -> list[TextReply]:
        link = self._link
        if link is None:
            raise Fault("other", "the model was closed")
        return await asyncio.gather(*(self._one(link, prompt) for prompt in prompts))

    # --- one prompt ---

    async def _one(self, link: _Link, prompt: TextPrompt) -> TextReply:
        """The reply to one prompt, whatever happens."""
        async with link.slots:
            if self._given_up:
                return TextReply("", self._line(_GIVEN_UP))
            how = self._breaker.enter()
            if how is None:
                return TextReply("", self._line("left alone after too many failures in a row"))
            start, good, text, line = self._clock(), None, "", None
            tally = _Tally(start + self.config.attempts * self.config.timeout, how == "trial")
            limit = asyncio.timeout(self._patience)
            try:
                async with limit:
                    self._limits.add(limit)
                    text = await self._answer(link, prompt, tally)
                good = True
            except TimeoutError:
                self._fault("timeout")
                # Broken off in a hurry it says nothing about the server.
                line, good = self._line(_GIVEN_UP), None if self._patience is not None else False
                self._given_up = self._patience is not None
            except Fault as fault:
                line = self._line(fault.line)
                # A server whose model writes prose is alive.
                good = fault.kind == "not_json"
            except Exception as error:  # whatever a hostile reply or a strange prompt may raise: it must not stop a run
                self._fault("other")
                line, good = self._line(f"{type(error).__name__}: {error}"), False
            finally:
                self._limits.discard(limit)
                self._breaker.leave(how, good)
        config = self.config
        money = (tally.prompt_tokens * config.price_in + tally.completion_tokens * config.price_out) / 1e6
        return TextReply(
            text,
            line,
            tally.prompt_tokens,
            tally.completion_tokens,
            tally.attempts,
            max(0.0, self._clock() - start),
            money,
            tuple(tally.written),
        )

    async def _answer(self, link: _Link, prompt: TextPrompt, tally: _Tally) -> str:
        """The text, or the JSON in it; raises Fault."""
        if prompt.schema is None:
            return self._hidden(await self._ask(link, prompt, "", [], tally))
        rung = self._rung
        while True:
            try:
                text = await self._ask(link, prompt, rung, [], tally)
                break
            except Fault as fault:
                # At most two steps down: a server that changes its mind each time can't keep us here.
                if self.config.structured != "auto" or rung == _RUNGS[-1] or not _is_refusal(fault):
                    raise
                rung = _RUNGS[_RUNGS.index(rung) + 1]
        if rung != self._rung and self.config.structured == "auto":
            self._rung = max(rung, self._rung, key=_RUNGS.index)
        tally.written.append(self._hidden(text))
        openings = {"object": "{", "array": "["}.get(str(prompt.schema.get("type")), "{[")
        found = find_json(text, openings)
        if found is not None:
            self._ignored = 0
            return self._hidden(found)
        self._fault("not_json")
        why = self._hidden(why_no_json(text, openings))
        again = f"That holds no whole JSON ({why}). Answer again, with the JSON and nothing else."
        repair = [
            {"role": "assistant", "content": self._hidden(text)[:4000]},
            {"role": "user", "content": again},
        ]
        text = await self._ask(link, prompt, "prompt", repair, tally)
        tally.written.append(self._hidden(text))
        found = find_json(text, openings)
        if found is None:
            self._fault("not_json")
            raise Fault("not_json", f"no JSON in what the model wrote: {text[:200]!r}")
        # The server took the field and didn't hold the model to it; in words it works.
        self._ignored += rung != "prompt"
        if self.config.structured == "auto" and self._ignored >= _IGNORED:
            self._rung = "prompt"
        return self._hidden(found)

    async def _ask(self, link: _Link, prompt: TextPrompt, rung: str, more: list[dict[str, str]], tally: _Tally) -> str:
        """The text of the model's message, after as many attempts as it takes; raises Fault."""
        retrying = tenacity.AsyncRetrying(
            sleep=self._sleep,
            wait=self._wait,
            stop=lambda state: self._enough(state, tally),
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, Fault) and error.heals),
            before_sleep=lambda state: self._count("retries"),
            reraise=True,
        )
        while True:
            payload = self._payload(prompt, rung, more)
            try:
                return await retrying(self._attempt, link, payload, tally)
            except Fault as fault:
                # "Unsupported parameter: 'max_tokens' …", "'temperature' does not support 0.0 …"
                unwanted = next((f for f in ("max_tokens", "temperature") if f in payload and f in fault.body), None)
                if fault.status != 400 or unwanted is None or "support" not in fault.body:
                    raise
                self._dropped.add(unwanted)

    def _payload(self, prompt: TextPrompt, rung: str, more: list[dict[str, str]]) -> dict[str, Any]:
        system = prompt.system
        if rung == "prompt":
            schema = json.dumps(prompt.schema)
            system += f"\n\nAnswer with JSON and nothing else. It must fit this JSON schema:\n{schema}"
        messages = [{"role": "system", "content": system.strip()}] if system.strip() else []
        messages += [{"role": "user", "content": prompt.text}, *more]
        payload: dict[str, Any] = {"model": self.model, "messages": messages}
        longest = "max_completion_tokens" if "max_tokens" in self._dropped else "max_tokens"
        payload[longest] = prompt.max_tokens
        if "temperature" not in self._dropped:
            payload["temperature"] = self.config.temperature
        if rung == "schema":
            described = {"name": "answer", "schema": prompt.schema, "strict": True}
            payload["response_format"] = {"type": "json_schema", "json_schema": described}
        elif rung == "tool":
            function = {"name": "answer", "description": "Give the answer.", "parameters": prompt.schema}
            payload["tools"] = [{"type": "function", "function": function}]
            payload["tool_choice"] = {"type": "function", "function": {"name": "answer"}}
        return payload

    async def _attempt(self, link: _Link, payload: Mapping[str, Any], tally: _Tally) -> str:
        """Send one request; the text of its message, or a Fault, counted."""
        body = json.dumps(payload).encode()
        longest = payload.get("max_tokens", payload.get("max_completion_tokens", 0))
        left = tally.deadline - self._clock()
        if left <= 0:
            raise Fault("timeout", "no time is left for another request")
        tally.attempts += 1
        self._count("calls")
        try:
            answer = await self._send(link, "POST", "/chat/completions", body, min(self.config.timeout, left))
            message, usage = completion(answer)
            # A token is a byte at least; a chat template adds some, and a thought that isn't sent has its limit.
            self._use(usage, (len(body) + 4096, len(answer.body) + longest), tally)
            return content(message, "tools" in payload)
        except Fault as fault:
            asked = "tools" in payload or "response_format" in payload
            self._fault("structure" if asked and _is_refusal(fault) else fault.kind)
            raise

    async def _send(self, link: _Link, method: str, path: str, body: bytes | None, timeout: float) -> Answer:
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "echelon"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        answer = await send(
            link.client,
            method,
            self.url + path,
            content=body,
            headers=headers,
            timeout=timeout,
            limit=self.config.max_reply_bytes,
        )
        fault = status_fault(answer, self.config.key_variable, bool(self._key))
        if fault is not None:
            raise fault
        return answer

    def _use(self, usage: Mapping[str, Any], most: tuple[int, int], tally: _Tally) -> None:
        """Add the reply's token counts (prompt, completion), unless they are no counts or more than there can be."""
        counts = [usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens")]
        # type(…) is int: True is no count.
        good = [n if type(n) is int and 0 <= n <= top else None for n, top in zip(counts, most, strict=True)]
        if None in good:
            self._fault("usage")
        prompt, reply = (n or 0 for n in good)
        tally.prompt_tokens += prompt
        tally.completion_tokens += reply
        self._count("prompt_tokens", prompt)
        self._count("completion_tokens", reply)

    def _wait(self, state: tenacity.RetryCallState) -> float:
        """Seconds before the next attempt: what the server asks for, or exponential backoff; with jitter."""
        fault = state.outcome.exception() if state.outcome is not None else None
        backoff = min(_MOST_WAIT, _FIRST_WAIT * 2.0 ** min(state.attempt_number - 1, 10)) * self._random.uniform(0.5, 1)
        asked = fault.wait if isinstance(fault, Fault) else None
        # All who were told to come back after so long would come at once.
        return backoff if asked is None else asked + 0.1 * backoff

    def _enough(self, state: tenacity.RetryCallState, tally: _Tally) -> bool:
        """Whether no further attempt is made: enough of them, no time left, or others found the server dead."""
        return (
            state.attempt_number >= self.config.attempts
            or self._clock() + state.upcoming_sleep >= tally.deadline
            or (self._breaker.is_open and not tally.trial)
        )

    async def _models(self) -> list[str]:
        """The names of the server's models; empty if any name will do."""
        link = self._link
        if link is None:
            raise Fault("other", "the model was closed")
        tally = _Tally(self._clock() + self.config.attempts * self.config.timeout, True)
        retrying = tenacity.AsyncRetrying(
            sleep=self._sleep,
            wait=self._wait,
            stop=lambda state: self._enough(state, tally),
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, Fault) and error.heals),
            reraise=True,
        )
        try:
            answer: Answer = await retrying(self._send, link, "GET", "/models", None, self.config.timeout)
            found = json.loads(answer.body)
            entries = [entry for entry in found["data"] if isinstance(entry, dict)]
        except Fault:
            raise
        except Exception:  # no list that can be read
            return []
        if any(entry.get("owned_by") == "llamacpp" for entry in entries):
            return []
        return [entry["id"] for entry in entries if isinstance(entry.get("id"), str)]

    # --- small things ---

    def _count(self, name: str, by: int = 1) -> None:
        with self._count_lock:
            self._counts[name] += by

    def _fault(self, kind: str) -> None:
        self._count(f"fault_{kind}")

    def _line(self, text: str) -> str:
        return one_line(f"{self._place}: {text}", self._key)

    def _hidden(self, text: str) -> str:
        """A model's text without the key, which a server may send back; words as short as "none" are no secret."""
        return hide(text, self._key) if len(self._key) >= 8 else text


def _spellings(name: str) -> tuple[str, ...]:
    """What a listed model answers to: Ollama adds a tag behind, Gemini a folder before."""
    return name, name.partition(":")[0], name.removeprefix("models/")


def _is_refusal(fault: Fault) -> bool:
    """Whether a fault may mean that the server doesn't know a way to ask for JSON."""
    if fault.status not in _REFUSED or fault.heals:
        return False
    # "The model `x` does not exist": no other way to ask would help.
    said = fault.body.lower()
    return not (fault.status == 404 and "model" in said and ("not found" in said or "not exist" in said))


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _run(loop: asyncio.AbstractEventLoop, client: httpx.AsyncClient) -> None:
    """The thread: runs its loop until it is stopped, then ends what is under way."""
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        try:
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            loop.run_until_complete(client.aclose())
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()


def _end(link: _Link) -> None:
    """Stop a link's thread; nothing in the child of a fork, where it is the parent's."""
    if link.pid != os.getpid() or link.loop.is_closed():
        return
    try:
        link.loop.call_soon_threadsafe(link.loop.stop)
    except RuntimeError:  # closed meanwhile
        return
    if threading.current_thread() is not link.thread:
        link.thread.join(2.0)


def hurry(seconds: float | None) -> None:
    """`ServerModel.hurry` of every model of this process."""
    for model in list(_MODELS):
        model.hurry(seconds)


_MODELS: weakref.WeakSet[ServerModel] = weakref.WeakSet()
_ORPHANS: list[_Link] = []


def _after_fork() -> None:
    for model in list(_MODELS):
        model._unlock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
