"""LlamaIndex's LLM interface over a ``SemShareEngine``: chat, completion and objects, each sync, async and streamed.

A call becomes one prompt and one set of options for the engine. Knows nothing about tokens, caches or reuse.
"""

from __future__ import annotations

import copy
import os
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import aclosing, closing
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
    MessageRole,
)
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.output_parsers import PydanticOutputParser
from llama_index.core.program.function_program import get_function_tool
from llama_index.core.program.utils import process_streaming_objects
from llama_index.core.prompts.base import BasePromptTemplate
from llama_index.core.types import Model, PydanticProgramMode

from semsharekv_integrations import frameworks
from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.errors import require
from semsharekv_integrations.llama_index.base import EngineLLM
from semsharekv_integrations.llama_index.messages import (
    Responder,
    astream_responses,
    hand_on_errors,
    keep_one_call,
    make_chat_response,
    make_completion_response,
    make_whole_response,
    stream_responses,
    translate_messages,
)
from semsharekv_integrations.request import GenerateOptions
from semsharekv_integrations.text.prompt import Prompt

Options = dict[str, Any] | None
Objects = Generator[Any, None, None]
AsyncObjects = AsyncGenerator[Any, None]


class SemShareKVLLM(EngineLLM):
    """A local transformers model as a LlamaIndex LLM, which reuses the KV cache of what it has seen.

    Constructing it loads nothing: configuration and tokenizer are read when ``metadata`` or ``tokenize`` is first
    asked for, the weights at the first call. Answers carry in ``raw`` plain JSON: ``usage`` (tokens, OpenAI's names),
    ``kv_cache`` (the ``ReuseReport``), ``finish_reason`` and ``model``; in streams the last response does.

    LlamaIndex counts with an OpenAI tokenizer, wrong here and maybe downloaded, unless it is given the model's own::

        llm = SemShareKVLLM(model="semsharekv/reference")
        Settings.llm = llm
        Settings.tokenizer = llm.tokenize

    Every call also takes, by keyword: the sampling fields, ``namespace`` and ``session`` (None means the field's
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
        fields: those below, and those of ``SamplingConfig``, with ``max_tokens`` for ``max_new_tokens``.

    Attributes:
        mode: ``auto``, or ``off`` to ``paper`` (see ``ReuseConfig``); None for that of ``config``.
        config: all other settings of the engine.
        device: where the model goes, or None for CUDA if there is one, else the CPU.
        dtype: ``auto`` for that of the weights, else a torch dtype or its name.
        model_kwargs: for ``AutoModelForCausalLM.from_pretrained``; left out of serialization, as it may hold a token.
        namespace: whose KV may be read, and where new KV goes: a tenant's name, by which a later process finds it too.
            None (the default) is private to this object and its copies; ``kv_namespace`` is what the engine calls it.
        session: name of the conversation, whose own earlier turns are continued even if their KV is approximate, or
            None; see ``scoped``.
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
            own = frameworks.describe_engine(engine)
            frameworks.require_agreement(own, fields)
            fields |= own
        require(fields["model"] is not None, "model", None, "a path or hub id, unless engine= is given")
        super().__init__(**fields)
        loading = self.device, self.dtype, self.model_kwargs
        self._engine = engine or frameworks.make_engine(self.model, self.mode, self.config, *loading)
        self._check_fields()

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Return the whole answer to a conversation; ``CallError`` for bad messages or options."""
        with hand_on_errors():
            prompt, options, respond = self._prepare_chat(messages, kwargs)
            return make_whole_response(self._engine.generate(prompt, **options), respond)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Check the call, as ``chat``, and return a generator of the answer so far; closing it cancels the call."""
        with hand_on_errors():
            prompt, options, respond = self._prepare_chat(messages, kwargs)
            return stream_responses(self._engine.stream(prompt, **options), respond)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """As ``chat``, without blocking the event loop."""
        with hand_on_errors():
            prompt, options, respond = self._prepare_chat(messages, kwargs)
            return make_whole_response(await self._engine.agenerate(prompt, **options), respond)

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """As ``stream_chat``, without blocking the event loop."""
        with hand_on_errors():
            prompt, options, respond = self._prepare_chat(messages, kwargs)
            return astream_responses(self._engine.astream(prompt, **options), respond)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Return the whole continuation of a text; ``CallError`` for a bad prompt or options."""
        with hand_on_errors():
            text, options, respond = self._prepare_completion(prompt, formatted, kwargs)
            return make_whole_response(self._engine.generate(text, **options), respond)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Check the call and return a generator of the continuation so far; closing it cancels the call."""
        with hand_on_errors():
            text, options, respond = self._prepare_completion(prompt, formatted, kwargs)
            return stream_responses(self._engine.stream(text, **options), respond)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """As ``complete``, without blocking the event loop."""
        with hand_on_errors():
            text, options, respond = self._prepare_completion(prompt, formatted, kwargs)
            return make_whole_response(await self._engine.agenerate(text, **options), respond)

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """As ``stream_complete``, without blocking the event loop."""
        with hand_on_errors():
            text, options, respond = self._prepare_completion(prompt, formatted, kwargs)
            return astream_responses(self._engine.astream(text, **options), respond)

    def _prepare_chat(
        self, messages: Sequence[ChatMessage], call: Mapping[str, Any]
    ) -> tuple[Prompt, GenerateOptions, Responder[ChatResponse]]:
        """Return the engine's prompt and options, and a function that makes a response. ``ValueError`` if bad."""
        to_prompt = None if self.uses_template else self.messages_to_prompt
        prompt = translate_messages(messages) if to_prompt is None else to_prompt(messages)
        respond: Responder[ChatResponse] = partial(make_chat_response, model_name=self.model)
        if call.get("parallel_tool_calls") is False:
            respond = keep_one_call(respond)
        return prompt, self._make_options(call, messages), respond

    def _prepare_completion(
        self, prompt: str, formatted: bool, call: Mapping[str, Any]
    ) -> tuple[str, GenerateOptions, Responder[CompletionResponse]]:
        """As ``_prepare_chat``, for a text, which ``completion_to_prompt`` changes unless ``formatted``."""
        require(isinstance(prompt, str), "prompt", type(prompt).__name__, "a text; chat takes messages")
        text = prompt if formatted or self.completion_to_prompt is None else self.completion_to_prompt(prompt)
        return text, self._make_options(call, prompt), partial(make_completion_response, model_name=self.model)

    def structured_predict(
        self, output_cls: type[Model], prompt: BasePromptTemplate, llm_kwargs: Options = None, **prompt_args: Any
    ) -> Model:
        """Return an object of ``output_cls``. Decoding is held to its JSON schema.

        Depending on ``pydantic_program_mode``, the object is the answer, or the arguments of a forced tool call.
        """
        prompt, llm_kwargs = self._add_schema(output_cls, prompt, llm_kwargs)
        return super().structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)

    async def astructured_predict(
        self, output_cls: type[Model], prompt: BasePromptTemplate, llm_kwargs: Options = None, **prompt_args: Any
    ) -> Model:
        """As ``structured_predict``, without blocking the event loop."""
        prompt, llm_kwargs = self._add_schema(output_cls, prompt, llm_kwargs)
        return await super().astructured_predict(output_cls, prompt, llm_kwargs, **prompt_args)

    def stream_structured_predict(
        self, output_cls: type[Model], prompt: BasePromptTemplate, llm_kwargs: Options = None, **prompt_args: Any
    ) -> Objects:
        """Return a generator of the object as it grows: each item has the fields that are there so far."""
        prompt, llm_kwargs = self._add_schema(output_cls, prompt, llm_kwargs)
        return super().stream_structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)

    async def astream_structured_predict(
        self, output_cls: type[Model], prompt: BasePromptTemplate, llm_kwargs: Options = None, **prompt_args: Any
    ) -> AsyncObjects:
        """As ``stream_structured_predict``, without blocking the event loop."""
        prompt, llm_kwargs = self._add_schema(output_cls, prompt, llm_kwargs)
        return await super().astream_structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)

    def _add_schema(
        self, output_cls: type[Model], prompt: BasePromptTemplate, llm_kwargs: Options
    ) -> tuple[Any, dict[str, Any]]:
        """Return copies of template (LlamaIndex will change it) and options, these with the schema in mode ``llm``."""
        options = dict(llm_kwargs or {})
        if self.pydantic_program_mode == PydanticProgramMode.LLM:
            options.setdefault("json_schema", output_cls.model_json_schema())
        return copy.copy(prompt), options

    def _structured_stream_call(
        self, output_cls: type[Model], prompt: Any, llm_kwargs: Options = None, **prompt_args: Any
    ) -> Objects:
        """Return a generator of growing objects; set the template's output parser. Other modes: as the base class."""
        if self._forces_call:
            call = self._force(output_cls, prompt, llm_kwargs, prompt_args)
            return self._read_called(output_cls, self.stream_chat_with_tools(**call))
        if self.pydantic_program_mode != PydanticProgramMode.LLM:
            return super()._structured_stream_call(output_cls, prompt, llm_kwargs, **prompt_args)
        asked, options = self._fill_prompt(output_cls, prompt, prompt_args), llm_kwargs or {}
        if isinstance(asked, str):
            return self._read_objects(output_cls, self.stream_complete(asked, formatted=True, **options))
        return self._read_objects(output_cls, self.stream_chat(asked, **options))

    async def _structured_astream_call(
        self, output_cls: type[Model], prompt: Any, llm_kwargs: Options = None, **prompt_args: Any
    ) -> AsyncObjects:
        """As ``_structured_stream_call``, without blocking the event loop."""
        if self._forces_call:
            call = self._force(output_cls, prompt, llm_kwargs, prompt_args)
            return self._aread_called(output_cls, await self.astream_chat_with_tools(**call))
        if self.pydantic_program_mode != PydanticProgramMode.LLM:
            return await super()._structured_astream_call(output_cls, prompt, llm_kwargs, **prompt_args)
        asked, options = self._fill_prompt(output_cls, prompt, prompt_args), llm_kwargs or {}
        if isinstance(asked, str):
            return self._aread_objects(output_cls, await self.astream_complete(asked, formatted=True, **options))
        return self._aread_objects(output_cls, await self.astream_chat(asked, **options))

    @property
    def _forces_call(self) -> bool:
        """Whether objects are the arguments of a forced tool call, which LlamaIndex's own streams do not force."""
        by_call = self.pydantic_program_mode in (PydanticProgramMode.DEFAULT, PydanticProgramMode.FUNCTION)
        return by_call and self.metadata.is_function_calling_model

    def _force(self, output_cls: type[Model], prompt: Any, llm_kwargs: Options, args: dict[str, Any]) -> dict[str, Any]:
        """Return arguments for ``stream_chat_with_tools`` that force a call with those of an object."""
        messages = self._extend_messages(prompt.format_messages(llm=self, **args))
        forced = {"tools": [get_function_tool(output_cls)], "tool_choice": "any", "allow_parallel_tool_calls": False}
        return {**(llm_kwargs or {}), "chat_history": messages, **forced}

    def _read_called(self, output_cls: type[Model], responses: Objects) -> Objects:
        """As ``_read_objects``, of tool calls; ``ValueError`` at the end if the call was cut."""
        found: Any = None
        with closing(responses):
            for response in responses:
                found = process_streaming_objects(response, output_cls, llm=self)
                yield found
        _require_object(output_cls, found)

    async def _aread_called(self, output_cls: type[Model], responses: AsyncObjects) -> AsyncObjects:
        found: Any = None
        async with aclosing(responses):
            async for response in responses:
                found = process_streaming_objects(response, output_cls, llm=self)
                yield found
        _require_object(output_cls, found)

    def _fill_prompt(self, output_cls: type[Model], prompt: Any, args: dict[str, Any]) -> str | list[ChatMessage]:
        """Set the template's output parser; return prompt text or messages, filled in, with the schema in words."""
        prompt.output_parser = PydanticOutputParser(output_cls=output_cls)
        return self._get_messages(prompt, **args) if self.metadata.is_chat_model else self._get_prompt(prompt, **args)

    def _read_objects(self, output_cls: type[Model], responses: Objects) -> Objects:
        """Yield for each response the object so far; closing this closes ``responses``, which cancels the call."""
        found: Any = None
        with closing(responses):
            for response in responses:
                found = self._read_object(output_cls, response, found)
                yield found
        _require_whole(response)

    async def _aread_objects(self, output_cls: type[Model], responses: AsyncObjects) -> AsyncObjects:
        found: Any = None
        async with aclosing(responses):
            async for response in responses:
                found = self._read_object(output_cls, response, found)
                yield found
        _require_whole(response)

    def _read_object(self, output_cls: type[Model], response: ChatResponse | CompletionResponse, before: Any) -> Any:
        """Return the object as far as the answer goes: while fields are missing, of a lenient class without checks."""
        answer = ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=_get_text(response)))
        return process_streaming_objects(answer, output_cls, cur_objects=before and [before], llm=self)


def _get_text(response: ChatResponse | CompletionResponse) -> str:
    return (response.text if isinstance(response, CompletionResponse) else response.message.content) or ""


def _require_whole(response: ChatResponse | CompletionResponse) -> None:
    """Raise ``ValueError`` if the answer, now at its end, is no JSON, as a cut one that made an object all the same."""
    text = _get_text(response)
    require(frameworks.is_json_text(text), "answer", text, "whole json, which max_tokens or a stop string cut")


def _require_object(output_cls: type[Model], found: Any) -> None:
    require(isinstance(found, output_cls), "answer", found, f"a whole {output_cls.__name__}")
