"""A server that ends as it should where browsers show the chat page, and tells when it can be called."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI


class Server(uvicorn.Server):
    """Serves an application of ``create_app`` until SIGTERM or Ctrl-C.

    Args:
        app: what is served.
        host: the address to listen at.
        port: to listen at; 0 for a free one.
        drain_s: seconds that answers get to end, at the end.
        on_start: called with the server's address once it can be called.
        options: more for ``uvicorn.Config``.
    """

    def __init__(
        self,
        app: FastAPI,
        host: str = "127.0.0.1",
        port: int = 0,
        drain_s: int | None = None,
        on_start: Callable[[str], object] = lambda _: None,
        **options: str,
    ) -> None:
        settings = {"host": host, "port": port, "access_log": False}  # paths hold the ids of documents
        super().__init__(uvicorn.Config(app, **settings, timeout_graceful_shutdown=drain_s, **options))  # type: ignore[arg-type]
        self._app = app
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and tell so."""
        await super().startup(sockets)
        if self.started:
            self._on_start(self.url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let answers end, but not what pages keep open; then end."""
        self._app.state.host.ending.set()
        await super().shutdown(sockets)

    @property
    def url(self) -> str:
        """Where the server can be called, from this machine."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        return f"http://{name}:{port}"
