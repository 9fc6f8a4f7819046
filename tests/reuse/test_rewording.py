"""Stored wordings without a model: how tokens are exchanged, where sentences end in them, and which may be reworded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semsharekv_integrations.kv import Rendered, Segment, Substitution, invert, substitute
from semsharekv_integrations.reuse.rewording import find_asked_about, list_eligible, split_tokens
from semsharekv_integrations.text.prompt import PromptRenderer

MARK = 1000  # what is exchanged has ids from here on


@st.composite
def exchanges(draw: st.DrawFn) -> tuple[np.ndarray, list[Substitution]]:
    """Token ids, and substitutions in them, in order."""
    edges = sorted(draw(st.sets(st.integers(0, 30), max_size=8)))
    found = []
    for start, stop in zip(edges[::2], edges[1::2], strict=False):
        length = draw(st.integers(1, 6))
        found.append(Substitution(start, stop, np.arange(MARK + 10 * start, MARK + 10 * start + length)))
    return np.arange(30), found


@given(exchanges())
def test_what_is_exchanged_can_be_turned_back(drawn: tuple[np.ndarray, list[Substitution]]) -> None:
    asked, made = drawn
    read = substitute(asked, made)
    back = invert(asked, made)
    assert np.array_equal(substitute(read, back), asked)
    assert len(read) == len(asked) + sum(each.growth for each in made)
    again = invert(read, back)
    assert [each[:2] for each in again] == [each[:2] for each in made]
    assert all(np.array_equal(a.token_ids, b.token_ids) for a, b in zip(again, made, strict=True))


@given(exchanges(), st.integers(0, 30), st.integers(0, 30))
def test_ranges_keep_their_tokens_and_widen_over_what_they_cut(
    drawn: tuple[np.ndarray, list[Substitution]], first: int, second: int
) -> None:
    asked, made = drawn
    start, stop = sorted((first, second))
    segment = Segment("a", start, stop)
    rendered = Rendered(asked, [segment], [segment], (start, stop), {"b": start})
    read = rendered.substitute(made)
    (moved,) = read.segments
    inside = read.token_ids[moved.start : moved.stop]
    assert read.passages == [moved] and read.question == (moved.start, moved.stop)
    touched = [each for each in made if each.start < stop and start < each.stop]
    own = [n for n in range(start, stop) if not any(each.start <= n < each.stop for each in made)]
    assert [n for n in inside.tolist() if n < MARK] == own
    wanted = [n for each in touched for n in each.token_ids.tolist()]
    assert [n for n in inside.tolist() if n >= MARK] == wanted
    assert read.unplaced["b"] <= moved.start or not touched


@pytest.mark.parametrize(
    ("pieces", "wanted"),
    [
        (["It", " is", " so", ".", " No", " more", "."], [(0, 4, "", ""), (4, 7, " ", "")]),
        (["It", " is", " so", ".\n\n"], [(0, 4, "", "\n\n")]),
        (["It", " is", " so", ". No", " more", "."], []),  # both have a part of one token
        (["▁It", "▁is", "▁so", ".", "▁No", "▁more", "."], [(0, 4, " ", ""), (4, 7, " ", "")]),
        (["It", " is", "\ufffd", "\ufffd", ".", " No", "."], [(5, 7, " ", "")]),
    ],
)
def test_sentences_end_between_tokens(pieces: list[str], wanted: list[tuple[Any, ...]]) -> None:
    assert [(each.start, each.stop, each.lead, each.trail) for each in split_tokens(pieces)] == wanted


@pytest.fixture(scope="module")
def renderer(tokenizer) -> PromptRenderer:
    return PromptRenderer(tokenizer)


def test_only_documents_may_change_or_passages_of_the_last_turn(renderer: PromptRenderer) -> None:
    texts = {"one": "The flood hit Prorna in May .", "two": "The fire was in Velmar in June ."}
    content = "\n\n".join([*texts.values(), "Who was there ?"])
    turns = [
        {"role": "system", "content": "Read this .\n\nThen answer ."},
        {"role": "user", "content": "The mayor said so .\n\nIs it so ?"},
        {"role": "assistant", "content": "It is so .\n\nThe mayor did say so ."},
        {"role": "user", "content": content},
    ]
    for documents in (texts, {}):
        rendered = renderer.render(turns, documents)
        eligible = list_eligible(rendered)
        assert [renderer.decode(rendered.token_ids[s.start : s.stop]).strip() for s in eligible] == [*texts.values()]
    text = renderer.render("\n\n".join(["Read this .", content]), {})
    found = [renderer.decode(text.token_ids[s.start : s.stop]).strip() for s in list_eligible(text)]
    assert found == ["Read this .", *texts.values()]


def test_what_the_question_is_about_comes_first(renderer: PromptRenderer) -> None:
    texts = {"one": "The flood hit Prorna in May .", "two": "The fire was in Velmar in June .", "three": "Wait ."}
    rendered = renderer.render("\n\n".join([*texts.values(), "What about the fire in Velmar ?"]), texts)
    question = np.zeros(len(rendered.token_ids), dtype=bool)
    question[rendered.segments[-1].stop :] = True
    assert find_asked_about(rendered, question)[0] == rendered.segments[1][1:]
    (alone,) = (renderer.render(f"{texts['one']}\n\nWho ?", {"one": texts["one"]}),)
    assert find_asked_about(alone, np.arange(len(alone.token_ids)) > 12) == [alone.segments[0][1:]]
