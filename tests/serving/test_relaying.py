"""Requests that another process answers: their content, and answers that come in pieces or not to their end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from semsharekv_integrations.metrics import EngineCollector
from semsharekv_integrations.serving.relaying import (
    HEADER,
    Collected,
    Message,
    Relayed,
    collect,
    find_text,
    join_documents,
    join_metrics,
    run_app,
)
from tiny_models import EngineMaker

SCOPE: Message = {"type": "http", "method": "POST", "path": "/", "headers": []}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"prompt": "a b"}, "a b"),
        ({"text": "a"}, "a"),
        ({"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": [{"text": "b"}]}]}, "a\n\nb"),
        ({"documents": [{"id": "x", "text": "a"}], "prompt": "b"}, "b\n\na"),
        ({"messages": 3, "prompt": None}, ""),
        ([1], ""),
        ("text", ""),
    ],
)
def test_the_content_of_a_body_is_found(body: Any, text: str) -> None:
    assert find_text(json.dumps(body).encode()) == text


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 10_000])
def test_a_body_that_is_none_has_no_content(body: bytes) -> None:
    assert find_text(body) == ""


def test_an_application_sees_the_body_and_then_that_its_caller_has_left() -> None:
    seen: list[Message] = []

    async def app(scope: Message, receive: Any, send: Any) -> None:
        seen.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"1", "more_body": True})
        seen.append(await receive())

    async def ask() -> list[str]:
        async with aclosing(run_app(app, SCOPE, b"body")) as messages:
            return [(await anext(messages))["type"] for _ in range(2)]

    assert asyncio.run(ask()) == ["http.response.start", "http.response.body"]
    assert [message["type"] for message in seen] == ["http.request", "http.disconnect"]
    assert seen[0]["body"] == b"body" and not seen[0]["more_body"]


async def tell(*parts: bytes, name: str = "one", status: int = 200) -> AsyncGenerator[Message, None]:
    yield {"type": "http.response.start", "status": status, "headers": [(HEADER.encode(), name.encode())]}
    for part in parts:
        yield {"type": "http.response.body", "body": part, "more_body": True}
    yield {"type": "http.response.body", "body": b"", "more_body": False}


def test_an_answer_in_pieces_is_collected() -> None:
    answer = asyncio.run(collect(tell(b"a", b"b")))
    assert (bytes(answer.body), answer.status_code, answer.replica) == (b"ab", 200, "one")


def test_a_relayed_answer_ends_when_its_caller_leaves() -> None:
    sent: list[Message] = []
    closed: list[bool] = []

    async def run() -> None:
        left = asyncio.Event()

        async def endless() -> AsyncGenerator[Message, None]:
            try:
                yield {"type": "http.response.start", "status": 200, "headers": []}
                left.set()
                await asyncio.Event().wait()
            finally:
                closed.append(True)

        async def receive() -> Message:
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await asyncio.wait_for(Relayed(endless())(SCOPE, receive, send), 30)

    asyncio.run(run())
    assert len(sent) == 1 and closed == [True]


def answer_with(body: Any, name: str, status: int = 200) -> Collected:
    return asyncio.run(collect(tell(json.dumps(body).encode(), name=name, status=status)))


def test_documents_of_all_replicas_are_listed_once() -> None:
    def describe(key: str, entries: int, library: bool = False, **more: Any) -> dict[str, Any]:
        return {"id": key, "library": library, "entries": entries, "pinned": False, "tokens": None, **more}

    one = [describe("a", 1), describe("b", 2, pinned=True), describe("c", 3, library=True)]
    other = [describe("b", 4, tokens=9), describe("c", 3, library=True), describe("d", 5)]
    told = [answer_with({"object": "list", "data": part}, str(n)) for n, part in enumerate((one, other))]
    found = json.loads(bytes(join_documents(told).body))["data"]
    assert found == [one[0], describe("b", 6, pinned=True, tokens=9), one[2], other[2]]


def test_what_replicas_deleted_is_deleted_unless_one_failed() -> None:
    missing, failed = (answer_with({"error": {}}, "0", status) for status in (404, 500))
    done = [answer_with({"deleted": True, "entries": entries}, str(entries)) for entries in (1, 2)]
    assert json.loads(bytes(join_documents([missing, *done]).body)) == {"deleted": True, "entries": 3}
    assert join_documents([missing, missing]).status_code == 404
    for some in ([*done, failed], [failed, missing], [missing, failed]):
        assert join_documents(some).status_code == 500, "some of it is still there"


def test_series_of_all_replicas_are_told_apart_and_add_up(make_engine: EngineMaker) -> None:
    told, whole = [], []
    for name, prompts in (("one", ["a b c"]), ("two", ["a b c", "d e f"])):
        engine, registry = make_engine(), CollectorRegistry()
        registry.register(EngineCollector(engine))
        whole += [engine.generate(prompt, max_new_tokens=2).report for prompt in prompts]
        told.append(asyncio.run(collect(tell(generate_latest(registry), name=name))))
    joined = join_metrics(told)
    assert joined.headers[HEADER] == "one, two"
    families = list(text_string_to_metric_families(bytes(joined.body).decode()))
    alone = list(text_string_to_metric_families(bytes(told[1].body).decode()))
    assert [(one.name, one.type) for one in families] == [(one.name, one.type) for one in alone]
    series = [sample for family in families for sample in family.samples]
    of_two = [sample for sample in series if sample.labels["replica"] == "two"]
    named = [one._replace(labels={**one.labels, "replica": "two"}) for family in alone for one in family.samples]
    assert of_two == named
    counted = [sample.value for sample in series if sample.name == "semsharekv_prompt_tokens_total"]
    assert sum(counted) == sum(report.prompt_tokens for report in whole) and len(counted) == 2


def test_an_error_of_all_replicas_is_told_in_place_of_metrics() -> None:
    refused, done = answer_with({"error": {}}, "0", 401), asyncio.run(collect(tell(b"a 1\n", name="1")))
    assert join_metrics([refused, refused]).status_code == 401
    assert b'a{replica="1"} 1.0' in bytes(join_metrics([refused, done]).body)
