"""Choosing tokens: the options mean what they mean in transformers, and modes do not change what is sampled."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from semsharekv_integrations import ContextWindowError, SamplingConfig
from semsharekv_integrations.model.adapter import ModelAdapter
from semsharekv_integrations.model.choosing import TokenChooser
from tiny_models import EngineMaker, make_model

PROMPT = "Report on Prorna in the Daily Courier. People affected by it numbered 1204."


def plain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: object) -> list[int]:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    return model.generate(**inputs, **options)[0, inputs.input_ids.shape[1] :].tolist()


def with_defaults(model: PreTrainedModel, **defaults: object) -> PreTrainedModel:
    changed = copy.copy(model)
    changed.generation_config = copy.deepcopy(model.generation_config)
    for name, value in defaults.items():
        setattr(changed.generation_config, name, value)
    return changed


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition_penalty_equals_that_of_generate(make_engine: EngineMaker, llama, tokenizer, penalty) -> None:
    wanted = plain(llama, tokenizer, do_sample=False, max_new_tokens=20, repetition_penalty=penalty)
    found = make_engine().generate(PROMPT, max_new_tokens=20, repetition_penalty=penalty)
    assert found.token_ids == wanted
    assert wanted != plain(llama, tokenizer, do_sample=False, max_new_tokens=20)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.6, "top_k": 100},
        {"temperature": 1.0, "top_k": 7, "repetition_penalty": 1.4},
    ],
)
def test_scores_are_those_that_generate_samples_from(llama, tokenizer, options) -> None:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    wanted = llama.generate(
        **inputs, **options, do_sample=True, max_new_tokens=1, output_scores=True, return_dict_in_generate=True
    ).scores[0]
    adapter, ids = ModelAdapter(llama, "off"), inputs.input_ids[0].numpy()
    chooser = TokenChooser(adapter, ids, SamplingConfig(seed=1, **options), None)
    torch.testing.assert_close(chooser.choose(adapter.prefill(ids).logits).scores, wanted)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_fixes_the_tokens_in_every_mode(make_engine: EngineMaker, seed: int) -> None:
    options = {"temperature": 1.2, "top_p": 0.95, "seed": seed, "max_new_tokens": 12}
    off, exact = make_engine("off"), make_engine("exact")
    wanted = off.generate(PROMPT, **options).token_ids
    for _ in range(2):
        assert exact.generate(PROMPT, **options).token_ids == wanted
    streamed = list(exact.stream(PROMPT, **options))[-1].generation
    assert streamed is not None and streamed.token_ids == wanted
    assert off.generate(PROMPT, **{**options, "seed": seed + 10}).token_ids != wanted


def test_without_a_seed_every_call_is_fresh(make_engine: EngineMaker) -> None:
    engine = make_engine()
    torch.manual_seed(0)
    first = engine.generate(PROMPT, temperature=2.0, max_new_tokens=12).token_ids
    torch.manual_seed(0)
    assert engine.generate(PROMPT, temperature=2.0, max_new_tokens=12).token_ids != first


def test_sampling_leaves_the_global_generator_alone(make_engine: EngineMaker) -> None:
    engine, before = make_engine(), torch.random.get_rng_state()
    engine.generate(PROMPT, temperature=1.0, seed=3, max_new_tokens=4)
    assert torch.equal(before, torch.random.get_rng_state())


def test_every_end_token_ends(make_engine: EngineMaker, llama, tokenizer) -> None:
    free = make_engine().generate(PROMPT, max_new_tokens=8).token_ids
    for ends in ([free[3], 1], free[3]):
        generation = make_engine(model=with_defaults(llama, eos_token_id=ends)).generate(PROMPT, max_new_tokens=8)
        at = free.index(free[3])
        assert generation.token_ids == free[: at + 1]
        assert generation.finish_reason == "stop"


def test_length_limit(make_engine: EngineMaker, llama) -> None:
    engine = make_engine(model=with_defaults(llama, eos_token_id=None))
    for limit in (1, 5):
        generation = engine.generate(PROMPT, max_new_tokens=limit)
        assert len(generation.token_ids) == limit and generation.finish_reason == "length"


@pytest.mark.parametrize(
    "defaults",
    [
        {"min_new_tokens": 6, "eos_token_id": list(range(1000))},
        {"suppress_tokens": list(range(500, 1200))},
        {"no_repeat_ngram_size": 1},
        {"forced_eos_token_id": 1},
        {"max_length": 3},
        {"num_beams": 3},
        {"temperature": 0.1, "top_k": 3, "top_p": 0.2, "do_sample": True},
    ],
)
def test_the_models_own_settings_count_as_in_generate(make_engine, llama, tokenizer, defaults) -> None:
    model = with_defaults(llama, **defaults)
    config = GenerationConfig(**{**model.generation_config.to_dict(), **defaults})
    for name in ("temperature", "top_k", "top_p"):
        setattr(config, name, None)
    config.update(do_sample=False, max_new_tokens=8, max_length=None, num_beams=1)
    wanted = plain(model, tokenizer, generation_config=config)
    assert make_engine(model=model).generate(PROMPT, max_new_tokens=8).token_ids == wanted


def test_stop_strings_of_the_models_own_settings_end_its_answers(make_engine: EngineMaker, llama) -> None:
    whole = make_engine().generate(PROMPT, max_new_tokens=12).text
    stop = whole[len(whole) // 2 :][:4]
    for given in (stop, ["never", stop]):
        found = make_engine(model=with_defaults(llama, stop_strings=given)).generate(PROMPT, max_new_tokens=12)
        assert (found.text, found.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_generating_changes_no_setting_of_the_model(make_engine: EngineMaker, llama) -> None:
    before = llama.generation_config.to_dict()
    make_engine().generate(PROMPT, max_new_tokens=2, temperature=0.5, top_k=3, repetition_penalty=2.0)
    assert llama.generation_config.to_dict() == before


class TestContextWindow:
    def prompt(self, engine, num_tokens: int) -> str:
        return engine.tokenizer.decode([1000] * (num_tokens - 1))

    def test_a_prompt_that_fills_it_is_refused(self, make_engine: EngineMaker) -> None:
        engine = make_engine()
        assert engine.context_window == 512
        for num_tokens in (512, 600):
            with pytest.raises(ContextWindowError, match=rf"{num_tokens} tokens.*up to 511.*512"):
                engine.generate(self.prompt(engine, num_tokens))
        with pytest.raises(ContextWindowError):
            engine.warm([self.prompt(engine, 512)])
        assert engine.stats()["store_entries"] == 0

    def test_an_answer_is_cut_to_what_it_leaves(self, make_engine: EngineMaker, llama) -> None:
        engine = make_engine(model=with_defaults(llama, eos_token_id=None))
        generation = engine.generate(self.prompt(engine, 509), max_new_tokens=100)
        assert len(generation.token_ids) == 3 and generation.finish_reason == "length"

    def test_the_setting_overrules_the_model(self, make_engine: EngineMaker) -> None:
        engine = make_engine(max_context_tokens=10)
        assert engine.context_window == 10
        with pytest.raises(ContextWindowError):
            engine.generate(self.prompt(engine, 10))

    def test_a_model_without_one_is_unbounded(self, make_engine: EngineMaker, tokenizer) -> None:
        engine = make_engine("off", model=make_model("bloom", len(tokenizer), n_head=4, max_position_embeddings=None))
        assert engine.context_window is None
        assert len(engine.generate(PROMPT, max_new_tokens=2).token_ids) == 2
