"""Re-rotated keys equal keys computed at the new place, for every rope type and pairing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semsharekv_integrations.errors import UnsupportedModelError
from semsharekv_integrations.kv import LayerKV, Rotation, rotate
from semsharekv_integrations.model.adapter import ModelAdapter
from semsharekv_integrations.model.rotations import find_rotations
from tiny_models import ARCHITECTURES, make_model

VOCAB, SHIFT = 99, 57
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
}

INTERLEAVED = {"cohere"}  # rope that turns neighbouring numbers together, not those half a head apart


def ids_of(num_tokens: int = 20) -> np.ndarray:
    return np.random.default_rng(3).integers(3, VOCAB, num_tokens)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *sorted(INTERLEAVED - ARCHITECTURES.keys())])
def test_moved_keys_are_those_of_the_new_place(architecture: str) -> None:
    adapter = ModelAdapter(make_model(architecture, VOCAB), "identical")
    here, there = (adapter.compute_kv(ids_of(), start) for start in (0, SHIFT))
    rotations = find_rotations(adapter.model, adapter.config, here, there, SHIFT)
    elsewhere = adapter.compute_kv(ids_of(), 3 * SHIFT)
    for index, (rotation, of_values) in enumerate(rotations):
        assert rotation is not None and of_values is None
        assert rotation.interleaved == (architecture in INTERLEAVED)
        moved = rotate(here[index].keys, torch.full((20,), 3 * SHIFT), rotation)
        torch.testing.assert_close(moved, elsewhere[index].keys, atol=1e-4, rtol=1e-3)
        assert not torch.allclose(here[index].keys, elsewhere[index].keys, atol=1e-2)


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_every_rope_type_turns_by_its_own_frequencies(rope: dict[str, Any]) -> None:
    adapter = ModelAdapter(make_model("llama", VOCAB, rope_parameters=rope), "identical")
    here, there = (adapter.compute_kv(ids_of(), start) for start in (0, SHIFT))
    for index, (rotation, _) in enumerate(find_rotations(adapter.model, adapter.config, here, there, SHIFT)):
        assert rotation is not None
        back = rotate(there[index].keys, torch.full((20,), -SHIFT), rotation)
        torch.testing.assert_close(back, here[index].keys, atol=1e-4, rtol=1e-3)


def test_kv_within_the_stable_positions_is_the_same_behind_any_longer_text() -> None:
    adapter = ModelAdapter(
        make_model("llama", VOCAB, rope_parameters=ROPES["dynamic"], max_position_embeddings=24), "off"
    )
    assert adapter.stable_positions is not None
    ids = ids_of(adapter.stable_positions)
    before = adapter.compute_kv(ids, 0)
    adapter.prefill(ids_of(60))
    for layer, known in zip(adapter.compute_kv(ids, 0), before, strict=True):
        torch.testing.assert_close(layer.keys, known.keys)


def test_layer_0_is_exact_for_an_identical_token_behind_another_context() -> None:
    adapter = ModelAdapter(make_model("llama", VOCAB), "identical")
    here, there = (adapter.compute_kv(ids_of(), start) for start in (0, SHIFT))
    rotation = find_rotations(adapter.model, adapter.config, here, there, SHIFT)[0].keys
    assert rotation is not None
    changed = np.concatenate([ids_of()[::-1], ids_of()])
    whole = adapter.compute_kv(changed, 0)
    moved = rotate(here[0].keys, torch.full((20,), 20), rotation)
    torch.testing.assert_close(moved, whole[0].keys[:, :, 20:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(here[0].values, whole[0].values[:, :, 20:], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(here[1].values, whole[1].values[:, :, 20:], atol=1e-2)


def test_partial_rotary_leaves_the_other_dimensions() -> None:
    rotation = Rotation(torch.tensor([1.0, 0.1]))
    keys = torch.randn(1, 2, 5, 7)
    moved = rotate(keys, torch.arange(5), rotation)
    assert torch.equal(moved[..., 4:], keys[..., 4:])
    assert torch.equal(moved[:, :, 0], keys[:, :, 0])
    assert not torch.allclose(moved[:, :, 1:, :4], keys[:, :, 1:, :4])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("start", [0, 6])
@pytest.mark.parametrize("part", LayerKV._fields)
def test_what_turns_is_found_wherever_it_stands(part: str, start: int, backwards: bool, interleaved: bool) -> None:
    """First or last in the head, in halves or neighbours, either way; in keys, or in what latent attention keeps."""
    model = make_model("llama", VOCAB, head_dim=10)
    own = model.model.rotary_emb.inv_freq
    rotation = Rotation(-own if backwards else own, interleaved, start)
    here = LayerKV(*torch.randn(2, 1, 3, 20, 10 + start, generator=torch.Generator().manual_seed(5)))
    moved = rotate(getattr(here, part), torch.full((20,), SHIFT), rotation)
    (found,) = find_rotations(model, model.config, [here], [here._replace(**{part: moved})], SHIFT)
    turning = getattr(found, part)
    assert (turning.start, turning.interleaved) == (start, interleaved)
    torch.testing.assert_close(turning.inverse_frequencies, rotation.inverse_frequencies)
    assert sum(each is not None for each in found) == 1


def test_scaled_frequencies_are_never_taken_for_those_of_the_formula() -> None:
    """Where slow pairs alone are scaled, a short probe cannot tell; far away they differ."""
    model = make_model("llama", VOCAB, rope_parameters={"rope_type": "default", "rope_theta": 1e14}, head_dim=16)
    own = model.model.rotary_emb
    own.inv_freq[-1] *= 0.5
    own.original_inv_freq[-1] *= 0.5
    adapter = ModelAdapter(model, "identical")
    here, there = (adapter.compute_kv(ids_of(), start) for start in (0, SHIFT))
    for rotation, _ in find_rotations(model, adapter.config, here, there, SHIFT):
        assert rotation is not None and torch.equal(rotation.inverse_frequencies, own.inv_freq)


@given(st.integers(-5000, 5000), st.integers(-5000, 5000), st.booleans())
def test_rotations_add_up_and_keep_norms(first: int, second: int, interleaved: bool) -> None:
    rotation = Rotation(torch.tensor([1.0, 0.3, 0.01, 0.0005]), interleaved)
    keys = torch.linspace(-1, 1, 24).view(1, 3, 1, 8)
    one, other, both = (torch.tensor([shift]) for shift in (first, second, first + second))
    moved = rotate(rotate(keys, one, rotation), other, rotation)
    torch.testing.assert_close(moved, rotate(keys, both, rotation), atol=3e-3, rtol=0)
    torch.testing.assert_close(moved.norm(dim=-1), keys.norm(dim=-1))


def test_half_precision_keys_are_turned_in_float32() -> None:
    rotation = Rotation(torch.tensor([1.0, 0.3]))
    keys = torch.randn(1, 1, 1, 4)
    moved = rotate(keys.bfloat16(), torch.tensor([3001]), rotation)
    assert moved.dtype == torch.bfloat16
    torch.testing.assert_close(
        moved.float(), rotate(keys.bfloat16().float(), torch.tensor([3001]), rotation), atol=8e-3, rtol=8e-3
    )


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_learned_positions_are_refused(architecture: str) -> None:
    adapter = ModelAdapter(make_model(architecture, VOCAB), "identical")
    here, there = (adapter.compute_kv(ids_of(), start) for start in (0, SHIFT))
    with pytest.raises(UnsupportedModelError, match="layer 0: keys at another position"):
        find_rotations(adapter.model, adapter.config, here, there, SHIFT)
