"""Tool calls: found in an answer while it is written, and brought into the form that a chat template takes.

Text that may still be a call is held back; what turns out to be none is text. Bare JSON, perhaps fenced, is a call in
every format if it begins the answer, or begins a line and ends the answer. Knows nothing about tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from semsharekv_integrations.errors import is_json
from semsharekv_integrations.report import ToolCall
from semsharekv_integrations.text.tool_format import SHORT_ID_CHARS, Tool, ToolFormat

_DECODER = json.JSONDecoder(strict=False)  # models write line ends into strings
_UNSURE_CHARS = 8  # JSON that breaks off this close to its end may be whole with more: "fals", "\u00e"
_BETWEEN_CALLS = " \t\r\n;"
_FENCE = r"```[\w-]*\s*"
_FENCE_BEGUN = re.compile(r"(?:^|\n)[^\S\n]*(`{1,2}|```[\w-]*\s*)$")
_FENCE_END = re.compile(r"\s*```[^\S\n]*\n?")
_FIRST_KEY = re.compile(r'[\[{\s]*(?:"(?P<key>[^"]*)(?P<end>"?)|$)')
_ARGUMENT_KEYS = ("arguments", "parameters")
_DESCRIPTION = """# Tools

You may call one or more of these functions to help with the request. Their signatures are between <tools> and </tools>:
<tools>
{tools}
</tools>

To call one, write its name and arguments as a JSON object between <tool_call> and </tool_call>:
<tool_call>
{{"name": "<name of the function>", "arguments": {{<its arguments>}}}}
</tool_call>"""


class AnswerPart(NamedTuple):
    """What became certain of an answer: visible text, and calls that are complete. Both may be empty."""

    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


class ToolCallParser:
    """Splits one answer, as it grows, into visible text and calls of the tools with these ``names``.

    In its methods, ``final`` says that no more text comes; ``bare``, that JSON stands without an opening; ``fenced``,
    that it stands in a code fence.
    """

    def __init__(self, tool_format: ToolFormat, names: Collection[str]) -> None:
        self._format = tool_format
        self._names = names
        own = (tool_format.name_key, tool_format.arguments_key)
        self._keys = {*own, *_ARGUMENT_KEYS, "name", "function", "type", "id"}
        self._held = ""  # nothing of it has been let go
        self._line_is_blank = True  # whether only space stands before the held text in its line
        self._after_call = False  # what separates calls is no text
        self._is_first = True  # whether only space and calls stand before the held text

    @property
    def holds_call(self) -> bool:
        """Whether what is held back has begun a call, which is not complete."""
        return self._find_opening(final=False)[1] is not None

    def push(self, text: str) -> AnswerPart:
        """Take more text. Return the text and the calls that became certain with it."""
        self._held += text
        return self._take(final=False)

    def finish(self) -> AnswerPart:
        """Return all that was held back until now, as text or calls."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> AnswerPart:
        """Remove from the held text what is certain (all, if ``final``). Return it as visible text and calls."""
        visible: list[str] = []
        calls: list[ToolCall] = []
        while self._held:
            start, opening = self._find_opening(final=final)
            visible.append(self._let_go(start))
            found = None if opening is None else self._read_calls(opening, final=final)
            if opening is None or found is None:
                break
            calls += found
            if not found:
                visible.append(self._let_go(len(opening) or 1))
        return AnswerPart("".join(visible), tuple(calls))

    def _let_go(self, num_chars: int) -> str:
        """Remove and return the first characters of the held text; behind a call, without what separates calls."""
        text, self._held = self._held[:num_chars], self._held[num_chars:]
        if self._after_call:
            text = text.lstrip(_BETWEEN_CALLS)
        if text:
            self._after_call = False
            self._is_first = self._is_first and not text.strip()
            _, line_end, line = text.rpartition("\n")
            self._line_is_blank = not line.strip() and (bool(line_end) or self._line_is_blank)
        return text

    def _find_opening(self, *, final: bool) -> tuple[int, str | None]:
        """Return where in the held text a call may begin, and its opening; else how much is surely text, and None."""
        marks = [mark for mark in self._format.openings if mark]
        found = [(at, mark) for mark in marks if (at := self._held.find(mark)) >= 0]
        bare = self._find_bare_start()
        if bare is not None and not final and any(mark.startswith(self._held[bare[0] :]) for mark in marks):
            return bare[0], None
        if bare is not None:
            found.append(bare)
        if found:
            return min(found, key=lambda place: place[0])
        return len(self._held) - (0 if final else self._count_unsure(marks)), None

    def _count_unsure(self, marks: Sequence[str]) -> int:
        """Return how many of the last characters held may belong to the beginning of a call."""
        begun, fence = _FENCE_BEGUN.search(self._held), 0
        if begun is not None and (begun.group().startswith("\n") or self._at_line_start):
            fence = len(self._held) - begun.start(1)
        return max(fence, *(count_overlap(self._held, mark) for mark in marks))

    @property
    def _at_line_start(self) -> bool:
        return self._line_is_blank or self._after_call

    def _find_bare_start(self) -> tuple[int, str] | None:
        """Return the place of the first bracket at a line start or behind a call, and the fence there; None if none."""
        begins = rf"(?P<fence>{_FENCE})?(?P<bracket>[\[{{])"
        first = re.match(rf"[{_BETWEEN_CALLS}]*{begins}", self._held) if self._at_line_start else None
        first = first or re.search(rf"\n[^\S\n]*{begins}", self._held)
        if first is None:
            return None
        fence = first["fence"] or ""
        return first.start("bracket") - len(fence), fence

    def _read_calls(self, opening: str, *, final: bool) -> list[ToolCall] | None:
        """Remove and return the calls at the start of the held text; empty if none, None while that is uncertain."""
        text = self._held
        start = len(opening) + len(text[len(opening) :]) - len(text[len(opening) :].lstrip())
        bare = not opening or opening.startswith("```")
        if bare and not self._may_be_a_call(text[start:]):
            return []
        try:
            value, stop = _DECODER.raw_decode(text, start)
        except json.JSONDecodeError as error:
            return None if not final and _may_become_whole(error) else []
        calls = self._convert(value, bare=bare)
        if calls and bare:
            return self._read_bare_calls(calls, text[stop:], fenced=bool(opening), final=final)
        behind = text[stop:].lstrip()
        closing = self._format.closing
        if calls and closing and not behind.startswith(closing) and not final and closing.startswith(behind):
            return None
        if calls:
            self._held, self._after_call = "" if closing.startswith(behind) else behind.removeprefix(closing), True
        return calls

    def _read_bare_calls(
        self, calls: list[ToolCall], behind: str, *, fenced: bool, final: bool
    ) -> list[ToolCall] | None:
        """Remove and return ``calls`` and those right behind; None while that is uncertain.

        Returns [] if text stands before and behind them: in a format with an opening, no call is meant then.
        """
        while next_one := re.match(rf"[{_BETWEEN_CALLS},]*(?=[\[{{])", behind):
            try:
                value, stop = _DECODER.raw_decode(behind, next_one.end())
            except json.JSONDecodeError as error:
                if not final and _may_become_whole(error):
                    return None
                break
            if not (more := self._convert(value, bare=True)):
                break
            calls, behind = calls + more, behind[stop:]
        if fenced:
            end = _FENCE_END.match(behind)
            if end is None and not final and "```".startswith(behind.strip()):
                return None
            behind = behind[end.end() :] if end else behind
        if not self._is_first and "" not in self._format.openings:
            if behind.strip(_BETWEEN_CALLS):
                return []
            if not final:
                return None
        self._held, self._after_call = behind.lstrip(), True
        return calls

    def _may_be_a_call(self, text: str) -> bool:
        """Return False if the first key of JSON that begins so, or the lack of one, shows that it is no call."""
        match = _FIRST_KEY.match(text)
        if match is None or match["key"] is None:
            return match is not None
        return match["key"] in self._keys if match["end"] else any(key.startswith(match["key"]) for key in self._keys)

    def _convert(self, value: Any, *, bare: bool) -> list[ToolCall]:
        """Return the calls in a JSON value, one or a list; an empty list if anything in it is no valid call."""
        found = [self._convert_entry(entry, bare=bare) for entry in (value if isinstance(value, list) else [value])]
        return [call for call in found if call] if all(found) else []

    def _convert_entry(self, entry: Any, *, bare: bool) -> ToolCall | None:
        """Return the call in ``entry``; None for an unknown tool or bad arguments, or if ``bare`` for none at all."""
        entry = entry.get("function", entry) if isinstance(entry, dict) else None
        if not isinstance(entry, dict):
            return None
        name = entry.get(self._format.name_key, entry.get("name"))
        keys = (self._format.arguments_key, *_ARGUMENT_KEYS)
        arguments: Any = next((entry[key] for key in keys if key in entry), None if bare else {})
        if isinstance(arguments, str):
            try:
                arguments = _DECODER.decode(arguments)
            except ValueError:
                return None
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return None
        if not is_json(arguments):  # nor could they be sent, or come back in a history
            return None
        return ToolCall.of(name, arguments)


def _may_become_whole(error: json.JSONDecodeError) -> bool:
    """Return whether more text could mend the JSON: a string has no end yet, or the fault is at the very end."""
    return error.msg.startswith("Unterminated string") or len(error.doc.rstrip()) - error.pos <= _UNSURE_CHARS


def count_overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of ``text`` that ``mark`` begins with, short of all of it; 0 if none."""
    sizes = range(min(len(mark) - 1, len(text)), 0, -1)
    return next((size for size in sizes if mark.startswith(text[-size:])), 0)


def convert_messages(messages: Sequence[dict[str, Any]], tool_format: ToolFormat) -> list[dict[str, Any]]:
    """Return checked messages for a template that knows tools: its kind of ids and arguments, and named results."""
    names = {call["id"]: call["function"]["name"] for message in messages for call in message.get("tool_calls", ())}
    if tool_format.separator is None:
        messages = _split_calls(messages)
    return [_convert_message(message, tool_format, names) for message in messages]


def _split_calls(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with each call in a message of its own, its results right behind it."""
    split: list[dict[str, Any]] = []
    moved: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        calls = message.get("tool_calls", [])
        results = list(takewhile(lambda later: later["role"] == "tool", messages[index + 1 :])) if calls[1:] else []
        for at, call in enumerate(calls):
            split.append(message | {"content": "" if at else message["content"], "tool_calls": [call]})
            own = [result for result in results if result.get("tool_call_id") == call["id"]]
            split += own
            moved += own
        if not calls and not any(message is result for result in moved):
            split.append(message)
    return split


def _convert_message(message: dict[str, Any], tool_format: ToolFormat, names: Mapping[str, str]) -> dict[str, Any]:
    """Return a copy of a message: a result with its tool's name, ids and arguments as the template takes them."""
    native = dict(message)
    shorten = _shorten_id if tool_format.takes_short_ids else lambda call_id: call_id
    if message["role"] == "tool" and message.get("tool_call_id") in names:
        native.setdefault("name", names[message["tool_call_id"]])
    if "tool_call_id" in message:
        native["tool_call_id"] = shorten(message["tool_call_id"])
    if "tool_calls" in message:
        native["tool_calls"] = []
        for call in message["tool_calls"]:
            arguments = call["function"]["arguments"]
            if tool_format.takes_json_text:
                arguments = json.dumps(arguments, ensure_ascii=False)
            native["tool_calls"].append(
                call | {"id": shorten(call["id"]), "function": call["function"] | {"arguments": arguments}}
            )
    return native


def _shorten_id(call_id: object) -> str:
    """Return ``call_id`` if it has ``SHORT_ID_CHARS`` letters or digits and no more, else a hash of that length."""
    text = str(call_id)
    if len(text) == SHORT_ID_CHARS and text.isalnum():
        return text
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()[:SHORT_ID_CHARS]


def flatten_messages(
    messages: Sequence[dict[str, Any]], tools: Sequence[Tool], tool_format: ToolFormat
) -> list[dict[str, Any]]:
    """Return checked messages with calls, results and all ``tools`` as text, for a template that knows no tools.

    A result becomes a user message, joined with the user messages beside it. The system message describes the tools.
    """
    plain: list[dict[str, Any]] = []
    for before, message in zip([None, *messages], messages, strict=False):
        turn = _flatten_message(message, tool_format)
        if before and turn["role"] == plain[-1]["role"] == "user" and "tool" in (before["role"], message["role"]):
            plain[-1] = plain[-1] | {"content": f"{plain[-1]['content']}\n\n{turn['content']}"}
        else:
            plain.append(turn)
    if not tools:
        return plain
    described = _DESCRIPTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if plain[0]["role"] != "system":
        return [{"role": "system", "content": described}, *plain]
    return [plain[0] | {"content": f"{plain[0]['content']}\n\n{described}"}, *plain[1:]]


def _flatten_message(message: dict[str, Any], tool_format: ToolFormat) -> dict[str, Any]:
    """Return a message with its calls as text, or a result as a user turn; any other message as it is."""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if "tool_calls" not in message:
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    calls = tool_format.write([(function["name"], function["arguments"]) for function in functions])
    return {"role": "assistant", "content": f"{message['content']}\n{calls}" if message["content"] else calls}
