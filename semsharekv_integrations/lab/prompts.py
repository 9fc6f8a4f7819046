"""How documents of the synthetic world reach a model: the layouts that chains, query engines and chats use.

A layout is where the documents stand (system message, user message, plain completion text, or spread over
turns) and the words around them. The words are those of the stock templates of LangChain and LlamaIndex and
some plain ones, so that the reference model reads all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from semsharekv_integrations.lab.world import Document

Message = dict[str, str]
Layout = Literal["system", "user", "turns", "completion"]
LAYOUTS: tuple[Layout, ...] = ("system", "user", "turns", "completion")

SYSTEM_WRAPS = (
    "{docs}",
    "Answer the question based only on the following context:\n\n{docs}",
    "You are a helpful assistant. Use these documents:\n\n{docs}",
    "Use the context information below to assist the user.\n--------------------\n{docs}\n--------------------\n",
    "The following is a friendly conversation between a user and an AI assistant.\n"
    "The assistant is talkative and provides lots of specific details from its context.\n"
    "If the assistant does not know the answer to a question, it truthfully says it does not know.\n\n"
    "Here are the relevant documents for the context:\n\n{docs}\n\n"
    "Instruction: Based on the above documents, provide a detailed answer for the user question below.\n"
    'Answer "don\'t know" if not present in the document.',
    "You are an assistant for question-answering tasks. Use the following pieces of retrieved context to answer "
    "the question. If you don't know the answer, just say that you don't know. "
    "Use three sentences maximum and keep the answer concise.\n\n{docs}",
)
USER_WRAPS = (
    "{docs}\n\n{question}",
    "{docs}\n\nQuestion: {question}",
    "Context information is below.\n---------------------\n{docs}\n---------------------\n"
    "Given the context information and not prior knowledge, answer the query.\nQuery: {question}\nAnswer: ",
    "Answer the question based only on the following context:\n{docs}\n\nQuestion: {question}",
    "Documents:\n\n{docs}\n\nNow answer: {question}",
)
COMPLETION_WRAPS = (
    "{docs}\n\nQuestion: {question}\nAnswer:",
    "Context information is below.\n---------------------\n{docs}\n---------------------\n"
    "Given the context information and not prior knowledge, answer the query.\nQuery: {question}\nAnswer: ",
    "Use the following pieces of context to answer the question at the end. If you don't know the answer, just say "
    "that you don't know, don't try to make up an answer.\n\n{docs}\n\nQuestion: {question}\nHelpful Answer:",
    "Answer the question based only on the following context:\n\n{docs}\n\nQuestion: {question}\nAnswer:",
)
SUMMARY_WRAPS = (
    'Write a concise summary of the following:\n\n\n"{docs}"\n\n\nCONCISE SUMMARY:',
    "{docs}\n\nQuestion: Summarize the documents.\nAnswer:",
    "Write a concise summary of the following:\n\n{docs}\n\nSummary:",
    "Context information from multiple sources is below.\n---------------------\n{docs}\n---------------------\n"
    "Given the information from multiple sources and not prior knowledge, answer the query.\n"
    "Query: Summarize the documents.\nAnswer: ",
)
SUMMARY_REQUESTS = (
    "Summarize the documents.",
    "Write a summary.",
    "Give me a concise summary.",
    "What are the main facts?",
)
PLAIN_SYSTEMS = (
    "You are a helpful assistant.",
    "You answer questions about the news.",
    "You are an expert Q&A system that is trusted around the world.\n"
    "Always answer the query using the provided context information, and not prior knowledge.\n"
    "Some rules to follow:\n1. Never directly reference the given context in your answer.\n"
    "2. Avoid statements like 'Based on the context, ...' or 'The context information ...' or anything along "
    "those lines.",
    "Today is 14 March. You are a helpful assistant.",
)


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
    if layout == "system":
        content = _pick(SYSTEM_WRAPS, wrap).format(docs=join(documents))
        return [_message("system", content), _message("user", question)]
    if layout == "user":
        content = _pick(USER_WRAPS, wrap).format(docs=join(documents), question=question)
        return [_message("system", _pick(PLAIN_SYSTEMS, wrap)), _message("user", content)]
    turns = [turn for document in documents for turn in document_turn(document)]
    return [_message("system", _pick(PLAIN_SYSTEMS, wrap)), *turns, _message("user", question)]


def document_turn(document: Document) -> list[Message]:
    """A turn in which the user hands over one document and the assistant restates its core facts."""
    request = f"{document.text}\n\n{SUMMARY_REQUESTS[0]}"
    return [_message("user", request), _message("assistant", document.summary)]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _pick(options: Sequence[str], index: int) -> str:
    return options[index % len(options)]
