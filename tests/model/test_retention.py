"""Retention: what is kept of the cache, over depth and over tokens, and that decoding goes on with just that."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine, UnsupportedModelError
from semsharekv_integrations.model.adapter import ModelAdapter
from semsharekv_integrations.model.retention import Retainer
from semsharekv_integrations.model.selective import SelectivePrefill
from semsharekv_integrations.request import Request
from semsharekv_integrations.reuse.selection import (
    NEIGHBOURHOOD_TOKENS,
    RECENT_TOKENS,
    SINK_TOKENS,
    choose_retained_tokens,
    compute_retained_shares,
)
from tiny_models import EngineMaker, make_model

VOCAB, NUM_TOKENS = 99, 80
PROMPT = "\n\n".join(f"In Prorna , {n} people were affected by the flood , said the mayor ." for n in range(6))
TOKENS = {"max_new_tokens": 8}


@given(st.integers(1, 80), st.floats(0.01, 1), st.floats(0.05, 20))
@example(2, 0.2, 0.25)
@example(3, 0.1, 1.0)
def test_shares_change_by_one_factor_and_average_to_the_ratio(num_layers: int, ratio: float, final: float) -> None:
    shares = compute_retained_shares(num_layers, ratio, final)
    assert len(shares) == num_layers and all(0 < share <= 1 for share in shares)
    assert sum(shares) / num_layers == pytest.approx(ratio, rel=1e-3)
    free = [share for share in shares if share < 1]
    factors = [later / earlier for earlier, later in pairwise(free)]
    assert factors == pytest.approx([final ** (1 / max(1, num_layers - 1))] * len(factors), rel=1e-3)


def test_shares_fall_with_depth_or_do_not() -> None:
    assert compute_retained_shares(6, 1.0, 0.25) == pytest.approx((1.0,) * 6)
    assert compute_retained_shares(6, 0.3, 1.0) == pytest.approx((0.3,) * 6)
    falling, growing = compute_retained_shares(6, 0.5, 0.25), compute_retained_shares(6, 0.5, 4.0)
    assert falling[0] == pytest.approx(4 * falling[-1])
    assert growing == pytest.approx(falling[::-1])


@given(st.integers(1, 120), st.floats(0, 1), st.integers(0, 2**31))
def test_first_and_last_tokens_and_the_most_attended_stay(num_tokens: int, share: float, seed: int) -> None:
    attended = torch.rand(2, num_tokens, generator=torch.Generator().manual_seed(seed))
    before = attended.clone()
    kept = choose_retained_tokens(attended, share).tolist()
    assert torch.equal(attended, before), "scores are read only"
    assert kept == sorted(set(kept)) and all(0 <= place < num_tokens for place in kept)
    always = {*range(min(SINK_TOKENS, num_tokens)), *range(max(0, num_tokens - RECENT_TOKENS), num_tokens)}
    assert always <= set(kept)
    assert len(kept) == max(len(always), round(share * num_tokens))
    near = NEIGHBOURHOOD_TOKENS // 2
    scores = [float(attended[:, max(0, place - near) : place + near + 1].max()) for place in range(num_tokens)]
    chosen, dropped = set(kept) - always, set(range(num_tokens)) - set(kept)
    if chosen and dropped:
        assert min(scores[place] for place in chosen) >= max(scores[place] for place in dropped)


def test_a_token_that_one_head_looks_at_stays_with_its_neighbours() -> None:
    attended = torch.full((4, 100), 0.5)
    attended[:, 50], attended[2, 50] = 0.0, 0.9
    kept = choose_retained_tokens(attended, (SINK_TOKENS + RECENT_TOKENS + NEIGHBOURHOOD_TOKENS) / 100).tolist()
    assert kept == [*range(4), *range(47, 54), *range(84, 100)]


def test_relevant_tokens_come_before_all_others() -> None:
    attended, relevant = torch.rand(2, 100), torch.arange(100) // 10 == 3
    assert {*range(30, 40)} <= set(choose_retained_tokens(attended, 0.3, relevant).tolist())
    assert choose_retained_tokens(attended, 0.0, relevant).tolist() == [*range(4), *range(84, 100)], "no room"


def retaining(architecture: str, ratio: float) -> tuple[ModelAdapter, SelectivePrefill, Retainer]:
    adapter = ModelAdapter(make_model(architecture, VOCAB), "identical")
    selective = SelectivePrefill(adapter)
    rules = ReuseConfig(mode="identical", retention_ratio=ratio, retention_final_share=0.3)
    return adapter, selective, Retainer(adapter, selective, rules)


def no_tokens() -> np.ndarray:
    return np.zeros(NUM_TOKENS, dtype=bool)


def ids_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB, NUM_TOKENS)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma", "gpt_neox", "granite"])
def test_decoding_equals_attention_with_the_dropped_tokens_masked(architecture: str) -> None:
    """Against one pass over everything, in which each layer masks what it dropped from the tokens behind the prompt."""
    adapter, _, retainer = retaining(architecture, 0.5)
    token_ids, answered = ids_of(1), [5, 17, 8, 60]
    prefill = adapter.prefill(token_ids)
    short = retainer.shorten(token_ids, ~no_tokens(), no_tokens(), prefill.cache)
    kept = [_places(whole.keys, part.keys) for whole, part in zip(prefill.cache.layers, short.layers, strict=True)]
    assert len({len(places) for places in kept}) == 3 and all(len(places) < NUM_TOKENS for places in kept[1:])

    logits, ids = [], token_ids
    for token_id in answered:
        ids = np.append(ids, token_id)
        logits.append(adapter.decode_step(torch.from_numpy(ids)[None], short))
    wanted = _masked_logits(make_model(architecture, VOCAB), ids, kept)[:, NUM_TOKENS:]
    torch.testing.assert_close(torch.cat(logits), wanted[0], atol=1e-4, rtol=1e-3)
    full = adapter.compute_logits(token_ids, np.array(answered))[1:]
    assert not torch.allclose(torch.cat(logits), full, atol=1e-3), "what was dropped made a difference"


def _places(whole: torch.Tensor, part: torch.Tensor) -> list[int]:
    """Where the tokens of ``part`` [B, H, N, D] stand in ``whole`` [B, H, S, D]."""
    equal = (part[0].transpose(0, 1)[:, None] == whole[0].transpose(0, 1)[None]).flatten(2).all(-1)  # [N, S]
    assert (equal.sum(1) == 1).all()
    return equal.int().argmax(1).tolist()


def _masked_logits(model: PreTrainedModel, ids: np.ndarray, kept: list[list[int]]) -> torch.Tensor:
    """Logits [B, T, V] of one pass whose layers each mask, from the rows behind the prompt, what they did not keep."""
    num_tokens = len(ids)
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == len(kept))

    def masked(places: list[int]):
        unseen = torch.ones(num_tokens, num_tokens).triu(1).bool()
        dropped = sorted(set(range(NUM_TOKENS)) - set(places))
        unseen[NUM_TOKENS:, dropped] = True
        mask = torch.zeros(num_tokens, num_tokens).masked_fill(unseen, torch.finfo(torch.float32).min)[None, None]
        return lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask})

    for layer, places in zip(layers, kept, strict=True):
        layer.register_forward_pre_hook(masked(places), with_kwargs=True)
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits


def test_the_whole_cache_is_neither_changed_nor_shared() -> None:
    adapter, _, retainer = retaining("llama", 0.5)
    prefill = adapter.prefill(ids_of(2))
    before = [(layer.keys.clone(), layer.values.clone()) for layer in prefill.cache.layers]
    short = retainer.shorten(ids_of(2), ~no_tokens(), no_tokens(), prefill.cache)
    adapter.decode_step(torch.from_numpy(np.append(ids_of(2), 5))[None], short)
    for layer, (keys, values) in zip(prefill.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


def test_the_most_attended_of_each_layer_stay() -> None:
    adapter, _, retainer = retaining("llama", 0.65)  # so that the last layer has a choice
    token_ids = ids_of(3)
    prefill = adapter.prefill(token_ids)
    question = np.arange(NUM_TOKENS) >= NUM_TOKENS - 6
    short = retainer.shorten(token_ids, question, no_tokens(), prefill.cache)
    eager = make_model("llama", VOCAB)
    eager.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = eager(input_ids=torch.from_numpy(token_ids)[None], output_attentions=True).attentions
    for whole, part, weights in zip(prefill.cache.layers, short.layers, attentions, strict=True):
        attended = weights[0][:, -6:].mean(1)  # [heads, T]
        kept = _places(whole.keys, part.keys)
        assert kept == choose_retained_tokens(attended, len(kept) / NUM_TOKENS).tolist()


def test_what_is_relevant_stays_in_every_layer() -> None:
    adapter, _, retainer = retaining("llama", 0.8)
    token_ids = ids_of(3)
    relevant = no_tokens()
    relevant[20:30] = True
    prefill = adapter.prefill(token_ids)
    short = retainer.shorten(token_ids, ~relevant, relevant, prefill.cache)
    for whole, part in zip(prefill.cache.layers, short.layers, strict=True):
        assert {*range(20, 30)} <= set(_places(whole.keys, part.keys))


def test_the_document_asked_for_is_kept_whole(make_engine: EngineMaker) -> None:
    documents = {town: f"In {town} , the mayor said , {n} people came ." for n, town in enumerate(("Prorna", "Velmar"))}
    filler = "\n\n".join(f"A word on number {n} and nothing else to say ." for n in range(20))
    prompt = "\n\n".join([documents["Prorna"], filler, documents["Velmar"], filler, "Who came in Velmar ?"])
    engine = make_engine(reuse=ReuseConfig(mode="identical", retention_ratio=0.2))
    parts = engine._load()
    rendered = parts.renderer.render(prompt, documents)
    whole = parts.adapter.prefill(rendered.token_ids)
    short = parts._retainer.shorten_for(rendered, whole.cache)
    (asked,) = [segment for segment in rendered.segments if segment.document_id == "Velmar"]
    for before, after in zip(whole.cache.layers, short.layers, strict=True):
        kept = set(_places(before.keys, after.keys))
        assert {*range(asked.start, asked.stop)} <= kept and len(kept) < 0.4 * len(rendered.token_ids)


@pytest.mark.parametrize("mode", ["identical", "semantic", "paper"])
def test_ratio_one_changes_nothing(make_engine: EngineMaker, mode: str) -> None:
    engine = make_engine(reuse=ReuseConfig(mode=mode, retention_ratio=1.0))  # type: ignore[arg-type]
    generation = engine.generate(PROMPT, **TOKENS)
    assert generation.token_ids == make_engine("off").generate(PROMPT, **TOKENS).token_ids
    assert generation.report.kv_retained_ratio == 1
    assert generation.report.kv_retained_bytes == generation.report.kv_bytes > 0
    (kept,) = engine.store.fetch_all()
    assert len(kept.token_ids) == generation.report.prompt_tokens + len(generation.token_ids) - 1


def test_models_with_windows_can_keep_everything(tokenizer: PreTrainedTokenizerBase) -> None:
    model = make_model("gemma3_text", len(tokenizer))
    paper = ReuseConfig(mode="paper", retention_ratio=1.0)
    assert SemShareEngine(model, tokenizer, EngineConfig(paper)).generate(PROMPT, **TOKENS).token_ids


def test_bytes_shrink_about_in_proportion(make_engine: EngineMaker) -> None:
    ratios = {}
    for ratio in (0.3, 0.5, 0.7, 0.9):
        engine = make_engine("identical", reuse=ReuseConfig(mode="identical", retention_ratio=ratio))
        report = engine.generate(PROMPT, **TOKENS).report
        assert report.kv_retained_ratio == pytest.approx(report.kv_retained_bytes / report.kv_bytes)
        assert "retain" in report.phases_s
        ratios[ratio] = report.kv_retained_ratio
        engine.store.check()
    assert list(ratios.values()) == sorted(ratios.values())
    for ratio, found in ratios.items():
        assert ratio - 0.02 <= found <= ratio + 0.12, "first and last tokens stay on top"


def test_stored_references_are_whole(make_engine: EngineMaker) -> None:
    engine = make_engine(reuse=ReuseConfig(mode="identical", retention_ratio=0.4))
    first = engine.generate(PROMPT, **TOKENS)
    (kept,) = engine.store.fetch_all()
    assert len(kept.token_ids) == first.report.prompt_tokens, "the answer stands on a part of the KV"
    adapter = engine._load().adapter
    for stored, wanted in zip(kept.layers, adapter.read_layers(adapter.prefill(kept.token_ids).cache), strict=True):
        torch.testing.assert_close(stored.keys, wanted.keys, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(stored.values, wanted.values, atol=1e-4, rtol=1e-3)
    again = engine.generate(PROMPT, **TOKENS)
    assert again.report.prefix_tokens == again.report.prompt_tokens - 1
    assert again.report.kv_retained_ratio < 0.6


def test_the_first_token_waits_for_no_retention(make_engine: EngineMaker) -> None:
    engine = make_engine(reuse=ReuseConfig(mode="identical", retention_ratio=0.3))
    request, since = Request.of(PROMPT, {"max_new_tokens": 9}), engine._memory.under_way.begin()
    chunks = engine._run(request, since, engine._load())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._load()._retainer, "shorten", None)
        next(chunks)
    last = [*chunks][-1].generation
    assert last is not None and last.report.kv_retained_ratio < 0.7
    one = engine.generate(PROMPT, max_new_tokens=1).report
    assert one.kv_retained_ratio == 1 and "retain" not in one.phases_s, "there is nothing to decode"


def test_retention_makes_a_difference_after_the_first_token(make_engine: EngineMaker) -> None:
    whole = make_engine("off").generate(PROMPT, max_new_tokens=30).token_ids
    engine = make_engine(reuse=ReuseConfig(mode="identical", retention_ratio=0.2))
    short = engine.generate(PROMPT, max_new_tokens=30).token_ids
    assert short[0] == whole[0] and short != whole


@pytest.mark.parametrize("mode", ["identical", "paper"])
def test_models_that_cannot_are_refused_by_name(tokenizer: PreTrainedTokenizerBase, mode: str) -> None:
    config = EngineConfig(ReuseConfig(mode=mode, retention_ratio=0.5))  # type: ignore[arg-type]
    for architecture in ("gemma3_text", "phi3", "mistral"):
        model = make_model(architecture, len(tokenizer))
        with pytest.raises(
            UnsupportedModelError, match=rf"{type(model).__name__} has sliding windows.*retention_ratio"
        ):
            SemShareEngine(model, tokenizer, config)
    biased = make_model("falcon", len(tokenizer), alibi=True)
    with pytest.raises(UnsupportedModelError, match=r"FalconForCausalLM counts tokens in its cache.*retention_ratio"):
        SemShareEngine(biased, tokenizer, config)
    eager = make_model("llama", len(tokenizer))
    eager.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModelError, match=r"'eager'.*retention_ratio"):
        SemShareEngine(eager, tokenizer, config)
