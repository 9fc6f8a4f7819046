"""One answer as it grows: its text, tokens and times, and the report that goes with it.

Knows nothing about models and stores: it is told what they did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from semsharekv_integrations.config import Mode
from semsharekv_integrations.kv import FinishReason, Generation, GenerationChunk, Mask, Rendered, ToolCall
from semsharekv_integrations.model.selective import Outcome
from semsharekv_integrations.report import DocumentUse, ReuseReport, SourceUse, Stopwatch
from semsharekv_integrations.reuse.plan import ReusePlan
from semsharekv_integrations.text.tool_calls import Said


@dataclass
class Answer:
    """One generation as it grows."""

    watch: Stopwatch = field(default_factory=Stopwatch)
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    ttft_s: float = 0.0
    finish_reason: FinishReason = "cancelled"
    first_logits: list[torch.Tensor] = field(default_factory=list)
    kept_bytes: int | None = None  # of the prompt's KV, where not all of it was kept for decoding

    def see(self, most: int, logits: torch.Tensor) -> None:
        """Keep the logits [B, V] of the first ``most`` tokens, for an audit."""
        if len(self.first_logits) < most:
            self.first_logits.append(logits)

    def add(self, token_id: int, said: Said) -> None:
        """One more token, and what it made certain."""
        if not self.token_ids:
            self.ttft_s = self.watch.elapsed_s
        self.token_ids.append(token_id)
        self.say(said)

    def say(self, said: Said) -> None:
        """More text and tool calls."""
        self.text += said.text
        self.tool_calls += said.tool_calls

    def end(self, *, whole: bool) -> None:
        """Nothing more; ``whole`` unless a limit cut it."""
        self.finish_reason = ("tool_calls" if self.tool_calls else "stop") if whole else "length"

    def generation(self, report: ReuseReport) -> Generation:
        """The whole, with ``report``."""
        return Generation(self.text, self.token_ids, self.finish_reason, report, tuple(self.tool_calls))

    def completed(self, report: ReuseReport) -> ReuseReport:
        """``report`` with what is known at the end."""
        if self.kept_bytes is not None:
            ratio = self.kept_bytes / report.kv_bytes
            report = replace(report, kv_retained_bytes=self.kept_bytes, kv_retained_ratio=ratio)
        return replace(
            report,
            ttft_s=self.ttft_s,
            decode_s=self.watch.phases_s["decode"],
            phases_s=dict(self.watch.phases_s),
            output_tokens=len(self.token_ids),
        )


def report_of(mode: Mode, rendered: Rendered, plan: ReusePlan, outcome: Outcome, kv_bytes: int) -> ReuseReport:
    """What is known once the prompt's KV is there."""
    reused = ~outcome.computed
    fuzzy = int((plan.fuzzy & reused).sum())
    prefix = min(plan.prefix_tokens, outcome.exact_tokens)
    return ReuseReport(
        mode=mode,
        prompt_tokens=len(reused),
        prefix_tokens=prefix,
        identical_tokens=int(reused.sum()) - fuzzy - prefix,
        fuzzy_tokens=fuzzy,
        recomputed_tokens=int(outcome.computed.sum()),
        compute_ratio=min(1.0, outcome.compute_ratio),  # a pass that fell back also did what it was to save
        declined=outcome.fell_back or plan.declined,
        deviation=outcome.deviation,
        sources=_sources(plan, reused),
        documents=tuple(
            DocumentUse(s.document_id, s.stop - s.start, int(reused[s.start : s.stop].sum())) for s in rendered.segments
        ),
        kv_bytes=kv_bytes,
        kv_retained_bytes=kv_bytes,
    )


def _sources(plan: ReusePlan, reused: Mask) -> tuple[SourceUse, ...]:
    """How many tokens each reference gave, most first."""
    tokens: Counter[str] = Counter()
    if plan.prefix:
        tokens[plan.prefix.reference.id] += plan.prefix_tokens
    for borrowing in plan.borrowings:
        tokens[borrowing.reference.id] += int(reused[borrowing.targets].sum())
    return tuple(SourceUse(key, count) for key, count in tokens.most_common() if count)


def chunks_of(said: Said) -> Iterator[GenerationChunk]:
    """One chunk of text, perhaps empty, and one for each tool call."""
    yield GenerationChunk(said.text)
    yield from (GenerationChunk("", tool_calls=(call,)) for call in said.tool_calls)


def last_of(chunks: Iterator[GenerationChunk]) -> Generation:
    """The generation that the last chunk carries."""
    generation = [chunk.generation for chunk in chunks][-1]
    assert generation is not None, "the last chunk carries the generation"
    return generation
