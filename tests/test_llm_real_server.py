"""`ServerModel` against a real server: llama.cpp's, with SmolLM2, in a process that is killed for real."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from echelon.errors import EchelonError
from echelon.llm import ServerConfig, ServerModel, TextPrompt, TextReply
from real_server import RealServer, real_server

pytestmark = pytest.mark.model

PLAN: dict[str, Any] = {
    "type": "object",
    "properties": {"robot": {"type": "integer", "enum": [4]}, "task": {"type": "string", "enum": ["fetch", "drop"]}},
    "required": ["robot", "task"],
    "additionalProperties": False,
}
FREE = TextPrompt("", "hi", max_tokens=12)
JSON = TextPrompt("You plan for robots. Answer as JSON.", "What should robot 4 do: fetch or drop?", PLAN, max_tokens=60)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def server() -> Iterator[RealServer]:
    with real_server() as server:
        yield server


def client(server: RealServer, **settings: Any) -> ServerModel:
    quick = {"timeout": 60.0, "attempts": 2, "breaker_failures": 0} | settings
    return ServerModel("smollm2-135m", ServerConfig(url=server.url, **quick))


def test_free_text_with_its_tokens_counted(server: RealServer) -> None:
    model = client(server, price_in=1.0, price_out=2.0)
    model.check()
    (reply,) = model.generate([FREE])
    model.close()
    assert reply.error is None
    assert reply.text.startswith("Hello")
    assert 20 < reply.prompt_tokens < 60
    assert 1 < reply.completion_tokens <= 12
    assert reply.attempts == 1
    assert reply.money == pytest.approx((reply.prompt_tokens + 2 * reply.completion_tokens) / 1e6)
    state = model.state_dict()
    assert (state["prompts"], state["calls"], state["failures"]) == (1, 1, 0)
    assert (state["prompt_tokens"], state["completion_tokens"]) == (reply.prompt_tokens, reply.completion_tokens)


@pytest.mark.parametrize("structured", ["auto", "schema"])
def test_json_is_held_to_its_schema(server: RealServer, structured: str) -> None:
    model = client(server, structured=structured)
    replies = model.generate([JSON] * 3)
    model.close()
    for reply in replies:
        assert reply.error is None
        plan = json.loads(reply.text)
        assert plan["robot"] == 4
        assert plan["task"] in ("fetch", "drop")
        assert reply.completion_tokens > 0


@pytest.mark.parametrize("structured", ["tool", "prompt"])
def test_json_that_is_only_asked_for(server: RealServer, structured: str) -> None:
    """SmolLM2's chat template leaves tools out, and it follows no rules: any JSON, or one line that there is none."""
    model = client(server, structured=structured)
    replies = model.generate([JSON, FREE, TextPrompt("", "Count to three.", PLAN, 20)])
    model.close()
    assert replies[1].text.startswith("Hello")
    for reply in (replies[0], replies[2]):
        if reply.error is None:
            json.loads(reply.text)
        else:
            assert reply.error.isprintable()
            assert reply.attempts >= 2  # sent back once
        assert reply.prompt_tokens > 0


def test_a_prompt_that_is_too_long(server: RealServer) -> None:
    model = client(server)
    long, good = model.generate([TextPrompt("", "robot " * 3000, PLAN), FREE])
    model.close()
    assert long.error is not None
    assert long.error.isprintable()
    assert good.error is None


def test_half_a_json(server: RealServer) -> None:
    model = client(server)
    (reply,) = model.generate([TextPrompt(JSON.system, JSON.text, PLAN, max_tokens=3)])
    model.close()
    if reply.error is None:
        with pytest.raises(json.JSONDecodeError):
            json.loads(reply.text)
    else:
        assert reply.error.isprintable()


def test_a_server_that_is_killed_and_comes_back() -> None:
    """SIGKILL in the middle of replies: errors, no exception; the next server at that address is used at once."""
    replies: list[TextReply] = []
    with real_server() as server:
        model = client(server, attempts=1)
        assert model.generate([FREE])[0].error is None
        story = TextPrompt("", "Write a very long story about robots.", max_tokens=1900)
        # More than its two slots can take: some are in the middle, some wait, when it dies.
        thread = threading.Thread(target=lambda: replies.extend(model.generate([story] * 6)))
        thread.start()
        thread.join(1.0)
        assert thread.is_alive(), "the stories were ready before the server could be killed"
        server.kill()
        thread.join(60)
    assert not thread.is_alive()
    assert len(replies) == 6
    assert all(reply.text == "" and reply.error is not None and reply.error.isprintable() for reply in replies)
    assert model.state_dict()["failures"] == 6
    with pytest.raises(EchelonError):
        model.check()
    (dead,) = model.generate([JSON])
    assert dead.error is not None
    with real_server(server.port) as again:
        assert again.url == server.url
        (back,) = model.generate([JSON])
        assert back.error is None
        assert json.loads(back.text)["robot"] == 4
    model.close()
