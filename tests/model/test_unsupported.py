"""What a model does not allow is refused when the engine is made, naming what was found."""

from __future__ import annotations

import inspect

import pytest
import torch
from test_parity import FIRST, engine_of
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    T5Config,
    T5ForConditionalGeneration,
    XLMConfig,
    XLMWithLMHeadModel,
)
from transformers.cache_utils import DynamicLayer

from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine, UnsupportedModelError
from tiny_models import SIZES, EngineMaker, make_model


@pytest.mark.parametrize("mode", ["off", "exact"])
def test_encoder_decoders_are_refused(mode: str, tokenizer) -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=99, d_model=8, d_kv=4, d_ff=9, num_layers=1, num_heads=2))
    with pytest.raises(
        UnsupportedModelError, match="T5ForConditionalGeneration is not a causal language model but an enc"
    ):
        engine_of(model, tokenizer, mode)


def test_models_without_a_cache_argument_are_refused(tokenizer) -> None:
    model = make_model("rwkv", len(tokenizer), attention_hidden_size=32)
    with pytest.raises(UnsupportedModelError, match="RwkvForCausalLM takes no KV cache: none of past_key_values"):
        engine_of(model, tokenizer, "off")


@pytest.mark.parametrize("mode", ["off", "exact"])
def test_a_cache_argument_that_is_something_else_is_no_kv_cache(mode: str, tokenizer) -> None:
    """XLM's ``cache`` is a dictionary of its own, by whatever name other models of that transformers take KV."""
    config = XLMConfig(vocab_size=len(tokenizer), emb_dim=16, n_layers=2, n_heads=2, causal=True)
    model = XLMWithLMHeadModel(config).eval()
    assert "cache" in inspect.signature(model.forward).parameters
    with pytest.raises(UnsupportedModelError, match="XLMWithLMHeadModel takes no KV cache: none of past_key_values"):
        engine_of(model, tokenizer, mode)


def test_attention_that_looks_ahead_cannot_continue_from_a_prefix(tokenizer) -> None:
    model = make_model("gemma3_text", len(tokenizer), use_bidirectional_attention=True)
    with pytest.raises(UnsupportedModelError, match="other logits behind a reused prefix"):
        engine_of(model, tokenizer, "exact")


@pytest.mark.parametrize("mode", ["off", "exact"])
@pytest.mark.parametrize("decodes", [False, True])
def test_encoders_are_refused_unless_they_are_made_decoders(mode: str, decodes: bool, tokenizer) -> None:
    sizes = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
    config = BertConfig(vocab_size=len(tokenizer), num_hidden_layers=2, is_decoder=decodes, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    if decodes:
        assert engine_of(model, tokenizer, mode).generate(FIRST, max_new_tokens=2).token_ids
    else:
        with pytest.raises(UnsupportedModelError, match="BertLMHeadModel is not a causal language model but an enc"):
            engine_of(model, tokenizer, mode)


def test_a_cache_that_loses_tokens_is_noticed(make_engine: EngineMaker, monkeypatch) -> None:
    update = DynamicLayer.update

    def forgetful(self, keys, values, *args, **kwargs):
        keys, values = update(self, keys, values, *args, **kwargs)
        self.keys = self.keys * 0.9
        return keys, values

    monkeypatch.setattr(DynamicLayer, "update", forgetful)
    with pytest.raises(UnsupportedModelError, match="other logits"):
        make_engine()
    make_engine("off")


@pytest.mark.parametrize("vocabulary", [99, 1_000, 200_000])
def test_how_much_logits_may_differ_does_not_depend_on_how_many_there_are(
    make_engine: EngineMaker, vocabulary: int
) -> None:
    """Rounding of a tenth of a permille is none, whatever its largest part; a hundred times as much is a difference."""
    adapter = make_engine("off")._load().adapter
    generator = torch.Generator().manual_seed(vocabulary)
    logits, noise = (torch.randn(1, vocabulary, generator=generator) for _ in range(2))
    for scale in (0.01, 1.0, 100.0):  # of the logits themselves
        assert adapter.is_close(scale * (logits + 1e-4 * noise), scale * logits)
        assert not adapter.is_close(scale * (logits + 1e-2 * noise), scale * logits)


@pytest.mark.parametrize(("rounds", "allowed"), [(0.0, 0.1), (0.04, 0.1), (0.07, 0.14), (0.5, 0.2)])
def test_a_model_that_rounds_much_is_allowed_twice_what_it_rounds_in_transformers_itself(
    rounds: float, allowed: float, make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision alone, and never so much as a lost token makes."""
    adapter = make_engine("off")._load().adapter
    monkeypatch.setitem(vars(adapter), "_rounding", rounds)
    logits, noise = torch.randn(2, 1, 1000, generator=torch.Generator().manual_seed(0))
    wanted = logits.bfloat16()
    for share in (0.9 * allowed, 1.1 * allowed):
        found = wanted.float() + share * wanted.float().std() * noise / noise.square().mean().sqrt()
        assert adapter.is_close(found, wanted) == (share < allowed)
        assert not adapter.is_close(found, wanted.float())


def test_what_a_model_rounds_is_measured_between_its_own_two_pieces(tokenizer) -> None:
    plain, deep = (make_model("llama", len(tokenizer), **more) for more in ({}, {"num_hidden_layers": 30}))
    found = [engine_of(model, tokenizer, "off")._load().adapter._rounding for model in (plain, deep.bfloat16())]
    assert found[0] < 1e-5 < 1e-3 < found[1]


def test_auto_reuses_exact_prefixes_where_no_more_is_allowed_and_says_why(tokenizer) -> None:
    model = make_model("gpt2", len(tokenizer))
    with pytest.raises(UnsupportedModelError, match="mode='exact'"):
        engine_of(model, tokenizer, "identical")
    config = EngineConfig(reuse=ReuseConfig(min_run_tokens=8))
    with pytest.warns(UserWarning, match=r"'auto' reuses exact prefixes alone on GPT2LMHeadModel: .*rotated"):
        engine = SemShareEngine(model, tokenizer, config)
    assert engine.mode == "exact"
    reports = [engine.generate(FIRST + end, max_new_tokens=2).report for end in ("", " Then?")]
    assert {report.mode for report in reports} == {"exact"}
    assert reports[1].prefix_tokens > 0 and reports[1].identical_tokens == 0


def test_auto_is_exact_until_a_budget_is_given_that_the_model_allows(make_engine: EngineMaker) -> None:
    assert make_engine("auto").mode == "exact"
    engine = make_engine("auto", reuse=ReuseConfig(budget=0.1, max_deviation=100.0))
    assert engine.mode == "identical" and engine.config.reuse.mode == "auto"
    engine.generate(FIRST, max_new_tokens=2)
    report = engine.generate(f"Otherwise: {FIRST} Why?", documents={"first": FIRST}, max_new_tokens=2).report
    assert report.mode == "identical" and report.identical_tokens > 0, report.declined


def test_auto_is_refused_where_not_even_prefixes_can_be_reused(tokenizer) -> None:
    with pytest.raises(UnsupportedModelError, match="mode='off'"):
        engine_of(make_model("moshi", len(tokenizer), sliding_window=9), tokenizer, "auto")
