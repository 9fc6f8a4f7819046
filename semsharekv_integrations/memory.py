"""What calls leave behind: their KV in the store, and the texts of their documents.

KV that was computed behind a borrowed token is approximate. Other sessions never get it: they would take it for exact.
The same session may continue from it, because its earlier answers rest on it anyway. This module does not know how KV
is found or reused.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from semsharekv_integrations.arranging import Arrangement, Arrangements, ArrangeOptions, Text, find_order
from semsharekv_integrations.call import Call
from semsharekv_integrations.concurrency.threads import hold_at_forks
from semsharekv_integrations.config import EngineConfig
from semsharekv_integrations.errors import StoreWriteError
from semsharekv_integrations.kv import (
    UNPLACED,
    LayerKV,
    Reference,
    Rendered,
    Segment,
    Span,
    State,
    Substitution,
    TokenIds,
    invert,
    select_within,
)
from semsharekv_integrations.last_report import LastReport
from semsharekv_integrations.model.relief import DeviceMemoryError
from semsharekv_integrations.report import ReuseReport
from semsharekv_integrations.request import Request, make_document_id
from semsharekv_integrations.reuse.matching import list_segments
from semsharekv_integrations.reuse.plan import build_prefix_plan
from semsharekv_integrations.runtime import Runtime
from semsharekv_integrations.store import KVStore
from semsharekv_integrations.store.forgetting import Forgotten, UnderWay, has_form
from semsharekv_integrations.store.records import reference_id


def make_references(
    token_ids: TokenIds,
    layers: tuple[LayerKV, ...],
    exact_tokens: int,
    segments: tuple[Segment, ...],
    namespace: str,
    documents: Mapping[str, Span],
    session: str | None = None,
    borrowed: Mapping[str, Span] | None = None,
    substitutions: tuple[Substitution, ...] = (),
    checkpoints: Mapping[int, State] | None = None,
) -> list[Reference]:
    """Return the references to store, none to two: the exact part and, in a session, the whole if not all is exact.

    Args:
        token_ids: [S] of prompt and answer.
        layers: KV of the same tokens.
        exact_tokens: number of leading tokens whose KV is that of a full prefill.
        segments: of the prompt.
        namespace: who may read them.
        documents: the caller's, and where each stands. The exact part never ends inside of one: a piece would look
            like all others that begin alike.
        session: whose conversation it is, or None.
        borrowed: the documents that KV was borrowed from. The exact part ends before they begin.
        substitutions: turn ``token_ids`` into what was asked; none within the exact part.
        checkpoints: states by the number of tokens before them, of a model that goes on from these alone: the exact
            part ends at one. None for other models.
    """
    found = []
    exact = min(exact_tokens, len(token_ids))
    kept = tuple(segment for segment in segments if segment.stop <= exact)
    whole = min([exact, *(span.start for span in (borrowed or {}).values())])
    for span in sorted(documents.values(), key=lambda span: -span.start):  # documents may stand inside of each other
        whole = span.start if 0 <= span.start < whole < span.stop else whole
    if checkpoints is not None:
        inner = {at for at in checkpoints for span in documents.values() if span.start < at < span.stop}
        whole = max((at for at in checkpoints.keys() - inner if at <= whole), default=0)
    if whole:
        parts = tuple(LayerKV(*(tensor[:, :, :whole] for tensor in layer)) for layer in layers)
        ids, own = token_ids[:whole], tuple(segment for segment in kept if segment.stop <= whole)
        exactly = Reference(reference_id(namespace, ids), namespace, ids, parts, segments=own, session=session)
        states = {at: state for at, state in (checkpoints or {}).items() if at <= whole}
        found.append(replace(exactly, checkpoints=states).labelled(select_within(documents, whole)))
    if session is not None and exact < len(token_ids):
        key = reference_id(namespace, token_ids)
        rest = Reference(key, namespace, token_ids, layers, segments=kept, exact_tokens=exact, session=session)
        rest = replace(rest, substitutions=substitutions)
        found.append(rest.labelled({**(borrowed or {}), **documents}))
    return found


MOST_KNOWN_TEXTS = 500  # of each namespace, the latest named


class KnownTexts:
    """The texts of documents named latest in each namespace, so that prompts need not name them again."""

    def __init__(self) -> None:
        self._texts: dict[str, OrderedDict[str, str]] = {}
        self._lock = hold_at_forks(threading.Lock())

    def note(self, namespace: str, documents: Mapping[str, str]) -> None:
        """Note texts by id, replacing one with the same id. Skips blank ones; drops the oldest beyond the bound."""
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
        """Return the known texts of ``namespaces`` by id. If two have one id, the earlier namespace wins."""
        with self._lock:
            return {key: text for name in reversed(namespaces) for key, text in self._texts.get(name, {}).items()}

    def keep_only(self, namespace: str, ids: Collection[str]) -> None:
        """Drop the documents of ``namespace`` whose ids are not in ``ids``."""
        with self._lock:
            known = self._texts.get(namespace, OrderedDict())
            for key in [key for key in known if key not in ids]:
                del known[key]
            if not known:
                self._texts.pop(namespace, None)

    def forget(self, namespace: str | None = None, document_id: str | None = None) -> None:
        """Drop one document's text or, without an id, all texts: in one namespace or, without one, in all."""
        with self._lock:
            for name in [name for name in self._texts if namespace in (None, name)]:
                if document_id is None:
                    del self._texts[name]
                else:
                    self._texts[name].pop(document_id, None)


class Memory:
    """Puts what calls computed into the store, and forgets.

    Args:
        config: of the engine.
        store: where KV goes.
    """

    def __init__(self, config: EngineConfig, store: KVStore) -> None:
        self.known = KnownTexts()
        self.arranged = Arrangements()
        self.last_report = LastReport(config.store.directory, config.reuse)
        self.under_way = UnderWay()
        self._lock = hold_at_forks(threading.Lock())  # so that nothing is kept while something is forgotten
        self._runtime: Runtime | None = None
        self._is_off = config.reuse.mode == "off"
        self._store = store

    def begin(self, runtime: Runtime) -> None:
        """Use ``runtime``, now that the model is loaded, to tell which texts are still in the store."""
        self._runtime = runtime

    def resolve_documents(self, call: Call) -> dict[str, str]:
        """Set the call's ``arrangements``. Return the texts known to it by id, after dropping those that are gone.

        A document that the call gave without an id takes that of the same known text, if there is one.
        """
        with call.watch.phase("render"):
            self.settle()
            request = call.request
            known = self.known.of(self._store.list_readable(request.namespace))
            call.arrangements = self.arranged.list_latest(request.namespace)
            ids = {text.strip(): key for key, text in known.items()} if request.documents or call.arrangements else {}
            for key, text in (pair for noted in call.arrangements for pair in noted.documents.items()):
                if key not in known and text.strip() not in ids:
                    known[key], ids[text.strip()] = text, key
            unnamed = {key: text.strip() for key, text in request.documents.items() if _is_unnamed(key, text)}
            call.request = request.rename_documents({key: ids[text] for key, text in unnamed.items() if text in ids})
        return known

    def arrange(self, request: Request, runtime: Runtime, around: ArrangeOptions) -> list[str]:
        """Return the ids of the request's documents in the order that continues the longest stored prefix; note it.

        ``runtime`` is for the model's present state. Raises ``PromptError`` if ``before`` cannot be rendered.
        """
        keys, renderer = list(request.documents), runtime.renderer
        contents = [text.strip() for text in request.documents.values()]
        readable = runtime.store.list_readable(request.namespace)
        references = [found for name in readable for found in runtime.store.references(name)]
        before = runtime.render_before(request, contents[0]) if around.get("before") is not None else None
        texts = [Text(content, renderer.tokenize(content)) for content in contents]
        order = [keys[index] for index in find_order(texts, references, before, renderer.decode)]
        forms = {key: text.token_ids for key, text in zip(keys, texts, strict=True)}
        self.arranged.note(request.namespace, Arrangement(request.documents, forms, tuple(order)))
        return order

    def keep(self, call: Call, runtime: Runtime, *, writes: bool = True) -> bool:
        """Note the texts of named documents, and store the call's exact KV and, in a session, the approximate too.

        Not ``writes``: what finds room in memory is not written to the directory yet, but when the call is kept again.
        Return False if the store lacks some of it, or if, because part was forgotten meanwhile, nothing was kept.
        """
        documents = call.request.documents
        named = {key: text for key, text in documents.items() if not _is_unnamed(key, text)}
        return self._keep(call, runtime, named, writes=writes)

    def note_report(self, call: Call, runtime: Runtime, report: ReuseReport) -> None:
        """Write the report as the latest one, unless some of the call was forgotten meanwhile."""
        with self._lock:
            if not self._is_forgotten(call, runtime):
                self.last_report.write(report)

    def warm(self, call: Call, runtime: Runtime, **labels: Any) -> bool:
        """Compute and store the KV of one document, which is the whole prompt; return whether it is stored.

        First drop what the store has of another text under the same id.

        Args:
            call: rendered, with one document, its prompt.
            runtime: of the engine.
            labels: those of ``Reference``.
        """
        request, rendered = call.request, call.rendered
        (key,) = request.documents
        former = self.known.of([request.namespace]).get(key)
        is_known = former == request.documents[key]
        with self._store.between_writes(), self._lock:
            texts = [] if former is None else [runtime.renderer.tokenize(former)]
            forms = [] if is_known else self._store.find_forms(key, request.namespace, texts)
            dropped = self._drop_other_versions(key, rendered, request.namespace, unplaced=not is_known)
            if dropped or not (is_known or former is None):
                self.under_way.tell(Forgotten(request.namespace, document_id=key, forms=forms))
        call.since = self.under_way.begin()
        call.plan = build_prefix_plan(rendered.token_ids, None, runtime.num_layers, None)
        runtime.execute(call)
        return self._keep(call, runtime, request.documents, **labels)

    def forget(self, runtime: Runtime | None, document_id: str, namespace: str) -> int:
        """Drop the document's text and every entry of ``namespace`` that holds it; return how many entries.

        Raises:
            StoreWriteError: if some of it could not be removed from the disk.
        """
        if runtime is None:  # nothing is stored before there is a model
            with self._lock:
                self.under_way.tell(Forgotten(namespace, document_id=document_id))
            return 0
        renderer = runtime.renderer
        with self._store.between_writes(), self._lock:
            text = {**self.arranged.texts_of(namespace), **self.known.of([namespace])}.get(document_id)
            tokens = [] if text is None else [renderer.tokenize(text)]
            forms = self._store.find_forms(document_id, namespace, tokens)
            self.under_way.tell(Forgotten(namespace, document_id=document_id, forms=forms))
            self.known.forget(namespace, document_id)
            self.arranged.forget(namespace, document_id, text)
            dropped = self._store.forget(namespace, document_id=document_id, tokens=forms, text_of=renderer.decode)
        self.settle()
        self._require_gone()
        return dropped

    def clear(self, namespace: str | None, session: str | None) -> int:
        """Drop the entries of a session, or of a namespace or all with the texts known there; return how many entries.

        Raises:
            StoreWriteError: if some of it could not be removed from the disk.
        """
        with self._store.between_writes(), self._lock:
            self.under_way.tell(Forgotten(namespace, session))
            if session is None:
                self.known.forget(namespace)
                self.arranged.forget(namespace)
            dropped = self._store.clear() if namespace is None else self._store.forget(namespace, session=session)
        self.settle()
        self._require_gone()
        return dropped

    def _require_gone(self) -> None:
        """Delete the latest report too, which may name what is gone. Raises ``StoreWriteError`` if some is left."""
        is_removed = self.last_report.remove()
        self._store.require_gone()
        if not is_removed:
            raise StoreWriteError(f"{self.last_report.path} could not be removed; forget it again when it can be")

    def settle(self, *namespaces: str) -> None:
        """Drop texts and index entries whose KV is gone, in these ``namespaces`` and in those that lost entries."""
        for name, references in self._store.collect_left(*namespaces).items():
            named = {key for reference in references for key in reference.document_starts}
            unnamed = {key: text for key, text in self.known.of([name]).items() if key not in named}
            standing = {key for key, text in unnamed.items() if self._is_in_one_of(text, references)}
            self.known.keep_only(name, named | standing)
            if not references:
                self.arranged.forget(name)
            for index in self._runtime.indexes() if self._runtime is not None else ():
                index.keep_only(name, {reference.id for reference in references})

    def _keep(
        self, call: Call, runtime: Runtime, texts: Mapping[str, str], *, writes: bool = True, **labels: Any
    ) -> bool:
        """Store the call's KV, note ``texts`` by id, drop what is gone; False, doing nothing, if some was forgotten."""
        request = call.request
        with self._lock:
            if self._is_forgotten(call, runtime):
                return False
            self.known.note(request.namespace, texts)
            stored = self._put(call, runtime, labels)
        if writes:  # now that others may keep and forget again
            runtime.store.write_waiting()
        self.settle(*([request.namespace] if texts else []))
        return stored

    def _put(self, call: Call, runtime: Runtime, labels: Mapping[str, Any]) -> bool:
        """Store the call's references; return False if the store refused one or KV may not be stored at all."""
        if self._is_off or not runtime.is_unchanged():  # KV of two states would be good for neither
            return False
        try:
            found = runtime.relief.run("KV for the store", partial(self._make_references, call, runtime))
        except DeviceMemoryError:  # the answer is whole without
            return False
        stored = [
            runtime.store.put(replace(reference, **labels), frees=True, writes=False) for reference in found or ()
        ]
        return found is not None and all(stored)

    @staticmethod
    def _make_references(call: Call, runtime: Runtime) -> list[Reference] | None:
        """Return the references to store of a call; None if its KV is of no use to other calls."""
        adapter, request = runtime.adapter, call.request
        layers = adapter.read_layers(call.outcome.prefill.cache)
        token_ids = call.token_ids[: layers[0].keys.shape[2]]
        if len(token_ids) > (adapter.stable_positions or len(token_ids)):
            return None
        return make_references(
            token_ids,
            layers,
            call.outcome.exact_tokens,
            tuple(list_segments(call.read)),
            request.namespace,
            call.document_spans,
            request.session,
            call.plan.find_document_spans(),
            invert(call.rendered.token_ids, call.plan.substitutions),
            adapter.read_states(call.outcome.prefill.cache),
        )

    def _is_forgotten(self, call: Call, runtime: Runtime) -> bool:
        """Return whether something of the call was forgotten since it began. The caller holds the lock."""
        request = call.request
        names = {*call.document_spans, *call.plan.find_document_spans(), *request.documents}
        said = [call.token_ids, call.rendered.token_ids] if call.plan.substitutions else [call.token_ids]
        scope, decode = (request.namespace, request.session, names), runtime.renderer.decode
        return any(forgotten.covers(*scope, ids, decode) for forgotten in call.since.forgotten() for ids in said)

    def _is_in_one_of(self, text: str, references: Sequence[Reference]) -> bool:
        """Return whether the tokens of ``text`` stand in one of ``references``; False before the model is loaded."""
        if self._runtime is None or not references:
            return False
        renderer = self._runtime.renderer
        form = renderer.tokenize(text)
        return any(has_form(reference.token_ids, form, renderer.decode) for reference in references)

    def _drop_other_versions(self, key: str, rendered: Rendered, namespace: str, *, unplaced: bool) -> int:
        """Drop entries with other tokens for the document and, if ``unplaced``, without its place; return how many."""
        tokens = [rendered.token_ids[s.start : s.stop] for s in rendered.segments if s.document_id == key]

        def is_current(reference: Reference) -> bool:
            """Return whether it stays: it has the document's tokens, or no place for it and not ``unplaced``."""
            start = reference.document_starts.get(key, UNPLACED)
            if start == UNPLACED or not tokens:
                return not unplaced
            there = reference.token_ids[start : start + len(tokens[0])]
            inner = slice(1, len(there) - 1)  # tokens at its edges may be shared with what is beside it
            return bool(np.array_equal(there[inner], tokens[0][inner]))

        return self._store.forget(namespace, document_id=key, spare=is_current)


def _is_unnamed(key: str, text: str) -> bool:
    """Return whether a document was given without an id: its key is the digest of its text."""
    return key == make_document_id(text)
