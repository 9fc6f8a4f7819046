"""The KV of a node in a file of a directory: described, read to where it goes, or mapped."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from semsharekv_integrations.errors import StoreFileError
from semsharekv_integrations.store.codec import PackedKV, raise_memory_errors
from semsharekv_integrations.store.files import STATE_MARK, KVFiles
from semsharekv_integrations.store.homes import Homes
from semsharekv_integrations.store.radix import FileRange
from semsharekv_integrations.store.rooms import Landing


class PlacedKV(NamedTuple):
    """So many tokens of a file of ``files``, for a model that takes ``dtype`` at ``homes``."""

    files: KVFiles
    place: FileRange
    num_tokens: int
    dtype: torch.dtype
    homes: Homes

    def describe(self) -> PackedKV:
        """Return the KV without its bytes. Raises as ``KVFiles.describe``, also for a short file."""
        whole, first, stop = self._find()
        return whole.view_part(first, stop)

    def load(self, homes: Homes) -> PackedKV:
        """Return the KV, read from its file to ``homes``; raises as ``describe``, or ``OUT_OF_MEMORY``."""
        whole, first, stop = self._find()
        is_part = (first, stop) != (0, whole.num_tokens)
        cut = {name: (first, stop) for name in whole.tensors if is_part and STATE_MARK not in name}
        with raise_memory_errors():
            forms = {name: form[:, :, first:stop] if name in cut else form for name, form in whole.tensors.items()}
            landing = Landing(forms, homes, pinned=whole.pins)
            loaded = self.files.load(self.place.file, landing.get, cut)
            tensors = {name: landing.move(name, tensor) for name, tensor in loaded}
        packed = replace(whole, tensors=tensors)
        return packed.keep_states(first, stop) if is_part else packed

    def read(self) -> PackedKV:
        """Return the KV, mapped from its file. Raises as ``describe``."""
        whole = PackedKV(self.files.read(self.place.file), self.dtype, self.homes)
        return whole.view_part(*self._require_range(whole))

    def _find(self) -> tuple[PackedKV, int, int]:
        """Return the KV of the whole file, without bytes, and which tokens of it are meant."""
        whole = PackedKV(self.files.describe(self.place.file), self.dtype, self.homes)
        return whole, *self._require_range(whole)

    def _require_range(self, whole: PackedKV) -> tuple[int, int]:
        """Return which tokens of the file are meant. Raises ``StoreFileError`` if it has too few."""
        file, first = self.place
        stop = first + self.num_tokens
        if whole.num_tokens < stop:
            raise StoreFileError(f"{file} has {whole.num_tokens} tokens, not {stop}")
        return first, stop
