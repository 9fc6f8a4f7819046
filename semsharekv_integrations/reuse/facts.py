"""The fact guard: which tokens of a prompt state a fact, and so must never be borrowed from a different token.

SemShareKV (arXiv 2509.24832) has no such guard: its fuzzy matching replaces a number by any near number. This module
guards a word if it has a digit, spells a number, is written like a name, or negates. It also guards every word of a
script without letter case, where names cannot be told. A word wrongly guarded costs some reuse; one missed may cost a
right answer, so doubt guards.

It cannot see facts in plain lower-case words (rose or fell, red or blue), names in lower case, spelled numbers of other
languages than English, or negations outside the languages listed. It knows nothing about tokenizers or models.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from semsharekv_integrations.kv import Mask, TokenIds


def _split(text: str) -> frozenset[str]:
    return frozenset(text.split())


NEGATIONS = _split(
    # English
    "no not never none nor neither nobody nothing nowhere without cannot hardly barely scarcely unless except "
    # Dutch, French, German, Italian, Polish, Portuguese, Russian, Spanish
    "niet geen nooit zonder ne pas jamais aucun aucune sans rien nicht kein keine keinen keinem keiner nie niemals "
    "ohne non mai senza bez nigdy não nunca sem не нет ни без никогда jamás sin ningún ninguno ninguna"
)
NUMBER_WORDS = _split(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred hundreds thousand thousands "
    "million millions billion billions trillion trillions dozen dozens half quarter third double triple once twice "
    "first second fourth fifth sixth seventh eighth ninth tenth percent"
)
# Words that open a sentence without being a name. None of them is a common name, as May, Will and Mark are.
FUNCTION_WORDS = _split(
    "a about after all also although among an and another any are around as at because before behind both but by could "
    "did do does during each either even every few for from had has have he her here his how however i if in into is "
    "it its just many more most much my near of on only or other our over people several she should since so some "
    "such than that the their them then there these they this those though through to today under until up was we "
    "were what when where whether which while who whose why with would yesterday yet you your"
)

_WORD = re.compile(r"\S+")
_EDGES = ".,;:!?\"'()[]{}<>|*_#`~“”‘’«»„…¿¡-–—"  # around a word, and no part of it; a sign before a digit is
_SENTENCE_END = re.compile(r"[.!?…][\"')\]”’»]*$")
_ABBREVIATION = re.compile(r"(?:^|[^\w])(?:[A-Z]\w{0,3}|\w\.\w)\.$")  # Dr. Sen. J. U.S.; a short name at worst
_NEGATED = re.compile(r"n['’]t$")
_LEADING_SIGNS = "-–.<>~"
_SIGNS = "%‰°"


def find_guarded_tokens(pieces: Sequence[str]) -> Mask:
    """Return a mask [T] of the tokens that state a fact. It marks whole words, without the punctuation around them.

    Args:
        pieces: [T] texts of the tokens in prompt order. A word begins with a space (or the ``▁`` of SentencePiece); a
            token that is part of a character is the replacement character U+FFFD, as when decoded by itself.
    """
    text = "".join(pieces).replace("▁", " ")
    edges = np.array([0, *accumulate(map(len, pieces))])
    spans = np.array(list(_find_guarded_spans(text)), dtype=np.int64).reshape(-1, 2)
    first = np.searchsorted(edges, spans[:, 0], side="right") - 1  # the token that holds the word's first character
    behind = np.searchsorted(edges, spans[:, 1], side="left")
    changes = np.zeros(len(pieces) + 1, dtype=np.int64)
    np.add.at(changes, first, 1)
    np.add.at(changes, behind, -1)
    return (np.cumsum(changes)[:-1] > 0) & (np.diff(edges) > 0)


def find_unlike_facts(
    token_ids: TokenIds, facts: Mask, stored_ids: TokenIds, stored_facts: Mask, positions: NDArray[np.int64]
) -> Mask:
    """Return a mask [T] of the tokens that must not be borrowed from the token they are matched with.

    A fact is borrowed only whole, from one that begins with the same tokens: the 7 of 473 is not that of 970. A token
    that is no fact is never borrowed from a different token that is part of one.

    Args:
        token_ids: [T] of the prompt.
        facts: [T] those that state a fact, as ``find_guarded_tokens`` finds them.
        stored_ids, stored_facts: [S] likewise, of the stored text.
        positions: [T] where in the stored text each token is matched.
    """
    inside = facts & np.r_[False, facts[:-1]]  # behind another token of the same fact
    first = facts & ~inside
    unlike = token_ids != stored_ids[positions]
    broken = inside & (np.r_[0, np.diff(positions)] != 1) | first & np.r_[False, stored_facts][positions]
    fact = np.cumsum(first)  # of each token, from 1 on
    unlike_of_fact = np.bincount(fact, weights=facts & (unlike | broken), minlength=1) > 0
    return facts & unlike_of_fact[fact] | unlike & stored_facts[positions]


def _find_guarded_spans(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and stop, in characters, of every guarded word, without the punctuation around it."""
    known: dict[tuple[str, bool], tuple[bool, bool]] = {}  # prompts repeat their words
    starts_sentence, end = True, 0
    for match in _WORD.finditer(text):
        chunk, start = match.group(), match.start()
        starts_sentence = starts_sentence or "\n" in text[end:start]
        end = match.end()
        key = (chunk, starts_sentence)
        if key not in known:
            ends_sentence = bool(_SENTENCE_END.search(chunk)) and not _ABBREVIATION.search(chunk)
            known[key] = (_is_guarded(chunk, starts_sentence), ends_sentence)
        is_guarded, starts_sentence = known[key]
        if is_guarded:
            yield _trim(chunk, start)


def _is_guarded(chunk: str, starts_sentence: bool) -> bool:
    """Return whether a word is guarded: it has a digit or a letter without case, is a number, a negation or a name."""
    word = chunk.strip(_EDGES)
    lower = word.lower()
    if word.islower() and word.isascii() and word.isalpha():  # most words, decided fast
        return lower in NEGATIONS or lower in NUMBER_WORDS
    parts = re.split(r"[-–—/]", lower)
    return (
        any(map(_states_fact, word))
        or any(part in NEGATIONS or part in NUMBER_WORDS for part in parts)
        or bool(_NEGATED.search(lower))
        or _looks_like_name(word, starts_sentence)
    )


def _states_fact(character: str) -> bool:
    """Return whether a character is a digit, a unit of an amount, U+FFFD, or a letter of a script without case."""
    if character.isascii():
        return character.isdigit() or character in "$%"
    if character.isalpha():
        return character.lower() == character.upper()
    if character == "\ufffd" or character in _SIGNS or character.isnumeric():
        return True
    return unicodedata.category(character) in ("Sc", "Mn", "Mc")  # currency, and vowels of scripts without case


def _looks_like_name(word: str, starts_sentence: bool) -> bool:
    """Return whether a word has an upper-case letter, but for the first of a function word that opens a sentence."""
    stem = re.split(r"['’]", word)[0]  # It's, They've
    opens = starts_sentence and stem[1:] == stem[1:].lower() and stem.lower() in FUNCTION_WORDS
    return word != word.lower() and not opens


def _trim(chunk: str, start: int) -> tuple[int, int]:
    """Return start and stop of the word without punctuation; a sign or a point that leads a number belongs to it."""
    left, right = len(chunk) - len(chunk.lstrip(_EDGES)), len(chunk.rstrip(_EDGES))
    while left and chunk[left - 1] in _LEADING_SIGNS and not chunk[left].isalpha():
        left -= 1
    return start + left, start + right
