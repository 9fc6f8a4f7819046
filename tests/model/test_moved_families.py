"""Reuse away from the prefix on every kind of position scheme and layer: what moved KV must equal, and what is refused.

Windows and chunks of these models are 9 to 16 tokens, shorter than the prompts here.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from semsharekv_integrations.config import ReuseConfig
from semsharekv_integrations.errors import UnsupportedModelError
from semsharekv_integrations.kv import LayerKV, LayerRotation, PrefixMatch, Reference, Rotation, Run, TokenIds
from semsharekv_integrations.model import probing
from semsharekv_integrations.model.adapter import ModelAdapter
from semsharekv_integrations.model.gathering import gather
from semsharekv_integrations.model.layers import require_reuse_off_prefix
from semsharekv_integrations.model.selective import SelectivePrefill
from semsharekv_integrations.model.views import Window, watch_layers
from semsharekv_integrations.reuse.plan import ReusePlan, build_plan
from survey_models import build_tiny_model
from tiny_models import make_model

LATENT = ["deepseek_v2", "deepseek_v3", "minicpm3", "youtu", "longcat_flash"]
PARTIAL = ["gptj", "codegen", "gpt_neox", "phi", "persimmon", "stablelm", "glm4", "nemotron"]
BIASED = ["bloom", "mpt", "falcon, biased"]
WITHOUT = ["smollm3", "cohere2", "llama4_text", "exaone4", "beam"]  # positions in some layers
BY_LAYER = ["gemma3_text", "modernbert-decoder", "gemma4_text", "gemma3n_text", "gpt_oss", "olmo3"]
OTHERS = ["olmo2", "falcon", "nanochat", "moss_transcribe_diarize", "mllama", "diffllama", "ernie4_5", "mimo_v2_flash"]
SOME = [
    "deepseek_v3",
    "longcat_flash",
    "gptj",
    "bloom",
    "mpt",
    "falcon, biased",
    "llama4_text",
    "beam",
    "gemma3n_text",
    "falcon",
    "mllama",
]
FAMILIES = [*LATENT, *PARTIAL, *BIASED, *WITHOUT, *BY_LAYER, *OTHERS]
NUM_TOKENS, PLACE, SOURCE, RUN_TOKENS, SHIFT = 48, 15, 6, 27, 31
RULES = ReuseConfig(
    mode="identical",
    attention_ratio=0.2,
    deviation_ratio=0.0,
    full_layers=0,
    final_share=0.3,
    boundary_tokens=1,
    max_deviation=1e9,
)


def build(family: str) -> PreTrainedModel:
    """A tiny model of that type, or Falcon with biases for distances in the masks that it hands to its layers."""
    if family == "falcon, biased":
        return make_model("falcon", 320, alibi=True, num_hidden_layers=4)
    return build_tiny_model(family)


@cache
def selective_of(family: str) -> tuple[ModelAdapter, SelectivePrefill]:
    adapter = ModelAdapter(build(family), "identical")
    return adapter, SelectivePrefill(adapter)


def ids_of(seed: int, num_tokens: int = NUM_TOKENS) -> TokenIds:
    return np.random.default_rng(seed).integers(3, 300, num_tokens)


def reference_of(adapter: ModelAdapter, token_ids: TokenIds) -> Reference:
    return Reference("r", "n", token_ids, adapter.read_layers(adapter.prefill(token_ids).cache))


def plan_of(
    prefill: SelectivePrefill, token_ids: TokenIds, runs: list[Run], rules: ReuseConfig = RULES, prefix=None
) -> ReusePlan:
    question = np.arange(len(token_ids)) >= len(token_ids) - 4
    return build_plan(token_ids, prefix, runs, [], question, rules, prefill.num_layers)


def moved_plan(adapter: ModelAdapter, prefill: SelectivePrefill, rules: ReuseConfig = RULES, prefix=None) -> ReusePlan:
    """A prompt whose middle stands nine tokens earlier in what is stored, behind other text."""
    stored = ids_of(1)
    token_ids = np.concatenate([ids_of(2, PLACE), stored[SOURCE : SOURCE + RUN_TOKENS], ids_of(3, 6)])
    run = Run(PLACE, reference_of(adapter, stored), SOURCE, RUN_TOKENS)
    return plan_of(prefill, token_ids, [run], rules, prefix)


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    error = (found.float() - wanted.float()).square().mean().sqrt() / wanted.float().std()
    assert error < 2.5e-4, f"{error:.2g} of the spread"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_first_layer_borrows_is_what_it_computes_at_that_place(family: str) -> None:
    adapter, prefill = selective_of(family)
    plan = moved_plan(adapter, prefill)
    moved = gather(plan, prefill.rotations).layers[0]
    computed = adapter.prefill(plan.token_ids).cache.layers[0]
    places = slice(PLACE, PLACE + RUN_TOKENS)
    assert_close(moved.keys[:, :, places], computed.keys[:, :, places])
    assert_close(moved.values[:, :, places], computed.values[:, :, places])
    left = gather(replace(plan, rotate_keys=False), prefill.rotations).layers[0]
    turns = any(rotation is not None for rotation in prefill.rotations[0])
    assert turns == (not all(torch.equal(*pair) for pair in zip(kv(moved), kv(left), strict=True)))


def kv(layer: LayerKV) -> LayerKV:
    return LayerKV(layer.keys, layer.values)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_moved_as_a_whole_equals_a_full_prefill(family: str) -> None:
    """All KV comes from another place, a few tokens are computed over it, with gaps between them."""
    adapter, prefill = selective_of(family)
    token_ids = ids_of(4)
    if adapter.takes_positions:
        layers = adapter.compute_kv(token_ids, SHIFT)
        padded = [LayerKV(*(torch.cat([t[:, :, :SHIFT] * 0, t], dim=2) for t in layer)) for layer in layers]
        reference = Reference("r", "n", np.concatenate([ids_of(5, SHIFT), token_ids]), padded)
    else:
        reference = reference_of(adapter, token_ids)
    start = len(reference.token_ids) - len(token_ids)
    for full_layers in (0, 1):
        rules = replace(RULES, full_layers=full_layers, deviation_ratio=0.2 * full_layers)
        plan = plan_of(prefill, token_ids, [Run(0, reference, start, NUM_TOKENS - 4)], rules)
        outcome = prefill.run(plan)
        assert_close(outcome.prefill.logits, adapter.prefill(token_ids).logits)
        assert not outcome.computed.all() and outcome.fell_back is None
        assert (outcome.deviation or 0.0) < 2e-3  # Beam's queries grow a little with position


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("prefix_tokens", [0, 5])
def test_everything_computed_equals_a_full_prefill(family: str, prefix_tokens: int) -> None:
    adapter, prefill = selective_of(family)
    rules = replace(RULES, boundary_tokens=NUM_TOKENS, edit_tokens=NUM_TOKENS)
    token_ids = moved_plan(adapter, prefill).token_ids
    prefix = PrefixMatch(reference_of(adapter, token_ids), prefix_tokens) if prefix_tokens else None
    outcome = prefill.run(moved_plan(adapter, prefill, rules, prefix))
    full = adapter.prefill(token_ids)
    assert_close(outcome.prefill.logits, full.logits)
    for found, wanted in zip(outcome.prefill.cache.layers, full.cache.layers, strict=True):
        assert_close(found.keys, wanted.keys)
        assert_close(found.values, wanted.values)
    longer = torch.from_numpy(np.append(token_ids, 7))[None]
    assert_close(*(adapter.decode_step(longer, each.cache) for each in (outcome.prefill, full)))


@pytest.mark.parametrize("family", SOME)
def test_borrowed_kv_of_another_context_makes_a_difference(family: str) -> None:
    """Else the equalities above would say nothing of what is borrowed."""
    adapter, prefill = selective_of(family)
    plan = moved_plan(adapter, prefill)
    outcome = prefill.run(plan)
    assert outcome.deviation is not None and not outcome.computed.all()
    assert not torch.allclose(outcome.prefill.logits, adapter.prefill(plan.token_ids).logits, atol=1e-3)


@pytest.mark.parametrize("family", ["deepseek_v3", "gptj", "cohere2", "gemma3_text", "bloom"])
@pytest.mark.parametrize("layer", [0, 3])
def test_one_wrongly_turned_layer_is_noticed(family: str, layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    find = probing.find_rotations

    def find_wrongly(*given) -> tuple[LayerRotation, ...]:
        found = list(find(*given))
        unlike = Rotation(torch.tensor([0.5, 0.05]))
        found[layer] = LayerRotation(*(unlike if part is None else None for part in found[layer]))
        return tuple(found)

    monkeypatch.setattr(probing, "find_rotations", find_wrongly)
    with pytest.raises(UnsupportedModelError, match="gives other logits if some rows are computed alone"):
        SelectivePrefill(ModelAdapter(build_tiny_model(family), "identical"))


@pytest.mark.parametrize(
    ("wrong", "says"), [(None, "all before it"), (Window(6), "num_tokens=6"), (Window(5, True), "chunked=True")]
)
def test_windows_longer_than_any_probe_are_proven(wrong: Window | None, says: str, monkeypatch) -> None:
    adapter = ModelAdapter(make_model("mistral", 99, sliding_window=4096), "identical")
    assert set(SelectivePrefill(adapter)._view.windows) == {Window(4096)}
    assert adapter.config.sliding_window == 4096, "as it was"
    monkeypatch.setattr(probing, "list_windows", lambda config: (wrong,) * 3)
    with pytest.raises(UnsupportedModelError, match=rf"does not see in layer 0 .*{says}"):
        SelectivePrefill(adapter)


def test_the_probe_leaves_windows_as_they_were_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ModelAdapter(make_model("mistral", 99), "identical")
    monkeypatch.setattr(probing, "find_rotations", None)
    with pytest.raises(TypeError):
        SelectivePrefill(adapter)
    assert adapter.config.sliding_window == 9


@pytest.mark.parametrize("family", ["gemma3", "moss_transcribe_diarize", "longcat_flash"])
def test_layers_are_the_text_decoders_among_lists_of_the_same_length(family: str) -> None:
    model = build_tiny_model(family)
    decoder = model.get_decoder()
    others = torch.nn.ModuleList(torch.nn.LayerNorm(4) for _ in decoder.layers)
    model._modules = {"norms": others, **model._modules}
    with watch_layers(model) as calls, torch.inference_mode():
        model(input_ids=torch.zeros((1, 1), dtype=torch.int64), use_cache=True)
    assert [call.module for call in calls] == list(decoder.layers)


@pytest.mark.parametrize("part", LayerKV._fields)
def test_what_cannot_be_moved_is_named_with_its_layer_and_by_how_much(part: str, monkeypatch) -> None:
    compute = ModelAdapter.compute_kv

    def compute_otherwise(self: ModelAdapter, token_ids: TokenIds, start: int) -> tuple[LayerKV, ...]:
        layers = list(compute(self, token_ids, start))
        if start:
            layers[1] = layers[1]._replace(**{part: getattr(layers[1], part) * 1.5})
        return tuple(layers)

    monkeypatch.setattr(ModelAdapter, "compute_kv", compute_otherwise)
    with pytest.raises(UnsupportedModelError, match=rf"layer 1: {part} at another position are 33\.3% of their magn"):
        SelectivePrefill(ModelAdapter(make_model("llama", 99), "identical"))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", r"GPT2LMHeadModel: layer 0: keys .* positions come from a table \(wpe\)"),
        ("opt", r"OPTForCausalLM: layer 0: keys .* positions come from a table \(embed_positions\)"),
        ("bart", r"BartForCausalLM \(its forward takes no position_ids\): layer 0: keys .*table \(embed_positions\)"),
        ("roformer", r"RoFormerForCausalLM \(its forward takes no position_ids\): layer 0: keys"),
        ("hrm_text", "HrmTextForCausalLM runs its layers several times in one pass"),
        ("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM: layer 0: keys at another position"),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_reason(family: str, reason: str) -> None:
    adapter = ModelAdapter(build_tiny_model(family), "identical")
    with pytest.raises(UnsupportedModelError, match=f"{reason}.*use mode='exact'"):
        SelectivePrefill(adapter)


@pytest.mark.parametrize("family", ["qwen3_next", "jamba", "lfm2"])
def test_hybrids_are_referred_to_exact_prefixes_and_arranging(family: str) -> None:
    model = build_tiny_model(family)
    with pytest.raises(UnsupportedModelError, match=r"has layers of type .*cannot be moved.*'exact', with engine\.arr"):
        require_reuse_off_prefix(model, model.config.get_text_config(decoder=True), "identical")


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "falcon", "deepseek_v3"])
def test_attention_seen_in_operations_is_what_the_interface_shows(family: str) -> None:
    adapter, prefill = selective_of(family)
    plan, seen = moved_plan(adapter, prefill), []
    for by_operations in (False, True):
        other = SelectivePrefill(adapter)
        other._view = replace(prefill._view, by_operations=by_operations or prefill._view.by_operations)
        cache = gather(plan, prefill.rotations)
        seen.append(other.watch_attention(plan.token_ids, plan.question, cache, np.zeros_like(plan.question)))
    for one, another in zip(*seen, strict=True):
        torch.testing.assert_close(one, another, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.sum(1), torch.ones(len(one)))


def test_layers_that_read_others_kv_are_measured_by_the_last_that_keeps_some() -> None:
    adapter, prefill = selective_of("gemma3n_text")
    assert prefill._view.places == [(0,), (1,), (), ()]
    plan = moved_plan(adapter, prefill)
    assert plan.measured_layer == 2
    outcome = prefill.run(replace(plan, max_deviation=0.0))
    assert outcome.fell_back is not None
    assert_close(outcome.prefill.logits, adapter.prefill(plan.token_ids).logits)


def test_nothing_is_measured_where_the_layer_to_measure_is_beyond_the_last() -> None:
    adapter = ModelAdapter(make_model("llama", 320, num_hidden_layers=1), "identical")
    prefill = SelectivePrefill(adapter)
    plan = moved_plan(adapter, prefill)
    outcome = prefill.run(plan)
    assert plan.measured_layer == 1 and outcome.deviation is None
    assert outcome.compute_ratio <= plan.predicted_compute_ratio


def test_normalized_branches_of_random_layers_outweigh_the_tokens_themselves() -> None:
    """Why OLMo 2 and kin fall back with random weights: it is not the measure, which falls with what context adds."""
    found = []
    for scale in (1.0, 0.1):
        model = build_tiny_model("olmo2")
        with torch.no_grad():
            for layer in model.model.layers:
                layer.post_attention_layernorm.weight.mul_(scale)
                layer.post_feedforward_layernorm.weight.mul_(scale)
        adapter = ModelAdapter(model, "identical")
        prefill = SelectivePrefill(adapter)
        plan = moved_plan(adapter, prefill)
        outcome, full = prefill.run(plan), adapter.prefill(plan.token_ids)
        off = (outcome.prefill.logits - full.logits).square().mean().sqrt() / full.logits.std()
        found.append((outcome.deviation or 0.0, float(off)))
    assert found[0][0] > 1.0 > 0.5 > found[1][0]
    assert found[1][1] < found[0][1] / 2, "so do the answers"
