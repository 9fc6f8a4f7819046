"""From the tokens of an answer to its text and tool calls, piece by piece as they become certain.

A piece has whole characters only, and nothing that may belong to a stop string. Where several stop strings stand in the
text, the one that is complete first ends it (the longest, of several that end together): so the text does not depend on
how it was cut into tokens. Special tokens have no text, but stop strings may name them, alone or among other text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from semsharekv_integrations.text.grammar import Constraint, GrammarFactory
from semsharekv_integrations.text.tool_calls import AnswerPart, ToolCallParser, count_overlap
from semsharekv_integrations.text.tool_format import Tool, ToolFormat

_INCOMPLETE = "\ufffd"
_FIRST_MARKER = 0xD800  # lone surrogates stand for special tokens, as no decoded text has any


class AnswerReaderFactory:
    """Makes a reader for each answer of one model. Its methods raise what those of ``GrammarFactory`` raise."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._special = collect_special_tokens(tokenizer)
        self._grammars = GrammarFactory(tokenizer, end_ids)

    def begin_plain(self, stop: Sequence[str], json_schema: Mapping[str, Any] | None) -> AnswerReader:
        """Make the reader of an answer without tool calls. A ``json_schema`` constrains the answer to such JSON."""
        constraint = None if json_schema is None else self._grammars.build_json(json_schema)
        return AnswerReader(TextStream(self._tokenizer, stop, special=self._special), constraint)

    def begin_calling(
        self, stop: Sequence[str], tool_format: ToolFormat, tools: Sequence[Tool], choice: str
    ) -> AnswerReader:
        """Make the reader of an answer that may call ``tools``; ``choice`` is ``auto``, ``any`` or the name of one."""
        by_name = {tool["function"]["name"]: tool for tool in tools}
        special = [text for text in stop if any(token in text for token in self._special.values())]
        stream = TextStream(self._tokenizer, special, tool_format.find_marks(self._tokenizer), self._special, stop)
        tools, constraint = list(by_name.values()), None
        if choice != "auto":
            constraint = self._grammars.build_forced_calls(tool_format, tools if choice == "any" else [by_name[choice]])
        elif tool_format.opening and self._grammars.is_possible:  # without it, a call's beginning may be plain text
            constraint = self._grammars.build_opened_calls(tool_format, tools)
        return AnswerReader(stream, constraint, ToolCallParser(tool_format, by_name), stop)


class AnswerReader:
    """Turns the tokens of one answer into its visible text and its tool calls, as it grows.

    Args:
        stream: turns tokens into text; where calls may come, it ends only at stop strings that name special tokens.
        stop: strings that end the visible text where calls may come; within a call, a cut one too, they mean nothing.
    """

    def __init__(
        self,
        stream: TextStream,
        constraint: Constraint | None = None,
        parser: ToolCallParser | None = None,
        stop: Sequence[str] = (),
    ) -> None:
        self.constraint = constraint
        self._stream = stream
        self._parser = parser
        self._stop = StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """True once a stop string has ended the visible text."""
        return self._stream.stopped or self._stop.stopped

    def push(self, token_id: int) -> AnswerPart:
        """Take one more token. Return the text and the complete calls that became certain with it, if any."""
        part = AnswerPart(self._stream.push(token_id))
        if self._parser is None:
            return part
        part = self._parser.push(part.text)
        return part._replace(text=self._stop.push(part.text))

    def finish(self) -> AnswerPart:
        """Return the text and the calls held back until now. Nothing that stands behind a stop string is in it."""
        if self._stop.stopped:
            return AnswerPart()
        rest = self._stream.finish()
        if self._parser is None:
            return AnswerPart(rest)
        first = self._parser.push(rest)
        is_cut, last = self._parser.holds_call, self._parser.finish()
        calls = first.tool_calls + last.tool_calls
        if not is_cut:
            return AnswerPart(self._stop.push(first.text + last.text, final=True), calls)
        text = self._stop.push(first.text, final=True)
        return AnswerPart(text if self._stop.stopped else text + last.text, calls)


class TextStream:
    """Turns the tokens of one generation into its text, as it grows, up to a stop string.

    Args:
        marks: special tokens whose text is kept.
        token_stop: strings that end the text where they name a special token or half of one; ``stop`` if None.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str],
        marks: Collection[int] = frozenset(),
        special: Mapping[int, str] | None = None,
        token_stop: Sequence[str] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._marks = marks
        self._special = collect_special_tokens(tokenizer) if special is None else special
        silent = {token: id_ for id_, token in self._special.items() if id_ not in marks}
        with_tokens, self._markers = _mark_tokens(stop if token_stop is None else token_stop, silent)
        self._stop = StopStrings(stop)
        self._token_stop = StopStrings(with_tokens)
        self._endings = {id_ for id_, marker in self._markers.items() if marker in with_tokens}
        self._ids: list[int] = []
        self._context_start = 0  # decoding starts here: some tokenizers space a token only behind another
        self._text_start = 0  # tokens before this are in the text already

    @property
    def stopped(self) -> bool:
        """True once a stop string is complete."""
        return self._stop.stopped or self._token_stop.stopped

    def push(self, token_id: int) -> str:
        """Take one more token. Return the text that became certain with it, or an empty string."""
        self._ids.append(token_id)
        ends = token_id in self._endings
        return self._release(self._decode_new(final=ends) + self._markers.get(token_id, ""), final=ends)

    def finish(self) -> str:
        """Return the text held back until now; an empty string if a stop string has ended the text."""
        return "" if self.stopped else self._release(self._decode_new(final=True), final=True)

    def _release(self, text: str, *, final: bool) -> str:
        """Return the text before a stop string, without markers. Hold back what may begin one, unless ``final``."""
        if self._markers:
            text = self._token_stop.push(text, final=final)
            text = "".join(char for char in text if char not in self._markers.values())
        return self._stop.push(text, final=final or self._token_stop.stopped)

    def _decode_new(self, *, final: bool) -> str:
        """Return the text of the latest tokens. It is empty while a character is incomplete, unless ``final``."""
        context = self._decode(self._ids[self._context_start : self._text_start])
        whole = self._decode(self._ids[self._context_start :])
        if len(whole) <= len(context) or (whole.endswith(_INCOMPLETE) and not final):
            return ""
        self._context_start, self._text_start = self._text_start, len(self._ids)
        return whole[len(context) :]

    def _decode(self, ids: list[int]) -> str:
        kept = [token_id for token_id in ids if token_id in self._marks or token_id not in self._special]
        return str(self._tokenizer.decode(kept, skip_special_tokens=not self._marks))


class StopStrings:
    """Cuts off a text before the first of the strings ``stop`` that is complete; takes no more text after that."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stopped = False
        self._stop = stop
        self._held = ""  # may be the start of a stop string

    def push(self, text: str, *, final: bool = False) -> str:
        """Take more text and return what is certain: the text before a stop string, at which this sets ``stopped``.

        Hold back what may begin a stop string, unless ``final``: no more text comes.
        """
        self._held += text
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            released, self._held = self._held[: min(found)[1]], ""
            return released
        overlaps = () if final else (count_overlap(self._held, stop) for stop in self._stop)
        cut = len(self._held) - max(overlaps, default=0)
        released, self._held = self._held[:cut], self._held[cut:]
        return released


def collect_special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the texts of special tokens by id: those that the tokenizer has a use for, or marks as special."""
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return named | added


def _mark_tokens(stop: Sequence[str], special: Mapping[str, int]) -> tuple[list[str], dict[int, str]]:
    """Return the stop strings that name special tokens, with a marker character for each token, and the markers by id.

    A special token that begins or ends with a stop string counts as a stop string itself, as it does to transformers.
    """
    halved = {token for token in special if any(token.startswith(text) or token.endswith(text) for text in stop)}
    named = sorted(halved.union(token for token in special if any(token in text for text in stop)), key=len)[::-1]
    if not named:
        return [], {}
    markers = {token: chr(_FIRST_MARKER + at) for at, token in enumerate(named)}
    pattern = re.compile("|".join(map(re.escape, named)))
    found = [pattern.sub(lambda match: markers[match[0]], text) for text in stop if pattern.search(text)]
    found += [markers[token] for token in named if token in halved and markers[token] not in found]
    return found, {special[token]: marker for token, marker in markers.items()}
