"""Everything that needs the model's weights, wired for one mode: how a call is rendered, planned, run and decoded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from semsharekv_integrations.arranging import find_given_order
from semsharekv_integrations.audit import Auditor
from semsharekv_integrations.call import Call, KVBytes
from semsharekv_integrations.config import EngineConfig, ReuseConfig
from semsharekv_integrations.errors import PromptError, UnsupportedModelError
from semsharekv_integrations.kv import Rendered, TokenIds
from semsharekv_integrations.logs import log_trouble
from semsharekv_integrations.model.adapter import ModelAdapter
from semsharekv_integrations.model.batching import SharedDecoding
from semsharekv_integrations.model.decoding import Decoder
from semsharekv_integrations.model.loading import GivenModel, ModelSource, NamedModel
from semsharekv_integrations.model.relief import DeviceMemoryError, Relief
from semsharekv_integrations.model.retention import Retainer
from semsharekv_integrations.model.selective import SelectivePrefill, UnservedError, prefill_behind_prefix
from semsharekv_integrations.report import GenerationChunk
from semsharekv_integrations.request import Request
from semsharekv_integrations.reuse.matching import FuzzyMatcher
from semsharekv_integrations.reuse.planner import Planner, Scope, StateRules
from semsharekv_integrations.reuse.rewording import RewordingFinder
from semsharekv_integrations.reuse.similarity import Embedder, PooledEmbedder, SegmentIndex, SentenceEmbedder
from semsharekv_integrations.states import SharedStates, make_digest
from semsharekv_integrations.store import KVStore
from semsharekv_integrations.store.codec import read_references, write_references
from semsharekv_integrations.store.library import KVFacts
from semsharekv_integrations.text.answer_stream import AnswerReader, AnswerReaderFactory
from semsharekv_integrations.text.prompt import Prompt, PromptRenderer

ACCELERATED_DEPTH = 0.15  # of the layers, for the question to look ahead through, away from the CPU


class Runtime:
    """Runs calls on one model in one state. Each method that takes a call fills in a part of it.

    Args:
        source: of model and tokenizer; the weights are loaded.
        config: settings of the engine.
        store: where references are.
        before: the runtime for another state of the same model, or None.

    Attributes:
        store: as the model's present state sees it.

    Raises:
        UnsupportedModelError: if the model does not allow the configured mode.
    """

    adapter: ModelAdapter
    renderer: PromptRenderer
    _states: SharedStates[Runtime]

    def __init__(
        self, source: ModelSource, config: EngineConfig, store: KVStore, before: Runtime | None = None
    ) -> None:
        self.tokenizer = source.tokenizer
        watch = before.adapter.watch if before else None
        self.adapter = ModelAdapter(source.load(), config.reuse.preferred_mode, watch)
        self._states = before._states if before else SharedStates(self.adapter.watch.get_state().key, config, store)
        self._state = self.adapter.watch.get_state()
        self.store = store = self._states.store_of(self._state)
        self.relief = Relief(self.adapter, self.store)
        self.num_layers = self.adapter.config.num_hidden_layers
        self.renderer = before.renderer if before else PromptRenderer(self.tokenizer)
        self._together = SharedDecoding(self.adapter, config.max_batch_size, self.relief)
        self._readers = AnswerReaderFactory(self.tokenizer, self.adapter.end_ids)
        self._audited_tokens = config.audit.tokens if config.audit.sample_ratio else 0
        self._selective = selective = _make_selective_prefill(self.adapter, config.reuse)
        self.reuse = reuse = config.reuse.resolve(supported=selective is not None)
        self.mode = reuse.preferred_mode
        shortens = reuse.retention_ratio is not None and reuse.retention_ratio < 1
        self._retainer = Retainer(self.adapter, selective, reuse) if selective and shortens else None
        self.index: SegmentIndex | None = None  # of texts that are matched by similarity
        matcher = self._make_matcher(reuse, selective) if selective and reuse.fuzzy else None
        finder = self._make_finder(reuse) if selective and reuse.mode == "semantic" else None
        way, limit = self.adapter.way, self.adapter.stable_positions
        states = StateRules(config.store.checkpoint_tokens, way.one_by_one) if way.keeps_states else None
        self.planner = Planner(self._fit_depth(reuse), store, matcher, self.num_layers, limit, finder, states)
        self.embeddings_at = self.adapter.embedding_matrix.data_ptr()
        self._states.keep(self._state.key, self)
        if isinstance(source, NamedModel):
            self._states.as_loaded = self._compute_identity()

    def _fit_depth(self, reuse: ReuseConfig) -> ReuseConfig:
        """Return the settings with fewer layers to look ahead through, unless they say how many, or it is a CPU."""
        if not reuse.is_approximate or reuse.attention_depth is not None or self.adapter.device.type == "cpu":
            return reuse
        return replace(reuse, attention_depth=ACCELERATED_DEPTH)

    def follow_model(self) -> Runtime:
        """Return a runtime for the state that the model is in now, for one call. Takes the model out of training mode.

        Raises:
            UnsupportedModelError: if the model does not allow the configured mode any more.
        """
        model, watch = self.adapter.model, self.adapter.watch
        with self.adapter.lock():
            if self.mode == "off":
                if any(module.training for module in model.modules()):
                    model.eval()
                return self
            state = watch.get_state()
            if watch.in_training:
                model.eval()
                state = watch.get_state()
            found = self._states.find_runtime(state.key)
            if found is None:
                source = GivenModel(model, self.tokenizer)
                make = partial(Runtime, source, self._states.config, self._states.store, self)
                found = self.relief.run("what the model is tried on", make)
            runtime = copy(found)
            runtime._state = state
            return runtime

    def indexes(self) -> list[SegmentIndex]:
        """Return the index of every state that a runtime is kept for; empty in modes without one."""
        return [kept.index for kept in self._states.list_runtimes() if kept.index is not None]

    def is_unchanged(self) -> bool:
        """Whether the model is in the state that ``follow_model`` found, none seen since; true in mode ``off``."""
        return self.mode == "off" or self.adapter.watch.get_state() == self._state

    def _make_matcher(self, config: ReuseConfig, selective: SelectivePrefill) -> FuzzyMatcher:
        """Return a matcher of tokens by the model's own embeddings."""
        embed, split = self.adapter.embed, self.renderer.split_pieces
        return FuzzyMatcher(self.store, embed, split, selective.find_frequencies(), config)

    def _make_finder(self, config: ReuseConfig) -> RewordingFinder:
        """Set ``self.index`` to a new index of texts, and return a finder of wordings that uses it."""
        embedder: Embedder = PooledEmbedder(self.adapter.embedding_matrix)
        if config.embedder is not None:
            embedder = SentenceEmbedder(config.embedder, self.renderer.decode)
        self.index = SegmentIndex(embedder)
        return RewordingFinder(self.store, self.index, self.renderer.split_pieces, config.min_similarity)

    def fingerprint(self) -> str:
        """Return a digest of the model's state and the vocabulary: stored KV and token ids fit no other."""
        return make_digest(self._state.fingerprint, self._states.vocabulary(self.tokenizer))

    def open_store(self) -> bool:
        """Mount the store's libraries and open its directory, if it has any; return whether it has a directory."""
        config, adapter = self._states.config.store, self.adapter
        if config.libraries:
            self.store.mount(self.describe_kv(), adapter.dtype, adapter.homes)
        if config.directory is not None:
            self.store.open(self.directory_fingerprint(), adapter.dtype, adapter.homes)
        return config.directory is not None

    def describe_kv(self) -> KVFacts:
        """Return what stored KV and token ids fit to: the fingerprint, and what it is made of."""
        vocabulary, adapter = self._states.vocabulary(self.tokenizer), self.adapter
        dtype = str(adapter.dtype).removeprefix("torch.")
        kind = type(adapter.model).__name__
        return KVFacts(self.fingerprint(), kind, self.num_layers, dtype, vocabulary, self._state.fingerprint)

    def directory_fingerprint(self) -> str:
        """Return ``fingerprint``, or another digest if KV is kept in 8 bits, so that no exact store finds it."""
        bits = self._states.config.store.kv_bits
        return self.fingerprint() if bits is None else make_digest(self.fingerprint(), f"{bits} bits")

    def changed_identity(self) -> str:
        """Return a digest of the model and tokenizer as they answer now; "" if unchanged since loaded by name."""
        now = self._compute_identity()
        return now if now != self._states.as_loaded else ""

    def _compute_identity(self) -> str:
        """Return a digest of state, vocabulary, special tokens, chat template and generation config."""
        model, tokenizer = self.adapter.model, self.tokenizer
        return make_digest(
            self.adapter.watch.get_state().fingerprint,
            self._states.vocabulary(tokenizer),
            repr((tokenizer.special_tokens_map, getattr(tokenizer, "chat_template", None))),
            model.generation_config.to_json_string(use_diff=False),
        )

    def save(self, path: Path) -> int:
        """Write what this state has stored to a file, atomically; return how many entries."""
        return write_references(path, self.store.fetch_all(), self.fingerprint())

    def load(self, path: Path) -> int:
        """Store what ``save`` wrote; return how many fit. Raises ``StoreFileError`` for a bad or foreign file."""
        work = partial(read_references, path, self.fingerprint(), self.adapter.homes)
        return sum(map(self.store.put, self.relief.run("a file of KV", work)))

    def render(self, call: Call, known: Mapping[str, str], window: int | None) -> None:
        """Set the call's ``rendered`` and ``reader``, cut ``max_new_tokens`` to the window; find ``known`` texts too.

        Set ``given_order`` where the prompt has documents as they were arranged.

        Raises:
            PromptError: if it cannot be rendered, or the tokenizer is another model's.
            ContextWindowError: if it leaves no room for a new token in the context ``window``.
            ValueError: for a document that is not in the prompt, or what decoding cannot be held to.
        """
        request = call.request
        with call.watch.phase("render"):
            call.rendered = self.renderer.render(
                request.prompt,
                request.documents,
                tools=request.tools,
                hints=known,
                template_kwargs=request.chat_template_kwargs,
                window=window,
            )
            self._require_embeddings(call.rendered)
            request.require_documents(call.rendered)
            call.request = request.fit_window(len(call.rendered.token_ids), window)
            call.most_tokens = None if window is None else window - call.request.sampling.max_new_tokens
            call.reader = self._begin_reader(call.request)
            call.given_order = find_given_order(call.rendered.token_ids, call.arrangements)

    def render_before(self, request: Request, text: str) -> TokenIds:
        """Return the tokens that stand before ``text`` where it goes on with the request's prompt, or last message.

        Raises:
            PromptError: if that cannot be rendered.
        """
        prompt: Prompt
        if isinstance(request.prompt, str):
            prompt = request.prompt + text
        else:
            *earlier, last = request.prompt
            prompt = [*earlier, {**last, "content": last["content"] + text}]
        rendered = self.renderer.render(
            prompt, {"": text}, tools=request.tools, template_kwargs=request.chat_template_kwargs
        )
        start = rendered.segments[0].start if rendered.segments else rendered.unplaced.get("", 0)
        return rendered.token_ids[:start]

    def plan(self, call: Call, *, is_suspended: bool) -> None:
        """Set ``plan``: what is borrowed. If audits suspend the namespace, that is an exact prefix at most."""
        request = call.request
        if call.given_order is not None:
            call.given_prefix_tokens = self.store.count_prefix_tokens(call.given_order, request.namespace)
        scope = Scope(request.namespace, request.session, call.most_tokens)
        work = partial(self.planner.plan, call.rendered, scope, is_suspended, call.watch)
        call.plan = self.relief.run("what a prompt is compared with", work)
        call.tells_origins = self.reuse.report_origins
        if self.reuse.report_substitutions:
            call.list_wordings(self.renderer.decode)

    def execute(self, call: Call) -> None:
        """Prefill the prompt as its plan says; set the call's ``outcome``, ``mode`` and ``kv_bytes``.

        Raises:
            DeviceMemoryError: if the device has no room for it.
        """
        self.relief.run(f"a prompt of {len(call.plan.token_ids)} tokens", partial(self._prefill, call))
        cache = call.outcome.prefill.cache
        call.mode, call.kv_bytes = self.mode, KVBytes(*[self.adapter.measure_kv(cache)] * 2)

    def _prefill(self, call: Call) -> None:
        """Set the call's ``outcome``; its ``plan`` and ``wordings`` too if the prompt is read as it was asked."""
        if self._selective is not None:
            try:
                call.outcome = self._selective.run(call.plan, call.watch)
            except UnservedError as trouble:
                scope = Scope(call.request.namespace, call.request.session)
                call.plan, call.wordings = self.planner.plan_as_asked(call.rendered, scope, trouble.reason), ()
                call.outcome = trouble.charge(self._selective.run(call.plan, call.watch), self.num_layers)
        else:
            with call.watch.phase("forward"):
                places = self.planner.choose_checkpoints(call.rendered, call.plan, call.request.namespace)
                call.outcome = prefill_behind_prefix(self.adapter, call.plan, places)
        with call.watch.phase("forward"):
            self.adapter.settle(call.outcome.prefill.cache)

    def decode(self, call: Call) -> Generator[GenerationChunk, None, None]:
        """Fill in the answer; yield one chunk for each token, maybe empty, then what was held back for stop strings.

        Retention shortens the cache behind the first token, which does not need it. Without retention the cache of
        ``call.outcome`` holds KV of prompt and answer afterwards, except the last token.
        """
        prefill, reader, answer = call.outcome.prefill, call.reader, call.answer
        with call.watch.phase("decode"):
            asked = call.plan.token_ids, call.request.sampling
            decoder = Decoder(self.adapter, *asked, self._together, reader.constraint, call.lookup_sources)
        is_last = False
        with closing(decoder.decode(prefill, partial(answer.record_logits, self._audited_tokens))) as steps:
            while not is_last and not reader.stopped:
                with call.watch.phase("decode"):
                    token_id, is_last = next(steps)
                    said = reader.push(token_id)
                answer.drafted_tokens = decoder.drafter.drafted_tokens
                answer.accepted_tokens = decoder.drafter.accepted_tokens
                yield from call.add_token(token_id, said)
                if self._retainer is not None and len(answer.token_ids) == 1 and not is_last:
                    with call.watch.phase("retain"):
                        work = partial(self._retainer.shorten_for, call.read, prefill.cache)
                        decoder.cache = self.relief.run("a shortened cache", work)
                        self.adapter.settle(decoder.cache)
                    call.kv_bytes = call.kv_bytes._replace(retained=self.adapter.measure_kv(decoder.cache))
        rest = reader.finish()
        answer.end(is_whole=reader.stopped or decoder.chooser.is_whole(answer.token_ids[-1]))
        yield from call.add(rest)

    def audit(self, call: Call, auditor: Auditor) -> None:
        """If the call is drawn, compare its first tokens with those behind a full prefill; set its ``audit``.

        Calls that reused an exact prefix alone count only in mode ``exact``: they say nothing for approximate reuse.
        """
        with call.watch.phase("audit"):
            report = call.build_report()
            risky = report.reused_tokens - report.prefix_tokens * self.reuse.is_approximate
            if (not risky and report.kv_retained_ratio == 1) or not auditor.draws():
                return
            if not self.is_unchanged():  # a full prefill would be one of another state
                return
            reused = torch.cat(call.answer.first_logits)  # [N, V]
            answered = np.array(call.answer.token_ids[: len(reused) - 1], dtype=np.int64)
            work = partial(self.adapter.compute_logits, call.rendered.token_ids, answered)
            try:
                full = self.relief.run(f"an audit of {len(call.rendered.token_ids)} tokens", work)
            except DeviceMemoryError:  # the answer is whole without
                log_trouble("unaudited")
                return
            call.audit = auditor.record(call.request.namespace, reused, full)

    def _require_embeddings(self, rendered: Rendered) -> None:
        """Raise ``PromptError`` if a token is beyond the model's embeddings, as from another model's tokenizer."""
        highest, size = int(rendered.token_ids.max()), self.adapter.config.vocab_size
        if highest >= size:
            piece = self.tokenizer.convert_ids_to_tokens(highest)
            accepted = f"tokens below {size}: the model has no more, so the tokenizer is not this model's"
            raise PromptError(f"prompt has token {highest} ({piece!r}); accepted is {accepted}")

    def _begin_reader(self, request: Request) -> AnswerReader:
        """Return a new reader of the answer: one that parses tool calls if it may hold any, else a plain one."""
        stop = request.sampling.stop + self.renderer.get_stops(request.prompt) + self.adapter.stop_strings
        if not request.may_call:
            return self._readers.begin_plain(stop, request.json_schema)
        return self._readers.begin_calling(stop, self.renderer.tool_format, request.tools, request.tool_choice)


def _make_selective_prefill(adapter: ModelAdapter, config: ReuseConfig) -> SelectivePrefill | None:
    """Return the selective prefill; None in modes without it, and, with a warning, in ``auto`` if unsupported."""
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


class ModelHolder:
    """Has a model, or knows where to get it. A deep copy is the object itself; a pickle holds how it was made."""

    _source: ModelSource
    _runtime: Runtime | None
    _made_by: Callable[[], Any] | None = None

    def identity(self) -> str:
        """Return a text that is equal for the same model in the same state, in every process; loads no weights.

        A model by name goes by how it is loaded and by its files, until it is changed in memory.
        """
        named = self._source.origin if isinstance(self._source, NamedModel) else ""
        changed = self._runtime.changed_identity() if self._runtime is not None else ""
        return f"{named} {changed}".strip()

    def describe_kv(self) -> KVFacts:
        """Return what stored KV fits to, of the model as it is; asserts that it is loaded."""
        assert self._runtime is not None
        return self._runtime.describe_kv()

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        """Pickle how this was made, without weights. Raises ``TypeError`` if it was given its model."""
        if self._made_by is None:
            name = type(self).__name__
            raise TypeError(f"this {name} was given its model; accepted to pickle is one of {name}.from_pretrained")
        return self._made_by, ()
