"""Measure the reference model at full prefill on held-out documents: exact answers, by documents, layout and kind.

    PYTHONPATH=. python examples/lab/evaluate.py --prompts 200 --write

The answer to a question counts if every one of its tokens, the end included, is the model's first choice behind the
tokens before it: that is when greedy decoding gives exactly this answer. Summaries are generated, and their lines may
come in any order. ``--write`` puts the tables into the model card.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from rich.progress import track

from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine, world
from semsharekv_integrations.kv import TokenIds
from semsharekv_integrations.model.loading import REFERENCE_MODEL, NamedModel, resolve
from semsharekv_integrations.text.prompt import Prompt, PromptRenderer

HELD_OUT_SEED = 90_000
QUESTION_DOCUMENTS = (1, 2, 3, 4, 5, 6)
SUMMARY_DOCUMENTS = (1, 2, 3)
MAX_SUMMARY_TOKENS = 250
MARKERS = ("<!-- scores -->", "<!-- end of scores -->")


class Score(NamedTuple):
    """Exact answers among those asked for."""

    right: int
    asked: int

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.right / self.asked:.3f} [{low:.3f}, {high:.3f}]"

    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the share of right answers."""
        z, n, p = 1.96, self.asked, self.right / self.asked
        centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


class Judge:
    """The model, and whether it would greedily give an answer."""

    def __init__(self, name_or_path: str) -> None:
        source = NamedModel(name_or_path, device="cpu", dtype="float32", options={})
        self.model, self.tokenizer = source.load(), source.tokenizer
        self.renderer = PromptRenderer(self.tokenizer)
        self.engine = SemShareEngine(self.model, self.tokenizer, EngineConfig(reuse=ReuseConfig(mode="off")))

    def says(self, prompt: Prompt) -> str:
        """The greedy answer at full prefill."""
        return self.engine.generate(prompt, max_new_tokens=MAX_SUMMARY_TOKENS).text

    @torch.inference_mode()
    def gives(self, prompt: Prompt, answer: str) -> bool:
        """Whether greedy decoding of ``prompt`` ends in exactly ``answer``."""
        prompt_ids = self.renderer.render(prompt, {}).token_ids
        space = " " if isinstance(prompt, str) and not prompt[-1].isspace() else ""
        answer_ids = [*self.tokenizer.encode(space + answer, add_special_tokens=False), self.tokenizer.eos_token_id]
        ids: TokenIds = np.concatenate([prompt_ids, np.array(answer_ids, dtype=np.int64)])
        logits = self.model(torch.from_numpy(ids)[None], logits_to_keep=len(answer_ids) + 1).logits[0]
        return logits[:-1].argmax(-1).tolist() == answer_ids


def question_table(judge: Judge, num_prompts: int) -> Iterator[str]:
    """One row for each number of documents, one column for each layout."""
    yield f"| documents | {' | '.join(world.LAYOUTS)} | all |"
    yield "|---" * (len(world.LAYOUTS) + 2) + "|"
    for num_documents in QUESTION_DOCUMENTS:
        scores = [_layout_score(judge, layout, num_documents, num_prompts) for layout in world.LAYOUTS]
        yield f"| {num_documents} | {' | '.join(map(str, scores))} | {_sum(scores)} |"


def _layout_score(judge: Judge, layout: world.Layout, num_documents: int, num_prompts: int) -> Score:
    rng = Random(HELD_OUT_SEED + num_documents)
    right = 0
    for wrap in track(range(num_prompts), f"{num_documents} documents, {layout}", transient=True):
        documents = world.make_documents(rng, num_documents)
        question, answer = world.ask(rng, rng.choice(documents))
        right += judge.gives(world.build_prompt(layout, documents, question, wrap), answer)
    return Score(right, num_prompts)


def kind_table(judge: Judge, num_prompts: int) -> Iterator[str]:
    """Two documents that state every kind of fact: one row for each kind."""
    yield "| kind of fact | two documents |"
    yield "|---|---|"
    for kind in world.KINDS:
        rng = Random(HELD_OUT_SEED)
        right = 0
        for index in track(range(num_prompts), kind, transient=True):
            documents = world.make_documents(rng, 2, extra_facts=4 if kind in world.CORE_KINDS else 6)
            question, answer = world.ask(rng, rng.choice(documents), kind)
            layout = world.LAYOUTS[index % len(world.LAYOUTS)]
            right += judge.gives(world.build_prompt(layout, documents, question, index), answer)
        yield f"| {kind} | {Score(right, num_prompts)} |"


def summary_table(judge: Judge, num_prompts: int) -> Iterator[str]:
    """Summaries as generated, lines in any order: one row for each number of documents."""
    yield "| documents | every line right | lines right |"
    yield "|---|---|---|"
    for num_documents in SUMMARY_DOCUMENTS:
        rng = Random(HELD_OUT_SEED)
        shares = []
        for index in track(range(num_prompts), f"summaries of {num_documents}", transient=True):
            documents = world.make_documents(rng, num_documents)
            wrap = world.SUMMARY_WRAPS[index % len(world.SUMMARY_WRAPS)]
            chat = world.build_prompt("system", documents, world.SUMMARY_REQUESTS[0], index)
            said = judge.says(chat if index % 2 else wrap.format(docs=world.join_texts(documents)))
            shares.append(world.share_right(said, world.join_summaries(documents)))
        whole = Score(sum(share == 1 for share in shares), num_prompts)
        lines = Score(round(sum(shares) * num_documents), num_prompts * num_documents)
        yield f"| {num_documents} | {whole} | {lines} |"


def _sum(scores: Sequence[Score]) -> Score:
    return Score(sum(s.right for s in scores), sum(s.asked for s in scores))


def _write(card: Path, text: str) -> None:
    before, rest = card.read_text().split(MARKERS[0])
    _, after = rest.split(MARKERS[1])
    card.write_text(f"{before}{MARKERS[0]}\n{text}\n{MARKERS[1]}{after}")


def main() -> None:
    """Print the tables, and write them into the model card if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=REFERENCE_MODEL, help="folder or hub id")
    parser.add_argument("--prompts", type=int, default=200, help="prompts for each cell")
    parser.add_argument("--write", action="store_true", help="put the tables into the model card")
    args = parser.parse_args()
    judge = Judge(args.model)
    tables = [list(make(judge, args.prompts)) for make in (question_table, kind_table, summary_table)]
    text = f"n = {args.prompts} for each cell, 95% intervals in brackets.\n\n" + "\n\n".join(map("\n".join, tables))
    print(text)
    if args.write:
        _write(Path(resolve(REFERENCE_MODEL)) / "README.md", text)


if __name__ == "__main__":
    main()
