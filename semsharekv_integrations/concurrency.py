"""A blocking iterator as an asynchronous one: produced in a thread of its own, cancelled with its consumer."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import AsyncGenerator, Generator
from typing import TypeVar

T = TypeVar("T")


class _End:
    """Marks the end of the items, with the error that ended them, if any."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


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
