"""What fits a terminal: tables or lists, text wrapped as it comes, errors."""

from __future__ import annotations

import io
import random

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from semsharekv_integrations.terminal import WordWrap, fold_error, print_table


def printed(table: Table, width: int) -> str:
    out = io.StringIO()
    print_table(Console(file=out, width=width), table)
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 80, 300])
def test_a_table_that_does_not_fit_becomes_a_list_of_all_it_held(width: int) -> None:
    table = Table("name", "a long heading", "", title="Title")
    table.add_row("one", "x" * 100, "[bold]last[/]")
    table.add_row("two", "", Text("[bold]as it is[/]"))
    shown = printed(table, width)
    assert max(map(len, shown.splitlines())) <= width
    assert ("a long heading: " in shown) == (width < 120)
    whole = shown.replace("\n", "").replace(" ", "")
    for part in ("Title", "one", "two", "x" * 100, "last", "[bold]asitis[/]"):
        assert part in whole


def test_text_in_pieces_is_wrapped_as_text_at_once() -> None:
    rng = random.Random(0)
    text = " ".join("w" * rng.randint(1, 9) for _ in range(200)) + "\n\nnew paragraph " + "x" * 50
    for size in (1, 3, 1000):
        out: list[str] = []
        wrap = WordWrap(out.append, 20, column=6)
        for start in range(0, len(text), size):
            wrap.add(text[start : start + size])
        wrap.end()
        first, *lines = "".join(out).split("\n")
        assert len(first) <= 14 and all(len(line) <= 20 for line in lines)
        assert "".join("".join(out).split()) == "".join(text.split()), "nothing is lost"
        assert set("".join(out).split()) >= {"paragraph"}, "words stay whole"


def test_an_error_is_one_line_where_it_fits_and_keeps_paths_whole() -> None:
    assert fold_error("error: short\nand sweet") == "error: short and sweet"
    path = "/" + "a" * 100
    folded = fold_error(f"error: {path} cannot be read, " + "which is a pity " * 9)
    assert path in folded
    assert all(len(line) <= 80 for line in folded.splitlines() if path not in line)
