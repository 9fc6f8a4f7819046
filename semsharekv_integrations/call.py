"""One prompt's way through the engine: what each phase finds is written down here, and reported at the end.

Knows nothing about models and stores, which only tell it what they did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from semsharekv_integrations.arranging import Arrangement
from semsharekv_integrations.concurrency.scheduler import Job
from semsharekv_integrations.config import Mode
from semsharekv_integrations.kv import Mask, Rendered, Segment, Span, TokenIds
from semsharekv_integrations.model.selective import Outcome
from semsharekv_integrations.report import (
    AuditResult,
    DocumentUse,
    FinishReason,
    Generation,
    GenerationChunk,
    Origin,
    ReuseReport,
    Rewording,
    SourceUse,
    Stopwatch,
    TokenRun,
    ToolCall,
)
from semsharekv_integrations.request import Request
from semsharekv_integrations.reuse.plan import ReusePlan
from semsharekv_integrations.store.forgetting import Since
from semsharekv_integrations.text.answer_stream import AnswerReader
from semsharekv_integrations.text.tool_calls import AnswerPart

_ORIGINS: tuple[Origin, ...] = ("computed", "identical", "fuzzy", "prefix")
_MOST_SOURCES, _MOST_LOOKED_UP = 8, 4096  # stored texts that drafts are looked up in, and last tokens of each
_CONTEXT_TOKENS = 32  # of the reused prefix, before what its stored text has and the prompt lacks


@dataclass
class Answer:
    """What the model has said so far.

    Attributes:
        first_logits: those of the first tokens, each [B, V], for an audit.
        drafted_tokens: how many tokens were verified as a draft.
        accepted_tokens: how many of them the answer has.
    """

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: FinishReason = "cancelled"
    first_logits: list[torch.Tensor] = field(default_factory=list)
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def record_logits(self, limit: int, logits: torch.Tensor) -> None:
        """Append ``logits`` [B, V] to ``first_logits``, unless those of ``limit`` tokens are there already."""
        if len(self.first_logits) < limit:
            self.first_logits.append(logits)

    def add(self, said: AnswerPart) -> None:
        """Append the text and the tool calls of ``said`` to the answer."""
        self.text += said.text
        self.tool_calls += said.tool_calls

    def end(self, *, is_whole: bool) -> None:
        """Set ``finish_reason``: ``tool_calls`` or ``stop`` if the answer ``is_whole``, else ``length``."""
        self.finish_reason = ("tool_calls" if self.tool_calls else "stop") if is_whole else "length"


class KVBytes(NamedTuple):
    """Bytes of the prompt's KV after prefill, and what of it decoding kept."""

    prefilled: int = 0
    retained: int = 0


@dataclass(eq=False)
class Call:
    """One prompt, from its request to its answer. The phases fill it in, each in its turn.

    Attributes:
        request: what was asked for; rendering may narrow it.
        since: the moment at which it began. It must not bring back what is forgotten after that.
        watch: seconds by phase.
        answer: what decoding has said so far.
        arrangements: what was arranged lately in its namespace. Set by ``Memory.resolve_documents``.
        rendered: the prompt as tokens. Set by ``Runtime.render``.
        given_order: the same with its documents as ``arrange`` was given them, [T], if they stand as it returned them.
            Set by ``Runtime.render``.
        given_prefix_tokens: the exact prefix that the store has of ``given_order``. Set by ``Runtime.plan``.
        most_tokens: how many the prompt may have as it is read, or None for any number. Set by ``Runtime.render``.
        wordings: what was asked and what is read instead, if the report is to have it. Set by ``Runtime.plan``.
        tells_origins: whether the report says where each token's KV came from. Set by ``Runtime.plan``.
        reader: turns the answer's tokens into text and tool calls. Set by ``Runtime.render``.
        plan: which KV is borrowed, and what is read in other words. Set by ``Runtime.plan``.
        outcome: the prompt's KV, and what was computed for it. Set by ``Runtime.execute``.
        kv_bytes: of the prompt. Set by ``Runtime.execute`` and ``Runtime.decode``.
        mode: the mode it runs in. Set by ``Runtime.execute``.
        ttft_s: seconds until the first new token. Set by ``add_token``.
        audit: how the answer compares with that of a full prefill, if it was drawn.
    """

    request: Request
    since: Since
    watch: Stopwatch = field(default_factory=Stopwatch)
    answer: Answer = field(default_factory=Answer)
    rendered: Rendered = field(init=False)
    reader: AnswerReader = field(init=False)
    plan: ReusePlan = field(init=False)
    outcome: Outcome = field(init=False)
    kv_bytes: KVBytes = field(init=False)
    arrangements: Sequence[Arrangement] = ()
    given_order: TokenIds | None = None
    given_prefix_tokens: int = 0
    most_tokens: int | None = None
    wordings: tuple[Rewording, ...] = ()
    tells_origins: bool = False
    mode: Mode = "off"
    ttft_s: float = 0.0
    audit: AuditResult | None = None

    def count_wait(self, job: Job[Any] | None) -> None:
        """Add the seconds that ``job`` stood in line to ``watch``, as phase ``wait``. Do nothing if there were none."""
        if job is not None and job.waited_s:
            self.watch.count_before("wait", job.waited_s)

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of the prompt as it was asked."""
        return len(self.rendered.token_ids)

    @property
    def read(self) -> Rendered:
        """The prompt as the model reads it: some of its sentences may be in the words of stored ones."""
        return self.rendered.substitute(self.plan.substitutions)

    @property
    def reused(self) -> Mask:
        """Mask [T] of the prompt's tokens, as it was asked, whose KV was not computed at every layer."""
        return ~self.outcome.computed[self.plan.places]

    @property
    def token_ids(self) -> TokenIds:
        """Token ids [S] of the prompt, as it is read, and of the answer so far."""
        return np.concatenate([self.plan.token_ids, np.array(self.answer.token_ids, dtype=np.int64)])

    @property
    def lookup_sources(self) -> list[TokenIds]:
        """Token ids of the stored texts that the prompt reuses, answers included, as far as it does not begin alike."""
        borrowed = {each.reference.id: each.reference.token_ids for each in self.plan.borrowings}
        prefix = self.plan.prefix
        if prefix is not None:
            borrowed[prefix.reference.id] = prefix.reference.token_ids[max(0, prefix.num_tokens - _CONTEXT_TOKENS) :]
        return [ids[-_MOST_LOOKED_UP:] for ids in list(borrowed.values())[-_MOST_SOURCES:]]

    @property
    def document_spans(self) -> dict[str, Span]:
        """Documents whose deletion must drop what the store keeps of this call, and where they stand in the prompt."""
        return self.request.find_document_spans(self.read, self.plan.prefix)

    def list_wordings(self, decode: Callable[[TokenIds], str]) -> None:
        """Set ``wordings`` from the plan, as text."""
        asked, made = self.rendered.token_ids, self.plan.substitutions
        self.wordings = tuple(Rewording(decode(asked[s.start : s.stop]), decode(s.token_ids)) for s in made)

    def add_token(self, token_id: int, said: AnswerPart) -> Iterator[GenerationChunk]:
        """Append a token to the answer; the first sets ``ttft_s``. Return the iterator of ``add(said)``."""
        if not self.answer.token_ids:
            self.ttft_s = self.watch.elapsed_s
        self.answer.token_ids.append(token_id)
        return self.add(said)

    def add(self, said: AnswerPart) -> Iterator[GenerationChunk]:
        """Once iterated, add ``said`` to the answer; yield a chunk of text, maybe empty, and one per tool call."""
        self.answer.add(said)
        yield GenerationChunk(said.text)
        yield from (GenerationChunk("", tool_calls=(call,)) for call in said.tool_calls)

    def build_generation(self) -> Generation:
        """Return the answer so far with its report; changes nothing."""
        answer = self.answer
        calls = tuple(answer.tool_calls)
        return Generation(answer.text, answer.token_ids, answer.finish_reason, self.build_report(), calls)

    def build_report(self) -> ReuseReport:
        """Return what the call has reused and cost so far; changes nothing. ``execute`` must have run before."""
        plan, outcome, reused = self.plan, self.outcome, self.reused
        alike = (plan.fuzzy | plan.substituted)[plan.places] & reused
        fuzzy, prefix = int(alike.sum()), min(plan.prefix_tokens, outcome.exact_tokens)
        prefilled, retained = self.kv_bytes
        return ReuseReport(
            mode=self.mode,
            prompt_tokens=len(reused),
            prefix_tokens=prefix,
            identical_tokens=int(reused.sum()) - fuzzy - prefix,
            fuzzy_tokens=fuzzy,
            recomputed_tokens=int((~reused).sum()),
            compute_ratio=min(
                1.0, outcome.compute_ratio * len(plan.token_ids) / len(reused)
            ),  # a pass that fell back also did what it was to save
            declined=outcome.fell_back or plan.declined,
            deviation=outcome.deviation,
            sources=_count_sources(plan, reused),
            documents=tuple(
                DocumentUse(s.document_id, s.stop - s.start, int(reused[s.start : s.stop].sum()))
                for s in self.rendered.segments
            ),
            audit=self.audit,
            phases_s=dict(self.watch.phases_s),
            ttft_s=self.ttft_s,
            decode_s=self.watch.phases_s.get("decode", 0.0),
            output_tokens=len(self.answer.token_ids),
            kv_bytes=prefilled,
            kv_retained_bytes=retained,
            kv_retained_ratio=retained / prefilled if prefilled else 1.0,
            substituted_tokens=int(plan.substituted[plan.places].sum()),
            substitutions=self.wordings,
            origins=self._list_origins(alike, prefix) if self.tells_origins else (),
            prompt_ids=tuple(self.rendered.token_ids.tolist()) if self.tells_origins else (),
            drafted_tokens=self.answer.drafted_tokens,
            accepted_tokens=self.answer.accepted_tokens,
            arranged_tokens=0 if self.given_order is None else max(0, prefix - self.given_prefix_tokens),
        )

    def _list_origins(self, alike: Mask, prefix_tokens: int) -> tuple[TokenRun, ...]:
        """Return where each token of the prompt, as it was asked, has its KV from; ``alike`` [T] marks the fuzzy."""
        kinds, owners = (
            self.reused.astype(np.int64) + alike,
            _mark_documents(self.rendered.segments, self.prompt_tokens),
        )
        kinds[:prefix_tokens] = _ORIGINS.index("prefix")
        names = [None, *(segment.document_id for segment in self.rendered.segments)]
        changes = (np.diff(kinds) != 0) | (np.diff(owners) != 0)
        borders = [0, *(np.flatnonzero(changes) + 1).tolist(), self.prompt_tokens]
        return tuple(
            TokenRun(start, stop - start, _ORIGINS[kinds[start]], names[owners[start]])
            for start, stop in pairwise(borders)
        )


def _mark_documents(segments: Sequence[Segment], num_tokens: int) -> NDArray[np.int64]:
    """Return [T] the number, from 1, of the shortest segment that each token stands in; 0 if it stands in none."""
    owners = np.zeros(num_tokens, dtype=np.int64)
    for number, segment in sorted(enumerate(segments, 1), key=lambda each: each[1].start - each[1].stop):
        owners[segment.start : segment.stop] = number
    return owners


def _count_sources(plan: ReusePlan, reused: Mask) -> tuple[SourceUse, ...]:
    """Return how many tokens took KV from each reference, most first, without those that gave none."""
    sources = [*([plan.prefix.reference.id] if plan.prefix else []), *(b.reference.id for b in plan.borrowings)]
    owners = np.zeros(len(plan.token_ids), dtype=np.int64)
    for number, borrowing in enumerate(plan.borrowings, 1 if plan.prefix else 0):
        owners[borrowing.targets] = number
    tokens = Counter(sources[number] for number in owners[plan.places][reused].tolist())
    return tuple(SourceUse(key, count) for key, count in tokens.most_common() if count)
