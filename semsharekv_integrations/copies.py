"""What copying and pickling come to for something that holds a model: it is shared, or made again.

Knows nothing about engines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self


class Remade:
    """Deep copies are the object itself. What is pickled is how it was made, which is set where that is known."""

    _made_by: Callable[[], Any] | None = None

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        if self._made_by is None:
            name = type(self).__name__
            raise TypeError(f"this {name} was given its model; accepted to pickle is one of {name}.from_pretrained")
        return self._made_by, ()
