"""The ``semsharekv`` command. Exit codes: 0 done, 1 the work failed, 2 bad or impossible arguments, 130 interrupted."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

from semsharekv_integrations import __version__
from semsharekv_integrations.errors import SemShareError
from semsharekv_integrations.terminal import HelpFormatter, fold_error


class Command(NamedTuple):
    """One command: the module that holds it, imported when it is needed, and the names of its two functions."""

    module: str
    about: str
    add_arguments: str = "add_arguments"
    run: str = "run"
    aliases: Sequence[str] = ()


COMMANDS = {
    "demo": Command("cli.demo", "a summarization chain, a query engine and a chat, with their reuse"),
    "chat": Command("cli.chat", "a chat in the terminal that shows what was reused"),
    "serve": Command("cli.serve", "an OpenAI-compatible endpoint for one model"),
    "bench": Command("lab.command", "measure answers, time and memory, with reuse and without", aliases=("quality",)),
    "warm": Command("cli.warm", "compute the KV of a folder of documents once, for engines to mount"),
    "inspect": Command("cli.store", "list what a store's directory holds", "add_inspect_arguments", "run_inspect"),
    "clear": Command("cli.store", "delete what a store's directory holds", "add_clear_arguments", "run_clear"),
}


class _Parser(argparse.ArgumentParser):
    """A parser that imports its command's module, and so learns its arguments, when it first parses.

    A module may give it a longer description.
    """

    def __init__(self, *, command: Command | None = None, **kwargs: Any) -> None:
        super().__init__(formatter_class=HelpFormatter, **kwargs)
        self._command = command

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as the base class, after importing the command's module and adding its arguments the first time."""
        if self._command is not None:
            module = import_module(f"semsharekv_integrations.{self._command.module}")
            getattr(module, self._command.add_arguments)(self)
            self.set_defaults(run=getattr(module, self._command.run))
            self._command = None
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print ``message``, and where to read on, as an error; exit with code 2."""
        self.exit(_print_error(f"{message}; see {self.prog} --help", 2))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, print expected errors, return the exit code. ``SystemExit`` for what cannot be parsed."""
    args = _make_parser().parse_args(arguments)
    try:
        return int(args.run(args))
    except (SemShareError, ValueError) as error:
        return _print_error(str(error), 2)
    except BrokenPipeError:  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _print_error(str(error), 1)
    except KeyboardInterrupt:
        return _print_error("interrupted", 130)


def entry_point() -> NoReturn:
    """Run the command line and exit; the installed ``semsharekv`` script calls this."""
    sys.exit(main())


def _print_error(message: str, code: int) -> int:
    sys.stderr.write(f"{fold_error(f'error: {message}')}\n")
    return code


def _make_parser() -> argparse.ArgumentParser:
    """Return the parser of all ``COMMANDS``, whose modules are not imported yet."""
    parser = _Parser(prog="semsharekv", description="KV-cache reuse for local transformers models.")
    parser.add_argument("--version", action="version", version=f"semsharekv {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, command in COMMANDS.items():
        about = f"{command.about[0].upper()}{command.about[1:]}."
        commands.add_parser(name, aliases=command.aliases, help=command.about, description=about, command=command)
    return parser
