"""Reports: rows of figures for a terminal, as Markdown and as JSON, with what anyone needs to get them again."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from semsharekv_integrations.lab.bench import Results
from semsharekv_integrations.lab.figures import FIGURES, Figure, Row
from semsharekv_integrations.terminal import print_table

NOTHING = "-"
_DISTRIBUTIONS = ("semsharekv-integrations", "torch", "transformers")
_OUTPUT_OPTION = "--out"  # left out of a recorded command: it says where the figures went, not what they are
LEGEND = (
    "Each figure is beside a full prefill of the same prompts, and over every case. Brackets are 95% intervals over "
    "cases, or bootstraps over groups where cases come in groups over the same documents; there are none where all "
    "gave the same. p is McNemar's exact one. Times, compute, bytes and the KL of first tokens are medians, and ratios "
    "are taken within a case. TTFT: time to first token. Compute: token-layers computed over tokens times layers. "
    "An answer is right if it holds a gold one (as SQuAD normalizes, whole words). F1 is SQuAD's, to the gold answers "
    "and to the full prefill's answer. KL and top-1 are along the full prefill's own answer, averaged over its tokens; "
    "the worst tenth are the cases with the largest KL. Before each call the store holds the references alone. Full "
    "prefills of a group share their documents' KV, exactly, so that times are beside the first of each group alone. "
    "Floors, which differ though nothing is approximate, are over the first of each group: `chunks` is the same prompt "
    "in two pieces, `order` the same documents in the stored order."
)


def record_command(program: str, arguments: Sequence[str] | None = None) -> str:
    """The command line to repeat, without the path that its output went to; ``arguments`` default to this process's."""
    kept: list[str] = []
    is_path = False
    for argument in sys.argv[1:] if arguments is None else arguments:
        if not (is_path or argument == _OUTPUT_OPTION or argument.startswith(f"{_OUTPUT_OPTION}=")):
            kept.append(argument)
        is_path = argument == _OUTPUT_OPTION
    return f"{program} {shlex.join(kept)}".rstrip()


def describe_origin(command: str) -> dict[str, Any]:
    """What anyone needs to get the same figures: ``command``, ``commit``, ``uncommitted_changes``, ``versions``.

    The commit is ``"unknown"`` where the package does not run from a checkout of its own.
    """
    is_checkout = bool(_run_git("ls-files", "__init__.py"))
    return {
        "command": command,
        "commit": _run_git("rev-parse", "HEAD") if is_checkout else "unknown",
        "uncommitted_changes": is_checkout and bool(_run_git("status", "--porcelain")),
        "versions": {name: version(name) for name in _DISTRIBUTIONS},
    }


def _run_git(*arguments: str) -> str:
    """What git prints, run in this folder; nothing if there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def describe_machine(model: PreTrainedModel) -> dict[str, Any]:
    """What it runs on: ``dtype``, ``device`` (its name) and ``threads`` of PyTorch."""
    on_gpu = model.device.type == "cuda"
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device) if on_gpu else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
    }


def write_whole(path: Path, text: str) -> None:
    """Put the whole file in place at once, with the folders above it: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial_path.write_text(text, encoding="utf-8")
    partial_path.replace(path)


def make_headline(about: Mapping[str, Any]) -> str:
    """Where the figures come from, in one sentence."""
    commit = about["commit"][:12] + (" with uncommitted changes" if about["uncommitted_changes"] else "")
    threads = f"{about['threads']} thread{'s' if about['threads'] != 1 else ''}"
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return (
        f"`{about['command']}` at commit {commit}: model {about['model']} in {about['dtype']} on {about['device']}, "
        f"{threads}, seed {about['seed']}, {about['seconds']} s; {versions}. {about['note']}".rstrip()
    )


def write_files(
    out: Path, about: Mapping[str, Any], rows: Sequence[Row], results: Results, figures: Sequence[Figure] = FIGURES
) -> None:
    """The tables to ``out``; rows, every outcome and what was not measured as JSON beside it."""
    write_whole(out.with_suffix(".json"), make_json(about, rows, **asdict(results)) + "\n")
    write_whole(out, make_page(about, rows, figures))


def make_json(about: Mapping[str, Any], rows: Sequence[Row], **measured: Any) -> str:
    """Where the figures come from, the rows, and what is given besides."""
    return json.dumps({**about, "rows": [asdict(row) for row in rows], **measured}, indent=1)


def make_page(about: Mapping[str, Any], rows: Sequence[Row], figures: Sequence[Figure] = FIGURES) -> str:
    """All figures as Markdown, with where they come from and a line on each policy that has one."""
    tables = (f"## {name}\n\n{make_table(shown, figures)}" for name, shown in _split_rows(rows))
    policies = "\n".join(f"- {name}: {said}" for name, said in about["about_policies"].items())
    opening = [f"# {about['title']}", make_headline(about), *filter(None, [about.get("conclusion")]), LEGEND]
    return "\n\n".join([*opening, *tables, policies]).rstrip() + "\n"


def _split_rows(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    return [(name, list(found)) for name, found in groupby(rows, lambda row: row.scenario)]


def make_table(rows: Sequence[Row], figures: Sequence[Figure] = FIGURES) -> str:
    """The rows as a Markdown table. A column that no row has anything for is left out."""
    columns: dict[str, Callable[[Row], str]] = {
        "scenario": lambda row: row.scenario,
        "policy": lambda row: row.policy,
        "n": lambda row: str(row.cases or NOTHING),
        "groups": lambda row: str(row.groups or NOTHING),
        **{figure.title: _show_with(figure) for figure in figures},
        "note": lambda row: row.note.replace("|", "/") or NOTHING,
    }
    shown = {title: cells for title, show in columns.items() if set(cells := [show(row) for row in rows]) != {NOTHING}}
    lines = (list(shown), ["---"] * len(shown), *zip(*shown.values(), strict=True))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _show_with(figure: Figure, *, is_short: bool = False) -> Callable[[Row], str]:
    """What stands in a cell; in a narrow column the interval of a difference alone, below it."""
    form = figure.form.replace("3", "2").replace("4", "3") if is_short else figure.form
    gap = "\n" if is_short else " "
    has_interval = not is_short or figure.name == "difference_points"

    def show(row: Row) -> str:
        found = row[figure.name]
        if found is None or (figure.name == "kv_kept_ratio" and found.value >= 1):
            return NOTHING
        value, low, high = (f"{number * figure.scale:{form}}" for number in found)
        return f"{value}{gap}[{low}, {high}]" if has_interval and low != high else value

    return show


def print_rows(console: Console, rows: Sequence[Row], figures: Sequence[Figure] = FIGURES) -> None:
    """The figures that matter most, and what there is to say about them."""
    for name, shown in _split_rows([row for row in rows if row.cases]):
        print_table(console, _make_terminal_table(name, shown, figures))
    places: dict[str, list[str]] = {}
    for row in rows:
        places.setdefault(row.note, []).append(f"{row.scenario} {row.policy}")
    for note in filter(None, places):
        console.print(f"{note}: {', '.join(places[note])}", style="dim", highlight=False, markup=False)


def _make_terminal_table(title: str, rows: Sequence[Row], figures: Sequence[Figure]) -> Table:
    columns: dict[str, Callable[[Row], str]] = {"n": lambda row: str(row.cases)}
    for figure in figures:
        if figure.short and any(row[figure.name] for row in rows):
            columns[figure.short] = _show_with(figure, is_short=True)
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=0)
    for heading in ("policy", *columns):
        table.add_column(heading, justify="right" if heading in columns else "left", no_wrap=True)
    for row in rows:
        table.add_row(row.policy, *(show(row) for show in columns.values()))
    return table
