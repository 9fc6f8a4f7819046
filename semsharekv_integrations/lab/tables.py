"""Rows of figures as Markdown and for a terminal. A column that no row has anything for is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from semsharekv_integrations.lab.metrics import Estimate, Row

LEGEND = (
    "Brackets are 95% intervals; there are none where all cases gave the same. Figures are over the cases on which "
    "reuse fired, beside a full prefill of the same cases, or over all of them for a control. Similarity, KV kept, "
    "compute and TTFT ratio (a full prefill's over the policy's) are medians; the last column is over the cases on "
    "which reuse did not fire."
)
NOTHING = "-"


class Column(NamedTuple):
    """A heading, and what stands under it."""

    title: str
    cell: Callable[[Row], str]


def _number(value: Estimate | float | None, form: str) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, Estimate):
        low, high = f"{value.low:{form}}", f"{value.high:{form}}"
        return f"{value.value:{form}}" + (f" [{low}, {high}]" if low != high else "")
    return f"{value:{form}}"


def _fired(row: Row) -> str:
    return f"all {row.cases}" if row.counted == row.cases and not row.fired else f"{row.fired} of {row.cases}"


def _kept(row: Row) -> str:
    kept = row.kv_kept_ratio
    return _number(kept, ".3f") if kept is not None and kept.value < 1 else NOTHING


COLUMNS = (
    Column("workload", lambda row: row.workload),
    Column("policy", lambda row: row.policy),
    Column("fired of cases", _fired),
    Column("accuracy", lambda row: _number(row.accuracy, ".3f")),
    Column("full prefill's", lambda row: _number(row.full_accuracy, ".3f")),
    Column("difference in points", lambda row: _number(row.difference_points, "+.1f")),
    Column("agreement", lambda row: _number(row.agreement, ".3f")),
    Column("stale", lambda row: _number(row.stale_rate, ".3f")),
    Column("full prefill's", lambda row: _number(row.full_stale_rate, ".3f")),
    Column("ROUGE-L", lambda row: _number(row.rouge_l, ".3f")),
    Column("full prefill's", lambda row: _number(row.full_rouge_l, ".3f")),
    Column("ROUGE-L to full prefill", lambda row: _number(row.rouge_l_to_full, ".3f")),
    Column("similarity", lambda row: _number(row.similarity, ".2f")),
    Column("LSH recall", lambda row: _number(row.lsh_recall, ".3f")),
    Column("KV kept", _kept),
    Column("compute", lambda row: _number(row.compute_ratio, ".3f")),
    Column("TTFT ratio", lambda row: _number(row.ttft_ratio, ".2f")),
    Column("TTFT ratio, rest", lambda row: _number(row.rest_ttft_ratio, ".2f")),
)


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    columns = _shown(rows)
    lines = [[c.title for c in columns], ["---"] * len(columns), *([c.cell(row) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def for_terminal(rows: Sequence[Row]) -> Iterator[Table]:
    """The rows as tables for a terminal, one for each workload, with intervals under their figures."""
    _, *columns = _shown(rows)
    for workload, group in groupby(rows, lambda row: row.workload):
        shown = Table(title=workload, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for place, column in enumerate(columns):
            shown.add_column(column.title, no_wrap=place == 0, overflow="fold")
        for row in group:
            shown.add_row(*(column.cell(row).replace(" [", "\n[") for column in columns))
        yield shown


def _shown(rows: Sequence[Row]) -> list[Column]:
    return [column for column in COLUMNS if any(column.cell(row) != NOTHING for row in rows)]
