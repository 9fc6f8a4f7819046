"""Callbacks, the event loop and cancelling, for the chat model and the plain LLM alike."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import pytest
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.outputs import LLMResult

from semsharekv_integrations import SemShareEngine
from semsharekv_integrations.langchain import ChatSemShareKV, SemShareKVLLM

Model = ChatSemShareKV | SemShareKVLLM
PROMPT = "In Prorna , a green flag was raised on Monday . What happened in Prorna ?"
OTHERS = [f"In Prorna , {count} people were affected by the flood ." for count in range(3)]


@pytest.fixture(params=[ChatSemShareKV, SemShareKVLLM])
def model(request: pytest.FixtureRequest, make_engine: Callable[..., SemShareEngine]) -> Model:
    return request.param(engine=make_engine(), max_tokens=12)


def text(answer: Any) -> str:
    return answer if isinstance(answer, str) else str(answer.text)


class Tokens(BaseCallbackHandler):
    """Tokens and final text by run."""

    def __init__(self) -> None:
        self.tokens: defaultdict[UUID, list[str]] = defaultdict(list)
        self.texts: dict[UUID, str] = {}
        self.errors: list[BaseException] = []

    def on_llm_new_token(self, token: str, *, run_id: UUID, **_: Any) -> None:
        self.tokens[run_id].append(token)

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **_: Any) -> None:
        self.texts[run_id] = response.generations[0][0].text

    def on_llm_error(self, error: BaseException, **_: Any) -> None:
        self.errors.append(error)


async def _drain(model: Model, config: Any) -> None:
    async for _ in model.astream(PROMPT, config):
        pass


@pytest.mark.parametrize(
    "call",
    [
        lambda model, config: asyncio.to_thread(model.invoke, PROMPT, config),
        lambda model, config: asyncio.to_thread(lambda: list(model.stream(PROMPT, config))),
        lambda model, config: model.ainvoke(PROMPT, config),
        _drain,
    ],
    ids=["invoke", "stream", "ainvoke", "astream"],
)
async def test_callbacks_hear_every_token_once(model: Model, call: Callable[[Model, Any], Awaitable[Any]]) -> None:
    heard = Tokens()
    await call(model, {"callbacks": [heard]})
    (run_id,) = heard.texts
    assert "".join(heard.tokens[run_id]) == heard.texts[run_id] == text(model.invoke(PROMPT))
    assert len(heard.tokens[run_id]) > 3


async def test_tokens_go_to_the_run_that_they_belong_to(model: Model) -> None:
    heard = Tokens()
    model.batch(OTHERS, {"callbacks": [heard]})
    await model.abatch(OTHERS, {"callbacks": [heard]})
    assert len(heard.texts) == 6 and len(heard.tokens) > 0
    assert all("".join(tokens) == heard.texts[run_id] for run_id, tokens in heard.tokens.items())


async def test_the_event_loop_goes_on_meanwhile(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, turned = model.engine._load().adapter, threading.Event()
    prefill = adapter.prefill

    def held(*arguments: Any) -> Any:
        assert turned.wait(60), "the loop stood still"
        return prefill(*arguments)

    monkeypatch.setattr(adapter, "prefill", held)
    task = asyncio.create_task(model.ainvoke(PROMPT, max_tokens=3))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not task.done()
    turned.set()
    assert await task


class FirstToken(AsyncCallbackHandler):
    def __init__(self) -> None:
        self.came = asyncio.Event()

    async def on_llm_new_token(self, *_: Any, **__: Any) -> None:
        self.came.set()


async def _finished(engine: SemShareEngine) -> dict[str, float]:
    deadline = time.monotonic() + 20
    while not engine.stats()["requests"] and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    return engine.stats()


async def test_cancelling_the_task_cancels_the_call(model: Model) -> None:
    first = FirstToken()
    task = asyncio.create_task(model.ainvoke(PROMPT, {"callbacks": [first]}, max_tokens=450))
    await first.came.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    stats = await _finished(model.engine)
    assert stats["requests"] == 1 and stats["output_tokens"] < 450


async def test_closing_an_asynchronous_stream_cancels_the_call(model: Model) -> None:
    stream = model.astream(PROMPT, max_tokens=450)
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    stats = await _finished(model.engine)
    assert stats["requests"] == 1 and stats["output_tokens"] < 450


def test_closing_a_stream_cancels_the_call(model: Model) -> None:
    stream = model.stream(PROMPT, max_tokens=450)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert model.engine.stats()["requests"] == 1 and model.engine.stats()["output_tokens"] < 5
