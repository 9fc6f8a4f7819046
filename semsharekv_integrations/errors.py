"""Errors that callers may want to catch, and checks of what callers give.

A bad argument is a ``ValueError`` that names the field, the value and what is accepted. No class here is one, because
LlamaIndex takes a ``ValueError`` for a badly written answer, and goes on without one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from os import PathLike
from typing import Any, cast

import numpy as np


class SemShareError(Exception):
    """Base of all errors of this package that are not plain bad arguments."""


class UnsupportedModelError(SemShareError):
    """The model does not allow what was asked of it; the message names what was found."""


class ModelLoadError(SemShareError):
    """The model or its tokenizer could not be loaded; the message names the path or hub id."""


class UnsupportedVersionError(SemShareError, ImportError):
    """A package that this one builds on has a version that was not tested; the message names those that were."""


class ContextWindowError(SemShareError):
    """The prompt leaves no room for a single new token in the model's context window."""


class PromptError(SemShareError):
    """The prompt cannot be rendered: it is empty, malformed, or refused by the chat template."""


class CallError(SemShareError):
    """LlamaIndex called with what the engine refuses as a bad argument; the message names field, value and bound."""


class StoreFileError(SemShareError):
    """A file of stored KV is missing, damaged, or belongs to another model or format version."""


class StoreLockedError(SemShareError):
    """The directory of stored KV is in use by another process; the message names the directory."""


class StoreWriteError(SemShareError):
    """Stored KV could not be written to disk; the message names the file and the reason."""


MOST_NESTED = 64  # mappings and sequences in each other, of what a caller gives
MOST_STOP_STRINGS, MOST_STOP_CHARS = 256, 1024  # all of them are looked for behind every token
MOST_SHOWN_CHARS = 400  # of a value in an error
IN_UTF8 = " without lone surrogates, which no text in Unicode has"


def require(ok: bool, name: str, value: object, accepted: str) -> None:
    """Raise ``ValueError`` that names the field, its value and what is accepted, unless ``ok``."""
    if not ok:
        raise ValueError(f"{name} is {show_value(value)}; accepted is {accepted}")


def check_fields(owner: object, prefix: str, accepted: str, fits: Callable[[Any], bool], *names: str) -> None:
    """Raise ``ValueError`` for the first attribute of ``owner`` among ``names`` for whose value ``fits`` is false."""
    for name in names:
        require(fits(getattr(owner, name)), f"{prefix}{name}", getattr(owner, name), accepted)


def show_value(value: object) -> str:
    """Return the ``repr`` of ``value`` for an error, without its middle if it is long; a stand-in if ``repr`` fails."""
    try:
        text = repr(value)
    except Exception as error:  # a value that cannot even be shown, such as a list within itself many times over
        return f"a {type(value).__name__} ({type(error).__name__} when shown)"
    text = text.encode("utf-8", "backslashreplace").decode()
    half = MOST_SHOWN_CHARS // 2
    return text if len(text) <= MOST_SHOWN_CHARS else f"{text[:half]}...{text[-half:]}"


def check_lifetime(name: str, ttl_s: object) -> None:
    """Raise ``ValueError`` unless ``ttl_s`` is None or a positive number of seconds."""
    accepted = ttl_s is None or (is_number(ttl_s) and ttl_s > 0)  # type: ignore[operator]
    require(accepted, name, ttl_s, "None or a positive number of seconds")


def check_stop(stop: object, or_else: str = "") -> tuple[str, ...]:
    """Return ``stop`` if it is a tuple of stop strings within the bounds, else raise ``ValueError``.

    ``or_else`` names in the error what else the caller accepts, as ``None, or ``.
    """
    require(isinstance(stop, tuple), "stop", stop, f"{or_else}a tuple of strings")
    strings = cast(tuple[str, ...], stop)
    few = len(strings) <= MOST_STOP_STRINGS
    require(few, "stop", f"{len(strings)} strings", f"{or_else}up to {MOST_STOP_STRINGS} strings")
    for string in strings:
        fits = isinstance(string, str) and 0 < len(string) <= MOST_STOP_CHARS and is_utf8(string)
        require(fits, "stop", string, f"{or_else}strings of 1 to {MOST_STOP_CHARS} characters{IN_UTF8}")
    return strings


def is_whole(value: object, least: int) -> bool:
    """Return whether ``value`` is an integer, no bool, and at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> bool:
    """Return whether ``value`` is a finite float, or an integer that a float can hold; a bool is neither."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**1000  # which a float can hold
    return isinstance(value, float) and isfinite(value)


def is_path(value: object) -> bool:
    """Return whether ``value`` is a non-empty string or path without a null character. Does not look for the file."""
    return isinstance(value, str | PathLike) and bool(str(value)) and "\0" not in str(value)


def count_nesting(value: object) -> int:
    """Return how deep mappings and sequences nest in ``value``: 0 if it is neither, at most ``MOST_NESTED`` + 1."""
    level: list[Any] = [value]
    depth = 0
    while depth <= MOST_NESTED:
        inner = [item for item in level if isinstance(item, Mapping) or _is_list(item)]
        if not inner:
            break
        depth += 1
        unlike = {id(item): item for item in inner}.values()  # else what stands in itself twice doubles each time
        level = [part for item in unlike for part in (item.values() if isinstance(item, Mapping) else item)]
    return depth


def take_plain_numbers(config: object) -> None:
    """Replace NumPy numbers in the fields of ``config``, even a frozen dataclass, by Python's own. Checks nothing."""
    for name, value in vars(config).items():
        if isinstance(value, np.generic):
            object.__setattr__(config, name, value.item())


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def is_utf8(text: str) -> bool:
    """Return whether ``text`` can be written as UTF-8: it has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_name(value: object) -> bool:
    """Return whether ``value`` is a string that is not empty and can be written as UTF-8."""
    return isinstance(value, str) and bool(value) and is_utf8(value)


def is_json(value: object) -> bool:
    """Return whether ``value`` can be written as JSON, which has no NaN or infinity, and that as UTF-8."""
    try:
        return is_utf8(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return False


def make_plain(text: str) -> str:
    """Return ``text`` as a plain ``str``; it may be of a subclass, such as a member of an enumeration."""
    return str.__str__(text)


def is_share(value: object) -> bool:
    """Return whether ``value`` is a number from 0 to 1."""
    return is_number(value) and 0 <= value <= 1  # type: ignore[operator]
