"""Draws what each phase of a call does, from the reports of a few real calls; the pictures of docs/how_it_works.md.

    PYTHONPATH=. python examples/lab/draw_phases.py --model FOLDER --out docs/images

Six Wikipedia paragraphs (XQuAD) are asked about, again in the same order, in another order with several budgets, and
with some sentences in other words. The model that ships reads its made-up news instead. Nothing is drawn that is not in
a report or in ``engine.stats()``; no text is shown. Needs the extra ``lab``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch, Polygon, Rectangle
from matplotlib.path import Path as ShapePath
from matplotlib.transforms import Bbox

from semsharekv_integrations import EngineConfig, ReuseConfig, ReuseReport, SemShareEngine
from semsharekv_integrations.lab.scenarios import Query
from semsharekv_integrations.lab.texts import Passage, ask, make_news, read_passages
from semsharekv_integrations.model.loading import REFERENCE_MODEL
from semsharekv_integrations.report import Origin
from semsharekv_integrations.reuse.sentences import say_the_same

matplotlib.use("Agg")
SIZE, LONGEST = 6, 1600  # documents in a prompt, and characters of one
ORDER = (3, 0, 5, 2, 4, 1)  # of the documents when they come back
BUDGETS = (0.1, 0.3, 0.6)
USUAL, KEPT = 0.3, 0.5  # the budget of all other pictures; the share of KV that one call keeps for decoding
ANSWER_TOKENS = 32
COLOURS: Mapping[Origin, str] = {
    "prefix": "#1b8a5c",
    "identical": "#2f74d0",
    "fuzzy": "#c77700",
    "computed": "#d5dae2",
}
WORDS: Mapping[Origin, str] = {
    "prefix": "exact prefix",
    "identical": "moved",
    "fuzzy": "reworded",
    "computed": "computed",
}
INK, SOFT = "#1c2430", "#566173"
LABEL = {"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.9, "linewidth": 0}
DOTS_PER_INCH = 120
BEFORE_FIRST_TOKEN = {  # phases, with the colours that they have in pictures
    "render": "#8a94a6",
    "lookup": "#1b8a5c",
    "match": "#c77700",
    "plan": "#7a4fbf",
    "gather": "#2f74d0",
    "attend": "#b0307a",
    "forward": "#d5dae2",
}
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": SOFT,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b3bccb",
}


@dataclass(frozen=True)
class Calls:
    """Reports of the calls that are drawn.

    Attributes:
        first: a prompt over the documents, with an empty store.
        again: the same beginning, with another question.
        moved: the documents in another order behind ``first``, with a third question, by budget.
        kept: as ``moved``, with a share of the prompt's KV kept for decoding.
        reworded: the documents behind ``first`` in mode ``semantic``, with some sentences in other words.
        stored: ``engine.stats()`` at the start and behind ``first``, ``again`` and ``moved``.
    """

    first: ReuseReport
    again: ReuseReport
    moved: Mapping[float, ReuseReport]
    kept: ReuseReport
    reworded: ReuseReport
    stored: Sequence[Mapping[str, float]]


def choose_passages(passages: Sequence[Passage]) -> list[Passage]:
    """Return the passages of which most sentences are known in other words that say the same, none too long."""
    short = [passage for passage in passages if len(passage.text) <= LONGEST]
    return sorted(short, key=lambda passage: -len(find_accepted(passage)))[:SIZE]


def find_accepted(passage: Passage) -> dict[int, str]:
    """Return the wordings of its sentences, by index, that mode ``semantic`` takes for the sentence itself."""
    known = {**passage.reworded_here, **passage.reworded}
    return {index: text for index, text in known.items() if say_the_same(passage.sentences[index], text)}


def reword(passage: Passage) -> str:
    """Return its text in the accepted wordings."""
    other = find_accepted(passage)
    return " ".join(other.get(index, sentence) for index, sentence in enumerate(passage.sentences))


def make_calls(model: str) -> Calls:
    """Make the calls, on one set of weights, with a store for each setting."""
    own = choose_passages(make_news() if model == REFERENCE_MODEL else read_passages())
    texts = {passage.id: passage.text for passage in own}
    turned = {own[index].id: own[index].text for index in ORDER}
    questions = [passage.questions[0].text for passage in own]
    first, again = ask(texts, questions[0]), ask(texts, questions[1])
    moved = ask(turned, questions[2])
    other = ask({passage.id: reword(passage) for passage in own}, questions[2])
    loaded = SemShareEngine.from_pretrained(model, dtype="float32")

    def engine(**reuse: Any) -> SemShareEngine:
        config = EngineConfig(reuse=ReuseConfig(**{"report_origins": True, **reuse}))
        return SemShareEngine(loaded.model, loaded.tokenizer, config)

    def behind_first(query: Query, **reuse: Any) -> ReuseReport:
        made = engine(**reuse)
        answer(made, first)
        return answer(made, query)

    main = engine(mode="identical", budget=USUAL)
    answer(main, ask({"warm-up": own[0].text[:400]}, "Why?"), namespace="warm-up")  # one-time costs
    main.clear("warm-up")
    stored, told = [main.stats()], list[ReuseReport]()
    for query in (first, again, moved):
        told.append(answer(main, query))
        stored.append(main.stats())
    budgets = {
        each: told[2] if each == USUAL else behind_first(moved, mode="identical", budget=each) for each in BUDGETS
    }
    return Calls(
        told[0],
        told[1],
        budgets,
        behind_first(moved, mode="identical", budget=USUAL, retention_ratio=KEPT),
        behind_first(other, mode="semantic", budget=USUAL),
        stored,
    )


def answer(engine: SemShareEngine, query: Query, **options: Any) -> ReuseReport:
    """Return the report of one call."""
    options = {"documents": query.documents, "max_new_tokens": ANSWER_TOKENS, **options}
    return engine.generate(query.prompt, **options).report


def find_places(report: ReuseReport) -> dict[str, tuple[int, int]]:
    """Return where each document's tokens begin and end in the prompt, by id."""
    places: dict[str, tuple[int, int]] = {}
    for run in report.origins:
        if run.document_id is not None:
            start = places.get(run.document_id, (run.start, 0))[0]
            places[run.document_id] = start, run.start + run.tokens
    return places


def name_documents(calls: Calls) -> dict[str, str]:
    """Return a letter for each document, in the order of the first prompt."""
    return {name: chr(ord("A") + at) for at, name in enumerate(find_places(calls.first))}


def draw_track(plot: Axes, y: float, report: ReuseReport, letters: Mapping[str, str], height: float = 0.55) -> None:
    """Draw a prompt from left to right, each token in the colour of where its KV came from, with its documents."""
    for origin, colour in COLOURS.items():
        runs = [run for run in report.origins if run.origin == origin]
        corners = [Bbox.from_bounds(run.start, y, run.tokens, height).corners()[[0, 1, 3, 2]] for run in runs]
        if corners:
            shape = ShapePath.make_compound_path(*[ShapePath(four) for four in corners])
            plot.add_patch(PathPatch(shape, color=colour, linewidth=0))
    for name, (start, stop) in find_places(report).items():
        frame = Rectangle((start, y), stop - start, height, fill=False, edgecolor=INK, linewidth=0.8)
        plot.add_patch(frame)
        middle = ((start + stop) / 2, y + height / 2)
        plot.text(*middle, letters[name], ha="center", va="center", fontsize=9, weight="bold", bbox=LABEL)


def begin_tracks(height: float, reports: Sequence[ReuseReport], top: float) -> tuple[Any, Axes]:
    """Return a picture whose axis has the prompts' tokens from left to right, and rows from 0 up to ``top``."""
    picture, plot = pyplot.subplots(figsize=(7.4, height), layout="constrained")
    plot.set_xlim(0, max(report.prompt_tokens for report in reports))
    plot.set_ylim(-0.1, top)
    plot.set_xlabel("token of the prompt")
    plot.spines["left"].set_visible(False)
    return picture, plot


def label_rows(plot: Axes, labels: Sequence[tuple[float, str]]) -> None:
    """Write a label left of each row."""
    plot.set_yticks([y for y, _ in labels], [label for _, label in labels])
    plot.tick_params(axis="y", length=0)


def show_origins(plot: Axes, *origins: Origin) -> None:
    """Draw the legend of these origins above the plot."""
    keys = [Rectangle((0, 0), 1, 1, color=COLOURS[origin]) for origin in origins]
    names = [WORDS[origin] for origin in origins]
    plot.legend(keys, names, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(keys), frameon=False)


def draw_prefix(calls: Calls) -> Any:
    """The first two calls: what the second begins with is taken as it is."""
    picture, plot = begin_tracks(2.1, [calls.first, calls.again], 1.75)
    letters = name_documents(calls)
    draw_track(plot, 1.05, calls.first, letters)
    draw_track(plot, 0.1, calls.again, letters)
    label_rows(plot, [(1.32, "first call"), (0.37, "second call,\nother question")])
    show_origins(plot, "prefix", "identical", "computed")
    return picture


def draw_match(calls: Calls) -> Any:
    """The documents in another order, and with sentences in other words, below what is stored of them."""
    moved, letters = calls.moved[USUAL], name_documents(calls)
    picture, plot = begin_tracks(3.5, [calls.first, moved, calls.reworded], 3.55)
    draw_track(plot, 2.9, calls.first, letters)
    draw_track(plot, 1.25, moved, letters)
    draw_track(plot, 0.1, calls.reworded, letters)
    stored = find_places(calls.first)
    for name, (start, stop) in find_places(moved).items():
        above = stored[name]
        corners = [(above[0], 2.87), (above[1], 2.87), (stop, 1.83), (start, 1.83)]
        plot.add_patch(Polygon(corners, color=COLOURS["identical"], alpha=0.18, linewidth=0))
    rows = [(3.17, "stored by the\nfirst call"), (1.52, "other order\n(identical)"), (0.37, "other words\n(semantic)")]
    label_rows(plot, rows)
    show_origins(plot, "prefix", "identical", "fuzzy", "computed")
    return picture


def draw_plan(calls: Calls) -> Any:
    """The same prompt with several budgets."""
    picture, plot = begin_tracks(2.9, list(calls.moved.values()), 2.75)
    letters, labels = name_documents(calls), []
    for row, (budget, report) in enumerate(calls.moved.items()):
        y = 2.0 - row * 0.95
        draw_track(plot, y, report, letters)
        labels.append((y + 0.27, f"budget {budget:g}:\n{report.compute_ratio:.0%} computed"))
    label_rows(plot, labels)
    show_origins(plot, "prefix", "identical", "computed")
    return picture


def draw_move(calls: Calls) -> Any:
    """By how many positions each document's keys are turned."""
    before, after = find_places(calls.first), find_places(calls.moved[USUAL])
    letters = name_documents(calls)
    shifts = {letters[name]: start - before[name][0] for name, (start, _) in after.items()}
    picture, plot = pyplot.subplots(figsize=(7.4, 2.6), layout="constrained")
    names = sorted(shifts)
    bars = plot.barh(names, [shifts[name] for name in names], color=COLOURS["identical"], height=0.6)
    plot.bar_label(bars, [f"{shifts[name]:+d}" for name in names], padding=4)
    plot.axvline(0, color=INK, linewidth=0.8)
    plot.margins(x=0.12)
    plot.invert_yaxis()
    plot.set_xlabel("positions by which the keys of a document are turned")
    plot.set_ylabel("document")
    return picture


def draw_compute(calls: Calls) -> Any:
    """How many of each document's tokens are computed again, and how many are not."""
    report, letters = calls.moved[USUAL], name_documents(calls)
    uses = sorted(report.documents, key=lambda use: letters[use.document_id])
    names = [letters[use.document_id] for use in uses]
    reused = [use.reused_tokens for use in uses]
    computed = [use.tokens - use.reused_tokens for use in uses]
    picture, plot = pyplot.subplots(figsize=(7.4, 2.8), layout="constrained")
    plot.barh(names, reused, color=COLOURS["identical"], height=0.6, label="moved")
    bars = plot.barh(names, computed, left=reused, color=COLOURS["computed"], height=0.6, label="computed again")
    plot.bar_label(bars, [f"{c / use.tokens:.0%} again" for c, use in zip(computed, uses, strict=True)], padding=4)
    plot.margins(x=0.14)
    plot.invert_yaxis()
    plot.set_xlabel("tokens of the document")
    plot.set_ylabel("document")
    plot.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    return picture


def draw_seconds(calls: Calls) -> Any:
    """Seconds to the first token of three calls, by phase."""
    rows = {"first call": calls.first, "same beginning": calls.again, "other order": calls.moved[USUAL]}
    picture, plot = pyplot.subplots(figsize=(7.4, 2.3), layout="constrained")
    left = [0.0] * len(rows)
    for phase, colour in BEFORE_FIRST_TOKEN.items():
        seconds = [report.phases_s.get(phase, 0.0) for report in rows.values()]
        plot.barh(list(rows), seconds, left=left, color=colour, height=0.6, label=phase)
        left = [sum(pair) for pair in zip(left, seconds, strict=True)]
    for at, report in enumerate(rows.values()):
        plot.text(left[at], at, f"  {report.ttft_s:.2f} s", va="center")
    plot.margins(x=0.12)
    plot.invert_yaxis()
    plot.set_xlabel("seconds to the first token, by phase")
    handles, labels = plot.get_legend_handles_labels()
    plot.legend(handles, labels, loc="lower right", bbox_to_anchor=(1, 1), ncols=7, frameon=False, columnspacing=1)
    return picture


def draw_decode(calls: Calls) -> Any:
    """Tokens of the answer that needed no pass of their own, and KV kept for decoding."""
    told = {"second call": calls.again, "other order": calls.moved[USUAL], f"keeping {KEPT:.0%}": calls.kept}
    picture, (left, right) = pyplot.subplots(1, 2, figsize=(7.4, 2.3), layout="constrained", sharey=True)
    names = list(told)
    drafted = [report.accepted_tokens for report in told.values()]
    alone = [report.output_tokens - report.accepted_tokens for report in told.values()]
    left.barh(names, alone, color=COLOURS["computed"], height=0.55, label="one pass each")
    left.barh(names, drafted, left=alone, color=COLOURS["prefix"], height=0.55, label="from a draft")
    left.set_xlabel("tokens of the answer")
    left.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    left.invert_yaxis()
    mib = [report.kv_retained_bytes / 2**20 for report in told.values()]
    bars = right.barh(names, mib, color=COLOURS["identical"], height=0.55)
    right.bar_label(bars, [f"{report.kv_retained_ratio:.0%}" for report in told.values()], padding=4)
    right.margins(x=0.16)
    right.set_xlabel("MiB of the prompt's KV while decoding")
    return picture


def draw_store(calls: Calls) -> Any:
    """What each call adds to the store."""
    names = ("first call", "same beginning,\nother question", "other order")
    held = [each["store_bytes"] / 2**20 for each in calls.stored]
    before, added = held[:-1], [max(0.0, new - old) for old, new in pairwise(held)]
    picture, plot = pyplot.subplots(figsize=(7.4, 2.3), layout="constrained")
    plot.barh(names, before, color=COLOURS["computed"], height=0.6, label="there before")
    bars = plot.barh(names, added, left=before, color=COLOURS["prefix"], height=0.6, label="added by the call")
    plot.bar_label(bars, [f"+{new:.1f} MiB" for new in added], padding=4)
    plot.margins(x=0.16)
    plot.invert_yaxis()
    plot.set_xlabel("MiB of KV in the store behind the call")
    plot.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    return picture


PICTURES: Mapping[str, Callable[[Calls], Any]] = {
    "prefix": draw_prefix,
    "match": draw_match,
    "plan": draw_plan,
    "move": draw_move,
    "compute": draw_compute,
    "decode": draw_decode,
    "store": draw_store,
    "seconds": draw_seconds,
}


def draw(calls: Calls, out: Path) -> list[Path]:
    """Write every picture to the folder ``out``; return where they are."""
    drawn = []
    for name, make in PICTURES.items():
        path = out / f"phase-{name}.png"
        with pyplot.rc_context(STYLE):
            picture = make(calls)
            picture.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})
            pyplot.close(picture)
        drawn.append(path)
    return drawn


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    """Make the calls, draw them, and print what was drawn and what each call reused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=REFERENCE_MODEL, help="folder or hub id (default: %(default)s, built in)")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder of the pictures (%(default)s)")
    args = parser.parse_args(arguments)
    calls = make_calls(args.model)
    drawn = draw(calls, args.out)
    told = {"first": calls.first, "again": calls.again, "kept": calls.kept, "reworded": calls.reworded}
    told |= {f"moved, budget {budget:g}": report for budget, report in calls.moved.items()}
    for name, report in told.items():
        counts = (report.prompt_tokens, report.prefix_tokens, report.identical_tokens, report.fuzzy_tokens)
        print(name, *counts, f"{report.compute_ratio:.2f} computed, {report.ttft_s:.2f} s", report.declined or "")
    for path in drawn:
        print(path)
    return drawn


if __name__ == "__main__":
    main()
