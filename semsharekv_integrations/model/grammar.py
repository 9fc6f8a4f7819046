"""Holds an answer to a grammar while it is sampled: JSON of a schema, or tool calls in the template's format.

llguidance says which tokens may come next; all others are taken from the scores before temperature and the like. JSON
comes on one line, with at most one space behind a comma or a colon, so that space cannot go on without end.

Knows nothing about where text stops or what calls mean.
"""

from __future__ import annotations

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

from semsharekv_integrations.errors import SemShareError, UnsupportedModelError
from semsharekv_integrations.forks import hold_at_forks
from semsharekv_integrations.model.call_grammar import CallGrammar
from semsharekv_integrations.model.held_schema import ANY_OBJECT, HeldSchemas
from semsharekv_integrations.model.tool_format import Tool, ToolFormat

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
            SemShareError: if it is none that ``allowed`` named.
        """
        if self._matcher.consume_token(token_id):
            return
        if self._fresh is None:
            raise SemShareError(f"the answer left its grammar: {self._matcher.get_error()}")
        self._matcher = self._fresh.deep_copy()  # a special token in free text: look for calls behind it

    def allowed(self, vocab_size: int) -> torch.Tensor | None:
        """Which tokens may come next, [V], or None for all."""
        if self._fresh is not None and self._matcher.is_accepting():
            return None
        if self._matcher.is_error():
            raise SemShareError(f"the answer's grammar went too far: {self._matcher.get_error()}")
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[:vocab_size].astype(np.bool_)
        return torch.from_numpy(np.pad(allowed, (0, vocab_size - len(allowed))))


class AllowedTokens(LogitsProcessor):
    """Leaves scores [B, V] to the tokens that a constraint allows."""

    def __init__(self, constraint: Constraint) -> None:
        self._constraint = constraint

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores; equal ones for what is allowed if the model's own settings forbid all of it."""
        allowed = self._constraint.allowed(scores.shape[-1])
        if allowed is None:
            return scores
        allowed = allowed.to(scores.device)
        left = scores.masked_fill(~allowed, -torch.inf)
        return left if torch.isfinite(left).any() else torch.where(allowed, 0.0, left)


class IsComplete(StoppingCriteria):
    """Tells a constraint of every token, and stops when it is complete."""

    def __init__(self, constraint: Constraint) -> None:
        self._constraint = constraint

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """Whether the sequence [1, T] is complete, [B]."""
        self._constraint.add(int(input_ids[0, -1]))
        return torch.tensor([self._constraint.is_complete], device=input_ids.device)


class Grammars:
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
        self._schemas = HeldSchemas(self._fault_of)

    @property
    def is_possible(self) -> bool:
        """Whether the tokenizer allows constraints: it must be a fast one of a kind that llguidance knows."""
        try:
            self._llguidance()
        except UnsupportedModelError:
            return False
        return True

    def json(self, schema: Mapping[str, Any]) -> Constraint:
        """JSON of ``schema`` and nothing else. What no grammar can hold to is left out, with a warning.

        Raises:
            ValueError: if it is no schema, or nothing can be valid.
            UnsupportedModelError: if the tokenizer does not allow it.
        """
        self._llguidance()
        held = self._schemas.of("json_schema", schema)
        if held.schema is None:
            raise ValueError(f"json_schema is {reprlib.repr(schema)}; accepted is a schema: {held.fault}")
        return Constraint(self._matcher(_json_grammar(held.schema)))

    def forced_calls(self, tool_format: ToolFormat, tools: Sequence[Tool]) -> Constraint:
        """One call of one of ``tools``, with arguments of its schema as far as a grammar can hold to it, only.

        Raises:
            UnsupportedModelError: if the tokenizer does not allow it.
        """
        return Constraint(self._calls(tool_format, tools, CallGrammar.forced))

    def opened_calls(self, tool_format: ToolFormat, tools: Sequence[Tool]) -> Constraint:
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
        held = [self._schemas.of(f"tool {name!r}", schema) for name, schema in zip(names, parameters, strict=True)]
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
