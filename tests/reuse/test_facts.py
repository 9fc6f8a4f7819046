"""The fact guard: what changes the meaning is guarded, what only changes the wording is not."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from semsharekv_integrations import world
from semsharekv_integrations.reuse.facts import find_guarded_tokens, find_unlike_facts


def words_of(text: str) -> list[str]:
    """Pieces as a tokenizer with whole words would make them; later words have a leading space."""
    first, *rest = text.split(" ")
    return [first, *(" " + word for word in rest)]


def guarded(text: str) -> list[str]:
    pieces = words_of(text)
    return [piece.strip() for piece, flag in zip(pieces, find_guarded_tokens(pieces), strict=True) if flag]


def pieces_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    return [tokenizer.decode([i]) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the cost was 31 million crowns", ["31", "million"]),
        ("about 4,500 people and 3.5 tons", ["4,500", "3.5"]),
        ("rates fell by 5% to -2", ["5%", "-2"]),
        ("it cost 5 $ or 5 € that day", ["5", "$", "5", "€"]),
        ("the 1st and twenty-one others", ["1st", "twenty-one"]),
        ("half of them came twice", ["half", "twice"]),
        ("we met Anna Belmor there", ["Anna", "Belmor"]),
        ("an iPhone for NATO", ["iPhone", "NATO"]),
        ("the day was in May", ["May"]),
        ("they did not come and never will", ["not", "never"]),
        ("she didn't and can’t go", ["didn't", "can’t"]),
        ("cannot go without it, nor stay", ["cannot", "without", "nor"]),
        ("er hat nicht bezahlt", ["nicht"]),
        ("он не пришёл", ["не"]),
        ("a café in the north", []),
        ("many people offered their help", []),
        ("", []),
    ],
)
def test_numbers_names_and_negations(text: str, expected: list[str]) -> None:
    assert guarded(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The road is open. It was closed! Why? We know.", []),
        ("It's open. They've left.", []),
        ("Dunvik is calm. Anna said so.", ["Dunvik", "Anna"]),
        ("calm in The Hague", ["The", "Hague"]),
        ("May said so. Will left.", ["May", "Will"]),
        ("No road is open. Nobody came.", ["No", "Nobody"]),
        ("Two roads. Seven came.", ["Two", "Seven"]),
        ("we saw Dr. It and J. The", ["Dr.", "It", "J.", "The"]),
        ('he left." The road', []),
        ("THE ROAD", ["THE", "ROAD"]),
    ],
)
def test_sentence_starts(text: str, expected: list[str]) -> None:
    assert guarded(text) == expected


def test_a_new_line_starts_a_sentence() -> None:
    assert not find_guarded_tokens([" calm", "\n\n", "The", " road"]).any()
    assert find_guarded_tokens([" calm", " ", "The", " road"]).tolist() == [False, False, True, False]


@pytest.mark.parametrize("text", ["东京的市长", "القاهرة", "ירושלים", "กรุงเทพฯ", "ベルリン", "हिन्दी"])
def test_scripts_without_case_are_guarded_whole(text: str) -> None:
    assert find_guarded_tokens([" in", f" {text[:2]}", text[2:], " now"]).tolist() == [False, True, True, False]


def test_names_in_other_scripts_with_case() -> None:
    assert guarded("мэр города Москва") == ["Москва"]
    assert guarded("ο δήμαρχος στην Αθήνα") == ["Αθήνα"]


def test_all_pieces_of_a_word_share_its_fate_and_punctuation_does_not() -> None:
    pieces = [
        "the",
        " mayor",
        " of",
        " Pr",
        "orna",
        "mar",
        ",",
        " (",
        "12",
        ",",
        "000",
        ")",
        ".",
        " did",
        "n",
        "'",
        "t",
    ]
    expected = [False] * 3 + [True] * 3 + [False] * 2 + [True] * 3 + [False] * 2 + [True] * 4
    assert find_guarded_tokens(pieces).tolist() == expected


def test_a_sign_before_a_number_is_part_of_it_and_a_dash_before_a_name_is_not() -> None:
    assert find_guarded_tokens([" to", " -", "2", " and", " .", "5"]).tolist() == [False, True, True, False, True, True]
    assert find_guarded_tokens([" to", " -", "Anna"]).tolist() == [False, False, True]


def test_sentencepiece_marks_are_spaces() -> None:
    pieces = ["▁we", "▁met", "▁An", "na", "▁", "3", "1", "▁times", ""]
    assert find_guarded_tokens(pieces).tolist() == [False, False, True, True, False, True, True, False, False]


def test_a_piece_that_holds_the_end_of_a_guarded_word_is_guarded() -> None:
    assert find_guarded_tokens(["in 19", "84 it", " was"]).tolist() == [True, True, False]


def test_parts_of_characters_are_guarded(tokenizer: PreTrainedTokenizerBase) -> None:
    pieces = pieces_of(tokenizer, "in 東京 now")
    flags = find_guarded_tokens(pieces)
    assert "\ufffd" in "".join(pieces)
    assert all(flag == ("\ufffd" in piece) for piece, flag in zip(pieces, flags, strict=True) if piece.strip())


@pytest.mark.parametrize("word", ["Gwendolyn", "Prornamar's", "didn't", "4,507", "U.S.A", "Zürich"])
def test_words_of_many_pieces_with_the_shipped_tokenizer(tokenizer: PreTrainedTokenizerBase, word: str) -> None:
    before, inside, behind = (pieces_of(tokenizer, text) for text in ("we know", f" {word}", ", they said"))
    assert len(inside) > 2
    flags = find_guarded_tokens([*before, *inside, *behind])
    of_word = [bool(piece.strip()) for piece in inside]  # a space of its own is no part of the word
    assert flags.tolist() == [False] * len(before) + of_word + [False] * len(behind)


def test_every_value_that_an_edit_changes_is_guarded_unless_it_is_plain_words(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    rng = Random(3)
    kinds = ("date", "affected", "cost", "mayor", "chief", "company", "road")
    for document in world.make_documents(rng, 20, extra_facts=6):
        changed = world.edit(rng, document, tuple(kind for kind in kinds if kind in document.facts))
        first, second = pieces_of(tokenizer, document.text), pieces_of(tokenizer, changed.text)
        assert first != second and free_words(first) == free_words(second)


def free_words(pieces: list[str]) -> list[str]:
    """What is not guarded, without the capitals that are free or not by what the sentence before ended in."""
    return [p for p, flag in zip(pieces, find_guarded_tokens(pieces), strict=True) if not flag and p == p.lower()]


def test_rewording_leaves_most_tokens_free(tokenizer: PreTrainedTokenizerBase) -> None:
    text = " ".join(document.text for document in world.make_documents(Random(4), 10))
    assert 0.1 < find_guarded_tokens(pieces_of(tokenizer, text)).mean() < 0.5


@given(st.lists(st.text(alphabet="aA1 .'▁\n-東é$\ufffd", max_size=4), max_size=12))
def test_any_split_of_a_text_guards_the_same_characters(pieces: list[str]) -> None:
    flags = find_guarded_tokens(pieces)
    assert flags.dtype == np.bool_ and len(flags) == len(pieces)
    characters = find_guarded_tokens(list("".join(pieces)))
    at = 0
    for piece, flag in zip(pieces, flags, strict=True):
        assert flag == characters[at : at + len(piece)].any()
        at += len(piece)
    for character, flag in zip("".join(pieces), characters, strict=True):
        assert flag or not character.isdigit()


def borrowable(text: str, stored: str, matched: dict[int, int]) -> list[int]:
    """Places of the ``text``, one character a token, that may be borrowed from those of ``stored`` they match."""
    ids, stored_ids = (np.array([*map(ord, each)], dtype=np.int64) for each in (text, stored))
    facts, stored_facts = (find_guarded_tokens(list(each)) for each in (text, stored))
    positions = np.array([matched.get(place, place) for place in range(len(text))], dtype=np.int64)
    refused = find_unlike_facts(ids, facts, stored_ids, stored_facts, positions)
    return np.flatnonzero(~refused).tolist()


def test_a_number_is_borrowed_whole_or_not_at_all() -> None:
    everything = [*range(8)]
    assert borrowable("cost 473", "cost 473", {}) == everything
    assert borrowable("cost 473", "cost 474", {}) == everything[:5], "its last digit is another"
    assert borrowable("cost 473", "cost 973", {}) == everything[:5], "its first digit is another"
    assert borrowable("cost 473", "cost 4730", {}) == everything, "what comes behind does not matter"
    assert borrowable("cost 473", "cost 9473", {5: 6, 6: 7, 7: 8}) == everything[:5], "the middle of another"
    assert borrowable("cost 477", "cost 477", {7: 6}) == everything[:5], "its last digit twice"


def test_facts_do_not_spoil_each_other() -> None:
    assert borrowable("7 of 473", "7 of 474", {}) == [0, 1, 2, 3, 4]
    assert borrowable("8 of 473", "7 of 473", {}) == [1, 2, 3, 4, 5, 6, 7]


def test_other_words_are_borrowed_from_other_words_but_not_from_facts() -> None:
    assert borrowable("the cat", "the dog", {}) == [*range(7)]
    assert borrowable("the cat", "the 473", {}) == [*range(4)]


def test_no_tokens_are_no_facts() -> None:
    assert borrowable("", "x", {}) == []
