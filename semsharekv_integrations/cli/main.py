"""The ``semsharekv`` command: arguments in, lines of 80 columns or JSON out, errors in a line.

Exit codes: 0 done, 1 the work failed, 2 what was asked for cannot be done, as the error says, 130 interrupted. Heavy
modules are imported once a subcommand needs them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from semsharekv_integrations import __version__
from semsharekv_integrations.cli.terminal import HelpFormatter, fold_error
from semsharekv_integrations.errors import SemShareError

_COMMANDS = {  # name: its module, and what it is for
    "demo": ("demo.command", "a summarization chain, a query engine and a chat, with their reuse"),
    "chat": ("cli.chat", "a chat in the terminal that shows what was reused"),
    "bench": ("lab.command", "is the answer still right? what did reuse save?"),
    "inspect": ("inspect_command", "what a store's directory holds"),
    "clear": ("clear_command", "delete what a store's directory holds"),
}
_ALSO = {"bench": ("quality",)}  # names of before


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
        self.exit(_fail(message, 2))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parser().parse_args(arguments)
    try:
        return int(args.run(args))
    except (SemShareError, ValueError) as error:
        return _fail(str(error), 2)
    except BrokenPipeError:  # who reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def entry_point() -> NoReturn:
    """What the installed ``semsharekv`` script calls."""
    sys.exit(main())


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"{fold_error(f'error: {message}')}\n")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="semsharekv",
        description="KV-cache reuse for local transformers models.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"semsharekv {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, (module, text) in _COMMANDS.items():
        loads, also = f"semsharekv_integrations.{module}", _ALSO.get(name, ())
        commands.add_parser(name, aliases=also, help=text, loads=loads, formatter_class=HelpFormatter)
    return parser
