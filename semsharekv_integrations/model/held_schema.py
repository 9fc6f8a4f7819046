"""How much of a JSON schema a grammar can hold an answer to: all of it, else as much as can be, which is said once.

What is left out first are the keywords that llguidance does not know, and patterns and formats that it cannot read;
where that is not enough, tools get any JSON object.
"""

from __future__ import annotations

import json
import reprlib
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote

from semsharekv_integrations.forks import hold_at_forks
from semsharekv_integrations.model.call_grammar import STYLE, closed

ANY_OBJECT: dict[str, Any] = {"type": "object", "x-guidance": STYLE}
_MOST_JUDGED = 4096


class HeldSchema(NamedTuple):
    """What a grammar is made of, with llguidance's options in it; ``fault`` is why that is not the whole schema."""

    schema: dict[str, Any] | None
    fault: str = ""


class HeldSchemas:
    """Judges schemas, each once; safe to use from several threads.

    Args:
        fault_of: what is wrong with a schema that has llguidance's options in it; nothing if a grammar can be made.
    """

    def __init__(self, fault_of: Callable[[Mapping[str, Any]], str]) -> None:
        self._fault_of = fault_of
        self._judged: dict[str, HeldSchema] = {}
        self._lock = hold_at_forks(threading.Lock())

    def of(self, name: str, schema: Mapping[str, Any]) -> HeldSchema:
        """As much of ``schema`` as can be held to, or None; ``name`` is what the warning calls it.

        Raises:
            ValueError: if it is no JSON.
        """
        try:
            text = json.dumps(schema)
        except (TypeError, RecursionError) as error:
            raise ValueError(f"{name} is {reprlib.repr(schema)}; accepted is a JSON schema: {error}") from error
        with self._lock:
            known = self._judged.get(text)
        if known is not None:
            return known
        judged = self._judge(json.loads(text, parse_constant=_null))
        if judged.fault and judged.schema is not None:
            warnings.warn(f"not all of {name} can be held to while sampling: {judged.fault}", stacklevel=2)
        with self._lock:
            if len(self._judged) >= _MOST_JUDGED:
                self._judged.clear()
            self._judged[text] = judged
        return judged

    def _judge(self, schema: Mapping[str, Any]) -> HeldSchema:
        endless = _endless_reference(schema)
        if endless is not None:
            return HeldSchema(None, f"$ref {endless!r} leads back to itself")
        whole = closed(schema) | {"x-guidance": STYLE}
        fault = self._fault_of(whole)
        if not fault:
            return HeldSchema(whole)
        relaxed = self._readable(whole) | {"x-guidance": STYLE | {"lenient": True}}
        return HeldSchema(None if self._fault_of(relaxed) else relaxed, fault)

    def _readable(self, value: Any) -> Any:
        """``value`` without the patterns that cannot be read."""
        if isinstance(value, list):
            return [self._readable(inner) for inner in value]
        if not isinstance(value, Mapping):
            return value
        found = {key: self._readable(inner) for key, inner in value.items()}
        if isinstance(found.get("pattern"), str) and not self._reads(found["pattern"]):
            del found["pattern"]
        patterns = found.get("patternProperties")
        if isinstance(patterns, dict) and not all(map(self._reads, patterns)):
            del found["patternProperties"]
        return found

    def _reads(self, pattern: str) -> bool:
        return not self._fault_of({"type": "string", "pattern": pattern, "x-guidance": STYLE})


def _null(name: str) -> None:
    """NaN and the infinities, which JSON does not have: null in their place, as everywhere where JSON is written."""


def _endless_reference(schema: Mapping[str, Any]) -> str | None:
    """A ``$ref`` from which references lead back to it, past nothing that would end them: no text can satisfy it."""
    inner: list[Any] = [schema]
    while inner:
        value = inner.pop()
        inner += value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        seen: set[str] = set()
        while isinstance(value, Mapping) and isinstance(value.get("$ref"), str):
            if value["$ref"] in seen:
                return str(value["$ref"])
            seen.add(value["$ref"])
            value = _referred(schema, value["$ref"])
    return None


def _referred(schema: Any, reference: str) -> Any:
    """What a local reference names, or None."""
    if not reference.startswith("#"):
        return None
    for part in reference[1:].split("/")[1:]:
        key = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(schema, Mapping):
            schema = schema.get(key)
        else:
            schema = schema[int(key)] if isinstance(schema, list) and key.isdigit() and int(key) < len(schema) else None
    return schema
