"""Bodies of requests. A field of OpenAI's that has no effect here is accepted with the value that asks for none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from semsharekv_integrations.errors import require
from semsharekv_integrations.request import (
    DocumentNotes,
    GenerateOptions,
    check_name,
    check_optional_name,
    check_text,
)
from semsharekv_integrations.serving.messages import find_parts, translate_choice, translate_format, translate_messages

_NO_EFFECT: dict[str, tuple[Any, ...]] = {  # the values that ask for nothing; None always does
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    **dict.fromkeys(
        ("audio", "prediction", "web_search_options", "reasoning_effort", "verbosity", "functions", "function_call"), ()
    ),
    "prompt_cache_options": ({},),
}
_CALLER = ("user", "safety_identifier", "metadata")  # who asks, and for what: no answer depends on it
_LIMITS = ("max_completion_tokens", "max_tokens")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class NamedText(_Body):
    """A document that stands in the prompt, word for word."""

    id: str
    text: str


class StreamOptions(_Body):
    """What a stream tells besides."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        hides = self.include_obfuscation
        require(not hides, "stream_options.include_obfuscation", hides, "False: nothing is padded here")
        return self


class _Sampled(_Body):
    """What chats and completions have in common."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    documents: list[NamedText] | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_ineffective(cls, body: Any) -> Any:
        """Drop fields that ask for nothing; ``ValueError`` for one that asks for what is not there."""
        if not isinstance(body, Mapping):
            return body
        for name, values in _NO_EFFECT.items():
            value, accepted = body.get(name), ", ".join(map(repr, (None, *values)))
            kind = isinstance(value, bool)  # else 0 would be False, and a completion's logprobs: 0 asks for some
            asks = all(value != each or kind != isinstance(each, bool) for each in values)
            require(value is None or not asks, name, value, accepted)
        return {name: value for name, value in body.items() if name not in _NO_EFFECT and name not in _CALLER}

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        given = {getattr(self, name) for name in _LIMITS} - {None}
        require(len(given) < 2, "max_tokens", self.max_tokens, "what max_completion_tokens says, or one of them")
        check_optional_name("prompt_cache_key", self.prompt_cache_key)
        asks = self.stream_options is not None and not self.stream
        require(not asks, "stream_options", self.stream_options, "None unless stream is true")
        return self

    def make_options(self, namespace: str, most: int | None) -> GenerateOptions:
        """Return the engine's options. ``most`` bounds an answer's tokens, and is meant where no number is given."""
        names = ("temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop")
        given: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        name = next((name for name in _LIMITS if getattr(self, name) is not None), None)
        limit = getattr(self, name) if name else most
        if limit is not None:
            fits = limit > 0 and (most is None or limit <= most)
            require(fits, str(name), limit, "1 or more" if most is None else f"1 to {most}")
            given["max_new_tokens"] = limit
        known = GenerateOptions(namespace=namespace, session=self.prompt_cache_key, documents=self._name_documents())
        return cast(GenerateOptions, given) | known

    def _name_documents(self) -> DocumentNotes:
        own: dict[str, str] = {}
        for document in self.documents or ():
            require(document.id not in own, "documents", document.id, "each id once")
            own[document.id] = document.text
        named = set(own.values())
        parts = {key: text for key, text in self._find_parts().items() if text not in named}
        return DocumentNotes({**parts, **own}, required=own)

    def _find_parts(self) -> dict[str, str]:
        return {}


class ChatBody(_Sampled):
    """The body of ``POST /v1/chat/completions``."""

    prompt_field: ClassVar[str] = "messages"
    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """The messages as the engine takes them; ``ValueError`` for what it does not read."""
        return translate_messages(self.messages)

    def make_options(self, namespace: str, most: int | None) -> GenerateOptions:
        """As for a completion, and what goes with a chat."""
        tools = self.tools or ()
        choice = translate_choice(self.tool_choice, tools)
        return super().make_options(namespace, most) | GenerateOptions(
            tools=tools or None,
            tool_choice=choice,
            json_schema=translate_format(self.response_format, may_call=bool(tools) and choice != "none"),
            chat_template_kwargs=self.chat_template_kwargs,
        )

    def _find_parts(self) -> dict[str, str]:
        return find_parts(self.messages)


class CompletionBody(_Sampled):
    """The body of ``POST /v1/completions``: one prompt."""

    prompt_field: ClassVar[str] = "prompt"
    prompt: str | list[str]

    @model_validator(mode="after")
    def _take_only_prompt(self) -> Self:
        if isinstance(self.prompt, list):
            require(len(self.prompt) == 1, "prompt", f"{len(self.prompt)} prompts", "one text")
            self.prompt = self.prompt[0]
        return self


class DocumentBody(_Body):
    """The body of ``POST /v1/documents``."""

    id: str
    text: str
    pinned: bool = False
    ttl_s: float | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_name("id", self.id)
        check_text("text", self.text)
        return self
