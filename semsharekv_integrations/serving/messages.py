"""Messages and tools in OpenAI's form, as the engine takes them. Only text is read; all else is refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from semsharekv_integrations import frameworks
from semsharekv_integrations.errors import is_json, is_name, require
from semsharekv_integrations.request import make_document_id

_ROLES = {"developer": "system", "function": "tool"} | {role: role for role in ("system", "user", "assistant", "tool")}
_SAID = {"role", "content", "name", "tool_calls", "tool_call_id"}
_LEFT_OUT = {"reasoning", "reasoning_content", "annotations", "kv_cache"}  # of an answer that comes back in a history
_TEXTS = ("text", "input_text", "output_text")
_CHOICES = {"none": "none", "auto": "auto", "required": "any"}
_FORMATS = {"text": ("type",), "json_object": ("type",), "json_schema": ("type", "json_schema")}  # with their fields
PARTS_BETWEEN = "\n"  # what stands between a message's text parts


def translate_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages as chat templates take them; consecutive plain turns of one role are joined.

    Raises:
        ValueError: naming the field, for an unknown role or key, or content that is no text.
    """
    return frameworks.merge_turns(_read_turn(f"messages[{at}]", message) for at, message in enumerate(messages))


def find_parts(messages: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the texts of messages that have several parts, by a digest: these are taken for documents."""
    found: dict[str, str] = {}
    for message in messages:
        content = message.get("content")
        texts = [part["text"] for part in content if part["text"].strip()] if isinstance(content, list) else []
        found |= {make_document_id(text): text for text in texts} if len(texts) > 1 else {}
    return found


def _read_turn(field: str, message: Mapping[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    require(isinstance(role, str) and role in _ROLES, f"{field}.role", role, ", ".join(_ROLES))
    for key, value in message.items():
        known = key in _SAID or key in _LEFT_OUT or value in (None, [], {}, "")
        require(known, f"{field}.{key}", value, f"nothing; a message has {', '.join(sorted(_SAID))}")
    for key in ("name", "tool_call_id"):
        require(isinstance(message.get(key), str | None), f"{field}.{key}", message.get(key), "None or a text")
    calls = _read_calls(f"{field}.tool_calls", message.get("tool_calls"), may_call=role == "assistant")
    content = _read_content(f"{field}.content", message.get("content"), has_calls=bool(calls))
    turn: dict[str, Any] = {"role": _ROLES[str(role)], "content": content}
    if calls:
        turn["tool_calls"] = calls
    if turn["role"] == "tool":
        given = message.get("tool_call_id") or frameworks.make_function_id(message.get("name"))
        turn |= {"tool_call_id": given} | ({"name": message["name"]} if message.get("name") else {})
    return turn


def _read_content(field: str, content: Any, *, has_calls: bool) -> str:
    if content is None and has_calls:
        return ""
    if isinstance(content, str):
        return content
    require(isinstance(content, list), field, content, "a text, or a list of text parts")
    return PARTS_BETWEEN.join(_read_parts(field, content))


def _read_parts(field: str, parts: Sequence[Any]) -> Iterator[str]:
    for at, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        require(kind in _TEXTS, f"{field}[{at}].type", kind, "'text': this model reads nothing else")
        require(isinstance(part.get("text"), str), f"{field}[{at}].text", part.get("text"), "a text")
        yield part["text"]


def _read_calls(field: str, calls: Any, *, may_call: bool) -> list[dict[str, Any]]:
    require(calls is None or isinstance(calls, list), field, calls, "None or a list of calls")
    require(may_call or not calls, field, calls, "none but in a message of the assistant")
    return [_read_call(f"{field}[{at}]", call) for at, call in enumerate(calls or ())]


def _read_call(field: str, call: Any) -> dict[str, Any]:
    is_call = isinstance(call, Mapping) and call.get("type") == "function"
    function = call["function"] if is_call and isinstance(call.get("function"), Mapping) else {}
    form = '{"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}'
    require(is_name(function.get("name")), field, call, form)
    arguments = frameworks.parse_arguments(function.get("arguments"))
    is_known = arguments is not None and is_json(arguments)
    require(is_known, f"{field}.function.arguments", function.get("arguments"), "JSON text of an object")
    named = {"name": function["name"], "arguments": arguments}
    return {"id": str(call.get("id") or ""), "type": "function", "function": named}


def translate_choice(choice: Any, tools: Sequence[Mapping[str, Any]] = ()) -> str | None:
    """Return which of ``tools`` the model may or must call as the engine says it; ``ValueError`` for no such choice."""
    if choice is None:
        return None
    functions = [tool.get("function") for tool in tools]
    names = [function.get("name") for function in functions if isinstance(function, Mapping)]
    kinds = tuple(_CHOICES) if tools else ("none", "auto")
    accepted = f"{', '.join(kinds)}, or {{'type': 'function', 'function': {{'name': ...}}}} with a name of tools"
    if isinstance(choice, str):
        require(choice in kinds, "tool_choice", choice, accepted)
        return _CHOICES[choice]
    function = choice["function"] if isinstance(choice.get("function"), Mapping) else {}
    is_there = choice.get("type") == "function" and isinstance(function.get("name"), str) and function["name"] in names
    require(is_there, "tool_choice", choice, accepted)
    return str(function["name"])


def translate_format(wanted: Mapping[str, Any] | None, *, may_call: bool = False) -> Mapping[str, Any] | None:
    """Return the JSON schema that a ``response_format`` asks for, or None for text; ``ValueError`` for others.

    Where the model ``may_call`` tools, only text is accepted.
    """
    kind = "text" if wanted is None else wanted.get("type")
    require(isinstance(kind, str) and kind in _FORMATS, "response_format.type", kind, ", ".join(_FORMATS))
    if wanted is None or kind == "text":
        return None
    require(not may_call, "response_format", wanted, "text with tools, unless tool_choice is none")
    _refuse_more("response_format", wanted, _FORMATS[str(kind)])
    named = {} if wanted.get("json_schema") is None else wanted["json_schema"]
    require(isinstance(named, Mapping), "response_format.json_schema", named, '{"name": ..., "schema": ...}')
    _refuse_more("response_format.json_schema", named, ("name", "description", "schema", "strict"))
    if kind == "json_object":
        return {"type": "object"}
    schema = named.get("schema")
    require(isinstance(schema, Mapping), "response_format.json_schema.schema", schema, "a JSON schema")
    return schema


def _refuse_more(field: str, given: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise ``ValueError`` for the first key that is not among ``names``, and says something."""
    for name, value in given.items():
        require(name in names or value is None, f"{field}.{name}", value, f"nothing; there are {', '.join(names)}")
