"""A user's own documents and questions, measured as the synthetic ones are.

The file has one JSON object on each line (blank lines are skipped):

    {"documents": {"id": "text", ...},   the prompt's documents, in this order
     "question": "...",                  asked about them
     "stored": {"id": "text", ...},      optional: what an earlier prompt held; default: the same in another order
     "answer": "..."}                    optional: what a right answer mentions; without it only agreement counts

Each line becomes a case of scenario ``data``, behind a prompt on the stored documents that asked for their summary;
and, as the negative control ``unlike``, behind the stored documents of another line that has no text in common with it.
An answer is right if it mentions what it should, in any case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from semsharekv_integrations.errors import require, show_value
from semsharekv_integrations.lab.scenarios import Case, shuffle
from semsharekv_integrations.lab.texts import ask

DATA, UNLIKE = "data", "unlike"
STORED_REQUEST = "Summarize the documents."
ACCEPTED = {  # by field
    "documents": "an object of one or more texts by id, none of them blank",
    "question": "a string that is not blank",
    "stored": "null, or an object of one or more texts by id, none of them blank",
    "answer": "null, or a string that is not blank",
}
Text = Annotated[str, StringConstraints(pattern=r"\S")]
Texts = Annotated[dict[str, Text], Field(min_length=1)]


class Example(BaseModel):
    """One line: texts by id, the question, what was stored (None for the same documents), what is right (or None)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    documents: Texts
    question: Text
    stored: Texts | None = None
    answer: Text | None = None

    @property
    def texts(self) -> set[str]:
        """Those of all its documents, in the prompt or stored."""
        return {*self.documents.values(), *(self.stored or {}).values()}


def read_examples(path: Path) -> list[Example]:
    """The examples of a file; a ``ValueError`` names file, line number, field, value and what is accepted."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [_read_example(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ValueError(f"{path}: the file is empty; accepted is one JSON object a line, at least one")
    return found


def _read_example(where: str, line: str) -> Example:
    try:
        example = Example.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        name, *rest = map(str, first["loc"] or ("the line",))
        value = None if first["type"] == "missing" else first["input"]
        field = name + "".join(f"[{part!r}]" for part in rest)
        accepted = ACCEPTED["question"] if rest else ACCEPTED.get(name, f"a JSON object of {', '.join(ACCEPTED)}")
        raise ValueError(f"{where}: {field} is {show_value(value)}; accepted is {accepted}") from error
    has_other_order = example.stored is not None or len(example.documents) > 1
    require(has_other_order, f"{where}: documents", example.documents, "two or more where 'stored' is not given")
    return example


def make_own_cases(name: str, examples: Sequence[Example], seed: int) -> Iterator[Case]:
    """One case for each example; of the negative control if there is another one that shares no text with it."""
    for index, example in enumerate(examples):
        rng = Random(f"{name} {seed} {index}")
        others = [other for other in examples if not other.texts & example.texts]
        if name == DATA or others:
            yield _make_case(rng, name, example, example if name == DATA else rng.choice(others), index)


def _make_case(rng: Random, name: str, example: Example, earlier: Example, index: int) -> Case:
    stored, target = earlier.stored or earlier.documents, example.documents
    if earlier.stored is None:
        stored = {key: stored[key] for key in shuffle(rng, list(stored))}
    return Case(
        name,
        (ask(stored, STORED_REQUEST),),
        ask(target, example.question),
        example.answer,
        values=() if example.answer is None else (example.answer,),
        place=(index, 0),
        in_order=ask(stored, example.question) if stored.items() == target.items() else None,
    )
