"""Messages with tool calls and tool results, checked and brought into the form that a chat template takes.

For templates that know nothing of tools: they are described in the system message, calls are text of the assistant's,
and results are user turns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from semsharekv_integrations.checks import is_json, shown
from semsharekv_integrations.errors import PromptError
from semsharekv_integrations.model.tool_format import SHORT_ID_CHARS, Tool, ToolFormat

_DESCRIPTION = """# Tools

You may call one or more of these functions to help with the request. Their signatures are between <tools> and </tools>:
<tools>
{tools}
</tools>

To call one, write its name and arguments as a JSON object between <tool_call> and </tool_call>:
<tool_call>
{{"name": "<name of the function>", "arguments": {{<its arguments>}}}}
</tool_call>"""


def checked_message(index: int, message: object, roles: Sequence[str]) -> dict[str, Any]:
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
        raise PromptError(f"{field}.function.arguments is {shown(arguments)}; accepted is what JSON can hold")
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def native_messages(messages: Sequence[dict[str, Any]], tool_format: ToolFormat) -> list[dict[str, Any]]:
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


def plain_messages(
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
    calls = tool_format.text_of([(function["name"], function["arguments"]) for function in functions])
    return {"role": "assistant", "content": f"{message['content']}\n{calls}" if message["content"] else calls}
