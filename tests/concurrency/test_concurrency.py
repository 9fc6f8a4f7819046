"""Threads and tasks: the same answers as one after another, an event loop that runs on, calls that can end early."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

import pytest

from semsharekv_integrations import SemShareEngine
from semsharekv_integrations.concurrency.scheduler import Scheduler
from semsharekv_integrations.concurrency.streams import read_async
from semsharekv_integrations.model.loading import GivenModel
from tiny_models import EngineMaker

PROMPTS = [
    f"{start} {end}" for start in ("Report on Prorna.", "News from Velmar.") for end in ("Who?", "When?", "Why?")
]
LONG = {"max_new_tokens": 400, "temperature": 3.0, "seed": 4}  # hot enough to meet no end token soon


PATIENCE_S = 60.0  # after which a test says that something hangs


async def wait_until(done: Callable[[], bool]) -> None:
    """Until threads that have nothing more to do are gone, of which nobody is told."""
    until = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < until, "it never happened"
        await asyncio.sleep(0.01)


class Steps:
    """The decode steps of an engine: after a few of them it waits to be let go."""

    def __init__(self, engine: SemShareEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.reached, self.go = threading.Event(), threading.Event()
        adapter = engine._load().adapter
        step = adapter.decode_step

        def counted(*arguments: Any) -> Any:
            self.count += 1
            if self.count == 4:
                self.reached.set()
                assert self.go.wait(PATIENCE_S)
            return step(*arguments)

        monkeypatch.setattr(adapter, "decode_step", counted)

    async def wait(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, PATIENCE_S)


def break_decoding(engine: SemShareEngine, monkeypatch, after: int) -> None:
    adapter = engine._load().adapter
    step, left = adapter.decode_step, iter(range(after))

    def failing(*args):
        if next(left, None) is None:
            raise RuntimeError("the device is lost")
        return step(*args)

    monkeypatch.setattr(adapter, "decode_step", failing)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 3}])
def test_threads_get_what_one_after_another_gets(make_engine: EngineMaker, options) -> None:
    alone, shared = make_engine("off"), make_engine()
    wanted = [alone.generate(prompt, max_new_tokens=8, **options).token_ids for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda p: shared.generate(p, max_new_tokens=8, **options).token_ids, PROMPTS * 3)
        assert list(found) == wanted * 3
    shared.store.check()
    assert shared.stats()["requests"] == len(PROMPTS) * 3


def test_forward_passes_take_turns(make_engine: EngineMaker, llama, monkeypatch) -> None:
    """Some models keep state in their modules, such as the frequencies of their rope."""
    engine, owned = make_engine(), []
    lock, forward = engine._load().adapter._lock, llama.forward

    def watched(*args, **kwargs):
        owned.append(lock._is_owned())
        return forward(*args, **kwargs)

    monkeypatch.setattr(llama, "forward", watched)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda p: engine.generate(p, max_new_tokens=4), PROMPTS))
    assert len(owned) >= len(PROMPTS) and all(owned), "by whoever computes, so one at a time"


def test_the_weights_are_loaded_once(llama, tokenizer) -> None:
    loads: list[int] = []
    everybody = threading.Barrier(4)

    class Slow(GivenModel):
        def load(self):
            loads.append(1)
            return super().load()

    def generate(prompt: str) -> None:
        everybody.wait(PATIENCE_S)
        engine.generate(prompt, max_new_tokens=1)

    engine = SemShareEngine.from_pretrained("unused")
    engine._source = Slow(llama, tokenizer)
    assert engine.context_window == llama.config.max_position_embeddings
    assert engine.tokenizer is tokenizer
    assert not engine.is_loaded and not loads
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(generate, PROMPTS[:4]))
    assert loads == [1] and engine.is_loaded


async def test_tasks_get_the_same(make_engine: EngineMaker) -> None:
    engine = make_engine()
    wanted = [make_engine("off").generate(prompt, max_new_tokens=5).token_ids for prompt in PROMPTS]
    found = await asyncio.gather(*(engine.agenerate(prompt, max_new_tokens=5) for prompt in PROMPTS))
    assert [generation.token_ids for generation in found] == wanted
    chunks = [chunk async for chunk in engine.astream(PROMPTS[0], max_new_tokens=5)]
    assert chunks[-1].generation is not None and chunks[-1].generation.token_ids == wanted[0]
    assert "".join(chunk.text for chunk in chunks) == chunks[-1].generation.text


async def test_the_event_loop_runs_on(make_engine: EngineMaker, monkeypatch) -> None:
    engine = make_engine()
    adapter = engine._load().adapter
    prefill = adapter.prefill
    go = threading.Event()

    def held(*arguments: Any) -> Any:
        assert go.wait(PATIENCE_S), "the loop stood still"
        return prefill(*arguments)

    monkeypatch.setattr(adapter, "prefill", held)
    task = asyncio.create_task(engine.agenerate(PROMPTS[0], max_new_tokens=3))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not task.done()
    go.set()
    assert (await task).token_ids


async def test_cancelling_a_task_ends_its_generation(make_engine: EngineMaker, monkeypatch) -> None:
    engine, threads = make_engine(), threading.active_count() + 1  # one stays for calls to come
    steps = Steps(engine, monkeypatch)
    task = asyncio.create_task(engine.agenerate(PROMPTS[0], **LONG))
    await steps.wait()
    task.cancel()
    await asyncio.sleep(0)  # in which it leaves the call
    steps.go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await wait_until(lambda: threading.active_count() <= threads)
    assert steps.count <= 5
    assert_consistent(engine, make_engine("off"))


async def test_tokens_without_text_can_be_cancelled(make_engine: EngineMaker, monkeypatch) -> None:
    """A model that says nothing but special tokens gives the consumer no chunk to stop at."""
    engine, threads = make_engine(), threading.active_count() + 1  # one stays for calls to come
    steps = Steps(engine, monkeypatch)
    monkeypatch.setattr("semsharekv_integrations.text.answer_stream.TextStream.push", lambda self, token_id: "")
    task = asyncio.create_task(engine.agenerate(PROMPTS[0], **LONG))
    await steps.wait()
    task.cancel()
    await asyncio.sleep(0)  # in which it leaves the call
    steps.go.set()
    await wait_until(lambda: threading.active_count() <= threads)
    assert steps.count <= 5


async def test_closing_an_async_stream_ends_it(make_engine: EngineMaker, monkeypatch) -> None:
    engine, threads = make_engine(), threading.active_count() + 1  # one stays for calls to come
    steps = Steps(engine, monkeypatch)
    async with aclosing(engine.astream(PROMPTS[0], **LONG)) as chunks:
        async for chunk in chunks:
            assert chunk.text
            await steps.wait()
            break
    steps.go.set()
    await wait_until(lambda: threading.active_count() <= threads)
    assert steps.count <= 5
    assert_consistent(engine, make_engine("off"))


@pytest.mark.parametrize("num_chunks", [0, 1, 5])
def test_closing_a_stream_keeps_what_was_computed(make_engine: EngineMaker, num_chunks: int) -> None:
    engine = make_engine()
    stream = engine.stream(PROMPTS[0], **LONG)
    for _ in range(num_chunks):
        next(stream)
    stream.close()
    assert engine.stats()["requests"] == engine.stats()["store_entries"] == min(num_chunks, 1)
    assert_consistent(engine, make_engine("off"))


def test_dropping_a_stream_is_closing_it(make_engine: EngineMaker) -> None:
    engine = make_engine()
    for _ in engine.stream(PROMPTS[0], **LONG):
        break
    assert engine.stats()["requests"] == 1


def assert_consistent(engine: SemShareEngine, off: SemShareEngine) -> None:
    """What a call that ended early left is sound: the next one equals ``off``."""
    engine.store.check()
    for reference in engine.store.fetch_all():
        assert all(t.shape[2] == len(reference.token_ids) for layer in reference.layers for t in layer)
    for prompt in (PROMPTS[0], PROMPTS[0] + " And where?"):
        for options in ({"max_new_tokens": 6}, {**LONG, "max_new_tokens": 12}):
            assert engine.generate(prompt, **options).token_ids == off.generate(prompt, **options).token_ids


@pytest.mark.parametrize("after", [0, 2])
async def test_an_error_while_decoding_comes_out_and_leaves_nothing(make_engine, monkeypatch, after: int) -> None:
    engine, threads = make_engine(), threading.active_count() + 1  # one stays for calls to come
    engine.generate(PROMPTS[0], max_new_tokens=3)
    before = engine.stats()
    with monkeypatch.context() as patch:
        break_decoding(engine, patch, after)
        with pytest.raises(RuntimeError, match="the device is lost"):
            engine.generate(PROMPTS[0], max_new_tokens=9)
        with pytest.raises(RuntimeError, match="the device is lost"):
            list(engine.stream(PROMPTS[0], max_new_tokens=9))
        with pytest.raises(RuntimeError, match="the device is lost"):
            await engine.agenerate(PROMPTS[0], max_new_tokens=9)
        with pytest.raises(RuntimeError, match="the device is lost"):
            async for _ in engine.astream(PROMPTS[0], max_new_tokens=9):
                pass
    await wait_until(lambda: threading.active_count() <= threads)
    assert {**engine.stats(), "store_hits": 0} == {**before, "store_hits": 0}
    assert_consistent(engine, make_engine("off"))


async def test_a_bad_argument_comes_out_of_every_way_in(make_engine: EngineMaker) -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        engine.generate("x", max_new_tokens=0)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        engine.stream("x", max_new_tokens=0)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        await engine.agenerate("x", max_new_tokens=0)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        async for _ in engine.astream("x", max_new_tokens=0):
            pass


async def test_context_variables_reach_the_thread() -> None:
    variable: ContextVar[int] = ContextVar("variable", default=0)
    variable.set(7)
    items = read_async(Scheduler(2), lambda: (variable.get() + n for n in range(2)), bool)
    assert [value async for value in items] == [7, 8]


def test_a_closed_loop_does_not_break_the_thread() -> None:
    released, closed = threading.Event(), threading.Event()

    def items():
        try:
            yield 1
            released.wait(5)
            yield 2
        finally:
            closed.set()

    async def take_one() -> None:
        async for _ in read_async(Scheduler(2), items, bool):
            return

    asyncio.run(take_one())
    released.set()
    assert closed.wait(5)
