"""The selective prefill on tiny random models: what it must equal, and that it keeps to its plan."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from methods import zero_kv
from semsharekv_integrations.config import PRESETS, ReuseConfig
from semsharekv_integrations.errors import UnsupportedModelError
from semsharekv_integrations.kv import PrefixMatch, Reference, Run, TokenIds
from semsharekv_integrations.model.adapter import ModelAdapter
from semsharekv_integrations.model.gathering import gather
from semsharekv_integrations.model.selective import SelectivePrefill
from semsharekv_integrations.model.views import Window
from semsharekv_integrations.reuse.plan import Borrowing, ReusePlan, build_plan, build_prefix_plan
from shapes import UNGUARDED
from tiny_models import ARCHITECTURES, make_model

VOCAB, NUM_TOKENS = 99, 48
MIXTURES = {name: {"intermediate_size": 48, "moe_intermediate_size": 48} for name in ("mixtral", "qwen3_moe", "olmoe")}
KIN: dict[str, dict[str, Any]] = {**ARCHITECTURES, **MIXTURES, "cohere": {}, "starcoder2": {}, "olmo3": {}}
RULES = ReuseConfig(
    mode="identical", attention_ratio=0.2, deviation_ratio=0.2, full_layers=1, final_share=0.3, max_deviation=100.0
)


def selective_of(architecture: str, **changes: Any) -> tuple[ModelAdapter, SelectivePrefill]:
    adapter = ModelAdapter(make_model(architecture, VOCAB, **{**KIN.get(architecture, {}), **changes}), "identical")
    return adapter, SelectivePrefill(adapter)


@pytest.fixture(scope="module")
def llama_selective() -> tuple[ModelAdapter, SelectivePrefill]:
    return selective_of("llama")


def ids_of(seed: int, num_tokens: int = NUM_TOKENS) -> TokenIds:
    return np.random.default_rng(seed).integers(3, VOCAB, num_tokens)


def reference_of(adapter: ModelAdapter, token_ids: TokenIds) -> Reference:
    return Reference("r", "n", token_ids, adapter.read_layers(adapter.prefill(token_ids).cache))


def tail(num_tokens: int, length: int = 4) -> np.ndarray:
    return np.arange(num_tokens) >= num_tokens - length


def plan_of(
    token_ids: TokenIds, runs: Sequence[Run], rules: ReuseConfig = RULES, prefix: PrefixMatch | None = None
) -> ReusePlan:
    return build_plan(token_ids, prefix, runs, [], tail(len(token_ids)), rules, 3)


def moved_plan(adapter: ModelAdapter, rules: ReuseConfig = RULES, prefix_tokens: int = 0) -> ReusePlan:
    """A prompt that shares its middle with a reference, seven tokens further on."""
    stored = ids_of(1)
    token_ids = np.concatenate([ids_of(2, 17), stored[10:40], ids_of(3, 6)])
    prefix = PrefixMatch(reference_of(adapter, token_ids[:prefix_tokens]), prefix_tokens) if prefix_tokens else None
    return plan_of(token_ids, [Run(17, reference_of(adapter, stored), 10, 30)], rules, prefix)


def assert_same_cache(one: DynamicCache, other: DynamicCache) -> None:
    for first, second in zip(one.layers, other.layers, strict=True):
        torch.testing.assert_close(first.keys, second.keys, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(first.values, second.values, atol=1e-4, rtol=1e-3)


def test_keys_stay_as_they_are_stored_where_they_are_not_to_be_turned(
    llama_selective: tuple[ModelAdapter, SelectivePrefill],
) -> None:
    adapter, selective = llama_selective
    turned, left = (
        gather(moved_plan(adapter, replace(RULES, rotate_keys=rotate_keys)), selective.rotations)
        for rotate_keys in (True, False)
    )
    stored = reference_of(adapter, ids_of(1)).layers
    for layer, there, here in zip(stored, turned.layers, left.layers, strict=True):
        assert torch.equal(here.keys[:, :, 17:47], layer.keys[:, :, 10:40])
        assert not torch.allclose(there.keys, here.keys)
        assert torch.equal(there.values, here.values)


@pytest.mark.parametrize("architecture", KIN)
def test_everything_active_equals_a_full_prefill(architecture: str) -> None:
    adapter, selective = selective_of(architecture)
    everything = replace(RULES, boundary_tokens=NUM_TOKENS, edit_tokens=NUM_TOKENS, full_layers=0, deviation_ratio=0.0)
    plan = moved_plan(adapter, everything)
    outcome = selective.run(plan)
    full = adapter.prefill(plan.token_ids)
    torch.testing.assert_close(outcome.prefill.logits, full.logits, atol=1e-4, rtol=1e-3)
    assert_same_cache(outcome.prefill.cache, full.cache)
    assert outcome.computed.all() and outcome.exact_tokens >= len(plan.token_ids)


@pytest.mark.parametrize("architecture", KIN)
@pytest.mark.parametrize("full_layers", [0, 1])
def test_an_unchanged_prompt_equals_a_full_prefill(architecture: str, full_layers: int) -> None:
    adapter, selective = selective_of(architecture)
    token_ids = ids_of(4)
    full = adapter.prefill(token_ids)
    rules = replace(RULES, full_layers=full_layers, deviation_ratio=0.2 * full_layers)
    outcome = selective.run(plan_of(token_ids, [Run(0, reference_of(adapter, token_ids), 0, NUM_TOKENS - 4)], rules))
    torch.testing.assert_close(outcome.prefill.logits, full.logits, atol=1e-4, rtol=1e-3)
    assert_same_cache(outcome.prefill.cache, full.cache)
    assert not outcome.computed.all() and outcome.compute_ratio < 1
    assert (outcome.deviation or 0.0) < 1e-4


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_neox"])
def test_decoding_goes_on_as_behind_a_full_prefill(architecture: str) -> None:
    adapter, selective = selective_of(architecture)
    token_ids = ids_of(4)
    outcome = selective.run(plan_of(token_ids, [Run(0, reference_of(adapter, token_ids), 0, NUM_TOKENS - 4)]))
    full = adapter.prefill(token_ids)
    longer = torch.from_numpy(np.append(token_ids, 7))[None]
    logits, expected = (adapter.decode_step(longer, prefill.cache) for prefill in (outcome.prefill, full))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-3)


def test_borrowed_kv_makes_a_difference_when_the_context_differs(
    llama_selective: tuple[ModelAdapter, SelectivePrefill],
) -> None:
    adapter, selective = llama_selective
    plan = moved_plan(adapter)
    outcome, full = selective.run(plan), adapter.prefill(plan.token_ids)
    assert not torch.allclose(outcome.prefill.logits, full.logits, atol=1e-3)
    assert outcome.deviation is not None and outcome.deviation > 0.01


def test_the_exact_part_ends_at_the_first_borrowed_token(
    llama_selective: tuple[ModelAdapter, SelectivePrefill],
) -> None:
    adapter, selective = llama_selective
    plan = moved_plan(adapter)
    outcome, full = selective.run(plan), adapter.prefill(plan.token_ids)
    exact, boundary = outcome.exact_tokens, RULES.resolve().boundary_tokens
    assert boundary and 17 + boundary <= exact < len(plan.token_ids)
    for layer, expected in zip(outcome.prefill.cache.layers, full.cache.layers, strict=True):
        torch.testing.assert_close(layer.keys[:, :, :exact], expected.keys[:, :, :exact], atol=1e-4, rtol=1e-3)
    last, wanted = outcome.prefill.cache.layers[-1], full.cache.layers[-1]
    assert not torch.allclose(last.values[:, :, exact], wanted.values[:, :, exact], atol=1e-3)


def test_stored_references_are_never_written(llama_selective: tuple[ModelAdapter, SelectivePrefill]) -> None:
    adapter, selective = llama_selective
    plan = moved_plan(adapter, prefix_tokens=5)
    assert plan.prefix is not None
    stored = [plan.prefix.reference, *(b.reference for b in plan.borrowings)]
    before = [[tensor.clone() for layer in reference.layers for tensor in layer] for reference in stored]
    selective.run(plan)
    for reference, tensors in zip(stored, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors, (t for x in reference.layers for t in x), strict=True))


def test_too_much_deviation_ends_as_a_full_prefill(llama_selective: tuple[ModelAdapter, SelectivePrefill]) -> None:
    adapter, selective = llama_selective
    plan = moved_plan(adapter, replace(RULES, max_deviation=1e-6), prefix_tokens=5)
    outcome, full = selective.run(plan), adapter.prefill(plan.token_ids)
    torch.testing.assert_close(outcome.prefill.logits, full.logits, atol=1e-4, rtol=1e-3)
    assert_same_cache(outcome.prefill.cache, full.cache)
    assert outcome.fell_back is not None and "max_deviation" in outcome.fell_back
    assert outcome.computed[5:].all() and outcome.exact_tokens >= len(plan.token_ids)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("prefix_tokens", [0, 5])
def test_zeroed_kv_is_given_up_without_full_layers_too(architecture: str, prefix_tokens: int) -> None:
    """As mode ``identical`` plans: what it measures half way up has no rows to go on with, so all is done afresh."""
    adapter, selective = selective_of(architecture)
    plan = moved_plan(adapter, PRESETS["identical"], prefix_tokens)
    plan = replace(plan, borrowings=tuple(b._replace(reference=zero_kv(b.reference)) for b in plan.borrowings))
    outcome, full = selective.run(plan), adapter.prefill(plan.token_ids)
    torch.testing.assert_close(outcome.prefill.logits, full.logits, atol=1e-4, rtol=1e-3)
    assert_same_cache(outcome.prefill.cache, full.cache)
    assert outcome.fell_back is not None and "max_deviation" in outcome.fell_back
    assert outcome.deviation == pytest.approx(2, abs=0.5), "as if it were not there"
    assert outcome.exact_tokens == sys.maxsize
    assert outcome.computed[prefix_tokens:].all() and not outcome.computed[:prefix_tokens].any()
    assert outcome.compute_ratio > 1 - prefix_tokens / len(plan.token_ids), "what was given up has been computed too"
    assert adapter.config._attn_implementation == "sdpa"
    unguarded = selective.run(replace(plan, max_deviation=UNGUARDED))
    assert unguarded.fell_back is None and unguarded.deviation == outcome.deviation
    assert not adapter.is_close(unguarded.prefill.logits, full.logits)


def test_a_plan_without_borrowings_is_a_plain_prefill(llama_selective: tuple[ModelAdapter, SelectivePrefill]) -> None:
    adapter, selective = llama_selective
    outcome = selective.run(build_prefix_plan(ids_of(5), None, 3, "nothing there"))
    assert torch.equal(outcome.prefill.logits, adapter.prefill(ids_of(5)).logits)
    assert outcome.compute_ratio == 1.0


def test_different_tokens_are_exact_where_they_are_computed(
    llama_selective: tuple[ModelAdapter, SelectivePrefill],
) -> None:
    """A token that borrows from a different one gets its own keys at the full layer and the first measured one."""
    adapter, selective = llama_selective
    token_ids, stored = ids_of(6), ids_of(7)
    targets = np.arange(5, 40)
    borrowing = Borrowing(reference_of(adapter, stored), targets, targets, np.ones(35, dtype=bool))
    plan = build_plan(token_ids, None, [], [borrowing], tail(NUM_TOKENS), RULES, 3)
    outcome, full = selective.run(plan), adapter.prefill(token_ids)
    for layer in (0, 1):
        fresh, wanted = outcome.prefill.cache.layers[layer], full.cache.layers[layer]
        torch.testing.assert_close(fresh.keys, wanted.keys, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(outcome.prefill.cache.layers[2].keys, full.cache.layers[2].keys, atol=1e-2)
    assert 0 < int((plan.fuzzy & ~outcome.computed).sum()) < 35


pieces = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 12), st.booleans()), max_size=6
)  # start in the reference, length, whether one token of it is edited


@settings(max_examples=60)
@given(pieces, st.integers(0, 9), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2))
def test_random_pieces_never_crash_and_keep_to_the_budget(
    llama_selective: tuple[ModelAdapter, SelectivePrefill],
    drawn: list[tuple[int, int, bool]],
    fresh: int,
    attention_ratio: float,
    deviation_ratio: float,
    final_share: float,
    full_layers: int,
) -> None:
    adapter, selective = llama_selective
    reference = reference_of(adapter, ids_of(1))
    rules = replace(
        RULES,
        attention_ratio=attention_ratio,
        deviation_ratio=deviation_ratio if full_layers else 0.0,
        final_share=final_share,
        full_layers=full_layers,
    )
    token_ids, runs = ids_of(8, fresh), []
    for start, length, edited in drawn:
        piece = reference.token_ids[start : start + length].copy()
        kept = len(piece) - int(edited and len(piece) > 0)
        if kept:
            runs.append(Run(len(token_ids), reference, start, kept))
        piece[kept:] = 3
        token_ids = np.concatenate([token_ids, piece])
    token_ids = np.append(token_ids, [5, 6, 7, 8])
    plan = plan_of(token_ids, runs, rules)
    outcome = selective.run(plan)
    assert torch.isfinite(outcome.prefill.logits).all()
    assert outcome.compute_ratio <= plan.predicted_compute_ratio + 1e-9
    assert all(layer.keys.shape[2] == len(token_ids) for layer in outcome.prefill.cache.layers)
    assert outcome.computed[plan.must].all(), "what must be computed was"
    assert not outcome.computed[: plan.prefix_tokens].any()
    rows = plan.predicted_rows
    assert all(later <= earlier for earlier, later in pairwise(rows)), "nested"


def test_looking_ahead_through_fewer_layers_costs_less_and_through_all_is_what_nothing_said_means() -> None:
    adapter, selective = selective_of("llama")
    ratios = []
    for depth in (1 / 3, 2 / 3, 1.0, None):
        rules = replace(
            ReuseConfig(mode="identical", budget=0.3, boundary_tokens=2, attention_depth=depth), max_deviation=UNGUARDED
        )
        outcome = selective.run(moved_plan(adapter, rules))
        ratios.append(outcome.compute_ratio)
        assert int(outcome.computed[17:47].sum()) == 9, "as many tokens, whichever they are"
    assert all(fewer < more for fewer, more in pairwise(ratios[:3])) and ratios[2] == ratios[3]


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "falcon"])  # the last one's shows in operations
def test_a_look_through_the_first_layers_sees_what_they_see_and_runs_nothing_behind_them(architecture: str) -> None:
    adapter, selective = selective_of(architecture)
    plan, ran = moved_plan(adapter), []
    absent = ~(plan.borrowed | plan.question)
    head = adapter.model.get_output_embeddings().register_forward_hook(lambda *_: ran.append("head"))
    for index, layer in enumerate(selective._view.modules):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    looks = []
    for num_layers in (1, 2, None):
        with torch.inference_mode():
            cache = gather(plan, selective.rotations)
            looks.append(selective.watch_attention(plan.token_ids, plan.question, cache, absent, num_layers))
    assert [len(look) for look in looks] == [1, 2, 3] and ran == [0, 0, 1, 0, 1, 2]
    for look in looks[:2]:
        assert all(torch.equal(*pair) for pair in zip(look, looks[2], strict=False))
    head.remove()
    assert selective.run(plan).computed.any(), "and a pass behind it is a whole one"


def test_a_model_whose_layers_see_more_than_their_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof at construction notices that masks are not obeyed."""
    from semsharekv_integrations.model.rows import RowPass

    find_sight = RowPass._find_sight
    monkeypatch.setattr(RowPass, "_find_sight", lambda self, active, window: find_sight(self, active, Window(1)))
    adapter = ModelAdapter(make_model("llama", VOCAB), "identical")
    with pytest.raises(UnsupportedModelError, match="gives other logits if some rows are computed alone"):
        SelectivePrefill(adapter)


def test_unfit_attention_implementations_and_layer_types_are_named() -> None:
    model = make_model("llama", VOCAB)
    adapter = ModelAdapter(model, "identical")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="flash_attention_2"):
        SelectivePrefill(adapter)
    model.config._attn_implementation_internal = "sdpa"
    model.config.layer_types = ["chunked_attention"] * 3
    with pytest.raises(UnsupportedModelError, match="chunked_attention"):
        SelectivePrefill(adapter)


def test_eager_attention_gives_the_same(llama_selective: tuple[ModelAdapter, SelectivePrefill]) -> None:
    adapter, selective = llama_selective
    plan = moved_plan(adapter)
    eager = ModelAdapter(make_model("llama", VOCAB), "identical")
    eager.model.set_attn_implementation("eager")
    outcome = SelectivePrefill(eager).run(plan)
    torch.testing.assert_close(outcome.prefill.logits, selective.run(plan).prefill.logits, atol=1e-4, rtol=1e-3)
    assert eager.config._attn_implementation == "eager", "as it was"
