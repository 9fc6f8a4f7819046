"""Scenarios on text: Wikipedia paragraphs (XQuAD), long passages for multi-hop questions (MuSiQue), made-up news.

The news is that of the synthetic world, for the built-in model, which was trained on it and reads nothing else.

Cases come in groups. A group's references are one stored prompt over a few paragraphs, with another question; its
cases ask several questions about the same target, so that they can share the full prefill of its documents. Groups have
their paragraphs to themselves, until all have been drawn; then they are drawn anew in another order. A case depends on
scenario, seed, paragraphs in a prompt, group and its number in the group alone. Every gold answer stands in the
target's documents.
Knows nothing about tokenizers, models or engines.
"""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from itertools import islice
from random import Random
from types import MappingProxyType
from typing import Any, NamedTuple

from semsharekv_integrations import world
from semsharekv_integrations.errors import require
from semsharekv_integrations.lab.answers import holds_answer
from semsharekv_integrations.lab.scenarios import Case, Query, shuffle

SIZE = 6  # paragraphs in a prompt, where nothing else is asked for
SYSTEM = "Answer the question from the passages. Give the shortest answer that is right."
NEWS = 120  # reports; as many as there are paragraphs of XQuAD
OTHER_SYSTEM = "You are a careful assistant. Read the passages, then reply in a few words, from them alone."
_TOLD_WORDS = 24  # of a passage, where no answer is known that could have been told
_NUMBER = re.compile(r"\d(?:[\d.,]*\d)?")


class Question(NamedTuple):
    """What is asked, and the answers that are right; none where they are not known."""

    text: str
    golds: tuple[str, ...]


@dataclass(frozen=True)
class Passage:
    """One text that may stand in a prompt.

    Attributes:
        id: of the document.
        sentences: joined by blanks they are the text.
        reworded: some sentences in other words, by index.
        questions: about this passage.
        reworded_here: more of them, which ``text_reworded`` does not draw from.
    """

    id: str
    sentences: tuple[str, ...]
    reworded: Mapping[int, str]
    questions: tuple[Question, ...]
    reworded_here: Mapping[int, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """All of it."""
        return " ".join(self.sentences)


@cache
def read_passages() -> tuple[Passage, ...]:
    """The paragraphs of XQuAD that come with the package."""
    return tuple(
        Passage(
            f"paragraph {number}",
            tuple(found["sentences"]),
            _read_rewordings(found["reworded"]),
            tuple(Question(asked["question"], tuple(asked["answers"])) for asked in found["questions"]),
            _read_rewordings(found["reworded_here"]),
        )
        for number, found in enumerate(_read("xquad"), 1)
    )


def _read_rewordings(found: Mapping[str, str]) -> Mapping[int, str]:
    return MappingProxyType({int(index): text for index, text in found.items()})


@cache
def make_news() -> tuple[Passage, ...]:
    """Reports of the synthetic world, with a question on each fact."""
    rng = Random("news")
    return tuple(_make_report(rng, document) for document in world.make_documents(rng, NEWS))


def _make_report(rng: Random, document: world.Document) -> Passage:
    reworded = enumerate(world.reword(rng, document).lines)
    asked = [(world.ask(rng, document, kind)[0], value) for kind, value in sorted(document.facts.items())]
    return Passage(
        document.town,
        document.lines,
        MappingProxyType({index: line for index, line in reworded if line != document.lines[index]}),
        tuple(Question(question, (value,)) for question, value in asked),
    )


@cache
def read_items() -> tuple[tuple[Question, tuple[str, ...]], ...]:
    """Questions of MuSiQue that come with the package, each with the passages that it is about and is answered in."""
    items = ((Question(f["question"], tuple(f["answers"])), tuple(f["texts"])) for f in _read("musique"))
    return tuple((question, texts) for question, texts in items if _is_answered(question, texts))


def _read(name: str) -> Any:
    return json.loads(lzma.decompress((files("semsharekv_integrations") / f"assets/texts/{name}.json.xz").read_bytes()))


class Group(NamedTuple):
    """What the cases of one group are drawn from: its passages, and all others."""

    name: str  # of the scenario
    rng: Random
    own: Sequence[Passage]
    rest: Sequence[Passage]

    def make_case(
        self, target: Query, question: Question, stale: Sequence[str] = (), in_order: Query | None = None
    ) -> Case:
        """A case behind the group's stored prompt."""
        return Case(
            self.name,
            (ask(collect_texts(self.own), self.stored_question.text),),
            target,
            question.golds[0] if question.golds else None,
            stale[0] if stale else None,
            values=question.golds,
            stale_values=tuple(stale),
            in_order=in_order,
        )

    @property
    def stored_question(self) -> Question:
        """What the stored prompt asks; no case of the group asks for it."""
        return self.own[0].questions[0]

    def ask_all(self, passages: Sequence[Passage], texts: Mapping[str, str]) -> Iterator[Question]:
        """Every question on the passages that ``texts`` answer, once, in a drawn order."""
        asked = {question.text: question for passage in passages for question in passage.questions}
        asked.pop(self.stored_question.text, None)
        for question in self.rng.sample(list(asked.values()), len(asked)):
            if _is_answered(question, texts.values()):
                yield question


def _is_answered(question: Question, texts: Any) -> bool:
    return not question.golds or any(holds_answer(text, gold) for text in texts for gold in question.golds)


def collect_texts(passages: Sequence[Passage]) -> dict[str, str]:
    """Texts by id."""
    return {passage.id: passage.text for passage in passages}


def ask(
    texts: Mapping[str, str], question: str, system: str = SYSTEM, earlier: Sequence[tuple[str, str]] = ()
) -> Query:
    """A system line, the documents and a question behind them, or behind ``earlier`` questions and their answers."""
    first, *more = [asked for asked, _ in earlier] + [question]
    contents = ["\n\n".join([*texts.values(), f"Question: {first}"])]
    for (_, answer), asked in zip(earlier, more, strict=True):
        contents += [answer, f"Question: {asked}"]
    roles = ("user", "assistant") * len(contents)
    said = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return Query([{"role": "system", "content": system}, *said], MappingProxyType(dict(texts)))


def complete(case: Case) -> Case:
    """The same with prompts of plain text, for a model that knows no messages."""
    in_order = case.in_order and _join(case.in_order)
    return replace(case, references=tuple(map(_join, case.references)), target=_join(case.target), in_order=in_order)


def _join(query: Query) -> Query:
    said = [message["content"] for message in query.prompt if not isinstance(message, str)]
    return Query("\n\n".join([*said, "Answer:"]), query.documents)


def _reorder(group: Group) -> Iterator[Case]:
    """The same paragraphs in another order."""
    yield from _ask_about(group, shuffle(group.rng, group.own), group.own)


def _renew_half(group: Group) -> Iterator[Case]:
    """Half of them, among as many others."""
    size = len(group.own)
    kept = group.rng.sample(group.own, size // 2)
    new = group.rng.sample(group.rest, size - size // 2)
    in_order = [passage for passage in group.own if passage in kept] + new
    yield from _ask_about(group, shuffle(group.rng, in_order), in_order)


def _replace_all(group: Group) -> Iterator[Case]:
    """As many others: the negative control."""
    yield from _ask_about(group, group.rng.sample(group.rest, len(group.own)))


def _ask_about(
    group: Group, passages: Sequence[Passage], in_order: Sequence[Passage] | None = None, system: str = SYSTEM
) -> Iterator[Case]:
    texts = collect_texts(passages)
    for question in group.ask_all(passages, texts):
        ordered = None if in_order is None else ask(collect_texts(in_order), question.text, system)
        yield group.make_case(ask(texts, question.text, system), question, in_order=ordered)


def _change_system(group: Group) -> Iterator[Case]:
    """The same paragraphs in the same order, behind another system line."""
    yield from _ask_about(group, group.own, system=OTHER_SYSTEM)


def _continue(group: Group) -> Iterator[Case]:
    """The conversation goes on behind the answer to the stored question."""
    texts, first = collect_texts(group.own), group.stored_question
    told = first.golds[0] if first.golds else " ".join(group.own[0].text.split()[:_TOLD_WORDS])
    for question in group.ask_all(group.own, texts):
        yield group.make_case(ask(texts, question.text, earlier=[(first.text, told)]), question)


def _reword(group: Group) -> Iterator[Case]:
    """Half of the sentences in other words, each in its place."""
    known = [(passage.id, index) for passage in group.own for index in sorted(passage.reworded)]
    most = sum(len(passage.sentences) for passage in group.own) // 2
    chosen = set(group.rng.sample(known, min(most, len(known))))
    yield from _ask_reworded(
        group, {p.id: {index: p.reworded[index] for index in p.reworded if (p.id, index) in chosen} for p in group.own}
    )


def _reword_all(group: Group) -> Iterator[Case]:
    """Every sentence in other words, each in its place."""
    yield from _ask_reworded(group, {passage.id: passage.reworded for passage in group.own})


def keep_reworded(passages: Sequence[Passage]) -> list[Passage]:
    """Passages without the sentences that have no other words; only those of which two sentences or more are left."""
    kept = []
    for passage in passages:
        other = {**passage.reworded_here, **passage.reworded}
        if len(other) > 1:
            sentences = tuple(passage.sentences[index] for index in sorted(other))
            reworded = dict(enumerate(other[index] for index in sorted(other)))
            kept.append(replace(passage, sentences=sentences, reworded=reworded, reworded_here={}))
    return kept


def _ask_reworded(group: Group, rewordings: Mapping[str, Mapping[int, str]]) -> Iterator[Case]:
    texts = {
        passage.id: " ".join(
            rewordings[passage.id].get(index, sentence) for index, sentence in enumerate(passage.sentences)
        )
        for passage in group.own
    }
    for question in group.ask_all(group.own, texts):
        yield group.make_case(ask(texts, question.text), question)


def _edit(group: Group) -> Iterator[Case]:
    """One number is another, in its document and in the gold answer; what it was is the stale answer."""
    texts = collect_texts(group.own)
    about = {question: passage for passage in group.own for question in passage.questions}
    for question in group.ask_all(group.own, texts):
        edited = _edit_number(group.rng, about[question], question)
        if edited is not None:
            text, asked = edited
            target = {**texts, about[question].id: text}
            is_known = any(holds_answer(old, gold) for old in texts.values() for gold in asked.golds)
            is_left = any(holds_answer(new, gold) for new in target.values() for gold in question.golds)
            if not is_known and not is_left and _is_answered(asked, [text]):
                yield group.make_case(ask(target, asked.text), asked, stale=question.golds)


def _edit_number(rng: Random, passage: Passage, question: Question) -> tuple[str, Question] | None:
    """The text with another number, wherever that of the answer stood, and the question with its new answers."""
    found = _NUMBER.search(question.golds[0])
    old = found.group() if found else ""
    if not old or old in question.text:
        return None
    new = old[:-1] + rng.choice([digit for digit in "0123456789" if digit != old[-1]])
    whole = re.compile(rf"(?<![\d.,]){re.escape(old)}(?!\d|[.,]\d)")
    return whole.sub(new, passage.text), Question(question.text, tuple(whole.sub(new, g) for g in question.golds))


CHANGES: Mapping[str, Callable[[Group], Iterator[Case]]] = MappingProxyType(
    {
        "text_reordered": _reorder,
        "text_shared": _renew_half,
        "text_system": _change_system,
        "text_edited": _edit,
        "text_reworded": _reword,
        "text_next_turn": _continue,
        "text_unlike": _replace_all,
        "text_reworded_all": _reword_all,
    }
)
MULTI_HOP = "musique"  # ten long passages in another order, over 5,000 tokens, one question each
TEXTS = (*CHANGES, MULTI_HOP)


def check_size(size: int, passages: Sequence[Passage] | None = None) -> None:
    """Refuse so many paragraphs in a prompt if too few are left for others, or none can be reordered."""
    most = len(read_passages() if passages is None else passages) // 2
    require(2 <= size <= most, "passages", size, f"a whole number from 2 to {most}")


def make_text_cases(
    name: str, groups: int, questions: int, seed: int, passages: Sequence[Passage] | None = None, size: int = SIZE
) -> Iterator[Case]:
    """Cases of a scenario, at most ``questions`` in each group, about ``size`` paragraphs.

    ``musique`` has one question in each group, about ten passages, and 41 groups at most.
    """
    require(name in TEXTS, "scenario", name, f"one of {', '.join(TEXTS)}")
    if name == MULTI_HOP:
        yield from _ask_multi_hop(groups, seed)
        return
    passages = read_passages() if passages is None else passages
    passages = keep_reworded(passages) if name == "text_reworded_all" else passages
    check_size(size, passages)
    for number in range(groups):
        drawn = CHANGES[name](_draw_group(name, number, seed, passages, size))
        for place, case in enumerate(islice(drawn, questions)):
            yield replace(case, place=(number, place))


def _draw_group(name: str, number: int, seed: int, passages: Sequence[Passage], size: int) -> Group:
    turn, index = divmod(number, len(passages) // size)
    order = Random(f"passages {seed} {turn}").sample(passages, len(passages))
    start = index * size
    own, rest = order[start : start + size], order[:start] + order[start + size :]
    return Group(name, Random(f"{name} {seed} {number}"), own, rest)


def _ask_multi_hop(groups: int, seed: int) -> Iterator[Case]:
    items = Random(f"{MULTI_HOP} {seed}").sample(read_items(), len(read_items()))
    for number, (question, texts) in enumerate(items[:groups]):
        rng = Random(f"{MULTI_HOP} {seed} {number}")
        other = rng.choice([another.text for another, _ in items if another is not question])
        stored = {f"passage {index}": text for index, text in enumerate(texts, 1)}
        target = ask({key: stored[key] for key in shuffle(rng, list(stored))}, question.text)
        yield Case(
            MULTI_HOP,
            (ask(stored, other),),
            target,
            question.golds[0],
            values=question.golds,
            place=(number, 0),
            in_order=ask(stored, question.text),
        )
