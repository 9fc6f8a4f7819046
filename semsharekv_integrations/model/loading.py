"""Load a causal language model and its tokenizer from a path or hub id, and refuse what is neither."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from semsharekv_integrations.errors import ModelLoadError

REFERENCE_MODEL = "semsharekv/reference"


def resolve(name_or_path: str) -> str:
    """The packaged folder for ``semsharekv/reference``; any other name unchanged."""
    if name_or_path == REFERENCE_MODEL:
        return str(files("semsharekv_integrations") / "assets" / "reference")
    return name_or_path


def load(
    name_or_path: str, *, device: str | torch.device | None, dtype: str | torch.dtype, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (in evaluation mode) and tokenizer.

    Args:
        name_or_path: local folder, hub id, or ``semsharekv/reference``.
        device: where the model goes, or None for CUDA if there is one, else the CPU. Leave it None with ``device_map``.
        dtype: ``auto`` for the dtype of the weights, else a torch dtype or its name.
        kwargs: for ``AutoModelForCausalLM.from_pretrained``; ``revision`` and ``trust_remote_code`` go to both.

    Raises:
        ModelLoadError: naming what could not be loaded and why.
    """
    path = resolve(name_or_path)
    shared = {
        key: kwargs[key] for key in ("revision", "trust_remote_code", "token", "local_files_only") if key in kwargs
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **shared)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=_dtype(dtype), **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(f"model {name_or_path!r} could not be loaded: {error}") from error
    if "device_map" not in kwargs:
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model.eval(), tokenizer


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype is {dtype!r}; accepted is 'auto' or a torch dtype such as 'bfloat16'")
    return found
