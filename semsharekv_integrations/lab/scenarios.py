"""Scenarios: prompts that resemble earlier ones, each in a way of its own.

The ``DRAWN`` scenarios draw how many documents a prompt has, its template and what is asked; those of ``lab.sized``
have a length instead. No document of a drawn target stands whole in the exact prefix that it shares with an earlier
prompt: what an exact prefix answers is right without more. Knows nothing about tokenizers, models or engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from semsharekv_integrations.errors import require
from semsharekv_integrations.lab import world
from semsharekv_integrations.lab.answers import Judging
from semsharekv_integrations.lab.world import Document, Layout, Message

DEFAULT_LAYOUTS: tuple[Layout, ...] = ("system", "user", "completion")
DEFAULT_DOCUMENTS = (6, 30)  # about 600 to 3,500 tokens
MIN_DOCUMENTS = 2  # one can be neither reordered nor swapped
MAX_DOCUMENTS = len(world.TOWNS) // 2  # a case may need as many again
MAX_EARLIER_TURNS = 3
NEGATIVE_CONTROL = "unlike"
_T = TypeVar("_T")
_NUM_WRAPS = 60  # a multiple of every layout's number of wordings, so that all are equally likely


@dataclass(frozen=True)
class Query:
    """A prompt, plain text or messages, and the documents that stand in it: texts by id."""

    prompt: str | list[Message]
    documents: Mapping[str, str]


@dataclass(frozen=True)
class Case:
    """One prompt behind others that it resembles."""

    scenario: str  # how it resembles them
    references: tuple[Query, ...]  # what is seen first
    target: Query  # what is then asked
    answer: str | None  # the right answer, or None if it is not known. Its lines may come in any order
    # what the references' documents would answer, or None if that is the same or they do not say
    stale: str | None = None
    # the facts of the right answer: what one in other words has to hold. On real text its gold answers: one suffices
    values: tuple[str, ...] = ()
    stale_values: tuple[str, ...] = ()  # likewise of the stale answer
    asked: str | None = None  # id of the document that is asked about, or None if it is about several
    # the number of its group, whose cases share a full prefill of their documents, and its own within it; or None
    place: tuple[int, int] | None = None
    in_order: Query | None = None  # the target with its documents in the stored order, or None if that is none other


@dataclass(frozen=True)
class Scenario:
    """Cases that a report counts together."""

    name: str  # how their prompts resemble what was seen
    cases: Iterable[Case]  # iterated once
    total: int  # how many there are
    length: int | None = None  # tokens that prompts were asked to have, or None if they were drawn
    rounds: range = range(1, 2)  # of every case. Round 0 is not timed: one-time costs fall into it
    max_new_tokens: int | None = None  # of an answer; None for a few more than the right one has
    judging: Judging | None = None  # None for that of the study
    problem: str = ""  # why there are no cases, or nothing


class Scene(NamedTuple):
    """The documents of each reference and those of the target, in prompt order."""

    seen: Sequence[Sequence[Document]]
    target: Sequence[Document]


Template = tuple[Layout, int]  # where documents stand, and in which wording


def _reorder(rng: Random, count: int) -> Scene:
    """The same documents in another order."""
    documents = world.make_documents(rng, count)
    return Scene([documents], shuffle(rng, documents))


def _renew_half(rng: Random, count: int) -> Scene:
    """Half of the documents, from one or two references, among new ones."""
    documents = world.make_documents(rng, count + count - count // 2)
    old, new = documents[:count], documents[count:]
    seen = rng.choice(([old], [old[: count // 2], old[count // 2 :]]))
    return Scene(seen, rng.sample([*rng.sample(old, count // 2), *new], count))


def _change_each(change: Callable[[Random, Document], Document], rng: Random, count: int) -> Scene:
    """Every document is another, often at another place."""
    documents = world.make_documents(rng, count)
    return Scene([documents], maybe_shuffle(rng, [change(rng, document) for document in documents]))


def _edit_throughout(rng: Random, document: Document) -> Document:
    return world.edit(rng, document, tuple(sorted(document.facts)))


def _swap(rng: Random, count: int) -> Scene:
    """Pairs of documents exchange their facts; an odd one out stays as it is."""
    documents = world.make_documents(rng, count)
    target = list(documents)
    places = rng.sample(range(count), count)
    for first, second in zip(places[::2], places[1::2], strict=False):
        target[first], target[second] = world.swap(documents[first], documents[second])
    return Scene([documents], maybe_shuffle(rng, target))


def _replace_all(rng: Random, count: int) -> Scene:
    """Documents on other towns: the negative control. What all documents have in common is their style."""
    documents = world.make_documents(rng, 2 * count)
    return Scene([documents[:count]], documents[count:])


SCENES: Mapping[str, Callable[[Random, int], Scene]] = MappingProxyType(
    {
        "reordered": _reorder,
        "shared": _renew_half,
        "reworded": partial(_change_each, world.reword),  # the same facts in other words and among other filler
        "edited": partial(_change_each, world.edit),  # one fact of every document is another
        "changed": partial(_change_each, _edit_throughout),  # the same wording with other facts
        "swapped": _swap,
        NEGATIVE_CONTROL: _replace_all,
    }
)
DRAWN = (*SCENES, "turns")


def make_cases(
    name: str,
    num_cases: int,
    seed: int,
    num_documents: tuple[int, int] = DEFAULT_DOCUMENTS,
    layouts: Sequence[Layout] = DEFAULT_LAYOUTS,
) -> Iterator[Case]:
    """Cases of a drawn scenario. A case depends on scenario, seed and index alone, not on how many there are.

    ``num_documents`` are the fewest and the most of a target; every number between is equally likely. Scenario
    ``turns`` has no other layout than ``system``.
    """
    fewest, most = num_documents
    sizes_fit = MIN_DOCUMENTS <= fewest <= most <= MAX_DOCUMENTS
    require(name in DRAWN, "scenario", name, f"one of {', '.join(DRAWN)}")
    require(sizes_fit, "num_documents", num_documents, f"from {MIN_DOCUMENTS} up to {MAX_DOCUMENTS}")
    require(len(layouts) > 0, "layouts", layouts, "one or more")

    def make_case(rng: Random) -> Case:
        count = rng.randint(fewest, most)
        if name == "turns":
            return _continue_conversation(rng, count)
        return ask_about_scene(rng, name, SCENES[name](rng, count), layouts)

    return (make_case(Random(f"{name} {seed} {index}")) for index in range(num_cases))


def ask_about_scene(
    rng: Random, name: str, scene: Scene, layouts: Sequence[Layout], fact: tuple[Document, str] | None = None
) -> Case:
    """The prompts of a scene, which ask for ``fact``; default: one that the references state otherwise, if any is."""
    seen = [document for group in scene.seen for document in group]
    asked, kind = fact or _choose_fact(rng, seen, scene.target)
    question, answer = world.ask(rng, asked, kind)
    used = draw_template(rng, layouts)
    references = [make_query(used, group, world.ask(rng, rng.choice(group))[0]) for group in scene.seen]

    def make_target() -> Query:  # in the references' template, or in another one
        return make_query(rng.choice((used, draw_template(rng, layouts))), scene.target, question)

    stale = _find_stale(seen, asked, kind)
    return Case(
        name,
        tuple(references),
        make_apart(references, make_target),
        answer,
        None if stale is None else stale.answer(kind),
        values=(asked.facts[kind],),
        stale_values=() if stale is None else (stale.facts[kind],),
        asked=asked.town,
    )


def _continue_conversation(rng: Random, count: int) -> Case:
    """A conversation about documents in the system message goes on, under another system line."""
    documents = world.make_documents(rng, count)
    *earlier, last = world.converse(rng, documents, rng.randint(1, MAX_EARLIER_TURNS))
    answer = last[1]
    while answer in {told for _, told in (*earlier, last)}:
        asked, kind = _choose_fact(rng, (), documents)
        question, answer = world.ask(rng, asked, kind)

    def make_chat(turns: Sequence[tuple[str, str]], final: str) -> Query:
        system, user = world.build_messages("system", documents, final, rng.randrange(_NUM_WRAPS))
        said = [({"role": "user", "content": asked}, {"role": "assistant", "content": told}) for asked, told in turns]
        return Query([system, *(message for turn in said for message in turn), user], map_texts(documents))

    references = (make_chat(earlier, last[0]),)
    target = make_apart(references, lambda: make_chat([*earlier, last], question))
    return Case("turns", references, target, answer, values=(asked.facts[kind],), asked=asked.town)


def make_query(template: Template, documents: Sequence[Document], question: str) -> Query:
    """The documents and the question in the template's words."""
    layout, wrap = template
    return Query(world.build_prompt(layout, documents, question, wrap), map_texts(documents))


def map_texts(documents: Sequence[Document]) -> Mapping[str, str]:
    """Texts by town."""
    return MappingProxyType({document.town: document.text for document in documents})


def draw_template(rng: Random, layouts: Sequence[Layout]) -> Template:
    """Any of the layouts in any of its wordings, each as likely."""
    return rng.choice(layouts), rng.randrange(_NUM_WRAPS)


def _choose_fact(rng: Random, seen: Sequence[Document], target: Sequence[Document]) -> tuple[Document, str]:
    """A document of the target, each as likely, and a kind of it: one that ``seen`` states otherwise, if any is."""
    contradicted = {
        (document.town, kind) for document in target for kind in document.facts if _find_stale(seen, document, kind)
    }
    asked = rng.choice([d for d in target if not contradicted or any(town == d.town for town, _ in contradicted)])
    return asked, rng.choice([k for k in sorted(asked.facts) if not contradicted or (asked.town, k) in contradicted])


def _find_stale(seen: Sequence[Document], asked: Document, kind: str) -> Document | None:
    """The document of ``seen`` that would answer a question on ``asked``, if there is one and it is not right."""
    known = [document for document in seen if document.town == asked.town and kind in document.facts]
    return next((document for document in known if document.facts[kind] != asked.facts[kind]), None)


def maybe_shuffle(rng: Random, documents: Sequence[Document]) -> Sequence[Document]:
    """As they stand or, as often, in another order."""
    return rng.choice((documents, shuffle(rng, documents)))


def shuffle(rng: Random, documents: Sequence[_T]) -> Sequence[_T]:
    """In another order; two documents or more."""
    while (shuffled := rng.sample(documents, len(documents))) == documents:
        pass
    return shuffled


def make_apart(references: Sequence[Query], make: Callable[[], Query]) -> Query:
    """The first query made whose common beginning with each reference holds no whole document."""
    while True:
        query = make()
        text = _flatten(query.prompt)
        end = min(text.index(document) + len(document) for document in query.documents.values())
        if not any(_flatten(reference.prompt).startswith(text[:end]) for reference in references):
            return query


def _flatten(prompt: str | list[Message]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
