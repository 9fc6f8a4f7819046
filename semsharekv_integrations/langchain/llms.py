"""LangChain's text-in, text-out interface over a ``SemShareEngine``.

Every way to call it goes through ``_stream`` or its asynchronous twin. Knows nothing about tokens or caches.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from functools import partial
from typing import Any, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun, Callbacks
from langchain_core.language_models import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult

from semsharekv_integrations import kv
from semsharekv_integrations.concurrency.streams import Stream, raise_first_error, read_all
from semsharekv_integrations.langchain.base import CallOptions, LocalModel, SamplingFields, under_own_names
from semsharekv_integrations.langchain.messages import details_of, known_to_langchain, usage_of


class SemShareKVLLM(LocalModel, BaseLLM):
    """A local transformers model as a LangChain LLM, which reuses the KV cache of what it has seen.

    Prompts are continued as they are, without a chat template. Each generation's ``generation_info`` holds
    ``model_name``, ``finish_reason``, ``usage`` (tokens) and ``kv_cache`` (the ``ReuseReport``), all plain JSON.

    Every call also takes the sampling fields and ``namespace`` by keyword (None means what ``configurable`` of the
    config or else the field says), ``session`` (the conversation's name; by default ``configurable``'s ``thread_id`` or
    ``session_id``) and ``documents`` that stand in the prompt (texts, LangChain documents, or texts by id; see also
    ``DocumentTracker``). Anything else is refused.

    Example::

        llm = SemShareKVLLM(model="semsharekv/reference", max_tokens=64)
        llm.invoke("In Prorna ,")
    """

    @property
    def _llm_type(self) -> str:
        return "semsharekv"

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        options = CallOptions.of(self, stop, kwargs).for_engine([prompt])
        with known_to_langchain(), closing(self.engine.stream(prompt, **options)) as chunks:
            for chunk in chunks:
                piece = self._piece(chunk)
                if run_manager:
                    run_manager.on_llm_new_token(piece.text, chunk=piece)
                yield piece

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        options = CallOptions.of(self, stop, kwargs).for_engine([prompt])
        with known_to_langchain():
            async with aclosing(self.engine.astream(prompt, **options)) as chunks:
                async for chunk in chunks:
                    piece = self._piece(chunk)
                    if run_manager:
                        await run_manager.on_llm_new_token(piece.text, chunk=piece)
                    yield piece

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """The answers in order, at the same time. Only the first prompt has a run manager, which hears its tokens."""

        def begin(prompt: str) -> Stream[kv.GenerationChunk]:
            return self.engine.stream(prompt, **CallOptions.of(self, stop, kwargs).for_engine([prompt]))

        def hear(chunk: kv.GenerationChunk) -> None:
            if run_manager:
                piece = self._piece(chunk)
                run_manager.on_llm_new_token(piece.text, chunk=piece)

        with self.engine.sharing(), known_to_langchain():
            done = raise_first_error(read_all([partial(begin, prompt) for prompt in prompts], hear))
        return self._result([_whole([self._piece(chunk) for chunk in chunks]) for chunks in done])

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        async def answer(index: int) -> Generation:
            listener = None if index else run_manager
            return _whole([piece async for piece in self._astream(prompts[index], stop, listener, **kwargs)])

        with self.engine.sharing():
            done = await asyncio.gather(*map(answer, range(len(prompts))), return_exceptions=True)
        return self._result(raise_first_error(done))

    def generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Callbacks | list[Callbacks] | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """As in the base class, except that the response cache is keyed by the call's settings as well."""
        kwargs = self._tracked({"callbacks": callbacks}, kwargs)
        return BaseLLM.generate(self._keyed_by(kwargs), prompts, stop, callbacks, **kwargs)

    async def agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Callbacks | list[Callbacks] | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """As ``generate``, without blocking the event loop."""
        kwargs = self._tracked({"callbacks": callbacks}, kwargs)
        return await BaseLLM.agenerate(self._keyed_by(kwargs), prompts, stop, callbacks, **kwargs)

    def _keyed_by(self, call: Mapping[str, Any]) -> Self:
        """This model with the call's settings as fields, for the key that ``BaseLLM`` makes of the fields alone."""
        known = under_own_names(call).items()
        changes = {key: value for key, value in known if key in SamplingFields.model_fields and value is not None}
        return self.model_copy(update=changes) if changes else self

    def _piece(self, chunk: kv.GenerationChunk) -> GenerationChunk:
        if chunk.generation is None:
            return GenerationChunk(text=chunk.text)
        usage = {"usage": dict(usage_of(chunk.generation))}
        return GenerationChunk(text=chunk.text, generation_info=details_of(chunk.generation, self.model) | usage)

    def _result(self, answers: Sequence[Generation]) -> LLMResult:
        usages = [answer.generation_info["usage"] for answer in answers if answer.generation_info]
        token_usage = {
            "prompt_tokens": sum(usage["input_tokens"] for usage in usages),
            "completion_tokens": sum(usage["output_tokens"] for usage in usages),
            "total_tokens": sum(usage["total_tokens"] for usage in usages),
        }
        llm_output = {"token_usage": token_usage, "model_name": self.model}
        return LLMResult(generations=[[answer] for answer in answers], llm_output=llm_output)


def _whole(pieces: Sequence[GenerationChunk]) -> Generation:
    return Generation(text="".join(piece.text for piece in pieces), generation_info=pieces[-1].generation_info)
