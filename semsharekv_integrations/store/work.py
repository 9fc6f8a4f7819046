"""One piece of work on a store: its lock is held, and what changes goes to the catalog in one transaction."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from semsharekv_integrations.store.entries import Entries


@contextmanager
def paused_collector() -> Iterator[None]:
    """Pause the garbage collector inside: of many objects that all stay, a search takes as long as making them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Work:
    """Holds the store's lock; drops expired entries first, and commits all changes to the catalog at the end.

    Not ``commits``: changes wait for the work that follows.
    """

    def __init__(self, entries: Entries, *, commits: bool = True) -> None:
        self._entries = entries
        self._commits = commits
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
            if self._commits:
                self._entries.tiers.disk.commit(retry=False)
        finally:
            self._lock.release()


def write_waiting(entries: Entries) -> None:
    """Write to the directory what is in memory alone and waits for that. Holds the store's lock before and after only.

    One thread at a time. What a file was written for may be gone or divided afterwards: then the file goes as well.
    """
    with entries.writing:
        while True:
            with Work(entries, commits=False):
                begun = entries.begin_writing()
            if begun is None:
                break
            entry, writing = begun
            writing.run()
            with Work(entries):
                stays = entries.by_key.get(entry.key) is entry  # not gone, and none like it came in its place
                if entries.tiers.disk.end(writing, entry.reference.namespace):
                    if stays and entry.node.on_disk is not None:
                        entries.absorb(entry)
                    else:
                        entries.note_written([writing.node])
                elif stays and len(writing.node.token_ids) == writing.num_tokens:  # else it was divided meanwhile
                    entries.waiting.pop(entry.key, None)
        with Work(entries):  # which commits what was left
            pass
