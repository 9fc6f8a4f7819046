"""Measure on drawn prompts of the synthetic news world, each like an earlier one in a way of its own.

    PYTHONPATH=. python examples/lab/drawn.py --scenarios reordered edited --cases 200 --sizes 6 30 --out reuse.md

Takes what ``semsharekv bench`` takes, whose scenarios can stand beside these. A case has its own number of documents,
template and question. No document of a target stands whole in the exact prefix that it shares with an earlier prompt:
what an exact prefix answers is right without more. Figures are over the cases on which reuse fired off the prefix, or
over all of them for a control, and `rest` is over the others; `fired` is the share of cases on which it did.

Answers of the built-in model are right word for word, as it was trained; those of others if they mention the facts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from random import Random
from types import MappingProxyType
from typing import NamedTuple

from arguments import parse_arguments
from semsharekv_integrations import world
from semsharekv_integrations.config import Mode
from semsharekv_integrations.errors import require
from semsharekv_integrations.lab import command
from semsharekv_integrations.lab.bench import Study
from semsharekv_integrations.lab.figures import FIGURES, Figure, Outcome, Pair, estimate_share
from semsharekv_integrations.lab.policies import POLICIES, Policy, Subject
from semsharekv_integrations.lab.running import run_study
from semsharekv_integrations.lab.scenarios import Case, Query, Scenario, shuffle
from semsharekv_integrations.lab.texts import TEXTS
from semsharekv_integrations.model.loading import REFERENCE_MODEL
from semsharekv_integrations.world import Document, Layout, Message

CONTROLS: tuple[Mode, ...] = ("off", "exact")  # modes that reuse nothing off the prefix
DEFAULT_LAYOUTS: tuple[Layout, ...] = ("system", "user", "completion")
DEFAULT_DOCUMENTS, QUICK_DOCUMENTS = (6, 30), (4, 8)  # 6 to 30 are about 600 to 3,500 tokens
CASES, QUICK_CASES = 50, 3
MIN_DOCUMENTS = 2  # one can be neither reordered nor swapped
MAX_DOCUMENTS = len(world.TOWNS) // 2  # a case may need as many again
MAX_EARLIER_TURNS = 3
NEGATIVE_CONTROL = "unlike"
_NUM_WRAPS = 60  # a multiple of every layout's number of wordings, so that all are equally likely


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


def is_counted(outcome: Outcome) -> bool:
    """Whether figures are over it: those where reuse fired, or of a control."""
    return outcome.fired or outcome.report.mode in CONTROLS


def count_fired(figure: Figure) -> Figure:
    """The figure over the outcomes that count alone."""
    return _read_if(is_counted, figure)


def _read_if(is_read: Callable[[Outcome], bool], figure: Figure) -> Figure:
    """The figure over those outcomes alone."""
    return figure._replace(read=lambda pair: figure.read(pair) if is_read(pair.own) else None)


def _read_full(figure: Figure) -> Figure:
    """The figure of the full prefills of the same cases."""

    def read(pair: Pair) -> float | None:
        return None if pair.full is None else figure.read(pair._replace(own=pair.full))

    return figure._replace(name=f"full_{figure.name}", title=f"full prefill's {figure.title}", read=read, short="")


_NAMED = {figure.name: figure for figure in FIGURES}
_COUNTED = [*FIGURES, _read_full(_NAMED["accuracy"]), _read_full(_NAMED["stale_rate"])]
_REST = _NAMED["ttft_ratio"]._replace(name="rest_ttft_ratio", title="than off, rest", short="")
DRAWN_FIGURES = (
    Figure("fired", "fired", ".2f", lambda pair: pair.own.fired, estimate_share),
    *map(count_fired, _COUNTED),
    _read_if(lambda outcome: not is_counted(outcome), _REST),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` what drawn prompts take besides."""
    drawn, (few, many) = parser.add_argument_group("drawn prompts"), DEFAULT_DOCUMENTS
    layouts = f"where documents stand: {', '.join(world.LAYOUTS)}"
    drawn.add_argument("--cases", type=command.parse_count, metavar="N", help=f"of each scenario ({CASES})")
    drawn.add_argument(
        "--sizes",
        type=command.parse_count,
        nargs=2,
        metavar=("FROM", "TO"),
        help=f"documents in a prompt ({few} {many})",
    )
    drawn.add_argument("--layouts", nargs="+", choices=world.LAYOUTS, metavar="NAME", help=layouts)


def choose_layouts(args: argparse.Namespace, subject: Subject) -> Sequence[Layout]:
    """Those asked for, else all usual ones of a model that knows messages, else plain text."""
    return args.layouts or (DEFAULT_LAYOUTS if subject.tokenizer.chat_template else ("completion",))


def find_scenarios(args: argparse.Namespace, subject: Subject) -> list[Scenario]:
    """The scenarios asked for, by default all drawn ones."""
    count = args.cases or (QUICK_CASES if args.quick else CASES)
    few, many = args.sizes or (QUICK_DOCUMENTS if args.quick else DEFAULT_DOCUMENTS)
    if args.data:
        return command.find_scenarios(args, subject)
    names, found = args.scenarios or DRAWN, []
    for name in DRAWN:
        if name in names:
            cases = make_cases(name, count, args.seed, (few, many), choose_layouts(args, subject))
            room = {"max_new_tokens": args.max_new_tokens} if args.max_new_tokens else {}
            found.append(Scenario(name, cases, count, **room))
    return found + (command.find_scenarios(args, subject) if not set(names).isdisjoint(TEXTS) else [])


def judge_drawn(study: Study, subject: Subject) -> Study:
    """The study with its answers judged and counted as those on drawn prompts are."""
    return replace(
        study,
        judging="exact" if subject.name == REFERENCE_MODEL else "mentions",
        figures=(*DRAWN_FIGURES, *study.figures[len(FIGURES) :]),
    )


def prepare(args: argparse.Namespace, policies: Mapping[str, Policy] = POLICIES) -> tuple[Study, Subject]:
    """What the arguments ask for, and the model it is measured on."""
    study, subject = command.prepare(args, policies, find_scenarios)
    return judge_drawn(study, subject), subject


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the scenarios asked for."""
    args = parse_arguments(__doc__ or "", arguments, scenarios=(*DRAWN, *TEXTS), more=add_arguments)
    study, subject = prepare(args)
    run_study(study, subject, args, prepare=prepare)


if __name__ == "__main__":
    sys.exit(main())
