"""Drawn scenarios: the target states the right answer to what is asked, the references a stale one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import drawn
from semsharekv_integrations import world
from semsharekv_integrations.lab.scenarios import Case, Query

CASES = 25
SIZES = (2, 5)
CONTRADICTING = ("edited", "changed", "swapped")
each_scenario = pytest.mark.parametrize("name", drawn.DRAWN)


def cases(name: str, seed: int = 0, sizes: tuple[int, int] = SIZES, num_cases: int = CASES) -> list[Case]:
    return list(drawn.make_cases(name, num_cases, seed, sizes))


def text_of(query: Query) -> str:
    prompt = query.prompt
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def question_of(query: Query) -> tuple[str, str]:
    """Town and kind of what a prompt asks last, by its words alone."""
    asked = [
        (town, kind.name)
        for kind in world.KINDS.values()
        for question in kind.questions
        for town in query.documents
        if text_of(query).endswith(tuple(question.format(t=town) + end for end in ENDS))
    ]
    assert len(asked) == 1, text_of(query)[-200:]
    return asked[0]


ENDS = ("", "\nAnswer:", "\nAnswer: ", "\nHelpful Answer:")


def answers(query: Query, town: str, kind: str) -> list[str]:
    """What the query's documents state of this kind, read out of their text."""
    text = query.documents.get(town, "")
    found = []
    for statement in world.KINDS[kind].statements:
        before, after = statement.format(t=town, v="\0").split("\0")
        rest = text.partition(f" {before}")[2]
        found += [world.KINDS[kind].answer(town, rest[: rest.index(after)])] if rest else []
    return found


def wrong_cases(case: Case) -> Iterator[str]:
    town, kind = question_of(case.target)
    if case.answer not in answers(case.target, town, kind):
        yield "the target does not state the answer"
    said = {answer for reference in case.references for answer in answers(reference, town, kind)}
    if case.stale is None and said - {case.answer}:
        yield "the references say otherwise, and nothing is stale"
    if case.stale is not None and (case.stale not in said or case.stale == case.answer):
        yield "the stale answer is not the references'"
    if any(text not in text_of(case.target) for text in case.target.documents.values()):
        yield "a document does not stand in the target"
    if any(text not in text_of(r) for r in case.references for text in r.documents.values()):
        yield "a document does not stand in its reference"


@each_scenario
def test_the_documents_state_the_right_and_the_stale_answer(name: str) -> None:
    for case in cases(name):
        assert not list(wrong_cases(case)), case
        assert (case.stale is not None) == (name in CONTRADICTING)


@each_scenario
def test_a_case_depends_on_seed_and_index_alone(name: str) -> None:
    assert cases(name, 3) == cases(name, 3)
    assert cases(name, 3, num_cases=4) == cases(name, 3)[:4]
    assert cases(name, 3) != cases(name, 4)
    assert len(set(map(str, cases(name, 3)))) == CASES


@each_scenario
def test_the_number_of_documents_keeps_its_range(name: str) -> None:
    assert {len(case.target.documents) for case in cases(name, num_cases=60)} == set(range(2, 6))
    assert {len(case.target.documents) for case in cases(name, sizes=(3, 3))} == {3}
    for sizes in ((1, 3), (4, 3), (2, drawn.MAX_DOCUMENTS + 1)):
        with pytest.raises(ValueError, match="num_documents is"):
            drawn.make_cases(name, 1, 0, sizes)


@each_scenario
def test_no_document_of_the_target_stands_in_a_shared_prefix(name: str) -> None:
    for case in cases(name):
        target = text_of(case.target)
        ends = [target.index(text) + len(text) for text in case.target.documents.values()]
        for reference in case.references:
            assert not text_of(reference).startswith(target[: min(ends)])


@each_scenario
def test_the_question_differs_in_place_and_kind(name: str) -> None:
    asked = [
        (list(case.target.documents).index(question_of(case.target)[0]), question_of(case.target)[1])
        for case in cases(name, sizes=(4, 4), num_cases=80)
    ]
    assert {place for place, _ in asked} == set(range(4))
    assert len({kind for _, kind in asked}) >= 5


def documents(case: Case) -> tuple[dict[str, str], dict[str, str]]:
    """Those of all references together, and those of the target: texts by town."""
    return {town: text for r in case.references for town, text in r.documents.items()}, dict(case.target.documents)


def test_reordered_documents_are_the_same_in_another_order() -> None:
    for case in cases("reordered"):
        seen, target = documents(case)
        assert seen == target and list(seen) != list(target)


def test_half_of_the_shared_documents_are_known() -> None:
    found = cases("shared", num_cases=40)
    for case in found:
        seen, target = documents(case)
        assert len(seen.items() & target.items()) == len(seen.keys() & target.keys()) == len(target) // 2
    assert {len(case.references) for case in found} == {1, 2}


@pytest.mark.parametrize("name", ["reworded", *CONTRADICTING])
def test_other_words_or_facts_on_the_same_towns(name: str) -> None:
    for case in cases(name, sizes=(4, 4)):
        seen, target = documents(case)
        assert seen.keys() == target.keys() and not seen.items() & target.items()


def test_nothing_is_alike_in_the_negative_control() -> None:
    for case in cases("unlike"):
        seen, target = documents(case)
        assert not seen.keys() & target.keys()


def test_a_turn_follows_on_the_reference_and_asks_something_new() -> None:
    lengths = set()
    for case in cases("turns"):
        before, after = case.references[0].prompt, case.target.prompt
        assert before[1:] == after[1:-2] and before[0] != after[0]
        assert [message["role"] for message in after] == [
            "system",
            *["user", "assistant"] * (len(after) // 2 - 1),
            "user",
        ]
        assert case.answer not in text_of(Query(after[1:], {}))
        lengths.add(len(after))
    assert lengths == {4, 6, 8}


def opening(query: Query) -> str:
    text = text_of(query)
    return text[: min(map(text.index, query.documents.values()))]


def test_templates_change_for_some_cases_and_stay_for_others() -> None:
    found = cases("changed", num_cases=40)
    same = [opening(case.references[0]) == opening(case.target) for case in found]
    assert 0.35 < sum(same) / len(same) < 0.8
    assert {isinstance(case.target.prompt, str) for case in found} == {True, False}
    plain = drawn.make_cases("changed", 10, 0, SIZES, layouts=["completion"])
    assert all(isinstance(q.prompt, str) for case in plain for q in (*case.references, case.target))


@each_scenario
def test_a_case_names_the_facts_that_its_answers_hold(name: str) -> None:
    for case in cases(name):
        town, kind = question_of(case.target)
        assert case.asked == town and case.answer == world.KINDS[kind].answer(town, *case.values)
        assert case.stale == (world.KINDS[kind].answer(town, *case.stale_values) if case.stale_values else None)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="scenario is 'rewarded'; accepted is one of reordered"):
        drawn.make_cases("rewarded", 1, 0)
    with pytest.raises(ValueError, match=r"layouts is \[\]; accepted is one or more"):
        drawn.make_cases("shared", 1, 0, layouts=[])
