"""Which sentences of a prompt may be read in the words of a stored sentence that says the same.

The rule: the sentence stands in a document, or in a passage where no documents are known, that the question is not
about; the stored one stands in a passage near in meaning, is itself near in meaning, and says the same, in facts both
ways (``reuse.sentences``). The model then reads the stored words at that place, whose KV is one coherent run. This is
not part of SemShareKV (arXiv 2509.24832), which borrows token by token and so mixes two sentences in one KV.

It knows the tokenizer only as a function from ids to text, and nothing about KV.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from semsharekv_integrations.kv import Mask, Reference, Rendered, Segment, Span, Substitution, TokenIds
from semsharekv_integrations.reuse.selection import score_documents
from semsharekv_integrations.reuse.sentences import say_the_same, split_sentences
from semsharekv_integrations.reuse.similarity import SegmentIndex, SegmentMatch
from semsharekv_integrations.store import KVStore

NEAR_PASSAGES = 3  # of each namespace in whose sentences a passage's are looked for
LEAST_OPEN = 2  # tokens of a sentence without a source: for fewer it keeps its own words
_BROKEN = "\ufffd"  # stands for a part of a character
# What speaks to the model: such sentences of a prompt keep their own words where no documents are known.
_ADDRESSING = re.compile(
    r"(?i)[?:]$|\b(?:you|your|yours|yourself|please)\b|^(?:answer|ask|be|check|classify|cite|compare|consider|"
    r"describe|do|don't|explain|extract|find|follow|give|ignore|keep|list|make|never|note|only|provide|quote|rank|"
    r"read|refer|remember|reply|respond|return|rewrite|say|show|state|summarise|summarize|tell|think|translate|"
    r"use|write)\b"
)


class Sentence(NamedTuple):
    """Tokens ``start`` to ``stop`` (exclusive) hold ``text``, with the blanks ``lead`` before and ``trail`` behind.

    ``end`` is the last token without blanks.
    """

    start: int
    stop: int
    text: str
    lead: str
    trail: str
    end: str


class _Stored(NamedTuple):
    """A sentence of a stored passage, and its tokens [N]."""

    reference: Reference
    sentence: Sentence
    token_ids: TokenIds


class RewordingFinder:
    """Finds stored wordings for prompts of one model.

    Args:
        store: whose entries may be read.
        index: of their passages.
        pieces: from token ids [N] to each token's text.
        min_similarity: least similarity, 0 to 1, of passages and of sentences; None for the embedder's own threshold.
    """

    def __init__(
        self,
        store: KVStore,
        index: SegmentIndex,
        pieces: Callable[[TokenIds], Sequence[str]],
        min_similarity: float | None,
    ) -> None:
        self._store = store
        self._index = index
        self._pieces = pieces
        self._least = index.embedder.threshold if min_similarity is None else min_similarity

    def find(
        self, rendered: Rendered, open_tokens: Mask, own_words: Sequence[Span], namespace: str
    ) -> list[Substitution]:
        """Return a stored wording for each sentence that may have one, in order. Syncs the index first.

        Args:
            open_tokens: [T] without a source so far, and not of the question.
            own_words: ranges that keep their own words.
            namespace: whose entries may be read, beside those of the shared one.
        """
        wanted = [
            segment
            for segment in list_eligible(rendered)
            if open_tokens[segment.start : segment.stop].sum() >= LEAST_OPEN
            and not any(segment.start < span.stop and span.start < segment.stop for span in own_words)
        ]
        texts = [rendered.token_ids[segment.start : segment.stop] for segment in wanted]
        found: dict[int, Substitution] = {}
        for name in self._store.list_readable(namespace) if wanted else ():
            self._index.sync(self._store.references(name), name)
            for segment, near in zip(wanted, self._index.find_nearest(texts, name, k=NEAR_PASSAGES), strict=True):
                passages = [match for match in near if match.similarity >= self._least]
                sentences = self._list_open(rendered, segment, open_tokens) if passages else []
                still = [sentence for sentence in sentences if sentence.start not in found]
                found |= {each.start: each for each in self._reword(rendered, still, passages, name)}
        return _drop_overlapping([found[start] for start in sorted(found)])

    def _list_open(self, rendered: Rendered, segment: Segment, open_tokens: Mask) -> list[Sentence]:
        """Return the sentences of ``segment`` that are open enough, and that no other segment begins or ends in."""
        borders = {edge for other in rendered.segments for edge in (other.start, other.stop)}
        found = []
        for each in self._split(rendered.token_ids, segment):
            is_whole = not any(each.start < border < each.stop for border in borders)
            is_told = bool(rendered.segments) or not _ADDRESSING.search(each.text)
            if is_whole and is_told and open_tokens[each.start : each.stop].sum() >= LEAST_OPEN:
                found.append(each)
        return found

    def _reword(
        self,
        rendered: Rendered,
        sentences: Sequence[Sentence],
        passages: Sequence[SegmentMatch],
        namespace: str,
    ) -> Iterator[Substitution]:
        """Yield a stored wording for each of ``sentences`` that has one in ``passages``."""
        stored = {
            ids.tobytes(): _Stored(reference, each, ids)
            for reference, segment, _ in reversed(passages)
            for each in self._split(reference.token_ids, segment)
            if len(ids := reference.token_ids[each.start : each.stop])
        }
        wordings = [
            [(made, other.token_ids) for other in stored.values() if (made := _substitute(sentence, other)) is not None]
            for sentence in sentences
            if rendered.token_ids[sentence.start : sentence.stop].tobytes() not in stored
        ]
        for pairs in filter(None, wordings):
            asked = rendered.token_ids[pairs[0][0].start : pairs[0][0].stop]
            (row,) = self._index.measure([asked], [token_ids for _, token_ids in pairs], namespace)
            if row.max() >= self._least:
                yield pairs[int(row.argmax())][0]

    def _split(self, token_ids: TokenIds, segment: Segment) -> list[Sentence]:
        """Return the sentences of a segment whose borders lie between tokens, in order, as places in ``token_ids``."""
        return [
            each._replace(start=segment.start + each.start, stop=segment.start + each.stop)
            for each in split_tokens(self._pieces(token_ids[segment.start : segment.stop]))
        ]


def list_eligible(rendered: Rendered) -> list[Segment]:
    """Return what may be read in other words: the documents; where none are known, passages of the last user turn.

    The last passage holds the question, and is none of them.
    """
    if rendered.segments:
        return list(rendered.segments)
    first, stop = rendered.question or (0, len(rendered.token_ids))
    turn = [passage for passage in rendered.passages if passage.stop > first and passage.start < stop]
    return [passage._replace(start=max(passage.start, first)) for passage in turn[:-1]]


def find_asked_about(rendered: Rendered, question: Mask) -> list[Span]:
    """Return the document, or else passage, that shares most rare words with the question (BM25); equals are all found.

    It keeps its words. A single one is what the question is about: there is nothing to tell it from.
    """
    texts = [Span(segment.start, segment.stop) for segment in rendered.segments or rendered.passages]
    eligible = list_eligible(rendered)
    if len(eligible) == 1:
        return [Span(eligible[0].start, eligible[0].stop)]
    by_token = score_documents(rendered.token_ids, texts, question)
    scores = [float(by_token[slice(*text)].max(initial=0.0)) for text in texts]
    return [text for score, text in zip(scores, texts, strict=True) if 0 < score == max(scores)]


def split_tokens(pieces: Sequence[str]) -> list[Sentence]:
    """Return the sentences that the texts of tokens [T] make up; those whose borders cut a token are left out."""
    starts = np.cumsum([0, *map(len, pieces)])
    text = "".join(pieces).replace("▁", " ")
    found = []
    for start, stop in split_sentences(text):
        first = int(starts.searchsorted(start, side="right")) - 1
        last = int(starts.searchsorted(stop, side="left"))
        lead, trail = text[starts[first] : start], text[stop : starts[last]]
        if not (lead.strip() or trail.strip() or _BROKEN in text[start:stop]):
            found.append(Sentence(first, last, text[start:stop], lead, trail, pieces[last - 1].strip()))
    return found


def _substitute(asked: Sentence, stored: _Stored) -> Substitution | None:
    """Return the substitution of ``asked`` by ``stored``; None if they differ in what they say, or in a blank.

    Where the blanks behind them differ, as in "." and a "." with a line break, the last token stays as it is.
    """
    other, whole = stored.sentence, asked.trail == stored.sentence.trail
    kept = 0 if whole else 1
    if asked.lead != other.lead or not (whole or asked.end == other.end) or len(stored.token_ids) <= kept:
        return None
    if asked.stop - asked.start <= kept or not say_the_same(asked.text, other.text):
        return None
    stop = len(stored.token_ids) - kept
    return Substitution(asked.start, asked.stop - kept, stored.token_ids[:stop], _name_documents(stored))


def _drop_overlapping(found: Sequence[Substitution]) -> list[Substitution]:
    """Return those that do not overlap one before: the caller's documents may stand inside of each other."""
    kept: list[Substitution] = []
    for each in found:
        if not kept or each.start >= kept[-1].stop:
            kept.append(each)
    return kept


def _name_documents(stored: _Stored) -> tuple[str, ...]:
    """Return the documents that hold the stored sentence or stand before it, whose KV it rests on."""
    starts = stored.reference.document_starts
    return tuple(key for key, start in starts.items() if start < stored.sentence.stop)
