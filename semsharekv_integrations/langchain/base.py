"""What a model's fields and a single call may set of the engine's options, and how one is laid over the other.

Knows nothing about prompts, messages or loading.

What LangChain knows of a call beside its prompt, handed on to the model: tenant, conversation and documents.

A ``RunnableConfig`` reaches ``invoke`` and ``stream``, but not what a model implements below them; here it becomes
keyword arguments on the way. Knows nothing about messages or the engine.

What the chat model and the plain LLM share: their fields, the engine behind them, and what identifies them.

Knows nothing about messages, nor about how KV is reused.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Self, cast
from uuid import uuid4

import torch
from langchain_core.callbacks import Callbacks
from langchain_core.language_models import BaseLanguageModel
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import BaseMessage
from langchain_core.runnables import Runnable, RunnableConfig, ensure_config
from pydantic import BaseModel, ConfigDict, Field, model_validator

from semsharekv_integrations.concurrency.streams import raise_first_error
from semsharekv_integrations.config import MODE_SETTINGS, EngineConfig, ModeSetting
from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.errors import IN_UTF8, is_utf8, require
from semsharekv_integrations.langchain.documents import in_artifacts, in_marked_blocks, tracked_documents, with_found
from semsharekv_integrations.langchain.messages import PROVIDER
from semsharekv_integrations.model.loading import merge_arguments
from semsharekv_integrations.request import GenerateOptions, Request, check_optional_name

_OTHER_NAMES = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "num_predict": "max_tokens",
    "stop_sequences": "stop",
}
_ONE_MEANING: dict[str, tuple[Any, ...]] = {
    "stream": (True, False),  # BaseChatModel decides by it whether to stream, and hands it on
    "stream_usage": (True, False),  # usage is reported in any case
    "stream_options": ({"include_usage": True}, {"include_usage": False}),
    "n": (1,),
    "logprobs": (False,),
}


class SamplingFields(BaseModel):
    """Options that a model has as fields and that every call may set anew. Unknown names are refused."""

    temperature: float = 0.0
    """0 is greedy; above, logits are divided by it. Default 0."""

    top_p: float = 1.0
    """Share of probability mass kept, above 0 up to 1. Default 1."""

    top_k: int | None = None
    """Number of likeliest tokens kept, or None for the model's own default."""

    repetition_penalty: float | None = None
    """Above 1 discourages tokens seen before; None for the model's own default."""

    seed: int | None = None
    """Seed of each call's own random generator, or None for a fresh one."""

    max_tokens: int = 256
    """Most tokens to generate, at least 1; also taken as ``max_new_tokens``, ``max_completion_tokens`` or
    ``num_predict``. Default 256."""

    stop: list[str] | None = None
    """Strings that end the text and are not part of it, also taken as ``stop_sequences``; a call's own replace them."""

    namespace: str | None = None
    """Whose KV may be read, and where new KV goes: a tenant's name, or None for this model object and its copies alone.

    ``configurable["namespace"]`` of a call's config goes before it, and the call's own ``namespace`` before both.
    """

    private_namespace: str = Field(
        default_factory=lambda: f"private-{uuid4().hex}", frozen=True, exclude=True, repr=False
    )
    """What ``namespace`` None stands for. A field, since LangChain rebuilds models from their fields."""

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):  # an instance in another model's field
            return values
        values = under_own_names(values)
        unknown = sorted(values.keys() - cls.model_fields.keys())
        require(not unknown, "keyword arguments", unknown, ", ".join(cls.model_fields))
        return values

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        check_optional_name("namespace", self.namespace)
        require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "1 or more")
        Request.of("", self._sampling_options())
        return self

    def _sampling_options(self) -> GenerateOptions:
        return GenerateOptions(
            max_new_tokens=self.max_tokens,
            stop=self.stop,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            namespace=self.kv_namespace,
        )

    @property
    def kv_namespace(self) -> str:
        """The engine's namespace of calls that name none, to warm, forget or clear."""
        return self.private_namespace if self.namespace is None else self.namespace


class CallOptions(SamplingFields):
    """What one call sets."""

    documents: Any = None
    """Texts that stand in the prompt: texts or LangChain documents in a list, or texts by id."""

    session: str | None = None
    """Name of the conversation; by default the ``thread_id`` or ``session_id`` that LangChain runs the call under."""

    tracked_documents: dict[str, str] = {}
    """Ids by text of documents that may stand in the prompt; those that do not are left out."""

    @classmethod
    def of(cls, fields: SamplingFields, stop: Sequence[str] | None, call: Mapping[str, Any]) -> Self:
        """The model's fields, overridden by what the call sets to anything but None.

        Raises:
            ValueError: naming the option, its value and what is accepted.
        """
        given = under_own_names({"stop": stop, **configured(None, call)})
        given = _with_effect({name: value for name, value in given.items() if value is not None})
        shared = cls.model_fields.keys() & type(fields).model_fields.keys()
        return cls(**{**{name: getattr(fields, name) for name in shared}, **given})

    def for_engine(self, contents: Sequence[str], messages: Sequence[BaseMessage] = ()) -> GenerateOptions:
        """As keyword arguments of the engine's methods.

        Args:
            contents: the prompt's text, or that of its messages, in which documents are looked for.
            messages: what the prompt was made of, which may tell where documents are.
        """
        tracked = [(key, text) for text, key in self.tracked_documents.items()]
        found = [*in_artifacts(messages), *tracked]
        documents = with_found(self.documents, found, in_marked_blocks(messages), contents)
        known = GenerateOptions(documents=documents, session=self.session)
        return self._sampling_options() | known | self.engine_options()

    def engine_options(self) -> GenerateOptions:
        """What else the engine is told; nothing, but for those that know of more."""
        return GenerateOptions()


def under_own_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with what other models call otherwise under its one name here."""
    renamed = dict(values)
    for other, name in _OTHER_NAMES.items():
        given, known = renamed.pop(other, None), renamed.get(name)
        if given is not None:
            require(known in (None, given), other, given, f"{known}, as {name} says, or only one of them")
            renamed[name] = given
    return renamed


def _with_effect(given: Mapping[str, Any]) -> dict[str, Any]:
    """Without what other models are told that has one possible meaning here.

    Raises:
        ValueError: if it is told with another meaning.
    """
    for name, accepted in _ONE_MEANING.items():
        value = given.get(name, accepted[0])
        require(value in accepted, name, value, " or ".join(map(repr, accepted)))
    return {name: value for name, value in given.items() if name not in _ONE_MEANING}


_SESSION_NAMES = ("thread_id", "session_id")  # LangGraph's, and RunnableWithMessageHistory's


def configured(config: RunnableConfig | None, call: Mapping[str, Any]) -> dict[str, Any]:
    """``call`` with the ``session`` and ``namespace`` that ``config`` names, unless it sets them itself.

    The session is ``configurable``'s ``thread_id``, else its ``session_id``; the namespace its ``namespace``. Without
    a config it is that of the chain around the call, if any.
    """
    known = ensure_config(config).get("configurable", {})
    session = next((known[name] for name in _SESSION_NAMES if known.get(name) is not None), None)
    found = {"session": None if session is None else str(session), "namespace": known.get("namespace")}
    wanted = {name: value for name, value in found.items() if value is not None and call.get(name) is None}
    return {**call, **wanted}


class ConfiguredCalls(BaseLanguageModel):
    """Entry points that carry a call's configuration on; to be mixed in before LangChain's own class."""

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """As in the base class; ``configurable`` may name ``thread_id`` and ``namespace``."""
        return super().invoke(input, config, **configured(config, kwargs))  # type: ignore[safe-super]

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """As ``invoke``, without blocking the event loop."""
        return await super().ainvoke(input, config, **configured(config, kwargs))

    def stream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:
        """As ``invoke``, in pieces."""
        return super().stream(input, config, **self._tracked(ensure_config(config), configured(config, kwargs)))

    def astream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[Any]:
        """As ``stream``, without blocking the event loop."""
        return super().astream(input, config, **self._tracked(ensure_config(config), configured(config, kwargs)))

    def stream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """As in the base class; ``configurable`` may name ``thread_id`` and ``namespace``."""
        known = self._tracked(ensure_config(config), configured(config, kwargs))
        return super().stream_events(input, config, **known)

    def astream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """As ``stream_events``, without blocking the event loop."""
        known = self._tracked(ensure_config(config), configured(config, kwargs))
        return super().astream_events(input, config, **known)

    def _tracked(self, config: Mapping[str, Any], call: Mapping[str, Any]) -> dict[str, Any]:
        """``call`` with what a ``DocumentTracker`` knows of the run, if there is one."""
        callbacks: Callbacks = config.get("callbacks")
        texts = tracked_documents(callbacks, self.callbacks)
        return {**call, "tracked_documents": texts} if texts else dict(call)


_UNNAMED = "a path or hub id, or an engine in its place"
_SECRETS = {"token"}
_NOT_SAMPLING = {"stop", "private_namespace"}


class LocalModel(SamplingFields, ConfiguredCalls, BaseLanguageModel):
    """A local transformers model, given by name (weights are loaded at the first call) or as a shared engine.

    Raises:
        ValueError: naming the field, its value and what is accepted.
    """

    model_config = ConfigDict(protected_namespaces=())

    model: str = Field(default="", frozen=True)
    """Local folder, hub id, or ``semsharekv/reference``; with ``engine``, that engine's name."""

    engine: SemShareEngine = Field(default=cast(SemShareEngine, None), frozen=True, exclude=True, repr=False)
    """The engine underneath, to share, warm, forget or save; made from ``model`` if not given."""

    mode: ModeSetting = Field(default="auto", frozen=True)
    """What may be reused, ``auto`` or ``off`` to ``paper``: see ``ReuseConfig``. By default that of ``config``."""

    config: EngineConfig = Field(default_factory=EngineConfig, frozen=True)
    """All other settings of the engine."""

    device: str | torch.device | None = Field(default=None, frozen=True)
    """Where the model goes, or None for CUDA if there is one, else the CPU."""

    dtype: str | torch.dtype = Field(default="auto", frozen=True)
    """``auto`` for the dtype of the weights, else a torch dtype or its name."""

    model_kwargs: dict[str, Any] = Field(default_factory=dict, frozen=True, exclude=True, repr=False)
    """For ``AutoModelForCausalLM.from_pretrained``, such as ``revision`` or ``device_map``."""

    @model_validator(mode="before")
    @classmethod
    def _with_engine(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):  # an instance in another model's field
            return values
        given = {name: value for name, value in values.items() if value is not None}
        return given | (_of_engine(given) if "engine" in given else _of_name(given))

    def batch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """The answers in order; what prompts share is computed once, and those that run together decode together.

        One that fails takes none of the others down: they are finished before its error is raised or returned.
        """
        with self.engine.sharing():
            done = Runnable.batch(self, inputs, config, return_exceptions=True, **kwargs)
        return done if return_exceptions else raise_first_error(done)

    async def abatch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """As ``batch``, without blocking the event loop."""
        with self.engine.sharing():
            done = await Runnable.abatch(self, inputs, config, return_exceptions=True, **kwargs)
        return done if return_exceptions else raise_first_error(done)

    def get_token_ids(self, text: str) -> list[int]:
        """Ids of the text's tokens by the model's own tokenizer, without special tokens; loads no weights."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        require(is_utf8(text), "text", text, f"a text{IN_UTF8}")
        return list(self.engine.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """All that can change the text, as plain values: LangChain's response cache is keyed by it."""
        sampling = {name: getattr(self, name) for name in SamplingFields.model_fields if name not in _NOT_SAMPLING}
        return {
            "model_name": self.model,
            "model_identity": self.engine.identity(),
            "mode": self.mode,
            "device": None if self.device is None else str(self.device),
            "dtype": _plain(self.dtype),
            "model_kwargs": {key: _plain(value) for key, value in self.model_kwargs.items() if key not in _SECRETS},
            "config": asdict(self.config),
            "stop_strings": self.stop,  # LangChain overwrites "stop" with that of the call
            **sampling,
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        call = under_own_names({"stop": stop, **kwargs})
        known = super()._get_ls_params(stop=call.pop("stop") or self.stop, **call)
        return {**known, "ls_provider": PROVIDER}


def _of_engine(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a given engine fills in; those given beside it must say the same."""
    engine = given["engine"]
    require(isinstance(engine, SemShareEngine), "engine", type(engine).__name__, "None or a SemShareEngine")
    own = {"model": engine.name, "mode": engine.config.reuse.mode, "config": engine.config}
    for name, value in own.items():
        require(given.get(name, value) == value, name, given.get(name), f"{value!r}, that of the engine, or nothing")
    if "model" in given:  # a model rebuilt from the fields of another: they describe how its engine was made
        return own
    for name in ("device", "dtype", "model_kwargs"):
        require(name not in given, name, given.get(name), "nothing beside an engine, which is loaded in its own way")
    if engine.is_loaded:
        own |= {"device": engine.model.device, "dtype": engine.model.dtype}
    return own


def _of_name(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a model given by name, and its engine; nothing is loaded."""
    name, config = given.get("model"), given.get("config", EngineConfig())
    name = os.fspath(name) if isinstance(name, os.PathLike) else name
    require(isinstance(name, str) and bool(name), "model", name, _UNNAMED)
    require(isinstance(config, EngineConfig), "config", config, "None or an EngineConfig")
    if "mode" in given:
        require(given["mode"] in MODE_SETTINGS, "mode", given["mode"], " or ".join(map(repr, (None, *MODE_SETTINGS))))
        config = replace(config, reuse=replace(config.reuse, mode=given["mode"]))
    options = given.get("model_kwargs", {})
    require(isinstance(options, Mapping), "model_kwargs", options, "None or a dict")
    arguments = merge_arguments(given.get("device"), given.get("dtype", "auto"), options)
    engine = SemShareEngine.from_pretrained(str(name), config, **arguments)
    return {"engine": engine, "model": name, "mode": config.reuse.mode, "config": config}


def _plain(value: Any) -> Any:
    """``value`` if JSON knows it, else its text; ``torch.float16`` by the name that it may also be given by."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
