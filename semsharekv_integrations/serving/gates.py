"""What a request passes before its body is read: its size, where it was sent to, and by whose page."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from semsharekv_integrations.errors import show_value
from semsharekv_integrations.serving.problems import ServingError, answer_error
from semsharekv_integrations.serving.settings import ServerConfig, strip_port

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Gate:
    """Refuses requests that are too large, or that a page of another origin made a reader's browser send.

    What fails behind it is answered here, too, as nothing else is sure to keep a prompt out of the logs.
    """

    def __init__(self, app: App, config: ServerConfig) -> None:
        self._app = app
        self._config = config

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Hand a request on, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # as GET, of which servers leave out the body
            scope = {**scope, "method": "GET"}
        has_begun = False

        async def note(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        problem: Exception | None = self._find_problem(Headers(scope=scope))
        if problem is None:
            try:
                await self._app(scope, self._count(receive), note)
            except Exception as error:  # else the server would log its message, which may hold a prompt
                problem = error
        if problem is not None and not has_begun:
            await answer_error(problem)(scope, receive, send)

    def _find_problem(self, headers: Headers) -> ServingError | None:
        host = headers.get("host", "")
        if not self._config.is_called_by(strip_port(host)):
            message = f"host is {show_value(host)}; accepted is a name that the server was given"
            return ServingError(403, "wrong_host", message)
        origin = headers.get("origin")
        known = (None, f"http://{host}", f"https://{host}", *self._config.cors_origins)
        if origin not in known:
            message = f"origin is {show_value(origin)}; accepted is none, the server's own, or one it was started with"
            return ServingError(403, "wrong_origin", message)
        length = headers.get("content-length", "")
        return None if self._fits(int(length) if length.isdecimal() else 0) else ServingError(413, *self._refusal)

    def _fits(self, num_bytes: int) -> bool:
        return num_bytes <= self._config.max_body_bytes

    @property
    def _refusal(self) -> tuple[str, str, str]:
        return "request_too_large", f"the body has more than {self._config.max_body_bytes} bytes", "body"

    def _count(self, receive: Receive) -> Receive:
        """Return a ``receive`` that raises if a body turns out to be too large, whatever its headers said."""
        num_bytes = 0

        async def count() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if not self._fits(num_bytes):
                raise HTTPException(413, self._refusal[1])  # the one error that FastAPI lets pass while it reads a body
            return message

        return count
