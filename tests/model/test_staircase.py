"""Attention of rows on a CPU without masks but for steps: the same as with one mask, and what is cut covers all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from semsharekv_integrations.config import ReuseConfig
from semsharekv_integrations.kv import Reference, Run
from semsharekv_integrations.model import attention, staircase
from semsharekv_integrations.model.adapter import ModelAdapter
from semsharekv_integrations.model.selective import SelectivePrefill
from semsharekv_integrations.model.sight import Rows, Sight
from semsharekv_integrations.model.staircase import attend_by_steps, can_attend, cut_stairs
from semsharekv_integrations.model.views import Window, find_unseen
from semsharekv_integrations.reuse.plan import build_plan
from tiny_models import make_model

NUM_TOKENS = 700
rows_of_prompts = st.sets(st.integers(0, NUM_TOKENS - 1), min_size=1, max_size=600).map(sorted).map(np.array)


def sight_of(positions: np.ndarray, window: Window | None = None) -> Sight:
    return Sight(Rows(positions, torch.from_numpy(positions)), NUM_TOKENS, window)


@given(rows_of_prompts)
def test_every_row_meets_every_key_that_it_sees_once(positions: np.ndarray) -> None:
    seen = ~find_unseen(torch.from_numpy(positions), NUM_TOKENS, None)
    met = torch.zeros(seen.shape, dtype=torch.int64)
    ends = np.zeros(len(positions), dtype=np.int64)
    for start, stop, num_keys, first_key, sees_all in cut_stairs(sight_of(positions)):
        assert (ends[start:stop] == first_key).all(), "by ascending keys, and none left out"
        ends[start:stop] = num_keys
        met[start:stop, first_key:num_keys] += 1
        assert not sees_all or seen[start:stop, first_key:num_keys].all()
    assert (met[seen] == 1).all()
    assert int((met > 0).sum() - seen.sum()) <= len(positions) * NUM_TOKENS, "steps alone hold what is hidden"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(rows_of_prompts, st.integers(0, 3))
def test_the_same_as_with_one_mask(dtype: torch.dtype, positions: np.ndarray, seed: int) -> None:
    source, seen = torch.Generator().manual_seed(seed), sight_of(positions)
    query = torch.randn(1, len(positions), 6, 16, generator=source).to(dtype).transpose(1, 2)
    key, value = (torch.randn(1, 2, NUM_TOKENS, 16, generator=source).to(dtype) for _ in range(2))
    found = attend_by_steps(query, key, value, seen, 0.3)
    keys, values = (each.float().repeat_interleave(3, 1) for each in (key, value))
    mask = seen.get_whole_mask(torch.float32, query.device)
    wanted = scaled_dot_product_attention(query.float(), keys, values, mask, scale=0.3).transpose(1, 2)
    assert found.dtype == dtype and found.is_contiguous()
    torch.testing.assert_close(found.float(), wanted, atol=1e-5 if dtype == torch.float32 else 3e-2, rtol=1e-3)


def test_what_it_does_not_take() -> None:
    rows = np.arange(staircase.FEWEST_ROWS)
    query, key = torch.zeros(1, 4, len(rows), 16), torch.zeros(1, 2, NUM_TOKENS, 16)
    assert can_attend(query, key, key, sight_of(rows))
    assert not can_attend(query, key, key, sight_of(rows, Window(9)))
    assert not can_attend(query, key, key, sight_of(rows[1:]))
    assert not can_attend(query, key, key[..., :8], sight_of(rows)), "values of another size, as in latent attention"
    assert not can_attend(query.to("meta"), key, key, sight_of(rows))


def test_a_selective_pass_gives_the_same_by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ModelAdapter(make_model("llama", 99), "identical")
    selective, random = SelectivePrefill(adapter), np.random.default_rng(0)
    stored = random.integers(3, 99, 150)
    token_ids = np.concatenate([random.integers(3, 99, 160), stored[10:140], random.integers(3, 99, 110)])
    run = Run(160, Reference("r", "n", stored, adapter.read_layers(adapter.prefill(stored).cache)), 10, 130)
    rules = ReuseConfig(mode="identical", max_deviation=100.0)
    plan = build_plan(token_ids, None, [run], [], np.arange(400) >= 392, rules, 3)
    by_blocks, used = selective.run(plan), []

    def attend(*given, **more):
        used.append(given[0].shape[2])
        return attend_by_steps(*given, **more)

    monkeypatch.setattr(staircase, "FEWEST_ROWS", 1)
    monkeypatch.setattr(attention, "attend_by_steps", attend)
    by_steps = selective.run(plan)
    assert used == [int(by_steps.computed.sum())] * 3
    torch.testing.assert_close(by_steps.prefill.logits, by_blocks.prefill.logits, atol=1e-4, rtol=1e-3)
