"""Scenarios at a length: the longest chat prompt of whole sentences that fits so many tokens.

Documents are drawn one by one and so the same at every length; where towns run out, a town has a second report. Random
weights compute on such a text what trained ones would. Knows nothing about models or engines.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import cycle
from random import Random
from types import MappingProxyType

from drawn import NEGATIVE_CONTROL
from semsharekv_integrations import world
from semsharekv_integrations.errors import require
from semsharekv_integrations.lab.scenarios import Case, Query
from semsharekv_integrations.world import Document, Message

NEXT_TURN = "next_turn"
KNOWN, FRESH = "known", "fresh"
REWORDED_SHARES = (0.1, 0.3, 0.5)
FEWEST_SENTENCES = 16  # of a prompt: two documents
FEWEST_TOKENS_OF_A_SENTENCE = 4
WRAP = 1  # the stock wording of a LangChain retrieval chain


def _take(seed: int, num_sentences: int, side: str) -> list[Document]:
    """Documents with so many sentences in all, the last one cut short; more of them never change the first ones."""
    towns = Random(f"towns {seed}").sample(world.TOWNS, len(world.TOWNS))
    found: list[Document] = []
    for index, town in enumerate(cycle(towns if side == KNOWN else towns[::-1])):
        document = world.make_document(Random(f"{side} {seed} {index}"), town)
        kept = document.sentences[:num_sentences]
        found.append(replace(document, sentences=kept))
        num_sentences -= len(kept)
        if not num_sentences:
            break
    return found


_Take = Callable[[str], list[Document]]  # ``KNOWN`` ones, which are those of the reference, or ``FRESH`` ones


def _keep(rng: Random, take: _Take) -> list[Document]:
    """The same documents: a conversation goes on."""
    return take(KNOWN)


def _reorder(rng: Random, take: _Take) -> list[Document]:
    """The same documents in another order, another one first."""
    documents = take(KNOWN)
    first = documents.pop(rng.randrange(1, len(documents)))
    return [first, *rng.sample(documents, len(documents))]


def _renew_half(rng: Random, take: _Take) -> list[Document]:
    """Every other document is new, the first one too; those known come in another order."""
    known, fresh = take(KNOWN), take(FRESH)
    old = known[: len(fresh)][1::2][::-1]
    mixed = fresh[: len(known)]
    mixed[1::2] = old[: len(mixed[1::2])]
    return mixed


def _reword(share: float, rng: Random, take: _Take) -> list[Document]:
    """A share of each document's sentences, at least one, is in other words; facts and order stay."""
    documents = []
    for document in take(KNOWN):
        sentences, count = list(document.sentences), len(document.sentences)
        changed = rng.sample(range(count), max(1, round(share * count)))
        other = world.reword(rng, document).sentences
        for index in changed:
            sentences[index] = other[index]
        documents.append(replace(document, sentences=tuple(sentences)))
    return documents


def _replace_all(rng: Random, take: _Take) -> list[Document]:
    """Documents on other towns: all that is alike is the style, and the words around the documents."""
    return take(FRESH)


SIZED: Mapping[str, Callable[[Random, _Take], list[Document]]] = MappingProxyType(
    {
        NEXT_TURN: _keep,
        "reordered": _reorder,
        "shared": _renew_half,
        **{f"reworded_{share:.0%}"[:-1]: partial(_reword, share) for share in REWORDED_SHARES},
        NEGATIVE_CONTROL: _replace_all,
    }
)


def make_sized_case(name: str, length: int, seed: int, count: Callable[[str | list[Message]], int]) -> Case:
    """The case of a scenario whose target is the longest prompt of whole sentences with at most ``length`` tokens.

    ``count`` gives the tokens of a prompt, template included. Two documents must fit.
    """
    require(name in SIZED, "scenario", name, f"one of {', '.join(SIZED)}")
    make = partial(_make_case, name, seed)
    tokens = cache(lambda num_sentences: count(make(num_sentences).target.prompt))
    sizes = range(FEWEST_SENTENCES, FEWEST_SENTENCES + length // FEWEST_TOKENS_OF_A_SENTENCE)
    place = bisect_right(sizes, length, key=tokens)
    while place and tokens(sizes[place - 1]) > length:  # other words are not quite as many
        place -= 1
    require(place > 0, "length", length, f"{tokens(FEWEST_SENTENCES)} tokens or more in scenario {name!r}")
    return make(sizes[place - 1])


def _make_case(name: str, seed: int, num_sentences: int) -> Case:
    rng, take = Random(f"{name} {seed}"), partial(_take, seed, num_sentences)
    seen, asked = take(KNOWN), SIZED[name](rng, take)
    earlier = None if name == NEXT_TURN else _ask(rng, seen)[0]
    question, answer, value = _ask(rng, asked)
    if earlier is None:  # the history is known to the end of the last reply, and a user turn follows
        messages = world.build_messages("turns", asked, question)
        reference = _make_query(messages[:-1], asked)
    else:
        messages = world.build_messages("system", asked, question, WRAP)
        reference = _make_query(world.build_messages("system", seen, earlier, WRAP), seen)
    return Case(name, (reference,), _make_query(messages, asked), answer, values=(value,) if answer else ())


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
