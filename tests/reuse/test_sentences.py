"""Where sentences end, and which two of them say the same: facts are equal both ways, and nothing is extra."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from semsharekv_integrations.reuse import synonyms
from semsharekv_integrations.reuse.facts import NEGATIONS, NUMBER_WORDS
from semsharekv_integrations.reuse.sentences import say_the_same, split_sentences

NAMES = ("Ann", "Bob", "Paris", "Rome", "General Motors", "the Broncos", "Dr. Sen", "the U.S.")
# Each with what may stand in its gaps: two names, a number, a unit and a time.
TEMPLATES = (
    "{a} beat {b} by {n} {unit} {time}.",
    "{time}, {a} sold {n} {unit} to {b}.",
    "According to {a}, {b} gained more than {n} {unit}.",
    "Although {a} was late, {b} won {n} {unit} {time}.",
    '"It takes {n} {unit}," said {a}, who had met {b}.',
    "{a} can move at most {n} {unit}, but {b} will move all of them.",
)
UNITS = ("points", "km", "miles", "percent", "million dollars", "euros", "kg", "tons")
TIMES = ("in 1990", "on 3 May 2014", "on Monday", "after the war", "before the war")
FACTS = st.fixed_dictionaries(
    {
        "a": st.sampled_from(NAMES),
        "b": st.sampled_from(NAMES),
        "n": st.integers(0, 10_000),
        "unit": st.sampled_from(UNITS),
        "time": st.sampled_from(TIMES),
    }
).filter(lambda facts: facts["a"] != facts["b"])
WORDS = st.lists(st.text(min_size=1, max_size=12), max_size=30).map(" ".join)


def agree(asked: str, stored: str) -> bool:
    """Whether the two say the same, which must not depend on which is asked."""
    found = say_the_same(asked, stored)
    assert say_the_same(stored, asked) is found
    return found


@given(st.sampled_from(TEMPLATES), FACTS, FACTS)
def test_sentences_of_one_form_say_the_same_only_with_the_same_facts(template: str, facts: dict, other: dict) -> None:
    one, two = template.format(**facts), template.format(**other)
    assert agree(one, two) is (one == two)


@given(st.sampled_from(TEMPLATES), FACTS, st.sampled_from(("n", "unit", "time")), FACTS)
def test_one_changed_fact_is_refused(template: str, facts: dict, key: str, other: dict) -> None:
    assume("{" + key + "}" in template and facts[key] != other[key])
    assert not agree(template.format(**facts), template.format(**{**facts, key: other[key]}))


@given(st.sampled_from(TEMPLATES), FACTS)
def test_swapped_names_are_refused(template: str, facts: dict) -> None:
    assert not agree(template.format(**facts), template.format(**{**facts, "a": facts["b"], "b": facts["a"]}))


@given(WORDS, st.integers(0, 30), st.sampled_from(sorted(NEGATIONS)))
def test_a_negation_more_is_refused(text: str, place: int, negation: str) -> None:
    words = text.split()
    negated = " ".join([*words[:place], negation, *words[place:]])
    assert not agree(text, negated)


@given(WORDS, WORDS)
def test_the_judgement_is_symmetric_and_every_sentence_says_what_it_says(one: str, two: str) -> None:
    assert agree(one, one) and agree(two, two)
    agree(one, two)


@pytest.mark.parametrize(
    ("asked", "stored"),
    [
        ("In 1990, the company bought it.", "The company purchased it in 1990."),
        ("It cost $5 million on 7 January 1943.", "It cost 5 million dollars on January 7, 1943."),
        ('"It rained," he said.', "He said that it rained."),
        ("He didn't go.", "He did not go."),
        ("Over 300 of the 1,200 people came.", "More than 300 of the 1200 people came."),
        ("Twenty-five percent, or 0.25", "25 per cent, or 0.25"),
        ("No fewer than five came.", "At least 5 came."),
        ("Although he won, he wept.", "He won, but he wept."),
        ("The bridge, which was built in 1990, fell.", "The bridge, built in 1990, fell."),
        ("It is usually red, Ford and Fiat said.", "It usually is red, Ford, and Fiat said."),
        ("However, heat is also lost.", "Heat is lost."),
        ("The U.S. Army", "the US army"),
        ("After the war, prices fell.", "Prices fell after the war."),
        ("In 1990, he moved to the city.", "He moved to the city in 1990."),
        ("It came late, which led to a war.", "It came late, leading to a war."),
        ("The most useful tool is the lamp.", "The lamp is the most useful tool."),
        ("It is located in Rome now.", "It is in Rome now."),
        ("Despite the fact that he won, he wept.", "He won, but he wept."),
    ],
)
def test_other_words_for_the_same(asked: str, stored: str) -> None:
    assert agree(asked, stored)


@pytest.mark.parametrize(
    ("asked", "stored"),
    [
        ("The Panthers gave up just 308 points.", "The Panthers lost 308 points."),
        ("A beat B.", "B was beaten by A."),
        ("It rose from 3 to 5.", "It rose from 5 to 3."),
        ("He plans to leave.", "He left."),
        ("It may rain.", "It will rain."),
        ("All of them came.", "Some of them came."),
        ("A few came.", "Few came."),
        ("It is not red, but blue.", "It is not red and blue."),
        ("He won the most games.", "He won most games."),
        ("He did all but two.", "He did all and two."),
        ("The talks went on over three days.", "The talks went on more than three days."),
        ("It is less than 50.", "It is at most 50."),
        ("It is 5 percent up.", "It is 5 percentage points up."),
        ("It uses 5 MW.", "It uses 5 mW."),
        ("It fell .5 points to -5.", "It fell 5 points to -5."),
        ("It fell to -5.", "It fell to 5."),
        ("They lost -$5.", "They lost $5."),
        ("Python 3.10 is out.", "Python 3.1 is out."),
        ("twenty five-year plans", "25 year plans"),
        ("WHO said that it rained.", "Who said that it rained."),
        ("The US won.", "Us won."),
        ("Big Ben is old.", "Large Ben is old."),
        ("Is it new?", "It is new."),
        ("x = 5", "x  =  6"),
        ("Only he came.", "He only came."),
        ("In 1990, he said that the war began.", "He said that the war began in 1990."),
        ("On Monday, she believed that he died.", "She believed that he died on Monday."),
        ("On Monday, he plans to leave.", "He plans to leave on Monday."),
        ("In Rome, Ann slept and Bob sang.", "Ann slept and Bob sang in Rome."),
        ("The blades, which are fixed, turn.", "The blades, which were fixed, turn."),
        ("The road, which leads to Rome.", "The road leads to Rome."),
        ("Ann, a friend of Bob, said it rained.", "Bob, a friend of Ann, said it rained."),
        ("He met the president and Tom Smith.", "He met the president, Tom Smith."),
        ("Не пришёл", "Пришёл"),
        ("他没有来", "他来了"),
        ("Ann said so.", "She said so."),
        ("The fall was steep in Rome.", "The fall was steep."),
    ],
)
def test_other_facts(asked: str, stored: str) -> None:
    assert not agree(asked, stored)


def test_no_meaning_stands_twice_and_none_hides_a_negation_or_a_number() -> None:
    tables = (synonyms._WORDS, synonyms._SPELLINGS)
    counts = Counter(word for table in tables for meaning in synonyms._read(table) for word in meaning)
    assert [word for word, count in counts.items() if count > 1] == []
    facts = (NEGATIONS | NUMBER_WORDS) - {"percent", "billion", "may"}
    assert not facts & synonyms.WORDS.keys() and not facts & (synonyms.LIGHT | synonyms.LINKS)


@pytest.mark.parametrize(
    "pieces",
    [
        ["Dr. Smith went to the U.S. Senate.", "He met J. Smith, e.g. on Monday.", "It cost 3.5 million."],
        ['"No."', "She left!", "Really?", 'He said "no."', "Then left."],
        ["It works at Apple Inc.", "The firm grew.", "See Fig. 3.", "Wait... what?"],
        ["A [5] note.[5]", "Next one.[citation needed]", "Third"],
        [
            "# A heading",
            "- an item",
            "| a. B | c. D |",
            "x = y. Z;",
            "Wrapped prose that is much longer than a\nline.",
        ],
        ["他没有来。", "他走了！", "好。"],
    ],
)
def test_where_sentences_end(pieces: list[str]) -> None:
    glue = "" if "。" in pieces[0] else "\n" if pieces[0].startswith("#") else " "
    text = glue.join(pieces)
    found = [text[start:stop] for start, stop in split_sentences(text)]
    assert found == pieces


@given(st.text(alphabet=st.sampled_from("aB1 .\n!?\"'()-|。Dr"), max_size=80))
def test_sentences_hold_all_but_the_blanks_in_order(text: str) -> None:
    spans = split_sentences(text)
    assert "".join(text[start:stop] for start, stop in spans).split() != [] or not text.split()
    edges = [edge for span in spans for edge in span]
    assert edges == sorted(edges) and all(start < stop for start, stop in spans)
    assert all(text[start:stop] == text[start:stop].strip() for start, stop in spans)
    rest = [text[start:stop] for start, stop in zip([0, *edges[1::2]], [*edges[::2], len(text)], strict=True)]
    assert not "".join(rest).strip()
