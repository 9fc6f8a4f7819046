"""Whether an answer is right: word for word, by its facts, or by the gold answers of a data set, as SQuAD judges."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from semsharekv_integrations.world import share_right

# ``exact`` asks for the words of the answer, its lines in any order; ``mentions`` for all of its facts, each as whole
# words in any case, since other models were not trained on the answer's words; ``gold`` for one of the gold answers
Judging = Literal["exact", "mentions", "gold"]
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def is_answer(said: str, answer: str | None, values: Sequence[str], judging: Judging) -> bool | None:
    """Whether ``said`` is the answer; None if there is none. ``values`` are its facts, or the gold answers."""
    if answer is None:
        return None
    if judging == "exact":
        return share_right(said, answer) == 1
    if judging == "gold":
        return any(holds_answer(said, value) for value in values)
    words = [r"\s+".join(map(re.escape, value.split())) for value in values]
    return all(re.search(rf"(?<!\w){pattern}(?!\w)", said, re.IGNORECASE) for pattern in words)


def holds_answer(text: str, answer: str) -> bool:
    """Whether ``text`` contains ``answer`` as whole words, both normalized."""
    return f" {normalize(answer)} " in f" {normalize(text)} "


def normalize(text: str) -> str:
    """As SQuAD does: lower case, without punctuation and articles, one blank between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def measure_f1(said: str, answers: Sequence[str]) -> float:
    """SQuAD's F1: how far the words of ``said`` and of the nearest answer are the same, 0 to 1."""
    return max(_measure_overlap(normalize(said).split(), normalize(answer).split()) for answer in answers)


def _measure_overlap(said: Sequence[str], answer: Sequence[str]) -> float:
    if not said or not answer:
        return float(said == answer)
    common = (Counter(said) & Counter(answer)).total()
    return 2 * common / (len(said) + len(answer))
