"""A user's own documents and questions, measured as the synthetic ones are.

The file has one JSON object on each line (blank lines are skipped):

    {"documents": {"id": "text", ...},   the prompt's documents, in this order
     "question": "...",                  asked about them
     "stored": {"id": "text", ...},      optional: what an earlier prompt held; default: the same in another order
     "answer": "..."}                    optional: what a right answer mentions; without it only agreement counts

Each line becomes a case of scenario ``data``, behind a prompt on the stored documents that asked for their summary;
and, as the negative control ``unlike``, behind the stored documents of another line that has no text in common with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import MappingProxyType

from semsharekv_integrations.lab import prompts
from semsharekv_integrations.lab.prompts import Layout
from semsharekv_integrations.lab.scenarios import NEGATIVE_CONTROL, Case, Query, shuffle
from semsharekv_integrations.lab.world import Document

FIELDS = ("documents", "question", "stored", "answer")
DATA = "data"
_LONGEST_SHOWN = 60  # characters of a value in an error
_A_TEXT = "a string that is not blank"


@dataclass(frozen=True)
class Example:
    """One line: texts by id, the question, what was stored (None for the same documents), what is right (or None)."""

    documents: Mapping[str, str]
    question: str
    stored: Mapping[str, str] | None
    answer: str | None

    @property
    def texts(self) -> set[str]:
        """Those of all its documents, in the prompt or stored."""
        return {*self.documents.values(), *(self.stored or {}).values()}


def read_examples(path: Path) -> list[Example]:
    """The examples of a file.

    Raises:
        ValueError: naming file, line number, field, value and what is accepted.
        OSError: if the file cannot be read.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [_read_example(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    _require(bool(found), str(path), "the file", "", "one JSON object a line, at least one")
    return found


def _read_example(where: str, line: str) -> Example:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {_show(line)} is no JSON ({error}); accepted is one JSON object a line") from error
    _require(isinstance(fields, dict), where, "the line", fields, "a JSON object")
    unknown = sorted(fields.keys() - set(FIELDS))
    _require(not unknown, where, "a field", ", ".join(unknown), ", ".join(FIELDS))
    documents, stored = _read_texts(where, "documents", fields.get("documents")), fields.get("stored")
    if stored is None:
        _require(len(documents) > 1, where, "documents", documents, "two or more where 'stored' is not given")
    else:
        stored = _read_texts(where, "stored", stored)
    question, answer = fields.get("question"), fields.get("answer")
    _require(_is_text(question), where, "question", question, _A_TEXT)
    _require(answer is None or _is_text(answer), where, "answer", answer, f"null, or {_A_TEXT}")
    return Example(documents, question, stored, answer)


def _read_texts(where: str, name: str, value: object) -> Mapping[str, str]:
    _require(isinstance(value, dict) and bool(value), where, name, value, "an object of one or more texts by id")
    assert isinstance(value, dict)
    for key, text in value.items():
        _require(_is_text(text), where, f"{name}[{key!r}]", text, _A_TEXT)
    return MappingProxyType(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _require(ok: bool, where: str, name: str, value: object, accepted: str) -> None:
    if not ok:
        raise ValueError(f"{where}: {name} is {_show(value)}; accepted is {accepted}")


def _show(value: object) -> str:
    text = repr(dict(value) if isinstance(value, Mapping) else value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def data_cases(examples: Sequence[Example], seed: int, layouts: Sequence[Layout]) -> Iterator[Case]:
    """One case for each example."""
    for index, example in enumerate(examples):
        yield _make_case(Random(f"{DATA} {seed} {index}"), DATA, example, example, layouts)


def unlike_cases(examples: Sequence[Example], seed: int, layouts: Sequence[Layout]) -> Iterator[Case]:
    """The negative control: one case for each example for which there is another one that shares no text with it."""
    for index, example in enumerate(examples):
        rng = Random(f"{NEGATIVE_CONTROL} {seed} {index}")
        others = [other for other in examples if not other.texts & example.texts]
        if others:
            yield _make_case(rng, NEGATIVE_CONTROL, example, rng.choice(others), layouts)


def _make_case(rng: Random, name: str, example: Example, earlier: Example, layouts: Sequence[Layout]) -> Case:
    """Both prompts in the same template, as an application has one."""
    stored = _make_documents(earlier.documents if earlier.stored is None else earlier.stored)
    if earlier.stored is None:
        stored = list(shuffle(rng, stored))
    layout, wrap = rng.choice(layouts), rng.randrange(len(prompts.SYSTEM_WRAPS))

    def make_query(documents: Sequence[Document], question: str) -> Query:
        texts = {document.town: document.text for document in documents}
        return Query(prompts.build(layout, documents, question, wrap), texts)

    return Case(
        name,
        (make_query(stored, prompts.SUMMARY_REQUESTS[0]),),
        make_query(_make_documents(example.documents), example.question),
        example.answer,
        values=() if example.answer is None else (example.answer,),
    )


def _make_documents(texts: Mapping[str, str]) -> list[Document]:
    """Documents of the lab that are nothing but a text, its braces escaped."""
    return [Document(key, {}, text.replace("{", "{{").replace("}", "}}"), ()) for key, text in texts.items()]
