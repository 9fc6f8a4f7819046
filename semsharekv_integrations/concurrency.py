"""Several calls at once: taking turns, threads for a batch, and a blocking iterator as an asynchronous one."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar, cast

T = TypeVar("T")
Item = TypeVar("Item")


class Turns:
    """Calls that run at the same time, one of which at a time has its turn."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._count = threading.Lock()
        self._num_running = 0

    @property
    def others_run(self) -> bool:
        """Whether one call is not the only one."""
        return self._num_running > 1

    @contextmanager
    def running(self) -> Iterator[None]:
        """A call, from its beginning to its end; or calls that are still to come."""
        with self._count:
            self._num_running += 1
        try:
            yield
        finally:
            with self._count:
                self._num_running -= 1

    @contextmanager
    def taken(self, waiting: AbstractContextManager[object] | None = None) -> Iterator[None]:
        """Wait for the turn, inside of ``waiting`` if it is not free, and have it inside."""
        if not self._turn.acquire(blocking=False):
            with waiting or nullcontext():
                self._turn.acquire()
        try:
            yield
        finally:
            self._turn.release()


def outcomes_of(call: Callable[[Item], T], items: Sequence[Item], max_threads: int) -> list[T | Exception]:
    """What ``call`` returns for each item, or raises, in order; each in a thread, so many at a time.

    An item whose call fails takes none of the others down.
    """
    with ThreadPoolExecutor(max_threads) as pool:
        futures = [pool.submit(contextvars.copy_context().run, call, item) for item in items]
        return _outcomes(futures)


def all_of_streams(streams: Iterable[Iterator[T]], max_threads: int) -> list[list[T] | Exception]:
    """All items of each stream, or what it raises, in order.

    A stream begins, up to its first item, when the one before has begun; the rest is taken in threads, so many at once.
    """
    room = threading.Semaphore(max_threads)

    def rest_of(first: list[T], stream: Iterator[T]) -> list[T]:
        try:
            return [*first, *stream]
        finally:
            room.release()

    def begun(pool: ThreadPoolExecutor, stream: Iterator[T]) -> Future[list[T]]:
        room.acquire()
        try:
            first = list(itertools.islice(stream, 1))
        except Exception as error:
            room.release()
            failed: Future[list[T]] = Future()
            failed.set_exception(error)
            return failed
        return pool.submit(contextvars.copy_context().run, rest_of, first, stream)

    with ThreadPoolExecutor(max_threads) as pool:
        futures = [begun(pool, stream) for stream in streams]
        return _outcomes(futures)


def _outcomes(futures: Iterable[Future[T]]) -> list[T | Exception]:
    """What each future comes to, in order; what is no ``Exception`` is raised."""
    found: list[T | Exception] = []
    for future in futures:
        error = future.exception()
        if error is not None and not isinstance(error, Exception):
            raise error
        found.append(future.result() if error is None else error)
    return found


class _End:
    """Marks the end of the items, with the error that ended them, if any."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def raising(outcomes: Sequence[T | BaseException]) -> list[T]:
    """The outcomes, if none of them is an error; else the first error is raised."""
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return cast(list[T], list(outcomes))


async def iterate_in_thread(items: Generator[T, None, None]) -> AsyncGenerator[T, None]:
    """Yield what ``items`` yields, without blocking the event loop.

    When the consumer stops early or its task is cancelled, ``items`` is closed at its next item, in its own thread.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[T | _End] = asyncio.Queue()
    stopped = threading.Event()

    def send(item: T | _End) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(queue.put_nowait, item)

    def produce() -> None:
        error: BaseException | None = None
        try:
            with contextlib.closing(items):
                for item in items:
                    if stopped.is_set():
                        break
                    send(item)
        except BaseException as raised:
            error = raised
        send(_End(error))

    threading.Thread(target=contextvars.copy_context().run, args=(produce,), daemon=True).start()
    try:
        while not isinstance(item := await queue.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stopped.set()
