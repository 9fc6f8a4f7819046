"""What was arranged lately: so that prompts know these documents, and reports what their order spared."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from semsharekv_integrations.arranging.orders import find_all, strip_ends
from semsharekv_integrations.concurrency.threads import hold_at_forks
from semsharekv_integrations.kv import TokenIds

MOST_NOTED = 32  # of each namespace, the latest
MOST_NAMESPACES = 256  # the latest


class Arrangement(NamedTuple):
    """Documents by id as they were given, with their tokens [N], and their ids in the order that was returned."""

    documents: Mapping[str, str]
    forms: Mapping[str, TokenIds]
    order: tuple[str, ...]

    def find_given(self, token_ids: TokenIds) -> TokenIds | None:
        """Return a prompt's tokens [T] with its documents in the given order; None unless they stand as arranged."""
        blocks: dict[str, slice] = {}
        at = 0
        for key in self.order:
            edge, inner = strip_ends(self.forms[key])
            start = next((place - edge for place in find_all(token_ids, inner) if place >= at), None)
            if start is None:
                return None
            blocks[key] = slice(max(start, at), start + len(self.forms[key]))
            at = blocks[key].stop
        parts: list[TokenIds] = []
        at = 0
        for there, key in zip(blocks.values(), self.documents, strict=True):
            parts += [token_ids[at : there.start], token_ids[blocks[key]]]
            at = there.stop
        return np.concatenate([*parts, token_ids[at:]])


def find_given_order(token_ids: TokenIds, arrangements: Sequence[Arrangement]) -> TokenIds | None:
    """Return a prompt's tokens [T] in the given order of the first arrangement that it has; None if it has none.

    Also returns None if that arrangement is the given order itself.
    """
    for arrangement in arrangements:
        found = arrangement.find_given(token_ids)
        if found is not None:
            return None if list(arrangement.documents) == list(arrangement.order) else found
    return None


class Arrangements:
    """The latest arrangements by namespace; safe to use from several threads."""

    def __init__(self) -> None:
        self._noted: OrderedDict[str, OrderedDict[frozenset[str], Arrangement]] = OrderedDict()
        self._lock = hold_at_forks(threading.Lock())

    def note(self, namespace: str, arrangement: Arrangement) -> None:
        """Note what was arranged, in place of what was noted of the same texts; drop the oldest beyond the bounds."""
        with self._lock:
            noted = self._noted.setdefault(namespace, OrderedDict())
            self._noted.move_to_end(namespace)
            key = frozenset(arrangement.documents.values())
            noted.pop(key, None)
            noted[key] = arrangement
            while len(noted) > MOST_NOTED:
                noted.popitem(last=False)
            while len(self._noted) > MOST_NAMESPACES:
                self._noted.popitem(last=False)

    def list_latest(self, namespace: str) -> list[Arrangement]:
        """Return what was noted in ``namespace``, the latest first."""
        with self._lock:
            return list(self._noted.get(namespace, OrderedDict()).values())[::-1]

    def texts_of(self, namespace: str) -> dict[str, str]:
        """Return the texts that were arranged in ``namespace``, by id; of two with one id, the latest."""
        return {key: text for noted in self.list_latest(namespace)[::-1] for key, text in noted.documents.items()}

    def forget(self, namespace: str | None = None, document_id: str | None = None, text: str | None = None) -> None:
        """Drop what has the document of this id or text or, without an id, all: in one namespace, or in all (None)."""
        with self._lock:
            for name in [name for name in self._noted if namespace in (None, name)]:
                noted = self._noted[name]
                for key in [key for key, kept in noted.items() if _has(kept, document_id, text)]:
                    del noted[key]
                if not noted:
                    del self._noted[name]


def _has(arrangement: Arrangement, document_id: str | None, text: str | None) -> bool:
    if document_id is None:
        return True
    there = {one.strip() for one in arrangement.documents.values()}
    return document_id in arrangement.documents or (text is not None and text.strip() in there)
