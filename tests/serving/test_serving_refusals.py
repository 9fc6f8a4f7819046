"""What a server does not do is refused by name, in the form that OpenAI's clients read; nothing is ignored."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from running_server import KEYS, RunningServer, Serve

pytestmark = pytest.mark.enable_socket
CHAT, COMPLETION, DOCUMENTS = "/v1/chat/completions", "/v1/completions", "/v1/documents"
ASKED: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Who is the mayor?"}]}
IMAGE = [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]
LOOK = {"type": "function", "function": {"name": "look"}}
CALL = {"id": "1", **LOOK}
IMPOSSIBLE = {"type": "json_schema", "json_schema": {"schema": {"type": "banana"}}}


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> RunningServer:
    return request.getfixturevalue("trained")


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 10}}, "logit_bias"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"functions": [{"name": "look"}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"store": True}, "store"),
        ({"banana": 1}, "banana"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 10**9}, "max_completion_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"banana": True}}, "stream_options.banana"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "banana"}}, "tool_choice"),
        ({"tools": [{"type": "banana"}]}, "tools[0]"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"documents": [{"id": "a", "text": "not in the prompt"}]}, "documents['a']"),
        ({"documents": [{"id": "a", "text": "x"}, {"id": "a", "text": "y"}]}, "documents"),
        ({"prompt_cache_key": ""}, "prompt_cache_key"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": IMAGE}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "hi", "audio": {"id": "a"}}]}, "messages[0].audio"),
        ({"n": True}, "n"),
        ({"stop": 5}, "stop"),
        ({"tool_choice": 5}, "tool_choice"),
        ({"documents": [{"id": "a"}]}, "documents[0].text"),
        ({"tools": [LOOK], "tool_choice": {"type": "function", "function": {"name": "auto"}}}, "tool_choice"),
        ({"tools": [LOOK], "response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": {"type": "object"}}}, "response_format.schema"),
        ({"response_format": IMPOSSIBLE}, "response_format.json_schema.schema"),
        ({"messages": [{"role": ["user"], "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant", "content": "hi", "tool_calls": 5}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": "hi", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "tool", "content": "hi", "name": {}}]}, "messages[0].name"),
    ],
)
def test_what_is_not_supported_is_a_400_that_names_the_field(server: RunningServer, given: Any, field: str) -> None:
    response = server.post(CHAT, {**ASKED, "model": "news", **given})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and error["param"] == field
    assert error["message"].startswith(field)


@pytest.mark.parametrize(
    "given",
    [
        {"n": 1, "logprobs": False, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "store": False},
        {"user": "somebody", "metadata": {"chat": "1"}, "safety_identifier": "s", "service_tier": "auto"},
        {"temperature": None, "stop": None, "tools": None, "response_format": {"type": "text"}, "seed": None},
    ],
)
def test_a_value_that_asks_for_nothing_is_no_error(server: RunningServer, given: Any) -> None:
    assert server.post(CHAT, {**ASKED, "model": "news", "max_tokens": 1, **given}).status_code == 200


def test_a_prompt_that_is_too_long_has_openais_code_streamed_too(server: RunningServer) -> None:
    text = "shops " * 9000
    long: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
    asked = [(CHAT, long | {"stream": stream}, "messages") for stream in (False, True)]
    for path, body, field in (
        *asked,
        (COMPLETION, {"prompt": text}, "prompt"),
        (DOCUMENTS, {"id": "a", "text": text}, "text"),
    ):
        response = server.post(path, body if path == DOCUMENTS else {"model": "news", **body})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", field)
    with pytest.raises(openai.BadRequestError, match="tokens"):
        server.connect().chat.completions.create(model="news", **long)


@pytest.mark.parametrize("prompt", [["one", "two"], [], [1, 2, 3], "", None])
def test_a_completion_takes_one_text(server: RunningServer, prompt: Any) -> None:
    response = server.post(COMPLETION, {"model": "news", "prompt": prompt})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


def test_a_completion_asks_for_logprobs_with_0_as_well(server: RunningServer) -> None:
    """It has the chosen token's, then."""
    response = server.post(COMPLETION, {"model": "news", "prompt": "one", "logprobs": 0})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "logprobs")


def test_other_errors_are_in_the_same_form(server: RunningServer) -> None:
    found = {
        (404, "model_not_found"): server.post(CHAT, {**ASKED, "model": "other"}),
        (404, "document_not_found"): httpx.delete(f"{server.url}{DOCUMENTS}/none", headers=sign(KEYS[0])),
        (404, "not_found"): httpx.get(f"{server.url}/v1/banana", headers=sign(KEYS[0])),
        (405, "method_not_allowed"): httpx.get(f"{server.url}{CHAT}", headers=sign(KEYS[0])),
        (415, "unsupported_media_type"): httpx.post(f"{server.url}{CHAT}", content=b"{}", headers=sign(KEYS[0])),
        (401, "invalid_api_key"): server.post(CHAT, ASKED, key="wrong"),
    }
    for (status, code), response in found.items():
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (status, code)
        assert error["message"] and error["type"] == "invalid_request_error"
    assert found[401, "invalid_api_key"].headers["www-authenticate"] == "Bearer"
    assert found[405, "method_not_allowed"].headers["allow"] == "POST"
    bodies = dict.fromkeys((b"{", b"\xff", b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}", b"[]", b""), "body")
    bodies[json.dumps({**ASKED, "a\ud800": 1}).encode()] = "body"
    odd = {"model": "news", "messages": [{**ASKED["messages"][0], "a\ud800": 1}]}
    bodies[json.dumps(odd).encode()] = "messages[0].a\\ud800"
    for content, field in bodies.items():
        response = httpx.post(f"{server.url}{CHAT}", content=content, headers=sign(KEYS[0]) | JSON)
        assert (response.status_code, response.json()["error"]["param"]) == (400, field)
    with pytest.raises(openai.NotFoundError):
        server.connect().models.retrieve("other")


JSON = {"Content-Type": "application/json"}


def sign(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("path", ["/v1/models", DOCUMENTS, "/metrics"])
def test_all_but_health_needs_a_key(server: RunningServer, path: str) -> None:
    for headers, status in (({}, 401), (sign("wrong"), 401), (sign(KEYS[1]), 200)):
        assert httpx.get(f"{server.url}{path}", headers=headers).status_code == status
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_body_has_a_bound_whatever_it_says_of_its_length(serve: Serve) -> None:
    server = serve(max_body_bytes=2_000).wait_until_loaded()
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "' + b"x" * 4_000 + b'"}]}'
    pieces = (body[at : at + 500] for at in range(0, len(body), 500))
    for content in (body, pieces):
        response = httpx.post(f"{server.url}{CHAT}", content=content, headers=sign(KEYS[0]) | JSON)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
    assert server.post(CHAT, {**ASKED, "max_tokens": 1}).status_code == 200


def test_no_page_of_another_origin_calls_unless_it_was_named(serve: Serve) -> None:
    friend, stranger = "https://chat.example.org", "https://evil.example.org"
    server = serve(cors_origins=(friend,)).wait_until_loaded()
    for origin, status in ((None, 200), (server.url, 200), (friend, 200), (stranger, 403), ("null", 403)):
        response = server.post(CHAT, {**ASKED, "max_tokens": 1}, headers={"Origin": origin} if origin else {})
        assert response.status_code == status, origin
        allowed = response.headers.get("access-control-allow-origin")
        assert allowed == (origin if origin == friend else None)
    names = "authorization, content-type, x-stainless-lang"  # of OpenAI's own client
    asking = {"Origin": friend, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": names}
    allowed = httpx.options(f"{server.url}{CHAT}", headers=asking)
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == friend
    asking["Origin"] = stranger
    assert "access-control-allow-origin" not in httpx.options(f"{server.url}{CHAT}", headers=asking).headers


@pytest.mark.parametrize(("keys", "status"), [((), 403), (KEYS, 200)])
def test_without_keys_a_server_answers_to_its_own_names_alone(serve: Serve, keys: Any, status: int) -> None:
    """Else a page could have its own name lead to this machine, and read what is said there."""
    server = serve(api_keys=keys, hosts=("Friend.example.org",)).wait_until_loaded()
    for friend in ({}, {"Host": "friend.example.ORG:8000"}):
        assert server.post(CHAT, {**ASKED, "max_tokens": 1}, headers=friend).status_code == 200
    for stranger in ("evil.example.org", "[", "evil.example.org:a"):
        moved = server.post(CHAT, {**ASKED, "max_tokens": 1}, headers={"Host": stranger})
        assert moved.status_code == status
