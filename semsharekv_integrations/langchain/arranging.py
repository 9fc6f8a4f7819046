"""Documents in the order that continues what is stored: as a step behind a retriever, or in an agent's messages.

It changes prompts, so nothing of it happens unless it is asked for. Nothing here knows tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from langchain_core.callbacks import Callbacks
from langchain_core.documents import Document
from langchain_core.documents.compressor import BaseDocumentCompressor
from langchain_core.messages import BaseMessage
from pydantic import ConfigDict, field_validator, model_validator

from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.errors import require
from semsharekv_integrations.frameworks import arrange_items
from semsharekv_integrations.langchain.documents import name_document
from semsharekv_integrations.langchain.messages import translate_messages
from semsharekv_integrations.langchain.tools import convert_tool
from semsharekv_integrations.request import check_optional_name, make_document_id

_PARAGRAPH = "\n\n"


class SemShareKVArranger(BaseDocumentCompressor):
    """Puts retrieved documents into the order that continues the longest stored prefix, and leaves none out.

    For ``ContextualCompressionRetriever``, behind all that picks or changes documents. What was never stored follows in
    the order of the retriever. ``SemShareEngine.arrange`` says what counts; the report's ``arranged_tokens`` says how
    many tokens were exact because of it.

    Attributes:
        model: the chat model or LLM that will read them, or an engine.
        namespace: the tenant; None for the model's own, or ``default`` of an engine.
        before: what stands before the documents in the prompt: text for an LLM, or messages for a chat model, the last
            one's content ending where the documents begin. None to see it from stored prompts.

    Example::

        arranger = SemShareKVArranger(model=chat)
        retriever = ContextualCompressionRetriever(base_compressor=arranger, base_retriever=retriever)
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model: Any
    namespace: str | None = None
    before: str | Sequence[BaseMessage] | None = None

    @field_validator("namespace", mode="before")
    @classmethod
    def _check_namespace(cls, namespace: Any) -> str | None:
        return check_optional_name("namespace", namespace)

    @model_validator(mode="after")
    def _check_model(self) -> SemShareKVArranger:
        is_known = isinstance(getattr(self.model, "engine", self.model), SemShareEngine)
        named = type(self.model).__name__
        require(is_known, "model", named, "a ChatSemShareKV, a SemShareKVLLM or a SemShareEngine")
        return self

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Return the same documents in another order, or in the given one if none continues more. Ignores the query."""
        own = getattr(self.model, "kv_namespace", "default")
        before = self.before
        options = {
            "namespace": self.namespace or own,
            "before": before if before is None or isinstance(before, str) else translate_messages(before),
        }
        engine = getattr(self.model, "engine", self.model)
        return arrange_items(engine, documents, list(map(name_document, documents)), **options)


class _Row(NamedTuple):
    """A text that holds documents one behind the other, each perhaps with a title or an end of its own."""

    before: str
    documents: list[str]
    between: str
    after: str


def arrange_messages(
    messages: Sequence[BaseMessage], texts: Iterable[str], engine: SemShareEngine, **options: Any
) -> list[BaseMessage]:
    """Return the messages, with those documents of ``texts`` arranged that stand one behind the other in a message.

    Args:
        messages: of the prompt, all of them.
        texts: of documents.
        engine: that will read them.
        options: of ``engine.arrange``, but for ``before``; ``tools`` in any form that LangChain takes.
    """
    known = sorted({text.strip() for text in texts} - {""}, key=len, reverse=True)
    tools = list(map(convert_tool, options.pop("tools", None) or ()))
    done: list[BaseMessage] = []
    for message in messages:
        row = _find_row(message.content, known) if isinstance(message.content, str) else None
        if row is not None:
            before = translate_messages([*done, message.model_copy(update={"content": row.before})])
            named = [(make_document_id(text), text) for text in row.documents]
            asked = {**options, "before": before, **({"tools": tools} if tools else {})}
            found = arrange_items(engine, row.documents, named, **asked)
            content = row.before + row.between.join(found) + row.after
            message = message.model_copy(update={"content": content}) if found != row.documents else message
        done.append(message)
    return done


def _find_row(content: str, texts: Sequence[str]) -> _Row | None:
    """Return the row of documents in ``content``; None unless two or more stand there, once each and in a row.

    They are in a row if the same text stands between any two neighbours. Or one empty line stands there, perhaps with
    an end of the document before it and a title of the next behind it; titles must then begin with the same character.
    ``texts`` are sorted, the longest first.
    """
    spans: list[tuple[int, int]] = []
    for text in texts:
        start = content.find(text)
        span = start, start + len(text)
        if start >= 0 and not any(span[0] < stop and first < span[1] for first, stop in spans):
            spans.append(span)
    spans.sort()
    found = [content[slice(*span)] for span in spans]
    if len(found) < 2 or any(content.count(text) > 1 for text in found):
        return None
    gaps = [content[stop:start] for (_, stop), (start, _) in pairwise(spans)]
    before, after = content[: spans[0][0]], content[spans[-1][1] :]
    if len(set(gaps)) == 1:
        return _Row(before, found, gaps[0], after)
    if any(gap.count(_PARAGRAPH) != 1 for gap in gaps):
        return None
    ends, titles = zip(*(gap.split(_PARAGRAPH) for gap in gaps), strict=True)
    titles = (before.rpartition(_PARAGRAPH)[2], *titles)
    ends = (*ends, after.partition(_PARAGRAPH)[0])
    if any(titles) and len({title[:1] for title in titles}) > 1:
        return None
    units = [title + text + end for title, text, end in zip(titles, found, ends, strict=True)]
    return _Row(before[: len(before) - len(titles[0])], units, _PARAGRAPH, after[len(ends[-1]) :])


def read_template_variables(settings: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Return ``chat_template_kwargs`` of a call's settings, else of the model, as an option; {} if there are none."""
    found = settings.get("chat_template_kwargs") or getattr(model, "chat_template_kwargs", None)
    return {"chat_template_kwargs": found} if found else {}
