"""Keeps KV between calls: entries by namespace, indexes that find them, and tiers that hold their bytes.

``KVStore`` is its public face. SQLite alone says what is on disk. Nothing here knows models, prompts or plans.
"""

from semsharekv_integrations.store.kv_store import KVStore

__all__ = ["KVStore"]
