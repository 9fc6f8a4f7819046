"""A server in a thread of its own, at a free port of this machine, and the clients that people use."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai

from semsharekv_integrations import SemShareEngine
from semsharekv_integrations.serving import ServerConfig, create_app
from semsharekv_integrations.serving.running import Server

KEYS = ("first-key", "second-key")


class RunningServer:
    """An application that is being served. Leaving the block ends it as SIGTERM would."""

    def __init__(self, engine: SemShareEngine, config: ServerConfig, **options: Any) -> None:
        self.engine = engine
        self.config = config
        self.app = create_app(engine, config, **options)
        self._server = Server(self.app, log_level="warning")
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> RunningServer:
        self._thread.start()
        wait_until(lambda: self._server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive(), "the server has ended"

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def num_taken(self) -> int:
        return self.app.state.host._taken

    def wait_until_loaded(self) -> RunningServer:
        wait_until(lambda: httpx.get(f"{self.url}/health").status_code == 200)
        return self

    def connect(self, key: str = KEYS[0], **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)

    def post(self, path: str, body: Any, key: str | None = KEYS[0], **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        headers |= options.pop("headers", {})
        return httpx.post(f"{self.url}{path}", json=body, headers=headers, timeout=60, **options)


def wait_until(is_so: Callable[[], bool], seconds: float = 60.0) -> None:
    """Return when ``is_so``; fail if that takes too long."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


Serve = Callable[..., RunningServer]
