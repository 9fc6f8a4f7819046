"""By what an engine's model is told from that of another, in caches of answers."""

from __future__ import annotations

from semsharekv_integrations.copies import Remade
from semsharekv_integrations.model.loading import ModelSource, NamedModel
from semsharekv_integrations.parts import ModelParts


class Identified(Remade):
    """What has a model, or knows where to get it."""

    _source: ModelSource
    _parts: ModelParts | None

    def identity(self) -> str:
        """Equal for the same model in the same state, in every process; loads no weights.

        A model by name goes by how it is loaded and by its files, until it is changed in memory.
        """
        named = self._source.origin if isinstance(self._source, NamedModel) else ""
        changed = self._parts.changed_identity() if self._parts is not None else ""
        return f"{named} {changed}".strip()
