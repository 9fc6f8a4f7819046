"""A user's own documents and questions, measured as the synthetic ones are.

The file has one JSON object on each line (blank lines are skipped):

    {"documents": {"id": "text", ...},   the prompt's documents, in this order
     "question": "...",                  asked about them
     "stored": {"id": "text", ...},      optional: what an earlier prompt held; default: the same in another order
     "answer": "..."}                    optional: what a right answer mentions; without it only agreement counts

Each line becomes a case of workload ``data``, behind a prompt on the stored documents that asked for their summary;
and, as the negative control ``unlike``, behind the stored documents of another line that has no text in common with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

from semsharekv_integrations.lab import prompts
from semsharekv_integrations.lab.prompts import Layout
from semsharekv_integrations.lab.workloads import Case, Query, other_order
from semsharekv_integrations.lab.world import Document

FIELDS = ("documents", "question", "stored", "answer")
DATA, UNLIKE = "data", "unlike"
_LONGEST_SHOWN = 60  # characters of a value in an error


@dataclass(frozen=True)
class Example:
    """One line: texts by id, the question, what was stored (None for the same documents), what is right (or None)."""

    documents: Mapping[str, str]
    question: str
    stored: Mapping[str, str] | None
    answer: str | None


def read_examples(path: Path) -> list[Example]:
    """The examples of a file.

    Raises:
        ValueError: naming file, line number, field, value and what is accepted.
        OSError: if the file cannot be read.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [_example(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    _require(bool(found), str(path), "the file", "", "one JSON object a line, at least one")
    return found


def _example(where: str, line: str) -> Example:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {_shown(line)} is no JSON ({error}); accepted is one JSON object a line") from error
    _require(isinstance(fields, dict), where, "the line", fields, "a JSON object")
    unknown = sorted(fields.keys() - set(FIELDS))
    _require(not unknown, where, "a field", ", ".join(unknown), ", ".join(FIELDS))
    documents, stored = _texts(where, "documents", fields.get("documents")), fields.get("stored")
    if stored is None:
        _require(len(documents) > 1, where, "documents", documents, "two or more where 'stored' is not given")
    question, answer = fields.get("question"), fields.get("answer")
    _require(_is_text(question), where, "question", question, "a string that is not blank")
    _require(answer is None or _is_text(answer), where, "answer", answer, "null, or a string that is not blank")
    return Example(documents, question, None if stored is None else _texts(where, "stored", stored), answer)


def _texts(where: str, name: str, value: object) -> Mapping[str, str]:
    _require(isinstance(value, dict) and bool(value), where, name, value, "an object of one or more texts by id")
    assert isinstance(value, dict)
    for key, text in value.items():
        _require(_is_text(text), where, f"{name}[{key!r}]", text, "a string that is not blank")
    return MappingProxyType(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _require(ok: bool, where: str, name: str, value: object, accepted: str) -> None:
    if not ok:
        raise ValueError(f"{where}: {name} is {_shown(value)}; accepted is {accepted}")


def _shown(value: object) -> str:
    text = repr(dict(value) if isinstance(value, Mapping) else value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def data_cases(examples: Sequence[Example], seed: int, layouts: Sequence[Layout]) -> Iterator[Case]:
    """One case for each example."""
    for index, example in enumerate(examples):
        rng = Random(f"{DATA} {seed} {index}")
        yield _case(rng, DATA, example, _stored(rng, example), layouts)


def unlike_cases(examples: Sequence[Example], seed: int, layouts: Sequence[Layout]) -> Iterator[Case]:
    """The negative control: one case for each example for which there is another one that shares no text with it."""
    for index, example in enumerate(examples):
        rng = Random(f"{UNLIKE} {seed} {index}")
        others = [other for other in examples if not _all_texts(other) & _all_texts(example)]
        if others:
            yield _case(rng, UNLIKE, example, _stored(rng, rng.choice(others)), layouts)


def _all_texts(example: Example) -> set[str]:
    return {*example.documents.values(), *(example.stored or {}).values()}


def _stored(rng: Random, example: Example) -> Sequence[Document]:
    if example.stored is not None:
        return _documents(example.stored)
    return other_order(rng, _documents(example.documents))


def _case(rng: Random, name: str, example: Example, stored: Sequence[Document], layouts: Sequence[Layout]) -> Case:
    """Both prompts in the same template, as an application has one."""
    layout, wrap = rng.choice(layouts), rng.randrange(len(prompts.SYSTEM_WRAPS))
    target = _documents(example.documents)
    return Case(
        name,
        (_query(layout, wrap, stored, prompts.SUMMARY_REQUESTS[0]),),
        _query(layout, wrap, target, example.question),
        example.answer,
        values=() if example.answer is None else (example.answer,),
    )


def _documents(texts: Mapping[str, str]) -> list[Document]:
    """Documents of the lab that are nothing but a text."""
    return [Document(key, {}, _literal(text), ()) for key, text in texts.items()]


def _literal(text: str) -> str:
    """The template that gives exactly this text."""
    return text.replace("{", "{{").replace("}", "}}")


def _query(layout: Layout, wrap: int, documents: Sequence[Document], question: str) -> Query:
    texts: dict[str, Any] = {document.town: document.text for document in documents}
    return Query(prompts.build(layout, documents, question, wrap), texts)
