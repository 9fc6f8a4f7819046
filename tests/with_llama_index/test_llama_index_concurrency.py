"""The event loop stays free, calls can be cancelled, and threads do not disturb each other."""

from __future__ import annotations

import asyncio
import threading
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
PATIENCE_S = 60.0  # after which a test says that something hangs
MANY_TOKENS = 200


class Passes:
    """Counts forward passes; one of them waits to be let go."""

    def __init__(self) -> None:
        self.count = 0
        self.held_at: int | None = None
        self.reached, self.go = threading.Event(), threading.Event()

    def begin(self, *_: object) -> None:
        self.count += 1
        if self.count == self.held_at:
            self.reached.set()
            assert self.go.wait(PATIENCE_S), "nobody else went on"


@pytest.fixture
def passes(llama: PreTrainedModel) -> Iterator[Passes]:
    found = Passes()
    hook = llama.register_forward_pre_hook(found.begin)
    yield found
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
async def test_the_event_loop_runs_on(llm: SemShareKVLLM, passes: Passes, call: str) -> None:
    passes.held_at = 6
    task = asyncio.ensure_future(CALLS[call](llm))
    assert await asyncio.to_thread(passes.reached.wait, PATIENCE_S)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not task.done() and passes.count == 6, "the loop turned while the model computed"
    passes.go.set()
    assert (await task).raw["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize("call", ["stream_chat", "stream_complete"])
def test_closing_a_stream_cancels_it(llm: SemShareKVLLM, passes: Passes, call: str) -> None:
    stream = getattr(llm, call)(MESSAGES if call == "stream_chat" else PROMPT, max_tokens=MANY_TOKENS)
    next(stream)
    stream.close()
    assert llm.engine.stats()["requests"] == 1, "what was computed is kept"
    assert passes.count < 10


async def _ended(llm: SemShareKVLLM) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while llm.engine._scheduler._begun:
            await asyncio.sleep(0)


@pytest.mark.parametrize("call", ["astream_chat", "astream_complete"])
async def test_closing_an_async_stream_cancels_it(llm: SemShareKVLLM, passes: Passes, call: str) -> None:
    passes.held_at = 12
    stream = await getattr(llm, call)(MESSAGES if call == "astream_chat" else PROMPT, max_tokens=MANY_TOKENS)
    await anext(stream)
    await stream.aclose()
    passes.go.set()
    await _ended(llm)
    assert passes.count <= 13


@pytest.mark.parametrize("call", ["achat", "acomplete"])
async def test_cancelling_a_task_cancels_its_call(llm: SemShareKVLLM, passes: Passes, call: str) -> None:
    passes.held_at = 6
    prompt = MESSAGES if call == "achat" else PROMPT
    task = asyncio.create_task(getattr(llm, call)(prompt, max_tokens=MANY_TOKENS))
    assert await asyncio.to_thread(passes.reached.wait, PATIENCE_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    passes.go.set()
    await _ended(llm)
    assert passes.count <= 7


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
