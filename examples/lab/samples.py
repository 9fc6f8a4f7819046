"""Training rows for the reference model: fixed-length token rows with a loss weight for every token.

A row is one prompt in one layout, followed by as many questions and answers as fit, so that nothing is padding.
Answers weigh 1, everything else ``CONTEXT_WEIGHT``: a document's values are news and cannot be predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from transformers import PreTrainedTokenizerFast

from semsharekv_integrations import world

CONTEXT_WEIGHT = 0.1
MAX_POSITION_GAP = 1500
NO_SUBJECT = -100
TERSE_STATEMENTS = ("{k} of {t}: {v}.", "{k}, {t}: {v}.", "{t}, {k}: {v}.")  # keys close to the value, to begin with
MAX_RECALLED = 10  # statements in a recall row


@dataclass
class Row:
    """Token ids, a weight and a position for each, and where the answers stand (start, stop)."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    answers: list[tuple[int, int]] = field(default_factory=list)


class RowMaker:
    """Draws rows of ``length`` tokens from a seeded generator."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = Random(seed)
        self.end = tokenizer.eos_token_id
        self._full_stop = self._encode(".")[0]
        self._towns = {self._encode(f" {town}")[0]: index for index, town in enumerate(world.TOWNS)}

    def copy_row(self, length: int) -> Row:
        """A random stretch of ordinary tokens, again and again: practice for induction."""
        first = len(self.tokenizer.all_special_ids)
        stretch = [self.rng.randrange(first, len(self.tokenizer)) for _ in range(self.rng.randint(8, 64))]
        ids = (stretch * (length // len(stretch) + 1))[:length]
        weights = [CONTEXT_WEIGHT * (index >= len(stretch)) for index in range(length)]
        return Row(ids, weights, list(range(length)))

    def recall_row(self, length: int, num_towns: int) -> Row:
        """Statements on several towns, then the canonical ones in another order: binding without prose around it.

        Every town has every one of the few kinds drawn, so that neither town nor kind alone tells the value.
        """
        row = Row()
        self._context(row, "<|begin|>")
        towns, kinds = (
            self.rng.sample(world.TOWNS, num_towns),
            self.rng.sample(sorted(world.KINDS), self.rng.randint(1, 3)),
        )
        values = {(town, kind): world.KINDS[kind].draw(self.rng) for town in towns for kind in kinds}
        pairs = self.rng.sample(sorted(values), min(len(values), MAX_RECALLED))
        for town, kind in pairs:
            statement = self.rng.choice((*world.KINDS[kind].statements, *TERSE_STATEMENTS))
            self._context(row, " " + statement.format(t=town, v=values[town, kind], k=world.KINDS[kind].label))
        while len(row.ids) < length:
            town, kind = self.rng.choice(pairs)
            value = values[town, kind]
            asked = self.rng.choice((world.KINDS[kind].statements[0], *TERSE_STATEMENTS))
            statement = asked.format(t=town, v=value, k=world.KINDS[kind].label)
            self._context(row, " " + statement.removesuffix(f" {value}."))
            self._answer(row, f" {value}.", end=False)
        return self._cut(row, length)

    def subjects(self, ids: Sequence[int]) -> list[int]:
        """For each token the index of the town named last, up to and including it; before any, ``NO_SUBJECT``."""
        found, last = [], NO_SUBJECT
        for token_id in ids:
            last = self._towns.get(token_id, last)
            found.append(last)
        return found

    def prompt_row(self, length: int, num_documents: int, gap_share: float) -> Row:
        """Documents in a drawn layout, then questions and answers until the row is full."""
        row = Row()
        documents = world.make_documents(self.rng, num_documents)
        if self.rng.random() < 0.15 and num_documents > 1:
            documents[1] = world.swap(*documents[:2])[1]
        layout = self.rng.choice(world.LAYOUTS)
        if layout == "completion":
            self._completion(row, documents, length)
        else:
            self._chat(row, documents, layout, length)
        row = self._cut(row, length)
        if self.rng.random() < gap_share:
            self._spread(row)
        return row

    def _completion(self, row: Row, documents: Sequence[world.Document], length: int) -> None:
        summary = self.rng.random() < 0.3
        wraps = world.SUMMARY_WRAPS if summary else world.COMPLETION_WRAPS
        question, answer = (
            ("", world.join_summaries(documents)) if summary else world.ask(self.rng, self._pick(documents))
        )
        text = self.rng.choice(wraps).format(docs=world.join_texts(documents), question=question)
        self._context(row, "<|begin|>" + text)
        while True:
            space = "" if text[-1].isspace() else " "
            self._answer(row, space + answer)
            if len(row.ids) >= length:
                return
            question, answer = self._turn(documents)
            text = f"\n\nQuestion: {question}\nAnswer:"
            self._context(row, text)

    def _chat(self, row: Row, documents: Sequence[world.Document], layout: world.Layout, length: int) -> None:
        question, answer = self._turn(documents)
        messages = world.build_prompt(layout, documents, question, wrap=self.rng.randrange(1000))
        self._context(row, "<|begin|>")
        for message in messages:
            self._message(row, message)
        while True:
            self._message(row, {"role": "assistant", "content": answer})
            if len(row.ids) >= length:
                return
            question, answer = self._turn(documents)
            self._message(row, {"role": "user", "content": question})

    def _turn(self, documents: Sequence[world.Document]) -> tuple[str, str]:
        if len(documents) <= 4 and self.rng.random() < 0.15:
            return self.rng.choice(world.SUMMARY_REQUESTS), world.join_summaries(documents)
        return world.ask(self.rng, self._pick(documents))

    def _pick(self, documents: Sequence[world.Document]) -> world.Document:
        return self.rng.choice(documents)

    def _message(self, row: Row, message: world.Message) -> None:
        if message["role"] == "assistant":
            self._context(row, "<|assistant|>")
            self._answer(row, message["content"])
        else:
            self._context(row, f"<|{message['role']}|>{message['content']}<|end|>")

    def _context(self, row: Row, text: str) -> None:
        self._append(row, self._encode(text), CONTEXT_WEIGHT)

    def _answer(self, row: Row, text: str, *, end: bool = True) -> None:
        start = len(row.ids)
        self._append(row, self._encode(text) + [self.end] * end, 1.0)
        row.answers.append((start, len(row.ids)))

    def _append(self, row: Row, ids: list[int], weight: float) -> None:
        row.ids += ids
        row.weights += [weight] * len(ids)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _cut(self, row: Row, length: int) -> Row:
        answers = [(start, stop) for start, stop in row.answers if stop <= length]
        return Row(row.ids[:length], row.weights[:length], list(range(length)), answers)

    def _spread(self, row: Row) -> None:
        """Leave gaps in the positions, between sentences, so that long distances are met in short rows."""
        ends = [index + 1 for index, token_id in enumerate(row.ids[:-1]) if token_id == self._full_stop]
        for cut in self.rng.sample(ends, min(len(ends), self.rng.randint(1, 3))):
            gap = self.rng.randrange(MAX_POSITION_GAP)
            row.positions = row.positions[:cut] + [position + gap for position in row.positions[cut:]]
