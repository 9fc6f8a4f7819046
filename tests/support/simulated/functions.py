"""What names a device before any tensor is there: factories, moves, generators, attention."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from simulated.tensors import (
    DeviceMismatchError,
    Pretended,
    complete,
    count_bytes,
    is_on_cpu,
    is_pretended,
    list_tensors,
    map_tensors,
    move,
    note_allocation,
    pinned,
    unwrap,
)
from simulated.trace import find_line, is_traced, note, note_wait

_OF_DATA = {torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor}
_NO_LAUNCH = ("empty", "empty_like", "new_empty", "empty_strided")


class SimulatedGenerator(torch.Generator):
    """A generator that may claim to be on an accelerator."""

    def __new__(cls, device: Any = "cpu") -> SimulatedGenerator:
        made = super().__new__(cls, "cpu")
        made.claimed = complete(device) if is_pretended(device) else torch.device("cpu")
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:
        """Where it claims to be."""
        return self.claimed


class SimulatedFunctions(TorchFunctionMode):
    """Looks at every function of torch for a device that is pretended; the rest goes its way."""

    def __torch_function__(self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _HANDLERS:
            return _HANDLERS[func](*args, **kwargs)
        if func in _OF_DATA and args and not is_on_cpu(args[0]):
            if isinstance(args[0], Pretended):
                return _make_of_tensor(func, *args, **kwargs)
            # a list of numbers, some of them perhaps on the device
            args = (map_tensors(torch.Tensor.item, args[0]), *args[1:])
        if kwargs.get("pin_memory"):  # safetensors, on its way to a device
            return func(*args, **{key: value for key, value in kwargs.items() if key != "pin_memory"})
        if isinstance(kwargs.get("generator"), torch._C.Generator):
            _check_generator(func, args, kwargs)
        if is_pretended(kwargs.get("device")):
            return _make(func, args, kwargs)
        return func(*args, **kwargs)


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    options = {"copy": kwargs.pop("copy", False)}
    other = kwargs.pop("other", None)
    if other is None and args and isinstance(args[0], torch.Tensor):
        other, args = args[0], args[1:]
    if other is not None:
        args = (other.device, other.dtype, *args)
    device, dtype, options["non_blocking"], options["memory_format"] = torch._C._nn._parse_to(*args, **kwargs)
    if isinstance(tensor, Pretended) or is_pretended(device):
        return move(tensor, device, dtype, **options)
    options = {key: value for key, value in options.items() if value is not None}
    return torch.Tensor.to(tensor, device or tensor.device, dtype or tensor.dtype, **options)


def _cuda(tensor: torch.Tensor, device: Any = None, non_blocking: bool = False) -> torch.Tensor:
    return move(tensor, device or "cuda", None, non_blocking=non_blocking, copy=False)


def _pin(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, Pretended):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    if tensor in pinned:
        return tensor
    made = tensor.clone(memory_format=torch.preserve_format)
    pinned[made] = True
    if is_traced():
        note("copies", f"pin (host to host) {find_line()}", count_bytes(made))
    return made


def _is_pinned(tensor: torch.Tensor) -> bool:
    return is_on_cpu(tensor) and tensor in pinned


def _numpy(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    _refuse_numpy(tensor)
    return torch.Tensor.numpy(tensor, *args, **kwargs)


def _array(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    _refuse_numpy(tensor)
    return torch.Tensor.__array__(tensor, *args, **kwargs)


def _refuse_numpy(tensor: torch.Tensor) -> None:
    if isinstance(tensor, Pretended):
        where = f"can't convert {tensor.device} device type tensor to numpy."
        raise TypeError(f"{where} Use Tensor.cpu() to copy the tensor to host memory first.")


def _tolist(tensor: torch.Tensor) -> Any:
    plain = move(tensor, "cpu", None) if isinstance(tensor, Pretended) else tensor
    return torch.Tensor.tolist(plain)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    tensors = [tensor for tensor in (query, key, value, attn_mask) if tensor is not None]
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise DeviceMismatchError("scaled_dot_product_attention", devices)
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        accepted = "Expected attn_mask dtype to be bool or float or to match query dtype"
        raise RuntimeError(f"{accepted}, but got {attn_mask.dtype}")
    if len({tensor.dtype for tensor in (query, key, value)}) > 1:
        raise RuntimeError("Expected query, key, and value to have the same dtype")
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    inner = unwrap((query, key, value, attn_mask))
    out = torch.nn.functional.scaled_dot_product_attention(*inner, **options)
    if not any(isinstance(tensor, Pretended) for tensor in tensors):
        return out
    if is_traced():
        _note_attention(query, key, inner[3], out, is_causal, enable_gqa)
    return Pretended(out, query.device)


def _note_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    is_causal: bool,
    enable_gqa: bool,
) -> None:
    place = find_line()
    is_padded = mask is not None and mask.stride(-2) % 8 != 0
    note("launches", place, 2 if is_padded else 1)
    masked = "no mask" if mask is None else f"mask {mask.dtype}".replace("torch.", "")
    kind = f"{'causal' if is_causal else masked}{', mask copied for alignment' if is_padded else ''}"
    shapes = f"q{tuple(query.shape)} k{tuple(key.shape)}"
    note("attention", f"{place} {shapes} {kind}{' gqa' if enable_gqa else ''}")
    note_allocation(out, place, "sdpa")


def _check_generator(func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    there = [value for value in list_tensors((args, kwargs)) if isinstance(value, Pretended)]
    wanted = there[0].device.type if there else torch.device(kwargs.get("device") or "cpu").type
    found = kwargs["generator"].device.type
    if wanted != found:
        name = getattr(func, "__name__", func)
        text = f"Expected a '{wanted}' device type for generator but found '{found}' (in {name})"
        raise RuntimeError(text)


def _make_of_tensor(func: Any, data: Pretended, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A tensor of a tensor is on its device unless another is named."""
    dtype = kwargs.get("dtype", args[0] if args else None)
    device = kwargs.get("device", args[1] if args[1:] else None)
    return move(data, device, dtype, copy=func is torch.tensor)


def _make(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A factory that names the accelerator."""
    device = complete(kwargs["device"])
    name = getattr(func, "__name__", str(func))
    if func in _OF_DATA and isinstance(args[0] if args else None, torch.Tensor):
        return move(args[0], device, kwargs.get("dtype"), copy=func is torch.tensor)
    inner_args, inner_kwargs = unwrap((args, kwargs | {"device": "cpu"}))
    out = func(*inner_args, **inner_kwargs)
    if is_traced():
        place = find_line()
        note_allocation(out, place, name)
        if func not in _OF_DATA and name != "new_tensor":
            note("launches", place, int(name not in _NO_LAUNCH))
        elif out.numel():
            note("copies", f"to device {place} [factory of data]", count_bytes(out))
            note_wait("copy to device, pageable", place)
    return map_tensors(lambda tensor: Pretended(tensor, device), out)


_HANDLERS = {
    torch.Tensor.to: _to,
    torch.Tensor.cuda: _cuda,
    torch.Tensor.pin_memory: _pin,
    torch.Tensor.is_pinned: _is_pinned,
    torch.Tensor.numpy: _numpy,
    torch.Tensor.__array__: _array,
    torch.Tensor.tolist: _tolist,
    torch.nn.functional.scaled_dot_product_attention: _attend,
}
