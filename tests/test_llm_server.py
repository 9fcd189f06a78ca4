"""A model behind a server: what it is asked, and that no fault of the server gets through."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.errors import EchelonError
from echelon.llm._breaker import Breaker
from echelon.llm._http import KINDS, completion, find_json, one_line, retry_after
from echelon.llm.json_text import why_no_json
from echelon.llm.server import ServerConfig, ServerModel
from echelon.llm.text import TextPrompt, TextReply
from misbehaving_server import FAULTS, Fault, MisbehavingServer
from misbehaving_server import completion as good_completion

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
KEY = "sk-test-MOSTSECRET-0123456789abcdef"
FREE = TextPrompt("be brief", "hello", max_tokens=20)
JSON = TextPrompt("be brief", "hello", SCHEMA, max_tokens=20)

Model = Callable[..., ServerModel]
Serve = Callable[..., MisbehavingServer]


class Time:
    """A clock that only waiting moves; it remembers what was waited."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def serve() -> Iterator[Serve]:
    started: list[MisbehavingServer] = []

    def start(behave: Any) -> MisbehavingServer:
        server = MisbehavingServer(behave if callable(behave) else lambda request: behave)
        server.__enter__()
        started.append(server)
        return server

    yield start
    for server in started:
        server.__exit__()
        assert not server.errors


@pytest.fixture
def model() -> Iterator[Model]:
    made: list[ServerModel] = []

    def make(server: MisbehavingServer, when: Time | None = None, **kwargs: Any) -> ServerModel:
        when = Time() if when is None else when
        config = ServerConfig(**{"url": server.url, "timeout": 5.0, "breaker_failures": 0, **kwargs})
        made.append(ServerModel("test", config, clock=when.clock, sleep=when.sleep))
        return made[-1]

    yield make
    for one in made:
        one.close()


def ask(model: ServerModel, prompt: TextPrompt = FREE) -> TextReply:
    return model.generate([prompt])[0]


def faults(model: ServerModel) -> dict[str, float]:
    return {name[6:]: n for name, n in model.state_dict().items() if name.startswith("fault_") and n}


# --- a good server ---


def test_a_good_reply_and_its_price(serve: Serve, model: Model) -> None:
    seen: list[dict[str, Any]] = []
    server = serve(lambda request: (seen.append(request), "hello\nyou")[1])
    asked = model(server, price_in=3.0, price_out=10.0, temperature=0.5)
    reply = ask(asked)
    # The server says 11 and 7 tokens: (11 · 3 + 7 · 10) / 10⁶.
    assert reply == TextReply("hello\nyou", None, 11, 7, 1, 0.0, pytest.approx(103e-6))
    assert seen[0]["path"] == "/v1/chat/completions"
    assert seen[0]["json"] == {
        "model": "test",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
        "max_tokens": 20,
        "temperature": 0.5,
    }
    assert "authorization" not in seen[0]["headers"]
    assert seen[0]["headers"]["accept-encoding"] == "identity"
    state = asked.state_dict()
    wanted = {"prompts": 1, "calls": 1, "failures": 0, "retries": 0, "prompt_tokens": 11, "completion_tokens": 7}
    assert {name: state[name] for name in wanted} == wanted
    assert state["money"] == pytest.approx(103e-6)
    assert not faults(asked)
    assert asked.name == "openai:test"


def test_replies_come_in_the_order_of_their_prompts(serve: Serve, model: Model) -> None:
    def behave(request: dict[str, Any]) -> Fault:
        text = request["json"]["messages"][-1]["content"]
        return Fault("late", seconds=0.002 * (7 - int(text) % 7), text=text)

    server = serve(behave)
    replies = model(server).generate([TextPrompt("", str(i)) for i in range(60)])
    assert [reply.text for reply in replies] == [str(i) for i in range(60)]
    assert model(server).generate([]) == []


@pytest.mark.parametrize("connections", [1, 4])
def test_no_more_prompts_are_under_way_than_connections(serve: Serve, model: Model, connections: int) -> None:
    server = serve(Fault("late", seconds=0.01))
    asked = model(server, connections=connections)
    threads = [threading.Thread(target=asked.generate, args=([FREE] * 10,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.peak == connections
    assert server.requests == asked.state_dict()["calls"] == asked.state_dict()["prompts"] == 30


def test_the_key_is_sent_and_only_to_the_server(serve: Serve, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    server = serve(lambda request: (seen.append(request["headers"]), "yes")[1])
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    assert ask(model(server, key_variable="MY_KEY")).error is None
    assert seen[0]["authorization"] == f"Bearer {KEY}"
    assert ask(model(server, key_variable="")).error is None
    assert "authorization" not in seen[1]


def test_the_address_comes_from_the_environment_if_none_is_given(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ServerModel("m").url == "https://api.openai.com/v1"
    server = serve("yes")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/")
    asked = ServerModel("openai:m")
    assert (asked.name, ask(asked).text) == ("openai:m", "yes")
    asked.close()
    monkeypatch.setenv("OPENAI_BASE_URL", "http://me:hidden@example.com")
    with pytest.raises(EchelonError, match="OPENAI_BASE_URL holds a user name") as error:
        ServerModel("m")
    assert "hidden" not in str(error.value)


def test_a_proxy_of_the_environment_does_not_hide_loopback(
    serve: Serve, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    server = serve("yes")
    assert ask(model(server)).text == "yes"
    named = model(server, url=server.url.replace("127.0.0.1", "localhost"))
    assert ask(named).text == "yes"


def test_a_proxy_that_cannot_be_used_is_an_error_of_one_line(
    serve: Serve, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "nonsense://x")
    asked = model(serve("yes"))
    reply = ask(asked)
    assert reply.error is not None and "no connection can be set up" in reply.error
    assert (reply.attempts, asked.state_dict()["failures"]) == (0, 1)


# --- structured output ---


def ladder(takes: str) -> Callable[[dict[str, Any]], Fault | str]:
    """A server that takes JSON's rungs in `takes` and refuses the others."""

    def behave(request: dict[str, Any]) -> Fault | str:
        asked = request["json"]
        rung = "schema" if "response_format" in asked else "tool" if "tools" in asked else "prompt"
        return '{"a": 1}' if rung in takes.split() else "refuse_fields"

    return behave


@pytest.mark.parametrize(
    ("takes", "first"), [("schema", 1), ("tool", 2), ("prompt", 3), ("tool prompt", 2), ("schema tool prompt", 1)]
)
def test_the_ladder_goes_down_once_and_is_remembered(serve: Serve, model: Model, takes: str, first: int) -> None:
    server = serve(ladder(takes))
    asked = model(server)
    reply = ask(asked, JSON)
    assert (reply.text, reply.error, reply.attempts) == ('{"a": 1}', None, first)
    assert faults(asked) == ({"structure": first - 1} if first > 1 else {})
    assert asked.state_dict()["retries"] == 0
    assert ask(asked, JSON).attempts == 1
    assert server.requests == first + 1


@pytest.mark.parametrize("status", [400, 404, 422, 501])
def test_a_refusal_need_not_name_the_field(serve: Serve, model: Model, status: int) -> None:
    refusal = Fault("data", status=status, data=b'{"detail": "what?"}')
    server = serve(lambda r: refusal if "response_format" in r["json"] else '{"a": 2}')
    assert ask(model(server), JSON).text == '{"a": 2}'


def test_how_each_rung_asks(serve: Serve, model: Model) -> None:
    seen: list[dict[str, Any]] = []

    def behave(request: dict[str, Any]) -> Fault | str:
        seen.append(request["json"])
        return ladder("prompt")(request)

    assert ask(model(serve(behave)), JSON).text == '{"a": 1}'
    schema, tool, prompt = seen
    assert schema["response_format"]["type"] == "json_schema"
    assert schema["response_format"]["json_schema"]["schema"] == SCHEMA
    assert tool["tools"][0]["function"]["parameters"] == SCHEMA
    assert tool["tool_choice"] == {"type": "function", "function": {"name": tool["tools"][0]["function"]["name"]}}
    assert set(prompt) == {"model", "messages", "max_tokens", "temperature"}
    assert json.dumps(SCHEMA) in prompt["messages"][0]["content"]
    assert schema["messages"][0]["content"] == "be brief"


@pytest.mark.parametrize("structured", ["schema", "tool", "prompt"])
def test_one_way_alone_is_not_left(serve: Serve, model: Model, structured: str) -> None:
    good = model(serve(ladder(structured)), structured=structured)
    assert (ask(good, JSON).text, ask(good, JSON).attempts) == ('{"a": 1}', 1)
    bad = ask(model(serve("refuse_fields"), structured=structured), JSON)
    assert bad.attempts == 1 and bad.error is not None and "response_format" in bad.error


def test_a_server_that_changes_its_mind_is_not_asked_for_ever(serve: Serve, model: Model) -> None:
    last: list[str] = []

    def moody(request: dict[str, Any]) -> Fault | str:
        # It refuses whatever way it was asked last time, else takes it.
        rung = "schema" if "response_format" in request["json"] else "tool" if "tools" in request["json"] else "prompt"
        last.append(rung)
        return "refuse_fields" if last[-2:] != ["prompt", "prompt"] else '{"a": 1}'

    server = serve(moody)
    asked = model(server)
    replies = [ask(asked, JSON) for _ in range(5)]
    assert all(reply.attempts <= 3 for reply in replies)
    assert all(reply.error for reply in replies)
    # None of the ways worked, so none is remembered; one that is good again is found.
    server.behave = ladder("schema")
    assert ask(asked, JSON).attempts == 1
    server.behave = ladder("tool")
    assert (ask(asked, JSON).attempts, ask(asked, JSON).attempts) == (2, 1)


def test_a_refusal_of_one_prompt_moves_no_other(serve: Serve, model: Model) -> None:
    too_long = Fault("data", status=400, data=b'{"error": {"message": "maximum context length is 2048 tokens"}}')
    server = serve(lambda r: too_long if "long" in r["json"]["messages"][-1]["content"] else ladder("schema")(r))
    asked = model(server)
    reply = ask(asked, dataclasses.replace(JSON, text="long"))
    assert reply.error is not None and "maximum context length" in reply.error and reply.attempts == 3
    assert ask(asked, JSON).attempts == 1


def test_faults_that_heal_do_not_move_the_ladder(serve: Serve, model: Model) -> None:
    server = serve(lambda r: "http_503" if r["n"] < 2 else ladder("schema")(r))
    reply = ask(model(server), JSON)
    assert (reply.text, reply.attempts) == ('{"a": 1}', 3)


def test_an_unknown_model_is_asked_once(serve: Serve, model: Model) -> None:
    server = serve("http_404")
    reply = ask(model(server), JSON)
    assert reply.error is not None and "The model does not exist" in reply.error
    assert reply.attempts == server.requests == 1


def test_prose_is_sent_back_once_with_the_reason(serve: Serve, model: Model) -> None:
    seen: list[Any] = []

    def behave(request: dict[str, Any]) -> Fault | str:
        seen.append(request["json"]["messages"])
        return "prose" if request["n"] == 0 else 'Of course:\n```json\n{"a": 3}\n``` there.'

    asked = model(serve(behave), structured="prompt")
    reply = ask(asked, JSON)
    assert (reply.text, reply.attempts, reply.completion_tokens) == ('{"a": 3}', 2, 14)
    assert [m["role"] for m in seen[1]] == ["system", "user", "assistant", "user"]
    assert seen[1][2]["content"] == "I would rather not say."
    assert "JSON" in seen[1][3]["content"]
    assert faults(asked) == {"not_json": 1}


@pytest.mark.parametrize("fault", ["prose", "half_json_text"])
def test_prose_again_is_an_error(serve: Serve, model: Model, fault: str) -> None:
    server = serve(fault)
    asked = model(server, breaker_failures=1)
    replies = [ask(asked, JSON) for _ in range(3)]
    assert all(r.text == "" and r.error is not None and "no JSON" in r.error and r.attempts == 2 for r in replies)
    # The server is alive: no breaker opens.
    assert asked.state_dict()["breaker_opened"] == 0
    assert faults(asked) == {"not_json": 6}


def test_a_server_that_ignores_the_schema_is_asked_in_words(serve: Serve, model: Model) -> None:
    server = serve(lambda r: "prose" if "response_format" in r["json"] else '{"a": 4}')
    asked = model(server)
    assert [ask(asked, JSON).attempts for _ in range(5)] == [2, 2, 2, 1, 1]


def test_a_tool_call_may_have_an_object_or_come_as_text(serve: Serve, model: Model) -> None:
    call = {"choices": [{"message": {"tool_calls": [{"function": {"arguments": {"a": 5}}}]}}]}
    plain = good_completion('{"a": 6}')
    server = serve(lambda r: Fault("data", data=json.dumps(call if r["n"] == 0 else plain).encode()))
    asked = model(server, structured="tool")
    assert json.loads(ask(asked, JSON).text) == {"a": 5}
    assert ask(asked, JSON).text == '{"a": 6}'


def test_text_may_come_in_parts(serve: Serve, model: Model) -> None:
    parts = good_completion([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}])
    assert ask(model(serve(Fault("data", data=json.dumps(parts).encode())))).text == "one two"


def test_fields_that_a_server_does_not_support_are_left_out(serve: Serve, model: Model) -> None:
    seen: list[Any] = []

    def behave(request: dict[str, Any]) -> Fault | str:
        seen.append(request["json"])
        for name, words in (("max_tokens", "Use 'max_completion_tokens'"), ("temperature", "Only the default")):
            if name in request["json"]:
                message = f"Unsupported: '{name}' is not supported with this model. {words}"
                return Fault("data", status=400, data=json.dumps({"error": {"message": message}}).encode())
        return '{"a": 7}'

    asked = model(serve(behave))
    assert (ask(asked, JSON).attempts, ask(asked, JSON).attempts) == (3, 1)
    assert seen[-1]["max_completion_tokens"] == 20
    assert "response_format" in seen[-1]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1}', '{"a": 1}'),
        ('  {"a": {"b": [1]}}  ', '{"a": {"b": [1]}}'),
        ('Sure {x}: {"a": 1} and {"b": 2}', '{"a": 1}'),
        ('<think>{"a": 0}</think>{"a": 1}', '{"a": 1}'),
        ('see [1]: {"a": 1}', '{"a": 1}'),
        ('[{"a": 1}]', '{"a": 1}'),
        ('{"a": NaN}', None),
        ('{"a": 1', None),
        ('{"plan": [{"robot": 0}, {"rob', '{"robot": 0}'),
        ('put it in {braces, so {"a": "}"}', '{"a": "}"}'),
        ('```json\n{"a": "{"}\n```\n{"b', '{"a": "{"}'),
        ("", None),
        ("no", None),
        ("{" * 100_000, None),
        ('{"a":' * 100_000, None),
        ('{"a": ' + "9" * 5000 + "}", None),
    ],
)
def test_find_json(text: str, found: str | None) -> None:
    assert find_json(text, "{") == found


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("no {x}", "it holds no JSON"),
        ('{"a": [{"b": 1}, {"b', "the JSON breaks off"),
        ('{"a": {"b": 1}, "c": -Infinity}', "-Infinity is not JSON: a number must be finite"),
        ('{"a": 1,, "b": 2}', "it is not JSON: "),
        ('{"a": "x\ny"}', "it is not JSON: Invalid control character near"),
        ('{"why": "5" wide"}', "it is not JSON: Expecting ',' delimiter near 'wide"),
        ('{"why": "5 wide', "the JSON breaks off"),
        ("{'a': 1}", "it is not JSON: "),
        ('{"a":' * 100_000 + "}" * 100_000, "brackets nest too deeply"),
    ],
)
def test_why_there_is_no_json(text: str, why: str) -> None:
    assert why_no_json(text, "{").startswith(why)


def test_what_was_written_is_kept_beside_the_json_in_it(serve: Serve, model: Model) -> None:
    broken, whole = '{"a": [{"b": ', 'So: {"a": 1}'
    seen: list[str] = []

    def behave(request: dict[str, Any]) -> str:
        seen.append(request["json"]["messages"][-1]["content"])
        return whole if len(seen) % 2 == 0 else broken

    reply = ask(model(serve(behave)), JSON)
    assert (reply.text, reply.written, reply.attempts) == ('{"a": 1}', (broken, whole), 2)
    assert seen[1] == "That holds no whole JSON (the JSON breaks off). Answer again, with the JSON and nothing else."
    reply = ask(model(serve(broken)), JSON)
    assert reply.error is not None and (reply.text, reply.written) == ("", (broken, broken))
    assert ask(model(serve(broken))).written == ()


def test_find_json_takes_a_list_where_one_may_come() -> None:
    assert find_json("so: [1, 2]") == "[1, 2]"
    assert find_json('{"a": [1]}') == '{"a": [1]}'
    assert find_json('{"a": [1]}', "[") == "[1]"


# --- faults ---

# What each fault counts as, and whether it is tried again.
COUNTED: dict[str, tuple[str, bool]] = {
    "http_400": ("http_4xx", False),
    "http_401": ("auth", False),
    "http_403": ("auth", False),
    "http_404": ("http_404", False),
    "http_429": ("http_429", True),
    "http_429_date": ("http_429", True),
    "http_429_nonsense": ("http_429", True),
    "http_500": ("http_5xx", True),
    "http_502": ("http_5xx", True),
    "http_503": ("http_5xx", True),
    "http_529": ("http_5xx", True),
    "redirect": ("redirect", False),
    "refuse_fields": ("http_4xx", False),
    "drop_before": ("dropped", True),
    "drop_headers": ("dropped", True),
    "drop_middle": ("dropped", True),
    "reset": ("dropped", True),
    "long_length": ("dropped", True),
    "bad_length": ("protocol", True),
    "huge_header": ("protocol", True),
    "random_body": ("encoding", True),
    "empty": ("json", True),
    "half_json": ("json", True),
    "html": ("content_type", True),
    "event_stream": ("content_type", True),
    "invalid_utf8": ("encoding", True),
    "latin1": ("encoding", True),
    "utf16": ("encoding", True),
    "gzip_bomb": ("too_large", False),
    "gzip_garbage": ("encoding", True),
    "gzip_half": ("dropped", True),
    "brotli": ("encoding", True),
    "big": ("too_large", False),
    "endless": ("too_large", False),
    "deep": ("json", True),
    "long_number": ("json", True),
    "escapes_in_error": ("http_5xx", True),
    "echo_key": ("http_5xx", True),
}
SHAPES = ["body_list", "body_null", "body_number", "error_in_200", "no_choices", "choices_dict", "choices_empty"]
SHAPES += ["choice_number", "no_message", "message_text", "content_null", "content_number", "content_object"]
SHAPES += ["parts_wrong", "tool_calls_wrong", "tool_arguments_number"]
COUNTED |= dict.fromkeys(SHAPES, ("shape", True))
ELSEWHERE = {"late", "drip", "raw", "data", "noise", "die", "prose", "half_json_text", "escapes", "usage_lies"}
ELSEWHERE |= {"usage_words", "short_length"}


def test_every_fault_of_the_server_is_tested() -> None:
    assert set(COUNTED) | ELSEWHERE == set(FAULTS)
    assert {kind for kind, _ in COUNTED.values()} <= set(KINDS)


@pytest.mark.parametrize("fault", COUNTED)
def test_a_fault_is_counted_and_tried_again_if_that_can_help(serve: Serve, model: Model, fault: str) -> None:
    kind, heals = COUNTED[fault]
    prompt = dataclasses.replace(JSON) if fault.startswith("tool_") else FREE
    healing = serve(lambda request: fault if request["n"] == 0 else '{"a": 1}')
    asked = model(healing, structured="tool" if fault.startswith("tool_") else "auto", attempts=3)
    reply = ask(asked, prompt)
    assert faults(asked) == {kind: 1}
    assert (reply.error is None, healing.requests) == (heals, 2 if heals else 1)
    assert asked.state_dict()["failures"] == (not heals)
    assert asked.state_dict()["retries"] == heals
    lasting = serve(fault)
    asked = model(lasting, structured="tool" if fault.startswith("tool_") else "auto", attempts=3)
    reply = ask(asked, prompt)
    sent = 3 if heals else 1
    assert (reply.text, reply.attempts, lasting.requests, faults(asked)) == ("", sent, sent, {kind: sent})
    assert reply.error is not None and 0 < len(reply.error) <= 200 and reply.error.isprintable()
    assert asked.state_dict()["calls"] == sent


@pytest.mark.parametrize("fault", [Fault("late"), Fault("drip", seconds=0.05), Fault("drip", seconds=60)])
def test_a_slow_server_is_left_at_the_deadline(serve: Serve, model: Model, fault: Fault) -> None:
    asked = model(serve(fault), timeout=0.2, attempts=1)
    reply = ask(asked)
    assert reply.error is not None and "no whole reply within 0.2 s" in reply.error
    assert faults(asked) == {"timeout": 1}
    server = serve(lambda request: fault if request["n"] == 0 else "quick")
    # A second is enough for the quick reply on a busy machine. 4 times 1 s in all, of which the wait before the second
    # attempt takes at most 0.5 s.
    asked = model(server, timeout=1.0, attempts=4)
    reply = ask(asked)
    assert (reply.text, reply.attempts, faults(asked)) == ("quick", 2, {"timeout": 1})


def test_bytes_left_over_spoil_no_later_reply(serve: Serve, model: Model) -> None:
    server = serve(lambda request: "short_length" if request["n"] == 0 else "whole")
    asked = model(server)
    assert ask(asked).text == "whole"
    # What is left in the connection may spoil the next attempt too, if it comes before the connection's end is seen.
    assert faults(asked)["json"] == 1 and set(faults(asked)) <= {"json", "dropped", "protocol"}
    assert ask(asked).text == "whole"


def test_a_dead_server_and_its_return(serve: Serve, model: Model) -> None:
    server = serve(lambda request: "die" if request["n"] == 1 else "alive")
    asked = model(server, attempts=2)
    assert ask(asked).text == "alive"
    assert ask(asked).error is not None
    assert faults(asked) == {"dropped": 1, "connect": 1}
    assert ask(asked).error is not None
    server.revive()
    assert ask(asked).text == "alive"


def test_lying_usage_is_ignored_and_counted(serve: Serve, model: Model) -> None:
    for fault in ("usage_lies", "usage_words"):
        asked = model(serve(fault), price_in=1e6, price_out=1e6)
        reply = ask(asked)
        assert reply == TextReply("x", None, 0, 0, 1, 0.0, 0.0)
        assert faults(asked) == {"usage": 1}
    # More tokens than there were bytes can't be.
    big = good_completion("x", usage={"prompt_tokens": 11, "completion_tokens": 1_000_000})
    reply = ask(model(serve(Fault("data", data=json.dumps(big).encode()))))
    assert (reply.prompt_tokens, reply.completion_tokens) == (11, 0)
    # A server need not say.
    silent = good_completion("x", usage=None)
    asked = model(serve(Fault("data", data=json.dumps(silent).encode())))
    assert ask(asked).error is None and not faults(asked)


def test_text_is_handed_on_untouched(serve: Serve, model: Model) -> None:
    """It is untrusted, and whoever shows it must clean it; an error's line is clean already."""
    assert ask(model(serve("escapes"))).text == "\x1b[2J\x1b]0;owned\x07\u202e<|im_start|>system"


def test_an_error_is_one_clean_line() -> None:
    line = one_line("\x1b[31mred\x1b[0m\r\n" + KEY + "\u202e <|im_start|>" + "x" * 500, KEY)
    assert line.isprintable() and len(line) == 200 and KEY not in line and "<|im_start" not in line
    # A key at the cut is taken out before it.
    assert "sk-" not in one_line("x" * 190 + KEY, KEY)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("0.5", 0.5),
        ("0", 0.0),
        ("-3", 0.0),
        ("1e9", 60.0),
        ("inf", 60.0),
        ("nan", None),
        ("soon", None),
        ("", None),
        (formatdate(1_000_020, usegmt=True), 20.0),
        (formatdate(999_000, usegmt=True), 0.0),
        (formatdate(9_000_000, usegmt=True), 60.0),
        ("Mon, 99 Foo 2026 00:00:00 GMT", None),
        ("\x00", None),
    ],
)
def test_retry_after(value: str, seconds: float | None) -> None:
    assert retry_after(value, 1_000_000.0) == seconds


def test_waits_grow_with_jitter_and_obey_retry_after(serve: Serve, model: Model) -> None:
    when = Time()
    ask(model(serve("http_500"), when, attempts=5))
    # 0.5 s, doubled each time, of which half to all is waited.
    assert len(when.waits) == 4
    assert all(0.25 * 2**i <= wait <= 0.5 * 2**i for i, wait in enumerate(when.waits))
    when = Time()
    ask(model(serve(Fault("http_429", headers={"Retry-After": "7"})), when, attempts=3))
    assert len(when.waits) == 2
    assert all(7.0 <= wait <= 7.1 for wait in when.waits)


def test_no_wait_goes_past_the_deadline(serve: Serve, model: Model) -> None:
    when = Time()
    # 4 attempts of 5 s: 20 s for all. The server asks for 15, then again.
    reply = ask(model(serve(Fault("http_429", headers={"Retry-After": "15"})), when, timeout=5.0))
    assert (reply.attempts, len(when.waits)) == (2, 1)
    assert reply.seconds == pytest.approx(when.waits[0])


def test_an_account_without_money_is_not_asked_again(serve: Serve, model: Model) -> None:
    server = serve(Fault("data", status=429, data=b'{"error": {"message": "no", "code": "insufficient_quota"}}'))
    assert ask(model(server)).attempts == 1


def test_redirects_are_not_followed(serve: Serve, model: Model) -> None:
    other = serve("stolen")
    server = serve(Fault("data", status=307, headers={"Location": other.url + "/chat/completions"}))
    reply = ask(model(server))
    assert reply.error is not None and "redirects" in reply.error and other.requests == 0


def test_a_prompt_that_cannot_be_sent_is_an_error(serve: Serve, model: Model) -> None:
    asked = model(serve("yes"))
    reply, good = asked.generate([TextPrompt("", "x", {"type": object()}), TextPrompt("", "\ud800 \x00")])
    assert reply.error is not None and reply.attempts == 0
    assert good.text == "yes"
    assert faults(asked) == {"other": 1}


@settings(max_examples=300)
@given(
    data=st.one_of(
        st.binary(max_size=300),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["choices", "message", "content", "tool_calls", "function", "arguments", "usage"])
                    | st.sampled_from(["prompt_tokens", "completion_tokens", "error", "detail", "text"]),
                    inner,
                    max_size=4,
                )
            ),
            max_leaves=12,
        ).map(lambda value: json.dumps(value).encode()),
        st.binary(max_size=60).map(lambda b: b'{"choices": [{"message": {"content": "' + b + b'"}}]}'),
    ),
    status=st.sampled_from([200, 200, 200, 299, 304, 400, 401, 404, 418, 429, 500, 599]),
    header=st.sampled_from([{}, {"Content-Encoding": "gzip"}, {"Retry-After": "1e99"}, {"Content-Type": "a/b; \xff"}]),
    raw=st.booleans(),
)
def test_random_bytes_never_raise(
    random_server: tuple[MisbehavingServer, ServerModel],
    data: bytes,
    status: int,
    header: dict[str, str],
    raw: bool,
) -> None:
    server, asked = random_server
    answer = Fault("raw" if raw and status == 200 else "data", data=data, status=status, headers=header)
    server.behave = lambda request: answer
    before = asked.state_dict()
    requests = server.requests
    for reply in asked.generate([FREE, JSON]):
        assert (reply.error is None) or (reply.text == "" and reply.error.isprintable() and len(reply.error) <= 200)
        assert min(reply.prompt_tokens, reply.completion_tokens, reply.seconds, reply.money) >= 0
    after = asked.state_dict()
    assert after["calls"] - before["calls"] == server.requests - requests
    assert after["prompts"] - before["prompts"] == 2


@pytest.fixture(scope="module")
def random_server() -> Iterator[tuple[MisbehavingServer, ServerModel]]:
    when = Time()
    with MisbehavingServer(lambda request: "x") as server:
        config = ServerConfig(url=server.url, attempts=2, breaker_failures=0, key_variable="")
        asked = ServerModel("test", config, sleep=when.sleep)
        yield server, asked
        asked.close()


@given(data=st.binary(max_size=200), name=st.text(max_size=20))
def test_any_bytes_are_a_completion_or_a_fault(data: bytes, name: str) -> None:
    from echelon.llm._http import Answer, content, error_words, status_fault
    from echelon.llm._http import Fault as HTTPFault

    answer = Answer(200, {"content-type": name}, data)
    try:
        message, usage = completion(answer)
        assert isinstance(content(message, True), str) and isinstance(usage, dict)
    except HTTPFault as fault:
        assert fault.kind in KINDS
    assert len(error_words(data)) <= 2000
    fault = status_fault(Answer(429, {"retry-after": name}, data), "K", True)
    assert fault is not None and (fault.wait is None or 0 <= fault.wait <= 60)


# --- the breaker ---


def test_the_breaker_by_hand() -> None:
    now = [0.0]
    breaker = Breaker(3, 10.0, lambda: now[0])
    for _ in range(2):
        breaker.leave(breaker.enter() or "", False)
    breaker.leave(breaker.enter() or "", True)  # a success: from the start again
    for _ in range(2):
        breaker.leave(breaker.enter() or "", False)
    assert not breaker.is_open
    late = breaker.enter()
    breaker.leave(breaker.enter() or "", False)
    assert breaker.is_open and breaker.opened == 1
    breaker.leave(late or "", False)  # sent before it opened: changes nothing
    assert (breaker.enter(), breaker.refused) == (None, 1)
    waited = []
    for _ in range(8):  # each trial that fails doubles the wait, up to ten minutes
        start = now[0]
        while breaker.enter() is None:
            now[0] += 1
        waited.append(now[0] - start)
        assert breaker.enter() is None  # one trial at a time
        breaker.leave("trial", False)
    assert waited == [10, 20, 40, 80, 160, 320, 600, 600]
    now[0] += 600
    assert breaker.enter() == "trial"
    breaker.leave("trial", None)  # broken off: another may try
    assert breaker.enter() == "trial"
    breaker.leave("trial", True)
    assert not breaker.is_open and breaker.enter() == "passes"
    for _ in range(3):
        breaker.leave("passes", False)
    now[0] += 10
    assert breaker.enter() == "trial"  # the wait is the first one again


def test_a_breaker_of_zero_never_opens() -> None:
    breaker = Breaker(0, 1.0)
    for _ in range(100):
        breaker.leave(breaker.enter() or "", False)
    assert not breaker.is_open


def test_one_trial_among_many_threads() -> None:
    now = [0.0]
    breaker = Breaker(1, 1.0, lambda: now[0])
    breaker.leave(breaker.enter() or "", False)
    now[0] = 1.0
    got: list[str | None] = []
    threads = [threading.Thread(target=lambda: got.append(breaker.enter())) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(str(g) for g in got) == ["None"] * 19 + ["trial"]


def test_a_failing_server_is_left_alone(serve: Serve, model: Model) -> None:
    when = Time()
    server = serve("http_500")
    asked = model(server, when, attempts=2, breaker_failures=3, breaker_seconds=30, connections=1)
    replies = asked.generate([FREE] * 10)
    assert [reply.attempts for reply in replies] == [2, 2, 2, 0, 0, 0, 0, 0, 0, 0]
    assert all(reply.error for reply in replies)
    assert "left alone" in (replies[-1].error or "")
    state = asked.state_dict()
    assert (state["breaker_opened"], state["breaker_refused"], state["failures"]) == (1, 7, 10)
    when.now += 30
    assert [reply.attempts for reply in asked.generate([FREE] * 3)] == [2, 0, 0]  # the trial fails
    when.now += 30
    assert ask(asked).attempts == 0  # 60 s now
    when.now += 30
    server.behave = lambda request: "well again"
    assert [reply.text for reply in asked.generate([FREE] * 3)] == ["well again"] * 3
    assert asked.state_dict()["breaker_opened"] == 2


def test_a_batch_to_a_dead_server_ends_early(serve: Serve, model: Model) -> None:
    server = serve("hello")
    server.kill()
    asked = model(server, breaker_failures=5, connections=8)
    replies = asked.generate([FREE] * 1000)
    assert all(reply.error for reply in replies)
    # 5 whole failures open it; at most 7 others were under way, none with more than its 4 attempts.
    assert asked.state_dict()["calls"] <= 12 * 4
    assert asked.state_dict()["breaker_refused"] >= 988


# --- secrets ---


def test_the_key_never_leaks(
    serve: Serve, model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    told = json.dumps(good_completion(f'{{"a": "{KEY}"}}')).encode()
    echoes = [
        FAULTS["echo_key"],
        Fault("http_401", headers={"X-Key": KEY}),
        Fault("data", status=401, data=json.dumps({"error": {"message": f"bad key {KEY}"}}).encode()),
        Fault("data", status=404, data=f"plain {KEY}".encode()),
        Fault("data", status=302, headers={"Location": f"/?key={KEY}"}),
        Fault("data", data=KEY.encode(), headers={"Content-Type": f"text/{KEY}"}),
        Fault("data", data=json.dumps({"error": KEY}).encode()),
        Fault("data", data=told),
        Fault("data", data=b"{}", headers={"Content-Encoding": KEY}),
        Fault("raw", data=f"HTTP/1.1 {KEY}\r\n\r\n".encode()),
        Fault("data", data=json.dumps(good_completion(f"prose {KEY}")).encode()),
    ]
    seen: list[str] = []
    with caplog.at_level(logging.DEBUG):
        for echo in echoes:
            server = serve(lambda request, echo=echo: (seen.append(request["headers"]["authorization"]), echo)[1])
            asked = model(server, attempts=2, structured="prompt")
            server.models = Fault("data", status=401, data=json.dumps({"error": KEY}).encode())
            with pytest.raises(EchelonError) as error:
                asked.check()
            replies = asked.generate([FREE, JSON])
            where = [replies, error.value, asked, vars(asked), asked.state_dict(), asked.config, asked.name]
            assert KEY not in repr(where) + str(where)
            assert KEY not in json.dumps(asked.state_dict())
            asked.close()
    assert set(seen) == {f"Bearer {KEY}"}
    assert caplog.text  # the HTTP library did log
    assert KEY not in caplog.text


def test_a_refused_key_names_its_variable(serve: Serve, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    reply = ask(model(serve("http_401"), key_variable="MY_KEY"))
    assert reply.error is not None and "MY_KEY" in reply.error and reply.attempts == 1
    reply = ask(model(serve("http_401"), key_variable="MY_OTHER_KEY"))
    assert reply.error is not None and "set the environment variable MY_OTHER_KEY" in reply.error


def test_a_key_that_no_header_takes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in ("sk-a\nb", "sk-ä", "sk-a\x00b".replace("\x00", "\x7f"), "two words"):
        monkeypatch.setenv("OPENAI_API_KEY", bad)
        with pytest.raises(EchelonError, match="OPENAI_API_KEY holds characters") as error:
            ServerModel("m")
        assert bad not in str(error.value)


# --- check ---


def test_check(serve: Serve, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve("yes")
    for models in (["other", "test"], ["test:latest"], ["models/test"], None, []):
        server.models = models  # type: ignore[assignment]
        model(server).check()
    for good in (
        Fault("data", data=b"not json"),
        Fault("data", data=b'{"data": {"a": 7}}'),
        Fault("data", data=b'{"data": [7, {"id": 7}]}'),
        Fault("data", data=b'{"data": [{"id": "file.gguf", "owned_by": "llamacpp"}]}'),
        Fault("data", status=405),
        Fault("data", status=501),
        FAULTS["html"],
        FAULTS["big"],
    ):
        server.models = good
        model(server).check()
    server.models = ["tost", "\x1b[31m" + "x" * 200]
    with pytest.raises(EchelonError, match="unknown model 'test': did you mean 'tost'") as error:
        model(server).check()
    assert str(error.value).isprintable()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for fault, words in (
        (FAULTS["http_401"], "refuses the key in the environment variable OPENAI_API_KEY"),
        (FAULTS["http_403"], "refuses the key"),
        (FAULTS["http_503"], "overloaded"),
        (FAULTS["redirect"], "redirects"),
        (FAULTS["drop_before"], "dropped"),
    ):
        server.models = fault
        with pytest.raises(EchelonError, match=words):
            model(server, attempts=2).check()
    server.models = Fault("data", status=403, data=b'{"error": {"message": "Missing scopes: api.model.read"}}')
    model(server).check()
    server.kill()
    with pytest.raises(EchelonError, match="can't be reached"):
        model(server).check()
    assert server.requests == 0


# --- life and death ---


def test_counters_come_back(serve: Serve, model: Model) -> None:
    server = serve("http_500")
    asked = model(server, attempts=2, breaker_failures=1)
    asked.generate([FREE] * 2)
    state = asked.state_dict()
    json.dumps(state)
    assert all(f"fault_{kind}" in state for kind in KINDS)
    other = model(server, attempts=2, breaker_failures=1)
    other.load_state_dict(state)
    assert other.state_dict() == state
    ask(other)
    assert other.state_dict()["calls"] == state["calls"] + 2
    assert other.state_dict()["breaker_opened"] == 2
    other.load_state_dict({"calls": 3})
    assert other.state_dict()["calls"] == 3 and other.state_dict()["prompts"] == 0
    for bad in ("x", -1, True, float("nan"), None):
        with pytest.raises(EchelonError, match="damaged: calls"):
            other.load_state_dict({"calls": bad})  # type: ignore[dict-item]
    assert other.state_dict()["calls"] == 3


def started_since(before: set[threading.Thread], wanted: int) -> int:
    """How many threads live that did not then; waits until there are so many, as a thread that is told ends later."""
    end = time.monotonic() + 60
    while (count := len(set(threading.enumerate()) - before)) != wanted and time.monotonic() < end:
        time.sleep(0.01)
    return count


def test_closing_ends_what_is_under_way(serve: Serve, model: Model) -> None:
    server = serve("late")
    gc.collect()  # models that earlier tests forgot
    before = set(threading.enumerate())
    asked = model(server, timeout=60.0)
    replies: list[TextReply] = []
    thread = threading.Thread(target=lambda: replies.extend(asked.generate([FREE] * 3)))
    thread.start()
    while server.requests < 3:
        time.sleep(0.005)
    asked.close()
    thread.join(30)  # half of what a reply may take
    assert not thread.is_alive()
    assert [reply.error is not None and "closed" in reply.error for reply in replies] == [True] * 3
    assert "closed" in (ask(asked).error or "")
    with pytest.raises(EchelonError, match="closed"):
        asked.check()
    asked.close()
    assert started_since(before, 0) == 0


def test_a_forgotten_model_ends_its_thread(serve: Serve) -> None:
    gc.collect()
    before = set(threading.enumerate())
    asked = ServerModel("forgotten", ServerConfig(url=serve("yes").url))
    assert ask(asked).text == "yes"
    assert started_since(before, 2) == 2  # the server's and the model's
    del asked
    gc.collect()
    assert started_since(before, 1) == 1


NO_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system doesn't fork")
SCRIPT = """
import os, sys
from echelon.llm.server import ServerConfig, ServerModel
from echelon.llm.text import TextPrompt

model = ServerModel("test", ServerConfig(url=sys.argv[1]))
print(model.generate([TextPrompt("", "one")])[0].text, flush=True)
if sys.argv[2] == "fork":
    child = os.fork()
    text = model.generate([TextPrompt("", "two")])[0].text
    if child == 0:
        print("child", text, flush=True)
        sys.exit(0 if text == "yes" else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    print("parent", model.generate([TextPrompt("", "three")])[0].text)
"""


@pytest.mark.parametrize(
    "how", ["exit", pytest.param("fork", marks=pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork"))]
)
def test_a_program_ends_quietly_and_may_fork(serve: Serve, how: str) -> None:
    server = serve("yes")
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SCRIPT, server.url, how],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent / "src")},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == (["yes"] if how == "exit" else ["yes", "child", "yes", "parent", "yes"])


# --- the config ---


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"timeout": 0.0}, "server.timeout is 0.0"),
        ({"timeout": float("nan")}, "server.timeout"),
        ({"attempts": 0}, "server.attempts"),
        ({"connections": 0}, "server.connections"),
        ({"structured": "shema"}, "did you mean 'schema'"),
        ({"temperature": -1.0}, "server.temperature"),
        ({"max_reply_bytes": 5}, "server.max_reply_bytes"),
        ({"price_in": -1.0}, "server.price_in"),
        ({"price_out": float("inf")}, "server.price_out"),
        ({"breaker_failures": -1}, "server.breaker_failures"),
        ({"breaker_seconds": 0.0}, "server.breaker_seconds"),
        ({"url": "ftp://example.com"}, "http:// or https://"),
        ({"url": "127.0.0.1:8000"}, "http"),
        ({"url": "http://"}, "http"),
        ({"url": "http://example.com:port"}, "no address"),
        ({"url": "http://a\x00b"}, "no address"),
        ({"url": "http://me:hidden@example.com/v1"}, "user name or password"),
        ({"url": "http://example.com/v1?key=hidden"}, "must end with its path"),
        ({"key_variable": "sk-hidden"}, "name of an environment variable"),
        ({"key_variable": "hidden key"}, "name of an environment variable"),
        ({"key_variable": "hidden0123456789abcdef012345"}, "name of an environment variable"),
    ],
)
def test_a_wrong_config_is_one_line(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(EchelonError, match=words) as error:
        ServerConfig(**wrong)
    assert "hidden" not in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize("name", ["", "openai:", "two\nlines", "\x1b[31m", "x" * 300])
def test_a_model_needs_a_name(name: str) -> None:
    with pytest.raises(EchelonError, match="needs the name of a model"):
        ServerModel(name)


def test_the_config_is_fit_for_toml_and_flags() -> None:
    from echelon.configs import toml_line, typed

    config = ServerConfig()
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        assert isinstance(value, int | float | str)
        assert toml_line(f.name, value).startswith(f"{f.name} = ")
    data = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    assert ServerConfig(**typed(ServerConfig, data, "server.")) == config
    assert httpx.URL(ServerConfig(url="http://[::1]:8000/v1").url).host == "::1"
