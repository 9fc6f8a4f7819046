"""KV in memory (as the model made it, or in 8 bits), and references in one safetensors file.

In 8 bits each head of each token has a scale of its own, so a large key in one place costs no precision in another. A
file holds tensors, a header of JSON with the rest, and a digest over both, which finds damage, not forgery.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from semsharekv_integrations.errors import StoreFileError, StoreWriteError, is_whole
from semsharekv_integrations.kv import LayerKV, Reference, State, TokenIds
from semsharekv_integrations.logs import log_trouble
from semsharekv_integrations.store.files import STATE_MARK, make_metadata
from semsharekv_integrations.store.homes import HOST, Homes
from semsharekv_integrations.store.reading import DamageError, TensorFile
from semsharekv_integrations.store.records import EntryRecord, has_token_ids, is_sound, pack_labels, unpack_reference
from semsharekv_integrations.store.rooms import copy_all, make_rooms, owns_memory

FORMAT_VERSION = 3  # of files of references
_READABLE = (2, FORMAT_VERSION)  # version 2 has one digest over everything
_KEYS, _VALUES, _SCALES = "keys", "values", "scales"
_LARGEST = 127
OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
# In plain errors by which PyTorch says it: of the host, of libraries of CUDA, and of other accelerators.
_NO_MEMORY = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the host or the device has no memory left."""
    plain = isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    return plain or isinstance(error, OUT_OF_MEMORY)


@contextmanager
def raise_memory_errors() -> Iterator[None]:
    """Raise ``MemoryError`` for a ``RuntimeError`` by which torch says that memory is full; pass others on."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, OUT_OF_MEMORY) or not is_out_of_memory(error):
            raise
        raise MemoryError(str(error)) from error


@dataclass(frozen=True, eq=False)
class PackedKV:
    """The KV of consecutive tokens, and the states of the model behind some of them. Never mutated.

    The names of its tensors: ``0.keys`` and ``0.values`` [B, H, N, D] of layer 0 and so on, and for 8 bits
    ``0.keys.scales`` and ``0.values.scales`` [B, H, N, 1]. Names in a state behind 7 tokens begin with ``7@``.
    """

    tensors: Mapping[str, torch.Tensor]
    dtype: torch.dtype  # in which the model takes KV
    homes: Homes  # where it does

    @classmethod
    @raise_memory_errors()
    def pack(
        cls,
        layers: Sequence[LayerKV],
        bits: int | None = None,
        start: int = 0,
        checkpoints: Mapping[int, State] | None = None,
    ) -> PackedKV:
        """Pack the tokens of ``layers`` from ``start`` on, rounded if ``bits`` is 8, and the states behind them.

        Unrounded, they share memory if they are all that lies there, else they are copied, so that the rest can be
        freed. States are never rounded, and share memory.
        """
        tensors: dict[str, torch.Tensor] = {}
        for index, layer in enumerate(layers):
            for name, tensor in zip((_KEYS, _VALUES), layer, strict=True):
                part = tensor[:, :, start:]
                tensors |= _quantize(f"{index}.{name}", part) if bits == 8 else {f"{index}.{name}": part}
        tensors |= copy_all({name: part for name, part in tensors.items() if not owns_memory(part)})
        for at, state in (checkpoints or {}).items():
            tensors |= _name_state(at - start, state) if at > start else {}
        first = next((layer.keys for layer in layers if layer.keys.numel()), layers[0].keys)
        return cls(tensors, first.dtype, Homes.find(layers, checkpoints or {}))

    @cached_property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return self.tensors[f"0.{_KEYS}"].shape[2]

    @cached_property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @cached_property
    def is_rounded(self) -> bool:
        """Whether this KV is in 8 bits."""
        return any(name.endswith(_SCALES) for name in self.tensors)

    @cached_property
    def num_layers(self) -> int:
        """Number of layers of the model."""
        return sum(name.endswith(f".{_KEYS}") for name in self.tensors)

    def layer(self, index: int) -> LayerKV:
        """Return keys and values [B, H, N, D] on the layer's device; 8 bits are expanded to the model's dtype."""
        return LayerKV(self._unpack(f"{index}.{_KEYS}"), self._unpack(f"{index}.{_VALUES}"))

    @cached_property
    def checkpoints(self) -> Mapping[int, State]:
        """The states, by the number of its tokens before each."""
        found: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in self.tensors.items():
            at, is_state, rest = name.partition(STATE_MARK)
            if is_state:
                found.setdefault(int(at), {})[rest] = tensor
        return found

    def add_checkpoints(self, checkpoints: Mapping[int, State]) -> PackedKV:
        """Return this KV with the states of ``checkpoints`` as well, moved to where this KV lies."""
        lies_on = self.tensors[f"0.{_KEYS}"].device
        homes = self.homes if lies_on == self.homes.devices[0] else Homes((lies_on,))
        more = {name: part for at, state in checkpoints.items() for name, part in _name_state(at, state).items()}
        more = {name: part.to(homes.get(name)) for name, part in more.items()}
        return replace(self, tensors={**self.tensors, **more})

    def copy_part(self, start: int, stop: int) -> PackedKV:
        """Return a copy of the tokens from ``start`` to ``stop`` (exclusive), or raise one of ``OUT_OF_MEMORY``.

        States behind these tokens are shared, not copied.
        """
        return self._take(start, stop, lambda tensor: tensor[:, :, start:stop], copy_all)

    def view_part(self, start: int, stop: int) -> PackedKV:
        """Return the tokens from ``start`` to ``stop`` (exclusive), sharing memory with this KV."""
        return self._take(start, stop, lambda tensor: tensor[:, :, start:stop])

    @property
    def pins(self) -> bool:
        """Whether host memory for this KV is pinned: the model is on CUDA."""
        return self.homes.on_cuda

    @raise_memory_errors()
    def move_to(self, homes: Homes | torch.device) -> PackedKV:
        """Return this KV at ``homes``, copied only if it lies elsewhere. Host memory is pinned for a model on CUDA."""
        homes = Homes.of(homes)
        if homes == HOST and self.pins and not all(tensor.is_pinned() for tensor in self.tensors.values()):
            return self._copy_to_pinned()
        there = {name: homes.get(name) for name, tensor in self.tensors.items() if tensor.ndim}
        moved = {name: self.tensors[name].to(on, non_blocking=on.type != "cpu") for name, on in there.items()}
        return replace(self, tensors={**self.tensors, **moved})

    @classmethod
    def join(cls, parts: Sequence[PackedKV]) -> PackedKV:
        """Return a copy of all ``parts``, at least one, one behind the other."""
        names = [name for name in parts[0].tensors if STATE_MARK not in name]
        tensors = {name: torch.cat([part.tensors[name] for part in parts], dim=2) for name in names}
        start = 0
        for part in parts:
            for at, state in part.checkpoints.items():
                tensors |= _name_state(start + at, state)
            start += part.num_tokens
        return replace(parts[0], tensors=tensors)

    def _copy_to_pinned(self) -> PackedKV:
        """Return a copy in pinned host memory, all of it there: the host waits once for each device."""
        rooms = make_rooms(self.tensors, pinned=True)
        last = {tensor.device: name for name, tensor in self.tensors.items()}  # which waits for those before it
        for name, tensor in self.tensors.items():
            rooms[name].copy_(tensor, non_blocking=last[tensor.device] != name)
        return replace(self, tensors=rooms)

    def keep_states(self, start: int, stop: int) -> PackedKV:
        """Return this KV, which is tokens ``start`` to ``stop`` (exclusive) of a whole, with the states behind these.

        Before, it has the states of the whole.
        """
        return self._take(start, stop, lambda tensor: tensor)

    @raise_memory_errors()
    def _take(
        self,
        start: int,
        stop: int,
        cut: Callable[[torch.Tensor], torch.Tensor],
        change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = dict,
    ) -> PackedKV:
        """Return the tokens from ``start`` to ``stop`` as ``cut`` and ``change`` make them, and the states behind."""
        tensors = change({name: cut(tensor) for name, tensor in self.tensors.items() if STATE_MARK not in name})
        for at, state in self.checkpoints.items():
            tensors |= _name_state(at - start, state) if start < at <= stop else {}
        return replace(self, tensors=tensors)

    def _unpack(self, name: str) -> torch.Tensor:
        """Return a tensor on its layer's device; 8-bit numbers times their scales, in the model's dtype."""
        device = self.homes.get(name)
        stored = self.tensors[name].to(device, non_blocking=True)
        scales = self.tensors.get(f"{name}.{_SCALES}")
        if scales is None:
            return stored
        return (stored.float() * scales.to(device, non_blocking=True).float()).to(self.dtype)


def _name_state(at: int, state: State) -> dict[str, torch.Tensor]:
    return {f"{at}{STATE_MARK}{name}": tensor for name, tensor in state.items()}


def make_if_room(make: Callable[[], PackedKV]) -> PackedKV | None:
    """Return what ``make`` returns. If memory runs out, log a trouble and return None."""
    try:
        return make()
    except OUT_OF_MEMORY:
        log_trouble("out_of_memory")
        return None


def _quantize(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return 8-bit numbers [B, H, N, D] as ``name``, and their scales [B, H, N, 1] as ``name.scales``."""
    if not tensor.shape[-1]:  # no KV per token
        return {name: tensor}
    largest = tensor.float().abs().amax(dim=-1, keepdim=True)
    scales = (largest / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    rounded = (tensor.float() / scales).round().to(torch.int8)
    return {name: rounded, f"{name}.{_SCALES}": scales}


def write_references(path: Path, references: Sequence[Reference], fingerprint: str) -> int:
    """Write ``references`` to ``path`` and return how many: readers see the old file or the new one, never a part.

    Renames a temporary beside it. Replaces a link, not what it points to. Asserts that no reference is tainted. Raises
    ``StoreWriteError`` if the file cannot be written; the old one stays, and nothing else is left.
    """
    assert not any(reference.is_tainted for reference in references), "approximate KV is never written"
    tensors = {f"{n}.ids": torch.from_numpy(reference.token_ids) for n, reference in enumerate(references)}
    for n, reference in enumerate(references):
        for index, layer in enumerate(reference.layers):
            tensors[f"{n}.{index}.keys"], tensors[f"{n}.{index}.values"] = (t.contiguous().cpu() for t in layer)
        for at, state in reference.checkpoints.items():
            tensors |= {
                f"{n}.{name}": tensor.cpu().clone() for name, tensor in _name_state(at, state).items()
            }  # unshared
    entries = [_make_header(reference) for reference in references]
    metadata = make_metadata({"version": FORMAT_VERSION, "fingerprint": fingerprint, "entries": entries}, tensors)
    try:
        _write(path, tensors, metadata)
    except (OSError, SafetensorError, ValueError) as error:
        raise StoreWriteError(f"{path} could not be written: {error}") from error
    return len(references)


def _make_header(reference: Reference) -> dict[str, Any]:
    own = {"namespace": reference.namespace, "layers": len(reference.layers), "rounded": reference.rounded}
    return own | pack_labels(reference)


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Make the folder, save a temporary there that only its owner may read, and rename it. Delete it if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".semsharekv.")  # owner-only permissions
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.chmod(temporary, 0o600)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_references(path: Path, fingerprint: str, homes: Homes | torch.device) -> list[Reference]:
    """Verify the file's version, fingerprint and digest, and return its references, with KV at ``homes``.

    Raises ``StoreFileError`` if the file is missing, damaged, of another format version or of another model, and
    ``torch.OutOfMemoryError`` if a device is full.
    """
    if path.exists() and not path.is_file():
        raise StoreFileError(f"{path} is not a readable KV file: it is a folder, or no file at all")
    try:
        with TensorFile(open(path, "rb", buffering=0), path.stat().st_size) as file:
            if not file.is_sealed:
                file.verify()
            _require_same(path, "version", file.header["version"], _READABLE)
            _require_same(path, "model fingerprint", file.header["fingerprint"], (fingerprint,))
            tensors = dict(file.load(lambda _, form: torch.empty(form.shape, dtype=form.dtype), checks=file.is_sealed))
            return [_read(tensors, n, entry, Homes.of(homes)) for n, entry in enumerate(file.header["entries"])]
    except torch.OutOfMemoryError:  # of the device
        raise
    except (OSError, RuntimeError, MemoryError) as error:
        raise StoreFileError(f"{path} cannot be read: {error}") from error
    except (DamageError, AttributeError, KeyError, ValueError, TypeError) as error:
        raise StoreFileError(f"{path} is not a readable KV file: {error}") from error


def _require_same(path: Path, name: str, found: object, accepted: tuple[object, ...]) -> None:
    if found not in accepted:
        wanted = " or ".join(map(repr, reversed(accepted)))
        raise StoreFileError(f"{path} has {name} {found!r}; accepted is {wanted}")


def _require_sound(n: int, entry: dict[str, Any], token_ids: TokenIds) -> None:
    """Raise ``ValueError`` for values that no store writes: a right digest does not rule them out."""
    as_record = EntryRecord(str(n), entry["namespace"], str(n), entry, 0.0, 0.0)
    if not (has_token_ids(token_ids) and is_whole(entry["layers"], 1) and is_sound(as_record)):
        raise ValueError(f"entry {n} has values of a wrong kind")
    if any(stop > len(token_ids) for _, _, stop in entry["segments"]):
        raise ValueError(f"entry {n} has segments beyond its tokens")


def _read(tensors: Mapping[str, torch.Tensor], n: int, entry: dict[str, Any], homes: Homes) -> Reference:
    """Return reference ``n`` of a file's tensors, at ``homes``. Raises ``ValueError`` if it is unsound or misfits."""
    token_ids = tensors[f"{n}.ids"].numpy().astype(np.int64)
    _require_sound(n, entry, token_ids)
    # one after another, as a file can say that it has any number of layers
    names = ((f"{index}.{_KEYS}", f"{index}.{_VALUES}") for index in range(entry["layers"]))
    layers = tuple(LayerKV(*(tensors[f"{n}.{name}"].to(homes.get(name)) for name in both)) for both in names)
    if any(tensor.ndim != 4 or tensor.shape[2] != len(token_ids) for layer in layers for tensor in layer):
        raise ValueError(f"entry {n} has KV for another number of tokens than it has ids")
    checkpoints: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        place, is_state, rest = name.partition(STATE_MARK)
        entry_number, _, at = place.partition(".")
        if is_state and entry_number == str(n):
            checkpoints.setdefault(int(at), {})[rest] = tensor.to(homes.get(rest))
    return replace(unpack_reference(entry, entry["namespace"], token_ids, layers), checkpoints=checkpoints)
