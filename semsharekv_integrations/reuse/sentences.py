"""Sentences of a text, and whether two of them say the same, in facts both ways.

The judge of ``semantic`` reuse: a model may read a stored sentence in place of one of the prompt only if no fact is
changed, lost or added by it. The rules are ``wording``'s; doubt refuses. The embedders of ``similarity`` add nothing to
them: of pairs with other facts, more than half are as alike as those with the same. Their cosine serves to find which
stored sentences are worth a judgement. Knows nothing about tokenizers or models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from semsharekv_integrations.reuse.facts import FUNCTION_WORDS
from semsharekv_integrations.reuse.wording import find_forms

_CLOSERS = "\"')\\]”’»}"
# What may end a sentence, with closing quotes and notes such as [5], and the blanks behind it.
_END = re.compile(rf"(?:[.!?…]+[{_CLOSERS}]*(?:\[[^\]\n]{{1,24}}\])*(?=\s|$)|[。！？]+[{_CLOSERS}」』）]*)\s*")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[\"'“‘-])(?:(?:Dr|Mr|Mrs|Ms|Prof|Sen|Rep|Gen|Col|Lt|Sgt|Capt|Gov|Rev|Hon|St|Ft|Mt|vs|etc|cf|ca|approx"
    r"|[Nn]o|[Nn]os|[Ff]ig|[Vv]ol|pp|al|ed|eds|est|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)|[A-Za-z]|i\.e|e\.g)\.$"
)
# These end a sentence where a new one plainly begins behind them.
_MAYBE = re.compile(r"(?:^|[\s(\"'“])(?:(?:Inc|Corp|Co|Ltd|Jr|Sr|Bros|Ave|Blvd|Rd)|(?:[A-Za-z]\.)+[A-Za-z])\.$")
_MARKED = re.compile(r"\s*(?:[-*+•>|#]|\d+[.)]\s|[A-Za-z][.)]\s)")
_ROW = re.compile(r"\s*[|+]|.*[{}=;|]\s*$|\s*(?:def|class|import|from|return|if|for|while)\b.*[:()]")
_PROSE_LINE = 40  # characters from which a line without an end may go on in the next one


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Return start and stop, in characters, of each sentence, in order, without the blanks around it.

    A line that is no running text is a piece of its own: a heading, list item, table row or line of code.
    """
    return [span for start, stop in _find_paragraphs(text) for span in _split_paragraph(text, start, stop)]


def say_the_same(asked: str, stored: str) -> bool:
    """Return whether two sentences state the same facts, with nothing extra on either side. Doubt is no."""
    return asked == stored or find_forms(asked).share_one(find_forms(stored))


def _find_paragraphs(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and stop of each line, or of lines that one sentence runs over."""
    start, stop = 0, 0
    for line in text.splitlines(keepends=True):
        if stop > start and not _runs_on(text[start:stop], line):
            yield start, stop
            start = stop
        stop += len(line)
    if stop > start:
        yield start, stop


def _runs_on(before: str, line: str) -> bool:
    """Return whether a line goes on with what the lines before it began: prose that is wrapped."""
    last = before.splitlines()[-1]
    begins = line[:1].islower() and not _MARKED.match(line)
    return begins and len(last) >= _PROSE_LINE and last == last.lstrip() and last.rstrip()[-1:] not in ":;{}|="


def _split_paragraph(text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    begin = start
    if "\n" not in text[start : stop - 1] and _ROW.match(text[start:stop]):
        yield from _trim(text, start, stop)
        return
    for end in _END.finditer(text, start, stop):
        if end.end() < stop and not _ends(text[begin : end.end()].rstrip(), text[end.end() : stop]):
            continue
        yield from _trim(text, begin, end.end())
        begin = end.end()
    yield from _trim(text, begin, stop)


def _ends(sentence: str, rest: str) -> bool:
    """Return whether a sentence ends before ``rest``, which is not empty."""
    opening = rest.lstrip("\"'([“‘«„¿¡")
    if opening[:1].islower() or _MARKED.fullmatch(sentence + " "):
        return False
    if _ABBREVIATION.search(sentence):
        return False
    if _MAYBE.search(sentence):
        word = re.match(r"\w+", opening)
        return word is not None and word.group().lower() in FUNCTION_WORDS and word.group()[0].isupper()
    return True


def _trim(text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    while start < stop and text[start].isspace():
        start += 1
    while stop > start and text[stop - 1].isspace():
        stop -= 1
    if start < stop:
        yield start, stop
