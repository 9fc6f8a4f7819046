"""Holds an answer to a grammar while it is sampled: JSON of a schema, or tool calls in the template's format.

llguidance says which tokens may come next; all others are taken from the scores before temperature and the like. JSON
comes on one line, with at most one space behind a comma or a colon, so that space cannot go on without end.

Knows nothing about where text stops or what calls mean.

Grammars of tool calls, written in llguidance's Lark: as a template writes them, with arguments of their schemas.

Objects that name their properties get no others, unless their schema says something of it: ``additionalProperties``
is true where a schema does not mention it, but no function takes arguments that it does not know.

How much of a JSON schema a grammar can hold an answer to: all of it, else as much as can be, which is said once.

What is left out first are the keywords that llguidance does not know, and patterns and formats that it cannot read;
where that is not enough, tools get any JSON object.
"""

from __future__ import annotations

import json
import re
import reprlib
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria

from semsharekv_integrations.concurrency.threads import hold_at_forks
from semsharekv_integrations.errors import SemShareError, UnsupportedModelError
from semsharekv_integrations.text.tool_format import Tool, ToolFormat

_FAULT_CHARS = 200


class Constraint:
    """What one answer must look like, as far as it is written.

    Args:
        matcher: at its beginning.
        on_trigger: whether only what an opened call needs is forced, and text is free.
    """

    def __init__(self, matcher: LLMatcher, *, on_trigger: bool = False) -> None:
        self._matcher = matcher
        self._fresh = matcher.deep_copy() if on_trigger else None

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def add(self, token_id: int) -> None:
        """One more token of the answer.

        Raises:
            SemShareError: if it is none that ``find_allowed`` named.
        """
        if self._matcher.consume_token(token_id):
            return
        if self._fresh is None:
            raise SemShareError(f"the answer left its grammar: {self._matcher.get_error()}")
        self._matcher = self._fresh.deep_copy()  # a special token in free text: look for calls behind it

    def find_allowed(self, vocab_size: int) -> torch.Tensor | None:
        """Which tokens may come next, [V], or None for all."""
        if self._fresh is not None and self._matcher.is_accepting():
            return None
        if self._matcher.is_error():
            raise SemShareError(f"the answer's grammar went too far: {self._matcher.get_error()}")
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[:vocab_size].astype(np.bool_)
        return torch.from_numpy(np.pad(allowed, (0, vocab_size - len(allowed))))


class ConstraintProcessor(LogitsProcessor):
    """Leaves scores [B, V] to the tokens that a constraint allows."""

    def __init__(self, constraint: Constraint) -> None:
        self._constraint = constraint

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores; equal ones for what is allowed if the model's own settings forbid all of it."""
        allowed = self._constraint.find_allowed(scores.shape[-1])
        if allowed is None:
            return scores
        allowed = allowed.to(scores.device)
        left = scores.masked_fill(~allowed, -torch.inf)
        return left if torch.isfinite(left).any() else torch.where(allowed, 0.0, left)


class ConstraintCriterion(StoppingCriteria):
    """Tells a constraint of every token, and stops when it is complete."""

    def __init__(self, constraint: Constraint) -> None:
        self._constraint = constraint

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """Whether the sequence [1, T] is complete, [B]."""
        self._constraint.add(int(input_ids[0, -1]))
        return torch.tensor([self._constraint.is_complete], device=input_ids.device)


class GrammarFactory:
    """Makes the constraints of one model's answers; safe to use from several threads.

    Args:
        tokenizer: of the model.
        end_ids: the model's end-of-sequence tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._end_ids = list(end_ids)
        self._lock = hold_at_forks(threading.Lock())
        self._wrapped: LLTokenizer | str | None = None
        self._schemas = SchemaJudge(self._fault_of)

    @property
    def is_possible(self) -> bool:
        """Whether the tokenizer allows constraints: it must be a fast one of a kind that llguidance knows."""
        try:
            self._llguidance()
        except UnsupportedModelError:
            return False
        return True

    def build_json(self, schema: Mapping[str, Any]) -> Constraint:
        """JSON of ``schema`` and nothing else. What no grammar can hold to is left out, with a warning.

        Raises:
            ValueError: if it is no schema, or nothing can be valid.
            UnsupportedModelError: if the tokenizer does not allow it.
        """
        self._llguidance()
        held = self._schemas.judge("json_schema", schema)
        if held.schema is None:
            raise ValueError(f"json_schema is {reprlib.repr(schema)}; accepted is a schema: {held.fault}")
        return Constraint(self._matcher(_json_grammar(held.schema)))

    def build_forced_calls(self, tool_format: ToolFormat, tools: Sequence[Tool]) -> Constraint:
        """One call of one of ``tools``, with arguments of its schema as far as a grammar can hold to it, only.

        Raises:
            UnsupportedModelError: if the tokenizer does not allow it.
        """
        return Constraint(self._calls(tool_format, tools, CallGrammar.forced))

    def build_opened_calls(self, tool_format: ToolFormat, tools: Sequence[Tool]) -> Constraint:
        """Free text, in which a call that has been opened is a valid one, as far as a grammar can hold to it."""
        return Constraint(self._calls(tool_format, tools, CallGrammar.opened), on_trigger=True)

    def _calls(
        self, tool_format: ToolFormat, tools: Sequence[Tool], written: Callable[[CallGrammar], str]
    ) -> LLMatcher:
        """Calls of ``tools``; all arguments are any object where they are too much together."""
        wrapped = self._llguidance()
        special = {
            text: id_ for text, id_ in self._tokenizer.get_added_vocab().items() if wrapped.is_special_token(id_)
        }
        names = [tool["function"]["name"] for tool in tools]
        parameters = [tool["function"]["parameters"] for tool in tools]
        held = [self._schemas.judge(f"tool {name!r}", schema) for name, schema in zip(names, parameters, strict=True)]
        for name, judged in zip(names, held, strict=True):
            if judged.schema is None:
                warnings.warn(f"calls of tool {name!r} are held to no schema: {judged.fault}", stacklevel=2)
        schemas = [ANY_OBJECT if judged.schema is None else judged.schema for judged in held]
        try:
            return self._matcher(
                LLMatcher.grammar_from_lark(written(CallGrammar(tool_format, tools, schemas, special)))
            )
        except ValueError as error:
            warnings.warn(f"calls of {len(tools)} tools are held to no schemas: {error}", stacklevel=2)
        free = CallGrammar(tool_format, tools, [ANY_OBJECT] * len(tools), special)
        return self._matcher(LLMatcher.grammar_from_lark(written(free)))

    def _matcher(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._llguidance(), grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def _fault_of(self, schema: Mapping[str, Any]) -> str:
        """The first line of what llguidance says against a schema."""
        try:
            self._matcher(_json_grammar(schema))
        except (TypeError, ValueError, RecursionError) as error:
            return " ".join(str(error).split())[:_FAULT_CHARS] or type(error).__name__
        return ""

    def _llguidance(self) -> LLTokenizer:
        """The tokenizer as llguidance takes it, which is made once."""
        with self._lock:
            if self._wrapped is None:
                self._wrapped = self._made()
        if isinstance(self._wrapped, str):
            name = type(self._tokenizer).__name__
            raise UnsupportedModelError(
                f"json_schema and forced tool calls need a fast tokenizer that llguidance knows; {name} {self._wrapped}"
            )
        return self._wrapped

    def _made(self) -> LLTokenizer | str:
        """The wrapped tokenizer, or why there is none."""
        if not self._tokenizer.is_fast:
            return "is slow"
        try:
            return from_tokenizer(self._tokenizer, eos_token=self._end_ids or None)
        except ValueError as error:
            return f"is of another kind: {error}"


def _json_grammar(schema: Mapping[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(dict(schema))


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


def close_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
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


ANY_OBJECT: dict[str, Any] = {"type": "object", "x-guidance": STYLE}
_MOST_JUDGED = 4096


class JudgedSchema(NamedTuple):
    """What a grammar is made of, with llguidance's options in it; ``fault`` is why that is not the whole schema."""

    schema: dict[str, Any] | None
    fault: str = ""


class SchemaJudge:
    """Judges schemas, each once; safe to use from several threads.

    Args:
        fault_of: what is wrong with a schema that has llguidance's options in it; nothing if a grammar can be made.
    """

    def __init__(self, fault_of: Callable[[Mapping[str, Any]], str]) -> None:
        self._fault_of = fault_of
        self._judged: dict[str, JudgedSchema] = {}
        self._lock = hold_at_forks(threading.Lock())

    def judge(self, name: str, schema: Mapping[str, Any]) -> JudgedSchema:
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

    def _judge(self, schema: Mapping[str, Any]) -> JudgedSchema:
        endless = _endless_reference(schema)
        if endless is not None:
            return JudgedSchema(None, f"$ref {endless!r} leads back to itself")
        whole = close_schema(schema) | {"x-guidance": STYLE}
        fault = self._fault_of(whole)
        if not fault:
            return JudgedSchema(whole)
        relaxed = self._readable(whole) | {"x-guidance": STYLE | {"lenient": True}}
        return JudgedSchema(None if self._fault_of(relaxed) else relaxed, fault)

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
