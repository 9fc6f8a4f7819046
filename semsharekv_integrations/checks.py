"""Checks of settings: an error names the field, the value and what is accepted."""

from __future__ import annotations

from math import isfinite


def require(ok: bool, name: str, value: object, accepted: str) -> None:
    """Raise ``ValueError`` with field, value and what is accepted, unless ``ok``."""
    if not ok:
        raise ValueError(f"{name} is {value!r}; accepted is {accepted}")


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


def is_share(value: object) -> bool:
    """Whether ``value`` is a number from 0 to 1."""
    return is_number(value) and 0 <= value <= 1  # type: ignore[operator]
