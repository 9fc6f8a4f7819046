"""What the examples share: two engines on the same weights, and a table of what each call reused.

Every question is asked twice, with reuse and as a full prefill, so that answers and times stand side by side. Knows
nothing about frameworks: an engine tells of every call that finishes, whoever made it.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from random import Random
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from semsharekv_integrations import EngineConfig, ReuseConfig, ReuseReport, SemShareEngine, SemShareError, world
from semsharekv_integrations.config import MODE_SETTINGS

REFERENCE_MODEL = "semsharekv/reference"
COLUMNS = ("", "prompt", "prefix", "identical", "similar", "computed", "TTFT", "in full", "documents")
CAPTION = "Tokens of each prompt, of them from the cache, share computed, time to the first token, documents reused"


@dataclass(frozen=True)
class Asked:
    """One question: what came out with reuse and of a full prefill, with a report for each call of the model."""

    name: str
    answer: str
    full_answer: str
    reports: tuple[ReuseReport, ...]
    full_reports: tuple[ReuseReport, ...]


class ReuseTable:
    """Runs every question on ``engine``, which reuses KV as ``mode`` allows, and on ``full``, which never does."""

    def __init__(self, model: str, mode: str) -> None:
        config = EngineConfig(reuse=ReuseConfig(mode=mode))  # type: ignore[arg-type]
        self.engine = SemShareEngine.from_pretrained(model, config)
        off = EngineConfig(reuse=ReuseConfig(mode="off"))
        self.full = SemShareEngine(self.engine.model, self.engine.tokenizer, off)
        self.asked: list[Asked] = []
        self._reports: list[ReuseReport] = []
        for engine in (self.engine, self.full):
            _warm_up(engine)
            engine.observe(self._reports.append)

    def ask(self, name: str, reusing: Callable[..., Any], full: Callable[..., Any], *given: Any) -> Asked:
        """Call both with what is ``given``; each returns an answer, made with its own engine."""
        answer, reports = str(reusing(*given)).strip(), self._taken()
        self.asked.append(Asked(name, answer, str(full(*given)).strip(), reports, self._taken()))
        return self.asked[-1]

    def _taken(self) -> tuple[ReuseReport, ...]:
        taken = tuple(self._reports)
        self._reports.clear()
        return taken

    def show(self) -> None:
        """Print every call's figures, every answer, and the time saved."""
        console = Console(markup=False, highlight=False)
        console.print(f"\n{self.engine.name}, mode {self.engine.mode}")
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=CAPTION)
        for column in COLUMNS:
            table.add_column(column, justify="right", no_wrap=True)
        for number, asked in enumerate(self.asked, 1):
            for report, full in zip_longest(asked.reports, asked.full_reports):
                table.add_row(str(number), *_figures(report), _ms(full), _documents(report))
        console.print(table)
        for number, asked in enumerate(self.asked, 1):
            console.print(f"{number}. {asked.name}\n{asked.answer}", style="bold")
            same = asked.answer == asked.full_answer
            console.print("(a full prefill says the same)" if same else f"(a full prefill says: {asked.full_answer})")
        if not self.asked:
            return
        took, in_full = (1000 * sum(r.ttft_s for r in self._all(name)) for name in ("reports", "full_reports"))
        gain = f", {in_full / took:.1f} times as fast" if round(in_full / took, 1) > 1 else ""
        console.print(f"To the first tokens: {took:.0f} ms with reuse, {in_full:.0f} ms by full prefills{gain}.")

    def _all(self, name: str) -> list[ReuseReport]:
        return [report for asked in self.asked for report in getattr(asked, name)]


def _warm_up(engine: SemShareEngine) -> None:
    """Two prompts alike, so that no figure holds one-time costs; in a namespace of their own."""
    article = world.make_document(Random(0), "Prorna")
    for news in (article, world.reword(Random(0), article)):
        engine.generate(f"{news.text}\n\nWhat happened in Prorna?", max_new_tokens=2, namespace="warm-up")


def _figures(report: ReuseReport | None) -> tuple[str, ...]:
    if report is None:  # the full prefill took another path, with more calls
        return ("",) * 6
    tokens = (report.prompt_tokens, report.prefix_tokens, report.identical_tokens, report.fuzzy_tokens)
    return (*map(str, tokens), f"{report.compute_ratio:.0%}", _ms(report))


def _ms(report: ReuseReport | None) -> str:
    return f"{1000 * report.ttft_s:.0f} ms" if report else ""


def _documents(report: ReuseReport | None) -> str:
    """How many of the documents came from the cache, for the greater part."""
    uses = report.documents if report else ()
    return f"{sum(2 * use.reused_tokens > use.tokens for use in uses)} of {len(uses)}" if uses else "-"


def model_arguments(description: str | None, mode: str = "identical") -> argparse.ArgumentParser:
    """A parser with what all examples take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=REFERENCE_MODEL, help="folder or hub id (default: %(default)s, built in)")
    parser.add_argument("--mode", choices=MODE_SETTINGS, default=mode, help="what may be reused (default: %(default)s)")
    return parser


def run(main: Callable[[], object]) -> None:
    """Run an example; what is wrong with a model or a prompt is said in a line."""
    disable_progress_bar()
    try:
        main()
    except SemShareError as error:
        sys.exit(f"error: {error}")
