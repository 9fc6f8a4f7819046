"""Plots of a study: one picture for each figure of quality, with a panel for each workload; saved, not shown.

Points have 95% intervals; lines are moved apart by a point or two, so that equal ones can be told apart. The dashed
line is a full prefill of the same cases, for agreement a second full prefill, which is the noise. The negative control,
of which nothing should be reused, is in the tables alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from semsharekv_integrations.lab.extra import imported
from semsharekv_integrations.lab.metrics import CONTROLS, Estimate, Row
from semsharekv_integrations.lab.policies import FULL, POLICIES
from semsharekv_integrations.lab.studies import NEGATIVE_CONTROL, Axis

MOST_COLUMNS = 3
PANEL_INCHES = (4.6, 3.6)  # width, height
DOTS_PER_INCH = 130
_APART_INCHES = 1.5 / 72  # between lines
_MARKERS = "osD^vP*Xhdp<>"


class Quantity(NamedTuple):
    """A figure of quality: its name in files, its label, and where a row has it."""

    name: str
    label: str
    of: Callable[[Row], Estimate | None]


QUANTITIES = (
    Quantity("accuracy", "answer accuracy", lambda row: row.accuracy),
    Quantity("agreement", "agreement with full prefill", lambda row: row.agreement),
    Quantity("rouge", "ROUGE-L", lambda row: row.rouge_l),
    Quantity("recall", "LSH recall", lambda row: row.lsh_recall),
)


class _Point(NamedTuple):
    x: float
    y: Estimate


def _reaches(point: _Point) -> tuple[float, float]:
    """How far its interval goes down and up."""
    return point.y.value - point.y.low, point.y.high - point.y.value


def draw(rows: Sequence[Row], title: str, axis: Axis, out: Path) -> list[Path]:
    """Write one picture beside ``out`` for each quantity that the rows have; where they are.

    Args:
        rows: of one study.
        title: of the study.
        axis: what goes where.
        out: a file whose name, without its ending, the pictures' names begin with.

    Raises:
        MissingPackageError: if matplotlib is not installed.
    """
    figures = imported("matplotlib.figure", "Drawing plots")
    imported("matplotlib.backends.backend_agg", "Drawing plots")
    found = []
    for quantity in QUANTITIES:
        panels = _panels(rows, axis, quantity)
        if panels:
            path = out.with_name(f"{out.stem}.{quantity.name}.png")
            _figure(figures, panels, rows, title, axis, quantity).savefig(path, dpi=DOTS_PER_INCH)
            found.append(path)
    return found


def _panels(rows: Sequence[Row], axis: Axis, quantity: Quantity) -> dict[str, dict[str, list[_Point]]]:
    """Points by panel and series, from left to right; controls are no points."""
    panels: dict[str, dict[str, list[_Point]]] = {}
    for row in rows:
        x, y = axis.x(row), quantity.of(row)
        if x is not None and y is not None and not _is_control(row):
            panels.setdefault(axis.panel(row), {}).setdefault(axis.series(row), []).append(_Point(x, y))
    return {name: {key: sorted(points) for key, points in lines.items()} for name, lines in panels.items()}


def _is_control(row: Row) -> bool:
    is_plain = row.policy in POLICIES and POLICIES[row.policy].reuse.mode in CONTROLS
    return is_plain or row.workload.startswith(NEGATIVE_CONTROL)


def _figure(
    figures: Any,
    panels: dict[str, dict[str, list[_Point]]],
    rows: Sequence[Row],
    title: str,
    axis: Axis,
    quantity: Quantity,
) -> Any:
    columns = min(len(panels), MOST_COLUMNS)
    height = ceil(len(panels) / columns)
    width, inches = PANEL_INCHES
    figure = figures.Figure(figsize=(max(width * columns, 1.4 * width), inches * height + 1.3), layout="constrained")
    grid = list(figure.subplots(height, columns, squeeze=False, sharex=True, sharey=True).flat)
    series = list(dict.fromkeys(axis.series(row) for row in rows if axis.x(row) is not None and not _is_control(row)))
    for plot, (name, lines) in zip(grid, panels.items(), strict=False):
        _draw_panel(plot, name, lines, series, axis)
        _draw_baseline(plot, [row for row in rows if axis.panel(row) == name], axis, quantity)
    if not axis.is_logarithmic:  # shares from none on, so that near ones look near
        grid[0].set_xlim(left=min(0.0, grid[0].get_xlim()[0]))
    for plot in grid[::columns]:
        plot.set_ylabel(quantity.label)
    for plot in grid[len(panels) :]:
        plot.set_visible(False)
    found = [plot.get_legend_handles_labels() for plot in figure.axes]
    handles = {label: handle for pair in found for handle, label in zip(*pair, strict=True)}
    at = {"loc": "outside lower center", "ncols": min(5, len(handles)), "frameon": False}
    figure.legend(handles.values(), handles.keys(), **at)
    figure.suptitle(title)
    return figure


def _draw_panel(plot: Any, name: str, lines: dict[str, list[_Point]], series: Sequence[str], axis: Axis) -> None:
    if axis.is_logarithmic:
        plot.set_xscale("log", base=2)
        plot.xaxis.set_major_formatter("{x:g}")
    for label, points in lines.items():
        at = series.index(label)
        x, y = [point.x for point in points], [point.y.value for point in points]
        spread = [[max(0.0, side) for side in sides] for sides in zip(*map(_reaches, points), strict=True)]
        style = {"marker": _MARKERS[at % len(_MARKERS)], "color": f"C{at % 10}", "markersize": 5, "linewidth": 1.2}
        where = _aside(plot, at - (len(series) - 1) / 2)
        plot.errorbar(x, y, yerr=spread, label=label, capsize=2, elinewidth=0.8, transform=where, **style)
        plot.update_datalim([(p.x, end) for p in points for end in (p.y.low, p.y.high)])
    plot.autoscale_view()
    plot.set_title(name, fontsize=10)
    plot.set_xlabel(axis.label)
    plot.tick_params(labelbottom=True)
    plot.grid(alpha=0.25)


def _aside(plot: Any, steps: float) -> Any:
    """Where data stands, moved to the right by as many steps."""
    transforms = imported("matplotlib.transforms", "Drawing plots")
    move = transforms.ScaledTranslation(steps * _APART_INCHES, 0, plot.figure.dpi_scale_trans)
    return plot.transData + move


def _draw_baseline(plot: Any, rows: Sequence[Row], axis: Axis, quantity: Quantity) -> None:
    """A dashed line: level where the panel is of one workload, else along the axis."""
    named = "rerun" if quantity.name == "agreement" else FULL
    found = [(axis.x(row), value) for row in rows if row.policy == named and (value := quantity.of(row)) is not None]
    style = {"color": "black", "linestyle": "--", "linewidth": 1, "zorder": 0}
    label = "full prefill again" if named == "rerun" else "full prefill"
    if len(found) == 1:
        plot.axhline(found[0][1].value, label=label, **style)
    elif found:
        points = sorted((x, value.value) for x, value in found if x is not None)
        plot.plot([x for x, _ in points], [y for _, y in points], label=label, **style)
