"""The event loop stays free, calls can be cancelled, and threads do not disturb each other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from llama_index.core.llms import ChatMessage
from transformers import PreTrainedModel

from semsharekv_integrations import SemShareEngine
from semsharekv_integrations.llama_index import SemShareKVLLM

PROMPT = "What did the mayor say about the flood ?"
MESSAGES = [ChatMessage(role="user", content=PROMPT)]
FORWARD_S = 0.02
MANY_TOKENS = 200


@pytest.fixture
def forwards(llama: PreTrainedModel) -> Iterator[list[float]]:
    """Makes every forward pass slow, and records when each began."""
    times: list[float] = []

    def wait(*_: object) -> None:
        times.append(time.perf_counter())
        time.sleep(FORWARD_S)

    hook = llama.register_forward_pre_hook(wait)
    yield times
    hook.remove()


async def _last(stream: Any) -> Any:
    return [response async for response in await stream][-1]


CALLS: dict[str, Callable[[SemShareKVLLM], Any]] = {
    "achat": lambda llm: llm.achat(MESSAGES),
    "acomplete": lambda llm: llm.acomplete(PROMPT),
    "astream_chat": lambda llm: _last(llm.astream_chat(MESSAGES)),
    "astream_complete": lambda llm: _last(llm.astream_complete(PROMPT)),
}


@pytest.mark.parametrize("call", CALLS)
async def test_the_event_loop_runs_on(llm: SemShareKVLLM, forwards: list[float], call: str) -> None:
    gaps: list[float] = []

    async def tick() -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            gaps.append(time.perf_counter() - began)

    ticker = asyncio.create_task(tick())
    response = await CALLS[call](llm)
    ticker.cancel()
    assert response.raw["usage"]["completion_tokens"] == len(forwards) == 12
    assert len(gaps) > 2 * len(forwards), "the loop turned while the model computed"


@pytest.mark.parametrize("call", ["stream_chat", "stream_complete"])
def test_closing_a_stream_cancels_it(llm: SemShareKVLLM, forwards: list[float], call: str) -> None:
    stream = getattr(llm, call)(MESSAGES if call == "stream_chat" else PROMPT, max_tokens=MANY_TOKENS)
    next(stream)
    stream.close()
    done = len(forwards)
    time.sleep(3 * FORWARD_S)
    assert done == len(forwards) < 10
    assert llm.engine.stats()["requests"] == 1, "what was computed is kept"


async def _stays(forwards: list[float]) -> bool:
    """Whether the forward passes stop, soon and far from the end."""
    await asyncio.sleep(5 * FORWARD_S)
    done = len(forwards)
    await asyncio.sleep(5 * FORWARD_S)
    return done == len(forwards) < MANY_TOKENS / 2


@pytest.mark.parametrize("call", ["astream_chat", "astream_complete"])
async def test_closing_an_async_stream_cancels_it(llm: SemShareKVLLM, forwards: list[float], call: str) -> None:
    stream = await getattr(llm, call)(MESSAGES if call == "astream_chat" else PROMPT, max_tokens=MANY_TOKENS)
    await anext(stream)
    await stream.aclose()
    assert await _stays(forwards)


@pytest.mark.parametrize("call", ["achat", "acomplete"])
async def test_cancelling_a_task_cancels_its_call(llm: SemShareKVLLM, forwards: list[float], call: str) -> None:
    prompt = MESSAGES if call == "achat" else PROMPT
    task = asyncio.create_task(getattr(llm, call)(prompt, max_tokens=MANY_TOKENS))
    await asyncio.sleep(3 * FORWARD_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await _stays(forwards)


async def test_calls_at_once_give_what_calls_in_turn_give(make_engine: Callable[..., SemShareEngine]) -> None:
    prompts = [f"{PROMPT} Say it {n} times ." for n in range(6)]
    alone = SemShareKVLLM(engine=make_engine("off"), max_tokens=8)
    wanted = [alone.complete(prompt).text for prompt in prompts]
    shared = SemShareKVLLM(engine=make_engine(), max_tokens=8)
    with ThreadPoolExecutor(4) as pool:
        assert [response.text for response in pool.map(shared.complete, prompts)] == wanted
    together = await asyncio.gather(*[shared.acomplete(prompt) for prompt in prompts])
    assert [response.text for response in together] == wanted
    assert all(response.raw["kv_cache"]["prefix_tokens"] > 0 for response in together)
