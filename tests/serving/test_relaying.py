"""Requests that another process answers: their content, and answers that come in pieces or not to their end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest

from semsharekv_integrations.serving.relaying import (
    HEADER,
    Collected,
    Message,
    Relayed,
    collect,
    find_text,
    join_documents,
    run_app,
)

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
    found = [{"id": key, "library": False} for key in ("a", "b", "c")]
    told = [answer_with({"object": "list", "data": part}, str(n)) for n, part in enumerate((found[:2], found[1:]))]
    assert json.loads(bytes(join_documents(told).body))["data"] == found


def test_what_one_replica_deleted_is_deleted() -> None:
    missing, done = answer_with({"error": {}}, "0", 404), answer_with({"deleted": True}, "1")
    assert join_documents([missing, done]).status_code == 200
    assert join_documents([missing, missing]).status_code == 404
