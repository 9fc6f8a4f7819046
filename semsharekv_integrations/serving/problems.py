"""Errors as OpenAI's clients know them: a status, and a message with type, code and the field at fault."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from semsharekv_integrations.errors import ContextWindowError, PromptError, SemShareError, show_value
from semsharekv_integrations.logs import LOGGER

_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
RETRY_AFTER_S = 1  # what a client is told that comes too early


class ServingError(Exception):
    """A refusal, with all that the client is told. ``param`` is the field at fault."""

    def __init__(self, status: int, code: str | None, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def describe_error(error: Exception) -> ServingError:
    """Return ``error`` as what a client is told of it. Only what the caller can mend has a message of its own."""
    if isinstance(error, ServingError):
        return error
    message = str(error)
    if isinstance(error, ContextWindowError):
        return ServingError(400, "context_length_exceeded", message, "messages")
    if isinstance(error, PromptError):
        return ServingError(400, None, message, "messages")
    if isinstance(error, ValueError):
        return ServingError(400, None, message, message.partition(" is ")[0] or None)
    frames = "".join(traceback.format_tb(error.__traceback__))  # without the message, which may hold a prompt
    LOGGER.error("a request failed: %s\n%s", type(error).__name__, frames)
    if isinstance(error, MemoryError):
        return ServingError(503, "out_of_memory", "out of memory; try a shorter prompt, or later")
    if isinstance(error, SemShareError):
        return ServingError(500, None, message)
    return ServingError(500, None, f"{type(error).__name__} in the server; its log says where")


def make_body(error: ServingError) -> dict[str, Any]:
    """Return the error's body in OpenAI's form."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def make_headers(status: int) -> Mapping[str, str]:
    """Return the headers that go with a status: how to sign in, or when to come again."""
    if status == 401:
        return {"WWW-Authenticate": "Bearer"}
    return {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else {}


def answer_error(error: Exception) -> JSONResponse:
    """Return the response for ``error``."""
    known = describe_error(error)
    return JSONResponse(make_body(known), known.status, headers=dict(make_headers(known.status)))


def add_handlers(app: FastAPI) -> None:
    """Have the application answer every error in OpenAI's form."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        if isinstance(error, HTTPException):
            error = ServingError(error.status_code, _CODES.get(error.status_code), str(error.detail))
        elif isinstance(error, RequestValidationError):
            error = _name_field(error)
        return answer_error(error)

    for kind in (HTTPException, RequestValidationError, ServingError, SemShareError, ValueError):
        app.add_exception_handler(kind, answer)


def _name_field(error: RequestValidationError) -> ServingError:
    """Return the first thing that is wrong with a request's body, with its field, value and what is accepted."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    if first["type"] == "json_invalid":
        return ServingError(400, None, f"body is no JSON: {first.get('ctx', {}).get('error', 'it ends early')}", "body")
    if first["type"] == "value_error":  # of our own checks, which name the field themselves
        message = str(first["ctx"]["error"])
        return ServingError(400, None, message, message.partition(" is ")[0] or None)
    if first["type"] == "extra_forbidden":
        return ServingError(400, "unknown_parameter", f"{field} is not supported here", field)
    if first["type"] == "missing":
        return ServingError(400, "missing_required_parameter", f"{field} is missing", field)
    return ServingError(400, None, f"{field} is {show_value(first['input'])}: {first['msg']}", field)
