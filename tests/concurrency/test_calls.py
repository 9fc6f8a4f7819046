"""Calls in flight: bounded and in order, ended by nobody half-way, and none that keeps anybody waiting for ever."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any

import pytest

from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine, StoreConfig
from semsharekv_integrations.concurrency import scheduler
from semsharekv_integrations.concurrency.scheduler import Job
from semsharekv_integrations.concurrency.streams import Stream
from semsharekv_integrations.concurrency.threads import start_thread
from semsharekv_integrations.model.batching import SharedDecoding
from tiny_models import EngineMaker

# of an interruption that comes in a ``__del__``
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

PATIENCE_S = 60.0  # after which a test says that something hangs
PROMPTS = [f"News {number} from Velmar." for number in range(12)]
LONG = {"max_new_tokens": 300, "temperature": 3.0, "seed": 4}


def answers_of(make_engine: EngineMaker, **options: Any) -> dict[str, list[int]]:
    off = make_engine("off")
    return {prompt: off.generate(prompt, **options).token_ids for prompt in PROMPTS}


LOCKS: dict[str, Callable[[SemShareEngine], AbstractContextManager[Any]]] = {
    "loading": lambda engine: engine._loading,
    "engine": lambda engine: engine._lock,
    "counts": lambda engine: engine._counting,
    "calls": lambda engine: engine._scheduler._lock,
    "turn": lambda engine: engine._queue._turn,
    "store": lambda engine: engine._store._lock,
    "documents": lambda engine: engine._memory.known._lock,
    "audit": lambda engine: engine.auditor._lock,
    "batches": lambda engine: engine._load()._together._turn,
    "model": lambda engine: engine._load().adapter._lock,
    "starting threads": lambda engine: threading._active_limbo_lock,  # type: ignore[attr-defined]
}


@contextmanager
def collecting_here_alone() -> Iterator[None]:
    """While another thread collects garbage, to ask for it does nothing."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("name", LOCKS)
def test_the_garbage_collector_may_end_a_stream_inside_of_any_lock(make_engine: EngineMaker, name: str) -> None:
    engine = make_engine()
    lock = LOCKS[name](engine)

    def drop() -> None:
        stream = engine.stream(PROMPTS[0], documents={"a": "Velmar"}, **LONG)
        next(stream)
        cycle: list[Any] = [stream]
        cycle.append(cycle)
        del stream
        with lock, collecting_here_alone():
            del cycle
            gc.collect()

    thread = threading.Thread(target=drop, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "it waits for a lock that its own thread has"
    assert engine.stats()["requests"] == 1, "and the call is ended all the same"
    engine.store.check()


def test_an_engine_that_is_collected_while_its_store_is_at_work_waits_for_nothing(
    make_engine: EngineMaker, tmp_path: Path
) -> None:
    engine = make_engine(store=StoreConfig(directory=tmp_path))
    engine.generate(PROMPTS[0], max_new_tokens=2)
    store = engine.store
    with store._lock:
        del engine
        gc.collect()
        store._entries.check()
    again = make_engine(store=StoreConfig(directory=tmp_path / "other"))
    assert again.generate(PROMPTS[0], max_new_tokens=2).token_ids


def test_a_stream_that_is_closed_while_its_thread_has_just_delivered_is_ended_before_counts(
    make_engine: EngineMaker,
) -> None:
    engine, go = make_engine(), threading.Event()
    stream = engine.stream(PROMPTS[0], **LONG)
    came = stream._came

    class Held:
        """Its thread is held when the first item is there."""

        get, empty = came.get, came.empty

        def put(self, item: Any) -> None:
            came.put(item)
            assert go.wait(PATIENCE_S)

    stream._came = Held()  # type: ignore[assignment]
    next(stream)
    stream.close()
    with ThreadPoolExecutor(1) as pool:
        counts = pool.submit(engine.stats)
        while not stream._job.listeners and not counts.done():
            pass
        go.set()
    assert counts.result()["requests"] == 1


class Interruption:
    """Raises ``KeyboardInterrupt`` in this thread at one of the lines that it runs, as a signal may."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, frame: FrameType, event: str, argument: object) -> Interruption:
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


@contextmanager
def traced(interruption: Interruption) -> Iterator[None]:
    former = sys.gettrace()
    sys.settrace(interruption)
    try:
        yield
    finally:
        sys.settrace(former)


def interrupted(action: Callable[[], object], at: int) -> bool:
    """Whether ``action`` was interrupted, at its line number ``at``, or had fewer."""
    interruption = Interruption(at)
    try:
        with traced(interruption):
            action()
    except KeyboardInterrupt:
        return True
    return interruption.left <= 0  # where the interruption came in what Python lets raise nothing, as in ``__del__``


def stream_two(engine: SemShareEngine, prompt: str) -> None:
    stream = engine.stream(prompt, max_new_tokens=3)
    next(stream)
    next(stream)
    stream.close()


ACTIONS: dict[str, Callable[[SemShareEngine, str, Path], object]] = {
    "generate": lambda engine, prompt, path: engine.generate(prompt, max_new_tokens=2),
    "stream": lambda engine, prompt, path: stream_two(engine, prompt),
    "batch": lambda engine, prompt, path: engine.generate_batch([prompt, PROMPTS[0]], max_new_tokens=2),
    "warm": lambda engine, prompt, path: engine.warm({"a": prompt}),
    "forget": lambda engine, prompt, path: engine.warm({"a": prompt}) and engine.forget("a"),
    "clear": lambda engine, prompt, path: engine.clear(),
    "save and load": lambda engine, prompt, path: engine.load(path) if engine.save(path) else None,
    "close": lambda engine, prompt, path: engine.close(),
}


SHORT = {"clear", "close"}


@pytest.mark.parametrize("name", ACTIONS)
def test_an_interruption_at_any_line_leaves_all_that_there_is_whole(
    make_engine: EngineMaker, tmp_path: Path, name: str
) -> None:
    wanted = answers_of(make_engine, max_new_tokens=2)
    config = StoreConfig(directory=tmp_path / "kv", max_bytes=30_000, disk_max_bytes=90_000)
    engine = make_engine(store=config)
    engine.generate(PROMPTS[0], max_new_tokens=2)
    step = 3 if "CI" in os.environ and name not in SHORT else 1  # all lines take a minute
    for turn in count():
        at = 1 + turn * step
        if not interrupted(lambda: ACTIONS[name](engine, PROMPTS[turn % 12], tmp_path / "saved"), at):  # noqa: B023
            break
        engine.store.check()
        if turn % 5 == 0:
            prompt = PROMPTS[turn // 5 % 12]
            assert engine.generate(prompt, max_new_tokens=2).token_ids == wanted[prompt]
    assert at > 10
    assert {prompt: engine.generate(prompt, max_new_tokens=2).token_ids for prompt in PROMPTS} == wanted
    engine.store.check()
    engine.close()
    again = make_engine(store=config)
    again.generate(PROMPTS[0], max_new_tokens=2)
    again.store.check()
    stats = again.stats()
    assert [stats[f"store_disk_{trouble}"] for trouble in ("damaged", "foreign", "vanished")] == [0, 0, 0]
    again.close()


def test_an_interruption_while_the_model_is_taken_up_leaves_an_engine_that_works(
    make_engine: EngineMaker, llama, tokenizer, tmp_path: Path
) -> None:
    wanted = answers_of(make_engine, max_new_tokens=2)[PROMPTS[0]]
    for at in range(1, 10_000, 997):
        engine = SemShareEngine.from_pretrained("unused", EngineConfig(store=StoreConfig(directory=tmp_path)))
        engine._source = make_engine()._source
        hit = interrupted(engine._load, at)
        assert engine.generate(PROMPTS[0], max_new_tokens=2).token_ids == wanted
        engine.store.check()
        engine.close()
        if not hit:
            break


def test_others_get_their_answers_when_one_is_interrupted(make_engine: EngineMaker) -> None:
    wanted, engine = answers_of(make_engine, max_new_tokens=6), make_engine()
    engine.generate(PROMPTS[0], max_new_tokens=1)
    with ThreadPoolExecutor(3) as pool:
        at, hit = 0, True
        while hit:
            others = [pool.submit(engine.generate, prompt, max_new_tokens=6) for prompt in PROMPTS[:3]]
            at += 13
            hit = interrupted(lambda: engine.generate(PROMPTS[3], max_new_tokens=6), at)
            assert [other.result(PATIENCE_S).token_ids for other in others] == [wanted[p] for p in PROMPTS[:3]]
            engine.store.check()


@contextmanager
def most_rows() -> Iterator[list[int]]:
    """How many calls had KV to decode with at the same time, each time that one more came."""
    found: list[int] = []
    join = SharedDecoding.join

    def joined(together: SharedDecoding):
        row = join(together)
        found.append(len(together._rows))
        return row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedDecoding, "join", joined)
        yield found


class Gate:
    """Prefills that wait until they are let through; ``entered`` are the lengths of their prompts."""

    def __init__(self, engine: SemShareEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        self.entered: list[int] = []
        adapter = engine._load().adapter
        prefill = adapter.prefill

        def gated(token_ids: Any, *rest: Any) -> Any:
            self.entered.append(len(token_ids))
            self.reached.set()
            assert self.opened.wait(PATIENCE_S)
            return prefill(token_ids, *rest)

        monkeypatch.setattr(adapter, "prefill", gated)


def bounded(llama: Any, tokenizer: Any, **settings: Any) -> SemShareEngine:
    """Calls decode each by itself, as the probe of batches would enter a gate as well."""
    return SemShareEngine(llama, tokenizer, EngineConfig(**{"max_batch_size": 1, **settings}))


async def test_calls_beyond_the_bound_wait_in_line_without_kv_or_threads(
    llama, tokenizer, make_engine: EngineMaker, monkeypatch
) -> None:
    wanted, engine = answers_of(make_engine, max_new_tokens=4), bounded(llama, tokenizer, max_calls=2)
    gate, threads = Gate(engine, monkeypatch), threading.active_count()
    with most_rows() as rows:
        tasks = [asyncio.create_task(engine.agenerate(p, max_new_tokens=4)) for p in PROMPTS * 5]
        await asyncio.to_thread(gate.reached.wait, PATIENCE_S)
        assert threading.active_count() <= threads + 3, "two for calls, and one of the loop's own"
        assert len(gate.entered) == 1 and not rows
        gate.opened.set()
        found = [generation.token_ids for generation in await asyncio.gather(*tasks)]
    assert found == [wanted[prompt] for prompt in PROMPTS * 5]
    assert len(rows) == 60 and max(rows) <= 2


async def test_who_left_the_line_is_gone_and_computes_nothing(llama, tokenizer, monkeypatch) -> None:
    engine = bounded(llama, tokenizer, max_calls=2)
    gate = Gate(engine, monkeypatch)
    first = asyncio.create_task(engine.agenerate("Who is it?", max_new_tokens=2))
    await asyncio.to_thread(gate.reached.wait, PATIENCE_S)
    tasks = [asyncio.create_task(engine.agenerate(prompt, max_new_tokens=2)) for prompt in PROMPTS]
    streams = [engine.stream(prompt, max_new_tokens=2).run_ahead() for prompt in PROMPTS]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    for stream in streams:
        stream.close()
    assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*tasks, return_exceptions=True))
    last = asyncio.create_task(engine.agenerate("When?", max_new_tokens=2))
    await asyncio.sleep(0)
    gate.opened.set()
    await asyncio.gather(first, last)
    assert len(gate.entered) == engine.stats()["requests"] == 2
    assert not engine._scheduler._line and not engine._scheduler._begun


async def test_first_come_first_served(llama, tokenizer, monkeypatch) -> None:
    engine = bounded(llama, tokenizer, max_calls=2, max_batch_size=1, reuse=ReuseConfig(mode="off"))
    gate = Gate(engine, monkeypatch)
    tasks = []
    for length in (5, 1, 9, 3, 7):
        tasks.append(asyncio.create_task(engine.agenerate("x " * length + str(length), max_new_tokens=3)))
        await asyncio.sleep(0)
    gate.opened.set()
    lengths = [generation.report.prompt_tokens for generation in await asyncio.gather(*tasks)]
    assert gate.entered == lengths


def test_streams_that_nobody_reads_hold_up_nobody(llama, tokenizer, make_engine: EngineMaker) -> None:
    """Not even the thread that should read them, as it waits for another one."""
    options = {**LONG, "max_new_tokens": 20}
    wanted, engine = answers_of(make_engine, **options), bounded(llama, tokenizer, max_calls=2)
    found: dict[str, list[int]] = {}

    def read() -> None:
        streams = {prompt: engine.stream(prompt, **options) for prompt in PROMPTS}
        for stream in streams.values():
            next(stream)
        for prompt, stream in streams.items():
            *_, last = stream
            assert last.generation is not None
            found[prompt] = last.generation.token_ids

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert found == wanted


def test_a_stream_computes_no_more_than_is_read_while_nobody_waits(make_engine: EngineMaker) -> None:
    engine = make_engine()
    stream = engine.stream(PROMPTS[0], **LONG)
    for _ in range(3):
        next(stream)
    other = engine.generate(PROMPTS[1], max_new_tokens=2)
    before = engine.stats()["output_tokens"]
    stream.close()
    assert engine.stats()["output_tokens"] - before < 20 < LONG["max_new_tokens"]
    assert other.report.output_tokens <= 2


def test_calls_made_by_those_who_are_told_of_calls_wait_for_none(llama, tokenizer) -> None:
    engine, told = bounded(llama, tokenizer, max_calls=1), []

    def ask_again(report: Any) -> None:
        told.append(report)
        if len(told) < 3:
            engine.generate(PROMPTS[len(told)], max_new_tokens=2)
            engine.stats()

    engine.observe(ask_again)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(engine.generate, PROMPTS[0], max_new_tokens=2).result(PATIENCE_S)
    assert len(told) == 3


def test_the_bound_is_checked() -> None:
    with pytest.raises(ValueError, match="max_calls is 0; accepted is None or 1 or more calls"):
        EngineConfig(max_calls=0)
    assert EngineConfig(max_batch_size=12).calls_in_flight == 12


def computing(engine: SemShareEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The threads in which each prefill and decode step is computed from now on."""
    found: list[int] = []
    adapter = engine._load().adapter
    for name in ("prefill", "decode_step"):
        compute = getattr(adapter, name)

        def noted(*arguments: Any, compute: Callable[..., Any] = compute) -> Any:
            found.append(threading.get_ident())
            return compute(*arguments)

        monkeypatch.setattr(adapter, name, noted)
    return found


def wait_for_end_of(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads)


def test_one_thread_computes_call_after_call(make_engine: EngineMaker, monkeypatch) -> None:
    """What libraries keep for a thread, such as plans and teams, takes long to make anew."""
    engine = make_engine()
    found = computing(engine, monkeypatch)
    for prompt in PROMPTS[:4]:
        engine.generate(prompt, max_new_tokens=3)
        others = [t for t in engine._scheduler._threads.copy() if t.ident != found[0]]
        wait_for_end_of(others)  # which leave as they are idle
        assert found[0] in {thread.ident for thread in engine._scheduler._threads}
    assert set(found) == {found[0]}


def test_no_thread_waits_for_calls_of_an_engine_that_is_gone(make_engine: EngineMaker, monkeypatch) -> None:
    monkeypatch.setattr(scheduler, "LINGER_S", float("inf"))
    with collecting_here_alone():
        engine = make_engine()
        engine.generate(PROMPTS[0], max_new_tokens=3)
        threads, known = list(engine._scheduler._threads), weakref.ref(engine)
        assert threads
        del engine
        gc.collect()
        assert known() is None
    wait_for_end_of(threads)


def test_a_call_ends_while_others_begin_to_wait_for_that() -> None:
    """Each of them is told, whenever it came."""
    call: Job[int] = Job((number for number in range(1)), bool, lambda item: None)
    heard: list[int] = []

    class Listener:
        def put(self, nothing: None) -> None:
            heard.append(len(heard))
            if len(heard) < 4:
                call.listeners.append(Listener())  # type: ignore[arg-type]

    call.listeners.append(Listener())  # type: ignore[arg-type]
    call.end()
    assert heard == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt])
def test_whatever_a_call_raises_when_it_is_left_ends_that_call_alone(kind: type[BaseException]) -> None:
    calls = scheduler.Scheduler(1)

    def raising() -> Generator[int, None, None]:
        try:
            yield 1
            yield 2
        except scheduler.JobLeft:
            raise kind from None

    stream = Stream(calls, raising, lambda item: True)
    assert next(stream) == 1
    stream.close()
    found = SimpleQueue[list[int]]()

    def go_on() -> None:
        calls.settle()
        found.put(list(Stream(calls, lambda: (n for n in range(3)), lambda item: True)))

    threading.Thread(target=go_on, daemon=True).start()
    assert found.get(timeout=PATIENCE_S) == [0, 1, 2]
    calls.dismiss()


def test_python_joins_threads_that_compute() -> None:
    found = SimpleQueue[bool]()
    start_thread(lambda: found.put(threading.current_thread().daemon))
    assert not found.get(timeout=60), "its work would be cut off at exit"


SCRIPT = """
import asyncio, sys, threading
from semsharekv_integrations import EngineConfig, SemShareEngine, StoreConfig
from semsharekv_integrations.concurrency import scheduler

scheduler.LINGER_S = float("inf")

engine = SemShareEngine.from_pretrained("semsharekv/reference", EngineConfig(store=StoreConfig(directory=sys.argv[1])))
engine.generate("x", max_new_tokens=1)
text, options = "News from Velmar. " * 60, {"max_new_tokens": 400, "temperature": 3.0}


async def leave() -> None:
    for call in (engine.agenerate(text, **options), engine.agenerate(text + "!", **options)):
        try:
            await asyncio.wait_for(call, 0.05)
        except TimeoutError:
            pass
    task = asyncio.create_task(engine.agenerate(text + "?", **options))
    async for chunk in engine.astream(text, **options):
        break


asyncio.run(leave())
stream = engine.stream("Who?", **options)
next(stream)
cycle = [stream]
cycle.append(cycle)
for number in range(3):
    threading.Thread(target=engine.generate, args=[text + str(number)], kwargs=options, daemon=True).start()
joined = lambda: print("answered", engine.generate("When?", max_new_tokens=5).report.output_tokens)
threading.Thread(target=joined).start()
print("end of script")
"""


def test_a_script_ends_in_peace_beside_calls_in_flight(tmp_path: Path) -> None:
    """Calls that nobody reads any more are ended; one in a thread that Python joins is answered."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=5 * PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "end of script" and "answered" in done.stdout
    for trouble in ("Traceback", "Exception", "Fatal", "terminate"):
        assert trouble not in done.stderr
    config = EngineConfig(store=StoreConfig(directory=tmp_path))
    engine = SemShareEngine.from_pretrained("semsharekv/reference", config)
    engine.generate("x", max_new_tokens=1)
    engine.store.check()
    stats = engine.stats()
    assert [stats[f"store_disk_{trouble}"] for trouble in ("damaged", "vanished", "orphans")] == [0, 0, 0]
    engine.close()
