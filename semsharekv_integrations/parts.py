"""What exists once the model is there: its adapter, renderer, planner and executor, put together for one mode."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Generator
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from semsharekv_integrations.answer import Answer, chunks_of
from semsharekv_integrations.audit import Auditor
from semsharekv_integrations.config import EngineConfig, ReuseConfig, SamplingConfig
from semsharekv_integrations.core.plan import ReusePlan
from semsharekv_integrations.core.relevance import relevance, relevant_tokens
from semsharekv_integrations.errors import UnsupportedModelError
from semsharekv_integrations.index import Embedder, PooledEmbedder, SegmentIndex, SentenceEmbedder
from semsharekv_integrations.kv import GenerationChunk, Rendered
from semsharekv_integrations.matching import FuzzyMatcher
from semsharekv_integrations.model.adapter import ModelAdapter, Prefill
from semsharekv_integrations.model.answer_text import AnswerText, AnswerTexts
from semsharekv_integrations.model.batching import SharedDecoding
from semsharekv_integrations.model.decoding import Decoder
from semsharekv_integrations.model.loading import ModelSource
from semsharekv_integrations.model.prompt import PromptRenderer
from semsharekv_integrations.model.retaining import Retainer
from semsharekv_integrations.model.selective import Outcome, SelectivePrefill, prefill_behind_prefix
from semsharekv_integrations.planner import Planner, question_of, texts_of
from semsharekv_integrations.report import AuditResult, ReuseReport, Stopwatch
from semsharekv_integrations.request import Request
from semsharekv_integrations.store import KVStore

if TYPE_CHECKING:
    from transformers import DynamicCache


class ModelParts:
    """The parts that one engine works with.

    Args:
        source: of model and tokenizer; the weights are loaded.
        config: settings of the engine.
        store: where references are.

    Raises:
        UnsupportedModelError: if the model does not allow the configured mode.
    """

    def __init__(self, source: ModelSource, config: EngineConfig, store: KVStore) -> None:
        self.tokenizer = source.tokenizer
        self.adapter = ModelAdapter(source.load(), config.reuse.wanted)
        self.num_layers = self.adapter.config.num_hidden_layers
        self.renderer = PromptRenderer(self.tokenizer)
        self._together = SharedDecoding(self.adapter, config.max_batch_size)
        self._texts = AnswerTexts(self.tokenizer, self.adapter.end_ids)
        self._audited_tokens = config.audit.tokens if config.audit.sample_ratio else 0
        self._selective = selective = _selective_prefill(self.adapter, config.reuse)
        self.reuse = reuse = config.reuse.settled(allowed=selective is not None)
        self.mode = reuse.wanted
        self._rules = rules = reuse.rules
        shortens = rules.retention_ratio is not None and rules.retention_ratio < 1
        self._retainer = Retainer(self.adapter, selective, rules) if selective and shortens else None
        self.index: SegmentIndex | None = None  # of texts that are matched by similarity
        matcher = self._matcher(reuse, store, selective) if selective and rules.fuzzy else None
        limit = self.adapter.stable_positions
        self.planner = Planner(reuse, store, matcher, self.num_layers, limit)

    def _matcher(self, config: ReuseConfig, store: KVStore, selective: SelectivePrefill) -> FuzzyMatcher:
        frequencies = next((r.inverse_frequencies for r in selective.rotations if r is not None), None)
        embedder: Embedder = PooledEmbedder(self.adapter.embedding_matrix)
        if config.embedder is not None:
            embedder = SentenceEmbedder(config.embedder, self.renderer.text_of)
        pieces = self.renderer.pieces_of
        self.index = SegmentIndex(embedder)
        return FuzzyMatcher(store, self.index, self.adapter.embed, pieces, frequencies, config.rules)

    def fingerprint(self) -> str:
        """A digest of model and tokenizer: stored KV and token ids are good for them alone."""
        digest = hashlib.blake2b(self.adapter.fingerprint().encode(), digest_size=16)
        digest.update(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode())
        return digest.hexdigest()

    def execute(self, plan: ReusePlan, watch: Stopwatch) -> Outcome:
        """The prefill that ``plan`` describes."""
        if self._selective is not None:
            return self._selective.run(plan, watch)
        with watch.phase("forward"):
            return prefill_behind_prefix(self.adapter, plan)

    def begin_text(self, request: Request) -> AnswerText:
        """What the request's answer will be read with.

        Raises:
            ValueError: if it asks for what sampling cannot be held to.
        """
        stop = request.sampling.stop + self.renderer.stops(request.prompt)
        if not request.may_call:
            return self._texts.plain(stop, request.json_schema)
        return self._texts.calling(stop, self.renderer.tool_format, request.tools, request.tool_choice)

    def decode(
        self, rendered: Rendered, prefill: Prefill, sampling: SamplingConfig, text: AnswerText, answer: Answer
    ) -> Generator[GenerationChunk, None, None]:
        """What each new token made certain, perhaps nothing, recorded in ``answer``, then what was held back.

        With retention the cache is shortened behind the first token, which does not need it; that of ``prefill`` stays.
        Closed or at its end, that of ``prefill`` has KV of the answer as well, but for the last token, else.
        """
        with answer.watch.phase("decode"):
            decoder = Decoder(self.adapter, rendered.token_ids, sampling, self._together, text.constraint)
        last = False
        with closing(decoder.tokens(prefill, partial(answer.see, self._audited_tokens))) as steps:
            while not last and not text.stopped:
                with answer.watch.phase("decode"):
                    token_id, last = next(steps)
                    said = text.push(token_id)
                answer.add(token_id, said)
                yield from chunks_of(said)
                if self._retainer is not None and len(answer.token_ids) == 1 and not last:
                    with answer.watch.phase("retain"):
                        decoder.cache = self._shortened(self._retainer, rendered, prefill.cache)
                    answer.kept_bytes = self.adapter.kv_bytes(decoder.cache)
        rest = text.finish()
        answer.say(rest)
        answer.end(whole=text.stopped or decoder.is_complete or decoder.is_end(answer.token_ids[-1]))
        yield from chunks_of(rest)

    def audit(
        self, auditor: Auditor, namespace: str, rendered: Rendered, report: ReuseReport, answer: Answer
    ) -> AuditResult | None:
        """The answer's first tokens once more, behind a full prefill, if this call is drawn.

        Calls that reused an exact prefix alone count only in mode ``exact``: they say nothing for approximate reuse.
        """
        risky = report.reused_tokens - report.prefix_tokens * self.reuse.is_approximate
        if (not risky and report.kv_retained_ratio == 1) or not auditor.draws():
            return None
        reused = torch.cat(answer.first_logits)  # [N, V]
        answered = np.array(answer.token_ids[: len(reused) - 1], dtype=np.int64)
        return auditor.record(namespace, reused, self.adapter.logits_behind(rendered.token_ids, answered))

    def _shortened(self, retainer: Retainer, rendered: Rendered, cache: DynamicCache) -> DynamicCache:
        """What is kept of ``cache``: what the question is about first, then what it attends to."""
        texts = texts_of(rendered)
        question = question_of(rendered, self._rules.tail_tokens)
        scores = relevance(rendered.token_ids, texts, question)
        relevant = relevant_tokens(scores, texts, np.ones_like(question), self._rules.relevance_ratio)
        return retainer.shortened(rendered.token_ids, question, relevant, cache)


def _selective_prefill(adapter: ModelAdapter, config: ReuseConfig) -> SelectivePrefill | None:
    """What reuses KV off the prefix, if asked for; where ``auto`` asks, None for a model that does not allow it."""
    if not config.is_approximate:
        return None
    try:
        return SelectivePrefill(adapter)
    except UnsupportedModelError as error:
        if config.mode != "auto":
            raise
        name = type(adapter.model).__name__
        warnings.warn(f"mode 'auto' reuses exact prefixes alone on {name}: {error}", stacklevel=2)
        return None
