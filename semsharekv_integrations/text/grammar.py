"""Holds an answer to a grammar while it is sampled: JSON of a schema, or tool calls in the template's format.

llguidance says which tokens may come next; all others are taken from the scores before temperature and the like. JSON
comes on one line, with at most one space behind a comma or a colon, so that space cannot go on without end. Tool calls
are written in llguidance's Lark, as a template writes them, with arguments of their schemas.

Knows nothing about where text stops or what calls mean.
"""

from __future__ import annotations

import json
import re
import reprlib
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria

from semsharekv_integrations.concurrency.threads import hold_at_forks
from semsharekv_integrations.errors import SemShareError, UnsupportedModelError
from semsharekv_integrations.text.schema import ANY_OBJECT, SchemaJudge
from semsharekv_integrations.text.tool_format import Tool, ToolFormat

_RULES = r"""COLON: /: ?/
COMMA: /, ?/
SPACE: /[ \n]{1,2}/
TEXT: /(.|\n)*/
"""
_FAULT_CHARS = 200


class Constraint:
    """What one answer must look like, as far as it is written.

    Args:
        matcher: at the beginning of its grammar.
        on_trigger: if True, text is free until it opens a call, and only that call is held to the grammar.
    """

    def __init__(self, matcher: LLMatcher, *, on_trigger: bool = False) -> None:
        self._matcher = matcher
        self._fresh = matcher.deep_copy() if on_trigger else None

    @property
    def is_complete(self) -> bool:
        """True if the grammar has ended without an error, so that nothing may follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def add(self, token_id: int) -> None:
        """Take one more token of the answer. If ``on_trigger``, a token that is not allowed starts the grammar over.

        Raises:
            SemShareError: if the token is not allowed, and not ``on_trigger``.
        """
        if self._matcher.consume_token(token_id):
            return
        if self._fresh is None:
            raise SemShareError(f"the answer left its grammar: {self._matcher.get_error()}")
        self._matcher = self._fresh.deep_copy()  # a special token in free text: look for calls behind it

    def find_allowed(self, vocab_size: int) -> torch.Tensor | None:
        """Return a mask [V] of the tokens that may come next, None for all; ``SemShareError`` if the grammar failed."""
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
        """Return the scores, -inf where not allowed. If no allowed one is finite, all allowed ones are 0."""
        allowed = self._constraint.find_allowed(scores.shape[-1])
        if allowed is None:
            return scores
        if scores.is_cuda:
            allowed = allowed.pin_memory().to(scores.device, non_blocking=True)  # so that the host does not wait
        allowed = allowed.to(scores.device)
        left = scores.masked_fill(~allowed, -torch.inf)
        return torch.where(torch.isfinite(left).any(), left, left.masked_fill(allowed, 0.0))


class ConstraintCriterion(StoppingCriteria):
    """Tells a constraint of every token, and stops when it is complete."""

    def __init__(self, constraint: Constraint) -> None:
        self._constraint = constraint

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """Tell the constraint the last token of the sequence [1, T]; return whether it is complete, [1]."""
        self._constraint.add(int(input_ids[0, -1]))
        return torch.tensor([self._constraint.is_complete], device=input_ids.device)


class GrammarFactory:
    """Makes the constraints of one model's answers; safe to use from several threads.

    Each ``build_`` method raises ``UnsupportedModelError`` where the tokenizer allows no constraints.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._end_ids = list(end_ids)
        self._lock = hold_at_forks(threading.Lock())
        self._wrapped: LLTokenizer | str | None = None  # or why there is none
        self._schemas = SchemaJudge(self._find_fault)

    @property
    def is_possible(self) -> bool:
        """True if the tokenizer allows constraints: it must be a fast one of a kind that llguidance knows."""
        try:
            self._wrap()
        except UnsupportedModelError:
            return False
        return True

    def build_json(self, schema: Mapping[str, Any]) -> Constraint:
        """Make a constraint to JSON of ``schema`` alone. Warns, and leaves out what no grammar can hold an answer to.

        Raises:
            ValueError: if ``schema`` is no JSON schema, or no JSON is valid for it.
        """
        self._wrap()  # which says what is wrong with the tokenizer, before the schema is judged by it
        held = self._schemas.judge("json_schema", schema)
        if held.schema is None:
            raise ValueError(f"json_schema is {reprlib.repr(schema)}; accepted is a schema: {held.fault}")
        return Constraint(self._match_json(held.schema))

    def build_forced_calls(self, tool_format: ToolFormat, tools: Sequence[Tool]) -> Constraint:
        """Make a constraint to exactly one call of one of ``tools``. Warns of schemas that calls are not held to."""
        return Constraint(self._match_calls(tool_format, tools, CallGrammar.write_forced))

    def build_opened_calls(self, tool_format: ToolFormat, tools: Sequence[Tool]) -> Constraint:
        """Make a constraint that leaves text free, but holds calls that are opened to ``tools``. Warns likewise."""
        return Constraint(self._match_calls(tool_format, tools, CallGrammar.write_opened), on_trigger=True)

    def _match_calls(
        self, tool_format: ToolFormat, tools: Sequence[Tool], write: Callable[[CallGrammar], str]
    ) -> LLMatcher:
        """Make a matcher of calls, of the grammar that ``write`` returns.

        Warns if it cannot hold calls to a tool's schema, or to all of them together: any object then passes.
        """
        wrapped = self._wrap()
        special = {
            text: id_ for text, id_ in self._tokenizer.get_added_vocab().items() if wrapped.is_special_token(id_)
        }

        def match(schemas: Sequence[Mapping[str, Any]]) -> LLMatcher:
            grammar = write(CallGrammar(tool_format, dict(zip(names, schemas, strict=True)), special))
            return self._match(LLMatcher.grammar_from_lark(grammar))

        names = [tool["function"]["name"] for tool in tools]
        parameters = [tool["function"]["parameters"] for tool in tools]
        held = [self._schemas.judge(f"tool {name!r}", schema) for name, schema in zip(names, parameters, strict=True)]
        for name, judged in zip(names, held, strict=True):
            if judged.schema is None:
                warnings.warn(f"calls of tool {name!r} are held to no schema: {judged.fault}", stacklevel=2)
        try:
            return match([ANY_OBJECT if judged.schema is None else judged.schema for judged in held])
        except ValueError as error:
            warnings.warn(f"calls of {len(tools)} tools are held to no schemas: {error}", stacklevel=2)
        return match([ANY_OBJECT] * len(tools))

    def _match_json(self, schema: Mapping[str, Any]) -> LLMatcher:
        return self._match(LLMatcher.grammar_from_json_schema(dict(schema)))

    def _match(self, grammar: str) -> LLMatcher:
        """Make a matcher at the beginning of ``grammar``; raise ``ValueError`` if llguidance refuses it."""
        matcher = LLMatcher(self._wrap(), grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def _find_fault(self, schema: Mapping[str, Any]) -> str:
        """Return what llguidance says against a schema, cut to ``_FAULT_CHARS``; an empty string for nothing."""
        try:
            self._match_json(schema)
        except (TypeError, ValueError, RecursionError) as error:
            return " ".join(str(error).split())[:_FAULT_CHARS] or type(error).__name__
        return ""

    def _wrap(self) -> LLTokenizer:
        """Return the tokenizer as llguidance takes it, made once; raise ``UnsupportedModelError`` if there is none."""
        with self._lock:
            if self._wrapped is None and not self._tokenizer.is_fast:
                self._wrapped = "is slow"
            elif self._wrapped is None:
                try:
                    self._wrapped = from_tokenizer(self._tokenizer, eos_token=self._end_ids or None)
                except ValueError as error:
                    self._wrapped = f"is of another kind: {error}"
        if isinstance(self._wrapped, str):
            name = type(self._tokenizer).__name__
            raise UnsupportedModelError(
                f"json_schema and forced tool calls need a fast tokenizer that llguidance knows; {name} {self._wrapped}"
            )
        return self._wrapped


class CallGrammar:
    """Writes grammars of calls; ``schemas`` of arguments are by tool name, ``special`` tokens are ids by text."""

    def __init__(
        self, tool_format: ToolFormat, schemas: Mapping[str, Mapping[str, Any]], special: Mapping[str, int]
    ) -> None:
        self._format = tool_format
        self._schemas = schemas
        self._special = special

    def write_forced(self) -> str:
        """Return the grammar of one call and nothing else, spaced as the template does it."""
        space = _quote(self._format.space)
        opening, closing = self._split(self._format.opening), self._split(self._format.closing)
        body = '"[" call "]"' if self._format.in_list else "call"
        before, behind = [*opening, space] if opening else [], [space, *closing] if closing else []
        return self._write(" ".join([*before, body, *behind]))

    def write_opened(self) -> str:
        """Return the grammar of free text with any number of calls in it, where spacing is the model's own."""
        first, *rest = self._split(self._format.opening)
        head = f"head[lazy]: TEXT {first}" if first.startswith('"') else f"head: TEXT {first}"
        closing = self._split(self._format.closing)
        body = '"[" call (COMMA call)* "]"' if self._format.in_list else "call"
        behind = " ".join(["SPACE?", *closing]) if closing else ""
        return self._write(f"(head {' '.join(rest)} SPACE? {body} {behind})* TEXT") + f"{head}\n"

    def _write(self, start: str) -> str:
        calls = " | ".join(f"call_{index}" for index in range(len(self._schemas)))
        rules = "".join(self._write_call(index, *call) for index, call in enumerate(self._schemas.items()))
        return f"%llguidance {{}}\nstart: {start}\ncall: {calls}\n{rules}{_RULES}"

    def _write_call(self, index: int, name: str, schema: Mapping[str, Any]) -> str:
        """Return the rules of one tool's calls, ``call_<index>``, and of their arguments, ``arguments_<index>``."""
        written = sorted({json.dumps(name), json.dumps(name, ensure_ascii=False)})
        named = f"{_quote(json.dumps(self._format.name_key))} COLON ({' | '.join(map(_quote, written))})"
        arguments = f"{_quote(json.dumps(self._format.arguments_key))} COLON arguments_{index}"
        return f'call_{index}: "{{" {named} COMMA {arguments} "}}"\narguments_{index}: %json {json.dumps(schema)}\n'

    def _split(self, text: str) -> list[str]:
        """Return ``text`` in Lark, as a list of special tokens and quoted literals."""
        found = re.split("(" + "|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) + ")", text)
        parts = found if self._special else [text]
        return [f"<[{self._special[part]}]>" if part in self._special else _quote(part) for part in parts if part]


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""
