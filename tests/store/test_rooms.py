"""Pinned memory: what is asked for is a power of two already, and little more than the KV needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semsharekv_integrations.kv import LayerKV
from semsharekv_integrations.store.codec import PackedKV
from semsharekv_integrations.store.homes import HOST, Homes
from semsharekv_integrations.store.rooms import make_rooms, plan_slabs


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=200))
def test_slabs_hold_all_and_are_powers_of_two(sizes: list[int]) -> None:
    slabs, at = plan_slabs(sizes), 0
    for slab_bytes, count in slabs:
        assert count > 0 and slab_bytes & (slab_bytes - 1) == 0
        assert sum(sizes[at : at + count]) <= slab_bytes
        at += count
    assert at == len(sizes)


@pytest.mark.parametrize("layers", [16, 24, 32, 80])
def test_little_more_is_asked_for_than_is_needed(layers: int) -> None:
    """Each tensor for itself would be rounded up to half as much again, and to twice as much at worst."""
    for num_tokens in (1000, 4994, 16_500):
        sizes = [num_tokens * 8 * 128 * 2] * (2 * layers)
        asked = sum(slab_bytes for slab_bytes, _ in plan_slabs(sizes))
        assert asked <= 1.15 * sum(sizes), num_tokens
    sizes = [1030 * 8 * 128 * 2] * (2 * layers)
    apart = sum(1 << (size - 1).bit_length() for size in sizes)
    assert sum(slab_bytes for slab_bytes, _ in plan_slabs(sizes)) < 0.6 * apart


def test_rooms_are_apart_and_of_the_form_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    empty = torch.empty

    def pinned(*size: Any, **options: Any) -> torch.Tensor:
        if options.pop("pin_memory", False):
            asked.append(size[0])
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", pinned)
    forms = {
        f"{n}": torch.zeros(shape, dtype=dtype)
        for n, (shape, dtype) in enumerate(
            [((1, 2, 7, 5), torch.bfloat16), ((1, 2, 7, 1), torch.float32), ((3,), torch.int8), ((), torch.int64)] * 3
        )
    }
    rooms = make_rooms(forms, pinned=True)
    assert all(size & (size - 1) == 0 for size in asked) and len(asked) < len(forms)
    for n, (name, room) in enumerate(rooms.items()):
        assert (room.shape, room.dtype) == (forms[name].shape, forms[name].dtype) and room.is_contiguous()
        room.fill_(n)
    assert all(bool((room == n).all()) for n, room in enumerate(rooms.values())), "none overlaps another"


def test_kv_goes_down_to_pinned_slabs_and_back_on_a_pretended_device(pretended_device: str) -> None:
    layers = [LayerKV(*torch.randn(2, 1, 2, 9, 4).unbind()) for _ in range(3)]
    there = [LayerKV(*(tensor.to(pretended_device) for tensor in layer)) for layer in layers]
    packed = PackedKV.pack(there)
    down = packed.move_to(HOST)
    assert all(tensor.device.type == "cpu" for tensor in down.tensors.values())
    up = down.move_to(packed.homes)
    assert packed.homes == up.homes != Homes.of(HOST)
    for index, layer in enumerate(layers):
        for found, served, wanted in zip(up.layer(index), down.layer(index), layer, strict=True):
            assert found.device.type == served.device.type == "cuda"
            assert torch.equal(found.cpu(), wanted) and torch.equal(served.cpu(), wanted)
