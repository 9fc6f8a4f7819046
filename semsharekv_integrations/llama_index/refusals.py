"""What the engine refuses, as errors that LlamaIndex hands on to its caller.

LlamaIndex's synthesizers, programs and extractors catch ``ValueError`` and ``TypeError``, which they take for an answer
that cannot be parsed, and go on as if the model had said nothing. Knows nothing about calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from semsharekv_integrations.errors import CallError


@contextmanager
def handed_on() -> Iterator[None]:
    """Inside, a ``ValueError`` or ``TypeError`` becomes a ``CallError`` with the same message."""
    try:
        yield
    except ValueError as error:
        raise CallError(str(error)) from error
    except TypeError as error:
        raise CallError(f"TypeError: {error}") from error
