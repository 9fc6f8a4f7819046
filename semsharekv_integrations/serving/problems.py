"""Errors as OpenAI's clients know them: a status, and a message with type, code and the field at fault."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from semsharekv_integrations.errors import ContextWindowError, PromptError, SemShareError, show_value
from semsharekv_integrations.logs import LOGGER

_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
_ENGINES_NAMES = {"json_schema": "response_format.json_schema.schema"}  # options that a body calls otherwise
RETRY_AFTER_S = 1  # what a client is told that comes too early


class ServingError(Exception):
    """A refusal, with all that the client is told. ``param`` is the field at fault."""

    def __init__(self, status: int, code: str | None, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


@contextmanager
def name_prompt(field: str) -> Iterator[None]:
    """Have the block's errors about a prompt name the field of the body that it stands in."""
    try:
        yield
    except (ContextWindowError, PromptError) as error:
        raise describe_error(error, field) from error


def describe_error(error: Exception, prompt: str = "messages") -> ServingError:
    """Return ``error`` as what a client is told of it. Only what the caller can mend has a message of its own.

    ``prompt`` is the field that errors about a prompt are told of.
    """
    if isinstance(error, ServingError):
        return error
    message = str(error)
    if isinstance(error, ContextWindowError):
        return ServingError(400, "context_length_exceeded", message, prompt)
    if isinstance(error, PromptError):
        return ServingError(400, None, message, prompt)
    if isinstance(error, ValueError):
        return _name_option(message)
    frames = "".join(traceback.format_tb(error.__traceback__))  # without the message, which may hold a prompt
    LOGGER.error("a request failed: %s\n%s", type(error).__name__, frames)
    if isinstance(error, MemoryError):
        return ServingError(503, "out_of_memory", "out of memory; try a shorter prompt, or later")
    if isinstance(error, SemShareError):
        return ServingError(500, None, message)
    return ServingError(500, None, f"{type(error).__name__} in the server; its log says where")


def _name_option(message: str) -> ServingError:
    """Return the refusal that a check of ours says. It names the option itself, here by the name that bodies have."""
    option, found, rest = message.partition(" is ")
    field = _ENGINES_NAMES.get(option, option)
    return ServingError(400, None, f"{field}{found}{rest}", field if found else None)


def make_body(error: ServingError) -> dict[str, Any]:
    """Return the error's body in OpenAI's form. It can be written in UTF-8, whatever the caller sent."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    param = None if error.param is None else _escape(error.param)
    return {"error": {"message": _escape(str(error)), "type": kind, "param": param, "code": error.code}}


def _escape(text: str) -> str:
    """Return ``text`` with lone surrogates written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def make_headers(status: int) -> Mapping[str, str]:
    """Return the headers that go with a status: how to sign in, or when to come again."""
    if status == 401:
        return {"WWW-Authenticate": "Bearer"}
    return {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else {}


def answer_error(error: Exception, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return the response for ``error``, with these headers and those that go with its status."""
    known = describe_error(error)
    return JSONResponse(make_body(known), known.status, headers={**(headers or {}), **make_headers(known.status)})


def add_handlers(app: FastAPI) -> None:
    """Have the application answer every error in OpenAI's form."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, HTTPException):
            return answer_error(_describe_status(error), error.headers)
        if isinstance(error, RequestValidationError):
            error = _name_field(error, request.headers.get("content-type"))
        return answer_error(error)

    for kind in (HTTPException, RequestValidationError, ServingError, SemShareError, ValueError):
        app.add_exception_handler(kind, answer)


def _describe_status(error: HTTPException) -> ServingError:
    """Return an error of the framework's as what a client is told. Its 400 is about bytes that it cannot read."""
    status = error.status_code
    said = "body is no JSON in UTF-8, or has too many levels or digits" if status == 400 else str(error.detail)
    return ServingError(status, _CODES.get(status), said, "body" if status in (400, 413) else None)


def _name_field(error: RequestValidationError, content_type: str | None) -> ServingError:
    """Return the first thing that is wrong with a request's body, with its field, value and what is accepted."""
    first = error.errors()[0]
    if isinstance(error.body, bytes):  # which FastAPI did not read
        message = f"content-type is {show_value(content_type)}; accepted is 'application/json'"
        return ServingError(415, "unsupported_media_type", message, "content-type")
    if first["type"] == "json_invalid":
        return ServingError(400, None, f"body is no JSON: {first.get('ctx', {}).get('error', 'it ends early')}", "body")
    if first["type"] == "value_error":  # of our own checks, which name the field themselves
        return _name_option(str(first["ctx"]["error"]))
    is_missing = first["type"] == "missing"
    field = _write_path([part for part in first["loc"] if part != "body"], error.body, is_missing=is_missing)
    if first["type"] == "extra_forbidden":
        return ServingError(400, "unknown_parameter", f"{field} is not supported here", field)
    if is_missing:
        return ServingError(400, "missing_required_parameter", f"{field} is missing", field)
    accepted = dict.fromkeys(each["msg"] for each in error.errors() if each["input"] is first["input"])  # of a union
    return ServingError(400, None, f"{field} is {show_value(first['input'])}: {'; '.join(accepted)}", field)


def _write_path(parts: Sequence[str | int], body: Any, *, is_missing: bool) -> str:
    """Return where in ``body`` the parts lead to, as ``messages[0].role``, or ``body`` itself.

    Pydantic puts in names of types where it tried several: nothing in the body goes by them. A last part that
    ``is_missing`` does not stand there either, but is meant.
    """
    path = ""
    for at, part in enumerate(parts):
        if isinstance(body, list) and isinstance(part, int) and part < len(body):
            path, body = f"{path}[{part}]", body[part]
        elif isinstance(body, dict) and (part in body or (is_missing and at == len(parts) - 1)):
            path, body = f"{path}.{part}" if path else str(part), body.get(part)
    return path or "body"
