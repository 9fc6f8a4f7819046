"""Where a model comes from: configuration, tokenizer and weights, by name or as given objects.

Each is read when first asked for, so that what a framework wants to know beforehand loads no weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.resources import files
from typing import Any, Protocol

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from semsharekv_integrations.errors import ModelLoadError

REFERENCE_MODEL = "semsharekv/reference"
_SHARED_OPTIONS = ("revision", "trust_remote_code", "token", "local_files_only")


class ModelSource(Protocol):
    """A model that may not be in memory yet. All three may raise ``ModelLoadError``."""

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration; loads no weights."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer; loads no weights."""

    def load(self) -> PreTrainedModel:
        """The model with its weights, in evaluation mode; called once."""


class GivenModel:
    """A model and a tokenizer that are in memory already."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model = model
        self.config: PretrainedConfig = model.config
        self.tokenizer = tokenizer

    def load(self) -> PreTrainedModel:
        """The model as it was given."""
        return self._model.eval()


class NamedModel:
    """A local folder, a hub id, or ``semsharekv/reference``.

    Args:
        name: of the model.
        device: where the model goes, or None for CUDA if there is one, else the CPU. Leave it None with ``device_map``.
        dtype: ``auto`` for the dtype that the model's configuration names, else a torch dtype or its name.
        options: for ``AutoModelForCausalLM.from_pretrained``; ``revision``, ``trust_remote_code``, ``token`` and
            ``local_files_only`` go to configuration and tokenizer too.
    """

    def __init__(
        self, name: str, device: str | torch.device | None, dtype: str | torch.dtype, options: dict[str, Any]
    ) -> None:
        self.name = name
        self._path = resolve(name)
        self._device = device
        self._dtype = dtype
        self._options = options
        self._shared = {key: options[key] for key in _SHARED_OPTIONS if key in options}

    @cached_property
    def config(self) -> PretrainedConfig:
        """Read from the model's folder or the hub."""
        with self._naming_what_failed():
            return AutoConfig.from_pretrained(self._path, **self._shared)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Read from the model's folder or the hub."""
        with self._naming_what_failed():
            return AutoTokenizer.from_pretrained(self._path, **self._shared)

    def load(self) -> PreTrainedModel:
        """Read the weights and put them on their device."""
        dtype = _checked_dtype(self._dtype)
        with self._naming_what_failed():
            model = AutoModelForCausalLM.from_pretrained(self._path, dtype=dtype, **self._options)
        if "device_map" not in self._options:
            model = model.to(self._device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return model.eval()

    @contextmanager
    def _naming_what_failed(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError) as error:
            raise ModelLoadError(f"model {self.name!r} could not be loaded: {error}") from error


def hide_progress_bars() -> None:
    """Turn off transformers' own progress bars, for callers that show their own."""
    disable_progress_bar()


def resolve(name_or_path: str) -> str:
    """The packaged folder for ``semsharekv/reference``; any other name unchanged."""
    if name_or_path == REFERENCE_MODEL:
        return str(files("semsharekv_integrations") / "assets" / "reference")
    return name_or_path


def _checked_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype is {dtype!r}; accepted is 'auto' or a torch dtype such as 'bfloat16'")
    return found


def window_of(config: PretrainedConfig) -> int | None:
    """Most positions that the model was made for, or None if its configuration does not say."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
