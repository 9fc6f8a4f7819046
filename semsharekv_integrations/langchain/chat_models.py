"""LangChain's chat model interface over a ``SemShareEngine``. Every call goes through ``_stream`` or ``_astream``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.language_models import BaseChatModel, LanguageModelInput, ModelProfile
from langchain_core.language_models.chat_models import generate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import Runnable
from pydantic import Field, SecretStr

from semsharekv_integrations import frameworks
from semsharekv_integrations.concurrency.streams import raise_first_error, run_each
from semsharekv_integrations.errors import ModelLoadError, PromptError, UnsupportedModelError
from semsharekv_integrations.langchain.base import AsyncRun, LocalModel, Run, Stop
from semsharekv_integrations.langchain.messages import (
    astream_pieces,
    describe_answer,
    stream_pieces,
    translate_messages,
)
from semsharekv_integrations.langchain.tools import (
    ChatOptions,
    Choice,
    Method,
    Tool,
    ToolCallChunks,
    add_parser,
    convert_tool,
    make_json_schema,
    translate_choice,
)
from semsharekv_integrations.model.loading import is_local
from semsharekv_integrations.report import GenerationChunk
from semsharekv_integrations.request import GenerateOptions


class ChatSemShareKV(LocalModel, BaseChatModel):
    """A local transformers model as a LangChain chat model, which reuses the KV cache of what it has seen.

    Messages go through the model's chat template. Each answer's ``usage_metadata`` counts reused prompt tokens as
    ``input_token_details["cache_read"]``; its ``response_metadata`` holds ``model_name``, ``model_provider``,
    ``finish_reason`` and ``kv_cache`` (the ``ReuseReport``), all plain JSON. In a stream exactly one chunk, the last,
    carries them.

    Every call also takes the sampling fields and ``namespace`` by keyword (None means what ``configurable`` of the
    config or else the field says), ``session`` (the conversation's name; by default ``configurable``'s ``thread_id`` or
    ``session_id``) and ``documents`` that stand in the prompt (texts, LangChain documents, or texts by id; see also
    ``DocumentTracker``), ``chat_template_kwargs``, and with tools ``parallel_tool_calls``. Anything else is refused.

    Example::

        chat = ChatSemShareKV(model="semsharekv/reference", max_tokens=64)
        chat.invoke("What happened in Prorna ?").response_metadata["kv_cache"]["prefix_tokens"]
    """

    streaming: bool | None = None
    """True: ``invoke`` takes LangChain's streaming path too. False: ``stream`` yields the answer as one message."""

    chat_template_kwargs: dict[str, Any] | None = None
    """More variables for the chat template, such as ``enable_thinking``; a call's own replace them."""

    stream_usage: bool | None = None
    timeout: float | None = None
    max_retries: int | None = None
    api_key: SecretStr | None = Field(default=None, exclude=True, repr=False)
    """As ``stream_usage``, ``timeout`` and ``max_retries``, accepted for models that can be swapped, without effect."""

    @property
    def _llm_type(self) -> str:
        return "chat-semsharekv"

    def _stream(
        self, messages: list[BaseMessage], stop: Stop = None, run_manager: Run = None, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        """Check the call (``ValueError``) and return an iterator over its pieces; closing that cancels the call."""
        prompt, options, make_piece = self._prepare(messages, stop, kwargs)
        return stream_pieces(self.engine.stream(prompt, **options), make_piece, run_manager)

    def _astream(
        self, messages: list[BaseMessage], stop: Stop = None, run_manager: AsyncRun = None, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        prompt, options, make_piece = self._prepare(messages, stop, kwargs)
        return astream_pieces(self.engine.astream(prompt, **options), make_piece, run_manager)

    def _generate(
        self, messages: list[BaseMessage], stop: Stop = None, run_manager: Run = None, **kwargs: Any
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, run_manager, **kwargs))

    async def _agenerate(
        self, messages: list[BaseMessage], stop: Stop = None, run_manager: AsyncRun = None, **kwargs: Any
    ) -> ChatResult:
        """Read the pieces of ``_astream`` to the end and return them as one result."""
        pieces = [piece async for piece in self._astream(messages, stop, run_manager, **kwargs)]
        return generate_from_stream(iter(pieces))

    def generate(
        self, messages: list[list[BaseMessage]], stop: Stop = None, callbacks: Callbacks = None, **kwargs: Any
    ) -> LLMResult:
        """As in the base class, but all prompts run at the same time; the first error is raised once all have ended."""
        kwargs = self._add_tracked(callbacks, kwargs)
        if len(messages) < 2:
            return super().generate(messages, stop, callbacks, **kwargs)
        first_id = kwargs.pop("run_id", None)

        def answer(index: int) -> LLMResult:
            run_id = None if index else first_id
            return BaseChatModel.generate(self, [messages[index]], stop, callbacks, run_id=run_id, **kwargs)

        with self.engine.sharing():
            done = raise_first_error(run_each(answer, range(len(messages)), self.engine.config.max_batch_size))
        return LLMResult(
            generations=[generations for result in done for generations in result.generations],
            llm_output=self._combine_llm_outputs([result.llm_output for result in done]),
            run=[run for result in done for run in result.run or []],
        )

    async def agenerate(
        self, messages: list[list[BaseMessage]], stop: Stop = None, callbacks: Callbacks = None, **kwargs: Any
    ) -> LLMResult:
        """As ``generate``, without blocking the event loop."""
        with self.engine.sharing():
            return await super().agenerate(messages, stop, callbacks, **self._add_tracked(callbacks, kwargs))

    def get_num_tokens_from_messages(self, messages: Sequence[BaseMessage], tools: Sequence[Tool] | None = None) -> int:
        """Return how many tokens these messages and tools make as a prompt, by the chat template; loads no weights.

        Messages that no prompt can be of, such as part of a conversation, are counted as LangChain does by default.
        """
        shown = list(map(convert_tool, tools or ())) or None
        options = GenerateOptions(tools=shown, chat_template_kwargs=self.chat_template_kwargs)
        if self.custom_get_token_ids is None:
            with suppress(PromptError):
                return frameworks.count_prompt_tokens(self.engine, translate_messages(messages), **options)
        return super().get_num_tokens_from_messages(list(messages), tools)

    def _prepare(
        self, messages: list[BaseMessage], stop: Stop, call: Mapping[str, Any]
    ) -> tuple[list[dict[str, Any]], GenerateOptions, Callable[[GenerationChunk], ChatGenerationChunk]]:
        """Return prompt, engine options and a function from chunk to LangChain's piece. ``ValueError`` if bad."""
        prompt, options = translate_messages(messages), ChatOptions.merge(self, stop, call)
        known = options.make_options([str(turn["content"]) for turn in prompt], messages)
        return prompt, known, partial(self._make_piece, ToolCallChunks(options))

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {**super()._identifying_params, "chat_template_kwargs": self.chat_template_kwargs}

    def _get_invocation_params(self, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        """Return the options that traces show: all but ``tracked_documents``, whose texts the prompt shows."""
        return super()._get_invocation_params(stop, **_omit(kwargs, "tracked_documents"))

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """Return the key of LangChain's response cache, from which a call's session and documents are left out."""
        return super()._get_llm_string(stop, **_omit(kwargs, "session", "documents", "tracked_documents"))

    def _make_piece(self, calls: ToolCallChunks, chunk: GenerationChunk) -> ChatGenerationChunk:
        """Make LangChain's piece of a chunk and count its calls; the last has usage, finish reason and report."""
        text, tool_calls = calls.read(chunk)
        if chunk.generation is None:
            return ChatGenerationChunk(message=AIMessageChunk(content=text, tool_call_chunks=tool_calls))
        usage, details = describe_answer(chunk.generation, self.model)
        if chunk.generation.finish_reason == "tool_calls" and not calls.count:  # the answer itself was the call
            details["finish_reason"] = "stop"
        message = AIMessageChunk(content=text, usage_metadata=usage, response_metadata=details, chunk_position="last")
        return ChatGenerationChunk(message=message, generation_info=details)

    def bind_tools(
        self, tools: Sequence[Tool], *, tool_choice: Choice = None, strict: bool | None = None, **kwargs: Any
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Return this model bound to tools that it may call; its messages then have ``tool_calls``.

        Args:
            tools: functions, pydantic classes, LangChain tools, or schemas. None at all leaves the calls without tools.
            tool_choice: ``auto`` (the default: the model decides), ``none``, ``any`` (it must call one), or the name of
                the one it must call; also in the forms of OpenAI and Anthropic.
            strict: accepted for models that can be swapped; arguments are held to the tool's schema in any case.
            kwargs: options of the calls, such as ``parallel_tool_calls``: False for one call at most.
        """
        choice = translate_choice(tool_choice)
        if isinstance(tool_choice, Mapping) and tool_choice.get("disable_parallel_tool_use"):  # as Anthropic has it
            kwargs.setdefault("parallel_tool_calls", False)
        bound: dict[str, Any] = {"tools": list(map(convert_tool, tools))} if tools else {}
        return self.bind(**bound, **({} if choice is None else {"tool_choice": choice}), **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Method = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Return this model with a parser behind it: sampling is held to a schema, and answers are objects of it.

        Args:
            schema: a pydantic class, whose objects are returned; else a TypedDict or a JSON schema, for dictionaries,
                also in the form of OpenAI's answer formats.
            method: ``json_schema`` and ``json_mode`` hold the text to the schema (``json_mode`` also goes without one:
                any JSON object); ``function_calling`` makes it the arguments of a tool, which the model is shown.
            include_raw: whether to return a dictionary with ``raw``, ``parsed`` and ``parsing_error``.
            strict: accepted for models that can be swapped; the schema is held to in any case.
            kwargs: options of the calls.
        """
        shape = make_json_schema(schema, method)
        traced: dict[str, Any] = {"ls_structured_output_format": {"kwargs": {"method": method}, "schema": shape}}
        if method == "function_calling":
            assert schema is not None
            model = self.bind_tools([schema], tool_choice="any", **traced, **kwargs)
        else:
            model = self.bind(json_schema=shape, **traced, **kwargs)
        return add_parser(model, schema, method, include_raw=include_raw)

    def _resolve_model_profile(self) -> ModelProfile:
        """Return what LangChain may rely on, with the context window if known. Loads no weights, uses no network."""
        known = ModelProfile(text_inputs=True, text_outputs=True, temperature=True)
        known |= ModelProfile(tool_calling=True, tool_choice=True, structured_output=True)
        window = self._find_context_window()
        return known if window is None else known | ModelProfile(max_input_tokens=window)

    def _find_context_window(self) -> int | None:
        """Return the window configured, or stated by a loaded model or local folder; else None. Uses no network."""
        if not self.engine.is_loaded and not is_local(self.model, self.model_kwargs):
            return self.config.max_context_tokens
        with suppress(ModelLoadError, UnsupportedModelError):  # the engine says what is wrong when it loads the model
            return self.engine.context_window
        return None


def _omit(call: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name not in names}
