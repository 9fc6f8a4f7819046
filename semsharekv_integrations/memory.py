"""What is forgotten while calls are under way, so that none of them brings it back.

A call stores what it computed when it ends, and what was forgotten meanwhile may stand in that. Knows nothing about
how KV is stored.

What a finished prefill leaves for later: its exact part as a reference, the rest for its own session alone.

KV that was computed behind a borrowed token is approximate. It never becomes a reference, or the error would be handed
on as exact; the same session may continue from it, since its earlier answers rest on it anyway.

What calls leave behind: KV in the store, the words of their replies, and the texts of their documents.

Knows nothing about how KV is found or reused.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from semsharekv_integrations.concurrency.threads import hold_at_forks
from semsharekv_integrations.config import EngineConfig
from semsharekv_integrations.kv import UNPLACED, LayerKV, Reference, Rendered, Segment, Span, TokenIds, standing_within
from semsharekv_integrations.model.selective import Outcome
from semsharekv_integrations.report import Stopwatch
from semsharekv_integrations.request import Request, document_id
from semsharekv_integrations.reuse.matching import segments_of
from semsharekv_integrations.reuse.plan import ReusePlan, prefix_plan
from semsharekv_integrations.runtime import ModelParts
from semsharekv_integrations.store import KVStore
from semsharekv_integrations.store.records import reference_id
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


def references_of(
    token_ids: TokenIds,
    layers: tuple[LayerKV, ...],
    exact_tokens: int,
    segments: tuple[Segment, ...],
    namespace: str,
    documents: Mapping[str, Span],
    session: str | None = None,
    borrowed: Mapping[str, Span] | None = None,
) -> list[Reference]:
    """The references that may be stored, none to two.

    Args:
        token_ids: [S] of prompt and answer.
        layers: KV of the same tokens.
        exact_tokens: number of leading tokens whose KV is that of a full prefill.
        segments: of the prompt.
        namespace: who may read them.
        documents: the caller's, and where each stands. One that is not exact as a whole is not kept in part, where
            it could not be told from others that begin alike.
        session: whose conversation it is, or None.
        borrowed: the documents that KV was borrowed from, which the exact part keeps no word of either.
    """
    found = []
    exact = min(exact_tokens, len(token_ids))
    kept = tuple(segment for segment in segments if segment.stop <= exact)
    cut = [span.start for span in documents.values() if 0 <= span.start < exact < span.stop]
    whole = min([exact, *cut, *(span.start for span in (borrowed or {}).values())])
    if whole:
        parts = tuple(_first_tokens(layer, whole) for layer in layers)
        ids, own = token_ids[:whole], tuple(segment for segment in kept if segment.stop <= whole)
        exactly = Reference(reference_id(namespace, ids), namespace, ids, parts, segments=own, session=session)
        found.append(exactly.labelled(standing_within(documents, whole)))
    if session is not None and exact < len(token_ids):
        key = reference_id(namespace, token_ids)
        rest = Reference(key, namespace, token_ids, layers, segments=kept, exact_tokens=exact, session=session)
        found.append(rest.labelled({**(borrowed or {}), **documents}))
    return found


def _first_tokens(layer: LayerKV, num_tokens: int) -> LayerKV:
    """A copy of the first tokens' KV, so that it does not keep the rest in memory; the whole as it is."""
    if layer.keys.shape[2] == num_tokens:
        return layer
    return LayerKV(layer.keys[:, :, :num_tokens].clone(), layer.values[:, :, :num_tokens].clone())


MOST_KNOWN_TEXTS = 500  # of each namespace, the latest named


class KnownTexts:
    """The latest documents that were named in each namespace, so that prompts need not name them again."""

    def __init__(self) -> None:
        self._texts: dict[str, OrderedDict[str, str]] = {}
        self._lock = hold_at_forks(threading.Lock())

    def note(self, namespace: str, documents: Mapping[str, str]) -> None:
        """Texts by id; one that is known under the same id is replaced."""
        if not documents:
            return
        with self._lock:
            known = self._texts.setdefault(namespace, OrderedDict())
            for key, text in documents.items():
                if text.strip():
                    known[key] = text
                    known.move_to_end(key)
            while len(known) > MOST_KNOWN_TEXTS:
                known.popitem(last=False)

    def of(self, namespaces: Sequence[str]) -> dict[str, str]:
        """Texts by id; of two with one id, that of the first namespace."""
        with self._lock:
            return {key: text for name in reversed(namespaces) for key, text in self._texts.get(name, {}).items()}

    def keep_only(self, namespace: str, ids: Collection[str]) -> None:
        """Drop the documents of a namespace with other ids."""
        with self._lock:
            known = self._texts.get(namespace, OrderedDict())
            for key in [key for key in known if key not in ids]:
                del known[key]
            if not known:
                self._texts.pop(namespace, None)

    def forget(self, namespace: str | None = None, document_id: str | None = None) -> None:
        """Drop one document of a namespace, or all of it, or everything."""
        with self._lock:
            for name in [name for name in self._texts if namespace in (None, name)]:
                if document_id is None:
                    del self._texts[name]
                else:
                    self._texts[name].pop(document_id, None)


class Memory:
    """Puts what calls computed into the store.

    Args:
        config: of the engine.
        store: where KV goes.
    """

    def __init__(self, config: EngineConfig, store: KVStore) -> None:
        self.known = KnownTexts()
        self.under_way = UnderWay()
        self._lock = hold_at_forks(threading.Lock())  # so that nothing is kept while something is forgotten
        self._parts: ModelParts | None = None
        self._is_off = config.reuse.mode == "off"
        self._store = store

    def begin(self, parts: ModelParts) -> None:
        """The model is there."""
        self._parts = parts

    def recognized(self, request: Request) -> tuple[Request, dict[str, str]]:
        """The request, its documents under known ids where it gives none; and all that may stand in its prompt."""
        self.settle()
        known = self.known.of(self._store.readable(request.namespace))
        ids = {text.strip(): key for key, text in known.items()} if request.documents else {}
        nameless = {key: text.strip() for key, text in request.documents.items() if _is_nameless(key, text)}
        return request.renamed({key: ids[text] for key, text in nameless.items() if text in ids}), known

    def keep(
        self,
        parts: ModelParts,
        request: Request,
        rendered: Rendered,
        plan: ReusePlan,
        outcome: Outcome,
        since: Since,
        answered: Sequence[int] = (),
    ) -> bool:
        """Store the KV of a prompt and of what was ``answered``, as far as there is any; whether all of it is there.

        Nothing is stored of a call in which something stands that was forgotten ``since`` it began.
        """
        token_ids = np.concatenate([rendered.token_ids, np.array(answered, dtype=np.int64)])
        spans = request.document_spans(rendered, plan.prefix)
        borrowed = plan.document_spans()
        named = {key: text for key, text in request.documents.items() if not _is_nameless(key, text)}
        with self._lock:
            if self._is_forgotten(parts, request, token_ids, {*spans, *borrowed, *request.documents}, since):
                return False
            self.known.note(request.namespace, named)
            stored = self._put(parts, token_ids, rendered, outcome, request.namespace, spans, request.session, borrowed)
        self.settle(*([request.namespace] if named else []))
        return stored

    def warm(self, parts: ModelParts, request: Request, rendered: Rendered, **labels: Any) -> bool:
        """Compute and store the KV of one document, which is the whole prompt; whether it is there.

        What was stored of another text under the same id is dropped.

        Args:
            parts: of the engine.
            request: whose only document is its prompt.
            rendered: the same.
            labels: those of ``Reference``.
        """
        (key,) = request.documents
        former = self.known.of([request.namespace]).get(key)
        is_known = former == request.documents[key]
        with self._lock:
            texts = [] if former is None else [parts.renderer.tokens_of(former)]
            forms = [] if is_known else self._store.forms_of(key, request.namespace, texts)
            dropped = self._drop_other_versions(key, rendered, request.namespace, unplaced=not is_known)
            if dropped or not (is_known or former is None):
                self.under_way.tell(Forgotten(request.namespace, document_id=key, forms=forms))
        since = self.under_way.begin()
        outcome = parts.execute(prefix_plan(rendered.token_ids, None, parts.num_layers, None), Stopwatch())
        spans = request.document_spans(rendered, None)
        with self._lock:
            if self._is_forgotten(parts, request, rendered.token_ids, request.documents, since):
                return False
            self.known.note(request.namespace, request.documents)
            stored = self._put(parts, rendered.token_ids, rendered, outcome, request.namespace, spans, None, **labels)
        self.settle(request.namespace)
        return stored

    def forget(self, parts: ModelParts | None, document_id: str, namespace: str) -> int:
        """Drop every entry of ``namespace`` in which the document stands, and its text; how many entries.

        Raises:
            StoreWriteError: if some of it could not be removed from the disk.
        """
        if parts is None:  # nothing is stored before there is a model
            with self._lock:
                self.under_way.tell(Forgotten(namespace, document_id=document_id))
            return 0
        with self._lock:
            text = self.known.of([namespace]).get(document_id)
            tokens = [] if text is None else [parts.renderer.tokens_of(text)]
            text_of = parts.renderer.text_of
            forms = self._store.forms_of(document_id, namespace, tokens)
            self.under_way.tell(Forgotten(namespace, document_id=document_id, forms=forms))
            self.known.forget(namespace, document_id)
            dropped = self._store.forget(namespace, document_id=document_id, tokens=forms, text_of=text_of)
        self.settle()
        self._store.require_gone()
        return dropped

    def clear(self, namespace: str | None, session: str | None) -> int:
        """Drop the entries of one session or namespace, or everything; how many there were.

        Raises:
            StoreWriteError: if some of it could not be removed from the disk.
        """
        with self._lock:
            self.under_way.tell(Forgotten(namespace, session))
            if session is None:
                self.known.forget(namespace)
            dropped = self._store.clear() if namespace is None else self._store.forget(namespace, session=session)
        self.settle()
        self._store.require_gone()
        return dropped

    def settle(self, *namespaces: str) -> None:
        """Keep no text of documents whose KV is gone, of the namespaces named and of those that lost entries."""
        for name, references in self._store.left_since(*namespaces).items():
            named = {key for reference in references for key in reference.document_starts}
            unnamed = {key: text for key, text in self.known.of([name]).items() if key not in named}
            self.known.keep_only(name, named | {key for key, text in unnamed.items() if self._stands(text, references)})
            for index in self._parts.indexes() if self._parts is not None else ():
                index.keep_only(name, {reference.id for reference in references})

    def _is_forgotten(
        self, parts: ModelParts, request: Request, token_ids: TokenIds, names: Collection[str], since: Since
    ) -> bool:
        """Whether something of a call was forgotten since it began; asked with the lock held."""
        asked = (request.namespace, request.session, names, token_ids, parts.renderer.text_of)
        return any(forgotten.covers(*asked) for forgotten in since.forgotten())

    def _stands(self, text: str, references: Sequence[Reference]) -> bool:
        """Whether a document that no entry names stands in one of them all the same."""
        if self._parts is None or not references:
            return False
        renderer = self._parts.renderer
        form = renderer.tokens_of(text)
        return any(has_form(reference.token_ids, form, renderer.text_of) for reference in references)

    def _drop_other_versions(self, key: str, rendered: Rendered, namespace: str, *, unplaced: bool) -> int:
        """Drop the entries that have other tokens where the document stands, and those that do not say where.

        How many there were.
        """
        tokens = [rendered.token_ids[s.start : s.stop] for s in rendered.segments if s.document_id == key]

        def is_current(reference: Reference) -> bool:
            start = reference.document_starts.get(key, UNPLACED)
            if start == UNPLACED or not tokens:
                return not unplaced
            there = reference.token_ids[start : start + len(tokens[0])]
            inner = slice(1, len(there) - 1)  # tokens at its edges may be shared with what is beside it
            return bool(np.array_equal(there[inner], tokens[0][inner]))

        return self._store.forget(namespace, document_id=key, spare=is_current)

    def _put(
        self,
        parts: ModelParts,
        token_ids: TokenIds,
        rendered: Rendered,
        outcome: Outcome,
        namespace: str,
        spans: Mapping[str, Span],
        session: str | None,
        borrowed: Mapping[str, Span] | None = None,
        **labels: Any,
    ) -> bool:
        adapter = parts.adapter
        if self._is_off or not parts.hold():  # KV of two states would be good for neither
            return False
        layers = adapter.layers_of(outcome.prefill.cache)
        token_ids = token_ids[: layers[0].keys.shape[2]]
        if len(token_ids) > (adapter.stable_positions or len(token_ids)):
            return False
        segments = tuple(segments_of(rendered))
        found = references_of(token_ids, layers, outcome.exact_tokens, segments, namespace, spans, session, borrowed)
        stored = [parts.store.put(replace(reference, **labels)) for reference in found]
        return all(stored)


def _is_nameless(key: str, text: str) -> bool:
    """Whether a document was given without an id."""
    return key == document_id(text)
