"""Structured output: answers that decoding holds to a class's JSON schema, whole or as they grow.

Knows nothing about how it holds them to it.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, closing
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, MessageRole
from llama_index.core.output_parsers import PydanticOutputParser
from llama_index.core.program.utils import process_streaming_objects
from llama_index.core.prompts.base import BasePromptTemplate
from llama_index.core.types import Model, PydanticProgramMode

from semsharekv_integrations.llama_index.tools import ToolCallingLLM


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
