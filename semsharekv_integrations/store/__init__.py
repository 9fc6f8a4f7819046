"""Where KV is kept between calls."""

from semsharekv_integrations.store.kv_store import KVStore

__all__ = ["KVStore"]
