"""Scenarios of the speed bench: prompts of a length asked for, behind earlier prompts that they resemble.

The documents are those of the news world (see ``lab.world``), drawn one by one and so the same at every length; where
towns run out, a town has a second report. Text is text: random weights compute on it what trained ones would.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import cycle
from random import Random
from types import MappingProxyType

from semsharekv_integrations.lab import prompts, world
from semsharekv_integrations.lab.workloads import Query
from semsharekv_integrations.lab.world import Document
from semsharekv_integrations.model.prompt import Prompt

REWORDED_SHARES = (0.1, 0.3, 0.5)
FEWEST_SENTENCES = 16  # of a prompt: two documents
FEWEST_TOKENS_OF_A_SENTENCE = 4
WRAP = 1  # the stock wording of a LangChain retrieval chain


@dataclass(frozen=True)
class Scenario:
    """One prompt, and what was seen before it.

    Attributes:
        name: in which way the prompt resembles what was seen.
        length: tokens asked for.
        prompt_tokens: tokens of ``target``, chat template included.
        references: what is seen first.
        target: what is then asked, and timed.
    """

    name: str
    length: int
    prompt_tokens: int
    references: tuple[Query, ...]
    target: Query


@dataclass(frozen=True)
class _Pair:
    """What is seen, and what is asked."""

    reference: Query
    target: Query


class _Pool:
    """Documents drawn by seed and place, so that more of them never change the first ones."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._towns = Random(f"towns {seed}").sample(world.TOWNS, len(world.TOWNS))

    def known(self, num_sentences: int) -> list[Document]:
        """Documents of the reference, the last one cut short, with so many sentences in all."""
        return _cut_to(num_sentences, self._drawn("known", self._towns))

    def fresh(self, num_sentences: int) -> list[Document]:
        """As ``known``, of documents that are not in the reference."""
        return _cut_to(num_sentences, self._drawn("fresh", self._towns[::-1]))

    def _drawn(self, side: str, towns: Sequence[str]) -> Iterator[Document]:
        for index, town in enumerate(cycle(towns)):
            yield world.make_document(Random(f"{side} {self._seed} {index}"), town)


def _cut_to(num_sentences: int, documents: Iterable[Document]) -> list[Document]:
    found: list[Document] = []
    for document in documents:
        kept = document.sentences[:num_sentences]
        found.append(replace(document, sentences=kept))
        num_sentences -= len(kept)
        if not num_sentences:
            break
    return found


def _next_turn(pool: _Pool, rng: Random, num_sentences: int) -> _Pair:
    """A conversation goes on: its history is known to the end of the last reply, and a user turn follows."""
    documents = pool.known(num_sentences)
    messages = prompts.build("turns", documents, _question(rng, documents))
    assert not isinstance(messages, str), "the layout is one of messages"
    texts = _texts(documents)
    return _Pair(Query(messages[:-1], texts), Query(messages, texts))


def _reordered(pool: _Pool, rng: Random, num_sentences: int) -> _Pair:
    """The same documents in another order, another one first, and another question."""
    documents = pool.known(num_sentences)
    first = rng.randrange(1, len(documents))
    rest = [document for place, document in enumerate(documents) if place != first]
    return _pair(rng, documents, [documents[first], *rng.sample(rest, len(rest))])


def _shared(pool: _Pool, rng: Random, num_sentences: int) -> _Pair:
    """Every other document is new, the first one too; those known come in another order."""
    known, fresh = pool.known(num_sentences), pool.fresh(num_sentences)
    old = known[: len(fresh)][1::2][::-1]
    mixed: list[Document] = list(fresh[: len(known)])
    mixed[1::2] = old[: len(mixed[1::2])]
    return _pair(rng, known, mixed)


def _reworded(share: float, pool: _Pool, rng: Random, num_sentences: int) -> _Pair:
    """A share of each document's sentences, at least one, is in other words; facts and order stay."""
    documents = pool.known(num_sentences)
    return _pair(rng, documents, [_partly_reworded(rng, document, share) for document in documents])


def _partly_reworded(rng: Random, document: Document, share: float) -> Document:
    count = len(document.sentences)
    changed = set(rng.sample(range(count), max(1, round(share * count))))
    other = world.reword(rng, document).sentences
    sentences = [other[i] if i in changed else document.sentences[i] for i in range(count)]
    return replace(document, sentences=tuple(sentences))


def _unlike(pool: _Pool, rng: Random, num_sentences: int) -> _Pair:
    """Documents on other towns: all that is alike is the style, and the words around the documents."""
    return _pair(rng, pool.known(num_sentences), pool.fresh(num_sentences))


SCENARIOS: Mapping[str, Callable[[_Pool, Random, int], _Pair]] = MappingProxyType(
    {
        "next_turn": _next_turn,
        "reordered": _reordered,
        "shared": _shared,
        **{f"reworded_{share:.0%}"[:-1]: partial(_reworded, share) for share in REWORDED_SHARES},
        "unlike": _unlike,
    }
)


def build(name: str, length: int, seed: int, count: Callable[[Prompt], int]) -> Scenario:
    """The scenario ``name`` with the longest prompt of whole sentences that has at most ``length`` tokens.

    Args:
        name: one of ``SCENARIOS``.
        length: tokens of the prompt, template included.
        seed: of documents, order and question.
        count: tokens of a prompt.

    Raises:
        ValueError: if two documents do not fit in ``length``, or there is no such scenario.
    """
    if name not in SCENARIOS:
        raise ValueError(f"scenario is {name!r}; accepted is one of {', '.join(SCENARIOS)}")
    pool = _Pool(seed)

    def made(num_sentences: int) -> _Pair:
        return SCENARIOS[name](pool, Random(f"{name} {seed}"), num_sentences)

    tokens = cache(lambda num_sentences: count(made(num_sentences).target.prompt))
    sizes = range(FEWEST_SENTENCES, FEWEST_SENTENCES + length // FEWEST_TOKENS_OF_A_SENTENCE)
    place = bisect_right(sizes, length, key=tokens)
    while place and tokens(sizes[place - 1]) > length:  # other words are not quite as many
        place -= 1
    if not place:
        least = tokens(FEWEST_SENTENCES)
        raise ValueError(f"length is {length}; accepted is {least} tokens or more in scenario {name!r}")
    size = sizes[place - 1]
    pair = made(size)
    return Scenario(name, length, tokens(size), (pair.reference,), pair.target)


def _pair(rng: Random, seen: Sequence[Document], asked: Sequence[Document]) -> _Pair:
    return _Pair(_query(rng, seen), _query(rng, asked))


def _query(rng: Random, documents: Sequence[Document]) -> Query:
    return Query(prompts.build("system", documents, _question(rng, documents), WRAP), _texts(documents))


def _question(rng: Random, documents: Sequence[Document]) -> str:
    return world.ask(rng, rng.choice(documents))[0]


def _texts(documents: Sequence[Document]) -> Mapping[str, str]:
    """Texts by town, and by number where a town has several."""
    seen: Counter[str] = Counter()
    texts = {}
    for document in documents:
        seen[document.town] += 1
        texts[f"{document.town} {seen[document.town]}"] = document.text
    return MappingProxyType(texts)
