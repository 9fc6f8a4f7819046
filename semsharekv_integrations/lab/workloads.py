"""Workloads: prompts that resemble earlier ones, each in a way of its own. Reuse is measured on them.

A case holds the prompts that are seen first, the prompt that is then asked, its one right answer, and the answer that
the earlier prompts' documents would give instead. No document of a target stands whole in the exact prefix that it
shares with an earlier prompt: what an exact prefix answers is right without more.

Knows nothing about tokenizers, models or engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from types import MappingProxyType
from typing import NamedTuple

from semsharekv_integrations.lab import prompts, world
from semsharekv_integrations.lab.prompts import Layout, Message
from semsharekv_integrations.lab.world import Document

DEFAULT_LAYOUTS: tuple[Layout, ...] = ("system", "user", "completion")
DEFAULT_DOCUMENTS = (6, 30)  # about 600 to 3,500 tokens
MIN_DOCUMENTS = 2  # one can be neither reordered nor swapped
MAX_DOCUMENTS = len(world.TOWNS) // 2  # a case may need as many again
MAX_EARLIER_TURNS = 3
_NUM_WRAPS = 60  # a multiple of every layout's number of wordings, so that all are equally likely


@dataclass(frozen=True)
class Query:
    """A prompt, plain text or messages, and the documents that stand in it: texts by town."""

    prompt: str | list[Message]
    documents: Mapping[str, str]


@dataclass(frozen=True)
class Case:
    """One prompt behind others that it resembles.

    Attributes:
        workload: in which way it resembles them.
        references: what is seen first.
        target: what is then asked.
        answer: the one right answer.
        stale: what the references' documents would answer, or None if that is the same or they do not say.
    """

    workload: str
    references: tuple[Query, ...]
    target: Query
    answer: str
    stale: str | None


class Scene(NamedTuple):
    """The documents of each reference and those of the target, in prompt order."""

    seen: Sequence[Sequence[Document]]
    target: Sequence[Document]


class _Template(NamedTuple):
    layout: Layout
    wrap: int


def _reordered(rng: Random, count: int) -> Scene:
    """The same documents in another order."""
    documents = world.make_documents(rng, count)
    return Scene([documents], _other_order(rng, documents))


def _shared(rng: Random, count: int) -> Scene:
    """Half of the documents, from one or two references, among new ones."""
    documents = world.make_documents(rng, count + count - count // 2)
    old, new = documents[:count], documents[count:]
    seen = rng.choice(([old], [old[: count // 2], old[count // 2 :]]))
    return Scene(seen, rng.sample([*rng.sample(old, count // 2), *new], count))


def _reworded(rng: Random, count: int) -> Scene:
    """The same facts in other words and among other filler."""
    documents = world.make_documents(rng, count)
    return Scene([documents], _any_order(rng, [world.reword(rng, document) for document in documents]))


def _edited(rng: Random, count: int) -> Scene:
    """One fact of every document is another."""
    documents = world.make_documents(rng, count)
    return Scene([documents], _any_order(rng, [world.edit(rng, document) for document in documents]))


def _changed(rng: Random, count: int) -> Scene:
    """The same wording with other facts throughout."""
    documents = world.make_documents(rng, count)
    changed = [world.edit(rng, document, tuple(sorted(document.facts))) for document in documents]
    return Scene([documents], _any_order(rng, changed))


def _swapped(rng: Random, count: int) -> Scene:
    """Pairs of documents exchange their facts; an odd one out stays as it is."""
    documents = world.make_documents(rng, count)
    target = list(documents)
    places = rng.sample(range(count), count)
    for first, second in zip(places[::2], places[1::2], strict=False):
        target[first], target[second] = world.swap(documents[first], documents[second])
    return Scene([documents], _any_order(rng, target))


def _unlike(rng: Random, count: int) -> Scene:
    """Documents on other towns: the negative control. What all documents have in common is their style."""
    documents = world.make_documents(rng, 2 * count)
    return Scene([documents[:count]], documents[count:])


SCENES: Mapping[str, Callable[[Random, int], Scene]] = MappingProxyType(
    {
        "reordered": _reordered,
        "shared": _shared,
        "reworded": _reworded,
        "edited": _edited,
        "changed": _changed,
        "swapped": _swapped,
        "unlike": _unlike,
    }
)
WORKLOADS = (*SCENES, "turns")


def make_cases(
    workload: str,
    num_cases: int,
    seed: int,
    num_documents: tuple[int, int] = DEFAULT_DOCUMENTS,
    layouts: Sequence[Layout] = DEFAULT_LAYOUTS,
) -> Iterator[Case]:
    """Cases of one workload. A case depends on workload, seed and index alone, not on how many there are.

    Args:
        workload: one of ``WORKLOADS``.
        num_cases: how many.
        seed: of all that is drawn.
        num_documents: fewest and most documents of a target; every number between is equally likely.
        layouts: where documents may stand; in ``turns`` they always stand in the system message.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """
    fewest, most = num_documents
    if workload not in WORKLOADS:
        raise ValueError(f"workload is {workload!r}; accepted is one of {', '.join(WORKLOADS)}")
    if not MIN_DOCUMENTS <= fewest <= most <= MAX_DOCUMENTS:
        raise ValueError(f"num_documents is {num_documents}; accepted is from {MIN_DOCUMENTS} up to {MAX_DOCUMENTS}")
    if not layouts:
        raise ValueError("layouts is empty; accepted is at least one")
    rngs = (Random(f"{workload} {seed} {index}") for index in range(num_cases))
    return (make_case(rng, workload, rng.randint(fewest, most), layouts) for rng in rngs)


def make_case(rng: Random, workload: str, count: int, layouts: Sequence[Layout] = DEFAULT_LAYOUTS) -> Case:
    """One case with ``count`` documents in the target."""
    if workload == "turns":
        return _next_turn(rng, count)
    scene = SCENES[workload](rng, count)
    seen = [document for group in scene.seen for document in group]
    asked, kind = _fact(rng, seen, scene.target)
    question, answer = world.ask(rng, asked, kind)
    used = _template(rng, layouts)
    references = [_query(used, group, world.ask(rng, rng.choice(group))[0]) for group in scene.seen]

    def target() -> Query:
        """In the references' template, or in another one."""
        return _query(rng.choice((used, _template(rng, layouts))), scene.target, question)

    return Case(workload, tuple(references), _apart(references, target), answer, _stale(seen, asked, kind))


def _next_turn(rng: Random, count: int) -> Case:
    """A conversation about documents in the system message goes on, under another system line."""
    documents = world.make_documents(rng, count)
    *earlier, (last, reply) = world.converse(rng, documents, rng.randint(1, MAX_EARLIER_TURNS))
    known = {reply, *(answer for _, answer in earlier)}
    question, answer = world.ask(rng, rng.choice(documents))
    while answer in known:
        question, answer = world.ask(rng, rng.choice(documents))

    def query(turns: Sequence[tuple[str, str]], final: str) -> Query:
        return _conversation(documents, turns, final, rng.randrange(_NUM_WRAPS))

    references = [query(earlier, last)]
    target = _apart(references, lambda: query([*earlier, (last, reply)], question))
    return Case("turns", tuple(references), target, answer, None)


def _conversation(documents: Sequence[Document], turns: Sequence[tuple[str, str]], question: str, wrap: int) -> Query:
    asked = prompts.build("system", documents, question, wrap)
    assert not isinstance(asked, str), "the layout is one of messages"
    history = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    return Query([asked[0], *history, asked[1]], _texts(documents))


def _query(template: _Template, documents: Sequence[Document], question: str) -> Query:
    return Query(prompts.build(template.layout, documents, question, template.wrap), _texts(documents))


def _texts(documents: Sequence[Document]) -> Mapping[str, str]:
    return MappingProxyType({document.town: document.text for document in documents})


def _template(rng: Random, layouts: Sequence[Layout]) -> _Template:
    return _Template(rng.choice(layouts), rng.randrange(_NUM_WRAPS))


def _fact(rng: Random, seen: Sequence[Document], target: Sequence[Document]) -> tuple[Document, str]:
    """A document of the target, each as likely, and a kind of it: one that ``seen`` states otherwise, if any is."""
    contradicted = {
        (document.town, kind) for document in target for kind in document.facts if _stale(seen, document, kind)
    }
    asked = rng.choice([d for d in target if not contradicted or any(town == d.town for town, _ in contradicted)])
    return asked, rng.choice([k for k in sorted(asked.facts) if not contradicted or (asked.town, k) in contradicted])


def _stale(seen: Sequence[Document], asked: Document, kind: str) -> str | None:
    """What ``seen`` would answer to a question on ``asked``, if it answers and that is not right."""
    answers = [document.answer(kind) for document in seen if document.town == asked.town and kind in document.facts]
    return next((answer for answer in answers if answer != asked.answer(kind)), None)


def _any_order(rng: Random, documents: Sequence[Document]) -> Sequence[Document]:
    """As they stand or, as often, in another order."""
    return rng.choice((documents, _other_order(rng, documents)))


def _other_order(rng: Random, documents: Sequence[Document]) -> Sequence[Document]:
    while (shuffled := rng.sample(documents, len(documents))) == documents:
        pass
    return shuffled


def _apart(references: Sequence[Query], make: Callable[[], Query]) -> Query:
    """The first query made that has no whole document in the text with which a reference begins too."""
    query = make()
    while any(_shares_a_document(reference, query) for reference in references):
        query = make()
    return query


def _shares_a_document(reference: Query, query: Query) -> bool:
    before, text = _flat(reference.prompt), _flat(query.prompt)
    ends = [text.index(document) + len(document) for document in query.documents.values()]
    return before.startswith(text[: min(ends)])


def _flat(prompt: str | list[Message]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
