"""How documents of the synthetic world reach a model: the layouts that chains, query engines and chats use.

A layout is where the documents stand (system message, user message, plain completion text, or spread over
turns) and the words around them. The words are those of the stock templates of LangChain and LlamaIndex and
some plain ones, so that the reference model reads all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from semsharekv_integrations.lab.world import WORDS, Document

Message = dict[str, str]
Layout = Literal["system", "user", "turns", "completion"]
LAYOUTS: tuple[Layout, ...] = ("system", "user", "turns", "completion")

_WRAPS = {name: tuple(wordings) for name, wordings in WORDS["wraps"].items()}
SYSTEM_WRAPS, USER_WRAPS, COMPLETION_WRAPS = _WRAPS["system"], _WRAPS["user"], _WRAPS["completion"]
SUMMARY_WRAPS, SUMMARY_REQUESTS, PLAIN_SYSTEMS = _WRAPS["summary"], _WRAPS["summary_requests"], _WRAPS["plain_systems"]


def join(documents: Sequence[Document]) -> str:
    """The documents' texts with the frameworks' usual separator."""
    return "\n\n".join(document.text for document in documents)


def summary(documents: Sequence[Document]) -> str:
    """The right answer to a request for a summary: one line for each document; see ``right_share`` for their order."""
    return "\n".join(document.summary for document in documents)


def right_share(said: str, expected: str) -> float:
    """Share of the expected lines that ``said`` has, in any order; 0 if it has more lines than expected."""
    lines, wanted = ([line.strip() for line in text.strip().splitlines()] for text in (said, expected))
    return 0.0 if len(lines) > len(wanted) else len(set(lines) & set(wanted)) / len(wanted)


def build(layout: Layout, documents: Sequence[Document], question: str, wrap: int = 0) -> str | list[Message]:
    """One prompt in ``layout``: plain text for ``completion``, else chat messages.

    Args:
        layout: where the documents stand.
        documents: one or more, in prompt order.
        question: the last thing asked.
        wrap: which wording of the layout, counted modulo the number there is.
    """
    if layout == "completion":
        return _pick(COMPLETION_WRAPS, wrap).format(docs=join(documents), question=question)
    return build_messages(layout, documents, question, wrap)


def build_messages(layout: Layout, documents: Sequence[Document], question: str, wrap: int = 0) -> list[Message]:
    """As ``build``, of a layout of messages."""
    if layout == "system":
        content = _pick(SYSTEM_WRAPS, wrap).format(docs=join(documents))
        return [_message("system", content), _message("user", question)]
    system = _message("system", _pick(PLAIN_SYSTEMS, wrap))
    if layout == "user":
        return [system, _message("user", _pick(USER_WRAPS, wrap).format(docs=join(documents), question=question))]
    turns = []  # in each the user hands over one document and the assistant restates its core facts
    for document in documents:
        request = f"{document.text}\n\n{SUMMARY_REQUESTS[0]}"
        turns += [_message("user", request), _message("assistant", document.summary)]
    return [system, *turns, _message("user", question)]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _pick(options: Sequence[str], index: int) -> str:
    return options[index % len(options)]
