"""The chat page's door: which paths are the page's, and whose visitor a request is. A key lets one in, as for the API.

A visitor's browser keeps a random token, not the key. Knows nothing about what the page shows.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from semsharekv_integrations.serving.hosting import Host
from semsharekv_integrations.serving.problems import ServingError, answer_error

TENANT = "semsharekv.tenant"  # in the scope of a request that was let in
COOKIE = "semsharekv-visit"
LIFETIME_S = 7 * 24 * 3600
_MOST_VISITS, _MOST_FORM_BYTES = 10_000, 4096
_OPEN = ("/assets/", "/static/", "/svelte/", "/theme.css", "/favicon.ico", "/gradio_api/theme.css")
_CLOSED = (
    "/config",
    "/gradio_api/queue/join",
    "/gradio_api/queue/data",
    "/gradio_api/heartbeat/",
)
_KEPT_OPEN = "/gradio_api/heartbeat/"
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = {
    b"content-security-policy": _POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"same-origin",
}


class Visits:
    """Who was let in: tenants by the digest of a random token, for a week, the latest ones."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[bytes, tuple[str, float]] = OrderedDict()

    def begin(self, tenant: str) -> str:
        """Return a new token for a visitor of this tenant."""
        token = secrets.token_urlsafe(32)
        self._tenants[_digest(token)] = tenant, time.monotonic() + LIFETIME_S
        while len(self._tenants) > _MOST_VISITS:
            self._tenants.popitem(last=False)
        return token

    def find_tenant(self, token: str) -> str | None:
        """Return the tenant that a token was given for, or None."""
        tenant, end = self._tenants.get(_digest(token), (None, 0.0))
        return tenant if time.monotonic() < end else None

    def end(self, token: str) -> None:
        """Let nobody in by this token any more."""
        self._tenants.pop(_digest(token), None)


class Entrance:
    """Lets visitors of known tenants on to the page, and asks others for a key. Other paths are not found."""

    def __init__(self, page: ASGIApp, host: Host, style: str) -> None:
        self._page = page
        self._config = host.config
        self._ending = host.ending
        self._style = style
        self._visits = Visits()
        self._sessions: OrderedDict[str, str] = OrderedDict()  # tenants by the session of a page that is open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on with its tenant."""
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        path = scope["path"]

        async def guard(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                kept = [pair for pair in message["headers"] if pair[0].lower() not in _HEADERS]
                message = {**message, "headers": [*kept, *_HEADERS.items()]}
            await send(message)

        if path in ("/login", "/logout") and self._config.api_keys:
            response = await (self._let_in(request) if path == "/login" else self._let_out(request))
            await response(scope, receive, guard)
        elif path == "/manifest.json":
            await JSONResponse({"name": "semsharekv", "start_url": "/"})(scope, receive, guard)
        elif path.startswith(_OPEN):
            await self._page(scope, receive, guard)
        elif path == "/" or path.startswith(_CLOSED):
            tenant = self._find_tenant(request)
            if tenant is not None and not self._owns_session(request, tenant):
                await answer_error(ServingError(404, "not_found", "Not Found"))(scope, receive, guard)
            elif tenant is not None:
                await self._hand_on({**scope, TENANT: tenant}, receive, guard)
            elif path == "/":
                await RedirectResponse("/login", 303)(scope, receive, guard)
            else:
                await answer_error(ServingError(401, "invalid_api_key", "log in first"))(scope, receive, guard)
        else:
            await answer_error(ServingError(404, "not_found", "Not Found"))(scope, receive, send)

    def _owns_session(self, request: Request, tenant: str) -> bool:
        """Return whether a page's session, where the path or the query names one, is of this tenant."""
        path = request.url.path
        name = (
            path.removeprefix(_KEPT_OPEN) if path.startswith(_KEPT_OPEN) else request.query_params.get("session_hash")
        )
        if name is None:
            return True
        owner = self._sessions.setdefault(name, tenant)
        self._sessions.move_to_end(name)
        while len(self._sessions) > _MOST_VISITS:
            self._sessions.popitem(last=False)
        return owner == tenant

    async def _hand_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have the page answer. What a browser keeps open as long as it shows the page ends with the server."""
        if not scope["path"].startswith(_KEPT_OPEN):
            await self._page(scope, receive, send)
            return
        ending = asyncio.ensure_future(self._ending.wait())

        async def receive_or_end() -> MutableMapping[str, Any]:
            receiving = asyncio.ensure_future(receive())
            await asyncio.wait({receiving, ending}, return_when=asyncio.FIRST_COMPLETED)
            return receiving.result() if receiving.done() else {"type": "http.disconnect"}

        try:
            await self._page(scope, receive_or_end, send)
        finally:
            ending.cancel()
        await send({"type": "http.response.body", "body": b""})

    def _find_tenant(self, request: Request) -> str | None:
        """Return whose visitor a request is from: anybody's where no key is asked for."""
        if not self._config.api_keys:
            return self._config.find_tenant(None)
        return self._visits.find_tenant(request.cookies.get(COOKIE, ""))

    async def _let_in(self, request: Request) -> Response:
        """Show the form, or take a key from it."""
        if request.method != "POST":
            return self._show_form()
        form = bytearray()
        async for part in request.stream():
            form += part
            if len(form) > _MOST_FORM_BYTES:
                return self._show_form("That is no key.", 413)
        key = parse_qs(bytes(form).decode("utf-8", "replace")).get("key", [""])[0]
        tenant = self._config.find_tenant(key.strip())
        if tenant is None:
            return self._show_form("That key is not known here.", 401)
        response, secure = RedirectResponse("/", 303), request.url.scheme == "https"
        token = self._visits.begin(tenant)
        response.set_cookie(COOKIE, token, max_age=LIFETIME_S, httponly=True, samesite="strict", secure=secure)
        return response

    async def _let_out(self, request: Request) -> Response:
        self._visits.end(request.cookies.get(COOKIE, ""))
        response = RedirectResponse("/login", 303)
        response.delete_cookie(COOKIE)
        return response

    def _show_form(self, problem: str = "", status: int = 200) -> Response:
        said = f'<p role="alert">{problem}</p>' if problem else ""
        return HTMLResponse(
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>semsharekv</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{self._style}</style>'
            "<script>document.documentElement.classList.toggle('dark', (localStorage.getItem('semsharekv-theme') || "
            "(matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light')) === 'dark')</script>"
            '<body class="skv-entrance"><form method="post" action="/login"><h1>semsharekv</h1>'
            '<label>API key<input type="password" name="key" autocomplete="current-password" required autofocus>'
            f"</label>{said}<button>Open the chat</button></form></body></html>",
            status,
        )


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
