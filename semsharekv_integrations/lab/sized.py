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

from semsharekv_integrations.errors import require
from semsharekv_integrations.lab import world
from semsharekv_integrations.lab.scenarios import NEGATIVE_CONTROL, Case, Query
from semsharekv_integrations.lab.world import Document, Message

NEXT_TURN = "next_turn"
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


_Scene = tuple[Sequence[Document], Sequence[Document]]  # those of the reference and those of the target


def _repeat(pool: _Pool, rng: Random, num_sentences: int) -> _Scene:
    documents = pool.take_known(num_sentences)
    return documents, documents


def _reorder(pool: _Pool, rng: Random, num_sentences: int) -> _Scene:
    """The same documents in another order, another one first, and another question."""
    documents = pool.take_known(num_sentences)
    first = rng.randrange(1, len(documents))
    rest = [document for place, document in enumerate(documents) if place != first]
    return documents, [documents[first], *rng.sample(rest, len(rest))]


def _renew_half(pool: _Pool, rng: Random, num_sentences: int) -> _Scene:
    """Every other document is new, the first one too; those known come in another order."""
    known, fresh = pool.take_known(num_sentences), pool.take_fresh(num_sentences)
    old = known[: len(fresh)][1::2][::-1]
    mixed = fresh[: len(known)]
    mixed[1::2] = old[: len(mixed[1::2])]
    return known, mixed


def _reword(share: float, pool: _Pool, rng: Random, num_sentences: int) -> _Scene:
    """A share of each document's sentences, at least one, is in other words; facts and order stay."""
    documents = pool.take_known(num_sentences)
    return documents, [_reword_partly(rng, document, share) for document in documents]


def _reword_partly(rng: Random, document: Document, share: float) -> Document:
    count = len(document.sentences)
    changed = set(rng.sample(range(count), max(1, round(share * count))))
    other = world.reword(rng, document).sentences
    return replace(document, sentences=tuple((other if i in changed else document.sentences)[i] for i in range(count)))


def _replace_all(pool: _Pool, rng: Random, num_sentences: int) -> _Scene:
    """Documents on other towns: all that is alike is the style, and the words around the documents."""
    return pool.take_known(num_sentences), pool.take_fresh(num_sentences)


SIZED: Mapping[str, Callable[[_Pool, Random, int], _Scene]] = MappingProxyType(
    {
        NEXT_TURN: _repeat,
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
    require(name in SIZED, "scenario", name, f"one of {', '.join(SIZED)}")
    make = partial(_make_case, name, seed, _Pool(seed))
    tokens = cache(lambda num_sentences: count(make(num_sentences).target.prompt))
    sizes = range(FEWEST_SENTENCES, FEWEST_SENTENCES + length // FEWEST_TOKENS_OF_A_SENTENCE)
    place = bisect_right(sizes, length, key=tokens)
    while place and tokens(sizes[place - 1]) > length:  # other words are not quite as many
        place -= 1
    require(place > 0, "length", length, f"{tokens(FEWEST_SENTENCES)} tokens or more in scenario {name!r}")
    return make(sizes[place - 1])


def _make_case(name: str, seed: int, pool: _Pool, num_sentences: int) -> Case:
    rng = Random(f"{name} {seed}")
    seen, asked = SIZED[name](pool, rng, num_sentences)
    if name == NEXT_TURN:  # the history is known to the end of the last reply, and a user turn follows
        question, answer, value = _ask(rng, asked)
        messages = world.build_messages("turns", asked, question)
        reference, target = _make_query(messages[:-1], asked), _make_query(messages, asked)
    else:
        question, *_ = _ask(rng, seen)
        reference = _make_query(world.build_messages("system", seen, question, WRAP), seen)
        question, answer, value = _ask(rng, asked)
        target = _make_query(world.build_messages("system", asked, question, WRAP), asked)
    return Case(name, (reference,), target, answer, values=(value,) if answer else ())


def _ask(rng: Random, documents: Sequence[Document]) -> tuple[str, str | None, str]:
    """A question, its answer and the fact; no answer if its sentence was cut off or a town has several reports."""
    document = rng.choice(documents)
    kind = rng.choice(sorted(document.facts))
    question, answer = world.ask(rng, document, kind)
    is_stated = any(sentence.kind == kind for sentence in document.sentences)
    is_only = sum(other.town == document.town for other in documents) == 1
    return question, answer if is_stated and is_only else None, document.facts[kind]


def _make_query(messages: list[Message], documents: Sequence[Document]) -> Query:
    """Documents by town, and by number where a town has several."""
    seen: Counter[str] = Counter()
    texts = {}
    for document in documents:
        seen[document.town] += 1
        texts[f"{document.town} {seen[document.town]}"] = document.text
    return Query(messages, MappingProxyType(texts))
