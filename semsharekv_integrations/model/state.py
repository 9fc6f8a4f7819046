"""Which state a model is in. KV is good for the state that made it, and for no other.

Two views of a model. What can be seen at every call: which modules, tensors, attributes and configuration values there
are, each tensor's version and place, and a few of its values, because writes through ``.data`` count no version. And
what a state is: a digest of every byte of the tensors that the forward pass reads, with the classes, attributes and
configuration around them. The second is computed when the first has changed.

Not seen: a write through ``.data`` (or another alias that counts no version) which leaves all sampled values as they
were; changes inside of objects that are neither modules nor plain values; and what forward hooks close over. A state
with hooks of others is known in this process alone.
"""

from __future__ import annotations

import copy
import hashlib
import threading
import uuid
import weakref
from collections.abc import Iterator
from itertools import chain
from operator import attrgetter, eq, methodcaller
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from semsharekv_integrations.forks import hold_at_forks
from semsharekv_integrations.model.digest import Samples, sample_bytes, sample_of, tensor_digest
from semsharekv_integrations.model.state_parts import (
    MODULE_NAMES,
    Part,
    active_parts,
    configs_in,
    described,
    described_config,
    foreign_hooks,
    is_container,
    offloaded,
    plain_tensors,
    same_settings,
    settings_of,
)

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

    def state(self) -> State:
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
        marks = tensor.data_ptr(), tensor.dtype, version, sample_bytes([sample_of(tensor)])
        known = self._digests.get(id(tensor))
        if known is None or known.tensor() is not tensor or known.marks != marks:
            self._is_new = True
            known = self._digests[id(tensor)] = _Known(weakref.ref(tensor), marks, tensor_digest(tensor))
        return known.digest


class _Snapshot:
    """What a model looked like; cheap to compare with what it looks like now."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.parts = active_parts(model)
        modules = [part.module for part in self.parts]
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
