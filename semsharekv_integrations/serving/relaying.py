"""Requests that another process answers: what of them it needs, and its answers on their way back.

An application is driven by ASGI's messages, which can be sent anywhere. Knows nothing about Ray.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterable, MutableMapping, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Receive, Scope, Send

HEADER = "x-semsharekv-replica"
REPLICA_LABEL = "replica"
MOST_NESTED = 6
_HAD_NONE = (404, 409)  # of a document that is not here, or in a library
Message = MutableMapping[str, Any]
PLAIN = (  # what of a request's scope goes to a replica
    "type",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "headers",
    "client",
)


async def run_app(app: ASGIApp, scope: Message, body: bytes) -> AsyncGenerator[Message, None]:
    """Yield the messages that an application answers a request with. Closing this tells it that its caller has left."""
    told, gone, is_read = asyncio.Queue[Message | None](), asyncio.Event(), False

    async def receive() -> Message:
        nonlocal is_read
        if is_read:
            await gone.wait()
            return {"type": "http.disconnect"}
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def work() -> None:
        try:
            await app(scope, receive, told.put)
        finally:
            await told.put(None)

    task = asyncio.create_task(work())
    try:
        while (message := await told.get()) is not None:
            yield message
    finally:
        gone.set()
        await asyncio.gather(task, return_exceptions=True)  # what failed, the application has answered


class Relayed(Response):
    """A replica's answer, passed on as it comes."""

    def __init__(self, messages: AsyncGenerator[Message, None]) -> None:
        super().__init__()
        self._messages = messages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it. Where its caller leaves, the replica is told."""
        gone = asyncio.create_task(_wait_until_gone(receive))
        try:
            async with aclosing(self._messages):
                while (message := await _take_next(self._messages, gone)) is not None:
                    await send(message)
        finally:
            gone.cancel()


class Collected(Response):
    """A replica's answer, all of it."""

    @property
    def replica(self) -> str:
        """The replica's id."""
        return self.headers[HEADER]


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _take_next(messages: AsyncGenerator[Message, None], gone: asyncio.Task[None]) -> Message | None:
    """Return the next message; None if there is none, or the caller has left."""
    following = asyncio.ensure_future(anext(messages, None))
    try:
        await asyncio.wait({following, gone}, return_when=asyncio.FIRST_COMPLETED)
        return following.result() if following.done() else None
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


def find_text(body: bytes) -> str:
    """Return the content of a request, wherever it stands in its body; "" if there is none."""
    try:
        found = json.loads(body)
    except (RecursionError, ValueError):
        return ""
    if not isinstance(found, dict):
        return ""
    asked = [found.get("prompt"), found.get("text"), found.get("messages"), found.get("documents")]
    return "\n\n".join(_list_texts(asked, MOST_NESTED))


def _list_texts(value: Any, depth: int) -> list[str]:
    """Return the texts in lists, and under ``content`` and ``text``."""
    if isinstance(value, str):
        return [value]
    if depth and isinstance(value, list):
        return [text for item in value for text in _list_texts(item, depth - 1)]
    if depth and isinstance(value, dict):
        return [text for key in ("content", "text") for text in _list_texts(value.get(key), depth - 1)]
    return []


async def collect(messages: AsyncGenerator[Message, None]) -> Collected:
    """Return an answer of which all messages have come."""
    start: Message = {}
    body = b""
    async for message in messages:
        if message["type"] == "http.response.start":
            start = message
        else:
            body += message.get("body", b"")
    answer = Collected(body, start["status"])
    answer.raw_headers = [(bytes(key), bytes(value)) for key, value in start["headers"]]
    return answer


def join_documents(answers: Sequence[Collected]) -> Response:
    """Return one answer for several: the documents of all of them, or how much all have deleted.

    If one failed, that is the answer; a replica that had nothing to delete has not failed.
    """
    done = [answer for answer in answers if answer.status_code == 200]
    failed = [answer for answer in answers if answer.status_code not in (200, *_HAD_NONE)]
    if failed or not done:
        return (failed or answers)[0]
    told = [json.loads(bytes(answer.body)) for answer in done]
    if "data" in told[0]:
        whole = {"data": _join_lists([one["data"] for one in told])}
    else:
        whole = {"entries": sum(one["entries"] for one in told)}
    headers = {HEADER: ", ".join(answer.replica for answer in done)}
    return Response(json.dumps({**told[0], **whole}), media_type="application/json", headers=headers)


def _join_lists(lists: Iterable[Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return each document once, with the entries of all replicas; those of a library are the same in each."""
    joined: dict[tuple[str, bool], dict[str, Any]] = {}
    for one in (one for documents in lists for one in documents):
        known = joined.setdefault((one["id"], one["library"]), one)
        if known is not one and not one["library"]:
            known["entries"] += one["entries"]
            known["pinned"] |= one["pinned"]
            known["tokens"] = one["tokens"] if known["tokens"] is None else known["tokens"]
    return [joined[key] for key in sorted(joined)]


def join_metrics(answers: Sequence[Collected]) -> Response:
    """Return the series of all replicas, each under its replica's name in the label ``replica``, or the first error."""
    done = [answer for answer in answers if answer.status_code == 200]
    if not done:
        return answers[0]
    families: dict[str, Metric] = {}
    for answer in done:
        for told in text_string_to_metric_families(bytes(answer.body).decode()):
            family = families.setdefault(told.name, Metric(told.name, told.documentation, told.type))
            for sample in told.samples:
                family.samples.append(sample._replace(labels={**sample.labels, REPLICA_LABEL: answer.replica}))
    registry = CollectorRegistry()
    registry.register(_Joined(families.values()))
    headers = {HEADER: ", ".join(answer.replica for answer in done)}
    return Response(generate_latest(registry), headers=headers, media_type=CONTENT_TYPE_LATEST)


class _Joined(Collector):
    """Metrics as they are."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families
