"""The engine behind a server: its loading, and how many requests it takes on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any, TypeVar, cast

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from semsharekv_integrations.config import AuditConfig, ReuseConfig, StoreConfig
from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.request import GenerateOptions
from semsharekv_integrations.serving.problems import ServingError
from semsharekv_integrations.serving.schemas import ChatBody, CompletionBody
from semsharekv_integrations.serving.settings import ServerConfig
from semsharekv_integrations.text.prompt import Prompt

T = TypeVar("T")
_LEFT = ServingError(499, None, "the caller has left")  # which nobody reads


class Host:
    """One engine and the requests that it works on.

    Attributes:
        model: the name that it is called by.
        failure: why the model could not be loaded, or None.
        full_engine: what ``load_full_engine`` has made, or None.
        on_full_engine: called with it, once.
        ending: set when the server takes on no more, for what would go on as long as a visitor stays.
    """

    def __init__(self, engine: SemShareEngine, config: ServerConfig, on_failure: Callable[[], None]) -> None:
        self.engine = engine
        self.config = config
        self.model = config.model or engine.name
        self.failure: Exception | None = None
        self._on_failure = on_failure
        self.full_engine: SemShareEngine | None = None
        self.on_full_engine: Callable[[SemShareEngine], None] = lambda _: None
        self._making = threading.Lock()
        self.ending = asyncio.Event()
        self._taken = 0  # changed in the event loop alone

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Load the model in a thread of its own; on leaving, wait for that, and close the store."""
        loading = threading.Thread(target=self._load, daemon=True)
        loading.start()
        try:
            yield
        finally:
            await run_in_threadpool(loading.join)
            await run_in_threadpool(self.engine.close)

    def _load(self) -> None:
        try:
            _ = self.engine.model
        except Exception as error:
            self.failure = error
            self._on_failure()

    def require_loaded(self) -> None:
        """Raise ``ServingError`` unless the model is there."""
        if self.failure is not None:
            raise ServingError(500, "model_failed", f"{self.model} could not be loaded")
        if not self.engine.is_loaded:
            raise ServingError(503, "model_loading", f"{self.model} is being loaded; try again in a moment")

    def require_model(self, name: str) -> None:
        """Raise ``ServingError`` unless the model goes by this name, and is there."""
        if name != self.model:
            raise ServingError(404, "model_not_found", f"model is {name!r}; accepted is {self.model!r}", "model")
        self.require_loaded()

    def read_body(self, body: ChatBody | CompletionBody, tenant: str) -> tuple[Prompt, GenerateOptions]:
        """Return the prompt and the options that a body asks for. ``ServingError`` unless the model is there."""
        self.require_model(body.model)
        return cast(Any, body.prompt), body.make_options(tenant, self.most_tokens)

    def load_full_engine(self) -> SemShareEngine:
        """Return an engine over the same model that reuses nothing, made once: it tells what a full prefill takes."""
        with self._making:
            if self.full_engine is None:
                if self.engine.mode == "off":
                    self.full_engine = self.engine
                else:
                    plain = ReuseConfig(mode="off")
                    config = replace(self.engine.config, reuse=plain, store=StoreConfig(), audit=AuditConfig())
                    self.full_engine = SemShareEngine(self.engine.model, self.engine.tokenizer, config)
                    self.on_full_engine(self.full_engine)
            return self.full_engine

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of an answer; None if neither server nor model bounds it."""
        bounds = [bound for bound in (self.config.max_tokens, self.engine.context_window) if bound is not None]
        return min(bounds, default=None)

    @contextmanager
    def take_place(self) -> Iterator[None]:
        """Count a request until the block ends; raise ``ServingError`` if there are too many."""
        most = self.config.max_requests
        if self._taken >= most:
            raise ServingError(
                429, "queue_full", f"{most} requests are answered or wait already; try again in a moment"
            )
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1


async def wait_for(request: Request, work: Awaitable[T]) -> T:
    """Return what ``work`` gives. If the caller leaves first, cancel it, see it end, and raise ``ServingError``."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_wait_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _LEFT
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
