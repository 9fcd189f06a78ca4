"""A chat server on loopback that misbehaves on purpose: a script says how it answers each request.

    def behave(request):                       # called for each POST …/chat/completions
        return "drop_middle" if request["n"] % 2 else "hello"

    with MisbehavingServer(behave) as server:
        ...                                    # ask server.url (it ends in /v1)
    server.requests, server.counts["drop_middle"], server.peak

`behave` gets the request as a dict: `n` (0, 1, … in order of arrival), `method`, `path`, `headers` (small letters),
`body` (bytes) and `json` (the body read, or None). It answers with a `Fault`, or with a string: the name of a fault in
`FAULTS` (as it is by default), else the text that a good model would write, which is sent as a chat completion (as the
arguments of a tool call where the request asks for one). It is called in the server's own thread, one call at a time;
if it raises, the reply is a 500 and the error is kept in `server.errors`.

Other requests: `GET …/models` lists `server.models`, answers 404 if that is None, or misbehaves if it is a `Fault`.

`ServerProcess` runs such a server in a process of its own.
"""

from __future__ import annotations

import asyncio
import functools
import gzip
import json
import multiprocessing
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from multiprocessing.connection import Connection
from typing import Any, Self

__all__ = ["FAULTS", "Fault", "MisbehavingServer", "ServerProcess", "completion", "http"]


@dataclass(frozen=True)
class Fault:
    """One way to misbehave.

    Args:
        name: a key of `FAULTS`; the counters go by it.
        seconds: how long `late` waits, or how long `drip` waits before each byte.
        text: what the model writes where the reply has a text.
        status: the status of `data`.
        headers: more headers for `data` and for statuses, such as {"Retry-After": "7"}.
        data: the body of `data`, or the whole answer (status line and all) of `raw`.
        size: bytes of `big` and `gzip_bomb`; bytes of `noise` and `random_body`; depth of `deep`.
        seed: of `noise` and `random_body`.
    """

    name: str
    seconds: float = 60.0
    text: str = "late"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict, hash=False)
    data: bytes = b""
    size: int = 10_000_000
    seed: int = 0


class _Abort:
    """A step of a script: reset the connection."""


class _Die:
    """A step of a script: the whole server dies."""


Steps = Iterator[bytes | float | type[_Abort] | type[_Die]]
"""What a fault does: bytes to send, seconds to wait, a reset, a death. At its end the connection is closed, unless the
reply was a whole one."""

_CHUNK = 65_536


def http(body: bytes, status: int = 200, headers: dict[str, str] | None = None, *, length: int | None = None) -> bytes:
    """A whole HTTP reply; `length` lies about the body's."""
    words = {"Content-Type": "application/json", "Content-Length": str(len(body) if length is None else length)}
    head = "".join(f"{name}: {value}\r\n" for name, value in {**words, **(headers or {})}.items())
    return f"HTTP/1.1 {status} Status\r\n{head}\r\n".encode("latin-1") + body


def completion(text: Any, request: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A chat completion's JSON; `more` replaces its fields."""
    asked = (request or {}).get("json") or {}
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if isinstance(asked, dict) and asked.get("tools"):
        call = {"id": "1", "type": "function", "function": {"name": "answer", "arguments": text}}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
    reply = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18},
    }
    return {**reply, **more}


def _reply(value: Any, status: int = 200, **headers: str) -> bytes:
    return http(json.dumps(value).encode(), status, {k.replace("_", "-"): v for k, v in headers.items()})


def _error(status: int, message: str, **headers: str) -> bytes:
    return _reply({"error": {"message": message, "type": "test", "code": None}}, status, **headers)


# --- the faults: each is a function of its settings and the request that yields what happens ---


def _late(f: Fault, r: dict[str, Any]) -> Steps:
    yield f.seconds
    yield _reply(completion(f.text, r))


def _drip(f: Fault, r: dict[str, Any]) -> Steps:
    for byte in _reply(completion(f.text, r)):
        yield f.seconds
        yield bytes([byte])


def _raw(f: Fault, r: dict[str, Any]) -> Steps:
    yield f.data


def _status(status: int, message: str, **headers: str) -> Callable[[Fault, dict[str, Any]], Steps]:
    def steps(f: Fault, r: dict[str, Any]) -> Steps:
        yield _error(status, message, **{**headers, **f.headers})

    return steps


def _json(make: Callable[[dict[str, Any]], Any]) -> Callable[[Fault, dict[str, Any]], Steps]:
    """A good HTTP reply with the wrong JSON in it."""

    def steps(f: Fault, r: dict[str, Any]) -> Steps:
        yield _reply(make(r))

    return steps


def _bytes(make: Callable[[Fault, dict[str, Any]], bytes]) -> Callable[[Fault, dict[str, Any]], Steps]:
    """Any bytes at all."""

    def steps(f: Fault, r: dict[str, Any]) -> Steps:
        yield make(f, r)

    return steps


def _drop_before(f: Fault, r: dict[str, Any]) -> Steps:
    yield b""


def _drop_headers(f: Fault, r: dict[str, Any]) -> Steps:
    yield b"HTTP/1.1 200 OK\r\nContent-Ty"


def _drop_middle(f: Fault, r: dict[str, Any]) -> Steps:
    whole = _reply(completion(f.text, r))
    yield whole[: len(whole) - 40]


def _reset(f: Fault, r: dict[str, Any]) -> Steps:
    yield b"HTTP/1.1 200 OK\r\n"
    yield _Abort


def _die(f: Fault, r: dict[str, Any]) -> Steps:
    yield _Die


def _big(f: Fault, r: dict[str, Any]) -> Steps:
    body = json.dumps(completion("x" * f.size, r)).encode()
    yield http(body[:_CHUNK], length=len(body))
    for at in range(_CHUNK, len(body), _CHUNK):
        yield body[at : at + _CHUNK]


def _endless(f: Fault, r: dict[str, Any]) -> Steps:
    """Chunks without a length, for ever."""
    yield b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    while True:
        yield b"10000\r\n" + b" " * 65_536 + b"\r\n"


@functools.cache
def _bomb(size: int) -> bytes:
    return gzip.compress(b'{"choices": [], "pad": "' + b" " * size, mtime=0)


def _noise(f: Fault, r: dict[str, Any]) -> bytes:
    return random.Random(f"{f.seed} {r['n']}").randbytes(min(f.size, 400))


def _echo(f: Fault, r: dict[str, Any]) -> Steps:
    """Says the key that it was sent, in a header and in the words of its error."""
    key = r["headers"].get("authorization", "")
    yield _error(500, f"bad header {key}", X_Echo=key)


def _message(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda r: completion("x", choices=[{"message": {"role": "assistant", **fields}, "finish_reason": "stop"}])


_SCRIPTS: dict[str, Callable[[Fault, dict[str, Any]], Steps]] = {
    # time
    "late": _late,
    "drip": _drip,
    # statuses
    "http_400": _status(400, "bad request"),
    "http_401": _status(401, "invalid key"),
    "http_403": _status(403, "forbidden"),
    "http_404": _status(404, "The model does not exist"),
    "http_429": _status(429, "too many requests", Retry_After="0"),
    "http_429_date": _status(429, "too many requests", Retry_After=formatdate(0, usegmt=True)),
    "http_429_nonsense": _status(429, "too many requests", Retry_After="soon"),
    "http_500": _status(500, "internal error"),
    "http_502": _bytes(lambda f, r: http(b"<html>bad gateway</html>", 502, {"Content-Type": "text/html"})),
    "http_503": _status(503, "overloaded"),
    "http_529": _status(529, "overloaded"),
    "redirect": _bytes(lambda f, r: http(b"", 302, {"Location": "/v1/elsewhere"})),
    "refuse_fields": _status(400, "unknown field: response_format"),
    # connections
    "drop_before": _drop_before,
    "drop_headers": _drop_headers,
    "drop_middle": _drop_middle,
    "reset": _reset,
    "die": _die,
    # HTTP
    "raw": _raw,
    "noise": _bytes(_noise),
    "short_length": _bytes(lambda f, r: http(json.dumps(completion("x", r)).encode(), length=5)),
    "long_length": _bytes(lambda f, r: http(json.dumps(completion("x", r)).encode(), length=100_000)),
    "bad_length": _bytes(lambda f, r: http(b"{}", headers={"Content-Length": "banana"})),
    "huge_header": _bytes(lambda f, r: http(b"{}", headers={"X-Huge": "x" * 1_000_000})),
    # bodies
    "data": _bytes(lambda f, r: http(f.data, f.status, f.headers)),
    "random_body": _bytes(lambda f, r: http(_noise(f, r))),
    "empty": _bytes(lambda f, r: http(b"")),
    "half_json": _bytes(lambda f, r: http(json.dumps(completion("x", r)).encode()[:-30])),
    "html": _bytes(lambda f, r: http(b"<html>log in</html>", headers={"Content-Type": "text/html"})),
    "event_stream": _bytes(lambda f, r: http(b"data: {}\n\n", headers={"Content-Type": "text/event-stream"})),
    "invalid_utf8": _bytes(lambda f, r: http(b'{"choices": "\xff\xfe\xc3\x28"}')),
    "latin1": _bytes(
        lambda f, r: http(
            '{"choices": [{"message": {"content": "é"}}]}'.encode("latin-1"),
            headers={"Content-Type": "application/json; charset=utf-8"},
        )
    ),
    "utf16": _bytes(lambda f, r: http(json.dumps(completion("x", r)).encode("utf-16"))),
    "gzip_bomb": _bytes(lambda f, r: http(_bomb(f.size), headers={"Content-Encoding": "gzip"})),
    "gzip_garbage": _bytes(lambda f, r: http(b"no gzip at all", headers={"Content-Encoding": "gzip"})),
    "gzip_half": _bytes(
        lambda f, r: http(
            gzip.compress(json.dumps(completion("x", r)).encode())[:-12], headers={"Content-Encoding": "gzip"}
        )
    ),
    "brotli": _bytes(lambda f, r: http(b"\x0b\x02\x80", headers={"Content-Encoding": "br"})),
    "big": _big,
    "endless": _endless,
    "deep": _bytes(lambda f, r: http(b"[" * min(f.size, 500_000))),
    "long_number": _bytes(lambda f, r: http(b'{"choices": ' + b"9" * 10_000 + b"}")),
    # shapes
    "body_list": _json(lambda r: [completion("x", r)]),
    "body_null": _json(lambda r: None),
    "body_number": _json(lambda r: 7),
    "error_in_200": _json(lambda r: {"error": {"message": "out of memory"}}),
    "no_choices": _json(lambda r: {"object": "chat.completion"}),
    "choices_dict": _json(lambda r: completion("x", choices={"0": {}})),
    "choices_empty": _json(lambda r: completion("x", choices=[])),
    "choice_number": _json(lambda r: completion("x", choices=[7])),
    "no_message": _json(lambda r: completion("x", choices=[{"text": "x"}])),
    "message_text": _json(lambda r: completion("x", choices=[{"message": "x"}])),
    "content_null": _json(_message(content=None)),
    "content_number": _json(_message(content=7)),
    "content_object": _json(_message(content={"text": "x"})),
    "parts_wrong": _json(_message(content=[{"type": "image"}, 7, None])),
    "tool_calls_wrong": _json(_message(content=None, tool_calls={"function": {"arguments": "{}"}})),
    "tool_arguments_number": _json(_message(content=None, tool_calls=[{"function": {"arguments": 7}}])),
    # texts: good replies with bad words in them
    "prose": _json(lambda r: completion("I would rather not say.", r)),
    "half_json_text": _json(lambda r: completion('{"a": [1, 2', r)),
    "escapes": _json(lambda r: completion("\x1b[2J\x1b]0;owned\x07\u202e<|im_start|>system", r)),
    "escapes_in_error": _status(500, "\x1b[31mred\x1b[0m\r\nINFO all is well\u202e"),
    "usage_lies": _json(
        lambda r: completion("x", r, usage={"prompt_tokens": -5, "completion_tokens": 10**30, "total_tokens": "many"})
    ),
    "usage_words": _json(lambda r: completion("x", r, usage={"prompt_tokens": "7", "completion_tokens": True})),
    "echo_key": _echo,
}

FAULTS: dict[str, Fault] = {name: Fault(name) for name in _SCRIPTS}
"""Every fault by name. `raw` and `data` are made to be given settings; `late` waits a minute, `drip` takes a
minute a byte, `endless` never ends and `die` takes the server down."""

_CLOSES = frozenset(
    {"drop_before", "drop_headers", "drop_middle", "reset", "die", "raw", "noise", "short_length", "long_length"}
    | {"bad_length", "huge_header", "endless"}
)


class MisbehavingServer:
    """The server, in a thread of its own; a context manager.

    Attributes:
        url: base address, http://127.0.0.1:<port>/v1; it stays the same after `kill` and `revive`.
        requests: chat requests that came, whatever became of them.
        counts: of them by what was done: the fault's name, or "ok".
        peak: most chat requests that were being answered at the same time.
        models: names for GET /models, None for a 404, or a Fault.
        errors: what `behave` raised.
    """

    def __init__(self, behave: Callable[[dict[str, Any]], Fault | str]) -> None:
        """Listens from `__enter__` to `__exit__`; `behave` is explained at the top of this file."""
        self.behave = behave
        self.requests, self.peak = 0, 0
        self.counts: Counter[str] = Counter()
        self.models: list[str] | Fault | None = ["test"]
        self.errors: list[Exception] = []
        self._now = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="misbehaving-server", daemon=True)
        self._port, self.url = 0, ""

    def __enter__(self) -> Self:
        self._thread.start()
        self.revive()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def revive(self) -> None:
        """Listen, again after `kill`."""
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    def kill(self) -> None:
        """Die: every connection is reset, and nobody listens any more."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()

    async def _listen(self) -> None:
        if self._server is None:
            # A limit above the longest header line: requests are read whole.
            self._server = await asyncio.start_server(self._connected, "127.0.0.1", self._port, limit=1 << 24)
            self._port = self._server.sockets[0].getsockname()[1]
            self.url = f"http://127.0.0.1:{self._port}/v1"

    async def _stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()
        own = asyncio.current_task()
        others = [task for task in self._tasks if task is not own]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while (request := await _read_request(reader)) is not None and await self._answer(request, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, ValueError):
            pass  # the client went away, or speaks no HTTP
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        """Answer one request; whether the connection stays open."""
        if request["method"] == "GET":
            fault: Fault | str = self.models if isinstance(self.models, Fault) else Fault("http_404")
            if isinstance(self.models, list):
                found = {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]}
                fault = Fault("data", data=json.dumps(found).encode())
            return await self._play(fault, {**request, "n": 0}, writer)
        request["n"] = self.requests
        self.requests += 1
        try:
            fault = self.behave(request)
        except Exception as error:
            self.errors.append(error)
            fault = "http_500"
        if isinstance(fault, str):
            fault = FAULTS.get(fault, fault)
        self.counts[fault.name if isinstance(fault, Fault) else "ok"] += 1
        self._now += 1
        self.peak = max(self.peak, self._now)
        try:
            return await self._play(fault, request, writer)
        finally:
            self._now -= 1

    async def _play(self, fault: Fault | str, request: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        if isinstance(fault, str):
            writer.write(_reply(completion(fault, request)))
            await writer.drain()
            return True
        for step in _SCRIPTS[fault.name](fault, request):
            if isinstance(step, bytes):
                writer.write(step)
                await writer.drain()
            elif isinstance(step, float | int):
                await asyncio.sleep(step)
            elif step is _Abort:
                writer.transport.abort()
                return False
            else:
                writer.transport.abort()
                await self._stop()
                return False
        return fault.name not in _CLOSES


class ServerProcess:
    """A `MisbehavingServer` in a process of its own, which takes no time from who asks it; a context manager.

    Attributes:
        url: base address, as the server's.
    """

    def __init__(self, make: Callable[..., Callable[[dict[str, Any]], Fault | str]], *arguments: Any) -> None:
        """`make(server, *arguments)`, called over there, gives the server's `behave`. All must be picklable."""
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, make, arguments), daemon=True)
        self.url = ""

    def __enter__(self) -> Self:
        self._process.start()
        self.url = self._pipe.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.send(None)
        self._process.join()

    def do(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """What `call(server, *arguments)` gives over there: `do(MisbehavingServer.kill)`."""
        self._pipe.send((call, arguments))
        return self._pipe.recv()


def _serve(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    server = MisbehavingServer(lambda request: "")
    server.behave = make(server, *arguments)
    with server:
        pipe.send(server.url)
        while (asked := pipe.recv()) is not None:
            call, arguments = asked
            pipe.send(call(server, *arguments))


async def _read_request(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *rest = head.decode("latin-1").split("\r\n")
    method, path, _ = first.split(" ", 2)
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in rest if line)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    try:
        found = json.loads(body)
    except ValueError:
        found = None
    return {"method": method, "path": path, "headers": headers, "body": body, "json": found}
