"""Prompts to token ids: plain text, or messages through the tokenizer's chat template.

Token ids are always those of the whole text, so that a prompt means the same to every engine, whatever it has said
before. Where a reply was sampled in other tokens than its text has, the exact prefix of the next turn ends there. Text
far beyond the context window is refused before all of it is tokenized.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from semsharekv_integrations.errors import ContextWindowError, PromptError, is_json, show_value
from semsharekv_integrations.kv import Rendered, Segment, TokenIds
from semsharekv_integrations.text.chat_template import ChatTemplate
from semsharekv_integrations.text.tool_format import Tool, ToolFormat

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]
_PASSAGE = re.compile(r"\S(?:.|\n(?!\s*\n))*")
ROLES = ("system", "developer", "user", "assistant", "tool")
_USUAL_TOKEN_CHARS = 4  # a text of so many for each token of the window is tokenized at once
_PIECE_CHARS = 1 << 15
_CUT_TOKENS = 16  # by so many a piece's tokens may differ from the whole text's, at its ends
_MARGIN_RATIO = 1.25  # beyond which the count of the pieces is trusted


class PromptRenderer:
    """Renders prompts with one tokenizer; safe to use from several threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._chat = ChatTemplate(tokenizer)
        self._pieces: dict[int, str] = {}

    @property
    def tool_format(self) -> ToolFormat:
        """The way the model writes tool calls, learnt from its template at first use."""
        return self._chat.tool_format

    def get_stops(self, prompt: Prompt) -> tuple[str, ...]:
        """Return the strings that end every answer to ``prompt``, whatever the caller asks for; none if it is text."""
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
        """Turn ``prompt`` into token ids, and find where the texts of ``documents`` (by id) stand in it.

        Args:
            tools: shown to the model, as its template does it or in the system message.
            hints: more texts by id; they count where no document stands, the longer before the shorter.
            template_kwargs: more variables for the chat template, none of ``RENDERING_OPTIONS``.
            window: context window in tokens, or None if nothing bounds it.

        Raises:
            PromptError: if ``prompt`` is empty, malformed, text beside ``tools``, or refused by the chat template.
            ContextWindowError: if ``prompt`` leaves no room for a new token.
        """
        if not isinstance(prompt, (str, Sequence)):
            raise PromptError(f"prompt is {type(prompt).__name__}; accepted is text or a sequence of messages")
        if isinstance(prompt, str) and tools:
            raise PromptError("prompt is text; accepted with tools is a sequence of messages")
        if isinstance(prompt, str):
            messages, text, bos = None, prompt, self._tokenizer.bos_token
            adds_special = not (bos and text.startswith(bos))
        else:
            messages = _check_messages(prompt)
            text = self._chat.render(messages, tools, template_kwargs)
            adds_special = self._tokenizer.chat_template is None
        require_room_for_text(text, window, self._count)
        token_ids, offsets = self._encode(text, add_special_tokens=adds_special)
        if not token_ids:
            raise PromptError("prompt is empty; accepted is text or messages of at least one token")
        require_room(len(token_ids), window)
        starts = list(accumulate(offsets, max))
        searched = SearchedText(text, loosely=True)
        named = _find_documents(searched, starts, documents)
        return Rendered(
            np.array(token_ids, dtype=np.int64),
            _add_hints(named, _find_documents(SearchedText(text, loosely=False), starts, hints or {})),
            _find_passages(text, starts),
            None if messages is None else _find_question(text, starts, messages),
            self._find_unplaced(text, searched, starts, messages or [], documents),
        )

    def decode(self, token_ids: TokenIds) -> str:
        """Return the text of ``token_ids`` [N], without special tokens."""
        return self._decode(token_ids.tolist())

    def tokenize(self, text: str) -> TokenIds:
        """Return the tokens of a text that stands by itself, stripped, without special tokens."""
        return np.array(self._encode(text.strip(), add_special_tokens=False)[0], dtype=np.int64)

    def split_pieces(self, token_ids: TokenIds) -> list[str]:
        """Return the text of each token [N], special ones too, with the space (or ``▁``) that begins a word."""
        known = self._pieces
        for token_id in set(token_ids.tolist()) - known.keys():
            token = self._tokenizer.convert_ids_to_tokens(token_id)
            # decoding drops SentencePiece's mark for a leading space
            known[token_id] = token if token.startswith("▁") else self._decode([token_id], keep_special=True)
        return [known[token_id] for token_id in token_ids.tolist()]

    def _count(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _find_unplaced(
        self,
        text: str,
        searched: SearchedText,
        starts: list[int],
        messages: Sequence[Message],
        documents: Mapping[str, str],
    ) -> dict[str, int]:
        """Return, by id, how many tokens surely come before each document of the prompt whose place cannot be told.

        That is so where the template changed its message, or where the tokenizer does not tell where tokens start.
        """
        found = {}
        for key, content in ((key, content.strip()) for key, content in documents.items()):
            at, _ = searched.find(content)
            if not content or (at >= 0 and starts):
                continue
            before = text[:at] if at >= 0 else _find_text_before(text, messages, content)
            if before is not None:
                found[key] = max(0, self._count(before) - 2)  # some are tokenized otherwise within the whole text
        return found

    def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[list[int], list[int]]:
        """Return the token ids of text, and the characters at which they start (none if the tokenizer is slow)."""
        fast = self._tokenizer.is_fast
        encoded = self._tokenizer(
            text, add_special_tokens=add_special_tokens, return_offsets_mapping=fast, verbose=False
        )
        return list(encoded["input_ids"]), [start for start, _ in encoded["offset_mapping"]] if fast else []

    def _decode(self, token_ids: list[int], *, keep_special: bool = False) -> str:
        """Return the text of token ids, without special tokens unless ``keep_special``."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=not keep_special))


def _check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    if not messages:
        raise PromptError("prompt has no messages; accepted is at least one")
    return [_check_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _check_message(field: str, message: object) -> dict[str, Any]:
    """Return a copy of a message with text content and parsed calls; raise ``PromptError`` if it is malformed."""
    if not isinstance(message, Mapping):
        raise PromptError(f"{field} is {type(message).__name__}; accepted is a mapping with role and content")
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        raise PromptError(f"{field}.role is {role!r}; accepted is one of {', '.join(ROLES)}")
    if calls and role != "assistant":
        raise PromptError(f"{field}.tool_calls is there; accepted is it in messages of the assistant alone")
    if content is None and calls:
        content = ""
    content = _join_parts(f"{field}.content", content)
    checked = {key: value for key, value in message.items() if key != "tool_calls"} | {"content": content}
    if calls:
        checked["content"] = content.rstrip()  # templates put their own space before calls, as the model did
        checked["tool_calls"] = _check_calls(f"{field}.tool_calls", calls)
    return checked


def _join_parts(field: str, content: object) -> str:
    """Return a message's content as text, its parts joined; raise ``PromptError`` if any of it is not text."""
    if isinstance(content, str):
        return content
    said = type(content).__name__
    parts: Sequence[Any] = content if isinstance(content, list | tuple) else [None]
    for index, part in enumerate(parts):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            said += f", and [{index}] {show_value(kind)}" if part is not None else ""
            raise PromptError(f"{field} is {said}; accepted is a string, or a list of parts of type 'text' alone")
    return "".join(part["text"] for part in parts)


def _check_calls(field: str, calls: object) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise PromptError(f"{field} is {type(calls).__name__}; accepted is a list")
    return [_check_call(f"{field}[{index}]", call) for index, call in enumerate(calls)]


def _check_call(field: str, call: object) -> dict[str, Any]:
    """Return a call as id, type and function alone, arguments parsed; raise ``PromptError`` if it is malformed."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise PromptError(f"{field} is {call!r}; accepted is a mapping with id and function")
    name, arguments, id_ = function.get("name"), function.get("arguments"), call.get("id", "")
    if not isinstance(name, str) or not name:
        raise PromptError(f"{field}.function.name is {name!r}; accepted is a non-empty string")
    if not isinstance(id_, str):
        raise PromptError(f"{field}.id is {id_!r}; accepted is a string")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, strict=False)
        except ValueError as error:
            raise PromptError(f"{field}.function.arguments is no JSON ({error}): {arguments!r}") from error
    if not isinstance(arguments, Mapping):
        raise PromptError(f"{field}.function.arguments is {arguments!r}; accepted is an object, or one as JSON text")
    if not is_json(dict(arguments)):
        raise PromptError(f"{field}.function.arguments is {show_value(arguments)}; accepted is what JSON can hold")
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def _find_documents(text: SearchedText, starts: list[int], documents: Mapping[str, str]) -> list[Segment]:
    """Return where each document's text first stands, in tokens; documents that are not in the text are left out.

    ``starts`` is where each token starts, in characters; special tokens put behind the text claim the last place.
    If ``starts`` is empty, nothing is found.
    """
    found = []
    for document_id, content in documents.items():
        at, stop = text.find(content.strip())
        if at >= 0 and starts and stop > at:
            found.append(Segment(document_id, *_find_tokens(starts, at, stop)))
    return found


def _add_hints(named: list[Segment], hinted: list[Segment]) -> list[Segment]:
    """Return the named documents and the hinted ones that overlap neither a named nor a longer hinted one; in order."""
    kept = list(named)
    for segment in sorted(hinted, key=lambda s: s.start - s.stop):
        if all(segment.stop <= other.start or other.stop <= segment.start for other in kept):
            kept.append(segment)
    return sorted(kept, key=lambda s: (s.start, s.stop))


def _find_passages(text: str, starts: list[int]) -> list[Segment]:
    """Return the parts of the text between blank lines, in tokens; none if ``starts`` is empty."""
    spans = [match.span() for match in _PASSAGE.finditer(text)] if starts else []
    found = [Segment("", *_find_tokens(starts, *span)) for span in spans]
    return [segment for segment in found if segment.stop > segment.start]


def _find_question(text: str, starts: list[int], messages: Sequence[Message]) -> tuple[int, int] | None:
    """Return (start, stop), in tokens, of the last user message at its last place; None if unknown or nowhere."""
    contents = [message["content"].strip() for message in messages if message["role"] == "user"]
    at = text.rfind(contents[-1]) if contents and starts else -1
    return None if at < 0 else _find_tokens(starts, at, at + len(contents[-1]))


class SearchedText:
    """A text that others are looked for in. That takes time by its length, whatever stands in them.

    Args:
        text: where to look.
        loosely: whether space within what is looked for may be another than in ``text``.
    """

    def __init__(self, text: str, *, loosely: bool) -> None:
        self._text = text
        self._loosely = loosely

    def find(self, content: str) -> tuple[int, int]:
        """Return start, -1 if there is none, and stop of the first ``content``."""
        at = self._text.find(content)
        if at >= 0 or not self._loosely:
            return at, at + len(content)
        plain = " ".join(content.split())
        spaced, words, starts = self._spaced
        at = spaced.find(plain)
        if at < 0:
            return -1, -1
        first, last = (bisect_right(starts, place) - 1 for place in (at, at + len(plain) - 1))
        return words[first] + at - starts[first], words[last] + at + len(plain) - starts[last]

    @cached_property
    def _spaced(self) -> tuple[str, list[int], list[int]]:
        """The text with one space between words, and where each word starts: in the text, and in that."""
        found = list(re.finditer(r"\S+", self._text))
        starts = [0, *accumulate(len(word[0]) + 1 for word in found)]
        return " ".join(word[0] for word in found), [word.start() for word in found], starts[:-1]


def _find_text_before(text: str, messages: Sequence[Message], content: str) -> str | None:
    """Return the text through the last message found before the first one with ``content``; None if none has it."""
    cursor = 0
    for message in messages:
        if content in message["content"]:
            return text[:cursor]
        at = text.find(message["content"], cursor)
        cursor = at + len(message["content"]) if at >= 0 else cursor
    return None


def _find_tokens(starts: list[int], first: int, last: int) -> tuple[int, int]:
    """Return (start, stop) of the tokens of characters ``first`` to ``last``; the first token may begin before."""
    return max(0, bisect_right(starts, first) - 1), bisect_left(starts, last)


def require_room(num_tokens: int, window: int | None, *, counted: str = "") -> None:
    """Raise ``ContextWindowError`` if ``num_tokens`` fill ``window``; ``counted`` precedes them in the message."""
    if window is not None and num_tokens >= window:
        raise ContextWindowError(
            f"prompt has {counted}{num_tokens} tokens; accepted is up to {window - 1}, "
            f"since the context window of {window} must also hold a new token"
        )


def require_room_for_text(text: str, window: int | None, count: Callable[[str], int]) -> None:
    """Raise ``ContextWindowError`` if a text is surely too long. One that passes may still be.

    ``count`` returns the number of tokens of a piece of it.
    """
    if window is None or len(text) <= _USUAL_TOKEN_CHARS * window:
        return
    found = 0
    for start in range(0, len(text), _PIECE_CHARS):
        found += max(0, count(text[start : start + _PIECE_CHARS]) - _CUT_TOKENS)
        if found > _MARGIN_RATIO * window:
            require_room(found, window, counted="more than ")
