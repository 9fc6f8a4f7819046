"""One piece of work on a store: its lock is held, and what changes goes to the catalog in one transaction."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from semsharekv_integrations.store.entries import Entries


@contextmanager
def paused_collector() -> Iterator[None]:
    """Look for no garbage inside: where much is made that stays, looking through it takes as long as making it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Work:
    """Holds the store's lock; drops expired entries first, and commits all changes to the catalog at the end."""

    def __init__(self, entries: Entries) -> None:
        self._entries = entries
        self._lock = entries.lock

    def __enter__(self) -> None:
        """Take the lock and remove expired entries; release the lock if that fails."""
        self._lock.acquire()
        try:
            self._entries.expire()
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        """Commit changes to the catalog (a refusal is counted, not raised), then release the lock."""
        try:
            self._entries.tiers.disk.commit(retry=False)
        finally:
            self._lock.release()
