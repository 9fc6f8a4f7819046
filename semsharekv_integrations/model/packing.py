"""Weights that are no plain tensors of floats: what they are made of, as libraries for quantization keep it.

Knows tensor subclasses (torchao), and the objects and dicts that bitsandbytes and HQQ keep scales in. GPTQ, AWQ and kin
keep them in buffers, which need no knowledge.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

# Where bitsandbytes and HQQ keep what packed weights mean, and its names there; the rest changes from call to call
_PACKING, _SCALES = ("quant_state", "state", "meta"), ("absmax", "code", "offset", "state2", "SCB")


def is_wrapped(tensor: Tensor) -> bool:
    """Return True for a tensor subclass that stands for what it holds in other tensors, as torchao's do."""
    return hasattr(tensor, "__tensor_flatten__")


def is_packed(tensor: Tensor) -> bool:
    """Return True for a plain tensor of bytes or integers, which is nothing without its scales."""
    return not is_wrapped(tensor) and (not tensor.is_floating_point() or tensor.element_size() < 2)


def flatten(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor, or those of each plain part of a tensor subclass; names tell its class and the part."""
    if not is_wrapped(tensor):
        yield name, tensor
        return
    names, context = tensor.__tensor_flatten__()
    for inner in names:
        yield from flatten(f"{name}.{type(tensor).__name__}{context!r}.{inner}", getattr(tensor, inner))


def read_packing(module: nn.Module) -> dict[str, Tensor]:
    """Return by name the scales that ``module`` or its weights keep in other objects than parameters and buffers."""
    found: dict[str, Tensor] = {}
    for attributes in (vars(module), *(getattr(weight, "__dict__", {}) for weight in module._parameters.values())):
        for name in _PACKING:
            found.update(_list_scales(attributes.get(name)))
        if isinstance(attributes.get("SCB"), Tensor):
            found["SCB"] = attributes["SCB"]
    return found


def _list_scales(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of each scale in an object of bitsandbytes or a dict of HQQ, and in those inside of it."""
    if value is None or isinstance(value, Tensor | nn.Module | str):
        return
    fields = value if isinstance(value, dict) else {name: getattr(value, name, None) for name in _SCALES}
    for name, found in fields.items():
        if isinstance(found, Tensor):
            yield name, found
        elif isinstance(found, dict) or name == "state2":
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in _list_scales(found))
