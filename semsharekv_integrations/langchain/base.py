"""What the chat model and the plain LLM share: their fields, what one call may set, and the engine behind them.

LangChain tells a model of a call's tenant, conversation and documents by a ``RunnableConfig``, which reaches ``invoke``
and ``stream``, but not what a model implements below them; here it becomes keyword arguments on the way. Knows nothing
about chat templates, nor about how KV is reused.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Self, cast
from weakref import WeakKeyDictionary

import torch
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseLanguageModel
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import BaseMessage
from langchain_core.runnables import Runnable, RunnableConfig, ensure_config
from pydantic import ConfigDict, Field, create_model, field_serializer, model_validator

from semsharekv_integrations import frameworks
from semsharekv_integrations.concurrency.streams import raise_first_error
from semsharekv_integrations.config import EngineConfig, ModeSetting
from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.errors import require
from semsharekv_integrations.langchain.documents import collect_documents, find_tracked_documents
from semsharekv_integrations.langchain.messages import PROVIDER
from semsharekv_integrations.request import GenerateOptions, Request, check_optional_name

Stop = list[str] | None
Run = CallbackManagerForLLMRun | None
AsyncRun = AsyncCallbackManagerForLLMRun | None
_OTHER_NAMES = dict.fromkeys(("max_new_tokens", "max_completion_tokens", "num_predict"), "max_tokens")
_OTHER_NAMES["stop_sequences"] = "stop"
_ONE_MEANING: dict[str, tuple[Any, ...]] = {
    "stream": (True, False),  # BaseChatModel decides by it whether to stream, and hands it on
    "stream_usage": (True, False),  # usage is reported in any case
    "stream_options": ({"include_usage": True}, {"include_usage": False}),
    "n": (1,),
    "logprobs": (False,),
}
_SESSION_NAMES = ("thread_id", "session_id")  # LangGraph's, and RunnableWithMessageHistory's
_SECRETS = {"token"}
# By engine, the fields that said how to load it
_loaded_as: WeakKeyDictionary[SemShareEngine, dict[str, Any]] = WeakKeyDictionary()
_Fields: Any = create_model("_Fields", __module__=__name__, **frameworks.make_sampling_fields(stop=list[str] | None))


class SamplingFields(_Fields):
    """Options that a model has as fields and that every call may set anew. Unknown names are refused.

    They are those of ``SamplingConfig``. ``max_tokens`` is also taken as ``max_new_tokens``, ``max_completion_tokens``
    or ``num_predict``, and ``stop`` as ``stop_sequences``; a call's own ``stop`` replaces that of the model.
    """

    namespace: str | None = None
    """Whose KV may be read, and where new KV goes: a tenant's name, or None for this model object and its copies alone.

    ``configurable["namespace"]`` of a call's config goes before it, and the call's own ``namespace`` before both.
    """

    private_namespace: str = Field(default_factory=frameworks.make_private_name, frozen=True, exclude=True, repr=False)
    """What ``namespace`` None stands for. A field, since LangChain rebuilds models from their fields."""

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        """Rename options as ``rename_options`` does; ``ValueError`` for unknown names. An instance passes as it is."""
        if not isinstance(values, Mapping):  # an instance in another model's field
            return values
        values = rename_options(values)
        unknown = sorted(values.keys() - cls.model_fields.keys())
        require(not unknown, "keyword arguments", unknown, ", ".join(cls.model_fields))
        return values

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        check_optional_name("namespace", self.namespace)
        Request.of("", self._make_sampling_options())
        return self

    def _make_sampling_options(self) -> GenerateOptions:
        options = frameworks.name_for_engine({name: getattr(self, name) for name in frameworks.SAMPLING_FIELDS})
        return options | GenerateOptions(namespace=self.kv_namespace)

    @property
    def kv_namespace(self) -> str:
        """The engine's namespace of calls that name none; pass it to ``engine.warm``, ``forget`` or ``clear``."""
        return self.private_namespace if self.namespace is None else self.namespace


class CallOptions(SamplingFields):
    """What one call sets."""

    documents: Any = None  # that stand in the prompt: texts or LangChain documents in a list, or texts by id
    session: str | None = None  # by default the ``thread_id`` or ``session_id`` that LangChain runs the call under
    tracked_documents: dict[str, str] = {}  # ids by text; those that do not stand in the prompt are left out

    @classmethod
    def merge(cls, fields: SamplingFields, stop: Sequence[str] | None, call: Mapping[str, Any]) -> Self:
        """Make a call's options: model fields, replaced by what the call sets to non-None. ``ValueError`` if bad."""
        given = rename_options({"stop": stop, **apply_config(None, call)})
        given = _drop_ineffective({name: value for name, value in given.items() if value is not None})
        shared = cls.model_fields.keys() & type(fields).model_fields.keys()
        return cls(**{**{name: getattr(fields, name) for name in shared}, **given})

    def make_options(self, contents: Sequence[str], messages: Sequence[BaseMessage] = ()) -> GenerateOptions:
        """Return the engine's keyword arguments; documents are looked for in ``contents``, the prompt's texts."""
        documents = collect_documents(self.documents, self.tracked_documents, messages, contents)
        known = GenerateOptions(documents=documents, session=self.session)
        return self._make_sampling_options() | known | self.make_other_options()

    def make_other_options(self) -> GenerateOptions:
        """Return engine options that only a subclass has; none here."""
        return GenerateOptions()


def rename_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy in which names that other models use are replaced by ours; ``ValueError`` if two names disagree."""
    renamed = dict(values)
    for other, name in _OTHER_NAMES.items():
        given, known = renamed.pop(other, None), renamed.get(name)
        if given is not None:
            require(known in (None, given), other, given, f"{known}, as {name} says, or only one of them")
            renamed[name] = given
    return renamed


def _drop_ineffective(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy without options that have no effect here; ``ValueError`` if a value asks for an effect."""
    for name, accepted in _ONE_MEANING.items():
        value = given.get(name, accepted[0])
        require(value in accepted, name, value, " or ".join(map(repr, accepted)))
    return {name: value for name, value in given.items() if name not in _ONE_MEANING}


def apply_config(config: RunnableConfig | None, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of ``call`` with the config's ``session`` and ``namespace`` where the call leaves them None.

    The session is ``configurable``'s ``thread_id``, else its ``session_id``. Without a config, the config of the chain
    around the call counts, if there is one.
    """
    known = ensure_config(config).get("configurable", {})
    session = next((known[name] for name in _SESSION_NAMES if known.get(name) is not None), None)
    found = {"session": None if session is None else str(session), "namespace": known.get("namespace")}
    wanted = {name: value for name, value in found.items() if value is not None and call.get(name) is None}
    return {**call, **wanted}


class LocalModel(SamplingFields, BaseLanguageModel):
    """A local transformers model, given by name (weights are loaded at the first call) or as a shared engine.

    Mix it in before LangChain's own class: its entry points do as those, but also read ``thread_id`` and ``namespace``
    from the ``configurable`` of a call's configuration.

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
    def _set_engine(cls, values: Any) -> Any:
        """Add ``engine`` and the fields that it fills in, from a given engine or by ``model``; drop None values."""
        if not isinstance(values, Mapping):  # an instance in another model's field
            return values
        given = {name: value for name, value in values.items() if value is not None}
        return given | (_read_engine(given) if "engine" in given else _make_engine(given))

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Return the answer, a message from a chat model, a text from an LLM. ``ValueError`` for a bad option."""
        return super().invoke(input, config, **apply_config(config, kwargs))  # type: ignore[safe-super]

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """As ``invoke``, without blocking the event loop."""
        return await super().ainvoke(input, config, **apply_config(config, kwargs))

    def stream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:
        """Return an iterator over the pieces of the answer, knowing also a ``DocumentTracker``'s documents."""
        return super().stream(input, config, **self._apply_run(config, kwargs))

    def astream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[Any]:
        """As ``stream``, without blocking the event loop."""
        return super().astream(input, config, **self._apply_run(config, kwargs))

    def stream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """As the base class: stream what happens while the model answers, with a ``DocumentTracker``'s documents."""
        return super().stream_events(input, config, **self._apply_run(config, kwargs))

    def astream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """As ``stream_events``, without blocking the event loop."""
        return super().astream_events(input, config, **self._apply_run(config, kwargs))

    def _apply_run(self, config: RunnableConfig | None, call: Mapping[str, Any]) -> dict[str, Any]:
        """Add to a copy of ``call`` what its config names and what its document trackers know."""
        return self._add_tracked(ensure_config(config).get("callbacks"), apply_config(config, call))

    def _add_tracked(self, callbacks: Any, call: Mapping[str, Any]) -> dict[str, Any]:
        texts = find_tracked_documents(callbacks, self.callbacks)
        return {**call, "tracked_documents": texts} if texts else dict(call)

    def batch(
        self, inputs: list[Any], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        """Return the answers in order; the calls share KV.

        When all have ended, raise the first error or, with ``return_exceptions``, return each error in its place.
        """
        with self.engine.sharing():
            done = Runnable.batch(self, inputs, config, return_exceptions=True, **kwargs)
        return done if return_exceptions else raise_first_error(done)

    async def abatch(
        self, inputs: list[Any], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        """As ``batch``, without blocking the event loop."""
        with self.engine.sharing():
            done = await Runnable.abatch(self, inputs, config, return_exceptions=True, **kwargs)
        return done if return_exceptions else raise_first_error(done)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy, with the same engine; ``ValueError`` for an ``update`` that needs another."""
        frameworks.require_same_engine(self, update)
        return super().model_copy(update=update, deep=deep)

    @field_serializer("device", "dtype", when_used="json-unless-none")
    def _name_plainly(self, value: Any) -> str:
        return str(value).removeprefix("torch.")

    def get_token_ids(self, text: str) -> list[int]:
        """Return the text's token ids, without special tokens, by the model's own tokenizer; loads no weights."""
        own = self.custom_get_token_ids
        return frameworks.tokenize(self.engine, text) if own is None else own(text)

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Return all that can change the answer, as plain values; LangChain keys its response cache by them."""
        sampling = {name: getattr(self, name) for name in (*frameworks.SAMPLING_FIELDS, "namespace")}
        loading = {key: _make_plain(value) for key, value in self.model_kwargs.items() if key not in _SECRETS}
        return {
            "model_name": self.model,
            "model_identity": self.engine.identity(),
            "mode": self.mode,
            "device": None if self.device is None else str(self.device),
            "dtype": _make_plain(self.dtype),
            "model_kwargs": loading,
            "config": json.loads(json.dumps(asdict(self.config), default=os.fspath)),
            "stop_strings": sampling.pop("stop"),  # LangChain overwrites "stop" with that of the call
            **sampling,
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        call = rename_options({"stop": stop, **kwargs})
        known = super()._get_ls_params(stop=call.pop("stop") or self.stop, **call)
        return {**known, "ls_provider": PROVIDER}


def _read_engine(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that the given engine fills in; ``ValueError`` if a field given beside it says otherwise."""
    engine = given["engine"]
    own = frameworks.describe_engine(engine)
    if "model" in given:  # a model rebuilt from the fields of another: they describe how its engine was made
        fields = own | _loaded_as.get(engine, {})
        frameworks.require_agreement(fields, given, fields)
        return own
    frameworks.require_agreement(own, given)
    return own | ({"device": engine.model.device, "dtype": engine.model.dtype} if engine.is_loaded else {})


def _make_engine(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the fields of a model given by name; return them with a new engine, which has loaded nothing yet."""
    name, config, options = given.get("model"), given.get("config", EngineConfig()), given.get("model_kwargs", {})
    name = os.fspath(name) if isinstance(name, os.PathLike) else name
    require(isinstance(name, str) and bool(name), "model", name, "a path or hub id, or an engine in its place")
    require(isinstance(config, EngineConfig), "config", config, "None or an EngineConfig")
    frameworks.check_mode(given.get("mode"))
    require(isinstance(options, Mapping), "model_kwargs", options, "None or a dict")
    loading = given.get("device"), given.get("dtype", "auto"), options
    engine = frameworks.make_engine(str(name), given.get("mode"), config, *loading)
    _loaded_as[engine] = dict(zip(("device", "dtype", "model_kwargs"), loading, strict=True))
    return {"engine": engine, "model": name, "mode": engine.config.reuse.mode, "config": engine.config}


def _make_plain(value: Any) -> Any:
    """Return ``value`` if it is a JSON scalar, else its ``repr``; a torch dtype by its name without ``torch.``."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
