"""LangChain's text-in, text-out interface over a ``SemShareEngine``. Knows nothing about tokens or caches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Self

from langchain_core.callbacks import Callbacks
from langchain_core.language_models import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult

from semsharekv_integrations import report
from semsharekv_integrations.concurrency.streams import Stream, raise_first_error, read_all
from semsharekv_integrations.langchain.base import (
    AsyncRun,
    CallOptions,
    LocalModel,
    Run,
    SamplingFields,
    Stop,
    rename_options,
)
from semsharekv_integrations.langchain.messages import astream_pieces, describe_answer, raise_overflow, stream_pieces
from semsharekv_integrations.request import GenerateOptions


class SemShareKVLLM(LocalModel, BaseLLM):
    """A local transformers model as a LangChain LLM, which reuses the KV cache of what it has seen.

    Prompts are continued as they are, without a chat template. Each generation's ``generation_info`` has
    ``model_name``, ``finish_reason``, ``usage`` (tokens) and ``kv_cache`` (the ``ReuseReport``), as plain JSON. Calls
    take sampling fields, ``namespace``, ``session`` and ``documents`` by keyword, as ``ChatSemShareKV``; nothing else.

    Example::

        SemShareKVLLM(model="semsharekv/reference", max_tokens=64).invoke("In Prorna ,")
    """

    @property
    def _llm_type(self) -> str:
        return "semsharekv"

    def _stream(
        self, prompt: str, stop: Stop = None, run_manager: Run = None, **kwargs: Any
    ) -> Iterator[GenerationChunk]:
        chunks = self.engine.stream(prompt, **self._make_options(prompt, stop, kwargs))
        return stream_pieces(chunks, self._make_piece, run_manager)

    def _astream(
        self, prompt: str, stop: Stop = None, run_manager: AsyncRun = None, **kwargs: Any
    ) -> AsyncIterator[GenerationChunk]:
        chunks = self.engine.astream(prompt, **self._make_options(prompt, stop, kwargs))
        return astream_pieces(chunks, self._make_piece, run_manager)

    def _make_options(self, prompt: str, stop: Stop, call: Mapping[str, Any]) -> GenerateOptions:
        return CallOptions.merge(self, stop, call).make_options([prompt])

    def _generate(self, prompts: list[str], stop: Stop = None, run_manager: Run = None, **kwargs: Any) -> LLMResult:
        """Run all prompts at once; return answers in order or raise the first error. ``run_manager`` hears prompt 0."""

        def begin(prompt: str) -> Stream[report.GenerationChunk]:
            return self.engine.stream(prompt, **self._make_options(prompt, stop, kwargs))

        def hear(chunk: report.GenerationChunk) -> None:
            if run_manager:
                run_manager.on_llm_new_token(chunk.text, chunk=self._make_piece(chunk))

        with self.engine.sharing(), raise_overflow():
            done = raise_first_error(read_all([partial(begin, prompt) for prompt in prompts], hear))
        return self._make_result([_join([self._make_piece(chunk) for chunk in chunks]) for chunks in done])

    async def _agenerate(
        self, prompts: list[str], stop: Stop = None, run_manager: AsyncRun = None, **kwargs: Any
    ) -> LLMResult:
        """As ``_generate``, without blocking the event loop."""

        async def answer(index: int) -> Generation:
            listener = None if index else run_manager
            return _join([piece async for piece in self._astream(prompts[index], stop, listener, **kwargs)])

        with self.engine.sharing():
            done = await asyncio.gather(*map(answer, range(len(prompts))), return_exceptions=True)
        return self._make_result(raise_first_error(done))

    def generate(
        self, prompts: list[str], stop: Stop = None, callbacks: Callbacks | list[Callbacks] = None, **kwargs: Any
    ) -> LLMResult:
        """As in the base class, but the response cache is keyed by the call's settings as well as by the fields."""
        kwargs = self._add_tracked(callbacks, kwargs)
        return BaseLLM.generate(self._set_fields(kwargs), prompts, stop, callbacks, **kwargs)

    async def agenerate(
        self, prompts: list[str], stop: Stop = None, callbacks: Callbacks | list[Callbacks] = None, **kwargs: Any
    ) -> LLMResult:
        """As ``generate``, without blocking the event loop."""
        kwargs = self._add_tracked(callbacks, kwargs)
        return await BaseLLM.agenerate(self._set_fields(kwargs), prompts, stop, callbacks, **kwargs)

    def _set_fields(self, call: Mapping[str, Any]) -> Self:
        """Return a copy with the call's settings as fields, of which ``BaseLLM`` makes its cache key; self if none."""
        known = rename_options(call).items()
        changes = {key: value for key, value in known if key in SamplingFields.model_fields and value is not None}
        return self.model_copy(update=changes) if changes else self

    def _make_piece(self, chunk: report.GenerationChunk) -> GenerationChunk:
        if chunk.generation is None:
            return GenerationChunk(text=chunk.text)
        usage, details = describe_answer(chunk.generation, self.model)
        return GenerationChunk(text=chunk.text, generation_info=details | {"usage": dict(usage)})

    def _make_result(self, answers: Sequence[Generation]) -> LLMResult:
        """Return the answers as one result, with the sums of their token counts."""
        usages = [answer.generation_info["usage"] for answer in answers if answer.generation_info]
        names = {"prompt_tokens": "input_tokens", "completion_tokens": "output_tokens", "total_tokens": "total_tokens"}
        token_usage = {name: sum(usage[own] for usage in usages) for name, own in names.items()}
        llm_output = {"token_usage": token_usage, "model_name": self.model}
        return LLMResult(generations=[[answer] for answer in answers], llm_output=llm_output)


def _join(pieces: Sequence[GenerationChunk]) -> Generation:
    return Generation(text="".join(piece.text for piece in pieces), generation_info=pieces[-1].generation_info)
