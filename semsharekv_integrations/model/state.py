"""Which state a model is in. KV is good for the state that made it, and for no other.

``_Snapshot`` is what can be compared at every call: modules, tensors, attributes and configuration values, each
tensor's version and place, and a few of its values, as writes through ``.data`` count no version. ``State`` digests all
tensors that a pass reads, classes, attributes and configuration, anew after a change. Inactive adapters are left out.

Not seen: a write through ``.data`` (or another alias that counts no version) that leaves all sampled values as they
were; changes inside of objects that are neither modules nor plain values; functions replaced elsewhere than in modules
and their classes; what forward hooks close over. A state with hooks of others is known in this process alone. (Knows
PEFT's adapters, accelerate's offloading, changing rope.)
"""

from __future__ import annotations

import copy
import enum
import hashlib
import threading
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from operator import attrgetter, eq, methodcaller
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from semsharekv_integrations.concurrency.threads import hold_at_forks
from semsharekv_integrations.model.digest import Samples, compute_digest, read_samples, sample
from semsharekv_integrations.model.layers import find_offload_hook
from semsharekv_integrations.model.packing import flatten, read_packing

# Of configurations and modules: what says nothing about hidden states, or what ``Part`` tells
_NAMES = {"_name_or_path", "name_or_path", "architectures", "dtype", "transformers_version"}
_LOADED = {"gradient_checkpointing", "hf_device_map", "prepare_inputs_for_generation", "training", "warnings_issued"}
_OUTPUT = {"generation_config", "output_attentions", "output_hidden_states", "return_dict", "use_cache"}
_ADAPTERS = {"peft_config", "_peft_config", "_active_adapter", "_disable_adapters"}
# By each ``generate`` of a multimodal model, which no pass reads that is told positions; by kernels of GPTQ and AWQ
_SET_BY_CALLS = {"rope_deltas", "temp_dq", "workspace", "q_handle", "q4"}
_NOT_IN_STATE = frozenset(_NAMES | _LOADED | _OUTPUT | _ADAPTERS | _SET_BY_CALLS)
_MODULE_NAMES = frozenset(vars(nn.Module()))
_ATTENTION = "_attn_implementation_internal"
_OWN = "semsharekv"  # attention functions that stand in during a pass
_HARMLESS_HOOKS = ("transformers.", "semsharekv_integrations.")  # which change no hidden states
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
_CHANGING = ("inv_freq", "attention_scaling", "max_seq_len_cached")
_PLAIN = {nn.Linear, nn.Identity}
_DEEPEST = 4  # containers within containers
_IN_THIS_PROCESS = uuid.uuid4().hex


class State(NamedTuple):
    """A state as it was seen.

    Attributes:
        key: equal for equal states, in this process.
        fingerprint: the same in every process, device and placement left out.
        epoch: grows with every change that is seen, back to an earlier state too.
    """

    key: str
    fingerprint: str
    epoch: int


class StateWatch:
    """Tells the state of one model, and keeps digests of tensors it saw. Safe to use from several threads."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._lock = hold_at_forks(threading.Lock())
        self._seen: _Snapshot | None = None
        self._glance: tuple[Any, ...] | None = None
        self._state = State("", "", 0)
        self._is_new = False  # whether tensors were found that were not known as they are
        self._digests: dict[int, tuple[weakref.ref[Tensor], tuple[Any, ...], bytes]] = {}  # by id, with marks
        self._offloaded: dict[tuple[int, str], tuple[Any, bytes]] = {}  # by place, with what holds it

    def get_state(self) -> State:
        """Return the model's state. If the model has changed, first digest what is new, which may take long."""
        with self._lock:
            if self._seen is None or not self._seen.holds():
                self._seen, self._is_new = _Snapshot(self._model), False
                self._glance = self._seen.glance()
                key, fingerprint = self._compute_keys(self._seen)
                has_changed = self._is_new or key != self._state.key
                self._state = State(key, fingerprint, self._state.epoch + has_changed)
            return self._state

    def glance(self) -> None:
        """Add 1 to the epoch if adapters were switched or merged since the last look. Does nothing before a state."""
        seen = self._seen
        if seen is not None and (found := seen.glance()) != self._glance:
            with self._lock:
                self._glance, self._state = found, self._state._replace(epoch=self._state.epoch + 1)

    @property
    def in_training(self) -> bool:
        """Return True if any module was in training mode in the last snapshot; False if there is none."""
        return self._seen is not None and self._seen.in_training

    def _compute_keys(self, seen: _Snapshot) -> tuple[str, str]:
        """Return key and fingerprint of what was ``seen``; only the key depends on devices and function identity."""
        key, fingerprint = (hashlib.blake2b(digest_size=16) for _ in range(2))
        for name, tensor, source in seen.tensors:
            digest = self._get_digest(name, tensor, source)
            for both in (key, fingerprint):
                both.update(name.encode() + b"\0" + (digest or _IN_THIS_PROCESS.encode()))
            key.update(str(tensor.device).encode())
        for part in seen.parts:
            key.update(part.describe(in_this_process=True).encode())
            fingerprint.update(part.describe(in_this_process=False).encode())
        for config in seen.configs:
            for both in (key, fingerprint):
                both.update(_describe_config(config).encode())
        if seen.hooks:
            key.update(repr(seen.hooks).encode())
            fingerprint.update(f"{_IN_THIS_PROCESS} {seen.hooks}".encode())
        return key.hexdigest(), fingerprint.hexdigest()

    def _get_digest(self, name: str, tensor: Tensor, source: Any) -> bytes | None:
        """Return (and keep) the digest of ``tensor`` or its data in ``source``; None if on 'meta' and without one."""
        if source is not None:
            place = id(source), name
            if place not in self._offloaded:
                found = source[name.rpartition(".")[2]]
                self._offloaded[place] = source, b"".join(compute_digest(t) for _, t in flatten("", found))
            return self._offloaded[place][1]
        if tensor.device.type == "meta":
            return None
        version = 0 if tensor.is_inference() else tensor._version
        marks = tensor.data_ptr(), tensor.dtype, tensor.stride(), version, read_samples([sample(tensor)])
        known = self._digests.get(id(tensor))
        if known is None or known[0]() is not tensor or known[1] != marks:
            self._is_new = True
            known = self._digests[id(tensor)] = weakref.ref(tensor), marks, compute_digest(tensor)
        return known[2]


class _Anything:
    """Equals everything."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = object.__hash__


class _Snapshot:
    """What a model looked like; cheap to compare with what it looks like now."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.parts = _find_parts(model)
        modules = [part.module for part in self.parts]
        self.in_training = any(module.training for module in modules)
        self._adapter = next((part.module for part in self.parts if part.active is not None), None)
        self._dicts = [vars(module) for module in modules if not _is_plain(module)]
        self._values = [[_freeze(name, value) for name, value in values.items()] for values in self._dicts]
        inner = [group for module in modules for group in _list_inner(module)]
        self._filled = [group for group in inner if group]
        self._members = list(
            chain.from_iterable(map(dict.values, self._filled))
        )  # held, so that no other object is taken for one of them
        self._ids = list(map(id, self._members))
        self.configs = _find_configs(modules)
        self._settings = [copy.deepcopy(_read_settings(config)) for config in self.configs]
        called = [module for module in modules if not _is_container(module)]
        self._hooks = [hooks for module in called for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self.hooks = _list_foreign_hooks(self._hooks)
        self.tensors = [found for part in self.parts for found in part.list_tensors()]
        tracked = [tensor for _, tensor, source in self.tensors if source is None and tensor.device.type != "meta"]
        looks: tuple[tuple[Callable[[Any], Any], list[Any]], ...] = (
            (len, [*inner, *(vars(module) for module in called if _is_plain(module))]),
            (attrgetter("_version"), [tensor for tensor in tracked if not tensor.is_inference()]),
            (methodcaller("data_ptr"), tracked),
            (attrgetter("dtype"), tracked),
            (methodcaller("stride"), tracked),
            (type, modules),
            (_get_forward, modules),
        )
        self._looks = [(look, things, list(map(look, things))) for look, things in looks]
        self._samples = Samples(tracked)

    def holds(self) -> bool:
        """Return True if the model still looks like this, as far as the samples now due show; False if that fails."""
        try:
            return (
                all(list(map(look, things)) == before for look, things, before in self._looks)
                and all(map(eq, map(id, chain.from_iterable(map(dict.values, self._filled))), self._ids))
                and all(map(eq, map(list, map(dict.values, self._dicts)), self._values))
                and all(map(_has_settings, self.configs, self._settings))
                and _list_foreign_hooks(self._hooks) == self.hooks
                and self._samples.hold()
            )
        except (RuntimeError, ValueError, TypeError):  # values that cannot be compared are other values
            return False

    def glance(self) -> tuple[Any, ...]:
        """Return which adapters are active now, disabled or merged; () if the model has none to choose from."""
        adapter = self._adapter
        if adapter is None:
            return ()
        return str(adapter._active_adapter), adapter._disable_adapters, str(getattr(adapter, "merged_adapters", ""))


class Part(NamedTuple):
    """A module that takes part.

    Attributes:
        active: the adapters that take part in it, or None if it has none to choose from.
        only: of a container of adapters, those that take part; else None.
    """

    name: str
    module: nn.Module
    active: tuple[str, ...] | None
    only: tuple[str, ...] | None

    def list_tensors(self) -> Iterator[tuple[str, Tensor, Any]]:
        """Yield name, plain tensor and offloaded weights (or None) of each parameter, buffer, attribute in use."""
        hook = find_offload_hook(self.module)
        source = None if hook is None else hook.weights_map
        for group in (self.module._parameters, self.module._buffers, vars(self.module)):
            for name, tensor in group.items():
                takes_part = name not in _SET_BY_CALLS and (self.only is None or name in self.only)
                if isinstance(tensor, Tensor) and takes_part and not _changes_with_length(self.module, name):
                    elsewhere = source if source is not None and name in source else None
                    yield from ((inner, t, elsewhere) for inner, t in flatten(f"{self.name}.{name}", tensor))
        yield from ((f"{self.name}.{name}", tensor, None) for name, tensor in read_packing(self.module).items())

    def describe(self, *, in_this_process: bool) -> str:
        """Return a text of class and attributes; ``in_this_process`` adds the identity of functions, and devices."""
        module = self.module
        prompted = getattr(module, "_is_prompt_learning", False)
        adapts = self.active is not None or hasattr(module, "peft_config")
        values = {
            name: value
            for name, value in vars(module).items()
            if name not in _NOT_IN_STATE
            and name not in _MODULE_NAMES
            and not (name[0] == "_" and isinstance(module, PreTrainedModel))  # how it was loaded
            and not isinstance(value, Tensor)
            and not _changes_with_length(module, name)
            and not (name == "forward" and not self.name and not prompted)  # which the layers know nothing of
            and not (adapts and name == "active_adapter" and not prompted)
        }
        chosen = self.active if self.only is None else self.only
        if chosen is not None:
            by_adapter = {name: value for name, value in values.items() if isinstance(value, dict)}
            values |= {name: {key: value[key] for key in chosen if key in value} for name, value in by_adapter.items()}
        if self.name and (replaced := _find_replaced_forward(module)) is not None:
            values["forward of its class"] = replaced
        told = {name: _tell(value, in_this_process, _DEEPEST) for name, value in values.items()}
        return repr((self.name, _name(type(module)), self.active, sorted(told.items())))


def _find_parts(model: nn.Module) -> list[Part]:
    """Return each module once; of what a container holds by adapter, only the active ones."""
    found: list[Part] = []
    seen: set[int] = set()
    pending: list[tuple[str, nn.Module, tuple[str, ...] | None]] = [("", model, None)]
    while pending:
        name, module, only = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        active = _list_active(module)
        found.append(Part(name, module, active, only))
        for key, child in module._modules.items():
            if child is not None and (only is None or key in only):
                by_adapter = active is not None and _is_container(child)
                pending.append((f"{name}.{key}", child, active if by_adapter else None))
    return found


def _list_active(module: nn.Module) -> tuple[str, ...] | None:
    """Return the adapters active in ``module``: () if they are disabled, None if it has none to choose from."""
    names = getattr(module, "_active_adapter", None)
    if names is None:
        return None
    if getattr(module, "_disable_adapters", False):
        return ()
    return (names,) if isinstance(names, str) else tuple(names)


def _is_container(module: nn.Module) -> bool:
    """Return True if ``module`` only holds things by name, as PEFT does by adapter, and computes nothing itself."""
    holds = isinstance(module, nn.ModuleDict | nn.ParameterDict) or type(module).__name__ == "BufferDict"
    return holds and type(module).forward is nn.Module.forward


def _get_forward(module: nn.Module) -> object:
    return type(module).forward


def _find_replaced_forward(module: nn.Module) -> object | None:
    """Return the function that somebody put in place of the class's own ``forward``; None if nobody did."""
    owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    found = vars(owner)["forward"]
    named = getattr(found, "__module__", None), getattr(found, "__qualname__", None)
    return None if owner is nn.Module or named == (owner.__module__, f"{owner.__qualname__}.forward") else found


def _is_plain(module: nn.Module) -> bool:
    """Return True for a Linear, Identity or container with its class's own forward; its attributes need no look."""
    return (type(module) in _PLAIN or _is_container(module)) and "forward" not in vars(module)


def _list_inner(module: nn.Module) -> list[dict[str, Any]]:
    """Return the module's own dicts of parameters, buffers and modules; modules alone if ModuleDict or offloaded."""
    if isinstance(module, nn.ModuleDict) or find_offload_hook(module) is not None:
        return [module._modules]
    return [module._parameters, module._buffers, module._modules]


def _freeze(name: str, value: Any) -> Any:
    """Return a shallow copy of a dict, list or set that may be changed in place; anything else as it is.

    For what calls set anew, return something that equals whatever they set.
    """
    if name in _SET_BY_CALLS:
        return _Anything()
    return copy.copy(value) if type(value) in (dict, list, set) and name not in _MODULE_NAMES else value


def _find_configs(modules: Iterable[nn.Module]) -> list[PreTrainedConfig]:
    """Return the configurations in attributes of ``modules``, and in attributes of those, each once."""
    found: dict[int, PreTrainedConfig] = {}
    pending = [value for module in modules for value in vars(module).values() if isinstance(value, PreTrainedConfig)]
    while pending:
        config = pending.pop()
        if id(config) not in found:
            found[id(config)] = config
            pending += [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return list(found.values())


def _describe_config(config: PreTrainedConfig) -> str:
    """Return a text of what a configuration says of hidden states, the same once it was saved and read again."""
    told = {name: value for name, value in config.to_dict().items() if name not in _NOT_IN_STATE}
    return _tell({**told, _ATTENTION: getattr(config, _ATTENTION, None)}, False, _DEEPEST)


def _read_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the attributes of a configuration that concern hidden states: the values themselves, not copies."""
    return {name: value for name, value in vars(config).items() if name not in _NOT_IN_STATE}


def _has_settings(config: PreTrainedConfig, settings: Mapping[str, Any]) -> bool:
    """Return True if ``config`` still has ``settings``; our own attention, set during a pass, counts as no change."""
    now = _read_settings(config)
    if str(now.get(_ATTENTION)).startswith(_OWN):
        now[_ATTENTION] = settings.get(_ATTENTION)
    return now == settings


def _list_foreign_hooks(groups: Iterable[Mapping[int, Any]]) -> list[tuple[int, str]]:
    """Return number (never given twice) and name of each hook that is not transformers' or this package's."""
    hooks = ((key, _name(hook)) for group in groups if group for key, hook in group.items())
    return [(key, name) for key, name in hooks if not name.startswith(_HARMLESS_HOOKS)]


def _changes_with_length(module: nn.Module, name: str) -> bool:
    """Return True if ``name`` is an attribute of a rope module that changes with the length of the text."""
    if not name.endswith(_CHANGING) or name.endswith("original_inv_freq"):
        return False
    found = vars(module).get("rope_type")
    kinds = found.values() if isinstance(found, dict) else [found]
    return any(kind in str(known) for known in kinds for kind in LENGTH_DEPENDENT_ROPE)


def _tell(value: Any, in_this_process: bool, depth: int) -> str:
    """Return a text that is equal for equal plain values; for others, and below ``depth`` levels, a class or name.

    ``in_this_process`` adds what says nothing elsewhere: devices, and the identity of functions.
    """
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype | enum.Enum):
        return repr(value)
    if isinstance(value, torch.device):
        return str(value) if in_this_process else ""
    if depth and isinstance(value, Mapping):
        items = ((repr(key), _tell(each, in_this_process, depth - 1)) for key, each in value.items())
        return str(sorted(items))
    if depth and isinstance(value, list | tuple):
        return str([_tell(each, in_this_process, depth - 1) for each in value])
    if depth and isinstance(value, set | frozenset):
        return str(sorted(_tell(each, in_this_process, depth - 1) for each in value))
    name = _name(value)
    return f"{name} {id(value)}" if in_this_process and callable(value) and not isinstance(value, type) else name


def _name(value: Any) -> str:
    """Return module and qualified name of a function or class (inside partials), else of the value's class."""
    while isinstance(value, partial):
        value = value.func
    owner = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(owner, '__module__', '')}.{owner.__qualname__}"
