r"""Measure summaries of rewritten dialogues, by the protocol of SemShareKV's authors (arXiv 2509.24832) as it is known.

    PYTHONPATH=. python examples/lab/paper_protocol.py --dialogues dialogues.json --rewritten rewritten.json \
        --model FOLDER --dtype float32 --tokens 512 1024 --cases 20 --policies off paper --out paper.md

The reference prompt asks for a summary of dialogues, joined up to a length; its KV is stored. The target prompt asks
for that of the same dialogues, changed: ``rewritten`` has turns in other words, ``removed`` leaves turns out, and
``replaced`` has turns of other dialogues in their place. ``--shares`` says how many of the turns, all by default.
Takes what ``semsharekv bench`` takes, and goes on behind the journal beside ``--out`` as that does. ``--dialogues`` is
a JSON list of objects with ``dialogue`` and ``summaries``, ``--rewritten`` what ``rewrite.py dialogues`` made of it.
ROUGE-L is to people's summaries, the mean over them (the best one beside it), and to a full prefill's own summary.
``paper_protocol.py tables paper.json ...`` prints what runs wrote as one table each.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import SequenceMatcher
from functools import cache, partial
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, NamedTuple

import torch

from drawn import count_fired
from methods import CorruptingBench, make_corruptions
from semsharekv_integrations import ReuseConfig
from semsharekv_integrations.errors import require
from semsharekv_integrations.lab import command
from semsharekv_integrations.lab.bench import Study
from semsharekv_integrations.lab.figures import FIGURES, Figure, Outcome, Pair, estimate_mean
from semsharekv_integrations.lab.policies import POLICIES, Policy, Subject
from semsharekv_integrations.lab.report import make_headline
from semsharekv_integrations.lab.running import run_study
from semsharekv_integrations.lab.scenarios import Case, Query, Scenario
from semsharekv_integrations.reuse.matching import compute_paper_similarity, measure_hamming_distance
from semsharekv_integrations.terminal import HelpFormatter
from semsharekv_integrations.text.prompt import PromptRenderer
from shapes import UNGUARDED
from summaries import score_rouge_l

KINDS = ("rewritten", "removed", "replaced")
# Asked for a summary alone, small models go on with the conversation.
SYSTEM = {"role": "system", "content": "You are a reporter."}
REQUEST = "Write a short summary of these conversations in the third person. Begin with: In these conversations,"
NEW_TOKENS, CASES, TOKENS = 40, 10, (512,)
_BLIND = ReuseConfig(mode="paper", max_deviation=UNGUARDED)
PROTOCOL = {
    **POLICIES,
    "zeroed": Policy("As paper, over stored KV of zeros (an ablation of the paper).", _BLIND),
    "random": Policy("As paper, over stored KV of noise with its mean and spread (likewise).", _BLIND),
}
BETWEEN = "\n\n"  # dialogues of a prompt, and people's summaries in an outcome
SHOWN = (
    "agreement",
    "answer_kl",
    "top1",
    "fired_share",
    "prompt_tokens",
    "reused_tokens",
    "compute_ratio",
    "ttft_s",
    "ttft_ratio",
    "kv_kept_ratio",
    "kv_bytes",
    "decode_tokens_per_s",
)


IN_TABLES = (
    "rouge_l",
    "rouge_l_points",
    "best_rouge_l",
    "rouge_l_to_full",
    "compute_ratio",
    "ttft_ratio",
    "kv_kept_ratio",
    "prompt_tokens",
    "paper_similarity",
    "changed",
)


class Dialogue(NamedTuple):
    """What is said in turn, the same in other words where there are any, and people's summaries of it."""

    turns: tuple[str, ...]
    rewritten: Mapping[int, str]
    summaries: tuple[str, ...]


def read_dialogues(path: Path, rewritten_path: Path) -> list[Dialogue]:
    """The dialogues of which turns were rewritten."""
    known: dict[str, dict[int, str]] = {}
    for part in json.loads(rewritten_path.read_text(encoding="utf-8"))["parts"]:
        own = known.setdefault(part["text"], {})
        if part["rewritten"]:
            own[part["place"]] = part["tag"] + part["rewritten"]
    found = enumerate(json.loads(path.read_text(encoding="utf-8")))
    return [
        Dialogue(
            tuple(each["dialogue"].split("\n")),
            known[f"dialogue {number}"],
            tuple(" ".join(summary.split()) for summary in each["summaries"]),
        )
        for number, each in found
        if f"dialogue {number}" in known
    ]


def join_dialogues(
    dialogues: Sequence[Dialogue], most: int, count_tokens: Callable[[str], int], rng: Random
) -> list[Dialogue]:
    """Some of the dialogues, drawn, at least one, that have together at most ``most`` tokens."""
    joined: list[Dialogue] = []
    for dialogue in rng.sample(dialogues, len(dialogues)):
        texts = ["\n".join(each.turns) for each in (*joined, dialogue)]
        if not joined or count_tokens(BETWEEN.join(texts)) <= most:
            joined.append(dialogue)
    return joined


def change_turns(
    dialogue: Dialogue, kind: str, share: float, rng: Random, others: Sequence[Dialogue] = ()
) -> tuple[str, ...]:
    """The turns of a dialogue of which that share, in drawn places, is rewritten, removed or replaced.

    One turn always stays of what turns are removed from. Of ``rewritten``, only turns that have other words change.
    """
    require(kind in KINDS, "kind", kind, " or ".join(KINDS))
    places = sorted(dialogue.rewritten) if kind == "rewritten" else range(len(dialogue.turns))
    count = min(round(share * len(dialogue.turns)), len(places) - (kind == "removed"))
    chosen = set(rng.sample(places, max(0, count)))
    if kind == "removed":
        return tuple(turn for place, turn in enumerate(dialogue.turns) if place not in chosen)
    if kind == "rewritten":
        changed = dict(dialogue.rewritten)
    else:
        changed = {place: rng.choice(rng.choice(others).turns) for place in sorted(chosen)}
    return tuple(changed[place] if place in chosen else turn for place, turn in enumerate(dialogue.turns))


def make_cases(
    kind: str,
    share: float,
    length: int,
    count: int,
    seed: int,
    dialogues: Sequence[Dialogue],
    size: Callable[[str], int],
) -> Iterator[Case]:
    """Cases whose dialogues depend on seed, length and number alone, so that kinds and shares can be compared."""
    for number in range(count):
        joined = join_dialogues(dialogues, length, size, Random(f"dialogues {seed} {length} {number}"))
        others = [dialogue for dialogue in dialogues if dialogue not in joined] or joined
        rng = Random(f"{kind} {seed} {length} {number}")
        changed = [change_turns(dialogue, kind, share, rng, others) for dialogue in joined]
        people = tuple(" ".join(parts) for parts in zip(*(dialogue.summaries for dialogue in joined), strict=True))
        reference, target = ask([dialogue.turns for dialogue in joined]), ask(changed)
        name, wanted = name_scenario(kind, share, length), BETWEEN.join(people)
        yield Case(name, (reference,), target, wanted, values=people, place=(number, 0))


def name_scenario(kind: str, share: float, length: int) -> str:
    """What the cases of one kind, share and length are called, such as ``removed 30% of 512``."""
    return f"{kind} {share:.0%} of {length}"


def ask(texts: Sequence[Sequence[str]]) -> Query:
    """A request for a summary behind dialogues, which are its documents."""
    documents = {f"dialogue {number}": "\n".join(turns) for number, turns in enumerate(texts, 1)}
    return Query([SYSTEM, {"role": "user", "content": BETWEEN.join([*documents.values(), REQUEST])}], documents)


def score_people(outcome: Outcome, reduce: Callable[[list[float]], float]) -> float:
    """ROUGE-L to each person's summary, reduced to one number."""
    people = (outcome.expected or "").split(BETWEEN)
    return reduce([score_rouge_l(outcome.text, summary) or 0.0 for summary in people])


def _compare(pair: Pair) -> float | None:
    return pair.full and 100 * (score_people(pair.own, fmean) - score_people(pair.full, fmean))


FOUND = (
    Figure("rouge_l", "ROUGE-L, mean of people's", ".3f", lambda p: score_people(p.own, fmean), estimate_mean),
    Figure("full_rouge_l", "full prefill's", ".3f", lambda p: p.full and score_people(p.full, fmean), estimate_mean),
    Figure("rouge_l_points", "difference in points", "+.1f", _compare, estimate_mean),
    Figure("best_rouge_l", "ROUGE-L, best of people's", ".3f", lambda p: score_people(p.own, max), estimate_mean),
    Figure(
        "rouge_l_to_full",
        "ROUGE-L to full prefill",
        ".3f",
        lambda p: p.full and score_rouge_l(p.own.text, p.full.text),
        estimate_mean,
    ),
    *(figure for name in SHOWN for figure in FIGURES if figure.name == name),
    Figure("paper_similarity", "similarity", ".2f", lambda p: p.own.extra.get("similarity")),
    Figure("changed", "tokens changed", ".2f", lambda p: p.own.extra.get("changed")),
)


def make_watch(subject: Subject) -> Callable[..., Any]:
    """What notes for each call how alike its prompt and the stored one are, by the paper's measure and by tokens."""
    renderer, embeddings = PromptRenderer(subject.tokenizer), subject.model.get_input_embeddings()

    @cache
    def compare(stored: str, asked: str) -> dict[str, float]:
        ids = [renderer.render([{"role": "user", "content": text}], {}).token_ids for text in (stored, asked)]
        with torch.inference_mode():
            vectors = [embeddings(torch.from_numpy(own).to(subject.model.device)).float() for own in ids]
        distance = measure_hamming_distance(vectors[1], vectors[0])
        same = SequenceMatcher(None, ids[0].tolist(), ids[1].tolist(), autojunk=False).ratio()
        return {"similarity": compute_paper_similarity(distance), "changed": 1 - same}

    @contextmanager
    def watch(case: Case, policy: str, index: int) -> Iterator[dict[str, float]]:
        texts = [query.prompt[-1]["content"] for query in (*case.references, case.target)]
        yield compare(*texts)

    return watch


def make_scenarios(args: argparse.Namespace, subject: Subject) -> Iterator[Scenario]:
    """One for each kind, share and length; shorter prompts first."""
    dialogues = read_dialogues(args.dialogues, args.rewritten)
    require(len(dialogues) > 0, "--rewritten", str(args.rewritten), "a file with rewritten turns of --dialogues")
    for length in sorted(args.tokens):
        for kind in args.kinds:
            for share in args.shares:
                cases = make_cases(
                    kind,
                    share,
                    length,
                    args.cases,
                    args.seed,
                    dialogues,
                    lambda text: len(subject.tokenizer.encode(text)),
                )
                name = name_scenario(kind, share, length)
                yield Scenario(name, cases, args.cases, max_new_tokens=args.max_new_tokens or NEW_TOKENS)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse ``arguments``, by default those of this process."""
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    command.add_arguments(parser, PROTOCOL)
    parser.description = __doc__
    parser.set_defaults(program=f"python {Path(sys.argv[0]).as_posix()}")
    parser.add_argument("--cases", type=command.parse_count, default=CASES, metavar="N", help=f"of each ({CASES})")
    parser.add_argument("--dialogues", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--rewritten", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, metavar="N", help="most of a prompt's text")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["rewritten"])
    parser.add_argument("--shares", nargs="+", type=_parse_share, default=[1.0], help="of turns, above 0 up to 1")
    return parser.parse_args(arguments)


def _parse_share(text: str) -> float:
    if not (re.fullmatch(r"[\d.]+", text) and 0 < float(text) <= 1):
        raise argparse.ArgumentTypeError(f"{text!r}; accepted is a share above 0 up to 1")
    return float(text)


def make_tables(paths: Sequence[Path]) -> str:
    """What runs wrote, as Markdown: a headline and a table for each."""
    parts = []
    for path in paths:
        found = json.loads(path.read_text(encoding="utf-8"))
        shown = [figure for figure in FOUND if figure.name in IN_TABLES]
        titles = ["scenario", "policy", "n", *(figure.title for figure in shown)]
        lines = [
            [row["scenario"], row["policy"], str(row["cases"]), *(_show(row["figures"], figure) for figure in shown)]
            for row in found["rows"]
            if row["cases"]
        ]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *lines))
        parts.append(f"{make_headline(found)}\n\n{table}")
    return "\n\n".join(parts)


def _show(figures: Mapping[str, Sequence[float]], figure: Figure) -> str:
    if figure.name not in figures:
        return "-"
    value, low, high = (f"{number * figure.scale:{figure.form}}" for number in figures[figure.name])
    return f"{value} [{low}, {high}]" if low != high else value


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the arguments ask for, or print tables."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["tables"]:
        print(make_tables([Path(name) for name in given[1:]]))
        return
    args = parse_arguments(arguments)
    study, subject = command.prepare(args, PROTOCOL, find=lambda args, subject: [])
    args.data = args.rewritten  # so that a journal over other rewritings is not gone on with
    scenarios = list(make_scenarios(args, subject))
    found: Study = replace(
        study,
        title="The paper's protocol",
        scenarios=scenarios,
        figures=tuple(map(count_fired, FOUND)),
        watch=make_watch(subject),
    )
    corrupt = make_corruptions(found.configs, args.seed)
    run_study(found, subject, args, partial(CorruptingBench, corrupt=corrupt))


if __name__ == "__main__":
    main()
