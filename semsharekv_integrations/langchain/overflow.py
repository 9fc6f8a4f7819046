"""A prompt that is too long, as the error that LangChain's middleware and fallbacks look for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from langchain_core.exceptions import ContextOverflowError

from semsharekv_integrations.errors import ContextWindowError


class PromptOverflowError(ContextWindowError, ContextOverflowError):
    """A ``ContextWindowError`` that LangChain knows too."""


@contextmanager
def known_to_langchain() -> Iterator[None]:
    """Inside, a ``ContextWindowError`` becomes one that is LangChain's as well."""
    try:
        yield
    except ContextWindowError as error:
        raise PromptOverflowError(str(error)) from error
