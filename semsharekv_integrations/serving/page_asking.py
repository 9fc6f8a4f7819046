"""A question of the chat page, answered by the server's own engine, within its bounds and in its metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.concurrency import run_in_threadpool

from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.report import Generation
from semsharekv_integrations.serving.highlight import split_text
from semsharekv_integrations.serving.hosting import Host
from semsharekv_integrations.serving.page_state import Reply, Turn
from semsharekv_integrations.serving.prefill_times import FullPrefill, PrefillTimes, find_seconds
from semsharekv_integrations.serving.problems import describe_error
from semsharekv_integrations.serving.schemas import ChatBody

MOST_ANSWER_TOKENS = 512
_PAUSE_S = 0.1  # between two looks at an answer


class Asker:
    """Answers turns. ``times`` learns from every full prefill of a page's visitors."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._times = PrefillTimes()

    async def answer(self, turn: Turn, asked: Mapping[str, Any], tenant: str) -> AsyncGenerator[None, None]:
        """Fill in the turn's replies, one after the other; yield whenever there is more to show.

        Closing it, or ``Turn.is_stopped``, stops the answer at its next token. Errors end up in the reply.
        """
        try:
            async with aclosing(self._write_both(turn, asked, tenant)) as steps:
                async for _ in steps:
                    yield
                    if turn.is_stopped:
                        break
        finally:
            for reply in (turn.reply, turn.other):
                if reply is not None and not reply.is_done:
                    reply.is_done, reply.finish_reason = True, "cancelled"

    async def _write_both(self, turn: Turn, asked: Mapping[str, Any], tenant: str) -> AsyncGenerator[None, None]:
        async with aclosing(self._write(turn.reply, self._host.engine, asked, tenant)) as steps:
            async for _ in steps:
                yield
        if turn.reply.report is None:  # there is nothing to compare
            turn.other = None
            return
        self._times.note(tenant, turn.reply.report)
        turn.full_prefill = self._times.find(tenant, turn.reply.report)
        if turn.other is None:
            return
        full = await run_in_threadpool(self._host.load_full_engine)
        async with aclosing(self._write(turn.other, full, asked, tenant)) as steps:
            async for _ in steps:
                yield
        if turn.other.report is not None:
            self._times.note(tenant, turn.other.report)
            turn.full_prefill = FullPrefill(find_seconds(turn.other.report), "measured just now, beside this answer")

    async def _write(
        self, reply: Reply, engine: SemShareEngine, asked: Mapping[str, Any], tenant: str
    ) -> AsyncGenerator[None, None]:
        clock = asyncio.get_running_loop().time
        shown = clock()
        try:
            most = min(MOST_ANSWER_TOKENS, self._host.most_tokens or MOST_ANSWER_TOKENS)
            body = ChatBody.model_validate({"model": self._host.model, "max_tokens": most, **asked})
            prompt, options = self._host.read_body(body, tenant)
            with self._host.take_place():
                async with aclosing(engine.astream(prompt, **options)) as chunks:
                    async for chunk in chunks:
                        reply.text += chunk.text
                        if chunk.generation is not None:
                            await self._end(reply, chunk.generation)
                        if reply.is_done or clock() >= shown + _PAUSE_S:
                            yield
                            shown = clock()
        except Exception as error:
            reply.error, reply.is_done = str(describe_error(error)), True
            yield

    async def _end(self, reply: Reply, generation: Generation) -> None:
        report, decode = generation.report, self._host.engine.tokenizer.decode
        stops = [run.start + run.tokens for run in report.origins]

        def split() -> tuple[str, ...]:
            return tuple(split_text(lambda ids: str(decode(ids)), report.prompt_ids, stops))

        reply.pieces = await run_in_threadpool(split)
        reply.text, reply.finish_reason, reply.report = generation.text, generation.finish_reason, report
        reply.is_done = True
