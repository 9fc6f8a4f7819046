"""What a call yields, read by a thread or by a task; the call is driven elsewhere (``calls``)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

from semsharekv_integrations.call import Call, CallLeft, End
from semsharekv_integrations.calls import Calls

T = TypeVar("T")


class Stream(Generator[T, None, None]):
    """What a call yields, in the reader's own time; the call begins when its first item is asked for.

    To close it is to leave the call, and so is to drop it: neither waits for anything.

    Args:
        calls: that serve it.
        begin: makes the call's items.
        shows: which of them come out.
    """

    _call: Call[T] | None = None  # also of one whose making was interrupted

    def __init__(self, calls: Calls, begin: Callable[[], Generator[T, None, None]], shows: Callable[[T], bool]) -> None:
        self._calls = calls
        self._begin = begin
        self._shows = shows
        self._came: SimpleQueue[T | End] = SimpleQueue()
        self._own: Generator[T, None, None] | None = None  # what is computed here
        self._is_over = False

    def run_ahead(self) -> Stream[T]:
        """Begin the call, and have it go on whether or not it is read; this stream."""
        if not self._calls.serves_here:
            call = self._made()
            call.runs_ahead = True
            self._calls.ask(call)
        return self

    def send(self, value: None) -> T:
        """The next item."""
        if self._is_over:
            raise StopIteration
        try:
            item = self._taken()
        except BaseException:
            self.close()
            raise
        if not isinstance(item, End):
            return item
        self._is_over = True
        if item.error is None:
            raise StopIteration
        try:
            raise item.error
        finally:
            del item  # which holds the error, and that its traceback, and that this frame

    def throw(self, *error: Any) -> T:
        """Close it and raise the error."""
        self.close()
        return super().throw(*error)

    def close(self) -> None:
        """Leave the call."""
        self._is_over = True
        if self._call is not None:
            self._calls.leave(self._call)
        own, self._own = self._own, None
        if own is not None:
            with suppress(CallLeft, StopIteration):
                own.throw(CallLeft())

    def __del__(self) -> None:
        if self._call is not None:
            self._calls.leave(self._call)

    def _made(self) -> Call[T]:
        if self._call is None:
            self._call = Call(self._begin(), self._shows, self._came.put)
        return self._call

    def _taken(self) -> T | End:
        if self._own is not None or (self._call is None and self._calls.serves_here):
            self._own = self._own or self._begin()
            return next((item for item in self._own if self._shows(item)), End())
        call = self._made()
        if self._came.empty() and not call.has_ended:
            call.reader, call.is_wanted = threading.current_thread(), True
            self._calls.ask(call)
        return self._came.get()


async def read_async(
    calls: Calls, begin: Callable[[], Generator[T, None, None]], shows: Callable[[T], bool]
) -> AsyncGenerator[T, None]:
    """What a call yields, without blocking the event loop. It runs ahead; ended early, it leaves the call."""
    if calls.serves_here:
        for item in Stream(calls, begin, shows):
            yield item
        return
    loop, came = asyncio.get_running_loop(), asyncio.Queue[T | End]()
    stream = Stream(calls, begin, shows)  # which leaves the call when it is dropped, even after the loop is closed

    def deliver(item: T | End) -> None:
        try:
            loop.call_soon_threadsafe(came.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody listens any more
            call.is_left = True

    call = stream._call = Call(begin(), shows, deliver, loop)
    try:
        stream.run_ahead()
        while not isinstance(found := await came.get(), End):
            yield found
        if found.error is not None:
            raise found.error
    finally:
        stream.close()
