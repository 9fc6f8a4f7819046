"""What a model's forward pass reads: modules, tensors and plain values, adapters that are not active left out.

Knows how PEFT keeps adapters, how accelerate keeps weights elsewhere, and how transformers' rope changes with length.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# Of configurations and modules: names, traces of what was called, and what says nothing about hidden states.
NOT_IN_STATE = {
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "generation_config",
    "gradient_checkpointing",
    "hf_device_map",
    "output_attentions",
    "output_hidden_states",
    "peft_config",
    "prepare_inputs_for_generation",
    "_peft_config",
    "return_dict",
    "training",
    "use_cache",
    "warnings_issued",
    "_active_adapter",
    "_disable_adapters",
}
_ATTENTION = "_attn_implementation_internal"
_OWN = "semsharekv"  # attention functions that stand in during a pass
_HOOKS_OF_NOBODY = ("transformers.", "semsharekv_integrations.")  # which change no hidden states
MODULE_NAMES = frozenset(vars(nn.Module()))
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
_CHANGES_WITH_LENGTH = ("inv_freq", "attention_scaling", "max_seq_len_cached")
_DEEPEST = 4  # containers within containers


class Part(NamedTuple):
    """A module that takes part.

    Attributes:
        name: in the model.
        module: itself.
        active: the adapters that take part in it, or None if it has none to choose from.
        only: of a container of adapters, those that take part; else None.
    """

    name: str
    module: nn.Module
    active: tuple[str, ...] | None
    only: tuple[str, ...] | None

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters, buffers and tensors that are plain attributes, by name."""
        rope_changes = _rope_changes(self.module)
        for group in (self.module._parameters, self.module._buffers, vars(self.module)):
            for name, tensor in group.items():
                takes_part = self.only is None or name in self.only
                if isinstance(tensor, torch.Tensor) and takes_part and not (rope_changes and _changes(name)):
                    yield name, tensor


def active_parts(model: nn.Module) -> list[Part]:
    """The modules that take part, each once."""
    found: list[Part] = []
    seen: set[int] = set()
    pending: list[tuple[str, nn.Module, tuple[str, ...] | None]] = [("", model, None)]
    while pending:
        name, module, only = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        active = _active(module)
        found.append(Part(name, module, active, only))
        for key, child in module._modules.items():
            if child is not None and (only is None or key in only):
                by_adapter = active is not None and is_container(child)
                pending.append((f"{name}.{key}", child, active if by_adapter else None))
    return found


def described(part: Part, *, in_this_process: bool) -> str:
    """Class and plain values of a module, and its functions as far as they are known by more than their name."""
    module, rope_changes = part.module, _rope_changes(part.module)
    prompted = getattr(module, "_is_prompt_learning", False)
    adapts = part.active is not None or hasattr(module, "peft_config")
    values = {
        name: value
        for name, value in vars(module).items()
        if name not in NOT_IN_STATE
        and name not in MODULE_NAMES
        and not (name[0] == "_" and isinstance(module, PreTrainedModel))  # how it was loaded
        and not isinstance(value, torch.Tensor)
        and not (rope_changes and _changes(name))
        and not (name == "forward" and not part.name and not prompted)  # which the layers know nothing of
        and not (adapts and name == "active_adapter" and not prompted)
    }
    chosen = part.active if part.only is None else part.only
    if chosen is not None:
        values = {name: _of_adapters(value, chosen) for name, value in values.items()}
    told = {name: _told(value, in_this_process, _DEEPEST) for name, value in values.items()}
    return repr((part.name, _name_of(type(module)), part.active, sorted(told.items())))


def described_config(config: PreTrainedConfig) -> str:
    """What a configuration says of hidden states, the same before it is written and after."""
    told = {name: value for name, value in config.to_dict().items() if name not in NOT_IN_STATE}
    return _told({**told, _ATTENTION: getattr(config, _ATTENTION, None)}, False, _DEEPEST)


def configs_in(modules: Iterable[nn.Module]) -> list[PreTrainedConfig]:
    """The configurations that modules refer to, each once, with those inside of them."""
    found: dict[int, PreTrainedConfig] = {}
    pending = [value for module in modules for value in vars(module).values() if isinstance(value, PreTrainedConfig)]
    while pending:
        config = pending.pop()
        if id(config) not in found:
            found[id(config)] = config
            pending += [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return list(found.values())


def is_container(module: nn.Module) -> bool:
    """Whether it only holds others by name, as PEFT does by adapter."""
    return isinstance(module, nn.ModuleDict | nn.ParameterDict) or type(module).__name__ == "BufferDict"


def settings_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What a configuration says of hidden states."""
    return {name: value for name, value in vars(config).items() if name not in NOT_IN_STATE}


def same_settings(config: PreTrainedConfig, settings: Mapping[str, Any]) -> bool:
    """Whether it says the same as before, but for an attention function that stands in during a pass."""
    now = settings_of(config)
    if str(now.get(_ATTENTION)).startswith(_OWN):
        now[_ATTENTION] = settings.get(_ATTENTION)
    return now == settings


def foreign_hooks(groups: Iterable[Mapping[int, Any]]) -> list[tuple[int, str]]:
    """Forward hooks that may change hidden states, by numbers that are never given twice."""
    hooks = ((key, _name_of(hook)) for group in groups if group for key, hook in group.items())
    return [(key, name) for key, name in hooks if not name.startswith(_HOOKS_OF_NOBODY)]


def offloaded(module: nn.Module) -> Mapping[str, torch.Tensor] | None:
    """The weights of a module that accelerate brings in for every pass, by name."""
    hook = vars(module).get("_hf_hook")
    for one in (hook, *getattr(hook, "hooks", ())):
        if getattr(one, "offload", False) and getattr(one, "weights_map", None) is not None:
            return one.weights_map
    return None


def plain_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor, or those that one of a quantized class is made of, named so that their meaning is told."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    names, context = tensor.__tensor_flatten__()
    for inner in names:
        yield from plain_tensors(f"{name}.{type(tensor).__name__}{context!r}.{inner}", getattr(tensor, inner))


def _active(module: nn.Module) -> tuple[str, ...] | None:
    names = getattr(module, "_active_adapter", None)
    if names is None:
        return None
    if getattr(module, "_disable_adapters", False):
        return ()
    return (names,) if isinstance(names, str) else tuple(names)


def _of_adapters(value: Any, active: tuple[str, ...]) -> Any:
    """Of values by adapter, those of the active ones."""
    return {name: value[name] for name in active if name in value} if isinstance(value, dict) else value


def _told(value: Any, in_this_process: bool, depth: int) -> str:
    """A text that is equal for equal values."""
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype | enum.Enum):
        return repr(value)
    if isinstance(value, torch.device):
        return str(value) if in_this_process else ""
    if depth and isinstance(value, Mapping):
        items = ((repr(key), _told(each, in_this_process, depth - 1)) for key, each in value.items())
        return str(sorted(items))
    if depth and isinstance(value, list | tuple):
        return str([_told(each, in_this_process, depth - 1) for each in value])
    if depth and isinstance(value, set | frozenset):
        return str(sorted(_told(each, in_this_process, depth - 1) for each in value))
    name = _name_of(value)
    return f"{name} {id(value)}" if in_this_process and callable(value) and not isinstance(value, type) else name


def _name_of(value: Any) -> str:
    """Where a function or class comes from, or the class of anything else."""
    while isinstance(value, partial):
        value = value.func
    owner = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(owner, '__module__', '')}.{owner.__qualname__}"


def _rope_changes(module: nn.Module) -> bool:
    """Whether its frequencies change with the length of what it computes."""
    found = vars(module).get("rope_type")
    kinds = found.values() if isinstance(found, dict) else [found]
    return any(kind in str(known) for known in kinds for kind in _LENGTH_DEPENDENT_ROPE)


def _changes(name: str) -> bool:
    return name.endswith(_CHANGES_WITH_LENGTH) and not name.endswith("original_inv_freq")
