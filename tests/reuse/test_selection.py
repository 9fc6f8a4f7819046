"""Budgets are kept, nested and filled by the most urgent tokens; the schedule never grows."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from semsharekv_integrations.reuse.selection import (
    Signal,
    measure_deviation,
    measure_reading,
    rank_tokens,
    spread_shares,
)

shares = st.floats(0, 1)


@given(st.integers(1, 40), shares, shares)
def test_shares_decay_from_first_to_last_by_one_factor(num_layers: int, one: float, other: float) -> None:
    first, last = max(one, other), min(one, other)
    decay = spread_shares(num_layers, first, last)
    assert len(decay) == num_layers and decay[0] == first
    assert all(0 <= later <= earlier + 1e-12 for earlier, later in pairwise(decay))
    if num_layers > 1 and last > 1e-6:
        assert math.isclose(decay[-1], last, rel_tol=1e-6)
        factors = [later / earlier for earlier, later in pairwise(decay)]
        assert max(factors) - min(factors) < 1e-6


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5), st.booleans()), min_size=1, max_size=40),
    st.integers(0, 50),
    st.integers(0, 50),
    shares,
    shares,
)
def test_budgets_are_kept_and_nested(
    tokens: list[tuple[float, float, bool]], first_quota: int, second_quota: int, one: float, other: float
) -> None:
    first, second = torch.tensor([t[0] for t in tokens]), torch.tensor([t[1] for t in tokens])
    eligible = torch.tensor([t[2] for t in tokens])
    priority = rank_tokens([Signal(first, first_quota), Signal(second, second_quota)], eligible)
    larger, smaller = (priority < share for share in (max(one, other), min(one, other)))
    assert not (smaller & ~larger).any(), "nested"
    assert not (larger & ~eligible).any(), "only eligible ones"
    budget = sum(math.ceil(max(one, other) * quota) for quota in (first_quota, second_quota))
    assert larger.sum() <= budget
    whole = priority < 1.0
    if first_quota and eligible.any():
        assert first[whole].max() == first[eligible].max(), "the most urgent is in"
    if first_quota + second_quota == 0:
        assert not whole.any()


def test_each_signal_selects_its_own_most_urgent() -> None:
    attention, deviations = torch.tensor([9.0, 1, 2, 3, 0]), torch.tensor([0.0, 1, 2, 9, 8])
    eligible = torch.tensor([True, True, True, True, False])
    priority = rank_tokens([Signal(attention, 1), Signal(deviations, 1)], eligible)
    assert (priority < 1.0).tolist() == [True, False, False, True, False]


def test_deviation_is_zero_for_equal_kv_and_counts_values_beside_large_keys() -> None:
    keys, values = torch.randn(1, 2, 6, 4) * 100, torch.randn(1, 2, 6, 4)
    assert torch.equal(measure_deviation((keys, values), (keys, values)), torch.zeros(6))
    changed = values.clone()
    changed[:, :, 3] = -changed[:, :, 3]
    scores = measure_deviation((keys, values), (keys, changed))
    assert scores.argmax() == 3 and scores[3] > 0.5
    assert scores.count_nonzero() == 1


def test_what_is_read_of_a_token_is_its_attention_times_the_norm_of_its_value() -> None:
    attention = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])  # [heads, T]
    values = torch.tensor(
        [[[[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [2.0, 0.0], [0.0, 2.0]]]]
    )  # [B, H, T, D]
    expected = torch.tensor([0.5 * 5 + 0.1 * 5 + 1.0, 0.0, 0.25 + 0.1 + 2.0]) / 4
    assert torch.allclose(measure_reading(attention, values), expected)
