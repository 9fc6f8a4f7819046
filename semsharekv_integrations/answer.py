"""One answer as it grows: its text, tokens and times, and the report that goes with it.

Knows nothing about models and stores: it is told what they did.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace

from semsharekv_integrations.config import Mode
from semsharekv_integrations.kv import FinishReason, Generation, GenerationChunk, PrefixMatch, Rendered
from semsharekv_integrations.report import DocumentUse, ReuseReport, SourceUse, Stopwatch


@dataclass
class Answer:
    """One generation as it grows."""

    watch: Stopwatch = field(default_factory=Stopwatch)
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    ttft_s: float = 0.0
    finish_reason: FinishReason = "cancelled"

    def add(self, token_id: int, piece: str) -> None:
        """One more token, and the text that it made certain."""
        if not self.token_ids:
            self.ttft_s = self.watch.elapsed_s
        self.token_ids.append(token_id)
        self.text += piece

    def generation(self, report: ReuseReport) -> Generation:
        """The whole, with its times put into ``report``."""
        report = replace(
            report,
            ttft_s=self.ttft_s,
            decode_s=self.watch.phases_s["decode"],
            phases_s=dict(self.watch.phases_s),
            output_tokens=len(self.token_ids),
        )
        return Generation(self.text, self.token_ids, self.finish_reason, report)


def report_of(
    mode: Mode, rendered: Rendered, prefix: PrefixMatch | None, kv_bytes: int, declined: str | None
) -> ReuseReport:
    """What is known once the prompt's KV is there."""
    prompt_tokens = len(rendered.token_ids)
    reused = prefix.num_tokens if prefix else 0
    return ReuseReport(
        mode=mode,
        prompt_tokens=prompt_tokens,
        prefix_tokens=reused,
        recomputed_tokens=prompt_tokens - reused,
        compute_ratio=(prompt_tokens - reused) / prompt_tokens,
        declined=declined,
        sources=(SourceUse(prefix.reference.id, reused),) if prefix else (),
        documents=tuple(
            DocumentUse(s.document_id, s.stop - s.start, max(0, min(s.stop, reused) - s.start))
            for s in rendered.segments
        ),
        kv_bytes=kv_bytes,
    )


def spoken(chunks: Generator[GenerationChunk, None, None]) -> Generator[GenerationChunk, None, None]:
    """Without the empty chunks of tokens that end no piece of text; closing it closes ``chunks``."""
    with closing(chunks):
        for chunk in chunks:
            if chunk.text or chunk.generation:
                yield chunk


def last_of(chunks: Iterator[GenerationChunk]) -> Generation:
    """The generation that the last chunk carries."""
    generation = [chunk.generation for chunk in chunks][-1]
    assert generation is not None, "the last chunk carries the generation"
    return generation
