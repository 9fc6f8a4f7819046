"""Scenarios at a length: prompts as long as they are asked to be, that resemble what was seen as their names say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerBase

from semsharekv_integrations.lab.scenarios import Case
from semsharekv_integrations.text.prompt import PromptRenderer
from sized import SIZED, make_sized_case

Builder = Callable[[str, int], Case]


@pytest.fixture(scope="module")
def built(tokenizer: PreTrainedTokenizerBase) -> Builder:
    renderer = PromptRenderer(tokenizer)
    return lambda name, length: make_sized_case(
        name, length, 3, lambda prompt: len(renderer.render(prompt, {}).token_ids)
    )


@pytest.mark.parametrize("length", [350, 700])
@pytest.mark.parametrize("name", SIZED)
def test_prompts_have_about_the_length_asked_for(
    name: str, length: int, built: Builder, tokenizer: PreTrainedTokenizerBase
) -> None:
    case = built(name, length)
    tokens = PromptRenderer(tokenizer).render(case.target.prompt, case.target.documents)
    assert case.scenario == name and 0 <= length - len(tokens.token_ids) < 90
    assert len(tokens.segments) == len(case.target.documents) >= 2, "every document stands in the prompt"
    assert built(name, length) == case


@pytest.mark.parametrize("name", SIZED)
def test_a_right_answer_stands_in_the_prompt(name: str, built: Builder) -> None:
    cases = [built(name, length) for length in range(400, 1600, 150)]
    known = [case for case in cases if case.answer is not None]
    assert len(known) > len(cases) / 2, "those whose sentence was cut off have none"
    for case in known:
        (value,) = case.values
        assert value in case.answer and any(value in text for text in case.target.documents.values())


@pytest.mark.parametrize(
    ("name", "common"),
    [("reordered", 1.0), ("shared", 0.5), ("reworded_10", 0.0), ("reworded_50", 0.0), ("unlike", 0.0)],
)
def test_prompts_resemble_what_was_seen_as_their_names_say(name: str, common: float, built: Builder) -> None:
    case = built(name, 1500)
    (reference,) = case.references
    seen, asked = list(reference.documents.values()), list(case.target.documents.values())
    assert sum(text in seen for text in asked) == int(common * len(asked))
    assert seen[0] != asked[0], "an exact prefix holds no document"


def test_other_words_are_of_the_share_asked_for(built: Builder) -> None:
    for share in (0.1, 0.3, 0.5):
        case = built(f"reworded_{share:.0%}"[:-1], 1500)
        sentences = [
            [text.split(". ") for text in query.documents.values()] for query in (*case.references, case.target)
        ]
        pairs = [
            (old, new)
            for before, after in zip(*sentences, strict=True)
            for old, new in zip(before, after, strict=False)
        ]
        assert share - 0.12 < sum(old != new for old, new in pairs) / len(pairs) < share + 0.12


def test_a_next_turn_goes_on_from_the_last_reply(built: Builder) -> None:
    case = built("next_turn", 600)
    (reference,) = case.references
    assert case.target.prompt[:-1] == reference.prompt
    assert (reference.prompt[-1]["role"], case.target.prompt[-1]["role"]) == ("assistant", "user")


def test_what_is_too_short_or_unknown_is_refused(built: Builder) -> None:
    with pytest.raises(ValueError, match=r"length is 50; accepted is .* tokens or more in scenario 'shared'"):
        built("shared", 50)
    with pytest.raises(ValueError, match="scenario is 'foo'; accepted is one of next_turn, reordered"):
        built("foo", 500)
