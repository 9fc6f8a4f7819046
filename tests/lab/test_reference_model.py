"""The model that ships reads its prompt, and reuse does not change what it says."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random

import pytest

from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine, world
from semsharekv_integrations.model.loading import REFERENCE_MODEL, resolve

NUM_PROMPTS = 16


@cache
def engine(mode: str) -> SemShareEngine:
    return SemShareEngine.from_pretrained(REFERENCE_MODEL, EngineConfig(reuse=ReuseConfig(mode=mode)))  # type: ignore[arg-type]


def answer(mode: str, prompt: str | list[world.Message]) -> str:
    return engine(mode).generate(prompt, max_new_tokens=40).text.strip()


@pytest.mark.parametrize("layout", world.LAYOUTS)
@pytest.mark.parametrize("num_documents", [1, 2])
def test_held_out_questions_are_answered_and_reuse_changes_nothing(layout: world.Layout, num_documents: int) -> None:
    rng = Random(f"{layout} {num_documents}")
    right = 0
    wraps = range(num_documents - 1, NUM_PROMPTS, 2)
    for wrap in wraps:
        documents = world.make_documents(rng, num_documents)
        question, expected = world.ask(rng, rng.choice(documents))
        prompt = world.build_prompt(layout, documents, question, wrap)
        said = answer("off", prompt)
        assert said == answer("exact", prompt)
        right += said == expected
    assert right >= 0.85 * len(wraps)  # the model card has the shares, measured on many more


def test_answers_follow_the_documents_not_the_model() -> None:
    """Changing one fact in the document changes the answer to it, and to nothing else."""
    rng = Random(3)
    followed = 0
    for _ in range(NUM_PROMPTS):
        [document] = world.make_documents(rng, 1)
        kind = rng.choice(sorted(document.facts))
        edited = world.edit(rng, document, (kind,))
        question, expected = world.ask(rng, edited, kind)
        followed += answer("exact", world.build_prompt("system", [edited], question)) == expected
    assert followed >= 0.85 * NUM_PROMPTS


def test_next_turns_compute_only_what_is_new() -> None:
    rng = Random(5)
    documents = world.make_documents(rng, 2)
    messages = world.build_prompt("user", documents, world.ask(rng, documents[0])[0])
    assert isinstance(messages, list)
    before = 0
    for _ in range(4):
        generation = engine("exact").generate(messages, max_new_tokens=40, namespace="turns")
        assert generation.finish_reason == "stop"
        assert generation.text == answer("off", messages)
        assert generation.report.prefix_tokens == before
        before = generation.report.prompt_tokens + generation.report.output_tokens - 1
        question, _ = world.ask(rng, rng.choice(documents))
        messages = [*messages, {"role": "assistant", "content": generation.text}, {"role": "user", "content": question}]


def test_weights_are_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in Path(resolve(REFERENCE_MODEL)).iterdir()) <= 15 * 1024**2
