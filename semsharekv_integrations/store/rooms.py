"""Room for KV that is read from a file or moved: on the model's device, or in host memory.

CUDA copies fastest from and to pinned host memory, and without the host waiting. PyTorch rounds up what is pinned to a
power of two, each tensor for itself. So the tensors of one piece of KV share slabs whose sizes are such powers, and
fill them nearly to the brim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from semsharekv_integrations.store.homes import HOST, Homes

_CPU = torch.device("cpu")
_ALIGNED_BYTES = 64
_FULL_SHARE = 7 / 8  # of a slab, from which on it holds all that is left
_COPIED_BYTES = 1 << 28  # of a slab that copies on a device share


def make_rooms(forms: Mapping[str, torch.Tensor], *, pinned: bool) -> dict[str, torch.Tensor]:
    """Return a contiguous tensor in host memory of the shape and dtype of each of ``forms``, with any content.

    Where nothing more can be pinned, what is left is not.
    """
    if not pinned:
        return {name: torch.empty(form.shape, dtype=form.dtype) for name, form in forms.items()}
    sizes = [-(-form.numel() * form.element_size() // _ALIGNED_BYTES) * _ALIGNED_BYTES for form in forms.values()]
    names, first, rooms = list(forms), 0, {}
    for slab_bytes, count in plan_slabs(sizes):
        slab, at = _make_slab(slab_bytes, pinned=True), 0
        for name, size in zip(names[first : first + count], sizes[first : first + count], strict=True):
            rooms[name] = _shape(slab[at:], forms[name])
            at += size
        first += count
    return rooms


def copy_all(parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return copies of ``parts``, which hold no more memory than they need.

    On an accelerator, where each copy costs a launch, those of one form are copied together, and share slabs.
    """
    alike: dict[tuple[torch.device, torch.dtype, torch.Size], list[str]] = {}
    for name, part in parts.items():
        alike.setdefault((part.device, part.dtype, part.shape), []).append(name)
    copies = {}
    for (device, _, _), names in alike.items():
        size = max(1, parts[names[0]].nbytes)
        most = 1 if device == _CPU else max(1, _COPIED_BYTES // size)
        for chosen in (names[at : at + most] for at in range(0, len(names), most)):
            if len(chosen) == 1:
                copies[chosen[0]] = parts[chosen[0]].clone()
            else:
                together = torch.cat([parts[name] for name in chosen])  # [B of all, H, N, D]
                copies |= zip(chosen, together.split(len(parts[chosen[0]])), strict=True)
    return {name: copies[name] for name in parts}


def owns_memory(tensor: torch.Tensor) -> bool:
    """Return whether no memory beside that of ``tensor`` stays as long as it does."""
    return tensor.untyped_storage().nbytes() == tensor.nbytes


def plan_slabs(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return slabs for tensors of these sizes, in order: bytes of each, a power of two, and how many it holds.

    A slab is the largest that the rest fills, or one that holds all of the rest and is nearly full.
    """
    slabs, at, rest = [], 0, sum(sizes)
    while at < len(sizes):
        slab = _round_up(rest)
        if rest < _FULL_SHARE * slab:
            slab = max(slab // 2, _round_up(sizes[at]))
        first, room = at, slab
        while at < len(sizes) and sizes[at] <= room:
            room -= sizes[at]
            at += 1
        rest -= slab - room
        slabs.append((slab, at - first))
    return slabs


class Landing:
    """Where the tensors of a file go.

    ``get`` returns what each is read into, and ``move`` what becomes of it: itself in host memory, else a copy on the
    device, to which it is on its way when ``move`` returns. Tensors without dimensions stay in host memory.

    Args:
        forms: of all tensors, by name.
        homes: where to.
        pinned: whether host memory is pinned, for a model on CUDA.
    """

    def __init__(self, forms: Mapping[str, torch.Tensor], homes: Homes, *, pinned: bool) -> None:
        self._homes = homes
        self._pinned = pinned
        self._rooms = make_rooms(forms, pinned=pinned) if homes == HOST else {}

    def get(self, name: str, form: torch.Tensor) -> torch.Tensor:
        """Return a contiguous tensor on the CPU of the shape and dtype of ``form``."""
        if name in self._rooms:
            return self._rooms[name]
        if not form.ndim:
            return torch.empty((), dtype=form.dtype)
        return _shape(_make_slab(_round_up(form.numel() * form.element_size()), pinned=self._pinned), form)

    def move(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor, which has its content by now, where it goes."""
        return tensor.to(self._homes.get(name), non_blocking=True) if tensor.ndim else tensor


def _round_up(num_bytes: int) -> int:
    """Return the least power of two that is not less."""
    return 1 << max(num_bytes - 1, 0).bit_length()


def _make_slab(num_bytes: int, *, pinned: bool) -> torch.Tensor:
    if pinned:
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:  # no more memory can be pinned
            pass
    return torch.empty(num_bytes, dtype=torch.uint8)


def _shape(slab: torch.Tensor, form: torch.Tensor) -> torch.Tensor:
    """Return the beginning of ``slab`` [N] as a tensor of the shape and dtype of ``form``."""
    return slab[: form.numel() * form.element_size()].view(form.dtype).view(form.shape)
