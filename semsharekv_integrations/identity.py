"""How an object that holds a model is copied, pickled, and told from others in caches of answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from semsharekv_integrations.model.loading import ModelSource, NamedModel
from semsharekv_integrations.runtime import Runtime


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


class Identified(Remade):
    """What has a model, or knows where to get it."""

    _source: ModelSource
    _runtime: Runtime | None

    def identity(self) -> str:
        """Equal for the same model in the same state, in every process; loads no weights.

        A model by name goes by how it is loaded and by its files, until it is changed in memory.
        """
        named = self._source.origin if isinstance(self._source, NamedModel) else ""
        changed = self._runtime.changed_identity() if self._runtime is not None else ""
        return f"{named} {changed}".strip()
