"""Token matching: rotation as transformers does it, order in matches, and hashing against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from probes import measure_lsh_recall
from semsharekv_integrations.reuse.matching import (
    compute_paper_similarity,
    find_nearest_tokens,
    measure_hamming_distance,
    rotate_embeddings,
)

HIDDEN, PAIRS, LEFT_OVER = 70, 8, 6  # four heads of width 16, and six dimensions left over
FREQUENCIES = 1.0 / 10_000 ** (torch.arange(PAIRS) / PAIRS)
VOCABULARY = torch.randn(200, HIDDEN, generator=torch.Generator().manual_seed(1))


def zipf_ids(num_tokens: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).zipf(1.3, num_tokens * 4)[:num_tokens] % len(VOCABULARY)


def cache_of(ids: np.ndarray, *, rotated: bool = True) -> torch.Tensor:
    plain = VOCABULARY[torch.from_numpy(ids)]
    return rotate_embeddings(plain, torch.arange(len(ids)), FREQUENCIES) if rotated else plain


def edited(ids: np.ndarray) -> np.ndarray:
    """A quarter of the tokens replaced."""
    rng = np.random.default_rng(5)
    return np.where(rng.random(len(ids)) < 0.25, rng.integers(0, len(VOCABULARY), len(ids)), ids)


def test_rotation_is_that_of_transformers() -> None:
    embeddings = VOCABULARY[:11]
    positions = torch.tensor([0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 400])
    angles = torch.cat([positions[:, None] * FREQUENCIES] * 2, dim=-1)[None]  # [1, T, 2R]
    heads = embeddings[:, :-LEFT_OVER].reshape(1, 11, 4, 2 * PAIRS).transpose(1, 2)
    expected, _ = apply_rotary_pos_emb(heads, heads, angles.cos(), angles.sin())
    rotated = rotate_embeddings(embeddings, positions, FREQUENCIES)
    torch.testing.assert_close(rotated[:, :-LEFT_OVER], expected[0].transpose(0, 1).reshape(11, -1))
    assert torch.equal(rotated[:, -LEFT_OVER:], embeddings[:, -LEFT_OVER:])
    assert torch.equal(rotated[0], embeddings[0])
    assert not torch.allclose(rotated[1], embeddings[1])


def test_rotation_leaves_norms_and_its_input_alone_and_is_float32() -> None:
    embeddings = VOCABULARY.bfloat16()
    before = embeddings.clone()
    rotated = rotate_embeddings(embeddings, torch.arange(len(embeddings)), FREQUENCIES)
    assert rotated.dtype == torch.float32
    torch.testing.assert_close(rotated.norm(dim=1), embeddings.float().norm(dim=1))
    assert torch.equal(embeddings, before)


def test_embeddings_narrower_than_a_head_are_refused() -> None:
    with pytest.raises(ValueError, match="15 wide; accepted is 16"):
        rotate_embeddings(VOCABULARY[:, :15], torch.arange(200), FREQUENCIES)


@pytest.mark.parametrize("bits", [None, 256])
def test_rotation_finds_the_repeated_word_in_its_place(bits: int | None) -> None:
    ids = np.array([7, 1, 2, 7, 3, 4, 7, 5, 6, 7, 8])
    with_order = find_nearest_tokens(cache_of(ids), cache_of(ids), bits=bits)
    assert with_order.positions.tolist() == list(range(11))
    without = find_nearest_tokens(cache_of(ids, rotated=False), cache_of(ids, rotated=False), bits=bits)
    assert without.positions[ids == 7].tolist() == [0, 0, 0, 0]
    assert np.allclose(without.cosine, 1, atol=1e-6)


@pytest.mark.parametrize("bits", [None, 64, 1024])
def test_identical_text_matches_itself(bits: int | None) -> None:
    cache = cache_of(zipf_ids(150, seed=2))
    found = find_nearest_tokens(cache, cache, bits=bits)
    assert found.positions.dtype == np.int64 and found.cosine.dtype == np.float32
    assert found.positions.tolist() == list(range(150))
    assert np.allclose(found.cosine, 1, atol=1e-6) and found.cosine.max() <= 1


def test_the_cosine_is_that_of_the_match() -> None:
    target, reference = cache_of(zipf_ids(60, seed=3)), cache_of(zipf_ids(90, seed=4))
    for bits in (None, 32):
        found = find_nearest_tokens(target * 3, reference, bits=bits)
        expected = torch.cosine_similarity(target, reference[torch.from_numpy(found.positions)])
        assert np.allclose(found.cosine, expected.numpy(), atol=1e-5)


def test_recall_is_high_and_grows_with_bits_and_candidates() -> None:
    ids = zipf_ids(700, seed=6)
    target, reference = cache_of(edited(ids)), cache_of(ids)
    recalls = [measure_lsh_recall(target, reference, bits=bits, candidates=1) for bits in (8, 64, 256)]
    assert recalls == sorted(recalls) and recalls[0] < 0.5 < 0.75 < recalls[-1]
    assert measure_lsh_recall(target, reference, bits=256) > max(0.9, recalls[-1])
    assert measure_lsh_recall(target, reference, bits=64, candidates=len(ids)) == 1


def test_matches_are_the_same_every_time() -> None:
    target, reference = cache_of(zipf_ids(200, seed=7)), cache_of(zipf_ids(200, seed=8))
    for bits in (None, 64):
        first, second = (find_nearest_tokens(target, reference, bits=bits) for _ in range(2))
        assert np.array_equal(first.positions, second.positions) and np.array_equal(first.cosine, second.cosine)


def test_a_search_leaves_nothing_behind_for_the_next() -> None:
    reference, other = cache_of(zipf_ids(50, seed=9)), cache_of(zipf_ids(80, seed=10))
    before = find_nearest_tokens(other[:20], reference, bits=64)
    find_nearest_tokens(other, other, bits=64)
    after = find_nearest_tokens(other[:20], reference, bits=64)
    assert np.array_equal(before.positions, after.positions) and after.positions.max() < 50


def test_brute_force_in_blocks_is_brute_force_at_once() -> None:
    target, reference = cache_of(zipf_ids(1100, seed=11)), cache_of(zipf_ids(30, seed=12))
    whole = (torch.nn.functional.normalize(target) @ torch.nn.functional.normalize(reference).T).max(dim=1)
    found = find_nearest_tokens(target, reference)
    assert len(found.positions) == 1100
    assert np.allclose(found.cosine, whole.values.numpy(), atol=1e-5)


def test_small_inputs() -> None:
    cache = cache_of(zipf_ids(5, seed=13))
    assert find_nearest_tokens(cache, cache[:1], bits=64).positions.tolist() == [0] * 5  # fewer tokens than candidates
    for bits in (None, 64):
        assert len(find_nearest_tokens(cache[:0], cache, bits=bits).positions) == 0
        with pytest.raises(ValueError, match="reference has 0 tokens"):
            find_nearest_tokens(cache, cache[:0], bits=bits)


def test_the_papers_similarity_falls_from_alike_to_unrelated() -> None:
    ids = zipf_ids(120, seed=14)
    same, near = (measure_hamming_distance(cache_of(other), cache_of(ids)) for other in (ids, edited(ids)))
    opposite = measure_hamming_distance(-cache_of(ids)[:1], cache_of(ids)[:1])
    assert same == 0 < near < 30 < opposite
    assert [compute_paper_similarity(d) for d in (0, 15, 30, 64)] == [1, 0.5, 0, 0]
