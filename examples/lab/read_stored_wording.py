"""Measure what it does to answers if a model reads the stored wording of sentences in place of the asked one.

    PYTHONPATH=. python examples/lab/read_stored_wording.py --model FOLDER --groups 12 --questions 12 --out stored.jsonl

Cases are those of ``text_reworded``: half of the sentences of six paragraphs are reworded by a language model, and the
stored prompt has them in the original wording. Every question is answered from four prompts, each by a full prefill
(its documents' KV is computed once for a group, and reused exactly): the asked wording; the stored wording of every
sentence that ``say_the_same`` accepts; likewise, but in the document that BM25 finds for the question; the stored
wording everywhere. No KV is approximate: this bounds what substitution can do. Each answer is appended to ``--out``;
a later run, under other rules perhaps, asks only what is new.
Written down before the first run: with accepted sentences, answers are right as often, and more texts are equal than
with the stored wording everywhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine
from semsharekv_integrations.lab.answers import is_answer, measure_f1
from semsharekv_integrations.lab.figures import compute_mcnemar, estimate_mean
from semsharekv_integrations.lab.policies import UNBOUNDED
from semsharekv_integrations.lab.scenarios import Case
from semsharekv_integrations.lab.texts import make_text_cases
from semsharekv_integrations.reuse.selection import score_documents
from semsharekv_integrations.reuse.sentences import say_the_same, split_sentences
from semsharekv_integrations.world import Message

EXTRA_TOKENS = 4  # of an answer at most, beyond those of the right one
ASKED, ACCEPTED, SPARED, STORED = WORDINGS = ("asked", "accepted", "accepted, best spared", "stored")
Texts = Mapping[str, str]  # of documents, by id


def list_sentences(text: str) -> list[str]:
    """Return the sentences of a text."""
    return [text[start:stop] for start, stop in split_sentences(text)]


def substitute(asked: str, stored: Sequence[str]) -> tuple[str, int]:
    """Return a document with stored sentences in place of those that say the same, and how many were put in."""
    text, done, count = "", 0, 0
    for start, stop in split_sentences(asked):
        sentence = asked[start:stop]
        same = None if sentence in stored else next((s for s in stored if say_the_same(sentence, s)), None)
        text += asked[done:start] + (same or sentence)
        done, count = stop, count + (same is not None)
    return text + asked[done:], count


def find_best(engine: SemShareEngine, texts: Texts, question: str) -> str:
    """Return the id of the document that BM25 over token ids ranks first for the question."""
    parts = [np.array(engine.tokenizer.encode(text, add_special_tokens=False)) for text in (*texts.values(), question)]
    edges = np.cumsum([0, *map(len, parts)])
    is_question = np.arange(edges[-1]) >= edges[-2]
    scores = score_documents(np.concatenate(parts), list(pairwise(edges[:-1].tolist())), is_question)
    return list(texts)[int(np.argmax(scores[edges[:-2]]))]


def write(case: Case, texts: Texts) -> list[Message]:
    """Return the prompt of a case with other texts of its documents."""
    *before, last = case.target.prompt
    content = last["content"]
    for key, text in case.target.documents.items():
        content = content.replace(text, texts[key])
    return [*before, {**last, "content": content}]


def word(engine: SemShareEngine, case: Case) -> tuple[dict[str, Texts], dict[str, Any]]:
    """Return the documents of the case in each wording, and what is worth to know about them."""
    asked, stored = case.target.documents, case.references[0].documents
    known = [sentence for text in stored.values() for sentence in list_sentences(text)]
    found = {key: substitute(text, known) for key, text in asked.items()}
    accepted = {key: text for key, (text, _) in found.items()}
    best = find_best(engine, asked, case.target.prompt[-1]["content"].rpartition("Question: ")[2])
    reworded = sum(sentence not in known for text in asked.values() for sentence in list_sentences(text))
    counts = {"reworded": reworded, "accepted": sum(count for _, count in found.values()), "best": found[best][1]}
    return {ASKED: asked, ACCEPTED: accepted, SPARED: {**accepted, best: asked[best]}, STORED: stored}, counts


class Answers:
    """What the model says to each prompt, kept in a file, so that no prompt is read twice."""

    def __init__(self, engine: SemShareEngine, path: Path) -> None:
        self.engine = engine
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines if re.fullmatch(r"\{.*\}", line)]  # the last may have been cut
        self._said: dict[str, str] = {line["prompt"]: line["said"] for line in found}
        self._group: tuple[int, str] | None = None  # whose documents the store holds

    def ask(self, case: Case, wording: str, texts: Texts) -> str:
        """Return the answer to the case's question over other texts of its documents."""
        prompt = write(case, texts)
        key = hashlib.sha256(json.dumps(prompt).encode()).hexdigest()
        if key not in self._said:
            assert case.place is not None and case.answer is not None, "cases on real text have both"
            if self._group != (case.place[0], wording):
                self.engine.clear()
                self._group = (case.place[0], wording)
            room = len(self.engine.tokenizer.encode(case.answer, add_special_tokens=False)) + EXTRA_TOKENS
            self._said[key] = self.engine.generate(prompt, max_new_tokens=room).text
            with self._path.open("a") as file:
                file.write(json.dumps({"prompt": key, "said": self._said[key]}) + "\n")
        return self._said[key]


def measure(answers: Answers, cases: Sequence[Case], wordings: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for each case, with what its question is answered with under each wording.

    Wordings run one behind the other within a group, so that the store holds its documents' KV for each in turn.
    """
    rows: list[dict[str, Any]] = []
    for number, found in groupby(cases, key=lambda case: case.place and case.place[0]):
        group = [(case, *word(answers.engine, case)) for case in found]
        own = [{**counts, "group": number, "said": {}, "hit": {}, "f1": {}} for _, _, counts in group]
        for name in wordings:
            for row, (case, texts, _) in zip(own, group, strict=True):
                said = answers.ask(case, name, texts[name])
                row["said"][name] = said.strip()
                row["hit"][name] = is_answer(said, case.answer, case.values, "gold")
                row["f1"][name] = measure_f1(said, case.values)
        rows += own
    return rows


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table: each wording beside the asked one, with 95% intervals over groups."""
    groups = [row["group"] for row in rows]
    share = sum(row["accepted"] for row in rows) / sum(row["reworded"] for row in rows)
    lines = [
        f"n = {len(rows)} in {len(set(groups))} groups; {share:.3f} of the reworded sentences are accepted.",
        "",
        "| what the model reads | prompts changed | gold | difference in points | won, lost | McNemar's p | F1 to gold "
        "| texts equal | F1 to the asked wording's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    changed = {ASKED: 0, ACCEPTED: sum(row["accepted"] > 0 for row in rows), STORED: len(rows)}
    changed[SPARED] = sum(row["accepted"] > row["best"] for row in rows)
    for name in rows[0]["said"]:
        gains = [100.0 * (row["hit"][name] - row["hit"][ASKED]) for row in rows]
        value, low, high = estimate_mean(gains, groups)
        pairs = [(row["said"][name], row["said"][ASKED]) for row in rows]
        cells = [
            name,
            str(changed[name]),
            f"{fmean(row['hit'][name] for row in rows):.3f}",
            f"{value:+.1f} [{low:+.1f}, {high:+.1f}]",
            f"{sum(gain > 0 for gain in gains)}, {sum(gain < 0 for gain in gains)}",
            f"{compute_mcnemar(gains).value:.3f}",
            f"{fmean(row['f1'][name] for row in rows):.3f}",
            f"{fmean(own == asked for own, asked in pairs):.3f}",
            f"{fmean(measure_f1(own, [asked]) for own, asked in pairs):.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="a folder or hub id")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--groups", type=int, default=12, help="of six paragraphs")
    parser.add_argument("--questions", type=int, default=12, help="of a group, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the cases")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one for each prompt; continued if there")
    parser.add_argument("--wordings", nargs="+", choices=WORDINGS, default=WORDINGS, help="always with 'asked'")
    return parser.parse_args()


def main() -> None:
    """Ask what ``--out`` lacks, and print the table of all."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    config = EngineConfig(reuse=ReuseConfig(mode="exact"), store=UNBOUNDED)
    engine = SemShareEngine.from_pretrained(arguments.model, config, device="cpu", dtype=arguments.dtype)
    cases = list(make_text_cases("text_reworded", arguments.groups, arguments.questions, arguments.seed))
    rows = measure(Answers(engine, arguments.out), cases, list(dict.fromkeys([ASKED, *arguments.wordings])))
    print("\n".join(summarize(rows)))


if __name__ == "__main__":
    main()
