"""LlamaIndex's LLM interface over a ``SemShareEngine``: chat and completion, each sync, async and streamed.

A call is translated into one prompt and one set of options, and handed to the engine; streams and whole answers come
from the same flow there. Knows nothing about tokens, caches or how KV is reused.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
)
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback

from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.errors import require
from semsharekv_integrations.llama_index.messages import (
    Responder,
    astream_responses,
    chat_response,
    completion_response,
    engine_messages,
    handed_on,
    stream_responses,
    whole_response,
)
from semsharekv_integrations.llama_index.tools import SchemaLLM, with_one_call
from semsharekv_integrations.model.loading import merge_arguments
from semsharekv_integrations.text.prompt import Prompt


class SemShareKVLLM(SchemaLLM):
    """A local transformers model as a LlamaIndex LLM, which reuses the KV cache of what it has seen.

    Constructing it loads nothing: configuration and tokenizer are read when ``metadata`` or ``tokenize`` is first
    asked for, the weights at the first call. Answers carry in ``raw`` plain JSON: ``usage`` (tokens, OpenAI's names),
    ``kv_cache`` (the ``ReuseReport``), ``finish_reason`` and ``model``; in streams the last response does.

    LlamaIndex sizes its chunks with a tokenizer of OpenAI's unless it is given one, which miscounts for this model and
    may be downloaded. Give it the model's own::

        llm = SemShareKVLLM(model="semsharekv/reference")
        Settings.llm = llm
        Settings.tokenizer = llm.tokenize

    Every call also takes, by keyword: the sampling fields, ``namespace`` and ``session`` below (None means the field's
    value), ``max_new_tokens`` for ``max_tokens``, ``documents`` that stand in the prompt (texts, texts by id, or
    LlamaIndex nodes), ``json_schema`` that the answer must follow, and in chats ``tools`` (LlamaIndex's, or as OpenAI
    has them), ``tool_choice`` (``auto``, ``none``, ``any`` or ``required``, or a tool's name) and
    ``parallel_tool_calls`` (False for one call at most). Anything else is refused.

    Without ``documents`` they are known as far as nodes were noted (see ``SemShareKVPostprocessor``), messages have
    cache points, or LlamaIndex fills a prompt template's context; where nothing is known, paragraphs count.

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
        namespace: whose KV may be read, and where new KV goes: name the tenant where one engine serves several, and
            where a later process shall find what this one kept. None (the default) is private to this object and its
            copies; ``kv_namespace`` is what the engine calls it.
        session: name of the conversation, whose own earlier turns are continued even if their KV is approximate, or
            None; see ``scoped``.
        temperature: 0 is greedy. Default 0.
        top_p: share of probability mass kept, above 0 up to 1. Default 1.
        top_k: number of likeliest tokens kept, or None for the model's own default.
        repetition_penalty: above 1 discourages tokens seen before; None for the model's own default.
        seed: of every call's random generator, or None for a fresh one.
        max_tokens: most tokens to generate. Default 256.
        stop: strings that end the text; they are not part of it.
        chat_template_kwargs: more variables for the chat template, such as ``enable_thinking``, or None.
        is_chat_model: whether LlamaIndex sends prompts as messages; None: if the tokenizer has a chat template.
        is_function_calling_model: whether LlamaIndex gives it tools; None: if it is a chat model that is prompted by
            its chat template. Those that know no tools are told of them in the system message.
        pydantic_program_mode: how structured output comes about: ``llm`` (the default), by decoding that is held to
            the output's JSON schema; ``default`` or ``function``, by a forced tool call.

    Raises:
        ValueError: naming the field, its value and what is accepted. What is wrong with a call is a ``SemShareError``,
            ``CallError`` for bad arguments, since LlamaIndex swallows ``ValueError``.
    """

    def __init__(
        self, model: str | os.PathLike[str] | None = None, *, engine: SemShareEngine | None = None, **fields: Any
    ) -> None:
        fields = {"model": os.fspath(model) if isinstance(model, os.PathLike) else model, **fields}
        if engine is not None:
            require(isinstance(engine, SemShareEngine), "engine", type(engine).__name__, "None or a SemShareEngine")
            own = {"model": engine.name, "mode": engine.config.reuse.mode, "config": engine.config}
            _require_agreement(own, fields)
            fields |= own
        require(fields["model"] is not None, "model", None, "a path or hub id, unless engine= is given")
        super().__init__(**fields)
        self._engine = engine or SemShareEngine.from_pretrained(
            self.model, self._engine_config(), **merge_arguments(self.device, self.dtype, self.model_kwargs)
        )
        self._check_fields()

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """The answer to a conversation."""
        with handed_on():
            generation = self._engine.generate(self._chat_prompt(messages), **self._options(kwargs, messages))
            return whole_response(generation, self._chat_responder(kwargs))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """The answer as it grows; closing the generator cancels the call."""
        with handed_on():
            chunks = self._engine.stream(self._chat_prompt(messages), **self._options(kwargs, messages))
            return stream_responses(chunks, self._chat_responder(kwargs))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """As ``chat``, without blocking the event loop."""
        with handed_on():
            generation = await self._engine.agenerate(self._chat_prompt(messages), **self._options(kwargs, messages))
            return whole_response(generation, self._chat_responder(kwargs))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """As ``stream_chat``, without blocking the event loop."""
        with handed_on():
            chunks = self._engine.astream(self._chat_prompt(messages), **self._options(kwargs, messages))
            return astream_responses(chunks, self._chat_responder(kwargs))

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """The continuation of a text."""
        with handed_on():
            generation = self._engine.generate(self._text_prompt(prompt, formatted), **self._options(kwargs, prompt))
            return whole_response(generation, self._completion_responder())

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """The continuation as it grows; closing the generator cancels the call."""
        with handed_on():
            chunks = self._engine.stream(self._text_prompt(prompt, formatted), **self._options(kwargs, prompt))
            return stream_responses(chunks, self._completion_responder())

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """As ``complete``, without blocking the event loop."""
        with handed_on():
            text = self._text_prompt(prompt, formatted)
            generation = await self._engine.agenerate(text, **self._options(kwargs, prompt))
            return whole_response(generation, self._completion_responder())

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """As ``stream_complete``, without blocking the event loop."""
        with handed_on():
            chunks = self._engine.astream(self._text_prompt(prompt, formatted), **self._options(kwargs, prompt))
            return astream_responses(chunks, self._completion_responder())

    def _chat_responder(self, call: dict[str, Any]) -> Responder[ChatResponse]:
        respond = partial(chat_response, model_name=self.model)
        return with_one_call(respond) if call.get("parallel_tool_calls") is False else respond

    def _completion_responder(self) -> Responder[CompletionResponse]:
        return partial(completion_response, model_name=self.model)

    def _chat_prompt(self, messages: Sequence[ChatMessage]) -> Prompt:
        to_prompt = self.messages_to_prompt
        return engine_messages(messages) if to_prompt is None or self.uses_template else to_prompt(messages)

    def _text_prompt(self, prompt: str, formatted: bool) -> str:
        require(isinstance(prompt, str), "prompt", type(prompt).__name__, "a text; chat takes messages")
        return prompt if formatted or self.completion_to_prompt is None else self.completion_to_prompt(prompt)


def _require_agreement(own: dict[str, Any], given: dict[str, Any]) -> None:
    """An engine brings model and settings; a field that says otherwise is a mistake."""
    for name in ("model", "mode", "config", "device", "dtype", "model_kwargs"):
        value = given.get(name)
        accepted = f"{own[name]!r} or nothing" if name in own else "nothing"
        require(value is None or value == own.get(name), name, value, f"{accepted} beside engine=")
