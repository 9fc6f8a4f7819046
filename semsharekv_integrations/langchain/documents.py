"""Where documents begin and end in a prompt, as far as LangChain's objects tell: texts by id for the engine.

The caller's ``documents`` tell a border, and so do a tool's artifact, a content block marked for caching, and a
``DocumentTracker``, which remembers the documents that pass through a chain. ``SemShareKVWarmer`` computes the KV of
documents before anybody asks. Nothing here knows models or tokens.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler, BaseCallbackManager
from langchain_core.documents import BaseDocumentTransformer, Document
from langchain_core.language_models import BaseLanguageModel
from langchain_core.messages import BaseMessage, ToolMessage

from semsharekv_integrations.concurrency.threads import hold_at_forks
from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.errors import check_lifetime, is_whole, require
from semsharekv_integrations.frameworks import collect_texts
from semsharekv_integrations.request import DocumentNotes, Documents, check_optional_name, make_document_id

MAX_DEPTH = 4  # of containers that are looked into for documents
Named = tuple[str, str]


def name_documents(documents: Any) -> Documents | None:
    """Return a sequence of texts or documents as texts by id, ``ValueError`` for a bad item; all else unchanged."""
    if isinstance(documents, str) or not isinstance(documents, Sequence):
        return documents
    return collect_texts(
        name_document(item) if isinstance(item, Document) else (make_document_id(item), item) for item in documents
    )


def name_document(document: Document) -> Named:
    """Return a document's id and text. The id is its ``id``, else its metadata's ``id``, else a digest of its text."""
    key = document.id or document.metadata.get("id")
    return str(key) if key else make_document_id(document.page_content), document.page_content


def find_documents(value: Any, depth: int = MAX_DEPTH) -> Iterator[Document]:
    """Yield ``value`` if it is a document, else those in lists, tuples, sets and mappings, ``depth`` levels deep."""
    if isinstance(value, Document):
        yield value
    elif depth and isinstance(value, (Mapping, list, tuple, set, frozenset)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from find_documents(item, depth - 1)


def find_in_artifacts(messages: Iterable[BaseMessage]) -> list[Named]:
    """Return id and text of each document in the artifacts of tool messages; blank ones are left out."""
    artifacts = [message.artifact for message in messages if isinstance(message, ToolMessage)]
    found = find_documents(artifacts, MAX_DEPTH + 1)
    return [name_document(document) for document in found if document.page_content.strip()]


def _find_marked_blocks(messages: Iterable[BaseMessage]) -> list[Named]:
    blocks = [block for message in messages if isinstance(message.content, list) for block in message.content]
    texts = [block.get("text") for block in blocks if isinstance(block, dict) and block.get("cache_control")]
    return [(make_document_id(text), text) for text in texts if isinstance(text, str)]


def collect_documents(
    given: Any, tracked: Mapping[str, str], messages: Sequence[BaseMessage], contents: Sequence[str]
) -> Documents | None:
    """Return the caller's documents and the tracked or found ones that stand in a text of ``contents``; None if none.

    Also returns blocks marked for caching, unless a document stands within. Leaves out a tracked or found document that
    stands within another; a digest replaces its id if the id is taken. Returns ``given`` in a wrong form unchanged.
    """
    documents = name_documents(given)
    if documents is not None and not isinstance(documents, Mapping):
        return documents
    texts: dict[str, str] = dict(documents or {})
    found = [*find_in_artifacts(messages), *((key, text) for text, key in tracked.items())]
    present = {text.strip(): key for key, text in found if any(text.strip() in content for content in contents)}
    wholes = [*map(str, texts.values()), *present]
    for text, key in present.items():
        if text and not any(text in other for other in wholes if other != text) and text not in texts.values():
            texts[make_document_id(text) if key in texts else key] = text
    for key, text in _find_marked_blocks(messages):
        if text.strip() and not any(str(other).strip() in text for other in texts.values()):
            texts[key] = text
    return DocumentNotes(texts, documents or ()) if texts else None


class DocumentTracker(BaseCallbackHandler):
    """A callback handler that tells the models of this package where documents begin and end.

    Give it to a chain, graph or agent by ``config={"callbacks": [DocumentTracker()]}``. It hears what retrievers return
    and what goes into and out of every step; a model called in the same run takes as documents what stands in its
    prompt word for word. Calls of other runs never see it. Where retriever and model are called apart, or each was
    given the tracker itself, what retrievers returned last is looked at; so use one tracker for each tenant there.

    Args:
        max_runs: how many runs are remembered at once, at least 1; the oldest are forgotten.
        max_documents: how many documents are remembered of each run, at least 1; the latest ones.
    """

    run_inline = True

    def __init__(self, max_runs: int = 256, max_documents: int = 1024) -> None:
        super().__init__()
        require(is_whole(max_runs, 1), "max_runs", max_runs, "1 or more")
        require(is_whole(max_documents, 1), "max_documents", max_documents, "1 or more")
        self._max_runs, self._max_documents = max_runs, max_documents
        self._texts: OrderedDict[UUID | None, dict[str, str]] = OrderedDict()  # of each tree: ids by text
        self._root_of: dict[UUID, UUID] = {}  # of runs that are under way
        self._lock = hold_at_forks(threading.Lock())

    def __deepcopy__(self, memo: object) -> DocumentTracker:
        return self  # what is copied with it hears of the same runs

    def documents_of(self, parent_run_id: UUID | None) -> list[Named]:
        """Return ids and texts known in this run's tree; for None or an unknown run, also what was retrieved alone."""
        with self._lock:
            alone: list[UUID | None] = [None] if parent_run_id is None else [parent_run_id, None]
            trees = [self._root_of[parent_run_id]] if parent_run_id in self._root_of else alone
            return [(key, text) for tree in trees for text, key in self._texts.get(tree, {}).items()]

    def on_chain_start(self, serialized: Any, inputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Place the step in its run, and remember the documents that go into it."""
        self._start(run_id, kwargs.get("parent_run_id"))
        self._remember(run_id, find_documents(inputs))

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Remember documents in the outputs, and in inputs that come only now, as in streams; then end the step."""
        self._remember(run_id, find_documents([kwargs.get("inputs"), outputs]))
        self._end(run_id)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """End the step; if it is the outermost of its run, forget the run and its documents."""
        self._end(run_id)

    on_retriever_error = on_tool_error = on_chain_error

    def on_retriever_start(self, serialized: Any, query: str, *, run_id: UUID, **kwargs: Any) -> None:
        """Place the retriever in its run."""
        self._start(run_id, kwargs.get("parent_run_id"))

    def on_retriever_end(self, documents: Sequence[Document], *, run_id: UUID, **kwargs: Any) -> None:
        """Remember what was found, also for calls outside any run if the retriever stood alone; then end the step."""
        self._remember(run_id, find_documents(documents), alone=kwargs.get("parent_run_id") not in self._root_of)
        self._end(run_id)

    def on_tool_start(self, serialized: Any, input_str: str, *, run_id: UUID, **kwargs: Any) -> None:
        """Place the tool in its run, for retrievers that it calls."""
        self._start(run_id, kwargs.get("parent_run_id"))

    def on_tool_end(self, output: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Remember the documents in what the tool returned, its artifact included; then end the step."""
        self._remember(run_id, find_documents([output, getattr(output, "artifact", None)]))
        self._end(run_id)

    def _start(self, run_id: UUID, parent_run_id: UUID | None) -> None:
        """Place a run in the tree of its parent, or in one of its own, and mark the tree used last."""
        with self._lock:
            root = run_id if parent_run_id is None else self._root_of.get(parent_run_id, parent_run_id)
            self._root_of[run_id] = root
            self._touch_tree(root)

    def _end(self, run_id: UUID) -> None:
        """Remove a run; if it is the root of its tree, forget the tree."""
        with self._lock:
            if self._root_of.pop(run_id, None) == run_id:
                self._forget(run_id)

    def _remember(self, run_id: UUID, documents: Iterable[Document], *, alone: bool = False) -> None:
        """Note texts for the run's tree and, if ``alone``, outside of runs; drop the oldest above the bound."""
        texts = {text: key for key, text in map(name_document, documents)}
        if not texts:
            return
        with self._lock:
            for tree in (self._root_of.get(run_id, run_id), *([None] if alone else [])):
                known = self._touch_tree(tree)
                for text, key in texts.items():
                    known.pop(text, None)
                    known[text] = key
                for text in list(known)[: -self._max_documents]:
                    del known[text]

    def _touch_tree(self, root: UUID | None) -> dict[str, str]:
        """Return a tree's ids by text, made if missing, now used last; forget the oldest tree above ``max_runs``."""
        texts = self._texts.setdefault(root, {})
        self._texts.move_to_end(root)
        if len(self._texts) > self._max_runs:
            self._forget(next(iter(self._texts)))
        return texts

    def _forget(self, root: UUID | None) -> None:
        self._texts.pop(root, None)
        for run_id in [run_id for run_id, other in self._root_of.items() if other == root]:
            del self._root_of[run_id]


def find_tracked_documents(callbacks: Any, own: Any = None) -> dict[str, str]:
    """Return ids by text of all documents that trackers in ``callbacks`` and ``own`` know of the run; may be empty."""
    found: dict[str, str] = {}
    for given in callbacks if isinstance(callbacks, list) else [callbacks]:
        parent_run_id = given.parent_run_id if isinstance(given, BaseCallbackManager) else None
        for handler in (*_list_handlers(given), *_list_handlers(own)):
            if isinstance(handler, DocumentTracker):
                found |= {text: key for key, text in handler.documents_of(parent_run_id)}
    return found


def _list_handlers(callbacks: Any) -> list[Any]:
    """Return the handlers of a callback manager, a list as it is, [] for None, else a list of the one handler."""
    if isinstance(callbacks, BaseCallbackManager):
        return list(callbacks.handlers)
    if isinstance(callbacks, list):
        return callbacks
    return [] if callbacks is None else [callbacks]


class SemShareKVWarmer(BaseDocumentTransformer):
    """A step of an indexing pipeline that computes the documents' KV ahead of time and returns them unchanged.

    Place it last, behind the splitter: what is warmed is what retrieval will put into prompts, which then know
    it without naming it. Modes below ``exact`` take its KV from anywhere in a prompt; ``exact`` only where a prompt
    begins with the text. A text that was given before under the same id is replaced.

    Args:
        model: the chat model or LLM that will read them, or an engine.
        namespace: the tenant who may reuse them; by default the model's own, or ``default`` of an engine.
        pinned: whether the store's byte bound never evicts them.
        ttl_s: seconds after their last use at which they expire, or None.
        progress: whether to show a progress bar.

    Example::

        chunks = SemShareKVWarmer(model).transform_documents(splitter.split_documents(documents))
    """

    def __init__(
        self,
        model: BaseLanguageModel[Any] | SemShareEngine,
        namespace: str | None = None,
        pinned: bool = False,
        ttl_s: float | None = None,
        progress: bool = False,
    ) -> None:
        engine: Any = getattr(model, "engine", model)
        known = isinstance(engine, SemShareEngine)
        require(known, "model", type(model).__name__, "a ChatSemShareKV, a SemShareKVLLM or a SemShareEngine")
        check_lifetime("ttl_s", ttl_s)
        self.engine: SemShareEngine = engine
        own: str = getattr(model, "kv_namespace", "default")
        self.namespace = check_optional_name("namespace", namespace) or own
        self.pinned, self.ttl_s, self.progress = pinned, ttl_s, progress

    def transform_documents(self, documents: Sequence[Document], **kwargs: Any) -> Sequence[Document]:
        """Compute and store the documents' KV, under ids as in ``name_document``; return the documents unchanged.

        Raises:
            ValueError: if two texts have one id, or an option is unknown.
            ContextWindowError: if one is longer than the model's context. Those before it are stored.
        """
        require(not kwargs, "keyword arguments", sorted(kwargs), "none")
        self.engine.warm(name_documents(documents) or {}, self.namespace, self.pinned, self.ttl_s, self.progress)
        return documents
