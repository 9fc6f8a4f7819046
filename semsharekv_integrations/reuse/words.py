"""The words of a sentence with one spelling for each meaning: numbers, dates, units, contractions and synonyms.

Knows nothing about tokenizers or models, and nothing about what a sentence says: order and number of words stay, but
for what several words mean together, a day beside its month, and a currency beside its amount.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal

from semsharekv_integrations.reuse import synonyms
from semsharekv_integrations.reuse.facts import FUNCTION_WORDS

COMMA = ","  # it stands for every mark that parts a sentence
_FOLDED = str.maketrans(
    {"’": "'", "‘": "'", "`": "'", "“": '"', "”": '"', "–": "-", "−": "-", "‐": "-", "‑": "-", "\u00a0": " "}
)
_MINUS = re.compile(r"(?<![\w.)%])-(?=[$£€¥]?\.?\d)")
_PREFIX = re.compile(r"\b(re|non|co|multi|pre|post|anti|counter|inter|semi|e)-(?=[a-z])", re.IGNORECASE)
_DASH = re.compile(r"\s-{1,2}\s|\s*(?:—|--)\s*|[;()\[\]]|:(?!\d)")
_TOKEN = re.compile(r"(?:[A-Za-z]\.){2,}|(?:\d+|(?<!\w)\.\d+)(?:[.,:/]\d+)*\w*|[^\W\d]\w*(?:['.&]\w+)*|[^\w\s]")
_PLAIN = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?")
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_ORDINAL = re.compile(r"(\d+)(?:st|nd|rd|th)")
_SCALED = re.compile(r"(\d+(?:\.\d+)?)(m|mn|mln|bn|million|billion)")
_DROPPED = frozenset("\"'!.-…")
_BEFORE_IS = frozenset(("it", "that", "he", "she", "there", "what", "who", "here", "where"))  # it's, that's
_STATES = {"US": "usa", "USA": "usa", "UK": "uk", "UN": "un", "EU": "eu"}
_CONTRACTED = {"won't": "will not", "can't": "can not", "cannot": "can not", "shan't": "shall not", "ain't": "is not"}
_ENDINGS = {"'re": "are", "'ve": "have", "'ll": "will", "'m": "am", "'d": "'d"}
_DIGITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_RANKED = "zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
_TENS = {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
_NUMBERS = {**{word: n for n, word in enumerate(_DIGITS.split())}, **_TENS, "hundred": 100}
_RANKS = {word: n for n, word in enumerate(_RANKED.split())}
_UNITS = [*_DIGITS.split()[1:10], *_RANKED.split()[1:10]]  # that follow tens
_COMPOUND = re.compile(rf"\b({'|'.join(_TENS)})(?:-|\s(?!\w+-))({'|'.join(_UNITS)})\b", re.IGNORECASE)
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "mn": 10**6}
_CURRENCIES = frozenset("$£€¥¢")
_BE = {"is": "is", "are": "is", "am": "is", "was": "was", "were": "was", "has": "have", "does": "do"}


def read_words(text: str) -> list[str]:
    """Return the words with one spelling for each meaning, and commas."""
    words = _fold_phrases(list(_split(text)))
    words = _fold_dates(_fold_amounts(_fold_numbers(words)))
    words = [_fold_word(word) for word in words]
    return _fold_quantifiers(words)


def _split(text: str) -> Iterator[str]:
    """Yield words in lower case and commas; a name that is spelled as a word of a table keeps its case."""
    text = _DASH.sub(" , ", _PREFIX.sub(r"\1", text.translate(_FOLDED)))
    text = _COMPOUND.sub(_add_compound, _MINUS.sub(" minus ", text))
    is_shouted = text.upper() == text
    opens, before = True, ""
    for token, after in _pair_with_next(_TOKEN.findall(text)):
        if token in _DROPPED:
            opens = opens or token == '"'
            continue
        word = token.replace(".", "") if re.fullmatch(r"(?:[A-Za-z]\.){2,}", token) else token
        lower = word.lower()
        if word in _STATES:
            yield _STATES[word]
        elif word.isalpha() and not is_shouted and _keeps_case(word, opens and not after[:1].isupper(), before):
            yield word
        else:
            yield from _expand(lower)
        opens, before = False, lower


def _add_compound(match: re.Match[str]) -> str:
    tens, units = (word.lower() for word in match.groups())
    number = _TENS[tens] + _NUMBERS.get(units, _RANKS.get(units, 0))
    return f"{number}th" if units in _RANKS else str(number)


def _keeps_case(word: str, opens: bool, before: str) -> bool:
    """Return whether a word is a name or a unit, and not what its letters mean in lower case."""
    lower = word.lower()
    if word == lower or word == "I":
        return False
    if before[-1:].isdigit() and (len(word) <= 2 or word[1:] != lower[1:]):
        return lower not in ("am", "pm")
    if word.isupper() and len(word) > 1:
        return lower in synonyms.WORDS or lower in synonyms.LIGHT or lower in FUNCTION_WORDS
    is_name = not opens and lower not in FUNCTION_WORDS
    return is_name and lower in synonyms.WORDS and lower not in synonyms.MONTHS


def _expand(word: str) -> Iterator[str]:
    """Yield what a contraction is short for; a possessive is its owner."""
    if word in _CONTRACTED:
        yield from _CONTRACTED[word].split()
        return
    stem, mark, ending = word.rpartition("'")
    if word.endswith("n't"):
        yield from (word[:-3], "not")
    elif mark and "'" + ending in _ENDINGS:
        yield from (stem, _ENDINGS["'" + ending])
    elif mark and ending == "s":
        yield stem
        if stem in _BEFORE_IS:
            yield "is"
    else:
        yield word


def _fold_phrases(words: Sequence[str]) -> list[str]:
    folded: list[str] = []
    place = 0
    while place < len(words):
        for phrase, meaning in synonyms.PHRASES.get(words[place].lower(), ()):
            if tuple(map(str.lower, words[place : place + len(phrase)])) == phrase:
                folded += meaning
                place += len(phrase)
                break
        else:
            folded.append(words[place])
            place += 1
    return folded


def _fold_numbers(words: Sequence[str]) -> list[str]:
    """Write numbers in digits, with their scale: 6.8 billion, twenty-five, 1,200, third."""
    folded: list[str] = []
    for word in words:
        last = folded[-1] if folded else ""
        if word in _SCALES and _PLAIN.fullmatch(last):
            folded[-1] = _write(Decimal(last) * _SCALES[word])
        elif word in _NUMBERS or word in _RANKS:
            folded.append(f"#{_RANKS[word]}" if word in _RANKS else str(_NUMBERS[word]))
        else:
            folded.append(_read_number(word, last in _CURRENCIES))
    return folded


def _read_number(word: str, is_amount: bool) -> str:
    scaled, ordinal = _SCALED.fullmatch(word), _ORDINAL.fullmatch(word)
    if _GROUPED.fullmatch(word):
        return word.replace(",", "")
    if ordinal:
        return f"#{ordinal[1]}"
    if scaled and (is_amount or len(scaled[2]) > 1):
        return _write(Decimal(scaled[1]) * (10**6 if scaled[2][0] == "m" else 10**9))
    return word


def _write(number: Decimal) -> str:
    return format(number.normalize(), "f")


def _fold_amounts(words: Sequence[str]) -> list[str]:
    """Put a currency behind its amount."""
    folded = list(words)
    for place in range(len(folded) - 1):
        if folded[place] in _CURRENCIES and folded[place + 1][0].isdigit():
            folded[place : place + 2] = folded[place + 1], folded[place]
    return folded


def _fold_dates(words: Sequence[str]) -> list[str]:
    """Put the day behind its month, and drop the ``on`` of a day or a month."""
    folded = [synonyms.WORDS.get(word, word) if word.isalpha() else word for word in words]
    folded = [new if new in synonyms.MONTHS else word for word, new in zip(words, folded, strict=True)]
    for place in range(len(folded) - 1):
        if folded[place + 1] in synonyms.MONTHS and re.fullmatch(r"#?[0-3]?\d", folded[place]):
            folded[place : place + 2] = folded[place + 1], folded[place]
        elif folded[place] in synonyms.MONTHS and re.fullmatch(r"#[0-3]?\d", folded[place + 1]):
            folded[place + 1] = folded[place + 1][1:]
    return [w for w, after in _pair_with_next(folded) if not (w == "on" and after in synonyms.DAYS)]


def _fold_word(word: str) -> str:
    if word in _BE:
        return _BE[word]
    if word in synonyms.WORDS:
        return synonyms.WORDS[word]
    return re.sub(r"is(e[sd]?|ing|ations?)$", r"iz\1", word) if len(word) > 5 else word


def _fold_quantifiers(words: Sequence[str]) -> list[str]:
    """Tell the ``about`` of a number from that of a subject, and read "was up 3" as "rose 3"."""
    for place in range(len(words) - 3, -1, -1):
        moved = synonyms.MOVES.get(words[place + 1]) if words[place] == "was" else None
        if moved and words[place + 2][:1].isdigit():
            words = [*words[:place], moved, *words[place + 2 :]]
    return [_read_quantifier(words, place) for place in range(len(words))]


def _read_quantifier(words: Sequence[str], place: int) -> str:
    word, number, counted = words[place], *([*words[place + 1 : place + 3], "", ""][:2])
    if not number[:1].isdigit():
        return word
    is_large = len(number) > 1 and counted not in synonyms.SPANS
    meaning = synonyms.BEFORE_AMOUNTS.get(word, word) if is_large else word
    return synonyms.BEFORE_NUMBERS.get(word, meaning)


def _pair_with_next(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each word and the one behind it, which is empty for the last."""
    return zip(words, [*words[1:], ""], strict=False)
