"""One call's way from its prompt to its answer, one line per phase, and the counts of all calls."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial

from semsharekv_integrations.answer import Answer, report_of
from semsharekv_integrations.audit import Auditor
from semsharekv_integrations.call import CallLeft, check_wanted, current_call
from semsharekv_integrations.calls import Calls
from semsharekv_integrations.concurrency import Turns
from semsharekv_integrations.forks import hold_at_forks
from semsharekv_integrations.kv import GenerationChunk
from semsharekv_integrations.logs import Observers
from semsharekv_integrations.memory import Memory
from semsharekv_integrations.model.selective import Outcome
from semsharekv_integrations.parts import ModelParts
from semsharekv_integrations.request import Request
from semsharekv_integrations.under_way import Since

COUNTS = ("requests", "prompt_tokens", "reused_tokens", "output_tokens")


class Flow:
    """The flow of every call of one engine.

    Args:
        calls: in which it runs.
        turns: taken for the prefill, so that each call may reuse what the one before computed.
        memory: where KV and replies are kept.
        auditor: who checks reuse.
        observers: who are told of reports.
    """

    def __init__(self, calls: Calls, turns: Turns, memory: Memory, auditor: Auditor, observers: Observers) -> None:
        self._calls = calls
        self._turns = turns
        self._memory = memory
        self._auditor = auditor
        self._observers = observers
        self._lock = hold_at_forks(threading.Lock())
        self._counts: Counter[str] = Counter()

    def counts(self) -> dict[str, float]:
        """Requests and tokens since the start."""
        with self._lock:
            return {name: self._counts[name] for name in COUNTS}

    def run(
        self, request: Request, parts: ModelParts, context_window: int | None, since: Since
    ) -> Generator[GenerationChunk, None, None]:
        """One prompt's flow. Every phase is timed; loading the model is not part of it.

        What was forgotten ``since`` then is not stored.
        """
        answer, call = Answer(), current_call()
        if call is not None and call.waited_s:
            answer.watch.count_before("wait", call.waited_s)
        with answer.watch.phase("render"):
            request, hints = self._memory.recognized(request)
            rendered = parts.renderer.render(
                request.prompt,
                request.documents,
                request.tools,
                hints,
                request.chat_template_kwargs,
                context_window,
            )
            parts.require_known(rendered)
            request.require_documents(rendered)
            request = request.fitted(len(rendered.token_ids), context_window)
            text = parts.begin_text(request)
        suspended = self._auditor.suspends(request.namespace)
        with self._turns.taken(answer.watch.phase("wait")):  # so that each may reuse what the one before computed
            check_wanted()
            parts = parts.current()
            plan = parts.planner.plan(rendered, request.namespace, request.session, suspended, answer.watch)
            outcome = parts.execute(plan, answer.watch)
            keep = partial(self._memory.keep, parts, request, rendered, plan, outcome, since)
            if self._calls.others_run:
                keep()
        report = report_of(parts.mode, rendered, plan, outcome, parts.adapter.kv_bytes(outcome.prefill.cache))
        try:
            yield from parts.decode(rendered, outcome.prefill, request.sampling, text, answer)
        except CallLeft:
            self._finish(outcome, answer, keep)
            raise
        with answer.watch.phase("remember"):
            self._finish(outcome, answer, keep)
        with answer.watch.phase("audit"):
            audit = parts.audit(self._auditor, request.namespace, rendered, answer.completed(report), answer)
        report = replace(answer.completed(report), audit=audit)
        self._observers.tell(report)
        yield GenerationChunk("", answer.generation(report))

    def _finish(self, outcome: Outcome, answer: Answer, keep: Callable[[Sequence[int]], object]) -> None:
        """Count the call, and remember what it said and its KV, as far as that is exact and whole."""
        with self._lock:
            self._counts.update(
                requests=1,
                prompt_tokens=len(outcome.computed),
                reused_tokens=int((~outcome.computed).sum()),
                output_tokens=len(answer.token_ids),
            )
        keep(answer.token_ids)
