"""Where documents begin and end in a prompt that LlamaIndex has put together: borders that no separator shows.

They come from what the caller names, the nodes that a retrieval noted, cache points in messages, and the arguments of
the prompt's template. All but the first are hints, left out if their text is not in the prompt word for word.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llama_index.core.base.llms.types import CachePoint, ChatMessage, TextBlock
from llama_index.core.prompts.base import BasePromptTemplate
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore

from semsharekv_integrations.concurrency.threads import hold_at_forks
from semsharekv_integrations.frameworks import collect_texts
from semsharekv_integrations.request import DocumentNotes, Documents, make_document_id

CONTEXT_ARGUMENTS = ("context_str", "context_msg", "context")
MOST_NOTED_NODES = 256  # of all namespaces; to look for them all in 50,000 characters takes 20 ms
SHORTEST_PART_CHARS = 24  # a shorter paragraph of an argument may stand anywhere else by chance
_BETWEEN_MESSAGES = "\0"  # no document goes from one message into the next


@dataclass(frozen=True)
class NodeText:
    """A node's text, as prompts may have it."""

    node_id: str  # the document's id in reports and for ``forget``
    source_id: str | None  # of the LlamaIndex document that the node was cut from
    forms: tuple[str, ...]  # with its metadata as language models are shown it, and without

    @classmethod
    def read(cls, item: BaseNode | NodeWithScore) -> NodeText:
        """Return a node's ids and its text in stripped ``forms``; blank and repeated ones are left out, maybe all."""
        node = item.node if isinstance(item, NodeWithScore) else item
        forms = (node.get_content(metadata_mode=mode).strip() for mode in (MetadataMode.LLM, MetadataMode.NONE))
        return cls(node.node_id, node.ref_doc_id, tuple(dict.fromkeys(form for form in forms if form)))

    def find_form(self, text: str) -> str | None:
        """Return the first form that stands in ``text``, or None."""
        return next((form for form in self.forms if form in text), None)


class NodeNotes:
    """The nodes retrieved last, by namespace; safe to use from several threads."""

    def __init__(self) -> None:
        self._nodes: OrderedDict[tuple[str, str], NodeText] = OrderedDict()
        self._lock = hold_at_forks(threading.Lock())

    def __deepcopy__(self, memo: object) -> NodeNotes:
        """Return notes of the same nodes, with a lock of their own."""
        with self._lock:
            copied = NodeNotes()
            copied._nodes.update(self._nodes)
            return copied

    def add(self, namespace: str, nodes: Iterable[BaseNode | NodeWithScore]) -> None:
        """Note nodes. If all namespaces have more than ``MOST_NOTED_NODES`` together, drop those noted longest ago."""
        texts = [NodeText.read(node) for node in nodes]
        with self._lock:
            for text in texts:
                self._nodes.pop((namespace, text.node_id), None)
                self._nodes[namespace, text.node_id] = text
            while len(self._nodes) > MOST_NOTED_NODES:
                self._nodes.popitem(last=False)

    def list_latest(self, namespace: str) -> list[NodeText]:
        """Return the nodes noted in ``namespace``, latest first."""
        with self._lock:
            return [text for (where, _), text in reversed(self._nodes.items()) if where == namespace]


class TextPrompt(str):
    """A prompt made from a template, with the parts of its arguments that are documents."""

    parts: tuple[str, ...] = ()


class MessagesPrompt(list[ChatMessage]):
    """As ``TextPrompt``, of messages."""

    parts: tuple[str, ...] = ()


def find_context_parts(template: BasePromptTemplate, arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the paragraphs of the template's context arguments, without those below ``SHORTEST_PART_CHARS``."""
    given = {**template.kwargs, **arguments}
    values = [given[name] for name in CONTEXT_ARGUMENTS if name in given]
    texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
    parts = (part.strip() for text in texts if isinstance(text, str) for part in text.split("\n\n"))
    return tuple(part for part in parts if len(part) >= SHORTEST_PART_CHARS)


def name_documents(documents: Any, prompt: str | Sequence[ChatMessage]) -> Documents:
    """Return a sequence of nodes or texts as texts by id; return anything else unchanged, for the engine to check.

    Leaves out nodes without text, such as images. Raises ``ValueError`` if two texts have one id, or for other items.
    """
    if isinstance(documents, str) or not isinstance(documents, Sequence):
        return documents
    read = [NodeText.read(item) if isinstance(item, BaseNode | NodeWithScore) else item for item in documents]
    where, nodes = _join_texts(prompt), [item for item in read if isinstance(item, NodeText)]
    named = (
        (item.node_id, item.find_form(where) or next(iter(item.forms), ""))
        if isinstance(item, NodeText)
        else (make_document_id(item), item)
        for item in read
    )
    texts = collect_texts((key, text) for key, text in named if text)
    return _label_texts(texts, nodes, required=texts, covered={})


def find_documents(prompt: str | Sequence[ChatMessage], noted: Iterable[NodeText]) -> Documents:
    """Return the texts of ``prompt`` that noted nodes, cache points and arguments tell of, by id, in prompt order.

    Where hints overlap, nodes come before cache points, these before arguments, and longer nodes before shorter ones.
    A node in the prompt that overlaps others becomes a further name of those, so that it can be forgotten.
    """
    where = _join_texts(prompt)
    nodes = [(node, form) for node in noted if (form := node.find_form(where)) is not None]
    nodes.sort(key=lambda pair: -len(pair[1]))
    parts = (*_find_marked(prompt), *getattr(prompt, "parts", ()))
    placed: list[_Place] = []
    covered: dict[str, list[str]] = {}  # ids of nodes that overlap others, with the ids of these
    named = [(node.node_id, form) for node, form in nodes] + [(make_document_id(part), part) for part in parts]
    for key, text in named:
        place = _Place(where.find(text), text, key)
        over = [other.document_id for other in placed if place.overlaps(other)]
        if place.start >= 0 and not over:
            placed.append(place)
        covered[key] = over
    texts = {place.document_id: place.text for place in sorted(placed)}
    return _label_texts(texts, [node for node, _ in nodes], required=(), covered=covered)


def _label_texts(
    texts: dict[str, str], nodes: Iterable[NodeText], required: Collection[str], covered: Mapping[str, list[str]]
) -> DocumentNotes:
    """Return ``texts`` with the other ids of ``nodes`` and their sources as further names; see ``DocumentNotes``."""
    groups: dict[str, list[str]] = {}
    for node in nodes:
        there = [node.node_id] if node.node_id in texts else covered.get(node.node_id, [])
        for key in (node.node_id, node.source_id):
            if key and key not in texts:
                groups.setdefault(key, []).extend(there)
    return DocumentNotes(texts, required, groups)


class _Place(NamedTuple):
    """Where a document's text first stands."""

    start: int
    text: str
    document_id: str

    def overlaps(self, other: _Place) -> bool:
        return self.start < other.start + len(other.text) and other.start < self.start + len(self.text)


def _find_marked(prompt: str | Sequence[ChatMessage]) -> list[str]:
    """Return each message's texts up to and between cache points, stripped, none blank; [] for a text prompt."""
    found = []
    for message in () if isinstance(prompt, str) else prompt:
        texts: list[str] = []
        for block in message.blocks:
            if isinstance(block, TextBlock):
                texts.append(block.text)
            elif isinstance(block, CachePoint):
                found.append("\n".join(texts).strip())
                texts = []
    return [text for text in found if text]


def _join_texts(prompt: str | Sequence[ChatMessage]) -> str:
    if isinstance(prompt, str):
        return prompt
    return _BETWEEN_MESSAGES.join(message.content or "" for message in prompt)
