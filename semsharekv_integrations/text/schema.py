"""How much of a JSON schema a grammar can hold an answer to: all of it, else as much as can be, with one warning.

What is left out first are the keywords that llguidance does not know, and patterns and formats that it cannot read. Of
a schema that fails even so, nothing is left. Objects that name their properties get no others, unless their schema says
something of it: JSON Schema allows them where it does not, but no function takes arguments that it does not know.
"""

from __future__ import annotations

import json
import reprlib
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import unquote

STYLE: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
ANY_OBJECT: dict[str, Any] = {"type": "object", "x-guidance": STYLE}
_MOST_JUDGED = 4096
_OPENERS = ("additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "maxProperties")
_COMBINERS = ("allOf", "anyOf", "oneOf", "not", "if", "$ref")
_OF_SCHEMAS = ("properties", "$defs", "definitions")  # names to schemas
_SCHEMA_LISTS = ("anyOf", "oneOf", "prefixItems")


class JudgedSchema(NamedTuple):
    """The part of a schema that a grammar can hold to, or None; ``fault`` is why it is not all (empty if it is)."""

    schema: dict[str, Any] | None
    fault: str = ""


class SchemaJudge:
    """Judges schemas, each once under its name; safe to use from several threads.

    ``find_fault`` says what is wrong with a schema that has llguidance's options in it; an empty string is nothing.
    """

    def __init__(self, find_fault: Callable[[Mapping[str, Any]], str]) -> None:
        self._find_fault = find_fault
        self._judged = lru_cache(_MOST_JUDGED)(self._judge)

    def judge(self, name: str, schema: Mapping[str, Any]) -> JudgedSchema:
        """Return what can be held to of ``schema``. Warns once if that is only a part, and calls it ``name``.

        Raises:
            ValueError: if ``schema`` cannot be written as JSON.
        """
        try:
            text = json.dumps(schema)
        except (TypeError, RecursionError) as error:
            raise ValueError(f"{name} is {reprlib.repr(schema)}; accepted is a JSON schema: {error}") from error
        return self._judged(name, text)

    def _judge(self, name: str, text: str) -> JudgedSchema:
        """Judge the schema in ``text``: all of it; else, with a warning, its readable parts; else None."""
        # NaN and the infinities, which JSON does not have, become null, as everywhere where JSON is written
        schema = json.loads(text, parse_constant=lambda _: None)
        endless = _find_endless_reference(schema)
        if endless is not None:
            return JudgedSchema(None, f"$ref {endless!r} leads back to itself")
        whole = close_schema(schema) | {"x-guidance": STYLE}
        fault = self._find_fault(whole)
        if not fault:
            return JudgedSchema(whole)
        relaxed = self._drop_unreadable(whole) | {"x-guidance": STYLE | {"lenient": True}}
        if self._find_fault(relaxed):
            return JudgedSchema(None, fault)
        warnings.warn(f"not all of {name} can be held to while sampling: {fault}", stacklevel=2)
        return JudgedSchema(relaxed, fault)

    def _drop_unreadable(self, value: Any) -> Any:
        """Return a copy of a JSON value without the patterns that llguidance cannot read, at any depth."""
        if isinstance(value, list):
            return [self._drop_unreadable(inner) for inner in value]
        if not isinstance(value, Mapping):
            return value
        found = {key: self._drop_unreadable(inner) for key, inner in value.items()}
        if isinstance(found.get("pattern"), str) and not self._reads(found["pattern"]):
            del found["pattern"]
        patterns = found.get("patternProperties")
        if isinstance(patterns, dict) and not all(map(self._reads, patterns)):
            del found["patternProperties"]
        return found

    def _reads(self, pattern: str) -> bool:
        return not self._find_fault({"type": "string", "pattern": pattern, "x-guidance": STYLE})


def close_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``schema`` with unnamed properties forbidden where it says nothing of them; as it is with ``allOf``."""
    return dict(schema) if '"allOf"' in json.dumps(schema) else _close(schema)  # closing each part would leave nothing


def _close(schema: Any) -> Any:
    """Return ``schema`` closed, with the schemas in it; a value that is no mapping comes back as it is."""
    if not isinstance(schema, Mapping):
        return schema
    found = dict(schema)
    for key in _OF_SCHEMAS:
        if isinstance(found.get(key), Mapping):
            found[key] = {name: _close(inner) for name, inner in found[key].items()}
    if "items" in found:
        found["items"] = _close(found["items"])
    has_properties = "properties" in found
    for key in _SCHEMA_LISTS:
        if isinstance(found.get(key), list) and not has_properties:
            found[key] = [_close(inner) for inner in found[key]]
    if has_properties and not any(key in found for key in (*_OPENERS, *_COMBINERS)):
        found["additionalProperties"] = False
    return found


def _find_endless_reference(schema: Mapping[str, Any]) -> str | None:
    """Return a ``$ref`` that leads back to itself through references alone, so that no text can satisfy it, or None."""
    inner: list[Any] = [schema]
    while inner:
        value = inner.pop()
        inner += value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        seen: set[str] = set()
        while isinstance(value, Mapping) and isinstance(value.get("$ref"), str):
            if value["$ref"] in seen:
                return str(value["$ref"])
            seen.add(value["$ref"])
            value = _follow(schema, value["$ref"])
    return None


def _follow(schema: Any, reference: str) -> Any:
    """Return what a pointer ``#/a/b`` leads to in ``schema``; None if nothing or elsewhere, and for an anchor."""
    if reference != "#" and not reference.startswith("#/"):
        return None
    for part in reference[1:].split("/")[1:]:
        key = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(schema, Mapping):
            schema = schema.get(key)
        else:
            is_place = isinstance(schema, list) and key.isdecimal() and int(key) < len(schema)
            schema = schema[int(key)] if is_place else None
    return schema
