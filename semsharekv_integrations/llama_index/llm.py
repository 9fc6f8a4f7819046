"""LlamaIndex's LLM interface over a ``SemShareEngine``: chat and completion, each sync, async and streamed.

A call is translated into one prompt and one set of options, and handed to the engine; streams and whole answers come
from the same flow there. Knows nothing about tokens, caches or how KV is reused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llama_index.core.base.llms.generic_utils import messages_to_prompt as generic_messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr, field_validator
from llama_index.core.constants import DEFAULT_CONTEXT_WINDOW
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import LLM

from semsharekv_integrations.checks import require
from semsharekv_integrations.config import EngineConfig
from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.llama_index.translate import (
    astream_responses,
    chat_response,
    completion_response,
    engine_documents,
    engine_messages,
    stream_responses,
)
from semsharekv_integrations.model.prompt import Prompt
from semsharekv_integrations.modes import MODE_SETTINGS, ModeSetting
from semsharekv_integrations.request import GenerateOptions, Request

_FIELD_OPTIONS = ("temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop", "namespace")
_CALL_OPTIONS = (*GenerateOptions.__annotations__, "max_tokens")
_IGNORED_OPTIONS = ("extra_headers",)  # LlamaIndex's DocumentContextExtractor sends it to every LLM


class SemShareKVLLM(LLM):
    """A local transformers model as a LlamaIndex LLM, which reuses the KV cache of what it has seen.

    Constructing it loads nothing: configuration and tokenizer are read when ``metadata`` or ``tokenize`` is first
    asked for, the weights at the first call. Answers carry in ``raw`` plain JSON: ``usage`` (tokens, OpenAI's names),
    ``kv_cache`` (the ``ReuseReport``), ``finish_reason`` and ``model``; in streams the last response does.

    LlamaIndex sizes its chunks with a tokenizer of OpenAI's unless it is given one, which miscounts for this model and
    may be downloaded. Give it the model's own::

        llm = SemShareKVLLM(model="semsharekv/reference")
        Settings.llm = llm
        Settings.tokenizer = llm.tokenize

    Every call also takes, by keyword: the sampling fields and ``namespace`` below (None means the field's value),
    ``max_new_tokens`` for ``max_tokens``, ``session`` (the conversation's name) and ``documents`` that stand in the
    prompt (texts, texts by id, or LlamaIndex nodes). Anything else is refused.

    ``complete`` sends the plain text, through ``completion_to_prompt`` if that is set. ``chat`` uses the model's chat
    template, or ``messages_to_prompt`` if that is set.

    Args:
        model: local folder, hub id, or ``semsharekv/reference``.
        engine: a shared engine instead, which brings its own model and settings.
        fields: the fields below.

    Attributes:
        mode: ``auto``, ``off``, ``exact``, ``identical``, ``semantic`` or ``paper`` (see ``ReuseConfig``); None for
            that of ``config``.
        config: all other settings of the engine.
        device: where the model goes, or None for CUDA if there is one, else the CPU.
        dtype: ``auto`` for that of the weights, else a torch dtype or its name.
        model_kwargs: for ``AutoModelForCausalLM.from_pretrained``; left out of serialization, as it may hold a token.
        namespace: whose KV may be read, and where new KV goes.
        temperature: 0 is greedy. Default 0.
        top_p: share of probability mass kept, above 0 up to 1. Default 1.
        top_k: number of likeliest tokens kept, or None for the model's own default.
        repetition_penalty: above 1 discourages tokens seen before; None for the model's own default.
        seed: of every call's random generator, or None for a fresh one.
        max_tokens: most tokens to generate. Default 256.
        stop: strings that end the text; they are not part of it.
        is_chat_model: whether LlamaIndex sends prompts as messages; None: if the tokenizer has a chat template.

    Raises:
        ValueError: naming the field, its value and what is accepted.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = Field(frozen=True)
    mode: ModeSetting | None = Field(default=None, frozen=True)
    config: EngineConfig | None = Field(default=None, frozen=True)
    device: str | None = Field(default=None, frozen=True)
    dtype: str = Field(default="auto", frozen=True)
    model_kwargs: dict[str, Any] = Field(default_factory=dict, frozen=True, exclude=True, repr=False)
    namespace: str = "default"
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int = 256
    stop: list[str] | str | None = None
    is_chat_model: bool | None = None

    _engine: SemShareEngine = PrivateAttr()

    def __init__(self, model: str | None = None, *, engine: SemShareEngine | None = None, **fields: Any) -> None:
        fields = {"model": model, **fields}
        if engine is not None:
            own = {"model": engine.name, "mode": engine.config.reuse.mode, "config": engine.config}
            _require_agreement(own, fields)
            fields |= own
        require(fields["model"] is not None, "model", None, "a path or hub id, unless engine= is given")
        super().__init__(**fields)
        self._engine = engine or SemShareEngine.from_pretrained(
            self.model, self._engine_config(), self.device, self.dtype, **self.model_kwargs
        )
        Request.of("", self._options({}))  # refuses bad fields now rather than at the first call

    @field_validator("mode", mode="before")
    @classmethod
    def _checked_mode(cls, mode: Any) -> Any:
        require(mode in (None, *MODE_SETTINGS), "mode", mode, " or ".join(map(repr, MODE_SETTINGS)))
        return mode

    @field_validator("device", "dtype", mode="before")
    @classmethod
    def _as_name(cls, value: Any) -> Any:
        """A torch device or dtype by its name, so that fields stay serializable."""
        return value if value is None else str(value).removeprefix("torch.")

    def _engine_config(self) -> EngineConfig:
        config = self.config or EngineConfig()
        return config if self.mode is None else replace(config, reuse=replace(config.reuse, mode=self.mode))

    @classmethod
    def class_name(cls) -> str:
        """The name that LlamaIndex serializes."""
        return "SemShareKVLLM"

    @property
    def engine(self) -> SemShareEngine:
        """The engine underneath, to warm, forget, save or share."""
        return self._engine

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex sizes its prompts by; reads configuration and tokenizer, but does not load weights.

        A model that names no context window counts as LlamaIndex's default of 3,900 tokens.
        """
        is_chat_model = self.is_chat_model
        return LLMMetadata(
            context_window=self._engine.context_window or DEFAULT_CONTEXT_WINDOW,
            num_output=self.max_tokens,
            is_chat_model=bool(self._engine.tokenizer.chat_template) if is_chat_model is None else is_chat_model,
            model_name=self.model,
        )

    def to_payload(self) -> dict[str, Any]:
        """What observers of each call are told; reads no files, as ``metadata`` may, so no event loop waits for it."""
        sampling = {name: getattr(self, name) for name in ("temperature", "top_p", "max_tokens", "namespace")}
        mode = self._engine.config.reuse.mode
        return {"class_name": self.class_name(), "model_name": self.model, "mode": mode, **sampling}

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text`` without special tokens; made for ``Settings.tokenizer``."""
        return list(self._engine.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """The answer to a conversation."""
        generation = self._engine.generate(self._chat_prompt(messages), **self._options(kwargs))
        return chat_response(generation.text, None, generation, self.model)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """The answer as it grows; closing the generator cancels the call."""
        chunks = self._engine.stream(self._chat_prompt(messages), **self._options(kwargs))
        return stream_responses(chunks, chat_response, self.model)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """As ``chat``, without blocking the event loop."""
        generation = await self._engine.agenerate(self._chat_prompt(messages), **self._options(kwargs))
        return chat_response(generation.text, None, generation, self.model)

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """As ``stream_chat``, without blocking the event loop."""
        chunks = self._engine.astream(self._chat_prompt(messages), **self._options(kwargs))
        return astream_responses(chunks, chat_response, self.model)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """The continuation of a text."""
        generation = self._engine.generate(self._text_prompt(prompt, formatted), **self._options(kwargs))
        return completion_response(generation.text, None, generation, self.model)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """The continuation as it grows; closing the generator cancels the call."""
        chunks = self._engine.stream(self._text_prompt(prompt, formatted), **self._options(kwargs))
        return stream_responses(chunks, completion_response, self.model)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """As ``complete``, without blocking the event loop."""
        generation = await self._engine.agenerate(self._text_prompt(prompt, formatted), **self._options(kwargs))
        return completion_response(generation.text, None, generation, self.model)

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """As ``stream_complete``, without blocking the event loop."""
        chunks = self._engine.astream(self._text_prompt(prompt, formatted), **self._options(kwargs))
        return astream_responses(chunks, completion_response, self.model)

    def _chat_prompt(self, messages: Sequence[ChatMessage]) -> Prompt:
        to_prompt = self.messages_to_prompt
        if to_prompt is None or to_prompt is generic_messages_to_prompt:  # LlamaIndex fills in the generic one
            return engine_messages(messages)
        return to_prompt(messages)

    def _text_prompt(self, prompt: str, formatted: bool) -> str:
        return prompt if formatted or self.completion_to_prompt is None else self.completion_to_prompt(prompt)

    def _options(self, call: dict[str, Any]) -> GenerateOptions:
        """The engine's options: this model's fields, overridden by those of one call."""
        unknown = sorted(call.keys() - {*_CALL_OPTIONS, *_IGNORED_OPTIONS})
        require(not unknown, "keyword arguments", unknown, ", ".join(_CALL_OPTIONS))
        given = {name: value for name, value in call.items() if value is not None and name not in _IGNORED_OPTIONS}
        if "max_tokens" in given:
            require("max_new_tokens" not in given, "max_tokens", given["max_tokens"], "nothing beside max_new_tokens")
            given["max_new_tokens"] = given.pop("max_tokens")
        if "documents" in given:
            given["documents"] = engine_documents(given["documents"])
        options = {name: getattr(self, name) for name in _FIELD_OPTIONS} | {"max_new_tokens": self.max_tokens} | given
        limit = options["max_new_tokens"]
        require(isinstance(limit, int) and limit >= 1, "max_tokens", limit, "an integer of 1 or more")
        return GenerateOptions(**options)  # type: ignore[typeddict-item]


def _require_agreement(own: dict[str, Any], given: dict[str, Any]) -> None:
    """An engine brings model and settings; a field that says otherwise is a mistake."""
    for name in ("model", "mode", "config", "device", "dtype", "model_kwargs"):
        value = given.get(name)
        accepted = f"{own[name]!r} or nothing" if name in own else "nothing"
        require(value is None or value == own.get(name), name, value, f"{accepted} beside engine=")
