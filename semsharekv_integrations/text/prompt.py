"""Prompts to token ids: plain text, or messages through the tokenizer's chat template.

Token ids are always those of the whole text, so that a prompt means the same to every engine, whatever it has said
before. Where a reply was sampled in other tokens than its text has, the exact prefix of the next turn ends there.

Room in the context window: text far beyond it is refused before all of it is tokenized.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from semsharekv_integrations.errors import ContextWindowError, PromptError
from semsharekv_integrations.kv import Rendered, Segment, TokenIds
from semsharekv_integrations.text.chat_template import ChatTemplate
from semsharekv_integrations.text.tool_calls import check_message
from semsharekv_integrations.text.tool_format import Tool, ToolFormat

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]
_PASSAGE = re.compile(r"\S(?:.|\n(?!\s*\n))*")
ROLES = ("system", "developer", "user", "assistant", "tool")


class PromptRenderer:
    """Renders prompts with one tokenizer; safe to use from several threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._chat = ChatTemplate(tokenizer)
        self._pieces: dict[int, str] = {}

    @property
    def tool_format(self) -> ToolFormat:
        """How the model writes tool calls."""
        return self._chat.tool_format

    def get_stops(self, prompt: Prompt) -> tuple[str, ...]:
        """Strings that end every answer to ``prompt``, whatever the caller asks for."""
        return () if isinstance(prompt, str) else self._chat.stops

    def render(
        self,
        prompt: Prompt,
        documents: Mapping[str, str],
        tools: Sequence[Tool] = (),
        hints: Mapping[str, str] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        window: int | None = None,
    ) -> Rendered:
        """Token ids of ``prompt``, and where the texts of ``documents`` (by id) stand in it.

        Args:
            prompt: text, or messages.
            documents: texts by id.
            tools: shown to the model, as its template does it or in the system message.
            hints: more texts that may stand there: they count where no named one does, the longest of those that
                overlap.
            template_kwargs: more variables for the chat template, none of ``RENDERING_OPTIONS``.
            window: context window in tokens, or None.

        Raises:
            PromptError: if it is empty, malformed, or refused by the chat template.
            ContextWindowError: if it leaves no room for a new token.
        """
        if not isinstance(prompt, (str, Sequence)):
            raise PromptError(f"prompt is {type(prompt).__name__}; accepted is text or a sequence of messages")
        if isinstance(prompt, str):
            if tools:
                raise PromptError("prompt is text; accepted with tools is a sequence of messages")
            messages, text = None, prompt
            bos = self._tokenizer.bos_token
            adds_special = not (bos and text.startswith(bos))
        else:
            messages = _checked(prompt)
            text = self._chat.render(messages, tools, template_kwargs)
            adds_special = self._tokenizer.chat_template is None
        require_room_for_text(text, window, self._count)
        token_ids, offsets = self._encode(text, add_special_tokens=adds_special)
        if not token_ids:
            raise PromptError("prompt is empty; accepted is text or messages of at least one token")
        require_room(len(token_ids), window)
        starts = list(accumulate(offsets, max))
        return Rendered(
            np.array(token_ids, dtype=np.int64),
            _with_hints(_segments(text, starts, documents, loosely=True), _segments(text, starts, hints or {})),
            _passages(text, starts),
            None if messages is None else _question(text, starts, messages),
            self._unplaced(text, starts, messages or [], documents),
        )

    def decode(self, token_ids: TokenIds) -> str:
        """The text of ``token_ids`` [N], without special tokens."""
        return self._decode(token_ids.tolist())

    def tokenize(self, text: str) -> TokenIds:
        """The tokens of a text that stands by itself, without special tokens."""
        return np.array(self._encode(text.strip(), add_special_tokens=False)[0], dtype=np.int64)

    def split_pieces(self, token_ids: TokenIds) -> list[str]:
        """The text of each token [N], with the space that stands before it where a word begins."""
        known = self._pieces
        for token_id in set(token_ids.tolist()) - known.keys():
            known[token_id] = self._piece(token_id)
        return [known[token_id] for token_id in token_ids.tolist()]

    def render_chat(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), template_kwargs: Mapping[str, Any] | None = None
    ) -> str:
        """The messages through the chat template; a last assistant message is left open, to be continued."""
        return self._chat.render(_checked(messages), tools, template_kwargs)

    def _count(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _unplaced(
        self, text: str, starts: list[int], messages: Sequence[Message], documents: Mapping[str, str]
    ) -> dict[str, int]:
        """The documents whose place cannot be told, each with the number of tokens that surely come before.

        They stand in a message that the template changed, or the tokenizer does not tell where tokens start.
        """
        found = {}
        for key, content in ((key, content.strip()) for key, content in documents.items()):
            at, _ = _place(text, content, loosely=True)
            if not content or (at >= 0 and starts):
                continue
            before = text[:at] if at >= 0 else _text_before(text, messages, content)
            if before is not None:
                found[key] = max(
                    0, len(self._encode(before, add_special_tokens=False)[0]) - 2
                )  # some are cut otherwise within the whole text
        return found

    def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[list[int], list[int]]:
        """Token ids, and the character at which each starts (none from tokenizers that cannot tell)."""
        fast = self._tokenizer.is_fast
        encoded = self._tokenizer(
            text, add_special_tokens=add_special_tokens, return_offsets_mapping=fast, verbose=False
        )
        return list(encoded["input_ids"]), [start for start, _ in encoded["offset_mapping"]] if fast else []

    def _piece(self, token_id: int) -> str:
        """One token's text; SentencePiece's mark for a leading space is kept, as decoding alone would drop it."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        return token if token.startswith("▁") else self._decode([token_id], keep_special=True)

    def _decode(self, token_ids: list[int], *, keep_special: bool = False) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=not keep_special))


def _checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    if not messages:
        raise PromptError("prompt has no messages; accepted is at least one")
    return [check_message(index, message, ROLES) for index, message in enumerate(messages)]


def _segments(text: str, starts: list[int], documents: Mapping[str, str], *, loosely: bool = False) -> list[Segment]:
    """Where each document's text first stands, in tokens; documents that are not in the text are left out.

    ``loosely``: space within it may be another, as where lines are broken anew.
    ``starts`` is where each token starts, in characters; special tokens put behind the text claim the last place.
    """
    found = []
    for document_id, content in documents.items():
        at, stop = _place(text, content.strip(), loosely=loosely)
        if at >= 0 and starts and stop > at:
            found.append(Segment(document_id, *_tokens_between(starts, at, stop)))
    return found


def _place(text: str, content: str, *, loosely: bool) -> tuple[int, int]:
    """Where ``content`` first stands, in characters; -1 twice if nowhere."""
    at = text.find(content)
    if at >= 0 or not loosely:
        return at, at + len(content)
    match = re.search(r"\s+".join(map(re.escape, content.split())), text)
    return match.span() if match else (-1, -1)


def _with_hints(named: list[Segment], hinted: list[Segment]) -> list[Segment]:
    """In order: the named ones, and of the others those that overlap neither a named one nor a longer one."""
    kept = list(named)
    for segment in sorted(hinted, key=lambda s: s.start - s.stop):
        if all(segment.stop <= other.start or other.stop <= segment.start for other in kept):
            kept.append(segment)
    return sorted(kept, key=lambda s: (s.start, s.stop))


def _text_before(text: str, messages: Sequence[Message], content: str) -> str | None:
    """The text up to the end of what comes before the first message with ``content``, or None if there is none."""
    cursor = 0
    for message in messages:
        if content in message["content"]:
            return text[:cursor]
        at = text.find(message["content"], cursor)
        cursor = at + len(message["content"]) if at >= 0 else cursor
    return None


def _passages(text: str, starts: list[int]) -> list[Segment]:
    """The parts of the text between blank lines, in tokens."""
    spans = [match.span() for match in _PASSAGE.finditer(text)] if starts else []
    found = [Segment("", *_tokens_between(starts, *span)) for span in spans]
    return [segment for segment in found if segment.stop > segment.start]


def _question(text: str, starts: list[int], messages: Sequence[Message]) -> tuple[int, int] | None:
    """Where the content of the last user message stands, in tokens."""
    contents = [message["content"].strip() for message in messages if message["role"] == "user"]
    at = text.rfind(contents[-1]) if contents and starts else -1
    return None if at < 0 else _tokens_between(starts, at, at + len(contents[-1]))


def _tokens_between(starts: list[int], first: int, last: int) -> tuple[int, int]:
    """The tokens of the characters from ``first`` to ``last``; the first may begin before, perhaps with a space."""
    return max(0, bisect_right(starts, first) - 1), bisect_left(starts, last)


_USUAL_TOKEN_CHARS = 4  # a text of so many for each token of the window is tokenized at once
_PIECE_CHARS = 1 << 15
_CUT_TOKENS = 16  # by so many a piece's tokens may differ from the whole text's, at its ends
_MARGIN_RATIO = 1.25  # beyond which the count of the pieces is trusted


def require_room(num_tokens: int, window: int | None, *, counted: str = "") -> None:
    """Whether a prompt leaves room for a new token.

    Args:
        num_tokens: of the prompt.
        window: context window in tokens, or None if nothing bounds it.
        counted: what stands before the number, if not all were counted.

    Raises:
        ContextWindowError: if it does not.
    """
    if window is not None and num_tokens >= window:
        raise ContextWindowError(
            f"prompt has {counted}{num_tokens} tokens; accepted is up to {window - 1}, "
            f"since the context window of {window} must also hold a new token"
        )


def require_room_for_text(text: str, window: int | None, count: Callable[[str], int]) -> None:
    """Whether a text that looks too long is not so long that this is beyond doubt; piece by piece.

    Args:
        text: the whole prompt.
        window: context window in tokens, or None.
        count: how many tokens a text has.

    Raises:
        ContextWindowError: if it is.
    """
    if window is None or len(text) <= _USUAL_TOKEN_CHARS * window:
        return
    found = 0
    for start in range(0, len(text), _PIECE_CHARS):
        found += max(0, count(text[start : start + _PIECE_CHARS]) - _CUT_TOKENS)
        if found > _MARGIN_RATIO * window:
            require_room(found, window, counted="more than ")
