"""Measure summaries of two or three documents, with ROUGE-L beside the share of right ones.

    PYTHONPATH=. python examples/lab/summaries.py --cases 100 --policies exact identical semantic --out summaries.md

Takes what ``drawn.py`` takes. ROUGE-L is that of Google's ``rouge-score``: F1 of the longest common
subsequence of stemmed words. It sees words in common, not whether a number is the right one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

from rouge_score.rouge_scorer import RougeScorer

import drawn
from arguments import parse_arguments
from drawn import (
    DEFAULT_LAYOUTS,
    SCENES,
    Template,
    draw_template,
    make_apart,
    make_query,
    map_texts,
)
from semsharekv_integrations import world
from semsharekv_integrations.lab import command
from semsharekv_integrations.lab.figures import Figure, estimate_mean
from semsharekv_integrations.lab.running import run_study
from semsharekv_integrations.lab.scenarios import Case, Query, Scenario
from semsharekv_integrations.world import Document, Layout

NAME = "summaries"
SUMMARIZED = (2, 3)  # documents of a summary; of more the reference model gets next to none right
SUMMARY_TOKENS = 250  # as many as the longest right one has
_SCENES = ("reordered", "shared", "reworded", "edited")
_SCORER = RougeScorer(["rougeL"], use_stemmer=True)


def score_rouge_l(said: str, expected: str | None) -> float | None:
    """0 to 1, or None if nothing is expected."""
    return None if expected is None else float(_SCORER.score(expected, said)["rougeL"].fmeasure)


ROUGE = (
    Figure("rouge_l", "ROUGE-L", ".3f", lambda p: score_rouge_l(p.own.text, p.own.expected), estimate_mean),
    Figure(
        "full_rouge_l",
        "full prefill's ROUGE-L",
        ".3f",
        lambda p: p.full and score_rouge_l(p.full.text, p.full.expected),
        estimate_mean,
    ),
    Figure(
        "rouge_l_to_full",
        "ROUGE-L to full prefill",
        ".3f",
        lambda p: p.full and score_rouge_l(p.own.text, p.full.text),
        estimate_mean,
    ),
)


def summary_cases(num_cases: int, seed: int, layouts: Sequence[Layout] = DEFAULT_LAYOUTS) -> Iterator[Case]:
    """Cases in which documents that were summarized before are summarized again.

    They come in another order or wording, with other facts, or with other documents. A case depends on seed and index.
    """
    for index in range(num_cases):
        rng = Random(f"{NAME} {seed} {index}")
        yield _make_case(rng, rng.randint(*SUMMARIZED), layouts)


def _make_case(rng: Random, count: int, layouts: Sequence[Layout]) -> Case:
    scene = SCENES[rng.choice(_SCENES)](rng, count)
    used = draw_template(rng, layouts)
    references = tuple(_make_query(rng, used, group) for group in scene.seen)

    def make_target() -> Query:
        return _make_query(rng, rng.choice((used, draw_template(rng, layouts))), scene.target)

    values = tuple(document.facts[kind] for document in scene.target for kind in world.CORE_KINDS)
    return Case(
        NAME, references, make_apart(references, make_target), world.join_summaries(scene.target), values=values
    )


def _make_query(rng: Random, template: Template, documents: Sequence[Document]) -> Query:
    layout, wrap = template
    if layout != "completion":
        return make_query(template, documents, rng.choice(world.SUMMARY_REQUESTS))
    wording = world.SUMMARY_WRAPS[wrap % len(world.SUMMARY_WRAPS)]
    return Query(wording.format(docs=world.join_texts(documents)), map_texts(documents))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure summaries under the policies asked for."""
    args = parse_arguments(__doc__ or "", arguments, more=drawn.add_arguments)
    study, subject = command.prepare(args, find=lambda args, subject: [])
    study, count = drawn.judge_drawn(study, subject), args.cases or drawn.CASES
    cases = summary_cases(count, args.seed, drawn.choose_layouts(args, subject))
    scenario = Scenario(NAME, cases, count, args.max_new_tokens or SUMMARY_TOKENS)
    figures = (*study.figures, *ROUGE)
    run_study(replace(study, title="Summaries", scenarios=[scenario], figures=figures), subject, args)


if __name__ == "__main__":
    sys.exit(main())
