"""What one answer's tokens say, and what they are held to: text, tool calls, JSON of a schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from semsharekv_integrations.model.grammar import Constraint, Grammars
from semsharekv_integrations.model.text import StopStrings, TextStream, special_tokens
from semsharekv_integrations.model.tool_format import Tool, ToolFormat
from semsharekv_integrations.model.tool_parser import Said, ToolCallParser


class AnswerText:
    """The text and the tool calls of one answer as it grows.

    Args:
        stream: tokens to text.
        constraint: what the answer is held to, or None.
    """

    def __init__(self, stream: TextStream, constraint: Constraint | None) -> None:
        self._stream = stream
        self.constraint = constraint

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended it."""
        return self._stream.stopped

    def push(self, token_id: int) -> Said:
        """What became certain with this token."""
        return Said(self._stream.push(token_id))

    def finish(self) -> Said:
        """What was held back until now."""
        return Said(self._stream.finish())


class CallingText(AnswerText):
    """An answer that may hold tool calls. Stop strings end its visible text; within a call they mean nothing.

    Args:
        stream: tokens to text, which goes on at stop strings that name no special tokens.
        constraint: what the answer is held to, or None.
        parser: finds the calls.
        stop: all stop strings.
    """

    def __init__(
        self, stream: TextStream, constraint: Constraint | None, parser: ToolCallParser, stop: Sequence[str]
    ) -> None:
        super().__init__(stream, constraint)
        self._parser = parser
        self._stop = StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended it."""
        return self._stream.stopped or self._stop.stopped

    def push(self, token_id: int) -> Said:
        """What became certain with this token."""
        text, calls = self._parser.push(self._stream.push(token_id))
        return Said(self._stop.push(text), calls)

    def finish(self) -> Said:
        """What was held back until now; nothing if a stop string ended the visible text."""
        if self._stop.stopped:
            return Said()
        first, last = self._parser.push(self._stream.finish()), self._parser.finish()
        return Said(self._stop.push(first.text + last.text, final=True), first.tool_calls + last.tool_calls)


class AnswerTexts:
    """Begins the answers of one model.

    Args:
        tokenizer: of the model.
        end_ids: its end-of-sequence tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._special = special_tokens(tokenizer)
        self._grammars = Grammars(tokenizer, end_ids)

    def plain(self, stop: Sequence[str], json_schema: Mapping[str, Any] | None) -> AnswerText:
        """An answer without tool calls, of nothing yet; JSON of ``json_schema`` if that is not None.

        Raises:
            ValueError: if it is no schema, or nothing can be valid.
            UnsupportedModelError: if it is there, and the tokenizer does not allow it.
        """
        constraint = None if json_schema is None else self._grammars.json(json_schema)
        return AnswerText(TextStream(self._tokenizer, stop, special=self._special), constraint)

    def calling(self, stop: Sequence[str], tool_format: ToolFormat, tools: Sequence[Tool], choice: str) -> AnswerText:
        """An answer that may call ``tools``, of nothing yet; ``choice`` is any tool choice but ``none``.

        Raises:
            UnsupportedModelError: if a call is forced, and the tokenizer does not allow it.
        """
        by_name = {tool["function"]["name"]: tool for tool in tools}
        special = [text for text in stop if any(token in text for token in self._special.values())]
        stream = TextStream(self._tokenizer, special, tool_format.marks(self._tokenizer), self._special, stop)
        constraint = self._held_to_calls(tool_format, by_name, choice)
        return CallingText(stream, constraint, ToolCallParser(tool_format, by_name), stop)

    def _held_to_calls(self, tool_format: ToolFormat, tools: Mapping[str, Tool], choice: str) -> Constraint | None:
        """A call where one is wanted; where it is up to the model, only if a call's beginning cannot be mistaken."""
        if choice == "any":
            return self._grammars.forced_calls(tool_format, list(tools.values()))
        if choice != "auto":
            return self._grammars.forced_calls(tool_format, [tools[choice]])
        unmistakable = bool(tool_format.opening) and self._grammars.is_possible
        return self._grammars.opened_calls(tool_format, list(tools.values())) if unmistakable else None
