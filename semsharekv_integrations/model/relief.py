"""Where memory runs out on the model's device: the store gives up its KV there, and the work is tried once more."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from transformers import DynamicCache

from semsharekv_integrations.errors import SemShareError
from semsharekv_integrations.logs import log_trouble
from semsharekv_integrations.model.adapter import ModelAdapter
from semsharekv_integrations.model.continuing import cut_back, has_kv_alone
from semsharekv_integrations.store import KVStore
from semsharekv_integrations.store.codec import is_out_of_memory

T = TypeVar("T")


class DeviceMemoryError(SemShareError, torch.OutOfMemoryError, MemoryError):
    """A call does not fit in the device's memory, not even after stored KV was given up there."""


class _Failure(NamedTuple):
    """What the first attempt said. Keeps no traceback, whose frames would keep tensors."""

    reason: str


class Relief:
    """Gives a failed piece of work the device's memory that stored KV takes, once.

    Args:
        adapter: of the model.
        store: which gives up its KV on the device, but for what is pinned. None: there is nothing to free.
    """

    def __init__(self, adapter: ModelAdapter, store: KVStore | None = None) -> None:
        self._adapter = adapter
        self._store = store

    def run(self, what: str, work: Callable[[], T], again: Callable[[], T] | None = None) -> T:
        """Return what ``work`` returns. If the device is full, free what can be freed, and return what ``again`` does.

        Args:
            what: is computed, in words, for the error.
            work: leaves nothing behind if it fails, unless there is ``again``.
            again: what to do the second time; None for ``work``.

        Raises:
            DeviceMemoryError: if the device is full then as well.
        """
        found = self._try(work)
        if not isinstance(found, _Failure):
            return found
        gone, left = self._store.free_device() if self._store is not None else (0, 0)
        log_trouble("out_of_memory", freed_bytes=gone)
        found = self._try(again or work)
        if not isinstance(found, _Failure):
            return found
        bound = _show(self._store.config.max_bytes) if self._store is not None else "0 MB"
        raise DeviceMemoryError(
            f"{what} does not fit in the memory of {self._adapter.device}: {found.reason}. The store gave up "
            f"{_show(gone)} of KV there before the second attempt, and {_show(left)} are left, which are pinned; set "
            f"StoreConfig.max_bytes (now {bound}) or EngineConfig.max_batch_size lower, or give a shorter prompt or "
            f"fewer max_new_tokens"
        )

    def decode_step(self, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """As ``ModelAdapter.decode_step``. A second attempt goes on from what ``cache`` held before the first."""
        adapter = self._adapter
        lengths = [layer.keys.shape[2] for layer in cache.layers] if cache.layers and has_kv_alone(cache) else None

        def again() -> torch.Tensor:
            """Cut back what some layers have added already; what cannot be cut is computed anew."""
            if lengths is None:
                return adapter.compute_anew(ids, cache)
            cut_back(cache, lengths)
            return adapter.decode_step(ids, cache)

        return self.run(f"a token behind {ids.shape[1]} others", lambda: adapter.decode_step(ids, cache), again)

    @staticmethod
    def _try(work: Callable[[], T]) -> T | _Failure:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return _Failure(str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__)


def _show(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
