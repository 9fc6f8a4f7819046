"""Where a model's input embeddings are: in their module, or kept elsewhere by accelerate until a pass needs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from semsharekv_integrations.errors import UnsupportedModelError


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go in.

    Raises:
        UnsupportedModelError: if the model's weights are nowhere.
    """
    module = model.get_input_embeddings()
    hook = _offloading_hook(module)
    if hook is not None and hook.execution_device is not None:
        return torch.device(hook.execution_device)
    found: torch.device = module.weight.device
    if found.type == "meta":
        raise UnsupportedModelError(f"{type(model).__name__} has no weights: they are on device 'meta'")
    return found


def has_embeddings_elsewhere(model: PreTrainedModel) -> bool:
    """Whether accelerate keeps them on disk or host between passes."""
    return _offloading_hook(model.get_input_embeddings()) is not None


def embeddings_of(model: PreTrainedModel) -> torch.Tensor:
    """The input embeddings of all tokens [V, hidden]; read from disk if that is where they are."""
    module = model.get_input_embeddings()
    hook = _offloading_hook(module)
    weights: Mapping[str, torch.Tensor] = {"weight": module.weight} if hook is None else hook.weights_map
    found = weights["weight"].detach()
    return found.dequantize() if hasattr(found, "__tensor_flatten__") else found


def _offloading_hook(module: torch.nn.Module) -> Any:
    """What accelerate puts before a module to bring in its weights, or None if they are in it."""
    hook = getattr(module, "_hf_hook", None)
    hooks = (hook, *getattr(hook, "hooks", ()))
    return next((one for one in hooks if getattr(one, "offload", False) and one.weights_map is not None), None)
