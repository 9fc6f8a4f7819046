"""Where documents begin and end in a prompt, as far as LangChain's objects tell: texts by id for the engine.

A border may be told by the caller's ``documents``, by what a tool returned beside its message, by a
``DocumentTracker``, or by a content block marked for caching. Knows nothing about models or tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage, ToolMessage

from semsharekv_integrations.checks import require
from semsharekv_integrations.request import DocumentNotes, Documents, document_id

MAX_DEPTH = 4  # of containers that are looked into for documents
Named = tuple[str, str]


def engine_documents(documents: Any) -> Documents | None:
    """Texts by id where LangChain documents are among them; anything else unchanged, for the engine to check.

    A document's id is its ``id``, else its metadata's ``id``, else a digest of its text.
    """
    if isinstance(documents, str) or not isinstance(documents, Sequence):
        return documents
    texts: dict[str, str] = {}
    for item in documents:
        key, text = named(item) if isinstance(item, Document) else (document_id(item), item)
        require(texts.get(key, text) == text, "documents", f"two texts with the id {key!r}", "one text for each id")
        texts[key] = text
    return texts


def named(document: Document) -> Named:
    """Id and text of a document."""
    key = document.id or document.metadata.get("id")
    return str(key) if key else document_id(document.page_content), document.page_content


def documents_in(value: Any, depth: int = MAX_DEPTH) -> Iterator[Document]:
    """The documents in ``value``: itself, or in lists, tuples and mappings, one in another up to ``depth``."""
    if isinstance(value, Document):
        yield value
    elif depth and isinstance(value, Mapping):
        for item in value.values():
            yield from documents_in(item, depth - 1)
    elif depth and isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from documents_in(item, depth - 1)


def in_artifacts(messages: Iterable[BaseMessage]) -> list[Named]:
    """The documents that tools returned beside their messages."""
    artifacts = [message.artifact for message in messages if isinstance(message, ToolMessage)]
    found = documents_in(artifacts, MAX_DEPTH + 1)
    return [named(document) for document in found if document.page_content.strip()]


def in_marked_blocks(messages: Iterable[BaseMessage]) -> list[Named]:
    """The text blocks that carry ``cache_control``."""
    blocks = [block for message in messages if isinstance(message.content, list) for block in message.content]
    texts = [block.get("text") for block in blocks if isinstance(block, dict) and block.get("cache_control")]
    return [(document_id(text), text) for text in texts if isinstance(text, str)]


def with_found(
    given: Any, found: Iterable[Named], marked: Iterable[Named], contents: Sequence[str]
) -> Documents | None:
    """The caller's documents, and those found elsewhere that stand in one of ``contents``.

    One that stands within another is left out, and so is a marked block with a document in it. Where an id is taken by
    another text, a digest takes its place.
    """
    documents = engine_documents(given)
    if documents is not None and not isinstance(documents, Mapping):
        return documents
    texts: dict[str, str] = dict(documents or {})
    present = {text.strip(): key for key, text in found if any(text.strip() in content for content in contents)}
    wholes = [*map(str, texts.values()), *present]
    for text, key in present.items():
        if text and not any(text in other for other in wholes if other != text) and text not in texts.values():
            texts[document_id(text) if key in texts else key] = text
    for key, text in marked:
        if text.strip() and not any(str(other).strip() in text for other in texts.values()):
            texts[key] = text
    return DocumentNotes(texts, documents or ()) if texts else None
