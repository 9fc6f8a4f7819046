"""What fits a terminal: tables that become lists, text that is wrapped as it comes, and errors in few columns.

The arguments that say which engine a command runs on, and the engine that they say.
"""

from __future__ import annotations

import argparse
from argparse import HelpFormatter as ArgparseFormatter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from textwrap import TextWrapper, wrap
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from semsharekv_integrations.config import MODE_SETTINGS, EngineConfig, ReuseConfig

if TYPE_CHECKING:
    from semsharekv_integrations.engine import SemShareEngine

MAX_COLUMNS = 80
_UNBOUNDED = 10_000  # columns


def print_table(console: Console, table: Table) -> None:
    """Print the table, or its rows as lists where it is wider than the terminal."""
    unbounded = console.options.update(max_width=_UNBOUNDED)
    if Measurement.get(console, unbounded, table).maximum <= console.width:
        console.print(table)
        return
    if table.title:
        console.print(table.title, style="bold", markup=False, highlight=False)
    columns = [list(column.cells) for column in table.columns]
    headers = [_text(column.header) for column in table.columns]
    for row in zip(*columns, strict=True):
        _print_row(console, [(header, _text(cell)) for header, cell in zip(headers, row, strict=True)])


def _print_row(console: Console, cells: list[tuple[Text, Text]]) -> None:
    """The cells that are not empty, each with its name, the first as a heading; what is too long goes on below."""
    lead = "- "
    for header, cell in cells:
        if not cell.plain.strip():
            continue
        name = f"{header.plain.replace(chr(10), ' ')}: " if header.plain else ""
        body = Text(" ").join(cell.split("\n")) if "\n" in cell.plain else cell
        console.print(Text(f"{lead}{name}") + body, highlight=False, overflow="fold")
        lead = "  "


def _text(cell: RenderableType) -> Text:
    return cell.copy() if isinstance(cell, Text) else Text.from_markup(str(cell))


def fold_error(message: str) -> str:
    """The message as one line where it fits, else as a paragraph; words are never cut, so that paths can be copied."""
    wrapper = TextWrapper(MAX_COLUMNS, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrapper.wrap(" ".join(message.split())))


class HelpFormatter(ArgparseFormatter):
    """Of at most 80 columns; keeps paragraphs and indented lines of a description apart."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, width=MAX_COLUMNS - 2, **kwargs)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = []
        for paragraph in text.strip().split("\n\n"):
            lines = paragraph.splitlines()
            if not any(line.startswith(" ") for line in lines):
                lines = [" ".join(lines)]
            paragraphs.append("\n".join(part for line in lines for part in _wrapped(line, width)))
        return "\n\n".join(paragraphs)


def _wrapped(line: str, width: int) -> list[str]:
    """The line as it is where it fits, else in several that are indented likewise."""
    if len(line) <= width:
        return [line]
    indent = line[: len(line) - len(line.lstrip())]
    return wrap(" ".join(line.split()), width, initial_indent=indent, subsequent_indent=f"{indent}  " if indent else "")


class WordWrap:
    """Writes text that comes in pieces, and begins a new line before a word that would cross the edge.

    Args:
        write: where it goes.
        width: columns of a line.
        column: where the first line begins.
    """

    def __init__(self, write: Callable[[str], object], width: int, column: int = 0) -> None:
        self._write = write
        self._width = width
        self._column = column
        self._word = ""

    def add(self, text: str) -> None:
        """Write all of the words that are complete; the last one may go on."""
        for char in text:
            if not char.isspace():
                self._word += char
                continue
            self._put_word()
            if char == "\n":
                self._write("\n")
                self._column = 0
            elif self._column < self._width:
                self._write(" ")
                self._column += 1

    def end(self) -> None:
        """Write the last word."""
        self._put_word()

    def _put_word(self) -> None:
        word, self._word = self._word, ""
        if self._column and self._column + len(word) > self._width and len(word) <= self._width:
            self._write("\n")
            self._column = 0
        while word:
            piece, word = word[: self._width - self._column], word[self._width - self._column :]
            self._write(piece)
            self._column += len(piece)
            if word:
                self._write("\n")
                self._column = 0


DEFAULT_MODEL = "semsharekv/reference"


def add_engine_arguments(
    parser: argparse.ArgumentParser, *, default: str | None = DEFAULT_MODEL, known: str | None = None
) -> None:
    """What names a model, how it is loaded and what it may reuse; ``known`` says what the default is."""
    parser.add_argument("--model", default=default, help=f"folder or hub id (default: {known or DEFAULT_MODEL})")
    parser.add_argument("--mode", choices=MODE_SETTINGS, default="auto", help="what may be reused (default: auto)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    parser.add_argument("--dtype", default="auto", help="torch dtype, or auto for that of the weights (default)")
    parser.add_argument("--json", action="store_true", help="JSON on standard output, for machines")


def load_engine(args: argparse.Namespace) -> SemShareEngine:
    """The engine for ``args``, with its weights in memory."""
    with _busy(f"Loading {args.model}", quiet=args.json):
        from semsharekv_integrations.engine import SemShareEngine
        from semsharekv_integrations.model.loading import hide_progress_bars

        hide_progress_bars()
        config = EngineConfig(reuse=ReuseConfig(mode=args.mode))
        engine = SemShareEngine.from_pretrained(args.model, config, device=args.device, dtype=args.dtype)
        _ = engine.model
    return engine


@contextmanager
def _busy(title: str, *, quiet: bool) -> Iterator[None]:
    """Something moves on standard error's terminal, and vanishes when done."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield
        return
    with console.status(title):
        yield
