"""Real text: groups that share documents, gold answers that stand in them, and edits that leave no old number."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b

import pytest

from semsharekv_integrations.lab.answers import holds_answer, is_answer, measure_f1, normalize
from semsharekv_integrations.lab.scenarios import Case, Query
from semsharekv_integrations.lab.texts import (
    CHANGES,
    MULTI_HOP,
    SIZE,
    SYSTEM,
    TEXTS,
    keep_reworded,
    make_news,
    make_text_cases,
    read_items,
    read_passages,
)

GROUPS, QUESTIONS = 12, 4
SIZES = (3, SIZE, 30)
DIGEST = "0e8f42e69c46c60f"  # of 25 groups of every scenario, as they were first drawn


def cases_of(
    name: str, groups: int = GROUPS, questions: int = QUESTIONS, seed: int = 0, size: int = SIZE
) -> list[Case]:
    return list(make_text_cases(name, groups, questions, seed, size=size))


def question_of(query: Query) -> str:
    return query.prompt[-1]["content"].rsplit("Question: ", 1)[1]


def pairs_of(case: Case) -> Iterator[tuple[str, str]]:
    """Texts of the stored and the target's documents, by id where both have it."""
    stored = case.references[0].documents
    return ((stored[key], text) for key, text in case.target.documents.items() if key in stored)


@pytest.mark.parametrize("name", TEXTS)
def test_every_gold_answer_stands_in_the_target_and_the_stored_prompt_asks_something_else(name: str) -> None:
    for case in cases_of(name):
        texts = case.target.documents.values()
        assert case.answer in case.values and any(holds_answer(text, gold) for text in texts for gold in case.values)
        assert all(text in case.target.prompt[1]["content"] for text in texts)
        (stored,) = case.references
        assert question_of(stored) != question_of(case.target)
        assert case.scenario == name and [message["role"] for message in stored.prompt] == ["system", "user"]


@pytest.mark.parametrize("name", TEXTS)
def test_a_case_depends_on_scenario_seed_group_and_place_alone(name: str) -> None:
    few, many = cases_of(name, 2, 2), cases_of(name)
    by_place = {case.place: case for case in many}
    assert few and all(by_place[case.place] == case for case in few)
    assert cases_of(name, 2, 2, seed=1) != few


@pytest.mark.parametrize("name", CHANGES)
def test_cases_of_a_group_share_their_references_and_but_for_edits_their_documents(name: str) -> None:
    groups: dict[int, list[Case]] = {}
    for case in cases_of(name):
        groups.setdefault(case.place[0], []).append(case)
    for number, cases in groups.items():
        assert [case.place for case in cases] == [(number, place) for place in range(len(cases))]
        assert len({question_of(case.target) for case in cases}) == len(cases)
        for case in cases:
            assert case.references == cases[0].references
            assert (
                list(case.target.documents.items()) == list(cases[0].target.documents.items())
            ) or name == "text_edited"


def test_measured_cases_are_drawn_again_as_they_were() -> None:
    """Figures that were published, and runs that go on, are about these."""
    found = repr([cases_of(name, 25, 8) for name in TEXTS if name != "text_reworded_all"])
    assert blake2b(found.encode(), digest_size=8).hexdigest() == DIGEST
    assert cases_of(MULTI_HOP, 3, size=30) == cases_of(MULTI_HOP, 3), "its passages are its own"


@pytest.mark.parametrize("size", SIZES)
def test_groups_have_their_paragraphs_to_themselves_until_all_were_drawn(size: int) -> None:
    groups = len(read_passages()) // size
    cases = cases_of("text_reordered", groups + 1, 1, size=size)
    drawn = [key for case in cases[:groups] for key in case.references[0].documents]
    assert len(set(drawn)) == len(drawn) == len(read_passages())
    assert set(cases[groups].references[0].documents) <= set(drawn)


@pytest.mark.parametrize("size", SIZES)
def test_targets_resemble_what_is_stored_as_their_names_say(size: int) -> None:
    for name in CHANGES:
        for case in cases_of(name, size=size):
            stored, target = case.references[0].documents, case.target.documents
            shared, same = set(stored) & set(target), list(stored) == list(target)
            equal = sum(one == other for one, other in pairs_of(case))
            system = case.target.prompt[0]["content"]
            assert (system != SYSTEM) == (name == "text_system") and len(stored) == len(target) == size
            counts = {"text_shared": size // 2, "text_unlike": 0}
            assert len(shared) == counts.get(name, size)
            is_reworded = name in ("text_reworded", "text_reworded_all")
            assert same == (is_reworded or name in ("text_system", "text_edited", "text_next_turn"))
            assert equal == len(shared) - (name == "text_edited") or is_reworded
            roles = [message["role"] for message in case.target.prompt]
            assert roles == ["system", "user", *(["assistant", "user"] if name == "text_next_turn" else [])]
            if name == "text_next_turn":
                assert case.target.prompt[:2] == case.references[0].prompt


def test_the_stored_order_has_the_same_documents() -> None:
    for name in ("text_reordered", "text_shared", MULTI_HOP):
        for case in cases_of(name):
            assert case.in_order is not None and question_of(case.in_order) == question_of(case.target)
            ordered, target, stored = (
                list(query.documents) for query in (case.in_order, case.target, case.references[0])
            )
            assert sorted(ordered) == sorted(target) and ordered != target
            kept = [key for key in stored if key in target]
            assert ordered[: len(kept)] == kept
    assert all(case.in_order is None for case in cases_of("text_edited"))


def test_an_edit_leaves_the_old_number_in_the_reference_alone() -> None:
    cases = cases_of("text_edited", 20, 8)
    assert len(cases) > 60
    for case in cases:
        stored, target = case.references[0].documents.values(), case.target.documents.values()
        (old,), (new,) = case.stale_values, case.values
        assert old != new and len(old) == len(new) and case.stale == old
        for answer, has, lacks in ((old, stored, target), (new, target, stored)):
            assert any(holds_answer(text, answer) for text in has)
            assert not any(holds_answer(text, answer) for text in lacks)


def test_about_half_of_the_sentences_are_reworded_in_place() -> None:
    known = {passage.id: passage for passage in read_passages()}
    changed = total = 0
    for case in cases_of("text_reworded", 20, 1):
        for key, text in case.target.documents.items():
            rest = text
            for index, sentence in enumerate(known[key].sentences):
                either = {sentence, known[key].reworded.get(index, sentence)}
                said = max((words for words in either if rest.startswith(words)), key=len)
                rest = rest[len(said) :].lstrip()
                changed, total = changed + (said != sentence), total + 1
            assert not rest
    assert 0.4 < changed / total <= 0.5


def test_multi_hop_questions_have_one_case_each_over_ten_passages() -> None:
    cases = cases_of(MULTI_HOP, 1000)
    assert len(cases) == len(read_items()) and {case.place[1] for case in cases} == {0}
    assert all(len(case.target.documents) == 10 for case in cases)
    assert min(len(case.target.prompt[1]["content"].split()) for case in cases) > 2500


@pytest.mark.parametrize(
    ("said", "gold", "is_right", "f1"),
    [
        ("The answer is: 308 points.", "308", True, 2 / 5),
        ("It was the Great Exhibition", "Great Exhibition", True, 4 / 6),
        ("3080 points", "308", False, 0.0),
        ("", "four", False, 0.0),
        ("Four.", "four", True, 1.0),
    ],
)
def test_gold_answers_are_judged_as_squad_does(said: str, gold: str, is_right: bool, f1: float) -> None:
    assert is_answer(said, gold, ("another", gold), "gold") is is_right
    assert measure_f1(said, ["another", gold]) == pytest.approx(f1)


def test_normalized_text_has_no_case_punctuation_or_articles() -> None:
    assert normalize(" The  U.S., an A-Team!") == "us ateam"
    assert measure_f1("the", ["a"]) == 1 and measure_f1("the", ["x"]) == 0


def test_an_unknown_scenario_is_refused() -> None:
    with pytest.raises(ValueError, match="scenario is 'text_x'; accepted is one of text_reordered"):
        cases_of("text_x")


@pytest.mark.parametrize("size", [1, 61])
def test_so_many_paragraphs_that_a_scenario_lacks_others_are_refused(size: int) -> None:
    assert cases_of("text_unlike", 2, 1, size=60)
    with pytest.raises(ValueError, match=f"passages is {size}; accepted is a whole number from 2 to 60"):
        cases_of("text_reordered", size=size)


def test_later_rewordings_have_the_numbers_of_their_sentences_and_half_are_drawn_from_the_earlier_ones_alone() -> None:
    passages = read_passages()
    for passage in passages:
        assert not passage.reworded.keys() & passage.reworded_here.keys()
        for index, text in passage.reworded_here.items():
            source = passage.sentences[index]
            assert text != source and sorted(re.findall(r"\d+", text)) == sorted(re.findall(r"\d+", source))
    without = [replace(passage, reworded_here={}) for passage in passages]
    assert list(make_text_cases("text_reworded", 6, 4, 0, without)) == cases_of("text_reworded", 6)


def test_where_every_sentence_is_reworded_none_stays_as_it_was() -> None:
    kept = {passage.id: passage for passage in keep_reworded(read_passages())}
    whole = {passage.id: passage for passage in read_passages()}
    assert len(kept) > 100
    for passage in kept.values():
        assert list(passage.reworded) == list(range(len(passage.sentences))) and len(passage.sentences) > 1
        places = [whole[passage.id].sentences.index(sentence) for sentence in passage.sentences]
        assert places == sorted(places)
    for case in cases_of("text_reworded_all"):
        for key, text in case.target.documents.items():
            assert text == " ".join(kept[key].reworded.values())
            assert case.references[0].documents[key] == kept[key].text


def test_the_news_has_what_every_scenario_needs() -> None:
    """Questions on each fact, and sentences in other words that state it still."""
    for report in make_news():
        assert len(report.questions) == len({question.text for question in report.questions}) >= 4
        assert all(holds_answer(report.text, gold) for question in report.questions for gold in question.golds)
        assert len(report.reworded) > len(report.sentences) / 2
        reworded = " ".join(report.reworded.get(index, line) for index, line in enumerate(report.sentences))
        assert all(holds_answer(reworded, gold) for question in report.questions for gold in question.golds)
    for name in CHANGES:
        cases = list(make_text_cases(name, 2, 3, 0, make_news()))
        assert len(cases) == 6 and all(key in text for key, text in cases[0].target.documents.items()), name
