"""LangChain's chat model interface over a ``SemShareEngine``.

Every way to call it goes through ``_stream`` or its asynchronous twin. Knows nothing about tokens or caches.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, closing, suppress
from pathlib import Path
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun, Callbacks
from langchain_core.language_models import BaseChatModel, ModelProfile
from langchain_core.language_models.chat_models import generate_from_stream
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult, LLMResult
from pydantic import Field, SecretStr

from semsharekv_integrations.errors import ModelLoadError
from semsharekv_integrations.kv import GenerationChunk
from semsharekv_integrations.langchain.base import LocalModel
from semsharekv_integrations.langchain.messages import engine_messages
from semsharekv_integrations.langchain.outputs import details_of, usage_of
from semsharekv_integrations.model.loading import resolve
from semsharekv_integrations.request import GenerateOptions


class ChatSemShareKV(LocalModel, BaseChatModel):
    """A local transformers model as a LangChain chat model, which reuses the KV cache of what it has seen.

    Messages go through the model's chat template. Each answer's ``usage_metadata`` counts reused prompt tokens as
    ``input_token_details["cache_read"]``; its ``response_metadata`` holds ``model_name``, ``finish_reason`` and
    ``kv_cache`` (the ``ReuseReport``), all plain JSON. In a stream exactly one chunk, the last, carries them.

    Every call also takes the sampling fields and ``namespace`` by keyword (None means what ``configurable`` of the
    config or else the field says), ``session`` (the conversation's name; by default ``configurable``'s ``thread_id`` or
    ``session_id``) and ``documents`` that stand in the prompt (texts, LangChain documents, or texts by id; see also
    ``DocumentTracker``). Anything else is refused.

    Example::

        chat = ChatSemShareKV(model="semsharekv/reference", max_tokens=64)
        chat.invoke("What happened in Prorna ?").response_metadata["kv_cache"]["prefix_tokens"]
    """

    streaming: bool | None = None
    """True: ``invoke`` takes LangChain's streaming path too. False: ``stream`` yields the answer as one message."""

    timeout: float | None = None
    """Accepted for models that can be swapped; has no effect on a local model."""

    max_retries: int | None = None
    """Accepted for models that can be swapped; has no effect on a local model."""

    api_key: SecretStr | None = Field(default=None, exclude=True, repr=False)
    """Accepted for models that can be swapped; has no effect on a local model."""

    @property
    def _llm_type(self) -> str:
        return "chat-semsharekv"

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        prompt, options = self._prepared(messages, stop, kwargs)
        with closing(self.engine.stream(prompt, **options)) as chunks:
            for chunk in chunks:
                piece = self._piece(chunk)
                if run_manager:
                    run_manager.on_llm_new_token(chunk.text, chunk=piece)
                yield piece

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        prompt, options = self._prepared(messages, stop, kwargs)
        async with aclosing(self.engine.astream(prompt, **options)) as chunks:
            async for chunk in chunks:
                piece = self._piece(chunk)
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=piece)
                yield piece

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, run_manager, **kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(
            iter([piece async for piece in self._astream(messages, stop, run_manager, **kwargs)])
        )

    def generate(
        self,
        messages: list[list[BaseMessage]],
        stop: list[str] | None = None,
        callbacks: Callbacks = None,
        **kwargs: Any,
    ) -> LLMResult:
        """As in the base class, with the documents that a tracker among the callbacks knows of."""
        return super().generate(messages, stop, callbacks, **self._tracked({"callbacks": callbacks}, kwargs))

    async def agenerate(
        self,
        messages: list[list[BaseMessage]],
        stop: list[str] | None = None,
        callbacks: Callbacks = None,
        **kwargs: Any,
    ) -> LLMResult:
        """As ``generate``, without blocking the event loop."""
        return await super().agenerate(messages, stop, callbacks, **self._tracked({"callbacks": callbacks}, kwargs))

    def _prepared(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: Mapping[str, Any]
    ) -> tuple[list[dict[str, str]], GenerateOptions]:
        """Prompt and options for the engine."""
        prompt = engine_messages(messages)
        return prompt, self._call(stop, kwargs, [message["content"] for message in prompt], messages)

    def _get_invocation_params(self, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        """What traces show; the prompt itself shows documents."""
        return super()._get_invocation_params(stop, **_without(kwargs, "tracked_documents"))

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """The key of LangChain's response cache; neither conversation nor borders are part of the question."""
        return super()._get_llm_string(stop, **_without(kwargs, "session", "documents", "tracked_documents"))

    def _piece(self, chunk: GenerationChunk) -> ChatGenerationChunk:
        if chunk.generation is None:
            return ChatGenerationChunk(message=AIMessageChunk(content=chunk.text))
        details = details_of(chunk.generation, self.model)
        message = AIMessageChunk(
            content=chunk.text,
            usage_metadata=usage_of(chunk.generation),
            response_metadata=details,
            chunk_position="last",
        )
        return ChatGenerationChunk(message=message, generation_info=details)

    def _resolve_model_profile(self) -> ModelProfile:
        """What LangChain may rely on; loads no weights and asks no network."""
        profile = ModelProfile(text_inputs=True, text_outputs=True, tool_calling=False, structured_output=False)
        window = self._context_window()
        return profile if window is None else profile | ModelProfile(max_input_tokens=window)

    def _context_window(self) -> int | None:
        """In tokens, if it is known without the network: given, of a loaded model, or stated in a local folder."""
        local = self.engine.is_loaded or Path(resolve(self.model)).is_dir()
        if not local:
            return self.config.max_context_tokens
        with suppress(ModelLoadError):  # the engine says what is wrong when it loads the model
            return self.engine.context_window
        return None


def _without(call: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name not in names}
