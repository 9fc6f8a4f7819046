"""Normal forms of a sentence: two wordings with the same facts in the same places have a form in common.

What changes no fact is folded: spelling, the writing of numbers and dates, articles, commas, words and phrases that
mean the same (``synonyms``), where an adverb stands in its verb, and a clause or an attribution that may stand first or
last. All other words stay, in their order: who did what to whom, numbers with their units, negations, comparatives,
modality. So a form is equal only if nothing is extra on either side. Knows nothing about tokenizers or models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from semsharekv_integrations.reuse import synonyms
from semsharekv_integrations.reuse.facts import NEGATIONS
from semsharekv_integrations.reuse.words import COMMA, read_words

Form = tuple[str, ...]
MOST_CHARACTERS = 2000  # of a sentence; what is longer is no sentence, and equal to itself alone
_MOST_SAYING_WORDS = 14  # in "said A. Writer, a teacher in Rome"

_CODE = re.compile(r"[{}<>=|\\^~_@*]|\w\(")
_NOTE = re.compile(r"\s*\[(?:\d+|citation needed|note \d+|[a-z])\]", re.IGNORECASE)
_BEING = frozenset(("is", "was"))
_DENIALS = NEGATIONS | {"all", "anything", "everything", "little", "few"}  # before "but": not A, but B
_DEFINITE = frozenset(("the", "=themost"))


class Forms(NamedTuple):
    """The normal forms of a sentence, and those without what one of two wordings may leave out: "which was", "Mr"."""

    whole: frozenset[Form]
    short: frozenset[Form]

    def share_one(self, other: Forms) -> bool:
        """Return whether both have a form in common. What is left out of one stands in no place of the other."""
        return not (
            self.whole.isdisjoint(other.whole)
            and self.whole.isdisjoint(other.short)
            and self.short.isdisjoint(other.whole)
        )


@lru_cache(maxsize=65_536)
def find_forms(sentence: str) -> Forms:
    """Return the normal forms of a sentence, at least one."""
    text = " ".join(sentence.split())
    if len(text) > MOST_CHARACTERS or _CODE.search(text):
        return Forms(frozenset({("=exactly", text)}), frozenset())
    words = read_words(text)
    if not any(word[0].isalnum() for word in words):
        return Forms(frozenset({("=exactly", text)}), frozenset())
    whole = _arrange(words)
    shortened = _shorten(read_words(_NOTE.sub("", text)) if _NOTE.search(text) else words)
    return Forms(whole, frozenset() if shortened == words else _arrange(shortened))


def _arrange(words: list[str]) -> frozenset[Form]:
    """Return the forms of all orders in which the words say the same."""
    orders = [words, *_join_contrast(words), *_turn_equation(words), *_join_participle(words)]
    orders += [moved for order in list(orders) for moved in (*_move_opener(order), *_move_saying(order))]
    return frozenset(map(_finish, orders))


def _shorten(words: list[str]) -> list[str]:
    """Leave out "which was", "Mr", the "now" of "is now", the "located" of "is located in", and a last "either"."""
    padded = [COMMA, *words, COMMA]
    return [
        word
        for before, word, after in zip(padded, words, padded[2:], strict=False)
        if word != "mr"
        and not (word in _BEING and before in synonyms.RELATIVES)
        and not (word in synonyms.RELATIVES and after in _BEING)
        and not (word == "currently" and {before, after} & synonyms.AUXILIARIES)
        and not (word == "located" and before in _BEING and after in synonyms.OPENERS)
        and not (word == "either" and after == COMMA)
    ]


def _finish(words: Sequence[str]) -> Form:
    """Drop what is light, and put adverbs before the verbs that they stand among."""
    kept: list[str] = []
    for place, word in enumerate(words):
        before, after = words[place - 1] if place else COMMA, words[place + 1] if place + 1 < len(words) else COMMA
        stands_apart = before == COMMA and (after == COMMA or word == "then")
        is_link = word in synonyms.LINKS and (not kept or stands_apart)
        is_link = is_link or (word in synonyms.LATE_LINKS and len(kept) == 1)
        is_link = is_link or (word in synonyms.CLOSERS and after == COMMA)
        is_light = word in synonyms.LIGHT and not (before == COMMA and place and word in synonyms.RELATIVES)
        if word != COMMA and not is_light and not is_link:
            kept.append(word)
    return tuple(_sort_adverbs(kept))


def _sort_adverbs(words: Sequence[str]) -> Iterator[str]:
    verbs: list[str] = []  # since the last word that is none
    for word in words:
        if word in synonyms.AUXILIARIES:
            verbs.append(word)
        elif verbs and (word in synonyms.MOVING_ADVERBS or (word.endswith("ly") and word not in synonyms.NO_ADVERBS)):
            yield word
        else:
            yield from verbs
            yield word
            verbs = []
    yield from verbs


def _join_contrast(words: list[str]) -> Iterator[list[str]]:
    """Yield "A and B" for "although A, B", for "A, although B" and, where nothing is denied before, for "A, but B"."""
    for place, word in enumerate(words):
        if word == "but" and place and words[place - 1] == COMMA and not _DENIALS & set(words[:place]):
            yield [*words[:place], "and", *words[place + 1 :]]
        elif word == "though":
            if place == 0:
                for comma in _find_commas(words):
                    yield [*words[1:comma], "and", *words[comma + 1 :]]
            elif words[place - 1] == COMMA:
                yield [*words[:place], "and", *words[place + 1 :]]


def _turn_equation(words: list[str]) -> Iterator[list[str]]:
    """Yield "the B is the A" for "the A is the B", where the sentence says nothing else."""
    verbs = [place for place, word in enumerate(words) if word in synonyms.AUXILIARIES]
    if len(verbs) == 1 and words[verbs[0]] in _BEING and not (synonyms.JOINTS | NEGATIONS | {COMMA}) & set(words):
        left, right = words[: verbs[0]], words[verbs[0] + 1 :]
        if left[:1] and right[:1] and {left[0], right[0]} <= _DEFINITE:
            yield [*right, words[verbs[0]], *left]


def _join_participle(words: list[str]) -> Iterator[list[str]]:
    """Yield ", leading to B" for ", which led to B" and ", which leads to B"."""
    for place in range(1, len(words) - 2):
        if words[place - 1] == COMMA and words[place] == "which":
            participle = synonyms.find_participle(words[place + 1])
            if participle:
                yield [*words[:place], participle, *words[place + 2 :]]


def _move_opener(words: list[str]) -> Iterator[list[str]]:
    """Yield the sentence with the phrase or clause that opens it at its end."""
    first = next((place for place, word in enumerate(words) if word != COMMA and word not in synonyms.LINKS), 0)
    if not words or words[first] not in synonyms.OPENERS:
        return
    for comma in _find_commas(words):
        rest = words[comma + 1 :]
        if comma > first and _is_one_clause(rest):
            yield [*rest, COMMA, *words[first:comma]]


def _move_saying(words: list[str]) -> Iterator[list[str]]:
    """Yield the sentence with "he said" or "said he" at its beginning, wherever it stood."""
    edges = [*_find_commas(words), len(words)]
    for place, comma in enumerate(edges[:-1]):
        for stop in edges[place + 1 :]:
            chunk = words[comma + 1 : stop]
            if 2 <= len(chunk) <= _MOST_SAYING_WORDS and not synonyms.JOINTS & set(chunk[1:-1]):
                if chunk[0] in synonyms.SAYING and chunk[-1] not in synonyms.JOINTS:
                    yield [*chunk[1:], chunk[0], *words[:comma], *words[stop:]]
                elif chunk[-1] in synonyms.SAYING and chunk[0] not in synonyms.JOINTS:
                    yield [*chunk, *words[:comma], *words[stop:]]


def _is_one_clause(words: Sequence[str]) -> bool:
    """Return whether what is said of a part of the words is said of all: they hold no second verb, as far as is known.

    The "to" and "as" of a noun are none of a verb.
    """
    after = dict(enumerate(words[1:]))
    joints = (place for place, word in enumerate(words) if word in synonyms.JOINTS)
    return bool(words) and all(
        words[place] in ("to", "as")
        and (after.get(place, "") in synonyms.DETERMINERS or after.get(place, "")[:1].isdigit())
        for place in joints
    )


def _find_commas(words: Sequence[str]) -> list[int]:
    return [place for place, word in enumerate(words) if word == COMMA]
