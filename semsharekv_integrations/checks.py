"""Checks of settings: an error names the field, the value and what is accepted."""

from __future__ import annotations

from math import isfinite

MOST_SHOWN_CHARS = 400  # of a value in an error
IN_UTF8 = " of valid Unicode, without lone surrogates"


def require(ok: bool, name: str, value: object, accepted: str) -> None:
    """Raise ``ValueError`` with field, value and what is accepted, unless ``ok``."""
    if not ok:
        raise ValueError(f"{name} is {shown(value)}; accepted is {accepted}")


def shown(value: object) -> str:
    """``value`` as an error names it: its beginning and its end where it is long."""
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


def is_whole(value: object, least: int) -> bool:
    """Whether ``value`` is an integer, and at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> bool:
    """Whether ``value`` is an integer or a float, and neither infinite nor NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def is_utf8(text: str) -> bool:
    """Whether ``text`` can be written as UTF-8: it has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_share(value: object) -> bool:
    """Whether ``value`` is a number from 0 to 1."""
    return is_number(value) and 0 <= value <= 1  # type: ignore[operator]
