"""Where KV is kept between calls."""

from semsharekv_integrations.store.memory import KVStore

__all__ = ["KVStore"]
