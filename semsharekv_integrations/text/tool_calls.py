"""Finds tool calls in an answer while it is written.

Text that may still become a call is held back. What turns out to be none, because its JSON is broken or names no tool
that was given, is text like any other: nothing is lost. Bare JSON, perhaps fenced, is read as calls in every format,
where it begins the answer, or where it begins a line and ends the answer. Knows nothing about tokens.

Messages with tool calls and tool results, checked and brought into the form that a chat template takes.

For templates that know nothing of tools: they are described in the system message, calls are text of the assistant's,
and results are user turns.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from semsharekv_integrations.errors import PromptError, is_json, show_value
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


class AnswerPart(NamedTuple):
    """What became certain: visible text, and calls that are complete."""

    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


class ToolCallParser:
    """The calls of one answer.

    Args:
        tool_format: how they are written.
        names: of the tools that may be called.
    """

    def __init__(self, tool_format: ToolFormat, names: Collection[str]) -> None:
        self._format = tool_format
        self._names = names
        self._keys = {
            tool_format.name_key,
            tool_format.arguments_key,
            "name",
            *_ARGUMENT_KEYS,
            "function",
            "type",
            "id",
        }
        self._held = ""  # nothing of it has been let go
        self._line_is_blank = True  # whether only space stands before the held text in its line
        self._after_call = False  # what separates calls is no text
        self._is_first = True  # whether only space and calls stand before the held text

    def push(self, text: str) -> AnswerPart:
        """What became certain with more text."""
        self._held += text
        return self._taken(final=False)

    def finish(self) -> AnswerPart:
        """What was held back until now."""
        return self._taken(final=True)

    def _taken(self, *, final: bool) -> AnswerPart:
        visible: list[str] = []
        calls: list[ToolCall] = []
        while self._held:
            start, opening = self._opening(final=final)
            visible.append(self._let_go(start))
            found = None if opening is None else self._calls_behind(opening, final=final)
            if opening is None or found is None:
                break
            calls += found
            if not found:
                visible.append(self._let_go(len(opening) or 1))
        return AnswerPart("".join(visible), tuple(calls))

    def _let_go(self, num_chars: int) -> str:
        """The first characters of what is held, as text."""
        text, self._held = self._held[:num_chars], self._held[num_chars:]
        if self._after_call:
            text = text.lstrip(_BETWEEN_CALLS)
        if text:
            self._after_call = False
            self._is_first = self._is_first and not text.strip()
            _, line_end, line = text.rpartition("\n")
            self._line_is_blank = not line.strip() and (bool(line_end) or self._line_is_blank)
        return text

    def _opening(self, *, final: bool) -> tuple[int, str | None]:
        """Where a call may begin in what is held, and with what; or how much is certainly text, and None."""
        marks = [mark for mark in self._format.openings if mark]
        found = [(at, mark) for mark in marks if (at := self._held.find(mark)) >= 0]
        bare = self._bare_start()
        if bare is not None and not final and any(mark.startswith(self._held[bare[0] :]) for mark in marks):
            return bare[0], None
        if bare is not None:
            found.append(bare)
        if found:
            return min(found, key=lambda place: place[0])
        return len(self._held) - (0 if final else self._num_unsure(marks)), None

    def _num_unsure(self, marks: Sequence[str]) -> int:
        """How many of the last characters may belong to the beginning of a call."""
        begun = _FENCE_BEGUN.search(self._held)
        starts_line = begun is not None and (
            self._held[begun.start() : begun.start() + 1] == "\n" or self._at_line_start
        )
        fence = len(self._held) - begun.start(1) if begun and starts_line else 0
        return max(fence, *(count_overlap(self._held, mark) for mark in marks))

    @property
    def _at_line_start(self) -> bool:
        return self._line_is_blank or self._after_call

    def _bare_start(self) -> tuple[int, str] | None:
        """The first bracket that begins a line, or follows a call, with the fence before it if there is one."""
        begins = rf"(?P<fence>{_FENCE})?(?P<bracket>[\[{{])"
        first = re.match(rf"[{_BETWEEN_CALLS}]*{begins}", self._held)
        if first is None or not self._at_line_start:
            first = re.search(rf"\n[^\S\n]*{begins}", self._held)
        if first is None:
            return None
        fence = first["fence"] or ""
        return first.start("bracket") - len(fence), fence

    def _calls_behind(self, opening: str, *, final: bool) -> list[ToolCall] | None:
        """The calls that the held text begins with, taken out of it; empty if none, None while that is uncertain."""
        text = self._held
        start = len(opening) + len(text[len(opening) :]) - len(text[len(opening) :].lstrip())
        bare = not opening or opening.startswith("```")
        if bare and not self._may_be_a_call(text[start:]):
            return []
        try:
            value, stop = _DECODER.raw_decode(text, start)
        except json.JSONDecodeError as error:
            return None if not final and _may_become_whole(error) else []
        calls = self._calls_in(value, bare=bare)
        if calls and bare:
            return self._bare_calls(calls, text[stop:], fenced=bool(opening), final=final)
        behind = text[stop:].lstrip()
        closing = self._format.closing
        if calls and closing and not behind.startswith(closing) and not final and closing.startswith(behind):
            return None
        if calls:
            self._held, self._after_call = behind.removeprefix(closing), True
        return calls

    def _bare_calls(self, calls: list[ToolCall], behind: str, *, fenced: bool, final: bool) -> list[ToolCall] | None:
        """``calls`` and those right behind, with the rest left to be read, if they are meant; as ``_calls_behind``."""
        while next_one := re.match(rf"[{_BETWEEN_CALLS},]*(?=[\[{{])", behind):
            try:
                value, stop = _DECODER.raw_decode(behind, next_one.end())
            except json.JSONDecodeError as error:
                if not final and _may_become_whole(error):
                    return None
                break
            if not (more := self._calls_in(value, bare=True)):
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
        """Whether JSON with such a beginning may be a call, so far as its first key tells."""
        match = _FIRST_KEY.match(text)
        if match is None or match["key"] is None:
            return match is not None
        return match["key"] in self._keys if match["end"] else any(key.startswith(match["key"]) for key in self._keys)

    def _calls_in(self, value: Any, *, bare: bool) -> list[ToolCall]:
        """The calls that a JSON value is; none if anything in it is not one."""
        found = [self._call_of(entry, bare=bare) for entry in (value if isinstance(value, list) else [value])]
        return [call for call in found if call] if all(found) else []

    def _call_of(self, entry: Any, *, bare: bool) -> ToolCall | None:
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
        return ToolCall.of(name, arguments)


def _may_become_whole(error: json.JSONDecodeError) -> bool:
    """Whether more text could mend it: a string that has no end yet, or a fault at the very end."""
    return error.msg.startswith("Unterminated string") or len(error.doc.rstrip()) - error.pos <= _UNSURE_CHARS


def count_overlap(text: str, mark: str) -> int:
    """Length of the longest end of ``text`` that ``mark`` begins with."""
    sizes = range(min(len(mark) - 1, len(text)), 0, -1)
    return next((size for size in sizes if mark.startswith(text[-size:])), 0)


_DESCRIPTION = """# Tools

You may call one or more of these functions to help with the request. Their signatures are between <tools> and </tools>:
<tools>
{tools}
</tools>

To call one, write its name and arguments as a JSON object between <tool_call> and </tool_call>:
<tool_call>
{{"name": "<name of the function>", "arguments": {{<its arguments>}}}}
</tool_call>"""


def check_message(index: int, message: object, roles: Sequence[str]) -> dict[str, Any]:
    """A message with text content, and perhaps tool calls with their arguments as a mapping.

    Raises:
        PromptError: naming what is wrong with it.
    """
    field = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise PromptError(f"{field} is {type(message).__name__}; accepted is a mapping with role and content")
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in roles:
        raise PromptError(f"{field}.role is {role!r}; accepted is one of {', '.join(roles)}")
    if calls and role != "assistant":
        raise PromptError(f"{field}.tool_calls is there; accepted is it in messages of the assistant alone")
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise PromptError(f"{field}.content is {type(content).__name__}; accepted is a string")
    checked = {key: value for key, value in message.items() if key != "tool_calls"} | {"content": content}
    if calls:
        checked["content"] = content.rstrip()  # templates put their own space before calls, as the model did
        checked["tool_calls"] = _checked_calls(f"{field}.tool_calls", calls)
    return checked


def _checked_calls(field: str, calls: object) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise PromptError(f"{field} is {type(calls).__name__}; accepted is a list")
    return [_checked_call(f"{field}[{index}]", call) for index, call in enumerate(calls)]


def _checked_call(field: str, call: object) -> dict[str, Any]:
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


def convert_messages(messages: Sequence[dict[str, Any]], tool_format: ToolFormat) -> list[dict[str, Any]]:
    """Checked messages for a template that knows tools: ids and arguments as it takes them, results with names."""
    names = {call["id"]: call["function"]["name"] for message in messages for call in message.get("tool_calls", ())}
    if tool_format.separator is None:
        messages = _one_call_each(messages)
    return [_native(message, tool_format, names) for message in messages]


def _one_call_each(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each call in a message of its own, with its result right behind it."""
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


def _native(message: dict[str, Any], tool_format: ToolFormat, names: Mapping[str, str]) -> dict[str, Any]:
    native = dict(message)
    if message["role"] == "tool" and message.get("tool_call_id") in names:
        native.setdefault("name", names[message["tool_call_id"]])
    if tool_format.takes_short_ids and "tool_call_id" in message:
        native["tool_call_id"] = _short(message["tool_call_id"])
    if "tool_calls" in message:
        native["tool_calls"] = [_native_call(call, tool_format) for call in message["tool_calls"]]
    return native


def _native_call(call: dict[str, Any], tool_format: ToolFormat) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    if tool_format.takes_json_text:
        arguments = json.dumps(arguments, ensure_ascii=False)
    id_ = _short(call["id"]) if tool_format.takes_short_ids else call["id"]
    return call | {"id": id_, "function": function | {"arguments": arguments}}


def _short(call_id: object) -> str:
    """An id of the length that some templates want, the same for the same id."""
    text = str(call_id)
    if len(text) == SHORT_ID_CHARS and text.isalnum():
        return text
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()[:SHORT_ID_CHARS]


def flatten_messages(
    messages: Sequence[dict[str, Any]], tools: Sequence[Tool], tool_format: ToolFormat
) -> list[dict[str, Any]]:
    """Checked messages for a template that knows no tools: everything about them in the text of other messages."""
    plain: list[dict[str, Any]] = []
    for before, message in zip([None, *messages], messages, strict=False):
        turn = _plain(message, tool_format)
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


def _plain(message: dict[str, Any], tool_format: ToolFormat) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if "tool_calls" not in message:
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    calls = tool_format.write([(function["name"], function["arguments"]) for function in functions])
    return {"role": "assistant", "content": f"{message['content']}\n{calls}" if message["content"] else calls}
