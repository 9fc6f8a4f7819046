"""What is forgotten while calls are in progress, so that none of them brings it back.

A call stores what it computed when it ends, and what was forgotten meanwhile may stand in that. Knows nothing about
how KV is stored.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from semsharekv_integrations.kv import TokenIds
from semsharekv_integrations.store.standing import TextOf, has_form


class Forgotten(NamedTuple):
    """What somebody asked to be forgotten: all, a namespace, a session of it, or a document of it.

    Attributes:
        namespace: None for all of them.
        session: None for all of them.
        document_id: None for all that is there.
        forms: the document's tokens, as far as they are known.
    """

    namespace: str | None = None
    session: str | None = None
    document_id: str | None = None
    forms: Sequence[TokenIds] = ()

    def covers(
        self, namespace: str, session: str | None, names: Collection[str], token_ids: TokenIds, text_of: TextOf
    ) -> bool:
        """Whether a prompt of these ``token_ids``, with documents of these ``names``, has some of it."""
        if self.namespace not in (None, namespace) or self.session not in (None, session):
            return False
        if self.document_id is None or self.document_id in names:
            return True
        return any(has_form(token_ids, form, text_of) for form in self.forms)


class Since:
    """A moment, from which on all that is forgotten is found, for as long as something holds it."""

    _forgotten: Forgotten | None = None  # next, and the moment behind it
    _later: Since | None = None

    def forgotten(self) -> Iterator[Forgotten]:
        """What was forgotten since."""
        moment = self
        while moment._later is not None and moment._forgotten is not None:
            yield moment._forgotten
            moment = moment._later


class UnderWay:
    """What was forgotten while calls were under way.

    To begin a call takes no lock, so that an interruption leaves none taken; only one thread at a time may ``tell``.
    """

    def __init__(self) -> None:
        self._now = Since()

    def begin(self) -> Since:
        """The present moment, in which a call begins."""
        return self._now

    def tell(self, forgotten: Forgotten) -> None:
        """All calls that began must not bring this back."""
        now, later = self._now, Since()
        now._forgotten = forgotten
        now._later = later
        self._now = later
