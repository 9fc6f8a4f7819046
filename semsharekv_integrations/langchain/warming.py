"""Documents whose KV is computed when they are loaded, before anybody asks. Knows nothing about prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.documents import BaseDocumentTransformer, Document

from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.errors import check_lifetime, require
from semsharekv_integrations.langchain.base import LocalModel
from semsharekv_integrations.langchain.documents import engine_documents
from semsharekv_integrations.request import check_optional_name


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

    Raises:
        ValueError: naming the argument, its value and what is accepted.

    Example::

        chunks = SemShareKVWarmer(model).transform_documents(splitter.split_documents(documents))
    """

    def __init__(
        self,
        model: LocalModel | SemShareEngine,
        namespace: str | None = None,
        pinned: bool = False,
        ttl_s: float | None = None,
        progress: bool = False,
    ) -> None:
        known = isinstance(model, LocalModel | SemShareEngine)
        require(known, "model", type(model).__name__, "a ChatSemShareKV, a SemShareKVLLM or a SemShareEngine")
        check_lifetime("ttl_s", ttl_s)
        self.engine = model.engine if isinstance(model, LocalModel) else model
        own = model.kv_namespace if isinstance(model, LocalModel) else "default"
        self.namespace = check_optional_name("namespace", namespace) or own
        self.pinned, self.ttl_s, self.progress = pinned, ttl_s, progress

    def transform_documents(self, documents: Sequence[Document], **kwargs: Any) -> Sequence[Document]:
        """Warm the documents, under their ``id``, else their metadata's ``id``, else a digest; they come back as given.

        Raises:
            ValueError: if two texts have one id, or an option is unknown.
            ContextWindowError: if one is longer than the model's context.
        """
        require(not kwargs, "keyword arguments", sorted(kwargs), "none")
        self.engine.warm(
            engine_documents(documents) or {},
            namespace=self.namespace,
            pinned=self.pinned,
            ttl_s=self.ttl_s,
            progress=self.progress,
        )
        return documents
