"""Tensors that claim to be on an accelerator and are computed on the CPU, and what each operation on them costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from simulated.trace import find_line, is_traced, note, note_wait

_types = ("cuda",)
pinned: Any = WeakIdKeyDictionary()  # tensors on the host that are pinned
# Kernels for one call where it is not one, roughly as in ATen's CUDA sources
_LAUNCHES = {
    "nonzero": 3,
    "sort": 4,
    "argsort": 4,
    "topk": 3,
    "multinomial": 6,
    "masked_select": 4,
    "unique": 6,
    "linalg_eigh": 30,
    "isin": 3,
    "_linalg_eigh": 30,
    "index_bool": 4,
}
_NO_LAUNCH = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "detach", "alias"),
    *("_unsafe_view", "view", "_reshape_alias", "_local_scalar_dense", "is_pinned"),
}
# Operations after which the host waits for the device
_WAITS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"),
    *("is_nonzero", "bincount", "multinomial", "_linalg_eigh", "item", "allclose", "is_same_size_"),
}
_INDEXING = {"index", "_unsafe_index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index_put"}
_TAKES_SCALARS = {"fill_", "masked_fill", "masked_fill_", "where", "clamp"}
_BOOL_INDEX = "boolean mask as index"


class DeviceMismatchError(RuntimeError):
    """Tensors of several devices in one operation, in CUDA's words."""

    def __init__(self, name: str, devices: Sequence[torch.device] | set[torch.device], detail: str = "") -> None:
        found = " and ".join(sorted(map(str, devices)))
        text = "Expected all tensors to be on the same device, but found at least two devices"
        super().__init__(f"{text}, {found}! (in {name}){detail}")


def set_types(types: tuple[str, ...]) -> tuple[str, ...]:
    """Say which types of device are pretended; returns those that were before."""
    global _types
    before, _types = _types, types
    return before


def is_pretended(device: object) -> bool:
    """Whether this names a pretended device."""
    if device is None:
        return False
    try:
        return torch.device(device).type in _types  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        return False


def complete(device: Any) -> torch.device:
    """The device, with index 0 if it has none."""
    found = torch.device(device)
    return found if found.index is not None else torch.device(found.type, 0)


def below_python() -> Any:
    """Inside, operations go past ``__torch_dispatch__``."""
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Python))


class Pretended(torch.Tensor):
    """A tensor that says it is on an accelerator; ``elem`` is where it really is."""

    elem: torch.Tensor

    @staticmethod
    def __new__(cls, elem: torch.Tensor, device: torch.device, requires_grad: bool = False) -> Pretended:
        with torch.inference_mode(elem.is_inference()):  # a view of a normal tensor is one, inside as well
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                elem.size(),
                strides=elem.stride(),
                storage_offset=elem.storage_offset(),
                dtype=elem.dtype,
                device=device,
                requires_grad=requires_grad,
            )
        made.elem = elem
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Pretended({self.device}, {self.elem!r})"

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError("a pretended tensor is not pickled")

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copy: torch.Tensor = Pretended(self.elem.detach().clone(), self.device)
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})


def map_tensors(change: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    """The tree of tuples, lists and dicts with every tensor changed; many times as fast as PyTorch's own."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)([map_tensors(change, part) for part in tree])
    if isinstance(tree, dict):
        return {key: map_tensors(change, part) for key, part in tree.items()}
    return tree


def list_tensors(tree: Any) -> list[torch.Tensor]:
    """Every tensor of the tree."""
    found: list[torch.Tensor] = []
    parts = [tree]
    while parts:
        part = parts.pop()
        if isinstance(part, torch.Tensor):
            found.append(part)
        elif isinstance(part, (tuple, list)):
            parts += part
        elif isinstance(part, dict):
            parts += part.values()
    return found


def unwrap(tree: Any) -> Any:
    """The tensors inside."""
    if isinstance(tree, Pretended):
        return tree.elem
    if isinstance(tree, (tuple, list)):
        return type(tree)([unwrap(part) for part in tree])
    if isinstance(tree, dict):
        return {key: unwrap(part) for key, part in tree.items()} if tree else tree
    return tree


def is_on_cpu(value: object) -> bool:
    """Whether this is a plain tensor."""
    return isinstance(value, torch.Tensor) and not isinstance(value, Pretended)


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.split("::")[-1]
    place = find_line() if is_traced() else ""
    if name in ("_to_copy", "to"):
        kwargs = dict(zip((a.name for a in func._schema.arguments[1:]), args[1:], strict=False)) | kwargs
        if "other" in kwargs:
            kwargs |= {"device": kwargs["other"].device, "dtype": kwargs["other"].dtype}
        options = {"non_blocking": kwargs.get("non_blocking", False), "memory_format": kwargs.get("memory_format")}
        return move(args[0], kwargs.get("device"), kwargs.get("dtype"), **options)
    if name == "copy_":
        return _copy_in(func, args, kwargs, place)
    if torch.Tag.inplace_view in func.tags:  # the shape of what is inside, and of the wrapper
        inner_args, inner_kwargs = unwrap((args, kwargs))
        with below_python():
            func(*inner_args, **inner_kwargs)
        with torch.utils._mode_utils.no_dispatch():
            func(*args, **kwargs)
        return args[0]
    return _compute(func, name, args, kwargs, place)


def _compute(func: Any, name: str, args: tuple, kwargs: dict[str, Any], place: str) -> Any:
    flat = list_tensors((args, kwargs))
    there = [value for value in flat if isinstance(value, Pretended)]
    waits = _check(func, name, args, flat, place)
    device: torch.device | None = there[0].device
    target = kwargs.get("device")
    if target is not None:
        kwargs = kwargs | {"device": "cpu"}
        device = None if torch.device(target).type == "cpu" else complete(target)
    inner_args, inner_kwargs = unwrap((args, kwargs))
    with below_python():
        if name == "histc" and not inner_args[0].is_floating_point():  # CUDA takes integers
            out = func(inner_args[0].float(), *inner_args[1:], **inner_kwargs).to(inner_args[0].dtype)
        else:
            out = func(*inner_args, **inner_kwargs)
    return _finish(func, name, out, there, device, waits, place)


def _check(func: Any, name: str, args: tuple, flat: Sequence[Any], place: str) -> str | None:
    """Raise what CUDA would; returns why the host waits, or None."""
    there = [value for value in flat if isinstance(value, Pretended)]
    on_cpu = [value for value in flat if is_on_cpu(value)]
    devices = {tensor.device for tensor in there}
    is_pointwise = torch.Tag.pointwise in func.tags
    if len(devices) > 1 and name != "index":
        lone = [tensor for tensor in there if tensor.ndim == 0 and is_pointwise]
        if len({tensor.device for tensor in there if not any(tensor is other for other in lone)}) > 1:
            raise DeviceMismatchError(name, devices)
    if name in _INDEXING:
        return _check_index(name, args, place)
    takes_scalars = is_pointwise or name in _TAKES_SCALARS
    wrong = [tensor for tensor in on_cpu if not (tensor.ndim == 0 and takes_scalars)]
    if wrong:
        shapes = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in wrong]
        raise DeviceMismatchError(name, devices | {torch.device("cpu")}, f" CPU tensors: {shapes}")
    return name if name in _WAITS else None


def _check_index(name: str, args: tuple, place: str) -> str | None:
    target, waits = args[0], None
    for index in args[1]:
        if index is None:
            continue
        if isinstance(index, Pretended) and index.device != target.device:
            where = "on the same device as the indexed tensor"
            raise DeviceMismatchError(
                name, {index.device, target.device}, f" indices should be either on cpu or {where}"
            )
        if not isinstance(target, Pretended):
            continue
        if not isinstance(index, Pretended):
            waits = "index tensor on the CPU"
            note("copies", f"to device {place} [index]", index.numel() * index.element_size())
        if index.dtype in (torch.bool, torch.uint8):
            takes_one = name.startswith("index_put") and isinstance(args[2], torch.Tensor) and args[2].numel() == 1
            waits = waits if takes_one else _BOOL_INDEX
    if "index_put" in name:
        values = args[2]
        is_lone = values.ndim == 0 and is_on_cpu(values)
        if isinstance(target, Pretended) != isinstance(values, Pretended) and not is_lone:
            raise DeviceMismatchError(name, {target.device, values.device})
    return waits


def _finish(
    func: Any,
    name: str,
    out: Any,
    there: Sequence[Pretended],
    device: torch.device | None,
    waits: str | None,
    place: str,
) -> Any:
    """Write down what it took, and wrap what came out."""
    aliases = [value.alias_info for value in func._schema.returns if value.alias_info is not None]
    is_view = bool(aliases) and not any(alias.is_write for alias in aliases)
    if is_view and isinstance(out, torch.Tensor):  # reshape and contiguous copy where they must
        storages = {tensor.elem.untyped_storage().data_ptr() for tensor in there}
        is_view = out.untyped_storage().data_ptr() in storages
    if is_traced():
        note("calls", name)
        if waits:
            note_wait(waits, place)
        if not is_view and name not in _NO_LAUNCH:
            note("launches", place, _LAUNCHES.get("index_bool" if waits == _BOOL_INDEX else name, 1))
    known = {id(tensor.elem): tensor for tensor in there}

    def wrap(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in known:
            return known[id(tensor)]
        if device is None:
            return tensor
        if is_traced() and not is_view:
            note_allocation(tensor, place, name)
        return Pretended(tensor, device)

    return map_tensors(wrap, out)


def count_bytes(tensor: torch.Tensor) -> int:
    """Bytes of its values."""
    return tensor.numel() * tensor.element_size()


def note_allocation(tensor: torch.Tensor, place: str, name: str) -> None:
    """Memory was taken on the device."""
    note("allocated", place, count_bytes(tensor), f"{name} {tuple(tensor.shape)} {tensor.dtype}")


def move(
    tensor: torch.Tensor,
    device: Any,
    dtype: torch.dtype | None,
    *,
    non_blocking: bool = False,
    copy: bool = True,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    """The tensor elsewhere or as another dtype; copies between host and device are written down."""
    source = unwrap(tensor)
    here = tensor.device
    there = here if device is None else complete(device) if is_pretended(device) else torch.device(device)
    kind = source.dtype if dtype is None else dtype
    if not copy and here == there and kind == source.dtype:
        return tensor
    options = {} if memory_format is None else {"memory_format": memory_format}
    plain = source.detach() if source.requires_grad else source
    with below_python():
        moved = torch.ops.aten._to_copy.default(plain, dtype=kind, **options)
    if is_traced():
        is_pinned = source in pinned
        _note_move(moved, here, there, is_pinned, is_waiting=not (non_blocking and is_pinned))
    return moved if not is_pretended(there) else Pretended(moved, there)


def _note_move(moved: torch.Tensor, here: torch.device, there: torch.device, is_pinned: bool, is_waiting: bool) -> None:
    place, size = find_line(), count_bytes(moved)
    note("calls", "_to_copy")
    if here == there:
        note("launches", place)
        note_allocation(moved, place, "_to_copy")
    elif here.type == "cpu":
        note("copies", f"to device {place}", size)
        note_allocation(moved, place, "to device")
        if is_waiting:
            note_wait("copy to device" + (", pageable" if not is_pinned else ""), place)
    else:
        note("copies", f"{'to host' if there.type == 'cpu' else 'between devices'} {place}", size)
        if there.type == "cpu":
            note_wait("copy to host", place)


def _copy_in(func: Callable[..., Any], args: tuple, kwargs: dict[str, Any], place: str) -> torch.Tensor:
    target, source = args[0], args[1]
    with below_python():
        func(*unwrap(args), **kwargs)
    if is_traced():
        note("calls", "copy_")
        if target.device == source.device:
            note("launches", place)
        else:
            direction = "to device" if is_pretended(target.device) else "to host"
            note("copies", f"{direction} {place} [copy_]", count_bytes(source))
            if source.numel() and not (args[2:] and args[2]):
                note_wait("copy_ between host and device", place)
    return target
