"""The ``semsharekv`` command: arguments in, tables or JSON out, errors as one line.

Exit codes: 0 done, 1 the work failed, 2 bad usage. Heavy modules are imported once a subcommand needs them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from semsharekv_integrations import __version__
from semsharekv_integrations.config import EngineConfig, ReuseConfig
from semsharekv_integrations.errors import SemShareError
from semsharekv_integrations.modes import MODE_SETTINGS

if TYPE_CHECKING:
    from semsharekv_integrations.demo import Call
    from semsharekv_integrations.engine import SemShareEngine

DEFAULT_MODEL = "semsharekv/reference"
_LOADED = {  # subcommand: its module, and what it is for
    "quality": ("lab.quality_command", "is the answer still right? every mode beside a full prefill"),
    "bench": ("lab.bench_command", "how much time and memory did reuse save? every mode beside a full prefill"),
    "inspect": ("inspect_command", "what a store's directory holds"),
    "clear": ("clear_command", "delete what a store's directory holds"),
}


class _Parser(argparse.ArgumentParser):
    """Of the command or a subcommand; ``loads`` names the module of its arguments, imported once they are needed."""

    def __init__(self, *args: Any, loads: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loads = loads

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; the first time with what ``loads`` brings."""
        if self._loads is not None:
            module = import_module(self._loads)
            self._loads = None
            module.add_arguments(self)
            self.set_defaults(run=module.run)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parser().parse_args(arguments)
    try:
        return int(args.run(args))
    except SemShareError as error:
        return _fail(str(error), 1)
    except ValueError as error:
        return _fail(str(error), 2)
    except OSError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def entry_point() -> NoReturn:
    """What the installed ``semsharekv`` script calls."""
    sys.exit(main())


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"semsharekv: error: {' '.join(message.split())}\n")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="semsharekv", description="KV-cache reuse for local transformers models.")
    parser.add_argument("--version", action="version", version=f"semsharekv {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    demo = commands.add_parser("demo", help="a summarization chain, a query engine and a chat, with their reuse")
    _model_arguments(demo)
    demo.add_argument("--documents", type=int, default=2, metavar="N", help="articles in each scenario (default: 2)")
    demo.add_argument("--seed", type=int, default=7, help="of the articles and questions (default: 7)")
    demo.set_defaults(run=_demo)
    chat = commands.add_parser("chat", help="a chat in the terminal that shows what was reused")
    _model_arguments(chat)
    chat.add_argument("--system", default="You are a helpful assistant.", help="system message; empty for none")
    chat.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    chat.add_argument("--temperature", type=float, default=0.0)
    chat.add_argument(
        "--save", type=Path, metavar="FILE", help="load stored KV from FILE if it is there; write it back"
    )
    chat.set_defaults(run=_chat)
    for name, (module, text) in _LOADED.items():
        commands.add_parser(name, help=text, loads=f"semsharekv_integrations.{module}")
    return parser


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"folder or hub id (default: {DEFAULT_MODEL}, built in)")
    parser.add_argument("--mode", choices=MODE_SETTINGS, default="auto", help="what may be reused (default: auto)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    parser.add_argument("--dtype", default="auto", help="torch dtype, or auto for that of the weights (default)")
    parser.add_argument("--json", action="store_true", help="JSON on standard output, for machines")


def _engine(args: argparse.Namespace) -> SemShareEngine:
    """The engine for ``args``, with its weights loaded behind a progress display."""
    with _progress(f"Loading {args.model}", quiet=args.json):
        from semsharekv_integrations.engine import SemShareEngine
        from semsharekv_integrations.model.loading import hide_progress_bars

        hide_progress_bars()
        config = EngineConfig(reuse=ReuseConfig(mode=args.mode))
        engine = SemShareEngine.from_pretrained(args.model, config, device=args.device, dtype=args.dtype)
        _ = engine.model
    return engine


@contextmanager
def _progress(title: str, *, quiet: bool, total: int | None = None) -> Iterator[Any]:
    """A progress bar on standard error's terminal that vanishes when done; yields the function that advances it."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)


def _demo(args: argparse.Namespace) -> int:
    console = Console()
    engine = _engine(args)
    from semsharekv_integrations.demo import NUM_CALLS, Demo

    with _progress("Running chains", quiet=args.json, total=NUM_CALLS) as advance:
        calls = []
        for call in Demo(engine, args.documents, args.seed).run():
            calls.append(call)
            advance()
    if args.json:
        sys.stdout.write(json.dumps([call.to_dict() for call in calls], indent=1) + "\n")
    else:
        _print_demo(console, engine, calls)
    promised = engine.mode in ("off", "exact")  # the same text; other modes only come close
    return 0 if not promised or all(call.same_as_off for call in calls) else 1


def _print_demo(console: Console, engine: SemShareEngine, calls: list[Call]) -> None:
    console.print(f"[bold]{engine.name}[/] on {engine.model.device}, mode [bold]{engine.mode}[/]\n")
    for scenario in dict.fromkeys(call.scenario for call in calls):
        group = [call for call in calls if call.scenario == scenario]
        console.print(_demo_table(scenario, group))
        for number, call in enumerate(group, 1):
            console.print(f"  [dim]{number}[/] [cyan]{call.question}[/]\n    {call.answer}", highlight=False)
            if call.reused_documents:
                console.print(
                    f"    [dim]documents from the cache: {', '.join(call.reused_documents)}[/]", highlight=False
                )
        console.print()
    same, right = sum(call.same_as_off for call in calls), sum(call.right for call in calls)
    console.print(f"{same} of {len(calls)} answers equal a full prefill's; {right} of {len(calls)} are right.")


def _demo_table(title: str, calls: list[Call]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("call", "prompt", "reused", "compute", "TTFT", "off", "faster", "= off", "right"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, call in enumerate(calls, 1):
        report = call.report
        counts = (
            report["prompt_tokens"],
            report["prompt_tokens"] - report["recomputed_tokens"],
            f"{report['compute_ratio']:.0%}",
        )
        times = (f"{report['ttft_s'] * 1000:.0f} ms", f"{call.off_ttft_s * 1000:.0f} ms", f"{call.speedup:.1f}x")
        table.add_row(str(number), *map(str, counts), *times, _mark(call.same_as_off), _mark(call.right))
    return table


def _mark(good: bool) -> str:
    return "[green]yes[/]" if good else "[red]no[/]"


def _chat(args: argparse.Namespace) -> int:
    console = Console()
    engine = _engine(args)
    from semsharekv_integrations.chat import Conversation, run_chat

    if args.save and args.save.exists():
        engine.load(args.save)
    conversation = Conversation(engine, args.system or None, args.max_new_tokens, args.temperature)
    run_chat(conversation, console, as_json=args.json)
    if args.save:
        engine.save(args.save)
    return 0
