"""The engine: ``_run`` leads one prompt from text to text, a line per phase; the other methods are what callers may do.

A ``Call`` carries what the phases find. ``Runtime`` renders, plans, executes, decodes and audits it, on one model in
one mode; ``Memory`` keeps its KV in the store. The flow is that of SemShareKV (arXiv 2509.24832, section 3), with exact
prefixes and identical runs as more sources. Knows nothing about LangChain, LlamaIndex or the terminal, nor about
transformers' internals (see ``model``).
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from tqdm.auto import tqdm

from semsharekv_integrations.arranging import ArrangeOptions, SomeDocuments, check_arranging, reorder_documents
from semsharekv_integrations.audit import Auditor
from semsharekv_integrations.call import Call
from semsharekv_integrations.concurrency.scheduler import JobLeft, Scheduler, check_wanted, get_current_job
from semsharekv_integrations.concurrency.streams import PrefillQueue, Stream, raise_first_error, read_all, read_async
from semsharekv_integrations.concurrency.threads import free_in_children, hold_at_forks
from semsharekv_integrations.config import EngineConfig, Mode
from semsharekv_integrations.explaining import explain_report
from semsharekv_integrations.logs import Observers, log_call
from semsharekv_integrations.memory import Memory
from semsharekv_integrations.model.loading import GivenModel, ModelSource, NamedModel, get_window
from semsharekv_integrations.report import Generation, GenerationChunk, ReuseReport, is_last, is_told, take_last
from semsharekv_integrations.request import (
    Documents,
    GenerateOptions,
    Request,
    check_config,
    check_name,
    check_namespace,
    check_path,
    check_prompt,
    check_prompts,
    check_scope,
    check_warming,
    read_documents,
)
from semsharekv_integrations.runtime import ModelHolder, Runtime
from semsharekv_integrations.store import KVStore
from semsharekv_integrations.store.forgetting import Since
from semsharekv_integrations.store.mounting import check_libraries
from semsharekv_integrations.text.prompt import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COUNTS = ("requests", "prompt_tokens", "reused_tokens", "output_tokens", "drafted_tokens", "accepted_tokens")


class SemShareEngine(ModelHolder):
    """A transformers causal language model that keeps the KV cache of what it has seen.

    Safe to use from several threads: calls interleave token by token, forward passes take turns. Deep copies share it.

    Args:
        model: any loaded decoder-only transformers model.
        tokenizer: its tokenizer.
        config: settings.

    Raises:
        UnsupportedModelError: if the model does not allow the configured mode.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: EngineConfig | None = None
    ) -> None:
        source = GivenModel(model, tokenizer)
        self._begin(source, config, getattr(model.config, "_name_or_path", "") or type(model).__name__)
        self._load()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        config: EngineConfig | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        **kwargs: Any,
    ) -> SemShareEngine:
        """Make an engine for a folder, GGUF file, hub id or ``semsharekv/reference``; weights are loaded at first use.

        Args:
            name_or_path: what to load.
            config: settings.
            device: where to, or None for CUDA if there is one, else the CPU.
            dtype: ``auto`` for that of the weights, else a torch dtype or its name.
            kwargs: for ``AutoModelForCausalLM.from_pretrained``, such as ``revision`` or ``device_map``.
        """
        engine = cls.__new__(cls)
        engine._begin(NamedModel(name_or_path, device, dtype, kwargs), config, str(name_or_path))
        engine._made_by = partial(cls.from_pretrained, name_or_path, config, device, dtype, **kwargs)
        return engine

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """Wait for and return the answer to a text prompt or messages (mappings with ``role`` and ``content``).

        Raises:
            ValueError: naming the option, its value and what is accepted.
            PromptError: if the prompt cannot be rendered.
            ContextWindowError: if it leaves no room for a new token. Other ``SemShareError``: if loading fails.
        """
        return take_last(self._start(prompt, options, is_last).run_ahead())

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Stream[GenerationChunk]:
        """Return an iterator of the answer's chunks; the last carries the ``Generation``. Raises as ``generate`` does.

        Asking for a chunk computes it; while other calls wait for their turn, the call runs to its end unread. Closing
        or dropping the iterator cancels the call at the next token; what was computed until then is kept.
        """
        return self._start(prompt, options, is_told)

    def generate_batch(self, prompts: Sequence[Prompt], **options: Unpack[GenerateOptions]) -> list[Generation]:
        """Return the answers to several prompts, in order; what they share is computed once, and they decode together.

        If some prompts fail, the others still run to their end; then the first error is raised.
        """
        with self.sharing():
            begin = [partial(self._start, prompt, options, is_last) for prompt in check_prompts(prompts)]
            return [take_last(chunks) for chunks in raise_first_error(read_all(begin))]

    async def agenerate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """Return and raise as ``generate``, without blocking the event loop. Cancelling the task cancels the call."""
        async with aclosing(self._read_async(prompt, options, is_last)) as chunks:
            return take_last([chunk async for chunk in chunks])

    async def astream(
        self, prompt: Prompt, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[GenerationChunk, None]:
        """Yield chunks as ``stream``, without blocking the event loop. The call goes on unread until this is closed."""
        async with aclosing(self._read_async(prompt, options, is_told)) as chunks:
            async for chunk in chunks:
                yield chunk

    def sharing(self) -> AbstractContextManager[None]:
        """Within the block, calls store their prompts' KV before they decode, as overlapping calls always do."""
        return self._scheduler.group_jobs()

    def _start(
        self, prompt: Prompt, options: GenerateOptions, shows: Callable[[GenerationChunk], bool]
    ) -> Stream[GenerationChunk]:
        """Check prompt and options, and return the stream of chunks that ``shows`` picks. Begins no call yet."""
        request, since = Request.of(check_prompt(prompt), options), self._memory.under_way.begin()

        def begin() -> Generator[GenerationChunk, None, None]:
            return self._run(request, since, self._load())  # an interruption ends the loading as well

        return Stream(self._scheduler, begin, shows)

    def _read_async(
        self, prompt: Prompt, options: GenerateOptions, shows: Callable[[GenerationChunk], bool]
    ) -> AsyncGenerator[GenerationChunk, None]:
        """As ``_start``, but return an asynchronous generator, which begins the call when it is iterated."""
        request, since = Request.of(check_prompt(prompt), options), self._memory.under_way.begin()

        def begin() -> Generator[GenerationChunk, None, None]:
            yield from self._run(request, since, self._load())

        return read_async(self._scheduler, begin, shows)

    def _run(self, request: Request, since: Since, runtime: Runtime) -> Generator[GenerationChunk, None, None]:
        """Run one call through all phases, timed; yield its chunks. A call left while decoding keeps its KV."""
        call = Call(request, since)
        call.count_wait(get_current_job())
        known = self._memory.resolve_documents(call)
        runtime.render(call, known, self.context_window)
        with self._queue.admit(call.watch.phase("wait")):  # so that each may reuse what the one before computed
            check_wanted()
            runtime = runtime.follow_model()
            runtime.plan(call, is_suspended=self.auditor.suspends(call.request.namespace))
            runtime.execute(call)
            if self._scheduler.has_concurrent_calls:
                self._memory.keep(call, runtime, writes=False)  # for these calls to reuse; files follow the answer
        try:
            yield from runtime.decode(call)
        except JobLeft:
            self._remember(call, runtime)
            raise
        self._remember(call, runtime)
        runtime.audit(call, self.auditor)
        generation = call.build_generation()
        self._memory.note_report(call, runtime, generation.report)
        self._observers.tell(generation.report)
        yield GenerationChunk("", generation)

    def _remember(self, call: Call, runtime: Runtime) -> None:
        """Add the call to the counts. Store its exact KV and, in a session, the rest too, unless it was forgotten."""
        with call.watch.phase("remember"):
            answer, reused = call.answer, int(call.reused.sum())
            drafts = (answer.drafted_tokens, answer.accepted_tokens)
            counts = (1, call.prompt_tokens, reused, len(answer.token_ids), *drafts)
            with self._counting:
                self._counts.update(dict(zip(COUNTS, counts, strict=True)))
            self._memory.keep(call, runtime)
            runtime.adapter.settle(call.outcome.prefill.cache)

    def warm(
        self,
        documents: Documents,
        namespace: str = "default",
        pinned: bool = False,
        ttl_s: float | None = None,
        progress: bool = False,
    ) -> int:
        """Compute and store the KV of texts before prompts contain them. Later prompts need not name the texts.

        Args:
            documents: texts, or texts by id. A text replaces another one that is stored under its id.
            namespace: who may reuse them.
            pinned: whether the byte bound never evicts them.
            ttl_s: seconds after their last use at which they expire, or None.
            progress: whether to show a progress bar.

        Returns:
            How many were stored; fewer than given if the store has no room, or in mode ``off``.

        Raises:
            ContextWindowError: if a text is too long; those before it are stored.
        """
        check_warming(documents, pinned, ttl_s, progress)
        namespace, texts = check_namespace(namespace), read_documents(documents)
        if self.config.reuse.mode == "off":
            return 0
        stored, runtime, since = 0, self._load(), self._memory.under_way.begin()
        labels: dict[str, Any] = {"pinned": pinned, "expires_after_s": ttl_s}
        shown = tqdm(texts.items(), "computing KV", leave=False) if progress else texts.items()
        for key, text in shown:
            call = Call(Request.of(text, {"documents": {key: text}, "namespace": namespace}), since)
            runtime.render(call, {}, self.context_window)
            stored += self._scheduler.carry_out(partial(self._warm, call, runtime, labels))
        return stored

    def _warm(self, call: Call, runtime: Runtime, labels: Mapping[str, Any]) -> bool:
        with self._queue.admit():
            return self._memory.warm(call, runtime.follow_model(), **labels)

    def arrange(
        self, documents: SomeDocuments, namespace: str = "default", **around: Unpack[ArrangeOptions]
    ) -> SomeDocuments:
        """Return the documents in the order that continues the longest exact prefix stored for ``namespace``.

        A stored order counts as far as all its documents, from the first on, are given word for word. The others follow
        in the given order, which stays if no order reuses more, and in mode ``off``. Later prompts need not name them.

        Args:
            documents: texts, or texts by id; not changed.
            namespace: whose stored prompts count, and the shared ones.
            around: what else the prompt will have, as what stands ``before`` the documents: see ``ArrangeOptions``.

        Raises:
            ValueError: naming the argument, its value and what is accepted. ``PromptError``: for bad messages.
        """
        request = check_arranging(documents, namespace, around)
        order = list(request.documents)
        if order and self.config.reuse.mode != "off":
            runtime = self._load()
            self._scheduler.settle()
            order = self._scheduler.carry_out(lambda: self._memory.arrange(request, runtime.follow_model(), around))
        return reorder_documents(documents, order)

    def forget(self, document_id: str, namespace: str = "default") -> int:
        """Drop entries of ``namespace`` with the document; return how many. Libraries stay; calls under way store none.

        Raises:
            StoreWriteError: if some of it could not be removed from the store's directory.
        """
        named = check_name("document_id", document_id), check_namespace(namespace)
        self._scheduler.settle()
        return self._scheduler.carry_out(partial(self._memory.forget, self._runtime, *named))

    def clear(self, namespace: str | None = None, session: str | None = None) -> int:
        """Drop the entries of a session or namespace, or all; return how many. Calls, libraries, errors: ``forget``."""
        namespace, session = check_scope(namespace, session)
        self._scheduler.settle()
        return self._scheduler.carry_out(partial(self._clear, namespace, session))

    def _clear(self, namespace: str | None, session: str | None) -> int:
        """Drop entries and, unless a session is named, audit outcomes; return how many entries."""
        if session is None:
            self.auditor.clear(namespace)
        return self._memory.clear(namespace, session)

    def save(self, path: str | Path) -> int:
        """Write KV of the model's present state to a file for its owner alone, atomically; return how many entries."""
        path, runtime = check_path(path), self._load()
        self._scheduler.settle()
        return self._scheduler.carry_out(lambda: runtime.follow_model().save(path))

    def load(self, path: str | Path) -> int:
        """Store the KV that ``save`` wrote with the same model; return how many entries the store has taken.

        Raises:
            StoreFileError: if the file is damaged or was written with another model.
        """
        path, runtime = check_path(path), self._load()
        return self._scheduler.carry_out(lambda: runtime.follow_model().load(path))

    def close(self) -> None:
        """Release the store's directory, as at exit. The engine goes on with the KV it has in memory."""
        self._scheduler.settle()
        self._scheduler.carry_out(self._store.close)

    def observe(self, callback: Callable[[ReuseReport], None]) -> None:
        """Call ``callback`` with the report of every call that finishes, not of those that are cancelled or fail.

        The computing thread calls it before it yields the last chunk, so it should be quick. Its errors are logged.
        """
        self._observers.add(callback)

    def explain(self, report: ReuseReport | Mapping[str, Any]) -> str:
        """Return what a report, or its ``to_dict``, says in plain sentences: what was reused, and why no more was."""
        return explain_report(report, self.config.reuse)

    def stats(self) -> dict[str, float]:
        """Return counts of requests and tokens since the start, and figures of store and audits, by name."""
        self._scheduler.settle()
        with self._counting:
            counts = {name: self._counts[name] for name in COUNTS}
        stored = {f"store_{name}": value for name, value in self._store.stats().items()}
        return {**counts, **stored, **self.auditor.stats()}

    @property
    def store(self) -> KVStore:
        """Where KV is kept. Waits until calls that were left have stored theirs."""
        self._scheduler.settle()
        return self._store

    @property
    def is_loaded(self) -> bool:
        """Whether the model was loaded; loads nothing."""
        return self._runtime is not None

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model, loaded if it was not."""
        return self._load().adapter.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; loads no weights."""
        return self._source.tokenizer

    @property
    def mode(self) -> Mode:
        """The mode that calls run in, never ``auto``: if that is set, this loads the model to see what it allows."""
        setting = self.config.reuse.mode
        return self._load().mode if setting == "auto" else setting

    @property
    def context_window(self) -> int | None:
        """Most tokens of prompt and answer together, or None if nothing bounds it; loads no weights."""
        return self.config.max_context_tokens or get_window(self._source.config)

    def _begin(self, source: ModelSource, config: EngineConfig | None, name: str) -> None:
        """Check the config and set every attribute, without loading the model or opening the store's directory."""
        self.config = check_config(config)
        self.name = name
        self._store = KVStore(self.config.store, min_run_tokens=self.config.reuse.indexed_run_tokens)
        self.auditor = Auditor(self.config.audit)
        self._source = source
        self._runtime: Runtime | None = None
        self._loading = free_in_children(threading.RLock())
        self._lock = hold_at_forks(threading.Lock())
        self._scheduler = Scheduler(self.config.calls_in_flight)
        weakref.finalize(self, self._scheduler.dismiss)
        self._queue = PrefillQueue()
        self._memory = Memory(self.config, self._store)
        self._observers = Observers(log_call)
        self._counts: Counter[str] = Counter()
        self._counting = hold_at_forks(threading.Lock())

    def _load(self) -> Runtime:
        """Return the runtime. The first call loads the model and opens the store's directory."""
        if self._runtime is None:
            with self._loading:
                if self._runtime is None:
                    check_libraries(self.config.store)
                    runtime = Runtime(self._source, self.config, self._store)
                    self._scheduler.carry_out(partial(self._take_up, runtime))
        assert self._runtime is not None
        return self._runtime

    def _take_up(self, runtime: Runtime) -> None:
        """Mount libraries, open the store's directory and use ``runtime`` from now on, unless one is in use already."""
        with self._lock:
            if self._runtime is None:
                if runtime.open_store():
                    weakref.finalize(self, self._store.abandon)
                self._runtime = runtime
                self._memory.begin(runtime)
