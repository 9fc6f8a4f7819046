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

from semsharekv_integrations.cli.terminal import print_table
from semsharekv_integrations.lab.bench import Results, Study
from semsharekv_integrations.lab.figures import FIGURES, Estimate, Figure, Row
from semsharekv_integrations.lab.policies import Subject

PROGRAM = "semsharekv"
UNKNOWN_COMMIT = "unknown"
NOTHING = "-"
_DISTRIBUTIONS = ("semsharekv-integrations", "torch", "transformers")
_OUTPUT_OPTION = "--out"  # left out of a recorded command: it says where the figures went, not what they are
ANSWERS = (
    *("accuracy", "full_accuracy", "difference_points", "agreement", "stale_rate", "full_stale_rate"),
    *("kl_divergence", "kv_kept_ratio", "compute_ratio", "ttft_ratio", "rest_ttft_ratio"),
)
COSTS = (
    *("prompt_tokens", "ttft_s", "ttft_ratio", "exact_ratio", "reused_tokens", "compute_ratio", "overhead"),
    *("kv_bytes", "kv_kept_ratio", "store_bytes", "store_s", "decode_tokens_per_s"),
)
_SHORT = {  # titles that fit a terminal
    "accuracy": "right",
    "difference_points": "points to off",
    "agreement": "agrees",
    "stale_rate": "stale",
    "compute_ratio": "compute",
    "prompt_tokens": "tokens",
    "ttft_s": "TTFT, ms",
    "ttft_ratio": "x off",
    "exact_ratio": "x exact",
    "overhead": "overhead",
}
_DRAWN_SHORT = ("accuracy", "difference_points", "agreement", "stale_rate", "compute_ratio", "ttft_ratio")
_SIZED_SHORT = ("prompt_tokens", "accuracy", "ttft_s", "ttft_ratio", "exact_ratio", "compute_ratio", "overhead")
LEGEND = (
    "Each figure is beside a full prefill of the same prompts. Of drawn prompts it is over the cases on which reuse "
    "fired, or over all of them for a control, and `rest` over the others; brackets are 95% intervals over cases, and "
    "there are none where all gave the same. A single prompt at a length has quartiles over timed rounds in its "
    "brackets; a first round is not timed. Times, compute, KL and bytes are medians, and ratios are taken within a "
    "round, in which every policy takes its turn, in an order drawn anew. TTFT: time to first token. Compute: "
    "token-layers computed over tokens times layers. Overhead: share of off's time over compute; 1 would be none. "
    "Before each call the store holds the references alone."
)


def recorded_command(arguments: Sequence[str] | None = None) -> str:
    """The command line to repeat, without the path that its output went to.

    Args:
        arguments: what followed ``semsharekv``; default: those of this process.
    """
    kept: list[str] = []
    is_path = False
    for argument in sys.argv[1:] if arguments is None else arguments:
        if not (is_path or argument == _OUTPUT_OPTION or argument.startswith(f"{_OUTPUT_OPTION}=")):
            kept.append(argument)
        is_path = argument == _OUTPUT_OPTION
    return shlex.join([PROGRAM, *kept])


def origin(command: str) -> dict[str, Any]:
    """What anyone needs to get the same figures: ``command``, ``commit``, ``uncommitted_changes``, ``versions``.

    The commit is ``"unknown"`` where the package does not run from a checkout of its own.
    """
    is_checkout = bool(_run_git("ls-files", "__init__.py"))
    return {
        "command": command,
        "commit": _run_git("rev-parse", "HEAD") if is_checkout else UNKNOWN_COMMIT,
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


def describe(study: Study, subject: Subject, seed: int) -> dict[str, Any]:
    """What stands above a report, but for the seconds that it took."""
    return {
        **origin(recorded_command()),
        **setting_of(subject.model),
        "title": study.title,
        "model": subject.name,
        "seed": seed,
        "judging": study.judging,
        "note": subject.note,
        "policies": {name: asdict(config) for name, config in study.configs.items()},
        "about_policies": dict(study.about),
    }


def setting_of(model: PreTrainedModel) -> dict[str, Any]:
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
    write_whole(out.with_suffix(".json"), make_json(about, rows, results) + "\n")
    write_whole(out, make_page(about, rows, figures))


def make_json(about: Mapping[str, Any], rows: Sequence[Row], results: Results | None = None) -> str:
    """Where the figures come from, and the rows; with ``results`` all that was measured as well."""
    measured = {} if results is None else asdict(results)
    return json.dumps({**about, "rows": [asdict(row) for row in rows], **measured}, indent=1)


def make_page(about: Mapping[str, Any], rows: Sequence[Row], figures: Sequence[Figure] = FIGURES) -> str:
    """All tables as Markdown, with where they come from and a line on each policy that has one.

    Args:
        about: command, commit, uncommitted_changes, versions, model, dtype, device, threads, seed, seconds, note, title
            and about_policies.
        rows: of one run.
        figures: that they may have; those that are new to this module stand with the answers.
    """
    added = [figure.name for figure in figures if figure not in FIGURES]
    policies = "\n".join(f"- {name}: {said}" for name, said in about["about_policies"].items())
    sections = (
        f"# {about['title']}",
        f"{make_headline(about)}\n\n{LEGEND}",
        f"## Answers\n\n{make_table(rows, (*ANSWERS, *added), figures)}",
        f"## Time and memory\n\n{make_table(rows, COSTS, figures)}",
        policies,
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def make_table(rows: Sequence[Row], names: Sequence[str], figures: Sequence[Figure] = FIGURES) -> str:
    """The figures of these names as a Markdown table. A column that no row has anything for is left out."""
    by_name = {figure.name: figure for figure in figures}
    columns: dict[str, Callable[[Row], str]] = {
        "scenario": lambda row: row.scenario,
        "asked": lambda row: NOTHING if row.length is None else str(row.length),
        "policy": lambda row: row.policy,
        "fired of cases": _count_cases,
        "rounds": lambda row: str(row.rounds) if row.rounds > 1 else NOTHING,
        **{by_name[name].title: _show_with(by_name[name]) for name in names if name in by_name},
        "note": lambda row: row.note.replace("|", "/") or NOTHING,
    }
    shown = {title: cells for title, show in columns.items() if set(cells := [show(row) for row in rows]) != {NOTHING}}
    lines = (list(shown), ["---"] * len(shown), *zip(*shown.values(), strict=True))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _count_cases(row: Row) -> str:
    return f"all {row.cases}" if row.counted == row.cases and not row.fired else f"{row.fired} of {row.cases}"


def _show_with(figure: Figure) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        found = row[figure.name]
        if found is None or (figure.name == "kv_kept_ratio" and found.value >= 1):
            return NOTHING
        value, low, high = (f"{number * figure.scale:{figure.form}}" for number in found)
        return f"{value} [{low}, {high}]" if low != high else value

    return show


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """The figures that matter most, and what there is to say about them."""
    for title, is_drawn, names in (("Drawn prompts", True, _DRAWN_SHORT), ("Prompts at a length", False, _SIZED_SHORT)):
        shown = [row for row in rows if (row.length is None) == is_drawn and row.rounds]
        if shown:
            print_table(console, _make_terminal_table(title, shown, names, is_drawn=is_drawn))
    places: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            where = (row.scenario, *([str(row.length)] if row.length else []), row.policy)
            places.setdefault(row.note, []).append(" ".join(where))
    for note, held in places.items():
        console.print(f"{note}: {', '.join(held)}", style="dim", highlight=False, markup=False)


def _make_terminal_table(title: str, rows: Sequence[Row], names: Sequence[str], *, is_drawn: bool) -> Table:
    """A section for each scenario and length, with the interval of a difference under it."""
    shown = [figure for name in names for figure in FIGURES if figure.name == name and any(row[name] for row in rows)]
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=0)
    for heading in ("scenario", "policy"):
        table.add_column(heading, no_wrap=True)
    for heading in (*(["fired"] if is_drawn else []), *(_SHORT[figure.name] for figure in shown)):
        table.add_column(heading, justify="right", no_wrap=True)
    for (scenario, _), section in groupby(rows, lambda row: (row.scenario, row.length)):
        for row in section:
            fired = [f"{row.fired}/{row.cases}"] if is_drawn else []
            table.add_row(scenario, row.policy, *fired, *(_show_short(row[figure.name], figure) for figure in shown))
            scenario = ""
        table.add_section()
    return table


def _show_short(found: Estimate | None, figure: Figure) -> str:
    if found is None:
        return NOTHING
    form = figure.form.replace("3", "2")
    value, low, high = (f"{number * figure.scale:{form}}" for number in found)
    return f"{value}\n[{low}, {high}]" if figure.name == "difference_points" and low != high else value
