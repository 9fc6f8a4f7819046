"""One call: what it yields, who reads it, and whether anybody still does."""

from __future__ import annotations

import contextvars
import threading
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import Callable, Generator
from contextvars import ContextVar
from queue import SimpleQueue
from time import perf_counter
from typing import Any, Generic, TypeVar

T = TypeVar("T")
GROUP: ContextVar[deque[Call[Any]] | None] = ContextVar("group", default=None)  # those that belong together
_CURRENT: ContextVar[Call[Any] | None] = ContextVar("call", default=None)


class CallLeft(BaseException):
    """Is raised where a call stands when nobody wants more of it; it may take care of what it has."""


class End:
    """Marks the end of what a call yields, with the error that ended it, if any."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class Call(Generic[T]):
    """One call.

    Args:
        items: what it yields, computed on the way.
        shows: which of them its reader is told of.
        deliver: takes these, and the ``End``, in the thread that computes.
        loop: in which it is read, if in one.

    Attributes:
        runs_ahead: whether it goes on unasked.
        is_driven: whether a thread is at work on it.
        waited_s: how long it stood in line.
    """

    def __init__(
        self,
        items: Generator[T, None, None],
        shows: Callable[[T], bool],
        deliver: Callable[[T | End], object],
        loop: AbstractEventLoop | None = None,
    ) -> None:
        self.items: Generator[T, None, None] | None = items
        self.shows = shows
        self.deliver = deliver
        self.loop = loop
        self.runs_ahead = self.is_driven = self.is_left = self.has_begun = self.has_ended = False
        self.is_wanted = True
        self.waited_s = 0.0
        self.asked_at = perf_counter()
        self.reader = threading.current_thread()
        self.listeners: deque[SimpleQueue[None]] = deque()
        self.context = contextvars.copy_context()
        self.context.run(_CURRENT.set, self)
        group = GROUP.get()
        if group is not None:
            group.append(self)

    @property
    def is_read(self) -> bool:
        """Whether somebody is there to read it.

        Once the main thread has ended, that is a thread which Python joins, or what runs at exit and waits for it. Not
        for the main thread to ask, where an interruption of ``is_alive`` would leave it taken for ended.
        """
        main = threading.main_thread()
        if main.is_alive():
            return True
        if self.reader is not main:
            return self.reader.is_alive() and not self.reader.daemon
        return self.is_wanted or self.runs_ahead if self.loop is None else self.loop.is_running()

    def end(self) -> None:
        """Let go of what it held, and tell those who wait for that."""
        self.items = None
        self.context = contextvars.Context()
        self.has_ended = True
        while self.listeners:  # more may come meanwhile
            self.listeners.popleft().put(None)


def current_call() -> Call[Any] | None:
    """The call that the running code belongs to."""
    return _CURRENT.get()


def check_wanted() -> None:
    """Raise ``CallLeft`` if nobody wants the call that the running code belongs to."""
    call = _CURRENT.get()
    if call is not None and call.is_left:
        raise CallLeft
