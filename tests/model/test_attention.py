"""Attention in blocks of rows: the same results as without blocks, and the model's attention is put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from semsharekv_integrations.config import ReuseConfig
from semsharekv_integrations.kv import PrefixMatch, Reference, Run, TokenIds
from semsharekv_integrations.model import attention, sight, staircase
from semsharekv_integrations.model.adapter import ModelAdapter, Prefill
from semsharekv_integrations.model.attention import blocked_attention
from semsharekv_integrations.model.selective import SelectivePrefill
from semsharekv_integrations.model.sight import ROWS_PER_BLOCK, ROWS_PER_LAUNCH, Rows, Sight, blocks_of
from semsharekv_integrations.model.views import Window, find_unseen, list_windows
from semsharekv_integrations.reuse.plan import ReusePlan, build_plan
from tiny_models import make_model

VOCAB, NUM_TOKENS, PREFIX_TOKENS, NUM_LAYERS = 99, 400, 90, 3
Shape = tuple[int, int]  # rows, keys


@pytest.fixture(params=["llama", "gemma3_text"])
def adapter(request: pytest.FixtureRequest) -> ModelAdapter:
    mixed = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    changes = mixed if request.param == "gemma3_text" else {}
    return ModelAdapter(make_model(request.param, VOCAB, **changes), "identical")


def ids_of(seed: int, num_tokens: int = NUM_TOKENS) -> TokenIds:
    return np.random.default_rng(seed).integers(3, VOCAB, num_tokens)


def reference_of(adapter: ModelAdapter, token_ids: TokenIds) -> Reference:
    return Reference("r", "n", token_ids, adapter.read_layers(adapter.prefill(token_ids).cache))


def selective_plan(adapter: ModelAdapter, full_layers: int) -> ReusePlan:
    """All but 130 tokens must be computed at every layer; those stood elsewhere in their reference."""
    stored = ids_of(1, 150)
    token_ids = np.concatenate([ids_of(2, 160), stored[10:140], ids_of(3, 110)])
    rules = ReuseConfig(
        mode="identical", full_layers=full_layers, deviation_ratio=0.2 * full_layers, max_deviation=100.0
    )
    question = np.arange(NUM_TOKENS) >= NUM_TOKENS - 8
    run = Run(160, reference_of(adapter, stored), 10, 130)
    return build_plan(token_ids, None, [run], [], question, rules, NUM_LAYERS)


def blocks_and_none(compute: Callable[[], Prefill]) -> tuple[Prefill, Prefill, list[Shape]]:
    """With blocks, without them, and the shapes of the blocks."""
    shapes: list[Shape] = []

    def counted(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shapes.append((query.shape[2], key.shape[2]))
        return scaled_dot_product_attention(query, key, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "scaled_dot_product_attention", counted)
        patch.setattr(staircase, "FEWEST_ROWS", 10**9)
        blocked, seen = compute(), list(shapes)
        patch.setattr(sight, "ROWS_PER_BLOCK", 10**9)
        whole = compute()
    assert len({keys for _, keys in shapes[len(seen) :]}) <= 1, "no blocks are used"
    return blocked, whole, seen


def assert_same(one: Prefill, other: Prefill) -> None:
    torch.testing.assert_close(one.logits, other.logits, atol=1e-4, rtol=1e-3)
    assert_same_cache(one.cache, other.cache)


def assert_same_cache(one: DynamicCache, other: DynamicCache) -> None:
    for first, second in zip(one.layers, other.layers, strict=True):
        torch.testing.assert_close(first.keys, second.keys, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(first.values, second.values, atol=1e-4, rtol=1e-3)


def test_behind_a_prefix(adapter: ModelAdapter) -> None:
    token_ids = ids_of(1)
    prefix = PrefixMatch(reference_of(adapter, token_ids[: PREFIX_TOKENS + 7]), PREFIX_TOKENS)
    blocked, whole, shapes = blocks_and_none(lambda: adapter.prefill(token_ids, prefix))
    assert_same(blocked, whole)
    assert_same(blocked, adapter.prefill(token_ids))
    blocks = blocks_of(np.arange(PREFIX_TOKENS, NUM_TOKENS))
    assert len(blocks) == 3
    assert shapes == [(block.stop - block.start, block.num_keys) for block in blocks] * NUM_LAYERS
    assert adapter.config._attn_implementation == "sdpa", "as it was"


@pytest.mark.parametrize("full_layers", [0, 1])
def test_rows_picked_from_a_prompt(adapter: ModelAdapter, full_layers: int) -> None:
    selective, plan = SelectivePrefill(adapter), selective_plan(adapter, full_layers)
    assert int(plan.must.sum()) > 200
    outcomes = []

    def compute() -> Prefill:
        outcomes.append(selective.run(plan))
        return outcomes[-1].prefill

    blocked, whole, shapes = blocks_and_none(compute)
    assert_same(blocked, whole)
    assert [np.array_equal(outcome.computed, outcomes[0].computed) for outcome in outcomes] == [True, True]
    assert outcomes[0].fell_back is None and outcomes[0].deviation == pytest.approx(
        outcomes[1].deviation, rel=1e-3, abs=1e-6
    )
    last_rows = int(outcomes[0].computed.sum())
    last_layer, windows = shapes[-len(blocks_of(np.arange(last_rows))) :], list_windows(adapter.config)
    assert sum(keys == NUM_TOKENS for _, keys in shapes) == windows.count(None), "their last blocks see all"
    assert sum(rows for rows, _ in last_layer) == last_rows
    assert max(rows for rows, _ in shapes) < 200 and min(keys for _, keys in shapes) < NUM_TOKENS / 2
    values, fresh = (p.cache.layers[-1].values for p in (blocked, adapter.prefill(plan.token_ids)))
    assert not torch.allclose(values, fresh, atol=1e-2), "something was borrowed"
    assert adapter.config._attn_implementation == "sdpa", "as it was"


@pytest.mark.parametrize("what", ["prefix", "rows"])
def test_attention_is_put_back_after_an_error(adapter: ModelAdapter, what: str) -> None:
    selective, plan = SelectivePrefill(adapter), selective_plan(adapter, 1)
    prefix = PrefixMatch(reference_of(adapter, plan.token_ids[:PREFIX_TOKENS]), PREFIX_TOKENS)

    def compute() -> Prefill:
        return adapter.prefill(plan.token_ids, prefix) if what == "prefix" else selective.run(plan).prefill

    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("out of memory")

    wanted, full = compute(), adapter.prefill(plan.token_ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "scaled_dot_product_attention", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            compute()
    assert adapter.config._attn_implementation == "sdpa"
    assert_same(adapter.prefill(plan.token_ids), full)
    assert_same(compute(), wanted)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_only_sdpa_is_replaced(implementation: str) -> None:
    config = make_model("llama", VOCAB).config
    config._attn_implementation = implementation
    inside = []

    def fail() -> None:
        with blocked_attention(config):
            inside.append(config._attn_implementation)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (inside == [implementation]) == (implementation == "eager")
    assert config._attn_implementation == implementation


windows = st.none() | st.builds(Window, st.integers(1, 300), st.booleans())


@given(st.sets(st.integers(0, 2000), min_size=1, max_size=900).map(sorted), windows, st.sampled_from(["cpu", "cuda"]))
def test_blocks_cover_all_rows_and_the_keys_they_see(positions: list[int], window: Window | None, kind: str) -> None:
    rows = np.array(positions)
    blocks = blocks_of(rows, kind, window)
    assert [row for start, stop, *_ in blocks for row in range(start, stop)] == list(range(len(rows)))
    seen = ~find_unseen(torch.from_numpy(rows), 2001, window)
    for start, stop, num_keys, first_key, _ in blocks:
        assert len(blocks) == 1 or stop - start >= (ROWS_PER_BLOCK if kind == "cpu" else ROWS_PER_LAUNCH)
        keys = seen[start:stop].any(0).nonzero()
        assert (int(keys.min()), int(keys.max()) + 1) == (first_key, num_keys), "no fewer, and no more"


@pytest.mark.parametrize("kept_bytes", [0, 10**9])
@given(st.sets(st.integers(0, 400), min_size=1, max_size=390).map(sorted), windows, st.booleans())
def test_masks_of_blocks_are_parts_of_the_whole_mask(
    kept_bytes: int, positions: list[int], window: Window | None, hides: bool
) -> None:
    rows, device = np.array(positions), torch.device("cpu")
    hidden = torch.arange(401) % 3 == 1 if hides else None
    seen = Sight(Rows(rows, torch.from_numpy(rows)), 401, window, hidden)
    whole = Sight(seen.rows, 401, window, hidden).get_whole_mask(torch.float32, device)
    assert whole.shape == (1, 1, len(rows), 401)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sight, "ROWS_PER_BLOCK", 50)
        patch.setattr(sight, "MOST_KEPT_BYTES", kept_bytes)
        for block in seen.blocks:
            start, stop, num_keys, first_key, _ = block
            mask, again = (seen.get_mask(block, torch.float32, device) for _ in range(2))
            assert torch.equal(mask, whole[:, :, start:stop, first_key:num_keys])
            assert (mask is again) == (kept_bytes > 0), "kept for other layers only where there is room"


def _laid_out_by_rows(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """As CUDA's kernels return it: the same values, heads behind rows in memory."""
    return scaled_dot_product_attention(query, *args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)


def test_the_memory_layout_of_attention_changes_nothing(adapter: ModelAdapter, monkeypatch) -> None:
    selective = SelectivePrefill(adapter)
    plan = selective_plan(adapter, 1)
    wanted = selective.run(plan).prefill.logits
    monkeypatch.setattr(attention, "scaled_dot_product_attention", _laid_out_by_rows)
    torch.testing.assert_close(SelectivePrefill(adapter).run(plan).prefill.logits, wanted)
