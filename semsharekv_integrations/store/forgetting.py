"""Forgetting: finds the entries that hold a document, and keeps calls in progress from bringing it back.

It looks for a document's tokens, not only for its name. A call stores nothing if it holds what was forgotten
since it began, so that nothing comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from semsharekv_integrations.kv import UNPLACED, Reference, TokenIds
from semsharekv_integrations.store.namespace import Entry

SHORTEST_TOKENS = 8  # a shorter document may stand anywhere by chance: only its name counts
EDGE_TOKENS = 4  # at each end that may be tokenized otherwise, depending on what stands beside them

TextOf = Callable[[TokenIds], str]


def entries_with(
    document_id: str, entries: Sequence[Entry], tokens: Sequence[TokenIds], text_of: TextOf | None
) -> list[Entry]:
    """Return those of ``entries``, all of one namespace, that carry the document's name, or have its tokens.

    ``tokens`` are forms of its text, beside those that the entries with its name have. Without ``text_of``, an entry
    that tokenizes the document's ends otherwise is found by its name alone.
    """
    carrying = {entry.key for entry in entries if document_id in entry.reference.document_starts}
    forms = forms_of(document_id, entries, tokens)
    return [
        entry
        for entry in entries
        if entry.key in carrying or any(_has_form(entry.reference, ids, text_of) for ids in forms)
    ]


def forms_of(document_id: str, entries: Iterable[Entry], tokens: Iterable[TokenIds] = ()) -> list[TokenIds]:
    """Return a document's distinct forms: the tokens of its text, as prompts have it. Leaves out short ones.

    They are ``tokens``, and those at its places in ordinary entries that hold it whole.
    """
    found = list(tokens)
    for reference in (e.reference for e in entries if document_id in e.reference.document_starts):
        span = reference.spans[document_id]
        if document_id in reference.document_stops and span.start != UNPLACED and not reference.is_tainted:
            found.append(reference.token_ids[span.start : span.stop])
    return list({ids.tobytes(): ids for ids in found if len(ids) >= SHORTEST_TOKENS}.values())


def has_form(token_ids: TokenIds, form: TokenIds, text_of: TextOf | None) -> bool:
    """Return whether ``token_ids`` contain ``form``; with ``text_of``, also its text with other tokens at the ends."""
    edge = 0 if text_of is None else min(EDGE_TOKENS, len(form) // 4)
    inner, haystack, width = form[edge : len(form) - edge].tobytes(), token_ids.tobytes(), token_ids.itemsize
    at = haystack.find(inner)
    while at >= 0:
        start = at // width - edge
        if at % width == 0 and np.array_equal(token_ids[max(start, 0) : start + len(form)], form):
            return True
        if at % width == 0 and text_of is not None:
            there = token_ids[max(start - EDGE_TOKENS, 0) : start + len(form) + EDGE_TOKENS]
            if text_of(form).strip() in text_of(there):
                return True
        at = haystack.find(inner, at + 1)
    return False


def _has_form(reference: Reference, form: TokenIds, text_of: TextOf | None) -> bool:
    """Return whether a reference contains ``form``, as it was read or as it was asked; see ``has_form``."""
    said = [reference.token_ids, reference.asked_ids] if reference.substitutions else [reference.token_ids]
    return any(has_form(token_ids, form, text_of) for token_ids in said)


class Forgotten(NamedTuple):
    """What somebody asked to be forgotten: all, a namespace, a session of it, or a document of it. None means all."""

    namespace: str | None = None
    session: str | None = None
    document_id: str | None = None
    forms: Sequence[TokenIds] = ()  # the document's tokens, as far as they are known

    def covers(
        self, namespace: str, session: str | None, names: Collection[str], token_ids: TokenIds, text_of: TextOf
    ) -> bool:
        """Return whether a prompt of ``token_ids``, with documents of these ``names``, has what was forgotten."""
        if self.namespace not in (None, namespace) or self.session not in (None, session):
            return False
        if self.document_id is None or self.document_id in names:
            return True
        return any(has_form(token_ids, form, text_of) for form in self.forms)


class Since:
    """A moment. While something holds it, ``forgotten`` finds all that was forgotten after it."""

    _next: tuple[Forgotten, Since] | None = None  # what was forgotten next, and the moment behind it

    def forgotten(self) -> Iterator[Forgotten]:
        """Yield all that was forgotten after this moment, in order."""
        moment = self
        while moment._next is not None:
            forgotten, moment = moment._next
            yield forgotten


class UnderWay:
    """What was forgotten while calls were under way.

    ``begin`` takes no lock, so an interruption leaves none taken. Only one thread at a time may call ``tell``.
    """

    def __init__(self) -> None:
        self._now = Since()

    def begin(self) -> Since:
        """Return the present moment. A call keeps it, and asks it later what was forgotten since."""
        return self._now

    def tell(self, forgotten: Forgotten) -> None:
        """Note ``forgotten``: every moment that ``begin`` returned before yields it from now on."""
        later = Since()
        self._now._next = forgotten, later
        self._now = later
