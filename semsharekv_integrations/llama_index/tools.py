"""Tool calls as LlamaIndex asks for them: what goes into a chat, and what is read from its answer.

Knows nothing about how a model writes calls.

Structured output: answers that decoding holds to a class's JSON schema, whole or as they grow.

Knows nothing about how it holds them to it.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, closing
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, MessageRole
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.output_parsers import PydanticOutputParser
from llama_index.core.program.utils import process_streaming_objects
from llama_index.core.prompts.base import BasePromptTemplate
from llama_index.core.tools.types import BaseTool
from llama_index.core.types import Model, PydanticProgramMode

from semsharekv_integrations.errors import require
from semsharekv_integrations.llama_index.base import EngineLLM
from semsharekv_integrations.llama_index.messages import Responder, message_calls
from semsharekv_integrations.report import Generation, ToolCall


class ToolCallingLLM(EngineLLM):
    """An LLM that calls tools."""

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of ``chat`` for a chat with tools; a ``tool_choice`` given overrides ``tool_required``."""
        if isinstance(user_msg, str):
            user_msg = ChatMessage(role=MessageRole.USER, content=user_msg)
        messages = [*(chat_history or ()), *([user_msg] if user_msg else ())]
        choice = kwargs.pop("tool_choice", None) or ("any" if tool_required else None)
        require(bool(tools) or choice in (None, "auto", "none"), "tools", list(tools), "at least one to choose from")
        given = {"tools": list(tools), "tool_choice": choice, "parallel_tool_calls": allow_parallel_tool_calls}
        return {"messages": messages, **(given if tools else {}), **kwargs}

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The tool calls of an answer.

        Raises:
            ValueError: if there are none, unless ``error_on_no_tool_call`` is False.
        """
        calls = message_calls(response.message)
        require(bool(calls) or not error_on_no_tool_call, "answer", response.message.content, "one with a tool call")
        return [ToolSelection(tool_id=call.id, tool_name=call.name, tool_kwargs=call.arguments) for call in calls]


def with_one_call(respond: Responder[ChatResponse]) -> Responder[ChatResponse]:
    """``respond``, told of the first tool call alone."""

    def first_only(
        text: str, delta: str | None, calls: Sequence[ToolCall], generation: Generation | None
    ) -> ChatResponse:
        return respond(text, delta, calls[:1], generation)

    return first_only


class SchemaLLM(ToolCallingLLM):
    """An LLM whose answers may be objects."""

    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """An object of ``output_cls``, whose JSON schema decoding is held to."""
        prompt, llm_kwargs = self._held_to(output_cls, prompt, llm_kwargs)
        return super().structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)

    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """As ``structured_predict``, without blocking the event loop."""
        prompt, llm_kwargs = self._held_to(output_cls, prompt, llm_kwargs)
        return await super().astructured_predict(output_cls, prompt, llm_kwargs, **prompt_args)

    def stream_structured_predict(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Any, None, None]:
        """The object as it grows: with the fields that are there so far."""
        prompt, llm_kwargs = self._held_to(output_cls, prompt, llm_kwargs)
        return super().stream_structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)

    async def astream_structured_predict(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Any, None]:
        """As ``stream_structured_predict``, without blocking the event loop."""
        prompt, llm_kwargs = self._held_to(output_cls, prompt, llm_kwargs)
        return await super().astream_structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)

    def _held_to(
        self, output_cls: type[Model], prompt: BasePromptTemplate, llm_kwargs: dict[str, Any] | None
    ) -> tuple[Any, dict[str, Any]]:
        """A copy of the template, which LlamaIndex adds the schema to, and the call's options with the schema."""
        options = dict(llm_kwargs or {})
        if self.pydantic_program_mode == PydanticProgramMode.LLM:
            options.setdefault("json_schema", output_cls.model_json_schema())
        return copy.copy(prompt), options

    def _structured_stream_call(
        self, output_cls: type[Model], prompt: Any, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> Generator[Any, None, None]:
        if self.pydantic_program_mode != PydanticProgramMode.LLM:
            return super()._structured_stream_call(output_cls, prompt, llm_kwargs, **prompt_args)
        asked, options = self._with_schema(output_cls, prompt, prompt_args), llm_kwargs or {}
        if isinstance(asked, str):
            return self._objects(output_cls, self.stream_complete(asked, formatted=True, **options))
        return self._objects(output_cls, self.stream_chat(asked, **options))

    async def _structured_astream_call(
        self, output_cls: type[Model], prompt: Any, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> AsyncGenerator[Any, None]:
        if self.pydantic_program_mode != PydanticProgramMode.LLM:
            return await super()._structured_astream_call(output_cls, prompt, llm_kwargs, **prompt_args)
        asked, options = self._with_schema(output_cls, prompt, prompt_args), llm_kwargs or {}
        if isinstance(asked, str):
            return self._aobjects(output_cls, await self.astream_complete(asked, formatted=True, **options))
        return self._aobjects(output_cls, await self.astream_chat(asked, **options))

    def _with_schema(
        self, output_cls: type[Model], prompt: Any, prompt_args: dict[str, Any]
    ) -> str | list[ChatMessage]:
        """The prompt, filled in, with the schema in words."""
        prompt.output_parser = PydanticOutputParser(output_cls=output_cls)
        if self.metadata.is_chat_model:
            return self._get_messages(prompt, **prompt_args)
        return self._get_prompt(prompt, **prompt_args)

    def _objects(self, output_cls: type[Model], responses: Generator[Any, None, None]) -> Generator[Any, None, None]:
        found: Any = None
        with closing(responses):
            for response in responses:
                found = self._object(output_cls, response, found)
                yield found

    async def _aobjects(
        self, output_cls: type[Model], responses: AsyncGenerator[Any, None]
    ) -> AsyncGenerator[Any, None]:
        found: Any = None
        async with aclosing(responses):
            async for response in responses:
                found = self._object(output_cls, response, found)
                yield found

    def _object(self, output_cls: type[Model], response: ChatResponse | CompletionResponse, before: Any) -> Any:
        """The object as far as the answer goes: of another class, without its checks, while fields are missing."""
        text = response.text if isinstance(response, CompletionResponse) else response.message.content
        answer = ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=text or ""))
        return process_streaming_objects(answer, output_cls, cur_objects=before and [before], llm=self)
