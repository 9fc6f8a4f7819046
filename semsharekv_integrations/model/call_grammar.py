"""Grammars of tool calls, written in llguidance's Lark: as a template writes them, with arguments of their schemas.

Objects that name their properties get no others, unless their schema says something of it: ``additionalProperties``
is true where a schema does not mention it, but no function takes arguments that it does not know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from semsharekv_integrations.model.tool_format import Tool, ToolFormat

STYLE: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_RULES = r"""COLON: /: ?/
COMMA: /, ?/
SPACE: /[ \n]{1,2}/
TEXT: /(.|\n)*/
"""
_OPENERS = ("additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "maxProperties")
_COMBINERS = ("allOf", "anyOf", "oneOf", "not", "if", "$ref")
_OF_SCHEMAS = ("properties", "$defs", "definitions")  # names to schemas
_SCHEMA_LISTS = ("anyOf", "oneOf", "prefixItems")


class CallGrammar:
    """The calls of some tools in one format.

    Args:
        tool_format: how they are written.
        tools: in OpenAI's form.
        schemas: of the tools' arguments, with llguidance's options in them.
        special: ids of the special tokens by their text.
    """

    def __init__(
        self,
        tool_format: ToolFormat,
        tools: Sequence[Tool],
        schemas: Sequence[Mapping[str, Any]],
        special: Mapping[str, int],
    ) -> None:
        self._format = tool_format
        self._calls = [(tool["function"]["name"], schema) for tool, schema in zip(tools, schemas, strict=True)]
        self._special = special

    def forced(self) -> str:
        """One call and nothing else, spaced as the template does."""
        space = _literal(self._format.space)
        opening, closing = self._parts(self._format.opening), self._parts(self._format.closing)
        body = '"[" call "]"' if self._format.in_list else "call"
        before, behind = [*opening, space] if opening else [], [space, *closing] if closing else []
        return self._whole(" ".join([*before, body, *behind]))

    def opened(self) -> str:
        """Free text with calls in it, where spacing is the model's own."""
        first, *rest = self._parts(self._format.opening)
        head = f"head[lazy]: TEXT {first}" if first.startswith('"') else f"head: TEXT {first}"
        closing = self._parts(self._format.closing)
        body = '"[" call (COMMA call)* "]"' if self._format.in_list else "call"
        behind = " ".join(["SPACE?", *closing]) if closing else ""
        start = f"(head {' '.join(rest)} SPACE? {body} {behind})* TEXT"
        return self._whole(start) + f"{head}\n"

    def _whole(self, start: str) -> str:
        calls = " | ".join(f"call_{index}" for index in range(len(self._calls)))
        rules = "".join(self._rules(index, *call) for index, call in enumerate(self._calls))
        return f"%llguidance {{}}\nstart: {start}\ncall: {calls}\n{rules}{_RULES}"

    def _rules(self, index: int, name: str, schema: Mapping[str, Any]) -> str:
        written = sorted({json.dumps(name), json.dumps(name, ensure_ascii=False)})
        named = f"{_literal(json.dumps(self._format.name_key))} COLON ({' | '.join(map(_literal, written))})"
        arguments = f"{_literal(json.dumps(self._format.arguments_key))} COLON arguments_{index}"
        return f'call_{index}: "{{" {named} COMMA {arguments} "}}"\narguments_{index}: %json {json.dumps(schema)}\n'

    def _parts(self, text: str) -> list[str]:
        """Special tokens and literals that make up ``text``."""
        if not self._special:
            return [_literal(text)] if text else []
        found = re.split("(" + "|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) + ")", text)
        return [f"<[{self._special[part]}]>" if part in self._special else _literal(part) for part in found if part]


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """``schema`` without properties that it does not name, wherever it says nothing of others.

    Schemas that combine several with ``allOf`` stay as they are, since closing each would leave nothing.
    """
    return dict(schema) if '"allOf"' in json.dumps(schema) else _closed(schema)


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    found = dict(schema)
    for key in _OF_SCHEMAS:
        if isinstance(found.get(key), Mapping):
            found[key] = {name: _closed(inner) for name, inner in found[key].items()}
    if "items" in found:
        found["items"] = _closed(found["items"])
    has_properties = "properties" in found
    for key in _SCHEMA_LISTS:
        if isinstance(found.get(key), list) and not has_properties:
            found[key] = [_closed(inner) for inner in found[key]]
    if has_properties and not any(key in found for key in (*_OPENERS, *_COMBINERS)):
        found["additionalProperties"] = False
    return found
