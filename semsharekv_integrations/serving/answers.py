"""Answers in OpenAI's form, whole and in pieces, with what was reused beside ``usage``."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from semsharekv_integrations.frameworks import count_tokens
from semsharekv_integrations.report import Generation, GenerationChunk, ReuseReport, ToolCall

END = "data: [DONE]\n\n"
# What ends a line to Python's ``splitlines``, as escapes; in JSON, strings alone have it
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}


def describe_usage(report: ReuseReport) -> dict[str, Any]:
    """Return token counts; ``cached_tokens`` are those that were not computed."""
    return {**count_tokens(report), "prompt_tokens_details": {"cached_tokens": report.reused_tokens}}


def describe_reuse(report: ReuseReport) -> dict[str, Any]:
    """Return the report without what is as long as the prompt, which the chat page asks engines for."""
    return replace(report, origins=(), prompt_ids=()).to_dict()


def format_event(body: object) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False).translate(_LINE_ENDS)}\n\n"


class Form(NamedTuple):
    """How one answer is told: as that of a chat or of a completion.

    Attributes:
        is_chat: whether it is a message, or plain text.
        model: the name that it is told under.
        one_call: whether only the first tool call counts.
    """

    is_chat: bool
    model: str
    one_call: bool = False

    def take_calls(self, calls: Sequence[ToolCall], told: int = 0) -> Sequence[ToolCall]:
        """Return those of ``calls`` that are told, where ``told`` were told before."""
        return calls[: max(0, 1 - told)] if self.one_call else calls

    def describe_whole(self, generation: Generation) -> dict[str, Any]:
        """Return the body of a whole answer."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": generation.finish_reason}
        if self.is_chat:
            calls = [_describe_call(call) for call in self.take_calls(generation.tool_calls)]
            said = generation.text or (None if calls else "")
            message = {"role": "assistant", "content": said, "refusal": None} | ({"tool_calls": calls} if calls else {})
            choice["message"] = message
        else:
            choice["text"] = generation.text
        name = "chat.completion" if self.is_chat else "text_completion"
        told = {"usage": describe_usage(generation.report), "kv_cache": describe_reuse(generation.report)}
        return self._make_head(name) | {"choices": [choice]} | told

    def _make_head(self, name: str) -> dict[str, Any]:
        key = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        return {"id": key, "object": name, "created": int(time.time()), "model": self.model}

    def begin(self, *, with_usage: bool) -> Events:
        """Return what tells an answer in pieces."""
        return Events(self, self._make_head("chat.completion.chunk" if self.is_chat else "text_completion"), with_usage)


class Events:
    """One answer as server-sent events. ``with_usage`` adds one with the counts, behind the last piece."""

    def __init__(self, form: Form, head: dict[str, Any], with_usage: bool) -> None:
        self._form, self._head, self._with_usage = form, head, with_usage
        self._num_calls = 0
        self._has_begun = False

    def tell(self, chunk: GenerationChunk) -> Iterator[str]:
        """Yield the events of one chunk."""
        if self._form.is_chat and not self._has_begun:
            yield self._tell_delta({"role": "assistant", "content": ""})
        self._has_begun = True
        if chunk.text:
            yield self._tell_delta({"content": chunk.text})
        for call in self._form.take_calls(chunk.tool_calls, self._num_calls):
            yield self._tell_delta({"tool_calls": [{"index": self._num_calls, **_describe_call(call)}]})
            self._num_calls += 1
        if chunk.generation is not None:
            yield from self._end(chunk.generation)

    def _end(self, generation: Generation) -> Iterator[str]:
        report = generation.report
        yield self._tell_delta({}, generation.finish_reason, {"kv_cache": describe_reuse(report)})
        if self._with_usage:
            yield format_event({**self._head, "choices": [], "usage": describe_usage(report)})
        yield END

    def _tell_delta(self, delta: dict[str, Any], finish: str | None = None, more: dict[str, Any] | None = None) -> str:
        said = {"delta": delta} if self._form.is_chat else {"text": delta.get("content", "")}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
        usage = {"usage": None} if self._with_usage else {}
        return format_event({**self._head, "choices": [choice], **usage, **(more or {})})


def _describe_call(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}
