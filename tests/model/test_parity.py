"""Mode ``off`` equals plain ``generate``; mode ``exact`` equals ``off``: token for token, for every architecture."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from semsharekv_integrations import EngineConfig, Generation, ReuseConfig, SemShareEngine, world
from tiny_models import ARCHITECTURES, make_model

NEW_TOKENS = 7
FIRST, SECOND = (document.text for document in world.make_documents(Random(3), 2, extra_facts=1))
PROMPTS = {
    "first": f"{FIRST}\n\nWhat happened?",
    "longer": f"{FIRST}\n\nWhat happened? And then?",
    "branch": f"{FIRST}\n\nWho was the mayor?",
    "again": f"{FIRST}\n\nWhat happened?",
    "unlike": f"{SECOND}\n\nWhat happened?",
}


def double(architecture: str, tokenizer: PreTrainedTokenizerBase, **changes: object) -> PreTrainedModel:
    """In float64, no rounding flips the most likely token."""
    return make_model(architecture, len(tokenizer), **changes).double()


def plain_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, **options: object
) -> list[int]:
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, **{"do_sample": False, "max_new_tokens": NEW_TOKENS, **options})
    return output[0, inputs.input_ids.shape[1] :].tolist()


def engine_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, mode: str) -> SemShareEngine:
    return SemShareEngine(model, tokenizer, EngineConfig(reuse=ReuseConfig(mode=mode)))  # type: ignore[arg-type]


def assert_adds_up(generation: Generation) -> None:
    report = generation.report
    parts = (report.prefix_tokens, report.identical_tokens, report.fuzzy_tokens, report.recomputed_tokens)
    assert sum(parts) == report.prompt_tokens
    assert report.compute_ratio == pytest.approx(report.recomputed_tokens / report.prompt_tokens)
    assert report.output_tokens == len(generation.token_ids)
    assert sum(source.tokens for source in report.sources) == report.prefix_tokens == report.reused_tokens


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prompts(architecture: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = double(architecture, tokenizer)
    off, exact = engine_of(model, tokenizer, "off"), engine_of(model, tokenizer, "exact")
    reused = {}
    for name, prompt in PROMPTS.items():
        wanted = off.generate(prompt, max_new_tokens=NEW_TOKENS)
        found = exact.generate(prompt, max_new_tokens=NEW_TOKENS)
        assert wanted.token_ids == plain_tokens(model, tokenizer, prompt), name
        assert (found.token_ids, found.text, found.finish_reason) == (
            wanted.token_ids,
            wanted.text,
            wanted.finish_reason,
        ), name
        assert_adds_up(wanted)
        assert_adds_up(found)
        assert wanted.report.prefix_tokens == 0 and wanted.report.declined is None
        reused[name] = found.report.prefix_tokens
        exact.store.check()
    document_tokens = len(tokenizer(FIRST).input_ids)
    assert reused["first"] == 0
    assert document_tokens > 9  # longer than the sliding windows
    assert min(reused["longer"], reused["branch"]) >= document_tokens
    assert reused["again"] == len(tokenizer(PROMPTS["again"]).input_ids) - 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_conversation(architecture: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = double(architecture, tokenizer)
    off, exact = engine_of(model, tokenizer, "off"), engine_of(model, tokenizer, "exact")
    messages = [{"role": "system", "content": FIRST}]
    found = []
    for question in ("What happened?", "Who was the mayor?", "What was the cost?"):
        messages.append({"role": "user", "content": question})
        wanted = off.generate(messages, max_new_tokens=NEW_TOKENS)
        found.append(exact.generate(messages, max_new_tokens=NEW_TOKENS))
        assert found[-1].token_ids == wanted.token_ids
        assert_adds_up(found[-1])
        messages.append({"role": "assistant", "content": found[-1].text})
    for earlier, later in pairwise(found):
        assert later.report.prefix_tokens >= earlier.report.prompt_tokens


def test_sliding_windows_matter(tokenizer: PreTrainedTokenizerBase) -> None:
    """Else the parity above would say nothing about them."""
    narrow, wide = (double("mistral", tokenizer, sliding_window=window) for window in (9, 400))
    prompt = PROMPTS["first"]
    assert plain_tokens(narrow, tokenizer, prompt) != plain_tokens(wide, tokenizer, prompt)


def longrope(limit: int) -> dict[str, object]:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [7.0] * 4, "rope_theta": 10000.0}
    return {
        "rope_parameters": {**rope, "original_max_position_embeddings": limit},
        "original_max_position_embeddings": limit,
    }


@pytest.mark.parametrize("beyond", [-20, -3, 0, 5])
def test_rope_that_depends_on_length(beyond: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prompts that end before, shortly before (the answer crosses), at and beyond the switch of frequencies."""
    prompt = PROMPTS["longer"]
    limit = len(tokenizer(prompt).input_ids) - beyond
    model = double("phi3", tokenizer, **longrope(limit))
    off, exact = engine_of(model, tokenizer, "off"), engine_of(model, tokenizer, "exact")
    for text in (PROMPTS["first"], prompt, prompt):
        wanted = plain_tokens(model, tokenizer, text)
        assert off.generate(text, max_new_tokens=NEW_TOKENS).token_ids == wanted
        found = exact.generate(text, max_new_tokens=NEW_TOKENS)
        assert found.token_ids == wanted
        assert all(len(reference.token_ids) <= limit for reference in exact.store.references())
    if beyond > 0:
        assert found.report.prefix_tokens == 0 and "frequencies" in (found.report.declined or "")
    elif beyond < -NEW_TOKENS:  # else the answer ends beyond the switch, and nothing of it is kept
        assert found.report.prefix_tokens > 0
