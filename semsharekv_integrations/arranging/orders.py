"""Which order of documents continues the longest stored prefix.

A stored prompt begins with what stands before its documents, its head. Behind it, documents count as far as each is
one of those asked for, word for word, and follows the one before. They are looked for by their tokens, so it does not
matter how they were named. Token by token, the order that is found is compared with the given one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise, takewhile
from typing import NamedTuple

import numpy as np

from semsharekv_integrations.kv import Reference, Span, TokenIds, count_common_tokens
from semsharekv_integrations.store.forgetting import EDGE_TOKENS, TextOf

BETWEEN_TOKENS = 32  # at most so many stand between two documents that follow each other, such as a title
_NEAR = 2  # by so many tokens a place may be off, as a text beside another has other tokens at its ends
_SEPARATOR_TOKENS = 8  # behind a document, the beginning of another is looked for in so many
_ANCHOR_TOKENS = 8  # so many are looked for in all prompts at once


class Text(NamedTuple):
    """A document asked for: its text, stripped, and its tokens [N] where it stands by itself."""

    content: str
    token_ids: TokenIds


class Place(NamedTuple):
    """Where the text of index ``text`` stands in a prompt: tokens ``start`` to ``stop``, the outermost perhaps not."""

    start: int
    stop: int
    text: int


class _Prompt(NamedTuple):
    """A stored prompt: its tokens [S], where texts stand in it, and where other documents do that it names."""

    token_ids: TokenIds
    places: Sequence[Place]
    others: Sequence[Span]

    @property
    def head_tokens(self) -> int:
        """How many tokens stand before its first document, whichever that is."""
        first = min(place.start for place in self.places)
        return max(0, min([first, *(span.start for span in self.others if span.stop <= first + _NEAR)]))

    @property
    def is_bare(self) -> bool:
        """Whether it is one of the texts and nothing else, as ``warm`` leaves it."""
        least = len(self.token_ids) - _NEAR
        return any(place.start <= _NEAR and place.stop >= least for place in self.places)

    def follow(self, head_tokens: int) -> list[Place]:
        """Return the places of the texts that stand in a row behind the head, each text once."""
        row: list[Place] = []
        at, reach = head_tokens, _NEAR
        while True:
            used = {place.text for place in row}
            near = [p for p in self.places if at - _NEAR <= p.start <= at + reach and p.text not in used]
            place = min(near, key=lambda p: (p.start, -p.stop), default=None)
            if place is None or self._has_other(at, place.start):
                return row
            row.append(place)
            at, reach = place.stop, BETWEEN_TOKENS

    def _has_other(self, start: int, stop: int) -> bool:
        return any(start - _NEAR <= span.start and span.stop <= stop + _NEAR for span in self.others)


class _Candidate(NamedTuple):
    """An order, and what of a prompt it seems to continue. The best sorts first; of equals, the caller's order."""

    minus_tokens: int  # the tokens behind the head that are reused, below zero
    order: list[int]
    row: list[Place]  # what this rests on, if it stands there word for word
    head_tokens: int
    prompt: _Prompt

    @classmethod
    def of_row(cls, row: list[Place], count: int, head_tokens: int, prompt: _Prompt) -> _Candidate:
        """Return the order of the texts of ``row``, then of the others of ``count`` as they were given."""
        first = [place.text for place in row]
        order = [*first, *sorted(set(range(count)) - set(first))]
        minus = head_tokens + 1 - row[-1].stop if row else 0  # the last one's end may be tokenized otherwise
        return cls(minus, order, row, head_tokens, prompt)

    @property
    def is_given(self) -> bool:
        """Whether it is the given order."""
        return self.order == sorted(self.order)


def find_order(
    texts: Sequence[Text], references: Sequence[Reference], before: TokenIds | None, text_of: TextOf
) -> list[int]:
    """Return the indices of ``texts`` in the order that continues the longest prefix of the ``references``.

    Texts that are not in that prefix follow in the given order. Where another order would surely reuse no more than
    the given one, the given one is returned; a few tokens at its end count for it.

    Args:
        texts: unlike each other.
        references: that may be reused.
        before: the tokens that stand before the documents; None to see from the references what stands there. Where
            the head of one begins with that of another, the shorter one counts.
        text_of: returns the text of tokens, to tell texts apart whose ends alone differ.
    """
    likely: list[_Candidate] = []
    for head_tokens, prompts in _match_heads(_find_prompts(texts, references), before):
        most = _bound_gap(prompts)
        for prompt in prompts:
            row = _cut_row(prompt.follow(head_tokens), most)
            likely.append(_Candidate.of_row(row, len(texts), head_tokens, prompt))
            likely.append(_judge_given(texts, prompt, head_tokens, row))
    best, minus_most = list(range(len(texts))), 0
    for candidate in sorted(likely, key=lambda candidate: candidate[:2]):
        if candidate.minus_tokens >= minus_most:
            break
        verified = _verify(candidate, texts, before, text_of)
        if verified.minus_tokens < minus_most:
            best, minus_most = verified.order, verified.minus_tokens
    return best


def _cut_row(row: Sequence[Place], most: int) -> list[Place]:
    """Return the row up to the first gap of more than ``most`` tokens, in which another text likely stands."""
    gaps = [after.start - place.stop for place, after in pairwise(row)]
    return list(row[: 1 + next((index for index, gap in enumerate(gaps) if gap > most), len(gaps))])


def _bound_gap(prompts: Sequence[_Prompt]) -> int:
    """Return a bound on the tokens between two documents, judged by the smallest gap in the prompts."""
    ordered = [sorted(prompt.places) for prompt in prompts]
    gaps = [after.start - place.stop for places in ordered for place, after in pairwise(places)]
    return 2 * min((max(0, gap) for gap in gaps if gap >= -_NEAR), default=BETWEEN_TOKENS) + EDGE_TOKENS


def _judge_given(texts: Sequence[Text], prompt: _Prompt, head_tokens: int, row: Sequence[Place]) -> _Candidate:
    """Return the given order as a candidate with the most that it could reuse: texts, and some of the next one."""
    kept = [place for _, place in takewhile(lambda pair: pair[0] == pair[1].text, enumerate(row))]
    at = kept[-1].stop if kept else head_tokens
    most = at - head_tokens
    if len(kept) < len(texts):
        form = texts[len(kept)].token_ids
        window = prompt.token_ids[at : at + (_SEPARATOR_TOKENS if kept else _NEAR + 1)]
        starts = [
            (at + int(place), skip) for skip in (0, 1) for place in np.flatnonzero(window == form[skip : skip + 1])
        ]
        ends = [start + count_common_tokens(prompt.token_ids[start:], form[skip:]) for start, skip in starts]
        most = max([most, *(end - head_tokens for end in ends)])
    return _Candidate(-most, list(range(len(texts))), kept, head_tokens, prompt)


def _verify(candidate: _Candidate, texts: Sequence[Text], before: TokenIds | None, text_of: TextOf) -> _Candidate:
    """Return the candidate without its texts from the first on that does not stand there word for word.

    It loses all if ``before`` does not stand there so.
    """
    _, _, row, head_tokens, prompt = candidate
    ids = prompt.token_ids

    def stands(place: Place) -> bool:
        content, form = texts[place.text]
        start = max(place.start, 0)
        if np.array_equal(ids[start : place.stop], form):
            return True
        return content in text_of(ids[max(start - EDGE_TOKENS, 0) : place.stop + EDGE_TOKENS])

    sure = list(takewhile(stands, row))
    if row and before is not None:
        there = _drop_spaces(text_of(ids[: row[0].stop + EDGE_TOKENS]))
        begins = _drop_spaces(text_of(before)) + _drop_spaces(texts[row[0].text].content)
        sure = sure if there.startswith(begins) else []
    if len(sure) == len(row):
        return candidate
    if candidate.is_given:
        return _judge_given(texts, prompt, head_tokens, sure)
    return candidate.of_row(sure, len(texts), head_tokens, prompt)


def _drop_spaces(text: str) -> str:
    return "".join(text.split())


def _match_heads(prompts: Sequence[_Prompt], before: TokenIds | None) -> Iterator[tuple[int, list[_Prompt]]]:
    """Yield each head's number of tokens, and the prompts that begin with it; its last token may differ there."""
    heads = [before] if before is not None else _find_heads(prompts)
    keys = [_make_key(head) for head in heads]
    found: list[list[_Prompt]] = [[] for _ in heads]
    for prompt in prompts:
        beginning = prompt.token_ids.tobytes()
        at = bisect_right(keys, beginning) - 1  # no key begins another, so it alone can begin the prompt
        if at >= 0 and beginning.startswith(keys[at]):
            found[at].append(prompt)
    yield from zip(map(len, heads), found, strict=True)


def _find_heads(prompts: Sequence[_Prompt]) -> list[TokenIds]:
    """Return what stands before each prompt's first document, sorted; leaves out what begins with a shorter one."""
    found = [p.token_ids[: p.head_tokens] for p in prompts if p.places and not p.is_bare]
    heads: list[TokenIds] = []
    for head in sorted(found, key=lambda head: (_make_key(head), len(head))):
        if not heads or not _make_key(head).startswith(_make_key(heads[-1])):
            heads.append(head)
    return heads


def _make_key(head: TokenIds) -> bytes:
    return head[:-1].tobytes()


def _find_prompts(texts: Sequence[Text], references: Sequence[Reference]) -> list[_Prompt]:
    """Return the references with the places of ``texts``, found by what ``strip_ends`` leaves of their tokens."""
    if not references:
        return []
    places: list[list[Place]] = [[] for _ in references]
    flat = np.concatenate([reference.token_ids for reference in references])
    borders = np.cumsum([0, *(len(reference.token_ids) for reference in references)])
    for index, (_, form) in enumerate(texts):
        edge, inner = strip_ends(form)
        for at in find_all(flat, inner):
            which = int(np.searchsorted(borders, at, "right")) - 1
            if at + len(inner) <= borders[which + 1]:
                start = at - edge - int(borders[which])
                places[which].append(Place(start, start + len(form), index))
    return [
        _Prompt(reference.token_ids, there, _list_others(reference, there))
        for reference, there in zip(references, places, strict=True)
    ]


def strip_ends(form: TokenIds) -> tuple[int, TokenIds]:
    """Return how many tokens each end of a text loses, as it may be tokenized otherwise in a prompt, and the rest."""
    edge = min(EDGE_TOKENS, len(form) // 4)
    return edge, form[edge : len(form) - edge]


def find_all(token_ids: TokenIds, wanted: TokenIds) -> list[int]:
    """Return where ``wanted`` [N] begins in ``token_ids`` [S]; nowhere if it is empty."""
    if not len(wanted) or len(wanted) > len(token_ids):
        return []
    found = np.flatnonzero(token_ids[: len(token_ids) - len(wanted) + 1] == wanted[0])
    for step in range(1, min(len(wanted), _ANCHOR_TOKENS)):
        found = found[token_ids[found + step] == wanted[step]]
    return [at for at in found.tolist() if np.array_equal(token_ids[at : at + len(wanted)], wanted)]


def _list_others(reference: Reference, places: Sequence[Place]) -> list[Span]:
    """Return the places of documents that the reference names, but for those that are, or lie in, ``places``."""
    return [
        span
        for span in reference.spans.values()
        if span.start >= 0 and not any(p.start - _NEAR <= span.start and span.stop <= p.stop + _NEAR for p in places)
    ]
