"""One request to a server that nobody trusts: what can come back, within a time and a size, and what went wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
import zlib
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, cast

import httpx

from echelon.llm.prompts import clean

__all__ = [
    "KINDS",
    "Answer",
    "Fault",
    "completion",
    "content",
    "error_words",
    "find_json",
    "hide",
    "one_line",
    "retry_after",
    "send",
    "status_fault",
]

KINDS = (
    "timeout",  # no whole reply in time
    "connect",  # no connection: nobody listens, no such host, a proxy that refuses, TLS
    "dropped",  # the connection ended before the reply did
    "protocol",  # what came is not HTTP
    "auth",  # 401, 403
    "http_404",
    "http_429",
    "http_4xx",  # any other
    "http_5xx",
    "redirect",
    "content_type",  # neither JSON nor called so
    "encoding",  # not UTF-8, or compressed in a way that wasn't asked for and can't be read
    "json",  # half of it, or none
    "shape",  # JSON, but no chat completion
    "too_large",
    "usage",  # token counts that can't be; the reply is used all the same
    "structure",  # a way to ask for JSON that the server refuses; the next one is tried
    "not_json",  # the model's text should be JSON and isn't
    "other",
)
"""The kinds of faults; a reply is counted as one at most, and `usage` besides."""

_ERROR_BYTES = 65_536
_LONGEST_WAIT = 60.0  # seconds that a Retry-After can ask for; our choice
_STARTS = 16  # places in a text where JSON is looked for: each try may read all of it


class Fault(Exception):
    """Something that went wrong with a request.

    Attributes:
        kind: one of `KINDS`; line: what happened, not yet cleaned; heals: whether trying again may help.
        status: the HTTP status, or 0; body: what an error's body said; wait: seconds that the server asks to wait.
    """

    def __init__(
        self, kind: str, line: str, *, heals: bool = False, status: int = 0, body: str = "", wait: float | None = None
    ) -> None:
        """See the class."""
        super().__init__(line)
        self.kind, self.line, self.heals = kind, line, heals
        self.status, self.body, self.wait = status, body, wait


@dataclass(frozen=True)
class Answer:
    """A whole reply: status, headers, and the body's bytes, decompressed."""

    status: int
    headers: Mapping[str, str]
    body: bytes


async def send(
    client: httpx.AsyncClient,
    method: str,
    url: str,
    *,
    content: bytes | None = None,
    headers: Mapping[str, str],
    timeout: float,
    limit: int,
) -> Answer:
    """Send one request and read the reply.

    Args:
        client: whose connections are used.
        method, url, content, headers: the request.
        timeout: seconds from here to the reply's last byte, however it drips.
        limit: most bytes of a reply's body, decompressed. A longer body of an error is cut.

    Raises:
        Fault: whatever goes wrong below HTTP's status.
    """
    try:
        async with (
            asyncio.timeout(timeout),
            client.stream(method, url, content=content, headers=dict(headers)) as response,
        ):
            good = response.is_success
            body = await _read(response, limit if good else min(limit, _ERROR_BYTES), cut=not good)
            return Answer(response.status_code, dict(response.headers), body)
    except (TimeoutError, httpx.TimeoutException):
        raise Fault("timeout", f"no whole reply within {timeout:.3g} s", heals=True) from None
    except (httpx.RemoteProtocolError, httpx.LocalProtocolError) as error:
        if "disconnected" in str(error) or "closed" in str(error):
            raise Fault("dropped", "the connection was dropped before the reply's end", heals=True) from None
        raise Fault("protocol", f"what came is not HTTP: {error}", heals=True) from None
    except (httpx.ReadError, httpx.WriteError, httpx.CloseError):
        raise Fault("dropped", "the connection was dropped before the reply's end", heals=True) from None
    except (httpx.TransportError, httpx.InvalidURL, OSError) as error:
        raise Fault("connect", f"can't be reached: {error or type(error).__name__}", heals=True) from None


async def _read(response: httpx.Response, limit: int, *, cut: bool) -> bytes:
    """The body, decompressed by hand: httpx would unpack a bomb before its size can be seen."""
    coding = response.headers.get("content-encoding", "identity").strip().lower()
    if coding in ("", "identity"):
        unpack = None
    elif coding in ("gzip", "x-gzip", "deflate"):
        unpack = zlib.decompressobj(wbits=47 if "gzip" in coding else 15)  # 47: gzip's or zlib's header
    elif cut:
        return b""
    else:
        raise Fault("encoding", f"the reply is compressed as {coding}, which wasn't asked for", heals=True)
    body = bytearray()
    async with contextlib.aclosing(cast(AsyncGenerator[bytes, None], response.aiter_raw())) as chunks:
        async for chunk in chunks:
            try:
                body += chunk if unpack is None else unpack.decompress(chunk, limit + 1 - len(body))
            except zlib.error:
                if cut:
                    break
                raise Fault("encoding", f"the reply calls itself {coding} and isn't", heals=True) from None
            if len(body) > limit:
                if cut:
                    break
                raise Fault("too_large", f"the reply has more than {limit:,} bytes")
        else:
            if unpack is not None and not unpack.eof and not cut:
                raise Fault("dropped", "the compressed reply has no end", heals=True)
    return bytes(body[:limit])


def status_fault(answer: Answer, key_variable: str, has_key: bool, now: float | None = None) -> Fault | None:
    """The fault that a status other than 2xx stands for. `now`: seconds since 1970, the clock's if None."""
    status = answer.status
    if 200 <= status < 300:
        return None
    said = error_words(answer.body)
    line = f"HTTP {status}: {said}" if said else f"HTTP {status}"
    wait = retry_after(answer.headers.get("retry-after", ""), time.time() if now is None else now)
    if status < 400:
        where = answer.headers.get("location", "nowhere")[:100]
        return Fault("redirect", f"HTTP {status}: it redirects to {where}, which is not followed", status=status)
    if status in (401, 403):
        if not has_key:
            name = key_variable or "that server.key_variable names"
            return Fault("auth", f"HTTP {status}: it wants a key: set the environment variable {name}", status=status)
        # What it says of the key isn't repeated: some servers quote part of it.
        line = f"HTTP {status}: it refuses the key in the environment variable {key_variable}"
        return Fault("auth", line, status=status, body=said)
    if status == 404:
        return Fault("http_404", f"{line} (is the model's name right, and the url's path, often /v1?)", status=status,
                     body=said)  # fmt: skip
    if status == 429:
        # Words of OpenAI's API: no waiting brings money back.
        return Fault(
            "http_429", line, status=status, body=said, wait=wait, heals=b"insufficient_quota" not in answer.body
        )
    if status < 500:
        return Fault("http_4xx", line, status=status, body=said, wait=wait, heals=status in (408, 409, 425))
    return Fault("http_5xx", line, status=status, body=said, wait=wait, heals=status not in (501, 505))


def retry_after(value: str, now: float) -> float | None:
    """The seconds to wait that a Retry-After header asks for (RFC 9110, 10.2.3), 0 to 60; None if it says nothing.

    Args:
        value: a number of seconds or an HTTP date.
        now: seconds since 1970.
    """
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - now
        except (ValueError, TypeError, OverflowError, OSError, IndexError):
            return None
    return None if math.isnan(seconds) else min(max(seconds, 0.0), _LONGEST_WAIT)


def error_words(body: bytes) -> str:
    """What the body of an error says in words, at most 2,000 characters, untrusted."""
    text = body.decode("utf-8", "replace")
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        return "" if text.lstrip()[:1] == "<" else text[:2000]
    for _ in range(3):
        if not isinstance(found, dict):
            break
        found = next((found[name] for name in ("error", "message", "detail") if found.get(name)), "")
    return found[:2000] if isinstance(found, str) else ""


def completion(answer: Answer) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first choice's message and the usage of a chat completion.

    Raises:
        Fault: it isn't one.
    """
    try:
        text = answer.body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Fault("encoding", f"the reply is not UTF-8 (byte {error.start})", heals=True) from None
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        kind = answer.headers.get("content-type", "")
        if kind and "json" not in kind.lower():
            raise Fault("content_type", f"it sent {kind[:60]} instead of JSON", heals=True) from None
        raise Fault("json", "the reply is not whole JSON", heals=True) from None
    if not isinstance(data, dict):
        raise _shape("a reply that is no object")
    choices = data.get("choices")
    if not isinstance(choices, list) or not choices:
        # Some servers send their errors with status 200.
        raise _shape(error_words(answer.body) or "no list of choices")
    message = choices[0].get("message") if isinstance(choices[0], dict) else None
    if not isinstance(message, dict):
        raise _shape("a choice without a message")
    usage = data.get("usage")
    return message, usage if isinstance(usage, dict) else {}


def content(message: Mapping[str, Any], tool: bool) -> str:
    """The text of a message: the arguments of its first tool call if asked as a tool and there is one, or its content.

    Raises:
        Fault: neither is text.
    """
    calls = message.get("tool_calls")
    if tool and calls:
        function = calls[0].get("function") if isinstance(calls, list) and isinstance(calls[0], dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(arguments, dict):
            return json.dumps(arguments)
        if isinstance(arguments, str):
            return arguments
        raise _shape("a tool call without arguments")
    found = message.get("content")
    if isinstance(found, list):
        parts = [part.get("text") for part in found if isinstance(part, dict)]
        if parts and all(isinstance(part, str) for part in parts):
            return "".join(map(str, parts))
    if not isinstance(found, str):
        raise _shape("a message whose content is not text")
    return found


def _shape(what: str) -> Fault:
    return Fault("shape", f"the reply has the wrong shape: {what}", heals=True)


def find_json(text: str, openings: str = "{[") -> str | None:
    """The first JSON object or list in a model's text, as it is written there; None if there is none.

    Words before and behind it, code fences and a thought between `<think>` and `</think>` are left out. Only the first
    16 places where one might begin are tried.

    Args:
        text: what the model wrote.
        openings: what the JSON begins with: "{" for an object, "[" for a list, or either.
    """
    text = text.rpartition("</think>")[2]
    decoder = json.JSONDecoder(parse_constant=_no_constant)
    at = -1
    for _ in range(_STARTS):
        at = min((i for i in (text.find(opening, at + 1) for opening in openings) if i >= 0), default=-1)
        if at < 0:
            return None
        try:
            return text[at : decoder.raw_decode(text, at)[1]]
        except (ValueError, RecursionError):
            continue
    return None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def one_line(text: str, key: str, length: int = 200) -> str:
    """`text` as one harmless line of at most `length` characters, without `key`."""
    line = hide(clean(hide(text, key)), key)
    return line if len(line) <= length else line[: length - 1] + "…"


def hide(text: str, key: str) -> str:
    """`text` without `key`."""
    return text.replace(key, "[key]") if key else text
