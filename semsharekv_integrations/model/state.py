"""Which state a model is in. KV is good for the state that made it, and for no other.

Two views of a model. What can be seen at every call: which modules, tensors, attributes and configuration values there
are, each tensor's version and place, and a few of its values, because writes through ``.data`` count no version. And
what a state is: a digest of every byte of the tensors that the forward pass reads, with the classes, attributes and
configuration around them. The second is computed when the first has changed.

Not seen: a write through ``.data`` (or another alias that counts no version) which leaves all sampled values as they
were; changes inside of objects that are neither modules nor plain values; and what forward hooks close over. A state
with hooks of others is known in this process alone.

What a model's forward pass reads: modules, tensors and plain values, adapters that are not active left out.

Knows how PEFT keeps adapters, how accelerate keeps weights elsewhere, and how transformers' rope changes with length.

A digest of every byte of a tensor, at about the speed of its memory, the same on every device.

Words are mixed, multiplied by fixed random odd numbers and added up, block by block; the sums are hashed. It tells
tensors apart that differ by accident or training, not those that somebody forged.
"""

from __future__ import annotations

import copy
import enum
import hashlib
import threading
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import chain
from operator import attrgetter, eq, methodcaller
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from semsharekv_integrations.concurrency.threads import hold_at_forks

_PLAIN = {nn.Linear, nn.Identity}
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


class _Known(NamedTuple):
    tensor: weakref.ref[torch.Tensor]
    marks: tuple[Any, ...]
    digest: bytes


class StateWatch:
    """Tells the state of one model. Safe to use from several threads.

    Args:
        model: whose state it is.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._lock = hold_at_forks(threading.Lock())
        self._seen: _Snapshot | None = None
        self._glance: tuple[Any, ...] | None = None
        self._state = State("", "", 0)
        self._epoch = 0
        self._is_new = False  # whether tensors were found that were not known as they are
        self._digests: dict[int, _Known] = {}
        self._offloaded: dict[tuple[int, str], tuple[Any, bytes]] = {}

    def get_state(self) -> State:
        """The state that the model is in now."""
        with self._lock:
            if self._seen is None or not self._seen.holds():
                self._seen, self._is_new = _Snapshot(self._model), False
                self._glance = self._seen.glance()
                key, fingerprint = self._keys(self._seen)
                self._epoch += self._is_new or key != self._state.key
                self._state = State(key, fingerprint, self._epoch)
            return self._state._replace(epoch=self._epoch)

    def glance(self) -> None:
        """Look at what changes most often, adapters above all; costs about a microsecond."""
        seen = self._seen
        if seen is not None and (found := seen.glance()) != self._glance:
            with self._lock:
                self._glance = found
                self._epoch += 1

    @property
    def in_training(self) -> bool:
        """Whether any module was in training mode when the state was told."""
        return self._seen is not None and self._seen.in_training

    def _keys(self, seen: _Snapshot) -> tuple[str, str]:
        """Key and fingerprint."""
        key, fingerprint = (hashlib.blake2b(digest_size=16) for _ in range(2))
        for name, tensor, source in seen.tensors:
            digest = self._digest(name, tensor, source)
            for both in (key, fingerprint):
                both.update(name.encode() + b"\0" + (digest or _IN_THIS_PROCESS.encode()))
            key.update(str(tensor.device).encode())
        for part in seen.parts:
            key.update(described(part, in_this_process=True).encode())
            fingerprint.update(described(part, in_this_process=False).encode())
        for config in seen.configs:
            for both in (key, fingerprint):
                both.update(described_config(config).encode())
        if seen.hooks:
            key.update(repr(seen.hooks).encode())
            fingerprint.update(f"{_IN_THIS_PROCESS} {seen.hooks}".encode())
        return key.hexdigest(), fingerprint.hexdigest()

    def _digest(self, name: str, tensor: torch.Tensor, source: Any) -> bytes | None:
        """Of the content of ``tensor``, or of what ``source`` has in its place; None if nobody can tell."""
        if source is not None:
            place = id(source), name
            if place not in self._offloaded:
                found = source[name.rpartition(".")[2]]
                self._offloaded[place] = source, b"".join(tensor_digest(t) for _, t in plain_tensors("", found))
            return self._offloaded[place][1]
        if tensor.device.type == "meta":
            return None
        version = 0 if tensor.is_inference() else tensor._version
        marks = tensor.data_ptr(), tensor.dtype, tensor.stride(), version, sample_bytes([sample_of(tensor)])
        known = self._digests.get(id(tensor))
        if known is None or known.tensor() is not tensor or known.marks != marks:
            self._is_new = True
            known = self._digests[id(tensor)] = _Known(weakref.ref(tensor), marks, tensor_digest(tensor))
        return known.digest


class _Snapshot:
    """What a model looked like; cheap to compare with what it looks like now."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.parts = active_parts(model)
        self._modules = modules = [part.module for part in self.parts]
        self._classes = list(map(type, modules))
        self.in_training = any(module.training for module in modules)
        self._adapter = next((part.module for part in self.parts if part.active is not None), None)
        self._dicts = [vars(module) for module in modules if not _is_plain(module)]
        self._values = [[_frozen(name, value) for name, value in values.items()] for values in self._dicts]
        self._inner = [inner for module in modules for inner in _inner(module)]
        called = [module for module in modules if not is_container(module)]
        self._sized = [*self._inner, *(vars(module) for module in called if _is_plain(module))]
        self._sizes = list(map(len, self._sized))
        self._filled = [inner for inner in self._inner if inner]
        self._members = list(_values_of(self._filled))  # held, so that no other object is taken for one of them
        self._ids = list(map(id, self._members))
        self.configs = configs_in(modules)
        self._settings = [copy.deepcopy(settings_of(config)) for config in self.configs]
        self._hooks = [hooks for module in called for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self.hooks = foreign_hooks(self._hooks)
        self.tensors = [found for part in self.parts for found in _tensors_of(part)]
        tracked = [tensor for _, tensor, source in self.tensors if source is None and tensor.device.type != "meta"]
        self._tracked = tracked
        self._versioned = [tensor for tensor in tracked if not tensor.is_inference()]
        self._versions = [tensor._version for tensor in self._versioned]
        self._places = [tensor.data_ptr() for tensor in tracked]
        self._dtypes = [tensor.dtype for tensor in tracked]
        self._strides = [tensor.stride() for tensor in tracked]
        self._samples = Samples(tracked)

    def holds(self) -> bool:
        """Whether the model still looks like this."""
        try:
            return (
                list(map(len, self._sized)) == self._sizes
                and all(map(eq, map(id, _values_of(self._filled)), self._ids))
                and all(map(eq, map(attrgetter("_version"), self._versioned), self._versions))
                and all(map(eq, map(methodcaller("data_ptr"), self._tracked), self._places))
                and all(map(eq, map(attrgetter("dtype"), self._tracked), self._dtypes))
                and all(map(eq, map(methodcaller("stride"), self._tracked), self._strides))
                and list(map(type, self._modules)) == self._classes
                and all(map(eq, map(list, map(dict.values, self._dicts)), self._values))
                and all(map(same_settings, self.configs, self._settings))
                and foreign_hooks(self._hooks) == self.hooks
                and self._samples.hold()
            )
        except (RuntimeError, ValueError, TypeError):  # values that cannot be compared are other values
            return False

    def glance(self) -> tuple[Any, ...]:
        """What tells most changes."""
        adapter = self._adapter
        if adapter is None:
            return ()
        return str(adapter._active_adapter), adapter._disable_adapters, str(getattr(adapter, "merged_adapters", ""))


def _tensors_of(part: Part) -> Iterator[tuple[str, torch.Tensor, Any]]:
    """Names, plain tensors, and what has their content if that lies elsewhere."""
    source = offloaded(part.module)
    for name, tensor in part.tensors():
        elsewhere = source if source is not None and name in source else None
        for inner, plain in plain_tensors(f"{part.name}.{name}", tensor):
            yield inner, plain, elsewhere


def _inner(module: nn.Module) -> list[dict[str, Any]]:
    """What a module consists of; weights that come and go with every pass are left out."""
    if isinstance(module, nn.ModuleDict) or offloaded(module) is not None:
        return [module._modules]
    return [module._parameters, module._buffers, module._modules]


def _is_plain(module: nn.Module) -> bool:
    """Whether its tensors and modules say all about it, unless something is added."""
    return (type(module) in _PLAIN or is_container(module)) and "forward" not in vars(module)


def _values_of(groups: list[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, groups))


def _frozen(name: str, value: Any) -> Any:
    """A copy of a plain container, which may be changed in place; what a module consists of is compared apart."""
    return copy.copy(value) if type(value) in (dict, list, set) and name not in MODULE_NAMES else value


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
    """Whether it only holds others by name, as PEFT does by adapter, and computes nothing itself."""
    holds = isinstance(module, nn.ModuleDict | nn.ParameterDict) or type(module).__name__ == "BufferDict"
    return holds and type(module).forward is nn.Module.forward


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


_BLOCK = 1 << 17  # words of eight bytes that share one sum
_ROWS = 64  # blocks in one step where starting a step costs more than memory does
_FEW, _MANY, _LARGE = 16, 64, 1 << 20  # sampled values of a tensor, and of one with so many values
_AT_ONCE, _AT_ONCE_ELSEWHERE = 1024, 128  # tensors that are looked at in one go; on other devices it takes longer
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes
_SHIFT = 29  # brings high bits down: two flipped signs would cancel out


def tensor_digest(tensor: torch.Tensor) -> bytes:
    """Of dtype, shape and content; ``tensor`` is a plain one."""
    plain = tensor.detach()
    if plain.is_quantized:
        plain = plain.int_repr()
    flat = plain.contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    num_words = len(flat) // 8
    digest = hashlib.blake2b(repr((tensor.dtype, tuple(tensor.shape))).encode(), digest_size=16)
    digest.update(flat[num_words * 8 :].cpu().numpy().tobytes())
    if num_words:
        digest.update(_sums(flat[: num_words * 8].view(torch.int64)).cpu().numpy().tobytes())
    return digest.digest()


def sample_of(tensor: torch.Tensor) -> torch.Tensor:
    """Some values [S], spread over the memory of ``tensor``, which go on to show what is written there."""
    start = tensor.storage_offset()
    room = tensor.untyped_storage().nbytes() // max(1, tensor.element_size()) - start
    size = min(tensor.numel(), room)
    count = min(size, _MANY if size >= _LARGE else _FEW)
    return tensor.detach().as_strided((count,), (max(1, size // max(1, count)),), start)


class Samples:
    """Some values of many tensors, as they were; of very many tensors, a part is looked at each time, in turn.

    Args:
        tensors: on whatever devices.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        kinds: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(sample_of(tensor))
        self._kinds = [_parts_of(samples) for samples in kinds.values()]
        self._next = 0

    def hold(self) -> bool:
        """Whether those whose turn it is are as they were."""
        self._next += 1
        chosen = (parts[self._next % len(parts)] for parts in self._kinds)
        return all(show() == before for show, before in chosen)


def _parts_of(samples: list[torch.Tensor]) -> list[tuple[Callable[[], object], object]]:
    """For each part of samples of one kind, what shows their values, and what they are now."""
    on_host = samples[0].device.type == "cpu" and samples[0].element_size() in _INTEGERS
    most = _AT_ONCE if on_host else _AT_ONCE_ELSEWHERE
    shows: list[Callable[[], object]] = []
    for part in (samples[i : i + most] for i in range(0, len(samples), most)):
        if on_host:
            integers = _INTEGERS[part[0].element_size()]
            shows.append(partial(_host_bytes, [sample.view(integers).numpy() for sample in part]))
        else:
            shows.append(partial(sample_bytes, part))
    return [(show, show()) for show in shows]


def _host_bytes(arrays: list[NDArray[np.generic]]) -> list[bytes]:
    return [array.tobytes() for array in arrays]


def sample_bytes(samples: Sequence[torch.Tensor]) -> bytes:
    """Their values, which are all of one kind."""
    return torch.cat(list(samples)).view(torch.uint8).cpu().numpy().tobytes()


def _sums(words: torch.Tensor) -> torch.Tensor:
    """One for each block of ``words`` [N], the last of which may be short."""
    factors = _factors(words.device)
    whole = len(words) // _BLOCK * _BLOCK
    step = 1 if words.device.type == "cpu" else _ROWS
    groups = [*words[:whole].view(-1, _BLOCK).split(step)] if whole else []
    if whole < len(words):
        groups.append(words[None, whole:])
    found = []
    for group in groups:
        mixed = group >> _SHIFT
        found.append(mixed.bitwise_xor_(group).mul_(factors[: group.shape[1]]).sum(1))
    return torch.cat(found)


@lru_cache(maxsize=16)
def _factors(device: torch.device) -> torch.Tensor:
    """Odd numbers [_BLOCK], the same in every process."""
    random = bytearray(hashlib.shake_256(b"semsharekv").digest(8 * _BLOCK))
    return (torch.frombuffer(random, dtype=torch.int64) | 1).to(device)
