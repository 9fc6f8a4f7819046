"""Scenarios at a length: the longest chat prompt of whole sentences that fits so many tokens.

Documents are drawn one by one and so the same at every length; where towns run out, a town has a second report. Random
weights compute on such a text what trained ones would. Knows nothing about models or engines.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import cycle
from random import Random
from types import MappingProxyType

from semsharekv_integrations.lab import prompts, world
from semsharekv_integrations.lab.prompts import Message
from semsharekv_integrations.lab.scenarios import NEGATIVE_CONTROL, Case, Query
from semsharekv_integrations.lab.world import Document

REWORDED_SHARES = (0.1, 0.3, 0.5)
FEWEST_SENTENCES = 16  # of a prompt: two documents
FEWEST_TOKENS_OF_A_SENTENCE = 4
WRAP = 1  # the stock wording of a LangChain retrieval chain


class _Pool:
    """Documents drawn by seed and place, so that more of them never change the first ones."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._towns = Random(f"towns {seed}").sample(world.TOWNS, len(world.TOWNS))

    def take_known(self, num_sentences: int) -> list[Document]:
        """Documents of the reference, the last one cut short, with so many sentences in all."""
        return _cut(num_sentences, self._draw("known", self._towns))

    def take_fresh(self, num_sentences: int) -> list[Document]:
        """As ``take_known``, of documents that are not in the reference."""
        return _cut(num_sentences, self._draw("fresh", self._towns[::-1]))

    def _draw(self, side: str, towns: Sequence[str]) -> Iterator[Document]:
        for index, town in enumerate(cycle(towns)):
            yield world.make_document(Random(f"{side} {self._seed} {index}"), town)


def _cut(num_sentences: int, documents: Iterable[Document]) -> list[Document]:
    found: list[Document] = []
    for document in documents:
        kept = document.sentences[:num_sentences]
        found.append(replace(document, sentences=kept))
        num_sentences -= len(kept)
        if not num_sentences:
            break
    return found


def _continue_conversation(pool: _Pool, rng: Random, num_sentences: int) -> Case:
    """A conversation goes on: its history is known to the end of the last reply, and a user turn follows."""
    documents = pool.take_known(num_sentences)
    question, told = _ask(rng, documents)
    messages = prompts.build_messages("turns", documents, question)
    return _make_case((_make_query(messages[:-1], documents),), _make_query(messages, documents), told)


def _reorder(pool: _Pool, rng: Random, num_sentences: int) -> Case:
    """The same documents in another order, another one first, and another question."""
    documents = pool.take_known(num_sentences)
    first = rng.randrange(1, len(documents))
    rest = [document for place, document in enumerate(documents) if place != first]
    return _make_pair(rng, documents, [documents[first], *rng.sample(rest, len(rest))])


def _renew_half(pool: _Pool, rng: Random, num_sentences: int) -> Case:
    """Every other document is new, the first one too; those known come in another order."""
    known, fresh = pool.take_known(num_sentences), pool.take_fresh(num_sentences)
    old = known[: len(fresh)][1::2][::-1]
    mixed: list[Document] = list(fresh[: len(known)])
    mixed[1::2] = old[: len(mixed[1::2])]
    return _make_pair(rng, known, mixed)


def _reword(share: float, pool: _Pool, rng: Random, num_sentences: int) -> Case:
    """A share of each document's sentences, at least one, is in other words; facts and order stay."""
    documents = pool.take_known(num_sentences)
    return _make_pair(rng, documents, [_reword_partly(rng, document, share) for document in documents])


def _reword_partly(rng: Random, document: Document, share: float) -> Document:
    count = len(document.sentences)
    changed = set(rng.sample(range(count), max(1, round(share * count))))
    other = world.reword(rng, document).sentences
    return replace(document, sentences=tuple((other if i in changed else document.sentences)[i] for i in range(count)))


def _replace_all(pool: _Pool, rng: Random, num_sentences: int) -> Case:
    """Documents on other towns: all that is alike is the style, and the words around the documents."""
    return _make_pair(rng, pool.take_known(num_sentences), pool.take_fresh(num_sentences))


SIZED: Mapping[str, Callable[[_Pool, Random, int], Case]] = MappingProxyType(
    {
        "next_turn": _continue_conversation,
        "reordered": _reorder,
        "shared": _renew_half,
        **{f"reworded_{share:.0%}"[:-1]: partial(_reword, share) for share in REWORDED_SHARES},
        NEGATIVE_CONTROL: _replace_all,
    }
)


def make_sized_case(name: str, length: int, seed: int, count: Callable[[str | list[Message]], int]) -> Case:
    """The case of a scenario whose target is the longest prompt of whole sentences with at most ``length`` tokens.

    Args:
        name: one of ``SIZED``.
        length: tokens of the prompt, template included.
        seed: of documents, order and question.
        count: tokens of a prompt.

    Raises:
        ValueError: if two documents do not fit in ``length``, or there is no such scenario.
    """
    if name not in SIZED:
        raise ValueError(f"scenario is {name!r}; accepted is one of {', '.join(SIZED)}")
    pool = _Pool(seed)

    def make(num_sentences: int) -> Case:
        return replace(SIZED[name](pool, Random(f"{name} {seed}"), num_sentences), scenario=name)

    tokens = cache(lambda num_sentences: count(make(num_sentences).target.prompt))
    sizes = range(FEWEST_SENTENCES, FEWEST_SENTENCES + length // FEWEST_TOKENS_OF_A_SENTENCE)
    place = bisect_right(sizes, length, key=tokens)
    while place and tokens(sizes[place - 1]) > length:  # other words are not quite as many
        place -= 1
    if not place:
        least = tokens(FEWEST_SENTENCES)
        raise ValueError(f"length is {length}; accepted is {least} tokens or more in scenario {name!r}")
    return make(sizes[place - 1])


_Told = tuple[Document, str] | None  # the document that was asked about and the kind, where the prompt states it once


def _make_pair(rng: Random, seen: Sequence[Document], asked: Sequence[Document]) -> Case:
    reference, _ = _make_chat(rng, seen)
    target, told = _make_chat(rng, asked)
    return _make_case((reference,), target, told)


def _make_chat(rng: Random, documents: Sequence[Document]) -> tuple[Query, _Told]:
    question, told = _ask(rng, documents)
    return _make_query(prompts.build_messages("system", documents, question, WRAP), documents), told


def _make_case(references: tuple[Query, ...], target: Query, told: _Told) -> Case:
    if told is None:
        return Case("", references, target, None)
    document, kind = told
    return Case("", references, target, document.answer(kind), values=(document.facts[kind],))


def _ask(rng: Random, documents: Sequence[Document]) -> tuple[str, _Told]:
    """A question; what it asks for is not told if the sentence was cut off, or if a town has several reports."""
    document = rng.choice(documents)
    kind = rng.choice(sorted(document.facts))
    is_stated = any(sentence.kind == kind for sentence in document.sentences)
    is_only = sum(other.town == document.town for other in documents) == 1
    return world.ask(rng, document, kind)[0], (document, kind) if is_stated and is_only else None


def _make_query(messages: list[Message], documents: Sequence[Document]) -> Query:
    """Documents by town, and by number where a town has several."""
    seen: Counter[str] = Counter()
    texts = {}
    for document in documents:
        seen[document.town] += 1
        texts[f"{document.town} {seen[document.town]}"] = document.text
    return Query(messages, MappingProxyType(texts))
