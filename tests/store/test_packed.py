"""KV as it lies in memory: parts and copies are exact, eight bits are close and small."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semsharekv_integrations.kv import LayerKV
from semsharekv_integrations.store.codec import OUT_OF_MEMORY, PackedKV
from simulated_device import count

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layers_of(num_tokens: int = 7, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[LayerKV]:
    made = torch.randn(3, 2, 1, 2, num_tokens, 8, generator=torch.Generator().manual_seed(seed))
    return [LayerKV(*(tensor.to(dtype).clone() for tensor in both)) for both in made]


def assert_same(packed: PackedKV, layers: list[LayerKV], start: int = 0, stop: int | None = None) -> None:
    for index, layer in enumerate(layers):
        for found, wanted in zip(packed.layer(index), layer, strict=True):
            assert torch.equal(found, wanted[:, :, start:stop]) and found.dtype == wanted.dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacked_kv_is_the_models_own(dtype: torch.dtype) -> None:
    layers = layers_of(dtype=dtype)
    packed = PackedKV.pack(layers)
    assert_same(packed, layers)
    assert packed.layer(0).keys.data_ptr() == layers[0].keys.data_ptr(), "not copied"
    assert (packed.num_tokens, packed.num_layers) == (7, 3)
    assert packed.num_bytes == sum(t.numel() * t.element_size() for layer in layers for t in layer)


@pytest.mark.parametrize("bits", [None, 8])
def test_parts_are_exact_and_free_what_they_leave(bits: int | None) -> None:
    layers = layers_of()
    packed = PackedKV.pack(layers, bits)
    whole = [packed.layer(n) for n in range(3)]
    for start, stop in ((0, 3), (3, 7), (2, 5)):
        assert_same(packed.copy_part(start, stop), whole, start, stop)
        assert_same(packed.view_part(start, stop), whole, start, stop)
        for tensor in packed.copy_part(start, stop).tensors.values():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert packed.copy_part(0, 3).num_bytes + packed.copy_part(3, 7).num_bytes == packed.num_bytes
    assert packed.view_part(0, 3).tensors["0.keys"].data_ptr() == packed.tensors["0.keys"].data_ptr()


@pytest.mark.parametrize("bits", [None, 8])
def test_what_is_taken_from_a_token_on_needs_no_more_memory_than_that(bits: int | None) -> None:
    layers = layers_of()
    packed = PackedKV.pack(layers, bits, start=4)
    assert_same(packed, [PackedKV.pack(layers, bits).layer(n) for n in range(3)], 4)
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in packed.tensors.values())


@pytest.mark.parametrize("bits", [None, 8])
def test_what_is_there_already_is_not_copied(bits: int | None) -> None:
    packed = PackedKV.pack(layers_of(), bits)
    moved = packed.move_to(CPU)
    assert_same(moved, [packed.layer(n) for n in range(3)])
    assert moved.tensors["0.keys"].data_ptr() == packed.tensors["0.keys"].data_ptr(), "it is there already"


@given(st.integers(0, 9), st.sampled_from(DTYPES), st.sampled_from([1e-30, 1e-3, 1.0, 1e3]))
def test_eight_bits_are_off_by_half_a_step_at_most(seed: int, dtype: torch.dtype, size: float) -> None:
    layers = [LayerKV(*((tensor.float() * size).to(dtype) for tensor in layer)) for layer in layers_of(seed=seed)]
    packed = PackedKV.pack(layers, 8)
    for index, layer in enumerate(layers):
        for found, wanted in zip(packed.layer(index), layer, strict=True):
            assert found.dtype == dtype and found.shape == wanted.shape and found.isfinite().all()
            step = wanted.float().abs().amax(dim=-1, keepdim=True) / 127
            rounding = torch.finfo(dtype).eps * wanted.float().abs() + torch.finfo(dtype).tiny
            assert ((found.float() - wanted.float()).abs() <= 0.501 * step + rounding).all()


def test_eight_bits_of_one_token_do_not_depend_on_others() -> None:
    """So what a large key in one place loses, no other place does, and a prompt's beginning is what it was."""
    layers = layers_of()
    spiked = [LayerKV(layer.keys.clone(), layer.values) for layer in layers]
    for layer in spiked:
        layer.keys[:, 0, 3] *= 1000
    for index in range(3):
        one, other = PackedKV.pack(layers, 8).layer(index).keys, PackedKV.pack(spiked, 8).layer(index).keys
        same = torch.ones(one.shape[:3], dtype=torch.bool)
        same[:, 0, 3] = False
        assert torch.equal(one[same], other[same]) and not torch.equal(one, other)


def test_eight_bits_take_about_half_the_bytes_of_half_precision() -> None:
    made = torch.zeros(2, 1, 4, 10, 128, dtype=torch.bfloat16)
    plain, packed = (PackedKV.pack([LayerKV(*made)], bits).num_bytes for bits in (None, 8))
    assert packed == plain / 2 * (1 + 4 / 128)


def test_zeros_stay_zeros() -> None:
    zeros = [LayerKV(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))]
    assert not any(tensor.any() for tensor in PackedKV.pack(zeros, 8).layer(0))


CHANGES: dict[str, Callable[[list[LayerKV], PackedKV], object]] = {
    "packing": lambda layers, _: PackedKV.pack(layers, start=1),
    "moving": lambda _, packed: packed.move_to(CPU),
    "dividing": lambda _, packed: packed.copy_part(0, 3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_full_host_is_out_of_memory_too(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch raises a plain error then, which only its text tells from others."""
    layers = layers_of()
    packed = PackedKV.pack(layers)
    with pytest.raises(RuntimeError) as full:
        torch.empty(2**50, dtype=torch.uint8)
    for error, wanted in ((full.value, OUT_OF_MEMORY), (RuntimeError("another"), RuntimeError)):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "to", fail)
            patch.setattr(torch.Tensor, "clone", fail)
            with pytest.raises(wanted):
                CHANGES[change](layers, packed)


def test_a_device_copies_all_layers_at_once(pretended_device: str) -> None:
    layers = [LayerKV(*(tensor.to(pretended_device) for tensor in layer)) for layer in layers_of()]
    packed = PackedKV.pack(layers)
    for copy, wanted in ((lambda: packed.copy_part(2, 5), (2, 5)), (lambda: PackedKV.pack(layers, start=4), (4, 7))):
        counted = count(copy)
        assert counted.waits == 0 and counted.launches == 1, counted.table()
        for index, layer in enumerate(layers_of()):
            for found, expected in zip(counted.result.layer(index), layer, strict=True):
                assert torch.equal(found.cpu(), expected[:, :, slice(*wanted)])
    written = [tensor.clone() for tensor in packed.tensors.values()]
    for tensor in packed.copy_part(0, 7).tensors.values():
        tensor.zero_()
    assert all(map(torch.equal, packed.tensors.values(), written))
