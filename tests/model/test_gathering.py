"""Gathered KV is the stored KV, token by token, turned to its place: however it is stored, and however it is copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from semsharekv_integrations.config import ReuseConfig
from semsharekv_integrations.kv import (
    LayerKV,
    LayerRotation,
    PiecedLayers,
    PrefixMatch,
    Reference,
    Rotation,
    Run,
    rotate,
)
from semsharekv_integrations.model import gathering
from semsharekv_integrations.model.gathering import gather
from semsharekv_integrations.model.transfers import send, send_together
from semsharekv_integrations.reuse.plan import Borrowing, ReusePlan, build_plan
from semsharekv_integrations.store.codec import PackedKV
from simulated_device import count

NUM_LAYERS, NUM_TOKENS, WIDTH = 5, 61, 12
FREQUENCIES = 100.0 ** -(torch.arange(6) / 6)
PARTIAL = 100.0 ** -(torch.arange(4) / 4)
ROTATIONS = {  # what keys turn by, and values
    "halves": LayerRotation(Rotation(FREQUENCIES)),
    "neighbours": LayerRotation(Rotation(FREQUENCIES, interleaved=True)),
    "first numbers": LayerRotation(Rotation(PARTIAL)),
    "last numbers, as of latent keys": LayerRotation(None, Rotation(PARTIAL, start=4)),
    "neighbours among the last": LayerRotation(Rotation(PARTIAL, interleaved=True, start=4)),
    "none": LayerRotation(),
}
WAYS = {"copied": (0, 1 << 28), "picked": (1 << 60, 1 << 28), "picked layer by layer": (1 << 60, 1)}


def make_layers(
    seed: int,
    num_tokens: int,
    widths: tuple[int, int] = (WIDTH, WIDTH),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[LayerKV, ...]:
    random = torch.Generator().manual_seed(seed)

    def make(width: int) -> torch.Tensor:
        return torch.randn(1, 2, num_tokens, width, generator=random).to(device, dtype)

    return tuple(LayerKV(*map(make, widths)) for _ in range(NUM_LAYERS))


def make_reference(name: str, layers: Sequence[LayerKV], num_tokens: int, cuts: Sequence[int] = ()) -> Reference:
    """A reference whose KV lies in pieces that end at ``cuts``; in no pieces without any."""
    if cuts:
        ends = zip([0, *cuts], [*cuts, num_tokens], strict=True)
        pieces = [PackedKV.pack(layers).copy_part(start, stop) for start, stop in ends]
        layers = PiecedLayers(pieces, len(layers))
    return Reference(name, "n", np.arange(num_tokens), layers)


def make_plan(prefix: Reference, first: Reference, second: Reference) -> ReusePlan:
    """A prefix; a run of either reference; tokens of the second one here and there; some without a source."""
    runs = [Run(12, first, 20, 15), Run(29, second, 3, 11)]
    scattered = Borrowing(second, np.array([42, 44, 45, 50]), np.array([30, 9, 50, 10]), np.ones(4, dtype=bool))
    question = np.arange(NUM_TOKENS) >= NUM_TOKENS - 4
    rules = ReuseConfig(mode="identical")
    return build_plan(np.arange(NUM_TOKENS), PrefixMatch(prefix, 9), runs, [scattered], question, rules, NUM_LAYERS)


def compute_expected(plan: ReusePlan, rotations: Sequence[LayerRotation]) -> list[LayerKV]:
    """Token by token."""
    found = []
    for index, rotation in enumerate(rotations):
        parts = []
        for kind, turning in enumerate(rotation):
            like = plan.borrowings[0].reference.layers[index][kind]
            whole = torch.zeros(*like.shape[:2], len(plan.token_ids), like.shape[3], dtype=like.dtype)
            assert plan.prefix is not None
            whole[:, :, :9] = plan.prefix.reference.layers[index][kind][:, :, :9]
            for borrowing in plan.borrowings:
                for target, source in zip(borrowing.targets, borrowing.sources, strict=True):
                    token = borrowing.reference.layers[index][kind][:, :, source : source + 1]
                    if turning is not None and plan.rotate_keys:
                        token = rotate(token, torch.tensor([target - source]), turning)
                    whole[:, :, target : target + 1] = token
            parts.append(whole)
        found.append(LayerKV(*parts))
    return found


def assert_gathers(plan: ReusePlan, rotations: Sequence[LayerRotation]) -> None:
    for layer, wanted in zip(gather(plan, rotations).layers, compute_expected(plan, rotations), strict=True):
        for found, expected in zip((layer.keys, layer.values), wanted, strict=True):
            assert found.shape == expected.shape and found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5 if found.dtype == torch.float32 else 1e-2)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in zip(("_STRETCH_BYTES", "_GROUP_BYTES"), WAYS[request.param], strict=True):
        monkeypatch.setattr(gathering, name, value)
    return request.param


@pytest.mark.parametrize("turning", ROTATIONS)
def test_every_token_comes_from_its_source_and_is_turned_to_its_place(way: str, turning: str) -> None:
    prefix, first, second = make_layers(1, 30), make_layers(2, 40), make_layers(3, 55)
    plan = make_plan(
        make_reference("p", prefix, 30, (4, 10)),
        make_reference("f", first, 40, (5, 25, 33)),
        make_reference("s", second, 55),
    )
    assert_gathers(plan, [ROTATIONS[turning]] * NUM_LAYERS)
    assert_gathers(replace(plan, rotate_keys=False), [ROTATIONS[turning]] * NUM_LAYERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("widths", [(WIDTH, WIDTH), (WIDTH, 5), (WIDTH, 0)])
def test_layers_of_any_size_that_turn_in_different_ways_are_gathered(
    way: str, widths: tuple[int, int], dtype: torch.dtype
) -> None:
    prefix, first, second = (make_layers(seed, 55, widths, dtype) for seed in (1, 2, 3))
    one, other = ROTATIONS["halves"], ROTATIONS["neighbours"]
    plan = make_plan(*(make_reference(str(seed), layers, 55) for seed, layers in enumerate((prefix, first, second))))
    assert_gathers(plan, [one, one, other, LayerRotation(), one])


def test_layers_without_kv_stay_empty(way: str) -> None:
    def empty_last(layers: Sequence[LayerKV]) -> list[LayerKV]:
        return [*layers[:-1], LayerKV(*(torch.empty(1, 0, 55, 0) for _ in range(2)))]

    references = [make_reference(str(seed), empty_last(make_layers(seed, 55)), 55) for seed in (1, 2, 3)]
    assert_gathers(make_plan(*references), [*[ROTATIONS["halves"]] * (NUM_LAYERS - 1), LayerRotation()])


def test_references_are_only_read(way: str) -> None:
    kept = [make_layers(seed, 55) for seed in (1, 2, 3)]
    before = [[tensor.clone() for layer in layers for tensor in layer] for layers in kept]
    plan = make_plan(*(make_reference(str(seed), layers, 55) for seed, layers in enumerate(kept)))
    for layer in gather(plan, [ROTATIONS["halves"]] * NUM_LAYERS).layers:
        layer.keys.zero_()
        layer.values.zero_()
    for layers, tensors in zip(kept, before, strict=True):
        assert all(map(torch.equal, (tensor for layer in layers for tensor in layer), tensors))


def test_a_device_gets_the_plan_once_and_few_launches(pretended_device: str) -> None:
    def make(device: str) -> ReusePlan:
        layers = (make_layers(seed, 55, device=device) for seed in (1, 2, 3))
        return make_plan(*(make_reference(str(n), each, 55, (11, 23)) for n, each in enumerate(layers)))

    plan, rotations = make(pretended_device), [ROTATIONS["halves"]] * NUM_LAYERS
    gather(plan, rotations)  # frequencies go there once for all calls
    counted = count(lambda: gather(plan, rotations))
    assert counted.waits == 0 and counted.launches <= 6 * NUM_LAYERS, counted.table()
    for layer, wanted in zip(counted.result.layers, compute_expected(make("cpu"), rotations), strict=True):
        torch.testing.assert_close(layer.keys.cpu(), wanted.keys)
        torch.testing.assert_close(layer.values.cpu(), wanted.values)


@pytest.mark.parametrize("widths", [(WIDTH, WIDTH), (WIDTH, 5)])
def test_layers_that_differ_are_gathered_apart_on_a_device(pretended_device: str, widths: tuple[int, int]) -> None:
    one, other = ROTATIONS["halves"], ROTATIONS["neighbours"]

    def make(device: str) -> ReusePlan:
        references = []
        for seed in (1, 2, 3):
            layers = [*make_layers(seed, 55, device=device)[:3], *make_layers(seed + 9, 55, widths, device=device)[:2]]
            references.append(make_reference(str(seed), layers, 55))
        return make_plan(*references)

    rotations = [one, one, other, other, one]
    found, wanted = gather(make(pretended_device), rotations).layers, compute_expected(make("cpu"), rotations)
    for layer, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(layer.keys.cpu(), expected.keys)
        torch.testing.assert_close(layer.values.cpu(), expected.values)


def test_the_host_does_not_wait_for_what_it_sends(pretended_device: str) -> None:
    arrays = np.arange(5), np.arange(0), np.arange(3) * 7
    device = torch.device(pretended_device)
    counted = count(lambda: send_together(arrays, device))
    assert counted.waits == 0
    for found, wanted in zip(counted.result, arrays, strict=True):
        assert found.device == device and found.tolist() == wanted.tolist()
    values = np.ones(3)
    sent = send(values, device)
    values[:] = 2
    assert sent.tolist() == [1, 1, 1]
