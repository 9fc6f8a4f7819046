"""What one visitor of the chat page has: documents in an order, and conversations. Knows nothing about how it looks."""

from __future__ import annotations

import binascii
import secrets
from base64 import b64decode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from semsharekv_integrations.report import FinishReason, ReuseReport
from semsharekv_integrations.request import make_document_id
from semsharekv_integrations.serving.prefill_times import FullPrefill

MOST_DOCUMENTS, MOST_CONVERSATIONS, MOST_TURNS = 100, 50, 200
MOST_DOCUMENT_BYTES, MOST_BYTES = 1024**2, 4 * 1024**2  # of one document in UTF-8, and of all of a visitor's
SUFFIXES = (".txt", ".md", ".markdown", ".text")
INSTRUCTION = "You are a helpful assistant. Use these documents:\n\n"
_TITLE_CHARACTERS, _NAME_CHARACTERS = 40, 80


@dataclass
class Document:
    """A text that stands in prompts while it ``is_on``; ``key`` is a digest of it."""

    key: str
    name: str
    text: str
    is_on: bool = True


@dataclass
class Reply:
    """One answer to a question, as far as it has come. The last three are there once it has ended as it should."""

    text: str = ""
    is_done: bool = False
    error: str | None = None
    finish_reason: FinishReason | None = None
    report: ReuseReport | None = None
    pieces: tuple[str, ...] = ()  # the text of each of the report's ``origins``


@dataclass
class Turn:
    """A question, its answer, and beside that perhaps the answer behind a full prefill of the same prompt.

    Attributes:
        names: of the documents in the prompt, by key.
        full_prefill: what one takes; known once the answer has ended.
        is_stopped: whether the visitor wants no more of it.
    """

    question: str
    names: Mapping[str, str]
    reply: Reply = field(default_factory=Reply)
    other: Reply | None = None
    full_prefill: FullPrefill | None = None
    is_stopped: bool = False

    @property
    def is_done(self) -> bool:
        """Whether nothing more will come."""
        return self.reply.is_done and (self.other is None or self.other.is_done)


@dataclass
class Conversation:
    """Turns that go on from each other. The engine knows it by ``key``, which nobody can guess."""

    key: str = field(default_factory=lambda: f"page-{secrets.token_hex(12)}")
    turns: list[Turn] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The first question, shortened."""
        asked = " ".join(self.turns[0].question.split()) if self.turns else "New conversation"
        return asked if len(asked) <= _TITLE_CHARACTERS else f"{asked[: _TITLE_CHARACTERS - 1]}…"


@dataclass
class Visitor:
    """One visitor's documents and conversations.

    Attributes:
        tenant: whose KV the visitor's calls read, once known.
        current: the index of the conversation that is shown.
    """

    tenant: str | None = None
    documents: list[Document] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=lambda: [Conversation()])
    current: int = 0

    @property
    def conversation(self) -> Conversation:
        """The one that is shown."""
        return self.conversations[self.current]

    def add_document(self, name: str, text: str) -> Document:
        """Append a document that is on. ``ValueError`` if it is blank, too large, there already or one too many."""
        text, name = _clean(text), " ".join(name.split())[:_NAME_CHARACTERS]
        name = name or f"Document {len(self.documents) + 1}"
        _check(bool(text), f"{name} is empty.")
        size, room = len(text.encode()), MOST_BYTES - sum(len(each.text.encode()) for each in self.documents)
        most = min(room, MOST_DOCUMENT_BYTES)
        _check(size <= most, f"{name} has {size:,} bytes; there is room for {most:,}.")
        _check(len(self.documents) < MOST_DOCUMENTS, f"{name} is one too many; {MOST_DOCUMENTS} documents fit.")
        document = Document(make_document_id(text), name, text)
        same = next((each.name for each in self.documents if each.key == document.key), None)
        _check(same is None, f"{name} has the same text as {same}, which is here already.")
        self.documents.append(document)
        return document

    def add_file(self, name: str, content: str) -> Document:
        """Append the document that a file holds, its bytes in base64. ``ValueError`` if it is no text that fits."""
        name = PurePath(name.replace("\\", "/")).name or "file"
        suffix, kinds = PurePath(name).suffix, "text files are (.txt, .md)"
        _check(suffix.lower() in ("", *SUFFIXES), f"{name}: {suffix} files are not read; {kinds}.")
        try:
            text = b64decode(content, validate=True).decode("utf-8-sig")
        except (binascii.Error, UnicodeDecodeError):
            text = "\0"
        _check("\0" not in text, f"{name} holds no text in UTF-8; {kinds}.")
        return self.add_document(name, text)

    def find_document(self, key: str) -> Document:
        """Return the document with this key; ``ValueError`` if there is none."""
        for document in self.documents:
            if document.key == key:
                return document
        raise ValueError("That document is not here any more.")

    def switch_document(self, key: str) -> None:
        """Put a document in the prompts to come, or leave it out of them."""
        document = self.find_document(key)
        document.is_on = not document.is_on

    def remove_document(self, key: str) -> None:
        """Drop a document."""
        self.documents.remove(self.find_document(key))

    def move_document(self, key: str, place: int) -> None:
        """Put a document at ``place``, counted from 0 without it; beyond an end it stands there."""
        document = self.find_document(key)
        self.documents.remove(document)
        self.documents.insert(max(0, place), document)

    def begin_conversation(self) -> None:
        """Show a new conversation; the one that is shown if that is empty. The oldest goes if there are too many."""
        if self.conversation.turns:
            empty = next((each for each in self.conversations if not each.turns), None)
            if empty is None:
                self.conversations.append(Conversation())
                del self.conversations[:-MOST_CONVERSATIONS]
            self.current = len(self.conversations) - 1 if empty is None else self.conversations.index(empty)

    def open_conversation(self, key: str) -> None:
        """Show the conversation with this key; ``ValueError`` if there is none."""
        keys = [each.key for each in self.conversations]
        _check(key in keys, "That conversation is not here any more.")
        self.current = keys.index(key)

    def stop_answers(self) -> None:
        """Want no more of the answers that are being written."""
        for turn in (turn for each in self.conversations for turn in each.turns if not turn.is_done):
            turn.is_stopped = True

    def ask(self, question: str, *, beside_full: bool) -> tuple[Turn, dict[str, Any]]:
        """Append a turn to the conversation; return it, and what a body of a chat asks for. ``ValueError`` if blank."""
        conversation, question = self.conversation, question.strip()
        _check(bool(question), "Write a question first.")
        _check(all(turn.is_done for turn in conversation.turns), "The last answer is still being written.")
        _check(len(conversation.turns) < MOST_TURNS, f"A conversation has {MOST_TURNS} questions; begin a new one.")
        there = [each for each in self.documents if each.is_on]
        turn = Turn(question, {each.key: each.name for each in there}, other=Reply() if beside_full else None)
        messages = _write_messages(there, conversation.turns, question)
        conversation.turns.append(turn)
        documents = [{"id": each.key, "text": each.text} for each in there]
        return turn, {"messages": messages, "documents": documents, "prompt_cache_key": conversation.key}


def _check(fits: bool, otherwise: str) -> None:
    """Raise ``ValueError`` with what the visitor is told, unless it ``fits``."""
    if not fits:
        raise ValueError(otherwise)


def _clean(text: str) -> str:
    """Return ``text`` with line ends as prompts have them, and none around it."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def _write_messages(documents: Iterable[Document], turns: Iterable[Turn], question: str) -> list[dict[str, str]]:
    """Return the documents, the turns that were answered, and the question as messages."""
    texts = "\n\n".join(each.text for each in documents)
    messages = [{"role": "system", "content": f"{INSTRUCTION}{texts}"}] if texts else []
    for turn in turns:
        if turn.reply.error is None and turn.reply.text:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.reply.text})
    return [*messages, {"role": "user", "content": question}]
