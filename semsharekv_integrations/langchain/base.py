"""What the chat model and the plain LLM share: their fields, the engine behind them, and what identifies them.

Knows nothing about messages, nor about how KV is reused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from langchain_core.language_models import BaseLanguageModel
from langchain_core.language_models.base import LangSmithParams
from langchain_core.runnables import Runnable, RunnableConfig
from pydantic import ConfigDict, Field, model_validator

from semsharekv_integrations.checks import IN_UTF8, is_utf8, require
from semsharekv_integrations.concurrency import raising
from semsharekv_integrations.config import EngineConfig
from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.langchain.calls import ConfiguredCalls
from semsharekv_integrations.langchain.options import SamplingFields, under_own_names
from semsharekv_integrations.langchain.outputs import PROVIDER
from semsharekv_integrations.model.loading import arguments_of
from semsharekv_integrations.modes import MODE_SETTINGS, ModeSetting

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
        return done if return_exceptions else raising(done)

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
        return done if return_exceptions else raising(done)

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
    arguments = arguments_of(given.get("device"), given.get("dtype", "auto"), options)
    engine = SemShareEngine.from_pretrained(str(name), config, **arguments)
    return {"engine": engine, "model": name, "mode": config.reuse.mode, "config": config}


def _plain(value: Any) -> Any:
    """``value`` if JSON knows it, else its text; ``torch.float16`` by the name that it may also be given by."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
