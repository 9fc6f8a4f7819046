"""Remembers the documents that pass through a chain, so that a model called in the same run knows their borders.

A prompt template turns documents into text; what they were is known only to callbacks. Knows nothing about prompts:
which of the documents stand in one is for the model to see.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler, BaseCallbackManager, Callbacks
from langchain_core.documents import Document

from semsharekv_integrations.checks import is_whole, require
from semsharekv_integrations.forks import hold_at_forks
from semsharekv_integrations.langchain.documents import Named, documents_in, named


class DocumentTracker(BaseCallbackHandler):
    """A callback handler that tells the models of this package where documents begin and end.

    Give it to a chain, graph or agent by ``config={"callbacks": [DocumentTracker()]}``. It hears what retrievers return
    and what goes into and out of every step; a model called in the same run takes as documents what stands in its
    prompt word for word. Calls of other runs never see it. Where retriever and model are called apart, or each was
    given the tracker itself, what retrievers returned last is looked at; so use one tracker for each tenant there.

    Args:
        max_runs: how many runs are remembered at once; the oldest are forgotten.
        max_documents: how many documents are remembered of each run, the latest ones.

    Raises:
        ValueError: if either is not a whole number of at least 1.
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
        """Ids and texts known to a call whose parent is this run, or None for a call that stands alone."""
        with self._lock:
            if parent_run_id in self._root_of:
                trees: list[UUID | None] = [self._root_of[parent_run_id]]
            else:
                trees = [None] if parent_run_id is None else [parent_run_id, None]
            return [(key, text) for tree in trees for text, key in self._texts.get(tree, {}).items()]

    def on_chain_start(
        self, serialized: Any, inputs: Any, *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        """Remember the documents that go into a step."""
        self._start(run_id, parent_run_id)
        self._remember(run_id, documents_in(inputs))

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Remember what comes out, and what went in if only that is known by now, as it is in streams."""
        self._remember(run_id, documents_in([kwargs.get("inputs"), outputs]))
        self._end(run_id)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Forget a run that failed."""
        self._end(run_id)

    def on_retriever_start(
        self, serialized: Any, query: str, *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        """Place the retriever in its run."""
        self._start(run_id, parent_run_id)

    def on_retriever_end(
        self, documents: Sequence[Document], *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        """Remember what was found."""
        self._remember(run_id, documents_in(documents), alone=parent_run_id not in self._root_of)
        self._end(run_id)

    def on_retriever_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Forget a run that failed."""
        self._end(run_id)

    def on_tool_start(
        self, serialized: Any, input_str: str, *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        """Place the tool in its run, for retrievers that it calls."""
        self._start(run_id, parent_run_id)

    def on_tool_end(self, output: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Remember what the tool returned beside its text."""
        self._remember(run_id, documents_in([output, getattr(output, "artifact", None)]))
        self._end(run_id)

    def on_tool_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Forget a run that failed."""
        self._end(run_id)

    def _start(self, run_id: UUID, parent_run_id: UUID | None) -> None:
        with self._lock:
            root = run_id if parent_run_id is None else self._root_of.get(parent_run_id, parent_run_id)
            self._root_of[run_id] = root
            self._tree(root)

    def _end(self, run_id: UUID) -> None:
        with self._lock:
            if self._root_of.pop(run_id, None) == run_id:
                self._forget(run_id)

    def _remember(self, run_id: UUID, documents: Iterable[Document], *, alone: bool = False) -> None:
        texts = {text: key for key, text in map(named, documents)}
        if not texts:
            return
        with self._lock:
            trees = [self._root_of.get(run_id, run_id), None] if alone else [self._root_of.get(run_id, run_id)]
            for tree in trees:
                known = self._tree(tree)
                for text, key in texts.items():
                    known.pop(text, None)
                    known[text] = key
                for text in list(known)[: -self._max_documents]:
                    del known[text]

    def _tree(self, root: UUID | None) -> dict[str, str]:
        """What is known of a tree, as the one used last; the one used longest ago goes if there are too many."""
        texts = self._texts.setdefault(root, {})
        self._texts.move_to_end(root)
        if len(self._texts) > self._max_runs:
            oldest = next(iter(self._texts))
            self._forget(oldest)
        return texts

    def _forget(self, root: UUID | None) -> None:
        self._texts.pop(root, None)
        for run_id in [run_id for run_id, other in self._root_of.items() if other == root]:
            del self._root_of[run_id]


def tracked_documents(callbacks: Callbacks | list[Callbacks] | None, own: Callbacks = None) -> dict[str, str]:
    """Ids by text of what trackers among a call's callbacks and the model's ``own`` know of the run."""
    found: dict[str, str] = {}
    for given in callbacks if isinstance(callbacks, list) else [callbacks]:
        manager = given if isinstance(given, BaseCallbackManager) else None
        parent_run_id = manager.parent_run_id if manager else None
        handlers = [*(manager.handlers if manager else _listed(given)), *_listed(own)]
        for handler in handlers:
            if isinstance(handler, DocumentTracker):
                found |= {text: key for key, text in handler.documents_of(parent_run_id)}
    return found


def _listed(callbacks: Any) -> list[Any]:
    if isinstance(callbacks, BaseCallbackManager):
        return list(callbacks.handlers)
    if isinstance(callbacks, list):
        return callbacks
    return [] if callbacks is None else [callbacks]
