"""What the commands share: arguments that name an engine or an address, and output that fits a terminal."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Callable
from contextlib import nullcontext
from textwrap import TextWrapper, wrap
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from semsharekv_integrations.config import MODE_SETTINGS, EngineConfig, ReuseConfig, StoreConfig
from semsharekv_integrations.errors import SemShareError

if TYPE_CHECKING:
    from semsharekv_integrations.engine import SemShareEngine

DEFAULT_MODEL = "semsharekv/reference"
MAX_COLUMNS = 80
_UNBOUNDED = 10_000  # columns


def add_engine_arguments(
    parser: argparse.ArgumentParser, *, default: str | None = DEFAULT_MODEL, about_default: str = DEFAULT_MODEL
) -> None:
    """Add the arguments that ``make_engine`` reads; the help of ``--model`` shows ``about_default``."""
    parser.add_argument("--model", default=default, help=f"folder or hub id (default: {about_default})")
    parser.add_argument("--mode", choices=MODE_SETTINGS, default="auto", help="what may be reused (default: auto)")
    dial = "of what is reused approximately, the share computed again, 0 to 1 (default: the mode's; in auto none is)"
    parser.add_argument("--budget", type=float, metavar="SHARE", help=dial)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    parser.add_argument("--dtype", default="auto", help="torch dtype, or auto for that of the weights (default)")


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``, which ``load_engine`` reads too."""
    parser.add_argument("--json", action="store_true", help="JSON on standard output, for machines")


def load_engine(args: argparse.Namespace, *, report_origins: bool = False) -> SemShareEngine:
    """Load and return the engine of ``make_engine``, weights included; a terminal shows a status meanwhile."""
    console = Console(stderr=True)
    is_shown = console.is_terminal and not args.json
    with console.status(f"Loading {args.model}") if is_shown else nullcontext():
        engine = make_engine(args, report_origins=report_origins)
        _ = engine.model  # loads the weights
    return engine


def make_engine(args: argparse.Namespace, *, report_origins: bool = False) -> SemShareEngine:
    """Return the engine that ``args`` names; its weights are not loaded yet. Some commands name a ``store``.

    ``report_origins`` is a setting of ``ReuseConfig``.
    """
    from semsharekv_integrations.engine import SemShareEngine
    from semsharekv_integrations.model.loading import hide_progress_bars

    hide_progress_bars()
    store = StoreConfig(directory=getattr(args, "store", None), libraries=getattr(args, "library", ()))
    reuse = ReuseConfig(mode=args.mode, budget=args.budget, report_origins=report_origins)
    config = EngineConfig(reuse=reuse, store=store)
    return SemShareEngine.from_pretrained(args.model, config, device=args.device, dtype=args.dtype)


def require_address(host: str, port: int) -> None:
    """Raise an error unless a server can listen at ``host`` and ``port``, 0 for a free one.

    So a command says so before it loads a model. Others may still take the port until then.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(place)
    except OSError as error:
        raise SemShareError(f"nothing can listen at host {host!r} and port {port}: {error.strerror}") from error


def print_table(console: Console, table: Table) -> None:
    """Print the table; if it is wider than the terminal, print each row as a list of its non-empty cells."""
    unbounded = console.options.update(max_width=_UNBOUNDED)
    if Measurement.get(console, unbounded, table).maximum <= console.width:
        console.print(table)
        return
    if table.title:
        console.print(table.title, style="bold", markup=False, highlight=False)
    headers = [_as_text(column.header) for column in table.columns]
    for row in zip(*(list(column.cells) for column in table.columns), strict=True):
        lead = "- "
        for header, cell in zip(headers, map(_as_text, row), strict=True):
            if not cell.plain.strip():
                continue
            name = f"{header.plain.replace(chr(10), ' ')}: " if header.plain else ""
            body = Text(" ").join(cell.split("\n")) if "\n" in cell.plain else cell
            console.print(Text(f"{lead}{name}") + body, highlight=False, overflow="fold")
            lead = "  "


def _as_text(cell: RenderableType) -> Text:
    return cell.copy() if isinstance(cell, Text) else Text.from_markup(str(cell))


def fold_error(message: str) -> str:
    """Return the message folded to 80 columns. Words are never cut, so that paths can be copied."""
    wrapper = TextWrapper(MAX_COLUMNS, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrapper.wrap(" ".join(message.split())))


class HelpFormatter(argparse.HelpFormatter):
    """Formats help in at most 80 columns; paragraphs and indented lines of a description stay apart."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, width=MAX_COLUMNS - 2, **kwargs)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Return a description wrapped to ``width``: paragraphs without indented lines are joined and refilled.

        Docstrings mark code, which a terminal need not.
        """
        paragraphs = []
        for paragraph in text.replace("``", "").strip().split("\n\n"):
            lines = paragraph.splitlines()
            if not any(line.startswith(" ") for line in lines):
                lines = [" ".join(lines)]
            paragraphs.append("\n".join(part for line in lines for part in _wrap_line(line, width)))
        return "\n\n".join(paragraphs)


def _wrap_line(line: str, width: int) -> list[str]:
    """Return the line in parts that fit. All keep its indent; in an indented line, later ones get two columns more."""
    if len(line) <= width:
        return [line]
    indent = line[: len(line) - len(line.lstrip())]
    return wrap(" ".join(line.split()), width, initial_indent=indent, subsequent_indent=f"{indent}  " if indent else "")


class WordWrap:
    """Hands text that comes in pieces to ``write``, with lines broken between words after ``width`` columns.

    The first piece stands at ``column`` of its line.
    """

    def __init__(self, write: Callable[[str], object], width: int, column: int = 0) -> None:
        self._write = write
        self._width = width
        self._column = column
        self._word = ""

    def add(self, text: str) -> None:
        """Write every complete word of ``text``; keep back the last one, which may go on in the next piece."""
        for char in text:
            if not char.isspace():
                self._word += char
                continue
            self.end()
            if char == "\n":
                self._break_line()
            elif self._column < self._width:
                self._write(" ")
                self._column += 1

    def end(self) -> None:
        """Write the word kept back; cut it if it is longer than a line."""
        word, self._word = self._word, ""
        if self._column and self._column + len(word) > self._width >= len(word):
            self._break_line()
        while word:
            piece, word = word[: self._width - self._column], word[self._width - self._column :]
            self._write(piece)
            self._column += len(piece)
            if word:
                self._break_line()

    def _break_line(self) -> None:
        self._write("\n")
        self._column = 0
