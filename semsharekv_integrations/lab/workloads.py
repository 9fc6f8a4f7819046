"""Workloads: prompts that resemble earlier ones, each in a way of its own. Reuse is measured on them.

A case holds the prompts that are seen first, the prompt that is then asked, its right answer, and the answer that
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
SUMMARIZED = (2, 3)  # documents of a summary; of more the reference model gets next to none right
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
        answer: the right answer, or None if it is not known.
        stale: what the references' documents would answer, or None if that is the same or they do not say.
        values: the facts of the right answer: what one in other words has to hold.
        stale_values: those of the stale one.
        asked: id of the document that is asked about, or None if it is about several.
        is_summary: whether a summary is asked for: as many lines as documents, in any order.
    """

    workload: str
    references: tuple[Query, ...]
    target: Query
    answer: str | None
    stale: str | None = None
    values: tuple[str, ...] = ()
    stale_values: tuple[str, ...] = ()
    asked: str | None = None
    is_summary: bool = False


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
    return Scene([documents], other_order(rng, documents))


def _shared(rng: Random, count: int) -> Scene:
    """Half of the documents, from one or two references, among new ones."""
    documents = world.make_documents(rng, count + count - count // 2)
    old, new = documents[:count], documents[count:]
    seen = rng.choice(([old], [old[: count // 2], old[count // 2 :]]))
    return Scene(seen, rng.sample([*rng.sample(old, count // 2), *new], count))


def _reworded(rng: Random, count: int) -> Scene:
    """The same facts in other words and among other filler."""
    documents = world.make_documents(rng, count)
    return Scene([documents], any_order(rng, [world.reword(rng, document) for document in documents]))


def _edited(rng: Random, count: int) -> Scene:
    """One fact of every document is another."""
    documents = world.make_documents(rng, count)
    return Scene([documents], any_order(rng, [world.edit(rng, document) for document in documents]))


def _changed(rng: Random, count: int) -> Scene:
    """The same wording with other facts throughout."""
    documents = world.make_documents(rng, count)
    changed = [world.edit(rng, document, tuple(sorted(document.facts))) for document in documents]
    return Scene([documents], any_order(rng, changed))


def _swapped(rng: Random, count: int) -> Scene:
    """Pairs of documents exchange their facts; an odd one out stays as it is."""
    documents = world.make_documents(rng, count)
    target = list(documents)
    places = rng.sample(range(count), count)
    for first, second in zip(places[::2], places[1::2], strict=False):
        target[first], target[second] = world.swap(documents[first], documents[second])
    return Scene([documents], any_order(rng, target))


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
WORKLOADS = (*SCENES, "turns", "summaries")
_SUMMARY_SCENES = ("reordered", "shared", "reworded", "edited")


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
        num_documents: fewest and most documents of a target; every number between is equally likely. Summaries are
            always of 2 to 3 (``SUMMARIZED``).
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
    sizes = SUMMARIZED if workload == "summaries" else num_documents
    rngs = (Random(f"{workload} {seed} {index}") for index in range(num_cases))
    return (make_case(rng, workload, rng.randint(*sizes), layouts) for rng in rngs)


def make_case(rng: Random, workload: str, count: int, layouts: Sequence[Layout] = DEFAULT_LAYOUTS) -> Case:
    """One case with ``count`` documents in the target."""
    if workload == "turns":
        return _next_turn(rng, count)
    if workload == "summaries":
        return _summary(rng, count, layouts)
    return case_of_scene(rng, workload, SCENES[workload](rng, count), layouts)


def case_of_scene(
    rng: Random, workload: str, scene: Scene, layouts: Sequence[Layout], fact: tuple[Document, str] | None = None
) -> Case:
    """The prompts of a scene.

    Args:
        rng: draws wordings, and what is asked.
        workload: name of the case's workload.
        scene: the documents.
        layouts: where they may stand.
        fact: a document of the target and the kind that is asked for; default: one that the references state
            otherwise, if any is.
    """
    seen = [document for group in scene.seen for document in group]
    asked, kind = fact or _fact(rng, seen, scene.target)
    question, answer = world.ask(rng, asked, kind)
    used = _template(rng, layouts)
    references = [_query(used, group, world.ask(rng, rng.choice(group))[0]) for group in scene.seen]

    def target() -> Query:
        """In the references' template, or in another one."""
        return _query(rng.choice((used, _template(rng, layouts))), scene.target, question)

    stale = _stale(seen, asked, kind)
    return Case(
        workload,
        tuple(references),
        _apart(references, target),
        answer,
        None if stale is None else stale.answer(kind),
        values=(asked.facts[kind],),
        stale_values=() if stale is None else (stale.facts[kind],),
        asked=asked.town,
    )


def _summary(rng: Random, count: int, layouts: Sequence[Layout]) -> Case:
    """A summary of documents that were summarized before, in another order or wording, with other facts or others."""
    scene = SCENES[rng.choice(_SUMMARY_SCENES)](rng, count)
    used = _template(rng, layouts)
    references = [_summary_query(rng, used, group) for group in scene.seen]

    def target() -> Query:
        return _summary_query(rng, rng.choice((used, _template(rng, layouts))), scene.target)

    values = [document.facts[kind] for document in scene.target for kind in world.CORE_KINDS]
    answer = prompts.summary(scene.target)
    return Case(
        "summaries", tuple(references), _apart(references, target), answer, values=tuple(values), is_summary=True
    )


def _summary_query(rng: Random, template: _Template, documents: Sequence[Document]) -> Query:
    if template.layout != "completion":
        return _query(template, documents, rng.choice(prompts.SUMMARY_REQUESTS))
    wording = prompts.SUMMARY_WRAPS[template.wrap % len(prompts.SUMMARY_WRAPS)]
    return Query(wording.format(docs=prompts.join(documents)), _texts(documents))


def _next_turn(rng: Random, count: int) -> Case:
    """A conversation about documents in the system message goes on, under another system line."""
    documents = world.make_documents(rng, count)
    *earlier, (last, reply) = world.converse(rng, documents, rng.randint(1, MAX_EARLIER_TURNS))
    known = {reply, *(answer for _, answer in earlier)}
    asked, kind = _fact(rng, (), documents)
    question, answer = world.ask(rng, asked, kind)
    while answer in known:
        asked, kind = _fact(rng, (), documents)
        question, answer = world.ask(rng, asked, kind)

    def query(turns: Sequence[tuple[str, str]], final: str) -> Query:
        return _conversation(documents, turns, final, rng.randrange(_NUM_WRAPS))

    references = [query(earlier, last)]
    target = _apart(references, lambda: query([*earlier, (last, reply)], question))
    return Case("turns", tuple(references), target, answer, values=(asked.facts[kind],), asked=asked.town)


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


def _stale(seen: Sequence[Document], asked: Document, kind: str) -> Document | None:
    """The document of ``seen`` that would answer a question on ``asked``, if there is one and it is not right."""
    known = [document for document in seen if document.town == asked.town and kind in document.facts]
    return next((document for document in known if document.facts[kind] != asked.facts[kind]), None)


def any_order(rng: Random, documents: Sequence[Document]) -> Sequence[Document]:
    """As they stand or, as often, in another order."""
    return rng.choice((documents, other_order(rng, documents)))


def other_order(rng: Random, documents: Sequence[Document]) -> Sequence[Document]:
    """In another order; two documents or more."""
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
