"""A synthetic news world: seeded documents that state facts, questions with one right answer, and their prompts.

The reference model is trained on it and quality is measured on it. Every sentence names its town and the kind of fact
*before* the value, because a causal decoder can only bind a value to what came before it.

A layout is where the documents stand in a prompt (system message, user message, plain completion text, or spread over
turns). The words around them are those of the stock templates of LangChain and LlamaIndex and some plain ones, so that
the reference model reads all of them. All words are in ``assets/world.toml``. Knows nothing about tokenizers or models.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import product
from random import Random
from types import MappingProxyType
from typing import Any, Literal

WORDS: Mapping[str, Any] = MappingProxyType(
    tomllib.loads((files("semsharekv_integrations") / "assets" / "world.toml").read_text(encoding="utf-8"))
)


def _list_names(words: str | dict[str, str]) -> tuple[str, ...]:
    if isinstance(words, str):
        return tuple(words.replace("\n", "").split("|") if "|" in words else words.split())
    return tuple(head + tail for head, tail in product(words["heads"].split(), words["tails"].split()))


NAMES: Mapping[str, tuple[str, ...]] = {name: _list_names(words) for name, words in WORDS["names"].items()}
TOWNS = NAMES["towns"]
HEADLINES, FILLERS = (tuple(WORDS["reports"][name].splitlines()) for name in ("headlines", "fillers"))
_PERSON, _NUMBER = "{first_names} {surnames}", "{10-99}"


def _draw(rng: Random, pattern: str) -> str:
    """``pattern`` with a name for each ``{list}``, and a number for each ``{from-to}``, the last one left out."""

    def draw_one(match: re.Match[str]) -> str:
        low, _, high = match[1].partition("-")
        return str(rng.randrange(int(low), int(high))) if high else rng.choice(NAMES[low])

    return re.sub(r"\{([\w-]+)\}", draw_one, pattern)


@dataclass(frozen=True)
class Kind:
    """One kind of fact: how it is stated, asked for and drawn. ``{t}`` is the town, ``{v}`` the value."""

    name: str
    label: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    pattern: str

    def draw(self, rng: Random) -> str:
        """A value."""
        return _draw(rng, self.pattern)

    def answer(self, town: str, value: str) -> str:
        """The one right answer, in the words the reference model is trained to give."""
        return f"In {town}, the {self.label} was {value}."


def _make_kind(name: str, words: Mapping[str, str]) -> Kind:
    statements = (f"In {{t}}, the {words['label']} was {{v}}.", *words["statements"].splitlines())
    return Kind(name, words["label"], statements, tuple(words["questions"].splitlines()), words["value"])


KINDS: Mapping[str, Kind] = MappingProxyType({name: _make_kind(name, words) for name, words in WORDS["kinds"].items()})
CORE_KINDS = ("event", "date", "affected", "cost")
EXTRA_KINDS = tuple(name for name in KINDS if name not in CORE_KINDS)

Message = dict[str, str]
Layout = Literal["system", "user", "turns", "completion"]
LAYOUTS: tuple[Layout, ...] = ("system", "user", "turns", "completion")

_WRAPS = {name: tuple(wordings) for name, wordings in WORDS["wraps"].items()}
SYSTEM_WRAPS, USER_WRAPS, COMPLETION_WRAPS = _WRAPS["system"], _WRAPS["user"], _WRAPS["completion"]
SUMMARY_WRAPS, SUMMARY_REQUESTS, PLAIN_SYSTEMS = _WRAPS["summary"], _WRAPS["summary_requests"], _WRAPS["plain_systems"]


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
        return " ".join(self.lines)

    @property
    def lines(self) -> tuple[str, ...]:
        """The headline and the sentences, in their words."""
        return (self.headline.format(t=self.town), *map(self._render, self.sentences))

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
    """``count`` documents on different towns; each states the core facts and some extra ones among filler."""
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
        sentences.insert(rng.randint(0, len(sentences)), Sentence(_fill_blanks(rng, template)))
    return Document(town, MappingProxyType(facts), _draw_headline(rng), tuple(sentences))


def _draw_headline(rng: Random) -> str:
    return rng.choice(HEADLINES).replace("{o}", rng.choice(NAMES["outlets"]))


def _fill_blanks(rng: Random, template: str) -> str:
    return template.replace("{p}", _draw(rng, _PERSON)).replace("{n}", _draw(rng, _NUMBER))


def reword(rng: Random, document: Document) -> Document:
    """The same facts in the same order by another outlet: every statement in other words, fresh filler."""
    sentences = tuple(_reword_sentence(rng, sentence) for sentence in document.sentences)
    return replace(document, headline=_draw_headline(rng), sentences=sentences)


def _reword_sentence(rng: Random, sentence: Sentence) -> Sentence:
    if sentence.kind is None:
        return Sentence(_fill_blanks(rng, rng.choice(FILLERS)))
    others = [statement for statement in KINDS[sentence.kind].statements if statement != sentence.template]
    return Sentence(rng.choice(others), sentence.kind)


def edit(rng: Random, document: Document, kinds: tuple[str, ...] | None = None) -> Document:
    """The same wording with new values for ``kinds`` (default: one kind, drawn)."""
    facts = dict(document.facts)
    for kind in kinds or (rng.choice(sorted(facts)),):
        while facts[kind] == document.facts[kind]:
            facts[kind] = KINDS[kind].draw(rng)
    return replace(document, facts=MappingProxyType(facts))


def swap(first: Document, second: Document) -> tuple[Document, Document]:
    """Exchange between two documents the values of every kind that both state; wordings stay."""
    both = first.facts.keys() & second.facts.keys()
    taken, given = ({kind: document.facts[kind] for kind in both} for document in (second, first))
    swapped = MappingProxyType({**first.facts, **taken}), MappingProxyType({**second.facts, **given})
    return replace(first, facts=swapped[0]), replace(second, facts=swapped[1])


def ask(rng: Random, document: Document, kind: str | None = None) -> tuple[str, str]:
    """A question on ``kind`` (default: drawn from what the document states) and its right answer."""
    kind = kind or rng.choice(sorted(document.facts))
    return rng.choice(KINDS[kind].questions).format(t=document.town), document.answer(kind)


def converse(rng: Random, documents: Sequence[Document], num_turns: int) -> list[tuple[str, str]]:
    """Questions on any of the documents, each with its right answer, in the order of a conversation."""
    return [ask(rng, rng.choice(documents)) for _ in range(num_turns)]


def join_texts(documents: Sequence[Document]) -> str:
    """The documents' texts with the frameworks' usual separator."""
    return "\n\n".join(document.text for document in documents)


def join_summaries(documents: Sequence[Document]) -> str:
    """The right answer to a request for a summary: one line for each document; see ``share_right`` for their order."""
    return "\n".join(document.summary for document in documents)


def share_right(said: str, expected: str) -> float:
    """Share of the expected lines that ``said`` has, in any order; 0 if it has more lines than expected."""
    lines, wanted = ([line.strip() for line in text.strip().splitlines()] for text in (said, expected))
    return 0.0 if len(lines) > len(wanted) else len(set(lines) & set(wanted)) / len(wanted)


def build_prompt(layout: Layout, documents: Sequence[Document], question: str, wrap: int = 0) -> str | list[Message]:
    """One prompt in ``layout`` and its wording ``wrap``, modulo their number: plain text or else chat messages."""
    if layout == "completion":
        return _pick(COMPLETION_WRAPS, wrap).format(docs=join_texts(documents), question=question)
    return build_messages(layout, documents, question, wrap)


def build_messages(layout: Layout, documents: Sequence[Document], question: str, wrap: int = 0) -> list[Message]:
    """As ``build_prompt``, of a layout of messages."""
    if layout == "system":
        content = _pick(SYSTEM_WRAPS, wrap).format(docs=join_texts(documents))
        return [_message("system", content), _message("user", question)]
    system = _message("system", _pick(PLAIN_SYSTEMS, wrap))
    if layout == "user":
        return [system, _message("user", _pick(USER_WRAPS, wrap).format(docs=join_texts(documents), question=question))]
    turns = []  # in each the user hands over one document and the assistant restates its core facts
    for document in documents:
        request = f"{document.text}\n\n{SUMMARY_REQUESTS[0]}"
        turns += [_message("user", request), _message("assistant", document.summary)]
    return [system, *turns, _message("user", question)]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _pick(options: Sequence[str], index: int) -> str:
    return options[index % len(options)]
