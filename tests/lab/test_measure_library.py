"""The lab's measurement of a library runs, and what it calculates holds together."""

from __future__ import annotations

from pathlib import Path

import pytest

import measure_library
from measure_library import Large, find_start


def test_a_run_writes_its_tables(folder: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "library.md"
    measure_library.main(["--quick", "--model", folder, "--out", str(out)])
    text = out.read_text()
    assert "nan" not in text and text.count("\n## ") == 2
    for table in text.split("\n## ")[1:]:
        rows = [line.count("|") for line in table.splitlines() if line.startswith("|")]
        assert len(rows) >= 4 and len(set(rows)) == 1, "columns"


def test_a_token_of_an_8b_model_takes_128_kib() -> None:
    assert Large().token_bytes == 128 * 1024


@pytest.mark.parametrize("prefill", [5_000, 20_000])
def test_reading_pays_from_where_it_takes_as_long(prefill: int) -> None:
    start = find_start(prefill, 50_000, 0.01)
    assert start is not None
    assert 0.01 + start / 50_000 <= start / prefill
    assert 0.01 + (start - 1) / 50_000 > (start - 1) / prefill
    assert find_start(prefill, prefill, 0.01) is None
