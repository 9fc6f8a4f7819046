"""A synthetic news world: seeded documents that state facts, and questions with one right answer.

The reference model is trained on it and quality is measured on it. Every sentence names its town and the
kind of fact *before* the value, because a causal decoder can only bind a value to what came before it.

Knows nothing about prompts, tokenizers or models: see ``lab.prompts`` for how documents reach a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from random import Random
from types import MappingProxyType


def _words(text: str) -> tuple[str, ...]:
    """The words between bars, or between spaces if there are none."""
    return tuple(text.split("|" if "|" in text else None))


def _names(heads: str, tails: str) -> tuple[str, ...]:
    """Every head joined to every tail, in a fixed order."""
    return tuple(head + tail for head, tail in product(heads.split(), tails.split()))


TOWNS = _names(
    "Pror Vel Kar Dun Mor Tel Bras Lin Ost Gar Ness Hal Ryn Fol Zan Wick",
    "na mar dov ton vik berg ora eck um by",
)
FIRST_NAMES = _words(
    "Anna Boris Clara David Elena Felix Greta Henry Irina Jonas Karin Louis Maria Nils Olga Peter Rosa "
    "Simon Tanya Viktor Wanda Yusuf Zelda Amir Bella Carl Dora Emil Frida Georg Hilda Ivan Julia Kurt "
    "Lena Marco Nadia Oscar"
)
SURNAMES = _names("Bel Cas Dar Fer Hol Jan Kel Lor Men Nor Pet Ros", "mor sen win ley ski ard eau ini")
COMPANIES = _names("Alt Bor Cen Dyn Eri Fen Glo Hex", "ron tech via lux dex nova")
COMPANY_FORMS = _words("Works Group Lines Power Foods Steel Motors Energy")
EVENTS = _words(
    "flood fire storm strike festival blackout landslide protest drought collapse heatwave parade "
    "robbery blizzard marathon shortage scandal tornado wedding trial"
)
MONTHS = _words("January February March April May June July August September October November December")
PLACES = _words(
    "school church stadium library museum theater barracks monastery factory warehouse hospital market "
    "castle station college chapel"
)
PLACE_LOOKS = _words("old new red white central northern little grand")
CAUSES = _words("valve cable pump bridge engine fence tunnel bolt signal roof dam pipe switch crane gate ladder")
CAUSE_LOOKS = _words("broken rusty loose faulty cracked missing blocked burning")
OUTLETS = _words(
    "Morning Post|Daily Courier|Evening Star|National Herald|Coast Radio|Valley Times|River Gazette|City Mirror"
)


def _number(rng: Random, low: int, high: int) -> str:
    return str(rng.randrange(low, high))


def _person(rng: Random) -> str:
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(SURNAMES)}"


@dataclass(frozen=True)
class Kind:
    """One kind of fact: how it is stated, asked for and drawn. ``{t}`` is the town, ``{v}`` the value."""

    name: str
    label: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    draw: Callable[[Random], str]

    def answer(self, town: str, value: str) -> str:
        """The one right answer, in the words the reference model is trained to give."""
        return f"In {town}, the {self.label} was {value}."


def _kind(name: str, label: str, draw: Callable[[Random], str], statements: str, questions: str) -> Kind:
    canonical = f"In {{t}}, the {label} was {{v}}."
    return Kind(name, label, (canonical, *_lines(statements)), _lines(questions), draw)


def _lines(block: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in block.strip().splitlines())


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            _kind(
                "event",
                "event",
                lambda r: f"a {r.choice(EVENTS)}",
                """Reporters in {t} describe the event as {v}.
             The event that shook {t} was {v}.
             What happened in {t} was {v}.
             All the talk in {t} is of one event, {v}.
             Witnesses from {t} say that what happened was {v}.
             For {t}, the event of the week was {v}.""",
                """What was the event in {t}?
             What happened in {t}?
             In {t}, what was the event?
             Which event took place in {t}?""",
            ),
            _kind(
                "date",
                "date",
                lambda r: f"{_number(r, 1, 29)} {r.choice(MONTHS)}",
                """For {t}, it all began on the date of {v}.
             The calendar in {t} showed the date of {v}.
             People in {t} will remember the day, {v}.
             The day it reached {t} was {v}.
             Records from {t} give the date as {v}.
             It came to {t} on the day of {v}.""",
                """What was the date in {t}?
             When did it happen in {t}?
             In {t}, what was the date?
             On which day did it reach {t}?""",
            ),
            _kind(
                "affected",
                "number of people affected",
                lambda r: _number(r, 20, 9900),
                """Officials in {t} put the number of people affected at {v}.
             The count of people affected in {t} stands at {v}.
             Across {t}, people affected by it numbered {v}.
             In all of {t}, the people affected were {v}.
             Aid workers in {t} say the number of people affected is {v}.
             {t} now gives the count of people affected as {v}.""",
                """How many people were affected in {t}?
             What was the number of people affected in {t}?
             In {t}, how many people were affected?
             How many people in {t} were affected?""",
            ),
            _kind(
                "cost",
                "cost",
                lambda r: f"{_number(r, 2, 990)} million crowns",
                """Experts in {t} put the cost at {v}.
             The bill for {t} came to a cost of {v}.
             {t} is facing a cost of {v}.
             The cost to {t} is set at {v}.
             Insurers in {t} expect to pay a cost of {v}.
             To {t}, the bill was {v}.""",
                """What was the cost in {t}?
             How much did it cost {t}?
             In {t}, what was the cost?
             What bill does {t} face?""",
            ),
            _kind(
                "mayor",
                "mayor",
                _person,
                """The mayor of {t} is {v}.
             {t} is led by its mayor, {v}.
             At the town hall of {t}, the mayor is {v}.
             Speaking for {t} as mayor was {v}.
             Voters in {t} chose as mayor {v}.
             In {t}, people turned to their mayor, {v}.""",
                """Who was the mayor in {t}?
             Who is the mayor of {t}?
             In {t}, who was the mayor?
             What is the name of the mayor of {t}?""",
            ),
            _kind(
                "chief",
                "rescue chief",
                _person,
                """Rescue teams in {t} were led by chief {v}.
             The rescue chief of {t} is {v}.
             Help in {t} was led by the rescue chief, {v}.
             For {t}, the rescue chief on duty was {v}.
             The rescue in {t} was in the hands of chief {v}.
             {t} thanked its rescue chief, {v}.""",
                """Who was the rescue chief in {t}?
             Who led the rescue in {t}?
             In {t}, who was the rescue chief?
             What is the name of the rescue chief of {t}?""",
            ),
            _kind(
                "company",
                "company",
                lambda r: f"{r.choice(COMPANIES)} {r.choice(COMPANY_FORMS)}",
                """The repair work in {t} goes to the company {v}.
             {t} has hired the company {v}.
             The company called to {t} is {v}.
             Repairs in {t} are done by the company {v}.
             For {t}, the contract went to the company {v}.
             At work in {t} is the company {v}.""",
                """What was the company in {t}?
             Which company was hired in {t}?
             In {t}, what was the company?
             Which company works in {t}?""",
            ),
            _kind(
                "shelter",
                "shelter",
                lambda r: f"the {r.choice(PLACE_LOOKS)} {r.choice(PLACES)}",
                """Families in {t} found shelter in {v}.
             The shelter of {t} was set up in {v}.
             {t} opened a shelter at {v}.
             Those who sought shelter in {t} slept in {v}.
             As a shelter, {t} uses {v}.
             Beds and a shelter in {t} are ready at {v}.""",
                """What was the shelter in {t}?
             Where was the shelter in {t}?
             In {t}, what was the shelter?
             Where did families in {t} find shelter?""",
            ),
            _kind(
                "cause",
                "cause",
                lambda r: f"a {r.choice(CAUSE_LOOKS)} {r.choice(CAUSES)}",
                """Engineers in {t} say the cause was {v}.
             The cause of it all in {t} was {v}.
             {t} blames it on one cause, {v}.
             An inquiry in {t} found the cause, {v}.
             In {t}, it was caused by {v}.
             Police in {t} name as the cause {v}.""",
                """What was the cause in {t}?
             What caused it in {t}?
             In {t}, what was the cause?
             What is blamed for it in {t}?""",
            ),
            _kind(
                "road",
                "closed road",
                lambda r: f"Route {_number(r, 10, 99)}",
                """The closed road near {t} is {v}.
             Drivers near {t} should avoid the closed road, {v}.
             Around {t}, police closed the road {v}.
             The road closed in {t} was {v}.
             Trucks to {t} can not use the closed road {v}.
             To reach {t}, do not take the closed road, {v}.""",
                """What was the closed road in {t}?
             Which road was closed in {t}?
             In {t}, what was the closed road?
             Which road near {t} is closed?""",
            ),
        )
    }
)
CORE_KINDS = ("event", "date", "affected", "cost")
EXTRA_KINDS = tuple(name for name in KINDS if name not in CORE_KINDS)

HEADLINES = _lines("""News from {t}, by the {o}.
                      The {o} reports from {t}.
                      Report on {t} in the {o}.
                      {o}: the latest from {t}.
                      Special report, {t}, the {o}.
                      What the {o} knows about {t}.""")
FILLERS = _lines("""Shops in {t} stayed shut for hours.
                    The town council will meet next week.
                    Many people offered their help.
                    The weather is expected to stay calm.
                    A reader named {p} sent us a photo.
                    Schools in {t} will open again soon.
                    Nobody wanted to comment at first.
                    It was the talk of the whole region.
                    Our reporter {p} stayed until late at night.
                    Some of the {n} seats in the town hall were empty.
                    Buses ran late, but most of them ran.
                    A group of students from {t} made soup for everyone.
                    The phone lines were busy all day.
                    Trains to {t} were delayed by {n} minutes.
                    Older people said they had seen such things before.
                    Life will slowly return to normal.
                    More is expected to be known tomorrow.
                    {p}, who lives nearby, heard a loud noise.""")


@dataclass(frozen=True)
class Sentence:
    """One sentence of a document: a template, and the kind of fact it states (None for filler)."""

    template: str
    kind: str | None = None


@dataclass(frozen=True)
class Document:
    """A news report on one town. ``facts`` maps the name of a kind to its value, in no special order."""

    town: str
    facts: Mapping[str, str]
    headline: str
    sentences: tuple[Sentence, ...]

    @property
    def text(self) -> str:
        """The document as one paragraph."""
        return " ".join([self.headline.format(t=self.town), *map(self._render, self.sentences)])

    def _render(self, sentence: Sentence) -> str:
        value = self.facts[sentence.kind] if sentence.kind else ""
        return sentence.template.format(t=self.town, v=value)

    def answer(self, kind: str) -> str:
        """The right answer to a question about ``kind``."""
        return KINDS[kind].answer(self.town, self.facts[kind])

    @property
    def summary(self) -> str:
        """The core facts in one sentence, in the order of ``CORE_KINDS``."""
        *first, last = [f"the {KINDS[kind].label} was {self.facts[kind]}" for kind in CORE_KINDS]
        return f"In {self.town}, {', '.join(first)} and {last}."


def make_documents(rng: Random, count: int, *, extra_facts: int | None = None) -> list[Document]:
    """``count`` documents on different towns; each states the core facts and some extra ones among filler.

    Raises:
        ValueError: if ``count`` is not between 1 and the number of towns.
    """
    if not 1 <= count <= len(TOWNS):
        raise ValueError(f"count is {count}; accepted is 1 to {len(TOWNS)}")
    return [make_document(rng, town, extra_facts=extra_facts) for town in rng.sample(TOWNS, count)]


def make_document(rng: Random, town: str, *, extra_facts: int | None = None) -> Document:
    """A document on ``town`` with ``extra_facts`` kinds (default: one to four) beyond the core ones."""
    extra = rng.sample(EXTRA_KINDS, rng.randint(1, 4) if extra_facts is None else extra_facts)
    kinds = [*CORE_KINDS, *extra]
    rng.shuffle(kinds)
    facts = {kind: KINDS[kind].draw(rng) for kind in kinds}
    sentences = [Sentence(rng.choice(KINDS[kind].statements), kind) for kind in kinds]
    for template in rng.sample(FILLERS, rng.randint(1, 4)):
        sentences.insert(rng.randint(0, len(sentences)), Sentence(_fill(rng, template)))
    return Document(town, MappingProxyType(facts), _headline(rng), tuple(sentences))


def _headline(rng: Random) -> str:
    return rng.choice(HEADLINES).replace("{o}", rng.choice(OUTLETS))


def _fill(rng: Random, template: str) -> str:
    return template.replace("{p}", _person(rng)).replace("{n}", _number(rng, 10, 99))


def reword(rng: Random, document: Document) -> Document:
    """The same facts in the same order by another outlet: every statement in other words, fresh filler."""
    sentences = tuple(_reworded(rng, sentence) for sentence in document.sentences)
    return replace(document, headline=_headline(rng), sentences=sentences)


def _reworded(rng: Random, sentence: Sentence) -> Sentence:
    if sentence.kind is None:
        return Sentence(_fill(rng, rng.choice(FILLERS)))
    others = [statement for statement in KINDS[sentence.kind].statements if statement != sentence.template]
    return Sentence(rng.choice(others), sentence.kind)


def edit(rng: Random, document: Document, kinds: tuple[str, ...] | None = None) -> Document:
    """The same wording with new values for ``kinds`` (default: one kind, drawn)."""
    facts = dict(document.facts)
    for kind in kinds or (rng.choice(sorted(facts)),):
        facts[kind] = _another(rng, kind, facts[kind])
    return replace(document, facts=MappingProxyType(facts))


def _another(rng: Random, kind: str, value: str) -> str:
    while (new := KINDS[kind].draw(rng)) == value:
        pass
    return new


def swap(first: Document, second: Document) -> tuple[Document, Document]:
    """Exchange between two documents the values of every kind that both state; wordings stay."""
    shared = first.facts.keys() & second.facts.keys()
    taken = {kind: second.facts[kind] for kind in shared}
    given = {kind: first.facts[kind] for kind in shared}
    return (
        replace(first, facts=MappingProxyType({**first.facts, **taken})),
        replace(second, facts=MappingProxyType({**second.facts, **given})),
    )


def distract(rng: Random, document: Document) -> Document:
    """The same wording and kinds on another town, with values of its own: what a retriever confuses it with."""
    other = edit(rng, document, tuple(sorted(document.facts)))
    return replace(other, town=rng.choice([town for town in TOWNS if town != document.town]))


def ask(rng: Random, document: Document, kind: str | None = None) -> tuple[str, str]:
    """A question on ``kind`` (default: drawn from what the document states) and its right answer."""
    kind = kind or rng.choice(sorted(document.facts))
    return rng.choice(KINDS[kind].questions).format(t=document.town), document.answer(kind)


def converse(rng: Random, documents: Sequence[Document], num_turns: int) -> list[tuple[str, str]]:
    """Questions on any of the documents, each with its right answer, in the order of a conversation."""
    return [ask(rng, rng.choice(documents)) for _ in range(num_turns)]
