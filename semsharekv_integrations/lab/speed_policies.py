"""What is timed beside what: our engine in each mode, and the local classes that LangChain and LlamaIndex bring.

All share one model. The frameworks' classes are no dependencies of this package: they are timed where they are
installed, and named as missing where they are not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import Any, Protocol

from transformers import pipeline

from semsharekv_integrations.config import EngineConfig, ReuseConfig, StoreConfig
from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.errors import SemShareError
from semsharekv_integrations.kv import Reference
from semsharekv_integrations.lab.policies import FULL, UNGUARDED
from semsharekv_integrations.lab.presets import Subject
from semsharekv_integrations.lab.speed_probes import LayerUse
from semsharekv_integrations.lab.workloads import Query
from semsharekv_integrations.modes import Mode

NAMESPACE = "bench"
EXACT = "exact"
RETAINED = "retained"
RETENTION_RATIO = 0.58  # of the KV is kept: the paper's 42% less memory
MODE_OF: Mapping[str, Mode] = MappingProxyType(
    {FULL: "off", EXACT: "exact", "identical": "identical", "semantic": "semantic", RETAINED: "semantic"}
)
UNBOUNDED = StoreConfig(max_bytes=2**62)


@dataclass(frozen=True)
class Reading:
    """One call. None where a policy does not tell.

    Attributes:
        ttft_s: seconds from the call to the first new token.
        compute_ratio: token-layers computed over tokens times layers, 0 to 1.
        reused_tokens: prompt tokens whose KV was not computed.
        declined: why nothing, or nothing but the prefix, was reused.
        phases_s: seconds by phase, in the engine's words.
        decode_tokens_per_s: new tokens a second, behind the first one.
        kv_bytes: of the prompt's KV after prefill.
        kv_retained_ratio: share of it kept for decoding.
        store_s: seconds that it took to put the references into the store.
        store_bytes: in the store after the call.
        layers: what each decoder layer did.
        peak_bytes: growth of memory at its peak, measured in the untimed round alone.
    """

    ttft_s: float
    compute_ratio: float | None = None
    reused_tokens: int | None = None
    declined: str | None = None
    phases_s: Mapping[str, float] = field(default_factory=dict)
    decode_tokens_per_s: float | None = None
    kv_bytes: int | None = None
    kv_retained_ratio: float | None = None
    store_s: float | None = None
    store_bytes: int | None = None
    layers: tuple[LayerUse, ...] = ()
    peak_bytes: int | None = None


class Policy(Protocol):
    """A way to a first token. A call stores what it leaves; ``clear`` makes the next call as if it had not been."""

    def prepare(self, references: Sequence[Reference]) -> None:
        """Put what was seen before into the store, if there is one."""

    def ask(self, query: Query) -> Reading:
        """One timed call.

        Raises:
            SemShareError: naming what went wrong.
        """

    def clear(self) -> None:
        """Forget what was prepared and asked."""


class EnginePolicy:
    """Our engine in one mode.

    Args:
        subject: what it runs on.
        config: its settings.
        new_tokens: most tokens generated in a call.

    Raises:
        UnsupportedModelError: if the model does not allow the mode.
    """

    def __init__(self, subject: Subject, config: EngineConfig, new_tokens: int) -> None:
        self.engine = SemShareEngine(subject.model, subject.tokenizer, config)
        self.new_tokens = new_tokens
        self._store_s = 0.0

    def prepare(self, references: Sequence[Reference]) -> None:
        """Put the references into the store, unless the mode has none."""
        began = time.perf_counter()
        if self.engine.config.reuse.mode != "off":
            for reference in references:
                assert self.engine.store.put(reference), "the store has no bound"
        self._store_s = time.perf_counter() - began

    def ask(self, query: Query) -> Reading:
        """One call, with what its report says."""
        generation = self.engine.generate(
            query.prompt, documents=query.documents, namespace=NAMESPACE, max_new_tokens=self.new_tokens
        )
        report = generation.report
        later = report.output_tokens - 1
        stores = self.engine.config.reuse.mode != "off"
        return Reading(
            ttft_s=report.ttft_s,
            compute_ratio=report.compute_ratio,
            reused_tokens=report.reused_tokens,
            declined=report.declined,
            phases_s=report.phases_s,
            decode_tokens_per_s=later / report.decode_s if later and report.decode_s else None,
            kv_bytes=report.kv_bytes,
            kv_retained_ratio=report.kv_retained_ratio,
            store_s=self._store_s if stores else None,
            store_bytes=self.engine.store.stats()["bytes"] if stores else None,
        )

    def clear(self) -> None:
        """Empty the store."""
        self.engine.clear()


class PeerError(SemShareError):
    """A framework's own class could not be built or did not answer; the message says which and why."""


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors of a framework's own class, whatever they are, as ones that are about it."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, LookupError, OSError, RuntimeError) as error:
        raise PeerError(f"{name}: {type(error).__name__}: {error}") from error


class PeerPolicy:
    """A framework's own class, timed around a call for a single token. It reuses nothing.

    Args:
        name: of the class.
        call: takes the prompt.
    """

    def __init__(self, name: str, call: Callable[[Query], object]) -> None:
        self._name = name
        self._call = call

    def prepare(self, references: Sequence[Reference]) -> None:
        """Nothing: there is no store."""

    def ask(self, query: Query) -> Reading:
        """One call for one token: the whole of it is the time to first token."""
        with _naming(self._name):
            began = time.perf_counter()
            self._call(query)
            return Reading(time.perf_counter() - began)

    def clear(self) -> None:
        """Nothing to forget."""


Maker = Callable[[], Policy]


def makers(names: Sequence[str], subject: Subject, new_tokens: int) -> dict[str, Maker]:
    """How to make each policy of our engine; on random weights without the deviation guard."""
    configs = {name: config_of(name, unguarded=subject.is_random) for name in names}
    return {name: partial(EnginePolicy, subject, config, new_tokens) for name, config in configs.items()}


def config_of(name: str, *, unguarded: bool) -> EngineConfig:
    """Settings of a policy of our engine, with an unbounded store."""
    reuse = ReuseConfig(mode=MODE_OF[name], retention_ratio=RETENTION_RATIO if name == RETAINED else None)
    if unguarded and reuse.is_approximate:
        reuse = replace(reuse, max_deviation=UNGUARDED)
    return EngineConfig(reuse=reuse, store=UNBOUNDED)


def peer_makers(subject: Subject) -> dict[str, Maker]:
    """How to make each framework's own class; a maker raises ``PeerError`` if that is not installed."""
    return {
        "HuggingFacePipeline": partial(_pipeline, subject, chat=False),
        "ChatHuggingFace": partial(_pipeline, subject, chat=True),
        "HuggingFaceLLM": partial(_llama_index, subject),
    }


def _pipeline(subject: Subject, *, chat: bool) -> Policy:
    """LangChain's text pipeline on the rendered prompt, or its chat model on the messages."""
    classes = _installed("langchain_huggingface", "langchain-huggingface")
    with _naming("ChatHuggingFace" if chat else "HuggingFacePipeline"):
        pipe = pipeline("text-generation", model=subject.model, tokenizer=subject.tokenizer, max_new_tokens=1)
        llm = classes.HuggingFacePipeline(pipeline=pipe)
        if not chat:
            return PeerPolicy("HuggingFacePipeline", lambda query: llm.invoke(_text_of(subject, query)))
        model = classes.ChatHuggingFace(llm=llm, tokenizer=subject.tokenizer, model_id=subject.name)
    return PeerPolicy("ChatHuggingFace", lambda query: model.invoke(_messages_of(query)))


def _llama_index(subject: Subject) -> Policy:
    """LlamaIndex's local class on the rendered prompt."""
    classes = _installed("llama_index.llms.huggingface", "llama-index-llms-huggingface")
    window = getattr(subject.model.config, "max_position_embeddings", 2**20)
    with _naming("HuggingFaceLLM"):
        llm = classes.HuggingFaceLLM(
            model=subject.model,
            tokenizer=subject.tokenizer,
            max_new_tokens=1,
            context_window=window,
            generate_kwargs={"do_sample": False},
        )
    return PeerPolicy("HuggingFaceLLM", lambda query: llm.complete(_text_of(subject, query), formatted=True))


def _installed(module: str, distribution: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise PeerError(f"not installed: {distribution} ({error})") from error


def _messages_of(query: Query) -> list[tuple[str, str]]:
    assert not isinstance(query.prompt, str), "all scenarios are chats"
    return [(message["role"], message["content"]) for message in query.prompt]


def _text_of(subject: Subject, query: Query) -> str:
    """The prompt as a chain would hand it over: rendered by the chat template."""
    text = subject.tokenizer.apply_chat_template(query.prompt, tokenize=False, add_generation_prompt=True)
    return str(text)
